"""The model against transformers' models of the same shapes: training, experts, loss and decoding."""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from functools import partial

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from blueberry import BlueberryConfig
from blueberry.losses_blueberry import head_cross_entropy
from blueberry.modeling_blueberry import BlueberryExperts, BlueberryGatedExperts
from blueberry.products_blueberry import linear

from .common import Record, device, in_fresh_process, interleaved_medians, machine, resident_peak

PARTS = ("training", "experts", "dense", "loss", "decode")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHARED_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--dtype", choices=sorted(DTYPES), action="append", help="bf16 is autocast; default: both")
    parser.add_argument("--experts", choices=("gated", "ungated"), action="append", help="default: both")
    parser.add_argument("--vocab_size", type=int, action="append", help="of the training part; default: 8192, 49152")
    parser.add_argument("--batch", type=int, nargs=2, default=(4, 512), help="sequences, length; default: 4 512")


def run(arguments: argparse.Namespace) -> Iterator[Record]:
    kinds = arguments.experts or ("gated", "ungated")
    for dtype in arguments.dtype or sorted(DTYPES):
        for part in arguments.part or PARTS:
            common = {"benchmark": "model", "part": part, "dtype": dtype}
            for record in benchmark_part(part, dtype, kinds, arguments):
                yield common | record | {"n": arguments.repeats} | machine()


def benchmark_part(part: str, dtype: str, kinds: list[str], arguments: argparse.Namespace) -> Iterator[Record]:
    repeats, batch = arguments.repeats, tuple(arguments.batch)
    if part == "training":
        for kind in kinds:
            for vocab_size in arguments.vocab_size or (8192, 49152):
                yield from training(dtype, kind == "gated", vocab_size, batch, repeats)
    elif part == "experts":
        yield from experts(dtype, kinds, batch[0] * batch[1], repeats)
    elif part == "dense":
        yield from dense(dtype, batch, repeats)
    elif part == "loss":
        yield from loss(dtype, repeats)
    else:
        yield from decode(dtype, repeats)


def medians(steps: Mapping[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds; of CPU time where one thread does all, so that what else the machine does hardly counts."""
    alone = torch.get_num_threads() == 1 and device().type == "cpu"
    return interleaved_medians(steps, repeats, time.process_time if alone else time.perf_counter)


# The models


def shapes_of(config: BlueberryConfig) -> dict[str, int]:
    """The sizes that transformers' configurations name as Blueberry's does."""
    return {name: getattr(config, name) for name in SHARED_SIZES}


def build(config: PreTrainedConfig, experts_implementation: str | None = None) -> PreTrainedModel:
    """The model in training mode, in fp32, on the device."""
    torch.manual_seed(0)
    options = {"attn_implementation": "sdpa"}
    if experts_implementation is not None:
        options["experts_implementation"] = experts_implementation
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options).train().to(device())


def qwen3_moe(config: BlueberryConfig, implementation: str) -> PreTrainedModel:
    """Qwen3-MoE of the shapes of a Blueberry; with Nemotron-H's experts if those are not gated."""
    extra = {"n_routed_experts": config.num_experts, "moe_latent_size": None, "mlp_hidden_act": config.hidden_act}
    peer = Qwen3MoeConfig(
        **shapes_of(config),
        head_dim=config.head_dim,
        intermediate_size=config.moe_intermediate_size,
        moe_intermediate_size=config.moe_intermediate_size,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        norm_topk_prob=config.norm_topk_prob,
        **({} if config.gated_experts else extra),
    )
    model = build(peer, implementation)
    if not config.gated_experts:
        for layer in model.model.layers:
            layer.mlp.experts = NemotronHExperts(model.config).to(device())
            for weight in layer.mlp.experts.parameters():
                nn.init.normal_(weight, std=config.initializer_range)
    return model


def olmoe(config: BlueberryConfig, implementation: str) -> PreTrainedModel:
    """OLMoE of the shapes of a gated Blueberry."""
    peer = OlmoeConfig(
        **shapes_of(config),
        intermediate_size=config.moe_intermediate_size,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        norm_topk_prob=config.norm_topk_prob,
    )
    return build(peer, implementation)


def with_weights_of(
    ours: PreTrainedModel, family: Callable[[BlueberryConfig, str], PreTrainedModel], implementation: str
) -> PreTrainedModel:
    """A peer with Blueberry's weights: time depends on how many experts are chosen, so both must choose the same.

    The embedding is scaled by sqrt(hidden_size), as Blueberry does in its forward, and so not tied to the head.
    Norms keep their ones: OLMoE has other shapes of them.
    """
    config = copy(ours.config)
    config.tie_word_embeddings = False
    peer = family(config, implementation)
    norms = {name: weight for name, weight in peer.state_dict().items() if "norm" in name}
    peer.load_state_dict({name: w for name, w in ours.state_dict().items() if "norm" not in name} | norms)
    peer.get_input_embeddings().weight.data *= config.hidden_size**0.5
    return peer


def random_batches(vocab_size: int, batch: tuple[int, int]) -> Iterator[Tensor]:
    """Token ids, other ones each time: the numbers of tokens that experts get differ from step to step."""
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randint(0, vocab_size, batch, generator=generator).to(device())


def training_step(model: PreTrainedModel, batches: Iterator[Tensor], dtype: str, **kwargs: bool) -> None:
    """Forward and backward of the next batch, with the gradients' memory taken anew as after `zero_grad`."""
    ids = next(batches)
    model.zero_grad(set_to_none=True)
    with torch.autocast(device().type, torch.bfloat16, enabled=dtype == "bf16"):
        output = model(input_ids=ids, labels=ids, use_cache=False, **kwargs)
    output.loss.backward()


# Training


def training(dtype: str, gated: bool, vocab_size: int, batch: tuple[int, int], repeats: int) -> Iterator[Record]:
    """Forward and backward at the blueberry-moe size."""
    config = BlueberryConfig.from_preset("blueberry-moe", vocab_size=vocab_size, gated_experts=gated)
    models = {"blueberry": (ours := build(config))}
    models["Qwen3-MoE, eager experts"] = with_weights_of(ours, qwen3_moe, "eager")
    models["Qwen3-MoE, grouped_mm"] = with_weights_of(ours, qwen3_moe, "grouped_mm")
    if gated:
        models["OLMoE, eager experts"] = with_weights_of(ours, olmoe, "eager")
    setting = {"experts": "gated" if gated else "ungated", "vocab_size": vocab_size, "batch": list(batch)}
    yield from compare_training(models, config, dtype, batch, repeats, setting)


def dense(dtype: str, batch: tuple[int, int], repeats: int) -> Iterator[Record]:
    """Forward and backward of blueberry-88m, and of Llama with the same sizes and with as many parameters."""
    config = BlueberryConfig.from_preset("blueberry-88m")
    equal = {"Llama": config.intermediate_size, "Llama, as many parameters": 2 * config.intermediate_size // 3}
    models = {"blueberry": build(config)}
    for name, width in equal.items():
        models[name] = build(LlamaConfig(**shapes_of(config), head_dim=config.head_dim, intermediate_size=width))
    setting = {"preset": "blueberry-88m", "vocab_size": config.vocab_size, "batch": list(batch)}
    yield from compare_training(models, config, dtype, batch, repeats, setting)


def compare_training(
    models: dict[str, PreTrainedModel],
    config: BlueberryConfig,
    dtype: str,
    batch: tuple[int, int],
    repeats: int,
    setting: Record,
) -> Iterator[Record]:
    """One record for each model, and one with the distance to the limit. Blueberry trains as its Trainer does."""
    tokens = batch[0] * batch[1]
    contestants = models | {"blueberry, logits kept": models["blueberry"]}
    steps: dict[str, Callable] = {}
    for name, model in contestants.items():
        options = {"skip_logits": True} if name == "blueberry" else {}
        steps[name] = partial(training_step, model, random_batches(config.vocab_size, batch), dtype, **options)
    rate = gemm_rate(dtype)
    seconds = medians(steps, repeats)
    rate = max(rate, gemm_rate(dtype))  # a shared machine can be slow for the second that one takes
    fastest_peer = min(value for name, value in seconds.items() if not name.startswith("blueberry"))
    for name, value in seconds.items():
        yield setting | {"model": name, "step_ms": round(1000 * value, 1),
                         "tokens_per_s": round(tokens / value),
                         "speed_over_fastest_peer": round(fastest_peer / value, 3)}  # fmt: skip
    flops = tokens * training_flops_per_token(config, batch[1])
    yield setting | {"limit": "products alone at the measured GEMM rate", "gflop": round(flops / 1e9, 1),
                     "gflop_per_s": round(rate / 1e9, 1), "tokens_per_s": round(tokens * rate / flops),
                     "share_of_limit": round(flops / rate / seconds["blueberry"], 3)}  # fmt: skip


def training_flops_per_token(config: BlueberryConfig, length: int) -> float:
    """Floating-point operations of the matrix products of forward and backward; attention to the past alone."""
    heads = config.num_attention_heads * config.head_dim
    attention = 2 * config.hidden_size * (heads + config.num_key_value_heads * config.head_dim) + heads * length
    if config.num_experts:
        matrices = 3 if config.gated_experts else 2
        mlp = config.num_experts_per_tok * matrices * config.hidden_size * config.moe_intermediate_size
    else:
        mlp = 2 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    return 3 * 2 * (config.num_hidden_layers * (attention + mlp) + head)


def gemm_rate(dtype: str) -> float:
    """Operations per second of a product of 2048 x 2048 matrices, by the faster library that Blueberry uses."""
    a, b = (torch.randn(2048, 2048, device=device()).to(DTYPES[dtype]) for _ in range(2))
    result = torch.empty_like(a)
    products = {"torch": lambda: torch.mm(a, b, out=result), "oneDNN in fp32": lambda: linear(a, b)}
    return 2 * 2048**3 / min(medians(products, 9).values())


# Experts


def experts(dtype: str, kinds: list[str], tokens: int, repeats: int) -> Iterator[Record]:
    """One layer's experts, forward and backward, from 8 to 64 of them at the same tokens and choices per token."""
    anew, in_place = copy_rates()
    for kind in kinds:
        base = None
        for num_experts in (8, 16, 32, 64):
            config = BlueberryConfig.from_preset(
                "blueberry-moe", num_experts=num_experts, gated_experts=kind == "gated"
            )
            implementations = ("blueberry", "eager", "grouped_mm")
            steps = {name: experts_step(config, name, tokens, dtype) for name in implementations}
            seconds = medians(steps, repeats)
            touched = expert_bytes(config)
            base = base or (seconds["blueberry"], touched)
            explained, least = (base[0] + (touched - base[1]) / rate for rate in (anew, in_place))
            for name, value in seconds.items():
                yield {"experts": kind, "num_experts": num_experts, "tokens": tokens, "implementation": name,
                       "ms": round(1000 * value, 1), "over_eager": round(value / seconds["eager"], 3)}  # fmt: skip
            yield {"experts": kind, "num_experts": num_experts, "weight_bytes_touched": touched,
                   "copied_bytes_per_s": round(anew), "explained_ms": round(1000 * explained, 1),
                   "over_explained": round(seconds["blueberry"] / explained, 3),
                   "in_place_bytes_per_s": round(in_place), "explained_in_place_ms": round(1000 * least, 1),
                   "over_explained_in_place": round(seconds["blueberry"] / least, 3)}  # fmt: skip


def experts_step(config: BlueberryConfig, implementation: str, tokens: int, dtype: str) -> Callable[[], None]:
    """Forward and backward of one layer's experts under a uniformly random router."""
    config = copy(config)  # the layer reads the implementation from its configuration
    config._experts_implementation = implementation
    torch.manual_seed(0)
    layer = (BlueberryGatedExperts if config.gated_experts else BlueberryExperts)(config).to(device())
    for weight in layer.parameters():
        nn.init.normal_(weight, std=config.initializer_range)
    hidden = torch.randn(tokens, config.hidden_size, device=device(), requires_grad=True)
    weights, index = torch.rand(tokens, config.num_experts, device=device()).topk(config.num_experts_per_tok)
    upstream = torch.randn(tokens, config.hidden_size, device=device())

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        with torch.autocast(device().type, torch.bfloat16, enabled=dtype == "bf16"):
            output = layer(hidden, index, weights)
        output.backward(upstream.to(output.dtype))

    return step


def expert_bytes(config: BlueberryConfig) -> int:
    """Bytes of expert weights and gradients that a step moves: weights read twice, gradients written once, in fp32."""
    matrices = 3 if config.gated_experts else 2
    return 3 * 4 * config.num_experts * matrices * config.hidden_size * config.moe_intermediate_size


def copy_rates() -> tuple[float, float]:
    """Bytes read and written per second when a large tensor is copied: into memory taken anew, as gradients usually
    are, and into memory that is there, as Blueberry's gradients are after the first step."""
    source = torch.randn(64 * 2**20 // 4, device=device())
    target = source.clone()
    seconds = medians({"anew": lambda: source.clone(), "in place": lambda: target.copy_(source)}, 9)
    return 2 * source.nbytes / seconds["anew"], 2 * source.nbytes / seconds["in place"]


# Loss


def loss(dtype: str, repeats: int) -> Iterator[Record]:
    """From hidden states to the loss and its gradients: the blueberry-moe head on 4 x 2048 tokens."""
    steps = {name: loss_step(name, dtype) for name in ("blueberry", "plain logits")}
    seconds = medians(steps, repeats)
    del steps
    peaks = {name: in_fresh_process(peak_memory, name, dtype) for name in seconds}
    for name, value in seconds.items():
        yield {"loss": name, "tokens": [4, 2048], "vocab_size": 49152, "ms": round(1000 * value, 1),
               "time_over_plain": round(value / seconds["plain logits"], 3),
               "peak_memory_mib": round(peaks[name] / 2**20),
               "memory_over_plain": round(peaks[name] / peaks["plain logits"], 3)}  # fmt: skip


def loss_step(name: str, dtype: str) -> Callable[[], None]:
    """The loss of transformers on the logits of the head, or Blueberry's without them, and the gradients."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    config = BlueberryConfig.from_preset("blueberry-moe")
    head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device=device())
    nn.init.normal_(head.weight, std=config.initializer_range)
    hidden = torch.randn(4, 2048, config.hidden_size, device=device(), requires_grad=True)
    labels = next(random_batches(config.vocab_size, (4, 2048)))

    def step() -> None:
        hidden.grad = head.weight.grad = None
        with torch.autocast(device().type, torch.bfloat16, enabled=dtype == "bf16"):
            if name == "blueberry":
                value = head_cross_entropy(hidden, head.weight, labels)
            else:
                value = ForCausalLMLoss(head(hidden), labels, config.vocab_size)
        value.backward()

    return step


def peak_memory(name: str, dtype: str) -> int:
    """Bytes that one loss and its gradients need at most, above the inputs."""
    step = loss_step(name, dtype)
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # the libraries' own buffers
    before = resident_peak()
    step()
    return resident_peak() - before


# Decoding


def decode(dtype: str, repeats: int) -> Iterator[Record]:
    """Greedy decoding with a cache after a prompt of 64 tokens, gated experts; bf16 here is the weights' dtype."""
    config = BlueberryConfig.from_preset("blueberry-moe", gated_experts=True)
    models = {"blueberry": build(config)}
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        models[f"Qwen3-MoE, {implementation}"] = with_weights_of(models["blueberry"], qwen3_moe, implementation)
    models = {name: model.eval().to(DTYPES[dtype]) for name, model in models.items()}
    for batch in (1, 8):
        ids, new = next(random_batches(config.vocab_size, (batch, 64))), 64
        steps = {name: partial(generate, model, ids, new) for name, model in models.items()}
        seconds = medians(steps, repeats)
        fastest_peer = min(value for name, value in seconds.items() if name != "blueberry")
        for name, value in seconds.items():
            yield {"model": name, "batch": batch, "new_tokens": new,
                   "tokens_per_s": round(batch * new / value, 1),
                   "speed_over_fastest_peer": round(fastest_peer / value, 3)}  # fmt: skip


def generate(model: PreTrainedModel, ids: Tensor, new: int) -> None:
    settings = GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
