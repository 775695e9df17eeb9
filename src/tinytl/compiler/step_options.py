"""How a compiled training step is to be carried out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepOptions:
    """How a step is to be carried out.

    Attributes:
        batch, micro_batch, evaluate_images: images of a step at most, of a micro-batch, of one pass of `evaluate`.
        label_smoothing: share of the target that is spread over all classes.
        recompute: numbers of the stretches (see `tinytl.compiler.again.stretches`) that run again in backward.
        joined: numbers of stretches that are one with the stretch before them: where both run again, what lies between
            is not kept.
        updates: 'end', or 'backward': each as soon as its gradient is complete; takes the batch in one piece.
        optimizer: 'adam' or 'sgd'.
        optimizer_bits: 32 or 8 a value of its state.
        weight_decay, momentum, betas, eps: of the optimizer.
        threads: for which the arena has scratch memory.
        fuse: False leaves every operation an instruction of its own.

    Raises:
        ValueError: a name or number out of range, or updates in backward of a batch in several pieces.
    """

    batch: int = 8
    micro_batch: int = 8
    evaluate_images: int = 8
    label_smoothing: float = 0.1
    recompute: frozenset[int] = frozenset()
    joined: frozenset[int] = frozenset()
    updates: str = "end"
    optimizer: str = "adam"
    optimizer_bits: int = 32
    weight_decay: float = 0.0
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    threads: int = 2
    fuse: bool = True

    def __post_init__(self) -> None:
        choices = {
            "updates": ("end", "backward"),
            "optimizer": ("adam", "sgd"),
            "optimizer_bits": (32, 8),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {known}")
        if not 1 <= self.micro_batch <= self.batch or self.evaluate_images < 1 or self.threads < 1:
            raise ValueError(f"{self}: expected 1 <= micro_batch <= batch, evaluate_images and threads of 1 or more")
        if self.updates == "backward" and self.micro_batch != self.batch:
            raise ValueError(
                f"updates is 'backward' and micro_batch {self.micro_batch} of a batch of {self.batch}: accumulated "
                "gradients are complete at the step's end only"
            )

    @property
    def pieces(self) -> bool:
        """Whether a batch is more than one micro-batch."""
        return self.micro_batch < self.batch
