#include "knn_topk_bank.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>

#include "memory.h"
#include "threads.h"

namespace dinofast {
namespace {

constexpr int ROWS = Int8Tile::ROWS, COLUMNS = Int8Tile::COLUMNS;
constexpr int64_t RUN = Int8Tile::RUN;
constexpr int64_t PRIVATE = 384 << 10;  // bytes of codes that one thread reads again and again from its L2
constexpr int64_t TILES = 8;            // tiles that one thread takes at a time
constexpr int64_t CHUNK_OF_QUERIES = 1024;

class BankSearch {
  public:
    BankSearch(const Measure& measure, const Int8Tile& int8, const PackedBank& bank, int k, int64_t probes,
               int threads)
        : measure_(measure),
          int8_(int8),
          bank_(bank),
          d_(measure.d),
          quads_(quads(measure.d)),
          tile_size_(round_up(4 * quads_, RUN) / 4 * ROWS),
          probes_(probes),
          group_(std::max(PRIVATE / (4 * quads_) / COLUMNS, int64_t{1}) * COLUMNS),
          k_(k),
          threads_(threads),
          gamma_(product_error(measure.d)) {
        own_ = 4 * (d_ + 16) + (ROWS + 2) * bank.groups;
        own_ = round_up(std::max(own_, d_ + measure.tile.rows * padded_depth(d_)), 16);
        scratch_ = allocate<float>(own_ * threads);
        orders_ = allocate<int64_t>(bank.groups * threads);
        hits_ = allocate<Hit>(ROWS * group_ * threads);
    }

    void search(const Rows& queries, float* distance, int64_t* index, int64_t* visited) {
        const int64_t chunk = std::min(queries.count, CHUNK_OF_QUERIES);
        const int64_t tiles = (chunk + ROWS - 1) / ROWS;
        prepared_ = allocate<float>(chunk * d_);
        to_group_ = allocate<float>(chunk * bank_.groups);
        pack_centroids();
        nearest_ = allocate<int64_t>(chunk);
        order_ = allocate<int64_t>(chunk);
        sq_norm_ = allocate<double>(chunk);
        whole_ = allocate<bool>(chunk);
        tiles_ = allocate<int32_t>(tiles * tile_size_);
        scale_ = allocate<float>(tiles * ROWS);
        sum_ = allocate<int32_t>(tiles * ROWS);
        Candidates candidates(chunk, k_, true);
        for (int64_t start = 0; start < queries.count; start += chunk) {
            search_chunk(queries, start, std::min(chunk, queries.count - start), candidates, distance, index,
                         visited);
        }
    }

  private:
    void search_chunk(const Rows& queries, int64_t start, int64_t count, Candidates& candidates,
                      float* distance, int64_t* index, int64_t* visited) {
        const int64_t tiles = (count + ROWS - 1) / ROWS;
        std::atomic<int64_t> next_query{0}, next_search{0}, next_pack{0}, next_tile{0};
#pragma omp parallel num_threads(threads_) if (threads_ > 1)
        {
            float* const mine = scratch_.get() + own_ * thread_number();
            Hit* const hits = hits_.get() + ROWS * group_ * thread_number();
            for (int64_t q; (q = next_query.fetch_add(1)) < count;) prepare(queries, start, q, mine);
#pragma omp barrier
            if (bank_.groups > 0) {
                for (int64_t t; (t = next_search.fetch_add(1)) * measure_.tile.rows < count;) {
                    find_groups(t, count, hits, mine);
                }
            }
#pragma omp barrier
#pragma omp single
            {
                std::iota(order_.get(), order_.get() + count, int64_t{0});
                std::stable_sort(order_.get(), order_.get() + count,
                                 [this](int64_t a, int64_t b) { return nearest_[a] < nearest_[b]; });
            }
            for (int64_t t; (t = next_pack.fetch_add(1)) < tiles;) pack(t, count, candidates, mine);
#pragma omp barrier
            const int64_t step = bank_.groups > 0 ? 1 : std::clamp<int64_t>(tiles / (4 * threads_), 1, TILES);
            for (int64_t t; (t = next_tile.fetch_add(step)) < tiles;) {
                const int64_t end = std::min(t + step, tiles);
                if (bank_.groups > 0) {
                    scan_groups(t, count, candidates, hits, mine, visited + start);
                } else {
                    scan_all(t, end, count, candidates, hits, mine, visited + start);
                }
                for (int64_t i = t * ROWS; i < std::min(end * ROWS, count); ++i) {
                    const int64_t out = start + order_[i];
                    finish(i, candidates, mine, distance + out * k_, index + out * k_);
                }
            }
        }
    }

    // Row q of the chunk: prepared, and its norm.
    void prepare(const Rows& queries, int64_t start, int64_t q, float* buffer) {
        float* const x = prepared_.get() + q * d_;
        const float* row = queries.get(start + q, buffer);
        const bool cosine = measure_.metric == Metric::cosine;
        whole_[q] = std::isfinite(measure_.sq_norm(row));
        nearest_[q] = 0;
        sq_norm_[q] = 0;
        if (!whole_[q]) {
            std::fill(x, x + d_, 0.0f);
            return;
        }
        if (cosine) {
            measure_.unit_row(row, x);
        } else {
            std::copy(row, row + d_, x);
        }
        sq_norm_[q] = measure_.tile.lines.sq_distance(x, bank_.center, d_);
    }

    // Pack centroids - center for the float32 tile.
    void pack_centroids() {
        const Tile& tile = measure_.tile;
        const int64_t groups = bank_.groups, width = tile.columns, stride = padded_depth(d_);
        const int64_t columns = round_up(groups, width);
        panels_ = allocate<float>(columns * d_);
        half_ = allocate<float>(columns);
        const Array<float> rows = allocate<float>(width * stride);
        for (int64_t c = 0; c < columns; c += width) {
            std::fill(rows.get(), rows.get() + width * stride, 0.0f);
            for (int64_t i = c; i < c + width; ++i) {
                float* const row = rows.get() + (i - c) * stride;
                if (i < groups) subtract(bank_.centroids + i * d_, bank_.center, d_, row);
                half_[i] = static_cast<float>(-measure_.sq_norm(row) / 2);
            }
            interleave(tile, rows.get(), d_, panels_.get() + c * d_);
        }
    }

    // For the queries of float32 tile t: at least how far each centroid is, and which is nearest.
    void find_groups(int64_t t, int64_t count, Hit* hits, float* buffer) {
        const Tile& tile = measure_.tile;
        const int64_t groups = bank_.groups, first = t * tile.rows;
        float threshold[MAX_ROWS];
        std::fill(threshold, threshold + MAX_ROWS, -INFINITY);
        float* const packed = buffer + d_;
        std::fill(packed, packed + tile.rows * padded_depth(d_), 0.0f);
        for (int64_t r = 0; r < std::min<int64_t>(tile.rows, count - first); ++r) {
            subtract(prepared_.get() + (first + r) * d_, bank_.center, d_, buffer);
            for (int64_t k = 0; k < d_; ++k) {
                packed[k / DEPTH * DEPTH * tile.rows + r * DEPTH + k % DEPTH] = buffer[k];
            }
        }
        for (int64_t c = 0; c < groups; c += group_) {
            const int64_t found = tile.sieve(packed, panels_.get() + c * d_, std::min(group_, groups - c), d_,
                                             half_.get() + c, threshold, hits);
            for (int64_t h = 0; h < found; ++h) {
                const int64_t q = first + hits[h].row, g = c + hits[h].column;
                if (q >= count) continue;
                const double own = sq_norm_[q], square = own - 2.0 * hits[h].score;
                const double least = square - 1.01 * gamma_ * (own - 2.0 * half_[g]) - TINY;
                to_group_[q * groups + g] = least > 0 ? static_cast<float>(std::sqrt(least)) : 0;  // NaN: 0
            }
        }
        for (int64_t q = first; q < std::min(first + tile.rows, count); ++q) {
            const float* to_group = to_group_.get() + q * groups;
            nearest_[q] = std::min_element(to_group, to_group + groups) - to_group;
        }
    }

    // Quantize the queries of tile t, by order, and start their candidates.
    void pack(int64_t t, int64_t count, Candidates& candidates, float* buffer) {
        int32_t* const out = tiles_.get() + t * tile_size_;
        std::fill(out, out + tile_size_, 0);
        int8_t* const codes = reinterpret_cast<int8_t*>(buffer + d_ + 16);
        for (int64_t r = 0; r < ROWS; ++r) {
            const int64_t i = t * ROWS + r;
            scale_[i] = 0;
            sum_[i] = 0;
            if (i >= count) continue;
            const int64_t q = order_[i];
            const float* x = prepared_.get() + q * d_;
            subtract(x, bank_.center, d_, buffer);
            std::fill(codes, codes + quads_ * 4, 0);
            const Quantized found = quantize(buffer, d_, codes);
            for (int64_t k = 0; k < 4 * quads_; k += RUN) {
                const int64_t size = std::min(RUN, 4 * quads_ - k);
                std::memcpy(out + (k * ROWS + r * RUN) / 4, codes + k, static_cast<size_t>(size));
            }
            scale_[i] = found.scale;
            sum_[i] = found.sum;
            const float error = quantization_error(found.norm, found.rest, *bank_.weight, gamma_);
            candidates.start(i, x, sq_norm_[q], error);
            const bool zero = measure_.metric == Metric::cosine && measure_.sq_norm(x) == 0;
            if (!whole_[q] || zero) candidates.settle(i);
        }
    }

    // Columns first .. first + columns against tile t.
    void scan(int64_t t, int64_t count, int64_t first, int64_t columns, Candidates& candidates, Hit* hits,
              float* buffer) {
        float threshold[ROWS];
        for (int64_t r = 0; r < ROWS; ++r) {
            const int64_t i = t * ROWS + r;
            threshold[r] = i < count ? candidates.threshold(i) : INFINITY;
        }
        const int64_t found = int8_.sieve(tiles_.get() + t * tile_size_, scale_.get() + t * ROWS,
                                          sum_.get() + t * ROWS, bank_.codes + first * quads_ * 4, columns,
                                          quads_, bank_.scale + first, bank_.bias + first, threshold, hits);
        for (int64_t h = 0; h < found; ++h) {
            const int64_t i = t * ROWS + hits[h].row, column = first + hits[h].column;
            if (i >= count || bank_.index[column] < 0) continue;
            candidates.offer(i, hits[h].score, bank_.error[column], bank_.index[column], measure_, bank_.rows,
                             buffer);
        }
    }

    void scan_all(int64_t begin, int64_t end, int64_t count, Candidates& candidates, Hit* hits, float* buffer,
                  int64_t* visited) {
        for (int64_t c = 0; c < bank_.columns; c += group_) {
            for (int64_t t = begin; t < end; ++t) {
                scan(t, count, c, std::min(group_, bank_.columns - c), candidates, hits, buffer);
            }
        }
        for (int64_t i = begin * ROWS; i < std::min(end * ROWS, count); ++i)
            visited[order_[i]] = bank_.columns;
    }

    // Groups in the order of the best score that one may hold; those that cannot help any query are skipped.
    void scan_groups(int64_t t, int64_t count, Candidates& candidates, Hit* hits, float* buffer,
                     int64_t* visited) {
        const int64_t groups = bank_.groups, rows = std::min<int64_t>(ROWS, count - t * ROWS);
        float* const most = buffer + 4 * (d_ + 16);  // (groups, ROWS): the best score of a query in a group
        float* const key = most + groups * ROWS;
        float enough[ROWS];
        int64_t* const order = orders_.get() + groups * thread_number();
        for (int64_t g = 0; g < groups; ++g) key[g] = -INFINITY;
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t q = order_[t * ROWS + r];
            const double own = sq_norm_[q];
            const bool settled = candidates.threshold(t * ROWS + r) == INFINITY;
            for (int64_t g = 0; g < groups; ++g) {
                const double far = to_group_[q * groups + g];
                const double gap = std::max(far - bank_.radius[g], 0.0);
                const double score = (own - gap * gap) / 2 + 1e-6 * (own + far * far) + TINY;
                float& best = most[g * ROWS + r];
                best = settled ? -INFINITY : std::abs(score) < 1e38 ? static_cast<float>(score) : INFINITY;
                key[g] = std::max(key[g], best);
            }
            enough[r] = probes_ > 0 ? probe_limit(most, r, key + groups) : -INFINITY;
        }
        std::iota(order, order + groups, int64_t{0});
        std::stable_sort(order, order + groups, [key](int64_t a, int64_t b) { return key[a] > key[b]; });
        int64_t seen = 0;
        for (int64_t i = 0; i < groups; ++i) {
            const int64_t g = order[i];
            bool wanted = false;
            for (int64_t r = 0; r < rows; ++r) {
                const float limit = candidates.limit(t * ROWS + r), best = most[g * ROWS + r];
                wanted |= best >= limit && best > -INFINITY && (best >= enough[r] || limit == -INFINITY);
            }
            if (!wanted) continue;
            for (int64_t c = bank_.starts[g]; c < bank_.starts[g + 1]; c += group_) {
                scan(t, count, c, std::min(group_, bank_.starts[g + 1] - c), candidates, hits, buffer);
            }
            seen += bank_.starts[g + 1] - bank_.starts[g];
        }
        for (int64_t r = 0; r < rows; ++r) visited[order_[t * ROWS + r]] = seen;
    }

    // The score that the best `probes` groups of row r may reach.
    float probe_limit(const float* most, int64_t r, float* sorted) const {
        const int64_t groups = bank_.groups;
        if (probes_ >= groups) return -INFINITY;
        for (int64_t g = 0; g < groups; ++g) sorted[g] = most[g * ROWS + r];
        std::nth_element(sorted, sorted + probes_ - 1, sorted + groups, std::greater<>());
        return sorted[probes_ - 1];
    }

    void finish(int64_t i, Candidates& candidates, float* buffer, float* distance, int64_t* index) {
        if (candidates.threshold(i) < INFINITY) {
            candidates.finish(i, measure_, bank_.rows, buffer, distance, index);
            return;
        }
        for (int j = 0; j < k_; ++j) {
            distance[j] = whole_[order_[i]] ? 1 : NAN;  // a zero row has cosine 0 to everything
            index[j] = j;
        }
    }

    const Measure& measure_;
    const Int8Tile& int8_;
    const PackedBank& bank_;
    const int64_t d_, quads_, tile_size_, probes_, group_;
    const int k_, threads_;
    const float gamma_;
    int64_t own_;
    Array<float> scratch_, prepared_, panels_, half_, to_group_, scale_;
    Array<int64_t> nearest_, order_, orders_;
    Array<double> sq_norm_;
    Array<int32_t> tiles_, sum_;
    Array<bool> whole_;
    Array<Hit> hits_;
};

}  // namespace

void knn_topk_bank(const Tile& tile, const Int8Tile& int8, const Rows& queries, const PackedBank& bank, int k,
                   Metric metric, int64_t probes, float* distance, int64_t* index, int64_t* visited,
                   int threads) {
#ifndef _OPENMP
    threads = 1;
#endif
    const Array<float> origin = allocate<float>(queries.d);
    std::fill(origin.get(), origin.get() + queries.d, 0.0f);
    const Measure measure{tile, metric, queries.d, origin.get()};
    BankSearch(measure, int8, bank, k, probes, threads).search(queries, distance, index, visited);
}

}  // namespace dinofast
