"""Train a small CLIP contrastively on captioned shards: the text encoder of a latent diffusion model.

    deepspeed text/train.py --config configs/emoji64_clip.yaml [section.key=value ...]

Plain `python` and torchrun start it too. At the end the averaged text tower is written to RUN/text_encoder and its
tokenizer to RUN/tokenizer, as transformers reads them, and the whole CLIP to RUN/clip, as open_clip reads it.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from functools import partial
from typing import TYPE_CHECKING

from ldm.cli.parser import training_arguments
from ldm.cli.run import run_command

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ldm.training.configs import TextTrainConfig
    from ldm.training.loop import Session


def main(args: Namespace) -> None:
    from open_clip import ClipLoss

    from data.loader import Batch
    from ldm.diffusion import sample_randomness
    from ldm.training.checkpoints.rng_state import seed_generators
    from ldm.training.configs import TextTrainConfig
    from ldm.training.loop import open_session, train
    from text import Tokenizer
    from text.clip import MAX_LOGIT_SCALE, build_clip, shifted

    session = open_session(TextTrainConfig, args, tokenizer=lambda config: Tokenizer(config.text.tokenizer))
    config, world = session.config, session.world
    seed_generators(config.run.seed)
    engine = session.engine(build_clip(config.text, config.image))
    loss_function = ClipLoss(local_loss=True, gather_with_grad=True, rank=world.rank, world_size=world.ranks)

    def losses(batch: Batch) -> dict[str, Tensor]:
        assert batch.tokens is not None
        offsets = sample_randomness(config.run.seed, batch.positions, (2,)).eps.erf().add(1).div(2)
        pixels = shifted(batch.pixels, offsets.clamp(0, 0.999), config.shift).to(world.device)
        image, text, scale = engine(pixels, batch.tokens.to(world.device))
        # Features in float32: at a scale of 100 bfloat16 would round the logits to whole numbers.
        loss = loss_function(image.float(), text.float(), scale.float().clamp(max=MAX_LOGIT_SCALE))
        return {"loss": loss, "scale": scale.detach()}

    train(session, engine, losses, partial(validate, session), finish=partial(finish, session))


def averaged_network(session: Session[TextTrainConfig], weights: dict[str, Tensor]) -> nn.Module:
    from text.clip import build_clip

    network = build_clip(session.config.text, session.config.image).to(session.world.device)
    network.load_state_dict(weights)
    return network


def validate(session: Session[TextTrainConfig], step: int, weights: dict[str, Tensor]) -> None:
    """Retrieval among the validation pictures, by their best captions."""
    import torch

    from text.clip import features, recall

    run, device = session.run, session.world.device
    network = averaged_network(session, weights)
    found = []
    for batch in session.validation.once(session.config.validation.batch_size):
        assert batch.tokens is not None
        found.append(features(network, batch.pixels.to(device), batch.tokens.to(device)))
    image, text = (torch.cat(part) for part in zip(*found, strict=True))
    recalls = recall(image, text)
    shown = "  ".join(f"{name} {value:.1%}" for name, value in recalls.items())
    run.tell(f"step {step}: recall among {len(image)} pictures: {shown}")
    run.record(step=step, pictures=len(image), **recalls)


def finish(session: Session[TextTrainConfig], weights: dict[str, Tensor]) -> None:
    """Write the averaged weights, once training is complete."""
    from ldm.files.atomic import atomic_folder
    from ldm.files.strict_json import write_json
    from ldm.interop.network_files import write_weights
    from text import OpenClipTextEncoder, Tokenizer, save_text_encoder, save_tokenizer
    from text.clip import open_clip_config_json

    config, path = session.config, session.config.run.path
    network = averaged_network(session, weights)
    encoder = OpenClipTextEncoder(network, hidden=config.text.hidden, pad_id=config.text.pad_id)
    with atomic_folder(path / "text_encoder") as folder:
        save_text_encoder(encoder, folder)
    with atomic_folder(path / "tokenizer") as folder:
        save_tokenizer(Tokenizer(config.text.tokenizer), folder)
    with atomic_folder(path / "clip") as folder:
        write_weights(network.state_dict(), folder / "open_clip_model.safetensors")
        write_json(open_clip_config_json(config.text, config.image), folder / "open_clip_config.json")
    session.run.tell(f"wrote {path / 'text_encoder'}, {path / 'tokenizer'} and {path / 'clip'}")


if __name__ == "__main__":
    sys.exit(run_command(main, training_arguments(__doc__ or "")))
