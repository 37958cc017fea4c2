"""What changes no picture is one warning, not a refusal: extra tensors and keys, trailing bytes, fp8, wrappers."""

from __future__ import annotations

import json
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hostile import copied, edit
from helpers.stable_diffusion import stable_diffusion, states
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm import TextToImage
from ldm.cli import OneLineParser, run_command
from ldm.interop.compvis.names import ema_name
from ldm.interop.compvis.reading import read_single_file
from ldm.interop.compvis.writing import single_file_tensors
from ldm.interop.diffusers_layout.denoiser import PixArtJson, UNetJson
from ldm.interop.diffusers_layout.folder import NOTES, read_folder, write_folder
from ldm.interop.diffusers_layout.vae import VaeJson
from ldm.interop.read_model import read_vae
from ldm.interop.weight_reader import open_weights

Tensors = dict[str, Tensor]
FP32: dict[str, Any] = {"dtype": torch.float32}
UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def expected() -> Tensors:
    return states(stable_diffusion(1))


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return {name: t.contiguous().clone() for name, t in single_file_tensors(stable_diffusion(1)).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    write_folder(stable_diffusion(1), folder, **FP32)
    (folder / NOTES).unlink()  # as another program's
    return folder


def assert_read(path: Path, expected: Tensors, told: str) -> None:
    """The model is the same, and exactly one warning says what was ignored."""
    read = read_folder if path.is_dir() else read_single_file
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = states(read(path, **FP32))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    texts = {str(warning.message) for warning in caught}
    assert len(texts) == (told != "") and all(re.search(told, text) and "\n" not in text for text in texts)


EXTRAS: dict[str, Tensors] = {
    "a counter": {"global_step": torch.tensor(3)},
    "an optimiser": {f"optimizer.state.{i}.exp_avg": torch.ones(2) for i in range(7)},
    "bundled embeddings": {"bundle_emb.x.string_to_param.*": torch.ones(1, 64)},
    "a stray": {"my.note": torch.ones(3, 3), "other": torch.ones(1)},
    "numbers of another kind": {"seed": torch.tensor([1, 2], dtype=torch.uint8)},
}


@pytest.mark.parametrize("name", EXTRAS)
def test_a_tensor_that_no_network_has_in_a_single_file(name, tensors, expected, tmp_path):
    save_file(tensors | EXTRAS[name], tmp_path / "m.safetensors")
    count = f"m.safetensors has {len(EXTRAS[name])} tensors? that no network has, ignored: {min(EXTRAS[name])[:9]}"
    assert_read(tmp_path / "m.safetensors", expected, count)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("name", EXTRAS)
def test_a_tensor_that_no_network_has_in_a_folder(name, part, folder, expected, tmp_path):
    copy = copied(folder, tmp_path)
    (file,) = (copy / part).glob("*.safetensors")
    content = load_file(file)
    file.unlink()
    save_file(content | EXTRAS[name], file)
    assert_read(copy, expected, f"{part}/{file.name} has {len(EXTRAS[name])} tensors? that no network has")


def test_clips_other_half_in_a_text_encoders_folder(folder, expected, tmp_path):
    """transformers ignores it as well when it loads a CLIPTextModel."""
    copy = copied(folder, tmp_path)
    file = copy / "text_encoder" / "model.safetensors"
    content = load_file(file)
    file.unlink()
    save_file(content | {"logit_scale": torch.ones(()), "text_projection.weight": torch.ones(2, 2)}, file)
    assert_read(copy, expected, "2 tensors that no network has, ignored: logit_scale, text_projection.weight")


@pytest.mark.parametrize(
    "name",
    ["down_blocks.0.extra", "conv_in.lora_A.weight", "my_lora_up", "control_net.w", "class_embedding.weight",
     "encoder_hid_proj.weight", "add_embedding.linear_1.weight", "position_net.x", "ip_adapter.w", "lycoris.w",
     "hypernetwork.1", "conv_out.scale_weight"],
)  # fmt: skip
def test_a_tensor_that_may_change_the_picture_stays_refused(name, folder, tmp_path):
    copy = copied(folder, tmp_path)
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    content = load_file(file)
    file.unlink()
    save_file(content | {name: torch.ones(2)}, file)
    with pytest.raises(ValueError, match=f"does not fit its config: 1 unexpected .{name}"):
        read_folder(copy, **FP32)


def test_unknown_keys_are_told_and_those_of_diffusers_are_refused_unless_off(folder, expected, tmp_path):
    copy = copied(folder, tmp_path)
    edit(copy / "unet" / "config.json", my_note="x", other=[1], nothing=None, dropout=0.1, only_cross_attention=[False])
    assert_read(
        copy, expected, "unet/config.json has keys that nothing reads, ignored as in diffusers: my_note, other$"
    )
    edit(copy / "unet" / "config.json", time_cond_proj_dim=256)
    with pytest.raises(ValueError, match=r"has time_cond_proj_dim '256', an option that is not supported"):
        read_folder(copy, **FP32)


def test_every_parameter_of_diffusers_is_known():
    """Or one that changes the computation would be ignored as if it were a note."""
    import inspect

    from diffusers import AutoencoderKL, PixArtTransformer2DModel, Transformer2DModel, UNet2DConditionModel

    for schema, classes in {
        UNetJson: [UNet2DConditionModel], VaeJson: [AutoencoderKL],
        PixArtJson: [PixArtTransformer2DModel, Transformer2DModel],
    }.items():  # fmt: skip
        known = {*schema.__dataclass_fields__, *schema.UNUSED, *schema.IGNORED, *schema.OPTIONS}
        for kind in classes:
            assert inspect.signature(kind.__init__).parameters.keys() - known <= {"self", "args", "kwargs"}


@pytest.mark.parametrize("tail", [b"\0" * 7, b"\n", b"\0" * 2**16])
def test_bytes_after_the_last_tensor(tail, tensors, expected, tmp_path):
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    with (tmp_path / "m.safetensors").open("ab") as file:
        file.write(tail)
    assert_read(tmp_path / "m.safetensors", expected, f"has {len(tail)} bytes after its last tensor, which are ignored")
    assert open_weights(tmp_path / "m.safetensors").metadata == {"format": "pt"}


def test_tensors_at_odd_places_before_such_bytes_are_read(tmp_path):
    """Nothing aligns a header of another program's."""
    kinds = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(5), "c": torch.randn(2, 3).half()}
    names = {torch.uint8: "U8", torch.float32: "F32", torch.float16: "F16"}
    header, data = {}, b""
    for name, tensor in kinds.items():
        content = tensor.numpy().tobytes()
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += content
    for spaces in range(8):
        text = json.dumps(header).encode() + b" " * spaces
        (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data + b"tail")
        with pytest.warns(UserWarning, match="4 bytes after"):
            found = open_weights(tmp_path / "m.safetensors").tensors
        assert all(torch.equal(found[name], tensor) for name, tensor in kinds.items())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_fp8_is_read_as_what_it_holds(dtype, suffix, tensors, tmp_path):
    eight = {name: t.to(dtype) if name.startswith(UNET) and t.ndim > 1 else t for name, t in tensors.items()}
    path = tmp_path / f"m{suffix}"
    save_file(eight, path) if suffix == ".safetensors" else torch.save(eight, path)
    parts = read_single_file(path, **FP32)
    weight = parts.denoiser.get_parameter("conv_out.weight")
    assert torch.equal(weight, tensors[f"{UNET}out.2.weight"].to(dtype).float())
    assert "fp32 and fp8 (e" in parts.describe()


def test_scaled_fp8_is_refused_by_its_name(tensors, tmp_path):
    eight = tensors | {f"{UNET}scaled_fp8": torch.ones(2).to(torch.float8_e4m3fn)}
    save_file(eight, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="looks like scaled fp8 as ComfyUI writes it, whose weights need scales"):
        read_single_file(tmp_path / "m.safetensors", **FP32)


def averages(tensors: Tensors) -> Tensors:
    return {name: t + 1 for name, t in tensors.items() if name.startswith(UNET)}


WRAPPINGS: dict[str, Callable[[Tensors], Any]] = {
    "state_dict": lambda t: {"state_dict": t, "global_step": torch.tensor(3), "epoch": 1},
    "model": lambda t: {"model": t, "optimizer": {"state": {0: {"step": torch.ones(())}}}},
    "module": lambda t: {"module": t, "lr": 0.1},
    "ema": lambda t: {"ema": t},
    "twice": lambda t: {"model": {"state_dict": t}, "epoch": 2},
    "of two": lambda t: {"optimizer": {}, "model": t, "ema": {}},
    "a prefix of DistributedDataParallel": lambda t: {"model": {f"module.{name}": v for name, v in t.items()}},
    "a prefix of compile": lambda t: {f"module._orig_mod.{name}": v for name, v in t.items()},
    "a trainer's attribute": lambda t: {f"model.{name}": v for name, v in t.items()},
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_a_model_in_a_wrapper(name, tensors, expected, tmp_path):
    torch.save(WRAPPINGS[name](tensors), tmp_path / "m.ckpt")
    assert_read(tmp_path / "m.ckpt", expected, "")


def test_a_model_and_its_averages_in_two_entries(tensors, expected, tmp_path):
    """As with averages of CompVis's names in one: they are used, unless the others are asked for."""
    torch.save({"model": tensors, "ema": averages(tensors)}, tmp_path / "two.ckpt")
    together = {ema_name(name.removeprefix(UNET)): t for name, t in averages(tensors).items()}
    torch.save({"state_dict": tensors | together}, tmp_path / "one.ckpt")
    two, one = (states(read_single_file(tmp_path / f"{name}.ckpt", **FP32)) for name in ("two", "one"))
    assert all(torch.equal(two[name], one[name]) for name in one)
    assert not torch.equal(two["denoiser.conv_in.weight"], expected["denoiser.conv_in.weight"])
    plain = states(read_single_file(tmp_path / "two.ckpt", **FP32, ema=False))
    assert all(torch.equal(plain[name], expected[name]) for name in expected)


def test_averages_under_other_names_are_told(tensors, expected, tmp_path):
    torch.save({"model": tensors, "ema": {"shadow.0": torch.ones(2)}}, tmp_path / "m.ckpt")
    assert_read(tmp_path / "m.ckpt", expected, "also holds averaged weights, whose names are not read")


def test_an_autoencoder_with_extras_and_in_a_wrapper(tensors, tmp_path):
    vae = stable_diffusion(1).model.vae
    own = {f"module.{name}": t for name, t in vae.state_dict().items()} | {"module.global_step": torch.tensor(1)}
    torch.save({"model": own}, tmp_path / "vae.pt")
    with pytest.warns(UserWarning, match="vae.pt has 1 tensor that no network has, ignored: global_step"):
        found = read_vae(tmp_path / "vae.pt", **FP32, in_place_of=vae.config)
    assert all(torch.equal(t, found.state_dict()[name]) for name, t in vae.state_dict().items())


def test_the_command_prints_a_warning_once_in_one_line(tensors, tmp_path, capsys):
    save_file(tensors | EXTRAS["a counter"], tmp_path / "m.safetensors")

    def load_twice(args: Any) -> None:
        for _ in range(2):
            TextToImage.load(tmp_path / "m.safetensors")
        warnings.warn("of another kind", RuntimeWarning, stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before = warnings.showwarning
        assert run_command(load_twice, DebugParser(""), []) == 0
        assert warnings.showwarning is before
    error = capsys.readouterr().err
    assert error.count("warning: ") == 1 and "that no network has, ignored: global_step\n" in error


class DebugParser(OneLineParser):
    def __init__(self, description: str) -> None:
        super().__init__(description)
        self.add_argument("--debug", action="store_true")
