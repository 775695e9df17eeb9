"""Readers of files that may come from anywhere: the content as it was written, or one line of the right kind of error.

Deltas, checkpoints, weights, metrics, configurations, lists and photographs are damaged and made up at random. Never
another exception, never a message of two lines, never more memory than the file's size gives reason for.
`pytest -m slow tests/test_fuzz.py` runs the same for longer.
"""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from tests.test_checkpoint import FakeAdaptation
from tests.test_delta import forge, good_metadata, json_values
from tinytl import _atomic, checkpoint
from tinytl.backbones.weights import read_state
from tinytl.checkpoint import Checkpointer, Progress, load_optimizer
from tinytl.config import read_config
from tinytl.data import decode, elpv, read_rgb
from tinytl.delta import KIND, load_delta
from tinytl.errors import DataError, DeltaError, InputError, RunError, WeightsError
from tinytl.methods import Method
from tinytl.report import plot_curves, read_metrics

BRIEF = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LONG = settings(BRIEF, max_examples=1000)


def outcome(read: Callable[[Path], Any], path: Path, kind: type[InputError]) -> Any:
    """What was read, or None where it was refused as it should be."""
    try:
        return read(path)
    except kind as error:
        message = str(error)
    assert message.isprintable()
    assert len(message) < 1500
    return None


# Files as they should be

TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.tensor([1, 2, 3]), "c": torch.tensor(True)}


def sealed_delta(folder: Path) -> Path:
    _atomic.write_sealed(folder / "good", KIND, TENSORS, good_metadata() | {"classes": ["a", "故障", "é"]})
    return folder / "good"


class Small(nn.Module):
    """A network with the keys that `FakeAdaptation` names."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("2", "7"):
            self.add_module(name, nn.Linear(3, 2))


def saver(path: Path, model: nn.Module) -> Checkpointer:
    return Checkpointer(path, model, FakeAdaptation(), {"lr": 0.1})


def sealed_checkpoint(folder: Path, progress: Any = None, optimizer: Any = None, settings: Any = None) -> Path:
    model = Small()
    tensors = {f"model/{key}": value for key, value in model.state_dict().items()}
    slots = {f"{key}/{slot}": value for key, value in model.state_dict().items() for slot in ("exp_avg", "exp_avg_sq")}
    slots |= {f"{key}/step": torch.tensor(3.0) for key in model.state_dict()}
    tensors |= {f"optimizer/{key}": value for key, value in (slots if optimizer is None else optimizer).items()}
    metadata = {
        "progress": {**vars(Progress(epoch=1, step=3))} if progress is None else progress,
        "settings": {"base": "ab" * 32, "lr": 0.1} if settings is None else settings,
    }
    _atomic.write_sealed(folder / "good", checkpoint.KIND, tensors, metadata)
    return folder / "good"


def read_checkpoint(path: Path) -> Any:
    """What a resumed run would go on from: the model's tensors, the progress and the optimizer's slots."""
    model = Small()
    resume = saver(path, model).load()
    assert resume is not None
    optimizer = torch.optim.Adam(model.parameters())
    load_optimizer(optimizer, tuple(name for name, _ in model.named_parameters()), resume)
    return {key: value.tolist() for key, value in model.state_dict().items()}, resume.progress, sorted(resume.optimizer)


def read_delta(path: Path) -> Any:
    delta = load_delta(path)
    return delta.content_hash, delta.classes, {key: value.tolist() for key, value in delta.tensors.items()}


# Damage

damage = st.one_of(
    st.tuples(st.just("flip"), st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), min_size=1, max_size=6)),
    st.tuples(st.just("cut"), st.floats(0, 1)),
    st.tuples(st.just("insert"), st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=40))),
    st.tuples(st.just("splice"), st.tuples(st.floats(0, 1), st.floats(0, 1))),
    st.tuples(st.just("length"), st.integers(0, 2**64 - 1)),
)


def damaged(data: bytes, how: tuple[str, Any]) -> bytes:
    kind, what = how
    if kind == "flip":
        changed = bytearray(data)
        for place, bits in what:
            changed[int(place * len(data))] ^= bits
        return bytes(changed)
    if kind == "cut":
        return data[: int(what * len(data))]
    if kind == "insert":
        place = int(what[0] * len(data))
        return data[:place] + what[1] + data[place:]
    if kind == "splice":  # a piece of the file goes elsewhere in it
        return data[: int(what[0] * len(data))] + data[int(what[1] * len(data)) :]
    return struct.pack("<Q", what) + data[8:]


def check_damage(folder: Path, how: tuple[str, Any], good: Path, read: Callable[[Path], Any], kind: Any) -> None:
    expected, path = read(good), folder / "bad"
    path.write_bytes(damaged(good.read_bytes(), how))
    assert outcome(read, path, kind) in (None, expected)


@BRIEF
@given(how=damage)
def test_a_damaged_delta_is_refused_or_the_same(tmp_path: Path, how: tuple[str, Any]) -> None:
    check_damage(tmp_path, how, sealed_delta(tmp_path), read_delta, DeltaError)


@BRIEF
@given(how=damage)
def test_a_damaged_checkpoint_is_refused_or_the_same(tmp_path: Path, how: tuple[str, Any]) -> None:
    check_damage(tmp_path, how, sealed_checkpoint(tmp_path), read_checkpoint, RunError)


@pytest.mark.slow
@LONG
@given(how=damage)
def test_damage_for_longer(tmp_path: Path, how: tuple[str, Any]) -> None:
    check_damage(tmp_path, how, sealed_delta(tmp_path), read_delta, DeltaError)
    check_damage(tmp_path, how, sealed_checkpoint(tmp_path), read_checkpoint, RunError)


# Made-up headers

sizes = st.integers(-1, 9) | st.sampled_from([2**31, 2**63, 2**64, 10**30, True, 1.5, "3", None, [1]])
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F64", "I64", "BOOL", "BF16", "F8_E4M3", "C64", "f32", "", 3, None]),
        "shape": st.lists(sizes, max_size=4) | sizes,
        "data_offsets": st.lists(sizes, max_size=3) | sizes,
        "more": json_values,
    },
)
names = st.sampled_from(["a", "../../etc/passwd", "/etc/passwd", "C:\\x", "", "\0", "\u001b[2J", "\ud800", "a" * 9999])
headers = st.dictionaries(names, entries | json_values, max_size=4)


def file_of(header: Any, data: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


@BRIEF
@given(
    header=headers,
    strings=st.dictionaries(st.text(max_size=5), st.text(max_size=9) | json_values),
    size=st.integers(0, 64),
)
def test_made_up_headers(tmp_path: Path, header: dict[str, Any], strings: dict[str, Any], size: int) -> None:
    for kind, read, error in ((KIND, read_delta, DeltaError), (checkpoint.KIND, read_checkpoint, RunError)):
        whole = {**header, "__metadata__": {**strings, "format": kind, "content_sha256": "0" * 64}}
        (tmp_path / "bad").write_bytes(file_of(whole, bytes(size)))
        assert outcome(read, tmp_path / "bad", error) is None


DEEP, LONG_INTEGER = b"[" * 50_000 + b"]" * 50_000, b"9" * 100_000
GOOD_META = b'"__metadata__":{"format":"tinytl-delta/1","content_sha256":"' + b"0" * 64 + b'"}'
ENTRY = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
CORPUS = {
    "nothing": b"",
    "seven bytes": b"\0" * 7,
    "no header": struct.pack("<Q", 0),
    "a header of 2**64 bytes": b"\xff" * 8 + b"{}",
    "a header longer than the file": struct.pack("<Q", 10**6) + b"{}",
    "a header of spaces": file_of(b" " * 10**6),
    "not UTF-8": file_of(b'{"\xff\xfe":1}'),
    "UTF-16": file_of("{}".encode("utf-16")),
    "deep": file_of(DEEP),
    "deep metadata": file_of(b'{"__metadata__":' + DEEP + b"}"),
    "a long integer": file_of(b'{"__metadata__":' + LONG_INTEGER + b"}"),
    "NaN": file_of(b'{"__metadata__":NaN}'),
    "a key twice": file_of(b"{" + GOOD_META + b"," + GOOD_META + b"}"),
    "a tensor twice": file_of(b'{"w":' + ENTRY + b',"w":' + ENTRY + b"," + GOOD_META + b"}", bytes(4)),
    "two tensors on the same bytes": file_of(b'{"v":' + ENTRY + b',"w":' + ENTRY + b"," + GOOD_META + b"}", bytes(4)),
    "a hole between tensors": file_of(
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},' + GOOD_META + b"}", bytes(8)
    ),
    "offsets backwards": file_of(
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,0]},' + GOOD_META + b"}", bytes(4)
    ),
    "offsets beyond 2**64": file_of(
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,' + b"9" * 30 + b"]}," + GOOD_META + b"}", bytes(4)
    ),
    "a shape whose product is 2**64": file_of(
        b'{"w":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]},' + GOOD_META + b"}"
    ),
    "a negative shape": file_of(
        b'{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]},' + GOOD_META + b"}", bytes(4)
    ),
    "an unknown dtype": file_of(
        b'{"w":{"dtype":"F128","shape":[1],"data_offsets":[0,4]},' + GOOD_META + b"}", bytes(4)
    ),
    "a complex number": file_of(b'{"w":{"dtype":"C64","shape":[1],"data_offsets":[0,8]},' + GOOD_META + b"}", bytes(8)),
    "metadata that are no texts": file_of({"__metadata__": {"format": KIND, "content_sha256": 3}}),
    "metadata that are a list": file_of({"__metadata__": [KIND]}),
    "a list": file_of([]),
    "10,000 tensors": file_of({f"{n}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(10**4)}),
    "a zip": b"PK\x03\x04" + bytes(100),
    "a pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
}


@pytest.mark.parametrize("name", CORPUS)
def test_hostile_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad"
    path.write_bytes(CORPUS[name])
    tracemalloc.start()
    try:
        assert outcome(read_delta, path, DeltaError) is None
        assert outcome(read_checkpoint, path, RunError) is None
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5e6 + 30 * len(CORPUS[name])


def test_no_more_is_read_than_the_header_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with a good header and 100 MB of holes behind it: refused before the holes are read."""
    path, size = sealed_delta(tmp_path), 100_000_000
    with open(path, "r+b") as file:
        file.truncate(size)
    promised = {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}, "__metadata__": {"format": KIND}}
    long = tmp_path / "long"
    long.write_bytes(file_of(promised))
    with open(long, "r+b") as file:
        file.truncate(len(file_of(promised)) + size)
    monkeypatch.setattr(_atomic, "MAX_DATA_BYTES", size - 1)
    tracemalloc.start()
    try:
        with pytest.raises(DeltaError, match="another size than its header says"):
            load_delta(path)
        with pytest.raises(DeltaError, match="holds 100,000,000 bytes, more than"):
            load_delta(long)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


# Files whose seal is right: what a hostile writer makes

parts = st.fixed_dictionaries(
    {"part": st.sampled_from(["bias", "norm", "full", "lite-residual", "last-blocks", "none"]) | json_values},
    optional=dict.fromkeys(("kernel_size", "groups", "count", "more"), sizes | json_values),
)
METADATA = good_metadata()


def check_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    forge(folder / "delta", metadata)
    delta = outcome(load_delta, folder / "delta", DeltaError)
    if delta is not None:
        assert delta.method == Method.from_json(metadata["method"]["parts"])
        assert delta.classes == tuple(metadata["classes"])
        assert not set("".join(delta.classes)) & set(map(chr, [*range(32), *range(127, 160)]))
        assert len(delta.method.name) < 200


@BRIEF
@given(method=st.lists(parts, max_size=3) | json_values)
def test_any_method(tmp_path: Path, method: Any) -> None:
    check_metadata(tmp_path, METADATA | {"method": {"name": "x", "parts": method}})


@BRIEF
@given(
    classes=st.lists(
        st.text(max_size=4) | st.sampled_from(["\u001b[2J", "\ud800", "a\nb", "\0", "a" * 1001]), max_size=4
    )
)
def test_any_class_names(tmp_path: Path, classes: list[str]) -> None:
    check_metadata(tmp_path, METADATA | {"classes": classes})


@BRIEF
@given(changes=st.dictionaries(st.sampled_from(sorted(METADATA)), json_values, min_size=1, max_size=3))
def test_any_values_in_several_fields(tmp_path: Path, changes: dict[str, Any]) -> None:
    forge(tmp_path / "delta", METADATA | changes)
    outcome(load_delta, tmp_path / "delta", DeltaError)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_delta_of_nan_is_refused(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    _atomic.write_sealed(tmp_path / "delta", KIND, {"w": torch.tensor([0, value], dtype=dtype)}, METADATA)
    with pytest.raises(DeltaError, match="holds NaN or infinity in 'w'"):
        load_delta(tmp_path / "delta")


slots = st.dictionaries(
    st.sampled_from(["2.weight", "7.bias", "9.weight", "", "x/y", "\u001b"]).flatmap(
        lambda name: st.sampled_from([f"{name}/exp_avg", f"{name}/step", name, f"{name}/\ud7ff"])
    ),
    st.sampled_from([torch.zeros(()), torch.zeros(2), torch.zeros(2, 3), torch.zeros(0), torch.zeros(2, 3).bool()]),
    max_size=4,
)


@BRIEF
@given(
    progress=json_values | st.dictionaries(st.sampled_from(sorted(vars(Progress()))), sizes | json_values),
    optimizer=slots,
    other=st.dictionaries(st.text(max_size=3), json_values, max_size=2) | json_values,
)
def test_any_progress_settings_and_slots(
    tmp_path: Path, progress: Any, optimizer: dict[str, Tensor], other: Any
) -> None:
    for changes in ({"progress": progress}, {"optimizer": optimizer}, {"settings": other}):
        outcome(read_checkpoint, sealed_checkpoint(tmp_path, **changes), RunError)


# Weights, metrics, configurations, lists, photographs


@BRIEF
@given(how=damage)
def test_damaged_weights_are_tensors_or_refused(tmp_path: Path, how: tuple[str, Any]) -> None:
    safetensors.torch.save_file(TENSORS, tmp_path / "good.safetensors")
    torch.save(TENSORS, tmp_path / "good.pth")
    torch.save(TENSORS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("good.safetensors", "good.pth", "old.pt"):
        bad = tmp_path / f"bad{name}"
        bad.write_bytes(damaged((tmp_path / name).read_bytes(), how))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = outcome(read_state, bad, WeightsError)
        assert state is None or all(isinstance(value, Tensor) for value in state.values())


LINE = {"kind": "epoch", "epoch": 1, "step": 3, "loss": 0.5, "accuracy": 0.5}
RESULT = {"loss": 0.5, "top1": 0.5, "majority_share": 0.5}
metric_lines = st.builds(
    lambda changes, result: {
        **LINE,
        "validation": {**RESULT, **result} if isinstance(result, dict) else result,
        **changes,
    },
    st.dictionaries(st.sampled_from(sorted(LINE)), sizes | json_values, max_size=2),
    st.none() | json_values | st.dictionaries(st.sampled_from(sorted(RESULT)), sizes | json_values, max_size=1),
)


@BRIEF
@given(
    data=st.binary(max_size=60)
    | st.lists(metric_lines, max_size=3).map(lambda rows: "".join(json.dumps(r) + "\n" for r in rows).encode())
)
def test_any_metrics(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(data)
    rows = outcome(read_metrics, tmp_path / "metrics.jsonl", RunError)
    if rows and sum(row["kind"] == "epoch" for row in rows) == 1:  # what can be read can be drawn; drawing is slow
        plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")


@BRIEF
@given(
    text=st.binary(max_size=60)
    | st.lists(st.sampled_from(["epochs", "lr", "photos", "[x]", "=", "1", '"', "\n", "é"])).map(
        lambda words: " ".join(words).encode()
    )
)
def test_any_configuration(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "run.toml").write_bytes(text)
    outcome(read_config, tmp_path / "run.toml", InputError)


@BRIEF
@given(
    text=st.binary(max_size=80) | st.text(st.sampled_from("images/cell01.pngmo \n\t.5\0é"), max_size=60).map(str.encode)
)
def test_any_list_of_photographs(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / "labels.csv").write_bytes(text)
    outcome(elpv.read, tmp_path, DataError)


def pictures() -> dict[str, bytes]:
    found, exif = {}, Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8))
    for suffix in decode.FORMATS:
        file = io.BytesIO()
        image.save(file, format=suffix, exif=exif)
        found[suffix] = file.getvalue()
    return found


PICTURES = pictures()


def check_photograph(folder: Path, suffix: str, how: tuple[str, Any]) -> None:
    (folder / "x").write_bytes(damaged(PICTURES[suffix], how))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = outcome(read_rgb, folder / "x", DataError)
    assert image is None or image.mode == "RGB"


@pytest.fixture
def _few_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged size is refused early: what is tested is not the patience of this machine."""
    monkeypatch.setattr(decode, "MAX_PIXELS", 10**6)


@pytest.mark.usefixtures("_few_pixels")
@BRIEF
@given(suffix=st.sampled_from(decode.FORMATS), how=damage)
def test_damaged_photographs(tmp_path: Path, suffix: str, how: tuple[str, Any]) -> None:
    check_photograph(tmp_path, suffix, how)


@pytest.mark.slow
@pytest.mark.usefixtures("_few_pixels")
@LONG
@given(suffix=st.sampled_from(decode.FORMATS), how=damage)
def test_damaged_photographs_for_longer(tmp_path: Path, suffix: str, how: tuple[str, Any]) -> None:
    check_photograph(tmp_path, suffix, how)
