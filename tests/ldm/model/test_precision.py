"""One rule for the precision, asked of a card that the tests simulate; and the names that precisions go by."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch

from ldm.model.precision import NAMES, choose_precision, dtype_of, of_autoencoder, precision_named
from ldm.training.engine.config import EngineConfig, resolved_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Simulates a card: an older one emulates bf16, so that it is supported unless emulation is excluded."""

    def pretend(*, native: bool) -> None:
        monkeypatch.setattr(
            "torch.cuda.is_bf16_supported", lambda including_emulation=True: native or including_emulation
        )

    return pretend


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
def test_a_card_is_asked_by_drawing_and_training_alike(card: Any, native: bool, expected: Any):
    card(native=native)
    assert choose_precision("auto", GPU) == resolved_precision("auto", GPU) == expected
    assert choose_precision("auto", torch.device("cuda")) == expected


def test_the_card_that_is_used_is_asked_and_not_the_first(monkeypatch: pytest.MonkeyPatch):
    cards, at = [True, False], [0]

    @contextlib.contextmanager
    def using(device: torch.device):
        at.append(device.index)
        yield
        at.pop()

    monkeypatch.setattr("torch.cuda.device", using)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: cards[at[-1]])
    assert [choose_precision("auto", torch.device("cuda", i)) for i in range(2)] == ["bf16", "fp16"]


def test_other_devices_are_in_fp32_unless_asked():
    other = torch.device("mps")
    assert choose_precision("auto", other) == choose_precision("auto", other, training=True) == "fp32"
    assert choose_precision("half", other) == "fp16"


def test_a_cpu_draws_in_fp32_and_in_bf16_on_request(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    assert choose_precision("auto", CPU) == "fp32" and choose_precision("auto", CPU, training=True) == "bf16"
    assert choose_precision(torch.bfloat16, CPU) == choose_precision("bf16", CPU) == "bf16"


@pytest.mark.parametrize("name", ["fp16", "half", torch.float16])
def test_fp16_on_a_cpu_is_refused_and_the_remedies_work(name: Any):
    with pytest.raises(
        ValueError, match="^dtype is fp16, which is for GPUs, but the device is a CPU: use fp32 or bf16$"
    ):
        choose_precision(name, CPU)
    assert [choose_precision(remedy, CPU) for remedy in ("fp32", "bf16")] == ["fp32", "bf16"]


def test_bf16_on_an_older_card_is_refused_and_the_remedies_work(card: Any):
    card(native=False)
    with pytest.raises(ValueError, match="dtype is bf16, which this GPU does not support: use fp16 or fp32"):
        choose_precision("bfloat16", GPU)
    assert [choose_precision(remedy, GPU) for remedy in ("fp16", "fp32")] == ["fp16", "fp32"]


def test_every_name_is_understood_in_any_spelling():
    for precision, others in NAMES.items():
        for name in (precision, *others):
            spellings = [name, name.upper(), f" {name} ", f"torch.{name}"]
            assert [precision_named(spelling) for spelling in spellings] == [precision] * 4
            assert EngineConfig(precision=name) == EngineConfig(precision=precision)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert dtype_of(precision_named(dtype)) == dtype
    assert precision_named(np.dtype("float16")) == "fp16"


@pytest.mark.parametrize("given", ["int8", "", "fp8", torch.int8, 7, None, torch.float64])
def test_other_names_are_refused_with_all_that_there_are(given: Any):
    with pytest.raises(
        ValueError, match=r"^dtype is '.*', expected fp32 \(float32, .*full.*\), bf16 .*, fp16 \(.*half\)$"
    ):
        precision_named(given)


def test_the_autoencoder_of_a_model_in_fp16_is_in_fp32():
    assert [of_autoencoder(precision) for precision in NAMES] == ["fp32", "bf16", "fp32"]
