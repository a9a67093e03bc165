"""Conditions in SQL: what they answer, which columns they read, and that they can do nothing else."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.where import columns_of, holds

SCHEMA = {
    "key": pa.string(),
    "label": pa.string(),
    "duration_seconds": pa.float64(),
    "mp4.size": pa.int64(),
    "avclip.npy.shape": pa.list_(pa.int64()),
    "good": pa.bool_(),
    "raw": pa.binary(),
}


def test_a_row_meets_it_or_not_or_cannot_be_told() -> None:
    columns = {"duration_seconds": pa.array([1.5, 3.0, None, float("nan"), 10.0]), "label": pa.array(["a", "b", "a", "b", None])}
    assert holds("duration_seconds >= 3", columns).tolist() == [0, 1, -1, -1, 1]
    assert holds("duration_seconds >= 3 OR label = 'a'", columns).tolist() == [1, 1, 1, -1, 1]
    assert holds("label IS NULL", columns).tolist() == [0, 0, 0, 0, 1]
    assert holds("duration_seconds > (SELECT avg(duration_seconds) FROM clips) -- long ones", columns).tolist() == [0, 0, -1, -1, 1]
    assert holds("label", columns).tolist() == [0, 0, 0, 0, -1]  # text that is no number is 0 in SQL


def test_kinds_of_values() -> None:
    columns = {"avclip.npy.shape": pa.array([[1, 29, 8], None, [1, 3, 8]]), "good": pa.array([True, False, None]), "n": pa.array([1 << 62, 2, None])}
    assert holds("""json_extract("avclip.npy.shape", '$[1]') > 10""", columns).tolist() == [1, -1, 0]
    assert holds("good", columns).tolist() == [1, 0, -1]
    assert holds("n = 4611686018427387904", columns).tolist() == [1, 0, -1]
    chunked = {"label": pa.chunked_array([["it's"], ["a;b", "(c"]])}
    assert holds("label IN ('it''s', 'a;b', '(c')", chunked).tolist() == [1, 1, 1]
    assert holds("label LIKE '%\"%' /* ) ; */", chunked).tolist() == [0, 0, 0]


def test_as_numpy_answers() -> None:
    values = np.random.default_rng(3).normal(size=997)
    answer = holds("abs(duration_seconds) < 1 AND duration_seconds <> 0", {"duration_seconds": pa.array(values)})
    np.testing.assert_array_equal(answer, (np.abs(values) < 1).astype(np.int8))


@pytest.mark.parametrize(
    ("where", "columns"),
    [
        ("label = 'dog' AND Duration_Seconds > 3", ["label", "duration_seconds"]),
        ('"mp4.size" > 10', ["mp4.size"]),
        ("[mp4.size] > 10 OR `mp4.size` < 3", ["mp4.size"]),
        ("1", []),
        ("(SELECT count(*) FROM clips) > 3", []),
        ("key IN (SELECT label FROM clips)", ["key", "label"]),
        ("label = 'duration_seconds'", ["label"]),
    ],
)
def test_which_columns_it_reads(where: str, columns: list[str]) -> None:
    assert columns_of(where, SCHEMA) == columns


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("durtion_seconds > 3", "there is no column durtion_seconds; did you mean duration_seconds"),
        ("zebra > 3", "there is no column zebra; there are key, label"),
        ('label = "dog"', "there is no column dog.*text stands in single quotes: 'dog'"),
        ("mp4.size > 3", 'must stand in double quotes: "mp4.size"'),
        ("avclip.npy.shape IS NULL", 'must stand in double quotes: "avclip.npy.shape"'),
        ("raw = 'x'", "there is no column raw"),
        ("key >", "syntax error"),
        ("count(*) > 3", "aggregate"),
        ("", "empty"),
        ("1; DROP TABLE clips", "one condition, without ';'"),
        ("1) OR (1", "closed that was not opened"),
        ("(1", "incomplete|syntax error"),
        ("label = 'dog", "a quote is opened and not closed"),
        ("label = ?", "bindings"),
        ("load_extension('x')", "can read columns, and nothing else"),
        ("(SELECT count(*) FROM sqlite_master) > 0", "can read columns, and nothing else"),
        ("EXISTS (SELECT 1 FROM pragma_table_info('clips'))", "can read columns, and nothing else"),
        ("1 IN (WITH RECURSIVE a(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM a) SELECT x FROM a)", "can read columns, and nothing else"),
    ],
)
def test_what_it_may_not_say(where: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        columns_of(where, SCHEMA)


def test_what_fails_on_the_values() -> None:
    with pytest.raises(ValueError, match=r"where=json_extract.*malformed JSON"):
        holds("json_extract(label, '$.a')", {"label": pa.array(["{"])})
