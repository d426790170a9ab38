"""Minutes of training until unseen subjects are rebuilt to a given SSIM.

    python tests/benchmarks/time_to_ssim.py DIR
    python tests/benchmarks/time_to_ssim.py DIR --json FILE --figure FILE
    python tests/benchmarks/time_to_ssim.py --small

DIR is a data set in the ADNI layout. Three systems learn the same subjects
from the same batches of 8, images at their native size and in memory:

tutorial   the VQ-VAE of https://keras.io/examples/generative/vq_vae/ written
           anew from its description; batches of 8 instead of 128, as larger
           ones took longer to every mark in short trials (16, 64); float32,
           constant rate, `--minutes` long;
informed   the same, but its code vectors begin at latents of the first batch,
           as those of `modules.VectorQuantizer` do, to tell what that change
           alone is worth;
recipe     `train.py --recipe adni-vqvae-tuned --batch-size 8 --epochs 4`, to
           the end of its schedule. Flags of `train.py` after DIR change it.

They train by turns in one process, so that all meet the same machine. After
each turn the mean of SSIM is taken over all slices of the test subjects; that
time does not count, that of tracing the first step does. Validation subjects
are trained on as well, for nothing is chosen by them here. To try settings,
`--unseen validate` keeps the test subjects out of it.
"""

import argparse
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

import dataset  # noqa: E402
import modules  # noqa: E402
import train  # noqa: E402
import utils  # noqa: E402

MARKS = (0.8545, 0.90, 0.9163)  # published: two of OASIS and ADNI, and between
BATCH = 8  # images
RECIPE = f"--recipe adni-vqvae-tuned --batch-size {BATCH} --epochs 4".split()
SYSTEMS = ("tutorial", "informed", "recipe")
SHORTEST, LONGEST = 3.0, 25.0  # turn, in seconds
GROWTH = 0.2  # of the time trained so far: a turn between the two


# --- The tutorial's VQ-VAE ---


class Quantizer(keras.layers.Layer):
    """Nearest code vectors, learnt by gradient."""

    def __init__(self, num_embeddings, embedding_dim, beta=0.25):
        super().__init__()
        self.num_embeddings, self.beta = num_embeddings, beta
        self.codebook = self.add_weight(
            shape=(num_embeddings, embedding_dim), initializer="random_uniform"
        )

    def call(self, latents, training=False):
        codebook = tf.convert_to_tensor(self.codebook)
        flat = tf.reshape(latents, (-1, codebook.shape[1]))
        distances = (
            tf.reduce_sum(flat**2, axis=1, keepdims=True)
            - 2 * tf.matmul(flat, codebook, transpose_b=True)
            + tf.reduce_sum(codebook**2, axis=1)
        )
        chosen = tf.one_hot(tf.argmin(distances, axis=1), self.num_embeddings)
        quantized = tf.reshape(tf.matmul(chosen, codebook), tf.shape(latents))
        commitment = (tf.stop_gradient(quantized) - latents) ** 2
        self.add_loss(self.beta * tf.reduce_mean(commitment))
        codes = (quantized - tf.stop_gradient(latents)) ** 2
        self.add_loss(tf.reduce_mean(codes))
        return latents + tf.stop_gradient(quantized - latents)


class InformedQuantizer(modules.VectorQuantizer):
    """The same losses, but codes that begin at latents of the first batch."""

    def __init__(self, num_embeddings, embedding_dim):
        super().__init__(
            num_embeddings,
            embedding_dim,
            codebook_update="gradient",
            restart_threshold=0.0,
        )

    def call(self, latents, training=False):
        return super().call(latents, training)[0]


class Tutorial(keras.Model):
    """Two strided convolutions, K=128 codes of D=16, and the mirror image."""

    def __init__(self, data_variance, widths, quantizer=Quantizer):
        super().__init__()
        options = {"padding": "same", "activation": "relu", "strides": 2}
        conv, transposed = keras.layers.Conv2D, keras.layers.Conv2DTranspose
        self.data_variance = data_variance
        self.encoder = keras.Sequential(
            [
                *(conv(width, 3, **options) for width in widths),
                conv(16, 1, padding="same"),
            ]
        )
        self.quantizer = quantizer(128, 16)
        self.decoder = keras.Sequential(
            [
                *(transposed(width, 3, **options) for width in widths[::-1]),
                transposed(1, 3, padding="same"),
            ]
        )

    def call(self, images, training=False):
        latents = self.encoder(images)
        return self.decoder(self.quantizer(latents, training=training))

    def train_step(self, images):
        with tf.GradientTape() as tape:
            output = self(images, training=True)
            error = tf.reduce_mean((images - output) ** 2)
            loss = error / self.data_variance + tf.add_n(self.losses)
        variables = self.trainable_variables
        gradients = tape.gradient(loss, variables)
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return {"loss": loss}

    @tf.function(reduce_retracing=True)
    def reconstruct(self, images):
        return tf.clip_by_value(self(images), 0.0, 1.0)


TUTORIALS = {"tutorial": Quantizer, "informed": InformedQuantizer}


# --- Training by turns ---


class System:
    """A model in training and its curve: rows of step, seconds and SSIM.

    Args:
        batches: dataset of training images.
        steps, seconds: of training, after which it ends.
    """

    def __init__(self, name, model, batches, steps=math.inf, seconds=math.inf):
        self.name, self.model, self.batches = name, model, iter(batches)
        self.most_steps, self.most_seconds = steps, seconds
        self.step, self.seconds, self.rows = 0, 0.0, []
        model.make_train_function()

    @property
    def ended(self):
        return self.step >= self.most_steps or self.seconds >= self.most_seconds

    def train(self):
        """Train for a turn, at most to the end."""
        turn = min(max(GROWTH * self.seconds, SHORTEST), LONGEST)
        until = self.seconds + turn
        while not self.ended and self.seconds < until:
            started = time.perf_counter()
            logs = self.model.train_function(self.batches)
            float(logs["loss"])  # waits for the step
            self.seconds += time.perf_counter() - started
            self.step += 1

    def evaluate(self, batches):
        """Add the mean SSIM over `batches` to the curve."""
        values = [
            utils.ssim(images, self.model.reconstruct(images))
            for images in batches
        ]
        self.rows.append(
            {
                "system": self.name,
                "step": self.step,
                "seconds": self.seconds,
                "ssim": float(np.concatenate(values).mean()),
            }
        )


def make_tutorial(name, frame, size, variance, options):
    """The tutorial's system: float32 and Adam with 1e-3."""
    keras.config.set_dtype_policy("float32")
    utils.set_seed(0)
    widths = (4, 8) if options.small else (32, 64)
    model = Tutorial(variance, widths, TUTORIALS[name])
    model.compile(keras.optimizers.Adam(1e-3), jit_compile=False)
    batches = dataset.make_dataset(
        frame, size, BATCH, seed=0, epochs=10_000, cache=True
    )
    return System(name, model, batches, seconds=60 * options.minutes)


def make_recipe(frame, size, variance, config):
    """The system of a recipe, as `train.py` trains its VQ-VAE."""
    keras.config.set_dtype_policy(utils.choose_precision(config.precision)[0])
    utils.set_seed(config.seed)
    model = train.new_vqvae(config, size, variance)
    steps = dataset.steps_per_epoch(len(frame), config.batch_size)
    rate = train.schedule(config, config.learning_rate, config.epochs * steps)
    model.compile(
        keras.optimizers.Adam(rate, global_clipnorm=train.GRADIENT_NORM),
        jit_compile=False,
    )
    batches = dataset.make_dataset(
        frame,
        size,
        config.batch_size,
        seed=config.seed,
        epochs=config.epochs,
        cache=True,
    )
    return System("recipe", model, batches, steps=config.epochs * steps)


def train_by_turns(systems, unseen):
    """Train all to their ends; the rows of their curves."""
    while not all(system.ended for system in systems):
        for system in systems:
            if system.ended:
                continue
            system.train()
            system.evaluate(unseen)
            row = system.rows[-1]
            print(
                f"{row['system']}: {row['seconds'] / 60:.2f} min, step "
                f"{row['step']}, SSIM {row['ssim']:.4f}",
                flush=True,
            )
    return [row for system in systems for row in system.rows]


# --- Results ---


def passing(rows, mark):
    """Seconds at which a curve first passes `mark`; None if it never does.

    Between evaluations on a straight line.

    >>> passing([{"seconds": 0, "ssim": 0}, {"seconds": 10, "ssim": 1}], 0.9)
    9.0
    """
    before = None
    for row in rows:
        if row["ssim"] >= mark:
            if before is None:
                return float(row["seconds"])
            share = (mark - before["ssim"]) / (row["ssim"] - before["ssim"])
            length = row["seconds"] - before["seconds"]
            return before["seconds"] + share * length
        before = row
    return None


def tabulate(rows):
    """What the curves say of each mark, and of each system.

    Returns: a dict a mark, of the minutes of each system (None: never) and,
        for both tutorials, how many times those of the recipe they are (None
        if either never came so far); a dict a system, of its end and best.
    """
    curves = {
        name: [row for row in rows if row["system"] == name] for name in SYSTEMS
    }
    marks = []
    for mark in MARKS:
        seconds = {name: passing(curve, mark) for name, curve in curves.items()}
        minutes = {name: s and s / 60 for name, s in seconds.items()}
        ratios = {
            f"{name}/recipe": minutes[name] / minutes["recipe"]
            if minutes[name] and minutes["recipe"]
            else None
            for name in TUTORIALS
        }
        marks.append({"mark": mark, **minutes, **ratios})
    ends = [
        {
            "system": name,
            "best": max(row["ssim"] for row in curve),
            "last": curve[-1]["ssim"],
            "steps": curve[-1]["step"],
            "minutes": curve[-1]["seconds"] / 60,
        }
        for name, curve in curves.items()
    ]
    return marks, ends


def table_text(marks, ends):
    """The tables that are printed."""
    lines = [list(marks[0])]
    for row in marks:
        first, *rest = row.values()
        cells = ["never" if cell is None else f"{cell:.2f}" for cell in rest]
        lines.append([f"{first:.4f}", *cells])
    text = ["minutes to each mark, and ratios", utils.align(lines)]
    for row in ends:
        text.append(
            f"{row['system']}: best {row['best']:.4f}, last {row['last']:.4f} "
            f"after {row['steps']} steps, {row['minutes']:.2f} min"
        )
    return "\n".join(text)


def draw(path, rows, title):
    """SSIM against minutes, a line for each mark."""
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name in SYSTEMS:
        curve = [row for row in rows if row["system"] == name]
        minutes = [row["seconds"] / 60 for row in curve]
        ssim = [row["ssim"] for row in curve]
        axes.plot(minutes, ssim, ".-", label=name)
    for mark in MARKS:
        axes.axhline(mark, color="0.6", lw=0.8, ls="--")
        axes.annotate(
            f"{mark:g}",
            (1, mark),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            va="bottom" if mark == max(MARKS) else "center_baseline",
            fontsize=8,
        )
    axes.set(xlabel="minutes of training", ylabel="SSIM", title=title)
    axes.set(xlim=(0, None), ylim=(0.2, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("dir", nargs="?", metavar="DIR")
    parser.add_argument("--unseen", choices=dataset.SPLITS[1:], default="test")
    parser.add_argument(
        "--minutes", type=float, default=6, help="of each tutorial"
    )
    parser.add_argument("--small", action="store_true", help="tiny models")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    options, flags = parser.parse_known_args(argv)
    if options.small:
        options.dir = options.dir or str(
            dataset.simulated_folder(4, "adni", 32)
        )
    elif not options.dir:
        parser.error("DIR is required without --small")
    flags = [*RECIPE, "--dataset", "adni", "--data-dir", options.dir, *flags]
    config = utils.resolve(flags)
    if options.small:
        config = config.smoked()

    index = dataset.load_index(options.dir, "adni")
    size = dataset.native_size(index)
    unseen = index[index["split"] == options.unseen]
    seen = ["train"] + ["validate"] * (options.unseen == "test")
    frame = index[index["split"].isin(seen)]
    images = list(dataset.make_dataset(unseen, size, 32))
    sample = frame.iloc[utils.spread(len(frame), 512)]
    pixels = list(dataset.make_dataset(sample, size, 512))[0].numpy()
    variance = float(pixels.var())

    people = [part["subject"].nunique() for part in (frame, unseen)]
    title = f"{people[1]} unseen people after training on {people[0]}"
    print(f"{title}, {len(unseen)} and {len(frame)} slices")
    systems = [
        *(
            make_tutorial(name, frame, size, variance, options)
            for name in TUTORIALS
        ),
        make_recipe(frame, size, variance, config),
    ]
    rows = train_by_turns(systems, images)
    marks, ends = tabulate(rows)
    print(table_text(marks, ends))
    if options.json:
        utils.write_json(
            options.json, {"cases": rows, "marks": marks, "systems": ends}
        )
    if options.figure:
        draw(options.figure, rows, title)
    return rows


if __name__ == "__main__":
    main()
