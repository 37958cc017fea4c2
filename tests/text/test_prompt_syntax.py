"""The syntax of other programs in prompts: tags, and what is drawn as words."""

import pytest

from text.prompt_syntax import LoraTag, unread, without_tags


@pytest.mark.parametrize(
    ("prompt", "text", "loras"),
    [
        ("a cat <lora:style:0.8>", "a cat ", [("style", 0.8, 0.8)]),
        ("<lora:a>b<lyco:c:0.5:0.25>", "b", [("a", 1, 1), ("c", 0.5, 0.25)]),
        ("<lora:my style v1.0:-1>", "", [("my style v1.0", -1, -1)]),
        ("<lora:a:te=0.5:unet=0.2>", "", [("a", 0.5, 0.2)]),
        ("<lora:a:0.7:unet=0.2:dyn=4>", "", [("a", 0.7, 0.2)]),
        ("a <b> c", "a <b> c", []),
        ("1 < 2: x > y", "1 < 2: x > y", []),
    ],
)
def test_loras_are_taken_out(prompt: str, text: str, loras: list[tuple[str, float, float]]):
    found = without_tags(prompt, all_kinds=True)
    assert found.text == text and not found.others
    assert [(tag.name, tag.text_strength, tag.denoiser_strength) for tag in found.loras] == loras
    assert all(isinstance(tag, LoraTag) and tag.written in prompt for tag in found.loras)


@pytest.mark.parametrize("strength", ["", "x", "nan", "1000", "0.8.1"])
def test_a_strength_that_is_no_number_is_refused(strength: str):
    with pytest.raises(ValueError, match=r"the strength in <lora:a:.*> is '.*', expected a number from -100 to 100"):
        without_tags(f"a <lora:a:{strength}>", all_kinds=False)


def test_other_tags_are_named():
    assert without_tags("x <hypernet:y:1>", all_kinds=False)[0::2] == ("x ", ["<hypernet:y:1>"])
    assert without_tags("x <other:y>", all_kinds=True)[0::2] == ("x ", ["<other:y>"])
    assert without_tags("x <other:y>", all_kinds=False)[0::2] == ("x <other:y>", [])
    assert without_tags("x <cat:toy>", all_kinds=True, kept=lambda tag: tag == "<cat:toy>").text == "x <cat:toy>"


SYNTAX = {
    "a (red:1.3) apple": "(red:1.3)",
    "a ((red)) apple": "((red))",
    "a (((red))) apple": "((red))",
    "[[fog]]": "[[fog]]",
    "[a:b:0.5]": "[a:b:0.5]",
    "[b:0.5]": "[b:0.5]",
    "[a::7]": "[a::7]",
    "[:b:7]": "[:b:7]",
    "[a|b]": "[a|b]",
    "a cat BREAK a dog": "BREAK",
    "a cat AND a dog": "AND",
    "(very big cat : .9)": "(very big cat : .9)",
}


@pytest.mark.parametrize("prompt", SYNTAX)
def test_syntax_of_weighting_is_named(prompt: str):
    (shown,) = unread(prompt, weighting="none", tags=False)["weighting"]
    assert SYNTAX[prompt].strip() in shown or shown.split()[1] == SYNTAX[prompt]
    assert unread(prompt, weighting="a1111", tags=True) == {}


@pytest.mark.parametrize(
    "prompt",
    [
        "a (cat)", "(a cat), (a dog)", "[a cat]", "a photo (taken at 10:30)", "[12:45] a train", "(ratio 3:2)",
        "a cat: it sleeps", "C&A, 1 < 2 > 0", "TAKE A BREAK", "CATS AND DOGS", "R AND D", "a :) face (smiling)", "x|y",
        "a {cat}", "snake_case __init__.py", "(see fig. 2)", "embedding a wall", "", "f(g(x))", "don't [sic]",
    ],
)  # fmt: skip
def test_plain_text_is_not_syntax(prompt: str):
    assert unread(prompt, weighting="none", tags=False) == {}
    assert unread(prompt, weighting="a1111", tags=True) == {}


def test_what_has_another_remedy_or_none_is_named():
    prompt = "<lora:a:1> embedding:foo, (embedding:bar:1.2) {x|y} __animal__ {{z}}"
    found = unread(prompt, weighting="a1111", tags=False, embeddings={"embedding:bar"})
    assert found == {
        "lora": ["<lora:a:1>"],
        "embedding": ["embedding:foo"],
        "": ["{x|y}", "{{z}}", "__animal__"],
    }
