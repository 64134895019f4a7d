"""RouterMetricsCallback: how evenly a mixture of experts uses its experts, layer by layer."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils.output_capturing import OutputRecorder

from blueberry.errors import UsageError
from blueberry.spectral.names import matrix_name

from .heatmap import heatmap
from .tensorboard import Charts, TensorBoardCallback, first_middle_last

SCALARS = ("load_imbalance", "router_entropy", "dead_experts")


class RouterMetricsCallback(TrainerCallback):
    """`tokens_per_expert`, `load_imbalance`, `router_entropy` and `dead_experts` of each layer, while training.

    Works for every transformers model that records `router_logits`. Counted are the training tokens of this rank
    (padding included) since the last log of the Trainer. `latest` maps a layer to its numbers at that log:

    - `tokens_per_expert`: list of the shares of routed tokens, sum 1;
    - `load_imbalance`: largest over mean share, 1 is perfect balance;
    - `router_entropy`: mean entropy of a token's routing probabilities over log(num_experts), in [0, 1];
    - `dead_experts`: how many experts got no token.

    With `tensorboard`, scalars go to `<name>/layer_<nn>` and the shares to a layer x expert image, `router/load`.
    Raises UsageError before training for a model that routes nothing.
    """

    def __init__(self, tensorboard: TensorBoardCallback | None = None):
        self.tensorboard = tensorboard
        self.latest: dict[int, dict[str, Any]] = {}
        self._sums: dict[int, tuple[Tensor, Tensor, int]] = {}  # counts (E,), entropy (), tokens

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Hook the modules that the model records its router logits from."""
        config = model.config.get_text_config()
        self._top_k = getattr(config, "num_experts_per_tok", None)
        modules = list(router_modules(model))
        if not modules or not self._top_k or getattr(config, "num_experts", None) == 0:
            raise UsageError("the model records no router_logits: it has no routers to watch; drop the callback")
        self._hooks = [
            module.register_forward_hook(partial(self._record, layer, index)) for layer, module, index in modules
        ]
        if self.tensorboard is not None and state.is_world_process_zero:
            self.tensorboard.writer(args, state).add_charts(_charts(layer for layer, _, _ in modules))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Turn what was counted into numbers, show them, and count anew."""
        if not self._sums:
            return
        self.latest = {layer: _numbers(*sums) for layer, sums in sorted(self._sums.items())}
        self._sums = {}
        if self.tensorboard is not None and state.is_world_process_zero:
            self._show(self.tensorboard.writer(args, state), state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the hooks off again."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _record(self, layer: int, index: int, module: nn.Module, inputs: tuple, output: tuple) -> None:
        """Add up one forward pass; stays on the device, waits for nothing."""
        if not module.training or output[index] is None:  # None: a dense layer among sparse ones
            return
        logits = output[index].detach().flatten(0, -2).float()  # (tokens, E)
        probabilities = logits.softmax(-1)
        chosen = _chosen(output, logits, self._top_k)  # (tokens, k)
        counts = torch.zeros(logits.shape[-1], device=logits.device)
        counts.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen.flatten(), dtype=counts.dtype))
        entropy = torch.special.entr(probabilities).sum()
        if layer in self._sums:
            earlier_counts, earlier_entropy, tokens = self._sums[layer]
            self._sums[layer] = (earlier_counts + counts, earlier_entropy + entropy, tokens + len(logits))
        else:
            self._sums[layer] = (counts, entropy, len(logits))

    def _show(self, writer: Any, step: int) -> None:
        for layer, numbers in self.latest.items():
            for name in SCALARS:
                writer.add_scalar(f"{name}/layer_{layer:02d}", numbers[name], step)
        shares = np.array([numbers["tokens_per_expert"] for numbers in self.latest.values()])
        experts = list(range(shares.shape[1]))
        blocks = {f"layer {layer}": row[None] for layer, row in zip(self.latest, shares, strict=True)}
        image = heatmap("share of tokens per expert", blocks, experts, across="expert")
        writer.add_image("router/load", image, step, dataformats="HWC")
        writer.flush()  # a checkpoint may follow


def _charts(layers: Iterable[int]) -> Charts:
    shown = "|".join(f"{layer:02d}" for layer in first_middle_last(layers))
    return {"router": {name: ["Multiline", [rf"^{name}/layer_({shown})$"]] for name in SCALARS}}


def router_modules(model: nn.Module) -> Iterator[tuple[int, nn.Module, int]]:
    """(layer, module, index of the logits in its output) of all routers, as the model itself declares them."""
    backbones = (module for module in model.modules() if isinstance(module, PreTrainedModel) and _recorders(module))
    backbone = next(backbones, None)
    for recorder in _recorders(backbone) if backbone else ():
        for name, module in backbone.named_modules():
            if isinstance(module, recorder.target_class):
                yield matrix_name(name + ".weight").layer or 0, module, recorder.index


def _recorders(model: PreTrainedModel) -> list[OutputRecorder]:
    declared = (model._can_record_outputs or {}).get("router_logits", [])
    return [r for r in (declared if isinstance(declared, list) else [declared]) if isinstance(r, OutputRecorder)]


def _chosen(output: tuple, logits: Tensor, top_k: int) -> Tensor:
    """Experts (tokens, k) that a router returned, or the top k by logits where the module returns none."""
    indices = [
        x for x in output if isinstance(x, Tensor) and x.dtype == torch.int64 and x.shape == (len(logits), top_k)
    ]
    return indices[-1] if indices else logits.topk(top_k, dim=-1).indices


def _numbers(counts: Tensor, entropy: Tensor, tokens: int) -> dict[str, Any]:
    shares = counts / counts.sum()
    return {
        "tokens_per_expert": shares.tolist(),
        "load_imbalance": (shares.max() / shares.mean()).item(),
        "router_entropy": entropy.item() / tokens / np.log(len(counts)),
        "dead_experts": int((counts == 0).sum()),
    }
