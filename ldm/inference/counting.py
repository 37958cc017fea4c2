"""Count what a sampler does, from outside: the evaluations of its denoiser, and the steps that it has done."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ldm.samplers import Denoise

Progress = Callable[[int, int], object]  # (steps done, total steps)


class Evaluations:
    """Counts the evaluations of a denoiser in a drawing, by which A1111 counts a prompt's steps."""

    def __init__(self) -> None:
        self.done = 0

    def counting(self, denoise: Denoise) -> Denoise:
        def counting(x_t: Tensor, t: Tensor) -> Tensor:
            x0 = denoise(x_t, t)
            self.done += 1
            return x0

        return counting


def counted(denoise: Denoise, progress: Progress, times: Tensor, *, number: int, of: int) -> Denoise:
    """Wrap `denoise` to report progress: the steps done in batch `number` of `of`. Samplers do not report it."""
    done, steps = 0, len(times) - 1

    def counting(x_t: Tensor, t: Tensor) -> Tensor:
        nonlocal done
        x0 = denoise(x_t, t)
        reached = min(int((times > t).sum()) + 1, steps)  # some samplers evaluate twice, or in the middle of a step
        if reached > done:
            done = reached
            progress(number * steps + done, of * steps)
        return x0

    return counting
