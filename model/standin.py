"""Fits small stand-ins for networks whose published weights cannot be had: a visual tower and a codec, from a handful of clips, in minutes.

They serve to run the whole path and to make timing learnable; nobody should mistake them for the real ones. This module knows tensors only:
who calls it decodes clips and saves the result (`save_motion_tower`, `save_codec`).

    tower = fit_tower(batches, TowerFit(steps=500))     # batches of (frames uint8 [b, 16, h, w, 3], sound float [b, samples] of the same 0.64 s)
    codec = fit_codec(waves)                            # waves float [channels, samples] at 24 kHz, mono
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from model.codecs import LappedCodec, LappedConfig, nearest
from model.motion_tower import MotionTower, MotionTowerConfig
from model.synchformer_visual import normalise

Progress = Callable[[int, int, float], None]
"""Called after every step with (steps done, steps in all, loss)."""


def silent(_done: int, _steps: int, _loss: float) -> None:
    """Reports nothing."""


# --- the tower ------------------------------------------------------------------------------------------------------------------------

SOUND_BANDS = 8
"""Bands of the sound that the tower learns to foretell."""
ONSET_RISE = 0.6
"""Rise of the sound's energy, in log10 from one quarter of a token to the next, that counts as an onset: by a factor of four."""


@dataclass(frozen=True)
class TowerFit:
    """How the stand-in tower is fitted."""

    tower: MotionTowerConfig = field(default_factory=MotionTowerConfig)
    """The tower's shape."""
    steps: int = 1000
    """Batches to train on."""
    learning_rate: float = 4e-3
    """Peak of AdamW's learning rate: linear warm-up over a tenth of the steps, then a cosine to zero."""
    weight_decay: float = 0.05
    """AdamW's weight decay."""
    loudness: float = 0.3
    """Weight of the error in the bands' loudness, beside that in the onsets."""
    seed: int = 0
    """Of the initial weights."""


def fit_tower(
    batches: Iterable[tuple[UInt8[Tensor, "b t h w 3"], Float[Tensor, "b samples"]]], config: TowerFit = TowerFit(), *, progress: Progress = silent
) -> MotionTower:
    """A tower trained to foretell, from each segment's tokens, the sound over each token's time: an audio-visual task whose solution needs the
    moment and kind of what happens (as in Owens et al. 2016), through a linear head that is thrown away.

    A batch is frames [b, 16, h, w, 3] of the tower's `image_size / reduce` (so that the averaging of pixels is done once, by the caller) and the
    mono sound of the same segments [b, samples], samples a multiple of the tokens. Training ends after `config.steps` batches or when there
    are no more. `progress` gets the loss.
    """
    torch.manual_seed(config.seed)
    reduced = replace(config.tower, image_size=config.tower.image_size // config.tower.reduce, reduce=1)
    tower, head = MotionTower(reduced), nn.Linear(config.tower.width, SOUND_BANDS + 1)
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps + 1, pct_start=0.1)
    statistics = nn.BatchNorm1d(SOUND_BANDS, affine=False, momentum=None)
    for step, (frames, wave) in zip(range(config.steps), batches, strict=False):
        *loudness, rise = sound_targets(wave, config.tower.tokens).unbind(-1)
        bands = torch.stack(loudness, -1)
        statistics(bands.flatten(0, 1))
        mean, variance = statistics.running_mean, statistics.running_var
        assert mean is not None and variance is not None
        scaled = (bands - mean) / (variance + 1e-3).sqrt()
        foretold = head(tower(normalise(frames)[:, None])[:, 0])
        onsets = F.binary_cross_entropy_with_logits(foretold[..., -1], (rise > ONSET_RISE).float())
        loss = onsets + config.loudness * F.mse_loss(foretold[..., :-1], scaled)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(step + 1, config.steps, loss.item())
    fitted = MotionTower(config.tower)
    fitted.load_state_dict(tower.state_dict())
    return fitted.requires_grad_(False).eval()


def sound_targets(wave: Float[Tensor, "b samples"], tokens: int) -> Float[Tensor, "b tokens targets"]:
    """Loudness of the sound over each token's time in octave-like bands, and its strongest rise (in 1/4 of a token), all in log10 of energy."""
    if wave.shape[1] % (4 * tokens):
        raise ValueError(f"sound of {wave.shape[1]} samples; expected a multiple of {4 * tokens}")
    spectrum = torch.fft.rfft(wave.unflatten(1, (tokens, -1)), norm="ortho").abs().square()
    # The lowest band begins at 0.
    edges = (torch.logspace(-SOUND_BANDS * 0.75, 0, SOUND_BANDS + 1, base=2) * spectrum.shape[-1]).long().tolist()
    edges[0] = 0
    bands = [spectrum[..., lo : max(hi, lo + 1)].mean(-1) for lo, hi in itertools.pairwise(edges)]
    quarters = torch.log10(wave.unflatten(1, (4 * tokens, -1)).square().mean(-1) + 1e-6)
    rises = F.pad(quarters.diff(dim=1).clamp(min=0), (1, 0)).unflatten(1, (tokens, 4)).amax(-1)
    return torch.cat([torch.log10(torch.stack(bands, -1) + 1e-6), rises[..., None]], dim=-1)


# --- the codec ------------------------------------------------------------------------------------------------------------------------


def fit_codec(
    waves: Iterable[Float[Tensor, "channels samples"]],
    config: LappedConfig | None = None,
    *,
    iterations: int = 25,
    max_steps: int = 60_000,
    waveform_pairs: int = 4,
    seed: int = 0,
    progress: Progress = silent,
) -> LappedCodec:
    """A stand-in codec with codebooks fitted to `waves` (mono, at the codec's rate). The same waves and seed give the same codec.

    Only steps with sound count, `max_steps` of them at most, drawn by chance. `config.card` is halved until at least 8 fall on an entry. The
    lowest `waveform_pairs` pairs of bands get entries that follow the waveform; the entries of those above are scaled to unit loudness, where
    hearing wants the energy more than the phase. `progress` gets the codebooks done and how far the last one was off (mean square).
    """
    config = config or LappedConfig()
    generator = torch.Generator().manual_seed(seed)
    analyser = LappedCodec(config)
    coefficients = torch.cat([c[(analyser.levels(c) > config.floor_db + 6).any(1)].float() for c in (analyser.analyse(wave[0]) for wave in waves)])
    if len(coefficients) < 16:
        raise ValueError(f"the waves have sound in {len(coefficients)} steps of {config.hop_samples} samples; a codec needs at least 16")
    coefficients = coefficients[torch.randperm(len(coefficients), generator=generator)[:max_steps]].double()
    while config.card * 8 > len(coefficients):
        config = replace(config, card=config.card // 2)
    codec = LappedCodec(config)

    levels = codec.levels(coefficients).float()
    residual = levels
    for stage in range(config.envelope_codebooks):
        book = kmeans(residual, config.card, iterations=iterations, generator=generator)
        book[0] = config.floor_db if stage == 0 else 0  # Silence is code 0 throughout, exactly.
        codec.envelopes[stage] = book
        residual = residual - book[nearest(residual, book)]
        progress(stage + 1, codec.codebooks, residual.square().mean().item())

    gains = codec.gains(codec.encode_levels(levels.double())[1]).float()
    shapes = torch.where(gains > 0, coefficients.float() / gains.clamp(min=1e-9), 0).clamp(-8, 8)
    for pair, (lo, hi) in enumerate(config.pairs):
        middle = config.band_edges[2 * pair + 1] - lo
        energy = gains[:, lo:hi].square().mean(1)
        rows, weights = shapes[energy > 0, lo:hi], energy[energy > 0] ** 0.7
        rows = rows if pair < waveform_pairs else _unit_loudness(rows, middle, generator)
        if len(rows) >= config.card:
            book = kmeans(rows, config.card, weights=weights, iterations=iterations, generator=generator)
        else:  # Hardly any sound up there: any shape will do.
            book = torch.randn(config.card, hi - lo, generator=generator)
        codec.shapes[pair].data = book if pair < waveform_pairs else _unit_loudness(book, middle, generator)
        error = (rows - book[nearest(rows, book)]).square().mean().item() if len(rows) else 0.0
        progress(config.envelope_codebooks + pair + 1, codec.codebooks, error)
    return codec.eval()


def _unit_loudness(rows: Float[Tensor, "n d"], middle: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
    """Rows whose two bands, `[0, middle)` and the rest, have a mean square of 1. A band of zeros becomes noise: as an entry's, it would be the
    nearest to any noise, and silence it."""
    noisy = rows + 0.03 * torch.randn(rows.shape, generator=generator)
    return torch.cat([band / band.square().mean(1, keepdim=True).sqrt() for band in (noisy[:, :middle], noisy[:, middle:])], dim=1)


def kmeans(
    rows: Float[Tensor, "n d"],
    entries: int,
    *,
    generator: torch.Generator,
    weights: Float[Tensor, "n"] | None = None,
    iterations: int = 25,
    batch: int = 8192,
) -> Float[Tensor, "entries d"]:
    """Mini-batch k-means (Sculley 2010). Entries that next to no row chooses move to rows that are far from theirs; not in the last iterations."""
    weights = torch.ones(len(rows)) if weights is None else weights
    book = rows[torch.randperm(len(rows), generator=generator)[:entries]].clone()
    mass = torch.zeros(entries)
    for iteration in range(iterations):
        chosen = torch.randperm(len(rows), generator=generator)[:batch]
        x, w = rows[chosen], weights[chosen]
        index = nearest(x, book)
        added = torch.zeros(entries).index_add_(0, index, w)
        mean = torch.zeros_like(book).index_add_(0, index, x * w[:, None]) / added.clamp(min=1e-9)[:, None]
        mass = 0.7 * mass + added
        book += (added / mass.clamp(min=1e-9))[:, None] * torch.where(added[:, None] > 0, mean - book, 0)
        idle = mass < 0.05 * mass.mean()
        if idle.any() and iteration < iterations - 5:
            far = (x - book[index]).square().sum(1) * w
            book[idle] = x[torch.multinomial(far + 1e-12, int(idle.sum()), replacement=True, generator=generator)]
            mass[idle] = 0.3 * mass.mean()
    return book
