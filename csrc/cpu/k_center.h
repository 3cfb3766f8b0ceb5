#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "rows.h"

namespace dinofast {

// Greedy k-center selection: again and again the row farthest from the centers so far, the first among
// equals, no row twice. Distances are those of farthest_point, and the selection is the same, bit for bit, as
// by computing all of them; most are never computed:
//  - the distance to the centers that a row has looked at bounds what it can still reach, so it looks at
//  later
//    ones only while that bound is the largest;
//  - a row at distance a from a pivot that is at distance b from a center is at least b - a from the center;
//  - a float32 sum that exceeds the bound by more than it can err settles the matter.
class KCenter {
  public:
    // `rows` are float32 and finite and outlive this. A row's reach begins as its distance to the one start,
    // which is itself never selected, or with `mean` as its mean distance to all starts. `limit` is the
    // largest number of rows that select() will be asked for in all, at most N.
    KCenter(const Tile& tile, const Rows& rows, const std::vector<int64_t>& starts, bool mean, int64_t limit,
            int threads);

    // Select `count` more rows into index (count,).
    void select(int64_t count, int64_t* index, int threads);

  private:
    struct Candidate {
        float reach;
        int64_t index;
    };

    const float* row(int64_t i) const { return static_cast<const float*>(rows_.data) + i * rows_.stride; }
    float distance(int64_t i, int64_t j) const;
    void settle(int64_t i, float enough);
    void measure_block(int64_t block);
    void exclude(int64_t i);
    Candidate farthest(int part, int parts);
    float* bound(int64_t pivot, int64_t center);
    void measure_pivots(int64_t center, int64_t number, int part, int parts);

    const Lines& lines_;
    const Rows rows_;
    const std::vector<int64_t> starts_;
    const int64_t limit_, pivots_;  // pivots: the starts, then the first centers
    const double rough_excess_;     // what rough_sq_distances may give for a true 1
    std::vector<int64_t> centers_;
    std::vector<float> reach_;           // of each row: distance to the nearest center that it has looked at
    std::vector<int32_t> seen_;          // of each row: how many centers it has looked at
    std::vector<int32_t> pivot_;         // of each row: the nearest pivot known
    std::vector<float> pivot_distance_;  // of each row, to pivot_
    std::vector<float> block_reach_;     // of each block of rows: the largest reach
    std::unique_ptr<float[]> bounds_;    // of each pivot and center: at most their distance
    std::vector<Candidate> found_;       // by each thread
    std::atomic<float> best_{0};         // the largest reach so far of a row that has looked at all centers
};

}  // namespace dinofast
