"""Random changes of every family for a weight, and what they change by the families' formulas, in float64.

The formulas are written out index by index, or with large matrices, so that they share nothing with the product's code.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Tensors = dict[str, Tensor]  # by the ending of their names, `.lora_up.weight`
Case = Callable[[Tensor, torch.Generator], tuple[Tensors, Tensor]]  # weight o x i or o x i x k x k -> tensors, change
ALPHA, RANK = 3.0, 4


def numbers(*shape: int, generator: torch.Generator, std: float = 0.3) -> Tensor:
    return std * torch.randn(*shape, generator=generator)


def full(weight: Tensor, generator: torch.Generator) -> tuple[Tensors, Tensor]:
    difference = numbers(*weight.shape, generator=generator)
    return {".diff": difference}, difference.double()


def lora(weight: Tensor, generator: torch.Generator) -> tuple[Tensors, Tensor]:
    outputs, inputs, *kernel = weight.shape
    down, up = numbers(RANK, inputs, *kernel, generator=generator), numbers(outputs, RANK, generator=generator)
    up = up[(..., *[None] * len(kernel))]
    tensors = {".lora_down.weight": down, ".lora_up.weight": up, ".alpha": torch.tensor(ALPHA)}
    return tensors, ALPHA / RANK * torch.einsum("or,ri...->oi...", up.double().flatten(1), down.double())


def lora_with_scalar(weight: Tensor, generator: torch.Generator) -> tuple[Tensors, Tensor]:
    tensors, change = lora(weight, generator)
    return tensors | {".scalar": torch.tensor(0.25)}, 0.25 * change


def tucker(weight: Tensor, generator: torch.Generator) -> tuple[Tensors, Tensor]:
    outputs, inputs, *kernel = weight.shape
    down, up = (numbers(*shape, 1, 1, generator=generator) for shape in ((RANK, inputs), (outputs, RANK)))
    mid = numbers(RANK, RANK, *kernel, generator=generator)
    change = torch.zeros_like(weight, dtype=torch.float64)
    for y in range(kernel[0]):
        for x in range(kernel[1]):
            change[:, :, y, x] = up.double()[:, :, 0, 0] @ mid.double()[:, :, y, x] @ down.double()[:, :, 0, 0]
    tensors = {".lora_down.weight": down, ".lora_mid.weight": mid, ".lora_up.weight": up, ".alpha": torch.tensor(ALPHA)}
    return tensors, ALPHA / RANK * change


def loha(weight: Tensor, generator: torch.Generator) -> tuple[Tensors, Tensor]:
    matrix = weight.flatten(1)
    pairs = [
        (numbers(len(matrix), RANK, generator=generator), numbers(RANK, matrix.shape[1], generator=generator))
        for _ in range(2)
    ]
    tensors = {f".hada_w{n}_{kind}": tensor for n, pair in enumerate(pairs, 1) for kind, tensor in zip("ab", pair)}  # noqa: B905
    (a, b), (c, d) = [(one.double(), other.double()) for one, other in pairs]
    change = torch.einsum("or,ri,os,si->oi", a, b, c, d).reshape(weight.shape)
    return tensors | {".alpha": torch.tensor(ALPHA)}, ALPHA / RANK * change


def loha_tucker(weight: Tensor, generator: torch.Generator) -> tuple[Tensors, Tensor]:
    outputs, inputs, *kernel = weight.shape
    tensors: Tensors = {".alpha": torch.tensor(ALPHA)}
    change = torch.ones_like(weight, dtype=torch.float64)
    for n in (1, 2):
        core = numbers(RANK, RANK, *kernel, generator=generator)
        a, b = numbers(RANK, outputs, generator=generator), numbers(RANK, inputs, generator=generator)
        tensors |= {f".hada_t{n}": core, f".hada_w{n}_a": a, f".hada_w{n}_b": b}
        change *= torch.stack(
            [
                torch.stack([a.double().T @ core.double()[:, :, y, x] @ b.double() for x in range(kernel[1])], -1)
                for y in range(kernel[0])
            ],
            -2,
        )
    return tensors, ALPHA / RANK * change


def lokr(weight: Tensor, generator: torch.Generator, factored: str = "") -> tuple[Tensors, Tensor]:
    """factored: "1", "2" or both: which side is a product of low rank; "t": the second in Tucker's form."""
    outputs, inputs, *kernel = weight.shape
    a, b, c, d = 4, 2, outputs // 4, inputs // 2
    tensors: Tensors = {".alpha": torch.tensor(ALPHA)}
    if "1" in factored:
        left, right = numbers(a, RANK, generator=generator), numbers(RANK, b, generator=generator)
        tensors |= {".lokr_w1_a": left, ".lokr_w1_b": right}
        small = left.double() @ right.double()
    else:
        tensors[".lokr_w1"] = numbers(a, b, generator=generator)
        small = tensors[".lokr_w1"].double()
    if "t" in factored:
        core = numbers(RANK, RANK, *kernel, generator=generator)
        left, right = numbers(RANK, c, generator=generator), numbers(RANK, d, generator=generator)
        tensors |= {".lokr_t2": core, ".lokr_w2_a": left, ".lokr_w2_b": right}
        large = torch.einsum("mc,mnyx,nd->cdyx", left.double(), core.double(), right.double())
    elif "2" in factored:
        left, right = numbers(c, RANK, generator=generator), numbers(RANK, d * math.prod(kernel), generator=generator)
        tensors |= {".lokr_w2_a": left, ".lokr_w2_b": right}
        large = (left.double() @ right.double()).reshape(c, d, *kernel)
    else:
        tensors[".lokr_w2"] = numbers(c, d, *kernel, generator=generator)
        large = tensors[".lokr_w2"].double()
    change = torch.zeros_like(weight, dtype=torch.float64)
    for row in range(outputs):
        for column in range(inputs):
            change[row, column] = small[row // c, column // d] * large[row % c, column % d]
    return tensors, (ALPHA / RANK if factored else 1.0) * change


def glora(weight: Tensor, generator: torch.Generator, old: bool = False) -> tuple[Tensors, Tensor]:
    outputs, inputs, *kernel = weight.shape
    shapes = {"a1": (inputs, RANK), "a2": (RANK, inputs), "b1": (outputs, RANK), "b2": (RANK, inputs, *kernel)}
    f = {role: numbers(*shape, generator=generator) for role, shape in shapes.items()}
    change = torch.einsum("oi...,ij->oj...", weight.double(), f["a1"].double() @ f["a2"].double())
    change += torch.einsum("or,ri...->oi...", f["b1"].double(), f["b2"].double())
    if old:
        f = {"a2": f["a1"], "a1": f["a2"], "b2": f["b1"], "b1": f["b2"]}
    tensors = {f".{role}.weight": tensor for role, tensor in f.items()}
    return tensors | {".alpha": torch.tensor(ALPHA)}, ALPHA / RANK * change


def ia3(weight: Tensor, generator: torch.Generator, on_input: bool = False) -> tuple[Tensors, Tensor]:
    count = weight.shape[1 if on_input else 0]
    factor = numbers(count, generator=generator)
    shaped = factor.reshape(1, count, *[1] * (weight.ndim - 2)) if weight.ndim > 2 else factor
    parts = zip(weight.double().unbind(int(on_input)), factor.tolist(), strict=True)
    change = torch.stack([part * number for part, number in parts], int(on_input))
    return {".weight": shaped, ".on_input": torch.tensor(int(on_input))}, change


def rotation_of(block: Tensor, limit: float) -> Tensor:
    skew = block.double() - block.double().transpose(-1, -2)
    skew = skew * min(1.0, limit / skew.norm().item())
    one = torch.eye(skew.shape[-1], dtype=torch.float64)
    return (one + skew) @ torch.linalg.inv(one - skew)


def oft(weight: Tensor, generator: torch.Generator, rescaled: bool = False, constraint: float = 0.0):
    size = 8
    blocks = numbers(len(weight) // size, size, size, generator=generator, std=0.1)
    rotation = torch.block_diag(*rotation_of(blocks, constraint * len(weight) or math.inf))
    turned = torch.einsum("no,ni...->oi...", rotation, weight.double())
    tensors = {".oft_blocks": blocks, ".alpha": torch.tensor(constraint)}
    if rescaled:
        tensors[".rescale"] = 1 + numbers(len(weight), *[1] * (weight.ndim - 1), generator=generator)
        turned = turned * tensors[".rescale"].double()
    return tensors, turned - weight.double()


def boft(weight: Tensor, generator: torch.Generator) -> tuple[Tensors, Tensor]:
    outputs, size, steps = len(weight), 4, 3
    blocks = numbers(steps, outputs // size, size, size, generator=generator, std=0.1)
    rotations = rotation_of(blocks, math.inf)
    turned = weight.double()
    for step in range(steps):
        apart = 2**step * size // 2
        # Output 2 * apart * c + apart * g + k goes to place 2 * apart * c + 2 * k + g.
        order = torch.zeros(outputs, outputs, dtype=torch.float64)
        for c in range(outputs // (2 * apart)):
            for g in range(2):
                for k in range(apart):
                    order[2 * apart * c + 2 * k + g, 2 * apart * c + apart * g + k] = 1
        turned = torch.einsum("no,oi...->ni...", order.T @ torch.block_diag(*rotations[step]) @ order, turned)
    return {".oft_blocks": blocks}, turned - weight.double()


def dora(base: Case, kind: str) -> Case:
    """kind: the magnitudes are of outputs (LyCORIS), of inputs (kohya's older LyCORIS, OneTrainer), or peft's."""

    def case(weight: Tensor, generator: torch.Generator) -> tuple[Tensors, Tensor]:
        tensors, change = base(weight, generator)
        changed = weight.double() + change
        axis = int(kind == "inputs")
        magnitude = 1 + numbers(weight.shape[axis], generator=generator)
        parts = changed.unbind(axis)
        new = [part / part.norm() * number for part, number in zip(parts, magnitude.tolist(), strict=True)]
        ones = [1] * (weight.ndim - 2)
        shapes = {"outputs": (-1, 1, *ones), "inputs": (1, -1, *ones), "peft": (1, -1, *ones) if ones else (-1,)}
        name = ".lora_magnitude_vector" if kind == "peft" else ".dora_scale"
        return tensors | {name: magnitude.reshape(shapes[kind])}, torch.stack(new, axis) - weight.double()

    return case


def of(case: Callable[..., tuple[Tensors, Tensor]], **options: object) -> Case:
    return lambda weight, generator: case(weight, generator, **options)


FAMILIES: dict[str, Case] = {
    "full difference": full,
    "LoRA": lora,
    "LoRA with a scalar": lora_with_scalar,
    "LoHa": loha,
    "LoKr of two matrices": lokr,
    "LoKr, second factored": of(lokr, factored="2"),
    "LoKr, first factored": of(lokr, factored="1"),
    "LoKr, both factored": of(lokr, factored="12"),
    "GLoRA": glora,
    "old GLoRA": of(glora, old=True),
    "IA3 of outputs": ia3,
    "IA3 of inputs": of(ia3, on_input=True),
    "OFT": oft,
    "OFT, constrained": of(oft, constraint=0.005),
    "OFT, rescaled": of(oft, rescaled=True),
    "BOFT": boft,
    "DoRA of outputs": dora(lora, "outputs"),
    "DoRA of inputs": dora(lora, "inputs"),
    "DoRA of peft": dora(lora, "peft"),
    "DoRA of LoHa": dora(loha, "outputs"),
    "DoRA of LoKr": dora(of(lokr, factored="12"), "inputs"),
}
OF_KERNELS: dict[str, Case] = {
    "LoCon in Tucker's form": tucker,
    "DoRA of Tucker's form": dora(tucker, "outputs"),
    "LoHa in Tucker's form": loha_tucker,
    "LoKr in Tucker's form": of(lokr, factored="t"),
}
