"""Bytes -> pixels and captions: every kind of picture, and every way in which a sample can be bad."""

from __future__ import annotations

import io
import json
import struct
import unicodedata
import zlib
from collections.abc import Callable

import pytest
import torch
from helpers.hostile import peak
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.bad_samples import BadSample
from data.captions import CONTROLS, read_captions
from data.readers import decode_pixels
from data.shards import BadSampleError, RawSample


def raw(**members: bytes) -> RawSample:
    return RawSample("00000.tar", "000000000", members)


def colour_of(pixels: torch.Tensor) -> tuple[int, ...]:
    """The single colour of a picture, back in 0..255; fails if it has several."""
    assert (pixels == pixels[:, :1, :1]).all()
    return tuple(((pixels[:, 0, 0] + 1) * 127.5).round().int().tolist())


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 128), (255, 127, 127)),
        ("LA", (40, 255), (40, 40, 40)),
        ("LA", (40, 0), (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 77 * 256, (77, 77, 77)),
    ],
)
def test_pictures_of_every_mode(
    image_bytes: Callable[..., bytes], mode: str, colour: object, expected: tuple[int, ...]
):
    pixels = decode_pixels(raw(png=image_bytes(colour, mode=mode)), 8)
    assert (pixels.shape, pixels.dtype) == ((3, 8, 8), torch.float32)
    assert colour_of(pixels) == expected


def test_a_palette_picture():
    image = Image.new("P", (8, 8), 3)
    image.putpalette([value for index in range(256) for value in (index, 2 * index % 256, 100)])
    opaque, transparent = io.BytesIO(), io.BytesIO()
    image.save(opaque, "PNG")
    image.save(transparent, "PNG", transparency=3)
    assert colour_of(decode_pixels(raw(png=opaque.getvalue()), 8)) == (3, 6, 100)
    assert colour_of(decode_pixels(raw(png=transparent.getvalue()), 8)) == (255, 255, 255)


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (10, 20, 30)), ("L", 10)])
def test_a_colour_that_counts_as_transparent_is_white(mode: str, colour: int | tuple[int, ...]):
    buffer = io.BytesIO()
    Image.new(mode, (8, 8), colour).save(buffer, "PNG", transparency=colour)
    assert colour_of(decode_pixels(raw(png=buffer.getvalue()), 8)) == (255, 255, 255)


def test_a_cmyk_jpeg(image_bytes: Callable[..., bytes]):
    data = image_bytes((0, 255, 255, 0), mode="CMYK", format="JPEG")
    assert colour_of(decode_pixels(raw(jpg=data), 8)) == pytest.approx((255, 0, 0), abs=3)


@pytest.mark.parametrize(("extension", "format"), [("jpg", "JPEG"), ("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_every_format(image_bytes: Callable[..., bytes], extension: str, format: str):
    members = {extension: image_bytes((200, 100, 50), format=format), "txt": b"orange"}
    levels = (decode_pixels(RawSample("s", "k", members), 8) + 1) * 127.5
    expected = torch.tensor([200.0, 100.0, 50.0]).view(3, 1, 1).expand(3, 8, 8)
    assert torch.allclose(levels, expected, atol=4.0)  # lossy formats miss by a little


def test_the_range_is_exactly_minus_one_to_one(image_bytes: Callable[..., bytes]):
    black, white = (decode_pixels(raw(png=image_bytes(c)), 8) for c in ("black", "white"))
    assert black.unique().tolist() == [-1.0]
    assert white.unique().tolist() == [1.0]


def test_all_256_levels_are_kept():
    image = Image.frombytes("L", (16, 16), bytes(range(256)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    levels = ((decode_pixels(raw(png=buffer.getvalue()), 16)[0] + 1) * 127.5).flatten()
    assert torch.allclose(levels, torch.arange(256.0), atol=1e-4)


@pytest.mark.parametrize(("size", "left", "top"), [((16, 8), 4, 0), ((8, 16), 0, 4), ((17, 8), 4, 0)])
def test_the_centre_is_cropped(size: tuple[int, int], left: int, top: int):
    image = Image.new("RGB", size, "red")
    image.paste("blue", (left, top, left + 8, top + 8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert colour_of(decode_pixels(raw(png=buffer.getvalue()), 8)) == (0, 0, 255)


def test_a_large_picture_is_averaged_and_a_small_one_enlarged(image_bytes: Callable[..., bytes]):
    board = Image.new("L", (64, 64))
    board.putdata([255 * ((x + y) % 2) for y in range(64) for x in range(64)])
    buffer = io.BytesIO()
    board.save(buffer, "PNG")
    assert decode_pixels(raw(png=buffer.getvalue()), 8).abs().max() < 0.05  # grey: nothing of the board aliases
    assert colour_of(decode_pixels(raw(png=image_bytes((1, 2, 3), size=(3, 5))), 8)) == (1, 2, 3)


def test_what_is_no_picture(image_bytes: Callable[..., bytes]):
    with pytest.raises(
        BadSampleError, match=r"no image among its members \(json, txt: data\.image_keys names others\)"
    ):
        decode_pixels(raw(txt=b"a cat", json=b"{}"), 8)
    with pytest.raises(BadSampleError, match="the image does not decode"):
        decode_pixels(raw(jpg=b"not a picture"), 8)
    with pytest.raises(BadSampleError, match="the image does not decode"):
        decode_pixels(raw(jpg=b""), 8)
    header = bytearray(image_bytes((1, 2, 3)))
    header[11] = 5  # the header's length, 13; Pillow's own error for it is a ValueError
    with pytest.raises(BadSampleError, match="Truncated IHDR"):
        decode_pixels(raw(png=bytes(header)), 8)
    whole = image_bytes((1, 2, 3), size=(64, 64), format="JPEG")
    with pytest.raises(BadSampleError, match="(?i)truncated"):
        decode_pixels(raw(jpg=whole[:-100]), 8)


@given(st.binary(max_size=8), st.integers(0, 100), st.sampled_from(["PNG", "JPEG", "WEBP"]))
def test_damage_gives_pixels_or_a_bad_sample(damage: bytes, place: int, format: str):
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((16, 16)).save(buffer, format)
    data = bytearray(buffer.getvalue())
    data[place : place + len(damage)] = damage
    try:
        pixels = decode_pixels(raw(png=bytes(data)), 8)
    except BadSampleError:
        return
    assert pixels.shape == (3, 8, 8) and pixels.abs().max() <= 1


def test_captions_are_read_best_first_and_each_once():
    record = {"caption": "a cat", "captions": ["a cat", "one cat", " a tabby "]}
    assert read_captions(raw(txt=b"a cat\n", json=json.dumps(record).encode())) == [
        "a cat",
        "one cat",
        "a tabby",
    ]
    assert read_captions(raw(txt=b"first", json=b'{"caption": "second"}')) == ["first", "second"]
    assert read_captions(raw(txt="ein Bär".encode())) == ["ein Bär"]


@pytest.mark.parametrize(
    ("json_text", "expected"),
    [
        ('{"url": "x"}', ["said"]),
        ('{"caption": null, "captions": null}', ["said"]),
        ('{"caption": ""}', ["said"]),
        ('{"captions": "a cat"}', ["said", "a cat"]),
    ],
)
def test_a_record_may_lack_captions_where_the_text_has_one(json_text: str, expected: list[str]):
    assert read_captions(raw(txt=b"said", json=json_text.encode())) == expected


def test_the_record_alone_is_enough():
    assert read_captions(raw(json=b'{"caption": "a cat"}')) == ["a cat"]
    assert read_captions(raw(txt=b"  \n", json=b'{"caption": "a cat"}')) == ["a cat"]


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({}, "no caption"),
        ({"txt": b""}, "no caption"),
        ({"txt": b" \n\t"}, "no caption"),
        ({"json": b'{"url": "x"}'}, "no caption"),
        ({"txt": b"caf\xe9"}, "does not parse.*utf-8"),
        ({"json": b"\xff\xfe{"}, "does not parse"),
        ({"json": b"[1, 2]"}, "does not parse"),
        ({"json": b'{"caption": 7}'}, "not text"),
        ({"json": b'{"caption": "nice \\ud83d"}'}, r"an unpaired surrogate \('\\ud83d'\)"),
        ({"json": b'{"captions": [7]}'}, "not text"),
    ],
)
def test_samples_without_a_usable_caption(members: dict[str, bytes], told: str):
    with pytest.raises(BadSampleError, match=told):
        read_captions(raw(**members))


def test_a_bad_sample_says_where_it_is():
    assert str(BadSample("00007.tar", "000070003", "no caption")) == "000070003 in 00007.tar: no caption"


def test_a_picture_lying_on_its_side_is_turned_as_its_exif_says():
    picture = Image.new("RGB", (8, 8), "white")
    picture.paste((0, 0, 0), (0, 0, 8, 4))  # the upper half black
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", exif=exif)
    pixels = decode_pixels(RawSample("s.tar", "k", {"png": buffer.getvalue()}), 8)
    assert pixels[:, 0].max() == 1.0
    assert pixels[:, 7].max() == -1.0


def test_a_byte_order_mark_is_no_part_of_the_caption():
    assert read_captions(RawSample("s.tar", "k", {"txt": "\ufeffa cat".encode()})) == ["a cat"]


def test_a_format_that_pillow_hands_to_other_programs_is_not_opened():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    with pytest.raises(BadSampleError, match="does not decode"):
        decode_pixels(RawSample("s.tar", "k", {"png": eps}), 8)


def png(width: int, height: int, *, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG of any kind; Pillow writes no 16-bit colour, and no picture that its header alone makes huge."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("colour", "values", "expected"),
    [
        (0, (77,), (77, 77, 77)),
        (2, (10, 20, 30), (10, 20, 30)),
        (4, (40, 255), (40, 40, 40)),
        (4, (40, 0), (255, 255, 255)),
        (6, (10, 20, 30, 255), (10, 20, 30)),
        (6, (10, 20, 30, 0), (255, 255, 255)),
    ],
)
def test_16_bits_a_channel(colour: int, values: tuple[int, ...], expected: tuple[int, ...]):
    pixel = b"".join(struct.pack(">H", value * 257) for value in values)
    data = png(8, 8, depth=16, colour=colour, rows=(b"\0" + pixel * 8) * 8)
    assert colour_of(decode_pixels(raw(png=data), 8)) == expected


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_few_bits_of_grey(depth: int):
    rows = (b"\0" + b"\xff" * depth) * 8
    assert colour_of(decode_pixels(raw(png=png(8, 8, depth=depth, colour=0, rows=rows)), 8)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("orientation", "white"),
    [(1, (0, 0)), (2, (0, 7)), (3, (7, 7)), (4, (7, 0)), (5, (0, 0)), (6, (0, 7)), (7, (7, 7)), (8, (7, 0))],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_each_orientation_of_exif_in_each_format(orientation: int, white: tuple[int, int], format: str):
    """A white corner goes where the orientation says; row and column of it as shown."""
    picture = Image.new("RGB", (16, 16), "black")
    picture.paste((255, 255, 255), (0, 0, 8, 8))
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    picture.save(buffer, format, exif=exif, quality=100)
    pixels = decode_pixels(raw(png=buffer.getvalue()), 16)[0]
    corners = {(row, column): pixels[row * 15 // 7, column * 15 // 7] > 0.5 for row in (0, 7) for column in (0, 7)}
    assert [corner for corner, is_white in corners.items() if is_white] == [white]


@pytest.mark.parametrize("format", ["GIF", "TIFF", "BMP", "PPM", "TGA", "AVIF", "JPEG2000"])
def test_other_formats_are_pictures_too_whatever_the_name(image_bytes: Callable[..., bytes], format: str):
    data = image_bytes((200, 100, 50), size=(16, 16), format=format)
    for extension in ("jpg", "gif", "bmp", "tif", "tiff", "avif", "tga", "ppm", "jp2"):
        found = colour_of(decode_pixels(RawSample("s", "k", {extension: data}), 8))
        assert found == pytest.approx((200, 100, 50), abs=2)


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"8BPS\0\1" + bytes(60), b"PK\3\4" + bytes(60), bytes(100)])
def test_other_files_are_no_pictures(data: bytes):
    with pytest.raises(BadSampleError, match=r"does not decode \(it is "):
        decode_pixels(raw(png=data), 8)


@pytest.mark.parametrize("size", [(8001, 8000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_a_huge_picture_is_refused_by_its_header(size: tuple[int, int]):
    with pytest.raises(BadSampleError, match="pixels"):
        before = peak(reset=True)
        try:
            decode_pixels(raw(png=png(*size, depth=8, colour=2, rows=b"")), 8)
        finally:
            assert peak() - before < 2**25


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_extreme_shapes_are_cropped_like_others(image_bytes: Callable[..., bytes], size: tuple[int, int]):
    assert colour_of(decode_pixels(raw(png=image_bytes((9, 8, 7), size=size)), 8)) == (9, 8, 7)


def test_the_first_picture_of_an_animation_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format in ("PNG", "WEBP"):
        buffer = io.BytesIO()
        frames[0].save(buffer, format, save_all=True, append_images=frames[1:], lossless=True)
        assert colour_of(decode_pixels(raw(png=buffer.getvalue()), 8)) == (255, 0, 0)


def test_an_error_without_words_is_told_by_its_kind(image_bytes: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch):
    """Pillow's plug-ins assert and index as they please."""

    def fails(image: Image.Image) -> Image.Image:
        raise AssertionError

    monkeypatch.setattr("data.pictures.srgb", fails)
    with pytest.raises(
        BadSampleError, match=r"does not decode \(it is damaged \(AssertionError\): use an intact copy\)"
    ):
        decode_pixels(raw(png=image_bytes((1, 2, 3))), 8)


def test_reasons_are_the_same_in_every_process():
    """They are listed once each: no address in memory may stand in them."""
    told = set()
    for _ in range(2):
        with pytest.raises(BadSampleError) as caught:
            decode_pixels(raw(png=bytes(bytearray(b"no picture"))), 8)
        told.add(str(caught.value))
    assert len(told) == 1 and "0x" not in told.pop()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cafe\u0301", "caf\u00e9"),
        ("a\tcat\r\nsat", "a cat  sat"),
        ("nul\0byte\x1b[31m\x9b", "nul byte [31m"),
        ("\u200d\U0001f469\u200d\U0001f680", "\u200d\U0001f469\u200d\U0001f680"),  # joiners make emoji
        ("\u202eright to left", "\u202eright to left"),
    ],
)
def test_captions_are_composed_and_without_controls(text: str, expected: str):
    for members in ({"txt": text.encode()}, {"json": json.dumps({"caption": text}).encode()}):
        assert read_captions(raw(**members)) == [expected]


def test_controls_are_those_of_unicode():
    found = {code for code in range(0x110000) if unicodedata.category(chr(code)) == "Cc"}
    assert found == CONTROLS.keys()


def test_two_ways_to_write_a_caption_are_one():
    assert read_captions(raw(txt=b"caf\xc3\xa9", json=b'{"caption": "cafe\\u0301"}')) == ["caf\u00e9"]


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"txt": b"x" * (64 * 1024 + 1)}, "a caption has 65,537 bytes, more than 65,536"),
        ({"txt": "é".encode() * (32 * 1024 + 1)}, "a caption has 65,538 bytes"),
        ({"json": json.dumps({"captions": ["x" * 70_000]}).encode()}, "a caption has 70,000 bytes"),
        ({"txt": b"\0\1\2"}, "no caption"),
        ({"txt": "a cat".encode("utf-16")}, "does not parse"),
        ({"txt": b"\xed\xa0\x80"}, "does not parse"),  # half a character as bytes
        ({"txt": b"\xc0\xaf"}, "does not parse"),  # a longer form of /
        ({"json": b"[" * 100_000}, "does not parse"),
        ({"json": b'{"n": ' + b"9" * 5000 + b"}"}, "does not parse"),
        ({"json": '{"caption": "a cat"}'.encode("utf-16")}, "does not parse"),
        (
            {"json": b'{"caption": {"en": "a cat"}}'},
            r"its json.caption is an object \(en: name one .*, as json.caption.en\)",
        ),
        ({"json": b'{"captions": {"en": "a cat"}}'}, "its json.captions is an object"),
        ({"json": b'{"caption": true}'}, "not text"),
        ({"json": b"null"}, "does not parse"),
        ({"json": b""}, "does not parse"),
    ],
)
def test_captions_that_are_rejected(members: dict[str, bytes], told: str):
    with pytest.raises(BadSampleError, match=told):
        read_captions(raw(**members))


def test_the_longest_caption_is_read():
    assert read_captions(raw(txt=b"x" * 64 * 1024)) == ["x" * 64 * 1024]


def test_a_byte_order_mark_before_json_is_passed_over():
    assert read_captions(raw(json=b'\xef\xbb\xbf{"caption": "a cat"}')) == ["a cat"]
