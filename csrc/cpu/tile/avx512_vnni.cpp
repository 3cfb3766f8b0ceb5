#include <immintrin.h>

#include "../int8_tile.h"
#include "avx512_squares.h"
#include "register_tile.h"

namespace dinofast {
namespace {

constexpr int ROWS = Int8Tile::ROWS, COLUMNS = Int8Tile::COLUMNS, LANES = 16, QUADS = Int8Tile::RUN / 4;
constexpr int64_t AHEAD = 2;  // rows measured ahead of the one that is coded

struct Avx512Vnni {
    // _mm512_dpbusd_epi32 in place: of the intrinsic's sums GCC 12 keeps two copies, one of them in memory.
    static void add_products(__m512i& sum, __m512i b, __m512i a) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(b), "v"(a));
    }

    // Products of a tile with one panel, left and right half.
    [[gnu::always_inline]] static void panel_products(const int32_t* tile, const int32_t* row_sum,
                                                      const uint8_t* b, int64_t quads, __m512i (&left)[ROWS],
                                                      __m512i (&right)[ROWS], Ahead& ahead) {
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) left[r] = right[r] = _mm512_set1_epi32(-128 * row_sum[r]);
        for (int64_t run = 0; run < quads; run += QUADS) {
            const int32_t* a = tile + run * ROWS;
            const int64_t depth = quads - run < QUADS ? quads - run : QUADS;
            for (int64_t quad = 0; quad < depth; ++quad, b += 4 * COLUMNS) {
                ahead.fetch();
                const __m512i b_left = _mm512_loadu_si512(b), b_right = _mm512_loadu_si512(b + 64);
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; ++r) {
                    const __m512i x = _mm512_set1_epi32(a[r * QUADS + quad]);
                    add_products(left[r], b_left, x);
                    add_products(right[r], b_right, x);
                }
            }
        }
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

    static void products(const int32_t* tile, const float* row_scale, const int32_t* row_sum,
                         const uint8_t* panels, int64_t columns, int64_t quads, const float* scale,
                         const float* bias, float* out, int64_t stride, const char* ahead, int64_t lines) {
        Ahead near{ahead, lines, lines > columns / COLUMNS * quads ? 2 : 1};
        for (int64_t column = 0; column < columns; column += COLUMNS) {
            __m512i left[ROWS], right[ROWS];
            panel_products(tile, row_sum, panels + column * quads * 4, quads, left, right, near);
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

    // Channels k to k + 16, of them `left` or fewer present, 0 behind.
    static __m512 part(const float* x, int64_t k, int64_t left) {
        return left >= LANES ? _mm512_loadu_ps(x + k) : _mm512_maskz_loadu_ps(first_lanes(left), x + k);
    }

    struct Sums {
        __m512 top = _mm512_setzero_ps(), square = _mm512_setzero_ps();

        void add(__m512 p) {
            top = _mm512_max_ps(_mm512_abs_ps(p), top);
            square = _mm512_fmadd_ps(p, p, square);
        }
    };

    struct Coder {
        __m512 by, step, rest = _mm512_setzero_ps();
        __m512i sum = _mm512_setzero_si512();

        void write(__m512 p, int8_t* out) {
            const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(p, by));
            const __m512 left = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(code), step, p);
            rest = _mm512_fmadd_ps(left, left, rest);
            sum = _mm512_add_epi32(sum, code);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtsepi32_epi8(code));
        }
    };

    // Of a row less the center: the largest channel and the sum of squares.
    struct Centered {
        const float* center;
        Sums sums[2] = {};

        void add(const float* x, int64_t k) {
#pragma GCC unroll 4
            for (int64_t i = k; i < k + Int8Tile::RUN; i += LANES) {
                sums[i / LANES % 2].add(_mm512_sub_ps(_mm512_loadu_ps(x + i), _mm512_loadu_ps(center + i)));
            }
        }
        void finish(const float* x, int64_t k, int64_t d) {
            for (; k < d; k += LANES) sums[0].add(_mm512_sub_ps(part(x, k, d - k), part(center, k, d - k)));
        }
        float peak() const { return _mm512_reduce_max_ps(_mm512_max_ps(sums[0].top, sums[1].top)); }
        float square() const { return _mm512_reduce_add_ps(_mm512_add_ps(sums[0].square, sums[1].square)); }
    };

    // Of a row as it is: the largest channel, and the sum of squares as Tile::normalize has it.
    struct Plain {
        Squares squares;
        __m512 top[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};

        void add(const float* x, int64_t k) {
            squares.add(x + k);
            squares.add(x + k + 2 * LANES);
#pragma GCC unroll 4
            for (int64_t i = k; i < k + Int8Tile::RUN; i += LANES) {
                __m512& most = top[i / LANES % 2];
                most = _mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(x + i)), most);
            }
        }
        void finish(const float* x, int64_t k, int64_t d) {
            squares.finish(x, k, d);
            for (; k < d; k += LANES) top[0] = _mm512_max_ps(_mm512_abs_ps(part(x, k, d - k)), top[0]);
        }
        float peak() const { return _mm512_reduce_max_ps(_mm512_max_ps(top[0], top[1])); }
    };

    struct Nothing {
        void add(const float*, int64_t) {}
        void finish(const float*, int64_t, int64_t) {}
    };

    template <class Measure>
    static Measure measured(const float* x, int64_t d, Measure measure) {
        int64_t k = 0;
        for (; k + Int8Tile::RUN <= d; k += Int8Tile::RUN) measure.add(x, k);
        measure.finish(x, k, d);
        return measure;
    }

    // Scale x with so many factors and write it to `unit`; the largest channel and the sum of squares of
    // unit - center.
    template <int FACTORS>
    static void measure(const float* x, const float* center, int64_t d, Scale scale, float* unit, float& peak,
                        float& square) {
        const __m512 first = _mm512_set1_ps(scale.first), second = _mm512_set1_ps(scale.second);
        Sums sums[2];
        const auto add = [=](int64_t k, int64_t left, Sums& to) {
            __m512 v = part(x, k, left);
            if (FACTORS == 2) v = _mm512_mul_ps(v, first);
            v = _mm512_mul_ps(v, second);
            _mm512_mask_storeu_ps(unit + k, first_lanes(left), v);
            to.add(_mm512_sub_ps(v, part(center, k, left)));
        };
        int64_t k = 0;
        for (; k + 2 * LANES <= d; k += 2 * LANES) {
            add(k, LANES, sums[0]);
            add(k + LANES, LANES, sums[1]);
        }
        for (; k < d; k += LANES) add(k, d - k, sums[0]);
        peak = _mm512_reduce_max_ps(_mm512_max_ps(sums[0].top, sums[1].top));
        square = _mm512_reduce_add_ps(_mm512_add_ps(sums[0].square, sums[1].square));
    }

    // Meanwhile another row is measured: what one waits for the other does not need.
    template <bool CENTERED, class Measure>
    static Quantized encode(const float* x, const float* center, int64_t d, float peak, float square,
                            int8_t* codes, int64_t stride, const float* next, Measure& of_next) {
        constexpr int RUN = Int8Tile::RUN;
        const bool usable = peak > 1e-12f && peak < 1e12f && square < 1e30f;
        const float scale = usable ? peak / 127 : 0;
        const __m512 by = _mm512_set1_ps(usable ? 127 / peak : 0), step = _mm512_set1_ps(scale);
        Coder coder[2] = {{by, step}, {by, step}};
        Measure measure = of_next;
        int64_t run = 0;
        for (; run + RUN <= d; run += RUN, codes += stride) {
            measure.add(next, run);
#pragma GCC unroll 4
            for (int64_t k = 0; k < RUN; k += LANES) {
                __m512 p = _mm512_loadu_ps(x + run + k);
                if (CENTERED) p = _mm512_sub_ps(p, _mm512_loadu_ps(center + run + k));
                coder[k / LANES % 2].write(p, codes + k);
            }
        }
        measure.finish(next, run, d);
        of_next = measure;
        for (int64_t k = 0; run < d && k < RUN; k += LANES) {
            const int64_t left = d - run - k;
            __m512 p = part(x, run + k, left);
            if (CENTERED) p = _mm512_sub_ps(p, part(center, run + k, left));
            coder[0].write(p, codes + k);
        }
        const float up = 1 + static_cast<float>(d + 64) * 0x1p-24f;
        if (!usable) {
            const bool small = peak <= 1e-12f && square < 1e30f;  // false for NaN
            const float most = small ? up * peak * __builtin_sqrtf(static_cast<float>(d)) : __builtin_inff();
            return {0, most, most, 0};
        }
        const float rest = _mm512_reduce_add_ps(_mm512_add_ps(coder[0].rest, coder[1].rest));
        return {scale, up * __builtin_sqrtf(rest), up * __builtin_sqrtf(square),
                _mm512_reduce_add_epi32(_mm512_add_epi32(coder[0].sum, coder[1].sum))};
    }

    static void quantize(const float* const* x, int64_t count, const float* center, int64_t d, float* units,
                         int64_t unit_stride, int8_t* codes, int64_t stride, Quantized* found) {
        if (units != nullptr) {
            quantize_scaled(x, count, center, d, units, unit_stride, codes, stride, found);
            return;
        }
        float peak[ROWS], square[ROWS];
        const auto start = [&](int64_t r, const Centered& measure) {
            peak[r] = measure.peak();
            square[r] = measure.square();
        };
        for (int64_t r = 0; r < count && r < AHEAD; ++r) start(r, measured(x[r], d, Centered{center}));
        for (int64_t r = 0; r < count; ++r, codes += Int8Tile::RUN) {
            const auto finish = [&](const float* next, auto& measure) {
                found[r] = encode<true>(x[r], center, d, peak[r], square[r], codes, stride, next, measure);
            };
            if (r + AHEAD < count) {
                Centered next{center};
                finish(x[r + AHEAD], next);
                start(r + AHEAD, next);
            } else {
                Nothing none;
                finish(nullptr, none);
            }
        }
    }

    // Each step for some rows, which stay in the L1: what one row has to wait for does not keep the others.
    static void quantize_scaled(const float* const* x, int64_t count, const float* center, int64_t d,
                                float* units, int64_t unit_stride, int8_t* codes, int64_t stride,
                                Quantized* found) {
        constexpr int64_t SOME = 4;
        for (int64_t begin = 0; begin < count; begin += SOME) {
            const int64_t some = count - begin < SOME ? count - begin : SOME;
            float peak[SOME], square[SOME];
            Scale scale[SOME] = {};
            for (int64_t r = 0; r < some; ++r) {
                const double sum = sum_of_squares(x[begin + r], d);
                scale[r] = sum < __builtin_inf() ? unit_scale(sum) : Scale{__builtin_nanf(""), 0};
            }
            for (int64_t r = 0; r < some; ++r) {
                const auto write = scale[r].first == 1 ? measure<1> : measure<2>;
                write(x[begin + r], center, d, scale[r], units + (begin + r) * unit_stride, peak[r],
                      square[r]);
            }
            for (int64_t r = begin; r < begin + some; ++r) {
                Nothing none;
                found[r] = encode<true>(units + r * unit_stride, center, d, peak[r - begin],
                                        square[r - begin], codes + r * Int8Tile::RUN, stride, nullptr, none);
            }
        }
    }

    static void quantize_units(const float** x, int64_t count, int64_t d, float* units, int64_t unit_stride,
                               int8_t* codes, int64_t stride, Quantized* found) {
        constexpr double LEAST = 1e-16,
                         MOST = 1e16;        // squared norms of rows whose own channels are quantized
        constexpr float ROUNDED = 0x1p-22f;  // what rounding may add to a unit row
        float peak[ROWS], factor[ROWS];
        const auto start = [&](int64_t r, const Plain& measure) {
            const double sum = measure.squares.total();
            peak[r] = measure.peak();
            factor[r] = sum < __builtin_inf() ? unit_scale(sum).second : __builtin_nanf("");
            if ((sum > LEAST && sum < MOST) || !(factor[r] > 0)) return;
            peak[r] = write_unit(x[r], d, unit_scale(sum), units + r * unit_stride);
            x[r] = units + r * unit_stride;
            factor[r] = 1;
        };
        for (int64_t r = 0; r < count && r < AHEAD; ++r) start(r, measured(x[r], d, Plain{}));
        for (int64_t r = 0; r < count; ++r, codes += Int8Tile::RUN) {
            const auto finish = [&](const float* next, auto& measure) {
                const Quantized own =
                    encode<false>(x[r], nullptr, d, peak[r], 1, codes, stride, next, measure);
                const float by = factor[r];
                found[r] = by > 0
                               ? Quantized{own.scale * by, own.rest * by + ROUNDED, 1 + ROUNDED, own.sum, by}
                               : Quantized{0, 0, by, 0, by};
            };
            if (r + AHEAD < count) {
                Plain next;
                finish(x[r + AHEAD], next);
                start(r + AHEAD, next);
            } else {
                Nothing none;
                finish(nullptr, none);
            }
        }
    }

    // Write x (d,) scaled as by Tile::normalize; its largest channel.
    static float write_unit(const float* x, int64_t d, Scale scale, float* unit) {
        const __m512 first = _mm512_set1_ps(scale.first), second = _mm512_set1_ps(scale.second);
        __m512 most = _mm512_setzero_ps();
        for (int64_t k = 0; k < d; k += LANES) {
            const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(part(x, k, d - k), first), second);
            _mm512_mask_storeu_ps(unit + k, first_lanes(d - k), scaled);
            most = _mm512_max_ps(_mm512_abs_ps(scaled), most);
        }
        return _mm512_reduce_max_ps(most);
    }
};

}  // namespace

const Int8Tile avx512_vnni_tile = {"avx512_vnni",        Avx512Vnni::sieve,    Avx512Vnni::sift,
                                   Avx512Vnni::products, Avx512Vnni::quantize, Avx512Vnni::quantize_units};

}  // namespace dinofast
