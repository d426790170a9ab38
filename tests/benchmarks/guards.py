"""What checks and checkpoints cost: training steps with and without them.

    python tests/benchmarks/guards.py

Two equal models train by turns, one step each: one with the norms of gradient
and weights in every step, `FiniteCheck` and `Checkpoint`, the other with none
of it. The ratio is the median over pairs of steps next to each other in time.
A checkpoint, one every five minutes, is timed by itself.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import modules  # noqa: E402
import utils  # noqa: E402
from tests.benchmarks import common  # noqa: E402

MINUTES = 5  # between checkpoints, the default of --checkpoint-minutes
WARM_UP = 3  # steps: the first compiles
COLUMNS = {
    "model": ("case", ""),
    "bare ms/step": ("bare_ms_per_step", ".1f"),
    "guarded": ("guarded_ms_per_step", ".1f"),
    "ratio": ("ratio", ".4f"),
    "ci95": ("ratio_ci95", lambda ends: "[{:.4f}, {:.4f}]".format(*ends)),
    "checkpoint ms": ("save_ms", ".0f"),
    "share of time": ("save_share", ".2%"),
}


def bare_train_step(self, batch):
    """A step that looks at nothing."""
    with tf.GradientTape() as tape:
        loss = self._batch_loss(batch, training=True)
    variables = self.trainable_variables
    gradients = tape.gradient(loss, variables)
    self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
    return self.get_metrics_result()


class BareVQVAE(modules.VQVAE):
    train_step = bare_train_step


class BarePixelCNN(modules.PixelCNN):
    train_step = bare_train_step


def make_vqvae(classes, small):
    size = (32, 32) if small else (128, 112)
    options = {"num_embeddings": 256, "embedding_dim": 32, "ssim_weight": 1.0}
    options["channels"] = 8 if small else 64
    images = np.random.default_rng(0).random((16, *size, 1), "float32")
    return [kind(size, **options) for kind in classes], images


def make_prior(classes, small):
    grid = (8, 8) if small else (32, 28)
    options = {"channels": 8 if small else 96, "blocks": 8, "kernel_size": 5}
    indices = np.random.default_rng(0).integers(0, 256, (16, *grid), "int32")
    models = [kind(256, grid, **options) for kind in classes]
    return models, {"indices": indices}


CASES = {
    "vqvae": (make_vqvae, (BareVQVAE, modules.VQVAE)),
    "prior": (make_prior, (BarePixelCNN, modules.PixelCNN)),
}


class Trainer:
    """The loop of Keras's `fit`, one step at a time."""

    def __init__(self, model, data, callbacks):
        model.compile(
            keras.optimizers.Adam(1e-4, global_clipnorm=1.0), jit_compile=False
        )
        self.model, self.batches = model, iter(data)
        model.make_train_function()
        self.callbacks = keras.callbacks.CallbackList(callbacks, model=model)
        self.callbacks.on_train_begin()
        self.callbacks.on_epoch_begin(0)
        self.steps = 0

    def step(self):
        """Train one step; its seconds."""
        started = time.perf_counter()
        self.callbacks.on_train_batch_begin(self.steps)
        logs = self.model.train_function(self.batches)
        self.callbacks.on_train_batch_end(self.steps, logs)
        # fit reads the logs for its progress bar; without it nothing waits.
        float(logs["loss"])
        self.steps += 1
        return time.perf_counter() - started


def measure(name, steps, small):
    """Milliseconds a step of both models, and what the guards add."""
    make, classes = CASES[name]
    models, batch = make(classes, small)
    data = tf.data.Dataset.from_tensors(batch).repeat()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = modules.Checkpoint(Path(folder) / name, minutes=MINUTES)
        guards = [modules.FiniteCheck(name), checkpoint]
        bare, guarded = (
            Trainer(model, data, callbacks)
            for model, callbacks in zip(models, ([], guards), strict=True)
        )
        seconds = [], []
        for number in range(WARM_UP + steps):
            pair = [(bare, seconds[0]), (guarded, seconds[1])]
            for trainer, times in pair[:: -1 if number % 2 else 1]:
                times.append(trainer.step())
        started = time.perf_counter()
        checkpoint.steps = 1  # every step: the next one saves
        guarded.step()
        save = time.perf_counter() - started
    bare, guarded = (1000 * np.array(times[WARM_UP:]) for times in seconds)
    # Steps next to each other in time meet the same machine.
    ratios = guarded / bare
    save_ms = max(0.0, 1000 * save - np.median(guarded))
    return {
        "case": name,
        "steps": steps,
        "bare_ms_per_step": float(np.median(bare)),
        "guarded_ms_per_step": float(np.median(guarded)),
        "ratio": float(np.median(ratios)),
        "ratio_ci95": interval_of_median(ratios),
        "save_ms": float(save_ms),
        "save_share": float(save_ms / (60_000 * MINUTES)),
    }


def interval_of_median(values, draws=2000):
    """95 % bootstrap interval of the median."""
    generator = np.random.default_rng(0)
    medians = np.median(generator.choice(values, (draws, len(values))), axis=1)
    return [float(v) for v in np.percentile(medians, [2.5, 97.5])]


def main(argv=None):
    parser = common.options(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--small", action="store_true", help="tiny models")
    options = parser.parse_args(argv)
    policy, _ = utils.choose_precision()
    keras.config.set_dtype_policy(policy)
    rows = [
        measure(name, options.steps, options.small) for name in options.cases
    ]
    common.print_table("steps with and without checks", rows, COLUMNS)
    common.write(options, rows)
    return rows


if __name__ == "__main__":
    main()
