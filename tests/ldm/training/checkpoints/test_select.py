"""Which checkpoint a run goes on from."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.loader import CaptionedImages
from ldm.config import dump, load_config, read_tree
from ldm.errors import NonFiniteError
from ldm.files.checkpoints import Digest, fault, step_of
from ldm.model.ownership import PublishConfig
from ldm.training.checkpoints.select import (
    changed_schedule,
    check_continues,
    check_state,
    choose,
    rewound_to,
    settle_lanes,
)
from ldm.training.checkpoints.train_state import CheckpointError, TrainState
from ldm.training.denoiser_config import TrainConfig
from ldm.training.engine.distributed import Ranks
from ldm.training.engine.engine import SKIPPED_AT_MOST, Engine
from ldm.training.run import Run, RunConfig

ROOT = Path(__file__).parents[4]
ALONE = Ranks(0, 1, torch.device("cpu"))


class Two(Ranks):
    """This rank of two, in a world whose other rank finds nothing wrong, or something."""

    other_finds = False

    def broadcast(self, numbers: Sequence[float]) -> list[float]:
        return list(numbers) if self.is_main else [10.0, 20.0]

    def any_rank(self, wish: bool) -> bool:
        return wish or self.other_finds


class TwoOfWhichOneSees(Two):
    other_finds = True


def make_run(tmp_path: Path, *steps: int, name: str = "trial", resume: str | Path = "auto", main: bool = True) -> Run:
    """A run with checkpoints of these steps, as it is when its process has started again."""
    config = RunConfig(name=name, folder=str(tmp_path), steps=100)
    for step in steps:
        add_checkpoint(Run(config, is_main=True), step, {})
    again = RunConfig(name=name, folder=str(tmp_path), steps=100, resume=str(resume))
    return Run(again, is_main=main)


def add_checkpoint(run: Run, step: int, record: dict[str, Any]) -> None:
    partial = run.checkpoints.folder / f"step_{step:07d}.partial"
    partial.mkdir(parents=True)
    (partial / "rank_00000.safetensors").write_bytes(f"tensors of step {step}".encode())
    (partial / "state.json").write_text(json.dumps(record))
    run.checkpoints.commit(partial, {path.name: Digest.of(path) for path in partial.iterdir()})


def damage(run: Run, *steps: int) -> None:
    for step in steps:
        path = run.checkpoints.path(step) / "rank_00000.safetensors"
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def names(run: Run) -> set[str]:
    return {path.name for path in run.checkpoints.folder.iterdir()} - {"latest"}


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_run_without_checkpoints_begins(tmp_path: Path, resume: str):
    assert choose(make_run(tmp_path, resume=resume), ALONE) is None


def test_a_run_goes_on_from_its_newest(tmp_path: Path):
    run = make_run(tmp_path, 10, 30, 20)
    assert choose(run, ALONE) == run.checkpoints.path(30)
    assert names(run) == {"step_0000010", "step_0000020", "step_0000030"}


def test_a_run_that_must_not_go_on_is_refused(tmp_path: Path):
    make_run(tmp_path, 10)
    with pytest.raises(ValueError, match="trial already holds step_0000010: set run.resume=auto to continue it"):
        make_run(tmp_path, resume="never")


def test_damaged_ones_are_passed_over_named_and_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path, 10, 20, 30, 40)
    damage(run, 10, 30, 40)
    assert choose(run, ALONE) == run.checkpoints.path(20)
    told = capsys.readouterr().out.splitlines()
    for step in (40, 30):
        path = run.checkpoints.path(step)
        assert any(
            line.startswith(f"checkpoint {path} is damaged (rank_00000.safetensors has sha256 ") for line in told
        ), step
        assert f"{path.name} is now {path.name}.damaged" in told
    assert len(told) == 4  # of the older one, which nobody has looked at, nothing is said
    assert names(run) == {"step_0000010", "step_0000020", "step_0000030.damaged", "step_0000040.damaged"}
    assert choose(make_run(tmp_path), ALONE) == run.checkpoints.path(20)  # and a new 30 can be written
    assert [step_of(path) for path in run.checkpoints.all()] == [10, 20]


def test_where_none_is_good_the_run_does_not_begin_again(tmp_path: Path):
    run = make_run(tmp_path, 10, 20)
    damage(run, 10, 20)
    before = names(run)
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints in .* is valid: give another"):
        choose(run, ALONE)
    assert names(run) == before


def test_a_checkpoint_of_its_own_is_gone_back_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What came later is of a past that did not happen; nothing of it is lost."""
    run = make_run(tmp_path, 10, 20, 30)
    kept = {path.name: path.read_bytes() for path in run.checkpoints.path(30).iterdir()}
    asked = make_run(tmp_path, resume=run.checkpoints.path(10))
    assert choose(asked, ALONE) == run.checkpoints.path(10)
    assert names(run) == {"step_0000010", "step_0000020.aside", "step_0000030.aside"}
    assert {path.name: path.read_bytes() for path in (run.checkpoints.folder / "step_0000030.aside").iterdir()} == kept
    assert "step_0000030 is now step_0000030.aside" in capsys.readouterr().out


def test_a_checkpoint_of_its_own_is_known_by_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run(tmp_path, 10, 20)
    monkeypatch.chdir(run.checkpoints.folder)
    assert choose(make_run(tmp_path, resume="step_0000010"), ALONE) == run.checkpoints.path(10)
    assert names(run) == {"step_0000010", "step_0000020.aside"}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choose(make_run(tmp_path, resume="~/trial/checkpoints/step_0000010"), ALONE) == run.checkpoints.path(10)
    assert choose(make_run(tmp_path, name="other", resume="~/trial"), ALONE) == run.checkpoints.path(10)


def test_the_same_command_again_does_not_go_back_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A launcher that starts a run again after each failure repeats run.resume, too."""
    run = make_run(tmp_path, 10)
    add_checkpoint(run, 20, state_of_a_run(rewound_to="step_0000010").to_json())
    asked = make_run(tmp_path, resume=run.checkpoints.path(10))
    assert choose(asked, ALONE) == run.checkpoints.path(20)
    assert names(run) == {"step_0000010", "step_0000020"}
    assert "was rewound to step_0000010 before, and resumes from its newest" in capsys.readouterr().out
    shutil.rmtree(run.checkpoints.path(10))  # which may have been removed since, as too old
    assert choose(asked, ALONE) == run.checkpoints.path(20)
    # What the next checkpoints tell: still the same, or where the run is sent back to now.
    assert rewound_to(asked, run.checkpoints.path(20), state_of_a_run(rewound_to="step_0000010")) == "step_0000010"
    assert rewound_to(asked, run.checkpoints.path(10), state_of_a_run()) == "step_0000010"
    assert rewound_to(make_run(tmp_path), run.checkpoints.path(20), state_of_a_run()) is None


@pytest.mark.parametrize("asked", ["step_0000020", "step_0000050", "latest", "step_0000030.aside"])
def test_what_was_asked_for_by_name_must_be_good(tmp_path: Path, asked: str):
    """Another one is not taken in its place, and nothing is set aside for it."""
    run = make_run(tmp_path, 10, 20, 30, 40)
    damage(run, 20)
    run.checkpoints.set_aside(run.checkpoints.path(30), "aside")
    before = names(run)
    with pytest.raises(CheckpointError, match=rf"{asked}, which run.resume names, is damaged \(.+\): give another"):
        choose(make_run(tmp_path, resume=run.checkpoints.folder / asked), ALONE)
    assert names(run) == before


@pytest.mark.parametrize("by", ["run", "checkpoint"])
def test_a_new_run_begins_with_another_ones(tmp_path: Path, by: str):
    other = make_run(tmp_path, 10, 20, 30, name="other")
    damage(other, 30)
    before = names(other)
    asked = other.config.path if by == "run" else other.checkpoints.path(10)
    expected = other.checkpoints.path(20 if by == "run" else 10)
    assert choose(make_run(tmp_path, resume=asked), ALONE) == expected
    assert names(other) == before  # it is not ours to tidy


def test_another_ones_checkpoint_must_be_good_too(tmp_path: Path):
    other = make_run(tmp_path, 10, 20, name="other")
    damage(other, 20)
    with pytest.raises(CheckpointError, match="step_0000020, which run.resume names, is damaged"):
        choose(make_run(tmp_path, resume=other.checkpoints.path(20)), ALONE)
    damage(other, 10)
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        choose(make_run(tmp_path, resume=other.config.path), ALONE)


@pytest.mark.parametrize("by", ["run", "checkpoint"])
def test_a_run_that_has_begun_goes_on_from_its_own(tmp_path: Path, by: str, capsys: pytest.CaptureFixture[str]):
    """The same command is started again after every crash; it must not begin again each time."""
    other = make_run(tmp_path, 10, 90, name="other")
    asked = other.config.path if by == "run" else other.checkpoints.path(10)
    run = make_run(tmp_path, 20, resume=asked)
    assert choose(run, ALONE) == run.checkpoints.path(20)
    assert f"trial has checkpoints of its own, so run.resume={asked} is ignored" in capsys.readouterr().out


def test_its_own_folder_is_its_newest(tmp_path: Path):
    run = make_run(tmp_path, 10, 20)
    assert choose(make_run(tmp_path, resume=run.config.path), ALONE) == run.checkpoints.path(20)


def test_what_holds_no_checkpoints_is_refused(tmp_path: Path):
    empty = make_run(tmp_path, 10, name="empty")
    shutil.rmtree(empty.checkpoints.path(10))
    for asked in (tmp_path / "nowhere", empty.config.path, tmp_path):
        with pytest.raises(CheckpointError, match=f"run.resume is {asked}, which is neither a checkpoint nor a run"):
            choose(make_run(tmp_path, resume=asked), ALONE)


def test_what_one_rank_finds_is_true_for_all(tmp_path: Path):
    """Each rank reads a part of the files: what this one finds good may be damaged all the same."""
    run = make_run(tmp_path, 10, 20)
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        choose(run, TwoOfWhichOneSees(0, 2, torch.device("cpu")))
    assert choose(run, Two(0, 2, torch.device("cpu"))) == run.checkpoints.path(20)


def test_each_rank_reads_a_part(tmp_path: Path):
    """The second of two files is rank 1's to read, which here is said to have found nothing wrong."""
    run = make_run(tmp_path, 10, 20)
    (run.checkpoints.path(20) / "state.json").write_text("[]")
    assert choose(run, Two(0, 2, torch.device("cpu"))) == run.checkpoints.path(20)
    damage(run, 20)
    assert choose(run, Two(0, 2, torch.device("cpu"))) == run.checkpoints.path(10)


def test_only_the_main_rank_sets_aside_and_the_others_say_what_they_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = make_run(tmp_path, 10, 20, main=False)
    (run.checkpoints.path(20) / "state.json").write_text("[]")  # the second file, which rank 1 reads
    assert choose(run, Two(1, 2, torch.device("cpu"))) == run.checkpoints.path(10)
    assert names(run) == {"step_0000010", "step_0000020"} and fault(run.checkpoints.path(20)) is not None
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1 and told[0].startswith(f"rank 1: {run.checkpoints.path(20)}: state.json has sha256 ")


FEW = {"shards": 2, "samples": 9, "sha256": "abc", "contents": None}


def test_other_data_than_the_run_began_with_are_refused():
    state = state_of_a_run(data=FEW)
    assert check_state(state, config_of_a_run(), FEW) == []
    for other in ({"samples": 10}, {"sha256": "abd"}):
        with pytest.raises(ValueError, match="the data are not those that this run began with: then 9 samples in 2"):
            check_state(state, config_of_a_run(), FEW | other)


def test_shards_may_move_if_manifests_say_that_they_are_the_same():
    """And if they only look the same, they may not: nor where they are."""
    state = state_of_a_run(data=FEW | {"contents": "123"})
    moved = config_of_a_run("data.shards=[s3://bucket/*.tar]")
    check_state(state, moved, FEW | {"contents": "123"})
    for unknown in (FEW, FEW | {"contents": "124"}):
        with pytest.raises(ValueError, match="data.shards was .* when this run began and is .*bucket"):
            check_state(state, moved, unknown)
    config = config_of_a_run()
    check_state(state, config, FEW)  # the manifests are gone: the numbers of samples are what is left
    with pytest.raises(ValueError, match="by the sha256 of their manifests, different ones"):
        check_state(state, config, FEW | {"contents": "124"})
    old = {name: value for name, value in FEW.items() if name != "contents"}  # as versions before this wrote it
    check_state(state_of_a_run(data=old), config, FEW | {"contents": "124"})


def test_how_a_step_is_computed_may_change():
    """Also by settings that did not exist when the run began."""
    words = ["engine.zero_stage=2", "engine.threads=3", "engine.recompute=true", "engine.hang_seconds=9"]
    assert check_state(state_of_a_run(data=FEW), config_of_a_run(*words), FEW) == []


def test_what_run_allow_names_may_change_and_is_logged():
    state, lower = state_of_a_run(data=FEW), "optim.lr=0.0005"
    with pytest.raises(ValueError, match=r"optim.lr was 0.001 .* allow it with run.allow=\[optim.lr\], or begin anew"):
        check_state(state, config_of_a_run(lower), FEW)
    (line,) = check_state(state, config_of_a_run(lower, "run.allow=[optim.lr]"), FEW)
    assert line == "optim.lr is 0.0005 from now on, it was 0.001 (run.allow)"
    with pytest.raises(ValueError, match=r"data.batch_size was 64 .* is 32 now: set it back, allow it with run.allow"):
        check_state(state, config_of_a_run("data.batch_size=32"), FEW)
    (line,) = check_state(state, config_of_a_run("data.batch_size=32", "run.allow=[data.batch_size]"), FEW)
    assert line == "data.batch_size is 32 from now on, it was 64 (run.allow)"
    with pytest.raises(ValueError, match="run.allow names model.caption_dropout, expected settings of optim or engine"):
        config_of_a_run("run.allow=[model.caption_dropout]")


def test_more_pictures_are_allowed_too():
    """Those of the manifests, or of other numbers of samples."""
    known = FEW | {"contents": "123"}
    state, allowed = state_of_a_run(data=known), config_of_a_run("run.allow=[data.shards]")
    for more in (known | {"samples": 1}, known | {"contents": "124"}):
        with pytest.raises(ValueError, match=r"restore the data, allow it with run.allow=\[data.shards\], or give"):
            check_state(state, config_of_a_run(), more)
        (line,) = check_state(state, allowed, more)
        assert line.endswith("(run.allow)")


def test_a_setting_that_must_stay_says_what_keeps_the_weights():
    state = state_of_a_run(data=FEW)
    with pytest.raises(ValueError, match=r"begin anew under another run.name with model.start=runs/\w+, which keeps"):
        check_state(state, config_of_a_run("model.caption_dropout=0.5"), FEW)
    with pytest.raises(ValueError, match=r"begin anew under another run.name$"):
        check_state(state, config_of_a_run("model.denoiser.width=64", "model.denoiser.heads=2"), FEW)


def test_more_steps_under_a_schedule_that_ends_with_the_run_are_said():
    config = config_of_a_run("optim.schedule=cosine", "run.steps=100")
    state = replace(state_of_a_run(data=FEW, config=dump(config)), step=90)
    assert changed_schedule(state, config) == []
    (line,) = changed_schedule(state, config_of_a_run("optim.schedule=cosine", "run.steps=1000"))
    assert line.startswith("run.steps is 1000 from now on, it was 100: the schedule cosine ends with the run, so the")
    rate, before = (float(word) for word in re.findall(r"\d\.\d+e-\d+", line))
    assert before < 0.1 * rate
    assert changed_schedule(state, config_of_a_run("optim.schedule=constant", "run.steps=1000")) == []


@pytest.mark.parametrize(
    ("given", "then", "lanes", "logged"),
    [
        ("null", None, 8, "data.lanes is 8 by default"),
        ("4", None, 4, ""),
        ("null", 1, 1, "data.lanes is 1, as when this run began"),  # the default of version 0.1
        ("4", 4, 4, ""),
    ],
)
def test_the_number_of_lanes_is_recorded_and_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, then: int | None, lanes: int, logged: str
):
    config = config_of_a_run(f"data.lanes={given}", f"data.shards={ROOT}/data/emoji64/train/*.tar.gz")
    began = None if then is None else dump(replace(config, data=replace(config.data, lanes=then)))
    if began is not None:
        assert check_state(state_of_a_run(data=FEW, config=began), config, FEW) == []
    run, images = make_run(tmp_path), CaptionedImages(config.data, seed=0)
    settle_lanes(run, config, images, began)
    assert images.order.lanes == lanes and capsys.readouterr().out.strip() == logged
    assert read_tree(run.config_text)["data"]["lanes"] == lanes
    with pytest.raises(ValueError, match="data.lanes was .* when this run began and is 16 now: set it back"):
        check_state(state_of_a_run(data=FEW, config=run.config_text), config_of_a_run("data.lanes=16"), FEW)


def test_the_remedies_that_a_run_without_finite_batches_names_are_accepted():
    """As they stand in the message: each is a setting, and what allows it to differ on resume."""
    engine = object.__new__(Engine)
    engine.loss_scale, engine.step, engine.skipped_in_a_row = None, 10, SKIPPED_AT_MOST - 1
    with pytest.raises(NonFiniteError) as raised:
        engine._count("the loss is nan")
    remedies = re.findall(r"with (?:a lower )?(\S+) and (run\.allow=\S+\])", str(raised.value))
    assert remedies == [("optim.lr", "run.allow=[optim.lr]"), ("engine.precision=fp32", "run.allow=[engine.precision]")]
    for setting, allowed in remedies:
        word = setting if "=" in setting else f"{setting}=0.0005"
        assert len(check_state(state_of_a_run(data=FEW), config_of_a_run(word, allowed), FEW)) == 1
        with pytest.raises(ValueError, match="when this run began"):
            check_state(state_of_a_run(data=FEW), config_of_a_run(word), FEW)


def test_another_kind_of_training_is_refused():
    with pytest.raises(ValueError, match="this run is a training of kind vae, the configuration is of kind denoiser"):
        check_state(state_of_a_run(data=FEW, config="kind: vae\n"), config_of_a_run(), FEW)


def config_of_a_run(*words: str) -> TrainConfig:
    return load_config(TrainConfig, ROOT / "configs/demo.yaml", words)


def state_of_a_run(**changes: Any) -> TrainState:
    known = {"config": dump(config_of_a_run()), "data": {}, "step": 10, "position": 10, "precision": "fp32", "ranks": 1}
    return TrainState(**known | changes)


def test_what_is_published_may_change_and_no_credential_is_said():
    urls = (f"https://me:SECRET@host/a.tar?key={word}" for word in ("SECRET1", "SECRET2"))
    began, now = (config_of_a_run(f"data.shards=['{url}']") for url in urls)
    assert check_continues(then=dump(began), now=replace(began, publish=PublishConfig(license="mit"))) == []
    with pytest.raises(ValueError, match=r"data.shards was \['https://host/a.tar'\] when") as caught:
        check_continues(then=dump(began), now=now)
    assert "SECRET" not in str(caught.value)
