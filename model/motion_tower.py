"""The stand-in for the visual tower: a small network of convolutions over what moves, with the tower's input and output.

Where the published tower's weights cannot be had, one of the same build would have to be trained from nothing, and from a hundred clips
a transformer learns no timing in minutes. This one is given what it would have to find out: that sound goes with change, so it sees
differences of pictures, coarsely. It knows tensors only; `model.standin` fits it.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from model.weights import save_state

KIND = "motion_tower"
FRAMES_PER_TOKEN = 2


@dataclass(frozen=True)
class MotionTowerConfig:
    """The stand-in's shape. By default it sees the published tower's frames, as averages over squares of 8 pixels."""

    image_size: int = 224
    """Height and width of the frames, in pixels."""
    reduce: int = 8
    """Side of the squares of pixels that are averaged first."""
    frames: int = 16
    """Frames in a segment."""
    channels: int = 16
    """Channels of the first convolution; the next two have two and four times as many."""
    width: int = 96
    """Features of a token, and of the output."""

    def __post_init__(self) -> None:
        if self.image_size % self.reduce or self.frames % FRAMES_PER_TOKEN:
            raise ValueError(
                f"image_size {self.image_size}, frames {self.frames}: expected multiples of reduce {self.reduce} and of {FRAMES_PER_TOKEN}"
            )

    @property
    def tokens(self) -> int:
        """Output tokens of a segment."""
        return self.frames // FRAMES_PER_TOKEN


class MotionTower(nn.Module):
    """Convolutions within frames, their mean and maximum over the picture, then convolutions over time."""

    def __init__(self, config: MotionTowerConfig = MotionTowerConfig()) -> None:
        super().__init__()
        self.config = config
        channels, width = config.channels, config.width
        self.within = nn.Sequential(
            nn.Conv2d(4, channels, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * channels, 4 * channels, 3, padding=1),
            nn.ReLU(),
        )
        self.over_time = nn.Sequential(
            nn.Conv1d(8 * channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(width, width, 2 * FRAMES_PER_TOKEN, stride=FRAMES_PER_TOKEN, padding=FRAMES_PER_TOKEN // 2),
            nn.ReLU(),
            nn.Conv1d(width, width, 3, padding=1),
            nn.ReLU(),
        )

    def forward(self, x: Float[Tensor, "b segments 3 t h w"]) -> Float[Tensor, "b segments tokens width"]:
        """Features of segments of pixels in [-1, 1]."""
        b, config = x.shape[0], self.config
        if x.shape[2:] != (3, config.frames, config.image_size, config.image_size):
            raise ValueError(
                f"segments have the shape {tuple(x.shape[2:])}; the tower expects (3, {config.frames}, {config.image_size}, {config.image_size})"
            )
        pictures = rearrange(x, "b segments c t h w -> (b segments t) c h w")
        pictures = pictures.to(next(self.parameters()).dtype)
        pictures = F.avg_pool2d(pictures, config.reduce) if config.reduce > 1 else pictures
        within = self.within(rearrange(self._seen(pictures), "n c t h w -> (n t) c h w"))
        pooled = torch.cat([within.mean((2, 3)), within.amax((2, 3))], dim=1)
        features = self.over_time(rearrange(pooled, "(n t) c -> n c t", t=config.frames))
        return rearrange(features, "(b segments) width tokens -> b segments tokens width", b=b)

    def _seen(self, pictures: Float[Tensor, "n_t 3 h w"]) -> Float[Tensor, "n 4 t h w"]:
        """The colours, and the change of brightness since the frame before (the first frame takes the second's), made larger."""
        colours = 2 * rearrange(pictures, "(n t) c h w -> n c t h w", t=self.config.frames)
        change = 2 * colours.mean(1, keepdim=True).diff(dim=2)
        return torch.cat([colours, torch.cat([change[:, :, :1], change], dim=2)], dim=1)


def save_motion_tower(path: str | Path, tower: MotionTower) -> None:
    """Writes a tower with its configuration to a .safetensors file."""
    save_state(path, tower.state_dict(), {"kind": KIND, **asdict(tower.config)})
