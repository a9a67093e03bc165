"""`soundshard subset`: which clips it takes, against the same choice in plain Python; what it tells; the view and the shards that come of it."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from configs import storage
from pipeline.generate import GenerateConfig, videos
from pipeline.subset import SubsetConfig, choose, main, run, selection
from shards.dataset import create_or_check, json_bytes, new_info
from shards.read import Index
from shards.write import Entry, write_manifest, write_shard
from tests.s3 import S3

INFO = new_info("media", {"clips_per_shard": 5})
LABELS = ("dog barking", "people eating, noodle", None)


def _key(number: int, seconds: int = 10) -> str:
    return f"{number:02d}-abcd_f-g_{1000 * number}_{1000 * (number + seconds)}"


def _entry(number: int) -> Entry:
    """Clip 3, 10, 17 ... failed; from 31 on they are for testing."""
    key, split, label = _key(number), "test" if number > 30 else "train", LABELS[number % 3]
    if number % 7 == 3:
        return Entry(key, split, label, f"/videos/{key}.mp4", reason="truncated", message="ends at byte 17")
    members = {"mp4": bytes([number]) * (100 + number), "json": json_bytes({"key": key, "split": split, "label": label})}
    return Entry(key, split, label, f"/videos/{key}.mp4", duration_seconds=2 + number / 4, members=members)


def _prepare(root: Path, entries: list[Entry], clips_per_shard: int = 5) -> Path:
    """What preparing these clips writes."""
    create_or_check(root, INFO)
    for split in sorted({entry.split for entry in entries}):
        own = sorted((entry for entry in entries if entry.split == split), key=lambda entry: entry.key)
        for number, start in enumerate(range(0, len(own), clips_per_shard)):
            write_shard(root, f"{split}-{number:06d}", own[start : start + clips_per_shard])
    write_manifest(root)
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _prepare(tmp_path_factory.mktemp("made") / "media", [_entry(number) for number in range(37)])


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    """A dataset of the test's own."""
    return Path(shutil.copytree(made, tmp_path / "media"))


def _file(folder: Path, name: str, text: str) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return str(folder / name)


def _lines(keys: list[str]) -> str:
    return "".join(f"{key}\n" for key in keys)


def _scores(folder: Path, name: str = "scores.parquet", **columns: dict[int, float | None]) -> str:
    numbers = sorted({number for values in columns.values() for number in values})
    table = {"key": [_key(number) for number in numbers]} | {at: [values.get(n) for n in numbers] for at, values in columns.items()}
    pq.write_table(pa.table(table), folder / name)
    return str(folder / name)


def _taken(out: Path | str) -> list[int]:
    """The numbers of a view's good clips."""
    return sorted(int(key[:2]) for key in Index.open(out).keys.to_pylist())


GOOD = [number for number in range(37) if number % 7 != 3]


def test_split_files_choose_and_say_the_split(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _file(tmp_path, "lists/my_train.txt", _lines([_key(number) for number in (1, 2, 3, 32, 77)]))
    _file(tmp_path, "lists/my_validation.txt", _lines([_key(number, 7) for number in (4, 5, 33)] + ["78-abcd_f-g_5_6"]))  # other ends
    _file(tmp_path, "lists/notes.txt", "not a list of clips")
    out = tmp_path / "view"
    chosen = run(SubsetConfig(data=str(data), out=str(out), lists=str(tmp_path / "lists")))
    view = Index.open(out)
    rows = {row["key"]: row for row in view.rows()}
    assert {key: row["split"] for key, row in rows.items() if row["status"] == "ok"} == {
        _key(1): "train",
        _key(2): "train",
        _key(32): "train",
        _key(4): "validation",
        _key(5): "validation",
        _key(33): "validation",
    }
    assert {key: (row["split"], row["reason"]) for key, row in rows.items() if row["status"] == "failed"} == {
        _key(3): ("train", "truncated"),
        _key(77): ("train", "missing"),
        "78-abcd_f-g_5_6": ("validation", "missing"),
    }
    assert Index.open(out, "validation").ok == 3
    with open(out / "missing.csv", newline="") as file:
        lacking = list(csv.DictReader(file))
    assert [(row["key"], row["split"], row["why"], row["reason"]) for row in lacking] == [
        (_key(3), "train", "failed there", "truncated"),
        (_key(77), "train", "not in the dataset", "missing"),
        ("78-abcd_f-g_5_6", "validation", "not in the dataset", "missing"),
    ]
    assert lacking[0]["message"] == "ends at byte 17"
    told = capsys.readouterr().out
    assert f"lists={tmp_path}/lists: 6 of 9 listed clips are there, 3 missing (train 3 of 5, validation 3 of 4)" in told
    assert "not in the dataset 2, 1 failed there (truncated 1)" in told
    assert chosen.steps[0].clips == {"train": 27, "test": 5} and chosen.steps[0].failed == 5
    assert chosen.steps[1].clips == {"train": 3, "validation": 3} and chosen.steps[1].failed == 3
    assert chosen.steps[1].seconds == pytest.approx(sum(2 + n / 4 for n in (1, 2, 32, 4, 5, 33)))
    assert view.info.view == {"parent": "../media", "selection": [f"lists={tmp_path}/lists"]}


def test_every_criterion_as_in_plain_python(data: Path, tmp_path: Path) -> None:
    listed = _file(tmp_path, "some.txt", _lines([_key(number) for number in range(2, 30)]))
    excluded = _file(tmp_path, "no.csv", "".join(f"{_key(number)[:11]},{number},x,train\n" for number in (4, 5, 25)))
    scores = _scores(tmp_path, quality={n: n / 37 for n in GOOD if n != 12}, noise={n: -float(n) for n in GOOD})
    sync = str(tmp_path / "sync.parquet")
    pq.write_table(
        pa.table(
            {
                "key": [_key(n) for n in range(37)],
                "status": ["failed" if n == 8 else "ok" for n in range(37)],
                "offset_seconds": [0.2 * ((n % 5) - 2) for n in range(37)],
                "probability": pa.array([n / 37 for n in range(37)], pa.float32()),
                "synchronisable": pa.array([None if n == 9 else 1 - n / 37 for n in range(37)], pa.float32()),
            }
        ),
        sync,
    )
    kinds: dict[str, tuple[dict[str, Any], Callable[[int], bool]]] = {
        "lists": ({"lists": listed}, lambda n: 2 <= n < 30),
        "exclude": ({"exclude": [excluded]}, lambda n: n not in (4, 5, 25)),
        "class": ({"classes": "people eating, noodle"}, lambda n: n % 3 == 1),
        "classes": ({"classes": "dog barking; people eating, noodle"}, lambda n: n % 3 < 2),
        "seconds": ({"min_seconds": 3.0, "max_seconds": 9.0}, lambda n: 3 <= 2 + n / 4 <= 9),
        "where": ({"where": "\"mp4.size\" % 2 = 0 AND label LIKE '%eating%'"}, lambda n: n % 2 == 0 and n % 3 == 1),
        "where on scores": ({"where": "noise < -9 AND status = 'ok'", "scores": scores}, lambda n: n > 9),
        "score": ({"score": "quality", "min_score": 10 / 37, "max_score": 0.9, "scores": scores}, lambda n: n != 12 and 10 <= n <= 33),
        "sync": ({"sync": sync}, lambda n: n != 8 and n % 5 in (1, 2, 3)),
        "sync probability": ({"sync": sync, "max_offset_seconds": None, "min_probability": 0.5}, lambda n: n != 8 and n > 18),
        "synchronisable": ({"sync": sync, "min_synchronisable": 0.5}, lambda n: n not in (8, 9) and n % 5 in (1, 2, 3) and n <= 18),
    }
    index = Index.open(data)
    for name, (options, oracle) in kinds.items():
        chosen = choose(index, SubsetConfig(data=str(data), out="", **options))
        good = [int(key[:2]) for key, status in zip(*(chosen.table[at].to_pylist() for at in ("key", "status")), strict=True) if status == "ok"]
        assert sorted(good) == [n for n in GOOD if oracle(n)], name
        assert chosen.steps[-1].total == len(good), name
    options = {key: value for name in ("lists", "exclude", "classes", "seconds", "where", "score", "sync") for key, value in kinds[name][0].items()}
    together = choose(index, SubsetConfig(data=str(data), out="", **options))
    oracles = [kinds[name][1] for name in ("lists", "exclude", "classes", "seconds", "where", "score", "sync")]
    left = [sum(all(oracle(n) for oracle in oracles[:count]) for n in GOOD) for count in range(len(oracles) + 1)]
    assert [step.total for step in together.steps] == left and left[-1] > 0 and left == sorted(left, reverse=True)


def test_failed_clips_stay_unless_it_is_certain(data: Path) -> None:
    def failed(**options: Any) -> list[int]:
        table = choose(Index.open(data), SubsetConfig(data=str(data), out="", **options)).table
        return [int(row["key"][:2]) for row in table.to_pylist() if row["status"] == "failed"]

    assert failed(min_seconds=8.0) == [31, 3, 10, 17, 24]  # nobody knows how long they are; test comes before train
    assert failed(classes="dog barking") == [3, 17, 24]  # 17 has no label
    assert failed(where="split = 'test'") == [31]
    assert failed(where="status = 'ok'") == []
    assert failed(where="duration_seconds > 3 AND split = 'train'") == [3, 10, 17, 24]


def test_the_datasets_own_scores_and_a_views(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _scores(data, quality={n: n / 37 for n in GOOD})
    options = SubsetConfig(data=str(data), out=str(tmp_path / "a"), min_score=0.5)
    run(options)  # there is one score
    options = replace(options, score="quality")
    assert _taken(tmp_path / "a") == [n for n in GOOD if n >= 18.5]
    (tmp_path / "a" / "scores.parquet").write_bytes(Path(_scores(tmp_path, loud={n: float(n) for n in GOOD})).read_bytes())
    run(replace(options, data=str(tmp_path / "a"), out=str(tmp_path / "b"), where="loud < 30 AND quality < 0.7"))
    assert _taken(tmp_path / "b") == [n for n in GOOD if 18.5 <= n < 0.7 * 37]
    for score, says in (("", "must say which score is meant: .* have loud, quality"), ("quolity", "did you mean quality")):
        with pytest.raises(ValueError, match=says):
            run(replace(options, data=str(tmp_path / "a"), out=str(tmp_path / "c"), score=score))
    with pytest.raises(ValueError, match="there is no column lowd; did you mean loud"):
        run(SubsetConfig(data=str(tmp_path / "a"), out=str(tmp_path / "c"), where="lowd < 3"))
    capsys.readouterr()


def test_published_scores_name_videos(data: Path, tmp_path: Path) -> None:
    scores = {f"clips/{_key(n)[:11]}_{n:06d}.mp4": n / 37 for n in range(0, 37, 2)}
    path = _file(tmp_path, "imagebind.json", json.dumps(scores))
    run(SubsetConfig(data=str(data), out=str(tmp_path / "view"), scores=path, min_score=0.3))
    assert _taken(tmp_path / "view") == [n for n in GOOD if n % 2 == 0 and n / 37 >= 0.3]
    other = _file(tmp_path, "other.json", json.dumps({"zebra.mp4": 0.5}))
    with pytest.raises(ValueError, match="has scores of no clip"):
        run(SubsetConfig(data=str(data), out=str(tmp_path / "no"), scores=other, min_score=0.3))
    with pytest.raises(ValueError, match="both have a score 'score'"):
        run(SubsetConfig(data=str(data), out=str(tmp_path / "no"), scores=[path, other], score="score", min_score=0.3))


def test_start_times_stay_in_the_view_and_generation_begins_there(data: Path, tmp_path: Path) -> None:
    starts = _file(tmp_path, "tests.csv", f"file,start_sec\n{_key(2)},1.28\n{_key(31)},0\n{_key(5, 7)},0.5\n{_key(40)},1\n")
    out = tmp_path / "view"
    chosen = run(SubsetConfig(data=str(data), out=str(out), starts=starts))
    assert {row["key"]: row["start_seconds"] for row in Index.open(out).rows()} == {_key(2): 1.28, _key(31): 0.0, _key(5): 0.5, _key(40): 1.0}
    assert chosen.presences[0].listed == {"train": 3, "test": 1} and len(chosen.presences[0].lacking) == 2
    clips, begin = videos(GenerateConfig(data=str(out), run="", out=""))
    assert [(clip.key, clip.reason, begin.get(clip.key)) for clip in clips] == [
        (_key(2), None, 1.28),
        (_key(5), None, 0.5),
        (_key(31), "truncated", None),
        (_key(40), "missing", None),
    ]
    assert videos(GenerateConfig(data=str(data), run="", out=""))[1] == {}
    with pytest.raises(ValueError, match=f"does not say where {_key(2)} starts"):
        run(SubsetConfig(data=str(data), out=str(tmp_path / "no"), starts=_file(tmp_path, "ids.txt", _lines([_key(2)]))))
    again = _file(tmp_path, "again.csv", f"file,start_sec\n{_key(2)},2\n")
    with pytest.raises(ValueError, match=r"to start at 2\.0, after it was listed to start at 1\.28"):
        run(SubsetConfig(data=str(data), out=str(tmp_path / "no"), starts=[starts, again]))


def test_a_subset_of_a_subset_is_a_view_of_the_dataset(data: Path, tmp_path: Path) -> None:
    run(
        SubsetConfig(
            data=str(data), out=str(tmp_path / "a"), min_seconds=5.0, lists=_file(tmp_path, "my_test.txt", _lines([_key(n) for n in range(39)]))
        )
    )
    run(SubsetConfig(data=str(tmp_path / "a"), out=str(tmp_path / "b"), classes="dog barking"))
    view = Index.open(tmp_path / "b", "test")
    assert (view.root, _taken(tmp_path / "b")) == (str(data), [n for n in GOOD if n >= 12 and n % 3 == 0])
    assert view.info.view is not None and view.info.view["selection"] == [f"lists={tmp_path}/my_test.txt", "min_seconds=5.0", "classes=dog barking"]
    missing = [row["key"] for row in view.rows() if row["reason"] == "missing"]
    assert missing == [_key(37), _key(38)]  # nobody says of what class they are
    assert not (tmp_path / "b" / "missing.csv").exists()


def test_shards_are_those_of_preparing_only_these_clips(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = [n for n in range(37) if n % 4 != 1]
    listed = _file(tmp_path, "some.txt", _lines([_key(n) for n in wanted]))
    config = SubsetConfig(data=str(data), out=str(tmp_path / "copy"), lists=listed, materialise=True)
    run(config)
    oracle = _prepare(tmp_path / "oracle", [_entry(n) for n in wanted])
    names = sorted(path.name for path in oracle.glob("*-*"))
    assert len(names) == 12 and names == sorted(path.name for path in (tmp_path / "copy").glob("*-*"))
    for name in names:
        assert (tmp_path / "copy" / name).read_bytes() == (oracle / name).read_bytes(), name
    urls = [str(path) for path in sorted((tmp_path / "copy").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert sorted(int(sample["__key__"][:2]) for sample in samples) == [n for n in wanted if n in GOOD]
    run(config)  # nothing is left to do
    assert "in 6 shards" in capsys.readouterr().out.splitlines()[-1]
    run(replace(config, out=str(tmp_path / "larger"), clips_per_shard=50))
    assert sorted(path.name for path in (tmp_path / "larger").glob("*.tar")) == ["test-000000.tar", "train-000000.tar"]
    with pytest.raises(ValueError, match="other clips"):
        run(replace(config, lists=_file(tmp_path, "other.txt", _lines([_key(2)]))))


def test_recipes_take_their_own_lists(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "visualsound"
    for split, numbers in (("train", (1, 2, 3)), ("validation", (4,)), ("test", (31, 32)), ("predict", (1,))):
        _file(folder, f"visualsound_{split}.txt", _lines([_key(n) for n in numbers]))
    config = SubsetConfig(recipe="visualsound", data=str(data), out=str(tmp_path / "view"), lists=str(folder))
    run(config)
    assert _taken(tmp_path / "view") == [1, 2, 4, 32]
    told = capsys.readouterr().out
    assert "visualsound: 4 of 6 listed clips are there, 2 missing (train 2 of 3, validation 1 of 1, test 1 of 2)" in told
    assert "published are train 77,265, validation 8,357, test 5,425" in told
    assert selection(config) == ["visualsound", f"lists={folder}"]
    (folder / "visualsound_test.txt").unlink()
    with pytest.raises(ValueError, match=r"has no visualsound_test.txt, and no visualsound.csv; https://"):
        run(config)
    _file(folder, "visualsound.csv", f"filename,start,desc,split\n{_key(6)[:11]},6,thunder,test\n")
    run(replace(config, overwrite=True))
    assert _taken(tmp_path / "view") == [6] and Index.open(tmp_path / "view").table["split"].to_pylist() == ["test"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "nothing says which clips to take"),
        ({"recipe": "visualsnd"}, "no recipe 'visualsnd'; there is visualsound"),
        ({"recipe": "visualsound"}, "give lists=FOLDER with visualsound_train.txt"),
        ({"classes": "dog braking"}, "left after classes=dog braking"),
        ({"classes": "classes.txt"}, "classes=classes.txt: no such file"),
        ({"min_seconds": 99.0}, "left after 99 <= seconds"),
        ({"score": "x"}, "score=x needs min_score"),
        ({"min_score": 0.3}, "has no scores; make them with `soundshard score`"),
        ({"scores": "s.parquet", "min_seconds": 1.0}, "scores= needs min_score"),
        ({"min_probability": 0.3, "min_seconds": 1.0}, "need sync=FILE"),
        ({"sync": "offsets.parquet"}, "sync=offsets.parquet: no such file"),
        ({"clips_per_shard": 5, "min_seconds": 1.0}, "give materialise=true"),
        ({"materialise": True, "overwrite": True, "min_seconds": 1.0}, "shards are not replaced"),
        ({"lists": "nothing.txt"}, "nothing.txt"),
        ({"where": "durtion_seconds > 3"}, "did you mean duration_seconds"),
    ],
)
def test_what_cannot_be_done_says_why(data: Path, tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        run(SubsetConfig(data=str(data), out=str(tmp_path / "out"), **options))
    assert not (tmp_path / "out").exists()


def test_lists_that_disagree(data: Path, tmp_path: Path) -> None:
    one, other = (_file(tmp_path, f"a_{split}.txt", _lines([_key(2)])) for split in ("train", "test"))
    with pytest.raises(ValueError, match=f"{_key(2)} of split test, after it was listed of split train"):
        run(SubsetConfig(data=str(data), out=str(tmp_path / "out"), lists=[one, other]))
    with pytest.raises(ValueError, match="names no clips"):
        run(SubsetConfig(data=str(data), out=str(tmp_path / "out"), lists=_file(tmp_path, "empty.txt", "\n")))


def test_classes_nobody_has_are_told(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = _file(tmp_path, "classes.tsv", "class\tis_sparse\ndog barking\ty\npeople eating, noodle\tn\ndog braking\ty\nzebra\ty\n")
    run(SubsetConfig(data=str(data), out=str(tmp_path / "view"), classes=classes))
    assert _taken(tmp_path / "view") == [n for n in GOOD if n % 3 == 0]
    assert "of 3 classes no clip is of 2: 'dog braking' (did you mean 'dog barking'?), 'zebra'" in capsys.readouterr().out


def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"data={data}", f"out={tmp_path / 'view'}", "where=label = 'dog barking' AND \"mp4.size\" > 110", "min_seconds=3.5"]
    assert main(arguments) == 0
    assert _taken(tmp_path / "view") == [n for n in GOOD if n % 3 == 0 and n > 10]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["clips", "train", "test", "failed", "hours", "size"]
    assert lines[2].startswith("3.5 <= seconds") and lines[3].startswith("where label = 'dog barking'")
    assert lines[-1].startswith("subset: 8 clips, 0.018 hours, 1.56 KB ->"), lines[-1]
    assert main(arguments) == 2 and "overwrite=true replaces it" in capsys.readouterr().err
    lists = [_file(tmp_path, f"{name}.txt", _lines([_key(n) for n in numbers])) for name, numbers in (("a", (1, 2)), ("b", (2, 5, 33)))]
    assert main([*arguments[:2], f"lists=[{','.join(lists)}]", "overwrite=true"]) == 0
    assert _taken(tmp_path / "view") == [1, 2, 5, 33]
    assert main(["--help"]) == 0


def test_neither_torch_nor_ray_is_imported() -> None:
    code = "import pipeline.subset, sys; print([name for name in ('torch', 'ray', 'av', 'lightning', 'model') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_everything_in_an_object_store(data: Path, tmp_path: Path, s3: S3) -> None:
    scores = _scores(tmp_path, quality={n: n / 37 for n in GOOD})
    lists = {"my_test.txt": _lines([_key(n) for n in range(20, 39)]), "classes.txt": "dog barking\n"}
    for path in data.iterdir():
        storage.write_bytes(f"{s3.url}/media/{path.name}", path.read_bytes())
    for name, text in lists.items():
        storage.write_bytes(f"{s3.url}/lists/{name}", text.encode())
    storage.write_bytes(f"{s3.url}/media/scores.parquet", Path(scores).read_bytes())
    options = {"data": f"{s3.url}/media", "lists": f"{s3.url}/lists", "classes": f"{s3.url}/lists/classes.txt", "max_score": 0.9}
    run(SubsetConfig(**options, out=f"{s3.url}/view"))
    expected = [n for n in GOOD if n % 3 == 0 and 20 <= n <= 33]
    assert _taken(f"{s3.url}/view") == expected
    assert _key(38) in storage.read_bytes(f"{s3.url}/view/missing.csv").decode()
    run(SubsetConfig(**options, out=f"{s3.url}/copy", materialise=True))
    copy = Index.open(f"{s3.url}/copy")
    assert _taken(f"{s3.url}/copy") == expected and copy.bytes(copy.row(_key(21)), "mp4") == bytes([21]) * 121
