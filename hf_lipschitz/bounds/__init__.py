"""Bounds of whole models, read off their exported graphs."""

from hf_lipschitz.bounds.domain import LipschitzBound, Refusal
from hf_lipschitz.bounds.interpreter import graph_bound


__all__ = ["LipschitzBound", "Refusal", "graph_bound"]
