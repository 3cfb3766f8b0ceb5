#include "nearest_neighbor.h"

#include <algorithm>
#include <cmath>

#include "blocking.h"
#include "nearest.h"

namespace dinofast {
namespace {

constexpr int64_t FEW_ROWS = 256;  // of either side, below which preparing them costs more than it saves
constexpr int64_t QUERIES = 8192;  // prepared at a time
constexpr float LEAST = 1e-30f, MOST = 1e38f, OPPOSITE = 3.99f;  // squared distances

// Rows as the metric wants them, float32: unit rows, or themselves.
class Prepared {
  public:
    Prepared(const Tile& tile, Metric metric, int64_t d, int64_t count, int threads)
        : tile_(tile), units_(metric == Metric::cosine), threads_(threads) {
        if (units_) copies_ = allocate<float>(count * d);
    }

    // False when there is a row with NaN, inf or zeros alone.
    bool take(const Rows& rows) {
        rows_ = rows;
        if (!units_) return true;
        if (unit_rows(tile_, rows, copies_.get(), threads_) >= 0) return false;
        rows_ = {copies_.get(), rows.count, rows.d, rows.d, Element::float32};
        for (int64_t i = 0; i < rows.count; ++i) {
            const float* const x = copies_.get() + i * rows.d;
            if (std::all_of(x, x + rows.d, [](float part) { return part == 0; })) return false;
        }
        return true;
    }

    const Rows& rows() const { return rows_; }

  private:
    const Tile& tile_;
    const bool units_;
    const int threads_;
    Array<float> copies_;
    Rows rows_{};
};

}  // namespace

bool nearest_neighbor(const Tile& tile, const Int8Tile& int8, const Rows& queries, const Rows& bank,
                      Metric metric, float* distance, int64_t* index, int threads) {
    const int64_t n = queries.count, m = bank.count, d = queries.d;
    const bool cosine = metric == Metric::cosine;
    if (int8.products == nullptr || n < FEW_ROWS || m < FEW_ROWS || metric == Metric::euclidean) return false;
    if (!cosine && queries.element != Element::float32) return false;
    const int64_t block = SHARED / d / Int8Tile::COLUMNS * Int8Tile::COLUMNS;
    const int64_t part = std::min(std::max(block, FEW_ROWS), m), chunk = std::min(n, QUERIES);
    Prepared some(tile, metric, d, chunk, threads), others(tile, metric, d, part, threads);
    const Array<float> square = allocate<float>(chunk);
    const Array<int64_t> number = allocate<int64_t>(chunk);
    for (int64_t first = 0; first < n; first += chunk) {
        if (!some.take(queries.part(first, std::min(chunk, n - first)))) return false;
        const int64_t count = some.rows().count;
        std::fill_n(distance + first, count, INFINITY);
        for (int64_t start = 0; start < m; start += part) {
            if ((first == 0 || part < m) && !others.take(bank.part(start, std::min(part, m - start)))) {
                return false;
            }
            Nearest(tile, int8, Value::sq_distance, some.rows(), others.rows(), threads)
                .run(square.get(), number.get());
            for (int64_t i = 0; i < count; ++i) {
                if (std::isnan(square[i])) return false;
                if (!(square[i] < distance[first + i])) continue;
                distance[first + i] = square[i];
                index[first + i] = start + number[i];
            }
        }
    }
    const float most = cosine ? OPPOSITE : MOST;
    for (int64_t i = 0; i < n; ++i) {
        if (!(distance[i] < most) || (distance[i] != 0 && distance[i] < LEAST)) return false;
        if (cosine) distance[i] /= 2;
    }
    return true;
}

}  // namespace dinofast
