"""The engine against the decoder itself: the same scores at every step, the same codes on every path."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model.engine import Engine, EngineOptions, quantise
from model.generate import RecomputedLogits, generate, generate_windows
from model.sampling import Sampling
from model.vaura import Vaura, VauraConfig
from tests.model.fill import fill_module, inp

CONFIG = VauraConfig(
    layers=2, width=44, heads=2, visual_width=15, feature_width=13, codebooks=5, card=17, codebook_dim=7, steps_per_token=6, window_tokens=16
)
GREEDY = Sampling(greedy=True, guidance=1.0)
GUIDED = Sampling(guidance=2.5, top_k=7, temperature=0.9)


@pytest.fixture(scope="module")
def model() -> Vaura:
    return filled(CONFIG)


def filled(config: VauraConfig) -> Vaura:
    model = Vaura(config).eval()
    fill_module(model, "sampler.")
    return model


def video(batch: int, tokens: int) -> Tensor:
    return inp(f"video{batch}x{tokens}", (batch, tokens, CONFIG.feature_width))


@pytest.mark.parametrize(("batch", "prefill", "tokens"), [(1, 0, 16), (3, 0, 7), (3, 11, 16), (2, 29, 3), (2, 40, 5)])
def test_scores_are_those_of_the_decoder_at_every_step(model: Vaura, batch: int, prefill: int, tokens: int) -> None:
    length = 41
    sequence = torch.randint(CONFIG.card + 1, (batch, CONFIG.codebooks, length))
    # Buckets of 16 positions, so that several are gone through.
    engine = Engine(model, EngineOptions(bucket_positions=16))
    made = engine.score(video(batch, tokens), sequence, prefill=prefill)
    recomputed = RecomputedLogits(model, video(batch, tokens))
    with torch.no_grad():
        for step in range(prefill, length):
            torch.testing.assert_close(made[:, step - prefill], recomputed(sequence, step + 1), atol=1e-5, rtol=0)


def test_guided_scores_are_with_the_video_and_without(model: Vaura) -> None:
    sequence, tokens = torch.randint(CONFIG.card + 1, (2, CONFIG.codebooks, 23)), 21
    nothing = model.cls_embeddings.unconditional(tokens).expand(2, -1, -1)
    with torch.no_grad():
        expected = torch.cat([model(sequence, video(2, tokens)), model(sequence, nothing)])
    made = Engine(model).score(video(2, tokens), sequence, prefill=3, guided=True)
    torch.testing.assert_close(made, expected[:, 3:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampling", [GREEDY, GUIDED, Sampling(top_p=0.8, guidance=1.0)])
@pytest.mark.parametrize("prompt", [0, 13])
def test_one_engine_gives_the_recomputed_codes_time_after_time(model: Vaura, sampling: Sampling, prompt: int) -> None:
    """Its memory is used again: what an earlier, longer window left must not be seen."""
    engine = Engine(model, EngineOptions(bucket_positions=16))
    generate(engine, video(3, 16), steps=70, sampling=sampling, seeds=[7, 8, 9])
    given = torch.randint(CONFIG.card, (3, CONFIG.codebooks, prompt)) if prompt else None
    made = generate(engine, video(3, 9), steps=37, sampling=sampling, prompt=given, seeds=[1, 2, 3])
    assert torch.equal(made, generate(model, video(3, 9), steps=37, sampling=sampling, prompt=given, seeds=[1, 2, 3], cache=False))
    assert len(engine._free) == 1


def test_windows_at_the_same_time_keep_out_of_each_others_way(model: Vaura) -> None:
    engine, steps = Engine(model), 29
    uniform = torch.rand(2, 1, CONFIG.codebooks, steps + CONFIG.codebooks)
    runs = [engine.begin(video(2, 9)[i : i + 1], steps=steps, sampling=GUIDED, uniform=uniform[i]) for i in range(2)]
    while not runs[0].done:
        for run in runs:
            run.advance(3)
    together = [run.codes() for run in runs]
    for run in runs:
        run.close()
    for i in range(2):
        alone = engine.begin(video(2, 9)[i : i + 1], steps=steps, sampling=GUIDED, uniform=uniform[i])
        alone.advance(1000)
        assert torch.equal(alone.codes(), together[i])
        alone.close()
    assert len(engine._free) == 2


def test_codes_are_final_once_their_last_codebook_is_drawn(model: Vaura) -> None:
    engine, prompt = Engine(model), torch.randint(CONFIG.card, (1, CONFIG.codebooks, 4))
    run = engine.begin(video(1, 3), steps=15, sampling=GREEDY, uniform=torch.zeros(1, CONFIG.codebooks, 20), prompt=prompt)
    finals = []
    while not run.done:
        finals.append(run.codes())
        run.advance(1)
    assert [codes.shape[-1] for codes in finals] == [4, 4, 4, 4, 4, *range(5, 15)]
    whole = run.codes()
    assert whole.shape[-1] == 15 and all(torch.equal(codes, whole[..., : codes.shape[-1]]) for codes in finals)


@pytest.mark.parametrize("sampling", [GUIDED, Sampling(top_p=0.5, guidance=1.0)])
def test_nothing_in_a_window_waits_for_a_value(sampling: Sampling) -> None:
    """Tensors without values: a step that asked for one, or branched on one, would fail here and could not be a CUDA graph."""
    with FakeTensorMode():
        hollow = Vaura(CONFIG).eval()
        made = generate(Engine(hollow), torch.zeros(2, 9, CONFIG.feature_width), steps=21, sampling=sampling, seeds=[1, 2])
    assert made.shape == (2, CONFIG.codebooks, 21)


@pytest.mark.slow
def test_compiled_the_codes_are_the_same(model: Vaura) -> None:
    engine = Engine(model, EngineOptions(graph="compile"))
    for sampling in (Sampling(greedy=True, guidance=3.0), GUIDED):
        given, seeds = video(1, 21), [5]
        made = generate_windows(engine, given, sampling=sampling, stride_segments=2, seeds=seeds)
        assert torch.equal(made, generate_windows(model, given, sampling=sampling, stride_segments=2, seeds=seeds, cache=False))


@pytest.mark.parametrize("graph", ["off", "cuda", "compile"])
@pytest.mark.parametrize("weights", ["as_is", "int8"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_all_paths_agree(graph: str, weights: str) -> None:
    model, sampling = filled(CONFIG).to("cuda"), Sampling(guidance=2.5, greedy=True)
    engine = Engine(model, EngineOptions(graph=graph, weights=weights, bucket_positions=32))
    made = [generate(engine, video(2, tokens).to("cuda"), steps=61, sampling=sampling, seeds=[1, 2]) for tokens in (16, 7)]
    plain = Engine(filled(CONFIG), EngineOptions(weights=weights))
    expected = [generate(plain, video(2, tokens), steps=61, sampling=sampling, seeds=[1, 2]) for tokens in (16, 7)]
    agree = torch.stack(expected) == torch.stack(made).cpu()
    assert agree.float().mean() > (0.99 if weights == "as_is" else 0.5)


def test_int8_weights_are_the_nearest_multiples_of_their_scale() -> None:
    weight = torch.randn(7, 33) * torch.logspace(-3, 2, 7)[:, None]
    weight[3] = 0
    numbers, scale = quantise(weight)
    assert numbers.dtype == torch.int8 and scale is not None and scale.dtype == torch.bfloat16
    error = (numbers.float() * scale.float()[:, None] - weight).abs()
    assert (error <= scale.float()[:, None] * 0.5001).all()
    # A bf16 scale is at most 2^-8 above the exact one.
    assert (scale.float() <= weight.abs().amax(1).clamp(min=1e-30) / 127 * 1.008).all()
    assert numbers.abs().amax(1)[[0, 1, 2, 4, 5, 6]].min() >= 126


def test_int8_is_a_quarter_of_the_bytes_at_a_small_loss() -> None:
    config = VauraConfig(layers=3, width=192, heads=4, visual_width=64, codebooks=3, card=64)
    model = filled(config)
    plain, small = Engine(model), Engine(model, EngineOptions(weights="int8"))
    blocks, heads = (sum(p.numel() for p in part.parameters()) for part in (model.layers, model.lm_heads))
    assert plain.weight_bytes() == 4 * (blocks + heads + config.width)
    assert small.weight_bytes() < 1.05 * blocks + 4 * (heads + config.width)
    sequence = torch.randint(config.card, (2, config.codebooks, 30))
    exact, rounded = (engine.score(inp("vis", (2, 8, 768)), sequence, prefill=11) for engine in (plain, small))
    assert (exact - rounded).abs().mean() < 0.03 * exact.std()
    assert (exact.argmax(-1) == rounded.argmax(-1)).float().mean() > 0.9
    made = generate(small, inp("vis", (2, 8, 768)), steps=17, sampling=Sampling(), seeds=[1, 2])
    assert made.min() >= 0 and made.max() < config.card


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_with_odd_widths(dtype: torch.dtype) -> None:
    """Which not every kernel can do: steps of one, two and many rows, and a prefill."""
    model = filled(CONFIG).to(dtype)
    plain, small = Engine(model), Engine(model, EngineOptions(weights="int8"))
    for batch in (1, 3, 17):
        sequence = torch.randint(CONFIG.card, (batch, CONFIG.codebooks, 9))
        exact, rounded = (engine.score(video(batch, 5), sequence, prefill=4, guided=batch != 3).float() for engine in (plain, small))
        assert (exact - rounded).abs().mean() < 0.05 * exact.std()


def test_the_precision_is_the_models_and_under_autocast_its_own(model: Vaura) -> None:
    assert Engine(model).dtype == torch.float32
    half = Engine(model, dtype=torch.bfloat16)
    assert half.layers[0].wo.weight.dtype == half.dtype == torch.bfloat16
    assert next(model.parameters()).dtype == torch.float32
    codes = [generate(half, video(2, 5), steps=13, sampling=GUIDED, seeds=[1, 2])]
    with torch.autocast("cpu", torch.bfloat16):
        codes.append(generate(model, video(2, 5), steps=13, sampling=GUIDED, seeds=[1, 2]))
        # An engine stays what it was made.
        exact = generate(Engine(model), video(2, 5), steps=13, sampling=GUIDED, seeds=[1, 2])
    assert torch.equal(exact, generate(model, video(2, 5), steps=13, sampling=GUIDED, seeds=[1, 2]))
    assert torch.equal(codes[0], codes[1])


@pytest.mark.parametrize(
    ("options", "problem"),
    [({"weights": "int4"}, "weights=int4"), ({"graph": "fast"}, "graph=fast"), ({"bucket_positions": -1}, "bucket_positions=-1")],
)
def test_impossible_options_are_refused(options: dict[str, str | int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        EngineOptions(**options)  # pyright: ignore[reportArgumentType]


def test_engines_that_cannot_be_made_are_refused(model: Vaura) -> None:
    with pytest.raises(ValueError, match="training mode"):
        Engine(Vaura(CONFIG))
    with pytest.raises(ValueError, match="graph=cuda with the model on cpu"):
        Engine(model, EngineOptions(graph="cuda"))
    assert Engine(model).graph == "off"
    with pytest.raises(ValueError, match="cache=False"):
        generate(Engine(model), video(1, 5), steps=3, sampling=GREEDY, cache=False)
