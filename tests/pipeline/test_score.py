"""`soundshard score` on small datasets: resumed, extended, of views; and tables of scores as others write them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from configs import storage
from configs.load import JobError, load
from pipeline import score, scorers
from pipeline.media import MediaError
from pipeline.media_scores import SCORERS
from pipeline.score import ScoreActor, ScoreConfig, Unit, choose, find_units, good_rows, part_of, run, scored, table_of
from pipeline.score_store import Made, ScoreStore
from pipeline.scorers import Item, ScoreOptions, Scorer, each
from pipeline.scores import read_scores, score_columns, scores_path, stem
from shards.dataset import create_or_check, new_info
from shards.read import Index
from shards.view import write_view
from shards.write import Entry, write_manifest, write_shard
from tests.pipeline.clips import make_clip
from tests.s3 import S3

KEYS = ("a", "b", "c", "d", "e", "f", "g")


# --- tables of scores -----------------------------------------------------------------------------------------------------------------


def test_published_scores_are_read_by_stem(tmp_path: Path) -> None:
    path = tmp_path / "imagebind.json"
    path.write_text(json.dumps({"videos/-a_b_1000_11000.mp4": 0.31, "c.d.mp4": 1, "plain": None}))
    table = read_scores(str(path))
    assert table.to_pydict() == {"key": ["-a_b_1000_11000", "c.d", "plain"], "score": [0.31, 1.0, None]}
    path.write_text(json.dumps({"x.mp4": {"ib": 0.5, "other": 2}, "y.mp4": {"ib": 0.25}}))
    assert read_scores(str(path)).to_pydict() == {"key": ["x", "y"], "ib": [0.5, 0.25], "other": [2, None]}


def test_csv_with_any_name_of_its_key_column(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_bytes("\ufeffscore,file\r\n0.5,x/007.mp4\r\n,b.webm\r\n".encode())
    assert read_scores(str(path)).to_pydict() == {"key": ["007", "b"], "score": [0.5, None]}
    path.write_text("key,n,ok\n0012,3,true\n")
    table = read_scores(str(path))
    assert table.to_pydict() == {"key": ["0012"], "n": [3], "ok": [True]} and score_columns(table) == ["n", "ok"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("s.json", "[1]", "holds no scores"),
        ("s.json", "{", "not JSON"),
        ("s.json", '{"a": "high"}', "expected a number"),
        ("s.json", '{"x/a.mp4": 1, "y/a.mp4": 2}', "'a' more than once"),
        ("s.csv", "name,score\na,1\n", "expected a header with one of key"),
        ("s.csv", "key,score\na,1\na,2\n", "'a' more than once"),
        ("s.csv", "key,score\n,1\n", "without a key"),
        ("s.parquet", "none", "not readable as parquet"),
    ],
)
def test_what_is_no_table_of_scores_says_so(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=says):
        read_scores(str(tmp_path / name))


def test_a_dataset_without_scores_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="soundshard score data="):
        read_scores(str(tmp_path))
    pq.write_table(pa.table({"name": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="expected a column `key`"):
        read_scores(str(tmp_path / "t.parquet"))


def test_keys_are_their_own_stems() -> None:
    assert stem("a\\b.mp4") == "b" and stem("v1.5") == "v1.5" and stem("-x.MP4") == "-x" and stem("k_1000_2000") == "k_1000_2000"


# --- scorers of a few numbers ---------------------------------------------------------------------------------------------------------


def total(item: Item) -> Mapping[str, float | int | bool | None]:
    """Of made arrays: their sum; one of them cannot be told, another is broken."""
    numbers = item.member("x.npy")
    if item.key == "d":
        raise MediaError("too_short", "broken on purpose")
    return {"total": float(numbers.sum()) if item.key != "c" else None, "count": len(numbers)}


TOTAL = Scorer(
    name="total",
    kind="features",
    columns={"total": pa.float64(), "count": pa.int64()},
    make=lambda _: each(total),
    version=lambda o: f"1 {o.precision}",
    usual=True,
    members=("x.npy",),
    summary="sum",
)
MEAN = replace(
    TOTAL,
    name="mean",
    columns={"mean": pa.float32()},
    usual=False,
    version=lambda _: "3",
    make=lambda _: lambda items: [{"mean": float(item.member("x.npy").mean()) if item.key != "e" else float("nan")} for item in items],
)


@pytest.fixture
def features(tmp_path: Path) -> Path:
    """A feature dataset of seven good clips and a bad one in two shards."""
    root = tmp_path / "features"
    create_or_check(root, new_info("features", {"made": "by program"}))
    write_features(root, "train", KEYS[:4])
    write_features(root, "test", KEYS[4:])
    write_manifest(root)
    return root


def write_features(root: Path, split: str, keys: Sequence[str], plus: int = 0) -> None:
    entries = [Entry(key, split, None, f"{key}.mp4", 1.0, {"x.npy": np.arange(5, dtype=np.float32) + ord(key) + plus}) for key in keys]
    write_shard(root, f"{split}-000000", [*entries, Entry(f"bad-{split}", split, None, "bad.mp4", reason="no_audio", message="none")])


@pytest.fixture
def two_scorers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "registered", lambda: {"total": TOTAL, "mean": MEAN})


def alone(monkeypatch: pytest.MonkeyPatch, *, stop_after: int | None = None) -> list[Unit]:
    """Units are done in this process instead of on Ray, whose part is another test's; optionally it is broken off."""
    done: list[Unit] = []

    def score_all(config: ScoreConfig, index: Index, chosen: Sequence[Scorer], units: Sequence[Unit], store: ScoreStore) -> None:
        assert chosen
        actor = ScoreActor(config, index.info.kind)
        for unit in units:
            if stop_after is not None and len(done) >= stop_after:
                raise KeyboardInterrupt
            store.add(actor.unit(part_of(index, good_rows(index), unit), unit.names)[0], unit.rows, unit.names)
            done.append(unit)

    monkeypatch.setattr(score, "_score_all", score_all)
    monkeypatch.setattr(score, "UNIT_CLIPS", {"media": 2, "features": 2})
    monkeypatch.setattr("pipeline.ray_loop.Cluster.start", lambda _: None)
    return done


@pytest.mark.usefixtures("two_scorers")
def test_scores_of_every_good_clip_with_errors_told(features: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    alone(monkeypatch)
    table = run(ScoreConfig(data=str(features)))
    read = read_scores(str(features))
    order = Index.open(features).keys.to_pylist()
    assert read["key"].to_pylist() == table["key"].to_pylist() == order and sorted(order) == list(KEYS)
    rows = {row["key"]: row for row in read.to_pylist()}
    assert rows["a"] == {"key": "a", "total": 10.0 + 5 * ord("a"), "count": 5, "total.error": None}
    assert rows["c"] == {"key": "c", "total": None, "count": 5, "total.error": None}
    assert rows["d"] == {"key": "d", "total": None, "count": None, "total.error": "too_short: broken on purpose"}
    assert json.loads(read.schema.metadata[b"soundshard.scorer.total"])["version"] == "1 fp32"
    said = capsys.readouterr().out
    assert "0 clips done, 7 to do" in said and "1 of 7 clips have an error" in said and "1 x too_short: broken on purpose" in said
    assert [path.name for path in features.glob("scores*")] == ["scores.parquet"]


@pytest.mark.usefixtures("two_scorers")
def test_a_run_that_is_broken_off_goes_on_and_ends_alike(features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ScoreConfig(data=str(features), scorers=["total", "mean"], part_clips=2)
    with monkeypatch.context() as patch:
        assert alone(patch, stop_after=2) == [] and not list(features.glob("scores*"))
        with pytest.raises(KeyboardInterrupt):
            run(config)
    assert len(list(features.glob("scores.parquet.part-*"))) == 2
    done = alone(monkeypatch)
    table = run(config)
    assert sum(len(unit.rows) for unit in done) == 3  # of seven, four were there
    whole = run(replace(config, out=str(tmp_path / "whole.parquet")))
    assert table.equals(whole) and Path(scores_path(str(features))).read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    done.clear()
    assert run(config).equals(table) and not done


@pytest.mark.usefixtures("two_scorers")
def test_columns_added_later_keep_the_others(features: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = alone(monkeypatch)
    first = run(ScoreConfig(data=str(features)))
    mine = first.append_column("mine", pa.array(range(7)))  # a column of somebody's own
    pq.write_table(mine, scores_path(str(features)))
    done.clear()
    table = run(ScoreConfig(data=str(features), scorers=["mean"]))
    assert {unit.names for unit in done} == {("mean",)}
    assert table.select(first.column_names).equals(first.replace_schema_metadata(table.schema.metadata))
    assert table["mine"].to_pylist() == list(range(7))
    mean = dict(zip(table["key"].to_pylist(), table["mean"].to_pylist(), strict=True))
    assert mean["b"] == 2.0 + ord("b") and mean["e"] is None  # not a number tells nothing
    assert table["mean.error"].null_count == 7


@pytest.mark.usefixtures("two_scorers")
def test_other_options_are_refused_unless_they_may_replace(features: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = alone(monkeypatch)
    run(ScoreConfig(data=str(features), scorers=["total", "mean"]))
    other = ScoreConfig(data=str(features), precision="bf16")
    with pytest.raises(ValueError, match="'1 fp32', now it is '1 bf16'; overwrite=true"):
        run(other)
    done.clear()
    table = run(replace(other, overwrite=True))
    assert sum(len(unit.rows) for unit in done) == 7 and {unit.names for unit in done} == {("total",)}
    assert table["mean"].null_count == 1
    done.clear()
    run(replace(other, overwrite=True))
    assert not done


@pytest.mark.usefixtures("two_scorers")
def test_what_failed_is_tried_again_when_asked(features: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = alone(monkeypatch)
    config = ScoreConfig(data=str(features), max_failed_fraction=0.1)
    with pytest.raises(JobError, match=r"1 of 7 clips have an error .* more than max_failed_fraction=0\.1"):
        run(config)
    done.clear()
    with pytest.raises(JobError):
        run(config)
    assert not done
    mended = replace(TOTAL, make=lambda _: each(lambda item: {"total": 1.5, "count": len(item.key)}))
    monkeypatch.setattr(score, "registered", lambda: {"total": mended})
    table = run(replace(config, retry_failed=True))
    assert [len(unit.rows) for unit in done] == [1] and table["total.error"].null_count == 7
    assert table.filter(pc.field("key") == "d")["total"].to_pylist() == [1.5]


@pytest.mark.usefixtures("two_scorers")
def test_clips_prepared_anew_are_scored_anew_and_those_gone_are_gone(features: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = alone(monkeypatch)
    run(ScoreConfig(data=str(features)))
    write_features(features, "test", ("e", "h"), plus=10)
    write_manifest(features)
    done.clear()
    table = run(ScoreConfig(data=str(features)))
    assert sum(len(unit.rows) for unit in done) == 2
    assert sorted(table["key"].to_pylist()) == ["a", "b", "c", "d", "e", "h"]
    assert table.filter(pc.field("key") == "e")["total"].to_pylist() == [10.0 + 5 * (ord("e") + 10)]


@pytest.mark.usefixtures("two_scorers")
def test_one_split_and_then_the_rest(features: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = alone(monkeypatch)
    assert sorted(run(ScoreConfig(data=str(features), split="test"))["key"].to_pylist()) == ["e", "f", "g"]
    done.clear()
    assert run(ScoreConfig(data=str(features))).num_rows == 7 and sum(len(unit.rows) for unit in done) == 4
    with pytest.raises(ValueError, match="no good clips of split 'dev'; it has test, train"):
        run(ScoreConfig(data=str(features), split="dev"))


@pytest.mark.usefixtures("two_scorers")
def test_a_view_takes_what_its_parent_has(features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = alone(monkeypatch)
    index = Index.open(features)
    write_view(tmp_path / "view", index, index.table.filter(pc.field("key").isin(["b", "f"])), selection=["two"])
    whole = run(ScoreConfig(data=str(features)))
    done.clear()
    table = run(ScoreConfig(data=str(tmp_path / "view"), scorers=["total", "mean"]))
    assert {unit.names for unit in done} == {("mean",)} and sum(len(unit.rows) for unit in done) == 2
    assert sorted(table["key"].to_pylist()) == ["b", "f"]
    assert read_scores(str(tmp_path / "view"))["total"].to_pylist() == [
        dict(zip(whole["key"].to_pylist(), whole["total"].to_pylist(), strict=True))[key] for key in table["key"].to_pylist()
    ]
    assert sorted(path.name for path in tmp_path.glob("features/*.parquet*")) == [
        "manifest.parquet",
        "scores.parquet",
        "test-000000.parquet",
        "train-000000.parquet",
    ]


def test_scorers_are_chosen_by_name_and_kind(features: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index.open(features)
    with pytest.raises(ValueError, match="'loudness' is of media datasets"):
        choose(["loudness"], index)
    with pytest.raises(ValueError, match="there is no scorer 'sum'"):
        choose(["sum"], index)
    monkeypatch.setattr(score, "registered", lambda: {"total": replace(TOTAL, members=("y.npy",)), "mean": MEAN})
    with pytest.raises(ValueError, match=r"reads y.npy, which .* lacks; it has x.npy"):
        choose(["total"], index)
    assert choose(["mean", "mean"], index) == [MEAN]
    monkeypatch.setattr(score, "registered", lambda: {"mean": MEAN})
    with pytest.raises(ValueError, match=r"give scorers=\[...\] of:\n  mean: sum"):
        choose([], index)
    known = scorers.registered()
    assert {"loudness", "silence", "still", "cuts", "speech", "bandwidth"} <= known.keys()


def test_units_hold_neighbours_that_lack_the_same(features: Path) -> None:
    index = Index.open(features)
    made = {scorer.name: Made("1", scorer.columns, index.info.fingerprint) for scorer in (TOTAL, MEAN)}
    store = ScoreStore(scores_path(str(features)), index, made, overwrite=False)
    with store.writing(100):
        keys = index.keys.to_pylist()
        done = [keys[row] for row in (2, 3, 5)]
        store.add(table_of(done, [TOTAL], {"total": [{"total": 1.0, "count": 1}] * 3}), (2, 3, 5), ("total",))
    units = find_units(store, [TOTAL, MEAN], np.ones(7, bool), retry_failed=False)
    both = ("total", "mean")
    assert list(units) == [Unit((0, 1), both), Unit((2, 3), ("mean",)), Unit((4,), both), Unit((5,), ("mean",)), Unit((6,), both)]


def test_a_batch_that_fails_is_tried_clip_by_clip() -> None:
    asked: list[list[str]] = []

    def scoring(items: Sequence[Item]) -> Sequence[Mapping[str, float]]:
        asked.append([item.key for item in items])
        if any(item.key == "c" for item in items):
            raise RuntimeError("no\n  room")
        return [{"mean": ord(item.key)} for item in items]

    items = [Item(key, {}, lambda _: np.zeros(0)) for key in "abcde"]
    found = scored(MEAN, scoring, ["gone: lost", *items], batch_clips=3)
    assert found == ["gone: lost", {"mean": 97}, {"mean": 98}, "RuntimeError: no room", {"mean": 100}, {"mean": 101}]
    assert asked == [["a", "b", "c"], ["a"], ["b"], ["c"], ["d", "e"]]


# --- the job --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_cluster")
def test_the_job_on_media(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "UNIT_CLIPS", {"media": 1, "features": 1})  # more units than processes, which get two at a time
    root, entries = tmp_path / "media", []
    create_or_check(root, new_info("media", {"made": "by program"}))
    for number, changes in enumerate(({"amplitude": 0.05}, {"amplitude": 0.0005}, {"audio_codec": None})):
        make_clip(tmp_path / "clip.mp4", seconds=Fraction(7, 5), **changes)
        entries.append(Entry(f"k{number}", "test", None, "clip.mp4", 1.4, {"mp4": (tmp_path / "clip.mp4").read_bytes()}))
    entries.append(Entry("k3", "test", None, "broken.mp4", 1.4, {"mp4": b"no video at all"}))
    write_shard(root, "test-000000", entries)
    write_manifest(root)
    assert score.main([str(root), "actors=2"]) == 0
    rows = {row["key"]: row for row in read_scores(str(root)).to_pylist()}
    assert rows.keys() == {"k0", "k1", "k2", "k3"}
    usual = [scorer for scorer in SCORERS if scorer.usual]
    assert set(rows["k0"]) == {"key", *(column for scorer in usual for column in (*scorer.columns, f"{scorer.name}.error"))}
    assert rows["k0"]["loudness_lufs"] > rows["k1"]["loudness_lufs"] + 5 and rows["k0"]["cuts"] == 0 and rows["k0"]["loudness.error"] is None
    assert rows["k2"]["loudness.error"] == "no_audio: the clip has no sound" and rows["k2"]["cuts"] == 0 and rows["k2"]["cuts.error"] is None
    assert all(rows["k3"][f"{scorer.name}.error"].startswith("undecodable: ") for scorer in usual)
    said = capsys.readouterr().out
    assert "0 clips done, 4 to do" in said and "2 of 4 clips have an error" in said
    assert score.main([str(root), "actors=1"]) == 0 and "4 clips done, 0 to do" in capsys.readouterr().out


def test_options_are_checked() -> None:
    config = load(ScoreConfig, ["d", "scorers=[loudness,cuts]", "silence_dbfs=-50.0"], positional="data")
    assert config.scorers == ["loudness", "cuts"] and score.score_options(config) == ScoreOptions(silence_dbfs=-50.0)
    with pytest.raises(ValueError, match="batch_clips is 0"):
        ScoreConfig(data="x", batch_clips=0)
    with pytest.raises(ValueError, match=r"ends in \.parquet"):
        ScoreConfig(data="x", out="scores")


@pytest.mark.usefixtures("two_scorers")
def test_scores_of_a_dataset_in_object_storage(features: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in features.iterdir():
        storage.write_bytes(f"{s3.url}/features/{path.name}", path.read_bytes())
    config = ScoreConfig(data=f"{s3.url}/features", part_clips=2)
    with monkeypatch.context() as patch:
        alone(patch, stop_after=1)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    assert "scores.parquet.part-000000" in storage.names(config.data)
    done = alone(monkeypatch)
    there = run(config)
    assert sum(len(unit.rows) for unit in done) == 5 and there.equals(run(ScoreConfig(data=str(features))))
    assert read_scores(config.data).equals(read_scores(str(features)))
    assert [name for name in storage.names(config.data) if name.startswith("scores")] == ["scores.parquet"]


@pytest.mark.usefixtures("two_scorers")
def test_a_dataset_without_good_clips_has_an_empty_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = alone(monkeypatch)
    create_or_check(tmp_path / "bad", new_info("features", {"made": "by program"}))
    write_shard(tmp_path / "bad", "train-000000", [Entry("bad", "train", None, "bad.mp4", reason="no_audio", message="none")])
    write_manifest(tmp_path / "bad")
    monkeypatch.setattr(score, "registered", lambda: {"mean": replace(MEAN, members=(), usual=True)})
    assert run(ScoreConfig(data=str(tmp_path / "bad"))).num_rows == 0 and not done
    assert read_scores(str(tmp_path / "bad")).column_names == ["key", "mean", "mean.error"]
