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

// Codes -127 .. 127 of x (d,), times one scale.
Quantized quantize(const float* x, int64_t d, int8_t* codes);

// Cauchy-Schwarz: with x = a + r and y = b + s, codes and rest, |xy - ab| <= |a||s| + |r||y|, and a product
// of norms is at most the weighted mean of their squares. This is the part of one side.
float quantization_error(float norm, float rest, float weight, float gamma);

inline void subtract(const float* x, const float* center, int64_t d, float* out) {
    for (int64_t k = 0; k < d; ++k) out[k] = x[k] - center[k];
}

// Fill codes, scale, bias, error and weight.
void quantize_bank(const Tile& tile, const PackedBank& bank, Metric metric, int threads);

}  // namespace dinofast
