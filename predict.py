"""Use a trained run: reconstruct, generate, evaluate, inspect.

    python predict.py                          newest run: both, with figures
    python predict.py reconstruct RUN [--images PATH ...] [--split test]
    python predict.py generate RUN -n 64 [--seed 0] [--temperature 1.0]
    python predict.py generate RUN -n 100000 --format npz --shard 0/4
    python predict.py evaluate RUN [--data-dir DIR]
    python predict.py inspect RUN

RUN is a folder that train.py made; without it the newest one is taken.
Evaluating other data leaves those of the run alone: it writes
RUN/evaluation-NAME.json and RUN/figures/NAME, NAME the last part of DIR.
"""

import dataclasses
import functools
import hashlib
import re
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np

import dataset
import utils

modules = utils.lazy_import("modules")

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
class Reconstruct(OfRun):
    """Encode and decode images; a figure and the SSIM of each."""

    images: tuple[str, ...] = utils.flag(
        (), "image files, instead of a split", metavar="PATH"
    )
    split: str = utils.flag(
        "test", "split of the run's data", choices=dataset.SPLITS
    )
    count: int = utils.flag(8, "images of the split", 1, 64)


@dataclasses.dataclass(frozen=True)
class Generate(OfRun):
    """Draw new images as files, and the first 64 of them in a grid.

    What is there already is not drawn again: a request that was killed goes
    on. Shards may run at once, also on several machines that share the run.
    """

    number: int = utils.flag(64, "images", 1, 1_000_000, short="-n")
    seed: int = utils.flag(0, "image k follows from seed and k", 0, 2**31 - 1)
    temperature: float = utils.flag(
        1.0, "below 1: likelier, less varied", above=0, high=10
    )
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
class Inspect(OfRun):
    """Show layers, grids, codebook, recipe, data and scores of a run."""


@dataclasses.dataclass(frozen=True)
class Show(OfRun):
    """Reconstruct test images and generate new ones."""


def main(argv):
    """Do what the verb says with the run it names, or the newest."""
    verbs = {
        "show": (Show, show),
        "reconstruct": (Reconstruct, reconstruct),
        "generate": (Generate, generate),
        "evaluate": (Evaluate, evaluate),
        "inspect": (Inspect, inspect),
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
    if run.evaluation_path.exists():
        print(utils.summary_table(utils.read_evaluation(run)))


def reconstruct(run, options):
    """Write `figures/reconstructions.png` of files or of a split."""
    vqvae = utils.load_model(run.vqvae_path)
    if options.images:
        frame = dataset.index_files(options.images)
        name = "reconstructed_images"
    else:
        frame = utils.read_splits(run, [options.split])[options.split]
        if frame.empty:
            raise utils.DataError(f"{options.split}: no images in {run.path}")
        frame = frame.iloc[utils.spread(len(frame), options.count)]
        name = "reconstructions"
    with dataset.naming_files():
        images = np.concatenate(
            [batch.numpy() for batch in image_batches(run, frame)]
        )
    path = run.figures_path / f"{name}.png"
    values = utils.draw_reconstructions(path, vqvae, images)
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
    vqvae = utils.load_model(run.vqvae_path)
    priors = utils.load_priors(run, vqvae) if run.has_priors else []
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
        figures = run.figures_path
    print(utils.summary_table(evaluation))
    print(f"figures in {figures}")


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


def inspect(run, options):
    """Print what a run is made of."""
    vqvae = utils.load_model(run.vqvae_path)
    models = {"vqvae.keras": vqvae}
    if run.has_priors:
        priors = utils.load_priors(run, vqvae)
        for path, prior in zip(run.prior_paths, priors, strict=True):
            models[path.name] = prior
    config = dataclasses.asdict(run.config)
    print(f"run        {run.path}")
    print(f"recipe     {run.config.recipe}")
    print(f"command    {run.info['command']}")
    if "prior_command" in run.info:
        print(f"prior      {run.info['prior_command']}")
    if "training" in run.info:
        print(f"training   not complete: python train.py --resume {run.path}")
    kind = "simulated" if run.info["simulated"] else "real"
    print(f"data       {run.config.dataset}, {kind}, ", end="")
    splits = utils.read_splits(run, needed=())
    print(", ".join(f"{len(v)} {name}" for name, v in splits.items()))
    print(f"image size {utils.size_text(run.info['image_size'])}")
    for level, grid in enumerate(vqvae.latent_grids, start=1):
        print(f"level {level}    grid {utils.size_text(grid)}, ", end="")
        print(f"K={vqvae.num_embeddings}, D={vqvae.embedding_dim}")
    for name, model in models.items():
        print(f"\n{name}: {type(model).__name__}, ", end="")
        print(f"{model.count_params():,} weights")
        print(utils.layer_table(model))
    print("\nsettings")
    rows = [(f"  {name}", utils.typed(v)) for name, v in config.items()]
    print(utils.align(rows))
    if run.evaluation_path.exists():
        print("\nscores")
        print(utils.summary_table(utils.read_evaluation(run)))


def image_batches(run, frame):
    """`dataset.make_dataset` with the size and reading rule of a run."""
    return dataset.make_dataset(
        frame, run.info["image_size"], 32, resize=run.config.resize
    )


if __name__ == "__main__":
    utils.run_main(main)
