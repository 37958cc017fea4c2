"""Checkpoints: written in the background, renamed into place when complete, verified by SHA-256 before use."""

from ldm.training.checkpoints.folders import NAME, Checkpoints, step_of
from ldm.training.checkpoints.fragments import Fragments, Span
from ldm.training.checkpoints.manifest import Digest, fault, seal, sealed
from ldm.training.checkpoints.saver import STATE, Saver, Status

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
