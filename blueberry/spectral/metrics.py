"""Metrics of a spectrum, of a matrix and of an update: pure maths on stacks of matrices.

Exact mode takes every number from an SVD in fp64. Fast mode takes them from Gram matrices and filtered subspaces, with
an error bound for each matrix (`decompose`): it agrees with exact mode to 1e-3 relative, and computes exactly what it
cannot promise.

A value that is not defined (NaN weights, sigma_1 / sigma_2 of a 1 x n matrix) is None, with the cause in `reason`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from .decompose import (
    ACCURACY,
    SMALL,
    Subspaces,
    exact_subspaces,
    exact_values,
    fast_subspaces,
    fast_values,
    fp64_subspaces,
    replace_rows,
    smallest_is_accurate,
)
from .names import METRICS, POWER_LAW, UPDATE_METRICS, WEIGHT_METRICS
from .power_law import power_law_exponent

EPS = torch.finfo(torch.float64).eps
NOT_FINITE = "entries are NaN or infinite"
ZERO = "all entries are zero"
ZERO_UPDATE = f"of the update, {ZERO}"
BELOW_RANK = "k is not below the rank"
NOT_CONVERGED = "the decomposition did not converge"
ONE_VALUE = "there is one singular value"
SINGULAR = "the matrix is singular to working precision"
# Causes that a metric is null by its definition, of matrices that nothing is wrong with.
BY_DEFINITION = {ZERO, f"of the weight, {ZERO}", BELOW_RANK, ONE_VALUE, SINGULAR}

Row = dict[str, float | list[float] | str | None]


def spectral_metrics(weight: Tensor, top_k: int = 10, *, exact: bool = True, power_law: bool = False) -> Row:
    """Every metric of one matrix (out, in): `WEIGHT_METRICS`, `top_singular_values`, `singular_values`, `reason`.

    With p = sigma^2 / sum sigma^2: `spectral_entropy` = -sum p log p / log min(out, in), in [0, 1];
    `participation_ratio` = 1 / sum p^2. `effective_rank` (Roy & Vetterli, 2007) is exp H(q) with another
    distribution, q = sigma / sum sigma. `stable_rank` = norm_F^2 / norm_2^2, `spectral_gap` = sigma_1 / sigma_2.

    exact: by an SVD in fp64; otherwise fast, to 1e-3 relative.
    power_law: also `power_law_exponent`, the exponent of the tail of the eigenvalues sigma^2.
    """
    _require_matrix(weight)
    return weight_rows(weight[None], top_k, exact=exact, power_law=power_law)[0]


def update_metrics(weight: Tensor, update: Tensor, k: int = 5, *, exact: bool = True) -> Row:
    """Every metric of one update (out, in) against the weights (out, in) that it was applied to: `UPDATE_METRICS`.

    `update_alignment` is the mean cosine of the principal angles between the top-k left singular subspaces,
    `update_alignment_right` the same on the right. `update_subspace_gap` = sigma_k / sigma_(k+1) of the update says
    whether its top-k subspace means anything (1: it is arbitrary). `update_energy_in_top_k` is the share of
    norm_F(update)^2 inside the top-k left subspace of the weight; by chance it is k / out (`update_energy_chance`).
    `update_to_weight_ratio` divides Frobenius norms. k is lowered to min(out, in) for smaller matrices; where it is
    the whole side, every subspace agrees with every other, and that side's alignment and energy are None.

    exact: by SVDs in fp64; otherwise fast, to 1e-3 relative.
    """
    _require_matrix(weight)
    if weight.shape != update.shape:
        raise ValueError(f"update {tuple(update.shape)} and weight {tuple(weight.shape)} differ in shape")
    return update_rows(weight[None], update[None], k, exact=exact)[0]


def weight_rows(weights: Tensor, top_k: int = 10, *, exact: bool = False, power_law: bool = False) -> list[Row]:
    """`spectral_metrics` of each matrix of a stack (B, out, in)."""
    sigma, causes = _spectra(weights, exact)
    values = {name: column.tolist() for name, column in _of_spectrum(sigma).items()}
    spectra = sigma.tolist()
    rows = []
    for b, cause in enumerate(causes):
        row = {name: values[name][b] for name in WEIGHT_METRICS}
        spectrum = None if sigma[b].isnan().any() else spectra[b]
        row |= {"top_singular_values": spectrum and spectrum[:top_k], "singular_values": spectrum}
        row = _with_reason(row, cause or _rank_cause(sigma[b]))
        rows.append(_with_power_law(row) if power_law else row)
    return rows


def update_rows(weights: Tensor, updates: Tensor, k: int = 5, *, exact: bool = False) -> list[Row]:
    """`update_metrics` of each pair of two stacks (B, out, in)."""
    w, w_norms, bad_weight = _prepared(weights)
    d, d_norms, bad_update = _prepared(updates)
    out, columns = weights.shape[-2:]
    k = min(k, out, columns)
    if exact:
        (_, of_w), (values, of_d) = exact_subspaces(w, k), exact_subspaces(d, k)
    else:
        values, of_w, of_d = _fast_subspaces(w, d, k)
    table = _update_values(d, values, of_w, of_d, k, out > columns)
    table |= {"update_energy_chance": torch.full_like(d_norms, k / out)}
    table["update_spectral_norm"] = table["update_spectral_norm"] * d_norms
    table |= {"update_frobenius_norm": d_norms, "update_to_weight_ratio": d_norms / w_norms}
    known = {name: column.tolist() for name, column in table.items()}
    converged = ~(values.isnan().any(-1) | of_w.values.isnan().any(-1))
    rows = []
    for b, (of_weight, of_update) in enumerate(zip(bad_weight, bad_update, strict=True)):
        row = {name: known[name][b] for name in UPDATE_METRICS}
        if NOT_FINITE in (of_weight, of_update):
            row |= dict.fromkeys(set(UPDATE_METRICS) - {"update_energy_chance"})
        cause = f"of the weight, {of_weight}" if of_weight else f"of the update, {of_update}" if of_update else None
        rows.append(_with_reason(row, cause or (BELOW_RANK if converged[b] else NOT_CONVERGED)))
    return rows


def _require_matrix(weight: Tensor) -> None:
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"expected a matrix (out, in), got shape {tuple(weight.shape)}")


def _prepared(matrices: Tensor) -> tuple[Tensor, Tensor, list[str | None]]:
    """The stack as (B, short, long), fp64, divided by the Frobenius norms (B,), and what is wrong with each.

    Unusable matrices are replaced by zeros.
    """
    matrices = matrices.detach().to("cpu" if matrices.device.type == "mps" else matrices.device)
    norms = torch.linalg.vector_norm(matrices, dim=(-2, -1), dtype=torch.float64)  # one pass: NaN, inf, zero
    finite, zero = torch.isfinite(norms), norms == 0
    x = matrices.to(torch.float64, copy=True)
    x /= torch.where(zero, 1.0, norms)[:, None, None]
    if not finite.all():
        x = torch.where(finite[:, None, None], x, torch.zeros((), dtype=x.dtype))
    causes = [
        NOT_FINITE if not ok else ZERO if empty else None
        for ok, empty in zip(finite.tolist(), zero.tolist(), strict=True)
    ]
    return x.mT if x.shape[-2] > x.shape[-1] else x, norms, causes


def _spectra(matrices: Tensor, exact: bool) -> tuple[Tensor, list[str | None]]:
    """Singular values (B, r), descending, fp64, NaN where unknown; and causes (B,)."""
    x, norms, causes = _prepared(matrices)
    sigma = exact_values(x) if exact else fast_values(x, smallest_is_accurate).sqrt()
    for b, cause in enumerate(causes):
        if cause == NOT_FINITE:
            sigma[b] = torch.nan
        elif sigma[b].isnan().any():
            causes[b] = NOT_CONVERGED
    return sigma * norms[:, None], causes


def _fast_subspaces(w: Tensor, d: Tensor, k: int) -> tuple[Tensor, Subspaces, Subspaces]:
    """Squared singular values of the updates (B, r), and both leading subspaces.

    Where the angle errors leave an alignment uncertain by more than `ACCURACY`, decompositions in fp64 replace them.
    """
    _, of_w = fast_subspaces(w, k, lambda values, error: ~values.isnan().any(-1))
    values, of_d = fast_subspaces(d, k, lambda values, error: _bulk_is_accurate(values, error, k))
    smallest = torch.minimum(mean_cosine(of_w.short, of_d.short), mean_cosine(of_w.long, of_d.long))
    for subspaces, x in ((of_w, w), (of_d, d)):
        doubtful = subspaces.angle > ACCURACY * smallest  # False where it is NaN: there is nothing to be had
        if x.shape[-2] > SMALL and doubtful.any():
            replace_rows(subspaces, doubtful, fp64_subspaces(x[doubtful], k)[1])
    return values, of_w, of_d


def _bulk_is_accurate(values: Tensor, error: float, k: int) -> Tensor:
    """Check (B,) for entropy, stable rank and sigma_k / sigma_(k+1): errors of the small values hardly matter."""
    total = values.sum(-1)
    p, noise = values / total[:, None], error * values[:, :1] / total[:, None]  # (B, n), (B, 1)
    off = (noise * (1 - torch.maximum(p, noise).log())).sum(-1)  # of the entropy, whose slope is -1 - log p
    place = min(k, values.shape[-1] - 1)
    return (off < ACCURACY * _entropy(p)) & (values[:, place] * 2 * ACCURACY > error * values[:, 0])


def _of_spectrum(sigma: Tensor) -> dict[str, Tensor]:
    """`WEIGHT_METRICS` (B,) each from singular values (B, r); NaN where a value is not defined."""
    rank = sigma.shape[-1]
    p, energy = _distribution(sigma.square())
    q, nuclear = _distribution(sigma)
    first, last = sigma[:, 0], sigma[:, -1]
    second = sigma[:, 1] if rank > 1 else torch.full_like(first, torch.nan)
    floor = EPS * rank * first  # below it a singular value is zero to working precision
    return {
        "spectral_norm": first,
        "spectral_gap": _defined(first / second, second > floor),
        "stable_rank": energy / first.square(),
        "spectral_entropy": normalized_entropy(p),
        "effective_rank": _entropy(q).exp(),
        "condition_number": _defined(first / last, last > floor),
        "frobenius_norm": energy.sqrt(),
        "nuclear_norm": nuclear,
        "participation_ratio": 1 / p.square().sum(-1),
    }


def _distribution(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x / sum x, sum x) along the last dimension."""
    total = x.sum(-1)
    return x / total[..., None], total


def _entropy(p: Tensor) -> Tensor:
    """-sum p log p along the last dimension, with 0 log 0 = 0."""
    return torch.special.entr(p).sum(-1)


def normalized_entropy(p: Tensor) -> Tensor:
    """Entropy over its largest value log r, in [0, 1]; NaN for r = 1, where it is 0 / 0."""
    r = p.shape[-1]
    if r == 1:
        return torch.full_like(p[..., 0], torch.nan)
    return (_entropy(p) / torch.tensor(r, dtype=p.dtype).log()).clamp(0, 1)


def _defined(values: Tensor, where: Tensor) -> Tensor:
    return values.masked_fill(~where, torch.nan)


def _update_values(
    d: Tensor, values: Tensor, of_w: Subspaces, of_d: Subspaces, k: int, tall: bool
) -> dict[str, Tensor]:
    """Most of `UPDATE_METRICS` (B,) each, for updates `d` (B, short, long) of norm 1 and their squared spectra."""
    short, long = mean_cosine(of_w.short, of_d.short), mean_cosine(of_w.long, of_d.long)
    captured = d @ of_w.long if tall else d.mT @ of_w.short  # the part of the update in the weight's left subspace
    out, columns = (d.shape[-1], d.shape[-2]) if tall else d.shape[-2:]
    sigma = values.clamp(min=0).sqrt()
    of_update = _of_spectrum(sigma)
    has_weight_subspace = of_w.values[:, -1] > EPS * d.shape[-2] * of_w.values[:, 0]
    known = has_weight_subspace & _has_rank(values, k)
    gap = sigma[:, k - 1] / sigma[:, k] if k < sigma.shape[-1] else torch.full_like(short, torch.nan)
    energy = captured.square().sum((-1, -2)) / d.square().sum((-1, -2))
    return {
        "update_alignment": _defined(long if tall else short, known & (k < out)),
        "update_alignment_right": _defined(short if tall else long, known & (k < columns)),
        "update_subspace_gap": _defined(gap, _has_rank(values, k + 1)),
        "update_energy_in_top_k": _defined(energy, has_weight_subspace & (k < out)),
        "update_spectral_norm": of_update["spectral_norm"],
        "update_stable_rank": of_update["stable_rank"],
        "update_spectral_entropy": of_update["spectral_entropy"],
    }


def mean_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Mean cosine (B,) of the principal angles between the spans of orthonormal (B, n, k) and (B, n, k).

    The cosines are the singular values of a^T b, and their sum the trace of the square root of its Gram matrix.
    """
    product = a.mT @ b  # (B, k, k)
    usable = torch.isfinite(product).all(-1).all(-1)
    cosines = torch.linalg.svdvals(torch.nan_to_num(product)).clamp(max=1)
    return _defined(cosines.mean(-1), usable)


def _has_rank(eigenvalues: Tensor, k: int) -> Tensor:
    """Which Gram matrices, by their eigenvalues (B, n), have rank k and so a top-k subspace to speak of."""
    if k > eigenvalues.shape[-1]:
        return torch.zeros_like(eigenvalues[:, 0], dtype=torch.bool)
    return eigenvalues[:, k - 1] > EPS * eigenvalues.shape[-1] * eigenvalues[:, 0]


def _rank_cause(sigma: Tensor) -> str:
    return ONE_VALUE if len(sigma) == 1 else SINGULAR


def _with_power_law(row: Row) -> Row:
    """The row with `power_law_exponent`, or with the reason why there is none."""
    if row["singular_values"] is None:
        return add_reason(row, POWER_LAW, "the spectrum is unknown")
    value, cause = power_law_exponent(row["singular_values"])
    return row | {POWER_LAW: value} if cause is None else add_reason(row, POWER_LAW, cause)


def add_reason(row: Row, metric: str, cause: str) -> Row:
    """The row with `metric` null, and why."""
    reason = f"{metric}: {cause}"
    return row | {metric: None, "reason": f"{row['reason']}; {reason}" if row["reason"] else reason}


def only(row: Row, metrics: Iterable[str]) -> Row:
    """The row without the metrics that are not among `metrics`, neither as values nor in the reason."""
    dropped = set(METRICS) - set(metrics)
    reasons = []
    for reason in (row["reason"] or "").split("; "):
        names, _, cause = reason.partition(": ")
        kept = [name for name in names.split(", ") if name and name not in dropped]
        reasons += [f"{', '.join(kept)}: {cause}"] if kept else []
    return {name: value for name, value in row.items() if name not in dropped} | {"reason": "; ".join(reasons) or None}


def _with_reason(row: Row, cause: str) -> Row:
    """NaN and inf become None, and `reason` says which metrics are missing and why (None: none is)."""
    missing = [name for name, x in row.items() if x is None or (isinstance(x, float) and not abs(x) < float("inf"))]
    row |= dict.fromkeys(missing)
    row["reason"] = f"{', '.join(missing)}: {cause}" if missing else None
    return row
