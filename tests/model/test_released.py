import ctypes
import errno
import gc
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

import model.released
from configs import cli, storage
from model.codecs import load_codec
from model.dac import Dac, DacConfig
from model.generate import Sampling, generate
from model.released import CODEC, SAMPLER, TOWER, rank
from model.run_folder import read_config, read_model, read_run_folder, write_config
from model.synchformer_visual import VisualTower, VisualTowerConfig, load_tower
from model.vaura import Vaura, VauraConfig
from model.weights import load_state, main, save_state, sha256_file
from tests.model.fill import checksum, fill, inp, inp_int

GOLDENS = Path(__file__).parent / "goldens"
SMALL = VauraConfig(layers=2, width=192, heads=4, visual_width=64)
"""The small decoder of the reference runs."""
SMALL_TOWER = VisualTowerConfig(image_size=32, depth=1, mlp_ratio=1)
SMALL_DAC = DacConfig(encoder_width=3, latent_width=11, decoder_width=48)
TINY = VauraConfig(layers=2, width=192, heads=4, visual_width=51, feature_width=64, codebooks=3, card=77)
"""A few megabytes in all, for files that are packed, cut and changed."""
TINY_TOWER = VisualTowerConfig(image_size=32, width=64, heads=1, depth=1, mlp_ratio=1)
TINY_DAC = DacConfig(encoder_width=3, latent_width=11, decoder_width=48, codebooks=3, card=77)
NAME = "epoch=37-step=166402-val_loss=5.0625.ckpt"


def weights(sampler: VauraConfig = SMALL, tower: VisualTowerConfig = SMALL_TOWER, dac: DacConfig = SMALL_DAC) -> dict[str, Tensor]:
    """A V-AURA of these sizes, filled by its names; the codec in half precision."""
    with torch.device("meta"):
        networks = {SAMPLER: Vaura(sampler), TOWER: VisualTower(tower), CODEC: Dac(dac)}
    shapes = {prefix + name: tuple(t.shape) for prefix, network in networks.items() for name, t in network.state_dict().items()}
    return {
        name: torch.from_numpy(fill(name, shape)).to(torch.float16 if name.startswith(CODEC) else torch.float32) for name, shape in shapes.items()
    }


def lightning(tensors: dict[str, Any], *, heads: int | None = 4, **more: Any) -> dict[str, Any]:
    """What the reference training writes, with omegaconf's objects and a live optimizer inside."""
    network = torch.nn.Linear(3, 5)
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.95))
    network(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    params = {
        "num_layers": 2,
        "d_model": 192,
        "d_codebook": 1024,
        "dim_feedforward": 4096,
        "dropout": 0.1,
        "num_codebooks": 9,
        "block_size_audio": 256,
    }
    sampler = {"target": "models.modules.sampler.llama.Transformer", "params": params | ({} if heads is None else {"nhead": heads})}
    stopping = {"wait_count": 2, "stopped_epoch": 0, "best_score": torch.tensor(5.0625), "patience": 10}
    kept = {"monitor": "val_loss_epoch", "best_model_path": NAME, "best_k_models": {NAME: torch.tensor(5.0625)}, "kth_value": np.float64(5.0625)}
    return {
        "epoch": 37,
        "global_step": 166402,
        "pytorch-lightning_version": "2.2.1",
        "state_dict": tensors,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 38, "completed": 37}}}},
        "callbacks": {"EarlyStopping{'monitor': 'val_loss_epoch', 'mode': 'min'}": stopping, "ModelCheckpoint{'monitor': 'val_loss_epoch'}": kept},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"warmup_steps": 1000, "base_lrs": [1.08e-4, 1.08e-4], "last_epoch": 1, "_last_lr": [1.08e-7]}],
        "MixedPrecision": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7},
        "hparams_name": "kwargs",
        "hyper_parameters": {
            "learning_rate": 1.08e-4,
            "lr_scheduler": {
                "target": "models.modules.misc.lr_schedulers.CosineLRScheduler",
                "params": {"warmup_steps": 1000, "optimizer": optimizer},
            },
            "betas": OmegaConf.create([0.9, 0.95]),
            "feature_extractor_config": OmegaConf.create({"target": "MotionFormer", "params": {"ckpt_path": None, "extract_features": True}}),
            "sampler_config": OmegaConf.create(sampler),
            "files_to_track_during_training": None,
        },
        **more,
    }


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return weights(TINY, TINY_TOWER, TINY_DAC)


def saved(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A checkpoint in its place in an experiment's folder."""
    path = folder / "24-08-01T08-34-26" / "checkpoints" / NAME
    path.parent.mkdir(parents=True)
    torch.save(lightning(tensors), path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor]) -> Path:
    return saved(tmp_path_factory.mktemp("published"), tensors)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOUNDSHARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def convert(given: Path, out: Path, capsys: pytest.CaptureFixture[str], *, status: int = 0) -> str:
    """What the command says, with its status checked; after an error nothing may be left."""
    before = set(out.parent.iterdir()) if out.parent.exists() else set()
    code = cli.main(["weights", "get=vaura", f"file={given}", f"out={out}"])
    told = capsys.readouterr()
    assert code == status, told.err
    if status:
        assert set(out.parent.iterdir()) == before
        return told.err
    return told.out


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    out = tmp_path_factory.mktemp("converted") / "vaura"
    assert main(["get=vaura", f"file={checkpoint}", f"out={out}"]) == 0
    return out


# --- a whole conversion ---------------------------------------------------------------------------------------------------------------


def test_a_converted_model_makes_the_tokens_of_the_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(saved(tmp_path, weights()), tmp_path / "out", capsys)
    config, vaura = read_run_folder(tmp_path / "out")
    assert vaura.config == SMALL and config.released and load_tower(tmp_path / "out/weights/tower.safetensors").config == SMALL_TOWER
    with np.load(GOLDENS / "vaura.npz") as golden:
        for guidance in (1.0, 3.0):
            made = generate(vaura, inp("vis32", (2, 32, 768)), steps=64, sampling=Sampling(greedy=True, guidance=guidance))
            assert np.array_equal(made.numpy(), golden[f"greedy64_cfg{guidance}"])


def test_every_tensor_comes_out_as_it_was_stored(converted: Path, tensors: dict[str, Tensor]) -> None:
    files = {SAMPLER: "model.safetensors", TOWER: "weights/tower.safetensors", CODEC: "weights/codec.safetensors"}
    assert sorted(str(p.relative_to(converted)) for p in converted.rglob("*") if p.is_file()) == sorted(["config.yaml", *files.values()])
    read = {prefix + name: t for prefix, file in files.items() for name, t in load_state(converted / file)[0].items()}
    assert read.keys() == tensors.keys()
    assert all(t.dtype == tensors[name].dtype and torch.equal(t, tensors[name]) for name, t in read.items())
    assert {t.dtype for name, t in read.items() if name.startswith(CODEC)} == {torch.float16}


def test_the_folder_says_all_that_generation_asks(converted: Path, checkpoint: Path) -> None:
    config = read_config(converted)
    for network, load in (("tower", load_tower), ("codec", load_codec)):
        path = config.weights_path(converted, network)
        assert path is not None and sha256_file(path) == config.data["spec"][network]["weights_sha256"] == config.weights[network]["sha256"]
        load(path)
    assert load_tower(converted / "weights/tower.safetensors").config == TINY_TOWER and config.model == TINY
    codec = config.data["spec"]["codec"]
    assert (codec["name"], codec["codebooks"], codec["card"], codec["sample_rate_hz"], codec["hop_samples"]) == ("dac44", 3, 77, 44100, 512)
    assert config.window_segments == 4 and config.codec_clock.steps_in(4) == 220
    assert "window_steps: 220" in (converted / "config.yaml").read_text()
    # In a window, the released model's token has 7 steps; its codec's clock has 441 in 64 tokens.
    assert config.model.token_clock == 7 and config.codec_clock.rate * 64 * 2 / 25 == 441
    assert config.origin == {"file": NAME, "sha256": sha256_file(checkpoint), "epoch": 37, "step": 166402, "val_loss": 5.0625}


def test_the_codec_in_the_folder_makes_sound(converted: Path) -> None:
    codec = load_codec(converted / "weights/codec.safetensors")
    sound = codec.decode(inp_int("codes", (1, 3, 5), 77))
    assert sound.shape == (1, 1, 5 * 512) and sound.isfinite().all() and sound.std() > 0


def test_the_command_says_what_was_made_and_what_was_skipped(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = convert(checkpoint, tmp_path / "out", capsys)
    assert f"{NAME}: {len(torch.load(checkpoint, weights_only=False)['state_dict'])} tensors. Decoder: 2 layers, width 192, 4 heads" in told
    assert "as the file's sampler_config says (nhead 4)" in told and told.strip().endswith(str(tmp_path / "out"))
    assert "omegaconf.dictconfig.DictConfig (4)" in told and "torch.optim.adamw.AdamW (1)" in told and "numpy._core.multiarray.scalar (1)" in told
    assert "builtins" not in told and "typing" not in told
    again = convert(checkpoint, tmp_path / "out", capsys)
    assert f"{tmp_path / 'out'} is there already, made from {NAME}" in again


def test_without_plain_settings_heads_are_those_of_the_published_rule(
    tensors: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(lightning(tensors, heads=None), tmp_path / "last.ckpt")
    assert "2 heads by the published 96 channels per head" in convert(tmp_path / "last.ckpt", tmp_path / "out", capsys)
    assert read_model(tmp_path / "out").config.heads == 2
    # The file's name says nothing; the checkpoint itself does.
    origin = read_config(tmp_path / "out").origin
    assert (origin["epoch"], origin["step"], "val_loss" in origin) == (37, 166402, False)
    torch.save(lightning(tensors, heads=7), tmp_path / "odd.ckpt")
    assert "width=192, heads=7" in convert(tmp_path / "odd.ckpt", tmp_path / "odd", capsys, status=2)


def test_settings_may_be_plain_or_strange(tensors: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    around: dict[str, Any] = {}
    around["sampler_config"] = around
    for number, (settings, heads) in enumerate(
        [({"sampler_config": {"params": {"nhead": 6}}}, 6), (around, 2), ({"sampler_config": [3]}, 2), (None, 2)]
    ):
        torch.save({"state_dict": tensors, "hyper_parameters": settings}, tmp_path / "x.ckpt")
        convert(tmp_path / "x.ckpt", tmp_path / f"out{number}", capsys)
        assert read_config(tmp_path / f"out{number}").model.heads == heads


def test_a_folder_of_before_reads_as_it_did(converted: Path, tmp_path: Path) -> None:
    config = read_config(converted)
    write_config(tmp_path, config)
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.partition("released:")[0] + "train: {}\n")
    old = read_config(tmp_path)
    assert not old.released and old.origin == {} and old.weights == config.weights and old.model == config.model


# --- what may be given ----------------------------------------------------------------------------------------------------------------


def pack(path: Path, members: dict[str, bytes | Path | tarfile.TarInfo], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode, **{"compresslevel": 1} if mode == "w:gz" else {}) as tar:  # pyright: ignore[reportArgumentType, reportCallIssue] - as above
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                data = content.read_bytes() if isinstance(content, Path) else content
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_the_best_checkpoint_is_the_one_with_the_smallest_loss_in_its_name() -> None:
    names = [
        "last.ckpt",
        "epoch=9-step=8-val_loss=10.5.ckpt",
        "some.ckpt",
        "epoch=1-step=99-val_loss=9.75-v1.ckpt",
        "last-v2.ckpt",
        "e-val_loss=1e1.ckpt",
    ]
    assert sorted(names, key=rank) == [names[3], names[5], names[1], names[2], names[0], names[4]]


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_an_archive_gives_its_best_checkpoint(
    checkpoint: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    members = {
        "24-08-01T08-34-26/hparams.yaml": b"a: 1",
        "24-08-01T08-34-26/checkpoints/._" + NAME: b"mac",
        "24-08-01T08-34-26/checkpoints/epoch=3-step=9-val_loss=6.5.ckpt": b"worse, and first",
        f"24-08-01T08-34-26/checkpoints/{NAME}": checkpoint,
        "24-08-01T08-34-26/checkpoints/epoch=40-step=9-val_loss=5.5.ckpt": b"worse, and later",
        "24-08-01T08-34-26/checkpoints/last.ckpt": link("24-08-01T08-34-26/checkpoints/last.ckpt", NAME),
    }
    pack(tmp_path / "a.tar.gz", members, mode)
    convert(tmp_path / "a.tar.gz", tmp_path / "out", capsys)
    for file in ("model.safetensors", "weights/tower.safetensors", "weights/codec.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (converted / file).read_bytes()
    assert read_config(tmp_path / "out").origin == {**read_config(converted).origin, "archive": "a.tar.gz"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.gz", "out"]


def test_a_folder_gives_its_best_checkpoint(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = tmp_path / "24-08-01T08-34-26"
    (experiment / "checkpoints").mkdir(parents=True)
    (experiment / "checkpoints" / NAME).hardlink_to(checkpoint)
    (experiment / "checkpoints" / "last.ckpt").write_text("not this one")
    for number, given in enumerate([experiment, experiment / "checkpoints", tmp_path]):
        convert(given, tmp_path / f"out{number}", capsys)
        assert read_config(tmp_path / f"out{number}").origin["file"] == NAME
    (tmp_path / "empty").mkdir()
    assert "no checkpoints/*.ckpt in this folder" in convert(tmp_path / "empty", tmp_path / "out", capsys, status=2)
    assert "no such file or folder" in convert(tmp_path / "none", tmp_path / "out", capsys, status=2)


def test_without_a_place_the_folder_goes_to_the_cache_and_nothing_is_fetched(
    checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = pack(checkpoint.parents[2] / "a.tar.gz", {f"x/checkpoints/{NAME}": checkpoint})
    asked: list[Any] = []

    def fetched(name: str, *, url: str | None) -> Path:
        asked.append((name, url))
        return archive

    monkeypatch.setattr("model.weights.fetch", fetched)
    assert main(["get=vaura", "url=http://127.0.0.1:9/mirror"]) == main(["get=vaura"]) == main(["get", "vaura"]) == 0
    assert asked == [("vaura", "http://127.0.0.1:9/mirror")], "what is there is not fetched again"
    assert read_config(cache / "vaura").origin["archive"] == "a.tar.gz"
    assert capsys.readouterr().out.strip().endswith(str(cache / "vaura"))


def test_options_for_the_run_folder_are_refused_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["get=avclip", "file=x"]) == main([f"out={tmp_path}"]) == main(["get=vaura,avclip", "file=x"]) == 2
    assert "give them with get=vaura alone" in capsys.readouterr().err
    assert main(["get=vaura", "file=x", "out=s3://bucket/x"]) == 2


def test_a_folder_that_holds_something_else_is_left_alone(
    checkpoint: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    assert "exists and is no run folder" in convert(checkpoint, tmp_path / "out", capsys, status=2)
    write_config(tmp_path / "run", replace(read_config(converted), released=False))
    assert "holds a run that `soundshard train` wrote" in convert(checkpoint, tmp_path / "run", capsys, status=2)


# --- what is refused ------------------------------------------------------------------------------------------------------------------

Tensors = dict[str, Any]


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if name not in names}


def with_(**changed: Any) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name.replace("__", "."): value for name, value in changed.items()}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            without("sampler.norm.weight", "audio_encoder.model.decoder.model.0.bias"),
            "2 missing: sampler.norm.weight, audio_encoder.model.decoder.model",
        ),
        (without("visual_feature_extractor.patch_embed.proj.bias"), "1 missing: visual_feature_extractor.patch_embed.proj.bias"),
        (with_(sampler__freqs=torch.zeros(2), discriminator__bias=torch.zeros(3)), "2 unknown: discriminator.bias, sampler.freqs"),
        (with_(sampler__norm__weight=torch.zeros(7)), "1 of another shape: sampler.norm.weight (7,) instead of (192,)"),
        (with_(visual_feature_extractor__norm__bias=torch.zeros(1, 64)), "visual_feature_extractor.norm.bias (1, 64) instead of (64,)"),
        (with_(sampler__norm__weight=torch.zeros(192, dtype=torch.int64)), "1 of whole numbers: sampler.norm.weight"),
        (with_(sampler__norm__weight=torch.zeros(1).expand(10**12)), "1 larger than what is stored of them: sampler.norm.weight"),
        (with_(sampler__norm__weight="no tensor"), "1 no tensors: sampler.norm.weight"),
        (lambda t: {n: v for n, v in t.items() if not n.startswith(CODEC)}, "301 missing: audio_encoder.model.encoder.block.0.bias"),
        (lambda t: {n: v for n, v in t.items() if not n.startswith(SAMPLER)}, "218 missing: sampler.empty_video_emb"),
        (lambda t: {n: v for n, v in t.items() if ".quantizers.2." not in n}, "codebooks differ: 3 and 2, the decoder's and the codec's"),
        (lambda t: {n: v for n, v in t.items() if "lm_heads.2." not in n and "tok_embeddings.2." not in n}, "codebooks differ: 2 and 3"),
    ],
)
def test_what_does_not_fit_is_listed(
    tensors: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Tensors], Tensors], told: str
) -> None:
    torch.save(lightning(change(dict(tensors))), tmp_path / "x.ckpt")
    error = convert(tmp_path / "x.ckpt", tmp_path / "out", capsys, status=2)
    assert told in error and "x.ckpt" in error and len(error.strip().splitlines()) == 1


def test_problems_of_several_kinds_are_one_error(tensors: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = with_(sampler__x=torch.zeros(1), sampler__layers__0__attention__wo__weight=torch.zeros(5, 5))(
        without("sampler.empty_video_emb")(dict(tensors))
    )
    torch.save(lightning(changed), tmp_path / "x.ckpt")
    error = convert(tmp_path / "x.ckpt", tmp_path / "out", capsys, status=2)
    assert "1 missing: sampler.empty_video_emb; " in error or "1 missing: sampler.empty_video_emb." in error
    assert "1 unknown: sampler.x" in error and "1 of another shape: sampler.layers.0.attention.wo.weight (5, 5) instead of (192, 192)" in error


def other(path: Path, kind: str, tensors: dict[str, Tensor]) -> Path:
    """A file that is not V-AURA's."""
    inside = {name.removeprefix(prefix): t for prefix in (TOWER, CODEC) for name, t in tensors.items() if name.startswith(prefix)}
    if kind == "stage 1":
        torch.save({"epoch": 3, "state_dict": {f"module.v_encoder.{n}": t for n, t in inside.items()}, "args": OmegaConf.create({"a": 1})}, path)
    elif kind == "sync":
        torch.save({"model": {f"vfeat_extractor.{n}": t for n, t in inside.items()}}, path)
    elif kind == "dac":
        torch.save({"state_dict": {n.removeprefix(CODEC): t for n, t in tensors.items() if n.startswith(CODEC)}, "metadata": {}}, path)
    elif kind == "ours":
        torch.save({"state_dict": {"model.norm.weight": torch.zeros(3)}, "epoch": 1}, path)
    elif kind == "page":
        path.write_text("<!DOCTYPE html>\n<title>Sign in</title>")
    elif kind == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\nsize 3\n")
    elif kind == "empty":
        path.touch()
    elif kind == "cut":
        torch.save(lightning(tensors), path)
        os.truncate(path, path.stat().st_size * 2 // 3)
    elif kind == "list":
        torch.save([1, 2, 3], path)
    elif kind == "safetensors":
        save_state(path.with_suffix(".safetensors"), {"a": torch.zeros(3)}, {})
        path.with_suffix(".safetensors").rename(path)
    return path


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("stage 1", "it is Segment AVCLIP (stage I)"),
        ("sync", "it is Synchformer"),
        ("dac", "it is DAC, the codec alone"),
        ("ours", "a checkpoint that `soundshard train` resumes from"),
        ("page", "is a web page"),
        ("text", "is text"),
        ("empty", "it is empty"),
        ("cut", "damaged (it has"),
        ("list", "no weights"),
        ("safetensors", "is safetensors"),
    ],
)
def test_other_files_are_called_what_they_are(
    tensors: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, told: str
) -> None:
    error = convert(other(tmp_path / "x.ckpt", kind, tensors), tmp_path / "out", capsys, status=2)
    assert told in error and "expected V-AURA's experiment as published" in error and len(error.strip().splitlines()) == 1


def test_broken_archives_leave_nothing(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = pack(tmp_path / "whole.tar.gz", {f"x/checkpoints/{NAME}": checkpoint}).read_bytes()
    broken = {
        "cut": whole[: len(whole) // 2],
        "cut at the end": whole[:-4],
        "changed": whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 255]) + whole[len(whole) // 2 + 1 :],
        "cut inside": gzip.compress(gzip.decompress(whole)[:-200_000], 1),
        "no tar": gzip.compress(b"no tar" * 1000),
    }
    for name, content in broken.items():
        (tmp_path / "x.tar.gz").write_bytes(content)
        error = convert(tmp_path / "x.tar.gz", tmp_path / "out", capsys, status=2)
        assert "damaged or cut short" in error and "get it again" in error, name
    pack(tmp_path / "x.tar.gz", {"x/hparams.yaml": b"a: 1", "x/checkpoints/last.ckpt": link("x/checkpoints/last.ckpt", "gone.ckpt")})
    assert "no .ckpt among its 2 entries" in convert(tmp_path / "x.tar.gz", tmp_path / "out", capsys, status=2)


@pytest.mark.parametrize(
    "entry",
    [
        tarfile.TarInfo("../../evil.ckpt"),
        tarfile.TarInfo("/tmp/evil.ckpt"),
        link("x/a.ckpt", "/etc/passwd"),
        link("x/a.ckpt", "../../a.ckpt"),
        link("x/a.ckpt", "../../a.ckpt", tarfile.LNKTYPE),
    ],
)
def test_archives_that_lead_out_of_themselves_are_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], entry: tarfile.TarInfo
) -> None:
    pack(tmp_path / "x.tar.gz", {f"x/checkpoints/{NAME}": checkpoint, "entry": entry})
    assert "refused. Its entry" in convert(tmp_path / "x.tar.gz", tmp_path / "out", capsys, status=2)


class Hostile:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.reduced = (call, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("packed", [False, True])
def test_a_hostile_checkpoint_is_refused_and_runs_nothing(
    tensors: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str], packed: bool
) -> None:
    mark, path = tmp_path / "ran", tmp_path / NAME
    torch.save(lightning(tensors, callbacks={"deep": [{"er": (Hostile(os.system, f"touch {mark}"),)}]}), path)
    given = pack(tmp_path / "x.tar.gz", {f"x/checkpoints/{NAME}": path}) if packed else path
    error = convert(given, tmp_path / "out", capsys, status=2)
    assert "refused. Its pickle names posix.system" in error and not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the attack works on a reader that trusts the file"


# --- interruptions --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trouble", "status"), [(KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, "No space left on device"), 1)])
@pytest.mark.parametrize("at", ["weights/codec.safetensors", "config.yaml", "unpacked.ckpt"])
def test_an_interruption_leaves_nothing(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trouble: BaseException,
    status: int,
    at: str,
) -> None:
    archive = pack(tmp_path / "x.tar.gz", {f"x/checkpoints/{NAME}": checkpoint})

    @contextmanager
    def breaking(path: str) -> Iterator[Any]:
        with writing(path) as file:
            yield file
            if str(path).endswith(at):
                raise trouble

    def stop(*_arguments: object) -> None:
        raise trouble

    writing = storage.writing
    monkeypatch.setattr(storage, "writing", breaking)
    if at == "config.yaml":
        monkeypatch.setattr(model.released, "write_config", stop)
    elif at == "unpacked.ckpt":
        monkeypatch.setattr(model.released, "_extract", stop)
    error = convert(archive, tmp_path / "out", capsys, status=status)
    assert "interrupted" in error if status == 130 else "no room left" in error
    monkeypatch.undo()
    convert(archive, tmp_path / "out", capsys)


def test_what_a_killed_conversion_left_is_removed_by_the_next(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (".out.abc.part", ".other.abc.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "unpacked.ckpt").write_text("half")
    with model.released._locked(tmp_path / ".out.abc.part") as free:
        assert free
        convert(checkpoint, tmp_path / "out", capsys)
        assert (tmp_path / ".out.abc.part").exists(), "a conversion at work keeps its folder"
    (tmp_path / "out").rename(tmp_path / "first")
    convert(checkpoint, tmp_path / "out", capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.abc.part", "first", "out"]


# --- the published size ---------------------------------------------------------------------------------------------------------------

CONVERT = """
import sys
from model.weights import load_state, main, save_state, sha256_file

def peak():  # not getrusage's, which begins with what the starting process, these tests, has ever held
    return next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
status = main(["get=vaura", "file=" + sys.argv[1], "out=" + sys.argv[2]])
print("KiB", before, peak())
raise SystemExit(status)
"""


@pytest.fixture
def memory_given_back() -> Iterator[None]:
    """What a large test has let go of goes back to the system, which the allocator would keep: other tests run beside these."""
    yield
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@pytest.mark.slow
@pytest.mark.usefixtures("memory_given_back")
def test_the_published_size_converts_in_little_memory_to_the_numbers_of_the_reference(tmp_path: Path) -> None:
    """All 757 names. 3.4 GB are written, and as much again by the conversion; the numbers are made once."""
    names = json.loads((GOLDENS / "vaura_keys.json").read_text())["full"], json.loads((GOLDENS / "visual_keys.json").read_text())
    codec = json.loads((GOLDENS / "vaura_codec_keys.json").read_text())
    shapes = {prefix + n: tuple(s) for prefix, part in zip((SAMPLER, TOWER, CODEC), (*names, codec), strict=True) for n, s in part.items()}
    assert len(shapes) == 757

    def filled(name: str) -> Tensor:
        return torch.from_numpy(fill(name, shapes[name])).to(torch.float16 if name.startswith(CODEC) else torch.float32)

    try:
        with ThreadPoolExecutor(2) as pool:  # numpy draws without holding Python's lock
            torch.save(lightning(dict(zip(shapes, pool.map(filled, shapes), strict=True)), heads=16), tmp_path / NAME)
        out = tmp_path / "vaura"
        done = subprocess.run([sys.executable, "-c", CONVERT, str(tmp_path / NAME), str(out)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "757 tensors. Decoder: 24 layers, width 1536, 16 heads as the file's sampler_config says" in done.stdout
        assert "tower: 12 blocks, 12 heads" in done.stdout
        before, peak = map(int, done.stdout.rpartition("KiB")[2].split())
        assert peak - before < 300 << 10, f"{(peak - before) >> 10} MiB for a file of {(tmp_path / NAME).stat().st_size >> 20} MiB"
        (tmp_path / NAME).unlink()

        config, vaura = read_run_folder(out)
        assert config.model == VauraConfig() and (config.window_segments, config.released) == (4, True)
        files = {SAMPLER: "model.safetensors", TOWER: "weights/tower.safetensors", CODEC: "weights/codec.safetensors"}
        written = {prefix + name: tuple(t.shape) for prefix, file in files.items() for name, t in load_state(out / file)[0].items()}
        assert written == shapes
        with torch.inference_mode(), np.load(GOLDENS / "vaura_full.npz") as golden:
            logits = vaura(inp_int("tokfull", (1, 9, 24), 1025), inp("visfull", (1, 32, 768))).transpose(1, 2)
            np.testing.assert_allclose(logits[0, :, golden["logits_pos"]].numpy(), golden["logits"], atol=1e-4)
            assert np.array_equal(logits.argmax(-1).numpy(), golden["argmax"])
            np.testing.assert_allclose(checksum(logits.numpy()), golden["logits_sum"], atol=1e-5)
        tower = load_tower(out / "weights/tower.safetensors")
        with torch.inference_mode(), np.load(GOLDENS / "released.npz") as golden:
            np.testing.assert_allclose(tower(inp("visual1", (1, 1, 3, 16, 224, 224))).numpy(), golden["visual_feats"], atol=1e-4)
        assert load_codec(out / "weights/codec.safetensors").name == "dac44"
    finally:
        shutil.rmtree(tmp_path)  # pytest would keep the gigabytes for three runs
