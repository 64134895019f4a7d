"""The loss of the head without the logits, and the losses of the router.

Router losses are taken per sequence, so that they do not depend on how a global batch is split. The file ships to the
Hub as remote code, so it imports torch only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 512  # tokens whose logits exist at once on the CPU; measured fastest of 128 to 1024


def can_fuse_head(hidden: Tensor, head: nn.Module) -> bool:
    """Whether `head_cross_entropy` is exact here: a plain linear head, tensors of one full-precision dtype."""
    if type(head) is not nn.Linear or head.bias is not None or type(hidden) is not Tensor:
        return False
    exact = hidden.dtype == head.weight.dtype and hidden.dtype in (torch.float32, torch.float64)
    return exact and not torch.is_autocast_enabled(hidden.device.type) and not torch.compiler.is_compiling()


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

    The mean over counted labels, or their sum divided by `num_items_in_batch` if that is given.
    """
    targets = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
    targets = targets.to(hidden.device).flatten()
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK if hidden.device.type == "cpu" else None)
    total = F.linear_cross_entropy(
        hidden.flatten(0, 1), weight, targets, reduction="sum", ignore_index=ignore_index, options=options
    )
    count = targets.ne(ignore_index).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return total / count


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
