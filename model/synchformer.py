"""Synchformer: by how much sound and pictures are apart, and whether they belong together at all (Iashin et al. 2024, sec. 3.2 and 3.4).

The towers of Segment AVCLIP give tokens for every segment; a small transformer over all tokens of all segments answers, from its first
token, with one of 21 offsets or with one of two classes (cannot, can be synchronised). Parameter names are those of the published files.
This module knows tensors and weights files; where segments lie in a clip is `model.segments`' matter.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from model.motion_tower import MotionTower
from model.segments import OFFSET, OFFSET_CLASSES, SYNCHRONISABLE
from model.synchformer_audio import AudioTower, audio_config, load_audio_tower, new_audio_tower
from model.synchformer_visual import VisualTower, load_tower, new_tower, tower_config
from model.weights import load_state, load_strictly, resolve, save_state, sha256_file

Head = Literal["offset", "synchronisable"]
KIND = "synchformer"
MODULE_KIND = "synchformer_module"
"""Of a file that holds what is above the towers, and says which files hold those."""
POSITIONS = "transformer.pos_emb_cfg.pos_emb"
INIT_STD = 0.02


@dataclass(frozen=True)
class SyncConfig:
    """The shape of what is above the towers. The defaults are the published network's for offsets (stage II)."""

    head: Head = "offset"
    """`offset`: which offset; `synchronisable`: whether there is one (stage III, with 13 segments)."""
    offset_classes: int = OFFSET_CLASSES
    """Offsets to choose from, the middle one being none."""
    segments: int = OFFSET.segments
    """Segments of a cut."""
    visual_tokens: int = 8
    """Tokens of the visual tower for a segment."""
    visual_width: int = 768
    """Features of a visual token."""
    audio_tokens: int = 6
    """Tokens of the audio tower for a segment."""
    audio_width: int = 768
    """Features of an audio token."""
    width: int = 768
    """Features inside the transformer."""
    depth: int = 3
    """Transformer layers."""
    heads: int = 8
    """Attention heads."""
    mlp_ratio: int = 4
    """Hidden features of an MLP, in widths."""
    dropout: float = 0.1
    """While training: of the embeddings, of attention weights and of what is added to the residual."""

    def __post_init__(self) -> None:
        if self.width % self.heads or self.offset_classes % 2 == 0:
            raise ValueError(
                f"width {self.width}, offset_classes {self.offset_classes}: expected a multiple of heads {self.heads}, and an odd number"
            )

    @property
    def classes(self) -> int:
        """Numbers that the head gives."""
        return self.offset_classes if self.head == "offset" else 2

    @property
    def tokens(self) -> int:
        """Length of the transformer's sequence: both kinds of tokens, and one before each."""
        return 2 + self.segments * (self.visual_tokens + self.audio_tokens)


class SelfAttention(nn.Module):
    """Attention of some tokens to all."""

    def __init__(self, config: SyncConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.key, self.query, self.value, self.proj = (nn.Linear(config.width, config.width) for _ in range(4))

    def forward(self, x: Float[Tensor, "b tokens d"], *, queries: int) -> Float[Tensor, "b queries d"]:
        q, k, v = (
            rearrange(layer(y), "b t (h d) -> b h t d", h=self.heads) for layer, y in ((self.query, x[:, :queries]), (self.key, x), (self.value, x))
        )
        dropout = self.dropout if self.training else 0.0
        mixed = rearrange(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout), "b h t d -> b t (h d)")
        return F.dropout(self.proj(mixed), self.dropout, self.training)


class Block(nn.Module):
    """A pre-norm transformer layer with an exact GELU."""

    def __init__(self, config: SyncConfig) -> None:
        super().__init__()
        hidden = config.mlp_ratio * config.width
        self.ln1, self.ln2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attn = SelfAttention(config)
        self.mlp = nn.Sequential(nn.Linear(config.width, hidden), nn.GELU(), nn.Linear(hidden, config.width), nn.Dropout(config.dropout))

    def forward(self, x: Float[Tensor, "b tokens d"], *, first: int | None = None) -> Float[Tensor, "b kept d"]:
        """The layer's output for all tokens, or only for the `first` ones (which see all)."""
        kept = x.shape[1] if first is None else first
        x = x[:, :kept] + self.attn(self.ln1(x), queries=kept)
        return x + self.mlp(self.ln2(x))


class Positions(nn.Module):
    """A learned embedding for every place of the sequence."""

    def __init__(self, config: SyncConfig) -> None:
        super().__init__()
        self.pos_emb = nn.Parameter(torch.randn(1, config.tokens, config.width))

    def forward(self, x: Float[Tensor, "b tokens d"]) -> Float[Tensor, "b tokens d"]:
        return x + self.pos_emb


class SyncTransformer(nn.Module):
    """[OFF], visual tokens, [MOD], audio tokens; the head reads [OFF]."""

    def __init__(self, config: SyncConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.OFF_tok = nn.Parameter(torch.randn(1, 1, config.width))
        self.MOD_tok = nn.Parameter(torch.randn(1, 1, config.width))
        self.vis_in_lnorm, self.aud_in_lnorm = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.pos_emb_cfg = Positions(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.ln_f = nn.LayerNorm(config.width)
        self._head = "off_head" if config.head == "offset" else "sync_head"
        self.add_module(self._head, nn.Linear(config.width, config.classes))

    def embed(self, visual: Float[Tensor, "b v d"], audio: Float[Tensor, "b a d"]) -> Float[Tensor, "b tokens d"]:
        """The whole sequence, with its positions."""
        off, mod = (token.expand(visual.shape[0], -1, -1) for token in (self.OFF_tok, self.MOD_tok))
        sequence = self.pos_emb_cfg(torch.cat([off, self.vis_in_lnorm(visual), mod, self.aud_in_lnorm(audio)], dim=1))
        return F.dropout(sequence, self.dropout, self.training)

    def forward(self, visual: Float[Tensor, "b v d"], audio: Float[Tensor, "b a d"]) -> Float[Tensor, "b classes"]:
        x = self.embed(visual, audio)
        for block in self.blocks[:-1]:
            x = block(x)
        # Of the last layer only [OFF] is read, so only [OFF] asks and goes through its MLP: a third less work with three layers.
        x = self.blocks[-1](x, first=1)
        return self.get_submodule(self._head)(self.ln_f(x[:, 0]))


class SyncModule(nn.Module):
    """What is trained in stages II and III: the towers' tokens to the classes' logits. It can be trained from stored tokens alone."""

    def __init__(self, config: SyncConfig = SyncConfig()) -> None:
        super().__init__()
        self.config = config
        self.vproj = nn.Linear(config.visual_width, config.width)
        self.aproj = nn.Linear(config.audio_width, config.width)
        self.transformer = SyncTransformer(config)
        for module in self.transformer.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)

    def compare(
        self, visual: Float[Tensor, "b segments v visual_width"], audio: Float[Tensor, "b segments a audio_width"]
    ) -> Float[Tensor, "b classes"]:
        """Logits from the towers' tokens of `config.segments` segments."""
        config = self.config
        expected = ((config.segments, config.visual_tokens, config.visual_width), (config.segments, config.audio_tokens, config.audio_width))
        if (visual.shape[1:], audio.shape[1:]) != expected:
            raise ValueError(
                f"tokens have the shapes {tuple(visual.shape[1:])} and {tuple(audio.shape[1:])}; expected {expected[0]} of pictures and "
                f"{expected[1]} of sound"
            )
        dtype = self.vproj.weight.dtype
        return self.transformer(self.vproj(visual.to(dtype)).flatten(1, 2), self.aproj(audio.to(dtype)).flatten(1, 2))

    def forward(
        self, visual: Float[Tensor, "b segments v visual_width"], audio: Float[Tensor, "b segments a audio_width"], /
    ) -> Float[Tensor, "b classes"]:
        return self.compare(visual, audio)


class Synchformer(SyncModule):
    """Both towers and the sync module: pixels and spectrograms of segments to the classes' logits."""

    def __init__(self, visual: VisualTower | MotionTower, audio: AudioTower, config: SyncConfig = SyncConfig()) -> None:
        super().__init__(config)
        towers = (visual.config.tokens, visual.config.width, audio.config.tokens, audio.config.width)
        if towers != (config.visual_tokens, config.visual_width, config.audio_tokens, config.audio_width):
            raise ValueError(f"towers of {towers[0]} tokens of {towers[1]} and {towers[2]} of {towers[3]} do not fit {config}")
        self.vfeat_extractor = visual
        self.afeat_extractor = audio

    def forward(
        self, pixels: Float[Tensor, "b segments 3 t h w"], spectrograms: Float[Tensor, "b segments mels frames"], /
    ) -> Float[Tensor, "b classes"]:
        """Logits from `synchformer_visual.normalise`d pixels and `LogMel` spectrograms."""
        return self.compare(self.vfeat_extractor(pixels), self.afeat_extractor(spectrograms))


# --- files ----------------------------------------------------------------------------------------------------------------------------


def save_synchformer(path: str | Path, model: Synchformer) -> None:
    """Writes the network with its configuration to a .safetensors file."""
    config = {
        "kind": KIND,
        "visual": tower_config(model.vfeat_extractor),
        "audio": audio_config(model.afeat_extractor),
        "sync": asdict(model.config),
    }
    save_state(path, model.state_dict(), config)


def load_synchformer(
    name_or_path: str | Path, *, segments: int | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Synchformer:
    """Both towers, the transformer and the head that the file has, for inference: ours, or the published stage II and III checkpoints (with the
    one that MMAudio publishes again).

    `name_or_path` is a file, the name of published weights in the cache, or a run folder of `soundshard train.sync`. `segments` is how many
    segments the network shall compare (by default as many as the file's configuration says, published: 14 for offsets, 13 for
    synchronisability): positions of the file beyond them are left out, as published. Raises ValueError, with the names, if the file does not
    hold exactly this network.
    """
    path = synchformer_file(name_or_path)
    tensors, stored = load_state(path)
    if stored is not None and stored.get("kind") == MODULE_KIND:
        tensors, stored = _with_towers(tensors, stored, source=path)
    if stored is None:
        stored = {"kind": KIND, "visual": None, "audio": None, "sync": _published_settings(tensors, source=path)}
    if stored.get("kind") != KIND:
        raise ValueError(f"{path}: holds another kind of network; expected a Synchformer")
    config = SyncConfig(**(stored["sync"] | ({} if segments is None else {"segments": segments})))
    with torch.device("meta"):  # without values, which are about to be loaded
        model = Synchformer(new_tower(stored["visual"], source=path), new_audio_tower(stored["audio"], source=path), config)
    model.to_empty(device=device)
    load_strictly(model, _trimmed(tensors, config.tokens, source=path), source=path)
    return model.to(device, dtype).requires_grad_(False).eval()


def load_sync_module(
    name_or_path: str | Path, *, head: Head | None = None, segments: int | None = None, device: str | torch.device = "cpu"
) -> SyncModule:
    """What is above the towers, in float32, to train it on or to run it on stored features: of the files that `load_synchformer` takes, without
    loading towers.

    With another `head` than the file's, the new one has random weights. `segments` as there.
    """
    path = synchformer_file(name_or_path)
    tensors, stored = load_state(path)
    settings = _published_settings(tensors, source=path) if stored is None else stored.get("sync")
    if settings is None:
        raise ValueError(f"{path}: holds another kind of network; expected a Synchformer")
    changes = {name: value for name, value in (("head", head), ("segments", segments)) if value is not None}
    module = SyncModule(SyncConfig(**{**settings, **changes}))
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(("vfeat_extractor.", "afeat_extractor."))}
    if module.config.head != settings["head"]:
        fresh = {name: tensor for name, tensor in module.state_dict().items() if name.startswith("transformer.") and "_head." in name}
        own = {name: tensor for name, tensor in own.items() if "_head." not in name} | fresh
    load_strictly(module, _trimmed(own, module.config.tokens, source=path), source=path)
    return module.to(device)


def synchformer_file(name_or_path: str | Path) -> Path:
    """The weights file of a name, a path, or a run folder (the best weights there, else the latest)."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        return resolve(name_or_path)
    for name in ("best", "model"):
        if (folder / f"{name}.safetensors").is_file():
            return folder / f"{name}.safetensors"
    raise ValueError(f"{folder} has no best.safetensors or model.safetensors; expected a run folder of `soundshard train.sync`, or a weights file")


def _with_towers(tensors: Mapping[str, Tensor], stored: Mapping[str, Any], *, source: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration of the whole network, its towers from the files that the configuration names. ValueError where one is not there."""
    whole = dict(tensors)
    visual, audio = load_tower(_tower_file(stored, "visual", source)), load_audio_tower(_tower_file(stored, "audio", source))
    for prefix, tower in (("vfeat_extractor.", visual), ("afeat_extractor.", audio)):
        whole |= {f"{prefix}{name}": tensor for name, tensor in tower.state_dict().items()}
    return whole, {"kind": KIND, "visual": tower_config(visual), "audio": audio_config(audio), "sync": stored["sync"]}


def _tower_file(stored: Mapping[str, Any], kind: str, source: Path) -> Path:
    reference = stored.get("towers", {}).get(kind, {})
    path = source.parent / reference.get("path", "?")
    if not path.is_file():
        raise ValueError(f"{source}: holds no towers, and the {kind} tower's file {path} is not there; put it there, or train with copy_weights=true")
    if sha256_file(path) != reference.get("sha256"):
        raise ValueError(f"{path} is another file than {source} was trained with (sha256 {reference.get('sha256')}); put that one there")
    return path


def _published_settings(tensors: Mapping[str, Tensor], *, source: Path) -> dict[str, Any]:
    """Of a published file, which says by its names what its head is."""
    heads = {head for head, name in (("offset", "off_head"), ("synchronisable", "sync_head")) if f"transformer.{name}.weight" in tensors}
    if len(heads) != 1:
        raise ValueError(
            f"{source}: has {len(heads)} of transformer.off_head and transformer.sync_head; expected a Synchformer checkpoint of stage II or III "
            "(`sync`, `synchability`), not the towers alone"
        )
    (head,) = heads
    return {"head": head, "segments": (OFFSET if head == "offset" else SYNCHRONISABLE).segments}


def _trimmed(tensors: Mapping[str, Tensor], tokens: int, *, source: Path) -> dict[str, Tensor]:
    """Tensors whose positions are as many as the sequence has tokens."""
    positions = tensors.get(POSITIONS)
    if positions is None or positions.dim() != 3:
        return dict(tensors)  # the strict loading tells
    if positions.shape[1] < tokens:
        raise ValueError(f"{source}: has positions for {positions.shape[1]} tokens, and {tokens} are needed; give fewer segments")
    return {**tensors, POSITIONS: positions[:, :tokens]}
