#include "shm.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "shm_lanes.h"

namespace triloom {

namespace {

char* map_segment(int fd, int64_t bytes) {
    void* at = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        throw Error("cannot map " + std::to_string(bytes) + " bytes of shared memory: " + std::strerror(errno));
    return static_cast<char*>(at);
}

}  // namespace

ShmChannel::ShmChannel(std::shared_ptr<ShmEngine> engine, int fd, ShmLayout layout, int rank, std::vector<int> bells,
                       bool check)
    : engine_(std::move(engine)), view_{layout, nullptr}, rank_(rank), bells_(std::move(bells)) {
    const int ranks = static_cast<int>(layout.ranks);
    require(rank >= 0 && rank < ranks && static_cast<int>(bells_.size()) == ranks, "shm: rank and doorbells do not fit");
    require(layout.inline_bytes >= 0 && layout.block_bytes >= 64 && layout.block_bytes % 64 == 0 && layout.ring_bytes >= 64,
            "shm: blocks must be positive multiples of 64 bytes");
    for (int b : bells_) require(b >= 0 && b < engine_->ranks_, "shm: a doorbell outside the engine");
    view_.base = map_segment(fd, layout.total());
    collective_ = std::make_unique<ShmCollectiveLane>(view_, rank, check);
    for (int peer = 0; peer < ranks; ++peer)
        for (bool sending : {false, true}) {
            const ShmPair pair{sending ? view_.pair(rank, peer) : view_.pair(peer, rank), layout};
            pairs_.push_back(std::make_unique<ShmPairLane>(pair, sending, check));
        }
    std::lock_guard<std::mutex> lock(engine_->mutex_);
    engine_->channels_.push_back(this);
}

ShmChannel::~ShmChannel() {
    close();
    munmap(view_.base, static_cast<size_t>(view_.layout.total()));
}

void ShmChannel::close() {
    std::lock_guard<std::mutex> lock(engine_->mutex_);
    closed_ = true;
    auto& all = engine_->channels_;
    all.erase(std::remove(all.begin(), all.end(), this), all.end());
}

ShmOpPtr ShmChannel::start(ShmLane& lane, const ShmOpPtr& op) {
    std::lock_guard<std::mutex> lock(engine_->mutex_);
    require(!closed_, "shm: the channel is closed");
    if (lane.idle()) busy_.push_back(&lane);
    lane.add(op);
    if (advance()) engine_->ring(*this);
    if (!op->over() && engine_->drivers_.load() == 0 && lane.wants_driver()) engine_->arm();
    return op;
}

bool ShmChannel::advance() {
    bool any = false;
    for (size_t i = 0; i < busy_.size();) {
        any |= busy_[i]->advance();
        if (busy_[i]->idle())
            busy_.erase(busy_.begin() + static_cast<std::ptrdiff_t>(i));
        else
            ++i;
    }
    return any;
}

bool ShmChannel::wants_driver() const {
    return std::any_of(busy_.begin(), busy_.end(), [](const ShmLane* lane) { return lane->wants_driver(); });
}

std::vector<int> ShmChannel::late(const ShmOpPtr& op, int peer, bool sending) {
    std::lock_guard<std::mutex> lock(engine_->mutex_);
    if (closed_ || op->over()) return {};
    if (peer < 0) return collective_->late(*op);
    return pairs_[pair(peer, sending)]->late(*op).empty() ? std::vector<int>{} : std::vector<int>{peer};
}

std::vector<std::pair<int, std::string>> ShmChannel::unexpected(int peer) {
    std::lock_guard<std::mutex> lock(engine_->mutex_);
    std::vector<std::pair<int, std::string>> found;
    const auto look = [&found](int kind, const ShmRow& row, uint64_t seq) {
        if (row.holds(seq)) found.emplace_back(kind, std::string(row.base, static_cast<size_t>(kShmHeader)));
    };
    const ShmPair from{view_.pair(peer, rank_), view_.layout}, to{view_.pair(rank_, peer), view_.layout};
    const uint64_t receives = pairs_[pair(peer, false)]->next_seq(), sends = pairs_[pair(peer, true)]->next_seq();
    look(0, view_.row(peer, collective_->next_seq()), collective_->next_seq());
    look(1, from.sent(receives), receives);
    look(2, to.reply(sends), sends);
    return found;
}

}  // namespace triloom
