"""Prompts in chunks, and A1111's emphasis of what the encoder makes of them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from text import TextEncoderConfig, Tokenizer, TokenizerConfig, TransformersTextEncoder
from text.weighting import chunk_count, emphasize, encode_weighted, parse_weights, tokenize_weighted

TOKENIZERS = {pad_id: Tokenizer(TokenizerConfig(pad_id=pad_id)) for pad_id in (0, 49407)}
SHORT = [Tokenizer(TokenizerConfig(context_length=n, pad_id=pad)) for n, pad in [(3, 0), (4, 49407), (9, 0), (26, 0)]]
BOTH_PADDINGS = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=["pad0", "pad49407"])
TINY = TextEncoderConfig(width=32, layers=3, heads=4, intermediate_size=80, projection_dim=24)
STYLES = pytest.mark.parametrize(
    "config",
    [replace(TINY, pad_id=49407), replace(TINY, activation="gelu", hidden="penultimate", pad_id=0)],
    ids=["sd1", "sd2"],
)
PLAIN = [
    "a red apple",
    "",
    "   ",
    "It's the dog's; naïve café, 猫が座っている 👩‍👩‍👧‍👦",
    "what?? -- 3.14, 1234; a/b: #tag {y} ~ ^ | BREAKFAST, break",
    "wow!!! stop! a!b",
    "a <|startoftext|> b <|endoftext|> c",
    "a " * 75,
]


def encoder_of(config: TextEncoderConfig) -> TransformersTextEncoder:
    """Random in every parameter: a layer norm of ones and zeros would make each state's mean 0."""
    torch.manual_seed(0)
    encoder = TransformersTextEncoder(config).requires_grad_(False)
    for name, parameter in encoder.named_parameters():
        parameter.add_(torch.randn(parameter.shape) * (0.02 if "embedding" in name else 0.2))
    return encoder


def plain_ids(tokenizer: Tokenizer, prompts: list[str]) -> torch.Tensor:
    """What the original tokenizer makes of prompts that fit: it reads a "!" that transformers takes for padding."""
    result = tokenizer([""] * len(prompts))
    for row, prompt in zip(result, prompts, strict=True):
        ids = tokenizer.tokens(prompt, original=True).ids
        row[1 : len(ids) + 2] = torch.tensor([*ids, tokenizer.eos_id])
    return result


def test_refuses_more_chunks_than_one_call_should_hold() -> None:
    tokenizer = Tokenizer(TokenizerConfig())
    assert chunk_count(tokenizer, "BREAK " * 63 + "a") == 64
    with pytest.raises(ValueError, match="takes 65 chunks of 75 tokens; use 64 at most"):
        chunk_count(tokenizer, "BREAK " * 64 + "a")


@BOTH_PADDINGS
@pytest.mark.parametrize("prompt", PLAIN)
def test_without_weights_the_ids_are_the_tokenizers(prompt: str, tokenizer: Tokenizer) -> None:
    ids, weights = tokenize_weighted(tokenizer, prompt)
    assert ids.dtype == torch.int64 and weights.dtype == torch.float32
    assert torch.equal(ids, plain_ids(tokenizer, [prompt]))
    assert tokenizer.config.pad_id == 0 or torch.equal(ids, tokenizer([prompt]))
    assert torch.equal(weights, torch.ones(1, 77))
    assert chunk_count(tokenizer, prompt) == 1


@BOTH_PADDINGS
@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        ("a " * 76, ["a " * 75, "a"]),
        ("a " * 150, ["a " * 75] * 2),
        ("a " * 151, ["a " * 75, "a " * 75, "a"]),
        ("a BREAK b", ["a", "b"]),
        ("(a BREAK b:1.5)", ["a", "b"]),
        ("a BREAK BREAK b", ["a", "", "b"]),
        ("BREAK a", ["", "a"]),
        ("a BREAK ", ["a"]),
        ("BREAK", [""]),
        ("BREAK BREAK", ["", ""]),
        ("a " * 75 + "BREAK b", ["a " * 75, "b"]),
        ("a " * 80 + "BREAK b", ["a " * 75, "a " * 5, "b"]),
        ("a " * 60 + ", " + "b " * 20, ["a " * 60 + ",", "b " * 20]),
        ("a " * 60 + "(, :1.2)" + "[b] " * 20, ["a " * 60 + ",", "b " * 20]),
        ("a " * 55 + ", " + "b " * 20, ["a " * 55 + ",", "b " * 20]),
        ("a " * 54 + ", " + "b " * 21, ["a " * 54 + ", " + "b " * 20, "b"]),
        ("a " * 60 + ", " + "b " * 14, ["a " * 60 + ", " + "b " * 14]),
        ("a " * 74 + ", b", ["a " * 74 + ",", "b"]),
        ("a " * 70 + ", b b b , c", ["a " * 70 + ", b b b ,", "c"]),
        ("a " * 70 + ", b b b b , c", ["a " * 70 + ", b b b b", ", c"]),
        ("a " * 60 + ", b , c " + "d " * 15, ["a " * 60 + ", b ,", "c " + "d " * 15]),
        ("a " * 60 + ", b BREAK " + "c " * 80, ["a " * 60 + ", b", "c " * 75, "c " * 5]),
        ("a " * 60 + ", " + "b " * 60 + ", " + "c " * 40, ["a " * 60 + ",", "b " * 60 + ",", "c " * 40]),
    ],
)
def test_chunks(prompt: str, chunks: list[str], tokenizer: Tokenizer) -> None:
    assert torch.equal(tokenize_weighted(tokenizer, prompt).ids, tokenizer(chunks))
    assert chunk_count(tokenizer, prompt) == len(chunks)


@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [(", a b c d e f", [",", "a b c d e f"]), ("a b , c d e f g h i , j", ["a b ,", "c d e f g h", "i , j"])],
)
def test_the_comma_may_be_anywhere_in_a_short_chunk(prompt: str, chunks: list[str]) -> None:
    tokenizer = Tokenizer(TokenizerConfig(context_length=8))
    assert torch.equal(tokenize_weighted(tokenizer, prompt).ids, tokenizer(chunks))


def test_weights_stand_beside_their_tokens() -> None:
    tokenizer = Tokenizer(TokenizerConfig(context_length=8, pad_id=0))
    ids, weights = tokenize_weighted(tokenizer, "a (stop!:1.5) BREAK [b] (c d e f , g h:2)")
    assert torch.equal(ids, plain_ids(tokenizer, ["a stop!", "b c d e f ,", "g h"]))
    assert ids[0].tolist() == [49406, 320, 1691, 256, 49407, 0, 0, 0]  # "!" is a word, not the padding
    expected = [[1, 1, 1.5, 1.5, 1, 1, 1, 1], [1, 1 / 1.1, 2, 2, 2, 2, 2, 1], [1, 2, 2, 1, 1, 1, 1, 1]]
    assert torch.equal(weights, torch.tensor(expected))


@given(st.text("ab,!( )[]", max_size=60), st.sampled_from(SHORT))
def test_no_token_is_lost_between_chunks(prompt: str, tokenizer: Tokenizer) -> None:
    length, pad_id = tokenizer.config.context_length, tokenizer.config.pad_id
    ids, weights = tokenize_weighted(tokenizer, prompt)
    tokens: list[int] = []
    token_weights: list[float] = []
    for row, row_weights in zip(ids.tolist(), weights, strict=True):
        end = row.index(49407)
        assert row[0] == 49406 and row[end + 1 :] == [pad_id] * (length - 1 - end)
        assert end > 1 or len(ids) == 1
        tokens += row[1:end]
        token_weights += row_weights[1:end].tolist()
    whole = [
        (i, piece.weight) for piece in parse_weights(prompt)[0] for i in tokenizer.tokens(piece.text, original=True).ids
    ]
    assert tokens == [i for i, _ in whole]
    assert token_weights == pytest.approx([weight for _, weight in whole])


@STYLES
@pytest.mark.parametrize("prompt", ["a (red:1.6) apple", "[[a]] (cat:-0.5) and (wow!!:2)"])
def test_emphasis_is_the_formula(prompt: str, config: TextEncoderConfig) -> None:
    encoder, tokenizer = encoder_of(config), TOKENIZERS[config.pad_id]
    ids, weights = tokenize_weighted(tokenizer, prompt)
    states, pooled, mask = encoder(ids)
    expected = states * weights[:, :, None]
    expected = expected * (states.sum() / expected.sum())
    condition = encode_weighted(encoder, tokenizer, [prompt], "cpu")
    assert torch.allclose(condition.context, expected, rtol=1e-4, atol=1e-5)
    assert (condition.context - states).abs().max() > 0.1
    assert torch.equal(condition.pooled, pooled) and torch.equal(condition.mask, mask)


@STYLES
def test_without_weights_the_condition_is_the_encoders_to_the_bit(config: TextEncoderConfig) -> None:
    encoder, tokenizer = encoder_of(config), TOKENIZERS[config.pad_id]
    condition, plain = encode_weighted(encoder, tokenizer, PLAIN, "cpu"), encoder(plain_ids(tokenizer, PLAIN))
    assert all(torch.equal(a, b) for a, b in zip(condition, plain, strict=True))


@STYLES
def test_chunks_are_encoded_alone_and_joined(config: TextEncoderConfig) -> None:
    encoder, tokenizer = encoder_of(config), TOKENIZERS[config.pad_id]
    prompts = ["a (red:1.5) apple", "one BREAK (two:0.5) BREAK three", "four BREAK (five)"]
    context, pooled, mask = encode_weighted(encoder, tokenizer, prompts, "cpu")
    assert context.shape == (3, 231, 32) and pooled.shape == (3, 32) and mask.shape == (3, 231)
    for row, chunks in enumerate([[prompts[0], "", ""], ["one", "(two:0.5)", "three"], ["four", "(five)", ""]]):
        alone = encode_weighted(encoder, tokenizer, chunks, "cpu")
        assert torch.allclose(context[row], alone.context.flatten(0, 1), atol=1e-5)
        assert torch.equal(mask[row], alone.mask.flatten())
        assert torch.allclose(pooled[row], alone.pooled[0], atol=1e-5)


def test_a_prompt_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    context = torch.randn(3, 5, 4) + torch.tensor([1.0, -2.0, 3.0])[:, None, None]
    weights = torch.tensor([[1.0, 1.5, 1, 1, 1], [1, 5, 5, 1, 1], [1, 1, 1, 1, 1]])
    together = emphasize(context, weights)
    for row in range(3):
        alone = emphasize(context[row : row + 1], weights[row : row + 1])
        assert torch.allclose(together[row : row + 1], alone, atol=1e-6)
        assert torch.allclose(alone.mean(), context[row].mean(), atol=1e-6)
    assert torch.equal(together[2], context[2])
    weighted = context * weights[:, :, None]
    assert not torch.allclose(together[0], weighted[0] * context.mean() / weighted.mean(), atol=0.1)


def test_weights_of_1_change_no_bit_even_of_a_view_whose_mean_is_summed_in_another_order() -> None:
    torch.manual_seed(0)
    context = torch.randn(9, 80, 64)[:, :77, ::2]
    assert torch.equal(emphasize(context, torch.ones(9, 77)), context)


@pytest.mark.parametrize(
    ("states", "weights", "expected"),
    [
        ([1.0, 1.0], [1.0, -1.0], [1.0, -1.0]),  # the mean after is 0
        ([1.0, -1.0], [2.0, 1.0], [2.0, -1.0]),  # the mean before
        ([0.0, 0.0], [2.0, 1.0], [0.0, 0.0]),
        ([1.0, -1.0 + 1e-6], [2.0, 2.0], [2.0, -2.0 + 2e-6]),  # both are rounding
        ([1.0, -1.0 + 1e-3], [2.0, 2.0], [1.0, -1.0 + 1e-3]),  # small, but means
        ([1.0, 1.0], [0.0, 0.0], [0.0, 0.0]),
        ([3.0, 1.0], [2.0, 1.0], [24 / 7, 4 / 7]),
    ],
)
def test_a_mean_of_zero_scales_nothing(states: list[float], weights: list[float], expected: list[float]) -> None:
    context = torch.tensor(states)[None, :, None].requires_grad_()
    result = emphasize(context, torch.tensor([weights]))
    assert result.flatten().tolist() == pytest.approx(expected, abs=1e-6)
    (gradient,) = torch.autograd.grad(result.sum(), context)
    assert gradient.isfinite().all()


def test_a_fresh_encoder_whose_states_have_mean_zero_is_only_weighted() -> None:
    torch.manual_seed(0)
    encoder = TransformersTextEncoder(TINY).requires_grad_(False)
    ids, weights = tokenize_weighted(TOKENIZERS[49407], "a (red:1.6) [apple]")
    context = encode_weighted(encoder, TOKENIZERS[49407], ["a (red:1.6) [apple]"], "cpu").context
    assert torch.equal(context, encoder(ids).context * weights[:, :, None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_emphasis_of_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    context = (torch.randn(2, 77, 64) + 0.1).to(dtype)
    weights = torch.ones(2, 77)
    weights[0, 3:9] = 1.7
    result = emphasize(context, weights)
    assert result.dtype == dtype
    assert torch.equal(result, emphasize(context.float(), weights).to(dtype))
    assert torch.equal(result[1], context[1]) and not torch.equal(result[0, 3:9], context[0, 3:9])


def test_refuses_what_is_no_list_of_prompts() -> None:
    encoder, tokenizer = encoder_of(TINY), TOKENIZERS[49407]
    with pytest.raises(TypeError, match="one string"):
        encode_weighted(encoder, tokenizer, "a cat", "cpu")
    with pytest.raises(ValueError, match="at least one"):
        encode_weighted(encoder, tokenizer, [], "cpu")
    with pytest.raises(ValueError, match="'cat' has weight 200"):
        encode_weighted(encoder, tokenizer, ["a dog", "a (cat:200)"], "cpu")
    with pytest.raises(ValueError, match=r"U\+DC80"):
        encode_weighted(encoder, tokenizer, ["a \udc80"], "cpu")
