// NCCL by dlopen: no header of NCCL, no link, and any version from 2.18 on.
//
// The declarations here are this project's own, written from NCCL's documented interface. A function
// that the library lacks is an error when it is called, naming the version that brought it.
#pragma once

#include <cstdint>
#include <string>

#include "error.h"

namespace triloom {

// Python sees it as triloom._C.NcclError, a GroupError.
struct NcclError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

constexpr int kNcclUndefined = INT32_MIN;
constexpr int kNcclNoColor = -1;
constexpr int kNcclInProgress = 7;
constexpr size_t kNcclIdBytes = 128;

// The configuration of NCCL 2.18. NCCL copies the smaller of `size` and its own structure and takes
// defaults for what came after `version`, so this stays valid. Where later versions put
// `trafficClass`, the 2.18 structure had padding: it is declared, and says "undefined" to them.
struct NcclConfig {
    size_t size = sizeof(NcclConfig);
    uint32_t magic = 0xcafebeef;
    uint32_t version = 21800;
    int32_t blocking = kNcclUndefined;
    int32_t cga_cluster_size = kNcclUndefined;
    int32_t min_ctas = kNcclUndefined;
    int32_t max_ctas = kNcclUndefined;
    const char* net_name = nullptr;
    int32_t split_share = kNcclUndefined;
    int32_t padding = kNcclUndefined;
};
static_assert(sizeof(void*) != 8 || sizeof(NcclConfig) == 48, "the layout of NCCL 2.18 on 64-bit machines");

// Where NCCL writes a handle, possibly after the call that asked for it has returned (a split of a
// non-blocking communicator is known when the parent has settled). Must live until then.
struct NcclSlot {
    void* value = nullptr;
    NcclConfig config;
};

struct NcclUniqueId {
    char bytes[kNcclIdBytes];
};

// A loaded library. Never unloaded: its threads may outlive every communicator.
//
// Methods that return bool: true if the operation is still in progress (non-blocking communicators;
// poll async_error), and NcclError for every result but success and in-progress. Buffers,
// communicators and streams are addresses.
class Nccl {
public:
    using Address = std::uintptr_t;

    // loaded_only: find a library that this process has loaded, but load none.
    Nccl(const std::string& path, bool loaded_only);

    const std::string& path() const { return path_; }
    int version() const { return version_; }
    bool has(const std::string& function) const;

    std::string unique_id() const;
    bool comm_init(NcclSlot& slot, int size, const std::string& id, int rank, const NcclConfig& config) const;
    bool comm_split(NcclSlot& slot, Address comm, int color, int key, const NcclConfig& config) const;
    bool comm_finalize(Address comm) const;
    void comm_destroy(Address comm) const;
    void comm_abort(Address comm) const;
    int async_error(Address comm) const;
    std::string error_text(int result, Address comm) const;

    void group_start() const;
    bool group_end() const;
    bool all_reduce(Address in, Address out, size_t count, int dtype, int op, Address comm, Address stream) const;
    bool reduce_scatter(Address in, Address out, size_t count, int dtype, int op, Address comm, Address stream) const;
    bool all_gather(Address in, Address out, size_t count, int dtype, Address comm, Address stream) const;
    bool broadcast(Address in, Address out, size_t count, int dtype, int root, Address comm, Address stream) const;
    bool send(Address in, size_t count, int dtype, int peer, Address comm, Address stream) const;
    bool recv(Address out, size_t count, int dtype, int peer, Address comm, Address stream) const;

    Address mem_alloc(size_t bytes) const;
    void mem_free(Address memory) const;
    Address comm_register(Address comm, Address buffer, size_t bytes) const;
    void comm_deregister(Address comm, Address handle) const;
    bool window_register(NcclSlot& slot, Address comm, Address buffer, size_t bytes, int flags) const;
    void window_deregister(Address comm, Address window) const;

private:
    void* symbol(int index) const;
    template <typename... Args>
    int call(int index, Args... args) const;
    bool checked(int index, int result, Address comm = 0) const;

    void* handle_;
    void* symbols_[32] = {};
    std::string path_;
    int version_ = 0;
};

// Sets what CUDA does with unsafe calls of this thread while any stream is being captured (0: refused
// everywhere, 1: only what this thread captures, 2: allowed); returns what it was. Throws Error without a driver.
int exchange_capture_mode(int mode);

}  // namespace triloom
