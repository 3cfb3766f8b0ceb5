#include "few_cosines.h"

#include <algorithm>
#include <cmath>

#include "memory.h"
#include "threads.h"

namespace dinofast {
namespace {

constexpr int64_t SMALL = 1 << 17;             // elements below which waking threads costs more than it saves
constexpr int64_t ROWS = 12;                   // rows that one thread takes at a time
constexpr float LEAST = 1e-20f, MOST = 1e20f;  // squares of norms that lose nothing in float32

class FewCosines {
  public:
    FewCosines(const Tile& tile, const Rows& rows, const Rows& columns)
        : tile_(tile),
          rows_(rows),
          d_(rows.d),
          padded_(padded_depth(rows.d)),
          count_(columns.count),
          units_(allocate<float>(columns.count * padded_)) {
        const Array<float> buffer = allocate<float>(d_);
        for (int64_t c = 0; c < count_; ++c) {
            float* const unit = units_.get() + c * padded_;
            whole_ = whole_ && tile.normalize(columns.get(c, buffer.get()), d_, unit, DEPTH);
            std::fill(unit + d_, unit + padded_, 0.0f);
        }
    }

    bool whole() const { return whole_; }

    // Decide at most ROWS rows; the buffer holds (ROWS + 1) padded rows.
    void decide(int64_t first, int64_t count, float* buffer, float* value, int64_t* index) const {
        const float* x[ROWS];
        float scale[ROWS], score[ROWS * FEW_COSINES];
        for (int64_t r = 0; r < count; ++r)
            x[r] = read(first + r, buffer, buffer + (r + 1) * padded_, scale[r]);
        for (int64_t c = 0; c < count_; c += 4) {
            const float* four[4];
            for (int64_t i = 0; i < 4; ++i) four[i] = units_.get() + std::min(c + i, count_ - 1) * padded_;
            tile_.lines.dots(x, count, four, d_, score + c, FEW_COSINES);
        }
        for (int64_t r = 0; r < count; ++r) {
            float best = -INFINITY;
            int64_t at = 0;
            for (int64_t c = 0; c < count_; ++c) {
                const float own = std::clamp(score[r * FEW_COSINES + c] * scale[r], -1.0f, 1.0f);
                if (!(own > best)) continue;
                best = own;
                at = c;
            }
            value[first + r] = std::isnan(scale[r]) ? NAN : best;
            index[first + r] = at;
        }
    }

  private:
    // Row i, readable to a multiple of 16, and the factor that its products need.
    const float* read(int64_t i, float* converted, float* own, float& scale) const {
        const float* x = rows_.get(i, converted);
        if (rows_.element != Element::float32 || d_ % 16 != 0) {
            std::copy(x, x + d_, own);
            std::fill(own + d_, own + padded_, 0.0f);
            x = own;
        }
        const float square = tile_.lines.dot(x, x, d_);
        scale = 1 / std::sqrt(square);
        if (square > LEAST && square < MOST) return x;
        float* const unit = converted;
        scale = tile_.normalize(x, d_, unit, DEPTH) ? 1.0f : NAN;
        if (std::isnan(scale)) return x;
        std::copy(unit, unit + d_, own);
        std::fill(own + d_, own + padded_, 0.0f);
        return own;
    }

    const Tile& tile_;
    const Rows rows_;
    const int64_t d_, padded_, count_;
    Array<float> units_;
    bool whole_ = true;
};

}  // namespace

void few_cosines(const Tile& tile, const Rows& rows, const Rows& columns, float* value, int64_t* index,
                 int threads) {
    const FewCosines few(tile, rows, columns);
    const int64_t n = rows.count, padded = padded_depth(rows.d);
    std::fill(index, index + n, 0);
    if (!few.whole()) {
        std::fill(value, value + n, NAN);
        return;
    }
    if (n * rows.d <= SMALL) threads = 1;
    const int64_t size = round_up((ROWS + 1) * padded, 16);
    const Array<float> buffers = allocate<float>(size * threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < n; first += ROWS) {
        few.decide(first, std::min(ROWS, n - first), buffers.get() + size * thread_number(), value, index);
    }
}

}  // namespace dinofast
