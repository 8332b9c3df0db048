"""Bad input: videos for animate that are damaged, forged, too much, or do not belong together, on the command line.

What can be told from the packets and the first frame is refused before any work. Damage further on is met when that
frame is needed: then no video has got its name.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from rows import ANIMATE, check_refusal, film, greys

from wanloom.errors import InputError
from wanloom.media import VideoReader

CENC = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "00" * 16, "encryption_kid": "11" * 16}


@pytest.fixture
def words(models, picture, tmp_path) -> Callable[..., tuple[object, ...]]:
    """`words(pose=file, ...)`: the command line that makes the picture dance; what is not named is good."""

    def typed(**videos: Path) -> tuple[object, ...]:
        good = {role: film(tmp_path / f"good_{role}.mp4") for role in ("pose", "face") if role not in videos}
        files = [word for role, file in {**good, **videos}.items() for word in (f"--{role}-video", file)]
        model = ("--task", ANIMATE, "--ckpt-dir", models / ANIMATE, "--frames", "5", "--steps", "1", "--seed", "1")
        return (*model, "--prompt", "x", "--image", picture, *files)

    return typed


@pytest.fixture
def unseen(refused, words) -> Callable[..., str]:
    """`unseen("E3009", pose=file)`: refused with this code, and the file is named."""

    def call(code: str, **videos: Path) -> str:
        said = refused(code, *words(**videos))
        role, file = next(iter(videos.items()))
        assert f"{role}-video: {file.name}: " in said
        return said

    return call


@pytest.fixture
def stopped(run, words, here) -> Callable[..., str]:
    """`stopped("E3009", pose=file)`: the run ends with this code, and no video has got its name."""

    def call(code: str, **videos: Path) -> str:
        ran = run("generate", *words(**videos), "--out", "a.mp4")
        check_refusal(ran, code)
        assert not (here / "a.mp4").exists()
        assert all(path.parent.name == "a.job" or path.name == "a.job" for path in here.rglob("*"))
        return ran.err.splitlines()[-1]

    return call


def noise(count: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


def changing(path: Path) -> Path:
    """A video of 5 frames whose size changes after the second."""
    parts = [film(path.with_name(f"{w}.webm"), greys(n, 64, w), "libvpx-vp9") for n, w in ((2, 64), (3, 96))]
    with av.open(str(path), "w") as out, av.open(str(parts[0])) as one, av.open(str(parts[1])) as other:
        target = out.add_stream_from_template(one.streams.video[0], opaque=True)
        for part, shift in ((one, 0), (other, 250)):
            for packet in part.demux(video=0):
                if packet.size:
                    packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.pts + shift, target
                    out.mux(packet)
    return path


def damaged_late(path: Path) -> Path:
    """A video of which the first frame can be decoded, and not all."""
    whole = film(path, noise(), movflags="faststart").read_bytes()
    for at in range(len(whole) - 10, len(whole) // 2, -7):
        data = bytearray(whole)
        data[at] ^= 0x55
        path.write_bytes(data)
        try:
            with VideoReader(path) as video:
                list(video)
        except InputError:
            return path
    raise AssertionError("H.264 bears it all")


@pytest.mark.parametrize("kind", ["cut", "without its index", "turned over"])
def test_b050_a_damaged_video(kind, unseen, tmp_path):
    file = film(tmp_path / "a.mp4", noise(), **({"movflags": "faststart"} if kind == "cut" else {}))
    data = bytearray(file.read_bytes())
    if kind == "cut":
        del data[len(data) // 2 :]
    elif kind == "without its index":
        del data[data.rindex(b"moov") - 4 :]
    else:
        start = data.index(b"mdat") + 4
        data[start : start + 3000] = bytes(255 - byte for byte in data[start : start + 3000])
    file.write_bytes(data)
    assert "damaged video" in unseen("E3009", pose=file)


def test_b050_damage_behind_the_first_frame(stopped, tmp_path):
    assert "pose-video: a.mp4: damaged video" in stopped("E3009", pose=damaged_late(tmp_path / "a.mp4"))


def test_b051_videos_beyond_all_measure(unseen, tmp_path, monkeypatch):
    assert "8208x16 is too large" in unseen("E3010", pose=film(tmp_path / "wide.mp4", greys(1, 16, 8208)))
    Image.new("L", (7680, 4320)).save(tmp_path / "large.gif")
    assert "7680x4320 is too large" in unseen("E3010", face=tmp_path / "large.gif")
    monkeypatch.setattr("wanloom.media.reading.MAX_FRAMES", 5)
    assert "more than 5 frames" in unseen("E3010", pose=film(tmp_path / "long.mp4", greys(6)))


def test_b052_no_video_in_it_two_or_only_a_cover(unseen, tmp_path):
    assert "2 videos in it" in unseen("E3011", pose=film(tmp_path / "two.mp4", codec="mpeg4", videos=2))
    cover = film(tmp_path / "cover.png", greys(1), "png", pixels="rgb24", update="1").read_bytes()
    for name in ("sound.mp4", "cover.mkv"):
        with av.open(str(tmp_path / name), "w") as out:
            stream = out.add_stream("aac", rate=48000, layout="mono")
            if name == "cover.mkv":
                out.add_attachment("cover.png", "image/png", cover)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 48000
            out.mux([*stream.encode(frame), *stream.encode(None)])
        assert "no videos in it" in unseen("E3011", pose=tmp_path / name)


def test_b053_rates_and_times(unseen, run, words, tmp_path):
    assert "1000 frames a second" in unseen("E3012", pose=film(tmp_path / "fast.mp4", greys(20), rate=1000))
    still = [Image.fromarray(frame) for frame in greys(3)]
    still[0].save(tmp_path / "still.gif", save_all=True, append_images=still[1:], duration=0)
    assert "no usable timestamps" in unseen("E3012", pose=tmp_path / "still.gif")
    uneven = film(tmp_path / "uneven.mkv", times=[-500, -460, 40, 80, 500])
    ran = run("generate", *words(pose=uneven), "--dry-run")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["frames"] == 5


def test_b054_a_size_that_changes_on_the_way(stopped, tmp_path):
    said = stopped("E3013", pose=changing(tmp_path / "a.webm"))
    assert "the size changes from 64x64 to 96x64 on the way" in said


@pytest.mark.parametrize("text", [
    "ffconcat version 1.0\nfile secret.mp4\n", "#EXTM3U\n#EXTINF:1,\nsecret.mp4\n",
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period/></MPD>',
    "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
])  # fmt: skip
def test_b055_playlists_named_mp4_are_not_even_opened(text, unseen, here, tmp_path, monkeypatch):
    film(here / "secret.mp4")
    good = film(tmp_path / "good.mp4")
    real = av.open

    def watched(file: object, *rest: object, **options: object) -> object:
        if not hasattr(file, "read") or text.encode() in file.getvalue():  # type: ignore[attr-defined]
            pytest.fail("a demuxer was opened")
        return real(file, *rest, **options)

    (tmp_path / "a.mp4").write_text(text)
    monkeypatch.setattr(av, "open", watched)
    unseen("E3004", pose=tmp_path / "a.mp4", face=good)


def test_b056_attachments_are_ignored_and_other_files_not_opened(run, words, unseen, tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        stream = out.add_stream("mpeg4", rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        out.add_attachment("font.ttf", "application/x-truetype-font", b"not a font")
        for frame in greys():
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        out.mux(stream.encode(None))
    ran = run("generate", *words(pose=tmp_path / "a.mkv"), "--dry-run")
    assert ran.code == 0, ran.err
    secret = film(tmp_path / "secret.mp4", codec="mpeg4")
    data = bytearray(secret.read_bytes())
    place = str(secret).encode()
    place += b"\0" * (len(place) % 2)
    alias = b"alis\0\0\0\0" + bytes(150) + struct.pack(">HH", 2, len(place)) + place + struct.pack(">hH", -1, 0)
    at = data.index(b"dref") + 12
    data[at : at + 12] = struct.pack(">I", len(alias) + 4) + alias
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        size = data.index(box) - 4
        struct.pack_into(">I", data, size, struct.unpack_from(">I", data, size)[0] + len(alias) + 4 - 12)
    (tmp_path / "led.mp4").write_bytes(data)
    assert "lies in another file" in unseen("E3004", pose=tmp_path / "led.mp4")


@pytest.mark.parametrize(("name", "codec", "pixels"), [
    ("a.mkv", "jpeg2000", "yuv420p"), ("a.mov", "magicyuv", "gbrp"), ("a.mkv", "ffv1", "yuv420p"),
])  # fmt: skip
def test_b057_uncommon_codecs_are_not_decoded(name, codec, pixels, unseen, tmp_path):
    assert "is not read. Save it as H.264." in unseen("E3014", pose=film(tmp_path / name, None, codec, pixels=pixels))


def test_b062_masks_of_another_size_grey_ones_and_empty_ones(refused, run, words, tmp_path):
    scene, black = film(tmp_path / "scene.mp4"), np.zeros((5, 64, 64, 3), np.uint8)
    small = film(tmp_path / "small.mp4", greys(5, 32, 32))
    said = refused("E3019", *words(background=scene, mask=film(tmp_path / "wide.mp4", 255 - greys(5, 64, 96))))
    assert "mask-video: 96x64, the pose video has 64x64" in said
    said = refused("E3019", *words(background=small, mask=film(tmp_path / "white.mp4", 255 - black)))
    assert "background-video: 32x32, the pose video has 64x64" in said
    dark = film(tmp_path / "dark.mp4", black + 100)
    for mask in (film(tmp_path / "empty.mp4", black), dark):
        assert "mask-video: empty in all frames" in refused("E3020", *words(background=scene, mask=mask))
    ran = run("generate", *words(background=scene, mask=film(tmp_path / "grey.mp4", black + 160)), "--dry-run")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["animation"]["replace"] is True


def test_b063_videos_of_another_length_and_another_rate(refused, run, words, tmp_path):
    long = film(tmp_path / "long.mp4", greys(7))
    assert "face-video: 7 frames, the pose video has 5" in refused("E3021", *words(face=long))
    assert "face-video: 5 frames, the pose video has 7" in refused("E3021", *words(pose=long))
    odd = film(tmp_path / "odd.mp4", greys(5, 60, 60))
    assert "pose-video: 60x60, expected sides in multiples of 16: 64x64" in refused("E3019", *words(pose=odd))
    slow = film(tmp_path / "slow.mp4", rate=4)  # as many frames: they are taken one by one
    ran = run("generate", *words(face=slow), "--dry-run")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["animation"]["rate"] == [8, 1]


def test_b064_the_hash_is_of_what_was_read_and_another_file_is_noticed(run, words, stopped, tmp_path, monkeypatch):
    from wanloom.inputs import VideoFile

    pose = film(tmp_path / "pose.mp4")
    ran = run("generate", *words(pose=pose), "--dry-run")
    recorded = {item["role"]: item["sha256"] for item in json.loads(ran.out)["inputs"]}
    assert recorded["pose_video"] == hashlib.sha256(pose.read_bytes()).hexdigest()
    plain = VideoFile.open

    def replaced(self: VideoFile, fps: int | None = None) -> VideoReader:
        film(pose, 255 - greys())
        return plain(self, fps)

    monkeypatch.setattr(VideoFile, "open", replaced)
    assert "pose.mp4 was changed while the run was under way" in stopped("E3025", pose=pose)


def test_b065_locked_videos_and_sounds(unseen, refused, models, picture, tmp_path):
    assert "encrypted video" in unseen("E3009", pose=film(tmp_path / "a.mp4", **CENC))
    with av.open(str(tmp_path / "a.m4a"), "w", format="mp4", options=CENC) as out:
        stream = out.add_stream("aac", rate=48000, layout="mono")
        for number in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 48000, 1024 * number
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    model = ("--task", "s2v-14B", "--ckpt-dir", models / "s2v-14B", "--prompt", "x", "--image", picture)
    refused("E3009", *model, "--audio", tmp_path / "a.m4a")
