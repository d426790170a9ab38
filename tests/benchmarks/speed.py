"""Speed and memory of training, sampling and input.

    python tests/benchmarks/speed.py [--cases sampling ...] [--json FILE]
    python tests/benchmarks/speed.py --cases memory --models vqvae2 --batch 64

Models that are trained: the VQ-VAE-2 of oasis-vqvae2-pixelsnail at 256x256 and
its two priors; VQ-VAE and prior of the quickstart. Cases:

- `training`: images a second in float32 and bfloat16, and the share that this
  is of the machine's rate. Counted are the floating-point operations of every
  convolution and matrix product in a step but for those of the SSIM. The rate
  of the machine is that of a large square product, the best of some.
- `memory`: what the flags for small memories save, and cost in time; without
  dropout, a process each. It is the most resident memory in steps, less that
  before the first; the compiled step is in it.
- `workers`: images a second of a quickstart, validation included, of two
  processes of `--strategy multiworker` and of one. Each has a core and 8 images
  a step. Loopback has no network's delay, so efficiency is the best there is.
- `sampling`: untrained priors, a PixelCNN of the size of the Keras tutorial's
  (7x7 kernel, 5 residual blocks, 128 channels, K=512) and the two priors of the
  VQ-VAE-2, against a loop that samples from the same prior as
  https://keras.io/examples/generative/vq_vae/ does: for every position one pass
  over the whole grids, of which one position is kept. Some passes are timed,
  with and without XLA; the median of the faster way counts for all positions.
- `input`: images a second that `dataset.load` decodes from PNG, JPEG and
  .nii.gz files, and that `dataset.training_batches` gives after it, against the
  training of the quickstart, by turns.
- `files`: 1,000 and 20,000 of them, hard links to a few simulated slices: MB
  held after a pass over them; seconds of the first `dataset.load`, which
  decodes every file, and of a second one, which decodes none.
"""

import functools
import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import common
import numpy as np

import dataset
import train
import utils

keras = utils.lazy_import("keras")
modules = utils.lazy_import("modules")
tf = utils.lazy_import("tensorflow")

PRECISIONS = ("float32", "mixed_bfloat16")
WARM_UP = 2  # steps: the first compiles
DEEP = "oasis-vqvae2-pixelsnail"
MODELS = {  # recipe, image size, level of the prior or 0 for the VQ-VAE
    "vqvae2": (DEEP, (256, 256), 0),
    "prior_top": (DEEP, (256, 256), 2),
    "prior_bottom": (DEEP, (256, 256), 1),
    "quickstart": ("quickstart", (128, 112), 0),
    "quickstart_prior": ("quickstart", (128, 112), 1),
}
WAYS = {  # attributes of a model; jit is of its training step
    "as it is": {},
    "accumulation-steps 4": {"accumulation_steps": 4},
    "recompute": {"recompute": True},
    "jit": {},
}
WORKER_FLAGS = (
    "--run-dir run --phantom-subjects 16 --epochs 3 --prior-epochs 3 "
    "--no-evaluate --temperature 1 --top-p 1"
).split()
OF_SSIM = re.compile(r"(gradient_tape/)?ssim(_\d+)?/")
FACTORS = {  # of an operation, the shapes that it reads, and its own
    "Conv2D": lambda op, x, y: (*y[:3], *x[1]),
    "Conv2DBackpropInput": lambda op, x, y: (*x[2][:3], *x[1]),
    "Conv2DBackpropFilter": lambda op, x, y: (*x[2][:3], *y),
    "MatMul": lambda op, x, y: (*y, x[0][1 - op.get_attr("transpose_a")]),
    "BatchMatMulV2": lambda op, x, y: (*y, x[0][-1 - op.get_attr("adj_x")]),
}
TUTORIAL = {"num_embeddings": 512, "channels": 128, "blocks": 5}
TINY = {"num_embeddings": 8, "channels": 8, "blocks": 1}
PASSES = 12  # of a loop that are timed
# Side of the grid, images, whether to time the loop.
SIZES = ((32, 10, True), (64, 4, True))
SIZES += ((32, 8, False), (32, 64, False), (32, 256, False))
STEPS, BATCHES = 4, 20  # of training, of input; in a turn
BATCH = utils.RECIPES["quickstart"].settings.training.batch_size


class Trainer:
    """Training steps of one of `MODELS` on a batch, in one of `WAYS`."""

    def __init__(self, name, options, precision, way="as it is", **changes):
        recipe, frame, part = MODELS[name]
        if size := options.batch:
            changes |= {"batch_size": size, "prior_batch_size": size}
        keras.backend.clear_session()  # else names go on counting
        keras.config.set_dtype_policy(precision)
        try:
            found = common.recipe(recipe, frame, options.small, **changes)
        finally:
            keras.config.set_dtype_policy("float32")
        model, batch = found[0][part], found[1][part]
        self.batch = tf.nest.map_structure(tf.constant, batch)
        self.images = len(tf.nest.flatten(batch)[0])
        for attribute, value in WAYS[way].items():
            setattr(model, attribute, value)
        norm = train.GRADIENT_NORM
        model.compile(keras.optimizers.Adam(1e-4, global_clipnorm=norm))
        model.optimizer.build(model.trainable_variables)
        jit = {"autograph": False, "jit_compile": way == "jit"}
        self.train_step = tf.function(model.train_step, **jit)
        self.graph = self.train_step.get_concrete_function(self.batch).graph

    def step(self):
        """Train one step, to its end."""
        float(self.train_step(self.batch)["loss"])


def count_flops(graph):
    """Return operations of convolutions and matrix products but for the SSIM.

    A multiplication and an addition are two. Every tap of a kernel counts,
    in the zeros around an image as well. What nothing reads does not.
    """
    total = 0
    for op in graph.get_operations():
        used = op.outputs and op.outputs[0].consumers()
        if used and op.type in FACTORS and not OF_SSIM.match(op.name):
            shapes = [tensor.shape for tensor in op.inputs]
            factors = FACTORS[op.type](op, shapes, op.outputs[0].shape)
            total += 2 * math.prod(factors)
    return total


def training_rows(options):
    """Return a row for each model and precision."""
    side, rows = 64 if options.small else 4096, []
    for name in options.models:
        trainers = [Trainer(name, options, kind) for kind in PRECISIONS]
        calls = [trainer.step for trainer in trainers]
        calls += [square_product(side, kind) for kind in PRECISIONS]
        common.by_turns(calls, WARM_UP)
        times = common.by_turns(calls, options.steps)
        machine = 2e-9 * side**3 / times[:, 2:].min(axis=0)
        steps = np.median(times[:, :2], axis=0)
        for k, trainer in enumerate(trainers):
            row = {"model": name, "precision": PRECISIONS[k]}
            row["batch"] = trainer.images
            row["images_s"] = trainer.images / steps[k]
            row["x_float32"] = np.median(times[:, 0] / times[:, k])
            row["gflop_s"] = 1e-9 * count_flops(trainer.graph) / steps[k]
            row["product_gflop_s"] = machine[k]
            rows.append({**row, "share": row["gflop_s"] / machine[k]})
    return rows


def square_product(side, precision):
    """Return a function that multiplies large matrices."""
    dtype = keras.dtype_policies.get(precision).compute_dtype
    a = tf.cast(tf.random.stateless_normal((side, side), (0, 0)), dtype)
    return functools.partial(tf.function(tf.matmul), a, a)


def memory_of(name, way, options):
    """Return memory and time of steps, measured in this process."""
    policy, _ = utils.choose_precision()
    trainer = Trainer(name, options, policy, way, prior_dropout=0.0)
    before, calls = common.memory_mb(), [trainer.step]
    first, _, *times = common.by_turns(calls, WARM_UP + options.steps).ravel()
    row = {"model": name, "batch": trainer.images, "flags": way, "first": first}
    return row | {"step": np.median(times), "mb": common.memory_mb() - before}


def memory_rows(options):
    """Return a row for each model and way, with ratios to the plain one."""
    rows = []
    for name in options.models:
        for way in ["as it is"] if options.small else WAYS:
            if way == "recompute" and "prior" not in name:
                continue
            row = common.in_process(memory_of, name, way, options)
            first = next((r for r in rows if r["model"] == name), row)
            ratios = {f"{k}_ratio": row[k] / first[k] for k in ("step", "mb")}
            rows.append(row | ratios)
    return rows


def train_workers(count):
    """Train a quickstart on some cores; return images a second by stage."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    hosts = [f"localhost:{opened.getsockname()[1]}" for opened in sockets]
    for opened in sockets:
        opened.close()  # free ports, which the workers now take
    processes, size = [], str(8 * count)
    flags = [*WORKER_FLAGS, "--batch-size", size, "--prior-batch-size", size]
    for number, core in enumerate(sorted(os.sched_getaffinity(0))[:count]):
        task = {"type": "worker", "index": number}
        cluster = {"cluster": {"worker": hosts}, "task": task}
        words = ["taskset", "-c", str(core), sys.executable]
        words += [common.ROOT / "train.py", *flags]
        environment = os.environ | {"TF_CONFIG": json.dumps(cluster)}
        processes.append(subprocess.Popen(words, env=environment))
    if any([process.wait() for process in processes]):
        raise RuntimeError(f"a worker of {count} failed")
    return common.rates_of("run")


def worker_rows(options):
    """Return a row for each stage of the quickstart."""
    one, two = (common.in_process(train_workers, k) for k in (1, 2))
    rows = [{"stage": k, "one": one[k], "two": two[k]} for k in one]
    return [{**r, "efficiency": r["two"] / r["one"] / 2} for r in rows]


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
    row = {"model": name, "images": images, "weights": 0, "grid": ""}
    row |= {"compiling": 0.0, "seconds": 0.0}
    upper, loop = [], 0.0
    for prior in reversed(priors):
        draw = functools.partial(prior.sample, images, upper=list(upper))
        first, *times = common.by_turns([draw], 3).ravel()
        row["weights"] += prior.count_params()
        row["grid"] += f" {common.cell(prior.latent_grid)}"
        row["compiling"] += first - min(times)
        row["seconds"] += min(times)
        if loops:
            network = functools.partial(prior, upper=tuple(upper))
            loop += loop_seconds(network, prior.latent_grid, images)
        upper.insert(0, draw()[0])
    if loops:
        row |= {"loop": loop, "ratio": loop / row["seconds"]}
    return row


def tutorial_row(side, images, loops, settings):
    """Return a row of the tutorial's PixelCNN."""
    prior = modules.PixelCNN(latent_grid=(side, side), **settings)
    row = sample_row("tutorial", [prior], images, loops)
    return row if loops else {**row, "peak_mb": common.memory_mb()}


def sampling_rows(options):
    """Return rows of both kinds of priors."""
    name, small = "oasis-vqvae2-pixelsnail", options.small
    sizes, settings = ([(4, 2, True)], TINY) if small else (SIZES, TUTORIAL)
    rows = [common.in_process(tutorial_row, *s, settings) for s in sizes]
    (_, *priors), _ = common.recipe(name, small=small)
    return [*rows, sample_row(name, priors, 8)]


def load(layout, folder):
    """Return the slices of a folder, and the seconds that loading took."""
    settings, found = utils.DataSettings(dataset=layout, data_dir=folder), []
    seconds = common.seconds(lambda: found.append(dataset.load(settings)))
    return found[0], seconds


def read(slices, count):
    """Yield after every `count` training batches; endless."""
    steps = dataset.steps_per_epoch(len(slices), BATCH)
    batches = dataset.training_batches(slices, BATCH, steps, seed=0)
    for number, _ in enumerate(batches, start=1):
        if number % count == 0:
            yield


def input_here(options):
    """Return a row for each layout, in images a second, of this process."""
    policy, _ = utils.choose_precision()
    trainer, rows = Trainer("quickstart", options, policy), []
    turns = [lambda: [trainer.step() for _ in range(STEPS)]]
    for layout in ("oasis", "adni", "hipmri"):
        slices, seconds = load(layout, str(dataset.simulate(layout, layout, 4)))
        turns.append(functools.partial(next, read(slices, BATCHES)))
        rate = len(slices) / seconds
        rows.append({"layout": layout, "size": slices.size, "decoded": rate})
    common.by_turns(turns, 1)  # compiles
    times = common.by_turns(turns, 1 if options.small else 8)
    step, *times = np.median(times, axis=0)
    for row, seconds in zip(rows, times, strict=True):
        row["read"] = BATCHES * BATCH / seconds
        row["trained"] = STEPS * trainer.images / step
        row["ratio"] = row["read"] / row["trained"]
    return rows


def files_here(count):
    """Return a row of `files`, measured in this folder and process."""
    place = Path("simulated").absolute()  # memory of making it does not count
    made = common.in_process(dataset.simulate, place, "oasis", 4)
    *files, one, two = sorted(made.rglob("*.png"))
    # The splits must not share bytes.
    links = {"validate/case_1_slice_0": one, "test/case_2_slice_0": two}
    for k in range(count):
        name = f"train/case_{3 + k // 32}_slice_{k % 32}"
        links[name] = files[k % len(files)]
    for name, file in links.items():
        path = Path(f"linked/keras_png_slices_{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, path)
    (slices, first), (_, second) = (load("oasis", "linked") for _ in range(2))
    next(read(slices, dataset.steps_per_epoch(len(slices), BATCH)))
    held, peak = map(common.memory_mb, ("VmRSS", "VmHWM"))
    row = {"files": len(slices), "held_mb": held, "peak_mb": peak}
    return row | {"load_seconds": first, "second_load_seconds": second}


def files_rows(options):
    """Return a row for each number of files, with the ratio to the first."""
    counts = (40,) if options.small else (1_000, 20_000)
    rows = [common.in_process(files_here, count) for count in counts]
    least = rows[0]["held_mb"]
    return [{**row, "ratio": row["held_mb"] / least} for row in rows]


CASES = {
    "training": training_rows,
    "memory": memory_rows,
    "workers": worker_rows,
    "sampling": sampling_rows,
    "input": functools.partial(common.in_process, input_here),
    "files": files_rows,
}
FLAGS = {"models": list(MODELS), "batch": 0, "steps": 10}

if __name__ == "__main__":
    common.run(__doc__, CASES, FLAGS)
