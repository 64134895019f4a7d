"""The "blueberry" experts implementation: against a per-token loop, gradcheck, and transformers' own models."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from blueberry import BlueberryConfig, experts_blueberry
from blueberry.experts_blueberry import EXPERTS_IMPLEMENTATION, combine, sort_by_expert
from blueberry.modeling_blueberry import BlueberryExperts, BlueberryGatedExperts
from blueberry.threads_blueberry import blas_threads

GATED = [False, True]
SIZES = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "moe_intermediate_size": 12}


def build_experts(
    gated: bool, implementation: str = EXPERTS_IMPLEMENTATION, std: float = 0.5, **overrides
) -> nn.Module:
    """Five experts in fp64 with weights of standard deviation `std`."""
    torch.manual_seed(0)
    config = BlueberryConfig(**SIZES | {"num_experts": 5, "hidden_act": "silu", "gated_experts": gated} | overrides)
    config._experts_implementation = implementation
    experts = (BlueberryGatedExperts if gated else BlueberryExperts)(config).double()
    for weight in experts.parameters():
        nn.init.normal_(weight, std=std)
    return experts


def random_routing(num_tokens: int, experts: list[int], top_k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (tokens, 8), and for each token `top_k` different ones of `experts` with their weights."""
    torch.manual_seed(1)
    hidden = torch.randn(num_tokens, 8, dtype=torch.float64, requires_grad=True)
    index = torch.stack([torch.tensor(experts)[torch.randperm(len(experts))[:top_k]] for _ in range(num_tokens)])
    weights = torch.rand(num_tokens, top_k, dtype=torch.float64).softmax(-1).requires_grad_()
    return hidden, index, weights


def per_token_loop(experts: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The definition: sum_k w_k down_k(silu(up_k x)), or with silu(gate x) * up x, one token at a time."""
    rows = []
    for token in range(len(hidden)):
        row = torch.zeros_like(hidden[token])
        for slot, expert in enumerate(index[token].tolist()):
            if experts.has_gate:
                gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
                inner = gate * torch.sigmoid(gate) * up
            else:
                up = experts.up_proj[expert] @ hidden[token]
                inner = up * torch.sigmoid(up)
            row = row + weights[token, slot] * (experts.down_proj[expert] @ inner)
        rows.append(row)
    return torch.stack(rows)


def gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a fixed random projection of the output."""
    direction = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(2))
    return torch.autograd.grad((output * direction).sum(), inputs, materialize_grads=True)


@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize("implementation", ["eager", EXPERTS_IMPLEMENTATION])
@pytest.mark.parametrize("std", [0.5, 50.0])
def test_experts_equal_a_loop_over_tokens_and_so_do_their_gradients(gated: bool, implementation: str, std: float):
    experts = build_experts(gated, implementation, std)
    hidden, index, weights = random_routing(13, [0, 1, 2, 3, 4])
    inputs = [hidden, weights, *experts.parameters()]
    actual, expected = experts(hidden, index, weights), per_token_loop(experts, hidden, index, weights)
    torch.testing.assert_close(actual, expected)
    for one, other in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("chosen", "activation"), [([0, 1, 2, 3, 4], "silu"), ([1, 3], "gelu"), ([4], "silu")], ids=["all", "two", "one"]
)
@pytest.mark.parametrize("gated", GATED)
def test_any_number_of_threads_computes_the_same(gated, chosen, activation, threads, monkeypatch):
    experts = build_experts(gated, hidden_act=activation)
    hidden, index, weights = random_routing(40, chosen, top_k=min(2, len(chosen)))
    inputs = [hidden, weights, *experts.parameters()]
    expected = copy.deepcopy(experts)
    expected.config._experts_implementation = "eager"
    others = [hidden, weights, *expected.parameters()]
    monkeypatch.setattr(experts_blueberry, "workers_pay", lambda multiplications: True)
    with blas_threads(threads):
        output = experts(hidden, index, weights)
        actual = [output, *gradients(output, inputs)]
    output = expected(hidden, index, weights)
    torch.testing.assert_close(actual, [output, *gradients(output, others)], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("rows", "threads", "expected"),
    [
        ([5, 7, 6, 5], 2, [(1, 1), (1, 2), (1, 0), (1, 3)]),  # (threads, expert), the longest first
        ([5, 7, 6, 5], 8, [(2, 1), (2, 2), (2, 0), (2, 3)]),
        ([2, 20, 1, 1], 2, [(2, 1), (2, 0), (2, 2), (2, 3)]),  # a second worker would wait for the second expert
        ([9], 4, [(4, 0)]),
        ([], 4, []),
    ],
)
@pytest.mark.parametrize("pays", [True, False])
def test_experts_share_the_threads_unless_one_has_most_rows(rows, threads, expected, pays, monkeypatch):
    given = []
    monkeypatch.setattr(experts_blueberry, "workers_pay", lambda multiplications: pays)
    monkeypatch.setattr(
        experts_blueberry, "run_on_workers", lambda work, order, each: given.extend((each, index) for index in order)
    )
    spans = [(expert, sum(rows[:expert]), sum(rows[: expert + 1])) for expert in range(len(rows))]
    with blas_threads(threads):
        experts_blueberry.for_each_expert(print, spans, torch.Size((3, 2)))
    assert given == [(each if pays else threads, index) for each, index in expected]


class TwiceSiLU(nn.SiLU):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize("change", ["subclass", "hook", "pre-hook", "gate"])
def test_what_only_looks_like_silu_is_computed_as_it_is(gated, change):
    """A subclass, a hook on the module, and a gate set on one object were taken for the plain ones, or an error."""
    experts, calls = build_experts(gated), []
    if change == "subclass":
        experts.act_fn = TwiceSiLU()
    elif change == "hook":
        experts.act_fn.register_forward_hook(lambda module, inputs, output: calls.append(1) or 2 * output)
    elif change == "pre-hook":
        experts.act_fn.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    elif gated:
        experts._apply_gate = lambda x: 2 * nn.functional.silu(x[:, :12]) * x[:, 12:]
    hidden, index, weights = random_routing(9, [0, 1, 2])
    output, inputs = experts(hidden, index, weights), [hidden, weights, *experts.parameters()]
    eager = copy.deepcopy(experts)
    eager.config._experts_implementation = "eager"
    expected, others = eager(hidden, index, weights), [hidden, weights, *eager.parameters()]
    torch.testing.assert_close([output, *gradients(output, inputs)], [expected, *gradients(expected, others)])
    assert bool(calls) == (change == "hook")


def test_the_forward_builds_no_graph_inside():
    """Hooks on saved tensors (offloading, checkpointing) would be called for what nobody needs."""
    experts, saved = build_experts(gated=True, hidden_act="gelu"), []
    hidden, index, weights = random_routing(9, [0, 1, 2])
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        experts(hidden, index, weights)
    assert len(saved) == 5 + 3  # hidden, scores, two weights, the rows put out; three experts' inner rows


@pytest.mark.parametrize("gated", GATED)
def test_experts_in_single_precision_equal_the_loop_in_double_precision(gated: bool):
    exact = build_experts(gated)
    hidden, index, weights = random_routing(70, [0, 1, 2, 4])  # some 35 tokens each: blocks are filled up
    inputs = [hidden, weights, *exact.parameters()]
    expected = per_token_loop(exact, hidden, index, weights)
    experts = build_experts(gated).float()
    singles = [tensor.detach().float().requires_grad_() for tensor in (hidden, weights)]
    actual = experts(singles[0], index, singles[1])
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)
    singles += experts.parameters()
    direction = torch.randn(expected.shape, dtype=torch.float64)
    ours = torch.autograd.grad(actual, singles, direction.float())
    for one, other in zip(ours, torch.autograd.grad(expected, inputs, direction), strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()  # sums of some hundred terms, 2^-24 each


@pytest.mark.parametrize("gated", GATED)
def test_gradients_pass_gradcheck(gated: bool):
    experts = build_experts(gated)
    hidden, index, weights = random_routing(4, [0, 2, 4])
    names = [name for name, _ in experts.named_parameters()]

    def forward(hidden: Tensor, weights: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(experts, dict(zip(names, parameters, strict=True)), (hidden, index, weights))

    assert torch.autograd.gradcheck(forward, (hidden, weights, *experts.parameters()))


@pytest.mark.parametrize("gated", GATED)
def test_experts_without_tokens_get_zero_gradients(gated: bool):
    experts = build_experts(gated)
    hidden, index, weights = random_routing(6, [1, 3])
    for gradient in gradients(experts(hidden, index, weights), list(experts.parameters())):
        assert not gradient[[0, 2, 4]].any()
        assert all(gradient[[1, 3]].flatten(1).any(dim=1))


def test_no_tokens_at_all_give_an_empty_output_and_zero_gradients():
    experts = build_experts(gated=False)
    output = experts(torch.zeros(0, 8, dtype=torch.float64), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert output.shape == (0, 8)
    assert not any(gradient.any() for gradient in gradients(output, list(experts.parameters())))


@pytest.mark.parametrize("gated", GATED)
def test_pairs_of_other_ranks_contribute_nothing(gated: bool):
    # expert parallelism sends the index num_experts for an expert that lives elsewhere
    experts = build_experts(gated)
    hidden, index, weights = random_routing(6, [0, 1, 5])
    here = index < 5
    expected = per_token_loop(experts, hidden, index.clamp(max=4), weights * here)
    actual = experts(hidden, index, weights)
    torch.testing.assert_close(actual, expected)
    for one, other in zip(gradients(actual, [hidden]), gradients(expected, [hidden]), strict=True):
        torch.testing.assert_close(one, other)
    assert not gradients(experts(hidden, index, weights), [weights])[0][~here].any()


@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize("num_tokens", [1, 2, 40])
@pytest.mark.parametrize("width", [12, 10])  # rows of 10 do not suit the grouped product
@torch.no_grad()
def test_experts_outside_training_equal_the_loop_over_tokens(gated: bool, num_tokens: int, width: int):
    exact = build_experts(gated, moe_intermediate_size=width)
    exact._is_expert_parallel = True  # expert 5 lives elsewhere
    hidden, index, weights = random_routing(num_tokens, [1, 2, 5])
    expected = per_token_loop(exact, hidden, index.clamp(max=4), weights * (index < 5))
    torch.testing.assert_close(exact(hidden, index, weights), expected)
    experts = copy.deepcopy(exact).float()
    torch.testing.assert_close(
        experts(hidden.float(), index, weights.float()).double(), expected, rtol=1e-4, atol=1e-5
    )
    with torch.autocast("cpu", torch.bfloat16):
        rounded = experts(hidden.float(), index, weights.float()).double()
    assert (rounded - expected).norm() <= 0.02 * expected.norm()  # bf16 rounds to 2^-9


def test_frozen_experts_get_no_gradient_but_pass_it_on():
    experts = build_experts(gated=False)
    hidden, index, weights = random_routing(6, [0, 1, 2])
    (expected,) = gradients(experts(hidden, index, weights), [hidden])
    experts.requires_grad_(False)
    (actual,) = gradients(experts(hidden, index, weights), [hidden])
    torch.testing.assert_close(actual, expected)
    assert experts.up_proj.grad is None


def test_sorting_puts_every_pair_at_its_place():
    index = torch.tensor([[3, 0], [1, 3], [0, 4], [3, 1]])
    routing = sort_by_expert(index, num_experts=4)  # expert 4 lives elsewhere
    assert routing.spans == [(0, 0, 2), (1, 2, 4), (3, 4, 7)]
    assert routing.token.tolist() == [0, 2, 1, 3, 0, 1, 3, 2]
    assert torch.equal(index.flatten()[routing.pair], index.flatten().sort().values)
    assert torch.equal(index.flatten()[routing.pair][routing.place], index)
    assert routing.real.all()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.sampled_from([1, 2, 3, 16]))
def test_blocks_are_filled_with_repetitions_that_no_token_reads(experts: list[int], block: int):
    index = torch.tensor(experts).unsqueeze(1)  # expert 5 lives elsewhere
    routing = sort_by_expert(index, num_experts=5, block=block)
    assert torch.equal(routing.pair[routing.place], torch.arange(len(experts)).unsqueeze(1))
    assert sorted(routing.place.flatten().tolist()) == routing.real.nonzero().flatten().tolist()
    assert [expert for expert, _, _ in routing.spans] == sorted(set(experts) - {5})
    for expert, start, stop in routing.spans:
        count = experts.count(expert)
        assert stop - start == (count if count <= block else -(-count // block) * block)
        assert all(experts[pair] == expert for pair in routing.pair[start:stop])
    assert len(routing.pair) == sum(stop - start for _, start, stop in routing.spans) + experts.count(5)


def test_combine_sums_the_pairs_of_a_token():
    pairs, scores = torch.randn(6, 3), torch.rand(3, 2)
    place = torch.tensor([[0, 5], [3, 1], [2, 4]])
    torch.testing.assert_close(combine(pairs, place), pairs[place].sum(dim=1))
    torch.testing.assert_close(combine(pairs, place, scores), (pairs[place] * scores[..., None]).sum(dim=1))


@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize("hardware", [False, True])
def test_autocast_agrees_with_full_precision(gated: bool, hardware: bool, monkeypatch):
    monkeypatch.setattr(experts_blueberry, "has_fast_half_precision", lambda: hardware)
    experts = build_experts(gated).float()
    hidden, index, weights = (
        tensor.float().detach() if tensor.is_floating_point() else tensor
        for tensor in random_routing(64, [0, 1, 2, 3])  # some 32 tokens each: blocks are filled up
    )
    hidden.requires_grad_(), weights.requires_grad_()
    inputs = [hidden, weights, *experts.parameters()]
    expected = experts(hidden, index, weights)
    with torch.autocast("cpu", torch.bfloat16):
        actual = experts(hidden, index, weights)
    assert actual.dtype == torch.float32
    # bf16 rounds to 2^-9; a handful of roundings in a row. Without hardware the products stay in fp32.
    tolerance = 0.02 if hardware else 1e-6
    assert (actual - expected).norm() <= tolerance * expected.norm()
    for one, other in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= tolerance * other.norm()


def test_compiled_experts_equal_eager_ones():
    experts = build_experts(gated=False).float()
    hidden, index, weights = (
        tensor.float() if tensor.is_floating_point() else tensor for tensor in random_routing(6, [0, 1, 2])
    )
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden, index, weights), experts(hidden, index, weights))


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traced_experts_follow_the_routing_of_another_input(num_tokens: int):
    experts = build_experts(gated=False).float().requires_grad_(False)
    routings = [random_routing(num_tokens, chosen) for chosen in ([0, 1], [2, 4])]
    first, second = ((hidden.detach().float(), index, weights.detach().float()) for hidden, index, weights in routings)
    with torch.no_grad():
        traced = torch.jit.trace(experts, first, check_trace=False)
        torch.testing.assert_close(traced(*second), experts(*second))


SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "eos_token_id": None,
}
OTHERS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3_moe": lambda: Qwen3MoeConfig(**SMALL, moe_intermediate_size=24),
    "mixtral": lambda: MixtralConfig(**SMALL),
    "olmoe": lambda: OlmoeConfig(**SMALL),
    "gpt_oss": lambda: GptOssConfig(**SMALL, layer_types=["full_attention"] * 2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_transformers_train_the_same_as_with_eager_experts(name: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OTHERS[name](), attn_implementation="eager").train()
    ids = torch.randint(0, 50, (2, 12))
    results = {}
    for implementation in ("eager", EXPERTS_IMPLEMENTATION):
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        results[implementation] = loss, {key: value.grad.clone() for key, value in model.named_parameters()}
    (eager_loss, eager), (loss, ours) = results.values()
    torch.testing.assert_close(loss, eager_loss)
    for key in eager:
        assert (ours[key] - eager[key]).norm() <= 1e-5 * eager[key].norm() + 1e-8, key
