"""Which checkpoints of a run can be resumed from."""

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

STATE = "trainer_state.json"
# One pattern of each line must be there: weights, optimizer, schedule. Sharded engines use folders of other names.
_PARTS = (
    ("model*.safetensors", "adapter_model*", "pytorch_model*", "global_step*"),
    ("optimizer*", "global_step*"),
    ("scheduler.pt",),
)


def checkpoints_of(run: Path) -> list[Path]:
    """The `checkpoint-*` folders of a run, newest first."""
    found = [path for path in run.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def flaw(checkpoint: Path) -> str | None:
    """Why training cannot go on from `checkpoint`, in words, or None: something missing, or a file cut short.

    Trainer writes `trainer_state.json` last. Contents are not verified, only that files are whole.
    """
    try:
        json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError):
        return f"has no {STATE}"
    for patterns in _PARTS:
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            return f"has no {patterns[0]}"
    broken = [path.name for path in sorted(checkpoint.iterdir()) if not _is_whole(path)]
    return f"has a broken {broken[0]}" if broken else None


def _is_whole(path: Path) -> bool:
    """False for a file cut short: the header of safetensors tells the size, and torch's archives end with theirs."""
    if path.suffix in (".pt", ".pth", ".bin") and path.name != "training_args.bin":
        return zipfile.is_zipfile(path)
    if path.suffix != ".safetensors":
        return True
    try:
        with safe_open(path, "pt"):
            return True
    except (SafetensorError, OSError):
        return False


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that a checkpoint has behind it."""
    return json.loads((checkpoint / STATE).read_text())["global_step"]
