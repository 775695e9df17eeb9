// What a process has in memory without needing it any more.
#pragma once

namespace tinytl {

// Let go of the pages of this library's (or program's) own code: those that opening a program needed, and the linker's
// neighbours of them, are some hundred kilobytes that a step does not touch. What runs again comes back by itself, from
// the file. Does nothing where the system does not tell where they are.
void forget_own_code();

}  // namespace tinytl
