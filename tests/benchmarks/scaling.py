"""What a second worker costs: steps of one worker alone and of two.

    python tests/benchmarks/scaling.py

Two processes of `--strategy multiworker` talk over loopback, each on a core of
its own; the one alone has a core too and as many images a step as each of the
two. The overhead is what exchanging gradients and codebooks adds to a step:
loopback has no network's delay, so it is the least that there is.
"""

import concurrent.futures
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import dataset  # noqa: E402
import modules  # noqa: E402
import utils  # noqa: E402
from tests.benchmarks import common  # noqa: E402

IMAGES = 8  # a step, of each worker
WARM_UP = 3  # steps: the first compiles
SETTINGS = utils.RECIPES["quickstart"].settings


def make_vqvae(small):
    size = (16, 16) if small else (128, 112)
    model = modules.VQVAE(
        size,
        channels=8 if small else SETTINGS["channels"],
        num_embeddings=16 if small else SETTINGS["num_embeddings"],
        embedding_dim=SETTINGS["embedding_dim"],
        ssim_weight=SETTINGS["ssim_weight"],
    )
    return model, lambda random, n: random.random((n, *size, 1), "float32")


def make_prior(small):
    grid = (4, 4) if small else (32, 28)
    codes = 16 if small else SETTINGS["num_embeddings"]
    model = modules.PixelCNN(
        codes,
        grid,
        channels=8 if small else SETTINGS["prior_channels"],
        blocks=1 if small else SETTINGS["prior_blocks"],
    )
    return model, lambda random, n: {
        "indices": random.integers(0, codes, (n, *grid), "int32")
    }


CASES = {"vqvae": make_vqvae, "prior": make_prior}


class StepTimes(keras.callbacks.Callback):
    """Seconds of each training step."""

    def on_train_begin(self, logs=None):
        self.times, self.last = [], time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        float(logs["loss"])  # waits for the step
        now = time.perf_counter()
        self.times.append(now - self.last)
        self.last = now


def train(case, hosts, index, steps, small):
    """One worker: weights of the model, and median seconds of a step."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[index]})
    tf.config.threading.set_intra_op_parallelism_threads(1)
    if len(hosts) > 1:
        task = {"type": "worker", "index": index}
        cluster = {"cluster": {"worker": hosts}, "task": task}
        os.environ["TF_CONFIG"] = json.dumps(cluster)
    strategy = utils.choose_strategy("auto")
    with strategy.scope():
        model, make_data = CASES[case](small)
        model.compile(keras.optimizers.Adam(1e-4), jit_compile=False)
    images = IMAGES * len(hosts)
    data = make_data(np.random.default_rng(0), images)

    def batches(**parts):
        return dataset.array_batches(data, images, **parts).repeat()

    clock = StepTimes()
    model.fit(
        dataset.distributed(strategy, batches),
        steps_per_epoch=WARM_UP + steps,
        callbacks=[clock],
        shuffle=False,
        verbose=0,
    )
    return model.count_params(), statistics.median(clock.times[WARM_UP:])


def measure(case, steps, small):
    """Milliseconds of a step of one worker and of two."""
    milliseconds = []
    for workers in (1, 2):
        hosts = common.free_hosts(workers)
        jobs = [(case, hosts, k, steps, small) for k in range(workers)]
        # Not a Pool, which ends its processes by SIGTERM: they handle that.
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, spawn) as pool:
            results = pool.map(train, *zip(*jobs, strict=True))
            weights, seconds = max(results, key=lambda result: result[1])
        milliseconds.append(1000 * seconds)
    alone, two = milliseconds
    return {
        "case": case,
        "weights": weights,
        "images_per_worker": IMAGES,
        "alone_ms_per_step": alone,
        "two_ms_per_step": two,
        "overhead_ms_per_step": two - alone,
        "efficiency": alone / two,
    }


def main(argv=None):
    parser = common.options(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--small", action="store_true", help="tiny models")
    options = parser.parse_args(argv)
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("two workers need two cores")
    rows = [
        measure(case, options.steps, options.small) for case in options.cases
    ]
    columns = {
        "model": ("case", ""),
        "weights": ("weights", ","),
        "alone ms/step": ("alone_ms_per_step", ".1f"),
        "two workers ms/step": ("two_ms_per_step", ".1f"),
        "overhead ms": ("overhead_ms_per_step", ".1f"),
        "efficiency": ("efficiency", ".3f"),
    }
    common.print_table("two workers over loopback", rows, columns)
    common.write(options, rows)
    return rows


if __name__ == "__main__":
    main()
