"""Count what a sampler does, from outside: the evaluations of its denoiser, and the steps that it has done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ldm.samplers import Denoise

Progress = Callable[[int, int], object]  # (steps done, total steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step of the sampler, as a callback gets it: the pictures as they are expected to become."""

    number: int  # 1 to steps
    steps: int
    time: float  # at which it was estimated, from 1, the noise, to 0, the picture
    pictures: range  # which of the call's pictures are drawn together
    x0: Tensor  # B x C x h x w: the estimate of their latents, of unit variance


StepCallback = Callable[[Step], object]


@dataclass(kw_only=True)
class Reporter:
    """Reports the steps of one batch of pictures, each once."""

    progress: Progress | None
    callback: StepCallback | None
    steps: int
    before: int  # steps of earlier batches
    total: int  # steps of all
    pictures: range
    done: int = 0

    def reached(self, step: int) -> bool:
        """Report a step, unless it was; return whether it was not."""
        new = step > self.done
        if new:
            self.done = step
            if self.progress is not None:
                self.progress(self.before + step, self.total)
        return new

    def watching(self, denoise: Denoise, times: Tensor) -> Denoise:
        """Wrap `denoise` to report the step that it is in, since samplers do not."""
        if self.progress is None and self.callback is None:
            return denoise

        def watching(x_t: Tensor, t: Tensor) -> Tensor:
            x0 = denoise(x_t, t)
            step = min(int((times > t).sum()) + 1, len(times) - 1)  # some evaluate twice, or in the middle of a step
            if self.reached(step) and self.callback is not None:
                own = x0.clone()  # what is done to it must not change the picture
                self.callback(Step(number=step, steps=self.steps, time=float(t), pictures=self.pictures, x0=own))
            return x0

        return watching


def reporters(
    rounds: Sequence[Sequence[object]], steps: int, progress: Progress | None, callback: StepCallback | None
) -> list[Reporter]:
    """Return a reporter for each batch of a drawing. steps: of each."""
    total, first, found = len(rounds) * steps, 0, list[Reporter]()
    for number, batch in enumerate(rounds):
        own, before = range(first, first + len(batch)), number * steps
        report = Reporter(progress=progress, callback=callback, steps=steps, before=before, total=total, pictures=own)
        found.append(report)
        first = own.stop
    return found


class Evaluations:
    """Counts the evaluations of a denoiser in a drawing, by which A1111 counts a prompt's steps.

    wanted: whether anybody asks, as only a prompt that changes does.
    """

    def __init__(self, *, wanted: bool) -> None:
        self.done, self.wanted = 0, wanted

    def counting(self, denoise: Denoise) -> Denoise:
        if not self.wanted:
            return denoise

        def counting(x_t: Tensor, t: Tensor) -> Tensor:
            x0 = denoise(x_t, t)
            self.done += 1
            return x0

        return counting
