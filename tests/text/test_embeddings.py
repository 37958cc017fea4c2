"""Textual inversions in prompts: how their names are found, what the encoder is given, and chunks."""

import random

import pytest
import torch
from helpers.a1111_prompts import chunks

from text import TextEncoderConfig, Tokenizer, TokenizerConfig, TransformersTextEncoder
from text.embeddings import Embedding, EmbeddingTable
from text.weighting import encode_weighted, tokenize_weighted

TOKENIZERS = {pad: Tokenizer(TokenizerConfig(pad_id=pad)) for pad in (0, 49407)}
TOKENIZER = TOKENIZERS[49407]
BOTH = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=["sd2", "sd1"])
TINY = TextEncoderConfig(width=16, layers=3, heads=2, intermediate_size=32, projection_dim=None)


def embedding(name: str, count: int, *, token: str = "", seed: int = 0) -> Embedding:
    vectors = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))
    return Embedding(name, vectors, token)


EMBEDDINGS = [
    embedding("easynegative", 3),
    embedding("bad-hands-5", 2, seed=1),
    embedding("bad", 1, seed=2),
    embedding("learned_embeds", 4, token="<cat-toy>", seed=3),
]
FIRST = 49408
EASY, HANDS, BAD, TOY = (tuple(range(FIRST + a, FIRST + b)) for a, b in ((0, 3), (3, 5), (5, 6), (6, 10)))


def ids(text: str, tokenizer: Tokenizer = TOKENIZER) -> list[tuple[int, ...]]:
    return [unit.ids for unit in EmbeddingTable(EMBEDDINGS, tokenizer).units(tokenizer, text)]


def words(text: str) -> list[tuple[int, ...]]:
    return [(i,) for i in TOKENIZER.token_ids(text)]


@BOTH
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a easynegative, b", [*words("a"), EASY, *words(", b")]),
        ("EasyNegative", [EASY]),
        ("bad-hands-5", [HANDS]),  # the longest name that fits
        ("bad-hands", [BAD, *words("-hands")]),  # as in A1111, which compares tokens
        ("badly", words("badly")),
        ("embedding:easynegative", [EASY]),
        ("a embedding:EasyNegative.pt,b", [*words("a"), EASY, *words(",b")]),
        ("embedding:bad-hands-5.", [HANDS, *words(".")]),
        ("embedding:bad-hand", [*words("embedding:"), BAD, *words("-hand")]),
        ("a <cat-toy>, b", [*words("a"), TOY, *words(", b")]),
        ("<cat-toy>s", [TOY, *words("s")]),
        ("(<Cat-Toy>)", [*words("("), TOY, *words(")")]),
        ("learned_embeds", [TOY]),
        ("", []),
    ],
)
def test_names_are_found(text: str, expected: list[tuple[int, ...]], tokenizer: Tokenizer):
    assert ids(text, tokenizer) == expected


def test_each_unit_knows_where_it_starts():
    text = "é  a <cat-toy>,embedding:bad easynegative  b"
    units = list(EmbeddingTable(EMBEDDINGS, TOKENIZER).units(TOKENIZER, text))
    starts = [
        text.index(word)
        for word in (
            "é",
            "a ",
            "<cat",
            ",",
            "embedding",
            "easy",
            "b",
        )
    ]
    starts[-1] = text.rindex("b")
    assert [unit.start for unit in units] == starts


def test_as_the_tokenizer_without_embeddings():
    table, texts = EmbeddingTable(EMBEDDINGS, TOKENIZER), ["a red apple", "x " * 90, ""]
    assert torch.equal(table.tokenize(TOKENIZER, texts), TOKENIZER(texts))
    assert table.tokenize(TOKENIZER, ["x " * 74 + "easynegative y"])[0, -4:].tolist() == [343, 343, FIRST, 49407]


def encoder() -> TransformersTextEncoder:
    torch.manual_seed(0)
    return TransformersTextEncoder(TINY).eval().requires_grad_(False)


def test_vectors_take_the_places_of_tokens():
    """The oracle: an encoder whose table has the vectors as further tokens, as diffusers makes it."""
    network, table = encoder(), EmbeddingTable(EMBEDDINGS, TOKENIZER)
    given = table.tokenize(TOKENIZER, ["a easynegative of <cat-toy>", "no such name"])
    found = network(given, extra=table.vectors)
    plain = network(TOKENIZER(["a easynegative of <cat-toy>", "no such name"]))
    network.model.resize_token_embeddings(FIRST + len(table.vectors), mean_resizing=False)
    network.model.embeddings.token_embedding.weight.data[FIRST:] = table.vectors
    expected = network(given)
    assert torch.equal(found.context, expected.context) and torch.equal(found.mask, expected.mask)
    assert not torch.allclose(found.context[0], plain.context[0]) and torch.allclose(found.context[1], plain.context[1])


def test_the_encoder_is_as_before_afterwards():
    network, table = encoder(), EmbeddingTable(EMBEDDINGS, TOKENIZER)
    before = network(TOKENIZER(["a cat"])).context
    network(table.tokenize(TOKENIZER, ["easynegative"]), extra=table.vectors)
    with pytest.raises(ValueError, match="token ids are"):
        network(torch.zeros(1, 99, dtype=torch.int64), extra=table.vectors)
    assert torch.equal(network(TOKENIZER(["a cat"])).context, before)
    assert not network.model.get_input_embeddings()._forward_hooks


@BOTH
def test_weights_cover_all_vectors(tokenizer: Tokenizer):
    found = tokenize_weighted(tokenizer, "a (easynegative:1.5) [bad]", EmbeddingTable(EMBEDDINGS, tokenizer))
    assert found.ids[0, 1:6].tolist() == [320, *EASY, *BAD]
    assert found.weights[0, :7].tolist() == pytest.approx([1, 1, 1.5, 1.5, 1.5, 1 / 1.1, 1])
    network, table = encoder(), EmbeddingTable(EMBEDDINGS, TOKENIZER)
    context = encode_weighted(network, TOKENIZER, ["a (easynegative)"], "cpu", embeddings=table).context
    assert context.isfinite().all() and context.shape == (1, 77, 16)


def test_chunks_are_a1111s():
    rng = random.Random(0)
    table, comma = EmbeddingTable(EMBEDDINGS, TOKENIZER), TOKENIZER.token_ids(",")[-1]
    vectors = {one.name: (one.name, len(one.vectors)) for one in EMBEDDINGS}
    names = {tuple(TOKENIZER.token_ids(name)): pair for name, pair in vectors.items()}
    of_id = {i: name for name, own in zip(vectors, (EASY, HANDS, BAD, TOY), strict=True) for i in own}
    split = 0
    for _ in range(2000):
        weights = [20, rng.choice([0, 1, 4]), 2, 1, 1, 1]
        line = " ".join(rng.choices(["x", ",", *vectors], weights, k=rng.randint(60, 180)))
        found = tokenize_weighted(TOKENIZER, line, table).ids
        rows = [row[1 : row.index(49407)] for row in found.tolist()]
        expected = chunks(TOKENIZER.token_ids(line), comma, names)
        assert [[of_id.get(i, i) for i in row] for row in rows] == expected
        split += len(rows) > 1
    assert split > 1000
