"""Facts: the values in the configuration files of the published models, and folders of that form in miniature.

Sizes are small and weights random; every other key and value is that of the published file (the models' folders in
diffusers' layout: CompVis/stable-diffusion-v1-4, runwayml/stable-diffusion-v1-5 and -inpainting,
stabilityai/stable-diffusion-2, -2-1, their -base and -inpainting, PixArt-alpha/PixArt-XL-2-512x512). The files of
stable-diffusion-2-base were not at hand; by their sizes they are those of 2-inpainting, with four channels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from text.tokenizer import clip_vocabulary

TOKEN = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
BOS, EOS = ({"content": content, **TOKEN} for content in ("<|startoftext|>", "<|endoftext|>"))


def special_tokens_map(pad: str) -> dict[str, Any]:
    return {"bos_token": BOS, "eos_token": EOS, "pad_token": pad, "unk_token": EOS}


# All of them, also those of version 2, whose padding is another: it is stated in special_tokens_map.json alone.
TOKENIZER = {
    "add_prefix_space": False,
    "bos_token": {"__type": "AddedToken", **BOS},
    "do_lower_case": True,
    "eos_token": {"__type": "AddedToken", **EOS},
    "errors": "replace",
    "model_max_length": 77,
    "name_or_path": "openai/clip-vit-large-patch14",
    "pad_token": "<|endoftext|>",
    "special_tokens_map_file": "./special_tokens_map.json",
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": {"__type": "AddedToken", **EOS},
}
TEXT = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "pad_token_id": 1,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
}
SECOND_UNET = {
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": True,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "in_channels": 3,
    "latent_channels": 4,
    "out_channels": 3,
    "sample_size": 512,
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
PARTS = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.6.0",
    "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

# PixArt-alpha 512 x 512, in full: its transformer/config.json.
PIXART = {
    "_class_name": "Transformer2DModel",
    "_diffusers_version": "0.22.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "attention_type": "default",
    "caption_channels": 4096,
    "cross_attention_dim": 1152,
    "double_self_attention": False,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_single",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 64,
    "upcast_attention": False,
    "use_linear_projection": False,
}


@dataclass(frozen=True, kw_only=True)
class Published:
    """What the files of one model state in addition to the tables above."""

    second: bool = False  # Stable Diffusion 2
    pad: str = "<|endoftext|>"
    unet: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    index: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prediction(self) -> str:
        return {"v_prediction": "v"}.get(self.scheduler.get("prediction_type", "epsilon"), "eps")

    @property
    def inpainting(self) -> bool:
        return self.unet.get("in_channels") == 9


NONE: Mapping[str, Any] = {}


def second(
    *, unet: Mapping[str, Any] = NONE, scheduler: Mapping[str, Any] = NONE, index: Mapping[str, Any] = NONE
) -> Published:
    return Published(
        second=True,
        pad="!",
        unet={**SECOND_UNET, **unet},
        vae={"norm_num_groups": 32, "sample_size": 768},
        text={"hidden_act": "gelu", "projection_dim": 512, "transformers_version": "4.25.0.dev0"},
        scheduler=scheduler,
        index={"requires_safety_checker": False, "safety_checker": [None, None], **index},
    )


INPAINTING: dict[str, Any] = {"_class_name": "StableDiffusionInpaintPipeline"}
V_768 = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
MODELS: dict[str, Published] = {
    "1.4": Published(vae={"scaling_factor": 0.18215}, unet={"_diffusers_version": "0.2.2"}),
    "1.5": Published(vae={"norm_num_groups": 32}, text={"projection_dim": 768}),
    "1.5-inpainting": Published(
        vae={"norm_num_groups": 32, "sample_size": 256},
        text={"projection_dim": 768},
        unet={"in_channels": 9},
        scheduler={"_class_name": "DDIMScheduler"},
        index=INPAINTING,
    ),
    "2-base": second(),
    "2": second(unet={"sample_size": 96}, scheduler=V_768),
    "2.1-base": second(scheduler={"prediction_type": "epsilon"}),
    "2.1": second(unet={"sample_size": 96, "upcast_attention": True}, scheduler=V_768),
    "2-inpainting": second(unet={"in_channels": 9}, index=INPAINTING),
    # Descendants: version 1's shape with v-prediction and a rescaled schedule, as its fine-tunes state it.
    "1-v-ztsnr": Published(
        text={"projection_dim": 768},
        scheduler={
            "_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
    ),
    # Clip skip 2: a text encoder without its last layer.
    "1-clip-skip-2": Published(text={"projection_dim": 768, "num_hidden_layers": 1}),
}  # fmt: skip

# PixArt-alpha's scheduler/scheduler_config.json.
PIXART_SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "_diffusers_version": "0.22.0.dev0",
    "algorithm_type": "dpmsolver++",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "dynamic_thresholding_ratio": 0.995,
    "euler_at_final": False,
    "lambda_min_clipped": float("-inf"),
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_type": "midpoint",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_karras_sigmas": False,
    "use_lu_lambdas": False,
    "variance_type": None,
}
SCHEDULERS: dict[str, dict[str, Any]] = {name: SCHEDULER | dict(model.scheduler) for name, model in MODELS.items()}
SCHEDULERS["pixart-alpha"] = PIXART_SCHEDULER


def sizes(model: Published) -> dict[str, dict[str, Any]]:
    """The small sizes of each network. Widths are multiples of what a single file cannot state: groups and heads."""
    blocks = {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }
    widths = [64, 128] if model.second else [32, 64]
    unet = {"block_out_channels": widths, "layers_per_block": 1, "cross_attention_dim": 64, **blocks}
    if model.second:
        unet["attention_head_dim"] = [1, 2]
    text = {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 1, "num_hidden_layers": 2,
    }  # fmt: skip
    vae = {"block_out_channels": [32, 32, 64], "layers_per_block": 1}
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    return {"unet": unet, "text_encoder": text, "vae": vae | levels}


def published_folder(name: str, folder: Path) -> Path:
    """Write one of MODELS in miniature, by diffusers' and transformers' own classes, with its published files."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    model = MODELS[name]
    small = sizes(model)
    configs = {
        "unet": UNET | small["unet"] | dict(model.unet),
        "vae": VAE | small["vae"] | dict(model.vae),
        "text_encoder": TEXT | small["text_encoder"] | dict(model.text),
    }
    torch.manual_seed(len(name))
    networks: dict[str, Any] = {
        "unet": diffusers.UNet2DConditionModel(**_public(configs["unet"])),
        "vae": diffusers.AutoencoderKL(**_public(configs["vae"])),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**_public(configs["text_encoder"]))),
    }
    for part, network in networks.items():
        stir(network)
        network.save_pretrained(folder / part)
        write(folder / part / "config.json", configs[part])
    write_tokenizer(folder / "tokenizer", model)
    scheduler = SCHEDULER | dict(model.scheduler)
    write(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = PARTS | {"scheduler": ["diffusers", scheduler["_class_name"]]} | dict(model.index)
    write(folder / "model_index.json", index)
    return folder


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def write(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")


def write_tokenizer(folder: Path, model: Published) -> None:
    """The four files of transformers 4.2x: no tokenizer.json."""
    vocabulary = clip_vocabulary()
    write(folder / "tokenizer_config.json", TOKENIZER)
    write(folder / "special_tokens_map.json", special_tokens_map(model.pad))
    write(folder / "vocab.json", vocabulary.ids)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in vocabulary.merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def stir(network: torch.nn.Module) -> None:
    """Move every parameter from values, such as zero, that hide a mistake."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
