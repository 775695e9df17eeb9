"""What is asked of a super-network's training, described once, as `tinytl.spec` does for a run. Imports no PyTorch.

How it is carried out is said by `tinytl.spec.RunOptions`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinytl._options import check_all, documented, option
from tinytl.errors import InputError
from tinytl.spec import SMALLEST_RESOLUTION

DEFAULT_OUT = "runs/supernet"


@documented
@dataclass(frozen=True)
class SupernetSpec:
    """All that a super-network's training depends on, but for the number of processes, which the run adds.

    First the largest network is trained alone, for ``epochs``; then, phase by phase, smaller kernels, fewer blocks and
    narrower blocks are let in, each phase for ``phase_epochs``, while that largest network teaches. The rates are for
    batches of 32 images. Bad values are refused with an InputError.
    """

    photos: str = option(help="Folder ROOT/CLASS/*.jpg, one with train/ and val/ in it, or a data set (elpv).")
    space: str = option("ofa_tiny_d234_e346_k357", "Once-for-all space: see `tinytl backbones`, names with ofa_.")
    resolutions: str | None = option(
        None,
        "Pixels a side, such as 48,56,64: one drawn for each batch, evaluated at the largest. By default the space's "
        "own, seven eighths and three quarters of it, in multiples of 8.",
    )
    epochs: int = option(40, "Passes over the training images for the largest network alone.", least=1)
    phase_epochs: int = option(10, "Passes in each phase of shrinking.", least=1)
    lr: float = option(0.1, "Peak learning rate of the largest network's cosine.", above=0)
    phase_lr: float = option(0.03, "Peak learning rate of each later phase's cosine.", above=0)
    warmup_epochs: int = option(1, "Epochs of linear warm-up for the largest network; they count.", least=0)
    momentum: float = option(0.9, "Of SGD (Nesterov's).", least=0, below=1)
    weight_decay: float = option(3e-5, "Of weights; norms, biases and kernel matrices have none.", least=0)
    label_smoothing: float = option(0.1, "Share of the target spread over all classes.", least=0, below=1)
    kd_ratio: float = option(1.0, "Weight of the teacher's part of the loss; 0: no teacher.", least=0)
    subnets: int = option(2, "Sub-networks drawn for each step; their gradients are averaged.", least=1)
    batch_size: int = option(32, "Images a step, of all processes together.", least=2)
    val_fraction: float = option(
        0.2, "Share of each class held out for validation, unless the folder has its own split.", above=0, below=1
    )
    split_seed: int = option(0, "Of the choice of what is held out.", least=0)
    min_scale: float = option(0.35, "Smallest share of a photograph's area in a training crop.", above=0, most=1)
    flip: bool = option(True, "Mirror training images at random.")
    color: bool = option(False, "Distort brightness and saturation of training images.")
    calibration_images: int = option(
        512, "Training images on which a sub-network's batch-norm statistics are measured.", least=2
    )
    measured: int = option(4, "Random sub-networks measured at the end, beside the smallest and the largest.", least=0)
    seed: int = option(0, "Of every random draw.", least=0, below=2**63)

    def __post_init__(self) -> None:
        from tinytl.backbones.once_for_all import space_of

        check_all(self)
        space_of(self.space)
        if "@" in self.space:
            raise InputError(f"space is {self.space!r}, one network of it: leave out what begins with '@'")
        if self.warmup_epochs >= self.epochs:
            raise InputError(f"warmup_epochs is {self.warmup_epochs}, expected fewer than the {self.epochs} epochs")
        _ = self.sizes

    @property
    def sizes(self) -> tuple[int, ...]:
        """The resolutions as numbers, ascending.

        Raises:
            InputError: the text is no list of different whole numbers of at least 32.
        """
        from tinytl.backbones.once_for_all import space_of

        if self.resolutions is None:
            own = space_of(self.space).preprocessing.resolution
            parts = {own, own * 7 // 8 // 8 * 8, own * 3 // 4 // 8 * 8}
            return tuple(sorted(size for size in parts if size >= SMALLEST_RESOLUTION))
        words = self.resolutions.split(",")
        numbers = sorted({int(word) for word in words if word.strip().isascii() and word.strip().isdigit()})
        if len(numbers) != len(words) or numbers[0] < SMALLEST_RESOLUTION or numbers[-1] > 4096:
            raise InputError(
                f"resolutions is {self.resolutions!r}, expected different numbers from {SMALLEST_RESOLUTION} to 4096 "
                "with commas between them, such as 48,56,64"
            )
        return tuple(numbers)
