"""Locations of shards: local paths, URLs and the output of shell commands."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast
from urllib.parse import urlsplit, urlunsplit

from ldm.errors import DataError
from ldm.files.messages import one_line
from ldm.files.paths import contents, user_path

PIPE = "pipe:"
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
WEB = ("http", "https")
ARCHIVE = re.compile(r"(?:^|[\s/'\"])([\w{}.,-]+\.(?:tar(?:\.gz)?|tgz))\b")
PACKAGES = {"s3": "s3fs", "http": "aiohttp", "https": "aiohttp", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs"}


class FileSystem(Protocol):
    """What is used of fsspec's file systems, which have no types."""

    def glob(self, path: str) -> list[str]: ...
    def unstrip_protocol(self, name: str) -> str: ...
    def get_file(self, rpath: str, lpath: str) -> None: ...


class MissingPackageError(ValueError):
    """The package for a protocol is not installed."""


@dataclass(frozen=True, slots=True)
class Source:
    """The location of a shard: a path, a URL, or pipe:COMMAND."""

    location: str
    absent: Literal["", "named", "counted"] = ""  # known not to exist, and by what: a path, or a manifest and a glob

    @property
    def is_pipe(self) -> bool:
        return self.location.startswith(PIPE)

    @property
    def is_local(self) -> bool:
        return not self.is_pipe and URL.match(self.location) is None

    @property
    def protocol(self) -> str:
        return self.location.partition("://")[0].lower()

    @property
    def name(self) -> str:
        """The file name; for a pipe the full location."""
        if self.is_pipe:
            return self.location
        return (self.location if self.is_local else self._url_path).rpartition("/")[2]

    @property
    def shown(self) -> str:
        """The location without what may be secret: a URL's user, password and query, and of a pipe all but the names of
        the archives in its command."""
        if self.is_pipe:
            names = ARCHIVE.findall(self.location)
            return f"a pipe ({', '.join(names)})" if names else "a pipe"
        if self.is_local:
            return self.location
        parts = urlsplit(self.location)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], self._url_path, "", ""))

    def without_secrets(self, text: str) -> str:
        """Remove from a text, such as an error message, the parts of the location that `shown` omits."""
        if self.is_pipe:
            return text.replace(self.location.removeprefix(PIPE), "COMMAND")
        if self.is_local:
            return text
        parts = urlsplit(self.location)
        for secret in (self.location, f"?{parts.query}" if parts.query else "", parts.password or ""):
            text = text.replace(secret, self.shown if secret == self.location else "") if secret else text
        return text

    def beside(self, name: str) -> Source | None:
        """Locate another file in the same folder; None for a pipe."""
        if self.is_pipe:
            return None
        if self.is_local:
            return Source(str(Path(self.location).parent / name))
        if self.protocol not in WEB:
            return Source(f"{self.location.rpartition('/')[0]}/{name}")
        parts = urlsplit(self.location)
        folder = self._url_path.rpartition("/")[0]
        return Source(urlunsplit((parts.scheme, parts.netloc, f"{folder}/{name}", parts.query, "")))

    @property
    def _url_path(self) -> str:
        """The path of a URL, over HTTP without the query; with other protocols ? and # may be part of a name."""
        parts = urlsplit(self.location)
        if self.protocol in WEB:
            return parts.path
        return self.location.partition("://")[2].removeprefix(parts.netloc)


def expand(
    patterns: str | Sequence[str],
    *,
    allow_pipe: bool = False,
    counted: Callable[[str], Sequence[str]] = lambda pattern: (),
    gaps: bool = False,
) -> list[Source]:
    """List the shards named by paths, brace ranges ("{00000..00007}.tar"), globs or a list of these, in a fixed order.

    A path that exists as it is written is that file, whatever it looks like; ~ is the home folder. counted(glob): the
    locations that a manifest counts and that the glob matches; those that do not exist are `absent`, as are, with
    `gaps`, paths without a file. Raises DataError for a pattern that matches no file; ValueError for a pipe that is not
    allowed, and for a URL whose protocol needs a package that is not installed.
    """
    found: list[Source] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for name in _without_braces(pattern):
            own = _matching(name, allow_pipe=allow_pipe, counted=counted)
            if not own or (own[0].absent and not gaps and not counted(own[0].location)):
                shown, given = Source(name).shown, Source(pattern).shown
                raise DataError(f"no shard matches {shown!r} (from {given!r}): {_what_to_give(name)}")
            found.extend(own)
    if all(source.absent for source in found):
        raise DataError(f"no shard matches {patterns!r}: {_what_to_give(found[0].location if found else '')}")
    return found


def _without_braces(pattern: str) -> list[str]:
    import braceexpand

    if Source(pattern).is_local:
        pattern = str(user_path(pattern)) if pattern.startswith("~") else pattern
        if os.path.exists(pattern):  # unlike Path.exists, False for a name that is too long
            return [pattern]
        head = _existing_folder(pattern)
    else:
        head = ""
    try:
        return [head + name for name in braceexpand.braceexpand(pattern[len(head) :])]
    except ValueError as error:
        raise ValueError(f"{pattern!r} has a brace without its partner, and there is no such file: mend it") from error


def _existing_folder(path: str) -> str:
    """The longest beginning of a path that is a folder as it is written, with its slash."""
    ends = [at + 1 for at, character in enumerate(path) if character == "/"]
    return next((path[:end] for end in reversed(ends) if os.path.isdir(path[:end])), "")


def local_glob(pattern: str) -> list[str]:
    """List what a pattern matches, sorted; what exists in it as it is written is that file or folder."""
    if os.path.exists(pattern):
        return [pattern]
    head = _existing_folder(pattern)
    return sorted(glob.glob(glob.escape(head) + pattern[len(head) :]) or glob.glob(pattern))


def _matching(name: str, *, allow_pipe: bool, counted: Callable[[str], Sequence[str]]) -> list[Source]:
    source = Source(name)
    if source.is_pipe:
        if not allow_pipe:
            raise ValueError(f"{source.shown} runs a shell command: set data.allow_pipe=true if that is intended")
        return [source]
    if source.is_local and os.path.exists(name):
        return [source]
    if source.is_local and not glob.has_magic(name[len(_existing_folder(name)) :]):
        return [Source(name, absent="named")]
    if source.is_local:
        return _with_absent(local_glob(name), counted(name))
    wild = r"[*\[]" if source.protocol in WEB else r"[*?\[]"  # in HTTP URLs ? begins the query
    files, path = file_system(source)
    if not re.search(wild, source.location):
        return [source]
    try:
        found = [files.unstrip_protocol(one) for one in sorted(files.glob(path))]
    except Exception as error:  # each protocol raises its own errors
        raise DataError(f"{source.shown} cannot be listed ({short(error)}): give a brace range instead") from error
    present = {Source(one).name for one in found}  # a protocol may write the rest of a location in another way
    return _with_absent(found, [one for one in counted(name) if Source(one).name not in present])


def _with_absent(found: Sequence[str], counted: Sequence[str]) -> list[Source]:
    absent = set(counted) - set(found)
    return [Source(location, "counted" if location in absent else "") for location in sorted({*found, *absent})]


def _what_to_give(name: str) -> str:
    """Say what to give in place of a path or pattern that matches nothing."""
    folder = Path(name).parent
    if not Source(name).is_local or not folder.is_dir():
        return "give paths of .tar files"
    where = "the current folder" if folder == Path() else folder
    return f"{where} holds {contents(folder)}: give paths of .tar files"


def file_system(source: Source, *, timeout: float = 30.0) -> tuple[FileSystem, str]:
    """Open fsspec's file system for the protocol; returns it, and the path in it.

    Raises ValueError if the protocol is unknown or its package is missing.
    """
    from fsspec.core import url_to_fs  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    options: dict[str, Any] = {}
    try:
        if source.protocol in WEB:
            import aiohttp

            # aiohttp's default limit is five minutes per file, regardless of its speed.
            limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
            options = {"client_kwargs": {"timeout": limits}}
        return cast(tuple[FileSystem, str], url_to_fs(source.location, **options))
    except ImportError as error:
        package = PACKAGES.get(source.protocol, "fsspec's for it")
        raise MissingPackageError(
            f"{source.protocol}:// needs the package {package}: pip install {package}, or latent-foundry[remote]"
        ) from error
    except ValueError as error:
        raise ValueError(f"{source.shown}: {source.protocol}:// is not a protocol of fsspec ({error})") from error


def short(error: BaseException) -> str:
    """Format an error as one line of at most 300 characters."""
    return one_line(error, 300)


def shown(value: Any) -> Any:
    """Return a value of a configuration, or a list of them, with each location as Source.shown."""
    if isinstance(value, list):
        return [shown(one) for one in cast(list[Any], value)]
    return Source(value).shown if isinstance(value, str) else value
