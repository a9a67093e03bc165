import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.delay import delay, undelay_logits
from model.generate import Sampling, generate
from model.vaura import Projection, Vaura, VauraConfig, forward_flops, principal_components, rotary, rotate
from tests.model.fill import checksum, fill_module, inp, inp_int

GOLDENS = Path(__file__).parent / "goldens"
REFERENCE = VauraConfig(layers=2, width=192, heads=4, visual_width=64)
"""The small model of the reference runs."""
TINY = VauraConfig(
    layers=2, width=30, heads=3, visual_width=11, feature_width=13, codebooks=5, card=17, codebook_dim=7, steps_per_token=6, window_tokens=4
)
"""EnCodec's clock with coprime sizes."""


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDENS / "vaura.npz") as numbers:
        return dict(numbers)


@pytest.fixture(scope="module")
def reference() -> Vaura:
    return filled(REFERENCE)


def filled(config: VauraConfig) -> Vaura:
    """A model whose weights are decided by their names."""
    model = Vaura(config).eval()
    fill_module(model, "sampler.")
    return model


def close(ours: Tensor, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    assert ours.shape == expected.shape
    assert np.abs(ours.detach().numpy() - expected).max() <= tolerance


@pytest.mark.parametrize(("size", "config"), [("full", VauraConfig()), ("small", REFERENCE)])
def test_names_and_shapes_are_the_released_ones(size: str, config: VauraConfig) -> None:
    with torch.device("meta"):
        model = Vaura(config)
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == json.loads((GOLDENS / "vaura_keys.json").read_text())[size]


@torch.no_grad()
def test_embeddings_are_those_of_the_reference(reference: Vaura, golden: dict[str, np.ndarray]) -> None:
    features, tokens = inp("vis32", (2, 32, 768)), inp_int("tok40", (2, 9, 40), 1025)
    audio = reference.stacked_codes().embed(tokens)
    close(audio[0, :4, :16], golden["tokemb_slice"])
    np.testing.assert_allclose(checksum(audio.numpy()), golden["tokemb_sum"], atol=1e-5)
    visual = reference.cls_embeddings.projection(features)
    close(visual[0, :4, :16], golden["cond_slice"])
    np.testing.assert_allclose(checksum(visual.numpy()), golden["cond_sum"], atol=1e-5)
    together = reference.combine(reference.align(features, 40), audio)
    close(together[0, [0, 6, 7, 13, 14]][:, [0, 1, 62, 63, 64, 65, 190, 191]], golden["h0_slice"])
    dropped = reference.cls_embeddings.drop(features, torch.tensor([True, False]))
    np.testing.assert_allclose(checksum(dropped.numpy()), golden["token_drop_b0_replaced_sum"], atol=1e-6)


@torch.no_grad()
def test_logits_are_those_of_the_reference(reference: Vaura, golden: dict[str, np.ndarray]) -> None:
    logits = reference(inp_int("tok40", (2, 9, 40), 1025), inp("vis32", (2, 32, 768))).transpose(1, 2)
    close(logits[0, :, [0, 7, 39]], golden["logits40_b0_pos0_7_39"])
    assert np.array_equal(logits.argmax(-1).numpy(), golden["logits40_argmax"])
    np.testing.assert_allclose(checksum(logits.numpy()), golden["logits40_sum"], atol=1e-5)


@torch.no_grad()
def test_logits_past_the_end_of_the_video_are_those_of_the_reference(reference: Vaura, golden: dict[str, np.ndarray]) -> None:
    logits = reference(inp_int("tok230", (1, 9, 230), 1025), inp("vis32", (2, 32, 768))[:1]).transpose(1, 2)
    close(logits[0, :, golden["logits230_pos"], ::8], golden["logits230"])
    np.testing.assert_allclose(checksum(logits.numpy()), golden["logits230_sum"], atol=1e-5)


@torch.no_grad()
def test_training_loss_is_that_of_the_reference(reference: Vaura, golden: dict[str, np.ndarray]) -> None:
    codes, features = inp_int("codes221", (2, 9, 221), 1024), inp("vis32", (2, 32, 768))
    loss = reference.training_loss(codes, features)
    close(loss.total, golden["train_loss"], 1e-5)
    close(loss.per_codebook, golden["train_loss_per_codebook"], 1e-5)
    fed = F.pad(codes[..., :-1], (0, 1), value=1024)
    logits = undelay_logits(reference(delay(fed, 1024), features), 221)
    close(logits[1, :, [0, 110, 215, 216, 220], ::8], golden["train_logits_b1_t0_110_215_216_220"])
    # The same loss from the logits, one code at a time on the codec's grid.
    close(F.cross_entropy(logits.flatten(0, 2), codes.flatten()), golden["train_loss"], 1e-5)


@pytest.mark.parametrize("config", [TINY, REFERENCE])
def test_the_first_loss_is_that_of_a_guess(config: VauraConfig) -> None:
    codes = torch.randint(config.card, (2, config.codebooks, 19))
    loss = Vaura(config).training_loss(codes, torch.randn(2, 4, config.feature_width))
    assert torch.allclose(loss.per_codebook, torch.full((config.codebooks,), math.log(config.card)), atol=1e-5)


@torch.no_grad()
def test_embedding_is_the_sum_of_weight_normed_convolutions() -> None:
    model, codes = filled(TINY), torch.randint(TINY.card + 1, (2, TINY.codebooks, 9))
    expected = 0
    for k, embedding in enumerate(model.tok_embeddings):
        convolution = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(TINY.codebook_dim, TINY.width - TINY.visual_width, 1))
        state = embedding.get_submodule("out_proj").state_dict()
        names = {"bias": "bias", "weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
        convolution.load_state_dict({names[name]: t for name, t in state.items()})
        expected = expected + convolution(embedding.get_submodule("emb")(codes[:, k]).transpose(1, 2)).transpose(1, 2)
    assert torch.allclose(model.stacked_codes().embed(codes), torch.as_tensor(expected), atol=1e-6)


def test_a_fresh_projection_has_the_norms_that_it_starts_with() -> None:
    projection = Projection(7, 5)
    assert torch.allclose(projection.weight(), projection.weight_v.squeeze(-1), atol=1e-6)


def test_rotation_is_a_product_of_complex_numbers() -> None:
    positions, width = 7, 10
    x = torch.randn(2, 3, positions, width)
    angles = torch.arange(positions)[:, None] * 10000.0 ** -(torch.arange(0, width, 2) / width)
    expected = torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angles), angles)
    ).flatten(-2)
    assert torch.allclose(rotate(x, rotary(positions, width)), expected, atol=1e-5)


@pytest.mark.parametrize(("ratio", "expected"), [((6, 1), [0] * 6 + [1] * 6 + [2] * 6 + [3]), ((441, 64), [0] * 7 + [1] * 7 + [2] * 5)])
@torch.no_grad()
def test_each_position_sees_the_token_of_its_time(ratio: tuple[int, int], expected: list[int]) -> None:
    config = VauraConfig(**{**vars(TINY), "steps_per_token": ratio[0], "steps_per_token_divisor": ratio[1]})
    model, features = filled(config), torch.randn(2, 4, config.feature_width)
    tokens = model.cls_embeddings.projection(features)
    assert torch.equal(model.align(features, len(expected)), tokens[:, expected])
    past_the_end = model.align(features, 4 * 7)[:, -1]
    if ratio == (6, 1):
        assert torch.equal(past_the_end, model.empty_video_emb[0].expand(2, -1))
    # Position i of the fraction 441/64 sees token floor(64 i / 441): the codec step that begins at i * 512/44100 s, of tokens of 0.08 s.


@torch.no_grad()
def test_logits_know_nothing_of_what_comes_later() -> None:
    model, length, cut = filled(TINY), 23, 13
    sequence, features = torch.randint(TINY.card + 1, (2, TINY.codebooks, length)), torch.randn(2, 4, TINY.feature_width)
    changed, other = sequence.clone(), features.clone()
    changed[..., cut:] = (changed[..., cut:] + 1) % (TINY.card + 1)
    other[:, 3] += 1  # The token of positions 18 to 23.
    before, after = model(sequence, features), model(changed, other)
    assert torch.allclose(before[:, :cut], after[:, :cut], atol=1e-5)
    assert not torch.allclose(before[:, cut], after[:, cut], atol=1e-2)


def test_guidance_drops_whole_samples_in_training_only() -> None:
    config = VauraConfig(**{**vars(TINY), "dropout": 0.0, "guidance_dropout": 0.5})
    model = filled(config)
    codes, features = torch.randint(config.card, (1, config.codebooks, 19)), torch.randn(1, 4, config.feature_width)
    with_video = model.training_loss(codes, features).total
    without = model.training_loss(codes, model.cls_embeddings.unconditional(4)[None]).total
    assert model.training_loss(codes, features).total == with_video
    model.train()
    seen = [model.training_loss(codes, features).total for _ in range(40)]
    dropped = sum(bool(torch.isclose(s, without)) for s in seen)
    assert 5 <= dropped <= 35
    assert sum(bool(torch.isclose(s, with_video)) for s in seen) == 40 - dropped


def test_dropout_is_of_training_only() -> None:
    model, codes = filled(TINY), torch.randint(TINY.card, (1, TINY.codebooks, 19))
    features = torch.randn(1, 4, TINY.feature_width)
    assert torch.equal(model.training_loss(codes, features).total, model.training_loss(codes, features).total)
    model.train()
    assert not torch.equal(model.training_loss(codes, features).total, model.training_loss(codes, features).total)


def test_the_unconditional_embedding_fits_any_number_of_tokens() -> None:
    embedding = filled(TINY).cls_embeddings
    rows = embedding.uncond_embedding
    assert torch.equal(embedding.unconditional(3), rows[:3])
    assert torch.equal(embedding.unconditional(9), torch.cat([rows, rows, rows[:1]]))


def tables_of(model: Vaura) -> tuple[Tensor, Tensor]:
    """The rows of the codes, and those of the special one."""
    tables = model.stacked_codes().tables.view(TINY.codebooks, TINY.card + 1, TINY.codebook_dim)
    return tables[:, : TINY.card], tables[:, TINY.card]


def test_a_model_can_start_from_a_codec() -> None:
    """Tables and biases as they are, projections' weights and the special code's row as they were (published quirk)."""
    model, tables, biases = Vaura(TINY), list(torch.randn(5, 17, 7)), list(torch.randn(5, 19))
    special, projection = tables_of(model)[1].clone(), model.stacked_codes().projection.clone()
    model.start_from_codec(tables, biases)
    assert torch.equal(tables_of(model)[0], torch.stack(tables)) and torch.equal(tables_of(model)[1], special)
    assert torch.allclose(model.stacked_codes().bias, torch.stack(biases).sum(0))
    assert torch.equal(model.stacked_codes().projection, projection)


def test_wider_codebooks_start_as_their_principal_components() -> None:
    model, widths = Vaura(TINY), (29, 8, 3, 7, 11)
    # Far from the origin, of very unlike sizes, and in the first table seven directions that matter and noise in the others.
    tables = [5 + 10.0 ** (1 - 2 * k) * torch.randn(17, width) for k, width in enumerate(widths)]
    tables[0][:, 7:] = 5 + 0.001 * torch.randn(17, 22)
    bias = model.stacked_codes().bias.clone()
    model.start_from_codec(tables, [torch.randn(width) for width in (3, 4, 5, 6, 8)])
    started = tables_of(model)[0].detach()
    assert torch.equal(model.stacked_codes().bias, bias)
    assert torch.equal(started[3], tables[3])
    for k in (0, 1, 2, 4):
        assert started[k, :, : widths[k]].square().mean().sqrt().item() == pytest.approx(1, abs=1e-5)
    # Distances between codes are those in the codec, but for one factor: exactly where nothing is left out.
    for k, tolerance in ((0, 1e-3), (2, 1e-4)):
        theirs, ours = torch.pdist(tables[k].double()), torch.pdist(started[k].double())
        torch.testing.assert_close(ours / ours.mean(), theirs / theirs.mean(), rtol=0, atol=tolerance)
    assert not started[2, :, 3:].any()
    model.start_from_codec([tables[3]] * 5)
    torch.testing.assert_close(tables_of(model)[0][0], principal_components(tables[3], 7))
    flipped = principal_components(-tables[1], 7)
    assert torch.allclose(flipped.abs(), started[1].abs(), atol=1e-5)
    assert torch.equal(principal_components(torch.ones(17, 9), 7), torch.zeros(17, 7))


@pytest.mark.parametrize("shapes", [[(17, 7)] * 4, [(17, 7)] * 4 + [(16, 7)]])
def test_codebooks_of_another_codec_are_refused(shapes: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="expected 5 of them with 17 entries each"):
        Vaura(TINY).start_from_codec([torch.randn(shape) for shape in shapes])


def test_the_unconditional_embedding_can_be_learnt_and_read_by_any_model() -> None:
    learning = VauraConfig(**{**vars(TINY), "train_unconditional": True, "guidance_dropout": 0.5})
    torch.manual_seed(3)
    model = Vaura(learning)
    torch.manual_seed(3)
    plain = Vaura(TINY)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(model.cls_embeddings.uncond_embedding, plain.cls_embeddings.uncond_embedding)
    fill_module(model, "sampler.")
    codes, features = torch.randint(TINY.card, (8, TINY.codebooks, 19)), torch.randn(8, 4, TINY.feature_width)
    model.train().training_loss(codes, features).total.backward()
    gradient = model.cls_embeddings.uncond_embedding.grad
    assert gradient is not None and gradient.abs().min() > 0
    plain.load_state_dict(model.state_dict())
    sampling = Sampling(greedy=True, guidance=3.0)
    assert torch.equal(*(generate(each.eval(), features[:2], steps=7, sampling=sampling) for each in (model, plain)))
    with pytest.raises(ValueError, match=r"train_unconditional=true with guidance_dropout=0"):
        VauraConfig(train_unconditional=True, guidance_dropout=0.0)


def test_recomputed_activations_change_nothing_but_the_memory() -> None:
    model = filled(TINY).train()
    codes, features = torch.randint(TINY.card, (3, TINY.codebooks, 19)), torch.randn(3, 4, TINY.feature_width)
    losses, gradients, kept = [], [], []
    for again in (False, True):
        model.checkpoint_activations = again
        model.zero_grad()
        torch.manual_seed(5)
        numbers: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, numbers=numbers: numbers.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
            loss = model.training_loss(codes, features).total
        kept.append(sum(numbers.values()))
        loss.backward()
        losses.append(loss)
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert torch.equal(losses[0], losses[1]) and all(map(torch.equal, *gradients))
    assert kept[1] < 0.6 * kept[0]


@sdpa_kernel(SDPBackend.MATH)  # The one kind of attention that torch counts on a CPU.
def test_operations_are_counted_as_torch_counts_them() -> None:
    config = VauraConfig(layers=2, width=96, heads=3, visual_width=32, feature_width=40, codebooks=5, card=70)
    model, positions = Vaura(config), 61
    with FlopCounterMode(display=False) as forward:
        model(torch.randint(70, (2, 5, positions)), torch.randn(2, 8, 40))
    assert forward.get_total_flops() == 2 * forward_flops(config, positions, 8)
    with FlopCounterMode(display=False) as step:
        model.training_loss(torch.randint(70, (2, 5, 57)), torch.randn(2, 8, 40)).total.backward()
    # Nobody asks for the features' gradient.
    assert step.get_total_flops() == 6 * forward_flops(config, positions, 8) - 2 * 2 * 8 * 40 * 32


def test_every_parameter_learns_and_half_precision_agrees() -> None:
    model = filled(VauraConfig(**{**vars(TINY), "dropout": 0.0, "guidance_dropout": 0.0}))
    # Long enough for positions past the end of the video, so that the empty token learns too.
    codes, features = torch.randint(TINY.card, (2, TINY.codebooks, 29)), torch.randn(2, 4, TINY.feature_width)
    exact = model.training_loss(codes, features).total
    exact.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    with torch.autocast("cpu", torch.bfloat16):
        half = model.training_loss(codes, features).total
    assert half.dtype == torch.float32 and abs(half - exact) < 0.03 * exact


def test_a_small_model_learns_two_clips_by_heart() -> None:
    config = VauraConfig(**{**vars(TINY), "dropout": 0.0, "guidance_dropout": 0.0})
    model = Vaura(config)
    codes, features = torch.randint(config.card, (2, config.codebooks, 19)), torch.randn(2, 4, config.feature_width)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        model.training_loss(codes, features).total.backward()
        optimiser.step()
    assert model.training_loss(codes, features).total < 0.5


COMPILED = """
import torch
from model.vaura import Vaura, VauraConfig
model = Vaura(VauraConfig(layers=2, width=30, heads=3, visual_width=11, feature_width=13, codebooks=5, card=17, codebook_dim=7))
loss = torch.compile(model.training_loss, backend="aot_eager", fullgraph=True)(torch.randint(17, (2, 5, 19)), torch.randn(2, 4, 13))
loss.total.backward()
"""


@pytest.mark.slow
@torch.no_grad()
def test_a_padded_sample_counts_as_it_would_at_its_own_length() -> None:
    model = filled(TINY)
    codes, features = torch.randint(TINY.card, (3, 5, 24)), torch.randn(3, 4, TINY.feature_width)
    whole = model.training_loss(codes, features)
    tokens_there, steps_there = torch.ones(3, 4, dtype=torch.bool), torch.ones(3, 24, dtype=torch.bool)
    torch.testing.assert_close(model.training_loss(codes, features, tokens_there, steps_there).per_codebook, whole.per_codebook)
    alone = [model.training_loss(codes[:1], features[:1]), model.training_loss(codes[1:2, :, :11], features[1:2, :2])]
    alone.append(model.training_loss(codes[2:, :, :18], features[2:, :3]))
    tokens_there[1, 2:], steps_there[1, 11:], tokens_there[2, 3:], steps_there[2, 18:] = False, False, False, False
    for padding in (0, 3):  # whatever the padding holds
        codes[1, :, 11:], codes[2, :, 18:], features[1, 2:], features[2, 3:] = padding, padding, float(padding), float(padding)
        together = model.training_loss(codes, features, tokens_there, steps_there).per_codebook
        torch.testing.assert_close(together, torch.stack([loss.per_codebook for loss in alone]).mean(0), rtol=1e-5, atol=1e-6)


def test_training_is_one_graph_for_the_compiler() -> None:
    # In a process of its own: run-time shape checks, on under pytest, are not the compiler's business.
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr


def test_sequences_past_the_last_position_are_refused() -> None:
    with pytest.raises(ValueError, match="257 positions"):
        Vaura(TINY)(torch.zeros(1, TINY.codebooks, 257, dtype=torch.long), torch.randn(1, 4, TINY.feature_width))


@pytest.mark.parametrize(
    ("change", "named"),
    [({"heads": 7}, "heads=7"), ({"heads": 2}, "heads=2"), ({"visual_width": 30}, "visual_width=30"), ({"steps_per_token": 0}, "steps_per_token=0")],
)
def test_impossible_sizes_are_refused(change: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        VauraConfig(**{**vars(TINY), **change})
