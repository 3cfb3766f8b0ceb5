#include "packed_bank.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>

#include "int8_tile.h"
#include "memory.h"
#include "threads.h"

namespace dinofast {
namespace {

constexpr double HUGE_SQUARE = 0x1p120;

}  // namespace

Quantized quantize(const float* x, int64_t d, int8_t* codes) {
    float peak = 0;
    double norm = 0;
    for (int64_t k = 0; k < d; ++k) {
        peak = std::max(peak, std::abs(x[k]));
        norm += static_cast<double>(x[k]) * x[k];
    }
    const bool usable = peak > 1e-30f && peak < 1e30f;
    const float scale = usable ? peak / 127 : 0, inverse = usable ? 127 / peak : 0;
    double rest = 0;
    int32_t sum = 0;
    for (int64_t k = 0; k < d; ++k) {
        const int code = usable ? static_cast<int>(x[k] * inverse + (x[k] < 0 ? -0.5f : 0.5f)) : 0;
        const double left = x[k] - static_cast<double>(scale) * code;
        codes[k] = static_cast<int8_t>(code);
        sum += code;
        rest += left * left;
    }
    constexpr double UP = 1 + 1e-6;
    return {scale, static_cast<float>(UP * std::sqrt(rest)), static_cast<float>(UP * std::sqrt(norm)), sum};
}

float quantization_error(float norm, float rest, float weight, float gamma) {
    const double n = norm + rest, r = rest, w = weight;
    return static_cast<float>(1.00001 * ((w * n * n + r * r / w) / 2 + gamma * n * n / 2)) + TINY;
}

void quantize_bank(const Tile& tile, const PackedBank& bank, Metric metric, int threads) {
    constexpr int64_t COLUMNS = Int8Tile::COLUMNS;
    const int64_t d = bank.rows.rows.d, panels = bank.columns / COLUMNS, bytes = quads(d) * 4;
    const Array<float> scratch = allocate<float>((2 * d + 16) * threads),
                       rest = allocate<float>(bank.columns);
    const Array<float> origin = allocate<float>(d);
    std::fill(origin.get(), origin.get() + d, 0.0f);
    float* const norm = bank.error;
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* const row = scratch.get() + (2 * d + 16) * thread_number();
        int8_t* const codes = reinterpret_cast<int8_t*>(row + d);
        for (int64_t p; (p = next.fetch_add(1)) < panels;) {
            uint8_t* const out = bank.codes + p * COLUMNS * bytes;
            std::memset(out, 128, static_cast<size_t>(COLUMNS * bytes));
            for (int64_t c = 0; c < COLUMNS; ++c) {
                const int64_t column = p * COLUMNS + c, i = bank.index[column];
                bank.scale[column] = rest[column] = norm[column] = 0;
                bank.bias[column] = -INFINITY;
                if (i < 0) continue;
                const float* y = bank.rows.rows.get(i, row);
                const bool zero = metric == Metric::cosine && tile.lines.sq_distance(y, origin.get(), d) == 0;
                subtract(y, bank.center, d, row);
                const double square = tile.lines.sq_distance(row, origin.get(), d);
                const Quantized found = quantize(row, d, codes);
                for (int64_t k = 0; k < d; ++k) {
                    out[(k / 4 * COLUMNS + c) * 4 + k % 4] = static_cast<uint8_t>(codes[k] + 128);
                }
                bank.scale[column] = found.scale;
                rest[column] = found.rest;
                norm[column] = found.norm;
                const double bias = -square / 2 - (zero ? 0.5 : 0);
                bank.bias[column] = square < HUGE_SQUARE ? static_cast<float>(bias) : INFINITY;
            }
        }
    }
    const double rests = std::accumulate(rest.get(), rest.get() + bank.columns, 0.0);
    const double norms = std::accumulate(norm, norm + bank.columns, 0.0);
    const double weight = rests / norms;
    *bank.weight = weight > 1e-4 && weight < 1 ? static_cast<float>(weight) : weight < 1 ? 1e-4f : 0.01f;
    const float gamma = product_error(d);
    for (int64_t c = 0; c < bank.columns; ++c) {
        const bool huge = !(bank.bias[c] < INFINITY);
        bank.error[c] = huge ? INFINITY : quantization_error(norm[c], rest[c], *bank.weight, gamma);
        bank.bias[c] += bank.error[c];
    }
}

}  // namespace dinofast
