"""Tensors cut among any owners are read as if nobody had cut them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldm.interop.fragments import Fragments, Span, rank_file, write_fragments

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8]
FEW = settings(max_examples=40)

# For each tensor: its type, its size, and where it is cut, as shares of it; who owns which cut is drawn by the owner.
Cuts = st.lists(st.floats(0, 1), max_size=5)
Tensors = st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(1, 40), Cuts), min_size=1, max_size=4)


def make_tensors(sizes: Sequence[tuple[torch.dtype, int, Any]]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {f"weights/{i}": (100 * torch.randn(size)).to(dtype) for i, (dtype, size, _) in enumerate(sizes)}


def write(folder: Path, tensors: Mapping[str, Tensor], cuts: Mapping[str, Sequence[float]], owners: int, seed: int):
    """Cut each tensor, and let each rank write a file of what fell to it. A rank owns one run of a tensor at most."""
    draw = torch.Generator().manual_seed(seed)
    files: list[dict[str, Tensor]] = [{} for _ in range(owners)]
    spans: list[dict[str, Span]] = [{} for _ in range(owners)]
    for key, tensor in tensors.items():
        places = sorted(round(share * len(tensor)) for share in list(cuts[key])[: owners - 1])
        owned = torch.randperm(owners, generator=draw).tolist()
        for rank, (start, stop) in zip(owned, pairwise([0, *places, len(tensor)]), strict=False):
            files[rank][key] = tensor[start:stop].clone()
            spans[rank][key] = Span(key.removeprefix("weights/"), start, stop)
    for rank in range(owners):
        write_fragments(folder / rank_file(rank), files[rank], spans[rank])


@FEW
@given(sizes=Tensors, owners=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_any_range_of_a_tensor_is_read_as_if_it_were_whole(sizes: list, owners: int, seed: int):
    tensors, cuts = make_tensors(sizes), {f"weights/{i}": cut for i, (_, _, cut) in enumerate(sizes)}
    with TemporaryDirectory() as name:
        write(Path(name), tensors, cuts, owners, seed)
        with Fragments(Path(name)) as fragments:
            assert set(fragments.keys()) == tensors.keys()
            assert fragments.sizes("weights") == {key[8:]: len(tensor) for key, tensor in tensors.items()}
            assert fragments.sizes("ema") == {}
            for key, tensor in tensors.items():
                for start in range(len(tensor)):
                    for stop in {start + 1, (start + len(tensor) + 1) // 2, len(tensor)}:
                        found = fragments.read(key, start, stop)
                        assert found.dtype == tensor.dtype and torch.equal(found, tensor[start:stop])


@FEW
@given(sizes=Tensors, owners=st.integers(1, 6), seed=st.integers(0, 2**31), data=st.data())
def test_the_digest_is_that_of_the_tensors_and_of_nothing_else(sizes: list, owners: int, seed: int, data: Any):
    """Equal however they were cut, another for any bit that differs."""
    tensors, cuts = make_tensors(sizes), {f"weights/{i}": cut for i, (_, _, cut) in enumerate(sizes)}

    def digest(folder: str, *, owners: int, seed: int) -> str:
        path = Path(folder) / f"{owners} {seed}"
        path.mkdir(exist_ok=True)
        write(path, tensors, cuts, owners, seed)
        with Fragments(path) as fragments:
            found = fragments.digest()
        shutil.rmtree(path)
        return found

    with TemporaryDirectory() as name:
        alone = digest(name, owners=1, seed=0)
        assert digest(name, owners=owners, seed=seed) == alone
        key = data.draw(st.sampled_from(sorted(tensors)))
        place = data.draw(st.integers(0, len(tensors[key]) - 1))
        tensors[key].view(torch.uint8)[place * tensors[key].element_size()] ^= 1
        assert digest(name, owners=owners, seed=seed) != alone


def test_names_and_types_are_part_of_the_digest(tmp_path: Path):
    found = set()
    states: list[dict[str, Tensor]] = [
        {"a": torch.zeros(4)},
        {"b": torch.zeros(4)},
        {"a": torch.zeros(4, dtype=torch.int32)},
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(2), "b": torch.zeros(2)},
    ]
    for number, state in enumerate(states):
        (tmp_path / str(number)).mkdir()
        write_fragments(tmp_path / str(number) / rank_file(0), state, {})
        with Fragments(tmp_path / str(number)) as fragments:
            found.add(fragments.digest())
    assert len(found) == len(states)


def test_generators_are_left_out_of_the_digest_and_scalars_are_not(tmp_path: Path):
    """Each rank has its own generators, so that their number is not the same for one and for two ranks."""
    found = []
    for name, extra in {
        "alone": {},
        "drawn": {"generators/1/cpu": torch.ones(3)},
        "scalar": {"s": torch.ones(())},
    }.items():
        (tmp_path / name).mkdir()
        write_fragments(tmp_path / name / rank_file(0), {"a": torch.zeros(4)} | extra, {})
        with Fragments(tmp_path / name) as fragments:
            found.append(fragments.digest())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_gap_is_named(tmp_path: Path, missing: int):
    whole = torch.arange(30.0)
    for rank in {0, 1, 2} - {missing}:
        span = Span("matrix", 10 * rank, 10 * (rank + 1))
        write_fragments(tmp_path / rank_file(rank), {"ema/matrix": whole[span.start : span.stop]}, {"ema/matrix": span})
    with Fragments(tmp_path) as fragments:
        for rank in {0, 1, 2} - {missing}:
            assert torch.equal(
                fragments.read("ema/matrix", 10 * rank, 10 * rank + 10), whole[10 * rank : 10 * rank + 10]
            )
        with pytest.raises(ValueError, match=f"it holds no elements {10 * missing} to 29 of ema/matrix"):
            fragments.read("ema/matrix", 0, 30)
        start = 10 * missing + 5
        with pytest.raises(ValueError, match=f"it holds no elements {start} to {start} of ema/matrix"):
            fragments.read("ema/matrix", start, start + 1)


def test_what_lies_beyond_the_end_is_not_there(tmp_path: Path):
    write_fragments(tmp_path / rank_file(0), {"w/a": torch.arange(5.0)}, {"w/a": Span("a", 0, 5)})
    with Fragments(tmp_path) as fragments, pytest.raises(ValueError, match="it holds no elements 5 to 5 of w/a"):
        fragments.read("w/a", 0, 6)


def test_a_tensor_that_nobody_wrote_is_named(tmp_path: Path):
    write_fragments(tmp_path / rank_file(0), {"buffers/a": torch.ones(2, 3)}, {})
    with Fragments(tmp_path) as fragments:
        assert torch.equal(fragments.whole("buffers/a"), torch.ones(2, 3))
        with pytest.raises(ValueError, match="it holds no buffers/b"):
            fragments.whole("buffers/b")
        with pytest.raises(ValueError, match="it holds no elements 0 to 2 of ema/b"):
            fragments.read("ema/b", 0, 3)


def test_numbers_that_are_equal_but_not_the_same_are_told_apart(tmp_path: Path):
    """Bit for bit: -0 is not 0, and a NaN is as it was."""
    special = torch.tensor([0.0, -0.0, math.nan, math.inf, 1e-45])
    write_fragments(tmp_path / rank_file(0), {"w/a": special}, {"w/a": Span("a", 0, 5)})
    with Fragments(tmp_path) as fragments:
        assert fragments.read("w/a", 0, 5).view(torch.int32).tolist() == special.view(torch.int32).tolist()
