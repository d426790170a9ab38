"""Train a VQ-VAE on MRI slices and a prior over its indices.

    python train.py
        simulated brains, the whole chain, minutes on two CPU cores
    python train.py --recipe oasis-vqvae-pixelcnn --data-dir DIR
        one of the published systems, on a folder of its data set
    python train.py --stage prior --run-dir runs/NAME --prior-epochs 50
        another prior over the VQ-VAE of an earlier run
    python train.py --resume runs/NAME
        what is left of a training that was stopped or killed
    python train.py --list-recipes

The steps: images -> VQ-VAE -> indices -> prior -> samples -> evaluation. All
results go to one run folder.
"""

import functools
import sys

import numpy as np

import dataset
import utils

keras = utils.lazy_import("keras")
modules = utils.lazy_import("modules")
tf = utils.lazy_import("tensorflow")
pd = utils.lazy_import("pandas")

GRADIENT_NORM = 1.0  # longest gradient; longer ones are scaled down to it


def main(argv):
    """Train, encode and evaluate as the flags say."""
    config = utils.resolve(argv, description=__doc__)
    if config.smoke:
        config = config.smoked()
    with utils.StopSignals() as signals:
        run, splits = start(config)
        try:
            train(run, splits, signals)
        except utils.Stopped:
            print(f"go on with: python train.py --resume {run.path}")
            raise
        finally:
            run.unlock()


def start(config):
    """The run folder, locked, and the splits; a refused start leaves none.

    Returns: `Run`; dict of DataFrames, `train`, `validate`, `test`.
    """
    if config.resume:
        return resume(config)
    if config.stage == "prior":
        run = utils.Run.open(config.run_dir)
        utils.check_keras_file(run.vqvae_path)
        splits = utils.read_splits(run)
        run.info |= conditions(config, splits["train"], run.split_path)
        run.lock()
        run.begin(config)
        return run, splits
    run = utils.Run.create(config)
    try:
        return run, load_splits(run)
    except BaseException:
        run.discard()
        raise


def resume(config):
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
    if run.split_path.exists():
        return run, utils.read_splits(run)
    return run, load_splits(run)  # stopped before it had read the data


def train(run, splits, signals):
    """What is left to do of a run: VQ-VAE, indices, priors, evaluation."""
    config = run.config
    policy, reason = utils.choose_precision(config.precision)
    print(f"run folder {run.path}, precision {policy} ({reason})")
    keras.config.set_dtype_policy(policy)
    with dataset.naming_files():
        if not run.is_done("vqvae"):
            with signals.deferred():
                train_vqvae(run, splits, signals)
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
            train_priors(run, vqvae, indices, splits, signals)
            if all(path.exists() for path in run.prior_paths):
                priors = utils.load_priors(run, vqvae)
        finish(run, vqvae, priors, splits)
    run.complete()


def load_splits(run):
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
    return {name: index[index["split"] == name] for name in dataset.SPLITS}


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


def image_batches(run, frame, batch_size, **options):
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


def train_vqvae(run, splits, signals):
    """Train the VQ-VAE of a run and save it as `vqvae.keras`."""
    config = run.config
    utils.set_seed(config.seed)
    batch_size = min(config.batch_size, len(splits["train"]))
    images = functools.partial(
        image_batches,
        run,
        splits["train"],
        batch_size,
        seed=config.seed,
        epochs=config.epochs,
        cache=config.cache,
    )
    model = modules.VQVAE(
        image_size=run.info["image_size"],
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
        data_variance=data_variance(run, splits["train"]),
        seed=config.seed,
    )
    run.update(latent_grids=model.latent_grids)
    print(f"VQ-VAE: {model.count_params():,} weights, grids", end=" ")
    print(", ".join(utils.size_text(grid) for grid in model.latent_grids))
    validation = image_batches(
        run, splits["validate"], batch_size, cache=config.cache
    )
    fit(
        run,
        "vqvae",
        model,
        images,
        validation,
        epochs=config.epochs,
        images=len(splits["train"]),
        batch_size=batch_size,
        learning_rate=config.learning_rate,
        signals=signals,
    )
    utils.save_model(model, run.vqvae_path)
    run.note_done("vqvae")


def data_variance(run, frame, most=512):
    """Variance of the pixels of up to `most` images spread over `frame`."""
    images = image_batches(run, frame.iloc[utils.spread(len(frame), most)], 64)
    pixels = np.concatenate([batch.numpy() for batch in images])
    return float(pixels.var()) or 1.0


def encode_splits(run, vqvae, splits):
    """Indices of every image, in the order of the splits; `indices.npz`.

    Returns: dict by split of lists of `(N, h, w)` arrays, bottom first.
    """
    indices = {}
    for name, frame in splits.items():
        images = image_batches(run, frame, 32)
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


def train_priors(run, vqvae, indices, splits, signals):
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
        prior = new_prior(run, vqvae, level)
        print(f"{name}: {config.prior}, {prior.count_params():,} weights")
        data = {
            split: utils.prior_inputs(prior, grids, frames[split])
            for split, grids in indices.items()
        }
        with signals.deferred():
            train_prior(run, name, prior, data, signals)
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

        images = image_batches(run, frame, 32).enumerate().map(jittered)
        parts.append(modules.encode_dataset(vqvae, images))
    levels = [np.concatenate(level) for level in zip(*parts, strict=True)]
    return levels, pd.concat([frame] * len(parts), ignore_index=True)


def train_prior(run, name, prior, data, signals):
    """Train one prior on a dict of arrays for each split."""
    config = run.config
    images = len(data["train"]["indices"])
    batch_size = min(config.prior_batch_size, images)
    validation = None
    if "validate" in data:
        validation = dataset.array_batches(data["validate"], batch_size)
    fit(
        run,
        name,
        prior,
        functools.partial(
            dataset.array_batches,
            data["train"],
            batch_size,
            seed=config.seed,
            epochs=config.prior_epochs,
        ),
        validation,
        epochs=config.prior_epochs,
        images=images,
        batch_size=batch_size,
        learning_rate=config.prior_learning_rate,
        ema_momentum=config.prior_ema_momentum,
        best="val_bits_per_code" if validation else None,
        signals=signals,
    )


def fit(
    run,
    stage,
    model,
    batches,
    validation,
    *,
    epochs,
    images,
    batch_size,
    learning_rate,
    ema_momentum=0.0,
    best=None,
    signals,
):
    """Keras `fit` with the schedule, the history and the end of our runs.

    Args:
        batches: function of `start_step` that returns the dataset of the
            batches of all epochs from that one on.
        validation: dataset of one pass, or None.
        images: how many an epoch has.
        ema_momentum: validate and keep the moving average of the weights
            over steps, with this factor; 0 the weights themselves.
        best: name of a metric; the weights of the epoch where it was least
            are restored at the end.
        signals: `utils.StopSignals` that end the training.
    """
    config = run.config
    steps = dataset.steps_per_epoch(images, batch_size)
    if config.smoke:
        steps = min(steps, utils.SMOKE_STEPS)
    model.compile(
        optimizer=keras.optimizers.Adam(
            schedule(config, learning_rate, epochs * steps),
            global_clipnorm=GRADIENT_NORM,
            use_ema=ema_momentum > 0,
            ema_momentum=ema_momentum,
        ),
        jit_compile=False,
    )
    stopping = best and keras.callbacks.EarlyStopping(
        best, mode="min", patience=config.patience, restore_best_weights=True
    )
    checkpoint = modules.Checkpoint(
        run.checkpoint_path / stage,
        config.checkpoint_minutes,
        config.checkpoint_steps,
        stopping,
        signals,
    )
    images = min(images, steps * batch_size)
    callbacks = [
        # First, so that the others find the average.
        ema_momentum and keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
        modules.FiniteCheck(stage),
        history_log(run, stage, steps, images, checkpoint),
        stopping,
        checkpoint,
    ]
    print(f"training the {stage}: {epochs} epochs of {steps} steps", end="")
    done = checkpoint.steps_done(steps)
    print(f", {done} of them done" if done else "")
    model.fit(
        # Keras counts the steps done as well, so that it would take data of
        # known length for too short; nothing is ever repeated.
        batches(start_step=done).repeat(),
        initial_epoch=checkpoint.epoch,
        epochs=epochs,
        steps_per_epoch=steps,
        validation_data=validation,
        callbacks=list(filter(None, callbacks)),
        shuffle=False,
        verbose=utils.fit_verbosity(),
    )


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


def finish(run, vqvae, priors, splits):
    """Evaluate on the test subjects, draw the figures, print the summary."""
    images = image_batches(run, splits["test"], 32)
    evaluation = utils.evaluate(
        run,
        vqvae,
        priors,
        splits,
        images,
        modules.generate,
        dataset.ventricle_areas,
    )
    print(utils.summary_table(evaluation))
    print(f"figures in {run.figures_path}")


if __name__ == "__main__":
    utils.run_main(main)
