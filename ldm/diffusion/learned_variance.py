"""Learn the variance of the reverse steps from the terms of the variational bound.

Nichol & Dhariwal 2021 (arXiv 2102.09672), section 3.1; also used by DiT. B batch, C channels, h x w latents.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.diffusion.nodes import Step, ddpm_mean, learned_log_variance, nodes_at, variance_range
from ldm.diffusion.paths import EDMPath, PathConfig, RectifiedFlowPath, TablePath
from ldm.diffusion.predictions import expand_times


def bound_terms(x0: Tensor, x_t: Tensor, x0_hat: Tensor, raw_v: Tensor, path: PathConfig, t: Tensor) -> Tensor:
    """Compute the bound's term at each sample's node t, in bits per dimension: B.

    KL(q(x' | x_t, x0) || N(mean of x0_hat, variance of raw_v)), x' one node nearer to the data; at the first node,
    where x' is x0 itself, -log N(x0; x0_hat, variance). Pass x0_hat detached, so that only the variance is trained. All
    B x C x h x w, t B on the CPU. Raises ValueError for a path without a table, because it has no fixed steps.
    """
    if isinstance(path, RectifiedFlowPath | EDMPath):
        raise ValueError(f"path {path.kind} has no discrete steps whose variance could be learned: use a table path")
    steps = node_steps(path, t)
    means = torch.tensor([ddpm_mean(step) for step in steps], dtype=torch.float64)
    x_weight, x0_weight = (expand_times(column, x0) for column in means.T)
    logs = torch.tensor([log_range(step, path) for step in steps], dtype=torch.float64)
    small, large = (expand_times(column, x0) for column in logs.T)
    true_mean, mean = x_weight * x_t + x0_weight * x0, x_weight * x_t + x0_weight * x0_hat
    log_variance = learned_log_variance(raw_v, small, large)
    to_data = expand_times(torch.tensor([step.end.sigma == 0 for step in steps]), x0) > 0
    terms = normal_kl(true_mean, small, mean, log_variance)
    terms = torch.where(to_data, normal_nll(x0, mean, log_variance), terms)
    return terms.flatten(1).mean(1) / math.log(2)


def node_steps(path: TablePath, t: Tensor) -> list[Step]:
    """Return the step from each node of a table to the previous one."""
    t = path.snap(t.double())
    before = path.snap(t - 1 / path.num_train_timesteps)
    return [Step(*ends) for ends in zip(nodes_at(path, t), nodes_at(path, before), strict=True)]


def log_range(step: Step, path: TablePath) -> tuple[float, float]:
    """Return the logs of the smallest and largest variance; a step to the data uses the previous step's smallest."""
    small, large = variance_range(step)
    if step.end.sigma == 0:
        (second,) = node_steps(path, step.start.t[None] + 1 / path.num_train_timesteps)
        small = variance_range(second)[0]
    return math.log(small), math.log(large)


def normal_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(N(mean, e^log_variance) || N(other_mean, e^other_log_variance)), in nats."""
    difference = log_variance - other_log_variance
    squares = (mean - other_mean) ** 2 * (-other_log_variance).exp()
    return (difference.exp() - 1 - difference + squares) / 2


def normal_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log N(x; mean, e^log_variance), in nats. No bins, because latents are continuous."""
    return (math.log(2 * math.pi) + log_variance + (x - mean) ** 2 * (-log_variance).exp()) / 2
