// The parts of MixtureTile over a vector type V, written once; instantiated as register_tile.h is.
#pragma once

#include <cfloat>
#include <cmath>

#include "../mixture_tile.h"

namespace dinofast {

// Add (y − μ)² λ over `depth` channels to the registers left and right, patches by components.
template <class V, int ROWS>
[[gnu::always_inline]] inline void mixture_add_spread(const float*& panel, const float*& y, int64_t depth,
                                                      typename V::Float* left, typename V::Float* right) {
    using Float = typename V::Float;
    for (int64_t i = 0; i < depth; ++i, panel += 2 * ROWS, y += 2 * V::LANES) {
        const Float y_left = V::load(y), y_right = V::load(y + V::LANES);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const Float mean = V::set(panel[r]), precision = V::set(panel[ROWS + r]);
            const Float a = V::add(y_left, mean), b = V::add(y_right, mean);
            left[r] = V::multiply_add(V::multiply(a, precision), a, left[r]);
            right[r] = V::multiply_add(V::multiply(b, precision), b, right[r]);
        }
    }
}

template <class V, int ROWS>
void mixture_spread(const float* panel, const float* y, int64_t depth, float* sums) {
    constexpr int LANES = V::LANES;
    typename V::Float left[ROWS], right[ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) left[r] = right[r] = V::set(0);
    mixture_add_spread<V, ROWS>(panel, y, depth, left, right);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r, sums += 2 * LANES) {
        V::store(V::add(V::load(sums), left[r]), sums);
        V::store(V::add(V::load(sums + LANES), right[r]), sums + LANES);
    }
}

// sum + lost += x, without error but for the last digit of `lost`.
template <class V>
[[gnu::always_inline]] inline void mixture_add_exactly(typename V::Float x, float* sum, float* lost) {
    using Float = typename V::Float;
    const Float before = V::load(sum), after = V::add(before, x), added = V::subtract(after, before);
    const Float error = V::add(V::subtract(before, V::subtract(after, added)), V::subtract(x, added));
    V::store(after, sum);
    V::store(V::add(V::load(lost), error), lost);
}

template <class V, int ROWS>
void mixture_spread_exactly(const float* panel, const float* y, int64_t depth, float* sums, float* lost) {
    constexpr int LANES = V::LANES;
    for (int64_t start = 0; start < depth; start += RUN) {
        typename V::Float left[ROWS], right[ROWS];
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) left[r] = right[r] = V::set(0);
        mixture_add_spread<V, ROWS>(panel, y, depth - start < RUN ? depth - start : RUN, left, right);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const int at = r * 2 * LANES;
            mixture_add_exactly<V>(left[r], sums + at, lost + at);
            mixture_add_exactly<V>(right[r], sums + at + LANES, lost + at + LANES);
        }
    }
}

template <class V, int ROWS>
void mixture_factored(const float* panel, const float* y, int64_t depth, float* sums) {
    using Float = typename V::Float;
    constexpr int LANES = V::LANES;
    Float left[ROWS], right[ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) left[r] = right[r] = V::set(0);
    for (int64_t i = 0; i < depth; ++i, panel += 1 + ROWS, y += 2 * LANES) {
        const Float mean = V::set(panel[0]);
        const Float a = V::add(V::load(y), mean), b = V::add(V::load(y + LANES), mean);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const Float factor = V::set(panel[1 + r]);
            left[r] = V::multiply_add(a, factor, left[r]);
            right[r] = V::multiply_add(b, factor, right[r]);
        }
    }
    Float left_sum = V::load(sums), right_sum = V::load(sums + LANES);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
        left_sum = V::multiply_add(left[r], left[r], left_sum);
        right_sum = V::multiply_add(right[r], right[r], right_sum);
    }
    V::store(left_sum, sums);
    V::store(right_sum, sums + LANES);
}

template <class V>
void mixture_choose(const float* sums, const float* upper, int64_t count, float half, int32_t* at) {
    constexpr int LANES = V::LANES;
    using Float = typename V::Float;
    Float left_top = V::set(-INFINITY), right_top = left_top;
    auto left_at = V::repeat(-1), right_at = left_at;
    const Float minus_half = V::set(-half);
    for (int64_t k = 0; k < count; ++k, sums += 2 * LANES) {
        const Float constant = V::set(upper[k]);
        const auto number = V::repeat(static_cast<int32_t>(k));
        const Float left = V::multiply_add(minus_half, V::load(sums), constant);
        const Float right = V::multiply_add(minus_half, V::load(sums + LANES), constant);
        V::replace_if_greater(left_top, left_at, left, number);
        V::replace_if_greater(right_top, right_at, right, number);
    }
    float top[LANES];
    V::store(left_top, left_at, top, at);
    V::store(right_top, right_at, top, at + LANES);
}

template <class V>
int64_t mixture_survive(const float* sums, const float* upper, const float* slack, int64_t count, float half,
                        float growth, const float* norm, const float* floor, uint32_t* alive,
                        int64_t* grown) {
    constexpr int LANES = V::LANES;
    using Float = typename V::Float;
    const Float left_norm = V::load(norm), right_norm = V::load(norm + LANES);
    const Float left_floor = V::load(floor), right_floor = V::load(floor + LANES);
    const Float largest = V::set(FLT_MAX), factor = V::set(half), wide_factor = V::set(half * growth);
    int64_t total = 0, grown_total = 0;
    for (int64_t k = 0; k < count; ++k, sums += 2 * LANES) {
        const Float constant = V::set(upper[k]), by = V::set(slack[k]);
        const Float left = V::least(largest, V::load(sums));
        const Float right = V::least(largest, V::load(sums + LANES));
        const Float left_limit = V::subtract(V::multiply_add(by, left_norm, constant), left_floor);
        const Float right_limit = V::subtract(V::multiply_add(by, right_norm, constant), right_floor);
        alive[k] = V::not_below(left_limit, V::multiply(factor, left)) |
                   V::not_below(right_limit, V::multiply(factor, right)) << LANES;
        total += __builtin_popcount(alive[k]);
        grown_total +=
            __builtin_popcount(V::not_below(left_limit, V::multiply(wide_factor, left)) |
                               V::not_below(right_limit, V::multiply(wide_factor, right)) << LANES);
    }
    *grown = grown_total;
    return total;
}

template <class V, int ROWS, bool SQUARE>
void mixture_weigh_power(const float* y, int64_t stride, const int32_t* rows, const float* weights,
                         int64_t count, float* sums) {
    using Float = typename V::Float;
    constexpr int LANES = V::LANES;
    Float left[ROWS], right[ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) left[r] = right[r] = V::set(0);
    for (int64_t n = 0; n < count; ++n, weights += ROWS) {
        const float* row = y + rows[n] * stride;
        Float a = V::load(row), b = V::load(row + LANES);
        if (SQUARE) {
            a = V::multiply(a, a);
            b = V::multiply(b, b);
        }
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const Float weight = V::set(weights[r]);
            left[r] = V::multiply_add(weight, a, left[r]);
            right[r] = V::multiply_add(weight, b, right[r]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r, sums += 2 * LANES) {
        V::store(left[r], sums);
        V::store(right[r], sums + LANES);
    }
}

template <class V, int ROWS>
void mixture_weigh(const float* y, int64_t stride, const int32_t* rows, const float* weights, int64_t count,
                   bool square, float* sums) {
    (square ? mixture_weigh_power<V, ROWS, true> : mixture_weigh_power<V, ROWS, false>)(y, stride, rows,
                                                                                        weights, count, sums);
}

template <class V>
double mixture_distance(const float* x, const float* mean, const float* precision, int64_t d) {
    constexpr int LANES = V::LANES / 2;
    typename V::Double even = V::widen(0.0), odd = even;
    int64_t i = 0;
    for (; i + 2 * LANES <= d; i += 2 * LANES) {
        const auto a = V::subtract(V::widen(x + i), V::widen(mean + i));
        const auto b = V::subtract(V::widen(x + i + LANES), V::widen(mean + i + LANES));
        even = V::multiply_add(V::multiply(a, V::widen(precision + i)), a, even);
        odd = V::multiply_add(V::multiply(b, V::widen(precision + i + LANES)), b, odd);
    }
    double sum = V::sum(even, odd);
    for (; i < d; ++i) {
        const double a = static_cast<double>(x[i]) - mean[i];
        sum += a * a * precision[i];
    }
    return sum;
}

template <class V>
double mixture_dot(const float* x, const double* y, int64_t d) {
    constexpr int LANES = V::LANES / 2;
    typename V::Double even = V::widen(0.0), odd = even;
    int64_t i = 0;
    for (; i + 2 * LANES <= d; i += 2 * LANES) {
        even = V::multiply_add(V::widen(x + i), V::widen(y + i), even);
        odd = V::multiply_add(V::widen(x + i + LANES), V::widen(y + i + LANES), odd);
    }
    double sum = V::sum(even, odd);
    for (; i < d; ++i) sum += x[i] * y[i];
    return sum;
}

template <class V, int ROWS>
void mixture_eliminate(double* factor, int64_t stride, int64_t i, int64_t j, const double* inverse) {
    using Double = typename V::Double;
    constexpr int LANES = V::LANES / 2;
    Double left[ROWS], right[ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) left[r] = right[r] = V::widen(0.0);
    for (int64_t n = 0; n < i; ++n) {
        const double* row = factor + n * stride;
        const Double a = V::widen(row + j), b = V::widen(row + j + LANES);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const Double other = V::widen(row[i + r]);
            left[r] = V::multiply_add(other, a, left[r]);
            right[r] = V::multiply_add(other, b, right[r]);
        }
    }
    double* block = factor + i * stride;
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
        double* out = block + r * stride + j;
        left[r] = V::subtract(V::widen(out), left[r]);
        right[r] = V::subtract(V::widen(out + LANES), right[r]);
        if (inverse != nullptr) {
#pragma GCC unroll 16
            for (int q = 0; q < r; ++q) {
                const Double other = V::widen(-block[q * stride + i + r]);
                left[r] = V::multiply_add(other, left[q], left[r]);
                right[r] = V::multiply_add(other, right[q], right[r]);
            }
            left[r] = V::multiply(left[r], V::widen(inverse[r]));
            right[r] = V::multiply(right[r], V::widen(inverse[r]));
        }
        V::store(left[r], out);
        V::store(right[r], out + LANES);
    }
}

template <class V, int ROWS>
constexpr MixtureTile mixture_tile = {
    ROWS,
    2 * V::LANES,
    mixture_spread<V, ROWS>,
    mixture_spread_exactly<V, ROWS>,
    mixture_factored<V, ROWS>,
    mixture_choose<V>,
    mixture_survive<V>,
    mixture_weigh<V, ROWS>,
    mixture_distance<V>,
    mixture_dot<V>,
    mixture_eliminate<V, ROWS>,
};

}  // namespace dinofast
