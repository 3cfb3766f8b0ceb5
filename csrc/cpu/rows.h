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

    // Bytes of an element.
    int64_t size() const { return element == Element::float32 ? 4 : 2; }

    // Bytes of so many rows, with what lies between them.
    int64_t bytes(int64_t rows) const { return rows * stride * size(); }

    // Where row i is, at most `count`.
    const char* at(int64_t i) const { return static_cast<const char*>(data) + bytes(i); }

    // Rows first to first + number.
    Rows part(int64_t first, int64_t number) const { return {at(first), number, stride, d, element}; }

    // The same rows, channels first to first + count.
    Rows channels(int64_t first, int64_t width) const {
        return {static_cast<const char*>(data) + first * size(), count, stride, width, element};
    }

    // Row i as float32: in place when it is, else converted into buffer (d,).
    const float* get(int64_t i, float* buffer) const;
};

inline int64_t padded_depth(int64_t d) { return (d + DEPTH - 1) / DEPTH * DEPTH; }

// Turn Tile::columns rows of d floats, padded_depth(d) from row to row, into one panel.
void interleave(const Tile& tile, const float* buffer, int64_t d, float* out);

}  // namespace dinofast
