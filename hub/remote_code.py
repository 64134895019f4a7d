"""Blueberry's modeling code as the Hub's remote code: flat siblings, and the config that names them."""

import json
from pathlib import Path

import blueberry

MODEL_TYPE = "blueberry"
AUTO_MAP = {
    "AutoConfig": "configuration_blueberry.BlueberryConfig",
    "AutoModel": "modeling_blueberry.BlueberryModel",
    "AutoModelForCausalLM": "modeling_blueberry.BlueberryForCausalLM",
    "AutoModelForSequenceClassification": "modeling_blueberry.BlueberryForSequenceClassification",
}


def code_files() -> dict[str, bytes]:
    """The modules that a Blueberry needs where the package is not installed, found as transformers finds them."""
    from transformers.dynamic_module_utils import get_relative_import_files

    model = Path(blueberry.__file__).with_name("modeling_blueberry.py")
    files = {model, *map(Path, get_relative_import_files(model))}
    return {path.name: path.read_bytes() for path in sorted(files)}


def with_auto_map(config: bytes) -> bytes:
    """A config.json whose model is loaded by `code_files`."""
    return (json.dumps(json.loads(config) | {"auto_map": AUTO_MAP}, indent=2) + "\n").encode()
