"""A fast way to train mixture-of-experts layers on a CPU, for every MoE model of transformers.

Importing this file adds `experts_implementation="blueberry"` to transformers' experts interface. On a CPU it sorts the
(token, expert) pairs by expert once and then works on one expert at a time, in a single autograd function: indexing
`weight[expert]` for autograd, as the eager loop does, makes the backward fill a zero gradient of *all* experts for
each expert. A single token outside training needs no sorting. On other devices, inside `torch.compile`, for experts
with a norm of their own, and for a few tokens in bf16 outside training, transformers' `grouped_mm` does the work; so
it does (or `batched_mm`, where it cannot) in training with an activation that has parameters or is random.

The file ships to the Hub as remote code, so it imports torch, transformers and its siblings only.
"""

import threading
from collections.abc import Callable
from functools import cache
from itertools import accumulate, chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules.dropout import _DropoutNd
from transformers.activations import ACT2FN
from transformers.integrations import moe
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)

from .first_order_blueberry import first_order
from .memory_blueberry import large_empty
from .products_blueberry import (
    FEW_ROWS,
    has_hooks,
    has_onednn_linear,
    linear,
    product_dtype,
    products_of_few_rows,
    without_autocast,
)
from .threads_blueberry import run_on_workers, workers_pay

EXPERTS_IMPLEMENTATION = "blueberry"
BLOCK = 16  # an expert's rows come in multiples of it
_GATE = "_default_apply_gate"  # transformers' own, a private name: where it is missing, no gate is taken for it
SILU_MODULES = (nn.SiLU, type(ACT2FN["silu"]))
FEW = 256  # tokens up to which transformers' grouped_mm is as fast in bf16 outside training, and below 100 faster


class Routing(NamedTuple):
    """The (token, choice) pairs of a batch laid out in rows, expert after expert."""

    token: Tensor  # (rows,): the token of each row
    pair: Tensor  # (rows,): its pair token * top_k + choice
    real: Tensor  # (rows,): False where a row only repeats its expert's last pair to fill up a block
    place: Tensor  # (tokens, top_k): the row of each pair
    spans: list[tuple[int, int, int]]  # expert, first row, one past the last row; experts without tokens are left out


def sort_by_expert(top_k_index: Tensor, num_experts: int, block: int = 1) -> Routing:
    """Sort the pairs of top_k_index (tokens, top_k) by expert, keeping the order of tokens.

    An expert with more than `block` pairs gets a multiple of `block` rows: oneDNN compiles its products for each shape
    that it meets, which takes as long as a product of a few hundred rows.

    Indices from `num_experts` on stand for experts of another rank (expert parallelism): they come last, in no span.
    """
    expert = top_k_index.reshape(-1)
    order = expert.argsort(stable=True)
    counts = expert.bincount(minlength=num_experts).tolist()
    sizes = [-(-count // block) * block if count > block else count for count in counts]
    sizes[num_experts:] = counts[num_experts:]
    starts = [0, *accumulate(sizes)]
    spans = [(index, starts[index], starts[index + 1]) for index in range(num_experts) if sizes[index]]
    rows = torch.arange(starts[-1], device=order.device)
    real, pair, place = torch.ones_like(rows, dtype=torch.bool), order, torch.empty_like(order)
    if sizes != counts:
        parts = list(zip(order.split(counts), sizes, strict=True))
        pair = torch.cat([piece for part, size in parts for piece in (part, part[-1:].expand(size - len(part)))])
        rows = torch.cat([rows[start : start + count] for start, count in zip(starts, counts, strict=False)])
        real = torch.zeros_like(real).index_fill_(0, rows, True)
    place[order] = rows
    return Routing(pair // top_k_index.shape[1], pair, real, place.view(top_k_index.shape), spans)


@cache
def has_fast_half_precision() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware; without it bf16 products are several times slower."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def compute_dtype(hidden_states: Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's or the input's, but fp32 for half precision without hardware."""
    dtype = product_dtype(hidden_states)
    half = dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half and not has_fast_half_precision() else dtype


class Activation(NamedTuple):
    """What experts compute between their products. Its input may be overwritten."""

    forward: Callable[[Tensor], tuple[Tensor, tuple[Tensor, ...]]]  # the output, and what the backward needs
    backward: Callable[..., tuple[Tensor, Tensor]]  # from the output's gradient and that: the output, x's gradient


def by_autograd(function: Callable[[Tensor], Tensor]) -> Activation:
    """Any function, computed again in the backward."""

    def backward(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            output = function(x.view_as(x))  # not the leaf, onto which torch's counter of operations cannot hook
        return output.detach(), torch.autograd.grad(output, x, grad)[0]

    return Activation(lambda x: (function(x), (x,)), backward)


def silu_backward(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """silu(x) of x (rows, width) again, and the gradient of x, which takes the place of that of the output.

    To compute it twice is faster than to keep it: it costs less than writing it to memory and reading it back.
    """
    return F.silu(x), torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)


def gated_silu_and_slopes(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """silu(gate) * up of x (rows, 2 width), gate and up side by side -> (rows, width), and its two derivatives.

    They take the place of x: each exponential is computed once, and the backward is a product.
    """
    gate, up = x.chunk(2, dim=-1)
    silu_gate = F.silu(gate)
    output = silu_gate * up
    torch.ops.aten.silu_backward.grad_input(up, gate, grad_input=gate)
    up.copy_(silu_gate)
    return output, (output, x)


def by_slopes(grad: Tensor, output: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of each input is its slope times the gradient (rows, width) of the output."""
    return output, (slopes.unflatten(-1, (-1, grad.shape[-1])) * grad.unsqueeze(1)).flatten(1)


SILU = Activation(lambda x: (F.silu(x), (x,)), silu_backward)
GATED_SILU = Activation(gated_silu_and_slopes, by_slopes)


def activation_of(experts: nn.Module, training: bool) -> Activation:
    """What an experts module of transformers computes between its products; in training written out for SiLU."""
    function = experts._apply_gate if experts.has_gate else experts.act_fn
    other = experts.has_gate and getattr(function, "__func__", function) is not getattr(moe, _GATE, None)
    if other or not training:
        return by_autograd(function)
    act = experts.act_fn
    if type(act) in SILU_MODULES and not has_hooks(act):
        return GATED_SILU if experts.has_gate else SILU
    return by_autograd(function)


def can_activate_twice(experts: nn.Module) -> bool:
    """Whether the activation gives the same again, and only its input gets a gradient: by the modules in it.

    Not those with parameters, random ones and those that overwrite their input.
    """
    act = dict(experts.named_children()).get("act_fn")
    if act is None:
        return True
    random = any(isinstance(module, (_DropoutNd, nn.RReLU)) for module in act.modules())
    in_place = any(vars(module).get("inplace", False) for module in act.modules())
    return not (random or in_place or any(True for _ in act.parameters()))


def combine(rows: Tensor, place: Tensor, scores: Tensor | None = None) -> Tensor:
    """Sum (weighted by scores) the `rows` (rows, hidden) at `place` (tokens, top_k) -> (tokens, hidden)."""
    return F.embedding_bag(place, rows, mode="sum", per_sample_weights=scores)


class _SortedExperts(torch.autograd.Function):
    """sum_k score_k down_k(act(up_k(x))) over the experts of each token, one expert at a time.

    Weights are (experts, out, in), biases (experts, out) or None.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,  # (tokens, hidden), in the dtype of the products
        scores: Tensor,  # (tokens, top_k), in the same dtype
        up: Tensor,
        up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        routing: Routing,
        activation: Activation,
    ) -> Tensor:
        kept: list[tuple[Tensor, ...]] = [()] * len(routing.spans)  # what the activation's backward needs, of each
        rows = hidden.new_empty(len(routing.pair), hidden.shape[1])  # (rows, hidden)
        outer = hidden.new_empty(len(routing.pair), down.shape[1])  # (rows, hidden)
        cast_up, cast_down = _Cast(up, hidden.dtype), _Cast(down, hidden.dtype)

        def work(index: int) -> None:
            expert, start, stop = routing.spans[index]
            x = torch.index_select(hidden, 0, routing.token[start:stop], out=rows[start:stop])
            after, kept[index] = activation.forward(_affine(x, cast_up.read(expert), up_bias, expert))  # (rows, width)
            _affine(after, cast_down.read(expert), down_bias, expert, out=outer[start:stop])

        for_each_expert(work, routing.spans, down.shape[1:])
        _zero_rows_of_other_ranks(outer, routing)
        ctx.save_for_backward(rows, scores, up, up_bias, down, down_bias, outer, *chain.from_iterable(kept))
        ctx.routing, ctx.activation = routing, activation
        return combine(outer, routing.place, scores)

    @staticmethod
    @first_order
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, scores, up, up_bias, down, down_bias, outer, *kept = ctx.saved_tensors  # x (rows, hidden)
        routing: Routing = ctx.routing
        row_scores = (scores.reshape(-1)[routing.pair] * routing.real).unsqueeze(1)  # (rows, 1)
        grad_scores = scores.new_zeros(len(routing.pair))
        grad_rows = torch.empty_like(x)
        weights = zip((up, up_bias, down, down_bias), ctx.needs_input_grad[2:6], strict=True)
        grads = [_gradient(weight) if needed else None for weight, needed in weights]
        grad_up, grad_up_bias, grad_down, grad_down_bias = grads
        _zero_idle_experts(grads, routing, len(up))
        cast_up, cast_down = _Cast(up, x.dtype), _Cast(down, x.dtype)
        each = len(kept) // max(1, len(routing.spans))

        def work(index: int) -> None:
            expert, start, stop = routing.spans[index]
            rows = slice(start, stop)
            grad = grad_output.index_select(0, routing.token[rows]).to(x.dtype)  # (rows, hidden)
            grad_scores[rows] = torch.linalg.vecdot(grad, outer[rows])
            grad.mul_(row_scores[rows])
            grad_after = linear(grad, cast_down.read(expert).t())  # (rows, width)
            after, grad_inner = ctx.activation.backward(grad_after, *kept[index * each : (index + 1) * each])
            _write_gradients(grad, after, grad_down, grad_down_bias, expert, cast_down)
            linear(grad_inner, cast_up.read(expert).t(), out=grad_rows[rows])
            _write_gradients(grad_inner, x[rows], grad_up, grad_up_bias, expert, cast_up)

        for_each_expert(work, routing.spans, down.shape[1:])
        _zero_rows_of_other_ranks(grad_rows, routing)
        return combine(grad_rows, routing.place), grad_scores[routing.place], *grads, None, None


def for_each_expert(work: Callable[[int], None], spans: list[tuple[int, int, int]], matrix: torch.Size) -> None:
    """Work on the index of each span, the longest first, on workers that share the threads.

    One span after the other has all threads if products with a `matrix` (out, in) of each are small, or if one is so
    long that the other workers would wait for it half of the time that theirs take.
    """
    rows = [stop - start for _, start, stop in spans]
    threads = torch.get_num_threads()
    workers = max(1, min(threads, len(spans)))
    even = max(rows, default=0) <= 1.5 * sum(rows) / workers
    pays = even and workers_pay(sum(rows) * matrix.numel() // max(1, len(spans)))
    order = sorted(range(len(spans)), key=rows.__getitem__, reverse=True)
    run_on_workers(work, order, threads // workers if pays else threads)


class _Cast(threading.local):
    """One expert's matrix at a time in the dtype of the products, in a buffer that stays in the cache.

    Each thread has a buffer of its own: `threading.local` calls `__init__` again in each that uses the object.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight = weight
        self.buffer = None if weight.dtype == dtype else weight.new_empty(weight.shape[1:], dtype=dtype)

    def read(self, expert: int) -> Tensor:
        """The expert's matrix (out, in), until the next call."""
        return self.weight[expert] if self.buffer is None else self.buffer.copy_(self.weight[expert])

    def write_product(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """out = a b, through the buffer where out has another dtype."""
        if self.buffer is None:
            torch.mm(a, b, out=out)
        else:
            out.copy_(torch.mm(a, b, out=self.buffer))


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, expert: int, out: Tensor | None = None) -> Tensor:
    """x weight^T + bias[expert]; weight (out, in) in the dtype of x."""
    output = linear(x, weight, out)
    return output if bias is None else output.add_(bias[expert])


def _write_gradients(
    grad: Tensor, x: Tensor, grad_weight: Tensor | None, grad_bias: Tensor | None, expert: int, cast: _Cast
) -> None:
    """Write the gradients of one expert's affine map, from grad (rows, out) and its input x (rows, in)."""
    if grad_weight is not None:
        cast.write_product(grad.t(), x, out=grad_weight[expert])
    if grad_bias is not None:
        grad_bias[expert] = grad.sum(dim=0)


def _gradient(weight: Tensor) -> Tensor:
    """Memory for the gradient of a weight, transposed if the weight is."""
    if weight.is_contiguous():
        return large_empty(weight, weight.shape, weight.dtype)
    return torch.empty_like(weight)


def _zero_rows_of_other_ranks(rows: Tensor, routing: Routing) -> None:
    """Clear the rows (rows, hidden) after those of the experts here."""
    rows[routing.spans[-1][2] if routing.spans else 0 :].zero_()


def _zero_idle_experts(grads: list[Tensor | None], routing: Routing, num_experts: int) -> None:
    """Clear the gradients of the experts that no token visited; the others are written later."""
    for expert in set(range(num_experts)) - {row[0] for row in routing.spans}:
        for grad in grads:
            if grad is not None:
                grad[expert].zero_()


def experts_of_one_token(
    hidden: Tensor,  # (1, hidden), in the dtype of the products
    scores: Tensor,  # (1, top_k), in the same dtype
    up: Tensor,  # weights and biases as in `_SortedExperts`
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    top_k_index: Tensor,  # (1, top_k)
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """The same sum where there is nothing to sort, outside autograd: a step of decoding."""
    output = torch.zeros_like(hidden)
    cast_up, cast_down = _Cast(up, hidden.dtype), _Cast(down, hidden.dtype)
    with products_of_few_rows(hidden):
        for expert, score in zip(top_k_index[0].tolist(), scores[0].unbind(), strict=True):
            if expert < len(up):  # else it lives on another rank
                inner = activation(_affine(hidden, cast_up.read(expert), up_bias, expert))
                output.addcmul_(_affine(inner, cast_down.read(expert), down_bias, expert), score)
    return output


def can_use_grouped_mm(up: Tensor, down: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch has a grouped product of these, which spares a loop in Python.

    It wants weights in the dtype of the products, and rows of a multiple of 16 bytes.
    """
    aligned = all(size * up.element_size() % 16 == 0 for size in (*up.shape[1:], *down.shape[1:]))
    return aligned and up.dtype == dtype != torch.float64


def rows_of_an_expert(top_k_index: Tensor, num_experts: int) -> float:
    """How many rows each chosen expert gets, on average; not counted where that is no question of a few."""
    pairs = top_k_index.numel()
    chosen = len(top_k_index.unique()) if pairs <= FEW_ROWS * num_experts else num_experts
    return pairs / max(1, chosen)


def blueberry_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Experts on hidden_states (tokens, hidden), routed by top_k_index and top_k_weights (tokens, top_k)."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # which would keep the experts of one input
    if traced or hidden_states.device.type != "cpu" or self.has_post_expert_norm:
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    dtype, training, tokens = compute_dtype(hidden_states), torch.is_grad_enabled(), len(hidden_states)
    up, up_bias, down, down_bias = weights_and_biases(self)
    if training and not can_activate_twice(self):
        by_grouped_mm = can_use_grouped_mm(up, down, dtype)
        usual = grouped_mm_experts_forward if by_grouped_mm else batched_mm_experts_forward
        return usual(self, hidden_states, top_k_index, top_k_weights)
    few = not training and tokens <= FEW
    by_onednn = dtype == torch.float32 and has_onednn_linear()
    if few and tokens != 1 and not by_onednn and can_use_grouped_mm(up, down, dtype):
        with products_of_few_rows(hidden_states, rows_of_an_expert(top_k_index, self.num_experts)):
            return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    inputs = hidden_states.to(dtype), top_k_weights.to(dtype), up, up_bias, down, down_bias
    with without_autocast(hidden_states.device.type):
        if tokens == 1 and not training:
            activation = self._apply_gate if self.has_gate else self.act_fn
            output = experts_of_one_token(*inputs, top_k_index, activation)
        else:
            block = 1 if few or dtype == torch.float64 else BLOCK
            routing = sort_by_expert(top_k_index, self.num_experts, block)
            output = _SortedExperts.apply(*inputs, routing, activation_of(self, training))
    return output.to(hidden_states.dtype)


def weights_and_biases(experts: nn.Module) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Up and down projection of an experts module of transformers, each (experts, out, in) and then its bias."""
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    up, down = getattr(experts, name), experts.down_proj
    if experts.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    biases = (getattr(experts, f"{name}_bias"), experts.down_proj_bias) if experts.has_bias else (None, None)
    return up, biases[0], down, biases[1]


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, blueberry_experts_forward)
