"""Many matrices at once give what one at a time gives."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from blueberry.spectral import analysis, analyze, spectral_metrics, update_metrics

GENERATOR = torch.Generator().manual_seed(0)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


MATRICES = {
    "model.layers.0.self_attn.q_proj.weight": noise(12, 12),
    "model.layers.0.mlp.experts.up_proj": noise(3, 16, 12),
    "model.layers.1.self_attn.q_proj.weight": noise(12, 12),
    "model.layers.1.mlp.gate.weight": noise(3, 12),
}
UPDATES = {name: 0.01 * noise(*matrix.shape) for name, matrix in MATRICES.items()}


def approximately(row: dict, expected: dict) -> bool:
    return all(
        row[name] == (value if isinstance(value, str) else pytest.approx(value)) for name, value in expected.items()
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_rows_equal_the_metrics_of_each_matrix_alone(workers, monkeypatch):
    monkeypatch.setattr(analysis, "BATCH_ELEMENTS", 2 * 12 * 12)  # several batches of one shape
    rows = analyze(MATRICES, UPDATES, k=2, workers=workers)
    assert [(row["layer"], row["projection"], row["expert"]) for row in rows] == [
        (0, "q_proj", None),
        *((0, "up_proj", expert) for expert in range(3)),
        (1, "q_proj", None),
        (1, "gate", None),
    ]
    for row in rows:
        weight, update = MATRICES[row["parameter"]], UPDATES[row["parameter"]]
        if row["expert"] is not None:
            weight, update = weight[row["expert"]], update[row["expert"]]
        assert (row["rows"], row["columns"]) == weight.shape
        assert approximately(row, spectral_metrics(weight) | update_metrics(weight, update, k=2))


def test_updates_already_made_are_compared_with_the_weights_before_them():
    name, weight, update = "layers.0.a.b.weight", noise(10, 8), noise(10, 8)
    row = analyze({name: weight + update}, {name: update}, k=2, updated=True)[0]
    assert approximately(
        row, spectral_metrics(weight + update) | update_metrics(weight, update, k=2) | {"reason": None}
    )


def test_a_matrix_without_update_has_weight_metrics_only():
    rows = analyze(
        MATRICES, {"model.layers.0.self_attn.q_proj.weight": UPDATES["model.layers.0.self_attn.q_proj.weight"]}
    )
    assert "update_alignment" in rows[0] and not any("update_alignment" in row for row in rows[1:])


def test_one_bad_expert_does_not_spoil_the_others():
    stack = noise(3, 8, 6)
    stack[1, 0, 0] = torch.nan
    rows = analyze({"layers.0.experts.w": stack}, {"layers.0.experts.w": noise(3, 8, 6)}, k=2)
    assert [row["spectral_norm"] is None for row in rows] == [False, True, False]
    assert [row["reason"] is None for row in rows] == [True, False, True]


def test_analysis_leaves_the_thread_counts_of_others_alone():
    def in_a_thread(work):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(work).result()

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        in_a_thread(lambda: analyze(MATRICES, workers=2))
        analyze(MATRICES)
        assert torch.get_num_threads() == 3
        assert in_a_thread(torch.get_num_threads) == 3
    finally:
        torch.set_num_threads(before)


def test_mismatched_updates_and_vectors_are_refused_by_name():
    with pytest.raises(ValueError, match=r"layers\.0\.w: update"):
        analyze({"layers.0.w": noise(3, 4)}, {"layers.0.w": noise(4, 3)})
    with pytest.raises(ValueError, match=r"norm: expected a matrix or a stack of matrices, got shape \(4,\)"):
        analyze({"norm": noise(4)})
