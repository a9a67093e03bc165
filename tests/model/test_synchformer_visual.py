import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import Tensor

from model.synchformer_visual import DividedAttention, VisualTower, VisualTowerConfig, drop_path, normalise
from tests.model.fill import checksum, fill, fill_module, inp, inp_int

GOLDENS = Path(__file__).parent / "goldens"
SMALL = VisualTowerConfig(image_size=21, patch_size=7, frames=10, tubelet=2, width=22, depth=3, heads=2)


@pytest.mark.parametrize(
    ("name", "shape", "digest"),
    [
        ("vfeat_extractor.blocks.0.attn.qkv.weight", (2304, 768), "edd513870431fbe9"),
        ("transformer.OFF_tok", (1, 1, 768), "b668353b08b869e4"),
        ("sampler.norm.weight", (1536,), "00b9fb6e94897f36"),
        ("vproj.bias", (768,), "dca78ae403718f1d"),
        ("sampler.tok_embeddings.0.out_proj.weight_g", (128, 1, 1), "f5c2af697f16320f"),
        ("audio_encoder.model.encoder.block.0.weight_v", (64, 1, 7), "44d3ca0e341193e8"),
        ("audio_encoder.model.encoder.block.5.alpha", (1, 1024, 1), "dba3b759847920e8"),
    ],
)
def test_fill_gives_the_weights_that_the_goldens_were_made_with(name: str, shape: tuple[int, ...], digest: str) -> None:
    assert hashlib.sha256(fill(name, shape).tobytes()).hexdigest()[:16] == digest


def test_fill_gives_the_inputs_that_the_goldens_were_made_with() -> None:
    assert hashlib.sha256(inp("visual", (1, 2, 3, 16, 224, 224)).numpy().tobytes()).hexdigest()[:16] == "dfc98d614dd867ec"
    assert hashlib.sha256(inp_int("tok40", (2, 9, 40), 1025).numpy().tobytes()).hexdigest()[:16] == "a26238acfeccff99"


@pytest.fixture(scope="module")
def tower() -> VisualTower:
    tower = VisualTower().eval()
    fill_module(tower, "vfeat_extractor.")
    return tower


def test_names_and_shapes_are_those_of_the_published_file(tower: VisualTower) -> None:
    published = json.loads((GOLDENS / "visual_keys.json").read_text())
    assert {name: list(t.shape) for name, t in tower.state_dict().items()} == published


def test_matches_the_reference_at_full_size_step_by_step(tower: VisualTower) -> None:
    golden = np.load(GOLDENS / "visual.npz")
    first, last = tower.blocks[0], tower.blocks[11]
    stages = {
        "patch_embed_3d": tower.patch_embed_3d,
        "block0_timeattn": first.timeattn,
        "block0_spaceattn": first.attn,
        "block0_out": first,
        "block11_out": last,
        "norm_out": tower.norm,
    }
    traces: dict[str, np.ndarray] = {}

    def keep(name: str):
        return lambda _module, _args, out: traces.__setitem__(name, checksum(out.numpy()))

    hooks = [module.register_forward_hook(keep(name)) for name, module in stages.items()]
    with torch.inference_mode():
        features = tower(inp("visual", (1, 2, 3, 16, 224, 224)))
    for hook in hooks:
        hook.remove()
    for name, trace in traces.items():
        np.testing.assert_allclose(trace, golden[f"trace_{name}_sum"], atol=1e-4, err_msg=name)
    np.testing.assert_allclose(features.numpy(), golden["feats"], atol=1e-4)


def small_tower() -> VisualTower:
    tower = VisualTower(SMALL).eval()
    fill_module(tower)
    return tower


def full_attention(module: DividedAttention, x: Tensor, allowed: Tensor) -> Tensor:
    """Slow oracle: every token against every token, with a mask."""
    q, k, v = rearrange(module.qkv(x), "n tokens (three h d) -> three n h tokens d", three=3, h=module.heads)
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf).softmax(-1)
    return module.proj(rearrange(weights @ v, "n h tokens d -> n tokens (h d)"))


@pytest.mark.parametrize("along", ["time", "space"])
def test_divided_attention_is_masked_full_attention(along: str) -> None:
    times, places = 5, 7
    module = DividedAttention(22, 2)
    x = torch.randn(3, 1 + times * places, 22)
    index = torch.arange(times * places)
    group = index % places if along == "time" else index // places
    allowed = torch.ones(1 + times * places, 1 + times * places, dtype=torch.bool)
    allowed[1:, 1:] = group[:, None] == group[None, :]
    torch.testing.assert_close(module(x, times, along), full_attention(module, x, allowed), atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_segments_do_not_see_each_other() -> None:
    tower, x = small_tower(), torch.randn(2, 3, 3, 10, 21, 21)
    one_by_one = torch.stack([torch.cat([tower(x[i : i + 1, j : j + 1]) for j in range(3)], dim=1)[0] for i in range(2)])
    assert tower(x).shape == (2, 3, 5, 22)
    torch.testing.assert_close(tower(x), one_by_one, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.06), (torch.float16, 0.006)])
def test_half_precision_is_close(dtype: torch.dtype, share: float) -> None:
    tower, x = small_tower(), torch.randn(1, 2, 3, 10, 21, 21)
    expected = tower(x)
    features = tower.to(dtype)(x)
    assert features.dtype == dtype
    error = (features.float() - expected).std() / expected.std()
    assert 1e-5 < error < share


def test_every_parameter_that_counts_is_trained() -> None:
    tower = VisualTower(SMALL)
    tower(torch.randn(2, 1, 3, 10, 21, 21)).square().sum().backward()
    assert [name for name, p in tower.named_parameters() if p.grad is None] == ["patch_embed.proj.weight", "patch_embed.proj.bias"]


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    x = torch.ones(4001, 2, 3)
    dropped = drop_path(x, 0.2, training=True)
    assert set(dropped.unique().tolist()) == {0.0, 1.25}
    assert (dropped == dropped[:, :1, :1]).all()
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)
    assert drop_path(x, 0.2, training=False) is x


def test_normalise_follows_the_published_rule_in_both_layouts() -> None:
    frames = torch.randint(0, 256, (2, 5, 4, 6, 7, 3), dtype=torch.uint8)
    expected = (frames.permute(0, 1, 5, 2, 3, 4).float() / 255 - 0.5) / 0.5
    assert torch.equal(normalise(frames), expected)
    assert torch.equal(normalise(frames.permute(0, 1, 5, 2, 3, 4)), expected)
    assert torch.equal(normalise(frames, dtype=torch.bfloat16), expected.bfloat16())
    assert expected.min() >= -1 and expected.max() <= 1
    with pytest.raises(ValueError, match=r"expected \[\.\.\., frames, height, width, 3\]"):
        normalise(frames[..., :2])


def test_wrong_sizes_are_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(3, 10, 21, 28\).*\(3, 10, 21, 21\)"):
        small_tower()(torch.zeros(1, 1, 3, 10, 21, 28))
    with pytest.raises(ValueError, match="multiples"):
        VisualTowerConfig(patch_size=15)
