"""Averages of the weights over training, and the reconstruction of averages that were never kept."""

from ldm.ema.average import EMA, WarmedUp
from ldm.ema.power import LONGEST, PowerProfile
from ldm.ema.reconstruction import Snapshot, mixture

__all__ = ["EMA", "LONGEST", "PowerProfile", "Snapshot", "WarmedUp", "mixture"]
