"""Command line and YAML file -> dataclasses, with one-line errors."""

import difflib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from ..errors import UsageError


class BlueberryArgumentParser(HfArgumentParser):
    """HfArgumentParser with `--config FILE`: YAML keys are argument names, the command line wins over them.

    `--resume_from_checkpoint` may stand alone: the run's newest checkpoint. Everything a user can get wrong is a
    UsageError of one line.
    """

    def __init__(self, dataclass_types: Iterable[type], **kwargs: Any):
        super().__init__(list(dataclass_types), **kwargs)
        self.add_argument("--config", metavar="FILE", help="YAML file of arguments; the command line wins over it.")
        resume = self._option_string_actions.get("--resume_from_checkpoint")
        if resume is not None:
            resume.nargs, resume.const = "?", "last"

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse(self, arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
        """One instance of each dataclass, from `arguments` (default: the command line)."""
        arguments = list(sys.argv[1:] if arguments is None else arguments)
        known, _ = self.parse_known_args(arguments)
        if known.config is not None:
            self._set_defaults_from(Path(known.config))
        try:
            *dataclasses, rest, unknown = self.parse_args_into_dataclasses(
                arguments, return_remaining_strings=True, look_for_args_file=False
            )
        except UsageError:
            raise
        except (ValueError, ImportError) as error:  # TrainingArguments' own checks
            raise UsageError(" ".join(str(error).split())) from error
        del rest  # the namespace that holds --config
        if unknown:
            raise UsageError(f"unknown argument {unknown[0]}{self._suggestion(unknown[0])}")
        return tuple(dataclasses)

    def _set_defaults_from(self, path: Path) -> None:
        try:
            values = yaml.safe_load(path.read_text())
        except OSError as error:
            raise UsageError(f"--config {path}: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise UsageError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise UsageError(f"--config {path} must map argument names to values")
        actions = {action.dest: action for action in self._actions}
        for key, value in values.items():
            if key not in actions or key == "config":
                raise UsageError(f"--config {path} has unknown key {key!r}{self._suggestion(f'--{key}')}")
            # As on the command line, a string goes through the argument's own type: YAML reads 2e-2 as a string.
            actions[key].default = value if value is None or isinstance(value, list | dict) else str(value)
            actions[key].required = False

    def _suggestion(self, argument: str) -> str:
        close = difflib.get_close_matches(argument.split("=")[0], self._option_string_actions, n=1)
        return f": did you mean {close[0]}?" if close else ": see --help"
