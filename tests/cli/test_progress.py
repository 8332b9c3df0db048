"""What is shown while a video is made."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from wanloom.cli import progress


class Clock:
    """A clock that tests move."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def test_lines_say_first_and_last_and_one_every_few_seconds(capsys, clock):
    view = progress.Lines()
    view.stage("denoise", total=20)
    for done in range(1, 21):
        clock.now += 1.0
        view.step(done, peak=400_000_000)
    view.close()
    assert capsys.readouterr().out.splitlines() == [
        "denoise 1/20  1 s a step, 19 s left, peak 400 MB",
        "denoise 6/20  1 s a step, 14 s left, peak 400 MB",
        "denoise 11/20  1 s a step, 9.0 s left, peak 400 MB",
        "denoise 16/20  1 s a step, 4.0 s left, peak 400 MB",
        "denoise 20/20  1 s a step, 0.0 s left, peak 400 MB",
        "denoise done in 20 s",
    ]


def test_without_a_terminal_lines_are_chosen(monkeypatch, capsys):
    monkeypatch.setattr(progress, "is_terminal", lambda stream: False)
    with progress.open_view() as view:
        assert isinstance(view, progress.Lines)


@pytest.fixture
def screen(monkeypatch):
    """Rich draws on this instead of stdout, as on a terminal of 100 columns."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, color_system=None, legacy_windows=False)
    monkeypatch.setattr("wanloom.cli.console.rich_console", lambda: console)
    monkeypatch.setattr(progress, "is_terminal", lambda stream: True)
    return file


def test_bars_show_steps_pace_and_how_long_each_stage_took(screen, clock):
    with progress.open_view() as view:
        view.stage("encode")
        clock.now += 2.0
        view.stage("denoise", total=4)
        clock.now += 1.5
        view.step(1, peak=2_000_000_000)
        clock.now += 1.5
        view.step(2)
        view._progress.refresh()
        view.stage("decode")
    last = screen.getvalue()
    assert "1.5 s a step, 3.0 s left" in last
    assert "4/4" in last
    assert "2.0 s" in last


def test_a_stage_cut_short_is_not_shown_as_done(screen, clock):
    with pytest.raises(KeyboardInterrupt), progress.open_view() as view:
        view.stage("denoise", total=4)
        view.step(1)
        raise KeyboardInterrupt
    assert "4/4" not in screen.getvalue()


def test_a_preview_is_two_pixels_a_character():
    rgb = bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])  # 2x2: red green / blue grey
    picture = progress.half_blocks(2, 2, rgb)
    assert picture.plain == "▀▀\n"
    assert [span.style for span in picture.spans] == ["#ff0000 on #0000ff", "#00ff00 on #090909"]


def test_a_wide_preview_is_thinned_to_the_terminal():
    width, height = 160, 90
    picture = progress.half_blocks(width, height, bytes(3 * width * height))
    lines = picture.plain.splitlines()
    assert max(map(len, lines)) <= progress.PREVIEW_WIDTH
    assert len(lines) == pytest.approx(height / 3 / 2, abs=1)
