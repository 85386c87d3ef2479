// Where things lie in the segment of one group: the same arithmetic on every rank.
//
// Everything shared is either an atomic that one rank writes, or a region whose turn such an atomic
// announces. A *row* is a 56-byte header, an 8-byte stamp (sequence number + 1, stored last) and a
// small operation's payload; header and stamp share a cache line. Large operations go in *steps*
// through blocks that are used in turn.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace triloom {

constexpr int64_t kShmHeader = 56;
constexpr int64_t kShmLine = 128;  // two cache lines: the prefetcher fetches pairs
constexpr uint64_t kShmRows = 8;   // operations of one lane whose headers may be under way
constexpr int64_t kShmDepth = 4;   // steps of an operation that may be under way

struct alignas(kShmLine) ShmCount {
    std::atomic<uint64_t> value;
    uint64_t get() const { return value.load(std::memory_order_acquire); }
    void set(uint64_t v) { value.store(v, std::memory_order_release); }
};

// Of each rank, for the group's collectives: operations whose rows it will not read again, and steps
// that it has staged (its contribution), reduced (its part) and fetched (everybody's).
struct ShmRankCounts {
    ShmCount taken, staged, reduced, fetched;
};

// Of each ordered pair: rows of the other that each end will not read again, and steps moved.
struct ShmPairCounts {
    ShmCount sender_took, receiver_took, staged, fetched;
};

struct ShmRow {
    char* base;
    std::atomic<uint64_t>& stamp() const { return *reinterpret_cast<std::atomic<uint64_t>*>(base + kShmHeader); }
    bool holds(uint64_t seq) const { return stamp().load(std::memory_order_acquire) == seq + 1; }
    char* payload() const { return base + kShmHeader + 8; }
};

struct ShmLayout {
    int64_t ranks;
    int64_t inline_bytes;  // of a collective's or transfer's payload in its row
    int64_t block_bytes;   // per step and pair of ranks in a collective
    int64_t ring_bytes;    // per step of a transfer

    static int64_t up(int64_t n) { return (n + kShmLine - 1) / kShmLine * kShmLine; }
    int64_t row_bytes() const { return up(kShmHeader + 8 + inline_bytes); }
    int64_t reply_bytes() const { return kShmLine; }
    int64_t stage_bytes() const { return ranks * block_bytes; }

    int64_t rows_at() const { return ranks * static_cast<int64_t>(sizeof(ShmRankCounts)); }
    int64_t stages_at() const { return rows_at() + ranks * static_cast<int64_t>(kShmRows) * row_bytes(); }
    int64_t results_at() const { return stages_at() + ranks * kShmDepth * stage_bytes(); }
    int64_t pairs_at() const { return results_at() + ranks * kShmDepth * block_bytes; }
    int64_t pair_bytes() const {
        return static_cast<int64_t>(sizeof(ShmPairCounts)) +
               static_cast<int64_t>(kShmRows) * (row_bytes() + reply_bytes()) + kShmDepth * ring_bytes;
    }
    int64_t total() const { return pairs_at() + ranks * ranks * pair_bytes(); }
};

// A segment mapped into this process.
struct ShmView {
    ShmLayout layout;
    char* base;

    ShmRankCounts& counts(int64_t r) const { return reinterpret_cast<ShmRankCounts*>(base)[r]; }
    ShmRow row(int64_t r, uint64_t seq) const {
        return {base + layout.rows_at() +
                (r * static_cast<int64_t>(kShmRows) + static_cast<int64_t>(seq % kShmRows)) * layout.row_bytes()};
    }
    // What rank r staged for rank q at step t; the blocks of all q lie side by side.
    char* stage(int64_t r, uint64_t t, int64_t q) const {
        return base + layout.stages_at() + (r * kShmDepth + slot(t)) * layout.stage_bytes() + q * layout.block_bytes;
    }
    char* result(int64_t r, uint64_t t) const {
        return base + layout.results_at() + (r * kShmDepth + slot(t)) * layout.block_bytes;
    }
    char* pair(int64_t from, int64_t to) const {
        return base + layout.pairs_at() + (from * layout.ranks + to) * layout.pair_bytes();
    }
    static int64_t slot(uint64_t t) { return static_cast<int64_t>(t % static_cast<uint64_t>(kShmDepth)); }
};

// One direction between two ranks.
struct ShmPair {
    char* base;
    ShmLayout layout;

    ShmPairCounts& counts() const { return *reinterpret_cast<ShmPairCounts*>(base); }
    ShmRow sent(uint64_t seq) const { return {rows() + static_cast<int64_t>(seq % kShmRows) * layout.row_bytes()}; }
    ShmRow reply(uint64_t seq) const {
        return {rows() + static_cast<int64_t>(kShmRows) * layout.row_bytes() +
                static_cast<int64_t>(seq % kShmRows) * layout.reply_bytes()};
    }
    char* block(uint64_t t) const {
        return rows() + static_cast<int64_t>(kShmRows) * (layout.row_bytes() + layout.reply_bytes()) +
               ShmView::slot(t) * layout.ring_bytes;
    }

private:
    char* rows() const { return base + sizeof(ShmPairCounts); }
};

}  // namespace triloom
