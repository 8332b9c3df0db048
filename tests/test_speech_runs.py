"""Speech to video from request to file: how long it is, what is heard when, and a text that is spoken first."""

from __future__ import annotations

import shlex
import sys
import wave as wavefile
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from safetensors.torch import load_file

import tiny
from command_line import Ran, run_here
from wanloom import media
from wanloom.errors import InputError, WanloomWarning
from wanloom.jobs import stored_request
from wanloom.pipeline import Pipeline, load
from wanloom.plan import Input, Plan, make_plan
from wanloom.request import Request, request_from_text
from wanloom.variants import VARIANTS

RATE = 16_000
CLICKS = (0.3, 0.8)  # seconds

pytestmark = pytest.mark.filterwarnings("ignore:W2004")


def clicks(seconds: float, rate: int = RATE) -> np.ndarray:
    """[n] float32: silence with a click of 10 ms at each of CLICKS."""
    wave = np.zeros(round(seconds * rate), np.float32)
    for at in CLICKS:
        wave[round(at * rate) : round((at + 0.01) * rate)] = 0.5
    return wave


def wav(path: Path, seconds: float, rate: int = RATE) -> Path:
    with wavefile.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((clicks(seconds, rate) * 32767).round().astype("<i2").tobytes())
    return path


def m4a(path: Path, seconds: float) -> Path:
    with av.open(str(path), "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=48000, layout="mono")
        resampler = av.AudioResampler("fltp", "mono", 48000, frame_size=1024)
        frame = av.AudioFrame.from_ndarray(clicks(seconds, 48000)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.time_base, frame.pts = 48000, Fraction(1, 48000), 0
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            out.mux(stream.encode(piece))
        out.mux(stream.encode(None))
    return path


def heard(path: Path) -> list[float]:
    """The seconds after the first picture at which clicks begin, by the timestamps that a player goes by."""
    found: list[float] = []
    with av.open(str(path)) as container:
        begin = next(container.decode(video=0)).time
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            wave = np.abs(frame.to_ndarray().astype(np.float32)).max(0)
            for at in np.flatnonzero(wave > 0.1) / frame.sample_rate + frame.time - begin:
                if not found or at > found[-1] + 0.2:
                    found.append(float(at))
    return found


def packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("s2v"), "s2v-14B")


@pytest.fixture
def pipe(model: Path) -> Pipeline:
    return load(model, task="s2v-14B", device="cpu")


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., Request]:
    """A request for the smallest video there is, of the sound it is given or one of 1.1 s."""
    tiny.picture(tmp_path / "face.png", (64, 64))

    def make(**fields: Any) -> Request:
        small: dict[str, Any] = {
            "prompt": "a cat", "image": tmp_path / "face.png", "size": (64, 64), "infer_frames": 8, "steps": 1,
            "guidance": 1.0, "seed": 3,
        }  # fmt: skip
        if "tts_text" not in fields:
            small["audio"] = tmp_path / "a.wav" if "audio" in fields else wav(tmp_path / "a.wav", 1.1)
        return Request(**{**small, **fields})

    return make


def planned(seconds: float, **fields: Any) -> Plan:
    picture = Input(role="image", name="a.png", sha256="0" * 64, size=(832, 480))
    sound = Input(role="audio", name="a.wav", sha256="1" * 64, samples=round(seconds * RATE))
    request = Request(prompt="a", seed=7, image="a.png", audio="a.wav", **fields)
    return make_plan(request, VARIANTS["s2v-14B"], inputs=[picture, sound])


def refused(call: Callable[[], Any], code: str, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.code == code, caught.value
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- how long it is


@pytest.mark.parametrize(
    ("seconds", "fields", "frames"),
    [
        (12.0, {}, 189), (12.0, {"reference_timing": True}, 192), (12.0, {"start_from_ref": True}, 192),
        (12.0, {"num_clips": 1}, 77), (12.01, {}, 190), (5.0, {}, 77), (4.99, {}, 77), (0.2, {}, 1),
    ],
)  # fmt: skip
def test_the_file_has_the_frames_that_begin_while_there_is_sound(
    seconds: float, fields: dict[str, Any], frames: int
) -> None:
    plan = planned(seconds, **fields)
    assert plan.frames == frames
    assert plan.frames <= sum(part.frames for part in plan.segments)
    assert Plan.from_json(plan.to_json()) == plan


def test_a_sound_that_is_trimmed_away_is_refused() -> None:
    refused(lambda: planned(0.18), "E3017", "audio: 0.18 s of sound, at least 0.25 s")
    assert planned(0.18, reference_timing=True).frames == 3


def test_picture_and_sound_end_together_and_tensors_are_whole(pipe: Pipeline, ask: Any, tmp_path: Path) -> None:
    result = pipe.run(ask(save_tensors=tmp_path / "a.safetensors"), out=tmp_path / "a.mp4")
    plan = result.plan
    assert [part.frames for part in plan.segments] == [5, 8, 8] and plan.frames == 15  # (1.1 - 0.1875) * 16 = 14.6
    assert load_file(tmp_path / "a.safetensors")["video"].shape[1] == 21
    assert len(media.read_video(tmp_path / "a.mp4").frames) == 15
    assert abs(media.read_sound(tmp_path / "a.mp4").seconds - (1.1 - 0.1875)) <= 1024 / RATE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.safetensors", "a.wav", "face.png"]


def test_a_video_in_memory_is_whole_and_saved_as_long_as_its_sound(pipe: Pipeline, ask: Any, tmp_path: Path) -> None:
    (video,) = pipe.run(ask()).videos
    assert video.tensor.shape == (3, 21, 64, 64) and video.plan.frames == 15
    assert len(media.read_video(video.save(tmp_path / "a.png")).frames) == 15


# ---------------------------------------------------------------- what is heard when


@pytest.mark.parametrize(
    ("fields", "late", "suffix"),
    [
        ({}, 3 / 16, ".mp4"), ({}, 3 / 16, ".webm"), ({"reference_timing": True}, 0.0, ".mp4"),
        ({"start_from_ref": True}, 0.0, ".mp4"),
    ],
)  # fmt: skip
def test_sound_is_trimmed_by_the_frames_that_are_not_shown(
    fields: dict[str, Any], late: float, suffix: str, pipe: Pipeline, ask: Any, tmp_path: Path
) -> None:
    pipe.run(ask(**fields), out=tmp_path / f"a{suffix}")
    assert heard(tmp_path / f"a{suffix}") == pytest.approx([at - late for at in CLICKS], abs=0.005)


def test_sound_that_is_not_trimmed_is_copied_and_else_encoded(pipe: Pipeline, ask: Any, tmp_path: Path) -> None:
    sound = m4a(tmp_path / "b.m4a", 1.1)
    pipe.run(ask(audio=sound, start_from_ref=True), out=tmp_path / "copied.mp4")
    copied, original = packets(tmp_path / "copied.mp4"), packets(sound)
    assert copied == original[: len(copied)] and len(copied) >= len(original) - 2
    pipe.run(ask(audio=sound), out=tmp_path / "trimmed.mp4")
    encoded = packets(tmp_path / "trimmed.mp4")
    assert encoded != original[: len(encoded)] and encoded != original[-len(encoded) :]
    assert heard(tmp_path / "trimmed.mp4") == pytest.approx([at - 3 / 16 for at in CLICKS], abs=0.005)


def test_formats_without_sound_get_none(pipe: Pipeline, ask: Any, tmp_path: Path) -> None:
    pipe.run(ask(num_clips=1), out=tmp_path / "a.gif")
    assert len(media.read_video(tmp_path / "a.gif").frames) == 5


def test_a_failing_muxer_is_an_error_and_the_silent_video_is_kept(
    pipe: Pipeline, ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = media.add_sound

    def fail(video: Path, sound: Path, out: Path, **given: Any) -> Path:
        raise InputError("E5006", "sound: could not be put into the .mp4 file (no reason).")

    monkeypatch.setattr(media, "add_sound", fail)
    out = tmp_path / "a.mp4"
    refused(lambda: pipe.run(ask(), out=out), "E5006", "no reason", "kept", "a.silent.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.job", "a.silent.mp4", "a.wav", "face.png"]
    assert len(media.read_video(tmp_path / "a.silent.mp4").frames) == 15
    assert not media.has_sound(tmp_path / "a.silent.mp4")
    monkeypatch.setattr(media, "add_sound", right)
    result = pipe.run(request_from_text(stored_request(tmp_path / "a.job")), resume=tmp_path / "a.job")
    assert result.files == (out,) and result.began_at > 0 and media.has_sound(out)


# ---------------------------------------------------------------- long sounds


def test_long_sounds_are_heard_in_windows_and_a_warning_says_so(pipe: Pipeline, ask: Any, tmp_path: Path) -> None:
    for seconds, fields in ((60, {}), (61, {"audio_window": 0}), (70, {"audio_window": 80})):
        assert not [note for note in planned(seconds, **fields).notes if note.startswith("W2036")]
    (note,) = [note for note in planned(600, audio_window=20).notes if note.startswith("W2036")]
    assert "600 s" in note and "windows of 20 s" in note and "--audio-window 0" in note
    with pytest.warns(WanloomWarning, match="W2036: audio: 61 s of sound are heard in windows of 30 s"):
        pipe.prepare(ask(audio=wav(tmp_path / "long.wav", 61)))


def test_features_wait_in_the_job_folder_clip_by_clip(pipe: Pipeline, ask: Any, tmp_path: Path) -> None:
    stream = pipe.stream(ask(), out=tmp_path / "a.mp4")
    next(event for event in stream if event.stage == "denoise")
    files = sorted((tmp_path / "a.job").glob("given-*.safetensors"))
    assert [path.name for path in files] == [f"given-000{i}.safetensors" for i in range(3)]
    assert {load_file(path)["audio"].shape for path in files} == {(1, tiny.AUDIO.layers + 1, tiny.AUDIO.dim, 8)}
    stream.close()


# ---------------------------------------------------------------- text to speech


@pytest.fixture
def speaker(tmp_path: Path) -> Iterator[str]:
    """A --tts-command that writes 1.1 s of clicks, and what it was asked into `asked`."""
    spoken = wav(tmp_path / "spoken.bin", 1.1)
    script = tmp_path / "speaker.py"
    script.write_text(
        "import shutil, sys\n"
        f"shutil.copy({str(spoken)!r}, sys.argv[1])\n"
        f"open({str(tmp_path / 'asked')!r}, 'a').write(sys.argv[2] + chr(10))\n"
    )
    yield f"{shlex.quote(sys.executable)} {shlex.quote(str(script))} {{out}} {{text}}"


def words(model: Path, tmp_path: Path, *more: object) -> list[object]:
    tiny.picture(tmp_path / "face.png", (64, 64))
    return [
        "generate", "--task", "s2v-14B", "--ckpt-dir", model, "--prompt", "a cat", "--image", tmp_path / "face.png",
        "--size", "64x64", "--infer-frames", 8, "--steps", 1, "--guidance", 1, "--seed", 3, "--device", "cpu",
        "--out", tmp_path / "a.mp4", *more,
    ]  # fmt: skip


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    return lambda *said: run_here(capsys, *said)


def test_a_text_is_spoken_once_kept_and_named(run: Any, model: Path, speaker: str, tmp_path: Path) -> None:
    ran = run(*words(model, tmp_path, "--tts-text", "hello; $(you)", "--tts-command", speaker))
    assert ran.code == 0, ran.err
    assert (tmp_path / "asked").read_text() == "hello; $(you)\n"
    assert (tmp_path / "a.speech.wav").read_bytes() == (tmp_path / "spoken.bin").read_bytes()
    assert "a.speech.wav" in ran.out
    assert heard(tmp_path / "a.mp4") == pytest.approx([at - 3 / 16 for at in CLICKS], abs=0.005)
    plan = Plan.from_json(media.read_comment(tmp_path / "a.mp4"))
    assert plan.input("audio").name == "a.speech.wav" and plan.frames == 15  # type: ignore[union-attr]
    again = run("generate", "--like", tmp_path / "a.mp4", "--ckpt-dir", model, "--dry-run")
    assert again.code == 0, again.err
    assert Plan.from_json(again.out) == plan


def test_a_run_that_is_continued_hears_the_same_speech(
    run: Any, model: Path, speaker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = media.add_sound
    monkeypatch.setattr(media, "add_sound", lambda *given, **more: (_ for _ in ()).throw(InputError("E5006", "no.")))
    ran = run(*words(model, tmp_path, "--tts-text", "hello", "--tts-command", speaker))
    assert ran.code == 5 and "a.silent.mp4" in ran.err
    monkeypatch.setattr(media, "add_sound", right)
    ran = run("generate", "--resume", tmp_path / "a.job")
    assert ran.code == 0, ran.err
    assert (tmp_path / "asked").read_text() == "hello\n"
    assert media.has_sound(tmp_path / "a.mp4")


def test_nothing_is_spoken_when_the_rest_is_wrong(run: Any, model: Path, speaker: str, tmp_path: Path) -> None:
    speak = ("--tts-text", "hello", "--tts-command", speaker)
    (tmp_path / "a.mp4").write_bytes(b"mine")
    assert "error[E5002]" in run(*words(model, tmp_path, *speak)).err
    (tmp_path / "a.mp4").unlink()
    (tmp_path / "a.speech.wav").write_bytes(b"mine")
    ran = run(*words(model, tmp_path, *speak))
    assert ran.code == 5 and "error[E5002]" in ran.err and "--audio a.speech.wav" in ran.err
    ran = run(*words(model, tmp_path, *speak, "--dry-run"))
    assert ran.code == 2 and "error[E2023]: dry-run" in ran.err
    ran = run(*words(model, tmp_path, *speak, "--vae", tmp_path / "none.pth"))
    assert ran.code == 4
    assert not (tmp_path / "asked").exists()
    assert (tmp_path / "a.speech.wav").read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.speech.wav", "face.png", "speaker.py", "spoken.bin"]


def test_a_speaker_that_fails_leaves_nothing(run: Any, model: Path, tmp_path: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -c 'import sys; sys.exit(3)' {{out}} {{text}}"
    ran = run(*words(model, tmp_path, "--tts-text", "hello", "--tts-command", command))
    assert ran.code == 8 and "error[E8006]" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["face.png"]


def test_without_a_file_speech_lives_as_long_as_the_run(
    pipe: Pipeline, ask: Any, speaker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (video,) = pipe.run(ask(tts_text="hello", tts_command=speaker)).videos
    assert video.plan.frames == 15 and video.tensor.shape[1] == 21
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asked", "face.png", "speaker.py", "spoken.bin"]


def test_from_python_speech_is_kept_beside_the_file_too(pipe: Pipeline, ask: Any, speaker: str, tmp_path: Path) -> None:
    request = ask(tts_text="hello", tts_command=speaker)
    stream = pipe.stream(request, out=tmp_path / "a.mp4")
    next(event for event in stream if event.stage == "denoise" and event.step == 1)
    stream.close()
    result = pipe.run(request, resume=tmp_path / "a.job")  # the same request: its text was spoken already
    assert (tmp_path / "asked").read_text() == "hello\n"
    assert result.plan.input("audio").name == "a.speech.wav"  # type: ignore[union-attr]
    assert (tmp_path / "a.speech.wav").is_file()


SPEAK: dict[str, Any] = {"tts_text": "hello", "tts_command": "espeak-ng -w {out} {text}"}


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({**SPEAK, "audio": "a.wav"}, "E2023", "--audio"),
        ({"tts_command": "say {out} {text}", "audio": "a.wav"}, "E2023", "--tts-text"),
        ({"tts_url": "http://localhost", "audio": "a.wav"}, "E2023", "--tts-text"),
        ({"tts_text": "hello"}, "E2024", "--tts-command"),
        ({"tts_text": " ", "tts_url": "http://localhost"}, "E2012", "tts-text"),
        ({"tts_text": "a\0", "tts_url": "http://localhost"}, "E2014", "tts-text"),
        ({**SPEAK, "tts_voice": "alloy"}, "E2023", "tts-voice"),
        ({**SPEAK, "tts_url": "http://localhost"}, "E2023", "tts-url"),
        ({**SPEAK, "tts_command": "espeak-ng {text}"}, "E2025", "{out}"),
        ({"tts_text": "hello", "tts_url": "localhost:1"}, "E2025", "tts-url"),
    ],
)
def test_wishes_that_contradict_each_other(
    fields: dict[str, Any], code: str, words: str, pipe: Pipeline, tmp_path: Path
) -> None:
    picture, sound = tiny.picture(tmp_path / "face.png", (64, 64)), wav(tmp_path / "a.wav", 1.1)
    request = Request(prompt="a", image=picture, **{**fields, **({"audio": sound} if "audio" in fields else {})})
    refused(lambda: pipe.run(request, out=tmp_path / "a.mp4"), code, words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "face.png"]


@pytest.mark.parametrize("name", ["tts_text", "tts_command", "tts_url", "tts_voice", "tts_model"])
def test_other_tasks_do_not_speak(name: str) -> None:
    refused(
        lambda: make_plan(Request(prompt="a", **{name: "x"}), VARIANTS["t2v-A14B"]), "E2016", name.replace("_", "-")
    )


@pytest.mark.parametrize("option", [("--enable_tts",), ("--tts_prompt_audio", "a.wav"), ("--tts_prompt_text", "hello")])
def test_the_official_speaker_is_refused_with_ours_named(option: tuple[str, ...], run: Any, tmp_path: Path) -> None:
    ran = run("generate", "--task", "s2v-14B", "--prompt", "a", *option)
    assert ran.code == 2 and "error[E2026]" in ran.err and "--tts-command" in ran.err


def test_a_text_counts_as_one_clip_until_it_is_spoken(run: Any) -> None:
    ran = run("plan", "s2v-14B", "--tts-text", "hello", "--tts-command", SPEAK["tts_command"], "--json")
    assert ran.code in (0, 5), ran.err
    assert '"frames": 77' in ran.out
