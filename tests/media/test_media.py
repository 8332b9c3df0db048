"""Pictures of strangers, and files that must be whole."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import socket
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from wanloom import media
from wanloom.errors import InputError
from wanloom.media import pictures


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(frames: int, height: int, width: int) -> np.ndarray:
    """A soft pattern that moves: what video codecs are made for."""
    t, y, x = np.mgrid[:frames, :height, :width].astype(np.float64)
    waves = [np.sin(x / 9 + t / 3), np.cos(y / 7 - t / 4), np.sin((x + y) / 11 + t / 5)]
    return (127.5 + 110 * np.stack(waves, -1)).astype(np.uint8)


def code_of(call: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return caught.value.code


def png(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def written(folder: Path, data: bytes, name: str = "a.png") -> Path:
    (folder / name).write_bytes(data)
    return folder / name


# ---------------------------------------------------------------- pictures: what is refused


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.png"))
        started = time.monotonic()
        for odd in ("pipe.png", "socket.png", "missing.png", "."):
            assert code_of(lambda odd=odd: media.read_image(tmp_path / odd)) == "E3001"
        for device in ("/dev/zero", "/dev/null"):
            assert code_of(lambda device=device: media.read_image(device)) == "E3001"
        assert code_of(lambda: media.read_image("a\0b.png")) == "E3001"
        assert time.monotonic() - started < 2


def test_a_file_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, png(noise(32, 32)))

    def denied(*_: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)  # the tests may run as root, who may read everything
    assert code_of(lambda: media.read_image(path)) == "E3002"


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    assert code_of(lambda: media.read_image(written(tmp_path, b""))) == "E3003"


@pytest.mark.parametrize(
    "data",
    [
        b"<html><body>not found</body></html>", b"%PDF-1.7 ...", b"hello", b"II*\0 a TIFF", b"8BPS a PSD",
        b"%!PS-Adobe", b"<svg xmlns=''/>", b"\0\0\1\0 an icon", b"\0\0\0\x0cjP  \r\n\x87\n", b"SIMPLE  =  T", b"BM",
        b"RIFF\0\0\0\0WAVEfmt ", b"ffconcat version 1.0\nfile secret.png", b"#EXTM3U\n/etc/passwd",
    ],
)  # fmt: skip
def test_other_formats_are_refused_by_their_first_bytes(data: bytes, tmp_path: Path) -> None:
    assert code_of(lambda: media.read_image(written(tmp_path, data))) == "E3004"


def test_formats_that_are_not_read_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("Pillow was asked"))
    tiff = io.BytesIO()
    Image.fromarray(noise(32, 32)).save(tiff, "TIFF")
    assert code_of(lambda: media.read_image(written(tmp_path, tiff.getvalue()))) == "E3004"


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_cut_file_is_refused_wherever_it_is_cut(format_: str, tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(noise(48, 40)).save(file, format_)
    whole = file.getvalue()
    for percent in range(1, 100):
        data = whole[: max(1, len(whole) * percent // 100)]
        assert code_of(lambda data=data: media.decode_image(data, "image: a")) == "E3005", f"cut at {percent} %"


def test_a_flipped_bit_in_a_png_is_noticed() -> None:
    whole = bytearray(png(noise(48, 40)))
    for at in range(8, len(whole), 97):
        whole[at] ^= 0x10
        with pytest.raises(InputError) as caught:
            media.decode_image(bytes(whole), "image: a")
        assert caught.value.code in ("E3005", "E3006", "E3007")
        whole[at] ^= 0x10


def test_a_png_without_its_last_chunk_is_refused() -> None:
    assert code_of(lambda: media.decode_image(png(noise(48, 40))[:-12], "image: a")) == "E3005"


def huge_png(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return pictures.PNG + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def huge_webp(width: int, height: int) -> bytes:
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + (width - 1).to_bytes(3, "little")
    body += (height - 1).to_bytes(3, "little") + b"VP8L" + struct.pack("<I", 0)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_a_picture_that_is_too_large_is_refused_before_memory_is_taken() -> None:
    sizes = ((14_000, 14_000), (50_000, 50_000), (2**31 - 1, 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for width, height in sizes:
        assert code_of(lambda w=width, h=height: media.decode_image(huge_png(w, h), "image: a")) in ("E3006",)
    assert code_of(lambda: media.decode_image(huge_webp(16_000, 16_000), "image: a")) == "E3006"
    gif = bytearray(open_bytes("GIF"))
    gif[6:10] = struct.pack("<HH", 60_000, 60_000)
    assert code_of(lambda: media.decode_image(bytes(gif), "image: a")) == "E3006"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB; one of them unpacked has 588 MB


def open_bytes(format_: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise(48, 40)).save(file, format_, **options)
    return file.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (15, 64), (200, 16)])
def test_a_picture_that_is_too_small_or_narrow_is_refused(size: tuple[int, int]) -> None:
    if size == (200, 16):
        assert code_of(lambda: media.decode_image(png(noise(16, 200)), "image: a")) == "E3007"
        return
    assert code_of(lambda: media.decode_image(png(noise(size[1], size[0])), "image: a")) == "E3007"


@pytest.mark.parametrize("format_", ["PNG", "WEBP", "GIF"])
def test_an_animation_is_refused(format_: str) -> None:
    frames = [Image.fromarray(noise(32, 32, seed)) for seed in range(3)]
    file = io.BytesIO()
    frames[0].save(file, format_, save_all=True, append_images=frames[1:])
    assert code_of(lambda: media.decode_image(file.getvalue(), "image: a")) == "E3008"


def test_metadata_bombs_are_refused() -> None:
    small = png(noise(32, 32))
    at = small.index(b"IDAT") - 4
    text = chunk(b"tEXt", b"Comment\0" + b"x" * (20 * 2**20))
    packed = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * (100 * 2**20)))
    profile = chunk(b"iCCP", b"icc\0\0" + zlib.compress(b"x" * (100 * 2**20)))
    for bomb in (text, packed, profile):
        assert code_of(lambda bomb=bomb: media.decode_image(small[:at] + bomb + small[at:], "image: a")) == "E3006"


def test_a_huge_file_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with path.open("wb") as file:
        file.truncate(pictures.MAX_FILE + 1)
    started = time.monotonic()
    assert code_of(lambda: media.read_image(path)) == "E3006"
    assert time.monotonic() - started < 0.5


# ---------------------------------------------------------------- pictures: what is read


def test_plain_pictures_read_as_they_are(tmp_path: Path) -> None:
    pixels = noise(40, 64)
    picture = media.read_picture(written(tmp_path, png(pixels)))
    assert np.array_equal(picture.pixels, pixels) and picture.size == (64, 40) and picture.name == "a.png"
    assert np.array_equal(media.read_image(Image.fromarray(pixels)), pixels)
    assert np.array_equal(media.read_image(pixels), pixels)


def test_sixteen_bits_keep_their_upper_half() -> None:
    values = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    pixels = media.decode_image(file.getvalue(), "image: a")
    assert np.array_equal(pixels[..., 0], (values >> 8).astype(np.uint8)) and (pixels.std(-1) == 0).all()


def test_transparency_is_laid_over_black() -> None:
    rgba = np.full((32, 32, 4), 200, np.uint8)
    rgba[:16, :, 3] = 255
    rgba[16:, :, 3] = 0
    pixels = media.decode_image(png(rgba), "image: a")
    assert (pixels[:16] == 200).all() and (pixels[16:] == 0).all()
    palette = Image.fromarray(rgba[..., :3]).quantize(4)
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=palette.getpixel((0, 0)))
    assert (media.decode_image(file.getvalue(), "image: a") == 0).all()


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "CMYK", "YCbCr"])
def test_other_colour_models_become_rgb_the_same_way_each_time(mode: str) -> None:
    image = Image.fromarray(smooth(1, 48, 48)[0]).convert(mode)
    file = io.BytesIO()
    image.save(file, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG")
    first, second = (media.decode_image(file.getvalue(), "image: a") for _ in range(2))
    assert first.shape == (48, 48, 3) and first.dtype == np.uint8 and np.array_equal(first, second)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_cameras_rotation_is_obeyed(orientation: int) -> None:
    upright = np.zeros((32, 64, 3), np.uint8)
    upright[:16, :32] = 255
    inverse = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # the transposition a camera would do
    stored = Image.fromarray(upright)
    if inverse is not None:
        stored = stored.transpose(Image.Transpose(inverse))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored.save(file, "PNG", exif=exif)
    assert np.array_equal(media.decode_image(file.getvalue(), "image: a"), upright)


def test_a_colour_profile_and_broken_exif_do_no_harm() -> None:
    pixels = noise(32, 32)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(media.decode_image(png(pixels, icc_profile=profile), "image: a"), pixels)
    broken = io.BytesIO()
    Image.fromarray(pixels).save(broken, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(media.decode_image(broken.getvalue(), "image: a"), pixels)


def test_the_hash_is_that_of_the_bytes_that_were_read(tmp_path: Path) -> None:
    import hashlib

    data = png(noise(32, 32))
    assert media.read_picture(written(tmp_path, data)).sha256 == hashlib.sha256(data).hexdigest()
    one, other = (media.read_picture(Image.fromarray(noise(32, 32, seed))) for seed in (0, 1))
    assert one.sha256 != other.sha256


def test_cover_crop_is_the_official_preparation() -> None:
    pixels = noise(50, 90)
    made = media.cover_crop(pixels, (64, 32))
    image = Image.fromarray(pixels)
    scale = max(64 / 90, 32 / 50)
    image = image.resize((round(90 * scale), round(50 * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - 64) // 2, (image.height - 32) // 2
    assert np.array_equal(made, np.asarray(image.crop((left, top, left + 64, top + 32))))


# ---------------------------------------------------------------- videos

LONG = json.dumps({"prompt": 'é 猫 "quoted" ; = # \\ \n' * 900}, ensure_ascii=False)
SUFFIXES = (".mp4", ".mkv", ".webm", ".gif", ".png")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_video_comes_back_with_its_frames_rate_and_text(suffix: str, tmp_path: Path) -> None:
    frames = smooth(9, 48, 64)
    path = tmp_path / f"a{suffix}"
    assert len(LONG.encode()) > 20_000
    assert media.save_video(path, frames, fps=8, comment=LONG) == 9
    again, fps = media.read_video(path)
    assert again.shape == frames.shape and fps == pytest.approx(8, rel=0.05)
    error = (again.astype(float) - frames) ** 2
    psnr = 10 * np.log10(255**2 / max(error.mean(), 1e-9))
    assert psnr > {".png": 100, ".gif": 25}.get(suffix, 38), psnr
    assert media.read_comment(path) == LONG
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_colours_do_not_shift(suffix: str, tmp_path: Path) -> None:
    for color in ((220, 30, 30), (30, 200, 60), (30, 60, 220), (128, 128, 128), (255, 255, 255), (0, 0, 0)):
        frames = np.broadcast_to(np.array(color, np.uint8), (5, 32, 32, 3))
        media.save_video(tmp_path / f"a{suffix}", frames, fps=16, overwrite=True)
        again, _ = media.read_video(tmp_path / f"a{suffix}")
        assert np.abs(again.astype(int) - frames).max() <= 3
    with av.open(str(tmp_path / f"a{suffix}")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range, context.pix_fmt) == (1, 1, "yuv420p")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_odd_sizes_and_single_frames_work(suffix: str, tmp_path: Path) -> None:
    media.save_video(tmp_path / f"a{suffix}", smooth(3, 35, 47), fps=16)
    again, _ = media.read_video(tmp_path / f"a{suffix}")
    even = suffix in media.CODECS
    assert again.shape == (3, 36 if even else 35, 48 if even else 47, 3)
    media.save_video(tmp_path / f"b{suffix}", smooth(1, 32, 32), fps=16)
    assert media.read_video(tmp_path / f"b{suffix}")[0].shape == (1, 32, 32, 3)


def test_a_single_png_frame_is_an_ordinary_picture(tmp_path: Path) -> None:
    pixels = noise(32, 48)
    media.save_video(tmp_path / "a.png", pixels[None], fps=16, comment="x")
    assert np.array_equal(media.read_image(tmp_path / "a.png"), pixels)


def test_frames_may_come_in_pieces(tmp_path: Path) -> None:
    frames = smooth(9, 32, 32)
    media.save_video(tmp_path / "a.mp4", frames, fps=8)
    media.save_video(tmp_path / "b.mp4", iter((frames[:1], frames[1:5], frames[5:])), fps=8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_the_index_of_an_mp4_comes_first(tmp_path: Path) -> None:
    media.save_video(tmp_path / "a.mp4", smooth(5, 32, 32), fps=8)
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_quality_is_the_official_scale() -> None:
    assert [media.CODECS[".mp4"].factor(quality) for quality in (0, 5, 8, 10)] == [51, 25, 10, 1]


def test_an_error_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def pieces() -> Any:
        yield smooth(2, 32, 32)
        raise RuntimeError("the decoder failed")

    for suffix in SUFFIXES:
        with pytest.raises(RuntimeError, match="the decoder failed"):
            media.save_video(tmp_path / f"a{suffix}", pieces(), fps=8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_is_said_and_leaves_nothing(suffix: str, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        frames = np.concatenate([noise(64, 64, seed)[None] for seed in range(20)])
        assert code_of(lambda: media.save_video(tmp_path / f"a{suffix}", frames, fps=8)) == "E5003"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_playlist_named_mp4_is_not_followed(tmp_path: Path) -> None:
    media.save_video(tmp_path / "secret.mkv", smooth(2, 32, 32), fps=8)
    written(tmp_path, b"ffconcat version 1.0\nfile secret.mkv\n", "a.mp4")
    assert code_of(lambda: media.read_video(tmp_path / "a.mp4")) == "E3004"
    assert code_of(lambda: media.read_comment(tmp_path / "a.mp4")) == "E3004"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_damaged_video_is_an_error_of_one_line(suffix: str, tmp_path: Path) -> None:
    media.save_video(tmp_path / f"a{suffix}", smooth(5, 32, 32), fps=8, comment="x" * 500)
    whole = (tmp_path / f"a{suffix}").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(25):
        data = bytearray(whole)
        if rng.random() < 0.5:
            data = data[: rng.integers(9, len(data))]
        for at in rng.integers(8, len(data), 20):
            data[at] = rng.integers(256)
        path = written(tmp_path, bytes(data), f"b{suffix}")
        for read in (media.read_video, media.read_comment):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    read(path)
                except InputError as error:
                    assert error.code in ("E3004", "E3009", "E3010", "E3011"), error


# ---------------------------------------------------------------- before the work


def test_places_that_cannot_be_written_are_said_at_once(tmp_path: Path) -> None:
    assert code_of(lambda: media.check_output(tmp_path / "none" / "a.mp4")) == "E5001"
    (tmp_path / "folder.mp4").mkdir()
    assert code_of(lambda: media.check_output(tmp_path / "folder.mp4")) == "E5001"
    assert code_of(lambda: media.check_output(tmp_path / ("x" * 300 + ".mp4"))) == "E5001"
    assert code_of(lambda: media.check_output(tmp_path / "a.exe")) == "E2017"
    (tmp_path / "a.mp4").touch()
    assert code_of(lambda: media.check_output(tmp_path / "a.mp4")) == "E5002"
    media.check_output(tmp_path / "a.mp4", overwrite=True)
    assert code_of(lambda: media.check_output(tmp_path / "b.mp4", need=2**62)) == "E5003"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "folder.mp4"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_encoders_are_tried_in_memory(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    media.try_encoder(f"a{suffix}", size=(64, 48), fps=16, quality=8)
    assert not list(tmp_path.iterdir())


def test_a_missing_encoder_is_found_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = media.Codec("mp4", "libnothing", lambda quality: 10)
    monkeypatch.setitem(media.CODECS, ".mp4", missing)
    assert code_of(lambda: media.try_encoder("a.mp4", size=(64, 64), fps=16, quality=8)) == "E8004"


def test_text_of_other_programs_is_no_error(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Title", "x")
    Image.fromarray(noise(32, 32)).save(tmp_path / "a.png", pnginfo=info)
    assert media.read_comment(tmp_path / "a.png") == ""
