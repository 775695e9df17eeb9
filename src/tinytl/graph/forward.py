"""What stands in the place of a traced module's forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tinytl.errors import InputError
from tinytl.nn.lean import LeanForward
from tinytl.ops._eager import eager
from tinytl.ops.chain import Stage

from .program import Attr, Program, Ref, Segment, leaves, replace_leaves, value_of
from .program import Size as SizeOf
from .runner import Body, Runner, extended, stages_of_step


class TracedForward(LeanForward):
    """A module's forward as programs, one for training mode and one for evaluation mode.

    Set as the attribute `forward` of `module`; a copy of the module gets a copy that runs on the copy, and both can
    be pickled.
    """

    def __init__(self, module: nn.Module, name: str, training: Program, evaluation: Program) -> None:
        self.module, self.name = module, name
        self.training = _Plan(training)
        self.evaluation = self.training if evaluation == training else _Plan(evaluation)

    @eager
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program of the module's mode."""
        plan = self.training if self.module.training else self.evaluation
        values = self._enter(plan, args, kwargs)
        Runner(self.module, plan.body, values, self.name).run()
        output = plan.program.output
        return values[output.index] if isinstance(output, Ref) else replace_leaves(output, _Finder(self.module, values))

    def stages(self) -> list[Stage] | None:
        """The whole forward as lean stages, if it is a straight line of them."""
        plan = self.training if self.module.training else self.evaluation
        if not plan.is_line:
            return None
        found: list[Stage] = []
        for step in plan.program.steps:
            stages = stages_of_step(self.module, step, _Finder(self.module, {}))
            if stages is None:
                return None
            found = extended(found, stages)
        return found

    def own_tensors(self) -> list[Tensor]:
        """The tensors at the paths that the steps name."""
        steps = [step for plan in (self.training, self.evaluation) for step in plan.program.steps]
        inner = [within for step in steps if isinstance(step, Segment) for within in step.steps]
        read = leaves([(step.args, step.kwargs) for step in (*steps, *inner)])
        names = {leaf for leaf in read if isinstance(leaf, Attr)}
        found = map(_Finder(self.module, {}), names)
        return [tensor for tensor in found if isinstance(tensor, Tensor)]

    def _enter(self, plan: _Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, Any]:
        program = plan.program
        values = program.bind(args, kwargs)
        if values is None:
            raise InputError(f"{self.name}: called with other arguments than when it was adapted")
        if program.fixed is not None:
            shapes = tuple(tuple(v.shape[1:]) for v in values.values() if isinstance(v, Tensor))
            if shapes != program.fixed:
                raise InputError(
                    f"{self.name}: was adapted for inputs of {list(program.fixed)} and got {list(shapes)}, the first "
                    "axis left out; adapt the network with resolution= of the images"
                )
        return values


class _Plan:
    """A program with what running it needs."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.body = Body(program.steps, program.output)
        self.is_line = self._is_line()

    def _is_line(self) -> bool:
        """Whether it takes one tensor through one step after another, nothing left over."""
        program = self.program
        at = program.only_input
        if at is None or program.fixed is not None:
            return False
        for step in program.steps:
            if list(step.refs()) != [at] or len(step.outs) != 1 or self.body.uses.get(at.index) != 1:
                return False
            at = Ref(step.outs[0])
        return program.output == at


class _Finder:
    """What the leaves of a structure stand for."""

    def __init__(self, module: nn.Module, values: dict[int, Any]) -> None:
        self._module, self._values = module, values

    def __call__(self, leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return self._values[leaf.index]
        if isinstance(leaf, Attr):
            found: Any = self._module
            for name in leaf.path.split("."):
                found = getattr(found, name)
            return found
        return value_of(leaf, self._values) if isinstance(leaf, SizeOf) else leaf
