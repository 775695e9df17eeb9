"""Training and evaluation: plain loops over batches and micro-batches."""

from tinytl.spec import OPTIMIZERS, FitOptions

from .evaluation import BatchSource, Evaluation, LabelledBatch, evaluate
from .fitting import fit
from .infos import EpochInfo, FitResult, StepInfo, peak_bytes
from .optimizer import learning_rate, make_optimizer, seed_generators
from .step import train_step

__all__ = [
    "OPTIMIZERS",
    "BatchSource",
    "EpochInfo",
    "Evaluation",
    "FitOptions",
    "FitResult",
    "LabelledBatch",
    "StepInfo",
    "evaluate",
    "fit",
    "learning_rate",
    "make_optimizer",
    "peak_bytes",
    "seed_generators",
    "train_step",
]
