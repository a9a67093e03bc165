"""The plan file: which clip goes where and stays there, what happens when inputs change, and the process that makes it."""

import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from configs import storage
from configs.load import JobError
from pipeline import plan as planning
from pipeline.discover import Clip, DiscoverConfig, discover
from pipeline.plan import PLAN, Changes, Options, Plan, ShardPlan, media_plans, plan_shards, settle, settle_here
from shards.dataset import create_or_check, new_info
from shards.write import Entry, write_manifest, write_shard
from tests.s3 import S3

LISTED = DiscoverConfig("source", listing="listing.csv")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test in a folder of its own, with a dataset's description in `out`, so that shards can be committed."""
    monkeypatch.chdir(tmp_path)
    create_or_check("out", new_info("media", {}))


def touch(*names: str, data: bytes = b"x") -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(data)


def touch_numbered(numbers: Sequence[int], folder: str = "source") -> None:
    touch(*(f"{folder}/clip{number:03d}.mp4" for number in numbers))


def update(source: str | DiscoverConfig = "source", *, root: str = "out", **options: Any) -> Changes:
    """One planning run, in this process."""
    config = DiscoverConfig(source) if isinstance(source, str) else source
    return settle_here(root, discover, [config], Options(options.pop("clips_per_shard", 3), **options))


def commit(*names: str, root: str = "out", members: bytes = b"bytes") -> None:
    """Write shards of the plan; all of them if none is named."""
    for shard in Plan(root).shards(names or None):
        entries = [
            Entry(clip.key, clip.split, clip.label, clip.source, reason=clip.reason, message=clip.message)
            if clip.reason
            else Entry(clip.key, clip.split, clip.label, clip.source, 1.0, {"mp4": members})
            for clip in shard.clips
        ]
        write_shard(root, shard.name, entries)


def keys(root: str = "out") -> dict[str, list[str]]:
    """Shard -> keys, those of failed clips in brackets with the reason."""
    return {shard.name: [f"[{c.key} {c.reason}]" if c.reason else c.key for c in shard.clips] for shard in Plan(root).shards()}


def row(key: str, root: str = "out") -> Clip:
    return next(clip for shard in Plan(root).shards() for clip in shard.clips if clip.key == key)


def ledgers() -> list[str]:
    return sorted(path.stem for path in Path("out").glob("*-*.parquet"))


# --- the file -------------------------------------------------------------------------------------------------------------------------


def test_clips_are_cut_in_order_and_come_back_as_they_were() -> None:
    clips = [
        Clip("b", "/in/b.mp4", "train", "a label", size=7, version="mtime:5"),
        Clip("a", "/in/x/a.mp4", "train", None, "duplicate_key", "/in/a.mp4 has this key already", 0, "mtime:6"),
        Clip("a", "/in/a.mp4", "train", "ärger", size=2**40, version="etag:abc"),
        Clip("c", "/in/c\udcff.mp4", "train"),
        Clip("t", "/in/t.mp4", "test", "dog, barking", "missing", "not there: \udce9"),
        Clip("d", "/in/part.tar::d.mp4", "train", size=11, version="mtime:7", offset=2**41, start_seconds=1.5, end_seconds=3.5),
    ]
    settle_here("out", lambda: clips, [], Options(3))
    plan = Plan("out")
    t, a, a2, b, c, d = (clip for shard in plan.shards() for clip in shard.clips)
    assert (plan.names, plan.counts, plan.clips) == (
        ["test-000000", "train-000000", "train-000001"],
        {"test-000000": 1, "train-000000": 3, "train-000001": 2},
        6,
    )
    assert [a, a2, b, c, d] == [clips[2], clips[1], clips[0], clips[3], clips[5]] and t == replace(clips[4], message="not there: \\udce9")
    table = pq.read_table("out/plan.parquet")
    columns = ["shard", "key", "source", "split", "label", "reason", "message", "size", "version", "offset", "start_seconds", "end_seconds"]
    assert table.column_names == columns
    assert table.to_pylist()[1] == {
        "shard": "train-000000",
        "key": "a",
        "source": "/in/a.mp4",
        "split": "train",
        "label": "ärger",
        "reason": None,
        "message": None,
        "size": 2**40,
        "version": "etag:abc",
        "offset": None,
        "start_seconds": None,
        "end_seconds": None,
    }
    pq.write_table(table.drop_columns(["offset", "start_seconds", "end_seconds"]), "out/plan.parquet")  # as plans were
    assert [clip for shard in Plan("out").shards() for clip in shard.clips] == [
        t,
        a,
        a2,
        b,
        c,
        replace(clips[5], offset=None, start_seconds=None, end_seconds=None),
    ]


def test_row_groups_hold_whole_shards_and_only_wanted_ones_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "GROUP_ROWS", 7)
    touch_numbered(range(20))
    update(clips_per_shard=3)
    metadata = pq.ParquetFile("out/plan.parquet").metadata
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [6, 6, 6, 2]
    plan = Plan("out")
    assert list(plan.counts.values()) == [3, 3, 3, 3, 3, 3, 2] and plan.clips == 20
    read: list[int] = []
    monkeypatch.setattr(plan, "_file", Spy(plan._file, read))
    assert [shard.name for shard in plan.shards({"train-000003", "train-000006", "train-000099"})] == ["train-000003", "train-000006"]
    assert read == [1, 3]
    assert [clip.key for shard in plan.shards() for clip in shard.clips] == [f"clip{n:03d}" for n in range(20)]
    update(root="large", clips_per_shard=11)  # a shard larger than a group is a group
    metadata = pq.ParquetFile("large/plan.parquet").metadata
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [11, 9]


class Spy:
    """A parquet file that notes which row groups are read."""

    def __init__(self, file: pq.ParquetFile, read: list[int]) -> None:
        self._file, self._read = file, read

    def read_row_group(self, group: int, **options: Any) -> Any:
        self._read.append(group)
        return self._file.read_row_group(group, **options)


def test_reading_holds_a_group_of_clips_whatever_the_number_of_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "GROUP_ROWS", 500)
    peaks = []
    for count in (2_000, 10_000):
        clips = [Clip(f"clip{n:06d}", f"/in/{n}.mp4", "train", "label", size=n, version=f"mtime:{n}") for n in range(count)]
        settle_here(f"out{count}", lambda clips=clips: clips, [], Options(64))
        del clips
        plan = Plan(f"out{count}")
        tracemalloc.start()
        assert sum(len(shard.clips) for shard in plan.shards()) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 2e6


def test_the_same_inputs_give_the_same_bytes_and_a_rerun_touches_nothing() -> None:
    touch_numbered(range(11))
    update()
    update(root="other")
    assert Path("out/plan.parquet").read_bytes() == Path("other/plan.parquet").read_bytes()
    before = os.stat("out/plan.parquet")
    assert update() == Changes()
    after = os.stat("out/plan.parquet")
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_damaged_plan_is_a_user_error() -> None:
    touch("source/a.mp4")
    Path("out/plan.parquet").write_bytes(b"PAR1 is not all that it takes")
    with pytest.raises(ValueError, match=r"out/plan\.parquet is not readable as a plan"):
        update()
    with pytest.raises(FileNotFoundError):
        Plan("nowhere")


# --- new and changed inputs ---------------------------------------------------------------------------------------------------------------


def test_new_clips_come_in_new_shards_and_the_old_ones_stay() -> None:
    touch_numbered(range(10, 17))
    update()
    commit("train-000000", "train-000002")
    first = keys()
    touch_numbered([3, 15, 20, 40, 30])  # one of them is there already
    os.utime("source/clip015.mp4", ns=(0, 0))  # and is in a shard that was never written
    changes = update()
    assert (changes.added, changes.changed, changes.gone, changes.appeared) == (4, (), 0, 0)
    assert "new: clip003" in changes.examples[0] and changes.text() == "4 new inputs are appended in new shards"
    assert keys() == {**first, "train-000003": ["clip003", "clip020", "clip030"], "train-000004": ["clip040"]}
    assert row("clip015").version == "mtime:0"
    assert update() == Changes() and ledgers() == ["train-000000", "train-000002"]


def test_every_split_goes_on_from_its_own_last_shard_and_shards_stay_in_order() -> None:
    Path("listing.csv").write_text("".join(f"aaaaaaaaa{n:02d},0,x,{'test' if n % 3 else 'train'}\n" for n in range(7)))
    touch(*(f"source/aaaaaaaaa{n:02d}_0_10000.mp4" for n in range(12)))
    update(LISTED, clips_per_shard=2)
    assert Plan("out").names == ["test-000000", "test-000001", "train-000000", "train-000001"]
    Path("listing.csv").write_text("".join(f"aaaaaaaaa{n:02d},0,x,{'test' if n % 3 else 'train'}\n" for n in range(12)) + "bbbbbbbbbbb,1,x,val\n")
    assert update(LISTED, clips_per_shard=2).added == 6
    assert Plan("out").names == [
        *("test-000000", "test-000001", "test-000002", "test-000003"),
        *("train-000000", "train-000001", "train-000002", "val-000000"),
    ]
    assert keys()["val-000000"] == ["[bbbbbbbbbbb_1000_11000 missing]"]


def test_a_new_file_whose_key_is_taken_is_a_duplicate_even_if_it_sorts_first() -> None:
    touch("source/m/same.mp4", "source/z/other.mp4")
    update()
    commit()
    touch("source/a/same.mp4", "source/n/same.webm", "source/a/fresh.mp4", "source/b/fresh.mp4")
    assert update().added == 4
    assert keys() == {
        "train-000000": ["other", "same"],
        "train-000001": ["fresh", "[fresh duplicate_key]", "[same duplicate_key]"],
        "train-000002": ["[same duplicate_key]"],
    }
    assert row("same").source.endswith("m/same.mp4")
    duplicates = [clip for shard in Plan("out").shards() for clip in shard.clips if clip.key == "same" and clip.reason]
    assert all(f"{os.getcwd()}/source/m/same.mp4 has this key already" == clip.message for clip in duplicates)
    assert update() == Changes()


@pytest.mark.parametrize("field", ["size", "mtime"])
def test_changed_inputs_of_finished_shards_are_refused_or_done_again(field: str) -> None:
    touch_numbered(range(9))
    update()
    commit("train-000000", "train-000002")
    before, at = Path("out/plan.parquet").read_bytes(), os.stat("source/clip007.mp4").st_mtime_ns
    for number in (4, 7):  # the first of them in a shard that was never written
        path = f"source/clip{number:03d}.mp4"
        Path(path).write_bytes(b"xx" if field == "size" else b"y")
        os.utime(path, ns=(at, at + (10**9 if field == "mtime" else 0)))
    with pytest.raises(ValueError) as refused:
        update()
    message = str(refused.value)
    assert "1 inputs of 1 finished shards in out have changed" in message and "overwrite=true" in message
    assert f"clip007 ({os.getcwd()}/source/clip007.mp4): {field} " in message and "clip004" not in message
    assert ("size 1 before, 2 now" in message) == (field == "size")
    if field == "mtime":
        shown = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at // 10**9)) + f".{at % 10**9:09d}Z"
        assert f"mtime {shown} before, " in message
    assert Path("out/plan.parquet").read_bytes() == before and ledgers() == ["train-000000", "train-000002"]
    changes = update(redo_changed=True)
    assert changes.changed == ("train-000002",) and changes.text() == "1 shards with changed inputs are done again"
    assert ledgers() == ["train-000000"] and not Path("out/train-000002.tar").exists()
    assert row("clip007").version == f"mtime:{os.stat('source/clip007.mp4').st_mtime_ns}"
    assert update() == Changes()


def test_many_changes_are_counted_and_a_few_shown() -> None:
    touch_numbered(range(11))
    update()
    commit()
    touch(*(f"source/clip{n:03d}.mp4" for n in range(7)), data=b"longer")
    with pytest.raises(
        ValueError, match=r"7 inputs of 3 finished shards in out .*\n.*clip000.*\n.*clip001.*\n.*clip002.*\n  and 4 more\n.*overwrite=true"
    ):
        update()


def test_an_interruption_before_the_new_plan_is_written_loses_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    touch_numbered(range(6))
    update()
    commit()
    touch("source/clip001.mp4", data=b"changed")
    with monkeypatch.context() as patched:
        patched.setattr(planning, "_write", failing)
        with pytest.raises(OSError, match="full"):
            update(redo_changed=True)
    assert row("clip001").size == 1 and ledgers() == ["train-000001"]
    assert update() == Changes()  # not refused: the shard is open
    assert row("clip001").size == 7


def failing(*_: object) -> None:
    raise OSError("the disk is full")


def test_a_failed_write_leaves_the_plan_and_no_temporary_file(monkeypatch: pytest.MonkeyPatch) -> None:
    touch_numbered(range(6))
    update()
    before = Path("out/plan.parquet").read_bytes()
    touch_numbered(range(6, 8))
    with monkeypatch.context() as patched:
        patched.setattr(planning, "_table", failing)
        with pytest.raises(OSError, match="full"):
            update()
    assert Path("out/plan.parquet").read_bytes() == before and sorted(os.listdir("out")) == ["dataset.json", "plan.parquet"]


def test_a_moved_folder_only_updates_the_paths() -> None:
    touch_numbered(range(5))
    touch("source/deep/x.mp4", "source/x.mp4")
    update()
    commit()
    before = keys()
    shutil.copytree("source", "elsewhere/clips")
    for path in Path("elsewhere").rglob("*.mp4"):
        os.utime(path, ns=(5, 5))  # a copy may keep no times
    assert update("elsewhere/clips") == Changes()
    assert keys() == before and all(
        clip.source.startswith(f"{os.getcwd()}/elsewhere") and clip.version == "mtime:5" for s in Plan("out").shards() for clip in s.clips
    )
    touch("elsewhere/clips/clip001.mp4", data=b"other")
    with pytest.raises(ValueError, match=r"clip001 .*size 1 before, 5 now"):
        update("elsewhere/clips")
    shutil.move("elsewhere/clips", "third")
    with pytest.raises(ValueError, match=r"clip001 .*size 1 before, 5 now"):
        update("third")


def test_another_folder_adds_to_the_dataset() -> None:
    touch_numbered(range(4))
    update()
    commit("train-000000")
    touch_numbered(range(7, 9), "more")
    changes = update("more")
    assert (changes.added, changes.gone) == (2, 4) and "4 inputs are not there any more" in changes.text()
    assert keys() == {"train-000000": ["clip000", "clip001", "clip002"], "train-000001": ["clip003"], "train-000002": ["clip007", "clip008"]}
    assert row("clip003").reason is None  # its path may still be good


def test_gone_inputs_are_counted_and_their_rows_stay() -> None:
    Path("listing.csv").write_text("".join(f"aaaaaaaaa{n:02d},0,x,train\n" for n in range(5)))
    touch(*(f"source/aaaaaaaaa{n:02d}_0_10000.mp4" for n in range(5)))
    update(LISTED)
    commit("train-000000")
    before = row("aaaaaaaaa01_0_10000")
    for number in (1, 3):
        os.unlink(f"source/aaaaaaaaa{number:02d}_0_10000.mp4")
    changes = update(LISTED)
    assert (changes.gone, changes.added, changes.changed) == (2, 0, ()) and "gone: aaaaaaaaa01_0_10000" in changes.examples[0]
    # What is finished stays; a listed clip that would only fail when its turn comes is a failed row at once.
    assert row("aaaaaaaaa01_0_10000") == before and row("aaaaaaaaa03_0_10000").reason == "missing"
    assert update(LISTED).gone == 1
    touch("source/aaaaaaaaa03_0_10000.mp4")
    assert update(LISTED).appeared == 0 and row("aaaaaaaaa03_0_10000").reason is None


def test_missing_clips_that_appear_stay_failed_until_they_are_tried_again() -> None:
    Path("listing.csv").write_text("".join(f"aaaaaaaaa{n:02d},0,x,train\n" for n in range(7)))
    touch(*(f"source/aaaaaaaaa{n:02d}_0_10000.mp4" for n in (0, 3, 6)))
    update(LISTED)
    assert keys()["train-000000"] == ["aaaaaaaaa00_0_10000", "[aaaaaaaaa01_0_10000 missing]", "[aaaaaaaaa02_0_10000 missing]"]
    commit("train-000000", "train-000002")
    touch("source/aaaaaaaaa01_000000.mp4", "source/aaaaaaaaa04_0_10000.mp4")  # one under the other name that its key has, one in an open shard
    changes = update(LISTED)
    assert (changes.appeared, changes.appeared_shards, changes.added) == (1, (), 0) and "there now: aaaaaaaaa01" in changes.examples[0]
    assert row("aaaaaaaaa01_0_10000").reason == "missing" and row("aaaaaaaaa04_0_10000").reason is None
    assert update(LISTED).appeared == 1
    changes = update(LISTED, retry_missing=True)
    assert (changes.appeared, changes.appeared_shards) == (1, ("train-000000",)) and ledgers() == ["train-000000", "train-000002"]
    found = row("aaaaaaaaa01_0_10000")
    assert (found.reason, found.message, found.size) == (None, None, 1) and found.source.endswith("aaaaaaaaa01_000000.mp4")
    assert update(LISTED) == Changes()


def test_a_list_that_names_a_clip_twice_keeps_both_rows() -> None:
    Path("listing.csv").write_text("aaaaaaaaa00,0,x,train\n" * 2)
    Path("source").mkdir()
    update(LISTED)
    assert keys() == {"train-000000": ["[aaaaaaaaa00_0_10000 missing]", "[aaaaaaaaa00_0_10000 duplicate_key]"]}
    touch("source/aaaaaaaaa00_0_10000.mp4")
    assert update(LISTED) == Changes()
    assert keys() == {"train-000000": ["aaaaaaaaa00_0_10000", "[aaaaaaaaa00_0_10000 duplicate_key]"]}


def test_versions_of_different_kinds_are_not_compared() -> None:
    clips = [Clip("a", "/in/a.mp4", "train", size=3, version="mtime:1")]
    settle_here("out", lambda: clips, [], Options(3))
    commit()
    for version in ("etag:x", None, "etag:x"):
        settle_here("out", lambda version=version: [replace(clips[0], version=version)], [], Options(3))
    with pytest.raises(ValueError, match="etag x before, y now"):
        settle_here("out", lambda: [replace(clips[0], version="etag:y")], [], Options(3))
    settle_here("out", lambda: [replace(clips[0], source="/moved/a.mp4", version="etag:y")], [], Options(3))  # an etag belongs to a place


def test_a_dataset_without_its_plan_goes_on_with_the_same_inputs_only() -> None:
    touch_numbered(range(8))
    update()
    commit("train-000001")
    before = Path("out/plan.parquet").read_bytes()
    os.unlink("out/plan.parquet")
    touch("source/clip0000.mp4")
    with pytest.raises(ValueError, match=r"1 finished shards but no plan\.parquet, and train-000001 does not hold"):
        update()
    os.unlink("source/clip0000.mp4")
    update()
    assert Path("out/plan.parquet").read_bytes() == before


def test_clips_need_a_shard_size() -> None:
    touch("source/a.mp4")
    with pytest.raises(ValueError, match="clips_per_shard is not given"):
        update(clips_per_shard=None)
    with pytest.raises(ValueError, match="clips_per_shard is 0"):
        update(clips_per_shard=0)
    assert [shard.name for shard in plan_shards(discover(DiscoverConfig("source")), 1, after={"train": 41})] == ["train-000042"]


# --- plans of another dataset's shards ------------------------------------------------------------------------------------------------------


def derived(**options: Any) -> Changes:
    write_manifest("out")
    return settle_here("features", media_plans, ["out"], Options(**options))


def test_features_are_planned_from_the_shards_of_the_media() -> None:
    touch_numbered(range(7))
    touch("source/again/clip003.mp4")
    update()
    commit("train-000000", "train-000002")
    assert derived() == Changes()
    assert keys("features") == {name: keys()[name] for name in ("train-000000", "train-000002")}
    assert row("clip001", "features").version == "sha256:" + pq.read_table("out/train-000000.parquet")["shard_sha256"][0].as_py()
    create_or_check("features", new_info("features", {}))
    commit("train-000000", root="features")
    commit("train-000001")
    assert derived().added == 3
    assert keys("features") == keys() and derived() == Changes()
    commit("train-000000", "train-000001", members=b"encoded anew")
    with pytest.raises(ValueError, match=r"3 inputs of 1 finished shards in features .*\n.*clip000 .*sha256 \w+ before, \w+ now"):
        derived()
    assert derived(redo_changed=True).changed == ("train-000000",)
    assert not Path("features/train-000000.parquet").exists() and derived() == Changes()
    os.unlink("out/train-000000.parquet")
    assert derived().gone == 3 and list(keys("features")) == list(keys())


def test_a_shard_that_is_cut_otherwise_is_a_changed_one() -> None:
    clips = tuple(Clip(name, f"/{name}.mp4", "train", version="sha256:1") for name in "abc")
    settle_here("out", lambda: [ShardPlan("train-000000", "train", clips)], [], Options())
    commit()
    with pytest.raises(ValueError, match="shard train-000000 holds 2 clips, 3 before, or others"):
        settle_here("out", lambda: [ShardPlan("train-000000", "train", clips[:2])], [], Options())
    with pytest.raises(ValueError, match=r"c \(/c\.mp4\): reason None before, truncated now"):
        settle_here("out", lambda: [ShardPlan("train-000000", "train", (*clips[:2], replace(clips[2], reason="truncated")))], [], Options())


# --- the planning process -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JobConfig(DiscoverConfig):
    """A job's configuration, which the planning process has no need to know."""

    def __getstate__(self) -> None:
        pytest.fail("the whole configuration was sent")


def test_planning_runs_in_a_light_process_whose_errors_come_back(tmp_path: Path) -> None:
    touch_numbered(range(4))
    plan, changes = settle("out", discover, JobConfig("source"), clips_per_shard=3)
    assert (changes, plan.names, plan.counts) == (Changes(), ["train-000000", "train-000001"], {"train-000000": 3, "train-000001": 1})
    commit()
    touch("source/clip000.mp4", data=b"changed")
    with pytest.raises(ValueError, match=r"clip000 .*size 1 before, 7 now") as refused:
        settle("out", discover, DiscoverConfig("source"), clips_per_shard=3)
    assert type(refused.value) is ValueError and "in settle_here" in str(refused.value.__cause__)
    _, changes = settle("out", discover, DiscoverConfig("source"), clips_per_shard=3, on_change="redo")
    assert changes.changed == ("train-000000",)
    Path("nothing").mkdir()
    with pytest.raises(ValueError, match=f"no clips in {tmp_path}/nothing"):
        settle("out", discover, DiscoverConfig(f"{tmp_path}/nothing"), clips_per_shard=3)
    with pytest.raises(LookupError, match="has none of the heavy modules: True; another process: True"):
        settle("out", look_around, os.getpid())
    with pytest.raises(RuntimeError, match="UnpicklableError: with a lock"):
        settle("out", fail_unpicklably)


def look_around(caller: int) -> list[Clip]:
    heavy = {"ray", "torch", "av", "lightning", "pandas"}
    raise LookupError(f"has none of the heavy modules: {heavy.isdisjoint(sys.modules)}; another process: {os.getpid() != caller}")


class UnpicklableError(Exception):
    def __init__(self, number: int) -> None:
        super().__init__("with a lock")
        self.inner = lambda: number


def fail_unpicklably() -> list[Clip]:
    raise UnpicklableError(3)


def test_a_planning_process_that_is_killed_is_a_failed_job() -> None:
    with pytest.raises(JobError, match=r"planning process ended with status -9 .*memory"):
        settle("out", kill_oneself)


def kill_oneself() -> list[Clip]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def test_many_changed_shards_come_back_from_the_process() -> None:
    """More than a pipe holds at once."""
    _, changes = settle("out", cut_numbered, 1)
    for number in range(6000):
        touch(f"out/train-{number:06d}.parquet", f"out/train-{number:06d}.tar")
    _, changes = settle("out", cut_numbered, 2, overwrite=True)
    assert len(changes.changed) == 6000 and ledgers() == []


def cut_numbered(version: int) -> list[ShardPlan]:
    return [ShardPlan(f"train-{n:06d}", "train", (Clip(f"c{n}", f"/c{n}.mp4", "train", version=f"sha256:{version}"),)) for n in range(6000)]


def sleep(pid_file: str, root: str) -> list[Clip]:
    """A source that is in the middle of writing, as far as the folder shows, and never ends."""
    os.makedirs(root, exist_ok=True)
    with storage.writing(storage.join(root, PLAN)):
        Path(pid_file).write_text(str(os.getpid()))
        time.sleep(600)
    return []


DRIVER = """
import sys
from pipeline.plan import settle
from tests.pipeline.test_plan import sleep
if __name__ == "__main__":
    settle("out", sleep, "pid", "out")
"""


@contextmanager
def running_driver() -> Iterator[tuple[subprocess.Popen, int]]:
    """A driver in the middle of planning, and the pid of its planning process."""
    Path("driver.py").write_text(DRIVER)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "driver.py"], env=environment, stderr=subprocess.PIPE) as driver:
        try:
            wait_for(lambda: Path("pid").is_file() and bool(Path("pid").read_text()))
            yield driver, int(Path("pid").read_text())
        finally:
            driver.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_planning_process_ends_with_its_driver(number: signal.Signals) -> None:
    touch("source/a.mp4")
    with running_driver() as (driver, pid):
        assert os.path.exists(f"/proc/{pid}")
        driver.send_signal(number)
        driver.wait(20)
        wait_for(lambda: not os.path.exists(f"/proc/{pid}"))
    if number != signal.SIGINT:  # who is killed cannot tidy up, but the next run does
        update()
    assert not list(Path("out").glob(".*"))


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_a_module_that_is_run_finds_its_own_functions_in_the_planning_process() -> None:
    touch("source/a.mp4")
    Path("job.py").write_text(
        "from dataclasses import dataclass\nfrom pipeline.discover import Clip\nfrom pipeline.plan import settle\n"
        "@dataclass(frozen=True)\nclass Wanted:\n    key: str\n\n\ndef source(wanted):\n    return [Clip(wanted.key, '/x', 'train')]\n\n\n"
        "if __name__ == '__main__':\n    print([s.clips[0].key for s in settle('out', source, Wanted('me'), clips_per_shard=1)[0].shards()])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-m", "job"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "['me']\n"


# --- object storage -------------------------------------------------------------------------------------------------------------------------


def test_plans_and_inputs_in_object_storage(s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for number in range(5):
        storage.write_bytes(f"{s3.url}/in/clip{number}.mp4", b"x" * number)
    root, config = f"{s3.url}/out", DiscoverConfig(f"{s3.url}/in")
    plan, changes = settle(root, discover, config, clips_per_shard=2)
    assert (changes, list(plan.counts.values())) == (Changes(), [2, 2, 1])
    (second,) = plan.shards({"train-000001"})
    assert [(clip.source, clip.size) for clip in second.clips] == [(f"{s3.url}/in/clip2.mp4", 2), (f"{s3.url}/in/clip3.mp4", 3)]
    assert all(clip.version and clip.version.startswith("etag:") for clip in second.clips)
    for kind in ("tar", "parquet"):
        storage.write_bytes(f"{root}/train-000001.{kind}", b"as good as committed")
    before = storage.stat(f"{root}/{PLAN}")
    assert update(config, root=root, clips_per_shard=2) == Changes() and storage.stat(f"{root}/{PLAN}") == before
    storage.write_bytes(f"{s3.url}/in/clip3.mp4", b"yyy")
    storage.write_bytes(f"{s3.url}/in/clip4.mp4", b"yyyy")
    storage.write_bytes(f"{s3.url}/in/clip5.mp4", b"new")
    with pytest.raises(ValueError, match=r"clip3 \(s3://.*/in/clip3\.mp4\): etag \w+ before, \w+ now"):
        update(config, root=root, clips_per_shard=2)
    monkeypatch.setattr(planning, "DOWNLOAD_BYTES", 1000)
    changes = update(config, root=root, clips_per_shard=2, redo_changed=True)
    assert (changes.added, changes.changed) == (1, ("train-000001",)) and not storage.is_file(f"{root}/train-000001.parquet")
    assert list(keys(root).values()) == [["clip0", "clip1"], ["clip2", "clip3"], ["clip4"], ["clip5"]]
    assert storage.names(root) == [PLAN] and os.listdir(tmp_path) == ["out"]
