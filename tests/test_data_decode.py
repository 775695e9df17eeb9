"""Decoding: every kind of image comes out upright, RGB and 8 bits, or as one line that names the file."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinytl.data import decode as decode_module
from tinytl.data import open_photo, read_rgb
from tinytl.errors import DataError

WIDTH, HEIGHT = 24, 16


def picture(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Smooth, and different in each corner, so that a turn shows."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * x / (width - 1), 255 * y / (height - 1), 128 + 0 * x], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def error(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_rgb(path)
    text = str(caught.value)
    assert "\n" not in text
    assert repr(str(path)) in text
    return text


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "gif", "webp", "jpg"])
def test_formats(tmp_path: Path, suffix: str):
    path = tmp_path / f"x.{suffix}"
    picture().save(path, lossless=True)  # WebP's option; the others take no notice
    read = read_rgb(path)
    assert (read.mode, read.size) == ("RGB", (WIDTH, HEIGHT))
    tolerance = {"gif": 32, "jpg": 16}.get(suffix, 0)
    assert np.abs(np.asarray(read).astype(int) - np.asarray(picture()).astype(int)).max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
def test_orientation(tmp_path: Path, suffix: str, orientation: int):
    # As a camera stores it: 6 means "turn right to view", so it is stored turned left.
    stored = picture()
    turns = [
        "none",
        "FLIP_LEFT_RIGHT",
        "ROTATE_180",
        "FLIP_TOP_BOTTOM",
        "TRANSPOSE",
        "ROTATE_90",
        "TRANSVERSE",
        "ROTATE_270",
    ]
    name = turns[orientation - 1]
    if name != "none":
        stored = stored.transpose(Image.Transpose[name])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{suffix}"
    stored.save(path, exif=exif, quality=100, subsampling=0, lossless=True)
    with open_photo(path) as photo:
        assert photo.size == (WIDTH, HEIGHT)
        read = photo.rgb()
    assert read.size == (WIDTH, HEIGHT)
    difference = np.abs(np.asarray(read).astype(int) - np.asarray(picture()).astype(int))
    assert difference.max() <= (6 if suffix == "jpg" else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_counts_as_none(tmp_path: Path):
    picture().save(tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff not a directory")
    assert read_rgb(tmp_path / "x.jpg").size == (WIDTH, HEIGHT)


def test_grey_one_bit_and_palette(tmp_path: Path):
    grey = picture().convert("L")
    for mode in ("1", "L", "P"):
        image = (picture() if mode == "P" else grey).convert(mode)
        image.save(tmp_path / "x.png")
        assert np.array_equal(np.asarray(read_rgb(tmp_path / "x.png")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, suffix: str):
    values = np.array([[0, 128, 129, 255, 256, 32768, 65278, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    expected = np.round(values / 257).astype(np.uint8)
    read = np.asarray(read_rgb(tmp_path / f"x.{suffix}"))
    assert np.array_equal(read, np.repeat(expected[..., None], 3, axis=2))


def test_sixteen_bits_big_endian(tmp_path: Path):
    Image.fromarray(np.array([[0, 257, 65535]], ">u2")).save(tmp_path / "x.tiff")
    assert np.asarray(read_rgb(tmp_path / "x.tiff"))[0, :, 0].tolist() == [0, 1, 255]


def test_thirty_two_bits_are_refused(tmp_path: Path):
    for kind in (np.int32, np.float32):
        Image.fromarray(np.ones((4, 4), kind)).save(tmp_path / "x.tiff")
        assert "32-bit pixels" in error(tmp_path / "x.tiff")


def test_cmyk(tmp_path: Path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "x.jpg", quality=100)
    red, green, blue = np.asarray(read_rgb(tmp_path / "x.jpg")).reshape(-1, 3).mean(axis=0)
    assert red > 250
    assert max(green, blue) < 5


def test_alpha_is_composed_on_white(tmp_path: Path):
    path = tmp_path / "x.png"
    for image in (
        Image.new("RGBA", (2, 2), (255, 0, 0, 0)),
        Image.new("LA", (2, 2), (0, 0)),
    ):
        image.save(path)
        assert np.all(np.asarray(read_rgb(path)) == 255)
    Image.new("RGBA", (2, 2), (0, 0, 0, 128)).save(path)
    assert np.all(np.asarray(read_rgb(path)) == 127)
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    palette.save(path, transparency=0)
    assert np.asarray(read_rgb(path))[0, :, 0].tolist() == [255, 9]
    palette.save(path, transparency=bytes([0, 255]))
    assert np.asarray(read_rgb(path))[0, :, 0].tolist() == [255, 9]
    Image.new("RGB", (2, 2), (1, 2, 3)).save(path, transparency=(1, 2, 3))
    assert np.all(np.asarray(read_rgb(path)) == 255)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_first_frame_of_an_animation(tmp_path: Path, suffix: str):
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    first.save(tmp_path / f"x.{suffix}", save_all=True, append_images=[second], lossless=True)
    assert np.asarray(read_rgb(tmp_path / f"x.{suffix}"))[0, 0].tolist() == [255, 0, 0]


def test_reduced_jpeg(tmp_path: Path):
    path = tmp_path / "x.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(203, 101).save(path, exif=exif, quality=95)
    for shrink, factor in ((0.1, 1), (1.9, 1), (2, 2), (7.9, 4), (8, 8), (100, 8)):
        with open_photo(path) as photo:
            assert photo.size == (101, 203)
            image, got = photo.reduced(shrink)
            assert got == factor
            assert image.size == (-(-101 // factor), -(-203 // factor))
            assert photo.reduced(1) == (image, factor)  # read once
            assert photo.size == (101, 203)
        with open_photo(path) as photo:
            again, _ = photo.reduced(shrink)
        assert image.tobytes() == again.tobytes()
        assert np.ptp(np.asarray(image)[..., 1]) > 150  # still the picture


def test_reduced_never_below_one_pixel(tmp_path: Path):
    picture(5, 3).save(tmp_path / "x.jpg")
    with open_photo(tmp_path / "x.jpg") as photo:
        image, factor = photo.reduced(8)
    assert (image.size, factor) == ((3, 2), 2)


def test_reduced_is_for_jpeg_only(tmp_path: Path):
    picture().save(tmp_path / "x.png")
    with open_photo(tmp_path / "x.png") as photo:
        assert photo.reduced(8)[1] == 1


def test_reduced_two_picture_jpeg(tmp_path: Path):
    picture(64, 48).save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=[picture(8, 8)])
    with open_photo(tmp_path / "x.jpg") as photo:
        image, factor = photo.reduced(4)
    assert photo.size == (64, 48)
    assert image.size == (64 // factor, 48 // factor)


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert "check the path" in error(tmp_path / "nowhere.jpg")
    assert "is a folder" in error(tmp_path)
    (tmp_path / "empty.jpg").touch()
    assert "is empty" in error(tmp_path / "empty.jpg")
    (tmp_path / "text.jpg").write_text("not a photograph\n" * 99)
    assert "unknown format: expected one of JPEG, PNG, WEBP, BMP, GIF, TIFF;" in error(tmp_path / "text.jpg")
    (tmp_path / "postscript.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    assert "unknown format" in error(tmp_path / "postscript.jpg")
    picture().save(tmp_path / "x.png")

    def refuse(*_: object, **__: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    assert "permission denied" in error(tmp_path / "x.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "bmp", "gif"])
def test_truncated(tmp_path: Path, suffix: str):
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(whole, format={"jpg": "JPEG"}.get(suffix, suffix))
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    assert "damaged" in error(path)


def test_every_flipped_byte_is_an_image_or_a_data_error(tmp_path: Path):
    whole = io.BytesIO()
    picture().save(whole, format="PNG")
    path = tmp_path / "x.png"
    for place in range(8, len(whole.getvalue())):
        damaged = bytearray(whole.getvalue())
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        with contextlib.suppress(DataError):
            assert read_rgb(path).mode == "RGB"


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header promises any size, and that holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 60_000])  # where Pillow warns, and where it raises
@pytest.mark.parametrize("filtered", ["error", "ignore"])
def test_bombs(tmp_path: Path, side: int, filtered: str):
    (tmp_path / "x.png").write_bytes(png_of(side, side))
    with warnings.catch_warnings():
        warnings.simplefilter(filtered)  # type: ignore[arg-type]
        assert "decompression bomb" in error(tmp_path / "x.png")


def test_the_bound_is_pillows():
    assert decode_module.MAX_PIXELS == Image.MAX_IMAGE_PIXELS


def test_errors_of_the_block_pass_through(tmp_path: Path):
    picture().save(tmp_path / "x.png")
    with pytest.raises(ZeroDivisionError), open_photo(tmp_path / "x.png"):
        _ = 1 / 0
