"""What came of a demo: the held-out clips heard and measured, the losses, the sizes and speeds, and all of it as a page.

Reads the folders that the jobs left, as anyone could; starts nothing.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml

from configs.load import JobError
from pipeline.decode import decode_audio
from pipeline.onsets import TOLERANCE_SECONDS, OnsetScore, chance_score, onset_times, score_onsets, total_score
from pipeline.page import Curve, Figure, PageData, Pair, Sound, Stage
from pipeline.steps import Ran
from shards.read import Index

HOW_TO_PUBLISHED = "`soundshard weights get=avclip,encodec24`, then `soundshard demo weights=published out=demo-published`"
SAMPLE_RATE_HZ = 24000
"""At which sounds are measured and drawn."""


@dataclass(frozen=True)
class Heard:
    """A held-out clip, its two sounds, and when something should sound."""

    key: str
    label: str
    original_mp4: bytes
    generated_mp4: bytes
    original: Sound
    generated: Sound
    marks_seconds: tuple[float, ...]


def hear(out: Path) -> list[Heard]:
    """The held-out clips that were generated. Where contacts are known, these should sound; else, what begins in the original."""
    media = Index.open(out / "media", kind="media")
    labels = {row["key"]: row["label"] for row in media.rows()}
    contacts = known_contacts(out)
    heard = []
    for row in generated_rows(out):
        key, seconds = row["key"], row["duration_seconds"]
        original_mp4, generated_mp4 = bytes(media.bytes(media.row(key), "mp4")), (out / "generated" / row["mp4"]).read_bytes()
        original, generated = listen(original_mp4, seconds), listen(generated_mp4, seconds)
        marks = contacts.get(key, original.onsets_seconds)
        heard.append(Heard(key, labels[key] or key, original_mp4, generated_mp4, original, generated, tuple(t for t in marks if t < seconds)))
    if not heard:
        raise JobError(f"no clip was generated; {out / 'generated' / 'ledger.parquet'} has the reasons")
    return heard


def known_contacts(out: Path) -> dict[str, tuple[float, ...]]:
    """Contact times by key; none for clips that were not made by program."""
    path = out / "clips" / "contacts.json"
    return {key: tuple(c["seconds"] for c in contacts) for key, contacts in json.loads(path.read_text()).items()} if path.is_file() else {}


def generated_rows(out: Path) -> list[dict[str, Any]]:
    """The good rows of the generated videos' ledger, by key."""
    rows = pq.read_table(out / "generated" / "ledger.parquet").to_pylist()
    return sorted((row for row in rows if row["status"] == "ok"), key=lambda row: row["key"])


def listen(mp4: bytes, seconds: float) -> Sound:
    """A video's sound up to an instant, and its onsets."""
    wave = decode_audio(mp4, SAMPLE_RATE_HZ, 1)[0, : round(seconds * SAMPLE_RATE_HZ)]
    return Sound(wave, SAMPLE_RATE_HZ, tuple(onset_times(wave, SAMPLE_RATE_HZ)))


def onset_scores(heard: Sequence[Heard]) -> tuple[OnsetScore, OnsetScore]:
    """Of the generated sounds: against their own clips' times, and against the other clips' (chance)."""
    detected, expected = [h.generated.onsets_seconds for h in heard], [h.marks_seconds for h in heard]
    return total_score(detected, expected), chance_score(detected, expected)


@dataclass(frozen=True)
class Training:
    """What the run's metrics.jsonl says."""

    rows: tuple[Mapping[str, Any], ...]

    @classmethod
    def of(cls, out: Path) -> "Training":
        return cls(tuple(json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()))

    def split(self, name: str) -> list[Mapping[str, Any]]:
        return [row for row in self.rows if row["split"] == name]

    @property
    def steps(self) -> int:
        return max(row["step"] for row in self.rows)

    @property
    def samples_per_second(self) -> float:
        """The median."""
        return float(np.median([row["samples_per_second"] for row in self.split("train")]))

    @property
    def span(self) -> str:
        """The loss before training and at its end, the end on validation clips if there are any.

        Before the first update every head is zero, so the first training loss is that of any clip.
        """
        train, validation = self.split("train"), self.split("validation")
        return f"{'validation' if validation else 'training'} loss {train[0]['loss']:.2f} -> {(validation or train)[-1]['loss']:.2f}"

    def curves(self) -> tuple[Curve, ...]:
        """Losses over steps, each codebook's as a thin line."""
        train, validation = self.split("train"), self.split("validation")
        curves = [_curve("training loss", train, "train"), _curve("validation loss", validation, "validation")]
        codebooks = range(len(train[0]["per_codebook"]))
        curves += [_curve(f"codebook {k + 1}, training", train, "train", codebook=k) for k in codebooks]
        curves += [_curve(f"codebook {k + 1}, validation", validation, "validation", codebook=k) for k in codebooks]
        return tuple(curve for curve in curves if curve.steps)


def _curve(name: str, rows: Sequence[Mapping[str, Any]], role: str, *, codebook: int | None = None) -> Curve:
    values = (row["loss"] if codebook is None else row["per_codebook"][codebook] for row in rows)
    return Curve(name, tuple(row["step"] for row in rows), tuple(map(float, values)), role, thin=codebook is not None)


def results_line(out: Path, ran: Sequence[Ran], heard: Sequence[Heard]) -> str:
    """The results in one line."""
    (own, chance), training = onset_scores(heard), Training.of(out)
    return (
        f"results: {len(heard)} held-out clips, onset F1 {own.f1:.2f} against {chance.f1:.2f} by chance; {training.span} "
        f"at {training.samples_per_second:.0f} samples/s; {clock(sum(r.seconds for r in ran))} in all"
    )


def page_data(out: Path, ran: Sequence[Ran], heard: Sequence[Heard], *, shown: int) -> PageData:
    """The page's content."""
    (own, chance), training = onset_scores(heard), Training.of(out)
    media, features = Index.open(out / "media"), Index.open(out / "features", kind="features")
    known = bool(known_contacts(out))
    seconds = sum(r.seconds for r in ran)
    figures = (
        Figure(f"{own.f1:.2f}", f"onset F1 of the generated sound (by chance {chance.f1:.2f})"),
        Figure(training.span.split("loss ")[1].replace("->", "→"), training.span.split(" loss")[0] + " loss"),
        Figure(f"{training.samples_per_second:.0f}/s", f"training windows, {training.steps} steps"),
        Figure(clock(seconds), f"for everything, on {len(os.sched_getaffinity(0))} processors"),
    )
    return PageData(
        title="Sound under video",
        summary=_summary(media, heard, known),
        figures=figures,
        pairs=tuple(_pair(h) for h in _spread(heard, shown)),
        marks_name="contact" if known else "onset of the original",
        curves=training.curves(),
        stages=tuple(_stage(r, out, media, features, training, heard) for r in ran),
        notes=_notes(out, features),
    )


def _summary(media: Index, heard: Sequence[Heard], known: bool) -> str:
    what = "of solid objects that strike and bounce, made by program, so that the instant of every contact is known," if known else "of your own"
    right = "the contacts" if known else "the onsets of the original sound"
    return (
        f"{media.ok} clips {what} became media shards, then features of a visual tower and tokens of an audio codec. A V-AURA decoder learned to "
        f"predict the tokens from the features, and put sound under {len(heard)} clips that it had never seen. Does the sound come when it should? "
        f"The measure counts onsets of the generated sound within {TOLERANCE_SECONDS * 1000:.0f} ms of {right}."
    )


def _pair(heard: Heard) -> Pair:
    score = score_onsets(heard.generated.onsets_seconds, heard.marks_seconds)
    remark = f"{score.matched} of {score.expected} met, {score.detected} onsets"
    return Pair(heard.key, heard.label, heard.original_mp4, heard.generated_mp4, heard.original, heard.generated, heard.marks_seconds, remark)


def _spread(heard: Sequence[Heard], count: int) -> list[Heard]:
    """Evenly over the keys, which begin with a clip's kind."""
    places = np.linspace(0, len(heard) - 1, min(count, len(heard))).round().astype(int)
    return [heard[i] for i in sorted(set(places.tolist()))]


def _stage(ran: Ran, out: Path, media: Index, features: Index, training: Training, heard: Sequence[Heard]) -> Stage:
    job, seconds = ran.step.job, ran.seconds
    clips = {
        "synth": media.ok + media.failed,
        "reencode": media.ok + media.failed,
        "featurise": features.ok + features.failed,
        "generate": len(heard),
    }
    what = {
        "synth": f"{clips['synth']} clips",
        "reencode": f"{media.ok} clips, {media.failed} failed",
        "standin": "a small tower and a small codec, fitted",
        "featurise": f"{features.ok} clips, {features.failed} failed",
        "train": f"{training.steps} steps, {training.span}",
        "generate": f"{len(heard)} videos, {sum(len(h.generated.wave) for h in heard) / SAMPLE_RATE_HZ:.0f} s of sound",
    }[job]
    rate = f"{clips[job] / seconds:.1f} clips/s" if job in clips else f"{training.samples_per_second:.0f} windows/s" if job == "train" else ""
    folder = ran.step.product.parent
    return Stage(job, what, clock(seconds), rate, f"{folder_bytes(folder) / 1e6:.1f} MB in {folder.relative_to(out)}", ran.step.command)


def _notes(out: Path, features: Index) -> tuple[str, ...]:
    """Which networks ran, and what differs from the published ones."""
    tower, codec = features.info.spec["tower"]["config"], features.info.spec["codec"]
    model = yaml.safe_load((out / "run" / "config.yaml").read_text())["model"]
    decoder = f"The decoder has {model['layers']} layers of width {model['width']}; V-AURA as published has 24 of 1536 and saw 200,000 batches of 48."
    if not (out / "networks").is_dir():
        return (f"Tower and codec are the published ones ({codec['name']}).", decoder)
    return (
        f"The visual tower was a small stand-in of convolutions, features of width {tower['width']}, fitted on these clips' training split, where "
        f"Segment-AVCLIP is a transformer of 12 blocks with 768. It knows these clips and nothing else.",
        f"The audio codec was a stand-in too ({codec['name']}: {codec['codebooks']} codebooks of {codec['card']} codes on EnCodec's clock), fitted "
        f"on the same sounds; part of what sounds rough is its share.",
        decoder,
        f"With the published networks: {HOW_TO_PUBLISHED}.",
    )


def folder_bytes(folder: Path) -> int:
    """All files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
