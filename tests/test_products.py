"""Which library multiplies a few rows, and that nothing of the choice stays behind."""

from collections.abc import Iterator

import pytest
import torch
from test_experts import build_experts

from blueberry import BlueberryConfig, BlueberryForCausalLM, experts_blueberry, products_blueberry
from blueberry.products_blueberry import FEW_ROWS, products_of_few_rows

ONE = torch.randn(1, 1, 64, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def capable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On any machine as on one with AVX-512, where torch's flags may be set; oneDNN is on afterwards."""
    monkeypatch.setattr(products_blueberry, "has_avx512", lambda: True)
    freeze_flags(monkeypatch, False)
    with torch.no_grad():
        yield
    assert torch.backends.mkldnn.enabled


def freeze_flags(monkeypatch: pytest.MonkeyPatch, frozen: bool) -> None:
    own = torch.backends.flags_frozen.__globals__
    monkeypatch.setitem(own, "__allow_nonbracketed_mutation_flag", not frozen)


def is_off() -> bool:
    return not torch.backends.mkldnn.enabled


def test_onednn_is_left_out_for_a_few_rows_and_comes_back():
    with products_of_few_rows(ONE):
        assert is_off()
        with products_of_few_rows(ONE):
            assert is_off()
        assert is_off()
    assert not is_off()
    with pytest.raises(RuntimeError, match="inside"), products_of_few_rows(ONE):
        raise RuntimeError("inside")
    assert not is_off()


def test_onednn_comes_back_with_the_last_thread_that_left_it_out():
    """Two threads decode at once: the one that entered first leaves first."""
    first, second = products_of_few_rows(ONE), products_of_few_rows(ONE)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert is_off()
    second.__exit__(None, None, None)
    assert not is_off()


def test_onednn_stays_off_where_it_was_off():
    torch.backends.mkldnn.enabled = False
    try:
        with products_of_few_rows(ONE):
            pass
        assert is_off()
    finally:
        torch.backends.mkldnn.enabled = True


@pytest.mark.parametrize("x", [ONE.expand(1, 3, 64), ONE.float(), ONE.double()], ids=["3 rows", "float32", "float64"])
def test_other_products_stay_with_onednn(x: torch.Tensor):
    with products_of_few_rows(x):
        assert not is_off()


def test_flags_that_nobody_may_set_stay(monkeypatch):
    """After `torch.backends.disable_global_flags()`, which torch's own tests call, setting one is an error."""
    freeze_flags(monkeypatch, True)
    with products_of_few_rows(ONE):
        assert not is_off()


def test_training_stays_with_onednn():
    with torch.enable_grad(), products_of_few_rows(ONE):
        assert not is_off()


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("num_experts", [0, 4])
def test_the_model_decodes_the_same_by_both(tokens: int, num_experts: int, monkeypatch):
    """Both sum in float32 and round once: a few units of bf16's eight bits."""
    sizes = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 256}
    config = BlueberryConfig(**sizes, num_hidden_layers=2, num_experts=num_experts)
    model = BlueberryForCausalLM(config).eval().to(torch.bfloat16)
    ids = torch.arange(tokens).unsqueeze(1)
    ours = model(ids).logits
    for module in (products_blueberry, experts_blueberry):
        monkeypatch.setattr(module, "FEW_ROWS", 0)
    torch.testing.assert_close(ours, model(ids).logits, rtol=0.05, atol=0.05 * ours.std().item())


def test_experts_leave_onednn_out_when_each_gets_a_few_rows(monkeypatch):
    """Counted over the experts that are chosen: when all tokens choose the same one, it gets all rows."""
    experts = build_experts(gated=True, num_experts=8, hidden_size=16, moe_intermediate_size=16).to(torch.bfloat16)
    seen, grouped = [], experts_blueberry.grouped_mm_experts_forward
    monkeypatch.setattr(
        experts_blueberry, "grouped_mm_experts_forward", lambda *args: seen.append(is_off()) or grouped(*args)
    )
    hidden = torch.randn(4, experts.hidden_dim, dtype=torch.bfloat16)
    for index in (torch.arange(8).view(4, 2), torch.zeros(4, 1, dtype=torch.long)):
        experts(hidden, index, torch.ones(index.shape, dtype=torch.bfloat16))
    assert seen == [True, False]


@pytest.mark.parametrize(("chosen", "rows"), [([[0, 1], [2, 3]], 1), ([[0, 1], [0, 1]], 2), ([[0]] * 40, 10), ([], 0)])
def test_rows_of_an_expert(chosen: list, rows: float):
    """Of four; 40 rows are too many to count."""
    assert experts_blueberry.rows_of_an_expert(torch.tensor(chosen), num_experts=4) == rows
    assert rows <= FEW_ROWS or len(chosen) > 4 * FEW_ROWS
