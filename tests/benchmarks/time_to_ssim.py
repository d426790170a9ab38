"""Minutes of training until unseen subjects are rebuilt to a given SSIM.

    python tests/benchmarks/time_to_ssim.py DIR [--figure FILE] [--json FILE]

DIR is a data set in the ADNI layout. Three systems learn its training subjects
from batches of 8, by turns. The mean SSIM over all test images is taken after
each turn; that time does not count.

- `tutorial`: the VQ-VAE of https://keras.io/examples/generative/vq_vae/ written
  anew from its description; float32, constant rate, `--minutes` long.
- `informed`: the same, but code vectors start at latents of the first batch.
- `recipe`: the VQ-VAE of adni-vqvae-tuned with `--epochs`, to the end.
"""

import math
import tempfile

import common
import numpy as np
from matplotlib.figure import Figure

import dataset
import train
import utils

keras = utils.lazy_import("keras")
modules = utils.lazy_import("modules")
tf = utils.lazy_import("tensorflow")

MARKS = (0.8545, 0.90, 0.9163)  # published: two of OASIS and ADNI, and between
FLAGS_OF_RECIPE = "--recipe adni-vqvae-tuned --batch-size 8 --dataset adni"


class InformedQuantizer(modules.VectorQuantizer):
    """Code vectors that learn by gradient, looked up as the tutorial does."""

    def lookup(self, indices):
        return tf.one_hot(indices, self.num_embeddings) @ self.codebook.value


class PlainQuantizer(InformedQuantizer):
    """The same, but they start at random."""

    def update(self, result):
        """Leave the codebook to the optimizer."""


def make_tutorial(size, variance, quantizer):
    """Return the tutorial's VQ-VAE, compiled: K=128, D=16."""
    conv, transposed = keras.layers.Conv2D, keras.layers.Conv2DTranspose
    wide = {"strides": 2, "padding": "same", "activation": "relu"}
    x = inputs = keras.Input((*size, 1))
    for width in (32, 64):
        x = conv(width, 3, **wide)(x)
    x = conv(16, 1, padding="same")(x)
    options = {"codebook_update": "gradient", "restart_threshold": 0.0}
    options |= {"num_embeddings": 128, "embedding_dim": 16}
    x, _ = quantizer(**options)(x)
    for width in (64, 32):
        x = transposed(width, 3, **wide)(x)
    model = keras.Model(inputs, transposed(1, 3, padding="same")(x))

    def loss(images, output):
        return tf.reduce_mean((images - output) ** 2) / variance

    model.compile(keras.optimizers.Adam(1e-3), loss, jit_compile=False)
    return model


def turns(model, batches, steps, minutes):
    """Train a turn at a time; yield step and minutes, so far."""
    model.make_train_function()
    batches, done, spent = iter(batches), 0, 0.0
    while done < steps and spent < 60 * minutes:
        until = min(spent + min(max(0.2 * spent, 3.0), 25.0), 60 * minutes)
        while done < steps and spent < until:
            spent += common.seconds(model.train_function, batches)
            done += 1
        yield {"step": done, "minutes": spent / 60}


def start(job, minutes):
    """Return {system: (its turns, function that rebuilds images)}."""
    images, systems = job.images["train"], {}
    keras.config.set_dtype_policy(utils.choose_precision()[0])
    recipe = train.new_vqvae(job)
    keras.config.set_dtype_policy("float32")
    fit = train.Fit(job, "vqvae", recipe, images, job.images["validate"])
    steps = fit.steps * fit.rounds
    batches = dataset.training_batches(images, fit.batch_size, steps, seed=0)
    training = turns(recipe, batches, steps * fit.epochs, math.inf)
    systems["recipe"] = training, recipe.reconstruct
    pairs = batches.map(lambda images: (images, images))
    kinds = {"tutorial": PlainQuantizer, "informed": InformedQuantizer}
    for name, quantizer in kinds.items():
        utils.keras.utils.set_random_seed(0)
        model = make_tutorial(images.size, recipe.data_variance, quantizer)
        rebuild = tf.function(lambda x, m=model: tf.clip_by_value(m(x), 0, 1))
        systems[name] = turns(model, pairs, math.inf, minutes), rebuild
    return systems


def curve_rows(options):
    """Return rows of system, step, minutes and SSIM; `options` keeps them."""
    words = f"{FLAGS_OF_RECIPE} --epochs {options.epochs}".split()
    options.curves = []
    with tempfile.TemporaryDirectory() as folder:
        words += ["--data-dir", options.DIR, "--run-dir", f"{folder}/run"]
        settings = utils.replace(utils.parse_training(words), image_size=None)
        settings = settings.smoked() if options.small else settings
        strategy, signals = tf.distribute.get_strategy(), utils.StopSignals()
        job = train.start(settings, strategy, signals)
        test = dataset.ordered_batches(job.images["test"])
        left = start(job, options.minutes)
        while left:
            for name, (training, rebuild) in list(left.items()):
                row = {"system": name, **next(training, {})}
                if "step" not in row:
                    del left[name]
                    continue
                ssim = np.concatenate([utils.ssim(x, rebuild(x)) for x in test])
                options.curves.append({**row, "ssim": float(ssim.mean())})
    return options.curves


def mark_rows(options):
    """Return a row for each mark: minutes, ratios; draw the figure."""
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes, rows = figure.subplots(), [{"mark": mark} for mark in MARKS]
    for name in ("recipe", "tutorial", "informed"):
        curve = [row for row in options.curves if row["system"] == name]
        minutes, ssim = ([r[k] for r in curve] for k in ("minutes", "ssim"))
        axes.plot(minutes, ssim, ".-", label=name)
        best = np.maximum.accumulate([0, *ssim])
        for row in rows:  # a straight line between the best so far
            found = float(np.interp(row["mark"], best, [0, *minutes]))
            row[name] = found if best[-1] >= row["mark"] else None
            if name != "recipe":
                both = row[name] and row["recipe"]
                row[f"{name}/recipe"] = both and row[name] / row["recipe"]
    for mark in MARKS:
        axes.axhline(mark, color="0.6", lw=0.8, ls="--")
    axes.set(xlabel="minutes of training", ylabel="SSIM", ylim=(0.2, 1))
    axes.legend(loc="lower right")
    if options.figure:
        figure.savefig(options.figure)
    return rows


CASES = {"curves": curve_rows, "marks": mark_rows}
FLAGS = {"DIR": "", "minutes": 6.0, "epochs": 4, "figure": ""}

if __name__ == "__main__":
    common.run(__doc__, CASES, FLAGS)
