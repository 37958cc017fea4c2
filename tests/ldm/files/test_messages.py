"""One line, the nearest name, and what does not fit."""

import pytest

from ldm.files.messages import describe_misfit, did_you_mean, one_line, printable, some, unknown_name


def test_one_line():
    assert one_line(ValueError("x is 1,\n  expected 2")) == "x is 1, expected 2"
    assert one_line(ValueError("x" * 400), 300) == "x" * 300
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_what_a_terminal_would_obey_is_escaped():
    assert printable("a\nb\x1b[31m\u202ec\x9b") == r"a\nb\x1b[31m\u202ec\x9b"
    assert printable("👩\u200d🚀 ❤\ufe0f é") == "👩\u200d🚀 ❤\ufe0f é"
    assert printable("abcdef", 3) == "abc..." and printable("abc", 3) == "abc"


def test_the_nearest_name():
    assert did_you_mean("hein", ["heun", "ddim"]) == "heun"
    assert did_you_mean("zzz", ["heun", "ddim"]) is None


@pytest.mark.parametrize(("given", "hint"), [("HEIN", ", did you mean Heun?"), ("zzz", ":")])
def test_an_unknown_name_lists_all(given: str, hint: str):
    error = unknown_name("sampler", given, {"heun": "Heun", "heun2": "Heun", "ddim": "DDIM"})
    assert str(error) == f"no sampler {given!r}{hint} There are Heun, DDIM"


def test_a_long_list_is_cut():
    assert some("fedcba") == "a, b, c, d, e, ..." and some("ba") == "a, b"


def test_what_does_not_fit():
    wanted = {"a": (2, 3), "b": (4,), "c": (1,)}
    assert describe_misfit(wanted, dict(wanted)) == ""
    found = {"a": (3, 2), "b": (4,), "d": (1,)}
    assert describe_misfit(wanted, found) == "1 missing (c); 1 unexpected (d); 1 of another shape (a (3, 2) for (2, 3))"
