import numpy as np
import pytest

from pipeline.contact_sound import soundtrack
from pipeline.onsets import OnsetScore, chance_score, onset_times, score_onsets, total_score
from pipeline.scenes import KINDS, draw_scene


@pytest.mark.parametrize("sample_rate_hz", [16000, 24000, 44100, 48000])
def test_onsets_of_the_contacts_that_made_the_sound(sample_rate_hz: int) -> None:
    detected, expected = [], []
    for number in range(12):
        rng = np.random.default_rng(number)
        scene = draw_scene(rng, list(KINDS)[number % len(KINDS)], seconds=3.7)
        expected.append([c.seconds for c in scene.contacts])
        detected.append(onset_times(soundtrack(scene.contacts, seconds=3.7, sample_rate_hz=sample_rate_hz, rng=rng), sample_rate_hz))
    assert total_score(detected, expected, 0.03).f1 > 0.95
    assert chance_score(detected, expected).f1 < 0.6 < total_score(detected, expected).f1


def test_onsets_in_noise_and_silence() -> None:
    rng = np.random.default_rng(0)
    assert onset_times(np.zeros(24000, np.float32), 24000) == []
    assert onset_times(5e-4 * rng.standard_normal(24000).astype(np.float32), 24000) == []
    for samples in (0, 7, 479, 480, 481, 700):
        assert onset_times(np.zeros(samples, np.float32), 24000) == []
    assert onset_times(0.01 * rng.standard_normal(24000).astype(np.float32), 24000) == []
    burst = 1e-3 * rng.standard_normal(24000).astype(np.float32)
    burst[7000:9000] += 0.3 * rng.standard_normal(2000).astype(np.float32)
    (onset,) = onset_times(burst, 24000)
    assert onset == pytest.approx(7000 / 24000, abs=0.002)


def test_score_equals_the_largest_matching() -> None:
    """Against a slow oracle: the largest one-to-one matching by augmenting paths."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        found, wanted = (rng.uniform(0, 2, rng.integers(0, 9)).tolist() for _ in range(2))
        score = score_onsets(found, wanted, 0.11)
        assert score == OnsetScore(_largest_matching(found, wanted, 0.11), len(found), len(wanted))


def _largest_matching(found: list[float], wanted: list[float], tolerance: float) -> int:
    partner: dict[int, int] = {}

    def place(i: int, seen: set[int]) -> bool:
        for j in range(len(wanted)):
            if abs(found[i] - wanted[j]) <= tolerance and j not in seen:
                seen.add(j)
                if j not in partner or place(partner[j], seen):
                    partner[j] = i
                    return True
        return False

    return sum(place(i, set()) for i in range(len(found)))


def test_f1() -> None:
    assert OnsetScore(3, 4, 5).f1 == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert OnsetScore(0, 0, 0).f1 == 1
    assert OnsetScore(0, 0, 2).f1 == 0
    assert OnsetScore(1, 2, 3) + OnsetScore(4, 5, 6) == OnsetScore(5, 7, 9)
    assert chance_score([[0.5], [1.5]], [[0.5], [1.5]]) == OnsetScore(0, 2, 2)
