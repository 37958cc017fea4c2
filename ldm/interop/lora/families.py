"""The families of changes: by which tensors of a layer each is recognised, which it needs, and how it is built.

To add one, write its class in ldm/interop/lora/changes.py, its tensors' names in ldm/interop/lora/names.py, and its
entry in FAMILIES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from ldm.interop.lora.changes import (
    ButterflyChange,
    Difference,
    DoraChange,
    FactoredChange,
    GloraChange,
    LohaChange,
    LokrChange,
    RotationChange,
    ScalingChange,
    TuckerChange,
)
from ldm.interop.lora.layers import LayerChange, LoraLayer
from ldm.interop.lora.names import Place, Role

Found = Mapping[Role, Tensor]  # the tensors of a layer
Needs = tuple[tuple[Role, ...], ...]  # alternatives, of which one must be complete


class Scale(NamedTuple):
    """By what a change is multiplied: alpha / rank."""

    alpha: float
    rank: int

    @property
    def factor(self) -> float:
        return self.alpha / self.rank


class Family(NamedTuple):
    needs: tuple[Needs, ...]
    build: Callable[[Place, Found, Scale], list[LayerChange]]  # the first is that of the weight
    may: tuple[Role, ...] = ()  # further tensors that it may have
    rank: Callable[[Found], int] | None = None  # 0: the tensors do not give it; None: it is not scaled by alpha / rank

    @property
    def roles(self) -> set[Role]:
        return {*self.may, *(role for needs in self.needs for roles in needs for role in roles)}


def _needs(*roles: Role) -> tuple[Needs, ...]:
    return tuple(((role,),) for role in roles)


def _rows(role: Role) -> Callable[[Found], int]:
    """Read the rank from the first size of a factor r x i."""
    return lambda found: found[role].shape[0] if found[role].ndim else 0


def _lora(place: Place, found: Found, scale: Scale) -> list[LayerChange]:
    if "mid" in found:
        return [TuckerChange(*place[:2], found, scale.factor)]
    return [LoraLayer(*place[:2], found["down"], found["up"], scale.alpha)]


def _factored(kind: type[FactoredChange]) -> Callable[[Place, Found, Scale], list[LayerChange]]:
    return lambda place, found, scale: [kind(*place[:2], found, scale.factor)]


def _difference(role: Role) -> Callable[[Place, Found, Scale], list[LayerChange]]:
    return lambda place, found, scale: [Difference(*place[:2], {"diff": found[role]})]


def _scaling(place: Place, found: Found, scale: Scale) -> list[LayerChange]:
    """Build LyCORIS's IA3, which multiplies by 1 + weight; on_input is a flag."""
    factor = {"factor": found["ia3_weight"]}
    return [ScalingChange(*place[:2], factor, axis=int(found["on_input"].item() != 0))]


def _peft_scaling(place: Place, found: Found, scale: Scale) -> list[LayerChange]:
    """Build peft's IA3, which multiplies by ia3_l: 1 x i for inputs, o x 1 for outputs, the bias included."""
    if found["ia3_l"].ndim != 2 or 1 not in found["ia3_l"].shape:
        shape = tuple(found["ia3_l"].shape)
        raise ValueError(f"layer {place.name} has an ia3_l of shape {shape}, expected 1 x inputs or outputs x 1")
    factor = {"factor": found["ia3_l"].float().flatten() - 1}
    if found["ia3_l"].shape[0] == 1:
        return [ScalingChange(*place[:2], factor, axis=1)]
    return [ScalingChange(*place[:2], factor), ScalingChange(*place[:2], factor, parameter="bias")]


def _rotation(place: Place, found: Found, scale: Scale) -> list[LayerChange]:
    kind = ButterflyChange if found["oft_blocks"].ndim == 4 else RotationChange
    tensors = {role: tensor for role, tensor in found.items() if role != "alpha"}
    return [kind(*place[:2], tensors, constraint=found["alpha"].item() if "alpha" in found else 0.0)]


def _lokr_rank(found: Found) -> int:
    inner = found.get("lokr_w2_b", found.get("lokr_w1_b"))
    return inner.shape[0] if inner is not None and inner.ndim else 0


FAMILIES: dict[str, Family] = {
    "LoRA": Family(_needs("down", "up"), _lora, may=("mid",), rank=_rows("down")),
    "LoHa": Family(
        _needs("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        _factored(LohaChange),
        may=("hada_t1", "hada_t2"),
        rank=_rows("hada_w1_b"),
    ),
    "LoKr": Family(
        ((("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")), (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))),
        _factored(LokrChange),
        may=("lokr_t2",),
        rank=_lokr_rank,
    ),
    "GLoRA": Family(
        _needs("a1", "a2", "b1", "b2"),
        _factored(GloraChange),
        rank=lambda found: min(found["a1"].shape[:2], default=0),
    ),
    "IA3": Family(_needs("on_input", "ia3_weight"), _scaling),
    "IA3 of peft": Family(_needs("ia3_l"), _peft_scaling),
    "a full difference": Family(_needs("diff"), _difference("diff")),
    "a change of a norm": Family(_needs("w_norm"), _difference("w_norm")),
    "OFT": Family(_needs("oft_blocks"), _rotation, may=("rescale",)),
}
SETTINGS: tuple[Role, ...] = ("alpha", "scalar")  # of any family; alone they change nothing
FLAGS: tuple[Role, ...] = (*SETTINGS, "on_input")  # single numbers
MAGNITUDES: tuple[Role, ...] = ("dora_scale", "magnitude")  # DoRA, on top of another family
BIASES: tuple[Role, ...] = ("diff_b", "b_norm", "up_bias")


def family_of(path: str, found: Found) -> Family | None:
    """Return a layer's family, all of whose tensors are there; None if only its bias is changed.

    Raises ValueError, naming the layer, for tensors that are missing, or that do not belong together.
    """
    own = found.keys() - {*SETTINGS, *MAGNITUDES, *BIASES}
    names = [name for name, family in FAMILIES.items() if own & family.roles]
    if len(names) > 1:
        raise ValueError(f"layer {path} is both {names[0]} and {names[1]}: not supported")
    magnitudes = [role for role in MAGNITUDES if role in found]
    if len(magnitudes) > 1 or (magnitudes and not names):
        raise ValueError(f"layer {path} has {' and '.join(magnitudes)} (DoRA), expected one and a LoRA: get it again")
    if not names and "up_bias" in found:
        raise ValueError(f"layer {path} has no up: get the file again")
    if not names:
        return None
    family, lost = FAMILIES[names[0]], set[Role]()
    for needs in family.needs:
        begun = [roles for roles in needs if own & {*roles}] or [needs[0]]
        if len(begun) > 1:
            raise ValueError(f"layer {path} has both {begun[0][0]} and {begun[1][0]}: get the file again")
        lost |= {*begun[0]} - own
    if lost:
        raise ValueError(f"layer {path} has no {' and no '.join(sorted(lost))}: get the file again")
    return family


def changes_of(family: Family | None, place: Place, found: Found, scale: Scale) -> Iterator[LayerChange]:
    """Build the changes of one layer from its tensors: of its weight, and of its bias."""
    if family is not None:
        wanted = family.roles if family.rank else {*family.roles, "alpha"}  # OFT's alpha is a constraint
        first, *others = family.build(place, {role: tensor for role, tensor in found.items() if role in wanted}, scale)
        magnitude = found.get("dora_scale")
        if "magnitude" in found:  # peft's of a convolution is 1 x o x 1 x 1
            magnitude = found["magnitude"].flatten()
        yield first if magnitude is None else DoraChange(*place[:2], first, magnitude)
        yield from others
    for role in [role for role in BIASES if role in found]:
        by = scale.factor if role == "up_bias" else 1.0
        yield Difference(*place[:2], {"diff": found[role]}, by, parameter="bias")


def is_nothing(change: LayerChange) -> bool:
    """Return whether a change of a bias is none if the layer has no bias: it scales it, or adds zero."""
    return isinstance(change, ScalingChange) or not any(
        tensor.count_nonzero() for tensor in getattr(change, "factors", {}).values()
    )
