#include "mixture.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "threads.h"

namespace dinofast {
namespace {

constexpr int64_t PIECE = 48;         // channels in one float32 sum
constexpr int64_t TAIL = 96;          // channels screened at most for full covariance
constexpr double ROUNDING = 0x1p-24;  // of float32, relative
constexpr double SHARE = 0x1p-10;     // of the full bound that is given up, so that its error can be absolute
constexpr double NOISE = 0x1p-12;     // nats; a float32 sum proven this close is not computed again
constexpr int64_t CROWDED = 8;        // if one of so many pairs seems to matter, all are computed at once
constexpr int64_t SPARSE = 8;         // if only one of so many pairs is left, its patches are brought together

bool is_finite(const float* x, int64_t d) {
    uint32_t found = 0;
    for (int64_t i = 0; i < d; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        found |= (bits & 0x7fffffff) >= 0x7f800000;
    }
    return found == 0;
}

double squared_norm(const float* x, int64_t d) {
    double sum = 0;
    for (int64_t i = 0; i < d; ++i) sum += static_cast<double>(x[i]) * x[i];
    return sum;
}

// The next float32 that is not below x.
float round_up_to_float(double x) {
    const float rounded = static_cast<float>(x);
    return rounded < x ? std::nextafter(rounded, INFINITY) : rounded;
}

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

Screen::Screen(const MixtureTile& tile, const Mixture& mixture, int threads)
    : tile_(tile), mixture_(mixture), drop_(32 * std::log(2.0) + std::log(mixture.components)) {
    const int64_t k = mixture.components, d = mixture.d, wide = tile.components;
    padded_ = round_up(k, wide);
    depth_ = mixture.full ? std::min(TAIL, d) : d;
    steps_ = mixture.full ? (depth_ + wide - 1) / wide : (d + PIECE - 1) / PIECE;
    first_ = mixture.full ? std::max<int64_t>(TAIL / 4 / wide, 1) : 1;
    panel_ = 2 * wide * d;
    if (mixture.full) {
        panel_ = 0;
        for (int64_t step = 0; step < steps_; ++step)
            panel_ += std::min((step + 1) * wide, depth_) * (1 + wide);
    }
    const double error = static_cast<double>(PIECE + 16 + steps_) * ROUNDING;
    half_ = static_cast<float>(0.5 * (1 - (mixture.full ? SHARE + 0x1p-16 : error)));
    accept_ = static_cast<float>(2 * NOISE / ((RUN + 4) * ROUNDING));

    finite_ = is_finite(mixture.means, k * d);
    order_ = allocate<int32_t>(d);
    order_channels();
    const int64_t panels = mixture.full ? k : padded_ / wide;
    panels_ = allocate<float>(panels * panel_);
    upper_ = allocate<float>(k);
    slack_ = allocate<float>(k);
    constants_ = allocate<double>(k);
    std::copy(mixture.constants, mixture.constants + k, constants_.get());
    std::fill(slack_.get(), slack_.get() + k, 0.0f);
    const Array<double> factors = allocate<double>(mixture.full ? d * d * threads : 1);
    int64_t failed = k;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic) reduction(min : failed)
    for (int64_t p = 0; p < panels; ++p) {
        if (!mixture.full) {
            pack_diagonal(p);
        } else if (!pack_full(p, factors.get() + d * d * thread_number())) {
            failed = std::min(failed, p);
        }
    }
    if (failed < k) failed_ = failed;
    for (int64_t i = 0; i < k; ++i) {
        const double constant = constants_[i];
        finite_ = finite_ && constant < INFINITY;
        upper_[i] = round_up_to_float(constant);
        if (constant > -INFINITY) largest_ = std::max(largest_, std::abs(constant));
    }
    if (!mixture.full) return;
    for (int64_t i = 0; i < k; ++i) {
        upper_[i] = round_up_to_float(constants_[i] + slack_[i] * squared_norm(mixture.means + i * d, d));
    }
}

// By how far apart the means are, Σ_k λ_k (μ_k − μ_k₋₁)²: sums over few channels then rule out many pairs.
void Screen::order_channels() {
    const int64_t d = mixture_.d;
    std::iota(order_.get(), order_.get() + d, 0);
    if (mixture_.full || !finite_) return;
    std::vector<double> apart(d);
    for (int64_t k = 1; k < mixture_.components; ++k) {
        const float *mean = mixture_.means + k * d, *precision = mixture_.precisions + k * d;
        for (int64_t i = 0; i < d; ++i)
            apart[i] += double{precision[i]} * (mean[i] - mean[i - d]) * (mean[i] - mean[i - d]);
    }
    std::stable_sort(order_.get(), order_.get() + d,
                     [&](int32_t a, int32_t b) { return apart[a] > apart[b]; });
}

void Screen::pack_diagonal(int64_t panel) {
    const int64_t wide = tile_.components, d = mixture_.d;
    float* out = panels_.get() + panel * panel_;
    for (int64_t i = 0; i < d; ++i, out += 2 * wide) {
        for (int64_t r = 0; r < wide; ++r) {
            const int64_t k = panel * wide + r;
            const bool there = k < mixture_.components;
            out[r] = there ? -mixture_.means[k * d + order_[i]] : 0;
            out[wide + r] = there ? mixture_.precisions[k * d + order_[i]] : 0;
        }
    }
}

// With S = SHARE, z = Lᵀ(y − μ) over the last coordinates and e the error of the computed ẑ,
// |z|² ≥ (1 − S)|ẑ|² − |e|²/S, and |e|² ≤ (rounding of a sum of `depth` terms)² tr Λ |y − μ|², where
// |y − μ|² ≤ 2(|y|² + |μ|²). The second term is the backward error of the factor in float64.
bool Screen::pack_full(int64_t k, double* factor) {
    const int64_t d = mixture_.d, wide = tile_.components;
    const float* precision = mixture_.precisions + k * d * d;
    double log_det = 0, trace = 0;
    for (int64_t i = 0; i < d; ++i) {
        double* row = factor + i * d;
        for (int64_t j = 0; j <= i; ++j) {
            const double rest = precision[i * d + j] - tile_.dot_wide(row, factor + j * d, j);
            if (j < i) {
                row[j] = rest / factor[j * d + j];
            } else {
                if (!(rest > 0)) return false;
                row[i] = std::sqrt(rest);
                log_det += std::log(row[i]);
            }
        }
        trace += precision[i * d + i];
    }
    constants_[k] += log_det;
    const double sum_error = static_cast<double>(depth_ + 4) * ROUNDING;
    const double rounding = sum_error * sum_error / SHARE + static_cast<double>(d + 2) * 0x1p-53;
    slack_[k] = round_up_to_float(1.01 * trace * rounding);

    float* out = panels_.get() + k * panel_;
    for (int64_t step = 0; step < steps_; ++step) {
        const int64_t left = d - (step + 1) * wide;
        for (int64_t i = std::max(left, d - depth_); i < d; ++i) {
            *out++ = -mixture_.means[k * d + i];
            for (int64_t j = left; j < left + wide; ++j) {
                *out++ = j < d - depth_ || j > i ? 0 : static_cast<float>(factor[i * d + j]);
            }
        }
    }
    return true;
}

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
    for (int64_t i = 0; i < d; ++i, row += d) form += v[i] * (2 * tile_.dot(row, v, i) + row[i] * v[i]);
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
