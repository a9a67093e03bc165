"""ImageBind's towers for pictures and for sound: where both see and hear the same thing, their embeddings point the same way.

Girdhar et al. 2023, "ImageBind: One Embedding Space To Bind Them All", secs. 3 and 4. Two plain vision transformers: ViT-H over patches of two
pictures, ViT-B over patches of a log-mel spectrogram. Parameter names are those of the published file, whose other towers (text, depth, heat, motion)
are left in it. Knows neither clips nor how they are cut: it is handed normalised pictures and spectrograms.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from model.weights import cache_dir, load_state, load_strictly

FILE = "imagebind_huge.pth"
ADDRESS = "https://dl.fbaipublicfiles.com/imagebind/imagebind_huge.pth"
EPS = 1e-6
"""Of the transformers' layer norms, as published."""
PICTURE_SIZE, PICTURE_FRAMES, PICTURE_PATCH = 224, 2, 14
MELS, MEL_FRAMES, MEL_PATCH, MEL_STRIDE = 128, 204, 16, 10


@dataclass(frozen=True)
class TowerShape:
    """One tower's size."""

    width: int
    depth: int
    heads: int


@dataclass(frozen=True)
class ImageBindConfig:
    """The network's shape. The defaults are those of the published `imagebind_huge`."""

    vision: TowerShape = TowerShape(1280, 32, 16)
    audio: TowerShape = TowerShape(768, 12, 12)
    embedding: int = 1024
    """Features of an embedding."""


class _Block(nn.Module):
    """Attention and MLP, each after a norm and added."""

    def __init__(self, shape: TowerShape, *, bias_kv: bool) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(shape.width, eps=EPS), nn.LayerNorm(shape.width, eps=EPS)
        self.attn = nn.MultiheadAttention(shape.width, shape.heads, add_bias_kv=bias_kv, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(shape.width, 4 * shape.width))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(4 * shape.width, shape.width))

    def forward(self, x: Float[Tensor, "b tokens width"]) -> Float[Tensor, "b tokens width"]:
        h = self.norm_1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm_2(x))


class _Trunk(nn.Module):
    """The transformer. Only the one for pictures has a norm before it, only the one for sound learned keys and values of its own."""

    def __init__(self, shape: TowerShape, *, vision: bool) -> None:
        super().__init__()
        self.pre_transformer_layer = nn.Sequential(nn.LayerNorm(shape.width, eps=EPS) if vision else nn.Identity())
        self.blocks = nn.Sequential(*(_Block(shape, bias_kv=not vision) for _ in range(shape.depth)))

    def forward(self, x: Float[Tensor, "b tokens width"]) -> Float[Tensor, "b tokens width"]:
        return self.blocks(self.pre_transformer_layer(x))


class _Stem(nn.Module):
    """Patches to tokens."""

    def __init__(self, width: int, *, vision: bool) -> None:
        super().__init__()
        if vision:
            size = (PICTURE_FRAMES, PICTURE_PATCH, PICTURE_PATCH)
            self.proj: nn.Module = nn.Sequential(nn.Identity(), nn.Conv3d(3, width, size, size, bias=False))
            self.norm_layer: nn.Module = nn.Identity()
        else:
            self.proj = nn.Conv2d(1, width, MEL_PATCH, MEL_STRIDE, bias=False)
            self.norm_layer = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Float[Tensor, "b patches width"]:
        return self.norm_layer(self.proj(x).flatten(2).transpose(1, 2))


class _Places(nn.Module):
    """A vector for each place, under the name that it has in the published file."""

    def __init__(self, places: int, width: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, places, width) * width**-0.5)


class _Tokens(nn.Module):
    """Patches' tokens after the one that becomes the embedding, with their places added."""

    def __init__(self, width: int, *, vision: bool) -> None:
        super().__init__()
        patches = (PICTURE_SIZE // PICTURE_PATCH) ** 2 if vision else math.prod((size - MEL_PATCH) // MEL_STRIDE + 1 for size in (MELS, MEL_FRAMES))
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.rgbt_stem = _Stem(width, vision=vision)
        self.pos_embedding_helper = _Places(1 + patches, width)

    def forward(self, x: Tensor) -> Float[Tensor, "b tokens width"]:
        tokens = self.rgbt_stem(x)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        return tokens + self.pos_embedding_helper.pos_embed


class _First(nn.Module):
    def forward(self, x: Float[Tensor, "b tokens width"]) -> Float[Tensor, "b width"]:
        return x[:, 0]


class ImageBind(nn.Module):
    """Both towers. Differs from the published one: the fixed factor of 20 on embeddings of sound is left out, of which a cosine knows nothing."""

    def __init__(self, config: ImageBindConfig | None = None) -> None:
        super().__init__()
        self.config = config or ImageBindConfig()
        towers = {"vision": self.config.vision, "audio": self.config.audio}
        self.modality_preprocessors = nn.ModuleDict({name: _Tokens(shape.width, vision=name == "vision") for name, shape in towers.items()})
        self.modality_trunks = nn.ModuleDict({name: _Trunk(shape, vision=name == "vision") for name, shape in towers.items()})
        self.modality_heads = nn.ModuleDict(
            {
                name: nn.Sequential(nn.LayerNorm(shape.width, eps=EPS), _First(), nn.Linear(shape.width, self.config.embedding, bias=False))
                for name, shape in towers.items()
            }
        )

    def vision(self, clips: Float[Tensor, "b 3 2 224 224"]) -> Float[Tensor, "b embedding"]:
        """Unit embeddings of pairs of pictures."""
        return self._embedded("vision", clips)

    def audio(self, clips: Float[Tensor, "b 1 128 204"]) -> Float[Tensor, "b embedding"]:
        """Unit embeddings of spectrograms."""
        return self._embedded("audio", clips)

    def _embedded(self, name: str, clips: Tensor) -> Float[Tensor, "b embedding"]:
        tokens = self.modality_preprocessors[name](clips)
        return F.normalize(self.modality_heads[name](self.modality_trunks[name](tokens)).float(), dim=-1)


def config_of(tensors: Mapping[str, Tensor]) -> ImageBindConfig:
    """The shape of the network that a file's tensors belong to; heads are 80 wide in the tower for pictures and 64 in that for sound, as published.

    Raises ValueError for other tensors.
    """
    try:
        shapes = {}
        for name, head_width in (("vision", 80), ("audio", 64)):
            width = tensors[f"modality_preprocessors.{name}.cls_token"].shape[-1]
            depth = len({key.split(".")[3] for key in tensors if key.startswith(f"modality_trunks.{name}.blocks.")})
            shapes[name] = TowerShape(width, depth, max(1, width // head_width))
        return ImageBindConfig(**shapes, embedding=tensors["modality_heads.vision.2.weight"].shape[0])
    except KeyError as error:
        raise ValueError(f"the file holds no ImageBind: it has no {error.args[0]}") from None


def imagebind_file(path: str | Path) -> Path:
    """The weights, a file or the name of one in the cache folder. FileNotFoundError says where the published ones can be had."""
    for candidate in (Path(path), cache_dir() / path):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"{path} is not there: ImageBind's weights ({FILE}, 4.8 GB, CC BY-NC 4.0: not for commercial use) are at {ADDRESS}; "
        f"give imagebind_weights=FILE, or put it at {cache_dir() / FILE}"
    )


def load_imagebind(path: str | Path, *, device: torch.device) -> ImageBind:
    """The published network, without its other towers. ValueError for a file that holds something else."""
    path = imagebind_file(path)
    tensors = {
        name: tensor for name, tensor in load_state(path)[0].items() if name.startswith("modality_") and name.split(".")[1] in ("vision", "audio")
    }
    with torch.device("meta"):
        model = ImageBind(config_of(tensors))
    load_strictly(model, {name: tensor for name, tensor in tensors.items() if "postprocessors" not in name}, source=path, assign=True)
    return model.to(device).eval().requires_grad_(False)
