"""What the flags for small memories save, and what they cost in time.

    python tests/benchmarks/memory.py
    python tests/benchmarks/memory.py --models vqvae2 --batch 64

Training steps of the models of oasis-vqvae2-pixelsnail as they are, with
`--accumulation-steps 4`, with `--recompute` (priors) and with `--jit`, each in
a process of its own, without dropout. The memory is the most that the process
held in steps, less what it held before the first: on a GPU by TensorFlow's
account, on a CPU resident, which counts the compiled step as well; that of four
parts is four times as large.
"""

import functools
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402

import utils  # noqa: E402
from tests.benchmarks import common, training  # noqa: E402

MODELS = {
    "vqvae2": training.CASES["vqvae2"],
    "prior_top": functools.partial(training.CASES["prior_top"], dropout=0.0),
    "prior_bottom": functools.partial(
        training.CASES["prior_bottom"], dropout=0.0
    ),
    "smoke": functools.partial(
        training.prior, training.DEEP, (4, 4), channels=8, blocks=1, dropout=0.0
    ),
}
WAYS = {
    "as it is": {},
    "accumulation-steps 4": {"accumulation_steps": 4},
    "recompute": {"recompute": True},
    "jit": {"jit": True},
}


def peak_mb():
    """Most memory held so far, in MB."""
    if tf.config.list_physical_devices("GPU"):
        info = tf.config.experimental.get_memory_info("GPU:0")
        return info["peak"] / 2**20
    return common.memory_mb("VmHWM")


def resized(batch, size):
    """The images of a batch again and again."""
    return tf.gather(batch, tf.range(size) % len(batch))


def measure(name, way, batch_size, steps):
    """Memory and time of training steps, in this process."""
    policy, _ = utils.choose_precision()
    keras.config.set_dtype_policy(policy)
    model, batch = MODELS[name]()
    if batch_size:
        batch = tf.nest.map_structure(lambda x: resized(x, batch_size), batch)
    settings = dict(WAYS[way])
    jit = settings.pop("jit", False)
    for attribute, value in settings.items():
        setattr(model, attribute, value)
    model.compile(keras.optimizers.Adam(1e-4), jit_compile=jit)
    model.optimizer.build(model.trainable_variables)
    model.make_train_function()
    batches = iter(tf.data.Dataset.from_tensors(batch).repeat())
    before, times = peak_mb(), []
    for _ in range(training.WARM_UP + steps):
        started = time.perf_counter()
        float(model.train_function(batches)["loss"])
        times.append(time.perf_counter() - started)
    return {
        "model": name,
        "way": way,
        "batch": len(tf.nest.flatten(batch)[0]),
        "peak_mb": peak_mb() - before,
        "seconds_per_step": statistics.median(times[training.WARM_UP :]),
        "seconds_of_first_step": times[0],
    }


def main(argv=None):
    parser = common.options(__doc__)
    models = [name for name in MODELS if name != "smoke"]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=models)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument(
        "--batch", type=int, help="images a step (default that of the recipe)"
    )
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args(argv)
    rows = []
    for name in options.models:
        for way in options.ways:
            if way == "recompute" and name == "vqvae2":
                continue
            row = common.in_process(
                measure, name, way, options.batch, options.steps
            )
            first = next(r for r in [*rows, row] if r["model"] == name)
            for key in ("peak_mb", "seconds_per_step"):
                row[f"{key}_ratio"] = row[key] / first[key]
            rows.append(row)
    columns = {
        "model": ("model", ""),
        "batch": ("batch", ""),
        "flags": ("way", ""),
        "MB": ("peak_mb", ",.0f"),
        "x": ("peak_mb_ratio", ".2f"),
        "s/step": ("seconds_per_step", ".2f"),
        "x ": ("seconds_per_step_ratio", ".2f"),
        "first step, s": ("seconds_of_first_step", ".1f"),
    }
    common.print_table("memory and time of training steps", rows, columns)
    common.write(options, rows)
    return rows


if __name__ == "__main__":
    main()
