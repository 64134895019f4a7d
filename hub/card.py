"""The model card of a run: one dataclass, filled from the run's files, and one template."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from blueberry.errors import UsageError

from .remote_code import MODEL_TYPE
from .run import Run
from .spectra import Spectra, spectra_of

TEMPLATE = Path(__file__).with_name("card_template.md")
SOTU = "the State of the Union addresses (US public domain, collected by the American Presidency Project)"
# Figures shown in the card, of those that were drawn, with their captions.
FIGURES = {
    "spectral_norm_evolution.png": "Spectral norm of every layer over training",
    "norm_heatmap.png": "Spectral norm by layer and step",
    "spectral_entropy.png": "Spectral entropy over training",
    "update_alignment.png": "Alignment of updates with weights over training",
}
_METRICS = {  # of eval_results.json: name in the card, name of the metric on the Hub, digits
    "eval_loss": ("validation loss (nats per token)", "loss", 4),
    "eval_unigram_loss": ("loss of a unigram model of the same text", None, 4),
    "eval_perplexity": ("perplexity", "perplexity", 2),
    "eval_accuracy": ("next-token accuracy", "accuracy", 4),
    "eval_bits_per_byte": ("bits per byte", "bits_per_byte", 4),
}
_SIZES = {  # of config.json
    "vocab_size": "vocabulary", "hidden_size": "hidden size", "num_hidden_layers": "layers",
    "num_attention_heads": "attention heads", "num_key_value_heads": "key and value heads",
    "max_position_embeddings": "positions",
}  # fmt: skip
_OPTIMIZERS = {"muon": "Muon and AdamW", "manifold": "manifold Muon and AdamW", "adamw": "AdamW"}
_RATES = {"muon": ("muon_lr", "adamw_lr"), "manifold": ("muon_lr", "adamw_lr"), "adamw": ("adamw_lr",)}


@dataclass(frozen=True)
class RunCard:
    """Everything that the template shows."""

    repo_id: str
    title: str
    summary: str
    remote_code: bool
    loading: str
    tokenizer: bool
    prompt: str
    architecture: dict[str, str]
    data: str
    training: dict[str, str]
    audit: bool
    tensorboard: bool
    results_header: str
    results: dict[str, str]
    limitations: str
    licence: str
    version: str
    base: str | None = None  # of an adapter, and whether it is a folder, of Blueberry, not on the Hub
    base_is_local: bool = False
    base_is_blueberry: bool = False
    benchmarks: list[tuple[str, ...]] = field(default_factory=list)
    spectra: Spectra | None = None
    figures: dict[str, str] = field(default_factory=dict)

    def render(self, metadata: ModelCardData) -> str:
        """The whole card; Markdown with a YAML header."""
        fields = asdict(self) | {"spectra": self.spectra}
        return ModelCard.from_template(metadata, template_path=str(TEMPLATE), **fields).content


def card_of(runs: Sequence[Run], repo_id: str, licence: str, figures: Sequence[str] = ()) -> str:
    """The card of the first run; the others are its other seeds, for the intervals of the results.

    repo_id: where the model can be loaded from. figures: names of the files in figures/.
    """
    check_seeds(runs)
    run = runs[0]
    card = RunCard(
        repo_id=repo_id,
        title=repo_id.split("/")[-1],
        summary=_summary(run),
        remote_code=run.config.get("model_type") == MODEL_TYPE,
        loading=loading(run, repo_id),
        tokenizer=(run.folder / "tokenizer.json").is_file(),
        prompt="My fellow citizens," if _dataset(run) == "sotu" else "The",
        architecture=_architecture(run),
        data=_data(run),
        training=_training(run),
        audit=bool(run.audit),
        tensorboard=(run.folder / "runs").is_dir(),
        results_header=_results_header(runs),
        results={_METRICS[name][0]: text for name, text in _results(runs).items()},
        limitations=_limitations(run),
        licence=f"The weights: {licence}. " + _data_licence(run),
        version=_version(run),
        base=run.base if run.is_adapter else None,
        base_is_local=run.is_adapter and run.base_is_local,
        base_is_blueberry=run.is_adapter and run.provenance.get("model_type") == MODEL_TYPE,
        benchmarks=_benchmarks(run),
        spectra=spectra_of(run.spectral_log),
        figures={name: caption for name, caption in FIGURES.items() if name in figures},
    )
    return card.render(_metadata(run, repo_id, licence))


def loading(run: Run, repo_id: str) -> str:
    """The expression that makes the model."""
    if not run.is_adapter:
        return _from_pretrained(repo_id, None, run.config.get("model_type") == MODEL_TYPE)
    code_on_hub = run.provenance.get("model_type") == MODEL_TYPE and not run.base_is_local
    needs_code = code_on_hub or bool(run.settings.get("trust_remote_code"))
    base = _from_pretrained(run.base, run.config.get("revision"), needs_code)
    return f'PeftModel.from_pretrained({base}, "{repo_id}")'


def _from_pretrained(name: str, revision: str | None, needs_code: bool) -> str:
    more = f', revision="{revision}"' if revision else ""
    more += ", trust_remote_code=True" if needs_code else ""
    return f'AutoModelForCausalLM.from_pretrained("{name}"{more})'


def check_seeds(runs: Sequence[Run]) -> None:
    """Runs that are seeds of one another differ in nothing else."""
    for other in runs[1:]:
        settings = runs[0].settings.keys() | other.settings.keys()
        differing = sorted(k for k in settings - {"seed"} if runs[0].settings.get(k) != other.settings.get(k))
        if differing:
            raise UsageError(f"--run {runs[0].folder},{other.folder}: no seeds of one another, {differing[0]} differs")
    seeds = [run.settings.get("seed") for run in runs]
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--run: two of these runs have the same seed ({', '.join(map(str, seeds))}); leave one out")


def _dataset(run: Run) -> str:
    return run.provenance.get("dataset") or Path(str(run.settings.get("dataset", "unknown"))).name


def _is_on_hub(run: Run) -> bool:
    """Whether the data set is one that others can name."""
    return "/" in _dataset(run) and not _dataset(run).startswith(("/", ".", "~"))


def _kind(run: Run) -> str:
    experts = run.config.get("num_experts")
    if not experts:
        return "dense decoder"
    return f"mixture of experts ({run.config.get('num_experts_per_tok')} of {experts} for each token)"


def _summary(run: Run) -> str:
    tokens = run.provenance.get("tokens") or run.settings.get("train_tokens")
    seen = f" on {tokens:,} tokens of" if tokens else " on"
    if run.is_adapter:
        return (f"A LoRA adapter of {run.parameters:,} parameters to {run.base}, trained{seen} {_dataset(run)} with "
                f"{_OPTIMIZERS[run.settings.get('optimizer', 'muon')]}.")  # fmt: skip
    how = {"muon": "with Muon (hidden matrices) and AdamW (the rest)", "adamw": "with AdamW",
           "manifold": "with manifold Muon: its hidden matrices are orthonormal"}  # fmt: skip
    return (f"A language model of {run.parameters / 1e6:.1f}M parameters, a {_kind(run)}, trained from scratch{seen} "
            f"{_dataset(run)} {how[run.settings.get('optimizer', 'muon')]}. It continues text; it was not taught to "
            "follow instructions.")  # fmt: skip


def _architecture(run: Run) -> dict[str, str]:
    config = run.config
    if run.is_adapter:
        reached = [*config["target_modules"], *(config.get("target_parameters") or [])]
        return {"type": f"{config['peft_type']} of rank {config['r']}, alpha {config['lora_alpha']:g}",
                "base model": run.base, "reaches": ", ".join(sorted(reached)),
                "parameters": f"{run.parameters:,}"}  # fmt: skip
    rows = {"type": f"{_architecture_name(config)}, a {_kind(run)}", "parameters": f"{run.parameters:,}"}
    if config.get("num_experts"):
        rows["parameters that a token meets"] = f"{run.active_parameters:,}"
        rows["width of an expert"] = str(config.get("moe_intermediate_size"))
    else:
        rows["width of the MLP"] = str(config.get("intermediate_size"))
    rows |= {text: str(config[name]) for name, text in _SIZES.items() if config.get(name) is not None}
    rows["activation"] = str(config.get("hidden_act"))
    rows["embeddings"] = "tied" if config.get("tie_word_embeddings") else "separate"
    return rows


def _architecture_name(config: dict[str, Any]) -> str:
    return f"`{(config.get('architectures') or [config.get('model_type')])[0]}`"


def _data(run: Run) -> str:
    made = run.provenance
    name = f"[{_dataset(run)}](https://huggingface.co/datasets/{_dataset(run)})" if _is_on_hub(run) else _dataset(run)
    if "window" not in made:
        return f"{name}."
    train = "a stream" if made["train_tokens"] is None else _count(made["train_tokens"], made["documents"])
    where = f": {SOTU}" if name == "sotu" else ""
    return (f"{name}{where}. Training on {train}; validation on "
            f"{_count(made['validation_tokens'], made['validation_documents'])} ({made['split_rule']}), split before "
            f"they were packed into windows of {made['window']} tokens.")  # fmt: skip


def _count(tokens: int, documents: int | None) -> str:
    return f"{tokens:,} tokens" + ("" if documents is None else f" of {documents:,} documents")


def _training(run: Run) -> dict[str, str]:
    settings, made = run.settings, run.provenance
    optimizer = settings.get("optimizer", "muon")
    rates = ", ".join(f"{name} {settings[name]:g}" for name in _RATES[optimizer] if name in settings)
    batch = settings.get("per_device_train_batch_size", 0) * settings.get("gradient_accumulation_steps", 1)
    rows = {
        "optimizer": "StiefelMuon for B, Muon for A"
        if run.is_adapter and optimizer == "manifold"
        else _OPTIMIZERS[optimizer],
        "routing": _routing(run),
        "learning rates": f"{rates} ({settings.get('lr_scheduler_type')}, warm-up {settings.get('warmup_steps'):g})",
        "batch": f"{batch * made.get('processes', 1)} windows a step" if batch else "",
        "steps, tokens": f"{made['steps']:,}, {made['tokens']:,}" if "steps" in made else "",
        "precision": "bf16" if settings.get("bf16") else "fp16" if settings.get("fp16") else "fp32",
        "time": f"{made['seconds']:,.0f} s" if made.get("seconds") else "",
        "hardware": _hardware(made),
        "versions": _versions(made),
        "seed": str(settings.get("seed", "")),
    }
    return {name: text for name, text in rows.items() if text}


def _hardware(made: dict[str, Any]) -> str:
    if "device" not in made:
        return ""
    processes = made["processes"]
    return f"{made['device']}, " + (f"{processes} processes" if processes > 1 else _several(made["threads"], "thread"))


def _several(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _versions(made: dict[str, Any]) -> str:
    names = ("torch", "transformers", "python")
    return ", ".join(f"{name} {made[name]}" for name in names if name in made)


def _version(run: Run) -> str:
    made = run.provenance
    commit = f", commit {made['commit']}" if made.get("commit") else ""
    return f"{made.get('blueberry', '')}{commit}".strip(", ")


def _routing(run: Run) -> str:
    """What the optimizers got, from the audit."""
    totals: dict[str, list[int]] = {}
    for row in run.audit:
        totals.setdefault(row["optimizer"], []).append(math.prod(row["shape"]))
    return "; ".join(f"{name}: {len(sizes)} tensors, {sum(sizes):,} values" for name, sizes in totals.items())


def _results_header(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return f"On the validation split, one seed ({runs[0].settings.get('seed')}), so that no interval can be given."
    seeds = ", ".join(str(run.settings.get("seed")) for run in runs)
    return (f"On the validation split, {len(runs)} seeds ({seeds}): means with 95% intervals (Student's t) over "
            f"seeds. The weights here are those of seed {runs[0].settings.get('seed')}.")  # fmt: skip


def _results(runs: Sequence[Run]) -> dict[str, str]:
    """Metric -> text, of the metrics that all runs have."""
    texts = {}
    for name, (_, _, digits) in _METRICS.items():
        values = [run.metrics[name] for run in runs if run.metrics.get(name) is not None]
        if len(values) == len(runs):
            texts[name] = f"{values[0]:.{digits}f}" if len(values) == 1 else _interval(values, digits)
    return texts


def _benchmarks(run: Run) -> list[tuple[str, ...]]:
    """Rows of task, examples before a question, metric, value with its standard error."""
    rows = []
    for task, found in run.benchmarks.items():
        shots = "" if found["num_fewshot"] is None else str(found["num_fewshot"])
        for metric, numbers in found["metrics"].items():
            error = "" if numbers["stderr"] is None else f" ± {numbers['stderr']:.4f}"
            rows.append((task, shots, metric, f"{numbers['value']:.4f}{error}"))
    return rows


def _interval(values: Sequence[float], digits: int) -> str:
    from scipy import stats

    mean, error = sum(values) / len(values), stats.sem(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=error) if error else (mean, mean)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _limitations(run: Run) -> str:
    made = run.provenance
    texts = []
    if made.get("tokens") and not run.is_adapter:
        ratio = made["tokens"] / run.parameters
        texts.append(f"It saw {ratio:.2g} tokens for each parameter (about 20 are needed to use its size well), so "
                     "its text is often neither true nor coherent.")  # fmt: skip
    if _dataset(run) == "sotu":
        texts.append("It knows the English of US presidents from 1790 on and little else, and repeats their views, "
                     "those of former centuries on peoples and persons among them.")  # fmt: skip
    else:
        texts.append(f"It repeats whatever views and errors {_dataset(run)} holds.")
    if positions := run.config.get("max_position_embeddings"):
        texts.append(f"It was not trained beyond {positions} positions.")
    texts.append("It is meant for research on optimizers and spectra, not for use on people.")
    return " ".join(texts)


def _data_licence(run: Run) -> str:
    if _dataset(run) == "sotu":
        return "The text that it was trained on is in the US public domain."
    return f"For the text that it was trained on see {_dataset(run)}."


def _metadata(run: Run, repo_id: str, licence: str) -> ModelCardData:
    experts = ["mixture-of-experts"] if run.config.get("num_experts") else []
    code = ["custom_code"] if run.config.get("model_type") == MODEL_TYPE else []
    optimizer = {"muon": ["muon"], "manifold": ["muon", "manifold-muon"], "adamw": []}
    return ModelCardData(
        language="en" if _dataset(run) == "sotu" else None,
        license=licence,
        library_name="peft" if run.is_adapter else "transformers",
        base_model=run.base if run.is_adapter and not run.base_is_local else None,
        pipeline_tag="text-generation",
        tags=["blueberry", *optimizer[run.settings.get("optimizer", "muon")], *experts, *code, "spectral-analysis"],
        datasets=[_dataset(run)] if _is_on_hub(run) else None,
        model_name=repo_id.split("/")[-1],
        eval_results=[
            EvalResult(
                task_type="text-generation", dataset_type=_dataset(run), dataset_name=_dataset(run),
                dataset_split="validation", metric_type=metric, metric_name=text,
                metric_value=round(run.metrics[name], 6),
            )
            for name, (text, metric, _) in _METRICS.items()
            if metric and run.metrics.get(name) is not None
        ],
    )  # fmt: skip


def eval_results_file(run: Run) -> bytes:
    """For `.eval_results/`: https://huggingface.co/docs/hub/eval-results."""
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    known = "" if _is_on_hub(run) else "; not a data set of the Hub"
    notes = f"validation split: {run.provenance.get('split_rule', 'held out')}{known}"
    entries = [
        EvalResultEntry(dataset_id=_dataset(run), task_id=metric, value=round(run.metrics[name], 6), notes=notes)
        for name, (_, metric, _) in _METRICS.items()
        if metric and run.metrics.get(name) is not None
    ]
    entries += [
        EvalResultEntry(dataset_id=found["dataset"], task_id=f"{task}:{metric}", value=round(numbers["value"], 6),
                        notes=f"lm-evaluation-harness, {found['num_fewshot']} examples before a question")
        for task, found in run.benchmarks.items()
        if "/" in (found["dataset"] or "")  # on the Hub
        for metric, numbers in found["metrics"].items()
    ]  # fmt: skip
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False).encode()
