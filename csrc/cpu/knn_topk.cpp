#include "knn_topk.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "blocking.h"
#include "nearest_neighbor.h"
#include "threads.h"

namespace dinofast {
namespace {

constexpr int64_t CHUNK_OF_QUERIES = 4096;
constexpr int64_t CENTER_ROWS = 64;  // rows whose mean is the center
constexpr double HUGE_SQUARE = 0x1p120;

class Scan {
  public:
    Scan(const Measure& measure, const Bank& bank, int k, int threads)
        : measure_(measure),
          tile_(measure.tile),
          bank_(bank),
          d_(measure.d),
          k_(k),
          threads_(threads),
          gamma_(product_error(measure.d)),
          center_(allocate<float>(measure.d)) {
        const int64_t m = bank.rows.count, width = tile_.columns;
        block_ = std::min(round_up(m, width), std::max(SHARED / d_ / width, int64_t{1}) * width);
        group_ = std::max(PRIVATE / d_ / width, int64_t{1}) * width;
        tile_size_ = tile_.rows * padded_depth(d_);
        own_ = round_up((width + 3) * padded_depth(d_), 16);
        panels_ = allocate<float>(block_ * d_);
        bias_ = allocate<float>(block_);
        error_ = allocate<float>(block_);
        scratch_ = allocate<float>(own_ * threads);
        hits_ = allocate<Hit>(tile_.rows * std::min(group_, block_) * threads);
        find_center();
    }

    // False when the bank holds NaN or inf.
    bool search(const Rows& queries, float* distance, int64_t* index) {
        const int64_t chunk = std::min(queries.count, CHUNK_OF_QUERIES);
        prepared_ = allocate<float>(chunk * d_);
        tiles_ = allocate<float>(round_up(chunk, tile_.rows) / tile_.rows * tile_size_);
        whole_ = allocate<bool>(chunk);
        Candidates candidates(chunk, k_, false);
        for (int64_t start = 0; start < queries.count && !broken_; start += chunk) {
            search_chunk(queries, start, std::min(chunk, queries.count - start), candidates,
                         distance + start * k_, index + start * k_);
        }
        return !broken_;
    }

  private:
    void find_center() {
        float* const center = center_.get();
        std::fill(center, center + d_, 0.0f);
        if (measure_.metric == Metric::cosine) return;
        const int64_t m = bank_.rows.count, step = std::max<int64_t>(m / CENTER_ROWS, 1);
        const float weight = 1 / static_cast<float>((m + step - 1) / step);
        const Array<float> buffer = allocate<float>(d_);
        for (int64_t i = 0; i < m; i += step) {
            const float* row = bank_.rows.get(i, buffer.get());
            for (int64_t c = 0; c < d_; ++c) center[c] += row[c] * weight;
        }
        for (int64_t c = 0; c < d_; ++c) {
            if (!std::isfinite(center[c])) center[c] = 0;
        }
    }

    // Prepare the queries of tile t, pack them, and start their candidates.
    void start_tile(const Rows& queries, int64_t start, int64_t count, int64_t t, Candidates& candidates,
                    float* buffer) {
        float* const out = tiles_.get() + t * tile_size_;
        std::fill(out, out + tile_size_, 0.0f);
        for (int64_t r = 0; r < tile_.rows && t * tile_.rows + r < count; ++r) {
            const int64_t q = t * tile_.rows + r;
            float* const x = prepared_.get() + q * d_;
            const float* row = queries.get(start + q, buffer);
            bool whole = std::isfinite(measure_.sq_norm(row));
            if (measure_.metric == Metric::cosine) {
                whole = measure_.unit_row(row, x);
            } else {
                std::copy(row, row + d_, x);
            }
            whole_[q] = whole;
            candidates.start(q, x, 0, 0);
            if (whole) {
                for (int64_t c = 0; c < d_; ++c) buffer[c] = x[c] - center_[c];
                const double square = measure_.sq_norm(buffer);
                candidates.start(q, x, square, gamma_ * static_cast<float>(square) / 2 + TINY);
                for (int64_t c = 0; c < d_; ++c) {
                    out[c / DEPTH * DEPTH * tile_.rows + r * DEPTH + c % DEPTH] = buffer[c];
                }
                whole = !(measure_.metric == Metric::cosine && square == 0);
            }
            if (!whole) candidates.settle(q);
        }
    }

    // Pack bank rows first .. first + Tile::columns as column c of the block.
    bool pack(int64_t first, int64_t c, float* buffer) {
        const int64_t stride = padded_depth(d_), width = tile_.columns;
        const int64_t count = std::min<int64_t>(width, bank_.rows.count - first);
        float* const converted = buffer + width * stride;
        const bool cosine = measure_.metric == Metric::cosine;
        for (int64_t i = 0; i < width; ++i) {
            float* const row = buffer + i * stride;
            bias_[c + i] = error_[c + i] = 0;
            if (i >= count) {
                std::fill(row, row + d_, 0.0f);
                continue;
            }
            const float* source = bank_.rows.get(first + i, converted);
            if (cosine && !bank_.prepared) {
                if (!tile_.normalize(source, d_, row, DEPTH)) return false;
                error_[c + i] = gamma_ / 2 + TINY;
                bias_[c + i] = error_[c + i] - 0.5f;
                continue;
            }
            for (int64_t j = 0; j < d_; ++j) row[j] = source[j] - center_[j];
            const double square = measure_.sq_norm(row);
            if (!std::isfinite(square) && !std::isfinite(measure_.sq_norm(source))) return false;
            const float error = gamma_ * static_cast<float>(square) / 2 + TINY;
            const bool huge = !(square < HUGE_SQUARE) || std::isinf(error);
            error_[c + i] = huge ? INFINITY : error;
            bias_[c + i] = huge ? INFINITY : error - static_cast<float>(cosine ? 0.5 : square / 2);
        }
        interleave(tile_, buffer, d_, panels_.get() + c * d_);
        return true;
    }

    void scan_tile(int64_t t, int64_t count, int64_t base, int64_t c, int64_t columns, Candidates& candidates,
                   Hit* hits, float* buffer) {
        float threshold[MAX_ROWS];
        for (int64_t r = 0; r < tile_.rows; ++r) {
            const int64_t q = t * tile_.rows + r;
            threshold[r] = q < count ? candidates.threshold(q) : INFINITY;
        }
        const int64_t found = tile_.sieve(tiles_.get() + t * tile_size_, panels_.get() + c * d_, columns, d_,
                                          bias_.get() + c, threshold, hits);
        for (int64_t i = 0; i < found; ++i) {
            const int64_t q = t * tile_.rows + hits[i].row, column = c + hits[i].column;
            if (q >= count) continue;
            candidates.offer(q, hits[i].score, error_[column], base + column, measure_, bank_, buffer);
        }
    }

    void search_chunk(const Rows& queries, int64_t start, int64_t count, Candidates& candidates,
                      float* distance, int64_t* index) {
        const int64_t m = bank_.rows.count, tiles = (count + tile_.rows - 1) / tile_.rows;
        std::atomic<int64_t> next_panel{0}, next_tile{0}, next_start{0}, next_finish{0};
#pragma omp parallel num_threads(threads_) if (threads_ > 1)
        {
            float* const mine = scratch_.get() + own_ * thread_number();
            Hit* const hits = hits_.get() + tile_.rows * std::min(group_, block_) * thread_number();
            for (int64_t t; (t = next_start.fetch_add(1)) < tiles;) {
                start_tile(queries, start, count, t, candidates, mine);
            }
            for (int64_t base = 0; base < m; base += block_) {
                const int64_t columns = std::min(block_, m - base);
                for (int64_t c; (c = next_panel.fetch_add(tile_.columns)) < columns;) {
                    if (!pack(base + c, c, mine)) broken_ = true;
                }
#pragma omp barrier
                if (broken_) break;  // no thread packs again before all have read this
                for (int64_t begin, end; take(next_tile, tiles, threads_, begin, end);) {
                    for (int64_t c = 0; c < columns; c += group_) {
                        for (int64_t t = begin; t < end; ++t) {
                            scan_tile(t, count, base, c, std::min(group_, columns - c), candidates, hits,
                                      mine);
                        }
                    }
                }
#pragma omp barrier
#pragma omp single
                {
                    next_panel = 0;
                    next_tile = 0;
                }
            }
            for (int64_t q; !broken_ && (q = next_finish.fetch_add(1)) < count;) {
                finish(q, candidates, mine, distance + q * k_, index + q * k_);
            }
        }
    }

    void finish(int64_t q, Candidates& candidates, float* buffer, float* distance, int64_t* index) {
        if (candidates.threshold(q) < INFINITY) {
            candidates.finish(q, measure_, bank_, buffer, distance, index);
            return;
        }
        for (int i = 0; i < k_; ++i) {
            distance[i] = whole_[q] ? 1 : NAN;  // a zero row has cosine 0 to everything
            index[i] = i;
        }
    }

    const Measure& measure_;
    const Tile& tile_;
    const Bank& bank_;
    const int64_t d_;
    const int k_, threads_;
    const float gamma_;
    int64_t block_, group_, tile_size_, own_;
    Array<float> center_, panels_, bias_, error_, scratch_, prepared_, tiles_;
    Array<Hit> hits_;
    Array<bool> whole_;
    std::atomic<bool> broken_{false};
};

}  // namespace

void knn_topk(const Tile& tile, const Int8Tile& int8, const Rows& queries, const Bank& bank, int k,
              Metric metric, float* distance, int64_t* index, int threads) {
    const int64_t n = queries.count, d = queries.d;
    if (k == 1 && !bank.prepared &&
        nearest_neighbor(tile, int8, queries, bank.rows, metric, distance, index, threads)) {
        return;
    }
#ifdef _OPENMP
    if (n * bank.rows.count * d <= SMALL) threads = 1;
#else
    threads = 1;
#endif
    const Array<float> origin = allocate<float>(d);
    std::fill(origin.get(), origin.get() + d, 0.0f);
    const Measure measure{tile, metric, d, origin.get()};
    if (Scan(measure, bank, k, threads).search(queries, distance, index)) return;
    for (int64_t q = 0; q < n; ++q) {
        for (int i = 0; i < k; ++i) {
            distance[q * k + i] = NAN;
            index[q * k + i] = i;
        }
    }
}

}  // namespace dinofast
