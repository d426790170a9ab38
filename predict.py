"""Use a trained run: reconstruct, generate, evaluate, inspect.

    python predict.py [RUN]                    both, with figures and report
    python predict.py reconstruct RUN [--images PATH ...] [--split test]
    python predict.py generate RUN -n 64 [--seed 0] [--temperature 1.0]
    python predict.py generate RUN -n 100000 --format npz --shard 0/4
    python predict.py evaluate RUN [--data-dir DIR]
    python predict.py complete RUN IMAGE ... [--keep top] [-n 4]
    python predict.py anomaly RUN [IMAGE ...] [--lesions 128]
    python predict.py inspect RUN [--json]
    python predict.py export RUN DEST

RUN is a folder that train.py made; without it the newest one is taken.
Evaluating other data leaves those of the run alone: it writes
RUN/evaluation-NAME.json and RUN/figures/NAME, NAME the last part of DIR.

Below, in this order: the verbs and their flags; models and images of a run;
evaluation, which train.py ends with too; the report, and results as text.
"""

import base64
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np

import dataset
import utils

modules = utils.lazy_import("modules")
pd = utils.lazy_import("pandas")
tf = utils.lazy_import("tensorflow")
jinja2 = utils.lazy_import("jinja2")

# Images drawn at a time, of an npz file, and in the grid: the first chunk. A
# multiple of `sample_chunk`; a few MB, and seconds of work that a kill loses.
CHUNK = 64
# What Pillow and NumPy raise over a file that is missing or damaged.
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    SyntaxError,
    zipfile.BadZipFile,
    zlib.error,
)
CALIBRATION = 256  # validation images that anomalies are measured by
UNLIKELY = 95  # percentile of 3x3 indices there that more are drawn anew
SIDES = ("top", "bottom", "left", "right")
SIGNATURES = ("encode", "decode", "generate")
SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "guidance",
    "label",
    "slice_position",
)


@dataclasses.dataclass(frozen=True)
class OfRun:
    """What every verb takes."""

    run: str | None = utils.positional("run folder; the newest", default=None)

    def __post_init__(self):
        utils.check_fields(self)


@dataclasses.dataclass(frozen=True)
class OfSplit(OfRun):
    """What every verb takes that looks at a few images of a split."""

    split: str = utils.flag(
        "test", "split of the run's data", choices=dataset.SPLITS
    )
    count: int = utils.flag(8, "images of the split", 1, 64)


@dataclasses.dataclass(frozen=True)
class Reconstruct(OfSplit):
    """Encode and decode images; a figure and the SSIM of each."""

    images: tuple[str, ...] = utils.flag(
        (), "image files, instead of a split", metavar="PATH"
    )


@dataclasses.dataclass(frozen=True)
class Drawing(OfRun):
    """What every verb that samples takes."""

    seed: int = utils.flag(0, "image k follows from seed and k", 0, 2**31 - 1)
    temperature: float = utils.flag(
        1.0, "below 1: likelier, less varied", above=0, high=10
    )


@dataclasses.dataclass(frozen=True)
class Generate(Drawing):
    """Draw new images as files, and the first 64 of them in a grid.

    What is there already is not drawn again: a request that was killed goes
    on. Shards may run at once, also on several machines that share the run.
    """

    number: int = utils.flag(64, "images", 1, 1_000_000, short="-n")
    top_k: int = utils.flag(0, "draw from the k likeliest codes; 0: all", 0)
    top_p: float = utils.flag(
        1.0, "draw from the likeliest codes of this mass", above=0, high=1
    )
    guidance: float = utils.flag(
        1.0, "above 1: more of what is typical of the label", 0, 100
    )
    label: str | None = utils.flag(
        None, "class label; all of them by turns without it"
    )
    slice_position: float | None = utils.flag(
        None, "0 first slice of a head, 1 last; spread evenly without it", 0, 1
    )
    format: str = utils.flag(
        "png",
        "a PNG an image, or an npz every 64, with their indices",
        choices=("png", "npz"),
    )
    shard: str = utils.flag(
        "0/1",
        "of the images, 64 by 64, every n-th part from part i on: i/n",
        metavar="I/N",
    )

    def __post_init__(self):
        super().__post_init__()
        match = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", self.shard)
        if not match or int(match[1]) >= int(match[2]):
            raise utils.FlagError(
                "--shard: expected I/N with 0 <= I < N, such as 0/4, found "
                f"{self.shard!r}"
            )

    @property
    def chunks(self):
        """Number of the first image of each chunk of the shard."""
        shard, shards = map(int, self.shard.split("/"))
        return range(shard * CHUNK, self.number, shards * CHUNK)


@dataclasses.dataclass(frozen=True)
class Evaluate(OfRun):
    """Measure everything on test subjects; `evaluation.json` and figures.

    Of another data set, with --data-dir, every image is a test image, and the
    results go to `evaluation-NAME.json` and `figures/NAME` in the run folder,
    NAME the last part of DIR. Nothing is then generated.
    """

    data_dir: str | None = utils.flag(
        None, "other data, all of it as test set", metavar="DIR"
    )
    dataset: str = utils.flag(
        "auto", "layout of --data-dir", choices=("auto", *utils.REAL_DATASETS)
    )
    skip_bad: bool = utils.flag(
        False, "leave out unfit files of --data-dir instead of stopping"
    )
    num_samples: int | None = utils.flag(
        None,
        "images generated, up to one a test image; as in training without it",
        1,
        5_000,
    )
    temperature: float | None = utils.flag(
        None,
        "of the images generated; as in training without it",
        above=0,
        high=10,
    )
    features: str = utils.flag(
        "hog",
        "that generated and real images are compared by; inception downloads "
        "ImageNet weights",
        choices=tuple(utils.FEATURES),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.data_dir is None:
            for name, given in (
                ("dataset", self.dataset != "auto"),
                ("skip-bad", self.skip_bad),
            ):
                if given:
                    raise utils.FlagError(
                        f"--{name}: goes with --data-dir only"
                    )
            return
        for name, default in (
            ("num_samples", None),
            ("temperature", None),
            ("features", "hog"),
        ):
            if getattr(self, name) != default:
                raise utils.FlagError(
                    f"--{name.replace('_', '-')}: does not go with --data-dir, "
                    "for which nothing is generated"
                )


@dataclasses.dataclass(frozen=True)
class Complete(Drawing):
    """Draw what may stand where a part of an image is taken away.

    The image is blackened there and encoded. The indices of what is kept stay
    as they are, except beside the cut; the rest is drawn from the prior.

    A prior goes from top to bottom. With --keep top, of a run of one level,
    every completion is a draw from the rest given the kept indices: exact.
    Otherwise most of what is kept comes after what is drawn, and a completion
    is one of --candidates that went on without knowing it, chosen with the
    probability that they give to the kept indices (sampling-importance-
    resampling). That is right for very many candidates only. The effective
    sample size tells how many of them had a say: near 1 it is just the best
    of those drawn, and may not fit what is kept.
    """

    run: str = utils.positional("run folder")
    images: tuple[str, ...] = utils.positional("image files", many=True)
    keep: str = utils.flag("top", "side that is kept", choices=SIDES)
    keep_fraction: float = utils.flag(
        0.5, "share of the height or width that is kept", above=0, below=1
    )
    number: int = utils.flag(4, "completions of an image", 1, 64, short="-n")
    candidates: int = utils.flag(
        16, "draws that a completion is chosen from, unless exact", 1, 1024
    )


@dataclasses.dataclass(frozen=True)
class Anomaly(OfSplit, Drawing):
    """Find what is unlike the training images; a figure and `anomaly.csv`.

    The prior tells the surprisal of every index, -log2 p in bits. Where the
    mean of 3x3 indices exceeds what 95 % of the validation images' do, they
    are drawn anew: a restoration. The residual map is the mean of |image -
    restoration|, smoothed; its maximum, an intensity, is the score, and the
    percentile says how many validation images score no higher. Labels are not
    told, and slice positions only if those of all images are known.
    Marimont & Tarroni, 2021, arXiv:2012.06765.

    With --lesions, `anomaly.json` tells how well this finds simulated lesions
    in test images.
    """

    images: tuple[str, ...] = utils.positional(
        "image files, instead of a split", many=True, default=()
    )
    restorations: int = utils.flag(4, "of an image", 1, 64)
    lesions: int = utils.flag(
        0,
        "measure on so many test images, as they are and with a simulated "
        "lesion each",
        0,
        100_000,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.lesions and self.images:
            raise utils.FlagError("--lesions: does not go with image files")


@dataclasses.dataclass(frozen=True)
class Inspect(OfRun):
    """Show layers, grids, codebook, recipe, data and scores of a run."""

    json: bool = utils.flag(False, "print them as one JSON object")


@dataclasses.dataclass(frozen=True)
class Export(OfRun):
    """Write the models as a SavedModel that needs none of this program.

    Its signatures are encode, decode and, of a run with priors, generate;
    `export.json` beside it says what they take.
    """

    run: str = utils.positional("run folder")
    dest: str = utils.positional("folder to write, new or empty")


@dataclasses.dataclass(frozen=True)
class Show(OfRun):
    """Reconstruct test images, generate new ones, write the report."""


def main(argv):
    """Do what the verb says with the run it names, or the newest."""
    verbs = {
        "show": (Show, show),
        "reconstruct": (Reconstruct, reconstruct),
        "generate": (Generate, generate),
        "evaluate": (Evaluate, evaluate),
        "complete": (Complete, complete),
        "anomaly": (Anomaly, anomaly),
        "inspect": (Inspect, inspect),
        "export": (Export, export),
    }
    name, options = utils.parse_verbs(
        {name: settings for name, (settings, _) in verbs.items()},
        argv,
        description=__doc__,
        default="show",
    )
    run = utils.Run.open(options.run) if options.run else utils.Run.newest()
    _, act = verbs[name]
    act(run, options)


def show(run, options):
    """Reconstruct and generate, then repeat the scores of the training."""
    reconstruct(run, Reconstruct())
    if run.has_priors:
        generate(run, Generate())
    else:
        print("no prior in this run: nothing generated")
    write_report(run, *load_models(run))
    known = run.evaluation_path.exists()
    print_results(run, utils.read_evaluation(run) if known else {})


def reconstruct(run, options):
    """Write `figures/reconstructions.png` of files or of a split."""
    vqvae = utils.load_model(run.vqvae_path)
    if options.images:
        frame = dataset.index_files(options.images)
        name = "reconstructed_images"
    else:
        frame = some_of_split(run, options.split, options.count)
        name = "reconstructions"
    images = read_all(run, frame)
    path = run.figures_path / f"{name}.png"
    values = draw_reconstructions(path, vqvae, images)
    for file, value in zip(frame["path"], values, strict=True):
        print(f"SSIM {value:.4f}  {Path(file).name}")
    print(f"reconstructions in {path}")


def generate(run, options):
    """Write files in `samples/`, and shard 0 the grid `figures/samples.png`.

    Chunk by chunk, so that memory does not grow with the number of images.
    """
    vqvae = utils.load_model(run.vqvae_path)
    priors = utils.load_priors(run, vqvae)
    check_conditions(run, priors, options)
    folder = sample_folder(run)
    remove_leftovers(folder, options)
    drawn = found = 0
    for first in utils.progress_bar("sampling", "chunk")(options.chunks):
        count = min(CHUNK, options.number - first)
        files = sample_files(folder, options, first, count)
        if len(read_images(files)) >= count:
            found += count
        else:
            write_chunk(files, draw(vqvae, priors, options, first, count))
            drawn += count
    print(f"{drawn} images drawn, {found} there already, in {folder}")
    if 0 in options.chunks:
        draw_grid(run, folder, options)


def draw_grid(run, folder, options):
    """Figure of the first chunk, from its files."""
    count = min(CHUNK, options.number)
    images = read_images(sample_files(folder, options, 0, count))[:count]
    path = run.figures_path / "samples.png"
    utils.draw_samples(path, images / 255, options.seed, options.temperature)
    print(f"grid of the first {count} in {path}")


def sample_folder(run):
    """Folder of what the models of a run draw: `samples/` and their hash.

    Files of an earlier prior stay in a folder of their own: they are never
    taken for new ones, and no process clears away what another writes. The
    hash is that of `cat vqvae.keras prior.keras`.
    """
    digest = hashlib.sha256()
    for path in (run.vqvae_path, *run.prior_paths):
        digest.update(path.read_bytes())
    return run.path / "samples" / digest.hexdigest()[:8]


def sample_files(folder, options, first, count):
    """Files of a chunk: one for each image, or one npz for all."""
    step = count if options.format == "npz" else 1
    return [
        folder / f"{sample_name(options)}_{k:06d}.{options.format}"
        for k in range(first, first + count, step)
    ]


def remove_leftovers(folder, options):
    """Remove what killed processes of this shard were about to write.

    Not those of other shards: they may be alive, on another machine.
    """
    pattern = rf"{re.escape(sample_name(options))}_(\d+)\.\w+\.tmp-"
    for path in folder.glob("*.tmp-*"):
        match = re.match(pattern, path.name)
        if match and int(match[1]) // CHUNK * CHUNK in options.chunks:
            utils.remove_temporary_files([path])


def write_chunk(files, chunk):
    """Write what `draw` returns to `sample_files`, each whole or not at all."""
    if files[0].suffix == ".npz":
        write = functools.partial(np.savez_compressed, **chunk)
        utils.write_atomic(files[0], write)
    else:
        for path, pixels in zip(files, chunk["images"], strict=True):
            write = functools.partial(utils.write_png, pixels=pixels)
            utils.write_atomic(path, write)


def read_images(files):
    """Images of `sample_files`, `(N, H, W)`; none if one is not there whole.

    An npz of a smaller request holds fewer than a chunk.
    """
    try:
        if files[0].suffix == ".png":
            return np.stack([utils.read_png(path) for path in files])
        with open(files[0], "rb") as opened, np.load(opened) as chunk:
            return chunk["images"]
    except UNREADABLE:
        return ()


def check_conditions(run, priors, options):
    """Refuse a condition or guidance that the priors know nothing of."""
    labels = priors[0].labels
    if options.label is not None and options.label not in labels:
        known = ", ".join(labels) or "none: no --condition label in training"
        raise utils.FlagError(
            f"--label: expected one of those of {run.path} ({known}), found "
            f"{options.label!r}"
        )
    if options.slice_position is not None and not priors[0].slice_condition:
        raise utils.FlagError(
            f"--slice-position: {run.path} was trained without --condition "
            "slice"
        )
    if options.guidance != 1 and not (labels or priors[0].slice_condition):
        raise utils.FlagError(
            f"--guidance: {run.path} was trained without --condition"
        )


def draw(vqvae, priors, options, first, count):
    """Images `first` to `first + count` of a request, with what they are of.

    Returns: dict of `images` `(count, H, W)` uint8, `number` `(count,)`,
        `indices_1`, ... of each level, bottom first, `(count, h, w)`, and
        `label` and `slice_position` `(count,)` of priors that are told them.
    """
    labels = modules.alternate_labels(priors[0].labels, count, first)
    if options.label is not None:
        labels = [options.label] * count
    positions = modules.slice_positions(count, first)
    if options.slice_position is not None:
        positions[:] = options.slice_position
    images, indices = modules.generate(
        vqvae,
        priors,
        count,
        options.seed,
        first=first,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        guidance=options.guidance,
        label=labels,
        slice_position=positions,
        progress=utils.progress_bar("chunk", "run"),
    )
    chunk = {
        "images": utils.to_pixels(images),
        "number": np.arange(first, first + count),
        **{f"indices_{k}": grid for k, grid in enumerate(indices, start=1)},
    }
    if labels:
        chunk["label"] = np.array(labels)
    if priors[0].slice_condition:
        chunk["slice_position"] = positions
    return chunk


def sample_name(options):
    """Name of a request: its seed, and what differs from the default."""
    parts = [f"seed{options.seed}"]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in SAMPLING and value != field.default:
            if not isinstance(value, str):  # all digits, but 2 for 2.0
                value = str(value).removesuffix(".0")
            parts.append(field.name.replace("_", "-") + value)
    return "_".join(parts)


def evaluate(run, options):
    """Measure the run on its test images, or on other data; draw figures."""
    vqvae, priors = load_models(run)
    if options.data_dir:
        evaluation, figures = evaluate_other(run, vqvae, priors, options)
        print(summary_table(evaluation))
        print(f"figures in {figures}")
        return
    # Samples are compared with the training images too.
    needed = ["train", "test"] if priors else ["test"]
    splits = utils.read_splits(run, needed)
    with dataset.naming_files():
        evaluation = evaluate_run(
            run,
            vqvae,
            priors,
            splits,
            options.features,
            options.num_samples,
            options.temperature,
        )
    print_results(run, evaluation)


def complete(run, options):
    """Write `completions.npz` and `figures/completions.png`."""
    vqvae = utils.load_model(run.vqvae_path)
    priors = utils.load_priors(run, vqvae)
    frame = describe_files(run, options.images)
    images = read_all(run, frame)
    kept, cells = kept_parts(vqvae, options)
    shown = images * kept[..., None]
    known = [
        np.where(cells[level], grid, -1)
        for level, grid in enumerate(modules.encode_dataset(vqvae, [shown]))
    ]
    numbers = utils.progress_bar("completing", "image")(range(len(frame)))
    drawn = [
        complete_image(vqvae, priors, frame, known, k, options) for k in numbers
    ]
    results = {
        name: np.stack([result[name] for result in drawn]) for name in drawn[0]
    }
    results |= {f"known_{k}": grid for k, grid in enumerate(known, start=1)}
    results["path"] = frame["path"].to_numpy(str)
    write = functools.partial(np.savez_compressed, **results)
    utils.write_atomic(run.path / "completions.npz", write)
    report_completions(run, frame, images, shown, results, options)


def report_completions(run, frame, images, shown, results, options):
    """Print what was drawn, and draw its figure."""
    sizes = results.get("effective_sample_size")
    for k, row in enumerate(frame.itertuples()):
        text = "exact" if sizes is None else f"{sizes[k].mean():.1f} effective"
        print(f"{text}  {describe_conditions(row)}  {Path(row.path).name}")
    title = f"{options.keep} {100 * options.keep_fraction:g} % kept, "
    title += f"seed {options.seed}, temperature {options.temperature}\n"
    if sizes is None:
        title += "drawn from what may follow the kept indices: exact"
    else:
        title += f"each chosen from {options.candidates} candidates: "
        title += f"effective sample size {sizes.mean():.1f}"
    path = run.figures_path / "completions.png"
    utils.figure_completions(
        path, images, shown, results["images"] / 255, title
    )
    print(f"completions in {run.path / 'completions.npz'}, figure in {path}")


def complete_image(vqvae, priors, frame, known, row, options):
    """Completions of image `row` of a request, n of them.

    Returns: dict of `images` `(n, H, W)` uint8, `indices_1`, ... of each
        level `(n, h, w)` and, unless exact, `effective_sample_size` `(n,)`.
    """
    exact = options.keep == "top" and vqvae.levels == 1
    count = options.number * (1 if exact else options.candidates)
    rows = frame.iloc[np.full(count, row)]
    known = [grid[np.full(count, row)] for grid in known]
    images, indices = modules.generate(
        vqvae,
        priors,
        count,
        options.seed,
        first=row * count,
        temperature=options.temperature,
        known=known,
        **conditions_of(rows, priors[0]),
    )
    found = {"images": utils.to_pixels(images)}
    found |= {f"indices_{k}": grid for k, grid in enumerate(indices, start=1)}
    if exact:
        return found
    weights = known_log_prob(priors, indices, known, rows)
    chosen, sizes = resample(
        weights.reshape(options.number, -1), [options.seed, row]
    )
    found = {name: values[chosen] for name, values in found.items()}
    return found | {"effective_sample_size": sizes}


def kept_parts(vqvae, options):
    """What is kept: pixels `(H, W)`, and the cells of each level `(h, w)`.

    Cells lie wholly in what is kept, and as far from the cut as a cell of the
    coarsest level is wide: nearer ones have seen much of the black.

    Raises:
        utils.FlagError: if there is no such cell.
    """
    size = vqvae.image_size
    axis = SIDES.index(options.keep) // 2
    length = round(size[axis] * options.keep_fraction)
    margin = size[axis] // vqvae.latent_grids[-1][axis]

    def side(length):
        kept = np.arange(size[axis]) < length
        if options.keep in ("bottom", "right"):
            kept = kept[::-1]
        return np.broadcast_to(kept if axis else kept[:, None], size)

    cells = [
        side(length - margin)
        .reshape(h, size[0] // h, w, size[1] // w)
        .all(axis=(1, 3))
        for h, w in vqvae.latent_grids
    ]
    if not cells[0].any():
        raise utils.FlagError(
            f"--keep-fraction: {options.keep_fraction:g} keeps no index of "
            f"{size[axis]} pixels; expected more than "
            f"{(margin + size[axis] // vqvae.latent_grids[0][axis])} of them"
        )
    return side(length), cells


def known_log_prob(priors, indices, known, frame):
    """Log-probability of known indices given those before them, nats `(N,)`.

    Of grids drawn with the known indices forced, each with the probability of
    the others given those before: so it is the logarithm of the importance
    weight that turns such draws into draws from the prior given all known.
    (A temperature acts on what is drawn, not on these weights.)

    Args:
        priors, indices, frame: see `prior_inputs`; levels bottom first.
        known: list of `(N, h, w)` arrays, -1 where unknown.
    """
    bits = 0.0
    for prior, grid in zip(priors, known, strict=True):
        found = code_bits(prior, utils.prior_inputs(prior, indices, frame))
        bits += found.sum(axis=(1, 2), where=grid >= 0, dtype="float64")
    return -math.log(2) * bits


def resample(log_weights, seed):
    """Choose one draw a row with probability proportional to its weight.

    Args:
        log_weights: (n, c).

    Returns: numbers (n,) of the draws, counted over all rows; effective
        sample sizes (n,) in 1..c: one over the sum of the squared shares.
    """
    shares = np.exp(log_weights - log_weights.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    chosen = [rng.choice(share.size, p=share) for share in shares]
    first = np.arange(len(shares)) * shares.shape[1]
    return first + chosen, 1 / (shares**2).sum(axis=1)


def anomaly(run, options):
    """Write `anomaly.csv`, `figures/anomaly.png`; `anomaly.json` of lesions."""
    vqvae = utils.load_model(run.vqvae_path)
    priors = utils.load_priors(run, vqvae)
    reference = some_of_split(run, "validate", CALIBRATION)
    if options.images:
        frame = describe_files(run, options.images)
    else:
        split = "test" if options.lesions else options.split
        count = options.lesions or options.count
        frame = some_of_split(run, split, count)
    images, masks = read_all(run, frame)[..., 0], None
    if options.lesions:
        frame, images, masks = with_lesions(frame, images, options.seed)
    # A label must not explain a finding away.
    unknown = {"label": ""}
    if frame["position"].isna().any():
        unknown["position"] = np.nan
    healthy = find_anomalies(
        vqvae,
        priors,
        read_all(run, reference)[..., 0],
        reference.assign(**unknown),
        options,
    )
    found = find_anomalies(
        vqvae, priors, images, frame.assign(**unknown), options, healthy
    )
    table = anomaly_table(frame, found, healthy)
    if options.lesions:
        table.insert(1, "simulated_lesion", masks.any(axis=(1, 2)))
        write_lesion_scores(run, frame, found, masks, options, len(reference))
    utils.write_csv(run.path / "anomaly.csv", table)
    draw_anomalies(run, images, found, masks, table, len(reference))


def with_lesions(frame, images, seed):
    """Images as they are, then each with a simulated lesion.

    Returns: index, images and masks `(2 N, H, W)` of the lesions.
    """
    results = [
        dataset.add_lesion(image, [seed, k]) for k, image in enumerate(images)
    ]
    changed, masks = (np.stack(part) for part in zip(*results, strict=True))
    kept = masks.any(axis=(1, 2))  # a blank image has no place for one
    if not kept.any():
        raise utils.DataError("--lesions: no test image shows a head")
    frame, masks = frame[kept], masks[kept]
    return (
        pd.concat([frame, frame], ignore_index=True),
        np.concatenate([images[kept], changed[kept]]),
        np.concatenate([np.zeros_like(masks), masks]),
    )


def find_anomalies(vqvae, priors, images, frame, options, healthy=None):
    """Surprisal, restorations and residual maps of images.

    Args:
        images: `(N, H, W)` in [0, 1]; `frame` is their index.
        healthy: what this returned of validation images, whose `limits` are
            taken; without it the images have their own.

    Returns: dict of `bits`, the surprisal of each level `(N, h, w)`; `near`,
        its means over 3x3 indices; `limits` of these, a number each level;
        `restored` `(N, H, W)`, the first restoration; `residual` `(N, H, W)`.
    """
    batches = np.split(images[..., None], range(32, len(images), 32))
    indices = modules.encode_dataset(vqvae, batches)
    bits = [
        code_bits(prior, utils.prior_inputs(prior, indices, frame))
        for prior in priors
    ]
    near = [utils.mean_of_neighbours(level) for level in bits]
    limits = [np.percentile(level, UNLIKELY) for level in near]
    limits = healthy["limits"] if healthy else limits
    known = [
        np.where(level > limit, -1, grid)
        for level, limit, grid in zip(near, limits, indices, strict=True)
    ]
    results = {"bits": bits, "near": near, "limits": limits}
    return results | restore(vqvae, priors, images, frame, known, options)


def restore(vqvae, priors, images, frame, known, options):
    """Draw the unknown indices of each image; see `find_anomalies`."""
    times = options.restorations
    step = max(1, CHUNK // times)
    restored, residual = [], []
    bar = utils.progress_bar("restoring", "chunk")
    for k in bar(range(0, len(images), step)):
        rows = np.repeat(np.arange(k, min(k + step, len(images))), times)
        drawn, _ = modules.generate(
            vqvae,
            priors,
            len(rows),
            options.seed,
            first=k * times,
            temperature=options.temperature,
            known=[grid[rows] for grid in known],
            **conditions_of(frame.iloc[rows], priors[0]),
        )
        apart = np.abs(images[rows] - drawn)
        apart = apart.reshape(-1, times, *images.shape[1:]).mean(axis=1)
        residual.append(utils.smooth_residual(apart))
        restored.append(drawn[::times])
    return {
        "restored": np.concatenate(restored),
        "residual": np.concatenate(residual),
    }


def anomaly_table(frame, found, healthy):
    """Table of files, bits of each level, surprisal, score, percentile."""
    table = frame[["path"]].reset_index(drop=True)
    for level, bits in enumerate(found["bits"], start=1):
        table[f"bits_{level}"] = bits.sum(axis=(1, 2))
    for level, near in enumerate(found["near"], start=1):
        table[f"surprisal_{level}"] = near.max(axis=(1, 2))
    scores, usual = (
        part["residual"].max(axis=(1, 2)) for part in (found, healthy)
    )
    below = np.searchsorted(np.sort(usual), scores, side="right")
    return table.assign(score=scores, percentile=100 * below / len(usual))


def write_lesion_scores(run, frame, found, masks, options, calibrated):
    """Write `anomaly.json`: how well simulated lesions are found."""
    scores = utils.score_lesions(
        found["residual"], found["near"], masks, frame["subject"]
    )
    scores["lesions"] |= {
        "simulated": True,
        "radius_of_long_side": dataset.LESION_RADIUS,
        "contrast": dataset.LESION_CONTRAST,
    }
    scores |= {
        "seed": options.seed,
        "restorations": options.restorations,
        "validation_images": calibrated,
    }
    utils.write_json(run.path / "anomaly.json", scores)
    for name in ("image_auroc", "pixel_average_precision"):
        low, high = scores[name]["ci95"]
        text = f"{scores[name]['value']:.3f} ({low:.3f} to {high:.3f})"
        print(f"{name.replace('_', ' ')} of simulated lesions: {text}")
    print(f"lesion scores in {run.path / 'anomaly.json'}")


def draw_anomalies(run, images, found, masks, table, calibrated, most=8):
    """Print the score of each image, and draw the figure of some."""
    rows = np.arange(len(table))
    if masks is None:
        for row in table.itertuples():
            name = Path(row.path).name
            print(f"{row.score:.4f}  percentile {row.percentile:5.1f}  {name}")
    else:  # the second half has the lesions
        rows = rows[len(rows) // 2 :]
    rows = rows[utils.spread(len(rows), most)]
    captions = [
        f"score {row.score:.3f}\npercentile {row.percentile:.0f}"
        for row in table.iloc[rows].itertuples()
    ]
    title = f"Percentiles are of {calibrated} validation images"
    if masks is not None:
        title = f"Simulated lesions, outlined. {title}"
    path = run.figures_path / "anomaly.png"
    utils.figure_anomaly(
        path,
        images[rows],
        [level[rows] for level in found["bits"]],
        found["restored"][rows],
        found["residual"][rows],
        captions,
        title,
        None if masks is None else masks[rows],
    )
    print(f"table in {run.path / 'anomaly.csv'}, figure in {path}")


def inspect(run, options):
    """Print what a run is made of, for people or as JSON."""
    facts = run_facts(run, *load_models(run))
    if options.json:
        print(json.dumps(facts, allow_nan=False, indent=2))
    else:
        print(facts_page(facts))


def export(run, options):
    """Write the SavedModel, the whole folder or nothing."""
    dest = Path(options.dest)
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        raise utils.RunError(
            f"{dest}: exists and is not an empty folder; choose another"
        )
    vqvae, priors = load_models(run)
    facts = run_facts(run, vqvae, priors)
    kept = ("versions", "intensity", "labels", "latent_grids", "data")
    about = {key: facts[key] for key in kept if key in facts}
    about["signatures"] = SIGNATURES[: 2 + bool(priors)]

    def write(folder):
        archive = modules.export_archive(vqvae, priors)
        archive.write_out(folder, verbose=False)
        utils.write_json(folder / "export.json", about)

    utils.write_atomic(dest, write)
    print(f"signatures {', '.join(about['signatures'])} in {dest}")


# === Models and images of a run ===


def load_models(run):
    """The VQ-VAE of a run, and its priors, bottom first; [] without any."""
    vqvae = utils.load_model(run.vqvae_path)
    return vqvae, utils.load_priors(run, vqvae) if run.has_priors else []


def image_batches(run, frame, batch_size=32, **options):
    """`dataset.make_dataset` as a run reads images; None for no images."""
    if frame.empty:
        return None
    return dataset.make_dataset(
        frame,
        run.info["image_size"],
        batch_size,
        resize=run.config.resize,
        **options,
    )


def read_all(run, frame):
    """Images `(N, H, W, 1)` of an index."""
    with dataset.naming_files():
        return np.concatenate(
            [np.asarray(batch) for batch in image_batches(run, frame)]
        )


def some_of_split(run, split, count):
    """Index of up to `count` images spread evenly over a split."""
    frame = utils.read_splits(run, [split])[split]
    if frame.empty:
        raise utils.DataError(f"{split}: no images in {run.path}")
    return frame.iloc[utils.spread(len(frame), count)]


def describe_files(run, paths):
    """Index of image files, with what the run knows of those in its data.

    Of others the label is "" and the slice position NaN.
    """
    frame = dataset.index_files(paths)
    own = pd.concat(utils.read_splits(run, needed=()).values())
    own = own.drop_duplicates("sha256").set_index("sha256")
    for name in ("label", "position"):
        found = frame["sha256"].map(own[name])
        frame[name] = found.where(found.notna(), frame[name])
    return frame


def describe_conditions(row):
    """Label and slice position of a row of an index, as text."""
    label = row.label or "unknown"
    position = "unknown" if np.isnan(row.position) else f"{row.position:.2f}"
    return f"label {label}, slice position {position}"


def conditions_of(frame, prior):
    """What a prior is told of the slices of an index; null where unknown."""
    labels = [name if name in prior.labels else None for name in frame["label"]]
    return {
        "label": labels,
        "slice_position": frame["position"].to_numpy("float32"),
    }


# === Evaluation ===

SHOWN_SAMPLES = 64  # in samples.png, and of each label
FIT_IMAGES = 512  # training images that principal components are fitted to
UNSEEN_IMAGES = 512  # test images that copies are compared with, at most
FAILURES = 5  # worst reconstructions, and least likely samples, in a figure
METRICS = {
    "ssim": utils.ssim,
    "ssim_foreground": utils.ssim_foreground,
    "ms_ssim": utils.ms_ssim,
    "psnr": utils.psnr,
    "mae": utils.mae,
}


def evaluate_run(
    run,
    vqvae,
    priors,
    splits,
    features="hog",
    num_samples=None,
    temperature=None,
):
    """Measure a run on images that no training step saw; draw its figures.

    Args:
        priors: bottom first; without any, no samples are looked at.
        splits: dict of the index of each split.
        features: key of `utils.FEATURES`.
        num_samples, temperature: of the samples that are compared; by default
            as the settings of the run say.

    Returns: what is written to `evaluation.json`.
    """
    if features == "inception" and priors:
        utils.inception_network()  # refused before anything is measured
    config, test = run.config, splits["test"]
    about = {"dataset": config.dataset, "simulated": run.info["simulated"]}
    evaluation, *found = measure(run, vqvae, priors, splits, about)
    speed = evaluation["speed"]
    speed |= speed_of_training(run)
    if priors:
        temperature = temperature or config.temperature
        sampling = {"seed": config.seed, "temperature": temperature}
        speed |= draw_new_samples(run, vqvae, priors, sampling)
        evaluation |= evaluate_samples(
            run,
            vqvae,
            priors,
            splits,
            features,
            num_samples or config.num_samples,
            sampling,
        )
        if priors[0].labels:
            evaluation["labels"] = evaluate_labels(
                run, vqvae, priors, test, sampling
            )
    speed["peak_memory_mb"] = utils.peak_memory_mb()
    utils.write_json(run.evaluation_path, evaluation)
    draw_test_figures(run, run.figures_path, vqvae, test, *found)
    utils.figure_history(
        run.figures_path / "history.png", utils.read_history(run)
    )
    write_report(run, vqvae, priors)
    return evaluation


def evaluate_other(run, vqvae, priors, options):
    """Measure the run on another data set, all of it as test images.

    Nothing of the run is replaced: see `Run.external_paths`. Samples are left
    out: they are meant to look like the data of the run, not like these.

    Returns: what is written, and the folder of the figures.
    """
    layout = options.dataset
    if layout == "auto":
        layout = dataset.detect_layout(options.data_dir)
    index = dataset.load_index(
        options.data_dir, layout, options.skip_bad, run.info["image_size"]
    )
    print(f"all {len(index)} images are test images")
    own = utils.read_splits(run, needed=())
    seen = pd.concat([own["train"], own["validate"]])["sha256"]
    seen = int(index["sha256"].isin(seen).sum())
    about = {
        "dataset": layout,
        "simulated": index.attrs["simulated"],
        "data_dir": os.path.abspath(options.data_dir),
        "images_seen_in_training": seen,
    }
    path, figures = run.external_paths(about["data_dir"])
    with dataset.naming_files():
        evaluation, *found = measure(run, vqvae, priors, {"test": index}, about)
        utils.write_json(path, evaluation)
        draw_test_figures(run, figures, vqvae, index, *found)
    if len(rejected := index.attrs["rejected"]):
        utils.write_csv(figures / "rejected.csv", rejected)
        print(f"files left out: {figures / 'rejected.csv'}")
    if seen:
        print(
            f"warning: {seen} of {len(index)} images were trained on: the "
            "scores are too good",
            file=sys.stderr,
        )
    return evaluation, figures


def measure(run, vqvae, priors, splits, about):
    """What both evaluations have in common.

    Args:
        about: what else the `data` part says.

    Returns: the parts of `evaluation.json`; the indices of the test images;
        their SSIM.
    """
    test = splits["test"]
    reconstruction, indices, values, per_second = evaluate_reconstruction(
        vqvae, image_batches(run, test), test["subject"]
    )
    evaluation = {
        "data": {
            **about,
            "image_size": list(vqvae.image_size),
            **count_data(splits),
        },
        "reconstruction": reconstruction,
        "codebook": evaluate_codebook(vqvae, indices),
        "speed": {"images_per_second_encoded": per_second},
    }
    if priors:
        evaluation["prior"] = evaluate_prior(
            run, vqvae, priors, splits, indices
        )
    return evaluation, indices, values


def count_data(splits):
    """Subjects and images of each split."""
    return {
        name: {
            "subjects": int(frame["subject"].nunique()),
            "images": len(frame),
        }
        for name, frame in splits.items()
    }


def evaluate_reconstruction(vqvae, images, subjects):
    """Every metric of `METRICS` over all images, intervals by subject.

    Images are encoded to indices and decoded from them, as users do it.

    Returns: dict for `evaluation.json`; indices, a list of `(N, h, w)` arrays;
        the SSIM `(N,)`; images encoded per second.
    """
    values = {name: [] for name in METRICS}
    found, seconds = [], []
    for batch in images:
        started = time.perf_counter()
        indices = [level.numpy() for level in vqvae.encode(batch)]
        seconds.append((time.perf_counter() - started) / len(batch))
        decoded = vqvae.decode_indices(indices)
        found.append(indices)
        for name, metric in METRICS.items():
            values[name].append(metric(batch, decoded).numpy())
    values = {name: np.concatenate(parts) for name, parts in values.items()}
    scores = {
        name: utils.bootstrap_by_subject(per_image, subjects)
        for name, per_image in values.items()
    }
    scores["ms_ssim"]["scales"] = utils.ms_ssim_scales(*vqvae.image_size)
    indices = [np.concatenate(level) for level in zip(*found, strict=True)]
    # The median batch: the first one includes tracing.
    return scores, indices, values["ssim"], 1 / float(np.median(seconds))


def evaluate_codebook(vqvae, indices):
    """Usage of each codebook over a whole split, bottom first."""
    result = []
    for level, grid in enumerate(indices, start=1):
        stats = utils.codebook_stats(grid, vqvae.num_embeddings)
        result.append(
            {
                "level": level,
                "grid": list(grid.shape[1:]),
                "num_embeddings": vqvae.num_embeddings,
                **{k: v for k, v in stats.items() if k != "counts"},
            }
        )
    return result


def evaluate_prior(run, vqvae, priors, splits, test_indices):
    """Bits per code of each split beside what knows less.

    The training figure is over as many images, spread evenly, as the test
    set has.
    """
    stored = utils.read_indices(run)
    entries, per_image = [], 0.0
    for level, prior in enumerate(priors, start=1):
        bits = {}
        for name, frame in splits.items():
            if frame.empty:
                continue
            if name == "test":
                grids = test_indices
            else:
                grids = [stored[f"{name}_{i + 1}"] for i in range(vqvae.levels)]
            rows = utils.spread(len(frame), len(splits["test"]))
            grids = [grid[rows] for grid in grids]
            inputs = utils.prior_inputs(prior, grids, frame.iloc[rows])
            bits[name] = mean_bits(prior, inputs)
        test = test_indices[level - 1]
        size = vqvae.num_embeddings
        entries.append(
            {
                "level": level,
                "bits_per_code": bits,
                "unigram_bits": utils.unigram_bits(
                    stored[f"train_{level}"], test, size
                ),
                "uniform_bits": math.log2(size),
            }
        )
        per_image += bits["test"] * test[0].size
    entries[0]["bits_per_image"] = per_image
    return entries


def code_bits(prior, inputs, codes=2**16):
    """Surprisal in bits, -log2 p, of each code: `(N, h, w)` float32.

    Args:
        inputs: dict of arrays, as of `prior_inputs`.
        codes: how many are taken at a time.
    """
    indices, parts = inputs["indices"], []
    step = max(1, codes // indices[0].size)
    for k in range(0, len(indices), step):
        part = tf.nest.map_structure(lambda a, k=k: a[k : k + step], inputs)
        parts.append(prior.log_prob(**part).numpy())
    return np.concatenate(parts) / -math.log(2)


def mean_bits(prior, inputs):
    """Mean bits per code of a prior over a dict of arrays."""
    return float(code_bits(prior, inputs).mean(dtype="float64"))


def speed_of_training(run):
    """Images per second of each stage, from `history.csv`."""
    rates = {}
    for stage, rows in utils.read_history(run).groupby("stage"):
        # From the end of the first epoch on, which includes tracing.
        first, last = rows.iloc[0], rows.iloc[-1]
        if last["seconds"] > first["seconds"]:
            rates[f"{stage}_images_per_second_trained"] = float(
                (last["images"] - first["images"])
                / (last["seconds"] - first["seconds"])
            )
        rates[f"{stage}_minutes"] = float(last["seconds"]) / 60
    return rates


def draw_new_samples(run, vqvae, priors, sampling):
    """Draw the sample grid of a run; how long the samples took."""
    modules.generate(vqvae, priors, 1, **sampling)  # compiles
    started = time.perf_counter()
    count = min(run.config.num_samples, SHOWN_SAMPLES)
    samples, _ = modules.generate(vqvae, priors, count, **sampling)
    seconds = time.perf_counter() - started
    utils.draw_samples(run.figures_path / "samples.png", samples, **sampling)
    return {"samples": count, "seconds_for_samples": seconds}


def evaluate_samples(
    run, vqvae, priors, splits, features, num_samples, sampling
):
    """Compare new images with real ones: are they alike, are they copies?

    They are asked for with the labels and slice positions of test images. As
    many training images, as alike to these as there are, give the floor: what
    real images of other people reach in place of the new ones.

    Args:
        features: key of `utils.FEATURES`.
        num_samples: images generated; no more than there are to compare with.
        sampling: dict of their `seed` and `temperature`.

    Returns: dict of the parts `generation` and `memorization`.
    """
    train, test = splits["train"], splits["test"]
    rows, peers = match_images(
        test, train, priors[0], num_samples, sampling["seed"]
    )
    images, bits = draw_like(test.iloc[rows], vqvae, priors, sampling)
    utils.figure_least_likely(
        run.figures_path / "failures_samples.png", images, bits, FAILURES
    )
    audited, ssim_to_train = evaluate_memorization(
        run, images, vqvae, train, test
    )
    others = train.iloc[_rows_to_fit(len(train), peers)]
    sets = {
        "generated": images,
        "test": read_all(run, test.iloc[rows])[..., 0],
        "train": read_all(run, train.iloc[peers])[..., 0],
        "rebuilt": rebuild_all(run, vqvae, train.iloc[peers]),
        "fit": read_all(run, others)[..., 0],
    }
    name = utils.describe_features(features, vqvae.image_size)
    scores = utils.compare_sets(
        sets,
        utils.FEATURES[features],
        name,
        train["subject"].iloc[peers],
        test["subject"].iloc[rows],
    )
    new, floor = ssim_to_train
    scores["floor"]["ssim_to_nearest_train"] = floor
    about = {"n": len(rows), **sampling, "ssim_to_nearest_train": new}
    generation = {**about, **scores}
    return {"generation": generation, "memorization": audited}


def match_images(test, train, prior, count, seed):
    """Choose test images, and for each a training image of like condition.

    Like are the label and the slice position, as far as the prior knows them;
    each training image is taken once.

    Returns: row numbers of both, (n,), n <= count.
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
        best = int(np.argmin(unlike))
        cost[best] = np.inf
        peers.append(order[best])
    return rows, np.array(peers)


def draw_like(frame, vqvae, priors, sampling):
    """New images (N, H, W) with the labels and positions of an index.

    Returns: images; bits (N,) that the indices of each take under the priors.
    """
    known = priors[0].labels and frame["label"].isin(priors[0].labels).all()
    images, _, log_prob = modules.generate(
        vqvae,
        priors,
        len(frame),
        **sampling,
        label=list(frame["label"]) if known else None,
        slice_position=frame["position"].to_numpy("float32"),
        return_log_prob=True,
        progress=utils.progress_bar("sampling", "chunk"),
    )
    return np.asarray(images), -np.asarray(log_prob) / math.log(2)


def rebuild_all(run, vqvae, frame):
    """Images (N, H, W) of an index, encoded and decoded."""
    batches = map(vqvae.reconstruct, image_batches(run, frame))
    return np.concatenate([np.asarray(batch)[..., 0] for batch in batches])


def _rows_to_fit(total, taken):
    """Row numbers of training images that are compared with nothing.

    All of them where few are left.
    """
    rest = np.setdiff1d(np.arange(total), taken)
    rest = rest if 2 * len(rest) > len(taken) else np.arange(total)
    return rest[utils.spread(len(rest), FIT_IMAGES)]


def evaluate_memorization(run, images, vqvae, train, test):
    """Look for copies of training images; draw the pairs most alike.

    New images come out of a decoder, which blurs, and blurred images are
    closer to all others: so the unseen ones are encoded and decoded too.

    Returns: the part `memorization`; the SSIM to the nearest training image
        (of pixels) of the new images, and of the unseen ones.
    """
    shown = np.random.default_rng(0).permutation(len(test))[:UNSEEN_IMAGES]
    test = test.iloc[np.sort(shown)]
    unseen = rebuild_all(run, vqvae, test)
    bar = utils.progress_bar("looking for copies", "batch")
    found = utils.nearest_images(
        np.concatenate([images, unseen]),
        bar(image_batches(run, train)),
        utils.SPACES,
    )
    n = len(images)
    new = {key: (row[:n], apart[:n]) for key, (row, apart) in found.items()}
    old = {key: (row[n:], apart[n:]) for key, (row, apart) in found.items()}
    audited, copies = utils.audit(new, old, test["subject"])

    result = []
    for some, pairs, owners in (
        (images, new, np.arange(n)),
        (unseen, old, test["subject"]),
    ):
        first, values = 0, []
        for batch in image_batches(run, train.iloc[pairs["pixels"][0]]):
            own = some[first : first + len(batch)]
            values.append(utils.ssim(own[..., None], batch))
            first += len(batch)
        result.append(
            utils.bootstrap_by_subject(np.concatenate(values), owners)
        )
    draw_nearest(run, images, new, train, audited, copies)
    about = {
        "n": n,
        "test_images": len(test),
        "train_images": len(train),
    }
    return {**about, **audited}, result


def draw_nearest(run, images, found, train, audited, copies, count=8):
    """Draw the new images nearest to a training image, copies first."""
    distance = {key: apart for key, (_, apart) in found.items()}
    order = np.argsort(distance["pixels"])  # NaN, of blank images, last
    if copies is not None:
        order = order[np.argsort(~copies[order], kind="stable")]
    order = order[:count]
    nearest = read_all(run, train.iloc[found["pixels"][0][order]])[..., 0]
    captions = [
        "\n".join(f"{key} {distance[key][k]:.2f}" for key in utils.SPACES)
        + ("\ncopy" if copies is not None and copies[k] else "")
        for k in order
    ]
    title = f"Of {len(images)} generated images those nearest to training"
    if copies is None:
        title += "\ntoo few unseen images to tell copies"
    else:
        limits = [audited[key]["first_percentile"] for key in utils.SPACES]
        title += "\n1 % of unseen images are nearer than " + ", ".join(
            f"{key} {limit:.2f}"
            for key, limit in zip(utils.SPACES, limits, strict=True)
        )
        title += f"\n{audited['copies']} copies: "
        title += "ALARM" if audited["alarm"] else "no alarm"
    path = run.figures_path / "memorization.png"
    utils.figure_memorization(path, images[order], nearest, captions, title)


def evaluate_labels(run, vqvae, priors, frame, sampling):
    """Images drawn of each label; on simulated brains, do they differ?

    Simulated AD has wide ventricles: their mean area in the test images whose
    planes cut them, and in as many generated ones as a run draws, at the
    heights of such test images.
    """
    positions = np.empty(0)
    count = min(run.config.num_samples, SHOWN_SAMPLES)
    if run.info["simulated"] and priors[0].slice_condition:
        images = read_all(run, frame)
        real = dataset.ventricle_areas(images, frame["position"])
        positions = frame["position"].to_numpy()[~np.isnan(real)]
    entries = []
    for label in priors[0].labels:
        own = (frame["label"] == label).to_numpy()
        entry = {"label": label, "test_images": int(own.sum())}
        if len(positions):
            asked = np.resize(positions, count)
            drawn, _ = modules.generate(
                vqvae,
                priors,
                count,
                **sampling,
                label=label,
                slice_position=asked,
            )
            entry["images_drawn"] = count
            entry["ventricle_area"] = {
                "real": _mean(real[own]),
                "generated": _mean(dataset.ventricle_areas(drawn, asked)),
            }
        entries.append(entry)
    return entries


def _mean(values):
    """Mean of what is not NaN; None of nothing."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


def draw_reconstructions(path, vqvae, images, **options):
    """Figure of images and what decoding makes of them; returns the SSIM."""
    decoded = vqvae.reconstruct(images)
    values = utils.ssim(images, decoded).numpy()
    utils.figure_reconstructions(
        path, images, decoded.numpy(), values, **options
    )
    return values


def draw_test_figures(run, folder, vqvae, frame, indices, values, count=8):
    """Reconstructions, the worst of them, index maps and codebook usage.

    Args:
        indices, values: indices and SSIM of each image, as of `measure`.
    """
    rows = utils.spread(len(frame), count)
    worst = np.argsort(values, kind="stable")[:FAILURES]
    needed = np.union1d(rows, worst)  # read once
    picked = read_all(run, frame.iloc[needed])
    shown, failed = (picked[np.searchsorted(needed, k)] for k in (rows, worst))
    draw_reconstructions(folder / "reconstructions.png", vqvae, shown)
    draw_reconstructions(
        folder / "failures.png",
        vqvae,
        failed,
        title=f"Of {len(frame)} test images the worst reconstructions",
        captions=[
            f"subject {row.subject[-12:]}, slice {row.slice}"
            for row in frame.iloc[worst].itertuples()
        ],
    )
    size = vqvae.num_embeddings
    utils.figure_index_maps(
        folder / "indices.png", shown, [grid[rows] for grid in indices], size
    )
    counts = [utils.codebook_stats(grid, size)["counts"] for grid in indices]
    utils.figure_codebook(folder / "codebook.png", counts)


# === Report ===

TEMPLATES = Path(__file__).parent / "resources" / "templates"
SECTIONS = (
    "data",
    "reconstruction",
    "codebook",
    "prior",
    "generation",
    "memorization",
    "labels",
    "speed",
)
OF_SAMPLES = ("generation", "memorization")  # null there: too few images
UNITS = {
    "psnr": "dB",
    "bits_per_code": "bits",
    "bits_per_image": "bits",
    "unigram_bits": "bits",
    "uniform_bits": "bits",
    "entropy_bits": "bits",
    "peak_memory_mb": "MB",
    "ventricle_area": "pixels",
}
# What each number of `evaluation.json` means, in the order they are shown.
MEANINGS = {
    "label": "class label",
    "dataset": "which data set; phantom is the simulator",
    "simulated": (
        "whether the images are simulated: read this before anything else"
    ),
    "image_size": "height x width in pixels",
    "train": "what the models learned from",
    "validate": (
        "what the training was watched on, and the best epoch chosen by"
    ),
    "test": (
        "what all scores are measured on; no training step saw these subjects"
    ),
    "data_dir": "folder of the data",
    "images_seen_in_training": (
        "images that were trained on too: above 0 the scores are too good"
    ),
    "ssim": (
        "structural similarity of decoded and original image, at most 1; "
        "black background flatters it"
    ),
    "ssim_foreground": "the same inside the head: the honest one",
    "ms_ssim": "SSIM over several resolutions; compare equal scales only",
    "psnr": (
        "peak signal-to-noise ratio; higher is better, 3 dB is half the "
        "squared error"
    ),
    "mae": (
        "mean absolute error of intensities in 0 to 1; 0.004 is one grey level"
    ),
    "level": "1 is the fine grid at the bottom",
    "grid": "rows x columns of indices",
    "num_embeddings": "code vectors to choose from, K",
    "usage": (
        "share of code vectors in use; near 1 is good, far below: collapsed "
        "or too many"
    ),
    "perplexity": (
        "equally used code vectors that would be as varied; a few: collapsed"
    ),
    "entropy_bits": "what one index can tell at most",
    "bits_per_code": (
        "bits to name an index, given those before it; lower is better, "
        "test well above train: over-fitted"
    ),
    "unigram_bits": (
        "the same if only the frequency of each index is known; the prior "
        "has to be below it"
    ),
    "uniform_bits": "the same if nothing is known: log2 K",
    "bits_per_image": "size of a slice as losslessly coded indices",
    "n": "generated images that were compared",
    "seed": "of the generated images",
    "temperature": "of the generated images; below 1: likelier, less varied",
    "features": "the space in which images are compared",
    "frechet": (
        "distance of generated from test images; a ratio of 1: as near as "
        "real people of another set are, at 5 a glance tells"
    ),
    "kid": "kernel distance from test images; 0 or below: no difference found",
    "precision": (
        "share of generated images that are near a real one; like the floor "
        "is good, far below: slices that look like no one's"
    ),
    "density": (
        "how many generated ones are near a real one; like the floor is good"
    ),
    "recall": (
        "share of real images within the reach of generated ones; far below "
        "the floor: kinds of slices are missing"
    ),
    "coverage": (
        "share of real images that have a generated one near; far below the "
        "floor: kinds of slices are missing"
    ),
    "ssim_to_nearest_train": (
        "SSIM of a generated image with the nearest training image; far "
        "above the floor: copies"
    ),
    "test_images": "unseen images beside them",
    "train_images": "training images that were searched for copies",
    "pixels": (
        "distances in pixels: a ratio of medians of 1 is as far as "
        "strangers, 0.5 copies; about 0.01 of the images should be closer"
    ),
    "hog": "the same for shapes (histograms of oriented gradients)",
    "copies": (
        "generated images that are nearer to a training image than unseen "
        "ones are; 0 is good"
    ),
    "alarm": "yes: too many copies, share nothing",
    "images_drawn": "images generated of it",
    "ventricle_area": (
        "on simulated brains: AD has to be above NC, generated as far as real"
    ),
    "samples": "images drawn for the time below",
    "seconds_for_samples": "time to draw them",
    "peak_memory_mb": "memory at most",
    "images_per_second_encoded": (
        "on this machine, with whatever else it was doing"
    ),
}


def summary_table(evaluation):
    """Return `evaluation.json` as aligned text; parts may be missing."""
    rows, last = [], ""
    for section, key, text in summary_rows(evaluation):
        heading = "" if section == last else section
        rows.append((heading, key.replace("_", " "), text))
        last = section
    return utils.align(rows) if rows else "nothing evaluated yet"


def summary_rows(evaluation):
    """Return `evaluation.json` as (section, key, text) of each number."""
    rows = []
    for section in SECTIONS:
        part = evaluation.get(section)
        for entry in part if isinstance(part, list) else [part]:
            floor = (entry or {}).get("floor") or {}
            for key, value in _in_order(entry or {}):
                if key in ("counts", "floor"):
                    continue
                if value is None and section not in OF_SAMPLES:
                    continue
                text = f"{_show(value)} {UNITS.get(key, '')}".rstrip()
                if value is None:
                    text = "n too small"
                elif key in floor:
                    text += f", floor {_show(floor[key])}"
                rows.append((section, key, text))
    return rows


def _in_order(part):
    """Items of a dict in the order of `MEANINGS`; files have another."""
    rank = {key: number for number, key in enumerate(MEANINGS)}
    return sorted(part.items(), key=lambda item: rank.get(item[0], len(rank)))


def meaning(key):
    """What a number of `evaluation.json` means, in a line."""
    if key.endswith("_images_per_second_trained"):
        return "on this machine, after the first epoch"
    if key.endswith("_minutes"):
        return "time of the training"
    return MEANINGS.get(key, "")


def _show(value):
    """Return a number, size, interval or group of them as short text."""
    if isinstance(value, dict) and "ci95" in value:
        return _show(value["mean"]) + _show_interval(value["ci95"])
    if isinstance(value, dict):
        return ", ".join(
            f"{key.replace('_', ' ')} {_show(entry)}"
            + _show_interval(value.get(f"{key}_ci95"))
            for key, entry in _in_order(value)
            if not key.endswith("_ci95")
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return utils.size_text(map(_show, value))
    return "-" if value is None else str(value)


def _show_interval(bounds):
    return " [{}, {}]".format(*map(_show, bounds)) if bounds else ""


def run_facts(run, vqvae, priors):
    """What a run is made of and how well it does, as JSON can hold it.

    Args:
        priors: its priors, bottom first; none if it has none.

    Returns: dict of what `config.json` holds, and of `run`, its folder;
        `complete`, whether its training is; `data`, as in `evaluation.json`;
        `codebook`, one entry a level, bottom first; `models`, what
        `model_facts` says of each file; `evaluation`, empty without one.
    """
    evaluation = (
        utils.read_evaluation(run) if run.evaluation_path.exists() else {}
    )
    splits = utils.read_splits(run, needed=())
    files = [run.vqvae_path, *run.prior_paths][: 1 + len(priors)]
    models = zip(files, [vqvae, *priors], strict=True)
    return {
        **{key: run.info[key] for key in run.info if key != "training"},
        "settings": dataclasses.asdict(run.config),
        "run": str(run.path),
        "complete": "training" not in run.info,
        "data": {
            "dataset": run.config.dataset,
            "simulated": run.info["simulated"],
            "image_size": list(vqvae.image_size),
            **count_data(splits),
        },
        "codebook": codebook_facts(run, vqvae, evaluation),
        "models": {path.name: model_facts(model) for path, model in models},
        "evaluation": evaluation,
    }


def codebook_facts(run, vqvae, evaluation):
    """Grid and size of each level and, where encoded, its use in the test."""
    levels = evaluation.get("codebook")
    if not levels and run.indices_path.exists():
        stored = utils.read_indices(run)
        names = [f"test_{level}" for level in range(1, vqvae.levels + 1)]
        levels = evaluate_codebook(vqvae, [stored[name] for name in names])
    if not levels:
        levels = [
            {"level": level, "grid": list(grid)}
            for level, grid in enumerate(vqvae.latent_grids, start=1)
        ]
    sizes = {
        "num_embeddings": vqvae.num_embeddings,
        "embedding_dim": vqvae.embedding_dim,
    }
    return [entry | sizes for entry in levels]


def model_facts(model):
    """Type, precision, weights and layers of a model.

    Layers are named by attribute, with the shape of what they take.
    """
    names = {}
    for name, value in vars(model).items():
        if isinstance(value, list) and not name.startswith("_"):
            names |= {id(v): f"{name}[{k}]" for k, v in enumerate(value)}
        names.setdefault(id(value), name)
    layers = []
    for layer in model.layers:
        shapes = layer.get_build_config() or {}
        shapes = shapes.get("shapes_dict", shapes)
        layers.append(
            {
                "layer": names.get(id(layer), layer.name),
                "type": type(layer).__name__,
                "input": list(next(iter(shapes.values()), ()))[1:],
                "weights": layer.count_params(),
            }
        )
    return {
        "type": type(model).__name__,
        "precision": model.dtype_policy.name,
        "weights": model.count_params(),
        "layers": layers,
    }


def facts_page(facts):
    """What `run_facts` returns, as text."""
    parts = [utils.align(_head_rows(facts))]
    for file, model in facts["models"].items():
        rows = [("  layer", "type", "takes", "weights")] + [
            (
                f"  {entry['layer']}",
                entry["type"],
                utils.size_text(entry["input"]),
                f"{entry['weights']:,}",
            )
            for entry in model["layers"]
        ]
        parts.append(
            f"{file}: {model['type']}, {model['weights']:,} weights, "
            f"{model['precision']}\n{utils.align(rows)}"
        )
    rows = [(f"  {k}", utils.typed(v)) for k, v in facts["settings"].items()]
    parts.append(f"settings\n{utils.align(rows)}")
    if facts["evaluation"]:
        parts.append(f"scores\n{summary_table(facts['evaluation'])}")
    return "\n\n".join(parts)


def _head_rows(facts):
    """What comes first on the page: (name, text)."""
    data = facts["data"]
    rows = [
        ("run", facts["run"]),
        ("recipe", facts["settings"]["recipe"]),
        ("command", facts["command"]),
        ("prior", facts.get("prior_command")),
    ]
    if not facts["complete"]:
        again = f"python train.py --resume {facts['run']}"
        rows.append(("training", f"not complete: {again}"))
    kind = "simulated" if data["simulated"] else "real"
    rows.append(("data", f"{data['dataset']}, {kind}"))
    rows += [
        ("", f"{name}: {part['images']} images, {part['subjects']} subjects")
        for name, part in data.items()
        if isinstance(part, dict)
    ]
    rows.append(("image size", utils.size_text(data["image_size"])))
    for entry in facts["codebook"]:
        text = f"grid {utils.size_text(entry['grid'])}"
        text += f", K={entry['num_embeddings']}, D={entry['embedding_dim']}"
        if "usage" in entry:
            text += f", {entry['usage']:.0%} used, perplexity "
            text += f"{entry['perplexity']:.1f}"
        rows.append((f"level {entry['level']}", text))
    return [(name, text) for name, text in rows if text]


def write_report(run, vqvae, priors):
    """Write `MODEL_CARD.md` and `report.html` from what is in the folder.

    The page shows the figures that are there, inside itself: it needs no other
    file and no network.
    """
    facts = run_facts(run, vqvae, priors)
    facts["rows"] = summary_rows(facts["evaluation"])
    facts["figures"] = {
        path.stem: data_uri(path)
        for path in sorted(run.figures_path.glob("*.png"))
    }
    for template, path in (
        ("model_card.md", run.card_path),
        ("report.html", run.report_path),
    ):
        text = render(template, facts).encode(errors="replace")
        utils.write_atomic(path, lambda p, text=text: p.write_bytes(text))


def print_results(run, evaluation):
    """Print the scores of a run, and where to look at what."""
    print(summary_table(evaluation))
    print(f"figures in {run.figures_path}")
    print(f"model card {run.card_path}")
    print(f"report, to be opened in a browser: {run.report_path}")


def data_uri(path):
    """A PNG file as the text that stands for it inside a page."""
    return "data:image/png;base64," + base64.b64encode(
        path.read_bytes()
    ).decode("ascii")


def render(template, facts):
    """Fill in a Jinja2 template of `resources/templates`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        lstrip_blocks=True,
        trim_blocks=True,
    )
    environment.filters |= {
        "meaning": meaning,
        "show": _show,
        "size": utils.size_text,
        "typed": utils.typed,
    }
    return environment.get_template(template).render(facts)


if __name__ == "__main__":
    utils.run_main(main)
