"""Measure Blueberry against its peers: both in one process, interleaved, medians. JSON lines on stdout.

python scripts/benchmark.py optimizer [--set dense|moe] [--loss] [--repeats 7] [--threads N]
python scripts/benchmark.py model [--part training|...]
python scripts/benchmark.py spectral [--preset blueberry-88m] [--part log|weightwatcher|overhead]
python scripts/benchmark.py manifold [--part objective|reference|share]
python scripts/benchmark.py distributed [--set dense|moe]
python scripts/benchmark.py checkpoints [--preset blueberry-88m]
"""

import argparse
import json
from importlib import import_module

from blueberry.errors import OneLineParser, UsageError, run_script

# Each a module of scripts/benchmarks with `add_arguments` and `run`.
BENCHMARKS = ("optimizer", "model", "spectral", "manifold", "distributed", "checkpoints")


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        import torch

        torch.set_num_threads(arguments.threads)
    for record in import_module(f"benchmarks.{arguments.what}").run(arguments):
        print(json.dumps(record), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    subparsers = parser.add_subparsers(dest="what", required=True)
    for name in BENCHMARKS:
        module = import_module(f"benchmarks.{name}")
        subparser = subparsers.add_parser(name, help=module.__doc__, description=module.__doc__)
        subparser.add_argument("--repeats", type=int, default=7)
        subparser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
        module.add_arguments(subparser)
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        raise UsageError(f"--repeats {arguments.repeats} measures nothing: at least 1, 7 for a median worth quoting")
    return arguments


if __name__ == "__main__":
    run_script(main)
