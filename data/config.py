"""What is read, and how: the settings of data.loader."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Patterns = str | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """One of several sets of shards that are mixed."""

    name: str  # the set's order depends on it, not on the other sets
    shards: Patterns
    weight: float = 1.0  # its share of what is seen, beside those of the other sets

    def __post_init__(self) -> None:
        if not self.name or not self.shards:
            raise ValueError(f"a set of data.sets needs a name and shards, given {self.name!r} and {self.shards!r}")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"the weight of set {self.name} is {self.weight}, expected more than 0; or leave it out")


@dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """How shards are reached, and how many bad samples are borne."""

    manifest: str | None = None  # of shards that have none beside them, as those of a pipe: a file or URL
    allow_pipe: bool = False  # shards named pipe:COMMAND, which run a shell command
    cache: str | None = None  # folder that keeps remote shards; None: a temporary one, removed at the end
    cache_gb: float = 16.0  # kept there at most; two shards a lane always are
    max_bad_fraction: float = 0.01  # of the samples: where more cannot be used, an error

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_fraction <= 1 or not self.cache_gb > 0:
            raise ValueError(
                f"max_bad_fraction ({self.max_bad_fraction}) must be a share from 0 to 1, cache_gb ({self.cache_gb}) "
                "more than 0"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig(ReadingConfig):
    shards: Patterns = ()  # .tar files: brace ranges, globs, URLs, pipe:COMMAND
    sets: tuple[ShardSet, ...] = ()  # instead of shards: several sets, mixed by weight
    image_size: int = 64  # pixels a side
    batch_size: int = 64  # of all ranks together
    lanes: int = 1  # shards read side by side: more mix better; a multiple of the ranks, at most the shards (of a set)
    captions: Literal["best", "any"] = "any"  # of a sample with several: the first, or another at each visit
    prefetch: int = 2  # batches decoded ahead, in threads

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.shards) == bool(self.sets):
            raise ValueError("give data.shards, or data.sets to mix several: one of the two")
        names = [one.name for one in self.sets]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two of data.sets are named {twice}: rename one")
        if self.image_size < 1 or self.batch_size < 1 or self.prefetch < 0:
            raise ValueError(
                f"data.image_size ({self.image_size}) and data.batch_size ({self.batch_size}) must be at least 1, "
                f"data.prefetch ({self.prefetch}) at least 0"
            )

    @property
    def patterns(self) -> tuple[Patterns, ...]:
        """The patterns of each set, or of the one that there is."""
        return tuple(one.shards for one in self.sets) or (self.shards,)


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig(ReadingConfig):
    """Pictures to measure on: each once, with its best caption, at the size of those trained on."""

    shards: Patterns
    batch_size: int = 64  # pictures measured at once

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"validation.batch_size must be at least 1, not {self.batch_size}")
