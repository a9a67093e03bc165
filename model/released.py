"""The published V-AURA checkpoint, made into a run folder once: decoder, tower and codec as files of their own.

The file is the Lightning checkpoint of the reference training, with everything inside: `sampler.*` (the decoder), `visual_feature_extractor.*`
(the tower) and `audio_encoder.model.*` (DAC 44.1 kHz, in half precision). Every name has to belong to one of the three and to fit it. Sizes come from
names and shapes, so that smaller checkpoints of the same layout convert too; heads, which shapes cannot tell, from the file's own hyper-parameters
where they are plain data. Knows the three networks' names and how the experiment is packed; not how anything is generated.
"""

import errno
import fcntl
import gzip
import hashlib
import math
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from configs import storage
from configs.clock import SEGMENT_FRAMES, SEGMENT_TOKENS
from configs.load import JobError
from model.dac import Dac, DacCodec, DacConfig, dac_config
from model.run_folder import CONFIG, LAST, RunConfig, read_config, write_config
from model.synchformer_visual import VisualTower, VisualTowerConfig
from model.vaura import Vaura, VauraConfig
from model.weights import Checkpoint, Placeholder, read_checkpoint, save_state, sha256_file, told

C = TypeVar("C")
SAMPLER, TOWER, CODEC = "sampler.", "visual_feature_extractor.", "audio_encoder.model."
HEAD_CHANNELS = 96
"""Channels of an attention head of the published decoder."""
TOWER_HEAD_CHANNELS = 64
"""And of the tower."""
EXPECTED = "expected V-AURA's experiment as published: its .tar.gz, its folder (with checkpoints/*.ckpt) or one .ckpt of it"
OTHERS = {
    "v_encoder.": "Segment AVCLIP (stage I), which has the tower alone: use it with tower.weights=FILE",
    "vfeat_extractor.": "Synchformer (stage II or III), which scores synchronisation and makes no sound",
    "encoder.block.": "DAC, the codec alone: use it with codec.weights=FILE",
    "encoder.model.": "EnCodec, the codec alone: use it with codec.weights=FILE",
    "model.": "a checkpoint that `soundshard train` resumes from: its run folder is what `soundshard generate` reads",
}
"""By the first names in them: files that are not V-AURA's."""
SHOWN = 12
"""Names of each kind that an error lists."""


def install(out: Path, source: Callable[[], Path]) -> Path:
    """The run folder at `out`, made from what `source` gives (an archive, a folder or a .ckpt) if it is not there yet.

    All of it or nothing: `out` appears when everything is in it. Raises ValueError if the source is not V-AURA's or does not fit, JobError where
    the disk is full.
    """
    if (out / CONFIG).is_file():
        if not read_config(out).released:
            raise ValueError(f"{out} holds a run that `soundshard train` wrote; give another out=")
        print(f"{out} is there already, made from {read_config(out).origin.get('file')}; `soundshard generate run={out}` reads it")
        return out
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out} exists and is no run folder; give another out=, or remove it")
    given = source()
    try:
        with _working_folder(out) as work:
            checkpoint, origin = find_checkpoint(given, work)
            convert(checkpoint, work / "run", origin)
            os.rename(work / "run", out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise JobError(
            f"no room left beside {out} ({error}); nothing was kept there: free some 4 GB (12 GB for an archive), or give another out="
        ) from error
    return out


@contextmanager
def _working_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out`, gone at the end; those that killed conversions left go too, which a lock tells from those at work."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in [path for path in out.parent.iterdir() if path.name.startswith(f".{out.name}.") and path.name.endswith(".part")]:
        with _locked(left) as free:
            if free:
                shutil.rmtree(left)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        with _locked(work):
            yield work
    finally:
        shutil.rmtree(work)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether no other process has the folder; then it is this one's until the end."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


# --- finding the checkpoint -----------------------------------------------------------------------------------------------------------


def local_source(given: str) -> Path:
    """The experiment, or a copy of it, on this machine. FileNotFoundError if there is none."""
    if storage.is_remote(given) and not storage.is_file(given):
        return storage.local_folder(given)
    path = storage.local_copy(given)
    if not path.exists():
        raise FileNotFoundError(f"file={given}: there is no such file or folder; {EXPECTED}")
    return path


def find_checkpoint(given: Path, work: Path) -> tuple[Path, dict[str, Any]]:
    """The best checkpoint of what was given, as a file, and where it came from. From an archive, it is unpacked into `work`."""
    if given.is_dir():
        found = [path for pattern in ("*.ckpt", "checkpoints/*.ckpt", "*/checkpoints/*.ckpt") for path in given.glob(pattern) if path.is_file()]
        if not found:
            raise ValueError(f"{given}: no checkpoints/*.ckpt in this folder; {EXPECTED}")
        best = min(found, key=lambda path: rank(path.name))
        return best, origin_of(best.name, sha256_file(best))
    with given.open("rb") as file:
        start = file.read(512)
    if start[:2] == b"\x1f\x8b" or start[257:262] == b"ustar":
        name, sha256 = unpack(given, work / "unpacked.ckpt", compressed=start[:2] == b"\x1f\x8b")
        return work / "unpacked.ckpt", {**origin_of(name, sha256), "archive": given.name}
    if start[:4] != b"PK\x03\x04":
        raise ValueError(f"{given}: not a checkpoint ({told(given)}); {EXPECTED}")
    return given, origin_of(given.name, sha256_file(given))


def rank(name: str) -> tuple[int, float]:
    """The smaller, the better a checkpoint: by the validation loss in its name, then those without one, then Lightning's `last.ckpt`."""
    loss = origin_of(name, "").get("val_loss")
    return (0, loss) if loss is not None else (2 if name.startswith("last") else 1, 0.0)


def origin_of(name: str, sha256: str) -> dict[str, Any]:
    """What a checkpoint's file name says of it, `epoch=E-step=N-val_loss=X.ckpt`."""
    origin: dict[str, Any] = {"file": name, "sha256": sha256}
    for key, pattern, kind in (("epoch", r"\d+", int), ("step", r"\d+", int), ("val_loss", r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", float)):
        if found := re.search(rf"{key}=({pattern})", name):
            origin[key] = kind(found[1])
    return origin


def unpack(archive: Path, target: Path, *, compressed: bool) -> tuple[str, str]:
    """Writes the best checkpoint of a tar archive to `target`, in one pass; returns its name and sha256.

    No path of the archive is ever written to, and no link followed; an archive that points outside of itself is refused. Raises ValueError.
    """
    best, sha256, members = "", "", 0
    try:
        with (
            archive.open("rb") as raw,
            gzip.open(raw) if compressed else nullcontext(raw) as stream,
            tqdm(total=archive.stat().st_size, unit="B", unit_scale=True, desc=f"unpack {archive.name}") as bar,
        ):
            with tarfile.open(fileobj=cast(Any, stream), mode="r|", bufsize=1 << 20) as tar:
                for member in tar:
                    members += 1
                    _refuse_outside(archive, member)
                    name = member.name.rpartition("/")[2]
                    # Names with a dot in front are what macOS adds to archives.
                    if member.isreg() and name.endswith(".ckpt") and not name.startswith(".") and (not best or rank(name) < rank(best)):
                        best, sha256 = name, _extract(tar, member, target, lambda: bar.update(raw.tell() - bar.n))
            while stream.read(1 << 20):  # what is left, for gzip's checksum at the end
                bar.update(raw.tell() - bar.n)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{archive}: damaged or cut short ({error}); remove it and get it again") from error
    if not best:
        raise ValueError(f"{archive}: no .ckpt among its {members} entries; {EXPECTED}")
    return best, sha256


def _refuse_outside(archive: Path, member: tarfile.TarInfo) -> None:
    for path in (member.name, member.linkname):
        if path.startswith("/") or ".." in path.split("/"):
            raise ValueError(f"{archive}: refused. Its entry {member.name!r} leads out of the archive ({path!r}); get it from its publisher")


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path, progress: Callable[[], object]) -> str:
    """Writes an entry's content to a file of our choice, and returns its sha256."""
    content, digest = tar.extractfile(member), hashlib.sha256()
    assert content is not None
    with target.open("wb") as file:
        while block := content.read(1 << 20):
            digest.update(block)
            file.write(block)
            progress()
    return digest.hexdigest()


# --- accounting for every name --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """A checkpoint taken apart: each network's tensors under its own names, and its sizes."""

    sampler: dict[str, Tensor]
    tower: dict[str, Tensor]
    codec: dict[str, Tensor]
    vaura: VauraConfig
    tower_config: VisualTowerConfig
    codec_config: DacConfig
    heads_from: str
    """What said how many heads the decoder has."""


def take_apart(checkpoint: Checkpoint, path: Path) -> Parts:
    """Every tensor of the checkpoint, in its network. ValueError with all names that are missing, unknown, or of another shape."""
    named = state_dict(checkpoint.root, path)
    sampler, tower, codec = ({n.removeprefix(prefix): t for n, t in named.items() if n.startswith(prefix)} for prefix in (SAMPLER, TOWER, CODEC))
    settings = sampler_settings(checkpoint.root)
    problems: dict[str, list[str]] = {"unknown": [name for name in named if not name.startswith((SAMPLER, TOWER, CODEC))]}
    vaura = fit(sampler, SAMPLER, lambda: vaura_config(sampler, settings), VauraConfig(), Vaura, problems)
    visual = fit(tower, TOWER, lambda: tower_config(tower), VisualTowerConfig(), VisualTower, problems)
    dac = fit(codec, CODEC, lambda: dac_config(codec), DacConfig(), Dac, problems)
    complain(path, problems)
    check_agreement(path, vaura, visual, dac)
    return Parts(sampler, tower, codec, vaura, visual, dac, heads_told(settings))


def fit(
    tensors: Mapping[str, Tensor], prefix: str, derive: Callable[[], C], published: C, build: Callable[[C], nn.Module], problems: dict[str, list[str]]
) -> C:
    """The sizes of a network, from its tensors or as published, whichever fit better; what then does not fit is added to `problems`."""
    found: list[tuple[C, dict[str, list[str]]]] = []
    try:
        found.append((sizes := derive(), misfits(tensors, prefix, build, sizes)))
    except ValueError as error:
        problems.setdefault("sizes that cannot be", []).append(f"{prefix}* ({error})")
    if not found or any(found[0][1].values()):
        found.append((published, misfits(tensors, prefix, build, published)))
    sizes, least = min(found, key=lambda one: sum(map(len, one[1].values())))
    for what, names in least.items():
        problems.setdefault(what, []).extend(names)
    return sizes


def misfits(tensors: Mapping[str, Tensor], prefix: str, build: Callable[[C], nn.Module], sizes: C) -> dict[str, list[str]]:
    """What keeps the tensors from being a network of these sizes: names, by what is wrong with them."""
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in build(sizes).state_dict().items()}
    return {
        "missing": [prefix + name for name in expected if name not in tensors],
        "unknown": [prefix + name for name in tensors if name not in expected],
        "of another shape": [
            f"{prefix}{name} {tuple(tensors[name].shape)} instead of {shape}"
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ],
        "of whole numbers": [prefix + name for name in expected if name in tensors and not tensors[name].is_floating_point()],
    }


def state_dict(root: Any, path: Path) -> dict[str, Tensor]:
    """The checkpoint's tensors by name. ValueError that says what the file is instead, if it is not V-AURA's."""
    inner = next((root[key] for key in ("state_dict", "model") if isinstance(root.get(key), Mapping)), root) if isinstance(root, Mapping) else {}
    names = [str(name).removeprefix("module.") for name in inner]
    if not any(name.startswith((SAMPLER, TOWER, CODEC)) for name in names):
        is_it = next((what for start, what in OTHERS.items() if any(name.startswith(start) for name in names)), "")
        has = f"it is {is_it}" if is_it else f"it holds {', '.join(map(repr, names[:4])) or 'no weights'}"
        raise ValueError(f"{path} is not V-AURA's checkpoint: {has}; {EXPECTED}")
    complain(path, {"no tensors": [str(name) for name, value in inner.items() if not isinstance(value, Tensor)]})
    tensors: dict[str, Tensor] = {str(name): value for name, value in inner.items()}
    # A tensor may repeat what is stored, without end: a small file then asks for more memory than there is.
    complain(path, {"larger than what is stored of them": [name for name, t in tensors.items() if t.nbytes > t.untyped_storage().nbytes()]})
    return tensors


def complain(path: Path, problems: Mapping[str, list[str]]) -> None:
    """One error for everything that is wrong with the names."""
    lists = [
        f"{len(names)} {what}: {', '.join(names[:SHOWN])}{f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''}"
        for what, names in problems.items()
        if names
    ]
    if lists:
        raise ValueError(f"{path} does not hold V-AURA's tensors: {'; '.join(lists)}. Nothing was converted; get the file again, or another one")


def check_agreement(path: Path, vaura: VauraConfig, tower: VisualTowerConfig, codec: DacConfig) -> None:
    """The three networks have to fit each other. ValueError with both sizes."""
    agreements = {
        "codebooks": (vaura.codebooks, codec.codebooks, "the decoder's and the codec's"),
        "codes per codebook": (vaura.card, codec.card, "the decoder's and the codec's"),
        "features of a token": (vaura.feature_width, tower.width, "the decoder's and the tower's"),
        "tokens of a segment": (SEGMENT_TOKENS, tower.tokens, "the format's and the tower's"),
        "frames of a segment": (SEGMENT_FRAMES, tower.frames, "the format's and the tower's"),
        "tokens of a window beyond whole segments": (0, vaura.window_tokens % SEGMENT_TOKENS, "the format's and the decoder's"),
    }
    wrong = [f"{what} differ: {left} and {right}, {whose}" for what, (left, right, whose) in agreements.items() if left != right]
    if wrong:
        raise ValueError(f"{path}: its networks do not fit each other ({'; '.join(wrong)}); nothing was converted, get the file again")


# --- sizes ----------------------------------------------------------------------------------------------------------------------------


def vaura_config(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> VauraConfig:
    """The decoder's sizes. `settings` are the file's own, as far as they are plain data."""
    published = VauraConfig()
    width = size(tensors, published.width, (r"norm\.weight|layers\.\d+\.(attention|ffn)_norm\.weight", 0))
    return VauraConfig(
        layers=indices(tensors, r"layers\.(\d+)\.", published.layers),
        width=width,
        heads=whole(settings.get("nhead")) or max(1, width // HEAD_CHANNELS),
        visual_width=size(tensors, published.visual_width, (r"empty_video_emb", 2), (r".*\.fc[12]\.weight", 0), (r".*\.fc2\.weight", 1)),
        feature_width=size(tensors, published.feature_width, (r".*\.uncond_embedding", 1), (r".*\.fc1\.weight", 1)),
        codebooks=max(indices(tensors, rf"{part}\.(\d+)\.", published.codebooks) for part in ("lm_heads", "tok_embeddings")),
        card=size(tensors, published.card, (r"lm_heads\.\d+\.weight", 0)),
        codebook_dim=size(tensors, published.codebook_dim, (r"tok_embeddings\.\d+\.emb\.weight", 1), (r"tok_embeddings\..*\.weight_v", 1)),
        window_tokens=size(tensors, published.window_tokens, (r".*\.uncond_embedding", 0)),
        max_steps=whole(settings.get("block_size_audio")) or published.max_steps,
    )


def heads_told(settings: Mapping[str, Any]) -> str:
    """What says how many heads the decoder has, in words."""
    heads = whole(settings.get("nhead"))
    return f"as the file's sampler_config says (nhead {heads})" if heads else f"by the published {HEAD_CHANNELS} channels per head"


def tower_config(tensors: Mapping[str, Tensor]) -> VisualTowerConfig:
    """The tower's sizes; its heads by the published channels per head."""
    published = VisualTowerConfig()
    width = size(tensors, published.width, (r"(blocks\.\d+\.)?norm\d?\.weight", 0))
    embedding = r"patch_embed_3d\.proj\.weight"
    patch, tubelet = size(tensors, published.patch_size, (embedding, 3)), size(tensors, published.tubelet, (embedding, 2))
    patches = size(tensors, published.patches + 1, (r"pos_embed", 1)) - 1
    return VisualTowerConfig(
        image_size=math.isqrt(max(0, patches)) * patch,
        patch_size=patch,
        frames=size(tensors, published.tokens, (r"temp_embed", 1)) * tubelet,
        tubelet=tubelet,
        width=width,
        depth=indices(tensors, r"blocks\.(\d+)\.", published.depth),
        heads=max(1, width // TOWER_HEAD_CHANNELS),
        mlp_ratio=max(1, size(tensors, published.mlp_ratio * width, (r"blocks\.\d+\.mlp\.fc1\.weight", 0)) // max(1, width)),
    )


def size(tensors: Mapping[str, Tensor], default: int, *axes: tuple[str, int]) -> int:
    """What most of the tensors agree on: `axes` are patterns of names, and the axis of each that has this size. `default` where there are none."""
    votes = Counter(
        tensor.shape[axis] for pattern, axis in axes for name, tensor in tensors.items() if re.fullmatch(pattern, name) and tensor.dim() > axis
    )
    return votes.most_common(1)[0][0] if votes else default


def indices(tensors: Mapping[str, Tensor], pattern: str, default: int) -> int:
    """How many different numbers stand at one place of the names."""
    return len({found[1] for name in tensors if (found := re.match(pattern, name))}) or default


def whole(value: Any) -> int | None:
    """A positive whole number, or None for anything else that a file may have there."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def sampler_settings(root: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's own settings in the hyper-parameters, as far as they are plain data; empty if they are not there."""
    settings: Any = plain(root.get("hyper_parameters"))
    for key in ("sampler_config", "params"):
        settings = settings.get(key) if isinstance(settings, dict) else None
    return settings if isinstance(settings, dict) else {}


def plain(value: Any, *, depth: int = 12) -> Any:
    """Plain containers and values; those inside omegaconf's objects too, as their pickled state has them. None for everything else."""
    if depth == 0:
        return None
    if isinstance(value, Placeholder):
        state = value.state if isinstance(value.state, dict) else {}
        return plain(state.get("_content", state.get("_val")), depth=depth - 1)
    if isinstance(value, Mapping):
        return {key: plain(inner, depth=depth - 1) for key, inner in value.items() if isinstance(key, str)}
    if isinstance(value, list | tuple):
        return [plain(inner, depth=depth - 1) for inner in value]
    return value if isinstance(value, str | int | float | bool) else None


# --- writing --------------------------------------------------------------------------------------------------------------------------


def convert(path: Path, folder: Path, origin: Mapping[str, Any]) -> None:
    """Writes the run folder of a checkpoint. Memory holds one tensor at a time: the file is mapped, and let go of as it is written."""
    try:
        checkpoint = read_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"{error}; {EXPECTED}") from error
    parts = take_apart(checkpoint, path)
    networks: list[tuple[str, dict[str, Tensor], dict[str, Any]]] = [
        (f"{LAST}.safetensors", parts.sampler, asdict(parts.vaura)),
        ("weights/tower.safetensors", parts.tower, {"kind": "visual_tower", **asdict(parts.tower_config)}),
        ("weights/codec.safetensors", parts.codec, {"kind": "dac_codec", **asdict(parts.codec_config)}),
    ]
    with tqdm(total=sum(t.nbytes for _, tensors, _ in networks for t in tensors.values()), unit="B", unit_scale=True, desc="convert") as bar:

        def written(count: int) -> None:
            bar.update(count)
            checkpoint.release()

        for name, tensors, config in networks:
            save_state(folder / name, tensors, config, written=written)
    write_config(folder, describe(parts, folder, {**origin, **progress_of(checkpoint.root, origin)}))
    vaura, tower = parts.vaura, parts.tower_config
    print(
        f"{origin['file']}: {len(parts.sampler) + len(parts.tower) + len(parts.codec)} tensors. Decoder: {vaura.layers} layers, width {vaura.width}, "
        f"{vaura.heads} heads {parts.heads_from}; tower: {tower.depth} blocks, {tower.heads} heads by the published {TOWER_HEAD_CHANNELS} channels "
        f"per head; codec: {vaura.codebooks} codebooks"
    )
    if checkpoint.skipped_text:
        print(f"skipped: {checkpoint.skipped_text}")


def progress_of(root: Mapping[str, Any], origin: Mapping[str, Any]) -> dict[str, int]:
    """Epoch and step as the checkpoint itself has them, where its name does not say."""
    inside = {"epoch": root.get("epoch"), "step": root.get("global_step")}
    return {name: value for name, value in inside.items() if name not in origin and isinstance(value, int)}


def describe(parts: Parts, folder: Path, origin: dict[str, Any]) -> RunConfig:
    """The configuration of the run folder, given its weights files."""
    weights = {
        name: {"path": f"weights/{name}.safetensors", "sha256": sha256_file(folder / "weights" / f"{name}.safetensors")}
        for name in ("tower", "codec")
    }
    with torch.device("meta"):
        codec = DacCodec(parts.codec_config).spec()
    spec = {
        "hop_frames": SEGMENT_FRAMES,
        "tower": {"config": asdict(parts.tower_config), "weights_sha256": weights["tower"]["sha256"]},
        "codec": {**codec, "weights_sha256": weights["codec"]["sha256"]},
    }
    return RunConfig(
        parts.vaura,
        window_segments=parts.vaura.window_tokens // SEGMENT_TOKENS,
        data={"fingerprint": "", "spec": spec},
        weights=weights,
        released=True,
        origin=origin,
    )
