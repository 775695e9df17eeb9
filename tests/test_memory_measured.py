"""Measured memory: cases of which every byte is known beforehand, a real step, a fresh process, a picture."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinytl.errors import TinyTLError
from tinytl.memory import rss
from tinytl.memory.measured import (
    Measured,
    Timeline,
    adam,
    measure_step,
    measure_training_step,
    resident_tensors,
    storage_bytes,
    training_step,
)
from tinytl.memory.step import StepSpec
from tinytl.memory.timeline import draw_timelines

MB = 1_000_000


def megabyte(value: float = 1.0) -> Tensor:
    return torch.full((500, 500), value)


def curve(step) -> list[int]:
    timeline = measure_step(step).timeline
    assert timeline is not None
    assert (np.diff(timeline.seconds) >= 0).all()
    return timeline.live_bytes.tolist()


def test_an_add_of_two_megabytes_adds_one():
    a, b = megabyte(), megabyte()
    measured = measure_step(lambda: a + b, [a, b])
    assert (measured.resident_bytes, measured.step_peak_bytes, measured.peak_bytes) == (2 * MB, MB, 3 * MB)
    assert measured.step_seconds is None
    assert curve(lambda: a + b) == [0, MB, 0]


def test_in_place_operations_and_views_add_nothing():
    a, b = megabyte(), megabyte()

    def step() -> None:
        a.add_(b).relu_()
        a.view(-1)[10:20].neg_()
        a.t().unsqueeze(0)

    assert curve(step) == [0]


def test_temporaries_that_overlap_add_up_and_freed_ones_do_not():
    a = megabyte()

    def step() -> None:
        b = a.neg()  # Not a * 2: a Python number becomes a tensor of 8 bytes, and is seen.
        c = a.neg()
        del b
        d = c.neg()
        del c, d

    assert curve(step) == [0, MB, 2 * MB, MB, 2 * MB, MB, 0]


def test_copies_inside_an_operator_are_seen():
    """A float64 convolution unfolds its input: in * k * k * out pixels an image, beside its output."""
    x, weight = torch.randn(2, 4, 16, 16, dtype=torch.double), torch.randn(8, 4, 3, 3, dtype=torch.double)
    unfolded, output = 2 * 4 * 9 * 256 * 8, 2 * 8 * 256 * 8
    assert max(curve(lambda: F.conv2d(x, weight, padding=1))) == unfolded + output
    # The same, padded by a copy of our own, which lives as long as the convolution.
    padded = 2 * 4 * 18 * 18 * 8
    assert max(curve(lambda: F.conv2d(F.pad(x, (1, 1, 1, 1)), weight))) == padded + unfolded + output


def test_backward_and_the_gradient_it_leaves():
    weight, upstream = megabyte().requires_grad_(), torch.randn(500, 500)
    x = torch.randn(500, 500)
    # The product lives until backward returns; its gradient is a new tensor, which becomes weight.grad.
    assert curve(lambda: (weight * x).backward(upstream)) == [0, MB, 2 * MB, MB]


def test_gradients_belong_to_the_step():
    weight, x, upstream = megabyte().requires_grad_(), megabyte(), torch.randn(500, 500)

    def step() -> None:
        (weight * x).backward(upstream)

    step()
    # With weight.grad there already, backward would add into it: the same peak, but nothing left behind.
    measured = measure_step(step, [weight, x])
    assert measured.timeline is not None
    assert (measured.step_peak_bytes, measured.timeline.live_bytes[-1]) == (2 * MB, MB)


def test_what_an_earlier_measurement_left_is_not_given_back_by_the_next():
    held: list[Tensor] = []
    assert curve(lambda: held.append(megabyte())) == [0, MB]

    def swap() -> None:
        held.clear()
        held.append(torch.ones(500, 1000))

    assert curve(swap) == [0, 2 * MB]


def test_a_storage_counts_once():
    base = megabyte()
    assert storage_bytes([base, base[:10], base.t()]) == MB
    assert storage_bytes([base[:10]]) == MB  # A view keeps all of its storage alive.
    assert storage_bytes([]) == 0


class Small(nn.Sequential):
    """A conv net with a frozen layer, for whole steps."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(8, 5)
        )
        self.to(dtype)
        self.eval()
        self[0].requires_grad_(False)

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]


def test_a_training_step_starts_from_what_is_resident_and_leaves_nothing_behind():
    model = Small()
    images, labels = torch.randn(6, 3, 8, 8), torch.randint(5, (6,))
    measured = measure_training_step(model, images, labels, adam(model), 2, repeats=2)

    trained = 4 * sum(p.numel() for p in model.trained())
    frozen = 4 * sum(p.numel() for p in model[0].parameters())
    buffers = 2 * 8 * 4 + 8  # running mean and variance, and the number of batches
    state = 2 * trained + 4 * len(model.trained())  # Adam: two moments, and a step each
    assert measured.resident_bytes == trained + frozen + buffers + state + 6 * 3 * 64 * 4 + 6 * 8
    assert measured.peak_bytes == measured.resident_bytes + measured.step_peak_bytes
    assert measured.timeline is not None
    assert measured.timeline.live_bytes[-1] == 0
    assert measured.step_peak_bytes > trained  # the gradients
    assert measured.timeline.live_bytes.min() == 0
    assert measured.step_seconds is not None
    assert resident_tensors(model, None, images)[-1] is images


def test_micro_batches_take_less_and_the_same_step():
    images = torch.randn(7, 3, 8, 8, dtype=torch.double)
    labels = torch.randint(5, (7,))
    gradients, peaks = [], []
    for micro_batch in (None, 7, 3, 1):
        model = Small(torch.double)
        optimizer = torch.optim.SGD(model.trained(), lr=0.0)
        step = training_step(model, images, labels, optimizer, micro_batch, label_smoothing=0.1)
        peaks.append(measure_step(step, resident_tensors(model, optimizer, images, labels)).step_peak_bytes)
        gradients.append([p.grad for p in model.trained()])
    assert peaks[0] == peaks[1] > peaks[2] > peaks[3]
    for others in gradients[1:]:
        torch.testing.assert_close(others, gradients[0], rtol=1e-12, atol=1e-15)
    with pytest.raises(ValueError, match="micro_batch is 0"):
        training_step(Small(), images, labels, optimizer, 0)


def test_the_profiler_is_silent_and_others_are_heard(capfd):
    old = [megabyte() for _ in range(3)]

    def step() -> None:
        old.pop()  # The profiler complains of blocks that it did not see born.
        os.write(2, b"a real message\n")

    measure_step(step)
    assert capfd.readouterr().err == "a real message\n"


def test_a_step_that_fails_leaves_stderr_as_it_was(capfd):
    def step() -> None:
        os.write(2, b"before\n")
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        measure_step(step)
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "before\nafter\n"
    assert curve(lambda: None) == [0]


def test_negative_repeats_are_refused():
    with pytest.raises(ValueError, match="repeats is -1"):
        measure_step(lambda: None, repeats=-1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_peak():
    a = torch.ones(1024, 1024, device="cuda")  # 4 MiB: a multiple of the allocator's rounding
    measured = measure_step(lambda: (a + 1) + 1, [a], repeats=1)
    assert measured.resident_bytes == 4 << 20
    assert measured.step_peak_bytes == 8 << 20
    assert measured.timeline is None


SPEC = StepSpec("proxylessnas_mobile", "tinytl-b", resolution=64, batch_size=2, micro_batch=1, classes=5, threads=1)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")
@pytest.mark.parametrize("lean", [True, False])
def test_a_fresh_process_tells_its_resident_set(lean):
    result = rss.rss_delta(StepSpec(**{**vars(SPEC), "lean": lean}))
    assert result is not None
    assert result["rss_delta_bytes"] == result["rss_peak_bytes"] - result["rss_before_bytes"]
    assert result["rss_before_bytes"] > 50 * MB  # PyTorch itself
    assert result["rss_delta_bytes"] > 0


def test_a_failing_worker_is_one_clear_error(monkeypatch):
    failed = SimpleNamespace(returncode=1, stdout="", stderr="Traceback ...\nMemoryError: the reason\n")
    monkeypatch.setattr(rss.sys, "platform", "linux")
    monkeypatch.setattr(rss.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(TinyTLError, match=r"status 1.*proxylessnas_mobile.*Error: the reason") as caught:
        rss.rss_delta(SPEC)
    assert "\n" not in str(caught.value)


def test_a_slow_worker_is_one_clear_error(monkeypatch):
    def run(command, **kwargs):
        raise rss.subprocess.TimeoutExpired(command, kwargs["timeout"])

    monkeypatch.setattr(rss.sys, "platform", "linux")
    monkeypatch.setattr(rss.subprocess, "run", run)
    with pytest.raises(TinyTLError, match="longer than 3 s"):
        rss.rss_delta(SPEC, timeout_seconds=3)


def test_no_resident_set_where_there_is_no_proc(monkeypatch):
    monkeypatch.setattr(rss.sys, "platform", "darwin")
    assert rss.rss_delta(SPEC) is None


def test_the_picture_is_written(tmp_path):
    model = Small()
    images, labels = torch.randn(4, 3, 8, 8), torch.randint(5, (4,))
    steps = {
        name: measure_training_step(model, images, labels, adam(model), size, repeats=0)
        for name, size in (("whole batch", None), ("one at a time", 1))
    }
    path = draw_timelines(steps, tmp_path / "live.png", title="Live bytes")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        draw_timelines({}, tmp_path / "none.png")
    with pytest.raises(ValueError, match="'gpu' has no timeline"):
        draw_timelines({"gpu": Measured(1, 1, 2, None, None)}, tmp_path / "none.png")
    still = Timeline(np.zeros(1), np.zeros(1, dtype=np.int64))  # A step that allocates nothing can be drawn.
    assert draw_timelines({"still": Measured(MB, 0, MB, None, still)}, tmp_path / "still.png").exists()
