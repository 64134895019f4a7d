"""A toy run through scripts/push_to_hub.py and the Hub of the tests, and back in a process without Blueberry."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pandas as pd
import pytest
import torch
import yaml
from conftest import HOST, OTHER_TOKEN, READ_TOKEN, ROOT, SMALL_MODEL, TOKEN, USER, files_of
from hub_server import HubServer
from huggingface_hub import EvalResultEntry, HfApi, ModelCard
from huggingface_hub._eval_results import parse_eval_result_entries
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from blueberry.errors import UsageError
from blueberry.spectral.log import SpectralLog
from hub import bundle as bundling
from hub.publish import publish
from hub.push import Destination

pytestmark = pytest.mark.usefixtures("few_figures", "machine", "no_waiting")
# Written by a process that cannot import blueberry: logits, text, pipeline, and what another revision holds.
LOADING = """
import json, os, sys, torch
try:
    import blueberry
    sys.exit("blueberry can be imported")
except ImportError:
    pass
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline
result = {}
for name in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    torch.manual_seed(0)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    exported = torch.export.export(model, (ids,), strict=False)
    same = torch.allclose(exported.module()(ids).logits, logits, atol=1e-5)
    old = AutoConfig.from_pretrained(name, trust_remote_code=True, revision="first")
    result[name] = {"class": type(model).__module__, "logits": logits.tolist(), "exported": same,
                    "old": old.model_type, "text": write("The", max_new_tokens=4)[0]["generated_text"]}
    try:
        AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
        result[name]["untrusted"] = "loaded"
    except ValueError as error:
        result[name]["untrusted"] = str(error)
with open(sys.argv[1], "w") as file:
    json.dump(result, file)
"""


@pytest.fixture(scope="module")
def runs(arguments: list, run_script, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Toy runs: two seeds of a mixture of experts with spectra, and a dense one."""
    folder = tmp_path_factory.mktemp("results")
    dense = folder / "dense.json"
    dense.write_text(json.dumps(SMALL_MODEL | {"num_experts": 0, "intermediate_size": 64}))
    index = arguments.index("--config_name")
    others = [*arguments[:index], *arguments[index + 2 :]]
    spectra = ["--track_manifold", "true", "--track_every_n_steps", 16]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: HOST)
        patch.setattr("getpass.getuser", lambda: USER)
        run_script("train_llm.py", *arguments, *spectra, "--output_dir", folder / "moe", "--seed", 1)
        run_script("train_llm.py", *arguments, *spectra, "--output_dir", folder / "moe_2", "--seed", 2)
        run_script("train_llm.py", *others, "--config_name", dense, "--output_dir", folder / "dense")
    return {name: folder / name for name in ("moe", "moe_2", "dense")}


def without_blueberry(hub: HubServer, home: Path) -> dict[str, str]:
    """The environment of `python -S`, which skips site's .pth files: an editable install is not found, libraries are,
    by their folder."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return kept | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home / "home"), "HF_TOKEN": "",
                   "PYTHONPATH": str(Path(torch.__file__).parents[1]), "PYTHONNOUSERSITE": "1"}  # fmt: skip


def refused(script, capsys, *arguments: object) -> str:
    """The one line of an error with exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        script("push_to_hub.py", *arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and not any(token in error for token in (TOKEN, READ_TOKEN, OTHER_TOKEN))
    return error


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_pushed_models_load_where_blueberry_is_not_installed(hub: HubServer, runs, script, tmp_path):
    """Dense and mixture of experts: same logits, generation, export, and nothing runs that was not trusted."""
    names = ["ann/dense", "ann/moe"]
    for name in names:
        script("push_to_hub.py", "--run", runs[name[4:]], "--repo_id", name)
        HfApi().create_branch(name, branch="first")
    environment = without_blueberry(hub, tmp_path)
    command = [sys.executable, "-S", "-c", LOADING, "results.json", *names]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    import blueberry

    for name in names:
        model = blueberry.BlueberryForCausalLM.from_pretrained(runs[name[4:]]).eval()
        with torch.no_grad():
            logits = model(input_ids=torch.arange(24).reshape(2, 12)).logits
        torch.testing.assert_close(torch.tensor(results[name]["logits"]), logits, rtol=1e-5, atol=1e-5)
        assert results[name]["class"].startswith("transformers_modules.") and results[name]["exported"]
        assert results[name]["text"].startswith("The") and len(results[name]["text"]) > 3
        assert "trust_remote_code" in results[name]["untrusted"] and results[name]["old"] == "blueberry"


def test_no_uploaded_byte_tells_about_the_machine(hub, runs, script, tmp_path, path_of_large_files):
    """Tables and figures are looked at as what they hold, everything else as bytes."""
    script("push_to_hub.py", "--run", runs["moe"], "--repo_id", "ann/moe")
    files = files_of(HfApi(), "ann/moe", tmp_path / "all")
    secrets = (HOST, USER, TOKEN, str(runs["moe"]), str(runs["moe"].parent), "pytest-of-", str(ROOT), str(Path.home()))
    log = pd.read_parquet(tmp_path / "all" / "spectral_log").to_csv().encode()
    for path, content in {**files, "spectral log": log}.items():
        found = [secret for secret in secrets if secret.encode() in path.encode() + content]
        assert not found, (path, found)
    assert not any(path.endswith((".bin", ".pt", ".pth", ".pkl")) for path in files)
    there = {path.split("/")[0] for path in files}
    assert {"runs", "figures", "spectral_log", ".eval_results", "config.yaml", "tokenizer.json", "README.md"} <= there
    assert yaml.safe_load(files["config.yaml"])["dataset"] == yaml.safe_load(files["config.yaml"])["dataset"].strip(
        "/"
    )


def test_the_curves_survive_being_scrubbed(hub, runs, script, tmp_path):
    script("push_to_hub.py", "--run", runs["moe"], "--repo_id", "ann/moe")
    HfApi().snapshot_download("ann/moe", local_dir=tmp_path)
    before, after = (EventAccumulator(str(folder / "runs")).Reload() for folder in (runs["moe"], tmp_path))
    assert before.Tags() == after.Tags() and "train/loss" in after.Tags()["scalars"]
    for tag in after.Tags()["scalars"]:
        assert before.Scalars(tag) == after.Scalars(tag)
    (text,) = after.Tensors("args/text_summary")
    assert b'"output_dir": "moe"' in text.tensor_proto.string_val[0]


def test_one_commit_holds_everything(hub, runs, script, path_of_large_files):
    script("push_to_hub.py", "--run", runs["moe"], "--repo_id", "ann/moe")
    assert len(HfApi().list_repo_commits("ann/moe")) == 2  # with the first, that made the repository
    script("push_to_hub.py", "--run", runs["moe"], "--repo_id", "ann/moe")
    assert len(HfApi().list_repo_commits("ann/moe")) == 2  # nothing has changed


def test_a_later_push_leaves_nothing_of_the_former_behind(hub, runs, script):
    script("push_to_hub.py", "--run", runs["moe"], "--repo_id", "ann/moe", "--max_shard_size", "100KB")
    before = set(HfApi().list_repo_files("ann/moe"))
    assert "model.safetensors.index.json" in before and "model.safetensors" not in before
    script("push_to_hub.py", "--run", runs["dense"], "--repo_id", "ann/moe")
    after = set(HfApi().list_repo_files("ann/moe"))
    assert not [path for path in after if "-of-" in path or path.startswith(("figures/", "spectral_log/"))]
    assert "model.safetensors" in after


def test_files_of_users_stay_and_those_of_another_model_go(hub, runs, script, small_corpus, tmp_path):
    api, base = HfApi(), runs["dense"]
    lora = ["--dataset", small_corpus, "--validation_fraction", 0.2, "--max_steps", 1, "--save_strategy", "no"]
    script("finetune.py", "--model", base, *lora, "--use_cpu", "true", "--output_dir", tmp_path / "adapter")
    script("push_to_hub.py", "--run", runs["moe"], "--repo_id", "ann/moe")
    for path in ("figures/mine.png", "spectral_log/mine.txt", "model_notes.safetensors"):
        api.upload_file(path_or_fileobj=b"mine", path_in_repo=path, repo_id="ann/moe")
    mine = {"figures/mine.png", "spectral_log/mine.txt", "model_notes.safetensors"}
    model = {"config.json", "model.safetensors", "generation_config.json", "modeling_blueberry.py"}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    for run, comes, goes in ((tmp_path / "adapter", adapter, model), (runs["moe"], model, adapter)):
        script("push_to_hub.py", "--run", run, "--repo_id", "ann/moe")
        there = set(api.list_repo_files("ann/moe"))
        assert mine | comes <= there and not goes & there


def test_shards_hold_the_model(hub, runs, script, tmp_path):
    from blueberry import BlueberryForCausalLM

    script("push_to_hub.py", "--run", runs["moe"], "--repo_id", "ann/moe", "--max_shard_size", "100KB")
    HfApi().snapshot_download("ann/moe", local_dir=tmp_path)
    whole, cut = (BlueberryForCausalLM.from_pretrained(folder).state_dict() for folder in (runs["moe"], tmp_path))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)


def test_the_card_is_valid_and_tells_what_the_run_knows(hub, runs, script, tmp_path):
    both = f"{runs['moe']},{runs['moe_2']}"
    script("push_to_hub.py", "--run", both, "--repo_id", "ann/moe", "--license", "mit")
    files = files_of(HfApi(), "ann/moe", tmp_path)
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit" and card.data.library_name == "transformers"
    assert {"muon", "custom_code", "mixture-of-experts"} <= set(card.data.tags)
    losses = [json.loads((runs[name] / "eval_results.json").read_text())["eval_loss"] for name in ("moe", "moe_2")]
    (loss,) = [result for result in card.data.eval_results if result.metric_type == "loss"]
    assert loss.metric_value == round(losses[0], 6)
    mean, half = sum(losses) / 2, 12.7062 * abs(losses[0] - losses[1]) / 2  # t(0.975, 1) times the standard error
    assert f"| {mean:.4f} ({mean - half:.4f} to {mean + half:.4f}) |" in card.text
    assert "2 seeds (1, 2)" in card.text and "[config.yaml](config.yaml)" in card.text
    made = json.loads((runs["moe"] / "provenance.json").read_text())
    for told in (made["device"], made["torch"], f"{made['tokens']:,}", "windows of 32 tokens", "muon: "):
        assert told in card.text
    for image in ("spectral_norm_evolution.png",):
        assert f"(figures/{image})" in card.text and f"figures/{image}" in files
    entries = parse_eval_result_entries(yaml.safe_load(files[".eval_results/blueberry.yaml"]))
    assert all(isinstance(entry, EvalResultEntry) for entry in entries) and entries[0].value == round(losses[0], 6)


def test_runs_that_are_no_seeds_of_one_another_are_refused(hub, runs, script, capsys):
    both = f"{runs['moe']},{runs['dense']}"
    assert "no seeds of one another" in refused(script, capsys, "--run", both, "--repo_id", "ann/moe")
    both = f"{runs['moe']},{runs['moe']}"
    assert "the same seed (1, 1)" in refused(script, capsys, "--run", both, "--repo_id", "ann/moe")


def test_what_a_user_wrote_into_the_card_stays(hub, runs, script):
    script("push_to_hub.py", "--run", runs["moe"], "--repo_id", "ann/moe")
    api = HfApi()

    def card() -> str:
        return Path(api.hf_hub_download("ann/moe", "README.md")).read_text()

    edited = card().replace("## Limitations", "## My notes\n\nMine.\n\n## Limitations").replace(
        "license: apache-2.0", "license: mit").replace("It continues text", "It does what it can")  # fmt: skip
    api.upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id="ann/moe")
    script("push_to_hub.py", "--run", runs["moe_2"], "--repo_id", "ann/moe")
    after = card()
    assert "Mine." in after and "license: mit" in after and "It does what it can" in after
    assert "one seed (2)" in after and "one seed (1)" not in after  # what was not edited is new


def test_a_branch_and_a_pull_request_leave_main_alone(hub, runs, script, capsys):
    script("push_to_hub.py", "--run", runs["moe"], "--repo_id", "ann/moe", "--revision", "trial")
    assert HfApi().list_repo_files("ann/moe") == [".gitattributes"]
    assert "model.safetensors" in HfApi().list_repo_files("ann/moe", revision="trial")
    script("push_to_hub.py", "--run", runs["moe"], "--repo_id", "ann/moe", "--create_pr")
    assert "/discussions/1" in capsys.readouterr().out
    assert HfApi().list_repo_files("ann/moe") == [".gitattributes"]
    assert "model.safetensors" in HfApi().list_repo_files("ann/moe", revision="refs/pr/1")


def test_private_stays_private(hub, runs, script, capsys):
    script("push_to_hub.py", "--run", runs["moe"], "--repo_id", "ann/secret", "--private")
    script("push_to_hub.py", "--run", runs["moe_2"], "--repo_id", "ann/secret")
    assert hub.hub.repos["models", "ann/secret"].private
    script("push_to_hub.py", "--run", runs["moe"], "--repo_id", "ann/open")
    error = refused(script, capsys, "--run", runs["moe_2"], "--repo_id", "ann/open", "--private")
    assert "is public already" in error and len(HfApi().list_repo_commits("ann/open")) == 2


def test_a_dry_run_lists_what_would_go_and_asks_nothing(hub, runs, script, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    script("push_to_hub.py", "--run", runs["moe"], "--repo_id", "ann/moe", "--dry_run")
    listed = {line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert not [path for _, path in hub.requests if "agent-harnesses" not in path]
    script("push_to_hub.py", "--run", runs["moe"], "--repo_id", "ann/moe")
    assert set(HfApi().list_repo_files("ann/moe")) - {".gitattributes"} == listed - {"files"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--repo_id", "moe"], "has no account: write USER/NAME"),
        (["--repo_id", "ann/../x"], "is no id of a repository"),
        (["--repo_id", "ann/a/b"], "is no id of a repository"),
        ([], "--repo_id is missing"),
        (["--repo_id", "ann/moe", "--create_pr", "--revision", "dev"], "leave one out"),
        (["--repo_id", "ann/moe", "--max_shard_size", "5"], "write a size such as 5GB"),
        (["--repo_id", "bob/moe"], "--repo_id bob/moe: this token may not write there (403)"),
        (["--repo_id", "ann/data"], "is a dataset on the Hub"),
        (["--repo_id", "ann/Taken"], "the name is taken (409)"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(hub, runs, script, capsys, given, expected):
    HfApi().create_repo("ann/data", repo_type="dataset")
    HfApi().create_repo("ann/taken")
    before = contents(runs["moe"])
    assert expected in refused(script, capsys, "--run", runs["moe"], *given)
    assert contents(runs["moe"]) == before and ("models", "ann/moe") not in hub.hub.repos


@pytest.mark.parametrize(
    ("token", "expected"),
    [(None, "wants a token: run `hf auth login`"), ("hf_WRONG", "does not know this token (401)"),
     (READ_TOKEN, "may not write there (403)"), (OTHER_TOKEN, "may not write there (403)")],
)  # fmt: skip
def test_tokens_that_do_not_do_are_refused_in_one_line(hub, runs, script, capsys, monkeypatch, token, expected):
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    assert expected in refused(script, capsys, "--run", runs["moe"], "--repo_id", "ann/moe")
    assert not hub.hub.repos


def test_a_run_without_a_final_model_is_refused(hub, runs, script, capsys, tmp_path):
    assert "no such folder" in refused(script, capsys, "--run", tmp_path / "no", "--repo_id", "ann/moe")
    assert "holds no config.yaml" in refused(script, capsys, "--run", tmp_path, "--repo_id", "ann/moe")
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    assert "has no final model" in refused(script, capsys, "--run", tmp_path, "--repo_id", "ann/moe")
    for name in ("config.json", "eval_results.json"):
        (tmp_path / name).write_bytes((runs["moe"] / name).read_bytes())
    assert "model.safetensors is missing" in refused(script, capsys, "--run", tmp_path, "--repo_id", "ann/moe")
    assert not hub.hub.repos


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"---\nlicense: [\n---\n", "its metadata is no YAML"), (b"---\ntags: 5\n---\n", '"tags" has the wrong type')],
)
def test_a_broken_card_on_the_hub_is_not_replaced(hub, runs, script, capsys, content, expected):
    api = HfApi()
    api.create_repo("ann/moe")
    head = hub.hub.repos["models", "ann/moe"]
    from hub_server.repos import File

    head.commit("main", "broken", {"README.md": File(len(content), content)}, [], None, False)
    assert expected in refused(script, capsys, "--run", runs["moe"], "--repo_id", "ann/moe")
    assert Path(api.hf_hub_download("ann/moe", "README.md")).read_bytes() == content


BREAKS = {"lfs": ("PUT", "/upload/"), "xet": ("POST", "/xet/.*/xorbs/")}


@pytest.mark.parametrize("status", [500, 0])
def test_a_break_in_the_upload_is_mended(hub, runs, script, path_of_large_files, status):
    hub.fail(*BREAKS[path_of_large_files], status, times=1)
    hub.fail("POST", "/commit/", status, times=2)
    script("push_to_hub.py", "--run", runs["moe"], "--repo_id", "ann/moe")
    assert "model.safetensors" in HfApi().list_repo_files("ann/moe")
    assert len(HfApi().list_repo_commits("ann/moe")) == 2


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, runs, script):
    hub.fail("POST", "/commit/", 0, after=True)
    script("push_to_hub.py", "--run", runs["moe"], "--repo_id", "ann/moe")
    assert hub.asked("POST", "/commit/") == 1 and len(HfApi().list_repo_commits("ann/moe")) == 2


def test_a_hub_that_stays_broken_has_nothing_half_published(hub, runs, script, capsys, no_waiting, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    before = contents(runs["moe"])
    hub.fail("POST", "/commit/", 500, times=3)
    error = refused(script, capsys, "--run", runs["moe"], "--repo_id", "ann/moe")
    assert "the Hub failed (500" in error and "nothing was published" in error
    assert HfApi().list_repo_files("ann/moe") == [".gitattributes"] and contents(runs["moe"]) == before
    assert [wait for wait in no_waiting if wait in (2.0, 8.0)] == [2.0, 8.0]
    sent = hub.asked("PUT", "/upload/")
    script("push_to_hub.py", "--run", runs["moe"], "--repo_id", "ann/moe")  # goes on
    assert hub.asked("PUT", "/upload/") == sent and "model.safetensors" in HfApi().list_repo_files("ann/moe")


def test_an_edit_between_reading_and_writing_is_seen(hub, runs, monkeypatch):
    """A commit on a state that has passed is refused; the next attempt merges the edit."""
    from hub import push as pushing

    api = HfApi()
    publish([runs["moe"]], Destination("ann/moe"))
    download, edits = pushing._download, [b"---\nlicense: mit\n---\n\n## Mine\n\nIn between.\n"]

    def download_then_edit(*arguments):
        path = download(*arguments)
        if edits and path.name == "README.md":
            api.upload_file(path_or_fileobj=edits.pop(), path_in_repo="README.md", repo_id="ann/moe")
        return path

    monkeypatch.setattr(pushing, "_download", download_then_edit)
    publish([runs["moe_2"]], Destination("ann/moe"))
    assert "In between." in Path(api.hf_hub_download("ann/moe", "README.md")).read_text()


def test_a_leak_stops_the_push(runs, tmp_path):
    from hub.scrub import Scrubber

    with pytest.raises(UsageError, match=r"runs/x holds a local path: nothing was uploaded"):
        bundling.check_clean({"runs/x": f"in {tmp_path}/y".encode()}, Scrubber(tmp_path))
    with pytest.raises(UsageError, match="holds a token"):
        bundling.check_clean({"a": b"hf_abcdefghijklmnop"}, Scrubber())


@pytest.mark.parametrize("name", ["states", "model", "train", "transformers", "research", "Jordan"])
def test_a_user_or_host_whose_name_is_a_word_can_push(runs, script, capsys, monkeypatch, name):
    """Code, card and vocabulary hold it."""
    monkeypatch.setattr(socket, "gethostname", lambda: name)
    monkeypatch.setattr("getpass.getuser", lambda: name)
    monkeypatch.setenv("DB_PASSWORD", name)
    script("push_to_hub.py", "--run", runs["moe"], "--repo_id", "ann/moe", "--dry_run")
    assert "README.md" in capsys.readouterr().out


def test_spectra_of_a_pushed_model_are_analysed_by_its_id(hub, runs, script, tmp_path):
    script("push_to_hub.py", "--run", runs["moe"], "--repo_id", "ann/moe")
    script("track_manifold.py", "--model", "ann/moe", "--output_dir", tmp_path, "--formats", "png")
    found = SpectralLog(tmp_path / "spectral_log").read()
    last = SpectralLog(runs["moe"] / "spectral_log").read().query("step == 32")
    merged = found.merge(last, on=["layer", "projection", "expert"], suffixes=("", "_live"))
    assert len(merged) >= 14
    assert (merged.spectral_norm / merged.spectral_norm_live - 1).abs().max() < 1e-3  # a Gram matrix in fp32


def test_trainers_own_pushing_is_refused(runs):
    from blueberry import BlueberryTrainer

    with pytest.raises(UsageError, match="does not push by itself"):
        BlueberryTrainer.init_hf_repo(None)


def test_a_pushed_model_is_served_by_transformers(hub, runs, script, tmp_path):
    """By its id on the Hub, through the OpenAI-compatible endpoint."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    script("push_to_hub.py", "--run", runs["moe"], "--repo_id", "ann/moe")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "scripts" / "serve.py", "ann/moe", "--device", "cpu", "--host", "127.0.0.1",
               "--port", str(port)]  # fmt: skip
    environment = without_blueberry(hub, tmp_path) | {"PYTHONPATH": str(ROOT)}
    log = (tmp_path / "log.txt").open("w")
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log) as server:
        try:
            body = {"model": "ann/moe", "prompt": "The", "max_tokens": 4}
            answer = ask(f"http://127.0.0.1:{port}/v1/completions", body, server)
        finally:
            server.terminate()
    assert answer, (server.returncode, (tmp_path / "log.txt").read_text()[-3000:])
    assert answer["choices"][0]["text"] and answer["usage"]["completion_tokens"] == 4


def ask(url: str, body: dict, server: subprocess.Popen) -> dict | None:
    """The answer, once the server is up; None if it is gone."""
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for _ in range(240):
        if server.poll() is not None:
            return None
        try:
            with urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except HTTPError as error:
            pytest.fail(f"{error.code}: {error.read()[:2000]!r}")
        except (URLError, ConnectionError):
            threading.Event().wait(0.25)  # time.sleep is replaced here
    return None


def test_a_folder_with_only_a_card_takes_a_run(arguments, script, tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "README.md").write_text("# mine")
    script("train_llm.py", *arguments, "--output_dir", tmp_path)
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "README.md").read_text() == "# mine"
