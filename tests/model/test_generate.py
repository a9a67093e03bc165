from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model.generate import Sampling, generate, generate_windows
from model.sampling import draw, probabilities
from model.schedule import published_schedule, windows
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


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"guidance": 0.5}])
def test_impossible_sampling_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)  # pyright: ignore[reportArgumentType]
