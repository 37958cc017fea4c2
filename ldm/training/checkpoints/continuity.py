"""Whether a run that began with one configuration may go on with another."""

from __future__ import annotations

import dataclasses
from typing import Any

from data.config import ReadingConfig
from ldm.config import dump, parse, read_tree
from ldm.training.run import ALLOWABLE

# Settings that change how a step is computed but not its result; they may differ on resume.
FREE_OF_ENGINE = tuple(
    f"engine.{key}"
    for key in ("zero_stage", "accumulation", "offload", "recompute", "save_in_background", "hang_seconds")
)
READING = {entry.name for entry in dataclasses.fields(ReadingConfig)}  # how shards are reached: no number depends on it


def check_continues(then: str, now: Any, *, same_shards: bool = False) -> list[str]:
    """Raise ValueError, naming the key, if a run that began with one configuration cannot go on with another.

    then: the text of `dump`; now: the configuration. How long a run goes on (with it, where its learning rate falls),
    what it shows and how its data are held ready may change; what else the numbers depend on may not, unless run.allow
    names it. A setting that did not exist when the run began had its default then. same_shards: they are known to hold
    the same, so they may lie elsewhere. Returns a line for each change that run.allow made possible.
    """
    tree = {"kind": now.kind} | read_tree(then)  # version 0.1 wrote no kind
    if tree["kind"] != now.kind:
        raise ValueError(
            f"this run is a training of kind {tree['kind']}, the configuration is of kind {now.kind}: give another "
            "run.name"
        )
    began = parse(type(now), tree, source="the configuration that this run began with")
    trees = [read_tree(dump(config)) for config in (began, now)]
    before, after = (_leaves(_placeless(tree) if same_shards else tree) for tree in trees)
    if now.data.lanes is None:
        after["data.lanes"] = before["data.lanes"]  # the number of lanes that was chosen stays
    changed = [key for key in sorted(before) if before[key] != after.get(key) and not _is_free(key)]
    for key in changed:
        if key not in now.run.allow:
            can = f", or allow it with run.allow=[{key}]" if key.split(".")[0] in ALLOWABLE else ""
            raise ValueError(
                f"{key} was {before[key]!r} when this run began and is {after.get(key)!r} now: set it back{can}, or "
                "begin anew under another run.name"
            )
    return [f"{key} is {after.get(key)!r} from now on, it was {before[key]!r} (run.allow)" for key in changed]


def _is_free(key: str) -> bool:
    """Whether a setting may differ on resume without being asked for by name."""
    if key != "run.seed" and key.split(".")[0] in ("run", "preview", "validation"):
        return True
    return key in ("data.prefetch", "model.keep_latents", *FREE_OF_ENGINE) or key.removeprefix("data.") in READING


def _placeless(tree: Any) -> Any:
    """A configuration that does not say where its shards are."""
    data = tree["data"] | {"shards": None, "sets": [one | {"shards": None} for one in tree["data"]["sets"]]}
    return tree | {"data": data}


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A tree of sections as {"section.key": value}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    return found
