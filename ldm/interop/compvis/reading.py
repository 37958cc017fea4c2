"""Stable Diffusion in one file, CompVis's layout: reading it. What shapes cannot tell is what was said beside them, or
else what Stable Diffusion 1 and 2 have in common; writing it is ldm.interop.compvis.writing's business."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ldm.denoisers import UNet, UNetConfig
from ldm.diffusion import PathConfig, Prediction, ScaledLinearBetaPath
from ldm.interop.compvis.detect_prediction import find_prediction
from ldm.interop.compvis.names import (
    EMA,
    as_matrix,
    ema_name,
    is_attention_of_vae,
    unet_from_shapes,
    unet_names,
    vae_from_shapes,
    vae_names,
)
from ldm.interop.compvis.sidecar import HIDDEN_KEY, Told, read_told, with_heads
from ldm.interop.compvis.text_encoder import TextEncoderPlan, plan_text_encoder
from ldm.interop.diffusers_layout.scheduler import scheduler_config_json, scheduler_from
from ldm.interop.diffusers_layout.unet import UNetLayout
from ldm.interop.diffusers_layout.vae import vae_config
from ldm.interop.identify import (
    CONDITIONER,
    DENOISER,
    FIRST_STAGE,
    Shapes,
    is_single_file,
    is_vae,
    refuse_foreign,
    shapes_of,
)
from ldm.interop.network_files import check_fit, described_by
from ldm.interop.weight_reader import Weights, describe, open_weights
from ldm.model.components import LoadedDenoiser, ModelComponents, Origin, check_components_fit, inpainting_channels
from ldm.model.conditioner import Conditioner, TextTower
from ldm.model.latent_diffusion import LatentDiffusion
from text.conversion import read_text_encoder_config, text_encoder_from_weights
from text.encoder import TransformersTextEncoder
from text.tokenizer import Tokenizer
from vae.autoencoder import STABLE_DIFFUSION_SCALE, AutoencoderKL

# What training left in such files: its tables, the averages' bookkeeping, and the networks that judged the autoencoder.
LEFT_OVER = re.compile(
    r"((first_stage_)?model_ema\..*|first_stage_model\.loss\..*|logvar|lvlb_weights|betas|"
    r"embedding_manager\..*|v_pred|ztsnr|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_.*|posterior_.*|scale_factor|"
    r"cond_stage_model\.(model\.)?(logit_scale|text_projection(\.weight)?|attn_mask)|"
    r"cond_stage_model\.transformer\.(text_model\.)?(embeddings\.position_ids|text_projection\.weight))"
)
DEFAULT_SIDE, SIDE_OF_SECOND_V = 64, 96  # latents: of 512 x 512 pixels, and of Stable Diffusion 2's 768 x 768


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a file's tensors become three networks. Names with their prefixes."""

    unet: UNet  # of meta tensors, as the next
    vae: AutoencoderKL
    config: UNetConfig
    context_width: int
    text_encoder: TextEncoderPlan
    unet_names: dict[str, str]  # ours -> the file's
    vae_names: dict[str, str]
    averaged: bool = False  # whether those of the U-Net are the averages'

    @property
    def text_names(self) -> list[str]:
        return [CONDITIONER + name for name in self.text_encoder.wanted]


def read_single_file(
    path: Path, *, dtype: torch.dtype, ema: bool = True, prediction: Prediction | None = None
) -> ModelComponents:
    """A model in this precision, on the CPU. ema: the averaged weights, where the file holds both.

    prediction: in place of what the file says, or of what it is found to be: see ldm.interop.compvis.detect_prediction.
    Raises ValueError or FileNotFoundError for anything else, missing, cut short, or of another layout.
    """
    weights = open_weights(path).changed(attention_as_matrices)
    shapes = shapes_of(weights.tensors)
    refuse_foreign({name: shape for name, shape in shapes.items() if not LEFT_OVER.fullmatch(name)}, source=path)
    if not is_single_file(shapes):
        raise ValueError(f"{path} is not a whole model: {_what_it_is(shapes)}")
    told = read_told(path, weights.metadata)
    with described_by(path):
        told = with_buffers(told, weights)
        plan = make_plan(shapes, told, source=path)
        averaged = ema_names(plan, shapes)
    if averaged and ema:
        plan = replace(plan, unet_names=averaged, averaged=True)
    loaded, vae, text = fill_networks(plan, weights, dtype=dtype)
    tokenizer = Tokenizer(plan.text_encoder.config.tokenizer)
    check_components_fit(loaded, vae, [(text.config, tokenizer)], source=path)
    conditioner = Conditioner(TextTower(text, tokenizer))
    with described_by(path):
        noise_path, said = path_and_prediction(told, weights, source=path)
    found = find_prediction(prediction, said, unet=plan.unet, config=plan.config, conditioner=conditioner)
    scheduler_config_json(noise_path, found.prediction)  # raises for a prediction that this path does not have
    with described_by(path):
        side = native_side(told, plan, found.prediction)
    remarks = (*_ema_remark(bool(averaged), ema=ema), *found.remarks)
    return ModelComponents(
        model=LatentDiffusion(vae=vae, conditioner=conditioner, path=noise_path, prediction=found.prediction),
        denoiser=loaded.network,
        config=plan.config,
        sample_size=side,
        notes=weights.metadata.get("foundry.notes", ""),
        origin=Origin(files=weights.files, precision=describe(weights.tensors), remarks=remarks),
    )


def fill_networks(
    plan: Plan, weights: Weights, *, dtype: torch.dtype
) -> tuple[LoadedDenoiser, AutoencoderKL, TransformersTextEncoder]:
    """The three networks, once the file is known to hold what they need, and nothing else."""
    check_all(plan, weights.tensors, source=weights.source)
    # The text encoder first: what is mapped of the file is let go before the larger parts come.
    text_weights = plan.text_encoder.weights(weights.only(plan.text_names).read(dtype))
    text = text_encoder_from_weights(plan.text_encoder.config, text_weights, dtype=dtype)
    for network, names in ((plan.vae, plan.vae_names), (plan.unet, plan.unet_names)):
        found = weights.only(names.values()).read(dtype)
        network.load_state_dict({ours: found[theirs] for ours, theirs in names.items()}, strict=True, assign=True)
    return LoadedDenoiser(plan.unet, plan.config, DEFAULT_SIDE, plan.context_width), plan.vae, text


def attention_as_matrices(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder's attention, 1 x 1 convolutions there, as we have it."""
    return {
        name: as_matrix(tensor) if is_attention_of_vae(name.removeprefix(FIRST_STAGE)) else tensor
        for name, tensor in tensors.items()
    }


def with_buffers(told: Told, weights: Weights) -> Told:
    """With what training registered among the tensors, where nothing else was said: a scale that was measured, and the
    mark of v-prediction."""
    if told.own is None and told.scale_factor is None and "scale_factor" in weights.tensors:
        told = replace(told, scale_factor=float(weights.tensors["scale_factor"]))
    if told.own is None and told.prediction is None and "v_pred" in weights.tensors:
        told = replace(told, prediction="v")
    return told


def make_plan(shapes: Shapes, told: Told, *, source: Path) -> Plan:
    """Raises KeyError, naming a tensor that is missing, or ValueError for other networks than Stable Diffusion's."""
    if not any(name.startswith(FIRST_STAGE) for name in shapes):
        raise ValueError(f"it holds no autoencoder ({FIRST_STAGE}*): give a file that has one")
    below = {prefix: _below(shapes, prefix) for prefix in (DENOISER, FIRST_STAGE, CONDITIONER)}
    if told.own is not None:
        config, around = UNetLayout().from_json(told.own["unet"], source=source)
        context_width = around.context_width
        vae, text = vae_config(told.own["vae"], source=source), told.own["text_encoder"]
        text = read_text_encoder_config(text, hidden=text.get(HIDDEN_KEY, "last"))
    else:
        config, context_width = unet_from_shapes(below[DENOISER])
        config, text = with_heads(config, told), None
        vae = vae_from_shapes(below[FIRST_STAGE])
        scale = STABLE_DIFFUSION_SCALE if told.scale_factor is None else told.scale_factor
        vae = replace(vae, latent_std=(1 / scale,) * vae.latent_channels)
    latents = vae.latent_channels
    further = below[DENOISER]["input_blocks.0.0.weight"][1] - latents
    if further < 0:
        raise ValueError(f"its U-Net takes {latents + further} channels, its autoencoder makes {latents}: give another")
    with torch.device("meta"):
        unet = UNet(config, latent_channels=latents, concat_channels=further, context_width=context_width)
        autoencoder = AutoencoderKL(vae)
    of_unet, of_vae = unet_names(unet.state_dict(), config), vae_names(autoencoder.state_dict(), vae)
    return Plan(
        unet=unet,
        vae=autoencoder,
        config=config,
        context_width=context_width,
        text_encoder=plan_text_encoder(below[CONDITIONER], text),
        unet_names={ours: DENOISER + theirs for ours, theirs in of_unet.items()},
        vae_names={ours: FIRST_STAGE + theirs for ours, theirs in of_vae.items()},
    )


def _below(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def ema_names(plan: Plan, shapes: Shapes) -> dict[str, str]:
    """The U-Net's names for the averaged weights; none if the file has none. Raises ValueError if it has some."""
    names = {ours: ema_name(theirs.removeprefix(DENOISER)) for ours, theirs in plan.unet_names.items()}
    lost = [name for name in names.values() if name not in shapes]
    if lost and len(lost) < len(names):
        raise ValueError(f"it lacks {len(lost)} of {len(names)} averaged weights ({lost[0]}, ...): give a whole file")
    return {} if lost else names


def check_all(plan: Plan, tensors: Mapping[str, Tensor], *, source: Path) -> None:
    """Raise ValueError unless the file holds these three networks, and nothing else but what training left there."""
    wanted = {plan.unet_names[ours]: tensor for ours, tensor in plan.unet.state_dict().items()}
    wanted |= {plan.vae_names[ours]: tensor for ours, tensor in plan.vae.state_dict().items()}
    wanted |= {CONDITIONER + name: tensor for name, tensor in plan.text_encoder.wanted.items()}
    unasked = {name for name in tensors if name.startswith(DENOISER)} if plan.averaged else set()
    found = {
        name: tensor
        for name, tensor in tensors.items()
        if name in wanted or not (LEFT_OVER.fullmatch(name) or name in unasked)
    }
    check_fit(wanted, found, source=source, to=f"the nearest known layout, {nearest(plan)}")


def nearest(plan: Plan) -> str:
    version = 2 if plan.config.use_linear_projection else 1
    inpainting = plan.unet.concat_channels == inpainting_channels(plan.vae)
    return f"Stable Diffusion {version}{' for inpainting' * inpainting}"


def path_and_prediction(told: Told, weights: Weights, *, source: Path) -> tuple[PathConfig, Prediction | None]:
    """What was said of them; the path's table must be the file's own, where it has one."""
    tensors = weights.tensors
    if told.own is not None:
        return scheduler_from(told.own["scheduler"], source=source)
    path = ScaledLinearBetaPath(
        num_train_timesteps=told.timesteps,
        beta_start=told.linear_start,
        beta_end=told.linear_end,
        zero_terminal_snr="ztsnr" in tensors,
    )
    table = tensors.get("alphas_cumprod")
    if table is not None:
        times = torch.arange(1, told.timesteps + 1, dtype=torch.float64) / told.timesteps
        ours = path.alpha(times) ** 2
        off = 2 * torch.finfo(table.dtype).eps + 1e-5  # float32 sums of the betas, and the rounding to what is stored
        if table.shape != ours.shape or not (table.double() - ours).abs().max() <= off:
            raise ValueError(
                f"{source} was trained on another schedule than Stable Diffusion's: put its .yaml beside it"
            )
    return path, told.prediction


def native_side(told: Told, plan: Plan, prediction: Prediction) -> int:
    """Side of the latents that it was trained on."""
    if told.own is not None:
        return int(told.own["unet"]["sample_size"])
    if told.resolution is not None and told.resolution >= plan.vae.config.factor:
        return told.resolution // plan.vae.config.factor
    return SIDE_OF_SECOND_V if plan.config.use_linear_projection and prediction == "v" else DEFAULT_SIDE


def _ema_remark(both: bool, *, ema: bool) -> tuple[str, ...]:
    if not both:
        return () if ema else ("averaged weights (EMA) are not in it",)
    return ("averaged weights (EMA)",) if ema else ("not the averaged weights (EMA), which it also holds",)


def _what_it_is(shapes: Shapes) -> str:
    if is_vae(shapes):
        return "it looks like an autoencoder alone, which goes beside a model: give it with --vae"
    if any(name.startswith(EMA) for name in shapes):
        return "it holds averaged weights without the others: give the file that has both"
    if any(name.startswith(("down_blocks.", "transformer_blocks.")) for name in shapes):
        return "it looks like a denoiser alone, in diffusers' layout: give the folder that it comes from"
    if any("encoder.layers." in name or "transformer.resblocks." in name for name in shapes):
        return "it looks like a text encoder alone: give the model that it belongs to"
    return f"it has no {DENOISER}* among its {len(shapes)} tensors ({', '.join(sorted(shapes)[:3])})"
