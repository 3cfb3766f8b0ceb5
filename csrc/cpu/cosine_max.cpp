#include "cosine_max.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "blocking.h"
#include "memory.h"
#include "threads.h"

namespace dinofast {

void cosine_max(const Tile& tile, const Rows& features, const Rows& prototypes, float* similarity,
                int64_t* index, int threads) {
    const int64_t n = features.count, k = prototypes.count, d = features.d;
    const int64_t tiles = (n + tile.rows - 1) / tile.rows;
    const int64_t tile_size = tile.rows * padded_depth(d), width = tile.columns;
    const int64_t block = std::min(round_up(k, width), std::max(SHARED / d / width, int64_t{1}) * width);
    const int64_t group = std::max(PRIVATE / d / width, int64_t{1}) * width;
    if (n * k * d <= SMALL) threads = 1;
#ifndef _OPENMP
    threads = 1;
#endif
    // One thread's own memory: packed tiles or, at another time, a panel in the making; one converted row.
    const int64_t own = round_up(std::max(TILES * tile_size, width * padded_depth(d)) + padded_depth(d), 16);
    const Array<float> panels = allocate<float>(block * d);
    const Array<float> scratch = allocate<float>(own * threads);
    std::atomic<int64_t> next_panel{0}, next_tile{0};
    std::atomic<bool> broken{false};
    std::fill(similarity, similarity + n, -INFINITY);
    std::fill(index, index + n, 0);

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* const mine = scratch.get() + own * thread_number();
        float* const converted = mine + TILES * tile_size;
        bool finite[TILES * MAX_ROWS];
        for (int64_t start = 0; start < k; start += block) {
            const int64_t count = std::min(block, k - start);
            for (int64_t c; (c = next_panel.fetch_add(width)) < count;) {
                if (!pack_panel(tile, prototypes, start + c, mine, panels.get() + c * d)) broken = true;
            }
#pragma omp barrier
            if (broken) break;  // no thread packs again before all have read this
            for (int64_t begin, end; take(next_tile, tiles, threads, begin, end);) {
                for (int64_t t = begin; t < end; ++t) {
                    pack_tile(tile, features, t * tile.rows, converted, mine + (t - begin) * tile_size,
                              finite + (t - begin) * tile.rows);
                }
                for (int64_t c = 0; c < count; c += group) {
                    for (int64_t t = begin; t < end; ++t) {
                        const int64_t first = t * tile.rows, rows = std::min<int64_t>(tile.rows, n - first);
                        float value[MAX_ROWS];
                        int32_t at[MAX_ROWS];
                        for (int64_t r = 0; r < tile.rows; ++r) {
                            value[r] = r < rows ? similarity[first + r] : INFINITY;
                            at[r] = r < rows ? static_cast<int32_t>(index[first + r]) : 0;
                        }
                        tile.best(mine + (t - begin) * tile_size, panels.get() + c * d,
                                  std::min(group, count - c), d, static_cast<int32_t>(start + c), value, at);
                        for (int64_t r = 0; r < rows; ++r) {
                            similarity[first + r] = value[r];
                            index[first + r] = at[r];
                        }
                    }
                }
                if (start + count < k) continue;
                for (int64_t i = begin * tile.rows; i < std::min(end * tile.rows, n); ++i) {
                    const bool whole = finite[i - begin * tile.rows];
                    similarity[i] = whole ? std::clamp(similarity[i], -1.0f, 1.0f) : NAN;
                    if (!whole) index[i] = 0;
                }
            }
            if (start + count == k) break;
#pragma omp barrier
#pragma omp single
            {
                next_panel = 0;
                next_tile = 0;
            }
        }
    }
    if (broken) {
        std::fill(similarity, similarity + n, NAN);
        std::fill(index, index + n, 0);
    }
}

}  // namespace dinofast
