#pragma once

#include "candidates.h"
#include "int8_tile.h"

namespace dinofast {

// The k nearest bank rows of every query: distance (Q, k) ascending, index (Q, k); equal distances in
// ascending order of index. A full scan in float32 or int8 proposes, Measure::distance decides. A query with
// NaN or inf has distances NaN beside the indices 0 .. k - 1; one such bank row gives that to every query.
// The results depend neither on the number of threads nor on the instruction set. Q may be 0; D, k and
// threads are at least 1; k <= M and k <= Candidates::MAX_K.
void knn_topk(const Tile& tile, const Int8Tile& int8, const Rows& queries, const Bank& bank, int k,
              Metric metric, float* distance, int64_t* index, int threads);

}  // namespace dinofast
