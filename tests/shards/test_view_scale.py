"""A view of thousands of clips in tens of shards: an epoch is exactly the chosen clips, each once, on any number of ranks."""

from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import webdataset

from shards import ledger
from shards.read import START, Index
from shards.stream import FeatureStream, StreamConfig
from shards.view import write_view
from shards.write import write_manifest
from tests.made_ledgers import clips_of, made_up_keys, write_dataset


def epoch(view: Path, split: str, batch_size: int, world: int) -> list[str]:
    """The keys of an epoch's samples, and of what is left of its last batch, over all ranks."""
    keys: list[list[str]] = []
    for rank in range(world):
        stream = FeatureStream(Index.open(view, split), StreamConfig(batch_size=batch_size, prefetch=0), rank, world)
        own: list[str] = []
        for batch in stream:
            own += batch["keys"]
            if stream.consumed >= stream.samples:
                break
        keys.append(own)
    size = batch_size // world  # a batch's samples are dealt to the ranks in turn
    together = [
        key for start in range(0, len(keys[0]), size) for group in zip(*(own[start : start + size] for own in keys), strict=True) for key in group
    ]
    return together[: FeatureStream(Index.open(view, split), StreamConfig(batch_size=batch_size)).samples]


@pytest.mark.parametrize("world", [1, 3])
def test_an_epoch_of_a_view_is_the_chosen_clips_each_once(tmp_path: Path, world: int) -> None:
    clips = clips_of(made_up_keys(5003))
    (tmp_path / "data").mkdir()
    assert write_dataset(tmp_path / "data", clips, width=2, clips_per_shard=61) == 84
    write_manifest(tmp_path / "data")
    index = Index.open(tmp_path / "data")
    chosen = [key for key in clips.keys if sum(key.encode()) % 100 < 48]
    write_view(tmp_path / "view", index, index.table.filter(pc.field("key").isin(pa.array(chosen))), selection=["48 in 100"])
    wanted = set(chosen) & set(clips.good_keys("train"))
    seen = epoch(tmp_path / "view", "train", 96, world)
    assert len(seen) == len(wanted) > 1500 and set(seen) == wanted
    assert seen != sorted(seen)


def test_rows_are_the_same_however_many_are_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = clips_of(made_up_keys(307))
    data = tmp_path / "data"
    data.mkdir()
    write_dataset(data, clips, width=1, clips_per_shard=13)
    whole = Index.open(data)
    rows = whole.table.append_column(START, pa.array([number / 8 if number % 5 else None for number in range(307)], pa.float64()))
    assert whole.table["key"].to_pylist() == sorted(clips.keys, key=lambda key: (clips.splits[clips.keys.index(key)], key))
    write_view(tmp_path / "one", whole, rows, selection=["all"])
    monkeypatch.setattr(ledger, "MANIFEST_GROUP_ROWS", 29)
    write_view(tmp_path / "many", whole, rows, selection=["all"])
    assert ledger.open_file(tmp_path / "many" / ledger.MANIFEST).num_row_groups == 11
    assert Index.open(data).table.equals(whole.table)  # from the ledgers, some at a time
    write_manifest(data)
    assert Index.open(data).table.equals(whole.table) and Index.open(data).content == whole.content
    for split in (None, "train", "validation"):
        one, many = Index.open(tmp_path / "one", split), Index.open(tmp_path / "many", split)
        assert one.table.equals(many.table) and one.content == many.content and one.start_seconds is not None and many.start_seconds is not None
        assert one.start_seconds.tolist() == many.start_seconds.tolist() and one.ok == len(clips.good_keys(split)) and any(one.start_seconds)
        assert one.keys.to_pylist() == Index.open(data, split).keys.to_pylist()


def test_a_key_that_is_good_twice_is_told_whichever_split_is_opened(tmp_path: Path) -> None:
    keys = made_up_keys(97)
    keys["validation"].append(next(key for key in clips_of(keys).good_keys("train")))
    (tmp_path / "data").mkdir()
    write_dataset(tmp_path / "data", clips_of(keys), width=1, clips_per_shard=13)
    for split in (None, "test"):
        with pytest.raises(ValueError, match=r"is good in more than one place \(train-00000\d, validation-00000\d\)"):
            Index.open(tmp_path / "data", split)


def test_an_empty_view_has_no_split(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_dataset(tmp_path / "data", clips_of(made_up_keys(31)), width=1)
    index = Index.open(tmp_path / "data")
    write_view(tmp_path / "view", index, index.table.slice(0, 0), selection=["none"])
    assert (Index.open(tmp_path / "view").ok, Index.open(tmp_path / "view").failed) == (0, 0)
    with pytest.raises(ValueError, match="has no split 'train'; it has no rows at all"):
        Index.open(tmp_path / "view", "train")


def test_whole_tars_are_what_their_ledgers_say(tmp_path: Path) -> None:
    clips = clips_of(made_up_keys(73))
    data = tmp_path / "data"
    data.mkdir()
    write_dataset(data, clips, width=3, clips_per_shard=13, whole=True)
    write_manifest(data)
    index = Index.open(data)
    tars = sorted(str(path) for path in data.glob("*.tar"))
    read = {record["__key__"]: record for record in webdataset.WebDataset(tars, shardshuffle=False).decode()}
    assert sorted(read) == sorted(clips.good_keys()) == sorted(index.keys.to_pylist()) and len(read) < 73
    for key, record in read.items():
        assert record["json"]["key"] == key and record["avclip.npy"].shape == index.member(index.row(key), "avclip.npy").shape
    for name, digest in zip(index.table["shard"].to_pylist(), index.table["shard_sha256"].to_pylist(), strict=True):
        assert sha256((data / f"{name}.tar").read_bytes()).hexdigest() == digest
