"""Draw the pictures of many requests, as the commands do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from ldm.inference.pipeline import TextToImage
from ldm.inference.progress import Progress
from ldm.inference.recipe import Drawing
from ldm.inference.request import DrawRequest


def draw_all(
    pipe: TextToImage,
    requests: Sequence[DrawRequest],
    *,
    n: int = 1,
    repeats: int = 1,
    started: Callable[[DrawRequest], object] | None = None,
    progress: Progress | None = None,
) -> Iterator[list[Drawing]]:
    """Draw n pictures of each request, `repeats` times, and yield n at a time. Seeds increase from the request's.

    started(request) is called before its first picture, progress(done, all) after each step. All requests are checked
    before anything is drawn. Raises ValueError, naming the value, for what cannot be drawn.
    """
    checked = [pipe.check(request).seeded(n * repeats) for request in requests]
    total, before = repeats * sum(request.steps for request in checked), 0

    def stepped(done: int, of_all: int) -> None:
        if progress is not None:
            progress(before + request.steps * done // of_all, total)

    for request in checked:
        if started is not None:
            started(request)
        for repeat in range(repeats):
            yield pipe.draw(replace(request, seed=request.seed + repeat * n), n=n, progress=stepped)
            before += request.steps
