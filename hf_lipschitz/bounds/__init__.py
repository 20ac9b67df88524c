"""Bounds of whole models, read off their exported graphs."""

from hf_lipschitz.bounds.graph import BoundedGraph, graph_bound
from hf_lipschitz.bounds.lower import lipschitz_lower_bound
from hf_lipschitz.bounds.registry import NoRule, module_rule, rule
from hf_lipschitz.bounds.result import Cost, LipschitzBound


__all__ = [
    "BoundedGraph",
    "Cost",
    "LipschitzBound",
    "NoRule",
    "graph_bound",
    "lipschitz_lower_bound",
    "module_rule",
    "rule",
]
