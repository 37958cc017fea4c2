"""The one rule for the precision to draw, store and train in, and the names that precisions go by.

Does not import torch at its head, because the command line uses the names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16", "fp16"]
# Each precision's names here, in PyTorch, and in other programs: CompVis has `--precision full` and `autocast`.
NAMES: dict[Precision, tuple[str, ...]] = {
    "fp32": ("float32", "float", "f32", "full", "single"),
    "bf16": ("bfloat16", "autocast"),
    "fp16": ("float16", "f16", "half"),
}


def precision_named(given: object, *, what: str = "dtype") -> Precision:
    """Return the precision of a name, or of a torch.dtype, in any spelling. what: the setting, for the error.

    Raises ValueError, listing the names, for any other.
    """
    name = str(given).strip().lower().removeprefix("torch.")
    for precision, others in NAMES.items():
        if name == precision or name in others:
            return precision
    known = ", ".join(f"{precision} ({', '.join(others)})" for precision, others in NAMES.items())
    raise ValueError(f"{what} is {str(given)[:40]!r}, expected {known}")


def is_auto(given: object) -> bool:
    return isinstance(given, str) and given.strip().lower() == "auto"


def choose_precision(wanted: object, device: torch.device, *, training: bool = False, what: str = "dtype") -> Precision:
    """Choose the precision of the networks on this device. wanted: "auto", a name, or a torch.dtype.

    auto is bf16 on a CUDA card that computes in it natively (compute capability 8.0 or more), fp16 on an older one,
    and fp32 everywhere else; a CPU with instructions for bf16 also trains in bf16. Raises ValueError for bf16 on a card
    that would only emulate it, and for drawing in fp16 on a CPU. Training in fp16 on one is slow, but tests its loss
    scale.
    """
    native = has_bf16(device)
    if is_auto(wanted):
        if device.type == "cuda":
            return "bf16" if native else "fp16"
        return "bf16" if training and native else "fp32"
    precision = precision_named(wanted, what=what)
    if precision == "bf16" and device.type == "cuda" and not native:
        raise ValueError(f"{what} is bf16, which this GPU does not support: use fp16 or fp32")
    if precision == "fp16" and device.type == "cpu" and not training:
        raise ValueError(f"{what} is fp16, which is for GPUs, but the device is a CPU: use fp32 or bf16")
    return precision


def has_bf16(device: torch.device) -> bool:
    """Return whether the device computes in bf16 natively."""
    import torch

    if device.type == "cpu":
        avx512 = torch.cpu._is_avx512_bf16_supported()  # pyright: ignore[reportPrivateUsage]
        return avx512 or torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]
    if device.type != "cuda":
        return False
    if device.index:  # not the first card, which torch would ask otherwise
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cuda.is_bf16_supported(including_emulation=False)


def of_autoencoder(precision: Precision) -> Precision:
    """Return the precision of the autoencoder in a model of this one. Stable Diffusion's overflows in fp16."""
    return "fp32" if precision == "fp16" else precision


def dtype_of(precision: Precision) -> torch.dtype:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
