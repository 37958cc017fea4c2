"""Which checkpoint a run goes on from: the newest that is as it was written, or the one that was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ldm.errors import CheckpointError
from ldm.training.checkpoints import NAME, STATE, Checkpoints, fault, step_of
from ldm.training.checkpoints.train_state import read_record
from ldm.training.configs import check_continues
from ldm.training.engine.distributed import Ranks
from ldm.training.engine.engine import Engine
from ldm.training.run import Run


def resume(run: Run, engine: Engine, world: Ranks, *, data: dict[str, Any]) -> dict[str, Any] | None:
    """Load the checkpoint that run.resume asks for, if there is one, and make the run's folder; returns its record.

    data: the shards' fingerprint. Raises CheckpointError if there are checkpoints, but none that can be used: a run
    never begins again by itself; ValueError if configuration or data are not those that it began with.
    """
    run.lock()
    chosen = choose(run, world)
    record = None
    if chosen is not None:
        check_record(read_record(chosen), run, data)  # first: it says more than a tensor's size
        record = engine.load(chosen)
        run.checkpoints.trust(chosen)
        ranks = "" if record["ranks"] == world.ranks else f", which {record['ranks']} ranks wrote"
        run.tell(f"resumed from {chosen}{ranks}")
        if record["precision"] != engine.precision:
            run.tell(f"the forward pass runs in {engine.precision} from now on, it was {record['precision']} before")
        run.rewound_to = rewound_to(run, chosen, record)
        if engine.step > run.config.steps:
            raise ValueError(
                f"run.steps is {run.config.steps}, but {chosen} has taken {engine.step}: "
                f"set run.steps={engine.step} or more, or another run.name"
            )
    run.begin(None if chosen is None else engine.step)
    return record


def check_record(record: dict[str, Any], run: Run, data: dict[str, Any]) -> None:
    """Raises ValueError if what the numbers depend on is not as it was."""
    then = record["data"]
    before, now = then.get("contents"), data["contents"]
    known = before is not None and now is not None
    check_continues(then=record["config"], now=run.config_text, same_shards=known and before == now)
    if any(then[key] != data[key] for key in ("shards", "samples", "sha256")):
        raise ValueError(
            f"the data are not those that this run began with: then {then['samples']} samples in {then['shards']} "
            f"shards, now {data['samples']} in {data['shards']}, or the same in other shares: bring them back, or give "
            "another run.name"
        )
    if known and before != now:
        raise ValueError(
            "the shards hold as many samples as when this run began but, by the sha256 of their manifests, other ones: "
            "bring them back, or give another run.name"
        )


def listed(checkpoints: Checkpoints, world: Ranks) -> list[Path]:
    """The checkpoints as the main rank sees them: another's view of a shared folder may be older."""
    steps = world.broadcast([float(step_of(path)) for path in checkpoints.all()] if world.is_main else [])
    return [checkpoints.path(int(step)) for step in steps]


def choose(run: Run, world: Ranks) -> Path | None:
    own = listed(run.checkpoints, world)
    if run.config.resume in ("auto", "never"):
        return newest_good(run, run.checkpoints, world) if own else None
    asked = Path(run.config.resume)
    if asked.resolve().parent == run.checkpoints.folder.resolve():
        return rewound(run, run.checkpoints.folder / asked.name, world)
    if own:  # the same command was started again, after it had begun
        run.tell(f"{run.config.path} has checkpoints of its own, so run.resume={asked} is not looked at")
        return newest_good(run, run.checkpoints, world)
    if NAME.fullmatch(asked.name):
        return checked(asked, world)
    others = Checkpoints(asked / "checkpoints", keep=1)
    if not listed(others, world):
        raise CheckpointError(f"run.resume is {asked}, which is no checkpoint, nor a run that has any: give another")
    return newest_good(run, others, world)


def rewound_to(run: Run, chosen: Path, record: dict[str, Any]) -> str | None:
    """The checkpoint that this run was last sent back to, for its later ones to tell."""
    asked = Path(run.config.resume)
    sent_back = chosen.parent == run.checkpoints.folder and chosen.name == asked.name
    return asked.name if sent_back else record.get("rewound_to")


def newest_good(run: Run, checkpoints: Checkpoints, world: Ranks) -> Path:
    """The newest that is as it was written; damaged ones that are newer are set aside, and named."""
    damaged: list[Path] = []
    for path in reversed(listed(checkpoints, world)):
        reason = damage(path, world)
        if reason is None:
            set_aside(run, checkpoints, damaged, world)
            return path
        damaged.append(path)
        run.tell(f"checkpoint {path} is damaged ({reason})")
    raise CheckpointError(
        f"none of the {len(damaged)} checkpoints in {checkpoints.folder} is as it was written: give another run.name"
    )


def set_aside(run: Run, checkpoints: Checkpoints, damaged: list[Path], world: Ranks) -> None:
    if damaged and world.is_main and checkpoints is run.checkpoints:
        for path in damaged:
            run.tell(f"{path.name} is now {checkpoints.set_aside(path, 'damaged').name}")
    world.any_rank(False)  # no rank looks at the folder again before this is done


def rewound(run: Run, path: Path, world: Ranks) -> Path:
    """A checkpoint of this run itself, whose later ones are set aside: they are of a past that did not happen.

    Where the later ones already came after that, the same command was started again: it goes on from the newest.
    """
    named = NAME.fullmatch(path.name) is not None
    later = [other for other in listed(run.checkpoints, world) if named and step_of(other) > step_of(path)]
    if world.any_rank(world.is_main and bool(later) and told_of_rewinding(later[-1]) == path.name):
        run.tell(f"this run was sent back to {path.name} before, and goes on from its newest checkpoint")
        return newest_good(run, run.checkpoints, world)
    checked(path, world)
    world.any_rank(False)  # every rank has looked
    if world.is_main:
        for other in later:
            run.tell(f"{other.name} is now {run.checkpoints.set_aside(other, 'aside').name}")
    world.any_rank(False)
    return path


def told_of_rewinding(checkpoint: Path) -> str | None:
    """To which checkpoint its run had been sent back; None too, if it cannot be read."""
    try:
        return json.loads((checkpoint / STATE).read_text()).get("rewound_to")
    except (OSError, ValueError, AttributeError):
        return None


def checked(path: Path, world: Ranks) -> Path:
    """Raises CheckpointError if a checkpoint that was asked for is not as it was written."""
    reason = damage(path, world)
    if reason is not None:
        raise CheckpointError(f"{path}, which run.resume asks for, is damaged ({reason}): give another")
    return path


def damage(path: Path, world: Ranks) -> str | None:
    """What is wrong with a checkpoint, the same on every rank; each rank reads a part of it."""
    mine = fault(path, part=world.rank, parts=world.ranks)
    if not world.any_rank(mine is not None):
        return None
    if mine is not None and not world.is_main:
        print(f"rank {world.rank}: {path}: {mine}", flush=True)
    return mine or "another rank says where"
