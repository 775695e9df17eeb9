"""Networks of timm (PyTorch Image Models) by name: ``timm:resnet18``, ``timm:mobilenetv3_large_100.ra_in1k``.

They come as timm makes them; `tinytl.methods.adapt_` traces them and finds their blocks and classifier. timm is an
extra (``pip install 'tinytl[timm]'``) and is imported when one of its names is used.
"""

from __future__ import annotations

import difflib
import logging
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from tinytl.backbones._base import Backbone, Preprocessing
from tinytl.backbones._registry import PREFIX
from tinytl.backbones.architecture import dropped_paths, holds_any, parse_kept, remove_, split_name
from tinytl.backbones.weights import load_strict_, need_file, read_state
from tinytl.errors import InputError, UnknownNameError, WeightsError


def load_timm(
    name: str,
    *,
    pretrained: bool = True,
    norm: str = "bn",
    weights: Path | None = None,
    lite: bool | None = None,
    num_classes: int | None = None,
) -> Backbone:
    """Load a network of timm in evaluation mode.

    Args:
        name: ``timm:`` and a name of timm's, with or without a tag for the weights; with ``@BLOCKS`` only these of its
            blocks are kept, by their number among those that are found in it.
        pretrained: with weights, which timm downloads; else they are random.
        norm: 'bn': the network comes with the norms that it has.
        weights: a file with them in timm's own layout, instead of a download; of the full network, or of the kept part.
        lite: not True: lite residual modules are inserted by `adapt_`, which finds the blocks.
        num_classes: put a fresh classifier in place of the loaded one.

    Raises:
        InputError: timm is not installed; a combination that cannot be; no such blocks, or none that can be told.
        UnknownNameError: no such network in timm.
        WeightsError: no weights to be had (no network, none published), or they do not fit.
    """
    base, blocks = split_name(name)
    timm, model_name = _timm(base), _known(base)
    if norm != "bn":
        raise InputError(f"{name}: a network of timm comes with its own norms: leave norm at 'bn'")
    if lite:
        raise InputError(f"{name}: lite residual modules are inserted by adapt_: leave lite=True out")
    if weights is not None and not pretrained:
        raise InputError(f"weights {str(weights)!r} given with pretrained=False: leave one of the two out")
    if num_classes is not None and num_classes < 1:
        raise InputError(f"num_classes is {num_classes}: take at least 1")
    classes = {} if num_classes is None else {"num_classes": num_classes}
    if weights is not None:
        model = timm.create_model(model_name, pretrained=False)
        dropped = _dropped(model, name, blocks)
        path = need_file(weights)
        state = read_state(path)
        if not holds_any(state, {key: key for key in model.state_dict()}, dropped):
            remove_(model, dropped)  # the file is the sub-network's own
        load_strict_(model, state, None, origin=repr(str(path)))
        if num_classes is not None:
            model.reset_classifier(num_classes)
    elif pretrained:
        model = _fetched(timm, base, model_name, classes)
        dropped = _dropped(model, name, blocks)
    else:
        model = timm.create_model(model_name, pretrained=False, **classes)
        dropped = _dropped(model, name, blocks)
    remove_(model, dropped)
    return Backbone(name, model.eval(), timm_preprocessing(base), "bn", pretrained, ())


def _dropped(model: nn.Module, name: str, blocks: str | None) -> list[str]:
    """Paths of the blocks that are not among those that the name keeps."""
    if blocks is None:
        return []
    side = timm_preprocessing(split_name(name)[0]).resolution
    return dropped_paths(model, parse_kept(blocks), name, side)


def timm_preprocessing(name: str) -> Preprocessing:
    """How the input of a network of timm is made, as timm's configuration of its weights says.

    Raises:
        InputError, UnknownNameError: as `load_timm`.
    """
    timm, model_name = _timm(name), _known(name)
    found = timm.models.get_pretrained_cfg(model_name)
    config = timm.data.resolve_data_config({}, pretrained_cfg={} if found is None else found.to_dict())
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise InputError(f"{name}: takes images {config['input_size']}: expected three channels and square images")
    interpolation = config["interpolation"] if config["interpolation"] in ("bicubic", "bilinear") else "bilinear"
    mean, std = (tuple(float(value) for value in config[key]) for key in ("mean", "std"))
    return Preprocessing(height, mean, std, interpolation, float(config["crop_pct"]))  # pyright: ignore


def _fetched(timm: Any, name: str, model_name: str, classes: dict[str, int]) -> nn.Module:
    mend = "give a checkpoint with --weights FILE (weights=), or take random weights with pretrained=False"
    found = timm.models.get_pretrained_cfg(model_name)
    if found is None or not found.has_weights:
        raise WeightsError(f"{name}: timm publishes no weights of that name: {mend}")
    try:
        return timm.create_model(model_name, pretrained=True, **classes)
    except Exception as error:  # whatever the hub's client raises without a network
        reason = " ".join(str(error).split())[:200]
        failed = f"{type(error).__name__}: {reason}"
        raise WeightsError(f"{name}: its weights cannot be fetched ({failed}): {mend}") from error


def _timm(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import timm
            import timm.data
            import timm.models
    except ModuleNotFoundError as error:
        raise InputError(f"{name}: needs timm, and {error.name} is missing: pip install 'tinytl[timm]'") from error
    except (ImportError, RuntimeError) as error:  # torchvision beside another build of torch
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{name}: timm cannot be imported ({reason}): install a torchvision made for this torch"
        ) from error
    logging.getLogger("timm").setLevel(logging.ERROR)
    return timm


def _known(name: str) -> str:
    """timm's own name, which must be one."""
    timm, model_name = _timm(name), name.removeprefix(PREFIX)
    every = timm.list_models()
    if model_name.partition(".")[0] not in every:
        near = difflib.get_close_matches(model_name, every, n=8, cutoff=0.5)
        raise UnknownNameError("timm network", model_name, near or ["see timm.list_models()"])
    tags = timm.list_pretrained(f"{model_name.partition('.')[0]}.*") if "." in model_name else [model_name]
    if model_name not in tags:
        raise UnknownNameError("timm network", model_name, tags or [model_name.partition(".")[0]])
    return model_name
