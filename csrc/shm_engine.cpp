#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <climits>
#include <cstring>

#include "shm.h"

namespace triloom {

// state: bit 0 the thread wants to be rung, above it the number of sleeping waiters. The two words are
// bumped before a futex wake, so that who was about to sleep does not.
struct alignas(kShmLine) ShmEngine::Bell {
    std::atomic<uint32_t> state, waiter, thread;
};

namespace {

using Clock = std::chrono::steady_clock;

constexpr uint32_t kThread = 1, kWaiter = 2;
constexpr double kNap = 0.05;           // seconds after which a sleeper looks whether all processes live
constexpr double kThreadSpin = 10e-6;   // the thread takes the core from the program's own work: hardly spins
constexpr double kYieldFor = 200e-6;    // of a waiter, before it sleeps

double since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

long futex(std::atomic<uint32_t>& word, int op, uint32_t value, const timespec* timeout) {
    return syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), op, value, timeout, nullptr, 0);
}

void wake(std::atomic<uint32_t>& word) {
    word.fetch_add(1);
    futex(word, FUTEX_WAKE, INT_MAX, nullptr);
}

int open_process(int pid) {
#ifdef SYS_pidfd_open
    return static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
#else
    (void)pid;
    return -1;
#endif
}

}  // namespace

int64_t ShmEngine::bells_bytes(int ranks) { return ranks * static_cast<int64_t>(sizeof(Bell)); }

ShmEngine::ShmEngine(int fd, int rank, const std::vector<int>& pids, double spin)
    : rank_(rank), ranks_(static_cast<int>(pids.size())), spin_(spin), process_(getpid()) {
    require(rank >= 0 && rank < ranks_, "shm: rank outside the host");
    void* at = mmap(nullptr, static_cast<size_t>(bells_bytes(ranks_)), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) throw Error(std::string("cannot map the doorbells: ") + std::strerror(errno));
    bells_ = static_cast<Bell*>(at);
    for (int r = 0; r < ranks_; ++r) pidfds_.push_back(r == rank ? -1 : open_process(pids[static_cast<size_t>(r)]));
    sigset_t all, before;
    sigfillset(&all);  // signals are for the program's own threads
    pthread_sigmask(SIG_SETMASK, &all, &before);
    thread_ = std::thread([this] { run(); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

ShmEngine::~ShmEngine() {
    if (process_ != getpid()) {  // a forked child: the thread is the parent's
        thread_.detach();
        return;
    }
    stop();
    for (int fd : pidfds_)
        if (fd >= 0) ::close(fd);
    munmap(bells_, static_cast<size_t>(bells_bytes(ranks_)));
}

void ShmEngine::stop() {
    stop_.store(true);
    wake(bells_[rank_].thread);
    if (thread_.joinable()) thread_.join();
}

bool ShmEngine::advance_all() {
    bool any = false;
    for (ShmChannel* channel : channels_)
        if (channel->advance()) {
            ring(*channel);
            any = true;
        }
    return any;
}

bool ShmEngine::wants_driver() {
    for (const ShmChannel* channel : channels_)
        if (channel->wants_driver()) return true;
    return false;
}

// What was published is visible before the others' states are read, and they look once more after having set them.
void ShmEngine::ring(ShmChannel& channel) {
    std::atomic_thread_fence(std::memory_order_seq_cst);
    for (int b : channel.bells()) {
        if (b == rank_) continue;
        const uint32_t state = bells_[b].state.load(std::memory_order_relaxed);
        if (state >= kWaiter) wake(bells_[b].waiter);
        else if (state & kThread) wake(bells_[b].thread);
    }
}

void ShmEngine::arm() {
    if (stop_.load()) return;
    bells_[rank_].state.fetch_or(kThread);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (advance_all() && wants_driver()) wake(bells_[rank_].thread);
}

bool ShmEngine::poll(ShmOp& op) {
    if (op.over()) return true;
    std::lock_guard<std::mutex> lock(mutex_);
    advance_all();
    return op.over();
}

void ShmEngine::release(ShmOp& op) {
    op.ready.store(true);
    std::lock_guard<std::mutex> lock(mutex_);
    advance_all();
    if (drivers_.load() == 0 && wants_driver()) arm();
}

ShmEngine::Waited ShmEngine::wait(ShmOp& op, double seconds) {
    if (op.over()) return over;
    Bell& bell = bells_[rank_];
    drivers_.fetch_add(1);
    bell.state.fetch_and(~kThread);
    const auto begin = Clock::now();
    auto idle_since = begin;
    Waited result = timeout;
    for (int turn = 0;; ++turn) {
        const uint32_t seen = bell.waiter.load();
        bool any;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            any = advance_all();
        }
        if (op.over()) {
            result = over;
            break;
        }
        if (any) {
            idle_since = Clock::now();
            continue;
        }
        if (spin_ > 0 && turn % 32) {
            relax();
            continue;
        }
        const double idle = since(idle_since);
        if (idle < spin_) continue;
        if (since(begin) >= seconds) break;
        if (idle < spin_ + kYieldFor) {
            sched_yield();
            continue;
        }
        bell.state.fetch_add(kWaiter);
        std::atomic_thread_fence(std::memory_order_seq_cst);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            any = advance_all();
        }
        const bool slept = !any && !op.over() && sleep(bell.waiter, seen, std::min(kNap, std::max(0.0, seconds - since(begin))));
        bell.state.fetch_sub(kWaiter);
        if (slept && !ended_processes().empty()) {
            result = ended;
            break;
        }
        if (any) idle_since = Clock::now();
    }
    if (drivers_.fetch_sub(1) == 1) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (drivers_.load() == 0 && wants_driver()) arm();
    }
    return result;
}

// True if the time passed without a ring.
bool ShmEngine::sleep(std::atomic<uint32_t>& word, uint32_t seen, double seconds) {
    const auto whole = static_cast<time_t>(seconds);
    const timespec limit{whole, static_cast<long>((seconds - static_cast<double>(whole)) * 1e9)};
    return futex(word, FUTEX_WAIT, seen, &limit) == -1 && errno == ETIMEDOUT;
}

std::vector<int> ShmEngine::ended_processes() {
    std::vector<int> found;
    for (int r = 0; r < ranks_; ++r) {
        pollfd probe{pidfds_[static_cast<size_t>(r)], POLLIN, 0};
        if (probe.fd >= 0 && ::poll(&probe, 1, 0) == 1) found.push_back(r);
    }
    return found;
}

void ShmEngine::run() {
    Bell& bell = bells_[rank_];
    auto idle_since = Clock::now();
    while (!stop_.load()) {
        const uint32_t seen = bell.thread.load();
        bool any = false, wanted = false;
        if (drivers_.load() == 0) {
            std::lock_guard<std::mutex> lock(mutex_);
            wanted = wants_driver();
            if (wanted) {
                bell.state.fetch_or(kThread);
                std::atomic_thread_fence(std::memory_order_seq_cst);
                any = advance_all();
            } else {
                bell.state.fetch_and(~kThread);
            }
        }
        if (any) idle_since = Clock::now();
        if (any || (wanted && since(idle_since) < kThreadSpin)) {
            sched_yield();
            continue;
        }
        sleep(bell.thread, seen, 1.0);
    }
}

}  // namespace triloom
