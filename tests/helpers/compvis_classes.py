"""What the classes that CompVis's configurations name accept, written from their constructors.

Sources: CompVis/stable-diffusion 21f890f and Stability-AI/stablediffusion cf1d67a: ldm/util.py
(instantiate_from_config), ldm/models/diffusion/ddpm.py, ldm/models/autoencoder.py, ldm/modules/encoders/modules.py,
ldm/modules/diffusionmodules/{openaimodel,model}.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Class:
    keys: frozenset[str]  # that its constructor takes; another is a TypeError
    needed: frozenset[str] = frozenset()  # without a default
    parts: tuple[str, ...] = ()  # of which each is a configuration in turn
    rules: tuple[tuple[str, Callable[[Params], bool]], ...] = ()  # its assertions, by name


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _unet(further: str = "") -> Class:
    """openaimodel.UNetModel; further: the keys that only Stability's has."""
    return Class(
        _words(
            "image_size in_channels model_channels out_channels num_res_blocks attention_resolutions dropout "
            "channel_mult conv_resample dims num_classes use_checkpoint use_fp16 num_heads num_head_channels "
            "num_heads_upsample use_scale_shift_norm resblock_updown use_new_attention_order use_spatial_transformer "
            f"transformer_depth context_dim n_embed legacy {further}"
        ),
        _words("image_size in_channels model_channels out_channels num_res_blocks attention_resolutions"),
        rules=(
            ("context_dim goes with use_spatial_transformer",
             lambda p: (p.get("context_dim") is not None) == bool(p.get("use_spatial_transformer"))),
            ("either num_heads or num_head_channels",
             lambda p: (p.get("num_heads", -1) == -1) != (p.get("num_head_channels", -1) == -1)),
            ("heads divide the widths", lambda p: all(
                p["model_channels"] * mult % max(p.get("num_heads", -1), p.get("num_head_channels", -1)) == 0
                for level, mult in enumerate(p["channel_mult"]) if 2**level in p["attention_resolutions"])),
        ),
    )  # fmt: skip


_DDPM = (
    "unet_config timesteps beta_schedule loss_type ckpt_path ignore_keys load_only_unet monitor use_ema "
    "first_stage_key image_size channels log_every_t clip_denoised linear_start linear_end cosine_s given_betas "
    "original_elbo_weight v_posterior l_simple_weight conditioning_key parameterization scheduler_config "
    "use_positional_encodings learn_logvar logvar_init"
)
_DDPM_STABILITY = "make_it_fit ucg_training reset_ema reset_num_ema_updates"
_LATENT = (
    "first_stage_config cond_stage_config num_timesteps_cond cond_stage_key cond_stage_trainable concat_mode "
    "cond_stage_forward scale_factor scale_by_std"
)
_FINETUNE = "finetune_keys keep_finetune_dims c_concat_log_start c_concat_log_end concat_keys masked_image_key"
_KEYS = (None, "concat", "crossattn", "hybrid", "adm", "hybrid-adm", "crossattn-adm")
_DD = _words("ch out_ch num_res_blocks attn_resolutions in_channels resolution z_channels")


def _latent(keys: str, predictions: tuple[str, ...], *further: tuple[str, Callable[[Params], bool]]) -> Class:
    return Class(
        _words(keys),
        _words("first_stage_config cond_stage_config unet_config timesteps"),  # timesteps: kwargs["timesteps"]
        parts=("unet_config", "first_stage_config", "cond_stage_config"),
        rules=(
            (f"parameterization is one of {', '.join(predictions)}",
             lambda p: p.get("parameterization", "eps") in predictions),
            ("the condition is of a known kind", lambda p: p.get("conditioning_key") in _KEYS),
            ("num_timesteps_cond <= timesteps", lambda p: p.get("num_timesteps_cond", 1) <= p["timesteps"]),
            *further,
        ),
    )  # fmt: skip


_AUTOENCODER = Class(
    _words("ddconfig lossconfig embed_dim ckpt_path ignore_keys image_key colorize_nlabels monitor"),
    _words("ddconfig lossconfig embed_dim"),
    parts=("lossconfig",),
    rules=(
        ("double_z", lambda p: bool(p["ddconfig"]["double_z"])),
        ("the encoder's sizes", lambda p: p["ddconfig"].keys() >= _DD),  # further keys are ignored
    ),
)
_NOTHING = Class(_words("args"))  # torch.nn.Identity takes anything
_DIFFUSION, _ENCODERS = "ldm.models.diffusion.ddpm", "ldm.modules.encoders.modules"
_UNET, _VAE = "ldm.modules.diffusionmodules.openaimodel.UNetModel", "ldm.models.autoencoder.AutoencoderKL"

COMPVIS = {
    f"{_DIFFUSION}.LatentDiffusion": _latent(f"{_DDPM} {_LATENT}", ("eps", "x0")),
    _UNET: _unet(),
    _VAE: _AUTOENCODER,
    f"{_ENCODERS}.FrozenCLIPEmbedder": Class(_words("version device max_length")),
    "torch.nn.Identity": _NOTHING,
}
STABILITY = {
    f"{_DIFFUSION}.LatentDiffusion": _latent(
        f"{_DDPM} {_DDPM_STABILITY} {_LATENT} force_null_conditioning", ("eps", "x0", "v")
    ),
    f"{_DIFFUSION}.LatentInpaintDiffusion": _latent(
        f"{_DDPM} {_DDPM_STABILITY} {_LATENT} force_null_conditioning {_FINETUNE}",
        ("eps", "x0", "v"),
        # By default there are finetune_keys: "can only finetune from a given checkpoint".
        ("finetune_keys need a ckpt_path", lambda p: p.get("finetune_keys", ()) is None or "ckpt_path" in p),
        ("masked_image_key is in concat_keys", lambda p: p.get("masked_image_key", "masked_image")
         in p.get("concat_keys", ("mask", "masked_image"))),
    ),
    _UNET: _unet(
        "use_bf16 disable_self_attentions num_attention_blocks disable_middle_self_attn use_linear_in_transformer "
        "adm_in_channels"
    ),
    _VAE: Class(_AUTOENCODER.keys | _words("ema_decay learn_logvar"), _AUTOENCODER.needed, _AUTOENCODER.parts,
                _AUTOENCODER.rules),
    f"{_ENCODERS}.FrozenCLIPEmbedder": Class(
        _words("version device max_length freeze layer layer_idx"),
        rules=(("layer", lambda p: p.get("layer", "last") in ("last", "pooled", "hidden")),),
    ),
    f"{_ENCODERS}.FrozenOpenCLIPEmbedder": Class(
        _words("arch version device max_length freeze layer"),
        rules=(("layer", lambda p: p.get("layer", "last") in ("last", "penultimate")),),
    ),
    "torch.nn.Identity": _NOTHING,
}  # fmt: skip


def problems(config: Params, classes: Mapping[str, Class]) -> Iterator[str]:
    """What instantiate_from_config would fail for, in this configuration and those within it."""
    target = str(config.get("target"))
    if target not in classes:
        yield f"no {target}"
        return
    params, known = config.get("params", {}), classes[target]
    name = target.rpartition(".")[2]
    yield from (f"{name} does not take {key}" for key in sorted(params.keys() - known.keys))
    missing = known.needed - params.keys()
    yield from (f"{name} needs {key}" for key in sorted(missing))
    if not missing:
        yield from (f"{name}: {rule}" for rule, holds in known.rules if not holds(params))
    for part in known.parts:
        if part in params:
            yield from problems(params[part], classes)
