"""Text to speech, by a program or a server of the person's own choice; no model for it is part of this package.

--tts-command "espeak-ng -w {out} {text}"      any program that writes a sound file
--tts-url http://localhost:8880                any server with OpenAI's /v1/audio/speech

No shell is involved: the command is split before the text is put in, so the text is one argument whatever is in it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from wanloom.durable import atomic_path
from wanloom.errors import InputError
from wanloom.media.sound import read_sound

KEY = "WANLOOM_TTS_KEY"  # environment variable with the server's key; an option would stand in the list of processes
SECONDS = 120
MAX_ANSWER = 200 * 10**6  # bytes
MODEL, VOICE = "tts-1", "alloy"  # OpenAI's, which servers like it know too
PLACES = re.compile(r"\{(text|out)\}")


@dataclass(frozen=True)
class Speaker:
    """Who speaks: a command with {text} and {out}, or a server's address with a voice and a model.

    Errors, before any work: E2023 for both at once, E2025 for a template or an address that cannot be.
    """

    command: str | None = None
    url: str | None = None
    voice: str | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        if self.command is not None and self.url is not None:
            raise InputError("E2023", "tts-command and tts-url contradict each other. Leave one out.")
        if self.url is not None:
            _address(self.url)
        else:
            _split(self.command or "")

    def speak(self, text: str, out: str | Path) -> Path:
        """Write `text` as a sound file `out`, which appears complete or not at all; the path.

        Errors: E8006 when the command or the server fails, takes longer than 120 s or gives no sound; E5001 to E5003
        for the place.
        """
        out = Path(out)
        data = _run(_split(self.command), text, out.suffix) if self.command is not None else self._ask(text)
        with atomic_path(out) as temporary:
            temporary.write_bytes(data)
            try:
                read_sound(temporary, "speech")
            except InputError as error:
                reason = error.message.replace(temporary.name, out.name)
                raise InputError("E8006", f"tts: what came is no sound ({reason})") from None
        return out

    def _ask(self, text: str) -> bytes:
        asked = {"model": self.model or MODEL, "input": text, "voice": self.voice or VOICE, "response_format": "wav"}
        return _post(_address(self.url or ""), json.dumps(asked).encode())


def speak(
    text: str,
    out: str | Path,
    *,
    command: str | None = None,
    url: str | None = None,
    voice: str | None = None,
    model: str | None = None,
) -> Path:
    """Write `text` as a sound file `out`; see `Speaker` for who speaks, and for the errors."""
    return Speaker(command, url, voice, model).speak(text, out)


# ---------------------------------------------------------------- a program


def _split(command: str) -> list[str]:
    """The words of a command.  Error: E2025."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError("E2025", f"tts-command: cannot be split into words ({error}). Check its quotes.") from None
    missing = {"text", "out"} - {name for word in words[1:] for name in PLACES.findall(word)}
    if missing:
        places = " and no ".join(f"{{{name}}}" for name in sorted(missing, reverse=True))
        example = "espeak-ng -w {out} {text}"
        raise InputError("E2025", f'tts-command: has no {places} in it. Write for example --tts-command "{example}".')
    return words


def _run(words: list[str], text: str, suffix: str) -> bytes:
    """What the program wrote into a file of its own.  Error: E8006, with its last words."""
    text = f" {text}" if text.startswith("-") else text  # not an option
    with tempfile.TemporaryDirectory(prefix="wanloom-tts-") as folder:
        path, said = Path(folder) / f"speech{suffix}", Path(folder) / "stderr"
        values = {"text": text, "out": str(path)}
        argv = [PLACES.sub(lambda found: values[found[1]], word) for word in words]
        with said.open("wb") as stderr:
            failure = _wait(argv, stderr)
        if not failure and not (path.is_file() and path.stat().st_size):
            failure = "it wrote no file"
        elif not failure and path.stat().st_size > MAX_ANSWER:
            failure = f"it wrote more than {MAX_ANSWER // 10**6} MB"
        if failure:
            last = _last_line(said)
            raise InputError("E8006", f"tts: {words[0]}: {failure}{': ' + last if last else ''}. Run it by hand.")
        return path.read_bytes()


def _wait(argv: list[str], stderr: Any) -> str:
    """Run a program to its end, in a process group of its own; what went wrong, or ""."""
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
        )
    except (OSError, ValueError) as error:
        return f"cannot be started ({getattr(error, 'strerror', None) or error})"
    try:
        status = process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        return f"took longer than {SECONDS} s"
    finally:
        if process.poll() is None:  # also after Ctrl-C
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"failed with exit code {status}" if status else ""


def _last_line(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        return _one_line((file.read().decode(errors="replace").strip().splitlines() or [""])[-1])


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text).strip()[:200]


# ---------------------------------------------------------------- a server


def _address(url: str) -> str:
    """The address to ask, with OpenAI's path where none is given.  Error: E2025."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) and url.isprintable()
    except ValueError:
        good = False
    if not good or parts.username is not None or " " in url:
        raise InputError("E2025", "tts-url: not an address. Write for example --tts-url http://localhost:8880.")
    path = parts.path.rstrip("/")
    path = {"": "/v1/audio/speech", "/v1": "/v1/audio/speech"}.get(path, parts.path)
    return parts._replace(path=path, fragment="").geturl()


def _post(url: str, body: bytes) -> bytes:
    """The answer to a request of JSON.  Redirects are not followed: text and key go to the server that was named.

    Error: E8006.
    """
    from http.client import HTTPException
    from urllib import error as errors
    from urllib import request as requests

    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY, "").strip():
        if not (key.isascii() and key.isprintable()):
            raise InputError("E8006", f"tts: {KEY} holds characters that no key has.")
        headers["Authorization"] = f"Bearer {key}"
    opener = requests.OpenerDirector()
    for handler in ("Proxy", "HTTP", "HTTPS", "HTTPDefaultError"):
        opener.add_handler(getattr(requests, f"{handler}Handler")())
    opener.add_handler(requests.HTTPErrorProcessor())
    until = time.monotonic() + SECONDS
    try:
        with opener.open(requests.Request(url, body, headers), timeout=SECONDS) as answer:
            return _answer(answer, until)
    except errors.HTTPError as error:
        with error:
            said = _one_line(error.read(1000).decode(errors="replace"))
        raise _refused(url, f"{error.code} {error.reason}{': ' + said if said else ''}") from None
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise _refused(url, _one_line(str(reason)) or type(error).__name__) from None


def _answer(answer: Any, until: float) -> bytes:
    """The body, as long as it comes in time and is not too long."""
    data = bytearray()
    while piece := answer.read1(2**16):
        data += piece
        if len(data) > MAX_ANSWER:
            raise OSError(f"more than {MAX_ANSWER // 10**6} MB")
        if time.monotonic() > until:
            raise TimeoutError(f"took longer than {SECONDS} s")
    return bytes(data)


def _refused(url: str, why: str) -> InputError:
    return InputError("E8006", f"tts: {urlsplit(url).netloc}: {why}. Is the server running, and is {KEY} its key?")
