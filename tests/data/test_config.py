"""What a configuration of data says no to, and with which words."""

from __future__ import annotations

import pytest

from data.config import DataConfig, HeldOutConfig, ShardSet


def test_either_shards_or_sets():
    sets = (ShardSet(name="a", shards=("a/*.tar",)), ShardSet(name="b", shards="b.tar", weight=0.5))
    assert DataConfig(shards="x.tar").patterns == ("x.tar",)
    assert DataConfig(sets=sets).patterns == (("a/*.tar",), "b.tar")
    told = "give either data.shards or, to mix several sets, data.sets"
    with pytest.raises(ValueError, match=told):
        DataConfig()
    with pytest.raises(ValueError, match=told):
        DataConfig(shards="x.tar", sets=sets)


def test_sets_have_names_of_their_own():
    with pytest.raises(ValueError, match="two of data.sets are named a: rename one"):
        DataConfig(sets=(ShardSet(name="a", shards="1.tar"), ShardSet(name="a", shards="2.tar")))


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan")])
def test_a_weight_is_a_number_above_0(weight: float):
    with pytest.raises(ValueError, match="the weight of set a is .*, expected more than 0"):
        ShardSet(name="a", shards="1.tar", weight=weight)


@pytest.mark.parametrize(("name", "shards"), [("", "1.tar"), ("a", "")])
def test_a_set_has_a_name_and_shards(name: str, shards: str):
    with pytest.raises(ValueError, match="a set of data.sets needs a name and shards"):
        ShardSet(name=name, shards=shards)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_share_of_bad_samples_is_one(fraction: float):
    for make in (DataConfig, HeldOutConfig):
        with pytest.raises(ValueError, match=r"max_bad_fraction \(.*\) must be a fraction from 0 to 1"):
            make(shards="x.tar", max_bad_fraction=fraction)


def test_a_cache_has_room():
    with pytest.raises(ValueError, match=r"cache_gb \(0\) more than 0"):
        DataConfig(shards="x.tar", cache_gb=0)
