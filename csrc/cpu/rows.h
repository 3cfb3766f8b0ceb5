// Matrices as callers pass them, and their way into tiles and panels.
#pragma once

#include <cstdint>

#include "../element.h"
#include "tile.h"

namespace dinofast {

// A row-major matrix; `stride` counts elements from row to row.
struct Rows {
    const void* data;
    int64_t count;
    int64_t stride;
    int64_t d;
    Element element;

    // The same rows, channels first to first + count.
    Rows channels(int64_t first, int64_t size) const {
        const char* start = static_cast<const char*>(data) + first * (element == Element::float32 ? 4 : 2);
        return {start, count, stride, size, element};
    }

    // Bring row i near while something else is computed.
    void prefetch(int64_t i) const {
        const int64_t size = element == Element::float32 ? 4 : 2;
        const char* row = static_cast<const char*>(data) + i * stride * size;
        for (int64_t at = 0; at < d * size; at += 64) __builtin_prefetch(row + at);
    }

    // Row i as float32: in place when it is, else converted into buffer (d,).
    const float* get(int64_t i, float* buffer) const;
};

inline int64_t padded_depth(int64_t d) { return (d + DEPTH - 1) / DEPTH * DEPTH; }

// Turn Tile::columns rows of d floats, padded_depth(d) from row to row, into one panel.
void interleave(const Tile& tile, const float* buffer, int64_t d, float* out);

}  // namespace dinofast
