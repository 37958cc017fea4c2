"""The files of an exported folder: a list with their digests, and how a newer export replaces them and nothing else.

The list is the end of foundry.yaml, behind the run's configuration. It is written last; while files are being replaced,
it says so. A folder that exists may hold more than an export: .git, further pictures, a card that somebody rewrote.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ldm.files.atomic import NEW, atomic_folder, scratch_folder, to_disk, write_atomically
from ldm.files.digest import sha256_of
from ldm.files.messages import some
from ldm.interop.diffusers_layout.denoiser import ALL_LAYOUTS

NOTES, INDEX, CARD = "foundry.yaml", "model_index.json", "README.md"
SECTION = "export:\n"  # begins the list, which ends the file
INCOMPLETE = "  incomplete: true\n"
LINE = re.compile(r"    ([0-9a-f]{64}(?: [0-9a-f]{64})*)  (\S.*)")  # as sha256sum writes it
PARTS = {layout.folder for layout in ALL_LAYOUTS} | {
    "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2",
}  # fmt: skip
# What versions up to 0.2, which wrote no list, put into these folders.
OLDER = re.compile(
    r"(scheduler_config|tokenizer_config|special_tokens_map|tokenizer|vocab|config)\.json|merges\.txt|"
    r"(diffusion_pytorch_model|model)\.safetensors"
)
OF_A_REPOSITORY = re.compile(r"\..*|(README|LICEN[CS]E|NOTICE|COPYING)\b.*")  # of a folder without a model
MAX_LIST_BYTES = 2**20
MAX_COMPARED_BYTES = 2**26  # of larger files, reading a model does not compute the digest: it would take seconds


@dataclass(frozen=True, slots=True)
class Listing:
    """What foundry.yaml says of its folder: the configuration, and the files that the export wrote."""

    notes: str = ""
    files: Mapping[str, str] = field(default_factory=dict)  # path -> sha256; two while an export is incomplete
    complete: bool = True

    @classmethod
    def parse(cls, text: str) -> Listing:
        """Split the text of a foundry.yaml; one of versions up to 0.2 has no list."""
        head, found, tail = f"\n{text}".rpartition(f"\n{SECTION}")
        if not found:
            return cls(notes=text)
        lines = [LINE.fullmatch(line) for line in tail.splitlines()]
        files = {match[2]: match[1] for match in lines if match is not None and _is_inside(match[2])}
        return cls(notes=f"{head}\n"[1:], files=files, complete=INCOMPLETE not in tail)

    def text(self) -> str:
        """Return the text that `parse` splits."""
        notes = f"{self.notes}\n" if self.notes and not self.notes.endswith("\n") else self.notes
        lines = "".join(f"    {self.files[path]}  {path}\n" for path in sorted(self.files))
        return f"{notes}{SECTION}{'' if self.complete else INCOMPLETE}  sha256: |\n{lines}"


def _is_inside(path: str) -> bool:
    return not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts


def read_listing(folder: Path) -> Listing | None:
    """Read a folder's foundry.yaml; None if it has none, or none that an export wrote."""
    path = folder / NOTES
    if not path.is_file() or path.stat().st_size > MAX_LIST_BYTES:
        return None
    return Listing.parse(path.read_bytes().decode(errors="replace"))


def write_listing(folder: Path, notes: str) -> None:
    """Write foundry.yaml into a folder that is complete but for it."""
    files = {str(path.relative_to(folder).as_posix()): sha256_of(path) for path in _files(folder)}
    (folder / NOTES).write_text(Listing(notes, files).text(), encoding="utf-8")


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / NOTES]


def check_listing(folder: Path, listing: Listing) -> tuple[str, ...]:
    """Warn of files of the model that are not what the export wrote, and return that as a remark.

    Raises ValueError if an export into the folder did not end.
    """
    if not listing.complete:
        raise ValueError(
            f"{folder} holds parts of two models, since an export into it was interrupted, or is still running: wait "
            "for it, or export there again"
        )
    model = {path: digest for path, digest in listing.files.items() if not _may_be_edited(path)}
    changed = [path for path, digest in model.items() if not _is_unchanged(folder / path, digest)]
    if not changed:
        return ()
    cure = "unless you changed it, an export or a copy was interrupted: export or copy it again"
    warnings.warn(f"{some(changed)} in {folder} differs from what its export wrote; {cure}", stacklevel=2)
    return (f"changed since its export: {some(changed)}",)


def _is_unchanged(path: Path, digest: str) -> bool:
    if not path.is_file():
        return False
    return path.stat().st_size > MAX_COMPARED_BYTES or sha256_of(path) in digest.split()


def _may_be_edited(path: str) -> bool:
    """Return whether a file is for people to read, so that they may have changed it, and not a part of the model."""
    return path != INDEX and path.split("/")[0] not in PARTS


def check_target(folder: Path) -> None:
    """Raise ValueError if the folder exists and is neither an export of ours nor a new repository without a model."""
    if not folder.exists() or (folder.is_dir() and all(map(_is_of_a_repository, folder.iterdir()))):
        return
    listing = read_listing(folder)
    if listing is None or not (listing.files or (folder / INDEX).exists()):
        raise ValueError(f"{folder} exists and is not an export of this program: give a new folder, or an older export")


def _is_of_a_repository(path: Path) -> bool:
    return OF_A_REPOSITORY.fullmatch(path.name) is not None


@contextmanager
def replaced_files(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill and to list; on success its files replace those of the older export in `folder`.

    All are complete before the first is replaced; other files stay, and so does a card that was edited, with a warning.
    Raises ValueError, with nothing replaced, if they do not fit what else is there.
    """
    place = folder.resolve()  # a link stays, as do the folder of a shell and a mount point
    if not place.exists():
        with atomic_folder(place) as new:
            yield new
        return
    with scratch_folder(place / "export") as own:
        (own / NEW).mkdir()
        yield own / NEW
        _replace(own / NEW, place)


def _replace(new: Path, place: Path) -> None:
    before, after = read_listing(place) or Listing(), read_listing(new)
    assert after is not None
    older = before.files or _files_without_list(place)
    kept = {path for path in after.files if _is_of_the_user(place, path, older)}
    stale = [path for path in older if path not in after.files and not _is_of_the_user(place, path, older)]
    files = {path: digest for path, digest in after.files.items() if path not in kept}
    _check_room(place, files, stale)
    for path in files:
        to_disk(new / path)
    both = {path: " ".join(filter(None, (older.get(path), files.get(path)))) for path in older.keys() | files.keys()}
    if older:
        write_atomically(place / NOTES, Listing(after.notes, both, complete=False).text().encode())
    for path in files:
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (new / path).replace(place / path)
    for path in stale:
        _remove(place, path)
    write_atomically(place / NOTES, Listing(after.notes, files).text().encode())
    to_disk(place)
    if kept:
        warnings.warn(
            f"{some(kept)} in {place} is not what an export wrote, so it stays as it is: remove it and export again "
            "for a new one",
            stacklevel=2,
        )


def _files_without_list(place: Path) -> dict[str, str]:
    """Return the files of the model that an export without a list wrote; "" for each digest, which is not known."""
    if not (place / NOTES).exists() or not (place / INDEX).exists():
        return {}
    found = {path for part in PARTS for path in (place / part).glob("*") if OLDER.fullmatch(path.name)}
    return {path.relative_to(place).as_posix(): "" for path in found | {place / INDEX}}


def _is_of_the_user(place: Path, path: str, older: Mapping[str, str]) -> bool:
    file = place / path
    return _may_be_edited(path) and file.exists() and not _is_unchanged(file, older.get(path, ""))


def _check_room(place: Path, files: Mapping[str, str], stale: list[str]) -> None:
    """Raise ValueError if a file cannot have its place, or if what stays there would change what the model is."""
    for path in files:
        parent = (place / path).parent
        if (place / path).is_dir() or (parent.exists() and (not parent.is_dir() or parent.resolve() != parent)):
            wrong = place / path if (place / path).is_dir() else parent
            raise ValueError(f"{wrong} is in the way of the export, which needs {path}: move it, or give a new folder")
    needed = {path.split("/")[0] for path in files}
    for part in sorted(PARTS - needed):
        inside = {path.relative_to(place).as_posix() for path in (place / part).rglob("*") if path.is_file()}
        if left := inside - set(stale):
            raise ValueError(
                f"{place} holds {some(left)}, which no export wrote, and the new model has no {part}/: move it, or "
                "give a new folder"
            )


def _remove(place: Path, path: str) -> None:
    (place / path).unlink(missing_ok=True)
    with suppress(OSError):  # not empty: it holds something of the user's
        for parent in (place / path).parents[: path.count("/")]:
            parent.rmdir()
