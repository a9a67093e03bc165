"""VisualSound in VGGSound by the published lists, in a dataset of their size without media: exact counts, and a stream of exactly those clips."""

from pathlib import Path

import pytest

from pipeline.subset import SubsetConfig, run
from shards.read import Index
from shards.stream import FeatureStream, StreamConfig
from shards.write import write_manifest
from tests.made_ledgers import clips_of, published_keys, write_dataset

VGGSOUND = {"train": 156_487, "validation": 19_055, "test": 14_511}
VISUALSOUND = {"train": 77_265, "validation": 8_357, "test": 5_425}


def test_visualsound_is_what_its_lists_name(tmp_path: Path, shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = published_keys(shared / "datasets")
    assert {split: len(members) for split, members in keys.items()} == VGGSOUND
    kept = clips_of({split: [key for key in members if sum(key.encode()) % 17] for split, members in keys.items()})
    data, view = tmp_path / "data", tmp_path / "view"
    data.mkdir()
    write_dataset(data, kept, width=1, clips_per_shard=2003)
    write_manifest(data)
    listed = {split: (shared / f"datasets/visualsound/visualsound_{split}.txt").read_text().split() for split in keys}
    assert {split: len(members) for split, members in listed.items()} == VISUALSOUND
    run(SubsetConfig(recipe="visualsound", data=str(data), out=str(view), lists=str(shared / "datasets/visualsound")))
    said = capsys.readouterr().out
    good = {split: set(kept.good_keys(split)) & set(members) for split, members in listed.items()}
    assert sum(map(len, good.values())) > 80_000
    told = ", ".join(f"{split} {len(good[split]):,} of {count:,}" for split, count in VISUALSOUND.items())
    assert f"{sum(map(len, good.values())):,} of 91,047" in said and told in said
    opened = Index.open(view)
    assert (opened.ok, opened.ok + opened.failed) == (sum(map(len, good.values())), 91_047)
    lacking = (view / "missing.csv").read_text().splitlines()[1:]
    assert len(lacking) == opened.failed
    absent = {key for members in listed.values() for key in members} - set(kept.keys)
    assert {line.split(",")[0] for line in lacking if "not in the dataset" in line} >= absent
    for split, members in good.items():
        stream = FeatureStream(Index.open(view, split), StreamConfig(batch_size=1024))
        seen: list[str] = []
        for batch in stream:
            seen += batch["keys"]
            if len(seen) >= stream.samples:
                break
        assert stream.samples == len(members) and set(seen[: stream.samples]) == members
