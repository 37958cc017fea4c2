"""A folder's pipeline in diffusers and here, loaded once each."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import diffusers

from ldm import TextToImage


@cache
def their_pipeline(folder: Path, loader: Any) -> Any:
    diffusers.utils.logging.set_verbosity_error()
    pipe = loader.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def our_pipeline(folder: Path) -> TextToImage:
    return TextToImage.load(folder, device="cpu", dtype="fp32")
