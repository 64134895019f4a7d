"""Blueberry: a Muon research lab inside the Hugging Face ecosystem.

Names are imported on first use, so that `import blueberry` costs milliseconds. The configuration and models are
registered with transformers' Auto classes as soon as transformers is there to register with.
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register_when_used

__version__ = "0.1.0"

_HOME = {
    "BlueberryConfig": "blueberry.configuration_blueberry",
    "BlueberryModel": "blueberry.modeling_blueberry",
    "BlueberryForCausalLM": "blueberry.modeling_blueberry",
    "BlueberryForSequenceClassification": "blueberry.modeling_blueberry",
    "BlueberryTrainer": "blueberry.training.trainer",
    "BlueberryTrainingArguments": "blueberry.training.arguments",
}
__all__ = [
    "BlueberryConfig",
    "BlueberryForCausalLM",
    "BlueberryForSequenceClassification",
    "BlueberryModel",
    "BlueberryTrainer",
    "BlueberryTrainingArguments",
]

if TYPE_CHECKING:
    from .configuration_blueberry import BlueberryConfig
    from .modeling_blueberry import BlueberryForCausalLM, BlueberryForSequenceClassification, BlueberryModel
    from .training.arguments import BlueberryTrainingArguments
    from .training.trainer import BlueberryTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'blueberry' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    # Read when torch is loaded; see `idle_threads_sleep` in threads_blueberry.py. Other work keeps its speed.
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")

register_when_used()
