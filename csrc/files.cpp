#include "files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/syscall.h>
#endif

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "crc32c.h"
#include "error.h"

namespace triloom {

FileError::FileError(std::string operation, int number, std::string path)
    : std::runtime_error(operation + ": " + std::strerror(number)), number(number), path(std::move(path)) {}

namespace {

struct Free {
    void operator()(char* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, Free>;

Buffer aligned(int64_t bytes) {
    Buffer b(static_cast<char*>(std::aligned_alloc(kFileAlign, static_cast<size_t>(bytes))));
    if (!b) throw std::bad_alloc();
    return b;
}

int64_t round_up(int64_t n) { return (n + kFileAlign - 1) / kFileAlign * kFileAlign; }

class Fd {
public:
    explicit Fd(int fd) : fd_(fd) {}
    ~Fd() {
        if (fd_ >= 0) ::close(fd_);
    }
    Fd(const Fd&) = delete;
    Fd& operator=(const Fd&) = delete;
    int get() const { return fd_; }
    int release() { return std::exchange(fd_, -1); }

private:
    int fd_;
};

// One file being written: threads take chunks and checksums in turn.
class Writing {
public:
    Writing(const std::string& path, const std::vector<Span>& spans, const std::vector<Extent>& extents,
            const WriteOptions& options)
        : path_(path), spans_(spans), extents_(extents), chunk_(options.chunk), fd_(open(options.direct)) {
        require(options.chunk > 0 && options.chunk % kFileAlign == 0, "write_file: chunks must be multiples of 4096");
        require(options.threads > 0, "write_file: at least one thread");
        for (const Span& s : spans) {
            starts_.push_back(total_);
            total_ += s.bytes;
        }
        for (const Extent& e : extents) {
            const size_t i = span_at(e.offset);
            require(e.offset + e.bytes <= starts_[i] + spans_[i].bytes, "write_file: an extent crosses spans");
        }
        checksums_.resize(extents.size());
    }

    Written run(int threads) {
        reserve();
        std::vector<std::thread> others;
        for (int i = 1; i < threads; ++i) others.emplace_back([this] { work(); });
        work();
        for (std::thread& t : others) t.join();
        if (failure_) std::rethrow_exception(failure_);
        if (::ftruncate(fd_.get(), total_) != 0 && errno != EINVAL) fail("ftruncate");  // EINVAL: not a regular file
        if (::fsync(fd_.get()) != 0 && errno != EINVAL) fail("fsync");
        if (::close(fd_.release()) != 0) fail("close");
        return {std::move(checksums_), !cached_};
    }

private:
    [[noreturn]] void fail(const char* operation) const { throw FileError(operation, errno, path_); }

    int open(bool direct) {
        const int flags = O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC;
        int fd = -1;
#ifdef O_DIRECT
        if (direct) {
            fd = ::open(path_.c_str(), flags | O_DIRECT, 0644);
            cached_ = fd < 0;
            if (fd < 0 && errno != EINVAL) fail("open");
        }
#endif
        if (fd < 0) fd = ::open(path_.c_str(), flags, 0644);
        if (fd < 0) fail("open");
        return fd;
    }

    // Space for all of it, so that a full disk is found before anything is written. Not glibc's posix_fallocate,
    // which writes zeros where the file system cannot do it.
    void reserve() {
#ifdef __linux__
        if (total_ == 0) return;
        int got;
        do got = ::fallocate(fd_.get(), 0, 0, total_);
        while (got != 0 && errno == EINTR);
        if (got != 0 && (errno == ENOSPC || errno == EFBIG || errno == EDQUOT || errno == EIO)) fail("fallocate");
#endif
    }

    void work() {
        try {
            Buffer bounce;
            const int64_t chunks = (total_ + chunk_ - 1) / chunk_;
            const int64_t items = std::max<int64_t>(chunks, static_cast<int64_t>(extents_.size()));
            // Checksums are spread evenly between the writes, to be computed while other threads wait for the disk.
            for (int64_t i; !stop_ && (i = next_++) < items;) {
                if (i < chunks) write(i * chunk_, bounce);
                const int64_t n = static_cast<int64_t>(extents_.size());
                for (int64_t k = n * i / items; k < n * (i + 1) / items; ++k) {
                    const Extent& e = extents_[static_cast<size_t>(k)];
                    const size_t s = span_at(e.offset);
                    checksums_[static_cast<size_t>(k)] = crc32c(spans_[s].data + (e.offset - starts_[s]), e.bytes);
                }
            }
        } catch (...) {
            stop_ = true;
            const std::lock_guard<std::mutex> lock(mutex_);
            if (!failure_) failure_ = std::current_exception();
        }
    }

    size_t span_at(int64_t offset) const {
        require(offset >= 0 && offset <= total_ && !spans_.empty(), "write_file: an extent lies outside the file");
        const auto after = std::upper_bound(starts_.begin(), starts_.end(), offset);
        return static_cast<size_t>(after - starts_.begin()) - 1;
    }

    void write(int64_t offset, Buffer& bounce) {
        const int64_t bytes = std::min(chunk_, total_ - offset);
        const size_t s = span_at(offset);
        const char* in_place = spans_[s].data + (offset - starts_[s]);
        const bool whole = offset + bytes <= starts_[s] + spans_[s].bytes;
        const bool fits = reinterpret_cast<std::uintptr_t>(in_place) % kFileAlign == 0 && bytes % kFileAlign == 0;
        if (whole && (fits || cached_)) return put(in_place, bytes, offset);
        if (!bounce) bounce = aligned(chunk_);
        int64_t filled = 0;
        for (size_t k = s; filled < bytes; ++k) {
            const int64_t from = offset + filled - starts_[k];
            const int64_t n = std::min(bytes - filled, spans_[k].bytes - from);
            if (n <= 0) continue;
            std::memcpy(bounce.get() + filled, spans_[k].data + from, static_cast<size_t>(n));
            filled += n;
        }
        const int64_t padded = round_up(bytes);  // the last block; ftruncate takes the padding off again
        std::memset(bounce.get() + bytes, 0, static_cast<size_t>(padded - bytes));
        put(bounce.get(), cached_ ? bytes : padded, offset);
    }

    void put(const char* data, int64_t bytes, int64_t offset) {
        while (bytes > 0) {
            const bool cached = cached_;
            const ssize_t n = ::pwrite(fd_.get(), data, static_cast<size_t>(bytes), offset);
            if (n < 0 && errno == EINTR) continue;
            if (n < 0 && (errno != EINVAL || cached)) fail("pwrite");
            if (!cached && (n < 0 || n % kFileAlign != 0)) through_cache();
            if (n <= 0) continue;
            data += n;
            offset += n;
            bytes -= n;
        }
    }

    // Direct writes do not work here: some file systems accept the flag at open and refuse the write.
    void through_cache() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (cached_) return;
#ifdef O_DIRECT
        const int flags = ::fcntl(fd_.get(), F_GETFL);
        if (flags < 0 || ::fcntl(fd_.get(), F_SETFL, flags & ~O_DIRECT) != 0) fail("fcntl");
#endif
        cached_ = true;
    }

    const std::string& path_;
    const std::vector<Span>& spans_;
    const std::vector<Extent>& extents_;
    const int64_t chunk_;
    std::atomic<bool> cached_{true};  // through the page cache
    Fd fd_;
    std::vector<int64_t> starts_;
    int64_t total_ = 0;
    std::vector<uint32_t> checksums_;
    std::atomic<int64_t> next_{0};
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::exception_ptr failure_;
};

#ifdef __SSE2__
// 16 bytes at a time without reading the lines that are overwritten: two thirds of the traffic of a plain copy.
void stream(char* to, const char* from, int64_t bytes) {
    const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<std::intptr_t>(to) & 63);
    std::memcpy(to, from, static_cast<size_t>(head));
    to += head, from += head, bytes -= head;
    const int64_t body = bytes & ~int64_t{63};
    for (int64_t i = 0; i < body; i += 64)
        for (int k = 0; k < 64; k += 16)
            _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + k),
                             _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i + k)));
    std::memcpy(to + body, from + body, static_cast<size_t>(bytes - body));
}
#endif

}  // namespace

Written write_file(const std::string& path, const std::vector<Span>& spans, const std::vector<Extent>& extents,
                   const WriteOptions& options) {
    return Writing(path, spans, extents, options).run(options.threads);
}

void copy_past_cache(const std::vector<Move>& moves) {
    for (const Move& m : moves) {
#ifdef __SSE2__
        if (m.bytes >= 4096) {
            stream(m.to, m.from, m.bytes);
            continue;
        }
#endif
        std::memcpy(m.to, m.from, static_cast<size_t>(m.bytes));
    }
#ifdef __SSE2__
    _mm_sfence();
#endif
}

void scatter(char* to, const char* from, const int64_t* target, const int64_t* source, const int64_t* bytes,
             int64_t n) {
    for (int64_t i = 0; i < n; ++i) std::memcpy(to + target[i], from + source[i], static_cast<size_t>(bytes[i]));
}

bool exchange_paths(const std::string& one, const std::string& other) {
#ifdef SYS_renameat2
    constexpr unsigned kExchange = 2;  // RENAME_EXCHANGE of linux/fs.h
    if (::syscall(SYS_renameat2, AT_FDCWD, one.c_str(), AT_FDCWD, other.c_str(), kExchange) == 0) return true;
    if (errno != EINVAL && errno != ENOSYS) throw FileError("renameat2", errno, other);
#endif
    return false;
}

}  // namespace triloom
