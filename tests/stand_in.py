"""A stand-in for the native executor: it trains a softmax on the mean colours of four quarters, in plain Python.

It has `tinytl.runtime.Executor`'s face, so that what is around the executor (decoding, checkpoints, signals, the delta)
is tested in fractions of a second, and where nothing was compiled. Its program is a file with a true head and META.

    python -m tests.stand_in train PROGRAM PHOTOS ...      the command line, with this in place of the executor
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinytl._digest import sha256
from tinytl.errors import InputError, NotFiniteError, ProgramError

COLOURS = 3
QUARTERS = 4
FEATURES = QUARTERS * COLOURS
CLASSES = ("blue", "green", "red")
CARRIED = {"norm.running_mean": ("F32", array("f", [0.5, -1.5])), "norm.num_batches_tracked": ("I64", array("q", [7]))}


def write_program(path: Path, classes: Sequence[str] = CLASSES, **train: Any) -> Path:
    """Write a program that the stand-in can open, of a network of 16 x 16 pixels and 4 images a step."""
    data, carried = bytearray(), []
    for key, (dtype, values) in CARRIED.items():
        raw = values.tobytes()
        offset = len(data)
        carried.append({"key": key, "shape": [len(values)], "dtype": dtype, "offset": offset, "bytes": len(raw)})
        data += raw.ljust(64, b"\0")
    shape = [len(classes), COLOURS, 2, 2]
    meta = {
        "tensors": ["head.weight", "head.bias", "scale.weight", "head.weight.gradient"],
        "learned": [
            {"key": "head.weight", "tensor": 0, "shape": shape, "layout": "OHWI"},
            {"key": "head.bias", "tensor": 1, "shape": [len(classes)], "layout": "as-is"},
            {"key": "scale.weight", "tensor": 2, "shape": [COLOURS, 1, 2, 2], "layout": "HWC"},
        ],
        "carried": carried,
        "delta": {
            "method": {"name": "tinytl-b", "parts": [{"part": "bias"}]},
            "backbone": "stand-in",
            "norm": "bn",
            "classes": list(classes),
            "preprocessing": {
                "resolution": 16,
                "mean": [0.5, 0.5, 0.5],
                "std": [0.25, 0.25, 0.25],
                "interpolation": "bicubic",
                "crop_fraction": 0.875,
            },
            "base_hash": "0" * 64,
            "extra": {},
        },
        "train": {"epochs": 2, "lr": 0.5, "seed": 1, "val_fraction": 0.25, "color": True, "weights": None, **train},
        "plan": {},
    }
    text = json.dumps(meta).encode()
    begin = 64 + 3 * 24
    first = -(-(begin + len(text)) // 4096) * 4096
    sections = b"".join(
        name.ljust(8, b"\0") + offset.to_bytes(8, "little") + size.to_bytes(8, "little")
        for name, offset, size in ((b"META", begin, len(text)), (b"CODE", first, 0), (b"DATA", first, len(data)))
    )
    body = (sections + text).ljust(first - 64, b"\0") + bytes(data)
    head = b"TINYTLP\0" + (1).to_bytes(4, "little") + (0x01020304).to_bytes(4, "little")
    head += (64 + len(body)).to_bytes(8, "little") + sha256(body).digest() + bytes(8)
    path.write_bytes(head + body)
    return path


class StandIn:
    """As `tinytl.runtime.Executor`."""

    def __init__(self, path: str | os.PathLike[str], threads: int = 0, check: bool = True) -> None:
        try:
            raw = Path(path).read_bytes()
        except OSError as error:
            raise ProgramError(f"program {path}: {error.strerror}") from error
        if check and sha256(raw[64:]).digest() != raw[24:56]:
            raise ProgramError(f"program {path}: its hash does not match")
        begin, size = (int.from_bytes(raw[72 + 8 * n : 80 + 8 * n], "little") for n in range(2))
        self._text = raw[begin : begin + size]
        self.batch, self.micro_batch, self.height, self.width = 4, 2, 16, 16
        self.threads, self.arena_bytes, self.bad_tensor = max(threads, 1), 4096, -1
        self.tensors = 4
        self.classes = len(self.meta["delta"]["classes"])
        weights = self.classes * FEATURES
        self._sizes = (weights, self.classes, FEATURES)
        trained = sum(self._sizes)
        self._arena = bytearray(8 + 2 * 4 * trained)
        self.state = memoryview(self._arena)
        self.state_bytes = len(self.state)
        self._values = self.state[8 : 8 + 4 * trained].cast("f")
        self._momentum = self.state[8 + 4 * trained :].cast("f")
        for at in range(weights):
            self._values[at] = math.sin(at) / 4
        for at in range(weights + self.classes, trained):
            self._values[at] = 1.0
        self._slot = bytearray(self.batch * 16 * 16 * 3)
        self.images = memoryview(self._slot)
        self.labels = memoryview(array("i", [0] * self.batch))
        self._pause = float(os.environ.get("STAND_IN_PAUSE", "0"))  # so that there is a step to be killed in

    @property
    def meta(self) -> dict[str, Any]:
        return json.loads(self._text)

    @property
    def steps(self) -> int:
        return int.from_bytes(self.state[:8], "little")

    def step(self, count: int, lr: float, seed: int = 0) -> tuple[float, int]:
        if not 1 <= count <= self.batch:
            raise InputError(f"{count} images")
        time.sleep(self._pause)
        weights, biases, _ = self._sizes
        gradient = [0.0] * len(self._values)
        loss, correct = 0.0, 0
        for image in range(count):
            features = self._features(image)
            scaled = [value * scale for value, scale in zip(features, self._values[weights + biases :], strict=True)]
            logits = self._logits(scaled)
            shares, label = softmax(logits), self.labels[image]
            loss -= math.log(max(shares[label], 1e-30)) if shares[label] == shares[label] else math.nan
            correct += logits.index(max(logits)) == label
            for number in range(self.classes):
                error = (shares[number] - (number == label)) / count
                gradient[weights + number] += error
                for at, value in enumerate(scaled):
                    gradient[number * FEATURES + at] += error * value
                    gradient[weights + biases + at] += error * features[at] * self._values[number * FEATURES + at]
        self.bad_tensor = -1
        if not math.isfinite(loss):
            raise NotFiniteError("the loss is not finite")
        keep = 0.9 + (seed % 8) / 100  # a draw of the step's own
        for at, slope in enumerate(gradient):
            self._momentum[at] = keep * self._momentum[at] + slope
            self._values[at] = self._values[at] - lr * self._momentum[at]
        self.state[:8] = (self.steps + 1).to_bytes(8, "little")
        return loss, correct

    def evaluate(self, count: int) -> array[float]:
        weights, biases, _ = self._sizes
        found = array("f")
        for image in range(count):
            pairs = zip(self._features(image), self._values[weights + biases :], strict=True)
            found.extend(self._logits([value * scale for value, scale in pairs]))
        return found

    def tensor(self, number: int) -> memoryview:
        begin = 8 + 4 * sum(self._sizes[:number])
        return self.state[begin : begin + 4 * self._sizes[number]]

    def close(self) -> None:
        pass

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _features(self, image: int) -> list[float]:
        """Mean colours, less a half, of the quarters: (2, 2, 3)."""
        begin, found = image * 16 * 48, []
        for top in (0, 8):
            for left in (0, 24):
                rows = [self._slot[begin + row * 48 + left :][:24] for row in range(top, top + 8)]
                found += [sum(sum(row[colour::3]) for row in rows) / (64 * 255) - 0.5 for colour in range(3)]
        return found

    def _logits(self, features: list[float]) -> list[float]:
        weights = self._sizes[0]
        rows = (self._values[n * FEATURES : (n + 1) * FEATURES] for n in range(self.classes))
        return [
            self._values[weights + number] + sum(map(float.__mul__, row, features)) for number, row in enumerate(rows)
        ]


def softmax(logits: Sequence[float]) -> list[float]:
    largest = max(logits)
    if not math.isfinite(largest):
        return [math.nan] * len(logits)
    powers = [math.exp(value - largest) for value in logits]
    return [power / sum(powers) for power in powers]


def main() -> None:
    from tinytl.runtime import command, executor

    setattr(executor, "Executor", StandIn)  # noqa: B010
    command.main(sys.argv[1:])


if __name__ == "__main__":
    main()
