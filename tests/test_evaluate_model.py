"""scripts/evaluate_model.py against the log-likelihoods of the model itself, and what becomes of its record."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from blueberry.benchmarks import FILE, merged
from hub.card import card_of, eval_results_file
from hub.run import Run

QUESTIONS = [
    {"question": "The people of the United", "choices": ["States", "squares", "of"], "answer": 0},
    {"question": "Congress has", "choices": ["seven trees blue", "passed"], "answer": 1},
    {"question": "My fellow", "choices": ["citizens", "under", "a"], "answer": 0},
    {"question": "The Treasury", "choices": ["is", "yes"], "answer": 0},
]
TASK = {
    "task": "words", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
    "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}], "metadata": {"version": 1.0},
}  # fmt: skip
WORDS = "words (words.yaml)"  # in the record
WRITING = TASK | {
    "task": "writing", "output_type": "generate_until", "generation_kwargs": {"max_gen_toks": 64, "until": ["\n"]},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip

BAD = {  # file -> a task that cannot be evaluated
    "template": TASK | {"doc_to_text": "{{nope}}"},
    "metric": TASK | {"metric_list": [{"metric": "nope", "aggregation": "mean", "higher_is_better": True}]},
    "split": TASK | {"test_split": "nope"},
    "key": TASK | {"doc_to_tagret": "{{answer}}"},
}


@pytest.fixture(scope="module")
def trained(arguments: list, run_script, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results") / "run"
    run_script("train_llm.py", *arguments, "--output_dir", folder)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may write into."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def tasks(tmp_path: Path, data_caches: None) -> dict[str, Path]:
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    files = {}
    for name, task in {"words": TASK, "writing": WRITING, **BAD}.items():
        files[name] = tmp_path / f"{name}.yaml"
        data = {"data_files": {"test": str(tmp_path / "questions.jsonl")}}
        files[name].write_text(yaml.safe_dump(task | {"dataset_kwargs": data}))
    files["broken"] = tmp_path / "broken.yaml"
    files["broken"].write_text("task: [unclosed")
    return files


def record_at(run: Path) -> dict:
    return json.loads((run / FILE).read_text())


def likeliest(run: Path, question: dict) -> int:
    """By the definition: the choice whose tokens have the largest sum of log-probabilities after the question."""
    from blueberry.training.loading import load_model, load_tokenizer

    model, tokenizer = load_model(str(run)), load_tokenizer(str(run))
    start = tokenizer(question["question"])["input_ids"]
    totals = []
    for choice in question["choices"]:
        whole = tokenizer(question["question"] + " " + choice)["input_ids"]
        with torch.no_grad():
            log_p = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        totals.append(sum(log_p[at - 1, whole[at]].item() for at in range(len(start), len(whole))))
    return max(range(len(totals)), key=totals.__getitem__)


def test_a_local_task_scores_what_the_models_log_likelihoods_say(run, tasks, script, capsys):
    script("evaluate_model.py", "--model", run, "--tasks", tasks["words"])
    right = sum(likeliest(run, question) == question["answer"] for question in QUESTIONS)
    found = record_at(run)["tasks"][WORDS]
    assert found["metrics"]["acc"]["value"] == right / len(QUESTIONS)
    assert (found["questions"], found["of"], found["num_fewshot"]) == (4, 4, 0)
    assert f"{right / len(QUESTIONS):.4f}" in capsys.readouterr().out


def test_the_card_shows_results_on_all_questions_of_these_weights_only(run, tasks, script):
    script("evaluate_model.py", "--model", run, "--tasks", tasks["words"])
    assert f"| {WORDS} | 0 | acc | " in card_of([Run.read(run)], "ann/moe", "apache-2.0")
    (run / FILE).unlink()
    script("evaluate_model.py", "--model", run, "--tasks", tasks["words"], "--limit", 2)
    record = record_at(run)  # a group of tasks has no questions of its own to count
    record["tasks"][WORDS] |= {"questions": None, "of": None}
    (run / FILE).write_text(json.dumps(record))
    assert f"| {WORDS} |" not in card_of([Run.read(run)], "ann/moe", "apache-2.0")
    script("evaluate_model.py", "--model", run, "--tasks", tasks["words"])
    with open(run / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert Run.read(run).benchmarks == {}


def test_a_benchmark_of_the_hub_gets_an_entry_in_eval_results(run, tasks, script):
    script("evaluate_model.py", "--model", run, "--tasks", tasks["words"])
    record = record_at(run)
    record["tasks"][WORDS]["dataset"] = "Rowan/hellaswag"
    (run / FILE).write_text(json.dumps(record))
    entries = yaml.safe_load(eval_results_file(Run.read(run)))
    assert [entry["value"] for entry in entries if entry["dataset"]["id"] == "Rowan/hellaswag"] == [
        record["tasks"][WORDS]["metrics"]["acc"]["value"]
    ]


def test_results_of_other_tasks_stay_unless_the_weights_changed():
    first, second = ({"weights": "a", "tasks": {name: {"limit": None}}} for name in ("one", "two"))
    assert set(merged(first, second)["tasks"]) == {"one", "two"}
    assert set(merged(first | {"weights": "b"}, second)["tasks"]) == {"two"}
    assert merged(None, second) == second


def test_a_look_at_some_questions_does_not_replace_the_result_on_all():
    whole, part = ({"weights": "a", "tasks": {"one": {"limit": limit}}} for limit in (None, 2))
    assert merged(whole, part) == merged(part, whole) == whole


def test_benchmarks_of_the_originals_are_known_by_name():
    from blueberry.benchmarks import task_manager

    manager = task_manager(["hellaswag", "arc_easy", "arc_challenge", "gsm8k"])
    assert {"hellaswag", "arc_easy", "arc_challenge", "gsm8k"} <= set(manager.all_tasks)


def test_what_cannot_be_evaluated_is_refused_in_one_line(run, tasks, script, capsys):
    def refusal(*given) -> str:
        with pytest.raises(SystemExit) as stop:
            script("evaluate_model.py", *given)
        assert stop.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    words = ("--tasks", tasks["words"])
    assert "no such folder" in refusal("--model", "./nowhere", *words)
    assert "--limit 0: must be at least 1" in refusal("--model", run, *words, "--limit", 0)
    assert "no such file" in refusal("--model", run, "--tasks", "./no.yaml")
    assert "is unknown: hellaswag" in refusal("--model", run, "--tasks", "helaswag")
    assert "window is too short" in refusal("--model", run, "--tasks", tasks["writing"])
    assert "Rowan/hellaswag" in refusal("--model", run, "--tasks", "hellaswag")  # without a network
    assert "while parsing a flow sequence" in refusal("--model", run, "--tasks", tasks["broken"])
    errors = {"template": "'nope' is undefined; mend the file", "split": "KeyError: 'nope'; mend the file",
              "key": "'doc_to_tagret'; mend the file", "metric": "words gave no number"}  # fmt: skip
    for name, error in errors.items():
        assert error in refusal("--model", run, "--tasks", tasks[name])
    assert not (run / FILE).exists()


def test_an_output_that_is_something_else_is_refused_before_anything_is_evaluated(run, tasks, script, capsys):
    """It used to be found after the evaluation, whose results were lost."""
    other = run / "config.json"
    for output, error in ((run, "is a folder: name a file in it"), (other, "is no record of benchmarks")):
        before = other.read_text()
        with pytest.raises(SystemExit) as stop:
            script("evaluate_model.py", "--model", "./nowhere", "--tasks", tasks["words"], "--output", output)
        assert stop.value.code == 2 and error in capsys.readouterr().err
        assert other.read_text() == before


def test_a_local_file_that_calls_itself_a_benchmark_is_recorded_as_its_file(run, tasks, script):
    task = yaml.safe_load(tasks["words"].read_text())
    tasks["words"].write_text(yaml.safe_dump(task | {"task": "hellaswag"}))
    script("evaluate_model.py", "--model", run, "--tasks", tasks["words"])
    (name,) = record_at(run)["tasks"]
    assert name == "hellaswag (words.yaml)" and record_at(run)["tasks"][name]["file"] == "words.yaml"


def test_a_result_keeps_the_version_of_the_harness_that_gave_it():
    first, second = ({"weights": "a", "tasks": {task: {"limit": None, "lm_eval": version}}}
                     for task, version in (("one", "0.4.1"), ("two", "0.4.9")))  # fmt: skip
    assert merged(first, second)["tasks"]["one"]["lm_eval"] == "0.4.1"


# Columns as the data sets on the Hub have them, rows of our own.
SWAG = {"ind": 1, "activity_label": "Speaking", "ctx_a": "A man stands.", "ctx_b": "he", "ctx": "A man stands. he",
        "endings": ["speaks to all.", "is a tree.", "of of.", "seven [title] squares."], "source_id": "a",
        "split": "val", "split_type": "indomain", "label": "0"}  # fmt: skip
ARC = {"id": "a", "question": "Who makes laws?", "answerKey": "B",
       "choices": {"text": ["trees", "Congress", "squares", "of"], "label": ["A", "B", "C", "D"]}}  # fmt: skip
GSM = {"question": "Two and two?", "answer": "It is <<2+2=4>>4.\n#### 4"}
BENCHMARKS = {  # data set -> folder of its configuration, split that is asked, row
    "Rowan/hellaswag": ("data", "validation", SWAG),
    "allenai/ai2_arc": ("ARC-Easy", "test", ARC),
    "openai/gsm8k": ("main", "test", GSM),
}


@pytest.fixture
def benchmarks_on_hub(data_caches, hub, tmp_path, monkeypatch) -> None:
    """The three data sets, four rows in each split, on the Hub of the tests."""
    import datasets
    from huggingface_hub import HfApi

    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name, (config, split, row) in BENCHMARKS.items():
        owner = name.split("/")[0]
        hub.add_account(f"hf_{owner}", owner)
        api = HfApi(hub.url, token=f"hf_{owner}")
        api.create_repo(name, repo_type="dataset")
        for part in {"train", "validation", split}:
            file = tmp_path / "rows.parquet"
            datasets.Dataset.from_list([row] * 4).to_parquet(file)
            api.upload_file(path_or_fileobj=file, path_in_repo=f"{config}/{part}-00000-of-00001.parquet",
                            repo_id=name, repo_type="dataset")  # fmt: skip
        if config != "data":
            card = f"---\nconfigs:\n- config_name: {config}\n  data_dir: {config}\n---\n"
            api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=name, repo_type="dataset")


@pytest.fixture
def long_model(run: Path, tmp_path: Path) -> Path:
    """Untrained, with room for the 256 tokens that gsm8k asks for."""
    from blueberry import BlueberryConfig, BlueberryForCausalLM

    config = BlueberryConfig.from_pretrained(run, max_position_embeddings=512)
    folder = Path(shutil.copytree(run, tmp_path / "long"))
    BlueberryForCausalLM(config).save_pretrained(folder)
    return folder


def test_benchmarks_by_name_are_taken_from_the_hub_and_scored(long_model, benchmarks_on_hub, script):
    tasks = ("hellaswag", "arc_easy", "gsm8k")
    script("evaluate_model.py", "--model", long_model, "--tasks", *tasks, "--num_fewshot", 0)
    found = record_at(long_model)["tasks"]
    assert [found[task]["dataset"] for task in tasks] == list(BENCHMARKS)
    assert all(found[task]["questions"] == found[task]["of"] == 4 and found[task]["file"] is None for task in tasks)
    assert set(found["hellaswag"]["metrics"]) == set(found["arc_easy"]["metrics"]) == {"acc", "acc_norm"}
    assert found["gsm8k"]["metrics"]["exact_match (strict-match)"]["value"] == 0  # it knows no arithmetic
    choices = {
        "question": "Speaking: A man stands. He",
        "choices": ["speaks to all.", "is a tree.", "of of.", "seven. squares."],
    }
    assert found["hellaswag"]["metrics"]["acc"]["value"] == float(likeliest(long_model, choices) == 0)
