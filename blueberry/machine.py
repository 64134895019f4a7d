"""What a figure must be quoted with: the code, the libraries and the processor that made it."""

import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Commit of the code (empty for an installed package), version of torch, device, threads."""
    return {
        "commit": commit(Path(__file__).parent),
        "torch": torch.__version__,
        "device": device_name(),
        "threads": torch.get_num_threads(),
    }


def commit(folder: Path) -> str:
    """That of the checkout which `folder` belongs to, with `-dirty` behind it if Python files differ from it.

    Empty where there is no git, and for a package that is installed inside the checkout of something else.
    """
    if shutil.which("git") is None or not _git(folder, "ls-files"):
        return ""
    changed = _git(folder, "status", "--porcelain", "--", ":/*.py")
    return _git(folder, "rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    """What git prints, or nothing where it refuses."""
    return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=folder).stdout.strip()


def device_name() -> str:
    """The GPU, or the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
