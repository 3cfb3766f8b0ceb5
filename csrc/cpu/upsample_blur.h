#pragma once

#include <cstdint>

#include "tile.h"

namespace dinofast {

// A matrix of weights by its non-zero entries: those of row i are start[i] to start[i + 1].
struct Weights {
    int64_t count;  // rows
    const int32_t* start;
    const int32_t* index;  // column of each entry, ascending
    const float* weight;
};

// rows (H, h) times each map (h, w) times columns' (w, W), for B contiguous maps: out (B, H, W), written
// once. `columns` is given transposed, pixels by patch, and the pixels of a patch are contiguous. Only
// entries carry anything: NaN and inf reach the pixels that their patch has a weight in, and no others. The
// results do not depend on the number of threads.
void upsample_blur(const Lines& lines, const float* maps, int64_t batch, const Weights& rows,
                   const Weights& columns, int64_t h, int64_t width, float* out, int threads);

}  // namespace dinofast
