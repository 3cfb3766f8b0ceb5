// How rows become int8 codes, for files in this folder that are compiled for AVX-512.
#pragma once

#include <immintrin.h>

#include "../int8_tile.h"
#include "avx512_squares.h"
#include "register_tile.h"

namespace dinofast {
namespace {

struct Avx512Codes {
    static constexpr int ROWS = Int8Tile::ROWS, LANES = 16;
    static constexpr int64_t AHEAD = 2;  // rows measured ahead of the one that is coded

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

    // Codes and their sum.
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

    // Codes counted from -128: they are the last byte of a float32 beyond 2^23.
    struct Counter {
        static constexpr float WHOLE = 0x1.8p23f + 128;
        __m512 by, step, rest = _mm512_setzero_ps();
        __m512i sum = _mm512_setzero_si512();

        void write(__m512 p, uint8_t* out) {
            const __m512 whole = _mm512_set1_ps(WHOLE), counted = _mm512_fmadd_ps(p, by, whole);
            const __m512 left = _mm512_fnmadd_ps(_mm512_sub_ps(counted, whole), step, p);
            rest = _mm512_fmadd_ps(left, left, rest);
            const __m128i last = _mm512_cvtepi32_epi8(_mm512_castps_si512(counted));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out), last);
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
        Avx512Squares squares;
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
    template <class With, bool CENTERED, class Code, class Measure>
    static Quantized encode(const float* x, const float* center, int64_t d, float peak, float square,
                            Code* codes, int64_t stride, const float* next, Measure& of_next) {
        constexpr int RUN = Int8Tile::RUN;
        const bool usable = peak > 1e-12f && peak < 1e12f && square < 1e30f;
        const float scale = usable ? peak / 127 : 0;
        const __m512 by = _mm512_set1_ps(usable ? 127 / peak : 0), step = _mm512_set1_ps(scale);
        With coder[2] = {{by, step}, {by, step}};
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

    static Quantized quantize(const float* x, const float* center, int64_t d, int8_t* codes, int64_t stride) {
        const Centered row = measured(x, d, Centered{center});
        Nothing none;
        return encode<Coder, true>(x, center, d, row.peak(), row.square(), codes, stride, nullptr, none);
    }

    static void quantize_rows(const float** x, int64_t count, const float* center, int64_t d, float* units,
                              int64_t unit_stride, uint8_t* codes, int64_t stride, Quantized* found) {
        if (center == nullptr) {
            quantize_units(x, count, d, units, unit_stride, codes, stride, found);
        } else if (units != nullptr) {
            quantize_scaled(x, count, center, d, units, unit_stride, codes, stride, found);
        } else {
            quantize_centered(x, count, center, d, codes, stride, found);
        }
    }

    static void quantize_centered(const float** x, int64_t count, const float* center, int64_t d,
                                  uint8_t* codes, int64_t stride, Quantized* found) {
        float peak[ROWS], square[ROWS];
        const auto start = [&](int64_t r, const Centered& measure) {
            peak[r] = measure.peak();
            square[r] = measure.square();
        };
        for (int64_t r = 0; r < count && r < AHEAD; ++r) start(r, measured(x[r], d, Centered{center}));
        for (int64_t r = 0; r < count; ++r, codes += Int8Tile::RUN) {
            const auto finish = [&](const float* next, auto& measure) {
                found[r] =
                    encode<Counter, true>(x[r], center, d, peak[r], square[r], codes, stride, next, measure);
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
    static void quantize_scaled(const float** x, int64_t count, const float* center, int64_t d, float* units,
                                int64_t unit_stride, uint8_t* codes, int64_t stride, Quantized* found) {
        constexpr int64_t SOME = 4;
        for (int64_t begin = 0; begin < count; begin += SOME) {
            const int64_t some = count - begin < SOME ? count - begin : SOME;
            float peak[SOME], square[SOME];
            Scale scale[SOME] = {};
            for (int64_t r = 0; r < some; ++r) {
                const double sum = Avx512Squares::of(x[begin + r], d);
                scale[r] = sum < __builtin_inf() ? unit_scale(sum) : Scale{__builtin_nanf(""), 0};
            }
            for (int64_t r = 0; r < some; ++r) {
                const auto write = scale[r].first == 1 ? measure<1> : measure<2>;
                write(x[begin + r], center, d, scale[r], units + (begin + r) * unit_stride, peak[r],
                      square[r]);
            }
            for (int64_t r = begin; r < begin + some; ++r) {
                Nothing none;
                found[r] = encode<Counter, true>(units + r * unit_stride, center, d, peak[r - begin],
                                                 square[r - begin], codes + r * Int8Tile::RUN, stride,
                                                 nullptr, none);
            }
        }
    }

    static void quantize_units(const float** x, int64_t count, int64_t d, float* units, int64_t unit_stride,
                               uint8_t* codes, int64_t stride, Quantized* found) {
        // Squared norms of rows whose own channels are quantized.
        constexpr double LEAST = 1e-16, MOST = 1e16;
        // The unit row is x * factor, rounded; its codes count step * factor, rounded: each is off by 2^-24
        // of a norm of 1, or little more. So is the factor from the inverse norm.
        constexpr float ROUNDED = 0x1p-22f;
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
                    encode<Counter, false>(x[r], nullptr, d, peak[r], 1, codes, stride, next, measure);
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
}  // namespace dinofast
