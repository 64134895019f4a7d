"""The declared layouts of real architectures, checked by what the models compute."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

import blueberry  # noqa: F401, registers its models
from blueberry.errors import UsageError
from blueberry.optim import assign_parameters, build_optimizer
from blueberry.optim.splits import Layout, cut, join

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
         "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
MOE = SIZES | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
               "head_dim": 4, "num_key_value_heads": 2}  # fmt: skip
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 4, "vocab_size": 50, "n_positions": 32}
FALCON = SIZES | {"bias": False, "alibi": False, "num_kv_heads": 2}
CASES = {
    "gpt2": ("gpt2", GPT2),
    "openai-gpt": ("openai-gpt", GPT2),
    "gpt_bigcode_multi_query": ("gpt_bigcode", GPT2 | {"multi_query": True}),
    "gpt_bigcode_heads": ("gpt_bigcode", GPT2 | {"multi_query": False}),
    "minimax": ("minimax", MOE | {"layer_types": ["linear_attention"]}),
    "phi3": ("phi3", SIZES | {"num_key_value_heads": 2}),
    "gpt_neox": ("gpt_neox", SIZES),
    "bloom": ("bloom", {"vocab_size": 50, "hidden_size": 16, "n_layer": 1, "n_head": 4}),
    "persimmon": ("persimmon", SIZES),
    "codegen": ("codegen", GPT2 | {"rotary_dim": 4}),
    "mpt": ("mpt", {"d_model": 16, "n_heads": 4, "n_layers": 1, "vocab_size": 50, "max_seq_len": 32}),
    "modernbert": ("modernbert", SIZES | {"cls_token_id": 1, "sep_token_id": 2}),
    "falcon_groups": ("falcon", FALCON | {"new_decoder_architecture": True}),
    "falcon_multi_query": ("falcon", FALCON | {"new_decoder_architecture": False, "multi_query": True}),
    "falcon_heads": ("falcon", FALCON | {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4}),
    "qwen3_moe": ("qwen3_moe", MOE),
    "gpt_oss": ("gpt_oss", MOE),
    "blueberry": ("blueberry", MOE | {"gated_experts": True}),
}
GATED = {"phi3": "gate_up_proj", "modernbert": "mlp.Wi", "qwen3_moe": "gate_up_proj", "gpt_oss": "gate_up_proj",
         "blueberry": "gate_up_proj"}  # fmt: skip
FUSED = sorted(set(CASES) - {"qwen3_moe", "gpt_oss", "blueberry"})
TOKENS = [3, 14, 15, 9, 26, 5, 35]


def small_model(name: str) -> nn.Module:
    """One layer with larger weights than usual, so that attention matters, and no biases."""
    model_type, settings = CASES[name]
    kind = AutoModelForMaskedLM if model_type == "modernbert" else AutoModelForCausalLM
    torch.manual_seed(0)
    model = kind.from_config(AutoConfig.for_model(model_type, **settings), dtype=torch.float32).eval()
    for parameter_name, parameter in model.named_parameters():
        if "bias" in parameter_name:
            nn.init.zeros_(parameter)
        elif parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5)
    return model


def fused_matrix(model: nn.Module, end: str) -> tuple[nn.Parameter, Layout]:
    ends = (end,) if end else ("c_attn", "qkv_proj", "query_key_value", "Wqkv")
    (found,) = (a for a in assign_parameters(model) if a.name.removesuffix(".weight").endswith(ends) and a.layout)
    return found.parameter, found.layout


@torch.no_grad()
def logits(model: nn.Module, tokens: list[int] = TOKENS) -> torch.Tensor:
    return model(input_ids=torch.tensor([tokens])).logits[0]


@torch.no_grad()
def without(model: nn.Module, weight: nn.Parameter, layout: Layout, chosen: int, tokens: list[int] = TOKENS):
    """Logits with one part of a fused weight set to zero."""
    original = weight.clone()
    parts = [part.clone() for part in cut(weight, layout)]
    (parts[chosen] if layout.sizes else parts[0].select(-3, chosen)).zero_()
    weight.copy_(join(parts, layout))
    result = logits(model, tokens)
    weight.copy_(original)
    return result


@pytest.mark.parametrize("name", FUSED)
def test_the_parts_of_a_fused_projection_are_query_key_and_value(name):
    model = small_model(name)
    weight, layout = fused_matrix(model, "")
    query, key, value = (0, 2, 1) if name == "codegen" else (0, 1, 2)
    # without queries or without keys every score is zero: the same uniform attention
    torch.testing.assert_close(without(model, weight, layout, query), without(model, weight, layout, key))
    assert not torch.allclose(without(model, weight, layout, query), logits(model), atol=1e-3)
    # without values no token sees another
    other = [*TOKENS[:-1][::-1], TOKENS[-1]]
    torch.testing.assert_close(
        without(model, weight, layout, value)[-1], without(model, weight, layout, value, other)[-1]
    )
    assert not torch.allclose(logits(model)[-1], logits(model, other)[-1], atol=1e-3)


@pytest.mark.parametrize("name", sorted(GATED))
def test_the_parts_of_a_gated_projection_are_gate_and_up(name):
    model = small_model(name)
    weight, layout = fused_matrix(model, GATED[name])
    gate, up = without(model, weight, layout, 0), without(model, weight, layout, 1)
    assert not torch.allclose(gate, logits(model), atol=1e-3)
    nn.init.zeros_(weight)  # gate closed and nothing to let through
    torch.testing.assert_close(gate, logits(model))
    if name == "gpt_oss":  # its experts compute gate * (up + 1)
        assert not torch.allclose(up, logits(model), atol=1e-3)
    else:
        torch.testing.assert_close(up, logits(model))


def declared(model: nn.Module, **settings) -> dict[str, Layout | None]:
    return {
        a.name.removesuffix(".weight"): a.layout for a in assign_parameters(model, **settings) if a.optimizer == "muon"
    }


def test_conv1d_is_stored_transposed():
    layouts = declared(small_model("gpt2"))
    assert layouts["transformer.h.0.mlp.c_fc"] == Layout(transposed=True)
    assert layouts["transformer.h.0.attn.c_attn"] == Layout(transposed=True, shape=(3, -1))


def test_experts_of_gpt_oss_are_stored_transposed_with_gate_and_up_in_turn():
    layouts = declared(small_model("gpt_oss"))
    assert layouts["model.layers.0.mlp.experts.gate_up_proj"] == Layout(transposed=True, shape=(-1, 2), axis=1)
    assert layouts["model.layers.0.mlp.experts.down_proj"] == Layout(transposed=True)
    assert layouts["model.layers.0.self_attn.q_proj"] is None


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt_neox", "qwen3_moe"])
def test_heads_are_split_on_request(name):
    layouts = declared(small_model(name), split_heads=True)
    heads = {path for path, layout in layouts.items() if layout and layout.shape == (-1, 4)}
    assert heads and heads == {
        path for path in layouts if path.endswith(("_attn", "_value", "q_proj", "k_proj", "v_proj", "qkv_proj"))
    }


def test_attention_of_torch_is_cut_in_three_or_into_heads():
    model = nn.ModuleList([nn.MultiheadAttention(8, 2)])
    assert declared(model) == {"0.in_proj_weight": Layout(shape=(3, -1)), "0.out_proj": None}
    assert declared(model, split_heads=True)["0.in_proj_weight"] == Layout(shape=(-1, 4))


def test_heads_that_are_not_known_cannot_be_split():
    with pytest.raises(UsageError, match="split_heads=True knows no heads in Sequential: declare them in layouts"):
        build_optimizer(nn.Sequential(nn.Linear(4, 4)), split_heads=True)


class OwnAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12, bias=False)
        self.proj = nn.Linear(4, 4, bias=False)


def test_the_layout_of_an_unknown_fused_projection_is_asked_for_and_can_be_declared():
    model = nn.Sequential(OwnAttention())
    fused, _ = assign_parameters(model)
    assert fused.layout is None and fused.reason.endswith("declare it in layouts")
    thirds = Layout(shape=(3, -1))
    fused, _ = assign_parameters(model, layouts={r"qkv\.weight$": thirds})
    assert fused.layout == thirds and fused.reason == "weight of Linear; rows [3, -1] cut along axis 0"


@pytest.mark.parametrize(
    ("layouts", "message"),
    [
        ({"wqkv": Layout(shape=(3, -1))}, "layout 'wqkv' matches no parameter of Muon's"),
        ({"qkv": Layout(shape=(5, -1))}, r"does not fit 0.qkv.weight of shape \(12, 4\)"),
        (
            {"qkv": Layout(shape=(3, -1)), "q.v": Layout(shape=(2, -1))},
            "layouts 'qkv' and 'q.v' both match 0.qkv.weight",
        ),
    ],
)
def test_bad_layouts_are_refused(layouts, message):
    with pytest.raises(UsageError, match=message):
        build_optimizer(nn.Sequential(OwnAttention()), layouts=layouts)


def test_muon_gets_one_group_for_each_layout_plain_matrices_first():
    optimizer = build_optimizer(small_model("gpt_oss"))
    found = {
        group["name"]: (group["layout"], len(group["params"])) for group in optimizer.optimizers["muon"].param_groups
    }
    assert found == {
        "muon": (None, 4),
        "muon_split_1": ((True, -2, (-1, 2), 1, ()), 1),
        "muon_transposed": ((True, -2, (), 0, ()), 1),
    }
    names = [group["name"] for group in build_optimizer(small_model("gpt2")).optimizers["muon"].param_groups]
    assert names == ["muon", "muon_transposed"]  # no plain matrix: the first is c_attn
