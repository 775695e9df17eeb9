// A program file (docs/program.md) mapped into memory, its frame checked.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tinytl {

struct Section {
    const std::byte* data = nullptr;
    int64_t bytes = 0;
};

class File {
public:
    // Throws Failure: what is wrong with the file, in one line. `check`: whether its hash is verified.
    File(const char* path, bool check);
    ~File();
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    Section meta, code, data;  // of the map, which is read-only
    // Let go of the memory that reading a section has brought in; it comes back when it is read again.
    static void forget(Section section);

private:
    void* map_ = nullptr;
    size_t bytes_ = 0;
};

}  // namespace tinytl
