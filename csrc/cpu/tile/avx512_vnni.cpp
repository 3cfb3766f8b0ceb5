#include <immintrin.h>

#include "../int8_tile.h"
#include "avx512_codes.h"
#include "register_tile.h"

namespace dinofast {
namespace {

constexpr int ROWS = Int8Tile::ROWS, COLUMNS = Int8Tile::COLUMNS, LANES = 16, QUADS = Int8Tile::RUN / 4;

struct Avx512Vnni {
    // _mm512_dpbusd_epi32 in place: of the intrinsic's sums GCC 12 keeps two copies, one of them in memory.
    static void add_products(__m512i& sum, __m512i counted, __m512i codes) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(counted), "v"(codes));
    }

    // Products of a tile with one panel, left and right half: added to what is there. Bytes of rows, else
    // those of columns, are counted from -128.
    template <bool ROWS_COUNTED>
    [[gnu::always_inline]] static void add_panel(const int32_t* tile, const void* panel, int64_t quads,
                                                 __m512i (&left)[ROWS], __m512i (&right)[ROWS],
                                                 Ahead& ahead) {
        const uint8_t* b = static_cast<const uint8_t*>(panel);
        for (int64_t run = 0; run < quads; run += QUADS) {
            const int32_t* a = tile + run * ROWS;
            const int64_t depth = quads - run < QUADS ? quads - run : QUADS;
            for (int64_t quad = 0; quad < depth; ++quad, b += 4 * COLUMNS) {
                ahead.fetch();
                const __m512i b_left = _mm512_loadu_si512(b), b_right = _mm512_loadu_si512(b + 64);
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; ++r) {
                    const __m512i x = _mm512_set1_epi32(a[r * QUADS + quad]);
                    add_products(left[r], ROWS_COUNTED ? x : b_left, ROWS_COUNTED ? b_left : x);
                    add_products(right[r], ROWS_COUNTED ? x : b_right, ROWS_COUNTED ? b_right : x);
                }
            }
        }
    }

    // Products of a tile with one panel, left and right half.
    [[gnu::always_inline]] static void panel_products(const int32_t* tile, const int32_t* row_sum,
                                                      const uint8_t* b, int64_t quads, __m512i (&left)[ROWS],
                                                      __m512i (&right)[ROWS], Ahead& ahead) {
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) left[r] = right[r] = _mm512_set1_epi32(-128 * row_sum[r]);
        add_panel<false>(tile, b, quads, left, right, ahead);
    }

    static __m512 score(__m512i product, __m512 factor, const float* scale, const float* bias) {
        const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(scale), _mm512_cvtepi32_ps(product));
        return _mm512_fmadd_ps(factor, scaled, _mm512_loadu_ps(bias));
    }

    static int64_t sieve(const int32_t* tile, const float* row_scale, const int32_t* row_sum,
                         const uint8_t* panels, int64_t columns, int64_t quads, const float* scale,
                         const float* bias, const float* threshold, Hit* hits) {
        int64_t found = 0;
        Ahead none{nullptr, 0, 0};
        for (int64_t column = 0; column < columns; column += COLUMNS) {
            __m512i left[ROWS], right[ROWS];
            panel_products(tile, row_sum, panels + column * quads * 4, quads, left, right, none);
            const int64_t present = columns - column;
            const uint32_t valid = present < COLUMNS ? (1u << present) - 1 : 0xffffffffu;
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                const __m512 limit = _mm512_set1_ps(threshold[r]), factor = _mm512_set1_ps(row_scale[r]);
                const __m512 x = score(left[r], factor, scale + column, bias + column);
                const __m512 y = score(right[r], factor, scale + column + LANES, bias + column + LANES);
                uint32_t through = _mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ);
                through |= static_cast<uint32_t>(_mm512_cmp_ps_mask(y, limit, _CMP_NLT_UQ)) << LANES;
                if (__builtin_expect(through == 0, 1)) continue;
                float scores[COLUMNS];
                _mm512_storeu_ps(scores, x);
                _mm512_storeu_ps(scores + LANES, y);
                for (through &= valid; through != 0; through &= through - 1) {
                    const int lane = __builtin_ctz(through);
                    hits[found++] = {r, static_cast<int32_t>(column) + lane, scores[lane]};
                }
            }
        }
        return found;
    }

    // The second bound on the columns of a panel that the first let through to each row, whose products were
    // `first`: left half, right half. Four sums a row, since one waits for itself.
    [[gnu::noinline]] static int64_t resift(const CodedRows rows[2], const CodedColumns columns[2],
                                            int64_t column, const __m512i (&first)[ROWS][2],
                                            const uint32_t (&through)[ROWS], Hit* hits) {
        const CodedColumns &near = columns[0], &all = columns[1];
        const uint8_t* const panel = all.panels + column * all.quads * 4;
        int64_t found = 0;
        for (int r = 0; r < ROWS; ++r) {
            if (through[r] == 0) continue;
            __m512i sums[2][2];
            for (int half = 0; half < 2; ++half) {
                sums[half][0] = _mm512_set1_epi32(-128 * rows[1].sum[r]);
                sums[half][1] = _mm512_setzero_si512();
            }
            const uint8_t* b = panel;
            for (int64_t run = 0; run < all.quads; run += QUADS) {
                const int32_t* a = rows[1].tile + run * ROWS + r * QUADS;
                const int64_t depth = all.quads - run < QUADS ? all.quads - run : QUADS;
                int64_t quad = 0;
                for (; quad + 2 <= depth; quad += 2, b += 8 * COLUMNS) {
                    for (int odd = 0; odd < 2; ++odd) {
                        const __m512i x = _mm512_set1_epi32(a[quad + odd]);
                        add_products(sums[0][odd], _mm512_loadu_si512(b + odd * 128), x);
                        add_products(sums[1][odd], _mm512_loadu_si512(b + odd * 128 + 64), x);
                    }
                }
                for (; quad < depth; ++quad, b += 4 * COLUMNS) {
                    const __m512i x = _mm512_set1_epi32(a[quad]);
                    add_products(sums[0][0], _mm512_loadu_si512(b), x);
                    add_products(sums[1][0], _mm512_loadu_si512(b + 64), x);
                }
            }
            float scores[COLUMNS];
            uint32_t left = through[r];
            for (int half = 0; half < 2; ++half) {
                const int64_t c = column + half * LANES;
                const __m512i more = _mm512_add_epi32(sums[half][0], sums[half][1]);
                __m512 x = score(more, _mm512_set1_ps(rows[1].scale[r]), all.scale + c, all.bias + c);
                const __m512 scaled =
                    _mm512_mul_ps(_mm512_loadu_ps(near.scale + c), _mm512_cvtepi32_ps(first[r][half]));
                x = _mm512_fmadd_ps(_mm512_set1_ps(rows[0].scale[r]), scaled, x);
                x = _mm512_fmadd_ps(_mm512_set1_ps(rows[1].tail[r]), _mm512_loadu_ps(all.tail + c), x);
                const __mmask16 kept =
                    _mm512_cmp_ps_mask(x, _mm512_set1_ps(rows[1].threshold[r]), _CMP_NLT_UQ);
                left &= static_cast<uint32_t>(kept) << (half * LANES) | 0xffff0000u >> (half * LANES);
                _mm512_storeu_ps(scores + half * LANES, x);
            }
            for (; left != 0; left &= left - 1) {
                const int lane = __builtin_ctz(left);
                hits[found++] = {r, static_cast<int32_t>(column) + lane, scores[lane]};
            }
        }
        return found;
    }

    static int64_t sift(const CodedRows rows[2], const CodedColumns columns[2], int64_t count, Hit* hits) {
        const CodedRows& row = rows[0];
        const CodedColumns& near = columns[0];
        int64_t found = 0;
        Ahead none{nullptr, 0, 0};
        for (int64_t column = 0; column < count; column += COLUMNS) {
            __m512i left[ROWS], right[ROWS];
            panel_products(row.tile, row.sum, near.panels + column * near.quads * 4, near.quads, left, right,
                           none);
            const int64_t present = count - column;
            const uint32_t valid = present < COLUMNS ? (1u << present) - 1 : 0xffffffffu;
            uint32_t through[ROWS], any = 0;
            const __m512 tail_left = _mm512_loadu_ps(near.tail + column);
            const __m512 tail_right = _mm512_loadu_ps(near.tail + column + LANES);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                const __m512 limit = _mm512_set1_ps(row.threshold[r]), factor = _mm512_set1_ps(row.scale[r]);
                const __m512 tail = _mm512_set1_ps(row.tail[r]);
                const __m512 x = score(left[r], factor, near.scale + column, near.bias + column);
                const __m512 y =
                    score(right[r], factor, near.scale + column + LANES, near.bias + column + LANES);
                const __mmask16 low =
                    _mm512_cmp_ps_mask(_mm512_fmadd_ps(tail, tail_left, x), limit, _CMP_NLT_UQ);
                const __mmask16 high =
                    _mm512_cmp_ps_mask(_mm512_fmadd_ps(tail, tail_right, y), limit, _CMP_NLT_UQ);
                through[r] = (low | static_cast<uint32_t>(high) << LANES) & valid;
                any |= through[r];
            }
            if (any == 0) continue;
            __m512i first[ROWS][2];
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                first[r][0] = left[r];
                first[r][1] = right[r];
            }
            found += resift(rows, columns, column, first, through, hits + found);
        }
        return found;
    }

    static void products(const int32_t* tile, const float* row_scale, const int8_t* panels, int64_t columns,
                         int64_t quads, const int32_t* sum, const float* scale, const float* bias, float* out,
                         int64_t stride, const char* ahead, int64_t lines) {
        Ahead near{ahead, lines, lines > columns / COLUMNS * quads ? 2 : 1};
        for (int64_t column = 0; column < columns; column += COLUMNS) {
            __m512i left[ROWS], right[ROWS];
            const auto from = [sum](int64_t c) {
                const __m512i counted = _mm512_slli_epi32(_mm512_loadu_si512(sum + c), 7);
                return _mm512_sub_epi32(_mm512_setzero_si512(), counted);
            };
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                left[r] = from(column);
                right[r] = from(column + LANES);
            }
            add_panel<true>(tile, panels + column * quads * 4, quads, left, right, near);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                const __m512 factor = _mm512_set1_ps(row_scale[r]);
                const int64_t half = column + LANES;
                _mm512_storeu_ps(out + r * stride + column,
                                 score(left[r], factor, scale + column, bias + column));
                _mm512_storeu_ps(out + r * stride + half, score(right[r], factor, scale + half, bias + half));
            }
        }
    }
};

}  // namespace

const Int8Tile avx512_vnni_tile = {"avx512_vnni",        Avx512Vnni::sieve,     Avx512Vnni::sift,
                                   Avx512Vnni::products, Avx512Codes::quantize, Avx512Codes::quantize_rows};

}  // namespace dinofast
