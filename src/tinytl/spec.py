"""What is asked of a run, and the one place that says so.

`TrainSpec` holds what a run's result depends on, its `FitOptions` among it; `RunOptions` how it is carried out. A field
is the command line's option, and the key of a ``--config`` file, of the same name: all three are made from what stands
here (see `tinytl._options`), so they cannot drift apart.

    tinytl train PHOTOS --epochs 5 --lr 1e-3 --cache 256MB
    train(TrainSpec("PHOTOS", fit=FitOptions(epochs=5, lr=1e-3)), out, options=RunOptions(cache="256MB"))
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from tinytl._options import check_all, documented, number_of_bytes, option
from tinytl.errors import InputError

# Backbones and methods are looked up inside functions: their modules import PyTorch, and the command line's help and
# completion, which read the fields below, should not wait for it.

OPTIMIZERS = ("adam", "sgd")
NORMS = ("bn", "gn")
UPDATES = ("end", "backward")
ENGINES = ("lab", "device")
FROZEN_BITS = (32, 16, 8)
SMALLEST_RESOLUTION = 32


@documented
@dataclass(frozen=True)
class FitOptions:
    """How to train. Bad values are refused with an InputError.

    The paper's learning rates, tuned per data set at batch 8, run from 0.5e-4 to 16e-4; its label smoothing is 0.7, and
    0.1 for CIFAR and Food. The result is the same to the bit for either ``update``. But a gradient that is NaN or
    infinite stops the run, in the lab before a step has changed anything with 'end', and after some parameters have
    changed with 'backward': then the run goes on from its last checkpoint, and what came after that is lost.
    """

    epochs: int = option(50, "Passes over the training images.", least=1)
    lr: float = option(6e-4, "Peak learning rate of the cosine.", least=0)
    weight_decay: float = option(0.0, "Added to the gradient as weight_decay x parameter.", least=0)
    label_smoothing: float = option(0.1, "Share of the target spread over all classes.", least=0, below=1)
    micro_batch: int | None = option(
        None, "Most images whose activations are alive at once; the step stays the same.", least=1
    )
    optimizer: str = option("adam", "adam or sgd.", names=OPTIMIZERS)
    momentum: float = option(0.9, "Of SGD; Adam has its own.", least=0, below=1)
    optimizer_bits: int = option(
        32, "Of the optimizer's state: 32, or 8 (block-wise quantized: approximate).", choices=(32, 8)
    )
    update: str = option(
        "end",
        "Update at the end of the step, or in backward as soon as a gradient is complete (batches in one piece).",
        names=UPDATES,
    )
    seed: int = option(0, "Of every random draw.", least=0, below=2**63)
    warmup_epochs: int = option(0, "Epochs of linear warm-up; they count among the epochs.", least=0)

    def __post_init__(self) -> None:
        check_all(self)
        if self.lr == 0:
            raise InputError("lr is 0: nothing would be learned; the default is 6e-4")
        if self.warmup_epochs >= self.epochs:
            raise InputError(f"warmup_epochs is {self.warmup_epochs}, expected fewer than the {self.epochs} epochs")
        if self.optimizer == "adam" and self.momentum != FitOptions.momentum:
            raise InputError(f"momentum is {self.momentum}, but optimizer 'adam' has its own: take optimizer 'sgd'")
        if self.optimizer == "sgd" and self.momentum == 0 and self.optimizer_bits != 32:
            raise InputError(
                f"optimizer_bits is {self.optimizer_bits}, but 'sgd' with momentum 0 keeps no state: leave it"
            )


@documented
@dataclass(frozen=True)
class TrainSpec:
    """All that a run's result depends on, but for the order of float sums, which the number of threads may change.

    `fit` says how to train, as `FitOptions`; its seed is the run's. The split's seed is another one, so that runs of
    several seeds are compared on the same photographs. The paper's smallest crop is 0.22.
    """

    photos: str = option(help="Folder ROOT/CLASS/*.jpg, one with train/ and val/ in it, or a data set (elpv).")
    backbone: str = option("efficientnet_lite0", "See `tinytl backbones`.")
    method: str = option("tinytl-l+b", "A name, or parts with + between; see `tinytl methods`.")
    last_blocks: int = option(0, "Also train the last K blocks, and all behind them, in full.", least=0)
    norm: str = option("bn", "bn (frozen statistics) or gn (with weight standardization).", names=NORMS)
    weights: str | None = option(None, "Weights file of the backbone.")
    pretrained: bool = option(True, "Start from pretrained weights.")
    resolution: int | None = option(None, "Pixels a side; by default the backbone's own.", least=SMALLEST_RESOLUTION)
    batch_size: int = option(8, "Images a step.", least=1)
    val_fraction: float = option(
        0.2, "Share of each class held out for validation, unless the folder has its own split.", above=0, below=1
    )
    split_seed: int = option(0, "Of the choice of what is held out.", least=0)
    min_scale: float = option(0.22, "Smallest share of a photograph's area in a training crop.", above=0, most=1)
    flip: bool = option(True, "Mirror training images at random.")
    color: bool = option(False, "Distort brightness and saturation of training images.")
    calibrate: bool = option(True, "Measure the statistics of fresh lite modules on training images first.")
    frozen_bits: int = option(
        32,
        "Of the frozen weights: 32, or 16 or 8 (rounded: approximate), expanded a layer at a time.",
        choices=FROZEN_BITS,
    )
    codebook: bool = option(False, "With 8 frozen bits: a table of 256 values a layer in place of a scale a channel.")
    memory_budget: int | str | None = option(
        None, "Most live bytes of a training step, such as 48MB; the fastest plan that fits is chosen."
    )
    engine: str = option(
        "lab", "lab: PyTorch; device: compiled, and trained in a small process without it.", names=ENGINES
    )
    fit: FitOptions = dataclasses.field(default_factory=FitOptions)

    def __post_init__(self) -> None:
        from tinytl.backbones import find
        from tinytl.methods import Full, method

        check_all(self)
        find(self.backbone)
        chosen = method(self.method, last_blocks=self.last_blocks)
        if self.last_blocks and chosen.part(Full) is not None:
            raise InputError(
                f"last_blocks is {self.last_blocks} and method {self.method!r}, which trains every block: leave one out"
            )
        if self.fit.micro_batch is not None and self.fit.micro_batch > self.batch_size:
            raise InputError(
                f"micro_batch is {self.fit.micro_batch}, more than the batch_size of {self.batch_size}, of which it is "
                "a part: lower the one or raise the other"
            )
        if self.fit.update == "backward" and (self.fit.micro_batch or self.batch_size) < self.batch_size:
            raise InputError(
                f"update is 'backward' and micro_batch {self.fit.micro_batch} of a batch_size of {self.batch_size}: "
                "accumulated gradients are complete at the step's end only; take update 'end', or leave micro_batch out"
            )
        if self.codebook and self.frozen_bits != 8:
            raise InputError(f"codebook with frozen_bits {self.frozen_bits}: a table of 256 values takes frozen_bits 8")
        if self.weights is not None and not self.pretrained:
            raise InputError(f"weights {self.weights!r} given with pretrained false: leave one of the two out")


@documented
@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out: nothing here changes what is learned, and a resumed run may choose anew.

    A checkpoint is written at each epoch's end in any case, and after so many steps or seconds, whichever comes first.
    """

    workers: int = option(2, "Threads that decode photographs; 0 decodes in the training thread.", least=0)
    threads: int | None = option(
        None,
        "Threads that compute; by default as many as PyTorch takes, of a compiled step 2 and at most those it was "
        "compiled for.",
        least=1,
        most=1024,
    )
    checkpoint_steps: int | None = option(None, "Write a checkpoint every so many steps.", least=1)
    checkpoint_seconds: float | None = option(60.0, "Write a checkpoint every so many seconds.", above=0)
    cache: int | str = option(0, "Most memory for decoded photographs, such as 256MB; 0 holds none.")
    strict: bool = option(False, "Refuse photographs that cannot be read, instead of training without them.")
    tensorboard: bool = option(False, "Also write TensorBoard files into the run's folder.")
    report: bool = option(False, "Also write report.html, a page on the run that needs no network, into its folder.")

    def __post_init__(self) -> None:
        check_all(self)

    @property
    def cache_bytes(self) -> int:
        """`cache` as a number of bytes."""
        return number_of_bytes("cache", self.cache)
