// Depthwise convolutions: one filter a channel, weights (kh, kw, C). `conv`, `conv_dx` and `conv_dw` hand over here
// where their attribute `depthwise` is 1; operands and attributes are theirs.
#pragma once

#include "../runtime/call.hpp"
#include "simd.hpp"

namespace tinytl {
namespace TINYTL_ISA {

void depthwise_conv(const Call& call);
void depthwise_conv_dx(const Call& call);
void depthwise_conv_dw(const Call& call);

}  // namespace TINYTL_ISA
}  // namespace tinytl
