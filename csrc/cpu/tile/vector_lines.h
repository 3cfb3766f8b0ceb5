// Lines over a vector type V, included like register_tile.h by every file in this folder.
#pragma once

#include "../tile.h"

namespace dinofast {

// Of N pairs side by side: each sum has to wait for its own last step.
template <class V, int N>
[[gnu::always_inline]] inline void sq_distance_block(const float* const* x, const float* const* y, int64_t d,
                                                     double* out) {
    double sums[N][16];
    const int64_t k = V::template add_sq_distance<N>(x, y, d, sums);
    for (int n = 0; n < N; ++n) {
        for (int i = 0; k + i < d; ++i) {
            const double gap = x[n][k + i] - y[n][k + i];
            sums[n][i] += gap * gap;
        }
        out[n] = V::halved(sums[n]);
    }
}

template <class V>
double vector_sq_distance(const float* x, const float* y, int64_t d) {
    double sum;
    sq_distance_block<V, 1>(&x, &y, d, &sum);
    return sum;
}

template <class V>
void vector_sq_distances(const float* const* x, const float* const* y, int64_t count, int64_t d,
                         double* out) {
    int64_t p = 0;
    for (; p + 2 <= count; p += 2) sq_distance_block<V, 2>(x + p, y + p, d, out + p);
    if (p < count) sq_distance_block<V, 1>(x + p, y + p, d, out + p);
}

template <class V>
void vector_rough_sq_distances(const float* x, const float* const y[4], int64_t d, float out[4]) {
    constexpr int LANES = V::LANES;
    typename V::Float sum[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum[i] = V::set(0);
    int64_t k = 0;
    for (; k + LANES <= d; k += LANES) {
        const auto left = V::load(x + k);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const auto gap = V::subtract(left, V::load(y[i] + k));
            sum[i] = V::multiply_add(gap, gap, sum[i]);
        }
    }
    V::sum_each(sum, out);
    for (; k < d; ++k) {
        for (int i = 0; i < 4; ++i) out[i] += (x[k] - y[i][k]) * (x[k] - y[i][k]);
    }
}

// Products of ROWS rows with four others, each summed in two parts.
template <class V, int ROWS>
[[gnu::always_inline]] inline void dot_block(const float* const* x, const float* const y[4], int64_t d,
                                             float* out, int64_t stride) {
    constexpr int LANES = V::LANES;
    typename V::Float even[ROWS][4], odd[ROWS][4];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) even[r][i] = odd[r][i] = V::set(0);
    }
    const auto add = [x, y](int64_t k, typename V::Float(&sum)[ROWS][4]) {
        typename V::Float left[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) left[r] = V::load(x[r] + k);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            auto right = V::load(y[i] + k);
            V::hold(right);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) sum[r][i] = V::multiply_add(left[r], right, sum[r][i]);
        }
    };
    int64_t k = 0;
    for (; k + 2 * LANES <= d; k += 2 * LANES) {
        add(k, even);
        add(k + LANES, odd);
    }
    if (k < d) add(k, even);
    if (k + LANES < d) add(k + LANES, odd);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) even[r][i] = V::add(even[r][i], odd[r][i]);
        V::sum_each(even[r], out + r * stride);
    }
}

template <class V>
void vector_dots(const float* const* x, int64_t count, const float* const y[4], int64_t d, float* out,
                 int64_t stride) {
    int64_t r = 0;
    for (; r + V::DOT_ROWS <= count; r += V::DOT_ROWS) {
        dot_block<V, V::DOT_ROWS>(x + r, y, d, out + r * stride, stride);
    }
    for (; r < count; ++r) dot_block<V, 1>(x + r, y, d, out + r * stride, stride);
}

template <class V>
float vector_dot(const float* x, const float* y, int64_t d) {
    constexpr int LANES = V::LANES;
    auto even = V::set(0), odd = even;
    int64_t k = 0;
    for (; k + 2 * LANES <= d; k += 2 * LANES) {
        even = V::multiply_add(V::load(x + k), V::load(y + k), even);
        odd = V::multiply_add(V::load(x + k + LANES), V::load(y + k + LANES), odd);
    }
    if (k < d) even = V::multiply_add(V::load(x + k), V::load(y + k), even);
    if (k + LANES < d) odd = V::multiply_add(V::load(x + k + LANES), V::load(y + k + LANES), odd);
    return V::sum_one(V::add(even, odd));
}

// Of N pairs side by side: each sum has to wait for its own last step.
template <class V, int N>
[[gnu::always_inline]] inline void scaled_dot_block(const float* const* x, const float* factor,
                                                    const float* const* y, int64_t d, float* out) {
    constexpr int LANES = V::LANES;
    typename V::Float even[N], odd[N], by[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
        even[n] = odd[n] = V::set(0);
        by[n] = V::set(factor[n]);
    }
    const auto add = [x, y, &by](int64_t k, typename V::Float(&sum)[N]) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            sum[n] = V::multiply_add(V::multiply(V::load(x[n] + k), by[n]), V::load(y[n] + k), sum[n]);
        }
    };
    int64_t k = 0;
    for (; k + 2 * LANES <= d; k += 2 * LANES) {
        add(k, even);
        add(k + LANES, odd);
    }
    if (k < d) add(k, even);
    if (k + LANES < d) add(k + LANES, odd);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) out[n] = V::sum_one(V::add(even[n], odd[n]));
}

template <class V>
void vector_scaled_dots(const float* const* x, const float* factor, const float* const* y, int64_t count,
                        int64_t d, float* out) {
    int64_t p = 0;
    for (; p + 2 <= count; p += 2) scaled_dot_block<V, 2>(x + p, factor + p, y + p, d, out + p);
    if (p < count) scaled_dot_block<V, 1>(x + p, factor + p, y + p, d, out + p);
}

template <class V, int ROWS>
[[gnu::always_inline]] inline void highest_block(const float* score, int64_t stride, int64_t count,
                                                 float* best, int32_t* column) {
    typename V::Top top[ROWS];
    for (int64_t j = 0; j < count; j += V::LANES) {
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) top[r].add(V::load(score + r * stride + j), static_cast<int32_t>(j));
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) column[r] = top[r].read(best[r]);
}

template <class V>
void vector_highest(const float* score, int64_t stride, int64_t rows, int64_t count, float* best,
                    int32_t* column) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4)
        highest_block<V, 4>(score + r * stride, stride, count, best + r, column + r);
    for (; r < rows; ++r) highest_block<V, 1>(score + r * stride, stride, count, best + r, column + r);
}

// Which of 32 columns from `column` on.
struct Through {
    int32_t row, column;
    uint32_t set;
};

template <class V>
int64_t write_hits(const Through* through, int64_t count, const float* score, int64_t stride, Hit* hits) {
    int64_t found = 0;
    for (int64_t t = 0; t < count; ++t) {
        const float* const row = score + through[t].row * stride;
        uint32_t set = through[t].set;
        do {
            const int32_t column = through[t].column + __builtin_ctz(set);
            hits[found++] = {through[t].row, column, row[column]};
        } while ((set &= set - 1) != 0);
    }
    return found;
}

// In two steps: how many columns a row has is hard to predict, that 32 columns have one at most is not.
template <class V>
int64_t vector_not_below(const float* score, int64_t stride, int64_t rows, int64_t count, const float* least,
                         Hit* hits) {
    constexpr int LANES = V::LANES, WIDTH = 32, ROOM = 64;
    Through through[ROOM];
    int64_t found = 0, full = 0;
    for (int64_t r = 0; r < rows; ++r) {
        const float* const row = score + r * stride;
        const auto limit = V::set(least[r]);
        for (int64_t j = 0; j < count; j += WIDTH) {
            uint32_t set = 0;
#pragma GCC unroll 4
            for (int i = 0; i < WIDTH; i += LANES) set |= V::not_below(V::load(row + j + i), limit) << i;
            if (count - j < WIDTH) set &= (1u << (count - j)) - 1;
            through[full] = {static_cast<int32_t>(r), static_cast<int32_t>(j), set};
            full += set != 0;
            if (full < ROOM) continue;
            found += write_hits<V>(through, full, score, stride, hits + found);
            full = 0;
        }
    }
    return found + write_hits<V>(through, full, score, stride, hits + found);
}

template <class V>
void vector_add_rows(const float* rows, int64_t stride, const int32_t* index, int64_t count, int64_t n,
                     double* out) {
    constexpr int LANES = V::LANES / 2, PARTS = 8;
    using Wide = typename V::Wide;
    int64_t j = 0;
    for (; j + PARTS * LANES <= n; j += PARTS * LANES) {
        Wide sum[PARTS];
        __builtin_memcpy(sum, out + j, sizeof sum);
        for (int64_t t = 0; t < count; ++t) {
            const float* row = rows + index[t] * stride + j;
            const float* const soon = rows + index[t + AHEAD_ROWS] * stride + j;
#pragma GCC unroll 8
            for (int part = 0; part < PARTS; ++part) {
                if (part * LANES % 16 == 0) __builtin_prefetch(soon + part * LANES);
                sum[part] = V::add_widened(sum[part], row + part * LANES);
            }
        }
        __builtin_memcpy(out + j, sum, sizeof sum);
    }
    for (int64_t t = 0; t < count; ++t) {
        for (int64_t i = j; i < n; ++i) out[i] += static_cast<double>(rows[index[t] * stride + i]);
    }
}

template <class V>
void vector_add_scaled(const float* x, float factor, int64_t n, float* out) {
    const auto by = V::set(factor);
    int64_t j = 0;
    for (; j + V::LANES <= n; j += V::LANES)
        V::store(V::multiply_add(by, V::load(x + j), V::load(out + j)), out + j);
    for (; j < n; ++j) out[j] += factor * x[j];
}

template <class V>
void vector_combine(const float* rows, int64_t stride, const int32_t* index, const float* weight,
                    int64_t count, int64_t n, float* out) {
    constexpr int LANES = V::LANES, PARTS = 4;
    int64_t j = 0;
    for (; j + PARTS * LANES <= n; j += PARTS * LANES) {
        typename V::Float sum[PARTS];
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; ++part) sum[part] = V::set(0);
        for (int64_t t = 0; t < count; ++t) {
            const float* row = rows + index[t] * stride + j;
            const auto by = V::set(weight[t]);
#pragma GCC unroll 4
            for (int part = 0; part < PARTS; ++part) {
                sum[part] = V::multiply_add(by, V::load(row + part * LANES), sum[part]);
            }
        }
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; ++part) V::store(sum[part], out + j + part * LANES);
    }
    for (; j + LANES <= n; j += LANES) {
        auto sum = V::set(0);
        for (int64_t t = 0; t < count; ++t) {
            sum = V::multiply_add(V::set(weight[t]), V::load(rows + index[t] * stride + j), sum);
        }
        V::store(sum, out + j);
    }
    for (; j < n; ++j) {
        float sum = 0;
        for (int64_t t = 0; t < count; ++t) sum += weight[t] * rows[index[t] * stride + j];
        out[j] = sum;
    }
}

template <class V>
constexpr Lines vector_lines = {
    vector_sq_distance<V>, vector_sq_distances<V>, vector_rough_sq_distances<V>,
    vector_dot<V>,         vector_scaled_dots<V>,  vector_dots<V>,
    vector_highest<V>,     vector_not_below<V>,    vector_add_rows<V>,
    vector_add_scaled<V>,  vector_combine<V>,
};

}  // namespace dinofast
