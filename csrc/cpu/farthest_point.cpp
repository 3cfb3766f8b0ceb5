#include "farthest_point.h"

#include <algorithm>
#include <cmath>
#include <memory>

namespace dinofast {
namespace {

constexpr int64_t SMALL = 1 << 16;  // elements below which waking threads costs more than it saves

// A row and its value; NaN before all, then the largest, then the first.
struct Farthest {
    float value;
    int64_t index;

    void consider(float other, int64_t at) {
        const bool nan = std::isnan(other), was_nan = std::isnan(value);
        const bool same = nan ? was_nan : other == value;
        if (same ? at < index : nan || other > value) *this = {other, at};
    }
};

}  // namespace

int64_t farthest_point(const Tile& tile, const Rows& rows, const float* min_distance, int64_t center,
                       float* nearest, int threads) {
    const int64_t n = rows.count, d = rows.d;
    if (n * d <= SMALL) threads = 1;
    const std::unique_ptr<float[]> buffers(new float[(threads + 1) * d]);
    const float* const target = rows.get(center, buffers.get());
    Farthest farthest{-INFINITY, n};

#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; ++part) {
        float* const buffer = buffers.get() + (part + 1) * d;
        Farthest mine{-INFINITY, n};
        for (int64_t i = n * part / threads; i < n * (part + 1) / threads; ++i) {
            const float distance =
                static_cast<float>(std::sqrt(tile.lines.sq_distance(rows.get(i, buffer), target, d)));
            const float old = min_distance[i];
            nearest[i] = std::isnan(distance) || distance < old ? distance : old;
            mine.consider(nearest[i], i);
        }
#pragma omp critical
        farthest.consider(mine.value, mine.index);
    }
    return farthest.index;
}

}  // namespace dinofast
