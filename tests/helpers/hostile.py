"""What the tests of broken, wrong and malicious files share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

Tensors = dict[str, Tensor]
UNET = "model.diffusion_model."
KEY = f"{UNET}out.2.weight"
MEMORY = 2**28  # bytes that refusing a file may take at most


def peak(*, reset: bool = False) -> int:
    """The most memory that this process has taken since the last reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def assert_refused(load: Callable[[], object], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = peak(reset=True)
    with pytest.raises((ValueError, OSError)) as caught:
        load()
    message = str(caught.value)
    assert told in message
    assert "\n" not in message and len(message) < 1200
    assert peak() - before < MEMORY
    assert capsys.readouterr().out == ""


LAUGHS = "a: &a [x, x, x]\n" + "".join(
    f"{c}: &{c} [{', '.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)


def copied(folder: Path, to: Path) -> Path:
    """A copy whose weights are links."""
    for path in folder.rglob("*"):
        target = to / "copy" / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            target.symlink_to(path) if path.suffix == ".safetensors" else target.write_bytes(path.read_bytes())
    return to / "copy"


def edit(path: Path, **change: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def replaced(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)
