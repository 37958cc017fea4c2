"""Whose a model is: what is asked for in a run's configuration, and what its model card says."""

from __future__ import annotations

import re
from dataclasses import dataclass

LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """What a published model says of its owners; what is left out is inherited from the models that it began with."""

    license: str | None = None  # by the Hub's identifier, as cc-by-4.0; "other" if several apply
    base_model: str | None = None  # what the weights were fine-tuned from, as owner/name on the Hub
    datasets: tuple[str, ...] = ()  # names of what it was trained on
    pictures: int | None = None  # trained on; None: counted when training begins
    credits: tuple[str, ...] = ()  # whom the licences of pictures and parts require to be named, one entry each

    def __post_init__(self) -> None:
        if self.license is not None and LICENSE.fullmatch(self.license) is None:
            raise ValueError(
                f"publish.license is {self.license!r}, expected an identifier of the Hub, as cc-by-4.0, apache-2.0 or "
                "other; say more in publish.credits"
            )
        if any(not text.strip() or "\n" in text for text in (*self.datasets, self.base_model or "-")):
            raise ValueError("publish.datasets and publish.base_model are names, each on one line: mend them")
        if any(not text.strip() for text in self.credits):
            raise ValueError("publish.credits has an empty entry: remove it")

    @property
    def is_empty(self) -> bool:
        return self == PublishConfig()
