"""The audit: what it measures against an SVD, how it reads, what it warns about and where it is saved."""

import copy
import json
import math
import re

import pytest
import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from blueberry.optim import ComposedOptimizer, Muon, build_optimizer
from blueberry.optim.audit import UpdateMeter, audit_warnings, collapse, format_audit
from blueberry.polar import newton_schulz


class Hybrid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.unused = nn.Linear(6, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh()
        return (hidden @ self.embedding.weight.T).logsumexp(-1).mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.arange(11)).backward()
        optimizer.step()


def measured(*weights: torch.Tensor, seed: int = 0, **settings) -> tuple[list[dict], list[torch.Tensor]]:
    """Rows of one measured step of Muon on random gradients, and the gradients."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(weight) for weight in weights]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
    muon = Muon(parameters, **({"lr": 0.5, "momentum": 0} | settings))
    meter = UpdateMeter()
    with meter.watch(muon):
        muon.step()
    return list(meter.measurements.values()), [parameter.grad for parameter in parameters]


def test_singular_values_are_those_of_the_polar_factor_whatever_lr_scale_and_decay():
    weight = torch.randn(12, 30, dtype=torch.float64)
    rows, (gradient,) = measured(weight, lr=0.37, scale_mode="rms_match", weight_decay=0.4)
    values = torch.linalg.svdvals(newton_schulz(gradient, dtype=torch.float64))
    assert rows[0]["singular_values"] == pytest.approx([values.min().item(), values.max().item()], abs=1e-9)


def test_update_to_weight_ratio_is_the_change_over_the_weight():
    weight = torch.randn(12, 30, dtype=torch.float64)
    after = weight.clone()
    rows, _ = measured(after, weight_decay=0.2)
    assert rows[0]["update_to_weight_ratio"] == pytest.approx(((after - weight).norm() / weight.norm()).item())


@pytest.mark.parametrize("batch_bytes", [1, 2**27])
def test_every_matrix_of_a_stack_counts_however_muon_cuts_it(batch_bytes):
    stack, matrix = torch.randn(5, 8, 6), torch.randn(6, 8)
    before = stack.clone()
    rows, _ = measured(stack, matrix, batch_bytes=batch_bytes)
    assert [row["orthogonalizations"] for row in rows] == [5, 1]
    assert rows[0]["update_to_weight_ratio"] == pytest.approx(
        ((stack - before).norm() / before.norm()).item(), rel=1e-5
    )


def test_of_a_large_matrix_the_sampled_rows_lie_within_the_whole_spectrum():
    rows, (gradient,) = measured(torch.randn(600, 700))
    values = torch.linalg.svdvals(newton_schulz(gradient.bfloat16()).float())
    low, high = rows[0]["singular_values"]
    assert values.min() - 0.01 <= low <= high <= values.max() + 0.01  # 600 bfloat16 terms a sum


def test_measuring_changes_no_weight_and_ends_after_the_first_steps(monkeypatch):
    torch.manual_seed(0)
    model = Hybrid()
    del model.unused
    twin = copy.deepcopy(model)
    optimizer, plain = build_optimizer(model), build_optimizer(twin)
    plain._steps = 100  # past the measured steps
    train(model, optimizer, 2)
    rows = optimizer.audit()
    monkeypatch.setattr(UpdateMeter, "watch", None)  # calling it again would fail
    train(model, optimizer, 2)
    train(twin, plain, 4)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert optimizer.audit() == rows
    assert not any("orthogonalizations" in row for row in plain.audit())


def test_rows_of_muon_have_measurements_after_the_first_steps_and_only_they():
    model = Hybrid()
    optimizer = build_optimizer(model)
    assert all(set(row) == {"name", "shape", "optimizer", "group", "reason"} for row in optimizer.audit())
    with pytest.warns(UserWarning, match="unused"):
        train(model, optimizer, 2)
    for row in optimizer.audit():
        assert ("update_to_weight_ratio" in row) == (row["optimizer"] == "muon" and "unused" not in row["name"])


def test_a_warm_up_step_with_lr_zero_says_nothing_about_the_ratio():
    rows, _ = measured(torch.randn(4, 4), lr=0.0)
    assert rows[0]["update_to_weight_ratio"] is None
    assert audit_warnings([{"name": "w"} | rows[0]]) == []


def test_names_collapse_to_ranges_with_a_count():
    names = [f"layers.{i}.w" for i in (0, 1, 2)] + ["layers.0.b", "layers.4.b", "head"]
    assert collapse(names) == ["layers.{0-2}.w x3", "layers.{0,4}.b x2", "head"]
    assert collapse([f"layers.{i}.experts.{j}.w" for i in (0, 1) for j in (0, 1, 2)]) == [
        "layers.{0-1}.experts.{0-2}.w x6"
    ]


def test_the_table_of_a_qwen3_moe_has_one_line_for_each_kind_of_parameter():
    config = Qwen3MoeConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
    )  # fmt: skip
    table = format_audit(build_optimizer(Qwen3MoeForCausalLM(config)).audit())
    lines = table.splitlines()
    assert "model.layers.{0-2}.self_attn.q_proj.weight x3" in table
    (experts,) = [line for line in lines if "experts.down_proj" in line]
    assert "x3" in experts and "4 x 16 x 8" in experts and "muon" in experts
    assert len({len(line) for line in lines[2:]}) == 1  # a table of even width
    assert lines[0].startswith(("muon: ", "adamw: "))
    assert len(lines) < 20


def test_the_table_shows_measurements_once_there_are_any():
    model = Hybrid()
    del model.unused
    optimizer = build_optimizer(model)
    assert "singular values" not in format_audit(optimizer.audit())
    train(model, optimizer, 2)
    (line,) = [line for line in format_audit(optimizer.audit()).splitlines() if "layers.{0-2}.weight x3" in line]
    assert " to 1." in line


def test_a_parameter_that_never_gets_a_gradient_is_named_once():
    model = Hybrid()
    optimizer = build_optimizer(model)
    with pytest.warns(UserWarning) as record:
        train(model, optimizer, 5)
    messages = [str(warning.message) for warning in record if "gradient" in str(warning.message)]
    assert len(messages) == 1
    assert "unused.weight, unused.bias got no gradient in the first 2 steps: freeze it" in messages[0]


def row(**values) -> dict:
    return {
        "name": "a.0.w",
        "orthogonalizations": 1,
        "singular_values": [0.9, 1.1],
        "update_to_weight_ratio": 0.1,
    } | values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"singular_values": [0.0, 0.0], "update_to_weight_ratio": 0.0}, "update of zero from Muon"),
        ({"singular_values": [0.9, 1.6]}, r"singular values above 1.5: take more ns_steps"),
        ({"singular_values": [math.inf, math.inf]}, "singular values above 1.5"),
        ({"update_to_weight_ratio": 0.0}, "lost in rounding; keep weights in float32"),
        ({"update_to_weight_ratio": 1.2}, "more than 1 times its own norm: lower muon_lr"),
        ({"update_to_weight_ratio": math.nan}, "lower muon_lr"),
    ],
)
def test_an_update_outside_its_range_is_a_warning_with_the_remedy(values, message):
    assert audit_warnings([row()]) == []
    (warning,) = audit_warnings([row(), row(name="a.1.w") | values])
    assert warning.startswith("a.1.w ")
    assert re.search(message, warning)


def test_a_stack_with_one_dead_expert_is_no_cause_for_a_warning():
    stack = nn.Parameter(torch.randn(3, 8, 6))
    stack.grad = torch.randn(3, 8, 6)
    stack.grad[0] = 0  # the first expert got no tokens
    muon = Muon([("experts", stack)], lr=0.01)
    optimizer = ComposedOptimizer({"muon": muon})
    for _ in range(2):
        optimizer.step()
    measurements = optimizer._meter.measurements["experts"]
    assert measurements["singular_values"][0] > 0.5
    assert audit_warnings([{"name": "experts"} | measurements]) == []


def test_updates_lost_in_bfloat16_are_noticed():
    rows, _ = measured(torch.randn(32, 32).bfloat16() + 4, lr=1e-5)
    assert audit_warnings([{"name": "w"} | rows[0]]) == [
        "w did not change: its gradient is zero, or its updates are lost in rounding; keep weights in float32"
    ]


def test_an_audit_is_json():
    model = Hybrid()
    del model.unused
    optimizer = build_optimizer(model)
    train(model, optimizer, 2)
    assert json.loads(json.dumps(optimizer.audit())) == optimizer.audit()


def test_of_many_layers_one_matrix_is_sampled_and_no_spectrum_exceeds_512_rows(monkeypatch):
    sizes, eigvalsh = [], torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda gram: sizes.append(len(gram)) or eigvalsh(gram))
    named = [(f"layers.{i}.w", nn.Parameter(torch.randn(8, 6))) for i in range(5)]
    named.append(("head", nn.Parameter(torch.randn(600, 520))))
    for _, parameter in named:
        parameter.grad = torch.randn_like(parameter)
    muon, meter = Muon(named), UpdateMeter()
    with meter.watch(muon):
        muon.step()
    assert sorted(sizes) == [6, 512]
    assert sum("singular_values" in row for row in meter.measurements.values()) == 2
    assert all(row["orthogonalizations"] == 1 for row in meter.measurements.values())


def test_the_largest_update_of_a_kind_is_the_one_that_is_sampled():
    """A blow-up in one layer is seen."""
    named = [(f"layers.{i}.w", nn.Parameter(torch.randn(8, 6))) for i in range(5)]
    for _, parameter in named:
        parameter.grad = torch.randn_like(parameter)

    class Broken(Muon):
        def orthogonalize(self, directions, group, *scratch):
            update = super().orthogonalize(directions, group, *scratch)
            update[3] *= 4
            return update

    optimizer = ComposedOptimizer({"muon": Broken(named, lr=0.01)})
    optimizer.step()
    with pytest.warns(UserWarning, match=r"layers\.3\.w got an update with singular values above 1\.5"):
        optimizer.step()
