"""Train a VQ-VAE on MRI slices and a prior over its indices.

    python train.py
        simulated brains, the whole chain, minutes on two CPU cores
    python train.py --recipe oasis-vqvae-pixelcnn --data-dir DIR
        one of the published systems, on a folder of its data set
    python train.py --stage prior --run-dir runs/NAME --prior-epochs 50
        another prior over the VQ-VAE of an earlier run
    python train.py --resume runs/NAME
        what is left of a training that was stopped or killed
    python train.py --tune 30 --objective ssim+bits --epochs 5 --prior-epochs 5
        a search for settings, 30 trials; SSIM alone (--objective ssim) picks
        models that sample badly
    python train.py --list-recipes

The steps: images -> VQ-VAE -> indices -> prior -> samples -> evaluation. All
results go to one run folder.
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import shlex
import shutil
import sys
import tempfile
import typing
import warnings
from pathlib import Path

import numpy as np

import dataset
import predict
import utils

keras = utils.lazy_import("keras")
modules = utils.lazy_import("modules")
optuna = utils.lazy_import("optuna")
tf = utils.lazy_import("tensorflow")
pd = utils.lazy_import("pandas")

GRADIENT_NORM = 1.0  # longest gradient; longer ones are scaled down to it
NOT_COPIED = shutil.ignore_patterns(
    "run.lock", "figures", "logs", "samples", "*.tmp-*"
)
COUNTED = 16  # validation images whose codes TensorBoard counts
PICTURED = 4  # of these, images that it shows
DRAWN = 16  # samples that it shows
HEARTBEAT = 60  # seconds between signs of life of a trial


def main(argv):
    """Train, encode and evaluate as the flags say."""
    config = utils.resolve(argv, description=__doc__)
    # Before the signals: several workers come with a handler of SIGTERM.
    strategy = utils.choose_strategy(config.strategy, alone=config.tune > 0)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(utils.StopSignals())
        if config.tune:
            tune(config, argv, strategy, signals)
            return
        if config.smoke:
            config = config.smoked()
        if not utils.is_chief(strategy):
            config = stack.enter_context(beside_the_chief(config))
        utils.wait_for_workers(strategy)
        run, splits = start(config, strategy)
        try:
            train(run, splits, strategy, signals)
        except utils.Stopped:
            print(f"go on with: python train.py --resume {run.path}")
            raise
        finally:
            run.unlock()


@dataclasses.dataclass(frozen=True)
class Source:
    """What a stage trains on, or validates with.

    Attributes:
        count: int, images.
        batches: function of the batch size that returns a dataset; see
            `dataset.make_dataset` for its options.
    """

    count: int
    batches: typing.Callable


@contextlib.contextmanager
def beside_the_chief(config):
    """Settings of a worker that is not the chief, while it works.

    It does as the chief does, without a word, in a folder that it removes at
    the end: only the chief writes the run folder.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        name = "resume" if config.resume else "run_dir"
        own = os.path.join(folder, "run")
        if earlier := config.resume or (
            config.stage == "prior" and config.run_dir
        ):
            shutil.copytree(earlier, own, ignore=NOT_COPIED)
        yield dataclasses.replace(config, **{name: own})


def start(config, strategy):
    """The run folder, locked, and the splits; a refused start leaves none.

    Returns: `Run`; dict of DataFrames, `train`, `validate`, `test`.
    """
    if config.resume:
        return resume(config, strategy)
    if config.stage == "prior":
        run = utils.Run.open(config.run_dir)
        utils.check_keras_file(run.vqvae_path)
        splits = utils.read_splits(run)
        run.info |= conditions(config, splits["train"], run.split_path)
        check_parts(config, splits, strategy)
        run.lock()
        run.begin(config)
        return run, splits
    run = utils.Run.create(config)
    try:
        return run, load_splits(run, strategy)
    except BaseException:
        run.discard()
        raise


def check_parts(config, splits, strategy):
    """Refuse what replicas cannot do, and a batch with an empty part."""
    replicas = strategy.num_replicas_in_sync
    parts = replicas * config.accumulation_steps
    # Keras scales the loss, or compiles, around the replicas.
    for flag, refused in (
        ("--precision mixed_float16", config.precision == "mixed_float16"),
        ("--jit", config.jit),
    ):
        if refused and replicas > 1:
            raise utils.FlagError(
                f"{flag}: goes with one device only, found {replicas}; leave "
                "it out or use --strategy none"
            )
    if parts == 1:
        return
    images = len(splits["train"])
    grids = images * (1 + config.prior_augment)
    stages = [
        ("prior", "batch-size", images, config.batch_size),
        ("vqvae", "prior-batch-size", grids, config.prior_batch_size),
    ]
    for without, name, count, asked in stages:
        if config.stage == without:
            continue
        size = min(count, asked)
        fits = dataset.divisible_batch_size(count, size, parts)
        if fits != size:
            advice = f"use {fits}" if fits else "use fewer parts"
            raise utils.FlagError(
                f"--{name}: {asked} of {count} images cannot be cut into "
                f"{replicas} replicas x {config.accumulation_steps} "
                f"accumulation steps in every step of an epoch; {advice}"
            )
    if 0 < len(splits["validate"]) < replicas:
        raise utils.FlagError(
            f"--strategy: {replicas} replicas, but the validation split has "
            f"only {len(splits['validate'])} images"
        )


def resume(config, strategy):
    """The run whose training goes on, locked, and its splits."""
    run = utils.Run.open(config.resume)
    run.config = config
    run.lock()
    if "training" not in run.info:
        run.unlock()
        raise utils.FlagError(
            f"--resume: the training of {run.path} is complete; start another "
            "run, or another prior with --stage prior --run-dir"
        )
    try:
        if not run.split_path.exists():  # had not read the data yet
            return run, load_splits(run, strategy)
        splits = utils.read_splits(run)
        check_parts(config, splits, strategy)
        return run, splits
    except BaseException:
        run.unlock()
        raise


def train(run, splits, strategy, signals):
    """What is left to do of a run: models, evaluation."""
    with dataset.naming_files():
        vqvae, priors, _ = train_models(run, splits, strategy, signals)
        if run.config.evaluate and utils.is_chief(strategy):
            finish(run, vqvae, priors, splits)
        utils.wait_for_workers(strategy)  # the chief takes one gone for dead
    run.complete()


def train_models(run, splits, strategy, signals, *callbacks):
    """What is left to do of a run's models: VQ-VAE, indices, priors.

    Args:
        callbacks: further Keras callbacks of the VQ-VAE.

    Returns: `VQVAE`; its priors, bottom first; which codebooks collapsed,
        in words.
    """
    config = run.config
    policy, reason = utils.choose_precision(config.precision)
    print(f"run folder {run.path}, precision {policy} ({reason})")
    keras.config.set_dtype_policy(policy)
    if strategy.num_replicas_in_sync > 1:
        print(f"{strategy.num_replicas_in_sync} replicas share each batch")
    if not run.is_done("vqvae"):
        with signals.deferred():
            train_vqvae(run, splits, strategy, signals, *callbacks)
    vqvae = utils.load_model(run.vqvae_path)
    indices = encode_splits(run, vqvae, splits)
    collapsed = collapsed_levels(vqvae, indices["train"])
    priors = []
    if config.stage != "vqvae":
        if collapsed and not config.force:
            raise utils.RunError(
                f"{run.vqvae_path}: {collapsed}; a prior over it would "
                "draw one image again and again: train the VQ-VAE longer "
                "or with another --learning-rate, or insist with --force"
            )
        train_priors(run, vqvae, indices, splits, strategy, signals)
        if all(path.exists() for path in run.prior_paths):
            priors = utils.load_priors(run, vqvae)
    return vqvae, priors, collapsed


def load_splits(run, strategy):
    """Index of the slices of each split, checked; written to `split.csv`."""
    config = run.config
    root, layout = config.data_dir, config.dataset
    if layout == "phantom":
        layout = "oasis"
        root = dataset.simulated_folder(config.phantom_subjects)
    elif root is None:  # a recipe with --smoke
        # What the simulator makes; reading pads or crops to the size asked.
        size = min(max(32, *(config.image_size or (128,))), 1024)
        size = -(-size // 16) * 16
        root = dataset.simulated_folder(utils.SMOKE_SUBJECTS, layout, size)
    index = dataset.load_index(
        root, layout, skip_bad=config.skip_bad, image_size=config.image_size
    )
    rejected = index.attrs.pop("rejected")
    size = config.image_size or dataset.native_size(index)
    utils.check_image_size(
        size,
        config.total_downsampling,
        "--image-size, by default that of the data",
    )
    if config.smoke:
        count = index.groupby("split")["path"].transform("size")
        number = index.groupby("split").cumcount()
        # A few spread over the split: of several subjects and heights.
        stride = np.ceil(count / utils.SMOKE_IMAGES)
        index = index[number % stride == 0]
    splits = {name: index[index["split"] == name] for name in dataset.SPLITS}
    check_parts(config, splits, strategy)
    run.update(
        image_size=size,
        simulated=index.attrs["simulated"],
        intensity=dataset.INTENSITY_RULE,
        resize=config.resize,
        **conditions(config, index[index["split"] == "train"], root),
    )
    if len(rejected):
        utils.write_csv(run.rejected_path, rejected)
    utils.write_csv(run.split_path, index)
    return splits


def conditions(config, frame, source):
    """What a prior can be conditioned on: label map, range of the slices."""
    names = sorted(set(frame["label"]) - {""})
    if "label" in config.conditions and not names:
        raise utils.DataError(
            f"{source}: no image has a class label; leave label out of "
            "--condition"
        )
    return {
        "labels": {name: number for number, name in enumerate(names)},
        "slice_range": [int(frame["slice"].min()), int(frame["slice"].max())],
    }


def train_vqvae(run, splits, strategy, signals, *callbacks):
    """Train the VQ-VAE of a run and save it as `vqvae.keras`."""
    config = run.config
    utils.set_seed(config.seed)
    variance = data_variance(run, splits["train"])
    with strategy.scope():
        model = new_vqvae(config, run.info["image_size"], variance)
    run.update(latent_grids=model.latent_grids)
    print(f"VQ-VAE: {model.count_params():,} weights, grids", end=" ")
    print(", ".join(utils.size_text(grid) for grid in model.latent_grids))
    sources = [
        Source(
            len(splits[name]),
            functools.partial(
                predict.image_batches,
                run,
                splits[name],
                cache=config.cache,
            ),
        )
        for name in ("train", "validate")
    ]
    fit(
        run,
        "vqvae",
        model,
        *sources,
        strategy,
        signals,
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        draw=vqvae_pictures(run, model, splits["validate"]),
        callbacks=callbacks,
    )
    utils.save_model(model, run.vqvae_path)
    run.note_done("vqvae")


def new_vqvae(config, image_size, data_variance):
    """An untrained VQ-VAE."""
    return modules.VQVAE(
        image_size=image_size,
        levels=config.levels,
        downsampling=config.downsampling,
        channels=config.channels,
        residual_blocks=config.residual_blocks,
        residual_channels=config.residual_channels,
        num_embeddings=config.num_embeddings,
        embedding_dim=config.embedding_dim,
        commitment_cost=config.commitment_cost,
        codebook_update=config.codebook_update,
        codebook_distance=config.codebook_distance,
        decay=config.decay,
        restart_threshold=0.02 if config.restart else 0.0,
        ssim_weight=config.ssim_weight,
        upper_weight=config.upper_weight,
        data_variance=data_variance,
        seed=config.seed,
    )


def data_variance(run, frame, most=512):
    """Variance of the pixels of up to `most` images spread over `frame`."""
    rows = utils.spread(len(frame), most)
    return float(predict.read_all(run, frame.iloc[rows]).var()) or 1.0


def encode_splits(run, vqvae, splits):
    """Indices of every image, in the order of the splits; `indices.npz`.

    Returns: dict by split of lists of `(N, h, w)` arrays, bottom first.
    """
    indices = {}
    for name, frame in splits.items():
        images = predict.image_batches(run, frame)
        if images is not None:
            indices[name] = modules.encode_dataset(vqvae, images)
    arrays = {
        f"{name}_{level}": grid
        for name, levels in indices.items()
        for level, grid in enumerate(levels, start=1)
    }
    utils.write_atomic(
        run.indices_path, lambda path: np.savez_compressed(path, **arrays)
    )
    return indices


def collapsed_levels(vqvae, indices):
    """Say which codebooks are hardly used, with a warning; "" if none is.

    Args:
        indices: `(N, h, w)` array of each level, bottom first.
    """
    found = []
    for level, grids in enumerate(indices, start=1):
        stats = utils.codebook_stats(grids, vqvae.num_embeddings)
        used = round(stats["usage"] * vqvae.num_embeddings)
        if stats["usage"] < utils.LEAST_USAGE or used == 1:
            found.append(
                f"level {level} has collapsed: {used} of "
                f"{vqvae.num_embeddings} code vectors in use"
            )
    text = ", ".join(found)
    if text:
        print(f"warning: {text}", file=sys.stderr)
    return text


def train_priors(run, vqvae, indices, splits, strategy, signals):
    """Train the prior of each level and save it, `prior.keras` if only one.

    The same whether the VQ-VAE was trained just before or in an earlier run.
    """
    config = run.config
    frames = dict(splits)
    indices = dict(indices)
    indices["train"], frames["train"] = with_jittered_copies(
        run, vqvae, indices["train"], splits["train"]
    )
    for level, name in enumerate(run.prior_names, start=1):
        if config.prior_level not in (None, level) or run.is_done(name):
            continue
        utils.set_seed(config.seed)
        with strategy.scope():
            prior = new_prior(run, vqvae, level)
        prior.recompute = config.recompute
        print(f"{name}: {config.prior}, {prior.count_params():,} weights")
        data = {
            split: utils.prior_inputs(prior, grids, frames[split])
            for split, grids in indices.items()
        }
        draw = prior_pictures(run, vqvae, prior, level)
        with signals.deferred():
            train_prior(run, name, prior, data, strategy, signals, draw)
            utils.save_model(prior, run.path / f"{name}.keras")
            run.note_done(name)
    if config.stage == "prior":
        run.update(prior_command=run.info["training"]["command"])


def new_prior(run, vqvae, level):
    """An untrained prior for a level, told of the levels above."""
    config = run.config
    labels = run.info["labels"] if "label" in config.conditions else ()
    options = {}
    if config.prior == "pixelsnail":
        attended = {"none": (), "top": (vqvae.levels,), "all": (1, 2, 3)}
        options["attention"] = level in attended[config.prior_attention]
        options["heads"] = utils.ATTENTION_HEADS
    return modules.PRIORS[config.prior](
        num_embeddings=vqvae.num_embeddings,
        latent_grid=vqvae.latent_grids[level - 1],
        channels=config.prior_channels,
        blocks=config.prior_blocks,
        kernel_size=config.prior_kernel_size,
        head_layers=config.prior_head_layers,
        dropout=config.prior_dropout,
        position_features=config.position_features,
        slice_condition="slice" in config.conditions,
        labels=tuple(labels),
        upper_grids=vqvae.latent_grids[level:],
        condition_dropout=config.condition_dropout,
        codebook_sha256=utils.codebook_sha256(vqvae, level),
        **options,
    )


def with_jittered_copies(run, vqvae, indices, frame):
    """Indices and table of the training images and of jittered copies.

    A prior soon knows a few thousand grids by heart; the same slices moved
    by a few pixels or made brighter have other grids.
    """
    seed, parts = run.config.seed, [indices]
    for copy in range(1, run.config.prior_augment + 1):
        first = copy * len(frame)

        def jittered(batch, images, first=first):
            rows = tf.range(tf.shape(images, tf.int64)[0])
            return dataset.jitter(images, seed, first + 32 * batch + rows)

        images = predict.image_batches(run, frame).enumerate().map(jittered)
        parts.append(modules.encode_dataset(vqvae, images))
    levels = [np.concatenate(level) for level in zip(*parts, strict=True)]
    return levels, pd.concat([frame] * len(parts), ignore_index=True)


def train_prior(run, name, prior, data, strategy, signals, draw=None):
    """Train one prior on a dict of arrays for each split."""
    config = run.config
    sources = [
        Source(
            len(data[split]["indices"]) if split in data else 0,
            functools.partial(dataset.array_batches, data.get(split)),
        )
        for split in ("train", "validate")
    ]
    fit(
        run,
        name,
        prior,
        *sources,
        strategy,
        signals,
        epochs=config.prior_epochs,
        batch_size=config.prior_batch_size,
        learning_rate=config.prior_learning_rate,
        ema_momentum=config.prior_ema_momentum,
        best="val_bits_per_code",
        draw=draw,
    )


def fit(
    run,
    stage,
    model,
    training,
    validation,
    strategy,
    signals,
    *,
    epochs,
    batch_size,
    learning_rate,
    ema_momentum=0.0,
    best=None,
    draw=None,
    callbacks=(),
):
    """Keras `fit` with the schedule, the history and the end of our runs.

    Args:
        training, validation: `Source`; of no images to go without validation.
        strategy: of `tf.distribute`, under which the model was made.
        signals: `utils.StopSignals` that end the training.
        batch_size: images a step, of all replicas together.
        ema_momentum: validate and keep the moving average of the weights
            over steps, with this factor; 0 the weights themselves.
        best: name of a metric of the validation; the weights of the epoch
            where it was least are restored at the end.
        draw: function that logs pictures for TensorBoard, or None.
        callbacks: further ones, which find what is logged of an epoch.
    """
    config = run.config
    batch_size = min(batch_size, training.count)
    steps = dataset.steps_per_epoch(training.count, batch_size)
    if config.smoke:
        steps = min(steps, utils.SMOKE_STEPS)
    with strategy.scope():
        model.compile(
            optimizer=keras.optimizers.Adam(
                schedule(config, learning_rate, epochs * steps),
                global_clipnorm=GRADIENT_NORM,
                use_ema=ema_momentum > 0,
                ema_momentum=ema_momentum,
            ),
            jit_compile=config.jit,
        )
    model.accumulation_steps = config.accumulation_steps
    stopping = (best and validation.count) and keras.callbacks.EarlyStopping(
        best, mode="min", patience=config.patience, restore_best_weights=True
    )
    checkpoint = modules.Checkpoint(
        run.checkpoint_path / stage,
        config.checkpoint_minutes,
        config.checkpoint_steps,
        stopping,
        signals,
    )
    images = min(training.count, steps * batch_size)
    callbacks = [
        # First, so that the others find the average.
        ema_momentum and keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
        modules.FiniteCheck(stage),
        history_log(run, stage, steps, images, checkpoint),
        stopping,
        utils.is_chief(strategy)
        and modules.TensorBoardLog(
            run.logs_path / stage,
            checkpoint.epoch,
            config.picture_epochs,
            draw,
        ),
        *callbacks,
        checkpoint,
    ]
    print(f"training the {stage}: {epochs} epochs of {steps} steps", end="")
    done = checkpoint.steps_done(steps)
    print(f", {done} of them done" if done else "")

    def batches(**parts):
        ordered = training.batches(
            batch_size,
            seed=config.seed,
            epochs=epochs,
            start_step=done,
            **parts,
        )
        # Keras counts the steps done as well, so that it would take data of
        # known length for too short; nothing is ever repeated.
        return ordered.repeat()

    model.fit(
        dataset.distributed(strategy, batches),
        initial_epoch=checkpoint.epoch,
        epochs=epochs,
        steps_per_epoch=steps,
        **validation_batches(validation, batch_size, strategy),
        callbacks=list(filter(None, callbacks)),
        shuffle=False,
        verbose=utils.fit_verbosity(),
    )


def validation_batches(source, batch_size, strategy):
    """Arguments of `fit` to validate on `source`; none without images."""
    if not source.count:
        return {}
    size = dataset.divisible_batch_size(
        source.count, batch_size, strategy.num_replicas_in_sync
    )
    size = size or source.count  # tiny batches may leave a remainder
    return {
        "validation_data": dataset.distributed(
            strategy, lambda **parts: source.batches(size, **parts).repeat()
        ),
        "validation_steps": dataset.steps_per_epoch(source.count, size),
    }


def schedule(config, learning_rate, steps):
    """Linear warm-up, then cosine decay to zero, or constant."""
    warmup = min(config.warmup_steps, steps // 2)
    return keras.optimizers.schedules.CosineDecay(
        0.0 if warmup else learning_rate,
        decay_steps=max(steps - warmup, 1),
        alpha=0.0 if config.schedule == "cosine" else 1.0,
        warmup_target=learning_rate if warmup else None,
        warmup_steps=warmup,
    )


def history_log(run, stage, steps, images, checkpoint):
    """Callback that adds a row an epoch to `history.csv`."""
    rows = []
    if run.history_path.exists():
        earlier = utils.read_history(run)
        kept = earlier["stage"] != stage
        kept |= earlier["epoch"] <= checkpoint.epoch
        rows = earlier[kept].to_dict("records")

    def add(epoch, logs):
        row = {"stage": stage, "epoch": epoch + 1, "step": (epoch + 1) * steps}
        row["images"] = (epoch + 1) * images
        row["seconds"] = round(checkpoint.seconds, 3)
        rows.append({**row, **logs})
        utils.write_csv(run.history_path, pd.DataFrame(rows))

    return keras.callbacks.LambdaCallback(on_epoch_end=add)


def vqvae_pictures(run, vqvae, frame):
    """Function that shows TensorBoard what a VQ-VAE makes of some images.

    Reconstructions, index maps, a histogram of the codes, the codebooks.

    Args:
        frame: index of the validation images. None is returned without any.
    """
    if frame.empty:
        return None
    frame = frame.iloc[utils.spread(len(frame), COUNTED)]
    rows = utils.spread(len(frame), PICTURED)
    size, levels = vqvae.num_embeddings, range(1, vqvae.levels + 1)

    @functools.cache
    def images():
        return predict.read_all(run, frame)

    def draw():
        indices, shown = vqvae.encode(images()), images()[rows]
        maps = [grid.numpy()[rows] for grid in indices]
        decoded = vqvae.decode_indices(maps).numpy()
        utils.log_figure(
            "reconstructions",
            utils.figure_reconstructions,
            shown,
            decoded,
            utils.ssim(shown, decoded).numpy(),
        )
        utils.log_figure("indices", utils.figure_index_maps, shown, maps, size)
        for level, grid in enumerate(indices, start=1):
            tf.summary.histogram(f"codes_{level}", grid, buckets=min(size, 64))
        utils.write_projector(
            run.logs_path / "vqvae" / "pictures",
            [vqvae.part("quantizer", k).codebook.numpy() for k in levels],
            [utils.codebook_stats(grid, size)["counts"] for grid in indices],
        )

    return draw


def prior_pictures(run, vqvae, prior, level):
    """Function that shows TensorBoard new images; None while levels lack."""
    others = [name for name in run.prior_names if run.is_done(name)]
    if len(others) < vqvae.levels - 1:
        return None
    priors = [
        prior if k == level else utils.load_model(path)
        for k, path in enumerate(run.prior_paths, start=1)
    ]
    about = {"seed": run.config.seed, "temperature": run.config.temperature}

    def draw():
        images, _ = modules.generate(vqvae, priors, DRAWN, **about)
        utils.log_figure("samples", utils.draw_samples, images, *about.values())

    return draw


def finish(run, vqvae, priors, splits):
    """Evaluate on the test subjects, draw the figures, print the summary."""
    evaluation = predict.evaluate_run(run, vqvae, priors, splits)
    predict.print_results(run, evaluation)


# === Search for settings ===


def tune(config, argv, strategy, signals):
    """Add trials to a search until it has tried as much as asked for.

    The search is a folder: `study.db` of Optuna, which hands out the trials
    also to several processes; `trials.csv`, figures, and in `trials` the run
    folder of each trial. Test images have no part in it.
    """
    space = search_space(config, utils.read_flags(argv))
    folder = search_folder(config)
    with open_study(folder, config, space) as study:

        def report():
            report_trials(study, folder, config.objective, space)

        def is_done():
            return len(study.get_trials(False, tried())) >= config.tune

        def after_trial(*_):
            report()
            if is_done():
                study.stop()

        objective = functools.partial(
            try_settings, study, config, space, folder, strategy, signals
        )
        try:
            if not is_done():
                study.optimize(objective, callbacks=[after_trial])
        except utils.Stopped:
            report()
            again = [] if config.run_dir else ["--run-dir", str(folder)]
            command = shlex.join(["python", "train.py", *argv, *again])
            print(f"go on with: {command}")
            raise
        print_best(study, folder, config)


def search_folder(config):
    """Folder of a search, made if it is new.

    Raises:
        RunError: if it holds something else.
    """
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = Path(config.run_dir or f"runs/{config.recipe}-tune-{now}")
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()) and not study_path(path).exists():
        raise utils.RunError(
            f"{path}: neither empty nor the folder of a search; choose "
            "another with --run-dir"
        )
    return path


def study_path(folder):
    """File of the Optuna study of a search."""
    return Path(folder) / "study.db"


def search_space(config, given):
    """What a search varies: {name: bounds or choices}.

    Args:
        given: names of the flags on the command line, which stay as they are.
    """
    space = utils.RECIPES[config.recipe].search or utils.SEARCH_SPACE
    space = {
        name: how
        for name, how in space.items()
        if name not in given
        and (config.objective == "ssim+bits" or not name.startswith("prior"))
    }
    if not space:
        raise utils.FlagError("--tune: the flags given leave nothing to search")
    return space


def search_settings(config, space):
    """What one search is done with: settings that stay, and its space."""
    changing = ("tune", "run_dir", *utils.OF_COMMAND, *space)
    stay = {k: v for k, v in vars(config).items() if k not in changing}
    return {**stay, "space": space}


def check_same_search(folder, earlier, settings):
    """Raise `FlagError` if two `search_settings` differ."""
    for name in [*settings, *earlier]:
        if name == "space" or earlier.get(name, "") == settings.get(name, ""):
            continue
        values = [
            utils.typed(some[name]) if name in some else "varied values"
            for some in (earlier, settings)
        ]
        raise utils.FlagError(
            f"--{name.replace('_', '-')}: the search in {folder} has "
            f"{values[0]}, found {values[1]}; search in another --run-dir"
        )
    if earlier["space"] != settings["space"]:
        raise utils.FlagError(
            f"--run-dir: the search in {folder} varies other settings; choose "
            "another folder"
        )


def usual_values(config, space):
    """Settings of a recipe, as far as its search may try them."""

    def allowed(value, how):
        if "choices" in how:
            return value in how["choices"]
        return how["low"] <= value <= how["high"]

    values = {name: getattr(config, name) for name in space}
    return {k: v for k, v in values.items() if allowed(v, space[k])}


def tried():
    """States of a trial that came to an end by itself."""
    return optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED


def sampler(seed):
    """Optuna's TPE, whose random numbers are of a trial's number.

    So a search that was interrupted goes on as it would have, and processes
    that share one do not try the same.
    """

    class Sampler(optuna.samplers.TPESampler):
        def before_trial(self, study, trial):
            self.__init__(seed=seed + trial.number)
            super().before_trial(study, trial)

    return Sampler(seed=seed)


@contextlib.contextmanager
def open_study(folder, config, space):
    """The Optuna study of a search, new or as it was left.

    The first trial of a new one has the settings of the recipe.

    Raises:
        utils.FlagError: if it searches for something else.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings(), utils.turn(folder):
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{study_path(folder)}",
            {"connect_args": {"timeout": HEARTBEAT}},
            heartbeat_interval=HEARTBEAT,
            # What a killed process tried is tried again.
            heartbeat_stale_trial_callback=(
                optuna.storages.RetryHeartbeatStaleTrialCallback()
            ),
        )
        study = optuna.create_study(
            storage=storage,
            study_name="search",
            directions=list(utils.OBJECTIVES[config.objective].values()),
            load_if_exists=True,
            sampler=sampler(config.seed),
            pruner=optuna.pruners.MedianPruner(n_warmup_steps=2),
        )
        settings = json.loads(json.dumps(search_settings(config, space)))
        if "settings" not in study.user_attrs:
            study.set_user_attr("settings", settings)
            study.enqueue_trial(usual_values(config, space))
    try:
        check_same_search(folder, study.user_attrs["settings"], settings)
        yield study
    finally:
        storage.engine.dispose()


def try_settings(study, config, space, folder, strategy, signals, trial):
    """The objective of a search: train with settings that Optuna suggests.

    What refuses to be trained or diverges is a trial that ended early. One
    that a signal stops has failed, and will be tried again.

    Returns: list of the values of `utils.OBJECTIVES`.
    """
    values = {name: suggest(trial, name, how) for name, how in space.items()}
    name = f"trials/{trial.number:04d}"
    trial.set_user_attr("run", name)
    text = ", ".join(f"{k} {short(v)}" for k, v in values.items())
    print(f"trial {trial.number}: {text}")
    keras.utils.clear_session()
    try:
        settings = dataclasses.replace(
            config,
            **values,
            tune=0,
            stage="vqvae" if config.objective == "ssim" else "all",
            run_dir=str(folder / name),
        )
        if config.smoke:
            settings = settings.smoked()
        return train_trial(settings, strategy, signals, trial)
    except (
        optuna.TrialPruned,
        utils.FlagError,
        utils.RunError,
        utils.NumericsError,
        tf.errors.ResourceExhaustedError,
    ) as error:
        note = " ".join(str(error).split())
        trial.set_user_attr("note", note)
        print(f"trial {trial.number} ended early: {note}")
        raise optuna.TrialPruned(note) from error
    except utils.Stopped as stopped:
        trial.set_user_attr("note", str(stopped))
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params)
        raise


def suggest(trial, name, how):
    """Value of a setting, as `utils.SEARCH_SPACE` says."""
    if "choices" in how:
        return trial.suggest_categorical(name, how["choices"])
    if isinstance(how["low"], int):
        return trial.suggest_int(name, **how)
    return trial.suggest_float(name, **how)


def train_trial(config, strategy, signals, trial):
    """Train the run of a trial without its test; the values it is judged by."""
    run, splits = start(config, strategy)
    try:
        del splits["test"]
        if splits["validate"].empty:
            raise utils.DataError(
                "--tune: there are no validation images to choose by"
            )
        callbacks = [pruning(trial)] if config.objective == "ssim" else []
        with dataset.naming_files():
            _, _, collapsed = train_models(
                run, splits, strategy, signals, *callbacks
            )
        if collapsed:
            raise utils.RunError(f"{run.vqvae_path}: {collapsed}")
        run.complete()
    finally:
        run.unlock()
    return objective_values(run)


def pruning(trial):
    """Callback that ends a trial which falls behind the others."""

    def report(epoch, logs):
        trial.report(logs["val_ssim"], epoch + 1)
        if trial.should_prune():
            raise optuna.TrialPruned(
                f"validation SSIM {logs['val_ssim']:.4f} after epoch "
                f"{epoch + 1} is below the median of the trials before"
            )

    return keras.callbacks.LambdaCallback(on_epoch_end=report)


def objective_values(run):
    """Values by which a trial is judged, in the order of `OBJECTIVES`.

    Of the weights that the run kept: of the last epoch of the VQ-VAE, of the
    best epoch of each prior.
    """
    history = utils.read_history(run)
    stages = history.groupby("stage")
    values = [float(stages.get_group("vqvae")["val_ssim"].iloc[-1])]
    if run.config.objective == "ssim+bits":
        bits = [
            stages.get_group(name)["val_bits_per_code"].min()
            for name in run.prior_names
        ]
        sizes = [h * w for h, w in run.info["latent_grids"]]
        values.append(float(np.dot(bits, sizes)))
    return values


def report_trials(study, folder, objective, space):
    """Write `trials.csv` and the figures of a search."""
    objectives = list(utils.OBJECTIVES[objective])
    best = {trial.number for trial in study.best_trials}
    rows = [
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            **{name: trial.params.get(name) for name in space},
            **dict(zip(objectives, trial.values or (), strict=False)),
            "seconds": trial.duration and trial.duration.total_seconds(),
            "best": trial.number in best,
            **{key: trial.user_attrs.get(key) for key in ("run", "note")},
        }
        for trial in study.trials
    ]
    columns = ["number", "state", *space, *objectives]
    columns += ["seconds", "best", "run", "note"]
    table = pd.DataFrame(rows, columns=columns)
    utils.write_csv(folder / "trials.csv", table)
    draw_search(folder / "figures", table, objective, space)


def draw_search(folder, table, objective, space):
    """Draw the figures of a search from the table of its trials."""
    names = list(utils.OBJECTIVES[objective])
    done = table[table["state"] == "complete"]
    if done.empty:
        return
    utils.figure_slices(folder / "tuning_slices.png", done, names, space)
    if len(names) == 1:
        utils.figure_search(folder / "tuning_history.png", table, *names)
    else:
        utils.figure_pareto(folder / "tuning_pareto.png", done, *names)


def short(value):
    """Return a setting as a person would write it."""
    return f"{value:.3g}" if isinstance(value, float) else utils.typed(value)


def print_best(study, folder, config):
    """Say which trials were best, and how each is trained in full."""
    best = sorted(study.best_trials, key=lambda trial: -trial.values[0])
    if not best:
        raise utils.RunError(
            f"{folder}: no trial came to its end; see the column note of "
            "trials.csv there"
        )
    print(f"search in {folder}; in full, as long as the recipe says, with:")
    for trial in best:
        values = zip(
            utils.OBJECTIVES[config.objective], trial.values, strict=True
        )
        text = ", ".join(f"{name} {value:.4g}" for name, value in values)
        print(f"trial {trial.number}: {text.replace('_', ' ')}")
        settings = dataclasses.replace(config, **trial.params)
        print(f"    {command_line(settings)}")


# Settings that a search has and the training of its best trial has not.
_OF_SEARCH = (
    "recipe",
    "tune",
    "objective",
    "run_dir",
    "smoke",
    "epochs",
    "prior_epochs",
)


def command_line(config):
    """Command that trains a trial in full: what differs from the recipe."""
    usual = utils.RECIPES[config.recipe].settings
    words = ["python", "train.py", "--recipe", config.recipe]
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), utils.flag_name(field)
        if field.name in _OF_SEARCH or value == usual.get(
            field.name, field.default
        ):
            continue
        if isinstance(value, bool):
            words.append(name if value else f"--no-{name[2:]}")
        else:
            words += [name, utils.typed(value)]
    return shlex.join(words)


if __name__ == "__main__":
    utils.run_main(main)
