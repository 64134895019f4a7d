"""Command line and YAML files -> dataclasses, with one-line errors."""

import argparse
import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from transformers import HfArgumentParser

from ..errors import UsageError
from .arguments import TAKEN_BY
from .replacing import CONFIG
from .resuming import NEWEST, run_to_continue
from .run_folder import read_yaml

# Arguments of which one says what the others would: given on one level, it replaces them on the levels below.
_ALTERNATIVES = (
    {"train_tokens", "max_steps", "num_train_epochs"},
    {"preset", "config_name"},
    {"learning_rate", "adamw_lr"},
)
# Arguments that count with certain values of another only: where that is given another one, they go from the levels
# below, so that `--config FILE --optimizer adamw` is not refused for the file's --muon_lr.
_ONLY_WITH = {name: ("optimizer", optimizers) for name, optimizers in TAKEN_BY.items()} | {
    name: ("track_manifold", (True,)) for name in ("track_every_n_steps", "track_max_overhead")
}


class BlueberryArgumentParser(HfArgumentParser):
    """HfArgumentParser with `--config FILE`: YAML keys are argument names, the command line wins over them.

    `--resume_from_checkpoint` may stand alone (the run's newest checkpoint); the `config.yaml` of the run that it
    continues comes below `--config`. Everything a user can get wrong is a UsageError of one line.
    """

    def __init__(self, dataclass_types: Iterable[type], **kwargs: Any):
        groups = list(dataclass_types)
        self._hints = {name: str(hint) for group in groups for name, hint in get_type_hints(group).items()}
        super().__init__(groups, allow_abbrev=False, **kwargs)
        self.add_argument("--config", metavar="FILE", help="YAML file of arguments; the command line wins over it.")
        resume = self._option_string_actions.get("--resume_from_checkpoint")
        if resume is not None:
            resume.nargs, resume.const = "?", NEWEST

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse(self, arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
        """One instance of each dataclass, from `arguments` (default: the command line)."""
        arguments = list(sys.argv[1:] if arguments is None else arguments)
        self._set_defaults(self._given(arguments))
        try:
            *dataclasses, rest, _ = self.parse_args_into_dataclasses(
                arguments, return_remaining_strings=True, look_for_args_file=False
            )
        except UsageError:
            raise
        except (ValueError, ImportError, OSError) as error:  # TrainingArguments' own checks
            raise UsageError(" ".join(str(error).split())) from error
        del rest  # the namespace that holds --config
        return tuple(dataclasses)

    def _given(self, arguments: list[str]) -> dict[str, Any]:
        """What the command line itself says."""
        absent = object()
        namespace = argparse.Namespace(**{action.dest: absent for action in self._actions})
        known, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            raise UsageError(f"unknown argument {unknown[0]}{self._suggestion(unknown[0])}")
        return {name: value for name, value in vars(known).items() if value is not absent}

    def _set_defaults(self, given: Mapping[str, Any]) -> None:
        """Defaults from the config of the run that is continued and from `--config`, under what is `given`."""
        file = self._read(Path(given["config"])) if "config" in given else {}
        settings = _over(file, given)
        run = run_to_continue(settings)
        if run is not None and (run / CONFIG).is_file():
            settings = _over(self._read(run / CONFIG) | {"output_dir": str(run)}, settings)
        actions = {action.dest: action for action in self._actions}
        for name, value in settings.items():
            # As on the command line, a string goes through the argument's own type: YAML reads 2e-2 as a string.
            actions[name].default = value if value is None or isinstance(value, list | dict) else str(value)
            actions[name].required = False

    def _read(self, path: Path) -> dict[str, Any]:
        """Arguments from a YAML file."""
        values = read_yaml(path)
        known = {action.dest for action in self._actions} - {"config", "help"}
        for key, value in values.items():
            if key not in known:
                raise UsageError(f"--config {path} has unknown key {key!r}{self._suggestion(f'--{key}')}")
            if isinstance(value, list | dict) and type(value).__name__ not in self._hints[key]:
                raise UsageError(f"--config {path}: {key} is {value}, but takes a single value")
        return values

    def _suggestion(self, argument: str) -> str:
        """The option that begins or ends as the argument does, else the one that looks most like it."""
        name, options = argument.split("=")[0], list(self._option_string_actions)
        if name == "--lr" or name.startswith("--learning"):
            return ": did you mean --muon_lr or --adamw_lr?"
        end = "_" + name.lstrip("-")
        close = [option for option in options if len(name) > 3 and option.startswith(name)]
        close += [option for option in options if option.endswith(end)]
        close = close or difflib.get_close_matches(name, options, n=1)
        return f": did you mean {close[0]}?" if close else ": see --help"


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with `above` laid over it, which also covers the alternatives of its names."""
    covered = {name for group in _ALTERNATIVES if group & above.keys() for name in group}
    covered |= {name for name, (other, values) in _ONLY_WITH.items() if above.get(other, values[0]) not in values}
    return {name: value for name, value in below.items() if name not in covered} | dict(above)
