"""Noise path and prediction, written as diffusers' scheduler config and read back."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from ldm.diffusion import LinearBetaPath, RectifiedFlowPath, ScaledLinearBetaPath
from ldm.interop.files import write_json
from ldm.interop.scheduler import read_scheduler, scheduler_config_json

PAIRS = [
    (RectifiedFlowPath(), "velocity"),
    (ScaledLinearBetaPath(), "eps"),
    (ScaledLinearBetaPath(), "v"),
    (LinearBetaPath(), "eps"),
    (LinearBetaPath(beta_start=0.0002, beta_end=0.01, num_train_timesteps=500), "v"),
]


@pytest.mark.parametrize(("path", "prediction"), PAIRS)
def test_it_comes_back(path, prediction, tmp_path):
    write_json(scheduler_config_json(path, prediction), tmp_path / "scheduler_config.json")
    assert read_scheduler(tmp_path / "scheduler_config.json") == (path, prediction)


@pytest.mark.parametrize(("path", "prediction"), PAIRS[1:])
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


@pytest.mark.parametrize(("path", "prediction"), [(RectifiedFlowPath(), "eps"), (LinearBetaPath(), "velocity")])
def test_a_pair_without_words_in_diffusers_is_refused(path, prediction):
    with pytest.raises(ValueError, match=f"'{prediction}' cannot be exported"):
        scheduler_config_json(path, prediction)


@pytest.mark.parametrize(
    "change",
    [{"prediction_type": "sample"}, {"beta_schedule": "squaredcos_cap_v2"}, {"rescale_betas_zero_snr": True}],
)
def test_an_unknown_path_is_refused(change, tmp_path):
    write_json(scheduler_config_json(ScaledLinearBetaPath(), "eps") | change, tmp_path / "scheduler_config.json")
    with pytest.raises(ValueError, match="this noise path is not supported"):
        read_scheduler(tmp_path / "scheduler_config.json")


def test_a_shifted_flow_is_refused(tmp_path):
    write_json(scheduler_config_json(RectifiedFlowPath(), "velocity") | {"flow_shift": 3.0}, tmp_path / "s.json")
    with pytest.raises(ValueError, match="flow_prediction"):
        read_scheduler(tmp_path / "s.json")
