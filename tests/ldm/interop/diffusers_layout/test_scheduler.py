"""Noise path and prediction, written as diffusers' scheduler config and read back."""

import json
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EDMDPMSolverMultistepScheduler

from ldm.diffusion import CosinePath, EDMPath, LinearBetaPath, RectifiedFlowPath, ScaledLinearBetaPath
from ldm.diffusion.predictions import to_x0
from ldm.files.strict_json import write_json
from ldm.interop.diffusers_layout.scheduler import read_scheduler, scheduler_config_json
from ldm.samplers import time_grid

PAIRS = [
    (RectifiedFlowPath(), "velocity"),
    (ScaledLinearBetaPath(), "eps"),
    (ScaledLinearBetaPath(), "v"),
    (LinearBetaPath(), "eps"),
    (LinearBetaPath(beta_start=0.0002, beta_end=0.01, num_train_timesteps=500), "v"),
    (ScaledLinearBetaPath(zero_terminal_snr=True), "v"),
    (CosinePath(), "x0"),
    (RectifiedFlowPath(shift=3.0), "velocity"),
    (EDMPath(sigma_max=70.0, sigma_data=1.0), "edm"),
]
TABLES = [(path, prediction) for path, prediction in PAIRS if hasattr(path, "num_train_timesteps")]


@pytest.mark.parametrize(("path", "prediction"), PAIRS)
def test_it_comes_back(path, prediction, tmp_path):
    write_json(scheduler_config_json(path, prediction), tmp_path / "scheduler_config.json")
    assert read_scheduler(tmp_path / "scheduler_config.json") == (path, prediction)


@pytest.mark.parametrize(("path", "prediction"), TABLES)
def test_diffusers_reads_the_same_noise_levels(path, prediction):
    theirs: Any = DPMSolverMultistepScheduler.from_config(scheduler_config_json(path, prediction))
    n = path.num_train_timesteps
    nodes = torch.arange(1, n + 1, dtype=torch.float64) / n
    torch.testing.assert_close(path.alpha(nodes).square().float(), theirs.alphas_cumprod, atol=3e-5, rtol=0)


def test_stable_diffusions_own_scheduler_is_read(tmp_path):
    theirs = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )
    theirs.save_pretrained(tmp_path)
    assert read_scheduler(tmp_path / "scheduler_config.json") == (ScaledLinearBetaPath(), "v")


def test_diffusers_reads_the_same_shifted_flow():
    theirs: Any = DPMSolverMultistepScheduler.from_config(
        scheduler_config_json(RectifiedFlowPath(shift=3.0), "velocity")
    )
    theirs.set_timesteps(10)
    # Their grid starts at 0.999 instead of 1, then shifts.
    t = torch.linspace(1, 1 / 1000, 11, dtype=torch.float64)[:-1]
    torch.testing.assert_close(RectifiedFlowPath(shift=3.0).sigma(t).float(), theirs.sigmas[:-1], atol=3e-3, rtol=0)


def test_diffusers_reads_the_same_edm():
    path = EDMPath(sigma_data=1.0)
    theirs: Any = EDMDPMSolverMultistepScheduler.from_config(scheduler_config_json(path, "edm"))
    theirs.set_timesteps(8)
    times = time_grid(path, 8, "karras")
    torch.testing.assert_close(path.sigma(times).float(), theirs.sigmas, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(path.timesteps(times[:-1]).float(), theirs.timesteps, rtol=1e-4, atol=1e-5)
    x, output = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    for i in (0, 3):
        sigma, t = theirs.sigmas[i], times[i].float()
        torch.testing.assert_close(theirs.precondition_inputs(x, sigma), path.input_scale(t) * x)
        torch.testing.assert_close(theirs.precondition_outputs(x, output, sigma), to_x0("edm", output, x, path, t))


@pytest.mark.parametrize(
    ("path", "prediction"), [(RectifiedFlowPath(), "eps"), (LinearBetaPath(), "velocity"), (EDMPath(), "v")]
)
def test_a_pair_without_words_in_diffusers_is_refused(path, prediction):
    with pytest.raises(ValueError, match=f"'{prediction}' on path '{path.kind}' cannot be opened by diffusers"):
        scheduler_config_json(path, prediction)


@pytest.mark.parametrize("change", [{"prediction_type": "noise"}, {"beta_schedule": "sigmoid"}])
def test_an_unknown_path_is_refused(change, tmp_path):
    write_json(scheduler_config_json(ScaledLinearBetaPath(), "eps") | change, tmp_path / "scheduler_config.json")
    with pytest.raises(ValueError, match="this noise path is not supported"):
        read_scheduler(tmp_path / "scheduler_config.json")


@pytest.mark.parametrize(
    ("path", "prediction", "change", "message"),
    [
        (ScaledLinearBetaPath(), "eps", {"beta_start": None}, r"s\.json holds a value of another kind"),
        (EDMPath(), "edm", {"prediction_type": "v_prediction"}, "an EDM scheduler for 'v_prediction'"),
        (EDMPath(), "edm", {"sigma_max": "big"}, r"s\.json holds a value of another kind"),
    ],
)
def test_wrong_values_are_named(path, prediction, change, message, tmp_path):
    write_json(scheduler_config_json(path, prediction) | change, tmp_path / "s.json")
    with pytest.raises(ValueError, match=message):
        read_scheduler(tmp_path / "s.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_train_timesteps": 1000.5}, "expected whole numbers"),
        ({"num_train_timesteps": 1}, "num_train_timesteps is 1; use"),
        ({"beta_start": 0.3, "beta_end": 0.1}, "beta_start"),
    ],
)
def test_numbers_that_cannot_be_are_told_with_their_file(change, message, tmp_path):
    content = scheduler_config_json(ScaledLinearBetaPath(), "eps") | change
    (tmp_path / "scheduler_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"scheduler_config.json.*{message}"):
        read_scheduler(tmp_path / "scheduler_config.json")
