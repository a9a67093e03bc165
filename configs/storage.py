"""Files by their path, on a local file system or in an object store: `s3://`, `gs://` and `az://` where a local path could stand.

Knows paths, bytes, and how a file appears whole or not at all. Knows nothing of datasets, formats or jobs.

Endpoint, region and credentials of an object store come from the environment, by the names that its own tools use. Uploads are checked: the store's
ETag is compared with the md5 (for uploads in parts: the md5 of the parts' md5s) of what was sent; where a store's ETags are something else, what it
holds is read back and compared. obstore's threads do not survive a fork: use this module from threads or spawned processes.
"""

import contextlib
import errno
import fcntl
import logging
import os
import posixpath
import random
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from hashlib import md5, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import obstore
import obstore.store
from obstore.exceptions import BaseError, GenericError

if TYPE_CHECKING:
    from obstore import Bytes, GetOptions, ObjectMeta
    from obstore.store import ObjectStore

AnyPath = str | os.PathLike
SCHEMES = ("s3", "gs", "az")
T = TypeVar("T")
PART_BYTES = 8 << 20
"""Of an upload in parts, and of a download in ranges. Stores take 10,000 parts: 80 GB."""
CONCURRENT_PARTS = 4
RETRY_SECONDS = 180.0
"""How long an operation is tried again while storage answers 5xx, drops connections or is silent."""
UPLOAD_TRIES = 5
"""Whole uploads that are begun again because what arrived differs from what was sent."""
ENVIRONMENT = ("AWS_", "GOOGLE_", "AZURE_")
log = logging.getLogger(__name__)


class StorageError(OSError):
    """Storage that failed after its retries, or that will not work as it is set up. Names the path, the cause and what to do."""


@dataclass(frozen=True, slots=True)
class Stat:
    """A file as a listing shows it."""

    path: str
    size: int
    version: str
    """Changes when the file does: `etag:...` for an object, `mtime:<nanoseconds>` for a local file."""


# --- paths ----------------------------------------------------------------------------------------------------------------------------


def is_remote(path: AnyPath) -> bool:
    """Whether a path is in an object store. ValueError for a kind of address that is neither that nor a local path."""
    return _split(path) is not None


def join(root: AnyPath, *names: str) -> str:
    """A path under `root`."""
    return posixpath.join(_text(root), *names)


def absolute(path: AnyPath) -> str:
    """A path that means the same in another working directory, such as a worker's: a local one made absolute."""
    return _text(path) if is_remote(path) else os.path.abspath(path)


def basename(path: AnyPath) -> str:
    """The last name of a path; the bucket's for a bucket."""
    return _text(path).rstrip("/").rpartition("/")[2]


def parent(path: AnyPath) -> str:
    """The folder or prefix that a path is in; a bucket's is itself."""
    text = _text(path)
    place = _split(text)
    if place is None:
        return os.path.dirname(text.rstrip("/") or "/") or "."
    scheme, bucket, key = place
    return f"{scheme}://{bucket}" + (f"/{key.rpartition('/')[0]}" if "/" in key else "")


def _text(path: AnyPath) -> str:
    """The path as text. pathlib turns the two slashes after a scheme into one; here they are two again."""
    return re.sub(rf"^({'|'.join(SCHEMES)}):/(?=[^/])", r"\1://", os.fspath(path))


def _split(path: AnyPath) -> tuple[str, str, str] | None:
    """(scheme, bucket, key) of a remote path; None for a local one."""
    text = _text(path)
    scheme, separator, rest = text.partition("://")
    if not separator or "/" in scheme:
        return None
    bucket, _, key = rest.partition("/")
    if scheme not in SCHEMES or not bucket:
        raise ValueError(f"{text!r} is no path that can be used; expected a local path or {', '.join(f'{s}://bucket/prefix' for s in SCHEMES)}")
    return scheme, bucket, "/".join(part for part in key.split("/") if part)


def _place(path: str) -> tuple[str, str, str]:
    """(scheme, bucket, key) of a path that is remote."""
    place = _split(path)
    assert place is not None
    return place


# --- looking --------------------------------------------------------------------------------------------------------------------------


def stat(path: AnyPath) -> Stat | None:
    """Size and version of a file; None if there is no such file."""
    text, place = _text(path), _split(path)
    if place is None:
        return _local_stat(text) if os.path.isfile(text) else None
    if not place[2]:
        return None
    try:
        return _remote_stat(text, _patiently(text, lambda: obstore.head(_store(text), place[2])))
    except FileNotFoundError:
        return None


def is_file(path: AnyPath) -> bool:
    """Whether there is a file or object at `path`."""
    return os.path.isfile(_text(path)) if _split(path) is None else stat(path) is not None


def is_folder(path: AnyPath) -> bool:
    """Whether `path` is a local folder, or a prefix with at least one object under it."""
    text, place = _text(path), _split(path)
    if place is None:
        return os.path.isdir(text)
    return _patiently(text, lambda: any(True for _ in _remote_scan(text, recursive=True)))


def scan(root: AnyPath, *, recursive: bool = True) -> Iterator[Stat]:
    """The files under a folder or prefix, in any order; nothing for a prefix without objects, an OSError for a local folder that cannot be listed.

    Links to local folders are not followed. A local link that leads nowhere is listed, with size 0 and version `mtime:0`.
    """
    text, place = _text(root), _split(root)
    if place is None:
        yield from _local_scan(text, recursive)
        return
    yield from _patiently(text, lambda: list(_remote_scan(text, recursive)))


def names(root: AnyPath) -> list[str]:
    """The names of the files directly in a folder or prefix, sorted; none if it does not exist."""
    if is_remote(root):
        return sorted(basename(found.path) for found in scan(root, recursive=False))
    try:
        return sorted(entry.name for entry in os.scandir(_text(root)) if not entry.is_dir())
    except FileNotFoundError:
        return []


def _local_stat(path: str) -> Stat:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return Stat(path, 0, "mtime:0")
    return Stat(path, found.st_size, f"mtime:{found.st_mtime_ns}")


def _remote_stat(path: str, found: "ObjectMeta") -> Stat:
    tag = found["e_tag"]
    return Stat(path, found["size"], f"modified:{found['last_modified'].isoformat()}" if tag is None else f"etag:{tag.strip(chr(34))}")


def _remote_scan(path: str, recursive: bool) -> Iterator[Stat]:
    scheme, bucket, prefix = _place(path)
    store, under = _store(path), prefix or None
    for page in obstore.list(store, under, chunk_size=1000) if recursive else [obstore.list_with_delimiter(store, under)["objects"]]:
        for found in page:
            if found["path"] == prefix:  # `prefix/`, with which some tools mark an empty folder
                continue
            yield _remote_stat(f"{scheme}://{bucket}/{found['path']}", found)


def _local_scan(folder: str, recursive: bool) -> Iterator[Stat]:
    for entry in os.scandir(folder):
        if not entry.is_dir():
            yield _local_stat(entry.path)
        elif recursive and not entry.is_symlink():
            yield from _local_scan(entry.path, recursive)


# --- reading --------------------------------------------------------------------------------------------------------------------------


def read_bytes(path: AnyPath, start: int | None = None, end: int | None = None) -> bytes:
    """The bytes [start, end) of a file, like a slice: fewer where the file ends before `end`. FileNotFoundError if there is no such file."""
    text, place, begin = _text(path), _split(path), start or 0
    assert begin >= 0 and (end is None or end >= begin), f"not a range: [{start}, {end})"
    if place is None:
        with open(text, "rb") as file:
            file.seek(begin)
            return file.read() if end is None else file.read(end - begin)
    if end == begin:
        return b""
    return bytes(_read(text, None if start is None and end is None else {"offset": begin} if end is None else (begin, end)))


def read_range(found: Stat, start: int, end: int, *, stop: threading.Event) -> memoryview:
    """The bytes [start, end) of an object as it was found, not copied; a StorageError if it was replaced since.

    While storage is unwell and tries are repeated, this ends soon after `stop` is set: for threads that read what may not be wanted any more.
    """
    data = _read(found.path, (start, end), _tag(found), stop)
    if len(data) != end - start:
        raise StorageError(f"{found.path} ends before byte {end}; it was replaced while it was read: run the job again")
    return memoryview(data)


def _tag(found: Stat) -> str | None:
    kind, _, tag = found.version.partition(":")
    return f'"{tag}"' if kind == "etag" else None


def _read(path: str, wanted: Any, tag: str | None = None, stop: threading.Event | None = None) -> "Bytes":
    """One GET. `tag`: the ETag that the object must still have. `stop`: what ends the tries."""
    options: GetOptions = {}
    if wanted is not None:
        options["range"] = wanted
    if tag is not None:
        options["if_match"] = tag

    def get() -> "Bytes":
        try:
            got = obstore.get(_store(path, patient=stop is None), _place(path)[2], options=options)
        except BaseError as error:
            if "416 Range Not Satisfiable" in str(error):  # the file ends before the range begins
                return obstore.Bytes()
            raise
        data, expected = got.bytes(), got.range[1] - got.range[0]
        if len(data) != expected:
            raise _BrokenOffError(f"storage sent {len(data)} of {expected} bytes")
        return data

    return _patiently(path, get, stop)


def local_copy(path: AnyPath, folder: AnyPath | None = None) -> Path:
    """A local file with these bytes: the path itself if it is local, else a copy in `folder` (default: `objects` in the cache folder).

    An object is downloaded once for each version of it, by one process at a time.
    """
    text = _text(path)
    if not is_remote(text):
        return Path(text)
    found = stat(text)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, "no such object", text)
    home = Path(folder) if folder is not None else cache_dir() / "objects"
    home.mkdir(parents=True, exist_ok=True)
    copy = home / f"{sha256(f'{text} {found.version}'.encode()).hexdigest()[:16]}-{basename(text)}"
    with open(home / f".{copy.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not copy.is_file():
            with writing(copy) as file:
                _download(found, file)
    return copy


def local_folder(path: AnyPath) -> Path:
    """A local folder with these files: the path itself if it is local, else a copy in the cache folder, of which each version has its own."""
    text = _text(path)
    if not is_remote(text):
        return Path(text)
    found = sorted(scan(text), key=lambda stat: stat.path)
    if not found:
        raise FileNotFoundError(errno.ENOENT, "no objects under this prefix", text)
    copy = cache_dir() / "folders" / sha256("\n".join(f"{stat.path} {stat.version}" for stat in found).encode()).hexdigest()[:16]
    for stat in found:
        place = copy / stat.path[len(text.rstrip("/")) + 1 :]
        if not place.is_file():
            with writing(place) as file:
                _download(stat, file)
    return copy


def only_local(path: AnyPath, *, option: str) -> Path:
    """The path, for what cannot live in an object store. Raises ValueError if it is remote."""
    if is_remote(path):
        raise ValueError(f"{option} is {_text(path)!r}; it must be a local folder, which is copied to object storage afterwards if it is to be there")
    return Path(path)


def cache_dir() -> Path:
    """Where what is fetched lives: $SOUNDSHARD_CACHE, or ~/.cache/soundshard."""
    return Path(os.environ.get("SOUNDSHARD_CACHE") or Path.home() / ".cache" / "soundshard")


def _download(found: Stat, file: BinaryIO) -> None:
    """An object's bytes by ranges, all of the version that `found` describes."""
    tag = _tag(found)
    ranges = [(start, min(start + PART_BYTES, found.size)) for start in range(0, found.size, PART_BYTES)]
    with ThreadPoolExecutor(CONCURRENT_PARTS) as pool:
        for first in range(0, len(ranges), CONCURRENT_PARTS):
            for data in pool.map(lambda wanted: _read(found.path, wanted, tag), ranges[first:][:CONCURRENT_PARTS]):
                file.write(data)
    if file.tell() != found.size:
        raise StorageError(f"{found.path}: read {file.tell()} of {found.size} bytes; it was replaced meanwhile: run the job again")


# --- writing --------------------------------------------------------------------------------------------------------------------------


def write_bytes(path: AnyPath, data: bytes | bytearray | memoryview) -> None:
    """Writes a file, which appears whole or not at all."""
    with writing(path) as file:
        file.write(data)


@contextlib.contextmanager
def writing(path: AnyPath) -> Iterator[BinaryIO]:
    """A file that appears at `path` whole or not at all, when the block ends without an exception; folders on the way to it are made.

    Locally: a temporary name in the same folder, fsync, rename. An exception removes the temporary file; a killed process leaves it, for
    `remove_stale` to find. Remotely: collected in a nameless local file (in $TMPDIR), uploaded in parts, checked.
    """
    text = _text(path)
    if is_remote(text):
        with tempfile.TemporaryFile() as file:
            yield file  # pyright: ignore[reportReturnType] - it is a BinaryIO, which the stubs say by another name
            _upload(text, file)  # pyright: ignore[reportArgumentType] - as above
        return
    os.makedirs(parent(text), exist_ok=True)
    temporary = join(parent(text), f".{basename(text)}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            _lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, text)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(parent(text))


def remove(path: AnyPath, *, durable: bool = True) -> None:
    """Removes a file; that it is not there is fine. `durable`: it stays removed after a power cut; without, `sync_folder` is for the caller to do."""
    text, place = _text(path), _split(path)
    if place is None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(text)
            if durable:
                sync_folder(parent(text))
        return
    with contextlib.suppress(FileNotFoundError):
        _patiently(text, lambda: obstore.delete(_store(text), place[2]))


def remove_stale(path: AnyPath) -> None:
    """Removes what killed writers of a local `path` left. A living writer holds a lock on its file, which is left alone."""
    _sweep(parent(path), re.escape(basename(path)))


def sweep(folder: AnyPath) -> None:
    """The same for all files that were being written directly in a local folder."""
    _sweep(_text(folder), ".+")


def _sweep(folder: str, name: str) -> None:
    if is_remote(folder) or not os.path.isdir(folder):
        return  # an object store shows nothing of an upload that did not end
    for entry in os.scandir(folder):
        if re.fullmatch(rf"\.{name}\.[0-9a-f]{{12}}\.tmp", entry.name):
            with contextlib.suppress(FileNotFoundError), open(entry.path, "r+b") as file:
                if _lock(file):
                    os.unlink(entry.path)


def _lock(file: BinaryIO) -> bool:
    """Takes the file's advisory lock, which ends with the process. False where another holds it, or where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def sync_folder(folder: AnyPath) -> None:
    """Makes renames and removals in a local folder survive a power cut. An object store needs no asking."""
    if is_remote(folder):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _upload(path: str, file: BinaryIO) -> None:
    """Puts a file's bytes at `path`; begun again where what arrived is not what was sent."""
    for _ in range(UPLOAD_TRIES):
        sent, arrived = _patiently(path, lambda: _send(path, file))
        if sent == arrived or _same(path, file):
            return
        log.warning("%s: what storage holds is not what was sent; sending it again", path)
    remove(path)
    raise StorageError(f"{path}: {UPLOAD_TRIES} times storage held something else than was sent; check the store and what lies between")


def _send(path: str, file: BinaryIO) -> tuple[str, str]:
    """One upload: the ETag that what was sent should have, and the one that it was given. obstore aborts an upload in parts that fails."""
    parts, key = _Parts(file), _place(path)[2]
    try:
        if file.seek(0, os.SEEK_END) <= PART_BYTES:
            put = obstore.put(_store(path), key, b"".join(parts), use_multipart=False)
        else:
            put = obstore.put(_store(path), key, parts, chunk_size=PART_BYTES, max_concurrency=CONCURRENT_PARTS)
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise
        raise _BrokenOffError(f"storage lost an unfinished upload: {_cause(error)}") from error
    return parts.tag(), (put["e_tag"] or "").strip('"')


class _Parts:
    """A file's parts, and the md5 of each as it goes by."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digests = file, []

    def __iter__(self) -> Iterator[bytes]:
        self._file.seek(0)
        while data := self._file.read(PART_BYTES):
            self._digests.append(md5(data, usedforsecurity=False).digest())
            yield data

    def tag(self) -> str:
        """The ETag that S3 gives what has gone by."""
        if len(self._digests) < 2:
            return (self._digests or [md5(b"", usedforsecurity=False).digest()])[0].hex()
        return f"{md5(b''.join(self._digests), usedforsecurity=False).hexdigest()}-{len(self._digests)}"


def _same(path: str, file: BinaryIO) -> bool:
    """Whether an object holds a file's bytes, by reading it back: for stores whose ETags are no md5 (Google's, Azure's, some encrypted buckets)."""
    found = stat(path)
    if found is None or found.size != file.seek(0, os.SEEK_END):
        return False
    file.seek(0)
    return all(_read(path, (start, start + PART_BYTES)) == file.read(PART_BYTES) for start in range(0, found.size, PART_BYTES))


# --- stores ---------------------------------------------------------------------------------------------------------------------------


_stores: dict[tuple, "ObjectStore"] = {}
_process = os.getpid()


def _store(path: str, *, patient: bool = True) -> "ObjectStore":
    """The store of a path's bucket: one for each bucket and environment in a process, tried out when it is made.

    One that is not patient tells its failures within seconds: who uses it tries again himself.
    """
    assert os.getpid() == _process or not _stores, (
        "object storage was used before this process was forked, which its threads did not survive; use spawn"
    )
    scheme, bucket, _ = _place(path)
    key = (scheme, bucket, patient, *sorted(item for item in os.environ.items() if item[0].startswith(ENVIRONMENT)))
    if key not in _stores:
        url = f"{scheme}://{bucket}"
        if patient:
            _try_out(url)
            _stores[key] = _connect(url, retries=100, seconds=RETRY_SECONDS, silence_seconds=60.0)
        else:
            _stores[key] = _connect(url, retries=2, seconds=5.0, silence_seconds=20.0)
    return _stores[key]


def _connect(url: str, *, retries: int, seconds: float, silence_seconds: float) -> "ObjectStore":
    try:
        return obstore.store.from_url(
            url,
            client_options={
                "allow_http": True,
                "connect_timeout": timedelta(seconds=5),
                "read_timeout": timedelta(seconds=silence_seconds),
                "timeout": timedelta(seconds=600),
            },
            retry_config={
                "max_retries": retries,
                "retry_timeout": timedelta(seconds=seconds),
                "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
            },
        )
    except BaseError as error:
        raise _failure(url, error) from error


def _try_out(url: str) -> None:
    """One short request, so that a wrong bucket or wrong credentials are told in seconds. Storage that is only unwell is left to the retries."""
    try:
        obstore.list(_connect(url, retries=3, seconds=5.0, silence_seconds=10.0), "soundshard-is-anyone-there").collect()
    except BaseError as error:
        if any(pattern in str(error) for pattern in ADVICE):
            raise _failure(url, error) from error
        if "AccessDenied" not in str(error):
            log.warning("%s; trying for %.0f minutes", _cause(error), RETRY_SECONDS / 60)


_AZURE = "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"
_KEYS = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, for temporary ones, AWS_SESSION_TOKEN"
ADVICE = {
    "NoSuchBucket": "there is no such bucket: create it, or correct its name (and AWS_ENDPOINT_URL, if it is in another store)",
    "ContainerNotFound": "there is no such container: create it, or correct its name and AZURE_STORAGE_ACCOUNT_NAME",
    "InvalidAccessKeyId": f"the store does not know this access key: correct {_KEYS}",
    "SignatureDoesNotMatch": f"the secret key does not belong to the access key: correct {_KEYS}",
    "ExpiredToken": f"the credentials have expired: renew {_KEYS}",
    "InvalidToken": f"the session token is not valid: renew {_KEYS}",
    "AuthorizationHeaderMalformed": "the region is wrong: set AWS_REGION to the bucket's",
    "incorrectly configured region": "the region is wrong: set AWS_REGION to the bucket's",
    "ETag Header missing": "the store gives no ETags, as S3 does; it cannot be used",
    "AuthenticationFailed": "the credentials are wrong: correct AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "Account must be specified": f"the account is not named: {_AZURE}",
    "169.254.169.254": "",
    "metadata.google.internal": "",
}
"""What to do, by what the store's answer holds: errors that waiting does not cure. Without credentials, a cloud's own server is asked for some."""
NO_CREDENTIALS = {
    "s3": f"set {_KEYS} (files in ~/.aws are not read), or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "set GOOGLE_SERVICE_ACCOUNT to the path of a service account's json key, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": _AZURE,
}


class _BrokenOffError(Exception):
    """What obstore takes for the end, or for an answer, and another try may do better."""


def _patiently(path: str, operation: Callable[[], T], stop: threading.Event | None = None) -> T:
    """What the operation returns, its errors as ours. obstore tries most requests again by itself, but not those whose answers break off.

    `stop`, once set, ends the tries.
    """
    deadline, pause = time.monotonic() + RETRY_SECONDS, 0.1
    while True:
        try:
            return operation()
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise _failure(path, error) from error
            raise FileNotFoundError(errno.ENOENT, "no such object", path) from error
        except (BaseError, _BrokenOffError) as error:
            if not _may_pass(error) or time.monotonic() > deadline or (stop is not None and stop.is_set()):
                raise _failure(path, error) from error
        (stop or threading.Event()).wait(pause * random.uniform(0.5, 1.5))
        pause = min(2 * pause, 5.0)


def _may_pass(error: BaseException) -> bool:
    """Whether waiting may cure it: anything but a clear refusal."""
    refused = re.search(r"status code: 4(?!08|29)\d\d|AccessDenied", str(error))
    return isinstance(error, (GenericError, _BrokenOffError)) and not refused and not any(pattern in str(error) for pattern in ADVICE)


def _failure(path: str, error: BaseException) -> StorageError:
    text = str(error)
    advice = next((advice for pattern, advice in ADVICE.items() if pattern in text), None)
    if advice == "":
        advice = f"there are no credentials: {NO_CREDENTIALS[path.partition('://')[0]]}"
    if advice is None and re.search("403 Forbidden|401 Unauthorized|AccessDenied", text):
        advice = "the credentials do not allow this: give them the right to read, write, list and delete there"
    if advice is None and "Precondition" in type(error).__name__:
        advice = "it was replaced while it was read: run the job again"
    advice = advice or f"check that the store can be reached and is well, then run the job again; what is finished is kept{_endpoint(path)}"
    return StorageError(f"{path}: {advice}. The store said: {_cause(error)}")


def _endpoint(path: str) -> str:
    if not path.startswith("s3://"):
        return ""
    given = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT")
    return f" (AWS_ENDPOINT_URL is {given})" if given else " (AWS_ENDPOINT_URL is not set)"


def _cause(error: BaseException) -> str:
    """The first line of obstore's message, and the store's own words where it sent any."""
    text = str(error).partition("\n\nDebug source")[0]
    said = re.search(r"<Code>(.*?)</Code>\s*<Message>(.*?)</Message>", text, re.DOTALL)
    return re.split(r"<\?xml|<Error>", text)[0].strip().rstrip(":") + (f" ({said[1]}: {said[2]})" if said else "")
