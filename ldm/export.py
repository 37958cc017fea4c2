"""A trained model as a folder that opens everywhere: diffusers' layout, safetensors only.

    python -m ldm.export RUN/model weights/NAME --dtype fp16

copies an export in another precision; ldm/train.py writes the first one, RUN/model.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.commands import OneLineParser, run_command

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ldm.denoisers import DenoiserConfig
    from ldm.latent_diffusion import LatentDiffusion
    from ldm.pipeline import TextToImage


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What an export holds."""

    model: LatentDiffusion
    denoiser: nn.Module
    config: DenoiserConfig
    sample_size: int  # side of the native latents
    notes: str  # foundry.yaml: the resolved configuration of the run

    @classmethod
    def of(cls, pipe: TextToImage, *, notes: str) -> Trained:
        """What was loaded, to be written again."""
        return cls(
            model=pipe.model,
            denoiser=pipe.denoiser,
            config=pipe.denoiser_config,
            sample_size=pipe.sample_size,
            notes=notes,
        )


def export(trained: Trained, folder: Path, *, dtype: torch.dtype) -> None:
    """Write the whole folder; an older export there is replaced when the new one is whole.

    Raises ValueError if the folder exists and is no export: nothing else is ever deleted.
    """
    from ldm.interop.denoiser import denoiser_folder, save_denoiser
    from ldm.interop.files import write_json
    from ldm.interop.scheduler import scheduler_config_json
    from ldm.interop.vae import folded, save_vae
    from ldm.whole import whole_folder
    from text import OpenClipTextEncoder, TransformersTextEncoder, save_text_encoder, save_tokenizer

    check_target(folder)
    model, encoder = trained.model, trained.model.text_encoder
    assert isinstance(encoder, OpenClipTextEncoder | TransformersTextEncoder)
    part = denoiser_folder(trained.config)
    with whole_folder(folder) as whole:
        save_denoiser(
            trained.denoiser,
            trained.config,
            whole / part,
            sample_size=trained.sample_size,
            latent_channels=model.vae.config.latent_channels,
            context_width=encoder.config.width,
            learned_variance=model.learned_variance,
            dtype=dtype,
        )
        save_vae(folded(model.vae), whole / "vae", dtype=dtype)
        save_text_encoder(encoder, whole / "text_encoder", dtype=dtype)
        save_tokenizer(model.tokenizer, whole / "tokenizer")
        (whole / "scheduler").mkdir()
        write_json(scheduler_config_json(model.path, model.prediction), whole / "scheduler" / "scheduler_config.json")
        write_json(model_index(part), whole / "model_index.json")
        (whole / "foundry.yaml").write_text(trained.notes)


def check_target(folder: Path) -> None:
    """Raise ValueError if the folder exists and is no export: nothing else is ever replaced."""
    if folder.exists() and not (folder / "model_index.json").exists() and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not a model: give a new folder, or one that holds an older export")


def model_index(part: str) -> dict[str, object]:
    """model_index.json: which of diffusers' pipelines opens the folder, and what each subfolder is."""
    common: dict[str, object] = {
        "_diffusers_version": "0.30.0",
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if part == "transformer":
        return {"_class_name": "PixArtAlphaPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"]} | common
    nothing = {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")}
    unet = {"unet": ["diffusers", "UNet2DConditionModel"], "requires_safety_checker": False}
    return {"_class_name": "StableDiffusionPipeline"} | unet | common | nothing


def main(args: argparse.Namespace) -> None:
    import torch

    from ldm.interop.files import model_folder
    from ldm.pipeline import TextToImage

    pipe = TextToImage.load(args.source, device="cpu", dtype="fp32")
    notes = model_folder(args.source) / "foundry.yaml"
    trained = Trained.of(pipe, notes=notes.read_text() if notes.exists() else "")
    export(
        trained, args.target, dtype={"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype]
    )
    print(f"wrote {args.target}")


def arguments() -> argparse.ArgumentParser:
    parser = OneLineParser(__doc__ or "")
    parser.prog = "python -m ldm.export"
    parser.add_argument("source", type=Path, help="an export, as RUN/model")
    parser.add_argument("target", type=Path, help="the folder to write; an older one is replaced")
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), default="fp16", help="of the weights (default fp16)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, arguments()))
