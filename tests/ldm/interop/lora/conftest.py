"""A tiny U-Net and a tiny DiT with their text encoders."""

from __future__ import annotations

import pytest
from helpers.loras import (
    DIT,
    UNET,
    Model,
    build,
)


@pytest.fixture(scope="module")
def unet() -> Model:
    return build(UNET)


@pytest.fixture(scope="module")
def dit() -> Model:
    return build(DIT)
