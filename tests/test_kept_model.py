"""The ledger of a whole network is what autograd is seen to keep, to the byte; and the figures promised for it."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinytl.backbones.proxylessnas import proxylessnas_mobile
from tinytl.errors import UnsupportedLayerError
from tinytl.methods import METHODS, TINYTL_LB, Bias, Method, adapt_, method
from tinytl.nn.kept import kept
from tinytl.nn.meta import meta_copy

from .observed import observe_kept
from .test_adapt import Holder, images, outsider, small_network

MB = 10**6


def observed(model: nn.Module, x: Tensor) -> int:
    resident = [*model.parameters(), *model.buffers()]
    bytes_kept, y = observe_kept(lambda: model.train()(x), resident)
    assert y.requires_grad
    return bytes_kept


@pytest.mark.parametrize(("batch", "side"), [(1, 32), (3, 32), (1, 37), (3, 45)])
@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("variant", ["bn", "gn", "same"])
def test_the_rule_is_what_is_seen(variant: str, name: str, batch: int, side: int) -> None:
    for last in (0, 2):
        model = small_network("gn" if variant == "gn" else "bn", same=variant == "same")
        adaptation = adapt_(model, method(name, last_blocks=last), resolution=side)
        x = images(batch, side)
        ledger = kept(model, tuple(x.shape))
        assert ledger.total_bytes == observed(model, x) > 0
        assert adaptation.kept_bytes_per_image == kept(model, (1, 3, side, side)).total_bytes
        assert all(entry.bytes > 0 and entry.layer for entry in ledger.entries)
        assert not any("PyTorch" in entry.layer for entry in ledger.entries)


def test_the_rule_for_other_types_and_layouts() -> None:
    for norm in ("bn", "gn"):
        model = small_network(norm).double()
        adapt_(model, method("ft-full"), resolution=32)
        x = images(2, dtype=torch.float64)
        ledger = kept(model, tuple(x.shape))
        assert ledger.total_bytes == observed(model, x)
        assert ledger.total_bytes == observed(model, x.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_network_by_an_outsider(name: str) -> None:
    """Its forward calls F.relu and `+=` itself: what those keep is in the ledger too."""
    model = outsider()
    adapt_(model, METHODS[name], blocks=("blocks.0", "blocks.1"), classifier="head", resolution=24)
    x = images(3, 24)
    assert kept(model, tuple(x.shape)).total_bytes == observed(model, x)


def test_functions_are_not_counted_as_zero() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.classifier = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(torch.exp(F.relu(self.conv(x))).mean((2, 3)))

    model = Net()
    adapt_(model, Method((Bias(),)), resolution=10)
    [exponential] = [entry for entry in kept(model, (2, 3, 10, 10)).entries if "network itself" in entry.layer]
    assert exponential.bytes == 2 * 8 * 8 * 8 * 4
    assert kept(model, (2, 3, 10, 10)).total_bytes == observed(model, images(2, 10))


def test_nothing_is_counted_where_nothing_trains() -> None:
    model = small_network()
    adapt_(model, TINYTL_LB, resolution=32)
    model.requires_grad_(False)
    assert kept(model, (2, 3, 32, 32)).total_bytes == 0


def test_counting_leaves_the_network_alone() -> None:
    model = small_network().eval()
    adapt_(model, TINYTL_LB, resolution=32)
    called: list[str] = []
    model.features.register_forward_hook(lambda m, a, o: called.append(o.device.type))
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    kept(model, (2, 3, 32, 32))
    assert called == []
    assert not any(module.training for module in model.modules())
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0]
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, before[name][1])
    assert len(model.features._forward_hooks) == 1


def test_a_hook_splits_a_chain_and_the_ledger_follows() -> None:
    for norm in ("bn", "gn"):
        model = small_network(norm)
        adapt_(model, TINYTL_LB, resolution=32)
        model.features.get_submodule("block3").register_forward_hook(lambda m, a, o: None)
        model.features.get_submodule("head.norm").register_forward_hook(lambda m, a, o: None)
        assert kept(model, (2, 3, 32, 32)).total_bytes == observed(model, images(2))


def test_the_copy_without_memory() -> None:
    model = small_network()
    model.again = model.classifier  # type: ignore[assignment]
    model.plain = torch.ones(1000)  # type: ignore[assignment]
    model.features.requires_grad_(False)
    model.settings = {"sizes": [1, 2], "none": {}}  # type: ignore[assignment]
    model.hidden = [model.classifier]  # type: ignore[assignment]  # a module that no tree of modules shows
    ghost = meta_copy(model)
    assert ghost.settings == {"sizes": [1, 2], "none": {}}
    assert vars(ghost)["hidden"] == [ghost.classifier]
    assert ghost.classifier is not model.classifier
    for mine, theirs in zip(ghost.modules(), model.modules(), strict=True):
        assert vars(mine).keys() == vars(theirs).keys()
        shared = [name for name in vars(mine) if isinstance(vars(mine)[name], (dict, list, set))]
        assert not any(vars(mine)[name] is vars(theirs)[name] for name in shared)
    assert all(t.device.type == "meta" for t in (*ghost.parameters(), *ghost.buffers(), ghost.plain))
    assert ghost.again is ghost.classifier
    assert {n: (p.shape, p.requires_grad) for n, p in ghost.named_parameters()} == {
        n: (p.shape, p.requires_grad) for n, p in model.named_parameters()
    }


def test_an_unknown_layer_is_refused_by_name() -> None:
    model = Holder(nn.Identity())
    adapt_(model, Bias(), resolution=16)
    model.middle = nn.Softplus()
    with pytest.raises(UnsupportedLayerError, match=r"middle \(Softplus\)"):
        kept(model, (1, 3, 16, 16))
    stock = small_network()  # not adapted at all
    with pytest.raises(UnsupportedLayerError, match="adapt_"):
        kept(stock, (1, 3, 32, 32))


# ---------------------------------------------------------------- ProxylessNAS-Mobile, 224 px, 102 classes

GOLDEN = {
    ("bn", "ft-last"): 40_960,
    ("bn", "ft-norm+last"): 177_673_600,
    ("bn", "ft-full"): 180_483_456,
    ("bn", "tinytl-b"): 4_767_104,
    ("bn", "tinytl-l"): 12_303_080,
    ("bn", "tinytl-l+b"): 13_858_536,
    ("gn", "ft-last"): 40_960,
    ("gn", "ft-norm+last"): 20_955_136,
    ("gn", "ft-full"): 20_955_136,
    ("gn", "tinytl-b"): 20_955_136,
    ("gn", "tinytl-l"): 23_062_528,
    ("gn", "tinytl-l+b"): 27_879_424,
}
"""Bytes kept at batch 8 by rule: `kept(adapted, (8, 3, 224, 224))`. A change here is a change of what is promised."""

PROMISED = {("bn", "tinytl-b"): 6.5 * MB, ("bn", "tinytl-l+b"): 22 * MB, ("gn", "tinytl-l+b"): 40 * MB}


@pytest.mark.parametrize(("norm", "name"), sorted(GOLDEN))
def test_the_figures_of_the_paper_s_network(norm: str, name: str) -> None:
    model = proxylessnas_mobile(norm, num_classes=102)  # type: ignore[arg-type]
    adapt_(model, METHODS[name], resolution=224)
    assert kept(model, (8, 3, 224, 224)).total_bytes == GOLDEN[norm, name]
    assert GOLDEN[norm, name] <= PROMISED.get((norm, name), float("inf"))


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_the_figures_are_seen_for_real(norm: str) -> None:
    model = proxylessnas_mobile(norm, num_classes=102)  # type: ignore[arg-type]
    adaptation = adapt_(model, TINYTL_LB, resolution=224)
    assert observed(model, images(1, 224)) == adaptation.kept_bytes_per_image
    gc.collect()
