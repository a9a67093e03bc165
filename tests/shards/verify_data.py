"""A small dataset of every kind of file that there is, and damage done to it at random."""

import random
from pathlib import Path

import numpy as np
import pyarrow as pa

from configs import storage
from shards import ledger
from shards.dataset import create_or_check, new_info
from shards.write import PLAN, Entry, json_bytes, write_manifest, write_shard

CODEC = {"name": "toy", "sample_rate_hz": 24000, "hop_samples": 320, "codebooks": 3, "card": 1024}
SPEC = {"hop_frames": 8, "views": 2, "codec": CODEC}


def good(number: int, split: str = "train", **arrays: np.ndarray) -> Entry:
    """A clip with features, codes and a record that agree."""
    rng = np.random.default_rng(number)
    segments, steps = 2 + number % 3, 7 + number
    avclip = rng.standard_normal((2, segments, 8, 5)).astype(np.float16)
    codes = rng.integers(0, 1024, (3, steps), dtype=np.uint16)
    key, label = f"-clip_{number}", None if number % 2 else "bell, church"
    described = {"key": key, "split": split, "label": label, "frames": 8 * (segments + 1), "segments": segments, "steps": steps}
    members = {"avclip.npy": avclip, "toy.npy": codes, "json": json_bytes(described)}
    members |= {name.replace("_npy", ".npy"): array for name, array in arrays.items()}
    return Entry(key, split, label, f"/videos/{number}.mp4", duration_seconds=8 * (segments + 1) / 25, members=members)


def bad(number: int, split: str = "train") -> Entry:
    """A clip that failed."""
    return Entry(f"bad_{number}", split, None, f"/videos/{number}.mp4", reason="truncated", message="ends at byte 17")


SHARDS = {
    "train-000000": [good(0), bad(1), good(2)],
    "train-000001": [good(3), good(4), good(5)],
    "train-000002": [bad(6)],
    "val-000000": [good(7, "val"), bad(8, "val")],
}


def make(root: str | Path) -> str:
    """The dataset, with its plan and manifest."""
    create_or_check(root, new_info("features", SPEC, {"weights": {"tower": "tower.pt"}}))
    for name, entries in SHARDS.items():
        write_shard(root, name, entries)
    write_plan(root)
    write_manifest(root)
    return str(root)


def write_plan(root: str | Path) -> None:
    """A plan with the columns that verifying looks at."""
    clips = [(name, entry) for name, entries in SHARDS.items() for entry in entries]
    columns = {name: [getattr(entry, name) for _, entry in clips] for name in ("key", "source", "split", "label")}
    table = pa.table({"shard": [name for name, _ in clips], **columns, "reason": [None] * len(clips), "message": [None] * len(clips)})
    table = table.cast(pa.schema([(name, pa.string()) for name in table.column_names]))
    with storage.writing(storage.join(root, PLAN)) as file, ledger.writer(file, table.schema, dictionary=["shard", "split"]) as writer:
        writer.write_table(table)


def files(root: str | Path) -> dict[str, bytes]:
    """All files by name."""
    return {name: storage.read_bytes(storage.join(root, name)) for name in storage.names(root)}


def write_files(root: str | Path, contents: dict[str, bytes]) -> None:
    """Makes a folder hold exactly these files."""
    Path(root).mkdir(parents=True, exist_ok=True)
    for path in Path(root).iterdir():
        if path.name not in contents:
            path.unlink()
    for name, data in contents.items():
        path = Path(root) / name
        if not path.is_file() or path.read_bytes() != data:
            path.write_bytes(data)


def damaged(contents: dict[str, bytes], rng: random.Random) -> tuple[str, dict[str, bytes]]:
    """The files after one random misfortune, and what it was; never the same as before."""
    while True:
        what, after = DAMAGE[rng.randrange(len(DAMAGE))](dict(contents), rng)
        if after != contents:
            return what, after


def _flip(contents: dict[str, bytes], rng: random.Random) -> tuple[str, dict[str, bytes]]:
    name = rng.choice(sorted(contents))
    data = bytearray(contents[name])
    places = [rng.randrange(len(data)) for _ in range(rng.choice([1, 1, 1, 2, 9]))]
    for place in places:
        data[place] ^= 1 << rng.randrange(8)
    return f"flip {name} {places}", contents | {name: bytes(data)}


def _truncate(contents: dict[str, bytes], rng: random.Random) -> tuple[str, dict[str, bytes]]:
    name = rng.choice(sorted(contents))
    size = rng.choice([0, rng.randrange(len(contents[name])), len(contents[name]) // 512 * 512, len(contents[name]) - 1])
    return f"truncate {name} to {size}", contents | {name: contents[name][:size]}


def _zero(contents: dict[str, bytes], rng: random.Random) -> tuple[str, dict[str, bytes]]:
    name = rng.choice(sorted(contents))
    data, count = bytearray(contents[name]), rng.choice([16, 512, 4096])
    start = rng.randrange(len(data)) // count * count
    data[start : start + count] = bytes(len(data[start : start + count]))
    return f"zero {count} of {name} at {start}", contents | {name: bytes(data)}


def _garbage(contents: dict[str, bytes], rng: random.Random) -> tuple[str, dict[str, bytes]]:
    name = rng.choice(sorted(contents))
    data, count = bytearray(contents[name]), rng.choice([4, 64, 700])
    start = rng.randrange(len(data))
    data[start : start + count] = rng.randbytes(len(data[start : start + count]))
    return f"garbage, {count} in {name} at {start}", contents | {name: bytes(data)}


def _append(contents: dict[str, bytes], rng: random.Random) -> tuple[str, dict[str, bytes]]:
    name = rng.choice(sorted(contents))
    more = rng.choice([bytes(512), b"\n", bytes(10240), rng.randbytes(100), contents[name]])
    return f"append {len(more)} to {name}", contents | {name: contents[name] + more}


def _insert(contents: dict[str, bytes], rng: random.Random) -> tuple[str, dict[str, bytes]]:
    name = rng.choice(sorted(contents))
    data, start = contents[name], rng.randrange(len(contents[name]))
    count = rng.choice([1, 512])
    after = data[:start] + data[start + count :] if rng.random() < 0.5 else data[:start] + bytes(count) + data[start:]
    return f"insert or remove {count} of {name} at {start}", contents | {name: after}


def _swap_members(contents: dict[str, bytes], rng: random.Random) -> tuple[str, dict[str, bytes]]:
    """Blocks of a tar exchanged with others: headers, payloads, whole members."""
    name = rng.choice([name for name in sorted(contents) if name.endswith(".tar")])
    blocks = [contents[name][start : start + 512] for start in range(0, len(contents[name]), 512)]
    count = rng.randint(1, max(1, min(4, len(blocks) // 2)))
    first, second = sorted(rng.sample(range(len(blocks) // count), 2)) if len(blocks) // count > 1 else (0, 0)
    one, two = slice(first * count, (first + 1) * count), slice(second * count, (second + 1) * count)
    blocks[one], blocks[two] = blocks[two], blocks[one]
    return f"swap {count} blocks of {name} at {first * count} and {second * count}", contents | {name: b"".join(blocks)}


def _swap_files(contents: dict[str, bytes], rng: random.Random) -> tuple[str, dict[str, bytes]]:
    ending = rng.choice([".tar", ".parquet"])
    one, two = rng.sample([name for name in sorted(contents) if name.endswith(ending)], 2)
    return f"swap {one} and {two}", contents | {one: contents[two], two: contents[one]}


def _remove(contents: dict[str, bytes], rng: random.Random) -> tuple[str, dict[str, bytes]]:
    name = rng.choice(sorted(contents))
    gone = {name, f"{name.rpartition('.')[0]}.parquet"} if name.endswith(".tar") and rng.random() < 0.3 else {name}
    return f"remove {sorted(gone)}", {other: data for other, data in contents.items() if other not in gone}


def _duplicate(contents: dict[str, bytes], rng: random.Random) -> tuple[str, dict[str, bytes]]:
    """A file, or a shard, under another's name or one of its own."""
    stem = rng.choice([name.removesuffix(".tar") for name in sorted(contents) if name.endswith(".tar")])
    to = rng.choice(["train-000007", "val-000001", *(name.removesuffix(".tar") for name in sorted(contents) if name.endswith(".tar"))])
    endings = rng.choice([(".tar",), (".parquet",), (".tar", ".parquet")])
    return f"copy {stem} to {to}, {endings}", contents | {f"{to}{ending}": contents[f"{stem}{ending}"] for ending in endings}


DAMAGE = [_flip, _flip, _flip, _truncate, _zero, _garbage, _append, _insert, _swap_members, _swap_files, _remove, _duplicate]
