"""Read Stable Diffusion from a single file in CompVis's layout.

Settings that do not follow from the shapes come from the file's header or YAML (see sidecar), or else are those that
Stable Diffusion 1 and 2 have in common. ldm.interop.compvis.writing writes such files.

Whether Stable Diffusion 2 predicts eps or v: the user's choice; then the file or the YAML next to it; then eps for
Stable Diffusion 1; otherwise a test of the network, because both have the same shapes. Given pure noise at the last
timestep, a network that predicts eps returns its input. One that predicts v = alpha eps - sigma x0 returns about -x0,
an image of its own, because alpha is nearly zero there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.denoisers import UNet, UNetConfig
from ldm.diffusion import PathConfig, Prediction, ScaledLinearBetaPath
from ldm.interop.compvis.names import (
    TextEncoderPlan,
    ema_name,
    is_attention_of_vae,
    plan_text_encoder,
    unet_from_shapes,
    unet_names,
    vae_from_shapes,
    vae_names,
)
from ldm.interop.compvis.sidecar import HIDDEN_KEY, Sidecar, read_sidecar, with_heads
from ldm.interop.diffusers_layout.denoiser import UNetLayout
from ldm.interop.diffusers_layout.scheduler import (
    Sampling,
    sampling_from,
    scheduler_config_json,
    scheduler_from,
    warn_of,
)
from ldm.interop.diffusers_layout.vae import vae_config
from ldm.interop.identify import CONDITIONER, DENOISER, FIRST_STAGE, Shapes, refuse_foreign, refuse_parts, shapes_of
from ldm.interop.network_files import check_fit, described_by
from ldm.interop.weight_reader import Weights, describe, open_weights
from ldm.model.components import LoadedDenoiser, ModelComponents, Origin, check_components_fit, inpainting_channels
from ldm.model.conditioner import Conditioner, TextTower
from ldm.model.latent_diffusion import LatentDiffusion
from text.conversion import kind_of, text_encoder_from_weights
from text.encoder import TransformersTextEncoder
from text.tokenizer import Tokenizer
from vae.autoencoder import STABLE_DIFFUSION_SCALE, AutoencoderKL

# Left by training in such files: tables, EMA counters, and the autoencoder's discriminator and perceptual loss.
LEFT_OVER = re.compile(
    r"((first_stage_)?model_ema\..*|first_stage_model\.loss\..*|logvar|lvlb_weights|betas|"
    r"embedding_manager\..*|v_pred|ztsnr|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_.*|posterior_.*|scale_factor|"
    r"cond_stage_model\.(model\.)?(logit_scale|text_projection(\.weight)?|attn_mask)|"
    r"cond_stage_model\.transformer\.(text_model\.)?(embeddings\.position_ids|text_projection\.weight))"
)
DEFAULT_SIDE, SIDE_OF_SECOND_V = 64, 96  # of the latents of 512 x 512 pixels, and of Stable Diffusion 2's 768 x 768
LAST_TIMESTEP = 999
ASKED_SIDE = 16  # of the latents: 1/16 of the work of the native 64 x 64
LEAST_CORRELATION = 0.5  # of the output with the noise: near 1 for an eps network, near 0 for a v network


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The mapping from a file's tensors to three networks. Names include their prefixes."""

    unet: UNet  # of meta tensors, as is vae
    vae: AutoencoderKL
    config: UNetConfig
    context_width: int
    text_encoder: TextEncoderPlan
    unet_names: dict[str, str]  # ours -> the file's
    vae_names: dict[str, str]
    averaged: bool = False  # whether unet_names are those of the averaged weights


def read_single_file(
    path: Path, *, dtype: torch.dtype, ema: bool = True, prediction: Prediction | None = None
) -> ModelComponents:
    """Read a model in this precision, on the CPU. ema: use the averaged weights if the file holds both.

    prediction: overrides the stated or detected one: see find_prediction. Raises ValueError or
    FileNotFoundError for a file that is missing, truncated or of another layout.
    """
    weights = open_weights(path).changed(attention_as_matrices)
    shapes = shapes_of(weights.tensors)
    refuse_foreign({name: shape for name, shape in shapes.items() if not LEFT_OVER.fullmatch(name)}, source=path)
    refuse_parts(shapes, source=path)
    sidecar = read_sidecar(path, weights.metadata)
    with described_by(path):
        sidecar = with_buffers(sidecar, weights)
        plan = make_plan(shapes, sidecar, source=path)
        averaged = ema_names(plan, shapes)
    if averaged and ema:
        plan = replace(plan, unet_names=averaged, averaged=True)
    text = fill_networks(plan, weights, dtype=dtype)
    tokenizer = Tokenizer(plan.text_encoder.config.tokenizer)
    loaded = LoadedDenoiser(plan.unet, plan.config, DEFAULT_SIDE, plan.context_width)
    check_components_fit(loaded, plan.vae, [(text.config, tokenizer)], source=path)
    conditioner = Conditioner(TextTower(text, tokenizer))
    with described_by(path):
        noise_path, stated = path_and_prediction(sidecar, weights, source=path)
    prediction, remarks = find_prediction(prediction, stated, plan.unet, plan.config, conditioner)
    scheduler_config_json(noise_path, prediction)  # raises for a prediction that this path does not have
    with described_by(path):
        side = native_side(sidecar, plan, prediction)
        sampling = stated_sampling(sidecar, plan, noise_path, prediction, source=path)
    remarks = (*_ema_remark(bool(averaged), ema=ema), *remarks)
    return ModelComponents(
        model=LatentDiffusion(vae=plan.vae, conditioner=conditioner, path=noise_path, prediction=prediction),
        denoiser=plan.unet,
        config=plan.config,
        sample_size=side,
        notes=weights.metadata.get("foundry.notes", ""),
        origin=Origin(files=weights.files, precision=describe(weights.tensors), remarks=remarks),
        scheduler=sampling.stock,
        unfollowed=sampling.unfollowed,
    )


def fill_networks(plan: Plan, weights: Weights, *, dtype: torch.dtype) -> TransformersTextEncoder:
    """Load the U-Net and the autoencoder, and return the text encoder, after checking that the file holds exactly their
    weights."""
    check_all(plan, weights.tensors, source=weights.source)
    # The text encoder first, so that its mapped pages are released before the larger parts are read.
    text_names = [CONDITIONER + name for name in plan.text_encoder.wanted]
    text_weights = plan.text_encoder.weights(weights.only(text_names).read(dtype))
    text = text_encoder_from_weights(plan.text_encoder.config, text_weights, dtype=dtype)
    for network, names in ((plan.vae, plan.vae_names), (plan.unet, plan.unet_names)):
        found = weights.only(names.values()).read(dtype)
        network.load_state_dict({ours: found[theirs] for ours, theirs in names.items()}, strict=True, assign=True)
    return text


def attention_as_matrices(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the autoencoder's attention from 1 x 1 convolutions to our matrices, which some files already hold."""
    return {
        name: tensor.flatten(1)
        if is_attention_of_vae(name.removeprefix(FIRST_STAGE)) and tensor.shape[2:] == torch.Size((1, 1))
        else tensor
        for name, tensor in tensors.items()
    }


def with_buffers(sidecar: Sidecar, weights: Weights) -> Sidecar:
    """Add settings that are not stated but stored among the tensors: a measured scale, and the v-prediction marker."""
    if sidecar.own is None and sidecar.scale_factor is None and "scale_factor" in weights.tensors:
        sidecar = replace(sidecar, scale_factor=float(weights.tensors["scale_factor"]))
    if sidecar.own is None and sidecar.prediction is None and "v_pred" in weights.tensors:
        sidecar = replace(sidecar, prediction="v")
    return sidecar


def make_plan(shapes: Shapes, sidecar: Sidecar, *, source: Path) -> Plan:
    """Build the networks on the meta device and map names. Raises KeyError with the name of a missing tensor, and
    ValueError for networks other than Stable Diffusion's."""
    if not any(name.startswith(FIRST_STAGE) for name in shapes):
        raise ValueError(f"it has no autoencoder ({FIRST_STAGE}*): give a file that has one")
    below = {prefix: _below(shapes, prefix) for prefix in (DENOISER, FIRST_STAGE, CONDITIONER)}
    if sidecar.own is not None:
        config, around = UNetLayout().from_json(sidecar.own["unet"], source=source)
        context_width = around.context_width
        vae, text = vae_config(sidecar.own["vae"], source=source), sidecar.own["text_encoder"]
        text = kind_of(text).read_config(text, hidden=text.get(HIDDEN_KEY, "last"))
    else:
        config, context_width = unet_from_shapes(below[DENOISER])
        config, text = with_heads(config, sidecar), None
        vae = vae_from_shapes(below[FIRST_STAGE])
        scale = STABLE_DIFFUSION_SCALE if sidecar.scale_factor is None else sidecar.scale_factor
        vae = replace(vae, latent_std=(1 / scale,) * vae.latent_channels)
    latents = vae.latent_channels
    taken = below[DENOISER]["input_blocks.0.0.weight"][1]
    if taken < latents:
        raise ValueError(f"its U-Net takes {taken} channels, but its autoencoder produces {latents}: give another")
    with torch.device("meta"):
        unet = UNet(config, latent_channels=latents, concat_channels=taken - latents, context_width=context_width)
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
    """Map the U-Net's names to the averaged weights; empty if the file has none. Raises ValueError if only some are
    present."""
    names = {ours: ema_name(theirs.removeprefix(DENOISER)) for ours, theirs in plan.unet_names.items()}
    lost = [name for name in names.values() if name not in shapes]
    if lost and len(lost) < len(names):
        raise ValueError(
            f"it lacks {len(lost)} of {len(names)} averaged weights ({lost[0]}, ...): give a complete file"
        )
    return {} if lost else names


def check_all(plan: Plan, tensors: Mapping[str, Tensor], *, source: Path) -> None:
    """Raise ValueError unless the file holds exactly these three networks, apart from tensors left by training."""
    wanted = {plan.unet_names[ours]: tensor for ours, tensor in plan.unet.state_dict().items()}
    wanted |= {plan.vae_names[ours]: tensor for ours, tensor in plan.vae.state_dict().items()}
    wanted |= {CONDITIONER + name: tensor for name, tensor in plan.text_encoder.wanted.items()}
    unasked = {name for name in tensors if LEFT_OVER.fullmatch(name) or (plan.averaged and name.startswith(DENOISER))}
    found = {name: tensor for name, tensor in tensors.items() if name in wanted or name not in unasked}
    check_fit(wanted, found, source=source, to=f"the nearest known layout, {nearest(plan)}")


def nearest(plan: Plan) -> str:
    version = 2 if plan.config.use_linear_projection else 1
    inpainting = plan.unet.concat_channels == inpainting_channels(plan.vae)
    return f"Stable Diffusion {version}{' for inpainting' * inpainting}"


def path_and_prediction(sidecar: Sidecar, weights: Weights, *, source: Path) -> tuple[PathConfig, Prediction | None]:
    """Return the stated path and prediction. Raises ValueError if the file contains the table of another path."""
    tensors = weights.tensors
    if sidecar.own is not None:
        return scheduler_from(sidecar.own["scheduler"], source=source)
    path = ScaledLinearBetaPath(
        num_train_timesteps=sidecar.timesteps,
        beta_start=sidecar.linear_start,
        beta_end=sidecar.linear_end,
        zero_terminal_snr="ztsnr" in tensors,
    )
    table = tensors.get("alphas_cumprod")
    if table is None:
        return path, sidecar.prediction
    times = torch.arange(1, sidecar.timesteps + 1, dtype=torch.float64) / sidecar.timesteps
    ours = path.alpha(times) ** 2
    off = 2 * torch.finfo(table.dtype).eps + 1e-5  # float32 sums of the betas, and rounding to the stored dtype
    if table.shape != ours.shape or not (table.double() - ours).abs().max() <= off:
        raise ValueError(f"{source} was trained on another schedule than Stable Diffusion's: put its .yaml next to it")
    return path, sidecar.prediction


def stated_sampling(
    sidecar: Sidecar, plan: Plan, path: PathConfig, prediction: Prediction, *, source: Path
) -> Sampling:
    """Return how our own header says to sample; a file of other programs says nothing of it."""
    if sidecar.own is None:
        return Sampling(None)
    inpainting = plan.unet.concat_channels > 0
    found = sampling_from(sidecar.own["scheduler"], path, prediction, unet=True, inpainting=inpainting)
    warn_of(found, source=source, path=path)
    return found


def native_side(sidecar: Sidecar, plan: Plan, prediction: Prediction) -> int:
    """Return the side of the latents that the model was trained on."""
    if sidecar.own is not None:
        return int(sidecar.own["unet"]["sample_size"])
    if sidecar.resolution is not None and sidecar.resolution >= plan.vae.config.factor:
        return sidecar.resolution // plan.vae.config.factor
    return SIDE_OF_SECOND_V if plan.config.use_linear_projection and prediction == "v" else DEFAULT_SIDE


def _ema_remark(both: bool, *, ema: bool) -> tuple[str, ...]:
    if not both:
        return () if ema else ("it has no averaged weights (EMA)",)
    return ("averaged weights (EMA)",) if ema else ("not the averaged weights (EMA), which it also holds",)


def find_prediction(
    wanted: Prediction | None, stated: Prediction | None, unet: UNet, config: UNetConfig, conditioner: Conditioner
) -> tuple[Prediction, tuple[str, ...]]:
    """Return what the network predicts, with a remark on how that was determined."""
    if wanted is not None:
        return wanted, ("prediction as requested",)
    if stated is not None or not config.use_linear_projection:
        return stated or "eps", ()
    seen = noise_in_answer(unet, conditioner)
    remark = f"prediction found by a test (noise in its output: {seen:.2f}; --prediction sets it)"
    return "eps" if seen > LEAST_CORRELATION else "v", (remark,)


@torch.no_grad()
def noise_in_answer(unet: UNet, conditioner: Conditioner) -> float:
    """Return the correlation of the network's output with its input noise, for the empty prompt."""
    parameter = next(unet.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, unet.in_channels, ASKED_SIDE, ASKED_SIDE, generator=generator).to(parameter)
    noise, further = x[:, : unet.latent_channels], None
    if unet.concat_channels:  # for inpainting: everything masked, and an empty image
        further = torch.zeros_like(x[:, unet.latent_channels :])
        further[:, 0] = 1
    condition = conditioner([""])._replace(concat=further).to(parameter.dtype)
    t = torch.full((1,), float(LAST_TIMESTEP), device=parameter.device)
    answer = unet(noise, t, condition).prediction
    return F.cosine_similarity(answer.float().flatten(), noise.float().flatten(), dim=0).item()
