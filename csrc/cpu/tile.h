// The one primitive: rows x columns of dot products.
//
// Rows come in tiles of Tile::rows, columns in panels of Tile::columns; both are packed, so that a register
// tile reads memory in order. A tile holds runs of DEPTH channels, row after row; a panel holds channel after
// channel, Tile::columns values each.
#pragma once

#include <cstdint>

namespace dinofast {

constexpr int DEPTH = 64;
constexpr int CHUNK = 8 * DEPTH;  // channels summed into one accumulator: fewer rounding errors in long rows
constexpr int AHEAD_ROWS = 8;
constexpr int MAX_ROWS = 16;  // no register tile has more rows

// A product that a sieve lets through: row of the tile, column counted from the first panel, product + bias.
struct Hit {
    int32_t row, column;
    float score;
};

// Sums over single rows, where nothing is packed.
struct Lines {
    // Sum of (x - y)^2 over d channels: differences in float32, squares in float64, in 16 interleaved sums
    // that are added in one order, so every instruction set gives the same bits.
    double (*sq_distance)(const float* x, const float* y, int64_t d);

    // The same bits for `count` pairs.
    void (*sq_distances)(const float* const* x, const float* const* y, int64_t count, int64_t d, double* out);

    // Four such sums, of x and each y, all in float32: less than (d + 32) * 2^-24 of their value off while
    // nothing over- or underflows.
    void (*rough_sq_distances)(const float* x, const float* const y[4], int64_t d, float out[4]);

    // Inner product in float32, in one order; both are readable to a multiple of 16, and 0 behind d.
    float (*dot)(const float* x, const float* y, int64_t d);

    // The same bits as of x times factor, rounded, for `count` pairs.
    void (*scaled_dots)(const float* const* x, const float* factor, const float* const* y, int64_t count,
                        int64_t d, float* out);

    // The same bits for `count` rows x and four y: out[r * stride + i], `stride` floats from row to row.
    void (*dots)(const float* const* x, int64_t count, const float* const y[4], int64_t d, float* out,
                 int64_t stride);

    // The highest of `count` scores of each row, `stride` floats from row to row, and its column: -INFINITY
    // and a negative one where none is higher. NaN is passed over. `score` reaches to a multiple of 16, with
    // nothing higher there.
    void (*highest)(const float* score, int64_t stride, int64_t rows, int64_t count, float* best,
                    int32_t* column);

    // Write every (row, column) whose score is not below least[row], NaN included, ascending, and return how
    // many: at most rows * count. `score` reaches to a multiple of 32, `stride` floats from row to row.
    int64_t (*not_below)(const float* score, int64_t stride, int64_t rows, int64_t count, const float* least,
                         Hit* hits);

    // out[j] += the sum over t < count of rows[index[t] * stride + j], one after the other, for j < n. The
    // index reaches AHEAD_ROWS further, to rows that are wanted next.
    void (*add_rows)(const float* rows, int64_t stride, const int32_t* index, int64_t count, int64_t n,
                     double* out);

    // out[j] += factor * x[j] for j < n.
    void (*add_scaled)(const float* x, float factor, int64_t n, float* out);

    // out[j] = sum over t < count of weight[t] * rows[index[t] * stride + j], in order of t, for j < n.
    void (*combine)(const float* rows, int64_t stride, const int32_t* index, const float* weight,
                    int64_t count, int64_t n, float* out);
};

struct Tile {
    const char* name;  // instruction set
    int rows;          // of a register tile
    int columns;       // of a panel

    // Write x (d,) scaled to unit norm in runs of DEPTH floats, `stride` floats from run to run. A zero row
    // stays zero. False, and nothing useful written, when x holds NaN or inf.
    bool (*normalize)(const float* x, int64_t d, float* out, int64_t stride);

    // Write product + bias[column] of every row and column to out, `stride` floats from row to row. Columns
    // come in whole panels: out and bias reach to the end of the last. Meanwhile some cache lines from
    // `ahead` on are brought near.
    void (*products)(const float* tile, const float* panels, int64_t columns, int64_t d, const float* bias,
                     float* out, int64_t stride, const char* ahead, int64_t lines);

    // Write every (row, column) whose product + bias[column] is not below threshold[row], NaN included, and
    // return how many: at most rows * columns. `bias` is readable up to a whole panel.
    int64_t (*sieve)(const float* tile, const float* panels, int64_t columns, int64_t d, const float* bias,
                     const float* threshold, Hit* hits);

    Lines lines;
    const struct MixtureTile* mixture;  // what dpm_stats needs
};

extern const Tile baseline_tile;
#ifdef DINOFAST_X86
extern const Tile avx2_tile;
extern const Tile avx512_tile;
#endif

}  // namespace dinofast
