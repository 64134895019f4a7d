"""What `accelerate launch` asked for is what runs, or one line says what to change."""

import types

import pytest
import torch

from blueberry import BlueberryTrainingArguments
from blueberry.errors import UsageError

LAUNCHES = {
    "DeepSpeed": ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported: .*FSDP2"),
    "FSDP1": ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version 1: FSDP1 flattens .*; set it to 2"),
    "FSDP of no version": ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version 1: FSDP1 flattens"),
    "FSDP2 on CPUs": (
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
        "is not on: .*use scripts/.*multi_cpu.yaml",
    ),
    "ranks apart": ({"WORLD_SIZE": "2"}, "2 processes were launched but 1 is running"),
}


@pytest.mark.parametrize("launch", LAUNCHES)
def test_an_engine_that_is_asked_for_and_is_not_on_is_refused(launch, tmp_path, monkeypatch):
    variables, message = LAUNCHES[launch]
    args = BlueberryTrainingArguments(str(tmp_path), use_cpu=True)  # the state of accelerate is that of this process
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        args._check_processes()
        args._check_engine()


def test_fsdp2_is_taken_where_it_is_on(tmp_path, monkeypatch):
    args = BlueberryTrainingArguments(str(tmp_path), use_cpu=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    gpu = types.SimpleNamespace(device=torch.device("cuda"), fsdp=[])
    BlueberryTrainingArguments._check_engine(gpu)
    with pytest.raises(UsageError, match="is not on"):
        args._check_engine()
