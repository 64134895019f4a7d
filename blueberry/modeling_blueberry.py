"""Blueberry language models: decoder-only transformers, dense or mixture-of-experts.

Pre-norm blocks with grouped-query attention, rotary positions (https://arxiv.org/abs/2104.09864), RMS-normalized
queries and keys (https://arxiv.org/abs/2302.05442), embeddings scaled by sqrt(hidden_size), and per layer either one
squared-ReLU MLP (https://arxiv.org/abs/2109.08668) or top-k routed experts.

The file ships to the Hub as remote code, so it imports torch, transformers and its own siblings only.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin, LogitsProcessorList
from transformers.integrations import use_experts_implementation
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_blueberry import can_attend_in_blocks, causal_attention
from .configuration_blueberry import BlueberryConfig
from .experts_blueberry import EXPERTS_IMPLEMENTATION
from .inputs_blueberry import RefuseNaN, check_input, check_labels
from .linear_blueberry import BlueberryLinear, BlueberryResidualLinear
from .losses_blueberry import (
    can_fuse_head,
    can_fuse_loss,
    head_cross_entropy,
    logits_cross_entropy,
    router_losses,
    sequence_weights,
)
from .norm_blueberry import BlueberryHeadRMSNorm, BlueberryRMSNorm, Rotation
from .products_blueberry import products_of_few_rows, without_autocast
from .rotary_blueberry import BlueberryRotaryEmbedding
from .upcycling_blueberry import upcycled_config, upcycled_weights


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,  # (batch, heads, seq, head_dim)
    key: Tensor,  # (batch, kv_heads, kv_seq, head_dim)
    value: Tensor,
    attention_mask: Tensor | None,  # additive, (batch, 1, seq, kv_seq)
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention written out: returns the output (batch, seq, heads, head_dim) and the weights."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    softmax_dtype = torch.promote_types(query.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=softmax_dtype).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class BlueberryAttention(nn.Module):
    """Causal grouped-query self-attention with rotary positions and normalized queries and keys."""

    def __init__(self, config: BlueberryConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        query_size = config.num_attention_heads * self.head_dim
        key_size = config.num_key_value_heads * self.head_dim
        self.q_proj = BlueberryLinear(config.hidden_size, query_size, bias=False)
        self.k_proj = BlueberryLinear(config.hidden_size, key_size, bias=False)
        self.v_proj = BlueberryLinear(config.hidden_size, key_size, bias=False)
        self.o_proj = BlueberryResidualLinear(query_size, config.hidden_size, bias=False)
        norm = partial(BlueberryHeadRMSNorm, self.head_dim, config.rms_norm_eps) if config.use_qk_norm else Rotation
        self.q_norm, self.k_norm = norm(), norm()

    def forward(
        self,
        hidden_states: Tensor,  # (batch, seq, hidden)
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output (batch, seq, hidden) and, from eager attention, the weights."""
        heads = (-1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).unflatten(-1, heads), *position_embeddings)
        key = self.k_norm(self.k_proj(hidden_states).unflatten(-1, heads), *position_embeddings)
        value = self.v_proj(hidden_states).unflatten(-1, heads).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        name, dropout = self.config._attn_implementation, self.attention_dropout if self.training else 0.0
        if name == "sdpa" and self._is_causal(**kwargs) and can_attend_in_blocks(query, key, attention_mask, dropout):
            return self.o_proj(causal_attention(query, key, value, self.scaling).flatten(2)), None
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        kwargs |= {"dropout": dropout, "scaling": self.scaling}
        output, weights = attend(self, query, key, value, attention_mask, **kwargs)
        return self.o_proj(output.flatten(2)), weights

    def _is_causal(self, is_causal: bool | None = None, **kwargs) -> bool:
        """Whether positions see only their past: unless the call, this layer or the configuration says otherwise."""
        return is_causal if is_causal is not None else self.is_causal and getattr(self.config, "is_causal", True)


class BlueberryMLP(nn.Module):
    """The dense feed-forward network down(act(up(x)))."""

    def __init__(self, config: BlueberryConfig) -> None:
        super().__init__()
        self.up_proj = BlueberryLinear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = BlueberryResidualLinear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        """(batch, seq, hidden) -> the same, and no router logits."""
        return self.down_proj(self.act_fn(self.up_proj(hidden_states))), None


class BlueberryTopKRouter(nn.Module):
    """Sends each token to the `num_experts_per_tok` experts of largest probability."""

    def __init__(self, config: BlueberryConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.noise = config.router_noise
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states (tokens, hidden) -> logits (tokens, experts), weights and experts chosen (tokens, top_k).

        Logits are computed in fp32 at least and include the noise of training; weights are in the dtype of
        `hidden_states`, the largest first.
        """
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        with without_autocast(hidden_states.device.type):
            logits = F.linear(hidden_states.to(dtype), self.weight.to(dtype))
        if self.training and self.noise > 0:
            logits = logits + self.noise * torch.randn_like(logits)
        weights, experts = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights.to(hidden_states.dtype), experts


class _Experts(nn.Module):
    """What gated and ungated experts share: the stacked weights and the plain loop over experts."""

    def __init__(self, config: BlueberryConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = hidden = config.hidden_size
        self.intermediate_dim = width = config.moe_intermediate_size
        if config.gated_experts:
            self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, hidden))
        else:
            self.up_proj = nn.Parameter(torch.empty(self.num_experts, width, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (tokens, hidden); top_k_index and top_k_weights (tokens, top_k) -> (tokens, hidden)."""
        output = torch.zeros_like(hidden_states)
        up_proj = self.gate_up_proj if self.has_gate else self.up_proj
        activation = self._apply_gate if self.has_gate else self.act_fn
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            inner = activation(F.linear(hidden_states[token], up_proj[expert]))
            outer = F.linear(inner, self.down_proj[expert]) * top_k_weights[token, slot, None]
            output.index_add_(0, token, outer.to(output.dtype))
        return output


@use_experts_implementation(has_gate=False)
class BlueberryExperts(_Experts):
    """Experts down(act(up(x))): `up_proj` (experts, width, hidden) and `down_proj` (experts, hidden, width)."""


@use_experts_implementation
class BlueberryGatedExperts(_Experts):
    """Experts down(act(gate(x)) * up(x)), with gate and up stacked in `gate_up_proj` (experts, 2 width, hidden)."""


class BlueberrySparseMoeBlock(nn.Module):
    """The feed-forward network of a mixture-of-experts layer: a router and its experts."""

    def __init__(self, config: BlueberryConfig) -> None:
        super().__init__()
        self.gate = BlueberryTopKRouter(config)
        self.experts = (BlueberryGatedExperts if config.gated_experts else BlueberryExperts)(config)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, seq, hidden) -> the same, and the router logits (batch * seq, experts)."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        router_logits, weights, experts = self.gate(tokens)
        return self.experts(tokens, experts, weights).view_as(hidden_states), router_logits


class BlueberryDecoderLayer(GradientCheckpointingLayer):
    """Attention, then the feed-forward network, each on a normalized copy of the residual stream."""

    def __init__(self, config: BlueberryConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = BlueberryAttention(config, layer_idx)
        self.mlp = (BlueberrySparseMoeBlock if config.num_experts else BlueberryMLP)(config)
        self.input_layernorm = BlueberryRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = BlueberryRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Return the new hidden_states (batch, seq, hidden) and the router logits (batch * seq, experts) or None.

        Router logits leave through the return value because a gradient must reach them also when the layer is
        checkpointed with `use_reentrant=True`, where only what is returned has one.
        """
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        output, router_logits = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + output, router_logits


class BlueberryPreTrainedModel(PreTrainedModel):
    """Initialization, and what Blueberry models can do."""

    config: BlueberryConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("BlueberryDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012 (transformers' own annotation)
        "router_logits": OutputRecorder(BlueberryDecoderLayer, index=1),
        "hidden_states": OutputRecorder(BlueberryDecoderLayer, index=0),
        "attentions": OutputRecorder(BlueberryAttention, index=1),
    }

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The experts implementation asked for, ours by default (transformers' own default is "grouped_mm")."""
        return super().get_correct_experts_implementation(requested_experts or EXPERTS_IMPLEMENTATION)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal of `initializer_range`, but smaller by sqrt(2 layers) what writes to the residual stream (GPT-2).

        Embeddings are at most 4 / hidden_size: at the start a token's own logit through the tied head is about
        hidden_size * std, and a larger one would lift the first loss above log(vocab_size).
        """
        std = self.config.initializer_range
        residual_std = std / (2 * self.config.num_hidden_layers) ** 0.5
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=min(std, 4 / self.config.hidden_size))
        elif isinstance(module, BlueberryResidualLinear):
            init.normal_(module.weight, std=residual_std)
        elif isinstance(module, BlueberryTopKRouter):
            init.normal_(module.weight, std=std)
        elif isinstance(module, _Experts):
            init.normal_(module.gate_up_proj if module.has_gate else module.up_proj, std=std)
            init.normal_(module.down_proj, std=residual_std)
        else:
            super()._init_weights(module)


class BlueberryModel(BlueberryPreTrainedModel):
    """The transformer without a head."""

    def __init__(self, config: BlueberryConfig) -> None:
        super().__init__(config)
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(BlueberryDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = BlueberryRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = BlueberryRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,  # (batch, seq)
        attention_mask: Tensor | None = None,  # (batch, past + seq), 1 for tokens and 0 for padding
        position_ids: Tensor | None = None,  # (batch, seq)
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,  # (batch, seq, hidden), not yet scaled
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        """Return `last_hidden_state` (batch, seq, hidden), the cache, and what `output_*` arguments ask for.

        Raises ValueError for bad input: see `check_input`.
        """
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        vocab_size, max_positions = self.embed_tokens.num_embeddings, self.config.max_position_embeddings
        check_input(input_ids, inputs_embeds, attention_mask, past, vocab_size, max_positions)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )

        hidden_states = inputs_embeds * self.config.hidden_size**0.5
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        with products_of_few_rows(hidden_states):
            for layer in self.layers[: self.config.num_hidden_layers]:
                hidden_states, _ = layer(
                    hidden_states,
                    attention_mask=causal_mask,
                    position_ids=position_ids,
                    past_key_values=past_key_values,
                    position_embeddings=position_embeddings,
                    **kwargs,
                )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class BlueberryForCausalLM(BlueberryPreTrainedModel, GenerationMixin):
    """Blueberry with a language-modeling head, tied to the embeddings by default."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: BlueberryConfig) -> None:
        super().__init__(config)
        self.model = BlueberryModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_dense(
        cls, model: Self, num_experts: int, num_experts_per_tok: int = 2, noise: float = 0.0, **options: Any
    ) -> Self:
        """Upcycle a dense model: a mixture of experts with its outputs, device, dtype and mode. The dense one stays.

        Every expert is a copy of the layer's feed-forward network, with its width and activation, and the weights of a
        token's experts add up to one (`norm_topk_prob=True`); routers are drawn as in a new model. Equal experts part
        because they see different tokens, but until then only the router losses move the routers. `noise` parts them
        at once: Gaussian noise on each expert's matrices, of `noise` times their standard deviation, changes the
        outputs in proportion. `options` are `router_*` fields of the config.

        Raises ValueError unless `model` is a dense Blueberry.
        """
        if not isinstance(model, BlueberryForCausalLM):
            raise ValueError(f"model is a {type(model).__name__}: give a dense BlueberryForCausalLM, adapters merged")
        config = upcycled_config(model.config, num_experts, num_experts_per_tok, **options)
        result = cls(config).to(model.device, model.dtype)
        routers = {name: weight for name, weight in result.state_dict().items() if ".mlp.gate." in name}
        result.load_state_dict(upcycled_weights(model.state_dict(), num_experts, noise) | routers)
        result.generation_config = copy.deepcopy(model.generation_config)
        return result.train(model.training)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """transformers' own, and one that refuses NaN, for `generate` and `generate_batch`."""
        return LogitsProcessorList([*super()._get_logits_processor(*args, **kwargs), RefuseNaN()])

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,  # (batch, seq), -100 where no loss is wanted; shifted inside
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        """Return logits (batch, seq, vocab) and, given `labels`, the loss.

        With `skip_logits` and `labels` the loss may be computed without ever holding all logits, which then are None.

        The loss is the mean cross-entropy of the next token (the sum divided by `num_items_in_batch` if that is
        given). In training mode the router losses are added, with their coefficients; in evaluation mode they are
        not, so that exp(loss) is a perplexity. `aux_loss` is the load-balancing loss without its coefficient, at least
        one, returned whenever it was computed: in training, or because of `output_router_logits`.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        wanted = output_router_logits or (self.training and labels is not None)
        wants_router_losses = wanted and self.config.num_experts > 0
        outputs: MoeModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=wants_router_losses,
            **kwargs,
        )
        hidden, aux_loss = outputs.last_hidden_state, None
        for targets in (labels, kwargs.get("shift_labels")):
            if targets is not None:
                check_labels(targets, hidden.shape[:2], self.vocab_size, kwargs.get("ignore_index", -100))
        without_logits = skip_logits and labels is not None and can_fuse_head(hidden, self.lm_head)
        logits = None if without_logits else self._logits(slice_logits_to_keep(hidden, logits_to_keep))
        loss = None if labels is None else self._cross_entropy(hidden, logits, labels, **kwargs)
        if wants_router_losses:
            weights, token_mask = sequence_weights(hidden.shape[:2], attention_mask, labels, **kwargs)
            aux_loss, router_loss = self._router_losses(outputs.router_logits, weights, token_mask)
            if loss is not None and self.training:
                loss = loss + router_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        """(batch, seq, hidden) -> (batch, seq, vocab)."""
        with products_of_few_rows(hidden):
            return self.lm_head(hidden)

    def _cross_entropy(self, hidden: Tensor, logits: Tensor | None, labels: Tensor, **kwargs: Any) -> Tensor:
        """The loss of the logits (batch, seq, vocab), or without them that of hidden states (batch, seq, hidden)."""
        if logits is None:
            return head_cross_entropy(hidden, self.lm_head.weight, labels, **kwargs)
        fused = self.loss_function is ForCausalLMLoss and can_fuse_loss(logits)
        loss_function = logits_cross_entropy if fused else self.loss_function
        return loss_function(logits, labels, self.vocab_size, **kwargs)

    def _router_losses(
        self, router_logits: tuple[Tensor, ...], weights: Tensor, token_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The load-balancing loss, and the sum of both router losses times their coefficients; scalars."""
        config = self.config
        balance, z_loss = router_losses(router_logits, weights, token_mask, config.num_experts_per_tok)
        return balance, config.router_aux_loss_coef * balance + config.router_z_loss_coef * z_loss


class BlueberryForSequenceClassification(GenericForSequenceClassification, BlueberryPreTrainedModel):
    """Blueberry with a linear classifier on the last token that is not padding (`config.pad_token_id`)."""

    def __init__(self, config: BlueberryConfig) -> None:
        BlueberryPreTrainedModel.__init__(self, config)  # the generic one needs the class registered with AutoModel
        self.num_labels = config.num_labels
        self.model = BlueberryModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


# Under label smoothing transformers' Trainer shifts the labels only of the classes that are named here.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["blueberry"] = BlueberryForCausalLM.__name__

__all__ = [
    "BlueberryForCausalLM",
    "BlueberryForSequenceClassification",
    "BlueberryModel",
    "BlueberryPreTrainedModel",
]
