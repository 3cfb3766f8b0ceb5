#include "kmeans_step.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "memory.h"
#include "nearest.h"
#include "threads.h"

namespace dinofast {
namespace {

constexpr int64_t SLICE = 64;  // channels that one thread adds up: whole cache lines

// A stable counting sort of the rows that have a center: those of center c end at ends[c].
void sort_by_center(const int64_t* index, int64_t count, std::vector<int64_t>& ends, int32_t* members) {
    std::fill(ends.begin(), ends.end(), 0);
    for (int64_t i = 0; i < count; ++i) {
        if (index[i] >= 0) ++ends[index[i]];
    }
    int64_t start = 0;
    for (int64_t& end : ends) start += std::exchange(end, start);
    for (int64_t i = 0; i < count; ++i) {
        if (index[i] >= 0) members[ends[index[i]]++] = static_cast<int32_t>(i);
    }
}

}  // namespace

void kmeans_step(const Tile& tile, const Int8Tile& int8, const Rows& rows, const Rows& centers,
                 int64_t* index, float* sq_distance, float* sums, int64_t* counts, int threads) {
    const int64_t k = centers.count, d = rows.d, slices = (d + SLICE - 1) / SLICE;
    const Array<double> total = allocate<double>(k * d);
    const Array<float> buffers = allocate<float>(SLICE * threads);
    std::fill(total.get(), total.get() + k * d, 0.0);
    std::fill(counts, counts + k, 0);
    const Array<int32_t> members = allocate<int32_t>(
        rows.count + AHEAD_ROWS);  // of a part, center after center, in the order of the rows
    std::vector<int64_t> ends(static_cast<size_t>(k));

    const auto add = [&](int64_t first, int64_t last) {
#pragma omp single
        {
            sort_by_center(index + first, last - first, ends, members.get());
            std::fill_n(members.get() + ends.back(), AHEAD_ROWS, 0);
            for (int64_t c = 0; c < k; ++c) counts[c] += ends[c] - (c > 0 ? ends[c - 1] : 0);
        }
#pragma omp for schedule(static)
        for (int64_t slice = 0; slice < slices; ++slice) {
            const int64_t begin = slice * SLICE, width = std::min(SLICE, d - begin);
            const Rows part = rows.channels(begin, width);
            float* const buffer = buffers.get() + SLICE * thread_number();
            for (int64_t c = 0, at = 0; c < k; at = ends[c++]) {
                double* const out = total.get() + c * d + begin;
                if (rows.element == Element::float32) {
                    tile.lines.add_rows(part.get(first, nullptr), rows.stride, members.get() + at,
                                        ends[c] - at, width, out);
                    continue;
                }
                const int32_t alone[1 + AHEAD_ROWS] = {};
                for (int64_t t = at; t < ends[c]; ++t) {
                    tile.lines.add_rows(part.get(first + members[t], buffer), 0, alone, 1, width, out);
                }
            }
        }
    };
    Nearest(tile, int8, Value::sq_distance, rows, centers, threads).run(sq_distance, index, add);
    std::transform(total.get(), total.get() + k * d, sums, [](double x) { return static_cast<float>(x); });
}

}  // namespace dinofast
