"""Bad input is refused in one line that names the value, or has a defined result: never a silent wrong number."""

import logging

import pytest
import torch
from test_modeling import VARIANTS, build, tokens
from transformers import DynamicCache


@pytest.mark.parametrize("bad", [64, -1])
def test_a_token_outside_the_vocabulary_is_named(bad: int):
    with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 64"):
        build()(torch.tensor([[1, bad, 2]]))


def test_ids_and_embeddings_together_are_refused():
    model, ids = build(), tokens(1, 3)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(input_ids=ids, inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("bad", [64, -1])
def test_a_label_outside_the_vocabulary_is_named(bad: int, skip_logits: bool):
    ids = tokens(1, 4)
    labels = ids.clone()
    labels[0, 2] = bad
    for given in ({"labels": labels}, {"labels": ids, "shift_labels": labels}):
        with pytest.raises(ValueError, match=f"label {bad} is outside the vocabulary of 64"):
            build()(ids, skip_logits=skip_logits, **given)


@pytest.mark.parametrize("shape", [(2, 5), (1, 6), (12,)], ids=str)
def test_labels_that_do_not_fit_the_input_are_refused(shape: tuple[int, ...]):
    labels = torch.ones(shape, dtype=torch.long)
    for skip_logits in (False, True):
        with pytest.raises(ValueError, match=r"labels of shape \(.*\) do not fit an input of \(2, 6\)"):
            build()(tokens(2, 6), labels=labels, skip_logits=skip_logits)


def test_one_sequence_without_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"input of shape \(3,\) must have shape \(batch, seq\)"):
        build()(torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"input of shape \(3, 32\) must have shape \(batch, seq, hidden\)"):
        build()(inputs_embeds=torch.zeros(3, 32))


@pytest.mark.parametrize("skip_logits", [False, True])
def test_the_loss_of_no_labels_is_that_of_torch_with_and_without_logits(skip_logits: bool):
    model, ids = build().train(), tokens(1, 4)
    labels = torch.full_like(ids, -100)
    assert model(ids, labels=labels, skip_logits=skip_logits).loss.isnan()  # a mean of nothing
    assert model(ids, labels=labels, skip_logits=skip_logits, num_items_in_batch=7).loss == 0


def test_a_mask_that_does_not_reach_the_last_token_is_refused():
    model, ids = build(), tokens(2, 6)
    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 5\) does not fit 2 sequences of 6 tokens"):
        model(ids, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"attention_mask of shape \(1, 6\) does not fit 2 sequences of 6 tokens"):
        model(ids, attention_mask=torch.ones(1, 6))
    cache = DynamicCache(config=model.config)
    model(ids[:, :4], past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 2\) does not fit 2 sequences of 6 tokens"):
        model(ids[:, 4:], past_key_values=cache, attention_mask=torch.ones(2, 2))


@pytest.mark.parametrize("mask", [torch.ones(2, 7), torch.ones(6), torch.ones(1, 6, 6), torch.ones(2, 1, 6, 6).long()],
                         ids=["too many columns", "1-D", "3-D", "integers to add"])  # fmt: skip
def test_a_mask_of_another_kind_is_refused(mask: torch.Tensor):
    with pytest.raises(
        ValueError, match=r"attention_mask of shape \(.*\) (does not fit 2 sequences|and torch\..*: give)"
    ):
        build()(tokens(2, 6), attention_mask=mask)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_all_masked_row_is_finite_and_leaves_the_others_alone(variant: str, attention: str, dtype: torch.dtype):
    model, ids = build(variant, attn_implementation=attention).to(dtype), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0] = 0
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    # the same numbers in products of other sizes: rounding only
    torch.testing.assert_close(logits[1], model(ids[1:]).logits[0], rtol=0, atol=20 * torch.finfo(dtype).eps)


def test_an_all_masked_row_adds_nothing_to_the_loss_and_has_finite_gradients():
    model, ids = build(router_aux_loss_coef=1.0, router_z_loss_coef=1.0).double().train(), tokens(2, 6)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[0], labels[0] = 0, -100
    expected = model(ids[1:], labels=ids[1:]).loss
    loss = model(ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match=r"empty input of shape \(0, 6\)"):
        build()(tokens(2, 6)[:0])
    with pytest.raises(ValueError, match=r"empty input of shape \(2, 0\)"):
        build()(tokens(2, 6)[:, :0])


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "blueberry"])
def test_nan_in_a_router_shows_in_the_loss_and_in_every_logit(implementation: str):
    model, ids = build(experts_implementation=implementation).train(), tokens(2, 6)
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[0, 0] = float("nan")
    assert model(ids, labels=ids).loss.isnan()
    assert model(ids, labels=ids, skip_logits=True).loss.isnan()
    assert model.eval()(ids).logits.isnan().all()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "blueberry"])
@pytest.mark.parametrize("variant", ["experts", "gated_experts"])
def test_experts_without_tokens_get_a_gradient_of_zero(variant: str, implementation: str):
    # one token goes to two of four experts
    model, ids = build(variant, experts_implementation=implementation).train(), tokens(1, 1)
    output = model(ids, output_router_logits=True)
    output.logits.square().sum().backward()
    for layer, logits in zip(model.model.layers, output.router_logits, strict=True):
        chosen = logits[0].topk(2).indices.tolist()
        for weight in layer.mlp.experts.parameters():
            assert [bool(grad.any()) for grad in weight.grad] == [expert in chosen for expert in range(4)]


def test_positions_beyond_the_trained_ones_are_extrapolated_with_a_warning(caplog):
    model = build(max_position_embeddings=40)
    longer = build(max_position_embeddings=400)
    logging.getLogger("transformers").propagate = True  # to caplog
    with caplog.at_level(logging.WARNING):
        logits = model(tokens(1, 45)).logits
    assert "position 45 is beyond max_position_embeddings=40" in caplog.text
    torch.testing.assert_close(logits, longer(tokens(1, 45)).logits)
