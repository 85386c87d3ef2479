// The two kinds of lane of a shared-memory channel.
#pragma once

#include "shm.h"

namespace triloom {

class ShmCollectiveLane final : public ShmLane {
public:
    ShmCollectiveLane(ShmView view, int rank, bool check) : view_(view), rank_(rank), check_(check) {}
    std::vector<int> late(const ShmOp& op) const override;

protected:
    bool post(ShmOp& op) override;
    int arrive(ShmOp& op) override;
    void small(ShmOp& op) override;
    void begin(ShmOp& op) override;
    bool step(ShmOp& op) override;
    bool moved(const ShmOp& op) const override;
    bool is_small(const ShmOp& op) const override { return op.bytes() <= view_.layout.inline_bytes; }
    void took(const ShmOp& op) override { view_.counts(rank_).taken.set(op.seq + 1); }

private:
    struct Piece {
        int64_t at, bytes;
    };
    int ranks() const { return static_cast<int>(view_.layout.ranks); }
    Piece part(const ShmOp& op, int64_t owner, uint64_t t) const;   // of a reduction: the owner's elements, in bytes
    Piece wide(int64_t total, const ShmOp& op, uint64_t t) const;   // of anything cut into stage areas
    Piece chunk(const ShmOp& op, uint64_t t) const;                 // of a chunk of an all_to_all
    bool all(ShmCount ShmRankCounts::* count, uint64_t least) const;
    bool may_stage(const ShmOp& op) const;
    bool may_fetch(const ShmOp& op) const;
    void stage(const ShmOp& op, uint64_t t);
    void reduce(const ShmOp& op, uint64_t t);
    void fetch(const ShmOp& op, uint64_t t);

    ShmView view_;
    int rank_;
    bool check_;
    std::vector<const void*> inputs_;
};

class ShmPairLane final : public ShmLane {
public:
    ShmPairLane(ShmPair pair, bool sending, bool check) : pair_(pair), sending_(sending), check_(check) {}
    std::vector<int> late(const ShmOp& op) const override;

protected:
    bool post(ShmOp& op) override;
    int arrive(ShmOp& op) override;
    void small(ShmOp& op) override;
    void begin(ShmOp& op) override;
    bool step(ShmOp& op) override;
    bool moved(const ShmOp& op) const override { return op.fetched == op.first + op.steps; }
    bool is_small(const ShmOp& op) const override { return op.bytes() <= pair_.layout.inline_bytes; }
    void took(const ShmOp& op) override;

private:
    ShmRow mine(uint64_t seq) const { return sending_ ? pair_.sent(seq) : pair_.reply(seq); }
    ShmRow theirs(uint64_t seq) const { return sending_ ? pair_.reply(seq) : pair_.sent(seq); }
    bool may_step(const ShmOp& op) const;

    ShmPair pair_;
    bool sending_;
    bool check_;
};

// dst = src; nothing for no bytes. (Writing large results past the caches was tried: no gain.)
void shm_copy(char* dst, const char* src, int64_t n);

}  // namespace triloom
