"""Weights as files: reading them without trusting them, writing them reproducibly, and fetching the published ones.

A published checkpoint is a pickle, and unpickling runs what the file says. Here a file's tensors and plain containers are taken, every
other object becomes an inert placeholder, and nothing from the file is ever imported or called; a file that names what could load or run code
is refused. Our own files are safetensors with the network's configuration in the metadata. This module knows names, bytes and addresses; which
network a file belongs to is its loader's matter.
"""

import _compat_pickle
import fcntl
import hashlib
import http.client
import json
import mmap
import pickle
import re
import struct
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import safetensors
import torch
from torch import Tensor, nn
from tqdm import tqdm

from configs import storage
from configs.load import JobError, job_main

# --- reading --------------------------------------------------------------------------------------------------------------------------


DAMAGED = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    LookupError,
    EOFError,
    TypeError,
    AttributeError,
    RuntimeError,
    ValueError,
    ArithmeticError,
    struct.error,
)
"""What reading a file that is not a checkpoint, or half of one, can raise."""


def load_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors by name, and the configuration that the file carries (None for other people's files).

    Reads .safetensors, and what torch.save writes since torch 1.6 (.pt, .pth, .ckpt, .th): the file's own dict of tensors, or the one
    under `state_dict` or `model`, less DistributedDataParallel's `module.` prefix. The tensors of the latter are mapped from the file:
    leave it in place while they live. A file in an object store is copied to the cache folder first. Raises ValueError for anything else.
    """
    path = storage.local_copy(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    return _tensors_of(read_checkpoint(path).root, path), None


@dataclass(frozen=True)
class Checkpoint:
    """What is in a file that torch.save wrote."""

    root: Any
    """The file's object: tensors, plain containers and values, and a `Placeholder` for every object of another class."""
    skipped: Counter[str]
    """Classes and functions that the file names and that were not used, with the number of objects that placeholders stand for."""
    release: Callable[[], None]
    """Lets go of the memory that the file's tensors were read into; what is used again is read again. The tensors must not have been changed."""

    @property
    def skipped_text(self) -> str:
        """`skipped` in words, the most frequent first; empty if everything was used."""
        return ", ".join(f"{name} ({count})" if count else name for name, count in self.skipped.most_common())


def read_checkpoint(path: Path) -> Checkpoint:
    """The object in a file of torch.save, of which nothing is run. The tensors are mapped from the file: leave it in place while they live.

    Raises ValueError if it is no such file, is damaged, or names what could load or run code.
    """
    try:
        return _unpickle(path)
    except RefusedError as error:
        raise ValueError(
            f"{path}: refused. Its pickle names {error}, which loads or runs code and which no weights need. Nothing of the file was run or kept; "
            "get the file from its publisher"
        ) from error
    except DAMAGED as error:
        raise ValueError(
            f"{path}: not a weights file of torch 1.6 or later, or damaged ({told(path)}; {type(error).__name__}: {error}); get the file again"
        ) from error


def told(path: Path) -> str:
    """What a file is, as far as its size and first bytes tell, for a message."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "it is empty"
    text = start.lstrip().lower()
    kinds = {
        "a zip file, as torch.save writes": start[:4] == b"PK\x03\x04",
        "gzip-compressed": start[:2] == b"\x1f\x8b",
        "a tar archive": start[257:262] == b"ustar",
        "a web page": text.startswith((b"<!doctype", b"<html", b"<?xml")),
        "safetensors": start[8:9] == b"{",
        "a bare pickle, as torch.save wrote before 1.6": start[:1] == b"\x80",
        "text": all(byte >= 32 or byte in b"\t\r\n" for byte in start),
    }
    return f"it has {size:,} bytes and is {next((kind for kind, is_it in kinds.items() if is_it), 'of no known kind')}"


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            config = (file.metadata() or {}).get("config")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or damaged ({error})") from error
    return tensors, None if config is None else json.loads(config)


def _tensors_of(root: Any, path: Path) -> dict[str, Tensor]:
    """The dict of tensors in a checkpoint's top level."""
    if isinstance(root, Mapping):
        inner = next((root[key] for key in ("state_dict", "model") if isinstance(root.get(key), Mapping)), root)
        tensors = {name: value for name, value in inner.items() if isinstance(name, str) and isinstance(value, Tensor)}
        if tensors:
            return {name.removeprefix("module."): t for name, t in tensors.items()} if all(n.startswith("module.") for n in tensors) else tensors
    raise ValueError(f"{path}: holds no dict of tensors at its top level, nor under `state_dict` or `model`")


class Placeholder:
    """Stands for an object of a class that is not ours to run. Keeps what the file puts into it as data, and does nothing with it."""

    named: ClassVar[str] = ""
    skipped: ClassVar[Counter[str]] = Counter()
    arguments: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *arguments: object, **_named: object) -> "Placeholder":
        name = cls.named.rpartition(".")[2]
        # A class begins with a capital. A function's name alone may be data, such as the choice of an activation.
        if not name.lstrip("_")[:1].isupper() and cls.named not in HARMLESS and not REBUILDS.fullmatch(name):
            raise RefusedError(cls.named)
        self = super().__new__(cls)
        self.arguments, self.state, self.items = arguments, None, []
        cls.skipped[cls.named] += 1
        return self

    def __init__(self, *_arguments: object, **_named: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        self.items.append((key, value))

    def __call__(self, *_arguments: object, **_named: object) -> "Placeholder":
        return self

    def append(self, item: object) -> None:
        self.items.append(item)

    def extend(self, items: Sequence[object]) -> None:
        self.items.extend(items)

    def add(self, item: object) -> None:
        self.items.append(item)

    def __hash__(self) -> int:
        return id(self)


STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class RefusedError(ValueError):
    """What a pickle names that could load or run code."""


_PATHS = ("Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath")
_BUILTINS = ("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set", "slice", "str", "tuple")
HARMLESS = {
    f"{module}.{name}"
    for module, names in {
        "_codecs": ("encode",),
        "_operator": ("getitem",),
        "argparse": ("Namespace",),
        "builtins": (*_BUILTINS, "type"),
        "collections": ("ChainMap", "Counter", "OrderedDict", "UserDict", "defaultdict", "deque"),
        "copyreg": ("__newobj__", "__newobj_ex__", "_reconstructor"),
        "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
        "decimal": ("Decimal",),
        "fractions": ("Fraction",),
        "operator": ("getitem",),
        "pathlib": _PATHS,
        "pathlib._local": _PATHS,
        "types": ("GenericAlias", "NoneType", "SimpleNamespace"),
        "typing": ("Any", "Callable", "Dict", "Iterable", "List", "Literal", "Mapping", "Optional", "Sequence", "Set", "Tuple", "Union"),
        "uuid": ("UUID",),
    }.items()
    for name in names
}
"""All that a file may name of Python's own library: data types and what puts them together. Most of them become placeholders all the same."""
REBUILDS = re.compile(r"_rebuild_\w+|_reconstruct|_unpickle_\w+|__pyx_unpickle_\w+|__\w+_ctor|_frombuffer|scalar|dtype|device")
"""The functions by which torch, numpy and compiled packages put their data together. A call of any other function is refused."""


class _RestrictedUnpickler(pickle.Unpickler):
    """Resolves a name in the file to one of our own few functions or types, or to a placeholder made for it; imports nothing."""

    def __init__(self, file: Any, storage: Callable[[torch.dtype, str, int], Tensor]) -> None:
        super().__init__(file)
        self._storage = storage
        self.skipped: Counter[str] = Counter()
        # Functions made for this file alone: a pickle can set attributes of the objects it is handed.
        self._allowed: dict[str, Any] = {
            "torch._utils._rebuild_tensor_v2": lambda flat, offset, size, stride, *_: flat.as_strided(size, stride, offset),
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
            "torch.Size": lambda sizes=(): tuple(sizes),
            "collections.OrderedDict": OrderedDict,
            "collections.defaultdict": lambda *_: {},
            "_codecs.encode": lambda text, *_: text.encode("latin1"),
            "builtins.set": lambda items=(): set(items),
        }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        # Names as Python 2 and the oldest protocols have them are those of Python 3 by other names.
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (_compat_pickle.IMPORT_MAPPING.get(module, module), name))
        named = f"{module}.{name}"
        if named in self._allowed:
            return self._allowed[named]
        if module.partition(".")[0] in sys.stdlib_module_names and named not in HARMLESS:
            raise RefusedError(named)
        if named not in HARMLESS:
            self.skipped[named] += 0  # told even if no object is made of it
        return type("Placeholder", (Placeholder,), {"named": named, "skipped": self.skipped})

    def persistent_load(self, pid: Any) -> Any:
        """A storage, as a flat tensor. `pid` is ("storage", dtype, record's name, device, count)."""
        _kind, dtype, key, _device, count = pid
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"a tensor of an unknown type ({dtype})")
        return self._storage(dtype, key, count)


def _unpickle(path: Path) -> Checkpoint:
    """The object that torch.save wrote: a zip of `data.pkl` and one uncompressed record per storage."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        names = {name.partition("/")[2]: archive.getinfo(name) for name in archive.namelist()}
        if "constants.pkl" in names:
            raise pickle.UnpicklingError("it is a TorchScript program; weights are expected")
        if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
            raise pickle.UnpicklingError("it was written on a big-endian machine")
        # A private mapping: pages are read when a tensor is used, so that an optimizer's state costs nothing.
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

        def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
            if count == 0:
                return torch.empty(0, dtype=dtype)
            record = names[f"data/{key}"]
            name_bytes, extra_bytes = struct.unpack_from("<HH", pages, record.header_offset + 26)
            start = record.header_offset + 30 + name_bytes + extra_bytes
            if record.compress_type != zipfile.ZIP_STORED or count * dtype.itemsize > record.file_size:
                raise pickle.UnpicklingError(f"record data/{key} is compressed or too short")
            return torch.frombuffer(pages, dtype=dtype, count=count, offset=start)

        with archive.open(names["data.pkl"]) as data:
            unpickler = _RestrictedUnpickler(data, storage)
            root = unpickler.load()

        def release() -> None:
            if hasattr(mmap, "MADV_DONTNEED"):
                pages.madvise(mmap.MADV_DONTNEED)

        return Checkpoint(root, unpickler.skipped, release)


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str | Path, assign: bool = False) -> None:
    """Copies tensors into a module; raises ValueError naming what is missing, unexpected or of another shape, and then copies nothing.

    `assign` makes the tensors themselves the module's, which may be without memory of its own (on the device `meta`).
    """
    own = module.state_dict()
    problems = {
        "missing": [name for name in own if name not in tensors],
        "unexpected": [name for name in tensors if name not in own],
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(t.shape)}"
            for name, t in own.items()
            if name in tensors and tensors[name].shape != t.shape
        ],
    }
    told = [f"{len(names)} {what} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" for what, names in problems.items() if names]
    if told:
        raise ValueError(f"{source} does not fit {type(module).__name__}: " + "; ".join(told))
    module.load_state_dict(tensors, assign=assign)


# --- writing --------------------------------------------------------------------------------------------------------------------------


DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Safetensors' names of types, in the order in which a file has them."""


def save_state(
    path: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, written: Callable[[int], None] = lambda _bytes: None
) -> None:
    """Writes tensors and a configuration (plain values) to a .safetensors file: all of it or nothing, the same bytes for the same input.

    One tensor at a time, so that tensors mapped from a file need not fit into memory together; `written` hears how many bytes each of them had.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: weights are written as .safetensors")
    # The bytes are those of the safetensors library, which wants all of them in memory twice.
    order = list(DTYPES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name.encode()))
    header: dict[str, Any] = {"__metadata__": {"config": json.dumps(config, sort_keys=True)}}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with storage.writing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().flatten()
            file.write(flat.view(torch.uint8).numpy().data)
            written(flat.nbytes)


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    return _digest(storage.local_copy(path), "sha256")


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


# --- published files ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Artifact:
    """A published file: where it is, what it should hash to (as many leading digits as were published) and what it is."""

    url: str
    file: str
    what: str
    md5: str = ""
    sha256: str = ""


PUBLISHED = "https://a3s.fi/swift/v1/AUTH_a235c0f452d648828f745589cde1219a"
SYNC_MODELS = f"{PUBLISHED}/sync/sync_models"
ENCODEC = "https://dl.fbaipublicfiles.com/encodec/v0"
KNOWN: dict[str, Artifact] = {
    "vaura": Artifact(
        f"{PUBLISHED}/v-aura_public/24-08-01T08-34-26.tar.gz",
        "vaura-24-08-01T08-34-26.tar.gz",
        "V-AURA, VGGSound: decoder, tower and codec; becomes a run folder",
    ),
    "avclip": Artifact(
        f"{SYNC_MODELS}/23-12-22T16-10-50/checkpoints/epoch_best.pt",
        "avclip-vggsound.pt",
        "Segment AVCLIP, VGGSound (V-AURA's features)",
        md5="a9979df",
    ),
    "avclip-audioset": Artifact(
        f"{SYNC_MODELS}/23-12-22T16-13-38/checkpoints/epoch_best.pt", "avclip-audioset.pt", "Segment AVCLIP, AudioSet", md5="4a566f2"
    ),
    "avclip-lrs3": Artifact(
        f"{SYNC_MODELS}/23-12-22T16-04-18/checkpoints/epoch_best.pt", "avclip-lrs3.pt", "Segment AVCLIP, LRS3 (speech)", md5="20b6e55"
    ),
    "sync": Artifact(
        f"{SYNC_MODELS}/24-01-04T16-39-21/24-01-04T16-39-21.pt",
        "sync-audioset.pt",
        "Synchformer with the offset head, AudioSet (the synchrony metric)",
        md5="54037d2",
    ),
    "sync-vggsound": Artifact(
        f"{SYNC_MODELS}/24-01-02T10-00-53/24-01-02T10-00-53.pt", "sync-vggsound.pt", "Synchformer with the offset head, VGGSound", md5="19592ed"
    ),
    "sync-lrs3": Artifact(
        f"{SYNC_MODELS}/23-12-23T18-33-57/23-12-23T18-33-57.pt", "sync-lrs3.pt", "Synchformer with the offset head, LRS3 (speech)", md5="4415276"
    ),
    "synchability": Artifact(
        f"{SYNC_MODELS}/24-01-22T20-34-52/24-01-22T20-34-52.pt", "synchability.pt", "Synchformer with the synchronisability head", md5="b1cb346"
    ),
    "synchformer-mmaudio": Artifact(
        "https://github.com/hkchengrex/MMAudio/releases/download/v0.1/synchformer_state_dict.pth",
        "synchformer-mmaudio.pth",
        "Synchformer as published again with MMAudio (both towers; 907 MB)",
        md5="5b2f5594b0730f70e41e549b7c94390c",
    ),
    "encodec24": Artifact(f"{ENCODEC}/encodec_24khz-d7cc33bc.th", "encodec_24khz-d7cc33bc.th", "EnCodec 24 kHz, mono", sha256="d7cc33bc"),
    "encodec48": Artifact(f"{ENCODEC}/encodec_48khz-7e698e3e.th", "encodec_48khz-7e698e3e.th", "EnCodec 48 kHz, stereo", sha256="7e698e3e"),
    "dac44": Artifact(
        "https://github.com/descriptinc/descript-audio-codec/releases/download/0.0.1/weights.pth",
        "dac_44khz_8kbps_0.0.1.pth",
        "DAC 44.1 kHz, mono, 9 codebooks (V-AURA's codec)",
    ),
}


def cache_dir() -> Path:
    """Where fetched weights live: $SOUNDSHARD_CACHE, or ~/.cache/soundshard."""
    return storage.cache_dir()


def known(name: str) -> Artifact:
    """The published artifact called `name`; ValueError with the names there are."""
    if name not in KNOWN:
        raise ValueError(f"there are no published weights called {name!r}; known are {', '.join(KNOWN)}")
    return KNOWN[name]


def resolve(name_or_path: str | Path) -> Path:
    """A weights file from its path, or a published one's name if it is in the cache. Downloads only what lies in an object store, into the cache."""
    if storage.is_remote(name_or_path):
        return storage.local_copy(name_or_path)
    path = Path(name_or_path)
    if path.is_file():
        return path
    if str(name_or_path) not in KNOWN:
        raise ValueError(f"{name_or_path}: neither a file nor one of the published weights ({', '.join(KNOWN)})")
    cached = cache_dir() / KNOWN[str(name_or_path)].file
    if not cached.is_file():
        raise FileNotFoundError(
            f"{name_or_path}: not in the cache; `soundshard weights get={name_or_path}` fetches it, "
            f"or put {KNOWN[str(name_or_path)].url} at {cached} by hand"
        )
    return cached


def fetch(name: str, *, url: str | None = None, retries: int = 3, progress: bool = True) -> Path:
    """The cached file of a published artifact, downloaded if it is not there: resumed where a download broke off, checked, then put in place.

    `url` is another address for the same bytes (a mirror). Raises ConnectionError if the address cannot be reached or keeps breaking off,
    ValueError if the bytes are not the published ones (they are then thrown away).
    """
    artifact = known(name)
    url, path = url or artifact.url, cache_dir() / artifact.file
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path.with_name(f"{path.name}.lock")):
        if path.is_file():
            return path
        part = path.with_name(f"{path.name}.part")
        by_hand = f"or put the file at {path} by hand"
        _download(url, part, label=name, by_hand=by_hand, retries=retries, progress=progress)
        for algorithm in ("md5", "sha256"):
            expected = getattr(artifact, algorithm)
            if expected and not (found := _digest(part, algorithm)).startswith(expected):
                part.unlink()
                raise ValueError(f"{url}: {algorithm} is {found}, published is {expected}...; threw the bytes away: try again, {by_hand}")
        part.replace(path)
    return path


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Several processes may want the same file: one downloads, the others wait and find it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(url: str, part: Path, *, label: str, by_hand: str, retries: int, progress: bool) -> None:
    """Bytes of `url` into `part`, going on from what is there. Gives up after `retries` tries in a row that brought nothing."""
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        trouble = ""
        try:
            if _download_once(url, part, label=label, progress=progress):
                return
            trouble = "the connection was cut"
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise ConnectionError(f"{url}: the server says {error.code} {error.reason}; {by_hand}") from error
            trouble = f"the server says {error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            trouble = str(getattr(error, "reason", None) or error or type(error).__name__)
        have = part.stat().st_size if part.exists() else 0
        failures = 0 if have > before else failures + 1
        if failures > retries:
            kept = f"the {have:,} bytes that came are kept and the same command goes on from there" if have else "try again with a network"
            raise ConnectionError(f"{url}: cannot be fetched ({trouble}); {kept}, {by_hand}")
        time.sleep(min(failures, 3))


def _download_once(url: str, part: Path, *, label: str, progress: bool) -> bool:
    """One request for what is missing of `part`; whether it is whole afterwards."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        # Nothing is missing, or the file there is another one now: then from the start.
        whole = error.headers.get("Content-Range", "").rpartition("/")[2] == str(have)
        if not whole:
            part.unlink()
        return whole
    with response:
        start = have if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        with (
            part.open("r+b" if start else "wb") as file,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=label, disable=not progress) as bar,
        ):
            file.seek(start)
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
            file.truncate()
            return total is None or file.tell() == total


# --- the job --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightsConfig:
    """Options of `soundshard weights`."""

    get: str = ""
    """Names of the published weights to fetch, with commas between them; without any, the job lists what there is."""
    url: str | None = None
    """Another address for the same bytes (a mirror); with a single name only."""
    file: str | None = None
    """With get=vaura: the experiment as published that is here already, and not to be fetched: its .tar.gz, its folder, or a .ckpt of it."""
    out: str | None = None
    """With get=vaura: the run folder to make; `vaura` in the cache folder if it is not given."""


def run(config: WeightsConfig) -> list[Path]:
    """Fetch published weights into the cache ($SOUNDSHARD_CACHE or ~/.cache/soundshard), or list what is published and what is there.

    V-AURA's checkpoint is made into a run folder for `soundshard generate run=FOLDER`.
    """
    names = [name.strip() for name in config.get.split(",") if name.strip()]
    if config.url and len(names) != 1:
        raise ValueError(f"url={config.url} is the address of one file; get= names {len(names)}")
    if (config.file or config.out) and names != ["vaura"]:
        raise ValueError("file= and out= are for the checkpoint that becomes a run folder: give them with get=vaura alone")
    try:
        paths = [_vaura(config) if name == "vaura" else fetch(name, url=config.url) for name in names]
    except ConnectionError as error:
        raise JobError(str(error)) from error
    for path in paths:
        print(path)
    if not names:
        for name, artifact in KNOWN.items():
            state = "cached" if (cache_dir() / artifact.file).is_file() else "not here"
            print(f"{name:20} {state:8}  {artifact.what}\n{'':30}{artifact.url}")
    return paths


def _vaura(config: WeightsConfig) -> Path:
    from model import released, run_folder  # they read files with this module, which knows no network

    out = cache_dir() / run_folder.RELEASED if config.out is None else storage.only_local(config.out, option="out")
    return released.install(out, lambda: fetch("vaura", url=config.url) if config.file is None else released.local_source(config.file))


def main(argv: Sequence[str] | None = None) -> int:
    """`soundshard weights [get=NAME,...]`; `get NAME` will do."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["get"]:
        del arguments[0]
    return job_main(WeightsConfig, run, arguments, command="weights", positional="get")


if __name__ == "__main__":
    raise SystemExit(main())
