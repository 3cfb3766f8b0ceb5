// How near the rows of each group of a packed bank may be to each query.
#pragma once

#include <algorithm>
#include <cmath>

#include "packed_bank.h"

namespace dinofast {

class GroupBounds {
  public:
    GroupBounds(const Measure& measure, const PackedBank& bank, int64_t queries)
        : measure_(measure),
          bank_(bank),
          d_(measure.d),
          gamma_(product_error(measure.d)),
          to_group_(allocate<float>(queries * bank.groups)) {
        pack();
    }

    // Hits that `find` needs; and d + Tile::rows * padded_depth(d) floats.
    static constexpr int64_t COLUMNS_AT_A_TIME = 128;  // whole panels of any tile
    static constexpr int64_t HITS = MAX_ROWS * COLUMNS_AT_A_TIME;

    // For the queries of float32 tile t: at least how far each centroid is, and which is nearest. Prepared
    // rows (count, D) and their squared norms from the center.
    void find(int64_t t, int64_t count, const float* prepared, const double* sq_norm, int64_t* nearest,
              Hit* hits, float* buffer) {
        const Tile& tile = measure_.tile;
        const int64_t groups = bank_.groups, first = t * tile.rows;
        float threshold[MAX_ROWS];
        std::fill(threshold, threshold + MAX_ROWS, -INFINITY);
        float* const packed = buffer + d_;
        std::fill(packed, packed + tile.rows * padded_depth(d_), 0.0f);
        for (int64_t r = 0; r < std::min<int64_t>(tile.rows, count - first); ++r) {
            subtract(prepared + (first + r) * d_, bank_.center, d_, buffer);
            for (int64_t k = 0; k < d_; ++k) {
                packed[k / DEPTH * DEPTH * tile.rows + r * DEPTH + k % DEPTH] = buffer[k];
            }
        }
        for (int64_t c = 0; c < groups; c += COLUMNS_AT_A_TIME) {
            const int64_t columns = std::min(COLUMNS_AT_A_TIME, groups - c);
            const int64_t found =
                tile.sieve(packed, panels_.get() + c * d_, columns, d_, half_.get() + c, threshold, hits);
            for (int64_t h = 0; h < found; ++h) {
                const int64_t q = first + hits[h].row, g = c + hits[h].column;
                if (q >= count) continue;
                const double own = sq_norm[q], square = own - 2.0 * hits[h].score;
                const double least = square - 1.01 * gamma_ * (own - 2.0 * half_[g]) - TINY;
                to_group_[q * groups + g] = least > 0 ? static_cast<float>(std::sqrt(least)) : 0;  // NaN: 0
            }
        }
        for (int64_t q = first; q < std::min(first + tile.rows, count); ++q) {
            const float* to_group = to_group_.get() + q * groups;
            nearest[q] = std::min_element(to_group, to_group + groups) - to_group;
        }
    }

    // The best score that query q, of squared norm `own`, may have in each group: out[g * stride].
    void best(int64_t q, double own, int64_t stride, float* out) const {
        const float* to_group = to_group_.get() + q * bank_.groups;
        for (int64_t g = 0; g < bank_.groups; ++g) {
            const double far = to_group[g], gap = std::max(far - bank_.radius[g], 0.0);
            const double score = (own - gap * gap) / 2 + 1e-6 * (own + far * far) + TINY;
            out[g * stride] = std::abs(score) < 1e38 ? static_cast<float>(score) : INFINITY;
        }
    }

  private:
    // Pack centroids - center for the float32 tile.
    void pack() {
        const Tile& tile = measure_.tile;
        const int64_t groups = bank_.groups, width = tile.columns, stride = padded_depth(d_);
        const int64_t columns = round_up(groups, width);
        panels_ = allocate<float>(columns * d_);
        half_ = allocate<float>(columns);
        const Array<float> rows = allocate<float>(width * stride);
        for (int64_t c = 0; c < columns; c += width) {
            std::fill(rows.get(), rows.get() + width * stride, 0.0f);
            for (int64_t i = c; i < c + width; ++i) {
                float* const row = rows.get() + (i - c) * stride;
                if (i < groups) subtract(bank_.centroids + i * d_, bank_.center, d_, row);
                half_[i] = static_cast<float>(-measure_.sq_norm(row) / 2);
            }
            interleave(tile, rows.get(), d_, panels_.get() + c * d_);
        }
    }

    const Measure& measure_;
    const PackedBank& bank_;
    const int64_t d_;
    const float gamma_;
    Array<float> to_group_, panels_, half_;
};

}  // namespace dinofast
