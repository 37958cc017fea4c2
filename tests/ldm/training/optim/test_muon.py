"""Muon: what it makes orthogonal, which weights it moves, and that it moves them alike whole and in pieces."""

from __future__ import annotations

import pytest
import torch
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from ldm.denoisers import DiTConfig
from ldm.training.optim.muon import Cut, Join, linear_maps, muon_step, orthogonal, uncut

SHAPES = pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16), (1, 5), (5, 1)])
STEP = {"lr": 0.02, "weight_decay": 0.1, "beta": 0.9}


@SHAPES
def test_an_orthogonal_matrix_keeps_the_directions_and_levels_their_sizes(shape: tuple[int, int]):
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    sizes = torch.logspace(0, -1.5, min(shape))
    found = orthogonal(5 * u @ torch.diag(sizes) @ v)
    assert found.dtype == torch.bfloat16 and found.shape == shape
    inner = u.T @ found.float() @ v.T  # U^T (U S' V^T) V
    assert inner.diagonal().min() > 0.6 and inner.diagonal().max() < 1.25
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 0.05


def test_no_gradient_is_no_direction():
    assert torch.equal(orthogonal(torch.zeros(3, 4)), torch.zeros(3, 4, dtype=torch.bfloat16))


@SHAPES
def test_a_step_is_that_of_pytorchs_muon(shape: tuple[int, int]):
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    optimizer = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    momentum = torch.zeros(shape)
    for _ in range(4):
        gradient = torch.randn(shape)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        muon_step(ours, momentum, [Cut(ours.shape, 0, 0, ours.numel())], uncut, **STEP)
        optimizer.step()
        assert torch.equal(ours, theirs)
        assert torch.equal(momentum, optimizer.state[theirs]["momentum_buffer"])


@pytest.mark.parametrize("border", [0, 1, 40, 96, 100, 143, 144])
def test_two_ranks_move_a_flat_tensor_as_one_moves_its_matrices(border: int):
    """One matrix after the other, cut anywhere: in the first one, between them, in the second one."""
    torch.manual_seed(0)
    shapes = [torch.Size((12, 8)), torch.Size((6, 8))]
    whole, gradients = torch.randn(144), torch.randn(3, 144)
    expected = [part.view(shape).clone() for part, shape in zip(whole.split([96, 48]), shapes, strict=True)]
    moments = [torch.zeros(shape) for shape in shapes]
    ranks = [whole[:border].clone(), whole[border:].clone()]
    kept = [torch.zeros_like(part) for part in ranks]
    for gradient in gradients:
        for w, m, g in zip(expected, moments, gradient.split([96, 48]), strict=True):
            w.grad = g.view(w.shape)
            muon_step(w, m, [Cut(w.shape, 0, 0, w.numel())], uncut, **STEP)
        ahead = gradient.lerp(torch.cat([m.flatten() for m in moments]), 0.9)
        for rank, (first, last) in enumerate([(0, border), (border, 144)]):
            cuts = [cut_between(first, last, shape, start) for shape, start in zip(shapes, [0, 96], strict=True)]
            ranks[rank].grad = gradient[first:last].clone()
            muon_step(ranks[rank], kept[rank], cuts, joining(ahead, shapes), **STEP)
    assert torch.equal(torch.cat(ranks), torch.cat([w.flatten() for w in expected]))
    assert torch.equal(torch.cat(kept), torch.cat([m.flatten() for m in moments]))


def cut_between(first: int, last: int, shape: torch.Size, start: int) -> Cut:
    """Of a matrix from element `start` of a tensor on, what lies in its elements first to last - 1."""
    begins, ends = max(first, start), min(last, start + shape.numel())
    return Cut(shape, begins - start, begins - first, ends - begins) if begins < ends else Cut(shape, 0, 0, 0)


def joining(ahead: Tensor, shapes: list[torch.Size]) -> Join:
    """The other rank's elements are taken from the whole; this rank's own must be as they are there."""

    def join(elements: Tensor, cut: Cut) -> Tensor:
        start = 0 if cut.shape == shapes[0] else 96
        whole = ahead[start : start + cut.shape.numel()].bfloat16()
        assert torch.equal(elements, whole[cut.start : cut.start + cut.size])
        return whole.view(cut.shape)

    return join


def test_muon_is_for_what_maps_and_not_for_tables():
    dit = DiTConfig(depth=1, width=32, heads=2, sample_size=8).build(latent_channels=4, context_width=16)
    names = {id(p): name for name, p in dit.named_parameters()}
    found = {names[id(p)] for p in linear_maps(dit)}
    assert "transformer_blocks.0.attn1.to_q.weight" in found
    assert not any(name.endswith(("bias", "scale_shift_table")) for name in found)
    text = TextTransformer(width=16, heads=2, layers=1, vocab_size=30, context_length=8)
    names = {id(p): name for name, p in text.named_parameters()}
    found = {names[id(p)] for p in linear_maps(text)}
    assert {name for name in found if "attn" in name} == {
        "transformer.resblocks.0.attn.in_proj_weight",
        "transformer.resblocks.0.attn.out_proj.weight",
    }
    assert not any("embedding" in name for name in found)


def test_a_weight_that_two_layers_share_is_one_and_a_frozen_one_is_none():
    first, second, frozen = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    frozen.weight.requires_grad_(False)
    assert [id(p) for p in linear_maps(nn.Sequential(first, second, frozen))] == [id(first.weight)]
