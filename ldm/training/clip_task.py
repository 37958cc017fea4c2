"""Train a small CLIP contrastively, as the text encoder of a latent diffusion model: text/train.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from open_clip import ClipLoss
from torch import Tensor, nn

from data.loader import Batch
from data.readers import ImageCaptionReader
from ldm.diffusion.randomness import keyed_uniform
from ldm.files.atomic import atomic_folder
from ldm.files.strict_json import write_json
from ldm.interop.network_files import write_weights
from ldm.training.session import Session
from ldm.training.task import Task, TrainingConfig
from text.clip import MAX_LOGIT_SCALE, ImageTowerConfig, build_clip, features, open_clip_config_json, recall, shifted
from text.conversion import save_text_encoder
from text.encoder import OpenClipTextEncoder, TextEncoderConfig
from text.tokenizer import Tokenizer, save_tokenizer


@dataclass(frozen=True, kw_only=True)
class TextTrainConfig(TrainingConfig):
    kind: Literal["clip"] = "clip"
    text: TextEncoderConfig
    image: ImageTowerConfig
    shift: int = 4  # largest random shift of a training image, in pixels

    def __post_init__(self) -> None:
        if self.text.projection_dim != self.image.embed_dim:
            raise ValueError(
                f"text.projection_dim ({self.text.projection_dim}) and image.embed_dim ({self.image.embed_dim}) "
                "are the width of the same space: make them equal"
            )
        if self.image.image_size != self.data.image_size or self.shift < 0:
            raise ValueError(
                f"image.image_size ({self.image.image_size}) must equal data.image_size ({self.data.image_size}), and "
                f"shift ({self.shift}) must be 0 or more"
            )
        if self.engine.accumulation > 1:
            raise ValueError(
                f"engine.accumulation is {self.engine.accumulation}, but CLIP's loss compares all pictures of a batch "
                "with each other: set it to 1, and lower data.batch_size if memory is short"
            )


class CLIPTask(Task[TextTrainConfig]):
    """Match the images and captions of a batch: Radford et al. 2021 (arXiv 2103.00020)."""

    config_class = TextTrainConfig

    def __init__(self, session: Session[TextTrainConfig]) -> None:
        super().__init__(session)
        session.seed()
        self.network = self.build()
        rank, ranks = session.world.rank, session.world.ranks
        tokenizer = Tokenizer(session.config.text.tokenizer)
        session.images.count_cut(tokenizer.cut_off, tokens=tokenizer.config.context_length)
        self.loss_function = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=ranks)

    @classmethod
    def reader(cls, config: TextTrainConfig) -> ImageCaptionReader:
        return ImageCaptionReader(config.data, seed=config.run.seed, tokenize=Tokenizer(config.text.tokenizer))

    def build(self) -> nn.Module:
        return build_clip(self.config.text, self.config.image)

    def losses(self, network: Callable[..., Any], batch: Batch, step: int) -> dict[str, Tensor]:
        seed = self.config.run.seed
        offsets = [[keyed_uniform("shift", seed, position, axis) for axis in "yx"] for position in batch.positions]
        # In float64: in float32, an offset just below 1 would round to 1, a place too far.
        pixels = shifted(batch.pixels, torch.tensor(offsets, dtype=torch.float64), self.config.shift).to(self.device)
        image, text, scale = network(pixels, batch.tensor("tokens").to(self.device))
        # Features in float32: at a scale of 100, bfloat16 would round the logits to integers.
        loss = self.loss_function(image.float(), text.float(), scale.float().clamp(max=MAX_LOGIT_SCALE))
        return {"loss": loss, "scale": scale.detach()}

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """Measure the retrieval recall among the validation images."""
        found = []
        for batch in self.session.held_out():
            tokens = batch.tensor("tokens").to(self.device)
            found.append((batch, torch.stack(features(network, batch.pixels.to(self.device), tokens), dim=1)))
        image, text = self.session.collect(found).unbind(1)
        return {"pictures": len(image), **recall(image, text)}

    def summarize(self, measures: Mapping[str, float]) -> str:
        shown = "  ".join(f"{name} {value:.1%}" for name, value in measures.items() if name != "pictures")
        return f"recall among {measures['pictures']} pictures: {shown}"

    def finish(self, network: nn.Module) -> None:
        """Write the averaged text tower, its tokenizer and the complete CLIP."""
        config, path = self.config, self.config.run.path
        encoder = OpenClipTextEncoder(network, hidden=config.text.hidden, pad_id=config.text.pad_id)
        with atomic_folder(path / "text_encoder") as folder:
            save_text_encoder(encoder, folder)
        with atomic_folder(path / "tokenizer") as folder:
            save_tokenizer(Tokenizer(config.text.tokenizer), folder)
        with atomic_folder(path / "clip") as folder:
            write_weights(network.state_dict(), folder / "open_clip_model.safetensors")
            write_json(open_clip_config_json(config.text, config.image), folder / "open_clip_config.json")
        self.session.run.log(f"wrote {path / 'text_encoder'}, {path / 'tokenizer'} and {path / 'clip'}")
