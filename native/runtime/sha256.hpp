// SHA-256 (FIPS 180-4) of a stream of bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tinytl {

class Sha256 {
public:
    void add(const void* data, size_t bytes);
    void finish(uint8_t digest[32]);  // once

private:
    uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    uint8_t block_[64] = {};
    uint64_t total_ = 0;  // bytes so far
};

}  // namespace tinytl
