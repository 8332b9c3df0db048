"""Files appear complete or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from wanloom import durable
from wanloom.durable import alive, atomic_path, refuse_target, sha256_file, sweep, write_atomic
from wanloom.errors import InputError


def code_of(error: pytest.ExceptionInfo[InputError]) -> str:
    return error.value.code


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_written_file_holds_the_bytes_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.json", b"{}")
    assert (tmp_path / "a.json").read_bytes() == b"{}"
    assert names_in(tmp_path) == ["a.json"]


def test_writing_again_replaces_the_whole_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"long content")
    write_atomic(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


def test_the_temporary_file_lies_beside_the_target_with_its_suffix_and_its_process(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "video.mp4") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".mp4"
        assert temporary.name.startswith(f".video.{os.getpid()}.")
        assert temporary.name.endswith(".part.mp4")
        assert temporary.exists()
        assert not (tmp_path / "video.mp4").exists()


def test_an_error_inside_leaves_neither_file_nor_temporary(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a") as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert names_in(tmp_path) == []


def test_an_error_inside_leaves_the_old_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"old")
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a") as temporary:
        temporary.write_bytes(b"half")
        raise ZeroDivisionError
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names_in(tmp_path) == ["a"]


def test_a_full_disk_while_writing_is_e5003_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error, atomic_path(tmp_path / "a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert code_of(error) == "E5003"
    assert error.value.exit_code == 5
    assert names_in(tmp_path) == []


def test_a_file_size_limit_really_reached_is_e5003_and_leaves_nothing(tmp_path: Path) -> None:
    program = (
        "import resource, signal, sys\n"
        "from wanloom.durable import write_atomic\n"
        "from wanloom.errors import InputError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    write_atomic(sys.argv[1], bytes(100_000))\n"
        "except InputError as error:\n    print(error.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a")], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "E5003"
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("failing", ["_sync", "sync_directory"])
def test_a_failed_sync_is_an_error_and_not_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    calls = []

    def fail(path: Path) -> None:
        calls.append(path)
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(durable, failing, fail)
    with pytest.raises(InputError) as error:
        write_atomic(tmp_path / "a", b"x")
    assert code_of(error) == "E5001"
    assert len(calls) == 1
    assert not [name for name in names_in(tmp_path) if ".part" in name]


def test_another_error_inside_comes_out_unchanged(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="encoder"), atomic_path(tmp_path / "a"):
        raise OSError(errno.EINVAL, "encoder said no")


def test_an_existing_file_is_refused_before_any_work(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"old")
    entered = False
    with pytest.raises(InputError) as error, atomic_path(tmp_path / "a", overwrite=False):
        entered = True
    assert code_of(error) == "E5002"
    assert not entered


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error, atomic_path(tmp_path / "a", overwrite=False) as temporary:
        temporary.write_bytes(b"mine")
        (tmp_path / "a").write_bytes(b"theirs")
    assert code_of(error) == "E5002"
    assert (tmp_path / "a").read_bytes() == b"theirs"
    assert names_in(tmp_path) == ["a"]


def test_of_many_writers_without_overwrite_exactly_one_wins(tmp_path: Path) -> None:
    wins: list[int] = []
    start = threading.Barrier(8)

    def write(number: int) -> None:
        start.wait()
        try:
            write_atomic(tmp_path / "a", bytes([number]) * 100, overwrite=False)
            wins.append(number)
        except InputError as error:
            assert error.code == "E5002"

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert (tmp_path / "a").read_bytes() == bytes(wins) * 100
    assert names_in(tmp_path) == ["a"]


def test_without_hard_links_the_name_is_claimed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no hard links on this file system")

    monkeypatch.setattr(os, "link", no_link)
    write_atomic(tmp_path / "a", b"x", overwrite=False)
    assert (tmp_path / "a").read_bytes() == b"x"
    with pytest.raises(InputError) as error, atomic_path(tmp_path / "b", overwrite=False):
        (tmp_path / "b").write_bytes(b"theirs")
    assert code_of(error) == "E5002"
    assert (tmp_path / "b").read_bytes() == b"theirs"


@pytest.mark.parametrize(
    ("name", "why"),
    [("missing/a.mp4", "does not exist"), ("directory", "is a directory"), ("n" * 300 + ".mp4", "cannot be written")],
)
def test_a_place_that_cannot_hold_a_file_is_e5001(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(InputError, match=why) as error:
        write_atomic(tmp_path / name, b"")
    assert code_of(error) == "E5001"


def test_a_device_is_no_place_for_a_file() -> None:
    with pytest.raises(InputError, match="regular file") as error:
        refuse_target(Path(os.devnull), overwrite=True)
    assert code_of(error) == "E5001"


def test_a_read_only_directory_is_e5001(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: int) -> int:  # what the system answers; tests run as root may write everywhere
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match="Permission denied") as error:
        write_atomic(tmp_path / "a", b"")
    assert code_of(error) == "E5001"


def test_a_long_name_of_several_bytes_a_letter_fits_in_the_temporary_name(tmp_path: Path) -> None:
    name = "猫" * 80 + ".mp4"  # 244 bytes
    write_atomic(tmp_path / name, b"x")
    assert names_in(tmp_path) == [name]


def test_the_file_gets_the_usual_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_sha256_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    data = os.urandom(3_000_001)
    (tmp_path / "a").write_bytes(data)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from wanloom.durable import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_bytes(b'half')\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    target = str(tmp_path / "video.mp4")
    with subprocess.Popen([sys.executable, "-c", program, target], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert sweep(tmp_path) == []
        child.send_signal(signal.SIGKILL)
    (left,) = names_in(tmp_path)
    assert left.endswith(".part.mp4")
    with atomic_path(tmp_path / "mine.json") as mine:
        assert [path.name for path in sweep(tmp_path)] == [left]
        assert mine.exists()
    assert names_in(tmp_path) == ["mine.json"]


def test_a_process_number_used_again_does_not_protect_the_file(tmp_path: Path) -> None:
    # The number of a living process (ours), but another start: what a restarted container leaves.
    nonce = f"{durable._boot()}z{durable._start_time(os.getpid()) + 1:x}z00000000"
    (tmp_path / f".a.{os.getpid()}.{nonce}.part.mp4").touch()
    assert len(sweep(tmp_path)) == 1


def test_a_temporary_file_of_another_machine_is_swept_after_a_day(tmp_path: Path) -> None:
    young = tmp_path / ".a.999999.00000000z1z00000000.part"
    old = tmp_path / ".b.999999.00000000z1z00000000.part"
    young.touch()
    old.touch()
    yesterday = time.time() - durable.FOREIGN_AGE - 60
    os.utime(old, (yesterday, yesterday))
    assert sweep(tmp_path) == [old]
    assert young.exists()


def test_other_files_are_never_swept(tmp_path: Path) -> None:
    names = [".hidden", "a.part", ".a.part.mp4", ".a.12x.00.part", "video.mp4", ".a.mp4"]
    for name in names:
        (tmp_path / name).touch()
    assert sweep(tmp_path) == []
    assert names_in(tmp_path) == sorted(names)


def test_who_is_alive() -> None:
    assert alive(os.getpid())
    assert alive(1)  # not ours: asking is refused, but it is there
    assert not alive(0)
    assert not alive(-1)
    assert not alive(2**40)
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    assert not alive(child.pid)
