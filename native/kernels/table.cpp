// The kernels of one instruction set by op.
#include "kernels.hpp"

namespace tinytl {
namespace TINYTL_ISA {

Kernel kernel_of(Op op) {
    switch (op) {
#define X(name) \
    case Op::name: return name;
        TINYTL_OPS(X)
#undef X
    }
    return nullptr;
}

}  // namespace TINYTL_ISA
}  // namespace tinytl
