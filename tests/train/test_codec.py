"""Where the embeddings begin: the codec's codebooks if its file is here, and what is said if it is not."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.codecs import load_codec
from model.vaura import principal_components
from tests.train.data import CARD, CODEBOOKS, TEN_STEPS, small_config, write_codec, write_features
from train.vaura import run

STILL = ["trainer.max_steps=1", "schedule.warmup_steps=1", "schedule.total_steps=2"]
"""One step at a learning rate of 0: what is saved is the start."""


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_codec(tmp_path_factory.mktemp("codec") / "codec.safetensors")


@pytest.fixture(scope="module")
def data(codec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_features(tmp_path_factory.mktemp("data") / "features", codec_weights=codec)


def tables(folder: Path) -> list[torch.Tensor]:
    state = load_file(folder / "model.safetensors")
    return [state[f"tok_embeddings.{k}.emb.weight"] for k in range(CODEBOOKS)]


def test_embeddings_begin_with_the_codec_and_all_else_as_it_would(data: Path, codec: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(small_config(data, tmp_path / "auto", *STILL))
    assert f"start  embeddings from the codebooks of {codec}" in capsys.readouterr().out
    run(small_config(data, tmp_path / "random", *STILL, "embeddings=random"))
    assert "start  embeddings at random\n" in capsys.readouterr().out
    expected = [principal_components(table, 4) for table in load_codec(codec).codebook_tables().tables]
    for ours, table in zip(tables(tmp_path / "auto"), expected, strict=True):
        torch.testing.assert_close(ours[:CARD], table)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("auto", "random"))
    assert {name for name in one if not torch.equal(one[name], other[name])} == {f"tok_embeddings.{k}.emb.weight" for k in range(CODEBOOKS)}
    assert all(torch.equal(a[CARD], b[CARD]) for a, b in zip(tables(tmp_path / "auto"), tables(tmp_path / "random"), strict=True))


def test_the_file_may_be_in_the_cache(
    data: Path, codec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("SOUNDSHARD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    hidden = codec.rename(codec.with_name("hidden"))
    try:
        shutil.copy(hidden, tmp_path / "cache" / codec.name)
        run(small_config(data, tmp_path / "run", *STILL, "embeddings=codec"))
    finally:
        hidden.rename(codec)
    assert f"from the codebooks of {tmp_path / 'cache' / codec.name}" in capsys.readouterr().out


def test_a_codec_that_is_not_here_is_told_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = write_codec(tmp_path / "codec.safetensors")
    data = write_features(tmp_path / "data", codec_weights=file)
    file.write_bytes(b"another")
    run(small_config(data, tmp_path / "run", *STILL))
    assert f"start  embeddings at random: {file} is another file than the dataset was made with" in capsys.readouterr().out
    file.unlink()
    with pytest.raises(
        ValueError, match=r"embeddings=codec: the codec's weights are needed, and .*codec.safetensors is not here; put the file there"
    ):
        run(small_config(data, tmp_path / "other", *STILL, "embeddings=codec"))
    assert not (tmp_path / "other").exists()


def test_a_resumed_run_asks_for_no_codec(tmp_path: Path) -> None:
    file = write_codec(tmp_path / "codec.safetensors")
    data = write_features(tmp_path / "data", codec_weights=file)
    options = [*TEN_STEPS, "copy_weights=false", "trainer.val_check_interval=0", "embeddings=codec"]
    run(small_config(data, tmp_path / "straight", *options))
    run(small_config(data, tmp_path / "parts", *options, "trainer.max_steps=6"))
    file.unlink()
    run(small_config(data, tmp_path / "parts", *options))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
