"""Train a VQ-VAE on MRI slices and a prior over its indices.

    python train.py
        simulated brains, the whole chain, minutes on two CPU cores
    python train.py --recipe oasis-vqvae-pixelcnn --data-dir DIR
        one of the published systems, on a folder of its data set
    python train.py --stage prior --run-dir runs/NAME --prior-epochs 50
        another prior over the VQ-VAE of an earlier run
    python train.py --list-recipes

The steps: images -> VQ-VAE -> indices -> prior -> samples -> evaluation. All
results go to one run folder.
"""

import shlex
import sys
import time

import numpy as np

import dataset
import utils

keras = utils.lazy_import("keras")
modules = utils.lazy_import("modules")
pd = utils.lazy_import("pandas")

GRADIENT_NORM = 1.0  # longest gradient; longer ones are scaled down to it


def main(argv):
    """Train, encode and evaluate as the flags say."""
    config = utils.resolve(argv, description=__doc__)
    if config.smoke:
        config = config.smoked()
    run, splits = start(config)
    policy, reason = utils.choose_precision(config.precision)
    print(f"run folder {run.path}, precision {policy} ({reason})")
    keras.config.set_dtype_policy(policy)
    with dataset.naming_files():
        if config.stage != "prior":
            train_vqvae(run, splits)
        vqvae = utils.load_model(run.vqvae_path)
        indices = encode_splits(run, vqvae, splits)
        priors = []
        if config.stage != "vqvae":
            train_prior(run, vqvae, indices, splits)
            priors = utils.load_priors(run, vqvae)
        finish(run, vqvae, priors, splits)


def start(config):
    """The run folder and the splits; a refused start leaves no folder.

    Returns: `Run`; dict of DataFrames, `train`, `validate`, `test`.
    """
    if config.stage == "prior":
        run = utils.Run.open(config.run_dir)
        utils.check_keras_file(run.vqvae_path)
        run.config = config
        return run, utils.read_splits(run)
    run = utils.Run.create(config)
    try:
        return run, load_splits(run)
    except BaseException:
        run.discard()
        raise


def load_splits(run):
    """Index of the slices of each split, checked; written to `split.csv`."""
    config = run.config
    root, layout = config.data_dir, config.dataset
    if layout == "phantom":
        root, layout = (
            dataset.simulated_folder(config.phantom_subjects),
            "oasis",
        )
    index = dataset.load_index(
        root, layout, skip_bad=config.skip_bad, image_size=config.image_size
    )
    size = config.image_size or dataset.native_size(index)
    utils.check_image_size(
        size,
        config.total_downsampling,
        "--image-size, by default that of the data",
    )
    if config.smoke:
        number = index.groupby("split").cumcount()
        index = index[number < utils.SMOKE_IMAGES]
    run.update(
        image_size=size,
        simulated=index.attrs["simulated"],
        intensity=dataset.INTENSITY_RULE,
        resize=config.resize,
    )
    utils.write_csv(run.split_path, index)
    return {name: index[index["split"] == name] for name in dataset.SPLITS}


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


def train_vqvae(run, splits):
    """Train the VQ-VAE of a run and save it as `vqvae.keras`."""
    config = run.config
    utils.set_seed(config.seed)
    batch_size = min(config.batch_size, len(splits["train"]))
    images = image_batches(
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
        decay=config.decay,
        restart_threshold=0.02 if config.restart else 0.0,
        ssim_weight=config.ssim_weight,
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
    )
    utils.save_model(model, run.vqvae_path)


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


def train_prior(run, vqvae, indices, splits):
    """Train the prior of a run and save it as `prior.keras`.

    The same whether the VQ-VAE was trained just before or in an earlier run.
    """
    config = run.config
    utils.set_seed(config.seed)
    model = modules.PRIORS[config.prior](
        num_embeddings=vqvae.num_embeddings,
        latent_grid=vqvae.latent_grids[0],
        channels=config.prior_channels,
        blocks=config.prior_blocks,
        kernel_size=config.prior_kernel_size,
        head_layers=config.prior_head_layers,
        dropout=config.prior_dropout,
        position_features=config.position_features,
        slice_condition="slice" in config.conditions,
        codebook_sha256=utils.codebook_sha256(vqvae, level=1),
    )
    print(f"{config.prior} prior: {model.count_params():,} weights")
    batch_size = min(config.prior_batch_size, len(splits["train"]))
    data = {
        name: utils.prior_inputs(model, indices[name], splits[name])
        for name in indices
    }
    validation = None
    if "validate" in data:
        validation = dataset.array_batches(data["validate"], batch_size)
    fit(
        run,
        "prior",
        model,
        dataset.array_batches(
            data["train"],
            batch_size,
            seed=config.seed,
            epochs=config.prior_epochs,
        ),
        validation,
        epochs=config.prior_epochs,
        images=len(splits["train"]),
        batch_size=batch_size,
        learning_rate=config.prior_learning_rate,
        best="val_bits_per_code" if validation else None,
    )
    utils.save_model(model, run.prior_path)
    if config.stage == "prior":
        run.update(prior_command=shlex.join(sys.argv))


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
    best=None,
):
    """Keras `fit` with the schedule, the history and the end of our runs.

    Args:
        batches: dataset of the batches of all epochs.
        validation: dataset of one pass, or None.
        images: how many an epoch has.
        best: name of a metric; the weights of the epoch where it was least
            are restored at the end.
    """
    config = run.config
    steps = dataset.steps_per_epoch(images, batch_size)
    if config.smoke:
        steps = min(steps, utils.SMOKE_STEPS)
    model.compile(
        optimizer=keras.optimizers.Adam(
            schedule(config, learning_rate, epochs * steps),
            global_clipnorm=GRADIENT_NORM,
        ),
        jit_compile=False,
    )
    images = min(images, steps * batch_size)
    callbacks = [history_log(run, stage, steps, images), finite_check(stage)]
    if best:
        callbacks.append(
            keras.callbacks.EarlyStopping(
                best,
                mode="min",
                patience=config.patience,
                restore_best_weights=True,
            )
        )
    print(f"training the {stage}: {epochs} epochs of {steps} steps")
    model.fit(
        batches,
        epochs=epochs,
        steps_per_epoch=steps,
        validation_data=validation,
        callbacks=callbacks,
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


def history_log(run, stage, steps, images):
    """Callback that adds a row an epoch to `history.csv`."""
    started = time.monotonic()
    rows = []
    if run.history_path.exists():
        earlier = utils.read_history(run)
        rows = earlier[earlier["stage"] != stage].to_dict("records")

    def add(epoch, logs):
        seconds = time.monotonic() - started
        row = {"stage": stage, "epoch": epoch + 1, "step": (epoch + 1) * steps}
        row |= {"images": (epoch + 1) * images, "seconds": round(seconds, 3)}
        rows.append({**row, **logs})
        utils.write_csv(run.history_path, pd.DataFrame(rows))

    return keras.callbacks.LambdaCallback(on_epoch_end=add)


def finite_check(stage):
    """Callback that ends the training once a loss or weight is not finite.

    A NaN in the data can leave every loss finite: ReLU may turn it into 0.
    """
    flag = "--learning-rate" if stage == "vqvae" else "--prior-learning-rate"

    def check(epoch, logs):
        bad = [k for k, value in logs.items() if not np.isfinite(value)]
        weights = callback.model.get_weights()
        if not all(np.isfinite(w).all() for w in weights):
            bad.append("weights")
        if bad:
            raise utils.NumericsError(
                f"{stage}: not finite after epoch {epoch + 1}: "
                f"{', '.join(bad)}; no model was saved, try a smaller {flag}"
            )

    callback = keras.callbacks.LambdaCallback(on_epoch_end=check)
    return callback


def finish(run, vqvae, priors, splits):
    """Evaluate on the test subjects, draw the figures, print the summary."""
    images = image_batches(run, splits["test"], 32)
    evaluation = utils.evaluate(
        run, vqvae, priors, splits, images, modules.generate
    )
    print(utils.summary_table(evaluation))
    print(f"figures in {run.figures_path}")


if __name__ == "__main__":
    utils.run_main(main)
