"""Tests of modules.py."""

import functools
import itertools
import json
import signal
import types
import zipfile

import keras
import numpy as np
import pandas as pd
import pytest
import scipy.ndimage
import scipy.special
import scipy.stats
import tensorflow as tf

import modules
import utils

# A prior class is tested by adding it there, and to `MODELS` below.
NETWORKS = modules.PRIORS
LABELS = ("NC", "AD")
CONTEXT = {"position_features": True, "slice_condition": True, "atlas": 4}
CONTEXT |= {"labels": LABELS, "condition_dropout": 0.0}
LOWER = CONTEXT | {"latent_grid": (4, 8), "upper_grids": ((2, 4), (1, 2))}
# Without conditions; with those of a lower level, and in mixed precision.
KINDS = {"alone": ("float32", {}), "lower": ("mixed_bfloat16", LOWER)}
PRIORS = [("pixelcnn", "alone"), *itertools.product(NETWORKS, ["lower"])]
SMALL_VQVAE = {"downsampling": 2, "channels": 8, "residual_blocks": 1}
SMALL_VQVAE |= {"residual_channels": 4, "num_embeddings": 8, "embedding_dim": 4}
SMALL_PRIOR = {"num_embeddings": 5, "latent_grid": (3, 5), "channels": 8}
SMALL_PRIOR |= {"blocks": 2, "kernel_size": 5, "head_layers": 1}


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")


def tiny_vqvae(image_size=(16, 16), **settings):
    return modules.VQVAE(image_size, **(SMALL_VQVAE | settings))


def tiny_prior(network="pixelcnn", **settings):
    return NETWORKS[network](**(SMALL_PRIOR | settings))


def noise(*shape, seed=0, scale=1.0, offset=0.0):
    values = np.random.default_rng(seed).normal(size=shape)
    return (offset + scale * values).astype("float32")


def blocky_images(n, height=16, width=16, seed=0):
    """Images `(n, height, width, 1)` in [0, 1] of flat 4x4 squares."""
    squares = np.random.default_rng(seed).random((n, height // 4, width // 4))
    return np.kron(squares, np.ones((4, 4))).astype("float32")[..., None]


def perturb(layer, scale=0.3):
    """Move every weight off its first value; the context of a prior gently."""
    rng = np.random.default_rng(0)
    context = getattr(layer, "context", None)
    gentle = {id(weight) for weight in context.weights} if context else ()
    for weight in layer.weights:
        if weight.dtype == "int32":
            weight.assign(weight + 3)
            continue
        change = scale * rng.normal(size=weight.shape).astype("float32")
        if weight.name == "ema_count":  # counts of latents are positive
            change = np.abs(change)
        if id(weight) in gentle:
            named = weight.name in ("embeddings", "no_slice")
            change *= (1.0 if named else 0.05) / scale
        weight.assign(weight + change)


def assert_all_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def reload(model, path):
    model.save(path)
    # Other initial values than those of `model`, so that a weight that was
    # not saved differs.
    keras.utils.set_random_seed(1234)
    return keras.models.load_model(path, safe_mode=True)


def conditions(prior, n, seed=0):
    """Conditions of `prior` for `n` images, as arguments of a call."""
    rng = np.random.default_rng((seed, 1))
    given = {}
    if prior.upper_grids:
        given["upper"] = tuple(
            rng.integers(prior.num_embeddings, size=(n, *grid)).astype("int32")
            for grid in prior.upper_grids
        )
    if prior.labels:
        given["label"] = (np.arange(n, dtype="int32") + seed) % 2
    if prior.slice_condition:
        given["slice_position"] = rng.random(n)  # float64, as of a table
    return given


def rows_of(given, rows):
    return tf.nest.map_structure(lambda values: values[rows], given)


def request(prior, given):
    """`conditions` as arguments of `sample`: labels by name."""
    if "label" not in given:
        return given
    return given | {"label": [prior.labels[k] for k in given["label"]]}


def prior_batch(prior, n, seed=0):
    rng = np.random.default_rng(seed)
    shape = (n, *prior.latent_grid)
    indices = rng.integers(prior.num_embeddings, size=shape).astype("int32")
    return {"indices": indices, **conditions(prior, n, seed)}


def batches_of(batches):
    parts = map(tf.data.Dataset.from_tensors, batches)
    return functools.reduce(tf.data.Dataset.concatenate, parts)


def train(model, batches, repeat=1, optimizer=None, **options):
    """Metrics of an epoch over batches; eager, as tracing takes seconds."""
    if optimizer or not model.compiled:
        optimizer = optimizer or keras.optimizers.Adam(0.01)
        options = {"run_eagerly": True, "jit_compile": False} | options
        model.compile(optimizer, **options)
    data = batches_of(batches).repeat(repeat)
    history = model.fit(data, shuffle=False, verbose=0).history
    return {name: value for name, [value] in history.items()}


def evaluate(model, *batches):
    if not model.compiled:
        model.compile(run_eagerly=True)
    return model.evaluate(batches_of(batches), verbose=0, return_dict=True)


# Every model, in one way

IMAGES = blocky_images(2)
INDICES = np.arange(64, dtype="int32").reshape(2, 4, 8) % 5
POSITIONS = np.array([0.2, 0.9], "float32")
NUMBERS = np.array([1, -1], "int32")  # of labels, the second null
UPPER = [INDICES[:, :2, :4], INDICES[:, 2:3, 1:3]]
GIVEN = (INDICES, UPPER, NUMBERS, POSITIONS)
GRADIENT = {"codebook_update": "gradient"}
VQ = SMALL_VQVAE | {"image_size": (16, 16), "data_variance": np.float32(1)}
BOX = VQ | {"crop": (2, 0, 12, 16), "mask_weight": 0.5}
PLAIN = SMALL_PRIOR | {"latent_grid": (4, 8), "blocks": 1}
FULL = PLAIN | LOWER | {"condition_dropout": 0.3, "dropout": 0.1}
# Mix, place, slice and its null, atlas, labels; codes above, two units, split.
ABOVE = 2 + 2 + 3 + 3 + 1 + 1 + 8 + 2
# Name: class, arguments, inputs, trainable weights, others. A convolution or
# Dense has two, a residual unit two of them.
M = modules
MODELS = {
    # A level: encoder 8, projection 2, decoder 8; above the first a preview.
    "vqvae": (M.VQVAE, BOX, [IMAGES], 18, 4),
    "vqvae-g": (M.VQVAE, VQ | GRADIENT | {"levels": 2}, [IMAGES], 40, 6),
    "vqvae-3": (M.VQVAE, VQ | {"levels": 3, "seed": 3}, [IMAGES], 58, 12),
    # Embedding, stem, blocks, head, logits; with conditions the context map.
    "pixelcnn": (M.PixelCNN, PLAIN, [INDICES], 1 + 2 + 6 + 4, 0),
    "pixelcnn-lower": (M.PixelCNN, FULL, GIVEN, 1 + 2 + 8 + 4 + ABOVE, 0),
    "gated": (M.GatedPixelCNN, PLAIN, [INDICES], 1 + 8 + 8 + 4, 0),
    "snail-lower": (M.PixelSNAIL, FULL, GIVEN, 1 + 18 + 8 + 4 + ABOVE, 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(name, tmp_path):
    """Prevents: a model that cannot be saved, or a weight without gradient."""
    cls, kwargs, inputs, trainable, frozen = MODELS[name]
    model = cls(**kwargs)
    config = model.get_config()
    assert {name: config[name] for name in kwargs} == kwargs
    output = model(*inputs)
    symbols = tf.nest.map_structure(
        lambda x: keras.Input(x.shape[1:], dtype=str(x.dtype)), list(inputs)
    )
    symbolic = model(*symbols)
    assert symbolic.shape[1:] == output.shape[1:]
    assert symbolic.dtype == output.dtype.name == "float32"
    assert len(model.trainable_weights) == trainable
    assert len(model.non_trainable_weights) == frozen

    perturb(model)
    expected = model(*inputs)
    opened = reload(model, tmp_path / "model.keras")
    assert type(opened) is cls
    assert json.dumps(opened.get_config()) == json.dumps(config)
    assert_all_equal(opened.get_weights(), model.get_weights())
    np.testing.assert_array_equal(opened(*inputs), expected)
    with tf.GradientTape() as tape:
        if cls is modules.VQVAE:
            loss = model._batch_loss(inputs[0], training=True)
        else:
            loss = tf.reduce_mean(model(*inputs, training=True) ** 2)
    gradients = tape.gradient(loss, model.trainable_variables)
    assert all(gradient is not None for gradient in gradients)
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = cls(**kwargs)
    output = model(*inputs)
    keras.config.set_dtype_policy("float32")
    assert np.isfinite(output).all()
    assert {w.dtype for w in model.trainable_weights} <= {"float32"}
    for part in model._flatten_layers():
        exact = isinstance(part, modules.VectorQuantizer)
        exact |= part.name == "preview" or part is getattr(model, "logits", 0)
        assert part.compute_dtype == ("float32" if exact else "bfloat16")
    # Opened where the policy is another, as by predict.py: the same.
    opened = reload(model, tmp_path / "mixed.keras")
    np.testing.assert_array_equal(opened(*inputs), output)


# Vector quantizer


def quantizer_with(codebook, count=1.0, step=100, **settings):
    """Quantizer in a given state; step 100 is past the data start."""
    codebook = np.asarray(codebook, "float32")
    size, dim = codebook.shape
    quantizer = new_quantizer(size, dim, **settings)
    quantizer.build((None, dim))
    count = np.broadcast_to(np.float32(count), size)
    quantizer.codebook.assign(codebook)
    quantizer.ema_count.assign(count)
    quantizer.ema_sum.assign(codebook * count[:, None])
    quantizer.step.assign(step)
    return quantizer


def new_quantizer(size, dim, **settings):
    settings |= {"num_embeddings": size, "embedding_dim": dim}
    return modules.VectorQuantizer(**settings)


def row_in(row, rows):
    return any(np.array_equal(row, other) for other in rows)


@pytest.mark.parametrize("offset", [0, 100])
def test_nearest_neighbour_of_numpy(offset):
    """Prevents: a wrong neighbour by cancellation far from the origin."""
    latents = noise(10, 10, 10, 4, offset=offset)
    codebook = noise(64, 4, seed=1, offset=offset)
    quantizer = quantizer_with(codebook)
    quantized, indices = quantizer(latents)

    flat = latents.reshape(-1, 1, 4).astype("float64")
    distances = ((flat - codebook.astype("float64")) ** 2).sum(-1)
    ranked = np.sort(distances, axis=1)
    # Distances reach 40, so float32 tells them apart to about 40 * 2**-23;
    # without moving the origin the error would be 1e-2 at offset 100.
    clear = ranked[:, 1] - ranked[:, 0] > 1e-4
    assert clear.mean() > 0.99
    found = indices.numpy().ravel()
    np.testing.assert_array_equal(found[clear], distances.argmin(axis=1)[clear])
    # `z + (e - z)` is rounded to the spacing of floats near the offset.
    flat = quantized.numpy().reshape(-1, 4)
    np.testing.assert_allclose(flat, codebook[found], rtol=0, atol=2e-5)
    # Code vectors have their own indices.
    again = quantizer(quantizer.lookup(indices))[1]
    np.testing.assert_array_equal(again, indices)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_state_moves_only_in_training(update):
    """Prevents: evaluation that changes the codebook it measures."""
    quantizer = quantizer_with(noise(8, 4), codebook_update=update)
    latents = noise(5, 4, seed=1)
    before = quantizer.get_weights()
    for flag in ({}, {"training": False}):
        quantizer(latents, **flag)
        assert_all_equal(quantizer.get_weights(), before)
    quantizer(latents, training=True)
    assert quantizer.step.numpy() == 101
    pairs = zip(quantizer.weights, before, strict=True)
    names = {w.name for w, old in pairs if np.any(w.numpy() != old)}
    moved = {"ema_count", "ema_sum", "step"}
    # By gradient the optimizer moves the codebook, not the call.
    assert names == (moved | {"codebook"} if update == "ema" else moved)
    quantizer.trainable, before = False, quantizer.get_weights()
    quantizer(latents, training=True)  # frozen
    assert_all_equal(quantizer.get_weights(), before)


@pytest.mark.parametrize(
    "step, decay", [(5, 0.99), (100, 0.5), (5000, 0.99), (100, 0.0)]
)
def test_moving_average_by_hand(step, decay, monkeypatch):
    """Prevents: a decay, warm-up or count other than documented."""
    monkeypatch.setattr(modules.VectorQuantizer, "EPSILON", 0.1)
    codebook = 4 * np.eye(4, dtype="float32")
    latents = np.repeat(codebook[:2], 8, axis=0) + noise(16, 4, scale=0.5)
    count = np.array([3.0, 5.0, 7.0, 9.0])
    options = {"decay": decay, "restart_threshold": 0.0}
    quantizer = quantizer_with(codebook, count, step, **options)
    quantizer(latents, training=True)

    kept = min(decay, (1 + step) / (10 + step))
    sums = np.concatenate([latents.reshape(2, 8, 4).sum(1), np.zeros((2, 4))])
    new_count = kept * count + (1 - kept) * np.array([8, 8, 0, 0])
    new_sum = kept * codebook * count[:, None] + (1 - kept) * sums
    total = new_count.sum()
    smoothed = (new_count + 0.1) / (total + 4 * 0.1) * total
    # 1e-5: some tens of float32 roundings of 6e-8.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(quantizer.ema_count, new_count)
    close(quantizer.ema_sum, new_sum)
    close(quantizer.codebook, new_sum / smoothed[:, None])


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_first_batch_sets_the_codebook(update):
    """Prevents: codes far from the data, of which one takes every latent."""
    quantizer = new_quantizer(8, 4, codebook_update=update)
    latents = noise(2, 5, 5, 4, offset=30)
    quantizer(latents, training=True)
    codebook = quantizer.codebook.numpy()
    assert all(row_in(code, latents.reshape(-1, 4)) for code in codebook)
    assert len(np.unique(codebook, axis=0)) == 8
    sums = codebook * quantizer.ema_count.numpy()[:, None]
    np.testing.assert_array_equal(quantizer.ema_sum, sums)


def test_dead_code_restarts_with_its_statistics():
    """Prevents: a restarted code that its old average pulls back."""
    codebook = [[0, 0], [10, 0], [500, 500], [0, 900]]
    # Mean use is 10, so dead is under 0.2: code 2, but not code 3.
    quantizer = quantizer_with(codebook, [10, 10, 0, 0.5])
    near = np.float32([[0, 0]] * 30 + [[10, 0]] * 9)
    latents = np.append(near + noise(39, 2), np.float32([[3, 60]]), axis=0)
    quantizer(latents, training=True)
    codes, count = quantizer.codebook.numpy(), quantizer.ema_count.numpy()
    # Drawn in proportion to the squared error: the outlier.
    np.testing.assert_array_equal(codes[2], latents[-1])
    np.testing.assert_array_equal(quantizer.ema_sum[2], codes[2] * count[2])
    assert count[2] == 1.0  # 0.1 times the mean use
    # Rarely used, not dead. 1e-4: smoothing by 1e-5 of a count of 0.5.
    np.testing.assert_allclose(codes[3], codebook[3], rtol=1e-4)
    assert not row_in(codes[0], latents) and not row_in(codes[1], latents)
    assert 2 in quantizer(latents)[1]


def test_gradient_codebook_moves_by_its_gradient():
    """Prevents: a codebook loss that reaches the encoder; a scaled gradient."""
    codebook, weights = noise(4, 3), noise(20, 3, seed=2)
    quantizer = quantizer_with(codebook, **GRADIENT, commitment_cost=0.5)
    latents = tf.constant(noise(20, 3, seed=1))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(latents)
        result = quantizer.nearest(latents)
        loss = result.commitment_loss + result.codebook_loss
        decoded = tf.reduce_sum(result.vectors * weights)
    sources = [quantizer.codebook.value, latents]
    code_gradient, latent_gradient = tape.gradient(loss, sources)
    passed = tape.gradient(decoded, latents)  # straight through
    np.testing.assert_array_equal(passed, weights)
    difference = codebook[result.indices.numpy()] - latents.numpy()
    square = np.mean(difference**2)
    # 1e-6: sums of some 20 float32 terms of size 0.1.
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
    close(result.commitment_loss, 0.5 * square)
    close(result.codebook_loss, square)
    expected = np.zeros_like(codebook)
    np.add.at(expected, result.indices.numpy(), 2 * difference / 60)
    close(tf.convert_to_tensor(code_gradient), expected)
    close(latent_gradient, -0.5 * 2 * difference / 60)
    quantizer(latents)
    close(quantizer.losses, [1.5 * square])
    moving = quantizer_with(codebook, commitment_cost=0.5).nearest(latents)
    assert moving.codebook_loss == 0  # and the rest means the same
    close(moving.commitment_loss, 0.5 * square)


@pytest.mark.parametrize("shape", [(2, 3, 3, 4), (1, 3, 4), (0, 3, 3, 4)])
def test_unusual_batches(shape):
    """Prevents: 0/0 of zeros, `top_k` of too few latents, an empty error."""
    quantizer = new_quantizer(8, 4)
    latents = np.zeros(shape) if shape[0] == 2 else noise(*shape)
    for _ in range(3 * (shape[0] > 0)):
        quantizer(latents, training=True)
    assert all(np.isfinite(weight).all() for weight in quantizer.get_weights())
    quantized, indices = quantizer(latents)
    assert quantized.shape == shape and indices.shape == shape[:-1]
    # At most three latents, eight codes: each is a code but for smoothing by
    # 1e-5 of a count of about 0.04.
    np.testing.assert_allclose(quantized, latents, rtol=5e-3)


def test_models_of_users_are_loaded(tmp_path):
    @keras.saving.register_keras_serializable()
    class Larger(modules.VQVAE):
        def __init__(self, extra=3, **options):
            super().__init__(**options)
            self.extra = extra

        def get_config(self):
            return {**super().get_config(), "extra": self.extra}

    x = keras.Input((8, 8, 4))
    functional = keras.Model(x, new_quantizer(8, 4)(x)[0])
    for model in (functional, Larger(extra=5, image_size=(32, 32))):
        again = reload(model, tmp_path / "m.keras")
        assert_all_equal(again.get_weights(), model.get_weights())
    assert again.extra == 5 and again.image_size == (32, 32)


# VQ-VAE


@pytest.mark.parametrize(
    "size, crop, levels, downsampling, grids",
    [
        # 240 x 256 has the arithmetic of the first: 60 x 64, 30 x 32, 15 x 16.
        ((24, 32), None, 3, 2, [(12, 16), (6, 8), (3, 4)]),
        ((37, 21), (3, 2, 32, 16), 2, 4, [(8, 4), (4, 2)]),
    ],
)
def test_latent_grids(size, crop, levels, downsampling, grids):
    """Prevents: height and width, or the order of levels, mixed up."""
    options = {"crop": crop, "levels": levels, "downsampling": downsampling}
    model = tiny_vqvae(size, **options)
    perturb(model, scale=0.1)
    assert model.latent_grids == grids
    images = noise(2, *size, 1, offset=0.5, scale=0.2)
    indices = model.encode(images)
    assert [tuple(i.shape) for i in indices] == [(2, *grid) for grid in grids]
    for grid in indices:
        assert grid.dtype == tf.int32
        assert 0 <= grid.numpy().min() <= grid.numpy().max() < 8
    reconstructed = model.reconstruct(images).numpy()
    assert reconstructed.shape == images.shape
    assert 0 <= reconstructed.min() < reconstructed.max() <= 1
    # 1e-4: decoding starts from `e`, reconstructing from `z + (e - z)`, which
    # is rounded; three decoders follow.
    decoded = model.decode_indices(indices)
    np.testing.assert_allclose(decoded, reconstructed, atol=1e-4)
    for level in range(levels):  # every level reaches the image
        changed = [grid.numpy() for grid in indices]
        changed[level] = (changed[level] + 1) % 8
        assert np.any(model.decode_indices(changed).numpy() != decoded)


def test_a_crop_is_a_model_of_the_box():
    """Prevents: a box at another place, pixels outside that matter."""
    top, left, height, width = crop = (3, 2, 12, 16)
    frames, options = blocky_images(4, 20, 24), {"levels": 2, "ssim_weight": 1}
    whole = tiny_vqvae((height, width), **options)
    perturb(whole, scale=0.1)
    model = tiny_vqvae((20, 24), crop=crop, **options)
    model.set_weights(whole.get_weights())
    box = frames[:, top : top + height, left : left + width]
    assert_all_equal(model.encode(frames), whole.encode(box))
    found = model.reconstruct(frames).numpy()
    inside = found[:, top : top + height, left : left + width].copy()
    np.testing.assert_array_equal(inside, whole.reconstruct(box))
    found[:, top : top + height, left : left + width] = 0
    assert not found.any() and evaluate(model, frames) == evaluate(whole, box)
    cells = model.foreground_cells(np.where(frames > 0.5, frames, 0))
    for found, side in zip(cells, (2, 4), strict=True):
        shape = (4, height // side, side, width // side, side)
        content = (box[..., 0] > 0.5).reshape(shape).any(axis=(2, 4))
        np.testing.assert_array_equal(found, content)


def test_mask_by_hand():
    """Prevents: grey outside the mask, an error counted where it is black."""
    model = tiny_vqvae(mask_weight=0.3)
    perturb(model)
    images = np.maximum(blocky_images(4) - 0.5, 0)
    vectors = model.quantizer_1.lookup(model.encode(images)[0])
    decoded = model.decoder_1(vectors).numpy()
    intensity, logits = decoded[..., :1], decoded[..., 1:].astype("float64")
    # 1e-4: `z + (e - z)` is rounded.
    certain = logits > np.log(0.8 / 0.2)
    expected = np.where(certain, intensity, 0)
    np.testing.assert_allclose(model(images), expected, atol=1e-4)
    inside = images > utils.FOREGROUND
    assert 0.1 < inside.mean() < 0.9 and 0.1 < certain.mean() < 0.9
    entropy = np.logaddexp(0, logits) - inside * logits
    window = {"footprint": np.ones((1, 5, 5, 1)), "mode": "nearest"}
    grown = scipy.ndimage.maximum_filter(inside, **window)
    edge = grown & ~scipy.ndimage.minimum_filter(inside, **window)
    error = np.mean(inside * (1 + 4 * edge) * (images - intensity) ** 2)
    found = evaluate(model, images)["reconstruction_loss"]
    assert found == pytest.approx(error + 0.3 * entropy.mean(), rel=1e-4)


def losses_by_hand(model, images):
    latents = model.projection_1(model.encoder_1(images)).numpy()
    output = model(images)
    ssim = float(tf.reduce_mean(tf.image.ssim(images, output, 1.0)))
    codes = model.quantizer_1.lookup(model.encode(images)[0]).numpy()
    square = float(np.mean((codes - latents) ** 2))
    error = float(np.mean((images - output.numpy()) ** 2))
    reconstruction = error / 0.05 + 0.5 * (1 - ssim)
    return {
        "loss": reconstruction + 1.25 * square,
        "reconstruction_loss": reconstruction,
        "commitment_loss": 0.25 * square,
        "codebook_loss": square,
        "ssim": ssim,
    }


def test_epoch_loss_is_the_mean_over_images():
    """Prevents: an epoch loss of 0.0, or that of the last batch alone."""
    options = GRADIENT | {"restart_threshold": 0.0, "ssim_weight": 0.5}
    model = tiny_vqvae(**options, data_variance=0.05)
    perturb(model)  # also sets the step of the quantizer past the data start
    batches = [blocky_images(4, seed=1), 0.2 * blocky_images(2, seed=2)]
    first, last = [losses_by_hand(model, batch) for batch in batches]
    before = model.encoder_1.mix.kernel.numpy()
    history = train(model, batches, optimizer=keras.optimizers.SGD(0.0))
    np.testing.assert_array_equal(model.encoder_1.mix.kernel, before)
    others = {"codebook_usage", "perplexity"}
    norms = {"gradient_norm", "parameter_norm"}  # of the last step
    assert set(history) == {*first, *others, *norms}
    evaluation = evaluate(model, batches[1])
    for name in first:
        mean = (4 * first[name] + 2 * last[name]) / 6
        assert abs(mean - last[name]) > 1e-2 * abs(mean)
        # 1e-4: SSIM divides differences of nearly equal float32 moments.
        assert history[name] == pytest.approx(mean, rel=1e-4)
        assert evaluation[name] == pytest.approx(last[name], rel=1e-4)
    used = [np.unique(model.encode(batch)[0]) for batch in batches]
    assert evaluation["codebook_usage"] == len(used[1]) / 8
    usage = evaluate(model, *batches)["codebook_usage"]  # of all batches
    assert usage == len(set(np.concatenate(used))) / 8


def test_upper_levels_show_the_image_by_themselves():
    """Prevents: a preview that looks below, or of another size or weight."""
    model = tiny_vqvae((16, 24), levels=3, upper_weight=0.5)
    perturb(model)
    images = blocky_images(2, 16, 24)
    indices, decoded, errors = model.encode(images), None, []
    for level in (3, 2):
        vectors = model.part("quantizer", level).lookup(indices[level - 1])
        decoded = model.part("decoder", level)(model._joined(vectors, decoded))
        preview = model.part("preview", level)(decoded)[..., 0]
        rows, columns = model.latent_grids[level - 2]
        small = images.reshape(2, rows, 16 // rows, columns, 24 // columns)
        errors.append(np.mean((small.mean(axis=(2, 4)) - preview) ** 2))
    found = evaluate(model, images)
    np.testing.assert_allclose(found["upper_loss"], sum(errors), rtol=1e-4)
    terms = found["reconstruction_loss"] + found["commitment_loss"]
    expected = terms + 0.5 * sum(errors)
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-4)
    assert {"codebook_usage", "codebook_usage_3", "perplexity_2"} <= set(found)


def test_vqvae_refuses():
    """Prevents: a size that comes back larger, or a late shape error."""
    for crop in (0, 0, 6, 8), (0, 0, 8, 20), (-4, 0, 8, 8), (12, 0, 8, 8):
        with pytest.raises(ValueError, match="crop: expected multiples of 4"):
            tiny_vqvae(downsampling=4, crop=crop)
    with pytest.raises(ValueError, match="image_size: .* multiples of 8"):
        tiny_vqvae((20, 20), downsampling=4, levels=2)
    with pytest.raises(utils.FlagError, match="--levels: expected .*, found 4"):
        tiny_vqvae(levels=4)
    with pytest.raises(ValueError, match="last axis .* expected 4, found 8"):
        new_quantizer(8, 4)(noise(2, 3, 3, 8))
    model = tiny_vqvae()
    with pytest.raises(ValueError, match="16 and 32"):  # not the corner of it
        model.encode(blocky_images(1, 32, 32))
    for kind, found in ("uint8", "<dtype"), ("float32", "some above 2"):
        with pytest.raises(Exception, match=f"floats in 0..1, found {found}"):
            model.encode(np.full((1, 16, 16, 1), 200, kind))
    for grids in ([np.zeros((1, 3, 9), "int32")], [np.zeros((1, 8, 8))] * 2):
        with pytest.raises(ValueError, match="be equal|found 2"):
            model.decode_indices(grids)


# Causal layers and priors


def test_conditions_are_dropped_in_training_only():
    """Prevents: null embeddings never trained, or dropped with each other."""
    given, n = CONTEXT | {"condition_dropout": 0.3, "latent_grid": (2, 2)}, 200
    layer = tiny_prior(**given).context
    given = np.full(n, 0.7, "float32"), np.ones(n, "int32")
    layer(*given)
    perturb(layer)
    trained, found = layer(*given, training=True).numpy(), []
    for kept in itertools.product((1, 0), repeat=2):
        asked = [x * k + k - 1 for x, k in zip(given, kept, strict=True)]
        expected = layer(*asked).numpy()
        found.append(np.isclose(trained, expected, atol=1e-5).all((1, 2, 3)))
        share = np.prod([0.7 if k else 0.3 for k in kept])
        deviation = np.sqrt(n * share * (1 - share))
        assert abs(found[-1].sum() - n * share) < 4 * deviation
    np.testing.assert_array_equal(sum(found), np.ones(n))


def test_atlas():
    """Prevents: what is usual elsewhere, or of another label."""
    layer = tiny_prior(**CONTEXT).context
    layer.atlas.assign(atlas := noise(4, 2, 3, 5, 32))
    given = np.array([0, 1, 2.5, -3, -3], "float32") / 3
    found = layer._atlas_at(given, np.array([0, 1, -1, 0, -1]))
    expected = atlas[0, 0], atlas[1, 1], atlas[2:].mean((0, 1))
    expected += atlas[:, 0].mean(0), atlas.mean((0, 1))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_attention_in_parts(monkeypatch):
    """Prevents: attention of a part to others, or after other blocks."""
    for attention, order in ((True, "GGGCGC"), (False, "GGGG")):
        prior = tiny_prior("pixelsnail", blocks=3, attention=attention)
        names = [type(layer).__name__[0] for layer in prior.causal_layers]
        assert "".join(names) == order
    layer = modules.CausalAttention(16)
    x, codes = noise(2, 3, 7, 16), noise(2, 3, 7, 16, seed=1)
    layer(x, codes)
    perturb(layer)
    whole, other = layer(x, codes).numpy(), layer(x, codes + 1).numpy()
    # The first position has nothing but the empty code.
    np.testing.assert_array_equal(other[:, 0, 0], whole[:, 0, 0])
    assert np.all(np.any(other != whole, axis=-1).reshape(2, 21)[:, 1:])
    monkeypatch.setattr(modules.CausalAttention, "WHOLE", 20)
    monkeypatch.setattr(modules.CausalAttention, "PIECE", 4)
    # 1e-5: sums of some 20 float32 numbers.
    np.testing.assert_allclose(layer(x, codes), whole, atol=1e-5)


@functools.cache
def trained_prior(network, kind):
    """A prior far from uniform, after a training step; shared by tests."""
    keras.utils.set_random_seed(0)
    policy, settings = KINDS[kind]
    keras.config.set_dtype_policy(policy)
    prior = tiny_prior(network, **settings)
    keras.config.set_dtype_policy("float32")
    perturb(prior)
    train(prior, [prior_batch(prior, 8)])
    return prior


@pytest.fixture(params=PRIORS, ids="-".join)
def prior(request):
    return trained_prior(*request.param)


def influence(prior):
    """Size of the gradient of the logits at t by the embedded index at s."""
    count = int(np.prod(prior.latent_grid))
    given = rows_of(prior_batch(prior, 1), np.zeros(count, int))
    context = None
    if prior.use_context:
        context = prior.context(
            given["slice_position"], given["label"], given.get("upper", ())
        )
    x = prior.embedding(given["indices"])
    with tf.GradientTape() as tape:
        tape.watch(x)
        logits = prior._predict(prior._hidden(x, context, False))
        flat = tf.reshape(logits, (count, count, -1))
        own = tf.linalg.diag_part(tf.transpose(flat, [2, 0, 1]))
        # Random weights, as equal ones could cancel.
        loss = tf.reduce_sum(own * noise(prior.num_embeddings, 1))
    # The computation above is that of a call.
    np.testing.assert_array_equal(logits, prior(**given))
    gradient = tf.cast(tape.gradient(loss, x), tf.float32)
    return tf.reduce_sum(tf.abs(gradient), -1).numpy().reshape(count, count)


@pytest.mark.parametrize("network, kind", PRIORS)
def test_prior_sees_what_is_before_and_nothing_else(network, kind, tmp_path):
    """Prevents: a likelihood that looks at what it predicts; a blind spot."""
    settings = {"latent_grid": (4, 4), "upper_grids": ((2, 2), (1, 1))}
    if network == "pixelsnail":  # attention sees farther than convolutions
        settings = {"latent_grid": (4, 12), "upper_grids": ((2, 6), (1, 3))}
    if network != "gated":
        settings |= {"kernel_size": 3, "blocks": 1}
    if kind == "alone":
        del settings["upper_grids"]
    given = {} if kind == "alone" else CONTEXT
    prior = tiny_prior(network, **given, **settings)
    perturb(prior, scale=0.1)
    for weight in prior.weights:  # open all ReLUs: what it could see shows
        if weight.name == "bias":
            weight.assign(np.full(weight.shape, 3.0))
    train(prior, [prior_batch(prior, 8)])
    for model in (prior, reload(prior, tmp_path / "prior.keras")):
        seen = influence(model) > 0
        earlier = np.tril(np.ones_like(seen), -1)
        if network != "pixelcnn":
            np.testing.assert_array_equal(seen, earlier)
            continue
        assert not seen[~earlier].any()
        seen = seen.reshape(4, 4, 4, 4)  # two layers: two rows and columns
        assert seen[3, 3].sum(axis=1).tolist() == [0, 3, 3, 2]
        # Never up and to the right beyond a diagonal.
        assert seen[2, 1, 1].tolist() == [True, True, True, False]


def test_sampler_and_call_are_the_same_distribution(prior):
    """Prevents: a cache, grid, image, condition or precision that differs."""
    guided = prior.use_context
    sampling = modules.Sampling(1.5, guidance=2.0 if guided else 1.0)
    given = conditions(prior, 18)

    def sample(first, n, seed=1):
        asked = rows_of(given, np.arange(first, first + n))
        return prior.sample(n, seed, first, sampling, **request(prior, asked))

    grids, sampled = sample(0, 18)
    assert grids.dtype == np.int32 and 0 <= grids.min() <= grids.max() < 5
    fewer = {"upper": given.get("upper", ())}
    _, nats = (prior.log_prob(grids, **x).numpy() for x in (fewer, given))
    assert nats.shape == grids.shape and nats.dtype == np.float32
    # 1e-6: float32 sums in another order, over 15 to 32 positions.
    called = nats.sum(axis=(1, 2), dtype="float64")
    np.testing.assert_allclose(sampled, called, rtol=1e-6)
    assert np.ptp(sampled) > 1  # it does depend on the grid
    assert prior.stem.compute_dtype == ("bfloat16" if guided else "float32")
    # Image k is the same in any request; 14 to 16 is over the end of a chunk.
    for first, n in ((0, 3), (5, 3), (14, 3)):
        part = slice(first, first + n)
        assert_all_equal(sample(first, n), [grids[part], sampled[part]])
    assert len(np.unique(grids, axis=0)) == 18
    assert np.any(sample(0, 18, seed=8)[0] != grids)


def guided_logits(prior, grids, given, guidance):
    """Logits that the sampler draws by, from calls."""
    logits = prior(grids, **given).numpy().astype("float64")
    guide = "label" if prior.labels else "slice_position"
    null = given | {guide: -np.ones_like(given[guide])}
    start = prior(grids, **null).numpy()
    return start + guidance * (logits - start)


@pytest.mark.parametrize(
    "network, labels, options",
    [
        # Guided by the slice position, as there are no labels.
        ("gated", (), {"temperature": 0.7, "top_k": 2, "guidance": 0.5}),
        ("pixelsnail", LABELS, {"guidance": 2.0}),
    ],
)
def test_samples_have_their_probability(network, labels, options):
    """Prevents: biased draws, as from random numbers used twice."""
    settings = LOWER | {"labels": labels, "num_embeddings": 3}
    settings |= {"latent_grid": (2, 2), "upper_grids": ((1, 1),)}
    prior = tiny_prior(network, **settings)
    perturb(prior, scale=0.4)
    every = list(itertools.product(range(3), repeat=4))  # grid of this prior
    every, n = np.array(every, "int32").reshape(81, 2, 2), 1600
    prior.chunk_size = 200  # a run of the sampler costs more than a grid
    given, sampling = conditions(prior, 1), modules.Sampling(**options)
    asked = request(prior, rows_of(given, np.zeros(n, int)))
    grids, _ = prior.sample(n, 5, sampling=sampling, **asked)
    counts = np.bincount(grids.reshape(n, 4) @ [27, 9, 3, 1], minlength=81)

    given = rows_of(given, np.zeros(81, int))
    nats = prior.log_prob(every, **given).numpy()
    # 1e-5: rounding by 6e-8 of some 300 terms.
    total = np.exp(nats.sum(axis=(1, 2), dtype="float64")).sum()
    assert total == pytest.approx(1, abs=1e-5)
    logits = guided_logits(prior, every, given, sampling.guidance)
    if sampling.top_k:
        least = np.sort(logits, axis=-1)[..., -sampling.top_k, None]
        logits[logits < least] = -np.inf
    shares = scipy.special.softmax(logits / sampling.temperature, axis=-1)
    chosen = np.take_along_axis(shares, every[..., None], axis=-1)
    expected = n * chosen.prod(axis=(1, 2, 3))
    assert (expected > 0).sum() == (16 if sampling.top_k else 81)
    # The statistic has its distribution for cells of five and more.
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    statistic = np.sum((counts - expected)[keep] ** 2 / expected[keep])
    assert not counts[~keep].any()
    # The seed is fixed: a right sampler failed with probability 1e-3, once.
    assert statistic < scipy.stats.chi2.isf(1e-3, keep.sum() - 1)


def test_bits_and_loss_of_an_epoch():
    """Prevents: the last batch alone, dropout in validation, nats for bits."""
    prior = tiny_prior("gated", **LOWER, dropout=0.5)
    perturb(prior)
    batches = [prior_batch(prior, 6, seed=1), prior_batch(prior, 2, seed=2)]
    first, last = [-float(tf.reduce_mean(prior.log_prob(**x))) for x in batches]
    mean = (6 * first + 2 * last) / 8
    found = evaluate(prior, *batches)
    assert abs(mean - last) > 1e-3 * mean
    # 1e-5: float32 means in another order.
    assert found["loss"] == pytest.approx(mean, rel=1e-5)
    assert found["bits_per_code"] == pytest.approx(mean / np.log(2), rel=1e-5)
    one, other = [prior(**batches[0], training=True).numpy() for _ in range(2)]
    assert np.any(one != other)
    prior.logits.kernel.assign(np.zeros(prior.logits.kernel.shape))
    prior.logits.bias.assign(np.zeros(prior.logits.bias.shape))
    bits = evaluate(prior, *batches)["bits_per_code"]
    assert bits == pytest.approx(np.log2(5), rel=1e-6)  # uniform


def test_every_condition_matters(prior):
    """Prevents: a condition that is dropped, or one of another image."""
    batch = prior_batch(prior, 4)
    before, changed = prior(**batch).numpy(), conditions(prior, 4, seed=1)
    for k, grid in enumerate(changed.pop("upper", ())):
        upper = [*batch["upper"]]
        upper[k] = (grid + 1) % 5
        changed[f"upper {k}"] = tuple(upper)
    for name in ("label", "slice_position"):
        if name in changed:
            changed[f"{name} null"] = np.full_like(changed[name], -1)
    for name, values in changed.items():
        key, mixed = name.split()[0], tf.nest.map_structure(np.copy, batch)
        pairs = tf.nest.flatten(mixed[key]), tf.nest.flatten(values)
        for old, new in zip(*pairs, strict=True):
            old[2] = new[2]
        moved = np.abs(prior(**mixed).numpy() - before).max(axis=(1, 2, 3))
        assert moved[2] > 1e-3 and not moved[[0, 1, 3]].any(), name


def test_sample_refuses():
    """Prevents: images of another condition than the one asked for."""
    prior = tiny_prior(**LOWER)
    upper = conditions(prior, 2)["upper"]
    for name, value, message in (
        ("label", ["AD", "MCI"], "expected one of NC, AD; found 'MCI'"),
        ("label", ["AD"], "expected 2, found 1"),
        ("slice_position", [0.1], "expected 2 in 0..1, found .0.1"),
        ("slice_position", [0.1, 1.1], "expected 2 in 0..1, found .0.1 1.1"),
        ("upper", upper[:1], "expected ..2, 2, 4.*, found ..2, 2, 4..$"),
        ("upper", [x + 5 for x in upper], "expected .* of 0..4"),
        ("known", np.zeros((2, 8, 4)), "expected .2, 4, 8.*, found .2, 8, 4."),
        ("known", np.full((2, 4, 8), 7), "expected .* of -1..4, found .*7"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: {message}"):
            prior.sample(2, **({"upper": upper} | {name: value}))
    prior = tiny_prior()
    for top_p in (0.9, 0.8):  # compiled once
        prior.sample(1, sampling=modules.Sampling(top_p=top_p))
    assert prior._sample_grids.experimental_get_tracing_count() == 1
    with pytest.raises(ValueError, match="^label: .* none, .* found 'AD'"):
        prior.sample(2, label="AD")
    with pytest.raises(ValueError, match="^guidance: "):
        prior.sample(2, sampling=modules.Sampling(guidance=2.0))
    for bad in (("temperature", 0.0), ("top_k", -1), ("top_p", 1.1)):
        with pytest.raises(ValueError, match=f"expected .*{bad[0]}=.*{bad[1]}"):
            modules.Sampling(**dict([bad]))


def test_compiled_draw_has_positive_probability():
    """Prevents: a code of no probability where a compiled sum dips."""
    # Between XLA's blocks a cumulative sum moves by a rounding; aimed at here.
    logits, top_k = tf.constant(noise(2000, 512, scale=2)), 50

    @tf.function(jit_compile=True)
    def draw(uniform):
        kept = modules.keep_likeliest(tf.nn.softmax(logits), top_k, 1.0)
        index = modules.sample_index(logits, uniform, 1.0, 1.0, top_k)
        return index[:, None], kept, tf.cumsum(kept, axis=-1)

    zeros = np.zeros((2000, 1), "float32")
    _, kept, cumulative = [x.numpy() for x in draw(zeros)]
    moves = (np.diff(cumulative, axis=1) != 0) & (kept[:, 1:] == 0)
    at = moves.argmax(axis=1)[:, None]
    pair = [np.take_along_axis(cumulative, at + k, 1) for k in (0, 1)]
    aim = np.maximum(*pair).astype("float64")
    aim /= cumulative[:, -1:] * (1 - 1e-6)
    aims = [aim * (1 + ulps * 2.0**-24) for ulps in range(-3, 4)]
    for uniform in (*aims, zeros + 1, zeros):
        uniform = np.minimum(uniform, np.float32(1 - 2**-24))
        index = draw(uniform.astype("float32"))[0].numpy()
        assert np.all(np.take_along_axis(kept, index, 1) > 0)


# Training: callbacks, memory, precision


@pytest.mark.parametrize("near, steps", [(1e9, 4), (-1.0, 2)])
def test_a_signal_waits_only_for_a_near_end(near, steps, tmp_path, monkeypatch):
    """Prevents: minutes of work lost, or a signal that waits for minutes."""
    monkeypatch.setattr(modules.RoundCheckpoint, "NEAR", near)
    signals, done = types.SimpleNamespace(received=0), []

    def receive(batch, logs):
        done.append(batch)
        signals.received = signal.SIGINT * (len(done) >= 2)

    model = tiny_prior(blocks=1)
    model.compile("adam", run_eagerly=True)
    checkpoint = modules.RoundCheckpoint(tmp_path / "c", None, signals)
    receiver = keras.callbacks.LambdaCallback(on_train_batch_end=receive)
    options = {"steps_per_epoch": 4, "epochs": 2, "verbose": 0}
    options["callbacks"] = [receiver, checkpoint]
    data = batches_of([prior_batch(model, 2)]).repeat()
    with pytest.raises(utils.Stopped) as stopped:
        model.fit(data, shuffle=False, **options)
    assert stopped.value.exit_code == 128 + signal.SIGINT
    assert len(done) == steps
    assert bool(utils.read_checkpoint(tmp_path / "c")[0]) == (near > 0)


def test_a_worse_epoch_does_not_replace_the_best(tmp_path):
    """Prevents: a prior that is trained on and gets worse."""
    model = tiny_prior(blocks=1)
    model.compile("adam", run_eagerly=True)
    stopping = keras.callbacks.EarlyStopping(
        "loss", mode="min", restore_best_weights=True
    )
    callbacks = [stopping, modules.RoundCheckpoint(tmp_path, stopping, None, 0)]
    before = model.get_weights()
    data = batches_of([prior_batch(model, 2)])
    model.fit(data, epochs=2, callbacks=callbacks, verbose=0, shuffle=False)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_nan_in_the_data_stops_the_training_with_onednn_on():
    """Prevents: NaN weights behind a finite loss: a fused ReLU hides NaN."""
    model, images = tiny_vqvae(), blocky_images(12)
    images[9, 3, 3] = np.nan
    model.compile("adam", jit_compile=False)
    options = {"callbacks": [modules.FiniteCheck("vqvae")], "shuffle": False}
    with pytest.raises(utils.NumericsError, match="in step 3 of round 1") as at:
        model.fit(images, images, batch_size=4, verbose=0, **options)
    assert "gradient_norm" in str(at.value)
    assert str(at.value).endswith("try a smaller --learning-rate")


def test_gradient_norm_is_that_of_the_unscaled_loss():
    """Prevents: a norm of 32768 times the gradients under a loss scale."""
    norms = []
    for scaled in (False, True):
        keras.utils.set_random_seed(0)
        model, optimizer = tiny_vqvae(), keras.optimizers.SGD(0.0)
        if scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        history = train(model, [blocky_images(4)], optimizer=optimizer)
        norms.append(history["gradient_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-5) and norms[0] > 1e-3


@pytest.mark.parametrize(
    "name, settings",
    [
        ("vqvae", {"accumulation_steps": 2}),
        ("vqvae", {"jit_compile": True}),
        ("pixelcnn", {"accumulation_steps": 5, "recompute": True}),
        ("pixelsnail", {"recompute": True}),
    ],
)
def test_what_saves_memory_or_time_trains_alike(name, settings):
    """Prevents: another gradient where a batch is cut or recomputed."""

    def weights_after(jit_compile=False, **settings):
        keras.utils.set_random_seed(0)
        batch = blocky_images(5, 20, 16)
        if name == "vqvae":  # no start from data: it would be of a part
            options = GRADIENT | {"restart_threshold": 0.0}
            model = tiny_vqvae((20, 16), **options)
            model.quantizer_1.step.assign(1)
        else:
            model = tiny_prior(name)
            batch = prior_batch(model, 5)
        for attribute, value in settings.items():
            assert hasattr(model, attribute)
            setattr(model, attribute, value)
        optimizer = keras.optimizers.SGD(0.05, global_clipnorm=0.1)
        options = {"jit_compile": jit_compile, "run_eagerly": not jit_compile}
        train(model, [batch], 2, optimizer, **options)
        return [np.asarray(weight) for weight in model.trainable_weights]

    pairs = zip(weights_after(), weights_after(**settings), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


# The chain


@functools.cache
def chain():
    """A VQ-VAE of 24x32 pixels with a crop and two priors, in bfloat16."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("mixed_bfloat16")
    options = {"num_embeddings": 5, "downsampling": 4, "crop": (4, 0, 16, 24)}
    vqvae = tiny_vqvae((24, 32), levels=2, **options)
    grids, priors = vqvae.latent_grids, []
    for level, network in enumerate(("pixelcnn", "pixelsnail"), start=1):
        given = {"latent_grid": grids[level - 1], "upper_grids": grids[level:]}
        priors.append(tiny_prior(network, **given, **CONTEXT))
    keras.config.set_dtype_policy("float32")
    for model in (vqvae.decoder_1, vqvae.decoder_2, *priors):
        perturb(model)
    return vqvae, priors


def test_prior_inputs():
    """Prevents: levels, labels, images or rows mixed up."""
    vqvae, priors = chain()
    images = blocky_images(3, 24, 32)
    dataset = tf.data.Dataset.from_tensor_slices(images).batch(2)
    indices = modules.encode_dataset(vqvae, dataset)
    assert_all_equal(indices, vqvae.encode(images))
    labels, position = ["AD", "", "NC"], [0.5, 0.25, 1.0]
    table = pd.DataFrame({"label": labels, "position": position})
    lower, upper = [modules.prior_inputs(p, indices, table) for p in priors]
    assert_all_equal(lower["upper"], indices[1:])
    assert_all_equal([lower["indices"], upper["indices"]], indices)
    np.testing.assert_array_equal(upper["label"], [1, -1, 0])
    np.testing.assert_array_equal(upper["slice_position"], position)
    assert "upper" not in upper and lower["label"].dtype == np.int32


def test_generate():
    """Prevents: levels, images, conditions or options mixed up."""
    vqvae, priors = chain()
    images, indices, nats = modules.generate(vqvae, priors, 10, 2, first=3)
    assert images.shape == (10, 24, 32) and images.dtype == np.float32
    assert 0 <= images.min() < images.max() <= 1
    assert [grid.shape for grid in indices] == [(10, 4, 6), (10, 2, 3)]
    asked = {
        "label": ["NC"] * 5 + ["AD"] * 5,
        "slice_position": modules.slice_positions(10, 3),
    }
    above, first = priors[1].sample(10, 2, 3, **asked)
    below, second = priors[0].sample(10, 2, 3, upper=[above], **asked)
    assert_all_equal(indices, [below, above])
    np.testing.assert_allclose(nats, first + second, rtol=1e-6)
    # 1e-2: in bfloat16 batches of another size round otherwise.
    decoded = vqvae.decode_indices(indices)[..., 0]
    np.testing.assert_allclose(images, decoded, atol=1e-2)

    asked["label"] = ["AD"] * 5 + [None] * 5
    _, other, _ = modules.generate(vqvae, priors, 10, 2, 3, **asked)
    assert np.any(other[1] != above) and np.any(other[0] != below)
    # Sampling of each level; known indices are not drawn.
    sampling = [modules.Sampling(1e-6), modules.Sampling()]
    known = [None, indices[1][:2].copy()]
    known[1][0, 1] = -1
    options = {"slice_position": 0.5, "known": known, "sampling": sampling}
    _, found, _ = modules.generate(vqvae, priors, 2, 5, **options)
    np.testing.assert_array_equal(found[1][1], known[1][1])
    np.testing.assert_array_equal(found[1][0, 0], known[1][0, 0])
    given = {"label": np.zeros(2, "int32")}
    given["slice_position"] = np.full(2, 0.5, "float32")
    with priors[0]._in_float32():  # as the sampler
        logits = priors[0](found[0], upper=(found[1],), **given).numpy()
    np.testing.assert_array_equal(found[0], logits.argmax(axis=-1))
    with pytest.raises(ValueError, match="level 1: made for another VQ-VAE"):
        modules.generate(vqvae, priors[::-1], 2)


def tiny_texture():
    keras.utils.set_random_seed(0)
    texture = modules.Texture(channels=8, residual_std=0.1)
    perturb(texture, 0.03)
    return texture


def test_texture_belongs_to_an_image():
    """Prevents: texture that depends on the request, or outside of a head."""
    vqvae, priors = chain()
    texture, positions = tiny_texture(), np.linspace(0, 1, 9, dtype="float32")
    draw = functools.partial(modules.generate, vqvae, priors, seed=5)
    options = {"label": "AD", "slice_position": positions}
    plain, indices, _ = draw(9, **options)
    images, same, _ = draw(9, texture=texture, **options)
    assert_all_equal(indices, same)
    assert 0 <= images.min() and images.max() <= 1
    outside = np.ones((24, 32), bool)
    outside[4:20, :24] = False
    assert not images[:, outside].any() and not images[plain == 0].any()
    added = np.ptp(images - plain, axis=(1, 2))
    assert (added > 0.05).all() and len(np.unique(added)) == 9
    options["slice_position"] = positions[7:]
    part, _, _ = draw(2, first=7, texture=texture, **options)
    np.testing.assert_array_equal(part, images[7:])


def test_texture_learns_what_reconstructions_lack(tmp_path):
    """Prevents: a wrong scale or direction of the flow."""
    texture = modules.Texture(24, residual_std=0.05, codebook_sha256="x")
    texture.compile(keras.optimizers.Adam(2e-3, clipnorm=1), jit_compile=False)
    decoded = np.full((8, 16, 16, 1), 0.5, "float32")
    decoded[:, :4] = 0
    stripes = np.float32(0.05 * (-1) ** np.arange(16))[:, None, None]
    batch = {"images": decoded + stripes * (decoded > 0), "decoded": decoded}
    data = tf.data.Dataset.from_tensors(batch).repeat(80)
    texture.fit(data, shuffle=False, verbose=0)
    texture.save(tmp_path / "texture.keras")
    texture = modules.load_model(tmp_path / "texture.keras")
    assert texture.codebook_sha256 == "x"
    assert texture.add(decoded[:, :8], 3, tf.range(8)).shape[1] == 8
    found = texture.add(decoded, 3, tf.range(8)).numpy() - decoded
    assert not found[:, :4].any()
    assert abs(found - stripes)[:, 4:].mean() < 0.015 < 0.03 < found.std()


def test_images_are_decoded_without_slow_bfloat16(tmp_path, monkeypatch):
    """Prevents: other codes than in training, or rounding without need."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    tiny_vqvae(levels=2).save(tmp_path / "vqvae.keras")
    keras.config.set_dtype_policy("float32")
    found, images = [], blocky_images(2, 16, 16)
    for has in True, False:
        monkeypatch.setattr(utils, "has_bfloat16", lambda has=has: has)
        model = modules.load_vqvae(utils.Run(tmp_path, utils.Settings(), {}))
        codes = model.encode(images)
        found.append((codes, model.decode_indices(codes).numpy()))
    (codes, rough), (same, fine) = found
    assert_all_equal(codes, same)
    assert 0 < abs(rough - fine).max() < 0.02


def test_generate_in_a_graph():
    """Prevents: another rounding, label or order in the exported graph."""
    vqvae, priors = chain()
    models = vqvae, priors, tiny_texture()
    kinds = (tf.int32, tf.int32, tf.float32, tf.string)
    generate = tf.function(
        functools.partial(modules._generate_in_graph, models),
        [tf.TensorSpec((), kind) for kind in kinds],
    )
    for label in ("", "NC"):
        options = {"sampling": modules.Sampling(0.9), "label": label or None}
        options["texture"] = models[-1]
        images, grids, _ = modules.generate(vqvae, priors, 11, 7, **options)
        drawn = generate(11, 7, 0.9, label)
        np.testing.assert_array_equal(drawn["images"], images)
        assert_all_equal([drawn[f"indices_{k}"] for k in (1, 2)], grids)
    for bad in ((0, 7, 0.9, ""), (1, 7, 0.0, ""), (1, 7, 0.9, "MCI")):
        with pytest.raises(tf.errors.InvalidArgumentError, match="expected"):
            generate(*bad)


def test_damaged_models(tmp_path):
    """Prevents: a traceback of Keras, or weights with a flipped bit."""
    good = tmp_path / "good.keras"
    tiny_prior(blocks=1).save(good)
    assert modules.load_model(good).latent_grid == (3, 5)
    data = bytearray(good.read_bytes())
    half = len(data) // 2
    (tmp_path / "folder.keras").mkdir()
    (tmp_path / "cut.keras").write_bytes(data[:half])
    data[half] ^= 0x10
    (tmp_path / "flipped.keras").write_bytes(data)
    zipfile.ZipFile(tmp_path / "empty.keras", "w").close()
    bad = "truncated, corrupt, or not"
    messages = dict.fromkeys(("folder", "cut", "empty"), bad)
    messages |= {"none": "no such model file", "flipped": f"{bad} .*corrupt: "}
    for name, message in messages.items():
        path = tmp_path / f"{name}.keras"
        with pytest.raises(utils.RunError, match=f"{path}: {message}"):
            modules.load_model(path)
