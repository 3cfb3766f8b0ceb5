#pragma once

#include "int8_tile.h"
#include "packed_bank.h"

namespace dinofast {

// As knn_topk, over a packed bank: the same results, bit for bit, when probes is 0. Otherwise a query looks
// only into the `probes` groups that may hold the nearest rows (more, if these hold fewer than k). visited
// (Q, 3) counts the columns compared by their outlines, by codes or roughly, and those decided after that.
void knn_topk_bank(const Tile& tile, const Int8Tile& int8, const Rows& queries, const PackedBank& bank, int k,
                   Metric metric, int64_t probes, float* distance, int64_t* index, int64_t* visited,
                   int threads);

}  // namespace dinofast
