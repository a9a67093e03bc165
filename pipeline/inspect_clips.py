"""Some clips of a dataset as a page shows them: which ones, and for each its video, its sound, its codes and how alike its pictures and sound are.

Everything that decodes runs in processes of its own. What cannot be had of a clip is told with it, and costs nothing else. Knows datasets; no page.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Float32

from configs import storage
from configs.clock import FRAME_RATE_HZ, SEGMENT_FRAMES, SEGMENT_SECONDS, SYNCHFORMER_RATE_HZ
from configs.storage import StorageError
from pipeline.decode import MediaError, decode_audio
from pipeline.encode import EncodeConfig, reencode
from pipeline.inspect_charts import Similarity
from pipeline.inspect_page import Codes, ShownClip
from pipeline.isolate import Limits, call
from pipeline.page import Sound
from shards.dataset import INFO, read_info
from shards.facts import ScoreFacts
from shards.inspect import score_text, size_text
from shards.read import Index

VISUAL, AUDIO = "avclip.npy", "avclip_audio.npy"
LIMITS = Limits(clip_seconds=60.0)
SMALL = EncodeConfig(short_side=180, crf=28.0, preset="veryfast")
"""How a clip that is too large for the page is encoded for it."""


# --- which --------------------------------------------------------------------------------------------------------------------------------


def chosen(index: Index, count: int, seed: int) -> list[int]:
    """Good rows, drawn over the classes: one of each class before a second of any, classes and clips at random. The same for the same seed."""
    rng = np.random.default_rng(seed)
    drawn = rng.permutation(index.ok)
    labels = _good(index)["label"].combine_chunks().dictionary_encode(null_encoding="encode")
    classes = labels.indices.to_numpy()[drawn].astype(np.int64)
    order = np.argsort(classes, kind="stable")
    starts = np.flatnonzero(np.diff(classes[order], prepend=-1))
    turn = np.empty(len(drawn), np.int64)  # the how-many-th of its class a clip is, in the order drawn
    turn[order] = np.arange(len(drawn)) - np.repeat(starts, np.diff(starts, append=len(drawn)))
    return drawn[np.argsort(turn, kind="stable")][:count].tolist()


# --- their media --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """The media dataset that clips are played from."""

    index: Index

    @property
    def sample_rate_hz(self) -> int:
        """Of the clips' sound."""
        return self.index.info.spec.get("encode", {}).get("audio_rate_hz", 44100)

    def mp4(self, key: str) -> bytes:
        """A clip's file. ValueError where there is none."""
        return self.index.bytes(self.index.row(key), "mp4")

    def sound(self, mp4: bytes) -> Float32[np.ndarray, "channels samples"]:
        """A clip's sound. MediaError where it cannot be decoded."""
        return call(partial(decode_audio, sample_rate_hz=self.sample_rate_hz), mp4, limits=LIMITS)


def source_of(index: Index, media: str | None) -> tuple[Source | None, str]:
    """The media dataset of a dataset's clips: itself, the one that is given, or for features one beside it that they were made of; and what to say.

    ValueError where the given one is not the one that the features were made of.
    """
    if index.info.kind == "media":
        return Source(index), ""
    wanted = index.info.spec.get("media_fingerprint")
    if media is not None:
        given = Index.open(media, kind="media")
        if wanted is not None and given.info.fingerprint != wanted:
            raise ValueError(
                f"media={media} has fingerprint {given.info.fingerprint[:12]}; these features were made of the media dataset {wanted[:12]}"
            )
        return Source(given), f"Clips are played from the media dataset {media}."
    for place in _beside(index):
        if wanted is not None and storage.is_file(storage.join(place, INFO)):
            info = read_info(place)
            if info.kind == "media" and info.view is None and info.fingerprint == wanted:
                return Source(Index.open(place)), f"Clips are played from the media dataset beside this one, {place}."
    return None, "The media dataset that these features were made of is not beside this one; media=DATASET plays the clips from it."


def _beside(index: Index) -> Iterable[str]:
    """Where the media dataset may be: beside the features, under the name that `prepare` gives it, else any."""
    folder = storage.parent(storage.absolute(index.root))
    yield storage.join(folder, "media")
    if not storage.is_remote(folder):
        yield from sorted(entry.path for entry in os.scandir(folder) if entry.is_dir())


def gallery(index: Index, source: Source | None, rows: Sequence[int], scores: Sequence[ScoreFacts], *, clip_bytes: int) -> list[ShownClip]:
    """The clips of these rows, in this order; a video that takes more than `clip_bytes` is encoded anew, smaller."""
    facts = _good(index).take(pa.array(rows, pa.int64())).to_pylist()
    with ThreadPoolExecutor(_threads()) as pool:
        return list(pool.map(partial(_shown, index, source, scores, clip_bytes), rows, facts))


def _shown(index: Index, source: Source | None, scores: Sequence[ScoreFacts], clip_bytes: int, row: int, facts: dict) -> ShownClip:
    notes: list[str] = []
    mp4 = sound = None
    if source is not None:
        try:
            stored = source.mp4(facts["key"])
            sound = Sound(source.sound(stored).mean(axis=0), source.sample_rate_hz, ())
            mp4 = _fitting(stored, clip_bytes, notes)
        except (MediaError, StorageError, ValueError) as error:
            notes.append(f"Not played: {error}")
    codes = similarity = None
    try:
        codes, similarity = codes_of(index, row), similarity_of(index, row)
    except (StorageError, ValueError) as error:
        notes.append(f"What is stored cannot be read: {error}")
    known = tuple((score.name, _score_text(score, float(score.values[row]))) for score in scores if np.isfinite(score.values[row]))
    seconds = facts["duration_seconds"] or (len(sound.wave) / sound.sample_rate_hz if sound else 0) or 1.0
    return ShownClip(facts["key"], facts["label"], facts["split"], float(seconds), known, mp4, sound, codes, similarity, tuple(notes))


def _fitting(mp4: bytes, clip_bytes: int, notes: list[str]) -> bytes | None:
    if len(mp4) <= clip_bytes:
        return mp4
    small = call(partial(reencode, config=SMALL), mp4, limits=LIMITS).mp4
    if len(small) <= clip_bytes:
        notes.append(f"The stored clip has {size_text(len(mp4))}; for this page it was encoded anew with {size_text(len(small))}.")
        return small
    notes.append(
        f"Not played: it has {size_text(len(mp4))}, and {size_text(len(small))} when encoded smaller; html_mb allows {size_text(clip_bytes)}."
    )
    return None


def _score_text(score: ScoreFacts, value: float) -> str:
    return ("yes" if value else "no") if score.is_flag else score_text(value)


# --- loudness -----------------------------------------------------------------------------------------------------------------------------


def loudness(source: Source, keys: Sequence[str]) -> tuple[Float[np.ndarray, "known"], str]:
    """ITU-R BS.1770-4 loudness of clips, in LUFS, and what to say: of how many, and what could not be measured."""
    with ThreadPoolExecutor(_threads()) as pool:
        found = list(pool.map(partial(_loudness, source), keys))
    known = [value for value in found if isinstance(value, float)]
    note = f"measured on {len(known):,} clips, a random sample"
    for what, count in (("silent", found.count("silent")), ("not readable", found.count("unreadable"))):
        note += f"; {count:,} {what}" if count else ""
    return np.array(known, np.float64), note


def _loudness(source: Source, key: str) -> float | str:
    # Imports torch, which nothing else here needs.
    from pipeline.normalise import LoudnessMeter

    try:
        wave = source.sound(source.mp4(key))
    except (MediaError, StorageError, ValueError):
        return "unreadable"
    meter = LoudnessMeter(source.sample_rate_hz, wave.shape[0])
    meter.add(wave)
    measured = meter.lkfs()
    return "silent" if measured is None else measured


def _threads() -> int:
    return min(4, os.cpu_count() or 1)


# --- what is stored ---------------------------------------------------------------------------------------------------------------------------


def codes_of(index: Index, row: int) -> Codes | None:
    """The codec's codes of a clip; None where there are none."""
    codec = index.info.spec.get("codec")
    codes = _array(index, row, f"{codec['name']}.npy") if codec else None
    if codec is None or codes is None or not codes.size:
        return None
    return Codes(codes, codec["card"], codec["name"], codes.shape[1] * codec["hop_samples"] / codec["sample_rate_hz"])


def similarity_of(index: Index, row: int) -> Similarity | None:
    """Cosines of a clip's segments of pictures with those of sound, in the first view. None where not both are stored, or they cannot be compared.

    A segment's embedding is the mean of its tokens, as Segment AVCLIP is trained (`model.avclip`): nothing but what is stored is needed.
    """
    spec, visual, audio = index.info.spec, _array(index, row, VISUAL), _array(index, row, AUDIO)
    if visual is None or audio is None or not len(visual[0]) or not len(audio[0]) or visual.shape[-1] != audio.shape[-1]:
        return None
    shown, listened = (_unit(tokens[0].astype(np.float32).mean(axis=1)) for tokens in (visual, audio))
    hops = spec["hop_frames"] / FRAME_RATE_HZ, spec["audio"]["hop_samples"] / SYNCHFORMER_RATE_HZ
    return Similarity(shown @ listened.T, *hops, float(SEGMENT_SECONDS))


def similarity_note(index: Index) -> str:
    """What one should know about the matrices; nothing where there are none."""
    if VISUAL not in index.members or AUDIO not in index.members:
        return ""
    spec = index.info.spec
    pictures, sound = spec["tower"]["weights_sha256"], spec["audio"]["tower"]["weights_sha256"]
    note = (
        f"The matrix compares segments of {SEGMENT_FRAMES} frames: the cosine of the means of their stored tokens, as Segment AVCLIP is trained; "
        "colours are spread over what occurs in the clip."
    )
    if pictures != sound:
        note += f" The towers' weights are not from one file ({pictures[:8]}, {sound[:8]}): unless they were trained together it says nothing."
    return note


def _array(index: Index, row: int, extension: str) -> np.ndarray | None:
    members = index.members.get(extension)
    return index.member(row, extension) if members is not None and members.offset[row] >= 0 else None


def _unit(vectors: Float32[np.ndarray, "segments width"]) -> Float32[np.ndarray, "segments width"]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def _good(index: Index) -> pa.Table:
    """The rows of the good clips, in the index's order."""
    return index.table.filter(pc.field("status") == "ok")
