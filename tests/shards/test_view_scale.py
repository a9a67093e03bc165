"""A view of thousands of clips in tens of shards: an epoch is exactly the chosen clips, each once, on any number of ranks."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from shards.read import Index
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
