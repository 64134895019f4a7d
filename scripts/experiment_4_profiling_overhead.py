"""Experiment 4: what Newton-Schulz costs, by model size and number of steps, and whether it pays.

    python scripts/experiment_4_profiling_overhead.py --scale cpu

Times a few training steps of each model with AdamW and with Muon at 3, 5 and 7 Newton-Schulz steps of `keller_jordan`
and at the default, in turns: its share of the optimizer and of the step, and the memory of the optimizer's state. One
step of each goes through torch.profiler (kernels by time; chrome traces, of some megabytes each, in traces/). With
experiment 1's records in the same folder, also the training time to AdamW's final loss. Results go to
results/experiments/SCALE/experiment_4. Run it alone on the machine.
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarks.common import Record, device
from experiments.drawings import draw
from experiments.intervals import mean
from experiments.measures import made_with, markdown, shown, tokens_to
from experiments.runs import versions
from experiments.scales import Plan, parse_plan
from experiments.stored import Comparison, read_baseline
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from blueberry import BlueberryConfig, BlueberryForCausalLM
from blueberry.errors import run_script
from blueberry.optim import build_optimizer
from blueberry.optim.phases import PhaseClock, now
from blueberry.training.run_folder import write_json

NAME = "experiment_4"
ARMS = {
    "adamw": {"optimizer": "adamw"},
    "muon, 3 steps": {"coefficients": "keller_jordan", "ns_steps": 3},
    "muon, 5 steps": {"coefficients": "keller_jordan", "ns_steps": 5},
    "muon, 7 steps": {"coefficients": "keller_jordan", "ns_steps": 7},
    "muon, default": {},
}
ROUNDS = 7
KERNELS = 8  # of each profile, the longest


@dataclass
class Trainee:
    """A model with its optimizer, and the times of its steps."""

    model: nn.Module
    optimizer: Optimizer
    steps: list[dict[str, float]]  # seconds of each part


def main() -> None:
    plan = parse_plan(__doc__)
    folder = plan.folder(NAME)
    needed = {model: cost_benefit(found) for model, found in read_baseline(plan.laboratory.folder).items()}
    rows = [row for model in plan.scale.models for row in profile_model(plan, model, folder)]
    results = {
        "rows": rows,
        "time_to_adamws_loss": needed,
        "rounds": ROUNDS,
        "versions": versions(),
    }
    write_json(folder / f"{NAME}_results.json", results)
    draw(NAME, plan.laboratory.folder)
    (folder / f"{NAME}.md").write_text(table := as_markdown(results, plan))
    print(f"\n{table}")


def profile_model(plan: Plan, name: str, folder: Path) -> Iterator[Record]:
    """One row for each arm: medians over interleaved rounds, after one of warm-up."""
    tokens = torch.randint(plan.scale.models[name]["vocab_size"], (plan.scale.batch, plan.scale.length))
    tokens = tokens.to(device())
    trainees = {arm: _trainee(plan, name, settings) for arm, settings in ARMS.items()}
    for round_number in range(ROUNDS + 1):
        for trainee in trainees.values():
            seconds = _timed_step(plan, trainee, tokens)
            if round_number:
                trainee.steps.append(seconds)
    for arm, trainee in trainees.items():
        trace = folder / "traces" / f"{name}-{arm.replace(', ', '-').replace(' ', '_')}.json.gz"
        kernels = _profiled_step(plan, trainee, tokens, trace)
        yield {"model": name, "parameters": sum(p.numel() for p in trainee.model.parameters()), "arm": arm,
               **_shares(trainee), "kernels": kernels, "trace": trace.name}  # fmt: skip


def _trainee(plan: Plan, name: str, settings: Record) -> Trainee:
    torch.manual_seed(0)
    model = BlueberryForCausalLM(BlueberryConfig(**plan.scale.models[name])).to(device()).train()
    return Trainee(model, build_optimizer(model, **settings), [])


def _timed_step(plan: Plan, trainee: Trainee, tokens: Tensor) -> dict[str, float]:
    start = now()
    with torch.autocast(device().type, torch.bfloat16, enabled=plan.bf16):
        loss = trainee.model(input_ids=tokens, labels=tokens, skip_logits=True).loss
    forward = now()
    loss.backward()
    backward = now()
    clock = PhaseClock(trainee.optimizer)
    clock.start()
    trainee.optimizer.step()
    clock.stop()
    end = now()
    trainee.optimizer.zero_grad()
    return {"forward": forward - start, "backward": backward - forward, "optimizer": end - backward,
            "newton_schulz": clock.seconds.get("newton_schulz", 0.0), "step": end - start}  # fmt: skip


def _shares(trainee: Trainee) -> Record:
    seconds = {part: statistics.median(step[part] for step in trainee.steps) for part in trainee.steps[0]}
    state = (value for some in trainee.optimizer.state_dict()["state"].values() for value in some.values())
    size = sum(value.nbytes for value in state if isinstance(value, Tensor))
    return {
        **{f"{part}_ms": round(1000 * value, 3) for part, value in seconds.items()},
        "newton_schulz_of_optimizer": seconds["newton_schulz"] / seconds["optimizer"],
        "newton_schulz_of_step": seconds["newton_schulz"] / seconds["step"],
        "optimizer_of_step": seconds["optimizer"] / seconds["step"],
        "newton_schulz_of_steps": [step["newton_schulz"] / step["step"] for step in trainee.steps],
        "state_mib": round(size / 2**20, 2),
    }


def _profiled_step(plan: Plan, trainee: Trainee, tokens: Tensor, trace: Path) -> list[Record]:
    """The longest kernels of one step, by their own time; the whole goes to `trace`, for chrome://tracing."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as profiler:
        _timed_step(plan, trainee, tokens)
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    kernels = sorted(profiler.key_averages(), key=lambda k: -max(k.self_cpu_time_total, k.self_device_time_total))
    return [{"kernel": k.key, "calls": k.count, "self_ms": max(k.self_cpu_time_total, k.self_device_time_total) / 1000}
            for k in kernels[:KERNELS]]  # fmt: skip


def cost_benefit(baseline: Comparison) -> Record:
    """Seconds in training steps until AdamW's final loss, of both arms of experiment 1 (means over its seeds)."""
    baseline.check_threads()
    arms = baseline.arms
    pairs = zip(arms["muon"], arms["adamw"], strict=True)
    seconds = [_seconds_to(record, goal["eval_loss"]) for record, goal in pairs]
    return {
        "adamw": mean([_seconds_to(record, record["eval_loss"]) for record in arms["adamw"]]),
        "muon": None if None in seconds else mean(seconds),
        "n": len(seconds),
        "made_with": made_with([record for records in arms.values() for record in records]),
    }


def _seconds_to(record: Record, loss: float) -> float | None:
    tokens = tokens_to(record, loss)
    steps = None if tokens is None else tokens / record["tokens"] * record["run"]["steps"]
    return None if steps is None else steps * record["time"]["step_ms"] / 1000


def as_markdown(results: Record, plan: Plan) -> str:
    header = [
        "model",
        "arm",
        "step, ms",
        "optimizer, ms",
        "Newton-Schulz of the optimizer",
        "of the step",
        "state, MiB",
    ]
    rows = [[row["model"], row["arm"], row["step_ms"], row["optimizer_ms"], f"{row['newton_schulz_of_optimizer']:.0%}",
             f"{row['newton_schulz_of_step']:.1%}", row["state_mib"]] for row in results["rows"]]  # fmt: skip
    made = results["versions"]
    text = markdown(header, rows) + (
        f"\n{plan.scale.batch} x {plan.scale.length} tokens a step, n={results['rounds']}: medians; "
        f"{made['device']}, threads: {made['threads']}, torch {made['torch']}, commit {made['commit']}. "
        "The chrome traces that the results name lie in traces/ of the machine that made them: they are too large to "
        "be committed.\n"
    )
    for model, needed in results["time_to_adamws_loss"].items():
        muon = "never" if needed["muon"] is None else f"{shown(needed['muon'])} s"
        text += (
            f"\nTo AdamW's final loss on {model}: AdamW {shown(needed['adamw'])} s, Muon {muon} (n={needed['n']}, by "
            f"the steps of experiment 1: {needed['made_with']}).\n"
        )
    return text


if __name__ == "__main__":
    run_script(main)
