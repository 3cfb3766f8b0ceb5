#include "upsample_blur.h"

#include <algorithm>
#include <memory>

namespace dinofast {
namespace {

constexpr int64_t SMALL = 1 << 18;  // pixels below which waking a sleeping thread costs more than it saves

}  // namespace

void upsample_blur(const Lines& lines, const float* maps, int64_t batch, const Weights& rows,
                   const Weights& columns, int64_t h, int64_t width, float* out, int threads) {
    const int64_t w = columns.count, height = rows.count;
    if (batch * height * width <= SMALL) threads = 1;
    const std::unique_ptr<float[]> wide(new float[2 * h * width]);  // (h, W) of two maps in turn

#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < batch; ++b) {
        float* const current = wide.get() + b % 2 * h * width;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < h; ++r) {
            float* const row = current + r * width;
            std::fill(row, row + width, 0.0f);
            for (int64_t c = 0; c < w; ++c) {
                const int32_t first = columns.start[c], count = columns.start[c + 1] - first;
                if (count == 0) continue;
                lines.add_scaled(columns.weight + first, maps[(b * h + r) * w + c], count,
                                 row + columns.index[first]);
            }
        }
#pragma omp for schedule(static) nowait
        for (int64_t y = 0; y < height; ++y) {
            const int32_t first = rows.start[y];
            lines.combine(current, width, rows.index + first, rows.weight + first, rows.start[y + 1] - first,
                          width, out + (b * height + y) * width);
        }
    }
}

}  // namespace dinofast
