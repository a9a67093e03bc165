"""Rows from answers made by hand, counted by hand."""

import math
from dataclasses import replace

import pytest

from pipeline.sync_tables import THRESHOLDS, Answer, nearness, rows_of, table


def _logits(predicted: int) -> list[float]:
    return [1.0 if i == predicted else 0.0 for i in range(21)]


def test_offsets_of_all_clips_and_of_each_class() -> None:
    answers = [
        Answer("a", "dog", offset_seconds=0.0, logits=_logits(10)),
        Answer("b", "dog", offset_seconds=0.2, logits=_logits(10)),
        Answer("c", "axe", offset_seconds=-2.0, logits=_logits(20)),
        Answer("c", "axe", 1, offset_seconds=2.0, logits=_logits(20)),
        Answer("d", "axe", reason="too_short", message="5 s"),
    ]
    rows = {(row.measure, row.label): row for row in rows_of(answers)}
    assert {key: (row.value, row.answers, row.clips) for key, row in rows.items()} == {
        ("offset Acc@1", None): (0.5, 4, 3),
        ("offset Acc@1 within one class", None): (0.75, 4, 3),
        ("offset Acc@1", "axe"): (0.5, 2, 1),
        ("offset Acc@1 within one class", "axe"): (0.5, 2, 1),
        ("offset Acc@1", "dog"): (0.5, 2, 2),
        ("offset Acc@1 within one class", "dog"): (1.0, 2, 2),
    }
    whole = rows["offset Acc@1", None]
    assert 0 <= whole.low < whole.value < whole.high <= 1 and math.isnan(rows["offset Acc@1", "axe"].low)
    narrow = rows_of(answers, level=0.1)[0]
    assert narrow.high - narrow.low < whole.high - whole.low
    assert rows_of([]) == [] == rows_of(answers[4:])


def test_synchronisability_and_what_thresholds_keep() -> None:
    # (probability, synchronisable, predicted class); the true class is 10, or the last where they cannot be synchronised.
    said = [(0.97, True, 10), (0.85, True, 9), (0.65, True, 3), (0.2, True, 10), (0.92, False, 20), (0.1, False, 20)]
    answers = [
        Answer(f"clip{i}", offset_seconds=0.0 if true else 4.8, synchronisable=true, logits=_logits(predicted), synchronisable_probability=p)
        for i, (p, true, predicted) in enumerate(said)
    ]
    rows = {(row.measure, row.threshold): row for row in rows_of(answers)}
    assert rows["synchronisable Acc@1", None].value == pytest.approx(4 / 6)
    assert rows["synchronisable AUC-ROC", None].value == pytest.approx(5 / 8)  # of 4 x 2 pairs, 0.92 is above three and 0.1 above none
    assert rows["offset Acc@1", None].value == 0.5 and rows["offset Acc@1", None].answers == 4  # only of those that can be
    kept = {t: rows[f"offset Acc@1, synchronisable with more than {t:g}", t] for t in THRESHOLDS}
    near = {t: rows[f"offset Acc@1 within one class, synchronisable with more than {t:g}", t] for t in THRESHOLDS}
    # One that cannot be synchronised but is kept is a wrong offset, though the network said the class that it would have had.
    assert [(kept[t].answers, kept[t].value) for t in (0.5, 0.8, 0.9, 0.95)] == [(4, 1 / 4), (3, pytest.approx(1 / 3)), (2, 1 / 2), (1, 1.0)]
    assert [near[t].value for t in (0.5, 0.8)] == [2 / 4, pytest.approx(2 / 3)]
    assert kept[0.99].answers == 0 and math.isnan(kept[0.99].value) and "-" in table([kept[0.99]])[1]


def test_a_list_of_offsets_says_nothing_of_what_cannot_be_synchronised() -> None:
    answers = [Answer("a", logits=_logits(10), synchronisable_probability=0.7), Answer("b", logits=_logits(10), synchronisable_probability=0.4)]
    assert not any("AUC" in row.measure or row.measure.startswith("synchronisable") for row in rows_of(answers))
    alone = [replace(answer, logits=None, synchronisable=answer.key == "a") for answer in answers]
    assert [(row.measure, row.value) for row in rows_of(alone)] == [("synchronisable Acc@1", 1.0), ("synchronisable AUC-ROC", 1.0)]


def test_windows_both_ways() -> None:
    answers = [Answer("a", precision_audio=1.0, precision_visual=0.5), Answer("b", precision_audio=0.0, precision_visual=0.25)]
    assert [(row.measure, row.value, row.clips) for row in rows_of(answers)] == [
        ("shifted windows, both ways", 0.4375, 2),
        ("shifted windows, sound for pictures", 0.5, 2),
        ("shifted windows, pictures for sound", 0.375, 2),
    ]


def test_words() -> None:
    answers = [Answer("a", "dog", logits=_logits(10), moved_frames=-4, offset_error_samples=160), Answer("b", "axe", logits=_logits(10))]
    lines = table(rows_of(answers), level=0.9)
    assert lines[0].split() == ["measure", "value", "90", "%", "interval", "cuts", "clips"] and len({len(line) for line in lines}) == 1
    assert lines[1].split()[-3:] == ["100.0", "2", "2"] and "offset Acc@1, axe" in lines[3]
    assert "up to 0.16 s (0.080 on average)" in nearness(answers) and "up to 10.0 ms (5.00 on average)" in nearness(answers)
    assert nearness(answers[1:]) == "cuts lie exactly where they were asked for"
