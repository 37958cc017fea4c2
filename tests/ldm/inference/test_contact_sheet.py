"""Pixels as pictures, and sheets of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from ldm.inference.contact_sheet import GAP, LABEL_LINES, LINE_HEIGHT, save_image, sheet, to_images, wrapped

LABEL_HEIGHT = LABEL_LINES * LINE_HEIGHT


def test_the_ends_of_the_range_are_black_and_white_and_beyond_is_clamped():
    pixels = torch.tensor([-1.0, 1.0, 0.0, -7.0, 7.0, 0.5]).view(6, 1, 1, 1).expand(6, 3, 4, 5)
    images = to_images(pixels)
    assert [image.getpixel((2, 2)) for image in images] == [(v,) * 3 for v in (0, 255, 128, 0, 255, 191)]
    assert {(image.mode, image.size) for image in images} == {("RGB", (5, 4))}


def test_all_levels_come_back():
    levels = torch.arange(256.0).view(1, 1, 16, 16).expand(1, 3, 16, 16) / 127.5 - 1
    image = to_images(levels.bfloat16().float())[0]
    assert to_images(levels)[0].tobytes()[::3] == bytes(range(256))
    assert image.size == (16, 16)


def test_channels_are_red_green_blue():
    pixels = torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert to_images(pixels.requires_grad_(False))[0].getpixel((0, 0)) == (255, 0, 128)


def colours(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 6), (10 * number, 0, 99)) for number in range(count)]


@pytest.mark.parametrize("zoom", [1, 3])
@pytest.mark.parametrize("labelled", [False, True])
def test_pictures_stand_row_by_row(zoom: int, labelled: bool):
    images = colours(5)
    drawn = sheet(images, columns=2, zoom=zoom, labels=[""] * 5 if labelled else ())
    width, height = 8 * zoom, 6 * zoom + (LABEL_HEIGHT if labelled else 0)
    assert drawn.size == (2 * (width + GAP) + GAP, 3 * (height + GAP) + GAP)
    for place in range(5):
        left, top = GAP + place % 2 * (width + GAP), GAP + place // 2 * (height + GAP)
        box = drawn.crop((left, top, left + 8 * zoom, top + 6 * zoom))
        assert box.getcolors() == [(48 * zoom * zoom, (10 * place, 0, 99))]
    empty = drawn.crop((GAP + width + GAP, GAP + 2 * (height + GAP), 2 * (width + GAP), 3 * (height + GAP)))
    assert empty.getcolors() == [(empty.width * empty.height, (208, 208, 208))]


def test_a_label_is_written_below_and_cut_to_the_width():
    image = Image.new("RGB", (30, 6), "red")
    drawn = sheet([image, image], columns=2, labels=["a label that is far too long for it", ""])
    below = drawn.crop((GAP, GAP + 6, GAP + 30, GAP + 6 + LABEL_HEIGHT))
    assert below.convert("L").getextrema()[0] < 60  # pyright: ignore[reportOperatorIssue]
    right = drawn.crop((GAP + 30, GAP + 6, drawn.width, drawn.height))  # the gap, and the neighbour without a label
    assert right.getcolors() == [(right.width * right.height, (208, 208, 208))]
    picture = drawn.crop((GAP, GAP, GAP + 30, GAP + 6))
    assert picture.getcolors() == [(180, (255, 0, 0))]


def test_one_label_may_stand_below_a_whole_row():
    images = [Image.new("RGB", (30, 6), "red")] * 6
    drawn = sheet(images, columns=3, labels=["one label for three pictures", "another"])
    for row in range(2):
        top = GAP + row * (6 + LABEL_HEIGHT + GAP) + 6
        second = drawn.crop((GAP + 30 + GAP, top, GAP + 60, top + LABEL_HEIGHT))  # below the middle picture
        dark = second.convert("L").getextrema()[0] < 60  # pyright: ignore[reportOperatorIssue]
        assert dark == (row == 0)  # the long label reaches it, the short one does not


def test_labels_break_between_words():
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    width = 60
    lines = wrapped(draw, "a noto emoji of woman surfing incomprehensibilities", width)
    assert " ".join(lines[:-1]) == "a noto emoji of woman surfing"
    assert len(lines) > 2
    assert "incomprehensibilities".startswith(lines[-1])
    assert len(lines[-1]) < len("incomprehensibilities")


def test_a_picture_is_written_whole(tmp_path: Path):
    path = tmp_path / "step_1.png"
    save_image(colours(2)[1], path)
    with Image.open(path) as image:
        assert (image.format, image.getpixel((0, 0))) == ("PNG", (10, 0, 99))
    assert [file.name for file in tmp_path.iterdir()] == ["step_1.png"]
