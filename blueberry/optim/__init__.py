"""From gradients to weights: Muon, its composition with AdamW, and the routing of parameters to them."""

from .build import build_optimizer
from .composed import ComposedOptimizer
from .muon import Muon
from .param_groups import assign_parameters

__all__ = ["ComposedOptimizer", "Muon", "assign_parameters", "build_optimizer"]
