"""Once-for-all spaces: totals counted anew, published keys, and sub-networks against a forward of the test's own."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from tinytl.backbones import BACKBONES, canonical_name, complexity, find, load
from tinytl.backbones.ofa_layouts import cut_state, published_state, super_state_shapes
from tinytl.backbones.ofa_networks import sub_network
from tinytl.backbones.once_for_all import (
    SPACES,
    OfaArchitecture,
    OfaSpace,
    OfaStage,
    active_blocks,
    architecture_text,
    elastic_kernel,
    largest,
    middle_channels,
    parse_architecture,
    smallest,
    space_of,
)
from tinytl.compiler.capture import capture
from tinytl.errors import InputError, UnknownNameError, WeightsError
from tinytl.methods import METHODS, adapt_

TINY = SPACES["ofa_tiny_d234_e346_k357"]
SMALL = {
    "proxyless": OfaSpace(
        "small",
        "proxyless",
        16,
        8,
        (OfaStage(8, 2, (1, 2)), OfaStage(16, 2, (2, 3)), OfaStage(24, 1, (1,))),
        32,
        0,
        1e-3,
        TINY.preprocessing,
        expands=(2, 3),
    ),
    "mbv3": OfaSpace(
        "small",
        "mbv3",
        8,
        8,
        (OfaStage(16, 2, (1, 2), excites=True), OfaStage(24, 1, (1, 2), excites=True, hard_swish=True)),
        40,
        48,
        1e-5,
        TINY.preprocessing,
        kernels=(3, 5),
    ),
}
SPACE_OF = {**SMALL, "tiny": TINY}


def random_architecture(space: OfaSpace, seed: int) -> OfaArchitecture:
    draw = random.Random(seed)
    depths = tuple(draw.choice(space.stages[position].depths) for position in space.elastic_stages)
    count = sum(depths) + sum(stage.depths[0] for stage in space.stages if len(stage.depths) == 1)
    kernels, expands = ([draw.choice(values) for _ in range(count)] for values in (space.kernels, space.expands))
    return OfaArchitecture(depths, tuple(kernels), tuple(expands))


def super_state(space: OfaSpace, classes: int = 5) -> dict[str, Tensor]:
    """Random tensors of a super-network; variances are positive, and so large that values stay moderate."""
    torch.manual_seed(0)
    state = {}
    for name, shape in super_state_shapes(space, classes).items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(3)
        elif name.endswith("running_var"):
            state[name] = torch.rand(shape) + 0.5
        else:
            fan = math.prod(shape[1:])
            state[name] = torch.randn(shape) / fan**0.5
    return state


# ---------------------------------------------------------------- totals

# stage widths before scaling, strides, squeeze and excite, blocks, as the publisher's code lists them
PROXYLESS = ([24, 40, 80, 96, 192, 320], [2, 2, 2, 1, 2, 1], [0] * 6)
MBV3 = ([24, 40, 80, 112, 160], [2, 2, 2, 1, 2], [0, 1, 0, 1, 1])


def divisible(value: float) -> int:
    """The publisher's rounding to multiples of 8."""
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded


def counted(name: str, depth: int, kernel: int, expand: int, side: int = 224, classes: int = 1000) -> tuple[int, int]:
    """(parameters, multiply-adds), layer by layer, of the uniform sub-network."""
    width = float(name.rpartition("_w")[2])
    mbv3 = "mbv3" in name
    bases, strides, excites = MBV3 if mbv3 else PROXYLESS
    stem, first = divisible((16 if mbv3 else 32) * width), divisible(16 * width)
    side //= 2
    parameters = 27 * stem + 2 * stem + 9 * stem + 2 * stem + stem * first + 2 * first
    macs = side**2 * (27 * stem + 9 * stem + stem * first)
    channels = first
    for stage, (base, stride, excite) in enumerate(zip(bases, strides, excites, strict=True)):
        out = divisible(base * width)
        for place in range(1 if stage == 5 else depth):
            middle = divisible(channels * expand)
            macs += side**2 * channels * middle
            if place == 0:
                side //= stride
            macs += side**2 * (kernel**2 * middle + middle * out)
            parameters += channels * middle + kernel**2 * middle + middle * out + 4 * middle + 2 * out
            if excite:
                squeezed = divisible(middle // 4)
                macs += 2 * middle * squeezed
                parameters += 2 * middle * squeezed + middle + squeezed
            channels = out
    head = divisible((960 if mbv3 else 1280) * width)
    macs += side**2 * channels * head
    parameters += channels * head + 2 * head
    if mbv3:
        hidden = divisible(1280 * width)
        macs, parameters, head = macs + head * hidden, parameters + head * hidden, hidden
    return parameters + (head + 1) * classes, macs + head * classes


@pytest.mark.parametrize("name", sorted(name for name in SPACES if "_w" in name))
def test_totals_of_the_published_spaces(name: str) -> None:
    space = SPACES[name]
    for architecture, uniform in ((largest(space), (4, 7, 6)), (smallest(space), (2, 3, 3))):
        with torch.device("meta"):
            model = sub_network(space, architecture)
        assert dataclasses.astuple(complexity(model, 224)) == counted(name, *uniform)
    assert dataclasses.astuple(BACKBONES[name].complexity()) == counted(name, 4, 7, 6)


def test_the_published_description() -> None:
    """Facts of the publisher's code that totals do not show."""
    proxyless, narrow, wide = (SPACES[name] for name in sorted(SPACES, key=lambda n: ("p" not in n, n)) if "_w" in name)
    assert [stage.width for stage in proxyless.stages] == [32, 56, 104, 128, 248, 416]
    assert (proxyless.eps, narrow.eps, wide.eps) == (1e-3, 1e-5, 1e-5)
    assert [stage.hard_swish for stage in wide.stages] == [False, False, True, True, True]
    assert [len(space.blocks) for space in (proxyless, narrow, wide)] == [21, 20, 20]
    assert (narrow.first_has_shortcut, wide.first_has_shortcut, proxyless.first_has_shortcut) == (True, True, False)
    keys = super_state_shapes(narrow)
    assert keys["blocks.5.conv.depth_conv.conv.7to5_matrix"] == (25, 25)
    assert keys["blocks.5.conv.depth_conv.se.fc.reduce.weight"] == (40, 144, 1, 1)
    assert keys["feature_mix_layer.conv.weight"] == (1280, 960, 1, 1)
    assert "feature_mix_layer.bn.weight" not in keys
    assert not any("se." in key for key in super_state_shapes(proxyless))


# ---------------------------------------------------------------- sub-networks


def reference(space: OfaSpace, state: Mapping[str, Tensor], architecture: OfaArchitecture, images: Tensor) -> Tensor:
    """Logits of a sub-network, computed on slices of the super-network's tensors by their published names."""

    def norm(x: Tensor, path: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{path}.{name}"][: x.shape[1], None, None]
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + space.eps).sqrt() * weight + bias

    def six(x: Tensor) -> Tensor:
        return x.clamp(0, 6)

    def swish(x: Tensor) -> Tensor:
        return x * six(x + 3) / 6

    def kernel_of(path: str, middle: int, kernel: int) -> Tensor:
        found = state[f"{path}.conv.weight"][:middle]
        for large, small in ((7, 5), (5, 3)):
            if found.shape[-1] == large and kernel < large:
                inner = found[:, 0, 1:-1, 1:-1].flatten(1)
                matrix = state[f"{path}.{large}to{small}_matrix"]
                found = torch.einsum("ij,cj->ci", matrix, inner).unflatten(1, (1, small, small))
        return found

    mbv3 = space.family == "mbv3"
    x = norm(F.conv2d(images, state["first_conv.conv.weight"], stride=2, padding=1), "first_conv.bn")
    shortcut = x = swish(x) if mbv3 else six(x)
    x = F.conv2d(x, state["blocks.0.conv.depth_conv.conv.weight"], padding=1, groups=x.shape[1])
    x = norm(x, "blocks.0.conv.depth_conv.bn")
    x = x.relu() if mbv3 else six(x)
    x = norm(F.conv2d(x, state["blocks.0.conv.point_linear.conv.weight"]), "blocks.0.conv.point_linear.bn")
    x = x + shortcut if x.shape == shortcut.shape else x
    number, chosen, depths = 1, iter(zip(architecture.kernels, architecture.expands, strict=True)), architecture.depths
    elastic = iter(depths)
    for stage in space.stages:
        depth = next(elastic) if len(stage.depths) > 1 else max(stage.depths)
        act = six if not mbv3 else swish if stage.hard_swish else torch.relu
        for place in range(depth):
            (kernel, expand), path, shortcut = next(chosen), f"blocks.{number + place}.conv", x
            middle, stride = divisible(x.shape[1] * expand), 1 if place else stage.stride
            x = F.conv2d(x, state[f"{path}.inverted_bottleneck.conv.conv.weight"][:middle])
            x = act(norm(x, f"{path}.inverted_bottleneck.bn.bn"))
            weight = kernel_of(f"{path}.depth_conv.conv", middle, kernel)
            x = act(norm(F.conv2d(x, weight, None, stride, kernel // 2, 1, middle), f"{path}.depth_conv.bn.bn"))
            if stage.excites:
                fc, squeezed = f"{path}.depth_conv.se.fc", divisible(middle // 4)
                y = F.conv2d(
                    x.mean((2, 3), keepdim=True),
                    state[f"{fc}.reduce.weight"][:squeezed, :middle],
                    state[f"{fc}.reduce.bias"][:squeezed],
                ).relu()
                y = F.conv2d(y, state[f"{fc}.expand.weight"][:middle, :squeezed], state[f"{fc}.expand.bias"][:middle])
                x = x * six(y + 3) / 6
            x = F.conv2d(x, state[f"{path}.point_linear.conv.conv.weight"][:, :middle])
            x = norm(x, f"{path}.point_linear.bn.bn")
            x = x + shortcut if x.shape == shortcut.shape and stride == 1 else x
        number += max(stage.depths)
    head = "final_expand_layer" if mbv3 else "feature_mix_layer"
    x = norm(F.conv2d(x, state[f"{head}.conv.weight"]), f"{head}.bn")
    x = (swish(x) if mbv3 else six(x)).mean((2, 3))
    if mbv3:
        x = swish(x @ state["feature_mix_layer.conv.weight"][:, :, 0, 0].T)
    return x @ state["classifier.linear.weight"].T + state["classifier.linear.bias"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", sorted(SPACE_OF))
def test_a_sub_network_is_what_the_super_network_slices(kind: str, seed: int) -> None:
    space = SPACE_OF[kind]
    architecture = [largest(space), smallest(space), *(random_architecture(space, n) for n in range(2))][seed]
    state = {name: value.double() for name, value in super_state(space).items()}
    model = sub_network(space, architecture, num_classes=5).double().eval()
    model.load_state_dict(cut_state(space, state, architecture))
    images = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    with torch.no_grad():
        expected = reference(space, state, architecture, images)
        torch.testing.assert_close(model(images), expected, atol=1e-9, rtol=1e-9)
    assert expected.std() > 1e-2  # and not all the same


def test_elastic_kernels() -> None:
    torch.manual_seed(1)
    weight, matrices = torch.randn(4, 1, 7, 7), {"5to3_matrix": torch.randn(9, 9), "7to5_matrix": torch.eye(25)}
    assert elastic_kernel(weight, matrices, 7) is weight
    assert torch.equal(elastic_kernel(weight, matrices, 5), weight[:, :, 1:6, 1:6])  # the identity: the centre alone
    three = torch.stack([matrices["5to3_matrix"] @ one[0, 2:5, 2:5].flatten() for one in weight])
    torch.testing.assert_close(elastic_kernel(weight, matrices, 3).flatten(1), three)
    for kernel in (1, 4, 9):
        with pytest.raises(ValueError, match=f"no kernel of {kernel}"):
            elastic_kernel(weight, matrices, kernel)


def test_a_cut_shares_no_memory_and_keeps_float32() -> None:
    state = super_state(TINY)
    cut = cut_state(TINY, state, smallest(TINY))
    theirs = {value.untyped_storage().data_ptr() for value in state.values()}
    assert not theirs & {value.untyped_storage().data_ptr() for value in cut.values()}
    assert all(value.is_contiguous() and not value.requires_grad for value in cut.values())
    assert {value.dtype for value in cut.values()} == {torch.float32, torch.int64}
    assert middle_channels(TINY, 1, 3) == 24
    assert [block.number for block in active_blocks(TINY, smallest(TINY))] == [1, 2, 5, 6, 9, 10, 13, 14, 17, 18]


@pytest.mark.parametrize("kind", sorted(SMALL))
def test_sub_networks_are_adapted_and_compiled(kind: str) -> None:
    space = SMALL[kind]
    model = sub_network(space, random_architecture(space, 5), num_classes=5).eval()
    adaptation = adapt_(model, METHODS["tinytl-l+b"], resolution=32)
    preprocessing = dataclasses.replace(space.preprocessing, resolution=32)
    program = capture(model, adaptation, preprocessing)
    assert list(program.streams) == ["evaluate"]
    assert len(adaptation.blocks) == len(model.block_paths)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("seed", range(20))
def test_texts_are_read_back(seed: int) -> None:
    space = list(SPACES.values())[seed % len(SPACES)]
    architecture = random_architecture(space, seed)
    text = architecture_text(space, architecture)
    assert parse_architecture(space, text) == architecture
    name = f"{space.name}@{text}"
    assert space_of(name) is space
    assert canonical_name(name) == name


def test_the_plain_name_is_the_largest() -> None:
    text = architecture_text(TINY, largest(TINY))
    assert canonical_name(f"{TINY.name}@{text}") == TINY.name
    assert find(TINY.name).complexity() == find(f"{TINY.name}@{text}").complexity()
    assert BACKBONES.keys() >= SPACES.keys()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "expected one like 'd22222-k3333333333-e3333333333'"),
        ("0-3", "cannot read the architecture '0-3'"),
        ("d22222-k3333333333", "cannot read"),
        ("d2222-k33333333-e33333333", "4 depths: expected 5"),
        ("d22225-k3333333333333-e3333333333333", "depth of stage 4 5: expected one of 2, 3, 4"),
        ("d22222-k333333333-e3333333333", "9 kernels: expected 10"),
        ("d22222-k3333333333-e33333333333", "11 expansions: expected 10"),
        ("d22222-k3333333339-e3333333333", "kernel 9: expected one of 3, 5, 7"),
        ("d22222-k3333333333-e3333333335", "expansion 5: expected one of 3, 4, 6"),
        ("d22222-k333333333\u0663-e3333333333", "cannot read"),
    ],
)
def test_texts_that_are_none(text: str, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        find(f"{TINY.name}@{text}")
    assert TINY.name in str(caught.value)


def test_spaces_that_are_none() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'ofa_tiny_d234_e346_k357'"):
        space_of("ofa_tiny_d234")
    for change in (
        {"kernels": (3, 4)},
        {"expands": (1, 2)},
        {"kernels": (5, 3)},
        {"stem": 12},
        {"hidden": 8},
        {"stages": ()},
        {"stages": (OfaStage(8, 2, (0, 1)),)},
        {"stages": (OfaStage(8, 2, excites=True),)},
    ):
        with pytest.raises(InputError, match="small: "):
            dataclasses.replace(SMALL["proxyless"], **change)


# ---------------------------------------------------------------- weights


def old_spelling(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As the oldest published files have it."""
    found = {}
    for name, value in state.items():
        number = name.split(".")[1] if name.startswith("blocks.") else ""
        name = name.replace(f"blocks.{number}.conv.", f"blocks.{number}.mobile_inverted_conv.") if number else name
        found[name.replace(".conv.conv.weight", ".conv.weight").replace(".bn.bn.", ".bn.")] = value
    return found


@pytest.mark.parametrize("form", ["published", "old", "wrapped", "safetensors", "own"])
def test_super_network_files_are_read(tmp_path: Path, form: str) -> None:
    architecture = random_architecture(TINY, 3)
    state = super_state(TINY)
    expected = cut_state(TINY, state, architecture)
    name, file = f"{TINY.name}@{architecture_text(TINY, architecture)}", tmp_path / "w.pth"
    if form == "safetensors":
        file = tmp_path / "w.safetensors"
        save_file(state, file)
    elif form == "own":
        torch.save(expected, file)
    elif form == "old":
        torch.save({k: v for k, v in old_spelling(state).items() if "num_batches" not in k}, file)
    else:
        torch.save({"state_dict": state} if form == "wrapped" else state, file)
    found = load(name, weights=file)
    assert (found.name, found.pretrained, found.model.get_submodule("classifier").weight.shape) == (
        *(name, True),
        (5, 256),
    )
    for key, value in found.model.state_dict().items():
        assert "num_batches" in key or torch.equal(value, expected[key]), key
    fresh = load(name, weights=file, num_classes=3)
    assert fresh.model.get_submodule("classifier").weight.shape == (3, 256)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    state = super_state(TINY)
    gone = "blocks.3.conv.depth_conv.conv.5to3_matrix"
    bent = "blocks.4.conv.point_linear.conv.conv.weight"
    less = {name: value for name, value in state.items() if name != gone}
    twice = {**state, "blocks.1.conv.depth_conv.conv.weight": state["blocks.1.conv.depth_conv.conv.conv.weight"] + 1}
    cases = [
        (less, f"1 missing: {gone}"),
        ({**state, "blocks.40.extra": torch.zeros(1)}, "1 unknown: blocks.40.extra"),
        ({**state, bent: torch.zeros(2, 2)}, f"1 of a wrong shape: {bent} \\(2, 2\\) for \\(16, 96, 1, 1\\)"),
        ({**state, "classifier.linear.weight": torch.tensor(1.0)}, "of a wrong shape: classifier.linear.weight"),
        (twice, "1 there under two spellings"),
        ({name: value for name, value in state.items() if name.startswith("first")}, r"missing: blocks.0.*, \.\.\."),
    ]
    for number, (spoiled, match) in enumerate(cases):
        file = tmp_path / f"{number}.pth"
        torch.save(spoiled, file)
        with pytest.raises(WeightsError, match=match) as caught:
            load(TINY.name, weights=file)
        assert "\n" not in str(caught.value)
    torch.save(cut_state(TINY, state, smallest(TINY)), tmp_path / "smallest.pth")
    with pytest.raises(WeightsError, match=r"180 missing: features\.block3\.body"):
        load(TINY.name, weights=tmp_path / "smallest.pth")
    with pytest.raises(WeightsError, match="does not fit ofa_mbv3"):
        published_state(SPACES["ofa_mbv3_d234_e346_k357_w1.0"], state)
    with pytest.raises(WeightsError, match="--weights FILE"):
        load(TINY.name)
