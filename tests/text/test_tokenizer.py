"""The tokenizer against its two oracles, transformers' CLIPTokenizer and open_clip's SimpleTokenizer."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import text.tokenizer
from text.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, mask_to_eos, save_tokenizer

FILES = ["merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
PLAIN = [
    "a red apple",
    "",
    "   ",
    "It's the dog's; they've, we'll, I'd, you're, I'm, can't. DON'T",
    "naïve café ÅNGSTRÖM straße ½ ² Ⅷ ٣",
    "猫が座っている 日本語 한국어 العربية हिन्दी ไทย Ελληνικά",
    "👩‍👩‍👧‍👦 🏳️‍🌈 😀 🇫🇷 ☃️ 🧑🏽‍🚀",
    "what?? (really) -- 3.14, 1234; a/b #tag @user $5 50% [x] {y} ~ ^ |",
    "two  spaces, a\ttab and a\nnew line",
    "e\u0301 and \u00e9 " + "a\u0300\u0301\u0302" * 20,
    "word " * 200,
    "a" * 300,
    "🧑🏽‍🚀" * 40,
]
DAMAGED = [
    "wow!!! stop! a!b",
    "1 < 2 &amp;amp; 3",
    "salt &amp; pepper &lt;b&gt; caf&eacute; &amp;amp; &#39;",
    "“curly” it’s ‘x’ … ﬁne ｆｕｌｌ",
    "doÃ±a â€™ mojibake",
    "İstanbul ΟΔΟΣ Σίσυφος",
    "line\r\n\u3000x\u00a0y\u2028z\x1c\x85w",
    "zero\u200bwidth \u202ertl NUL\x00 in",
]
SPECIAL = ["a <|startoftext|> b <|endoftext|> c", "<|ENDOFTEXT|>", "<start_of_text>"]


@pytest.fixture(scope="module", params=[49407, 0], ids=["pad49407", "pad0"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(TokenizerConfig(pad_id=request.param))


@pytest.fixture(scope="module")
def default() -> Tokenizer:
    return Tokenizer(TokenizerConfig())


@pytest.fixture(scope="module")
def open_clip_tokenizer() -> Callable[..., torch.Tensor]:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@pytest.fixture(scope="module")
def saved(default: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tokenizer"
    save_tokenizer(default, folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the default tokenizer's five files, for a test to spoil."""
    return shutil.copytree(saved, tmp_path / "tokenizer")


def up_to_eos(ids: torch.Tensor) -> list[int]:
    row = ids.tolist()
    return row[: row.index(49407) + 1]


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    blocks = [(32, 127), (0xA0, 0x250), (0x370, 0x500), (0x3040, 0x30FF), (0x1F300, 0x1F700), (0, 0xD800)]
    return ["".join(chr(rng.randrange(*rng.choice(blocks))) for _ in range(rng.randrange(60))) for _ in range(count)]


def hugging_face(folder: Path, kind: str) -> Any:
    import transformers

    return getattr(transformers, kind).from_pretrained(str(folder), local_files_only=True)


@pytest.mark.parametrize("kind", ["CLIPTokenizer", "AutoTokenizer"])
def test_saved_folder_gives_transformers_the_same_ids(tokenizer: Tokenizer, kind: str, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    theirs = hugging_face(tmp_path, kind)
    texts = PLAIN + DAMAGED + SPECIAL + random_texts(500)
    output = theirs(texts, padding="max_length", truncation=True, return_tensors="pt")
    ids = tokenizer(texts)
    assert torch.equal(ids, output.input_ids)
    assert theirs.model_max_length == 77
    assert theirs.pad_token_id == tokenizer.config.pad_id
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id) == (49406, 49407)
    whole = len(PLAIN + DAMAGED)  # a literal <|endoftext|> ends our mask, where transformers' covers all text
    assert torch.equal(mask_to_eos(ids, 49407)[:whole], output.attention_mask[:whole].bool())


def test_open_clip_gives_the_same_ids_with_padding_0(
    open_clip_tokenizer: Callable[..., torch.Tensor],
) -> None:
    assert torch.equal(Tokenizer(TokenizerConfig(pad_id=0))(PLAIN), open_clip_tokenizer(PLAIN))


def test_ids_of_a_known_caption(default: Tokenizer) -> None:
    ids = default(["a photo of a cat", ""])
    assert ids.shape == (2, 77) and ids.dtype == torch.int64
    assert ids[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert ids[1].tolist() == [49406] + [49407] * 76
    assert default([]).shape == (0, 77)


def test_exclamation_mark_is_a_word_unless_it_is_the_padding(default: Tokenizer) -> None:
    padded_with_0 = Tokenizer(TokenizerConfig(pad_id=0))
    assert default(["stop!"])[0, :4].tolist() == [49406, 1691, 256, 49407]
    assert padded_with_0(["stop!"])[0, :5].tolist() == [49406, 1691, 0, 49407, 0]


def test_long_captions_keep_the_eos_and_tell_what_was_cut() -> None:
    tokenizer = Tokenizer(TokenizerConfig(context_length=8, pad_id=0))
    fits, long = "one two three four five six", "one two three four five six seven EIGHT"
    ids = tokenizer([fits, long])
    assert ids.shape == (2, 8)
    assert torch.equal(ids[0], ids[1]) and ids[0, -1] == 49407
    assert [tokenizer.cut_off(text) for text in ("", fits, long)] == ["", "", "seven EIGHT"]


def test_mask_ends_with_the_first_eos() -> None:
    ids = torch.tensor([[49406, 5, 49407, 49407], [49406, 49407, 5, 49407], [49406, 5, 6, 7]])
    expected = [[True, True, True, False], [True, True, False, False], [True, True, True, True]]
    assert mask_to_eos(ids, 49407).tolist() == expected


def test_pickled_tokenizer_gives_the_same_ids(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert torch.equal(copy(PLAIN + DAMAGED), tokenizer(PLAIN + DAMAGED))
    assert copy.config == tokenizer.config


def test_saved_bytes_are_the_same_each_time_and_after_loading(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path / "a")
    loaded = load_tokenizer(tmp_path / "a")
    save_tokenizer(loaded, tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == FILES
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in FILES)
    assert loaded.config == tokenizer.config
    assert torch.equal(loaded(PLAIN + DAMAGED + SPECIAL), tokenizer(PLAIN + DAMAGED + SPECIAL))
    assert list(json.loads((tmp_path / "a" / "vocab.json").read_text("utf-8")).values()) == list(range(49408))
    lines = (tmp_path / "a" / "merges.txt").read_text("utf-8").splitlines()
    assert lines[:2] == ["#version: 0.2", "i n"] and len(lines) == 1 + 48894  # transformers 4 skips line 1


def test_reads_what_transformers_5_writes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path / "ours")
    hugging_face(tmp_path / "ours", "CLIPTokenizer").save_pretrained(tmp_path / "theirs")
    assert {path.name for path in (tmp_path / "theirs").iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    loaded = load_tokenizer(tmp_path / "theirs")
    assert loaded.config == tokenizer.config
    assert torch.equal(loaded(PLAIN + DAMAGED + SPECIAL), tokenizer(PLAIN + DAMAGED + SPECIAL))


def added(content: str) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


@pytest.mark.parametrize(
    ("settings", "special", "pad_id"),
    [
        (
            {"pad_token": "<|endoftext|>"},
            {"pad_token": "!", "bos_token": added("<|startoftext|>")},
            0,
        ),  # SD 2
        ({"pad_token": "<|endoftext|>"}, {"pad_token": "<|endoftext|>"}, 49407),  # SD 1
        ({"pad_token": "<|endoftext|>", "added_tokens_decoder": {}}, {"pad_token": "!"}, 49407),
        ({"pad_token": "!", "added_tokens_decoder": {"0": added("!")}}, {"pad_token": "<|endoftext|>"}, 0),
        ({}, {}, 49407),
    ],
)
def test_reads_folders_of_transformers_4(
    settings: dict[str, Any], special: dict[str, Any], pad_id: int, folder: Path
) -> None:
    (folder / "tokenizer.json").unlink()
    common = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**common, **settings}))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    loaded, theirs = load_tokenizer(folder), hugging_face(folder, "CLIPTokenizer")
    assert loaded.config.pad_id == theirs.pad_token_id == pad_id
    expected = theirs(PLAIN + DAMAGED, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(loaded(PLAIN + DAMAGED), expected)


@pytest.mark.parametrize("limit", [1000000000000000019884624838656, None])
def test_unset_length_is_77(limit: int | None, folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": limit}))
    assert load_tokenizer(folder).config == TokenizerConfig(context_length=77, pad_id=49407)


def test_refuses_tokens_of_textual_inversion(folder: Path) -> None:
    theirs = hugging_face(folder, "CLIPTokenizer")
    theirs.add_tokens(["<my-cat>"])
    theirs.save_pretrained(folder / "theirs")
    with pytest.raises(ValueError, match=r"adds 1 tokens.*<my-cat>"):
        load_tokenizer(folder / "theirs")
    (folder / "tokenizer.json").unlink()
    (folder / "added_tokens.json").write_text('{"<my-dog>": 49408}')
    with pytest.raises(ValueError, match=r"adds 1 tokens.*<my-dog>"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "[1, 2]", "must hold a JSON object"),
        ("tokenizer.json", "{", "tokenizer.json is not JSON .Expecting property name"),
        ("tokenizer.json", '{"model": {"vocab": {}}}', "no byte-pair encoding"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0}, "merges": []}}', "lacks|not a CLIP tokenizer"),
        ("tokenizer.json", '{"model": {"vocab": {"a": "0"}, "merges": []}}', "not a table of tokens"),
        ("tokenizer.json", '{"model": {"vocab": {}, "merges": [[]]}}', "not a CLIP tokenizer"),
        ("tokenizer_config.json", '{"bos_token": "<s>"}', "special tokens are"),
        (
            "tokenizer_config.json",
            '{"pad_token": {"name": "x"}, "added_tokens_decoder": {}}',
            "not a CLIP tokenizer",
        ),
        ("tokenizer_config.json", '{"model_max_length": 2}', "context_length=2"),
    ],
)
def test_refuses_other_json(name: str, content: str, message: str, folder: Path) -> None:
    (folder / name).write_text(content)
    if name == "tokenizer_config.json":
        (folder / "special_tokens_map.json").unlink()
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder)


def test_refuses_merges_and_ids_that_do_not_fit(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    merges, vocab = folder / "merges.txt", folder / "vocab.json"
    merges.write_text(merges.read_text("utf-8") + "no such\n", "utf-8")
    with pytest.raises(ValueError, match="merges do not fit"):
        load_tokenizer(folder)
    ids = json.loads(vocab.read_text("utf-8"))
    vocab.write_text(json.dumps({**ids, "cat</w>": 0}))
    with pytest.raises(ValueError, match="each once"):
        load_tokenizer(folder)
    del ids["<|endoftext|>"]
    vocab.write_text(json.dumps({**ids, "!!": 49407}))
    (folder / "special_tokens_map.json").write_text('{"pad_token": "!"}')
    with pytest.raises(ValueError, match="lacks"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "merges.txt", "vocab.json"])
def test_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_tokenizer(folder)


def test_huge_file_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text.tokenizer, "_MAX_FILE_BYTES", 10**6)
    with pytest.raises(ValueError, match=r"tokenizer\.json has \d+ bytes"):
        load_tokenizer(folder)


def test_refuses_what_is_no_list_of_texts(default: Tokenizer) -> None:
    with pytest.raises(TypeError, match="one string"):
        default("a cat")
    with pytest.raises(ValueError, match=r"character 2 .*U\+DC80"):
        default(["a cat", "b \udc80"])


@pytest.mark.parametrize(("length", "pad_id"), [(2, 0), (77, -1)])
def test_config_refuses(length: int, pad_id: int) -> None:
    with pytest.raises(ValueError, match=f"{length if length < 3 else pad_id}"):
        TokenizerConfig(context_length=length, pad_id=pad_id)


def test_padding_must_be_in_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="pad_id=49408 is outside"):
        Tokenizer(TokenizerConfig(pad_id=49408))


def test_tokenizing_imports_neither_open_clip_nor_transformers() -> None:
    code = (
        "import sys, text; print(text.Tokenizer(text.TokenizerConfig())(['a cat'])[0, 2].item());"
        "print(sorted({'open_clip', 'transformers', 'ftfy', 'diffusers', 'deepspeed'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(text.tokenizer.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "2368\n[]\n", done.stderr
