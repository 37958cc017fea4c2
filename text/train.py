"""Train a small CLIP contrastively on captioned shards: the text encoder of a latent diffusion model.

    deepspeed text/train.py --config configs/emoji64_clip.yaml [section.key=value ...]

Plain `python` and torchrun start it too. At the end the averaged text tower is written to RUN/text_encoder and its
tokenizer to RUN/tokenizer, as transformers reads them, and the whole CLIP to RUN/clip, as open_clip reads it.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from ldm.commands import run_command, training_arguments

if TYPE_CHECKING:
    from torch import nn

    from data.loader import CaptionedImages
    from ldm.config import TextTrainConfig
    from ldm.engine import Engine
    from ldm.run import Run


def main(args: Namespace) -> None:
    import torch
    from open_clip import ClipLoss
    from torch import Tensor

    from data.loader import Batch, CaptionedImages, held_out
    from ldm.config import TextTrainConfig, dump, load_config
    from ldm.diffusion import sample_randomness
    from ldm.engine import Engine, start_process
    from ldm.loop import train
    from ldm.run import Run
    from text import Tokenizer
    from text.clip import MAX_LOGIT_SCALE, build_clip, shifted

    config = load_config(TextTrainConfig, args.config, args.overrides)
    world = start_process()
    run = Run(config.run, is_main=world.is_main, config_text=dump(config))
    tokenize = Tokenizer(config.text.tokenizer)
    images = CaptionedImages(config.data, seed=config.run.seed, tokenize=tokenize, rank=world.rank, ranks=world.ranks)
    validation = held_out(config.validation, image_size=config.data.image_size, tokenize=tokenize)
    torch.manual_seed(config.run.seed)
    network = build_clip(config.text, config.image)
    total, batch_size = config.run.steps, config.data.batch_size
    engine = Engine(network, world, config=config.engine, optim=config.optim, batch_size=batch_size, total_steps=total)
    loss_function = ClipLoss(local_loss=True, gather_with_grad=True, rank=world.rank, world_size=world.ranks)

    def losses(batch: Batch) -> dict[str, Tensor]:
        assert batch.tokens is not None
        offsets = sample_randomness(config.run.seed, batch.positions, (2,)).eps.erf().add(1).div(2)
        pixels = shifted(batch.pixels, offsets.clamp(0, 0.999), config.shift).to(world.device)
        image, text, scale = engine(pixels, batch.tokens.to(world.device))
        # Features in float32: at a scale of 100 bfloat16 would round the logits to whole numbers.
        loss = loss_function(image.float(), text.float(), scale.float().clamp(max=MAX_LOGIT_SCALE))
        return {"loss": loss, "scale": scale.detach()}

    train(engine, run, images, losses, sample=lambda step: validate(config, engine, run, validation, step))
    if engine.step == config.run.steps:
        finish(config, engine, run)


def averaged_network(config: TextTrainConfig, engine: Engine) -> nn.Module | None:
    """A CLIP of the averaged weights on the main rank, None on the others. Every rank must call it."""
    from text.clip import build_clip

    weights = engine.averaged_weights()
    if not engine.world.is_main:
        return None
    network = build_clip(config.text, config.image).to(engine.world.device)
    network.load_state_dict(weights)
    return network


def validate(config: TextTrainConfig, engine: Engine, run: Run, validation: CaptionedImages, step: int) -> None:
    """Retrieval among the validation pictures, by their best captions."""
    import torch

    from text.clip import features, recall

    network = averaged_network(config, engine)
    if network is None:
        return
    found = []
    for batch in validation.once(config.validation.batch_size):
        assert batch.tokens is not None
        found.append(features(network, batch.pixels.to(engine.world.device), batch.tokens.to(engine.world.device)))
    image, text = (torch.cat(part) for part in zip(*found, strict=True))
    recalls = recall(image, text)
    shown = "  ".join(f"{name} {value:.1%}" for name, value in recalls.items())
    run.tell(f"step {step}: recall among {len(image)} pictures: {shown}")
    run.record(step=step, pictures=len(image), **recalls)


def finish(config: TextTrainConfig, engine: Engine, run: Run) -> None:
    """Write the averaged weights, once training is complete."""
    from dataclasses import asdict

    from ldm.interop.files import write_json, write_weights
    from text import OpenClipTextEncoder, Tokenizer, save_text_encoder, save_tokenizer
    from text.encoder import open_clip_text_cfg

    network = averaged_network(config, engine)
    if network is None:
        return
    path = config.run.path
    save_text_encoder(
        OpenClipTextEncoder(network, hidden=config.text.hidden, pad_id=config.text.pad_id), path / "text_encoder"
    )
    save_tokenizer(Tokenizer(config.text.tokenizer), path / "tokenizer")
    (path / "clip").mkdir(exist_ok=True)
    write_weights(network.state_dict(), path / "clip" / "open_clip_model.safetensors")
    model_cfg = {
        "embed_dim": config.image.embed_dim,
        "quick_gelu": config.text.activation == "quick_gelu",
        "vision_cfg": config.image.vision_cfg,
        "text_cfg": open_clip_text_cfg(config.text),
    }
    preprocess_cfg = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": config.image.image_size}
    content = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg, "foundry": asdict(config.text)}
    write_json(content, path / "clip" / "open_clip_config.json")
    run.tell(f"wrote {path / 'text_encoder'}, {path / 'tokenizer'} and {path / 'clip'}")


if __name__ == "__main__":
    sys.exit(run_command(main, training_arguments(__doc__ or "")))
