"""Hold our network against the authors' own, figure by figure: ``python -m tests.golden FILE``.

A golden file holds the logits, the loss and, for each of the paper's six methods, the norm and one projection
of every trained parameter's gradient, computed in float64 by the authors' published code with weights made by
a formula (``reference/`` in ../shared/data/README.md). Here the same weights are made, put into our
ProxylessNAS-Mobile with lite residual modules, and every figure is computed again through a *route*: stock
autograd, or our own operations.

Relative error is |figure - reference| / scale, and the scale is

- for a gradient's norm: the reference;
- for a projection sum(g * cos(0.7 i + 0.3)): the reference, but at least 1e-2 of the reference's norm, since
  the sum may cancel;
- for a logit: the reference, but at least 1e-2 of the largest one in the file;
- for the loss: the reference.

A gradient whose norm is under 1e-7 of the method's largest counts as being of that norm: float64 has no
further figures there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tinytl.backbones._inverted_residual import InvertedResidualNet
from tinytl.backbones.proxylessnas import LAYOUTS, proxylessnas_mobile, published_names
from tinytl.backbones.weights import load_strict_
from tinytl.methods import METHODS, adapt_

TOLERANCE = 1e-8
SMALLEST_SHARE = 1e-7
CANCELLED_SHARE = 1e-2


@dataclass(frozen=True)
class Outcome:
    """What a route computes: logits (N, classes), loss, published name -> gradient of what was trained."""

    logits: Tensor
    loss: float
    gradients: Mapping[str, Tensor]


Route = Callable[[InvertedResidualNet, str, Tensor, Tensor], Outcome]
"""(model, method as named in the file, images, labels) -> Outcome. The model is the route's own to change."""


def is_trained(method: str, name: str) -> bool:
    """Whether ``method`` trains the parameter of published name ``name``, lite residual modules being
    inserted.

    Raises:
        KeyError: a method that the paper does not have.
    """
    head, lite, norm = name.startswith("classifier."), ".lite_residual." in name, "bn" in name.split(".")[-2]
    bias = norm and name.endswith(".bias")
    rules = {
        "Last": head,
        "TinyTL-B": head or bias,
        "TinyTL-L": head or lite,
        # the last shift of a lite branch stays frozen: the main branch's does its work
        "TinyTL-L+B": head or ((bias or lite) and not name.endswith(".lite_residual.final_bn.bias")),
        "Norm+Last": head or norm,
        "Full": True,
    }
    return rules[method]


def stock(model: InvertedResidualNet, method: str, images: Tensor, labels: Tensor) -> Outcome:
    """The route through stock autograd: freeze, run, differentiate."""
    names = published_names(name for name, _ in model.named_parameters())
    trained = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(method, names[name]))
        if parameter.requires_grad:
            trained[names[name]] = parameter
    logits = model(images)
    loss = F.cross_entropy(logits, labels)
    gradients = torch.autograd.grad(loss, list(trained.values()))
    return Outcome(logits.detach(), loss.item(), dict(zip(trained, gradients, strict=True)))


LIBRARY_NAMES = {
    "Last": "ft-last",
    "TinyTL-B": "tinytl-b",
    "TinyTL-L": "tinytl-l",
    "TinyTL-L+B": "tinytl-l+b",
    "Norm+Last": "ft-norm+last",
    "Full": "ft-full",
}


def lean(model: InvertedResidualNet, method: str, images: Tensor, labels: Tensor) -> Outcome:
    """The route of a user: adapt_, then any loop. What trains is adapt_'s own doing; dropout is switched off."""
    published = published_names(model.state_dict())
    adaptation = adapt_(model, METHODS[LIBRARY_NAMES[method]], resolution=images.shape[-1])
    logits = model.eval()(images)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            gradients[published[adaptation.origins.get(name, name)]] = parameter.grad
    return Outcome(logits.detach(), loss.item(), gradients)


def read(path: Path | str) -> dict[str, Any]:
    """A golden file's content."""
    return json.loads(Path(path).read_text())


def weights(golden: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of the formula, in float64, in published names (../shared/data/README.md)."""
    state = {}
    for j, name in enumerate(sorted(golden["state"])):
        shape = golden["state"][name]
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros(shape, dtype=torch.int64)
            continue
        i = torch.arange(math.prod(shape), dtype=torch.float64)
        phase = j + golden["seed"]
        s = torch.sin(0.37 * i * (1 + 0.01 * (phase % 17)) + 1.7 * phase).reshape(shape)
        if name.endswith("running_var"):
            state[name] = 1 + 0.5 * s
        elif name.endswith(("running_mean", ".bias")):
            state[name] = 0.2 * s
        elif len(shape) == 1:
            state[name] = 1 + 0.2 * s
        elif len(shape) == 2:
            state[name] = s * math.sqrt(2 / shape[1])
        else:
            state[name] = s * math.sqrt(4 / (shape[1] * shape[2] * shape[3]))
    return state


def network(golden: Mapping[str, Any]) -> InvertedResidualNet:
    """Our network with the file's weights: float64, batch norm in evaluation mode, dropout 0."""
    lite = LAYOUTS[0].holds_lite(golden["state"])
    model = proxylessnas_mobile(norm=golden["norm"], num_classes=golden["classes"], lite=lite).double().eval()
    load_strict_(model, weights(golden), published_names(model.state_dict()), origin="the golden file")
    return model


def batch(golden: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Images (batch, 3, resolution, resolution) in float64 and labels (batch,)."""
    shape = (golden["batch"], 3, golden["resolution"], golden["resolution"])
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    images = torch.sin(0.011 * i + golden["seed"]) + 0.5 * torch.sin(0.37 * i)
    return images.reshape(shape), torch.tensor(golden["labels"])


def errors(golden: Mapping[str, Any], method: str, outcome: Outcome) -> dict[str, float]:
    """Figure -> relative error. A parameter that only one side trains counts as infinite."""
    reference = golden["methods"][method]
    logits = torch.tensor(golden["logits"], dtype=torch.float64)
    scale = logits.abs().clamp_min(CANCELLED_SHARE * logits.abs().max().item())
    found = {
        "logits": _finite(((outcome.logits.double().cpu() - logits).abs() / scale).max().item()),
        "loss": _finite(abs(outcome.loss - golden["loss"]) / abs(golden["loss"])),
    }
    for name in reference.keys() ^ outcome.gradients.keys():
        found[f"{name}: {'not trained' if name in reference else 'must not be trained'}"] = math.inf
    floor = SMALLEST_SHARE * max(norm for norm, _ in reference.values())
    for name in reference.keys() & outcome.gradients.keys():
        norm, projection = reference[name]
        gradient = outcome.gradients[name].detach().double().cpu().flatten()
        direction = torch.cos(0.7 * torch.arange(gradient.numel(), dtype=torch.float64) + 0.3)
        size = max(norm, floor)
        found[f"{name}: norm"] = _finite(abs(gradient.norm().item() - norm) / size)
        difference = abs(gradient.dot(direction).item() - projection)
        found[f"{name}: projection"] = _finite(difference / max(abs(projection), CANCELLED_SHARE * size))
    return found


def _finite(error: float) -> float:
    return math.inf if math.isnan(error) else error  # a NaN must not win a comparison


def worst(golden: Mapping[str, Any], method: str, route: Route = stock) -> tuple[float, str]:
    """The largest relative error of ``method`` and the figure it belongs to."""
    images, labels = batch(golden)
    found = errors(golden, method, route(network(golden), method, images, labels))
    figure = max(found, key=lambda name: found[name])
    return found[figure], figure


ROUTES: dict[str, Route] = {"stock": stock, "lean": lean}


def main(arguments: Iterable[str] | None = None) -> int:
    """Check one file through every route; 0 if no relative error is above 1e-8, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=main.__doc__)
    parser.add_argument("file", type=Path, help="a golden file, e.g. tests/data/golden_bn_eval.json")
    golden = read(parser.parse_args(None if arguments is None else list(arguments)).file)
    largest = 0.0
    for route_name, route in ROUTES.items():
        for method in golden["methods"]:
            error, figure = worst(golden, method, route)
            largest = max(largest, error)
            print(f"{route_name:6} {method:11} {error:.2e}  {figure}")
    within = largest <= TOLERANCE
    print(f"largest relative error {largest:.2e}, {'within' if within else 'above'} {TOLERANCE:.0e}")
    return 0 if within else 1


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors this small run faster on one core than on two busy ones
    sys.exit(main())
