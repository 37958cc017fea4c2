"""Prompt files: kohya's and A1111's options, what is skipped, and what is refused."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.inference.prompt_file import MAX_FILE_BYTES, OPTION, parse_line, read_prompts
from ldm.inference.request import MAX_CHARACTERS, MAX_SEED, MAX_SIDE, MAX_STEPS, DrawRequest

DEFAULTS = DrawRequest(negative_prompt="blurry", steps=12, scale=2.0, sampler="ddim", seed=5, height=32, width=48)


def parse(line: str) -> dict[str, object]:
    """What the line changes in the defaults."""
    request = parse_line(line, DEFAULTS, place="")
    return {name: value for name, value in vars(request).items() if value != getattr(DEFAULTS, name)}


def read(tmp_path, content: str | bytes) -> list[DrawRequest]:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_prompts(file, DEFAULTS)


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("a red apple", {"prompt": "a red apple"}),
        ("a cat --n dog, hat --w 96 --h 64 --s 20 --d 7 --l 3.5",
         {"prompt": "a cat", "negative_prompt": "dog, hat", "width": 96, "height": 64, "steps": 20, "seed": 7,
          "scale": 3.5}),
        ('--prompt "a cat" --negative_prompt "dog, hat" --width 96 --height 64 --steps 20 --seed 7 --cfg_scale 3.5 '
         '--sampler_name "DPM++ 2M"',
         {"prompt": "a cat", "negative_prompt": "dog, hat", "width": 96, "height": 64, "steps": 20, "seed": 7,
          "scale": 3.5, "sampler": "DPM++ 2M"}),
        ("a cat --negative-prompt dog --N_is_no_option", None),
        ("a cat --S 9 --negative-prompt dog", {"prompt": "a cat", "steps": 9, "negative_prompt": "dog"}),
        ("a cat --d -1", {"prompt": "a cat", "seed": -1}),
        ("a cat --n", {"prompt": "a cat", "negative_prompt": ""}),
        ("a cat --n --s 9", {"prompt": "a cat", "negative_prompt": "", "steps": 9}),
        ('--prompt "" --s 9', {"steps": 9}),
        (r'--prompt "a \"cat\" \\ x"', {"prompt": r'a "cat" \ x'}),
        ("--prompt 'a --s 3 cat' --s 4", {"prompt": "a --s 3 cat", "steps": 4}),
        ('--prompt "a --s 3 cat" --s 4', {"prompt": "a --s 3 cat", "steps": 4}),
        ('--prompt "a" and "b" --s 4', {"prompt": '"a" and "b"', "steps": 4}),
        ("--prompt 'tis a cat --s 4", {"prompt": "'tis a cat", "steps": 4}),
        ("a cat -- or dog--s 3, --5 of them", {"prompt": "a cat -- or dog--s 3, --5 of them"}),
        ('"quoted" cat', {"prompt": '"quoted" cat'}),
    ],
)  # fmt: skip
def test_line(line, changes):
    if changes is None:
        with pytest.raises(ValueError, match="unknown option --N_is_no_option"):
            parse(line)
    else:
        assert parse(line) == changes


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=40)


@given(TEXT, TEXT)
def test_quoted_texts_survive_whatever_they_hold(prompt, negative):
    def quote(text: str) -> str:
        return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'

    line = f"--prompt {quote(prompt)} --n {quote(negative)} --s 3"
    request = parse_line(line, DEFAULTS, place="")
    assert (request.prompt, request.negative_prompt, request.steps) == (prompt, negative, 3)


@given(TEXT.filter(lambda text: text.strip() and not OPTION.search(text)))
def test_a_line_without_options_is_its_prompt(prompt):
    assert parse_line(prompt, DEFAULTS, place="").prompt == prompt.strip()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_file(tmp_path, end):
    lines = ["# a comment", "a red apple", "", "   ", "  # another", " 🍎 é --s 9 ", "x\u2028y"]
    requests = read(tmp_path, b"\xef\xbb\xbf" + end.join(lines).encode())
    assert [(r.prompt, r.steps) for r in requests] == [("a red apple", 12), ("🍎 é", 9), ("x\u2028y", 12)]
    assert [r.place for r in requests] == [f"{tmp_path}/prompts.txt, line {n}: " for n in (2, 6, 7)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "contains no prompt"),
        ("# only this\n\n", "contains no prompt"),
        ("a\nb --s 0", r"prompts.txt, line 2: steps is 0, expected 1 to 1000"),
        ("a --s 9.5", "line 1: --s is '9.5', expected a whole number"),
        ("a --l much", "line 1: --l is 'much', expected a number"),
        ("a --w", "line 1: --w is '', expected a whole number"),
        ("a --v 5", "line 1: unknown option --v, expected one of --prompt, --n, "),
        ("a --s 9 --steps 8", "line 1: steps is given twice"),
        ("a --prompt b", "line 1: prompt is given twice"),
        ("--s 9", "line 1: there are options but no prompt"),
        (b"a\0b", "line 1: the prompt is .*, with a zero byte"),
        ("ä".encode("utf-16"), "is not a text file with one prompt per line in UTF-8"),
        (b" " * (MAX_FILE_BYTES + 1), f"expected a text file with one prompt per line of at most {MAX_FILE_BYTES}"),
    ],
)
def test_file_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, content)


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.txt is missing: give a text file with one prompt per line"):
        read_prompts(tmp_path / "missing.txt", DEFAULTS)
    for path in (tmp_path, type(tmp_path)("/dev/zero")):
        with pytest.raises(ValueError, match="is not a plain file"):
            read_prompts(path, DEFAULTS)


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("steps", [1, MAX_STEPS], [0, -1, MAX_STEPS + 1]),
        ("scale", [0.0, 1e-30, 50.0], [-0.1, float("nan"), float("inf")]),
        ("seed", [-1, 0, MAX_SEED], [-2, MAX_SEED + 1]),
        ("height", [None, 1, MAX_SIDE], [0, -8, MAX_SIDE + 1]),
        ("width", [None, 1, MAX_SIDE], [0, -8, MAX_SIDE + 1]),
        ("prompt", ["", "x" * MAX_CHARACTERS, "\n\t"], ["x" * (MAX_CHARACTERS + 1), "\0", "\udc80"]),
        ("negative_prompt", ["", "x" * MAX_CHARACTERS], ["x" * (MAX_CHARACTERS + 1), "\0", "\udc80"]),
    ],
)
def test_ranges(field, good, bad):
    for value in good:
        DrawRequest(**{field: value})
    for value in bad:
        with pytest.raises(ValueError, match=f"{field.replace('_', ' ')} (is|has)"):
            DrawRequest(**{field: value})
