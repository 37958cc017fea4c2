"""What a training is. The loop and the engine know this class, never which training it is.

To add a training: one file with a configuration (TrainingConfig) and a Task, and one entry in ldm.training.tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from data.config import DataConfig, HeldOutConfig
from data.readers import ImageCaptionReader, Reader
from ldm.training.engine.config import EngineConfig, OptimConfig
from ldm.training.optim.optimizers import ParameterGroup
from ldm.training.run import RunConfig

if TYPE_CHECKING:
    from data.loader import Batch
    from ldm.training.session import Session


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What the configurations of all trainings have. Each has a `kind` of its own: Literal["..."] = "..."."""

    run: RunConfig
    data: DataConfig
    validation: HeldOutConfig
    optim: OptimConfig
    engine: EngineConfig = field(default_factory=EngineConfig)


Config = TypeVar("Config", bound=TrainingConfig)


class Task(ABC, Generic[Config]):
    """One training: a network, what it minimises, and what is measured, shown and written of it.

    Constructed on every rank. Whatever draws random numbers is a function of (run.seed, position of the sample).
    """

    config_class: ClassVar[type[TrainingConfig]]
    network: nn.Module  # what the engine trains; it may hold several

    def __init__(self, session: Session[Config]) -> None:
        """Set `network`, by build(), after session.seed()."""
        self.session, self.config = session, session.config

    @classmethod
    def reader(cls, config: Config) -> Reader:
        """What a sample becomes, in the loader's threads."""
        return ImageCaptionReader(config.data, seed=config.run.seed)

    @abstractmethod
    def build(self) -> nn.Module:
        """Build a fresh network."""

    @abstractmethod
    def losses(self, network: Callable[..., Any], batch: Batch, step: int) -> dict[str, Tensor]:
        """Return "loss", a scalar that is minimised, and other tensors, whose means are logged.

        network: this one, under the engine. batch: this rank's part of a global batch. step: optimiser steps taken.
        """

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup([p for p in self.network.parameters() if p.requires_grad])]

    def exported(self, name: str) -> bool:
        """Whether the network's tensor of this name is averaged and given out."""
        return True

    def averaged_network(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """Build a network with averaged weights, to be measured, shown and written."""
        network = self.build().to(self.session.world.device).eval().requires_grad_(False)
        network.load_state_dict(weights)
        return network

    def describe(self) -> list[str]:
        """Lines that are logged before the first step."""
        return []

    @abstractmethod
    def evaluate(self, network: Any) -> dict[str, float]:
        """Measure an averaged network. Every rank calls it and takes its part of session.held_out()."""

    def summarize(self, measures: Mapping[str, float]) -> str:
        """What the log says of these measures."""
        return "  ".join(f"{name} {value:.4g}" for name, value in measures.items())

    def show(self, step: int, network: Any, path: Path) -> None:
        """Write a sheet of what it can do to `path`, on the main rank."""

    def export(self, step: int, network: Any) -> None:
        """Write it for others to use, on the main rank, each time that it is shown."""

    def finish(self, network: Any) -> None:
        """Write what a complete run leaves, on the main rank."""

    def state_dict(self) -> dict[str, Any]:
        """What losses() remembers from step to step, as plain numbers, the same on every rank."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert not state
