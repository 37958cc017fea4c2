"""Select the checkpoint that a run resumes from: the newest valid one, or the one that run.resume names; and whether
a run that began with one configuration may go on with another."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.config import ReadingConfig
from data.loader import CaptionedImages
from data.sources import shown
from ldm.config import dump, parse, read_tree
from ldm.errors import CheckpointError
from ldm.files.checkpoints import NAME, Checkpoints, fault, step_of
from ldm.files.paths import user_path
from ldm.training.checkpoints.train_state import TrainState, read_train_state
from ldm.training.engine.config import OptimConfig
from ldm.training.engine.distributed import Ranks
from ldm.training.engine.engine import Engine
from ldm.training.optim.lr_schedule import lr_at
from ldm.training.run import Run, is_allowable

# No number depends on these settings: they may differ on resume.
FREE_OF_ENGINE = ("zero_stage", "accumulation", "offload", "recompute", "threads", "save_in_background", "hang_seconds")
READING = {entry.name for entry in dataclasses.fields(ReadingConfig)}  # how shards are reached


def resume(run: Run, engine: Engine, world: Ranks, *, config: Any, images: CaptionedImages) -> TrainState | None:
    """Load the checkpoint that run.resume selects, if any, and create the run's folder; returns its state.

    Raises CheckpointError if there are checkpoints, but none is valid: a run never starts over by itself. Raises
    ValueError if the configuration or the data have changed since the run began.
    """
    run.lock()
    chosen = choose(run, world)
    state = None
    if chosen is not None:
        # First: its errors say more than one about a tensor's size.
        saved = read_train_state(chosen)
        changes = check_state(saved, config, images.fingerprint)
        optimizer = read_tree(saved.config)["optim"].get("optimizer", OptimConfig.optimizer)
        state = engine.load(chosen, fresh=optimizer != config.optim.optimizer)
        run.checkpoints.trust(chosen)
        ranks = "" if state.ranks == world.ranks else f", written by {state.ranks} ranks"
        run.log(f"resumed from {chosen}{ranks}")
        for line in [*changes, *changed_schedule(state, config)]:
            run.log(line)
        if state.precision != engine.precision:
            run.log(f"the forward pass now runs in {engine.precision}; before, it ran in {state.precision}")
        run.rewound_to = rewound_to(run, chosen, state)
        if engine.step > run.config.steps:
            raise ValueError(
                f"run.steps is {run.config.steps}, but {chosen} is already at step {engine.step}: "
                f"set run.steps={engine.step} or more, or another run.name"
            )
    settle_lanes(run, config, images, None if state is None else state.config)
    run.begin(None if chosen is None else engine.step)
    return state


def settle_lanes(run: Run, config: Any, images: CaptionedImages, then: str | None) -> None:
    """Record the number of lanes in the run's configuration; if data.lanes is not given, a resumed run keeps its own.

    then: the configuration of the checkpoint that is resumed, if any.
    """
    if config.data.lanes is None:
        before = None if then is None else read_tree(then)["data"]["lanes"]
        if before is not None:
            deal_as_before(config, images, before)
        kept = images.order.lanes == before
        run.log(f"data.lanes is {images.order.lanes}{', as when this run began' if kept else ' by default'}")
    pictures = config.publish.pictures or images.available
    data, publish = replace(config.data, lanes=images.order.lanes), replace(config.publish, pictures=pictures)
    run.config_text = dump(replace(config, data=data, publish=publish))


def deal_as_before(config: Any, images: CaptionedImages, lanes: int) -> None:
    """Deal the shards to the lanes with which the run began; to the default number if run.allow names data to which
    these do not fit."""
    default = images.order.lanes
    try:
        images.deal(lanes)
    except ValueError:
        if not any(key.startswith("data.") for key in config.run.allow):
            raise
        images.deal(default)


def changed_schedule(state: TrainState, config: Any) -> list[str]:
    """Return a line if run.steps has changed, and with it the learning rate from here on; otherwise nothing."""
    before, now = read_tree(state.config)["run"]["steps"], config.run.steps
    rates = [lr_at(config.optim, state.step, steps) for steps in (before, now)]
    if abs(rates[0] - rates[1]) <= 0.01 * rates[1]:
        return []
    return [
        f"run.steps is {now} from now on, it was {before}: the schedule {config.optim.schedule} ends with the run, so "
        f"the learning rate of the next step is {rates[1]:.2e} instead of {rates[0]:.2e}"
    ]


def check_state(state: TrainState, config: Any, data: dict[str, Any]) -> list[str]:
    """Raise ValueError if a setting or shard that affects the result has changed since the run began.

    Returns a line for each change that run.allow made possible.
    """
    then = state.data
    before, now = then.get("contents"), data["contents"]
    known = before is not None and now is not None
    changes = check_continues(then=state.config, now=config, same_shards=known and before == now)
    other = ""
    if any(then[key] != data[key] for key in ("shards", "samples", "sha256")):
        other = (
            f"the data are not those that this run began with: then {then['samples']} samples in {then['shards']} "
            f"shards, now {data['samples']} in {data['shards']}, or as many, split differently"
        )
    elif known and before != now:
        other = (
            "the shards hold as many samples as when this run began but, by the sha256 of their manifests, different "
            "ones"
        )
    if other and not any(key in config.run.allow for key in ("data.shards", "data.sets")):
        raise ValueError(f"{other}: restore the data, allow it with run.allow=[data.shards], or give another run.name")
    return [*changes, *([f"{other} (run.allow)"] if other else [])]


def listed(checkpoints: Checkpoints, world: Ranks) -> list[Path]:
    """List the checkpoints as the main rank sees them: on a shared folder, another rank may see older contents."""
    steps = world.broadcast([float(step_of(path)) for path in checkpoints.all()] if world.is_main else [])
    return [checkpoints.path(int(step)) for step in steps]


def choose(run: Run, world: Ranks) -> Path | None:
    own = listed(run.checkpoints, world)
    if run.config.resume in ("auto", "never"):
        return newest_good(run, run.checkpoints, world) if own else None
    asked = user_path(run.config.resume)
    if asked.resolve().parent == run.checkpoints.folder.resolve():
        return rewound(run, run.checkpoints.folder / asked.name, world)
    if own:  # the same command was restarted after the run had begun
        run.log(f"{run.config.path} has checkpoints of its own, so run.resume={asked} is ignored")
        return newest_good(run, run.checkpoints, world)
    if NAME.fullmatch(asked.name):
        return checked(asked, world)
    others = Checkpoints(asked / "checkpoints", keep=1)
    if not listed(others, world):
        raise CheckpointError(
            f"run.resume is {asked}, which is neither a checkpoint nor a run with checkpoints: give another"
        )
    return newest_good(run, others, world)


def rewound_to(run: Run, chosen: Path, state: TrainState) -> str | None:
    """Return the checkpoint that this run was last rewound to, to be recorded in its later ones."""
    asked = user_path(run.config.resume)
    rewinding = chosen.parent == run.checkpoints.folder and chosen.name == asked.name
    return asked.name if rewinding else state.rewound_to


def newest_good(run: Run, checkpoints: Checkpoints, world: Ranks) -> Path:
    """Find the newest valid checkpoint; newer, damaged ones are logged and renamed."""
    damaged: list[Path] = []
    for path in reversed(listed(checkpoints, world)):
        reason = damage(path, world)
        if reason is None:
            set_aside(run, checkpoints, damaged, world)
            return path
        damaged.append(path)
        run.log(f"checkpoint {path} is damaged ({reason})")
    raise CheckpointError(
        f"none of the {len(damaged)} checkpoints in {checkpoints.folder} is valid: give another run.name"
    )


def set_aside(run: Run, checkpoints: Checkpoints, damaged: list[Path], world: Ranks) -> None:
    if damaged and world.is_main and checkpoints is run.checkpoints:
        for path in damaged:
            run.log(f"{path.name} is now {checkpoints.set_aside(path, 'damaged').name}")
    world.any_rank(False)  # a barrier: no rank lists the folder before the renames are done


def rewound(run: Run, path: Path, world: Ranks) -> Path:
    """Rewind the run to one of its own checkpoints; later ones are renamed: they belong to the abandoned branch.

    If the later ones were written after that rewind, the same command was restarted: it resumes from the newest.
    """
    named = NAME.fullmatch(path.name) is not None
    later = [other for other in listed(run.checkpoints, world) if named and step_of(other) > step_of(path)]
    if world.any_rank(world.is_main and bool(later) and recorded_rewind(later[-1]) == path.name):
        run.log(f"this run was rewound to {path.name} before, and resumes from its newest checkpoint")
        return newest_good(run, run.checkpoints, world)
    checked(path, world)
    world.any_rank(False)  # a barrier: every rank has checked it
    if world.is_main:
        for other in later:
            run.log(f"{other.name} is now {run.checkpoints.set_aside(other, 'aside').name}")
    world.any_rank(False)
    return path


def recorded_rewind(checkpoint: Path) -> str | None:
    """Read which checkpoint its run had been rewound to; None if to none, or if the record cannot be read."""
    with suppress(CheckpointError):
        return read_train_state(checkpoint).rewound_to


def checked(path: Path, world: Ranks) -> Path:
    """Return a checkpoint that was asked for. Raises CheckpointError if it is damaged."""
    reason = damage(path, world)
    if reason is not None:
        raise CheckpointError(f"{path}, which run.resume names, is damaged ({reason}): give another")
    return path


def damage(path: Path, world: Ranks) -> str | None:
    """Verify a checkpoint, each rank a part of it. All ranks agree on whether it is damaged."""
    mine = fault(path, part=world.rank, parts=world.ranks)
    if not world.any_rank(mine is not None):
        return None
    if mine is not None and not world.is_main:
        print(f"rank {world.rank}: {path}: {mine}", flush=True)
    return mine or "another rank reports where"


# Settings that change how a step is computed but not its result; they may differ on resume.
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
        unknown = key == "optim.ema_lengths" and not set(after[key]) <= set(before[key])  # of the steps until now
        if key not in now.run.allow or unknown:
            can = f", allow it with run.allow=[{key}]" if is_allowable(key) and not unknown else ""
            begin = f" with model.start={now.run.path}, which keeps the weights" if _keeps_weights(key, now) else ""
            was, now_is = (shown(leaves.get(key)) for leaves in (before, after))
            raise ValueError(
                f"{key} was {was!r} when this run began and is {now_is!r} now: set it back{can}, or begin anew under "
                f"another run.name{begin}"
            )
    anew = {"optim.optimizer": ", its moments begin anew"}
    return [
        f"{key} is {after.get(key)!r} from now on, it was {before[key]!r}{anew.get(key, '')} (run.allow)"
        for key in changed
    ]


def _keeps_weights(key: str, config: Any) -> bool:
    """Return whether model.start can begin another run with this one's weights, although the setting differs."""
    must_stay = key == "optim.ema_lengths" or not is_allowable(key)
    return config.kind == "denoiser" and not key.startswith("model.denoiser") and must_stay


def _is_free(key: str) -> bool:
    """Whether a setting may differ on resume without being asked for by name."""
    if key != "run.seed" and key.split(".")[0] in ("run", "preview", "validation", "publish"):
        return True
    if key in ("data.prefetch", "model.keep_latents") or key.removeprefix("data.") in READING:
        return True
    return key.removeprefix("engine.") in FREE_OF_ENGINE


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
