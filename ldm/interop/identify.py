"""Identify a file of weights by the names and shapes of its tensors, never by its file name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
DENOISER, FIRST_STAGE, CONDITIONER = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
WRAPPINGS, MAX_WRAPPINGS = ("module.", "_orig_mod.", "model."), 3
EMA = "model_ema."  # averaged weights of the denoiser, in the same file


class Foreign(NamedTuple):
    name: str
    marks: tuple[str, ...]  # one tensor name that contains one of them suffices
    remedy: str = "which is not supported yet: give Stable Diffusion 1 or 2"


LORA = "a LoRA"
WORDS = "words for a model (textual inversion)"
LORA_MARKS = (
    "lora_unet_", "lora_te", "lycoris_", "oft_unet_", ".lora_A.", ".lora_down.", ".lora.down.", "_lora.down.",
    "lora_linear_layer", ".hada_w1", ".lokr_w", ".dora_scale", ".on_input", ".oft_blocks", ".ia3_l", ".w_norm",
    ".diff_b", "bundle_emb.",
)  # fmt: skip
# The first match counts, so parts are listed after the models that contain them.
FOREIGN = (
    Foreign(LORA, LORA_MARKS, "which is added to a model: give it with --lora"),
    Foreign(
        "scaled fp8 as ComfyUI writes it",
        ("scaled_fp8", ".scale_weight", ".weight_scale", ".comfy_quant"),
        "whose weights need scales that are not read: give the same model in fp16, or in fp8 without scales",
    ),
    Foreign("a ControlNet", ("control_model.", "controlnet_", "input_hint_block.")),
    Foreign("a T2I-Adapter or IP-Adapter", ("ip_adapter.", "adapter.body.", "image_proj.")),
    Foreign("a motion module (AnimateDiff)", ("motion_modules.", "temporal_transformer.")),
    Foreign("Stable Video Diffusion", ("time_stack.", "time_mixer", "temporal_transformer_blocks.")),
    Foreign("SDXL", ("conditioner.embedders.", "add_embedding.")),
    Foreign("Stable Diffusion 3", ("joint_blocks.", "text_encoders.clip_g.", "context_embedder.")),
    Foreign("Flux", ("double_blocks.", "single_transformer_blocks.", "guidance_in.")),
    Foreign("a depth model of Stable Diffusion 2", ("depth_model.",)),
    Foreign("unCLIP of Stable Diffusion 2 or SDXL", ("noise_augmentor.", "label_emb.")),
    Foreign("Stable Cascade", ("clip_txt_mapper.", "channelwise.")),
    Foreign(
        "a DiT checkpoint in its authors' layout",
        ("y_embedder.embedding_table.",),
        "which draws classes of ImageNet, not texts: give Stable Diffusion 1 or 2, or train a DiT with ldm/train.py",
    ),
    Foreign("Sana in its authors' layout", ("attention_y_norm.",)),
    Foreign(
        "PixArt-alpha (or -sigma) in its authors' layout",
        ("y_embedder.y_proj.", "y_embedder.y_embedding"),
        "which is read from a folder in diffusers' layout, and only with a CLIP text encoder (PixArt-XL-2-* have T5): "
        "give such a folder, or Stable Diffusion 1 or 2",
    ),
    Foreign("a transformer in its authors' own layout", ("y_embedder.", "x_embedder.", "adaLN_modulation.")),
    Foreign("a CLIP with its image tower", ("visual.", "vision_model.")),
    Foreign(WORDS, ("emb_params", "clip_l", "string_to_param")),
)
WORD_WIDTHS = ((768,), (1024,), (1280,))  # of the CLIPs of Stable Diffusion 1, 2 and SDXL
FOREIGN_CHANNELS = {  # of the first convolution of a U-Net
    5: "a depth model of Stable Diffusion 2",
    7: "an upscaler of Stable Diffusion 2",
    8: "an InstructPix2Pix model",
}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def looks_like(shapes: Shapes) -> Foreign | None:
    """Return the kind of these weights if it is a known one that is not read as a model; otherwise None."""
    for foreign in FOREIGN:
        if any(mark in name for mark in foreign.marks for name in shapes):
            return foreign
    first = shapes.get(f"{DENOISER}input_blocks.0.0.weight", shapes.get("conv_in.weight", ()))
    if len(first) == 4 and first[1] in FOREIGN_CHANNELS:
        return Foreign(FOREIGN_CHANNELS[first[1]], ())
    if 0 < len(shapes) < 4 and all(len(shape) <= 2 and shape[-1:] in WORD_WIDTHS for shape in shapes.values()):
        return Foreign(WORDS, ())
    return None


def refuse_foreign(shapes: Shapes, *, source: Path) -> None:
    """Raise ValueError, naming the kind, for a known kind of weights that is not read as a model. A complete model may
    come with words."""
    foreign = looks_like(shapes)
    if foreign and not (foreign.name == WORDS and is_single_file(shapes)):
        raise ValueError(f"{source} looks like {foreign.name}, {foreign.remedy}")


def is_single_file(shapes: Iterable[str]) -> bool:
    """Return whether this is a complete model in CompVis's layout: all parts in one file, each under its prefix."""
    return any(name.startswith(DENOISER) for name in shapes)


def is_vae(shapes: Shapes) -> bool:
    """Return whether this is an autoencoder, in either layout, with or without its prefix in a complete model."""
    return any(name.removeprefix(FIRST_STAGE).startswith("decoder.conv_in.") for name in shapes)


def refuse_parts(shapes: Shapes, *, source: Path) -> None:
    """Raise ValueError for a file that is not a complete model in CompVis's layout, naming the part that it holds."""
    if is_single_file(shapes):
        return
    if is_vae(shapes):
        problem = "it looks like only an autoencoder, which is used with a model: give it with --vae"
    elif any(name.startswith(EMA) for name in shapes):
        problem = "it holds only averaged weights: give the file that has both"
    elif any("encoder.layers." in name or "transformer.resblocks." in name for name in shapes):
        problem = "it looks like only a text encoder: give the model that it belongs to"
    else:
        problem = f"it has no {DENOISER}* among its {len(shapes)} tensors ({', '.join(sorted(shapes)[:3])})"
    raise ValueError(f"{source} is not a complete model: {problem}")


def without_wrapping(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove what wraps a network put before all of its names: PyTorch's DistributedDataParallel and compile, and an
    attribute `model` of a trainer. A complete model in CompVis's layout has names of its own that begin with `model.`.
    """
    found = dict(tensors)
    for _ in range(MAX_WRAPPINGS):
        wrapping = next((before for before in WRAPPINGS if found and all(n.startswith(before) for n in found)), None)
        if wrapping is None or (wrapping == "model." and is_single_file(found)):
            break
        found = {name.removeprefix(wrapping): tensor for name, tensor in found.items()}
    return found
