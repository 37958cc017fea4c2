"""Checkpoints of DiT and PixArt in their authors' layouts are named, with what to give instead; nothing is run."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

import pytest
import torch
from helpers.stable_diffusion import stable_diffusion
from safetensors.torch import save_file

from ldm import TextToImage
from ldm.interop.diffusers_layout.folder import write_folder
from ldm.interop.pickles import open_pickle


def _tensors(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(8, 8) for name in names}


# Names of facebookresearch/DiT, models.py, and PixArt-alpha/PixArt-alpha, diffusion/model/nets/PixArt.py.
COMMON = ("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "blocks.0.attn.qkv.weight", "final_layer.linear.weight")
DIT = _tensors(*COMMON, "y_embedder.embedding_table.weight", "blocks.0.adaLN_modulation.1.weight")
PIXART = _tensors(
    *COMMON, "y_embedder.y_embedding", "y_embedder.y_proj.fc1.weight", "blocks.0.scale_shift_table", "t_block.1.weight"
)
# The arguments of its command line, with a path; its optimiser's state.
ARGS = argparse.Namespace(model="DiT-XL/2", results_dir=pathlib.Path("results"), image_size=256)
OPT = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
FILES: dict[str, tuple[Any, str]] = {
    "DiT-XL-2-256x256.pt": (DIT, "DiT"),
    "DiT-XL-2.safetensors": (DIT, "DiT"),
    "0050000.pt": ({"model": DIT, "ema": DIT, "opt": OPT, "args": ARGS}, "DiT"),
    "PixArt-XL-2-512x512.pth": ({"state_dict": PIXART}, "PixArt"),
    "epoch_1_step_2.pth": ({"state_dict": PIXART, "state_dict_ema": PIXART, "epoch": 1}, "PixArt"),
    "pixart.safetensors": (PIXART, "PixArt"),
}
TOLD = {
    "DiT": r"looks like a DiT checkpoint in its authors' layout, which draws classes of ImageNet, not texts: give",
    "PixArt": r"looks like PixArt-alpha \(or -sigma\) in its authors' layout, which is read from a folder in diffus",
}


@pytest.mark.parametrize("name", FILES)
def test_it_is_named(name, tmp_path):
    content, kind = FILES[name]
    save_file(content, tmp_path / name) if name.endswith(".safetensors") else torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=TOLD[kind]) as told:
        TextToImage.load(tmp_path / name)
    assert name in str(told.value) and "\n" not in str(told.value)


def test_arguments_become_objects_that_do_nothing(tmp_path):
    """They are not in what is read, and a class of that name is not made."""
    torch.save({"model": DIT, "args": ARGS}, tmp_path / "m.pt")
    assert open_pickle(tmp_path / "m.pt").keys() == DIT.keys()
    torch.save({"model": DIT, "args": Mine()}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"asks to run .*Mine while it is read: refused"):
        open_pickle(tmp_path / "m.pt")


class Mine:
    """Some other class of a training's arguments."""


def test_of_a_pixart_folder_it_is_the_text_encoder_that_decides(tmp_path):
    """The remedy as it is told: a folder in diffusers' layout with CLIP is read, one with T5 is refused by name."""
    folder = tmp_path / "pixart"
    write_folder(stable_diffusion(transformer=True), folder, dtype=torch.float32)
    assert TextToImage.load(folder)("a frog", steps=1)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("CLIPTextModel", "T5EncoderModel"))
    with pytest.raises(ValueError, match="T5EncoderModel"):
        TextToImage.load(folder)
