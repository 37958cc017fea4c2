"""Parts of a model that the user gives in place of its own, which it need not have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ldm.interop.weight_reader import Weights
from ldm.model.components import LoadedDenoiser
from ldm.model.conditioner import TextTower
from vae.autoencoder import AutoencoderKL, AutoencoderKLConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenParts:
    """None: the model's own part is read."""

    vae: Callable[[AutoencoderKLConfig | None], AutoencoderKL] | None = None  # gets the own one's configuration, if any
    towers: tuple[TextTower, ...] | None = None
    # The denoiser's weights, of a run: from its network, and its folder in the run's last export.
    denoiser: Callable[[LoadedDenoiser, Path], Weights] | None = None

    def check(self, source: Path, *, has_vae: bool, has_text: bool) -> None:
        """Raise ValueError, naming the options, if a part is neither in the model nor given."""
        lacking = {
            "no autoencoder (--vae, in Python vae=)": not has_vae and self.vae is None,
            "no text encoder (--text, in Python text=)": not has_text and self.towers is None,
        }
        refuse_without(source, [words for words, lacks in lacking.items() if lacks])


NONE_GIVEN = GivenParts()


def refuse_without(source: Path, lacking: Iterable[str]) -> None:
    """Raise ValueError if anything is lacking."""
    if words := " and ".join(lacking):
        raise ValueError(
            f"{source} has {words}: give such a part with the option, or a complete model: a part may be a folder in "
            "diffusers' layout, a file of its own, or a model that has it"
        )
