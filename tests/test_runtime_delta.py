"""What a program learned, in the lab's order of axes, as the lab's own file; and scores as the lab's."""

from __future__ import annotations

import math
from array import array
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinytl._atomic import read_sealed, write_sealed
from tinytl._schedule import learning_rate
from tinytl._sealed import DamagedFileError, Entry, SealedFile, write_entries
from tinytl.delta import KIND, load_delta
from tinytl.engine import FitOptions, evaluate
from tinytl.engine import learning_rate as lab_rate
from tinytl.errors import DeltaError, NotFiniteError, ProgramError, RunError
from tinytl.runtime.delta import read_delta, write_delta
from tinytl.runtime.layouts import from_delta, to_delta
from tinytl.runtime.machine import program_file
from tinytl.runtime.scores import Tally, probabilities
from tinytl.runtime.settings import Settings

from .stand_in import CARRIED, CLASSES, StandIn, write_program
from .test_engine import FakeLoader


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_weights_go_to_the_delta_and_back(filters: int, channels: int, height: int, width: int) -> None:
    weight = np.random.default_rng(0).normal(size=(filters, channels, height, width)).astype(np.float32)
    lying = np.ascontiguousarray(weight.transpose(0, 2, 3, 1))
    data = memoryview(bytearray(lying.tobytes()))
    assert bytes(to_delta(data, weight.shape, "OHWI")) == weight.tobytes()
    assert bytes(from_delta(memoryview(weight.tobytes()), weight.shape, "OHWI")) == lying.tobytes()
    assert bytes(to_delta(data, weight.shape, "as-is")) == lying.tobytes()


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5))
def test_depthwise_weights_go_to_the_delta_and_back(channels: int, height: int, width: int) -> None:
    weight = np.random.default_rng(1).normal(size=(channels, 1, height, width)).astype(np.float32)
    lying = np.ascontiguousarray(weight[:, 0].transpose(1, 2, 0))
    assert bytes(to_delta(memoryview(lying.tobytes()), weight.shape, "HWC")) == weight.tobytes()
    assert bytes(from_delta(memoryview(weight.tobytes()), weight.shape, "HWC")) == lying.tobytes()


def test_a_layout_that_does_not_fit_is_a_bug() -> None:
    with pytest.raises(ValueError, match="layout"):
        to_delta(memoryview(bytes(4 * 24)), (2, 3, 2, 2), "HWC")


@pytest.fixture
def machine(tmp_path: Path) -> StandIn:
    return StandIn(write_program(tmp_path / "program.ttl"))


def test_the_lab_reads_the_delta(machine: StandIn, tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    size = write_delta(path, machine, program_file(tmp_path / "program.ttl"))
    assert size == path.stat().st_size
    delta = load_delta(path)
    about = machine.meta["delta"]
    assert (delta.backbone, delta.norm, delta.base_hash) == ("stand-in", "bn", "0" * 64)
    assert delta.classes == CLASSES
    assert delta.method.to_json() == about["method"]["parts"]
    weight = np.frombuffer(machine.tensor(0), np.float32).reshape(3, 2, 2, 3).transpose(0, 3, 1, 2)
    scale = np.frombuffer(machine.tensor(2), np.float32).reshape(2, 2, 3).transpose(2, 0, 1)[:, None]
    assert np.array_equal(delta.tensors["head.weight"].numpy(), weight)
    assert np.array_equal(delta.tensors["scale.weight"].numpy(), scale)
    assert bytes(delta.tensors["head.bias"].numpy().data) == bytes(machine.tensor(1))
    for key, (_, values) in CARRIED.items():
        assert delta.tensors[key].tolist() == list(values)


def test_it_is_the_very_file_that_the_lab_would_write(machine: StandIn, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_delta(ours, machine, program_file(tmp_path / "program.ttl"))
    tensors, metadata, _ = read_sealed(ours, KIND)
    write_sealed(theirs, KIND, tensors, metadata)
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_delta_goes_into_another_process_bit_for_bit(machine: StandIn, tmp_path: Path) -> None:
    machine.tensor(0).cast("f")[5] = -0.75
    write_delta(tmp_path / "delta", machine, program_file(tmp_path / "program.ttl"))
    other = StandIn(tmp_path / "program.ttl")
    assert bytes(other.state) != bytes(machine.state)
    read_delta(tmp_path / "delta", other, program_file(tmp_path / "program.ttl"))
    assert bytes(other.state) == bytes(machine.state)


@pytest.mark.parametrize(
    ("field", "value"),
    [("base_hash", "1" * 64), ("classes", ["blue", "green", "yellow"]), ("method", {"name": "x", "parts": []})],
)
def test_a_delta_of_something_else_is_refused(machine: StandIn, field: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "delta"
    write_delta(path, machine, program_file(tmp_path / "program.ttl"))
    tensors, metadata, _ = read_sealed(path, KIND)
    write_sealed(path, KIND, tensors, metadata | {field: value})
    before = bytes(machine.state)
    with pytest.raises(DeltaError, match=f"does not fit the program: its {field} is"):
        read_delta(path, machine, program_file(tmp_path / "program.ttl"))
    assert bytes(machine.state) == before


def test_a_delta_of_other_tensors_is_refused(machine: StandIn, tmp_path: Path) -> None:
    path = tmp_path / "delta"
    write_delta(path, machine, program_file(tmp_path / "program.ttl"))
    tensors, metadata, _ = read_sealed(path, KIND)
    write_sealed(path, KIND, tensors | {"more": torch.zeros(2)}, metadata)
    with pytest.raises(DeltaError, match="'more' is in one of them alone"):
        read_delta(path, machine, program_file(tmp_path / "program.ttl"))
    write_sealed(path, KIND, tensors | {"head.bias": torch.zeros(4)}, metadata)
    with pytest.raises(DeltaError, match=r"'head.bias' is F32 \(4,\), expected F32 \(3,\)"):
        read_delta(path, machine, program_file(tmp_path / "program.ttl"))


def test_a_delta_of_another_calibration_or_packing_is_refused(machine: StandIn, tmp_path: Path) -> None:
    path, program = tmp_path / "delta", program_file(tmp_path / "program.ttl")
    machine.tensor(0).cast("f")[5] = -0.75
    write_delta(path, machine, program)
    tensors, metadata, _ = read_sealed(path, KIND)
    other = StandIn(tmp_path / "program.ttl")
    before = bytes(other.state)
    mend = r"compile the program from that run \(tinytl compile RUN\)$"
    for mean in (torch.tensor([0.5, -1.25]), torch.zeros(3)):
        write_sealed(path, KIND, tensors | {"norm.running_mean": mean}, metadata)
        with pytest.raises(DeltaError, match=rf"its 'norm.running_mean' has other values; {mend}"):
            read_delta(path, other, program)
    for extra, said in (
        ({"frozen_bits": 8}, "frozen_bits is 8, the program's 32"),
        ({"codebook": True}, "codebook is True, the program's False"),
    ):
        write_sealed(path, KIND, tensors, metadata | {"extra": extra})
        with pytest.raises(DeltaError, match=f"its {said}; {mend}"):
            read_delta(path, other, program)
    write_sealed(path, KIND, tensors, metadata | {"extra": [8]})
    with pytest.raises(DeltaError, match=r"its extra is \[8\], expected an object"):
        read_delta(path, other, program)
    assert bytes(other.state) == before
    # how many batches were averaged changes no answer; what is not said is the lab's default
    same = {"frozen_bits": 32, "codebook": False}
    counted = tensors | {"norm.num_batches_tracked": torch.tensor([8])}
    write_sealed(path, KIND, counted, metadata | {"extra": same})
    read_delta(path, other, program)
    assert bytes(other.state) == bytes(machine.state)


def test_what_is_carried_outside_of_the_file_is_one_line(machine: StandIn, tmp_path: Path) -> None:
    program = program_file(tmp_path / "program.ttl")
    for offset, size in ((1 << 62, 8), (0, 1 << 62), (1 << 70, 8)):
        with pytest.raises(ProgramError, match="bytes of DATA, and is said to carry"):
            program.read(offset, size)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_written(machine: StandIn, value: float, tmp_path: Path) -> None:
    machine.tensor(2).cast("f")[3] = value
    with pytest.raises(RunError, match=r"scale\.weight holds NaN or infinity"):
        write_delta(tmp_path / "delta", machine, program_file(tmp_path / "program.ttl"))
    assert not (tmp_path / "delta").exists()


ENTRIES = {"b": Entry("F32", (2, 3), lambda: bytes(range(24))), "a": Entry("U8", (5,), lambda: b"abcde")}


def test_sealed_files_are_read_without_pytorch_as_with_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    digest = write_entries(path, "test/1", ENTRIES, {"x": [1, "two"]})
    tensors, metadata, again = read_sealed(path, "test/1")
    found = SealedFile(path, "test/1")
    assert digest == again == found.content_hash
    assert metadata == found.metadata == {"x": [1, "two"]}
    for name, tensor in tensors.items():
        data = memoryview(bytearray(found.places[name].nbytes))
        found.read_into(name, data)
        assert bytes(data) == bytes(ENTRIES[name].data()) == bytes(tensor.numpy().data.cast("B"))


def test_no_flipped_bit_of_a_sealed_file_goes_unseen(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_entries(path, "test/1", ENTRIES, {"x": 1})
    data = path.read_bytes()
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << (at % 8)
        path.write_bytes(changed)
        with pytest.raises(DamagedFileError):
            SealedFile(path, "test/1")
    for size in (0, 7, 8, 40, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(DamagedFileError):
            SealedFile(path, "test/1")


def test_scores_are_the_labs() -> None:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(4))
    loader = FakeLoader()
    batches = list(loader.epoch(0))
    model(batches[0].images)
    expected = evaluate(model, loader)
    tally = Tally(4)
    for batch in batches:
        with torch.no_grad():
            tally.add(array("f", model(batch.images).flatten().tolist()), batch.labels.tolist())
    found = tally.scores()
    assert found.images == expected.images
    assert found.top1 == expected.top1
    assert found.majority_share == expected.majority_share
    assert found.balanced_accuracy == pytest.approx(expected.balanced_accuracy, rel=1e-12)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)


def test_scores_of_large_and_of_broken_logits() -> None:
    assert probabilities([1000.0, 0.0]) == [1.0, 0.0]
    for bad in (math.nan, math.inf):
        with pytest.raises(NotFiniteError, match="answers are NaN or infinite"):
            probabilities([0.0, bad])
    tally = Tally(2)
    tally.add(array("f", [3e4, -3e4]), [1])
    assert tally.scores().loss == 6e4
    tally.add(array("f", [math.nan, 0.0]), [0])
    assert math.isnan(tally.scores().loss)
    assert tally.scores().top1 == 0


def test_the_rate_is_the_labs() -> None:
    options = FitOptions(epochs=4, lr=0.3, warmup_epochs=1)
    own = Settings(epochs=4, lr=0.3, warmup_epochs=1)
    assert [learning_rate(step, 7, own) for step in range(28)] == [lab_rate(step, 7, options) for step in range(28)]
