"""What the arms of each experiment are made of: only the learning rate is chosen from the data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Arm:
    """An optimizer of BlueberryTrainingArguments with what differs from its defaults."""

    optimizer: str
    lr: float  # where the search for the learning rate starts
    settings: Mapping[str, Any] = field(default_factory=dict)  # of `build_optimizer`


# Gradients are small: a step along them needs a larger rate than one along an orthonormal matrix.
ARMS: dict[str, dict[str, Arm]] = {
    "experiment_1": {"adamw": Arm("adamw", 0.004), "muon": Arm("muon", 0.02)},
    "experiment_2": {
        "full": Arm("muon", 0.02),
        "no momentum": Arm("muon", 0.02, {"momentum": 0.0}),
        "no Newton-Schulz": Arm("muon", 1.0, {"orthogonalize": False}),
        "neither": Arm("muon", 1.0, {"momentum": 0.0, "orthogonalize": False}),
    },
    "experiment_5": {"adamw": Arm("adamw", 0.002), "muon": Arm("muon", 0.02), "manifold": Arm("manifold", 0.02)},
    "experiment_6": {
        "muon": Arm("muon", 0.02),
        "rms_match": Arm("muon", 0.005, {"scale_mode": "rms_match"}),
        "keller_jordan": Arm("muon", 0.02, {"coefficients": "keller_jordan"}),
        "polar_express": Arm("muon", 0.02, {"coefficients": "polar_express"}),
        "weight decay": Arm("muon", 0.02, {"weight_decay": 0.1}),
        "cautious weight decay": Arm("muon", 0.02, {"weight_decay": 0.1, "cautious": True}),
        "NorMuon": Arm("muon", 0.02, {"neuron_beta": 0.95}),
        "manifold Muon": Arm("manifold", 0.02),
    },
}
