"""Bad input: pictures that are empty, cut, bombs, animations, or no pictures at all."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rows import I2V, SHORT


def png(width: int, height: int, *extra: tuple[bytes, bytes], pixels: bytes | None = None) -> bytes:
    """A grey PNG with chunks of one's own between header and pixels; without `pixels` it has one byte of them."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(pixels or b"\0")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


@pytest.fixture
def shown(refused, models, tmp_path) -> Callable[..., str]:
    """`shown("E3004", data, "p.png")`: a picture file of these bytes is refused with this code."""

    def call(code: str, data: bytes, name: str = "p.png") -> str:
        file = tmp_path / name
        file.write_bytes(data)
        said = refused(code, "--task", I2V, "--ckpt-dir", models / I2V, *SHORT, "--prompt", "x", "--image", file)
        assert name in said
        return said

    return call


def test_b041_an_empty_picture(shown):
    shown("E3003", b"")


@pytest.mark.parametrize("data", [b"just text\n", b"<!DOCTYPE html><html></html>", b"%PDF-1.7\n", b"\0" * 64])
def test_b042_other_things_named_png(data, shown):
    shown("E3004", data)


def test_b043_a_picture_cut_at_every_hundredth(shown, picture):
    whole = picture.read_bytes()
    for percent in range(1, 100):
        shown("E3005", whole[: max(1, len(whole) * percent // 100)])


@pytest.mark.parametrize("side", [14_000, 50_000])
def test_b044_a_bomb_is_refused_by_its_header(side, shown):
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "at most 40 Mpx" in shown("E3006", png(side, side))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # kB


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (400, 16)])
def test_b045_a_picture_too_small_or_too_narrow(size, shown):
    shown("E3007", png(*size, pixels=bytes((size[0] + 1) * size[1])))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_b046_an_animation(kind, shown, tmp_path):
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    file = tmp_path / "moving"
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    assert "one frame expected" in shown("E3008", file.read_bytes(), f"p.{kind.lower()}")


def odd_pictures(folder: Path) -> Iterator[tuple[str, Path, tuple[int, int]]]:
    """Good pictures in unusual forms: (name, file, size in pixels after the camera's rotation)."""
    ramp = np.linspace(0, 255, 96 * 64, dtype=np.uint8).reshape(64, 96)
    colored = Image.fromarray(np.stack([ramp, ramp.T.reshape(64, 96), 255 - ramp], -1))
    colored.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(ramp.astype(np.uint16) << 8).save(folder / "sixteen.png")
    palette = colored.convert("P")
    palette.save(folder / "palette.png", transparency=0)
    Image.fromarray(ramp).save(folder / "grey.jpg")
    colored.save(folder / "profile.png", icc_profile=b"not a real profile")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    colored.save(folder / "turned.jpg", exif=exif)
    for name in ("cmyk.jpg", "sixteen.png", "palette.png", "grey.jpg", "profile.png"):
        yield name, folder / name, (96, 64)
    yield "turned.jpg", folder / "turned.jpg", (64, 96)


def test_b047_unusual_pictures_are_converted_always_alike(run, models, tmp_path):
    from wanloom.media import read_picture

    for name, file, size in odd_pictures(tmp_path):
        words = ("--task", I2V, "--ckpt-dir", models / I2V, *SHORT, "--prompt", "x", "--image", file, "--dry-run")
        ran = run("generate", *words)
        assert ran.code == 0, f"{name}: {ran.err}"
        assert tuple(json.loads(ran.out)["inputs"][0]["size"]) == size, name
        pixels = read_picture(file).pixels
        assert pixels.shape == (size[1], size[0], 3)
        assert (pixels == read_picture(file).pixels).all()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("p.tiff", b"II*\0" + bytes(64)),
        ("p.psd", b"8BPS\0\1" + bytes(64)),
        ("p.fits", b"SIMPLE  =                    T" + bytes(64)),
        ("p.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n"),
        ("p.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        ("p.ico", b"\0\0\1\0\1\0" + bytes(64)),
        ("p.jp2", b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(64)),
    ],
)
def test_b048_other_picture_formats_are_not_even_opened(name, data, shown, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *rest, **options: pytest.fail("a parser was opened"))
    shown("E3004", data, name)


@pytest.mark.parametrize("kind", ["text", "compressed text", "profile"])
def test_b049_a_picture_with_far_more_metadata_than_pixels(kind, shown):
    much = bytes(100 * 10**6)
    chunks = {
        "text": (b"tEXt", b"Comment\0" + b"x" * len(much)),
        "compressed text": (b"zTXt", b"Comment\0\0" + zlib.compress(much)),
        "profile": (b"iCCP", b"profile\0\0" + zlib.compress(much)),
    }
    shown("E3006", png(64, 64, chunks[kind], pixels=bytes(65 * 64)))
