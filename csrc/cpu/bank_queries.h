// Queries of a packed bank as its measure wants them, and the order in which they are searched.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>

#include "packed_bank.h"

namespace dinofast {

class BankQueries {
  public:
    enum class Kind : uint8_t {
        usual,
        zero,
        broken
    };  // zero: of no direction, for cosine; broken: NaN or inf

    BankQueries(const Measure& measure, const float* center, int64_t count)
        : measure_(measure),
          center_(center),
          own_(allocate<float>(count * measure.d)),
          prepared_(allocate<const float*>(count)),
          sq_norm_(allocate<double>(count)),
          kind_(allocate<Kind>(count)),
          nearest_(allocate<int64_t>(count)),
          order_(allocate<int64_t>(count)) {}

    // Prepare query q from row i, in place where it is what the measure wants: that takes no memory.
    void prepare(const Rows& rows, int64_t i, int64_t q) {
        const int64_t d = measure_.d;
        float* const own = own_.get() + q * d;
        const float* row = rows.get(i, own);
        const bool cosine = measure_.metric == Metric::cosine;
        const double square = measure_.sq_norm(row), scale = cosine ? Measure::unit_scale(square) : 1;
        kind_[q] = !std::isfinite(square) ? Kind::broken : cosine && square == 0 ? Kind::zero : Kind::usual;
        nearest_[q] = 0;
        if (kind_[q] == Kind::broken) {
            std::fill(own, own + d, 0.0f);
            row = own;
        } else if (scale != 1) {
            for (int64_t k = 0; k < d; ++k) own[k] = static_cast<float>(row[k] * scale);
            row = own;
        }
        prepared_[q] = row;
        sq_norm_[q] = kind_[q] == Kind::broken ? 0 : measure_.tile.lines.sq_distance(row, center_, d);
    }

    // Put `count` queries in the order of their nearest groups.
    void sort(int64_t count) {
        std::iota(order_.get(), order_.get() + count, int64_t{0});
        std::stable_sort(order_.get(), order_.get() + count,
                         [this](int64_t a, int64_t b) { return nearest_[a] < nearest_[b]; });
    }

    const float* const* rows() const { return prepared_.get(); }
    const double* sq_norms() const { return sq_norm_.get(); }  // from the center
    int64_t* nearest() { return nearest_.get(); }              // group of each
    Kind kind(int64_t q) const { return kind_[q]; }
    int64_t at(int64_t i) const { return order_[i]; }  // the query at a place in the order

  private:
    const Measure& measure_;
    const float* const center_;
    Array<float> own_;
    Array<const float*> prepared_;
    Array<double> sq_norm_;
    Array<Kind> kind_;
    Array<int64_t> nearest_, order_;
};

}  // namespace dinofast
