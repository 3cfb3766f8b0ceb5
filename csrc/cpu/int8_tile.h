// The int8 sieve: as Tile::sieve, four channels a step, for rows quantized with a scale each.
//
// A tile holds runs of Int8Tile::RUN channels, row after row, of signed codes; a panel holds quads of
// channels, 32 columns of 4 codes counted from -128.
#pragma once

#include "tile.h"

namespace dinofast {

// What became of a row: codes times scale, the norms of the row and of the rest, the sum of the codes. Where
// rows are scaled to unit norm all this is of the unit row, less the center if there is one; without, the
// unit row is the row times `factor`.
struct Quantized {
    float scale, rest, norm;
    int32_t sum;
    float factor = 1;
};

// Quantized rows in a tile, and columns in panels, with what bounds the part of a product that their codes
// leave out.
struct CodedRows {
    const int32_t* tile;
    const float* scale;
    const int32_t* sum;  // of the codes
    const float *tail, *threshold;
};
struct CodedColumns {
    const uint8_t* panels;
    int64_t quads;
    const float *scale, *tail, *bias;
};

struct Int8Tile {
    static constexpr int ROWS = 12, COLUMNS = 32, RUN = 64;
    static constexpr int64_t MAX_D = 1 << 16;  // the sums of products fit 32 bits

    const char* name;

    // Write every (row, column) where row_scale[row] * scale[column] * product + bias[column] is not below
    // threshold[row], and return how many. `row_sum` holds the sums of the rows' codes.
    int64_t (*sieve)(const int32_t* tile, const float* row_scale, const int32_t* row_sum,
                     const uint8_t* panels, int64_t columns, int64_t quads, const float* scale,
                     const float* bias, const float* threshold, Hit* hits);

    // Write every (row, column) that two bounds let through, and return how many. With a product that counts
    // both scales, product + tail * tail + bias of the first is not below its threshold; nor is the sum of
    // both products + tail * tail + bias of the second, which is the score.
    int64_t (*sift)(const CodedRows rows[2], const CodedColumns columns[2], int64_t count, Hit* hits);

    // As Tile::products, of rows and columns by quantize_rows and quantize, here the columns as they are and
    // with the sums of their codes: row_scale[row] * scale[column] * product + bias[column]. Null where
    // float32 is as fast.
    void (*products)(const int32_t* tile, const float* row_scale, const int8_t* panels, int64_t columns,
                     int64_t quads, const int32_t* sum, const float* scale, const float* bias, float* out,
                     int64_t stride, const char* ahead, int64_t lines);

    // Quantize x (d,) less the center into runs of codes, `stride` from run to run, 0 behind the last
    // channel. The norms are rounded up. Without a channel beyond 1e-12 the scale is 0; so it is with one
    // beyond 1e12, NaN or inf, and infinite norms. Null with `products`.
    Quantized (*quantize)(const float* x, const float* center, int64_t d, int8_t* codes, int64_t stride);

    // The same of up to ROWS rows in a tile, RUN bytes from row to row, of codes counted from -128, and
    // without their sums. With `units` each row is scaled first as by Tile::normalize and written there,
    // `unit_stride` floats from row to row. Without a center none is written but those whose norm is extreme:
    // for them x is moved there. A zero row has factor 0 then. Null with `products`.
    void (*quantize_rows)(const float** x, int64_t count, const float* center, int64_t d, float* units,
                          int64_t unit_stride, uint8_t* codes, int64_t stride, Quantized* found);
};

extern const Int8Tile baseline_int8_tile;
#ifdef DINOFAST_X86
extern const Int8Tile avx512_vnni_tile;
#endif

}  // namespace dinofast
