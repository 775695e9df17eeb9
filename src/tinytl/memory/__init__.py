"""Memory: counted by the paper's rule, kept by the operations' rules, measured by the allocator and the system."""

from tinytl.nn.kept import Kept, KeptEntry, kept

from .capture import StepDescription, capture_step
from .counted import Counted, count
from .measured import Measured, Timeline, adam, measure_step, measure_training_step, resident_tensors, training_step
from .plan import StepPlan
from .planner import Planned, plan_step
from .profile import Figures, Profile, profile_step
from .rss import rss_delta
from .step import StepSpec
from .timeline import draw_timelines

__all__ = [
    "Counted",
    "Figures",
    "Kept",
    "KeptEntry",
    "Measured",
    "Planned",
    "Profile",
    "StepDescription",
    "StepPlan",
    "StepSpec",
    "Timeline",
    "adam",
    "capture_step",
    "count",
    "draw_timelines",
    "kept",
    "measure_step",
    "measure_training_step",
    "plan_step",
    "profile_step",
    "resident_tensors",
    "rss_delta",
    "training_step",
]
