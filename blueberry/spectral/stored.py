"""Spectra of a finished model, read from its safetensors files one matrix at a time; no code of the model runs.

The architecture that transformers (or Blueberry) knows for the checkpoint's config, built without memory for weights,
says what each stored tensor is: names, fused projections and experts are those of `tracked`.
"""

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..errors import UsageError
from .analysis import analyze
from .metrics import Row
from .names import matrix_name
from .tracked import Tracked, tracked_matrices

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG = "config.json"

Header = dict[str, tuple[Path, list[int]]]  # name of a tensor -> its file and shape
Parts = Callable[[Tensor], dict[str, Tensor]]  # a stored tensor -> the matrices in it, by the name of their parameter


class Stored(NamedTuple):
    """A tensor of a checkpoint, or one expert of a stack, and how to take it apart."""

    file: Path
    key: str
    parts: Parts
    row: int | None = None  # which matrix of a stored stack; None: the tensor is one
    expert: int | None = None

    def read(self) -> dict[str, Tensor]:
        """The matrices in it. The file is mapped only meanwhile, so that its pages do not pile up."""
        with safe_open(self.file, "pt") as file:
            if self.row is None:
                return self.parts(file.get_tensor(self.key))
            one = self.parts(file.get_slice(self.key)[self.row : self.row + 1])
            return {name: stack[0] for name, stack in one.items()}


def stored_matrices(folder: str | Path) -> list[Stored]:
    """The matrices of the checkpoint in `folder` that the callback would track in the loaded model.

    Without a config that is known here, when the architecture is code of the checkpoint's own, or when its names are
    not those of the tensors: all matrices and stacks of experts in numbered layers, as they are stored. UsageError for
    what holds no such weights: adapters, quantized models, broken files, other formats than safetensors.
    """
    folder = Path(folder)
    header = _header(folder)
    config = _config(folder)
    found = [] if config is None else _as_modelled(header, _skeleton(config, folder))
    found = found or _as_stored(header)
    if not found:
        raise UsageError(f"{folder} holds no matrix of a numbered layer: is it a whole model?")
    return found


def analyze_stored(
    matrices: list[Stored], *, top_k: int = 10, exact: bool = False, power_law: bool = False, workers: int = 1
) -> Iterator[list[Row]]:
    """The rows of `analyze` (weights alone) of each, in order; at most `workers` tensors are in memory at once."""

    def rows_of(one: Stored) -> list[Row]:
        rows = analyze(one.read(), top_k=top_k, exact=exact, power_law=power_law)
        return [row | {"expert": one.expert} for row in rows]

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(rows_of, matrices)


# Which tensors there are


def _header(folder: Path) -> Header:
    """Names, files and shapes of all tensors, from the headers of the files alone."""
    header = {}
    for file in _files(folder):
        try:
            with safe_open(file, "pt") as opened:
                names = opened.keys()
                header |= {name: (file, opened.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{file} is not a whole safetensors file ({error}): save or download it again") from error
    return header


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        shards = json.loads((folder / INDEX).read_text())["weight_map"].values()
        return [folder / shard for shard in sorted(set(shards))]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / "adapter_config.json").is_file():
        raise UsageError(f"{folder} is a PEFT adapter: merge_and_unload it into its model and save_pretrained that")
    raise UsageError(f"no {WEIGHTS} in {folder}: load the model with transformers and save_pretrained it")


def _config(folder: Path) -> PreTrainedConfig | None:
    """The config, where it is one that is known without the checkpoint's own code."""
    if not (folder / CONFIG).is_file():
        return None
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, StrictDataclassError) as error:  # not JSON, or fields of wrong types
        raise UsageError(f"{folder / CONFIG}: {' '.join(str(error).split())}") from error
    except ValueError:  # an unknown model_type, or one whose code is in the folder
        return None
    if getattr(config, "quantization_config", None):
        raise UsageError(f"{folder} is quantized: load it with dequantize=True and save_pretrained it first")
    return config


def _skeleton(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """The model, without memory for its weights."""
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    kind = AutoModelForCausalLM if causal and causal.__name__ in (config.architectures or ()) else AutoModel
    try:
        with torch.device("meta"):
            return kind.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise UsageError(f"{folder}: {' '.join(str(error).split())}") from error


# What they are


def _as_stored(header: Header) -> list[Stored]:
    """Tensors of numbered layers under their own names."""
    found = []
    for key, (file, shape) in header.items():
        is_stack = len(shape) == 3 and "expert" in key  # other tensors of three dimensions are convolutions
        if (len(shape) == 2 or is_stack) and matrix_name(key).layer is not None:
            found += _stored(file, key, shape, lambda tensor, name=key: {name: tensor})
    return found


def _as_modelled(header: Header, model: PreTrainedModel) -> list[Stored]:
    """Tensors of tracked parameters, under the names of these, in the order of the model."""
    tracked = {one.name: one for one in tracked_matrices(model)}
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    parameters = model.state_dict()
    found: dict[str, list[Stored]] = {name: [] for name in tracked}
    for key, (file, shape) in sorted(header.items(), key=lambda item: _natural(item[0])):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if name in tracked:
            parts = _parts(tracked[name], key, pattern, converters)
            found[name] += _stored(file, key, shape, parts)
    return [one for stored in found.values() for one in stored]


def _stored(file: Path, key: str, shape: list[int], parts: Parts) -> list[Stored]:
    if len(shape) == 3:
        return [Stored(file, key, parts, row=e, expert=e) for e in range(shape[0])]
    return [Stored(file, key, parts, expert=matrix_name(key).expert)]


def _parts(one: Tracked, key: str, pattern: str | None, converters: list[WeightConverter]) -> Parts:
    """How to take apart a tensor that becomes `one` or, by the conversion whose source `pattern` is, a part of it.

    A model may fuse on loading what is stored apart: the stored matrix then has the name of that part.
    """
    if pattern is None:
        return one.parts
    sources = next(c.source_patterns for c in converters if pattern in c.source_patterns)
    names = one.names()
    if len(names) != len(sources):
        return lambda tensor: {key: tensor}
    return lambda tensor: {names[sources.index(pattern)]: tensor}


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key: layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", name)]
