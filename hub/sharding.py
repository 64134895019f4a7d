"""Cut large safetensors files into shards, one shard in memory at a time."""

import json
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards

from blueberry.errors import UsageError

from .run import weights_of

INDEX = "model.safetensors.index.json"


def sharded(folder: Path, scratch: Path, max_shard_size: str) -> dict[str, bytes | Path]:
    """The weights of the model in `folder`: as they are, or in shards written to `scratch` if a file is too large.

    max_shard_size: such as 5GB.
    """
    files = weights_of(folder)
    if all(path.stat().st_size <= _bytes(max_shard_size) for path in files):
        index = folder / INDEX
        return {path.name: path for path in files} | ({INDEX: index.read_bytes()} if index.is_file() else {})
    return _written(files, scratch, max_shard_size)


def _written(files: list[Path], scratch: Path, max_shard_size: str) -> dict[str, bytes | Path]:
    from safetensors import safe_open
    from safetensors.torch import save_file

    opened = {path: safe_open(path, "pt") for path in files}
    home = {name: path for path, tensors in opened.items() for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    state = {name: opened[path].get_tensor(name) for name, path in home.items()}  # mapped, not read
    plan = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    result: dict[str, bytes | Path] = {}
    for name, tensors in plan.filename_to_tensors.items():
        save_file({tensor: state[tensor] for tensor in tensors}, scratch / name, metadata={"format": "pt"})
        result[name] = scratch / name
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    return result | {INDEX: (json.dumps(index, indent=2) + "\n").encode()}


def _bytes(size: str) -> int:
    """5GB -> 5 * 10**9."""
    number, unit = size[:-2], size[-2:].upper()
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    if unit not in units or not number.isdigit() or int(number) == 0:
        raise UsageError(f"--max_shard_size {size}: write a size such as 5GB or 500MB")
    return int(number) * units[unit]
