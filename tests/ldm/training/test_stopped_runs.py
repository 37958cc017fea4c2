"""A run is what its newest valid checkpoint says, for whoever reads it and however it was stopped."""

from __future__ import annotations

import pytest
from helpers.forking import ROOT
from helpers.stopped_runs import Stop, Workshop, check_readers, random_stops


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, few_emoji: str) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("stopped"), few_emoji, ROOT / "weights/emoji64")


@pytest.mark.filterwarnings("ignore:checkpoint .* is damaged")
@pytest.mark.parametrize(
    "stop", random_stops(10, seed=17), ids=lambda stop: f"{stop.training}-{stop.signal}-{stop.step}"
)
def test_who_reads_a_stopped_run_reads_its_newest_checkpoint(workshop: Workshop, stop: Stop):
    step = check_readers(workshop, stop, train_on=stop.signal == "SIGINT")
    if stop.signal == "SIGKILL":
        assert step % 3 == 0 and 0 < step <= stop.step  # the last checkpoints may not have been complete
    elif stop.damage:
        assert step < stop.step + 1
    else:  # a signal is obeyed after the next step
        assert step == stop.step + (stop.signal != "none")
