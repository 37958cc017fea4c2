"""Two thousand small changes to sound inputs that change no picture: all are accepted, and give the same.

Each class of change is drawn at random, from a fixed seed, at least 50 times. What is compared is what a picture
depends on: the parsed configuration, and the tensors. docs/interchange.md names the classes that are refused, and why.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.denoisers import DiTConfig, UNetConfig
from ldm.files.strict_json import read_json
from ldm.interop.diffusers_layout.denoiser import PixArtLayout, UNetLayout, read_denoiser_config
from ldm.interop.diffusers_layout.folder import check_index, model_index
from ldm.interop.diffusers_layout.layout import Surroundings
from ldm.interop.diffusers_layout.scheduler import scheduler_config_json, scheduler_from
from ldm.interop.diffusers_layout.vae import vae_config, vae_config_json
from ldm.interop.network_files import fill, find_weights
from ldm.interop.weight_reader import open_weights
from text.conversion import read_text_encoder_config, text_encoder_config_json
from text.encoder import TextEncoderConfig
from vae.autoencoder import AutoencoderKLConfig

CONFIGURATIONS, WEIGHTS, LINKS = 140, 70, 50  # changes of each class
Json = dict[str, Any]
SOURCE = Path("config.json")
UNET = UNetConfig(heads=(5, 10, 20, 20), use_linear_projection=True)
DIT = DiTConfig(depth=2, width=64, heads=2, sample_size=96, interpolation_scale=1.0)
TEXT = TextEncoderConfig(width=768, layers=12, heads=12, intermediate_size=3072, projection_dim=512)
SIDES = Surroundings(sample_size=96, latent_channels=4, context_width=1024)


def unet_facts(content: Json, folder: Path) -> Any:
    (folder / "config.json").write_text(json.dumps(content))
    config, around = read_denoiser_config(folder / "config.json")
    assert isinstance(config, UNetConfig | DiTConfig)
    return config, around


CONFIGS: dict[str, tuple[Json, Callable[[Json, Path], Any]]] = {
    "unet": (UNetLayout().to_json(UNET, SIDES), unet_facts),
    "transformer": (PixArtLayout().to_json(DIT, SIDES), unet_facts),
    "vae": (vae_config_json(AutoencoderKLConfig()), lambda content, _: vae_config(content, source=SOURCE)),
    "text_encoder": (
        text_encoder_config_json(TEXT), lambda content, _: _text_facts(content)),
    "scheduler": (
        scheduler_config_json(scheduler_from(dict(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000,
        ), source=SOURCE)[0], "v"), lambda content, _: scheduler_from(content, source=SOURCE)),
    "model_index": (
        model_index(UNetLayout(), text_encoders=["clip_text_model"], for_inpainting=False),
        lambda content, folder: _check_index(content, folder)),
}  # fmt: skip


def _text_facts(content: Json) -> Any:
    return read_text_encoder_config(content)


def _check_index(content: Json, folder: Path) -> None:
    (folder / "model_index.json").write_text(json.dumps(content))
    check_index(folder)


def some_note(draw: random.Random) -> Any:
    return draw.choice(["x", 1, 0.5, True, None, [], [1, "a"], {"a": {"b": 1}}, "ä" * draw.randint(1, 50), 10**20])


def extra_keys(content: Json, draw: random.Random) -> Json:
    names = ["my_note", "author", "_name_or_path", "license", "trained_with", "x" * draw.randint(1, 99), "über", "a b"]
    return content | {name: some_note(draw) for name in draw.sample(names, draw.randint(1, 4))}


def another_order(content: Json, draw: random.Random) -> Json:
    return dict(draw.sample(list(content.items()), len(content)))


def whole_numbers_as_floats(content: Json, draw: random.Random) -> Json:
    def widened(value: Any) -> Any:
        if isinstance(value, list):
            return [widened(entry) for entry in value]
        return float(value) if type(value) is int and draw.random() < 0.7 else value

    return {name: widened(value) for name, value in content.items()}


# Keys that a file may leave out, or have as null, because their default is the value that the model has.
OPTIONAL = {
    "unet": ["act_fn", "center_input_sample", "downsample_padding", "flip_sin_to_cos", "freq_shift", "norm_eps",
             "mid_block_scale_factor", "norm_num_groups", "up_block_types", "_diffusers_version"],
    "transformer": ["attention_bias", "norm_eps", "norm_type", "num_embeds_ada_norm", "use_additional_conditions"],
    "vae": ["act_fn", "down_block_types", "force_upcast", "latents_mean", "mid_block_add_attention", "norm_num_groups",
            "sample_size", "scaling_factor", "shift_factor", "up_block_types", "use_quant_conv"],
    "text_encoder": ["attention_dropout", "hidden_act", "initializer_range", "layer_norm_eps", "architectures"],
    "scheduler": ["rescale_betas_zero_snr", "solver_order", "_diffusers_version"],
    "model_index": ["vae", "text_encoder", "tokenizer", "scheduler", "_diffusers_version", "safety_checker"],
}  # fmt: skip


def without_optional_keys(content: Json, draw: random.Random, name: str) -> Json:
    gone = draw.sample(OPTIONAL[name], draw.randint(1, len(OPTIONAL[name])))
    return {key: value for key, value in content.items() if key not in gone}


def optional_keys_null(content: Json, draw: random.Random, name: str) -> Json:
    if name == "model_index":  # whose null is no class
        return without_optional_keys(content, draw, name)
    return content | dict.fromkeys(draw.sample(OPTIONAL[name], draw.randint(1, 3)))


def numbers_for_booleans(content: Json, draw: random.Random) -> Json:
    return {k: int(v) if type(v) is bool and draw.random() < 0.8 else v for k, v in content.items()}


def unused_options_off(content: Json, draw: random.Random) -> Json:
    """Options of diffusers' network, switched off in one of the ways in which it writes that."""
    names = [*UNET_OPTIONS, "something_newer"]
    return content | {name: draw.choice([None, False, 0, [], ""]) for name in draw.sample(names, 5)}


UNET_OPTIONS = ("class_embed_type", "dual_cross_attention", "num_class_embeds", "encoder_hid_dim", "time_embedding_dim",
                "addition_embed_type", "resnet_skip_time_act", "time_cond_proj_dim", "timestep_post_act")  # fmt: skip


def lists_for_one_value(content: Json, draw: random.Random) -> Json:
    """What diffusers spreads over the levels itself."""
    lists = {
        "layers_per_block": [2] * 4, "cross_attention_dim": [1024] * 4, "sample_size": [96, 96],
        "transformer_layers_per_block": [1] * 4, "only_cross_attention": [False] * 4,
    }  # fmt: skip
    return content | {name: lists[name] for name in draw.sample(sorted(lists), draw.randint(1, 5))}


def other_names_of_a_value(content: Json, draw: random.Random) -> Json:
    key = "act_fn" if "act_fn" in content else "upcast_attention"
    return content | {key: "swish" if key == "act_fn" else draw.choice([True, False])} | {"dropout": draw.random()}


ANY = tuple(CONFIGS)
CHANGES: dict[str, tuple[Callable[..., Json], tuple[str, ...]]] = {
    "extra keys": (extra_keys, ANY),
    "another order": (another_order, ANY),
    "whole numbers as floats": (whole_numbers_as_floats, ("unet", "transformer", "vae", "text_encoder", "scheduler")),
    "optional keys left out": (without_optional_keys, ANY),
    "optional keys null": (optional_keys_null, ("unet", "transformer", "vae", "model_index")),
    "numbers for booleans": (numbers_for_booleans, ANY),
    "unused options off": (unused_options_off, ("unet",)),
    "lists for one value": (lists_for_one_value, ("unet",)),
    "other names of a value": (other_names_of_a_value, ("unet", "vae", "transformer")),
}


@cache
def sound(name: str) -> Any:
    """What the unchanged configuration gives; its own folder is not needed again."""
    import tempfile

    content, facts = CONFIGS[name]
    with tempfile.TemporaryDirectory() as folder:
        return facts(dict(content), Path(folder))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_a_configuration_that_says_the_same(change: str, tmp_path: Path):
    function, names = CHANGES[change]
    draw, takes_name = random.Random(change), function.__code__.co_argcount == 3
    for number in range(CONFIGURATIONS):
        name = names[number % len(names)]
        content, facts = CONFIGS[name]
        changed = function(dict(content), draw, *([name] if takes_name else []))
        assert facts(changed, tmp_path) == sound(name), (name, changed)


def spellings(text: str, draw: random.Random) -> bytes:
    content = json.loads(text)
    indent, ascii_only = draw.choice([None, 1, 2, "\t"]), draw.random() < 0.5
    text = json.dumps(content, indent=indent, ensure_ascii=ascii_only, separators=draw.choice([None, (" ,", " : ")]))
    text = (
        draw.choice(["", " ", "\n\n"]) + text.replace("\n", draw.choice(["\n", "\r\n"])) + draw.choice(["", "\n", " "])
    )
    return text.encode(draw.choice(["utf-8", "utf-8-sig"]))


def test_json_that_is_written_otherwise(tmp_path: Path):
    draw = random.Random(1)
    for number in range(CONFIGURATIONS):
        content = CONFIGS[ANY[number % len(ANY)]][0] | {"note": "über 日本"}
        (tmp_path / "c.json").write_bytes(spellings(json.dumps(content), draw))
        assert read_json(tmp_path / "c.json") == content


class Tiny(nn.Module):
    """Three modules, as a network has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.block, self.conv_out = nn.Conv2d(2, 3, 3), nn.Linear(3, 4), nn.Conv2d(3, 2, 1)


def tiny_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: t.bfloat16().float() for name, t in Tiny().state_dict().items()}  # exact in every precision used


Files = tuple[dict[str, Tensor], dict[str, str] | None]


def strays(draw: random.Random) -> dict[str, Tensor]:
    names = ["global_step", "optimizer.0.exp_avg", "bundle_emb.x", "epoch", "my_note.weight", "ema_decay", "loss.log"]
    tensors = [torch.ones(()), torch.ones(3, 2), torch.tensor([1, 2]), torch.ones(4).half(), torch.ones(2) > 0]
    return {name: draw.choice(tensors).clone() for name in draw.sample(names, draw.randint(1, 4))}


def metadata(draw: random.Random) -> dict[str, str] | None:
    entries = {
        "format": "pt",
        "ss_epoch": "3",
        "modelspec.title": "x" * draw.randint(0, 3000),
        "über": "ä",
        "json": "{}",
    }
    chosen = draw.sample(sorted(entries), draw.randint(0, len(entries)))
    return {name: entries[name] for name in chosen} or None


def written(state: dict[str, Tensor], path: Path, draw: random.Random, kind: str) -> Path:
    """Writes the tensors with a change of this kind; returns the folder."""
    stem, suffix = path / "diffusion_pytorch_model", ".safetensors"
    header = {"format": "pt"}
    match kind:
        case "extra tensors":
            state = state | strays(draw)
        case "metadata":
            header = metadata(draw)
        case "precision":
            dtypes = [torch.float64, torch.float32, torch.bfloat16]
            state = {name: t.to(draw.choice(dtypes)) for name, t in state.items()}
        case "file names":
            suffix = draw.choice([".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin"])
        case "order":
            state, suffix = dict(draw.sample(list(state.items()), len(state))), ".bin"
        case "prefixes":
            before = draw.choice(["module.", "_orig_mod.", "model.", "module.module.", "module._orig_mod."])
            state = {before + name: t for name, t in state.items()}
        case "wrappers":
            state, suffix = wrapped(state, draw), ".bin"
        case "shards":
            return in_shards(state, path, draw)
        case _:
            assert kind == "trailing bytes"
    file = Path(f"{stem}{suffix}")
    save_file(state, file, header) if "safetensors" in suffix else torch.save(state, file)
    if kind == "trailing bytes":
        with file.open("ab") as opened:
            opened.write(draw.randbytes(draw.randint(1, 5000)))
    return path


def wrapped(state: Any, draw: random.Random) -> Any:
    name = draw.choice(["state_dict", "model", "module", "ema", "model_state_dict", "params", "net"])
    further = {"epoch": 3, "global_step": 7, "lr": 0.1, "optimizer": {"state": {}}, "step": torch.tensor(1), "args": {}}
    chosen = draw.sample(sorted(further), draw.randint(0, 5))
    content = {name: state} | {key: further[key] for key in chosen}
    return {"model": content} if draw.random() < 0.3 and name != "model" else content


def in_shards(state: dict[str, Tensor], path: Path, draw: random.Random) -> Path:
    count, places = draw.randint(1, 4), {}
    for number in range(count):
        own = {name: t for i, (name, t) in enumerate(state.items()) if i % count == number}
        file = f"{draw.choice(['part', 'diffusion_pytorch_model', 'a b', 'ü'])}-{number}.safetensors"
        save_file(own, path / file)
        places |= dict.fromkeys(own, file)
    index = {"weight_map": places} | draw.choice([{}, {"metadata": {"total_size": 1}}, {"note": 1}])
    (path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return path


KINDS = ("extra tensors", "metadata", "precision", "file names", "order", "prefixes", "wrappers", "shards",
         "trailing bytes")  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_hold_the_same(kind: str, tmp_path: Path):
    draw, state = random.Random(kind), tiny_state()
    for number in range(WEIGHTS):
        folder = tmp_path / str(number)
        folder.mkdir()
        network = Tiny()
        fill(network, find_weights(written(state, folder, draw, kind)), dtype=torch.float32)
        found = network.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items()), (kind, number)


def test_links_to_weights_and_other_suffixes(tmp_path: Path):
    draw, state = random.Random(2), tiny_state()
    for number in range(LINKS):
        place = tmp_path / draw.choice(["a b", "ü", "x[1]", "%20"]) / str(number)
        place.mkdir(parents=True)
        save_file(state, place / "blob")
        link = place / draw.choice(["m.safetensors", "m.sft", "m.ckpt", "m.bin", "m", "0a1b2c"])
        link.symlink_to(draw.choice([place / "blob", Path("blob")]))
        assert open_weights(link).read(torch.float32).keys() == state.keys()


def test_there_are_two_thousand_changes_and_fifty_of_each_class():
    assert min(CONFIGURATIONS, WEIGHTS, LINKS) >= 50
    assert (len(CHANGES) + 1) * CONFIGURATIONS + len(KINDS) * WEIGHTS + LINKS >= 2000


def refused() -> Iterator[tuple[Json, str]]:
    content = CONFIGS["unet"][0]
    yield content | {"block_out_channels": ["320", "640", "1280", "1280"]}, "expected whole numbers"
    yield content | {"sample_size": "96"}, "expected whole numbers"
    yield content | {"in_channels": 4.5}, "expected whole numbers"
    yield content | {"sample_size": [96, 64]}, "holds a value of another kind"
    yield content | {"time_embedding_dim": 1280}, "an option that is not supported"


@pytest.mark.parametrize(("content", "told"), refused())
def test_the_classes_that_are_refused(content: Json, told: str, tmp_path: Path):
    """As docs/interchange.md says, under Exactness."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=told):
            unet_facts(content, tmp_path)
