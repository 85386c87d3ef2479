// Collectives and transfers between processes of one host, through shared memory.
//
// A ShmEngine is a process's end of a host: a doorbell per process, the channels of its groups, and
// one thread that drives operations while nobody waits. A ShmChannel is a group: lanes of operations,
// one for its collectives and one per peer and direction; lanes progress independently of each other,
// a lane in order. An operation starts with a header from every participant; only when all of them are
// equal does a buffer change.
//
// Whoever waits drives all channels: it spins, then yields its core, then sleeps on a futex that the
// others ring when they have published something. The thread sleeps likewise, so idle ranks take no core.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "reduce.h"
#include "shm_layout.h"

namespace triloom {

enum class ShmVerb : int { all_reduce, reduce_scatter, all_gather, broadcast, all_to_all, barrier, transfer };
using ShmHeaderBytes = std::array<char, kShmHeader>;

// One operation. `elements` counts the rank's input. `refused`: the rank's own arguments did not fit,
// so the operation ends as a mismatch on every rank.
struct ShmOp {
    enum State : int { queued, posted, moving, done, mismatch };

    ShmVerb verb;
    DType dtype;
    ReduceOp reduce;
    int root;
    bool refused;
    char* out;
    const char* in;
    int64_t elements;
    ShmHeaderBytes header;
    std::atomic<bool> ready{true};  // the input may be read
    std::atomic<int> state{queued};
    uint64_t seq = 0;
    int64_t arrived = 0;           // ranks below it are known to have posted
    uint64_t first = 0, steps = 0;  // steps of the lane that are this operation's
    int64_t block = 0;              // bytes of a block in a step: the largest, or a few steps would not overlap
    uint64_t staged = 0, reduced = 0, fetched = 0;
    std::vector<ShmHeaderBytes> said;  // after a mismatch: the headers, by rank (of a transfer: peer's alone)

    int64_t bytes() const { return elements * item_size(dtype); }
    bool over() const { return state.load(std::memory_order_acquire) >= done; }
};
using ShmOpPtr = std::shared_ptr<ShmOp>;

// Operations that are served in order.
class ShmLane {
public:
    virtual ~ShmLane() = default;
    // Goes as far as possible without waiting, at most a step of each kind; whether anything changed.
    bool advance();
    void add(const ShmOpPtr& op);
    bool idle() const { return queue_.empty(); }
    // Whether the others depend on this rank going on, or it on more than one exchange.
    bool wants_driver() const;
    // Ranks (of a transfer: 1 if the peer) that have not arrived, or whose data has not.
    virtual std::vector<int> late(const ShmOp& op) const = 0;
    uint64_t next_seq() const { return next_; }

protected:
    virtual bool post(ShmOp& op) = 0;    // false: no row is free
    virtual int arrive(ShmOp& op) = 0;   // 0: not all there; 1: agreed; 2: a mismatch
    virtual void small(ShmOp& op) = 0;
    virtual void begin(ShmOp& op) = 0;
    virtual bool step(ShmOp& op) = 0;
    virtual bool moved(const ShmOp& op) const = 0;
    virtual bool is_small(const ShmOp& op) const = 0;
    virtual void took(const ShmOp& op) = 0;  // this rank will not read the headers and payloads again

    std::deque<ShmOpPtr> queue_;
    size_t posted_ = 0;
    uint64_t next_ = 0;
    uint64_t steps_ = 0;

private:
    bool front();
};

class ShmEngine;

class ShmChannel {
public:
    // bells: of each rank of the group, its doorbell in the engine. check: compare headers.
    ShmChannel(std::shared_ptr<ShmEngine> engine, int fd, ShmLayout layout, int rank, std::vector<int> bells, bool check);
    ~ShmChannel();
    ShmChannel(const ShmChannel&) = delete;

    ShmOpPtr collective(const ShmOpPtr& op) { return start(*collective_, op); }
    ShmOpPtr transfer(const ShmOpPtr& op, int peer, bool sending) { return start(*pairs_[pair(peer, sending)], op); }
    std::vector<int> late(const ShmOpPtr& op, int peer, bool sending);
    // Headers a peer has posted for operations that were not issued here: {0 collective, 1 it sends, 2 it
    // receives; header}.
    std::vector<std::pair<int, std::string>> unexpected(int peer);
    // No operation touches a tensor after this.
    void close();

    bool advance();  // with the engine's lock
    bool wants_driver() const;
    const std::vector<int>& bells() const { return bells_; }
    bool changed = false;  // something was published since the bells were rung
    int rank() const { return rank_; }

private:
    size_t pair(int peer, bool sending) const { return static_cast<size_t>(peer) * 2 + (sending ? 1 : 0); }
    ShmOpPtr start(ShmLane& lane, const ShmOpPtr& op);

    std::shared_ptr<ShmEngine> engine_;
    ShmView view_;
    int rank_;
    std::vector<int> bells_;
    std::unique_ptr<ShmLane> collective_;
    std::vector<std::unique_ptr<ShmLane>> pairs_;
    std::vector<ShmLane*> busy_;
    bool closed_ = false;
    friend class ShmEngine;
};

class ShmEngine {
public:
    enum Waited : int { timeout = 0, over = 1, ended = 2 };

    // fd: a segment of bells_bytes(ranks). pids: of the processes, by doorbell. spin: seconds a waiter
    // may spin before it offers its core at every look; 0 where processes share cores.
    ShmEngine(int fd, int rank, const std::vector<int>& pids, double spin);
    ~ShmEngine();
    ShmEngine(const ShmEngine&) = delete;
    static int64_t bells_bytes(int ranks);

    // Drives until the operation is over, `seconds` have passed, or a process that is not here any more is
    // found (its doorbells: ended_processes).
    Waited wait(ShmOp& op, double seconds);
    // One round; whether the operation is over.
    bool poll(ShmOp& op);
    void release(ShmOp& op);  // its input may be read from now on
    std::vector<int> ended_processes();
    void stop();

private:
    struct Bell;
    friend class ShmChannel;
    bool advance_all();   // with the lock
    bool wants_driver();  // with the lock
    void arm();           // with the lock: the thread is called when there is something to do
    void ring(ShmChannel& channel);
    void run();
    bool sleep(std::atomic<uint32_t>& word, uint32_t seen, double seconds);

    Bell* bells_;
    int rank_, ranks_;
    double spin_;
    int64_t process_;
    std::vector<int> pidfds_;
    std::mutex mutex_;  // guards channels and their lanes
    std::vector<ShmChannel*> channels_;
    std::atomic<int> drivers_{0};
    std::atomic<bool> stop_{false};
    std::thread thread_;
};

}  // namespace triloom
