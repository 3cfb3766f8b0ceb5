// The part of GCC's OpenMP runtime that this module calls, on std::thread: ThreadSanitizer does not see what
// libgomp's own locks order, and would report every parallel loop. This file orders what OpenMP promises to
// order and nothing more: iterations are handed out by relaxed counters. Linked only where
// DINOFAST_SANITIZE=thread.
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr int SHARED = 1024;  // worksharing constructs that one parallel region may meet

struct Team {
    explicit Team(unsigned threads) : size(threads) {}

    void barrier() {
        std::unique_lock<std::mutex> lock(mutex);
        const long round = rounds;
        if (++waiting == size) {
            waiting = 0;
            ++rounds;
            all_came.notify_all();
        } else {
            all_came.wait(lock, [&] { return rounds != round; });
        }
    }

    const unsigned size;
    std::atomic<long> taken[SHARED] = {};  // iterations of each construct, in the order of the source

  private:
    unsigned waiting = 0;
    long rounds = 0;
    std::mutex mutex;
    std::condition_variable all_came;
};

struct Loop {
    long start, end, step, chunk;
};

thread_local Team* team = nullptr;
thread_local unsigned number = 0;
thread_local int constructs = 0;
thread_local Loop loop;
std::mutex critical, atomic, naming;

void run(Team* mine, unsigned which, void (*body)(void*), void* data) {
    team = mine;
    number = which;
    constructs = 0;
    body(data);
    team = nullptr;
    number = 0;
}

std::atomic<long>& next_construct() {
    if (constructs == SHARED) {
        std::fprintf(stderr, "csrc/sanitize/openmp.cpp: more than %d worksharing constructs\n", SHARED);
        std::abort();
    }
    return team->taken[constructs++];
}

// The mutex of a critical section with a name; the compiler gives each name one pointer, null at first.
std::mutex& named(void** place) {
    std::lock_guard<std::mutex> lock(naming);
    if (*place == nullptr) *place = new std::mutex;
    return *static_cast<std::mutex*>(*place);
}

bool take(std::atomic<long>& taken, long* start, long* end) {
    const long left = loop.end - loop.start, step = loop.step * loop.chunk;
    const long first = taken.fetch_add(step, std::memory_order_relaxed);
    if (first >= left) return false;
    *start = loop.start + first;
    *end = left - first < step ? loop.end : *start + step;
    return true;
}

}  // namespace

#define GOMP extern "C" [[gnu::visibility("hidden"), gnu::used]]

GOMP int omp_get_thread_num() { return static_cast<int>(number); }
GOMP int omp_get_num_threads() { return team == nullptr ? 1 : static_cast<int>(team->size); }

GOMP void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
    if (team != nullptr || threads == 0) {
        std::fputs("csrc/sanitize/openmp.cpp: a nested region, or one without num_threads\n", stderr);
        std::abort();
    }
    Team here(threads);
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; ++i) others.emplace_back(run, &here, i, body, data);
    run(&here, 0, body, data);
    for (std::thread& other : others) other.join();
}

GOMP void GOMP_barrier() { team->barrier(); }
GOMP void GOMP_critical_start() { critical.lock(); }
GOMP void GOMP_critical_end() { critical.unlock(); }
GOMP void GOMP_critical_name_start(void** place) { named(place).lock(); }
GOMP void GOMP_critical_name_end(void** place) { named(place).unlock(); }
GOMP void GOMP_atomic_start() { atomic.lock(); }
GOMP void GOMP_atomic_end() { atomic.unlock(); }
GOMP bool GOMP_single_start() { return next_construct().fetch_add(1, std::memory_order_relaxed) == 0; }

GOMP bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* first,
                                               long* last) {
    loop = {start, end, step, chunk};
    return take(next_construct(), first, last);
}

GOMP bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) {
    return take(team->taken[constructs - 1], first, last);
}

GOMP void GOMP_loop_end() { team->barrier(); }
GOMP void GOMP_loop_end_nowait() {}
