"""A trained causal model, from a folder or the Hub, with errors of one line."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import blueberry  # noqa: F401 (registers its models)
from blueberry.errors import UsageError

from .hub_access import hub_or_cache
from .reading import id_and_revision, is_local_path

_MODEL_FILES = ("config.json", "adapter_config.json")


def load_model(source: str, **settings: Any) -> PreTrainedModel:
    """Of `--model SOURCE`: the folder of a run or model, or a Hub id, ID@REVISION; in evaluation mode.

    An adapter comes with the model that it was trained on. settings: of `from_pretrained`.

    Raises UsageError if there is no such model.
    """
    return _load(AutoModelForCausalLM, source, **settings).eval()


def load_tokenizer(source: str, **settings: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a model. Raises UsageError if there is none."""
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        raise UsageError(f"--model {source} has no tokenizer: it was trained on token ids, save one in the folder")
    return _load(AutoTokenizer, source, **settings)


def _load(kind: Any, source: str, **settings: Any) -> Any:
    name, revision = id_and_revision(source)
    folder = Path(name)
    if not folder.is_dir():
        if is_local_path(name):
            raise UsageError(f"--model {source}: no such folder; check the path")
        hub_or_cache()
    elif not any((folder / file).is_file() for file in _MODEL_FILES):
        raise UsageError(f"--model {source} holds no config.json: name the folder of a finished run")
    try:
        return kind.from_pretrained(name, revision=revision, **settings)
    except (OSError, ValueError) as error:
        tried = "" if folder.is_dir() else "no such folder, and the Hub did not give it: "
        raise UsageError(f"--model {source}: {tried}{' '.join(str(error).split())[:300]}") from error
