#include "candidates.h"

#include <algorithm>
#include <cmath>
#include <functional>

namespace dinofast {
namespace {

constexpr double UNIT = 0x1p-24;         // largest relative error of one float32 rounding
constexpr double UNIT_SQUARE = 0x1p-20;  // how far from 1 a squared norm may be

constexpr int SPARE = 30;  // candidates of a query beyond 2 k

// What rounding of a squared distance in float32 adds to a score, or takes from it, at most.
double slack(double sq_norm, double square) { return 32 * UNIT * (sq_norm + square) + 1e-36; }

struct Neighbor {
    float distance;
    int64_t index;

    bool operator<(const Neighbor& other) const {
        return distance < other.distance || (distance == other.distance && index < other.index);
    }
};

}  // namespace

float product_error(int64_t d) {
    const double error = static_cast<double>(d + 64) * UNIT;
    return error < 0.5 ? static_cast<float>(1.001 * error / (1 - error)) : INFINITY;
}

double Measure::unit_scale(double sq_norm) {
    return sq_norm == 0 || std::abs(sq_norm - 1) <= UNIT_SQUARE ? 1 : 1 / std::sqrt(sq_norm);
}

bool Measure::unit_row(const float* x, float* out) const {
    const double sum = sq_norm(x);
    if (!std::isfinite(sum)) return false;
    const double scale = unit_scale(sum);
    for (int64_t k = 0; k < d; ++k) out[k] = static_cast<float>(x[k] * scale);
    return true;
}

float Measure::distance(const float* x, const float* y) const {
    const double square = tile.lines.sq_distance(x, y, d);
    if (metric == Metric::sqeuclidean) return static_cast<float>(square);
    if (metric == Metric::euclidean) return static_cast<float>(std::sqrt(square));
    // |x - y|^2 = 2 - 2 cos for unit rows; about 1 for one zero row, and 0 for two
    const bool suspect = square == 0 || std::abs(square - 1) < 1e-4;
    if (suspect && (sq_norm(x) == 0 || sq_norm(y) == 0)) return 1;
    return std::min(static_cast<float>(square / 2), 2.0f);
}

int64_t unit_rows(const Tile& tile, const Rows& rows, float* out, int threads) {
    const int64_t d = rows.d;
    const Array<float> origin = allocate<float>(d), converted = allocate<float>(d * threads);
    std::fill(origin.get(), origin.get() + d, 0.0f);
    const Measure measure{tile, Metric::cosine, d, origin.get()};
    int64_t broken = rows.count;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(min : broken) if (threads > 1)
    for (int thread = 0; thread < threads; ++thread) {
        float* const buffer = converted.get() + d * thread;
        for (int64_t i = rows.count * thread / threads; i < rows.count * (thread + 1) / threads; ++i) {
            if (!measure.unit_row(rows.get(i, buffer), out + i * d)) broken = std::min(broken, i);
        }
    }
    return broken < rows.count ? broken : -1;
}

const float* Bank::get(const Measure& measure, int64_t i, float* buffer) const {
    const float* row = rows.get(i, buffer + rows.d);
    if (prepared || measure.metric != Metric::cosine) return row;
    measure.unit_row(row, buffer);
    return buffer;
}

Candidates::Candidates(int64_t count, int k, bool eager)
    : k_(k),
      room_(2 * k + SPARE),
      eager_(eager),
      queries_(allocate<Query>(count)),
      candidates_(allocate<Candidate>(count * room_)),
      best_(allocate<float>(count * k)),
      threshold_(allocate<float>(count)) {}

void Candidates::start(int64_t q, const float* x, double sq_norm, float error) {
    queries_[q] = {x, sq_norm, error, 0, false};
    threshold_[q] = -INFINITY;
    std::fill(best_.get() + q * k_, best_.get() + (q + 1) * k_, -INFINITY);
}

void Candidates::settle(int64_t q) {
    queries_[q].settled = true;
    threshold_[q] = INFINITY;
}

void Candidates::offer(int64_t q, float score, float error, int64_t index, const Measure& measure,
                       const Bank& bank, float* buffer) {
    const Query& query = queries_[q];
    if (query.settled || score < threshold_[q]) return;
    if (eager_ && score - error > limit(q)) return decide(q, index, measure, bank, buffer);
    keep(q, {score + query.error, score - 2 * error - query.error}, NAN, index, measure, bank, buffer);
}

void Candidates::decide(int64_t q, int64_t index, const Measure& measure, const Bank& bank, float* buffer) {
    if (queries_[q].settled) return;
    const float distance = measure.distance(queries_[q].x, bank.get(measure, index, buffer));
    keep(q, decided(q, distance, measure.metric), distance, index, measure, bank, buffer);
}

int Candidates::decide(int64_t q, const int64_t* index, int count, const Measure& measure, const Bank& bank,
                       float* buffer) {
    bool wanted[ROUGH] = {true, true, true, true};
    if (count > 1) {
        const float* rows[ROUGH];
        float square[ROUGH];
        for (int i = 0; i < ROUGH; ++i) rows[i] = bank.get(measure, index[std::min(i, count - 1)], buffer);
        measure.tile.lines.rough_sq_distances(queries_[q].x, rows, measure.d, square);
        const double own = queries_[q].sq_norm, shrink = 1 - 2.0 * product_error(measure.d);
        for (int i = 0; i < count; ++i) {  // underflow makes it smaller, and rules out less
            const double least = shrink * square[i];
            const bool beyond = (own - least) / 2 + slack(own, least) < limit(q);
            wanted[i] = !(square[i] < 1e30f && beyond);
        }
    }
    int left = 0;
    for (int i = 0; i < count; ++i) {
        if (!wanted[i]) continue;
        decide(q, index[i], measure, bank, buffer);
        ++left;
    }
    return left;
}

void Candidates::keep(int64_t q, Bounds score, float distance, int64_t index, const Measure& measure,
                      const Bank& bank, float* buffer) {
    Query& query = queries_[q];
    if (std::isnan(score.upper)) score.upper = INFINITY;
    if (std::isnan(score.lower)) score.lower = -INFINITY;
    candidates_[q * room_ + query.found++] = {score.upper, distance, index};
    raise(q, score.lower);
    if (query.found < room_) return;
    keep_possible(q);
    if (query.found > room_ / 2) resolve(q, measure, bank, buffer, nullptr);
}

void Candidates::finish(int64_t q, const Measure& measure, const Bank& bank, float* buffer, float* distance,
                        int64_t* index) {
    keep_possible(q);
    resolve(q, measure, bank, buffer, distance);
    for (int i = 0; i < k_; ++i) index[i] = candidates_[q * room_ + i].index;
}

void Candidates::raise(int64_t q, float lower) {
    float* const best = best_.get() + q * k_;
    if (!(lower > best[0])) return;
    std::pop_heap(best, best + k_, std::greater<>());
    best[k_ - 1] = lower;
    std::push_heap(best, best + k_, std::greater<>());
    const float limit = best[0] - queries_[q].error;
    if (limit > threshold_[q]) threshold_[q] = limit;
}

Candidates::Bounds Candidates::decided(int64_t q, float distance, Metric metric) const {
    const double d = distance, own = queries_[q].sq_norm;
    const double square = metric == Metric::cosine ? 2 * d : metric == Metric::euclidean ? d * d : d;
    const double score = (own - square) / 2, off = slack(own, square);
    if (!(std::abs(score) + off < 1e38)) return {INFINITY, -INFINITY};
    return {static_cast<float>(score + off), static_cast<float>(score - off)};
}

void Candidates::keep_possible(int64_t q) {
    Candidate* const first = candidates_.get() + q * room_;
    const float limit = best_[q * k_];
    Candidate* const last = std::remove_if(first, first + queries_[q].found,
                                           [limit](const Candidate& c) { return c.upper < limit; });
    queries_[q].found = static_cast<int32_t>(last - first);
}

void Candidates::resolve(int64_t q, const Measure& measure, const Bank& bank, float* buffer,
                         float* distance) {
    Query& query = queries_[q];
    Candidate* const candidates = candidates_.get() + q * room_;
    Neighbor near[2 * MAX_K + SPARE];
    for (int i = 0; i < query.found; ++i) {
        const int64_t index = candidates[i].index;
        const float known = candidates[i].distance;
        near[i] = {std::isnan(known) ? measure.distance(query.x, bank.get(measure, index, buffer)) : known,
                   index};
    }
    std::sort(near, near + query.found);
    query.found = k_;
    float* const best = best_.get() + q * k_;
    std::fill(best, best + k_, -INFINITY);
    for (int i = 0; i < k_; ++i) {
        const Bounds score = decided(q, near[i].distance, measure.metric);
        candidates[i] = {score.upper, near[i].distance, near[i].index};
        if (distance != nullptr) distance[i] = near[i].distance;
        raise(q, score.lower);
    }
}

}  // namespace dinofast
