"""Broken, wrong and malicious files: each is one clear line that names it, and nothing that a file says is run."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from stable_diffusion import stable_diffusion
from torch import Tensor

from ldm import TextToImage
from ldm.interop.compvis import ema_name
from ldm.interop.folder import write_folder
from ldm.interop.single_file_export import header, single_file_tensors

Tensors = dict[str, Tensor]
UNET = "model.diffusion_model."
KEY = f"{UNET}out.2.weight"
MEMORY = 2**28  # bytes that refusing a file may take at most


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """Version 1 in miniature, as a single file has it."""
    return {name: t.half().contiguous() for name, t in single_file_tensors(stable_diffusion(1)).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    write_folder(stable_diffusion(1), folder, dtype=torch.float16)
    return folder


class Evil:
    """Runs a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *args: object) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


def peak(*, reset: bool = False) -> int:
    """The most memory that this process has taken since the last reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def test_the_peak_is_of_the_time_since_its_reset():
    """Or it would hide behind an earlier one."""
    del [bytearray(2**28)][0]
    before = peak(reset=True)
    held = bytearray(2**27)
    held[::4096] = b"x" * len(held[::4096])
    assert 2**26 < peak() - before < 2**28


def assert_refused(load: Callable[[], object], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = peak(reset=True)
    with pytest.raises((ValueError, OSError)) as caught:
        load()
    message = str(caught.value)
    assert told in message
    assert "\n" not in message and len(message) < 1200
    assert peak() - before < MEMORY
    assert capsys.readouterr().out == ""


def raw_safetensors(content: Any, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**change: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change}


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


DAMAGED = "is not a whole safetensors file"
NO_FILE_OF_WEIGHTS = {
    "nothing": (b"", "it is empty"),
    "one byte": (b"\x80", "neither a safetensors file nor"),
    "a web page": (b"\n<!DOCTYPE html><html>sign in</html>", "it is a web page"),
    "a page of errors": (b"<?xml version='1.0'?><Error/>", "it is a web page"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "run git lfs pull"),
    "gguf": (b"GGUF\x03\0\0\0", "a GGUF file"),
    "text": (b"dear diary" * 100, "neither a safetensors file nor"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "neither a safetensors file nor"),
    "gzip": (b"\x1f\x8b\x08" + bytes(100), "neither a safetensors file nor"),
    "an empty zip": (zipped(), "neither a safetensors file nor"),
    "a zip of something else": (zipped(readme=b"hello"), "is not a whole PyTorch checkpoint"),
    "an empty header": (raw_safetensors({}), "is not a whole model"),
    "a header of garbage": (raw_safetensors(b"{garbage"), DAMAGED),
    "a header of nothing": (raw_safetensors(b"{"), DAMAGED),
    "a header without end": (struct.pack("<Q", 2**62) + b"{}", "neither a safetensors file nor"),
    "a header beyond the end": (struct.pack("<Q", 10**6) + b"{}", "or was cut short"),
    "data beyond the end": (raw_safetensors(entry(data_offsets=[0, 800]), bytes(8)), DAMAGED),
    "data before the start": (raw_safetensors(entry(data_offsets=[-8, 0]), bytes(8)), DAMAGED),
    "a shape of more": (raw_safetensors(entry(shape=[2**40]), bytes(8)), DAMAGED),
    "a shape that overflows": (raw_safetensors(entry(shape=[2**62, 8]), bytes(8)), DAMAGED),
    "a negative shape": (raw_safetensors(entry(shape=[-2]), bytes(8)), DAMAGED),
    "an unknown dtype": (raw_safetensors(entry(dtype="F3"), bytes(8)), DAMAGED),
    "bytes that belong to none": (raw_safetensors(entry(), bytes(16)), DAMAGED),
    "overlapping tensors": (raw_safetensors(entry() | {"b": entry()["a"]}, bytes(8)), DAMAGED),
    "odd metadata": (raw_safetensors({"__metadata__": {"a": 1}} | entry(), bytes(8)), DAMAGED),
    "nested": (raw_safetensors(b'{"a":' * 10_000, b""), DAMAGED),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_FILE_OF_WEIGHTS)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_bytes_that_are_no_weights(name, suffix, tmp_path, capsys):
    content, told = NO_FILE_OF_WEIGHTS[name]
    path = tmp_path / f"m{suffix}"
    path.write_bytes(content)
    if content.startswith(b"PK\x03\x04") and suffix == ".safetensors":
        told = "is a pickle under the name of a safetensors file"
    assert_refused(lambda: TextToImage.load(path), told, capsys)
    assert_refused(lambda: TextToImage.load(path), path.name, capsys)


@pytest.mark.parametrize("kept", [9, 1000, 60_000, -1])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_file_that_was_cut_short(kept, suffix, tensors, tmp_path, capsys):
    path = tmp_path / f"m{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(lambda: TextToImage.load(path), "copy it again", capsys)


CODE: dict[str, tuple[Callable[..., Any], str]] = {
    "a shell": (os.system, "asks to run posix.system"),
    "eval": (eval, "asks to run eval"),
    "exec": (exec, "asks to run exec"),
    "opening a file": (open, "asks to run io.open"),
    "importing": (__import__, "asks to run __import__"),
    "reaching for an attribute": (getattr, "asks to run getattr"),
}


@pytest.mark.parametrize("name", CODE)
@pytest.mark.parametrize("place", ["beside the weights", "among them", "instead of them", "in the older kind of file"])
def test_a_pickle_that_names_code(name, place, tensors, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function, told = CODE[name]
    argument = "touch canary" if function is os.system else "open('canary', 'w')"
    evil = Evil(function, argument) if function is not open else Evil(open, "canary", "w")
    content: dict[str, Any] = {
        "beside the weights": {"state_dict": tensors, "callbacks": [evil]},
        "among them": {"state_dict": tensors | {"a": evil}},
        "instead of them": evil,
        "in the older kind of file": {"state_dict": {"a": evil}},
    }[place]  # pyright: ignore[reportAssignmentType]
    torch.save(content, "m.ckpt", _use_new_zipfile_serialization="older" not in place)
    assert_refused(lambda: TextToImage.load("m.ckpt"), told, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.ckpt"]


def test_a_network_pickled_whole_is_refused_by_its_class(tmp_path, capsys):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "m.pt")
    assert_refused(lambda: TextToImage.load(tmp_path / "m.pt"), "torch.nn.modules.linear.Linear", capsys)


def test_what_lightning_and_numpy_left_is_harmless_and_needs_neither(tensors, tmp_path):
    """Stable Diffusion 1's checkpoints name them; a stand-in takes their place, so nothing is imported."""
    callback = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    with pytest.MonkeyPatch.context() as patch:  # as if Lightning were installed where the file was written
        parts = callback.__module__.split(".")
        for count in range(1, 4):
            patch.setitem(sys.modules, ".".join(parts[:count]), types.ModuleType(".".join(parts[:count])))
        patch.setattr(sys.modules[callback.__module__], "ModelCheckpoint", callback, raising=False)
        content = {"state_dict": tensors, "callbacks": {callback: {"best": np.float64(3.5)}}}
        torch.save(content, tmp_path / "m.ckpt")
    assert TextToImage.load(tmp_path / "m.ckpt").model.prediction == "eps"
    assert "pytorch_lightning" not in sys.modules


def test_a_pickle_under_the_name_of_a_safetensors_file(tensors, tmp_path, capsys):
    torch.save(tensors, tmp_path / "m.safetensors")
    told = "is a pickle under the name of a safetensors file"
    assert_refused(lambda: TextToImage.load(tmp_path / "m.safetensors"), told, capsys)


ODD_TENSORS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "NaN": (lambda t: t.clone().fill_(float("nan")), "holds NaN or infinity"),
    "one infinity": (lambda t: t.clone().index_fill_(0, torch.tensor([0]), float("inf")), "holds NaN or infinity"),
    "both infinities": (lambda t: t.clone().index_fill_(0, torch.tensor([0]), float("-inf")), "holds NaN or infinity"),
    "whole numbers": (lambda t: t.to(torch.int8), "holds int8"),
    "eight bits": (lambda t: t.to(torch.float8_e4m3fn), "holds float8_e4m3fn"),
    "complex": (lambda t: t.float().to(torch.complex64), "holds complex64"),
    "yes and no": (lambda t: t > 0, "holds bool"),
    "another shape": (lambda t: t[:1].clone(), "1 of another shape"),
    "no number at all": (lambda t: t[:0].clone(), "(0,"),
}


@pytest.mark.parametrize("name", ODD_TENSORS)
@pytest.mark.parametrize("key", [KEY, "first_stage_model.decoder.conv_out.weight",
                                 "cond_stage_model.transformer.text_model.final_layer_norm.weight"])  # fmt: skip
def test_a_tensor_of_another_kind(name, key, tensors, tmp_path, capsys):
    change, told = ODD_TENSORS[name]
    save_file(tensors | {key: change(tensors[key])}, tmp_path / "m.safetensors")
    assert_refused(lambda: TextToImage.load(tmp_path / "m.safetensors"), told, capsys)
    assert_refused(lambda: TextToImage.load(tmp_path / "m.safetensors"), key.split(".text_model.")[-1], capsys)


NO_PLAIN_TENSORS: dict[str, Callable[[], Tensor]] = {
    "expanded": lambda: torch.zeros(1).expand(200_000, 200_000),
    "sparse": lambda: torch.zeros(3, 3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "of nothing": lambda: torch.empty(2, 2, device="meta"),
    "overlapping": lambda: torch.zeros(10).as_strided((8, 8), (1, 0)),
}


@pytest.mark.parametrize("name", NO_PLAIN_TENSORS)
@pytest.mark.filterwarnings("ignore")
def test_a_pickled_tensor_that_is_more_than_it_holds(name, tensors, tmp_path, capsys):
    torch.save(tensors | {KEY: NO_PLAIN_TENSORS[name]()}, tmp_path / "m.ckpt")
    assert_refused(lambda: TextToImage.load(tmp_path / "m.ckpt"), KEY, capsys)


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


def only(tensors: Tensors, prefix: str, *, strip: bool = False) -> Tensors:
    return {name.removeprefix(prefix) if strip else name: t for name, t in tensors.items() if name.startswith(prefix)}


FOREIGN: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "SDXL": (lambda t: renamed(t, "cond_stage_model.", "conditioner.embedders.0."), "looks like SDXL, which"),
    "SDXL's U-Net": (lambda t: t | {f"{UNET}label_emb.0.0.weight": torch.ones(2)}, "looks like unCLIP"),
    "SD 3": (lambda t: {f"{UNET}joint_blocks.0.x_block.mlp.fc1.weight": torch.ones(2)}, "Stable Diffusion 3"),
    "Flux": (lambda t: {"double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(2)}, "looks like Flux"),
    "ControlNet": (lambda t: {"control_model.time_embed.0.weight": torch.ones(2)}, "looks like a ControlNet"),
    "AnimateDiff": (lambda t: {"down_blocks.0.motion_modules.0.norm.bias": torch.ones(2)}, "motion"),
    "a LoRA": (lambda t: {"lora_unet_mid_block_x.lora_down.weight": torch.ones(4, 4)}, "with --lora"),
    "a peft LoRA": (lambda t: {"unet.mid_block.x.lora_A.weight": torch.ones(4, 4)}, "with --lora"),
    "LoHa": (lambda t: {"lora_unet_mid_block.hada_w1_a": torch.ones(4, 4)}, "looks like a LoRA"),
    "new words": (lambda t: {"emb_params": torch.ones(4, 768)}, "textual inversion"),
    "a new word": (lambda t: {"<cat-toy>": torch.ones(768)}, "textual inversion"),
    "an autoencoder": (lambda t: only(t, "first_stage_model.", strip=True), "give it with --vae"),
    "an autoencoder in its place": (lambda t: only(t, "first_stage_model."), "give it with --vae"),
    "a text encoder": (lambda t: only(t, "cond_stage_model."), "looks like a text encoder alone"),
    "averages alone": (
        lambda t: {ema_name(n.removeprefix(UNET)): v for n, v in only(t, UNET).items()}, "give the file that has both"),
    "a denoiser in diffusers' layout": (
        lambda t: dict(stable_diffusion(1).denoiser.state_dict()), "looks like a denoiser alone"),
    "a denoiser alone": (lambda t: only(t, UNET), "it holds no autoencoder"),
    "without a text encoder": (lambda t: only(t, UNET) | only(t, "first_stage_model."), "its text encoder is no CLIP"),
    "latent diffusion's BERT": (
        lambda t: renamed(t, "cond_stage_model.transformer.text_model.encoder.", "cond_stage_model.transformer.attn_"),
        "its text encoder is no CLIP"),
    "a depth model": (lambda t: t | {f"{UNET}input_blocks.0.0.weight": torch.ones(32, 5, 3, 3)}, "a depth model"),
    "an upscaler": (lambda t: t | {f"{UNET}input_blocks.0.0.weight": torch.ones(32, 7, 3, 3)}, "an upscaler"),
    "InstructPix2Pix": (lambda t: t | {f"{UNET}input_blocks.0.0.weight": torch.ones(32, 8, 3, 3)}, "InstructPix2Pix"),
    "one tensor missing": (lambda t: {n: v for n, v in t.items() if n != KEY}, f"1 missing ({KEY})"),
    "one tensor too many": (lambda t: t | {f"{UNET}extra": torch.ones(1)}, f"1 unexpected ({UNET}extra)"),
    "uneven levels": (
        lambda t: {n: v for n, v in t.items() if "input_blocks.3." not in n}, "which no Stable Diffusion has"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_models_of_another_kind_are_named(name, tensors, tmp_path, capsys):
    change, told = FOREIGN[name]
    save_file({key: value.clone().contiguous() for key, value in change(tensors).items()}, tmp_path / "m.safetensors")
    assert_refused(lambda: TextToImage.load(tmp_path / "m.safetensors"), told, capsys)
    assert_refused(lambda: TextToImage.load(tmp_path / "m.safetensors"), "m.safetensors", capsys)


LAUGHS = "a: &a [x, x, x]\n" + "".join(
    f"{c}: &{c} [{', '.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)
YAMLS = {
    "not YAML": ("model: [", "is not YAML"),
    "another document": ("hello: world", "is no configuration of a Stable Diffusion"),
    "a list": ("- 1\n- 2", "is no configuration of a Stable Diffusion"),
    "an object": ("model: !!python/object/apply:os.system ['touch canary']", "is not YAML"),
    "a billion laughs": (f"{LAUGHS}model: *i", "is no configuration of a Stable Diffusion"),
    "another prediction": (
        "model: {params: {parameterization: magic, unet_config: {params: {}}}}", "says parameterization 'magic'"),
    "a schedule of nothing": ("model: {params: {linear_start: 0, unet_config: {params: {}}}}", "is out of range"),
    "no number": ("model: {params: {timesteps: soon, unet_config: {params: {}}}}", "is no configuration"),
    "a million steps": ("model: {params: {timesteps: 1000000, unet_config: {params: {}}}}", "is out of range"),
    "endless steps": ("model: {params: {timesteps: .inf, unet_config: {params: {}}}}", "is no configuration"),
    "endless heads": ("model: {params: {unet_config: {params: {num_heads: .inf}}}}", "is no configuration"),
    "no bool": ("a: !!bool x", "is not YAML"),
    "no time": ("a: !!timestamp x", "is not YAML"),
    "no integer": ("a: !!int ''", "is not YAML"),
    "too many heads": ("model: {params: {unet_config: {params: {num_heads: 5}}}}", "is no multiple of its 5 heads"),
    "too long": ("#" * 2**20 + "\n# and on", "expected at most"),
    "not text": ("\x00\ufffe", "is not YAML"),
}  # fmt: skip


@pytest.mark.parametrize("name", YAMLS)
def test_a_yaml_beside_the_file_that_is_no_help(name, tensors, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, told = YAMLS[name]
    save_file(tensors, "m.safetensors")
    Path("m.yaml").write_text(content, encoding="utf-8")
    assert_refused(lambda: TextToImage.load("m.safetensors"), told, capsys)
    assert not Path("canary").exists()


HEADERS = {
    "not JSON": ("{", "is not JSON"),
    "a list": ("[]", "does not describe the parts of a model"),
    "parts that are none": ('{"unet": 1}', "does not describe the parts of a model"),
    "nested without end": ("[" * 100_000, "is not JSON"),
    "nothing": ("{}", "lacks the key 'unet'"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_of_ours_that_is_damaged(name, tensors, tmp_path, capsys):
    content, told = HEADERS[name]
    save_file(tensors, tmp_path / "m.safetensors", metadata={"foundry": content})
    assert_refused(lambda: TextToImage.load(tmp_path / "m.safetensors"), told, capsys)


@pytest.mark.parametrize(
    ("part", "change", "told"),
    [
        ("unet", {"layers_per_block": 10**9}, "has layers_per_block 1000000000"),
        ("unet", {"block_out_channels": [10**9]}, "has block_out_channels"),
        ("unet", {"block_out_channels": [32] * 1000}, "has block_out_channels"),
        ("unet", {"block_out_channels": "32"}, "has block_out_channels"),
        ("unet", {"auto_map": {"x": "y.Z"}}, "auto_map"),
        ("unet", {"attention_type": "gated"}, "has attention_type 'gated'"),
        ("unet", {"sample_size": [8, 8]}, "holds a value of another kind than expected"),
        ("unet", {"shortcuts": 7}, "has shortcuts 7, which is not known here"),
        ("unet", {"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "has up_block_types"),
        ("vae", {"mid_block_add_attention": False}, "has mid_block_add_attention False"),
        ("vae", {"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "has a AttnDownEncoderBlock2D"),
        ("scheduler", {"trained_betas": [0.1, 0.2]}, "has trained_betas"),
        ("vae", {"scaling_factor": float("nan")}, "has scaling_factor nan"),
        ("vae", {"block_out_channels": [32, 10**12]}, "has block_out_channels"),
        ("vae", {"latent_channels": -4}, "has latent_channels -4"),
        ("text_encoder", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("text_encoder", {"model_type": "t5"}, "not 'clip_text_model'"),
        ("text_encoder", {"vocab_size": 10**12}, "vocab_size"),
        ("scheduler", {"num_train_timesteps": 10**12}, "has num_train_timesteps"),
        ("scheduler", {"beta_schedule": "magic"}, "on beta_schedule 'magic'"),
        ("scheduler", {"beta_start": None}, "scheduler_config.json"),
    ],
)
@pytest.mark.parametrize("layout", ["folder", "single file"])
def test_numbers_that_would_build_a_giant(part, change, told, layout, tensors, folder, tmp_path, capsys):
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    content = json.loads((folder / part / name).read_text()) | change
    if layout == "folder":
        copy = copied(folder, tmp_path)
        (copy / part / name).write_text(json.dumps(content))
        return assert_refused(lambda: TextToImage.load(copy), told, capsys)
    told = told if part != "scheduler" or "beta_start" not in change else "m.safetensors"
    save_file(tensors, tmp_path / "m.safetensors", metadata={"foundry": json.dumps(own_header(tensors, part, content))})
    assert_refused(lambda: TextToImage.load(tmp_path / "m.safetensors"), told, capsys)


def own_header(tensors: Tensors, part: str, content: dict[str, Any]) -> dict[str, Any]:
    return json.loads(header(stable_diffusion(1), tensors, title="m")["foundry"]) | {part: content}


def test_what_a_newer_program_says_no_to_is_no_hindrance(folder, tmp_path):
    copy = copied(folder, tmp_path)
    for part in ("unet", "vae"):
        edit(copy / part / "config.json", something_new=None, something_else=False, and_more=[], _private=1)
    assert TextToImage.load(copy).model.prediction == "eps"


def copied(folder: Path, to: Path) -> Path:
    """A copy whose weights are links."""
    for path in folder.rglob("*"):
        target = to / "copy" / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            target.symlink_to(path) if path.suffix == ".safetensors" else target.write_bytes(path.read_bytes())
    return to / "copy"


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no U-Net": (lambda f: (f / "unet").rename(f / "net"), "expected unet/ or transformer/"),
    "no weights": (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(), "is missing"),
    "no text weights": (lambda f: (f / "text_encoder/model.safetensors").unlink(), "is missing"),
    "no scheduler": (lambda f: (f / "scheduler/scheduler_config.json").unlink(), "is missing"),
    "no tokenizer": (lambda f: (f / "tokenizer/tokenizer_config.json").unlink(), "is missing"),
    "a config of garbage": (lambda f: (f / "unet/config.json").write_text("{"), "is not JSON"),
    "a config without end": (lambda f: (f / "vae/config.json").write_text("[" * 100_000), "is not JSON"),
    "a giant config": (lambda f: (f / "vae/config.json").write_bytes(b" " * 2**25), "of JSON"),
    "another U-Net": (lambda f: edit(f / "unet/config.json", _class_name="UNet3D"), "describes 'UNet3D'"),
    "another norm": (lambda f: edit(f / "unet/config.json", act_fn="gelu"), "has act_fn 'gelu'"),
    "another size": (lambda f: edit(f / "unet/config.json", cross_attention_dim=32), "wide a context, the text enc"),
    "a pipeline of its own": (lambda f: edit(f / "model_index.json", custom_pipeline="x"), "refused"),
    "a class by its module": (lambda f: edit(f / "model_index.json", _class_name=["my", "Pipe"]), "asks for a"),
    "classes in lists": (lambda f: edit(f / "model_index.json", unet=[["a"], "b"]), "refused"),
    "code for the text encoder": (lambda f: edit(f / "text_encoder/config.json", auto_map={"a": "b.C"}), "refused"),
    "a class of its own": (lambda f: edit(f / "model_index.json", unet=["evil", "UNet"]), "refused"),
    "another pipeline": (
        lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"), "asks for a 'FluxPipeline'"),
    "a page instead of weights": (
        lambda f: replaced(f / "vae/diffusion_pytorch_model.safetensors", b"<html>"), "it is a web page"),
    "a pointer instead of weights": (
        lambda f: replaced(f / "unet/diffusion_pytorch_model.safetensors", b"version https://git-lfs"), "git lfs pull"),
    "an index that leads away": (
        lambda f: (f / "unet/diffusion_pytorch_model.safetensors").rename(f / "x.safetensors") and (
            f / "unet/diffusion_pytorch_model.safetensors.index.json"
        ).write_text('{"weight_map": {"a": "../x.safetensors"}}'), "names a file elsewhere"),
    "weights that are a loop": (
        lambda f: (f / "vae/diffusion_pytorch_model.safetensors").unlink() or (
            f / "vae/diffusion_pytorch_model.safetensors"
        ).symlink_to("diffusion_pytorch_model.safetensors"), "is missing"),
    "weights that are a folder": (
        lambda f: (f / "vae/diffusion_pytorch_model.safetensors").unlink() or (
            f / "vae/diffusion_pytorch_model.safetensors"
        ).mkdir(), "is not a plain file"),
    "weights that are a pipe": (
        lambda f: (f / "vae/diffusion_pytorch_model.safetensors").unlink() or os.mkfifo(
            f / "vae/diffusion_pytorch_model.safetensors"), "is not a plain file"),
}  # fmt: skip


def edit(path: Path, **change: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def replaced(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_with_something_wrong(name, folder, tmp_path, capsys):
    change, told = FOLDERS[name]
    copy = copied(folder, tmp_path)
    change(copy)
    assert_refused(lambda: TextToImage.load(copy), told, capsys)


def test_a_transformer_whose_table_of_positions_would_fill_the_memory(tmp_path, capsys):
    write_folder(stable_diffusion(transformer=True), tmp_path / "m", dtype=torch.float32)
    edit(tmp_path / "m" / "transformer" / "config.json", sample_size=1024, patch_size=1)
    assert_refused(lambda: TextToImage.load(tmp_path / "m"), "positions would be too large", capsys)


OUTLANDISH = {
    "a name as long as a book": ({"a" * 10**6: torch.ones(1)}, "which is no name"),
    "a name that paints the terminal": ({"\x1b[31mred\n": torch.ones(1)}, "which is no name"),
    "a block far away": (
        {"first_stage_model.encoder.down.0.block.20000.conv2.weight": torch.ones(32)}, "levels of 20001 layers"),
    "a level far away": (
        {"first_stage_model.encoder.down.900.block.0.conv2.weight": torch.ones(32)}, "which no autoencoder has"),
    "many levels": (
        {f"{UNET}input_blocks.{i}.0.op.weight": torch.ones(1) for i in range(2, 150)}, "which no Stable Diffusion has"),
    "sides that cost nothing": (
        {"first_stage_model.post_quant_conv.weight": torch.ones(2**26, 0)}, "expected numbers in it"),
    "a number for a convolution": ({f"{UNET}input_blocks.0.0.weight": torch.ones(())}, "of another kind than expected"),
    "a row for a matrix": (
        {f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(4)},
        "of another kind than expected"),
    "a number for the tokens": (
        {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.ones(())},
        "of another kind than expected"),
    "two scales": ({"scale_factor": torch.ones(2)}, "only one element"),
    "a scale of nothing": ({"scale_factor": torch.zeros(())}, "is out of range"),
    "a scale that is no number": ({"scale_factor": torch.tensor(float("nan"))}, "is out of range"),
    "half of the averages": ({ema_name("out.2.weight"): torch.ones(4, 32, 3, 3)}, "lacks 207 of 208"),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTLANDISH)
def test_tensors_that_would_lead_astray(name, tensors, tmp_path, capsys):
    change, told = OUTLANDISH[name]
    save_file(tensors | change, tmp_path / "m.safetensors")
    assert_refused(lambda: TextToImage.load(tmp_path / "m.safetensors"), told, capsys)
    assert_refused(lambda: TextToImage.load(tmp_path / "m.safetensors"), "m.safetensors", capsys)


def test_an_archive_that_would_unfold(tensors, tmp_path, capsys):
    """A megabyte of compressed zeros is a gigabyte of pickle."""
    torch.save(tensors, tmp_path / "whole.ckpt")
    with zipfile.ZipFile(tmp_path / "whole.ckpt") as old, zipfile.ZipFile(tmp_path / "m.ckpt", "w") as new:
        for member in old.infolist():
            squeezed = zipfile.ZIP_DEFLATED if member.filename.endswith("data.pkl") else zipfile.ZIP_STORED
            content = bytes(2**27) if squeezed else old.read(member)
            new.writestr(member.filename, content, compress_type=squeezed)
    assert_refused(lambda: TextToImage.load(tmp_path / "m.ckpt"), "is a compressed archive", capsys)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
@pytest.mark.parametrize("instead", ["a pipe", "a device", "nested without end", "a number without end"])
def test_a_config_that_never_ends(part, instead, folder, tmp_path, capsys):
    copy = copied(folder, tmp_path)
    names = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
    path = copy / part / names.get(part, "config.json")
    path.unlink()
    if instead == "a pipe":
        os.mkfifo(path)
    elif instead == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.write_text("[" * 200_000 if instead == "nested without end" else '{"a": ' + "9" * 5000 + "}")
    told = "is missing" if part == "tokenizer" and instead in ("a pipe", "a device") else "JSON"
    assert_refused(lambda: TextToImage.load(copy), told, capsys)


@pytest.mark.parametrize("name", ["foundry.yaml", "README.md", "assets/a.png"])
def test_what_lies_elsewhere_is_not_published(name, folder, tmp_path, capsys):
    """An export carries notes, card and pictures along: a link among them must not bring a secret."""
    from ldm.commands import run_command
    from ldm.export import arguments, main

    copy = copied(folder, tmp_path)
    (tmp_path / "secret").write_text("secret")
    (copy / "README.md").write_text("# a card")
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(tmp_path / "secret")
    assert run_command(main, arguments(), [str(copy), str(tmp_path / "out")]) == 2
    assert "is no plain file in its folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "notes",
    [
        LAUGHS.partition("g: ")[0] + "run: *f",
        "[" * 100_000,
        "a: !!bool x",
        "\x80",
        "run: !!python/object/apply:os.system ['true']",
    ],
)
def test_notes_that_are_no_configuration_are_carried_and_not_followed(notes, folder, tmp_path, capsys):
    from ldm.card import model_card
    from ldm.interop.folder import read_folder

    copy = copied(folder, tmp_path)
    (copy / "foundry.yaml").write_bytes(notes.encode("latin-1"))
    before = peak(reset=True)
    parts = read_folder(copy, dtype=torch.float32)
    assert "## Training" not in model_card(parts, name="x")
    assert peak() - before < MEMORY


def test_configs_come_before_weights(folder, tmp_path, capsys):
    """A folder of something else is not first read for a minute."""
    copy = copied(folder, tmp_path)
    for weights in copy.rglob("*.safetensors"):
        replaced(weights, b"not yet downloaded")
    edit(copy / "text_encoder" / "config.json", model_type="t5")
    assert_refused(lambda: TextToImage.load(copy), "model_type is 't5'", capsys)
