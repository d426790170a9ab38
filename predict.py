"""Use a trained run: reconstruct, generate, evaluate, inspect.

    python predict.py                          newest run: both, with figures
    python predict.py reconstruct RUN [--images PATH ...] [--split test]
    python predict.py generate RUN -n 64 [--seed 0] [--temperature 1.0]
    python predict.py evaluate RUN [--data-dir DIR]
    python predict.py inspect RUN

RUN is a folder that train.py made; without it the newest one is taken.
"""

import dataclasses
from pathlib import Path

import numpy as np

import dataset
import utils

modules = utils.lazy_import("modules")
pd = utils.lazy_import("pandas")


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
    slice_position: float | None = utils.flag(
        None, "0 first slice of a head, 1 last; spread evenly without it", 0, 1
    )


@dataclasses.dataclass(frozen=True)
class Evaluate(OfRun):
    """Measure everything on test subjects; `evaluation.json` and figures."""

    data_dir: str | None = utils.flag(
        None, "other data, all of it as test set", metavar="DIR"
    )
    dataset: str = utils.flag(
        "auto", "layout of --data-dir", choices=("auto", *utils.REAL_DATASETS)
    )


@dataclasses.dataclass(frozen=True)
class Inspect(OfRun):
    """Show layers, grids, codebook, recipe, data and scores of a run."""


@dataclasses.dataclass(frozen=True)
class Show(OfRun):
    """Reconstruct test images and generate new ones."""


def main(argv):
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
    reconstruct(run, Reconstruct())
    if run.prior_path.exists():
        generate(run, Generate())
    else:
        print("no prior in this run: nothing generated")
    if run.evaluation_path.exists():
        print(utils.summary_table(utils.read_json(run.evaluation_path)))


def reconstruct(run, options):
    """Write `figures/reconstructions.png` of files or of a split."""
    vqvae = utils.load_model(run.vqvae_path)
    if options.images:
        frame = dataset.index_files(options.images)
        name = "reconstructed_images"
    else:
        frame = load_split(run, options.split)
        frame = frame.iloc[utils.spread(len(frame), options.count)]
        name = "reconstructions"
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
    position = options.slice_position
    images, _ = modules.generate(
        vqvae,
        priors,
        options.number,
        options.seed,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        slice_position=None
        if position is None
        else np.full(options.number, position),
        progress=utils.progress_bar("sampling", "chunk"),
    )
    folder = run.path / "samples"
    folder.mkdir(exist_ok=True)
    for k, image in enumerate(images):
        utils.write_png(folder / f"seed{options.seed}_{k:06d}.png", image)
    path = run.figures_path / "samples.png"
    utils.draw_samples(path, images[:64], options.seed, options.temperature)
    print(f"{options.number} images in {folder}, grid in {path}")


def evaluate(run, options):
    """Write `evaluation.json` and every figure, print the summary."""
    vqvae = utils.load_model(run.vqvae_path)
    priors = utils.load_priors(run, vqvae) if run.prior_path.exists() else []
    if options.data_dir:
        layout = options.dataset
        if layout == "auto":
            layout = dataset.detect_layout(options.data_dir)
        frame = dataset.load_index(
            options.data_dir, layout, image_size=run.info["image_size"]
        )
        splits = {"test": frame.assign(split="test")}
    else:
        splits = {name: load_split(run, name) for name in dataset.SPLITS}
    images = {name: image_batches(run, frame) for name, frame in splits.items()}
    evaluation = utils.evaluate(
        run, vqvae, priors, splits, images, modules.generate
    )
    print(utils.summary_table(evaluation))


def inspect(run, options):
    """Print what a run is made of."""
    vqvae = utils.load_model(run.vqvae_path)
    models = {"vqvae.keras": vqvae}
    if run.prior_path.exists():
        models["prior.keras"] = utils.load_priors(run, vqvae)[0]
    config = dataclasses.asdict(run.config)
    print(f"run        {run.path}")
    print(f"recipe     {run.config.recipe}")
    print(f"command    {run.info['command']}")
    print(f"data       {run.config.dataset}, ", end="")
    print("simulated" if run.info["simulated"] else "real")
    print(f"image size {utils.size_text(run.info['image_size'])}")
    for level, grid in enumerate(vqvae.latent_grids, start=1):
        print(f"level {level}    grid {utils.size_text(grid)}, ", end="")
        print(f"K={vqvae.num_embeddings}, D={vqvae.embedding_dim}")
    for name, model in models.items():
        print(f"\n{name}: {type(model).__name__}, ", end="")
        print(f"{model.count_params():,} weights")
        print(utils.layer_table(model))
    print("\nsettings")
    print(utils.align([(f"  {k}", str(v)) for k, v in config.items()]))
    if run.evaluation_path.exists():
        print("\nscores")
        print(utils.summary_table(utils.read_json(run.evaluation_path)))


def load_split(run, name):
    """Index of one split of the run's data, as `split.csv` lists it."""
    frame = utils.read_split(run)
    frame = frame[frame["split"] == name].reset_index(drop=True)
    missing = next((p for p in frame["path"] if not Path(p).exists()), None)
    if missing:
        raise utils.DataError(
            f"{missing}: in {run.split_path} but no longer there; give other "
            "data with --images or --data-dir"
        )
    return frame


def image_batches(run, frame):
    return dataset.make_dataset(
        frame, run.info["image_size"], 32, resize=run.config.resize
    )


if __name__ == "__main__":
    utils.run_main(main)
