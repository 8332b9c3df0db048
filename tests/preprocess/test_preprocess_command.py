"""`wanloom preprocess animate` by the command line."""

from __future__ import annotations

import pytest
import walker

from command_line import run_here, run_process


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *words: run_here(capsys, *words)


@pytest.fixture
def given(tmp_path):
    walker.scene(tmp_path, frames=4, size=(96, 64), picture_size=(64, 96))
    return ("--video", "video.mp4", "--image", "image.png", "--out", "made", "--size", "128x128")


def test_the_folder_is_made_and_named(run, given, tmp_path):
    ran = run("preprocess", "animate", *given, "--keypoints", "video.json")
    assert ran.code == 0, ran.err
    assert "Wrote made: src_pose.mp4, src_face.mp4, src_ref.png, sheet.png" in ran.out
    assert "4 frames of 112x144 at 30 a second" in ran.out
    assert (tmp_path / "made" / "sheet.png").is_file()


def test_every_option_is_taken(run, given, tmp_path):
    replaced = ("--replace", "--mask-video", "mask.mp4", "--mask-dilation", 2, "--mask-cells", "2,3", "--fps", -1)
    assert run("preprocess", "animate", *given, "--keypoints", "video.json", *replaced).code == 0
    again = run(
        "preprocess", "animate", *given, "--keypoints", "video.json", *replaced, "--overwrite", "--mask-cells", 0
    )
    assert again.code == 2  # given twice
    retargeted = ("--retarget", "--image-keypoints", "image.json", "--overwrite", "--fps", "12.5")
    ran = run("preprocess", "animate", *given, "--keypoints", "video.json", *retargeted)
    assert ran.code == 0, ran.err
    assert "at 12.5 a second" in ran.out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "error[E4001]: the person detector is missing. It is process_checkpoint/det/yolov10m.onnx (62 MB)"),
        (("--keypoints", "no.json"), "error[E3001]: keypoints: no.json: no such file."),
        (("--keypoints", "video.json", "--fps", "fast"), "error[E2032]: fps: got 'fast'"),
        (("--keypoints", "video.json", "--fps", "nan"), "error[E2032]: fps: got 'nan'"),
        (("--keypoints", "video.json", "--fps", "-2"), "error[E2032]: fps: got -2"),
        (("--keypoints", "video.json", "--mask-dilation", "-1"), "error[E2022]: mask-dilation: got '-1'"),
        (("--keypoints", "video.json", "--mask-cells", "3"), "error[E2022]: mask-cells: got '3', expected W,H"),
        (("--keypoints", "video.json", "--mask-cells", "0,3"), "error[E2022]: mask-cells: got '0,3'"),
        (("--keypoints", "video.json", "--replace"), "error[E4001]: the mask network SAM2 is missing."),
        (("--keypoint", "video.json"), "error[E2022]: --keypoint is not an option"),
    ],
)
def test_what_is_wrong_is_one_line(run, given, tmp_path, words, line):
    ran = run("preprocess", "animate", *given, *words)
    assert ran.err.startswith(line), ran.err
    assert ran.code == int(line[7])
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "made").exists()


def test_a_size_that_is_none(run, given):
    ran = run("preprocess", "animate", *given[:-1], "large", "--keypoints", "video.json")
    assert ran.err.startswith("error[E2003]: ")


def test_help_says_what_there_is_and_loads_nothing(run, tmp_path):
    assert "animate" in run("preprocess").out
    assert "animate" in run("preprocess", "--help").out
    assert "--reference-channels" in run("preprocess", "animate", "--help").out
    assert run("preprocess", "dance").code == 2
    program = ("-c", "import sys; from wanloom.cli import main; main(['preprocess', 'animate', '--help']);"
               "print(sorted({'torch', 'numpy', 'av', 'PIL', 'onnxruntime'} & sys.modules.keys()))")  # fmt: skip
    assert run_process(tmp_path, program=program).out.splitlines()[-1] == "[]"
