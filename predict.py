"""Use a trained run: reconstruct, generate, evaluate, inspect.

    python predict.py [RUN]                    generate, reconstruct, report
    python predict.py reconstruct [RUN] [--images PATH ...] [--split test]
    python predict.py generate [RUN] -n 64 [--seed 0] [--temperature 1]
    python predict.py generate RUN -n 25000 --first 25000 --format npz
    python predict.py evaluate [RUN] [--data-dir DIR]
    python predict.py complete RUN IMAGE ... [--keep-fraction 0.5] [-n 4]
    python predict.py anomaly [RUN] [IMAGE ...]
    python predict.py inspect [RUN] [--json]
    python predict.py export RUN DEST

RUN is a folder that train.py made; complete and export need it. The others take
the newest run under runs/ or, if there is none, the trained model under
resources/pretrained.
Results go into the run folder, those of the shipped model into
runs/results-NAME; --output names another folder.
"""

import base64
import collections
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import time
import typing
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from tyro.conf import Positional, arg

import dataset
import utils
from utils import ndimage, tf

modules = utils.lazy_import("modules")
jinja2 = utils.lazy_import("jinja2")

# Images sampled at a time, of an npz file, and in the grid. A multiple of the
# `chunk_size` of a prior; a few MB, and seconds of work that a kill loses.
CHUNK = 64
CALIBRATION = 256  # validation images that anomalies are compared with
PICTURED = 8  # images in a figure of reconstructions or anomalies, at most
UNLIKELY = 95  # percentile of 3x3 indices there above which they are redrawn

# === Settings of the verbs ===

RunFolder = Positional[Annotated[str | None, arg(metavar="RUN")]]
GivenRun = Positional[Annotated[str, arg(metavar="RUN")]]
Files = Positional[Annotated[tuple[str, ...], arg(metavar="IMAGE")]]
Few = utils.integer(1, 64)


@utils.settings
class RunArguments:
    """What most verbs take."""

    run: RunFolder = None
    """Run folder (default: the newest under runs/, else the shipped model)."""


@utils.settings
class OutputArguments:
    """What every verb takes that writes files."""

    output: utils.Folder = None
    """Folder for the results (default: the run folder; of the shipped model
    runs/results-NAME)."""


@utils.settings
class DataArguments(RunArguments, OutputArguments):
    """What every verb takes that reads images of the run."""

    data_dir: utils.Folder = None
    """Where the data of the run are now (default: where they were)."""


@utils.settings
class SplitArguments(DataArguments):
    """What every verb takes that looks at a few images of a split."""

    split: Literal["train", "validate", "test"] = "test"
    """Split of the run's data."""
    count: Few = 8
    """Number of images of the split."""


@utils.settings
class SamplingArguments:
    """What every verb takes that samples."""

    seed: utils.Seed | None = None
    """Seed: image k depends on it, on k and on what is asked for (default: that
    of the run)."""
    temperature: utils.Temperature | None = None
    """Sampling temperature; below 1 favours likely codes
    (default: chosen for the run; 1 with --top-p)."""
    top_p: utils.Share | None = None
    """Sample from the likeliest codes that together have this probability
    (default: chosen for the run; 1 with --temperature)."""
    top_k: utils.Whole = 0
    """Sample from the k likeliest codes only; 0: all."""
    guidance: utils.number(0, 100) = 1.0
    """Classifier-free guidance; above 1: more typical of the label; of a prior
    without labels, more typical of the slice position."""
    texture: bool = True
    """Give images the texture that was trained for the run, if there is."""


@utils.settings
class Show(DataArguments):
    """Generate slices, reconstruct test images, write the report."""


@utils.settings
class Reconstruct(SplitArguments):
    """Encode and decode images; print the SSIM of each, draw up to 8."""

    images: Annotated[tuple[str, ...], arg(metavar="PATH")] = ()
    """Image files (default: some images of a split)."""


@utils.settings
class Generate(RunArguments, SamplingArguments, OutputArguments):
    """Generate new slices as files, and the first, at most 64, as a figure.

    Images are sampled 64 at a time. Where all files of these exist, they are
    not sampled again, so an interrupted request goes on.
    Parts of a large request (--first) may run at the same time, also on
    several machines that share the folder.
    """

    number: Annotated[utils.Count, arg(aliases=["-n"])] = 64
    """Number of images."""
    first: utils.Whole = 0
    """Number of the first image: -n 100 --first 100 gives the second 100."""
    label: str | None = None
    """Class label (default: labels alternate)."""
    slice_position: utils.Fraction | None = None
    """Position in the head, 0 first slice, 1 last (default: spread evenly)."""
    format: Literal["png", "npz"] = "png"
    """One PNG for each image, or one npz with indices for every 64."""


@utils.settings
class Evaluate(SamplingArguments, DataArguments):
    """Compute every score on test subjects; `evaluation.json` and figures.

    --data-dir names the folder that the data of the run were moved to, or
    another data set NAME: then all images are test images, nothing is
    generated, and results go to `evaluation-NAME.json` and `figures/NAME`.
    """

    skip_bad: bool = False
    """Leave out bad files of another data set instead of stopping."""
    subject_pattern: str | None = None
    """Of another data set: as for train.py (default: guessed)."""
    num_samples: utils.integer(1, 5000) | None = None
    """Number of images generated, at most one for each test image (default:
    as in training)."""
    features: Literal["hog", "inception"] = "hog"
    """Features that image sets are compared by; inception downloads ImageNet
    weights."""


@utils.settings
class Complete(SamplingArguments, OutputArguments):
    """Keep the top of images and sample what may stand below it.

    The rest is blackened and the image encoded. Indices a row of cells or more
    above the cut are kept; the others are sampled given these. That is exact,
    because a prior goes from top to bottom; several levels cannot do it.
    """

    run: GivenRun
    """Run folder."""
    images: Files
    """Image files."""
    keep_fraction: utils.Share = 0.5
    """Share of the height that is kept."""
    number: Annotated[Few, arg(aliases=["-n"])] = 4
    """Number of completions of each image."""

    def __post_init__(self):
        if not self.images:
            raise utils.FlagError("IMAGE: missing; see --help")


@utils.settings
class Anomaly(SamplingArguments, SplitArguments):
    """Find what is unlike the training images; a figure and `anomaly.csv`.

    The surprisal of an index is -log2 p under the prior, averaged over 3x3
    indices. Where it exceeds that of 95 % of the validation indices, indices
    are sampled anew. The result is a restoration. The score is the maximum of
    |image - restoration|, averaged and smoothed; its percentile says how many
    validation images score no higher. Neither labels nor texture are used.
    Marimont & Tarroni, 2021, arXiv:2012.06765.
    """

    images: Files = ()
    """Image files (default: some images of a split)."""
    restorations: Few = 4
    """Number of restorations of each image."""


@utils.settings
class Inspect(RunArguments):
    """Show layers, grids, codebook, recipe, data and scores of a run."""

    json: bool = False
    """Print them as one JSON object."""


@utils.settings
class Export:
    """Write the models as a SavedModel that needs TensorFlow only.

    Its signatures are encode, decode and, with priors, generate. Size of the
    images, labels and intensity rule are in its `export.json`.
    """

    run: GivenRun
    """Run folder."""
    dest: Positional[Annotated[str, arg(metavar="DEST")]]
    """Folder to write, new or empty."""


# === Verbs ===


def main(argv):
    """Run a verb on the run it names, or on the newest."""
    verbs = {
        "show": (show, Show),
        "reconstruct": (reconstruct, Reconstruct),
        "generate": (generate, Generate),
        "evaluate": (evaluate, Evaluate),
        "complete": (complete, Complete),
        "anomaly": (anomaly, Anomaly),
        "inspect": (inspect, Inspect),
        "export": (export, Export),
    }
    types = {name: settings for name, (_, settings) in verbs.items()}
    name, options = utils.parse_verbs(types, argv, __doc__, default="show")
    run = utils.Run.open(options.run) if options.run else utils.Run.newest()
    if not (options.run or vars(options).get("json")):
        print(f"run folder {run.path}")
    path, writes = output_path(run, options), "output" in vars(options)
    if writes and path.exists() and not os.access(path, os.W_OK):
        raise utils.ResourceError(
            f"{path}: cannot be written to; name another with --output"
        )
    with utils.StopSignals():
        models = models_hash(run)  # samples are filed under it
        trained = Trained.load(run, options)
        refuse_replaced(run, models)
        verbs[name][0](trained, options)


def output_path(run, options):
    """Folder of the results of a verb."""
    if folder := getattr(options, "output", None):
        return Path(folder)
    if utils.RESOURCES in run.path.resolve().parents:
        return Path("runs") / f"results-{run.path.name}"
    return run.path


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run with its models, how to sample from it, and where results go."""

    run: utils.Run
    output: utils.Run  # the same run, with the path of the results
    vqvae: typing.Any
    priors: list  # bottom first; [] without any
    seed: int
    sampling: list  # `modules.Sampling` of each level, bottom first
    texture: typing.Any = None  # that images get, or None

    @classmethod
    def load(cls, run, options):
        """Load the models of a run; `RunError` without priors to sample."""
        missing = [k for k, p in enumerate(run.prior_paths) if not p.exists()]
        what, level = "this run has no prior", ""
        if missing and run.has_priors:
            what = f"{run.prior_names[missing[0]]}.keras is missing"
            level = f" --prior-level {missing[0] + 1}"
        if missing and isinstance(options, (Generate, Complete, Anomaly)):
            raise utils.RunError(
                f"{run.path}: {what}; make one with python train.py --stage "
                f"prior --run-dir {shlex.quote(str(run.path))}{level}"
            )
        if level:  # other priors may still be in training
            utils.warn(f"{what}: no priors are used")
        if missing or isinstance(options, Reconstruct):
            return cls.of(run, modules.load_vqvae(run), [], options)
        trained = cls.of(run, *modules.load_models(run), options)
        check_conditions(trained, options)
        return trained

    @classmethod
    def of(cls, run, vqvae, priors, options=None):
        """What the options say of a run whose models are loaded.

        Sampling is as chosen for the run, unless they say a part of that.
        """
        output, asked = copy.copy(run), vars(options) if options else {}
        output.path = output_path(run, options)
        seed = asked.get("seed")
        seed = run.settings.run.seed if seed is None else seed
        names = [field.name for field in dataclasses.fields(modules.Sampling)]
        given = {n: asked[n] for n in names if asked.get(n) is not None}
        chosen = run.info.get("sampling") or {}
        chosen = {} if given.keys() & chosen.keys() else chosen
        sampling = [
            modules.Sampling(**{k: v[level] for k, v in chosen.items()} | given)
            for level in range(vqvae.levels)
        ]
        texture = None
        if priors and asked.get("texture", True):
            texture = modules.load_texture(run, vqvae)
        return cls(run, output, vqvae, priors, seed, sampling, texture)

    def generate(self, n, **conditions):
        """Images as files hold them, indices, log-probabilities.

        See `modules.generate`.
        """
        bar = utils.progress_bar("sampling", "chunk")
        options = {"sampling": self.sampling, "texture": self.texture}
        options |= {"progress": bar} | conditions
        models = self.vqvae, self.priors
        images, *rest = modules.generate(*models, n, self.seed, **options)
        return in_8_bits(images), *rest

    def generate_like(self, table, **options):
        """`generate` with the labels and slice positions of a table.

        The condition is null where the prior does not know the value.
        """
        known = self.priors[0].labels
        labels = [name if name in known else None for name in table["label"]]
        positions = table["position"].to_numpy("float32")
        return self.generate(
            len(table), label=labels, slice_position=positions, **options
        )

    def sampling_values(self):
        """{setting: its value for each level, bottom first}."""
        return utils.pd.DataFrame(self.sampling).to_dict("list")

    def cut(self, *sets):
        """Images (..., H, W) as figures show them: the box of the model.

        Whole frames if there is content outside, as in images of others.
        """
        top, left, height, width = self.vqvae.box
        box = np.s_[..., top : top + height, left : left + width]
        content = [images > utils.FOREGROUND for images in sets]
        whole = any(part.sum() > part[box].sum() for part in content)
        return sets if whole else [images[box] for images in sets]


def in_8_bits(images):
    """Images [0, 1] rounded as in files, which shows in fine texture."""
    return utils.to_pixels(images) / np.float32(255)


def show(trained, options):
    """Generate and reconstruct, then write the report and say the scores."""
    if trained.priors:
        generate(trained, Generate())
    else:
        print("this run has no prior: nothing is generated")
    try:
        reconstruct(trained, Reconstruct(data_dir=options.data_dir))
    except (utils.DataError, utils.RunError) as error:
        print(f"no reconstructions without the images of the run: {error}")
    write_report(trained)
    evaluation = run_facts(trained)["evaluation"]
    print_summary(trained.run, evaluation, trained.output)


def reconstruct(trained, options):
    """Write `figures/reconstructions.png` of files or of a split."""
    slices, split = chosen_images(trained.run, options), options.split
    if options.images:
        name, some = "reconstructed_images", min(len(slices), PICTURED)
        title = f"Reconstructions, {some} of {len(slices)} images"
    else:  # only those of the test split are of unseen people
        name = "reconstructions" + f"_{split}" * (split != "test")
        title = f"Reconstructions of the {split} split"
    path = trained.output.figures_path / f"{name}.png"
    names = [*map(short_name, slices.table["path"])]
    images = slices.read()
    values = plot_reconstructions(path, trained, images, names, title=title)
    for file, value in zip(slices.table["path"], values, strict=True):
        print(f"SSIM {value:.4f}  {Path(file).name}")
    print(f"reconstructions: {path}")


def short_name(path):
    """The end of a file's name without suffix, for a caption."""
    return dataset.SUFFIX.sub("", Path(path).name)[-24:]


def chosen_images(run, options):
    """Files that were named, or some images of a split."""
    if options.images:
        return dataset.read_files(options.images, run)
    return some_of_split(run, options.data_dir, options.split, options.count)


def some_of_split(run, data_dir, split, count):
    """Up to `count` images of a split."""
    slices = dataset.load_run(run, data_dir, (split,))[split]
    if not len(slices):
        raise utils.DataError(f"{split}: no images in {run.path}")
    return slices.take(utils.choose_rows(len(slices), count))


def generate(trained, options):
    """Write files in `samples/`, and the first chunk as a figure.

    Chunk by chunk, so that memory does not grow with the number of images.
    """
    folder, drawn = sample_folder(trained), 0
    utils.remove_temporary_files(folder.glob("*.tmp-*"))
    asked, kind = sample_request(trained, options).items(), options.format
    name = "_".join(key.replace("_", "-") + text for key, text in asked)
    start, end = options.first, options.first + options.number
    edges = [start, *range(start // CHUNK * CHUNK + CHUNK, end, CHUNK), end]
    chunks = [(a, b - a) for a, b in itertools.pairwise(edges)]
    for first, count in utils.progress_bar("sampling", "chunk")(chunks):
        files = sample_files(folder / name, kind, first, count)
        if len(read_images(files)) < count:
            chunk = sample_chunk(trained, options, first, count)
            # Another process may have written more of them meanwhile.
            if len(read_images(files)) < count:
                write_chunk(files, chunk)
            drawn += count
    found = options.number - drawn
    print(f"{drawn} images sampled, {found} there already: {folder}")
    first, count = chunks[0]
    files = sample_files(folder / name, kind, first, count)
    suffix = f"_{first:06d}" if first else ""
    path = trained.output.figures_path / f"samples{suffix}.png"
    plot_samples(path, trained, read_images(files)[:count], options)
    print(f"the first {count}: {path}")


def plot_samples(path, trained, images, options):
    """Draw generated images, all of them, in order."""
    asked = sample_request(trained, options).items()
    words = ", ".join(f"{key.replace('_', ' ')} {x}" for key, x in asked)
    title = f"Generated slices, uncurated: {words}"
    utils.plot_samples(path, *trained.cut(images), title)


def check_conditions(trained, options):
    """Refuse a condition or guidance that the priors were not trained with."""
    prior, path, asked = trained.priors[0], trained.run.path, vars(options)
    label = asked.get("label")
    if label is not None and label not in prior.labels:
        known = ", ".join(prior.labels) or "none: no --condition label"
        raise utils.FlagError(
            f"--label: expected one of those of {path} ({known}), found "
            f"{label!r}"
        )
    position = asked.get("slice_position") is not None
    guided = asked.get("guidance", 1) != 1
    either = prior.labels or prior.slice_condition
    for flag, wanted, known in (
        ("slice-position", position, prior.slice_condition),
        ("guidance", guided, either),
    ):
        if wanted and not known:
            raise utils.FlagError(
                f"--{flag}: {path} was trained without such a --condition"
            )


def sample_folder(trained):
    """Folder of what the models of a run generate: `samples/` and their hash.

    Files of an earlier prior stay in a folder of their own: they are never
    taken for new ones, and no process clears away what another writes. The
    hash is that of `cat vqvae.keras prior.keras`, and of the texture if used.
    """
    digest = models_hash(trained.run, trained.texture is not None)
    return trained.output.path / "samples" / digest[:8]


def models_hash(run, texture=True):
    """SHA-256 of the model files of a run that exist, one after the other."""
    digest, paths = hashlib.sha256(), [run.vqvae_path, *run.prior_paths]
    for path in paths + [run.texture_path] * texture:
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()


def refuse_replaced(run, models):
    """Raise `RunError` if the models of a run have another hash by now."""
    if models_hash(run) != models:
        raise utils.RunError(
            f"{run.path}: a training replaced its models meanwhile; try again"
        )


def sample_request(trained, options):
    """Seed of a request, and what differs from the plain model, as text."""
    told = {"seed": [trained.seed]}
    usual = dataclasses.asdict(modules.Sampling())
    for key, values in trained.sampling_values().items():
        if set(values) != {usual[key]}:
            told[key] = values if len(set(values)) > 1 else values[:1]
    for key in ("label", "slice_position"):
        if (value := getattr(options, key)) is not None:
            told[key] = [value]
    # All digits of a number, but 2 for 2.0.
    return {
        key: "-".join(str(value).removesuffix(".0") for value in values)
        for key, values in told.items()
    }


def sample_files(path, kind, first, count):
    """Files of a chunk: one for each image, or one npz for all."""
    numbers = range(first, first + count, count if kind == "npz" else 1)
    return [Path(f"{path}_{k:06d}.{kind}") for k in numbers]


def write_chunk(files, chunk):
    """Write what `sample_chunk` returns, each file whole or not at all."""
    if files[0].suffix == ".npz":
        utils.write_arrays(files[0], chunk)
    else:
        for path, pixels in zip(files, chunk["images"], strict=True):
            utils.write_png(path, pixels)


def read_images(files):
    """Images `(N, H, W)` on [0, 1] of a chunk; an npz may hold fewer of it."""
    try:
        if files[0].suffix == ".png":
            pixels = np.stack([utils.read_png(path) for path in files])
        else:
            pixels = utils.read_arrays(files[0])["images"]
    except Exception:  # missing or damaged
        return ()
    return pixels / np.float32(255)


def sample_chunk(trained, options, first, count):
    """Arrays of an npz file: images `first` to `first + count` of a request."""
    prior = trained.priors[0]
    labels = modules.alternate_labels(prior.labels, count, first)
    if options.label is not None:
        labels = [options.label] * count
    positions = modules.slice_positions(count, first)
    if options.slice_position is not None:
        positions[:] = options.slice_position
    images, indices, _ = trained.generate(
        count, first=first, label=labels, slice_position=positions
    )
    chunk = {"images": utils.to_pixels(images)}
    chunk["number"] = np.arange(first, first + count)
    chunk |= {f"indices_{k}": grid for k, grid in enumerate(indices, start=1)}
    if labels:
        chunk["label"] = np.array(labels)
    if prior.slice_condition:
        chunk["slice_position"] = positions
    return chunk


def complete(trained, options):
    """Write `completions.npz` and `figures/completions.png`."""
    vqvae, output = trained.vqvae, trained.output
    if vqvae.levels > 1:
        raise utils.RunError(
            f"{trained.run.path}: complete needs a run of one level, found "
            f"{vqvae.levels}: only there are completions exact"
        )
    cut, kept = kept_part(vqvae, options.keep_fraction)
    slices = dataset.read_files(options.images, trained.run)
    images = slices.read()[..., 0]
    shown = images.copy()
    shown[:, cut:] = 0
    [indices] = modules.encode_dataset(vqvae, [shown[..., None]])
    known = np.where(kept[:, None], indices, -1)
    rows = np.repeat(np.arange(len(images)), options.number)
    table, known_here = slices.table.iloc[rows], [known[rows]]
    drawn, [grids], _ = trained.generate_like(table, known=known_here)
    shape = len(images), options.number
    drawn, grids = (a.reshape(*shape, *a.shape[1:]) for a in (drawn, grids))
    results = {"images": utils.to_pixels(drawn), "indices_1": grids}
    results |= {"known_1": known, "path": slices.table["path"].to_numpy(str)}
    path = output.path / "completions.npz"
    utils.write_arrays(path, results)
    title = f"Top {100 * options.keep_fraction:g} % kept, seed {trained.seed}"
    figure = output.figures_path / "completions.png"
    shown = trained.cut(images, shown, drawn)
    utils.plot_completions(figure, *shown, title)
    print(f"completions: {path}, figure: {figure}")


def kept_part(vqvae, fraction):
    """Rows of pixels that are kept, and which rows of cells, `(h,)` bool.

    Cells lie wholly in what is kept and one cell or more above the cut:
    nearer ones have seen much of the black. `FlagError` if there is none.
    """
    top, _, height, _ = vqvae.box
    cut = round(vqvae.image_size[0] * fraction)
    rows = vqvae.latent_grids[0][0]
    cell = height // rows
    kept = top + cell * np.arange(2, rows + 2) <= cut
    if not kept.any():
        raise utils.FlagError(
            f"--keep-fraction: {fraction:g} keeps {cut} rows of pixels and no "
            f"index; expected {top + 2 * cell} rows of pixels or more"
        )
    return cut, kept


def anomaly(trained, options):
    """Write `anomaly.csv` and `figures/anomaly.png`."""
    run, output, times = trained.run, trained.output, options.restorations
    reference = some_of_split(run, options.data_dir, "validate", CALIBRATION)
    slices = chosen_images(run, options)
    # Texture differs by chance, and is no finding.
    trained = dataclasses.replace(trained, texture=None)
    # A label must not explain a finding away.
    unknown = {"label": ""}
    if slices.table["position"].isna().any():
        unknown["position"] = np.nan
    healthy = find_anomalies(trained, reference, unknown, times)
    found = find_anomalies(trained, slices, unknown, times, healthy["limits"])
    table = anomaly_table(slices.table, found, healthy)
    path = output.path / "anomaly.csv"
    utils.write_csv(path, table)
    captions = []
    for row in table.itertuples():
        name, score, percentile = Path(row.path).name, row.score, row.percentile
        print(f"{score:.4f}  percentile {percentile:5.1f}  {name}")
        score = f"score {score:.3f}\npercentile {percentile:.0f}"
        captions.append(f"{short_name(row.path)}\n{score}")
    some = utils.spread(len(table), PICTURED)
    shown = [found[name][some] for name in ("images", "restored", "residual")]
    vqvae = trained.vqvae
    for level, side in zip(found["bits"], vqvae.factors, strict=True):
        cells = np.kron(level[some], np.ones((side, side)))
        shown.append(vqvae.framed(cells[..., None]).numpy()[..., 0])
    images, restored, residual, *bits = trained.cut(*shown)
    rows = [utils.Row("image", images, [captions[k] for k in some])]
    for k, grids in enumerate(bits, start=1):
        name = f"surprisal\nlevel {k}"
        rows.append(utils.heat_row(name, grids, "bits per code"))
    rows.append(utils.Row("restoration", restored))
    rows.append(utils.heat_row("residual", residual, "intensity"))
    figure = output.figures_path / "anomaly.png"
    title = f"Percentiles are of {len(reference)} validation images"
    utils.image_grid(figure, rows, title)
    print(f"table: {path}, figure: {figure}")


def find_anomalies(trained, slices, unknown, times, limits=None):
    """Surprisal of indices, alone and near, restorations and residual maps.

    Indices whose mean surprisal over 3x3 exceeds the limit of their level are
    restored. The limits are those given, or those of these images.
    """
    images, table = slices.read(), slices.table.assign(**unknown)
    batches = dataset.ordered_batches(images)
    indices = modules.encode_dataset(trained.vqvae, batches)
    bits = [
        code_bits(prior, modules.prior_inputs(prior, indices, table))
        for prior in trained.priors
    ]
    near = [
        ndimage.uniform_filter(level, (1, 3, 3), mode="constant")
        for level in bits
    ]
    limits = limits or [np.percentile(level, UNLIKELY) for level in near]
    known = [
        np.where(level > limit, -1, grid)
        for level, limit, grid in zip(near, limits, indices, strict=True)
    ]
    images, residual = images[..., 0], 0.0
    for k in range(times):
        restored, _, _ = trained.generate_like(
            table, first=k * len(images), known=known
        )
        residual += np.abs(images - restored) / times
    # Thin edges, which any restoration blurs, go with the least pixels.
    residual = ndimage.minimum_filter(residual, (1, 3, 3))
    residual = ndimage.uniform_filter(residual, (1, 7, 7))
    found = {"images": images, "restored": restored, "residual": residual}
    return found | {"bits": bits, "near": near, "limits": limits}


def anomaly_table(table, found, healthy):
    """Table of files, bits of each level, surprisal, score, percentile."""
    result = table[["path"]].reset_index(drop=True)
    for level, bits in enumerate(found["bits"], start=1):
        result[f"bits_{level}"] = bits.sum(axis=(1, 2))
    for level, near in enumerate(found["near"], start=1):
        result[f"surprisal_{level}"] = near.max(axis=(1, 2))
    scores, usual = (p["residual"].max(axis=(1, 2)) for p in (found, healthy))
    below = np.searchsorted(np.sort(usual), scores, side="right")
    return result.assign(score=scores, percentile=100 * below / len(usual))


def evaluate(trained, options):
    """Evaluate the run on its test images, or on other data."""
    if is_external(trained.run, options):
        evaluation = evaluate_external(trained, options)
    else:  # samples are compared with training images too
        needed = dataset.SPLITS if trained.priors else ("test",)
        splits = dataset.load_run(trained.run, options.data_dir, needed)
        evaluation = evaluate_run(trained, splits, options)
        print(f"report: {trained.output.report_path}")
    print(summary_table(evaluation))


def inspect(trained, options):
    """Print what a run is made of, for people or as JSON."""
    facts = run_facts(trained)
    if options.json:
        print(json.dumps(facts, allow_nan=False, indent=2))
    else:
        facts["scores"] = summary_table(facts["evaluation"])
        print(render("inspect.txt", facts), end="")


def export(trained, options):
    """Write the SavedModel, the whole folder or nothing."""
    dest = Path(options.dest)
    is_free = not dest.exists() or dest.is_dir() and not any(dest.iterdir())
    if not is_free or not dest.name:
        raise utils.RunError(
            f"{dest}: found other files or the current folder, expected a new "
            "or an empty folder"
        )
    facts = run_facts(trained)
    kept = ("versions", "intensity", "latent_grids", "crop", "data")
    about = {key: facts[key] for key in kept if key in facts}
    known = trained.priors[0].labels if trained.priors else ()
    about["labels"] = {name: number for number, name in enumerate(known)}
    signatures = ["encode", "decode", "generate"][: 2 + bool(trained.priors)]
    about["signatures"] = signatures

    def write(folder):
        models = trained.vqvae, trained.priors, trained.texture
        archive = modules.export_archive(*models)
        archive.write_out(folder, verbose=False)
        utils.write_json(folder / "export.json", about)

    utils.write_atomic(dest, write)
    print(f"signatures {', '.join(signatures)}: {dest}")


# === Evaluation ===

SHOWN_SAMPLES = 64  # in samples.png, and of each label
FIT_IMAGES = 512  # training images that principal components are fitted to
UNSEEN_IMAGES = 512  # test images that are searched for copies, at most
FAILURES = 5  # worst reconstructions, and least likely samples, in a figure
METRICS = ("ssim", "ssim_foreground", "ms_ssim", "psnr", "mae")


def evaluate_run(trained, splits, options=None):
    """Evaluate a run on images that no training step saw; draw its figures.

    Args:
        trained: `Trained`.
        splits: dict of `dataset.Slices`; without priors only `test` is needed.
        options: `Evaluate`.

    Returns: what is written to `evaluation.json`.
    """
    options = options or Evaluate()
    output, priors, test = trained.output, trained.priors, splits["test"]
    models = models_hash(trained.run)
    if options.features == "inception" and priors:
        utils.inception_network()  # refused before anything is computed
    evaluation, found = evaluate_vqvae(trained.vqvae, test)
    evaluation["data"] = about_data(trained.run)
    if priors:
        evaluation["prior"] = evaluate_prior(trained, splits, found)
        evaluation |= evaluate_samples(trained, splits, options)
        if priors[0].labels:
            evaluation["labels"] = evaluate_labels(trained, test)
    evaluation["speed"] |= measure_speed(trained)
    evaluation["models"] = models
    refuse_replaced(trained.run, models)
    utils.write_json(output.evaluation_path, evaluation)
    plot_test_figures(output.figures_path, trained, test, found)
    write_report(trained)
    return evaluation


def is_external(run, options):
    """Whether --data-dir is another data set, not the run's own one moved.

    It is the run's own if two files of its split table, the first one and the
    last, one to train and one to test, are somewhere there.
    """
    external = options.data_dir is not None
    if external and run.split_path.exists():
        ends = utils.read_split_table(run).iloc[[0, -1]]
        files, names = dataset.files_below(options.data_dir), "/" + ends["path"]
        named = [path for path in files if path.endswith(tuple(names))]
        external = not {*ends["sha256"]} <= {*map(dataset.file_sha256, named)}
    usual, of_others = vars(Evaluate()), {"skip_bad", "subject_pattern"}
    of_samples = usual.keys() - of_others - {"run", "output", "data_dir"}
    drawn = not external and run.has_priors
    for names, fit, why in (
        (of_others, external, "needs another data set in --data-dir"),
        (of_samples, drawn, "nothing is generated: leave the flag out"),
    ):
        for name in sorted(names):
            if not fit and getattr(options, name) != usual[name]:
                raise utils.FlagError(f"--{name.replace('_', '-')}: {why}")
    return external


def evaluate_external(trained, options):
    """Evaluate the run on another data set, all of it as test images.

    Nothing of the run is replaced. Samples are left out: they are meant to
    look like the data of the run, not like these.
    """
    run, folder = trained.run, options.data_dir
    pattern = options.subject_pattern
    layout = "folder" if pattern else dataset.detect_layout(folder)
    slices = dataset.load_external(
        folder, layout, run, options.skip_bad, pattern
    )
    print(f"all {len(slices)} images are test images; nothing is generated")
    evaluation, found = evaluate_vqvae(trained.vqvae, slices)
    evaluation["data"] = about = {
        "dataset": layout,
        "simulated": slices.simulated,
        "image_size": run.info["image_size"],
        "data_dir": os.path.abspath(folder),
        **count_subjects(slices.table),
    }
    name = name_external(trained.output.path, folder)
    figures = trained.output.figures_path / name
    plot_test_figures(figures, trained, slices, found)
    (figures / "rejected.csv").unlink(missing_ok=True)
    if len(slices.rejected):
        utils.write_csv(figures / "rejected.csv", slices.rejected)
        print(f"files left out: {figures / 'rejected.csv'}")
    if not run.split_path.exists():
        utils.warn(
            "a model without split.csv may have been trained on these images; "
            "then the scores are too good"
        )
    else:
        own = utils.read_split_table(run)
        own = own["sha256"][own["split"] == "train"]
        seen = int(slices.table["sha256"].isin(own).sum())
        about["images_seen_in_training"] = seen
        if seen:
            text = f"{seen} of {len(slices)} images were trained on"
            utils.warn(f"{text}: the scores are too good")
    path = trained.output.path / f"evaluation-{name}.json"
    utils.write_json(path, evaluation)
    print(f"scores: {path}, figures: {figures}")
    return evaluation


def name_external(output, folder):
    """Name of another data set: its folder's, with those above if taken.

    It is taken where the scores in `output` are of another folder of that name.
    """

    def is_taken(name):
        path = output / f"evaluation-{name}.json"
        try:
            about = json.loads(path.read_text("utf-8"))["data"]
            return about["data_dir"] != os.path.abspath(folder)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    parts = Path(folder).resolve().parts
    longer = ("-".join(parts[-k:]) for k in range(1, len(parts) + 1))
    names = [re.sub(r"[^\w.-]", "_", name) for name in longer]
    return next(itertools.filterfalse(is_taken, names), names[-1])


def evaluate_vqvae(vqvae, test):
    """Scores of images that are encoded to indices and decoded from them.

    Returns: parts of `evaluation.json`; dict of lists of `(N, h, w)`:
        `indices`, `cells` with content; `ssim` `(N,)`, `pixels` with content.
    """
    parts, seconds, pixels = collections.defaultdict(list), [], 0
    for batch in dataset.ordered_batches(test):
        started = time.perf_counter()
        indices = [level.numpy() for level in vqvae.encode(batch)]
        seconds.append((time.perf_counter() - started) / len(batch))
        parts["indices"].append(indices)
        parts["cells"].append(vqvae.foreground_cells(batch))
        pixels += int(np.sum(np.asarray(batch) > utils.FOREGROUND))
        decoded = vqvae.decode_indices(indices)
        for name in METRICS:
            parts[name].append([getattr(utils, name)(batch, decoded).numpy()])
    found = {
        name: [np.concatenate(rows) for rows in zip(*batches, strict=True)]
        for name, batches in parts.items()
    }
    size = vqvae.num_embeddings
    scores = {
        "reconstruction": {
            name: utils.bootstrap(utils.mean_of(found[name][0]), test.subjects)
            for name in METRICS
        },
        "codebook": [
            {"level": k, "grid": list(grid.shape[1:]), "num_embeddings": size}
            | utils.codebook_stats(grid, size)
            for k, grid in enumerate(found["indices"], start=1)
        ],
        # The median batch: the first one includes tracing.
        "speed": {"images_per_second_encoded": 1 / np.median(seconds)},
    }
    return scores, found | {"ssim": found["ssim"][0], "pixels": pixels}


def about_data(run):
    """The `data` part of an evaluation."""
    about = {key: run.info[key] for key in ("simulated", "image_size")}
    about["dataset"] = run.settings.data.dataset
    if run.split_path.exists():
        about |= count_subjects(utils.read_split_table(run))
    return about


def count_subjects(table):
    """{split: numbers of subjects and images} of a table of slices."""
    subjects = table.groupby("split")["subject"]
    return subjects.agg(subjects="nunique", images="size").to_dict("index")


def evaluate_prior(trained, splits, found):
    """Bits per code of each split beside what knows less, for each level.

    The training and validation figures are over as many images, chosen at
    random, as the test set has.
    """
    test, vqvae = splits["test"], trained.vqvae
    tables, grids = {"test": test.table}, {"test": found["indices"]}
    for name in "train", "validate":
        if len(splits[name]):
            rows = utils.choose_rows(len(splits[name]), len(test))
            some = splits[name].take(rows)
            tables[name], batches = some.table, dataset.ordered_batches(some)
            grids[name] = modules.encode_dataset(vqvae, batches)
    entries, per_image = [], 0.0
    for level, prior in enumerate(trained.priors):
        bits = {
            name: code_bits(
                prior, modules.prior_inputs(prior, grids[name], table)
            )
            for name, table in tables.items()
        }
        seen, unseen = grids["train"][level], grids["test"][level]
        size = vqvae.num_embeddings
        entries.append(
            {
                "level": level + 1,
                "bits_per_code": {k: float(v.mean()) for k, v in bits.items()},
                "bits_per_foreground_code": mean_of_known(
                    bits["test"][found["cells"][level]]
                ),
                "unigram_bits": utils.unigram_bits(seen, unseen, size),
                "uniform_bits": math.log2(size),
            }
        )
        per_image += float(bits["test"].sum()) / len(test)
    entries[0]["bits_per_image"], per_pixel = per_image, None
    if found["pixels"]:
        per_pixel = per_image * len(test) / found["pixels"]
    entries[0]["bits_per_foreground_pixel"] = per_pixel
    return entries


def code_bits(prior, inputs):
    """Surprisal in bits, -log2 p, of each code: `(N, h, w)` float64."""
    indices, parts = inputs["indices"], []
    step = max(1, 2**16 // indices[0].size)  # images at a time
    for k in range(0, len(indices), step):
        part = tf.nest.map_structure(lambda a, k=k: a[k : k + step], inputs)
        parts.append(prior.log_prob(**part).numpy())
    return np.concatenate(parts, dtype="float64") / -math.log(2)


def mean_of_known(values):
    """Mean of what is not NaN; None of nothing."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


def measure_speed(trained):
    """Speed of each stage and of sampling, memory; draws both figures."""
    run, figures, speed = trained.run, trained.output.figures_path, {}
    if run.history_path.exists():  # not with a shared model
        history = utils.read_history(run)
        utils.plot_history(figures / "history.png", history)
        for stage, rows in history.groupby("stage"):
            # From the end of the first row on, which includes tracing. Where a
            # stage is trained on, seconds begin anew.
            parts = rows.groupby((rows["seconds"].diff() < 0).cumsum())
            last = parts[["images", "seconds"]].last()
            images, seconds = (last - parts[[*last]].first()).sum()
            speed[f"{stage}_minutes"] = last["seconds"].sum() / 60
            if seconds > 0:
                rate = images / seconds
                speed[f"{stage}_images_per_second_trained"] = rate
    if trained.priors:
        count = min(run.settings.run.num_samples, SHOWN_SAMPLES)
        trained.generate(1)  # the first call compiles
        started = time.perf_counter()
        samples, _, _ = trained.generate(count)
        seconds = time.perf_counter() - started
        speed |= {"samples": count, "seconds_for_samples": seconds}
        plot_samples(figures / "samples.png", trained, samples, Generate())
    return speed | {"peak_memory_mb": utils.peak_memory_mb()}


def evaluate_samples(trained, splits, options):
    """Compare generated images with real ones: are they alike, or copies?

    They are generated with the labels and slice positions of test images. As
    many training images, matched to these, give the floor: what real images of
    other people reach in place of the generated ones.

    Returns: dict of the parts `generation` and `memorization`.
    """
    train, test = splits["train"], splits["test"]
    n = options.num_samples or trained.run.settings.run.num_samples
    sets, like = real_sets(trained, train, test, n)
    images, _, log_prob = trained.generate_like(like["test"].table)
    sets["generated"] = images = np.asarray(images)
    bits = -np.asarray(log_prob) / math.log(2)
    plot_least_likely(trained, images, bits)
    memorization, nearest = evaluate_memorization(trained, images, train, test)
    sets["rebuilt"] = rebuild(trained, like["train"])
    if len(trained.priors) > 1:
        batches = dataset.ordered_batches(like["train"])
        lowest, *upper = modules.encode_dataset(trained.vqvae, batches)
        known = [np.full_like(lowest, -1), *upper]
        drawn = trained.generate_like(like["train"].table, known=known)
        sets["upper_real"] = drawn[0]
    real = like["test"].subjects  # whose conditions the generated have
    owners = {"generated": real, "train": like["train"].subjects}
    scores = utils.compare_sets(sets, options.features, owners["train"], real)
    scores["ssim_to_nearest_train"], floor = nearest
    scores["floor"]["ssim_to_nearest_train"] = floor
    scores["c2st"] = {
        f"{name}_vs_test": utils.c2st(sets[name], sets["test"], own, real)
        for name, own in owners.items()
    }
    about = {"n": len(images), "seed": trained.seed}
    about["sampling"] = trained.sampling_values()
    about["texture"] = trained.texture is not None
    return {"generation": about | scores, "memorization": memorization}


def real_sets(trained, train, test, n):
    """Sets of n real images to compare; n is limited by the smaller split.

    Returns: dict of images `(n, H, W)`: `test`, some test images; `train`, like
        these; `fit`, other training images; dict of the `dataset.Slices` of
        `test` and `train`.
    """
    rows, peers = match_images(
        test.table, train.table, trained.priors[0], n, trained.seed
    )
    like = {"test": test.take(rows), "train": train.take(peers)}
    # Training images that are compared with nothing; all where few are left.
    rest = np.setdiff1d(np.arange(len(train)), peers)
    rest = rest if 2 * len(rest) > len(peers) else np.arange(len(train))
    rest = rest[utils.spread(len(rest), FIT_IMAGES)]
    sets = {name: slices.read()[..., 0] for name, slices in like.items()}
    return sets | {"fit": train.read(rest)[..., 0]}, like


def match_images(test, train, prior, count, seed):
    """Choose rows of a test table, and for each a training row like it.

    Like in label and slice position, as far as the prior uses them. Each
    training image is taken once. Returns up to `count` row numbers of both.
    """
    rng = np.random.default_rng(seed)
    count = min(count, len(test), len(train))
    rows = np.sort(rng.permutation(len(test))[:count])
    order = rng.permutation(len(train))  # of equals, the first is taken
    label = train["label"].to_numpy()[order]
    position = train["position"].to_numpy()[order]
    cost, peers = np.zeros(len(train)), []
    for wanted in test.iloc[rows].itertuples():
        unlike = cost.copy()
        if prior.labels:
            unlike += 2 * (label != wanted.label)
        if prior.slice_condition:
            unlike += np.abs(position - wanted.position)
        peers.append(order[np.argmin(unlike)])
        cost[np.argmin(unlike)] = np.inf
    return rows, np.array(peers)


def rebuild(trained, slices):
    """Images (N, H, W), encoded and decoded as generated ones are."""
    batches, vqvae = dataset.ordered_batches(slices), trained.vqvae
    images = modules.rebuild(vqvae, batches, trained.texture, trained.seed)
    return in_8_bits(images)


def evaluate_memorization(trained, images, train, test):
    """Look for copies of training images; draw the pairs most alike.

    Generated images come out of a decoder, which blurs, and blurred images are
    closer to all others: so the unseen ones are encoded and decoded too. Where
    mirrored training images were shown, copies of these are found as well.

    Returns: the part `memorization`; the SSIM to the nearest training image
        (of pixels) of the generated images, and of the unseen ones.
    """
    test = test.take(utils.choose_rows(len(test), UNSEEN_IMAGES))
    both = np.concatenate([images, rebuild(trained, test)])
    bar = utils.progress_bar("looking for copies", "batch")
    batches, axis = dataset.ordered_batches(train), train.mirror_axis
    if trained.run.settings.training.flips:
        turned = batches.map(lambda batch: tf.reverse(batch, [axis]))
        batches = batches.concatenate(turned)
    found, n = utils.nearest_images(both, bar(batches)), len(images)
    audited, copies = utils.audit(found[:n], found[n:], test.subjects)
    numbers = found["nearest_pixels"].to_numpy()
    # Where a mirrored training image is nearest, mirror the other instead.
    mirrored = numbers >= len(train)
    both[mirrored] = np.flip(both[mirrored], axis)
    peers = train.take(numbers % len(train))
    pairs = dataset.ordered_batches((both[..., None], peers))
    ssim = np.concatenate([utils.ssim(*pair).numpy() for pair in pairs])
    scores = [
        utils.bootstrap(utils.mean_of(ssim[:n]), np.arange(n)),
        utils.bootstrap(utils.mean_of(ssim[n:]), test.subjects),
    ]
    near = found[:n][[*utils.SPACES]]
    near = near.assign(copy=copies, mirrored=mirrored[:n])
    plot_nearest(trained, both[:n], peers, near, audited)
    about = {"n": n, "test_images": len(test), "train_images": len(train)}
    return about | audited, scores


def plot_nearest(trained, images, peers, near, audited):
    """Draw the generated images nearest to a training image, copies first."""
    # NaN, of blank images, comes last.
    near = near.sort_values(["copy", "pixels"], ascending=[False, True])[:8]
    order = near.index.to_numpy()
    captions = [
        f"pixels {row.pixels:.2f}\nhog {row.hog:.2f}"
        + "\nmirrored" * row.mirrored
        + "\ncopy" * row.copy
        for row in near.itertuples()
    ]
    limits = {key: audited[key]["first_percentile"] for key in utils.SPACES}
    title = f"The nearest to training of {len(images)} generated images\n"
    if audited["alarm"] is None:
        title += "too few unseen images to tell copies"
    else:
        title += f"1 % of unseen images are nearer than {show_value(limits)}\n"
        title += f"copies {show_value(audited['copies'])}, "
        title += f"alarm {show_value(audited['alarm'])}"
    drawn, real = trained.cut(images[order], peers.read(order)[..., 0])
    rows = utils.Row("generated", drawn), utils.Row("nearest training", real)
    path = trained.output.figures_path / "memorization.png"
    utils.plot_pairs(path, *rows, title, captions, high=0.5)


def evaluate_labels(trained, test):
    """Images of each label; on simulated brains, do labels show?

    Simulated AD has wide ventricles: their mean area in the test images whose
    planes cut them, and in as many generated ones as a run draws, at the
    positions of such test images.
    """
    run, prior, positions = trained.run, trained.priors[0], np.empty(0)
    count = min(run.settings.run.num_samples, SHOWN_SAMPLES)
    if run.info["simulated"] and prior.slice_condition:
        position = test.table["position"].to_numpy()
        real = dataset.ventricle_areas(test.read(), position)
        positions = position[~np.isnan(real)]
    entries = []
    for label in prior.labels:
        own = (test.table["label"] == label).to_numpy()
        entry = {"label": label, "test_images": int(own.sum())}
        if len(positions):
            at = np.resize(positions, count)
            drawn, *_ = trained.generate(count, label=label, slice_position=at)
            entry["images_drawn"] = count
            entry["ventricle_area"] = {
                "real": mean_of_known(real[own]),
                "generated": mean_of_known(dataset.ventricle_areas(drawn, at)),
            }
        entries.append(entry)
    return entries


def plot_least_likely(trained, images, bits):
    """Draw the generated images whose indices take the most bits."""
    least = np.argsort(-bits, kind="stable")[:FAILURES]
    title = f"The least likely of {len(images)} generated images\n"
    title += f"bits of their indices; on average {bits.mean():.0f}"
    captions = [f"{bits[k]:.0f} bits" for k in least]
    path = trained.output.figures_path / "failures_samples.png"
    [shown] = trained.cut(images[least])
    utils.plot_samples(path, shown, title, captions, FAILURES)


def plot_reconstructions(path, trained, images, captions=(), **options):
    """Figure of images and their reconstructions; returns the SSIM."""
    decoded = modules.rebuild(trained.vqvae, dataset.ordered_batches(images))
    values = utils.ssim(images, decoded[..., None]).numpy()
    some = utils.spread(len(images), PICTURED)
    pair = trained.cut(images[some, ..., 0], decoded[some])
    options["captions"] = [captions[k] for k in some if captions]
    utils.plot_reconstructions(path, *pair, values[some], **options)
    return values


def plot_test_figures(folder, trained, test, found):
    """Reconstructions, the worst of them, index maps and codebook usage."""
    rows = utils.choose_rows(len(test), PICTURED)
    worst = np.argsort(found["ssim"], kind="stable")[:FAILURES]
    shown, indices = test.read(rows), found["indices"]
    plot_reconstructions(folder / "reconstructions.png", trained, shown)
    captions = [
        f"subject {row.subject[-12:]}, slice {row.slice}"
        for row in test.table.iloc[worst].itertuples()
    ]
    title = f"The worst reconstructions of {len(test)} test images"
    about = {"title": title, "captions": captions}
    path = folder / "failures.png"
    plot_reconstructions(path, trained, test.read(worst), **about)
    some, size = [grid[rows] for grid in indices], trained.vqvae.num_embeddings
    shown = trained.vqvae.cropped(shown)
    utils.plot_index_maps(folder / "indices.png", shown, some, size)
    counts = [utils.code_counts(grid, size) for grid in indices]
    utils.plot_codebook(folder / "codebook.png", counts)


# === Report ===

SECTIONS = ("data", "reconstruction", "codebook", "prior")
SECTIONS += ("generation", "memorization", "labels", "speed")
LEAST_SSIM = 0.3  # in the foreground, of a VQ-VAE that has learned something
STAGES = ("rebuilt", "upper_real", "all_drawn")  # each adds a source of error
WORDS = {  # up to a Fréchet ratio
    1.3: "about as close to unseen people as other real people are",
    2: "close to real slices; a trained eye may tell them",
    5: "alike, but details give them away",
    math.inf: "told from real slices at a glance",
}


def verdict(evaluation):
    """Fréchet ratio of the samples, what it means, and what limits them.

    The ratio is None if unknown or of too few subjects for an interval. What
    limits the samples is the stage where the ratio rises most. `untrained`
    names the models that have learned next to nothing.
    """
    generation = evaluation.get("generation") or {}
    frechet = generation.get("frechet") or {}
    ratio = frechet.get("ratio") if frechet.get("ratio_ci95") else None
    words = [text for high, text in WORDS.items() if ratio and ratio <= high]
    ratios, limit = generation.get("by_stage") or {}, ""
    ratios = {name: ratios[name] for name in STAGES if ratios.get(name)}
    if "all_drawn" in ratios:
        before = [1, *ratios.values()]
        rise = {k: ratios[k] - b for k, b in zip(ratios, before, strict=False)}
        limit = explain(max(rise, key=rise.get), "bad").partition(": ")[2]
    return {
        "ratio": ratio,
        "words": "".join(words[:1]),
        "limit": limit,
        "untrained": untrained(evaluation),
    }


def untrained(evaluation):
    """Name the models that have learned next to nothing, or return ""."""
    scores, names = evaluation.get("reconstruction") or {}, []
    ssim = scores.get("ssim_foreground", {}).get("mean")
    if ssim is not None and ssim < LEAST_SSIM:
        names.append("the VQ-VAE")
    for prior in evaluation.get("prior") or []:
        # How often each code occurs would tell as much.
        if (prior["bits_per_code"].get("train") or 0) >= prior["unigram_bits"]:
            names.append(f"the prior of level {prior['level']}")
    return ", ".join(names)


def print_summary(run, evaluation, output=None):
    """Print the few lines that matter at the end of a run."""
    facts = {"run": run, "evaluation": evaluation, "output": output or run}
    print(render("summary.txt", facts | verdict(evaluation)), end="")


def summary_table(evaluation):
    """Return `evaluation.json` as aligned text; parts may be missing."""
    return render("scores.txt", {"rows": summary_rows(evaluation)}).rstrip()


def summary_rows(evaluation):
    """Return `evaluation.json` as (section, key, text) of each number."""
    rows = []
    for section in SECTIONS:
        part = evaluation.get(section) or []
        for entry in part if isinstance(part, list) else [part]:
            floor = entry.get("floor") or {}
            for key, value in in_order(entry):
                is_size = key in ("grid", "image_size")
                text = (utils.size_text if is_size else show_value)(value)
                text = f"{text} {explain(key, 'unit')}".rstrip()
                if key in floor:
                    text += f", floor {show_value(floor[key])}"
                if key != "floor":
                    rows.append((section, key, text))
    return rows


def in_order(part):
    """Items of a dict in the order of the table of metrics, others last."""
    rank = {key: number for number, key in enumerate(utils.metrics_table())}
    return sorted(part.items(), key=lambda i: (rank.get(i[0], 999), i[0]))


def explain(key, column="meaning"):
    """Meaning or unit of a number of `evaluation.json`; "" if unknown."""
    for known in ("images_per_second_trained", "minutes"):
        key = known if key.endswith(f"_{known}") else key
    return utils.metrics_table().get(key, {}).get(column, "")


def show_value(value):
    """Return a number, size, interval or group of them as short text."""
    if isinstance(value, dict) and "ci95" in value:
        return show_value(value["mean"]) + show_interval(value["ci95"])
    if isinstance(value, dict):
        return ", ".join(
            f"{key.replace('_', ' ')} {show_value(entry)}"
            + show_interval(value.get(f"{key}_ci95"))
            for key, entry in in_order(value)
            if not key.endswith("_ci95")
        )
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show_value, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


def show_interval(bounds):
    """Return ` [low, high]`; nothing where it is unknown."""
    known = bounds and None not in bounds
    return " [{}, {}]".format(*map(show_value, bounds)) if known else ""


def run_facts(trained):
    """What a run is made of and how well it does, as JSON can hold it.

    What `config.json` says, and of the data, each level's codebook and each
    model; `evaluation` is empty without one.
    """
    run, vqvae = trained.run, trained.vqvae
    evaluation = known_scores(trained, trained.output)
    evaluation = evaluation or known_scores(trained, run)
    grids = enumerate(vqvae.latent_grids, start=1)
    levels = [{"level": k, "grid": list(grid)} for k, grid in grids]
    sizes = ("num_embeddings", "embedding_dim")
    sizes = {name: getattr(vqvae.settings, name) for name in sizes}
    names = ["vqvae", *run.prior_names]
    models = dict(zip(names, [vqvae, *trained.priors], strict=False))
    texture = trained.texture
    if trained.priors and not texture:  # it may be there, but not asked for
        texture = modules.load_texture(run, vqvae)
    if texture:
        models["texture"] = texture
    return {
        **{key: run.info[key] for key in run.info if key != "training"},
        "settings": utils.flat(run.settings),
        "run": str(run.path),
        "complete": "training" not in run.info,
        "data": evaluation.get("data") or about_data(run),
        "codebook": [x | sizes for x in evaluation.get("codebook") or levels],
        "models": {
            f"{name}.keras": model_facts(models[name]) for name in models
        },
        "evaluation": evaluation,
    }


def known_scores(trained, folder):
    """Scores in the folder of a run, or in that of --output; {} without any.

    They do not count if they are of other models.
    """
    if not folder.evaluation_path.exists():
        return {}
    found, own = utils.read_evaluation(folder), models_hash(trained.run)
    return found if found.get("models", own) == own else {}


def model_facts(model):
    """Type, precision, weights and layers of a model, named by attribute."""
    names = {id(value): name for name, value in vars(model).items()}

    def about(part):
        return {"type": type(part).__name__, "weights": part.count_params()}

    layers = [
        {"layer": names.get(id(layer), layer.name)} | about(layer)
        for layer in model.layers
    ]
    precision = model.dtype_policy.name
    return about(model) | {"precision": precision, "layers": layers}


def write_report(trained):
    """Write `MODEL_CARD.md` and `report.html` from what is in the folder.

    The page holds the figures that are there: it needs no other file and no
    network.
    """
    facts, output = run_facts(trained), trained.output
    figures = [*trained.run.figures_path.glob("*.png")]
    drawn = [*output.figures_path.glob("*.png")]
    if output.evaluation_path.exists() and not known_scores(trained, output):
        # Those of an evaluation are of other models.
        drawn = [p for p in drawn if p.stem in ("samples", "reconstructions")]
    facts["figures"] = {
        path.stem: base64.b64encode(path.read_bytes()).decode()
        for path in figures + drawn
    }
    facts["rows"] = summary_rows(facts["evaluation"])
    facts |= {"stages": STAGES} | verdict(facts["evaluation"])
    for template, path in (
        ("model_card.md", output.card_path),
        ("report.html", output.report_path),
    ):
        data = render(template, facts).encode(errors="replace")
        utils.write_atomic(path, lambda p, data=data: p.write_bytes(data))


def render(template, facts):
    """Fill in a Jinja2 template of `resources/templates`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(utils.RESOURCES / "templates"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        lstrip_blocks=True,
        trim_blocks=True,
    )
    environment.filters |= {
        "explain": explain,
        "quote": lambda path: shlex.quote(str(path)),
        "day": lambda time: f"{time[:4]}-{time[4:6]}-{time[6:8]}",
        "show": show_value,
        "size": utils.size_text,
        "typed": utils.typed,
    }
    return environment.get_template(template).render(facts)


if __name__ == "__main__":
    utils.run_main(main)
