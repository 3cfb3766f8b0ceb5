#pragma once

#include "int8_tile.h"
#include "rows.h"

namespace dinofast {

// For every row the nearest center, index (N,), and its squared distance (N,); -1 and NaN for a row with NaN
// or inf, and for all when a center has one. The sums (K, D) of the rows of each center, added in float64 in
// the order of the rows, and their counts (K,). The results do not depend on the number of threads. N may be
// 0; centers are float32.
void kmeans_step(const Tile& tile, const Int8Tile& int8, const Rows& rows, const Rows& centers,
                 int64_t* index, float* sq_distance, float* sums, int64_t* counts, int threads);

}  // namespace dinofast
