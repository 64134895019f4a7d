"""The model as transformers uses it: saving, attention, caches, padding, generation, checkpointing, bad input."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StaticCache,
    set_seed,
)
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM, export_with_dynamic_cache

from blueberry import BlueberryConfig, BlueberryForCausalLM

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
    model(ids, **{"labels": ids, "use_cache": False} | kwargs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# Attention, positions, caches


def test_the_gated_model_computes_what_qwen3_moe_computes_with_its_weights():
    """Oracle: another implementation of the same architecture, whose embeddings are not scaled in the forward."""
    model, ids = build("gated_experts", tie_word_embeddings=False).double(), tokens(2, 12)
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "head_dim", "moe_intermediate_size", "num_experts", "num_experts_per_tok", "norm_topk_prob", "hidden_act",
             "rms_norm_eps", "tie_word_embeddings")  # fmt: skip
    config = Qwen3MoeConfig(**{size: getattr(model.config, size) for size in sizes}, experts_implementation="eager")
    oracle = Qwen3MoeForCausalLM(config).double()
    oracle.load_state_dict(model.state_dict())
    oracle.get_input_embeddings().weight.data *= model.config.hidden_size**0.5
    torch.testing.assert_close(
        model(ids).logits, oracle.eval()(ids).logits, rtol=0, atol=1e-4
    )  # fp32 router and angles


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_sdpa_and_flex_attention_equal_eager_attention(variant: str, padding: str):
    model, ids = build(variant).double().train(), tokens(2, 10)
    mask = torch.ones_like(ids)
    mask[0, {"none": slice(0), "left": slice(3), "right": slice(7, None)}[padding]] = 0
    labels = ids.masked_fill((mask == 0) | (mask.roll(1, dims=1) == 0), -100)  # nor what padding would predict
    logits, grads = {}, {}
    for name in ("eager", "sdpa", "flex_attention"):
        model.set_attn_implementation(name)
        # flex attention as it is defined, not its compiled kernel; on a CPU it has no backward
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            logits[name] = model(ids, attention_mask=mask).logits[mask.bool()]
        if name != "flex_attention":
            grads[name] = gradients(model, ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(logits["sdpa"], logits["eager"])
    torch.testing.assert_close(logits["flex_attention"], logits["eager"])
    # transformers' loss rounds the logits to fp32
    torch.testing.assert_close(grads["sdpa"], grads["eager"], rtol=1e-5, atol=1e-7)


@pytest.mark.slow  # compiles a kernel
@torch.no_grad()
def test_compiled_flex_attention_equals_sdpa():
    model, ids = build(), tokens(2, 10)
    expected = model(ids).logits
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_heads_that_do_not_divide_the_hidden_size_attend_the_same():
    sizes = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 10}
    model, ids = build(**sizes).double().train(), tokens(2, 10)
    by_blocks = gradients(model, ids)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(by_blocks, gradients(model, ids))


def test_the_attention_implementation_can_be_chosen_and_switched(tmp_path):
    model, ids = build(attn_implementation="eager"), tokens(2, 5)
    model.save_pretrained(tmp_path)
    assert model(ids, output_attentions=True).attentions[0] is not None
    assert BlueberryForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    loaded = BlueberryForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.model.layers[0].self_attn.config._attn_implementation == "eager"
    loaded.set_attn_implementation("sdpa")
    assert loaded.model.layers[0].self_attn.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_is_causal(variant: str):
    model, ids = build(variant).double(), tokens(1, 12)
    changed = ids.clone()
    changed[0, 7] = ids[0, 7] % 63 + 1
    difference = (model(changed).logits - model(ids).logits).abs().amax(dim=(0, 2))
    assert difference[:7].max() < 1e-12  # the products of the experts change their sizes
    assert difference[7:].min() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_sequences_do_not_see_each_other(variant: str):
    # one row of two sequences, told apart by positions that start again
    model, (first, second) = build(variant).double(), (tokens(1, 6), tokens(1, 4, seed=3))
    positions = torch.cat([torch.arange(6), torch.arange(4)])[None]
    packed = model(torch.cat([first, second], dim=1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, :6], model(first).logits)
    torch.testing.assert_close(packed[:, 6:], model(second).logits)


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
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_decoding_with_a_cache_equals_one_full_forward(variant: str, attention: str, kind: str):
    model, ids = build(variant, attn_implementation=attention).double(), tokens(2, 9)
    full = model(ids).logits
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=12)
    steps = [model(piece, past_key_values=cache).logits for piece in (ids[:, :4], *ids[:, 4:].split(1, dim=1))]
    torch.testing.assert_close(torch.cat(steps, dim=1), full)


@pytest.mark.parametrize("scaling", ["linear", "dynamic", "yarn"])
def test_positions_can_be_scaled_for_long_sequences(scaling: str):
    rope = {"rope_type": scaling, "rope_theta": 1e4, "factor": 4.0}
    plain, scaled = build("dense"), build("dense", rope_parameters=rope)
    short, long = tokens(1, 8), tokens(1, 80)  # trained for 64
    same = torch.allclose(plain(short).logits, scaled(short).logits, rtol=1e-4, atol=1e-4)
    assert same == (scaling == "dynamic")  # which changes nothing before the trained length
    assert not torch.allclose(plain(long).logits, scaled(long).logits, rtol=1e-4, atol=1e-4)


def test_logits_to_keep_keeps_the_last_logits():
    model, ids = build(), tokens(2, 9)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:])


def test_embeddings_given_directly_equal_token_ids():
    model, ids = build(), tokens(2, 5)
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(ids).logits)


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
def test_the_exported_model_computes_batches_of_other_shapes(variant: str):
    model, ids = build(variant), tokens(2, 8)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    auto = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    shapes = {"input_ids": auto, "attention_mask": auto, "use_cache": None}
    exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False).module()
    ids = tokens(3, 13)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    actual = exported(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_transformers_exports_the_model_with_a_static_and_a_dynamic_cache(variant: str):
    """With the helpers that it has for ExecuTorch; both programs decode a text as the model does."""
    model, ids = build(variant), tokens(1, 6)
    expected = model(ids).logits
    model.generation_config = GenerationConfig(
        use_cache=True, cache_implementation="static",
        cache_config={"batch_size": 1, "max_cache_len": 8, "device": "cpu"},
    )  # fmt: skip
    module = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=8)
    program = module.export(input_ids=ids[:, :1], cache_position=torch.tensor([0])).module()
    steps = [program(input_ids=ids[:, at : at + 1], cache_position=torch.tensor([at])) for at in range(6)]
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-4)
    program = export_with_dynamic_cache(model, ids, torch.ones_like(ids)).module()
    cache = DynamicCache(config=model.config)
    found = program(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)
    assert found.past_key_values.get_seq_length() == 6


@torch.no_grad()
def test_the_compiled_model_decodes_every_token_with_one_graph():
    model, ids = build(), tokens(2, 9)
    expected = model(ids).logits
    cache = StaticCache(model.config, max_cache_len=12)
    prompt = model(ids[:, :4], past_key_values=cache).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    steps = []
    for position in range(4, 9):
        with torch._dynamo.config.patch(error_on_recompile=position > 4):
            where = torch.tensor([[position]])
            steps.append(compiled(ids[:, position : position + 1], position_ids=where, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat([prompt, *steps], dim=1), expected, rtol=1e-4, atol=1e-4)


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
def test_every_experts_implementation_gives_logits_and_gradients_of_the_eager_one(variant: str, implementation: str):
    model, ids = build(variant).train(), tokens(2, 8)
    assert model.config._experts_implementation == "blueberry"
    results = []
    for name in ("eager", implementation):
        model.set_experts_implementation(name)
        results.append((model(ids).logits, gradients(model, ids)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_the_experts_implementation_can_be_chosen_when_loading(tmp_path):
    build().save_pretrained(tmp_path)
    for name in ("eager", "grouped_mm"):
        loaded = BlueberryForCausalLM.from_pretrained(tmp_path, experts_implementation=name)
        assert loaded.model.layers[0].mlp.experts.config._experts_implementation == name
