"""What made a model: code, libraries, processor, data, time. For whoever reads about it later."""

import platform
from collections.abc import Mapping
from typing import Any

import transformers

from .. import __version__
from ..machine import machine
from .data import PreparedData
from .reading import local_arguments
from .trainer import BlueberryTrainer


def provenance(trainer: BlueberryTrainer, data: PreparedData, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run at its end; `seconds` of training are unknown where it was resumed. settings: its arguments."""
    runtime = next((row["train_runtime"] for row in trainer.state.log_history if "train_runtime" in row), None)
    return {
        **machine(),
        "blueberry": __version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "processes": trainer.args.world_size,
        "steps": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        "seconds": None if trainer._initial_num_input_tokens_seen else runtime,
        "dataset": data.name,
        "split_rule": data.split_rule,
        "documents": data.documents,
        "train_tokens": data.train_tokens,
        "validation_documents": data.validation_documents,
        "validation_tokens": data.validation_tokens,
        "window": data.max_length,
        "model_type": trainer.model.config.model_type,
        "local": local_arguments(settings),
    }
