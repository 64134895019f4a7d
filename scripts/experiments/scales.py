"""How large experiments 1 to 4 and 6 are, and the arguments that all experiments take."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import device

from blueberry.configuration_blueberry import PRESETS
from blueberry.errors import OneLineParser, UsageError
from blueberry.polar import fastest_dtype

from .runs import Run
from .sweeps import Laboratory

TUNING_SEED = 1000  # learning rates are chosen on another seed than they are judged on


@dataclasses.dataclass(frozen=True)
class Scale:
    """Length and batch of every run, and the models."""

    steps: int
    batch: int  # sequences a step
    length: int  # tokens of a sequence
    models: Mapping[str, Mapping[str, Any]]  # name -> fields of BlueberryConfig
    accumulation: int = 1  # micro-batches that a step is made of
    tuning_steps: int = 0  # of the runs that only choose a learning rate; 0: a third of the steps


SIZES = {
    "steps": "optimizer steps",
    "tuning_steps": "steps of runs that choose a setting",
    "batch": "sequences a step",
    "length": "tokens a sequence",
}
_MOE = PRESETS["tiny"] | {"max_position_embeddings": 128}
_DENSE = {name: value for name, value in _MOE.items() if "expert" not in name and name != "moe_intermediate_size"}
_DENSE |= {"num_hidden_layers": 6, "intermediate_size": 512, "hidden_act": "relu2"}
_SMOKE = {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
          "num_hidden_layers": 2}  # fmt: skip
SCALES = {
    "smoke": Scale(12, 4, 32, {
        "moe": _MOE | _SMOKE | {"moe_intermediate_size": 32, "num_experts": 4},
        "dense": _DENSE | _SMOKE | {"intermediate_size": 64},
    }),
    "cpu": Scale(500, 16, 128, {"moe": _MOE, "dense": _DENSE}),
    # the documents' own: 1000 steps of 4 x 24 x 512 tokens for the MoE; the 88M model saw 2 billion tokens
    "paper": Scale(1000, 96, 512, {"moe": PRESETS["blueberry-moe"]}, accumulation=4),
    "paper-dense": Scale(7630, 128, 2048, {"dense": PRESETS["blueberry-88m"]}, accumulation=16),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a user asked an experiment for."""

    scale: Scale
    seeds: list[int]
    dataset: str
    laboratory: Laboratory
    bf16: bool

    def folder(self, name: str) -> Path:
        """Of an experiment's results."""
        return self.laboratory.folder / name

    def run(self, model: str, optimizer: str, lr: float, **changes: Any) -> Run:
        """A full-length run with evaluations and a spectral log."""
        changes = {"evaluations": 8, "spectral_logs": 8, **changes}
        return self._run(model, self.scale.steps, optimizer, lr).with_(**changes)

    def short(self, model: str, optimizer: str, lr: float, **changes: Any) -> Run:
        """A run that only chooses a setting."""
        return self._run(model, self.scale.tuning_steps or max(2, self.scale.steps // 3), optimizer, lr).with_(
            **{"seed": TUNING_SEED, **changes}
        )

    def _run(self, model: str, steps: int, optimizer: str, lr: float) -> Run:
        scale = self.scale
        return Run(model, scale.models[model], self.dataset, steps, scale.batch, scale.length, optimizer, lr,
                   accumulation=scale.accumulation, bf16=self.bf16)  # fmt: skip


def parse_plan(description: str, scales: Mapping[str, Scale] = SCALES) -> Plan:
    """What the command line of an experiment asks for."""
    return plan_of(plan_parser(description, scales).parse_args(), scales)


def plan_parser(description: str, scales: Mapping[str, Scale] = SCALES) -> OneLineParser:
    """The arguments that all experiments take."""
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=scales, default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dataset", default="sotu", help="as in train_llm.py")
    parser.add_argument("--output_dir", type=Path, help="default: results/experiments/SCALE")
    parser.add_argument("--workers", type=int, default=1, help="processes that train side by side")
    parser.add_argument("--storage", help="URL of the Optuna database (default: studies.sqlite in output_dir)")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="default: where the processor has it")
    for name, what in SIZES.items():
        parser.add_argument(f"--{name}", type=int, help=f"{what}, instead of the scale's")
    return parser


def plan_of(arguments: argparse.Namespace, scales: Mapping[str, Scale] = SCALES) -> Plan:
    """Raises UsageError for numbers that make no experiment."""
    _check_seeds(arguments.seeds)
    given = {name: getattr(arguments, name) for name in SIZES}
    for name, value in {**given, "workers": arguments.workers}.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: at least 1")
    scale = scales[arguments.scale]
    scale = dataclasses.replace(scale, **{name: value for name, value in given.items() if value is not None})
    folder = arguments.output_dir or Path("results/experiments") / arguments.scale
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output_dir {folder} is a file: name a folder")
    laboratory = Laboratory(folder, arguments.storage, arguments.workers)
    is_fast = fastest_dtype(device()) == torch.bfloat16
    bf16 = is_fast if arguments.bf16 is None else arguments.bf16
    return Plan(scale, arguments.seeds, arguments.dataset, laboratory, bf16)


def _check_seeds(seeds: Sequence[int]) -> None:
    told = f"--seeds {' '.join(map(str, seeds))}"
    if len(seeds) < 2:
        raise UsageError(f"{told}: an interval needs two seeds at least, three are the default")
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"{told}: a seed counts once, name others")
    if TUNING_SEED in seeds:
        raise UsageError(f"{told}: learning rates are chosen on {TUNING_SEED}, name another")
    if not all(0 <= seed < 2**31 for seed in seeds):
        raise UsageError(f"{told}: a seed lies between 0 and {2**31 - 1}")
