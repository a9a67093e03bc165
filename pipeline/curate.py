"""`soundshard curate`: what each threshold on a score would keep of a dataset: clips, hours, bytes and GPU-hours, as a table and as a page.

Reads ledgers and scores, never a shard; `soundshard subset` takes the threshold that was chosen. Knows not how scores are made, nor what they mean.
"""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float64

from configs import storage
from configs.load import job_main
from pipeline.curate_page import curation_html, signed
from pipeline.lists import key_of
from pipeline.rates import read_rates
from pipeline.scores import read_scores, score_columns
from pipeline.select import Names
from pipeline.thresholds import Clips, Curation, Hours, correlations, hours_text, kept, usual
from shards import facts
from shards.read import Index

VISUALSOUND = (0.3, "VisualSound's threshold (Viertola et al. 2024)")
"""On ImageBind's similarity."""
ONE_CLASS = (0.2, "one class of Synchformer's offsets")
"""Within which a published accuracy counts an offset as right."""
DURATION = "duration_seconds"
SPLITS = ("train", "validation", "test")
"""In this order, and others after them."""
NO_SCORE = f"""there are no scores; `soundshard score data=` makes some, or give scores=FILE, or score={DURATION}"""


@dataclass(frozen=True)
class CurateConfig:
    """Options of `soundshard curate`."""

    data: str = "???"
    """A dataset or view."""
    score: str = ""
    """The score that is to be cut: a column of the scores, or of the ledger (`duration_seconds`). May be left out where there is only one."""
    scores: Any = ""
    """Files or datasets of scores, as in `soundshard subset`: a parquet with a column `key`, a csv, ImageBind's `{"path.mp4": score}`; several as
    [a,b]. Empty takes those that `soundshard score` left with the dataset."""
    keep: Literal["above", "below"] = "above"
    """Which clips stay: those with at least the threshold, or those with at most it."""
    absolute: bool = False
    """Cut the score without its sign, such as `sync_offset_seconds` with keep=below."""
    thresholds: list[float] = field(default_factory=list)
    """Thresholds to show; empty takes round numbers and quantiles."""
    others: list[str] = field(default_factory=list)
    """Other scores whose means and correlations are shown; empty takes all there are."""
    split: str | None = None
    """Only this split."""
    rates: str = ""
    """What `soundshard bench-prepare` wrote: adds the hours that featurising what is kept would take, of a GPU if it was measured on one."""
    clips_per_gpu_second: float = 0.0
    """Clips that one GPU trains on in a second: adds the GPU-hours of training on what is kept."""
    epochs: float = 1.0
    """Of training, for `clips_per_gpu_second`."""
    html: str = ""
    """Also write a page with charts; it needs no network and runs no script."""

    def __post_init__(self) -> None:
        if self.clips_per_gpu_second < 0 or self.epochs <= 0:
            raise ValueError(f"clips_per_gpu_second is {self.clips_per_gpu_second:g}, epochs {self.epochs:g}; expected numbers above 0")


def run(config: CurateConfig) -> Curation:
    """Show what thresholds on a score would keep of a dataset: clips, hours, bytes and hours of GPUs, by split, and the commands that take them."""
    index = Index.open(storage.absolute(config.data), config.split)
    found = curation(index, config)
    print("\n".join(text(found)), flush=True)
    if config.html:
        storage.write_bytes(config.html, curation_html(found).encode("utf-8", "backslashreplace"))
        print(f"curate: page in {config.html}", flush=True)
    return found


def curation(index: Index, config: CurateConfig) -> Curation:
    """All that is shown. Raises ValueError where there is nothing to cut."""
    if not index.ok:
        raise ValueError(f"{config.data} has no good clips; there is nothing to keep")
    there = columns(index, several(config.scores))
    name = chosen(config.score, there)
    score = np.abs(there[name]) if config.absolute else there[name]
    if not np.isfinite(score).any():
        raise ValueError(f"none of the {index.ok:,} good clips of {config.data} has a score {name!r}: do their names agree?")
    marked = _marked(name, config)
    clips, shown = _clips(index), f"|{name}|" if config.absolute else name
    thresholds = config.thresholds or usual(score, config.keep, also=[marked[0]] if marked else [])
    thresholds = sorted({float(value) for value in thresholds}, reverse=config.keep == "below")
    others = {other: there[chosen(other, there)] for other in config.others or there if other != name}
    others = {other: values for other, values in others.items() if differs(values)}
    everything = kept(clips, score, None, config.keep)
    scored = kept(clips, score, -np.inf if config.keep == "above" else np.inf, config.keep)
    return Curation(
        data=config.data,
        kind=index.info.kind,
        name=shown,
        keep=config.keep,
        clips=clips,
        score=score,
        others=others,
        kept=(everything, *(kept(clips, score, value, config.keep) for value in thresholds)),
        scored=scored.total,
        hours=tuple(_hours(config)),
        commands=tuple(command(config, name, value, in_ledger=name in _ledger_columns(index)) for value in thresholds),
        marked=marked,
        names=(shown, *others),
        correlations=correlations([score, *others.values()]),
    )


# --- columns --------------------------------------------------------------------------------------------------------------------------


def several(value: Any) -> list[str]:
    """An option that takes one path or several."""
    return [str(path) for path in (value if isinstance(value, list) else [value]) if path not in ("", None)]


def columns(index: Index, paths: Sequence[str]) -> dict[str, Float64[np.ndarray, "clips"]]:
    """Every score of the good clips, and how long they are."""
    if paths:
        found: dict[str, np.ndarray] = {}
        for path in paths:
            more = scores_in(read_scores(path), index)
            if twice := sorted(found.keys() & more.keys()):
                raise ValueError(f"{path} has {', '.join(twice)}, which another of the scores has too; give one of them, or rename it")
            found |= more
    else:
        stored = facts.scores(index)
        found = {} if stored is None else {score.name: score.values for score in stored.columns}
    return found | _ledger_columns(index)


def scores_in(table: pa.Table, index: Index) -> dict[str, Float64[np.ndarray, "clips"]]:
    """The scores of the good clips, whose names in the table may end otherwise than their keys (`soundshard subset` finds the same)."""
    names = Names(index.keys)
    places = names.places(names.find([key_of(key) for key in table["key"].to_pylist()]))
    found: dict[str, np.ndarray] = {}
    for name in score_columns(table):
        values = table[name].cast(pa.float64()).fill_null(np.nan).to_numpy()
        found[name] = np.where(places >= 0, np.append(values, np.nan)[places], np.nan)
    return found


def _ledger_columns(index: Index) -> dict[str, Float64[np.ndarray, "clips"]]:
    good = index.table.filter(pc.field("status") == "ok")
    return {DURATION: good[DURATION].fill_null(np.nan).to_numpy()}


def chosen(name: str, there: Mapping[str, object]) -> str:
    """The column that is meant. Raises ValueError, with those there are, for one that is not there."""
    scores = [column for column in there if column != DURATION]
    if not name and len(scores) == 1:
        return scores[0]
    if name in there:
        return name
    if not name or not scores:
        raise ValueError(f"give score=, one of {', '.join(scores)}" if scores else NO_SCORE)
    near = get_close_matches(name, there, n=1)
    raise ValueError(f"there is no score {name!r}{f'; did you mean {near[0]}?' if near else ''} There are {', '.join(there)}")


def differs(values: Float64[np.ndarray, "clips"]) -> bool:
    """Whether a score tells clips apart."""
    known = values[np.isfinite(values)]
    return len(known) > 1 and float(known.min()) < float(known.max())


def _marked(name: str, config: CurateConfig) -> tuple[float, str] | None:
    """The threshold that others use for this score, and whose it is. A file of ImageBind's scores says what they are in its own name alone."""
    files = map(storage.basename, several(config.scores)) if name == "score" else []
    if config.keep == "above" and "imagebind" in " ".join([name, *files]).lower():
        return VISUALSOUND
    return ONE_CLASS if config.keep == "below" and config.absolute and name == "sync_offset_seconds" else None


def _clips(index: Index) -> Clips:
    good = index.table.filter(pc.field("status") == "ok")
    splits = sorted(good["split"].unique().to_pylist(), key=lambda name: (SPLITS.index(name) if name in SPLITS else len(SPLITS), name))
    split = good["split"].combine_chunks().dictionary_encode() if good.num_rows else None
    assert split is not None
    encoded = split if isinstance(split, pa.DictionaryArray) else pa.concat_arrays(split.chunks)
    number = np.array([splits.index(name) for name in encoded.dictionary.to_pylist()])
    return Clips(tuple(splits), number[encoded.indices.to_numpy()], good[DURATION].fill_null(0.0).to_numpy(), facts.member_bytes(good))


# --- what it costs --------------------------------------------------------------------------------------------------------------------


def _hours(config: CurateConfig) -> list[Hours]:
    """What is to be reckoned for what is kept."""
    found = []
    if config.rates:
        rates = read_rates(config.rates)
        gpu = rates.device == "cuda"
        seconds = rates.networks.wall_seconds if gpu else rates.networks.cpu_seconds
        unit, device = ("GPU-hours", rates.gpu_kind) if gpu else ("core-hours", rates.cpu_kind)
        note = f"{seconds:.3g} s of one {device} for {rates.video_seconds:.3g} s of video ({config.rates}: both towers and codec, no decoding)"
        found.append(Hours(f"featurising, {unit}", note, per_second=seconds / rates.video_seconds / 3600))
    if config.clips_per_gpu_second:
        note = f"{config.clips_per_gpu_second:g} clips a second on one GPU, {config.epochs:g} epoch{'s' if config.epochs != 1 else ''}"
        found.append(Hours("training, GPU-hours", note, per_clip=config.epochs / config.clips_per_gpu_second / 3600))
    return found


# --- commands -------------------------------------------------------------------------------------------------------------------------


def command(config: CurateConfig, name: str, threshold: float, *, in_ledger: bool) -> str:
    """The command that makes a view of what a threshold keeps."""
    above, number = config.keep == "above", f"{threshold:g}"
    if float(number) != threshold:
        number = repr(threshold)
    scores, where = several(config.scores), []
    options = [f"data={config.data}", f"out={_out(config, name, number)}"]
    if in_ledger and not config.absolute:
        options.append(f"{'min' if above else 'max'}_seconds={number}")
    else:
        options += [f"scores={scores[0] if len(scores) == 1 else '[' + ','.join(scores) + ']'}"] if scores else []
        if config.absolute:
            where.append(f"abs({_column(name)}) {'>=' if above else '<='} {number}")
        else:
            options += [f"score={name}", f"{'min' if above else 'max'}_score={number}"]
    if config.split is not None:
        where.append(f"split = '{config.split}'")
    return shlex.join(["soundshard", "subset", *options, *([f"where={' AND '.join(where)}"] if where else [])])


def _out(config: CurateConfig, name: str, number: str) -> str:
    words = [config.data.rstrip("/"), *([config.split] if config.split else []), re.sub(r"\W+", "_", name), number]
    return "-".join(words)


def _column(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z_]\w*", name) else '"' + name.replace('"', '""') + '"'


# --- text -----------------------------------------------------------------------------------------------------------------------------


def text(found: Curation) -> list[str]:
    """What is printed."""
    everything = found.kept[0]
    without = everything.total - found.scored
    lines = [
        f"curate: {found.name} of {found.data}, {everything.total:,} good clips ({found.kind}); {found.scored:,} have the score"
        + (f", and the other {without:,} are kept by no threshold" if without else ""),
        "",
        *table(found),
    ]
    if found.marked:
        lines.append(f"* {found.marked[0]:g} is {found.marked[1]}")
    lines += [f"{hours.name}: {hours.note}" for hours in found.hours]
    if len(found.names) > 1:
        lines += ["", f"rank correlation with {found.names[0]} (Spearman's): " + ", ".join(_correlations(found))]
    return [*lines, "", "to take one:", *(f"  {command}" for command in found.commands)]


def table(found: Curation) -> list[str]:
    """What each threshold keeps, as aligned text: a line each."""
    splits = found.clips.splits if len(found.clips.splits) > 1 else ()
    head = ["at least" if found.keep == "above" else "at most", "clips", "", *splits, "hours", "GB", *(hours.name for hours in found.hours)]
    cells = [head]
    for row in found.kept:
        mark = "*" if found.marked and row.threshold == found.marked[0] else ""
        share = f"{100 * row.total / found.kept[0].total:.1f} %"
        name = "(all)" if row.threshold is None else f"{mark}{row.threshold:g}"
        counts = [f"{row.clips[split]:,}" for split in splits]
        cells.append(
            [
                name,
                f"{row.total:,}",
                share,
                *counts,
                hours_text(row.seconds / 3600),
                f"{row.bytes / 1e9:,.3f}",
                *(hours_text(hours.of(row)) for hours in found.hours),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]


def _correlations(found: Curation) -> list[str]:
    pairs = zip(found.names[1:], found.correlations[0, 1:].tolist(), strict=True)
    return [f"{name} {'-' if np.isnan(value) else signed(value)}" for name, value in pairs]


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pipeline.curate`."""
    return job_main(CurateConfig, run, argv, command="curate", positional="data")


if __name__ == "__main__":
    sys.exit(main())
