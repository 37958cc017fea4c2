"""Start trainings of a tiny model, in processes forked from one that has everything imported, to inject faults.

A start takes two seconds instead of fifteen, so that hundreds of faults fit into an hour on two cores. They run
ldm/train.py's own main, on DeepSpeed, on the embedded pictures.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.forking import free_port

ROOT = Path(__file__).parents[1]
PEER_ERROR = 5
TINY = """
data.shards=data/emoji64/train/0000{0..3}.tar.gz data.batch_size=8 data.lanes=2 data.prefetch=1
model.denoiser.depth=1 model.denoiser.width=32 model.denoiser.heads=2
preview.steps=1 preview.pictures=1 preview.prompts=[a]
optim.ema_lengths=[0.1] run.snapshot_every=100000
run.steps=60 run.log_every=5 run.checkpoint_every=5 run.sample_every=100000
engine.precision=fp32 engine.hang_seconds=6
""".split()


def import_everything() -> None:
    """Import all that a training imports, without starting threads, which a fork would not copy."""
    import torch

    torch.set_num_threads(1)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401
    import open_clip  # noqa: F401
    import transformers.models.clip.modeling_clip  # noqa: F401

    import ldm.inference.pipeline
    import ldm.training.loop  # noqa: F401


def few_pictures(folder: Path) -> None:
    """Write a small validation set, so that a run spends its time on training and saving."""
    from data.shards import Shard
    from data.write import write_shards

    shard = Shard(ROOT / "data/emoji64/val/00000.tar.gz")
    raw = [shard[index].members for index in range(8)]
    write_shards([(one["webp"], one["txt"].decode(), {}) for one in raw], folder / "few", shards=1)


@dataclass
class Job:
    """The processes of one training, by rank."""

    pids: list[int]
    log: Path

    def __post_init__(self) -> None:
        self.codes: list[int | None] = [None] * len(self.pids)

    def kill(self, rank: int, number: int) -> None:
        try:
            os.kill(self.pids[rank], number)
        except ProcessLookupError:  # it was faster
            pass

    def wait(self, seconds: float) -> list[int | None]:
        """Return each rank's exit code, -9 for one that was killed; None for one that still runs after so long."""
        end = time.monotonic() + seconds
        while True:
            for rank, pid in enumerate(self.pids):
                if self.codes[rank] is None:
                    found, status = os.waitpid(pid, os.WNOHANG)
                    self.codes[rank] = os.waitstatus_to_exitcode(status) if found else None
            if None not in self.codes or time.monotonic() > end:
                return list(self.codes)
            time.sleep(0.01)

    def end(self) -> None:
        """End the processes that are left."""
        for rank, code in enumerate(self.wait(0)):
            if code is None:
                self.kill(rank, signal.SIGKILL)
        self.wait(10)


def start(folder: Path, name: str, *, ranks: int, words: list[str], before: Any = None) -> Job:
    """Fork a training. before(rank): called in each child first, to inject a fault."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "few").exists():
        few_pictures(folder)
    words = [f"validation.shards={folder / 'few/00000.tar.gz'}", *words]
    log, port, pids = folder / f"{name}.log", free_port(), []
    sys.stdout.flush()
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _child(rank, ranks, port, log, [f"run.name={name}", f"run.folder={folder}", *words], before)
        pids.append(pid)
    return Job(pids, log)


def _child(rank: int, ranks: int, port: str, log: Path, words: list[str], before: Any) -> None:
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(ROOT)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": port}
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        from ldm.cli import run_command, training_arguments
        from ldm.train import main

        note_order(log.with_suffix(""))
        if before is not None:
            before(rank)
        code = run_command(main, training_arguments(""), ["--config", "configs/demo.yaml", *TINY, *words])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def order_file(run: Path, ranks: int, rank: int) -> Path:
    """Where a rank records which samples its steps use: next to the run, whose own disk may fail."""
    return run.with_name(f"{run.name}.order_{ranks}_{rank}.txt")


def note_order(run: Path) -> None:
    """Let each rank record which samples its steps use, before it uses them."""
    from ldm.training.loop import Training

    plain = Training._parts

    def noting(self: Training, batch: Any) -> Any:
        with order_file(run, self.world.ranks, self.world.rank).open("a") as file:
            file.write(f"{self.engine.position} {' '.join(batch.keys)}\n")
        return plain(self, batch)

    Training._parts = noting


def order(run: Path, ranks: int) -> dict[int, list[str]]:
    """Return the samples of each global batch, as they were last used."""
    found: dict[int, list[str]] = {}
    for rank in range(ranks):
        own: dict[int, list[str]] = {}
        for line in order_file(run, ranks, rank).read_text().splitlines():
            position, *keys = line.split()
            own[int(position)] = keys
        for position, keys in own.items():
            found.setdefault(position, []).extend(keys)
    return found


def final_state(run: Path) -> dict[str, str]:
    """Everything that a run ends with, as one sha256 each: weights, optimiser and averages; generators; counters and
    learning rate's position; the exported model."""
    from ldm.files.checkpoints import Checkpoints, fault
    from ldm.interop.fragments import Fragments

    newest = Checkpoints(run / "checkpoints", keep=1).all()[-1]
    assert fault(newest) is None, fault(newest)
    record = json.loads((newest / "state.json").read_text())
    record.pop("config")  # it names the run
    with Fragments(newest) as fragments:
        drawn = {key: fragments.whole(key).tolist() for key in fragments.keys() if key.startswith("generators/")}
        state = fragments.digest()
    model = hashlib.sha256(next((run / "model/transformer").glob("*.safetensors")).read_bytes()).hexdigest()
    return {"state": state, "generators": _sha(drawn), "record": _sha(record), "model": model, "step": newest.name}


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
