"""How much of the machine's matrix rate training steps reach; images a second.

    python tests/benchmarks/training.py                  all but smoke
    python tests/benchmarks/training.py --cases vqvae2 --json FILE
    python tests/benchmarks/training.py --cases vqvae2 --profile

Cases: `vqvae2` is the VQ-VAE-2 of oasis-vqvae2-pixelsnail at 256x256 with its
batch size, `prior_top` and `prior_bottom` are its priors; `quickstart` and
`quickstart_prior` are those of the default recipe; `smoke` shows in seconds
that this file works.

Counted are the floating-point operations of every convolution and matrix
product in the graph of a training step, forward and backward, from their
shapes; those of the SSIM, which blurs by products with matrices that are
mostly zeros, are told apart and do not count. The rate of the machine is that
of a large square product in the same dtype. Steps of both precisions and
products take turns, so that all meet the same machine; rates are of the median
step and of the best product.

`--profile` adds where the time of a step goes, in milliseconds of operations:
two may run at once, so that they add up to more than the step.
"""

import collections
import dataclasses
import functools
import math
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import modules  # noqa: E402
import train  # noqa: E402
import utils  # noqa: E402
from tests.benchmarks import common  # noqa: E402

PRECISIONS = ("float32", "mixed_bfloat16")
WARM_UP = 2  # steps: the first compiles


def config_of(recipe):
    settings = {"data_dir": "DIR", "dataset": "oasis"}
    return utils.Config(**settings | utils.RECIPES[recipe].settings)


def vqvae(recipe, size=None, **changes):
    """The VQ-VAE of a recipe and a batch."""
    config = config_of(recipe)
    size, batch = size or config.image_size, config.batch_size
    config = dataclasses.replace(config, **changes)
    images = np.random.default_rng(0).random((batch, *size, 1), "float32")
    return train.new_vqvae(config, size, 1.0), tf.constant(images)


def prior(recipe, grid, upper_grids=(), **changes):
    """A prior of a recipe and a batch."""
    config = config_of(recipe)
    options = {
        "channels": config.prior_channels,
        "blocks": config.prior_blocks,
        "kernel_size": config.prior_kernel_size,
        "head_layers": config.prior_head_layers,
        "dropout": config.prior_dropout,
        "position_features": config.position_features,
        "slice_condition": "slice" in config.conditions,
        "upper_grids": upper_grids,
    } | changes
    batch = config.prior_batch_size
    draw = functools.partial(
        np.random.default_rng(0).integers, 0, config.num_embeddings
    )
    inputs = {"indices": draw((batch, *grid), "int32")}
    if upper_grids:
        upper = (draw((batch, *g), "int32") for g in upper_grids)
        inputs["upper"] = tuple(upper)
    inputs["slice_position"] = np.linspace(0, 1, batch, dtype="float32")
    model = modules.PRIORS[config.prior](config.num_embeddings, grid, **options)
    return model, tf.nest.map_structure(tf.constant, inputs)


DEEP = "oasis-vqvae2-pixelsnail"
TOP, BOTTOM = (32, 32), (64, 64)
CASES = {
    "vqvae2": functools.partial(vqvae, DEEP),
    "prior_top": functools.partial(prior, DEEP, TOP),
    "prior_bottom": functools.partial(
        prior, DEEP, BOTTOM, (TOP,), attention=False
    ),
    "quickstart": functools.partial(vqvae, "quickstart", (128, 112)),
    "quickstart_prior": functools.partial(prior, "quickstart", (32, 28)),
    "smoke": functools.partial(
        vqvae, "quickstart", (16, 16), channels=4, num_embeddings=8
    ),
}


# === Counting ===


def count_flops(graph):
    """Floating-point operations of each convolution and matrix product.

    A multiplication and an addition are two. Every tap of a kernel counts,
    in the zeros around an image as well. What nothing reads is not computed,
    such as the gradient with respect to the images.

    Returns: dict from name of the operation to number.
    """
    counted = {}
    for operation in graph.get_operations():
        output = operation.outputs[0] if operation.outputs else None
        if output is None or not output.consumers():
            continue
        shapes = [tensor.shape for tensor in operation.inputs]
        if operation.type in ("Conv2D", "Conv2DBackpropInput"):
            grid = output if operation.type == "Conv2D" else operation.inputs[2]
            number = math.prod(grid.shape[:3]) * math.prod(shapes[1])
        elif operation.type == "Conv2DBackpropFilter":
            number = math.prod(shapes[2][:3]) * math.prod(output.shape)
        elif operation.type == "MatMul":
            inner = shapes[0][0 if operation.get_attr("transpose_a") else 1]
            number = math.prod(output.shape) * inner
        elif operation.type == "BatchMatMulV2":
            inner = shapes[0][-2 if operation.get_attr("adj_x") else -1]
            number = math.prod(output.shape) * inner
        else:
            continue
        counted[operation.name] = 2 * number
    return counted


SSIM = re.compile(r"(gradient_tape/)?ssim(_\d+)?/")
OTHERS = "losses, metrics, optimizer"


class Trainer:
    """Training steps of a model on one batch, in one precision."""

    def __init__(self, make, precision):
        keras.backend.clear_session()  # else names go on counting
        keras.config.set_dtype_policy(precision)
        try:
            self.model, self.batch = make()
        finally:
            keras.config.set_dtype_policy("float32")
        self.model.compile(
            keras.optimizers.Adam(1e-4, global_clipnorm=1.0), jit_compile=False
        )
        self.model.optimizer.build(self.model.trainable_variables)
        self.train_step = tf.function(self.model.train_step)
        graph = self.train_step.get_concrete_function(self.batch).graph
        self.flops = count_flops(graph)
        for _ in range(WARM_UP):
            self.step()

    @property
    def images(self):
        return len(tf.nest.flatten(self.batch)[0])

    def step(self):
        float(self.train_step(self.batch)["loss"])

    def gflop(self, ssim=False):
        """Of the network, or of its SSIM."""
        chosen = (
            number
            for name, number in self.flops.items()
            if bool(SSIM.match(name)) == ssim
        )
        return sum(chosen) / 1e9


def square_product(size, precision):
    """A function that multiplies two square matrices, and its GFLOP."""
    dtype = keras.dtype_policies.get(precision).compute_dtype
    a, b = (
        tf.cast(tf.random.stateless_normal((size, size), (0, k)), dtype)
        for k in range(2)
    )
    multiply = tf.function(tf.matmul)
    multiply(a, b)
    return lambda: multiply(a, b), 2 * size**3 / 1e9


def measure(name, steps, size):
    """A row for each precision: rates, images a second."""
    trainers = [Trainer(CASES[name], p) for p in PRECISIONS]
    products = [square_product(size, p) for p in PRECISIONS]
    functions = [trainer.step for trainer in trainers]
    functions += [multiply for multiply, _ in products]
    times = common.by_turns(functions, steps)
    rows = []
    for k, (precision, trainer) in enumerate(
        zip(PRECISIONS, trainers, strict=True)
    ):
        step = float(np.median(times[:, k]))
        product = float(times[:, len(PRECISIONS) + k].min())
        achieved = trainer.gflop() / step
        rate = products[k][1] / product
        rows.append(
            {
                "case": name,
                "precision": precision,
                "images": trainer.images,
                "steps": steps,
                "seconds_per_step": step,
                "images_per_second": trainer.images / step,
                "gflop_per_step": trainer.gflop(),
                "ssim_gflop_per_step": trainer.gflop(ssim=True),
                "gflop_per_second": achieved,
                "gemm_gflop_per_second": rate,
                "share_of_gemm": achieved / rate,
                # Of pairs of steps next to each other.
                "times_float32": float(np.median(times[:, 0] / times[:, k])),
            }
        )
    return rows, trainers


# === Where the time goes ===


def part_of(name):
    """Outermost scope of an operation: most are layers."""
    if SSIM.match(name):
        return "products of SSIM"
    scope, inside, _ = name.removeprefix("gradient_tape/").partition("/")
    return scope if inside else OTHERS


def profile(trainer, steps=3):
    """Milliseconds a step of each operation: dict from (name, type)."""
    # TensorBoard draws these; there is no public reader in TensorFlow.
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        for _ in range(steps):
            trainer.step()
        tf.profiler.experimental.stop()
        (file,) = Path(folder).rglob("*.xplane.pb")
        space = xplane_pb2.XSpace.FromString(file.read_bytes())
    times = collections.Counter()
    for plane in space.planes:
        for event in (event for line in plane.lines for event in line.events):
            name = plane.event_metadata[event.metadata_id].name
            if match := re.fullmatch(r"([\w/.-]+):([A-Z_]\w*)", name):
                times[match.groups()] += event.duration_ps / 1e9 / steps
    return times


def flops_by_operation(trainer, times):
    """Of what ran: fused, a product has the name of what follows it."""
    scopes = {
        name.rpartition("/")[0]: flops for name, flops in trainer.flops.items()
    }
    found = {}
    for name, kind in times:
        found[name, kind] = trainer.flops.get(name, 0)
        if "Fused" in kind and not found[name, kind]:
            found[name, kind] = scopes.get(name.rpartition("/")[0], 0)
    return found


def print_profile(row, trainer, most=20):
    """Time and rate of parts, of types of operation, of single ones."""
    times = profile(trainer)
    flops = flops_by_operation(trainer, times)
    whole = sum(times.values())
    for what, key_of in (
        ("parts", lambda key: part_of(key[0])),
        ("types", lambda key: key[1]),
        ("operations", " ".join),
    ):
        spent, done = collections.Counter(), collections.Counter()
        for key, milliseconds in times.items():
            spent[key_of(key)] += milliseconds
            done[key_of(key)] += flops[key]
        rows = [
            {
                "part": part,
                "ms": milliseconds,
                "share": milliseconds / whole,
                "rate": done[part] / milliseconds / 1e6 or None,
            }
            for part, milliseconds in spent.most_common(most)
        ]
        title = f"{row['case']}, {row['precision']}: {what}"
        common.print_table(title, rows, PROFILE)


PROFILE = {
    "ms": ("ms", ".1f"),
    "share": ("share", ".1%"),
    "GFLOP/s": ("rate", ".0f"),
    "part": ("part", ""),
}
COLUMNS = {
    "case": ("case", ""),
    "precision": ("precision", ""),
    "batch": ("images", "d"),
    "ms a step": ("seconds_per_step", lambda s: f"{1000 * s:.0f}"),
    "images/s": ("images_per_second", ".1f"),
    "GFLOP a step": ("gflop_per_step", ".1f"),
    "of SSIM": ("ssim_gflop_per_step", ".1f"),
    "GFLOP/s": ("gflop_per_second", ".0f"),
    "GEMM": ("gemm_gflop_per_second", ".0f"),
    "share": ("share_of_gemm", ".2f"),
    "x float32": ("times_float32", ".2f"),
}


def main(argv=None):
    parser = common.options(__doc__)
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        default=[name for name in CASES if name != "smoke"],
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--gemm-size", type=int, default=4096)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args(argv)
    rows = []
    for name in options.cases:
        found, trainers = measure(name, options.steps, options.gemm_size)
        rows += found
        common.print_table(name, found, COLUMNS)
        if options.profile:
            for row, trainer in zip(found, trainers, strict=True):
                print_profile(row, trainer)
    common.write(options, rows)
    return rows


if __name__ == "__main__":
    main()
