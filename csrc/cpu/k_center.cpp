#include "k_center.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace dinofast {
namespace {

constexpr float SELECTED = -1;       // reach of a row that must not be selected again
constexpr int64_t BLOCK = 64;        // rows with one common bound
constexpr int64_t RUN = 16;          // blocks that one thread takes in a row; centers side by side in bounds_
constexpr int64_t BOUNDS = 1 << 24;  // floats in bounds_
constexpr float NEAR = 0.99f;        // below this share of the largest reach a row can wait
constexpr float ROUGH_FLOOR = 1e-30f;  // below, rounding of subnormal squares may exceed the stated error
constexpr int64_t SMALL = 1 << 20;     // elements below which waking threads costs more than it saves

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// A pivot this far from a center keeps the center out of reach: the sum, and more than rounding of the three
// distances can hide.
float out_of_reach(float reach, float pivot_distance) {
    return (reach + pivot_distance) * 1.000002f + FLT_MIN;
}

}  // namespace

KCenter::KCenter(const Tile& tile, const Rows& rows, const std::vector<int64_t>& starts, bool mean,
                 int64_t limit, int threads)
    : lines_(tile.lines),
      rows_(rows),
      starts_(starts),
      limit_(limit),
      pivots_(std::clamp<int64_t>(BOUNDS / std::max<int64_t>(limit, 1), 1, limit + starts.size())),
      rough_excess_(1 + (rows.d + 32) * 0x1p-23),
      reach_(rows.count),
      seen_(rows.count),
      pivot_(rows.count),
      pivot_distance_(rows.count),
      block_reach_(divide_up(rows.count, BLOCK)),
      bounds_(new float[divide_up(limit, RUN) * RUN * pivots_]) {
    centers_.reserve(limit);
    const int64_t count = starts_.size();
#pragma omp parallel for schedule(static) num_threads(threads) if (rows_.count * rows_.d > SMALL)
    for (int64_t i = 0; i < rows_.count; ++i) {
        double sum = 0;
        pivot_distance_[i] = INFINITY;
        for (int64_t s = 0; s < count; ++s) {
            const float gap = distance(i, starts_[s]);
            sum += gap;
            if (s < pivots_ && gap < pivot_distance_[i]) {
                pivot_distance_[i] = gap;
                pivot_[i] = static_cast<int32_t>(s);
            }
        }
        reach_[i] = static_cast<float>(sum / count);
    }
    for (size_t b = 0; b < block_reach_.size(); ++b) measure_block(b);
    if (!mean) exclude(starts_[0]);
}

float KCenter::distance(int64_t i, int64_t j) const {
    return static_cast<float>(std::sqrt(lines_.sq_distance(row(i), row(j), rows_.d)));
}

void KCenter::measure_block(int64_t block) {
    const auto begin = reach_.begin() + block * BLOCK;
    block_reach_[block] = *std::max_element(begin, std::min(begin + BLOCK, reach_.end()));
}

void KCenter::exclude(int64_t i) {
    reach_[i] = SELECTED;
    measure_block(i / BLOCK);
}

float* KCenter::bound(int64_t pivot, int64_t center) {
    return bounds_.get() + (center / RUN * pivots_ + pivot) * RUN + center % RUN;
}

// Let row i look at further centers, as long as its reach is `enough` to be the farthest.
void KCenter::settle(int64_t i, float enough) {
    const int64_t count = centers_.size(), starts = starts_.size();
    float reach = reach_[i], far = out_of_reach(reach, pivot_distance_[i]);
    double rough_far = std::max<double>(static_cast<double>(reach) * reach * rough_excess_, ROUGH_FLOOR);
    int64_t next = seen_[i];
    while (next < count && reach >= enough) {
        int64_t found[4];
        const float* near[4];
        int size = 0;
        for (; next < count && size < 4; ++next) {
            if (*bound(pivot_[i], next) >= far) continue;
            found[size] = next;
            near[size++] = row(centers_[next]);
        }
        std::fill(near + size, near + 4, row(i));
        float rough[4];
        lines_.rough_sq_distances(row(i), near, rows_.d, rough);
        for (int which = 0; which < size; ++which) {
            if (rough[which] > rough_far && rough[which] <= FLT_MAX) continue;
            const int64_t j = found[which];
            const float gap = distance(i, centers_[j]);
            if (starts + j < pivots_ && gap < pivot_distance_[i]) {
                pivot_distance_[i] = gap;
                pivot_[i] = static_cast<int32_t>(starts + j);
            }
            reach = std::min(reach, gap);
            far = out_of_reach(reach, pivot_distance_[i]);
            rough_far = std::max<double>(static_cast<double>(reach) * reach * rough_excess_, ROUGH_FLOOR);
        }
    }
    reach_[i] = reach;
    seen_[i] = static_cast<int32_t>(next);
}

// The farthest of one thread's rows, or nothing when another thread has a farther one.
KCenter::Candidate KCenter::farthest(int part, int parts) {
    const int64_t blocks = block_reach_.size();
    for (;;) {
        int64_t top = -1;
        float reach = SELECTED;
        for (int64_t run = part * RUN; run < blocks; run += parts * RUN) {
            for (int64_t b = run; b < std::min(run + RUN, blocks); ++b) {
                if (block_reach_[b] > reach) reach = block_reach_[top = b];
            }
        }
        float best = best_.load(std::memory_order_relaxed);
        if (top < 0 || reach < best) return {SELECTED, rows_.count};
        int64_t i = top * BLOCK;
        while (reach_[i] != reach) ++i;
        if (seen_[i] == static_cast<int64_t>(centers_.size())) {
            while (reach > best && !best_.compare_exchange_weak(best, reach, std::memory_order_relaxed)) {
            }
            return {reach, i};
        }
        settle(i, std::max(best, NEAR * reach));
        measure_block(top);
    }
}

// Bound the distances of one thread's pivots to a center, number `number`.
void KCenter::measure_pivots(int64_t center, int64_t number, int part, int parts) {
    const int64_t starts = starts_.size(), count = std::min(starts + number, pivots_);
    for (int64_t first = 4 * part; first < count; first += 4 * parts) {
        const int64_t size = std::min<int64_t>(4, count - first);
        const float* pivot[4];
        float rough[4];
        for (int64_t k = 0; k < 4; ++k) {
            const int64_t p = first + std::min(k, size - 1);
            pivot[k] = row(p < starts ? starts_[p] : centers_[p - starts]);
        }
        lines_.rough_sq_distances(row(center), pivot, rows_.d, rough);
        for (int64_t k = 0; k < size; ++k) {
            const bool usable = rough[k] > ROUGH_FLOOR && rough[k] <= FLT_MAX;
            *bound(first + k, number) = usable ? static_cast<float>(std::sqrt(rough[k] / rough_excess_)) : 0;
        }
    }
}

void KCenter::select(int64_t count, int64_t* index, int threads) {
    if (rows_.count * rows_.d <= SMALL) threads = 1;
    const int64_t before = centers_.size();
    found_.assign(threads, {SELECTED, rows_.count});
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#ifdef _OPENMP
        const int part = omp_get_thread_num(), parts = omp_get_num_threads();
#else
        const int part = 0, parts = 1;
#endif
        for (int64_t step = 0; step < count; ++step) {
            found_[part] = farthest(part, parts);
#pragma omp barrier
            Candidate pick = found_[0];
            for (int k = 1; k < parts; ++k) {
                const Candidate& other = found_[k];
                if (other.reach > pick.reach || (other.reach == pick.reach && other.index < pick.index)) {
                    pick = other;
                }
            }
            measure_pivots(pick.index, before + step, part, parts);
            if (part == 0) {
                index[step] = pick.index;
                centers_.push_back(pick.index);
                exclude(pick.index);
                best_ = 0;
            }
#pragma omp barrier
        }
    }
}

}  // namespace dinofast
