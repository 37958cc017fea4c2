"""Tiny models with random weights, built once for all tests of this folder, and the paths that the tests of the
mathematics run over: each kind, and each kind's variations."""

from pathlib import Path
from typing import get_args

import pytest
import torch

from ldm.denoisers import DenoiserConfig, DiTConfig, UNetConfig
from ldm.diffusion import (
    CosinePath,
    EDMPath,
    LinearBetaPath,
    PathConfig,
    Prediction,
    RectifiedFlowPath,
    ScaledLinearBetaPath,
)
from ldm.diffusion.table_paths import BetaTablePath
from ldm.interop.diffusers_layout.folder import write_folder
from ldm.model.components import ModelComponents
from ldm.model.conditioner import Conditioner, TextTower
from ldm.model.latent_diffusion import LatentDiffusion
from text import TextEncoderConfig, Tokenizer, TransformersTextEncoder
from vae import AutoencoderKL, AutoencoderKLConfig

DIT = DiTConfig(depth=2, width=32, heads=2, sample_size=8)
UNET = UNetConfig(
    block_out_channels=(16, 32), layers_per_block=1, attention_levels=(True, False), heads=2, norm_num_groups=8
)


def tiny_trained(
    config: DenoiserConfig,
    path: PathConfig,
    prediction: Prediction,
    *,
    tokens: int = 32,
    learned_variance: bool = False,
) -> ModelComponents:
    """A whole model of some thousand random parameters, with latents of 8 x 8 x 4 for pictures of 16 x 16."""
    torch.manual_seed(0)
    vae_config = AutoencoderKLConfig(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_mean=(0.1, -0.2, 0.3, 0.0),
        latent_std=(0.9, 1.1, 1.3, 0.7),
    )
    text_config = TextEncoderConfig(
        width=16, layers=2, heads=2, intermediate_size=32, context_length=tokens, projection_dim=16
    )
    denoiser = config.build(latent_channels=4, context_width=16, learned_variance=learned_variance)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    encoder = TransformersTextEncoder(text_config)
    model = LatentDiffusion(
        vae=AutoencoderKL(vae_config).eval(),
        conditioner=Conditioner(TextTower(encoder.eval(), Tokenizer(text_config.tokenizer))),
        path=path,
        prediction=prediction,
    )
    notes = "run: {name: tiny}\n"
    return ModelComponents(model=model, denoiser=denoiser.eval(), config=config, sample_size=8, notes=notes)


@pytest.fixture(scope="session")
def dit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a tiny DiT on rectified flow."""
    folder = tmp_path_factory.mktemp("models") / "tiny-dit"
    write_folder(tiny_trained(DIT, RectifiedFlowPath(), "velocity"), folder, dtype=torch.float32)
    return folder


@pytest.fixture(scope="session")
def unet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a tiny U-Net with v-prediction on Stable Diffusion's path."""
    folder = tmp_path_factory.mktemp("models") / "tiny-unet"
    write_folder(tiny_trained(UNET, ScaledLinearBetaPath(), "v", tokens=77), folder, dtype=torch.float32)
    return folder


@pytest.fixture(scope="session")
def edm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a tiny DiT on EDM's path."""
    folder = tmp_path_factory.mktemp("models") / "tiny-edm"
    write_folder(tiny_trained(DIT, EDMPath(sigma_data=1.0), "edm"), folder, dtype=torch.float32)
    return folder


@pytest.fixture(scope="session")
def learned_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a tiny DiT that has learned its variance, on Stable Diffusion's path."""
    folder = tmp_path_factory.mktemp("models") / "tiny-learned"
    write_folder(tiny_trained(DIT, ScaledLinearBetaPath(), "eps", learned_variance=True), folder, dtype=torch.float32)
    return folder


PATHS: list[PathConfig] = [
    *(kind() for kind in get_args(PathConfig)),
    *(kind(zero_terminal_snr=True) for kind in (LinearBetaPath, ScaledLinearBetaPath, CosinePath)),
    RectifiedFlowPath(shift=3.0),
]


def name(path: PathConfig) -> str:
    return path.kind + "_zero" * getattr(path, "zero_terminal_snr", False) + "_shift" * (getattr(path, "shift", 1) != 1)


@pytest.fixture(params=PATHS, ids=name)
def path(request: pytest.FixtureRequest) -> PathConfig:
    return request.param


@pytest.fixture(params=[path for path in PATHS if isinstance(path, BetaTablePath)], ids=name)
def table_path(request: pytest.FixtureRequest) -> BetaTablePath:
    return request.param
