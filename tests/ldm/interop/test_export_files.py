"""What an export into a folder that exists replaces, what stays, and what is said of a folder caught in between."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers.disks import small_disk
from helpers.stable_diffusion import stable_diffusion

from ldm.cli import run_command
from ldm.export import arguments, main
from ldm.files.digest import sha256_of
from ldm.files.writing import WriteError
from ldm.interop.compvis.writing import write_single_file
from ldm.interop.diffusers_layout.folder import read_folder, write_folder
from ldm.interop.export_files import Listing, read_listing, replaced_files

FP32: Any = {"dtype": torch.float32}
CARD = {"README.md": b"# card\n"}
UNET, DIT = stable_diffusion(1), stable_diffusion(transformer=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder with an export of a U-Net and its card."""
    write_folder(UNET, tmp_path / "out", **FP32, beside=CARD)
    return tmp_path / "out"


def test_an_export_lists_its_files_with_their_digests(out: Path):
    listing = read_listing(out)
    assert listing is not None and listing.complete
    assert listing.files == {name: sha256_of(out / name) for name in contents(out) if name != "foundry.yaml"}
    with silence():
        assert read_folder(out, **FP32).notes == UNET.notes


@pytest.mark.parametrize("notes", ["", "run: {name: x}\n", "no newline", "a: |\n  export:\n  b\n", "export:\n  x\n"])
def test_the_list_is_taken_off_the_notes_again(notes: str):
    listing = Listing(notes, {"a b/c.json": "0" * 64, "d": f"{'1' * 64} {'2' * 64}"}, complete=False)
    found = Listing.parse(listing.text())
    assert found == Listing(notes if notes.endswith("\n") or not notes else f"{notes}\n", listing.files, complete=False)


def test_a_list_names_no_file_outside(tmp_path: Path):
    text = Listing("", {"../thesis.txt": "0" * 64, "/etc/passwd": "0" * 64, "a/../../b": "0" * 64}).text()
    assert Listing.parse(text).files == {}


def test_what_is_not_the_exports_stays(out: Path):
    """.git, further pictures, licences, LoRAs: whatever somebody keeps beside a model."""
    mine = {
        ".git/HEAD": b"ref", "LICENSE": b"mine", "gallery/one.png": b"1", "README.md": b"# my own words\n",
        "transformer.txt": b"2", "notes/deep/x": b"3",
    }  # fmt: skip
    for name, content in mine.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    with pytest.warns(UserWarning, match=r"README.md in .*out is not what an export wrote, so it stays as it is"):
        write_folder(DIT, out, **FP32, beside=CARD | {"LICENSE": b"of the weights"})
    found = contents(out)
    assert mine.items() <= found.items()
    assert not (out / "unet").exists() and (out / "transformer/config.json").exists()
    with silence():
        read_folder(out, **FP32)
    for name in ("README.md", "LICENSE"):  # as the warning says
        (out / name).unlink()
    with silence():
        write_folder(DIT, out, **FP32, beside=CARD | {"LICENSE": b"of the weights"})
    assert (out / "README.md").read_bytes() == CARD["README.md"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_card_that_nobody_edited_is_replaced_and_one_that_is_no_longer_written_goes(out: Path):
    with silence():
        write_folder(UNET, out, **FP32, beside={"README.md": b"# newer\n"})
        assert (out / "README.md").read_bytes() == b"# newer\n"
        write_folder(UNET, out, **FP32)
    assert not (out / "README.md").exists()


def test_an_older_export_without_a_list_is_replaced_too(out: Path):
    (out / "foundry.yaml").write_text(UNET.notes)
    with pytest.warns(UserWarning, match=r"README.md in .* stays as it is"):
        write_folder(DIT, out, **FP32, beside=CARD)
    assert not (out / "unet").exists()
    assert set((read_listing(out) or Listing()).files) == set(contents(out)) - {"foundry.yaml", "README.md"}


@pytest.mark.parametrize("older", ["with a list", "without"])
def test_what_would_change_what_the_model_is_refuses_the_export(out: Path, older: str):
    if older == "without":
        (out / "foundry.yaml").write_text("")
    (out / "unet" / "mine.safetensors").write_bytes(b"mine")
    before = contents(out)
    with pytest.raises(ValueError, match=r"holds unet/mine.safetensors, which no export wrote, and the new"):
        write_folder(DIT, out, **FP32)
    assert contents(out) == before
    (out / "unet" / "mine.safetensors").rename(out / "mine.safetensors")  # as the message says
    write_folder(DIT, out, **FP32)
    assert (out / "mine.safetensors").read_bytes() == b"mine" and not (out / "unet").exists()


def test_a_part_that_is_a_link_elsewhere_is_not_written_through(out: Path, tmp_path: Path):
    (out / "vae").rename(tmp_path / "shared")
    (out / "vae").symlink_to(tmp_path / "shared")
    before = contents(tmp_path / "shared")
    with pytest.raises(ValueError, match="vae is in the way of the export, which needs vae/"):
        write_folder(DIT, out, **FP32)
    assert contents(tmp_path / "shared") == before


class Killed(BaseException):
    """Nothing after it runs in this process."""


@contextmanager
def killed_at_replacing(number: int) -> Iterator[None]:
    left, replace = iter(range(number)), Path.replace

    def counted(self: Path, target: Path) -> Path:
        if next(left, None) is None:
            raise Killed
        return replace(self, target)

    with patch.object(Path, "replace", counted), pytest.raises(Killed):
        yield


def test_a_folder_caught_in_between_says_so_and_is_mended_by_the_next_export(out: Path, tmp_path: Path):
    """Killed after each single renaming."""
    new = tmp_path / "new"
    write_folder(DIT, new, **FP32, beside=CARD)
    wanted, states = contents(new), set[str]()

    def export(folder: Path) -> None:
        with replaced_files(folder) as own:
            shutil.copytree(new, own, dirs_exist_ok=True)

    for number in range(len(wanted) + 3):
        folder = Path(shutil.copytree(out, tmp_path / f"k{number}"))
        before = contents(folder)
        try:
            with killed_at_replacing(number):
                export(folder)
        except pytest.fail.Exception:  # it was complete before that many
            states.add("complete")
            break
        with silence():
            if contents(folder) == before:
                states.add("older")
                read_folder(folder, **FP32)
            else:
                states.add("between")
                with pytest.raises(ValueError, match="holds parts of two models, since an export into it"):
                    read_folder(folder, **FP32)
            export(folder)  # as the message says
            assert contents(folder) == wanted
    assert states == {"older", "between", "complete"}


def test_what_a_killed_export_left_in_the_folder_is_removed_by_the_next(out: Path):
    child = os.fork()
    if child == 0:
        write_folder(DIT, out, **FP32, check=lambda _: os._exit(9))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [path for path in out.iterdir() if path.suffix == ".partial"]
    mine = out / ".export.of-mine.partial" / "new"
    mine.mkdir(parents=True)
    write_folder(DIT, out, **FP32, beside=CARD)
    assert [path for path in out.iterdir() if path.suffix == ".partial"] == [mine.parent]


def test_files_that_were_mixed_by_somebody_else_are_said_and_drawn(out: Path, tmp_path: Path):
    """A copy that was interrupted, or a setting that was changed by hand: one warning, and a remark in the record."""
    config = out / "vae" / "config.json"
    config.write_text(config.read_text().replace("\n", "\n\n"))
    with pytest.warns(UserWarning, match=r"^vae/config.json in .*out differs from what its export wrote; unless you"):
        parts = read_folder(out, **FP32)
    assert "changed since its export: vae/config.json" in parts.describe()
    (out / "README.md").write_text("edited")
    shutil.rmtree(out / "vae")
    write_folder(UNET, tmp_path / "second", **FP32)
    shutil.copytree(tmp_path / "second" / "vae", out / "vae")
    with silence():
        read_folder(out, **FP32)


def test_a_folder_named_like_a_temporary_one_is_somebody_elses(tmp_path: Path, out: Path):
    thesis = [tmp_path / "out.partial", tmp_path / ".out.old.partial" / "new"]
    for folder in thesis:
        folder.mkdir(parents=True)
        (folder / "thesis.txt").write_text("thesis")
    (tmp_path / "m.safetensors.partial").write_text("thesis")
    write_folder(UNET, out, **FP32)
    shutil.rmtree(out)
    write_folder(UNET, out, **FP32)
    write_single_file(UNET, tmp_path / "m.safetensors", **FP32)
    assert all((folder / "thesis.txt").read_text() == "thesis" for folder in thesis)
    assert (tmp_path / "m.safetensors.partial").read_text() == "thesis"


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path, there: bool):
    if there:
        write_folder(DIT, tmp_path / "v1", **FP32)
    for name, target in (("current", "v1"), ("m.safetensors", "v1.safetensors")):
        (tmp_path / name).symlink_to(target)
    write_folder(UNET, tmp_path / "current", **FP32)
    write_single_file(UNET, tmp_path / "m.safetensors", **FP32)
    assert os.readlink(tmp_path / "current") == "v1" and os.readlink(tmp_path / "m.safetensors") == "v1.safetensors"
    assert (tmp_path / "v1/unet").is_dir() and not (tmp_path / "v1/transformer").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "current", "m.safetensors", "v1", "v1.safetensors", "v1.yaml",
    ]  # fmt: skip


def test_the_folder_of_a_shell_is_a_target(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    """The folder itself stays: a shell in it goes on."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    inode = here.stat().st_ino
    for _ in range(2):
        assert run_command(main, arguments(), [str(out), "."]) == 0
    assert here.stat().st_ino == inode and Path("model_index.json").exists()
    assert "# here\n" in Path("README.md").read_text() or Path("README.md").read_bytes() == CARD["README.md"]


def test_a_new_repository_is_a_target_and_a_diary_is_not(tmp_path: Path):
    repository = tmp_path / "repository"
    (repository / ".git").mkdir(parents=True)
    (repository / "LICENSE").write_text("mine")
    write_folder(UNET, repository, **FP32)
    assert (repository / "LICENSE").read_text() == "mine" and (repository / ".git").is_dir()
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "foundry.yaml").write_text("rain")
    with pytest.raises(ValueError, match="diary exists and is not an export of this program: give a new folder"):
        write_folder(UNET, tmp_path / "diary", **FP32)


def test_a_full_disk_leaves_the_older_export_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_folder(DIT, tmp_path / "a", **FP32)
    size = sum(map(len, contents(tmp_path / "a").values()))
    with small_disk(f"{int(size * 1.5)}") as disk:
        write_folder(DIT, disk / "m", **FP32)
        before = contents(disk / "m")
        with pytest.raises(WriteError):
            write_folder(DIT, disk / "m", **FP32)
        assert contents(disk / "m") == before
        for words in ([str(disk / "m")], [str(disk / "n")]):
            capsys.readouterr()
            assert run_command(main, arguments(), [str(tmp_path / "a"), *words]) == 2
            assert capsys.readouterr().err == (
                f"error: {words[0]} cannot be written (No space left on device): free disk space, or write elsewhere\n"
            )
        shutil.rmtree(disk / "m")
        assert run_command(main, arguments(), [str(tmp_path / "a"), str(disk / "n")]) == 0
