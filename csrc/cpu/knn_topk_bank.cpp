#include "knn_topk_bank.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>

#include "bank_queries.h"
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
constexpr int64_t DENSE = 16;           // pairs of a panel and a tile from which codes of all pay
constexpr int64_t FIRST = 2 * COLUMNS;  // columns of a full scan's first look, which all pass

// Columns compared by outlines, by codes or roughly, and those compared exactly.
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
          own_(4 * (d_ + 16) + (BLOCK + 2) * bank.groups) {
        own_hits_ = ROWS * (group_ + COLUMNS);
        hits_ = allocate<Hit>(own_hits_ * threads);
        if (bank.codes != nullptr) codes_.emplace(int8, TILES_OF_CHUNK, d_);
        if (bank.groups == 0) return;
        drawn_.emplace(int8, TILES_OF_CHUNK, bank);
        orders_ = allocate<int64_t>(bank.groups * threads);
        own_codes_ = round_up(drawn_->codes_of_tile() + (codes_ ? codes_->codes_of_tile() : 0), 16);
        gathered_ = allocate<int32_t>(own_codes_ * threads);
        std::fill_n(gathered_.get(), own_codes_ * threads, 0);
    }

    void search(const Rows& queries, float* distance, int64_t* index, int64_t* visited) {
        const int64_t chunk = std::min(queries.count, CHUNK_OF_QUERIES);
        queries_.emplace(measure_, bank_.center, chunk);
        if (bank_.groups > 0) {
            bounds_.emplace(measure_, bank_, chunk);
            own_ = std::max(own_, bounds_->scratch());
        }
        own_ = round_up(own_, 16);
        scratch_ = allocate<float>(own_ * threads_);
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
            for (int64_t q; (q = next_query.fetch_add(1)) < count;) queries_->prepare(queries, start + q, q);
#pragma omp barrier
            if (bank_.groups > 0) {
                for (int64_t t; (t = next_search.fetch_add(1)) * measure_.tile.rows < count;) {
                    bounds_->find(t, count, queries_->rows(), queries_->sq_norms(), queries_->nearest(),
                                  mine);
                }
            }
#pragma omp barrier
#pragma omp single
            queries_->sort(count);
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
                    const int64_t out = start + queries_->at(i);
                    finish(i, candidates, mine, distance + out * k_, index + out * k_);
                }
            }
        }
    }

    // Quantize the queries of tile t, by order, and start their candidates.
    void pack(int64_t t, int64_t count, Candidates& candidates, float* buffer) {
        if (drawn_) drawn_->clear(t);
        if (codes_) codes_->clear(t);
        for (int64_t i = t * ROWS; i < std::min((t + 1) * ROWS, count); ++i) {
            const int64_t q = queries_->at(i);
            const float* x = queries_->rows()[q];
            const double sq_norm = queries_->sq_norms()[q];
            if (drawn_) drawn_->fill(i, bounds_->drawn(q), sq_norm, measure_.origin, buffer);
            if (codes_) codes_->fill(i, x, bank_.center, *bank_.weight, gamma_, buffer);
            candidates.start(i, x, sq_norm, codes_ ? codes_->error(i) : 0);
            if (queries_->kind(q) != BankQueries::Kind::usual) candidates.settle(i);
        }
    }

    // All columns against the queries from begin, the first of a tile, to end: a few first, since without a
    // limit all pass.
    void scan_all(int64_t begin, int64_t end, int64_t count, Candidates& candidates, Hit* hits, float* buffer,
                  int64_t* visited) {
        for (int64_t c = 0, next; c < bank_.columns; c = next) {
            next = std::min(c == 0 ? FIRST : c + group_, bank_.columns);
            for (int64_t first = begin; first < end; first += ROWS) {
                scan(first, std::min<int64_t>(ROWS, count - first), c, next - c, candidates, hits, buffer);
            }
        }
        for (int64_t i = begin; i < end; ++i) tell(i, {0, bank_.columns, 0}, visited);
    }

    // Columns first .. first + columns against the n queries of a tile from `begin` on.
    void scan(int64_t begin, int64_t n, int64_t first, int64_t columns, Candidates& candidates, Hit* hits,
              float* buffer) {
        float threshold[ROWS];
        for (int64_t r = 0; r < ROWS; ++r) threshold[r] = r < n ? candidates.threshold(begin + r) : INFINITY;
        const int64_t found = codes_->sieve(begin / ROWS, bank_, first, columns, threshold, hits);
        for (int64_t h = 0; h < found; ++h) {
            const int64_t column = first + hits[h].column;
            if (hits[h].row >= n || column >= bank_.rows.rows.count) continue;
            candidates.offer(begin + hits[h].row, hits[h].score, bank_.error[column / COLUMNS], column,
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
            const int64_t q = queries_->at(begin + r);
            bounds_->best(q, BLOCK, most + r);
            enough[r] = bounds_->best_of(q, probes_, key);
            bar[r] = candidates.threshold(begin + r) == INFINITY ? INFINITY : -MOST;
        }
        const auto visit = [&](int64_t g, const int64_t* wanted, int64_t count) {
            const int64_t first = bank_.starts[g], columns = bank_.starts[g + 1] - first;
            if (4 * count >= 3 * n) {
                sift_tiles(begin, n, wanted, count, first, columns, candidates, hits, buffer, compared);
            } else {
                sift_collected(begin, wanted, count, first, columns, candidates, hits, buffer, compared);
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
            const int64_t g = nearest(begin + r);
            int64_t count = 0;
            for (next = r; next < n && nearest(begin + next) == g; ++next) {
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

    // The columns of a group against those queries of a block that want them: collected, or where these are
    // most, tile after tile as they are.
    void sift_collected(int64_t begin, const int64_t* wanted, int64_t count, int64_t first, int64_t columns,
                        Candidates& candidates, Hit* hits, float* buffer, Compared* compared) {
        int32_t* const gathered = gathered_.get() + own_codes_ * thread_number();
        for (int64_t i = 0; i < count; i += ROWS) {
            int64_t queries[ROWS];
            const int64_t n = std::min<int64_t>(ROWS, count - i);
            for (int64_t r = 0; r < ROWS; ++r) queries[r] = r < n ? begin + wanted[i + r] : -1;
            QueryOutlines::Tile drawn(*drawn_, queries, n, gathered);
            sift(drawn, queries, begin, first, columns, candidates, hits, buffer, compared);
        }
    }
    void sift_tiles(int64_t begin, int64_t n, const int64_t* wanted, int64_t count, int64_t first,
                    int64_t columns, Candidates& candidates, Hit* hits, float* buffer, Compared* compared) {
        int64_t queries[BLOCK];
        std::fill_n(queries, BLOCK, int64_t{-1});
        for (int64_t i = 0; i < count; ++i) queries[wanted[i]] = begin + wanted[i];
        for (int64_t r = 0; r < n; r += ROWS) {
            QueryOutlines::Tile drawn(*drawn_, (begin + r) / ROWS);
            sift(drawn, queries + r, begin, first, columns, candidates, hits, buffer, compared);
        }
    }

    // By outlines first, which leave few pairs; a query is -1 where there is none.
    void sift(QueryOutlines::Tile& drawn, const int64_t* queries, int64_t begin, int64_t first,
              int64_t columns, Candidates& candidates, Hit* hits, float* buffer, Compared* compared) {
        bool fresh = false;
        for (int64_t r = 0; r < ROWS; ++r) {
            if (queries[r] < 0) continue;
            compared[queries[r] - begin][0] += columns;
            fresh = fresh || candidates.limit(queries[r]) == -INFINITY;
        }
        for (int64_t end = first + columns, next; first < end; first = next) {
            next = std::min(first + group_, end);
            float limits[ROWS];
            for (int64_t r = 0; r < ROWS; ++r) {
                limits[r] = queries[r] < 0 ? INFINITY : candidates.limit(queries[r]);
            }
            int64_t found = drawn.sift(queries, first, next - first, limits, hits);
            if (fresh) found = start(queries, first, hits, found, candidates, buffer, compared, begin);
            fresh = false;
            for (int64_t h = 0, last; h < found; h = last) {
                const int64_t panel = hits[h].column / COLUMNS;
                for (last = h + 1; last < found && hits[last].column / COLUMNS == panel;) ++last;
                decide(queries, first + panel * COLUMNS, hits + h, hits + last, candidates, buffer, compared,
                       begin);
            }
        }
    }

    // Decide those hits in the panel from column `first` on that still matter, some of a query at a time; by
    // codes first where they are many.
    void decide(const int64_t* queries, int64_t first, const Hit* hit, const Hit* end, Candidates& candidates,
                float* buffer, Compared* compared, int64_t begin) {
        if (codes_ && end - hit >= DENSE) {
            return scan(queries, first, hit, end, candidates, buffer, compared, begin);
        }
        while (hit < end) {
            const int32_t row = hit->row;
            int64_t index[Candidates::ROUGH];
            int count = 0;
            for (; hit < end && hit->row == row && count < Candidates::ROUGH; ++hit) {
                const int64_t i = bank_.index[first + hit->column % COLUMNS];
                if (i < 0 || !matters(queries, *hit, candidates)) continue;
                index[count++] = i;
                bank_.prefetch(i);
            }
            if (count == 0) continue;
            Compared& of_query = compared[queries[row] - begin];
            of_query[1] += count;
            of_query[2] += candidates.decide(queries[row], index, count, measure_, bank_.rows, buffer);
        }
    }

    // Whether a hit of outlines may still be among the nearest.
    bool matters(const int64_t* queries, const Hit& hit, const Candidates& candidates) const {
        const int64_t q = queries[hit.row];
        return q >= 0 && !(hit.score + drawn_->error(q) < candidates.limit(q));
    }

    // Offer those hits in a panel that still matter, by their codes.
    void scan(const int64_t* queries, int64_t first, const Hit* hit, const Hit* end, Candidates& candidates,
              float* buffer, Compared* compared, int64_t begin) {
        uint32_t wanted[ROWS] = {};
        for (; hit < end; ++hit) {
            const int64_t column = hit->column % COLUMNS;
            if (bank_.index[first + column] < 0 || !matters(queries, *hit, candidates)) continue;
            wanted[hit->row] |= 1u << column;
        }
        int32_t* const memory = gathered_.get() + own_codes_ * thread_number() + drawn_->codes_of_tile();
        Hit hits[ROWS * COLUMNS];
        QueryTile tile{memory, {}, {}};
        float threshold[ROWS];
        codes_->gather(queries, ROWS, tile);
        for (int r = 0; r < ROWS; ++r) {
            threshold[r] = wanted[r] == 0 ? INFINITY : candidates.threshold(queries[r]);
            if (queries[r] >= 0) compared[queries[r] - begin][1] += COLUMNS;
        }
        const int64_t found = codes_->sieve(tile, bank_, first, COLUMNS, threshold, hits);
        for (const Hit* hit = hits; hit < hits + found; ++hit) {
            if ((wanted[hit->row] >> hit->column & 1) == 0) continue;
            candidates.offer(queries[hit->row], hit->score, bank_.error[first / COLUMNS],
                             bank_.index[first + hit->column], measure_, bank_.rows, buffer);
        }
    }

    // Decide the k columns that look nearest to each query, so that a limit is known; return how many of the
    // other hits, which stay in order, may still matter.
    int64_t start(const int64_t* queries, int64_t first, Hit* hits, int64_t found, Candidates& candidates,
                  float* buffer, Compared* compared, int64_t begin) {
        float best[ROWS][Candidates::MAX_K];
        for (int64_t r = 0; r < ROWS; ++r) std::fill_n(best[r], k_, -INFINITY);
        for (int64_t h = 0; h < found; ++h) {
            float* const top = best[hits[h].row];
            if (!(hits[h].score > top[0])) continue;
            std::pop_heap(top, top + k_, std::greater<>());
            top[k_ - 1] = hits[h].score;
            std::push_heap(top, top + k_, std::greater<>());
        }
        const auto seed = [&](const Hit& hit) { return hit.score >= best[hit.row][0]; };
        for (int64_t h = 0; h < found; ++h) {
            const int64_t row = bank_.index[first + hits[h].column], q = queries[hits[h].row];
            if (q < 0 || !seed(hits[h]) || row < 0) continue;
            candidates.decide(q, row, measure_, bank_.rows, buffer);
            ++compared[q - begin][2];
        }
        const auto idle = [&](const Hit& hit) { return seed(hit) || !matters(queries, hit, candidates); };
        return std::remove_if(hits, hits + found, idle) - hits;
    }

    int64_t nearest(int64_t i) { return queries_->nearest()[queries_->at(i)]; }

    void tell(int64_t i, const Compared& compared, int64_t* visited) const {
        std::copy(compared.begin(), compared.end(), visited + 3 * queries_->at(i));
    }

    void finish(int64_t i, Candidates& candidates, float* buffer, float* distance, int64_t* index) {
        if (candidates.threshold(i) < INFINITY) {
            candidates.finish(i, measure_, bank_.rows, buffer, distance, index);
            return;
        }
        const bool broken = queries_->kind(queries_->at(i)) == BankQueries::Kind::broken;
        for (int j = 0; j < k_; ++j) {
            distance[j] = broken ? NAN : 1;  // a zero row has cosine 0 to everything
            index[j] = j;
        }
    }

    const Measure& measure_;
    const PackedBank& bank_;
    const int64_t d_, probes_, group_;
    const int k_, threads_;
    const float gamma_;
    std::optional<QueryCodes> codes_;
    std::optional<QueryOutlines> drawn_;  // where rows are grouped
    int64_t own_, own_codes_ = 0, own_hits_;
    std::optional<GroupBounds> bounds_;
    std::optional<BankQueries> queries_;
    Array<float> scratch_;
    Array<int64_t> orders_;
    Array<int32_t> gathered_;
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
