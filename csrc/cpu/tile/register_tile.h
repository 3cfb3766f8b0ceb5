// The tile over a vector type V, written once for every instruction set. Each file in this folder
// instantiates it with its own V from an unnamed namespace, so no instance is shared between instruction
// sets.
#pragma once

#include <cmath>

#include "../tile.h"

namespace dinofast {

// Cache lines that are wanted soon, some at a time.
struct Ahead {
    const char* next;
    int64_t left, each;

    void fetch() {
        for (int64_t i = 0; i < each && left > 0; ++i, --left, next += 64) __builtin_prefetch(next);
    }
};

// Products of a tile with one panel, left and right half.
template <class V, int ROWS>
[[gnu::always_inline]] inline void register_tile_products(const float* tile, const float* b, int64_t d,
                                                          typename V::Float (&left)[ROWS],
                                                          typename V::Float (&right)[ROWS], Ahead& ahead) {
    using Float = typename V::Float;
    constexpr int LANES = V::LANES, WIDTH = 2 * LANES;
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) left[r] = right[r] = V::set(0);
    for (int64_t start = 0; start < d; start += CHUNK) {
        const int64_t stop = d - start < CHUNK ? d : start + CHUNK;
        Float sum_left[ROWS], sum_right[ROWS];
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) sum_left[r] = sum_right[r] = V::set(0);
        for (int64_t run = start; run < stop; run += DEPTH) {
            ahead.fetch();
            const float* a = tile + run * ROWS;
            const int64_t depth = stop - run < DEPTH ? stop - run : DEPTH;
            for (int64_t k = 0; k < depth; ++k, b += WIDTH) {
                const Float b_left = V::load(b), b_right = V::load(b + LANES);
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; ++r) {
                    const Float x = V::set(a[r * DEPTH + k]);
                    sum_left[r] = V::multiply_add(x, b_left, sum_left[r]);
                    sum_right[r] = V::multiply_add(x, b_right, sum_right[r]);
                }
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            left[r] = V::add(left[r], sum_left[r]);
            right[r] = V::add(right[r], sum_right[r]);
        }
    }
}

template <class V, int ROWS>
void register_tile_write(const float* tile, const float* panels, int64_t columns, int64_t d,
                         const float* bias, float* out, int64_t stride, const char* ahead, int64_t lines) {
    using Float = typename V::Float;
    constexpr int LANES = V::LANES, WIDTH = 2 * LANES;
    const int64_t steps = (columns + WIDTH - 1) / WIDTH * ((d + DEPTH - 1) / DEPTH);
    Ahead near{ahead, lines, steps > 0 ? (lines + steps - 1) / steps : 0};
    for (int64_t column = 0; column < columns; column += WIDTH) {
        Float left[ROWS], right[ROWS];
        register_tile_products<V, ROWS>(tile, panels + column * d, d, left, right, near);
        const Float bias_left = V::load(bias + column), bias_right = V::load(bias + column + LANES);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            V::store(V::add(left[r], bias_left), out + r * stride + column);
            V::store(V::add(right[r], bias_right), out + r * stride + column + LANES);
        }
    }
}

template <class V, int ROWS>
int64_t register_tile_sieve(const float* tile, const float* panels, int64_t columns, int64_t d,
                            const float* bias, const float* threshold, Hit* hits) {
    using Float = typename V::Float;
    constexpr int LANES = V::LANES, WIDTH = 2 * LANES;
    int64_t found = 0;
    Ahead none{nullptr, 0, 0};
    for (int64_t column = 0; column < columns; column += WIDTH) {
        Float left[ROWS], right[ROWS];
        register_tile_products<V, ROWS>(tile, panels + column * d, d, left, right, none);
        const Float bias_left = V::load(bias + column), bias_right = V::load(bias + column + LANES);
        const int64_t present = columns - column;
        const uint32_t valid = present < WIDTH ? (1u << present) - 1 : 0xffffffffu;
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const Float limit = V::set(threshold[r]);
            const Float x = V::add(left[r], bias_left), y = V::add(right[r], bias_right);
            uint32_t through = V::not_below(x, limit) | V::not_below(y, limit) << LANES;
            if (__builtin_expect(through == 0, 1)) continue;
            float score[WIDTH];
            V::store(x, score);
            V::store(y, score + LANES);
            for (through &= valid; through != 0; through &= through - 1) {
                const int lane = __builtin_ctz(through);
                hits[found++] = {r, static_cast<int32_t>(column) + lane, score[lane]};
            }
        }
    }
    return found;
}

// Two factors that bring a row of this sum of squares to unit norm. The first is 1, or a power of two where
// the reciprocal of the norm would leave float32.
struct Scale {
    float first, second;
};

static inline Scale unit_scale(double sum_of_squares) {
    if (sum_of_squares == 0) return {0, 0};
    double first = 1;
    if (sum_of_squares < 0x1p-160) first = 0x1p100;
    if (sum_of_squares > 0x1p160) first = 0x1p-100;
    return {static_cast<float>(first), static_cast<float>(1 / (__builtin_sqrt(sum_of_squares) * first))};
}

template <class V>
bool register_tile_normalize(const float* x, int64_t d, float* out, int64_t stride) {
    const double sum = V::sum_of_squares(x, d);
    if (!(sum < INFINITY)) return false;
    const Scale scale = unit_scale(sum);
    const typename V::Float first = V::set(scale.first), second = V::set(scale.second);
    for (int64_t run = 0; run < d; run += DEPTH, out += stride, x += DEPTH) {
        const int depth = d - run < DEPTH ? static_cast<int>(d - run) : DEPTH;
        int k = 0;
        for (; k + V::LANES <= depth; k += V::LANES) V::scale(x + k, first, second, out + k);
        for (; k < depth; ++k) out[k] = x[k] * scale.first * scale.second;
    }
    return true;
}

}  // namespace dinofast
