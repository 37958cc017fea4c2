"""Run a command of the repository and record which of our modules call which: `python walking.py OUT SCRIPT WORDS`."""

from __future__ import annotations

import inspect
import json
import runpy
import sys
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ("vae", "text", "data", "ldm")


class Calls:
    """Pairs of modules, in the order of their first call. Of one call only the nearest of our modules is the caller:
    what stands between, such as torch's Module.__call__, is left out."""

    def __init__(self) -> None:
        self.pairs: dict[tuple[str, str], str] = {}  # and the function that is called
        self._names: dict[str, str | None] = {}

    def module(self, frame: FrameType) -> str | None:
        """Name the module of ours that a frame runs in; None for others."""
        file = frame.f_code.co_filename
        if file not in self._names:
            path = Path(file)
            inside = path.is_relative_to(ROOT) and path.suffix == ".py"
            parts = path.relative_to(ROOT).with_suffix("").parts if inside else ()
            ours = len(parts) > 1 and parts[0] in PACKAGES or parts in (("txt2img",), ("latent_foundry",))
            self._names[file] = ".".join(parts).removesuffix(".__init__") if ours else None
        return self._names[file]

    def record(self, frame: FrameType, event: str, _: Any) -> None:
        callee = self.module(frame) if event == "call" else None
        if callee is None or not frame.f_code.co_flags & inspect.CO_OPTIMIZED:  # a module's or a class's body
            return
        caller = frame.f_back
        while caller is not None and self.module(caller) is None:
            caller = caller.f_back
        if caller is None or not caller.f_code.co_flags & inspect.CO_OPTIMIZED:
            return
        name = self.module(caller)
        assert name is not None
        if name != callee:
            self.pairs.setdefault((name, callee), frame.f_code.co_qualname)


def main(out: str, script: str, *words: str) -> None:
    calls = Calls()
    sys.argv = [script, *words]
    sys.path.insert(0, str((ROOT / script).parent))
    sys.path.insert(0, str(ROOT))
    sys.setprofile(calls.record)
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as exit:
        assert not exit.code, exit.code
    finally:
        sys.setprofile(None)
        Path(out).write_text(json.dumps([[*pair, function] for pair, function in calls.pairs.items()]))


if __name__ == "__main__":
    main(*sys.argv[1:])
