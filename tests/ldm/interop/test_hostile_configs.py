"""What is said beside the weights, in YAML, headers, configs and folders: one clear line, and nothing is followed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.hostile import LAUGHS, MEMORY, Tensors, assert_refused, copied, edit, peak, replaced
from helpers.stable_diffusion import stable_diffusion
from safetensors.torch import save_file

from ldm import TextToImage
from ldm.config import dump, parse, read_tree
from ldm.interop.compvis.writing import header
from ldm.interop.diffusers_layout.folder import write_folder

YAMLS = {
    "not YAML": ("model: [", "is not YAML"),
    "another document": ("hello: world", "is not a configuration of Stable Diffusion"),
    "a list": ("- 1\n- 2", "is not a configuration of Stable Diffusion"),
    "an object": ("model: !!python/object/apply:os.system ['touch canary']", "is not YAML"),
    "a billion laughs": (f"{LAUGHS}model: *i", "is not a configuration of Stable Diffusion"),
    "a billion laughs where a word is expected": (
        f"{LAUGHS}model: {{params: {{parameterization: *i, unet_config: {{params: {{}}}}}}}}", "is not a string"),
    "another prediction": (
        "model: {params: {parameterization: magic, unet_config: {params: {}}}}", "its parameterization is 'magic'"),
    "a schedule of nothing": ("model: {params: {linear_start: 0, unet_config: {params: {}}}}", "is out of range"),
    "no number": ("model: {params: {timesteps: soon, unet_config: {params: {}}}}", "is not a configuration"),
    "a million steps": ("model: {params: {timesteps: 1000000, unet_config: {params: {}}}}", "is out of range"),
    "endless steps": ("model: {params: {timesteps: .inf, unet_config: {params: {}}}}", "is not a configuration"),
    "endless heads": ("model: {params: {unet_config: {params: {num_heads: .inf}}}}", "is not a configuration"),
    "no bool": ("a: !!bool x", "is not YAML"),
    "no time": ("a: !!timestamp x", "is not YAML"),
    "no integer": ("a: !!int ''", "is not YAML"),
    "too many heads": ("model: {params: {unet_config: {params: {num_heads: 5}}}}", "is not a multiple of its 5 heads"),
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
        ("unet", {"sample_size": [8, 16]}, "holds a value of another kind than expected"),
        ("unet", {"class_embed_type": "timestep"}, "has class_embed_type 'timestep', an option that is not supported"),
        ("unet", {"only_cross_attention": [False, True]}, "has only_cross_attention '[False, True]', an option"),
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


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no U-Net": (lambda f: (f / "unet").rename(f / "net"), "expected unet/ or transformer/"),
    "no weights": (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(), "is missing"),
    "no text weights": (lambda f: (f / "text_encoder/model.safetensors").unlink(), "is missing"),
    "no scheduler": (lambda f: (f / "scheduler/scheduler_config.json").unlink(), "is missing"),
    "no tokenizer": (lambda f: (f / "tokenizer/tokenizer_config.json").unlink(), "is missing"),
    "a config of garbage": (lambda f: (f / "unet/config.json").write_text("{"), "is not JSON"),
    "a config without end": (lambda f: (f / "vae/config.json").write_text("[" * 100_000), "is not JSON"),
    "a giant config": (lambda f: (f / "vae/config.json").write_bytes(b" " * 2**25), "expected JSON of at most"),
    "another U-Net": (lambda f: edit(f / "unet/config.json", _class_name="UNet3D"), "describes 'UNet3D'"),
    "another norm": (lambda f: edit(f / "unet/config.json", act_fn="gelu"), "has act_fn 'gelu'"),
    "another size": (lambda f: edit(f / "unet/config.json", cross_attention_dim=32), "wide a context, the text enc"),
    "a pipeline of its own": (lambda f: edit(f / "model_index.json", custom_pipeline="x"), "refused"),
    "a class by its module": (lambda f: edit(f / "model_index.json", _class_name=["my", "Pipe"]), "names a"),
    "classes in lists": (lambda f: edit(f / "model_index.json", unet=[["a"], "b"]), "refused"),
    "code for the text encoder": (lambda f: edit(f / "text_encoder/config.json", auto_map={"a": "b.C"}), "refused"),
    "a class of its own": (lambda f: edit(f / "model_index.json", unet=["evil", "UNet"]), "refused"),
    "another pipeline": (
        lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"), "names a 'FluxPipeline'"),
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
    assert_refused(lambda: TextToImage.load(copy), "JSON", capsys)


@pytest.mark.parametrize("name", ["foundry.yaml", "README.md", "assets/a.png"])
def test_what_lies_elsewhere_is_not_published(name, folder, tmp_path, capsys):
    """An export carries notes, card and pictures along: a link among them must not bring a secret."""
    from ldm.cli import run_command
    from ldm.export import arguments, main

    copy = copied(folder, tmp_path)
    (tmp_path / "secret").write_text("secret")
    (copy / "README.md").write_text("# a card")
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(tmp_path / "secret")
    assert run_command(main, arguments(), [str(copy), str(tmp_path / "out")]) == 2
    assert "is not a plain file of the model, but a link to" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "notes",
    [
        LAUGHS.partition("g: ")[0] + "run: *f",
        f"{LAUGHS}run: {{}}\ndata: {{}}\nvalidation: {{}}\nmodel: {{}}\noptim: {{}}\npreview: {{prompts: *i}}",
        "[" * 100_000,
        "a: !!bool x",
        "\x80",
        "run: !!python/object/apply:os.system ['true']",
    ],
)
def test_notes_that_are_no_configuration_are_carried_and_not_followed(notes, folder, tmp_path, capsys):
    from ldm.interop.diffusers_layout.folder import read_folder
    from ldm.interop.model_card import model_card

    copy = copied(folder, tmp_path)
    (copy / "foundry.yaml").write_bytes(notes.encode("latin-1"))
    before = peak(reset=True)
    parts = read_folder(copy, dtype=torch.float32)
    assert "## Training" not in model_card(parts, name="x")
    assert peak() - before < MEMORY


@dataclass(frozen=True, kw_only=True)
class TwoLists:
    one: tuple[str, ...]
    other: tuple[str, ...]


def test_notes_of_our_own_are_read():
    """They hold no aliases, even where the configuration that was given did."""
    shipped = Path(__file__).parents[3] / "weights" / "emoji64" / "foundry.yaml"
    assert {"run", "model", "preview"} <= read_tree(shipped.read_text()).keys()
    config = parse(TwoLists, yaml.safe_load("one: &same [a, b]\nother: *same"), source="test")
    assert read_tree(dump(config)) == {"one": ["a", "b"], "other": ["a", "b"]}


def test_configs_come_before_weights(folder, tmp_path, capsys):
    """A folder of something else is not first read for a minute."""
    copy = copied(folder, tmp_path)
    for weights in copy.rglob("*.safetensors"):
        replaced(weights, b"not yet downloaded")
    edit(copy / "text_encoder" / "config.json", model_type="t5")
    assert_refused(lambda: TextToImage.load(copy), "model_type is 't5'", capsys)
