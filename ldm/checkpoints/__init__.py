"""Checkpoints that lose nothing: written in the background, named when whole, checked to the last bit before use."""

from ldm.checkpoints.folders import NAME, Checkpoints, step_of
from ldm.checkpoints.fragments import Fragments, Span
from ldm.checkpoints.manifest import Digest, fault, seal, sealed
from ldm.checkpoints.saver import STATE, Saver, Status

__all__ = [
    "NAME",
    "STATE",
    "Checkpoints",
    "Digest",
    "Fragments",
    "Saver",
    "Span",
    "Status",
    "fault",
    "seal",
    "sealed",
    "step_of",
]
