"""From `--preset` or `--config_name` to a new model."""

import json
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..configuration_blueberry import PRESETS, BlueberryConfig
from ..errors import UsageError
from .hub_access import hub_or_cache
from .reading import is_local_path


@dataclass
class ModelArguments:
    """Which model to train from scratch."""

    preset: str | None = field(
        default=None, metadata={"help": f"One of {', '.join(PRESETS)}. Default: tiny, unless --config_name is given."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Config file (JSON), folder or Hub id, of Blueberry or any causal model."}
    )
    vocab_size: int | None = field(default=None, metadata={"help": "Replaces the vocabulary size of the config."})

    def __post_init__(self) -> None:
        if self.preset is not None and self.config_name is not None:
            raise UsageError(f"--preset {self.preset} and --config_name {self.config_name}: give one of them")
        if self.config_name is None and self.preset is None:
            self.preset = "tiny"


def load_config(args: ModelArguments) -> PreTrainedConfig:
    """The model's configuration. Raises UsageError for unknown presets, files and keys."""
    overrides = {} if args.vocab_size is None else {"vocab_size": args.vocab_size}
    try:
        if args.config_name is None:
            return BlueberryConfig.from_preset(args.preset, **overrides)
        _check_keys(Path(args.config_name))
        if not Path(args.config_name).exists():
            if is_local_path(args.config_name):
                raise UsageError(f"--config_name {args.config_name}: no such file or folder; check the path")
            hub_or_cache()
        config = AutoConfig.from_pretrained(args.config_name, **overrides)
    except UsageError:
        raise
    except (ValueError, OSError, StrictDataclassError) as error:
        source = f"--preset {args.preset}" if args.config_name is None else f"--config_name {args.config_name}"
        raise UsageError(f"{source}: {' '.join(str(error).split())}") from error
    if config.is_encoder_decoder:
        raise UsageError(f"model_type {config.model_type!r} is an encoder-decoder: name a decoder, as llama is")
    return config


def positions(config: PreTrainedConfig) -> int | None:
    """The longest sequence that the model has positions for; None where it knows no positions (Mamba)."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _check_keys(path: Path) -> None:
    """A local Blueberry config may hold Blueberry's keys only: a misspelt one would silently change nothing."""
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        return
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"--config_name {path} is not JSON: {error}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise UsageError(f'--config_name {path} names no model: add "model_type": "blueberry"')
    if values["model_type"] == BlueberryConfig.model_type:
        known = BlueberryConfig().to_dict().keys() | {"architectures", "auto_map", "dtype"}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise UsageError(f"--config_name {path} has unknown key {unknown[0]!r}: BlueberryConfig lists the fields")


def check_model(config: PreTrainedConfig) -> None:
    """Refuse, before any data is read, models without a causal head and those that see the tokens they are to predict.

    Whether a model of transformers sees them shows only when it runs: one is built for that, and thrown away.
    """
    if config.model_type != BlueberryConfig.model_type:
        config = deepcopy(config)
        config.pad_token_id = 0  # the tokenizer's is not known yet; the config's may lie beyond --vocab_size
        _check_causal(build_model(config))


def build_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A causal language model with fresh weights (set the seed before); UsageError where there is no causal head."""
    try:
        return AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UsageError(f"model_type {config.model_type!r} has no causal language model: name another") from error


@torch.no_grad()
def _check_causal(model: PreTrainedModel) -> None:
    """An encoder (BERT without `is_decoder`) would read its targets and reach a loss of zero that means nothing."""
    model.eval()
    ids = torch.arange(1, 9).remainder(model.config.get_text_config().vocab_size)[None].to(model.device)
    other = ids.clone()
    other[0, -1] = 1
    before, after = (model(input_ids=x).logits[0, :-1] for x in (ids, other))
    if not torch.allclose(before, after, atol=1e-4):
        raise UsageError(f"{type(model).__name__} sees later tokens: set is_decoder in its config, or name another")
