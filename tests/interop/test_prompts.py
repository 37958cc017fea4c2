"""What users of other programs write in prompts, drawn: against diffusers, and against the rules of A1111."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.a1111_prompts import schedules, text_at
from helpers.stable_diffusion import stable_diffusion, states
from safetensors.torch import save_file
from torch import Tensor

from ldm import Drawing, DrawOptions, DrawRequest, TextToImage
from ldm.interop.compvis.writing import single_file_tensors, write_single_file
from ldm.interop.diffusers_layout.folder import write_folder

A1111 = DrawOptions(weighting="a1111")
QUICK: dict[str, Any] = {"steps": 4, "seed": 1, "sampler": "euler"}
PREFIX = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
TEXT_PREFIX = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "sd1"
    write_folder(stable_diffusion(1), path, dtype=torch.float32)
    return path


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loras")
    (path / "below").mkdir()
    for seed, file in enumerate((path / "style.safetensors", path / "below" / "other.safetensors")):
        generator = torch.Generator().manual_seed(seed)
        sizes = {PREFIX: (64, 32), TEXT_PREFIX: (64, 64)}
        factors = {}
        for name, (inputs, outputs) in sizes.items():
            factors[f"{name}.lora_down.weight"] = torch.randn(2, inputs, generator=generator)
            factors[f"{name}.lora_up.weight"] = torch.randn(outputs, 2, generator=generator)
        save_file(factors, file)
    return path


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embeddings") / "toy.bin"
    torch.save({"<toy>": torch.randn(3, 64, generator=torch.Generator().manual_seed(3))}, path)
    return path


@pytest.fixture(scope="module")
def pipe(folder: Path, loras: Path, words: Path) -> TextToImage:
    return TextToImage.load(folder, device="cpu", lora_folders=[loras], embeddings=[words])


@pytest.fixture(scope="module")
def plain(folder: Path) -> TextToImage:
    return TextToImage.load(folder, device="cpu")


def pixels(pipe: TextToImage, *prompts: str, **settings: Any) -> Tensor:
    settings = QUICK | {"options": A1111} | settings
    return pipe.pixels(*(DrawRequest(prompt=prompt, **settings) for prompt in prompts))


def told(pipe: TextToImage, prompt: str, **settings: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        pixels(pipe, prompt, **settings)
    return [str(warning.message) for warning in found]


@pytest.mark.parametrize("prompt", ["a <toy> apple", "a <toy>, <toy>"])
@pytest.mark.parametrize("skip", [None, 2])
def test_diffusers_draws_the_same(
    folder: Path, pipe: TextToImage, words: Path, prompt: str, skip: int | None, monkeypatch: pytest.MonkeyPatch
):
    import diffusers
    from transformers.models.clip.modeling_clip import CLIPTextModel

    # Diffusers calls text_model.final_layer_norm, which transformers 5.6 moved up.
    if not hasattr(CLIPTextModel, "text_model"):
        monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda own: own), raising=False)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs.load_textual_inversion(str(words))
    embeds, _ = theirs.encode_prompt(prompt, "cpu", 1, False, clip_skip=None if skip is None else skip - 1)
    ours = pipe.model.conditioner([prompt], "none", skip).context
    assert torch.allclose(ours, embeds, atol=1e-5)
    without = pipe.model.conditioner([prompt.replace("<toy>", "doll")], "none", skip).context
    assert not torch.allclose(ours, without, atol=1e-2)


def test_clip_skip_changes_the_picture(plain: TextToImage):
    drawn = [pixels(plain, "a cat", options=DrawOptions(clip_skip=skip)) for skip in (None, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.allclose(drawn[0], drawn[2], atol=1e-3)
    with pytest.raises(ValueError, match="clip skip is 3, expected 1 to 2, the text encoder's layers"):
        pixels(plain, "a cat", options=DrawOptions(clip_skip=3))


def test_a_lora_in_a_prompt_is_one_given_by_option(folder: Path, loras: Path, pipe: TextToImage, plain: TextToImage):
    before = {name: tensor.clone() for name, tensor in states(pipe.parts).items()}
    found = pixels(pipe, "a cat <lora:style:0.8><lora:other:-0.5>")
    given = [(loras / "style.safetensors", 0.8), (loras / "below" / "other.safetensors", -0.5)]
    merged = TextToImage.load(folder, device="cpu", lora=given)
    assert torch.equal(found, pixels(merged, "a cat "))
    assert not torch.allclose(found, pixels(plain, "a cat "), atol=1e-3)
    after = states(pipe.parts)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(pixels(pipe, "a cat"), pixels(plain, "a cat"))


def test_strengths_of_the_text_encoder_and_the_denoiser(pipe: TextToImage):
    both = pixels(pipe, "a cat <lora:style:0.8:0.8>")
    assert torch.equal(both, pixels(pipe, "a cat <lora:style:0.8>"))
    text, denoiser = pixels(pipe, "a cat <lora:style:0.8:0>"), pixels(pipe, "a cat <lora:style:te=0:unet=0.8>")
    nothing = pixels(pipe, "a cat <lora:style:0>")
    drawn = [both, text, denoiser, nothing]
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(drawn) for b in drawn[:i])
    assert torch.equal(nothing, pixels(pipe, "a cat "))


def test_pictures_of_one_call_may_have_other_loras(pipe: TextToImage):
    prompts = ["a cat", "a cat <lora:style:1>", "a [cat:dog:2]", "a cat"]
    together = pixels(pipe, *prompts)
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.allclose(row, pixels(pipe, prompt)[0], atol=1e-5)


def test_half_precision_is_restored_exactly(folder: Path, loras: Path):
    half = TextToImage.load(folder, device="cpu", dtype="bf16", lora_folders=[loras])
    before = {name: tensor.clone() for name, tensor in states(half.parts).items()}
    pixels(half, "a <lora:style:1>")
    after = states(half.parts)
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.bfloat16 for name in before)


def test_a_lora_of_another_model_changes_nothing(folder: Path, tmp_path: Path):
    down, up = torch.randn(2, 7), torch.randn(7, 2)
    save_file({f"{PREFIX}.lora_down.weight": down, f"{PREFIX}.lora_up.weight": up}, tmp_path / "wrong.safetensors")
    pipe = TextToImage.load(folder, device="cpu", lora_folders=[tmp_path])
    before = {name: tensor.clone() for name, tensor in states(pipe.parts).items()}
    with pytest.raises(ValueError, match=r"wrong\.safetensors"):
        pixels(pipe, "a <lora:wrong:1>")
    assert all(torch.equal(tensor, before[name]) for name, tensor in states(pipe.parts).items())


def contexts(pipe: TextToImage, monkeypatch: pytest.MonkeyPatch, prompt: str, **settings: Any) -> list[Tensor]:
    """The context of each evaluation of the network, with the negative prompt left out."""
    seen: list[Tensor] = []
    inner = pipe.denoiser.forward

    def forward(x: Tensor, t: Tensor, condition: Any) -> Any:
        seen.append(condition.context)
        return inner(x, t, condition)

    with monkeypatch.context() as patched:
        patched.setattr(pipe.denoiser, "forward", forward)
        pixels(pipe, prompt, scale=1.0, **settings)
    return seen


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("prompt", ["a [cat:dog:0.5]", "a [cat:dog:3]", "[a|b|c] cat", "a [[x|y]:(b:1.2):0.25]"])
def test_words_change_at_a1111s_evaluations(
    pipe: TextToImage, monkeypatch: pytest.MonkeyPatch, prompt: str, sampler: str
):
    """A1111 counts evaluations: with Heun's method, which has two a step, a prompt has twice as many."""
    found = contexts(pipe, monkeypatch, prompt, steps=6, sampler=sampler)
    schedule = schedules(prompt, 12 if sampler == "heun" else 6)
    assert len(found) == (11 if sampler == "heun" else 6)
    for evaluation, context in enumerate(found):
        expected = pipe.model.conditioner([str(text_at(schedule, evaluation))], "a1111").context
        assert torch.allclose(context, expected, atol=1e-5)


def test_a_negative_prompt_changes_too(pipe: TextToImage):
    settings: dict[str, Any] = {"scale": 5.0}
    drawn = [pixels(pipe, "a", negative_prompt=n, **settings) for n in ("[x:y:2]", "x", "y", "[x:y:4]", "[x:y:-1]")]
    assert torch.equal(drawn[3], drawn[1]) or torch.allclose(drawn[3], drawn[1], atol=1e-5)
    assert torch.allclose(drawn[4], drawn[2], atol=1e-5)
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-4) and not torch.allclose(drawn[0], drawn[2], atol=1e-4)


def test_texts_of_other_lengths_are_padded_together(pipe: TextToImage, monkeypatch: pytest.MonkeyPatch):
    long = ", ".join(["apple"] * 60)
    found = contexts(pipe, monkeypatch, f"a [cat:{long}:2]")
    assert {context.shape[1] for context in found} == {2 * 77}


def test_and_guides_towards_each_prompt(pipe: TextToImage):
    """The oracle: A1111's combine_denoised, uncond + scale * sum of w_i (cond_i - uncond), at the only step."""
    settings: dict[str, Any] = {"steps": 1, "sampler": "ddim", "scale": 3.0, "options": A1111}

    def latents(prompt: str, scale: float) -> Tensor:
        drawn: list[Tensor] = []
        decode = type(pipe.model).decode
        try:
            type(pipe.model).decode = lambda own, z: drawn.append(z) or decode(own, z)  # type: ignore[assignment]
            pixels(pipe, prompt, **settings | {"scale": scale})
        finally:
            type(pipe.model).decode = decode  # type: ignore[method-assign]
        return drawn[0]

    cat, dog, nothing = (latents(text, 1.0) for text in ("a cat", " a dog", ""))
    expected = nothing + 3.0 * (0.5 * (cat - nothing) + 1.0 * (dog - nothing))
    assert torch.allclose(latents("a cat :0.5 AND a dog", 3.0), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a (red:1.3) apple", "the prompt has (red:1.3), drawn as words: --weighting a1111 reads it as A1111 does"),
        ("a [a:b:0.5]", "the prompt has [a:b:0.5], drawn as words: --weighting a1111 reads it as A1111 does"),
        ("a <lora:style:0.8>", "the prompt has <lora:style:0.8>, drawn as words: give the folder of its file with "
         "--lora-folder"),
        ("embedding:foo", "the prompt has embedding:foo, drawn as words: give its file or folder with --embedding"),
        ("{a|b}", "the prompt has {a|b}, drawn as words: this syntax of other programs is not supported"),
    ],
)  # fmt: skip
def test_what_is_drawn_as_words_is_named(plain: TextToImage, prompt: str, expected: str):
    assert told(plain, prompt, options=DrawOptions()) == [expected]


def test_plain_prompts_are_drawn_without_a_word(plain: TextToImage, pipe: TextToImage):
    assert told(plain, "a (cat) at 10:30", options=DrawOptions()) == []
    assert told(pipe, "a (cat:1.2) <lora:style:1> <toy> embedding:toy [a|b]") == []


@pytest.mark.parametrize("options", [DrawOptions(), A1111], ids=["none", "a1111"])
def test_a_lora_that_is_not_there_is_named_and_left_out(pipe: TextToImage, options: DrawOptions):
    (line,) = told(pipe, "a cat<lora:stile:1>", options=options)
    assert line.startswith("<lora:stile:1> in the prompt names a LoRA that is not in ")
    assert line.endswith(", did you mean style?: left out")
    with pytest.warns(UserWarning, match="left out"):
        assert torch.equal(pixels(pipe, "a cat<lora:stile:1>", options=options), pixels(pipe, "a cat", options=options))


def test_tags_that_cannot_be_followed(plain: TextToImage, pipe: TextToImage):
    assert told(plain, "a<lora:style:1>") == [
        "<lora:style:1> in the prompt names a LoRA, and no folder of LoRAs is given with --lora-folder: left out"
    ]
    assert told(pipe, "a<hypernet:x:1>") == ["the prompt has <hypernet:x:1>, which is not supported: it is left out"]
    (line,) = told(pipe, "a", negative_prompt="b<lora:style:1>")
    assert line == "the negative prompt has <lora:style:1>, which works only in the prompt: it is left out"
    with pytest.raises(ValueError, match="the strength in <lora:style:x> is 'x'"):
        pixels(pipe, "a<lora:style:x>", options=DrawOptions())


def test_the_record_names_what_a_prompt_used(pipe: TextToImage, loras: Path, words: Path):
    from ldm.inference.recipe import embedding_hash, lora_hash, parameters_text

    options = DrawOptions(weighting="a1111", clip_skip=2)
    request = DrawRequest(prompt="a <toy> <lora:style:0.8:0.6>", options=options, **QUICK)
    (drawing,) = pipe.draw(request)
    style, toy = lora_hash(loras / "style.safetensors"), embedding_hash(words)
    assert drawing.recipe.prompt == request.prompt
    assert drawing.recipe.prompt_loras == f"style:0.8:0.6 {style}" and drawing.recipe.embeddings == f"toy {toy}"
    text = parameters_text(drawing.recipe)
    assert f'Lora hashes: "style: {style}"' in text and f'TI hashes: "toy: {toy}"' in text and "Clip skip: 2" in text
    assert text.startswith("a <toy> <lora:style:0.8:0.6>\n")


def test_a_models_own_clip_skip_is_told_and_survives_each_form(tmp_path: Path):
    from ldm.inference.recipe import parameters_text

    stated = {"modelspec.encoder_layer": "2"}
    save_file(single_file_tensors(stable_diffusion(1)), tmp_path / "a.safetensors", metadata=stated)
    own = TextToImage.load(tmp_path / "a.safetensors", dtype="fp32")
    write_single_file(own.parts, tmp_path / "b.safetensors", dtype=torch.float32)
    own.save(tmp_path / "folder")
    again, folder = (TextToImage.load(tmp_path / name, dtype="fp32") for name in ("b.safetensors", "folder"))
    asked = DrawRequest(prompt="a", height=64, width=64, **QUICK)
    last = replace(asked, options=DrawOptions(clip_skip=1))
    (drawn,), (of_the_last,) = own.draw(asked), own.draw(last)
    assert ", Clip skip: 2, " in parameters_text(drawn.recipe)
    assert ", Clip skip: 1, " in parameters_text(of_the_last.recipe)
    assert pixels_of(drawn) == pixels_of(*again.draw(asked)) == pixels_of(*folder.draw(asked))
    assert pixels_of(of_the_last) == pixels_of(*again.draw(last)) != pixels_of(drawn)


def pixels_of(drawing: Drawing) -> bytes:
    return drawing.image.tobytes()


def test_words_cut_off_are_those_after_the_vectors(pipe: TextToImage):
    assert pipe.cut_off("<toy> " * 25 + "end of it") == "end of it"
    assert pipe.cut_off("<toy> " * 25 + "<lora:style:1>") == ""
