// The definition, in plain C++; what every other file in this folder computes faster.
#include <algorithm>
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

void best(const float* tile, const float* panels, int64_t columns, int64_t d, int32_t first, float* value,
          int32_t* index) {
    for (int64_t column = 0; column < columns; column += COLUMNS) {
        float product[ROWS][COLUMNS] = {};
        const float* b = panels + column * d;
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
        for (int r = 0; r < ROWS; ++r) {
            for (int c = 0; c < COLUMNS && column + c < columns; ++c) {
                if (product[r][c] > value[r]) {
                    value[r] = product[r][c];
                    index[r] = first + static_cast<int32_t>(column + c);
                }
            }
        }
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

template <class T>
double dot(const T* x, const double* y, int64_t d) {
    double sum = 0;
    for (int64_t i = 0; i < d; ++i) sum += x[i] * y[i];
    return sum;
}

constexpr MixtureTile mixture = {ROWS,  COLUMNS,  spread,     spread_exactly, factored,
                                 weigh, distance, dot<float>, dot<double>};

}  // namespace

const Tile baseline_tile = {"baseline", ROWS, COLUMNS, normalize, best, &mixture};

}  // namespace dinofast
