"""A trained model's samplers side by side: the Fréchet distance of its samples to the test set, by network calls.

    python -m benchmarks.samplers ddpm_digits_cond [WORKDIR]

The run must be trained (`make train EXP=ddpm_digits_cond`), and one of those with `--sampling.sampler`. Every sampler
starts from the same noise; the features are those of `make eval`, and as many samples as test images are drawn.
"""

import dataclasses
import sys
from typing import Any

import numpy as np

from vdm_jax.training.evaluation.features import extractor
from vdm_jax.training.evaluation.report import num_examples
from vdm_jax.training.evaluation.sample_quality import distances, sample_in_blocks
from vdm_jax.training.run import newest_checkpoint, open_run, stored_config

CALLS = (5, 10, 20, 40, 80)
EACH = {
    "ancestral": 1, "ddim": 1, "heun": 2, "dpmpp_2m": 1, "dpmpp_2m_sde": 1, "predictor_corrector": 2,
}  # fmt: skip


def main(name: str, workdir: str = "runs") -> None:
    """Print the table."""
    config: Any = dataclasses.replace(stored_config(name, workdir), workdir=workdir)
    first = open_run(name, config)
    params, by, number = newest_checkpoint(first).state.ema, extractor(first), num_examples(first)
    test, _ = by(first.data.test.take(np.arange(number))["image"], "test images")
    print(f"| | {' | '.join(f'{calls} calls' for calls in CALLS)} |\n|{'---|' * (1 + len(CALLS))}")
    for sampler, each in EACH.items():
        cells = []
        for calls in CALLS:
            given = {"sampler": sampler, "steps": calls // each, "guidance_scale": 1.0}
            if calls // each < 3:
                cells.append("-")
                continue
            way = dataclasses.replace(config.sampling, **given)
            run = open_run(name, dataclasses.replace(config, sampling=way))
            features, _ = by(sample_in_blocks(run, params, number)[0], sampler)
            cells.append(f"{distances(test, features)['frechet']:.2f}")
        print(f"| {sampler} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    from vdm_jax.training.cli.common import execute

    execute(lambda: main(*sys.argv[1:3]))
