"""A person's afternoon: pictures and disks as they are, from an installed wheel, in a folder of one's own.

One test, which types what a person types and reads what is printed. Each step goes on from what the one before it left.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import yaml
from helpers.disks import small_disk
from helpers.forking import ROOT, Forking
from helpers.installing import installed, sources
from helpers.zoo import zoo
from PIL import Image

# The folder of pictures is called as one of our packages, and a file as another.
PLACE = "my stuff [v2] {2026}"
SETTINGS = {
    "run": {"name": "mine", "steps": 100, "log_every": 1, "sample_every": 10, "checkpoint_every": 4},
    "data": {"shards": ["shards/train/*.tar"], "image_size": 16, "batch_size": 4},
    "optim": {"lr": 1e-3},
    "model": {
        "text": "weights",
        "denoiser": {"kind": "dit", "depth": 1, "width": 32, "heads": 2, "sample_size": 4},
        "path": {"kind": "rectified_flow"},
        "objective": {"prediction": "velocity"},
    },
}
ODD_EXIF = "EXIF, beside tag 0x100 of type 1, 1"  # with which Pillow raises, in place of turning the picture
PYTHON = """
from ldm import TextToImage
pipe = TextToImage.load("runs/mine")
one, two = pipe(["a picture, CMYK", "another picture"], seed=[3, 4], steps=2, image="photo.png", strength=0.5)
two.save("two.png")
"""


class Person:
    """Types commands in a folder, and reads what they print."""

    def __init__(self, python: Path, folder: Path) -> None:
        self.python, self.folder, self.forking = python, folder, Forking(folder, python)

    def types(self, *words: str, code: int = 0) -> str:
        """Run `python WORDS`; returns what it prints, and its errors after it."""
        done = self.forking.complete(*words)
        assert "Traceback" not in done.stderr and done.returncode == code, done.stdout + done.stderr
        if code:
            *_, last = done.stderr.splitlines()
            assert last.startswith("error: ") and done.stderr.count("error:") == 1, done.stderr
        return done.stdout + done.stderr

    def trains(self, *words: str, code: int = 0) -> str:
        return self.types("-m", "ldm.train", "--config", "mine.yaml", *words, code=code)

    def interrupts(self, after: str, *words: str) -> str:
        """Train, and press Ctrl-C once a line begins with `after`."""
        command = [str(self.python), "-m", "ldm.train", "--config", "mine.yaml", *words]
        with subprocess.Popen(
            command, cwd=self.folder, env=self.forking.environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            lines = list[str]()
            for line in process.stdout:
                lines.append(line)
                if line.startswith(after):
                    process.send_signal(signal.SIGINT)
                    after = "\0"
        assert process.returncode == 0, lines
        return "".join(lines)


def prepare(folder: Path) -> None:
    """Give the person what people have: pictures of every kind, most with a caption, other things, and a model."""
    pictures = folder / "data"
    pictures.mkdir()
    for number, odd in enumerate(zoo()):
        (pictures / f"{number:03d}.{odd.extension}").write_bytes(odd.data)
        (pictures / f"{number:03d}.txt").write_text(f"a picture, {odd.name}")
    (pictures / "without words.png").write_bytes(zoo()[0].data)
    (folder / "text.py").write_text("raise SystemExit('the wrong text')\n")
    shutil.copytree(ROOT / "weights" / "emoji64", folder / "weights")
    places = {"run": {**SETTINGS["run"], "folder": str(folder / "runs")}}
    model = {**SETTINGS["model"], "vae": str(folder / "weights")}
    (folder / "mine.yaml").write_text(yaml.safe_dump(SETTINGS | places | {"model": model}))
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    mask = np.full((16, 16, 4), 255, np.uint8)
    mask[:, 8:, 3] = 0  # white, but transparent on the right
    Image.fromarray(mask).save(folder / "mask.png")


def pack(person: Person, expected: str) -> None:
    """Pack the pictures as docs/training.md says."""
    shutil.rmtree(person.folder / "shards", ignore_errors=True)
    page = (ROOT / "docs/training.md").read_text().partition("## Your own pictures")[2]
    program = page.partition("```python\n")[2].partition("```")[0]
    assert person.types("-c", program.replace('Path("pictures")', 'Path("data")')) == expected
    assert "8 shards, " in person.types("-m", "ldm.data.manifest", "shards/train")


def packs_the_pictures(person: Person) -> None:
    """Gives the folder itself, and is told to pack it, and where to read how."""
    said = person.trains("data.shards=data", code=3)
    assert "data is a folder without .tar files (" in said and 'docs/training.md, "Your own pictures"' in said
    pack(person, f"{len(zoo())} pictures with captions, 1 other files\n")


def removes_what_cannot_be_used(person: Person) -> None:
    """Too many are damaged: the file of bad samples names each, and why. Without those, training begins."""
    said = person.trains("run.name=first", code=3)
    assert "more than max_bad_fraction (0.01) allows" in said and "/runs/first/bad_samples.jsonl: repair" in said
    lines = (person.folder / "runs/first/bad_samples.jsonl").read_text().splitlines()
    for listed in map(json.loads, lines):
        odd = zoo()[int(listed["key"])]
        assert odd.reason and re.search(odd.reason, listed["reason"]), (odd.name, listed)
    assert len(lines) >= 10
    for number, odd in enumerate(zoo()):
        if odd.reason:
            (person.folder / "data" / f"{number:03d}.{odd.extension}").unlink()
    pack(person, f"{sum(not odd.reason for odd in zoo())} pictures with captions, 1 other files\n")


def loses_a_shard(person: Person) -> None:
    """Deletes a shard, is told which is missing, goes on without it as the error says, and restores it."""
    shard = person.folder / "shards/train/00003.tar"
    content = shard.read_bytes()
    shard.unlink()
    said = person.trains(code=3)
    assert "1 of 8 shards are missing (shards/train/00003.tar with " in said
    allowed = re.search(r"set (data\.max_missing_shards=[\d.]+)\Z", said.strip())
    assert allowed is not None, said
    said = person.trains(allowed[1], "run.name=without", "run.steps=1")
    assert "left out: shard shards/train/00003.tar: it is missing, with " in said
    shard.write_bytes(content)


def stops(person: Person) -> int:
    """Presses Ctrl-C between two checkpoints; returns the step that is saved."""
    said = person.interrupts("step 6/")
    assert "bad sample" not in said
    stopped = re.search(r"stopped by SIGINT \(Ctrl-C\) after step (\d+) of 100, which is saved: the same", said)
    assert stopped is not None, said
    return int(stopped[1])


def draws(person: Person, step: int) -> None:
    """Draws with the run as it was stopped; what a mask keeps is the photo's."""
    words = ("--ckpt", "runs/mine", "--prompt", "a picture, CMYK", "--steps", "2", "--n-samples", "1")
    said = person.types("-m", "txt2img", *words, "--outdir", "drawn", "--init-img", "photo.png", "--mask", "mask.png")
    assert f"averaged weights of step {step} of 100" in said
    photo, drawn = (np.asarray(Image.open(person.folder / name)) for name in ("photo.png", "drawn/samples/00000.png"))
    assert (drawn[:, 8:] == photo[:, 8:]).all() and (drawn[:, :8] != photo[:, :8]).any()
    odd = next(f"data/{number:03d}.jpg" for number, odd in enumerate(zoo()) if odd.name == ODD_EXIF)
    person.types("-m", "txt2img", *words, "--outdir", "drawn", "--init-img", odd)
    said = person.types("-m", "txt2img", *words, "--outdir", "drawn", "--init-img", "mine.yaml", code=2)
    assert "mine.yaml" in said and "it is no JPEG, PNG, WebP, " in said


def exports(person: Person, step: int) -> None:
    said = person.types("-m", "ldm.export", "runs/mine", "out")
    assert f"averaged weights of step {step} of 100" in said and "wrote out, and read it back" in said
    card = (person.folder / "out/README.md").read_text()
    assert f"| steps | {step} of 4 pictures: {4 * step} pictures seen |" in card
    assert "Twitter, Inc and other contributors, graphics licensed under CC-BY 4.0" in card
    for file in ("README.md", "foundry.yaml"):
        assert str(person.folder) not in (person.folder / "out" / file).read_text()


def resumes_and_changes(person: Person, step: int) -> None:
    """The same command goes on; another learning rate does, once it is allowed as the error says."""
    said = person.trains(f"run.steps={step + 2}")
    assert f"resumed from {person.folder}/runs/mine/checkpoints/step_{step:07d}" in said
    assert f"step {step + 1}/{step + 2}  loss" in said
    more = ("optim.lr=2e-3", f"run.steps={step + 4}")
    said = person.trains(*more, code=2)
    allowed = re.search(r"allow it with (run\.allow=\[optim\.lr\])", said)
    assert allowed is not None, said
    said = person.trains(*more, allowed[1])
    assert f"step {step + 4}/{step + 4}  loss" in said and "lr 2.00e-03" in said


def exports_again(person: Person, step: int) -> None:
    """Into the same folder, which is a repository by now: what is one's own stays, what was exported is newer."""
    out = person.folder / "out"
    mine = {".git/HEAD": "ref: main", "LICENSE": "mine", "gallery/one.png": "a picture", "README.md": "# My own words"}
    for path, text in mine.items():
        (out / path).parent.mkdir(exist_ok=True)
        (out / path).write_text(text)
    said = person.types("-m", "ldm.export", "runs/mine", "out", "--fp16")
    assert f"averaged weights of step {step + 4} of {step + 4}" in said
    assert "README.md in " in said and "is not what an export wrote, so it stays as it is" in said
    assert all((out / path).read_text() == text for path, text in mine.items())
    said = person.types("-m", "txt2img", "--ckpt", "out", "--prompt", "a frog", "--steps", "1", "--outdir", "drawn")
    assert "warning" not in said


def fills_the_disk(person: Person, step: int) -> None:
    """Neither a training nor an export falls over; what is there already is what it was."""
    with small_disk("8M") as disk:
        said = person.trains(f"run.folder={disk}", "run.name=full", "run.steps=4", "data.image_size=16")
        assert "step 4/4  loss" in said and "No space left on device): free disk space, or write elsewhere" in said
        assert (disk / "full/checkpoints/step_0000004/manifest.json").exists()
        said = person.types("-m", "ldm.export", "runs/mine", str(disk / "model"), code=2)
        assert said.endswith(
            f"error: {disk}/model cannot be written (No space left on device): free disk space, or write elsewhere\n"
        )
        assert {path.name for path in disk.iterdir()} == {"full"}
        said = person.types(
            "-m", "txt2img", "--ckpt", f"{disk}/full", "--prompt", "a frog", "--steps", "1", "--skip-grid"
        )
        assert "averaged weights of step 4 of 4" in said


def programs(person: Person) -> None:
    """Draws in Python, with lists and a path; a picture that is saved carries its record."""
    assert person.types("-c", PYTHON) == ""
    record = Image.open(person.folder / "two.png").info["parameters"]
    assert record.startswith("another picture\n") and "Seed: 4" in record


def test_an_afternoon(tmp_path: Path) -> None:
    (tmp_path / "sources").mkdir()
    (tmp_path / "out").mkdir()
    folder = tmp_path / PLACE
    folder.mkdir()
    prepare(folder)
    person = Person(installed(sources(tmp_path / "sources"), tmp_path / "out", "wheel"), folder)
    packs_the_pictures(person)
    removes_what_cannot_be_used(person)
    loses_a_shard(person)
    step = stops(person)
    draws(person, step)
    exports(person, step)
    resumes_and_changes(person, step)
    exports_again(person, step)
    programs(person)
    fills_the_disk(person, step)
    person.forking.close()
