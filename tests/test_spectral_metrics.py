"""Metrics against numpy, scipy and matrices whose spectrum is known."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blueberry.spectral import decompose, matrix_name, spectral_metrics, update_metrics
from blueberry.spectral import metrics as module
from blueberry.spectral.chance import alignment_by_chance
from blueberry.spectral.names import UPDATE_METRICS, WEIGHT_METRICS


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def with_spectrum(sigma: list[float], out: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A matrix (out, columns) in fp64 with these singular values."""
    u, v = orthonormal(out, len(sigma), seed), orthonormal(columns, len(sigma), seed + 1)
    return u @ torch.diag(torch.tensor(sigma, dtype=torch.float64)) @ v.T


def by_definition(weight: np.ndarray) -> dict[str, float]:
    sigma = np.linalg.svd(weight, compute_uv=False)
    p, q = sigma**2 / (sigma**2).sum(), sigma / sigma.sum()
    return {
        "spectral_norm": np.linalg.norm(weight, 2),
        "spectral_gap": sigma[0] / sigma[1],
        "stable_rank": np.linalg.norm(weight) ** 2 / np.linalg.norm(weight, 2) ** 2,
        "spectral_entropy": -(p * np.log(p)).sum() / np.log(min(weight.shape)),
        "effective_rank": np.exp(-(q * np.log(q)).sum()),
        "condition_number": np.linalg.cond(weight),
        "frobenius_norm": np.linalg.norm(weight),
        "nuclear_norm": np.linalg.norm(weight, "nuc"),
        "participation_ratio": 1 / (p**2).sum(),
    }


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40), (2, 9)])
def test_weight_metrics_follow_their_definitions(shape):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    metrics = spectral_metrics(weight)
    expected = by_definition(weight.double().numpy())
    assert set(expected) == set(WEIGHT_METRICS)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-9), name
    assert metrics["reason"] is None
    assert metrics["singular_values"] == pytest.approx(scipy.linalg.svdvals(weight.double().numpy()), rel=1e-9)


def test_a_flat_spectrum_has_entropy_one_and_full_ranks():
    metrics = spectral_metrics(3 * orthonormal(30, 12, seed=0))
    assert metrics["spectral_entropy"] == pytest.approx(1)
    assert (metrics["condition_number"], metrics["spectral_gap"]) == pytest.approx((1, 1))
    for rank in ("stable_rank", "effective_rank", "participation_ratio"):
        assert metrics[rank] == pytest.approx(12)


def test_top_k_limits_only_the_short_list():
    metrics = spectral_metrics(with_spectrum([9.0, 5, 4, 1], 6, 5), top_k=2)
    assert metrics["top_singular_values"] == pytest.approx([9, 5])
    assert metrics["singular_values"] == pytest.approx([9, 5, 4, 1, 0], abs=1e-6)


@pytest.mark.parametrize("smallest", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("shape", [(12, 12), (60, 12), (12, 60)])
def test_smallest_singular_values_are_right_where_the_gram_matrix_cannot_give_them(smallest, shape):
    sigma = [*np.geomspace(1, 1e-2, 11), smallest]
    metrics = spectral_metrics(with_spectrum(sigma, *shape))
    # An fp64 matrix carries its own sigma_min to eps * sigma_1: 1e-16 / 1e-9 at worst.
    assert metrics["condition_number"] == pytest.approx(1 / smallest, rel=1e-5)


def test_half_precision_weights_are_measured_as_stored():
    weight = torch.randn(16, 32).bfloat16()
    assert spectral_metrics(weight)["spectral_norm"] == pytest.approx(np.linalg.norm(weight.double().numpy(), 2))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=8), st.floats(1e-6, 1e6))
def test_ratios_do_not_depend_on_scale_and_stay_in_bounds(sigma, scale):
    weight = with_spectrum(sigma, 9, 8)
    metrics, scaled = spectral_metrics(weight), spectral_metrics(scale * weight)
    assert 0 <= metrics["spectral_entropy"] <= 1
    assert 1 - 1e-9 <= metrics["stable_rank"] <= len(sigma) + 1e-9
    assert 1 - 1e-9 <= metrics["effective_rank"] <= 8 + 1e-9
    for name in ("stable_rank", "spectral_entropy", "participation_ratio", "spectral_gap"):
        assert scaled[name] == pytest.approx(metrics[name], rel=1e-6), name
    assert scaled["spectral_norm"] == pytest.approx(scale * metrics["spectral_norm"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_give_null_with_a_reason(bad):
    weight = torch.randn(4, 6)
    weight[1, 2] = bad
    metrics = spectral_metrics(weight)
    assert all(metrics[name] is None for name in (*WEIGHT_METRICS, "singular_values"))
    assert "NaN or infinite" in metrics["reason"]
    metrics = update_metrics(torch.randn(4, 6), weight, k=2)
    assert all(metrics[name] is None for name in set(UPDATE_METRICS) - {"update_energy_chance"})
    assert metrics["reason"].endswith("of the update, entries are NaN or infinite")


def test_a_zero_matrix_has_norms_and_nothing_else():
    metrics = spectral_metrics(torch.zeros(4, 6))
    norms = {"spectral_norm", "frobenius_norm", "nuclear_norm"}
    assert {metrics[name] for name in norms} == {0.0}
    assert all(metrics[name] is None for name in set(WEIGHT_METRICS) - norms)
    assert metrics["reason"].endswith("all entries are zero")


def test_a_single_row_has_no_gap_and_no_entropy():
    metrics = spectral_metrics(torch.tensor([[3.0, 4.0]]))
    assert metrics["spectral_norm"] == pytest.approx(5)
    assert metrics["spectral_gap"] is None and metrics["spectral_entropy"] is None
    assert metrics["reason"] == "spectral_gap, spectral_entropy: there is one singular value"


def test_a_singular_matrix_has_no_condition_number():
    metrics = spectral_metrics(with_spectrum([2.0, 1.0, 0.0], 5, 3))
    assert metrics["condition_number"] is None
    assert metrics["reason"] == "condition_number: the matrix is singular to working precision"


def test_a_decomposition_that_does_not_converge_costs_its_own_matrix_only(monkeypatch):
    real = torch.linalg.eigvalsh

    def eigvalsh(grams):
        if (grams[..., 0, 1] != 0).any():
            raise torch.linalg.LinAlgError("did not converge")
        return real(grams)

    monkeypatch.setattr(torch.linalg, "eigvalsh", eigvalsh)
    monkeypatch.setattr(decompose, "_svdvals", lambda matrix: torch.full((2,), math.nan, dtype=torch.float64))
    good, bad = module.weight_rows(torch.stack([torch.eye(2), torch.ones(2, 2).triu()]))
    assert good["spectral_norm"] == 1 and good["reason"] is None
    assert bad["spectral_norm"] is None and "did not converge" in bad["reason"]


def test_an_update_whose_decomposition_does_not_converge_says_so(monkeypatch):
    def eigh(grams):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    metrics = update_metrics(torch.randn(8, 9), torch.randn(8, 9), k=2, exact=False)
    assert metrics["update_spectral_norm"] is None and metrics["update_frobenius_norm"] > 0
    assert metrics["reason"].endswith(": the decomposition did not converge")


def update_by_definition(weight: np.ndarray, update: np.ndarray, k: int) -> dict[str, float]:
    (uw, _, vw), (ud, sd, vd) = np.linalg.svd(weight), np.linalg.svd(update)
    cosines = lambda a, b: np.cos(scipy.linalg.subspace_angles(a, b)).mean()
    p = sd**2 / (sd**2).sum()
    return {
        "update_alignment": cosines(uw[:, :k], ud[:, :k]),
        "update_alignment_right": cosines(vw[:k].T, vd[:k].T),
        "update_subspace_gap": sd[k - 1] / sd[k],
        "update_energy_in_top_k": np.linalg.norm(uw[:, :k].T @ update) ** 2 / np.linalg.norm(update) ** 2,
        "update_energy_chance": k / len(weight),
        "update_spectral_norm": sd[0],
        "update_frobenius_norm": np.linalg.norm(update),
        "update_stable_rank": (sd**2).sum() / sd[0] ** 2,
        "update_spectral_entropy": -(p * np.log(p)).sum() / np.log(len(sd)),
        "update_to_weight_ratio": np.linalg.norm(update) / np.linalg.norm(weight),
    }


@pytest.mark.parametrize("shape", [(20, 20), (40, 14), (14, 40)])
def test_update_metrics_follow_their_definitions(shape):
    generator = torch.Generator().manual_seed(3)
    weight, update = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    metrics, expected = update_metrics(weight, update, k=5), update_by_definition(weight.numpy(), update.numpy(), 5)
    assert set(expected) == set(UPDATE_METRICS)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-8), name
    assert metrics["reason"] is None


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
def test_an_update_along_the_weight_is_aligned_and_one_beside_it_is_not(shape):
    sigma = list(np.linspace(10, 1, 12))
    weight = with_spectrum(sigma, *shape)
    along = update_metrics(weight, 0.1 * weight, k=4)
    assert (along["update_alignment"], along["update_alignment_right"]) == pytest.approx((1, 1))
    assert along["update_to_weight_ratio"] == pytest.approx(0.1)
    beside = update_metrics(weight, with_spectrum(sigma[::-1], *shape), k=4)  # the same vectors in reverse order
    assert beside["update_alignment"] < 1e-6 and beside["update_alignment_right"] < 1e-6
    assert beside["update_energy_in_top_k"] == pytest.approx(
        sum(s * s for s in sigma[-4:]) / sum(s * s for s in sigma)
    )


def test_alignment_of_random_subspaces_is_at_its_chance_level():
    measured = [
        update_metrics(orthonormal_noise(64, seed), orthonormal_noise(64, seed + 100))["update_alignment"]
        for seed in range(40)
    ]
    standard_error = np.std(measured) / math.sqrt(len(measured))
    assert abs(np.mean(measured) - alignment_by_chance(64, 5)) < 4 * standard_error


def orthonormal_noise(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_chance_alignment_in_one_dimension_is_the_mean_absolute_cosine():
    # E|cos| of the angle between random lines of R^3 is 1/2, of R^2 is 2/pi.
    assert alignment_by_chance(3, 1) == pytest.approx(1 / 2, rel=0.03)
    assert alignment_by_chance(2, 1) == pytest.approx(2 / math.pi, rel=0.03)
    assert alignment_by_chance(5, 5) == 1


def test_a_subspace_that_is_the_whole_side_tells_nothing():
    metrics = update_metrics(torch.randn(4, 20), torch.randn(4, 20), k=5)
    assert metrics["update_alignment"] is None and metrics["update_energy_in_top_k"] is None
    assert 0 < metrics["update_alignment_right"] < 1
    assert "k is not below the rank" in metrics["reason"]


def test_an_update_of_low_rank_has_no_top_k_subspace():
    metrics = update_metrics(torch.randn(20, 20), with_spectrum([1.0, 0.5], 20, 20), k=5)
    assert metrics["update_alignment"] is None and metrics["update_alignment_right"] is None
    assert metrics["update_energy_in_top_k"] is not None
    assert metrics["update_stable_rank"] == pytest.approx(1.25)


def test_a_zero_update_has_ratio_zero_and_no_direction():
    metrics = update_metrics(torch.randn(8, 9), torch.zeros(8, 9), k=2)
    assert metrics["update_to_weight_ratio"] == metrics["update_spectral_norm"] == 0
    assert metrics["update_alignment"] is None and metrics["update_stable_rank"] is None
    assert metrics["reason"].endswith("of the update, all entries are zero")


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 3)])
def test_what_is_not_a_matrix_is_refused(shape):
    with pytest.raises(ValueError, match="expected a matrix"):
        spectral_metrics(torch.zeros(shape))


def test_an_update_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        update_metrics(torch.zeros(3, 4), torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("parameter", "expected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", (3, "self_attn", "q_proj", None)),
        ("model.layers.11.mlp.experts.up_proj", (11, "mlp", "up_proj", None)),
        ("model.layers.0.block_sparse_moe.experts.7.w1.weight", (0, "block_sparse_moe", "w1", 7)),
        ("model.layers.2.mlp.shared_expert.up_proj.weight", (2, "mlp", "shared_expert.up_proj", None)),
        ("transformer.h.5.attn.c_attn.weight", (5, "attn", "c_attn", None)),
        ("encoder.layer.1.attention.output.dense.weight", (1, "attention", "output.dense", None)),
        ("encoder.layer.1.output.dense.weight", (1, "output", "dense", None)),
        ("model.decoder.layers.4.fc1.weight", (4, "fc1", "fc1", None)),
        ("module._orig_mod.model.layers.1.self_attn.o_proj.weight", (1, "self_attn", "o_proj", None)),
        ("lm_head.weight", (None, "lm_head", "lm_head", None)),
        ("model.embed_tokens.weight", (None, "embed_tokens", "embed_tokens", None)),
    ],
)
def test_parameter_names_of_many_models_are_understood(parameter, expected):
    assert matrix_name(parameter) == expected
