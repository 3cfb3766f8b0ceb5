// k = 1 against rows that nothing was prepared for: the screens of Nearest.
#pragma once

#include "candidates.h"
#include "int8_tile.h"

namespace dinofast {

// Fill distance (N,) and index (N,) with the bits of knn_topk for k = 1. False, and nothing useful written,
// where another scan is as fast, or where the smallest index of equal distances cannot be told from squared
// distances: rows with NaN, inf or zeros alone, distances near the ends of their range, euclidean ones.
bool nearest_neighbor(const Tile& tile, const Int8Tile& int8, const Rows& queries, const Rows& bank,
                      Metric metric, float* distance, int64_t* index, int threads);

}  // namespace dinofast
