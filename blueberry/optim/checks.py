"""Models that no optimizer of ours can train, refused at construction with the remedy."""

from torch import Tensor, nn

from ..errors import UsageError


def check_model(model: nn.Module) -> None:
    """Raise UsageError naming the parameter, its value and the remedy.

    Refused are: partitions of DeepSpeed ZeRO-3 and of FSDP1, which are flat; trainable 8-bit and complex parameters;
    embeddings with sparse gradients. Parameters on the meta device are fine.
    """
    for name, parameter in model.named_parameters():
        _check_partition(name, parameter)
        if parameter.requires_grad:
            _check_dtype(name, parameter)
    for name, module in model.named_modules():
        _check_module(name, module)


def _check_partition(name: str, parameter: Tensor) -> None:
    shape = tuple(parameter.shape)
    if "ds_id" in vars(parameter):
        raise UsageError(f"{name} of shape {shape} is a partition of DeepSpeed ZeRO-3: Muon needs whole matrices, "
                         "use FSDP2 (fsdp_version: 2 in accelerate's config)")  # fmt: skip
    if "_is_flat_param" in vars(parameter):
        raise UsageError(f"{name} of shape {shape} is a flat parameter of FSDP1: Muon needs whole matrices, "
                         "use FSDP2 (fsdp_version: 2 in accelerate's config)")  # fmt: skip


def _check_dtype(name: str, parameter: Tensor) -> None:
    if parameter.is_complex():
        raise UsageError(f"{name} is {parameter.dtype}: store real parameters, see torch.view_as_real")
    if parameter.element_size() == 1:
        raise UsageError(f"{name} is {parameter.dtype}: 8 bits cannot be trained, load the model in bfloat16")


def _check_module(name: str, module: nn.Module) -> None:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
        raise UsageError(f"{name or type(module).__name__} has sparse=True: neither Muon nor AdamW takes sparse "
                         "gradients, build it with sparse=False")  # fmt: skip
    if isinstance(module, nn.Linear) and module.weight.ndim == 1:
        raise UsageError(f"{name or 'the linear layer'}.weight has shape {tuple(module.weight.shape)}: it was "
                         "flattened (DeepSpeed ZeRO, FSDP1), Muon needs whole matrices, use FSDP2")  # fmt: skip


def check_quantized(model: nn.Module) -> None:
    """Raise UsageError when a linear layer is quantized: for models whose every hidden matrix is frozen.

    Only norms, embeddings and the head of such a model would train, which is surely not meant.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point():
            raise UsageError(f"{name}.weight is {module.weight.dtype} (quantized) and cannot be trained: add LoRA "
                             "adapters with PEFT, or load the model in bfloat16")  # fmt: skip
