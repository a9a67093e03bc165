"""V-AURA's decoder: an autoregressive transformer from video tokens to codec tokens (Viertola et al. 2024, sec. 3).

Every sequence step of the delay pattern is one position: the sum of its codebooks' embeddings beside the video token of that time, concatenated on
channels, through LLaMA blocks to one head per codebook. Parameter names are those of the released checkpoint under `sampler.`.
Knows tensors only: no files, no codec, no trainer; generation has an engine of its own in `engine.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.delay import delay

NORM_EPS = 1e-5
ROPE_BASE = 10000.0
INIT_STD = 0.02
IGNORED = -100


@dataclass(frozen=True)
class VauraConfig:
    """Sizes and rates of the decoder. The defaults are the published model's (DAC 44.1 kHz, windows of 2.56 s)."""

    layers: int = 24
    """Transformer blocks."""
    width: int = 1536
    """Channels of the residual stream: the visual ones first, then those of the audio embedding."""
    heads: int = 16
    """Attention heads; width / heads is even."""
    visual_width: int = 512
    """Channels of `width` that carry the video token; the rest (1024) carries the codes."""
    feature_width: int = 768
    """Channels of the video features that come in."""
    codebooks: int = 9
    """The codec's codebooks: 9 for DAC 44.1 kHz, 8 for EnCodec 24 kHz at 6 kbps."""
    card: int = 1024
    """Codes per codebook. The special token is code number `card`."""
    codebook_dim: int = 8
    """Channels of a codebook's embedding before its projection (DAC's own: 8)."""
    steps_per_token: int = 7
    """Codec steps that see the same video token: 6 for EnCodec 24 kHz, exactly; 7 is what the published model was trained with."""
    steps_per_token_divisor: int = 1
    """Divides `steps_per_token`, for codecs whose rate is no multiple of the video's: 441 / 64 is DAC 44.1 kHz on its true clock."""
    window_tokens: int = 32
    """Video tokens of a training window, and rows of the unconditional embedding: 8 per segment of 0.64 s."""
    max_steps: int = 256
    """The longest sequence, in positions: codec steps plus codebooks."""
    dropout: float = 0.1
    """Probability of dropout on the input and on what each attention and feed-forward adds."""
    guidance_dropout: float = 0.1
    """Probability that a training sample's video is replaced by the unconditional embedding (classifier-free guidance)."""
    train_unconditional: bool = False
    """Learn the unconditional embedding with the rest; false leaves it as random as it began (as published). Files are the same either way."""
    feed_last_step: bool = False
    """In training, let the window's last positions see the codes of its last step, as they do in generation; false hides these (as published), so
    that in generation the codes of the last `codebooks` positions come from inputs that were never trained on."""

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(f"width={self.width}, heads={self.heads}: expected an even number of channels per head")
        if not 0 < self.visual_width < self.width:
            raise ValueError(f"visual_width={self.visual_width}: expected between 1 and width-1 ({self.width - 1}), the codes take the rest")
        if self.steps_per_token < 1 or self.steps_per_token_divisor < 1:
            raise ValueError(f"steps_per_token={self.steps_per_token}/{self.steps_per_token_divisor}: expected a positive ratio")
        if self.train_unconditional and self.guidance_dropout <= 0:
            raise ValueError(
                f"train_unconditional=true with guidance_dropout={self.guidance_dropout}: nothing would be learned, for no video is ever dropped; "
                "give a guidance_dropout above 0, or train_unconditional=false"
            )

    @property
    def feed_forward_width(self) -> int:
        """LLaMA's rule: two thirds of four widths, rounded up to a multiple of 256."""
        return math.ceil(int(8 * self.width / 3) / 256) * 256

    @property
    def token_clock(self) -> Fraction:
        """Codec steps per video token."""
        return Fraction(self.steps_per_token, self.steps_per_token_divisor)

    @property
    def special(self) -> int:
        """The code that stands where there is none."""
        return self.card


def forward_flops(config: VauraConfig, positions: int, tokens: int) -> int:
    """Floating-point operations of one sample's forward pass: two for each multiplication and addition of its matrix products, the rest left out.

    A training step is three times as many (the backward pass has two products for each), whatever activations are computed again for want of
    memory: that is work, but none of the model's. Attention counts in full although the causal mask spares half of it, as is usual (Chowdhery et
    al. 2022, appendix B); here it is 2 % of the whole.
    """
    width, visual = config.width, config.visual_width
    block = 2 * width * (4 * width + 3 * config.feed_forward_width) + 4 * positions * width
    codes = 2 * config.codebooks * (config.codebook_dim * (width - visual) + width * config.card)
    return positions * (config.layers * block + codes) + tokens * 2 * visual * (config.feature_width + visual)


class VauraLoss(NamedTuple):
    """The training loss: the mean of the codebooks' cross-entropies, and each of them, in nats."""

    total: Float[Tensor, ""]
    per_codebook: Float[Tensor, " q"]


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, in fp32 whatever the input's precision."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), NORM_EPS).type_as(x)


def rotary(positions: int, head_width: int, device: torch.device | None = None) -> Float[Tensor, "2 positions head_width"]:
    """Cosines and signed sines of rotary positions for channels in interleaved pairs, in fp32 (Su et al. 2021, sec. 3.2)."""
    rates = ROPE_BASE ** -(torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width)
    angles = torch.outer(torch.arange(positions, device=device, dtype=torch.float32), rates)
    cosines, sines = angles.cos(), angles.sin()
    return torch.stack([torch.stack([cosines, cosines], -1), torch.stack([-sines, sines], -1)]).flatten(-2)


def rotate(x: Float[Tensor, "... s d"], rope: Float[Tensor, "2 s d"]) -> Float[Tensor, "... s d"]:
    """Turn each pair (2i, 2i + 1) of channels by its position's angle."""
    precise = x.float()
    swapped = precise.view(*x.shape[:-1], -1, 2).flip(-1).view(x.shape)
    return torch.addcmul(precise * rope[0], swapped, rope[1]).type_as(x)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: VauraConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Float[Tensor, "b s d"], rope: Float[Tensor, "2 s c"]) -> Float[Tensor, "b s d"]:
        b, s, _ = x.shape
        qkv = self.wqkv(x).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # Split and not indexed: going back, each index would make a gradient for all three and fill what it does not have with zeros.
        turning, values = qkv.split((2, 1))
        (queries, keys), values = rotate(turning, rope).unbind(0), values.squeeze(0)
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=s > 1)
        return self.wo(mixed.transpose(1, 2).reshape(b, s, -1))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: VauraConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.width, config.feed_forward_width, bias=False)
        self.w3 = nn.Linear(config.width, config.feed_forward_width, bias=False)
        self.w2 = nn.Linear(config.feed_forward_width, config.width, bias=False)

    def forward(self, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VauraConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.width)
        self.ffn_norm = RMSNorm(config.width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "b s d"], rope: Float[Tensor, "2 s c"]) -> Float[Tensor, "b s d"]:
        x = x + self.drop(self.attention(self.attention_norm(x), rope))
        return x + self.drop(self.feed_forward(self.ffn_norm(x)))


class VisualMLP(nn.Module):
    """The projection of video features to the visual channels."""

    def __init__(self, config: VauraConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.feature_width, config.visual_width, bias=False)
        self.fc2 = nn.Linear(config.visual_width, config.visual_width, bias=False)

    def forward(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... v"]:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisualEmbedding(nn.Module):
    """The visual MLP, and what it is given where there is no video.

    The unconditional embedding is a buffer: random at the start and never trained (as published), so it belongs to the checkpoint. With
    `train_unconditional` it is a parameter of the same name and begins with the same numbers.
    """

    uncond_embedding: Tensor

    def __init__(self, config: VauraConfig) -> None:
        super().__init__()
        self.projection = VisualMLP(config)
        start = torch.randn(config.window_tokens, config.feature_width) / config.feature_width**0.5
        if config.train_unconditional:
            self.uncond_embedding = nn.Parameter(start)
        else:
            self.register_buffer("uncond_embedding", start)

    def unconditional(self, tokens: int) -> Float[Tensor, "{tokens} c"]:
        """The embedding for any number of tokens: its first rows for a shorter video, itself again and again for a longer one."""
        rows = torch.arange(tokens, device=self.uncond_embedding.device) % self.uncond_embedding.shape[0]
        return self.uncond_embedding[rows]

    def drop(self, features: Float[Tensor, "b tokens c"], dropped: Bool[Tensor, " b"]) -> Float[Tensor, "b tokens c"]:
        """The features, those of the dropped samples replaced by the unconditional embedding."""
        return torch.where(dropped[:, None, None], self.unconditional(features.shape[1]).to(features.dtype), features)


class Projection(nn.Module):
    """The parameters of a weight-normed 1x1 convolution (Salimans & Kingma 2016), used as one matrix."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.weight_g = nn.Parameter(torch.ones(outputs, 1, 1))
        self.weight_v = nn.Parameter(torch.empty(outputs, inputs, 1))
        bound = inputs**-0.5
        nn.init.uniform_(self.weight_v, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        self.weight_g.data = self.weight_v.detach().norm(dim=1, keepdim=True)

    def weight(self) -> Float[Tensor, "outputs inputs"]:
        """The convolution's matrix."""
        return (self.weight_g * self.weight_v / self.weight_v.norm(dim=1, keepdim=True)).squeeze(-1)


class CodeEmbedding(nn.Module):
    """One codebook's table and its projection to the audio channels."""

    def __init__(self, config: VauraConfig) -> None:
        super().__init__()
        self.emb = nn.Embedding(config.card + 1, config.codebook_dim)
        self.out_proj = Projection(config.codebook_dim, config.width - config.visual_width)


@dataclass(frozen=True)
class StackedCodes:
    """The embeddings and heads of all codebooks as single matrices: one gather and two products in place of 3 q of them.

    A sum of q projections of q gathered rows is one product with the matrices side by side, of the rows end to end.
    """

    tables: Float[Tensor, "rows c"]
    offsets: Int[Tensor, " q"]
    projection: Float[Tensor, "audio qc"]
    bias: Float[Tensor, " audio"]
    heads: Float[Tensor, "scores d"]

    def embed(self, sequence: Int[Tensor, "b q s"]) -> Float[Tensor, "b s audio"]:
        """The sum of the codebooks' embeddings at every position."""
        rows = F.embedding(sequence.transpose(1, 2) + self.offsets, self.tables)
        return F.linear(rows.flatten(-2), self.projection, self.bias)

    def logits(self, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s q card"]:
        """Every codebook's scores of its next code."""
        return F.linear(x, self.heads).unflatten(-1, (len(self.offsets), -1))


def principal_components(table: Float[Tensor, "card c"], width: int) -> Float[Tensor, "card {width}"]:
    """A codebook's entries in `width` dimensions, at the size of a fresh embedding: what tells most of the entries apart, and nothing else.

    The entries' common mean says nothing about a code and is left out. Where the table has fewer dimensions, the rest is zeros, which learn like
    any others. One factor brings all entries to a root mean square of 1, that of a fresh table: distances between codes keep their ratios, while
    late codebooks of a residual codec, whose entries are small in its latent space, are not drowned by the first ones. The same numbers on every
    machine, up to rounding: float64, and each component's largest entry is positive.
    """
    centred = table.double() - table.double().mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    scores = centred @ directions[:width].T
    scores = scores * scores.gather(0, scores.abs().argmax(0, keepdim=True)).sign()
    scores = scores / scores.square().mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    return F.pad(scores, (0, width - scores.shape[1])).to(table.dtype)


class Vaura(nn.Module):
    """The decoder. In training, `training_loss`; `forward` gives the logits of a whole sequence."""

    def __init__(self, config: VauraConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        """Keep each block's input alone for the backward pass and compute the rest of it again then: a third more work, a fraction of the memory."""
        self.empty_video_emb = nn.Parameter(torch.empty(1, 1, config.visual_width))
        self.cls_embeddings = VisualEmbedding(config)
        self.tok_embeddings = nn.ModuleList(CodeEmbedding(config) for _ in range(config.codebooks))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.lm_heads = nn.ModuleList(nn.Linear(config.width, config.card, bias=False) for _ in range(config.codebooks))
        self.drop = nn.Dropout(config.dropout)
        self._initialise()

    def _initialise(self) -> None:
        """As published: linear weights normal, heads zero, so that the first loss is ln(card). Codebook tables: normal until a codec's are given."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
        for head in cast(list[nn.Linear], list(self.lm_heads)):
            nn.init.zeros_(head.weight)
        nn.init.normal_(self.empty_video_emb, std=INIT_STD)

    @torch.no_grad()
    def start_from_codec(self, tables: Sequence[Float[Tensor, "card _"]], biases: Sequence[Float[Tensor, "_"]] | None = None) -> None:
        """Begin from a codec's own codebooks instead of at random: a table of entries per codebook, and the biases of its projections.

        A codec that has biases, DAC, has its codes in few dimensions with a projection behind them, as the decoder does. Where their number is
        `codebook_dim`, tables are copied as they are, and biases as long as the audio channels too, as the published training did; the
        projections' weights stay random, as they did there. Of any other codec (EnCodec's tables have 128 channels, the stand-in's are decibels
        and shapes of bands) the principal components are taken: `codebook_dim` numbers a code are what the decoder has, and these keep codes that
        sound alike close together, which is all that there is to gain from the codec.
        """
        config, embeddings = self.config, cast(list[CodeEmbedding], list(self.tok_embeddings))
        shapes = [tuple(table.shape) for table in tables]
        if len(shapes) != config.codebooks or any(shape[0] != config.card for shape in shapes):
            raise ValueError(f"codebooks of the shapes {shapes}; expected {config.codebooks} of them with {config.card} entries each")
        for k, (embedding, table) in enumerate(zip(embeddings, tables, strict=True)):
            same = biases is not None and table.shape[1] == config.codebook_dim
            fitting = table if same else principal_components(table, config.codebook_dim)
            embedding.emb.weight[: config.card] = fitting.to(embedding.emb.weight)
            if biases is not None and biases[k].shape == embedding.out_proj.bias.shape:
                embedding.out_proj.bias.copy_(biases[k])

    def stacked_codes(self) -> StackedCodes:
        """The codebooks' parameters side by side; keep the result where they do not change, as in generation."""
        embeddings = cast(list[CodeEmbedding], list(self.tok_embeddings))
        heads = cast(list[nn.Linear], list(self.lm_heads))
        return StackedCodes(
            tables=torch.cat([e.emb.weight for e in embeddings]),
            offsets=torch.arange(len(embeddings), device=self.empty_video_emb.device) * (self.config.card + 1),
            projection=torch.cat([e.out_proj.weight() for e in embeddings], dim=1),
            bias=torch.stack([e.out_proj.bias for e in embeddings]).sum(0),
            heads=torch.cat([head.weight for head in heads]),
        )

    def align(
        self, features: Float[Tensor, "b tokens c"], length: int, there: Bool[Tensor, "b tokens"] | None = None
    ) -> Float[Tensor, "b {length} v"]:
        """The visual channels of every sequence position: position i sees the token of codec step i, or the empty one past the video's end.

        `there` marks the tokens that are video and not padding after its end.
        The codebooks' delay is not made up for (as published): row k at position i belongs to codec step i - 1 - k.
        """
        config, tokens = self.config, features.shape[1]
        visual = self.cls_embeddings.projection(features)
        empty = self.empty_video_emb.to(visual.dtype).expand(len(visual), -1, -1)
        visual = torch.cat([visual if there is None else torch.where(there[..., None], visual, empty), empty], dim=1)
        position = torch.arange(length, device=features.device)
        token = position * config.steps_per_token_divisor // config.steps_per_token
        return visual.index_select(1, token.clamp(max=tokens))

    def combine(self, visual: Float[Tensor, "b s v"], audio: Float[Tensor, "b s a"]) -> Float[Tensor, "b s d"]:
        """The first block's input. The residual stream keeps the parameters' precision under autocast, where the products alone are half."""
        return self.drop(torch.cat([visual, audio], dim=-1).to(self.norm.weight.dtype))

    def forward(
        self, sequence: Int[Tensor, "b q s"], features: Float[Tensor, "b tokens c"], there: Bool[Tensor, "b tokens"] | None = None
    ) -> Float[Tensor, "b s q card"]:
        """Logits of the delayed sequence: those at step s score the codes at step s + 1. `there`: see `align`."""
        length = sequence.shape[-1]
        if length > self.config.max_steps:
            raise ValueError(f"a sequence of {length} positions; expected at most max_steps={self.config.max_steps}: take shorter windows")
        codes = self.stacked_codes()
        x = self.combine(self.align(features, length, there), codes.embed(sequence))
        rope = rotary(length, self.config.width // self.config.heads, x.device)
        again = self.checkpoint_activations and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            x = cast(Tensor, checkpoint(layer, x, rope, use_reentrant=False)) if again else layer(x, rope)
        return codes.logits(self.norm(x))

    def training_loss(
        self,
        codes: Int[Tensor, "b q t"],
        features: Float[Tensor, "b tokens c"],
        tokens_there: Bool[Tensor, "b tokens"] | None = None,
        steps_there: Bool[Tensor, "b t"] | None = None,
    ) -> VauraLoss:
        """Cross-entropy of every code, given the codes before it and the video, as published.

        In training mode the video of each sample is dropped with probability `guidance_dropout`. Without `feed_last_step` the last codec step's codes
        are predicted but not fed (published quirk: the reference builds its input from `codes[..., :-1]`), which only the last q positions see.
        Where samples are padded at their end, the masks say what is there: a sample then gives what it would give alone at its own length, and each
        counts the same, so that the mean does not depend on how a batch is shared out.
        """
        config = self.config
        if self.training and config.guidance_dropout > 0:
            dropped = torch.rand(len(features), device=features.device) < config.guidance_dropout
            features = self.cls_embeddings.drop(features, dropped)
        fed = codes if config.feed_last_step else F.pad(codes[..., :-1], (0, 1), value=config.special)
        if steps_there is not None:
            codes = codes.masked_fill(~steps_there[:, None], IGNORED)
            feeds = steps_there if config.feed_last_step else F.pad(steps_there[:, 1:], (0, 1))
            fed = fed.masked_fill(~feeds[:, None], config.special)
        # Not as a call of the module: hooks on it, as sharding puts there, belong around the whole of this.
        logits = self.forward(delay(fed, config.special)[..., :-1], features, tokens_there)
        # The targets go to the sequence's grid rather than the logits back to the codec's: nothing large is copied.
        targets = delay(codes, IGNORED)[..., 1:].transpose(1, 2)
        each = F.cross_entropy(logits.flatten(0, 2).float(), targets.flatten(), ignore_index=IGNORED, reduction="none").view(targets.shape)
        if steps_there is None:
            per_codebook = each.sum((0, 1)) / (codes.shape[0] * codes.shape[-1])
        else:
            per_codebook = (each.sum(1) / steps_there.sum(1, keepdim=True)).mean(0)
        return VauraLoss(per_codebook.mean(), per_codebook)
