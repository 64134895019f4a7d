"""How the matrices of known modules are stored: which are transposed, which fuse several projections."""

import re
from collections.abc import Callable

from torch import nn
from transformers.pytorch_utils import Conv1D

from .roles import Place, is_experts
from .splits import Layout

_HALVES = Layout(shape=(2, -1))
_THIRDS = Layout(shape=(3, -1))
_INTERLEAVED = Layout(shape=(-1, 2), axis=1)
_TRANSPOSED_EXPERTS = ("Llama4TextExperts",)  # stacks (experts, in, out) without transformers' mark
_HEAD_DIM_NAMES = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
_QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj", "query", "key", "value", "q", "k", "v")


def layout_of(place: Place, split_heads: bool = False) -> Layout | None:
    """Layout of a matrix or stack of matrices; None for plain (..., out, in).

    With `split_heads`, query, key and value projections, fused or not, are cut into their heads.
    """
    layout = _split_of(place, split_heads)._replace(transposed=is_transposed(place.owner))
    return None if layout == Layout() else layout


def is_transposed(owner: nn.Module) -> bool:
    """Whether the matrices of `owner` are stored as (in, out)."""
    marked = vars(owner).get("is_transposed", type(owner).__name__ in _TRANSPOSED_EXPERTS)
    return isinstance(owner, Conv1D) or bool(marked)


def is_unknown_fusion(place: Place, layout: Layout | None) -> bool:
    """Whether the name says that a weight fuses query, key and value but no split of it is known."""
    fused = re.search(r"qkv|query_key_value|^c_attn", place.attribute, re.IGNORECASE)
    return bool(fused) and (layout is None or not layout.shape)


def head_dim_of(attention: nn.Module) -> int | None:
    """Outputs of one head, under any of the names that transformers gives it."""
    return next((vars(attention)[name] for name in _HEAD_DIM_NAMES if name in vars(attention)), None)


def _split_of(place: Place, split_heads: bool) -> Layout:
    if place.lora_layer is not None:
        return _stacked_lora(place)
    if is_experts(place.owner):
        return _experts(place)
    if isinstance(place.owner, nn.MultiheadAttention):
        fused = _THIRDS if place.leaf == "in_proj_weight" else Layout()
        return Layout(shape=(-1, place.owner.head_dim)) if split_heads else fused
    if place.attribute == "gate_up_proj":
        return _HALVES
    fused = _fused(place)
    is_qkv = place.attribute in _QUERY_KEY_VALUE or (fused.shape and fused != _HALVES)
    head_dim = head_dim_of(place.parent) if split_heads and is_qkv else None
    if head_dim and place.attribute == "v_proj":  # MiMo's values are narrower than its queries
        head_dim = vars(place.parent).get("v_head_dim", head_dim)
    return Layout(shape=(-1, head_dim)) if head_dim else fused


def _stacked_lora(place: Place) -> Layout:
    """PEFT stacks the factors of all experts: A is (experts * rank, in), B is (out, rank * experts)."""
    experts = vars(place.lora_layer).get("num_experts", 1)
    if experts == 1:
        return Layout()
    is_a = ".lora_A." in place.name
    return Layout(shape=(experts, -1)) if is_a else Layout(dim=-1, shape=(-1, experts), axis=1)


def _experts(place: Place) -> Layout:
    if place.leaf != "gate_up_proj":
        return Layout()
    return _HALVES if vars(place.owner).get("is_concatenated", True) else _INTERLEAVED


def _fused(place: Place) -> Layout:
    """Layout of a projection of transformers' or timm's that fuses several; the whole matrix where none is known."""
    attention = place.parent
    if not type(attention).__module__.startswith(("transformers.", "timm.")):
        return Layout()
    name = f"{type(attention).__name__}.{place.attribute}"
    for pattern, layout in _FUSED.items():
        if re.search(pattern, name):
            return layout(attention)
    return Layout()


def _heads_in_turn(attention: nn.Module) -> Layout:
    """Query, key and value of the first head, then those of the second, and so on."""
    return Layout(shape=(-1, 3, head_dim_of(attention)), axis=1)


def _queries_then_shared(attention: nn.Module) -> Layout:
    """All queries, then fewer keys, then as many values."""
    config, head_dim = attention.config, head_dim_of(attention)
    shared = config.num_key_value_heads * head_dim
    return Layout(shape=(-1,), sizes=(config.num_attention_heads * head_dim, shared, shared))


def _gpt2(attention: nn.Module) -> Layout:
    return _HALVES if attention.is_cross_attention else _THIRDS  # cross-attention: key and value


def _bigcode(attention: nn.Module) -> Layout:
    shared = attention.kv_dim  # one key and one value for all heads
    return (
        Layout(shape=(-1,), sizes=(attention.embed_dim, shared, shared))
        if attention.multi_query
        else _heads_in_turn(attention)
    )


def _falcon(attention: nn.Module) -> Layout:
    heads, head_dim = attention.num_heads, head_dim_of(attention)
    if attention.new_decoder_architecture:  # the queries of a group, then its key and value
        queries = heads // attention.num_kv_heads
        return Layout(shape=(-1, queries + 2, head_dim), axis=1, sizes=(queries, 1, 1))
    if attention.multi_query:
        return Layout(shape=(-1,), sizes=(heads * head_dim, head_dim, head_dim))
    return _heads_in_turn(attention)


_FUSED: dict[str, Callable[[nn.Module], Layout]] = {
    r"^(GPT2|DecisionTransformerGPT2|ImageGPT)Attention\.c_attn$": _gpt2,
    r"^Attention\.c_attn$": lambda _: _THIRDS,  # the first GPT
    r"^GPTBigCodeAttention\.c_attn$": _bigcode,
    r"^(GPTNeoX|GPTNeoXJapanese|Bloom|Persimmon)Attention\.query_key_value$": _heads_in_turn,
    r"^MiniMaxLightningAttention\.qkv_proj$": _heads_in_turn,
    r"^Falcon\w*Attention\w*\.query_key_value$": _falcon,
    r"^Phi(3|4Multimodal)Attention\.qkv_proj$": _queries_then_shared,
    r"^CodeGenAttention\.qkv_proj$": lambda _: Layout(shape=(4, 3, -1), axis=1),  # four groups of heads
    r"^(ModernBert|Mpt)\w*Attention\.Wqkv$": lambda _: _THIRDS,
    r"^(?!Exaone)\w+\.qkv$": lambda _: _THIRDS,  # every vision transformer of transformers and timm but this one
    r"^(ModernBert\w*MLP\.Wi|GraniteMoe\w*MLP\.input_linear)$": lambda _: _HALVES,  # gate and up
}
