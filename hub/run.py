"""A finished run as it lies on the disk: what a card and an upload are made from. Needs no torch."""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from blueberry.benchmarks import FILE as BENCHMARKS
from blueberry.benchmarks import digest, read_record
from blueberry.errors import UsageError
from blueberry.spectral.log import FOLDER as SPECTRAL_LOG
from blueberry.spectral.log import SpectralLog
from blueberry.training.reading import is_local_path, local_arguments

CONFIG, MODEL_CONFIG, RESULTS, PROVENANCE = "config.yaml", "config.json", "eval_results.json", "provenance.json"
AUDIT = "optimizer_audit.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Run:
    """The folder of a run.

    Attributes:
        settings: its arguments (config.yaml).
        config: of the model (config.json), or of the adapter (adapter_config.json).
        metrics: final ones, `eval_loss` and others.
        provenance: see `blueberry.training.provenance`; empty for runs of versions that did not record it.
        audit: which parameter got which optimizer.
    """

    folder: Path
    settings: dict[str, Any]
    config: dict[str, Any]
    metrics: dict[str, float]
    provenance: dict[str, Any]
    audit: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Raises UsageError where there is no run, or one that did not come to its end."""
        import yaml

        if not folder.is_dir():
            raise UsageError(f"--run {folder}: no such folder; name the output folder of a training run")
        if not (folder / CONFIG).is_file():
            raise UsageError(f"--run {folder} holds no {CONFIG}: name the output folder of a training run")
        config = config_name(folder)
        for needed in (config, RESULTS):
            if not (folder / needed).is_file():
                raise UsageError(f"--run {folder} has no final model ({needed} is missing): let the run come to its "
                                 "end, with --resume_from_checkpoint if it was stopped")  # fmt: skip
        try:
            settings = yaml.safe_load((folder / CONFIG).read_text())
            found = {name: _json(folder / name) for name in (config, RESULTS, PROVENANCE, AUDIT)}
        except (yaml.YAMLError, ValueError) as error:
            raise UsageError(f"--run {folder}: a file is damaged: {' '.join(str(error).split())}") from error
        for name, content in {CONFIG: settings, **{name: found[name] for name in (config, RESULTS)}}.items():
            if not isinstance(content, dict):
                raise UsageError(f"--run {folder}: {name} is damaged, it maps no names to values; write it again")
        run = cls(folder, settings, found[config], found[RESULTS], found[PROVENANCE] or {}, found[AUDIT] or [])
        if not run.weights:
            raise UsageError(f"--run {folder} has no final model (model.safetensors is missing): let the run come to "
                             "its end, with --resume_from_checkpoint if it was stopped")  # fmt: skip
        for path in run.weights:
            header_of(path)
        return run

    @property
    def weights(self) -> list[Path]:
        """The files of the final model."""
        return weights_of(self.folder)

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter of PEFT to another model."""
        return "peft_type" in self.config

    @property
    def local_paths(self) -> list[str]:
        """The arguments that named files or folders."""
        made = self.provenance
        names = made["local"] if "local" in made else local_arguments(self.settings)  # of a run of an older version
        return [self.settings[name] for name in names if name in self.settings]

    @property
    def base_is_local(self) -> bool:
        """Of an adapter: whether its model was read from a folder."""
        name = self.config["base_model_name_or_path"]
        return name in self.local_paths or is_local_path(name) or Path(name).is_dir()

    @property
    def base(self) -> str:
        """Of an adapter: the Hub id of its model, or the name of the folder that it was read from."""
        name = self.config["base_model_name_or_path"]
        return Path(name).name if self.base_is_local else name

    @cached_property
    def shapes(self) -> dict[str, list[int]]:
        """Tensor name -> shape, from the headers of the files."""
        return {name: shape for path in self.weights for name, shape in tensor_shapes(path).items()}

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def active_parameters(self) -> int:
        """Parameters that a token meets: of the experts only those that it is sent to."""
        experts, chosen = self.config.get("num_experts") or 0, self.config.get("num_experts_per_tok") or 0
        in_experts = sum(math.prod(shape) for name, shape in self.shapes.items() if ".experts." in name)
        return self.parameters if not experts else self.parameters - in_experts * (experts - chosen) // experts

    @cached_property
    def benchmarks(self) -> dict[str, dict[str, Any]]:
        """Task -> what scripts/evaluate_model.py found for these weights on all of its questions."""
        if not (self.folder / BENCHMARKS).is_file():
            return {}
        record = read_record(self.folder / BENCHMARKS, digest(self.weights)) or {"tasks": {}}
        return {task: found for task, found in record["tasks"].items() if found["limit"] is None}

    @property
    def spectral_log(self) -> SpectralLog | None:
        log = SpectralLog(self.folder / SPECTRAL_LOG)
        return log if log.parts() else None


def config_name(folder: Path) -> str:
    """The file that describes the model or adapter in `folder`."""
    return ADAPTER_CONFIG if (folder / ADAPTER_CONFIG).is_file() else MODEL_CONFIG


def weights_of(folder: Path) -> list[Path]:
    """The safetensors files of the model or adapter in `folder`."""
    return sorted([*folder.glob("model*.safetensors"), *folder.glob(ADAPTER_WEIGHTS)])


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """From the header of a safetensors file."""
    return {name: entry["shape"] for name, entry in header_of(path).items()}


def header_of(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> what a safetensors file says of it. UsageError unless all of the file is there."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if 8 + length <= size else b""
    try:
        header = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
    except ValueError:
        header = {}
    if size != 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0) or not header:
        raise UsageError(f"{path} is damaged or cut off ({size:,} bytes): save the model again")
    return header
