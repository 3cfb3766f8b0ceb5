// For those files in this folder whose functions are compiled for AVX-512.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace dinofast {
namespace {

inline __mmask16 first_lanes(int64_t n) {
    return n <= 0 ? 0 : n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1);
}

// Sum of x^2 in float64.
inline double sum_of_squares(const float* x, int64_t d) {
    __m512d sum[4];
    for (__m512d& part : sum) part = _mm512_setzero_pd();
    int64_t k = 0;
    for (; k + 32 <= d; k += 32) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const __m512d v = _mm512_cvtps_pd(_mm256_loadu_ps(x + k + 8 * i));
            sum[i] = _mm512_fmadd_pd(v, v, sum[i]);
        }
    }
    for (; k < d; k += 16) {
        const __m512 v = _mm512_maskz_loadu_ps(first_lanes(d - k), x + k);
        const __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
        const __m512d b = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
        sum[0] = _mm512_fmadd_pd(a, a, sum[0]);
        sum[1] = _mm512_fmadd_pd(b, b, sum[1]);
    }
    const __m512d left = _mm512_add_pd(sum[0], sum[1]), right = _mm512_add_pd(sum[2], sum[3]);
    return _mm512_reduce_add_pd(_mm512_add_pd(left, right));
}

}  // namespace
}  // namespace dinofast
