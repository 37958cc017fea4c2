"""Prompts that change over the steps, against A1111's rules."""

import random
import time

import pytest
from helpers.a1111_prompts import balanced_prompt, schedules, text_at

from text.schedule import Part, Segment, compose, prompt_schedule, segment_at

# The examples in modules/prompt_parser.py of A1111, for 10 steps.
EXAMPLES: dict[str, list[tuple[int, str]]] = {
    "test": [(10, "test")],
    "a [b:3]": [(3, "a "), (10, "a b")],
    "a [b: 3]": [(3, "a "), (10, "a b")],
    "a [[[b]]:2]": [(2, "a "), (10, "a [[b]]")],
    "[(a:2):3]": [(3, ""), (10, "(a:2)")],
    "a [b : c : 1] d": [(1, "a b  d"), (10, "a  c  d")],
    "a[b:[c:d:2]:1]e": [(1, "abe"), (2, "ace"), (10, "ade")],
    "a [unbalanced": [(10, "a [unbalanced")],
    "a [b:.5] c": [(5, "a  c"), (10, "a b c")],
    "a [{b|d{:.5] c": [(10, "a [{b|d{:.5] c")],  # lark 1.3 reads it so, not as A1111 has it in its comment
    "((a][:b:c [d:3]": [(3, "((a][:b:c "), (10, "((a][:b:c d")],
    "[a|(b:1.1)]": [(step, ("a", "(b:1.1)")[(step - 1) % 2]) for step in range(1, 11)],
    "[fe|]male": [(step, ("female", "male")[(step - 1) % 2]) for step in range(1, 11)],
    "[fe|||]male": [(step, ("female", "male", "male", "male")[(step - 1) % 4]) for step in range(1, 11)],
}


@pytest.mark.parametrize("prompt", EXAMPLES)
def test_a1111s_own_examples(prompt: str):
    assert prompt_schedule(prompt, 10) == EXAMPLES[prompt]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("[a:b:0.5]", [(5, "a"), (10, "b")]),
        ("[a::0.5]", [(5, "a"), (10, "")]),
        ("[b:0.5]", [(5, ""), (10, "b")]),
        ("[a:b:7]", [(7, "a"), (10, "b")]),
        ("[a:b:1.0]", [(10, "a")]),  # a point makes it a fraction: all steps
        ("[a:b:1]", [(1, "a"), (10, "b")]),  # without one it counts steps
        ("[a:b:0.05]", [(10, "b")]),
        ("[a:b:-3]", [(10, "b")]),
        ("[a:b:12]", [(10, "a")]),
        ("[a:b:1e400]", [(10, "a")]),
        ("[a:b:-1e400]", [(10, "b")]),
        (r"\[a:b:0.5\]", [(10, r"\[a:b:0.5\]")]),
        ("x | [a:b:0.5]", [(10, "x | [a:b:0.5]")]),
        ("[a:b:0.5]\\", [(10, "[a:b:0.5]\\")]),
        ("([a:b:0.5]:1.2)", [(5, "(a:1.2)"), (10, "(b:1.2)")]),
        ("[a|[b|c]]", [(s, "a" if s % 2 else "c") for s in range(1, 11)]),
        ("", [(10, "")]),
    ],
)
def test_changes_at_the_step_of_their_number(prompt: str, expected: list[tuple[int, str]]):
    assert prompt_schedule(prompt, 10) == expected


def test_balanced_prompts_change_as_in_a1111():
    rng, edited = random.Random(1), 0
    for _ in range(5000):
        prompt, steps = balanced_prompt(rng), rng.choice([1, 2, 3, 10, 30])
        found = prompt_schedule(prompt, steps)
        assert [list(segment) for segment in found] == schedules(prompt, steps), (prompt, steps)
        edited += len(found) > 1
        step = rng.randrange(2 * steps)
        assert found[segment_at(found, step)].text == text_at([list(segment) for segment in found], step)
    assert edited > 1500


def test_a_segment_lasts_until_the_evaluation_of_its_end():
    """A1111 counts evaluations from 0 and compares with <=, so the first of two lasts one longer."""
    found = [Segment(3, "a"), Segment(10, "b")]
    assert [segment_at(found, step) for step in (0, 3, 4, 9, 10, 99)] == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("prompt", ["[" * 5000, "(" * 5000 + ")" * 5000, "[" * 3000 + ":1]" * 3000, "[a|" * 3000])
def test_is_fast_for_any_nesting(prompt: str):
    start = time.perf_counter()
    prompt_schedule(prompt, 20)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", [("a cat", 1)]),
        ("a clock at 10:30", [("a clock at 10:30", 1)]),
        ("a cat AND a dog", [("a cat", 1), (" a dog", 1)]),
        ("a cat :0.5 AND a dog: -1.5", [("a cat", 0.5), (" a dog", -1.5)]),
        ("a AND b:.7 AND c:x", [("a", 1), (" b", 0.7), (" c:x", 1)]),
        ("SAND AND ANDY", [("SAND", 1), (" ANDY", 1)]),
        ("a and b", [("a and b", 1)]),
    ],
)
def test_and_joins_prompts(prompt: str, expected: list[tuple[str, float]]):
    assert compose(prompt) == [Part(*part) for part in expected]
