// What every exact search shares: a scan proposes bank rows with scores that are right within a known bound;
// here the rows that may belong to the k nearest are kept, and one float32 distance decides among them.
#pragma once

#include <cstdint>

#include "memory.h"
#include "rows.h"

namespace dinofast {

constexpr float TINY = 1e-36f;  // above what underflow can lose

enum class Metric { cosine = 0, euclidean = 1, sqeuclidean = 2 };

// Bound on the relative error of a sum of d products in float32, with 64 roundings to spare for what happens
// to the operands before and to the sum after. Infinite when d is beyond all bounds.
float product_error(int64_t d);

// The exact distance between prepared rows: for cosine those of `unit_row`.
struct Measure {
    const Tile& tile;
    Metric metric;
    int64_t d;
    const float* origin;  // d zeros

    // Squared norm in float64.
    double sq_norm(const float* x) const { return tile.lines.sq_distance(x, origin, d); }

    // The factor that gives a row of this squared norm unit norm: 1 for a zero row, and for a row that
    // float32 rounding may have left so, since scaling twice is scaling once.
    static double unit_scale(double sq_norm);

    // Scale x to unit norm into out. False when x holds NaN or inf.
    bool unit_row(const float* x, float* out) const;

    // In [0, 2] for cosine; a zero row is at distance 1 from everything.
    float distance(const float* x, const float* y) const;
};

// Fill out (M, d) by Measure::unit_row. The number of the first row with NaN or inf, or -1.
int64_t unit_rows(const Tile& tile, const Rows& rows, float* out, int threads);

// Bank rows as the measure wants them: `prepared` rows are unit rows already, or need not be.
struct Bank {
    Rows rows;
    bool prepared;

    // Row i; the buffer holds 2 d floats.
    const float* get(const Measure& measure, int64_t i, float* buffer) const;
};

// The k best candidates of `count` queries. The score of a pair is (|x - c|^2 - |x - y|^2) / 2 for any center
// c; higher is nearer. A zero row, whose cosine distance is 1 by definition, counts as |x - y|^2 = 2.
class Candidates {
  public:
    static constexpr int MAX_K = 64;

    // `eager`: the bounds are so wide that a row which looks better than the k-th best is decided at once.
    Candidates(int64_t count, int k, bool eager);

    // Start query q, whose row x (d,) is prepared and stays where it is. `sq_norm` counts from the center;
    // `error` is what its part of every score may err. A settled query wants no candidates.
    void start(int64_t q, const float* x, double sq_norm, float error);
    void settle(int64_t q);

    // The k-th highest lower bound: a row that cannot reach this score is not wanted.
    float limit(int64_t q) const { return best_[q * k_]; }

    // Scores below this cannot belong to the k best: the scan gives its score without the query's own error.
    float threshold(int64_t q) const { return threshold_[q]; }

    // A row whose score is at most `score` and at least score - 2 * error, give or take the query's own.
    // The buffer holds 2 d floats.
    void offer(int64_t q, float score, float error, int64_t index, const Measure& measure, const Bank& bank,
               float* buffer);

    // A row to be compared at once.
    void decide(int64_t q, int64_t index, const Measure& measure, const Bank& bank, float* buffer);

    // At most ROUGH rows of a prepared float32 bank to be compared at once: roughly first. Returns how many
    // that left.
    static constexpr int ROUGH = 4;
    int decide(int64_t q, const int64_t* index, int count, const Measure& measure, const Bank& bank,
               float* buffer);

    // Decide: distance (k,) ascending, index (k,); equal distances in ascending order of index.
    void finish(int64_t q, const Measure& measure, const Bank& bank, float* buffer, float* distance,
                int64_t* index);

  private:
    struct Candidate {
        float upper, distance;  // NaN: not decided
        int64_t index;
    };
    struct Bounds {
        float upper, lower;
    };
    struct Query {
        const float* x;
        double sq_norm;
        float error;
        int32_t found;
        bool settled;
    };

    void keep(int64_t q, Bounds score, float distance, int64_t index, const Measure& measure,
              const Bank& bank, float* buffer);
    void keep_possible(int64_t q);
    void raise(int64_t q, float lower);
    void resolve(int64_t q, const Measure& measure, const Bank& bank, float* buffer, float* distance);
    Bounds decided(int64_t q, float distance, Metric metric) const;

    int k_, room_;
    bool eager_;
    Array<Query> queries_;
    Array<Candidate> candidates_;  // room_ a query
    Array<float> best_;            // the k highest lower bounds of every query, a heap with the lowest on top
    Array<float> threshold_;
};

}  // namespace dinofast
