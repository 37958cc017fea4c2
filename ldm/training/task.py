"""The interface of a training, and the registry of trainings: from a configuration's `kind` to its Task.

The loop and the engine know only the class Task, never which training it is. To add a training, write one file with a
configuration (TrainingConfig) and a Task, and add an entry to TASKS.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from data.config import DataConfig, HeldOutConfig
from data.readers import ImageCaptionReader, Reader
from ldm.files.messages import unknown_name
from ldm.interop.ownership import inherited
from ldm.model.ownership import PublishConfig
from ldm.training.engine.config import EngineConfig, OptimConfig
from ldm.training.optim.optimizers import ParameterGroup
from ldm.training.run import RunConfig

if TYPE_CHECKING:
    from data.loader import Batch
    from ldm.training.session import Session


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings common to all trainings. Each subclass adds a `kind` of its own: Literal["..."] = "..."."""

    run: RunConfig
    data: DataConfig
    validation: HeldOutConfig | None = None  # None: nothing is measured on held-out pictures
    optim: OptimConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)


Config = TypeVar("Config", bound=TrainingConfig)


class Task(ABC, Generic[Config]):
    """One training: a network, its loss, and how it is evaluated, shown and exported.

    Constructed on every rank. All random numbers must be a function of (run.seed, position of the sample).
    """

    config_class: ClassVar[type[TrainingConfig]]
    network: nn.Module  # trained by the engine; may contain several networks

    def __init__(self, session: Session[Config]) -> None:
        """Subclasses set `network`, by build(), after session.seed()."""
        self.session, self.config, self.device = session, session.config, session.world.device

    @classmethod
    def reader(cls, config: Config) -> Reader:
        """Return the reader that decodes samples in the loader's threads."""
        return ImageCaptionReader(config.data, seed=config.run.seed)

    @classmethod
    def begins_with(cls, config: Config) -> tuple[Path | None, tuple[Path, ...]]:
        """Return the model whose weights are trained on, if any, and those of which frozen parts are used."""
        return None, ()

    @abstractmethod
    def build(self) -> nn.Module:
        """Build a fresh network."""

    @abstractmethod
    def losses(self, network: Callable[..., Any], batch: Batch, step: int) -> dict[str, Tensor]:
        """Return "loss", a scalar to minimise, and other tensors, whose means are logged.

        network: self.network, called through the engine. batch: this rank's part of a global batch. step: optimiser
        steps taken.
        """

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup([p for p in self.network.parameters() if p.requires_grad])]

    def exported(self, name: str) -> bool:
        """Return whether the network's tensor of this name is averaged and exported."""
        return True

    def averaged_network(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """Build a network with averaged weights, for evaluation and export."""
        network = self.build().to(self.device).eval().requires_grad_(False)
        network.load_state_dict(weights)
        return network

    def describe(self) -> list[str]:
        """Return lines to log before the first step."""
        return []

    @abstractmethod
    def evaluate(self, network: Any) -> dict[str, float]:
        """Evaluate an averaged network. Every rank calls it and uses its part of session.held_out()."""

    def summarize(self, measures: Mapping[str, float]) -> str:
        """Format these measures for the log."""
        return "  ".join(f"{name} {value:.4g}" for name, value in measures.items())

    def show(self, step: int, network: Any, path: Path) -> None:
        """Write an image of the network's results to `path`, on the main rank."""

    def export(self, step: int, network: Any) -> None:
        """Export the network, on the main rank, each time that it is shown."""

    def measured(self, averaged: Callable[[], nn.Module], position: int) -> dict[str, Any]:
        """Return what a checkpoint records of the averaged weights, besides them, for those who read it as a model:
        plain numbers, the same on every rank, which all call it.

        averaged: builds the averaged network; every rank must call it, if any does. position: global batches used.
        """
        return {}

    def complete(self, network: Any) -> None:
        """Measure what a complete run's network lacks before finish(). Every rank calls it."""

    def finish(self, network: Any) -> None:
        """Write the results of a complete run, on the main rank."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that losses() keeps between steps, as plain numbers, the same on every rank."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert not state


# kind -> module and class, below this package: a command imports only the training that it runs.
TASKS = {
    "denoiser": "denoiser_task:DenoiserTask",
    "vae": "vae_task:VAETask",
    "clip": "clip_task:CLIPTask",
}


def task_of(kind: object) -> type[Task[Any]]:
    """Return the class of a kind. Raises ValueError, which suggests the nearest, for an unknown kind."""
    if kind not in TASKS:
        raise unknown_name("kind of training", str(kind), {name: name for name in TASKS})
    return resolve_name(f"{__package__}.{TASKS[str(kind)]}")


# Section that only one of the trainings has -> its kind and command.
COMMANDS = {
    "model": ("denoiser", "ldm/train.py"),
    "vae": ("vae", "vae/train.py"),
    "text": ("clip", "text/train.py"),
}


def check_command(tree: Mapping[str, Any], *, default: str, source: str) -> None:
    """Raise ValueError if a configuration that names no kind is another command's than that of kind `default`."""
    own = [command for kind, command in COMMANDS.values() if kind == default]
    for section, (kind, command) in COMMANDS.items():
        if section in tree and kind != default and own:
            raise ValueError(
                f"{source} has a section {section}, so it is for {command}, not for {own[0]}: start {command}, or give "
                "another configuration"
            )


def run_task(args: Namespace, *, default: str) -> None:
    """Run the training that --config describes. default: its kind if the file does not name one."""
    from ldm.config import load_tree, parse
    from ldm.training.faults.signals import StopSignal
    from ldm.training.loop import train
    from ldm.training.session import open_session

    stop = StopSignal()
    stop.listen()
    tree = load_tree(args.config, args.overrides)
    if "kind" not in tree:
        check_command(tree, default=default, source=args.config)
    kind = task_of(tree.setdefault("kind", default))
    config = parse(kind.config_class, tree, source=args.config)
    start, parts = kind.begins_with(config)
    config = replace(config, publish=inherited(config.publish, start=start, parts=parts))
    session = open_session(config, stop, reader=kind.reader(config))
    train(session, kind(session))
