"""Settings of the engine and its optimiser, and DeepSpeed's own settings, which are derived from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from ldm.model.precision import Precision, choose_precision, dtype_of, is_auto, precision_named
from ldm.training.optim.averages import PowerProfile, WarmedUp
from ldm.training.optim.lr_schedule import LRConfig


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    zero_stage: Literal[0, 1, 2, 3] = 0  # 1 shards the optimiser, 2 also gradients, 3 also weights
    # Of the forward pass: fp32, bf16 or fp16, or another name of one; auto: bf16 where the hardware has it, fp16 on
    # older CUDA cards, else fp32.
    precision: str = "auto"
    clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    accumulation: int = 1  # gradient accumulation: number of parts of a rank's batch, to need less memory
    offload: Literal["none", "optimizer", "parameters"] = "none"  # to CPU memory; parameters: optimiser state as well
    recompute: bool = False  # activation checkpointing of each block: a third more time, far less memory
    compile: bool = False  # the network by torch.compile; the first two steps may then take half an hour each
    # Of the CPU operations of each rank. None: what OMP_NUM_THREADS says, or the cores divided by the machine's ranks.
    threads: int | None = None
    save_in_background: bool = True  # write checkpoints from a staging buffer while training continues
    hang_seconds: float = 300.0  # a rank without progress or heartbeat for this long has hung: all ranks end

    def __post_init__(self) -> None:
        named = "auto" if is_auto(self.precision) else precision_named(self.precision, what="engine.precision")
        object.__setattr__(self, "precision", named)
        if not self.clip >= 0:
            raise ValueError(f"engine.clip is {self.clip}, expected a norm above 0, or 0 for none")
        if self.accumulation < 1:
            raise ValueError(f"engine.accumulation must be at least 1, not {self.accumulation}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"engine.threads must be at least 1, not {self.threads}")
        if not self.hang_seconds > 0:
            raise ValueError(f"engine.hang_seconds must be above 0, not {self.hang_seconds}")
        needed = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(
                f"engine.offload is {self.offload}, which needs engine.zero_stage {needed} or more, not "
                f"{self.zero_stage}: raise it, or set offload to none"
            )
        if self.compile and self.zero_stage == 3:
            raise ValueError("engine.compile does not support engine.zero_stage 3, which shards weights: use 2")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(LRConfig):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) or, for linear layers, Muon; and averages of the weights.

    muon: orthogonalise the momentum of each linear layer's weight, and scale it to the size of AdamW's steps, so that
    one lr serves both (Jordan et al. 2024, Liu et al. 2025, arXiv 2502.16982). All other weights use AdamW.
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0  # of the weights of linear layers and convolutions
    muon_momentum: float = 0.95  # used only by muon
    ema_decay: float = 0.999
    # Relative lengths of averages to keep snapshots of, from which any other length can be reconstructed (usually 0.05
    # and 0.1).
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


def resolved_precision(precision: str, device: torch.device) -> Precision:
    """Return the precision of the forward pass. Raises ValueError for bf16 on a GPU that does not support it."""
    return choose_precision(precision, device, training=True, what="engine.precision")


def deepspeed_settings(config: EngineConfig, *, batch_size: int, ranks: int, precision: Precision) -> dict[str, Any]:
    """Derive DeepSpeed's own settings, so that no setting has to be given twice."""
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
        # PyTorch's fused AdamW is as fast as DeepSpeed's CPU optimiser, whose rounding depends on earlier calls.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,  # for our Muon, which has tests
        "gradient_clipping": config.clip if config.zero_stage > 0 else 0.0,  # under ZeRO 0 our engine clips
        "torch_autocast": {"enabled": precision != "fp32", "dtype": str(dtype_of(precision)).removeprefix("torch.")},
        "steps_per_print": 10**9,  # the training loop prints progress
    }
