"""Stable Diffusion 1 in miniature, whole, for tests to spoil."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.hostile import Tensors
from helpers.stable_diffusion import stable_diffusion

from ldm.interop.compvis.writing import single_file_tensors
from ldm.interop.diffusers_layout.folder import write_folder


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """Version 1 in miniature, as a single file has it."""
    return {name: t.half().contiguous() for name, t in single_file_tensors(stable_diffusion(1)).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    write_folder(stable_diffusion(1), folder, dtype=torch.float16)
    return folder
