#include "dpm_stats.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

#include "threads.h"

namespace dinofast {
namespace {

constexpr int64_t BLOCK = 1024;    // rows whose responsibilities are computed at a time
constexpr int64_t SPLIT = 16;      // tasks below which the channels of one component are shared by threads
constexpr int64_t SEGMENT = 256;   // rows in one float32 sum of products
constexpr int64_t KEPT = 1 << 18;  // responsibilities kept at most, before those of another block come

// The rows of a block and what they weigh, while their moments are added to the results.
struct Block {
    const float* y;  // row i at y + i * stride
    int64_t stride, start, count;
    const float* rest;     // (BLOCK, lanes): the channels after the last whole run of lanes, 0 after the end
    const float* weights;  // see Screen::assign
    const bool* held;      // the same

    // The lanes from channel c on of every row: where they start, and how far apart they are.
    const float* lanes_at(int64_t c, int64_t lanes, int64_t d, int64_t* step) const {
        const bool whole = c + lanes <= d;
        *step = whole ? stride : lanes;
        return whole ? y + c : rest;
    }
};

struct Weight {
    int64_t row;
    float value;
};

class Sums {
  public:
    Sums(const MixtureTile& tile, const Mixture& mixture, const Rows& x, const MixtureSums& out, int threads)
        : tile_(tile),
          mixture_(mixture),
          x_(x),
          out_(out),
          padded_(round_up(x.d, tile.lanes)),
          rows_(allocate<int32_t>(BLOCK * threads)),
          weights_(allocate<float>(BLOCK * tile.components * threads)),
          gathered_(allocate<float>(mixture.full ? SEGMENT * padded_ * threads : 1)),
          kept_(static_cast<size_t>(mixture.full ? mixture.components : 0)),
          count_(static_cast<size_t>(mixture.components)) {}

    // Add the first moments, the counts and, for diagonal covariance, the second moments of one group of
    // components, over the part-th of `parts` shares of the channels.
    void moments(const Block& block, int64_t group, int64_t part, int64_t parts) {
        const int64_t wide = tile_.components, lanes = tile_.lanes, d = mixture_.d, start = group * wide;
        const int64_t members = std::min(wide, mixture_.components - start);
        int32_t* rows = rows_.get() + BLOCK * thread_number();
        float* weights = weights_.get() + BLOCK * wide * thread_number();
        const float* source = block.weights + group * BLOCK * wide;
        const bool* held = block.held + group * BLOCK;
        int64_t used = 0;
        for (int64_t i = 0; i < block.count; ++i) {
            if (!held[i]) continue;
            rows[used] = static_cast<int32_t>(i);
            std::copy(source + i * wide, source + (i + 1) * wide, weights + used++ * wide);
        }
        if (part == 0) {
            for (int64_t n = 0; n < used; ++n) {
                for (int64_t r = 0; r < members; ++r) {
                    count_[static_cast<size_t>(start + r)] += weights[n * wide + r];
                }
            }
        }
        if (used == 0) return;
        alignas(64) float sums[MAX_COMPONENTS * MAX_LANES];
        const int64_t runs = (d + lanes - 1) / lanes;
        for (int64_t c = part * runs / parts * lanes; c < (part + 1) * runs / parts * lanes; c += lanes) {
            int64_t step;
            const float* y = block.lanes_at(c, lanes, d, &step);
            for (const bool square : {false, true}) {
                if (square && mixture_.full) break;
                tile_.weigh(y, step, rows, weights, used, square, sums);
                float* out = (square ? out_.second : out_.first) + start * d + c;
                for (int64_t r = 0; r < members; ++r) {
                    for (int64_t i = 0; i < std::min(lanes, d - c); ++i)
                        out[r * d + i] += sums[r * lanes + i];
                }
            }
        }
    }

    // Keep the weights of a block for `products`.
    void keep(const Block& block) {
        const int64_t wide = tile_.components, k = mixture_.components;
        for (int64_t start = 0; start < k; start += wide) {
            const float* weights = block.weights + start * BLOCK;
            const bool* held = block.held + start / wide * BLOCK;
            for (int64_t i = 0; i < block.count; ++i) {
                if (!held[i]) continue;
                for (int64_t r = 0; r < std::min(wide, k - start); ++r) {
                    const float weight = weights[i * wide + r];
                    if (weight == 0) continue;
                    kept_[static_cast<size_t>(start + r)].push_back({block.start + i, weight});
                    ++kept_count_;
                }
            }
        }
    }

    int64_t kept_count() const { return kept_count_; }

    // Add Σ r x xᵀ of component k over the weights kept, in the part-th of `parts` shares of its rows and the
    // columns that mirror them. `fresh`: nothing is in the results yet; `last`: nothing will follow.
    void products(int64_t k, int64_t part, int64_t parts, bool fresh, bool last) {
        const int64_t wide = tile_.components, d = mixture_.d, runs = (d + wide - 1) / wide;
        const std::vector<Weight>& kept = kept_[static_cast<size_t>(k)];
        const int64_t count = static_cast<int64_t>(kept.size());
        const int64_t begin = part * runs / parts, end = (part + 1) * runs / parts;
        float* second = out_.second + k * d * d;
        for (int64_t i = begin * wide; fresh && count == 0 && i < std::min(end * wide, d); ++i) {
            std::fill_n(second + i * d, i + 1, 0.0f);  // another share mirrors into the columns behind
        }
        for (int64_t start = 0; start < count; start += SEGMENT) {
            const int64_t some = std::min(SEGMENT, count - start);
            const float* y = gather(kept.data() + start, some);
            for (int64_t run = begin; run < end; ++run) {
                add_products(kept.data() + start, y, some, run * wide, fresh && start == 0, second);
            }
        }
        if (!last) return;
        for (int64_t run = begin; run < end; ++run) mirror(run * wide, second);
    }

    void forget() {
        for (std::vector<Weight>& kept : kept_) kept.clear();
        kept_count_ = 0;
    }

    void store_count() const { std::copy(count_.begin(), count_.end(), out_.count); }

  private:
    // Bring rows together, 0 after the last channel.
    const float* gather(const Weight* kept, int64_t count) {
        float* to = gathered_.get() + SEGMENT * padded_ * thread_number();
        int32_t* rows = rows_.get() + BLOCK * thread_number();
        for (int64_t n = 0; n < count; ++n) {
            float* out = to + n * padded_;
            const float* from = x_.get(kept[n].row, out);
            if (from != out) std::copy(from, from + x_.d, out);
            std::fill(out + x_.d, out + padded_, 0.0f);
            rows[n] = static_cast<int32_t>(n);
        }
        return to;
    }

    // Add the products of the channels from `start` on with those before them, or set them if `fresh`.
    void add_products(const Weight* kept, const float* y, int64_t count, int64_t start, bool fresh,
                      float* second) {
        const int64_t wide = tile_.components, lanes = tile_.lanes, d = mixture_.d;
        const int64_t members = std::min(wide, d - start);
        const int32_t* rows = rows_.get() + BLOCK * thread_number();
        float* weights = weights_.get() + BLOCK * wide * thread_number();
        for (int64_t n = 0; n < count; ++n) {
            const float* row = y + n * padded_ + start;
            for (int64_t r = 0; r < members; ++r) weights[n * wide + r] = kept[n].value * row[r];
            for (int64_t r = members; r < wide; ++r) weights[n * wide + r] = 0;
        }
        alignas(64) float sums[MAX_COMPONENTS * MAX_LANES];
        for (int64_t c = 0; c < start + members; c += lanes) {
            tile_.weigh(y + c, padded_, rows, weights, count, false, sums);
            for (int64_t r = 0; r < members; ++r) {
                float* out = second + (start + r) * d + c;
                const float* sum = sums + r * lanes;
                const int64_t here = std::min(lanes, start + r + 1 - c);
                if (fresh) {
                    for (int64_t i = 0; i < here; ++i) out[i] = sum[i];
                } else {
                    for (int64_t i = 0; i < here; ++i) out[i] += sum[i];
                }
            }
        }
    }

    // Fill the columns from `start` on, above the diagonal, from the rows.
    void mirror(int64_t start, float* second) const {
        const int64_t d = mixture_.d, stop = std::min(start + tile_.components, d);
        for (int64_t j = 0; j < stop; ++j) {
            for (int64_t i = std::max(start, j + 1); i < stop; ++i) second[j * d + i] = second[i * d + j];
        }
    }

    const MixtureTile& tile_;
    const Mixture& mixture_;
    const Rows& x_;
    const MixtureSums& out_;
    const int64_t padded_;
    Array<int32_t> rows_;
    Array<float> weights_, gathered_;
    std::vector<std::vector<Weight>> kept_;  // of every component, in order of rows
    int64_t kept_count_ = 0;
    std::vector<double> count_;
};

}  // namespace

int64_t dpm_stats(const Tile& chosen, const Mixture& mixture, const Rows& x, const MixtureSums& out,
                  int64_t* evaluated, double* expectation, int threads) {
    const MixtureTile& tile = *chosen.mixture;
    const int64_t n = x.count, d = x.d, k = mixture.components, wide = tile.components, lanes = tile.lanes;
    const int64_t second_size = mixture.full ? k * d * d : k * d;
#ifndef _OPENMP
    threads = 1;
#endif
    using Clock = std::chrono::steady_clock;
    Clock::time_point begun = Clock::now();
    Clock::duration spent{};
    const Screen screen(tile, mixture, threads);
    spent += Clock::now() - begun;
    if (screen.failed() >= 0) return screen.failed();
    const int64_t held = std::min(n, BLOCK), groups = (k + wide - 1) / wide;
    const int64_t patches = Screen::patches(mixture.full);
    const Array<float> weights = allocate<float>(groups * BLOCK * wide);
    const Array<bool> held_rows = allocate<bool>(groups * BLOCK);
    const Array<float> converted = allocate<float>(x.element == Element::float32 ? 1 : held * d);
    const Array<float> rest = allocate<float>(held * lanes);
    const Array<char> scratch = allocate<char>(screen.scratch() * threads);
    Sums sums(tile, mixture, x, out, threads);
    const int64_t parts = std::max<int64_t>(SPLIT / groups, 1), shares = std::max<int64_t>(SPLIT / k, 1);
    const int64_t moments = groups * parts, products = k * shares;
    std::fill(out.first, out.first + k * d, 0.0f);
    if (!mixture.full || n == 0) std::fill(out.second, out.second + second_size, 0.0f);
    bool broken = !screen.finite(), fresh = true;
    int64_t total = 0;

    for (int64_t start = 0; start < n && screen.finite(); start += BLOCK) {
        const int64_t count = std::min(BLOCK, n - start);
        const bool whole = x.element == Element::float32;
        const float* y = whole ? static_cast<const float*>(x.data) + start * x.stride : converted.get();
        const Block block{y, whole ? x.stride : d, start, count, rest.get(), weights.get(), held_rows.get()};
        begun = Clock::now();
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
#pragma omp for schedule(dynamic) reduction(|| : broken) reduction(+ : total)
            for (int64_t i = 0; i < count; i += patches) {
                const int64_t some = std::min(patches, count - i);
                for (int64_t row = i; row < i + some; ++row) {
                    const float* from = x.get(start + row, whole ? nullptr : converted.get() + row * d);
                    float* to = rest.get() + row * lanes;
                    std::copy(from + d / lanes * lanes, from + d, to);
                    std::fill(to + d % lanes, to + lanes, 0.0f);
                }
                total +=
                    screen.assign(y + i * block.stride, block.stride, some, out.log_likelihood + start + i,
                                  weights.get() + i * wide, held_rows.get() + i, BLOCK, &broken,
                                  scratch.get() + screen.scratch() * thread_number());
            }
            if (thread_number() == 0) spent += Clock::now() - begun;
#pragma omp for schedule(dynamic)
            for (int64_t t = 0; t < moments; ++t) sums.moments(block, t / parts, t % parts, parts);
        }
        const bool last = start + count == n;
        if (!mixture.full) continue;
        sums.keep(block);
        if (!last && sums.kept_count() <= KEPT) continue;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
        for (int64_t t = 0; t < products; ++t) sums.products(t / shares, t % shares, shares, fresh, last);
        sums.forget();
        fresh = false;
    }
    *evaluated = total;
    *expectation = std::chrono::duration<double>(spent).count();
    if (broken && n > 0) {
        if (!screen.finite()) std::fill(out.log_likelihood, out.log_likelihood + n, NAN);
        std::fill(out.count, out.count + k, NAN);
        std::fill(out.first, out.first + k * d, NAN);
        std::fill(out.second, out.second + second_size, NAN);
        return -1;
    }
    sums.store_count();
    return -1;
}

}  // namespace dinofast
