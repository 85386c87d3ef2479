#include "pool.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "error.h"

namespace triloom {

struct Pool::State {
    std::mutex caller;  // held by the one run() in progress
    std::mutex mutex;   // guards all below except next
    std::condition_variable start, finish;
    std::vector<std::thread> workers;
    const std::function<void(int64_t)>* item = nullptr;
    int64_t items = 0;
    std::atomic<int64_t> next{0};
    uint64_t generation = 0;
    int busy = 0;
    bool stop = false;
    std::exception_ptr error;

    void work() {
        try {
            for (int64_t i; (i = next.fetch_add(1)) < items;) (*item)(i);
        } catch (...) {
            next.store(items);  // the others stop at their next item
            std::lock_guard<std::mutex> lock(mutex);
            if (!error) error = std::current_exception();
        }
    }

    void loop() {
        uint64_t seen = 0;
        for (;;) {
            {
                std::unique_lock<std::mutex> lock(mutex);
                start.wait(lock, [&] { return stop || generation != seen; });
                if (stop) return;
                seen = generation;
            }
            work();
            std::lock_guard<std::mutex> lock(mutex);
            if (--busy == 0) finish.notify_one();
        }
    }

    void shut() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            stop = true;
        }
        start.notify_all();
        for (auto& w : workers) w.join();
    }
};

Pool::Pool(int threads) : threads_(threads), process_(getpid()) {
    if (threads < 1) throw Error("a pool needs at least 1 thread, got " + std::to_string(threads));
    state_ = std::make_unique<State>();
    State* s = state_.get();
    try {
        for (int i = 1; i < threads; ++i) s->workers.emplace_back([s] { s->loop(); });
    } catch (const std::system_error& e) {
        const auto started = s->workers.size() + 1;
        s->shut();
        throw Error("a pool of " + std::to_string(threads) + " threads could not start more than " +
                    std::to_string(started) + ": " + e.what() + "; ask for fewer or raise the process limit");
    }
}

Pool::~Pool() {
    if (process_ != getpid()) {
        // The threads exist only in the parent; joining them, or destroying a condition variable
        // they wait on, would hang. The child gives the memory up instead.
        (void)state_.release();
        return;
    }
    state_->shut();
}

void Pool::run(int64_t items, const std::function<void(int64_t)>& item) {
    if (process_ != getpid())
        throw Error("this pool belongs to process " + std::to_string(process_) + " and its threads did not survive fork(); " +
                    "create a Pool in process " + std::to_string(getpid()));
    State& s = *state_;
    if (s.workers.empty() || items <= 1) {
        for (int64_t i = 0; i < items; ++i) item(i);
        return;
    }
    std::lock_guard<std::mutex> one(s.caller);
    {
        std::lock_guard<std::mutex> lock(s.mutex);
        s.item = &item;
        s.items = items;
        s.next.store(0);
        s.error = nullptr;
        s.busy = static_cast<int>(s.workers.size());
        ++s.generation;
    }
    s.start.notify_all();
    s.work();
    std::unique_lock<std::mutex> lock(s.mutex);
    s.finish.wait(lock, [&] { return s.busy == 0; });
    s.item = nullptr;
    if (s.error) std::rethrow_exception(std::exchange(s.error, nullptr));
}

void parallel_for(Pool* pool, int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    const int64_t pieces = (n + grain - 1) / grain;
    const auto piece = [&](int64_t i) { body(i * grain, std::min(n, (i + 1) * grain)); };
    if (pool) return pool->run(pieces, piece);
    for (int64_t i = 0; i < pieces; ++i) piece(i);
}

}  // namespace triloom
