#include "mixture.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <numeric>
#include <vector>

#include "bounds.h"

namespace dinofast {
namespace {

constexpr int64_t CROWDED = 8;  // if one of so many pairs seems to matter, all are computed at once
constexpr int64_t SPARSE = 8;   // if only one of so many pairs is left, its patches are brought together

}  // namespace

// Where things stand in a call's memory. `y` holds for every `lanes` patches channel after channel, `sums`
// for every `lanes` patches component after component.
struct Screen::Work {
    float *y, *sums, *lost, *packed;
    Pair* pairs;
    double *difference, *best, *total, *known;  // `known`: the log-probability of the candidate
    float *floor, *norm;
    int32_t *candidate, *queue;
    uint32_t* alive;  // bits, by component
    int64_t size;
};

Screen::Work Screen::place(char* scratch) const {
    const int64_t patches = Screen::patches(mixture_.full);
    int64_t used = 0;
    const auto take = [&](auto*& array, int64_t count) {
        using T = std::remove_reference_t<decltype(*array)>;
        array = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(scratch) + static_cast<uintptr_t>(used));
        used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    };
    Work work{};
    take(work.y, patches * depth_);
    take(work.sums, patches * padded_);
    take(work.lost, mixture_.full ? 0 : patches * padded_);
    take(work.packed, mixture_.full ? tile_.lanes * (depth_ + 1) : 0);
    take(work.pairs, patches * mixture_.components);
    take(work.difference, mixture_.d);
    take(work.best, patches);
    take(work.total, patches);
    take(work.known, patches);
    take(work.floor, patches);
    take(work.norm, patches);
    take(work.candidate, patches);
    take(work.queue, patches);
    take(work.alive, patches / tile_.lanes * mixture_.components);
    work.size = used;
    return work;
}

int64_t Screen::scratch() const { return place(nullptr).size; }

// Bring the channels that steps `begin` to `end` need into lanes; patches that do not count become 0.
void Screen::transpose(const Work& work, const float* y, int64_t stride, int64_t begin, int64_t end) const {
    const int64_t lanes = tile_.lanes;
    const int64_t first = mixture_.full ? 0 : begin * PIECE;
    const int64_t stop = mixture_.full ? (begin == 0 ? depth_ : 0) : std::min(end * PIECE, depth_);
    for (int64_t i = 0; i < patches(mixture_.full); ++i) {
        float* out = work.y + i / lanes * lanes * depth_ + i % lanes;
        if (work.floor[i] == INFINITY) {
            for (int64_t c = first; c < stop; ++c) out[c * lanes] = 0;
        } else {
            const float* in = y + i * stride + mixture_.d - depth_;
            for (int64_t c = first; c < stop; ++c) out[c * lanes] = in[order_[c]];
        }
    }
}

void Screen::add_step(const Work& work, int64_t step, bool exactly) const {
    const int64_t wide = tile_.components, lanes = tile_.lanes;
    for (int64_t w = 0; w < patches(mixture_.full) / lanes; ++w) {
        const float* y = work.y + w * lanes * depth_;
        float* sums = work.sums + w * lanes * padded_;
        if (!mixture_.full) {
            const int64_t start = step * PIECE, depth = std::min(PIECE, depth_ - start);
            float* lost = work.lost + w * lanes * padded_;
            for (int64_t p = 0; p < padded_ / wide; ++p) {
                const float* panel = panels_.get() + p * panel_ + start * 2 * wide;
                const int64_t at = p * wide * lanes;
                if (exactly) {
                    tile_.spread_exactly(panel, y + start * lanes, depth, sums + at, lost + at);
                } else {
                    tile_.spread(panel, y + start * lanes, depth, sums + at);
                }
            }
            continue;
        }
        const int64_t depth = std::min((step + 1) * wide, depth_), offset = offset_of(step);
        for (int64_t k = 0; k < mixture_.components; ++k) {
            tile_.factored(panels_.get() + k * panel_ + offset, y + (depth_ - depth) * lanes, depth,
                           sums + k * lanes);
        }
    }
}

// Where the panel of a step starts, for full covariance.
int64_t Screen::offset_of(int64_t step) const {
    int64_t offset = 0;
    for (int64_t s = 0; s < step; ++s)
        offset += std::min((s + 1) * tile_.components, depth_) * (1 + tile_.components);
    return offset;
}

// For full covariance, take the steps from `begin` on for the pairs that are left.
void Screen::add_last_steps(const Work& work, int64_t begin) const {
    const int64_t wide = tile_.components, lanes = tile_.lanes, k_count = mixture_.components;
    const int64_t windows = patches(true) / lanes;
    float *y = work.packed, *packed_sums = y + lanes * depth_;
    std::fill(y, packed_sums + lanes, 0.0f);
    for (int64_t k = 0; k < k_count; ++k) {
        const float* panel = panels_.get() + k * panel_;
        float* from[MAX_LANES];
        int64_t filled = 0;
        const auto flush = [&] {
            for (int64_t step = begin, offset = offset_of(begin); step < steps_; ++step) {
                const int64_t depth = std::min((step + 1) * wide, depth_);
                tile_.factored(panel + offset, y + (depth_ - depth) * lanes, depth, packed_sums);
                offset += depth * (1 + wide);
            }
            for (int64_t lane = 0; lane < filled; ++lane) *from[lane] = packed_sums[lane];
            filled = 0;
        };
        for (int64_t w = 0; w < windows; ++w) {
            for (uint32_t alive = work.alive[w * k_count + k]; alive != 0; alive &= alive - 1) {
                const int64_t lane = __builtin_ctz(alive);
                const float* in = work.y + w * lanes * depth_ + lane;
                for (int64_t c = 0; c < depth_; ++c) y[c * lanes + filled] = in[c * lanes];
                from[filled] = work.sums + w * lanes * padded_ + k * lanes + lane;
                packed_sums[filled] = *from[filled];
                if (++filled == lanes) flush();
            }
        }
        if (filled > 0) flush();
    }
}

double Screen::evaluate(const Work& work, const float* y, int64_t k) const {
    const int64_t d = mixture_.d;
    const float* mean = mixture_.means + k * d;
    if (!mixture_.full) return constants_[k] - 0.5 * tile_.distance(y, mean, mixture_.precisions + k * d, d);
    double* v = work.difference;
    for (int64_t i = 0; i < d; ++i) v[i] = static_cast<double>(y[i]) - mean[i];
    const float* row = mixture_.precisions + k * d * d;
    double form = 0;
    for (int64_t i = 0; i < d; ++i, row += d + 1) {
        form += v[i] * (2 * tile_.dot(row + 1, v + i + 1, d - i - 1) + row[0] * v[i]);
    }
    return constants_[k] - 0.5 * std::max(form, 0.0);
}

// What an upper bound must reach, in float32, for a pair to matter beside a component that reaches `best`.
float Screen::floor_of(double best) const {
    return -round_up_to_float(-(best - drop_ - 0x1p-20 * (std::abs(best) + largest_)));
}

// Compute the component with the largest upper bound of every patch, if it was not computed before.
void Screen::choose(const Work& work, const float* y, int64_t stride, int64_t count) const {
    const int64_t lanes = tile_.lanes;
    int64_t chosen = 0;
    for (int64_t start = 0; start < count; start += lanes) {
        int32_t at[MAX_LANES];
        tile_.choose(work.sums + start * padded_, upper_.get(), mixture_.components, half_, at);
        for (int64_t i = start; i < std::min(start + lanes, count); ++i) {
            if (at[i - start] < 0 || at[i - start] == work.candidate[i] || work.floor[i] == INFINITY)
                continue;
            work.candidate[i] = at[i - start];
            work.queue[chosen++] = static_cast<int32_t>(i);
        }
    }
    std::sort(work.queue, work.queue + chosen, [&](int32_t a, int32_t b) {
        return work.candidate[a] != work.candidate[b] ? work.candidate[a] < work.candidate[b] : a < b;
    });
    for (int64_t n = 0; n < chosen; ++n) {
        const int32_t i = work.queue[n];
        const double value = work.known[i] = evaluate(work, y + i * stride, work.candidate[i]);
        if (value > work.best[i]) {
            work.best[i] = value;
            work.floor[i] = floor_of(value);
        }
    }
}

// Mark and count the pairs that are not ruled out; `grown`: how many, were the sums `growth` times as large.
int64_t Screen::survivors(const Work& work, float growth, int64_t* grown) const {
    const int64_t lanes = tile_.lanes, k_count = mixture_.components;
    int64_t total = 0;
    *grown = 0;
    for (int64_t w = 0; w < patches(mixture_.full) / lanes; ++w) {
        int64_t some;
        total +=
            tile_.survive(work.sums + w * lanes * padded_, upper_.get(), slack_.get(), k_count, half_, growth,
                          work.norm + w * lanes, work.floor + w * lanes, work.alive + w * k_count, &some);
        *grown += some;
    }
    return total;
}

// Compute every pair that the screen has left, while better ones rule out others.
int64_t Screen::list(const Work& work, const float* y, int64_t stride, int64_t count, bool exact) const {
    const int64_t lanes = tile_.lanes, k_count = mixture_.components;
    int64_t found = 0;
    for (int64_t k = 0; k < k_count; ++k) {
        for (int64_t start = 0; start < count; start += lanes) {
            uint32_t alive = work.alive[start / lanes * k_count + k];
            if (alive == 0) continue;
            const float* sums = work.sums + start * padded_ + k * lanes;
            const float* lost = work.lost + start * padded_ + k * lanes;
            for (; alive != 0; alive &= alive - 1) {
                const int64_t i = start + __builtin_ctz(alive);
                if (i >= count) break;
                const float sum = sums[i - start] > FLT_MAX ? FLT_MAX : sums[i - start];
                if (half_ * sum > upper_[k] + slack_[k] * work.norm[i] - work.floor[i]) continue;
                double value;
                if (k == work.candidate[i]) {
                    value = work.known[i];
                } else if (exact && sum <= accept_) {
                    value = constants_[k] - 0.5 * (static_cast<double>(sum) + lost[i - start]);
                } else {
                    value = evaluate(work, y + i * stride, k);
                }
                if (value > work.best[i]) {
                    work.best[i] = value;
                    work.floor[i] = floor_of(value);
                }
                work.pairs[found++] = {value, static_cast<int32_t>(i), static_cast<int32_t>(k)};
            }
        }
    }
    return found;
}

int64_t Screen::assign(const float* y, int64_t stride, int64_t count, float* log_likelihood, float* weights,
                       bool* held, int64_t rows, bool* broken, char* scratch) const {
    const Work work = place(scratch);
    const int64_t wide = tile_.components, patches = Screen::patches(mixture_.full);
    for (int64_t i = 0; i < patches; ++i) {
        const bool there = i < count, whole = there && is_finite(y + i * stride, mixture_.d);
        if (there && !whole) *broken = true;
        work.best[i] = -INFINITY;
        work.total[i] = whole ? 0 : NAN;
        work.floor[i] = whole ? -INFINITY : INFINITY;
        work.norm[i] =
            whole && mixture_.full ? round_up_to_float(squared_norm(y + i * stride, mixture_.d)) : 0;
        work.candidate[i] = -1;
    }
    std::fill(work.sums, work.sums + patches * padded_, 0.0f);
    int64_t done = 0;
    bool exact = false, sparse = false;
    for (int64_t stop = std::min(first_, steps_); !exact; stop = std::min(2 * stop, steps_)) {
        transpose(work, y, stride, done, stop);
        if (sparse) {
            add_last_steps(work, done);
            done = stop = steps_;
        }
        for (; done < stop; ++done) add_step(work, done, false);
        choose(work, y, stride, count);
        const int64_t pairs = count * mixture_.components;
        const float growth = static_cast<float>(depth_) / static_cast<float>(std::min(done * PIECE, depth_));
        int64_t grown, left = survivors(work, growth, &grown);
        exact = !mixture_.full && grown * CROWDED > pairs;
        if (exact) {
            transpose(work, y, stride, done, steps_);
            std::fill(work.sums, work.sums + patches * padded_, 0.0f);
            std::fill(work.lost, work.lost + patches * padded_, 0.0f);
            for (int64_t step = 0; step < steps_; ++step) add_step(work, step, true);
            left = survivors(work, 1, &grown);
        }
        if (done == steps_ || left * (mixture_.full ? 64 : 32) <= pairs) break;
        sparse = mixture_.full && left * SPARSE <= pairs;
    }
    const int64_t found = list(work, y, stride, count, exact);

    for (int64_t p = 0; p < padded_ / wide; ++p) std::fill(held + p * rows, held + p * rows + count, false);
    for (int64_t n = 0; n < found; ++n) {
        Pair& pair = work.pairs[n];
        const double below = work.best[pair.patch] - pair.value;
        pair.value = below <= drop_ ? std::exp(-below) : 0;  // NaN where no component is possible
        work.total[pair.patch] += pair.value;
    }
    for (int64_t n = 0; n < found; ++n) {
        const Pair& pair = work.pairs[n];
        if (pair.value == 0) continue;
        const int64_t at = pair.component / wide * rows + pair.patch;
        float* group = weights + at * wide;
        if (!held[at]) std::fill(group, group + wide, 0.0f);
        held[at] = true;
        group[pair.component % wide] = static_cast<float>(pair.value / work.total[pair.patch]);
    }
    for (int64_t i = 0; i < count; ++i) {
        log_likelihood[i] = static_cast<float>(work.best[i] + std::log(work.total[i]));
    }
    return found;
}

}  // namespace dinofast
