"""Linear layers by oneDNN equal torch's, gradients too, and stand in for them in fp32 training on a CPU alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from blueberry import BlueberryConfig, BlueberryForCausalLM, experts_blueberry, linear_blueberry, products_blueberry
from blueberry.linear_blueberry import BlueberryLinear
from blueberry.products_blueberry import has_onednn_linear, linear

pytestmark = pytest.mark.skipif(not has_onednn_linear(), reason="this torch has no oneDNN")
BY_ONEDNN = "_LinearBackward"


@pytest.fixture(autouse=True)
def small_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_blueberry, "ENOUGH", 1)


def way(output: Tensor) -> str | None:
    return output.grad_fn and output.grad_fn.name()


@pytest.mark.parametrize("shape", [(20,), (7, 20), (3, 5, 20), (2, 3, 5, 20)], ids=str)
def test_outputs_and_gradients_are_those_of_the_definition(shape: tuple[int, ...]):
    layer, x = BlueberryLinear(20, 30, bias=False), torch.randn(shape, requires_grad=True)
    output, direction = layer(x), torch.randn(*shape[:-1], 30)
    assert way(output) == BY_ONEDNN
    wide_x, wide_weight = (tensor.detach().double().requires_grad_() for tensor in (x, layer.weight))
    expected = F.linear(wide_x, wide_weight)
    torch.testing.assert_close(output, expected.float())
    actual = torch.autograd.grad(output, (x, layer.weight), direction)
    wide = torch.autograd.grad(expected, (wide_x, wide_weight), direction.double())
    torch.testing.assert_close(actual, tuple(grad.float() for grad in wide))


def test_inputs_and_gradients_may_have_any_layout():
    layer, x = BlueberryLinear(6, 8, bias=False), torch.randn(6, 5, 4).permute(2, 1, 0).requires_grad_()
    for direction in (torch.ones(()).expand(4, 5, 8), torch.randn(8, 5, 4).permute(2, 1, 0)):
        actual = torch.autograd.grad(layer(x), (x, layer.weight), direction)
        plain = torch.autograd.grad(F.linear(x, layer.weight), (x, layer.weight), direction)
        torch.testing.assert_close(actual, plain)


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen: str):
    layer, x = BlueberryLinear(6, 8, bias=False), torch.randn(5, 6, requires_grad=frozen != "input")
    layer.weight.requires_grad_(frozen != "weight")
    output = layer(x)
    assert way(output) == BY_ONEDNN
    output.sum().backward()
    assert (x.grad is None) == (frozen == "input") and (layer.weight.grad is None) == (frozen == "weight")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_torch(dtype: torch.dtype):
    layer, x = BlueberryLinear(6, 8, bias=False).to(dtype), torch.randn(5, 6, dtype=dtype)
    assert way(layer(x)) != BY_ONEDNN


def test_everything_else_is_left_to_torch(monkeypatch: pytest.MonkeyPatch):
    layer, x = BlueberryLinear(6, 8, bias=False), torch.randn(5, 6)
    for context in (torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            assert way(layer(x)) != BY_ONEDNN
    assert way(BlueberryLinear(6, 8)(x)) != BY_ONEDNN  # a bias
    assert way(layer.to("meta")(x.to("meta"))) != BY_ONEDNN
    monkeypatch.setattr(linear_blueberry, "ENOUGH", 5 * 6 * 8 + 1)
    assert way(BlueberryLinear(6, 8, bias=False)(x)) != BY_ONEDNN


def test_a_wrong_width_is_the_error_of_torch():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        BlueberryLinear(6, 8, bias=False)(torch.randn(5, 7))


@pytest.mark.parametrize("num_experts", [0, 4])
def test_a_model_trains_the_same_by_both(num_experts: int, monkeypatch: pytest.MonkeyPatch):
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 48}
    torch.manual_seed(0)
    model = BlueberryForCausalLM(BlueberryConfig(**sizes, num_hidden_layers=2, num_experts=num_experts))
    ids, results = torch.randint(0, 60, (2, 20)), []
    for enough in (1, 10**12):
        monkeypatch.setattr(linear_blueberry, "ENOUGH", enough)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("num_experts", [0, 4])
def test_torchs_counter_of_operations_sees_every_product(num_experts: int, monkeypatch: pytest.MonkeyPatch):
    """It knows torch's products alone: fp32 counts as fp64, which oneDNN never gets (nor rows that fill up blocks)."""
    monkeypatch.setattr(experts_blueberry, "BLOCK", 1)
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 48}
    config = BlueberryConfig(**sizes, num_hidden_layers=2, num_experts=num_experts)
    ids, counts = torch.randint(0, 60, (2, 20)), []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model = BlueberryForCausalLM(config).to(dtype)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, labels=ids, skip_logits=True).loss.backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("at_once", [1, 37 * 130, 10**6], ids=["64 columns", "128 columns", "all"])
def test_a_product_is_written_in_parts(at_once: int, monkeypatch: pytest.MonkeyPatch):
    """Into rows of a larger buffer too, as the logits of the head."""
    monkeypatch.setattr(products_blueberry, "AT_ONCE", at_once)
    x, weight, buffer = torch.randn(37, 20), torch.randn(150, 20), torch.zeros(40, 160)
    for out in (torch.empty(37, 150), buffer[:37, :150]):
        assert linear(x, weight, out=out).data_ptr() == out.data_ptr()
        torch.testing.assert_close(out, (x.double() @ weight.double().t()).float())
    assert not buffer[37:].any() and not buffer[:, 150:].any()


WIDE = torch.randn(150, 60)
WEIGHTS = {
    "contiguous": torch.randn(150, 20),
    "transposed": torch.randn(20, 150).t(),
    "columns": WIDE[:, :20],
    "rows of columns": WIDE[::2, :20],
    "transposed columns": torch.randn(20, 450)[:, :150].t(),
    "expanded": torch.randn(1, 20).expand(150, 20),
}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("out", [False, True])
def test_onednn_gets_nothing_with_gaps(weight: Tensor, out: bool, monkeypatch: pytest.MonkeyPatch):
    """With such weights it takes a thousand times as long: 16 s in place of 20 ms for 2200 x 256 x 2048."""
    seen, x = [], torch.randn(37, 20)
    by_onednn = products_blueberry._onednn_linear
    monkeypatch.setattr(products_blueberry, "_onednn_linear", lambda x, w: seen.append(w) or by_onednn(x, w))
    monkeypatch.setattr(products_blueberry, "AT_ONCE", 1)  # each 64 columns of the product by themselves
    product = linear(x, weight, out=torch.empty(37, len(weight)) if out else None)
    torch.testing.assert_close(product, (x.double() @ weight.double().t()).float())
    assert bool(seen) == (weight.is_contiguous() or weight.t().is_contiguous())
    assert all(w.is_contiguous() or w.t().is_contiguous() for w in seen)
    seen.clear()
    linear(torch.randn(37, 40)[:, :20], weight)
    assert not seen


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_onednn_computes_experts_of_a_few_tokens_outside_training_too(tokens: int, monkeypatch: pytest.MonkeyPatch):
    """In decoding in fp32, where torch's grouped product takes half as long again."""
    rows, by_onednn = [], products_blueberry._onednn_linear
    monkeypatch.setattr(products_blueberry, "_onednn_linear", lambda x, w: rows.append(len(x)) or by_onednn(x, w))
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 48}
    model = BlueberryForCausalLM(BlueberryConfig(**sizes, num_hidden_layers=1, num_experts=4, num_experts_per_tok=2))
    experts, x = model.model.layers[0].mlp.experts, torch.randn(tokens, 32)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
    with torch.no_grad():
        output = experts(x, chosen, torch.rand(tokens, 2, generator=torch.Generator().manual_seed(0)))
        model.set_experts_implementation("eager")
        plain = experts(x, chosen, torch.rand(tokens, 2, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(output, plain)
    assert sum(rows) == 2 * 2 * tokens  # up and down, the pairs alone, without rows that fill up blocks
