// How full scans cut their work: packed columns that all threads share, tiles of rows that threads take.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace dinofast {

constexpr int64_t SHARED = 2 << 20;    // floats of packed columns that all threads work on at a time
constexpr int64_t PRIVATE = 96 << 10;  // floats of panels that one thread reads again and again from its L2
constexpr int64_t TILES = 8;           // tiles that one thread takes at a time
constexpr int64_t SMALL = 1 << 18;     // multiply-adds below which waking threads costs more than it saves

// Take some of the tiles that are left: fewer towards the end, so that threads finish together.
inline bool take(std::atomic<int64_t>& next, int64_t total, int threads, int64_t& begin, int64_t& end) {
    begin = next.load();
    do {
        if (begin >= total) return false;
        end = begin + std::clamp<int64_t>((total - begin) / (4 * threads), 1, TILES);
    } while (!next.compare_exchange_weak(begin, end));
    return true;
}

}  // namespace dinofast
