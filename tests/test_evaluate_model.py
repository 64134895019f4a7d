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
WRITING = TASK | {
    "task": "writing", "output_type": "generate_until", "generation_kwargs": {"max_gen_toks": 64, "until": ["\n"]},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip


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
    for task in (TASK, WRITING):
        files[task["task"]] = tmp_path / f"{task['task']}.yaml"
        data = {"data_files": {"test": str(tmp_path / "questions.jsonl")}}
        files[task["task"]].write_text(yaml.safe_dump(task | {"dataset_kwargs": data}))
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
    found = record_at(run)["tasks"]["words"]
    assert found["metrics"]["acc"]["value"] == right / len(QUESTIONS)
    assert (found["questions"], found["of"], found["num_fewshot"]) == (4, 4, 0)
    assert f"{right / len(QUESTIONS):.4f}" in capsys.readouterr().out


def test_the_card_shows_results_on_all_questions_of_these_weights_only(run, tasks, script):
    script("evaluate_model.py", "--model", run, "--tasks", tasks["words"])
    assert "| words | 0 | acc | " in card_of([Run.read(run)], "ann/moe", "apache-2.0")
    (run / FILE).unlink()
    script("evaluate_model.py", "--model", run, "--tasks", tasks["words"], "--limit", 2)
    record = record_at(run)  # a group of tasks has no questions of its own to count
    record["tasks"]["words"] |= {"questions": None, "of": None}
    (run / FILE).write_text(json.dumps(record))
    assert "| words |" not in card_of([Run.read(run)], "ann/moe", "apache-2.0")
    script("evaluate_model.py", "--model", run, "--tasks", tasks["words"])
    with open(run / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert Run.read(run).benchmarks == {}


def test_a_benchmark_of_the_hub_gets_an_entry_in_eval_results(run, tasks, script):
    script("evaluate_model.py", "--model", run, "--tasks", tasks["words"])
    record = record_at(run)
    record["tasks"]["words"]["dataset"] = "Rowan/hellaswag"
    (run / FILE).write_text(json.dumps(record))
    entries = yaml.safe_load(eval_results_file(Run.read(run)))
    assert [entry["value"] for entry in entries if entry["dataset"]["id"] == "Rowan/hellaswag"] == [
        record["tasks"]["words"]["metrics"]["acc"]["value"]
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
    assert not (run / FILE).exists()
