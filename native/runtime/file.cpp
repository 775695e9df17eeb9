#include "file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "failure.hpp"
#include "sha256.hpp"

namespace tinytl {
namespace {

constexpr size_t frame_bytes = 64, header_bytes = 64 + 3 * 24;
constexpr uint32_t version = 1, byte_order = 0x01020304;
constexpr int64_t page = 4096;

struct Descriptor {
    int number;
    ~Descriptor() {
        if (number >= 0) ::close(number);
    }
};

// Reads until `bytes` are there or the file ends; says how many came.
size_t read_at(int file, void* to, size_t bytes, int64_t offset) {
    size_t done = 0;
    while (done < bytes) {
        const ssize_t now = ::pread(file, static_cast<char*>(to) + done, bytes - done, offset + static_cast<int64_t>(done));
        if (now < 0 && errno == EINTR) continue;
        if (now < 0) fail(TINYTL_BAD_FILE, "cannot be read (%s)", std::strerror(errno));
        if (now == 0) break;
        done += static_cast<size_t>(now);
    }
    return done;
}

template <class T>
T number_at(const uint8_t* header, size_t offset) {
    T value;
    std::memcpy(&value, header + offset, sizeof value);
    return value;
}

// In pieces through a small buffer: what is only hashed need not stay in this process's memory.
void check_hash(int file, int64_t bytes, const uint8_t expected[32]) {
    Sha256 sha;
    alignas(64) char buffer[32768];
    for (int64_t at = frame_bytes; at < bytes;) {
        const size_t got = read_at(file, buffer, sizeof buffer, at);
        if (!got) break;
        sha.add(buffer, got);
        at += static_cast<int64_t>(got);
    }
    uint8_t digest[32];
    sha.finish(digest);
    if (std::memcmp(digest, expected, sizeof digest))
        fail(TINYTL_BAD_FILE, "is damaged: its SHA-256 begins %02x%02x%02x%02x, expected %02x%02x%02x%02x: compile or "
             "copy it again", digest[0], digest[1], digest[2], digest[3], expected[0], expected[1], expected[2],
             expected[3]);
}

}  // namespace

File::File(const char* path, bool check) {
    const Descriptor file = {::open(path, O_RDONLY | O_CLOEXEC)};
    if (file.number < 0) fail(TINYTL_BAD_FILE, "cannot be opened (%s): give a program that `tinytl compile` wrote",
                              std::strerror(errno));
    struct stat about;
    if (::fstat(file.number, &about) || !S_ISREG(about.st_mode))
        fail(TINYTL_BAD_FILE, "is not a file: give a program that `tinytl compile` wrote");
    uint8_t header[header_bytes];
    const size_t got = read_at(file.number, header, sizeof header, 0);
    static const uint8_t word[8] = {'T', 'I', 'N', 'Y', 'T', 'L', 'P', 0};
    if (got < sizeof word || std::memcmp(header, word, sizeof word))
        fail(TINYTL_BAD_FILE, "is not a tinytl program: give one that `tinytl compile` wrote");
    if (got < sizeof header)
        fail(TINYTL_BAD_FILE, "is truncated: %zu bytes, expected at least %zu: compile or copy it again", got, header_bytes);
    const uint32_t order = number_at<uint32_t>(header, 12);
    if (order != byte_order)
        fail(TINYTL_BAD_FILE, "has another order of bytes (%08x, expected %08x): compile it for a little-endian machine",
             order, byte_order);
    const uint32_t found = number_at<uint32_t>(header, 8);
    if (found != version)
        fail(TINYTL_BAD_FILE, "has version %u, this tinytl reads %u: %s", found, version,
             found > version ? "upgrade tinytl (pip install --upgrade tinytl)" : "compile it again");
    const int64_t bytes = number_at<int64_t>(header, 16);
    if (bytes != about.st_size)
        fail(TINYTL_BAD_FILE, "has %lld bytes, expected %lld: it is truncated or was appended to: compile or copy it again",
             static_cast<long long>(about.st_size), static_cast<long long>(bytes));

    static const char names[3][8] = {"META", "CODE", "DATA"};
    int64_t offsets[3], sizes[3], end = header_bytes;
    for (int i = 0; i < 3; ++i) {
        const uint8_t* entry = header + frame_bytes + 24 * i;
        offsets[i] = number_at<int64_t>(entry, 8);
        sizes[i] = number_at<int64_t>(entry, 16);
        if (std::memcmp(entry, names[i], 8) || offsets[i] < end || offsets[i] > bytes || sizes[i] < 0 ||
            sizes[i] > bytes - offsets[i] || (i == 1 && offsets[i] % 8) || (i == 2 && offsets[i] % page))
            fail(TINYTL_BAD_FILE, "is damaged: its section %s does not lie in the file as it should: compile or copy it "
                 "again", names[i]);
        end = offsets[i] + sizes[i];
    }
    if (check) check_hash(file.number, bytes, header + 24);

    bytes_ = static_cast<size_t>(bytes);
    map_ = ::mmap(nullptr, bytes_, PROT_READ, MAP_PRIVATE, file.number, 0);
    if (map_ == MAP_FAILED) {
        map_ = nullptr;
        fail(TINYTL_NO_MEMORY, "cannot be mapped (%s): free some memory", std::strerror(errno));
    }
    Section* const sections[3] = {&meta, &code, &data};
    for (int i = 0; i < 3; ++i) *sections[i] = {static_cast<const std::byte*>(map_) + offsets[i], sizes[i]};
}

File::~File() {
    if (map_) ::munmap(map_, bytes_);
}

void File::forget(Section section) {
    const uintptr_t unit = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
    const uintptr_t begin = reinterpret_cast<uintptr_t>(section.data) / unit * unit;
    const uintptr_t end = reinterpret_cast<uintptr_t>(section.data) + static_cast<uintptr_t>(section.bytes);
    ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);  // a failure costs memory only
}

}  // namespace tinytl
