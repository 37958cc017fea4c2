"""Folders in diffusers' layout, as diffusers itself writes them, in all its variants; and what one may not ask for."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from helpers.stable_diffusion import UNETS, stable_diffusion, states
from safetensors.torch import load_file, save_file

from ldm import TextToImage
from ldm.interop.diffusers_layout.denoiser import UNetLayout
from ldm.interop.diffusers_layout.folder import check_index, model_index, read_folder, write_folder
from ldm.interop.network_files import find_weights
from ldm.interop.weight_reader import open_weights

FP32: dict[str, Any] = {"dtype": torch.float32}
INDEX = model_index(UNetLayout(), text_encoders=["clip_text_model"], for_inpainting=False)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pipeline of diffusers' with the weights of version 1 in miniature."""
    from diffusers import StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("theirs") / "folder"
    write_folder(stable_diffusion(1), folder, **FP32)
    pipe: Any = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    return pipe


def state_of(pipe: Any) -> dict[str, torch.Tensor]:
    networks = {"denoiser": pipe.unet, "vae": pipe.vae, "text": pipe.text_encoder}
    return {f"{part}.{name}": t for part, network in networks.items() for name, t in network.state_dict().items()}


@pytest.mark.parametrize(
    "saved",
    [
        {},
        {"variant": "fp16"},
        {"max_shard_size": "200KB"},
        {"max_shard_size": "200KB", "variant": "fp16"},
        {"safe_serialization": False},
    ],
    ids=["plain", "fp16", "shards", "fp16 shards", "bin"],
)
def test_what_diffusers_saves_comes_through_bit_by_bit(theirs, saved, tmp_path):
    from diffusers import StableDiffusionPipeline

    theirs.save_pretrained(tmp_path / "a", **saved)
    assert ("max_shard_size" in saved) == bool(list((tmp_path / "a" / "unet").glob("*.index*.json")))
    parts = read_folder(tmp_path / "a", **FP32)
    expected, found = state_of(theirs), states(parts)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    write_folder(parts, tmp_path / "b", **FP32)
    back: Any = StableDiffusionPipeline.from_pretrained(tmp_path / "b", local_files_only=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state_of(back).items())
    assert back.scheduler.config.prediction_type == "epsilon"
    assert back.vae.config.scaling_factor == 0.18215
    ignored = {"_name_or_path", "_diffusers_version", "_use_default_values"}
    configs = [{k: v for k, v in pipe.unet.config.items() if k not in ignored} for pipe in (theirs, back)]
    assert configs[0] == configs[1]


def test_full_precision_is_preferred(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, variant="fp16")
    theirs.unet.save_pretrained(tmp_path / "unet")
    assert (
        find_weights(tmp_path / "unet", "diffusion_pytorch_model").source.name == "diffusion_pytorch_model.safetensors"
    )
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "fp16" in find_weights(tmp_path / "unet", "diffusion_pytorch_model").source.name


def test_half_precision_stays_half_when_it_is_asked_for(tmp_path):
    write_folder(stable_diffusion(1), tmp_path / "a", dtype=torch.float16)
    found = read_folder(tmp_path / "a", dtype=torch.float16)
    assert {tensor.dtype for tensor in states(found).values()} == {torch.float16}
    assert found.describe().endswith(f"fp16, {len(states(found))} tensors")


@pytest.mark.parametrize("version", [1, 2])
def test_an_inpainting_folder_opens_as_one(version, tmp_path):
    from diffusers import DiffusionPipeline, StableDiffusionInpaintPipeline

    write_folder(stable_diffusion(version, inpainting=True), tmp_path / "a", **FP32)
    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / "a", local_files_only=True)
    assert isinstance(pipe, StableDiffusionInpaintPipeline) and pipe.unet.config.in_channels == 9
    parts = read_folder(tmp_path / "a", **FP32)
    assert parts.for_inpainting and " for inpainting, " in parts.describe()


def test_what_a_folder_predicts_can_be_overridden(tmp_path):
    write_folder(stable_diffusion(1), tmp_path / "a", **FP32)
    assert TextToImage.load(tmp_path / "a", prediction="v").model.prediction == "v"
    with pytest.raises(ValueError, match="prediction 'velocity' on path 'scaled_linear_beta'"):
        TextToImage.load(tmp_path / "a", prediction="velocity")


def test_a_scale_alone_is_not_folded_and_statistics_are(tmp_path):
    """With other latents than Stable Diffusion's scale, but no mean, weights stay and the config tells the scale."""
    from dataclasses import replace

    parts = stable_diffusion(1)
    vae = parts.model.vae
    for std, folded in (((4.0,) * 4, False), ((4.0, 4.0, 4.0, 3.0), True)):
        vae.config = replace(vae.config, latent_std=std)
        write_folder(parts, tmp_path / "a", **FP32)
        config = json.loads((tmp_path / "a" / "vae" / "config.json").read_text())
        weight = load_file(tmp_path / "a" / "vae" / "diffusion_pytorch_model.safetensors")["quant_conv.weight"]
        assert torch.equal(weight, vae.quant_conv.weight) != folded
        assert config["scaling_factor"] == (0.18215 if folded else 0.25)
        assert config["latents_std"] is None


@pytest.mark.parametrize(
    "names", [["../../etc/passwd"], ["/etc/passwd"], ["..\\secret"], ["sub/x.safetensors"], [".."], []]
)
def test_an_index_names_files_beside_it_alone(names, tmp_path):
    index = {"weight_map": {f"w{i}": name for i, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json: it names (a file elsewhere|0 files)"):
        find_weights(tmp_path, "model")


def test_an_index_without_one_of_its_files(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "1.safetensors")
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"2\.safetensors is missing"):
        find_weights(tmp_path, "model")
    shutil.copy(tmp_path / "1.safetensors", tmp_path / "2.safetensors")
    with pytest.raises(ValueError, match=r"2\.safetensors contains a a second time"):
        find_weights(tmp_path, "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "StableDiffusionXLPipeline"}, "names a 'StableDiffusionXLPipeline', expected one of"),
        ({"_class_name": "MyPipeline"}, "names a 'MyPipeline'"),
        (
            {"unet": ["my_module", "MyUNet"]},
            r"names the class \['my_module', 'MyUNet'\] for unet: refused; only diffusers.UNet2D",
        ),
        ({"custom_pipeline": "evil"}, r"asks to run its own code \(custom_pipeline\): refused"),
        ({"auto_map": {"AutoModel": "x.Y"}}, r"asks to run its own code \(auto_map\): refused"),
    ],
)
def test_a_folder_that_asks_for_other_classes(change, message, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX | change))
    with pytest.raises(ValueError, match=f"model_index.json {message}"):
        check_index(tmp_path)


def test_parts_that_are_not_read_may_be_anybodys(tmp_path):
    """A safety checker, say: it stays where it is."""
    change = {"feature_extractor": ["transformers.models.clip", "X"], "safety_checker": ["stable_diffusion", "Y"]}
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX | change))
    check_index(tmp_path)


def test_configs_of_before_diffusers_wrote_its_defaults_down(tmp_path):
    """Stable Diffusion 1's first folders have no norm_num_groups, which is 32; PixArt's name a Transformer2DModel."""
    write_folder(stable_diffusion(1), tmp_path / "a", **FP32)
    write_folder(stable_diffusion(transformer=True), tmp_path / "b", **FP32)
    for part, keys in (("vae", ["norm_num_groups"]), ("unet", ["norm_num_groups", "attention_head_dim"])):
        path = tmp_path / "a" / part / "config.json"
        content = {key: value for key, value in json.loads(path.read_text()).items() if key not in keys}
        path.write_text(json.dumps(content))
    path = tmp_path / "b" / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "Transformer2DModel"}))
    assert read_folder(tmp_path / "a", **FP32).config == UNETS[1]
    assert read_folder(tmp_path / "b", **FP32).describe().startswith("a DiT of 2 blocks")


def test_a_folder_that_was_downloaded_is_no_older_export(tmp_path):
    write_folder(stable_diffusion(1), tmp_path / "a", **FP32)
    (tmp_path / "a" / "foundry.yaml").unlink()  # which nobody else writes
    with pytest.raises(ValueError, match="a exists and is not an export of this program"):
        write_folder(stable_diffusion(1), tmp_path / "a", **FP32)


def test_nothing_is_written_that_overflows(tmp_path):
    parts = stable_diffusion(1)
    with torch.no_grad():
        parts.denoiser.get_parameter("conv_in.weight")[0, 0, 0, 0] = 1e5
    with pytest.raises(FloatingPointError, match=r"conv_in\.weight contains NaN, or exceeds the range of float16"):
        write_folder(parts, tmp_path / "a", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_every_version_is_called_by_its_name():
    from ldm.denoisers import UNetConfig

    assert UNetConfig().describe(768) == "Stable Diffusion 1"
    second = UNetConfig(heads=(5, 10, 20, 20), use_linear_projection=True)
    assert second.describe(1024) == "Stable Diffusion 2"
    assert UNetConfig().describe(64) == "a U-Net of Stable Diffusion's size"
    assert UNETS[1].describe(768) == "a U-Net of widths 32-64"
    assert stable_diffusion(transformer=True).config.describe(64) == "a DiT of 2 blocks"


def test_opening_reads_nothing(tmp_path):
    """4 GB of weights are opened in a moment: what lies in a file comes when it is asked for."""
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(1000), "b": torch.ones(1000)}, path)
    weights = open_weights(path)
    mapped = weights.tensors
    content = bytearray(path.read_bytes())
    content[-4000:] = torch.full((1000,), 3.0).numpy().tobytes()
    with path.open("r+b") as file:  # the same file, not another of its name
        file.write(content)
    assert mapped["b"][0] == 3.0


def test_large_numbers_whose_sum_overflows_are_no_damage(tmp_path):
    tensors = {"half": torch.full((100,), 60_000.0).half(), "full": torch.full((100,), 3e38)}
    save_file(tensors, tmp_path / "w.safetensors")
    found = open_weights(tmp_path / "w.safetensors").read(torch.float32)
    assert all(torch.equal(found[name], tensors[name].float()) for name in tensors)
    narrow = open_weights(tmp_path / "w.safetensors").read(torch.float16)  # the file is sound, if too wide
    assert narrow["full"].isinf().all()


def test_conversion_goes_in_groups_and_gives_the_same(tmp_path, monkeypatch):
    tensors = {f"w{i}": torch.randn(64, 64) for i in range(10)}
    save_file(tensors, tmp_path / "w.safetensors")
    weights, opened = open_weights(tmp_path / "w.safetensors"), []
    monkeypatch.setattr("ldm.interop.weight_reader.GROUP_BYTES", 3 * 64 * 64 * 4)
    counting = weights.changed(lambda found: opened.append(1) or found)
    found = counting.read(torch.float16)
    assert len(opened) == 1 + 4  # at once, and then for three tensors at a time
    assert all(torch.equal(found[name], tensors[name].half()) for name in tensors)
    opened.clear()
    assert torch.equal(counting.read(torch.float32)["w3"], tensors["w3"]) and not opened  # there is nothing to convert
