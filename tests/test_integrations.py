"""Muon where its users are: the stock Trainer, BlueberryTrainer, TRL, PEFT, torch.compile, torch's own test harness."""

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from torch.testing._internal.common_optimizers import OptimizerInfo
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from blueberry import BlueberryTrainer, BlueberryTrainingArguments
from blueberry.errors import UsageError
from blueberry.optim import ComposedOptimizer, Muon, build_optimizer

WORDS = [
    "[UNK]",
    "[PAD]",
    "[EOS]",
    *"the of and to in we our people nation states united congress year war peace".split(),
]
LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=32, pad_token_id=1, **shape))


def rows(count: int = 16) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, len(WORDS), (count, 12), generator=generator).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


def arguments(folder: Path, kind: type = TrainingArguments, **settings) -> TrainingArguments:
    common = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no",
              "eval_strategy": "no", "use_cpu": True, "report_to": "none", "disable_tqdm": True}  # fmt: skip
    return kind(output_dir=str(folder), **(common | settings))


def moved(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class PoisonGradients(TrainerCallback):
    """Writes an inf into one gradient before the steps given."""

    def __init__(self, *steps: int):
        self.steps = steps

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        if state.global_step + 1 in self.steps:
            next(model.parameters()).grad.view(-1)[0] = math.inf


def test_the_stock_trainer_trains_every_parameter_and_schedules_both_parts(tmp_path):
    model = llama()
    before, optimizer = copied(model), build_optimizer(model, muon_lr=0.02, adamw_lr=0.01)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(), optimizers=(optimizer, None))
    trainer.train()
    assert moved(before, model) == set(before)
    assert all(row["orthogonalizations"] == 1 for row in optimizer.audit() if row["optimizer"] == "muon")
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}  # linear decay ends at zero for all of them


def test_the_stock_trainer_resumes_to_the_same_weights(tmp_path):
    def run(resume: bool) -> dict[str, torch.Tensor]:
        model = llama()
        args = arguments(tmp_path, save_strategy="steps", save_steps=2)
        trainer = Trainer(model, args, train_dataset=rows(), optimizers=(build_optimizer(model), None))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        return copied(model)

    straight, resumed = run(False), run(True)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_blueberry_trainer_prints_and_saves_the_audit_then_adds_measurements(tmp_path, capsys):
    trainer = BlueberryTrainer(
        model=llama(), args=arguments(tmp_path, BlueberryTrainingArguments), train_dataset=rows()
    )
    trainer.train()
    assert "model.layers.{0-1}.self_attn.q_proj.weight x2" in capsys.readouterr().out
    audit = json.loads((tmp_path / "optimizer_audit.json").read_text())
    assert {row["name"] for row in audit if "singular_values" in row} <= {
        row["name"] for row in audit if row["optimizer"] == "muon"
    }
    assert "singular values" in (tmp_path / "optimizer_audit.md").read_text()


def test_blueberry_trainer_logs_the_norm_of_all_gradients_before_clipping(tmp_path):
    norms = []

    class Norm(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
            norms.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm().item())

    for bound in (0.1, 0.0):
        args = arguments(tmp_path, BlueberryTrainingArguments, max_grad_norm=bound)
        trainer = BlueberryTrainer(model=llama(), args=args, train_dataset=rows(), callbacks=[Norm()])
        trainer.train()
        logged = [row["grad_norm"] for row in trainer.state.log_history if "loss" in row]
        assert logged == pytest.approx(norms[-4:], rel=1e-5)


def test_blueberry_trainer_logs_skipped_steps_and_goes_on(tmp_path):
    args = arguments(tmp_path, BlueberryTrainingArguments)
    trainer = BlueberryTrainer(model=llama(), args=args, train_dataset=rows(), callbacks=[PoisonGradients(2, 3)])
    trainer.train()
    logged = [row.get("skipped_steps") for row in trainer.state.log_history if "loss" in row]
    assert logged == [None, 1, 2, 2]
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_the_stock_trainer_skips_bad_steps_too(tmp_path):
    model = llama()
    optimizer = build_optimizer(model)
    args = arguments(tmp_path)
    Trainer(model, args, train_dataset=rows(), optimizers=(optimizer, None), callbacks=[PoisonGradients(1, 4)]).train()
    assert optimizer.skipped_steps == 2
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", [Trainer, BlueberryTrainer])
def test_an_optimizer_built_before_peft_wrapped_the_model_is_refused_before_the_first_step(kind, tmp_path):
    model = llama()
    optimizer = build_optimizer(model)
    wrapped = get_peft_model(model, LORA)
    before = copied(wrapped)
    args = arguments(tmp_path, BlueberryTrainingArguments if kind is BlueberryTrainer else TrainingArguments)
    trainer = kind(model=wrapped, args=args, train_dataset=rows(), optimizers=(optimizer, None))
    with pytest.raises(UsageError, match="build_optimizer"):
        trainer.train()
    assert moved(before, wrapped) == set()


def test_an_optimizer_built_after_peft_trains_the_adapters_only(tmp_path):
    model = get_peft_model(llama(), LORA)
    before = copied(model)
    args = arguments(tmp_path)
    Trainer(model, args, train_dataset=rows(), optimizers=(build_optimizer(model), None)).train()
    assert moved(before, model) == {name for name in before if "lora_" in name}


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]", model_max_length=32
    )


def sft_trainer(folder: Path, model: nn.Module, optimizer: ComposedOptimizer, **settings):
    from trl import SFTConfig, SFTTrainer

    texts = Dataset.from_list([{"text": "we the people of the united states in congress"}] * 8)
    args = arguments(folder, SFTConfig, bf16=False, gradient_checkpointing=False, max_length=16, max_steps=3)
    return SFTTrainer(
        model=model,
        args=args,
        train_dataset=texts,
        processing_class=tokenizer(),
        optimizers=(optimizer, None),
        **settings,
    )


def test_trl_sft_trainer_trains_with_it(tmp_path):
    model = llama()
    before, optimizer = copied(model), build_optimizer(model)
    trainer = sft_trainer(tmp_path, model, optimizer)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    assert {name for name in before if "proj" in name} <= moved(before, model)


def test_trl_with_peft_config_wraps_too_late_and_is_refused(tmp_path):
    model = llama()
    trainer = sft_trainer(tmp_path, model, build_optimizer(model), peft_config=LORA)
    with pytest.raises(UsageError, match="call build_optimizer on the model that is trained"):
        trainer.train()


def test_a_compiled_model_does_not_recompile_per_step():
    from torch._dynamo.utils import counters

    model = llama()
    optimizer = build_optimizer(model)
    compiled = torch.compile(model, backend="eager")
    ids = torch.randint(3, len(WORDS), (2, 12))

    def step() -> None:
        compiled(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    torch._dynamo.reset()
    counters.clear()
    step()
    frames = counters["frames"]["total"]
    assert frames > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            step()
    assert counters["frames"]["total"] == frames
