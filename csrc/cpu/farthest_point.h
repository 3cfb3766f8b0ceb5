#pragma once

#include "rows.h"

namespace dinofast {

// nearest[i] = min(min_distance[i], distance of row i to row `center`), NaN where either is; returns the row
// with the largest value, NaN before all, the first among equals. N, D and threads are at least 1. The
// results are the same for any instruction set and number of threads.
int64_t farthest_point(const Tile& tile, const Rows& rows, const float* min_distance, int64_t center,
                       float* nearest, int threads);

}  // namespace dinofast
