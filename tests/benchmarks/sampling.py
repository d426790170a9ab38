"""Time to sample from untrained priors, and of a loop of full forward passes.

    python tests/benchmarks/sampling.py                  all but smoke
    python tests/benchmarks/sampling.py --cases tutorial recipe --json FILE
    python tests/benchmarks/sampling.py --cases scaling memory

Speed needs no skill, so nothing is trained. Cases:

- `tutorial`: a PixelCNN of the size of the Keras tutorial's (7x7 kernel, 5
  residual blocks, 128 channels, K=512), ten 32x32 and four 64x64 grids, against
  the way of https://keras.io/examples/generative/vq_vae/: for every position,
  one forward pass of the tutorial's network over the whole grids, a draw from
  the softmax, and the position is written.
- `recipe`: the two priors of oasis-vqvae2-pixelsnail, 8 images, against full
  forward passes of the same priors.
- `scaling`: time against positions and against images, with the exponent.
- `memory`: the most memory held against the number of images, a process each.
- `reference`: PixelSNAIL at the size of the VQ-VAE-2 implementation most used,
  256 channels and about 92 and 95 million weights, 4 images.
- `smoke` shows in seconds that this file works.

Of a loop, passes at positions spread over the grid are timed after one that is
not, and the median is multiplied by the number of positions. A pass is one
`tf.function` call, with or without XLA, whichever is faster; beside it stand
`predict`, which is what the tutorial calls, and a loop with our own network,
which embeds indices and has no kernel rows that the mask would hide. Compiling
is told apart.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import modules  # noqa: E402
import utils  # noqa: E402
from tests.benchmarks import common  # noqa: E402

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
TUTORIAL = {"num_embeddings": 512, "channels": 128, "blocks": 5}
TINY = {"num_embeddings": 8, "channels": 8, "blocks": 1}


# === The tutorial's way, written from its description ===


@keras.saving.register_keras_serializable("benchmarks")
class MaskedConv2D(keras.layers.Conv2D):
    """Convolution whose kernel is multiplied by a mask, type "A" or "B"."""

    def __init__(self, filters, kernel_size, mask_type, **kwargs):
        super().__init__(filters, kernel_size, padding="same", **kwargs)
        self.mask_type = mask_type

    def build(self, input_shape):
        super().build(input_shape)
        side = self.kernel_size[0] // 2
        mask = np.ones((*self.kernel_size, 1, 1), "float32")
        mask[side, side + (self.mask_type == "B") :] = 0
        mask[side + 1 :] = 0
        self.mask = mask

    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, kernel * self.mask)


def tutorial_network(grid, num_embeddings, channels, blocks):
    """PixelCNN over one-hot indices: logits of every position."""
    inputs = keras.Input(grid, dtype="int32")
    x = keras.ops.one_hot(inputs, num_embeddings)
    x = MaskedConv2D(channels, 7, "A", activation="relu")(x)
    for _ in range(blocks):
        y = keras.layers.Conv2D(channels, 1, activation="relu")(x)
        y = MaskedConv2D(channels // 2, 3, "B", activation="relu")(y)
        y = keras.layers.Conv2D(channels, 1, activation="relu")(y)
        x = x + y
    for _ in range(2):
        x = MaskedConv2D(channels, 1, "B", activation="relu")(x)
    return keras.Model(inputs, keras.layers.Conv2D(num_embeddings, 1)(x))


def draw_everywhere(network):
    """Indices drawn at every position given the grids so far."""

    def draw(grids):
        logits = network(grids)
        flat = tf.reshape(logits, (-1, logits.shape[-1]))
        return tf.reshape(tf.random.categorical(flat, 1), tf.shape(grids))

    return draw


def compiled_draws(network):
    """Ways to compile a pass: name -> function of the grids."""
    draw = draw_everywhere(network)
    return {
        "tf.function": tf.function(draw),
        "tf.function, XLA": tf.function(draw, jit_compile=True),
    }


class PredictingSampler(keras.Model):
    """The tutorial's sampler: its `predict` gives draws at every position."""

    def __init__(self, network):
        super().__init__()
        self.draw = draw_everywhere(network)

    def call(self, grids):
        return self.draw(grids)


def predicted_draw(network):
    sampler = PredictingSampler(network)
    return lambda grids: sampler.predict(grids, verbose=0)


def loop_seconds(draw, grid, images, passes):
    """Seconds that the loop over all positions takes, from some of them."""
    grids = np.zeros((images, *grid), "int32")
    positions = np.linspace(0, grid[0] * grid[1] - 1, passes + 1).astype(int)

    def fill(position):
        row, column = divmod(int(position), grid[1])
        grids[:, row, column] = np.asarray(draw(grids))[:, row, column]

    fill(positions[0])  # compiles
    times = [common.seconds(fill, position) for position in positions[1:]]
    return float(np.median(times)) * grid[0] * grid[1]


def baseline(network, grid, images, passes):
    """Seconds of the faster compiled loop, and which that is."""
    times = {
        name: loop_seconds(draw, grid, images, passes)
        for name, draw in compiled_draws(network).items()
    }
    fastest = min(times, key=times.get)
    return times[fastest], fastest


# === Ours ===


def sample_seconds(prior, images, upper=(), draws=2):
    """Seconds to compile, to draw once compiled, and the grids drawn."""
    times, drawn = [], []
    for seed in range(draws + 1):  # the first compiles as well
        times.append(
            common.seconds(
                lambda seed=seed: drawn.append(
                    prior.sample(images, seed=seed, upper=list(upper))
                )
            )
        )
    # The best: what disturbs a draw of a second can only add to it.
    best = min(times[1:])
    return times[0] - best, best, drawn[-1]


def tutorial_row(grid, images, passes, settings=TUTORIAL):
    """Tutorial PixelCNN: ours, the tutorial's loop, `predict`, own loop."""
    prior = modules.PixelCNN(latent_grid=grid, **settings)
    compiling, seconds, _ = sample_seconds(prior, images)
    network = tutorial_network(grid, **settings)
    looped, fastest = baseline(network, grid, images, passes)
    own, _ = baseline(prior, grid, images, passes)
    predicted = loop_seconds(predicted_draw(network), grid, images, passes)
    return {
        "model": "pixelcnn-tutorial",
        "grid": grid,
        "batch": images,
        "weights": prior.count_params(),
        "seconds": seconds,
        "seconds_to_compile": compiling,
        "baseline_seconds": looped,
        "baseline": fastest,
        "baseline_passes": passes,
        "ratio": looped / seconds,
        "predict_seconds": predicted,
        "own_network_seconds": own,
    }


def recipe_row(images, passes, levels):
    """PixelSNAIL of all levels: ours and full passes of the same priors."""
    row = {
        "model": "pixelsnail-vqvae2",
        "grid": [settings["latent_grid"] for settings in levels],
        "batch": images,
        "baseline_passes": passes,
    }
    sums = dict.fromkeys(
        ("weights", "seconds", "seconds_to_compile", "baseline_seconds"), 0
    )
    upper, names = [], []
    for settings in levels:
        prior = modules.PixelSNAIL(**settings)
        compiling, seconds, grids = sample_seconds(prior, images, upper)
        # A pass is told the height of the slice, as in training.
        network = functools.partial(
            prior,
            upper=tuple(map(tf.constant, upper)),
            slice_position=tf.linspace(0.0, 1.0, images),
        )
        looped, fastest = baseline(
            network, settings["latent_grid"], images, passes
        )
        names.append(fastest)
        found = (prior.count_params(), seconds, compiling, looped)
        for key, number in zip(sums, found, strict=True):
            sums[key] += number
        upper = [np.asarray(grids)]
    row["baseline"] = "; ".join(dict.fromkeys(names))
    return row | sums | {"ratio": sums["baseline_seconds"] / sums["seconds"]}


def size_rows(levels, images):
    """Our sampler alone, a row for each level."""
    rows, upper = [], []
    for settings in levels:
        prior = modules.PixelSNAIL(**settings)
        compiling, seconds, grids = sample_seconds(prior, images, upper, 1)
        upper = [np.asarray(grids)]
        rows.append(
            {
                "model": "pixelsnail-reference",
                "grid": prior.latent_grid,
                "batch": images,
                "weights": prior.count_params(),
                "seconds": seconds,
                "seconds_to_compile": compiling,
            }
        )
    return rows


KINDS = {  # sides of the grids, class and settings
    "pixelcnn": ((16, 32, 64), modules.PixelCNN, TUTORIAL),
    "pixelsnail": (
        (16, 32, 64),
        modules.PixelSNAIL,
        {**SMALL, "attention": False},
    ),
    # Every position looks at all before it: more work the larger the grid.
    "pixelsnail, attention": ((8, 16, 32), modules.PixelSNAIL, SMALL),
}


def scaling_rows(kinds=KINDS, batches=(1, 8, 64)):
    """Seconds against positions of a grid and against images.

    As many images as all cores draw at once (`at_once`) take as long as one: so
    many on the grids, and the exponent of the images is over those from there.
    """
    rows = []
    for name, (sides, prior_class, settings) in kinds.items():
        priors = [
            prior_class(latent_grid=(side, side), **settings) for side in sides
        ]
        at_once = priors[0].sample_chunk * priors[0].sample_threads
        by_side = [sample_seconds(prior, at_once)[1] for prior in priors]
        by_batch = [
            sample_seconds(priors[len(sides) // 2], batch)[1]
            for batch in batches
        ]
        positions = np.square(sides)
        whole = np.array(batches) >= at_once
        rows.append(
            {
                "model": name,
                "grids": [[side, side] for side in sides],
                "at_once": at_once,
                "seconds_of_grids": by_side,
                "exponent_of_positions": common.exponent(positions, by_side),
                "grid": [sides[len(sides) // 2]] * 2,
                "batches": batches,
                "seconds_of_batches": by_batch,
                "exponent_of_images": common.exponent(
                    np.array(batches)[whole], np.array(by_batch)[whole]
                ),
            }
        )
    return rows


def peak_of(images, grid, settings):
    """MB held at most by a process that draws so many images."""
    prior = modules.PixelCNN(latent_grid=grid, **settings)
    prior.sample(images)
    return common.memory_mb("VmHWM")


def memory_rows(counts=(8, 64, 256), grid=(32, 32), settings=TUTORIAL):
    rows = []
    for images in counts:
        peak = common.in_process(peak_of, images, grid, settings)
        rows.append({"model": "pixelcnn", "grid": grid, "images": images})
        rows[-1] |= {
            "peak_mb": peak,
            "ratio": peak / rows[0].get("peak_mb", peak),
        }
    return rows


CASES = {  # key of the rows in the JSON file, function that makes them
    "tutorial": (
        "cases",
        lambda: [
            tutorial_row((32, 32), 10, passes=12),
            tutorial_row((64, 64), 4, passes=12),
        ],
    ),
    "recipe": (
        "cases",
        lambda: [recipe_row(8, 12, [{**SMALL, **TOP}, {**SMALL, **BOTTOM}])],
    ),
    "scaling": ("scaling", scaling_rows),
    "memory": ("memory", memory_rows),
    "reference": (
        "sizes",
        lambda: size_rows(
            [{**LARGE, **TOP, "blocks": 28}, {**LARGE, **BOTTOM, "blocks": 30}],
            4,
        ),
    ),
    "smoke": ("cases", lambda: [tutorial_row((4, 4), 2, 2, TINY)]),
}


def seconds_text(value):
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def list_text(values):
    return ", ".join(map(seconds_text, values))


def grid_text(grid):
    if isinstance(grid[0], int):
        return utils.size_text(grid)
    return " + ".join(map(utils.size_text, grid))


TIMES = {
    "model": ("model", ""),
    "grid": ("grid", grid_text),
    "images": ("batch", "d"),
    "weights": ("weights", ","),
    "seconds": ("seconds", seconds_text),
    "compiling": ("seconds_to_compile", ".1f"),
}
COLUMNS = {
    "cases": {
        **TIMES,
        "loop, s": ("baseline_seconds", seconds_text),
        "ratio": ("ratio", ",.0f"),
        "passes timed": ("baseline_passes", "d"),
        "compiled by": ("baseline", ""),
        "predict, s": ("predict_seconds", seconds_text),
        "own network, s": ("own_network_seconds", seconds_text),
    },
    "scaling": {
        "model": ("model", ""),
        "grids": ("grids", lambda grids: ", ".join(map(grid_text, grids))),
        "seconds of grids": ("seconds_of_grids", list_text),
        "exponent": ("exponent_of_positions", ".2f"),
        "grid": ("grid", grid_text),
        "images": ("batches", lambda numbers: ", ".join(map(str, numbers))),
        "seconds": ("seconds_of_batches", list_text),
        "exponent of images": ("exponent_of_images", ".2f"),
    },
    "memory": {
        "model": ("model", ""),
        "grid": ("grid", grid_text),
        "images": ("images", "d"),
        "peak, MB": ("peak_mb", ".0f"),
        "ratio": ("ratio", ".3f"),
    },
    "sizes": TIMES,
}


def main(argv=None):
    return common.run_cases(__doc__, CASES, COLUMNS, argv)


if __name__ == "__main__":
    main()
