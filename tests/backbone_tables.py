"""The tables of docs/backbones.md, made from the code: ``python -m tests.backbone_tables`` writes them there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from torch import nn

from tinytl.backbones import BACKBONES, BackboneEntry, find
from tinytl.backbones.once_for_all import SPACES, architecture_text, smallest
from tinytl.nn.layers import Conv2dSame
from tinytl.nn.lite_residual import insert_lite_blocks_

PAGE = Path(__file__).parents[1] / "docs" / "backbones.md"
ACTIVATIONS = {nn.ReLU: "ReLU", nn.ReLU6: "ReLU6", nn.Hardswish: "hard-swish", nn.Hardsigmoid: "hard-sigmoid"}


def rows(names: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    head = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*head, *("| " + " | ".join(line) + " |" for line in lines)])


def ghost(entry: BackboneEntry) -> nn.Module:
    """The network without memory."""
    with torch.device("meta"):
        return entry.build()


def networks() -> str:
    """Totals, input, padding, activations, weights."""
    lines = []
    for name, entry in BACKBONES.items():
        total, p = entry.complexity(), entry.preprocessing
        modules = list(ghost(entry).modules())
        kinds = [text for kind, text in ACTIVATIONS.items() if any(type(module) is kind for module in modules)]
        padding = "SAME" if any(type(module) is Conv2dSame for module in modules) else "symmetric"
        eps = {f"{module.eps:g}" for module in modules if isinstance(module, nn.BatchNorm2d)}
        lines.append(
            (
                f"`{name}`",
                f"{total.parameters:,}",
                f"{total.multiply_adds / 1e6:,.1f} M",
                str(p.resolution),
                _input(p.mean, p.std),
                p.interpolation,
                padding,
                ", ".join(kinds),
                ", ".join(eps) or "folded",
                entry.weights_from,
                entry.licence,
            )
        )
    columns = ("name", "parameters", "multiply-adds", "px", "input", "resize", "padding", "activations")
    return rows((*columns, "batch norm eps", "weights", "licence of the weights"), lines)


def _input(mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    if len(set(mean)) == 1:
        return f"(x - {mean[0] * 255:g}) / {std[0] * 255:g}"
    return "ImageNet's mean and deviation"


def layouts() -> str:
    """The key layouts that each network's files are recognized in."""
    lines = []
    for name, entry in BACKBONES.items():
        known = [layout.publisher for layout in entry.layouts]
        if name in SPACES:
            known += ["once-for-all super-network"]
        if entry.norms == ("bn",):
            known += ["int8 `.pkl`", "int8 `.safetensors`"]
        lines.append((f"`{name}`", ", ".join(known), ", ".join(entry.weights_norms)))
    return rows(("name", "read beside our own", "norms of published weights"), lines)


def placement() -> str:
    """Where ``LiteResidual()`` puts its modules, and how large they are."""
    lines = []
    for name, entry in BACKBONES.items():
        model = ghost(entry)
        paths = list(model.block_paths)  # pyright: ignore[reportArgumentType]
        with torch.device("meta"):
            inserted = insert_lite_blocks_(model, paths[1:])
        assert inserted == [f"{path}.lite" for path in paths[1:]]
        groups: dict[tuple[int, bool], list[int]] = {}
        for number, path in enumerate(inserted, start=1):
            lite = model.get_submodule(path)
            kernel = lite.get_submodule("conv1").kernel_size[0]  # pyright: ignore
            pools_globally = isinstance(lite.get_submodule("pool"), nn.AdaptiveAvgPool2d)
            groups.setdefault((kernel, pools_globally), []).append(number)  # pyright: ignore
        kernels = "; ".join(f"{numbers[0]}-{numbers[-1]}: {kernel}" for (kernel, _), numbers in groups.items())
        wide = "; ".join(f"{numbers[0]}-{numbers[-1]}" for (_, everywhere), numbers in groups.items() if everywhere)
        parameters = sum(p.numel() for key, p in model.named_parameters() if ".lite." in key)
        span = f"`{inserted[0].removesuffix('.lite')}` to `{inserted[-1].removesuffix('.lite')}`"
        lines.append((f"`{name}`", str(len(paths)), span, kernels, wide or "nowhere", f"{parameters:,}"))
    columns = ("name", "blocks", "a lite module beside", "kernel, by block number", "pools globally")
    return rows((*columns, "parameters of the modules"), lines)


def fewest() -> str:
    """Totals of each space's smallest network."""
    lines = []
    for name, space in SPACES.items():
        text = architecture_text(space, smallest(space))
        total = find(f"{name}@{text}").complexity()
        lines.append((f"`{name}`", f"`@{text}`", f"{total.parameters:,}", f"{total.multiply_adds / 1e6:,.1f} M"))
    return rows(("name", "smallest", "parameters", "multiply-adds"), lines)


TABLES = {"networks": networks, "smallest": fewest, "layouts": layouts, "placement": placement}


def written(page: str) -> str:
    """``page`` with its tables made anew."""
    for name, make in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
        page, count = re.subn(pattern, lambda m, make=make: m[1] + make() + "\n" + m[2], page, flags=re.DOTALL)
        assert count == 1, f"docs/backbones.md has {count} places for the table {name!r}"
    return page


def main() -> int:
    """Write the tables into docs/backbones.md."""
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
