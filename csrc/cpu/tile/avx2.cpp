#include <immintrin.h>

#include "mixture.h"
#include "register_tile.h"
#include "vector_lines.h"

namespace dinofast {
namespace {

struct Avx2 {
    using Float = __m256;
    using Wide = __m256d;
    static constexpr int LANES = 8, DOT_ROWS = 1;

    static Float set(float x) { return _mm256_set1_ps(x); }
    static Float load(const float* p) { return _mm256_loadu_ps(p); }
    static void hold(Float&) {}
    static Float add(Float x, Float y) { return _mm256_add_ps(x, y); }
    static Float multiply(Float x, Float y) { return _mm256_mul_ps(x, y); }
    static Float multiply_add(Float x, Float y, Float sum) { return _mm256_fmadd_ps(x, y, sum); }
    // y where x is NaN.
    static Float larger(Float x, Float y) { return _mm256_max_ps(x, y); }
    static float largest(Float x) {
        __m128 top = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        top = _mm_max_ps(top, _mm_movehl_ps(top, top));
        return _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
    }
    static void scale(const float* x, Float first, Float second, float* out) {
        _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_mul_ps(load(x), first), second));
    }
    static uint32_t not_below(Float x, Float limit) {
        return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x, limit, _CMP_NLT_UQ)));
    }
    // The highest score, and its column.
    struct Top {
        Float best = _mm256_set1_ps(-__builtin_inff());
        Float first = _mm256_castsi256_ps(_mm256_set1_epi32(-LANES));  // column of lane 0

        void add(Float x, int32_t column) {
            const Float greater = _mm256_cmp_ps(x, best, _CMP_GT_OQ);
            best = larger(x, best);
            first = _mm256_blendv_ps(first, _mm256_castsi256_ps(_mm256_set1_epi32(column)), greater);
        }
        int32_t read(float& value) const {
            value = largest(best);
            const Float equal = _mm256_cmp_ps(best, set(value), _CMP_EQ_OQ);
            const int lane = __builtin_ctz(static_cast<uint32_t>(_mm256_movemask_ps(equal)));
            int32_t columns[LANES];
            _mm256_storeu_ps(reinterpret_cast<float*>(columns), first);
            return columns[lane] + lane;
        }
    };
    static double sum_of_squares(const float* x, int64_t d) {
        __m256d low = _mm256_setzero_pd(), high = low;
        int64_t k = 0;
        for (; k + 8 <= d; k += 8) {
            const __m256d a = _mm256_cvtps_pd(_mm_loadu_ps(x + k));
            const __m256d b = _mm256_cvtps_pd(_mm_loadu_ps(x + k + 4));
            low = _mm256_fmadd_pd(a, a, low);
            high = _mm256_fmadd_pd(b, b, high);
        }
        double lanes[4];
        _mm256_storeu_pd(lanes, _mm256_add_pd(low, high));
        double sum = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
        for (; k < d; ++k) sum += static_cast<double>(x[k]) * x[k];
        return sum;
    }
    static Float subtract(Float x, Float y) { return _mm256_sub_ps(x, y); }
    static void store(Float x, float* p) { _mm256_storeu_ps(p, x); }
    static Wide add_widened(Wide sum, const float* p) {
        return _mm256_add_pd(sum, _mm256_cvtps_pd(_mm_loadu_ps(p)));
    }
    static __m128 halves(Float x) {
        return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    }
    static void sum_each(const Float x[4], float out[4]) {
        __m128 a = halves(x[0]), b = halves(x[1]), c = halves(x[2]), d = halves(x[3]);
        _MM_TRANSPOSE4_PS(a, b, c, d);
        _mm_storeu_ps(out, _mm_add_ps(_mm_add_ps(a, b), _mm_add_ps(c, d)));
    }
    // The bits of sum_each.
    static float sum_one(Float x) {
        const __m128 sum = halves(x), pairs = _mm_hadd_ps(sum, sum);
        return _mm_cvtss_f32(_mm_hadd_ps(pairs, pairs));
    }
    // Sum of 16, of which the second half is added to the first until one is left.
    static double halved(const double* x) {
        const __m256d left = _mm256_add_pd(_mm256_loadu_pd(x), _mm256_loadu_pd(x + 8));
        const __m256d four =
            _mm256_add_pd(left, _mm256_add_pd(_mm256_loadu_pd(x + 4), _mm256_loadu_pd(x + 12)));
        const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
        return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
    }
    template <int N>
    [[gnu::always_inline]] static int64_t add_sq_distance(const float* const* x, const float* const* y,
                                                          int64_t d, double (*sums)[16]) {
        __m256d sum[N][4];
        for (auto& of : sum) {
            for (__m256d& part : of) part = _mm256_setzero_pd();
        }
        int64_t k = 0;
        for (; k + 16 <= d; k += 16) {
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) {
#pragma GCC unroll 4
                for (int part = 0; part < 4; ++part) {
                    const int64_t at = k + 4 * part;
                    const __m256d gap =
                        _mm256_cvtps_pd(_mm_sub_ps(_mm_loadu_ps(x[n] + at), _mm_loadu_ps(y[n] + at)));
                    sum[n][part] = _mm256_fmadd_pd(gap, gap, sum[n][part]);
                }
            }
        }
        for (int n = 0; n < N; ++n) {
            for (int part = 0; part < 4; ++part) _mm256_storeu_pd(sums[n] + 4 * part, sum[n][part]);
        }
        return k;
    }
};

struct Avx2Mixture : Avx2 {
    using Avx2::multiply;
    using Avx2::multiply_add;
    using Avx2::store;
    using Avx2::subtract;
    using Double = __m256d;
    using Int = __m256i;

    static Float least(Float x, Float y) { return _mm256_min_ps(x, y); }  // y if one is NaN
    static Int repeat(int32_t n) { return _mm256_set1_epi32(n); }
    static void replace_if_greater(Float& x, Int& i, Float y, Int j) {
        const Float greater = _mm256_cmp_ps(y, x, _CMP_GT_OQ);
        x = _mm256_blendv_ps(x, y, greater);
        i = _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(i), _mm256_castsi256_ps(j), greater));
    }
    static void store(Float x, Int i, float* value, int32_t* index) {
        _mm256_storeu_ps(value, x);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(index), i);
    }
    static Double widen(double x) { return _mm256_set1_pd(x); }
    static Double widen(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
    static Double widen(const double* p) { return _mm256_loadu_pd(p); }
    static void store(Double x, double* p) { _mm256_storeu_pd(p, x); }
    static Double subtract(Double x, Double y) { return _mm256_sub_pd(x, y); }
    static Double multiply(Double x, Double y) { return _mm256_mul_pd(x, y); }
    static Double multiply_add(Double x, Double y, Double sum) { return _mm256_fmadd_pd(x, y, sum); }
    static double sum(Double x, Double y) {
        double lanes[4];
        _mm256_storeu_pd(lanes, _mm256_add_pd(x, y));
        return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    }
};

}  // namespace

const Tile avx2_tile = {"avx2",
                        6,
                        16,
                        register_tile_normalize<Avx2>,
                        register_tile_write<Avx2, 6>,
                        register_tile_sieve<Avx2, 6>,
                        vector_lines<Avx2>,
                        &mixture_tile<Avx2Mixture, 6>};

}  // namespace dinofast
