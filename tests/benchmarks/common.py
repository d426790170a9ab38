"""What the benchmarks share: command line, timing, tables, models."""

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

import train
import utils

modules = utils.lazy_import("modules")


def run(description, cases, flags, argv=None):
    """Measure cases, print a table of each, write all to the file of --json.

    `cases`: {name: function of the options that returns rows, dicts}; `flags`:
    {name: default}, in capitals an argument. Returns {name of the case: rows}.
    """
    kind = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=description, **kind)
    parser.add_argument("--small", action="store_true", help="tiny models")
    for name, default in {**flags, "cases": [*cases], "json": ""}.items():
        flag = name if name.isupper() else "--" + name.replace("_", "-")
        several = {"nargs": "+", "choices": default, "type": str}
        one = {"type": type(default)}
        options = several if isinstance(default, list) else one
        parser.add_argument(flag, default=default, **options)
    options, results = parser.parse_args(argv), {}
    for name in options.cases:
        rows = results[name] = cases[name](options)
        table = utils.pd.DataFrame([*rows])
        text = table.to_string(index=False, float_format="{:,.4g}".format)
        print(f"\n{name}\n{text}", flush=True)
    if options.json:
        utils.write_json(options.json, results)
    return results


def seconds(function, *arguments):
    """Return the seconds that one call takes."""
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def in_process(function, *arguments):
    """Call a function in a process and an empty folder of its own."""
    start = multiprocessing.get_context("spawn"), os.chdir
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ProcessPoolExecutor(1, *start, (folder,)) as pool,
    ):
        return pool.submit(function, *arguments).result()


def memory_mb():
    """Return the most memory held, in MB; `getrusage` tells a parent's, too."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def recipe(name, size=None, small=False, **changes):
    """Return the untrained VQ-VAE of a recipe and its priors; a batch of each.

    Of images of `size`; `small`: shrunk; `changes` as in `utils.replace`.
    """
    settings = utils.RECIPES[name].settings
    settings = settings.smoked() if small else settings
    settings = utils.replace(settings, **changes)
    size = (32, 32) if small else size or settings.data.image_size
    vqvae = modules.VQVAE(size, **dataclasses.asdict(settings.vqvae))
    run = SimpleNamespace(info={"labels": {"AD": 0, "NC": 1}})
    job = SimpleNamespace(settings=settings, run=run)
    levels = range(1, vqvae.levels + 1)
    priors = [train.new_prior(job, vqvae, level) for level in levels]
    rng, count = np.random.default_rng(0), settings.training.prior_batch_size
    images = rng.random((settings.training.batch_size, *size, 1), "float32")
    shapes = [(count, *grid) for grid in vqvae.latent_grids]
    codes = vqvae.num_embeddings
    grids = [rng.integers(0, codes, shape, "int32") for shape in shapes]
    table = utils.pd.DataFrame({"position": modules.slice_positions(count)})
    table["label"] = modules.alternate_labels(("AD", "NC"), count)
    batches = [modules.prior_inputs(p, grids, table) for p in priors]
    return [vqvae, *priors], [images, *batches]
