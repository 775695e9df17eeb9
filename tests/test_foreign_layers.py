"""One layer by an outsider at a time: what is refused, by path and reason, and what is made lean exactly."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinytl.errors import InputError, UnsupportedLayerError
from tinytl.methods import Bias, Full, Method, adapt_

from .foreign import assert_adapts, settle_
from .test_adapt import assert_unchanged, images, snapshot


class Holder(nn.Module):
    """A stem, `middle`, a classifier."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.middle = middle
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x)).mean((2, 3)))


def by(forward: Callable[[nn.Module, Tensor], Tensor], **parts: object) -> nn.Module:
    """A module with that forward."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    return Own()


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * x


def branch(self: nn.Module, x: Tensor) -> Tensor:
    return x * 2 if x.mean() > 0 else x


def overwritten(self: nn.Module, x: Tensor) -> Tensor:
    flat = x.flatten(2)
    flat += 1.0
    return x * 2


def counts(self: nn.Module, x: Tensor) -> Tensor:
    self.seen.add_(1)  # type: ignore[operator]
    return x * 2


def remembers(self: nn.Module, x: Tensor) -> Tensor:
    self.last = x.shape  # type: ignore[assignment]
    return x * 2


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def scripted() -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is on its way out
        return torch.jit.script(swish)


def by_batch(self: nn.Module, x: Tensor) -> Tensor:
    return x / int(x.shape[0])


GLOBAL = torch.ones(1, device="meta")

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a branch by values": (lambda: by(branch), r"^middle \(Own\): .*depends on values"),
    "deep inside": (lambda: nn.Sequential(nn.Identity(), by(branch)), r"^middle\.1 \(Own\): .*depends on values"),
    "overwritten": (lambda: by(overwritten), r"^middle \(Own\): .*overwritten through another name"),
    "a buffer that changes": (lambda: by(counts, seen=nn.Buffer(torch.zeros(1))), r"^middle \(Own\): .*middle\.seen"),
    "an attribute that changes": (lambda: by(remembers), r"^middle \(Own\): .*'last'"),
    "the number of images": (lambda: by(by_batch), r"^middle \(Own\): .*number of images"),
    "an own autograd function": (lambda: by(lambda s, x: Square.apply(x)), r"^middle \(Own\): .*autograd.Function"),
    "a tensor from outside": (lambda: by(lambda s, x: x * GLOBAL), r"^middle \(Own\): .*register it as a buffer"),
    "a scripted function": (lambda: by(lambda s, x: scripted()(x)), r"^middle \(Own\): .*nor made by a torch function"),
    "batch statistics": (lambda: by(lambda s, x: F.batch_norm(x, None, None, training=True)), "by the batch"),
    "no statistics": (lambda: nn.BatchNorm2d(8, track_running_stats=False), r"^middle \(BatchNorm2d\): .*statistics"),
}


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_refused_with_path_and_reason_and_nothing_changed(kind: str, lean: bool) -> None:
    make, reason = REFUSED[kind]
    model = Holder(make())
    before = snapshot(model)
    with pytest.raises(UnsupportedLayerError, match=reason) as caught:
        adapt_(model, Full(), resolution=16, lean=lean)
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)


def test_what_is_refused_may_stand_in_a_frozen_trunk() -> None:
    """Where no gradient flows anything goes, but for statistics that would move."""
    for make in (lambda: by(overwritten), lambda: by(by_batch), lambda: by(remembers)):
        model = Holder(make()).eval()
        x = images(2, 16)
        before, middle = model(x).detach(), model.middle
        adapt_(model, Method(), resolution=16)
        assert model.middle is middle
        assert "forward" not in vars(middle)
        torch.testing.assert_close(model(x), before)
    with pytest.raises(UnsupportedLayerError, match=r"middle\.seen"):
        adapt_(Holder(by(counts, seen=nn.Buffer(torch.zeros(1)))), Method(), resolution=16)


SUPPORTED: dict[str, Callable[[], nn.Module]] = {
    "circular padding": lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 3),
    "batch norm of a subclass": lambda: type("MyNorm", (nn.BatchNorm2d,), {})(8),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)),
    "a layer of torch that has no lean form": lambda: nn.Softplus(),
    "instance norm": lambda: nn.InstanceNorm2d(8, affine=True),
    "attention": lambda: by(
        lambda s, x: s.a(*[x.flatten(2).transpose(1, 2)] * 3, need_weights=False)[0].transpose(1, 2).view(x.shape),  # type: ignore[operator]
        a=nn.MultiheadAttention(8, 2, batch_first=True),
    ),
    "an inplace layer whose result is dropped": lambda: by(
        lambda s, x: _dropped(s, x * 1.5), act=nn.ReLU(inplace=True)
    ),  # type: ignore[operator]
    "unused result": lambda: by(lambda s, x: (s.conv(x), x)[1], conv=nn.Conv2d(8, 8, 1)),  # type: ignore[operator]
    "a bare activation": lambda: by(lambda s, x: x.clamp(0.1, 0.7) + F.softmax(x, 1)),
    "slices and a write": lambda: by(_write),
}


def _dropped(self: nn.Module, x: Tensor) -> Tensor:
    self.act(x)  # type: ignore[operator]
    return x * 2


def _write(self: nn.Module, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, ::2] = x[:, ::2] * 3
    return y


@pytest.mark.parametrize("name", ["ft-full", "tinytl-b"])
@pytest.mark.parametrize("kind", sorted(SUPPORTED))
def test_lean_is_stock_for_odd_layers(kind: str, name: str) -> None:
    torch.manual_seed(1)
    assert_adapts(settle_(Holder(SUPPORTED[kind]())), name, 16)


def test_a_bare_sequential() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Hardswish()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )
    adaptation, _ = assert_adapts(settle_(net), "tinytl-b", 32)
    assert adaptation.classifier == "7"
    assert adaptation.folded == ("1",)


def test_a_size_that_the_forward_is_bound_to() -> None:
    net = Holder(by(lambda s, x: x + s.table[:, :, : int(x.shape[2])], table=nn.Parameter(torch.ones(1, 8, 8, 8))))  # type: ignore[index]
    adapt_(net, Bias(), resolution=16)
    net(images(2, 16))
    with pytest.raises(InputError, match="resolution="):
        net(images(2, 12))


def test_a_size_that_would_take_another_way() -> None:
    net = Holder(by(lambda s, x: x * 2 if x.shape[2] >= 8 else x * 3))
    adapt_(net, Bias(), resolution=16)
    net(images(2, 24))
    with pytest.raises(InputError, match="takes another way"):
        net(images(2, 12))


def test_without_a_classifier_to_find() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(InputError, match="classifier="):
        adapt_(net, Method(), resolution=16)
    adapt_(net, Method(), classifier="0", resolution=16)
