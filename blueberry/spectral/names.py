"""Names: which metrics exist, and which layer, module, projection and expert a parameter is. No torch needed."""

from itertools import pairwise
from typing import NamedTuple

WEIGHT_METRICS = (
    "spectral_norm",
    "spectral_gap",
    "stable_rank",
    "spectral_entropy",
    "effective_rank",
    "condition_number",
    "frobenius_norm",
    "nuclear_norm",
    "participation_ratio",
)
UPDATE_METRICS = (
    "update_alignment",
    "update_alignment_right",
    "update_subspace_gap",
    "update_energy_in_top_k",
    "update_energy_chance",
    "update_spectral_norm",
    "update_frobenius_norm",
    "update_stable_rank",
    "update_spectral_entropy",
    "update_to_weight_ratio",
)
PEAK_METRICS = ("weight_norm_peak", "gradient_norm_peak")
POWER_LAW = "power_law_exponent"  # computed only where it is asked for by name
SPECTRA = ("top_singular_values", "singular_values")
DEFAULT_METRICS = WEIGHT_METRICS + UPDATE_METRICS + PEAK_METRICS + SPECTRA
METRICS = (*DEFAULT_METRICS, POWER_LAW)

_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_SILENT = {"weight", "experts"}  # components that say nothing about which projection it is


class MatrixName(NamedTuple):
    """Where a parameter sits. `projection` is what remains of its path, joined by dots."""

    layer: int | None
    module: str
    projection: str
    expert: int | None


def matrix_name(parameter: str) -> MatrixName:
    """Parse a parameter name of any transformers model.

    The layer is the first integer path component, the module the component after it, the expert the integer after
    a component `experts` (models that keep one module per expert). Without an integer there is no layer:
    `lm_head.weight` is module and projection `lm_head`.

    >>> matrix_name("model.layers.3.self_attn.q_proj.weight")
    MatrixName(layer=3, module='self_attn', projection='q_proj', expert=None)
    """
    parts = [part for part in parameter.split(".") if part not in _WRAPPERS]
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    layer = None if first is None else int(parts[first])
    tail = parts[-2:] if first is None else parts[first + 1 :]
    expert = next((int(b) for a, b in pairwise(tail) if a == "experts" and b.isdigit()), None)
    words = [part for part in tail if part not in _SILENT and not part.isdigit()] or ["weight"]
    return MatrixName(layer, words[0], ".".join(words[1:]) or words[0], expert)
