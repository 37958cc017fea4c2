"""How a picture is drawn: what is refused, and by which words."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from ldm.inference.options import SCHEDULES, DrawOptions, parse_lora_argument
from ldm.samplers.guidance import Schedule


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eta": 1.5}, "eta is 1.5, expected 0 to 1"),
        ({"eta": float("nan")}, "eta is nan, expected 0 to 1"),
        ({"guidance_rescale": -0.1}, "guidance rescale is -0.1, expected 0 to 1"),
        ({"guidance_parallel": 1.1}, "guidance parallel is 1.1, expected 0 to 1"),
        (
            {"guidance_schedule": "cosin"},
            "no guidance schedule 'cosin', did you mean cosine. There are constant, linear",
        ),
        ({"guidance_schedule": "zz"}, "no guidance schedule 'zz': There are constant, linear, cosine"),
        ({"guidance_interval": (0.7, 0.3)}, "the guidance interval is 0.7 to 0.3, expected 0 <= start <= stop <= 1"),
        ({"guidance_interval": (0.0, 2.0)}, "the guidance interval is 0 to 2"),
        ({"guidance_norm_limit": 0.0}, "guidance norm limit is 0.0, expected a length above 0"),
        ({"guidance_momentum": -1.0}, "guidance momentum is -1.0, expected more than -1 and less than 1"),
        ({"guidance_rescale": 0.5, "guidance_parallel": 0.0}, "use one of them"),
        ({"time_grid": "1, 0.2, 0.5, 0"}, "the time grid is 1, 0.2, 0.5, 0, expected two or more times that fall"),
        ({"time_grid": "1, 0.2"}, "the time grid is 1, 0.2, expected two or more times that fall from at most 1 to 0"),
        ({"time_grid": "1, x, 0"}, "the time grid is '1, x, 0', expected numbers, such as 1,0.6,0.3,0"),
        ({"time_grid": "nan, 0"}, "the time grid is nan, 0, expected"),
    ],
)
def test_what_is_out_of_range_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        DrawOptions(**change)


def test_a_grid_is_a_name_or_times():
    assert DrawOptions().grid is None and DrawOptions().times is None
    assert DrawOptions(time_grid="karras").grid == "karras"
    assert DrawOptions(time_grid="1, 0.5,0").grid == (1.0, 0.5, 0.0)


def test_the_schedules_are_those_of_guidance():
    assert get_args(Schedule) == SCHEDULES


def test_projection_is_asked_for_by_any_of_its_numbers():
    assert not DrawOptions(guidance_rescale=0.5).is_projected
    assert DrawOptions(guidance_parallel=0.5).is_projected
    assert DrawOptions(guidance_norm_limit=2.0).is_projected
    assert DrawOptions(guidance_momentum=0.1).is_projected


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("style.safetensors:0.8", "style.safetensors", 0.8),
        ("style.safetensors:-1", "style.safetensors", -1.0),
        ("style.safetensors:0", "style.safetensors", 0.0),
        ("a/b:c/style.safetensors", "a/b:c/style.safetensors", 1.0),
        ("a/b:c/style.safetensors:1e-1", "a/b:c/style.safetensors", 0.1),
        (r"C:\loras\style.safetensors", r"C:\loras\style.safetensors", 1.0),
        (r"C:\loras\style.safetensors:100", r"C:\loras\style.safetensors", 100.0),
        ("style:high", "style:high", 1.0),
        ("style:", "style:", 1.0),
        ("style:2:0.5", "style:2", 0.5),
    ],
)
def test_a_lora_is_a_file_and_perhaps_a_strength(text, path, strength):
    assert parse_lora_argument(text) == (Path(path), strength)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x.pt:100.5", "the strength of LoRA x.pt is 100.5, expected -100 to 100"),
        ("x.pt:-101", "the strength of LoRA x.pt is -101, expected"),
        ("x.pt:nan", "the strength of LoRA x.pt is nan, expected"),
        ("x.pt:inf", "the strength of LoRA x.pt is inf, expected"),
        (":0.8", "the LoRA is ':0.8', expected a file, or a file with its strength"),
        ("", "the LoRA is '', expected a file"),
        (" ", "the LoRA is ' ', expected a file"),
    ],
)
def test_a_lora_without_a_file_or_far_too_strong_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_lora_argument(text)


def test_torch_is_not_needed_to_parse_arguments():
    script = "import sys, ldm.inference.options; print('torch' in sys.modules)"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
