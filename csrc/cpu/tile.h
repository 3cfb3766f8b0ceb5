// The one primitive: rows x columns of dot products with a running maximum.
//
// Rows come in tiles of Tile::rows, columns in panels of Tile::columns; both are packed, so that a register
// tile reads memory in order. A tile holds runs of DEPTH channels, row after row; a panel holds channel after
// channel, Tile::columns values each.
#pragma once

#include <cstdint>

namespace dinofast {

constexpr int DEPTH = 64;
constexpr int CHUNK = 8 * DEPTH;  // channels summed into one accumulator: fewer rounding errors in long rows
constexpr int MAX_ROWS = 16;      // no register tile has more rows

struct Tile {
    const char* name;  // instruction set
    int rows;          // of a register tile
    int columns;       // of a panel

    // Write x (d,) scaled to unit norm in runs of DEPTH floats, `stride` floats from run to run. A zero row
    // stays zero. False, and nothing useful written, when x holds NaN or inf.
    bool (*normalize)(const float* x, int64_t d, float* out, int64_t stride);

    // Compare every row of the tile with `columns` columns, the first of which is number `first`: where a
    // product exceeds value[row], replace value[row] and index[row]. Equal products keep the smaller index
    // when calls come in ascending order of columns. The order in which the channels of a product are summed
    // does not depend on where row and column stand.
    void (*best)(const float* tile, const float* panels, int64_t columns, int64_t d, int32_t first,
                 float* value, int32_t* index);

    const struct MixtureTile* mixture;  // what dpm_stats needs
};

extern const Tile baseline_tile;
#ifdef DINOFAST_X86
extern const Tile avx2_tile;
extern const Tile avx512_tile;
#endif

}  // namespace dinofast
