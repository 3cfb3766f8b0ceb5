#pragma once

#include "int8_tile.h"
#include "rows.h"

namespace dinofast {

// For every feature the largest cosine similarity to a prototype, similarity (N,), and its number, index
// (N,); equal similarities give the smallest index. A feature with NaN or inf has similarity NaN and index 0;
// one such prototype makes every similarity NaN. The results do not depend on the number of threads. N may be
// 0; D, K and threads are at least 1; K < 2^31.
void cosine_max(const Tile& tile, const Int8Tile& int8, const Rows& features, const Rows& prototypes,
                float* similarity, int64_t* index, int threads);

}  // namespace dinofast
