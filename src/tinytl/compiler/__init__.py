"""The training step compiled ahead of time into one file, for an executor that needs no PyTorch.

    compiled = compile_spec(TrainSpec("photos", "proxylessnas_mobile", frozen_bits=8))
    write_program(compiled.program, "program.ttl")          # then: python -m tinytl.runtime train program.ttl photos

Step by step: `capture` (an adapted network's forward) -> `training_program` (backward by our own rules, updates) ->
`lay_out` (one arena) -> `write_program`. `plan` chooses how a step is taken, and does the two in the middle.
"""

from .arena import lay_out
from .by_role import bytes_by_role
from .capture import capture
from .compile import Compiled, compile_model, compile_network, compile_run, compile_spec
from .describe import describe
from .differentiate import training_program
from .file import read_program, write_program
from .interpreter import Interpreter
from .picture import draw_arena
from .plan import plan
from .program import Instruction, Program, Tensor
from .step_options import StepOptions

__all__ = [
    "Compiled",
    "Instruction",
    "Interpreter",
    "Program",
    "StepOptions",
    "Tensor",
    "bytes_by_role",
    "capture",
    "compile_model",
    "compile_network",
    "compile_run",
    "compile_spec",
    "describe",
    "draw_arena",
    "lay_out",
    "plan",
    "read_program",
    "training_program",
    "write_program",
]
