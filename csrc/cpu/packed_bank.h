#pragma once

#include <algorithm>

#include "candidates.h"
#include "int8_tile.h"

namespace dinofast {

inline int64_t quads(int64_t d) { return (d + 3) / 4; }

// The outline of a row x = y - center: its coordinates in orthonormal directions, and the norm of what they
// leave. By Cauchy-Schwarz the product of two rows is at most that of their coordinates plus that of these
// norms, but for rounding. There are two levels: the first NEAR directions, and all of them; the codes of the
// second are of the directions that it adds.
struct Outline {
    static constexpr int64_t NEAR = 32;

    struct Level {
        uint8_t* codes;  // P * quads * 4 bytes, panel after panel
        float* scale;    // (P,) of the codes
        float* tail;     // (P,) norm of what the directions leave
        float* bias;     // (P,) what a column adds to a product, at most
    };

    int64_t depth;       // H directions
    const float* basis;  // (D, H)
    float* weight;   // (3,): as PackedBank::weight for each level, and how far the basis is from orthonormal
    uint8_t* codes;  // those of the first level, then those of the second
    float* scale;    // (2, P)
    float* tail;     // (2, P)
    float* bias;     // (2, P)

    int64_t near() const { return std::min(NEAR, depth); }
    int64_t first(int level) const { return level == 0 ? 0 : near(); }
    int64_t channels(int level) const { return level == 0 ? near() : depth - near(); }
    Level level(int i, int64_t columns) const {
        const int64_t at = i * columns;
        return {codes + at * quads(near()) * 4, scale + at, tail + at, bias + at};
    }

    // Bound on what rounding and a skewed basis add to a product of norms; infinite when there is none.
    float error(int64_t d) const;

    // What they add to a score for the part of one row, at most.
    float slack(int64_t d, double sq_norm) const;

    // Norm of what the first directions leave of a row; `inside` is the squared norm of its coordinates
    // there.
    float rest(int64_t d, double sq_norm, double inside) const;
};

// A bank prepared once: float32 rows that decide, and int8 codes of rows - center that propose: of whole
// rows, where they are grouped of their outlines, or both.
struct PackedBank {
    Bank rows;            // prepared
    const float* center;  // (D,)
    int64_t columns;      // P, a multiple of Int8Tile::COLUMNS

    float* weight;   // (1,): how the quantization error of a product is shared between its two sides
    uint8_t* codes;  // P * quads * 4 bytes, panel after panel; null: only outlines
    float* scale;    // (P,) of the codes
    float* bias;     // (P,) what a column adds to a product, at most
    float* error;    // (P / COLUMNS,) half of what a column of the panel may add too much

    int64_t groups;          // 0: not grouped, column i is row i
    const int64_t* index;    // (P,) the row behind a column; -1 for none
    const int64_t* starts;   // (G + 1,) first column of every group, multiples of Int8Tile::COLUMNS
    const float* centroids;  // (G, D)
    const float* radius;     // (G,) no row of the group is farther from its centroid
    Outline outline;

    // The row behind a column, or -1.
    int64_t row(int64_t column) const {
        return index != nullptr ? index[column] : column < rows.rows.count ? column : -1;
    }

    // Bring a row near.
    void prefetch(int64_t i) const {
        const char* const row = rows.rows.at(i);
        for (int64_t k = 0; k < rows.rows.bytes(1); k += 64) __builtin_prefetch(row + k);
    }
};

// Codes -127 .. 127 of x (d,), times one scale.
Quantized quantize(const float* x, int64_t d, int8_t* codes);

// Cauchy-Schwarz: with x = a + r and y = b + s, codes and rest, |xy - ab| <= |a||s| + |r||y|, and a product
// of norms is at most the weighted mean of their squares. This is the part of one side.
float quantization_error(float norm, float rest, float weight, float gamma);

inline void subtract(const float* x, const float* center, int64_t d, float* out) {
    for (int64_t k = 0; k < d; ++k) out[k] = x[k] - center[k];
}

// Fill codes, scale, bias, error and weight, and those of the outlines.
void quantize_bank(const Tile& tile, const PackedBank& bank, Metric metric, int threads);

}  // namespace dinofast
