"""Files of textual inversions, in the forms that other programs write."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.stable_diffusion import stable_diffusion
from safetensors.torch import save_file
from torch import Tensor

from ldm.interop.embedding_files import embedding_source, read_embedding, with_embeddings
from ldm.model.conditioner import Conditioner


def vectors(count: int = 2, width: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def a1111(values: Tensor) -> dict[str, Any]:
    """As A1111's Embedding.save writes it."""
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": values},
        "name": "other",
        "step": 100,
        "sd_checkpoint": "0123456789",
        "sd_checkpoint_name": None,
    }


FORMS: dict[str, tuple[Any, str]] = {
    "easy.pt": (a1111(vectors()), ""),
    "parameter.pt": (a1111(torch.nn.Parameter(vectors())), ""),
    "learned_embeds.bin": ({"<cat-toy>": vectors()}, "<cat-toy>"),
    "one.bin": ({"<one>": vectors()[0]}, "<one>"),
    "list.pt": ([{"x": vectors()[:1]}, {"y": vectors()[1:]}], ""),
    "list of vectors.pt": ([{"x": vectors()[0]}, {"y": vectors()[1]}], ""),
    "params.safetensors": ({"emb_params": vectors()}, ""),
    "half.safetensors": ({"<cat-toy>": vectors().half()}, "<cat-toy>"),
}


def written(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read(tmp_path: Path, name: str):
    content, token = FORMS[name]
    found = read_embedding(written(tmp_path, name, content))
    expected = vectors()[:1] if name == "one.bin" else vectors()
    assert torch.equal(found.vectors, expected.half().float() if "half" in name else expected)
    assert (found.name, found.token, found.source) == (Path(name).stem, token, tmp_path / name)
    assert read_embedding(tmp_path / name, "mine").name == "mine"


def conditioner() -> Conditioner:
    return stable_diffusion(1).model.conditioner


def given(*paths: Any) -> Conditioner:
    return with_embeddings(conditioner(), [embedding_source(path) for path in paths])


def test_a_folder_gives_all_that_fit(tmp_path: Path):
    (tmp_path / "below").mkdir()
    written(tmp_path, "a.pt", a1111(vectors()))
    written(tmp_path / "below", "b-neg.safetensors", {"emb_params": vectors(3)})
    written(tmp_path, "wide.pt", a1111(vectors(width=1024)))
    (tmp_path / "preview.png").write_bytes(b"x")
    (tmp_path / "damaged.pt").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"left out: .*damaged\.pt does not contain weights") as told:
        found = given(tmp_path)
    assert len(told) == 1 and found.embeddings is not None
    assert [one.name for one in found.embeddings.embeddings] == ["a", "b-neg"]
    assert [one.name for one in found.embeddings_in(["a cat, b-neg"])] == ["a", "b-neg"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x.pt", a1111(vectors(width=1024)), r"width 1024 \(Stable Diffusion 2\), expected 64: give one made for this"),
        ("x.safetensors", {"clip_g": vectors(width=1280), "clip_l": vectors(width=768)}, "is an embedding for SDXL"),
        ("x.bin", {"<a>": vectors(), "<b>": vectors()}, "has 2 tensors, expected the vectors of one embedding"),
        ("x.bin", {"name": "nothing"}, "has 0 tensors"),
        ("x.bin", {"<a>": torch.full((1, 64), float("nan"))}, "no vectors of finite numbers"),
        ("x.bin", {"<a>": torch.ones(1, 64, dtype=torch.int64)}, "no vectors of finite numbers"),
        ("x.bin", {"<a>": torch.ones(2, 2, 64)}, r"shape \(2, 2, 64\)"),
        ("x.bin", [{"<a>": vectors()}, {"<b>": vectors(width=32)}], "has vectors of several widths"),
        ("x.bin", {"<a>": vectors(76)}, "has 76 vectors, expected at most 75"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, name: str, content: Any, told: str):
    path = written(tmp_path, name, content)
    with pytest.raises(ValueError, match=told) as caught:
        given(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_in_a_file_is_executed(tmp_path: Path):
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    path = written(tmp_path, "x.pt", a1111(vectors()) | {"optimizer": Evil()})
    with pytest.raises(ValueError, match=r"x\.pt asks to run|not a complete PyTorch checkpoint"):
        given(path)
    assert not (tmp_path / "executed").exists()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert given(tmp_path).embeddings is None
    assert len(told) == 1


def test_a_missing_or_large_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="there is no embedding at .*x.pt: give its file, or a folder"):
        given(tmp_path / "x.pt")
    with (tmp_path / "y.pt").open("wb") as file:
        file.truncate(2**27)
    with pytest.raises(ValueError, match="has 134217728 bytes, more than any embedding"):
        given(tmp_path / "y.pt")
    with pytest.raises(ValueError, match="is a folder, which cannot be named 'z'"):
        given((tmp_path, "z"))


def test_several_text_encoders_are_refused(tmp_path: Path):
    path = written(tmp_path, "x.pt", a1111(vectors()))
    (tower,) = conditioner().towers
    with pytest.raises(ValueError, match="several text encoders, for which embeddings are not supported"):
        with_embeddings(Conditioner(tower, tower), [embedding_source(path)])


def test_a_model_is_told_from_an_embedding(tmp_path: Path):
    from ldm.interop.read_model import AS_IT_IS, read_model

    path = written(tmp_path, "x.pt", a1111(vectors()))
    with pytest.raises(ValueError, match="is a textual inversion, words for a model: give it with --embedding"):
        read_model(path, replace(AS_IT_IS, ema=False), dtype=torch.float32)
