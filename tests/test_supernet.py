"""Training a super-network: schedule, loss, shares of batches, and a run that cannot be lost."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tinytl._run_folder import CHECKPOINT, METRICS, SETTINGS
from tinytl.backbones import load
from tinytl.backbones.once_for_all import SPACES, largest, smallest
from tinytl.data import TrainTransform, scan
from tinytl.errors import InputError, Interrupted, RunError, UnknownNameError
from tinytl.report import read_metrics
from tinytl.spec import RunOptions
from tinytl.supernet.distill import accumulate, distillation_loss, make_sgd, teacher_of
from tinytl.supernet.elastic import ElasticNet
from tinytl.supernet.run import SUBNETS, SUPERNET, SupernetCallbacks, train_supernet
from tinytl.supernet.shares import MixedSizes
from tinytl.supernet.shrinking import drawn, everything, phases, sample
from tinytl.supernet.spec import SupernetSpec

from .command_line import tinytl
from .photographs import make_photographs
from .small_run import TIMES
from .small_spaces import MBV3, PROXYLESS, SMALL

OPTIONS = RunOptions(workers=0, threads=1, checkpoint_seconds=None)


@pytest.fixture(autouse=True, scope="module")
def _small_spaces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for space in SMALL:
            patch.setitem(SPACES, space.name, space)
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photographs(tmp_path_factory.mktemp("supernet") / "photos", each=6, size=(40, 36))


def spec_of(photos: Path, **changes: object) -> SupernetSpec:
    given = {
        "space": PROXYLESS.name,
        "resolutions": "32,40",
        "epochs": 2,
        "phase_epochs": 1,
        "batch_size": 4,
        "val_fraction": 0.25,
        "color": True,
        "calibration_images": 8,
        "measured": 1,
        "seed": 1,
    }
    return SupernetSpec(str(photos), **{**given, **changes})  # pyright: ignore[reportArgumentType]


def left_behind(out: Path) -> dict[str, str]:
    """Hashes of what a finished run left, of the metrics without their times."""
    found = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in (CHECKPOINT, SUPERNET, SUBNETS)}
    lines = [{key: line[key] for key in line if key not in TIMES} for line in read_metrics(out / METRICS)]
    return found | {METRICS: hashlib.sha256(json.dumps(lines).encode()).hexdigest()}


@pytest.fixture(scope="module")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("run") / "run"
    train_supernet(spec_of(photos), out, options=OPTIONS)
    return out


def test_phases_open_more_and_close_nothing() -> None:
    course = phases(PROXYLESS, 5, 2, 0.1, 0.01, 1)
    assert [phase.name for phase in course] == ["largest", "kernel", "depth 2", "depth 3", "expand 2", "expand 3"]
    assert [phase.begin for phase in course] == [0, 5, 7, 9, 11, 13]
    for before, after in itertools.pairwise(course):
        assert set(before.kernels) <= set(after.kernels)
        assert set(before.expands) <= set(after.expands)
        assert before.depth_choices <= after.depth_choices
        assert after.sorted_within == (before.expands if after.expands != before.expands else None)
    assert [phase.name for phase in phases(MBV3, 1, 1, 1.0, 1.0)][-1] == "expand 2"
    draws = random.Random(0)
    assert {sample(PROXYLESS, course[0], draws) for _ in range(5)} == {largest(PROXYLESS)}
    seen = {sample(PROXYLESS, everything(PROXYLESS), draws) for _ in range(300)}
    assert {architecture.depths for architecture in seen} == {(a, b) for a in (1, 2) for b in (1, 2, 3)}
    assert {k for architecture in seen for k in architecture.kernels} == {3, 5, 7}
    wide = [sample(PROXYLESS, course[4], draws) for _ in range(20)]
    assert {e for architecture in wide for e in architecture.expands} == {3, 4}


def test_sub_networks_are_drawn_from_seed_and_step() -> None:
    phase = everything(PROXYLESS)
    assert drawn(PROXYLESS, phase, 3, 1, 5) == drawn(PROXYLESS, phase, 3, 1, 5)
    assert len({drawn(PROXYLESS, phase, 3, seed, step) for seed in (1, 2) for step in range(5)}) == 10


def test_distillation_is_the_divergence_from_the_teacher() -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    other = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    p, q = other.softmax(1), logits.softmax(1)
    loss = distillation_loss(logits, other)
    torch.testing.assert_close(loss, (p * (p.log() - q.log())).sum(1).mean())
    loss.backward()
    torch.testing.assert_close(logits.grad, (q - p).detach() / 4)
    assert other.grad is None
    assert distillation_loss(logits, logits).abs() < 1e-12


def test_a_step_descends_the_mean_of_its_sub_networks() -> None:
    net = ElasticNet(MBV3, 3, seed=1).double().train()
    teacher, images, labels = teacher_of(net), torch.randn(4, 3, 32, 32).double(), torch.tensor([0, 1, 2, 1])
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    chosen = drawn(MBV3, everything(MBV3), 3, 0, 0)
    loss, correct = accumulate(net, teacher, chosen, images, labels, kd_ratio=0.7, label_smoothing=0.1)
    ours = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad(set_to_none=True)
    total, right = torch.zeros((), dtype=torch.float64), 0
    for architecture in chosen:
        net.choose(architecture)
        logits = net(images)
        kd = F.kl_div(logits.log_softmax(1), teacher(images).softmax(1), reduction="batchmean")
        total = total + (F.cross_entropy(logits, labels, label_smoothing=0.1) + 0.7 * kd) / 3
        right += int((logits.argmax(1) == labels).sum())
    total.backward()
    assert math.isclose(loss, total.item(), rel_tol=1e-9)
    assert correct == right
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_matrices_norms_and_biases_do_not_decay() -> None:
    net = ElasticNet(MBV3, 3)
    decaying, others = make_sgd(net, 0.1, 0.9, 0.5).param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    assert all(parameter.dim() in (2, 4) for parameter in decaying["params"])
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    kept = {names[id(parameter)] for parameter in others["params"]}
    assert {name for name in names.values() if "matrix" in name or ".bn" in name or name.endswith("bias")} == kept


def mixed(photos: Path, rank: int = 0, processes: int = 1, workers: int = 0) -> MixedSizes:
    transform = TrainTransform(40, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return MixedSizes(scan(photos), transform, (32, 40, 48), 4, seed=3, rank=rank, processes=processes, workers=workers)


def test_batches_do_not_depend_on_where_an_epoch_is_begun_or_on_workers(photos: Path) -> None:
    whole = list(mixed(photos).epoch(2))
    assert len(whole) == len(mixed(photos)) == 4
    assert len({batch.images.shape for batch in whole}) > 1
    for begin in (1, 3):
        rest = list(mixed(photos, workers=2).epoch(2, begin))
        assert len(rest) == 4 - begin
        for ours, theirs in zip(rest, whole[begin:], strict=True):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.labels, theirs.labels)
    assert not torch.equal(next(mixed(photos).epoch(1)).labels, whole[0].labels)


def test_shares_are_parts_of_one_batch(photos: Path) -> None:
    shares = [list(mixed(photos, rank=rank, processes=2).epoch(0)) for rank in (0, 1)]
    for whole, first, second in zip(mixed(photos).epoch(0), *shares, strict=True):
        assert first.images.shape == second.images.shape == (2, *whole.images.shape[1:])
        assert torch.equal(whole.labels, torch.stack((first.labels, second.labels), 1).flatten())
    with pytest.raises(InputError, match="batch_size is 4 and there are 3 processes"):
        mixed(photos, processes=3)


def test_a_run_leaves_a_super_network_and_how_good_it_is(photos: Path, undisturbed: Path) -> None:
    lines = read_metrics(undisturbed / METRICS)
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert {line["resolution"] for line in steps} == {32, 40}
    ends = [line for line in lines if line["kind"] == "epoch" and line["validation"]]
    assert [line["phase"] for line in ends] == ["largest", "kernel", "depth 2", "depth 3", "expand 2", "expand 3"]
    results = json.loads((undisturbed / SUBNETS).read_text())
    assert [entry["name"] for entry in results] == ["largest", "smallest", "random 1"]
    assert results[0]["multiply_adds"] > results[2]["multiply_adds"] > results[1]["multiply_adds"]
    again = train_supernet(spec_of(photos), undisturbed, options=OPTIONS, resume=True)  # finished: only measured
    assert [entry.record() for entry in again.subnets] == results


def test_the_file_is_one_of_weights_for_any_sub_network(photos: Path, undisturbed: Path) -> None:
    result = train_supernet(spec_of(photos), undisturbed, options=OPTIONS, resume=True)
    net = ElasticNet(PROXYLESS, 3)
    net.load_published(undisturbed / SUPERNET)
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(net.eval()(images), result.net.eval()(images))


SLOW = pytest.mark.slow


@pytest.mark.parametrize("step", [pytest.param(2, marks=SLOW), 6, pytest.param(7, marks=SLOW), 13])
def test_an_interrupted_run_ends_in_the_same_bits(photos: Path, undisturbed: Path, tmp_path: Path, step: int) -> None:
    """Within the first phase, at its last step, at the first step of the next, and within a shrinking one."""
    spec, out = spec_of(photos), tmp_path / "run"
    stop = SupernetCallbacks(on_step=lambda info, _: signal.raise_signal(signal.SIGTERM) if info.step == step else None)
    with pytest.raises(Interrupted, match="stopped by SIGTERM; the same command with --resume goes on"):
        train_supernet(spec, out, options=OPTIONS, callbacks=stop)
    assert not (out / SUPERNET).exists()
    train_supernet(spec, out, options=OPTIONS, resume=True)
    assert left_behind(out) == left_behind(undisturbed)


def test_other_settings_are_refused_and_listed(photos: Path, undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"made with other settings: lr is 0\.2, was 0\.1; subnets is 3, was 2"):
        train_supernet(spec_of(photos, lr=0.2, subnets=3), undisturbed, options=OPTIONS, resume=True)
    with pytest.raises(RunError, match="holds a run already"):
        train_supernet(spec_of(photos), undisturbed, options=OPTIONS)
    with pytest.raises(RunError, match="no run to resume"):
        train_supernet(spec_of(photos), tmp_path / "none", options=OPTIONS, resume=True)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolutions": "31"}, "resolutions is '31', expected different numbers"),
        ({"resolutions": "32,32"}, "resolutions is '32,32'"),
        ({"resolutions": "32;40"}, "resolutions is '32;40'"),
        ({"epochs": 1, "warmup_epochs": 1}, "expected fewer than the 1 epochs"),
        ({"space": f"{PROXYLESS.name}@d12"}, "leave out what begins with '@'"),
        ({"batch_size": 1}, "batch_size is 1, expected"),
    ],
)
def test_what_cannot_be_is_refused(photos: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        spec_of(photos, **changes)


def test_what_cannot_be_trained_is_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'ofa_small_proxyless'"):
        spec_of(photos, space="ofa_small_proxiless")
    with pytest.raises(InputError, match="batch_size is 64, more than the 12 photographs"):
        train_supernet(spec_of(photos, batch_size=64), tmp_path / "run", options=OPTIONS)
    with pytest.raises(RunError, match=r"the loss is .* at step \d+ \(phase largest"):
        train_supernet(spec_of(photos, lr=1e18, warmup_epochs=0), tmp_path / "run", options=OPTIONS)


def test_the_command(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["supernet", photos, "--space", MBV3.name, "--resolutions", "32", "--epochs", "2", "--phase-epochs", "1"]
    words += ["--batch-size", "8", "--measured", "0", "--threads", "1", "--workers", "0", "--out", out]
    found = tinytl(*words, "--json").json
    page = (Path(__file__).parents[1] / "docs" / "cli.md").read_text()
    table = page.split("### JSON of supernet\n")[1].split("\n## ")[0]
    promised = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert set(found) == {name for cell in promised for name in re.findall(r"`(\w+)`", cell)}
    assert [entry["name"] for entry in found["subnets"]] == ["largest", "smallest"]
    assert json.loads((out / SETTINGS).read_text())["space"] == MBV3.name
    assert "largest: epoch 2/" in tinytl("supernet", photos, *words[2:-1], tmp_path / "again").out
    assert "holds a run already" in tinytl(*words).line
    assert "no photographs" in tinytl("supernet").line


@pytest.mark.slow
def test_two_processes_train_together_stop_together_and_go_on_together(photos: Path, tmp_path: Path) -> None:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.supernet_worker"]
    done = subprocess.run(
        [sys.executable, *words, str(photos), str(tmp_path)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stopped by SIGTERM") == 2
    told = {line for line in done.stdout.splitlines() if line.startswith("weights ")}
    assert len(told) == 1  # of both processes, undisturbed and resumed
    assert left_behind(tmp_path / "disturbed") == left_behind(tmp_path / "undisturbed")


def test_a_sub_network_of_the_tiny_space_is_built_from_a_super_network_s_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tiny = SPACES["ofa_tiny_d234_e346_k357"]
    net = ElasticNet(tiny, 3).eval()
    net.choose(smallest(tiny))
    save_file(net.state_dict(), tmp_path / "super.safetensors")
    backbone = load(f"{tiny.name}@d22222-k3333333333-e3333333333", weights=tmp_path / "super.safetensors")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(backbone.model(images), net(images))
