// The definition, in plain C++; what every other file in this folder computes faster.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "../mixture_tile.h"
#include "../tile.h"

namespace dinofast {
namespace {

constexpr int ROWS = 4, COLUMNS = 8;

bool normalize(const float* x, int64_t d, float* out, int64_t stride) {
    double sum = 0;
    for (int64_t k = 0; k < d; ++k) sum += static_cast<double>(x[k]) * x[k];
    if (!std::isfinite(sum)) return false;
    const double scale = sum == 0 ? 0 : 1 / std::sqrt(sum);
    for (int64_t k = 0; k < d; ++k) {
        out[k / DEPTH * stride + k % DEPTH] = static_cast<float>(x[k] * scale);
    }
    return true;
}

void add_products(const float* tile, const float* b, int64_t d, float (&product)[ROWS][COLUMNS]) {
    for (int64_t start = 0; start < d; start += CHUNK) {
        float sum[ROWS][COLUMNS] = {};
        for (int64_t k = start; k < std::min(start + CHUNK, d); ++k, b += COLUMNS) {
            const float* a = tile + k / DEPTH * DEPTH * ROWS + k % DEPTH;
            for (int r = 0; r < ROWS; ++r) {
                for (int c = 0; c < COLUMNS; ++c) sum[r][c] += a[r * DEPTH] * b[c];
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            for (int c = 0; c < COLUMNS; ++c) product[r][c] += sum[r][c];
        }
    }
}

void write_products(const float* tile, const float* panels, int64_t columns, int64_t d, const float* bias,
                    float* out, int64_t stride, const char*, int64_t) {
    for (int64_t column = 0; column < columns; column += COLUMNS) {
        float product[ROWS][COLUMNS] = {};
        add_products(tile, panels + column * d, d, product);
        for (int r = 0; r < ROWS; ++r) {
            for (int c = 0; c < COLUMNS; ++c) out[r * stride + column + c] = product[r][c] + bias[column + c];
        }
    }
}

int64_t sieve(const float* tile, const float* panels, int64_t columns, int64_t d, const float* bias,
              const float* threshold, Hit* hits) {
    int64_t found = 0;
    for (int64_t column = 0; column < columns; column += COLUMNS) {
        float product[ROWS][COLUMNS] = {};
        add_products(tile, panels + column * d, d, product);
        for (int r = 0; r < ROWS; ++r) {
            for (int c = 0; c < COLUMNS && column + c < columns; ++c) {
                const float score = product[r][c] + bias[column + c];
                if (!(score < threshold[r])) hits[found++] = {r, static_cast<int32_t>(column + c), score};
            }
        }
    }
    return found;
}

constexpr int SUMS = 16;

double sq_distance(const float* x, const float* y, int64_t d) {
    double sums[SUMS] = {};
    int64_t k = 0;
    for (; k + SUMS <= d; k += SUMS) {
        for (int i = 0; i < SUMS; ++i) {
            const double gap = x[k + i] - y[k + i];
            sums[i] += gap * gap;
        }
    }
    for (int i = 0; k + i < d; ++i) {
        const double gap = x[k + i] - y[k + i];
        sums[i] += gap * gap;
    }
    for (int half = SUMS / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    return sums[0];
}

void sq_distances(const float* const* x, const float* const* y, int64_t count, int64_t d, double* out) {
    for (int64_t p = 0; p < count; ++p) out[p] = sq_distance(x[p], y[p], d);
}

void rough_sq_distances(const float* x, const float* const y[4], int64_t d, float out[4]) {
    for (int which = 0; which < 4; ++which) {
        const float* const z = y[which];
        float sums[SUMS] = {};
        int64_t k = 0;
        for (; k + SUMS <= d; k += SUMS) {
            for (int i = 0; i < SUMS; ++i) sums[i] += (x[k + i] - z[k + i]) * (x[k + i] - z[k + i]);
        }
        for (; k < d; ++k) sums[0] += (x[k] - z[k]) * (x[k] - z[k]);
        out[which] = 0;
        for (float part : sums) out[which] += part;
    }
}

float dot(const float* x, const float* y, int64_t d) {
    float sums[SUMS] = {};
    for (int64_t k = 0; k < d; k += SUMS) {
        for (int i = 0; i < SUMS; ++i) sums[i] += x[k + i] * y[k + i];
    }
    float sum = 0;
    for (float part : sums) sum += part;
    return sum;
}

void scaled_dots(const float* const* x, const float* factor, const float* const* y, int64_t count, int64_t d,
                 float* out) {
    for (int64_t p = 0; p < count; ++p) {
        float sums[SUMS] = {};
        for (int64_t k = 0; k < d; k += SUMS) {
            for (int i = 0; i < SUMS; ++i) sums[i] += x[p][k + i] * factor[p] * y[p][k + i];
        }
        out[p] = 0;
        for (float part : sums) out[p] += part;
    }
}

void dots(const float* const* x, int64_t count, const float* const y[4], int64_t d, float* out,
          int64_t stride) {
    for (int64_t r = 0; r < count; ++r) {
        for (int i = 0; i < 4; ++i) out[r * stride + i] = dot(x[r], y[i], d);
    }
}

void highest(const float* score, int64_t stride, int64_t rows, int64_t count, float* best, int32_t* column) {
    for (int64_t r = 0; r < rows; ++r, score += stride) {
        best[r] = -INFINITY;
        for (int64_t j = 0; j < count; ++j) best[r] = std::max(best[r], score[j]);  // no NaN
        column[r] = -1;
        for (int64_t j = 0; j < count && column[r] < 0 && best[r] > -INFINITY; ++j) {
            if (score[j] == best[r]) column[r] = static_cast<int32_t>(j);
        }
    }
}

int64_t not_below(const float* score, int64_t stride, int64_t rows, int64_t count, const float* least,
                  Hit* hits) {
    int64_t found = 0;
    for (int64_t r = 0; r < rows; ++r, score += stride) {
        for (int64_t j = 0; j < count; ++j) {
            if (!(score[j] < least[r])) {
                hits[found++] = {static_cast<int32_t>(r), static_cast<int32_t>(j), score[j]};
            }
        }
    }
    return found;
}

void add_rows(const float* rows, int64_t stride, const int32_t* index, int64_t count, int64_t n,
              double* out) {
    for (int64_t t = 0; t < count; ++t) {
        for (int64_t j = 0; j < n; ++j) out[j] += static_cast<double>(rows[index[t] * stride + j]);
    }
}

void add_scaled(const float* x, float factor, int64_t n, float* out) {
    for (int64_t j = 0; j < n; ++j) out[j] += factor * x[j];
}

void combine(const float* rows, int64_t stride, const int32_t* index, const float* weight, int64_t count,
             int64_t n, float* out) {
    for (int64_t start = 0; start < n; start += SUMS) {
        float sums[SUMS] = {};
        const int64_t width = std::min<int64_t>(SUMS, n - start);
        for (int64_t t = 0; t < count; ++t) {
            const float* row = rows + index[t] * stride + start;
            if (width == SUMS) {
                for (int i = 0; i < SUMS; ++i) sums[i] += weight[t] * row[i];
            } else {
                for (int i = 0; i < width; ++i) sums[i] += weight[t] * row[i];
            }
        }
        std::copy(sums, sums + width, out + start);
    }
}

void spread(const float* panel, const float* y, int64_t depth, float* sums) {
    float sum[ROWS][COLUMNS] = {};
    for (int64_t i = 0; i < depth; ++i, panel += 2 * ROWS, y += COLUMNS) {
        for (int r = 0; r < ROWS; ++r) {
            for (int c = 0; c < COLUMNS; ++c) {
                const float a = y[c] + panel[r];
                sum[r][c] += a * panel[ROWS + r] * a;
            }
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int c = 0; c < COLUMNS; ++c) sums[r * COLUMNS + c] += sum[r][c];
    }
}

void spread_exactly(const float* panel, const float* y, int64_t depth, float* sums, float* lost) {
    for (int64_t start = 0; start < depth; start += RUN, panel += 2 * ROWS * RUN, y += COLUMNS * RUN) {
        float sum[ROWS * COLUMNS] = {};
        spread(panel, y, std::min<int64_t>(RUN, depth - start), sum);
        for (int i = 0; i < ROWS * COLUMNS; ++i) {
            const float before = sums[i], after = before + sum[i], added = after - before;
            sums[i] = after;
            lost[i] += (before - (after - added)) + (sum[i] - added);
        }
    }
}

void factored(const float* panel, const float* y, int64_t depth, float* sums) {
    float sum[ROWS][COLUMNS] = {};
    for (int64_t i = 0; i < depth; ++i, panel += 1 + ROWS, y += COLUMNS) {
        for (int r = 0; r < ROWS; ++r) {
            for (int c = 0; c < COLUMNS; ++c) sum[r][c] += (y[c] + panel[0]) * panel[1 + r];
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int c = 0; c < COLUMNS; ++c) sums[c] += sum[r][c] * sum[r][c];
    }
}

void choose(const float* sums, const float* upper, int64_t count, float half, int32_t* at) {
    float top[COLUMNS];
    std::fill(top, top + COLUMNS, -INFINITY);
    std::fill(at, at + COLUMNS, -1);
    for (int64_t k = 0; k < count; ++k, sums += COLUMNS) {
        for (int c = 0; c < COLUMNS; ++c) {
            const float bound = upper[k] - half * sums[c];
            at[c] = bound > top[c] ? static_cast<int32_t>(k) : at[c];
            top[c] = bound > top[c] ? bound : top[c];
        }
    }
}

int64_t survive(const float* sums, const float* upper, const float* slack, int64_t count, float half,
                float growth, const float* norm, const float* floor, uint32_t* alive, int64_t* grown) {
    int64_t total = 0, grown_total = 0;
    for (int64_t k = 0; k < count; ++k, sums += COLUMNS) {
        alive[k] = 0;
        for (int c = 0; c < COLUMNS; ++c) {
            const float sum = sums[c] > FLT_MAX ? FLT_MAX : sums[c];
            const float limit = upper[k] + slack[k] * norm[c] - floor[c];
            const bool lives = !(half * sum > limit);
            alive[k] |= static_cast<uint32_t>(lives) << c;
            total += lives;
            grown_total += !(half * growth * sum > limit);
        }
    }
    *grown = grown_total;
    return total;
}

void weigh(const float* y, int64_t stride, const int32_t* rows, const float* weights, int64_t count,
           bool square, float* sums) {
    float sum[ROWS][COLUMNS] = {};
    for (int64_t n = 0; n < count; ++n, weights += ROWS) {
        const float* row = y + rows[n] * stride;
        for (int r = 0; r < ROWS; ++r) {
            for (int c = 0; c < COLUMNS; ++c) sum[r][c] += weights[r] * (square ? row[c] * row[c] : row[c]);
        }
    }
    std::copy(sum[0], sum[0] + ROWS * COLUMNS, sums);
}

double distance(const float* x, const float* mean, const float* precision, int64_t d) {
    double sum = 0;
    for (int64_t i = 0; i < d; ++i) {
        const double a = static_cast<double>(x[i]) - mean[i];
        sum += a * a * precision[i];
    }
    return sum;
}

double dot_widened(const float* x, const double* y, int64_t d) {
    double sum = 0;
    for (int64_t i = 0; i < d; ++i) sum += x[i] * y[i];
    return sum;
}

void eliminate(double* factor, int64_t stride, int64_t i, int64_t j, const double* inverse) {
    constexpr int WIDTH = COLUMNS / 2;
    double sum[ROWS][WIDTH] = {};
    for (int64_t n = 0; n < i; ++n) {
        const double* row = factor + n * stride;
        for (int r = 0; r < ROWS; ++r) {
            for (int c = 0; c < WIDTH; ++c) sum[r][c] += row[i + r] * row[j + c];
        }
    }
    double* block = factor + i * stride;
    for (int r = 0; r < ROWS; ++r) {
        for (int c = 0; c < WIDTH; ++c) {
            double rest = block[r * stride + j + c] - sum[r][c];
            if (inverse != nullptr) {
                for (int q = 0; q < r; ++q) rest -= block[q * stride + i + r] * block[q * stride + j + c];
                rest *= inverse[r];
            }
            block[r * stride + j + c] = rest;
        }
    }
}

constexpr MixtureTile mixture = {ROWS,    COLUMNS, spread,   spread_exactly, factored, choose,
                                 survive, weigh,   distance, dot_widened,    eliminate};

}  // namespace

const Tile baseline_tile = {"baseline",
                            ROWS,
                            COLUMNS,
                            normalize,
                            write_products,
                            sieve,
                            {sq_distance, sq_distances, rough_sq_distances, dot, scaled_dots, dots, highest,
                             not_below, add_rows, add_scaled, combine},
                            &mixture};

}  // namespace dinofast
