// The int8 sieve: as Tile::sieve, four channels a step, for rows quantized with a scale each.
//
// A tile holds quads of channels, Int8Tile::ROWS times 4 signed codes; a panel holds quads of channels, 32
// columns of 4 codes counted from -128.
#pragma once

#include "tile.h"

namespace dinofast {

struct Int8Tile {
    static constexpr int ROWS = 12, COLUMNS = 32;
    static constexpr int64_t MAX_D = 1 << 16;  // the sums of products fit 32 bits

    const char* name;

    // Write every (row, column) where row_scale[row] * scale[column] * product + bias[column] is not below
    // threshold[row], and return how many. `row_sum` holds the sums of the rows' codes.
    int64_t (*sieve)(const int32_t* tile, const float* row_scale, const int32_t* row_sum,
                     const uint8_t* panels, int64_t columns, int64_t quads, const float* scale,
                     const float* bias, const float* threshold, Hit* hits);
};

extern const Int8Tile baseline_int8_tile;
#ifdef DINOFAST_X86
extern const Int8Tile avx512_vnni_tile;
#endif

}  // namespace dinofast
