"""Decide which tensors of a file that no network of the model has may be ignored.

Every program that draws with such a file ignores them (diffusers and CompVis load without them and list their names),
so they change no picture: counters, optimiser states, embeddings that no prompt names. Two kinds are refused, because
they show that the file was made for another computation: a tensor in a module of one of the networks, and one of a
further network that takes part in the drawing.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path

from ldm.files.messages import some
from ldm.interop.identify import FOREIGN, WORDS

# LoRAs and their relatives, adapters, ControlNets, hypernetworks; and parts that other U-Nets of diffusers have.
CHANGES_PICTURES = re.compile(
    r"lora|lycoris|hada_|lokr_|oft_|dora|ia3|control|adapter|hypernet|motion_module|fuser"
    r"|\b(class_embedding|add_embedding|encoder_hid_proj|position_net|label_emb)\b",
    re.IGNORECASE,
)
EMBEDDINGS = "bundle_emb."  # textual inversions that come with a model, which only prompts with their words use
OTHER_NETWORKS = tuple(mark for foreign in FOREIGN if foreign.name != WORDS for mark in foreign.marks)


def extra_tensors(names: Iterable[str], *, wanted: Collection[str], modules: Collection[str]) -> list[str]:
    """List the names that may be ignored. modules: the beginnings of the names that belong to the networks."""
    beginnings = tuple(modules)
    return [
        name
        for name in names
        if name not in wanted
        and not name.startswith(beginnings)
        and (name.startswith(EMBEDDINGS) or not changes_pictures(name))
    ]


def changes_pictures(name: str) -> bool:
    """Return whether a tensor of this name belongs to a network that takes part in the drawing."""
    return bool(CHANGES_PICTURES.search(name)) or any(mark in name for mark in OTHER_NETWORKS)


def modules_of(wanted: Iterable[str]) -> set[str]:
    """Return the first modules of a network's parameters, each with its dot."""
    return {f"{name.partition('.')[0]}." for name in wanted}


def warn_of_extras(extras: Collection[str], source: Path) -> None:
    if extras:
        count = f"{len(extras)} tensor{'s' * (len(extras) > 1)}"
        warnings.warn(f"{source} has {count} that no network has, ignored: {some(extras)}", stacklevel=2)
