import argparse
import datetime
import enum
import functools
import hashlib
import json
import os
import pickle
import re
import runpy
import subprocess
import threading
import typing
import uuid
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

import model.weights
from model.synchformer_visual import VisualTower, VisualTowerConfig, load_tower, save_tower
from model.weights import Artifact, WeightsConfig, fetch, load_state, load_strictly, main, read_checkpoint, resolve, run, save_state, sha256_file
from tests.model.fill import fill_module

TENSORS = {
    "a": torch.randn(5, 7),
    "b": torch.arange(11),
    "c": torch.randn(3, 2).half(),
    "d": torch.tensor(0.07),
    "e": torch.randn(4, 6).t(),
    "f": torch.zeros(0, 3),
    "g": torch.randn(9).bfloat16(),
    "h": torch.tensor([True, False]),
}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


# --- reading and writing ---


def test_our_own_files_hold_tensors_and_configuration(tmp_path: Path) -> None:
    config = {"kind": "x", "width": 3, "rates": [1, 2], "none": None}
    save_state(tmp_path / "deep" / "w.safetensors", TENSORS, config)
    tensors, read = load_state(tmp_path / "deep" / "w.safetensors")
    assert_equal(dict(sorted(tensors.items())), TENSORS)
    assert read == config
    assert os.listdir(tmp_path / "deep") == ["w.safetensors"]


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    save_state(tmp_path / "1.safetensors", TENSORS, {"p": 1, "q": 2})
    save_state(tmp_path / "2.safetensors", dict(reversed(TENSORS.items())), {"q": 2, "p": 1})
    save_state(tmp_path / "3.safetensors", TENSORS | {"d": torch.tensor(0.08)}, {"p": 1, "q": 2})
    digests = [sha256_file(tmp_path / f"{i}.safetensors") for i in (1, 2, 3)]
    assert digests[0] == digests[1] != digests[2]
    assert digests[0] == hashlib.sha256((tmp_path / "1.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"state_dict": t, "epoch": 3}, lambda t: {"model": t, "loss": 0.5}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_torch_file_gives_the_same_tensors_as_torch(tmp_path: Path, wrap: Any, prefix: str) -> None:
    torch.save(wrap({prefix + name: t for name, t in TENSORS.items()}), tmp_path / "w.pt")
    tensors, config = load_state(tmp_path / "w.pt")
    assert_equal(tensors, TENSORS)
    assert config is None


def test_parameters_and_shared_storages_come_out_right(tmp_path: Path) -> None:
    base = torch.randn(30)
    torch.save({"p": nn.Parameter(base[3:9].view(2, 3)), "q": base[::4], "r": base}, tmp_path / "w.th")
    tensors, _ = load_state(tmp_path / "w.th")
    assert_equal(tensors, {"p": base[3:9].view(2, 3), "q": base[::4], "r": base})


class Hostile:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.reduced = (call, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("attack", "named"),
    [
        (lambda mark: Hostile(os.system, f"touch {mark}"), "posix.system"),
        (lambda mark: Hostile(exec, f"open({str(mark)!r}, 'w')"), "builtins.exec"),
        (lambda mark: Hostile(eval, f"open({str(mark)!r}, 'w')"), "builtins.eval"),
        (lambda mark: Hostile(open, str(mark), "w"), "io.open"),
        (lambda mark: Hostile(functools.partial(os.mkdir, mark)), "functools.partial"),
        (lambda mark: Hostile(subprocess.check_call, ["touch", str(mark)]), "subprocess.check_call"),
        (lambda mark: Hostile(runpy.run_path, script(mark)), "runpy.run_path"),
        (lambda mark: Hostile(np.save, mark, [1]), "numpy.save"),
        (lambda mark: {"deep": [(1, {"er": Hostile(os.mkdir, str(mark))})]}, "posix.mkdir"),
    ],
)
def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path: Path, attack: Callable[[Path], Any], named: str, protocol: int) -> None:
    mark, path = tmp_path / "ran", tmp_path / "w.pt"
    torch.save({"state_dict": TENSORS, "x": attack(mark)}, path, pickle_protocol=protocol)
    with pytest.raises(ValueError, match=rf"w\.pt: refused\. Its pickle names {re.escape(named)}, which loads or runs code"):
        load_state(path)
    assert not list(tmp_path.glob("ran*"))
    torch.load(path, weights_only=False)
    assert list(tmp_path.glob("ran*")), "the attack works on a reader that trusts the file"


def script(mark: Path) -> str:
    (mark.parent / "script.py").write_text(f"open({str(mark)!r}, 'w')")
    return str(mark.parent / "script.py")


def write_pickle(path: Path, program: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", program)
    return path


@pytest.mark.parametrize(
    "program",
    [
        b"(Vtouch MARK\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nVtouch MARK\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0atouch MARK\x85R.",  # STACK_GLOBAL and REDUCE
        b"ccollections\nOrderedDict\n)R}(V__setstate__\ncos\nsystem\nubVtouch MARK\nb.",  # BUILD of a state that is to be called
        b"c__builtin__\neval\n(V__import__('os').system('touch MARK')\ntR.",  # a name of Python 2
        b"c__builtin__\nreduce\n(cos\nsystem\n(Vtouch MARK\nltR.",
        b"ccommands\ngetoutput\n(Vtouch MARK\ntR.",
        b"cimportlib\nimport_module\n(Vscript\ntR.",
        b"c_pickle\nloads\n(VMARK\ntR.",
        b"ctorch.serialization\nload\n(Vinner.pt\ntR.",
        b"ctorch.storage\n_load_from_bytes\n(VMARK\ntR.",
        b"\x80\x04\x8c\x0bcollections\x8c\x0fabc.sys.modules\x93.",  # a way through a harmless module
        b"\x80\x04\x8c\x07pathlib\x8c\x09os.system\x93\x8c\x0atouch MARK\x85R.",
        b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x0atouch MARK\x85R.",
        b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x0atouch MARK\x85\x81.",  # NEWOBJ
    ],
)
def test_every_way_of_calling_is_refused(tmp_path: Path, program: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"refused\. Its pickle names"):
        load_state(write_pickle(tmp_path / "w.pt", program))
    assert os.listdir(tmp_path) == ["w.pt"]


def test_what_is_not_run_is_kept_as_data_and_told(tmp_path: Path) -> None:
    """What real checkpoints have inside: settings of several libraries, a live optimizer, numpy's numbers, names of functions that are not called."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.randn(3))])
    root = {
        "state_dict": TENSORS,
        "optimizer": optimizer,
        "settings": OmegaConf.create({"heads": 16, "rates": [1, 2], "typed": None}),
        "namespace": argparse.Namespace(a=1),
        "path": Path("x"),
        "types": [typing.Any, typing.Optional[int], dict[str, int], int, type(None), torch.float32, torch.device("cpu"), torch.Size([3])],  # noqa: UP045
        "numpy": [np.float64(3), np.arange(3), np.random.default_rng(0), np.dtype("f4")],
        "containers": [
            Counter("aab"),
            defaultdict(list, {1: [2]}),
            OrderedDict(a=1),
            deque([1]),
            {1},
            frozenset([1]),
            slice(1),
            1j,
            bytearray(b"x"),
            b"y",
        ],
        "times": [datetime.datetime(2024, 8, 1), datetime.timedelta(3), Fraction(1, 3), Decimal("0.1"), uuid.uuid4()],
        "functions": [torch.nn.functional.gelu, nn.GELU, np.save],
        "enum": Colour.RED,
    }
    for protocol in (2, 4):
        torch.save(root, tmp_path / "w.pt", pickle_protocol=protocol)
        found = read_checkpoint(tmp_path / "w.pt")
        assert found.skipped["torch.optim.adamw.AdamW"] == 1 and found.skipped["omegaconf.nodes.AnyNode"] == 4
        assert found.skipped["pathlib.PosixPath"] == 1 and found.skipped["numpy._core.multiarray.scalar"] == 1
        assert "omegaconf.nodes.AnyNode (4), " in found.skipped_text and "argparse.Namespace (1)" in found.skipped_text
        assert found.skipped["torch._C._nn.gelu"] == 0 and "torch._C._nn.gelu," in found.skipped_text + ","
        assert found.root["settings"].state["_content"]["heads"].state["_val"] == 16
        assert found.root["path"].arguments == ("x",) and found.root["namespace"].state == {"a": 1}
        assert_equal(load_state(tmp_path / "w.pt")[0], TENSORS)
    torch.save(TENSORS, tmp_path / "w.pt")
    assert read_checkpoint(tmp_path / "w.pt").skipped_text == ""


class Colour(enum.Enum):
    RED = 1


def test_tensors_that_were_let_go_of_are_read_again(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "w.pt")
    found = read_checkpoint(tmp_path / "w.pt")
    for _ in range(2):
        assert_equal(found.root, TENSORS)
        found.release()


def test_our_files_have_the_bytes_that_the_library_writes(tmp_path: Path) -> None:
    tensors = TENSORS | {"ä": torch.randn(3).double(), "i": torch.arange(3).int(), "j": torch.arange(3).to(torch.uint8)}
    counts: list[int] = []
    save_state(tmp_path / "w.safetensors", tensors, {"name": 'ö "quoted" / \\', "sizes": [1, 2]}, written=counts.append)
    expected = {name: t.contiguous() for name, t in tensors.items()}
    metadata = {"config": json.dumps({"name": 'ö "quoted" / \\', "sizes": [1, 2]}, sort_keys=True)}
    assert (tmp_path / "w.safetensors").read_bytes() == safetensors.torch.save(expected, metadata=metadata)
    assert sum(counts) == sum(t.nbytes for t in tensors.values())


def test_a_file_cannot_change_the_functions_that_read_it(tmp_path: Path) -> None:
    """BUILD can set attributes of whatever the unpickler hands out: it must hand out nothing that outlives the file."""
    function = torch._utils._rebuild_tensor_v2  # pyright: ignore[reportAttributeAccessIssue] - private to torch
    before = function.__defaults__
    program = b"\x80\x02}(X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__(K\x01ts\x86bu."
    with pytest.raises(ValueError, match="no dict of tensors"):
        load_state(write_pickle(tmp_path / "w.pt", program))
    assert function.__defaults__ == before
    pickle.loads(program)
    assert function.__defaults__ == (1,), "the attack works on a reader that trusts the file"
    function.__defaults__ = before


def test_checkpoints_with_live_objects_inside_load(tmp_path: Path) -> None:
    """The layouts of Segment AVCLIP's stage I and of V-AURA's Lightning file, which torch.load(weights_only=True) refuses."""
    network = nn.Linear(3, 5)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    args = OmegaConf.create({"model": {"params": {"ckpt_path": None, "sizes": [1, 2]}}, "here": Path("x")})
    stage_1 = {
        "epoch": 20,
        "name": "23-12-22T16-10-50",
        "state_dict": {f"module.{name}": t for name, t in network.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "metrics": {"sync_w_shifts": {"precision": 0.5}},
        "args": args,
        "scaler": {"scale": 65536.0},
    }
    lightning = {"state_dict": network.state_dict(), "hyper_parameters": {"config": args, "lr_scheduler": {"optimizer": optimizer}}, "loops": {}}
    for name, checkpoint in {"stage_1.pt": stage_1, "lightning.ckpt": lightning}.items():
        torch.save(checkpoint, tmp_path / name)
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / name, weights_only=True)
        tensors, _ = load_state(tmp_path / name)
        assert_equal(tensors, dict(network.state_dict()))


def damaged(path: Path, kind: str) -> None:
    torch.save(TENSORS, path)
    content = path.read_bytes()
    if kind == "text":
        path.write_text("not weights")
    elif kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "legacy":
        torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    elif kind == "program":
        torch.jit.script(nn.Linear(2, 3)).save(str(path))
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "empty":
        path.write_bytes(b"")


@pytest.mark.parametrize("kind", ["text", "truncated", "legacy", "program", "list", "empty"])
def test_what_is_not_weights_is_refused_with_its_path(tmp_path: Path, kind: str) -> None:
    damaged(tmp_path / "w.pt", kind)
    with pytest.raises(ValueError, match=r"w\.pt: "):
        load_state(tmp_path / "w.pt")


def test_a_damaged_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match="damaged"):
        load_state(tmp_path / "w.safetensors")
    with pytest.raises(FileNotFoundError, match="no such weights file"):
        load_state(tmp_path / "none.safetensors")


def test_strict_loading_names_what_does_not_fit_and_copies_nothing() -> None:
    network = nn.Linear(3, 5)
    before = network.bias.clone()
    with pytest.raises(ValueError, match=r"FILE does not fit Linear: 1 missing \(weight\); 1 unexpected \(extra\); .*bias \(4,\) instead of \(5,\)"):
        load_strictly(network, {"bias": torch.zeros(4), "extra": torch.zeros(1)}, source="FILE")
    assert torch.equal(network.bias, before)


# --- towers ---

SMALL = VisualTowerConfig(image_size=14, patch_size=7, frames=4, tubelet=2, width=6, depth=2, heads=2)


@pytest.fixture(scope="module")
def tower() -> VisualTower:
    tower = VisualTower(SMALL).eval()
    fill_module(tower, "v_encoder.")
    return tower


def test_a_tower_of_ours_comes_back_with_its_size(tmp_path: Path, tower: VisualTower) -> None:
    save_tower(tmp_path / "tower.safetensors", tower)
    loaded = load_tower(tmp_path / "tower.safetensors")
    assert loaded.config == SMALL
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert_equal(dict(loaded.state_dict()), dict(tower.state_dict()))
    assert load_tower(tmp_path / "tower.safetensors", dtype=torch.bfloat16).cls_token.dtype == torch.bfloat16
    save_state(tmp_path / "codec.safetensors", {"a": torch.zeros(1)}, {"kind": "codec"})
    with pytest.raises(ValueError, match="expected a visual tower"):
        load_tower(tmp_path / "codec.safetensors")


@pytest.mark.parametrize(
    ("outer", "prefix"),
    [("state_dict", "module.v_encoder."), ("state_dict", "v_encoder."), ("model", "vfeat_extractor."), ("state_dict", "visual_feature_extractor.")],
)
def test_published_layouts_load_strictly(tmp_path: Path, tower: VisualTower, monkeypatch: pytest.MonkeyPatch, outer: str, prefix: str) -> None:
    monkeypatch.setattr("model.synchformer_visual.VisualTowerConfig", lambda: SMALL)
    others = (
        {"module.a_encoder.cls": torch.zeros(1), "module.logit_scale": torch.tensor(0.07)}
        if prefix.startswith("module.")
        else {"aproj.bias": torch.zeros(2)}
    )
    inside = {prefix + name: t for name, t in tower.state_dict().items()}
    torch.save({outer: inside | others, "args": OmegaConf.create({"a": 1})}, tmp_path / "epoch_best.pt")
    assert_equal(dict(load_tower(tmp_path / "epoch_best.pt").state_dict()), dict(tower.state_dict()))
    inside.pop(f"{prefix}norm.bias")
    torch.save({outer: inside | others | {f"{prefix}head.bias": torch.zeros(1)}}, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match=r"1 missing \(norm\.bias\); 1 unexpected \(head\.bias\)"):
        load_tower(tmp_path / "wrong.pt")


# --- fetching ---

BYTES = os.urandom(300_001)


class Server(ThreadingHTTPServer):
    """A small web server that misbehaves on request: `cuts` are the byte counts after which the next answers break off."""

    cuts: list[int]
    ranges: list[str | None]
    knows_ranges: bool = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/w.th"


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride] - it serves no other

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        if self.path != "/w.th":
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.knows_ranges else 0
        if start >= len(BYTES):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(BYTES)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(BYTES) - 1}/{len(BYTES)}")
        self.send_header("Content-Length", str(len(BYTES) - start))
        self.end_headers()
        self.wfile.write(BYTES[start:][: self.server.cuts.pop(0) if self.server.cuts else None])

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.cuts, server.ranges = [], []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> Path:
    monkeypatch.setenv("SOUNDSHARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model.weights.time, "sleep", lambda _seconds: None)
    artifact = Artifact(server.url, "w.th", "for the test", md5=hashlib.md5(BYTES).hexdigest()[:7], sha256=hashlib.sha256(BYTES).hexdigest()[:8])
    monkeypatch.setitem(model.weights.KNOWN, "test", artifact)
    return tmp_path / "cache"


def test_fetch_puts_the_file_in_the_cache_once(cache: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match=r"soundshard weights get=test.*http://127"):
        resolve("test")
    assert main(["get=test"]) == 0
    assert capsys.readouterr().out.strip() == str(cache / "w.th")
    assert (cache / "w.th").read_bytes() == BYTES
    assert fetch("test", progress=False) == resolve("test") == cache / "w.th"
    assert server.ranges == [None]
    assert sorted(os.listdir(cache)) == ["w.th", "w.th.lock"]


def test_a_cut_connection_is_resumed_where_it_broke(cache: Path, server: Server) -> None:
    server.cuts = [100_003, 50_000, 0]
    fetch("test", progress=False)
    assert (cache / "w.th").read_bytes() == BYTES
    assert server.ranges == [None, "bytes=100003-", "bytes=150003-", "bytes=150003-"]


def test_after_giving_up_the_same_command_goes_on(cache: Path, server: Server) -> None:
    server.cuts = [70_001, 0, 0]
    with pytest.raises(ConnectionError, match=r"70,001 bytes that came are kept"):
        fetch("test", retries=1, progress=False)
    fetch("test", progress=False)
    assert (cache / "w.th").read_bytes() == BYTES
    assert server.ranges[-1] == "bytes=70001-"


@pytest.mark.parametrize("have", [len(BYTES), len(BYTES) + 5])
def test_a_part_that_is_whole_or_too_long_is_sorted_out(cache: Path, server: Server, have: int) -> None:
    cache.mkdir()
    (cache / "w.th.part").write_bytes((BYTES + b"12345")[:have])
    fetch("test", progress=False)
    assert (cache / "w.th").read_bytes() == BYTES
    assert len(server.ranges) == (1 if have == len(BYTES) else 2)


def test_a_server_without_ranges_starts_again(cache: Path, server: Server) -> None:
    server.knows_ranges, server.cuts = False, [100_003]
    fetch("test", progress=False)
    assert (cache / "w.th").read_bytes() == BYTES


def test_wrong_bytes_are_thrown_away(cache: Path) -> None:
    cache.mkdir()
    (cache / "w.th.part").write_bytes(bytes(1000))
    with pytest.raises(ValueError, match=r"md5 is .*, published is .*by hand"):
        fetch("test", progress=False)
    assert not (cache / "w.th").exists() and not (cache / "w.th.part").exists()
    fetch("test", progress=False)


def test_without_a_network_the_error_says_what_to_do(cache: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConnectionError, match=r"404.*put the file at .*w\.th by hand"):
        fetch("test", url=server.url + "x", progress=False)
    assert main(["get=test", "url=http://127.0.0.1:9/w.th"]) == 1
    told = capsys.readouterr().err
    assert "http://127.0.0.1:9/w.th: cannot be fetched" in told and str(cache / "w.th") in told


def test_the_list_shows_every_published_file(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.mkdir()
    (cache / "w.th").touch()
    assert run(WeightsConfig()) == []
    lines = capsys.readouterr().out
    assert "not here" in lines and "cached    for the test" in lines
    assert all(artifact.url in lines for artifact in model.weights.KNOWN.values())
    assert main(["get=nonsense"]) == 2


def test_known_files_have_different_names_in_the_cache() -> None:
    files = [artifact.file for artifact in model.weights.KNOWN.values()]
    assert len(set(files)) == len(files)
    assert json.dumps(files)


def test_resolve_tells_names_from_paths(tmp_path: Path) -> None:
    (tmp_path / "x.pt").touch()
    assert resolve(tmp_path / "x.pt") == tmp_path / "x.pt"
    with pytest.raises(ValueError, match="neither a file nor one of the published weights"):
        resolve("nonsense")
