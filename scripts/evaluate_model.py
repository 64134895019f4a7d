"""Measure a trained model on the benchmarks of lm-evaluation-harness.

python scripts/evaluate_model.py --model results/NAME --tasks hellaswag arc_easy arc_challenge gsm8k
python scripts/evaluate_model.py --model USER/NAME@REVISION --tasks my_task.yaml

(needs: pip install lm-eval.) A task's YAML says what it is: see the task guide of lm-evaluation-harness; files that it
names are looked for from the current folder. The results go to benchmarks.json in the folder of the model, from where
push_to_hub.py takes them into the model card, or to --output.
"""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from blueberry.benchmarks import FILE, digest, merged, read_record, run_benchmarks
from blueberry.errors import OneLineParser, UsageError, run_script


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a run or model, or Hub id, ID@REVISION")
    parser.add_argument("--tasks", required=True, nargs="+", help="names, or YAML files")
    parser.add_argument(
        "--num_fewshot", type=int, help="examples before each question; default: the task's own number"
    )
    parser.add_argument("--limit", type=int, help="questions of each task; such results go into no card")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--output", type=Path, help=f"default: {FILE} in the folder, results/benchmarks/ for a Hub id")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the modeling code of the model's author")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    output = arguments.output or default_output(arguments.model)
    check(arguments)
    read_record(output)  # before all the work: something else may be there
    import torch

    from blueberry.training.loading import load_model, load_tokenizer
    from blueberry.training.run_folder import write_json
    from hub.run import weights_of

    trust = {"trust_remote_code": arguments.trust_remote_code}
    model = load_model(arguments.model, **trust).to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(arguments.model, **trust)
    record = run_benchmarks(model, tokenizer, arguments.tasks, num_fewshot=arguments.num_fewshot,
                            limit=arguments.limit, batch_size=arguments.batch_size)  # fmt: skip
    folder = Path(arguments.model)
    weights = digest(weights_of(folder)) if folder.is_dir() else model.config._commit_hash
    record |= {"model": folder.name if folder.is_dir() else arguments.model, "weights": weights}
    stored = merged(read_record(output), record)
    write_json(output, stored)
    print(as_table(record))
    if kept := [task for task, found in record["tasks"].items() if stored["tasks"][task] != found]:
        print(f"\nresults on all questions stay in the record: {', '.join(kept)}")
    print(f"\n{output}")


def check(arguments: argparse.Namespace) -> None:
    """What can be said before anything is loaded."""
    for name, least in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UsageError(f"--{name} {value}: must be at least {least}")
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("lm-evaluation-harness is not installed: pip install lm-eval")


def default_output(model: str) -> Path:
    folder = Path(model)
    return folder / FILE if folder.is_dir() else Path("results/benchmarks") / f"{model.replace('/', '--')}.json"


def as_table(record: dict[str, Any]) -> str:
    """One line for each metric."""
    lines = []
    for task, found in record["tasks"].items():
        for metric, numbers in found["metrics"].items():
            error = "" if numbers["stderr"] is None else f" +- {numbers['stderr']:.4f}"
            count = "" if found["questions"] is None else f"  {found['questions']} of {found['of']} questions"
            lines.append(f"{task:24} {metric:20} {numbers['value']:.4f}{error}{count}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
