"""The registry of trainings: from a configuration's `kind` to its Task, imported on demand."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from ldm.files.messages import unknown_name
from ldm.training.task import Task


def _denoiser() -> type[Task[Any]]:
    from ldm.training.denoiser_task import DenoiserTask

    return DenoiserTask


def _vae() -> type[Task[Any]]:
    from ldm.training.vae_task import VAETask

    return VAETask


def _clip() -> type[Task[Any]]:
    from ldm.training.clip_task import CLIPTask

    return CLIPTask


TASKS: dict[str, Callable[[], type[Task[Any]]]] = {
    "denoiser": _denoiser,
    "vae": _vae,
    "clip": _clip,
}


def task_of(kind: object) -> type[Task[Any]]:
    """Return the class of a kind. Raises ValueError, which suggests the nearest, for an unknown kind."""
    if kind not in TASKS:
        raise unknown_name("kind of training", str(kind), {name: name for name in TASKS})
    return TASKS[str(kind)]()


def run_task(args: Namespace, *, default: str) -> None:
    """Run the training that --config describes. default: its kind if the file does not name one."""
    from ldm.config import load_tree, parse
    from ldm.training.faults.signals import StopSignal
    from ldm.training.loop import train
    from ldm.training.session import open_session

    stop = StopSignal()
    stop.listen()
    tree = load_tree(args.config, args.overrides)
    kind = task_of(tree.setdefault("kind", default))
    config = parse(kind.config_class, tree, source=args.config)
    session = open_session(config, stop, reader=kind.reader(config))
    train(session, kind(session))
