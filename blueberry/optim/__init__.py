"""From gradients to weights: Muon, its composition with AdamW, and the routing of parameters to them."""

from .build import build_optimizer
from .composed import ComposedOptimizer
from .hypersphere_muon import HypersphereMuon
from .manifold import create_manifold_optimizer
from .muon import Muon
from .param_groups import assign_parameters
from .splits import Layout
from .stiefel_muon import StiefelMuon

__all__ = [
    "ComposedOptimizer",
    "HypersphereMuon",
    "Layout",
    "Muon",
    "StiefelMuon",
    "assign_parameters",
    "build_optimizer",
    "create_manifold_optimizer",
]
