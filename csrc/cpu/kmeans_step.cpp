#include "kmeans_step.h"

#include <algorithm>

#include "memory.h"
#include "nearest.h"
#include "threads.h"

namespace dinofast {
namespace {

constexpr int64_t SLICE = 64;  // channels that one thread adds up: whole cache lines

}  // namespace

void kmeans_step(const Tile& tile, const Int8Tile& int8, const Rows& rows, const Rows& centers, int64_t* index,
                 float* sq_distance, float* sums, int64_t* counts, int threads) {
    const int64_t k = centers.count, d = rows.d, slices = (d + SLICE - 1) / SLICE;
    const Array<double> total = allocate<double>(k * d);
    const Array<float> buffers = allocate<float>(d * threads);
    std::fill(total.get(), total.get() + k * d, 0.0);
    std::fill(counts, counts + k, 0);

    const auto add = [&](int64_t first, int64_t last) {
        float* const buffer = buffers.get() + d * thread_number();
#pragma omp for schedule(static)
        for (int64_t slice = 0; slice < slices; ++slice) {
            const int64_t begin = slice * SLICE, count = std::min(SLICE, d - begin);
            const Rows part = rows.channels(begin, count);
            for (int64_t i = first; i < last; ++i) {
                if (index[i] < 0) continue;
                tile.lines.add(part.get(i, buffer), count, total.get() + index[i] * d + begin);
                if (slice == 0) ++counts[index[i]];
            }
        }
    };
    Nearest(tile, int8, Value::sq_distance, rows, centers, threads).run(sq_distance, index, add);
    std::transform(total.get(), total.get() + k * d, sums, [](double x) { return static_cast<float>(x); });
}

}  // namespace dinofast
