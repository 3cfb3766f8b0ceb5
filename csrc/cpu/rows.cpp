#include "rows.h"

#include <algorithm>
#include <cstring>

namespace dinofast {
namespace {

float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

float from_bfloat16(uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); }

float from_float16(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;
    if (magnitude >= 0x0f800000) return from_bits(sign | magnitude | 0x7f800000);  // inf, NaN
    return from_bits(sign | 0x3f800000) * (from_bits(magnitude) * 0x1p112f);  // shift the exponent's bias
}

}  // namespace

const float* Rows::get(int64_t i, float* buffer) const {
    if (element == Element::float32) return static_cast<const float*>(data) + i * stride;
    const uint16_t* row = static_cast<const uint16_t*>(data) + i * stride;
    if (element == Element::bfloat16) {
        for (int64_t k = 0; k < d; ++k) buffer[k] = from_bfloat16(row[k]);
    } else {
        for (int64_t k = 0; k < d; ++k) buffer[k] = from_float16(row[k]);
    }
    return buffer;
}

void pack_tile(const Tile& tile, const Rows& rows, int64_t first, float* buffer, float* out, bool* finite) {
    const int count = static_cast<int>(std::min<int64_t>(tile.rows, rows.count - first));
    for (int r = 0; r < tile.rows; ++r) {
        float* start = out + r * DEPTH;
        const int64_t stride = static_cast<int64_t>(tile.rows) * DEPTH;
        finite[r] = r < count && tile.normalize(rows.get(first + r, buffer), rows.d, start, stride);
        if (finite[r]) continue;
        for (int64_t run = 0; run < padded_depth(rows.d); run += DEPTH, start += stride) {
            std::fill(start, start + DEPTH, 0.0f);
        }
    }
}

void interleave(const Tile& tile, const float* buffer, int64_t d, float* out) {
    const int64_t stride = padded_depth(d), width = tile.columns;
    constexpr int64_t STEP = 16;  // one cache line of every row at a time
    for (int64_t start = 0; start < d; start += STEP) {
        const int64_t stop = std::min(start + STEP, d);
        for (int64_t c = 0; c < width; ++c) {
            for (int64_t k = start; k < stop; ++k) out[k * width + c] = buffer[c * stride + k];
        }
    }
}

bool pack_panel(const Tile& tile, const Rows& rows, int64_t first, float* buffer, float* out) {
    const int64_t d = rows.d, stride = padded_depth(d), width = tile.columns;
    const int64_t count = std::min<int64_t>(width, rows.count - first);
    float* converted = buffer + width * stride;
    for (int64_t c = 0; c < count; ++c) {
        if (!tile.normalize(rows.get(first + c, converted), d, buffer + c * stride, DEPTH)) return false;
    }
    std::fill(buffer + count * stride, buffer + width * stride, 0.0f);
    interleave(tile, buffer, d, out);
    return true;
}

}  // namespace dinofast
