"""Muon where its users are: the stock Trainer, BlueberryTrainer, TRL, PEFT, torch.compile, torch's test harness."""

import copy
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
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import ErrorOptimizerInput, OptimizerInfo, OptimizerInput, optims
from torch.testing._internal.common_utils import TestCase
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
    *("the", "of", "and", "to", "in", "we", "our", "people", "nation", "states", "united", "congress", "year", "war"),
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
    with pytest.raises(UsageError, match=r"none of the optimizer's|holds 0 of 8 trainable parameters"):
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


def muon_inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    kinds = {
        "default": {},
        "lr as a tensor": {"lr": torch.tensor(0.01)},
        "weight decay": {"weight_decay": 0.1},
        "cautious": {"weight_decay": 0.1, "cautious": True},
        "no momentum": {"momentum": 0},
        "not Nesterov": {"nesterov": False},
        "rows normalised": {"neuron_beta": 0.95},
        "AdamW's scale": {"scale_mode": "rms_match"},
    }
    return [OptimizerInput(params=None, kwargs=kwargs, desc=kind) for kind, kwargs in kinds.items()]


def muon_error_inputs(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    weight = [nn.Parameter(torch.zeros(2, 3, device=device, dtype=dtype))]
    errors = {"no step size": {"lr": -0.1}, "outside": {"momentum": 1.0}, "is unknown": {"scale_mode": "large"}}
    return [
        ErrorOptimizerInput(OptimizerInput(weight, kwargs, regex), error_type=UsageError, error_regex=regex)
        for regex, kwargs in errors.items()
    ]


MUON = OptimizerInfo(Muon, optim_inputs_func=muon_inputs, optim_error_inputs_func=muon_error_inputs)


def matrices(device: str, dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 4), (4, 6), (3, 5, 5))
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def some_steps(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], seeds: range) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        optimizer.step()


class TestMuonInTorchHarness(TestCase):
    """What torch asks of an optimizer, over torch's own description of its settings."""

    @optims([MUON], dtypes=[torch.float32, torch.bfloat16])
    def test_a_loaded_state_dict_goes_on_as_the_saved_one(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device=device):
            ours, theirs = matrices(device, dtype), matrices(device, dtype)
            saved, loaded = (optim_info.optim_cls(params, **given.kwargs) for params in (ours, theirs))
            some_steps(saved, ours, range(2))
            loaded.load_state_dict(copy.deepcopy(saved.state_dict()))  # torch shares the buffers otherwise
            for mine, other in zip(theirs, ours, strict=True):
                mine.data.copy_(other)
            some_steps(saved, ours, range(2, 4))
            some_steps(loaded, theirs, range(2, 4))
            self.assertEqual(ours, theirs, rtol=0, atol=0, msg=given.desc)

    @optims([MUON], dtypes=[torch.float32])
    def test_parameters_come_as_list_generator_names_or_groups(self, device, dtype, optim_info):
        results = []
        for form in (
            list,
            iter,
            lambda params: [(str(i), p) for i, p in enumerate(params)],
            lambda params: [{"params": params[:1]}, {"params": iter(params[1:])}],
        ):
            params = matrices(device, dtype)
            some_steps(optim_info.optim_cls(form(params)), params, range(2))
            results.append(params)
        self.assertTrue(all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True)))

    @optims([MUON], dtypes=[torch.float32])
    def test_a_tensor_as_learning_rate_steps_like_the_number(self, device, dtype, optim_info):
        results = []
        for lr in (0.01, torch.tensor(0.01)):
            params = matrices(device, dtype)
            some_steps(optim_info.optim_cls(params, lr=lr, weight_decay=0.1), params, range(2))
            results.append(params)
        self.assertEqual(*results)

    @optims([MUON], dtypes=[torch.float32])
    def test_hooks_run_and_may_change_the_gradient(self, device, dtype, optim_info):
        params, calls = matrices(device, dtype), []
        optimizer = optim_info.optim_cls(params, momentum=0)
        before = [parameter.detach().clone() for parameter in params]

        def drop_gradients(optimizer: torch.optim.Optimizer, *rest: object) -> None:
            calls.append("pre")
            optimizer.zero_grad()

        optimizer.register_step_pre_hook(drop_gradients)
        optimizer.register_step_post_hook(lambda *rest: calls.append("post"))
        optimizer.register_load_state_dict_post_hook(lambda optimizer: calls.append("load"))
        some_steps(optimizer, params, range(1))
        optimizer.load_state_dict(optimizer.state_dict())
        self.assertEqual(calls, ["pre", "post", "load"])
        self.assertEqual(before, params)

    @optims([MUON], dtypes=[torch.float32])
    def test_a_group_added_later_has_its_own_settings(self, device, dtype, optim_info):
        first, second, third = matrices(device, dtype)
        optimizer = optim_info.optim_cls([first], lr=0.1)
        optimizer.add_param_group({"params": second, "lr": 0.0})
        optimizer.add_param_group({"params": [third]})
        before = [p.detach().clone() for p in (first, second, third)]
        some_steps(optimizer, [first, second, third], range(1))
        self.assertEqual(
            [torch.equal(a, b) for a, b in zip(before, (first, second, third), strict=True)], [False, True, False]
        )

    @optims([MUON], dtypes=[torch.float32])
    def test_bad_settings_are_refused_when_it_is_built(self, device, dtype, optim_info):
        for error in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
            given = error.optimizer_error_input
            with self.assertRaisesRegex(error.error_type, error.error_regex):
                optim_info.optim_cls(given.params, **given.kwargs)


instantiate_device_type_tests(TestMuonInTorchHarness, globals(), only_for="cpu")
