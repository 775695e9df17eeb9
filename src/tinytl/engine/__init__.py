"""Training and evaluation: plain loops over batches and micro-batches."""

from tinytl.spec import OPTIMIZERS, FitOptions

from .batches import BatchSource, LabelledBatch, pieces
from .block_update import scratch_bytes
from .eight_bit import Adam8bit, SGD8bit
from .evaluation import Evaluation, evaluate
from .fitting import fit
from .infos import EpochInfo, FitResult, StepInfo, peak_bytes
from .optimizer import learning_rate, make_optimizer, seed_generators
from .step import StepObserver, run_step, train_step

__all__ = [
    "OPTIMIZERS",
    "Adam8bit",
    "BatchSource",
    "EpochInfo",
    "Evaluation",
    "FitOptions",
    "FitResult",
    "LabelledBatch",
    "SGD8bit",
    "StepInfo",
    "StepObserver",
    "evaluate",
    "fit",
    "learning_rate",
    "make_optimizer",
    "peak_bytes",
    "pieces",
    "run_step",
    "scratch_bytes",
    "seed_generators",
    "train_step",
]
