#include <immintrin.h>

#include "../int8_tile.h"

namespace dinofast {
namespace {

struct Avx512Vnni {
    // _mm512_dpbusd_epi32 in place: of the intrinsic's sums GCC 12 keeps two copies, one of them in memory.
    static void add_products(__m512i& sum, __m512i b, __m512i a) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(b), "v"(a));
    }

    static int64_t sieve(const int32_t* tile, const float* row_scale, const int32_t* row_sum,
                         const uint8_t* panels, int64_t columns, int64_t quads, const float* scale,
                         const float* bias, const float* threshold, Hit* hits) {
        constexpr int ROWS = Int8Tile::ROWS, COLUMNS = Int8Tile::COLUMNS, LANES = 16;
        int64_t found = 0;
        for (int64_t column = 0; column < columns; column += COLUMNS) {
            const uint8_t* b = panels + column * quads * 4;
            const int32_t* a = tile;
            __m512i left[ROWS], right[ROWS];
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) left[r] = right[r] = _mm512_set1_epi32(-128 * row_sum[r]);
            for (int64_t quad = 0; quad < quads; ++quad, a += ROWS, b += 4 * COLUMNS) {
                const __m512i b_left = _mm512_loadu_si512(b), b_right = _mm512_loadu_si512(b + 64);
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; ++r) {
                    const __m512i x = _mm512_set1_epi32(a[r]);
                    add_products(left[r], b_left, x);
                    add_products(right[r], b_right, x);
                }
            }
            const __m512 scale_left = _mm512_loadu_ps(scale + column);
            const __m512 scale_right = _mm512_loadu_ps(scale + column + LANES);
            const __m512 bias_left = _mm512_loadu_ps(bias + column);
            const __m512 bias_right = _mm512_loadu_ps(bias + column + LANES);
            const int64_t present = columns - column;
            const uint32_t valid = present < COLUMNS ? (1u << present) - 1 : 0xffffffffu;
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                const __m512 limit = _mm512_set1_ps(threshold[r]), factor = _mm512_set1_ps(row_scale[r]);
                const __m512 x = _mm512_fmadd_ps(
                    factor, _mm512_mul_ps(scale_left, _mm512_cvtepi32_ps(left[r])), bias_left);
                const __m512 y = _mm512_fmadd_ps(
                    factor, _mm512_mul_ps(scale_right, _mm512_cvtepi32_ps(right[r])), bias_right);
                uint32_t through = _mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ);
                through |= static_cast<uint32_t>(_mm512_cmp_ps_mask(y, limit, _CMP_NLT_UQ)) << LANES;
                if (__builtin_expect(through == 0, 1)) continue;
                float score[COLUMNS];
                _mm512_storeu_ps(score, x);
                _mm512_storeu_ps(score + LANES, y);
                for (through &= valid; through != 0; through &= through - 1) {
                    const int lane = __builtin_ctz(through);
                    hits[found++] = {r, static_cast<int32_t>(column) + lane, score[lane]};
                }
            }
        }
        return found;
    }
};

}  // namespace

const Int8Tile avx512_vnni_tile = {"avx512_vnni", Avx512Vnni::sieve};

}  // namespace dinofast
