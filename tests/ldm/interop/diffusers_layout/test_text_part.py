"""Another kind of text encoder is one entry of a table: a model with it is written, read and encodes as before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers.stable_diffusion import stable_diffusion
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.interop.diffusers_layout.folder import read_folder, write_folder
from ldm.model.conditioner import Conditioner, TextTower
from text.conversion import TEXT_ENCODERS
from text.encoder import TextEncoder, TextEncoderConfig

SIZES = ("width", "context_length", "vocab_size", "eos_id")


class Bag(TextEncoder):
    """The states of the tokens alone."""

    kind: ClassVar[str] = "bag_of_tokens"

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__(config)
        self.states = nn.Embedding(config.vocab_size, config.width)

    @property
    def _table(self) -> nn.Module:
        return self.states

    def _context_and_last(self, ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return self.states(ids), self.states(ids)


def read_config(content: dict[str, Any], hidden: str = "last") -> TextEncoderConfig:
    return TextEncoderConfig(**{name: content[name] for name in SIZES}, layers=1, heads=1, intermediate_size=1)


def build(config: TextEncoderConfig, weights: dict[str, Tensor], *, dtype: torch.dtype = torch.float32) -> Bag:
    bag = Bag(config).to(dtype)
    bag.load_state_dict(weights)
    return bag


def save(encoder: Bag, folder: Path, *, dtype: torch.dtype) -> None:
    folder.mkdir()
    content = {"model_type": Bag.kind} | {name: getattr(encoder.config, name) for name in SIZES}
    (folder / "config.json").write_text(json.dumps(content))
    save_file({name: tensor.to(dtype) for name, tensor in encoder.state_dict().items()}, folder / "model.safetensors")


def test_a_new_kind_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own: dict[str, Any] = {"read_config": read_config, "own_names": dict, "build": build, "save": save}
    entry = replace(TEXT_ENCODERS["clip_text_model"], class_name="Bag", modules=("states.",), **own)
    parts = stable_diffusion(1)
    (clip,) = parts.model.conditioner.towers
    torch.manual_seed(0)
    tower = TextTower(Bag(clip.encoder.config), clip.tokenizer)
    model = replace(parts.model, conditioner=Conditioner(tower))
    with monkeypatch.context() as registered:
        registered.setitem(TEXT_ENCODERS, Bag.kind, entry)
        write_folder(replace(parts, model=model), tmp_path / "model", dtype=torch.float32)
        again = read_folder(tmp_path / "model", dtype=torch.float32)
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "Bag"] and index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    expected, found = model.conditioner(["a cat"]), again.model.conditioner(["a cat"])
    assert torch.equal(found.context, expected.context) and torch.equal(found.pooled, expected.pooled)
    with pytest.raises(ValueError, match=r"names the class \['transformers', 'Bag'\] for text_encoder: refused"):
        read_folder(tmp_path / "model", dtype=torch.float32)
    (tmp_path / "model" / "model_index.json").unlink()
    with pytest.raises(ValueError, match="model_type is 'bag_of_tokens', not 'clip_text_model'"):
        read_folder(tmp_path / "model", dtype=torch.float32)
