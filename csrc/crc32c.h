// CRC32C (Castagnoli, reflected polynomial 0x82F63B78; RFC 3720, appendix B.4).
#pragma once

#include <cstdint>

namespace triloom {

// Of n bytes that follow those whose checksum is `crc` (0: none). With the processor's instruction where it has one.
uint32_t crc32c(const void* data, int64_t n, uint32_t crc = 0);

// The same by tables, on any processor.
uint32_t crc32c_by_table(const void* data, int64_t n, uint32_t crc = 0);

// Whether crc32c uses an instruction.
bool crc32c_has_instruction();

}  // namespace triloom
