#pragma once

#include "mixture.h"
#include "rows.h"

namespace dinofast {

// Where the results go: log_likelihood (N,), count (K,), first (K, D), second (K, D) or, for full covariance,
// (K, D, D).
struct MixtureSums {
    float *log_likelihood, *count, *first, *second;
};

// Sum the statistics of a Gaussian mixture over x, in order of the rows: the results do not depend on the
// number of threads. A row with NaN or inf has log-likelihood NaN and makes every sum NaN; parameters with
// NaN or inf, log-weights of −inf aside, make everything NaN. `evaluated` counts the pairs of row and
// component whose log-probability was computed to the end, `expectation` the seconds that responsibilities
// took of the whole. Returns −1, or the first component whose precision matrix is not positive definite, and
// then has written nothing. N may be 0; D, K and threads are at least 1; K < 2^31.
int64_t dpm_stats(const Tile& tile, const Mixture& mixture, const Rows& x, const MixtureSums& out,
                  int64_t* evaluated, double* expectation, int threads);

}  // namespace dinofast
