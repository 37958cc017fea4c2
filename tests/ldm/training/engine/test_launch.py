"""What stands in the way when processes are to meet; a stand-in for DeepSpeed meets it."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from ldm.training.engine.launch import _join

TAKEN = "The server socket has failed to listen on any local network address. port: 7, name: EADDRINUSE"


@pytest.mark.parametrize(
    ("told", "error", "message"),
    [
        (TAKEN, ValueError, "port 7 is in use, perhaps by another training"),
        ("recvValue failed: Connection reset by peer", dist.DistNetworkError, "Connection reset by peer"),
    ],
)
def test_only_a_port_that_is_taken_is_called_so(
    told: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
):
    def init_distributed(*, verbose: bool) -> None:
        raise dist.DistNetworkError(told)

    logger = logging.getLogger("stand-in")
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(init_distributed=init_distributed))
    monkeypatch.setitem(sys.modules, "deepspeed.utils", SimpleNamespace(logger=logger))
    for name, value in {"MASTER_PORT": "7", "WORLD_SIZE": "2", "LOCAL_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(error, match=message):
        _join()
