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
from typing import Any

import numpy as np
import pytest
import torch
from helpers.hostile import KEY, UNET, Tensors, assert_refused, peak
from helpers.stable_diffusion import stable_diffusion
from safetensors.torch import save_file
from torch import Tensor

from ldm import TextToImage
from ldm.interop.compvis.names import ema_name


class Evil:
    """Runs a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *args: object) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_the_peak_is_of_the_time_since_its_reset():
    """Or it would hide behind an earlier one."""
    del [bytearray(2**28)][0]
    before = peak(reset=True)
    held = bytearray(2**27)
    held[::4096] = b"x" * len(held[::4096])
    assert 2**26 < peak() - before < 2**28


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


DAMAGED = "is not a complete safetensors file"
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
    "a zip of something else": (zipped(readme=b"hello"), "is not a complete PyTorch checkpoint"),
    "an empty header": (raw_safetensors({}), "is not a complete model"),
    "a header of garbage": (raw_safetensors(b"{garbage"), DAMAGED),
    "a header of nothing": (raw_safetensors(b"{"), DAMAGED),
    "a header without end": (struct.pack("<Q", 2**62) + b"{}", "neither a safetensors file nor"),
    "a header beyond the end": (struct.pack("<Q", 10**6) + b"{}", "or it is truncated"),
    "data beyond the end": (raw_safetensors(entry(data_offsets=[0, 800]), bytes(8)), DAMAGED),
    "data before the start": (raw_safetensors(entry(data_offsets=[-8, 0]), bytes(8)), DAMAGED),
    "a shape of more": (raw_safetensors(entry(shape=[2**40]), bytes(8)), DAMAGED),
    "a shape that overflows": (raw_safetensors(entry(shape=[2**62, 8]), bytes(8)), DAMAGED),
    "a negative shape": (raw_safetensors(entry(shape=[-2]), bytes(8)), DAMAGED),
    "an unknown dtype": (raw_safetensors(entry(dtype="F3"), bytes(8)), DAMAGED),
    "more bytes that belong to none than an accident leaves": (raw_safetensors(entry(), bytes(2**16 + 9)), DAMAGED),
    "a few bytes that belong to none": (raw_safetensors(entry(), bytes(16)), "is not a complete model"),
    "bytes that belong to none between tensors": (
        raw_safetensors(entry() | {"b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}}, bytes(20)), DAMAGED),
    "a tensor shorter than its shape, and more": (raw_safetensors(entry(shape=[3]), bytes(16)), DAMAGED),
    "no offset, and more": (raw_safetensors(entry(data_offsets=["0", "8"]), bytes(16)), DAMAGED),
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
        told = "is a pickle with the suffix of a safetensors file"
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
    told = "is a pickle with the suffix of a safetensors file"
    assert_refused(lambda: TextToImage.load(tmp_path / "m.safetensors"), told, capsys)


ODD_TENSORS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "NaN": (lambda t: t.clone().fill_(float("nan")), "holds NaN or infinity"),
    "one infinity": (lambda t: t.clone().index_fill_(0, torch.tensor([0]), float("inf")), "holds NaN or infinity"),
    "both infinities": (lambda t: t.clone().index_fill_(0, torch.tensor([0]), float("-inf")), "holds NaN or infinity"),
    "whole numbers": (lambda t: t.to(torch.int8), "holds int8"),
    "NaN of eight bits": (lambda t: torch.full_like(t, float("nan")).to(torch.float8_e4m3fn), "holds NaN or infinity"),
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
    "a text encoder": (lambda t: only(t, "cond_stage_model."), "looks like only a text encoder"),
    "averages alone": (
        lambda t: {ema_name(n.removeprefix(UNET)): v for n, v in only(t, UNET).items()}, "give the file that has both"),
    "a denoiser in diffusers' layout": (
        lambda t: dict(stable_diffusion(1).denoiser.state_dict()), "no autoencoder (--vae, in Python vae=) and no te"),
    "a denoiser alone": (lambda t: only(t, UNET), "no autoencoder (--vae, in Python vae=) and no text encoder (--text"),
    "without a text encoder": (
        lambda t: only(t, UNET) | only(t, "first_stage_model."), "no text encoder (--text, in Python text=): give"),
    "with a LoRA in it": (lambda t: t | {"my_lora_down": torch.ones(2)}, "1 unexpected (my_lora_down)"),
    "with an adapter in it": (lambda t: t | {"adapter_1.weight": torch.ones(2)}, "1 unexpected (adapter_1.weight)"),
    "scaled fp8": (
        lambda t: t | {f"{UNET}out.2.scale_weight": torch.ones(())}, "looks like scaled fp8 as ComfyUI writes it"),
    "latent diffusion's BERT": (
        lambda t: renamed(t, "cond_stage_model.transformer.text_model.encoder.", "cond_stage_model.transformer.attn_"),
        "its text encoder is not a CLIP"),
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


OUTLANDISH = {
    "a name as long as a book": ({"a" * 10**6: torch.ones(1)}, "with the invalid name"),
    "a name that paints the terminal": ({"\x1b[31mred\n": torch.ones(1)}, "with the invalid name"),
    "a block far away": (
        {"first_stage_model.encoder.down.0.block.20000.conv2.weight": torch.ones(32)}, "levels of 20001 layers"),
    "a level far away": (
        {"first_stage_model.encoder.down.900.block.0.conv2.weight": torch.ones(32)}, "which no autoencoder has"),
    "many levels": (
        {f"{UNET}input_blocks.{i}.0.op.weight": torch.ones(1) for i in range(2, 150)}, "which no Stable Diffusion has"),
    "sides that cost nothing": (
        {"first_stage_model.post_quant_conv.weight": torch.ones(2**26, 0)}, "expected no empty dimension"),
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
