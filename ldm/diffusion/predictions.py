"""What the network predicts, and how x0_hat follows from it: the one place that knows eps, v and velocity.

With x_t = alpha x_0 + sigma eps, and ' for d/dt:

    eps       the noise                                    Ho et al. 2020 (arXiv 2006.11239), eq. 14
    v         alpha eps - sigma x_0                        Salimans & Ho 2022 (arXiv 2202.00512), appendix D
    velocity  dx_t/dt = alpha' x_0 + sigma' eps            Lipman et al. 2022 (arXiv 2210.02747); eps - x_0 on
                                                           rectified flow

Shapes: x_t, x_0, eps and outputs B x ...; times () or B, one for each sample.
"""

from typing import Literal, assert_never

from torch import Tensor

from ldm.diffusion.paths import PathConfig

Prediction = Literal["eps", "v", "velocity"]


def expand_times(values: Tensor, x: Tensor) -> Tensor:
    """Numbers of shape () or B, made to broadcast against x of shape B x ..., in x's dtype and on its device.

    Without this, B numbers meet the last axis of x: silently so where that is B long, or 1.
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


def v_target(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """v = alpha eps - sigma x_0."""
    return alpha * eps - sigma * x0


def velocity_target(x0: Tensor, eps: Tensor, d_alpha: Tensor, d_sigma: Tensor) -> Tensor:
    """u = alpha' x_0 + sigma' eps."""
    return d_alpha * x0 + d_sigma * eps


def x0_from_eps(eps: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_0 = (x_t - sigma eps) / alpha. Not finite at alpha = 0, where x_t says nothing of x_0."""
    return (x_t - sigma * eps) / alpha


def x0_from_v(v: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_0 = (alpha x_t - sigma v) / (alpha^2 + sigma^2); the divisor is 1 on variance-preserving paths."""
    return (alpha * x_t - sigma * v) / (alpha**2 + sigma**2)


def x0_from_velocity(u: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, d_alpha: Tensor, d_sigma: Tensor) -> Tensor:
    """x_0 = (sigma' x_t - sigma u) / (sigma' alpha - sigma alpha'): x_t and u solved for x_0 and eps.

    The divisor is alpha sigma times the rate at which log(alpha / sigma) falls: positive on every path, 1 on
    rectified flow.
    """
    return (d_sigma * x_t - sigma * u) / (d_sigma * alpha - sigma * d_alpha)


def target(prediction: Prediction, x0: Tensor, eps: Tensor, path: PathConfig, t: Tensor) -> Tensor:
    """What the network should answer to x_t at time t.

    Finite for every t, but for velocity on table paths at t = 0, where sigma' is infinite.
    """
    match prediction:
        case "eps":
            return eps
        case "v":
            return v_target(x0, eps, expand_times(path.alpha(t), x0), expand_times(path.sigma(t), x0))
        case "velocity":
            d_alpha, d_sigma = expand_times(path.d_alpha(t), x0), expand_times(path.d_sigma(t), x0)
            return velocity_target(x0, eps, d_alpha, d_sigma)
        case _:
            assert_never(prediction)


def to_x0(prediction: Prediction, output: Tensor, x_t: Tensor, path: PathConfig, t: Tensor) -> Tensor:
    """x0_hat, of x_t's shape, from the network's output at x_t and time t.

    Finite but for eps where alpha = 0 (rectified flow at t = 1), and velocity on table paths at t = 0.
    """
    alpha, sigma = expand_times(path.alpha(t), x_t), expand_times(path.sigma(t), x_t)
    match prediction:
        case "eps":
            return x0_from_eps(output, x_t, alpha, sigma)
        case "v":
            return x0_from_v(output, x_t, alpha, sigma)
        case "velocity":
            d_alpha, d_sigma = expand_times(path.d_alpha(t), x_t), expand_times(path.d_sigma(t), x_t)
            return x0_from_velocity(output, x_t, alpha, sigma, d_alpha, d_sigma)
        case _:
            assert_never(prediction)
