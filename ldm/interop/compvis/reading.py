"""Read Stable Diffusion from a single file in CompVis's layout.

Settings that do not follow from the shapes come from the file's header or YAML (see sidecar), or else are those that
Stable Diffusion 1 and 2 have in common. ldm.interop.compvis.writing writes such files.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

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
from ldm.interop.compvis.parts import as_single_file, with_text_encoder_names
from ldm.interop.compvis.prediction import find_prediction
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
from ldm.interop.extra_tensors import EMBEDDINGS, extra_tensors, warn_of_extras
from ldm.interop.given_parts import NONE_GIVEN, GivenParts
from ldm.interop.identify import CONDITIONER, DENOISER, FIRST_STAGE, Shapes, refuse_foreign, refuse_parts, shapes_of
from ldm.interop.network_files import check_fit, described_by
from ldm.interop.weight_reader import Weights, describe, open_weights
from ldm.model.components import LoadedDenoiser, ModelComponents, Origin, check_components_fit
from ldm.model.conditioner import Conditioner, TextTower
from ldm.model.latent_diffusion import LatentDiffusion
from text.conversion import kind_of, text_encoder_from_weights
from text.encoder import TextEncoderConfig
from text.tokenizer import Tokenizer
from vae.autoencoder import STABLE_DIFFUSION_SCALE, AutoencoderKL, AutoencoderKLConfig

# Left by training in such files: tables, EMA counters, the autoencoder's discriminator and perceptual loss, and CLIP's
# half for images.
LEFT_OVER = re.compile(
    r"((first_stage_)?model_ema\..*|first_stage_model\.loss\..*|logvar|lvlb_weights|betas|"
    r"embedding_manager\..*|v_pred|ztsnr|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_.*|posterior_.*|scale_factor|"
    r"cond_stage_model\.(model\.)?(logit_scale|text_projection(\.weight)?|attn_mask)|"
    r"cond_stage_model\.transformer\.(text_model\.)?(embeddings\.position_ids|text_projection\.weight)|"
    r"cond_stage_model\.transformer\.(vision_model\..*|visual_projection\.weight|logit_scale)|"
    r"cond_stage_model\.model\.visual\..*)"
)
DEFAULT_SIDE, SIDE_OF_SECOND_V = 64, 96  # of the latents of 512 x 512 pixels, and of Stable Diffusion 2's 768 x 768


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The mapping from a file's tensors to three networks. Names include their prefixes."""

    unet: UNet  # of meta tensors, as is vae
    vae: AutoencoderKL | None  # None: the file has none, as text_encoder
    config: UNetConfig
    context_width: int
    text_encoder: TextEncoderPlan | None
    unet_names: dict[str, str]  # ours -> the file's
    vae_names: dict[str, str]
    averaged: bool = False  # whether unet_names are those of the averaged weights


def read_single_file(
    path: Path, *, dtype: torch.dtype, vae_dtype: torch.dtype | None = None, ema: bool = True,
    prediction: Prediction | None = None, given: GivenParts = NONE_GIVEN,
) -> ModelComponents:  # fmt: skip
    """Read a model in this precision, on the CPU. ema: use the averaged weights if the file holds both.

    vae_dtype: the autoencoder's precision, if it is another. prediction: overrides the stated or detected one: see
    find_prediction. given: parts in place of the file's own, with which a U-Net alone is a model. Raises ValueError or
    FileNotFoundError for a file that is missing, truncated or of another layout.
    """
    weights = open_single_file(path, given)
    sidecar = read_sidecar(path, weights.metadata)
    with described_by(path):
        sidecar = with_buffers(sidecar, weights)
        plan = make_plan(shapes_of(weights.tensors), sidecar, source=path)
        averaged = ema_names(plan, weights.tensors)
    if averaged and ema:
        plan = replace(plan, unet_names=averaged, averaged=True)
    vae, tower = fill_networks(plan, weights, given, dtype=dtype, vae_dtype=vae_dtype or dtype)
    loaded = LoadedDenoiser(plan.unet, plan.config, DEFAULT_SIDE, plan.context_width)
    check_components_fit(loaded, vae, [(tower.encoder.config, tower.tokenizer)], source=path)
    conditioner = Conditioner(tower)
    with described_by(path):
        noise_path, stated = path_and_prediction(sidecar, weights, source=path)
    prediction, remarks = find_prediction(prediction, stated, loaded, conditioner)
    scheduler_config_json(noise_path, prediction)  # raises for a prediction that this path does not have
    with described_by(path):
        side = native_side(sidecar, plan.config, vae, prediction)
        sampling = stated_sampling(sidecar, plan, noise_path, prediction, source=path)
    remarks = (*_ema_remark(bool(averaged), ema=ema), *_layer_remark(sidecar, given), *remarks)
    return ModelComponents(
        model=LatentDiffusion(vae=vae, conditioner=conditioner, path=noise_path, prediction=prediction),
        denoiser=plan.unet,
        config=plan.config,
        sample_size=side,
        notes=weights.metadata.get("foundry.notes", ""),
        origin=Origin(files=weights.files, precision=describe(weights.tensors), remarks=remarks, places=(path,)),
        scheduler=sampling.stock,
        unfollowed=sampling.unfollowed,
    )


def open_single_file(path: Path, given: GivenParts) -> Weights:
    """Open a file, its tensors under the names of a complete one. Raises ValueError for one of another kind, or without
    a part that is not given."""
    weights = open_weights(path)
    with described_by(path):
        weights = as_single_file(weights).changed(attention_as_matrices)
    shapes = shapes_of(weights.tensors)
    own = [name for name in shapes if not LEFT_OVER.fullmatch(name) and not name.startswith(EMBEDDINGS)]
    refuse_foreign({name: shapes[name] for name in own}, source=path)
    refuse_parts(shapes, source=path)
    has_vae, has_text = (any(name.startswith(prefix) for name in shapes) for prefix in (FIRST_STAGE, CONDITIONER))
    given.check(path, has_vae=has_vae, has_text=has_text)
    return weights


def fill_networks(
    plan: Plan, weights: Weights, given: GivenParts, *, dtype: torch.dtype, vae_dtype: torch.dtype
) -> tuple[AutoencoderKL, TextTower]:
    """Load the U-Net, and return the autoencoder and the text encoder, the file's or the given ones, after checking
    that the file holds exactly the weights of its networks."""
    check_all(plan, weights.tensors, source=weights.source)
    # The text encoder first, so that its mapped pages are released before the larger parts are read.
    tower = given.towers[0] if given.towers else _text_tower(plan.text_encoder, weights, dtype=dtype)
    if given.vae:
        vae = given.vae(plan.vae and plan.vae.config)
    else:
        assert plan.vae is not None  # by given.check
        vae = plan.vae
        _fill(vae, plan.vae_names, weights, dtype=vae_dtype)
    _fill(plan.unet, plan.unet_names, weights, dtype=dtype)
    return vae, tower


def _fill(network: nn.Module, names: Mapping[str, str], weights: Weights, *, dtype: torch.dtype) -> None:
    found = weights.only(names.values()).read(dtype)
    network.load_state_dict({ours: found[theirs] for ours, theirs in names.items()}, strict=True, assign=True)


def _text_tower(plan: TextEncoderPlan | None, weights: Weights, *, dtype: torch.dtype) -> TextTower:
    assert plan is not None  # by given.check
    found = plan.weights(weights.only(CONDITIONER + name for name in plan.wanted).read(dtype))
    return TextTower(text_encoder_from_weights(plan.config, found, dtype=dtype), Tokenizer(plan.config.tokenizer))


def read_text_tower(path: Path, *, dtype: torch.dtype) -> TextTower:
    """Read the text encoder of a single file, or one that is alone in a file, in this precision.

    Raises ValueError or FileNotFoundError for a file without one, or with another than CLIP's.
    """
    weights = with_text_encoder_names(open_weights(path))
    sidecar = read_sidecar(path, weights.metadata)
    with described_by(path):
        shapes = _below(shapes_of(weights.tensors), CONDITIONER)
        plan = _planned_text(shapes, sidecar, source=path)
        wanted = {CONDITIONER + name: tensor for name, tensor in plan.wanted.items()}
        check_fit(wanted, {name: weights.tensors[name] for name in wanted if name in weights.tensors}, source=path)
        return _text_tower(plan, weights, dtype=dtype)


def _planned_text(shapes: Shapes, sidecar: Sidecar, *, source: Path) -> TextEncoderPlan:
    """Plan the text encoder. A header may say clip skip 2 (kohya-ss/sd-scripts, library/sai_model_spec.py)."""
    plan = plan_text_encoder(shapes, _stated_text(sidecar))
    skip, own = sidecar.clip_skip or 1, plan.config.own_clip_skip
    if skip > 2:
        stated = f"{source}: its header says clip skip {skip}"
        warnings.warn(f"{stated}, which is not followed: give --clip-skip {skip}", stacklevel=2)
    if skip != 2 or own == 2:
        return plan
    return plan._replace(config=replace(plan.config, hidden="penultimate"))


def _stated_text(sidecar: Sidecar) -> TextEncoderConfig | None:
    if sidecar.own is None:
        return None
    text = sidecar.own["text_encoder"]
    return kind_of(text).read_config(text, hidden=text.get(HIDDEN_KEY, "last"))


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
    below = {prefix: _below(shapes, prefix) for prefix in (DENOISER, FIRST_STAGE, CONDITIONER)}
    if sidecar.own is not None:
        config, around = UNetLayout().from_json(sidecar.own["unet"], source=source)
        context_width = around.context_width
    else:
        config, context_width = unet_from_shapes(below[DENOISER])
        config = with_heads(config, sidecar)
    taken = below[DENOISER]["input_blocks.0.0.weight"][1]
    vae = _planned_vae(below[FIRST_STAGE], sidecar, source=source) if below[FIRST_STAGE] else None
    latents = below[DENOISER]["out.2.weight"][0] if vae is None else vae.latent_channels
    if taken < latents:
        raise ValueError(f"its U-Net takes {taken} channels, but its autoencoder produces {latents}: give another")
    with torch.device("meta"):
        unet = UNet(config, latent_channels=latents, concat_channels=taken - latents, context_width=context_width)
        autoencoder = None if vae is None else AutoencoderKL(vae)
    of_unet = unet_names(unet.state_dict(), config)
    of_vae = {} if autoencoder is None else vae_names(autoencoder.state_dict(), autoencoder.config)
    text = below[CONDITIONER]
    return Plan(
        unet=unet,
        vae=autoencoder,
        config=config,
        context_width=context_width,
        text_encoder=_planned_text(text, sidecar, source=source) if text else None,
        unet_names={ours: DENOISER + theirs for ours, theirs in of_unet.items()},
        vae_names={ours: FIRST_STAGE + theirs for ours, theirs in of_vae.items()},
    )


def _planned_vae(shapes: Shapes, sidecar: Sidecar, *, source: Path) -> AutoencoderKLConfig:
    if sidecar.own is not None:
        return vae_config(sidecar.own["vae"], source=source)
    vae = vae_from_shapes(shapes)
    scale = STABLE_DIFFUSION_SCALE if sidecar.scale_factor is None else sidecar.scale_factor
    return replace(vae, latent_std=(1 / scale,) * vae.latent_channels)


def _below(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def ema_names(plan: Plan, shapes: Container[str]) -> dict[str, str]:
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
    if plan.vae is not None:
        wanted |= {plan.vae_names[ours]: tensor for ours, tensor in plan.vae.state_dict().items()}
    if plan.text_encoder is not None:
        wanted |= {CONDITIONER + name: tensor for name, tensor in plan.text_encoder.wanted.items()}
    unasked = {name for name in tensors if LEFT_OVER.fullmatch(name) or (plan.averaged and name.startswith(DENOISER))}
    if (text := plan.text_encoder) is not None:
        unasked |= {name for name in tensors if text.is_unused(name.removeprefix(CONDITIONER))}
    unasked -= wanted.keys()
    extras = extra_tensors(tensors.keys() - unasked, wanted=wanted, modules=(DENOISER, FIRST_STAGE, CONDITIONER))
    found = {name: tensor for name, tensor in tensors.items() if name not in unasked and name not in extras}
    check_fit(wanted, found, source=source, to=f"the nearest known layout, {nearest(plan)}")
    warn_of_extras(extras, source)


def nearest(plan: Plan) -> str:
    version = 2 if plan.config.use_linear_projection else 1
    inpainting = plan.unet.concat_channels == 1 + plan.unet.latent_channels
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


def native_side(sidecar: Sidecar, config: UNetConfig, vae: AutoencoderKL, prediction: Prediction) -> int:
    """Return the side of the latents that the model was trained on."""
    if sidecar.own is not None:
        return int(sidecar.own["unet"]["sample_size"])
    if sidecar.resolution is not None and sidecar.resolution >= vae.config.factor:
        return sidecar.resolution // vae.config.factor
    return SIDE_OF_SECOND_V if config.use_linear_projection and prediction == "v" else DEFAULT_SIDE


def _layer_remark(sidecar: Sidecar, given: GivenParts) -> tuple[str, ...]:
    return ("text states of clip skip 2 (its header)",) if sidecar.clip_skip == 2 and not given.towers else ()


def _ema_remark(both: bool, *, ema: bool) -> tuple[str, ...]:
    if not both:
        return () if ema else ("it has no averaged weights (EMA)",)
    return ("averaged weights (EMA)",) if ema else ("not the averaged weights (EMA), which it also holds",)
