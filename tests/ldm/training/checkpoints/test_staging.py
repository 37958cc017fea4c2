"""Staging buffers: copies that are made again and again, of adjacent tensors at once."""

from __future__ import annotations

import torch

from ldm.training.checkpoints.saver import StagingBuffers, adjacent_runs


def test_a_copy_is_of_the_moment_when_it_is_taken():
    tensors = {"a": torch.zeros(3), "b": torch.zeros(2, 2, dtype=torch.int64)}
    copies = StagingBuffers(tensors)
    for number in (1, 2):
        for tensor in tensors.values():
            tensor.fill_(number)
        copies.copy()
        for tensor in tensors.values():
            tensor.fill_(9)
        assert copies.tensors["a"].tolist() == [number] * 3 and copies.tensors["b"].tolist() == [[number] * 2] * 2


def test_what_lies_side_by_side_is_one_run_whatever_the_order():
    flat, other = torch.arange(10.0), torch.arange(10.0, 14.0)
    tensors = {"end": flat[7:], "other": other[:2], "start": flat[:4], "middle": flat[4:7]}
    assert sorted(adjacent_runs(tensors)) == [["other"], ["start", "middle", "end"]]
    copies = StagingBuffers(tensors)
    copies.copy()
    assert {key: copy.tolist() for key, copy in copies.tensors.items()} == {
        "start": [0, 1, 2, 3],
        "middle": [4, 5, 6],
        "end": [7, 8, 9],
        "other": [10, 11],
    }
    assert len({copies.tensors[key].untyped_storage().data_ptr() for key in ("start", "middle", "end")}) == 1


def test_gaps_overlaps_and_layouts_are_told_apart():
    flat = torch.arange(12.0)
    tensors = {
        "gap_before": flat[1:3],
        "overlap": flat[2:4],
        "transposed": flat[4:8].view(2, 2).T,
        "after_it": flat[8:10],
        "other_numbers": flat[10:].view(torch.int32),
        "nothing": flat[12:],
    }
    assert all(len(run) == 1 for run in adjacent_runs(tensors))
    copies = StagingBuffers(tensors)
    copies.copy()
    for key, tensor in tensors.items():
        assert torch.equal(copies.tensors[key], tensor) and copies.tensors[key].is_contiguous(), key


def test_matrices_keep_their_shapes_in_a_run():
    flat = torch.arange(10.0, requires_grad=True)
    tensors = {"matrix": flat[:6].view(2, 3), "number": flat[6], "vector": flat[7:]}
    assert list(adjacent_runs(tensors)) == [["matrix", "number", "vector"]]
    copies = StagingBuffers(tensors)
    copies.copy()
    for key, tensor in tensors.items():
        assert torch.equal(copies.tensors[key], tensor) and copies.tensors[key].shape == tensor.shape
        assert not copies.tensors[key].requires_grad


def test_other_tensors_of_the_same_names_are_others():
    a, b = torch.zeros(2), torch.zeros(2)
    copies = StagingBuffers({"a": a, "b": b})
    assert copies.matches({"b": b, "a": a})
    assert not copies.matches({"a": a, "b": b.clone()})
    assert not copies.matches({"a": a}) and not copies.matches({"a": a, "b": b, "c": b})
    empty = StagingBuffers({})
    empty.copy()
    assert empty.tensors == {} and empty.matches({}) and not empty.matches({"a": a})
