"""`soundshard evaluate.sync`: the published tables' rows for a Synchformer of any of its three stages, on media or on cached features.

Which cuts are asked about follows from lists, ledgers and a seed alone, so that it is the same for media and for features. Answers are kept in
parts of some clips: a run that was broken off goes on. Every clip of a list ends as an answer or as a row that says why there is none.
"""

import csv
import io
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from configs import storage
from configs.clock import FRAME_RATE_HZ, SEGMENT_FRAMES
from configs.load import job_main, save
from model import avclip, synchformer
from model.avclip import load_avclip
from model.segments import CONTRAST, OFFSET, SAMPLES_PER_FRAME, SYNCHRONISABLE, Cut, SegmentGrid, class_seconds, cut_at, draw_cut, draw_offset
from model.segments import draw_synchronisable as draw_pair
from model.synchformer import Head, synchformer_file
from model.weights import load_state, sha256_file
from pipeline.features import pick_device
from pipeline.isolate import Limits
from pipeline.sync_answers import Asked, Contrast, FromFeatures, FromMedia, Networks, Question, TokenScorer, tight
from pipeline.sync_lists import Listed, by_name, present, read_classes, read_list
from pipeline.sync_score import SyncScorer
from pipeline.sync_tables import Answer, Row, nearness, rows_of, table
from shards.dataset import json_bytes
from shards.read import Index

PART_CLIPS = 256
"""Clips whose answers are kept together; a run that is broken off loses no more."""
CLIP_FRAMES = 250
"""Of a longer clip, the first 10 s are looked at, as published."""
SHOWN_MISSING = 5
SHOWN_LABELS = 20
SETTINGS = "evaluation.json"
NOT_SETTINGS = ("data", "out", "level", "device", "batch_segments", "decode_threads", "limits")
"""Options that do not change the answers, or of which something else is compared."""

Stage = Literal[1, 2, 3]


@dataclass(frozen=True)
class EvaluateSyncConfig:
    """Options of `soundshard evaluate.sync`."""

    data: str = "???"
    """A media dataset, whose clips are decoded and cut exactly where the cuts are asked for; or a feature dataset with audio features
    (`featurise audio.weights=...`), where the nearest stored segments stand for them and no clip is decoded."""
    weights: str = "sync"
    """The network: a weights file, a run folder of `soundshard train.sync`, or the name of a published one in the cache: `avclip` is stage I, `sync`
    stage II, `synchability` stage III."""
    synchronisability_weights: str = ""
    """With a network for offsets: one that knows what can be synchronised. Adds the offsets' accuracy among the clips of which it is sure. Without
    fixed offsets, half of the cuts cannot be synchronised then, and count as wrong where they are kept, as published."""
    split: str | None = None
    """Only this split of the dataset."""
    list: str = ""
    """Which clips: fixed offsets (`path,offset_sec,vstart_sec`), VGGSound-Sparse's clean list or its offsets, VGGSound's or AudioSet's csv, or clip
    ids, one a line. Empty takes every clip. Where it fixes no offsets they are drawn."""
    classes: str = ""
    """Only clips of these classes: a list with the columns `class` and `is_sparse`, or classes, one a line."""
    iter_times: int = 1
    """How often each clip is asked about, with another offset and place, where these are drawn."""
    seed: int = 0
    """Decides what is drawn: the same for every clip, whatever the others, and for media and features."""
    segments: int = 14
    """Stage I: segments of a clip. Fewer for clips shorter than 9 s."""
    window: int = 8
    """Stage I: segments of a window."""
    level: float = 0.95
    """Of the intervals: a bootstrap over clips."""
    out: str = ""
    """A folder or prefix for the answers (answers-*.parquet), the rows (rows.parquet, rows.json) and what is missing (missing.csv). With the same
    folder, a run that was broken off goes on. Empty only prints."""
    device: str = "auto"
    """`cpu`, `cuda` or `auto`: a GPU if there is one."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the networks. The published figures were made with fp16 autocast."""
    batch_segments: int = 16
    """Segments of pictures in one forward pass, from media."""
    decode_threads: int = 2
    """Clips decoded at the same time, from media."""
    limits: Limits = field(default_factory=Limits)
    """What decoding a clip may cost."""

    def __post_init__(self) -> None:
        if min(self.iter_times, self.batch_segments, self.decode_threads) < 1:
            given = f"iter_times is {self.iter_times}, batch_segments {self.batch_segments}, decode_threads {self.decode_threads}"
            raise ValueError(f"{given}; expected at least 1")
        if not 0 < self.level < 1:
            raise ValueError(f"level is {self.level}; expected a number between 0 and 1, such as 0.95")


@dataclass(frozen=True)
class Missing:
    """A clip that there is no answer about."""

    key: str
    reason: str
    message: str


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation ended with."""

    stage: Stage
    rows: tuple[Row, ...]
    answers: tuple[Answer, ...]
    missing: tuple[Missing, ...]
    listed: int
    """Clips that were asked for."""


def run(config: EvaluateSyncConfig) -> Evaluation:
    """Print the rows of the published tables, with intervals: stage I's shifted-window accuracy; stage II's Acc@1 of offsets, exact and within one
    class; stage III's Acc@1, AUC-ROC and accuracy of offsets by threshold. Says which clips were missing."""
    stage = stage_of(config.weights)
    index = Index.open(config.data, config.split)
    listed = read_list(config.list) if config.list else None
    _check(config, stage, listed)
    stored = index.info.kind == "features"
    networks = load_networks(config, stage, towers=not stored)
    grid, pairs = grid_of(config, networks, listed)
    asked, missing = questions(config, index, listed, grid, contrast=stage == 1, pairs=pairs)
    if stored:
        source = FromFeatures(index, networks, grid)
        for weights in filter(None, (config.weights, config.synchronisability_weights)):
            _check_towers(weights, stage, index)
    else:
        source = FromMedia(index, networks, grid, threads=config.decode_threads, limits=config.limits)
    if config.out:
        _claim(config, index, listed)
    answers = list(_answered(config, source, asked))
    bad = (Missing(answer.key, answer.reason, answer.message or "") for answer in answers if answer.reason is not None)
    good = tuple(answer for answer in answers if answer.reason is None)
    rows = tuple(rows_of(good, level=config.level))
    found = Evaluation(stage, rows, good, (*missing, *bad), len(asked) + len(missing))
    print("\n".join(report(config, index, found)))
    if config.out:
        _write(config, found)
    if not good:
        raise ValueError(f"none of the {found.listed} clips could be asked about: {_why(found.missing)}")
    return found


# --- networks -------------------------------------------------------------------------------------------------------------------------


def stage_of(weights: str) -> Stage:
    """Of which stage a weights file or run folder is: 1 has towers only, 2 a head for offsets, 3 one for synchronisability."""
    tensors, stored = load_state(synchformer_file(weights))
    if stored is not None and stored.get("kind") not in (avclip.KIND, synchformer.KIND, synchformer.MODULE_KIND):
        raise ValueError(f"{weights}: holds another kind of network; expected Segment AVCLIP or a Synchformer")
    if "transformer.off_head.weight" in tensors:
        return 2
    return 3 if "transformer.sync_head.weight" in tensors else 1


def load_networks(config: EvaluateSyncConfig, stage: Stage, *, towers: bool) -> Networks:
    """The networks that the options ask for, on the device: with `towers` for media, without for stored segments."""
    if stage == 1:
        model = load_avclip(synchformer_file(config.weights), device=pick_device(config.device))
        return Networks(contrast=Contrast(model, config.window, config.precision, config.batch_segments))
    first = _load(config, config.weights, "offset" if stage == 2 else "synchronisable", towers=towers)
    if stage == 3:
        return Networks(synchronisable=first)
    if not config.synchronisability_weights:
        return Networks(offset=first)
    second = _load(config, config.synchronisability_weights, "synchronisable", towers=towers)
    if second.model.config.segments > first.model.config.segments:
        counts = f"{second.model.config.segments} segments, that for offsets {first.model.config.segments}"
        raise ValueError(f"{config.synchronisability_weights}: compares {counts}; expected no more, for it takes the first of the same cut")
    return Networks(offset=first, synchronisable=second)


def _load(config: EvaluateSyncConfig, weights: str, head: Head, *, towers: bool) -> SyncScorer | TokenScorer:
    if towers:
        return SyncScorer(weights, config.device, config.precision, batch_segments=config.batch_segments, head=head)
    return TokenScorer(weights, config.device, config.precision, head=head)


def grid_of(config: EvaluateSyncConfig, networks: Networks, listed: Sequence[Listed] | None) -> tuple[SegmentGrid, bool]:
    """How cuts are taken apart, and whether half of them cannot be synchronised: a cut's whole length apart, as in training stage III.

    Published networks have cuts of 5 s for offsets and 4.48 s for synchronisability; both together on drawn offsets, and networks that compare
    another number of segments, cuts as long as their segments.
    """
    if networks.contrast is not None:
        return replace(CONTRAST, segments=config.segments), False
    network = networks.offset or networks.synchronisable
    assert network is not None
    segments = network.model.config.segments
    pairs = networks.synchronisable is not None and not (listed and listed[0].fixed)
    published = SYNCHRONISABLE if networks.offset is None else OFFSET
    fits = segments == published.segments and not (networks.offset is not None and pairs)
    return published if fits else tight(segments, published.hop_frames), pairs


def _check(config: EvaluateSyncConfig, stage: Stage, listed: Sequence[Listed] | None) -> None:
    if config.synchronisability_weights and stage != 2:
        roman = "I" * stage
        raise ValueError(
            f"synchronisability_weights goes with a network for offsets; {config.weights} is of stage {roman}: give weights=sync, or it alone"
        )
    if listed is None or not listed[0].fixed:
        return
    if config.iter_times > 1:
        raise ValueError(f"iter_times is {config.iter_times}, but {config.list} fixes offsets and places: every time would be the same; give 1")
    if stage != 2:
        raise ValueError(
            f"{config.list} fixes offsets, and {config.weights} is of stage {'I' * stage}, which has no use for them; list clip ids instead"
        )


def _check_towers(weights: str, stage: Stage, index: Index) -> None:
    """Stored features are those of the towers that made them: stage I is about these, and a network of ours says which it was trained on."""
    spec, path = index.info.spec, synchformer_file(weights)
    theirs = {"pictures": spec["tower"]["weights_sha256"], "sound": spec["audio"]["tower"]["weights_sha256"]}
    if stage == 1:
        ours = dict.fromkeys(theirs, sha256_file(path))
    else:
        stored = (load_state(path)[1] or {}).get("towers", {})
        ours = {what: stored[kind].get("sha256") for what, kind in (("pictures", "visual"), ("sound", "audio")) if kind in stored}
    other = [f"{what} {theirs[what][:12]}, not {sha[:12]}" for what, sha in ours.items() if sha and sha != theirs[what]]
    if other:
        verb = "did not make" if stage == 1 else "was trained on other towers than those of"
        raise ValueError(
            f"{weights} {verb} the features in {index.root} ({'; '.join(other)}); give its media dataset, or the weights that go with it"
        )


# --- which cuts -----------------------------------------------------------------------------------------------------------------------


def questions(
    config: EvaluateSyncConfig, index: Index, listed: Sequence[Listed] | None, grid: SegmentGrid, *, contrast: bool, pairs: bool
) -> tuple[list[Asked], list[Missing]]:
    """What is asked about which clip, in the order of keys; and the clips of the list that are not there or too short for what might be drawn.

    A clip is left out by its length, never by what was drawn for it: otherwise large offsets would be rarer among short clips.
    """
    good = index.table.filter(pc.field("status") == "ok")
    labels, seconds = good["label"].to_pylist(), good["duration_seconds"].to_pylist()
    classes = set(read_classes(config.classes)) if config.classes else None
    wanted, missing = _wanted(index, listed)
    asked: list[Asked] = []
    keys = index.keys.to_pylist()
    for row in sorted(wanted, key=lambda row: keys[row]):
        if classes is not None and labels[row] not in classes:
            continue
        frames = round((seconds[row] or 0) * FRAME_RATE_HZ)
        clip = Asked(keys[row], row, labels[row], ())
        try:
            cuts = _asked(config, clip.key, wanted[row], min(frames, CLIP_FRAMES), grid, contrast=contrast, pairs=pairs)
        except ValueError as error:
            missing.append(Missing(clip.key, "too_short", str(error)))
        else:
            asked.append(replace(clip, questions=cuts))
    if not asked and not missing:
        raise ValueError(f"{index.root} has no good clips{' of these classes' if classes else ''}" + (f" in {config.split}" if config.split else ""))
    return asked, missing


def _wanted(index: Index, listed: Sequence[Listed] | None) -> tuple[dict[int, list[Listed]], list[Missing]]:
    """The rows of the clips that are asked for, with what the list says of each; and those that the dataset lacks."""
    keys = index.keys.to_pylist()
    if listed is None:
        return {row: [Listed(key)] for row, key in enumerate(keys)}, []
    bad = index.table.filter(pc.field("status") != "ok")
    failed = by_name(bad["key"].to_pylist())
    rows, wanted, missing = by_name(keys), {}, {}
    for item in listed:
        name = present(item.key, rows)
        if name is not None:
            wanted.setdefault(rows[name], []).append(item)
            continue
        name = present(item.key, failed)
        if name is None:
            missing[item.key] = Missing(item.key, "absent", f"not in {index.root}")
        else:
            row = bad.slice(failed[name], 1).to_pylist()[0]
            missing[item.key] = Missing(item.key, str(row["reason"]), str(row["message"]))
    return wanted, list(missing.values())


def _asked(
    config: EvaluateSyncConfig, key: str, listed: Sequence[Listed], frames: int, grid: SegmentGrid, *, contrast: bool, pairs: bool
) -> tuple[Question, ...]:
    """The cuts of one clip. Raises ValueError where it is too short."""
    if contrast:
        return (Question(_middle(frames, grid)),)
    found: list[Question] = []
    for item in listed:
        if item.start_seconds is not None and item.offset_seconds is not None:
            found.append(Question(cut_at(item.start_seconds, item.offset_seconds, grid), repeat=len(found)))
            continue
        reach = grid.crop_seconds if pairs else class_seconds(synchformer.OFFSET_CLASSES - 1)
        if frames < (grid.crop_seconds + reach) * FRAME_RATE_HZ - 1e-6:
            raise ValueError(f"{frames / FRAME_RATE_HZ:g} s; a cut of {grid.crop_seconds:g} s with offsets to {reach:g} s needs their sum")
        for repeat in range(config.iter_times):
            rng = random.Random(f"{config.seed}\n{key}\n{repeat}")
            offset, positive = draw_pair(rng, grid) if pairs else (draw_offset(rng), True)
            found.append(Question(draw_cut(rng, offset, frames, frames * SAMPLES_PER_FRAME, grid=grid), positive, repeat))
    return tuple(found)


def _middle(frames: int, grid: SegmentGrid) -> Cut:
    """The cut whose segments lie in the middle of a clip, for stage I."""
    first = (frames - grid.span_frames) // 2
    if first < 0:
        raise ValueError(
            f"{frames / FRAME_RATE_HZ:g} s; {grid.segments} segments of {SEGMENT_FRAMES / FRAME_RATE_HZ:g} s are longer: give fewer segments"
        )
    start = first - grid.frame_starts()[0]
    return Cut(start, grid.crop_frames, start * SAMPLES_PER_FRAME, grid.crop_samples, 0.0)


# --- answers in parts -----------------------------------------------------------------------------------------------------------------


def _answered(config: EvaluateSyncConfig, source: FromMedia | FromFeatures, asked: Sequence[Asked]) -> Iterator[Answer]:
    """The answers about all clips: of an earlier run where they are kept, else new."""
    with tqdm(total=len(asked), desc="evaluate.sync", unit="clip", disable=None) as bar:
        for number, first in enumerate(range(0, len(asked), PART_CLIPS)):
            clips = asked[first : first + PART_CLIPS]
            path = storage.join(config.out, f"answers-{number:06d}.parquet") if config.out else ""
            if path and storage.is_file(path):
                bar.update(len(clips))
                yield from _read_part(path)
                continue
            part: list[Answer] = []
            for found in source.answers(clips):
                part += found
                bar.update()
            if path:
                _write_table(path, part)
            yield from part


def _read_part(path: str) -> Iterator[Answer]:
    names = {each.name for each in fields(Answer)}
    for row in pq.read_table(pa.BufferReader(storage.read_bytes(path))).to_pylist():
        yield Answer(**{name: value for name, value in row.items() if name in names})


def _write_table(path: str, items: Sequence[Answer] | Sequence[Row]) -> None:
    sink = io.BytesIO()
    rows = [asdict(item) | ({"predicted_seconds": _predicted(item)} if isinstance(item, Answer) else {}) for item in items]
    pq.write_table(pa.Table.from_pylist(rows, schema=ANSWERS if rows and isinstance(items[0], Answer) else ROWS), sink)
    storage.write_bytes(path, sink.getvalue())


def _predicted(answer: Answer) -> float | None:
    return None if answer.logits is None else class_seconds(int(np.argmax(answer.logits)))


ANSWERS = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.string()),
        ("repeat", pa.int32()),
        ("start_frame", pa.int32()),
        ("start_sample", pa.int64()),
        ("offset_seconds", pa.float64()),
        ("synchronisable", pa.bool_()),
        ("logits", pa.list_(pa.float32())),
        ("predicted_seconds", pa.float64()),
        ("synchronisable_probability", pa.float64()),
        ("precision_audio", pa.float64()),
        ("precision_visual", pa.float64()),
        ("moved_frames", pa.int32()),
        ("offset_error_samples", pa.int32()),
        ("reason", pa.string()),
        ("message", pa.string()),
    ]
)
ROWS = pa.schema(
    [
        ("measure", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("answers", pa.int64()),
        ("clips", pa.int64()),
        ("label", pa.string()),
        ("threshold", pa.float64()),
    ]
)


def _claim(config: EvaluateSyncConfig, index: Index, listed: Sequence[Listed] | None) -> None:
    """Write what decides the answers to the folder, or check that it holds answers to the same questions."""
    weights = {name: sha256_file(synchformer_file(value)) for name in ("weights", "synchronisability_weights") if (value := getattr(config, name))}
    ours: dict[str, Any] = {name: value for name, value in asdict(config).items() if name not in NOT_SETTINGS} | weights
    ours |= {
        "data_fingerprint": index.info.fingerprint,
        "data_content": index.content,
        "list": None if listed is None else [asdict(x) for x in listed],
    }
    ours["classes"] = sorted(read_classes(config.classes)) if config.classes else None
    path, text = storage.join(config.out, SETTINGS), json_bytes(ours)
    if storage.is_file(path):
        theirs = json.loads(storage.read_bytes(path))
        other = sorted(name for name in {*ours, *theirs} if json.loads(text).get(name) != theirs.get(name))
        if other:
            raise ValueError(f"{config.out} holds an evaluation of something else ({', '.join(other)} differ); give another folder, or remove it")
        return
    storage.write_bytes(path, text)


# --- reports --------------------------------------------------------------------------------------------------------------------------


def report(config: EvaluateSyncConfig, index: Index, found: Evaluation) -> Iterator[str]:
    """What is printed, line by line."""
    what = {1: "stage I, Segment AVCLIP", 2: "stage II, offsets", 3: "stage III, synchronisability"}[found.stage]
    both = f" and {config.synchronisability_weights}" if config.synchronisability_weights else ""
    where = f"{config.data} ({index.info.kind}{f', split {config.split}' if config.split else ''})"
    yield f"{what}: {config.weights}{both} on {where}{f', list {config.list}' if config.list else ''}"
    labels = {row.label for row in found.rows if row.label is not None}
    shown = [row for row in found.rows if row.label is None or config.classes or len(labels) <= SHOWN_LABELS]
    if shown:
        yield from table(shown, level=config.level)
        yield nearness(found.answers)
    if len(shown) < len(found.rows):
        yield f"{len(labels)} classes are not shown" + (f"; they are in {storage.join(config.out, 'rows.parquet')}" if config.out else "; give out=")
    if found.missing:
        first = ", ".join(item.key for item in found.missing[:SHOWN_MISSING]) + (", ..." if len(found.missing) > SHOWN_MISSING else "")
        everything = f" (all in {storage.join(config.out, 'missing.csv')})" if config.out else " (all of them with out=)"
        yield f"{len(found.missing):,} of {found.listed:,} clips are missing: {_why(found.missing)}: {first}{everything}"


def _why(missing: Sequence[Missing]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in Counter(item.reason for item in missing).most_common())


def _write(config: EvaluateSyncConfig, found: Evaluation) -> None:
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows(
        [("key", "reason", "message"), *((item.key, item.reason, item.message) for item in found.missing)]
    )
    storage.write_bytes(storage.join(config.out, "missing.csv"), lines.getvalue().encode())
    _write_table(storage.join(config.out, "rows.parquet"), found.rows)
    # JSON has no nan: what cannot be measured is null there.
    rows = [{name: None if value != value else value for name, value in asdict(row).items()} for row in found.rows]
    facts = {"stage": found.stage, "listed": found.listed, "missing": len(found.missing), "cuts": nearness(found.answers), "rows": rows}
    storage.write_bytes(storage.join(config.out, "rows.json"), (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode())
    save(config, storage.join(config.out, "config.yaml"))


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pipeline.evaluate_sync`."""
    return job_main(EvaluateSyncConfig, run, argv, command="evaluate.sync")


if __name__ == "__main__":
    sys.exit(main())
