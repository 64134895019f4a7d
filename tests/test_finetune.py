"""scripts/finetune.py and prepare_data.py at toy size: adapters that train, resume, load, merge and travel."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from huggingface_hub import HfApi
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_peft import EXPERTS, base_model
from transformers import AutoModelForCausalLM

import blueberry  # noqa: F401 (registers the models)
from blueberry.optim.splits import cut
from blueberry.optim.stiefel_lora import create_stiefel_lora_optimizer, start_orthonormal

LORA = ["--lora_r", 4, "--lora_experts", "true", "--train_tokens", 4096, "--per_device_train_batch_size", 8,
        "--logging_steps", 4, "--save_steps", 8, "--use_cpu", "true", "--max_validation_tokens", 2048,
        "--validation_fraction", 0.2]  # fmt: skip


@pytest.fixture(scope="module")
def base(arguments: list, run_script, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    run_script("train_llm.py", *arguments, "--output_dir", folder)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(20)[None]).logits


@pytest.mark.parametrize("optimizer", ["muon", "manifold", "adamw"])
def test_adapters_train_load_and_merge(base, small_corpus, script, tmp_path, optimizer):
    """PeftModel loads what was trained; the merged model computes the same; spectra of BA are in the log."""
    out = tmp_path / "adapter"
    script("finetune.py", "--model", base, "--dataset", small_corpus, *LORA, "--optimizer", optimizer, "--merge",
           "true", "--output_dir", out, "--track_manifold", "true", "--track_every_n_steps", 8)  # fmt: skip
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    adapted = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out))
    assert (adapted - plain).abs().max() > 1e-3
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(out / "merged")), adapted, atol=1e-4, rtol=0
    )
    log = pd.read_parquet(out / "spectral_log")
    assert log.projection.str.contains("lora").all() or log.parameter.str.contains("lora").all()
    assert (log[log.step == log.step.max()].spectral_norm > 0).all()
    if optimizer == "manifold":
        for name, factor in load_file(out / "adapter_model.safetensors").items():
            if "lora_B" in name and "experts" not in name:  # (out, 4)
                torch.testing.assert_close(factor.T @ factor, torch.eye(4), atol=1e-4, rtol=0)


def test_a_resumed_adapter_is_that_of_an_uninterrupted_run(base, small_corpus, script, tmp_path):
    given = ["--model", base, "--dataset", small_corpus, *LORA, "--optimizer", "manifold"]
    script("finetune.py", *given, "--output_dir", tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-8"
    (tmp_path / "again").mkdir()
    checkpoint.rename(tmp_path / "again" / "checkpoint-8")
    for name in ("config.yaml", "identity.json"):
        (tmp_path / "again" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    script("finetune.py", "--resume_from_checkpoint", tmp_path / "again" / "checkpoint-8", "--model", base)
    whole, again = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("whole", "again"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_finished_run_can_still_be_merged(base, small_corpus, script, tmp_path, capsys):
    """With the adapter that was trained, not the fresh one of the new process."""
    out = tmp_path / "adapter"
    script("finetune.py", "--model", base, "--dataset", small_corpus, *LORA, "--output_dir", out)
    script("finetune.py", "--output_dir", out, "--resume_from_checkpoint", "--merge", "true")
    assert f"{out} is finished: 16 steps taken" in capsys.readouterr().out
    adapted = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out))
    merged = logits(AutoModelForCausalLM.from_pretrained(out / "merged"))
    assert (adapted - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 1e-3
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=0)


def test_another_adapter_or_base_is_no_way_to_go_on(base, small_corpus, script, tmp_path, capsys):
    own = shutil.copytree(base, tmp_path / "own")
    out = tmp_path / "adapter"
    script("finetune.py", "--model", own, "--dataset", small_corpus, *LORA, "--output_dir", out)
    more = ["--output_dir", out, "--resume_from_checkpoint", "--train_tokens", 8192]

    def refused(*changed: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            script("finetune.py", *more, *changed)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    for name, value in {"lora_alpha": 64, "lora_r": 2, "lora_targets": "q_proj", "lora_experts": "false"}.items():
        assert f"--{name} " in refused(f"--{name}", value)
    assert f"--model {base}: the run of" in refused("--model", base)
    weights = {name: tensor + 0.01 for name, tensor in load_file(own / "model.safetensors").items()}
    save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
    assert "the weights of --model changed" in refused()


def test_every_expert_has_an_orthonormal_factor_and_starts_at_zero():
    from peft import LoraConfig

    config = LoraConfig(r=3, target_modules=["q_proj"], target_parameters=EXPERTS)
    model = get_peft_model(base_model("qwen3_moe"), config)
    start_orthonormal(model)
    optimizer = create_stiefel_lora_optimizer(model, muon_lr=0.05)
    before = logits(model)
    torch.testing.assert_close(before, logits(base_model("qwen3_moe")))
    for step in range(3):
        ids = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    factors = [a for a in optimizer.assignments if a.optimizer == "stiefel_muon"]
    assert len(factors) == 3
    for assignment in factors:
        for part in cut(assignment.parameter.detach(), assignment.layout):  # (..., out, 3)
            torch.testing.assert_close(part.mT @ part, torch.eye(3).expand(*part.shape[:-2], 3, 3), atol=1e-4, rtol=0)
    assert (logits(model) - before).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "--model is missing"),
        (["--model", "./nowhere"], "no such folder"),
        (["--model", "BASE", "--lora_r", 0], "must be at least 1"),
        (["--model", "BASE", "--lora_targets", "query"], "has no module of this name"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(base, small_corpus, script, capsys, tmp_path, given, expected):
    given = [base if item == "BASE" else item for item in given]
    with pytest.raises(SystemExit) as stopped:
        script("finetune.py", *given, "--dataset", small_corpus, "--train_tokens", 512, "--validation_fraction", 0.2,
               "--output_dir", tmp_path / "out")  # fmt: skip
    assert stopped.value.code == 2 and expected in capsys.readouterr().err


def test_models_of_other_names_are_told_theirs(base, small_corpus, script, tmp_path, capsys):
    """GPT-2 has no q_proj; nor has it positions for the whole sample at the end."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder)
    given = ["--model", folder, "--dataset", small_corpus, *LORA, "--lora_experts", "false"]
    with pytest.raises(SystemExit) as stopped:
        script("finetune.py", *given, "--output_dir", tmp_path / "out")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "choose from c_attn, c_proj, c_fc, lm_head, or write all-linear" in said
    script("finetune.py", *given, "--output_dir", tmp_path / "out", "--lora_targets", "all-linear")
    assert "Sample: The" in capsys.readouterr().out


def test_prepared_windows_are_pushed_and_trained_on(hub, base, small_corpus, script, tmp_path):
    given = ["--dataset", small_corpus, "--tokenizer", base, "--max_length", 32, "--validation_fraction", 0.2]
    script("prepare_data.py", *given, "--output_dir", tmp_path / "windows", "--push_to_hub", "ann/windows")
    files = HfApi().list_repo_files("ann/windows", repo_type="dataset")
    assert {"README.md", "data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"} <= set(files)
    path = HfApi().hf_hub_download("ann/windows", "data/train-00000-of-00001.parquet", repo_type="dataset")
    assert pd.read_parquet(path).input_ids.map(len).eq(32).all()
    script("finetune.py", "--model", base, "--dataset", tmp_path / "windows", *LORA, "--output_dir", tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_windows_of_the_hub_are_trained_on_by_their_id(hub, base, small_corpus, script, tmp_path, monkeypatch):
    import datasets

    given = ["--dataset", small_corpus, "--tokenizer", base, "--max_length", 32, "--validation_fraction", 0.2]
    script("prepare_data.py", *given, "--output_dir", tmp_path / "windows", "--push_to_hub", "ann/windows")
    for name, value in {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(datasets.config, name, value)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    for data, out in (("ann/windows", "hub"), (tmp_path / "windows", "folder")):
        script("finetune.py", "--model", base, "--dataset", data, *LORA, "--output_dir", tmp_path / out)
    one, other = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("hub", "folder"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((tmp_path / "hub" / "provenance.json").read_text())["dataset"] == "ann/windows"


def test_a_failed_push_of_windows_goes_on_where_it_stopped(hub, base, small_corpus, script, tmp_path, capsys,
                                                           monkeypatch):  # fmt: skip
    monkeypatch.setattr("hub.push.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    out = tmp_path / "data" / "windows"
    given = ["--dataset", small_corpus, "--tokenizer", base, "--max_length", 32, "--validation_fraction", 0.2,
             "--output_dir", out, "--push_to_hub"]  # fmt: skip

    def refused(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            script("prepare_data.py", *arguments)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert "--push_to_hub windows has no account" in refused(*given, "windows")
    assert "--push_to_hub bob/windows: this token may not write there (403)" in refused(*given, "bob/windows")
    assert not out.exists()  # no work was done
    hub.fail("POST", "/commit/", 500, times=9)
    assert "the same command goes on" in refused(*given, "ann/windows") and out.is_dir()
    hub._failures.clear()
    made = (out / "prepared.json").stat().st_mtime_ns
    script("prepare_data.py", *given, "ann/windows")
    assert (out / "prepared.json").stat().st_mtime_ns == made
    assert "README.md" in HfApi().list_repo_files("ann/windows", repo_type="dataset")
    assert "holds no windows of these arguments" in refused(*given, "ann/windows", "--max_length", 16)
    assert [path.name for path in out.parent.iterdir()] == ["windows"]


def test_windows_are_searched_for_leaks_before_they_are_pushed(hub, base, small_corpus, script, tmp_path, capsys,
                                                               monkeypatch):  # fmt: skip
    monkeypatch.setenv("LAB_PASSWORD", "swordfish-12")
    secret = shutil.copytree(small_corpus, tmp_path / "swordfish-12")
    given = ["--dataset", secret, "--tokenizer", base, "--max_length", 32, "--validation_fraction", 0.2]
    with pytest.raises(SystemExit):
        script("prepare_data.py", *given, "--output_dir", tmp_path / "out", "--push_to_hub", "ann/windows")
    assert "README.md holds a token: nothing was uploaded" in capsys.readouterr().err
    assert HfApi().list_repo_files("ann/windows", repo_type="dataset") == [".gitattributes"]


@pytest.fixture
def on_hub(hub, base, script) -> str:
    """The base model as ann/moe, and branch `first` of it; main is another model, without a tokenizer."""
    script("push_to_hub.py", "--run", base, "--repo_id", "ann/moe")
    api = HfApi()
    api.create_branch("ann/moe", branch="first")
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        api.delete_file(name, "ann/moe")
    return "ann/moe@first"


def card_of(repo_id: str, folder: Path) -> str:
    HfApi().snapshot_download(repo_id, local_dir=folder)
    return (folder / "README.md").read_text()


def test_an_adapter_of_a_model_on_the_hub_names_its_revision(on_hub, base, small_corpus, script, tmp_path, capsys):
    """Model and tokenizer are those of the revision; the card's code loads the same model elsewhere."""
    out = tmp_path / "adapter"
    script("finetune.py", "--model", on_hub, "--dataset", small_corpus, *LORA, "--output_dir", out)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("ann/moe", "first")
    assert (
        json.loads((out / "identity.json").read_text())["base"] == HfApi().repo_info("ann/moe", revision="first").sha
    )
    script("push_to_hub.py", "--run", out, "--repo_id", "ann/adapter")
    card = card_of("ann/adapter", tmp_path / "all")
    said = ('PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("ann/moe", revision="first", '
            'trust_remote_code=True), "ann/adapter")')  # fmt: skip
    assert f"model = {said}\n" in card and f"load it: {said}\n" in capsys.readouterr().out
    assert "base_model: ann/moe\n" in card and "stands for the folder" not in card
    loaded = eval(said, {"PeftModel": PeftModel, "AutoModelForCausalLM": AutoModelForCausalLM})
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
    assert torch.equal(logits(loaded), logits(trained))


def test_a_folder_may_have_an_at_in_its_name(base, tmp_path):
    from blueberry.training.loading import load_model, load_tokenizer
    from blueberry.training.tokenization import load_tokenizer as load_fast_tokenizer

    folder = str(shutil.copytree(base, tmp_path / "a@b"))
    assert torch.equal(logits(load_model(folder)), logits(load_model(str(base))))
    assert len(load_tokenizer(folder)) == len(load_fast_tokenizer(folder)) == 300


def test_an_adapter_of_a_folder_claims_no_model_on_the_hub(hub, base, small_corpus, script, tmp_path, monkeypatch):
    """results/demo looks like an id; pushed from another folder, where it is not there, it still is none."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(base, "results/demo")
    shutil.copytree(small_corpus, "secret/corpus")
    script("finetune.py", "--model", "results/demo", "--dataset", "secret/corpus/*.txt", *LORA, "--output_dir",
           "adapter")  # fmt: skip
    monkeypatch.chdir(tmp_path)
    script("push_to_hub.py", "--run", "here/adapter", "--repo_id", "ann/adapter")
    card = card_of("ann/adapter", tmp_path / "all")
    assert "base_model:" not in card and "`demo` stands for the folder" in card
    assert (
        'import blueberry\n\nmodel = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("demo"),' in card
    )
    for path in (tmp_path / "all").rglob("*"):
        assert not path.is_file() or not re.search(b"results/demo|secret/corpus", path.read_bytes()), path


FOREIGN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_others_runs_only_when_told(hub, base, small_corpus, script, tmp_path, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 24, "max_position_embeddings": 64}  # fmt: skip
    folder = tmp_path / "own"
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(FOREIGN_CODE)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder)
    HfApi().create_repo("bob/own", token="hf_BOB")
    HfApi().upload_folder(repo_id="bob/own", folder_path=folder, token="hf_BOB")
    given = ["--model", "bob/own", "--dataset", small_corpus, *LORA, "--lora_experts", "false"]
    with pytest.raises(SystemExit) as stopped:
        script("finetune.py", *given, "--output_dir", tmp_path / "out")
    assert stopped.value.code == 2 and "trust_remote_code" in capsys.readouterr().err
    script("finetune.py", *given, "--output_dir", tmp_path / "out", "--trust_remote_code", "true")
    script("push_to_hub.py", "--run", tmp_path / "out", "--repo_id", "ann/adapter")
    expected = 'AutoModelForCausalLM.from_pretrained("bob/own", trust_remote_code=True), "ann/adapter")'
    assert expected in card_of("ann/adapter", tmp_path / "all")


def test_an_adapter_is_pushed_while_training_and_loaded_from_the_hub(hub, base, small_corpus, script, tmp_path):
    """PeftModel takes it by its id; the card names its base; no folder of this machine is in it."""
    from huggingface_hub import ModelCard

    out = tmp_path / "adapter"
    script("finetune.py", "--model", base, "--dataset", small_corpus, *LORA, "--output_dir", out, "--push_to_hub",
           "true", "--hub_model_id", "ann/adapter")  # fmt: skip
    model = lambda name: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), name)
    HfApi().snapshot_download("ann/adapter", local_dir=tmp_path / "all")
    assert torch.equal(logits(model(str(tmp_path / "all"))), logits(model(out)))
    assert torch.equal(logits(model("ann/adapter")), logits(model(out)))
    card = ModelCard.load(tmp_path / "all" / "README.md")
    assert card.data.library_name == "peft" and "LORA of rank 4" in card.text and "`base` stands for" in card.text
    files = [path for path in (tmp_path / "all").rglob("*") if path.is_file() and ".cache" not in path.parts]
    assert not [path for path in files if str(base.parent).encode() in path.read_bytes()]
    assert len(HfApi().list_repo_commits("ann/adapter")) == 4  # the first, two checkpoints, the finished run
