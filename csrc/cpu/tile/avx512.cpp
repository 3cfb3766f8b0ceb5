#include <immintrin.h>

#include "avx512_squares.h"
#include "mixture.h"
#include "register_tile.h"
#include "vector_lines.h"

namespace dinofast {
namespace {

struct Avx512 {
    using Float = __m512;
    using Wide = __m512d;
    static constexpr int LANES = 16, DOT_ROWS = 3;

    static Float set(float x) { return _mm512_set1_ps(x); }
    static Float load(const float* p) { return _mm512_loadu_ps(p); }
    // Load once: GCC would load again for every use.
    static void hold(Float& x) { asm("" : "+v"(x)); }
    static Float add(Float x, Float y) { return _mm512_add_ps(x, y); }
    static Float multiply(Float x, Float y) { return _mm512_mul_ps(x, y); }
    static Float multiply_add(Float x, Float y, Float sum) { return _mm512_fmadd_ps(x, y, sum); }
    // y where x is NaN.
    static Float larger(Float x, Float y) { return _mm512_max_ps(x, y); }
    static float largest(Float x) { return _mm512_reduce_max_ps(x); }
    static void scale(const float* x, Float first, Float second, float* out) {
        _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_mul_ps(load(x), first), second));
    }
    static uint32_t not_below(Float x, Float limit) { return _mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ); }
    // The highest score, and its column.
    struct Top {
        Float best = _mm512_set1_ps(-__builtin_inff());
        __m512i first = _mm512_set1_epi32(-LANES);  // column of lane 0

        void add(Float x, int32_t column) {
            const __mmask16 greater = _mm512_cmp_ps_mask(x, best, _CMP_GT_OQ);
            best = larger(x, best);
            first = _mm512_mask_mov_epi32(first, greater, _mm512_set1_epi32(column));
        }
        int32_t read(float& value) const {
            value = largest(best);
            const __mmask16 equal = _mm512_cmp_ps_mask(best, set(value), _CMP_EQ_OQ);
            return _mm512_cvtsi512_si32(_mm512_maskz_compress_epi32(equal, first)) + __builtin_ctz(equal);
        }
    };
    static double sum_of_squares(const float* x, int64_t d) { return Avx512Squares::of(x, d); }
    static Float subtract(Float x, Float y) { return _mm512_sub_ps(x, y); }
    static void store(Float x, float* p) { _mm512_storeu_ps(p, x); }
    static Wide add_widened(Wide sum, const float* p) {
        return _mm512_add_pd(sum, _mm512_cvtps_pd(_mm256_loadu_ps(p)));
    }
    static __m128 quarters(Float x) {
        const __m128 even = _mm_add_ps(_mm512_castps512_ps128(x), _mm512_extractf32x4_ps(x, 2));
        return _mm_add_ps(even, _mm_add_ps(_mm512_extractf32x4_ps(x, 1), _mm512_extractf32x4_ps(x, 3)));
    }
    // Quarters 0 and 1 of x + quarters 2 and 3, then those of y.
    static Float fold(Float x, Float y) {
        return add(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
    }
    static void sum_each(const Float x[4], float out[4]) {
        const Float left = fold(x[0], x[1]), right = fold(x[2], x[3]);
        Float sum = add(_mm512_shuffle_f32x4(left, right, 0x88), _mm512_shuffle_f32x4(left, right, 0xdd));
        sum = add(sum, _mm512_permute_ps(sum, 0xb1));
        sum = add(sum, _mm512_permute_ps(sum, 0x4e));
        const __m512i first = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
        _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(first, sum)));
    }
    // The bits of sum_each.
    static float sum_one(Float x) {
        const __m128 sum = quarters(x), pairs = _mm_add_ps(sum, _mm_movehdup_ps(sum));
        return _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehl_ps(pairs, pairs)));
    }
    // Sum of 16, of which the second half is added to the first until one is left.
    static double halved(const double* x) {
        const __m512d eight = _mm512_add_pd(_mm512_loadu_pd(x), _mm512_loadu_pd(x + 8));
        const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
        const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
        return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
    }
    template <int N>
    [[gnu::always_inline]] static int64_t add_sq_distance(const float* const* x, const float* const* y,
                                                          int64_t d, double (*sums)[16]) {
        __m512d low[N], high[N];
        for (int n = 0; n < N; ++n) low[n] = high[n] = _mm512_setzero_pd();
        int64_t k = 0;
        for (; k + 16 <= d; k += 16) {
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) {
                const float *p = x[n] + k, *q = y[n] + k;
                const __m512d a = _mm512_cvtps_pd(_mm256_sub_ps(_mm256_loadu_ps(p), _mm256_loadu_ps(q)));
                const __m512d b =
                    _mm512_cvtps_pd(_mm256_sub_ps(_mm256_loadu_ps(p + 8), _mm256_loadu_ps(q + 8)));
                low[n] = _mm512_fmadd_pd(a, a, low[n]);
                high[n] = _mm512_fmadd_pd(b, b, high[n]);
            }
        }
        for (int n = 0; n < N; ++n) {
            _mm512_storeu_pd(sums[n], low[n]);
            _mm512_storeu_pd(sums[n] + 8, high[n]);
        }
        return k;
    }
};

struct Avx512Mixture : Avx512 {
    using Avx512::multiply;
    using Avx512::multiply_add;
    using Avx512::store;
    using Avx512::subtract;
    using Double = __m512d;
    using Int = __m512i;

    static Float least(Float x, Float y) { return _mm512_min_ps(x, y); }  // y if one is NaN
    static Int repeat(int32_t n) { return _mm512_set1_epi32(n); }
    static void replace_if_greater(Float& x, Int& i, Float y, Int j) {
        const __mmask16 greater = _mm512_cmp_ps_mask(y, x, _CMP_GT_OQ);
        x = _mm512_mask_blend_ps(greater, x, y);
        i = _mm512_mask_blend_epi32(greater, i, j);
    }
    static void store(Float x, Int i, float* value, int32_t* index) {
        _mm512_storeu_ps(value, x);
        _mm512_storeu_si512(index, i);
    }
    static Double widen(double x) { return _mm512_set1_pd(x); }
    static Double widen(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
    static Double widen(const double* p) { return _mm512_loadu_pd(p); }
    static void store(Double x, double* p) { _mm512_storeu_pd(p, x); }
    static Double subtract(Double x, Double y) { return _mm512_sub_pd(x, y); }
    static Double multiply(Double x, Double y) { return _mm512_mul_pd(x, y); }
    static Double multiply_add(Double x, Double y, Double sum) { return _mm512_fmadd_pd(x, y, sum); }
    static double sum(Double x, Double y) { return _mm512_reduce_add_pd(_mm512_add_pd(x, y)); }
};

}  // namespace

const Tile avx512_tile = {"avx512",
                          12,
                          32,
                          register_tile_normalize<Avx512>,
                          register_tile_write<Avx512, 12>,
                          register_tile_sieve<Avx512, 12>,
                          vector_lines<Avx512>,
                          &mixture_tile<Avx512Mixture, 12>};

}  // namespace dinofast
