#pragma once

#include "int8_tile.h"
#include "rows.h"
#include "upsample_blur.h"

namespace dinofast {

// One minus the cosine_max of every patch, 0 where the mask (may be null) is false, interpolated: features
// are the rows of B grids (h, w), out is (B, H, W). See cosine_max and upsample_blur.
void cosine_map(const Tile& tile, const Int8Tile& int8, const Rows& features, const Rows& prototypes,
                const bool* mask, const Weights& rows, const Weights& columns, int64_t h, int64_t width,
                float* out, int threads);

}  // namespace dinofast
