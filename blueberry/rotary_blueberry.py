"""The angles of rotary positions (https://arxiv.org/abs/2104.09864), for every rope type of transformers.

The file ships to the Hub as remote code, so it imports torch, transformers and its sibling only.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .configuration_blueberry import BlueberryConfig


class BlueberryRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotation angles of every position; every rope type of transformers."""

    inv_freq: Tensor  # (head_dim / 2,)

    def __init__(self, config: BlueberryConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        inv_freq, self.attention_scaling = self._initial_frequencies()
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    def _initial_frequencies(self) -> tuple[Tensor, float]:
        rope_init = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        return rope_init(self.config)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the model, but stay in fp32: angles grow with the position, and so do errors of bf16."""
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32:
            frequencies, self.attention_scaling = self._initial_frequencies()
            self.inv_freq = frequencies.to(self.inv_freq.device)
            self.original_inv_freq = self.inv_freq.clone()
            self.max_seq_len_cached = self.original_max_seq_len
        return self

    @staticmethod
    def compute_default_rope_parameters(config: BlueberryConfig, **kwargs) -> tuple[Tensor, float]:
        """Angular frequencies rope_theta^(-2i / head_dim), and the scale of cosine and sine, one."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids (batch, seq) -> cosine and sine, each (batch, seq, head_dim / 2) in the dtype of x."""
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float32)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)
