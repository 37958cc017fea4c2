"""The zoo of odd pictures in training: each means what its file says, or is rejected by name."""

from __future__ import annotations

import io
import re
import sys
import threading
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.profiles import adobe_rgb
from helpers.zoo import COLOURS, CORNERS, Odd, exif, jpeg_with, saved, zoo
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data.bad_samples import BadSample
from data.config import DataConfig
from data.loader import CaptionedImages
from data.orientation import exif_orientation
from data.pictures import EXTENSIONS, FORMATS, decode_picture, normalized, over_white
from data.readers import decode_pixels
from data.shards import BadSampleError, RawSample

SOUND = [odd for odd in zoo() if odd.shows is not None]
BAD = [odd for odd in zoo() if odd.shows is None]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of metadata that it cannot read


def name_of(odd: Odd) -> str:
    return odd.name


def test_the_zoo_is_large_and_each_has_a_name():
    assert len(SOUND) > 150 and len(BAD) > 50 and len({odd.name for odd in zoo()}) == len(zoo())
    assert {odd.extension for odd in zoo()} <= set(EXTENSIONS)


@pytest.mark.parametrize("odd", SOUND, ids=name_of)
def test_a_picture_shows_what_its_file_says(odd: Odd):
    picture = decode_picture(odd.data)
    found = np.asarray(picture.convert("RGBA"))
    assert odd.shows is not None and found.shape == odd.shows.shape
    seen = odd.shows[..., 3:] > 0  # what is fully transparent has no colour
    assert odd.differs(found[..., :3] * seen, odd.shows[..., :3] * seen) <= odd.within
    assert odd.differs(found[..., 3:], odd.shows[..., 3:]) <= (odd.within if odd.lossy else 0)
    assert picture.mode == ("RGB" if (odd.shows[..., 3] == 255).all() else "RGBA")
    assert normalized(picture) is picture and not picture.getexif() and "icc_profile" not in picture.info


@pytest.mark.parametrize("odd", BAD, ids=name_of)
def test_what_is_not_read_is_named(odd: Odd):
    with pytest.raises(ValueError, match=odd.reason) as caught:
        decode_picture(odd.data)
    words = str(caught.value)
    assert len(words.splitlines()) == 1 and "0x" not in words


def test_training_reads_all_of_the_zoo(tmp_path: Path, write_tar: Callable[[Path, Sequence[tuple[str, bytes]]], Path]):
    """One shard with all of them: the sound ones are delivered, the others rejected by key and reason."""
    members = [
        member for number, odd in enumerate(zoo())
        for member in ((f"{number:03d}.{odd.extension}", odd.data), (f"{number:03d}.txt", odd.name.encode()))
    ]  # fmt: skip
    write_tar(tmp_path / "zoo.tar", members)
    bad: list[BadSample] = []
    config = DataConfig(shards=str(tmp_path / "zoo.tar"), image_size=32, lanes=1, batch_size=1, max_bad_fraction=1)
    batches = list(CaptionedImages(config, seed=0, on_bad=bad.append).once(16))
    captions = [caption for batch in batches for caption in batch.captions]
    assert sorted(captions) == sorted(odd.name for odd in SOUND)
    reasons = {zoo()[int(one.key)].name: one.reason for one in bad}
    assert reasons.keys() == {odd.name for odd in BAD}
    assert all(re.search(odd.reason, reasons[odd.name]) for odd in BAD)


@pytest.mark.parametrize(
    "odd", [odd for odd in SOUND if odd.shows is not None and odd.shows.shape[0] == 32], ids=name_of
)
def test_training_pixels_are_those_over_white(odd: Odd):
    pixels = decode_pixels(RawSample("s", "k", {odd.extension: odd.data}), 32)
    found = ((pixels + 1) * 127.5).permute(1, 2, 0).numpy()
    assert odd.differs(found, odd.over_white()) <= odd.within + 1


def as_it_was(data: bytes) -> Image.Image:
    """What was done with pictures before profiles counted: those without any must stay the same, bit for bit."""
    with Image.open(io.BytesIO(data), formats=("WEBP", "PNG", "JPEG")) as image:
        turned = ImageOps.exif_transpose(image)
        if turned.mode == "RGB" and not turned.has_transparency_data:
            return turned.copy()
        eight = turned.point(lambda value: value * (1 / 256)).convert("L") if turned.mode == "I;16" else turned
        layer = eight.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


@pytest.mark.parametrize(
    ("format", "mode"),
    [
        *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        *(("JPEG", mode) for mode in ("1", "L", "RGB", "CMYK")),
        *(("WEBP", mode) for mode in ("L", "RGB", "RGBA")),
    ],
)
@pytest.mark.parametrize("way", [None, 6])
def test_a_sound_picture_is_decoded_as_ever(format: str, mode: str, way: int | None):
    values = np.random.default_rng(5).integers(0, 256, (33, 47, 4), dtype=np.uint8)
    deep = Image.fromarray(values[..., 0].astype(np.uint16) * 256 + values[..., 1])
    image = deep if mode == "I;16" else Image.fromarray(values).convert(mode)
    if mode == "CMYK":
        image = Image.merge("CMYK", Image.fromarray(values).split())
    tag = Image.Exif()
    if way:
        tag[0x112] = way
    data = saved(image, format, exif=tag)
    assert over_white(decode_picture(data)).tobytes() == as_it_was(data).tobytes()


def test_formats_that_run_a_program_are_not_tried():
    assert not {"EPS", "WMF", "PSD", "FITS", "HDF5", "GRIB", "BUFR"} & set(FORMATS) and FORMATS[-1] == "TGA"


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"hevc"])
def test_heic_is_read_with_the_package_that_the_message_names(brand: bytes, monkeypatch: pytest.MonkeyPatch):
    """A stand-in for it: its opener shows an orange picture."""
    data = b"\0\0\0\x18ftyp" + brand + bytes(60)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # not installed
    with pytest.raises(ValueError, match="it is HEIC, .*: pip install pillow-heif"):
        decode_picture(data)

    def register() -> None:
        Image.register_open("HEIF", lambda file, name: Image.new("RGB", (4, 4), (200, 100, 50)))  # type: ignore[arg-type]

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register))
    assert decode_picture(data).getpixel((1, 1)) == (200, 100, 50)
    monkeypatch.delitem(Image.OPEN, "HEIF")


def test_a_pillow_without_avif_is_named(monkeypatch: pytest.MonkeyPatch):
    data = saved(Image.fromarray(CORNERS), "AVIF")
    assert decode_picture(data).size == (32, 32)
    monkeypatch.setattr("data.pictures._installed", lambda: ["JPEG", "PNG", "TGA"])
    with pytest.raises(ValueError, match="it is AVIF, which this Pillow does not read: pip install --upgrade pillow"):
        decode_picture(data)


@pytest.mark.parametrize("format", FORMATS)
@given(places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_damage_of_any_kind_is_a_value_error(format: str, places: list[tuple[float, int]]):
    data = bytearray(saved(Image.fromarray(COLOURS), format))
    for place, value in places:
        data[round(place * (len(data) - 1))] = value
    try:
        picture = decode_picture(bytes(data))
    except ValueError as error:
        assert str(error)
    else:
        assert picture.mode in ("RGB", "RGBA")


@given(data=st.binary(max_size=80), after=st.binary(max_size=40))
def test_exif_of_any_bytes_turns_at_worst_nothing(data: bytes, after: bytes):
    for start in (b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b""):
        assert exif_orientation(b"Exif\0\0" + start + data) in {None, *range(1, 9)}
    assert decode_picture(jpeg_with(exif((0x112, 3, 1, b"\1")) + after)).size == (32, 32)


def test_no_tag_of_any_type_beside_the_orientation_matters():
    """Over a thousand JPEGs, each with an orientation and one more tag of a wrong type, length or place."""
    expected = decode_picture(jpeg_with(exif((0x112, 3, 1, b"\6")))).tobytes()
    tags = (0x100, 0x102, 0x10E, 0x10F, 0x110, 0x11A, 0x128, 0x131, 0x13B, 0x2BC, 0x8769, 0x8825, 0x9286, 0xA005)
    for tag in tags:
        for kind in (*range(15), 99):
            for count, value in ((0, 0), (1, 0x26), (8, 0x26), (1, 0xFFFFFFFF), (0xFFFFFFFF, 8)):
                entries = sorted([(0x112, 3, 1, b"\6"), (tag, kind, count, value.to_bytes(4, "little"))])
                found = decode_picture(jpeg_with(exif(*entries, data=b"A" * 64)))
                assert found.tobytes() == expected, (tag, kind, count, value)


def test_threads_share_a_profile():
    """Transforms are kept, and used by all of the loader's threads at once."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    data = saved(image, "PNG", icc_profile=adobe_rgb())
    expected, found = decode_picture(data).tobytes(), list[bytes]()
    threads = [
        threading.Thread(target=lambda: found.extend(decode_picture(data).tobytes() for _ in range(5)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {expected} and len(found) == 40


def test_a_profile_that_moves_nothing_costs_nothing():
    """Nearly all profiles on the web are sRGB's: their pictures stay as they are, bit for bit."""
    own = next(odd for odd in SOUND if odd.name == "PNG, sRGB by profile")
    assert decode_picture(own.data).tobytes() == COLOURS.tobytes()


def test_a_profile_of_absurd_size_is_ignored():
    """They are kept, and a hostile shard may hold as many as it likes."""
    image = Image.fromarray(COLOURS)
    image.info["icc_profile"] = adobe_rgb() + bytes(10)
    assert normalized(image).tobytes() != COLOURS.tobytes()
    image.info["icc_profile"] = adobe_rgb() + bytes(9 << 20)
    assert normalized(image).tobytes() == COLOURS.tobytes()


def test_the_first_of_several_pictures_of_a_sample_is_used():
    red, blue = (saved(Image.new("RGB", (8, 8), colour), "PNG") for colour in ("red", "blue"))
    for first, second in (("webp", "png"), ("png", "jpg"), ("jpg", "jpeg"), ("jpeg", "gif"), ("gif", "heic")):
        pixels = decode_pixels(RawSample("s", "k", {second: blue, first: red}), 8)
        assert torch.equal(pixels[:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))
    with pytest.raises(BadSampleError, match="no image among its members"):
        decode_pixels(RawSample("s", "k", {"eps": red}), 8)
