"""DAC's speed against a bare convolution of the same arithmetic, and against torch's padded convolutions over the whole clip. Random weights.

    python -m tests.benchmarks.codecs [seconds=4] [threads=1] [piece_steps=128]

Processor time, not the clock's, so that what else runs on the machine disturbs little; both sides of a ratio are measured in this run, in turns.
"""

import json
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from model.codecs import DacCodec, DacConfig
from tests.model.fill import fill_module
from tests.model.test_dac import plain_coder


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def products(config: DacConfig, steps: int) -> dict[str, int]:
    """Multiplications in the convolutions, for so many steps."""
    decode = config.latent_width * config.decoder_width * 7 * steps
    width, positions = config.decoder_width, steps
    for rate in config.decoder_rates:
        positions, width = positions * rate, width // 2
        decode += positions * (2 * width * width * 2 + 3 * 8 * width * width)
    decode += positions * width * 7
    width, positions = config.encoder_width, steps * config.hop_samples
    encode = positions * width * 7
    for rate in config.encoder_rates:
        encode += positions * 3 * 8 * width * width
        positions, width = positions // rate, width * 2
        encode += positions * width * (width // 2) * 2 * rate
    return {"encode": encode + positions * width * config.latent_width * 3, "decode": decode}


def main(arguments: list[str]) -> None:
    options = {"seconds": 4, "threads": 1, "piece_steps": 128, **{k: int(v) for k, v in (a.split("=") for a in arguments)}}
    torch.set_num_threads(options["threads"])
    torch.set_grad_enabled(False)
    codec = DacCodec(piece_steps=options["piece_steps"])
    fill_module(codec.network)
    encoder, decoder = plain_coder(codec.config)
    encoder.load_state_dict(codec.network.encoder.state_dict())
    decoder.load_state_dict(codec.network.decoder.model.state_dict())
    steps = round(options["seconds"] * codec.clock.rate)
    wave, codes = 0.3 * torch.randn(1, 1, steps * codec.hop_samples), torch.randint(0, 1024, (1, 9, steps))
    quantizer = codec.network.quantizer
    # The most frequent shape: 192 channels, 7 taps.
    x, weight = torch.randn(1, 192, 16_390), torch.randn(192, 192, 7)
    bare_products = 192 * 192 * 7 * 16_384
    work = {
        "encode": (lambda: codec.encode(wave), lambda: quantizer.encode(encoder(wave))),
        "decode": (lambda: codec.decode(codes), lambda: decoder(quantizer.decode(codes[0]))),
    }
    figures: dict[str, object] = dict(options)
    for name, (own, whole) in work.items():
        turns = []
        for _ in range(2):
            bare = cpu_seconds(lambda: [F.conv1d(x, weight) for _ in range(5)]) / 5
            turns.append((cpu_seconds(own), cpu_seconds(whole), bare * products(codec.config, steps)[name] / bare_products))
        best = [min(column) for column in zip(*turns, strict=True)]
        clip = 10 / options["seconds"]
        figures[name] = {
            "seconds_per_10s": round(best[0] * clip, 1),
            "bare_convolution_seconds_per_10s": round(best[2] * clip, 1),
            "fraction_of_bare_convolution": round(best[2] / best[0], 2),
            "whole_clip_seconds_per_10s": round(best[1] * clip, 1),
        }
        print(name, figures[name], flush=True)
    figures["codes_equal_whole_clip"] = bool(torch.equal(codec.encode(wave)[0], quantizer.encode(encoder(wave))))
    figures["largest_difference_from_whole_clip"] = float((codec.decode(codes)[0] - decoder(quantizer.decode(codes[0]))[0]).abs().max())
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
