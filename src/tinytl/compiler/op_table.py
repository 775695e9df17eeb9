"""Every instruction that a program may hold: its number, what it takes and makes, its attributes, and what it computes.

This table is the contract between the compiler, the interpreter (`tinytl.compiler.interpreter`, the specification that
can be run) and the executor (`native/`, whose own copy of the table a test holds against this one).

Conventions. Images lie as (images, H, W, C), channels innermost; a vector an image is (1, 1, C). The leading axis of
images is not part of a tensor's shape. Weights: (O, kh, kw, I / groups), but (kh, kw, C) where `depthwise` is 1 (one
filter a channel: groups = I = O = C). An operand that ends in '?' may be absent. Modes of an operand:

    in      it is read
    out     it is written, whole; it may be the memory of an input where the row says "in place"
    add     what is computed is added to what is there (gradients, metrics)
    inout   it is read and written

A `table` beside a weight says what its codes mean, by the weight's type: i8: one f32 scale for each output channel;
u8: 256 f32 values; f16: one f32 scale. Only frozen weights have codes. Beside an f32 weight, trained or not, it may be
one f32 scale for each output channel, a normalization's (see `tinytl.compiler.fuse_scaled`), or absent. An output
channel is the forward convolution's, in `conv_dx` too.

An activation is three attributes (lo, hi, slope): y = z where lo < z < hi; lo + slope (z - lo) where z <= lo; hi where
z >= hi. None at all: lo = -inf, hi = inf. `mask`: one bit an element of y, 1 where not (z <= lo or z >= hi); the bits
of one pixel begin at a byte: ceil(C / 8) bytes a pixel, channel c in bit c & 7 of byte c >> 3.
"""

from __future__ import annotations

from dataclasses import dataclass

WINDOW = "kh:i kw:i sh:i sw:i top:i left:i bottom:i right:i dh:i dw:i"
"""Kernel, stride, zeros around the image on each side, dilation."""
CONV = f"{WINDOW} groups:i depthwise:i"
ACT = "lo:f hi:f slope:f"

SMOOTH = ("hard_swish", "hard_sigmoid", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "mish", "elu")
"""Values of the attribute `kind` of `smooth`, by number (see `tinytl.ops.smooth_activation`)."""


@dataclass(frozen=True)
class OpKind:
    """One kind of instruction.

    Attributes:
        name: its name.
        code: its number in a file.
        operands: (name, mode, may be absent) in the order of `Instruction.operands`.
        attributes: (name, 'i' or 'f') in the order in which a file holds them.
    """

    name: str
    code: int
    operands: tuple[tuple[str, str, bool], ...]
    attributes: tuple[tuple[str, str], ...]

    def index(self, operand: str) -> int:
        """The place of an operand."""
        return next(at for at, (name, _, _) in enumerate(self.operands) if name == operand)


def _table(text: str) -> dict[str, OpKind]:
    kinds = {}
    for line in text.strip().splitlines():
        line = line.split("#")[0].strip()
        if not line:
            continue
        head, attributes = (part.strip() for part in line.split("|"))
        code, name, *operands = head.split()
        parsed = []
        for operand in operands:
            mode, _, label = operand.partition("=")
            parsed.append((label.rstrip("?"), mode, label.endswith("?")))
        attributes = attributes.replace("CONV", CONV).replace("WINDOW", WINDOW).replace("ACT", ACT)
        pairs = tuple((a.split(":")[0], a.split(":")[1]) for a in attributes.split())
        kinds[name] = OpKind(name, int(code), tuple(parsed), pairs)
    return kinds


OPS = _table(
    """
    # ---- forward
    1  normalize    in=x in=scale in=shift out=y | # u8 (H, W, 3) -> f32: y = x scale[c] + shift[c]
    2  conv         in=x in=w in=table? in=bias? in=residual? out=y out=mask? | CONV ACT
        # y = act(w * x + bias + residual). y may be in place of residual. x, residual, y per image
    3  group_norm   in=x in=gamma? in=beta? out=y out=stats? out=mask? | groups:i eps:f ACT
        # y = act(gamma (x - mean) rstd + beta); biased variance; stats (groups, 2): mean, rstd. in place of x
    4  affine       in=x in=scale in=shift? out=y out=mask? | ACT    # y = act(x scale[c] + shift[c]). in place of x
    5  activation   in=x out=y out=mask? | ACT                      # in place of x
    6  add          in=a in=b out=y out=mask? | ACT                 # y = act(a + b). in place of a or b
        # all of one scope: of scope 'fixed', two gradients of one weight
    7  smooth       in=x out=y | kind:i alpha:f                     # y = f(x). in place of x
    8  gate         in=x in=s out=y |                               # y = x s, s (1, 1, C). in place of x
    9  avg_pool     in=x out=y | WINDOW include_pad:i divisor:i     # divisor 0: the window's size. As nn.AvgPool2d
    10 adaptive_pool in=x out=y |                                   # mean over [floor(i H / h), ceil((i + 1) H / h))
    11 max_pool     in=x out=y out=which? | WINDOW                  # which: u8, number of the winner in its window
    12 upsample     in=x in=residual? out=y |                       # bilinear, corners not aligned, to y's size
        # + residual. in place of residual
    13 dropout      in=x out=y out=mask? | p:f number:i             # see `tinytl.compiler.random`. in place of x
    14 softmax_loss in=logits in=labels out=grad add=metrics | smoothing:f
        # metrics f64 (2,): sum over images of the cross entropy, and how many are right.
        # grad = (softmax - target) / count, count: images of the whole batch. in place of logits
    15 copy         in=x out=y |
    # ---- weights made of trained ones
    20 standardize  in=w out=y | eps:f depthwise:i                  # see tinytl.ops.weight_standardization
    21 scale_weight in=w in=table? in=gamma? in=rstd out=y | depthwise:i  # y = w gamma rstd, by output channel
    22 shift_bias   in=bias? in=gamma? in=beta? in=mean in=rstd out=y |   # y = beta + (bias - mean) gamma rstd
    # ---- backward
    30 act_grad     in=grad in=mask out=y add=bias? | slope:f       # y = grad where mask, else slope grad
        # bias += sum y. in place of grad
    31 bias_grad    in=grad add=bias |                              # bias += sum over images and pixels
    32 conv_dx      in=grad in=w in=table? in=other? in=mask? out=y add=bias? | CONV slope:f
        # y = (w transposed * grad + other), where mask (absent: everywhere) else slope times that;
        # bias += sum y. y may be in place of other
    33 conv_dw      in=x in=grad add=w | CONV
    34 group_norm_grad in=grad in=x in=stats in=gamma? out=y add=gamma_grad? add=beta_grad? | groups:i
        # in place of grad
    35 affine_grad  in=grad in=scale out=y |                        # y = grad scale[c]. in place of grad
    36 channel_dot  in=grad in=x add=y |                            # y[c] += sum grad x
    37 smooth_grad  in=grad in=x out=y | kind:i alpha:f             # y = f'(x) grad. in place of grad
    38 gate_grad    in=grad in=x in=s out=y out=s_grad |            # y = grad s, s_grad = sum over pixels of grad x
        # in place of grad
    39 avg_pool_grad in=grad in=other? out=y | WINDOW include_pad:i divisor:i   # + other. in place of other
    40 adaptive_pool_grad in=grad in=other? out=y |                 # + other. in place of other
    41 max_pool_grad in=grad in=which out=y | WINDOW
    42 upsample_grad in=grad out=y |
    43 dropout_grad in=grad in=mask out=y | p:f                     # in place of grad
    # ---- gradients of weights that others were made of; once a step, when the sums are complete
    50 standardize_grad in=w inout=grad | eps:f depthwise:i         # grad: of standardize(w) -> of w
    51 scale_weight_grad in=w in=table? in=gamma? in=rstd inout=grad add=gamma_grad? | depthwise:i
        # grad: of scale_weight(w) -> of w; gamma_grad += rstd <w, grad before> by output channel
    52 shift_bias_grad in=grad in=bias? in=gamma? in=mean in=rstd add=bias_grad? add=gamma_grad? add=beta_grad? |
    # ---- updates
    60 zero         out=x |
    61 sgd          inout=p in=grad inout=momentum? | weight_decay:f momentum:f
    62 adam         inout=p in=grad inout=m inout=v | weight_decay:f beta1:f beta2:f eps:f
    63 sgd8         inout=p in=grad inout=momentum inout=momentum_scale | weight_decay:f momentum:f
    64 adam8        inout=p in=grad inout=m inout=m_scale inout=v inout=v_scale | weight_decay:f beta1:f beta2:f eps:f
        # 8 bits: u8 codes and f32 scales of 256 values each, as tinytl.engine.block_code
    """
)
"""Name -> kind."""

BY_CODE = {kind.code: kind for kind in OPS.values()}
