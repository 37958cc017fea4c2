"""What the engine and its optimiser are told, and DeepSpeed's own settings, which follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from ldm.training.optim.ema import WarmedUp
from ldm.training.optim.lr_schedule import LRConfig
from ldm.training.optim.power_profile import PowerProfile

Precision = Literal["auto", "bf16", "fp16", "fp32"]
Resolved = Literal["bf16", "fp16", "fp32"]
DTYPES: dict[Resolved, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    zero_stage: Literal[0, 1, 2, 3] = 0  # 1 shards the optimiser, 2 also gradients, 3 also weights
    precision: Precision = "auto"  # of the forward pass; auto: bf16 where the hardware has it
    clip: float = 1.0  # largest norm of the gradient; 0 leaves it as it is
    accumulation: int = 1  # parts that a rank's share of a batch is cut into, to need less memory
    offload: Literal["none", "optimizer", "parameters"] = "none"  # to the CPU's memory; parameters: the optimiser too
    recompute: bool = False  # activations in the backward pass, a block at a time: a third more time, far less memory
    compile: bool = False  # the network by torch.compile
    save_in_background: bool = True  # checkpoints are written while training goes on, from a copy in memory
    hang_seconds: float = 300.0  # a rank that neither moves nor answers for so long has hung: all stop

    def __post_init__(self) -> None:
        if not self.clip >= 0:
            raise ValueError(f"engine.clip is {self.clip}, expected a norm above 0, or 0 for none")
        if self.accumulation < 1:
            raise ValueError(f"engine.accumulation must be at least 1, not {self.accumulation}")
        if not self.hang_seconds > 0:
            raise ValueError(f"engine.hang_seconds must be above 0, not {self.hang_seconds}")
        needed = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(
                f"engine.offload is {self.offload}, which needs engine.zero_stage {needed} or more, not "
                f"{self.zero_stage}: raise it, or set offload to none"
            )
        if self.compile and self.zero_stage == 3:
            raise ValueError("engine.compile does not go with engine.zero_stage 3, which cuts up weights: use 2")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(LRConfig):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) or, for linear layers, Muon; and the average of the weights.

    muon: the momentum of each linear layer's weight is made orthogonal, and scaled to the size of AdamW's steps
    (Jordan et al. 2024, Liu et al. 2025, arXiv 2502.16982): one lr serves both. All other weights are AdamW's.
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    muon_momentum: float = 0.95  # read by muon alone
    ema_decay: float = 0.999
    # Relative lengths of averages whose snapshots any other length can be reconstructed from (0.05 and 0.1 are usual).
    ema_lengths: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.ema_lengths)) < len(self.ema_lengths):
            raise ValueError(f"optim.ema_lengths names a length twice: {self.ema_lengths}")
        if not 0 <= self.muon_momentum < 1:
            raise ValueError(f"optim.muon_momentum must be at least 0 and below 1, not {self.muon_momentum}")
        WarmedUp(self.ema_decay)
        for length in self.ema_lengths:
            PowerProfile(length)


def resolved_precision(precision: Precision, device: torch.device) -> Resolved:
    """What the forward pass runs in. Raises ValueError if bf16 is asked for on a GPU that has none."""
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if precision == "bf16" and device.type == "cuda" and not able:
        raise ValueError("engine.precision is bf16 but this GPU has none: use fp16 or fp32")
    if precision == "auto":
        return "bf16" if able else "fp32"
    return precision


def deepspeed_settings(config: EngineConfig, *, batch_size: int, ranks: int, precision: Resolved) -> dict[str, Any]:
    """DeepSpeed's own settings, derived: nothing in them is written a second time elsewhere."""
    parts = ranks * config.accumulation
    if batch_size % parts:
        raise ValueError(
            f"data.batch_size ({batch_size}) is not a multiple of the {ranks} ranks times engine.accumulation "
            f"({config.accumulation}): choose one that is"
        )
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": batch_size // parts,
        "gradient_accumulation_steps": config.accumulation,
        "zero_optimization": zero,
        # PyTorch's fused AdamW is as fast as DeepSpeed's for the CPU, whose rounding depends on what came before it.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,  # Muon is ours, and tested
        "gradient_clipping": config.clip if config.zero_stage > 0 else 0.0,  # under ZeRO 0 the engine does it
        "torch_autocast": {"enabled": precision != "fp32", "dtype": str(DTYPES[precision]).removeprefix("torch.")},
        "steps_per_print": 10**9,  # progress is ours to print
    }
