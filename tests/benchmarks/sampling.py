"""Time to sample from priors of given sizes, untrained: speed needs no skill.

    python tests/benchmarks/sampling.py                  all but smoke
    python tests/benchmarks/sampling.py --cases recipe --json FILE

Cases: `tutorial` is a PixelCNN of the size of the Keras tutorial's, 10 images;
`recipe` are the two priors of oasis-vqvae2-pixelsnail, 8 images; `reference`
is PixelSNAIL at the size of the VQ-VAE-2 implementation most used, 256
channels and about 85 and 90 million weights, 4 images; `smoke` shows in seconds
that this file works. Compiling is told apart.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np  # noqa: E402

import modules  # noqa: E402
import utils  # noqa: E402

RECIPE = utils.RECIPES["oasis-vqvae2-pixelsnail"].settings
SHARED = {
    "num_embeddings": RECIPE["num_embeddings"],
    "position_features": True,
    "slice_condition": True,
}
SMALL = {
    **SHARED,
    "channels": RECIPE["prior_channels"],
    "blocks": RECIPE["prior_blocks"],
    "kernel_size": RECIPE["prior_kernel_size"],
    "head_layers": RECIPE["prior_head_layers"],
}
LARGE = {**SHARED, "channels": 256, "kernel_size": 7, "block_kernel_size": 5}
TOP = {"latent_grid": (32, 32)}
BOTTOM = {
    "latent_grid": (64, 64),
    "upper_grids": ((32, 32),),
    "attention": False,
}
TUTORIAL = {"num_embeddings": 512, "latent_grid": (32, 32), "channels": 128}
TINY = {"num_embeddings": 8, "latent_grid": (4, 4), "channels": 8}
CASES = {  # images, class, settings of each level from the top down
    "tutorial": (10, modules.PixelCNN, [TUTORIAL]),
    "recipe": (8, modules.PixelSNAIL, [{**SMALL, **TOP}, {**SMALL, **BOTTOM}]),
    "reference": (
        4,
        modules.PixelSNAIL,
        [{**LARGE, **TOP, "blocks": 28}, {**LARGE, **BOTTOM, "blocks": 30}],
    ),
    "smoke": (1, modules.PixelSNAIL, [TINY]),
}


def measure(images, prior_class, levels):
    """Seconds to compile for and to sample from the priors of all levels."""
    rows, upper = [], []
    for settings in levels:
        prior = prior_class(**settings)
        seconds = []
        for seed in (0, 1):  # the first compiles as well
            started = time.perf_counter()
            grids = prior.sample(images, seed=seed, upper=upper)
            seconds.append(time.perf_counter() - started)
        upper = [np.asarray(grids)]
        rows.append(
            {
                "grid": prior.latent_grid,
                "weights": prior.count_params(),
                "images": images,
                "seconds_to_compile": seconds[0] - seconds[1],
                "seconds": seconds[1],
            }
        )
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        default=["tutorial", "recipe", "reference"],
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    results = []
    for name in options.cases:
        for row in measure(*CASES[name]):
            results.append({"case": name, **row})
            print(
                f"{name}: {utils.size_text(row['grid'])}, {row['weights']:,} "
                f"weights, {row['images']} images in {row['seconds']:.2f} s, "
                f"compiled in {row['seconds_to_compile']:.1f} s",
                flush=True,
            )
    if options.json:
        utils.write_json(options.json, {"cases": results})
    return results


if __name__ == "__main__":
    main()
