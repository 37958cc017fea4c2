"""How each family other than LoRA changes a weight, at strength 1. Shapes: r rank, o outputs, i inputs, k kernel.

The formulas are those of LyCORIS (Yeh et al. 2023, arXiv 2309.14859) and peft, whose tensors' names are kept.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.interop.lora.layers import LayerChange, as_matrix

Factors = Mapping[str, Tensor]  # by role


@dataclass(frozen=True, eq=False)
class FactoredChange(LayerChange):
    """A change that is computed from a file's tensors, and perhaps from the weight."""

    factors: Factors
    scale: float = 1.0  # alpha / rank

    @abstractmethod
    def delta(self, f: Factors, weight: Tensor) -> Tensor:
        """Compute the change before it is scaled, from float32. Raises ValueError or RuntimeError for a misfit."""

    def change(self, parameter: Tensor) -> Tensor:
        found = {role: tensor.to(parameter.device, torch.float32) for role, tensor in self.factors.items()}
        delta = self.delta(found, parameter.float())
        # A weight o x i x k x k may be given as the matrix o x ikk, and a 1 x 1 convolution as a matrix or the reverse.
        given, wanted = as_matrix(delta.shape), as_matrix(parameter.shape)
        if given != wanted and given != parameter.flatten(1 if parameter.ndim > 1 else 0).shape:
            raise ValueError(f"a change of {given} for {wanted}")
        return delta.reshape(parameter.shape) * self.scale

    def misfit(self, parameter: Tensor) -> str:
        empty = {role: tensor.to("meta") for role, tensor in self.factors.items()}  # tensors without values
        try:
            replace(self, factors=empty).change(parameter.to("meta"))
        except (ValueError, RuntimeError, IndexError):
            given = ", ".join(f"{role} {tuple(tensor.shape)}" for role, tensor in self.factors.items())
            return f"{self.name} has {given} for a {self.parameter} of {tuple(parameter.shape)}"
        return ""


class Difference(FactoredChange):
    """A full difference, of a weight or a bias."""

    def delta(self, f: Factors, weight: Tensor) -> Tensor:
        return f["diff"]


class TuckerChange(FactoredChange):
    """LoCon of a convolution in Tucker's form: mid is r x r x k x k."""

    def delta(self, f: Factors, weight: Tensor) -> Tensor:
        return torch.einsum("mn...,om,ni->oi...", f["mid"], _matrix(f["up"]), _matrix(f["down"]))


class LohaChange(FactoredChange):
    """LoHa, the elementwise product of two products of low rank: Hyeon-Woo et al. 2021 (arXiv 2108.06098)."""

    def delta(self, f: Factors, weight: Tensor) -> Tensor:
        one, other = (_product(f, f"hada_t{n}", f"hada_w{n}_a", f"hada_w{n}_b") for n in (1, 2))
        if one.shape != other.shape:
            raise ValueError("two products of other shapes")
        return one * other


class LokrChange(FactoredChange):
    """LoKr, a Kronecker product, each side of which may be a product of low rank (arXiv 2309.14859)."""

    def delta(self, f: Factors, weight: Tensor) -> Tensor:
        small = f["lokr_w1"] if "lokr_w1" in f else f["lokr_w1_a"] @ f["lokr_w1_b"]
        large = f["lokr_w2"] if "lokr_w2" in f else _product(f, "lokr_t2", "lokr_w2_a", "lokr_w2_b")
        return torch.kron(small.reshape(*small.shape, *[1] * (large.ndim - 2)), large.contiguous())


class GloraChange(FactoredChange):
    """GLoRA: W A + B with A = a1 a2 (i x i) and B = b1 b2: Chavan et al. 2023 (arXiv 2306.07967)."""

    def delta(self, f: Factors, weight: Tensor) -> Tensor:
        a1, a2, b1, b2 = (f[role].flatten(1) for role in ("a1", "a2", "b1", "b2"))
        if a1.shape[0] != weight.shape[1]:  # LyCORIS before May 2024 called the factors the other way around
            a1, a2, b1, b2 = a2, a1, b2, b1
        return torch.einsum("oi...,ir,rj->oj...", weight, a1, a2) + (b1 @ b2).reshape(weight.shape)


@dataclass(frozen=True, eq=False)
class ScalingChange(FactoredChange):
    """IA3: inputs (axis 1) or outputs (axis 0) are multiplied by 1 + factor: Liu et al. 2022 (arXiv 2205.05638)."""

    axis: int = 0

    def delta(self, f: Factors, weight: Tensor) -> Tensor:
        return weight * _along(f["factor"], self.axis, weight)


@dataclass(frozen=True, eq=False)
class RotationChange(FactoredChange):
    """Diagonal OFT: blocks of s outputs are rotated, W_k <- R_k^T W_k: Qiu et al. 2023 (arXiv 2306.07280).

    oft_blocks is o / s x s x s. R is Cayley's (1 + Q) (1 - Q)^-1 with Q = B - B^T, whose norm is limited to
    constraint * o (0: unlimited), as in kohya's scripts and LyCORIS. rescale, o numbers, multiplies the outputs.
    """

    constraint: float = 0.0

    def delta(self, f: Factors, weight: Tensor) -> Tensor:
        blocks = f["oft_blocks"]
        skew = blocks - blocks.transpose(-1, -2)
        if self.constraint > 0:
            skew = skew * (self.constraint * len(weight) / (skew.norm() + 1e-8)).clamp(max=1)
        one = torch.eye(skew.shape[-1], device=skew.device)
        turned = self.turned(torch.linalg.solve(one - skew, one + skew, left=False), weight)
        return (turned * _along(f["rescale"], 0, weight) if "rescale" in f else turned) - weight

    def turned(self, rotations: Tensor, weight: Tensor) -> Tensor:
        """Rotate the outputs of a weight by blocks n x s x s."""
        blocks = weight.unflatten(0, rotations.shape[:2])
        return torch.einsum("knm,kn...->km...", rotations, blocks).flatten(0, 1)


class ButterflyChange(RotationChange):
    """BOFT: m rotations, each after another permutation of the outputs: Liu et al. 2023 (arXiv 2311.06243).

    oft_blocks is m x o / s x s x s. The permutation of step j gathers outputs that are 2^j s / 2 apart.
    """

    def turned(self, rotations: Tensor, weight: Tensor) -> Tensor:
        size = rotations.shape[-1]
        for step, blocks in enumerate(rotations):
            apart = 2**step * (size // 2)
            weight = weight.unflatten(0, (-1, 2, apart)).transpose(1, 2).flatten(0, 2)
            weight = torch.einsum("knm,km...->kn...", blocks, weight.unflatten(0, (-1, size))).flatten(0, 1)
            weight = weight.unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
        return weight


@dataclass(frozen=True, eq=False)
class DoraChange(LayerChange):
    """DoRA: W' = m (W + D) / |W + D| with the change D of another family: Liu et al. 2024 (arXiv 2402.09353), eq. 5.

    magnitude: one number for each output, of shape o or o x 1 ... (peft, LyCORIS), or for each input, 1 x i ... (older
    LyCORIS, OneTrainer); the norm is that of the output's or input's weights.
    """

    base: LayerChange
    magnitude: Tensor

    def _axis(self, weight: Tensor) -> int:
        return 0 if self.magnitude.shape[:1] == weight.shape[:1] else 1

    def misfit(self, parameter: Tensor) -> str:
        if parameter.ndim < 2 or self.magnitude.numel() != parameter.shape[self._axis(parameter)]:
            shapes = tuple(self.magnitude.shape), tuple(parameter.shape)
            return f"{self.name} has magnitudes {shapes[0]} for a weight of {shapes[1]}"
        return self.base.misfit(parameter)

    def change(self, parameter: Tensor) -> Tensor:
        weight, axis = parameter.float(), self._axis(parameter)
        changed = weight + self.base.change(parameter)
        others = [dim for dim in range(changed.ndim) if dim != axis]
        norm = torch.linalg.vector_norm(changed, dim=others, keepdim=True) + torch.finfo(torch.float32).eps
        return changed * (_along(self.magnitude.to(changed), axis, weight) / norm) - weight


def _matrix(factor: Tensor) -> Tensor:
    """Drop the kernel of 1 x 1."""
    return factor.reshape(as_matrix(factor.shape))


def _product(f: Factors, core: str, a: str, b: str) -> Tensor:
    """Multiply two factors: o x r and r x ikk; or with a core r x r x k x k in Tucker's form, r x o and r x i."""
    if core in f:
        return torch.einsum("mn...,mo,ni->oi...", f[core], f[a], f[b])
    return f[a].flatten(1) @ f[b].flatten(1)


def _along(numbers: Tensor, axis: int, weight: Tensor) -> Tensor:
    """Reshape numbers so that each multiplies one index of an axis. Raises RuntimeError for another count."""
    return numbers.reshape([weight.shape[axis] if dim == axis else 1 for dim in range(weight.ndim)])
