// Which components of a Gaussian mixture a patch can belong to, and how likely: the E step over a few
// patches.
//
// A screen bounds every log-probability from above by sums over some channels that can only grow: of
// (y − μ)² λ for diagonal covariance, of the squares of Lᵀ(y − μ), L Lᵀ = Λ, for full covariance, where the
// trailing coordinates need only the trailing channels. It stops when few pairs of patch and component are
// left; those are evaluated in float64.
#pragma once

#include "memory.h"
#include "mixture_tile.h"

namespace dinofast {

struct Mixture {
    int64_t components, d;
    bool full;
    const float* means;       // (K, D)
    const float* precisions;  // (K, D); (K, D, D) if full, of which the upper triangle is read
    const double* constants;  // (K,): ln w − ½ D ln 2π, and for diagonal covariance + ½ ln |Λ|
};

// A pair of patch and component whose log-probability is known.
struct Pair {
    double value;
    int32_t patch, component;
};

class Screen {
  public:
    // Patches that `assign` takes at most. Full covariance takes more, to reuse the matrices it reads.
    static int64_t patches(bool full) { return full ? 256 : 64; }

    // Prepares the mixture. If a precision matrix is not positive definite, `failed()` names the component.
    Screen(const MixtureTile& tile, const Mixture& mixture, int threads);
    int64_t failed() const { return failed_; }

    // Tells whether the parameters are finite; if not, every result must be NaN.
    bool finite() const { return finite_; }

    // Bytes of memory that one call of `assign` works in, a multiple of 64.
    int64_t scratch() const;

    // Writes for `count` patches y, `stride` floats apart, the log-likelihoods and the responsibilities:
    // component k of patch i at weights[(k / components * rows + i) * components + k % components], where
    // `components` is the tile's, if held[k / components * rows + i]; the others are not written and 0.
    // Responsibilities that are left out sum to less than 2⁻³² a patch.
    // A patch with NaN or inf has log-likelihood NaN and no responsibilities; `broken` is then set. Returns
    // how many pairs had their log-probability computed to the end.
    int64_t assign(const float* y, int64_t stride, int64_t count, float* log_likelihood, float* weights,
                   bool* held, int64_t rows, bool* broken, char* scratch) const;

  private:
    static constexpr int64_t PIECE = 48;  // channels in one float32 sum

    struct Work;
    Work place(char* scratch) const;
    void order_channels();
    void pack_diagonal(int64_t k);
    bool factorize(int64_t k, double* factor, int64_t stride);
    bool pack_full(int64_t k, double* factor, int64_t stride);
    void transpose(const Work& work, const float* y, int64_t stride, int64_t begin, int64_t end) const;
    void add_step(const Work& work, int64_t step, bool exactly) const;
    int64_t offset_of(int64_t step) const;
    void add_last_steps(const Work& work, int64_t begin) const;
    void choose(const Work& work, const float* y, int64_t stride, int64_t count) const;
    int64_t survivors(const Work& work, float growth, int64_t* grown) const;
    double evaluate(const Work& work, const float* y, int64_t k) const;
    float floor_of(double best) const;
    int64_t list(const Work& work, const float* y, int64_t stride, int64_t count, bool exact) const;

    const MixtureTile& tile_;
    const Mixture& mixture_;
    int64_t depth_, steps_, first_, padded_, panel_;  // screened channels, steps, components, floats a panel
    int64_t failed_ = -1;
    bool finite_ = true;
    float half_, accept_;
    double drop_, largest_ = 0;
    Array<float> panels_, upper_, slack_;
    Array<int32_t> order_;  // channels of diagonal covariance, those that tell components apart first
    Array<double> constants_;
};

}  // namespace dinofast
