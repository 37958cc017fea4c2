"""The function that samplers take."""

from pathlib import Path

import torch

from ldm.interop.read_model import read_model


def test_the_variance_is_that_of_the_last_evaluation(learned_folder: Path):
    parts = read_model(learned_folder, dtype=torch.float32)
    denoise = parts.model.denoise_with(parts.denoiser, parts.model.conditioner(["a red apple"]))
    x, t = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(0.5)
    with torch.no_grad():
        answers = [(denoise(own, t), denoise.variance()) for own in x]
        again = denoise(x[0], t), denoise.variance()
    assert not torch.equal(answers[0][1], answers[1][1])
    assert torch.equal(again[0], answers[0][0]) and torch.equal(again[1], answers[0][1])


def test_numbers_are_told_in_the_networks_precision(dit_folder: Path):
    parts = read_model(dit_folder, dtype=torch.bfloat16)
    denoise = parts.model.denoise_with(parts.denoiser, parts.model.conditioner(["a red apple"]))
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert denoise(x, torch.tensor(0.5)).dtype == torch.float32
    assert denoise.condition.context.dtype == denoise.condition.pooled.dtype == torch.bfloat16
