"""Speed and memory of training and sampling.

    python tests/benchmarks/speed.py [--cases sampling ...] [--json FILE]
    python tests/benchmarks/speed.py --cases training --models vqvae2 --batch 64

- `training`: the VQ-VAE-2 of oasis-vqvae2-pixelsnail at 256x256 and its two
  priors, VQ-VAE and prior of the quickstart; a process each. Seconds a step,
  and the most resident memory in steps, less that before the first; the
  compiled step is in it. In float32, in bfloat16, and in bfloat16 with each of
  the flags for small memories, without dropout.
- `sampling`: untrained priors, a PixelCNN of the size of the Keras tutorial's
  (7x7 kernel, 5 residual blocks, 128 channels, K=512) and the two priors of the
  VQ-VAE-2, against a loop that samples from the same prior as
  https://keras.io/examples/generative/vq_vae/ does: for every position one pass
  over the whole grids, of which one position is kept. Some passes are timed,
  with and without XLA; the median of the faster way counts for all positions.
"""

import functools

import common
import numpy as np

import train
import utils

keras = utils.lazy_import("keras")
modules = utils.lazy_import("modules")
tf = utils.lazy_import("tensorflow")

DEEP = "oasis-vqvae2-pixelsnail"
MODELS = {  # recipe, image size, level of the prior or 0 for the VQ-VAE
    "vqvae2": (DEEP, (256, 256), 0),
    "prior_top": (DEEP, (256, 256), 2),
    "prior_bottom": (DEEP, (256, 256), 1),
    "quickstart": ("quickstart", (128, 112), 0),
    "quickstart_prior": ("quickstart", (128, 112), 1),
}
WAYS = {  # precision, attributes of a model; jit is of its training step
    "float32": ("float32", {}),
    "bfloat16": ("mixed_bfloat16", {}),
    "accumulation-steps 4": ("mixed_bfloat16", {"accumulation_steps": 4}),
    "recompute": ("mixed_bfloat16", {"recompute": True}),
    "jit": ("mixed_bfloat16", {}),
}
WARM_UP = 2  # steps: the first compiles
TUTORIAL = {"num_embeddings": 512, "channels": 128, "blocks": 5}
TINY = {"num_embeddings": 8, "channels": 8, "blocks": 1}
PASSES = 12  # of a loop that are timed
# Side of the grid, images, whether to time the loop.
SIZES = ((32, 10, True), (64, 4, True))
SIZES += ((32, 8, False), (32, 64, False), (32, 256, False))


def train_steps(name, way, options):
    """Return a row of training steps, measured in this process."""
    recipe, frame, part = MODELS[name]
    precision, attributes = WAYS[way]
    size, changes = options.batch, {"prior_dropout": 0.0}
    if size:
        changes |= {"batch_size": size, "prior_batch_size": size}
    keras.config.set_dtype_policy(precision)
    found = common.recipe(recipe, frame, options.small, **changes)
    keras.config.set_dtype_policy("float32")
    model, batch = found[0][part], found[1][part]
    batch = tf.nest.map_structure(tf.constant, batch)
    for attribute, value in attributes.items():
        setattr(model, attribute, value)
    norm = train.GRADIENT_NORM
    model.compile(keras.optimizers.Adam(1e-4, global_clipnorm=norm))
    model.optimizer.build(model.trainable_variables)
    jit = {"autograph": False, "jit_compile": way == "jit"}
    compiled = tf.function(model.train_step, **jit)
    before, count = common.memory_mb(), len(tf.nest.flatten(batch)[0])
    step = lambda: float(compiled(batch)["loss"])  # noqa: E731
    times = [common.seconds(step) for _ in range(WARM_UP + options.steps)]
    median = float(np.median(times[WARM_UP:]))
    row = {"model": name, "batch": count, "way": way, "first": times[0]}
    row |= {"step": median, "images_s": count / median}
    return row | {"mb": common.memory_mb() - before}


def training_rows(options):
    """Return a row for each model and way."""
    return [
        common.in_process(train_steps, name, way, options)
        for name in options.models
        for way in (["float32"] if options.small else WAYS)
        if way != "recompute" or "prior" in name
    ]


def loop_seconds(network, grid, images):
    """Return seconds of a loop over all positions."""

    def draw(grids):
        logits = network(grids)
        flat = tf.reshape(logits, (-1, logits.shape[-1]))
        return tf.reshape(tf.random.categorical(flat, 1), tf.shape(grids))

    def fill(draw, position):
        row, column = divmod(int(position), grid[1])
        grids[:, row, column] = draw(grids).numpy()[:, row, column]

    grids, medians = np.zeros((images, *grid), "int32"), []
    positions = np.linspace(0, grid[0] * grid[1] - 1, PASSES + 1).astype(int)
    for jit in (False, True):
        compiled = tf.function(draw, autograph=False, jit_compile=jit)
        times = [common.seconds(fill, compiled, p) for p in positions]
        medians.append(np.median(times[1:]))
    return float(min(medians)) * grid[0] * grid[1]


def sample_row(name, priors, images, loops=True):
    """Return a row of our sampler and a loop; priors are bottom first."""
    row = {"model": name, "images": images, "weights": 0, "seconds": 0.0}
    row |= {"grids": [prior.latent_grid for prior in priors], "loop": 0.0}
    upper = []
    for prior in reversed(priors):
        draw = functools.partial(prior.sample, images, upper=list(upper))
        _, *times = [common.seconds(draw) for _ in range(3)]  # the 1st compiles
        row["weights"] += prior.count_params()
        row["seconds"] += min(times)
        if loops:
            network = functools.partial(prior, upper=tuple(upper))
            row["loop"] += loop_seconds(network, prior.latent_grid, images)
        upper.insert(0, draw()[0])
    ratio = row["loop"] / row["seconds"]
    return {**row, "ratio": ratio, "peak_mb": common.memory_mb()}


def tutorial_row(side, images, loops, settings):
    """Return a row of the tutorial's PixelCNN."""
    prior = modules.PixelCNN(latent_grid=(side, side), **settings)
    return sample_row("tutorial", [prior], images, loops)


def sampling_rows(options):
    """Return rows of both kinds of priors."""
    small = options.small
    sizes, settings = ([(4, 2, True)], TINY) if small else (SIZES, TUTORIAL)
    rows = [common.in_process(tutorial_row, *s, settings) for s in sizes]
    (_, *priors), _ = common.recipe(DEEP, small=small)
    return [*rows, sample_row(DEEP, priors, 8)]


CASES = {"training": training_rows, "sampling": sampling_rows}
FLAGS = {"models": list(MODELS), "batch": 0, "steps": 10}

if __name__ == "__main__":
    common.run(__doc__, CASES, FLAGS)
