"""Train a VQ-VAE on MRI slices and a prior over its indices.

    python train.py
        simulated brains, the whole chain, minutes on two CPU cores
    python train.py --recipe oasis-vqvae-pixelcnn --data-dir DIR
        one of the published systems, on a folder of its data set
    python train.py --stage prior --run-dir runs/NAME --prior-epochs 50
        another prior over the VQ-VAE of an earlier run
    python train.py --stage texture --run-dir runs/NAME --texture-epochs 5
        texture for the generated images of an earlier run
    python train.py --resume runs/NAME [--epochs 40]
        continue a training that was stopped or killed; with more epochs than
        before, train a complete run on
    python train.py --tune 30 --objective ssim+bits --epochs 5 --prior-epochs 5
        search for settings, 30 trials
    python train.py --list-recipes

The stages: images -> VQ-VAE -> indices -> priors -> texture (if wanted) ->
sampling settings -> evaluation. All results go to one run folder.
"""

import contextlib
import dataclasses
import datetime
import functools
import itertools
import math
import os
import shlex
import shutil
import tempfile
import typing
import warnings
from pathlib import Path

import numpy as np

import dataset
import predict
import utils
from utils import keras, pd, tf

modules = utils.lazy_import("modules")
optuna = utils.lazy_import("optuna")
plt = utils.lazy_import("matplotlib.pyplot")

GRADIENT_NORM = 1.0  # longer gradients are scaled down to it
LEAST_USAGE = 0.02  # of a codebook over the training images
PICTURES = 5  # times that they are shown
SAMPLING = {"temperature": (1.0, 0.9, 0.8, 0.7), "top_p": (1.0, 0.95, 0.9)}
LEAST_TO_CHOOSE, MOST_TO_CHOOSE = 64, 256  # validation images
# Relative times for an epoch, by which stages not yet begun are guessed.
TIMES = {"vqvae": 2, "texture": 4}  # a prior: 3
SHOWN = ("loss", "ssim", "codebook_usage", "bits_per_code", "val_ssim")
SHOWN += ("val_bits_per_code",)
NOT_COPIED = shutil.ignore_patterns(
    "run.lock", "figures", "logs", "samples", "*.tmp-*"
)
OBJECTIVES = {
    "ssim": {"ssim": "maximize"},
    "ssim+bits": {"ssim": "maximize", "bits_per_image": "minimize"},
}
# What may differ when a search is continued.
FREE = {"tune", "strategy", "force", "debug", "run_dir"}
# Flags of a search that the training of its best trial does not have.
OF_SEARCH = {"tune", "objective", "run_dir", "smoke", "epochs", "prior_epochs"}


def main(argv):
    """Train, encode and evaluate as the flags say."""
    settings = utils.parse_training(argv, __doc__)
    # Before the signals: several workers come with a handler of SIGTERM.
    strategy = utils.choose_strategy(
        settings.run.strategy, alone=settings.search.tune > 0
    )
    with (
        utils.StopSignals() as signals,
        settings_of_worker(settings, strategy) as settings,
    ):
        if settings.search.tune:
            return search(settings, argv, strategy, signals)
        utils.wait_for_workers(strategy)
        print(utils.describe_devices())
        job = start(settings, strategy, signals, argv)
        try:
            train(job)
        except utils.Stopped:
            path = shlex.quote(str(job.run.path))
            with contextlib.suppress(OSError):  # of a terminal that is closed
                print(f"continue with: python train.py --resume {path}")
            raise
        finally:
            job.run.unlock()


@contextlib.contextmanager
def settings_of_worker(settings, strategy):
    """Settings of this process: the chief, which writes the run, or another.

    Others run silently in a temporary copy of the run folder.
    """
    if utils.is_chief(strategy):
        yield settings
        return
    run, name = settings.run, "resume" if settings.run.resume else "run_dir"
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        own = f"{folder}/run"
        if run.resume or run.stage in utils.FIXED:
            shutil.copytree(getattr(run, name), own, ignore=NOT_COPIED)
        yield utils.replace(settings, **{name: own})


# === Start ===


@dataclasses.dataclass
class Job:
    """A training under way: its run, devices and images."""

    run: utils.Run  # locked
    strategy: typing.Any  # of `tf.distribute`
    signals: utils.StopSignals  # which end the training
    data_dir: str | None = None  # where the images are now, if they were moved

    settings = property(lambda self: self.run.settings)

    @functools.cached_property
    def images(self):
        """Images of each split: {name: `dataset.Slices`}."""
        images = dataset.load_run(self.run, self.data_dir)
        self.run.info["data_dir"] = str(images["train"].root)
        return images

    @functools.cached_property
    def tables(self):
        """Table of each split, which needs no image."""
        table = utils.read_split_table(self.run)
        return {
            name: table[table["split"] == name].reset_index(drop=True)
            for name in dataset.SPLITS
        }

    @functools.cached_property
    def vqvae(self):
        """The trained VQ-VAE on the CPU, where batches are made.

        First asked for outside of a graph, in which it would be loaded.
        """
        with tf.device("CPU"):
            return modules.load_vqvae(self.run, on_cpu=True)

    def begin(self, parts, **epochs_before):
        """Note which parts are to be made; removes all checkpoints.

        `epochs_before`: what parts that are trained on had before.
        """
        done = [part for part in all_parts(self.run) if part not in parts]
        for part in parts - epochs_before.keys():
            shutil.rmtree(self.run.logs_path / part, ignore_errors=True)
        self.run.begin(done, epochs_before=epochs_before)

    def epochs_before(self, part):
        """Epochs that an earlier training of the run gave a part."""
        return self.run.info["training"]["epochs_before"].get(part, 0)

    def make_model(self, part, new):
        """Return a new model of a part, or the saved one if trained on.

        That of a part that was interrupted is new, too: `Fit` fills it from
        the checkpoint.
        """
        keras.utils.set_random_seed(self.settings.run.seed)
        with self.strategy.scope():
            is_trained = self.epochs_before(part) > 0
            path = self.run.model_path(part)
            return modules.load_model(path) if is_trained else new()

    def finish(self, part, model):
        """Save the model of a part; the training is past it."""
        # Nothing reads its optimizer, which is larger than the weights.
        model.optimizer, model.compiled = None, False
        utils.write_atomic(self.run.model_path(part), model.save)
        # These show the model that was there before.
        run = self.run
        stale = {run.evaluation_path, run.card_path, run.report_path}
        stale |= {run.path / "anomaly.csv", run.path / "completions.npz"}
        stale |= {*run.figures_path.glob("*.png")}
        if part == "vqvae":  # also on other data sets
            stale |= {*run.path.glob("evaluation-*.json")}
            stale |= {*run.figures_path.glob("*/*.png")}
        # Of this VQ-VAE, if its training drew it.
        if part != "vqvae" or len(self.tables["validate"]):
            stale -= {run.figures_path / "reconstructions.png"}
        for path in stale:
            path.unlink(missing_ok=True)
        if part != "texture":
            run.info.pop("sampling", None)  # chosen for other priors
        run.note_done(part)


def all_parts(run):
    """Names of what a training makes, in order."""
    texture = ["texture"] * (run.settings.training.texture_epochs > 0)
    return ["vqvae", "indices", *run.prior_names, *texture, "sampling"]


def option(settings, stage, name):
    """Setting of a stage, such as `epochs`; 0 if it has no such one."""
    return getattr(settings.training, utils.stage_prefix(stage) + name, 0)


def start(settings, strategy, signals, argv=()):
    """Return the `Job` of some settings; a refused start changes nothing."""
    if settings.run.smoke and not settings.run.resume:
        settings = settings.smoked()
    given = utils.flags_given(argv)
    later = settings.run.stage in utils.FIXED and not settings.run.resume
    folder = settings.run.run_dir if later else settings.run.resume
    run = utils.Run.open(folder) if folder else utils.Run.create(settings)
    earlier, run.settings = run.training_settings, settings
    data_dir = settings.data.data_dir if "data_dir" in given else None
    job = Job(run, strategy, signals, data_dir)
    begun = run.split_path, run.vqvae_path, run.checkpoint_path
    try:
        if folder:
            run.lock()
        if later:
            begin_stage(job, earlier)
        elif any(map(os.path.exists, begun)):
            plan_resume(job, earlier)
        else:  # new, or stopped before that
            load_images(job, "condition" in given)
    except BaseException:
        run.unlock() if folder else run.discard()
        raise
    return job


def begin_stage(job, earlier):
    """Let other priors of a trained VQ-VAE be made, or its texture."""
    run, level = job.run, job.settings.run.prior_level
    modules.load_model(run.vqvae_path)  # refused before anything is changed
    if job.settings.run.stage == "texture":
        return begin_parts(job, {"texture"})
    run.info |= settle_conditions(job, run.split_path)
    names = run.prior_names
    parts = {"sampling", *(names[level - 1 : level] if level else names)}
    parts |= parts_left(run) & {"indices", "texture"}
    before, now = earlier.prior.condition, job.settings.prior.condition
    paths = zip(names, run.prior_paths, strict=True)
    kept = [path for name, path in paths if name not in parts and path.exists()]
    if kept and before != now:
        raise utils.FlagError(
            f"--condition: {kept[0]} was trained with {before}, found {now}; "
            "use the same, or train all levels, without --prior-level"
        )
    begin_parts(job, parts)


def begin_parts(job, parts):
    """Begin anew with some parts, unless others are left to be made."""
    if others := parts_left(job.run) - parts:
        raise utils.RunError(
            f"{job.run.path}: its training stopped before "
            f"{', '.join(sorted(others))}; finish it first with --resume"
        )
    settle_parts(job, parts)
    job.begin(parts)


def parts_left(run):
    """Names of what an unfinished training of a run has not made yet."""
    under_way = "training" in run.info
    return {x for x in all_parts(run) if under_way and not run.is_done(x)}


def plan_resume(job, earlier):
    """Decide which parts of a run are still to be made or trained on.

    Weights come back later: `modules.RoundCheckpoint` restores those of a part
    when `Fit.run` starts.
    """
    run, parts = job.run, parts_left(job.run)
    under_way = "training" in run.info
    stages = {"vqvae", *run.prior_names, "texture"}
    asked = {part: option(job.settings, part, "epochs") for part in stages}
    change = {x: asked[x] - option(earlier, x, "epochs") for x in stages}
    more = {part for part in stages - parts if change[part] > 0}
    trained = {x for x in stages - parts if run.model_path(x).exists()}
    longer, epochs = trained & more, {}
    # That there have been, by level maybe more than in settings.
    if longer or any(change.values()) and run.history_path.exists():
        epochs = utils.read_history(run).groupby("stage")["epoch"].max()
        if lost := longer - {*epochs.index}:
            raise utils.RunError(
                f"{run.history_path}: no epoch of {min(lost)}; restore the file"
            )
        longer = {part for part in longer if asked[part] > epochs[part]}
    for part in sorted(stages):
        if change[part] < 0:
            refuse_too_few(part, asked[part], epochs, stages & parts)
    if "texture" in more - trained:
        parts.add("texture")  # the first one
    if not (parts or longer or under_way):
        if lost := more - trained:
            raise utils.RunError(
                f"{run.model_path(min(lost))}: missing; restore it, or train "
                "it anew with --stage"
            )
        raise utils.FlagError(
            f"--resume: the training of {run.path} is complete; train on with "
            "more --epochs, --prior-epochs or --texture-epochs of a model that "
            "is there, or make a prior with --stage prior --run-dir"
        )
    parts |= longer | ({"sampling"} if longer - {"texture"} else set())
    if "vqvae" in longer:  # other codes need other indices and priors
        parts |= trained | {"indices"}
        longer, under_way = {"vqvae"}, False
        if level := earlier.run.prior_level:
            utils.warn(f"all priors get the settings of level {level}")
    since = {part: int(epochs.get(part, 0)) for part in longer}
    settle_parts(job, parts)
    for part in longer | ({"vqvae"} - parts):
        modules.load_model(run.model_path(part))  # else refused too late
    if not under_way:
        return job.begin(parts, **since)
    now = run.info["training"]  # other parts go on from their checkpoints
    now["settings"] = utils.flat(job.settings)
    now["done"] = [part for part in now["done"] if part not in parts]
    now["epochs_before"] |= since
    run.update()


def refuse_too_few(part, asked, epochs, left):
    """Raise `FlagError` if a model is to have no more epochs than it had.

    Args:
        asked: epochs of `part`, and of the other levels if it is a prior.
        epochs: {stage: those that there were}.
        left: stages whose training is not complete.
    """
    prefix = utils.stage_prefix(part)
    same = {x for x in left if utils.stage_prefix(x) == prefix}
    had = max(epochs.get(x, 0) for x in same or {part})
    if asked <= had or not same:
        raise utils.FlagError(
            f"--{prefix.replace('_', '-')}epochs: {part} has had {had}, found "
            f"{asked}; only a training under way may get fewer, and more than "
            "it has had"
        )


def load_images(job, asked):
    """Read the images of a new run, and note in it what they are."""
    run, data = job.run, job.settings.data
    if data.dataset != "phantom" and not data.data_dir:  # with --smoke
        side = -(-max(32, *(data.image_size or (128,))) // 16) * 16
        made = utils.SMOKE_SUBJECTS, data.dataset, side
        changes = {"data_dir": str(dataset.simulated_folder(*made))}
        run.settings = utils.replace(run.settings, resize=True, **changes)
        data = run.settings.data
    slices = dataset.load(data)
    if job.settings.run.smoke:
        splits = slices.table.groupby("split").indices.values()
        few = [n[utils.spread(len(n), utils.SMOKE_IMAGES)] for n in splits]
        slices = slices.take(np.sort(np.concatenate(few)))
    job.images = {name: slices.split(name) for name in dataset.SPLITS}
    job.tables = {name: part.table for name, part in job.images.items()}
    run.info |= {
        "image_size": list(slices.size),
        "images": len(slices.table),
        "crop": choose_crop(job),
        "simulated": slices.simulated,
        "intensity": slices.intensity,
        "dataset": data.dataset,
        "data_dir": str(slices.root),
        **settle_conditions(job, slices.root, asked),
    }
    vqvae_only = job.settings.run.stage == "vqvae"
    parts = {"vqvae", "indices"} if vqvae_only else {*all_parts(run)}
    settle_parts(job, parts)
    if len(slices.rejected):
        utils.write_csv(run.rejected_path, slices.rejected)
    job.begin(parts)
    utils.write_csv(run.split_path, slices.table)


def choose_crop(job):
    """Box [top, left, height, width] that the model sees; None for all."""
    train, multiple = job.images["train"], job.settings.total_downsampling
    box = [0, 0, *train.size]
    if job.settings.data.crop:
        flips = job.settings.training.flips
        box = [*dataset.content_box(train, multiple, flips)]
    name = "--image-size, by default that of the data"
    utils.check_image_size(box[2:], multiple, name)
    if box[2:] == list(train.size):
        return None
    size, frame = utils.size_text(box[2:]), utils.size_text(train.size)
    print(f"the model sees the {size} pixels of {frame} that hold content")
    for name, images in job.images.items():
        rows = dataset.outside(images, box)
        if len(rows):
            paths = ", ".join(images.table["path"].iloc[rows[:5]])
            print(f"{len(rows)} images of {name} reach beyond it: {paths}")
    return box


def settle_conditions(job, source, asked=True):
    """Return what a prior can be conditioned on: labels and slice numbers.

    Images without labels are a `DataError` if the user asked for them, else
    the prior does without.
    """
    table, wanted = job.tables["train"], job.settings.prior.condition
    names = sorted(set(table["label"]) - {""})
    if "label" in wanted and not names:
        if asked:
            raise utils.DataError(
                f"{source}: no image has a class label; leave label out of "
                "--condition"
            )
        print("no image has a class label: the prior is trained without")
        rest = "slice" if "slice" in wanted else "none"
        job.run.settings = utils.replace(job.settings, condition=rest)
    return {
        "labels": {name: number for number, name in enumerate(names)},
        "slice_range": [int(table["slice"].min()), int(table["slice"].max())],
    }


def settle_parts(job, parts):
    """Add lost indices to the parts of a training; refuse what cannot be made.

    Before anything changes: images may be gone, replicas cannot do all, a share
    of a batch may be empty. `parts`: names of what will be trained.
    """
    if not job.run.indices_path.exists():
        parts.add("indices")
    run, options = job.settings.run, job.settings.training
    spared = {"sampling"}
    if not (options.flips or options.prior_augment):
        spared |= {*job.run.prior_names}  # indices are enough
    if parts - spared or job.data_dir:
        _ = job.images  # a `DataError` if they are gone
    replicas = job.strategy.num_replicas_in_sync
    half = run.precision == "mixed_float16"
    for flag, given in ("jit", run.jit), ("precision mixed_float16", half):
        if given and replicas > 1:
            raise utils.FlagError(
                f"--{flag}: works on one device only, found {replicas}; leave "
                "it out or use --strategy none"
            )
    images = {name: len(table) for name, table in job.tables.items()}
    shares = replicas * options.accumulation_steps
    sizes = {"strategy": (images["validate"] or replicas, replicas)}
    for part in parts - {"indices", "sampling"}:
        size = min(images["train"], option(job.settings, part, "batch_size"))
        flag = f"{utils.stage_prefix(part)}batch-size".replace("_", "-")
        sizes[flag] = size, shares
    for flag, (size, least) in sizes.items():
        if size < least:
            raise utils.FlagError(
                f"--{flag}: {size} images cannot be cut into {least} parts, "
                f"for {replicas} replicas and --accumulation-steps"
            )


# === Stages ===


def train(job):
    """Make what is left to do of a run: models, sampling, evaluation."""
    vqvae, priors, _ = train_models(job)
    if utils.is_chief(job.strategy):
        try:
            images = job.images
        except utils.DataError as error:
            utils.warn(
                f"{error}; --temperature and --top-p are not chosen but as "
                "given, or 1; evaluate later: python predict.py evaluate "
                f"{job.run.path}"
            )
            images = {}
        if not job.run.is_done("sampling"):
            choose_sampling(job, vqvae, priors, images)
        if job.settings.run.evaluate and images:
            trained = predict.Trained.of(job.run, vqvae, priors)
            print("evaluation on test subjects", flush=True)
            evaluation = predict.evaluate_run(trained, images)
            predict.print_summary(job.run, evaluation)
    utils.wait_for_workers(job.strategy)  # the chief takes one gone for dead
    job.run.complete()


def train_models(job, *callbacks):
    """Make what is left to do of the models of a run.

    Returns: `VQVAE`, trained with further Keras callbacks; its priors, bottom
        first; in words, which codebooks collapsed.
    """
    run, replicas = job.run, job.strategy.num_replicas_in_sync
    policy, reason = utils.choose_precision(job.settings.run.precision)
    keras.config.set_dtype_policy(policy)
    print(f"run folder {run.path}, precision {policy} ({reason})")
    if replicas > 1:
        print(f"{replicas} replicas share each batch")
    if not run.is_done("vqvae"):
        train_vqvae(job, callbacks)
    vqvae, priors = modules.load_vqvae(run), []
    if not run.is_done("indices"):
        encode_splits(job, vqvae)
    indices = utils.read_indices(run)
    for name in ("train", "validate"):
        if len(job.tables[name]) != len(indices.get(f"{name}_1", ())):
            raise utils.RunError(
                f"{run.split_path}: it does not list as many images of {name} "
                f"as {run.indices_path.name} holds; restore both"
            )
    collapsed = collapsed_levels(vqvae, indices)
    for level, name in enumerate(run.prior_names, start=1):
        if run.is_done(name):
            continue
        if collapsed and not job.settings.run.force:
            raise utils.RunError(
                f"{run.vqvae_path}: {collapsed}; a prior over it would sample "
                "one image again and again: train the VQ-VAE longer or with "
                "another --learning-rate, or insist with --force"
            )
        train_prior(job, vqvae, indices, level)
    if "texture" in all_parts(run) and not run.is_done("texture"):
        train_texture(job, vqvae)
    if all(path.exists() for path in run.prior_paths):
        vqvae, priors = modules.load_models(run)
    return vqvae, priors, collapsed


def train_vqvae(job, callbacks=()):
    """Train the VQ-VAE of a run and save it as `vqvae.keras`."""
    model = job.make_model("vqvae", lambda: new_vqvae(job))
    job.run.update(latent_grids=model.latent_grids)
    grids = ", ".join(map(utils.size_text, model.latent_grids))
    print(f"VQ-VAE: {model.count_params():,} weights, grids {grids}")
    options = job.settings.training
    vary = functools.partial(varied, job, strength=options.augment)
    vary = vary if options.flips or options.augment else None
    sources = job.images["train"], job.images["validate"], vary
    fit = Fit(job, "vqvae", model, *sources)
    fit.run(vqvae_pictures(job, model), callbacks)


def new_vqvae(job):
    """Return an untrained VQ-VAE."""
    train, crop = job.images["train"], job.run.info["crop"]
    top, left, height, width = crop or (0, 0, *train.size)
    some = train.read(utils.spread(len(train), 512))
    seen = some[:, top : top + height, left : left + width]
    return modules.VQVAE(
        image_size=train.size,
        crop=crop,
        data_variance=float(seen.var()) or 1.0,
        seed=job.settings.run.seed,
        **dataclasses.asdict(job.settings.vqvae),
    )


def varied(job, images, epoch, rows, strength, left=1.0):
    """A batch of training images, varied at random as the settings say.

    `left`: share of the training that is left, 1 to 0. Shifts and gains shrink
    with it. Mirrored images end halfway, so that samples are not mirrored.
    """
    seed, axis = job.settings.run.seed, job.images["train"].mirror_axis
    flips = tf.nn.relu(left - 0.5) if job.settings.training.flips else 0.0
    options = seed, rows, strength * left, flips, epoch, axis
    return dataset.augment(images, *options)


def encode_splits(job, vqvae):
    """Write the indices of every image to `indices.npz`."""
    arrays = {}
    for name, images in job.images.items():
        if len(images):
            batches = dataset.ordered_batches(images)
            grids = modules.encode_dataset(vqvae, batches)
            arrays |= {f"{name}_{k}": grid for k, grid in enumerate(grids, 1)}
    utils.write_arrays(job.run.indices_path, arrays)
    job.run.note_done("indices")


def collapsed_levels(vqvae, indices):
    """Say which codebooks are hardly used, with a warning; "" if none is."""
    total = vqvae.num_embeddings
    levels = range(1, vqvae.levels + 1)
    used = {k: np.unique(indices[f"train_{k}"]).size for k in levels}
    text = ", ".join(
        f"level {k} has collapsed: {count} of {total} code vectors in use"
        for k, count in used.items()
        if count < max(LEAST_USAGE * total, 2)
    )
    if text:
        utils.warn(text)
    return text


def train_prior(job, vqvae, indices, level):
    """Train the prior of a level and save it."""
    run, settings = job.run, job.settings
    name = run.prior_names[level - 1]
    prior = job.make_model(name, lambda: new_prior(job, vqvae, level))
    prior.recompute = settings.training.recompute
    print(f"{name}: {type(prior).__name__}, {prior.count_params():,} weights")

    def inputs(split):
        grids = [indices[f"{split}_{k + 1}"] for k in range(vqvae.levels)]
        return modules.prior_inputs(prior, grids, job.tables[split])

    training, transform = inputs("train"), None
    validation = inputs("validate") if len(job.tables["validate"]) else None
    if settings.training.flips or settings.training.prior_augment:
        training = {"images": job.images["train"], "inputs": training}
        transform = encoding(job, level)
    fit = Fit(job, name, prior, training, validation, transform)
    fit.run(prior_pictures(job, vqvae, prior, level))


def train_texture(job, vqvae):
    """Train the texture of generated images and save it."""
    texture = job.make_model("texture", lambda: new_texture(job, vqvae))
    print(f"texture: {texture.count_params():,} weights")
    vqvae = job.vqvae

    def pairs(images, epoch, rows):
        images = varied(job, images, epoch, rows, 0.0)
        pair = {"images": images, "decoded": vqvae.reconstruct(images)}
        return {name: vqvae.cropped(x) for name, x in pair.items()}

    Fit(job, "texture", texture, job.images["train"], None, pairs).run()


def new_texture(job, vqvae):
    """Return an untrained texture."""
    images = job.images["train"]
    some = images.take(utils.spread(len(images), 512))
    decoded = modules.rebuild(vqvae, dataset.ordered_batches(some))
    residual = (some.read()[..., 0] - decoded)[decoded > 0]
    return modules.Texture(
        job.settings.training.texture_channels,
        residual_std=float(residual.std()) if residual.size else 1.0,
        codebook_sha256=modules.codebook_sha256(vqvae),
        seed=job.settings.run.seed,
    )


def new_prior(job, vqvae, level):
    """Return an untrained prior of a level, conditioned on those above.

    Most fields of `utils.PriorSettings` are its arguments; `_build_layers` of
    the prior reads them.
    """
    options = dataclasses.asdict(job.settings.prior)
    network, attention = options.pop("network"), options.pop("attention")
    names = options.pop("condition")
    if network == "pixelsnail":
        attended = {"none": (), "top": (vqvae.levels,), "all": (1, 2, 3)}
        options["attention"] = level in attended[attention]
    return modules.PRIORS[network](
        num_embeddings=vqvae.num_embeddings,
        latent_grid=vqvae.latent_grids[level - 1],
        upper_grids=vqvae.latent_grids[level:],
        codebook_sha256=modules.codebook_sha256(vqvae, level),
        labels=tuple(job.run.info["labels"]) if "label" in names else (),
        slice_condition="slice" in names,
        **options,
    )


def encoding(job, level):
    """Function that varies a batch of training images and encodes it anew.

    Images vary less from epoch to epoch: at the end the prior learns them as
    they are.
    """
    options, vqvae = job.settings.training, job.vqvae

    def encode(batch, epoch, rows):
        left = 1 - tf.cast(epoch, tf.float32) / options.prior_epochs
        strength = options.prior_augment
        images = varied(job, batch["images"], epoch, rows, strength, left)
        grids = vqvae.encode(images)
        inputs = {**batch["inputs"], "indices": grids[level - 1]}
        if "upper" in inputs:
            inputs["upper"] = tuple(grids[level:])
        return inputs

    return encode


def choose_sampling(job, vqvae, priors, images):
    """Choose temperature and top-p of each level that suit validation images.

    Unless flags give them. The run keeps them for predict.py.
    """
    given = job.settings.run
    plain = modules.Sampling(given.temperature or 1.0, top_p=given.top_p or 1.0)
    best = [plain] * vqvae.levels
    splits = [images.get(name, ()) for name in ("train", "validate")]
    options = predict.Evaluate(texture=False)  # texture takes long
    trained = predict.Trained.of(job.run, vqvae, priors, options)
    enough = min(map(len, splits)) >= LEAST_TO_CHOOSE
    free = [name for name in SAMPLING if getattr(given, name) is None]
    can_choose = priors and free and enough and not given.smoke
    if can_choose:
        print("sampling: comparing temperatures and top-p", flush=True)
        distance = sample_distance(trained, *splits)
    # From the bottom up: chosen first, the top grid would make up for the
    # noise of the bottom grid.
    for level in range(vqvae.levels) if can_choose else ():
        for name in free:
            of_level = functools.partial(dataclasses.replace, best[level])
            tried = (
                [*best[:level], of_level(**{name: value}), *best[level + 1 :]]
                for value in SAMPLING[name]
            )
            best = min(tried, key=lambda sampling: distance(*sampling))
            text = f"{getattr(best[level], name):g} suits validation images"
            print(f"sampling: level {level + 1}, {name} {text}", flush=True)
    sampling = {name: [getattr(x, name) for x in best] for name in SAMPLING}
    job.run.update(sampling=sampling)
    job.run.note_done("sampling")


def sample_distance(trained, train, validate):
    """Function: `modules.Sampling` of each level -> Fréchet distance.

    It is that of samples to validation images, as of `utils.compare_sets`.
    """
    sets, like = predict.real_sets(trained, train, validate, MOST_TO_CHOOSE)
    features, real = utils.hog_features, sets["test"]
    project = utils.principal_components(features(sets["fit"]), len(real))
    goal = project(features(real))

    @functools.cache
    def distance(*sampling):
        asked = dataclasses.replace(trained, sampling=list(sampling))
        images = np.asarray(asked.generate_like(like["test"].table)[0])
        return utils.frechet_distance(project(features(images)), goal)

    return distance


# === Fit ===


class Fit:
    """The training of one model.

    An epoch is cut into rounds of at most `round_steps` steps. Keras takes a
    round for an epoch. After each one the training is saved, and it resumes
    there. Validation comes at the end of an epoch.

    Args:
        stage: name in the history, the logs, the checkpoint and the file.
        training, validation: `dataset.Slices`, or dicts of arrays and these;
            None for no validation.
        transform: function of (batch, epoch, rows) for training batches.
    """

    def __init__(self, job, stage, model, training, validation, transform=None):
        self.job, self.stage, self.model = job, stage, model
        self.training, self.validation = training, validation
        self.transform, self.options = transform, job.settings.training
        self.option = functools.partial(option, job.settings, stage)
        self.log_dir = job.run.logs_path / stage
        self.epochs = self.option("epochs")
        count = len(job.tables["train"])
        self.batch_size = min(self.option("batch_size"), count)
        steps = -(-count // self.batch_size)
        if job.settings.run.smoke:
            steps = min(steps, utils.SMOKE_STEPS)
        self.rounds = -(-steps // self.options.round_steps)  # of an epoch
        self.steps = -(-steps // self.rounds)  # of a round
        self.before, self.stopping, best = job.epochs_before(stage), None, None
        if stage in job.run.prior_names and len(job.tables["validate"]):
            # It looks at every round, most of which have no validation.
            warnings.filterwarnings("ignore", "Early stopping conditioned")
            self.stopping = keras.callbacks.EarlyStopping(
                "val_bits_per_code",
                mode="min",
                patience=self.options.patience,
                restore_best_weights=True,
            )
            if self.before:  # else a worse epoch might replace the best
                history = utils.read_history(job.run).groupby("stage")
                best = history["val_bits_per_code"].min()[stage]
        self.checkpoint = modules.RoundCheckpoint(
            job.run.checkpoint_path / stage, self.stopping, job.signals, best
        )
        self.first = max(self.checkpoint.round, self.before * self.rounds)
        self.last = self.epochs * self.rounds
        self._compile((self.last - self.before * self.rounds) * self.steps)

    def run(self, pictures=None, callbacks=()):
        """Train from the last checkpoint to the end, and save the model.

        Args:
            pictures: function that calls `tf.summary.image`, or None. It must
                not change the state of a random generator.
        """
        steps, done = self.rounds * self.steps, self.first * self.steps
        print(f"{self.stage}: {self.epochs} epochs of {steps} steps")
        batches = functools.partial(
            dataset.training_batches,
            self.training,
            self.batch_size,
            steps,
            self.job.settings.run.seed,
            done,
            transform=self.transform,
        )
        bar = utils.progress_bar(self.stage, "step")
        self.bar = bar(total=self.last * self.steps, initial=done)
        self.pictures = pictures if utils.is_chief(self.job.strategy) else None
        with self.job.signals.deferred(), self.bar:
            self.model.fit(
                dataset.distributed(self.job.strategy, batches),
                initial_epoch=self.first,
                epochs=self.last,
                steps_per_epoch=self.steps,
                **self._validation(),
                callbacks=[*self._logs(), *callbacks, self.checkpoint],
                shuffle=False,
                verbose=0,
            )
            # Before a signal counts that came in the last steps.
            self.job.finish(self.stage, self.model)

    def _compile(self, steps):
        """Adam, with warm-up and cosine decay to zero over `steps`."""
        warmup = min(self.options.warmup_steps, steps // 2)
        # A longer average would still hold the weights of the start.
        momentum = min(self.option("ema_momentum"), steps / (steps + 5))
        with self.job.strategy.scope():
            schedule = keras.optimizers.schedules.CosineDecay(
                0.0,
                steps - warmup,
                warmup_target=self.option("learning_rate"),
                warmup_steps=warmup,
            )
            optimizer = keras.optimizers.Adam(
                schedule,
                weight_decay=self.option("weight_decay") or None,
                global_clipnorm=GRADIENT_NORM,
                use_ema=momentum > 0,
                ema_momentum=momentum,
            )
            optimizer.exclude_from_weight_decay(var_names=["bias"])
            jit = self.job.settings.run.jit
            self.model.compile(optimizer=optimizer, jit_compile=jit)
        self.model.accumulation_steps = self.options.accumulation_steps

    def _validation(self):
        """Arguments of `fit` for the validation; none without images."""
        strategy, count = self.job.strategy, len(self.job.tables["validate"])
        if self.validation is None or not count:
            return {}
        size = dataset.divisible_batch_size(
            count, min(self.batch_size, count), strategy.num_replicas_in_sync
        )

        def batches(**parts):
            source = dataset.ordered_batches(self.validation, size, **parts)
            return source.repeat()

        return {
            "validation_data": dataset.distributed(strategy, batches),
            "validation_steps": -(-count // size),
            "validation_freq": self.rounds,
        }

    def _logs(self):
        """Callbacks that check, log and show the training."""
        if self.option("ema_momentum"):  # first: the others see the average
            yield keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        yield modules.FiniteCheck(self.stage)
        yield keras.callbacks.LambdaCallback(
            on_train_batch_end=self._after_step, on_epoch_end=self._after_round
        )
        if self.stopping:
            yield self.stopping
        if utils.is_chief(self.job.strategy):
            yield keras.callbacks.TensorBoard(self.log_dir, write_graph=False)

    def _after_step(self, number, logs):
        """Show the scores of the round so far in the progress bar."""
        self.bar.set_postfix_str(shown_scores(logs), refresh=False)
        self.bar.update()

    def _after_round(self, number, logs):
        """After an epoch print a line, extend `history.csv`, at times draw."""
        epoch, rest = divmod(number + 1, self.rounds)
        if rest:
            return
        seconds, path = self.checkpoint.seconds, self.job.run.history_path
        line = f"{self.stage}: epoch {epoch}/{self.epochs}"
        line += f", {shown_scores(logs)}"
        left = self._minutes_left(epoch, seconds)
        # No terminal that is closed keeps a round from being saved.
        with contextlib.suppress(OSError), self.bar.external_write_mode():
            print(f"{line}, about {left} min of training left", flush=True)
        row = {
            "stage": self.stage,
            "epoch": epoch,
            "step": (number + 1) * self.steps,
            "images": (number + 1) * self.steps * self.batch_size,
            "seconds": round(seconds, 3),
        }
        history = pd.DataFrame([row | logs])
        if path.exists():
            old = utils.read_history(self.job.run)
            kept = (old["stage"] != self.stage) | (old["epoch"] < epoch)
            history = pd.concat([old[kept], history], ignore_index=True)
        utils.write_csv(path, history)
        shown = {1, *utils.spread(self.epochs, PICTURES) + 1, self.epochs}
        if self.pictures and epoch in shown:
            writer = tf.summary.create_file_writer(str(self.log_dir))
            with writer.as_default(number + 1):
                self.pictures()
            writer.close()

    def _minutes_left(self, epoch, seconds):
        """Of this stage by its pace so far, of later ones by `TIMES`."""
        job, left = self.job, self.epochs - epoch
        for stage in ("vqvae", *job.run.prior_names, "texture"):
            if stage != self.stage and not job.run.is_done(stage):
                epochs = option(job.settings, stage, "epochs")
                epochs -= job.epochs_before(stage)
                left += epochs * TIMES.get(stage, 3) / TIMES.get(self.stage, 3)
        pace = seconds / (epoch - self.before)
        return math.ceil(pace * left / 60)


# === Pictures ===


def vqvae_pictures(job, vqvae):
    """Function that shows what a VQ-VAE makes of a few validation images.

    In `figures/` and in TensorBoard. None without such images.
    """
    images = job.images["validate"]
    if not len(images):
        return None
    shown = images.read(utils.choose_rows(len(images), predict.PICTURED))

    def draw():
        indices = [grid.numpy() for grid in vqvae.encode(shown)]
        decoded = vqvae.decode_indices(indices).numpy()
        ssim = utils.ssim(shown, decoded).numpy()
        path = job.run.figures_path / "reconstructions.png"
        utils.plot_reconstructions(path, shown, decoded, ssim)
        show, size = utils.log_figure, vqvae.num_embeddings
        show("reconstructions", lambda file: file.write(path.read_bytes()))
        inside = vqvae.cropped(shown)
        show("indices", utils.plot_index_maps, inside, indices, size)
        for level, grid in enumerate(indices, start=1):
            tf.summary.histogram(f"codes_{level}", grid)

    return draw


def prior_pictures(job, vqvae, prior, level):
    """Function that shows new images; None while another prior is missing."""
    run, seed = job.run, job.settings.run.seed
    others = [*run.prior_names]
    del others[level - 1]
    paths = [run.model_path(name) for name in others if run.is_done(name)]
    if len(paths) < len(others) or not all(path.exists() for path in paths):
        return None
    priors = [modules.load_model(path) for path in paths]
    priors.insert(level - 1, prior)

    def draw():
        images, *_ = modules.generate(vqvae, priors, 2 * predict.PICTURED, seed)
        title = f"samples, seed {seed}"
        utils.log_figure("samples", utils.plot_samples, images, title)

    return draw


# === Search for settings ===


def search(settings, argv, strategy, signals):
    """Add trials to a search until it has as many as asked for.

    The search is a folder: `study.log` of Optuna, which hands out the trials
    also to several processes; `trials.csv`, figures, and in `trials` the run
    folder of each trial. Test images have no part in it.
    """
    bits = settings.search.objective == "ssim+bits"
    own, space = utils.flat(settings), {}
    for key, how in utils.RECIPES[settings.recipe].search.items():
        searched = bits or not key.startswith("prior")
        if searched and key not in utils.flags_given(argv):
            if "choices" in how:  # the first trial tries the recipe's own
                how = {"choices": sorted({*how["choices"], own[key]})}
            space[key] = how
    if not space:
        raise utils.FlagError("--tune: the flags given leave nothing to search")
    if settings.data.data_dir:
        dataset.load(settings.data)  # refused before there is a folder
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = Path(settings.run.run_dir or f"runs/{settings.recipe}-tune-{now}")
    settings = utils.replace(settings, run_dir=str(folder))
    begin = functools.partial(
        start, strategy=strategy, signals=signals, argv=argv
    )
    attempt = functools.partial(try_settings, settings, space, begin)
    ended = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is experimental
        study = open_study(folder, settings, space)
        try:
            while len(study.get_trials(states=ended)) < settings.search.tune:
                study.optimize(attempt, n_trials=1)
                report_trials(study, folder)
        except utils.Stopped:
            print(f"continue with the same command and --run-dir {folder}")
            raise
    print_best(study, folder, argv)


def open_log(folder):
    """The storage of a search, `study.log` in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path, storages = folder / "study.log", optuna.storages
    if any(folder.iterdir()) and not path.exists():
        raise utils.RunError(
            f"{folder}: neither empty nor the folder of a search; choose "
            "another with --run-dir"
        )
    # Absolute: Optuna waits for ever on the lock that a killed process left
    # if it is a link to a relative path.
    file = storages.journal.JournalFileBackend(str(path.absolute()))
    try:
        if path.read_text("utf-8")[-1:] not in ("", "\n"):
            raise ValueError("its last line is cut off")  # by a full disk
        return storages.JournalStorage(file)
    except ValueError as error:
        raise utils.RunError(
            f"{path}: damaged ({error}); remove its damaged lines, or begin a "
            "search in another --run-dir"
        ) from error


def open_study(folder, settings, space):
    """The Optuna study of a search, new or as it was left."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = open_log(folder)
    begun = optuna.get_all_study_names(storage)
    objectives = OBJECTIVES[settings.search.objective]
    study = optuna.create_study(
        storage=storage,
        # Processes that share a search must not try the same.
        sampler=optuna.samplers.TPESampler(
            seed=None if begun else settings.run.seed
        ),
        pruner=optuna.pruners.MedianPruner(n_warmup_steps=2),
        study_name="search",
        directions=objectives.values(),
        load_if_exists=True,
    )
    values = utils.flat(settings)
    now = {"objective": ""}  # it decides what is searched: compared first
    now |= {k: utils.typed(v) for k, v in values.items() if k not in FREE}
    now |= dict.fromkeys(space, "a range")
    if "settings" not in study.user_attrs:
        study.set_metric_names(list(objectives))
        first = {key: values[key] for key in space}
        study.enqueue_trial(first, skip_if_exists=True)
        study.set_user_attr("settings", now)  # last: the study is complete
    for key, before in study.user_attrs["settings"].items():
        if now.get(key) != before:
            raise utils.FlagError(
                f"--{key.replace('_', '-')}: the search in {folder} has "
                f"{before}, found {now.get(key)}; repeat its command, or "
                "choose another --run-dir"
            )
    return study


def try_settings(settings, space, begin, trial):
    """The objective of a search: train with settings that Optuna suggests.

    A training that is refused or diverges is a trial that ended early.
    """
    values = {}
    for key, how in space.items():
        kind = type(how["low"]).__name__ if "low" in how else "categorical"
        values[key] = getattr(trial, f"suggest_{kind}")(key, **how)
    folder = f"trials/{trial.number:04d}"
    trial.set_user_attr("run", folder)
    print(f"trial {trial.number}: {in_words(values)}")
    keras.utils.clear_session()
    values["run_dir"] = f"{settings.run.run_dir}/{folder}"
    only_ssim = settings.search.objective == "ssim"
    values |= {"tune": 0, "stage": "vqvae" if only_ssim else "all"}
    values["texture_epochs"] = 0  # no score depends on it
    try:
        settings = utils.replace(settings, **values)
        return train_trial(settings, begin, trial)
    except (
        optuna.TrialPruned,
        utils.FlagError,
        utils.RunError,
        utils.NumericsError,
        tf.errors.ResourceExhaustedError,
    ) as error:
        note = " ".join(str(error).split())
        if "No space left" in note:  # no fault of the settings
            raise
        trial.set_user_attr("note", note)
        print(f"trial {trial.number} ended early: {note}")
        raise optuna.TrialPruned(note) from error


def train_trial(settings, begin, trial):
    """Train the run of a trial; return the scores it is judged by.

    Of the weights that the run kept: of the last epoch of the VQ-VAE, of the
    best epoch of each prior.
    """
    job, bits = begin(settings), settings.run.stage == "all"
    run = job.run
    try:
        if not len(job.images["validate"]):
            raise utils.DataError("--tune: no validation images to choose by")
        del job.images["test"]
        _, _, collapsed = train_models(job, *[] if bits else [pruning(trial)])
        if collapsed:
            raise utils.RunError(f"{run.vqvae_path}: {collapsed}")
        run.complete()
    finally:
        run.unlock()
    stages = utils.read_history(run).groupby("stage")
    scores = [float(stages["val_ssim"].last()["vqvae"])]
    if bits:
        best = stages["val_bits_per_code"].min()[run.prior_names]
        sizes = [math.prod(grid) for grid in run.info["latent_grids"]]
        scores.append(float(np.dot(best, sizes)))
    return scores


def pruning(trial):
    """Callback that ends a trial which falls behind the others."""
    epochs = itertools.count(1)  # whose rounds depend on the batch size

    def report(number, logs):
        if "val_ssim" in logs:
            trial.report(logs["val_ssim"], next(epochs))
            if trial.should_prune():
                raise optuna.TrialPruned("below the median of earlier trials")

    return keras.callbacks.LambdaCallback(on_epoch_end=report)


def report_trials(study, folder):
    """Write `trials.csv` and the figure of a search."""
    table = study.trials_dataframe(
        ("number", "state", "value", "params", "user_attrs", "duration")
    )
    table.columns = table.columns.str.replace(
        "^(params|user_attrs|values?)_", "", regex=True
    )
    best = {trial.number for trial in study.best_trials}
    table["best"] = table["number"].isin(best)
    utils.write_csv(folder / "trials.csv", table)
    if not best:
        return
    plots = optuna.visualization.matplotlib
    one = len(study.directions) == 1
    names = ["SSIM of validation images", "bits per image"]
    if one:
        axes = plots.plot_slice(study, target_name=names[0])
    else:
        axes = plots.plot_pareto_front(study, target_names=names)
    for panel in np.ravel(axes):
        if panel.get_xscale() == "log":  # where the usual labels overlap
            marks = np.geomspace(*panel.get_xlim(), 5)[1::2]
            panel.set_xticks(marks, [f"{mark:.2g}" for mark in marks])
            panel.minorticks_off()
    figure, name = panel.figure, "slices" if one else "pareto"
    path = folder / "figures" / f"tuning_{name}.png"
    utils.write_atomic(path, figure.savefig)
    plt.close(figure)


def print_best(study, folder, argv):
    """Say which trials were best, and how each is trained in full."""
    best = sorted(study.best_trials, key=lambda trial: -trial.values[0])
    if not best:
        raise utils.RunError(
            f"{folder}: no trial came to its end; see the column note of "
            "trials.csv there"
        )
    words, kept = ["python", "train.py"], True
    for word in argv:
        if word.startswith("--"):
            kept = not OF_SEARCH & utils.flags_given([word]).keys()
        words += [word] * kept
    print(f"search in {folder}; in full, as long as the recipe says, with:")
    for trial in best:
        scores = dict(zip(study.metric_names, trial.values, strict=True))
        print(f"trial {trial.number}: {in_words(scores)}")
        flags = [
            f"--{key.replace('_', '-')}={utils.typed(value)}"
            for key, value in trial.params.items()
        ]
        print(f"    {shlex.join(words + flags)}")


def shown_scores(logs):
    """Those of a training's logs that people watch, in words."""
    return in_words({key: logs[key] for key in SHOWN if key in logs})


def in_words(values):
    """Numbers by name as a person would write them."""
    named = ((name.replace("_", " "), value) for name, value in values.items())
    return ", ".join(f"{name} {float(value):.4g}" for name, value in named)


if __name__ == "__main__":
    utils.run_main(main)
