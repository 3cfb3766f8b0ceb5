// How near the rows of each group of a packed bank may be to each query, and the coordinates of its outline.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>

#include "packed_bank.h"

namespace dinofast {

class GroupBounds {
  public:
    GroupBounds(const Measure& measure, const PackedBank& bank, int64_t queries)
        : measure_(measure),
          bank_(bank),
          d_(measure.d),
          depth_(bank.outline.depth),
          gamma_(product_error(measure.d)),
          width_(round_up(std::max(bank.groups, depth_), measure.tile.columns)),
          best_(allocate<float>(queries * bank.groups)),
          drawn_(allocate<float>(queries * depth_)) {
        pack();
    }

    // Floats that `find` needs.
    int64_t scratch() const { return round_up(d_, 16) + measure_.tile.rows * (padded_depth(d_) + width_); }

    // For the queries of float32 tile t: the best score in each group, coordinates, the nearest centroid.
    // Prepared rows and their squared norms from the center.
    void find(int64_t t, int64_t count, const float* const* prepared, const double* sq_norm, int64_t* nearest,
              float* buffer) {
        const Tile& tile = measure_.tile;
        const int64_t groups = bank_.groups, first = t * tile.rows, last = std::min(first + tile.rows, count);
        float *const packed = buffer + round_up(d_, 16), *const found = packed + tile.rows * padded_depth(d_);
        std::fill(packed, found, 0.0f);
        for (int64_t q = first; q < last; ++q) {
            subtract(prepared[q], bank_.center, d_, buffer);
            float* const out = packed + (q - first) * DEPTH;
            for (int64_t k = 0; k < d_; k += DEPTH) {
                std::copy(buffer + k, buffer + std::min(k + DEPTH, d_), out + k * tile.rows);
            }
        }
        tile.products(packed, directions_.get(), round_up(depth_, tile.columns), d_, none_.get(), found,
                      width_, nullptr, 0);
        for (int64_t q = first; q < last; ++q) {
            std::copy_n(found + (q - first) * width_, depth_, drawn_.get() + q * depth_);
        }
        tile.products(packed, panels_.get(), round_up(groups, tile.columns), d_, half_.get(), found, width_,
                      nullptr, 0);
        for (int64_t q = first; q < last; ++q) {
            float* const row = found + (q - first) * width_;
            bound(static_cast<float>(sq_norm[q]), row, best_.get() + q * groups);
            nearest[q] = std::min_element(row, row + groups) - row;
        }
    }

    // Coordinates of query q (H,).
    const float* drawn(int64_t q) const { return drawn_.get() + q * depth_; }

    // The best score that query q may have in each group: out[g * stride].
    void best(int64_t q, int64_t stride, float* out) const {
        const float* best = best_.get() + q * bank_.groups;
        for (int64_t g = 0; g < bank_.groups; ++g) out[g * stride] = best[g];
    }

    // The score that the best `probes` groups of query q may reach; -infinity for 0, or for all of them. The
    // buffer holds G floats.
    float best_of(int64_t q, int64_t probes, float* buffer) const {
        const int64_t groups = bank_.groups;
        if (probes == 0 || probes >= groups) return -INFINITY;
        std::copy_n(best_.get() + q * groups, groups, buffer);
        std::nth_element(buffer, buffer + probes - 1, buffer + groups, std::greater<>());
        return buffer[probes - 1];
    }

  private:
    // Turn products - half a squared norm into least distances to centroids, and find the scores.
    void bound(float own, float* products, float* best) const {
        const float slack = 1.01f * gamma_ + 1e-6f;
        const float *radius = bank_.radius, *half = half_.get();
        for (int64_t g = 0; g < bank_.groups; ++g) {
            const float square = own - 2 * products[g], least = square - slack * (own - 2 * half[g]) - TINY;
            const float far = std::sqrt(std::max(0.0f, least));  // NaN: 0
            const float gap = std::max(0.0f, far - radius[g]);
            const float score = (own - gap * gap) / 2 + 1e-6f * (own + far * far) + TINY;
            products[g] = far;
            best[g] = std::abs(score) < 1e38f ? score : INFINITY;
        }
    }

    // Pack centroids - center and the directions for the float32 tile.
    void pack() {
        const Tile& tile = measure_.tile;
        const int64_t groups = bank_.groups, width = tile.columns, stride = padded_depth(d_);
        const int64_t columns = round_up(groups, width), directions = round_up(depth_, width);
        panels_ = allocate<float>(columns * d_);
        half_ = allocate<float>(columns);
        directions_ = allocate<float>(directions * d_);
        none_ = allocate<float>(directions);
        std::fill_n(none_.get(), directions, 0.0f);
        const Array<float> rows = allocate<float>(width * stride);
        for (int64_t c = 0; c < columns; c += width) {
            std::fill_n(rows.get(), width * stride, 0.0f);
            for (int64_t i = c; i < c + width; ++i) {
                float* const row = rows.get() + (i - c) * stride;
                if (i < groups) subtract(bank_.centroids + i * d_, bank_.center, d_, row);
                half_[i] = static_cast<float>(-measure_.sq_norm(row) / 2);
            }
            interleave(tile, rows.get(), d_, panels_.get() + c * d_);
        }
        for (int64_t c = 0; c < directions; c += width) {
            float* const panel = directions_.get() + c * d_;
            const int64_t present = std::min(width, depth_ - c);
            std::fill_n(panel, width * d_, 0.0f);
            for (int64_t k = 0; k < d_; ++k) {
                std::copy_n(bank_.outline.basis + k * depth_ + c, present, panel + k * width);
            }
        }
    }

    const Measure& measure_;
    const PackedBank& bank_;
    const int64_t d_, depth_;
    const float gamma_;
    const int64_t width_;
    Array<float> best_, drawn_, panels_, half_, directions_, none_;
};

}  // namespace dinofast
