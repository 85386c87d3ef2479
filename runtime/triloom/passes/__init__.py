"""Passes: each adds one kind of action to a program. Pure functions from Program to Program.

schedule(ranks, microbatches) -> add_recompute -> add_communication -> add_state -> verify
"""

from .communication import INPUT_GRADIENT, add_communication, consumed_by, produced
from .layout import BucketInfo, StateLayout, check_layout
from .lowering import WEIGHT_GRADIENT, whole_stages
from .recompute import add_recompute, recomputed_units
from .state import add_state, gathers_params

__all__ = [
    "INPUT_GRADIENT",
    "WEIGHT_GRADIENT",
    "BucketInfo",
    "StateLayout",
    "add_communication",
    "add_recompute",
    "add_state",
    "check_layout",
    "consumed_by",
    "gathers_params",
    "produced",
    "recomputed_units",
    "whole_stages",
]
