"""Settings that cannot be are refused with a remedy; DeepSpeed's follow from ours."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ldm.training.engine.config import EngineConfig, OptimConfig, deepspeed_settings, resolved_precision


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"clip": -0.5}, "engine.clip is -0.5, expected a norm above 0, or 0 for none"),
        ({"clip": math.nan}, "engine.clip is nan, expected a norm above 0"),
        ({"accumulation": 0}, "engine.accumulation must be at least 1, not 0"),
        ({"threads": 0}, "engine.threads must be at least 1, not 0"),
        ({"hang_seconds": 0.0}, "engine.hang_seconds must be above 0, not 0.0"),
        ({"hang_seconds": math.nan}, "engine.hang_seconds must be above 0, not nan"),
        (
            {"offload": "optimizer"},
            "engine.offload is optimizer, which needs engine.zero_stage 1 or more, not 0: raise it, or set offload to",
        ),
        (
            {"offload": "parameters", "zero_stage": 2},
            "engine.offload is parameters, which needs engine.zero_stage 3 or more, not 2: raise it, or set offload to",
        ),
        ({"compile": True, "zero_stage": 3}, "engine.compile does not support engine.zero_stage 3, .*: use 2"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(settings: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        EngineConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip": 0.0},
        *({"offload": "optimizer", "zero_stage": stage} for stage in (1, 2, 3)),
        {"offload": "parameters", "zero_stage": 3},
        *({"compile": True, "zero_stage": stage} for stage in (0, 1, 2)),
    ],
)
def test_an_engine_that_can_be_is_not(settings: dict[str, Any]):
    EngineConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"ema_lengths": (0.1, 0.05, 0.1)}, r"optim.ema_lengths names a length twice: \(0.1, 0.05, 0.1\)"),
        ({"ema_lengths": (0.9,)}, "0.9"),
        ({"ema_decay": 1.5}, "1.5"),
        ({"muon_momentum": 1.0}, "optim.muon_momentum must be at least 0 and below 1, not 1.0"),
        ({"muon_momentum": math.nan}, "optim.muon_momentum must be at least 0 and below 1, not nan"),
        ({"lr": 0.0}, "above 0, not 0.0"),
    ],
)
def test_an_optimiser_that_cannot_be_is_refused(settings: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        OptimConfig(**{"lr": 1e-3, **settings})


def settings_of(*, batch_size: int = 64, ranks: int = 1, precision: Any = "fp32", **settings: Any) -> dict[str, Any]:
    return deepspeed_settings(EngineConfig(**settings), batch_size=batch_size, ranks=ranks, precision=precision)


@pytest.mark.parametrize("stage", range(4))
def test_the_stage_and_the_clip_are_passed_on(stage: Any):
    found = settings_of(zero_stage=stage, clip=0.5)
    assert found["zero_optimization"] == {"stage": stage}
    assert found["gradient_clipping"] == (0.5 if stage > 0 else 0.0)  # under ZeRO 0 the engine clips


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_a_batch_is_that_of_all_ranks_and_parts_together(ranks: int, accumulation: int):
    found = settings_of(batch_size=64, ranks=ranks, accumulation=accumulation)
    part, parts = found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]
    assert found["train_batch_size"] == part * parts * ranks == 64 and parts == accumulation


@pytest.mark.parametrize(("ranks", "accumulation"), [(3, 1), (1, 3), (4, 32)])
def test_a_batch_that_cannot_be_cut_is_refused(ranks: int, accumulation: int):
    told = (
        rf"data.batch_size \(64\) is not a multiple of the {ranks} ranks times engine.accumulation \({accumulation}\): "
        "choose one that is"
    )
    with pytest.raises(ValueError, match=told):
        settings_of(batch_size=64, ranks=ranks, accumulation=accumulation)


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("fp32", {"enabled": False, "dtype": "float32"}),
        ("bf16", {"enabled": True, "dtype": "bfloat16"}),
        ("fp16", {"enabled": True, "dtype": "float16"}),
    ],
)
def test_weights_stay_as_they_are_and_autocast_is_of_the_precision(precision: str, expected: dict[str, Any]):
    found = settings_of(precision=precision)
    assert found["torch_autocast"] == expected
    assert not {"fp16", "bf16"} & found.keys()


def test_offloading_says_what_goes_to_the_cpu():
    kept = settings_of(zero_stage=3)["zero_optimization"]
    optimizer = settings_of(zero_stage=3, offload="optimizer")["zero_optimization"]
    parameters = settings_of(zero_stage=3, offload="parameters")["zero_optimization"]
    assert not any(key.startswith("offload") for key in kept)
    assert optimizer.keys() - kept.keys() == {"offload_optimizer"}
    assert parameters.keys() - kept.keys() == {"offload_optimizer", "offload_param"}
    assert settings_of()["zero_force_ds_cpu_optimizer"] is False  # or DeepSpeed refuses any other than its own
    assert parameters["offload_param"]["device"] == optimizer["offload_optimizer"]["device"] == "cpu"


def test_equal_settings_give_equal_ones_that_nobody_shares():
    """DeepSpeed writes into what it is given."""
    first, second = settings_of(zero_stage=2), settings_of(zero_stage=2)
    assert first == second
    first["zero_optimization"]["stage"] = 0
    assert second["zero_optimization"]["stage"] == 2


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch) -> Any:
    def pretend(*, avx512: bool = False, amx: bool = False, gpu: bool = False) -> None:
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx512)
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: gpu)

    return pretend


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "has", "expected"),
    [
        (CPU, {}, "fp32"),
        (CPU, {"gpu": True}, "fp32"),
        (CPU, {"avx512": True}, "bf16"),
        (CPU, {"amx": True}, "bf16"),
        (GPU, {"avx512": True, "amx": True}, "fp16"),
        (GPU, {"gpu": True}, "bf16"),
    ],
)
def test_auto_is_bf16_where_the_hardware_has_it(hardware: Any, device: torch.device, has: dict, expected: str):
    hardware(**has)
    assert resolved_precision("auto", device) == expected


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_what_is_asked_for_is_given(hardware: Any, precision: Any):
    hardware()
    assert resolved_precision(precision, CPU) == precision  # slowly, if need be
    hardware(gpu=True)
    assert resolved_precision(precision, GPU) == precision


def test_bf16_on_a_gpu_that_has_none_is_refused(hardware: Any):
    hardware(avx512=True)
    with pytest.raises(ValueError, match="engine.precision is bf16, which this GPU does not support: use fp16 or fp32"):
        resolved_precision("bf16", GPU)
    assert resolved_precision("fp16", GPU) == "fp16"
