"""Guidance: two functions denoise(x_t, t) -> x0_hat made into one, and what training must do for it."""

from collections.abc import Callable, Sequence

from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]


def classifier_free(denoise_cond: Denoise, denoise_uncond: Denoise, scale: float) -> Denoise:
    """x0_uncond + scale (x0_cond - x0_uncond). Ho & Salimans 2022 (arXiv 2207.12598), eq. 6, scale = 1 + w.

    eps, v and velocity are affine in x0 at fixed x_t and t, so guiding any of them with this scale is the
    same. At scale 1 the unconditional function is never called.
    """
    if scale == 1:
        return denoise_cond

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        x0_uncond = denoise_uncond(x_t, t)
        return x0_uncond + scale * (denoise_cond(x_t, t) - x0_uncond)

    return denoise


def drop_captions(captions: Sequence[str], uniforms: Tensor, share: float) -> list[str]:
    """The captions, that share of them replaced by "": each where its own number in [0, 1), B, is below `share`.

    So one network learns the unconditional answer too, which guidance needs. Ho & Salimans 2022, algorithm 1.
    """
    dropped = (uniforms < share).tolist()
    return ["" if drop else caption for drop, caption in zip(dropped, captions, strict=True)]
