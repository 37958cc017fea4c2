"""Shards in a bucket: a server of our own that speaks S3's language, and s3fs as users have it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from helpers.loading import SIZES, first, images, same
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from data.manifest import main as write_manifest
from ldm.errors import DataError


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of the server, which this process is also told of as users are: by variables."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    told = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    told |= {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "secret"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    yield told["AWS_ENDPOINT_URL"]
    S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def folder(address: str, tiny_shards: Callable[..., str]) -> Path:
    """What is also in s3://pictures/train."""
    folder = Path(tiny_shards(SIZES)).parent
    write_manifest([str(folder)])
    client = boto3.client("s3", endpoint_url=address)
    client.create_bucket(Bucket="pictures")
    for path in folder.iterdir():
        client.upload_file(str(path), "pictures", f"train/{path.name}")
    return folder


@pytest.mark.parametrize("pattern", ["*.tar", "{00000..00003}.tar"])
def test_a_buckets_shards_give_the_batches_of_local_ones(folder: Path, pattern: str):
    here, there = (first(images(f"{place}/{pattern}"), 6) for place in (folder, "s3://pictures/train"))
    assert all(same(a, b) for a, b in zip(here, there, strict=True))


def test_a_manifest_of_a_bucket_is_written_from_here(folder: Path, tmp_path: Path):
    assert write_manifest(["s3://pictures/train/*.tar", "--out", str(tmp_path / "bucket.json")]) == 0
    entries = json.loads((tmp_path / "bucket.json").read_text())
    beside = json.loads((folder / "manifest.json").read_text())
    assert {name.rpartition("/")[2]: entry for name, entry in entries.items()} == beside


def test_what_is_not_there_is_named(folder: Path):
    with pytest.raises(DataError, match=r"no shard matches 's3://pictures/nowhere/\*.tar'"):
        images("s3://pictures/nowhere/*.tar")
    with pytest.raises(DataError, match="s3://elsewhere"):
        first(images("s3://elsewhere/{00000..00003}.tar"), 1)
