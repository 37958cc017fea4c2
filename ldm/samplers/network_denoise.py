"""The seam between networks and samplers."""

from __future__ import annotations

from torch import Tensor

from ldm.denoisers import Condition, Denoiser
from ldm.diffusion.paths import PathConfig
from ldm.diffusion.predictions import Prediction, network_input, to_x0


class NetworkDenoise:
    """denoise(x_t, t) -> x0_hat, the function that samplers take, for a network and a condition.

    t is one time for all of the batch. x_t stays float32 whatever the network's dtype, since a sampler adds many small
    steps.
    """

    def __init__(self, denoiser: Denoiser, condition: Condition, prediction: Prediction, path: PathConfig) -> None:
        self.denoiser, self.path = denoiser, path
        self.prediction: Prediction = prediction
        self.dtype = next(denoiser.parameters()).dtype
        self.condition = condition.to(self.dtype)
        self._variance: Tensor | None = None

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        scaled, timesteps = network_input(x_t, self.path, t)
        output = self.denoiser(scaled.to(self.dtype), timesteps, self.condition)
        self._variance = None if output.variance is None else output.variance.to(x_t.dtype)
        return to_x0(self.prediction, output.prediction.to(x_t.dtype), x_t, self.path, t)

    def variance(self) -> Tensor:
        """Return the variance of the network's last evaluation: see Output. The network must have learned one."""
        assert self._variance is not None, "the network has no learned variance, or was not evaluated yet"
        return self._variance
