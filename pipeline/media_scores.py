"""What pictures and sound say of a clip without any network of ours: loudness, silence, still pictures, cuts, bandwidth, speech.

Knows arrays. Knows no datasets and no Ray.
"""

from pipeline.scorers import Scorer

SCORERS: tuple[Scorer, ...] = ()
