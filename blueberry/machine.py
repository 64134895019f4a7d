"""What a figure must be quoted with: the code, the libraries and the processor that made it."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Commit of the checkout (empty for an installed package), version of torch, device, threads."""
    folder = Path(__file__).parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=folder)
    return {
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "device": device_name(),
        "threads": torch.get_num_threads(),
    }


def device_name() -> str:
    """The GPU, or the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
