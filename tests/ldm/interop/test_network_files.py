"""Weight folders: every fault names the file and, where there are many, counts them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from ldm.files.strict_json import read_json, write_json
from ldm.interop.network_files import load_strictly, write_weights
from ldm.interop.weight_reader import open_weights


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def test_weights_pass_through_a_file(tmp_path: Path):
    weights = network().state_dict() | {
        "turned": torch.arange(6.0).view(2, 3).T,
        "half": torch.ones(2).half(),
    }
    write_weights(weights, tmp_path / "w.safetensors")
    read = open_weights(tmp_path / "w.safetensors").tensors
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) and read[name].dtype == weights[name].dtype for name in read)
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_weights_may_go_back_to_the_file_that_they_were_read_from(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    write_weights({"w": torch.arange(5000.0)}, path)
    write_weights(open_weights(path).tensors, path)
    assert torch.equal(open_weights(path).tensors["w"], torch.arange(5000.0))


def test_a_full_disk_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_weights({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    write_json({"a": 1}, tmp_path / "c.json")

    def half(path: Path) -> None:
        with path.open("wb") as file:
            file.write(b"{half")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", lambda weights, path, metadata: half(path))
    monkeypatch.setattr(Path, "write_bytes", lambda path, content: half(path))
    with pytest.raises(OSError, match="No space"):
        write_weights({"w": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(OSError, match="No space"):
        write_json({"a": 2}, tmp_path / "c.json")
    assert open_weights(tmp_path / "w.safetensors").tensors["w"].tolist() == [1.0, 1.0]
    assert read_json(tmp_path / "c.json") == {"a": 1}


def named(path: Path, rest: str) -> str:
    return re.escape(str(path)) + " " + rest


def test_missing_files_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=named(tmp_path / "c.json", "is missing: give the folder")):
        read_json(tmp_path / "c.json")
    with pytest.raises(FileNotFoundError, match=named(tmp_path / "w.safetensors", "is missing: give the file")):
        open_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("keep", "told"),
    [
        (0, "does not contain weights: it is empty"),
        (4, "does not contain weights: it is neither"),
        (40, "does not contain weights: it is neither .* or it is truncated"),
        (-1, "is not a complete safetensors file"),
    ],
)
def test_a_truncated_file_is_named(tmp_path: Path, keep: int, told: str):
    path = tmp_path / "w.safetensors"
    write_weights(network().state_dict(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=named(path, told)):
        open_weights(path)


def test_a_file_of_another_kind_is_named(tmp_path: Path):
    torch.save(network().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=named(tmp_path / "w.safetensors", "is a pickle with the suffix of a safet")):
        open_weights(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=named(tmp_path, "is not a plain file")):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"a": ', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "must hold a JSON object"),
        (b"", "is not"),
    ],
)
def test_broken_json_is_named(tmp_path: Path, content: bytes, told: str):
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(ValueError, match=named(tmp_path / "c.json", told)):
        read_json(tmp_path / "c.json")


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path):
    """What happens to who gives a single weights file where a folder is asked for."""
    (tmp_path / "model.safetensors").touch()
    path = tmp_path / "model.safetensors" / "config.json"
    with pytest.raises(ValueError, match=named(path, r"cannot be read \(Not a directory\)")):
        read_json(path)


def test_json_is_readable_and_keeps_letters(tmp_path: Path):
    write_json({"name": "Bär", "list": [1, 2]}, tmp_path / "c.json")
    assert (
        read_json(tmp_path / "c.json")
        == json.loads((tmp_path / "c.json").read_text())
        == {"name": "Bär", "list": [1, 2]}
    )
    assert (tmp_path / "c.json").read_text().count("\n") > 3


def test_loading_fills_a_network_of_meta_tensors(tmp_path: Path):
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    load_strictly(empty, network().state_dict(), source=tmp_path)
    x = torch.ones(1, 3)
    assert torch.equal(empty(x), network()(x))
    assert all(parameter.requires_grad for parameter in empty.parameters())


def test_what_does_not_fit_is_counted(tmp_path: Path):
    weights = network().state_dict()
    path = tmp_path / "w.safetensors"
    with pytest.raises(ValueError, match=named(path, r"does not fit its config: 1 missing \(1\.bias\): give")):
        load_strictly(network(), {name: weights[name] for name in weights if name != "1.bias"}, source=path)
    extra = {f"extra.{number}": torch.zeros(1) for number in range(7)}
    shown = ", ".join(f"extra.{number}" for number in range(5))
    message = rf"does not fit its config: 7 unexpected \({shown}, \.\.\.\): give"
    with pytest.raises(ValueError, match=named(path, message)):
        load_strictly(network(), weights | extra, source=path)
    turned = weights | {"0.weight": weights["0.weight"].T.contiguous()}
    with pytest.raises(
        ValueError, match=named(path, r".*1 of another shape \(0\.weight \(3, 4\) for \(4, 3\)\): give")
    ):
        load_strictly(network(), turned, source=path)
    renamed = {name.replace("1.", "2."): value for name, value in weights.items()}
    with pytest.raises(ValueError, match=r"2 missing \(1\.bias, 1\.weight\); 2 unexpected \(2\.bias, 2\.weight\)"):
        load_strictly(network(), renamed, source=path)


def test_a_network_that_is_refused_its_weights_keeps_its_own(tmp_path: Path):
    own = network()
    with pytest.raises(ValueError):
        load_strictly(own, {"0.weight": torch.zeros(4, 3)}, source=tmp_path)
    assert torch.equal(own[0].weight, network()[0].weight)  # pyright: ignore[reportIndexIssue]
