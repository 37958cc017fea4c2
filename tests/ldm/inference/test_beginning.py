"""Pictures to start from and masks: every reader takes the zoo, sizes obey limits, and what is kept stays."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.stable_diffusion import stable_diffusion
from helpers.zoo import Odd, saved, zoo
from PIL import Image

from data.pictures import decode_picture
from ldm.diffusion import RectifiedFlowPath
from ldm.inference.img2img import canvas
from ldm.inference.masks import read_mask, softened
from ldm.inference.options import DrawOptions
from ldm.inference.pictures import picture_hash, read_picture
from ldm.inference.pipeline import TextToImage
from ldm.inference.recipe import png_bytes, read_recipes
from ldm.inference.request import DrawRequest
from ldm.model.facts import ModelFacts

SOUND = [odd for odd in zoo() if odd.shows is not None]
BAD = [odd for odd in zoo() if odd.shows is None]
FACTS = ModelFacts(
    name="tiny", path=RectifiedFlowPath(), learned_variance=False, native_size=64, factor=8, for_inpainting=False
)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of metadata that it cannot read


def name_of(odd: Odd) -> str:
    return odd.name


def photo(width: int = 32, height: int = 32, channels: int = 3) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values)


def upper(width: int = 32, height: int = 32) -> Image.Image:
    """A mask: white in the upper half."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width, height // 2))
    return mask


@pytest.fixture(scope="module", params=["four channels", "nine channels"])
def pipe(request: pytest.FixtureRequest) -> TextToImage:
    parts = stable_diffusion(1, inpainting=request.param == "nine channels")
    return TextToImage(parts, name="tiny", weights_hash="0")


@pytest.fixture(scope="module")
def plain() -> TextToImage:
    return TextToImage(stable_diffusion(1), name="tiny", weights_hash="0")


def said(request: DrawRequest, facts: ModelFacts = FACTS) -> tuple[DrawRequest, list[str]]:
    """The checked request, and what is said of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checked = request.check(facts)
        assert checked.check(facts) == checked
    return checked, list(dict.fromkeys(str(warning.message) for warning in caught))


# -- every reader, one decoder


@pytest.mark.parametrize("odd", SOUND, ids=name_of)
def test_files_and_images_to_start_from_are_decoded_as_in_training(odd: Odd, tmp_path: Path):
    """From the command line, and as an image that a program has opened; as picture and as mask."""
    expected = decode_picture(odd.data)
    path = tmp_path / f"a.{odd.extension}"
    path.write_bytes(odd.data)
    read = read_picture(path)
    assert (read.mode, read.size, read.tobytes()) == (expected.mode, expected.size, expected.tobytes())
    opened = [Image.open(io.BytesIO(odd.data)), Image.open(path)] if odd.opens else [read, read]
    request = DrawRequest(image=opened[0], mask=opened[1], strength=0.5)
    for given in (request.image, request.mask):
        assert given is not None and (given.mode, given.tobytes()) == (expected.mode, expected.tobytes())
    white = read_mask(read, (read.height, read.width))[0, 0].numpy()
    assert odd.shows is not None
    if not odd.lossy:
        shown = odd.shows.astype(float)
        level = (shown[..., :3] @ [0.299, 0.587, 0.114]) * shown[..., 3] / 255
        clear = np.abs(level - 127.5) > odd.within + 2
        assert np.array_equal((white == 1)[clear], (level >= 128)[clear])


@pytest.mark.parametrize("odd", BAD, ids=name_of)
def test_files_that_are_not_read_are_named(odd: Odd, tmp_path: Path):
    path = tmp_path / "odd file.png"
    path.write_bytes(odd.data)
    with pytest.raises(ValueError, match=rf"odd file.png cannot be used as a picture: .*({odd.reason})"):
        read_picture(path)


def test_an_image_that_does_not_decode_is_named():
    """A program's image is read when it is needed, which is here."""
    data = saved(photo(64, 64), "PNG")[:6000]
    with pytest.raises(ValueError, match="the image cannot be used: it is damaged .image file is truncated"):
        DrawRequest(image=Image.open(io.BytesIO(data)))
    with pytest.raises(ValueError, match="the mask cannot be used: it is damaged .image file is truncated"):
        DrawRequest(image=photo(), mask=Image.open(io.BytesIO(data)))
    values: Any = np.zeros((4, 4), dtype=np.float32)
    values[0, 0] = np.nan
    with pytest.raises(ValueError, match="the mask cannot be used: its grey is in floating point from nan to nan"):
        DrawRequest(image=photo(), mask=Image.fromarray(values))


# -- masks


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "I", "I;16", "I;16B", "F", "float"]
)
def test_a_mask_is_luminance_times_alpha_in_every_mode(mode: str):
    """White in the upper half, opaque in the left: only the upper left is painted where there is alpha."""
    grey = np.zeros((8, 8), np.uint8)
    grey[:4] = 255
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:, :4] = 255
    expected = grey
    if mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        expected = grey * (alpha // 255)
        image = Image.fromarray(np.dstack([grey, grey, grey, alpha]))
        image = image.convert("LA").convert(mode) if mode in ("LA", "La") else image
        if mode == "PA":
            image = Image.fromarray(grey).convert("P").convert("PA")
            image.putalpha(Image.fromarray(alpha))
        image = image.convert(mode)
    elif mode.startswith("I;16"):
        image = Image.fromarray((grey.astype(np.uint16) * 257).astype(">u2" if mode.endswith("B") else "<u2"))
    else:
        image = (
            Image.fromarray((grey / 255).astype(np.float32)) if mode == "float" else Image.fromarray(grey).convert(mode)
        )
    assert image.mode == ("F" if mode == "float" else mode)
    found = canvas(photo(8, 8), image, 1.0, size=(8, 8)).mask
    assert found is not None and np.array_equal(found[0, 0].numpy() * 255, expected)


def test_a_palette_with_a_hole_is_a_mask_with_a_hole(tmp_path: Path):
    mask = Image.new("P", (8, 8), 1)
    mask.putpalette([0, 0, 0, 255, 255, 255, 254, 254, 254])
    mask.paste(2, (0, 0, 4, 8))
    mask.save(tmp_path / "m.png", transparency=2)
    found = read_mask(read_picture(tmp_path / "m.png"), (8, 8))[0, 0]
    assert found[:, :4].sum() == 0 and found[:, 4:].all()


def test_what_the_mask_keeps_is_the_picture_itself(pipe: TextToImage):
    """Bit for bit, in every value from 0 to 255, also after many passes; and the rest is drawn anew."""
    base = begun = photo()
    assert len(set(base.tobytes())) == 256
    for seed in range(4):
        (begun,) = pipe("a red apple", image=begun, mask=upper(), steps=2, seed=seed)
    kept, was = np.asarray(begun)[16:], np.asarray(base)[16:]
    assert np.array_equal(kept, was)
    assert np.abs(np.asarray(begun)[:16].astype(int) - np.asarray(base)[:16]).mean() > 20


def test_a_black_mask_changes_nothing_and_says_so(pipe: TextToImage):
    with pytest.warns(UserWarning, match="the mask is nowhere lighter than 127 of 255: nothing is repainted"):
        (drawn,) = pipe("x", image=photo(), mask=Image.new("L", (32, 32)), steps=2)
    assert drawn.tobytes() == photo().tobytes()


def test_what_is_kept_does_not_depend_on_the_batch_or_the_sampler(plain: TextToImage):
    for sampler in ("dpm_fast", "euler_ancestral", "ddim"):
        images = plain("x", image=photo(), mask=upper(), steps=6, n=3, sampler=sampler, strength=0.7)
        assert all(np.array_equal(np.asarray(image)[16:], np.asarray(photo())[16:]) for image in images)
        assert len({image.tobytes() for image in images}) == 3


def test_a_soft_edge_is_within_what_is_painted(pipe: TextToImage):
    """The ramp by its definition: distance to the kept part over the edge plus one."""
    settings: dict[str, Any] = {"image": photo(), "mask": upper(), "steps": 2, "seed": 1}
    (hard,) = pipe("a red apple", **settings)
    (soft,) = pipe("a red apple", **settings, options=DrawOptions(mask_edge=4))
    was, new, found = (np.asarray(image).astype(float) for image in (photo(), hard, soft))
    for row in range(32):
        weight = min(max(16 - row, 0) / 5, 1)
        assert np.abs(found[row] - (was[row] + weight * (new[row] - was[row]))).max() <= 1
    assert np.array_equal(found[16:], was[16:]) and np.array_equal(found[:12], new[:12])


def test_a_soft_edge_leaves_thin_lines_and_the_pictures_own_border():
    mask = torch.zeros(1, 1, 9, 9)
    mask[..., 4] = 1
    assert torch.equal(softened(mask, 3)[0, 0, :, 4], torch.full((9,), 0.25))
    assert torch.equal(softened(torch.ones(1, 1, 9, 9), 3), torch.ones(1, 1, 9, 9))
    assert torch.equal(softened(mask, 0), mask)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (Image.new("L", (32, 16), 255), "the mask has 32 x 16 pixels and the picture 32 x 32: it is stretched over"),
        (Image.new("L", (32, 32), 130), "100% of the mask is grey: from 128 of 255 on it counts as white"),
        (Image.new("RGBA", (32, 32), (255, 255, 255, 0)), "the mask is nowhere lighter than 127 of 255"),
    ],
)
def test_a_mask_that_cannot_be_followed_is_told(plain: TextToImage, mask: Image.Image, words: str):
    with pytest.warns(UserWarning, match=words) as told:
        ((_, recipe),) = plain.draw(DrawRequest(prompt="x", image=photo(), mask=mask, steps=1))
    assert recipe.remarks.splitlines() == [str(one.message) for one in told]


def test_a_mask_that_is_too_fine_for_the_model_is_told(plain: TextToImage):
    line = Image.new("L", (32, 32))
    line.paste(255, (0, 5, 32, 6))  # latents have 2 x 2 pixels or more
    with pytest.warns(UserWarning, match=r"100% of the mask's white part is finer than the model's cells .* thicker"):
        plain("x", image=photo(), mask=line, steps=1)


def test_a_usual_mask_is_not_talked_about(plain: TextToImage):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain("x", image=photo(), mask=upper(), steps=1)
        plain("x", image=photo(), mask=upper(64, 64), steps=1)  # another size, the same proportions


# -- transparency


def test_transparent_parts_become_white_and_that_is_said(plain: TextToImage, tmp_path: Path):
    hole = photo(32, 32, 4)
    hole.putalpha(upper().point(lambda value: 255 - value))
    checked, words = said(DrawRequest(image=hole), plain.facts)
    assert words == [
        "the picture's transparent parts become white; transparency 'mask' (--transparency mask) repaints them instead"
    ]
    assert checked.mask is None and checked.strength == 0.75
    _, words = said(DrawRequest(image=hole, mask=upper()), plain.facts)
    assert words == ["the picture's transparent parts become white"]
    hole.putalpha(255)
    assert said(DrawRequest(image=hole), plain.facts)[1] == []


def test_transparency_can_be_the_mask(pipe: TextToImage, tmp_path: Path):
    hole = photo()
    hole.putalpha(upper().point(lambda value: 255 - value))
    options = DrawOptions(transparency="mask")
    request = DrawRequest(prompt="x", image=hole, steps=2, seed=3, options=options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ((drawn, recipe),) = pipe.draw(request)
    white = photo()
    white.paste("white", (0, 0, 32, 16))
    ((same, _),) = pipe.draw(DrawRequest(prompt="x", image=white, mask=upper(), steps=2, seed=3))
    assert drawn.tobytes() == same.tobytes() and np.array_equal(np.asarray(drawn)[16:], np.asarray(photo())[16:])
    assert (recipe.mask, recipe.strength, recipe.options) == ("transparency", 1.0, options)
    (tmp_path / "x.png").write_bytes(png_bytes(drawn, [recipe]))
    assert read_recipes(tmp_path / "x.png") == [recipe]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "transparency is 'mask', but there is no picture with transparent parts: give a mask"),
        ({"image": photo()}, "transparency is 'mask', but there is no picture with transparent parts"),
        ({"image": Image.new("RGBA", (8, 8)), "mask": upper()}, "transparency is 'mask', and a mask was given, too"),
    ],
)
def test_a_transparency_that_cannot_be_the_mask_is_named(given: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        DrawRequest(**given, options=DrawOptions(transparency="mask"))


def test_an_edge_needs_a_mask():
    with pytest.raises(ValueError, match="mask edge is 3, but there is no mask: give one, too"):
        DrawRequest(image=photo(), options=DrawOptions(mask_edge=3))
    with pytest.raises(ValueError, match="mask edge is 300, expected 0 to 256"):
        DrawOptions(mask_edge=300)
    with pytest.raises(ValueError, match="no transparency 'black', expected white or mask"):
        DrawOptions(transparency="black")


def test_weights_for_inpainting_name_the_pictures_own_holes():
    pipe = TextToImage(stable_diffusion(1, inpainting=True), name="tiny", weights_hash="0")
    with pytest.raises(ValueError, match="give a mask too, white where to paint, or transparency 'mask' to paint"):
        pipe("x", image=Image.new("RGBA", (32, 32)), steps=2)


# -- sizes


@pytest.mark.parametrize(
    ("size", "drawn", "words"),
    [
        ((64, 64), (64, 64), None),
        ((128, 128), (128, 128), None),  # four times the pixels
        ((32, 32), (32, 32), None),  # a fourth
        (
            (61, 64),
            (56, 64),
            "the picture has 61 x 64 pixels, and sides must be multiples of 8: it is scaled to 56 x 64",
        ),
        (
            (1024, 768),
            (72, 56),
            "the picture has 1024 x 768 pixels, far from the 64 x 64 of tiny: it is scaled to 72 x 56",
        ),
        (
            (4000, 3000),
            (72, 56),
            "is scaled to 72 x 56; height and width (--H and --W) choose",
        ),
        ((1, 1), (64, 64), "the picture has 1 x 1 pixels, far from"),
        ((20, 10), (88, 48), "the picture has 20 x 10 pixels, far from"),
    ],
)
def test_a_picture_is_drawn_at_a_size_that_the_model_can_draw(size, drawn, words):
    checked, found = said(DrawRequest(image=Image.new("RGB", size)))
    assert (checked.width, checked.height) == drawn
    assert len(found) == (words is not None) and all(words in one for one in found)


def test_the_size_is_that_of_the_upright_picture(tmp_path: Path):
    tag = Image.Exif()
    tag[0x112] = 6
    photo(64, 96).save(tmp_path / "a.jpg", exif=tag)
    for image in (read_picture(tmp_path / "a.jpg"), Image.open(tmp_path / "a.jpg")):
        checked, _ = said(DrawRequest(image=image))
        assert (checked.width, checked.height) == (96, 64)


def test_a_side_that_is_given_scales_the_other():
    big = Image.new("RGB", (1024, 768))
    sides: list[tuple[dict[str, Any], tuple[int, int]]] = [({"width": 64}, (64, 48)), ({"height": 96}, (128, 96))]
    for given, drawn in sides:
        checked, words = said(DrawRequest(image=big, **given))
        assert (checked.width, checked.height) == drawn
        assert words == [
            "the picture has 1024 x 768 pixels, far from the 64 x 64 of tiny: it is scaled to "
            f"{drawn[0]} x {drawn[1]}; height and width (--H and --W) choose another size"
        ]


def test_a_picture_that_is_stretched_is_told():
    _, words = said(DrawRequest(image=Image.new("RGB", (100, 50)), width=64, height=64))
    assert words == ["the picture has 100 x 50 pixels, and is stretched to the 64 x 64 that were asked for"]
    assert said(DrawRequest(image=Image.new("RGB", (100, 50)), width=64, height=32))[1] == []


def test_sizes_of_files_obey_the_limits_of_options():
    thread = Image.new("RGB", (10_000, 1))
    with pytest.raises(ValueError, match=r"^line 3: the picture has 10000 x 1 pixels and would be drawn at 10000 x 8,"):
        DrawRequest(image=thread, place="line 3: ").check(FACTS)
    assert said(DrawRequest(image=thread, width=64, height=64))[0].width == 64


def test_what_is_not_known_of_the_model_waits(tmp_path: Path):
    assert DrawRequest(image=Image.new("RGB", (1024, 768))).check().width is None


def test_the_record_says_how_large_the_picture_was(plain: TextToImage):
    with pytest.warns(UserWarning, match="far from"):
        ((_, recipe),) = plain.draw(DrawRequest(prompt="x", image=Image.new("RGB", (1000, 1000)), steps=2, seed=1))
    assert "it is scaled to" in recipe.remarks
    assert recipe.init_size == "1000 x 1000" and (recipe.width, recipe.height) == (plain.native_size, plain.native_size)


def test_an_image_in_memory_is_known_by_what_it_was():
    """The hash of a picture's record is that of the image that was given."""
    for mode in ("L", "RGBA", "CMYK", "I;16"):
        image = Image.new(mode, (8, 8)) if mode == "I;16" else photo(8, 8).convert(mode)
        request = DrawRequest(image=image)
        assert request.image is not None and request.image.mode in ("RGB", "RGBA")
        assert picture_hash(request.image) == picture_hash(image)
    own = photo(8, 8)
    assert DrawRequest(image=own).image is own
