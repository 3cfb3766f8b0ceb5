#include "cosine_map.h"

#include <memory>

#include "cosine_max.h"

namespace dinofast {

void cosine_map(const Tile& tile, const Int8Tile& int8, const Rows& features, const Rows& prototypes,
                const bool* mask, const Weights& rows, const Weights& columns, int64_t h, int64_t width,
                float* out, int threads) {
    const int64_t n = features.count;
    const std::unique_ptr<float[]> distance(new float[n]);
    const std::unique_ptr<int64_t[]> index(new int64_t[n]);
    cosine_max(tile, int8, features, prototypes, distance.get(), index.get(), threads);
    for (int64_t i = 0; i < n; ++i) {
        distance[i] = mask == nullptr || mask[i] ? 1 - distance[i] : 0.0f;
    }
    upsample_blur(tile.lines, distance.get(), n / (h * columns.count), rows, columns, h, width, out, threads);
}

}  // namespace dinofast
