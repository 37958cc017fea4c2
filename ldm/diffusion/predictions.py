"""Predictions of the network and their conversion to x0_hat: only this file knows eps, v, velocity and F.

With x_t = alpha x_0 + sigma eps, and ' for d/dt:

    x0        the data
    eps       the noise                                    Ho et al. 2020 (arXiv 2006.11239), eq. 14
    v         alpha eps - sigma x_0                        Salimans & Ho 2022 (arXiv 2202.00512), appendix D
    velocity  dx_t/dt = alpha' x_0 + sigma' eps            Lipman et al. 2022 (arXiv 2210.02747); eps - x_0 on
                                                           rectified flow
    edm       F, of unit variance at every time if the     Karras et al. 2022 (arXiv 2206.00364), eqs. 7-8; on
              data's is sigma_data^2                       other paths than theirs, where sigma_data = 1, it is
                                                           v negated: F = -v / sqrt(alpha^2 + sigma^2)

All are equivalent: x_t and any one of them give the others. Shapes: x_t, x_0, eps and outputs B x ...; times () or B,
one per sample.
"""

from typing import Literal, assert_never

import torch
from torch import Tensor

from ldm.diffusion.paths import PathConfig

Prediction = Literal["eps", "v", "x0", "velocity", "edm"]

SMALLEST_ALPHA = 2.0**-12  # as in diffusers: alpha_bar = 2^-24


def expand_times(values: Tensor, x: Tensor) -> Tensor:
    """Reshape numbers of shape () or B to broadcast against x of shape B x ..., in x's dtype and on its device.

    Without this, B numbers would broadcast along the last axis of x, silently if its length is B or 1.
    """
    if values.ndim > 1 or (values.ndim == 1 and len(values) != len(x)):
        raise ValueError(
            f"times of shape {tuple(values.shape)} do not fit a batch of shape {tuple(x.shape)}: "
            f"give one time, or {len(x)}"
        )
    return values.to(device=x.device, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def noise_sample(x0: Tensor, eps: Tensor, path: PathConfig, t: Tensor) -> Tensor:
    """x_t = alpha x_0 + sigma eps."""
    return expand_times(path.alpha(t), x0) * x0 + expand_times(path.sigma(t), x0) * eps


def network_input(x_t: Tensor, path: PathConfig, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return x_t scaled for the network, and the timesteps, B float32; t is () or B."""
    timesteps = path.timesteps(t).to(device=x_t.device, dtype=torch.float32).expand(len(x_t))
    return expand_times(path.input_scale(t), x_t) * x_t, timesteps


def v_target(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """v = alpha eps - sigma x_0."""
    return alpha * eps - sigma * x0


def velocity_target(x0: Tensor, eps: Tensor, d_alpha: Tensor, d_sigma: Tensor) -> Tensor:
    """u = alpha' x_0 + sigma' eps."""
    return d_alpha * x0 + d_sigma * eps


def edm_target(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """F = (x_0 - c_skip x_t) / c_out = (sigma x_0 / s - alpha s eps) / sqrt(alpha^2 s^2 + sigma^2), s = sigma_data.

    The second form, without a division by sigma, follows from the first by inserting x_t.
    """
    return (sigma / sigma_data * x0 - alpha * sigma_data * eps) / (alpha**2 * sigma_data**2 + sigma**2).sqrt()


def eps_from_x0(x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """eps = (x_t - alpha x_0) / sigma; 0 at sigma = 0, where x_t = alpha x_0 does not depend on it."""
    return (x_t - alpha * x0) / sigma.where(sigma > 0, 1.0)


def x0_from_eps(eps: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_0 = (x_t - sigma eps) / alpha; at alpha = 0, where x_t does not depend on x_0, as if alpha were 2^-12."""
    return (x_t - sigma * eps) / alpha.clamp(min=SMALLEST_ALPHA)


def x0_from_v(v: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_0 = (alpha x_t - sigma v) / (alpha^2 + sigma^2); the divisor is 1 on variance-preserving paths."""
    return (alpha * x_t - sigma * v) / (alpha**2 + sigma**2)


def x0_from_velocity(u: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, d_alpha: Tensor, d_sigma: Tensor) -> Tensor:
    """x_0 = (sigma' x_t - sigma u) / (sigma' alpha - sigma alpha'): x_t and u solved for x_0 and eps.

    The divisor is alpha sigma times the rate at which log(alpha / sigma) decreases: positive on every path, 1 on
    rectified flow. At sigma = 0, where sigma' may be 0 or infinite, this reduces to x_t / alpha.
    """
    d_sigma = d_sigma.where(sigma > 0, 1.0)
    return (d_sigma * x_t - sigma * u) / (d_sigma * alpha - sigma * d_alpha)


def x0_from_edm(f: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """x_0 = c_skip x_t + c_out F, c_skip = alpha s^2 / (alpha^2 s^2 + sigma^2), c_out = sigma s / sqrt(the same)."""
    variance = alpha**2 * sigma_data**2 + sigma**2  # of x_t
    return alpha * sigma_data**2 / variance * x_t + sigma * sigma_data / variance.sqrt() * f


def score(x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The gradient of log q(x_t | x_0) by x_t, -eps / sigma: (alpha x_0 - x_t) / sigma^2.

    With the ideal x0_hat it is the gradient of log q(x_t). Song et al. 2020 (arXiv 2011.13456), section 3.3.
    """
    return (alpha * x0 - x_t) / sigma**2


def target(prediction: Prediction, x0: Tensor, eps: Tensor, path: PathConfig, t: Tensor) -> Tensor:
    """Compute the network's training target at x_t and time t.

    Finite for every t, except for velocity on table paths at t = 0, where sigma' is infinite.
    """
    alpha, sigma = expand_times(path.alpha(t), x0), expand_times(path.sigma(t), x0)
    match prediction:
        case "x0":
            return x0
        case "eps":
            return eps
        case "v":
            return v_target(x0, eps, alpha, sigma)
        case "velocity":
            d_alpha, d_sigma = expand_times(path.d_alpha(t), x0), expand_times(path.d_sigma(t), x0)
            return velocity_target(x0, eps, d_alpha, d_sigma)
        case "edm":
            return edm_target(x0, eps, alpha, sigma, path.sigma_data)
        case _:
            assert_never(prediction)


def to_x0(prediction: Prediction, output: Tensor, x_t: Tensor, path: PathConfig, t: Tensor) -> Tensor:
    """Convert the network's output at x_t and time t to x0_hat, of x_t's shape. Finite for every t."""
    alpha, sigma = expand_times(path.alpha(t), x_t), expand_times(path.sigma(t), x_t)
    match prediction:
        case "x0":
            return output
        case "eps":
            return x0_from_eps(output, x_t, alpha, sigma)
        case "v":
            return x0_from_v(output, x_t, alpha, sigma)
        case "velocity":
            d_alpha, d_sigma = expand_times(path.d_alpha(t), x_t), expand_times(path.d_sigma(t), x_t)
            return x0_from_velocity(output, x_t, alpha, sigma, d_alpha, d_sigma)
        case "edm":
            return x0_from_edm(output, x_t, alpha, sigma, path.sigma_data)
        case _:
            assert_never(prediction)


def from_x0(prediction: Prediction, x0: Tensor, x_t: Tensor, path: PathConfig, t: Tensor) -> Tensor:
    """Convert x0_hat to the network's output, the inverse of to_x0. Finite where target is."""
    alpha, sigma = expand_times(path.alpha(t), x_t), expand_times(path.sigma(t), x_t)
    return target(prediction, x0, eps_from_x0(x0, x_t, alpha, sigma), path, t)


def x0_sensitivity(prediction: Prediction, path: PathConfig, t: Tensor) -> Tensor:
    """(d x0_hat / d output)^2 at times t: converts a weight on x0's error to one on the output's.

    x0_hat is jointly linear in x_t and the output, so it is x0_hat for an output of 1 at x_t = 0.
    """
    return to_x0(prediction, torch.ones_like(t), torch.zeros_like(t), path, t) ** 2
