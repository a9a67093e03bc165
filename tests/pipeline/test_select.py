"""Rows by criteria: names against a slow oracle, what is kept of good and of failed clips, what lists say of rows."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest

from pipeline.lists import by_name, present
from pipeline.select import (
    Listing,
    Names,
    all_of,
    as_answer,
    check_splits,
    classes_of,
    is_good,
    of_classes,
    remaining,
    told_by,
    with_missing,
    within,
)


def _listing(keys: Sequence[str], splits: Sequence[str | None] = (), starts: Sequence[float | None] = ()) -> Listing:
    nothing = [None] * len(keys)
    return Listing("a list", keys, splits or nothing, nothing, starts or nothing)


def _table(rows: list[tuple[str, str, str | None, str]]) -> pa.Table:
    """Rows of key, split, label and status, with the other columns that a criterion may touch."""
    columns = dict(zip(("key", "split", "label", "status"), map(list, zip(*rows, strict=True)), strict=True))
    schema = pa.schema([(name, pa.string()) for name in ("key", "split", "label", "status", "source", "reason", "message", "shard")])
    absent = [None] * len(rows)
    return pa.table({name: pa.array(columns.get(name, absent), pa.string()) for name in schema.names}, schema=schema)


def test_names_are_found_as_one_by_one() -> None:
    rng = np.random.default_rng(0)
    ids = ["".join(rng.choice(list("-_aZ9"), 11)) for _ in range(17)]
    forms = ["{0}_{1}_{2}", "{0}_{1}_{3}", "{0}_{4:06d}", "clip {4}", "{0}"]

    def draw(count: int) -> list[str]:
        found = set()
        for _ in range(count):
            seconds = int(rng.integers(0, 7))
            found.add(str(rng.choice(forms)).format(rng.choice(ids), seconds * 1000, seconds * 1000 + 10000, seconds * 1000 + 7040, seconds))
        return sorted(found)

    keys, names = draw(101), draw(307)
    rows = by_name(keys)
    found = Names(pa.chunked_array([keys[:40], keys[40:]])).find(names)
    assert (found >= 0).sum() > len(set(keys) & set(names)) > 10
    for name, number in zip(names, found.tolist(), strict=True):
        called = present(name, rows)
        assert (number >= 0) == (called is not None), name
        if called is not None and name in keys:
            assert keys[number] == name
        elif called is not None:  # where several clips agree in id and start, any of them
            assert present(keys[number], {called: 0}) == called or present(called, by_name([keys[number]])) == called


def test_a_clip_s_rows_are_found_together() -> None:
    table = _table([("b", "train", None, "failed"), ("a", "train", None, "ok"), ("b", "test", None, "ok"), ("c", "test", None, "failed")])
    names = Names(table["key"])
    found = names.find(["c", "zebra", "b", "b"])
    assert names.places(found).tolist() == [2, -1, 2, 0]  # b's first place, for both of its rows
    assert names.rows_of(names.find(["c", "b", "a"]), is_good(table)).tolist() == [3, 2, 1]
    assert Names(pa.array(["a"])).find([]).tolist() == [] and Names(pa.array([], pa.string())).find(["a"]).tolist() == [-1]


def test_what_is_kept_of_what_cannot_be_told() -> None:
    answer = np.array([1, 0, -1, 1, 0, -1], np.int8)
    assert remaining(answer, np.array([True, True, True, False, False, False])).tolist() == [True, False, False, True, False, True]
    both = all_of(np.array([1, 1, 1, 0, 0, -1], np.int8), np.array([1, 0, -1, -1, 0, -1], np.int8))
    assert both.tolist() == [1, 0, -1, 0, 0, -1]
    assert as_answer(np.array([True, False])).tolist() == [1, 0]


def test_bounds_count() -> None:
    values = pa.chunked_array([[0.3, None, 0.29], [float("nan"), 7.0]])
    assert within(values, 0.3, None).tolist() == [1, -1, 0, -1, 1]
    assert within(values, None, 0.3).tolist() == [1, -1, 1, -1, 0]
    assert within(values, 0.295, 1.0).tolist() == [1, -1, 0, -1, 0]
    assert within(pa.array([True, False, None]), 1.0, None).tolist() == [1, 0, -1]
    assert within(pa.array([3, 5]), 4.0, 5.0).tolist() == [0, 1]


def test_classes_and_several_of_a_clip() -> None:
    labels = pa.chunked_array([["dog barking", "people eating, noodle", None], ["/m/068hy,/m/0jbk", "eating"]])
    assert of_classes(labels, ["people eating, noodle", "/m/0jbk"]).tolist() == [0, 1, -1, 1, 0]
    assert of_classes(labels, ["people eating", " noodle", "dog"]).tolist() == [0, 0, -1, 0, 0]
    assert classes_of("a, b") == ["a, b"] and "/m/0jbk" in classes_of("/m/068hy,/m/0jbk")


def test_what_lists_say_of_rows() -> None:
    table = _table([("a", "train", "x", "ok"), ("b", "train", None, "ok"), ("c", "train", None, "failed")])
    listing = Listing("a list", ["b", "zebra", "a"], ["test", "validation", None], ["y", "z", "w"], [1.5, None, None])
    whole = with_missing(table, listing, split="train", of="data")
    assert whole.num_rows == 4 and whole["message"][3].as_py() == "listed in a list but not in data"
    assert whole.to_pylist()[3] | {"message": ""} == {
        "key": "zebra",
        "split": "validation",
        "label": "z",
        "status": "failed",
        "source": "zebra",
        "reason": "missing",
        "message": "",
        "shard": None,
    }
    names = Names(whole["key"])
    told = told_by(whole, listing, names.places(names.find(listing.keys)))
    assert told["split"].to_pylist() == ["train", "test", "train", "validation"]
    assert told["label"].to_pylist() == ["x", "y", None, "z"]
    assert told["start_seconds"].to_pylist() == [None, 1.5, None, None]
    again = told_by(told, _listing(["a"], starts=[2.0]), Names(told["key"]).places(np.array([0])))
    assert again["start_seconds"].to_pylist() == [2.0, 1.5, None, None]
    assert with_missing(table, _listing(["a"]), split="train", of="data") is table


def test_splits_name_files() -> None:
    check_splits(_listing(["a", "b"], ["train-2", None]))
    with pytest.raises(ValueError, match="'a/b' cannot name files"):
        check_splits(_listing(["a"], ["a/b"]))
