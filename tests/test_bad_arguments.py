"""What scripts/train_llm.py refuses: one line with the value and the remedy, exit code 2, nothing written."""

import json
import re

import pytest

from blueberry import BlueberryTrainingArguments
from blueberry.errors import UsageError

BAD_INPUT = {
    "unknown preset": (["--preset", "huge"], "unknown preset 'huge': choose one of"),
    "preset and config": (["--preset", "tiny", "--config_name", "x.json"], "give one of them"),
    "no tokens": (["--train_tokens", 0], "--train_tokens 0 trains nothing"),
    "both lengths": (["--max_steps", 5, "--train_tokens", 100], "--max_steps 5 and --train_tokens 100"),
    "epochs and tokens": (["--num_train_epochs", 2, "--train_tokens", 100], "--num_train_epochs 2.0"),
    "learning_rate with Muon": (["--learning_rate", 0.1], "use --muon_lr .* and --adamw_lr"),
    "optim": (["--optim", "adafactor"], "--optim adafactor has no effect here"),
    "unknown optimizer": (["--optimizer", "sgd"], "--optimizer sgd is unknown: use one of muon, adamw"),
    "unknown argument": (["--muon_learning_rate", 0.1], "unknown argument --muon_learning_rate"),
    "missing data": (["--dataset", "no/such/file.txt"], "no/such/file.txt"),
    "short for another": (["--train_tok", 100], "unknown argument --train_tok: did you mean --train_tokens"),
    "unknown tracker": (["--report_to", "tensorbord"], "--report_to tensorbord is unknown: choose none or"),
    "missing tracker": (["--report_to", "clearml"], "--report_to clearml is not installed: choose none or"),
    "beta above 1": (["--adam_beta2", 1.5], "--adam_beta2 1.5: must be at least 0 and below 1"),
    "negative seed": (["--seed", -1], "--seed -1: must be at least 0"),
    "no batch": (["--per_device_train_batch_size", 0], "--per_device_train_batch_size 0: must be at least 1"),
    "no accumulation": (["--gradient_accumulation_steps", 0], "--gradient_accumulation_steps 0: must be"),
    "rate that is no number": (["--muon_lr", "nan"], "--muon_lr nan: must be a finite number"),
    "infinite rate": (["--adamw_lr", "inf"], "--adamw_lr inf: must be a finite number"),
    "no evaluations": (["--eval_steps", 0], "--eval_steps 0.0: must be a finite number above 0"),
    "no JSON": (["--lr_scheduler_kwargs", "{min_lr"], "--lr_scheduler_kwargs {min_lr is no JSON"),
    "missing file": (["--accelerator_config", "nowhere.json"], "nowhere.json"),
    "unknown metric": (["--metric_for_best_model", "bleu"], "--metric_for_best_model bleu is not evaluated: choose"),
    "unknown compiler": (["--torch_compile_backend", "gcc"], "'GCC' is not a valid DynamoBackend"),
    "one process": (["--fsdp", "full_shard"], "FSDP was asked for and is not on"),
    "no steps": (["--max_steps", 0], "--max_steps 0: must be at least 1"),
    "no Hub token": (["--push_to_hub", "true"], "--push_to_hub true needs a Hub token"),
    "no Hub": (["--push_to_hub", "true", "--hub_token", "hf_x"], "--push_to_hub true needs the Hub, which cannot"),
    "not a number": (["--muon_lr", "fast"], "invalid float value: 'fast'"),
    "small vocabulary": (["--vocab_size", 100], "100"),
    "long windows": (["--preset", "tiny", "--max_length", 4096], "--max_length 4096"),
    "bad fraction": (["--validation_fraction", 1.5], "--validation_fraction 1.5"),
    "no checkpoint": (["--resume_from_checkpoint"], "run does not exist; train without it first"),
    "wrong checkpoint": (["--resume_from_checkpoint", "nowhere"], "nowhere is no checkpoint to go on from"),
    "missing config file": (["--config", "nowhere.yaml"], "nowhere.yaml: No such file"),
    "missing model config": (["--config_name", "nowhere.json"], "--config_name nowhere.json"),
    "labels of another task": (["--label_names", "start"], "--label_names start: windows have labels only"),
    "fp16 on a CPU": (["--use_cpu", "true", "--fp16", "true"], "--fp16 true does nothing on a CPU: use --bf16"),
    "nothing left to evaluate": (
        ["--dataloader_drop_last", "true", "--per_device_eval_batch_size", 9999],
        "windows are less than a batch of 9999",
    ),
    "bad tracking cadence": (
        ["--track_manifold", "true", "--track_every_n_steps", 0],
        "--track_every_n_steps 0: must be",
    ),
    "bad tracking share": (
        ["--track_manifold", "true", "--track_max_overhead", -1],
        "--track_max_overhead -1.0: must",
    ),
    "cadence of nothing": (
        ["--track_every_n_steps", 1],
        "--track_every_n_steps 1 does nothing without --track_manifold",
    ),
    "unknown violation": (["--on_violation", "explode"], "--on_violation explode is unknown: use one of warn"),
    "violation of nothing": (["--on_violation", "stop"], "--on_violation stop does nothing with --optimizer muon"),
    "rate of another optimizer": (["--optimizer", "adamw", "--muon_lr", 0.5], "--muon_lr 0.5 does nothing with --opt"),
    "sphere without manifold": (["--hypersphere_lr", 3], "--hypersphere_lr 3.0 does nothing with --optimizer muon"),
    "sphere of attention": (
        ["--optimizer", "manifold", "--manifold_attention_only", "true", "--hypersphere_lr", 3],
        "--hypersphere_lr 3.0 does nothing with --manifold_attention_only true",
    ),
    "learning_rate that equals a default": (["--learning_rate", 0.008], "use --muon_lr .* and --adamw_lr"),
    "two rates of one": (
        ["--optimizer", "adamw", "--learning_rate", 0.001, "--adamw_lr", 0.005],
        "--learning_rate 0.001 and --adamw_lr 0.005 set the same",
    ),
    "smoothed labels": (["--label_smoothing_factor", 0.1], "--label_smoothing_factor 0.1: must be 0: .*router losses"),
    "loss alone": (["--prediction_loss_only", "true"], "--prediction_loss_only true leaves accuracy, perplexity"),
    "no tokens counted": (["--include_num_input_tokens_seen", "no"], "--include_num_input_tokens_seen no leaves the"),
    "lists of batches": (["--eval_do_concat_batches", "false"], "--eval_do_concat_batches false gives the metrics"),
    "means of batches": (["--batch_eval_metrics", "true"], "--batch_eval_metrics true asks for means of batches"),
    "below a file": (["--output_dir", __file__ + "/run"], "test_bad_arguments.py is a file; name a folder"),
    "a file": (["--output_dir", __file__], "test_bad_arguments.py is a file; name a folder"),
    "where none can be": (["--output_dir", "/proc/run"], "--output_dir /proc/run: No such file"),
    "schedule": (["--lr_scheduler_type", "cosin"], "--lr_scheduler_type cosin is unknown: use one of linear, cosine"),
    "strategy": (["--eval_strategy", "often"], "--eval_strategy often is unknown: use one of no, steps"),
    "a list": (["--lr_scheduler_kwargs", "[1]"], "--lr_scheduler_kwargs .1. names no setting"),
    "short for a rate": (["--lr", 0.1], "unknown argument --lr: did you mean --muon_lr or --adamw_lr?"),
    "short for another rate": (
        ["--learning", 0.1],
        "unknown argument --learning: did you mean --muon_lr or --adamw_lr?",
    ),
    "end of another": (
        ["--batch_size", 4],
        "unknown argument --batch_size: did you mean --per_device_train_batch_size?",
    ),
    "missing path of a config": (["--config_name", "/nowhere/c.json"], "/nowhere/c.json: no such file or folder"),
    "DeepSpeed": (["--deepspeed", "ds.json"], "--deepspeed is not supported: .*FSDP2"),
    "folder made too soon": (["--use_liger_kernel", "true"], "liger-kernel >= 0.3.0 is not available"),
    "batches that are never full": (
        [
            "--dataloader_drop_last",
            "true",
            "--train_tokens",
            9,
            "--per_device_train_batch_size",
            9999,
            "--per_device_eval_batch_size",
            1,
        ],
        "training windows are less than a batch of 9999",
    ),
}


@pytest.mark.parametrize("case", sorted(BAD_INPUT))
def test_bad_input_is_one_line_with_the_remedy_and_exit_code_2(case, script, small_corpus, tmp_path, capsys):
    arguments, message = BAD_INPUT[case]
    given = ["--dataset", small_corpus, "--output_dir", tmp_path / "run", *arguments]
    with pytest.raises(SystemExit) as stop:
        script("train_llm.py", *given)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


def test_a_list_where_one_value_belongs_is_one_line(script, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("preset: [tiny, blueberry-moe]")
    with pytest.raises(SystemExit) as stop:
        script("train_llm.py", "--config", tmp_path / "bad.yaml")
    assert stop.value.code == 2
    assert "preset is ['tiny', 'blueberry-moe'], but takes a single value" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../esc/x", "/elsewhere/x", ".."])
def test_the_name_of_a_run_cannot_lead_out_of_the_results(name):
    with pytest.raises(UsageError, match="names no folder in results/"):
        BlueberryTrainingArguments(use_cpu=True, run_name=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads=3"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
        ({"num_expert": 9}, "unknown key 'num_expert'"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"model_type": "bert"}, "BertLMHeadModel sees later tokens"),
        ({"model_type": "t5"}, "model_type 't5' is an encoder-decoder: name a decoder"),
        ({"model_type": "vit"}, "'vit' has no causal language model"),
    ],
)
def test_a_bad_model_config_is_named_before_the_data_is_looked_at(
    change, message, script, small_config, tmp_path, capsys
):
    bad = tmp_path / "config.json"
    bad.write_text(json.dumps(json.loads(small_config.read_text()) | change))
    with pytest.raises(SystemExit):
        script("train_llm.py", "--dataset", "nowhere.txt", "--config_name", bad, "--output_dir", tmp_path / "run")
    assert message in capsys.readouterr().err


def test_a_cache_that_the_first_evaluation_could_not_write_is_named_before_training(
    arguments, script, small_config, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("datasets.config.HF_MODULES_CACHE", small_config / "modules")
    with pytest.raises(SystemExit):
        script("train_llm.py", *arguments, "--output_dir", tmp_path / "run")
    assert "cannot be written (Not a directory): set HF_HOME" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
