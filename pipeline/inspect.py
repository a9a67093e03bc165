"""`soundshard inspect`: what a dataset or view holds, as text (`shards.inspect`) or as a page to look at.

The page is put together here: counts from the ledgers, scores from their sidecar, some clips. What a clip shows is `pipeline.inspect_clips`' matter,
how it all looks `pipeline.inspect_page`'s. Reads only.
"""

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow.compute as pc

from configs import storage
from configs.load import job_main
from pipeline import inspect_clips
from pipeline.inspect_page import LISTED_EXTREMES, DatasetPage, Spread, page_html
from pipeline.scores import read_scores
from shards import facts, ledger
from shards import inspect as text_report
from shards.dataset import leaves
from shards.facts import ScoreFacts, Scores
from shards.inspect import size_text
from shards.read import Index

EXAMPLES = 5
"""Failed clips that are shown for a reason."""


@dataclass(frozen=True)
class InspectConfig(text_report.InspectConfig):
    """Options of `soundshard inspect`."""

    html: str | None = None
    """Write a page to this file instead: one file that needs nothing else, with counts, distributions, some clips that play, and provenance."""
    clips: int = 12
    """On the page: how many clips are shown, drawn over the classes."""
    seed: int = 0
    """On the page: another one draws other clips."""
    media: str | None = None
    """On the page of a feature dataset: the media dataset whose clips are played; by default the one beside it, if it was made of that."""
    scores: str | None = None
    """On the page: scores from elsewhere (a parquet with a column key, a csv, ImageBind's json), beside those of the dataset's scores.parquet."""
    loudness_clips: int = 48
    """On the page: where no score says how loud clips are, so many are drawn and measured; 0 for none."""
    html_mb: float = 40.0
    """About how large the page may be, in megabytes. A clip that would take more than its share is encoded anew for the page, smaller."""

    def __post_init__(self) -> None:
        if self.html is not None and self.key is not None:
            raise ValueError("key= shows one sample as text; give it without html=")
        if self.clips < 0 or self.loudness_clips < 0:
            raise ValueError(f"clips is {self.clips} and loudness_clips {self.loudness_clips}; expected 0 or more")
        if self.html_mb <= 0:
            raise ValueError(f"html_mb is {self.html_mb:g}; expected more than 0")


def run(config: InspectConfig) -> None:
    """Show what a dataset or view holds: counts, failures by reason, sizes, scores, spec and provenance; or one sample by its key; or a page."""
    if config.html is None:
        text_report.run(config)
        return
    page = page_of(config, Index.open(config.dataset, config.split))
    content = page_html(page).encode("utf-8", "backslashreplace")  # a file's name may hold bytes that are no text
    storage.write_bytes(config.html, content)
    good, playing = page.splits[-1].ok if page.splits else 0, sum(clip.mp4 is not None for clip in page.clips)
    print(f"inspect: {good:,} good clips; {len(page.clips)} are shown, of which {playing} play; {size_text(len(content))} -> {config.html}")


def page_of(config: InspectConfig, index: Index) -> DatasetPage:
    """What the page shows. ValueError for scores or media that do not fit."""
    found, info = ledger.listing(index.root), index.info
    scores = _scores(index, config.scores)
    source, playing = inspect_clips.source_of(index, config.media)
    rows = inspect_clips.chosen(index, config.clips, config.seed)
    clip_bytes = int(config.html_mb * 1e6 * 3 / 4 / max(1, len(rows)))  # base64 takes 4 bytes for 3
    clips = inspect_clips.gallery(index, source, rows, scores.columns, clip_bytes=clip_bytes)
    spreads = list(_spreads(index, scores))
    if source is not None and config.loudness_clips and index.ok and not any(score.name.startswith("loudness") for score in scores.columns):
        drawn = np.random.default_rng(config.seed).permutation(index.ok)[: config.loudness_clips]
        loudness, note = inspect_clips.loudness(source, index.keys.take(drawn).to_pylist())
        spreads.insert(1, Spread("loudness", loudness, " LUFS", note))
    place = storage.absolute(index.view or index.root)
    return DatasetPage(
        name="/".join(place.rstrip("/").split("/")[-2:]),
        place=place,
        kind=info.kind,
        parent=storage.absolute(index.root) if index.view else None,
        selection=tuple(info.view["selection"]) if info.view else (),
        fingerprint=info.fingerprint,
        splits=tuple(facts.splits(index, found)),
        classes=tuple(facts.classes(index)),
        failures=tuple(facts.failures(index, examples=EXAMPLES)),
        spreads=tuple(spreads),
        score_errors=scores.errors,
        clips=tuple(clips),
        gallery_notes=tuple(note for note in (playing, inspect_clips.similarity_note(index)) if note and clips),
        members=tuple(facts.members(index)),
        shards=tuple(facts.shards(index, found)),
        unfinished=tuple(sorted(found.tars.keys() - found.ledgers.keys())),
        spec=_lines(info.spec),
        provenance=_lines(info.provenance),
        command=_command(config),
    )


def _scores(index: Index, given: str | None) -> Scores:
    """The sidecar's scores and those that are given, which come first."""
    own = facts.scores(index) or Scores((), ())
    if given is None:
        return own
    more = facts.scores_of(index, [read_scores(given)])
    if not any(len(score.known) for score in more.columns):
        raise ValueError(f"scores={given}: none of its keys is a good clip of {index.view or index.root}")
    names = {score.name for score in more.columns}
    return Scores((*more.columns, *(score for score in own.columns if score.name not in names)), (*more.errors, *own.errors))


def _spreads(index: Index, scores: Scores) -> Iterator[Spread]:
    """How long clips are, and how their scores are spread."""
    good = index.table.filter(pc.field("status") == "ok")
    for name, column in (("duration", "duration_seconds"), ("start in the video", "start_seconds")):  # the latter of views, where a list gave it
        if column in good.column_names:
            known = good[column].drop_null().to_numpy().astype(np.float64)
            yield Spread(name, known, " s", "" if len(known) == index.ok else f"known of {len(known):,} clips")
    for score in scores.columns:
        known = score.known
        note = f"{len(known):,} of {index.ok:,} clips have one" if len(known) < index.ok else ""
        yield Spread(score.name, known, "", note, _extremes(index, score), score.is_flag)


def _extremes(index: Index, score: ScoreFacts) -> tuple[tuple[str, float], ...]:
    known = np.flatnonzero(np.isfinite(score.values))
    if score.is_flag or len(known) < 2 * LISTED_EXTREMES or np.ptp(score.values[known]) == 0:
        return ()
    order = known[np.argsort(score.values[known], kind="stable")]
    ends = [*order[:LISTED_EXTREMES].tolist(), *order[-LISTED_EXTREMES:].tolist()]
    return tuple((index.keys[row].as_py(), float(score.values[row])) for row in ends)


def _lines(values: dict) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for name, value in leaves(values)} if values else {}


def _command(config: InspectConfig) -> str:
    given = [(field.name, getattr(config, field.name)) for field in fields(config) if field.name != "dataset"]
    options = [f"{field}={shlex.quote(str(value))}" for field, value in given if value != getattr(InspectConfig, field)]
    return " ".join(["soundshard inspect", shlex.quote(config.dataset), *options])


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pipeline.inspect`."""
    return job_main(InspectConfig, run, argv, command="inspect", positional="dataset")


if __name__ == "__main__":
    sys.exit(main())
