"""`adapt_(model, method)`: change a network in place so that it trains as the method says, and tell what was done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from tinytl.graph.capture import Captured, capture, run_traced
from tinytl.graph.frame import Trace
from tinytl.nn.kept import kept
from tinytl.nn.meta import meta_copy

from ._checks import blocks_of_lite, check_ready, choose_blocks, choose_classifier, lite_shapes
from ._lowering import Lowering, is_leaf
from ._prepare import Plan, prepare_
from ._traced import TracedModules
from .identity import base_hash
from .method import Method
from .parts import Part


@dataclass(frozen=True)
class Adaptation:
    """What `adapt_` did.

    Attributes:
        method: as given.
        base_hash: of the network before (see `tinytl.methods.base_hash`).
        trained, frozen: names of the parameters that train, and of those that do not.
        folded: paths of the normalizations that became part of a convolution.
        inserted: paths of the lite residual modules that were put in.
        blocks: paths of the network's blocks before adapting, in forward order, as named or found.
        classifier: path of the classifier, as named or found.
        delta_keys: names in the state dict of all that is learned: the trained parameters, and every tensor of
            what was inserted. Together with the base and the method they are the trained network.
        origins: name after adapting -> name before, where the two differ.
        kept_bytes_per_image: bytes kept for backward for one image of `resolution`; None for stock PyTorch, which
            states no rules.
        resolution: pixels a side at which that was counted.
        trained_elements, frozen_elements: numbers of values.
    """

    method: Method
    base_hash: str
    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    folded: tuple[str, ...]
    inserted: tuple[str, ...]
    blocks: tuple[str, ...]
    classifier: str
    delta_keys: tuple[str, ...]
    origins: dict[str, str]
    kept_bytes_per_image: int | None
    resolution: int
    trained_elements: int
    frozen_elements: int

    def rows(self) -> list[tuple[str, str]]:
        """What was done, as (name, value) lines for a table."""
        kept_line = "not stated by stock PyTorch"
        if self.kept_bytes_per_image is not None:
            kept_line = f"{self.kept_bytes_per_image / 1e6:.2f} MB an image of {self.resolution} px"
        return [
            ("method", self.method.name),
            ("trained", f"{self.trained_elements:,} values in {len(self.trained)} tensors"),
            ("frozen", f"{self.frozen_elements:,} values in {len(self.frozen)} tensors"),
            ("classifier", self.classifier),
            ("blocks", f"{len(self.blocks)}: {self.blocks[0]} ... {self.blocks[-1]}" if self.blocks else "none"),
            ("folded", f"{len(self.folded)} normalizations into their convolutions"),
            ("inserted", f"{len(self.inserted)} lite residual modules"),
            ("kept for backward", kept_line),
        ]

    def __str__(self) -> str:
        """The table as plain text."""
        width = max(len(name) for name, _ in self.rows())
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.rows())


def adapt_(
    model: nn.Module,
    method: Method | Part,
    *,
    blocks: Sequence[str] | None = None,
    classifier: str | None = None,
    resolution: int = 224,
    lean: bool = True,
    seed: int = 0,
) -> Adaptation:
    """Change `model` in place: insert what the method inserts, say what trains, and make its layers lean.

    The output right after equals the output before in evaluation mode. The model stays an ordinary nn.Module.

    Args:
        model: any network that takes one batch of images; its forward is traced (see docs/foreign-networks.md).
        method: what trains; a single part is a method too.
        blocks: paths of its blocks in forward order, the first of which gets no lite module; by default what the
            network says of itself (`model.block_paths`), or what is found in its graph (`tinytl.graph.blocks` has
            the rule).
        classifier: path of the classifier, which trains in every method; by default the last layer with parameters.
        resolution: of the images, to count what is kept.
        lean: False leaves the layers as they are: stock PyTorch training the same parameters, for comparison.
        seed: of the lite modules' random weights.

    Raises:
        InputError: no such classifier or block, or none found; more last blocks than there are; a model that is
            adapted already, or that does not run on images of `resolution`.
        UnsupportedLayerError: a layer or a forward that cannot be made lean stands where a gradient flows (it is
            named), or one whose statistics cannot be frozen, or one with hooks that would be lost.

    Whatever is raised, the model is as it was.
    """
    method = method if isinstance(method, Method) else Method((method,))
    check_ready(model)
    plan = plan_adaptation(model, method, blocks, classifier, resolution=resolution, seed=seed)
    identity = base_hash(model, exclude=(f"{plan.classifier}.",))
    # First on a copy without memory: what is refused is refused there, and leaves the network as it was.
    ghost = meta_copy(model)
    prepare_(ghost, plan)
    captured = capture(meta_copy(ghost), resolution, is_leaf)
    kept_bytes = None
    if lean:
        lower_(ghost, captured, plan)
        kept_bytes = kept(ghost, (1, 3, resolution, resolution)).total_bytes
    inserted = prepare_(model, plan)
    lowering = lower_(model, captured, plan) if lean else Lowering()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    delta = [
        key for key in model.state_dict() if key in trained or key.startswith(tuple(f"{path}." for path in inserted))
    ]
    return Adaptation(
        method=method,
        base_hash=identity,
        trained=tuple(trained),
        frozen=tuple(frozen),
        folded=tuple(lowering.folded),
        inserted=tuple(inserted),
        blocks=tuple(plan.blocks),
        classifier=plan.classifier,
        delta_keys=tuple(delta),
        origins=lowering.origins,
        kept_bytes_per_image=kept_bytes,
        resolution=resolution,
        trained_elements=sum(p.numel() for p in trained.values()),
        frozen_elements=sum(p.numel() for p in frozen.values()),
    )


def plan_adaptation(
    model: nn.Module,
    method: Method,
    blocks: Sequence[str] | None = None,
    classifier: str | None = None,
    *,
    resolution: int = 224,
    seed: int = 0,
    trace: Trace | None = None,
) -> Plan:
    """Decide what will be done, by a trace of the network as it is (`stock_trace`, made here where none is given)."""
    trace = stock_trace(model, resolution) if trace is None else trace
    head = choose_classifier(model, classifier, trace)
    paths = choose_blocks(model, blocks, method, trace)
    shapes = lite_shapes(model, blocks_of_lite(method, paths), trace)
    return Plan(method, paths, head, shapes, list(trace.parameters), seed)


def stock_trace(model: nn.Module, resolution: int) -> Trace:
    """Trace a network as it is, frozen, by a copy of it. Raises what `adapt_` raises for it."""
    return run_traced(meta_copy(model).requires_grad_(False).eval(), resolution, is_leaf)


def lower_(model: nn.Module, captured: Captured, plan: Plan) -> Lowering:
    """Make the layers of a prepared network lean, as its capture says."""
    lowering = Lowering(TracedModules(model, captured, plan.blocks))
    lowering.run(model)
    return lowering
