"""The router and the losses of training, against their formulas, in fp64."""

import pytest
import torch
import torch.nn.functional as F
from test_modeling import VARIANTS, build, gradients, tokens
from torch import Tensor
from transformers import Trainer, TrainingArguments

from blueberry import BlueberryConfig
from blueberry.losses_blueberry import load_balancing_loss, router_z_loss, sequence_weights
from blueberry.modeling_blueberry import BlueberryTopKRouter

MOE = [name for name in VARIANTS if name != "dense"]


def router(**overrides) -> BlueberryTopKRouter:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 5}
    module = BlueberryTopKRouter(BlueberryConfig(**sizes | overrides)).double()
    torch.nn.init.normal_(module.weight)
    return module


# The router


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_the_router_weighs_the_experts_of_largest_probability(norm_topk_prob: bool):
    module = router(norm_topk_prob=norm_topk_prob)
    hidden = torch.randn(11, 16, dtype=torch.float64)
    logits, weights, experts = module(hidden)
    for row, token in enumerate(hidden):
        scores = [float(token @ expert) for expert in module.weight.detach()]
        exponentials = torch.tensor(scores, dtype=torch.float64).exp()
        best = sorted(range(5), key=lambda e: -scores[e])[:2]
        probabilities = (exponentials / exponentials.sum())[best]
        expected = probabilities / probabilities.sum() if norm_topk_prob else probabilities
        assert experts[row].tolist() == best
        torch.testing.assert_close(weights[row], expected)
        torch.testing.assert_close(logits[row].tolist(), scores)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_router_logits_are_single_precision_in_half_precision_models(dtype: torch.dtype):
    module = router().to(dtype)
    hidden = torch.randn(11, 16, dtype=dtype)
    logits, weights, _ = module(hidden)
    assert logits.dtype == torch.float32 and weights.dtype == dtype
    torch.testing.assert_close(logits, hidden.float() @ module.weight.float().T)
    with torch.autocast("cpu", torch.bfloat16):
        assert router().float()(hidden.float())[0].dtype == torch.float32


def test_router_noise_has_the_asked_deviation_and_only_in_training():
    module = router(router_noise=0.5)
    hidden = torch.randn(4000, 16, dtype=torch.float64)
    noise = module.train()(hidden)[0] - module.eval()(hidden)[0]
    # 20000 draws: the standard error of the deviation is 0.5 / sqrt(40000) = 0.0025, of the mean 0.0035
    assert noise.std().item() == pytest.approx(0.5, abs=0.01)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.015)
    torch.testing.assert_close(module.eval()(hidden)[0], module.eval()(hidden)[0], rtol=0, atol=0)


# The formulas of the losses


def test_load_balancing_loss_is_its_formula():
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 7, 5, dtype=torch.float64)  # (layers, batch, seq, experts)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    expected = []
    for sequence in range(2):
        total = 0.0
        for layer in range(3):
            rows = logits[layer, sequence][mask[sequence]]
            counts = [0] * 5
            for row in rows.tolist():
                for expert in sorted(range(5), key=lambda e: -row[e])[:2]:
                    counts[expert] += 1
            fractions = torch.tensor(counts, dtype=torch.float64) / (2 * len(rows))
            total += 5 * (fractions * rows.softmax(-1).mean(0)).sum() / 3
        expected.append(total)
    torch.testing.assert_close(load_balancing_loss(logits, mask, top_k=2), torch.stack(expected))


def test_load_balancing_loss_is_one_when_balanced_and_largest_when_collapsed():
    mask = torch.ones(1, 4, dtype=torch.bool)
    balanced = 30 * torch.eye(4, dtype=torch.float64)[None, None]  # each token is sure of another expert
    collapsed = 30 * torch.eye(4, dtype=torch.float64)[0].expand(1, 1, 4, 4)
    assert load_balancing_loss(balanced, mask, top_k=1).item() == pytest.approx(1, abs=1e-9)
    assert load_balancing_loss(collapsed, mask, top_k=1).item() == pytest.approx(4, abs=1e-9)


def test_z_loss_is_its_formula():
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 7, 5, dtype=torch.float64)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = False
    squares = logits.exp().sum(-1).log() ** 2
    expected = torch.stack([squares[:, 0, 3:].mean(), squares[:, 1].mean()])
    torch.testing.assert_close(router_z_loss(logits, mask), expected)


def test_padding_rows_of_nan_do_not_reach_the_router_losses():
    logits, mask = torch.zeros(1, 1, 3, 4), torch.tensor([[True, True, False]])
    logits[0, 0, 2] = float("nan")
    assert load_balancing_loss(logits, mask, top_k=2).isfinite().all() and router_z_loss(logits, mask).isfinite().all()


def test_sequences_weigh_their_share_of_the_counted_labels():
    labels = torch.tensor([[1, 2, -100, 3], [1, -100, -100, -100]])  # the first label of a row is never predicted
    weights, mask = sequence_weights((2, 4), None, labels)
    assert weights.tolist() == [1.0, 0.0] and mask.all()
    assert sequence_weights((2, 4), None, labels, num_items_in_batch=8)[0].tolist() == [0.25, 0.0]
    shifted = torch.tensor([[2, -100, 3, 5], [1, 2, -100, -100]])
    weights = sequence_weights((2, 4), None, labels, torch.tensor(6), shift_labels=shifted)[0]
    torch.testing.assert_close(weights, torch.tensor([3 / 6, 2 / 6]))


# The loss of the model


@pytest.mark.parametrize("variant", MOE)
def test_the_training_loss_is_cross_entropy_plus_weighted_router_losses(variant: str):
    model = build(variant, router_aux_loss_coef=0.3, router_z_loss_coef=0.2).double()
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    output = model.train()(ids, attention_mask=mask, labels=labels, output_router_logits=True)
    cross_entropy = F.cross_entropy(output.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
    logits = torch.stack(output.router_logits).view(2, 2, 9, 4)
    weights = torch.tensor([8 / 13, 5 / 13], dtype=torch.float64)
    balance = load_balancing_loss(logits, mask.bool(), 2) @ weights
    z_loss = router_z_loss(logits, mask.bool()) @ weights
    torch.testing.assert_close(output.aux_loss, balance)
    # transformers takes the cross-entropy in fp32, the router losses stay in fp64
    torch.testing.assert_close(output.loss, cross_entropy + 0.3 * balance + 0.2 * z_loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_evaluation_loss_is_the_pure_cross_entropy(variant: str):
    model, ids = build(variant).double(), tokens(2, 9)
    output = model(ids, labels=ids, output_router_logits=True)
    expected = F.cross_entropy(output.logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


def test_label_smoothing_of_transformers_trainer_is_about_the_next_token(tmp_path):
    model, ids = build("dense").train(), tokens(2, 9)
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    loss = Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids})
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(loss, F.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1))


def test_router_losses_pull_on_every_router():
    model, ids = build(router_aux_loss_coef=0.0, router_z_loss_coef=0.0).double().train(), tokens(2, 9)
    without = gradients(model, ids)
    model.config.router_aux_loss_coef = 1.0
    balanced = gradients(model, ids)
    model.config.router_aux_loss_coef, model.config.router_z_loss_coef = 0.0, 1.0
    z_loss = gradients(model, ids)
    for name in (f"model.layers.{index}.mlp.gate.weight" for index in range(2)):
        assert not torch.allclose(balanced[name], without[name])
        assert not torch.allclose(z_loss[name], without[name])


# One global batch, split in every way


def ragged_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and labels (8, 12): rows of different lengths, some labels ignored inside."""
    ids = tokens(8, 12)
    lengths = torch.tensor([12, 3, 7, 12, 5, 9, 2, 11])
    mask = (torch.arange(12) < lengths[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 2:5] = labels[5, 1:6] = -100
    return ids, mask, labels


@pytest.mark.parametrize("variant", MOE)
@pytest.mark.parametrize("ragged", [False, True])
def test_gradients_do_not_depend_on_gradient_accumulation(variant: str, ragged: bool):
    # large coefficients, so that a router loss with the wrong weight shows; fp32 as in training
    model = build(variant, router_aux_loss_coef=1.0, router_z_loss_coef=0.5, initializer_range=0.1).train()
    ids, mask, labels = ragged_batch()
    if not ragged:
        mask, labels = torch.ones_like(mask), ids
    items = labels[:, 1:].ne(-100).sum()
    results = []
    for micro_batch in (8, 4, 1):
        model.zero_grad()
        losses = []
        for rows in torch.arange(8).split(micro_batch):
            loss = model(ids[rows], attention_mask=mask[rows], labels=labels[rows], num_items_in_batch=items).loss
            loss.backward()
            losses.append(loss.item())
        results.append((sum(losses), [parameter.grad.clone() for parameter in model.parameters()]))
    for loss, grads in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        for actual, expected in zip(grads, results[0][1], strict=True):
            assert (actual - expected).norm() <= 1e-5 * expected.norm()


def test_without_a_count_the_batch_counts_itself():
    model = build().train()
    ids, mask, labels = ragged_batch()
    items = labels[:, 1:].ne(-100).sum()
    alone = model(ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(alone, model(ids, attention_mask=mask, labels=labels, num_items_in_batch=items).loss)
