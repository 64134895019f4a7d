"""Large memory is kept for the next step, never while it is in use, and not longer than the weights it is for."""

import sys
from collections import defaultdict

import pytest
import torch
from torch import Tensor, nn

from blueberry import BlueberryConfig, BlueberryForCausalLM, memory_blueberry
from blueberry.losses_blueberry import CPU_CHUNK, head_cross_entropy
from blueberry.memory_blueberry import LARGE, large_empty
from blueberry.modeling_blueberry import BlueberryGatedExperts

ROWS = LARGE // 4096  # of 1024 float32 numbers: just large


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.zeros(1))


def take(weight: Tensor) -> Tensor:
    return large_empty(weight, (ROWS, 1024), torch.float32)


def kept() -> int:
    """Free blocks of this size."""
    return len(memory_blueberry._blocks[ROWS * 4096].free)


def test_memory_is_taken_again_once_nothing_refers_to_it(weight):
    first = take(weight)
    place, row = first.data_ptr(), first[3]
    del first
    assert take(weight).data_ptr() != place  # a view of it is still in use
    del row
    assert place in [x.data_ptr() for x in (take(weight), take(weight))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_a_tensor_like_any_other(dtype: torch.dtype, weight):
    shape = (8, LARGE // 64, 16)
    x = large_empty(weight, shape, dtype)
    assert x.shape == shape and x.dtype == dtype and x.is_contiguous() and x.data_ptr() % 64 == 0
    assert torch.equal(x.fill_(2).flatten()[-5:], torch.full((5,), 2, dtype=dtype))


def test_memory_goes_with_the_last_weight():
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for index in range(2):
        take(weights[index])
    weights.pop()
    assert kept() == 1
    weights.pop()
    assert kept() == 0


def test_memory_that_outlives_its_weight_is_not_kept():
    weight = nn.Parameter(torch.zeros(1))
    x = take(weight)
    del weight
    del x
    assert kept() == 0


def test_small_memory_is_left_to_torch(weight, monkeypatch):
    monkeypatch.setattr(memory_blueberry, "np", None)
    assert large_empty(weight, (LARGE - 1,), torch.uint8).numel() == LARGE - 1


def small_mixture() -> BlueberryForCausalLM:
    config = BlueberryConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_experts=4, moe_intermediate_size=64
    )
    return BlueberryForCausalLM(config).train()


def gradients(model: nn.Module, seed: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids, skip_logits=True).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def test_gradients_that_are_held_accumulated_or_computed_again_are_right(monkeypatch):
    """All memory counts as large: the same numbers as with none of it, whoever still holds earlier gradients."""
    torch.manual_seed(0)
    model, expected = small_mixture(), []
    for large in (2**40, 0):
        monkeypatch.setattr(memory_blueberry, "LARGE", large)
        steps = []
        for seed in (0, 1):
            model.zero_grad(set_to_none=True)
            steps.append(gradients(model, seed))  # those of the first step are held during the second
        accumulated = {name: grad.clone() for name, grad in gradients(model, 0).items()}
        steps.append(accumulated)
        expected.append([{name: grad.clone() for name, grad in step.items()} for step in steps])
        del steps
    for ours, theirs in zip(*reversed(expected), strict=True):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("lengths", [range(1, 200, 3), [1500, 2100]])
def test_batches_of_many_lengths_keep_little_more_than_the_longest(lengths, monkeypatch):
    """Each number of tokens kept logits of its own: 45 GB after some hundred batches at vocabulary 49152."""
    monkeypatch.setattr(memory_blueberry, "LARGE", 0)
    monkeypatch.setattr(memory_blueberry, "_blocks", defaultdict(memory_blueberry._Blocks))
    weight = nn.Parameter(torch.zeros(1024, 8))
    for length in lengths:
        hidden, labels = torch.ones(1, length, 8, requires_grad=True), torch.ones(1, length, dtype=torch.long)
        head_cross_entropy(hidden, weight, labels).backward()
        weight.grad = None
    kept = sum(len(block.free) * size for size, block in memory_blueberry._blocks.items())
    logits = 2 ** (min(max(lengths), CPU_CHUNK) - 1).bit_length() * len(weight) * 4
    assert logits <= kept < 2 * logits + 5 * weight.nbytes


@pytest.mark.skipif(sys.platform != "linux", reason="getrusage counts pages on Linux")
@pytest.mark.parametrize(("layers", "width"), [(1, 1024), (4, 512)])
def test_a_step_faults_no_gradients_in_again(layers: int, width: int):
    """Neither one of 32 MiB, which glibc would map anew, nor several that lie at the end of its heap when freed."""
    import resource

    config = BlueberryConfig(hidden_size=512, moe_intermediate_size=width, num_experts=8, gated_experts=True)
    config._experts_implementation = "blueberry"
    model, x = nn.ModuleList(BlueberryGatedExperts(config) for _ in range(layers)), torch.randn(64, 512)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.02)
    index, scores = torch.arange(64).unsqueeze(1) % 8, torch.ones(64, 1)
    for _ in range(4):
        model.zero_grad(set_to_none=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        sum(experts(x, index, scores).sum() for experts in model).backward()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults * resource.getpagesize() < sum(weight.nbytes for weight in model.parameters()) / 10
