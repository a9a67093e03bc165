"""Files by path: the same behaviour on a local file system and on a real object store, also through one that misbehaves."""

import fcntl
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from configs import storage
from configs.load import job_main, load
from configs.storage import StorageError
from model.weights import load_state, resolve, save_state, sha256_file
from pipeline.synth import SynthConfig
from tests.s3 import KEYS, LISTING_KEYS, Faults

SMALL, LARGE = b"0123456789", os.urandom(1 << 20) * 19  # more than two parts


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    """A place of either kind, with nothing in it."""
    return str(tmp_path / "there") if request.param == "local" else request.getfixturevalue("s3").url


# --- paths ----------------------------------------------------------------------------------------------------------------------------


def test_paths_of_both_kinds():
    assert [storage.is_remote(path) for path in ("s3://b/x", "gs://b", "az://b/x/", "/b/x", "x", "", Path("x"), "a:b", "./s3://b")] == [True] * 3 + [
        False
    ] * 6
    assert storage.is_remote(Path("s3://bucket/x")) and storage.join(Path("s3://bucket/x"), "y") == "s3://bucket/x/y"
    assert storage.join("s3://bucket/x/", "y", "z.tar") == "s3://bucket/x/y/z.tar" and storage.join("a", "b") == "a/b"
    assert [storage.basename(path) for path in ("s3://bucket/x/y.tar", "s3://bucket/", "/a/b/", "c")] == ["y.tar", "bucket", "b", "c"]
    assert [storage.parent(path) for path in ("s3://bucket/x/y.tar", "s3://bucket/x", "s3://bucket", "/a/b/", "/a", "c")] == [
        "s3://bucket/x",
        "s3://bucket",
        "s3://bucket",
        "/a",
        "/",
        ".",
    ]
    for path in ("ftp://host/x", "s3://", "http://host/x", "s3:///x"):
        with pytest.raises(ValueError, match="expected a local path or s3://"):
            storage.is_remote(path)


# --- the same everywhere --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", SMALL, LARGE], ids=["empty", "small", "large"])
def test_what_is_written_is_read(root, data):
    path = storage.join(root, "a", "b.bin")
    storage.write_bytes(path, data)
    assert storage.read_bytes(path) == data and storage.is_file(path)
    found = storage.stat(path)
    assert found is not None and (found.path, found.size) == (path, len(data))


def test_ranges_are_slices(root):
    path = f"{root}/x"
    storage.write_bytes(path, SMALL)
    for start, end in [(None, None), (0, 3), (3, 7), (3, None), (None, 4), (7, 99), (10, 12), (55, 56), (4, 4), (10, None)]:
        assert storage.read_bytes(path, start, end) == SMALL[start:end]


def test_what_is_not_there(root):
    assert storage.stat(f"{root}/no") is None and not storage.is_file(f"{root}/no") and not storage.is_folder(f"{root}/no")
    assert storage.names(f"{root}/no") == []
    storage.write_bytes(f"{root}/was", SMALL)
    storage.remove(f"{root}/was")
    assert storage.names(root) == list(storage.scan(root)) == [] and (not storage.is_remote(root) or not storage.is_folder(root))
    storage.remove(f"{root}/no")
    for path in (f"{root}/no", f"{root}/no/deeper"):
        with pytest.raises(FileNotFoundError, match="no"):
            storage.read_bytes(path)
        with pytest.raises(FileNotFoundError, match="no"):
            storage.read_bytes(path, 3, 5)


@pytest.mark.parametrize("name", ["plain.mp4", "a b.mp4", "ümläut-日本.mp4", "q?x=1&y=%20#z+~'\".mp4", "-_1s2.3.mp4"])
def test_names_that_need_quoting(root, name):
    path = storage.join(root, "sub", name)
    storage.write_bytes(path, SMALL)
    assert storage.read_bytes(path, 1, 4) == b"123" and storage.names(f"{root}/sub") == [name]
    assert [found.path for found in storage.scan(root)] == [path]
    storage.remove(path)
    assert storage.stat(path) is None


def test_folders_and_listings(root):
    for name in ("a", "b/c", "b/d/e", "b.x/f", "bb/g"):
        storage.write_bytes(f"{root}/{name}", name.encode())
    assert storage.names(root) == ["a"] and storage.names(f"{root}/b") == ["c"] and storage.names(f"{root}/b/") == ["c"]
    assert sorted(found.path for found in storage.scan(f"{root}/b")) == [f"{root}/b/c", f"{root}/b/d/e"]
    assert {found.path.removeprefix(f"{root}/"): found.size for found in storage.scan(root)} == {"a": 1, "b/c": 3, "b/d/e": 5, "b.x/f": 5, "bb/g": 4}
    assert all(storage.stat(found.path) == found for found in storage.scan(root))
    assert [storage.is_folder(f"{root}{name}") for name in ("", "/b", "/b/d", "/a", "/b/c", "/nothing")] == [True, True, True, False, False, False]
    assert [storage.is_file(f"{root}{name}") for name in ("/a", "/b", "")] == [True, False, False]


def test_a_version_changes_with_the_file(root):
    path = f"{root}/x"
    versions = set()
    for data in (b"one", b"two", LARGE):
        storage.write_bytes(path, data)
        found = storage.stat(path)
        assert found is not None and found == storage.stat(path)
        versions.add(found.version)
    assert len(versions) == 3 and {version.partition(":")[0] for version in versions} == {"etag" if storage.is_remote(root) else "mtime"}


def test_writing_is_all_or_nothing(root):
    path = f"{root}/file"
    with pytest.raises(TypeError), storage.writing(path) as file:
        file.writelines([b"half of it", "not bytes"])  # type: ignore[list-item] - the error that interrupts the writing
    assert storage.names(root) == []
    storage.write_bytes(path, b"old")
    with pytest.raises(ZeroDivisionError), storage.writing(path) as file:
        file.write(bytes(1 // 0))
    assert storage.read_bytes(path) == b"old" and storage.names(root) == ["file"]
    with storage.writing(path) as file:
        file.write(b"new")
        assert storage.read_bytes(path) == b"old"
    assert storage.read_bytes(path) == b"new" and storage.names(root) == ["file"]


# --- local ----------------------------------------------------------------------------------------------------------------------------


def test_what_killed_writers_left_is_removed_and_what_living_ones_write_is_not(tmp_path):
    path, living = tmp_path / "file", tmp_path / ".file.bbbbbbbbbbbb.tmp"
    for name in (".file.aaaaaaaaaaaa.tmp", ".file2.aaaaaaaaaaaa.tmp", ".file.bbbbbbbbbbbb.tmp", ".notes.tmp"):
        (tmp_path / name).write_bytes(b"left")
    with living.open("rb") as file, storage.writing(path):
        fcntl.flock(file, fcntl.LOCK_EX)
        storage.remove_stale(path)
        assert len(list(tmp_path.glob(".file.*.tmp"))) == 2 and (tmp_path / ".file2.aaaaaaaaaaaa.tmp").exists()
        storage.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".file.bbbbbbbbbbbb.tmp", ".notes.tmp", "file"]
    storage.sweep(tmp_path)
    assert not living.exists()
    storage.sweep(tmp_path / "nowhere")


def test_local_listings_lose_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_bytes(b"1")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = {Path(stat.path).name: (stat.size, stat.version) for stat in storage.scan(tmp_path)}
    assert found == {"x": (1, f"mtime:{(tmp_path / 'folder' / 'x').stat().st_mtime_ns}"), "dangling": (0, "mtime:0")}
    with pytest.raises(FileNotFoundError):
        list(storage.scan(tmp_path / "nowhere"))
    assert storage.local_copy(tmp_path / "x") == tmp_path / "x"


# --- object storage -------------------------------------------------------------------------------------------------------------------


def test_a_local_copy_is_made_once_for_each_version(s3, tmp_path, flaky_s3):
    proxy = flaky_s3(Faults())
    path = f"{s3.url}/weights.safetensors"
    storage.write_bytes(path, LARGE)
    proxy.requests.clear()
    copies: list[Path] = []
    threads = [threading.Thread(target=lambda: copies.append(storage.local_copy(path, tmp_path / "c"))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(copies)) == 1 and copies[0].read_bytes() == LARGE and copies[0].name.endswith("-weights.safetensors")
    assert sum(method == "GET" for method, _ in proxy.requests) == 3  # 19 MB in ranges of 8, by one of the five
    storage.write_bytes(path, SMALL)
    assert storage.local_copy(path, tmp_path / "c").read_bytes() == SMALL and copies[0].read_bytes() == LARGE
    assert [p.name for p in (tmp_path / "c").iterdir() if p.name.endswith(".tmp")] == []
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        storage.local_copy(f"{s3.url}/nothing.pt")


def test_weights_and_configuration_may_be_in_object_storage(s3, tmp_path, monkeypatch):
    import torch

    monkeypatch.setenv("SOUNDSHARD_CACHE", str(tmp_path / "cache"))
    save_state(tmp_path / "w.safetensors", {"a": torch.arange(3.0)}, {"width": 3})
    storage.write_bytes(f"{s3.url}/w.safetensors", (tmp_path / "w.safetensors").read_bytes())
    assert sha256_file(f"{s3.url}/w.safetensors") == sha256_file(tmp_path / "w.safetensors") == sha256_file(resolve(f"{s3.url}/w.safetensors"))
    tensors, config = load_state(f"{s3.url}/w.safetensors")
    assert torch.equal(tensors["a"], torch.arange(3.0)) and config == {"width": 3}
    storage.write_bytes(f"{s3.url}/job.yaml", b"clips: 77\nout: here\n")
    assert load(SynthConfig, [f"config={s3.url}/job.yaml", "out=there"]) == SynthConfig(clips=77, out="there")


def test_a_job_says_what_is_wrong_with_its_storage(s3, monkeypatch, capsys):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    assert job_main(SynthConfig, lambda _: None, [f"config={s3.url}/job.yaml"], command="synth") == 1
    assert "soundshard synth: s3://tests: the secret key does not belong to the access key: correct AWS_ACCESS_KEY_ID" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "environment", "message"),
    [
        ("s3://no-such-bucket/x", {}, "s3://no-such-bucket: there is no such bucket: create it"),
        ("s3://tests/x", {"AWS_ACCESS_KEY_ID": "nobody"}, "does not know this access key: correct AWS_ACCESS_KEY_ID"),
        ("s3://tests/x", {"AWS_SECRET_ACCESS_KEY": "guessed"}, "the secret key does not belong to the access key"),
        ("s3://tests/x", {"AWS_SESSION_TOKEN": "old"}, "session token is not valid|does not know this access key|credentials"),
        ("az://tests/x", {}, "the account is not named: set AZURE_STORAGE_ACCOUNT_NAME"),
    ],
)
@pytest.mark.usefixtures("s3")
def test_what_waiting_does_not_cure_is_told_at_once(monkeypatch, url, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for operation in (
        storage.read_bytes,
        storage.stat,
        storage.is_folder,
        lambda path: storage.write_bytes(path, SMALL),
        lambda path: list(storage.scan(path)),
    ):
        began = time.monotonic()
        with pytest.raises(StorageError, match=message):
            operation(url)
        assert time.monotonic() - began < storage.RETRY_SECONDS / 4


def test_who_may_only_read_is_told_so(s3, monkeypatch):
    storage.write_bytes(f"{s3.url}/x", SMALL)
    for name, value in LISTING_KEYS.items():
        monkeypatch.setenv(name, value)
    assert storage.read_bytes(f"{s3.url}/x") == SMALL
    for operation in (lambda path: storage.write_bytes(path, b"other"), lambda path: storage.write_bytes(path, LARGE), storage.remove):
        with pytest.raises(StorageError, match=r"/x: the credentials do not allow this: .* The store said: .*AccessDenied"):
            operation(f"{s3.url}/x")
    assert storage.read_bytes(f"{s3.url}/x") == SMALL


def test_no_storage_at_all_is_waited_for_and_then_told(s3, monkeypatch, caplog):
    monkeypatch.setattr(storage, "RETRY_SECONDS", 1.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(StorageError, match=r"check that the store can be reached .*AWS_ENDPOINT_URL is http://127.0.0.1:9"),
    ):
        storage.read_bytes(f"{s3.url}/x")
    assert any("trying for" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    "faults",
    [
        Faults(error=1.0, seconds=2.5),
        Faults(cut_request=1.0, seconds=1.5),
        Faults(cut_response=1.0, seconds=1.5),
        Faults(lost_response=1.0, seconds=1.5),
        Faults(error=0.3, cut_request=0.1, cut_response=0.1, lost_response=0.1, seed=7),
    ],
    ids=["answers 5xx", "requests break off", "answers break off", "answers get lost", "now this now that"],
)
def test_storage_that_is_unwell_for_a_while(s3, flaky_s3, tmp_path, faults):
    proxy = flaky_s3(faults)
    storage.write_bytes(f"{s3.url}/large", LARGE)
    storage.write_bytes(f"{s3.url}/small", SMALL)
    proxy.began = None  # the trouble begins again, for reading
    assert storage.read_bytes(f"{s3.url}/large") == LARGE and storage.read_bytes(f"{s3.url}/small", 2, 5) == b"234"
    assert storage.local_copy(f"{s3.url}/large", tmp_path).read_bytes() == LARGE
    assert storage.names(s3.url) == ["large", "small"] and storage.is_folder(s3.url)
    storage.remove(f"{s3.url}/small")
    assert storage.stat(f"{s3.url}/small") is None and proxy.happened.total() >= 3
    # An upload in parts whose beginning was answered into the void cannot be known, so not aborted; it holds no parts.
    assert s3.unfinished_parts() == []


def test_a_failed_upload_is_aborted(s3, flaky_s3, monkeypatch):
    monkeypatch.setattr(storage, "RETRY_SECONDS", 1.0)
    before = s3.unfinished_uploads()
    proxy = flaky_s3(Faults(error=1.0, methods=("PUT",)))
    with pytest.raises(StorageError, match="SlowDown"):
        storage.write_bytes(f"{s3.url}/large", LARGE)
    assert {method for method, path in proxy.requests if "uploadId" in path} == {"PUT", "DELETE"}
    assert s3.unfinished_uploads() == before and storage.stat(f"{s3.url}/large") is None


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_bytes_that_change_on_the_way_are_noticed(s3, flaky_s3, data, caplog):
    proxy = flaky_s3(Faults(spoilt_request=1.0, most=2, methods=("PUT",)))
    storage.write_bytes(f"{s3.url}/x", data)
    assert storage.read_bytes(f"{s3.url}/x") == data
    assert proxy.happened == {"spoilt_request": 2} and "not what was sent; sending it again" in caplog.text
    proxy.faults = Faults(spoilt_request=1.0, methods=("PUT",))
    with pytest.raises(StorageError, match="held something else than was sent"):
        storage.write_bytes(f"{s3.url}/never", data)
    assert storage.stat(f"{s3.url}/never") is None


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_a_store_whose_etags_are_no_md5_is_read_back(s3, flaky_s3, data):
    proxy = flaky_s3(Faults())
    proxy.opaque_etags = True
    storage.write_bytes(f"{s3.url}/x", data)
    assert (
        sum(method == "GET" and path.endswith("/x") for method, path in proxy.requests) == (len(data) + storage.PART_BYTES - 1) // storage.PART_BYTES
    )
    assert storage.read_bytes(f"{s3.url}/x") == data


def test_a_fork_is_told(s3):
    storage.write_bytes(f"{s3.url}/x", SMALL)
    queue = multiprocessing.get_context("fork").SimpleQueue()

    def child() -> None:
        try:
            storage.stat(f"{s3.url}/x")
        except AssertionError as error:
            queue.put(str(error))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    assert process.exitcode == 0 and "use spawn" in queue.get()


SERVE = """
import sys, time
from tests.s3 import server
with server() as s3:
    print(s3.endpoint, flush=True)
    time.sleep(600)
"""


def test_the_server_ends_with_the_tests_that_are_killed(s3, tmp_path):
    del s3  # for its skip where there is no server
    environment = {**os.environ, **KEYS, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", SERVE], stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        process.send_signal(signal.SIGKILL)
        process.wait()
    servers = [pid for pid in os.listdir("/proc") if pid.isdigit() and str(tmp_path) in _command(pid)]
    for _ in range(100):
        servers = [pid for pid in servers if str(tmp_path) in _command(pid)]
        if not servers:
            break
        time.sleep(0.05)
    assert not servers


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""
