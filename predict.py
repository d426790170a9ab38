"""Use a trained run: reconstruct, generate, evaluate, inspect.

    python predict.py                          newest run: both, with figures
    python predict.py reconstruct RUN [--images PATH ...] [--split test]
    python predict.py generate RUN -n 64 [--seed 0] [--temperature 1.0]
    python predict.py evaluate RUN [--data-dir DIR]
    python predict.py inspect RUN

RUN is a folder that train.py made; without it the newest one is taken.
Evaluating other data leaves those of the run alone: it writes
RUN/evaluation-NAME.json and RUN/figures/NAME, NAME the last part of DIR.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np

import dataset
import utils

modules = utils.lazy_import("modules")

SHOWN = 64  # images in the grid
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
    """Draw new images: each as a PNG, and all of them in a grid."""

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


@dataclasses.dataclass(frozen=True)
class Evaluate(OfRun):
    """Measure everything on test subjects; `evaluation.json` and figures.

    Of another data set, with --data-dir, every image is a test image, and the
    results go to `evaluation-NAME.json` and `figures/NAME` in the run folder,
    NAME the last part of DIR.
    """

    data_dir: str | None = utils.flag(
        None, "other data, all of it as test set", metavar="DIR"
    )
    dataset: str = utils.flag(
        "auto", "layout of --data-dir", choices=("auto", *utils.REAL_DATASETS)
    )

    def __post_init__(self):
        super().__post_init__()
        if self.dataset != "auto" and self.data_dir is None:
            raise utils.FlagError("--dataset: goes with --data-dir only")


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
    """Write `samples/*.png` and the grid `figures/samples.png`."""
    vqvae = utils.load_model(run.vqvae_path)
    priors = utils.load_priors(run, vqvae)
    check_conditions(run, priors, options)
    folder = run.path / "samples"
    folder.mkdir(exist_ok=True)
    shown = []
    chunk = modules.AutoregressivePrior.SAMPLE_CHUNK
    starts = range(0, options.number, chunk)
    for first in utils.progress_bar("sampling", "chunk")(starts):
        count = min(chunk, options.number - first)
        images = draw(vqvae, priors, options, first, count)
        for k, image in enumerate(images, start=first):
            utils.write_png(folder / sample_name(options, k), image)
        shown.extend(images[: SHOWN - len(shown)])
    path = run.figures_path / "samples.png"
    utils.draw_samples(path, np.stack(shown), options.seed, options.temperature)
    print(f"{options.number} images in {folder}, grid in {path}")


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
    """Images `first` to `first + count` of a request, `(count, H, W)`."""
    position = options.slice_position
    if position is not None:
        position = np.full(count, position)
    images, _ = modules.generate(
        vqvae,
        priors,
        count,
        options.seed,
        first=first,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        guidance=options.guidance,
        label=options.label,
        slice_position=position,
    )
    return images


def sample_name(options, number):
    """File of an image: the seed, what differs from the default, its number."""
    parts = [f"seed{options.seed}"]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in SAMPLING and value != field.default:
            value = value if isinstance(value, str) else f"{value:g}"
            parts.append(field.name.replace("_", "-") + value)
    return "_".join([*parts, f"{number:06d}.png"])


def evaluate(run, options):
    """Measure the run on its test images, or on other data; draw figures."""
    vqvae = utils.load_model(run.vqvae_path)
    priors = utils.load_priors(run, vqvae) if run.has_priors else []
    if options.data_dir:
        evaluation, figures = evaluate_other(run, vqvae, priors, options)
    else:
        splits = utils.read_splits(run, ["test"])
        with dataset.naming_files():
            evaluation = utils.evaluate(
                run,
                vqvae,
                priors,
                splits,
                image_batches(run, splits["test"]),
                modules.generate,
                dataset.ventricle_areas,
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
