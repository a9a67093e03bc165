"""Videos in tars: found as Python's own tarfile finds them, read by range, whatever wrote the tar; damage is an error, never a shorter list."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import re
import shutil
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from configs import storage
from pipeline import tars, unpack
from pipeline.decode import MediaError
from pipeline.discover import Clip, DiscoverConfig, discover
from pipeline.encode import EncodeConfig
from pipeline.isolate import Limits
from pipeline.media import fetched
from pipeline.plan import Changes, Options, Plan, settle_here
from pipeline.reencode import encode_clip, media_entry
from pipeline.tars import TarVideo, listed, member_bytes, source_of, tar_of, videos
from pipeline.unpack import compressed, unpacked
from shards.dataset import create_or_check, new_info
from shards.write import Entry, write_shard
from tests.pipeline.clips import make_clip
from tests.s3 import S3

LONG = "x" * 120 + "/" + "y" * 130 + ".mp4"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test in a folder of its own, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOUNDSHARD_CACHE", str(tmp_path / "cache"))


def content(number: int) -> bytes:
    return random.Random(number).randbytes(137 * number)


def member(name: str, size: int = 0, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def write_tar(path: str | Path, names: Sequence[str]) -> bytes:
    """A tar with a member for each name; its bytes."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, name in enumerate(names, 1):
            tar.addfile(member(name, len(content(number)), mode=0o644), io.BytesIO(content(number)))
    return Path(path).read_bytes()


def by_tarfile(path: str | Path) -> list[TarVideo]:
    """What Python's own module finds."""
    with tarfile.open(path) as tar:
        return [TarVideo(info.name, info.offset_data, info.size) for info in tar if info.isreg() and info.name.lower().endswith(".mp4")]


# --- what a tar holds -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_videos_lie_where_tarfile_finds_them_whatever_wrote_the_tar(form: int) -> None:
    names = ["a.mp4", "deep/er/b.MP4", "notes.txt", "-c d,é.mp4", "deep/c.json", "x" * 90 + "/" + "y" * 70 + ".mp4", "empty.mp4", "last.mp4"]
    names += [] if form == tarfile.USTAR_FORMAT else [LONG, "z" * 100 + ".mp4", "日本.mp4"]
    with tarfile.open("t.tar", "w", format=form) as tar:
        tar.addfile(member("deep", type=tarfile.DIRTYPE))
        for number, name in enumerate(names, 1):
            data = b"" if name == "empty.mp4" else content(number)
            tar.addfile(member(name, len(data)), io.BytesIO(data))
    found = list(videos("t.tar"))
    assert found == by_tarfile("t.tar") and len(found) == len(names) - 2
    for video in found:
        number = names.index(video.member) + 1
        assert video.member == "empty.mp4" or member_bytes(source_of("t.tar", video.member), video.offset, video.size) == content(number)


def test_hidden_names_are_passed_over_and_others_are_not() -> None:
    write_tar("t.tar", ["./a.mp4", ".b.mp4", "c/._d.mp4", ".e/f.mp4", "./g/./h.webm", "../up.mkv", "/abs/i.mov", "j.avi", "k.mp3", "l.mp4.part"])
    assert [video.member for video in videos("t.tar")] == ["a.mp4", "g/h.webm", "../up.mkv", "/abs/i.mov", "j.avi"]


def test_links_have_the_bytes_that_they_lead_to() -> None:
    with tarfile.open("t.tar", "w") as tar:
        tar.addfile(member("forward.mp4", type=tarfile.SYMTYPE, linkname="deep/data.bin"))
        tar.addfile(member("deep/data.bin", 411), io.BytesIO(content(3)))
        tar.addfile(member("hard.mp4", type=tarfile.LNKTYPE, linkname="./deep/data.bin"))
        tar.addfile(member("deep/beside.mp4", type=tarfile.SYMTYPE, linkname="../hard.mp4"))
        tar.addfile(member("nowhere.mp4", type=tarfile.SYMTYPE, linkname="gone.mp4"))
        tar.addfile(member("round.mp4", type=tarfile.SYMTYPE, linkname="round.mp4"))
    found = {video.member: video for video in videos("t.tar")}
    assert list(found) == ["forward.mp4", "hard.mp4", "deep/beside.mp4", "nowhere.mp4", "round.mp4"]
    for name in ("forward.mp4", "hard.mp4", "deep/beside.mp4"):
        assert member_bytes(source_of("t.tar", name), found[name].offset, found[name].size) == content(3)
    assert found["nowhere.mp4"].size == found["round.mp4"].size == 0


def test_several_tars_in_one_file_and_members_above_8_gib() -> None:
    one, two = write_tar("one.tar", ["a.mp4", "b.mp4"]), write_tar("two.tar", ["c.mp4"])
    Path("both.tar").write_bytes(one + two)
    assert [video.member for video in videos("both.tar")] == ["a.mp4", "b.mp4", "c.mp4"]
    assert member_bytes("both.tar::c.mp4", list(videos("both.tar"))[2].offset, 137) == content(1)
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):  # a size in bytes after a mark, or in a record
        large, small = member("film.mp4", 9 << 30), member("small.mp4", 7)
        with open("large.tar", "wb") as file:  # a file of holes
            file.write(large.tobuf(form))
            file.seek(file.tell() + large.size)
            file.write(small.tobuf(form) + b"seventy" + bytes(505 + 1024))
        film, after = videos("large.tar")
        assert (film.size, after.member, member_bytes("large.tar::small.mp4", after.offset, after.size)) == (9 << 30, "small.mp4", b"seventy")


def test_random_tars_are_read_as_tarfile_reads_them() -> None:
    rng = random.Random(5)
    for _ in range(30):
        form = rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
        with tarfile.open("t.tar", "w", format=form) as tar:
            for _ in range(rng.randrange(9)):
                name = "/".join("abcdé"[rng.randrange(5)] * rng.randint(1, 40) for _ in range(rng.randint(1, 3))) + rng.choice([".mp4", ".txt"])
                kind = rng.choice([tarfile.REGTYPE, tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE])
                size = rng.choice([0, 1, 511, 512, 513, 5000]) if kind not in (tarfile.DIRTYPE, tarfile.FIFOTYPE) else 0
                tar.addfile(member(name, size, type=kind), io.BytesIO(rng.randbytes(size)))
        assert list(videos("t.tar")) == by_tarfile("t.tar")


# --- damage ---------------------------------------------------------------------------------------------------------------------------


def test_damage_is_an_error_or_changes_nothing() -> None:
    """Flips, zeroed blocks and truncations anywhere: what is listed is all that there was, or there is an error."""
    whole, rng = bytearray(write_tar("t.tar", [f"{n}.mp4" for n in range(9)])), random.Random(3)
    told, intact = set[str](), 0
    expected, end = list(videos("t.tar")), len(bytes(whole).rstrip(b"\0"))
    for _ in range(400):
        data, kind = bytearray(whole), rng.randrange(4)
        at = rng.randrange(end)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at // 512 * 512 : at // 512 * 512 + 512] = bytes(512)
        elif kind == 2:
            del data[at:]
        else:
            del data[at : at + rng.randint(1, 1500)]
        Path("t.tar").write_bytes(data)
        try:
            found = list(videos("t.tar"))
        except ValueError as error:
            told.add(re.sub(r"\d+", "N", str(error)))
        else:
            intact += 1
            assert found == expected, (kind, at)
        if kind < 3 and at >= 512:  # of what can be read nothing is lost; what is cut at the end is listed as it was
            salvaged = list(videos("t.tar", salvage=True))
            there = [video for video in expected if video.offset <= at] if kind == 2 else expected
            assert set(salvaged) <= set(there) and len(salvaged) >= len(there) - (kind < 2)
    assert intact > 100 and len(told) >= 4 and all(text.startswith("t.tar ") and "fetch it again" in text for text in told)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has 0 bytes; fetch it again"),
        (b"<!DOCTYPE html>" * 100, "is no tar: it begins with b'<!DOCTYPE html>"),
        (b"\x1f\x8b\x08" + bytes(2000), r"compressed \(gzip\).*unpack=FOLDER"),
        (b"\x28\xb5\x2f\xfd" + bytes(2000), r"compressed \(zstd\)"),
        (bytes(50_000), "nothing but zeros"),
        (b"ustar", "is no tar"),
    ],
)
def test_what_is_no_tar_is_told(data: bytes, message: str) -> None:
    Path("t.tar").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        list(videos("t.tar"))
    with pytest.raises(FileNotFoundError):
        list(videos("no.tar"))


def test_an_empty_tar_is_one_and_sparse_members_are_refused() -> None:
    write_tar("empty.tar", [])
    assert list(videos("empty.tar")) == []
    Path("sparse.tar").write_bytes(member("a.mp4", 512, type=tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(ValueError, match="stored without its holes"):
        list(videos("sparse.tar"))
    Path("volume.tar").write_bytes(member("a.mp4", 512, type=b"M").tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(ValueError, match="another volume"):
        list(videos("volume.tar"))


# --- names and lists ------------------------------------------------------------------------------------------------------------------


def test_sources_come_apart_where_the_tar_ends() -> None:
    for path, name in [("/a/b.tar", "c/d.mp4"), ("s3://x/y.TAR", "a::b.mp4"), ("/in::dir/part.tar.gz", "::.mp4"), ("p.tar", "q.tar::r.mp4")]:
        assert tar_of(source_of(path, name)) == (path, name)


def test_long_lists_are_kept_until_the_tar_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "KEPT_MEMBERS", 5)
    write_tar("long.tar", [f"{n}.mp4" for n in range(7)])
    write_tar("short.tar", ["a.mp4", "b\udcff.mp4"])
    first = list(listed(["long.tar", "short.tar"]))
    assert [(stat.path, len(found)) for stat, found in first] == [("long.tar", 7), ("short.tar", 2)]
    assert len(list(Path("cache/tars").iterdir())) == 1
    with monkeypatch.context() as patched:
        patched.setattr(tars._File, "read", None)
        assert list(listed(["long.tar"])) == first[:1]
        with pytest.raises(TypeError):
            list(listed(["short.tar"]))
    write_tar("long.tar", [f"{n}.mp4" for n in range(6)])
    assert len(next(listed(["long.tar"]))[1]) == 6


def test_a_list_that_cannot_be_kept_is_read_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(tars, "KEPT_MEMBERS", 1)
    Path("cache").write_text("a file where a folder should be")
    write_tar("t.tar", ["a.mp4"])
    with pytest.raises(NotADirectoryError):
        storage.read_bytes("cache/tars/x.json")
    for _ in range(2):
        assert len(next(listed(["t.tar"]))[1]) == 1
    assert "are read again next time" in caplog.text


# --- from a tar to a plan and to a clip -----------------------------------------------------------------------------------------------


def test_videos_in_tars_are_inputs_like_files() -> None:
    write_tar("in/sub/part_0.tar", ["scratch/aaaaaaaaaaa_000010.mp4", "scratch/bbbbbbbbbbb_000020.mp4", "notes.txt"])
    write_tar("in/part_1.tar", ["aaaaaaaaaaa_000010.mp4", "ccccccccccc_000030.mp4"])
    Path("in/ddddddddddd_000040.mp4").write_bytes(b"a file")
    Path("in/vggsound.csv").write_text("".join(f'{c * 11},{n}0,"x, y",train\n' for n, c in enumerate("abcde", 1)))
    clips = {clip.key: clip for clip in discover(DiscoverConfig("in"))}
    here = os.getcwd()
    assert clips["aaaaaaaaaaa_10000_20000"].source == f"{here}/in/part_1.tar::aaaaaaaaaaa_000010.mp4"
    assert clips["bbbbbbbbbbb_20000_30000"].source == f"{here}/in/sub/part_0.tar::scratch/bbbbbbbbbbb_000020.mp4"
    assert (clips["eeeeeeeeeee_50000_60000"].reason, clips["ddddddddddd_40000_50000"].offset) == ("missing", None)
    c = clips["ccccccccccc_30000_40000"]
    assert (c.label, c.size, c.version) == ("x, y", len(content(2)), f"mtime:{os.stat('in/part_1.tar').st_mtime_ns}")
    assert fetched(c) == content(2) and fetched(clips["ddddddddddd_40000_50000"]) == f"{here}/in/ddddddddddd_000040.mp4"
    every = discover(DiscoverConfig("in", listing="none"))
    assert [clip.reason for clip in every if clip.key == "aaaaaaaaaaa_000010"] == [None, "duplicate_key"]
    assert [clip.key for clip in discover(DiscoverConfig("in/part_1.tar"))] == ["aaaaaaaaaaa_000010", "ccccccccccc_000030"]


def plan(source: str, **options: bool) -> Changes:
    return settle_here("out", discover, [DiscoverConfig(source)], Options(3, **options))


def test_a_plan_of_tar_members_notices_what_a_plan_of_files_does() -> None:
    create_or_check("out", new_info("media", {}))
    write_tar("in/p.tar", ["a.mp4", "b.mp4", "deep/c.mp4"])
    assert plan("in") == plan("in") == Changes()
    (shard,) = Plan("out").shards()
    assert [clip.offset for clip in shard.clips] == [video.offset for video in videos("in/p.tar")]
    write_shard("out", shard.name, [Entry(clip.key, clip.split, None, clip.source, 1.0, {"mp4": b"x"}) for clip in shard.clips])
    shutil.copytree("in", "moved/there")
    os.utime("moved/there/p.tar", ns=(5, 5))
    assert plan("moved/there") == Changes()
    moved = {clip.key: clip for shard in Plan("out").shards() for clip in shard.clips}
    assert moved["a"].source == f"{os.getcwd()}/moved/there/p.tar::a.mp4" and moved["a"].version == "mtime:5"
    os.utime("moved/there/p.tar", ns=(6, 6))
    with pytest.raises(ValueError, match=r"3 inputs of 1 finished shards.*\n.*p\.tar::a\.mp4\): mtime 1970"):
        plan("moved/there")
    write_tar("moved/there/p.tar", ["new.mp4", "a.mp4", "b.mp4", "deep/c.mp4"])  # each is of another size now
    changes = plan("moved/there", redo_changed=True)
    assert (changes.added, changes.changed) == (1, ("train-000000",))
    after = {clip.key: clip for shard in Plan("out").shards() for clip in shard.clips}
    assert fetched(after["a"]) == content(2) and after["a"].offset != moved["a"].offset


def test_a_change_of_the_part_that_a_clip_is_is_a_change_of_the_clip() -> None:
    create_or_check("out", new_info("media", {}))

    def found(end_seconds: float) -> list[Clip]:
        return [Clip("a", "/in/a.mp4", "train", size=3, version="mtime:1", start_seconds=1.0, end_seconds=end_seconds)]

    settle_here("out", found, [2.0], Options(3))
    assert settle_here("out", found, [2.0], Options(3)) == Changes()
    write_shard("out", "train-000000", [Entry("a", "train", None, "/in/a.mp4", 1.0, {"mp4": b"x"})])
    with pytest.raises(ValueError, match=r"a \(/in/a.mp4\): end_seconds 2.0 before, 2.5 now"):
        settle_here("out", found, [2.5], Options(3))
    settle_here("out", found, [2.5], Options(3, redo_changed=True))
    assert next(Plan("out").shards()).clips[0].end_seconds == 2.5


def test_a_clip_from_a_tar_is_encoded_as_from_its_file() -> None:
    make_clip(Path("clip.mp4"), seconds=1)
    data = Path("clip.mp4").read_bytes()
    with tarfile.open("t.tar", "w") as tar:
        tar.add("clip.mp4", "deep/clip.mp4")
        tar.addfile(member("cut.mp4", len(data) // 3), io.BytesIO(data))
        tar.addfile(member("none.mp4", type=tarfile.SYMTYPE, linkname="gone"))
    config, limits = EncodeConfig(short_side=32, preset="ultrafast"), Limits()
    clips = {clip.key: clip for clip in discover(DiscoverConfig("t.tar"))}
    entry = media_entry(clips["clip"], encode_clip(clips["clip"], config, limits))
    assert entry.source == f"{os.getcwd()}/t.tar::deep/clip.mp4" and entry.reason is None
    assert entry.members == media_entry(clips["clip"], encode_clip(Clip("clip", os.path.abspath("clip.mp4"), "train"), config, limits)).members
    failed = {key: encode_clip(clips[key], config, limits) for key in ("cut", "none")}
    assert {key: error.reason for key, error in failed.items() if isinstance(error, MediaError)} == {"cut": "truncated", "none": "empty"}


def test_a_tar_that_changed_since_it_was_listed_is_told() -> None:
    write_tar("t.tar", ["a.mp4", "b.mp4"])
    clips = {clip.key: clip for clip in discover(DiscoverConfig("t.tar"))}
    whole = Path("t.tar").read_bytes()
    for data, reason in [(whole[:1700], "truncated"), (b"another" * 3000, "unreadable"), (None, "missing")]:
        Path("t.tar").unlink()
        if data is not None:
            Path("t.tar").write_bytes(data)
        with pytest.raises(MediaError) as raised:
            fetched(clips["b"])
        assert raised.value.reason == reason
    Path("t.tar").mkdir()
    with pytest.raises(MediaError, match=r"unreadable: .*directory"):
        fetched(clips["b"])


# --- compressed tars ------------------------------------------------------------------------------------------------------------------

PACK = {"tar.gz": gzip.compress, "tgz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}


def packed(path: str, names: Sequence[str] = ("a.mp4", "b.mp4")) -> bytes:
    """A compressed tar; what is in it."""
    data = write_tar("plain/t.tar", names)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(PACK[path.partition(".")[2]](data))
    return data


def test_compressed_tars_are_unpacked_once() -> None:
    wanted = {f"in/p{n}.{ending}": packed(f"in/p{n}.{ending}", ["a.mp4"] * n) for n, ending in enumerate(PACK, 1)}
    paths = [*wanted, "plain/t.tar"]
    assert compressed(paths) == list(wanted)
    found = unpacked([*wanted], "out")
    assert found == [f"out/p{n}.tar" for n in range(1, 5)] and [Path(path).read_bytes() for path in found] == list(wanted.values())
    before = [os.stat(path).st_ino for path in found]
    assert unpacked([*wanted], "out") == found and [os.stat(path).st_ino for path in found] == before
    versions = [storage.Stat(clip.source, 0, clip.version or "") for clip in discover(DiscoverConfig("in", unpack="out"))]
    shutil.rmtree("out")
    assert [storage.Stat(clip.source, 0, clip.version or "") for clip in discover(DiscoverConfig("in", unpack="out"))] == versions
    assert unpacked(["in/p1.tar.gz", "plain/t.tar"], "elsewhere") == ["elsewhere/in/p1.tar", "plain/t.tar"]


def test_what_changed_or_was_interrupted_is_unpacked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = packed("in/p1.tar.gz"), packed("in/p2.tgz", ["c.mp4"])
    paths = ["in/p1.tar.gz", "in/p2.tgz"]
    real = unpack._Work._pieces

    def stopping(work: unpack._Work, *arguments: Any) -> Any:
        if work.found.path.endswith("p2.tgz"):
            raise KeyboardInterrupt
        return real(work, *arguments)

    unpacked(paths[:1], "out")
    with monkeypatch.context() as patched:
        patched.setattr(unpack._Work, "_pieces", stopping)
        with pytest.raises(KeyboardInterrupt):
            unpacked(paths, "out")
    assert Path("out/p1.tar").read_bytes() == one and not Path("out/p2.tar").exists()
    Path("out/.p2.tar.0123456789ab.tmp").write_bytes(b"what a killed process leaves")
    first = os.stat("out/p1.tar").st_ino
    unpacked(paths, "out")
    assert (Path("out/p2.tar").read_bytes(), os.stat("out/p1.tar").st_ino) == (two, first) and not list(Path("out").glob(".*"))
    new = packed("in/p2.tgz", ["d.mp4", "e.mp4"])
    unpacked(paths, "out")
    assert (Path("out/p2.tar").read_bytes(), os.stat("out/p1.tar").st_ino) == (new, first)


def test_gzip_of_several_streams_and_padding_is_one() -> None:
    data = write_tar("t.tar", ["a.mp4", "b.mp4"])
    Path("t.tar.gz").write_bytes(gzip.compress(data[:700]) + gzip.compress(data[700:]) + bytes(300))
    assert Path(unpacked(["t.tar.gz"], "out")[0]).read_bytes() == data


def test_compressed_tars_that_are_damaged_or_none_are_told_and_leave_nothing() -> None:
    packed("good.tar.gz")
    packed("bad.tar.gz", [f"{n}.mp4" for n in range(40)])
    data = bytearray(Path("bad.tar.gz").read_bytes())
    unpacked(["good.tar.gz"], "out")
    for what, message in [(data[:-5], "truncated"), (data[: len(data) // 2], "truncated"), (data[:5000] + b"\xff" * 9 + data[5009:], "damaged")]:
        Path("bad.tar.gz").write_bytes(what)
        with pytest.raises(ValueError, match=rf"bad\.tar\.gz is {message}"):
            unpacked(["good.tar.gz", "bad.tar.gz"], "out")
        assert Path("out/good.tar").exists() and not Path("out/bad.tar").exists() and not list(Path("out").glob(".*"))
    Path("text.tar.gz").write_bytes(gzip.compress(b"never a tar" * 99))
    with pytest.raises(ValueError, match=r"no tar in it: it begins with b'never a tar"):
        unpacked(["text.tar.gz"], "out")
    Path("z.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(99))
    with pytest.raises(ValueError, match=r"compressed \(zstd\), which cannot be unpacked here"):
        unpacked(["z.tar.zst"], "out")


def test_a_tar_of_someone_elses_is_not_written_over() -> None:
    packed("in/p.tar.gz")
    write_tar("out/p.tar", ["mine.mp4"])
    with pytest.raises(ValueError, match=r"out/p\.tar is there, and nothing says what it was unpacked from"):
        unpacked(["in/p.tar.gz"], "out")
    packed("x/p.tar.gz")
    packed("x/p.tgz")
    with pytest.raises(ValueError, match=r"would be the place of several files"):
        unpacked(["x/p.tar.gz", "x/p.tgz"], "new")
    assert unpacked(["x/p.tgz", "in/p.tar.gz"], "new") == ["new/x/p.tar", "new/in/p.tar"]


def test_of_damaged_parts_what_can_be_read_is_taken_if_wanted(caplog: pytest.LogCaptureFixture) -> None:
    names = [f"{letter * 11}_000010.mp4" for letter in "abcdefgh"]
    whole = bytearray(write_tar("in/vggsound_00.tar", names[:5]))
    lost = list(videos("in/vggsound_00.tar"))[1].offset
    whole[lost - 400] ^= 1  # in a header
    Path("in/vggsound_00.tar").write_bytes(whole)
    data = write_tar("plain.tar", names[5:])
    at = list(videos("plain.tar"))[2].offset
    stored = zlib.compressobj(0, wbits=31)  # not made smaller, as videos are not
    Path("in/vggsound_01.tar.gz").write_bytes((stored.compress(data) + stored.flush())[: at + 100])
    Path("in/vggsound.csv").write_text("".join(f"{letter * 11},10,x,train\n" for letter in "abcdefgh"))
    with pytest.raises(ValueError, match=r"vggsound_01\.tar\.gz is truncated: .*fetch it again, or salvage=true takes what comes before"):
        discover(DiscoverConfig("in", unpack="out"))
    Path("in/vggsound_01.tar.gz").rename("01.tar.gz")
    with pytest.raises(ValueError, match=r"vggsound_00\.tar is damaged: after 1 headers .* or salvage=true takes what can be read of it"):
        discover(DiscoverConfig("in"))
    Path("01.tar.gz").rename("in/vggsound_01.tar.gz")
    clips: list[Clip] = []
    for _ in range(2):
        caplog.clear()
        clips = discover(DiscoverConfig("in", unpack="out", salvage=True))
        assert {clip.key[0]: clip.reason for clip in clips} == dict.fromkeys("acdefgh") | {"b": "missing"}
        assert "vggsound_00.tar is damaged" in caplog.text and "vggsound_01.tar.gz is truncated" in caplog.text and "inside hhhhh" in caplog.text
    good = {clip.key[0]: clip for clip in clips if clip.reason is None}
    assert [fetched(good[letter]) for letter in "acdefg"] == [content(n) for n in (1, 3, 4, 5, 1, 2)]
    with pytest.raises(MediaError, match=r"truncated: .* of the 411 bytes of hhhhh"):
        fetched(good["h"])
    with pytest.raises(ValueError, match=r"vggsound_01\.tar\.gz is truncated"):
        discover(DiscoverConfig("in", unpack="out"))


def test_a_folder_of_compressed_parts_asks_where_to_unpack_them() -> None:
    packed("in/vggsound_00.tar.gz", ["aaaaaaaaaaa_000010.mp4"])
    packed("in/wrong.tar.gz", ["bbbbbbbbbbb_000010.mp4"])
    Path("in/wrong.tar.gz").rename("in/vggsound_01.tar")  # compressed, whatever it is called
    write_tar("in/vggsound_02.tar.gz", ["ccccccccccc_000010.mp4"])  # not compressed
    with pytest.raises(ValueError, match=r"2 tars in .*/in are compressed, such as .*vggsound_00\.tar\.gz.*unpack=FOLDER"):
        discover(DiscoverConfig("in"))
    clips = discover(DiscoverConfig("in", unpack="plain_parts"))
    assert [(clip.key[0], tar_of(clip.source)[0].removeprefix(f"{os.getcwd()}/")) for clip in clips] == [
        ("a", "plain_parts/vggsound_00.tar"),
        ("b", "plain_parts/vggsound_01.tar"),
        ("c", "in/vggsound_02.tar.gz"),
    ]
    assert all(fetched(clip) == content(1) for clip in clips)


# --- object storage -------------------------------------------------------------------------------------------------------------------


def test_tars_in_object_storage_are_read_by_range_and_unpacked(s3: S3) -> None:
    plain, data = write_tar("p.tar", [f"{n}.mp4" for n in range(5)]), packed("q.tar.gz", ["x.mp4"])
    storage.write_bytes(f"{s3.url}/in/deep/p.tar", plain)
    storage.write_bytes(f"{s3.url}/in/q.tar.gz", Path("q.tar.gz").read_bytes())
    assert list(videos(f"{s3.url}/in/deep/p.tar")) == list(videos("p.tar"))
    with pytest.raises(ValueError, match=r"1 tars in s3://.* are compressed"):
        discover(DiscoverConfig(f"{s3.url}/in"))
    clips = discover(DiscoverConfig(f"{s3.url}/in", unpack=f"{s3.url}/plain"))
    assert [clip.source for clip in clips] == [*(f"{s3.url}/in/deep/p.tar::{n}.mp4" for n in range(5)), f"{s3.url}/plain/q.tar::x.mp4"]
    assert all((clip.version or "").startswith("etag:") for clip in clips)
    assert [fetched(clip) for clip in clips] == [content(n) for n in (1, 2, 3, 4, 5, 1)]
    assert storage.read_bytes(f"{s3.url}/plain/q.tar") == data
    assert json.loads(storage.read_bytes(f"{s3.url}/plain/q.tar.from.json"))["source"] == f"{s3.url}/in/q.tar.gz"
    storage.write_bytes(f"{s3.url}/in/deep/p.tar", plain[512:])
    storage.remove(f"{s3.url}/plain/q.tar")
    for clip, reason in [(clips[0], "unreadable"), (clips[5], "missing")]:
        with pytest.raises(MediaError) as raised:
            fetched(clip)
        assert raised.value.reason == reason
    with pytest.raises(FileNotFoundError):
        list(videos(f"{s3.url}/in/none.tar"))
