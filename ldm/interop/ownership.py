"""Find out whose a model is: from its folder's configuration, card and licence files, and from those of its parts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ldm.interop.export_files import CARD, NOTES, Listing
from ldm.interop.hub_cache import is_own_file
from ldm.interop.network_files import model_folder
from ldm.interop.published import public_name
from ldm.interop.weight_reader import open_weights
from ldm.model.components import ModelComponents
from ldm.model.ownership import LICENSE, PublishConfig

LEGAL = re.compile(r"(LICEN[CS]E|NOTICE|COPYING)\b[\w.-]*")
NOTICE = re.compile(r"NOTICE\b.*")
FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
RUN_CONFIG = "config.yaml"
MAX_FILES, MAX_BYTES = 16, 2**20


@dataclass(frozen=True, slots=True)
class Ownership:
    """Whose a model is, and the files that must go with it, by name."""

    name: str = ""
    publish: PublishConfig = field(default_factory=PublishConfig)
    files: dict[str, bytes] = field(default_factory=dict)

    def for_a_part(self) -> dict[str, bytes]:
        """Return the files under names that tell whose they are: LICENSE-emoji64."""
        return {name if "-" in name else f"{name}-{self.name}": content for name, content in self.files.items()}


def ownership_of(path: Path) -> Ownership:
    """Read whose the model or run at this path is; nothing is known where nothing is stated."""
    if not path.is_dir():
        return Ownership(public_name(path.stem), _of_file(path))
    folder, files = model_folder(path), {}
    for file in sorted(folder.iterdir()):
        fits = LEGAL.fullmatch(file.name) and file.is_file() and file.stat().st_size <= MAX_BYTES
        if fits and len(files) < MAX_FILES and is_own_file(file, folder):
            files[file.name] = file.read_bytes()
    stated = _stated(path / RUN_CONFIG)
    stated = _stated(folder / NOTES) if stated.is_empty else stated
    notices = [text.decode(errors="replace").strip() for name, text in files.items() if NOTICE.fullmatch(name)]
    publish = PublishConfig(
        license=stated.license or _license_of_card(folder / CARD),
        base_model=stated.base_model,
        datasets=stated.datasets,
        pictures=stated.pictures,
        credits=stated.credits or tuple(filter(None, notices)),
    )
    return Ownership(public_name(str(path.resolve())), publish, files)


def _of_file(path: Path) -> PublishConfig:
    """Read what the header of a single file says, in ModelSpec's words and ours."""
    if path.suffix != ".safetensors" or not path.is_file():
        return PublishConfig()
    metadata = open_weights(path).metadata
    stated, license = stated_in(metadata.get("foundry.notes", "")), metadata.get("modelspec.license", "").lower()
    return stated if stated.license or not LICENSE.fullmatch(license) else replace(stated, license=license)


def _stated(file: Path) -> PublishConfig:
    """Read the section `publish` of a configuration; an empty one if there is none, or it is not ours."""
    if not file.is_file() or file.stat().st_size > MAX_BYTES:
        return PublishConfig()
    return stated_in(Listing.parse(file.read_bytes().decode(errors="replace")).notes)


def stated_in(notes: str) -> PublishConfig:
    """Read the section `publish` of a configuration's text."""
    from ldm.config import parse, read_tree  # imports pydantic, which drawing does not need

    section = read_tree(notes).get("publish")
    try:
        return parse(PublishConfig, section, source="publish") if isinstance(section, dict) else PublishConfig()
    except ValueError:  # of a later version, or of another program
        return PublishConfig()


def _license_of_card(card: Path) -> str | None:
    from ldm.config import read_tree

    if not card.is_file() or card.stat().st_size > MAX_BYTES:
        return None
    found = FRONT_MATTER.match(card.read_bytes().decode(errors="replace"))
    license = read_tree(found[1]).get("license") if found else None
    return license if isinstance(license, str) and LICENSE.fullmatch(license) else None


def inherited(own: PublishConfig, *, start: Path | None, parts: Sequence[Path]) -> PublishConfig:
    """Complete what a run says of its owners by what the models that it begins with say.

    start: whose weights are trained on; parts: the frozen ones, which the model will contain.
    """
    base = ownership_of(start) if start else Ownership()
    found = [base.publish, *(ownership_of(part).publish for part in dict.fromkeys(parts))]
    licenses = sorted({one.license for one in found if one.license})
    return replace(
        own,
        license=own.license or (("other" if len(licenses) > 1 else licenses[0]) if licenses else None),
        base_model=own.base_model or base.name or None,
        datasets=_once((*own.datasets, *base.publish.datasets)),
        credits=_once((*own.credits, *(credit for one in found for credit in one.credits))),
    )


def _once(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


def inherited_files(paths: Iterable[Path]) -> dict[str, bytes]:
    """Return the licence files of the models that another one begins with."""
    found: dict[str, bytes] = {}
    for path in dict.fromkeys(paths):
        found |= ownership_of(path).for_a_part()
    return found


def files_of_run(run: Path) -> dict[str, bytes]:
    """Return the licence files that go with a run's model: those beside its newest export, or those of its sources."""
    from ldm.config import read_tree

    files = ownership_of(run).files if model_folder(run) != run else {}
    if files or not (run / RUN_CONFIG).is_file():
        return files
    model = read_tree((run / RUN_CONFIG).read_text(encoding="utf-8", errors="replace")).get("model")
    named = [model.get(key) for key in ("start", "vae", "text")] if isinstance(model, dict) else []
    return inherited_files(Path(name) for name in named if isinstance(name, str))


def ownership(parts: ModelComponents) -> Ownership:
    """Return whose a model in memory is, by its configuration and by the folders that it was read from."""
    own, *others = parts.origin.places if parts.origin and parts.origin.places else (None,)
    base = ownership_of(own) if own else Ownership()
    stated = stated_in(parts.notes)
    publish = inherited(base.publish if stated.is_empty else stated, start=None, parts=others)
    return Ownership(base.name, publish, base.files | inherited_files(others))


def section(publish: PublishConfig) -> dict[str, Any] | None:
    """Return the section of foundry.yaml, without what is not known; None if nothing is."""
    known = {key: value for key, value in dataclasses.asdict(publish).items() if value not in (None, ())}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in known.items()} or None
