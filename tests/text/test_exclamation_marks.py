"""Stable Diffusion 2's tokens: the original's, which A1111 and ComfyUI draw, and diffusers'."""

import random

import torch

from text import Tokenizer, TokenizerConfig
from text.weighting import tokenize_weighted

SD2 = Tokenizer(TokenizerConfig(pad_id=0))


def prompts(count: int) -> list[str]:
    rng = random.Random(0)
    parts = ["a", "cat", "!", "!!", "!!!", " ", "wow!", "?!", ".", ",", "!)", "it's", "3", "\n", "é", "#!/"]
    return ["".join(rng.choice(parts) for _ in range(rng.randint(0, 20))) for _ in range(count)]


def test_the_originals_tokens_are_open_clips():
    import open_clip

    reader, different = open_clip.tokenizer._tokenizer, 0
    for prompt in prompts(2000):
        assert SD2.tokens(prompt, original=True).ids == reader.encode(prompt)
        different += SD2.token_ids(prompt) != reader.encode(prompt)
    assert different > 1000


def test_weighting_follows_the_original_and_none_follows_diffusers():
    assert tokenize_weighted(SD2, "wow! ok!!!").ids[0, 1:6].tolist() == [2781, 256, 2481, 995, 49407]
    assert SD2(["wow! ok!!!"])[0, 1:9].tolist() == [2781, 0, 2481, 0, 0, 0, 49407, 0]


def test_stable_diffusion_1_has_one_reading():
    sd1 = Tokenizer(TokenizerConfig())
    for prompt in prompts(200):
        assert sd1.tokens(prompt, original=True).ids == sd1.token_ids(prompt)
    assert torch.equal(tokenize_weighted(sd1, "wow! ok!!!").ids, sd1(["wow! ok!!!"]))
