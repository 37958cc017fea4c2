"""DrawRequest -> Drawing: parameters that are declared once, one check against a model, and recipes."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers.painting import FakeTextToImage
from helpers.stable_diffusion import stable_diffusion
from PIL import Image
from safetensors.torch import save_file

import ldm
from ldm import DrawOptions, DrawRequest, TextToImage
from ldm.diffusion import RectifiedFlowPath
from ldm.inference.call import INTERNAL
from ldm.inference.contact_sheet import Sheet
from ldm.inference.many import draw_all
from ldm.inference.parameter import parameters
from ldm.inference.pictures import NumberedFiles, picture_hash, read_picture
from ldm.inference.recipe import Recipe, png_bytes, read_recipes, recorded, software
from ldm.inference.request import MAX_SEED
from ldm.interop.compvis.writing import write_single_file
from ldm.interop.read_model import LoadOptions, read_facts
from ldm.model.facts import UNKNOWN, ModelFacts

PHOTO = Image.new("RGB", (50, 41), "red")
FACTS = ModelFacts(
    name="tiny", path=RectifiedFlowPath(), learned_variance=False, native_size=16, factor=8, for_inpainting=False
)
ALL = parameters(DrawRequest) | parameters(DrawOptions)


def test_every_field_is_a_parameter_with_a_help_and_an_option():
    names = {entry.name for part in (DrawRequest, DrawOptions) for entry in dataclasses.fields(part)}
    assert names - ALL.keys() == {"options", *INTERNAL}
    for name, about in ALL.items():
        default = getattr(DrawRequest, name, None) if name in parameters(DrawRequest) else getattr(DrawOptions, name)
        assert about.flags and about.help_for(default) and "{" not in about.help_for(default)


@pytest.mark.parametrize("words", ["flags", "in_line", "a1111"])
def test_no_two_parameters_have_a_word_in_common(words):
    found = [getattr(about, words) for about in ALL.values()]
    flat = [word for given in found for word in ([given] if isinstance(given, str) else given) if word]
    assert flat and len(flat) == len(set(flat))


def test_checked_it_says_all_that_was_left_open():
    request = DrawRequest(prompt="x", sampler="DPM++ 2M", place="line 3: ")
    assert request.check(FACTS) == dataclasses.replace(request, sampler="dpmpp_2m", height=16, width=16)
    assert request.check(FACTS).check(FACTS) == request.check(FACTS)
    begun = DrawRequest(image=PHOTO).check(dataclasses.replace(FACTS, native_size=32))
    assert (begun.height, begun.width, begun.strength) == (40, 48, 0.75)
    assert DrawRequest(image=PHOTO, mask=PHOTO, width=8).check(FACTS).strength == 1.0
    assert DrawRequest(image=PHOTO, strength=0.3, width=8).check(FACTS).strength == 0.3


def test_a_samplers_name_may_hold_the_grid():
    named = DrawRequest(sampler="DPM++ 2M Karras", options=DrawOptions(eta=None)).check(FACTS)
    assert (named.sampler, named.options.time_grid) == ("dpmpp_2m", "karras") and named.check(FACTS) == named
    both = DrawRequest(sampler="DPM++ 2M Karras", options=DrawOptions(time_grid="SGM Uniform"), place="p, line 2: ")
    with pytest.raises(ValueError, match=r"^p, line 2: sampler 'DPM.* names the time grid karras, but .* sgm_uniform"):
        both.check(FACTS)
    with pytest.raises(ValueError, match=r"^no time grid 'turbo': There are"):
        DrawRequest(options=DrawOptions(time_grid="turbo")).check()
    with pytest.warns(UserWarning, match="sampler DPM fast chooses its own times: the time grid karras is ignored"):
        fast = DrawRequest(sampler="DPM fast", options=DrawOptions(time_grid="karras")).check(FACTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fast.check(FACTS) == fast and fast.options.time_grid == "exponential"


def test_what_is_not_known_of_a_model_is_not_checked():
    request = DrawRequest(sampler="ddpm_learned", height=3, options=DrawOptions(time_grid="leading"))
    assert request.check() == request == request.check(UNKNOWN)
    with pytest.raises(ValueError, match="sampler Euler has no eta"):
        DrawRequest(sampler="euler", options=DrawOptions(eta=0.5)).check()


@pytest.mark.parametrize(
    ("request_", "facts", "message"),
    [
        (DrawRequest(sampler="ddpm_learned"), {}, "sampler DDPM learned needs a network"),
        (DrawRequest(options=DrawOptions(time_grid="leading")), {}, "grid 'leading' counts"),
        (DrawRequest(height=20), {}, "height is 20, expected a multiple of 8: use 16 or 24"),
        (DrawRequest(width=7), {}, "width is 7, expected a multiple of 8: use 8$"),
        (DrawRequest(), {"for_inpainting": True}, "tiny is made for inpainting: give it an image and a mask"),
        (DrawRequest(image=PHOTO), {"for_inpainting": True}, "tiny is made for inpainting: give a mask too"),
        (DrawRequest(prompt="(x:1000)", options=DrawOptions(weighting="a1111")), {}, "'x' has weight 1000"),
        (DrawRequest(negative_prompt="(x:1000)", options=DrawOptions(weighting="a1111")), {}, "'x' has weight 1000"),
    ],
)
def test_what_a_model_cannot_draw_is_named_with_its_place(request_, facts, message):
    with pytest.raises(ValueError, match=f"^prompts.txt, line 3: .*{message}"):
        dataclasses.replace(request_, place="prompts.txt, line 3: ").check(dataclasses.replace(FACTS, **facts))


def test_little_strength_leaves_no_step():
    with pytest.raises(ValueError, match="strength 0.05 leaves none of 10 steps"):
        DrawRequest(image=PHOTO, strength=0.05, steps=10)


def test_seeds():
    assert DrawRequest(seed=7).seeded(3) == DrawRequest(seed=7)
    found = {DrawRequest().seeded().seed for _ in range(5)}
    assert len(found) == 5 and all(0 <= seed < 2**32 for seed in found)
    assert DrawRequest(seed=MAX_SEED).seeded().seed == MAX_SEED
    with pytest.raises(ValueError, match=f"^p: seed is {MAX_SEED}, so that the last picture's would be {MAX_SEED + 1}"):
        DrawRequest(seed=MAX_SEED, place="p: ").seeded(2)


@pytest.mark.parametrize("kind", ["dit", "unet", "learned", "edm"])
def test_a_folders_facts_are_those_of_the_loaded_model(kind, request):
    folder = request.getfixturevalue(f"{kind}_folder")
    assert read_facts(folder) == TextToImage.load(folder).facts


def test_facts_of_inpainting_of_a_single_file_and_of_nothing(tmp_path):
    TextToImage(stable_diffusion(1, inpainting=True), name="x", weights_hash="0").save(tmp_path / "painter")
    facts = read_facts(tmp_path / "painter")
    assert facts == TextToImage.load(tmp_path / "painter").facts and facts.for_inpainting
    write_single_file(stable_diffusion(1), tmp_path / "m.safetensors", dtype=torch.float32)
    assert read_facts(tmp_path / "m.safetensors") == ModelFacts(name="m")
    assert read_facts(tmp_path / "nowhere") == ModelFacts(name="nowhere")


def test_a_drawing_is_a_picture_and_its_recipe(dit_folder, tmp_path):
    pipe = TextToImage.load(dit_folder)
    options = DrawOptions(guidance_rescale=0.5)
    request = DrawRequest(prompt="a red apple", sampler="Euler", steps=2, scale=3, seed=5, options=options)
    drawings = pipe.draw(request, n=2)
    assert [one.image for one in drawings] == pipe(
        "a red apple", sampler="euler", steps=2, scale=3.0, seed=5, options=options, n=2
    )
    expected = Recipe(
        prompt="a red apple", negative_prompt="", steps=2, scale=3.0, sampler="euler", seed=6, width=16, height=16,
        model=pipe.name, weights_hash=pipe.weights_hash, device="cpu", precision="fp32", software=software(),
        options=options, default_grid="trailing",
    )  # fmt: skip
    assert drawings[1].recipe == expected
    (tmp_path / "x.png").write_bytes(png_bytes(drawings[1].image, [drawings[1].recipe]))
    assert read_recipes(tmp_path / "x.png") == [expected]


def test_a_random_seed_is_in_the_recipes(dit_folder):
    first, second = TextToImage.load(dit_folder).draw(DrawRequest(steps=1), n=2)
    assert first.recipe.seed >= 0 and second.recipe.seed == first.recipe.seed + 1


def test_a_picture_to_begin_with_is_in_the_recipe(tmp_path):
    PHOTO.save(tmp_path / "photo.png")
    photo = read_picture(tmp_path / "photo.png")
    digest = hashlib.sha256((tmp_path / "photo.png").read_bytes()).hexdigest()[:10]
    assert picture_hash(photo) == digest
    own = picture_hash(PHOTO)  # of its pixels: there was no file
    assert len(own) == 10 and own == picture_hash(PHOTO.copy()) != picture_hash(PHOTO.rotate(90, expand=True))
    pipe = TextToImage(stable_diffusion(1), name="tiny", weights_hash="0")
    ((_, recipe),) = pipe.draw(DrawRequest(image=photo, mask=PHOTO, steps=2))
    assert (recipe.init_image, recipe.mask, recipe.strength) == (digest, own, 1.0)
    assert (recipe.width, recipe.height) == (48, 40)


def test_what_a_model_was_loaded_with_is_recorded(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", {"sshs_model_hash": "0123456789abcdef"})
    (tmp_path / "vae").mkdir()
    hashed = hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()[:10]
    loras = [(tmp_path / "a.safetensors", 0.8), (tmp_path / "a.safetensors", 1.0)]
    assert recorded(LoadOptions(lora=loras, vae=tmp_path / "vae", ema=False, prediction="v")) == {
        "loras": f"a.safetensors:0.8 {hashed}, a.safetensors {hashed}", "lora_hashes": "0123456789ab, 0123456789ab",
        "vae": "vae", "text": "", "ema": False, "prediction": "v",
    }  # fmt: skip
    assert recorded(LoadOptions()) == {
        "loras": "",
        "lora_hashes": "",
        "vae": "",
        "text": "",
        "ema": True,
        "prediction": "",
    }


@pytest.fixture
def painter():
    return type("Painter", (FakeTextToImage,), {"loads": [], "calls": []}).load("tiny")


def test_many_requests_are_drawn_in_order(painter):
    requests = [DrawRequest(prompt="a", steps=3, seed=5), DrawRequest(prompt="b", steps=1, seed=9)]
    started, steps = [], []
    found = draw_all(
        painter, requests, n=2, repeats=2, started=started.append, progress=lambda done, of: steps.append((done, of))
    )
    seeds = [[(one.recipe.prompt, one.recipe.seed) for one in drawings] for drawings in found]
    assert seeds == [[("a", 5), ("a", 6)], [("a", 7), ("a", 8)], [("b", 9), ("b", 10)], [("b", 11), ("b", 12)]]
    assert [request.prompt for request in started] == ["a", "b"]
    assert steps == sorted(steps) and steps[-1] == (8, 8) and {of for _, of in steps} == {8}


def test_all_are_checked_before_one_is_drawn(painter):
    with pytest.raises(ValueError, match="width is 7"):
        next(draw_all(painter, [DrawRequest(), DrawRequest(width=7)]))
    assert painter.calls == []


def test_a_sheet_is_written_when_the_size_changes(painter, tmp_path):
    sheet = Sheet(NumberedFiles(tmp_path, prefix="grid-", digits=4), columns=4)
    small, wide = (next(draw_all(painter, [DrawRequest(width=w, seed=1)], n=2, progress=print)) for w in (16, 24))
    assert sheet.add(small) is None and sheet.add(small) is None
    assert sheet.add(wide) == tmp_path / "grid-0000.png" and sheet.write() == tmp_path / "grid-0001.png"
    assert [len(read_recipes(tmp_path / f"grid-000{i}.png")) for i in range(2)] == [4, 2]


@pytest.mark.parametrize("name", ldm.__all__)
def test_what_a_program_needs_is_in_ldm(name):
    assert getattr(ldm, name).__name__ == name


def test_a_name_that_ldm_has_not():
    with pytest.raises(AttributeError, match="module 'ldm' has no attribute 'Text2Image'"):
        _ = ldm.Text2Image  # pyright: ignore[reportAttributeAccessIssue]


def test_a_request_needs_no_torch():
    script = "import sys, ldm; ldm.DrawRequest(prompt='x', seed=1).seeded(4); print('torch' in sys.modules)"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
