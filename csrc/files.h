// Files written past the page cache by several threads, with the checksums of their parts; and the copies around it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace triloom {

// A call of the operating system failed; Python sees an OSError with this number and path.
struct FileError : std::runtime_error {
    FileError(std::string operation, int number, std::string path);
    int number;
    std::string path;
};

struct Span {
    const char* data;
    int64_t bytes;
};

struct Extent {
    int64_t offset;
    int64_t bytes;
};

struct Written {
    std::vector<uint32_t> checksums;  // CRC32C of each extent
    bool direct;                      // past the page cache to the end
};

struct WriteOptions {
    int threads;
    int64_t chunk;  // bytes of one write, a multiple of kFileAlign
    bool direct;    // try O_DIRECT; the file system may refuse
};

constexpr int64_t kFileAlign = 4096;

// Makes or replaces `path` with the spans one after the other, and forces it to disk. Extents are ranges of the file,
// each inside one span. A span that starts at a multiple of kFileAlign in memory and in the file is written in place,
// others pass through a buffer of each thread. Throws FileError; what was written is left there.
Written write_file(const std::string& path, const std::vector<Span>& spans, const std::vector<Extent>& extents,
                   const WriteOptions& options);

// Each (to, from, bytes), past the caches where that pays: nobody reads the copy soon.
struct Move {
    char* to;
    const char* from;
    int64_t bytes;
};
void copy_past_cache(const std::vector<Move>& moves);

// bytes[i] bytes from `from + source[i]` to `to + target[i]`, for n ranges.
void scatter(char* to, const char* from, const int64_t* target, const int64_t* source, const int64_t* bytes, int64_t n);

// Swap the names of two files or folders at once. False where the system or the file system cannot.
bool exchange_paths(const std::string& one, const std::string& other);

}  // namespace triloom
