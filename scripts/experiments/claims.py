"""The claims of the original documents, each with its measure, and the rule by which it holds.

The rule, fixed before any run: a claim is a statement about a number that is measured once for each seed (or, for
times, once for each round). It holds if the whole 95% interval of the mean satisfies the statement, it does not hold
if the whole interval violates it, else it is not decided. On several models it holds if it holds on each, and does not
hold if it fails on one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common import Record

from . import spectra
from .intervals import mean, paired, single, variance_ratio
from .measures import tokens_to
from .stored import Comparison, read_comparison, read_results

HOLDS, FAILS, OPEN = "holds", "does_not_hold", "not_decided"


@dataclass(frozen=True)
class Finding:
    """One claim on one model."""

    claim: str  # id
    model: str
    measure: str  # what `value` is
    value: float | None
    interval: list[float] | None
    needed: tuple[float, float]  # the claim says that the value lies between these
    n: int
    commit: str | None
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.interval is None or any(math.isnan(end) for end in self.interval):
            return OPEN
        low, high = self.interval
        if self.needed[0] <= low and high <= self.needed[1]:
            return HOLDS
        return FAILS if high < self.needed[0] or low > self.needed[1] else OPEN


@dataclass
class Claim:
    """A claim and what was found about it."""

    id: str
    text: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        verdicts = {finding.verdict for finding in self.findings}
        if FAILS in verdicts:
            return FAILS
        return HOLDS if verdicts == {HOLDS} else OPEN


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


def judged(folder: Path) -> list[Claim]:
    """Every claim with what the results in `folder` say about it. UsageError when results do not belong together."""
    claims = {name: Claim(name, text) for name, text in CLAIMS.items()}
    for finding in [*_baseline(folder), *_ablation(folder), *_sensitivity(folder), *_overhead(folder),
                    *_manifold(folder)]:  # fmt: skip
        claims[finding.claim].findings.append(finding)
    return list(claims.values())


def _baseline(folder: Path) -> Iterator[Finding]:
    """Experiment 1: claims 1 to 7 and 12."""
    for model, result in (read_results(folder, "experiment_1") or {}).items():
        comparison = read_comparison(folder, result["runs"], "experiment_1")
        yield from _losses(model, comparison)
        if comparison.has_logs:
            yield from _optimizers_differ(model, comparison)
            yield from _stretching(model, comparison)


def _losses(model: str, comparison: Comparison) -> Iterator[Finding]:
    losses = {arm: [record["eval_loss"] for record in records] for arm, records in comparison.arms.items()}
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
    comparison = read_comparison(folder, result["runs"], "experiment_2")
    for claim, arm in (("8_momentum_matters", "no momentum"), ("8_newton_schulz_matters", "no Newton-Schulz")):
        what, difference = f"validation loss, {arm} minus full", result["minus_full"][arm]
        yield _found(claim, result["model"], what, difference, ABOVE_0, comparison)
    what = "what Newton-Schulz gains without momentum minus what it gains with it"
    yield _found("8_synergy", result["model"], what, result["interaction"], BELOW_0, comparison)


def _sensitivity(folder: Path) -> Iterator[Finding]:
    result = read_results(folder, "experiment_3")
    if result is None:
        return
    ratios = {arm: [math.log2(found["ratio"]) for found in some] for arm, some in result["ranges_by_seed"].items()}
    difference = paired(ratios["muon"], ratios["adamw"])
    ends = [arm for arm, some in result["ranges_by_seed"].items() if any(found["reaches_the_end"] for found in some)]
    note = f"the range of {' and '.join(ends)} reaches the end of the grid" if ends else ""
    yield Finding("9_muon_more_robust", result["model"], "range of learning rates in octaves, Muon minus AdamW",
                  difference["difference"], difference["interval"], ABOVE_0, difference["n"], result["commit"],
                  note)  # fmt: skip


def _overhead(folder: Path) -> Iterator[Finding]:
    result = read_results(folder, "experiment_4")
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
    comparison = read_comparison(folder, result["runs"], "experiment_5")
    records = comparison.arms["manifold"]
    model = records[0]["run"]["model_name"]
    worst = [record["max_violation"]["stiefel_muon"] for record in records]
    yield _extreme("11_constraint_holds", model, "largest constraint error", worst, (0.0, 1e-4), comparison)
    ends = [record[name] for record in records for name in ("sigma_min", "sigma_max")]
    yield _extreme("11_singular_values", model, "singular values", ends, (0.9999, 1.0001), comparison)
    share = single([record["time"]["optimizer_step_ms"] / record["time"]["step_ms"] for record in records])
    yield _found("11_overhead", model, "share of the step in the optimizer", share, (0.0, 0.2), comparison)
    losses = {arm: [record["eval_loss"] for record in some] for arm, some in comparison.arms.items()}
    difference = paired(losses["manifold"], losses["adamw"])
    yield _found("11_loss", model, "validation loss, manifold Muon minus AdamW", difference, BELOW_0, comparison)


def _extreme(
    claim: str, model: str, what: str, values: Sequence[float], needed: tuple[float, float], comparison: Comparison
) -> Finding:
    """Of a bound that must hold everywhere: the range of what was seen takes the place of the interval."""
    seen = [min(values), max(values)]
    return Finding(claim, model, what, max(values), seen, needed, comparison.n, comparison.commit, "range seen")


def _found(
    claim: str, model: str, what: str, found: Record, needed: tuple[float, float], comparison: Comparison,
    note: str = "",
) -> Finding:  # fmt: skip
    value = next(found[name] for name in ("difference", "mean", "ratio") if name in found)
    return Finding(claim, model, what, value, found["interval"], needed, comparison.n, comparison.commit, note)


def _shown(interval: Sequence[float]) -> str:
    return f"[{interval[0]:+.3g}, {interval[1]:+.3g}]"
