"""Bits per code of the three priors: same indices, same settings and epochs.

    python tests/benchmarks/priors.py RUN --level 2 --epochs 5

Trains each prior anew on the indices of a level of a finished run, with the
run's own settings; the run is left as it is. Bits are over its test split.
"""

import dataclasses
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402

import modules  # noqa: E402
import predict  # noqa: E402
import train  # noqa: E402
import utils  # noqa: E402
from tests.benchmarks import common  # noqa: E402

FILES = ("config.json", "split.csv", "indices.npz", "vqvae.keras")
COLUMNS = {
    "prior": ("prior", ""),
    "weights": ("weights", ","),
    "bits per code": ("bits_per_code", ".3f"),
    "minutes": ("minutes", ".1f"),
    "s/sample": ("seconds_per_sample", ".3f"),
}


def measure(run, level, kind, images):
    """Train one prior; its size, bits and speed as a dict."""
    run.config = dataclasses.replace(run.config, prior=kind)
    vqvae = utils.load_model(run.vqvae_path)
    splits, stored = utils.read_splits(run), utils.read_indices(run)
    utils.set_seed(run.config.seed)
    prior = train.new_prior(run, vqvae, level)
    data = {}
    for split, frame in splits.items():
        grids = [stored[f"{split}_{k + 1}"] for k in range(vqvae.levels)]
        data[split] = utils.prior_inputs(prior, grids, frame)
    started = time.perf_counter()
    name = f"{kind}_{level}"
    strategy = tf.distribute.get_strategy()
    train.train_prior(run, name, prior, data, strategy, utils.StopSignals())
    minutes = (time.perf_counter() - started) / 60
    conditions = {
        name: values[:images]
        for name, values in data["test"].items()
        if name == "slice_position"
    }
    if prior.upper_grids:
        conditions["upper"] = [g[:images] for g in data["test"]["upper"]]
    prior.sample(images, **conditions)  # compiles
    started = time.perf_counter()
    prior.sample(images, **conditions)
    seconds = time.perf_counter() - started
    return {
        "prior": kind,
        "level": level,
        "weights": prior.count_params(),
        "bits_per_code": predict.mean_bits(prior, data["test"]),
        "test_images": len(splits["test"]),
        "minutes": minutes,
        "seconds_per_sample": seconds / images,
    }


def main(argv=None):
    parser = common.options(__doc__)
    parser.add_argument("run")
    parser.add_argument("--level", type=int, default=1)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--priors", nargs="+", default=list(modules.PRIORS))
    parser.add_argument("--images", type=int, default=8)
    options = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in FILES:
            shutil.copy(Path(options.run) / name, folder)
        run = utils.Run.open(folder)
        if options.epochs:
            run.config = dataclasses.replace(
                run.config, prior_epochs=options.epochs
            )
        policy, _ = utils.choose_precision(run.config.precision)
        keras.config.set_dtype_policy(policy)
        for kind in options.priors:
            rows.append(measure(run, options.level, kind, options.images))
    common.print_table(f"priors of level {options.level}", rows, COLUMNS)
    common.write(options, rows)
    return rows


if __name__ == "__main__":
    main()
