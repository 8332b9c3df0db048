"""Text to speech by a program and by a server: what is asked, what comes back, and what is said when it does not."""

from __future__ import annotations

import io
import json
import shlex
import sys
import threading
import time
import wave as wavefile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from wanloom.errors import InputError
from wanloom.media import tts
from wanloom.media.sound import read_sound
from wanloom.media.tts import Speaker, speak


def wav(seconds: float = 0.5) -> bytes:
    file = io.BytesIO()
    with wavefile.open(file, "wb") as made:
        made.setnchannels(1)
        made.setsampwidth(2)
        made.setframerate(16000)
        made.writeframes(bytes(2 * round(16000 * seconds)))
    return file.getvalue()


def refused(call: Callable[[], Any], code: str, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.code == code, caught.value
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- a program


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], str]:
    """`program("...")`: the start of a command that runs this Python text with the words that follow it."""
    (tmp_path / "sound.wav").write_bytes(wav())

    def write(text: str) -> str:
        script = tmp_path / "speaks.py"
        script.write_text(f"import shutil, sys, os, time\nSOUND = {str(tmp_path / 'sound.wav')!r}\n{text}\n")
        return f"{shlex.quote(sys.executable)} {shlex.quote(str(script))}"

    return write


def test_what_a_program_writes_is_kept(program: Any, tmp_path: Path) -> None:
    command = f"{program('shutil.copy(SOUND, sys.argv[1])')} {{out}} {{text}}"
    out = speak("hello", tmp_path / "out.wav", command=command)
    assert out == tmp_path / "out.wav" and out.read_bytes() == wav()


def test_the_text_is_one_word_whatever_is_in_it(program: Any, tmp_path: Path) -> None:
    said = tmp_path / "said"
    command = program(f"shutil.copy(SOUND, sys.argv[1][5:]); open({str(said)!r}, 'w').write(ascii(sys.argv[2:]))")
    hostile = 'it\'s "quoted"; $(touch canary) {out} {text} `id` | & > x\n猫'
    speak(hostile, tmp_path / "out.wav", command=f"{command} file:{{out}} 'a {{text}}' b")
    assert eval(said.read_text()) == [f"a {hostile}", "b"]
    speak("--help", tmp_path / "out.wav", command=f"{command} file:{{out}} {{text}}")
    assert eval(said.read_text()) == [" --help"]  # no option
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.wav", "said", "sound.wav", "speaks.py"]


@pytest.mark.parametrize(("command", "words"), [
    ("", ("no {text} and no {out}",)), ("say {text}", ("no {out}",)), ("say {out}", ("no {text}",)),
    ("{text} {out}x y", ("no {text}",)), ("say '{text} {out}", ("cannot be split", "quotes")),
])  # fmt: skip
def test_templates_that_cannot_be(command: str, words: tuple[str, ...]) -> None:
    refused(lambda: Speaker(command=command), "E2025", *words)


def test_who_speaks_is_one_or_the_other() -> None:
    refused(lambda: Speaker(command="say {text} {out}", url="http://localhost"), "E2023")
    refused(lambda: Speaker(), "E2025")


@pytest.mark.parametrize(("text", "words"), [
    ("sys.stderr.write('one\\n\\x1b[31mno voice\\x07 here\\n\\n'); sys.exit(3)", ("exit code 3", "no voice", " here")),
    ("pass", ("it wrote no file",)),
    ("open(sys.argv[1], 'w').close()", ("it wrote no file",)),
    ("open(sys.argv[1], 'w').write('hello')", ("no sound", "out.wav: unsupported format")),
    ("open(sys.argv[1], 'wb').truncate(3000)", ("it wrote more than",)),
    ("os.kill(os.getpid(), 9)", ("exit code -9",)),
])  # fmt: skip
def test_programs_that_fail(
    text: str, words: tuple[str, ...], program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tts, "MAX_ANSWER", 2000)
    command = f"{program(text)} {{out}} {{text}}"
    refused(lambda: speak("x", tmp_path / "out.wav", command=command), "E8006", "tts: ", *words)
    assert not (tmp_path / "out.wav").exists()


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    command = "no-such-program-here {text} {out}"
    refused(lambda: speak("x", tmp_path / "a.wav", command=command), "E8006", "no-such-program-here", "No such file")
    refused(lambda: speak("a\0b", tmp_path / "a.wav", command=command), "E8006", "cannot be started")


def test_a_program_that_never_ends_is_ended_with_what_it_started(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child"
    command = program(
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(child)!r}, 'w').write(str(child.pid))\ntime.sleep(60)"
    )
    monkeypatch.setattr(tts, "SECONDS", 1)
    started = time.monotonic()
    refused(lambda: speak("x", tmp_path / "a.wav", command=f"{command} {{text}} {{out}}"), "E8006", "longer than 1 s")
    assert time.monotonic() - started < 10
    for _ in range(100):
        if not _runs(int(child.read_text())):
            return
        time.sleep(0.05)
    pytest.fail("the child still runs")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---------------------------------------------------------------- a server


class Stub(BaseHTTPRequestHandler):
    """Answers every request alike and remembers it."""

    status, body, headers_out, seconds = 200, wav(), (), 0.0
    seen: list[tuple[str, dict[str, str], Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((self.path, dict(self.headers), json.loads(body)))
        time.sleep(self.seconds)
        self.send_response(self.status)
        for name, value in self.headers_out:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.body)

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def server(**answers: Any) -> Iterator[tuple[str, list[Any]]]:
    """(address, requests seen) of a server on the loopback that ends with the block."""
    kind = type("Answers", (Stub,), {**answers, "seen": []})
    made = HTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_port}", kind.seen
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv(tts.KEY, raising=False)


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/audio/speech", "/own/path?x=1"])
def test_a_server_is_asked_as_openais_is(path: str, tmp_path: Path) -> None:
    with server() as (url, seen):
        out = speak("Hello 猫", tmp_path / "out.wav", url=url + path, voice="nova", model="kokoro")
        assert (seen[0][0], len(seen)) == (path if "own" in path else "/v1/audio/speech", 1)
        assert seen[0][2] == {"model": "kokoro", "input": "Hello 猫", "voice": "nova", "response_format": "wav"}
        assert seen[0][1]["Content-Type"] == "application/json"
        assert "Authorization" not in seen[0][1]
        Speaker(url=url).speak("x", out)
        assert (seen[1][2]["model"], seen[1][2]["voice"]) == ("tts-1", "alloy")
    assert read_sound(out).seconds == 0.5


def test_the_key_is_sent_and_never_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tts.KEY, "secret-key\n")
    with server(status=401, body=b'{"error":\n"wrong key"}') as (url, seen):
        with pytest.raises(InputError) as caught:
            speak("x", tmp_path / "out.wav", url=url)
        assert seen[0][1]["Authorization"] == "Bearer secret-key"
    assert caught.value.code == "E8006" and "401" in str(caught.value) and "wrong key" in str(caught.value)
    assert "secret" not in str(caught.value)
    monkeypatch.setenv(tts.KEY, "secret\nkey")
    with pytest.raises(InputError) as caught:
        speak("x", tmp_path / "out.wav", url="http://127.0.0.1:9")
    assert caught.value.code == "E8006" and "secret" not in str(caught.value)


def test_redirects_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tts.KEY, "secret-key")
    with server() as (other, seen):
        for status in (301, 302, 303, 307, 308):
            with server(status=status, headers_out=(("Location", f"{other}/v1/audio/speech"),)) as (url, _):
                refused(lambda url=url: speak("x", tmp_path / "out.wav", url=url), "E8006", str(status))
        assert seen == []


@pytest.mark.parametrize(("answers", "words"), [
    ({"body": b"<html>"}, ("no sound",)), ({"body": b""}, ("no sound", "empty")), ({"status": 500}, ("500",)),
    ({"body": wav(4.0)}, ("more than 0 MB",)), ({"body": b"x", "headers_out": (("Content-Length", "9"),)}, ()),
])  # fmt: skip
def test_servers_that_fail(
    answers: dict[str, Any], words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tts, "MAX_ANSWER", 100_000)
    with server(**answers) as (url, _):
        refused(lambda: speak("x", tmp_path / "out.wav", url=url), "E8006", "tts: ", *words)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_slow_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tts, "SECONDS", 0.2)
    with server(seconds=0.6) as (url, _):
        refused(lambda: speak("x", tmp_path / "out.wav", url=url), "E8006", "timed out")
    refused(lambda: speak("x", tmp_path / "out.wav", url=url), "E8006", "Connection refused", "Is the server running")


@pytest.mark.parametrize("url", [
    "", "localhost:8880", "file:///etc/passwd", "ftp://host/x", "http://", "http://host:port", "http://host:99999",
    "http://name:password@host", "http://host/a b", "http://host/\r\nX: y", "http://[::1",
])  # fmt: skip
def test_addresses_that_cannot_be(url: str) -> None:
    refused(lambda: Speaker(url=url), "E2025", "tts-url")
    with pytest.raises(InputError) as caught:
        Speaker(url=url)
    assert "password" not in str(caught.value)


def test_nothing_is_written_where_nothing_can_be(tmp_path: Path) -> None:
    with server() as (url, _):
        refused(lambda: speak("x", tmp_path / "none" / "out.wav", url=url), "E5001")
    assert list(tmp_path.iterdir()) == []
