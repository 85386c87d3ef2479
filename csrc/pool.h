// A pool of threads, created and passed explicitly.
//
// Work is cut into numbered items before any thread is involved, and each item writes its own
// place: which thread runs an item, and how many threads there are, cannot change a result.
//
// Rules. Calls from several threads are served one after the other. An item must not use the pool
// that runs it. Threads do not survive fork(): a pool used in a forked child throws, and the child
// makes its own; a forked child may destroy its copy of the object safely.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace triloom {

class Pool {
public:
    // threads >= 1 counts the caller, which works too: Pool(1) starts no thread.
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return threads_; }

    // item(0) ... item(items - 1), each once, in any order; returns when all are done. The first
    // exception thrown by an item is thrown again here, after the others have stopped.
    void run(int64_t items, const std::function<void(int64_t)>& item);

private:
    struct State;
    std::unique_ptr<State> state_;
    int threads_;
    int64_t process_;
};

// body(begin, end) over [0, n) in fixed pieces of `grain`; pool may be null (the caller does all).
void parallel_for(Pool* pool, int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

}  // namespace triloom
