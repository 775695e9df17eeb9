#include "op_table.hpp"

#include <cstring>

namespace tinytl {
namespace {

constexpr int highest = 64;

struct Row {
    Op op;
    const char* name;
    const char* operands;  // as in op_table.py: mode=name, '?' where it may be absent
    const char* attributes;
};

constexpr Row rows[] = {
    {Op::normalize, "normalize", "in=x in=scale in=shift out=y", ""},
    {Op::conv, "conv", "in=x in=w in=table? in=bias? in=residual? out=y out=mask?", "CONV ACT"},
    {Op::group_norm, "group_norm", "in=x in=gamma? in=beta? out=y out=stats? out=mask?", "groups:i eps:f ACT"},
    {Op::affine, "affine", "in=x in=scale in=shift? out=y out=mask?", "ACT"},
    {Op::activation, "activation", "in=x out=y out=mask?", "ACT"},
    {Op::add, "add", "in=a in=b out=y out=mask?", "ACT"},
    {Op::smooth, "smooth", "in=x out=y", "kind:i alpha:f"},
    {Op::gate, "gate", "in=x in=s out=y", ""},
    {Op::avg_pool, "avg_pool", "in=x out=y", "WINDOW include_pad:i divisor:i"},
    {Op::adaptive_pool, "adaptive_pool", "in=x out=y", ""},
    {Op::max_pool, "max_pool", "in=x out=y out=which?", "WINDOW"},
    {Op::upsample, "upsample", "in=x in=residual? out=y", ""},
    {Op::dropout, "dropout", "in=x out=y out=mask?", "p:f number:i"},
    {Op::softmax_loss, "softmax_loss", "in=logits in=labels out=grad add=metrics", "smoothing:f"},
    {Op::copy, "copy", "in=x out=y", ""},
    {Op::standardize, "standardize", "in=w out=y", "eps:f depthwise:i"},
    {Op::scale_weight, "scale_weight", "in=w in=table? in=gamma? in=rstd out=y", "depthwise:i"},
    {Op::shift_bias, "shift_bias", "in=bias? in=gamma? in=beta? in=mean in=rstd out=y", ""},
    {Op::act_grad, "act_grad", "in=grad in=mask out=y add=bias?", "slope:f"},
    {Op::bias_grad, "bias_grad", "in=grad add=bias", ""},
    {Op::conv_dx, "conv_dx", "in=grad in=w in=table? in=other? in=mask? out=y add=bias?", "CONV slope:f"},
    {Op::conv_dw, "conv_dw", "in=x in=grad add=w", "CONV"},
    {Op::group_norm_grad, "group_norm_grad", "in=grad in=x in=stats in=gamma? out=y add=gamma_grad? add=beta_grad?",
     "groups:i"},
    {Op::affine_grad, "affine_grad", "in=grad in=scale out=y", ""},
    {Op::channel_dot, "channel_dot", "in=grad in=x add=y", ""},
    {Op::smooth_grad, "smooth_grad", "in=grad in=x out=y", "kind:i alpha:f"},
    {Op::gate_grad, "gate_grad", "in=grad in=x in=s out=y out=s_grad", ""},
    {Op::avg_pool_grad, "avg_pool_grad", "in=grad in=other? out=y", "WINDOW include_pad:i divisor:i"},
    {Op::adaptive_pool_grad, "adaptive_pool_grad", "in=grad in=other? out=y", ""},
    {Op::max_pool_grad, "max_pool_grad", "in=grad in=which out=y", "WINDOW"},
    {Op::upsample_grad, "upsample_grad", "in=grad out=y", ""},
    {Op::dropout_grad, "dropout_grad", "in=grad in=mask out=y", "p:f"},
    {Op::standardize_grad, "standardize_grad", "in=w inout=grad", "eps:f depthwise:i"},
    {Op::scale_weight_grad, "scale_weight_grad", "in=w in=table? in=gamma? in=rstd inout=grad add=gamma_grad?",
     "depthwise:i"},
    {Op::shift_bias_grad, "shift_bias_grad",
     "in=grad in=bias? in=gamma? in=mean in=rstd add=bias_grad? add=gamma_grad? add=beta_grad?", ""},
    {Op::zero, "zero", "out=x", ""},
    {Op::sgd, "sgd", "inout=p in=grad inout=momentum?", "weight_decay:f momentum:f"},
    {Op::adam, "adam", "inout=p in=grad inout=m inout=v", "weight_decay:f beta1:f beta2:f eps:f"},
    {Op::sgd8, "sgd8", "inout=p in=grad inout=momentum inout=momentum_scale", "weight_decay:f momentum:f"},
    {Op::adam8, "adam8", "inout=p in=grad inout=m inout=m_scale inout=v inout=v_scale",
     "weight_decay:f beta1:f beta2:f eps:f"},
};

// "mode=name?" from `at`; moves `at` behind it.
OperandKind parse_operand(const char*& at) {
    OperandKind operand = {};
    const size_t mode = std::strcspn(at, "=");
    operand.mode = mode == 2 ? Mode::in : !std::strncmp(at, "out", mode) ? Mode::out
                   : mode == 5 ? Mode::inout : Mode::add;
    at += mode + 1;
    size_t length = std::strcspn(at, " ");
    const size_t step = length;
    if (at[length - 1] == '?') {
        operand.optional = true;
        --length;
    }
    std::memcpy(operand.name, at, length);
    at += step;
    return operand;
}

int count_attributes(const char* text) {
    int count = 0;
    while (*text) {
        const size_t length = std::strcspn(text, " ");
        count += !std::strncmp(text, "WINDOW", length) ? 10 : !std::strncmp(text, "CONV", length) ? 12
                 : !std::strncmp(text, "ACT", length) ? 3 : 1;
        text += length;
        text += *text == ' ';
    }
    return count;
}

struct Kinds {
    OpKind by_code[highest + 1] = {};
    Kinds() {
        for (const Row& row : rows) {
            OpKind& kind = by_code[static_cast<int>(row.op)];
            kind.name = row.name;
            kind.attributes = count_attributes(row.attributes);
            for (const char* at = row.operands; *at; at += *at == ' ') kind.operand[kind.operands++] = parse_operand(at);
        }
    }
};

}  // namespace

const OpKind& kind_of(int64_t op) {
    static const Kinds kinds;
    return kinds.by_code[op < 0 || op > highest ? 0 : op];  // there is no op 0
}

}  // namespace tinytl
