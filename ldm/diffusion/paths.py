"""Noise paths x_t = alpha(t) x_0 + sigma(t) eps, from data (t = 0) to noise (t = 1).

A path is a frozen config that is used directly: its methods take times of any shape, each in [0, 1] (not
checked), and return a tensor of that shape, dtype and device. Keep times on the CPU: the tables are
computed there, in float64, which not every accelerator has, and times from elsewhere cost a copy each way.

    alpha, sigma        the shares of data and noise
    d_alpha, d_sigma    their derivatives by t
    log_snr             log(alpha^2 / sigma^2), falling from +infinity; its inverse is time_of_log_snr, and
                        log_snr_range where it is finite
    input_scale         what x_t is multiplied by before the network sees it
    timesteps           what the network's time embedding sees
    training_times      uniform numbers -> times to train at
    default_grid        the name of the time grid that is drawn with where none is asked for
    snap                times moved to the nearest ones that the network was trained at
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

    1 on tables, and at t = 1 but on EDM's path. (Where alpha is not 0 there, as in Stable Diffusion, x_t still holds a
    little of the data; everybody starts from plain noise all the same.)
    """
    t = torch.tensor(start, dtype=torch.float64)
    return (path.alpha(t) ** 2 * path.sigma_data**2 + path.sigma(t) ** 2).sqrt().item()
