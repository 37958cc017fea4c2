"""Every configuration in the repository, and what a mistake in one says."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from ldm.config import dump, load_config, parse
from ldm.denoisers import DiTConfig
from ldm.training.checkpoints.select import check_continues
from ldm.training.clip_task import TextTrainConfig
from ldm.training.denoiser_config import TrainConfig
from ldm.training.vae_task import VAETrainConfig
from text.clip import build_clip
from vae import AutoencoderKL

CONFIGS = Path(__file__).parents[2] / "configs"
ALL = sorted(CONFIGS.glob("*.yaml"))
DIT = CONFIGS / "emoji64_dit.yaml"


def kind_of(path: Path) -> type:
    tree = yaml.safe_load(path.read_text())
    return VAETrainConfig if "vae" in tree else TextTrainConfig if "text" in tree else TrainConfig


def test_there_is_a_configuration_for_each_command():
    assert {kind_of(path) for path in ALL} == {VAETrainConfig, TextTrainConfig, TrainConfig}


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_it_loads_and_comes_back_equal(path):
    config = load_config(kind_of(path), path)
    assert parse(kind_of(path), yaml.safe_load(dump(config)), source="dump") == config


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_its_network_builds_without_memory(path):
    config = load_config(kind_of(path), path)
    with torch.device("meta"):
        match config:
            case VAETrainConfig():
                network = AutoencoderKL(config.vae)
                assert config.data.image_size % config.vae.factor == 0
            case TextTrainConfig():
                network = build_clip(config.text, config.image)
                assert config.image.image_size == config.data.image_size
            case TrainConfig():
                network = config.model.denoiser.build(latent_channels=4, context_width=128)
    assert sum(parameter.numel() for parameter in network.parameters()) > 100_000


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_its_heading_says_how_it_is_run(path):
    heading = path.read_text().split("\nrun:")[0]
    assert all(line.startswith("#") for line in heading.splitlines())
    assert re.search(rf"^#   python (ldm|vae|text)/train\.py --config configs/{path.name}", heading, re.MULTILINE)


def test_overrides_reach_any_depth_and_keep_their_types():
    words = [
        "optim.lr=3e-4",
        "run.name=other",
        "optim.betas=[0.8, 0.9]",
        "engine.zero_stage=2",
        "model.denoiser.depth=3",
    ]
    config = load_config(TrainConfig, DIT, words)
    assert (config.optim.lr, config.run.name, config.optim.betas) == (3e-4, "other", (0.8, 0.9))
    assert config.engine.zero_stage == 2
    assert isinstance(config.model.denoiser, DiTConfig)
    assert config.model.denoiser.depth == 3


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.learning_rate=1", r"unknown key optim\.learning_rate"),
        ("optim.warmup_step=1", r"unknown key optim\.warmup_step; did you mean warmup_steps\?"),
        ("model.denoiser.dpth=1", r"dpth; did you mean depth\?"),
        ("runn.name=x", r"unknown key runn; did you mean run\?"),
        ("model.denoiser.kind=dti", r"dti.*; did you mean dit\?"),
        ("model.path.kind=cosin", r"cosin.*; did you mean cosine\?"),
        (
            "model.objective.weighting=minsnr",
            r"Input should be 'constant', .* \(given 'minsnr'\); did you mean min_snr\?",
        ),
        ("model.objective.time_sampling=zzz", r"'importance' \(given 'zzz'\)$"),
        ("engine.zero_stage=4", r"engine\.zero_stage.*4"),
        ("preview.steps=1001", r"preview.steps is 1001, expected 1 to 1000"),
        ("preview.scale=-1", r"preview.scale is -1.0, expected "),
        ("preview.seed=-1", r"preview.seed is -1, expected a number from 0 up"),
        ("preview.pictures=0", r"preview.prompts and preview.pictures must each be at least one"),
        ("preview.sampler=dpmp_2m", r"preview.sampler: no sampler 'dpmp_2m', did you mean dpmpp_2m\? There are ddpm, "),
        ("model.objective.learned_variance=true", r"path rectified_flow has none: use scaled_linear_beta"),
        (
            "preview.sampler=ddpm_learned",
            r"preview: sampler DDPM learned needs a network that has learned",
        ),
        ("optim.ema_lengths=[0.3]", r"the EMA's length is 0.3, expected 0.0001 or more and less than 0.289"),
        ("optim.ema_lengths=[0.1, 0.1]", r"optim.ema_lengths names a length twice"),
        ("optim.ema_decay=1", r"decay must be at least 0 and below 1, not 1.0"),
        ("run.snapshot_every=0", r"run\.snapshot_every must be at least 1"),
        ("run.steps=0", r"run\.steps must be at least 1"),
        ("run.steps=many", r"run\.steps.*'many'"),
        ("run.name=a/b", r"the name of a single folder, not 'a/b'"),
        ("model.caption_dropout=2", r"caption_dropout is 2"),
        (
            "model.objective.prediction=eps",
            r"'eps' on path 'rectified_flow' cannot be opened by diffusers: use velocity",
        ),
        (
            "model.path.kind=linear_beta",
            r"'velocity' on path 'linear_beta' cannot be opened by diffusers: use eps or v or x0",
        ),
        ("data.shards=[a", r"the value is not YAML"),
        ("steps", r"'steps' is not an override: write section\.key=value"),
        ("run.name.first=x", r"run\.name is a value, not a section"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(word, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_config(TrainConfig, DIT, [word])
    assert "\n" not in str(caught.value)


def test_a_u_net_learns_no_variance():
    words = ["model.denoiser={kind: unet}", "model.path={kind: scaled_linear_beta}", "model.objective.prediction=eps"]
    load_config(TrainConfig, DIT, words)
    with pytest.raises(ValueError, match="learned_variance is not for a denoiser of kind unet.*: use a DiT"):
        load_config(TrainConfig, DIT, [*words, "model.objective.learned_variance=true"])


@pytest.mark.parametrize("word", ["image.embed_dim=64", "image.image_size=32", "shift=-1"])
def test_sizes_that_must_agree(word):
    with pytest.raises(ValueError, match=word.split("=")[0].split(".")[-1]):
        load_config(TextTrainConfig, CONFIGS / "emoji64_clip.yaml", [word])


def test_a_missing_key_is_named(tmp_path):
    tree = yaml.safe_load(DIT.read_text())
    del tree["optim"]["lr"]
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=r"x\.yaml: optim\.lr: .*required"):
        load_config(TrainConfig, tmp_path / "x.yaml")


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml cannot be read"):
        load_config(TrainConfig, tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("run: [1, 2")
    with pytest.raises(ValueError, match=r"bad\.yaml is not YAML"):
        load_config(TrainConfig, tmp_path / "bad.yaml")
    (tmp_path / "wide.yaml").write_bytes("run: ä".encode("utf-16"))
    with pytest.raises(ValueError, match=r"wide\.yaml is not YAML"):
        load_config(TrainConfig, tmp_path / "wide.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match=r"list\.yaml"):
        load_config(TrainConfig, tmp_path / "list.yaml", ["run.name=x"])


@pytest.mark.parametrize(
    "word",
    ["run.steps=7", "run.minutes=3", "preview.steps=3", "validation.batch_size=8", "data.prefetch=0",
     "model.keep_latents=false"],
)  # fmt: skip
def test_a_run_may_go_on_longer_and_show_more(word):
    check_continues(then=dump(load_config(TrainConfig, DIT)), now=load_config(TrainConfig, DIT, [word]))


def test_a_setting_that_is_new_had_its_default_when_the_run_began():
    tree = yaml.safe_load(dump(load_config(TrainConfig, DIT)))
    del tree["optim"]["ema_lengths"], tree["model"]["objective"]["learned_variance"], tree["run"]["snapshot_every"]
    check_continues(then=yaml.safe_dump(tree), now=load_config(TrainConfig, DIT))
    with pytest.raises(ValueError, match=r"optim.ema_lengths was \[\] when this run began and is \[0.1\] now"):
        check_continues(yaml.safe_dump(tree), load_config(TrainConfig, DIT, ["optim.ema_lengths=[0.1]"]))


@pytest.mark.parametrize(
    "word", ["run.seed=1", "data.batch_size=32", "model.denoiser.depth=2", "optim.lr=0.1", "engine.precision=fp32"]
)
def test_a_run_does_not_go_on_as_another(word):
    key = word.split("=")[0]
    with pytest.raises(ValueError, match=f"{key} was .* when this run began and is .* now"):
        check_continues(then=dump(load_config(TrainConfig, DIT)), now=load_config(TrainConfig, DIT, [word]))


def test_a_section_with_a_kind_is_named_by_its_keys_alone():
    """pydantic would say model.denoiser.dit, which is no key."""
    with pytest.raises(ValueError, match=r"demo.yaml: model\.denoiser: .*width") as error:
        load_config(TrainConfig, "configs/demo.yaml", ["model.denoiser.width=333"])
    assert "denoiser.dit" not in str(error.value)
    with pytest.raises(ValueError, match=r"unknown key model\.denoiser\.widht"):
        load_config(TrainConfig, "configs/demo.yaml", ["model.denoiser.widht=333"])
