"""Guidance as a drawing's options select it."""

from __future__ import annotations

from typing import cast

from ldm.inference.options import DrawOptions
from ldm.samplers import Denoise
from ldm.samplers.guidance import Schedule, classifier_free, projected, rescaled, scheduled, within_interval


def guided(with_prompt: Denoise, without: Denoise, scale: float, options: DrawOptions) -> Denoise:
    """Return denoise(x_t, t) with the guidance that the options select, from those with the prompts and with the
    negative ones."""
    over_time = scheduled(cast(Schedule, options.guidance_schedule), scale)
    if options.is_projected:
        keep, limit, momentum = options.guidance_parallel, options.guidance_norm_limit, options.guidance_momentum
        denoise = projected(with_prompt, without, over_time, parallel=keep, norm_limit=limit, momentum=momentum)
    elif options.guidance_rescale:
        denoise = rescaled(with_prompt, without, over_time, options.guidance_rescale)
    else:
        denoise = classifier_free(with_prompt, without, over_time)
    if options.guidance_interval != (0.0, 1.0):
        denoise = within_interval(denoise, with_prompt, *options.guidance_interval)
    return denoise
