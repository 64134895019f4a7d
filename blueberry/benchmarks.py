"""Benchmarks of a trained model by lm-evaluation-harness (extra `eval`), and the record of them.

https://github.com/EleutherAI/lm-evaluation-harness
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from blueberry.errors import UsageError

FILE = "benchmarks.json"  # name of the record inside a run folder
Record = dict[str, Any]


def run_benchmarks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> Record:
    """Evaluate a causal `model` on tasks, each a name that lm-evaluation-harness knows or the path of a task's YAML.

    num_fewshot: examples before each question; None takes the task's own number. limit: questions of each task.

    Returns: {"tasks": {name: {"metrics": {name: {"value", "stderr", "higher_is_better"}}, "questions", "of",
    "limit", "num_fewshot", "version", "dataset", "file", "lm_eval"}}}; stderr None where there is none. A task of a
    YAML file is recorded as "name (file)": it is no benchmark, whatever it is called. file: None for the harness' own.

    Raises UsageError for an unknown task, a task file that cannot be read, data that cannot be had, answers longer
    than the model's window, and a task that gives no number.
    """
    from lm_eval import __version__
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = task_manager(tasks)
    files = files_of_tasks(manager, tasks)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, truncation=True)
    try:
        found = simple_evaluate(
            model=wrapped, tasks=list(tasks), task_manager=manager, num_fewshot=num_fewshot, limit=limit,
            log_samples=False, bootstrap_iters=1000,
        )  # fmt: skip
    except (OSError, ValueError) as error:  # the Hub, or the files that a task names
        raise UsageError(
            f"--tasks {' '.join(tasks)}: {_line(error)}; check the network, or the task's files"
        ) from error
    except AssertionError as error:
        if "maximum sequence length" not in str(error):
            raise
        raise UsageError(f"--tasks {' '.join(tasks)}: the model's window is too short ({_line(error)})") from error
    records = {}
    for name in found["results"]:
        file = files.get(name)
        records[f"{name} ({file})" if file else name] = _task_record(name, found) | {
            "limit": limit, "file": file, "lm_eval": __version__
        }  # fmt: skip
    return {"tasks": records}


def task_manager(tasks: Iterable[str]) -> Any:
    """Of lm-evaluation-harness; its 15,000 own tasks are looked at only if one is asked for by name (6 s)."""
    from lm_eval.tasks import TaskManager

    names = [task for task in tasks if not is_file(task)]
    for task in filter(is_file, tasks):
        if not Path(task).is_file():
            raise UsageError(f"--tasks {task}: no such file; check the path")
    manager = TaskManager(include_defaults=bool(names))
    for name in names:
        if name not in manager.all_tasks:
            near = get_close_matches(name, manager.all_tasks, 3)
            raise UsageError(
                f"--tasks {name} is unknown: " + (f"{', '.join(near)}?" if near else "see `lm_eval ls tasks`")
            )
    return manager


def files_of_tasks(manager: Any, tasks: Iterable[str]) -> dict[str, str]:
    """Task -> the YAML file that it comes from, of those that come from one. UsageError for a file that makes none."""
    import yaml
    from jinja2 import TemplateError

    files = {}
    for task in filter(is_file, tasks):
        try:
            loaded = manager.load([task])
        except (OSError, ValueError, TypeError, LookupError, TemplateError, yaml.YAMLError) as error:
            raise UsageError(  # all of what a wrong entry of the file leads to
                f"--tasks {task}: {type(error).__name__}: {_line(error)}; mend the file"
            ) from error
        files |= dict.fromkeys([*loaded["tasks"], *loaded["groups"]], Path(task).name)
    return files


def is_file(task: str) -> bool:
    """Whether `--tasks` names a file, not a task of the harness."""
    return task.endswith((".yaml", ".yml"))


def _task_record(name: str, found: Record) -> Record:
    """Of a task, or of a group of tasks, which has no questions of its own. UsageError if there is no number."""
    values, better = found["results"][name], found["higher_is_better"].get(name, {})
    metrics = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr") and _is_number(value):
            error = values.get(f"{metric}_stderr,{filtered}")
            shown = metric if filtered == "none" else f"{metric} ({filtered})"
            metrics[shown] = {"value": value, "stderr": error if isinstance(error, float) else None,
                              "higher_is_better": better.get(metric)}  # fmt: skip
    if not metrics:
        raise UsageError(f"--tasks: {name} gave no number; check the metric_list of its file")
    counts, config = found["n-samples"].get(name, {}), found["configs"].get(name, {})
    return {"metrics": metrics, "questions": counts.get("effective"), "of": counts.get("original"),
            "num_fewshot": found["n-shot"].get(name), "version": found["versions"].get(name),
            "dataset": config.get("dataset_path")}  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def digest(weights: Iterable[Path]) -> str:
    """SHA-256 over the files of a model, by which a record knows whose it is."""
    total = hashlib.sha256()
    for path in weights:
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def merged(earlier: Record | None, record: Record) -> Record:
    """`record` with the tasks of an earlier one of the same weights.

    A result on all questions is not replaced by one on some.
    """
    if earlier is None or earlier["weights"] != record["weights"]:
        return record
    whole = {name for name, found in earlier["tasks"].items() if found["limit"] is None}
    tasks = {name: found for name, found in record["tasks"].items() if found["limit"] is None or name not in whole}
    return record | {"tasks": earlier["tasks"] | tasks}


def read_record(path: Path, weights: str | None = None) -> Record | None:
    """The record at `path`; None if there is none, or none of `weights`. UsageError if something else is there."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file in it")
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}): delete it and evaluate again") from error
    if not (isinstance(record, dict) and {"weights", "tasks"} <= set(record)):
        raise UsageError(f"{path} is no record of benchmarks: name another file")
    return record if weights is None or record["weights"] == weights else None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
