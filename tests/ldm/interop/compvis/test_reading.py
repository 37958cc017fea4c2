"""Stable Diffusion in one file: every form that it comes in gives the same model, and what does not fit is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.stable_diffusion import answering_with_the_noise, stable_diffusion, states
from safetensors.torch import save_file
from torch import Tensor

from ldm.diffusion import CosinePath, ScaledLinearBetaPath
from ldm.interop.compvis.names import ema_name
from ldm.interop.compvis.reading import read_single_file
from ldm.interop.compvis.writing import single_file_tensors, write_single_file
from ldm.interop.diffusers_layout.folder import read_folder, write_folder
from ldm.model.components import ModelComponents

Tensors = dict[str, Tensor]
UNET = "model.diffusion_model."
FP32: dict[str, Any] = {"dtype": torch.float32}
VERSIONS = pytest.mark.parametrize(("version", "prediction"), [(1, "eps"), (2, "v")])


def foreign(parts: ModelComponents) -> Tensors:
    """The tensors as another program would store them: nothing in the header."""
    return {name: tensor.contiguous().clone() for name, tensor in single_file_tensors(parts).items()}


def assert_equal(found: ModelComponents, expected: ModelComponents) -> None:
    ours, theirs = states(found), states(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert found.config == expected.config
    assert found.model.vae.config == expected.model.vae.config
    (ours, theirs) = (parts.model.conditioner.towers[0] for parts in (found, expected))
    assert ours.encoder.config == theirs.encoder.config and ours.tokenizer.config == theirs.tokenizer.config


@VERSIONS
@pytest.mark.parametrize("inpainting", [False, True])
def test_diffusers_reads_what_we_write_bit_by_bit(version, prediction, inpainting, tmp_path):
    from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline

    parts = stable_diffusion(version, prediction=prediction, inpainting=inpainting)
    write_folder(parts, tmp_path / "folder", **FP32)
    write_single_file(parts, tmp_path / "m.safetensors", **FP32)
    loader = StableDiffusionInpaintPipeline if inpainting else StableDiffusionPipeline
    pipe: Any = loader.from_single_file(
        str(tmp_path / "m.safetensors"), config=str(tmp_path / "folder"), local_files_only=True
    )
    theirs = {"denoiser": pipe.unet, "vae": pipe.vae, "text": pipe.text_encoder}
    expected = states(read_folder(tmp_path / "folder", **FP32))
    found = {f"{part}.{name}": t for part, network in theirs.items() for name, t in network.state_dict().items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@VERSIONS
@pytest.mark.parametrize("inpainting", [False, True])
def test_through_diffusers_a_single_file_and_back(version, prediction, inpainting, tmp_path):
    """diffusers' folder -> ours -> single file -> ours -> diffusers' folder, and nothing has changed on the way."""
    write_folder(stable_diffusion(version, prediction=prediction, inpainting=inpainting), tmp_path / "a", **FP32)
    first = read_folder(tmp_path / "a", **FP32)
    write_single_file(first, tmp_path / "m.safetensors", **FP32)
    second = read_single_file(tmp_path / "m.safetensors", **FP32)
    assert_equal(second, first)
    assert (second.model.path, second.model.prediction, second.sample_size) == (ScaledLinearBetaPath(), prediction, 8)
    assert second.for_inpainting == inpainting
    write_folder(second, tmp_path / "b", **FP32)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) > 10
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def prefixed(tensors: Tensors) -> Tensors:
    return tensors


def flattened(tensors: Tensors) -> Tensors:
    return {name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in tensors.items()}


def with_what_training_leaves(tensors: Tensors) -> Tensors:
    alphas = ScaledLinearBetaPath().alpha(torch.arange(1, 1001) / 1000) ** 2
    ids = torch.arange(77)[None]
    return tensors | {
        "alphas_cumprod": alphas, "betas": alphas + 1, "sqrt_alphas_cumprod": alphas + 2, "logvar": alphas + 3,
        "posterior_variance": alphas + 4, "lvlb_weights": alphas + 5, "model_ema.decay": torch.ones(()),
        "model_ema.num_updates": torch.tensor(7), "first_stage_model.loss.logvar": torch.ones(()),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": ids,
    }  # fmt: skip


def matrices_in_the_autoencoder(tensors: Tensors) -> Tensors:
    return {name: t[:, :, 0, 0].contiguous() if "attn_1" in name and t.ndim == 4 else t for name, t in tensors.items()}


def as_safetensors(tensors: Tensors, path: Path) -> Path:
    save_file(tensors, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def as_state_dict(tensors: Tensors, path: Path) -> Path:
    torch.save({"epoch": 3, "global_step": 7, "state_dict": tensors}, path.with_suffix(".ckpt"))
    return path.with_suffix(".ckpt")


def as_plain_pickle(tensors: Tensors, path: Path) -> Path:
    torch.save(tensors, path.with_suffix(".ckpt"))
    return path.with_suffix(".ckpt")


def as_old_pickle(tensors: Tensors, path: Path) -> Path:
    torch.save({"state_dict": tensors}, path.with_suffix(".ckpt"), _use_new_zipfile_serialization=False)
    return path.with_suffix(".ckpt")


def under_another_name(tensors: Tensors, path: Path) -> Path:
    save_file(tensors, path.with_suffix(".ckpt"))
    return path.with_suffix(".ckpt")


FORMS = [prefixed, flattened, with_what_training_leaves, matrices_in_the_autoencoder]
FILES = [as_safetensors, as_state_dict, as_plain_pickle, as_old_pickle, under_another_name]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("file", FILES)
def test_every_form_of_version_1_gives_the_same_model(form, file: Callable[[Tensors, Path], Path], tmp_path):
    parts = stable_diffusion(1)
    found = read_single_file(file(form(foreign(parts)), tmp_path / "m"), **FP32)
    assert_equal(found, parts)
    assert (found.model.path, found.model.prediction, found.sample_size) == (parts.model.path, "eps", 64)


def with_what_open_clip_leaves(tensors: Tensors) -> Tensors:
    more = {"logit_scale": torch.ones(()), "text_projection": torch.eye(64), "attn_mask": torch.zeros(77, 77)}
    return tensors | {f"cond_stage_model.model.{name}": tensor for name, tensor in more.items()}


@pytest.mark.parametrize("form", [prefixed, with_what_open_clip_leaves])
def test_every_form_of_version_2_gives_the_same_model(form, tmp_path):
    parts = stable_diffusion(2, prediction="v")
    path = as_safetensors(form(foreign(parts)), tmp_path / "m")
    assert_equal(read_single_file(path, **FP32, prediction="v"), parts)


def test_version_2s_tower_under_transformers_names_is_still_gelu_and_penultimate():
    """1024 wide is OpenCLIP's, whatever its parameters are called. Shapes alone: such a tower has a gigabyte."""
    from ldm.interop.compvis.names import plan_text_encoder
    from ldm.interop.identify import shapes_of
    from text import TextEncoderConfig, TransformersTextEncoder

    config = TextEncoderConfig(width=1024, layers=24, heads=16, intermediate_size=4096, activation="gelu",
                               hidden="penultimate", pad_id=0, projection_dim=None)  # fmt: skip
    with torch.device("meta"):
        state = TransformersTextEncoder(config).model.state_dict()
    for prefix in ("transformer.text_model.", "transformer."):
        shapes = shapes_of({prefix + name.removeprefix("text_model."): tensor for name, tensor in state.items()})
        assert plan_text_encoder(shapes, None).config == config


@pytest.mark.parametrize("ema", [True, False])
def test_of_two_kinds_of_weights_the_averaged_ones_are_taken_unless_asked_otherwise(ema, tmp_path):
    parts = stable_diffusion(1)
    tensors = foreign(parts)
    for name in [name for name in tensors if name.startswith(UNET)]:
        tensors[ema_name(name.removeprefix(UNET))] = tensors[name] + 1
    found = read_single_file(as_safetensors(tensors, tmp_path / "m"), **FP32, ema=ema)
    weight = found.denoiser.state_dict()["conv_in.weight"]
    assert torch.equal(weight, parts.denoiser.state_dict()["conv_in.weight"] + ema)
    assert ("averaged weights (EMA)" if ema else "not the averaged weights (EMA)") in found.describe()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_precisions(dtype, stored, tmp_path):
    parts = stable_diffusion(1)
    tensors = {name: tensor.to(stored) for name, tensor in foreign(parts).items()}
    found = states(read_single_file(as_safetensors(tensors, tmp_path / "m"), dtype=dtype))
    expected = states(parts)
    assert all(torch.equal(found[name], expected[name].to(stored).to(dtype)) for name in expected)


@VERSIONS
def test_every_parameter_was_set(version, prediction, tmp_path):
    """Networks are made of meta tensors, which hold no number: one that nobody has set would be one still."""
    path = as_safetensors(foreign(stable_diffusion(version)), tmp_path / "m")
    parts = read_single_file(path, **FP32, prediction=prediction)
    networks: list[Any] = [parts.denoiser, parts.model.vae, *parts.model.conditioner.encoders]
    tensors = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    assert len(tensors) > 300
    assert all(not tensor.is_meta and tensor.isfinite().all() for tensor in tensors)


def yaml_saying(**params: Any) -> str:
    return yaml.safe_dump({"model": {"params": {"unet_config": {"params": {}}} | params}})


def test_what_is_predicted_is_found_in_this_order(tmp_path):
    """By the user, the YAML beside the file, its header, a mark among its tensors, the network: the first that does."""
    tensors = foreign(stable_diffusion(2))  # random: answers with anything but the noise
    marked = tensors | {"v_pred": torch.tensor([])}
    path = tmp_path / "m.safetensors"
    cases = [
        (tensors, {}, None, None, "v", "found by a test"),
        (marked, {}, None, None, "v", None),
        (marked, {"modelspec.prediction_type": "epsilon"}, None, None, "eps", None),
        (tensors, {"modelspec.prediction_type": "v"}, yaml_saying(parameterization="eps"), None, "eps", None),
        (tensors, {}, yaml_saying(), None, "eps", None),  # CompVis's own default
        (tensors, {}, yaml_saying(parameterization="eps"), "v", "v", "as requested"),
    ]
    for content, header, beside, asked, expected, remark in cases:
        save_file(content, path, metadata=header)
        path.with_suffix(".yaml").unlink(missing_ok=True)
        if beside:
            path.with_suffix(".yaml").write_text(beside)
        found = read_single_file(path, **FP32, prediction=asked)
        assert found.model.prediction == expected
        assert (remark or "") in found.describe() and ("prediction" in found.describe()) == (remark is not None)


@pytest.mark.parametrize("inpainting", [False, True])
def test_a_network_that_answers_with_the_noise_predicts_eps(inpainting, tmp_path):
    parts = stable_diffusion(2, inpainting=inpainting)
    answering_with_the_noise(parts.denoiser)
    found = read_single_file(as_safetensors(foreign(parts), tmp_path / "m"), **FP32)
    assert found.model.prediction == "eps"
    assert "noise in its output: 1.00" in found.describe()
    assert found.sample_size == 64  # of eps; of v it is 96


def test_numbers_beside_the_file_are_used(tmp_path):
    path = as_safetensors(foreign(stable_diffusion(1)), tmp_path / "m")
    params = {"linear_start": 0.001, "linear_end": 0.02, "timesteps": 500, "scale_factor": 0.5}
    tree = {"model": {"target": "os.system", "params": params | {"unet_config": {"params": {"num_head_channels": 16}}}}}
    path.with_suffix(".yaml").write_text(yaml.safe_dump(tree))
    found = read_single_file(path, **FP32)
    assert found.model.path == ScaledLinearBetaPath(beta_start=0.001, beta_end=0.02, num_train_timesteps=500)
    assert found.model.vae.config.latent_std == (2.0,) * 4
    assert found.config.heads == (2, 4)  # of 32 and 64 channels


def test_a_table_of_noise_levels_must_be_the_paths(tmp_path):
    tensors = with_what_training_leaves(foreign(stable_diffusion(1)))
    cosine = CosinePath().alpha(torch.arange(1, 1001) / 1000) ** 2
    path = as_safetensors(tensors | {"alphas_cumprod": cosine}, tmp_path / "m")
    with pytest.raises(ValueError, match="was trained on another schedule than Stable Diffusion's"):
        read_single_file(path, **FP32)
    zero = ScaledLinearBetaPath(zero_terminal_snr=True)
    levels = zero.alpha(torch.arange(1, 1001) / 1000) ** 2
    path = as_safetensors(tensors | {"alphas_cumprod": levels, "ztsnr": torch.tensor([])}, tmp_path / "m")
    assert read_single_file(path, **FP32).model.path == zero


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_a_table_in_another_precision_is_the_paths_still(stored, tmp_path):
    tensors = {name: t.to(stored) for name, t in with_what_training_leaves(foreign(stable_diffusion(1))).items()}
    assert read_single_file(as_safetensors(tensors, tmp_path / "m"), **FP32).model.path == ScaledLinearBetaPath()
    near = ScaledLinearBetaPath(beta_end=0.02).alpha(torch.arange(1, 1001) / 1000) ** 2
    path = as_safetensors(tensors | {"alphas_cumprod": near.to(stored)}, tmp_path / "m")
    with pytest.raises(ValueError, match="was trained on another schedule"):
        read_single_file(path, **FP32)


def test_a_scale_that_was_measured_is_in_the_file(tmp_path):
    """CompVis's training keeps it as a buffer where it was measured; a YAML beside the file says it louder."""
    tensors = foreign(stable_diffusion(1)) | {"scale_factor": torch.tensor(0.5)}
    path = as_safetensors(tensors, tmp_path / "m")
    assert read_single_file(path, **FP32).model.vae.config.latent_std == (2.0,) * 4
    path.with_suffix(".yaml").write_text(yaml_saying(scale_factor=0.25))
    assert read_single_file(path, **FP32).model.vae.config.latent_std == (4.0,) * 4


def test_what_an_old_fine_tuning_left_is_no_hindrance(tmp_path):
    tensors = foreign(stable_diffusion(1)) | {"embedding_manager.string_to_param_dict.x": torch.ones(1, 768)}
    assert read_single_file(as_safetensors(tensors, tmp_path / "m"), **FP32).model.prediction == "eps"


@pytest.mark.parametrize("prediction", ["velocity", "edm"])
def test_a_prediction_that_the_path_does_not_have(prediction, tmp_path):
    path = as_safetensors(foreign(stable_diffusion(1)), tmp_path / "m")
    with pytest.raises(ValueError, match=f"prediction '{prediction}' on path 'scaled_linear_beta'"):
        read_single_file(path, **FP32, prediction=prediction)


def test_asking_for_other_weights_than_the_averages_is_answered_where_there_are_none(tmp_path):
    path = as_safetensors(foreign(stable_diffusion(1)), tmp_path / "m")
    assert "it has no averaged weights (EMA)" in read_single_file(path, **FP32, ema=False).describe()
    assert "EMA" not in read_single_file(path, **FP32).describe()


def test_a_network_that_answers_with_a_picture_predicts_v(tmp_path):
    """alpha eps - sigma x0 at the last timestep, alpha = 0.068: a little noise, and a picture."""
    parts = stable_diffusion(2)
    answering_with_the_noise(parts.denoiser)
    with torch.no_grad():
        parts.denoiser.get_parameter("conv_out.weight").mul_(0.068)
        parts.denoiser.get_parameter("conv_out.bias").copy_(torch.tensor([1.0, -1.0, 0.5, -0.5]))
    found = read_single_file(as_safetensors(foreign(parts), tmp_path / "m"), **FP32)
    assert found.model.prediction == "v" and "noise in its output: 0.0" in found.describe()


def test_the_native_size_is_in_the_header(tmp_path):
    save_file(foreign(stable_diffusion(1)), tmp_path / "m.safetensors", metadata={"modelspec.resolution": "768x768"})
    assert read_single_file(tmp_path / "m.safetensors", **FP32).sample_size == 192  # this autoencoder is f4


@pytest.mark.parametrize(("stated", "skip"), [("1", 1), ("2", 2), ("", 1), ("two", 1), ("-2", 1), ("9" * 5000, 1)])
def test_clip_skip_is_in_the_header(stated, skip, tmp_path, recwarn):
    save_file(foreign(stable_diffusion(1)), tmp_path / "m.safetensors", metadata={"modelspec.encoder_layer": stated})
    found = read_single_file(tmp_path / "m.safetensors", **FP32)
    conditioner, plain = found.model.conditioner, stable_diffusion(1).model.conditioner
    assert torch.equal(conditioner(["a frog"]).context, plain(["a frog"], clip_skip=skip).context)
    assert torch.equal(conditioner(["a frog"], clip_skip=1).context, plain(["a frog"]).context)
    assert ("clip skip 2" in found.describe()) == (skip == 2) and not recwarn


def test_a_stated_clip_skip_that_is_not_followed_names_its_option(tmp_path):
    save_file(foreign(stable_diffusion(1)), tmp_path / "m.safetensors", metadata={"modelspec.encoder_layer": "3"})
    with pytest.warns(
        UserWarning, match=r"m\.safetensors: its header says clip skip 3, which is not followed: give --clip-skip 3"
    ):
        read_single_file(tmp_path / "m.safetensors", **FP32)


def test_what_does_not_fit_is_counted_and_the_nearest_layout_named(tmp_path):
    tensors = foreign(stable_diffusion(2))
    for number in range(7):
        tensors[f"{UNET}more.{number}"] = torch.zeros(1)
    lost = sorted(name for name in tensors if name.startswith("first_stage_model.decoder.up.0"))
    for name in lost:
        del tensors[name]
    tensors[f"{UNET}out.0.weight"] = torch.ones(32)
    path = as_safetensors(tensors, tmp_path / "m")
    message = (
        rf"does not fit the nearest known layout, Stable Diffusion 2: {len(lost)} missing \({lost[0]}, .*\); "
        rf"7 unexpected \({UNET}more.0, {UNET}more.1, {UNET}more.2, {UNET}more.3, {UNET}more.4, \.\.\.\); "
        rf"1 of another shape \({UNET}out.0.weight \(32,\) for \(64,\)\)"
    )
    with pytest.raises(ValueError, match=message):
        read_single_file(path, **FP32)
