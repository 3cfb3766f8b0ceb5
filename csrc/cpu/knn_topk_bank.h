#pragma once

#include "candidates.h"
#include "int8_tile.h"

namespace dinofast {

// A bank prepared once: float32 rows that decide, and int8 codes of rows - center that propose.
struct PackedBank {
    Bank rows;            // prepared
    const float* center;  // (D,)
    float* weight;        // (1,): how the quantization error of a product is shared between its two sides

    int64_t columns;       // P, a multiple of Int8Tile::COLUMNS
    uint8_t* codes;        // P * quads * 4 bytes, panel after panel
    float* scale;          // (P,) of the codes
    float* bias;           // (P,) what a column adds to a product, at most
    float* error;          // (P,) half of what it may add too much
    const int64_t* index;  // (P,) the row behind a column; -1 for none

    int64_t groups;          // 0: not grouped
    const int64_t* starts;   // (G + 1,) first column of every group, multiples of Int8Tile::COLUMNS
    const float* centroids;  // (G, D)
    const float* radius;     // (G,) no row of the group is farther from its centroid
};

inline int64_t quads(int64_t d) { return (d + 3) / 4; }

// Fill codes, scale, bias, error and weight.
void quantize_bank(const Tile& tile, const PackedBank& bank, Metric metric, int threads);

// As knn_topk, over a packed bank: the same results, bit for bit, when probes is 0. Otherwise a query looks
// only into the `probes` groups that may hold the nearest rows (more, if these hold fewer than k). visited
// (Q,) counts the columns looked at.
void knn_topk_bank(const Tile& tile, const Int8Tile& int8, const Rows& queries, const PackedBank& bank, int k,
                   Metric metric, int64_t probes, float* distance, int64_t* index, int64_t* visited,
                   int threads);

}  // namespace dinofast
