"""The published tables' rows from a Synchformer's answers about cuts of clips, with how sure one can be of them (Iashin et al. 2024, sec. 4).

Stage I: how often a window of segments finds its place among the shifted ones. Stage II: Acc@1 of the offset, exact and within one class (0.2 s).
Stage III: Acc@1 and AUC-ROC of the question whether there is anything to synchronise, and the offset's accuracy among the clips of which a
network is sure that there is. Knows answers as numbers; not how they were come by.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from configs.clock import FRAME_RATE_HZ
from model.segments import SAMPLE_RATE_HZ, offset_class
from model.sync_metrics import accuracy_by_threshold, auc_interval, auc_roc, hits, interval

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Probabilities of being synchronisable above which clips are kept, as published."""


@dataclass(frozen=True)
class Answer:
    """What was said of one cut of a clip, or why nothing could be."""

    key: str
    label: str | None = None
    repeat: int = 0
    start_frame: int | None = None
    """Of the cut's pictures, as asked for."""
    start_sample: int | None = None
    """Of its sound, at 16 kHz."""
    offset_seconds: float = 0.0
    """The true one."""
    synchronisable: bool = True
    """Whether the offset is one of those that the network knows."""
    logits: list[float] | None = None
    """Of the offsets' classes."""
    synchronisable_probability: float | None = None
    precision_audio: float | None = None
    """Stage I: share of the windows of pictures that find their sound."""
    precision_visual: float | None = None
    """Stage I: share of the windows of sound that find their pictures."""
    moved_frames: int = 0
    """By how much later than asked for the pictures began, and the sound with them."""
    offset_error_samples: int = 0
    """By how much later than its offset from the pictures says the sound began."""
    reason: str | None = None
    """One word, where there is no answer."""
    message: str | None = None


@dataclass(frozen=True)
class Row:
    """One number of a table."""

    measure: str
    value: float
    """A share from 0 to 1; nan where there is nothing to measure."""
    low: float
    """The lower end of the interval."""
    high: float
    answers: int
    """Cuts that it is measured on."""
    clips: int
    label: str | None = None
    """The class of clips; None for all."""
    threshold: float | None = None
    """Only cuts with a larger probability of being synchronisable."""


def rows_of(answers: Sequence[Answer], *, level: float = 0.95) -> list[Row]:
    """Every row that answers allow: for all clips, then for each label there is. Without good answers, none."""
    good = [answer for answer in answers if answer.reason is None]
    return [*_windows(good, level), *_synchronisable(good, level), *_offsets(good, level), *_kept(good, level)]


def table(rows: Sequence[Row], *, level: float = 0.95) -> list[str]:
    """Rows as aligned text."""
    cells = [("measure", "value", f"{100 * level:g} % interval", "cuts", "clips")]
    for row in rows:
        name = row.measure + (f", {row.label}" if row.label is not None else "")
        between = "-" if math.isnan(row.low) else f"{100 * row.low:.1f} to {100 * row.high:.1f}"
        value = "-" if math.isnan(row.value) else f"{100 * row.value:.1f} %"
        cells.append((name, value, between, f"{row.answers:,}", f"{row.clips:,}"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  " + "  ".join(f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}" for i, (cell, width) in enumerate(zip(c, widths, strict=True)))
        for c in cells
    ]


def nearness(answers: Sequence[Answer]) -> str:
    """How far the segments that were compared are from those asked for, in words."""
    moved = [abs(answer.moved_frames) / FRAME_RATE_HZ for answer in answers if answer.reason is None]
    error = [1000 * abs(answer.offset_error_samples) / SAMPLE_RATE_HZ for answer in answers if answer.reason is None]
    if not moved or not any(moved + error):
        return "cuts lie exactly where they were asked for"
    return (
        f"stored segments nearest to the cuts: these begin up to {max(moved):.2f} s ({sum(moved) / len(moved):.3f} on average) from where they were "
        f"asked for, and their offsets differ by up to {max(error):.1f} ms ({sum(error) / len(error):.2f} on average)"
    )


# --- one stage each -------------------------------------------------------------------------------------------------------------------


def _windows(answers: list[Answer], level: float) -> Iterator[Row]:
    heard = [answer for answer in answers if answer.precision_audio is not None and answer.precision_visual is not None]
    if not heard:
        return
    audio, visual = (torch.tensor([float(getattr(answer, name)) for answer in heard]) for name in ("precision_audio", "precision_visual"))
    for name, values in (("both ways", (audio + visual) / 2), ("sound for pictures", audio), ("pictures for sound", visual)):
        yield _row(f"shifted windows, {name}", values, heard, level)


def _synchronisable(answers: list[Answer], level: float) -> Iterator[Row]:
    asked = [answer for answer in answers if answer.synchronisable_probability is not None]
    true = torch.tensor([answer.synchronisable for answer in asked], dtype=torch.bool)
    if not asked or (true.all() and any(answer.logits for answer in asked)):
        return  # a list of offsets has no clips that cannot be synchronised
    said = _probabilities(asked)
    yield _row("synchronisable Acc@1", (said > 0.5) == true, asked, level)
    keys = [answer.key for answer in asked]
    yield Row("synchronisable AUC-ROC", auc_roc(said, true), *auc_interval(said, true, keys, level), len(asked), len(set(keys)))


def _offsets(answers: list[Answer], level: float) -> Iterator[Row]:
    asked = [answer for answer in answers if answer.logits is not None and answer.synchronisable]
    labels = sorted({answer.label for answer in asked if answer.label is not None})
    for label in (None, *labels) if asked else ():
        own = [answer for answer in asked if label in (None, answer.label)]
        for name, within in (("offset Acc@1", 0), ("offset Acc@1 within one class", 1)):
            yield _row(name, _hits(own, within), own, level, label=label)


def _kept(answers: list[Answer], level: float) -> Iterator[Row]:
    """A clip that is kept though it cannot be synchronised counts as a wrong offset, as published."""
    asked = [answer for answer in answers if answer.logits is not None and answer.synchronisable_probability is not None]
    if not asked:
        return
    said, true = _probabilities(asked), torch.tensor([answer.synchronisable for answer in asked], dtype=torch.bool)
    for name, within in (("offset Acc@1", 0), ("offset Acc@1 within one class", 1)):
        hit = _hits(asked, within) & true
        for kept in accuracy_by_threshold(hit, said, THRESHOLDS):
            own = [answer for answer, above in zip(asked, (said > kept.threshold).tolist(), strict=True) if above]
            named = f"{name}, synchronisable with more than {kept.threshold:g}"
            yield _row(named, hit[said > kept.threshold], own, level, threshold=kept.threshold)


def _hits(answers: list[Answer], within: int) -> Bool[Tensor, "n"]:
    logits = torch.tensor([answer.logits for answer in answers], dtype=torch.float32)
    return hits(logits, torch.tensor([offset_class(answer.offset_seconds) for answer in answers]), within)


def _probabilities(answers: list[Answer]) -> Tensor:
    return torch.tensor([float(answer.synchronisable_probability or 0.0) for answer in answers])


def _row(measure: str, values: Tensor, answers: list[Answer], level: float, *, label: str | None = None, threshold: float | None = None) -> Row:
    keys = [answer.key for answer in answers]
    return Row(measure, values.double().mean().item(), *interval(values, keys, level), len(keys), len(set(keys)), label, threshold)
