"""The job folder: what a run keeps on disk while it works, so that nothing done is lost.

`a.mp4` is made beside `a.job/`, which holds

    plan.json                 the Plan, the seeds, the request, and what the bits depend on (see `Record`)
    conditioning.safetensors  what the encoders made of prompt and pictures
    state-0012.safetensors    latents and solver state after 12 steps; the last two are kept
    latents.safetensors       the final latents, on disk before decoding begins
    lowered.safetensors       where a run came down to when memory ran out (see `ladder.py`)
    given-0003.safetensors    what clip 3 is given (s2v: what it hears), clips counted from 0
    00.0003.state-0012...     state and latents of video 0, clip 3, where videos are made clip by clip; when the next
                              clip begins the states are dropped
    published.json            SHA-256 of each finished video, written just before it gets its name
    lock                      held while a process works here

and vanishes when the last video has its name.  Every file carries a SHA-256 of its tensors; a damaged state is said to
be so and the one before it is used.  Continued on an equal machine a run gives the same bits; elsewhere it starts over.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import threading
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from wanloom.durable import discard, failpoint, sha256_file, sweep, sync_directory, write_atomic
from wanloom.errors import InputError, Interrupted, NumericalError, WanloomWarning
from wanloom.plan import Plan, differences
from wanloom.request import OPTIONS, Request

if TYPE_CHECKING:
    from torch import Tensor

# Raised whenever the same Plan on the same machine gives other bits than before: runs of older code are not continued.
NUMERICS = 1

FORMAT = 1  # of plan.json
KEEP = 2  # states on disk
OURS = (  # file names
    r"(plan|published)\.json|lock|(\d+\.\d+\.)?(conditioning|latents|lowered|state-\d+)\.safetensors|given-\d+\.safetensors"
    r"|\..*\.part(\.\w+)?"
)
OF_A_CLIP = ("latents", "state-")
EVERY_SECONDS = 60.0
EVERY_SHARE = 0.05  # of the steps

PROCESSES = "processes"  # in a record's machine, where several computed together
COMPANY = "the job was begun by another number of processes: it goes on, with results that are equal but for rounding"

DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError)


# ---------------------------------------------------------------- what a job is


@dataclass(frozen=True)
class Record:
    """Everything a run must agree on with the one it continues.

    plan: of the first video; seeds: one for each; outputs: their file names; request: as option texts;
    precision: dtype of each part; weights: file -> identity; machine: what decides the bits beside all that.
    """

    plan: Plan
    seeds: tuple[int, ...]
    outputs: tuple[str, ...]
    request: Mapping[str, str | bool]
    precision: Mapping[str, str]
    weights: Mapping[str, str]
    machine: Mapping[str, str]

    def to_json(self) -> str:
        data = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "plan"}
        return json.dumps({"format": FORMAT, "plan": asdict(self.plan), **data}, ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Raises ValueError, LookupError or TypeError for anything else, InputError for a plan that is none."""
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}")
        maps = {name: _string_map(data[name]) for name in ("request", "precision", "weights", "machine")}
        seeds = tuple(int(seed) for seed in data["seeds"])
        outputs = tuple(Path(str(name)).name for name in data["outputs"])
        return cls(Plan.from_json(json.dumps(data["plan"])), seeds, outputs, **maps)

    def differs_from(self, other: Record) -> list[str]:
        """Fields of the request and the weights in which two records differ; the machine is not among them."""
        names = list(differences(self.plan, other.plan))
        names += [name for name in ("seeds", "outputs") if getattr(self, name) != getattr(other, name)]
        for what in ("precision", "weights"):
            mine, theirs = getattr(self, what), getattr(other, what)
            names += [f"{what} of {key}" for key in sorted({*mine, *theirs}) if mine.get(key) != theirs.get(key)]
        return names


def _string_map(data: Any) -> dict[str, Any]:
    return {str(key): value if isinstance(value, bool) else str(value) for key, value in data.items()}


def request_texts(request: Request) -> dict[str, str | bool]:
    """A request as the texts its options take; what is in memory only (a picture) cannot be written and is left out."""
    texts: dict[str, str | bool] = {}
    for option in OPTIONS:
        value = getattr(request, option.name)
        if value is None or value == option.default:
            continue
        if option.name == "size" and not isinstance(value, str):
            texts[option.name] = f"{value[0]}x{value[1]}"
        elif isinstance(value, tuple):
            texts[option.name] = ",".join(repr(item) for item in value)
        elif isinstance(value, Path) or option.metavar in ("FILE", "DIR", "PATH"):
            if isinstance(value, str | os.PathLike):
                texts[option.name] = str(Path(value).absolute())
        else:
            texts[option.name] = value if isinstance(value, bool) else str(value)
    return texts


def stored_request(folder: str | Path) -> dict[str, str | bool]:
    """The request of an unfinished job as option texts, its seed decided, for `request_from_text`.  Error: E2020."""
    record = read_record(Path(folder))
    return {**record.request, "seed": str(record.seeds[0])}


def read_record(folder: Path) -> Record:
    """What `folder` is a job of.  Error: E2020 when it is none."""
    try:
        return Record.from_json((folder / "plan.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            "E2020", f"resume: {folder} holds no unfinished job. Run the command again without it."
        ) from None
    except (*DAMAGED, InputError) as error:
        raise InputError("E2020", f"resume: {folder}/plan.json is damaged ({str(error)[:80]}).") from None


def folder_for(out: Path) -> Path:
    """The job folder of an output file."""
    return out.with_name(f"{out.stem}.job")


def place_words(plan: Plan, video: int, clip: int, *, videos: int) -> str:
    """'video 1 of 2, clip 3 of 5, ' for numbers from 0; nothing of what there is only one of."""
    clips = len(plan.segments)
    return (f"video {video + 1} of {videos}, " if videos > 1 else "") + (
        f"clip {clip + 1} of {clips}, " if clips > 1 else ""
    )


def resume_command(folder: Path) -> str:
    """What a person types to continue."""
    return f"wanloom generate --resume {shlex.quote(str(folder))}"


# ---------------------------------------------------------------- the folder


@dataclass(frozen=True)
class State:
    """What is needed to go on after `done` steps: one dict of tensors per video."""

    done: int
    takes: tuple[dict[str, Tensor], ...]


class Job:
    """A locked job folder, from `open_job`.

    Use it as `with job:`.  When the block is left by an error, the last step that was reached is saved first, and
    Ctrl-C (or SIGTERM) becomes `Interrupted` with the command to go on; a folder without a finished step is removed.
    A second Ctrl-C does not wait for the saving (KeyboardInterrupt, exit 130).
    """

    def __init__(self, folder: Path, record: Record, lock: int, save_every: int | None) -> None:
        self.folder, self.record = folder, record
        self._lock, self._save_every = lock, save_every
        self._saved_at, self._saved_step = time.monotonic(), 0
        self._reached: State | None = None
        self._terminate: Any = None  # what SIGTERM did before
        self._damaged: set[Path] = set()  # files that could not be read; they are as good as not there
        self.clip: tuple[int, int] | None = None  # (video, clip) that is being made, where there are clips

    def __enter__(self) -> Job:
        if threading.current_thread() is threading.main_thread():
            self._terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, KeyboardInterrupt):
                self._save_reached()
                raise Interrupted("E7001", self._farewell()) from None
            if error is not None:
                self._leave(error)
        finally:
            if self._terminate is not None:
                signal.signal(signal.SIGTERM, self._terminate)
            self.close()

    keeps = True  # what is saved here need not stay in memory

    def enter(self, video: int, clip: int) -> None:
        """From now on states and latents are those of this clip of this video, counted from 0.

        Of the clip before the latents stay, which the rest is made from; its states have served.
        """
        if self.clip is not None and self.has("latents"):
            for old in self._states():
                old.unlink()
        self.clip, self._reached, self._saved_step = (video, clip), None, 0

    def close(self) -> None:
        """Unlock the folder."""
        os.close(self._lock)

    def _leave(self, error: BaseException) -> None:
        """After an error: keep what was reached, unless it led to the error or there is nothing."""
        if isinstance(error, NumericalError) and self._reached is not None and not self._any_latents():
            self.finish()  # the same request on the same machine would fail again
            return
        with suppress(OSError, InputError):  # a full disk, perhaps: the error to hear about is the first one
            self._save_reached()
        if not self.any_progress():
            self.finish()

    def _farewell(self) -> str:
        plan = self.record.plan
        done = self._reached.done if self._reached else self._saved_step
        where = f"after step {done} of {plan.steps}" if done else "before the first step"
        if self.has("latents"):
            where = "after denoising"
        if self.clip is not None:
            words = place_words(plan, *self.clip, videos=len(self.record.seeds))
            where = f"in {words}{where}" if words else where
        elif plan.in_clips:
            where = "before the first clip"
        return f"stopped {where}; nothing is lost. Continue: {resume_command(self.folder)}"

    def any_progress(self) -> bool:
        """Whether steps of an unfinished run are on disk here."""
        states = any(self.folder.glob("*state-*.safetensors"))
        return (self.folder / "plan.json").is_file() and (states or self._any_latents())

    def _any_latents(self) -> bool:
        return any(self.folder.glob("*latents.safetensors"))

    def has(self, name: str) -> bool:
        """Whether `save` wrote this, and it was not found damaged."""
        path = self._path(name)
        return path.is_file() and path not in self._damaged

    def _path(self, name: str) -> Path:
        """Where `name` is kept: latents and states are the clip's, all else is the same for all videos and clips."""
        prefix = "" if self.clip is None or not name.startswith(OF_A_CLIP) else "{:02d}.{:04d}.".format(*self.clip)
        return self.folder / f"{prefix}{name}.safetensors"

    # --- tensors

    def reached(self, state: State) -> None:
        """A step is done.

        Its state is saved when a minute and 5 % of the steps have passed since the last saving (or by `save_every`);
        after the last step the latents are.
        """
        self._reached = state
        new, steps = state.done - self._saved_step, self.record.plan.steps
        if self._save_every is not None:
            due = new >= self._save_every
        else:
            due = new >= EVERY_SHARE * steps and time.monotonic() - self._saved_at >= EVERY_SECONDS
        if due or state.done == steps:
            self._save_reached()

    def rescue(self) -> None:
        """Save the last step that was reached; from another thread, when the one that works here waits for ever."""
        with suppress(OSError, InputError):
            self._save_reached()

    def _save_reached(self) -> None:
        """Save the last step that was reached, when it is not on disk already."""
        state = self._reached
        if state is None or state.done <= self._saved_step or self.has("latents"):
            return
        if state.done < self.record.plan.steps:
            self.save_state(state)
        else:
            self.save("latents", {str(i): take["x"][0] for i, take in enumerate(state.takes)})

    def save_state(self, state: State) -> None:
        """Write the state after `state.done` steps, durably, and drop all but the last two."""
        tensors = {f"{i}.{name}": value for i, take in enumerate(state.takes) for name, value in take.items()}
        save_tensors(self._path(f"state-{state.done:04d}"), tensors, {"done": state.done})
        self._saved_at, self._saved_step = time.monotonic(), state.done
        for old in self._states()[:-KEEP]:
            old.unlink()
        failpoint("state")

    def load_state(self, takes: int | None = None) -> State | None:
        """The newest state that is whole; a damaged one is named in a warning (W7001) and skipped.

        takes: of how many videos it is, when not of all in the job.
        """
        for path in reversed(self._states()):
            loaded = self._load(path)
            if loaded is not None:
                tensors, note = loaded
                done = int(note["done"])
                self._saved_at, self._saved_step = time.monotonic(), done
                return State(done, tuple(_part(tensors, str(i)) for i in range(takes or len(self.record.seeds))))
        return None

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write `name`.safetensors ("conditioning", "given-0003"; "latents" by `reached`), durably."""
        path = self._path(name)
        save_tensors(path, tensors, {})
        self._damaged.discard(path)
        failpoint(name.partition("-")[0])

    def load(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of `save`, or None when they are not there or damaged (then with a warning)."""
        path = self._path(name)
        loaded = self._load(path) if path.is_file() else None
        return None if loaded is None else loaded[0]

    def _load(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        try:
            return load_tensors(path)
        except DAMAGED as error:
            warnings.warn(
                WanloomWarning(f"W7001: {path.name} is damaged ({str(error)[:80]}); using what came before it."),
                stacklevel=3,
            )
            self._damaged.add(path)
            return None

    def _states(self) -> list[Path]:
        return sorted(self.folder.glob(self._path("state-*").name))

    # --- the end

    def announce(self, name: str, digest: str) -> None:
        """Note that the file `name` with this SHA-256 is about to get its name."""
        table = {**self._announced(), name: digest}
        write_atomic(self.folder / "published.json", json.dumps(table).encode())

    def published(self, path: Path) -> bool:
        """Whether `path` is there and is what this job announced."""
        digest = self._announced().get(path.name)
        return digest is not None and path.is_file() and sha256_file(path) == digest

    def _announced(self) -> dict[str, str]:
        try:
            return _string_map(json.loads((self.folder / "published.json").read_text()))
        except FileNotFoundError:
            return {}
        except DAMAGED:
            return {}

    def forget(self) -> None:
        """Drop all progress; the job starts over."""
        for path in (*self.folder.glob("*.safetensors"), self.folder / "published.json"):
            path.unlink(missing_ok=True)
        self._saved_at, self._saved_step = time.monotonic(), 0

    def finish(self) -> None:
        """Remove the folder, all at once; a stranger's file in it is left where it is."""
        failpoint("finish")
        strangers = [path for path in self.folder.iterdir() if not re.fullmatch(OURS, path.name)]
        if not strangers:
            discard(self.folder)
            return
        (self.folder / "plan.json").unlink(missing_ok=True)
        self.forget()


class Memory:
    """A job that keeps nothing: the same calls for a run whose videos stay in memory."""

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    keeps = False

    def enter(self, video: int, clip: int) -> None:
        return None

    def has(self, name: str) -> bool:
        return False

    def rescue(self) -> None:
        return None

    def reached(self, state: State) -> None:
        return None

    def load_state(self, takes: int | None = None) -> State | None:
        return None

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        return None

    def load(self, name: str) -> dict[str, Tensor] | None:
        return None

    def announce(self, name: str, digest: str) -> None:
        return None

    def published(self, path: Path) -> bool:
        return False

    def finish(self) -> None:
        return None


def open_job(
    folder: Path, record: Record, *, resume: bool, overwrite: bool = False, save_every: int | None = None
) -> tuple[Job, str]:
    """Lock the folder of a job and make it ready; the job, and a sentence when it starts over ("" otherwise).

    resume=False makes a folder; an unfinished job there is refused unless overwrite=True.  resume=True continues it.
    Errors: E2020 another request, other weights, or no job at all; E2021 another process works there; E5001 and E5003
    the place; E5002 an unfinished job is in the way.
    """
    failpoint("folder")
    if not resume:
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError("E5001", f"{folder}: cannot be made ({error.strerror}).") from error
    job = Job(folder, record, _lock(folder), save_every)
    try:
        sweep(folder)
        if not resume:
            _begin(job, overwrite)
            return job, ""
        stored = read_record(folder)
        fields_ = record.differs_from(stored)
        if fields_:
            names = ", ".join(fields_[:10])
            raise InputError("E2020", f"resume: {folder} is another run; these differ: {names}. Nothing was changed.")
        if record.machine == stored.machine:
            return job, ""
        if _in_company(record.machine, stored.machine):
            _write_record(job)
            return job, COMPANY
        notice = _machine_notice(record.machine, stored.machine)
        job.forget()
        _write_record(job)
        return job, notice
    except BaseException:
        job.close()
        raise


def _begin(job: Job, overwrite: bool) -> None:
    if job.any_progress() and not overwrite:
        raise InputError(
            "E5002",
            f"{job.folder}: an unfinished job is there. Continue: {resume_command(job.folder)}. Or give --overwrite.",
        )
    job.forget()
    _write_record(job)
    sync_directory(job.folder.parent)
    failpoint("plan")


def _write_record(job: Job) -> None:
    write_atomic(job.folder / "plan.json", job.record.to_json().encode())


def _machine_notice(mine: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    changed = [f"{key} {theirs.get(key)} -> {mine.get(key)}" for key in mine if mine.get(key) != theirs.get(key)]
    return f"the job was begun elsewhere ({', '.join(changed)[:200]}): it starts over, so that nothing is mixed."


def _in_company(mine: Mapping[str, str], theirs: Mapping[str, str]) -> bool:
    """Whether two machines differ only in how many processes compute together, and with how many threads each."""
    if PROCESSES not in mine and PROCESSES not in theirs:
        return False
    but = {PROCESSES, "threads"}
    return {name: mine.get(name) for name in {*mine, *theirs} - but} == {
        name: theirs.get(name) for name in {*mine, *theirs} - but
    }


def _lock(folder: Path) -> int:
    """Hold `folder`/lock; the handle.  The system lets go of it when this process ends, however it ends."""
    path = folder / "lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        raise InputError("E2020", f"resume: {folder} does not exist; there is nothing to continue.") from None
    except OSError as error:
        raise InputError("E5001", f"{folder}: cannot be written ({error.strerror}).") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise InputError("E2021", f"resume: {folder} is in use by process {holder}.") from None
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    return handle


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under `prefix.`, without it."""
    return {name.partition(".")[2]: value for name, value in tensors.items() if name.partition(".")[0] == prefix}


# ---------------------------------------------------------------- tensors on disk


def save_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
    """A safetensors file that can prove it is whole: its header holds `note` and a SHA-256 of everything."""
    from safetensors.torch import save

    host: dict[str, Tensor] = {}
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        known = {other.untyped_storage().data_ptr() for other in host.values()}
        host[name] = (
            value.clone() if value.untyped_storage().data_ptr() in known else value
        )  # the format shares nothing
    text = json.dumps(dict(note), sort_keys=True)
    write_atomic(path, save(host, metadata={"note": text, "sha256": _digest(host, text)}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote.  Raises an error of `DAMAGED` for anything else."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    if _digest(tensors, metadata["note"]) != metadata["sha256"]:
        raise ValueError("its SHA-256 does not match")
    note: dict[str, Any] = json.loads(metadata["note"])
    return tensors, note


def _digest(tensors: Mapping[str, Tensor], note: str) -> str:
    import torch

    total = hashlib.sha256(note.encode())
    for name in sorted(tensors):
        value = tensors[name]
        total.update(f"|{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


# ---------------------------------------------------------------- what the bits depend on

SAMPLES, SAMPLE = 64, 1 << 16


def identity(path: Path) -> str:
    """A fingerprint of a weight file that reads at most 4 MiB of it: its size and 64 pieces spread over it.

    Two different checkpoints, or two trainings of one, never share it in practice; a single flipped bit may go unseen
    (that is what `convert`'s SHA-256 manifest is for).  The name, place and time of the file do not matter.
    """
    size = path.stat().st_size
    total = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(SAMPLES):
            if size > SAMPLES * SAMPLE:
                file.seek((size - SAMPLE) * i // (SAMPLES - 1))
            total.update(file.read(SAMPLE))
    return total.hexdigest()[:32]


def machine_fingerprint(device: str, noise_device: str) -> dict[str, str]:
    """What decides the bits of a run beside request and weights, as plain words."""
    from importlib.metadata import version

    import torch

    facts = {
        "numerics": str(NUMERICS),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "device": _device_name(device),
        "threads": str(torch.get_num_threads()),
        "cpu features": torch.backends.cpu.get_cpu_capability(),
        "onednn": str(torch.backends.mkldnn.is_available()),  # type: ignore[no-untyped-call]  # torch has no types here
        "noise device": noise_device.partition(":")[0],
    }
    if device != "cpu":
        facts["cuda"] = f"{torch.version.cuda} cudnn {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]
    return facts


def _device_name(device: str) -> str:
    import torch

    if device == "cpu":
        from wanloom.runtime.machine import cpu

        return cpu().name
    return torch.cuda.get_device_name(device)
