"""Metrics against their definitions: a plain loop, exp(loss), and arithmetic by hand."""

import math
import socket
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import EvalPrediction, Trainer, TrainingArguments

from blueberry.training import evaluation
from blueberry.training.evaluation import METRICS, compute_metrics, load_metrics, preprocess_logits_for_metrics

VOCABULARY, LENGTH = 11, 8


@pytest.fixture(scope="module")
def metrics():
    return load_metrics()


class Bigram(nn.Module):
    """The smallest language model: logits of the next token from the current one, in a tuple as MoE models give."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, input_ids, labels=None):
        logits = self.table(input_ids)  # (batch, length, vocabulary)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits, "router_logits": logits[..., :2]}


def test_metrics_load_without_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        pytest.fail("the network was used")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_metrics.cache_clear()
    found = load_metrics()
    assert set(found) == set(METRICS)
    assert all(metric.description.strip() and metric.inputs_description.strip() for metric in found.values())


def test_token_accuracy_is_the_share_of_equal_tokens_that_count(metrics):
    compute = metrics["token_accuracy"].compute
    assert compute(predictions=[[1, 2, 3], [4]], references=[[1, 0, -100], [4]]) == {"accuracy": 2 / 3}
    assert compute(predictions=[[1, 2]], references=[[0, 2]], ignore_index=0) == {"accuracy": 1.0}


def test_perplexity_of_a_uniform_model_is_its_vocabulary(metrics):
    nll = [10 * math.log(50), 30 * math.log(50)]
    assert metrics["perplexity"].compute(nll=nll, tokens=[10, 30])["perplexity"] == pytest.approx(50, rel=1e-12)
    assert metrics["perplexity"].compute(nll=[1e6], tokens=[1]) == {"perplexity": math.inf}


def test_bits_per_byte_of_random_bytes_is_eight(metrics):
    nll = [100 * math.log(256)]
    assert metrics["bits_per_byte"].compute(nll=nll, bytes=[100.0])["bits_per_byte"] == pytest.approx(8, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("token_accuracy", {"predictions": [[1]], "references": [[-100]]}, "every reference is ignore_index"),
        ("token_accuracy", {"predictions": [[1, 2]], "references": [[1]]}, "2 predictions for 1 references"),
        ("perplexity", {"nll": [0.0], "tokens": [0]}, "no token was predicted"),
        ("bits_per_byte", {"nll": [0.0], "bytes": [0.0]}, "no byte was predicted"),
    ],
)
def test_metrics_of_nothing_are_refused(metrics, name, inputs, message):
    with pytest.raises(ValueError, match=message):
        metrics[name].compute(**inputs)


@pytest.mark.parametrize("chunk", [1, 5, 1024])
def test_reduced_logits_match_a_plain_loop(chunk, monkeypatch):
    monkeypatch.setattr(evaluation, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(chunk)
    logits = torch.randn(3, LENGTH, VOCABULARY, generator=generator)
    labels = torch.randint(VOCABULARY, (3, LENGTH), generator=generator)
    labels[0, 3] = labels[2, -2:] = -100
    predictions, nll = preprocess_logits_for_metrics((logits, "router logits"), labels)
    for row in range(3):
        expected = 0.0
        for position in range(LENGTH - 1):
            assert predictions[row, position] == logits[row, position].argmax()
            target = labels[row, position + 1]
            if target != -100:
                expected -= logits[row, position].double().log_softmax(-1)[target].item()
        assert nll[row].item() == pytest.approx(expected, rel=1e-6)  # fp32 sums of 7 terms


def test_bf16_logits_are_summed_in_fp32():
    logits = torch.randn(2, LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.zeros(2, LENGTH, dtype=torch.long)
    _, nll = preprocess_logits_for_metrics(logits, labels)
    expected = -logits[:, :-1].double().log_softmax(-1)[..., 0].sum(1)
    torch.testing.assert_close(nll.double(), expected, rtol=1e-6, atol=0)


def test_bits_per_byte_follow_from_perplexity_and_are_left_out_when_unknown():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, VOCABULARY, (4, LENGTH))
    prediction = EvalPrediction((labels[:, 1:], rng.random(4)), labels)
    found = compute_metrics(prediction, bytes_per_token=4.5)
    assert found["accuracy"] == 1
    assert found["bits_per_byte"] == pytest.approx(math.log2(found["perplexity"]) / 4.5, rel=1e-12)
    assert set(compute_metrics(prediction)) == {"accuracy", "perplexity"}


def test_trainer_reports_accuracy_and_the_exponential_of_its_loss(tmp_path):
    rows = np.random.default_rng(0).integers(0, VOCABULARY, (12, LENGTH)).tolist()
    windows = Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch")
    model = Bigram()
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), per_device_eval_batch_size=4, use_cpu=True, report_to="none"),
        eval_dataset=windows,
        preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        compute_metrics=partial(compute_metrics, bytes_per_token=3.0),
    )
    found = trainer.evaluate()
    assert found["eval_perplexity"] == pytest.approx(math.exp(found["eval_loss"]), rel=1e-6)
    assert found["eval_bits_per_byte"] == pytest.approx(found["eval_loss"] / math.log(2) / 3, rel=1e-6)
    best = model.table.weight.argmax(-1)
    hits = [best[row[i]] == row[i + 1] for row in rows for i in range(LENGTH - 1)]
    assert found["eval_accuracy"] == pytest.approx(sum(hits).item() / len(hits), rel=1e-12)
