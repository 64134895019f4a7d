"""ComposedOptimizer: AdamW through it, its state through every kind of checkpoint, gradients that are not finite."""

import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from blueberry.errors import UsageError
from blueberry.optim import ComposedOptimizer, build_optimizer


@pytest.fixture(autouse=True)
def accelerate_of_its_own() -> None:
    """Accelerate's state is one to a process: after a test that trained in bf16 this file's models would do so."""
    AcceleratorState._reset_state(reset_partial_state=True)


class TinyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 8)
        self.out = nn.Linear(8, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.out(torch.relu(self.hidden(self.embedding(ids)))))
        return (hidden @ self.embedding.weight.T).logsumexp(-1).mean()


def composed(model: nn.Module) -> ComposedOptimizer:
    return build_optimizer(model, muon_lr=0.1, adamw_lr=0.01, weight_decay=0.1, max_grad_norm=0)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.arange(11)).backward()
        optimizer.step()


def test_adamw_through_the_composition_matches_torch_adamw():
    torch.manual_seed(0)
    model = TinyModel()
    twin = copy.deepcopy(model)
    train(model, build_optimizer(model, optimizer="adamw", adamw_lr=0.01, weight_decay=0.1, max_grad_norm=0), 4)
    decayed = [p for p in twin.parameters() if p.ndim == 2]
    rest = [p for p in twin.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    train(twin, torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95)), 4)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_resuming_from_a_state_dict_gives_the_same_weights_as_never_stopping():
    torch.manual_seed(0)
    straight = TinyModel()
    resumed = copy.deepcopy(straight)
    train(straight, composed(straight), 5)
    first = composed(resumed)
    train(resumed, first, 2)
    second = composed(resumed)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(resumed, second, 3)
    for mine, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_changed_learning_rate_reaches_every_part_even_after_loading():
    model = TinyModel()
    optimizer = composed(model)
    train(model, optimizer, 1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, 1)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_scheduler_keeps_the_ratio_of_learning_rates():
    model = TinyModel()
    optimizer = composed(model)
    set_gradients(model, 1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == pytest.approx(
        {"muon": 0.05, "adamw": 0.005, "adamw_vectors": 0.005}
    )


def test_only_groups_with_a_bound_are_clipped_by_their_common_norm():
    model = TinyModel()
    optimizer = build_optimizer(model, max_grad_norm=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    clipped = [p.grad for g in optimizer.param_groups if g["name"] != "muon" for p in g["params"]]
    assert torch.stack([gradient.norm() for gradient in clipped]).norm() == pytest.approx(0.5, rel=1e-5)
    assert torch.equal(model.hidden.weight.grad, torch.ones(8, 6))


def test_unknown_settings_and_optimizers_are_refused():
    with pytest.raises(UsageError, match="setting 'nesterof' is unknown"):
        build_optimizer(TinyModel(), nesterof=False)
    for name in ("defaults", "self", "params", "lr"):  # of Muon's constructor, but none that a user sets
        with pytest.raises(UsageError, match=f"setting '{name}' is unknown"):
            build_optimizer(TinyModel(), **{name: 1})
    with pytest.raises(UsageError, match="optimizer='sgd' is unknown"):
        build_optimizer(TinyModel(), optimizer="sgd")


def test_a_model_without_hidden_matrices_is_an_error_not_a_silent_adamw():
    with pytest.raises(UsageError, match="Muon would do nothing"):
        build_optimizer(nn.LayerNorm(4))


def test_adding_a_group_needs_the_name_of_a_part():
    optimizer = composed(TinyModel())
    with pytest.raises(UsageError, match='"optimizer" is None: name one of muon, adamw'):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})


def set_gradients(model: nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)


def backward(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.arange(11)).backward()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Weights and every tensor of the state, step counters included."""
    states = optimizer.state_dict()["state"].values()
    return weights(model) + [value.clone() for state in states for value in state.values()]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("name", ["hidden.weight", "norm.bias"])  # one of Muon's, one of AdamW's
def test_one_bad_entry_skips_the_whole_step_and_touches_nothing(bad, name):
    model = TinyModel()
    optimizer = composed(model)
    train(model, optimizer, 2)
    before = snapshot(model, optimizer)
    backward(model, optimizer)
    model.get_parameter(name).grad.view(-1)[3] = bad
    optimizer.step()
    assert_same(snapshot(model, optimizer), before)
    assert optimizer.skipped_steps == 1


def test_a_skipped_first_step_leaves_no_state():
    model = TinyModel()
    optimizer = composed(model)
    set_gradients(model, math.nan)
    optimizer.step()
    assert not optimizer.state_dict()["state"] and optimizer.skipped_steps == 1


@pytest.mark.parametrize("max_grad_norm", [0, 1.0])
def test_huge_gradients_whose_float32_norm_overflows_still_train(max_grad_norm):
    """Muon's update does not depend on the scale; AdamW's are clipped by a norm taken in float64."""
    torch.manual_seed(0)
    huge, plain = TinyModel(), None
    plain = copy.deepcopy(huge)
    for model, scale in ((huge, 2.0**66), (plain, 1.0)):  # powers of two: the same rounding
        optimizer = build_optimizer(model, muon_lr=0.1, max_grad_norm=max_grad_norm)
        backward(model, optimizer)
        for parameter in model.parameters():
            parameter.grad.mul_(scale / parameter.grad.abs().max())
        optimizer.step()
    assert optimizer.skipped_steps == 0
    assert not torch.isfinite(torch.tensor(2.0**66) ** 2)
    # Newton-Schulz in bfloat16 from inputs that are normalised in another scale: lr times its noise
    torch.testing.assert_close(huge.hidden.weight, plain.hidden.weight, rtol=0, atol=0.1 * 0.02)
    if max_grad_norm:
        torch.testing.assert_close(huge.norm.weight, plain.norm.weight)


def test_gradient_norm_is_that_of_all_gradients_before_clipping():
    model = TinyModel()
    optimizer = build_optimizer(model, max_grad_norm=0.1)
    set_gradients(model, 3.0)
    optimizer.step()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert optimizer.gradient_norm == pytest.approx(3 * count**0.5, rel=1e-6)


def test_too_many_bad_steps_in_a_row_stop_with_the_first_offender():
    model = TinyModel()
    optimizer = composed(model)
    optimizer.max_skipped_steps = 2
    for _ in range(2):  # good steps in between start the count anew
        for _ in range(2):
            backward(model, optimizer)
            model.out.weight.grad[0, 0] = math.inf
            optimizer.step()
        train(model, optimizer, 1)
    assert optimizer.skipped_steps == 4
    backward(model, optimizer)
    model.out.weight.grad[0, 0] = math.inf
    optimizer.step()
    optimizer.step()
    with pytest.raises(UsageError, match=r"3 steps in a row .* first in out\.weight: lower the learning rates"):
        optimizer.step()


def test_counters_survive_a_checkpoint_that_is_loaded_with_weights_only(tmp_path):
    model = TinyModel()
    optimizer = composed(model)
    train(model, optimizer, 1)
    set_gradients(model, math.inf)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = composed(model)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert again.skipped_steps == 1
    assert all(group["skipped_in_a_row"] == 1 for group in again.param_groups)


def test_a_first_step_without_any_gradient_names_the_remedy():
    with pytest.raises(UsageError, match=r"none of the optimizer's 7 parameters has a gradient .*build_optimizer on"):
        composed(TinyModel()).step()


def test_a_state_dict_of_other_parts_is_refused():
    model = TinyModel()
    other = build_optimizer(model, optimizer="adamw")
    with pytest.raises(UsageError, match="build it with the settings of the run that was saved"):
        composed(model).load_state_dict(other.state_dict())


def test_a_bad_number_of_skipped_steps_is_refused():
    with pytest.raises(UsageError, match="max_skipped_steps=-1 is negative"):
        ComposedOptimizer({"adamw": torch.optim.AdamW([nn.Parameter(torch.zeros(2))])}, max_skipped_steps=-1)


def bfloat16_twins() -> tuple[nn.Module, nn.Module]:
    """Half of a tiny model's parameters in bfloat16 would not multiply: all are."""
    torch.manual_seed(0)
    model = TinyModel().to(torch.bfloat16)
    return model, copy.deepcopy(model)


def through_torch_distributed(model: nn.Module, old: ComposedOptimizer, new: ComposedOptimizer, folder: Path) -> None:
    dcp.save(get_optimizer_state_dict(model, old), checkpoint_id=folder)
    state = get_optimizer_state_dict(model, new)
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, new, state)


def through_accelerate(model: nn.Module, old: ComposedOptimizer, new: ComposedOptimizer, folder: Path) -> None:
    for optimizer, method in ((old, "save_state"), (new, "load_state")):
        accelerator = Accelerator(cpu=True)
        accelerator.prepare(model, optimizer)
        getattr(accelerator, method)(str(folder))


def through_torch_save(model: nn.Module, old: ComposedOptimizer, new: ComposedOptimizer, folder: Path) -> None:
    torch.save(old.state_dict(), folder / "optimizer.pt")
    new.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))


ROUTES = [through_torch_save, through_torch_distributed, through_accelerate]


@pytest.mark.parametrize("route", ROUTES)
def test_every_checkpoint_gives_the_same_next_steps_and_keeps_float32_momentum(route, tmp_path):
    straight, resumed = bfloat16_twins()
    train(straight, composed(straight), 5)
    first, second = composed(resumed), composed(resumed)
    train(resumed, first, 2)
    set_gradients(resumed, math.nan)
    first.step()
    resumed.zero_grad()
    route(resumed, first, second, tmp_path)
    assert second.state[resumed.hidden.weight]["momentum_buffer"].dtype == torch.float32
    train(resumed, second, 3)
    assert_same(weights(resumed), weights(straight))
    assert second.skipped_steps == 1


@pytest.mark.parametrize("route", ROUTES)
def test_a_changed_learning_rate_reaches_every_part_after_every_kind_of_loading(route, tmp_path):
    model = TinyModel()
    first, second = composed(model), composed(model)
    train(model, first, 1)
    model.zero_grad()
    route(model, first, second, tmp_path)
    before = weights(model)
    for group in second.param_groups:
        group["lr"] = 0.0
    train(model, second, 1)
    assert_same(weights(model), before)
    for group in second.param_groups:
        group["lr"] = 0.1
    train(model, second, 1)
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_asking_for_the_distributed_state_of_a_fresh_optimizer_disturbs_nothing():
    """torch.distributed.checkpoint steps it on zero gradients with lr 0; torch's AdamW alone would count that step."""
    torch.manual_seed(0)
    asked = TinyModel()
    straight = copy.deepcopy(asked)
    optimizer = composed(asked)
    state = get_optimizer_state_dict(asked, optimizer)
    assert "exp_avg" in state["state"]["norm.weight"]
    assert not any("orthogonalizations" in row for row in optimizer.audit())
    train(asked, optimizer, 3)
    train(straight, composed(straight), 3)
    assert_same(weights(asked), weights(straight))


def test_accelerate_steps_through_its_wrapper_as_alone():
    torch.manual_seed(0)
    wrapped = TinyModel()
    alone = copy.deepcopy(wrapped)
    model, optimizer = Accelerator(cpu=True).prepare(wrapped, composed(wrapped))
    train(model, optimizer, 3)
    train(alone, composed(alone), 3)
    assert_same(weights(wrapped), weights(alone))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copied_model_and_optimizer_go_on_as_the_originals(clone):
    torch.manual_seed(0)
    model = TinyModel()
    optimizer = composed(model)
    train(model, optimizer, 2)
    other_model, other = clone((model, optimizer))
    assert other.optimizers["muon"].param_groups[0] is other.param_groups[0]
    train(model, optimizer, 2)
    train(other_model, other, 2)
    assert_same(weights(other_model), weights(model))
    assert other.audit() == optimizer.audit()


def test_a_gradient_scaler_and_this_optimizer_skip_the_same_steps():
    """Under a GradScaler its own check comes first: it skips, halves its scale and the optimizer counts nothing."""
    torch.manual_seed(0)
    scaled = TinyModel()
    plain = copy.deepcopy(scaled)
    ours, theirs = composed(scaled), composed(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for bad in (False, True, False):
        for model, optimizer in ((scaled, ours), (plain, theirs)):
            optimizer.zero_grad()
            loss = model(torch.arange(11))
            (scaler.scale(loss) if optimizer is ours else loss).backward()
            if bad:
                model.norm.weight.grad[0] = math.inf
        scaler.step(ours)
        scaler.update()
        theirs.step()
    assert scaler.get_scale() == 512
    assert (ours.skipped_steps, theirs.skipped_steps) == (0, 1)
    for mine, other in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)  # a power of two in and out of every gradient
