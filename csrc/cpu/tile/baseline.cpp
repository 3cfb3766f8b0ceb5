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

}  // namespace

const Tile baseline_tile = {"baseline", ROWS, COLUMNS, normalize, best};

}  // namespace dinofast
