// For those files in this folder whose functions are compiled for AVX-512.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace dinofast {
namespace {

inline __mmask16 first_lanes(int64_t n) {
    return n <= 0 ? 0 : n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1);
}

// A sum of x^2 in float64, 32 channels at a time, then what is left. Four floats are widened at less than
// half the cost of eight on some processors.
struct Avx512Squares {
    __m256d sum[8];

    Avx512Squares() {
        for (__m256d& part : sum) part = _mm256_setzero_pd();
    }

    void add(const float* x) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const __m256d v = _mm256_cvtps_pd(_mm_loadu_ps(x + 4 * i));
            sum[i] = _mm256_fmadd_pd(v, v, sum[i]);
        }
    }

    void finish(const float* x, int64_t k, int64_t d) {
        for (; k + 32 <= d; k += 32) add(x + k);
        for (; k < d; k += 16) {
            float left[16];
            _mm512_storeu_ps(left, _mm512_maskz_loadu_ps(first_lanes(d - k), x + k));
            for (int i = 0; i < 4; ++i) {
                const __m256d v = _mm256_cvtps_pd(_mm_loadu_ps(left + 4 * i));
                sum[i] = _mm256_fmadd_pd(v, v, sum[i]);
            }
        }
    }

    static double of(const float* x, int64_t d) {
        Avx512Squares squares;
        squares.finish(x, 0, d);
        return squares.total();
    }

    double total() const {
        __m256d half[2];
        for (int i = 0; i < 2; ++i) {
            half[i] = _mm256_add_pd(_mm256_add_pd(sum[i], sum[2 + i]), _mm256_add_pd(sum[4 + i], sum[6 + i]));
        }
        const __m256d all = _mm256_add_pd(half[0], half[1]);
        const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(all), _mm256_extractf128_pd(all, 1));
        return _mm_cvtsd_f64(_mm_add_sd(pair, _mm_unpackhi_pd(pair, pair)));
    }
};

}  // namespace
}  // namespace dinofast
