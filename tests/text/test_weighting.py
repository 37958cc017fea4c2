"""Prompt weights: the grammar, by cases and against random trees. Chunks and emphasis: test_weighting_chunks.py."""

import time
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from text import Tokenizer, TokenizerConfig
from text.weighting import chunk_count, parse_weights, tokenize_weighted

TOKENIZER = Tokenizer(TokenizerConfig(pad_id=0))


def pieces(prompt: str) -> list[tuple[str, float]]:
    (section,) = parse_weights(prompt)
    return [(text, round(weight, 9)) for text, weight in section]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
        ("[less] [[least]]", [("less", 0.909090909), (" ", 1), ("least", 0.826446281)]),
        ("a [unbalanced", [("a ", 1), ("unbalanced", 0.909090909)]),
        ("((a (b:2) c:3)", [("a ", 3.3), ("b", 6.6), (" c", 3.3)]),
        ("([[([x])]])", [("x", 0.909090909)]),
        ("[(a)] ((([[[b]]]))) c", [("a b c", 1)]),
        ("(a [b) c] d", [("a ", 1.1), ("b", 1), (" c", 0.909090909), (" d", 1)]),
        ("[a (b] c:2) d", [("a ", 0.909090909), ("b", 1.818181818), (" c", 2), (" d", 1)]),
        ("a) b] c :1.3)", [("a) b] c :1.3)", 1)]),
        ("(a) b)", [("a", 1.1), (" b)", 1)]),
        ("[a)", [("a)", 0.909090909)]),
        ("(x: +1.5 )(y:-.5)(z:2.)", [("x", 1.5), ("y", -0.5), ("z", 2)]),
        ("(x:0)", [("x", 0)]),
        ("(a:1)b", [("ab", 1)]),
        ("(x:abc)", [("x:abc", 1.1)]),
        ("(x:1.2.3)(x:)(x:1e3)(x:.)", [("x:1.2.3x:x:1e3x:.", 1.1)]),
        ("(a:1.3, b)", [("a:1.3, b", 1.1)]),
        ("(a:1.3", [("a:1.3", 1.1)]),
        ("[a:1.3] a:b:0.5", [("a:1.3", 0.909090909), (" a:b:0.5", 1)]),
        ("(16:9:1.5)", [("16:9", 1.5)]),
        (r"(a\)b)", [("a)b", 1.1)]),
        (r"\[\\\)", [("[\\)", 1)]),
        (r"\\(a)", [("\\", 1), ("a", 1.1)]),
        (r"\m/ a\ ", [("m/ a ", 1)]),
        ("a\\", [("a", 1)]),
        ("\\", []),
        ("", []),
        ("()[](:2)", []),
        ("line\n(two\nthree)", [("line\n", 1), ("two\nthree", 1.1)]),
    ],
)  # fmt: skip
def test_grammar(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert pieces(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a BREAK b", [[("a ", 1)], [(" b", 1)]]),
        ("BREAK", [[], []]),
        ("BREAK\n\tBREAK a", [[], [("\n\t", 1)], [(" a", 1)]]),
        ("(a BREAK b:2) c", [[("a ", 2)], [(" b", 2), (" c", 1)]]),
        ("(a)BREAK[b]", [[("a", 1.1)], [("b", 1 / 1.1)]]),
        ("break Break BREAKS xBREAK BREAK_", [[("break Break BREAKS xBREAK BREAK_", 1)]]),
        ("a,BREAK, b", [[("a,", 1)], [(", b", 1)]]),
    ],
)
def test_break_separates_sections(prompt: str, expected: list[list[tuple[str, float]]]) -> None:
    assert parse_weights(prompt) == expected


class Text(NamedTuple):
    text: str


class Group(NamedTuple):
    number: float | None
    square: bool
    children: list["Text | Group"]


def groups(children: st.SearchStrategy) -> st.SearchStrategy:
    inside = st.lists(children, max_size=4)
    number = st.none() | st.integers(-20, 20).map(lambda n: n / 10)
    return st.builds(Group, number, st.just(False), inside) | st.builds(Group, st.none(), st.just(True), inside)


TREES = st.recursive(st.text("ab B()[]\\1.é\n", max_size=6).map(Text), groups, max_leaves=12)


def written(node: Text | Group) -> str:
    if isinstance(node, Text):
        return "".join("\\" + c if c in "()[]\\" else c for c in node.text)
    inside = "".join(written(child) for child in node.children)
    if node.square:
        return f"[{inside}]"
    return f"({inside})" if node.number is None else f"({inside}:{node.number})"


def weighted_characters(node: Text | Group, weight: float = 1.0) -> list[tuple[str, float]]:
    if isinstance(node, Text):
        return [(character, weight) for character in node.text]
    factor = 1 / 1.1 if node.square else 1.1 if node.number is None else node.number
    return [pair for child in node.children for pair in weighted_characters(child, weight * factor)]


@given(st.lists(TREES, max_size=4))
def test_random_trees_are_read_as_they_were_written(trees: list[Text | Group]) -> None:
    expected = [pair for tree in trees for pair in weighted_characters(tree)]
    prompt = "".join(written(tree) for tree in trees)
    if any(abs(weight) > 99.999 for _, weight in expected):
        return
    (section,) = parse_weights(prompt)
    assert "".join(piece.text for piece in section) == "".join(character for character, _ in expected)
    weights = [piece.weight for piece in section for _ in piece.text]
    assert weights == pytest.approx([weight for _, weight in expected], abs=1e-9)
    assert all(piece.text for piece in section)
    assert all(a.weight != b.weight for a, b in zip(section, section[1:], strict=False))


@given(st.text(st.characters(blacklist_characters="()[]\\")))
def test_text_without_brackets_is_itself(prompt: str) -> None:
    assert pieces(prompt) == ([(prompt, 1)] if prompt else [])


@given(st.lists(st.sampled_from([*"()[]\\:1.0-+ ,aB\n\ud800", "BREAK", ":2)"]) | st.characters()).map("".join))
def test_any_text_is_read_and_loses_only_syntax(prompt: str) -> None:
    try:
        sections = parse_weights(prompt)
    except ValueError as error:
        assert "has weight" in str(error)
        return
    text = "".join(piece.text for section in sections for piece in section)
    rest = iter(prompt)
    assert all(character in rest for character in text)  # in the same order
    breaks = "BREAK" * (len(sections) - 1)
    assert sorted(filter(str.isalpha, text + breaks)) == sorted(filter(str.isalpha, prompt))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a (cat\nx:100.5) b", r"'cat\nx' has weight 100.5"),
        ("(cat:-101)", "'cat' has weight -101"),
        ("(cat:" + "9" * 400 + ")", "'cat' has weight inf"),
        ("((cat:0):" + "9" * 400 + ")", "'cat' has weight nan"),
        ("(" * 49 + "cat", "'cat' has weight 106.719"),
        ("(" * 10000 + "cat", "'cat' has weight "),
        ("(" + "cat " * 50 + ":200)", f"'{('cat ' * 50)[:37]}...' has weight 200"),
        ("a BREAK (b:101)", "'b' has weight 101"),
    ],
)
def test_refuses_weights_out_of_bounds(prompt: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_weights(prompt)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value) and "from -100 to 100" in str(caught.value)
    with pytest.raises(ValueError, match="has weight"):
        tokenize_weighted(TOKENIZER, prompt)


@pytest.mark.parametrize("prompt", ["(cat:100) (dog:-100)", "[" * 10000 + "cat", "(" * 48 + "cat", "(:1000)cat"])
def test_takes_weights_within_bounds(prompt: str) -> None:
    parse_weights(prompt)


@pytest.mark.parametrize(
    "unit",
    ["(", "[", ")", ":", " ", "B", "\\", "1", ": ", ":1 ", "(:1", "[(", "(a)", "(a[b)c]", "(x:2)", "BREAK ", ":1.1"],
)
def test_hostile_prompts_take_linear_time(unit: str) -> None:
    begin = time.process_time()
    for prompt in (unit * (50_000 // len(unit)), ":" + unit * (50_000 // len(unit)) + "x"):
        try:
            parse_weights(prompt)
        except ValueError as error:
            assert "has weight" in str(error)
    assert time.process_time() - begin < 3  # a tenth of a second; minutes where the effort is quadratic


def test_ten_thousand_brackets_and_back() -> None:
    assert parse_weights("(" * 10000 + ")" * 10000 + "x") == [[("x", 1)]]
    assert pieces("([" * 5000 + "x" + "])" * 5000) == [("x", 1)]
    assert chunk_count(TOKENIZER, "(a) " * 2500) == 34  # 2500 / 75, rounded up
