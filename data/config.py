"""Settings of data.loader."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Patterns = str | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """One of several shard sets to mix."""

    name: str  # seeds the set's order, which does not depend on the other sets
    shards: Patterns
    weight: float = 1.0  # relative to those of the other sets

    def __post_init__(self) -> None:
        if not self.name or not self.shards:
            raise ValueError(f"a set of data.sets needs a name and shards, given {self.name!r} and {self.shards!r}")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"the weight of set {self.name} is {self.weight}, expected more than 0; or leave it out")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Which members of a shard make a sample, and which of its texts are captions."""

    # Endings of the picture's file, in order of preference, as [input.jpg]. Empty: those of data.shards.
    image_keys: tuple[str, ...] = ()
    # Where captions are, best first: the ending of a member (txt, outputs.txt); a key of the .json (json.caption), or
    # of an object in it (json.captions.en); a name that no member has is looked up in the .json.
    caption_keys: tuple[str, ...] = ("txt", "json.caption", "json.captions")
    caption_lines: Literal["joined", "separate"] = "joined"  # lines of a .txt: one caption, or one each
    missing_caption: Literal["reject", "empty"] = "reject"  # a picture without a caption: a bad sample, or captioned ""

    def __post_init__(self) -> None:
        for name in ("image_keys", "caption_keys"):
            if not all(key.strip(".") and "/" not in key for key in getattr(self, name)):
                raise ValueError(f"data.{name} holds {getattr(self, name)}, expected endings of names, as [input.jpg]")
        if not self.caption_keys:
            raise ValueError(
                "data.caption_keys is empty: name where captions are, as [txt, json.caption], or leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """How shards are accessed, and how many bad samples are tolerated."""

    manifest: str | None = None  # file or URL, for shards without a manifest next to them, such as pipes
    allow_pipe: bool = False  # shards named pipe:COMMAND, which run a shell command
    cache: str | None = None  # folder for copies of remote shards; None: a temporary one, removed at the end
    cache_gb: float = 16.0  # size limit of the cache; two shards per lane are always kept
    max_bad_fraction: float = 0.01  # fraction of bad samples above which it is an error
    max_missing_shards: float = 0.0  # fraction of the shards that may be missing at the start: their samples are lost

    def __post_init__(self) -> None:
        if not 0 <= self.max_missing_shards <= 1:
            raise ValueError(f"max_missing_shards ({self.max_missing_shards}) must be a fraction from 0 to 1")
        if not 0 <= self.max_bad_fraction <= 1 or not self.cache_gb > 0:
            raise ValueError(
                f"max_bad_fraction ({self.max_bad_fraction}) must be a fraction from 0 to 1, "
                f"cache_gb ({self.cache_gb}) more than 0"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig(ReadingConfig, SampleConfig):
    shards: Patterns = ()  # .tar files: paths, brace ranges, globs, URLs, pipe:COMMAND
    sets: tuple[ShardSet, ...] = ()  # instead of shards: several sets, mixed by weight
    image_size: int = 64  # pixels per side
    batch_size: int = 64  # over all ranks
    # Streams of samples read in parallel: more mix better. Beyond the number of shards (of a set), several lanes share
    # a shard. None: the largest divisor of batch_size up to 32, and up to the number of shards.
    lanes: int | None = None
    captions: Literal["best", "any"] = "any"  # of several: the first, or a random one at each visit
    prefetch: int = 2  # batches decoded ahead, in threads

    def __post_init__(self) -> None:
        ReadingConfig.__post_init__(self)
        SampleConfig.__post_init__(self)
        if bool(self.shards) == bool(self.sets):
            raise ValueError("give either data.shards or, to mix several sets, data.sets")
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
        """The patterns of each set, or of the only one."""
        return tuple(one.shards for one in self.sets) or (self.shards,)


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig(ReadingConfig):
    """Held-out images for evaluation: each once, with its best caption, at the training size."""

    shards: Patterns
    batch_size: int = 64  # images evaluated at once

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"validation.batch_size must be at least 1, not {self.batch_size}")
