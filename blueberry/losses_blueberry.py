"""The loss of the head without the logits, and the losses of the router.

Router losses are taken per sequence, so that they do not depend on how a global batch is split. The file ships to the
Hub as remote code, so it imports torch and its siblings only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from .first_order_blueberry import first_order
from .memory_blueberry import large_empty
from .products_blueberry import has_hooks, linear, product_dtype, without_autocast

CPU_CHUNK, CHUNK = 1024, 4096  # tokens whose logits exist at once
CACHED = 2**19  # probabilities in fp32 at once on the CPU: 2 MiB, measured fastest of 2**17 to 2**22


def can_fuse_head(hidden: Tensor, head: nn.Module) -> bool:
    """Whether `head_cross_entropy` is the same here as the loss of the head's logits: a plain linear head."""
    if type(head) is not nn.Linear or head.bias is not None or type(hidden) is not Tensor:
        return False
    if "forward" in vars(head) or has_hooks(head):
        return False  # what a user has it do besides
    if type(head.weight) is not nn.Parameter or head.weight.device != hidden.device:
        return False  # sharded or offloaded: only the head's own forward fetches its weight
    same_dtype = hidden.dtype == head.weight.dtype or torch.is_autocast_enabled(hidden.device.type)
    return same_dtype and not torch.compiler.is_compiling()


def can_fuse_loss(logits: Tensor) -> bool:
    """Whether `logits_cross_entropy` may stand in for transformers' loss, which is in fp32: training in eager mode."""
    plain = type(logits) is Tensor and logits.dtype != torch.float64 and not torch.compiler.is_compiling()
    return plain and logits.requires_grad


def head_cross_entropy(
    hidden: Tensor,  # (batch, seq, hidden)
    weight: Tensor,  # (vocab, hidden)
    labels: Tensor | None = None,  # (batch, seq), shifted here
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,  # (batch, seq), shifted already
    ignore_index: int = -100,
    **kwargs,
) -> Tensor:
    """Cross-entropy of the next token, from hidden states, with the logits of a few tokens at a time.

    The mean over counted labels, or their sum divided by `num_items_in_batch` if that is given. Products are in
    autocast's dtype where it is on; the loss is in fp32 at least.
    """
    targets = next_tokens(labels, shift_labels, ignore_index).to(hidden.device)
    dtype = product_dtype(hidden)
    with without_autocast(hidden.device.type):
        total = _HeadCrossEntropy.apply(hidden.flatten(0, 1).to(dtype), weight, targets, ignore_index)
    return mean_of(total, targets, num_items_in_batch, ignore_index)


def logits_cross_entropy(
    logits: Tensor,  # (batch, seq, vocab)
    labels: Tensor | None = None,
    vocab_size: int | None = None,  # that of the logits; transformers' losses get it
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs,
) -> Tensor:
    """The same loss from the logits, in fewer passes over them than autograd's; see `head_cross_entropy`."""
    targets = next_tokens(labels, shift_labels, ignore_index).to(logits.device)
    total = _CrossEntropy.apply(logits.flatten(0, 1), targets, ignore_index)
    return mean_of(total, targets, num_items_in_batch, ignore_index)


def next_tokens(labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int) -> Tensor:
    """The target of every position (batch * seq,): the label after it, unless the labels are shifted already."""
    return (F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels).flatten()


def mean_of(total: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None, ignore_index: int) -> Tensor:
    """The sum of losses divided by the number of items; as in torch, the mean of none is NaN and its gradient 0."""
    if num_items_in_batch is not None:
        return total / num_items_in_batch
    counted = targets.ne(ignore_index).sum()
    return (total / counted.clamp(min=1)).masked_fill(counted == 0, torch.nan)


class _CrossEntropy(torch.autograd.Function):
    """The sum of cross-entropies of logits; their gradient is computed in the forward."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        """logits (tokens, vocab), targets (tokens,) -> ()."""
        counted = targets.ne(ignore_index).unsqueeze(1)
        gradient = logits.clone()
        losses = softmax_minus_onehot_(gradient, targets.unsqueeze(1).where(counted, 0))
        gradient.masked_fill_(~counted, 0)
        ctx.save_for_backward(gradient)
        return losses.masked_fill_(~counted, 0).sum()

    @staticmethod
    @first_order
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(gradient.dtype), None, None


class _HeadCrossEntropy(torch.autograd.Function):
    """The sum of cross-entropies over counted targets. The forward computes the gradients of this sum as well.

    With p = softmax(W h): dh = W^T (p - onehot) and dW = sum (p - onehot) h^T.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        """hidden (tokens, hidden) in the dtype of the products, weight (vocab, hidden), targets (tokens,) -> ()."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        counted = targets.ne(ignore_index)
        targets = targets.where(counted, 0).unsqueeze(1)
        matrix = weight
        if weight.dtype != hidden.dtype:
            matrix = large_empty(weight, weight.shape, hidden.dtype).copy_(weight)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = large_empty(weight, weight.shape, wide).zero_() if ctx.needs_input_grad[1] else None
        chunk = CPU_CHUNK if hidden.device.type == "cpu" else CHUNK
        longest = min(chunk, 2 ** (len(hidden) - 1).bit_length())  # few sizes, because memory of each is kept
        buffer = large_empty(weight, (longest, len(weight)), hidden.dtype)
        product = None
        if grad_weight is not None and wide != hidden.dtype:
            product = large_empty(weight, weight.shape, hidden.dtype)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            x, mask = hidden[rows], counted[rows].unsqueeze(1)
            logits = linear(x, matrix, out=buffer[: len(x)])  # (chunk, vocab)
            total += softmax_minus_onehot_(logits, targets[rows]).masked_fill_(~mask, 0).sum()
            if grad_hidden is not None:
                grad_hidden[rows] = linear(logits, matrix.t()).mul_(mask)
            if grad_weight is not None:
                add_product_(grad_weight, logits.t(), x * mask, product)
        ctx.save_for_backward(grad_hidden, grad_weight, weight)
        return total

    @staticmethod
    @first_order
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight, weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = torch.mul(grad_weight, grad, out=large_empty(weight, weight.shape, grad_weight.dtype))
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def softmax_minus_onehot_(logits: Tensor, targets: Tensor) -> Tensor:
    """Make logits (tokens, vocab) softmax(logits) - onehot(targets); return the losses (tokens, 1), in fp32 at least.

    The logarithm of the softmax's denominator is taken at the largest probability, which cannot underflow.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = torch.empty(targets.shape, dtype=wide, device=logits.device)
    step = max(1, CACHED // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
    for start in range(0, len(logits), step):
        part, index = logits[start : start + step], targets[start : start + step]
        normalizer, target = part.amax(dim=1, keepdim=True).to(wide), part.gather(1, index).to(wide)
        in_place = part if part.dtype == wide and part.device.type == "cpu" else None
        probabilities = torch.softmax(part, dim=1, dtype=wide, out=in_place)
        normalizer -= probabilities.amax(dim=1, keepdim=True).log()
        losses[start : start + step] = normalizer - target
        part.copy_(probabilities.scatter_add_(1, index, -torch.ones_like(target)))
    return losses


def add_product_(total: Tensor, a: Tensor, b: Tensor, buffer: Tensor | None) -> None:
    """total += a b, in place; through the buffer where the precision of total is wider than that of a and b."""
    if buffer is None:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b, out=buffer)


def load_balancing_loss(router_logits: Tensor, token_mask: Tensor, top_k: int) -> Tensor:
    """The loss E sum_e f_e P_e of each sequence, averaged over layers; one when the experts are evenly loaded.

    f_e is the share of the sequence's routed tokens that went to expert e and P_e its mean router probability
    (https://arxiv.org/abs/2101.03961, equation 4, with top-k counts divided by k). Taken per sequence, because a
    product of batch means could not be split over micro-batches or ranks.

    router_logits (layers, batch, seq, experts); token_mask (batch, seq), False for padding -> (batch,).
    """
    mask = token_mask[None, :, :, None]  # (1, batch, seq, 1)
    tokens = mask.sum(dim=-2).clamp(min=1)  # (1, batch, 1)
    probabilities = router_logits.softmax(dim=-1)
    chosen = torch.zeros_like(probabilities).scatter_(-1, probabilities.topk(top_k, dim=-1).indices, 1.0)
    share = torch.where(mask, chosen, 0.0).sum(dim=-2) / (tokens * top_k)  # (layers, batch, experts)
    mean_probability = torch.where(mask, probabilities, 0.0).sum(dim=-2) / tokens
    return router_logits.shape[-1] * (share * mean_probability).sum(dim=-1).mean(dim=0)


def router_z_loss(router_logits: Tensor, token_mask: Tensor) -> Tensor:
    """The mean of logsumexp(logits)^2 over the tokens of each sequence and over layers.

    From https://arxiv.org/abs/2202.08906, equation 5. router_logits (layers, batch, seq, experts); token_mask
    (batch, seq), False for padding -> (batch,).
    """
    squares = torch.where(token_mask, router_logits.logsumexp(dim=-1).square(), 0.0)  # (layers, batch, seq)
    return (squares.sum(dim=-1) / token_mask.sum(dim=-1).clamp(min=1)).mean(dim=0)


def sequence_weights(
    shape: tuple[int, int],
    attention_mask: Tensor | None,
    labels: Tensor | None,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """What each sequence contributes to a loss of the whole batch (batch,), and its real tokens (batch, seq).

    The cross-entropy is summed over counted labels and divided by `num_items_in_batch`, the count of the *global*
    batch. A sequence contributes its share of that count; a per-sequence loss weighted in this way does not depend on
    how the batch is split over accumulation steps and ranks. Without labels every real token counts.

    `shape` is (batch, seq); an attention mask (batch, past + seq) marks padding, any other says nothing about it.
    """
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        token_mask = attention_mask[:, -shape[1] :].bool()
    else:
        targets = labels if labels is not None else shift_labels
        token_mask = torch.ones(shape, dtype=torch.bool, device=None if targets is None else targets.device)
    if shift_labels is None and labels is None:
        counts = token_mask.sum(dim=-1)
    else:
        targets = labels[..., 1:] if shift_labels is None else shift_labels
        counts = targets.reshape(shape[0], -1).ne(ignore_index).sum(dim=-1)
    if num_items_in_batch is None:
        num_items_in_batch = counts.sum().clamp(min=1)
    return counts / torch.as_tensor(num_items_in_batch, device=counts.device), token_mask


def router_losses(
    router_logits: tuple[Tensor, ...], weights: Tensor, token_mask: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """The load-balancing loss and the z-loss of a batch, without their coefficients; scalars.

    router_logits: one (batch * seq, experts) per layer; weights and token_mask as from `sequence_weights`.
    """
    device = router_logits[0].device
    weights, token_mask = weights.to(device), token_mask.to(device)
    logits = torch.stack([layer.to(device) for layer in router_logits]).unflatten(1, token_mask.shape)
    balance = (load_balancing_loss(logits, token_mask, top_k) * weights).sum()
    return balance, (router_z_loss(logits, token_mask) * weights).sum()
