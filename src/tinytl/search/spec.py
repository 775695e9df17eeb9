"""What is asked of a search, described once as `tinytl.spec` describes a run."""

from __future__ import annotations

from dataclasses import dataclass

from tinytl._options import check_all, documented, number_of_bytes, option
from tinytl.errors import InputError
from tinytl.spec import FROZEN_BITS, NORMS

POPULATION = 100
"""OFA's evolution (PAPER.md): population 100."""


@documented
@dataclass(frozen=True)
class SearchSpec:
    """All that a search's result depends on. Bad values are refused with an InputError."""

    photos: str = option(help="Folder ROOT/CLASS/*.jpg, one with train/ and val/ or test/ in it, or a data set (elpv).")
    space: str = option("efficientnet_lite0", "A backbone, or a once-for-all super-network; see `tinytl backbones`.")
    memory_budget: int | str = option("64MB", "Most live bytes of a training step, as planned.")
    resolutions: str | None = option(None, "Pixels a side to choose from, such as 128,160,192.")
    max_multiply_adds: float | None = option(
        None, "Most multiply-adds of one image's forward pass, such as 5e7.", above=0
    )
    max_step_seconds: float | None = option(None, "Most seconds of a training step, measured here.", above=0)
    weights: str | None = option(None, "Weights file of the backbone or super-network.")
    pretrained: bool = option(True, "Start from pretrained weights.")
    norm: str = option("bn", "bn (frozen statistics) or gn (with weight standardization).", names=NORMS)
    val_fraction: float = option(
        0.2, "Share of each class that no choice sees, unless the folder has its own split.", above=0, below=1
    )
    split_seed: int = option(0, "Of the choice of what is held out.", least=0)
    min_scale: float = option(0.22, "Smallest share of a photograph's area in a training crop.", above=0, most=1)
    flip: bool = option(True, "Mirror training images at random.")
    color: bool = option(False, "Distort brightness and saturation of training images.")
    batch_size: int = option(8, "Images a step of the run that the winner is for.", least=1)
    micro_batch: int | None = option(None, "Images at a time of that run; the step stays the same.", least=1)
    frozen_bits: int = option(32, "Of that run's frozen weights: 32, 16 or 8.", choices=FROZEN_BITS)
    optimizer_bits: int = option(32, "Of that run's optimizer state: 32 or 8.", choices=(32, 8))
    tune_epochs: int = option(20, "Epochs of fine-tuning the super-network, a random sub-network each step.", least=1)
    tune_batch: int = option(16, "Images a step of that.", least=2)
    lr: float = option(6e-4, "Peak learning rate of the cosine, in fine-tuning and in the runs.", above=0)
    label_smoothing: float = option(0.1, "Share of the target spread over all classes.", least=0, below=1)
    pairs: int = option(120, "Random sub-networks that are measured for the predictor.", least=20)
    population: int = option(POPULATION, "Of the evolution.", least=4)
    generations: int = option(20, "Of the evolution, at most.", least=1)
    finalists: int = option(5, "Best of the evolution that are measured again.", least=1)
    finalist_epochs: int = option(3, "Epochs that each finalist is trained for, to be measured; 0: none.", least=0)
    epochs: int = option(50, "Epochs that the winner is trained for; 0 ends with the choice.", least=0)
    seed: int = option(0, "Of every random draw.", least=0, below=2**63)

    def __post_init__(self) -> None:
        check_all(self)
        number_of_bytes("memory_budget", self.memory_budget)
        self.resolution_list  # noqa: B018 - refuses what is no list of numbers
        if self.micro_batch is not None and self.micro_batch > self.batch_size:
            raise InputError(
                f"micro_batch is {self.micro_batch}, more than the batch_size of {self.batch_size}, of which it is a "
                "part: lower the one or raise the other"
            )
        if self.weights is not None and not self.pretrained:
            raise InputError(f"weights {self.weights!r} given with pretrained false: leave one of the two out")

    @property
    def budget_bytes(self) -> int:
        """`memory_budget` as a number of bytes."""
        return number_of_bytes("memory_budget", self.memory_budget)

    @property
    def resolution_list(self) -> tuple[int, ...] | None:
        """`resolutions` as numbers."""
        if self.resolutions is None:
            return None
        texts = self.resolutions.replace(" ", "").split(",")
        if not all(text.isascii() and text.isdigit() and 32 <= int(text) <= 4096 for text in texts):
            raise InputError(
                f"resolutions is {self.resolutions!r}, expected numbers of pixels from 32 to 4096, such as 128,160,192"
            )
        return tuple(sorted({int(text) for text in texts}))


@documented
@dataclass(frozen=True)
class SearchOptions:
    """How a search is carried out: nothing here changes what is found, but for the order of float sums."""

    processes: int = option(1, "Processes that measure and plan side by side.", least=1, most=256)
    threads: int | None = option(None, "Threads that compute, in each process.", least=1, most=1024)
    workers: int = option(2, "Threads that decode photographs in runs.", least=0)
    checkpoint_seconds: float = option(30.0, "Write a checkpoint of fine-tuning every so many seconds.", above=0)
    strict: bool = option(False, "Refuse photographs that cannot be read, instead of searching without them.")

    def __post_init__(self) -> None:
        check_all(self)
