// What Screen makes of a mixture before the first patch.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "bounds.h"
#include "mixture.h"
#include "threads.h"

namespace dinofast {
namespace {

constexpr int64_t TAIL = 96;          // channels screened at most for full covariance
constexpr double ROUNDING = 0x1p-24;  // of float32, relative
constexpr double SHARE = 0x1p-10;     // of the full bound that is given up, so that its error can be absolute
constexpr double NOISE = 0x1p-12;     // nats; a float32 sum proven this close is not computed again

}  // namespace

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
    // of zeros, because whole tiles are read
    const int64_t stride = round_up(d + wide + tile.lanes, tile.lanes), factor = (d + wide) * stride;
    std::vector<double> factors(static_cast<size_t>(mixture.full ? factor * threads : 0));
    int64_t failed = k;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic) reduction(min : failed)
    for (int64_t p = 0; p < panels; ++p) {
        if (!mixture.full) {
            pack_diagonal(p);
        } else if (!pack_full(p, factors.data() + factor * thread_number(), stride)) {
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

// Factorize Λ = Uᵀ U, U above the diagonal of `factor`, and add ½ ln |Λ| to the constant.
bool Screen::factorize(int64_t k, double* factor, int64_t stride) {
    const int64_t d = mixture_.d, wide = tile_.components, lanes = tile_.lanes / 2;
    const float* precision = mixture_.precisions + k * d * d;
    for (int64_t i = 0; i < d; ++i)
        std::copy(precision + i * d + i, precision + i * d + d, factor + i * stride + i);
    double log_det = 0, inverse[MAX_COMPONENTS] = {};
    for (int64_t i = 0; i < d; i += wide) {
        tile_.eliminate(factor, stride, i, i, nullptr);
        double* block = factor + i * stride + i;
        for (int64_t r = 0; r < std::min(wide, d - i); ++r) {
            for (int64_t c = r; c < lanes; ++c) {
                double rest = block[r * stride + c];
                for (int64_t q = 0; q < r; ++q) rest -= block[q * stride + r] * block[q * stride + c];
                if (c == r) {
                    if (!(rest > 0)) return false;
                    rest = std::sqrt(rest);
                    inverse[r] = 1 / rest;
                    log_det += std::log(rest);
                } else {
                    rest *= inverse[r];
                }
                block[r * stride + c] = rest;
            }
        }
        for (int64_t j = i + lanes; j < d; j += lanes) tile_.eliminate(factor, stride, i, j, inverse);
    }
    constants_[k] += log_det;
    return true;
}

// With L = Uᵀ, S = SHARE, z = Lᵀ(y − μ) over the last coordinates and e the error of the computed ẑ,
// |z|² ≥ (1 − S)|ẑ|² − |e|²/S, and |e|² ≤ (rounding of a sum of `depth` terms)² tr Λ |y − μ|², where
// |y − μ|² ≤ 2(|y|² + |μ|²). The second term is the backward error of the factor in float64.
bool Screen::pack_full(int64_t k, double* factor, int64_t stride) {
    if (!factorize(k, factor, stride)) return false;
    const int64_t d = mixture_.d, wide = tile_.components;
    const float* precision = mixture_.precisions + k * d * d;
    double trace = 0;
    for (int64_t i = 0; i < d; ++i) trace += precision[i * d + i];
    const double sum_error = static_cast<double>(depth_ + 4) * ROUNDING;
    const double rounding = sum_error * sum_error / SHARE + static_cast<double>(d + 4) * 0x1p-53;
    slack_[k] = round_up_to_float(1.01 * trace * rounding);

    float* out = panels_.get() + k * panel_;
    for (int64_t step = 0; step < steps_; ++step) {
        const int64_t left = d - (step + 1) * wide;
        for (int64_t i = std::max(left, d - depth_); i < d; ++i) {
            *out++ = -mixture_.means[k * d + i];
            for (int64_t j = left; j < left + wide; ++j) {
                *out++ = j < d - depth_ || j > i ? 0 : static_cast<float>(factor[j * stride + i]);
            }
        }
    }
    return true;
}

}  // namespace dinofast
