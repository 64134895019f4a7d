"""The report on hierarchical stretching: what the layers' spectra did, and what document 4 asked about them."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from . import spectra
from .intervals import mean, paired, single
from .measures import markdown
from .stored import Comparison


def stretching_report(model: str, comparison: Comparison) -> str:
    """Tables of one model, both optimizers."""
    parts = [
        f"### {model}\n",
        _growth_by_layer(comparison),
        _by_projection(comparison),
        _whole_run(comparison),
        _questions(comparison),
    ]
    return "\n".join(parts)


def _growth_by_layer(comparison: Comparison) -> str:
    """Growth of the spectral norm over initialization, mean over seeds, by layer."""
    columns = {}
    for arm, logs in comparison.logs.items():
        for layer in sorted(spectra.hidden(logs[0]).layer.unique()):
            growth = [spectra.norm_growth(log, lambda rows, layer=layer: rows.layer == layer) for log in logs]
            columns.setdefault(layer, {})[arm] = single(growth)
    rows = [[layer, *(_percent(found[arm]) for arm in comparison.arms)] for layer, found in columns.items()]
    return "Growth of the spectral norm over initialization:\n\n" + markdown(["layer", *comparison.arms], rows)


def _by_projection(comparison: Comparison) -> str:
    """The same by projection, and how far each stands out from the mean of the others against its seed noise."""
    rows = []
    for name in spectra.hidden(next(iter(comparison.logs.values()))[0]).projection.unique():
        cells = [name]
        for logs in comparison.logs.values():
            chosen = [spectra.norm_growth(log, spectra.is_projection(name)) for log in logs]
            others = [spectra.norm_growth(log, lambda rows, name=name: rows.projection != name) for log in logs]
            apart = paired(chosen, others)
            cells += [_percent(single(chosen)), f"{apart['difference']:+.1%} (p={apart['p']:.2g})"]
        rows.append(cells)
    header = ["projection"]
    for arm in comparison.arms:
        header += [arm, f"{arm} against the others"]
    note = f"The {len(rows) * len(comparison.arms)} p-values are not corrected for their number.\n"
    return "By projection:\n\n" + markdown(header, rows) + "\n" + note


def _whole_run(comparison: Comparison) -> str:
    measures = {
        "final spectral norm": lambda log: spectra.of_last_step(log, "spectral_norm"),
        "final spectral gap": lambda log: spectra.of_last_step(log, "spectral_gap"),
        "change of the gap, last third": spectra.gap_change,
        "final spectral entropy": lambda log: spectra.of_last_step(log, "spectral_entropy"),
        "change of the entropy": lambda log: spectra.change(log, "spectral_entropy"),
        "flatness of the spectrum": spectra.flatness,
        "growth over the sum of the updates' norms": lambda log: spectra.growth_over_bound(log)[0],
        "the same, second half minus first": lambda log: spectra.growth_over_bound(log)[1],
        "energy of updates in the top-5 subspace": lambda log: spectra.of_updates(log, "update_energy_in_top_k"),
    }
    rows = []
    for title, measure in measures.items():
        values = {arm: [measure(log) for log in logs] for arm, logs in comparison.logs.items()}
        difference = paired(values["muon"], values["adamw"])
        rows.append([title, *(mean(values[arm]) for arm in comparison.arms), difference])
    return "Over all matrices:\n\n" + markdown(["", *comparison.arms, "Muon minus AdamW, 95%"], rows)


def _questions(comparison: Comparison) -> str:
    """Document 4's: where and when entropy falls under either optimizer, and whether stretching goes with the loss."""
    rows = []
    for arm, logs in comparison.logs.items():
        found = [spectra.collapse_step(log) for log in logs]
        for layer in found[0]:
            rows.append([arm, layer, _steps([one[layer] for one in found], [_first_log(log) for log in logs])])
    text = (
        "First logged step at which a layer's mean entropy is 0.01 below its initial value, by seed (it fell between "
        "that log and the one before):\n\n"
    )
    return text + markdown(["optimizer", "layer", "steps"], rows) + "\n" + _relation_to_loss(comparison)


def _relation_to_loss(comparison: Comparison) -> str:
    """Correlation over the evaluations of a run between its spectral norms and its validation loss."""
    cells = []
    for arm, logs in comparison.logs.items():
        pairs = zip(logs, comparison.arms[arm], strict=True)
        cells.append(f"{arm} {mean([_correlation(log, record) for log, record in pairs]):+.2f}")
    return (
        f"Correlation of the mean spectral norm with the validation loss along a run: {', '.join(cells)}. Norms grow "
        "and losses fall along every run: two such series correlate whatever links them, so this shows no influence "
        "of one on the other.\n"
    )


def _correlation(log: pd.DataFrame, record: Mapping) -> float:
    """Spearman's, of the validation losses and the norms at their steps, between logs by linear interpolation."""
    norms = spectra.hidden(log).groupby("step").spectral_norm.mean()
    at_losses = np.interp(record["eval_steps"], norms.index, norms)
    return float(stats.spearmanr(at_losses, record["eval_losses"]).statistic)


def _percent(found: Mapping) -> str:
    low, high = found["interval"]
    return f"{found['mean']:+.1%} [{low:+.1%}, {high:+.1%}]"


def _first_log(log: pd.DataFrame) -> int:
    """The first logged step of training: what happened before it shows only there."""
    return int(log.step[log.step > 0].min())


def _steps(steps: Sequence[int | None], first: Sequence[int]) -> str:
    told = {None: "never"}
    return ", ".join(
        f"at or before {step}" if step == start else told.get(step, str(step))
        for step, start in zip(steps, first, strict=True)
    )
