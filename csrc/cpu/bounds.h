// What proven bounds ask of rows and numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace dinofast {

inline bool is_finite(const float* x, int64_t d) {
    uint32_t found = 0;
    for (int64_t i = 0; i < d; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        found |= (bits & 0x7fffffff) >= 0x7f800000;
    }
    return found == 0;
}

inline double squared_norm(const float* x, int64_t d) {
    double sum = 0;
    for (int64_t i = 0; i < d; ++i) sum += static_cast<double>(x[i]) * x[i];
    return sum;
}

// The next float32 that is not below x.
inline float round_up_to_float(double x) {
    const float rounded = static_cast<float>(x);
    return rounded < x ? std::nextafter(rounded, INFINITY) : rounded;
}

}  // namespace dinofast
