"""What a result says of the machine and the software it was measured with."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch
from rows import Row

import rfkernels as rf


def environment(device: str) -> Row:
    """The columns that are the same in every row of a run."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": str(torch.get_num_threads()),
        "isa": _isa(device),
        "rfkernels": rf.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda or "",
        "driver": _driver() if device == "cuda" else "",
        "cpu": _cpu(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _isa(device: str) -> str:
    if device == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability())
    try:
        from rfkernels import _C
    except ImportError:
        return ""
    return _C.isa_used()


def _cpu() -> str:
    """The processor's name; Linux has it in /proc."""
    with_names = Path("/proc/cpuinfo")
    if with_names.is_file():
        for line in with_names.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _output(*command: str) -> str:
    """What a command prints, "" where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _driver() -> str:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else ""


def _commit() -> str:
    """Short hash of the checkout, with "+" where tracked files differ from it."""
    here = str(Path(__file__).resolve().parent)
    commit = _output("git", "-C", here, "rev-parse", "--short", "HEAD")
    changed = _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+" if commit and changed else commit
