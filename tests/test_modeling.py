"""The model as transformers uses it: saving, attention, caches, padding, generation, checkpointing, bad input."""

import copy
import math

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    set_seed,
)

from blueberry import BlueberryConfig, BlueberryForCausalLM, BlueberryForSequenceClassification, BlueberryModel

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 24,
    # larger than in training, so that attention and experts weigh as much as the embeddings
    "initializer_range": 0.3,
}
VARIANTS = {
    "dense": {"num_experts": 0},
    "experts": {"num_experts": 4, "hidden_act": "silu"},
    "gated_experts": {"num_experts": 4, "hidden_act": "silu", "gated_experts": True},
}


def build(variant: str = "experts", seed: int = 0, **overrides) -> BlueberryForCausalLM:
    """A small model in evaluation mode."""
    set_seed(seed)
    return BlueberryForCausalLM(BlueberryConfig(**SMALL | VARIANTS[variant] | overrides)).eval()


def tokens(batch: int, seq: int, seed: int = 1) -> Tensor:
    """Random token ids (batch, seq), never 0, the padding of these tests."""
    return torch.randint(1, SMALL["vocab_size"], (batch, seq), generator=torch.Generator().manual_seed(seed))


def gradients(model: BlueberryForCausalLM, ids: Tensor, **kwargs) -> dict[str, Tensor]:
    """The gradients of the loss of `ids`, by parameter name."""
    model.zero_grad()
    model(ids, labels=ids, use_cache=False, **kwargs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# Saving and loading


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_model_loads_back_with_the_same_logits(variant: str, tmp_path):
    model = build(variant)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, BlueberryForCausalLM)
    torch.testing.assert_close(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits, rtol=0, atol=0)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert isinstance(AutoModel.from_pretrained(tmp_path), BlueberryModel)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_close_to_single_precision(dtype: torch.dtype, tmp_path):
    model = build(initializer_range=0.1)
    model.save_pretrained(tmp_path)
    half = BlueberryForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    # bf16 keeps 8 bits; routing may flip where two experts tie, so the bound is on the mean
    difference = (half(tokens(4, 16)).logits.float() - model(tokens(4, 16)).logits).abs().mean()
    assert difference < 0.02 * model(tokens(4, 16)).logits.std()


def test_untied_embeddings_are_separate_parameters():
    model = build(tie_word_embeddings=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


@pytest.mark.parametrize("variant", VARIANTS)
def test_initialization_is_deterministic_under_a_seed(variant: str):
    first, same, other = (build(variant, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "norm" not in name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_loss_is_that_of_a_uniform_guess(variant: str):
    # a larger vocabulary and the usual range: what a training run starts from
    model = build(variant, initializer_range=0.02, vocab_size=2000, hidden_size=256)
    ids = torch.randint(0, 2000, (4, 64))
    assert abs(model(ids, labels=ids).loss.item() - math.log(2000)) < 0.1


def test_residual_outputs_start_smaller():
    # by sqrt(2 layers) = 2; 3 sigma of a standard deviation estimated from >= 1024 values is 7%
    model = build("experts")
    layer = model.model.layers[0]
    for inner, outer in [
        (layer.self_attn.q_proj.weight, layer.self_attn.o_proj.weight),
        (layer.mlp.experts.up_proj, layer.mlp.experts.down_proj),
    ]:
        assert (outer.std() / inner.std()).item() == pytest.approx(0.5, rel=0.1)


def test_resized_embeddings_stay_tied_and_keep_old_logits():
    model = build()
    ids = tokens(1, 5)
    before = model(ids).logits
    model.resize_token_embeddings(70)
    assert model.lm_head.weight.shape == (70, 32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(ids).logits[..., :64], before)


# Attention, positions, caches


@pytest.mark.parametrize("variant", VARIANTS)
def test_sdpa_equals_eager_attention_with_padding(variant: str):
    model, ids = build(variant).double(), tokens(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    logits = {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        logits[name] = model(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(logits["sdpa"], logits["eager"])


@pytest.mark.slow  # compiles a kernel
@torch.no_grad()
def test_flex_attention_equals_sdpa():
    model, ids = build(), tokens(2, 10)
    expected = model(ids).logits
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_attention_is_causal():
    model, ids = build("dense"), tokens(1, 12)  # with experts another token count moves the last bit of products
    changed = ids.clone()
    changed[0, 7] = ids[0, 7] % 63 + 1
    difference = (model(changed).logits - model(ids).logits).abs().amax(dim=(0, 2))
    assert difference[:7].max() == 0
    assert difference[7:].min() > 0


def test_logits_depend_on_position():
    # without positions attention sees a set: the last of (a, b, c) and of (b, a, c) would get the same logits
    model = build("dense")
    straight = model(torch.tensor([[5, 9, 2]])).logits[0, -1]
    swapped = model(torch.tensor([[9, 5, 2]])).logits[0, -1]
    assert (straight - swapped).abs().max() > 1e-3


def test_rotary_attention_depends_on_distances_only():
    model, ids = build("dense").double(), tokens(1, 6)
    positions = torch.arange(6)[None]
    torch.testing.assert_close(
        model(ids, position_ids=positions).logits, model(ids, position_ids=positions + 11).logits
    )
    assert not torch.allclose(model(ids, position_ids=positions).logits, model(ids, position_ids=positions * 2).logits)


def test_normalized_queries_have_unit_root_mean_square():
    model = build("dense")
    seen = []
    model.model.layers[0].self_attn.q_norm.register_forward_hook(lambda module, args, out: seen.append(out))
    model(tokens(2, 5))
    torch.testing.assert_close(seen[0].square().mean(-1), torch.ones(2, 4, 5), rtol=1e-3, atol=0)  # heads first


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_with_a_cache_equals_one_full_forward(variant: str):
    model, ids = build(variant).double(), tokens(2, 9)
    full = model(ids).logits
    cache, steps = DynamicCache(config=model.config), []
    for piece in (ids[:, :4], *ids[:, 4:].split(1, dim=1)):
        steps.append(model(piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full)


def test_logits_to_keep_keeps_the_last_logits():
    model, ids = build(), tokens(2, 9)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:])


def test_embeddings_given_directly_equal_token_ids():
    model, ids = build(), tokens(2, 5)
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(ids).logits)


# Generation


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_generation_equals_repeated_argmax(variant: str):
    model, ids = build(variant), tokens(1, 4)
    expected = ids
    for _ in range(6):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)


def test_left_padding_does_not_change_what_is_generated():
    model, ids = build(), tokens(1, 5)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (padded != 0).long()
    alone = model.generate(ids, max_new_tokens=6, do_sample=False)[:, 5:]
    beside = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, 8:]
    assert torch.equal(alone, beside)


def test_left_and_right_padding_give_the_logits_of_the_bare_sequence():
    model, ids = build().double(), tokens(1, 5)
    pad = torch.zeros(1, 3, dtype=torch.long)
    bare = model(ids).logits
    left = torch.cat([pad, ids], dim=1)
    torch.testing.assert_close(model(left, attention_mask=(left != 0).long()).logits[:, 3:], bare)
    right = torch.cat([ids, pad], dim=1)
    torch.testing.assert_close(model(right, attention_mask=(right != 0).long()).logits[:, :5], bare)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static", "disable_compile": True},
        {"use_cache": False},
        {"num_beams": 1, "prompt_lookup_num_tokens": 2},
    ],
)
def test_every_way_to_decode_greedily_gives_the_same_tokens(options: dict):
    model, ids = build(), tokens(1, 6)
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, **options), plain)


def test_assisted_decoding_equals_greedy_decoding():
    model, assistant, ids = build(), build("dense", seed=5), tokens(1, 6)
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, assistant_model=assistant, max_new_tokens=8, do_sample=False), plain)


def test_beam_search_finds_a_sequence_at_least_as_likely_as_greedy():
    model, ids = build("dense"), tokens(1, 6)

    def log_probability(sequence: Tensor) -> float:
        scores = model(sequence).logits.log_softmax(-1)[:, 5:-1]
        return scores.gather(-1, sequence[:, 6:, None]).sum().item()

    greedy = model.generate(ids, max_new_tokens=4, do_sample=False, num_beams=1)
    beams = model.generate(ids, max_new_tokens=4, do_sample=False, num_beams=8)
    assert log_probability(beams) >= log_probability(greedy) - 1e-5


def test_sampling_is_reproducible_under_a_seed():
    model, ids = build(), tokens(2, 4)
    draws = []
    for seed in (0, 0, 1):
        set_seed(seed)
        draws.append(model.generate(ids, max_new_tokens=8, do_sample=True))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


# Outputs and training machinery


@pytest.mark.parametrize("variant", VARIANTS)
def test_optional_outputs_have_their_documented_shapes(variant: str):
    model, ids = build(variant, attn_implementation="eager"), tokens(2, 7)
    output = model(ids, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 7, 32)] * 3
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 7, 7)] * 2
    if variant == "dense":
        assert output.router_logits is None and output.aux_loss is None
    else:
        assert [tuple(logits.shape) for logits in output.router_logits] == [(14, 4)] * 2
        assert output.aux_loss >= 1
    assert model(ids).router_logits is None


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(variant: str, use_reentrant: bool):
    # large coefficients, so that a router loss that loses its gradient shows
    model = build(variant, router_aux_loss_coef=1.0, router_z_loss_coef=1.0).double().train()
    expected = gradients(model, tokens(2, 8))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    actual = gradients(model, tokens(2, 8))
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant: str):
    grads = gradients(build(variant).train(), tokens(4, 16))
    assert all(grad.abs().max() > 0 for grad in grads.values())


def test_the_model_survives_a_deep_copy_and_keeps_training():
    model = copy.deepcopy(build()).train()
    ids = tokens(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("variant", ["dense", "experts"])
def test_the_model_exports(variant: str):
    model, ids = build(variant), tokens(1, 8)
    exported = torch.export.export(model.model, (), {"input_ids": ids, "use_cache": False}, strict=False).module()
    actual = exported(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(actual, model.model(ids).last_hidden_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["dense", "experts"])
def test_the_compiled_model_trains_the_same(variant: str):
    model, ids = build(variant, router_aux_loss_coef=1.0).train(), tokens(2, 8)
    expected = gradients(model, ids)
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["experts", "gated_experts"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "blueberry"])
def test_every_experts_implementation_gives_the_logits_of_the_eager_one(variant: str, implementation: str):
    model, ids = build(variant), tokens(2, 8)
    assert model.config._experts_implementation == "blueberry"
    model.set_experts_implementation("eager")
    expected = model(ids).logits
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


# Sequence classification


def test_classification_reads_the_last_token_that_is_not_padding(tmp_path):
    set_seed(0)
    config = BlueberryConfig(**SMALL | VARIANTS["experts"], pad_token_id=0, num_labels=3)
    model = BlueberryForSequenceClassification(config).eval()
    ids = tokens(2, 6)
    padded = torch.cat([ids, torch.zeros(2, 2, dtype=torch.long)], dim=1)
    logits = model(padded, attention_mask=(padded != 0).long()).logits
    assert logits.shape == (2, 3)
    torch.testing.assert_close(logits, model(ids).logits)
    assert model(ids, labels=torch.tensor([0, 2])).loss > 0
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


# Bad input


@pytest.mark.parametrize("bad", [64, -1])
def test_a_token_outside_the_vocabulary_is_named(bad: int):
    with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 64"):
        build()(torch.tensor([[1, bad, 2]]))


def test_ids_and_embeddings_together_are_refused():
    model, ids = build(), tokens(1, 3)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(input_ids=ids, inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_all_masked_row_is_finite_and_leaves_the_others_alone(variant: str):
    model, ids = build(variant), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0] = 0
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[1], model(ids[1:]).logits[0])


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match=r"empty input of shape \(0, 6\)"):
        build()(tokens(2, 6)[:0])
    with pytest.raises(ValueError, match=r"empty input of shape \(2, 0\)"):
        build()(tokens(2, 6)[:, :0])


def test_nan_in_the_router_shows_in_the_loss():
    model, ids = build().train(), tokens(2, 6)
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[0, 0] = float("nan")
    assert model(ids, labels=ids).loss.isnan()


def test_positions_beyond_the_trained_ones_are_extrapolated():
    model = build()
    assert model(tokens(1, 80)).logits.isfinite().all()
    assert model.generate(tokens(1, 60), max_new_tokens=10, do_sample=False).shape == (1, 70)
