#include "residency.hpp"

#if defined(__linux__)
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#endif

namespace tinytl {

#if defined(__linux__)
namespace {

// For one module of the process: whether it is this one, whose pages nobody writes to are then let go.
int forget_if_own(dl_phdr_info* module, size_t, void*) {
    const auto here = reinterpret_cast<uintptr_t>(&forget_own_code);
    bool own = false;
    for (int i = 0; i < module->dlpi_phnum; ++i) {
        const auto& part = module->dlpi_phdr[i];
        own |= part.p_type == PT_LOAD && here - (module->dlpi_addr + part.p_vaddr) < part.p_memsz;
    }
    if (!own) return 0;
    const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
    for (int i = 0; i < module->dlpi_phnum; ++i) {
        const auto& part = module->dlpi_phdr[i];
        if (part.p_type != PT_LOAD || part.p_flags & PF_W) continue;
        const uintptr_t begin = (module->dlpi_addr + part.p_vaddr) / page * page;
        const uintptr_t end = (module->dlpi_addr + part.p_vaddr + part.p_memsz) / page * page;
        if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
    }
    return 1;
}

}  // namespace

void forget_own_code() { ::dl_iterate_phdr(forget_if_own, nullptr); }
#else
void forget_own_code() {}
#endif

}  // namespace tinytl
