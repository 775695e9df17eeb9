"""Golden logits: what implementations that are not ours compute with the same weights, in float64.

``python -m tests.golden_logits MCU_FOLDER`` makes ``tests/data/golden_logits.json``. It needs torchvision and timm, and
``MCU_FOLDER`` with the three published int8 networks as .safetensors; the tests need neither (the real int8 weights
only where they are there).

Weights by a formula over the publisher's own key names (that of ``tests/golden.py``): let the keys be sorted, j a key's
index, i the flat index in its tensor, s = sin(0.37 i (1 + 0.01 ((j + seed) mod 17)) + 1.7 (j + seed)). Then
``running_var`` = 1 + 0.5 s; ``running_mean`` = 0.2 s; 1-d ``.weight`` = 1 + 0.2 s; ``.bias`` = 0.2 s;
4-d = s sqrt(4 / (in k k)); 2-d = s sqrt(2 / in); ``num_batches_tracked`` = 0. Of an int8 network: ``weight_int8`` =
round(127 s), ``bias_int32`` = round(2000 s), ``weight_scale`` = (1 + 0.2 s) sqrt(4 / (in k k)) / 127 in float32, and
x_scale = 0.01 (1 + number of the convolution mod 5). The input at flat index i is sin(0.011 i) + 0.5 sin(0.37 i).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .mcu_files import MCU_FILES

FILE = Path(__file__).parent / "data" / "golden_logits.json"
SIDE = 64
EVERY = 10
"""Every tenth of the 1000 logits is kept."""


def wave(shape: tuple[int, ...], j: int, seed: int = 0) -> np.ndarray:
    """s of the formula, in float64."""
    i = np.arange(int(np.prod(shape)), dtype=np.float64)
    return np.sin(0.37 * i * (1 + 0.01 * ((j + seed) % 17)) + 1.7 * (j + seed)).reshape(shape)


def formula_state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The formula's tensors for a publisher's keys and shapes."""
    state = {}
    for j, name in enumerate(sorted(shapes)):
        shape = tuple(shapes[name])
        s = wave(shape, j)
        if name.endswith("num_batches_tracked"):
            value = np.zeros(shape)
        elif name.endswith("running_var"):
            value = 1 + 0.5 * s
        elif name.endswith(("running_mean", ".bias")):
            value = 0.2 * s
        elif len(shape) == 1:
            value = 1 + 0.2 * s
        elif len(shape) == 4:
            value = s * np.sqrt(4 / np.prod(shape[1:]))
        else:
            value = s * np.sqrt(2 / shape[1])
        state[name] = value
    return state


def formula_int8(shapes: Mapping[str, tuple[int, int, int, int]]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The formula's int8 tensors (by ``NAME.kind``) and x_scale (by name), for convolutions in forward order."""
    kinds = ("weight_int8", "bias_int32", "weight_scale")
    keys = sorted(f"{name}.{kind}" for name in shapes for kind in kinds)
    tensors = {}
    for j, key in enumerate(keys):
        name, _, kind = key.rpartition(".")
        out, *rest = shapes[name]
        if kind == "weight_int8":
            tensors[key] = np.round(127 * wave(shapes[name], j)).astype(np.int8)
        elif kind == "bias_int32":
            tensors[key] = np.round(2000 * wave((out,), j)).astype(np.int32)
        else:
            tensors[key] = ((1 + 0.2 * wave((out,), j)) * np.sqrt(4 / np.prod(rest)) / 127).astype(np.float32)
    return tensors, {name: 0.01 * (1 + number % 5) for number, name in enumerate(shapes)}


def formula_input(side: int = SIDE) -> np.ndarray:
    """One image (3, side, side)."""
    i = np.arange(3 * side * side, dtype=np.float64)
    return (np.sin(0.011 * i) + 0.5 * np.sin(0.37 * i)).reshape(3, side, side)


# ------------------------------------------------------------- the int8 networks, in numpy from their description alone


def _conv(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int, groups: int) -> np.ndarray:
    """(C, H, W) -> (out, ceil(H / stride), ceil(W / stride)), zero padding (k - 1) // 2, tap by tap."""
    kernel = weight.shape[2]
    pad = (kernel - 1) // 2
    height, width = ((side + 2 * pad - kernel) // stride + 1 for side in x.shape[1:])
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    y = np.zeros((weight.shape[0], height, width)) + bias[:, None, None]
    for dy in range(kernel):
        for dx in range(kernel):
            tap = padded[:, dy : dy + stride * height : stride, dx : dx + stride * width : stride]
            if groups == 1:
                y += np.einsum("oc,chw->ohw", weight[:, :, dy, dx], tap)
            else:
                y += weight[:, 0, dy, dx][:, None, None] * tap  # depthwise
    return y


def int8_logits(
    architecture: Mapping[str, Any], tensors: Mapping[str, np.ndarray], x_scales: Mapping[str, float], x: np.ndarray
) -> np.ndarray:
    """Logits of one image in float64; weights and biases rounded to float32 first, as a float network holds them."""

    def layer(entry: Mapping[str, Any], x: np.ndarray, act: bool) -> np.ndarray:
        name = entry["name"]
        scale = tensors[f"{name}.weight_scale"].astype(np.float64)
        weight = tensors[f"{name}.weight_int8"] * scale[:, None, None, None]
        bias = tensors[f"{name}.bias_int32"] * (x_scales[name] * scale)
        weight, bias = (value.astype(np.float32).astype(np.float64) for value in (weight, bias))
        y = _conv(x, weight, bias, entry["stride"], entry["groups"])
        return np.clip(y, 0, 6) if act else y

    x = layer(architecture["first_conv"], x, act=True)
    for block in architecture["blocks"]:
        y = layer(block["pointwise1"], x, act=True) if block["pointwise1"] else x
        y = layer(block["depthwise"], y, act=True)
        y = layer(block["pointwise2"], y, act=False)
        x = x + y if block["residual"] else y
    return layer(architecture["classifier"], x.mean((1, 2), keepdims=True), act=False).ravel()


def convolutions(architecture: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The description's convolutions in forward order."""
    found = [architecture["first_conv"]]
    for block in architecture["blocks"]:
        found += [block[unit] for unit in ("pointwise1", "depthwise", "pointwise2") if block[unit]]
    return [*found, architecture["classifier"]]


def read_int8(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The description and the tensors of a published network as .safetensors."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        return json.loads((file.metadata() or {})["architecture"]), tensors


# --------------------------------------------------------------------------------------------- making the file


def _by_others() -> dict[str, Any]:
    """Logits of torchvision's and timm's networks on formula weights."""
    import torch

    from tests._torchvision import register_schemas

    register_schemas()
    import timm
    import torchvision

    cases = {
        "mobilenet_v2 torchvision": torchvision.models.mobilenet_v2(weights=None),
        "mobilenet_v2 timm": timm.create_model("mobilenetv2_100"),
        "mobilenet_v2_050 timm": timm.create_model("mobilenetv2_050"),
        "mobilenet_v2_140 timm": timm.create_model("mobilenetv2_140"),
        "mobilenet_v3_large torchvision": torchvision.models.mobilenet_v3_large(weights=None),
        "mobilenet_v3_large timm": timm.create_model("mobilenetv3_large_100"),
        "resnet50 torchvision": torchvision.models.resnet50(weights=None),
        "resnet50 timm": timm.create_model("resnet50"),
    }
    versions = {"torchvision": torchvision.__version__, "timm": timm.__version__}
    found = {}
    for case, model in cases.items():
        model = model.double().eval()
        state = formula_state({name: tuple(value.shape) for name, value in model.state_dict().items()})
        model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
        with torch.no_grad():
            logits = model(torch.from_numpy(formula_input())[None])[0]
        publisher = case.split()[1]
        found[case] = {
            "by": f"{publisher} {versions[publisher]}",
            "logits": logits[::EVERY].tolist(),
        }
    return found


def _by_numpy(folder: Path) -> dict[str, Any]:
    """Logits of the int8 networks on formula weights and on the published ones."""
    found = {}
    for name, file in MCU_FILES.items():
        architecture, tensors = read_int8(folder / file)
        convs = convolutions(architecture)
        shapes = {c["name"]: (c["cout"], c["cin"] // c["groups"], c["k"], c["k"]) for c in convs}
        real = {c["name"]: c["x_scale"] for c in convs}
        for kind, (values, scales) in {"formula": formula_int8(shapes), "published": (tensors, real)}.items():
            logits = int8_logits(architecture, values, scales, formula_input())
            found[f"{name} {kind}"] = {"by": "numpy, tests/golden_logits.py", "logits": logits[::EVERY].tolist()}
    return found


def main(arguments: Iterable[str] | None = None) -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden_logits", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="the published int8 networks as .safetensors")
    folder = parser.parse_args(None if arguments is None else list(arguments)).folder
    figures = {**_by_others(), **_by_numpy(folder)}
    FILE.write_text(json.dumps({"side": SIDE, "every": EVERY, "cases": figures}) + "\n")
    for case, entry in figures.items():
        values = np.array(entry["logits"])
        print(f"{case:32} {values.mean():12.5g} +- {values.std():.5g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
