"""Segment AVCLIP's visual tower: 16 frames of video in, 8 tokens out, one per two frames.

MotionFormer with divided space-time attention (Patrick et al. 2021; Bertasius et al. 2021) and, on top, one transformer layer that
summarises each frame pair in a token of its own (Iashin et al. 2024, sec. 3.1). Parameter names are those of the published files, so
these load strictly; smaller sizes of the same network serve as stand-ins. This module knows no audio, no decoder and no clips: it sees
frames as tensors, one segment at a time.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from model import motion_tower
from model.motion_tower import MotionTower, MotionTowerConfig
from model.weights import load_state, load_strictly, resolve, save_state

EPS = 1e-6
"""Of every layer norm of the tower."""
PREFIXES = ("v_encoder.", "vfeat_extractor.", "visual_feature_extractor.")
"""The tower's place in Segment AVCLIP's, Synchformer's and V-AURA's checkpoints."""
KIND = "visual_tower"


@dataclass(frozen=True)
class VisualTowerConfig:
    """The tower's shape. The defaults are the published network's."""

    image_size: int = 224
    """Height and width of the frames, in pixels."""
    patch_size: int = 16
    """Side of the square patch that becomes one token."""
    frames: int = 16
    """Frames in a segment."""
    tubelet: int = 2
    """Frames that one token covers."""
    width: int = 768
    """Features of a token, and of the output."""
    depth: int = 12
    """Blocks of time attention, space attention and MLP."""
    heads: int = 12
    """Attention heads, in the blocks and in the layer that aggregates."""
    mlp_ratio: int = 4
    """Hidden features of an MLP, in widths."""
    drop_path: float = 0.2
    """Stochastic depth of the last block while training (0 in the first, growing linearly)."""

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size or self.frames % self.tubelet or self.width % self.heads:
            raise ValueError(
                f"image_size {self.image_size}, frames {self.frames}, width {self.width}: expected multiples of "
                f"patch_size {self.patch_size}, tubelet {self.tubelet} and heads {self.heads}"
            )

    @property
    def tokens(self) -> int:
        """Output tokens of a segment."""
        return self.frames // self.tubelet

    @property
    def patches(self) -> int:
        """Patches of one frame pair."""
        return (self.image_size // self.patch_size) ** 2


def normalise(frames: UInt8[Tensor, "..."], *, dtype: torch.dtype = torch.float32) -> Float[Tensor, "..."]:
    """Pixels [..., t, h, w, 3] or [..., 3, t, h, w] to the tower's input [..., 3, t, h, w] in [-1, 1].

    The published rule, (x / 255 - 0.5) / 0.5 in float32; `dtype` is what it is rounded to afterwards. (Synchformer's own scripts do the
    arithmetic in float16, which moves a pixel by up to 1e-3.)
    """
    if frames.dim() >= 4 and frames.shape[-1] == 3:
        frames = frames.movedim(-1, -4)
    elif frames.dim() < 4 or frames.shape[-4] != 3:
        raise ValueError(f"frames have the shape {tuple(frames.shape)}; expected [..., frames, height, width, 3] or [..., 3, frames, height, width]")
    return frames.float().div_(255).sub_(0.5).div_(0.5).to(dtype)


def drop_path(x: Float[Tensor, "n tokens d"], rate: float, training: bool) -> Float[Tensor, "n tokens d"]:
    """Leaves a residual branch out for a random share `rate` of the samples (Huang et al. 2016), scaling up the rest."""
    if not training or rate == 0:
        return x
    keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= rate
    return x * keep.to(x.dtype) / (1 - rate)


class DividedAttention(nn.Module):
    """Self-attention in which a patch sees [CLS] and either its own place at all times or its own frame; [CLS] sees everything."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "n tokens d"], times: int, along: Literal["time", "space"]) -> Float[Tensor, "n tokens d"]:
        qkv = rearrange(self.qkv(x), "n tokens (three h d) -> three n h tokens d", three=3, h=self.heads)
        cls = F.scaled_dot_product_attention(qkv[0, :, :, :1], qkv[1], qkv[2])
        # Every group of patches attends within itself and to [CLS]. Groups join the batch: the fused kernels take four dimensions.
        grouped, ungrouped = {
            "time": ("(n s) h t d", "(n s) h t d -> n (t s) (h d)"),
            "space": ("(n t) h s d", "(n t) h s d -> n (t s) (h d)"),
        }[along]
        q, k, v = rearrange(qkv[..., 1:, :], f"three n h (t s) d -> three {grouped}", t=times)
        k_cls, v_cls = repeat(qkv[1:, :, :, :1], "two n h one d -> two (n groups) h one d", groups=q.shape[0] // x.shape[0])
        patches = F.scaled_dot_product_attention(q, torch.cat([k_cls, k], dim=-2), torch.cat([v_cls, v], dim=-2))
        patches = rearrange(patches, ungrouped, n=x.shape[0])
        return self.proj(torch.cat([rearrange(cls, "n h one d -> n one (h d)"), patches], dim=1))


class Mlp(nn.Module):
    """Two linear layers and an exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "n tokens d"]) -> Float[Tensor, "n tokens d"]:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention over time, then over space, then an MLP. Unlike the others, the time branch is never dropped (as published)."""

    def __init__(self, config: VisualTowerConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.times, self.drop_path_rate = config.tokens, drop_path_rate
        self.norm1 = nn.LayerNorm(config.width, eps=EPS)
        self.attn = DividedAttention(config.width, config.heads)
        self.timeattn = DividedAttention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=EPS)
        self.mlp = Mlp(config.width, config.mlp_ratio * config.width)
        self.norm3 = nn.LayerNorm(config.width, eps=EPS)

    def forward(self, x: Float[Tensor, "n tokens d"]) -> Float[Tensor, "n tokens d"]:
        x = x + self.timeattn(self.norm3(x), self.times, "time")
        x = x + drop_path(self.attn(self.norm1(x), self.times, "space"), self.drop_path_rate, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path_rate, self.training)


class PatchEmbed3d(nn.Module):
    """Linear embedding of patches of `tubelet` frames, tokens in the order time, row, column."""

    def __init__(self, config: VisualTowerConfig) -> None:
        super().__init__()
        size = (config.tubelet, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(3, config.width, size, size)

    def forward(self, x: Float[Tensor, "n 3 t h w"]) -> Float[Tensor, "n tokens d"]:
        # Kernel and stride are equal, so the convolution is a matrix product: twice as fast so on a CPU.
        t, h, w = self.proj.kernel_size
        patches = rearrange(x, "n c (t tt) (h hh) (w ww) -> n (t h w) (c tt hh ww)", tt=t, hh=h, ww=w)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class TokenSummary(nn.Module):
    """One pre-norm transformer layer over the tokens of an instant and a [CLS] of its own, of which only [CLS] is wanted and computed."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.norm2 = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: Float[Tensor, "n patches d"]) -> Float[Tensor, "n d"]:
        attn = self.self_attn
        cls = self.cls_token.expand(x.shape[0], -1, -1)
        y = self.norm1(torch.cat([cls, x], dim=1))
        w_q, w_kv = attn.in_proj_weight.split([x.shape[-1], 2 * x.shape[-1]])
        b_q, b_kv = attn.in_proj_bias.split([x.shape[-1], 2 * x.shape[-1]])
        q = rearrange(F.linear(y[:, :1], w_q, b_q), "n t (h d) -> n h t d", h=attn.num_heads)
        k, v = rearrange(F.linear(y, w_kv, b_kv), "n t (two h d) -> two n h t d", two=2, h=attn.num_heads)
        cls = cls + attn.out_proj(rearrange(F.scaled_dot_product_attention(q, k, v), "n h t d -> n t (h d)"))
        cls = cls + self.linear2(F.gelu(self.linear1(self.norm2(cls))))
        return cls[:, 0]


class UnusedPatchEmbed(nn.Module):
    """The 2-D patch embedding that the published files carry and nothing reads: here so that they load strictly."""

    def __init__(self, config: VisualTowerConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, config.patch_size).requires_grad_(False)


class VisualTower(nn.Module):
    """Frames of a segment to one token of `width` features per two frames. Segments are independent of each other."""

    def __init__(self, config: VisualTowerConfig = VisualTowerConfig()) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.patches + 1, width))
        self.temp_embed = nn.Parameter(torch.zeros(1, config.tokens, width))
        self.patch_embed = UnusedPatchEmbed(config)
        self.patch_embed_3d = PatchEmbed3d(config)
        self.blocks = nn.ModuleList(Block(config, float(rate)) for rate in torch.linspace(0, config.drop_path, config.depth, device="cpu"))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.spatial_attn_agg = TokenSummary(width, config.heads, config.mlp_ratio * width)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for parameter in (self.cls_token, self.pos_embed, self.temp_embed, self.spatial_attn_agg.cls_token):
            nn.init.trunc_normal_(parameter, std=0.02)

    def embed(self, x: Float[Tensor, "n 3 t h w"]) -> Float[Tensor, "n tokens d"]:
        """[CLS] and patches with their positions. Patches have one for the place and one for the time; [CLS] has its own."""
        cls_position, place = self.pos_embed.split([1, self.config.patches], dim=1)
        position = rearrange(place[:, None] + self.temp_embed[:, :, None], "one t s d -> one (t s) d")
        cls = (self.cls_token + cls_position).expand(x.shape[0], -1, -1)
        return torch.cat([cls, self.patch_embed_3d(x) + position], dim=1)

    def forward(self, x: Float[Tensor, "b segments 3 t h w"]) -> Float[Tensor, "b segments tokens width"]:
        b, config = x.shape[0], self.config
        if x.shape[2:] != (3, config.frames, config.image_size, config.image_size):
            raise ValueError(
                f"segments have the shape {tuple(x.shape[2:])}; the tower expects (3, {config.frames}, {config.image_size}, {config.image_size})"
            )
        tokens = self.embed(x.flatten(0, 1).to(self.cls_token.dtype))
        for block in self.blocks:
            tokens = block(tokens)
        patches = self.norm(tokens[:, 1:])
        features = self.spatial_attn_agg(rearrange(patches, "n (t s) d -> (n t) s d", t=config.tokens))
        return rearrange(features, "(b segments t) d -> b segments t d", b=b, t=config.tokens)


def tower_config(tower: VisualTower | MotionTower) -> dict[str, Any]:
    """What a file says about its tower."""
    return {"kind": motion_tower.KIND if isinstance(tower, MotionTower) else KIND, **asdict(tower.config)}


def new_tower(config: Mapping[str, Any] | None, *, source: str | Path) -> VisualTower | MotionTower:
    """A tower of the shape that a file's configuration gives (without one the published shape), with random weights."""
    settings = dict(config or {"kind": KIND})
    kind = settings.pop("kind", None)
    if kind not in (KIND, motion_tower.KIND):
        raise ValueError(f"{source}: holds another kind of network; expected a visual tower")
    return MotionTower(MotionTowerConfig(**settings)) if kind == motion_tower.KIND else VisualTower(VisualTowerConfig(**settings))


def save_tower(path: str | Path, tower: VisualTower) -> None:
    """Writes a tower with its configuration to a .safetensors file."""
    save_state(path, tower.state_dict(), tower_config(tower))


def load_tower(name_or_path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> VisualTower | MotionTower:
    """The tower in a weights file, for inference: ours (any size, the stand-in too), or the published Segment AVCLIP, Synchformer and V-AURA
    checkpoints.

    `name_or_path` is a file or the name of published weights in the cache. Raises ValueError, with the names, if the file does not hold
    exactly a tower.
    """
    path = resolve(name_or_path)
    tensors, config = load_state(path)
    for prefix in PREFIXES:
        if inside := {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}:
            tensors = inside
    with torch.device("meta"):  # without values, which are about to be loaded
        tower = new_tower(config.get("visual", config) if config else None, source=path)
    tower.to_empty(device=device)
    load_strictly(tower, tensors, source=path)
    return tower.to(device, dtype).requires_grad_(False).eval()
