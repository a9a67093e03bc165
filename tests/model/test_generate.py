from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model.engine import Engine, EngineOptions
from model.generate import Sampling, generate, generate_windows, stream_windows
from model.sampling import draw, probabilities
from model.schedule import Window, published_schedule, total_steps, windows
from model.vaura import Vaura, VauraConfig
from tests.model.fill import fill_module, inp

REFERENCE = VauraConfig(layers=2, width=192, heads=4, visual_width=64)
"""The small model of the reference runs."""
ENCODEC = VauraConfig(
    layers=2, width=44, heads=2, visual_width=15, feature_width=13, codebooks=5, card=17, codebook_dim=7, steps_per_token=6, window_tokens=16
)
"""EnCodec's clock with coprime sizes; windows of two segments."""
GREEDY = Sampling(greedy=True, guidance=1.0)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "goldens" / "vaura.npz") as numbers:
        return dict(numbers)


@pytest.fixture(scope="module")
def reference() -> Vaura:
    return filled(REFERENCE)


@pytest.fixture(scope="module")
def model() -> Vaura:
    return filled(ENCODEC)


def filled(config: VauraConfig) -> Vaura:
    model = Vaura(config).eval()
    fill_module(model, "sampler.")
    return model


def video(batch: int, tokens: int) -> Tensor:
    return inp(f"video{batch}x{tokens}", (batch, tokens, ENCODEC.feature_width))


def codes(batch: int, steps: int) -> Tensor:
    return torch.randint(ENCODEC.card, (batch, ENCODEC.codebooks, steps), generator=torch.Generator().manual_seed(steps))


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_greedy_codes_are_those_of_the_reference(reference: Vaura, golden: dict[str, np.ndarray], guidance: float, cache: bool) -> None:
    sampling = Sampling(greedy=True, guidance=guidance)
    made = generate(reference, inp("vis32", (2, 32, 768)), steps=64, sampling=sampling, cache=cache)
    assert np.array_equal(made.numpy(), golden[f"greedy64_cfg{guidance}"])


@pytest.mark.parametrize("cache", [True, False])
def test_codes_after_a_prompt_are_those_of_the_reference(reference: Vaura, golden: dict[str, np.ndarray], cache: bool) -> None:
    prompt = torch.from_numpy(golden["prompt20"])
    made = generate(reference, inp("vis32", (2, 32, 768)), steps=40, sampling=GREEDY, prompt=prompt, cache=cache)
    assert np.array_equal(made.numpy(), golden["greedy40_prompt20_cfg1"])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_published_windows_give_the_codes_of_the_reference(reference: Vaura, golden: dict[str, np.ndarray], guidance: float) -> None:
    sampling = Sampling(greedy=True, guidance=guidance)
    made = generate_windows(reference, inp("vis40", (1, 40, 768)), sampling=sampling, schedule=published_schedule(3.2, 0.64, 5))
    assert np.array_equal(made.numpy(), golden[f"chunked_3.2s_cfg{guidance}"])


def test_filters_are_those_of_the_reference(golden: dict[str, np.ndarray]) -> None:
    logits = torch.from_numpy(golden["filter_logits"])
    np.testing.assert_allclose(probabilities(logits, Sampling(top_k=128)), golden["top_k128_t1"], atol=1e-7)
    np.testing.assert_allclose(probabilities(logits, Sampling(top_k=128, temperature=0.95)), golden["top_k128_t095"], atol=1e-7)
    nucleus = probabilities(logits, Sampling(top_p=0.9))
    np.testing.assert_allclose(nucleus.sort(-1, descending=True).values, golden["top_p09_sorted"], atol=1e-7)
    # Sorted numbers do not say whose they are: those that stay are as likely to each other as before.
    kept = nucleus > 0
    plain = torch.softmax(logits, -1)
    torch.testing.assert_close(nucleus[kept], torch.where(kept, plain / (plain * kept).sum(-1, keepdim=True), 0)[kept])


@pytest.mark.parametrize("prompt", [0, 19])
@pytest.mark.parametrize("sampling", [Sampling(guidance=1.0, top_k=5), Sampling(guidance=2.5, top_p=0.9, temperature=0.8), GREEDY])
def test_cache_or_not_the_codes_are_the_same(model: Vaura, sampling: Sampling, prompt: int) -> None:
    given = codes(3, prompt) if prompt else None
    made = [generate(model, video(3, 9), steps=37, sampling=sampling, prompt=given, seeds=[5, 6, 7], cache=cache).tolist() for cache in (True, False)]
    assert made[0] == made[1]


@pytest.mark.parametrize("prompt", [0, 4])
def test_generation_against_its_definition(model: Vaura, prompt: int) -> None:
    """One code at a time: the sequence so far, guided logits of its last position, the most likely code of each codebook that is not known."""
    features, steps, q = video(1, 7), 9, ENCODEC.codebooks
    nothing = model.cls_embeddings.uncond_embedding[:7][None]
    expected = torch.full((q, steps), -1)
    expected[:, :prompt] = codes(1, prompt)[0] if prompt else 0
    with torch.no_grad():
        for step in range(prompt + 1, steps + q):
            sequence = torch.full((1, q, step), ENCODEC.special)
            for k in range(q):
                for t in range(min(steps, step - 1 - k)):
                    sequence[0, k, t + 1 + k] = expected[k, t]
            with_video, without = model(sequence, features)[0, -1], model(sequence, nothing)[0, -1]
            guided = without + 1.5 * (with_video - without)
            for k in range(q):
                t = step - 1 - k
                if prompt <= t < steps:
                    expected[k, t] = guided[k].argmax()
    made = generate(model, features, steps=steps, sampling=Sampling(greedy=True, guidance=1.5), prompt=expected[None, :, :prompt] if prompt else None)
    assert torch.equal(made[0], expected)
    assert len(set(made.flatten().tolist())) > 3


def test_a_sample_does_not_depend_on_its_neighbours(model: Vaura) -> None:
    features, sampling = video(3, 11), Sampling(guidance=2.0, top_k=0)
    together = generate(model, features, steps=31, sampling=sampling, seeds=[3, 4, 5])
    alone = torch.cat([generate(model, features[i : i + 1], steps=31, sampling=sampling, seeds=[3 + i]) for i in range(3)])
    assert torch.equal(together, alone)
    assert not torch.equal(together, generate(model, features, steps=31, sampling=sampling, seeds=[3, 4, 6]))
    long = video(2, 24)
    together = generate_windows(model, long, sampling=sampling, seeds=[3, 4])
    assert torch.equal(together[1:], generate_windows(model, long[1:], sampling=sampling, seeds=[4]))


def test_without_seeds_the_global_generator_decides(model: Vaura) -> None:
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(generate(model, video(2, 5), steps=13, sampling=Sampling(guidance=1.0)).tolist())
    assert made[0] == made[1] != made[2]


def test_codes_can_be_trained_on(model: Vaura) -> None:
    features = video(2, 5)
    made = generate(model, features, steps=13, sampling=Sampling())
    model.training_loss(made, features).total.backward()
    model.zero_grad()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_generates(dtype: torch.dtype) -> None:
    made = generate(filled(ENCODEC).to(dtype), video(2, 5).to(dtype), steps=13, sampling=Sampling(guidance=2.0), seeds=[1, 2])
    assert made.min() >= 0 and made.max() < ENCODEC.card
    with torch.autocast("cpu", dtype):
        mixed = generate(filled(ENCODEC), video(2, 5), steps=13, sampling=Sampling(guidance=2.0), seeds=[1, 2])
    assert mixed.min() >= 0 and mixed.max() < ENCODEC.card


@pytest.mark.parametrize(("tokens", "window_segments", "stride_segments"), [(40, 2, 1), (40, 3, 2), (16, 2, 2), (8, 2, 1), (29, 1, 1)])
def test_each_window_keeps_the_codes_before_it(model: Vaura, tokens: int, window_segments: int, stride_segments: int) -> None:
    features = video(2, tokens)
    made, uncached = (
        generate_windows(model, features, sampling=GREEDY, window_segments=window_segments, stride_segments=stride_segments, cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(made, uncached)
    assert made.shape == (2, ENCODEC.codebooks, 6 * tokens)
    known = torch.empty(2, ENCODEC.codebooks, 0, dtype=torch.long)
    for w in windows(tokens, model.config.token_clock, window_tokens=8 * window_segments, stride_tokens=8 * stride_segments):
        seen, prompt = features[:, list(w.tokens)], known[..., w.steps.start :]
        new = generate(model, seen, steps=len(w.steps), sampling=GREEDY, prompt=prompt)
        assert torch.equal(new[..., : prompt.shape[-1]], prompt)
        known = torch.cat([known[..., : w.steps.start], new], -1)
    assert torch.equal(made, known)


def pieces(features: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    """The video in pieces of these sizes, the last again and again."""
    start = 0
    while start < features.shape[1]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        yield features[:, start : start + size]
        start += size


@pytest.mark.parametrize("piece_steps", [0, 1, 7])
@pytest.mark.parametrize(("tokens", "sizes"), [(29, [3, 17, 1]), (16, [5]), (7, [2])])
def test_a_stream_is_the_whole_in_pieces(model: Vaura, tokens: int, sizes: list[int], piece_steps: int) -> None:
    features, sampling = video(2, tokens), Sampling(guidance=2.0, top_k=7)
    whole = generate_windows(model, features, sampling=sampling, seeds=[1, 2])
    made = list(stream_windows(model, pieces(features, sizes), sampling=sampling, seeds=[1, 2], piece_steps=piece_steps))
    assert torch.equal(torch.cat(made, -1), whole) and all(piece.shape[-1] for piece in made)
    assert len(made) == len(windows(tokens, Fraction(6), window_tokens=16, stride_tokens=8)) or piece_steps > 0
    if piece_steps == 1:
        assert {piece.shape[-1] for piece in made} == {1}


def test_a_stream_hands_out_a_window_once_the_next_token_is_there(model: Vaura) -> None:
    asked: list[int] = []

    def arriving() -> Iterator[Tensor]:
        for start in range(0, 40, 4):
            asked.append(start + 4)
            yield video(1, 40)[:, start : start + 4]

    seen = [(asked[-1], codes.shape[-1], torch.is_inference_mode_enabled()) for codes in stream_windows(model, arriving(), sampling=GREEDY)]
    assert seen == [(20, 96, False), (28, 48, False), (36, 48, False), (40, 48, False)]


@pytest.mark.parametrize("prompt", [50, 130, 192, 239])
def test_a_prompt_may_be_longer_than_a_window(model: Vaura, prompt: int) -> None:
    features, given = video(2, 40), codes(2, prompt)
    made = generate_windows(Engine(model, EngineOptions(bucket_positions=24)), features, sampling=GREEDY, prompt=given)
    assert made.shape[-1] == 240 and torch.equal(made[..., :prompt], given)
    assert torch.equal(made, generate_windows(model, features, sampling=GREEDY, prompt=given, cache=False))
    streamed = stream_windows(model, pieces(features, [9]), sampling=GREEDY, prompt=given, piece_steps=5)
    assert torch.equal(torch.cat(list(streamed), -1), made)
    # The windows that have something to make are those that a prompt of the same codes would have come to.
    known = given
    for w in windows(40, Fraction(6), window_tokens=16, stride_tokens=8):
        if w.steps.stop > prompt:
            new = generate(model, features[:, list(w.tokens)], steps=len(w.steps), sampling=GREEDY, prompt=known[..., w.steps.start :])
            known = torch.cat([known[..., : w.steps.start], new], -1)
    assert torch.equal(made, known)


def test_the_clock_says_where_windows_lie_and_the_model_how_they_align() -> None:
    """A model trained with 7 steps per token beside a codec of 6.890625: the sound covers the video, to the step."""
    seven = filled(VauraConfig(**{**vars(ENCODEC), "steps_per_token": 7}))
    clock = Fraction(441, 64)
    for tokens in (5, 16, 41):
        features = video(1, tokens)
        made = generate_windows(seven, features, sampling=GREEDY, clock=clock)
        assert made.shape[-1] == total_steps(tokens, clock)
        assert torch.equal(torch.cat(list(stream_windows(seven, pieces(features, [3]), sampling=GREEDY, clock=clock)), -1), made)
    assert total_steps(32, clock) == 221


def test_guidance_at_any_length(reference: Vaura) -> None:
    """Where the published code raises an error: windows of other than 32 tokens."""
    made = generate_windows(
        reference, inp("vis40", (1, 40, 768)), sampling=Sampling(greedy=True, guidance=3.0), schedule=published_schedule(3.2, 1.28, 5)
    )
    assert made.shape == (1, 9, 276)


def test_a_long_stream_keeps_no_more_than_a_window_needs(model: Vaura, monkeypatch: pytest.MonkeyPatch) -> None:
    from model import generate as module

    kept: list[int] = []

    class Watched(module._Track):
        def forget(self, step: int) -> None:
            super().forget(step)
            assert self.codes is not None
            kept.append(self.codes.untyped_storage().nbytes() // (8 * ENCODEC.codebooks))

    monkeypatch.setattr(module, "_Track", Watched)
    for _ in stream_windows(model, pieces(video(1, 104), [8]), sampling=GREEDY, stride_segments=2):
        pass
    assert len(kept) == 6 and max(kept) <= 96


def test_top_k_keeps_ties() -> None:
    kept = probabilities(torch.tensor([0.0, 2.0, 1.0, 1.0, 1.0, -1.0]), Sampling(top_k=2))
    assert (kept > 0).tolist() == [False, True, True, True, True, False]
    assert (probabilities(torch.randn(3, 7), Sampling(top_k=9)) > 0).all()


def test_top_p_always_leaves_a_code() -> None:
    assert probabilities(torch.tensor([0.0, 9.0, 1.0]), Sampling(top_p=0.01)).tolist() == [0.0, 1.0, 0.0]


def test_draws_have_their_probabilities() -> None:
    chances = torch.tensor([0.0, 0.5, 0.0, 0.125, 0.375, 0.0])
    uniform = torch.arange(8) / 8
    assert draw(chances.expand(8, -1), uniform).tolist() == [1, 1, 1, 1, 3, 4, 4, 4]
    # The largest number below 1 that a generator gives, on sums that do not reach 1 exactly.
    chances = torch.softmax(torch.randn(1000, 1024), -1)
    chances[:, -5:] = 0
    largest = torch.tensor(1 - 2**-24).expand(1000)
    assert (chances.gather(-1, draw(chances, largest)[:, None]) > 0).all()
    assert (chances.gather(-1, draw(chances, torch.zeros(1000))[:, None]) > 0).all()


def test_requests_that_cannot_be_met_are_refused(model: Vaura) -> None:
    with pytest.raises(ValueError, match="max_steps=256"):
        generate(model, video(1, 5), steps=253, sampling=GREEDY)
    generate(model, video(1, 5), steps=252, sampling=GREEDY, prompt=codes(1, 251))
    with pytest.raises(ValueError, match="prompt of 9 steps"):
        generate(model, video(1, 5), steps=9, sampling=GREEDY, prompt=codes(1, 9))
    with pytest.raises(ValueError, match="1 seeds for a batch of 2"):
        generate(model, video(2, 5), steps=9, sampling=GREEDY, seeds=[1])
    with pytest.raises(ValueError, match="training mode"):
        generate(Vaura(ENCODEC), video(1, 5), steps=9, sampling=GREEDY)
    with pytest.raises(ValueError, match="stride of 24"):
        generate_windows(model, video(1, 40), sampling=GREEDY, stride_segments=3)
    with pytest.raises(ValueError, match="stride of 24"):
        stream_windows(model, iter([video(1, 40)]), sampling=GREEDY, stride_segments=3)
    with pytest.raises(ValueError, match="piece_steps=-1"):
        stream_windows(model, iter([video(1, 40)]), sampling=GREEDY, piece_steps=-1)
    with pytest.raises(ValueError, match="no video tokens"):
        list(stream_windows(model, iter([]), sampling=GREEDY))
    for prompt in (240, 250):
        with pytest.raises(ValueError, match=f"prompt of {prompt} steps for a video of 240"):
            generate_windows(model, video(1, 40), sampling=GREEDY, prompt=codes(1, prompt))
        with pytest.raises(ValueError, match=f"prompt of {prompt} steps for a video of 240"):
            list(stream_windows(model, pieces(video(1, 40), [9]), sampling=GREEDY, prompt=codes(1, prompt)))
    schedule = [Window(range(8), range(48)), Window(range(8, 16), range(60, 90))]
    with pytest.raises(ValueError, match="begins at step 60"):
        generate_windows(model, video(1, 16), sampling=GREEDY, schedule=schedule)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"guidance": 0.5}])
def test_impossible_sampling_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)  # pyright: ignore[reportArgumentType]
