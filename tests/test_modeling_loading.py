"""The model on disk and in memory: saving, loading, dtypes, devices, embeddings, initialization, other heads."""

import json
import logging
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from test_modeling import SMALL, VARIANTS, build, tokens
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    set_seed,
)

from blueberry import BlueberryConfig, BlueberryForCausalLM, BlueberryForSequenceClassification, BlueberryModel
from blueberry.configuration_blueberry import PRESETS

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


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_stored_once(tied: bool, tmp_path):
    model = build(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118 (not a mapping)
    loaded = BlueberryForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    torch.testing.assert_close(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits, rtol=0, atol=0)


def test_a_model_in_several_files_loads_back(tmp_path):
    model = build()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = BlueberryForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_every_preset_has_the_same_logits_in_a_fresh_process(tmp_path):
    # with fewer and narrower layers, but the heads, activation and experts of the preset
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2}
    for name in PRESETS:
        torch.manual_seed(0)
        config = BlueberryConfig.from_preset(name, **sizes, intermediate_size=48, moe_intermediate_size=48)
        model = BlueberryForCausalLM(config).eval()
        model.save_pretrained(tmp_path / name)
        torch.save(model(tokens(2, 9)).logits.detach(), tmp_path / name / "logits.pt")
    code = f"""
import blueberry, json, torch
from transformers import AutoModelForCausalLM
ids, worst = torch.tensor({tokens(2, 9).tolist()}), {{}}
for name in {list(PRESETS)}:
    model = AutoModelForCausalLM.from_pretrained(name)
    worst[name] = (model(ids).logits - torch.load(f"{{name}}/logits.pt")).abs().max().item()
print(json.dumps(worst))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout.splitlines()[-1]) == dict.fromkeys(PRESETS, 0.0)


def test_missing_weights_are_named_and_initialized_as_in_a_new_model(tmp_path, caplog):
    model = build()
    model.save_pretrained(
        tmp_path, state_dict={name: w for name, w in model.state_dict().items() if ".gate." not in name}
    )
    logging.getLogger("transformers").propagate = True  # to caplog
    with caplog.at_level(logging.WARNING):
        loaded = BlueberryForCausalLM.from_pretrained(tmp_path)
    assert "mlp.gate.weight" in caplog.text
    deviations = [layer.mlp.gate.weight.std().item() for layer in loaded.model.layers]
    # 128 values: the standard error of a deviation is 6%
    assert deviations == [pytest.approx(SMALL["initializer_range"], rel=0.25)] * 2


def test_a_device_map_loads_the_model(tmp_path):
    model, ids = build(), tokens(2, 9)
    model.save_pretrained(tmp_path)
    loaded = BlueberryForCausalLM.from_pretrained(tmp_path, device_map="auto")
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("on_disk", ["model.layers.1", "lm_head"])
def test_a_model_partly_on_disk_computes_the_same(variant: str, on_disk: str, tmp_path):
    model, ids = build(variant, tie_word_embeddings=False), tokens(2, 9)
    model.save_pretrained(tmp_path)
    parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    devices = {part: "disk" if part == on_disk else "cpu" for part in parts}
    loaded = BlueberryForCausalLM.from_pretrained(tmp_path, device_map=devices, offload_folder=tmp_path / "offload")
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    expected = model(ids, labels=ids).loss
    torch.testing.assert_close(loaded(ids, labels=ids, skip_logits=True).loss, expected)


def test_rotary_frequencies_stay_in_single_precision(tmp_path):
    model = build("dense")
    expected = model.model.rotary_emb.inv_freq.clone()
    model.save_pretrained(tmp_path)
    loaded = BlueberryForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for half in (loaded, build("dense").bfloat16(), build("dense").half(), build("dense").to(torch.bfloat16).float()):
        torch.testing.assert_close(half.model.rotary_emb.inv_freq, expected, rtol=0, atol=0)
        torch.testing.assert_close(half.model.rotary_emb.original_inv_freq, expected, rtol=0, atol=0)


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


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_keep_old_logits_and_can_be_saved(tied: bool, tmp_path):
    model, ids = build(tie_word_embeddings=tied), tokens(1, 5)
    before = model(ids).logits
    for asked, size in ((70, 70), (65, 80), (64, 64)):
        model.resize_token_embeddings(asked, pad_to_multiple_of=16 if asked == 65 else None)
        assert model.lm_head.weight.shape == model.model.embed_tokens.weight.shape == (size, 32)
        assert model.config.vocab_size == model.vocab_size == size
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        torch.testing.assert_close(model(ids).logits[..., :64], before)
        labels = torch.full_like(ids, size - 1)
        assert model(labels, labels=labels).loss.isfinite()
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(BlueberryForCausalLM.from_pretrained(tmp_path)(ids).logits[..., :64], before)


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
