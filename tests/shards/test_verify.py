"""Verify finds whatever was done to a dataset, repair makes what it can prove, and neither touches what is good."""

import json
import random
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from configs import storage
from shards import check_dataset as checking
from shards import check_tar as reading
from shards import ledger, sealed, verify
from shards.check_dataset import check_dataset
from shards.check_files import Told, check_info
from shards.dataset import create_or_check, new_info
from shards.read import Index
from shards.repair import LOST_REASON, redo, repair
from shards.view import write_view
from shards.write import PLAN, Entry, json_bytes, npy_bytes, stored_entries, write_manifest, write_shard
from tests.s3 import Faults
from tests.shards.verify_data import CODEC, SHARDS, SPEC, damaged, files, good, make, write_files


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SOUNDSHARD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    return make(tmp_path / "set")


def told(root):
    return [problem.text() for problem in check_dataset(str(root)).told.problems]


def repaired(root):
    return repair(check_dataset(str(root)))


def change(root, name, function):
    path = storage.join(root, name)
    storage.write_bytes(path, function(storage.read_bytes(path)))


def flipped(at):
    def flip(data):
        return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]

    return flip


# --- what is found --------------------------------------------------------------------------------------------------------------------


def test_a_whole_dataset_has_no_problems(root, tmp_path, capsys):
    report = tmp_path / "report.json"
    assert verify.main([root, f"report={report}"]) == 0
    out = capsys.readouterr().out
    assert "4 shards, 6 good and 3 failed clips" in out and "all is as it was written" in out and "note" not in out
    found = json.loads(report.read_text())
    assert found["problems"] == found["redo"] == found["notes"] == found["repaired"] == [] and found["ok"] == 6 and found["bytes"] == 51200
    assert not list((tmp_path / "cache" / "verify").glob("*"))


def test_random_damage_is_found_and_nothing_crashes(root):
    """More of it: `python -m tests.benchmarks.corruptions`."""
    whole, rng = files(root), random.Random(11)
    equal = 0
    for number in range(72):
        what, broken = damaged(whole, rng)
        write_files(root, broken)
        verified = check_dataset(root, workers=2)
        assert verified.told.problems or PLAN not in broken, what
        if number % 4 == 0 and verified.told.problems:
            repair(verified)
            again, after = check_dataset(root, workers=2), files(root)
            assert again.told.problems or after == whole, what
            equal += after == whole
            # What was not damaged is not touched.
            assert all(after[name] == data for name, data in whole.items() if broken.get(name) == data and name != ledger.MANIFEST), what
    assert equal > 5


def test_every_byte_of_a_ledger_is_protected(root):
    data = storage.read_bytes(ledger.path_of(root, "train-000000"))
    assert sealed.check(data) and len(sealed.rows(data)) == 3
    for at in range(len(data)):
        with pytest.raises(sealed.Damaged):
            sealed.check(flipped(at)(data))
    for size in range(0, len(data), 7):
        with pytest.raises(sealed.Damaged):
            sealed.rows(data[:size]) if not sealed.check(data[:size]) else None


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("train-000001.tar", lambda data: data[:7000], r"train-000001\.tar: its sha256 is .*; it has 7000 bytes, and 20480 were written"),
        ("train-000001.tar", lambda data: data[:-512], r"it ends with \d+ zeros behind its last member, at byte \d+; \d+ were written"),
        ("train-000001.tar", flipped(3), r"at byte 0 is no header of a member \(bad checksum\)"),
        ("train-000001.tar", flipped(512 + 3), r"-clip_3: its avclip\.npy is no npy array"),
        ("train-000001.tar", flipped(512 + 128 + 5), r"its sha256 is \w{12}, and its ledger has \w{12}$"),
        ("train-000001.tar", lambda data: data + bytes(512), r"it ends with \d+ zeros"),
        ("train-000001.parquet", flipped(900), r"the hash over its bytes is another"),
        ("train-000001.parquet", lambda data: data[:-1], r"train-000001\.parquet: .*the hash"),
        ("plan.parquet", flipped(200), r"plan\.parquet: .*the hash over its bytes is another"),
        ("manifest.parquet", flipped(200), r"manifest\.parquet: .*the hash over its bytes is another"),
        ("dataset.json", lambda data: data.replace(b"tower.pt", b"tower.pr"), r"dataset\.json: .*not as it was written"),
        ("dataset.json", lambda data: data.replace(b'"card": 1024', b'"card": 1025'), r"dataset\.json: .*does not belong to the spec"),
        ("dataset.json", lambda data: data + b" ", r"dataset\.json: .*not as it was written"),
        ("dataset.json", lambda data: data[:40], r"dataset\.json: it cannot be read"),
    ],
)
def test_damage_is_told_where_it_is(root, name, how, message):
    change(root, name, how)
    text = "\n".join(told(root))
    assert re.search(message, text, re.MULTILINE), text
    assert name in text and all(other not in text for other in ("train-000000", "train-000002", "val-000000"))


def test_files_that_are_missing_or_too_many(root):
    whole = files(root)
    storage.remove(f"{root}/{ledger.MANIFEST}")
    assert told(root) == ["manifest.parquet: it is missing; it can be made of the ledgers"]
    storage.remove(f"{root}/train-000001.tar")
    storage.remove(f"{root}/val-000000.parquet")
    text = "\n".join(told(root))
    assert "train-000001.tar: it is missing, though its ledger is there" in text and "val-000000.tar: it has no ledger" in text
    write_files(root, {name: data for name, data in whole.items() if "train-000001" not in name})
    assert any("rows of 1 shards of which neither tar nor ledger is there: train-000001" in line for line in told(root))
    storage.remove(f"{root}/{ledger.MANIFEST}")
    assert any("1 of its 4 shards are not made: train-000001; run the job again" in line for line in told(root))
    write_files(root, whole | {"notes.txt": b"x", "no\udcff\x1b.bin": b"", ".train-000000.tar.0123456789ab.tmp": b"y"})
    verified = check_dataset(root)
    assert (
        not verified.told.problems
        and "no\\udcff?.bin" in verified.told.notes[1]
        and "notes.txt" in verified.told.notes[1]
        and "killed" in verified.told.notes[0]
    )
    write_files(root, {name: data for name, data in whole.items() if name != PLAN})
    verified = check_dataset(root)
    assert not verified.told.problems and "there is no plan.parquet" in verified.told.notes[0]


def test_copied_and_exchanged_shards(root):
    whole = files(root)
    copied = {f"train-000003.{ending}": whole[f"train-000000.{ending}"] for ending in ("tar", "parquet")}
    write_files(root, whole | copied)
    text = "\n".join(told(root))
    assert "train-000003.parquet: it is the ledger of train-000000, not of train-000003" in text and "it does not know 1 shards" in text
    write_files(root, whole | {"train-000000.tar": whole["train-000001.tar"], "train-000001.tar": whole["train-000000.tar"]})
    assert "train-000000.tar: it is the tar of train-000001" in told(root) and "train-000001.tar: it is the tar of train-000000" in told(root)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"avclip_npy": np.full((2, 2, 8, 5), np.nan, np.float16)}, "its avclip.npy holds what is no finite number"),
        ({"avclip_npy": np.full((2, 2, 8, 5), -np.inf, np.float32)}, "its avclip.npy holds what is no finite number"),
        ({"toy_npy": np.full((3, 7), 1024, np.uint16)}, "its toy.npy holds the code 1024; a codebook has 1024"),
        ({"toy_npy": np.full((3, 7), -1, np.int16)}, "its toy.npy holds codes below 0"),
        ({"toy_npy": np.zeros((4, 7), np.uint16)}, "its toy.npy is <u2 [4, 7]; the spec has 3 codebooks of whole numbers"),
        ({"toy_npy": np.zeros((3, 8), np.uint16)}, "its json has 7 steps; its toy.npy is [3, 8]"),
        ({"avclip_npy": np.zeros((2, 3, 8, 5), np.float16)}, "its json has 2 segments; its avclip.npy is [2, 3, 8, 5]"),
    ],
)
def test_what_was_written_wrong_is_found_though_all_hashes_are_right(tmp_path, members, message):
    create_or_check(tmp_path, new_info("features", SPEC))
    write_shard(tmp_path, "train-000000", [good(0, **members), good(1)])
    write_manifest(tmp_path)
    assert told(tmp_path) == [f"train-000000.tar: -clip_0: {message}"]


def test_records_agree_with_ledgers(tmp_path):
    create_or_check(tmp_path, new_info("features", SPEC))
    entry, other = good(0), good(1)
    write_shard(tmp_path, "train-000000", [replace(entry, label="drum"), replace(other, members={**(other.members or {}), "json": b"[1"})])
    write_manifest(tmp_path)
    first, second = told(tmp_path)
    assert "-clip_1: its json cannot be read" in first and "-clip_0: its json has label 'bell, church'; its ledger has 'drum'" in second


def test_ledgers_that_cannot_be_true(root):
    """Rows changed by somebody whose file has a right hash."""
    path = ledger.path_of(root, "train-000001")
    rows = ledger.read(path).to_pylist()
    ours = new_info("features", SPEC).fingerprint
    for changes, message in [
        ({"key": "-clip_4"}, "its key is in the ledger twice"),
        ({"status": "fine"}, "its status is 'fine'"),
        ({"split": "val"}, "it has the split 'val'; the shard holds 'train'"),
        ({"json.offset": 1024}, "is said to lie at byte 1024"),
        ({"avclip.npy.shape": [9, 9, 8, 5]}, "too few for <f2"),
        ({"shard_sha256": "0" * 64}, "2 values of shard_sha256"),
        ({"duration_seconds": float("nan")}, "its duration is nan seconds"),
        ({"shard": "train-000009"}, "it is the ledger of train-00000"),
    ]:
        ledger.write(path, ledger.to_table([rows[0] | changes, *rows[1:]], ours))
        assert any(message in line for line in told(root)), (changes, told(root))
    ledger.write(path, ledger.to_table(rows, "f" * 64))
    assert any("belongs to a dataset with the fingerprint ffff" in line for line in told(root))
    pq.write_table(pa.table({"a": [1]}), path)
    assert any("it is no ledger: it has no column key" in line for line in told(root))
    for rows_now, message in [
        (rows[:2], "other clips than plan.parquet"),
        ([rows[0] | {"label": "x"}, *rows[1:]], "its rows of train-000001 are not"),
    ]:
        ledger.write(path, ledger.to_table(rows_now, ours))
        assert any(message in line for line in told(root))


def test_a_key_in_two_shards(root):
    write_shard(root, "val-000000", [good(7, "val"), replace(good(0, "val"), label="bell, church")])
    write_manifest(root)
    assert any("1 keys are good in more than one place: -clip_0" in line for line in told(root))


def test_files_of_older_versions_are_read_and_said_to_be_unprotected(root):
    """They have the same rows, and no hash."""
    for name in [name for name in files(root) if name.endswith(".parquet")]:
        path = f"{root}/{name}"
        file = pq.ParquetFile(path)
        table = pa.concat_tables([file.read_row_group(number) for number in range(file.num_row_groups)])
        pq.write_table(table.replace_schema_metadata(file.schema_arrow.metadata), path, compression="zstd", compression_level=3)
    write_manifest(root)  # the ledgers have other sizes now
    fields = json.loads(storage.read_bytes(f"{root}/dataset.json"))
    del fields["sha256"]
    storage.write_bytes(f"{root}/dataset.json", json.dumps(fields, indent=2, sort_keys=True).encode() + b"\n")
    verified = check_dataset(root)
    assert not verified.told.problems and len(Index.open(root)) == 6
    assert "provenance by nothing" in verified.told.notes[0] and "5 files were written before such files held a hash" in verified.told.notes[1]


def test_the_hash_is_the_writers_own(tmp_path):
    """The same rows give the same file; rows read from one file and written to another do not take its hash along; other readers do not mind."""
    table = ledger.to_table([{"key": "a", "json.offset": 512, "json.size": 2}, {"key": "é"}], "f" * 64)
    one, two = tmp_path / "one", tmp_path / "two"
    ledger.write(one, table)
    ledger.write(two, ledger.read(one))
    assert one.read_bytes() == bytes(ledger.content(table)) and sealed.check(two.read_bytes())
    assert pq.read_table(two).select(["key"]).to_pylist() == [{"key": "a"}, {"key": "é"}]
    with pytest.raises(sealed.Damaged, match="hash that is kept in it is damaged"):
        sealed.check(one.read_bytes().replace(sealed.PREFIX, b"soundshard sha25x:"))


# --- what is put right ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("manifest.parquet", lambda data: data[:99]),
        ("train-000001.parquet", flipped(500)),
        ("train-000001.tar", flipped(3)),
        ("train-000001.tar", flipped(512 + 3)),
        ("train-000001.tar", lambda data: data[:-5000]),
        ("train-000001.tar", lambda data: data + b"more"),
        ("train-000002.tar", lambda data: data[:0]),
        ("dataset.json", lambda data: data + b"\n"),
        ("dataset.json", lambda data: flipped(data.index(b'"sha256": "') + 20)(data)),
    ],
)
def test_what_can_be_proven_is_made_again_to_the_byte(root, name, how):
    whole = files(root)
    change(root, name, how)
    assert len(repaired(root)) == 1 and files(root) == whole and not told(root)


def test_exchanged_files_are_put_back(root):
    whole = files(root)
    for ending in ("tar", "parquet"):
        names = [f"{name}.{ending}" for name in ("train-000000", "train-000001", "val-000000")]
        for lost in ((), (ledger.MANIFEST,)):
            turned = dict(zip(names, [whole[name] for name in (names[1], names[2], names[0])], strict=True))
            write_files(root, {name: data for name, data in (whole | turned).items() if name not in lost})
            assert repaired(root) and files(root) == whole


@pytest.mark.parametrize("cut_off_at", range(4))
def test_a_repair_that_is_cut_off_loses_nothing(root, monkeypatch, cut_off_at):
    whole = files(root)
    write_files(root, whole | {"train-000000.tar": whole["train-000001.tar"], "train-000001.tar": whole["train-000000.tar"]})
    writing, begun = storage.writing, []

    def broken(path):
        begun.append(path)
        if len(begun) > cut_off_at:
            raise OSError(28, "No space left on device")
        return writing(path)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "writing", broken)
        with pytest.raises(OSError, match="No space"):
            repaired(root)
    assert repaired(root) and files(root) == whole


def test_a_ledger_from_its_tar_and_the_plan(root):
    """Without the manifest, whose rows are the ledger's: everything comes back but why clips failed."""
    whole = files(root)
    for name in ("train-000000", "train-000001"):
        write_files(root, {file: data for file, data in whole.items() if file not in (ledger.MANIFEST, f"{name}.parquet")})
        lines = repaired(root)
        assert "nothing is left that proves its bytes" in lines[0] and not told(root)
        failed = [entry for entry in SHARDS[name] if not entry.ok]
        assert (files(root) == whole) == (not failed)
        rows = ledger.read(ledger.path_of(root, name)).to_pylist()
        assert [(row["key"], row["status"], row["source"], row["label"]) for row in rows] == [
            (entry.key, "ok" if entry.ok else "failed", entry.source, entry.label) for entry in SHARDS[name]
        ]
        assert [row["reason"] for row in rows if row["status"] == "failed"] == [LOST_REASON] * len(failed)
    write_files(root, {file: data for file, data in whole.items() if file not in (ledger.MANIFEST, PLAN, "train-000001.parquet")})
    assert repaired(root) and not told(root)
    assert [row["source"] for row in ledger.read(ledger.path_of(root, "train-000001")).to_pylist()] == ["train-000001.tar"] * 3
    assert Index.open(root).row("-clip_4") >= 0


def test_a_damaged_ledger_may_still_prove_its_tar(root):
    storage.remove(f"{root}/{ledger.MANIFEST}")
    change(root, "train-000001.parquet", flipped(40))
    assert "whose sha256 the damaged one still tells" in repaired(root)[0] and not told(root)


def test_nothing_is_made_of_what_is_proven_to_be_damaged(root):
    """A payload that changed, and the ledger lost: the manifest knows the sha256, and stays, since it alone does."""
    change(root, "train-000001.tar", flipped(512 + 128 + 5))
    storage.remove(f"{root}/train-000001.parquet")
    before = files(root)
    assert repaired(root) == [] == repaired(root) and files(root) == before
    assert "train-000001.tar: it has no ledger, so it counts as not finished" in told(root)


def test_a_tar_that_is_another_shards_is_not_taken_for_one_without_ledger(root):
    whole = files(root)
    write_files(
        root, {name: data for name, data in whole.items() if name not in (ledger.MANIFEST, PLAN)} | {"train-000005.tar": whole["train-000001.tar"]}
    )
    repaired(root)
    assert "train-000005.parquet" not in files(root)


def test_broken_shards_are_removed_and_made_again(root, capsys):
    whole = files(root)
    change(root, "train-000001.tar", flipped(512 + 128 + 5))
    assert verify.main([root, "repair=true"]) == 1
    captured = capsys.readouterr()
    assert "shards to redo: train-000001" in captured.out and "1 problem left; redo=true removes the broken shards" in captured.err
    assert verify.main([root, "redo=true"]) == 1
    assert set(whole) - set(files(root)) == {"manifest.parquet", "train-000001.tar", "train-000001.parquet"}
    write_shard(root, "train-000001", SHARDS["train-000001"])
    write_manifest(root)
    assert files(root) == whole and verify.main([root]) == 0


def test_arguments_that_cannot_be_meant(tmp_path, capsys):
    assert verify.main([str(tmp_path / "nowhere")]) == 2 and "is no folder" in capsys.readouterr().err
    assert verify.main([str(tmp_path)]) == 2 and "is not a dataset" in capsys.readouterr().err
    assert verify.main([str(tmp_path), "workers=-1"]) == 2


# --- interrupted runs -----------------------------------------------------------------------------------------------------------------


def read_tars(monkeypatch, root, *, stop_after=99):
    """Runs `verify`, interrupted after so many tars; the names of those that it read."""
    read, check = [], checking.check_tar

    def counted(found, *arguments, **options):
        if len(read) >= stop_after:
            raise KeyboardInterrupt
        read.append(storage.basename(found.path))
        return check(found, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checking, "check_tar", counted)
        status = verify.main([root, "workers=1"])
    assert status == (130 if stop_after < 4 else 0)
    return read


def test_an_interrupted_run_goes_on_and_a_finished_one_begins_anew(root, monkeypatch, capsys):
    every = [f"{name}.tar" for name in SHARDS]
    assert read_tars(monkeypatch, root, stop_after=3) == every[:3]
    change(root, "train-000001.tar", bytes)  # the same bytes, written anew
    left = read_tars(monkeypatch, root)
    assert f"{4 - len(left)} tars were read by an interrupted run" in capsys.readouterr().out
    assert "train-000001.tar" in left and every[3] in left and every[0] not in left
    assert read_tars(monkeypatch, root) == every


def test_how_far_it_is_is_shown(root, monkeypatch, capsys):
    """A line now and then in a log, a bar on a terminal."""
    monkeypatch.setattr(verify, "LOG_SECONDS", 0.0)
    assert verify.main([root, "workers=1"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("verify: ")]
    assert lines[0].startswith("verify: 0 of 4 shards, 0.0 of") and lines[-1].startswith("verify: 4 of 4 shards")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert verify.main([root]) == 0
    assert "verify:   0%" in capsys.readouterr().err


def test_what_an_interrupted_run_found_is_not_forgotten(root, monkeypatch, capsys):
    change(root, "train-000000.tar", flipped(700))
    read_tars(monkeypatch, root, stop_after=2)
    capsys.readouterr()
    assert verify.main([root]) == 1
    assert "train-000000.tar: its sha256 is" in capsys.readouterr().out


# --- views, object storage ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def view(root, tmp_path):
    index = Index.open(root)
    table = index.table.filter(pc.field("key") != "-clip_4")
    labels = pa.array([f"new {number}" for number in range(len(table))])
    write_view(tmp_path / "view", index, table.set_column(table.column_names.index("label"), "label", labels), selection=["without one"])
    return str(tmp_path / "view")


def test_a_view_is_compared_with_its_parents_ledgers(root, view, tmp_path, capsys):
    assert verify.main([view]) == 0
    out = capsys.readouterr().out
    assert "view " in out and "5 good and 3 failed clips" in out and f"soundshard verify {root}" in out
    path = f"{view}/{ledger.MANIFEST}"
    whole = storage.read_bytes(path)
    table = ledger.read(path)
    for name, message in [("source", "has no such row"), ("json.offset", r"its json.offset differ"), ("shard_sha256", "its shard_sha256 differ")]:
        column = table[name].to_pylist()
        column[0] = column[0] + 512 if name == "json.offset" else f"x{column[0][1:]}"
        place = table.column_names.index(name)
        ledger.write(path, table.set_column(place, table.field(place), pa.array(column)))
        assert [message in line for line in told(view)] == [True], told(view)
    for at in range(0, len(whole), 97):
        storage.write_bytes(path, flipped(at)(whole))
        assert told(view)
    storage.remove(path)
    assert told(view) == ["manifest.parquet: it is missing, and is all that there is of a view: make the view again"]
    storage.write_bytes(path, whole)
    storage.write_bytes(f"{view}/{PLAN}", b"")
    assert verify.main([view, "redo=true", "repair=true"]) == 0 and storage.read_bytes(path) == whole
    shutil.move(f"{root}/train-000000.tar", tmp_path)
    assert any("it has rows of train-000000, which" in line for line in told(view))
    shutil.move(root, tmp_path / "elsewhere")
    assert any("dataset.json: it is missing" in line for line in told(view))


def test_in_object_storage(root, s3, flaky_s3):
    proxy = flaky_s3(Faults(error=0.06, cut_response=0.06, methods=("GET",)))
    whole = files(root)
    for name, data in whole.items():
        storage.write_bytes(f"{s3.url}/{name}", data)
    assert verify.main([s3.url]) == 0
    change(s3.url, "train-000001.tar", flipped(3))
    storage.write_bytes(f"{s3.url}/train-000000.tar", whole["val-000000.tar"])
    storage.write_bytes(f"{s3.url}/val-000000.tar", whole["train-000000.tar"])
    storage.remove(f"{s3.url}/train-000002.parquet")
    assert verify.main([s3.url]) == 1 and verify.main([s3.url, "repair=true"]) == 0
    assert {name: storage.read_bytes(f"{s3.url}/{name}") for name in storage.names(s3.url)} == whole
    storage.remove(f"{s3.url}/train-000001.tar")
    redo(check_dataset(s3.url))
    assert proxy.happened.total()
    assert storage.names(s3.url) == sorted(set(whole) - {"manifest.parquet", "train-000001.parquet", "train-000001.tar"})


def test_large_members_are_read_in_pieces(tmp_path, monkeypatch):
    """Arrays, codes and media that are larger than what is read at once, with what is wrong in their last numbers."""
    monkeypatch.setattr(reading, "PIECE_BYTES", 1 << 12)
    create_or_check(tmp_path, new_info("features", {"codec": CODEC}))
    features, codes = np.zeros((1, 211, 8, 5), np.float32), np.zeros((3, 5003), np.uint16)
    members = {"avclip.npy": features, "toy.npy": codes, "mp4": bytes(range(256)) * 111, "json": json_bytes({"a": 1})}
    write_shard(tmp_path, "train-000000", [Entry("a", "train", None, "a.mp4", members=members)])
    write_manifest(tmp_path)
    assert told(tmp_path) == []
    features[-1, -1, -1, -1], codes[-1, -1] = np.inf, 2000
    write_shard(tmp_path, "train-000000", [Entry("a", "train", None, "a.mp4", members=members)])
    write_manifest(tmp_path)
    assert [line.partition(": a: ")[2] for line in told(tmp_path)] == [
        "its avclip.npy holds what is no finite number",
        "its toy.npy holds the code 2000; a codebook has 1024",
    ]


def test_what_a_repair_wrote_can_be_read(root):
    """The clips of a shard whose ledger was lost, as its writer gave them."""
    before = list(stored_entries(root, "val-000000"))
    storage.remove(f"{root}/val-000000.parquet")
    repaired(root)
    assert list(stored_entries(root, "val-000000")) == before
    members = before[0].members
    assert members is not None and members["toy.npy"] == npy_bytes(np.array(good(7, "val").members["toy.npy"]))  # pyright: ignore[reportOptionalSubscript] - it is good


def test_descriptions_of_other_forms(tmp_path):
    found = Told()
    assert check_info(str(tmp_path), found) is None and "is missing" in found.problems[0].text()
    create_or_check(tmp_path, new_info("features", SPEC))
    fields = json.loads(storage.read_bytes(tmp_path / "dataset.json"))
    for changes in ({"spec": []}, {"view": 7}, {"view": {"parent": 7, "selection": []}}, {"kind": "x"}, {"more": 1}):
        storage.write_bytes(tmp_path / "dataset.json", json.dumps(fields | changes).encode())
        found = Told()
        check_info(str(tmp_path), found)
        assert len(found.problems) == 1
    for text in (b"[]", b"7", b"", b"[" * 5000, b"\xff", b'{"schema_version": 1}'):
        storage.write_bytes(tmp_path / "dataset.json", text)
        assert check_info(str(tmp_path), found) is None
