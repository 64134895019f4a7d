"""The claims of the original documents, each with its measure, and the rule by which it holds.

The rule: a claim is a statement about a number that is measured once for each seed (or, for times, once for each
round). It holds if the whole 95% interval of the mean satisfies the statement, it does not hold if the whole interval
violates it, else it is not decided. A bound that must be kept everywhere holds if all that was seen keeps it, and does
not hold otherwise. On several models a claim holds if it holds on each, and does not hold if it fails on one.
The rule was committed before the runs that it is applied to; `CHANGES` lists what was altered since.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from benchmarks.common import Record

from blueberry.errors import UsageError

from . import spectra
from .intervals import FAILS, HOLDS, OPEN, mean, paired, single, variance_ratio, verdict_of
from .measures import interaction, losses_of, tokens_to
from .sensitivity import read_sensitivity
from .stored import Comparison, read_baseline, read_comparison, read_results


@dataclass(frozen=True)
class Finding:
    """One claim on one model."""

    claim: str  # id
    model: str
    measure: str  # what `value` is
    value: float
    interval: list[float]
    needed: tuple[float, float]  # the claim says that the value lies between these
    n: int
    commit: str
    note: str = ""
    everywhere: bool = False  # `interval` is the range of all that was seen, none of which may lie outside

    @property
    def verdict(self) -> str:
        return verdict_of(self.interval, self.needed, self.everywhere)


@dataclass
class Claim:
    """A claim and what was found about it."""

    id: str
    text: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def deciding(self) -> Finding | None:
        """Of several models the first whose verdict is the claim's: one that fails, else one that is open."""
        by_verdict = {finding.verdict: finding for finding in reversed(self.findings)}
        return next((by_verdict[verdict] for verdict in (FAILS, OPEN, HOLDS) if verdict in by_verdict), None)

    @property
    def verdict(self) -> str:
        return self.deciding.verdict if self.deciding else OPEN


CLAIMS = {
    "1_muon_beats_adamw": "Muon beats tuned AdamW at equal tokens",
    "1_seventy_percent_of_tokens": "Muon reaches tuned AdamW's final loss with at most 70% of its tokens",
    "2_adamw_larger_spectral_norms": "AdamW's weights have larger spectral norms",
    "3_adamw_entropy_falls": "AdamW's weights lose spectral entropy",
    "3_muon_keeps_entropy": "Muon keeps spectral entropy that AdamW loses",
    "4_adamw_updates_align": "AdamW's updates have more of their energy in the weights' top subspace",
    "5_muon_flatter_spectrum": "Muon's spectrum is flatter",
    "6_deep_layers_stretch": "Under Muon the spectral norms of deep layers grow by 20 to 40% over initialization",
    "6_deeper_is_more": "Under Muon deep layers stretch more than shallow ones",
    "6_v_faster_than_q": "Under Muon V stretches more than Q",
    "6_gap_grows": "Under Muon the spectral gap of deep layers grows",
    "7_sublinear_growth": "Under Muon the spectral norm grows by less than half of the sum of the updates' norms",
    "8_momentum_matters": "Without momentum Muon's loss is worse",
    "8_newton_schulz_matters": "Without Newton-Schulz Muon's loss is worse",
    "8_synergy": "Momentum and Newton-Schulz help one another",
    "9_muon_more_robust": "Muon tolerates a wider range of learning rates than AdamW (loss within 1% of its best)",
    "10_newton_schulz_is_cheap": "Newton-Schulz takes less than a tenth of a training step",
    "11_constraint_holds": "Manifold Muon keeps norm_F(W^T W - I) below 1e-4 throughout",
    "11_singular_values": "Manifold Muon's singular values lie in [0.9999, 1.0001]",
    "11_overhead": "Manifold Muon's optimizer takes less than 20% of a training step",
    "11_loss": "Manifold Muon's loss is at least as good as AdamW's",
    "12_muon_varies_less": "Muon's loss varies less between seeds",
}
BELOW_0, ABOVE_0 = (-math.inf, 0.0), (0.0, math.inf)
OWN_THRESHOLDS = (
    "No document gives the 70% of claim 1, the half of claim 7, the 1% of claim 9 and the tenth of claim 10: they are "
    "this project's."
)
CHANGES = (
    "A bound that must be kept everywhere (claim 11) went through the rule for intervals: one broken constraint among "
    "kept ones came out as not decided. Now it does not hold.",
    "Claim 7 counted the updates before the first logged one as a ramp from 0, which made the first half of a run's "
    "ratio too large: now they count as large as the first logged one.",
    "Deep and shallow layers (claim 6) were parted by relative depth, which gave unequal numbers of layers at some "
    "depths (not at these models' 3 and 6): now both are a third of the layers, rounded down.",
    "Experiment 5's table judged by the mean alone whether manifold Muon is not above AdamW: now by the interval, as "
    "the claims are.",
    "Claims 8 and 9 are computed from the records; before, from what the experiments had computed from them.",
)


def judged(folder: Path) -> list[Claim]:
    """Every claim with what the results in `folder` say about it. UsageError when results do not belong together."""
    claims = {name: Claim(name, text) for name, text in CLAIMS.items()}
    for finding in [*_baseline(folder), *_ablation(folder), *_sensitivity(folder), *_overhead(folder),
                    *_manifold(folder)]:  # fmt: skip
        claims[finding.claim].findings.append(finding)
    return list(claims.values())


def _baseline(folder: Path) -> Iterator[Finding]:
    """Experiment 1: claims 1 to 7 and 12."""
    for model, comparison in read_baseline(folder).items():
        yield from _losses(model, comparison)
        yield from _optimizers_differ(model, comparison)
        yield from _stretching(model, comparison)


def _losses(model: str, comparison: Comparison) -> Iterator[Finding]:
    losses = losses_of(comparison.arms)
    difference = paired(losses["muon"], losses["adamw"])
    yield _found("1_muon_beats_adamw", model, "validation loss, Muon minus AdamW", difference, BELOW_0, comparison)
    pairs = zip(comparison.arms["muon"], losses["adamw"], strict=True)
    needed = [(tokens_to(record, loss), record["tokens"]) for record, loss in pairs]
    share = single([1.0 if tokens is None else tokens / whole for tokens, whole in needed])
    never = sum(tokens is None for tokens, _ in needed)
    note = f"{never} of {len(needed)} never reached it and count as 1" if never else ""
    what = "share of its tokens after which Muon has AdamW's final loss"
    yield _found("1_seventy_percent_of_tokens", model, what, share, (0.0, 0.7), comparison, note)
    ratio = variance_ratio(losses["muon"], losses["adamw"])
    what = "variance of the final loss over seeds, Muon over AdamW"
    yield _found("12_muon_varies_less", model, what, ratio, (0.0, 1.0), comparison)


def _optimizers_differ(model: str, comparison: Comparison) -> Iterator[Finding]:
    """Spectra of AdamW's runs against Muon's of the same seed."""
    adamw, muon = comparison.logs["adamw"], comparison.logs["muon"]

    def difference(measure: Callable) -> Record:
        return paired([measure(log) for log in adamw], [measure(log) for log in muon])

    norm = difference(lambda log: spectra.of_last_step(log, "spectral_norm"))
    what = "mean final spectral norm, AdamW minus Muon"
    yield _found("2_adamw_larger_spectral_norms", model, what, norm, ABOVE_0, comparison)
    fall = single([spectra.change(log, "spectral_entropy") for log in adamw])
    what = "mean change of the spectral entropy under AdamW"
    yield _found("3_adamw_entropy_falls", model, what, fall, BELOW_0, comparison)
    entropy = difference(lambda log: spectra.change(log, "spectral_entropy"))
    what = "mean change of the spectral entropy, AdamW minus Muon"
    yield _found("3_muon_keeps_entropy", model, what, entropy, BELOW_0, comparison)
    energy = difference(lambda log: spectra.of_updates(log, "update_energy_in_top_k"))
    alignment = difference(lambda log: spectra.of_updates(log, "update_alignment"))
    note = f"alignment of the top subspaces: {alignment['difference']:+.3g} {_shown(alignment['interval'])}"
    what = "energy of updates in the weights' top-5 subspace, AdamW minus Muon"
    yield _found("4_adamw_updates_align", model, what, energy, ABOVE_0, comparison, note)
    flat = difference(spectra.flatness)
    what = "nuclear norm over sqrt(rank) Frobenius norm, AdamW minus Muon"
    yield _found("5_muon_flatter_spectrum", model, what, flat, BELOW_0, comparison)


def _stretching(model: str, comparison: Comparison) -> Iterator[Finding]:
    """Muon's runs against their own initialization."""
    logs = comparison.logs["muon"]
    deep = [spectra.norm_growth(log, spectra.is_deep) for log in logs]
    shallow = [spectra.norm_growth(log, spectra.is_shallow) for log in logs]
    what = "growth of the spectral norm, last third of the layers"
    yield _found("6_deep_layers_stretch", model, what, single(deep), (0.2, 0.4), comparison)
    what = "growth of the spectral norm, last minus first third of the layers"
    yield _found("6_deeper_is_more", model, what, paired(deep, shallow), ABOVE_0, comparison)
    v, q = ([spectra.norm_growth(log, spectra.is_projection(name)) for log in logs] for name in ("v_proj", "q_proj"))
    what = "growth of the spectral norm, V minus Q"
    yield _found("6_v_faster_than_q", model, what, paired(v, q), ABOVE_0, comparison)
    gap = single([spectra.gap_change(log) for log in logs])
    what = "change of the spectral gap, last third of the layers"
    yield _found("6_gap_grows", model, what, gap, ABOVE_0, comparison)
    shares, halves = zip(*(spectra.growth_over_bound(log) for log in logs), strict=True)
    note = f"second half minus first half of the run: {mean(halves):+.3g}"
    what = "growth of the spectral norm over the sum of the updates' norms"
    yield _found("7_sublinear_growth", model, what, single(shares), (-math.inf, 0.5), comparison, note)


def _ablation(folder: Path) -> Iterator[Finding]:
    result = read_results(folder, "experiment_2")
    if result is None:
        return
    comparison = read_comparison(folder, result, "experiment_2")
    losses = losses_of(comparison.arms)
    model = comparison.arms["full"][0]["run"]["model_name"]
    for claim, arm in (("8_momentum_matters", "no momentum"), ("8_newton_schulz_matters", "no Newton-Schulz")):
        what, difference = f"validation loss, {arm} minus full", paired(losses[arm], losses["full"])
        yield _found(claim, model, what, difference, ABOVE_0, comparison)
    what = "what Newton-Schulz gains without momentum minus what it gains with it"
    yield _found("8_synergy", model, what, interaction(losses), BELOW_0, comparison)


def _sensitivity(folder: Path) -> Iterator[Finding]:
    result = read_results(folder, "experiment_3")
    if result is None:
        return
    found = read_sensitivity(folder, result.get("runs", {}))
    ranges = {optimizer: found.ranges_by_seed(optimizer) for optimizer in found.learning_rates}
    octaves = {optimizer: [math.log2(one["ratio"]) for one in some] for optimizer, some in ranges.items()}
    difference = paired(octaves["muon"], octaves["adamw"])
    ends = [optimizer for optimizer, some in ranges.items() if any(one["reaches_the_end"] for one in some)]
    note = f"the range of {' and '.join(ends)} reaches the end of the grid" if ends else ""
    yield Finding("9_muon_more_robust", found.model, "range of learning rates in octaves, Muon minus AdamW",
                  difference["difference"], difference["interval"], ABOVE_0, difference["n"], found.commit,
                  note)  # fmt: skip


def _overhead(folder: Path) -> Iterator[Finding]:
    result = read_results(folder, "experiment_4")
    timed = {row["model"] for row in result["rows"] if row["arm"] == "muon, default"} if result else set()
    if result and (missing := set(read_baseline(folder)) - timed):
        raise UsageError(f"experiment_4 misses Muon's times on {missing.pop()}, which experiment_1 has: run it again")
    for row in result["rows"] if result else []:
        if row["arm"] == "muon, default":
            share = single(row["newton_schulz_of_steps"])
            note = f"{row['newton_schulz_of_optimizer']:.0%} of the optimizer's time"
            yield Finding("10_newton_schulz_is_cheap", row["model"], "share of the step in Newton-Schulz",
                          share["mean"], share["interval"], (0.0, 0.1), share["n"], result["versions"]["commit"],
                          note)  # fmt: skip


def _manifold(folder: Path) -> Iterator[Finding]:
    result = read_results(folder, "experiment_5")
    if result is None:
        return
    comparison = read_comparison(folder, result, "experiment_5")
    comparison.check_threads()
    records = comparison.arms["manifold"]
    model = records[0]["run"]["model_name"]
    worst = [record["max_violation"]["stiefel_muon"] for record in records]
    yield _extreme("11_constraint_holds", model, "largest constraint error", worst, (0.0, 1e-4), comparison)
    ends = [record[name] for record in records for name in ("sigma_min", "sigma_max")]
    yield _extreme("11_singular_values", model, "singular values", ends, (0.9999, 1.0001), comparison)
    share = single([record["time"]["optimizer_step_ms"] / record["time"]["step_ms"] for record in records])
    yield _found("11_overhead", model, "share of the step in the optimizer", share, (0.0, 0.2), comparison)
    losses = losses_of(comparison.arms)
    difference = paired(losses["manifold"], losses["adamw"])
    yield _found("11_loss", model, "validation loss, manifold Muon minus AdamW", difference, BELOW_0, comparison)


def _extreme(
    claim: str, model: str, what: str, values: Sequence[float], needed: tuple[float, float], comparison: Comparison
) -> Finding:
    """Of a bound that must hold everywhere: the range of what was seen takes the place of the interval."""
    seen = [float(np.min(values)), float(np.max(values))]  # of NaN NaN, unlike Python's own
    return Finding(claim, model, what, seen[1], seen, needed, comparison.n, comparison.commit, "range seen",
                   everywhere=True)  # fmt: skip


def _found(
    claim: str, model: str, what: str, found: Record, needed: tuple[float, float], comparison: Comparison,
    note: str = "",
) -> Finding:  # fmt: skip
    value = next(found[name] for name in ("difference", "mean", "ratio") if name in found)
    if comparison.at_the_edge:
        edge = f"the best learning rate of {' and '.join(comparison.at_the_edge)} was the last one tried"
        note = f"{note}; {edge}" if note else edge
    return Finding(claim, model, what, value, found["interval"], needed, comparison.n, comparison.commit, note)


def _shown(interval: Sequence[float]) -> str:
    return f"[{interval[0]:+.3g}, {interval[1]:+.3g}]"
