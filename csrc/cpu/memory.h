// Scratch memory on cache lines.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace dinofast {

struct Free {
    void operator()(void* p) const { std::free(p); }
};
template <class T>
using Array = std::unique_ptr<T[], Free>;

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Not initialized; T needs no constructor.
template <class T>
Array<T> allocate(int64_t count) {
    const int64_t bytes = round_up(count * static_cast<int64_t>(sizeof(T)) + 1, 64);
    void* p = std::aligned_alloc(64, static_cast<size_t>(bytes));
    if (p == nullptr) throw std::bad_alloc();
    return Array<T>(static_cast<T*>(p));
}

}  // namespace dinofast
