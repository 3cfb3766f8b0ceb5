// The definition, in plain C++; what every other file in this folder computes faster.
#include <algorithm>
#include <cmath>

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

void best(const float* tile, const float* panels, int64_t columns, int64_t d, int32_t first, float* value,
          int32_t* index) {
    for (int64_t column = 0; column < columns; column += COLUMNS) {
        float product[ROWS][COLUMNS] = {};
        add_products(tile, panels + column * d, d, product);
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

double sq_distance(const float* x, const float* y, int64_t d) {
    double lanes[16] = {};
    for (int64_t k = 0; k < d; k += 16) {
        const int present = d - k < 16 ? static_cast<int>(d - k) : 16;
        for (int i = 0; i < present; ++i) {
            const double v = x[k + i] - y[k + i];
            lanes[i] += v * v;
        }
    }
    return sum_of_lanes(lanes);
}

}  // namespace

const Tile baseline_tile = {"baseline", ROWS, COLUMNS, normalize, best, sieve, sq_distance};

}  // namespace dinofast
