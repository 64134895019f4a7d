"""Configuration of Blueberry language models: one class for dense and mixture-of-experts models, and named presets.

The file ships to the Hub as remote code, so it imports transformers only.
"""

from dataclasses import fields
from typing import Any, ClassVar, Self

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import RopeParameters

PRESETS: dict[str, dict[str, Any]] = {
    # dense, 88.6M parameters
    "blueberry-88m": {
        "vocab_size": 49152,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 22,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_act": "relu2",
        "max_position_embeddings": 2048,
    },
    # mixture of experts, 79M parameters
    "blueberry-moe": {
        "vocab_size": 49152,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 1536,
    },
    "blueberry-moe-12l": {
        "vocab_size": 49152,
        "hidden_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 2048,
    },
    "manifold-small": {
        "vocab_size": 10000,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 1024,
    },
    # small enough to train in minutes on two CPU cores
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
    },
}

ATTENTION_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.o_proj": "rowwise",
}


@strict
class BlueberryConfig(PreTrainedConfig):
    """Sizes and coefficients of a Blueberry model; the defaults are `blueberry-88m`.

    `num_experts=0` is a dense model, whose layers hold one ungated MLP of width `intermediate_size`. Otherwise every
    layer holds `num_experts` experts of width `moe_intermediate_size`, gated if `gated_experts`, of which each token
    visits `num_experts_per_tok`; `norm_topk_prob` makes their weights add up to one.

    Training adds `router_aux_loss_coef` times the load-balancing loss and `router_z_loss_coef` times the router z-loss
    to the cross-entropy, and Gaussian noise of standard deviation `router_noise` to the router's logits; evaluation
    does none of it.

    `head_dim` is `hidden_size // num_attention_heads` unless given. Bad values raise a ValueError that names the
    remedy.
    """

    model_type = "blueberry"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"num_local_experts": "num_experts"}

    vocab_size: int = 49152
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 22
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 4
    head_dim: int | None = None
    hidden_act: str = "relu2"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = True
    rope_parameters: RopeParameters | dict | None = None
    attention_dropout: float | int = 0.0
    use_qk_norm: bool = True
    num_experts: int = 0
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 1536
    gated_experts: bool = False
    norm_topk_prob: bool = True
    output_router_logits: bool = False
    router_aux_loss_coef: float | int = 0.01
    router_z_loss_coef: float | int = 0.001
    router_noise: float | int = 0.0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the derived sizes and check that the sizes fit together."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self._check_sizes()
        if self.head_dim is None:
            self.head_dim = self._divide_among_heads()
        self._check_heads()
        self._check_experts()
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown: use one of {', '.join(sorted(ACT2FN))}")
        super().__post_init__(**kwargs)

    def _check_sizes(self) -> None:
        """Raise ValueError unless every size is positive."""
        names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        names += ["num_key_value_heads", "max_position_embeddings", "moe_intermediate_size"]
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def _divide_among_heads(self) -> int:
        """The size of a head when the heads share the hidden size."""
        size, remainder = divmod(self.hidden_size, self.num_attention_heads)
        if remainder:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}: "
                "choose a divisor, or give head_dim"
            )
        return size

    def _check_heads(self) -> None:
        """Raise ValueError unless heads can be turned and share the key-value heads evenly."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(f"num_key_value_heads={kv_heads} must divide num_attention_heads={heads}")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even and positive: rotary embeddings turn pairs")

    def _check_experts(self) -> None:
        """Raise ValueError unless the router can choose `num_experts_per_tok` of `num_experts`."""
        experts, chosen = self.num_experts, self.num_experts_per_tok
        if experts < 0:
            raise ValueError(f"num_experts={experts} must be 0 (a dense model) or more")
        if experts and not 1 <= chosen <= experts:
            raise ValueError(f"num_experts_per_tok={chosen} must lie between 1 and num_experts={experts}")
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "router_noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative: 0 switches it off")

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """How tensor parallelism shards each module: attention by heads, feed-forward networks by width."""
        if not self.num_experts:
            return ATTENTION_PLAN | {"layers.*.mlp.up_proj": "colwise", "layers.*.mlp.down_proj": "rowwise"}
        up, split = ("gate_up_proj", "packed_colwise") if self.gated_experts else ("up_proj", "colwise")
        return ATTENTION_PLAN | {
            f"layers.*.mlp.experts.{up}": split,
            "layers.*.mlp.experts.down_proj": "rowwise",
            "layers.*.mlp.experts": "moe_tp_experts",
        }

    @property
    def base_model_ep_plan(self) -> dict[str, str]:
        """How expert parallelism shards the experts: by expert."""
        if not self.num_experts:
            return {}
        return {
            f"layers.*.mlp.experts.{'gate_up_proj' if self.gated_experts else 'up_proj'}": "grouped_gemm",
            "layers.*.mlp.experts.down_proj": "grouped_gemm",
            "layers.*.mlp.experts": "ep_dispatch_experts",
        }

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """The configuration called `name` in `PRESETS`, with some fields replaced.

        Raises ValueError for an unknown preset, an unknown field or a value of the wrong type.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
        known = {field.name for field in fields(cls)} | {"num_labels", "attn_implementation", "experts_implementation"}
        if unknown := sorted(set(overrides) - known):
            raise ValueError(
                f"unknown config key {', '.join(map(repr, unknown))}: choose from {', '.join(sorted(known))}"
            )
        try:
            return cls(**PRESETS[name] | overrides)
        except StrictDataclassFieldValidationError as error:
            raise ValueError(f"bad config value: {' '.join(str(error).split())}") from error


__all__ = ["PRESETS", "BlueberryConfig"]
