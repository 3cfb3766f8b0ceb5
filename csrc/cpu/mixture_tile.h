// What dpm_stats asks of an instruction set. Lanes are patches in the screen and channels in the sums.
#pragma once

#include <cstdint>

namespace dinofast {

constexpr int MAX_COMPONENTS = 12;  // no instruction set takes more at a time
constexpr int MAX_LANES = 32;
constexpr int RUN = 8;

struct MixtureTile {
    int components;  // that one call takes together, at most MAX_COMPONENTS and lanes / 2
    int lanes;       // patches or channels that one call takes together, at most MAX_LANES

    // Diagonal screen: sums[r][lane] += Σ_i (y[i][lane] − μ[i][r])² λ[i][r] over `depth` channels i. A panel
    // holds for every channel −μ of all components, then λ.
    void (*spread)(const float* panel, const float* y, int64_t depth, float* sums);

    // The same where it decides: sums + lost, in float32 but for runs of RUN channels, whose sums are added
    // up with the rounding error kept in `lost`.
    void (*spread_exactly)(const float* panel, const float* y, int64_t depth, float* sums, float* lost);

    // Full screen, one component: sums[lane] += Σ_j (Σ_i (y[i][lane] − μ[i]) l[i][j])² over `depth` channels
    // i and `components` columns j. A panel holds for every channel −μ, then the row of l.
    void (*factored)(const float* panel, const float* y, int64_t depth, float* sums);

    // What the sums of `lanes` patches, component after component, say of each component k < count.
    // The largest bound upper[k] − half · sums[k][lane] of every lane, and the first k that has it; −1 where
    // none exceeds −∞.
    void (*choose)(const float* sums, const float* upper, int64_t count, float half, int32_t* at);

    // Bit `lane` of alive[k] tells that k is not ruled out: not half · sums[k][lane] > upper[k] +
    // slack[k] · norm[lane] − floor[lane], where a sum beyond FLT_MAX counts as FLT_MAX. Returns how many are
    // alive; `grown` becomes how many were if `half` was `growth` times as large.
    int64_t (*survive)(const float* sums, const float* upper, const float* slack, int64_t count, float half,
                       float growth, const float* norm, const float* floor, uint32_t* alive, int64_t* grown);

    // sums[r][lane] = Σ_n weights[n][r] y[rows[n]][lane], of y² if `square`; n in order. Row i of y starts at
    // y + i * stride.
    void (*weigh)(const float* y, int64_t stride, const int32_t* rows, const float* weights, int64_t count,
                  bool square, float* sums);

    // Σ_i (x_i − μ_i)² λ_i and Σ_i x_i y_i, all in float64.
    double (*distance)(const float* x, const float* mean, const float* precision, int64_t d);
    double (*dot)(const float* x, const double* y, int64_t d);

    // The Cholesky factor U of Λ = Uᵀ U, row after row: take Σ_n<i U[n][i + r] U[n][j + lane] from
    // U[i + r][j + lane], which holds Λ, over r < components and lane < lanes / 2. With `inverse`, those of
    // the diagonal from i on, then solve for U; its rows from i to there must be known.
    void (*eliminate)(double* factor, int64_t stride, int64_t i, int64_t j, const double* inverse);
};

}  // namespace dinofast
