"""Fast mode agrees with exact mode to 1e-3 on every kind of spectrum, or computes exactly."""

import math

import pytest
import torch

from blueberry.spectral import decompose, spectral_metrics, update_metrics
from blueberry.spectral.names import UPDATE_METRICS, WEIGHT_METRICS

TOLERANCE = 1e-3  # what fast mode is documented to keep
SHAPES = [(96, 96), (80, 200), (260, 90)]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def with_spectrum(sigma: torch.Tensor, out: int, columns: int) -> torch.Tensor:
    vectors = torch.randn(out, columns, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    u, _, v = torch.linalg.svd(vectors, full_matrices=False)
    return (u * sigma[: min(out, columns)]) @ v


def kinds(out: int, columns: int) -> dict[str, torch.Tensor]:
    """Weights at their start, with outliers, with a mean, of low rank, ill-conditioned, orthogonal, tiny and huge."""
    index = torch.arange(1, 301, dtype=torch.float64)
    low = noise(out, 4) @ noise(4, columns)
    return {
        "gaussian": noise(out, columns),
        "outliers": noise(out, columns) + 0.3 * low,
        "mean": noise(out, columns) + 5,
        "low rank": low,
        "power law": with_spectrum(index**-1.0, out, columns),
        "geometric": with_spectrum(0.85**index, out, columns),
        "nearly orthogonal": with_spectrum(1 + 0.01 * torch.rand(300, generator=generator()).double(), out, columns),
        "tiny": 1e-25 * noise(out, columns),
        "huge": 1e25 * noise(out, columns),
    }


def disagreements(fast: dict, exact: dict, names: tuple[str, ...]) -> dict:
    return {
        name: (fast[name], exact[name])
        for name in names
        if not (fast[name] is exact[name] is None or fast[name] == pytest.approx(exact[name] or 0.0, rel=TOLERANCE))
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_weight_metrics_and_whole_spectra_of_fast_mode_equal_those_of_exact_mode(shape):
    for kind, weight in kinds(*shape).items():
        fast, exact = spectral_metrics(weight, exact=False), spectral_metrics(weight)
        assert not disagreements(fast, exact, WEIGHT_METRICS), kind
        defined = [(f, e) for f, e in zip(fast["singular_values"], exact["singular_values"], strict=True)
                   if e > 1e-12 * exact["singular_values"][0]]  # fmt: skip
        assert all(f == pytest.approx(e, rel=TOLERANCE, abs=0) for f, e in defined), kind


@pytest.mark.parametrize("shape", SHAPES)
def test_update_metrics_of_fast_mode_equal_those_of_exact_mode(shape):
    matrices = kinds(*shape)
    for kind in ("gaussian", "outliers", "mean", "geometric"):
        for update in ("gaussian", "nearly orthogonal", "low rank", "power law", "tiny"):
            change = 1e-2 * matrices[update] + (1e-3 * matrices[kind] if update == "gaussian" else 0)
            fast = update_metrics(matrices[kind], change, exact=False)
            assert not disagreements(fast, update_metrics(matrices[kind], change), UPDATE_METRICS), (kind, update)


def test_the_claimed_rounding_error_covers_the_real_one():
    for weight in kinds(200, 300).values():
        x = weight.double() / weight.double().norm()
        exact = torch.linalg.svdvals(x).square()
        for dtype in (torch.float32, torch.float64):
            values = torch.linalg.eigvalsh(decompose.gram(x.to(dtype))).flip(-1).double()
            assert (values - exact).abs().max() <= decompose.rounding(200, dtype) * exact[0]


def test_the_claimed_angle_covers_the_real_one():
    """But for the rounding of the oracle, an SVD in fp64, which knows the subspace to eps over the relative gap."""
    for weight in kinds(200, 300).values():
        x = (weight.double() / weight.double().norm())[None]
        _, found = decompose.fast_subspaces(x, 5, lambda values, error: torch.ones(1, dtype=torch.bool))
        values, exact = decompose.exact_subspaces(x, 5)
        sigma = values[0].sqrt()
        oracle = 100 * torch.finfo(torch.float64).eps * sigma[0] / (sigma[4] - sigma[5])
        claimed = 5**0.5 * found.angle * sigma[0] / sigma[4]  # Frobenius norm; the long side is X^T u / sigma
        for mine, true in ((found.short, exact.short), (found.long, exact.long)):
            assert torch.linalg.matrix_norm(mine - true @ (true.mT @ mine)) <= claimed + oracle


def test_fp32_is_used_where_it_suffices_and_left_where_it_does_not(monkeypatch):
    dtypes = []
    real = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda grams: (dtypes.append(grams.dtype), real(grams))[1])
    spectral_metrics(noise(100, 400), exact=False)
    assert dtypes == [torch.float32]
    dtypes.clear()
    spectral_metrics(with_spectrum(0.95 ** torch.arange(300).double(), 100, 400), exact=False)
    assert dtypes == [torch.float32, torch.float64]


def test_what_a_gram_matrix_cannot_give_comes_from_an_svd(monkeypatch):
    calls = []
    real = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda matrix: (calls.append(matrix.shape), real(matrix))[1])
    weight = with_spectrum(torch.logspace(0, -8, 90, dtype=torch.float64), 90, 90)
    sigma_min = spectral_metrics(weight, exact=False)["singular_values"][-1]
    assert calls and sigma_min == pytest.approx(real(weight)[-1].item(), rel=TOLERANCE)


@pytest.mark.parametrize("exponent", [1.8, 2.5, 5.0])
def test_a_power_law_tail_gives_its_exponent_back(exponent):
    quantiles = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    eigenvalues = (1 - quantiles) ** (-1 / (exponent - 1))  # density ~ lambda^-exponent from 1 on
    metrics = spectral_metrics(with_spectrum_of(eigenvalues.sqrt()), power_law=True)
    assert metrics["power_law_exponent"] == pytest.approx(
        exponent, rel=0.05
    )  # of 400 samples: 1.5 / 20 = 0.075 at 2.5


@pytest.mark.parametrize("shape", [(60, 90), (200, 200), (300, 40)])
def test_the_tail_is_that_of_the_powerlaw_package_with_exponents_of_any_size(shape):
    powerlaw = pytest.importorskip("powerlaw")
    metrics = spectral_metrics(noise(*shape).double(), power_law=True)
    eigenvalues = torch.tensor(metrics["singular_values"], dtype=torch.float64).square().numpy()
    expected = powerlaw.Fit(eigenvalues, verbose=0, parameter_ranges={"alpha": [1, math.inf]}).power_law.alpha
    assert metrics["power_law_exponent"] == pytest.approx(expected, rel=1e-6)


def test_equal_largest_eigenvalues_are_no_tail():
    sigma = torch.cat([torch.full((5,), 9.0), torch.linspace(5, 1, 20)]).double()
    assert 1 < spectral_metrics(torch.diag(sigma), power_law=True)["power_law_exponent"] < 20


def test_few_eigenvalues_have_no_tail():
    few = spectral_metrics(noise(5, 9), power_law=True)
    assert few["power_law_exponent"] is None
    assert few["reason"] == "power_law_exponent: fewer than 10 different eigenvalues to fit"
    assert "power_law_exponent" not in spectral_metrics(noise(5, 9))


def with_spectrum_of(sigma: torch.Tensor) -> torch.Tensor:
    return torch.diag(sigma)
