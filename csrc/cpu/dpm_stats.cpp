#include "dpm_stats.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

#include "threads.h"

namespace dinofast {
namespace {

constexpr int64_t BLOCK = 1024;  // rows whose responsibilities are held at a time
constexpr int64_t SPLIT = 16;    // tasks below which the channels of one component are shared by threads

// The rows of a block and what they weigh, while its sums are added to the results.
struct Block {
    const float* y;  // row i at y + i * stride
    int64_t stride, count;
    const float* rest;     // (BLOCK, lanes): the channels after the last whole run of lanes, 0 after the end
    const float* weights;  // see Screen::assign
    const bool* held;      // the same
    bool first;            // nothing is in the results yet

    // The lanes from channel c on of every row: where they start, and how far apart they are.
    const float* lanes_at(int64_t c, int64_t lanes, int64_t d, int64_t* step) const {
        const bool whole = c + lanes <= d;
        *step = whole ? stride : lanes;
        return whole ? y + c : rest;
    }
};

class Sums {
  public:
    Sums(const MixtureTile& tile, const Mixture& mixture, const MixtureSums& out, int threads)
        : tile_(tile),
          mixture_(mixture),
          out_(out),
          rows_(allocate<int32_t>(BLOCK * threads)),
          weights_(allocate<float>(BLOCK * tile.components * threads)),
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

    // Add the lower triangle of Σ r x xᵀ of component k, over the part-th of `parts` shares of its rows.
    void products(const Block& block, int64_t k, int64_t part, int64_t parts) {
        const int64_t wide = tile_.components, lanes = tile_.lanes, d = mixture_.d;
        int32_t* rows = rows_.get() + BLOCK * thread_number();
        float* weights = weights_.get() + BLOCK * wide * thread_number();
        const float* source = block.weights + k / wide * BLOCK * wide + k % wide;
        const bool* held = block.held + k / wide * BLOCK;
        float* second = out_.second + k * d * d;
        int64_t used = 0;
        for (int64_t i = 0; i < block.count; ++i) {
            if (held[i] && source[i * wide] != 0) rows[used++] = static_cast<int32_t>(i);
        }
        const int64_t runs = (d + wide - 1) / wide;
        alignas(64) float sums[MAX_COMPONENTS * MAX_LANES];
        for (int64_t run = part * runs / parts; run < (part + 1) * runs / parts; ++run) {
            const int64_t start = run * wide, members = std::min(wide, d - start);
            if (block.first) std::fill(second + start * d, second + (start + members) * d, 0.0f);
            if (used == 0) continue;
            for (int64_t n = 0; n < used; ++n) {
                const float weight = source[rows[n] * wide];
                const float* y = block.y + rows[n] * block.stride + start;
                for (int64_t r = 0; r < wide; ++r) weights[n * wide + r] = r < members ? weight * y[r] : 0;
            }
            for (int64_t c = 0; c < start + members; c += lanes) {
                int64_t step;
                const float* y = block.lanes_at(c, lanes, d, &step);
                tile_.weigh(y, step, rows, weights, used, false, sums);
                for (int64_t r = 0; r < members; ++r) {
                    float* out = second + (start + r) * d + c;
                    for (int64_t i = 0; i < std::min(lanes, start + r + 1 - c); ++i) {
                        out[i] += sums[r * lanes + i];
                    }
                }
            }
        }
    }

    // Fill the upper triangle of component k from the lower one.
    void mirror(int64_t k) const {
        constexpr int64_t STEP = 16;
        const int64_t d = mixture_.d;
        float* second = out_.second + k * d * d;
        for (int64_t i = 0; i < d; i += STEP) {
            for (int64_t j = 0; j <= i; j += STEP) {
                for (int64_t a = i; a < std::min(i + STEP, d); ++a) {
                    for (int64_t b = j; b < std::min(j + STEP, a); ++b) second[b * d + a] = second[a * d + b];
                }
            }
        }
    }

    void store_count() const { std::copy(count_.begin(), count_.end(), out_.count); }

  private:
    const MixtureTile& tile_;
    const Mixture& mixture_;
    const MixtureSums& out_;
    Array<int32_t> rows_;
    Array<float> weights_;
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
    Sums sums(tile, mixture, out, threads);
    const int64_t parts = std::max<int64_t>(SPLIT / groups, 1), shares = std::max<int64_t>(SPLIT / k, 1);
    const int64_t moments = groups * parts, products = mixture.full ? k * shares : 0;
    std::fill(out.first, out.first + k * d, 0.0f);
    if (!mixture.full || n == 0) std::fill(out.second, out.second + second_size, 0.0f);
    bool broken = !screen.finite();
    int64_t total = 0;

    for (int64_t start = 0; start < n && screen.finite(); start += BLOCK) {
        const int64_t count = std::min(BLOCK, n - start);
        const bool whole = x.element == Element::float32;
        const float* y = whole ? static_cast<const float*>(x.data) + start * x.stride : converted.get();
        const Block block{y,         whole ? x.stride : d, count, rest.get(), weights.get(), held_rows.get(),
                          start == 0};
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
#pragma omp for schedule(dynamic) nowait
            for (int64_t t = 0; t < moments; ++t) sums.moments(block, t / parts, t % parts, parts);
#pragma omp for schedule(dynamic)
            for (int64_t t = 0; t < products; ++t) sums.products(block, t / shares, t % shares, shares);
        }
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
    if (mixture.full && n > 0) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
        for (int64_t c = 0; c < k; ++c) sums.mirror(c);
    }
    return -1;
}

}  // namespace dinofast
