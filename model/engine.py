"""The decoder made ready for generation: one sequence step after another, each reading the weights once.

All memory is there before the first step: weights side by side where several are used together, keys and values of every position, the sequence.
A step takes its position from a tensor and writes the codes it draws back into the sequence on the device, so nothing waits for anything inside a
window, and a step can be replayed as a CUDA graph. The same functions run on the CPU, where the graph is left out.
Knows the decoder and how codes are drawn. Knows no windows, no codec and no files.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from model.delay import delay, undelay
from model.sampling import Sampling, choose
from model.vaura import NORM_EPS, Block, Vaura, rotary

UNKNOWN = -1
"""Stands in the sequence for a code that is yet to be drawn."""
FEW_ROWS = 4
"""Up to this many rows a compiled product is written as sums: one pass over the weights, which a library's matrix product of so few rows is not."""
GRAPHS = ("auto", "off", "cuda", "compile")


@dataclass(frozen=True)
class EngineOptions:
    """How generation computes. The precision is the model's own."""

    weights: str = "as_is"
    """`int8` keeps the blocks' matrices as 8-bit integers with a scale per output: a quarter of the bytes of fp32, at a small loss."""
    graph: str = "auto"
    """`cuda` replays a step as one CUDA graph, `compile` lets torch.compile fuse it first (a minute to start), `off` runs it as it is written.
    `auto`: off on a CPU, compile for int8 on a GPU, otherwise cuda."""
    bucket_positions: int = 0
    """Attention looks at the cache's positions up to the next multiple of this; 0 chooses 64, or 256 where every length is compiled."""

    def __post_init__(self) -> None:
        if self.weights not in ("as_is", "int8"):
            raise ValueError(f"weights={self.weights}: expected as_is or int8")
        if self.graph not in GRAPHS:
            raise ValueError(f"graph={self.graph}: expected one of {', '.join(GRAPHS)}")
        if self.bucket_positions < 0:
            raise ValueError(f"bucket_positions={self.bucket_positions}: expected 0 or more")


class Matrix(NamedTuple):
    """Weights [outputs, inputs]; where they are int8, with the scale of each output."""

    weight: Tensor
    scale: Tensor | None = None


class BlockWeights(NamedTuple):
    """One block's weights, out of their modules; w1 and w3 as one."""

    attention_norm: Tensor
    wqkv: Matrix
    wo: Matrix
    ffn_norm: Tensor
    w13: Matrix
    w2: Matrix


class Ends(NamedTuple):
    """What stands before and after the blocks: see `StackedCodes`."""

    tables: Tensor
    offsets: Tensor
    projection: Tensor
    bias: Tensor
    norm: Tensor
    heads: Matrix


class Position(NamedTuple):
    """What a step needs of the place it is at, whatever the layer."""

    place: Tensor
    cosines: Tensor
    sines: Tensor
    mask: Tensor


def quantise(weight: Float[Tensor, "outputs inputs"]) -> Matrix:
    """Weight-only int8, symmetric, a scale per output. Scales are such that bf16 holds them exactly: a rounded one would bias a whole channel."""
    largest = weight.detach().float().abs().amax(dim=1).clamp(min=1e-30)
    scale = (largest / 127).bfloat16()
    # Rounded down, the largest weight would be cut off by up to half a step more.
    scale = torch.where(scale.float() * 127 < largest, scale.nextafter(torch.full_like(scale, torch.inf)), scale)
    return Matrix((weight.detach().float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale)


# The functions below are traced by torch.compile, and the tests' type checker with them where it is not kept out.


@no_type_check
def _product(x, matrix):
    """`x @ weight.T` for few rows, in whichever way reads the weights once."""
    weight, scale = matrix
    on_cpu = x.device.type == "cpu"
    if torch.compiler.is_compiling() and len(x) <= FEW_ROWS and not (on_cpu and scale is not None):
        # A sum for each row, which the compiler takes in one pass together.
        sums = torch.stack([(weight.float() * row.float()).sum(-1) for row in x.unbind(0)])
        return (sums if scale is None else sums * scale.float()).to(x.dtype)
    if scale is None:
        # MKL's product of two or more rows with a matrix's transpose reads the matrix several times; the other way round, once, for contiguous rows.
        return torch.mm(weight, x.contiguous().T).T.contiguous() if on_cpu and x.dtype == torch.float32 else F.linear(x, weight)
    # The CPU's int8 product reads past rows that are no multiple of 16, and for many rows the plain one is faster.
    if on_cpu and weight.shape[1] % 16 == 0 and len(x) <= 32:
        return torch._weight_int8pack_mm(x.bfloat16(), weight, scale).to(x.dtype)
    return F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)


@no_type_check
def _norm(x, weight):
    return F.rms_norm(x, weight.shape, weight, NORM_EPS)


@no_type_check
def _turn(qkv, cosines, sines):
    """Rotary positions for queries and keys; the values' angle is zero."""
    precise = qkv.float()
    swapped = precise.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(precise * cosines, swapped, sines).to(qkv.dtype)


@no_type_check
def _first(ends, sequence, visual, index):
    """The first block's input at one position: the video beside the sum of the codes' embeddings, the same for the rows with and without video."""
    codes = sequence.index_select(2, index)[..., 0] + ends.offsets
    audio = F.linear(F.embedding(codes, ends.tables).flatten(1), ends.projection, ends.bias)
    return torch.cat([visual.index_select(1, index)[:, 0], audio.repeat(len(visual) // len(codes), 1)], dim=1)


@no_type_check
def _block(x, weights, cache, position):
    """One position through one block, its key and value put into the cache."""
    rows, _, heads, _, width = cache.shape
    qkv = _product(_norm(x, weights.attention_norm), weights.wqkv).reshape(rows, 3, heads, 1, width)
    turned = _turn(qkv, position.cosines, position.sines)
    cache.index_copy_(3, position.place, turned[:, 1:])
    seen = cache[:, :, :, : position.mask.shape[-1]]
    mixed = F.scaled_dot_product_attention(turned[:, 0], seen[:, 0], seen[:, 1], attn_mask=position.mask)
    x = x + _product(mixed.reshape(rows, -1), weights.wo)
    gate, value = _product(_norm(x, weights.ffn_norm), weights.w13).chunk(2, dim=1)
    return x + _product(F.silu(gate) * value, weights.w2)


@no_type_check
def _last(ends, x):
    """Every codebook's scores of its next code."""
    return _product(_norm(x, ends.norm), ends.heads).reshape(len(x), len(ends.offsets), -1)


@no_type_check
def _prefill_block(x, weights, cache, cosines, sines):
    """All positions of a prompt through one block."""
    rows, _, heads, _, width = cache.shape
    length = x.shape[1]
    normed = _norm(x, weights.attention_norm).flatten(0, 1)
    turned = _turn(_product(normed, weights.wqkv).reshape(rows, length, 3, heads, width).permute(0, 2, 3, 1, 4), cosines, sines)
    cache[:, :, :, :length] = turned[:, 1:]
    mixed = F.scaled_dot_product_attention(turned[:, 0], turned[:, 1], turned[:, 2], is_causal=True)
    x = x + _product(mixed.transpose(1, 2).reshape(rows * length, -1), weights.wo).view_as(x)
    gate, value = _product(_norm(x, weights.ffn_norm).flatten(0, 1), weights.w13).chunk(2, dim=1)
    return x + _product(F.silu(gate) * value, weights.w2).view_as(x)


class Buffers:
    """The memory of one batch being generated, and the graphs that were recorded on it. Zeros, as masked positions must be finite."""

    def __init__(self, engine: "Engine", batch: int, guided: bool) -> None:
        config, rows, positions = engine.config, batch * (1 + guided), engine.positions
        like = {"device": engine.device, "dtype": engine.dtype}
        self.batch, self.guided = batch, guided
        self.index = torch.zeros(1, dtype=torch.long, device=engine.device)
        self.sequence = torch.zeros(batch, config.codebooks, positions + 1, dtype=torch.long, device=engine.device)
        self.uniform = torch.zeros(batch, config.codebooks, positions + 1, device=engine.device)
        self.visual = torch.zeros(rows, positions, config.visual_width, **like)
        self.caches = list(torch.zeros(config.layers, rows, 2, config.heads, positions, config.width // config.heads, **like))
        self.graphs: dict[tuple[int, Sampling], torch.cuda.CUDAGraph] = {}


class Engine:
    """A decoder ready to generate, for any number of windows and videos one after another, or several at a time.

    Made from the model as it is, in its precision or in `dtype`: after further training, make another. Fusing two matrices of each block takes memory
    of its own (two fifths of the model's), the rest is shared; with int8 nothing large is, and the model can be let go.
    """

    def __init__(self, model: Vaura, options: EngineOptions | None = None, *, dtype: torch.dtype | None = None) -> None:
        options = EngineOptions() if options is None else options
        if model.training:
            raise ValueError("the model is in training mode, with dropout on; call model.eval() before generating")
        self.config, self.options = model.config, options
        self.device, self.dtype = model.norm.weight.device, dtype or model.norm.weight.dtype
        self.graph = self._graph_kind()
        bucket = options.bucket_positions or (256 if self.graph == "compile" else 64)
        self.bucket_positions = min(bucket, self.config.max_steps)
        self.positions = -(-self.config.max_steps // self.bucket_positions) * self.bucket_positions
        with torch.inference_mode():
            self._take_weights(model)
            self._take_rope()
        compiled: Callable[..., Any] = self._compiled if self.graph == "compile" else lambda function: function
        self._first, self._block, self._last = compiled(_first), compiled(_block), compiled(_last)
        self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self._free: list[Buffers] = []

    def _graph_kind(self) -> str:
        on_gpu, kind = self.device.type == "cuda", self.options.graph
        if kind == "cuda" and not on_gpu:
            raise ValueError(f"graph=cuda with the model on {self.device}; expected auto, off or compile there")
        if kind != "auto":
            return kind
        return "off" if not on_gpu else "compile" if self.options.weights == "int8" else "cuda"

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Each function once for all layers, as their weights are arguments: a compilation of seconds rather than minutes."""
        # A pass over the weights beats a matrix product for few rows on GPUs, too, if its tiles are tuned.
        tuned: dict[str, Any] | None = {"coordinate_descent_tuning": True} if self.device.type == "cuda" else None
        # Several batch sizes and buckets are several compilations, which is no mistake. torch's overloads leave the argument out.
        return torch.compile(function, fullgraph=True, dynamic=False, options=tuned, recompile_limit=1000)  # pyright: ignore[reportCallIssue]

    def _take_weights(self, model: Vaura) -> None:
        def own(weight: Tensor) -> Tensor:
            return weight.detach().to(self.dtype)

        def matrix(*parts: nn.Linear) -> Matrix:
            weight = parts[0].weight if len(parts) == 1 else torch.cat([part.weight for part in parts])
            return quantise(weight) if self.options.weights == "int8" else Matrix(own(weight))

        def block(layer: Block) -> BlockWeights:
            attention, feed_forward = layer.attention, layer.feed_forward
            return BlockWeights(
                attention_norm=own(layer.attention_norm.weight),
                wqkv=matrix(attention.wqkv),
                wo=matrix(attention.wo),
                ffn_norm=own(layer.ffn_norm.weight),
                w13=matrix(feed_forward.w1, feed_forward.w3),
                w2=matrix(feed_forward.w2),
            )

        self.layers = [block(layer) for layer in model.layers if isinstance(layer, Block)]
        codes = model.stacked_codes()
        # The heads stay as they are: few of the weights, and the last word.
        self.ends = Ends(
            tables=own(codes.tables),
            offsets=codes.offsets,
            projection=own(codes.projection),
            bias=own(codes.bias),
            norm=own(model.norm.weight),
            heads=Matrix(own(codes.heads)),
        )
        # Of the model itself only what aligns the video is kept.
        visual = copy.copy(model)
        visual._modules = {"cls_embeddings": model.cls_embeddings}
        self._visual = visual if self.dtype == model.norm.weight.dtype else copy.deepcopy(visual).to(self.dtype)

    def _take_rope(self) -> None:
        """Angles of every position for queries, keys and values (zero), and which positions each may look at."""
        turning = rotary(self.positions, self.config.width // self.config.heads, self.device)
        still = torch.stack([torch.ones_like(turning[0]), torch.zeros_like(turning[1])])
        self.rope = torch.stack([turning, turning, still], dim=1)[:, :, None]
        hidden = torch.full((self.positions, self.positions), -torch.inf, device=self.device, dtype=self.dtype)
        self.mask = hidden.triu(1)

    def weight_bytes(self) -> int:
        """Bytes of the weights that every step reads; of the embedding tables it reads only rows."""
        tensors = [
            t for layer in [*self.layers, (self.ends.norm, self.ends.heads)] for part in layer for t in (part if isinstance(part, Matrix) else [part])
        ]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def begin(
        self,
        features: Float[Tensor, "b tokens c"],
        *,
        steps: int,
        sampling: Sampling,
        uniform: Float[Tensor, "b q s"],
        prompt: Int[Tensor, "b q p"] | None = None,
    ) -> "Run":
        """A window of `steps` codec steps, the first of them `prompt` word for word; `uniform` has a number for each of its steps + codebooks places.

        Ends with `Run.close`. Raises ValueError for more than the model's positions or a prompt that leaves nothing to do.
        """
        known = check_length(self.config.codebooks, self.config.max_steps, steps, prompt)
        buffers = self._take_buffers(len(features), sampling.guided)
        run = Run(self, buffers, steps, known, sampling)
        with self._computing():
            run.prepare()
            codes = torch.full((len(features), self.config.codebooks, steps), UNKNOWN, device=self.device)
            if prompt is not None:
                codes[..., :known] = prompt
            sequence = delay(codes, self.config.special)
            buffers.sequence[..., : sequence.shape[-1]] = sequence
            buffers.uniform[..., : uniform.shape[-1]] = uniform
            self._load(buffers, features)
            self._prefill(buffers, known)
        return run

    def score(
        self, features: Float[Tensor, "b tokens c"], sequence: Int[Tensor, "b q s"], *, prefill: int = 0, guided: bool = False
    ) -> Float[Tensor, "rows scored q card"]:
        """Scores after each position of a given sequence, as generation makes them: the first `prefill` positions at once, the others in steps.

        Guided, the rows without video follow those with it.
        """
        buffers = self._take_buffers(len(features), guided)
        scores = []
        with self._computing():
            buffers.sequence[..., : sequence.shape[-1]] = sequence
            self._load(buffers, features)
            self._prefill(buffers, prefill)
            for position in range(prefill, sequence.shape[-1]):
                scores.append(self._scores(buffers, self._bucket(position)).clone())
                buffers.index += 1
        self._free.append(buffers)
        return torch.stack(scores, dim=1).clone()

    def _computing(self) -> "_Computing":
        return _Computing(self.device.type)

    def _take_buffers(self, batch: int, guided: bool) -> Buffers:
        for buffers in self._free:
            if (buffers.batch, buffers.guided) == (batch, guided):
                self._free.remove(buffers)
                return buffers
        with torch.inference_mode():
            return Buffers(self, batch, guided)

    def _load(self, buffers: Buffers, features: Tensor) -> None:
        """The video into the buffers; guided, what stands for no video below it."""
        features = features.to(self.device, self.dtype)
        if buffers.guided:
            nothing = self._visual.cls_embeddings.unconditional(features.shape[1]).to(self.dtype)
            features = torch.cat([features, nothing.expand(len(features), -1, -1)])
        buffers.visual.copy_(self._visual.align(features, self.positions))
        buffers.index.zero_()

    def _prefill(self, buffers: Buffers, known: int) -> None:
        """The first `known` positions at once."""
        if known == 0:
            return
        ends, codes = self.ends, buffers.sequence[..., :known].transpose(1, 2) + self.ends.offsets
        audio = F.linear(F.embedding(codes, ends.tables).flatten(2), ends.projection, ends.bias)
        x = torch.cat([buffers.visual[:, :known], audio.repeat(1 + buffers.guided, 1, 1)], dim=-1)
        cosines, sines = self.rope[..., :known, :]
        for weights, cache in zip(self.layers, buffers.caches, strict=True):
            x = _prefill_block(x, weights, cache, cosines, sines)
        buffers.index.fill_(known)

    def _bucket(self, position: int) -> int:
        """How far into the cache a step at `position` looks."""
        return (position // self.bucket_positions + 1) * self.bucket_positions

    def _scores(self, buffers: Buffers, bucket: int) -> Tensor:
        """Scores after the position that the buffers are at."""
        index = buffers.index
        cosines, sines = self.rope.index_select(3, index)
        position = Position(index, cosines, sines, self.mask.index_select(0, index)[:, :bucket])
        x = self._first(self.ends, buffers.sequence, buffers.visual, index)
        for weights, cache in zip(self.layers, buffers.caches, strict=True):
            x = self._block(x, weights, cache, position)
        return self._last(self.ends, x)

    def _step(self, buffers: Buffers, bucket: int, sampling: Sampling) -> None:
        """One step: the codes after the position are drawn and written where they are not known, and the position moves on. All on the device."""
        logits, following = self._scores(buffers, bucket), buffers.index + 1
        chosen = choose(logits, buffers.uniform.index_select(2, following)[..., 0], sampling)
        there = buffers.sequence.index_select(2, following)
        buffers.sequence.index_copy_(2, following, torch.where(there == UNKNOWN, chosen[..., None], there))
        buffers.index.copy_(following)

    def _recorded(self, buffers: Buffers, bucket: int, sampling: Sampling) -> torch.cuda.CUDAGraph:
        """The step as a CUDA graph. Recording runs it, on whatever the buffers hold: to be done before they are loaded."""
        main, side = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        buffers.index.zero_()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            # Libraries choose kernels and take workspaces on first use, and torch.compile compiles: none of it may happen while recording.
            for _ in range(3):
                self._step(buffers, bucket, sampling)
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=side):
            self._step(buffers, bucket, sampling)
        return graph


class Run:
    """One window being made. `position` is the last sequence step whose codes are there."""

    def __init__(self, engine: Engine, buffers: Buffers, steps: int, known: int, sampling: Sampling) -> None:
        self._engine, self._buffers, self._sampling = engine, buffers, sampling
        self._steps, self._known = steps, known
        self._end = steps + engine.config.codebooks - 1
        self.position = known

    @property
    def done(self) -> bool:
        """Whether all codes are there."""
        return self.position == self._end

    @property
    def final_steps(self) -> int:
        """Codec steps that are final: those whose last codebook is drawn."""
        return max(self._known, self.position + 1 - self._engine.config.codebooks)

    def prepare(self) -> None:
        """Record the graphs that are not there yet."""
        if self._engine.device.type != "cuda" or self._engine.graph == "off":
            return
        graphs = self._buffers.graphs
        if any(sampling != self._sampling for _, sampling in graphs):
            graphs.clear()
        for bucket in sorted({self._engine._bucket(position) for position in range(self.position, self._end)}):
            if (bucket, self._sampling) not in graphs:
                graphs[bucket, self._sampling] = self._engine._recorded(self._buffers, bucket, self._sampling)

    def advance(self, positions: int) -> None:
        """Make up to so many sequence steps. Returns when they are queued, not when they are done."""
        with self._engine._computing():
            for _ in range(min(positions, self._end - self.position)):
                bucket = self._engine._bucket(self.position)
                graph = self._buffers.graphs.get((bucket, self._sampling))
                if graph is None:
                    self._engine._step(self._buffers, bucket, self._sampling)
                else:
                    graph.replay()
                self.position += 1

    def codes(self) -> Int[Tensor, "b q n"]:
        """The final codes so far, prompt included."""
        final = self.final_steps
        return undelay(self._buffers.sequence[..., : final + self._engine.config.codebooks], final).clone()

    def close(self) -> None:
        """Give the memory back to the engine."""
        self._engine._free.append(self._buffers)


class _Computing:
    """While an engine computes: no gradients, and its own precision rather than autocast's."""

    def __init__(self, device_type: str) -> None:
        self._contexts = torch.inference_mode(), torch.autocast(device_type, enabled=False)

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *_: object) -> None:
        for context in reversed(self._contexts):
            context.__exit__(None, None, None)


def check_length(codebooks: int, max_steps: int, steps: int, prompt: Tensor | None) -> int:
    """The prompt's length. Raises ValueError where it leaves nothing to make, or there are more positions than the model has."""
    known, positions = 0 if prompt is None else prompt.shape[-1], steps + codebooks - 1
    if known >= steps:
        raise ValueError(f"a prompt of {known} steps and {steps} steps to make: expected a prompt shorter than what is made")
    if positions > max_steps:
        raise ValueError(f"{steps} steps need {positions} positions; the model has max_steps={max_steps}: take shorter windows")
    return known
