"""The data section of a run's YAML: mixtures are parsed and named, and reaching shards otherwise is no other run."""

from pathlib import Path

import pytest
import yaml

from ldm.config import dump, load_config, parse
from ldm.training.checkpoints.select import check_continues
from ldm.training.denoiser_config import TrainConfig

DIT = Path(__file__).parents[2] / "configs" / "emoji64_dit.yaml"
SETS = "data.sets=[{name: a, shards: [a/*.tar], weight: 3}, {name: b, shards: 'pipe:cat b.tar'}]"


def test_several_sets_are_parsed_and_come_back_equal():
    config = load_config(TrainConfig, DIT, ["data.shards=[]", SETS])
    assert [(one.name, one.shards, one.weight) for one in config.data.sets] == [
        ("a", ("a/*.tar",), 3.0),
        ("b", "pipe:cat b.tar", 1.0),
    ]
    assert parse(TrainConfig, yaml.safe_load(dump(config)), source="dump") == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([SETS], "data: give either data.shards or, to mix several sets, data.sets"),
        (
            ["data.shards=[]", SETS.replace("weight: 3", "weight: 0")],
            "the weight of set a is 0.0, expected more than 0",
        ),
        (["data.shards=[]", SETS.replace("weight: 3", "wieght: 3")], "data.sets.0.wieght; did you mean weight?"),
        (["data.shard=x"], "unknown key data.shard; did you mean shards?"),
        (["data.folder=x"], "unknown key data.folder; known keys of data: allow_pipe, batch_size, cache, "),
        (["lr=1"], "unknown key lr; did you mean optim.lr?"),
        (["steps=1"], "unknown key steps; did you mean preview.steps or run.steps?"),
        (["model.denoiser.batch_size=1"], "unknown key model.denoiser"),
        (["validation.max_bad_fraction=2"], "max_bad_fraction (2.0) must be a fraction from 0 to 1"),
    ],
)
def test_a_mistake_is_named(words: list[str], message: str):
    with pytest.raises(ValueError) as caught:
        load_config(TrainConfig, DIT, words)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "word",
    [
        "manifest=m.json",
        "allow_pipe=true",
        "cache=kept",
        "cache_gb=3",
        "max_bad_fraction=0.5",
        "max_missing_shards=0.5",
    ],
)
def test_a_run_goes_on_however_its_shards_are_reached(word: str):
    check_continues(dump(load_config(TrainConfig, DIT)), load_config(TrainConfig, DIT, [f"data.{word}"]))


def test_a_run_goes_on_with_and_without_validation_and_preview():
    both = ["validation=null", "preview=null"]
    with_them, without = (load_config(TrainConfig, DIT, words) for words in ([], both))
    assert (without.validation, without.preview) == (None, None)
    assert parse(TrainConfig, yaml.safe_load(dump(without)), source="dump") == without
    check_continues(dump(with_them), without)
    check_continues(dump(without), with_them)


@pytest.mark.parametrize(
    "word", ["caption_keys=[cap]", "image_keys=[png]", "caption_lines=separate", "missing_caption=empty"]
)
def test_a_run_does_not_go_on_with_other_samples(word: str):
    began = dump(load_config(TrainConfig, DIT))
    with pytest.raises(ValueError, match=f"data.{word.partition('=')[0]} was .* when this run began"):
        check_continues(began, load_config(TrainConfig, DIT, [f"data.{word}"]))


def test_a_run_of_before_these_settings_goes_on():
    """They had their defaults then."""
    tree = yaml.safe_load(dump(load_config(TrainConfig, DIT)))
    for name in ("caption_keys", "image_keys", "caption_lines", "missing_caption", "max_missing_shards"):
        del tree["data"][name]
    del tree["validation"]["max_missing_shards"]
    check_continues(yaml.safe_dump(tree), load_config(TrainConfig, DIT))


def test_shards_that_are_known_to_be_the_same_may_lie_elsewhere_and_nothing_else_may_change():
    began = dump(load_config(TrainConfig, DIT, ["data.shards=[]", SETS]))
    moved = SETS.replace("a/*.tar", "elsewhere/*.tar")
    check_continues(began, load_config(TrainConfig, DIT, ["data.shards=[]", moved]), same_shards=True)
    with pytest.raises(ValueError, match="data.sets was .* when this run began"):
        check_continues(began, load_config(TrainConfig, DIT, ["data.shards=[]", moved]))
    other = moved.replace("weight: 3", "weight: 4")
    with pytest.raises(ValueError, match="data.sets was .* when this run began"):
        check_continues(began, load_config(TrainConfig, DIT, ["data.shards=[]", other]), same_shards=True)


def test_a_run_does_not_go_on_with_another_mixture():
    began = dump(load_config(TrainConfig, DIT, ["data.shards=[]", SETS]))
    for other in (SETS.replace("weight: 3", "weight: 4"), SETS.replace("name: b", "name: c")):
        with pytest.raises(ValueError, match="data.sets was .* when this run began"):
            check_continues(began, load_config(TrainConfig, DIT, ["data.shards=[]", other]))
