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

}  // namespace dinofast
