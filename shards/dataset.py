"""What a dataset is: `dataset.json` with its kind, spec and fingerprint.

Knows JSON and hashes. Knows nothing of tars, ledgers, models or media: a spec is whatever the writing job says decides the bytes.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256

from configs import storage

INFO = "dataset.json"
SCHEMA_VERSION = 1
"""Version of the format of `dataset.json` and the ledgers. A reader refuses another one."""
KINDS = ("media", "features")
ABSENT = "(absent)"


class DatasetMismatch(ValueError):  # noqa: N818 - says what is wrong, as ValueError does
    """Two datasets, or a dataset and what was asked for, that must not be mixed."""


def json_bytes(value: object) -> bytes:
    """Canonical JSON: sorted keys, no spaces, UTF-8, no NaN. The same value gives the same bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def fingerprint(spec: Mapping) -> str:
    """sha256 over the canonical JSON of what decides a dataset's bytes."""
    return sha256(json_bytes(spec)).hexdigest()


@dataclass(frozen=True)
class DatasetInfo:
    """The contents of `dataset.json`. `new_info` makes one with the fingerprint filled in."""

    kind: str
    """`media` or `features`."""
    schema_version: int
    spec: dict
    """What decides the bytes: sizes, rates, weights' sha256, versions of decoders and codecs."""
    fingerprint: str
    provenance: dict = field(default_factory=dict)
    """What is worth knowing but decides nothing: paths of weights, versions of tools. Never compared."""
    view: dict | None = None
    """Of a view (`shards.view`): `parent`, whose shards it shows, and `selection`, how they were chosen. None for what has shards of its own."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"dataset kind is {self.kind!r}; expected one of {', '.join(KINDS)}")
        expected = fingerprint(self.spec)
        if self.fingerprint != expected:
            raise ValueError(
                f"fingerprint {self.fingerprint[:12]} does not belong to the spec (that gives {expected[:12]}); was dataset.json edited?"
            )


def new_info(kind: str, spec: dict, provenance: dict | None = None) -> DatasetInfo:
    """A `DatasetInfo` of this version of the format, fingerprint included."""
    return DatasetInfo(kind=kind, schema_version=SCHEMA_VERSION, spec=spec, fingerprint=fingerprint(spec), provenance=provenance or {})


def read_info(root: str | os.PathLike) -> DatasetInfo:
    """The `dataset.json` of the dataset at `root`. ValueError if there is none, or if this version cannot read it."""
    path = storage.join(root, INFO)
    try:
        content = storage.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{root} is not a dataset: it has no {INFO}; expected a folder or prefix written by `soundshard prepare`, `reencode` or `featurise`"
        ) from None
    try:
        fields = json.loads(content)
        version = fields["schema_version"]
        if version != SCHEMA_VERSION:
            raise DatasetMismatch(f"{path} has schema version {version}; this soundshard reads version {SCHEMA_VERSION}: use the one that wrote it")
        return DatasetInfo(
            **{name: fields[name] for name in ("kind", "schema_version", "spec", "fingerprint", "provenance")}, view=fields.get("view")
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a dataset's description: {type(error).__name__}: {error}") from error


def create_or_check(root: str | os.PathLike, info: DatasetInfo) -> None:
    """Writes `dataset.json`, or checks that the one at `root` has the same kind and fingerprint. DatasetMismatch names every field that differs."""
    path = storage.join(root, INFO)
    if storage.is_file(path):
        there = read_info(root)
        if there.view != info.view:
            raise DatasetMismatch(f"{root} is {_what(there)}, and {_what(info)} was to be written there; write to another folder")
        differing = differences(there, info)
        if differing:
            raise DatasetMismatch(
                f"{root} holds a dataset made otherwise; to continue it use its values, or write to another folder:\n"
                + "\n".join(f"  {name}: {there!r} there, {here!r} here" for name, there, here in differing)
            )
        return
    storage.write_bytes(path, info_bytes(info))


def _what(info: DatasetInfo) -> str:
    return f"a {info.kind} dataset" if info.view is None else f"a view of {info.view['parent']}"


def info_bytes(info: DatasetInfo) -> bytes:
    """The file `dataset.json`. Its `sha256` is over the canonical JSON of its other fields, so that `soundshard verify` can tell any change of it."""
    fields = asdict(info)
    if info.view is None:
        del fields["view"]
    fields["sha256"] = sha256(json_bytes(fields)).hexdigest()
    return json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def differences(there: DatasetInfo, here: DatasetInfo) -> list[tuple[str, object, object]]:
    """What differs in kind and spec, as (dotted name, value there, value here); provenance is not compared."""
    left, right = (dict(leaves(json.loads(json_bytes({"kind": info.kind, "spec": info.spec})))) for info in (there, here))
    return [
        (name, left.get(name, ABSENT), right.get(name, ABSENT))
        for name in sorted({*left, *right})
        if left.get(name, ABSENT) != right.get(name, ABSENT)
    ]


def leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """(dotted name, value) of everything in nested dicts."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value
