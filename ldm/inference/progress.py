"""Count what a sampler does, from outside: the evaluations of its denoiser, and the steps that it has done."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ldm.samplers import Denoise

Progress = Callable[[int, int], object]  # (steps done, total steps)


def reporter(progress: Progress | None, steps: int, *, number: int, of: int) -> Callable[[int], None]:
    """Return a function that reports the steps reached in batch `number` of `of`, each once."""
    done = 0

    def report(reached: int) -> None:
        nonlocal done
        if progress is not None and reached > done:
            done = reached
            progress(number * steps + done, of * steps)

    return report


def counted(denoise: Denoise, report: Callable[[int], None], times: Tensor) -> Denoise:
    """Wrap `denoise` to report the step that it is in, since samplers do not."""

    def counting(x_t: Tensor, t: Tensor) -> Tensor:
        x0 = denoise(x_t, t)
        report(min(int((times > t).sum()) + 1, len(times) - 1))  # some evaluate twice, or in the middle of a step
        return x0

    return counting


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
