"""Copy remote files to this machine, with retries and timeouts; only complete files get their name."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from data.sources import PIPE, MissingPackageError, Source, file_system, short
from ldm.errors import DataError
from ldm.files.atomic import PARTIAL, atomic_file

CACHED = re.compile(r"[0-9a-f]{64}\.shard")
COPYING = re.compile(rf"\.{CACHED.pattern}\.[0-9a-f]{{32}}{re.escape(PARTIAL)}")  # the name while it is written
ABANDONED_AFTER = 3600.0  # seconds since the last write to a partial file
ABSENT = (403, 404, 410)  # a bucket without list permission answers 403 for a missing file


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How often and how long to try a location."""

    tries: int = 3
    timeout: float = 30.0  # seconds without new data
    pause: float = 1.0  # seconds before the second try, four times as long before each later one


PATIENCE = Patience()


class Absent(Exception):
    """The file does not exist: retrying is pointless."""


class Cache:
    """Copies of remote shards in a folder; above `most` bytes, the least recently used ones are removed.

    The `keep` most recently used always stay. A folder of None is a temporary one, removed with this object. Threads
    and processes may share a folder: a copy gets its name, a digest of the location, only when complete.
    """

    def __init__(self, folder: Path | None, *, most: int, keep: int, patience: Patience = PATIENCE) -> None:
        self.most, self.keep, self.patience = most, keep, patience
        self._temporary = tempfile.TemporaryDirectory(prefix="shards-") if folder is None else None
        self.folder = Path(self._temporary.name) if self._temporary is not None else folder or Path()
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            with suppress(OSError):
                if COPYING.fullmatch(path.name) and time.time() - path.stat().st_mtime > ABANDONED_AFTER:
                    path.unlink()

    def path(self, source: Source) -> Path:
        return self.folder / f"{sha256(source.location.encode()).hexdigest()}.shard"

    def get(self, source: Source, size: int | None = None) -> Path:
        """Return the path of a complete copy, downloading it if needed; size: bytes, if known. Raises DataError."""
        path = self.path(source)
        if not (path.exists() and size in (None, path.stat().st_size)):
            with_tries(lambda: self._copy(source, path, size), source, self.patience)
            self._make_room()
        with suppress(OSError):  # another process may have just removed it: then opening it fails
            os.utime(path)
        return path

    def drop(self, source: Source) -> None:
        self.path(source).unlink(missing_ok=True)

    def _copy(self, source: Source, path: Path, size: int | None) -> None:
        with atomic_file(path) as partial:
            copy(source, partial, self.patience.timeout)
            if size not in (None, partial.stat().st_size):
                raise OSError(f"{partial.stat().st_size:,} bytes received, expected {size:,}")

    def _make_room(self) -> None:
        found: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            with suppress(OSError):
                if CACHED.fullmatch(path.name):
                    found.append((path.stat().st_mtime, path.stat().st_size, path))
        found.sort(reverse=True)
        used = sum(size for _, size, _ in found)
        for _, size, path in reversed(found[self.keep :]):
            if used > self.most:
                path.unlink(missing_ok=True)
                used -= size


def read_text(source: Source, patience: Patience = PATIENCE) -> str | None:
    """Read a small text file; None if it does not exist. Raises DataError if the location cannot be reached."""
    if source.is_local:
        path = Path(source.location)
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text"
        try:
            with_tries(lambda: copy(source, path, patience.timeout), source, patience)
        except Absent:
            return None
        return path.read_text(encoding="utf-8", errors="replace")


def with_tries(work: Callable[[], None], source: Source, patience: Patience) -> None:
    """Run `work`, retrying after a pause on failure. Raises DataError after the last try, Absent at once."""
    for number in range(patience.tries):
        try:
            return work()
        except (Absent, MissingPackageError):
            raise
        except Exception as error:  # each protocol's package raises its own errors
            if number + 1 == patience.tries:
                why = source.without_secrets(short(error))
                raise DataError(
                    f"{source.shown} cannot be read, in {patience.tries} tries ({why}): check that it can be reached"
                ) from error
            time.sleep(patience.pause * 4**number)


def copy(source: Source, path: Path, timeout: float) -> None:
    """Try once. Raises Absent, TimeoutError after `timeout` seconds without data, and the protocol's own errors."""
    if source.is_pipe:
        _run(source.location.removeprefix(PIPE), path, timeout)
    else:
        _download(source, path, timeout)


def _download(source: Source, path: Path, timeout: float) -> None:
    failed: list[Exception] = []
    files, remote = file_system(source, timeout=timeout)

    def work() -> None:
        try:
            files.get_file(remote, str(path))
        except Exception as error:
            failed.append(error)

    # In a thread that may be left running, because some protocols cannot interrupt a read.
    thread = threading.Thread(target=work, daemon=True, name="download")
    thread.start()

    def ended(seconds: float) -> bool:
        thread.join(seconds)
        return not thread.is_alive()

    _watch(path, ended, timeout)
    if failed:
        status = getattr(failed[0], "status", None)
        if isinstance(failed[0], (FileNotFoundError, PermissionError)) or status in ABSENT:
            raise Absent(source.without_secrets(short(failed[0]))) from failed[0]
        raise failed[0]


def _run(command: str, path: Path, timeout: float) -> None:
    with path.open("wb") as out, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=errors,
            start_new_session=True,  # so that its child processes can be killed with it
        )

        def ended(seconds: float) -> bool:
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            return process.returncode is not None

        try:
            _watch(path, ended, timeout)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode:
            errors.seek(0)
            last = errors.read(1 << 16).decode(errors="replace").strip().rpartition("\n")[2]
            raise OSError(f"the command ended with code {process.returncode}: {last}")


def _watch(path: Path, ended: Callable[[float], bool], timeout: float) -> None:
    """Wait for the end of a copy. Raises TimeoutError if the file does not grow for `timeout` seconds."""
    size, since = -1, time.monotonic()
    while not ended(min(0.5, timeout / 4)):
        now = path.stat().st_size if path.exists() else -1
        if now != size:
            size, since = now, time.monotonic()
        elif time.monotonic() - since > timeout:
            raise TimeoutError(f"no data received for {timeout:g} s")
