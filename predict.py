"""Use a trained run: reconstruct, generate, evaluate, inspect.

    python predict.py                          newest run: both, with figures
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
"""

import dataclasses
import functools
import hashlib
import json
import re
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np

import dataset
import utils

modules = utils.lazy_import("modules")
pd = utils.lazy_import("pandas")

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
    num_samples: int | None = utils.flag(
        None,
        "images generated, up to one a test image; as in training without it",
        1,
        5_000,
    )
    features: str = utils.flag(
        "hog",
        "that generated and real images are compared by; inception downloads "
        "ImageNet weights",
        choices=tuple(utils.FEATURES),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.dataset != "auto" and self.data_dir is None:
            raise utils.FlagError("--dataset: goes with --data-dir only")
        if self.data_dir is None:
            return
        for name, default in (("num_samples", None), ("features", "hog")):
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
    utils.write_report(run, *load_models(run))
    known = run.evaluation_path.exists()
    utils.print_results(run, utils.read_evaluation(run) if known else {})


def load_models(run):
    """The VQ-VAE of a run, and its priors, bottom first; [] without any."""
    vqvae = utils.load_model(run.vqvae_path)
    return vqvae, utils.load_priors(run, vqvae) if run.has_priors else []


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
    values = utils.draw_reconstructions(path, vqvae, images)
    for file, value in zip(frame["path"], values, strict=True):
        print(f"SSIM {value:.4f}  {Path(file).name}")
    print(f"reconstructions in {path}")


def some_of_split(run, split, count):
    """Index of up to `count` images spread evenly over a split."""
    frame = utils.read_splits(run, [split])[split]
    if frame.empty:
        raise utils.DataError(f"{split}: no images in {run.path}")
    return frame.iloc[utils.spread(len(frame), count)]


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
    """Refuse a label or guidance that the priors know nothing of."""
    labels = priors[0].labels
    if options.label is not None and options.label not in labels:
        known = ", ".join(labels) or "none: no --condition label in training"
        raise utils.FlagError(
            f"--label: expected one of those of {run.path} ({known}), found "
            f"{options.label!r}"
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
    else:
        # Samples are compared with the training images too.
        needed = ["train", "test"] if priors else ["test"]
        splits = utils.read_splits(run, needed)
        with dataset.naming_files():
            evaluation = utils.evaluate(
                run,
                vqvae,
                priors,
                splits,
                functools.partial(image_batches, run),
                modules.generate,
                dataset.ventricle_areas,
                options.features,
                options.num_samples,
            )
    if options.data_dir:
        print(utils.summary_table(evaluation))
        print(f"figures in {figures}")
    else:
        utils.print_results(run, evaluation)


def evaluate_other(run, vqvae, priors, options):
    """Measure the run on all images of another data set."""
    layout = options.dataset
    if layout == "auto":
        layout = dataset.detect_layout(options.data_dir)
    index = dataset.load_index(
        options.data_dir, layout, image_size=run.info["image_size"]
    )
    print(f"all {len(index)} images are test images")
    with dataset.naming_files():
        evaluation, figures = utils.evaluate_external(
            run,
            vqvae,
            priors,
            index,
            image_batches(run, index),
            dataset=layout,
            simulated=index.attrs["simulated"],
            data_dir=str(Path(options.data_dir).absolute()),
        )
    if seen := evaluation["data"]["images_seen_in_training"]:
        print(
            f"warning: {seen} of {len(index)} images were trained on: the "
            "scores are too good",
            file=sys.stderr,
        )
    return evaluation, figures


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
    weights = utils.known_log_prob(priors, indices, known, rows)
    chosen, sizes = utils.resample(
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
        utils.code_bits(prior, utils.prior_inputs(prior, indices, frame))
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


def read_all(run, frame):
    """Images `(N, H, W, 1)` of an index."""
    with dataset.naming_files():
        return np.concatenate(
            [batch.numpy() for batch in image_batches(run, frame)]
        )


def inspect(run, options):
    """Print what a run is made of, for people or as JSON."""
    facts = utils.run_facts(run, *load_models(run))
    if options.json:
        print(json.dumps(facts, allow_nan=False, indent=2))
    else:
        print(utils.facts_page(facts))


def export(run, options):
    """Write the SavedModel, the whole folder or nothing."""
    dest = Path(options.dest)
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        raise utils.RunError(
            f"{dest}: exists and is not an empty folder; choose another"
        )
    vqvae, priors = load_models(run)
    facts = utils.run_facts(run, vqvae, priors)
    kept = ("versions", "intensity", "labels", "latent_grids", "data")
    about = {key: facts[key] for key in kept if key in facts}
    about["signatures"] = SIGNATURES[: 2 + bool(priors)]

    def write(folder):
        archive = modules.export_archive(vqvae, priors)
        archive.write_out(folder, verbose=False)
        utils.write_json(folder / "export.json", about)

    utils.write_atomic(dest, write)
    print(f"signatures {', '.join(about['signatures'])} in {dest}")


def image_batches(run, frame):
    """`dataset.make_dataset` with the size and reading rule of a run."""
    return dataset.make_dataset(
        frame, run.info["image_size"], 32, resize=run.config.resize
    )


if __name__ == "__main__":
    utils.run_main(main)
