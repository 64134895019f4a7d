"""Metrics of a spectrum, of a matrix and of an update: pure maths on stacks of matrices.

Numerics. Everything is computed in fp64 from the Gram matrix of the short side, whose eigenvalues are the squared
singular values. Their absolute error is about 1e-14 sigma_1^2, so sigma_i is good to 1e-14 (sigma_1 / sigma_i)^2:
far below 1e-6 for everything that the large singular values decide. Only sigma_min can fall below that accuracy:
where sigma_1 / sigma_min exceeds `GRAM_LIMIT`, the spectrum of that weight is computed again by an SVD.

A value that is not defined (NaN weights, sigma_1 / sigma_2 of a 1 x n matrix) is None, with the cause in `reason`.
"""

import torch
from torch import Tensor

from .names import UPDATE_METRICS, WEIGHT_METRICS
from .subspace import eigen, leading_eigen

GRAM_LIMIT = 1e5  # condition number up to which Gram eigenvalues give sigma_min to 1e-3 in the worst case
EPS = torch.finfo(torch.float64).eps
NOT_FINITE = "entries are NaN or infinite"
ZERO = "all entries are zero"

Row = dict[str, float | list[float] | str | None]


def spectral_metrics(weight: Tensor, top_k: int = 10) -> Row:
    """Every metric of one matrix (out, in): `WEIGHT_METRICS`, `top_singular_values`, `singular_values`, `reason`.

    With p = sigma^2 / sum sigma^2: `spectral_entropy` = -sum p log p / log min(out, in), in [0, 1];
    `participation_ratio` = 1 / sum p^2. `effective_rank` (Roy & Vetterli, 2007) is exp H(q) with another
    distribution, q = sigma / sum sigma. `stable_rank` = norm_F^2 / norm_2^2, `spectral_gap` = sigma_1 / sigma_2.
    """
    _require_matrix(weight)
    return weight_rows(weight[None], top_k)[0]


def update_metrics(weight: Tensor, update: Tensor, k: int = 5) -> Row:
    """Every metric of one update (out, in) against the weights (out, in) that it was applied to: `UPDATE_METRICS`.

    `update_alignment` is the mean cosine of the principal angles between the top-k left singular subspaces,
    `update_alignment_right` the same on the right. `update_subspace_gap` = sigma_k / sigma_(k+1) of the update says
    whether its top-k subspace means anything (1: it is arbitrary). `update_energy_in_top_k` is the share of
    norm_F(update)^2 inside the top-k left subspace of the weight; by chance it is k / out (`update_energy_chance`).
    `update_to_weight_ratio` divides Frobenius norms. k is lowered to min(out, in) for smaller matrices; where it is
    the whole side, every subspace agrees with every other, and that side's alignment and energy are None.
    """
    _require_matrix(weight)
    if weight.shape != update.shape:
        raise ValueError(f"update {tuple(update.shape)} and weight {tuple(weight.shape)} differ in shape")
    return update_rows(weight[None], update[None], k)[0]


def weight_rows(weights: Tensor, top_k: int = 10) -> list[Row]:
    """`spectral_metrics` of each matrix of a stack (B, out, in)."""
    sigma, causes = _spectra(weights)
    values = {name: column.tolist() for name, column in _of_spectrum(sigma).items()}
    spectra = sigma.tolist()
    rows = []
    for b, cause in enumerate(causes):
        row = {name: values[name][b] for name in WEIGHT_METRICS}
        spectrum = None if sigma[b].isnan().any() else spectra[b]
        row |= {"top_singular_values": spectrum and spectrum[:top_k], "singular_values": spectrum}
        rows.append(_with_reason(row, cause or _rank_cause(sigma[b])))
    return rows


def update_rows(weights: Tensor, updates: Tensor, k: int = 5, estimate: Tensor | None = None) -> list[Row]:
    """`update_metrics` of each pair of two stacks (B, out, in).

    estimate: (B, min(out, in)) singular values of matrices close to `weights`; it saves time, not accuracy.
    """
    weights, bad_weight = _finite(weights)
    updates, bad_update = _finite(updates)
    estimate = None if estimate is None else estimate.to(weights.device).square()
    values = _update_values(weights, updates, min(k, *weights.shape[-2:]), estimate)
    columns = {name: column.tolist() for name, column in values.items()}
    rows = []
    for b, (of_weight, of_update) in enumerate(zip(bad_weight, bad_update, strict=True)):
        row = {name: columns[name][b] for name in UPDATE_METRICS}
        if NOT_FINITE in (of_weight, of_update):
            row |= dict.fromkeys(set(UPDATE_METRICS) - {"update_energy_chance"})
        cause = f"of the weight, {of_weight}" if of_weight else f"of the update, {of_update}" if of_update else None
        rows.append(_with_reason(row, cause or "k is not below the rank"))
    return rows


def _require_matrix(weight: Tensor) -> None:
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"expected a matrix (out, in), got shape {tuple(weight.shape)}")


def _finite(matrices: Tensor) -> tuple[Tensor, list[str | None]]:
    """The stack in fp64 with unusable matrices replaced by zeros, and what is wrong with each (None: nothing)."""
    matrices = matrices.detach().to("cpu" if matrices.device.type == "mps" else matrices.device, torch.float64)
    norms = torch.linalg.vector_norm(matrices, dim=(-2, -1))  # (B,), one pass that finds NaN, inf and zero
    finite, zero = torch.isfinite(norms), norms == 0
    if not finite.all():
        matrices = torch.where(finite[:, None, None], matrices, torch.zeros((), dtype=matrices.dtype))
    causes = [
        NOT_FINITE if not ok else ZERO if empty else None
        for ok, empty in zip(finite.tolist(), zero.tolist(), strict=True)
    ]
    return matrices, causes


def _spectra(matrices: Tensor) -> tuple[Tensor, list[str | None]]:
    """Singular values (B, r), descending, fp64, NaN where unknown; and causes (B,)."""
    matrices, causes = _finite(matrices)
    sigma = _eigenvalues(gram(matrices)).clamp(min=0).sqrt()
    trusted = (sigma[:, -1] * GRAM_LIMIT > sigma[:, 0]).tolist()  # False for NaN
    for b, cause in enumerate(causes):
        if cause is None and not trusted[b]:
            sigma[b] = _svdvals(matrices[b])
            if sigma[b].isnan().any():
                causes[b] = "the decomposition did not converge"
        if cause == NOT_FINITE:
            sigma[b] = torch.nan
    return sigma, causes


def gram(matrices: Tensor) -> Tensor:
    """X X^T (B, n, n) of the short side, n = min(out, in)."""
    if matrices.shape[-2] > matrices.shape[-1]:
        matrices = matrices.mT
    return matrices @ matrices.mT


def _eigenvalues(grams: Tensor) -> Tensor:
    """Eigenvalues (B, n), descending; NaN for a matrix whose iteration does not converge."""
    try:
        return torch.linalg.eigvalsh(grams).flip(-1)
    except torch.linalg.LinAlgError:
        if len(grams) == 1:
            return grams.new_full(grams.shape[:-1], torch.nan)
        return torch.cat([_eigenvalues(one[None]) for one in grams])


def _svdvals(matrix: Tensor) -> Tensor:
    """Singular values (r,) of one fp64 matrix, accurate down to eps sigma_1; by way of R of QR when it is long."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    try:
        return torch.linalg.svdvals(torch.linalg.qr(tall, mode="r").R)
    except torch.linalg.LinAlgError:
        return matrix.new_full((tall.shape[1],), torch.nan)


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


def _update_values(weights: Tensor, updates: Tensor, k: int, estimate: Tensor | None) -> dict[str, Tensor]:
    """`UPDATE_METRICS` (B,) each, for fp64 stacks (B, out, in) and k <= min(out, in)."""
    out, columns = weights.shape[-2:]
    tall = out > columns
    w, d = (weights.mT, updates.mT) if tall else (weights, updates)  # (B, short, long)
    w_values, w_short = leading_eigen(w @ w.mT, k, estimate)  # (B, k), (B, short, k)
    d_values, d_short = eigen(d @ d.mT, k)  # (B, short), (B, short, k)
    w_long, d_long = _other_side(w, w_short), _other_side(d, d_short)  # (B, long, k)
    short, long = _mean_cosine(w_short, d_short), _mean_cosine(w_long, d_long)
    captured = d @ w_long if tall else d.mT @ w_short  # the part of the update in the weight's left subspace
    sigma = d_values.clamp(min=0).sqrt()
    of_update = _of_spectrum(sigma)
    has_weight_subspace = w_values[:, -1] > EPS * w.shape[-2] * w_values[:, 0]
    known = has_weight_subspace & _has_rank(d_values, k)
    norm = of_update["frobenius_norm"]
    energy = captured.square().sum((-1, -2)) / norm.square()
    gap = sigma[:, k - 1] / sigma[:, k] if k < sigma.shape[-1] else torch.full_like(norm, torch.nan)
    return {
        "update_alignment": _defined(long if tall else short, known & (k < out)),
        "update_alignment_right": _defined(short if tall else long, known & (k < columns)),
        "update_subspace_gap": _defined(gap, _has_rank(d_values, k + 1)),
        "update_energy_in_top_k": _defined(energy, has_weight_subspace & (k < out)),
        "update_energy_chance": torch.full_like(norm, k / out),
        "update_spectral_norm": of_update["spectral_norm"],
        "update_frobenius_norm": norm,
        "update_stable_rank": of_update["stable_rank"],
        "update_spectral_entropy": of_update["spectral_entropy"],
        "update_to_weight_ratio": norm / weights.square().sum((-1, -2)).sqrt(),
    }


def _other_side(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Singular vectors (B, long, k) that belong to (B, short, k): X^T u / sigma."""
    image = matrices.mT @ vectors
    return image / image.square().sum(-2, keepdim=True).sqrt()


def _mean_cosine(a: Tensor, b: Tensor) -> Tensor:
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
    return "there is one singular value" if len(sigma) == 1 else "the matrix is singular to working precision"


def _with_reason(row: Row, cause: str) -> Row:
    """NaN and inf become None, and `reason` says which metrics are missing and why (None: none is)."""
    missing = [name for name, x in row.items() if x is None or (isinstance(x, float) and not abs(x) < float("inf"))]
    row |= dict.fromkeys(missing)
    row["reason"] = f"{', '.join(missing)}: {cause}" if missing else None
    return row
