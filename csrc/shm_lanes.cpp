#include "shm_lanes.h"

#include <algorithm>
#include <cstring>

namespace triloom {

namespace {

constexpr uint64_t kDepth = static_cast<uint64_t>(kShmDepth);

constexpr int64_t kLeastBlock = 32 << 10;

// A block for n bytes: at least four steps, so that the ends work at the same time, if that leaves enough for each.
int64_t block_for(int64_t n, int64_t most) {
    const int64_t quarter = (n / 4 + 63) / 64 * 64;
    return std::min(most, std::max(quarter, kLeastBlock));
}

uint64_t pieces(int64_t n, int64_t each) { return static_cast<uint64_t>((n + each - 1) / each); }

void publish(const ShmRow& row, const ShmOp& op, const char* payload, int64_t bytes) {
    std::memcpy(row.base, op.header.data(), op.header.size());
    shm_copy(row.payload(), payload, bytes);
    row.stamp().store(op.seq + 1, std::memory_order_release);
}

bool differs(const ShmRow& row, const ShmOp& op) { return std::memcmp(row.base, op.header.data(), op.header.size()) != 0; }

ShmHeaderBytes header_of(const ShmRow& row) {
    ShmHeaderBytes bytes;
    std::memcpy(bytes.data(), row.base, bytes.size());
    return bytes;
}

}  // namespace

void shm_copy(char* dst, const char* src, int64_t n) {
    if (n > 0 && dst != src) std::memcpy(dst, src, static_cast<size_t>(n));
}

// -- what all lanes do -------------------------------------------------------------------------------

void ShmLane::add(const ShmOpPtr& op) {
    op->seq = next_++;
    queue_.push_back(op);
}

bool ShmLane::wants_driver() const {
    if (posted_ < queue_.size()) return true;
    return std::any_of(queue_.begin(), queue_.end(), [this](const ShmOpPtr& op) { return !is_small(*op); });
}

bool ShmLane::advance() {
    bool any = false;
    while (posted_ < queue_.size() && queue_[posted_]->ready.load(std::memory_order_acquire) && post(*queue_[posted_])) {
        queue_[posted_++]->state.store(ShmOp::posted, std::memory_order_relaxed);
        any = true;
    }
    while (posted_ > 0) {
        const bool moving = queue_.front()->state.load(std::memory_order_relaxed) == ShmOp::moving;
        if (!front()) break;
        any = true;
        if (moving) break;
    }
    return any;
}

bool ShmLane::front() {
    const ShmOpPtr op = queue_.front();
    const auto end = [this, &op](ShmOp::State state) {
        queue_.pop_front();
        --posted_;
        op->state.store(state, std::memory_order_release);
        return true;
    };
    if (op->state.load(std::memory_order_relaxed) == ShmOp::moving) {
        const bool any = step(*op);
        if (!moved(*op)) return any;
        steps_ += op->steps;
        return end(ShmOp::done);
    }
    const int agreed = arrive(*op);
    if (agreed == 0) return false;
    const bool at_once = agreed == 1 && is_small(*op);
    if (at_once) small(*op);
    took(*op);
    if (agreed != 1) return end(ShmOp::mismatch);
    if (at_once) return end(ShmOp::done);
    op->first = op->staged = op->reduced = op->fetched = steps_;
    begin(*op);
    op->state.store(ShmOp::moving, std::memory_order_relaxed);
    return true;
}

// -- collectives -------------------------------------------------------------------------------------

bool ShmCollectiveLane::all(ShmCount ShmRankCounts::* count, uint64_t least) const {
    for (int q = 0; q < ranks(); ++q)
        if ((view_.counts(q).*count).get() < least) return false;
    return true;
}

bool ShmCollectiveLane::post(ShmOp& op) {
    if (op.seq >= kShmRows && !all(&ShmRankCounts::taken, op.seq + 1 - kShmRows)) return false;
    const bool carries = is_small(op) && !op.refused && (op.verb != ShmVerb::broadcast || op.root == rank_);
    publish(view_.row(rank_, op.seq), op, op.in, carries ? op.bytes() : 0);
    return true;
}

int ShmCollectiveLane::arrive(ShmOp& op) {
    for (; op.arrived < ranks(); ++op.arrived)
        if (!view_.row(op.arrived, op.seq).holds(op.seq)) return 0;
    bool equal = !op.refused;
    for (int q = 0; check_ && q < ranks(); ++q)
        if (q != rank_ && differs(view_.row(q, op.seq), op)) equal = false;
    if (equal) return 1;
    for (int q = 0; q < ranks(); ++q) op.said.push_back(header_of(view_.row(q, op.seq)));
    return 2;
}

void ShmCollectiveLane::small(ShmOp& op) {
    const auto payload = [&](int q) { return view_.row(q, op.seq).payload(); };
    const int64_t size = op.bytes(), part = size / ranks();
    switch (op.verb) {
        case ShmVerb::all_reduce:
        case ShmVerb::reduce_scatter: {
            const bool scatter = op.verb == ShmVerb::reduce_scatter;
            inputs_.clear();
            for (int q = 0; q < ranks(); ++q) inputs_.push_back(payload(q) + (scatter ? rank_ * part : 0));
            return reduce_ranks(op.out, inputs_, op.dtype, scatter ? op.elements / ranks() : op.elements, op.reduce, nullptr);
        }
        case ShmVerb::all_gather:
            for (int q = 0; q < ranks(); ++q) shm_copy(op.out + q * size, payload(q), size);
            return;
        case ShmVerb::broadcast:
            if (op.root != rank_) shm_copy(op.out, payload(op.root), size);
            return;
        case ShmVerb::all_to_all:
            for (int q = 0; q < ranks(); ++q) shm_copy(op.out + q * part, payload(q) + rank_ * part, part);
            return;
        default: return;
    }
}

void ShmCollectiveLane::begin(ShmOp& op) {
    const bool reduces = op.verb == ShmVerb::all_reduce || op.verb == ShmVerb::reduce_scatter;
    const bool wide = op.verb == ShmVerb::all_gather || op.verb == ShmVerb::broadcast;
    const int64_t share = reduces ? part(op, -1, op.first).bytes : (op.bytes() + ranks() - 1) / ranks();
    op.block = block_for(share, view_.layout.block_bytes);
    op.steps = wide ? pieces(op.bytes(), ranks() * op.block) : pieces(share, op.block);
}

// Chunks of whole cache lines for an all_reduce, whose cut is free; owner -1 asks for the length of the longest.
ShmCollectiveLane::Piece ShmCollectiveLane::part(const ShmOp& op, int64_t owner, uint64_t t) const {
    const int64_t item = item_size(op.dtype), line = 64 / item;
    int64_t chunk = op.elements / ranks();
    if (op.verb == ShmVerb::all_reduce) chunk = ((op.elements + ranks() - 1) / ranks() + line - 1) / line * line;
    if (owner < 0) return {0, chunk * item};
    const int64_t end = std::min((owner + 1) * chunk, op.elements) * item;
    const int64_t at = std::min(owner * chunk * item + static_cast<int64_t>(t - op.first) * op.block, end);
    return {at, std::min(op.block, end - at)};
}

ShmCollectiveLane::Piece ShmCollectiveLane::wide(int64_t total, const ShmOp& op, uint64_t t) const {
    const int64_t width = ranks() * op.block, at = static_cast<int64_t>(t - op.first) * width;
    return {at, std::min(width, total - at)};
}

ShmCollectiveLane::Piece ShmCollectiveLane::chunk(const ShmOp& op, uint64_t t) const {
    const int64_t at = static_cast<int64_t>(t - op.first) * op.block;
    return {at, std::min(op.block, op.bytes() / ranks() - at)};
}

void ShmCollectiveLane::stage(const ShmOp& op, uint64_t t) {
    const int64_t share = op.bytes() / ranks();
    switch (op.verb) {
        case ShmVerb::all_reduce:
        case ShmVerb::reduce_scatter:
            for (int q = 0; q < ranks(); ++q) {
                const Piece p = part(op, q, t);
                if (q != rank_) shm_copy(view_.stage(rank_, t, q), op.in + p.at, p.bytes);
            }
            return;
        case ShmVerb::all_gather: {
            const Piece p = wide(op.bytes(), op, t);
            shm_copy(view_.stage(rank_, t, 0), op.in + p.at, p.bytes);
            shm_copy(op.out + rank_ * op.bytes() + p.at, op.in + p.at, p.bytes);
            return;
        }
        case ShmVerb::broadcast: {
            const Piece p = wide(op.bytes(), op, t);
            if (op.root == rank_) shm_copy(view_.stage(rank_, t, 0), op.in + p.at, p.bytes);
            return;
        }
        default: {
            const Piece p = chunk(op, t);
            for (int q = 0; q < ranks(); ++q) {
                char* to = q == rank_ ? op.out + q * share + p.at : view_.stage(rank_, t, q);
                shm_copy(to, op.in + q * share + p.at, p.bytes);
            }
        }
    }
}

void ShmCollectiveLane::reduce(const ShmOp& op, uint64_t t) {
    if (op.verb != ShmVerb::all_reduce && op.verb != ShmVerb::reduce_scatter) return;
    const Piece p = part(op, rank_, t);
    if (p.bytes <= 0) return;
    inputs_.clear();
    for (int q = 0; q < ranks(); ++q) inputs_.push_back(q == rank_ ? op.in + p.at : view_.stage(q, t, rank_));
    const int64_t start = op.verb == ShmVerb::all_reduce ? 0 : rank_ * (op.bytes() / ranks());
    char* out = op.out + p.at - start;
    reduce_ranks(out, inputs_, op.dtype, p.bytes / item_size(op.dtype), op.reduce, nullptr);
    if (op.verb == ShmVerb::all_reduce) shm_copy(view_.result(rank_, t), out, p.bytes);
}

void ShmCollectiveLane::fetch(const ShmOp& op, uint64_t t) {
    for (int i = 1; i < ranks(); ++i) {
        const int q = (rank_ + i) % ranks();
        switch (op.verb) {
            case ShmVerb::all_reduce: {
                const Piece p = part(op, q, t);
                shm_copy(op.out + p.at, view_.result(q, t), p.bytes);
                break;
            }
            case ShmVerb::all_gather: {
                const Piece p = wide(op.bytes(), op, t);
                shm_copy(op.out + q * op.bytes() + p.at, view_.stage(q, t, 0), p.bytes);
                break;
            }
            case ShmVerb::broadcast: {
                const Piece p = wide(op.bytes(), op, t);
                if (q == op.root) shm_copy(op.out + p.at, view_.stage(q, t, 0), p.bytes);
                break;
            }
            case ShmVerb::all_to_all: {
                const Piece p = chunk(op, t);
                shm_copy(op.out + q * (op.bytes() / ranks()) + p.at, view_.stage(q, t, rank_), p.bytes);
                break;
            }
            default: break;
        }
    }
}

// A block may be filled again when everyone has fetched what it held, which implies all earlier use of it.
bool ShmCollectiveLane::may_stage(const ShmOp& op) const {
    return op.staged < op.first + op.steps && (op.staged < kDepth || all(&ShmRankCounts::fetched, op.staged + 1 - kDepth));
}

bool ShmCollectiveLane::may_fetch(const ShmOp& op) const {
    const uint64_t t = op.fetched;
    if (t >= op.reduced) return false;
    if (op.verb == ShmVerb::reduce_scatter) return true;
    if (op.verb == ShmVerb::all_reduce) return all(&ShmRankCounts::reduced, t + 1);
    if (op.verb == ShmVerb::broadcast) return view_.counts(op.root).staged.get() > t;
    return all(&ShmRankCounts::staged, t + 1);
}

bool ShmCollectiveLane::step(ShmOp& op) {
    ShmRankCounts& mine = view_.counts(rank_);
    const bool reduces = op.verb == ShmVerb::all_reduce || op.verb == ShmVerb::reduce_scatter;
    bool any = false;
    if (may_fetch(op)) {
        fetch(op, op.fetched);
        mine.fetched.set(++op.fetched);
        any = true;
    }
    if (op.reduced < op.staged && (!reduces || all(&ShmRankCounts::staged, op.reduced + 1))) {
        reduce(op, op.reduced);
        mine.reduced.set(++op.reduced);
        any = true;
    }
    if (may_stage(op)) {
        stage(op, op.staged);
        mine.staged.set(++op.staged);
        any = true;
    }
    return any;
}

bool ShmCollectiveLane::moved(const ShmOp& op) const { return op.fetched == op.first + op.steps; }

std::vector<int> ShmCollectiveLane::late(const ShmOp& op) const {
    std::vector<int> found;
    const bool moving = op.state.load() == ShmOp::moving;
    for (int q = 0; q < ranks(); ++q) {
        const ShmRankCounts& c = view_.counts(q);
        const bool holds_up = moving ? c.staged.get() <= op.staged || c.reduced.get() <= op.reduced : !view_.row(q, op.seq).holds(op.seq);
        if (q != rank_ && holds_up) found.push_back(q);
    }
    return found;
}

// -- transfers ---------------------------------------------------------------------------------------

bool ShmPairLane::post(ShmOp& op) {
    const ShmPairCounts& counts = pair_.counts();
    const uint64_t taken = (sending_ ? counts.receiver_took : counts.sender_took).get();
    if (op.seq >= kShmRows + taken) return false;
    publish(mine(op.seq), op, op.in, sending_ && is_small(op) && !op.refused ? op.bytes() : 0);
    return true;
}

int ShmPairLane::arrive(ShmOp& op) {
    const ShmRow row = theirs(op.seq);
    if (!row.holds(op.seq)) return 0;
    if (!op.refused && (!check_ || !differs(row, op))) return 1;
    op.said.push_back(header_of(row));
    return 2;
}

void ShmPairLane::took(const ShmOp& op) {
    ShmPairCounts& counts = pair_.counts();
    (sending_ ? counts.sender_took : counts.receiver_took).set(op.seq + 1);
}

void ShmPairLane::small(ShmOp& op) {
    if (!sending_) shm_copy(op.out, theirs(op.seq).payload(), op.bytes());
}

void ShmPairLane::begin(ShmOp& op) {
    op.block = block_for(op.bytes(), pair_.layout.ring_bytes);
    op.steps = pieces(op.bytes(), op.block);
}

bool ShmPairLane::may_step(const ShmOp& op) const {
    const ShmPairCounts& counts = pair_.counts();
    const uint64_t t = op.fetched;
    if (t == op.first + op.steps) return false;
    return sending_ ? t < kDepth + counts.fetched.get() : counts.staged.get() > t;
}

bool ShmPairLane::step(ShmOp& op) {
    if (!may_step(op)) return false;
    ShmPairCounts& counts = pair_.counts();
    const uint64_t t = op.fetched++;
    const int64_t at = static_cast<int64_t>(t - op.first) * op.block;
    const int64_t n = std::min(op.block, op.bytes() - at);
    if (sending_) {
        shm_copy(pair_.block(t), op.in + at, n);
        counts.staged.set(t + 1);
    } else {
        shm_copy(op.out + at, pair_.block(t), n);
        counts.fetched.set(t + 1);
    }
    return true;
}

std::vector<int> ShmPairLane::late(const ShmOp& op) const {
    const bool here = op.state.load() == ShmOp::moving ? may_step(op) : theirs(op.seq).holds(op.seq);
    return here ? std::vector<int>{} : std::vector<int>{1};
}

}  // namespace triloom
