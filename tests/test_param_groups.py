"""Which parameter gets which optimizer: an exact partition by role, on real architectures."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
)

import blueberry  # noqa: F401, registers its models
from blueberry.errors import UsageError
from blueberry.optim import Muon, assign_parameters, build_optimizer
from blueberry.optim.param_groups import check_holds_trainable_parameters

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = SIZES | {"num_key_value_heads": 1, "vocab_size": 50, "max_position_embeddings": 32}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 2}
LATENT = {"kv_lora_rank": 4, "q_lora_rank": 6, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
DEEPSEEK = LATENT | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
CONFIGS = {
    "llama": TEXT,
    "qwen3": TEXT | {"head_dim": 8},
    "qwen3_moe": TEXT | MOE | {"head_dim": 8},
    "mixtral": TEXT | {"num_local_experts": 4},
    "olmoe": TEXT | {"num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0, "eos_token_id": 1},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 32},
    "gpt_oss": TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "nemotron_h": {k: v for k, v in TEXT.items() if k != "num_hidden_layers"} | MAMBA
    | {"layers_block_type": ["mamba", "attention", "moe", "mlp"], "n_routed_experts": 4, "num_experts_per_tok": 2,
       "moe_intermediate_size": 12, "moe_shared_expert_intermediate_size": 12, "head_dim": 8},
    "deepseek_v3": TEXT | DEEPSEEK | {"num_hidden_layers": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    "bert": SIZES | {"vocab_size": 50},
    "vit": SIZES | {"image_size": 8, "patch_size": 4},
    "whisper": {"vocab_size": 50, "num_mel_bins": 4, "encoder_layers": 1, "decoder_layers": 1, "d_model": 16,
                "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
                "decoder_ffn_dim": 24, "max_source_positions": 8, "max_target_positions": 8, "pad_token_id": 0,
                "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    "t5": {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
    "phi3": TEXT | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "gpt_neox": SIZES | {"vocab_size": 50, "max_position_embeddings": 32},
    "blueberry": TEXT | MOE,
    "blueberry_dense": TEXT | {"num_experts": 0},
}  # fmt: skip
CLASSES = {"bert": AutoModelForMaskedLM, "vit": AutoModelForImageClassification, "t5": AutoModelForSeq2SeqLM,
           "whisper": AutoModelForSpeechSeq2Seq}  # fmt: skip

# Exactly the parameters that Muon gets, written down by hand from the architectures.
ATTENTION = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
             "self_attn.o_proj.weight"]  # fmt: skip
GATED_MLP = ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]
GATED_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LATENT_ATTENTION = [f"self_attn.{name}.weight" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
                                                            "o_proj")]  # fmt: skip
NEMOTRON = [
    *("0.mixer.in_proj.weight", "0.mixer.out_proj.weight"),
    *("1.mixer.q_proj.weight", "1.mixer.k_proj.weight", "1.mixer.v_proj.weight", "1.mixer.o_proj.weight"),
    *("2.mixer.experts.up_proj", "2.mixer.experts.down_proj"),
    *("2.mixer.shared_experts.up_proj.weight", "2.mixer.shared_experts.down_proj.weight"),
    *("3.mixer.up_proj.weight", "3.mixer.down_proj.weight"),
]
BERT = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
        "intermediate.dense", "output.dense"]  # fmt: skip
VIT = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"]
T5_ENCODER = ["0.SelfAttention.q", "0.SelfAttention.k", "0.SelfAttention.v", "0.SelfAttention.o",
              "1.DenseReluDense.wi", "1.DenseReluDense.wo"]  # fmt: skip
T5_DECODER = [*T5_ENCODER[:4], "1.EncDecAttention.q", "1.EncDecAttention.k", "1.EncDecAttention.v",
              "1.EncDecAttention.o", "2.DenseReluDense.wi", "2.DenseReluDense.wo"]  # fmt: skip
WHISPER_SELF = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"]
WHISPER_CROSS = [name.replace("self", "encoder") for name in WHISPER_SELF]


def under(prefix: str, names: list[str], suffix: str = "") -> set[str]:
    return {f"{prefix}{name}{suffix}" for name in names}


LAYER = "model.layers.0."
EXPECTED = {
    "llama": under(LAYER, ATTENTION + GATED_MLP),
    "qwen3": under(LAYER, ATTENTION + GATED_MLP),
    "qwen3_moe": under(LAYER, ATTENTION + GATED_EXPERTS),
    "mixtral": under(LAYER, ATTENTION + GATED_EXPERTS),
    "olmoe": under(LAYER, ATTENTION + GATED_EXPERTS),
    "gpt_oss": under(LAYER, ATTENTION + GATED_EXPERTS),
    "gpt2": under("transformer.h.0.", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"], ".weight"),
    "nemotron_h": under("model.layers.", NEMOTRON),
    "deepseek_v3": under(LAYER, LATENT_ATTENTION + GATED_MLP)
    | under("model.layers.1.", LATENT_ATTENTION + GATED_EXPERTS)
    | under("model.layers.1.", [name.replace("mlp", "mlp.shared_experts") for name in GATED_MLP]),
    "bert": under("bert.encoder.layer.0.", BERT, ".weight"),
    "vit": under("vit.layers.0.", VIT, ".weight"),
    "whisper": under("model.encoder.layers.0.", [*WHISPER_SELF, "fc1", "fc2"], ".weight")
    | under("model.decoder.layers.0.", [*WHISPER_SELF, *WHISPER_CROSS, "fc1", "fc2"], ".weight"),
    "t5": under("encoder.block.0.layer.", T5_ENCODER, ".weight")
    | under("decoder.block.0.layer.", T5_DECODER, ".weight"),
    "phi3": under(LAYER, ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"], ".weight"),
    "gpt_neox": under("gpt_neox.layers.0.", ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h",
                                             "mlp.dense_4h_to_h"], ".weight"),
    "blueberry": under(LAYER, [*ATTENTION, "mlp.experts.up_proj", "mlp.experts.down_proj"]),
    "blueberry_dense": under(LAYER, [*ATTENTION, "mlp.up_proj.weight", "mlp.down_proj.weight"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def small_models() -> dict[str, nn.Module]:
    """Small models of real architectures, on the meta device: only names, types and shapes matter."""
    with torch.device("meta"):
        return {
            name: CLASSES.get(name, AutoModelForCausalLM).from_config(
                AutoConfig.for_model(name.removesuffix("_dense"), **config)
            )
            for name, config in CONFIGS.items()
        }


def groups(model: nn.Module) -> dict[str, str]:
    return {a.name: a.group for a in assign_parameters(model)}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_muon_gets_exactly_the_hidden_matrices(small_models, name):
    assert {a.name for a in assign_parameters(small_models[name]) if a.optimizer == "muon"} == EXPECTED[name]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_every_parameter_is_in_exactly_one_group_of_the_optimizer(small_models, name):
    model = small_models[name]
    assignments = assign_parameters(model)
    assert [id(a.parameter) for a in assignments] == [id(p) for p in model.parameters()]
    assert all(a.reason for a in assignments)
    held = [id(p) for group in build_optimizer(model).param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_roles_of_a_mixture_of_experts(small_models):
    roles = groups(small_models["qwen3_moe"])
    assert roles["model.embed_tokens.weight"] == "embeddings"
    assert roles["lm_head.weight"] == "head"
    assert roles["model.layers.0.mlp.gate.weight"] == "router"
    assert roles["model.layers.0.mlp.experts.gate_up_proj"] == "experts"
    assert roles["model.layers.0.input_layernorm.weight"] == "vectors"


def test_biases_of_stacked_experts_and_attention_sinks_are_vectors(small_models):
    roles = groups(small_models["gpt_oss"])
    assert roles["model.layers.0.mlp.experts.gate_up_proj_bias"] == "vectors"
    assert roles["model.layers.0.self_attn.sinks"] == "vectors"
    assert roles["model.layers.0.mlp.router.weight"] == "router"


def test_a_convolution_with_three_dimensions_is_no_stack_of_experts(small_models):
    roles = groups(small_models["nemotron_h"])
    assert roles["model.layers.0.mixer.conv1d.weight"] == "convolutions"
    assert roles["model.layers.0.mixer.A_log"] == "vectors"


def test_patches_positions_and_classifier_of_a_vision_transformer_go_to_adamw(small_models):
    roles = groups(small_models["vit"])
    assert {role for name, role in roles.items() if "patch_embeddings.projection.weight" in name} == {"convolutions"}
    assert {role for name, role in roles.items() if "position_embeddings" in name} == {"other"}
    assert roles["classifier.weight"] == "head"
    assert roles["classifier.bias"] == "vectors"  # no weight decay


def test_a_shared_embedding_and_relative_positions_are_embeddings(small_models):
    roles = groups(small_models["t5"])
    assert roles["shared.weight"] == "embeddings"
    assert {role for name, role in roles.items() if "relative_attention_bias" in name} == {"embeddings"}
    (shared,) = (a for a in assign_parameters(small_models["t5"]) if a.name == "shared.weight")
    assert shared.reason.endswith("tied to the head")


def test_a_head_registered_before_the_embedding_it_is_tied_to_is_an_embedding():
    model = nn.ModuleDict({"head": nn.Linear(4, 7, bias=False), "embedding": nn.Embedding(7, 4)})
    model["head"].weight = model["embedding"].weight
    assert groups(model) == {"head.weight": "embeddings"}


def test_the_head_of_a_plain_module_is_found_by_its_shape():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 7, bias=False))
    assert groups(model) == {"0.weight": "embeddings", "1.weight": "matrices", "2.weight": "head"}


def test_a_linear_layer_that_scores_the_experts_beside_it_is_a_router():
    block = nn.Module()
    block.gate = nn.Linear(4, 3, bias=False)
    block.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))
    assert groups(nn.Sequential(block))["0.gate.weight"] == "router"
    assert groups(nn.Sequential(block))["0.experts.2.weight"] == "matrices"


def test_attention_of_torch_is_a_hidden_matrix():
    roles = groups(nn.ModuleList([nn.MultiheadAttention(8, 2, add_bias_kv=True)]))
    assert roles["0.in_proj_weight"] == roles["0.out_proj.weight"] == "matrices"
    assert roles["0.bias_k"] == roles["0.in_proj_bias"] == "vectors"


@pytest.mark.parametrize("wrap", ["module", "_orig_mod"])
def test_wrappers_change_no_role(small_models, wrap):
    model = small_models["qwen3_moe"]
    wrapped = nn.ModuleDict({wrap: model})
    assert {name.removeprefix(f"{wrap}."): role for name, role in groups(wrapped).items()} == groups(model)


def test_rules_ignore_the_prefixes_of_wrappers(small_models):
    wrapped = nn.ModuleDict({"module": nn.ModuleDict({"_orig_mod": small_models["llama"]})})
    (first, *_) = (a for a in assign_parameters(wrapped, {r"^model\.layers\.0\.mlp": "adamw"}) if "mlp" in a.name)
    assert first.name.startswith("module._orig_mod.model") and first.optimizer == "adamw"


def test_what_surrounds_a_pretrained_model_is_a_head(small_models):
    model = nn.ModuleDict({"encoder": small_models["bert"].bert, "score": nn.Linear(16, 16)})
    assert groups(model)["score.weight"] == "head"
    assert groups(model)["encoder.encoder.layer.0.output.dense.weight"] == "matrices"


def test_frozen_parameters_get_no_optimizer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    assert [a.optimizer for a in assign_parameters(model)] == ["frozen", "frozen", "muon", "adamw"]


def test_rules_decide_and_say_so():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    first, second = assign_parameters(model, {r"^0\.": "adamw", r"0\.weight": "adamw"})
    assert (first.optimizer, first.reason) == ("adamw", r"rule '^0\\.'")
    assert second.optimizer == "muon"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"decoder": "adamw"}, "rule 'decoder' matches no parameter"),
        ({"weight": "sgd"}, "rule 'weight' names optimizer 'sgd': use muon or adamw"),
        ({"bias": "muon"}, r"rule 'bias' gives Muon bias of shape \(4,\)"),
        ({"weight": "adamw", "w.*t": "muon"}, "rules 'weight' and 'w.*t' both match weight and differ"),
    ],
)
def test_bad_rules_are_refused(rules, message):
    with pytest.raises(UsageError, match=message):
        assign_parameters(nn.Linear(4, 4), rules)


def linear_with(weight: torch.Tensor, requires_grad: bool = True) -> nn.Module:
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=requires_grad)
    return nn.Sequential(layer)


def partition_of_zero3() -> nn.Module:
    model = linear_with(torch.empty(0))
    model[0].weight.ds_id = 0  # what DeepSpeed's partitioning leaves on a parameter
    return model


def flat_parameter_of_fsdp1() -> nn.Module:
    from torch.distributed.fsdp._flat_param import FlatParameter

    model = nn.Module()
    model._flat_param = FlatParameter(torch.zeros(16), requires_grad=True)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partition_of_zero3, r"0.weight of shape \(0,\) is a partition of DeepSpeed ZeRO-3: .* use FSDP2"),
        (lambda: linear_with(torch.zeros(16)), r"0.weight has shape \(16,\): it was flattened .* use FSDP2"),
        (flat_parameter_of_fsdp1, r"_flat_param of shape \(16,\) is a flat parameter of FSDP1: .* use FSDP2"),
        (lambda: linear_with(torch.zeros(4, 4, dtype=torch.cfloat)), "0.weight is torch.complex64: .*view_as_real"),
        (lambda: linear_with(torch.zeros(4, 4).to(torch.float8_e4m3fn)), "0.weight is torch.float8_e4m3fn: 8 bits"),
        (lambda: linear_with(torch.zeros(4, 4, dtype=torch.int8), False), "0.weight is torch.int8 .* add LoRA"),
        (lambda: nn.Sequential(nn.Embedding(4, 4, sparse=True), nn.Linear(4, 4)), "0 has sparse=True: .*sparse=False"),
    ],
)
def test_models_that_cannot_be_trained_are_refused(build, message):
    with pytest.raises(UsageError, match=message):
        build_optimizer(build())


def test_a_frozen_sparse_embedding_is_fine():
    model = nn.Sequential(nn.Embedding(4, 4, sparse=True), nn.Linear(4, 5))
    model[0].requires_grad_(False)
    assert groups(model)["1.weight"] == "matrices"


def test_an_optimizer_of_another_model_is_found_out():
    model, other = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    check_holds_trainable_parameters(build_optimizer(model), model)
    with pytest.raises(UsageError, match=r"holds 0 of 2 trainable parameters, not '0.weight': build it after"):
        check_holds_trainable_parameters(build_optimizer(other), model)
    with pytest.raises(UsageError, match=r"holds 1 of 2 trainable parameters, not '0.bias'"):
        check_holds_trainable_parameters(Muon([model[0].weight]), model)
