"""What is said of samples that are used: parts of them that are not, and captions that are too long."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence

from data.bad_samples import BadSample, Quarantine
from data.config import SampleConfig
from data.shards import USUAL

MOST_LISTED = 1000  # samples with remarks in the file
MOST_MEASURED = 10_000  # captions: measuring costs as much as tokenizing


class Remarks:
    """Reports what of a usable sample is not used: the first of each kind of reason, and up to 1,000 in a file."""

    def __init__(
        self,
        listing: Quarantine | None,
        say: Callable[[str], None],
        config: SampleConfig = USUAL,
        *,
        samples: int = MOST_LISTED,
    ) -> None:
        """config: each name that it gives should be found among the first 1,000 of the `samples`."""
        self.listing, self.say = listing, say
        self._asked = {*config.image_keys, *config.caption_keys} - {*USUAL.caption_keys}
        self._most, self._seen = min(samples, MOST_LISTED), 0
        self._kinds: set[str] = set()
        self._listed: set[tuple[str, str, str]] = set()
        self._lock = threading.Lock()

    def find(self, names: Collection[str]) -> None:
        """Record the names that one more sample has; report those that none of the first samples has."""
        if not self._asked or self._seen >= self._most:
            return
        with self._lock:
            self._seen += 1
            self._asked -= set(names)
            last = self._seen == self._most and bool(self._asked)
        if last:
            self.say(
                f"none of the first {self._most:,} samples has {', '.join(sorted(self._asked))}, which data.image_keys "
                "or data.caption_keys names: look for a misspelling, or leave it out"
            )

    def add(self, remark: BadSample) -> None:
        kind, line = remark.reason.partition(" (")[0], (remark.shard, remark.key, remark.reason)
        with self._lock:
            first, listed = kind not in self._kinds, line not in self._listed and len(self._listed) < MOST_LISTED
            self._kinds.add(kind)
            if listed:
                self._listed.add(line)
        if first:
            where = "" if self.listing is None else f"; {self.listing.path} lists others"
            self.say(f"{remark}: the rest of the sample is used{where}")
        if listed and self.listing is not None:
            self.listing.add(remark)


class CutCaptions:
    """Counts captions that are longer than a text encoder reads, among the first 10,000 of this process."""

    def __init__(self, cut_off: Callable[[str], str], *, tokens: int, most: int = MOST_MEASURED) -> None:
        """cut_off: returns the end of a caption that does not fit, or ""; tokens: of the encoder's context; most: how
        many captions there are, if fewer."""
        self.cut_off, self.tokens = cut_off, tokens
        self.measured = self.cut = 0
        self._room = min(most, MOST_MEASURED)
        self._lock = threading.Lock()

    def measure(self, captions: Sequence[str]) -> None:
        with self._lock:
            own = captions[: self._room]
            self._room -= len(own)
        cut = sum(bool(self.cut_off(caption)) for caption in own)
        with self._lock:
            self.measured += len(own)
            self.cut += cut
