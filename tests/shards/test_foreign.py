"""Somebody else's tars: the same samples and batches as of a dataset with ledgers, wherever they lie, indexed once."""

import io
import tarfile

import numpy as np
import pytest
import webdataset

from configs import storage
from shards.dataset import new_info
from shards.foreign import indexed
from shards.read import Index
from shards.stream import FeatureStream
from shards.windows import Windows
from tests.s3 import Faults
from tests.shards.test_blocks import SMALL, assert_equal, reads, take
from tests.shards.test_stream import ENCODEC, HOP_FRAMES, StreamConfig, clip, dataset

INFO = new_info("features", {"hop_frames": HOP_FRAMES, "views": 2, "codec": ENCODEC})
NAMES = {"feats.npy": "avclip.npy"}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SOUNDSHARD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def ours(tmp_path):
    return dataset(tmp_path / "ours", [[clip(number, 5 + number % 3) for number in range(first, first + 7)] for first in (0, 7, 14)])


@pytest.fixture
def theirs(tmp_path, ours):
    """The same samples as webdataset's own writer stores them: float times, and so extended headers; other names; samples in folders."""
    folder, index = tmp_path / "theirs", Index.open(ours)
    folder.mkdir()
    for number in range(3):
        with webdataset.TarWriter(str(folder / f"{number:02d}.tar"), mtime=1.5) as tar:
            for row in range(7 * number, 7 * number + 7):
                members = {"FEATS.npy": index.member(row, "avclip.npy"), "toy.npy": index.member(row, "toy.npy")}
                tar.write({"__key__": f"in/a.folder/{index.keys[row]}", **members, "cls": row})
    return folder


@pytest.mark.parametrize("place", ["local", "s3"])
def test_foreign_tars_give_the_same_batches(ours, theirs, place, request):
    root, proxy = str(theirs), None
    if place == "s3":
        proxy = request.getfixturevalue("flaky_s3")(Faults())
        root = proxy.s3.url
        for name in storage.names(theirs):
            storage.write_bytes(f"{root}/{name}", storage.read_bytes(f"{theirs}/{name}"))
        proxy.requests.clear()
    index, expected = indexed(root, INFO, names=NAMES), Index.open(ours)
    assert index.keys.to_pylist() == [f"in/a.folder/{key}" for key in expected.keys.to_pylist()]
    assert index.bytes(8, "cls") == b"8" and index.shards == ["00", "01", "02"]
    rows, views = np.arange(21), np.arange(21) % 2
    batches = [Windows(each, 2).batch(rows, 0 * rows, views) for each in (index, expected)]
    batches[0]["keys"] = [key.rpartition("/")[2] for key in batches[0]["keys"]]
    assert_equal(batches[:1], batches[1:])
    keys = [key for batch in take(FeatureStream(index, StreamConfig(**SMALL)), 7) for key in batch["keys"]]
    assert len(set(keys[:21])) == len(set(keys[21:42])) == 21
    if proxy is not None:
        proxy.requests.clear()
        assert indexed(root, INFO, names=NAMES).content == index.content and not reads(proxy)  # it is kept


def test_an_index_is_of_what_the_tars_hold_now(theirs):
    before = indexed(theirs, INFO, names=NAMES)
    with tarfile.open(theirs / "03.tar", "w") as tar:
        payload = io.BytesIO()
        np.save(payload, np.zeros((2, 5, 8, 5), np.float16))
        member = tarfile.TarInfo("new.feats.npy")
        member.size = payload.tell()
        tar.addfile(member, io.BytesIO(payload.getvalue()))
    after = indexed(theirs, INFO, names=NAMES)
    assert len(before) == 21 and len(after) == 22
    assert after.member(21, "avclip.npy").shape == (2, 5, 8, 5)


def test_tars_that_cannot_be_indexed_are_told(tmp_path, theirs):
    with pytest.raises(ValueError, match="has no tars"):
        indexed(tmp_path, INFO)
    (theirs / "04.tar").write_bytes((theirs / "01.tar").read_bytes())
    with pytest.raises(ValueError, match="a key is in more than one tar"):
        indexed(theirs, INFO)
    whole = (theirs / "01.tar").read_bytes()
    (theirs / "04.tar").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(ValueError, match=r"04\.tar is no tar that can be read to its end"):
        indexed(theirs, INFO)
    with webdataset.TarWriter(str(theirs / "04.tar")) as tar:
        tar.write({"__key__": "x", "a.npy": np.asfortranarray(np.zeros((2, 3)))})
    with pytest.raises(ValueError, match=r"04\.tar: x\.a\.npy must hold numbers in C order, little endian; it has <f8, Fortran order"):
        indexed(theirs, INFO)
