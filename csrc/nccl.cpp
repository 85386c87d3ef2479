#include "nccl.h"

#include <dlfcn.h>

#include <climits>
#include <cstdlib>
#include <cstring>

namespace triloom {
namespace {

using Address = Nccl::Address;

void* at(Address a) { return reinterpret_cast<void*>(a); }

struct Function {
    const char* name;
    int since;  // major * 10000 + minor * 100 + patch
};

enum Index {
    kGetVersion, kGetUniqueId, kGetErrorString, kGetLastError, kInitRankConfig, kSplit, kFinalize, kDestroy, kAbort,
    kGetAsyncError, kGroupStart, kGroupEnd, kAllReduce, kReduceScatter, kAllGather, kBroadcast, kSend, kRecv,
    kMemAlloc, kMemFree, kRegister, kDeregister, kWindowRegister, kWindowDeregister, kCount,
};

constexpr Function kFunctions[kCount] = {
    {"ncclGetVersion", 20300},          {"ncclGetUniqueId", 20000},
    {"ncclGetErrorString", 20000},      {"ncclGetLastError", 21300},
    {"ncclCommInitRankConfig", 21400},  {"ncclCommSplit", 21800},
    {"ncclCommFinalize", 21400},        {"ncclCommDestroy", 20000},
    {"ncclCommAbort", 20400},           {"ncclCommGetAsyncError", 20400},
    {"ncclGroupStart", 20000},          {"ncclGroupEnd", 20000},
    {"ncclAllReduce", 20000},           {"ncclReduceScatter", 20000},
    {"ncclAllGather", 20000},           {"ncclBroadcast", 20202},
    {"ncclSend", 20700},                {"ncclRecv", 20700},
    {"ncclMemAlloc", 21900},            {"ncclMemFree", 21900},
    {"ncclCommRegister", 21900},        {"ncclCommDeregister", 21900},
    {"ncclCommWindowRegister", 22700},  {"ncclCommWindowDeregister", 22700},
};

std::string version_text(int code) {
    // Up to 2.8 the code was major * 1000 + minor * 100 + patch.
    const int base = code < 10000 ? 1000 : 10000;
    return std::to_string(code / base) + "." + std::to_string(code % base / 100) + "." + std::to_string(code % 100);
}

std::string file_of(const void* function, const std::string& asked) {
    Dl_info info;
    if (dladdr(function, &info) == 0 || info.dli_fname == nullptr) return asked;
    char resolved[PATH_MAX];
    return realpath(info.dli_fname, resolved) != nullptr ? resolved : info.dli_fname;
}

}  // namespace

Nccl::Nccl(const std::string& path, bool loaded_only) {
    static_assert(kCount <= sizeof(symbols_) / sizeof(symbols_[0]), "room for every symbol");
    handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | (loaded_only ? RTLD_NOLOAD : 0));
    if (handle_ == nullptr) {
        const char* why = dlerror();
        if (loaded_only || why == nullptr) throw NcclError(path + " is not loaded in this process");
        throw NcclError(why);
    }
    for (int i = 0; i < kCount; ++i) symbols_[i] = dlsym(handle_, kFunctions[i].name);
    path_ = path;
    if (symbols_[kGetVersion] == nullptr) throw NcclError(path + " is no NCCL library: it has no ncclGetVersion");
    path_ = file_of(symbols_[kGetVersion], path);
    checked(kGetVersion, call(kGetVersion, &version_));
}

bool Nccl::has(const std::string& function) const {
    for (int i = 0; i < kCount; ++i)
        if (function == kFunctions[i].name) return symbols_[i] != nullptr;
    throw NcclError("triloom does not use a function " + function + " of NCCL");
}

void* Nccl::symbol(int index) const {
    if (symbols_[index] != nullptr) return symbols_[index];
    const Function& function = kFunctions[index];
    throw NcclError(std::string(function.name) + " is missing in " + path_ + " (NCCL " + version_text(version_) +
                    "); it needs NCCL " + version_text(function.since) +
                    " or later: pip install -U nvidia-nccl-cu12 (or -cu13), and name that library if torch has loaded "
                    "another one");
}

template <typename... Args>
int Nccl::call(int index, Args... args) const {
    return reinterpret_cast<int (*)(Args...)>(symbol(index))(args...);
}

bool Nccl::checked(int index, int result, Address comm) const {
    if (result == 0 || result == kNcclInProgress) return result == kNcclInProgress;
    throw NcclError(std::string(kFunctions[index].name) + " failed: " + error_text(result, comm));
}

std::string Nccl::error_text(int result, Address comm) const {
    std::string text = "result " + std::to_string(result);
    if (symbols_[kGetErrorString] != nullptr) {
        const char* name = reinterpret_cast<const char* (*)(int)>(symbols_[kGetErrorString])(result);
        if (name != nullptr) text += std::string(", ") + name;
    }
    if (symbols_[kGetLastError] != nullptr) {
        const char* last = reinterpret_cast<const char* (*)(void*)>(symbols_[kGetLastError])(at(comm));
        if (last != nullptr && last[0] != '\0') text += std::string(" (") + last + ")";
    }
    return text;
}

std::string Nccl::unique_id() const {
    NcclUniqueId id;
    std::memset(&id, 0, sizeof id);
    checked(kGetUniqueId, call(kGetUniqueId, &id));
    return std::string(id.bytes, sizeof id.bytes);
}

bool Nccl::comm_init(NcclSlot& slot, int size, const std::string& id, int rank, const NcclConfig& config) const {
    if (id.size() != kNcclIdBytes) throw NcclError("a unique id has 128 bytes, got " + std::to_string(id.size()));
    NcclUniqueId raw;
    std::memcpy(raw.bytes, id.data(), kNcclIdBytes);
    slot.config = config;
    return checked(kInitRankConfig, call(kInitRankConfig, &slot.value, size, raw, rank, &slot.config));
}

bool Nccl::comm_split(NcclSlot& slot, Address comm, int color, int key, const NcclConfig& config) const {
    slot.config = config;
    return checked(kSplit, call(kSplit, at(comm), color, key, &slot.value, &slot.config), comm);
}

bool Nccl::comm_finalize(Address comm) const { return checked(kFinalize, call(kFinalize, at(comm)), comm); }

void Nccl::comm_destroy(Address comm) const { checked(kDestroy, call(kDestroy, at(comm))); }

void Nccl::comm_abort(Address comm) const { checked(kAbort, call(kAbort, at(comm))); }

int Nccl::async_error(Address comm) const {
    int state = 0;
    checked(kGetAsyncError, call(kGetAsyncError, at(comm), &state), comm);
    return state;
}

void Nccl::group_start() const { checked(kGroupStart, call(kGroupStart)); }

bool Nccl::group_end() const { return checked(kGroupEnd, call(kGroupEnd)); }

bool Nccl::all_reduce(Address in, Address out, size_t count, int dtype, int op, Address comm, Address stream) const {
    return checked(kAllReduce, call(kAllReduce, at(in), at(out), count, dtype, op, at(comm), at(stream)), comm);
}

bool Nccl::reduce_scatter(Address in, Address out, size_t count, int dtype, int op, Address comm,
                          Address stream) const {
    return checked(kReduceScatter, call(kReduceScatter, at(in), at(out), count, dtype, op, at(comm), at(stream)),
                   comm);
}

bool Nccl::all_gather(Address in, Address out, size_t count, int dtype, Address comm, Address stream) const {
    return checked(kAllGather, call(kAllGather, at(in), at(out), count, dtype, at(comm), at(stream)), comm);
}

bool Nccl::broadcast(Address in, Address out, size_t count, int dtype, int root, Address comm, Address stream) const {
    return checked(kBroadcast, call(kBroadcast, at(in), at(out), count, dtype, root, at(comm), at(stream)), comm);
}

bool Nccl::send(Address in, size_t count, int dtype, int peer, Address comm, Address stream) const {
    return checked(kSend, call(kSend, at(in), count, dtype, peer, at(comm), at(stream)), comm);
}

bool Nccl::recv(Address out, size_t count, int dtype, int peer, Address comm, Address stream) const {
    return checked(kRecv, call(kRecv, at(out), count, dtype, peer, at(comm), at(stream)), comm);
}

Address Nccl::mem_alloc(size_t bytes) const {
    void* memory = nullptr;
    checked(kMemAlloc, call(kMemAlloc, &memory, bytes));
    return reinterpret_cast<Address>(memory);
}

void Nccl::mem_free(Address memory) const { checked(kMemFree, call(kMemFree, at(memory))); }

Address Nccl::comm_register(Address comm, Address buffer, size_t bytes) const {
    void* handle = nullptr;
    checked(kRegister, call(kRegister, at(comm), at(buffer), bytes, &handle), comm);
    return reinterpret_cast<Address>(handle);
}

void Nccl::comm_deregister(Address comm, Address handle) const {
    checked(kDeregister, call(kDeregister, at(comm), at(handle)), comm);
}

bool Nccl::window_register(NcclSlot& slot, Address comm, Address buffer, size_t bytes, int flags) const {
    return checked(kWindowRegister, call(kWindowRegister, at(comm), at(buffer), bytes, &slot.value, flags), comm);
}

void Nccl::window_deregister(Address comm, Address window) const {
    checked(kWindowDeregister, call(kWindowDeregister, at(comm), at(window)), comm);
}

int exchange_capture_mode(int mode) {
    void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    require(driver != nullptr, "libcuda.so.1 is not there: no CUDA driver on this machine");
    void* function = dlsym(driver, "cuThreadExchangeStreamCaptureMode");
    require(function != nullptr, "the CUDA driver has no cuThreadExchangeStreamCaptureMode: it is older than 10.1");
    require(reinterpret_cast<int (*)(int*)>(function)(&mode) == 0, "cuThreadExchangeStreamCaptureMode failed");
    return mode;
}

}  // namespace triloom
