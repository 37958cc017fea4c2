"""Noise paths x_t = alpha(t) x_0 + sigma(t) eps, from data (t = 0) to noise (t = 1).

A path is a frozen config that is used directly: its methods take times of any shape, each in [0, 1] (not
checked), and return a tensor of that shape, dtype and device. Keep times on the CPU: the tables are
computed there, in float64, which some accelerators lack, and times on other devices are copied back and forth.

    alpha, sigma        the coefficients of data and noise
    d_alpha, d_sigma    their derivatives by t
    log_snr             log(alpha^2 / sigma^2), decreasing from +infinity; time_of_log_snr is its inverse, and
                        log_snr_range its finite range
    input_scale         the factor of x_t in the network's input
    timesteps           the input of the network's time embedding
    training_times      uniform numbers -> times to train at
    default_grid        the name of the default time grid for sampling
    snap                times -> the nearest times that the network was trained at
"""

import torch

from ldm.diffusion.edm_path import EDMPath
from ldm.diffusion.flow_path import RectifiedFlowPath
from ldm.diffusion.table_paths import BetaTablePath, CosinePath, LinearBetaPath, ScaledLinearBetaPath

__all__ = [
    "BetaTablePath",
    "CosinePath",
    "EDMPath",
    "LinearBetaPath",
    "PathConfig",
    "RectifiedFlowPath",
    "ScaledLinearBetaPath",
    "TablePath",
    "prior_std",
]

TablePath = LinearBetaPath | ScaledLinearBetaPath | CosinePath
PathConfig = TablePath | RectifiedFlowPath | EDMPath


def prior_std(path: PathConfig, start: float = 1.0) -> float:
    """Standard deviation of x_t at the time where sampling starts: sqrt(alpha^2 s^2 + sigma^2), s = sigma_data.

    It is 1 on table paths, and at t = 1 on all paths but EDM's. (If alpha is not 0 there, as in Stable Diffusion, x_t
    still contains a little of the data; sampling starts from plain noise all the same.)
    """
    t = torch.tensor(start, dtype=torch.float64)
    return (path.alpha(t) ** 2 * path.sigma_data**2 + path.sigma(t) ** 2).sqrt().item()
