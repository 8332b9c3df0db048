"""Make the virtual environment of `make demo` and `make test`, saying first what will be downloaded.

    python tools/install.py .venv [--dev] [--torch auto|cpu|cuda|cu130|a pip requirement or wheel]

Standard library only: this runs before anything is installed. What it decides is which torch:

* a torch >= 2.10 that the Python running this already has is used as it is (the environment then sees the system's
  packages);
* `auto` takes the CUDA build where an NVIDIA driver is present, and the CPU build elsewhere;
* `cpu`, `cuda` (the build on PyPI), `cu128`, `cu130`... (PyTorch's own index of that name) decide it;
* anything else is given to pip: `TORCH="torch==2.12.0"`, `TORCH=wheels/torch-2.13.0+cpu-cp311-....whl`.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_TORCH = (2, 10)
DRIVER = Path("/proc/driver/nvidia")
TORCH_INDEX = "https://download.pytorch.org/whl/"
SIZES = {  # what a person waits for: download, then disk
    "cpu": "about 190 MB, 750 MB on disk",
    "cuda": "about 3 GB with NVIDIA's libraries, 7 GB on disk",
}
REST = {False: "about 100 MB", True: "about 470 MB"}  # everything but torch; with the tools of development


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("venv", type=Path)
    parser.add_argument("--dev", action="store_true", help="also what the tests need")
    parser.add_argument("--torch", default="auto", help="auto, cpu, cuda, cu130, or what pip takes")
    options = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036  run by hand with whatever `python3` is
        print(f"wanloom needs Python 3.11 or newer; this is {platform.python_version()}.", file=sys.stderr)
        return 8
    try:
        python = environment(options.venv)
        constraints = torch_first(python, options.torch, options.venv, options.dev)
        extra = "[dev]" if options.dev else ""
        pip(python, "install", "-c", str(constraints), "-e", f"{ROOT}{extra}")
    except subprocess.CalledProcessError as problem:
        print(f"error: {' '.join(map(str, problem.cmd[:6]))} ... failed; what it said stands above.", file=sys.stderr)
        return 8
    print(f"Installed in {options.venv}.", flush=True)
    return 0


def environment(venv: Path) -> Path:
    """The Python of the virtual environment, made when absent; it sees the system's packages if their torch fits."""
    python = venv / "bin" / "python"
    if python.exists() and (venv / "pyvenv.cfg").exists() and has_pip(python):
        return python
    if venv.exists() and not (venv / "pyvenv.cfg").exists() and any(venv.iterdir()):
        sys.exit(f"error: {venv} is there and is no virtual environment; name another: make VENV=...")
    print(f"Making {venv} with Python {platform.python_version()}.", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--system-site-packages", str(venv)], check=True)
    if not fits(installed_torch(python)):
        shutil.rmtree(venv)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    return python


def has_pip(python: Path) -> bool:
    """False for an environment whose making was interrupted."""
    return subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0


def torch_first(python: Path, choice: str, venv: Path, dev: bool) -> Path:
    """See to torch and say what comes; returns the constraints that keep pip from replacing it."""
    wanted = ROOT / "constraints.txt"
    present = installed_torch(python)
    if fits(present):
        print(f"torch {present} is there and is used. To download: {REST[dev]} of other packages.", flush=True)
        pinned = venv / "constraints.txt"
        others = [line for line in wanted.read_text().splitlines() if not line.startswith("torch==")]
        pinned.write_text("\n".join([*others, f"torch=={present}"]) + "\n")
        return pinned
    version = re.search(r"^torch==(\S+)", wanted.read_text(), re.MULTILINE)
    requirement = f"torch=={version[1]}" if version else "torch>=2.10"
    if choice == "auto":
        auto_torch(python, requirement, dev)
    elif choice == "cuda":
        announce(requirement, "cuda", dev)
        pip(python, "install", requirement)
    elif choice == "cpu" or re.fullmatch(r"(cu\d+|rocm[\d.]+|xpu)", choice):
        announce(f"{requirement} ({choice})", "cpu" if choice == "cpu" else "cuda", dev)
        pip(python, "install", "--index-url", TORCH_INDEX + choice, requirement)
    else:
        announce(choice, None, dev)
        pip(python, "install", choice)
        return torch_first(python, choice, venv, dev) if fits(installed_torch(python)) else wanted
    return wanted


def auto_torch(python: Path, requirement: str, dev: bool) -> None:
    """The CUDA build beside an NVIDIA driver, else the CPU build; what pip is set up for (a mirror) comes first."""
    file = pip_would_fetch(python, requirement)
    has_gpu = DRIVER.exists() or shutil.which("nvidia-smi") is not None
    is_cpu_build = "+cpu" in file or "%2Bcpu" in file or platform.system() != "Linux"
    if has_gpu or is_cpu_build:
        announce(requirement, "cpu" if is_cpu_build else "cuda", dev)
        pip(python, "install", requirement)
        return
    announce(f"{requirement} (cpu: no NVIDIA driver here)", "cpu", dev)
    try:
        pip(python, "install", "--retries", "1", "--index-url", TORCH_INDEX + "cpu", requirement)
    except subprocess.CalledProcessError:
        if not file:
            raise
        print("PyTorch's CPU index did not answer; taking the build that pip is set up for.", flush=True)
        announce(requirement, "cuda", dev)
        pip(python, "install", requirement)


def announce(what: str, kind: str | None, dev: bool) -> None:
    size = f": {SIZES[kind]}" if kind else ""
    print(f"To download: {what}{size}; and {REST[dev]} of other packages.", flush=True)
    print("Another torch: make TORCH=cpu, TORCH=cuda, TORCH=cu130, or TORCH=<what pip takes>.", flush=True)


def installed_torch(python: Path) -> str | None:
    """The version of torch that the environment sees, without importing it."""
    code = "import importlib.metadata as m; print(m.version('torch'))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def fits(version: str | None) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= OLDEST_TORCH


def pip_would_fetch(python: Path, requirement: str) -> str:
    """The address of the file that pip, as it is set up here, would take; empty when it finds none."""
    command = [str(python), "-m", "pip", "install", "--dry-run", "--no-deps", "--quiet", "--report", "-", requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return ""
    report = json.loads(done.stdout)
    return str(report["install"][0]["download_info"]["url"]) if report["install"] else ""


def pip(python: Path, *arguments: str) -> None:
    """Run pip; a person at a terminal sees the progress of a long download, a log only what goes wrong."""
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    subprocess.run([str(python), "-m", "pip", "--disable-pip-version-check", *arguments, *quiet], check=True)


if __name__ == "__main__":
    sys.exit(main())
