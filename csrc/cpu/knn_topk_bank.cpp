#include "knn_topk_bank.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <optional>

#include "group_bounds.h"
#include "memory.h"
#include "query_outlines.h"
#include "threads.h"

namespace dinofast {
namespace {

constexpr int ROWS = Int8Tile::ROWS, COLUMNS = Int8Tile::COLUMNS;
constexpr int64_t PRIVATE = 384 << 10;  // bytes of codes that one thread reads again and again from its L2
constexpr int64_t TILES = 8;            // tiles that one thread takes at a time
constexpr int64_t CHUNK_OF_QUERIES = 1024;
constexpr int64_t TILES_OF_CHUNK = (CHUNK_OF_QUERIES + ROWS - 1) / ROWS;
constexpr int64_t BLOCK = 6 * ROWS;  // queries that look into groups together
constexpr float MOST = std::numeric_limits<float>::max();
constexpr int64_t DENSE = 16;  // pairs of a panel and a tile from which scanning is faster than deciding each

// Columns compared by outlines, by codes, and those that outlines left over.
using Compared = std::array<int64_t, 3>;

class BankSearch {
  public:
    BankSearch(const Measure& measure, const Int8Tile& int8, const PackedBank& bank, int k, int64_t probes,
               int threads)
        : measure_(measure),
          bank_(bank),
          d_(measure.d),
          probes_(probes),
          group_(std::max(PRIVATE / (4 * quads(measure.d)) / COLUMNS, int64_t{1}) * COLUMNS),
          k_(k),
          threads_(threads),
          gamma_(product_error(measure.d)),
          codes_(int8, TILES_OF_CHUNK, measure.d),
          own_(4 * (d_ + 16) + (BLOCK + 2) * bank.groups) {
        if (bank.groups > 0) drawn_.emplace(int8, TILES_OF_CHUNK, bank);
        orders_ = allocate<int64_t>(bank.groups * threads);
        own_codes_ = round_up(codes_.codes_of_tile() + (drawn_ ? drawn_->codes_of_tile() : 0), 16);
        gathered_ = allocate<int32_t>(own_codes_ * threads);
        std::fill_n(gathered_.get(), own_codes_ * threads, 0);
        own_hits_ = ROWS * (group_ + COLUMNS);
        hits_ = allocate<Hit>(own_hits_ * threads);
    }

    void search(const Rows& queries, float* distance, int64_t* index, int64_t* visited) {
        const int64_t chunk = std::min(queries.count, CHUNK_OF_QUERIES);
        prepared_ = allocate<float>(chunk * d_);
        if (bank_.groups > 0) {
            bounds_.emplace(measure_, bank_, chunk);
            own_ = std::max(own_, bounds_->scratch());
        }
        own_ = round_up(own_, 16);
        scratch_ = allocate<float>(own_ * threads_);
        nearest_ = allocate<int64_t>(chunk);
        order_ = allocate<int64_t>(chunk);
        sq_norm_ = allocate<double>(chunk);
        whole_ = allocate<bool>(chunk);
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
            Hit* const hits = hits_.get() + own_hits_ * thread_number();
            for (int64_t q; (q = next_query.fetch_add(1)) < count;) prepare(queries, start, q, mine);
#pragma omp barrier
            if (bank_.groups > 0) {
                for (int64_t t; (t = next_search.fetch_add(1)) * measure_.tile.rows < count;) {
                    bounds_->find(t, count, prepared_.get(), sq_norm_.get(), nearest_.get(), mine);
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
            const int64_t step =
                bank_.groups > 0 ? BLOCK / ROWS : std::clamp<int64_t>(tiles / (4 * threads_), 1, TILES);
            for (int64_t t; (t = next_tile.fetch_add(step)) < tiles;) {
                const int64_t begin = t * ROWS, end = std::min((t + step) * ROWS, count);
                if (bank_.groups > 0) {
                    scan_groups(begin, end, candidates, hits, mine, visited + 3 * start);
                } else {
                    scan_all(begin, end, count, candidates, hits, mine, visited + 3 * start);
                }
                for (int64_t i = begin; i < end; ++i) {
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

    // Quantize the queries of tile t, by order, and start their candidates.
    void pack(int64_t t, int64_t count, Candidates& candidates, float* buffer) {
        codes_.clear(t);
        if (drawn_) drawn_->clear(t);
        for (int64_t i = t * ROWS; i < std::min((t + 1) * ROWS, count); ++i) {
            const int64_t q = order_[i];
            const float* x = prepared_.get() + q * d_;
            codes_.fill(i, x, bank_.center, *bank_.weight, gamma_, buffer);
            candidates.start(i, x, sq_norm_[q], codes_.error(i));
            const bool zero = measure_.metric == Metric::cosine && measure_.sq_norm(x) == 0;
            if (!whole_[q] || zero) candidates.settle(i);
            if (drawn_) drawn_->fill(i, bounds_->drawn(q), sq_norm_[q], measure_.origin, buffer);
        }
    }

    // All columns against the queries from begin, the first of a tile, to end.
    void scan_all(int64_t begin, int64_t end, int64_t count, Candidates& candidates, Hit* hits, float* buffer,
                  int64_t* visited) {
        for (int64_t c = 0; c < bank_.columns; c += group_) {
            for (int64_t first = begin; first < end; first += ROWS) {
                int64_t queries[ROWS];
                std::iota(queries, queries + ROWS, first);
                const int64_t n = std::min<int64_t>(ROWS, count - first);
                scan(first / ROWS, queries, n, c, std::min(group_, bank_.columns - c), candidates, hits,
                     buffer);
            }
        }
        for (int64_t i = begin; i < end; ++i) tell(i, {0, bank_.columns, 0}, visited);
    }

    // Columns first .. first + columns against a tile of n queries, a number or a QueryTile. With `wanted`,
    // one panel, and a bit for every column that a query wants.
    template <class TileOfQueries>
    void scan(const TileOfQueries& tile, const int64_t* queries, int64_t n, int64_t first, int64_t columns,
              Candidates& candidates, Hit* hits, float* buffer, const uint32_t* wanted = nullptr) {
        float threshold[ROWS];
        for (int64_t r = 0; r < ROWS; ++r) threshold[r] = r < n ? candidates.threshold(queries[r]) : INFINITY;
        const int64_t found =
            codes_.sieve(tile, bank_.codes, bank_.scale, bank_.bias, first, columns, threshold, hits);
        for (int64_t h = 0; h < found; ++h) {
            const int64_t column = first + hits[h].column;
            if (hits[h].row >= n || bank_.index[column] < 0) continue;
            if (wanted != nullptr && (wanted[hits[h].row] >> hits[h].column & 1) == 0) continue;
            candidates.offer(queries[hits[h].row], hits[h].score, bank_.error[column], bank_.index[column],
                             measure_, bank_.rows, buffer);
        }
    }

    // The groups nearest to each query from begin to end, then the others in the order of the best score that
    // one may hold; a query skips groups that cannot help it.
    void scan_groups(int64_t begin, int64_t end, Candidates& candidates, Hit* hits, float* buffer,
                     int64_t* visited) {
        const int64_t groups = bank_.groups, n = end - begin;
        float* const most = buffer + 4 * (d_ + 16);  // (groups, BLOCK): the best score of a query in a group
        float* const key = most + groups * BLOCK;
        float enough[BLOCK], bar[BLOCK];
        Compared compared[BLOCK] = {};
        for (int64_t r = 0; r < n; ++r) {
            const int64_t q = order_[begin + r];
            bounds_->best(q, BLOCK, most + r);
            enough[r] = probes_ > 0 ? probe_limit(most, r, key) : -INFINITY;
            bar[r] = candidates.threshold(begin + r) == INFINITY ? INFINITY : -MOST;
        }
        const auto visit = [&](int64_t g, const int64_t* wanted, int64_t count) {
            const int64_t first = bank_.starts[g], columns = bank_.starts[g + 1] - first;
            for (int64_t i = 0; i < count; i += ROWS) {
                sift(begin, wanted + i, std::min<int64_t>(ROWS, count - i), first, columns, candidates, hits,
                     buffer, compared);
            }
            for (int64_t i = 0; i < count; ++i) {
                const int64_t r = wanted[i];
                const float limit = candidates.limit(begin + r);
                most[g * BLOCK + r] = -INFINITY;
                if (limit > -INFINITY) bar[r] = std::max(limit, enough[r]);
            }
        };
        int64_t wanted[BLOCK];
        for (int64_t r = 0, next; r < n; r = next) {
            const int64_t g = nearest_[order_[begin + r]];
            int64_t count = 0;
            for (next = r; next < n && nearest_[order_[begin + next]] == g; ++next) {
                if (bar[next] < INFINITY) wanted[count++] = next;
            }
            visit(g, wanted, count);
        }
        int64_t* const order = orders_.get() + groups * thread_number();
        int64_t left = 0;
        for (int64_t g = 0; g < groups; ++g) {
            const float* const best = most + g * BLOCK;
            key[g] = -INFINITY;
            for (int64_t r = 0; r < n; ++r) key[g] = std::max(key[g], best[r] < bar[r] ? -INFINITY : best[r]);
            if (key[g] > -INFINITY) order[left++] = g;
        }
        std::sort(order, order + left,
                  [key](int64_t a, int64_t b) { return key[a] > key[b] || (key[a] == key[b] && a < b); });
        for (int64_t i = 0; i < left; ++i) {
            const float* const best = most + order[i] * BLOCK;
            int64_t count = 0;
            for (int64_t r = 0; r < n; ++r) {
                wanted[count] = r;
                count += !(best[r] < bar[r]);
            }
            visit(order[i], wanted, count);
        }
        for (int64_t r = 0; r < n; ++r) tell(begin + r, compared[r], visited);
    }

    // The columns of a group against n queries of a block, by outlines first, which leave few pairs: these
    // are decided, or scanned where they are many.
    void sift(int64_t begin, const int64_t* block, int64_t n, int64_t first, int64_t columns,
              Candidates& candidates, Hit* hits, float* buffer, Compared* compared) {
        int32_t* const gathered = gathered_.get() + own_codes_ * thread_number();
        QueryTile whole{gathered + drawn_->codes_of_tile(), {}, {}};
        bool ready = false, fresh = false;
        int64_t queries[ROWS];
        for (int64_t r = 0; r < n; ++r) {
            queries[r] = begin + block[r];
            compared[block[r]][0] += columns;
            fresh = fresh || candidates.limit(queries[r]) == -INFINITY;
        }
        const QueryOutlines::Tile drawn(*drawn_, queries, n, gathered);
        for (int64_t end = first + columns; first < end; first += group_) {
            float limits[ROWS];
            for (int64_t r = 0; r < n; ++r) limits[r] = candidates.limit(queries[r]);
            int64_t found = drawn.sift(first, std::min(group_, end - first), limits, hits);
            if (fresh) found = start(queries, n, first, hits, found, candidates, buffer, compared, block);
            fresh = false;
            for (int64_t h = 0, next; h < found; h = next) {
                const int64_t panel = hits[h].column / COLUMNS;
                for (next = h + 1; next < found && hits[next].column / COLUMNS == panel;) ++next;
                if (next - h >= DENSE) {
                    if (!ready) codes_.gather(queries, n, whole);
                    ready = true;
                    uint32_t wanted[ROWS] = {};  // not those that are decided already
                    for (; h < next; ++h) wanted[hits[h].row] |= 1u << hits[h].column % COLUMNS;
                    scan(whole, queries, n, first + panel * COLUMNS, COLUMNS, candidates,
                         hits + ROWS * group_, buffer, wanted);
                    for (int64_t r = 0; r < n; ++r) compared[block[r]][1] += COLUMNS;
                    continue;
                }
                for (; h < next; ++h) {
                    const int64_t r = hits[h].row, row = bank_.index[first + hits[h].column];
                    if (h + 1 < found) prefetch(bank_.index[first + hits[h + 1].column]);
                    if (r >= n || row < 0) continue;
                    if (hits[h].score + drawn_->error(queries[r]) < candidates.limit(queries[r])) continue;
                    candidates.decide(queries[r], row, measure_, bank_.rows, buffer);
                    ++compared[block[r]][2];
                }
            }
        }
    }

    // Decide the k columns that look nearest to each query, so that a limit is known; return how many of the
    // other hits, which stay in order, may still matter.
    int64_t start(const int64_t* queries, int64_t n, int64_t first, Hit* hits, int64_t found,
                  Candidates& candidates, float* buffer, Compared* compared, const int64_t* block) {
        float best[ROWS][Candidates::MAX_K];
        for (int64_t r = 0; r < n; ++r) std::fill_n(best[r], k_, -INFINITY);
        for (int64_t h = 0; h < found; ++h) {
            if (hits[h].row >= n) continue;
            float* const top = best[hits[h].row];
            if (!(hits[h].score > top[0])) continue;
            std::pop_heap(top, top + k_, std::greater<>());
            top[k_ - 1] = hits[h].score;
            std::push_heap(top, top + k_, std::greater<>());
        }
        const auto seed = [&](const Hit& hit) { return hit.row < n && hit.score >= best[hit.row][0]; };
        for (int64_t h = 0; h < found; ++h) {
            const int64_t row = bank_.index[first + hits[h].column];
            if (!seed(hits[h]) || row < 0) continue;
            candidates.decide(queries[hits[h].row], row, measure_, bank_.rows, buffer);
            ++compared[block[hits[h].row]][2];
        }
        const auto idle = [&](const Hit& hit) {
            return hit.row >= n || seed(hit) ||
                   hit.score + drawn_->error(queries[hit.row]) < candidates.limit(queries[hit.row]);
        };
        return std::remove_if(hits, hits + found, idle) - hits;
    }

    void prefetch(int64_t row) const {
        const float* const rows = static_cast<const float*>(bank_.rows.rows.data);
        const float* const data = rows + std::max<int64_t>(row, 0) * d_;
        for (int64_t k = 0; k < d_; k += 16) __builtin_prefetch(data + k);
    }

    void tell(int64_t i, const Compared& compared, int64_t* visited) const {
        std::copy(compared.begin(), compared.end(), visited + 3 * order_[i]);
    }

    // The score that the best `probes` groups of row r may reach.
    float probe_limit(const float* most, int64_t r, float* sorted) const {
        const int64_t groups = bank_.groups;
        if (probes_ >= groups) return -INFINITY;
        for (int64_t g = 0; g < groups; ++g) sorted[g] = most[g * BLOCK + r];
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
    const PackedBank& bank_;
    const int64_t d_, probes_, group_;
    const int k_, threads_;
    const float gamma_;
    QueryCodes codes_;
    std::optional<QueryOutlines> drawn_;
    int64_t own_, own_codes_, own_hits_;
    std::optional<GroupBounds> bounds_;
    Array<float> scratch_, prepared_;
    Array<int64_t> nearest_, order_, orders_;
    Array<int32_t> gathered_;
    Array<double> sq_norm_;
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
