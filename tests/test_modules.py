"""Tests of modules.py."""

import functools
import itertools
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

import modules

ROOT = Path(modules.__file__).parent
FLOAT32_ONE = np.nextafter(np.float32(1), np.float32(0))  # just below 1

# tensorflow-probability 0.25 says so when it is first imported.
pytestmark = pytest.mark.filterwarnings(
    "ignore:distutils Version classes are deprecated:DeprecationWarning"
)

# A prior class is tested by adding it here, and to `LAYERS` below.
NETWORKS = {
    "pixelcnn": modules.PixelCNN,
    "gated": modules.GatedPixelCNN,
    "pixelsnail": functools.partial(modules.PixelSNAIL, heads=2),
    "pixelsnail-local": functools.partial(modules.PixelSNAIL, attention=False),
}
NO_BLIND_SPOT = ["gated", "pixelsnail", "pixelsnail-local"]
LABELS = ("NC", "AD")
# What a prior knows besides the codes before: nothing, the conditions of a top
# level, or also the codes of two levels above.
CONTEXT = {
    "position_features": True,
    "slice_condition": True,
    "labels": LABELS,
    "condition_dropout": 0.0,
}
LOWER = CONTEXT | {"latent_grid": (4, 8), "upper_grids": ((2, 4), (1, 2))}
KINDS = {"alone": {}, "top": CONTEXT, "lower": LOWER}
PRIORS = [*itertools.product(NETWORKS, ("alone", "lower"))]
ALL_PRIORS = [*PRIORS, ("pixelsnail", "top")]


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whichever tests run before it."""
    keras.utils.set_random_seed(0)


def noise(*shape, seed=0, scale=1.0, offset=0.0):
    values = np.random.default_rng(seed).normal(size=shape)
    return (offset + scale * values).astype("float32")


def blocky_images(n, height=16, width=16, seed=0):
    """Images `(n, height, width, 1)` in [0, 1] of flat 4x4 squares."""
    squares = np.random.default_rng(seed).random((n, height // 4, width // 4))
    return np.kron(squares, np.ones((4, 4))).astype("float32")[..., None]


def perturb(layer, seed=0, scale=0.3):
    """Move every weight off its initial value, which is often zero."""
    rng = np.random.default_rng(seed)
    for weight in layer.weights:
        if weight.dtype == "int32":
            weight.assign(weight + 3)
            continue
        change = scale * rng.normal(size=weight.shape).astype("float32")
        # Counts of latents are positive.
        change = np.abs(change) if weight.name == "ema_count" else change
        weight.assign(weight + change)


def perturb_prior(prior, scale=0.3):
    """`perturb`, with a context that tells conditions apart, not extreme."""
    kept = prior.context.get_weights() if prior.use_context else None
    perturb(prior, scale=scale)
    if kept:
        prior.context.set_weights(kept)
        rng = np.random.default_rng(1)
        for weight in prior.context.weights:
            named = weight.name in ("embeddings", "no_slice")
            change = rng.normal(size=weight.shape).astype("float32")
            weight.assign(weight + (1.0 if named else 0.05) * change)


def weights_of(layer):
    return [weight.numpy() for weight in layer.weights]


def assert_all_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def reload(model, path):
    """`model` saved and opened again, as a new process would open it."""
    model.save(path)
    # Other initial values than those of `model`, so that a weight that was
    # not saved differs.
    keras.utils.set_random_seed(1234)
    return keras.models.load_model(path, safe_mode=True)


def tiny_vqvae(image_size=(16, 16), **settings):
    defaults = {
        "downsampling": 2,
        "channels": 8,
        "residual_blocks": 1,
        "residual_channels": 4,
        "num_embeddings": 8,
        "embedding_dim": 4,
    }
    return modules.VQVAE(image_size, **(defaults | settings))


def tiny_prior(network="pixelcnn", **settings):
    defaults = {
        "num_embeddings": 5,
        "latent_grid": (3, 5),
        "channels": 8,
        "blocks": 2,
        "kernel_size": 5,
        "head_layers": 1,
    }
    return NETWORKS[network](**(defaults | settings))


def conditions(prior, n, seed=0):
    """What `prior` is conditioned on, as arguments of a call for `n` images.

    Empty for a prior without conditions.
    """
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
        given["slice_position"] = rng.random(n).astype("float32")
    return given


def rows_of(given, rows):
    return tf.nest.map_structure(lambda values: values[rows], given)


def request(prior, given):
    """`conditions` as arguments of `sample`: labels by name."""
    if "label" not in given:
        return given
    return given | {"label": [prior.labels[k] for k in given["label"]]}


def prior_batch(prior, n, seed=0):
    """What `prior` is trained on: random indices, and its conditions."""
    shape = (n, *prior.latent_grid)
    rng = np.random.default_rng(seed)
    indices = rng.integers(prior.num_embeddings, size=shape).astype("int32")
    return {"indices": indices, **conditions(prior, n, seed)}


def train(
    model, batches, epochs=1, repeat=1, optimizer=None, run_eagerly=False
):
    """Keras history of `epochs` over `repeat` times a list of batches.

    Eager where a single step is enough: tracing takes seconds.
    """
    dataset = tf.data.Dataset.from_tensors(batches[0])
    for batch in batches[1:]:
        dataset = dataset.concatenate(tf.data.Dataset.from_tensors(batch))
    if optimizer or not model.compiled:
        optimizer = optimizer or keras.optimizers.Adam(0.01)
        model.compile(optimizer, run_eagerly=run_eagerly, jit_compile=False)
    return model.fit(
        dataset.repeat(repeat), epochs=epochs, shuffle=False, verbose=0
    ).history


def evaluate(model, batch):
    if not model.compiled:
        model.compile(jit_compile=False)
    dataset = tf.data.Dataset.from_tensors(batch)
    return model.evaluate(dataset, verbose=0, return_dict=True)


# Every layer and model, in one way


def batch_of(model, inputs):
    """Call arguments of `model` as its `fit` takes them."""
    if isinstance(model, modules.VQVAE):
        return inputs[0]
    names = ("indices", "upper", "label", "slice_position")
    inputs = [tuple(x) if isinstance(x, list) else x for x in inputs]
    return dict(zip(names, inputs, strict=False))


def symbols_of(inputs):
    return tf.nest.map_structure(
        lambda x: keras.Input(x.shape[1:], dtype=str(x.dtype)), list(inputs)
    )


def float_outputs(layer, inputs, **options):
    outputs = tf.nest.flatten(layer(*inputs, **options))
    return [x for x in outputs if tf.as_dtype(x.dtype).is_floating]


def training_loss(layer, inputs):
    if isinstance(layer, keras.Model):
        return layer._batch_loss(batch_of(layer, inputs), training=True)
    outputs = float_outputs(layer, inputs, training=True)
    losses = [tf.reduce_mean(output**2) for output in outputs]
    return tf.add_n(losses + layer.losses)


def check_layer(cls, kwargs, inputs, shapes, trainable, frozen, folder):
    """Check what every layer and model has to do.

    Args:
        kwargs: constructor arguments.
        inputs: tuple of arrays or lists of these, the arguments of a call.
        shapes: expected shapes of the outputs.
        trainable, frozen: expected numbers of weight variables.
        folder: where to save.
    """
    layer = cls(**kwargs)
    config = layer.get_config()
    assert {name: config[name] for name in kwargs} == kwargs

    outputs = tf.nest.flatten(layer(*inputs))
    assert [tuple(output.shape) for output in outputs] == shapes
    symbols = symbols_of(inputs)
    symbolic = tf.nest.flatten(layer(*symbols))
    assert [(len(inputs[0]), *s.shape[1:]) for s in symbolic] == shapes
    assert [s.dtype for s in symbolic] == [o.dtype.name for o in outputs]

    assert len(layer.trainable_weights) == trainable
    assert len(layer.non_trainable_weights) == frozen

    is_model = isinstance(layer, keras.Model)
    model = layer if is_model else keras.Model(symbols, symbolic)
    opened = check_saving(model, inputs, folder / "layer.keras")
    # Opening it is `from_config` of the configuration written as JSON.
    again = opened if is_model else opened.get_layer(layer.name)
    assert type(again) is cls and again.get_config() == config
    check_training(layer, inputs)
    check_mixed_precision(cls, kwargs, inputs, folder / "mixed.keras")


def check_saving(model, inputs, path):
    perturb(model)
    expected = tf.nest.flatten(model_call(model, inputs))
    opened = reload(model, path)
    assert_all_equal(weights_of(opened), weights_of(model))
    found = tf.nest.flatten(model_call(opened, inputs))
    assert_all_equal(found, expected)
    return opened


def model_call(model, inputs):
    """Functional models take one list, ours positional arguments."""
    functional = type(model).__name__ == "Functional"
    return model(list(inputs)) if functional else model(*inputs)


def check_training(layer, inputs):
    with tf.GradientTape() as tape:
        loss = training_loss(layer, inputs)
    gradients = tape.gradient(loss, layer.trainable_variables)
    unreached = [
        variable.path
        for variable, gradient in zip(
            layer.trainable_variables, gradients, strict=True
        )
        if gradient is None
    ]
    assert not unreached

    before = weights_of(layer)
    if isinstance(layer, keras.Model):
        train(layer, [batch_of(layer, inputs)], run_eagerly=True)
    else:
        fit_wrapped(layer, inputs)
    after = weights_of(layer)
    assert all(np.isfinite(weight).all() for weight in after)
    moved = [np.any(a != b) for a, b in zip(after, before, strict=True)]
    assert any(moved)


def fit_wrapped(layer, inputs):
    symbols = symbols_of(inputs)
    entering = list(symbols)
    if not layer.trainable_weights:  # `fit` warns without any
        entering[0] = keras.layers.Dense(inputs[0].shape[-1])(symbols[0])
    outputs = float_outputs(layer, entering)
    model = keras.Model(symbols, outputs)
    losses = ["mse"] * len(outputs)
    model.compile(keras.optimizers.Adam(0.01), losses, run_eagerly=True)
    n = len(inputs[0])
    targets = [np.zeros((n, *x.shape[1:]), "float32") for x in outputs]
    history = model.fit(list(inputs), targets, verbose=0).history
    assert np.isfinite(history["loss"]).all()


def check_mixed_precision(cls, kwargs, inputs, path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        layer = cls(**kwargs)
        outputs = tf.nest.flatten(layer(*inputs))
        symbols = symbols_of(inputs)
        model = layer
        if not isinstance(layer, keras.Model):
            model = keras.Model(symbols, tf.nest.flatten(layer(*symbols)))
    finally:
        keras.config.set_dtype_policy("float32")

    for output in outputs:
        assert np.isfinite(tf.cast(output, tf.float32)).all()
    assert {w.dtype for w in layer.trainable_weights} <= {"float32"}
    inside = [layer, *layer._flatten_layers(include_self=False)]
    for part in inside:
        exact = isinstance(part, modules.VectorQuantizer)
        exact |= part.name == "preview"
        exact |= part.name == "logits" or part is getattr(layer, "logits", 0)
        assert part.compute_dtype == ("float32" if exact else "bfloat16")

    # Opened where the policy is another, as by predict.py, it is the same.
    opened = reload(model, path)
    assert_all_equal(tf.nest.flatten(model_call(opened, inputs)), outputs)


SMALL_VQVAE = {
    "image_size": (16, 16),
    "downsampling": 2,
    "channels": 8,
    "residual_blocks": 1,
    "residual_channels": 4,
    "num_embeddings": 8,
    "embedding_dim": 4,
}
SMALL_PRIOR = {
    "num_embeddings": 5,
    "latent_grid": (4, 8),
    "channels": 8,
    "blocks": 1,
    "kernel_size": 3,
    "head_layers": 1,
}
IMAGES = blocky_images(2)
FEATURES = noise(2, 4, 6, 8)
INDICES = np.arange(64, dtype="int32").reshape(2, 4, 8) % 5
POSITIONS = np.array([0.2, 0.9], "float32")
NUMBERS = np.array([1, -1], "int32")  # of labels, the second null
UPPER = [INDICES[:, :2, :4], INDICES[:, 2:3, 1:3]]
CONDITIONED = SMALL_PRIOR | LOWER | {"condition_dropout": 0.3}
# Mix, place, slice and its null, labels; codes above, two units, split.
CONTEXT_WEIGHTS = 2 + 2 + 3 + 1 + 1 + 8 + 2
# Name, class, arguments, inputs, output shapes, trainable weights, others.
# A convolution or Dense has two, a residual unit two of them.
LAYERS = [
    (
        "quantizer-ema",
        modules.VectorQuantizer,
        {"num_embeddings": 5, "embedding_dim": 8, "decay": 0.9},
        (FEATURES,),
        [(2, 4, 6, 8), (2, 4, 6)],
        0,
        4,  # codebook, ema_count, ema_sum, step
    ),
    (
        "quantizer-gradient",
        modules.VectorQuantizer,
        {
            "num_embeddings": 5,
            "embedding_dim": 8,
            "codebook_update": "gradient",
            "commitment_cost": 0.5,
            "epsilon": 1e-4,
            "restart_threshold": 0.1,
            "seed": 7,
        },
        (FEATURES,),
        [(2, 4, 6, 8), (2, 4, 6)],
        1,
        3,
    ),
    (
        "quantizer-cosine",
        modules.VectorQuantizer,
        {
            "num_embeddings": 5,
            "embedding_dim": 8,
            "codebook_distance": "cosine",
        },
        (FEATURES,),
        [(2, 4, 6, 8), (2, 4, 6)],
        0,
        4,
    ),
    (
        "residual-stack",
        modules.ResidualStack,
        {"channels": 8, "blocks": 2, "residual_channels": 4},
        (FEATURES,),
        [(2, 4, 6, 8)],
        8,
        0,
    ),
    (
        "encoder",
        modules.Encoder,
        {
            "channels": 8,
            "downsampling": 4,
            "residual_blocks": 1,
            "residual_channels": 4,
        },
        (IMAGES,),
        [(2, 4, 4, 8)],
        4 + 2 + 4,  # halvings, 3x3, residual unit
        0,
    ),
    (
        "decoder",
        modules.Decoder,
        {
            "filters": 3,
            "channels": 8,
            "upsampling": 4,
            "residual_blocks": 1,
            "residual_channels": 4,
        },
        (FEATURES,),
        [(2, 16, 24, 3)],
        2 + 4 + 2 + 2,  # 3x3, residual unit, doubling, head
        0,
    ),
    (
        "causal-conv",
        modules.CausalConv2D,
        {"filters": 6, "kernel_size": 5, "mask_type": "A"},
        (FEATURES,),
        [(2, 4, 6, 6)],
        2,
        0,
    ),
    (
        "causal-block",
        modules.CausalResidualBlock,
        {"channels": 8, "dropout": 0.2},
        (FEATURES,),
        [(2, 4, 6, 8)],
        6,
        0,
    ),
    (
        "causal-block-context",
        modules.CausalResidualBlock,
        {"channels": 8, "dropout": 0.0, "use_context": True},
        (FEATURES, noise(2, 4, 6, 3)),
        [(2, 4, 6, 8)],
        8,
        0,
    ),
    (
        "causal-conv-row",
        modules.CausalConv2D,
        {"filters": 6, "kernel_size": 3, "mask_type": "row", "rows": 1},
        (FEATURES,),
        [(2, 4, 6, 6)],
        2,
        0,
    ),
    (
        "gated-block",
        modules.GatedBlock,
        {"channels": 8, "kernel_size": 3, "mask_type": "B", "dropout": 0.2},
        (FEATURES, noise(2, 4, 6, 8, seed=1)),
        [(2, 4, 6, 8), (2, 4, 6, 8)],
        8,  # two stacks, link, expansion
        0,
    ),
    (
        "gated-block-context",
        modules.GatedBlock,
        {
            "channels": 8,
            "kernel_size": 5,
            "mask_type": "A",
            "use_context": True,
        },
        (FEATURES, noise(2, 4, 6, 8, seed=1), noise(2, 4, 6, 3)),
        [(2, 4, 6, 8), (2, 4, 6, 8)],
        9,
        0,
    ),
    (
        "causal-attention",
        modules.CausalAttention,
        {"channels": 8, "heads": 2, "dropout": 0.2},
        (FEATURES, noise(2, 4, 6, 8, seed=1)),
        [(2, 4, 6, 8)],
        8,  # query, key, value, expansion
        0,
    ),
    (
        "context-map",
        modules.ContextMap,
        {
            "grid": (4, 8),
            "channels": 8,
            "num_embeddings": 5,
            "position_features": True,
            "slice_condition": True,
            "num_labels": 2,
            "upper_grids": ((2, 4), (1, 2)),
            "dropout": 0.3,
        },
        (POSITIONS, NUMBERS, UPPER),
        [(2, 4, 8, 8)],
        CONTEXT_WEIGHTS,
        0,
    ),
    (
        "context-map-place",
        modules.ContextMap,
        {"grid": (3, 4), "channels": 8, "position_features": True},
        (POSITIONS, NUMBERS),
        [(2, 3, 4, 8)],
        4,
        0,
    ),
    # A level: encoder 8, projection 2, decoder 8; and its quantizer; above the
    # first also a preview, 2.
    *[
        (
            f"vqvae-{levels}-{update}",
            modules.VQVAE,
            SMALL_VQVAE
            | {
                "levels": levels,
                "codebook_update": update,
                "codebook_distance": "cosine" if levels == 2 else "euclidean",
                "upper_weight": 0.5,
            },
            (IMAGES,),
            [(2, 16, 16, 1)],
            (18 + (update == "gradient")) * levels + 2 * (levels - 1),
            (4 - (update == "gradient")) * levels,
        )
        for levels, update in ((1, "ema"), (2, "gradient"), (3, "ema"))
    ],
    # Embedding, stem, blocks, head, logits; with conditions the context map.
    (
        "pixelcnn",
        modules.PixelCNN,
        SMALL_PRIOR,
        (INDICES,),
        [(2, 4, 8, 5)],
        1 + 2 + 6 + 2 + 2,
        0,
    ),
    (
        "pixelcnn-lower",
        modules.PixelCNN,
        CONDITIONED | {"dropout": 0.1, "codebook_sha256": "ab"},
        (INDICES, UPPER, NUMBERS, POSITIONS),
        [(2, 4, 8, 5)],
        1 + 2 + 8 + 2 + 2 + CONTEXT_WEIGHTS,
        0,
    ),
    (
        "gated",
        modules.GatedPixelCNN,
        SMALL_PRIOR,
        (INDICES,),
        [(2, 4, 8, 5)],
        1 + 8 + 8 + 2 + 2,
        0,
    ),
    (
        "gated-lower",
        modules.GatedPixelCNN,
        CONDITIONED | {"dropout": 0.1, "block_kernel_size": 5},
        (INDICES, UPPER, NUMBERS, POSITIONS),
        [(2, 4, 8, 5)],
        1 + 9 + 9 + 2 + 2 + CONTEXT_WEIGHTS,
        0,
    ),
    (
        "pixelsnail",
        modules.PixelSNAIL,
        SMALL_PRIOR | {"blocks": 5, "heads": 2},
        (INDICES,),
        [(2, 4, 8, 5)],
        1 + 8 + 5 * 8 + 2 * 8 + 2 + 2,  # attention after blocks 4 and 5
        0,
    ),
    (
        "pixelsnail-lower",
        modules.PixelSNAIL,
        CONDITIONED | {"dropout": 0.1, "attention": False},
        (INDICES, UPPER, NUMBERS, POSITIONS),
        [(2, 4, 8, 5)],
        1 + 9 + 9 + 2 + 2 + CONTEXT_WEIGHTS,
        0,
    ),
]


# A layer of layers is built by the call that follows when it is opened.
@pytest.mark.filterwarnings("ignore:`build\\(\\)` was called on layer")
@pytest.mark.parametrize("case", LAYERS, ids=[case[0] for case in LAYERS])
def test_layer(case, tmp_path):
    check_layer(*case[1:], folder=tmp_path)


def test_every_class_is_checked():
    """Prevents: a class added without the checks above."""
    abstract = {
        modules.Configurable,
        modules.TrainableModel,
        modules.AutoregressivePrior,
    }
    classes = {
        value
        for value in vars(modules).values()
        if isinstance(value, type)
        and issubclass(value, modules.Configurable)
        and value not in abstract
    }
    assert {case[1] for case in LAYERS} == classes
    tested = {type(tiny_prior(network)) for network in NETWORKS}
    assert tested == set(modules.PRIORS.values())


# Vector quantizer


def quantizer_with(codebook, count=1.0, step=100, **settings):
    """Quantizer in a given state; step 100 is past the data start."""
    codebook = np.asarray(codebook, "float32")
    quantizer = modules.VectorQuantizer(*codebook.shape, **settings)
    quantizer.build((None, codebook.shape[1]))
    count = np.broadcast_to(np.float32(count), codebook.shape[:1])
    quantizer.codebook.assign(codebook)
    quantizer.ema_count.assign(count)
    quantizer.ema_sum.assign(codebook * count[:, None])
    quantizer.step.assign(step)
    return quantizer


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
    np.testing.assert_allclose(
        quantized.numpy().reshape(-1, 4), codebook[found], rtol=0, atol=2e-5
    )
    assert indices.dtype == tf.int32


def test_gradient_passes_straight_through():
    """Prevents: an encoder that gets no or a scaled gradient."""
    quantizer = quantizer_with(noise(8, 4))
    latents = tf.constant(noise(2, 3, 3, 4, seed=1))
    weights = noise(2, 3, 3, 4, seed=2)
    with tf.GradientTape() as tape:
        tape.watch(latents)
        loss = tf.reduce_sum(quantizer(latents)[0] * weights)
    np.testing.assert_array_equal(tape.gradient(loss, latents), weights)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_state_moves_only_in_training(update):
    """Prevents: evaluation that changes the codebook it measures."""
    quantizer = quantizer_with(noise(8, 4), codebook_update=update)
    latents = noise(5, 4, seed=1)
    before = weights_of(quantizer)
    for flag in ({}, {"training": False}):
        quantizer(latents, **flag)
        assert_all_equal(weights_of(quantizer), before)
    quantizer(latents, training=True)
    assert quantizer.step.numpy() == 101
    names = {
        weight.name
        for weight, old in zip(quantizer.weights, before, strict=True)
        if np.any(weight.numpy() != old)
    }
    moved = {"ema_count", "ema_sum", "step"}
    # By gradient the optimizer moves the codebook, not the call.
    assert names == (moved | {"codebook"} if update == "ema" else moved)


def test_decay_zero_gives_means_of_assigned_latents():
    """Prevents: an average over the wrong latents or the wrong count."""
    codebook = 4 * np.eye(4, dtype="float32")
    latents = np.repeat(codebook, 8, axis=0) + noise(32, 4, scale=0.5)
    quantizer = quantizer_with(codebook, decay=0.0)
    _, indices = quantizer(latents, training=True)
    np.testing.assert_array_equal(indices, np.repeat(np.arange(4), 8))
    means = latents.reshape(4, 8, 4).mean(axis=1)
    # Laplace smoothing with epsilon = 1e-5 of a count of 8.
    np.testing.assert_allclose(quantizer.codebook, means, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(quantizer.ema_count, np.full(4, 8.0))


@pytest.mark.parametrize("step, decay", [(5, 0.99), (100, 0.5), (5000, 0.99)])
def test_moving_average_by_hand(step, decay):
    """Prevents: a decay or warm-up other than documented."""
    codebook = 4 * np.eye(4, dtype="float32")
    latents = np.repeat(codebook[:2], 8, axis=0) + noise(16, 4, scale=0.5)
    count = np.array([3.0, 5.0, 7.0, 9.0])
    quantizer = quantizer_with(codebook, count, step, decay=decay, epsilon=0.1)
    quantizer(latents, training=True)

    kept = min(decay, (1 + step) / (10 + step))
    sums = np.concatenate([latents.reshape(2, 8, 4).sum(1), np.zeros((2, 4))])
    new_count = kept * count + (1 - kept) * np.array([8, 8, 0, 0])
    new_sum = kept * codebook * count[:, None] + (1 - kept) * sums
    total = new_count.sum()
    smoothed = (new_count + 0.1) / (total + 4 * 0.1) * total
    # 1e-5: some tens of float32 roundings of 6e-8.
    np.testing.assert_allclose(quantizer.ema_count, new_count, rtol=1e-5)
    np.testing.assert_allclose(quantizer.ema_sum, new_sum, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        quantizer.codebook, new_sum / smoothed[:, None], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_first_batch_sets_the_codebook(update):
    """Prevents: codes far from the data, of which one takes every latent."""
    quantizer = modules.VectorQuantizer(8, 4, codebook_update=update)
    latents = noise(2, 5, 5, 4, offset=30)
    quantizer(latents, training=True)
    rows = latents.reshape(-1, 4)
    codebook = quantizer.codebook.numpy()
    assert all(row_in(code, rows) for code in codebook)
    assert len(np.unique(codebook, axis=0)) == 8
    np.testing.assert_array_equal(
        quantizer.ema_sum, codebook * quantizer.ema_count.numpy()[:, None]
    )


def clusters(centres, seed, n=16):
    """`n` latents about each of the `centres` `(K, D)`."""
    spread = noise(n, *centres.shape, seed=seed, scale=0.1)
    return (centres + spread).reshape(-1, centres.shape[1])


def codes_used(quantizer, latents):
    return len(np.unique(quantizer(latents)[1]))


def test_data_start_uses_the_codebook():
    """Prevents: one code for all latents, the nearest of a far codebook."""
    centres = noise(16, 4, seed=1, offset=30)
    used = []
    for step in (0, 1):  # 1 is past the start from the data
        quantizer = modules.VectorQuantizer(16, 4, restart_threshold=0.0)
        quantizer.build((None, 4))
        quantizer.step.assign(step)
        for seed in range(30):
            quantizer(clusters(centres, seed), training=True)
        used.append(codes_used(quantizer, clusters(centres, 99)))
    assert used[0] >= 8 and used[1] <= 2


def test_restarts_follow_moving_latents():
    """Prevents: codes that stay dead for good once the latents have left."""
    first, then = noise(16, 4, seed=1), noise(16, 4, seed=2, offset=30)
    used = []
    for threshold in (0.02, 0.0):
        quantizer = modules.VectorQuantizer(
            16, 4, decay=0.9, restart_threshold=threshold
        )
        for seed in range(20):
            quantizer(clusters(first, seed), training=True)
        assert codes_used(quantizer, clusters(first, 99)) >= 8
        for seed in range(100):
            quantizer(clusters(then, seed), training=True)
        used.append(codes_used(quantizer, clusters(then, 99)))
    assert used[0] >= 12 and used[1] <= 2


def test_cosine_tells_directions_apart_at_any_length():
    """Prevents: a codebook spent on how long the latents are.

    Here in eight directions and over three orders of magnitude.
    """
    directions = np.concatenate([np.eye(4), -np.eye(4)])
    accuracy = {}
    for distance in ("cosine", "euclidean"):
        quantizer = modules.VectorQuantizer(16, 4, codebook_distance=distance)
        for seed in range(40):
            latents = clusters(directions, seed)
            lengths = 10 ** np.random.default_rng(seed).uniform(0, 3, 128)
            latents = np.float32(latents * lengths[:, None])
            _, indices = quantizer(latents, training=True)
        # A code stands for the direction that it is given most.
        table = np.zeros((16, 8))
        np.add.at(table, (indices.numpy(), np.arange(128) % 8), 1)
        accuracy[distance] = table.max(axis=1).sum() / 128
    assert accuracy["cosine"] == 1
    assert accuracy["euclidean"] < 0.8


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_cosine_compares_directions_only(update):
    """Prevents: a length that enters distance, codes, losses or gradient."""
    codebook, latents = noise(8, 4, scale=3), noise(40, 4, seed=1)
    quantizer = quantizer_with(
        codebook, codebook_distance="cosine", codebook_update=update
    )
    quantizer(latents, training=True)
    lengths = np.linalg.norm(quantizer.lookup(np.arange(8)), axis=1)
    # 1e-6: a few float32 roundings.
    np.testing.assert_allclose(lengths, np.ones(8), rtol=1e-6)

    codebook = quantizer.codebook.numpy()
    cosines = latents @ (codebook / np.linalg.norm(codebook, axis=1)[:, None]).T
    quantized, indices = quantizer(latents)
    np.testing.assert_array_equal(indices, cosines.argmax(axis=1))
    np.testing.assert_allclose(
        quantized, quantizer.lookup(indices), rtol=0, atol=1e-6
    )
    losses = quantizer.losses
    for scale in (1e-3, 1e3):
        _, found = quantizer(scale * latents)
        np.testing.assert_array_equal(found, indices)
        np.testing.assert_allclose(quantizer.losses, losses, rtol=1e-5)

    # The gradient is that of the direction: none along the latent itself.
    latents, weights = tf.constant(latents), noise(40, 4, seed=2)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(latents)
        through = tf.reduce_sum(quantizer(latents)[0] * weights)
        direct = tf.math.l2_normalize(latents, axis=-1)
        direct = tf.reduce_sum(direct * weights)
    gradient = tape.gradient(through, latents).numpy()
    np.testing.assert_allclose(
        gradient, tape.gradient(direct, latents), atol=1e-5
    )
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0.1
    assert np.abs((gradient * latents).numpy().sum(axis=1)).max() < 1e-4


def test_dead_code_restarts_with_its_statistics():
    """Prevents: a restarted code that its old average pulls back."""
    codebook = [[0, 0], [10, 0], [500, 500], [0, 900]]
    # Mean use is 10, so dead is under 0.2: code 2, but not code 3.
    quantizer = quantizer_with(codebook, [10, 10, 0, 0.5], step=100)
    latents = np.concatenate(
        [noise(30, 2), noise(10, 2, seed=1) + np.float32([10, 0])]
    )
    quantizer(latents, training=True)
    codes, count = quantizer.codebook.numpy(), quantizer.ema_count.numpy()
    assert row_in(codes[2], latents)
    np.testing.assert_array_equal(quantizer.ema_sum[2], codes[2] * count[2])
    assert count[2] == 1.0  # 0.1 times the mean use
    # Rarely used, not dead. 1e-4: smoothing by 1e-5 of a count of 0.5.
    np.testing.assert_allclose(codes[3], codebook[3], rtol=1e-4)
    for used in (0, 1):
        assert not row_in(codes[used], latents)
    assert 2 in quantizer(latents)[1]


def test_restart_prefers_what_is_badly_quantized():
    """Prevents: restarts on top of codes that fit already."""
    codebook = np.float32([[0, 0], [10, 0], [20, 0], [30, 0]])
    outlier = np.float32([[10, 50]])
    latents = np.concatenate([np.repeat(codebook, 50, axis=0), outlier])
    for seed in range(5):
        # The dead code is the last: it gets the first draw all the same.
        codes = np.append(codebook, [[0, -900]], axis=0)
        quantizer = quantizer_with(codes, [9, 9, 9, 9, 0], seed=seed)
        quantizer(latents, training=True)
        np.testing.assert_array_equal(quantizer.codebook[4], outlier[0])


def test_restart_can_be_switched_off():
    """Prevents: restarts in the ablation without restarts."""
    codebook = np.float32([[0, 0], [10, 0], [500, 500], [0, 900]])
    quantizer = quantizer_with(codebook, restart_threshold=0.0)
    for seed in range(3):
        quantizer(noise(40, 2, seed=seed), training=True)
    # 1e-4: smoothing by 1e-5 of counts of at least 0.7.
    np.testing.assert_allclose(quantizer.codebook[1:], codebook[1:], rtol=1e-4)


def test_gradient_codebook_moves_by_its_gradient():
    """Prevents: a codebook loss that reaches the encoder or no code."""
    codebook = noise(4, 3)
    quantizer = quantizer_with(
        codebook, codebook_update="gradient", commitment_cost=0.5
    )
    latents = tf.constant(noise(20, 3, seed=1))
    with tf.GradientTape() as tape:
        tape.watch(latents)
        _, indices = quantizer(latents, training=True)
        loss = tf.add_n(quantizer.losses)
    code_gradient, latent_gradient = tape.gradient(
        loss, [quantizer.codebook.value, latents]
    )
    difference = codebook[indices.numpy()] - latents.numpy()
    expected = np.zeros_like(codebook)
    np.add.at(expected, indices.numpy(), 2 * difference / latents.numpy().size)
    # 1e-6: sums of some 20 float32 terms of size 0.1.
    np.testing.assert_allclose(
        tf.convert_to_tensor(code_gradient), expected, atol=1e-6
    )
    np.testing.assert_allclose(
        latent_gradient, -0.5 * 2 * difference / difference.size, atol=1e-6
    )
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.apply_gradients([(code_gradient, quantizer.codebook)])
    np.testing.assert_allclose(
        quantizer.codebook, codebook - expected, atol=1e-6
    )


def test_codebook_is_trainable_only_by_gradient():
    """Prevents: an optimizer that moves a codebook of averages."""
    assert quantizer_with(noise(4, 3)).trainable_weights == []
    quantizer = quantizer_with(noise(4, 3), codebook_update="gradient")
    assert [w.name for w in quantizer.trainable_weights] == ["codebook"]


@pytest.mark.parametrize("training", [False, True])
def test_losses_by_hand(training):
    """Prevents: a wrong factor, and losses that add up over calls."""
    codebook, latents = noise(4, 3), noise(20, 3, seed=1)
    for update in ("ema", "gradient"):
        quantizer = quantizer_with(
            codebook, codebook_update=update, commitment_cost=0.7
        )
        if not training:
            quantizer(latents)
        _, indices = quantizer(latents, training=training)
        square = np.mean((codebook[indices.numpy()] - latents) ** 2)
        expected = [0.7 * square, square][: 1 + (update == "gradient")]
        # 1e-6: the rounding of a float32 mean of 60 numbers.
        np.testing.assert_allclose(quantizer.losses, [sum(expected)], rtol=1e-6)


def test_batch_of_zeros_keeps_the_state_finite():
    """Prevents: 0/0 where every latent and every error is zero."""
    quantizer = modules.VectorQuantizer(8, 4)
    for _ in range(3):
        quantized, indices = quantizer(np.zeros((2, 3, 3, 4)), training=True)
    np.testing.assert_array_equal(quantized, np.zeros((2, 3, 3, 4)))
    assert all(np.isfinite(weight).all() for weight in weights_of(quantizer))
    assert indices.shape == (2, 3, 3)


def test_batch_smaller_than_the_codebook():
    """Prevents: `top_k` asked for more latents than there are."""
    quantizer = modules.VectorQuantizer(8, 4)
    latents = noise(1, 3, 4)
    for _ in range(3):
        quantizer(latents, training=True)
    assert all(np.isfinite(weight).all() for weight in weights_of(quantizer))
    quantized, _ = quantizer(latents)
    # Three latents, eight codes: each is a code but for smoothing by 1e-5 of
    # a count of about 0.04.
    np.testing.assert_allclose(quantized, latents, rtol=5e-3)


def test_empty_batch_has_empty_indices():
    """Prevents: an error where a filter has left nothing."""
    quantized, indices = quantizer_with(noise(8, 4))(np.zeros((0, 3, 3, 4)))
    assert quantized.shape == (0, 3, 3, 4) and indices.shape == (0, 3, 3)


def test_seed_fixes_training():
    """Prevents: restarts drawn from a generator that is not seeded."""
    states = []
    for seed in (3, 3, 4):
        quantizer = modules.VectorQuantizer(8, 4, seed=seed)
        for k in range(3):
            quantizer(noise(40, 4, seed=k), training=True)
        states.append(quantizer.codebook.numpy())
    np.testing.assert_array_equal(states[0], states[1])
    assert np.any(states[0] != states[2])


def test_indices_of_code_vectors_are_their_own():
    """Prevents: codes that encoding a decoded grid would change."""
    quantizer = quantizer_with(noise(8, 4))
    indices = np.arange(24, dtype="int32").reshape(2, 3, 4) % 8
    vectors = quantizer.lookup(indices)
    np.testing.assert_array_equal(vectors, quantizer.codebook.numpy()[indices])
    np.testing.assert_array_equal(quantizer(vectors)[1], indices)


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_embeddings", 1),
        ("num_embeddings", 2**20 + 1),
        ("embedding_dim", 0),
        ("embedding_dim", 2**14 + 1),
        ("commitment_cost", -0.1),
        ("commitment_cost", float("nan")),
        ("codebook_update", "sgd"),
        ("codebook_distance", "angle"),
        ("decay", -0.1),
        ("decay", 1.0),
        ("decay", float("nan")),
        ("epsilon", 0.0),
        ("restart_threshold", -0.1),
        ("restart_threshold", 1.0),
    ],
)
def test_quantizer_refuses(name, value):
    """Prevents: a bad value that trains to nonsense, or fails far away."""
    settings = {"num_embeddings": 8, "embedding_dim": 4, name: value}
    with pytest.raises(ValueError, match=f"^{name}: expected .*, found"):
        modules.VectorQuantizer(**settings)


def test_quantizer_refuses_other_last_axis():
    """Prevents: latents cut into vectors of another length."""
    with pytest.raises(ValueError, match="last axis .* expected 4, found 8"):
        modules.VectorQuantizer(8, 4)(noise(2, 3, 3, 8))


# Encoder, decoder, usage


def test_stage_widths():
    assert modules.stage_widths(64, 8) == [16, 32, 64]
    assert modules.stage_widths(2, 8) == [1, 1, 2]


def test_usage_is_taken_over_the_epoch():
    """Prevents: the mean of batch perplexities, here 1 instead of 2."""
    usage = modules.CodebookUsage(8, suffix="_2")
    usage.update_state(np.full((2, 3, 3), 1, "int32"))
    usage.update_state(np.full((2, 3, 3), 5, "int32"))
    result = usage.result()
    assert set(result) == {"codebook_usage_2", "perplexity_2"}
    assert result["codebook_usage_2"] == 0.25
    # 1e-6: exp and log in float32.
    assert float(result["perplexity_2"]) == pytest.approx(2, rel=1e-6)
    usage.reset_state()
    assert usage.result()["codebook_usage_2"] == 0
    again = modules.CodebookUsage.from_config(usage.get_config())
    assert again.get_config() == usage.get_config()


# VQ-VAE


@pytest.mark.parametrize(
    "size, levels, downsampling, grids",
    [
        # 240 x 256 has the arithmetic of the first: 60 x 64, 30 x 32, 15 x 16.
        ((24, 32), 3, 2, [(12, 16), (6, 8), (3, 4)]),
        ((32, 16), 2, 4, [(8, 4), (4, 2)]),
        ((16, 24), 1, 8, [(2, 3)]),
    ],
)
def test_latent_grids(size, levels, downsampling, grids):
    """Prevents: height and width, or the order of levels, mixed up."""
    model = tiny_vqvae(size, levels=levels, downsampling=downsampling)
    perturb(model, scale=0.1)
    assert model.latent_grids == grids
    images = blocky_images(2, *size)
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
    np.testing.assert_allclose(
        model.decode_indices(indices), reconstructed, atol=1e-4
    )


def test_every_level_reaches_the_image():
    """Prevents: an upper level that the decoder ignores."""
    model = tiny_vqvae(levels=3)
    perturb(model)
    indices = [grid.numpy() for grid in model.encode(blocky_images(1))]
    images = model.decode_indices(indices).numpy()
    for level in range(3):
        changed = [grid.copy() for grid in indices]
        changed[level] = (changed[level] + 1) % 8
        assert np.any(model.decode_indices(changed).numpy() != images)


@pytest.mark.parametrize(
    "settings",
    [{"levels": 2}, {"codebook_update": "gradient", "ssim_weight": 0.5}],
    ids=["two-levels", "gradient"],
)
def test_training_reduces_the_loss(settings):
    """Prevents: a loss that does not reach the weights."""
    images = blocky_images(8)
    model = tiny_vqvae(**settings, data_variance=float(images.var()))
    first, last = train(model, [images], epochs=2, repeat=20)["loss"]
    assert last < 0.6 * first  # means over steps 1 to 20 and 21 to 40
    trained = [model.part("quantizer", i + 1) for i in range(model.levels)]
    assert all(quantizer.step.numpy() == 40 for quantizer in trained)

    # Using the model afterwards does not train it.
    before = weights_of(model)
    model.decode_indices(model.encode(images))
    evaluate(model, images)
    assert_all_equal(weights_of(model), before)


def still_vqvae(**settings):
    """A VQ-VAE that `fit` with learning rate 0 leaves as it is."""
    model = tiny_vqvae(
        codebook_update="gradient", restart_threshold=0.0, **settings
    )
    perturb(model)  # also sets the step of the quantizer past the data start
    return model


def losses_by_hand(model, images):
    """Loss terms of one level, from their definitions."""
    latents = model.projection_1(model.encoder_1(images)).numpy()
    output = model(images)
    ssim = float(tf.reduce_mean(tf.image.ssim(images, output, 1.0)))
    codes = model.quantizer_1.lookup(model.encode(images)[0]).numpy()
    square = float(np.mean((codes - latents) ** 2))
    error = float(np.mean((images - output.numpy()) ** 2))
    reconstruction = error / model.data_variance
    reconstruction += model.ssim_weight * (1 - ssim)
    commitment = (model.commitment_cost + 1) * square  # and codebook loss
    return {
        "loss": reconstruction + commitment,
        "reconstruction_loss": reconstruction,
        "commitment_loss": commitment,
        "ssim": ssim,
    }


def test_epoch_loss_is_the_mean_over_images():
    """Prevents: an epoch loss of 0.0, or that of the last batch alone."""
    model = still_vqvae(ssim_weight=0.5, data_variance=0.05)
    batches = [blocky_images(4, seed=1), 0.2 * blocky_images(2, seed=2)]
    first, last = [losses_by_hand(model, batch) for batch in batches]
    before = model.encoder_1.mix.kernel.numpy()
    history = train(model, batches, optimizer=keras.optimizers.SGD(0.0))
    np.testing.assert_array_equal(model.encoder_1.mix.kernel, before)

    others = {"codebook_usage", "perplexity"}
    norms = {"gradient_norm", "parameter_norm"}  # of the last step
    assert set(history) == {*first, *others, *norms}
    for name in first:
        mean = (4 * first[name] + 2 * last[name]) / 6
        assert abs(mean - last[name]) > 1e-2 * abs(mean)
        # 1e-4: SSIM divides differences of nearly equal float32 moments.
        assert history[name] == [pytest.approx(mean, rel=1e-4)]

    # `test_step` measures the same on a batch.
    evaluation = evaluate(model, batches[1])
    for name in last:
        assert evaluation[name] == pytest.approx(last[name], rel=1e-4)
    used = np.unique(model.encode(batches[1])[0])
    assert evaluation["codebook_usage"] == len(used) / 8


def test_metrics_of_each_level():
    """Prevents: usage of two levels under one name."""
    model = tiny_vqvae(levels=2)
    names = set(evaluate(model, blocky_images(2)))
    assert names >= {"codebook_usage", "codebook_usage_2", "perplexity_2"}


def test_upper_levels_show_the_image_by_themselves():
    """Prevents: a preview that looks below, or of another size or weight."""
    model = tiny_vqvae((16, 24), levels=3, downsampling=2, upper_weight=0.5)
    perturb(model)
    images = blocky_images(2, 16, 24)
    indices = model.encode(images)
    decoded, errors = None, []
    for level in (3, 2):
        quantized = model.part("quantizer", level).lookup(indices[level - 1])
        decoded = model._decode_level(level, quantized, decoded)
        preview = model.part("preview", level)(decoded)[..., 0]
        rows, columns = model.latent_grids[level - 2]
        small = images.reshape(2, rows, 16 // rows, columns, 24 // columns)
        errors.append(np.mean((small.mean(axis=(2, 4)) - preview) ** 2))
    found = evaluate(model, images)
    expected = sum(errors) / model.data_variance
    np.testing.assert_allclose(found["upper_loss"], expected, rtol=1e-4)
    terms = found["reconstruction_loss"] + found["commitment_loss"]
    np.testing.assert_allclose(found["loss"], terms + 0.5 * expected, rtol=1e-4)


def test_an_upper_level_learns_only_if_asked():
    """Prevents: a silent top level: its preview must get better."""
    lost = {}
    for weight in (0.0, 1.0):
        model = tiny_vqvae(levels=2, upper_weight=weight)
        images = blocky_images(8)
        before = model.preview_2.kernel.numpy()
        train(model, [images], repeat=20)
        lost[weight] = evaluate(model, images)["upper_loss"]
        moved = (model.preview_2.kernel.numpy() != before).any()
        assert moved == (weight > 0)
    assert lost[1.0] < 0.5 * lost[0.0]


@pytest.mark.parametrize(
    "name, value",
    [
        ("image_size", (16, 18)),
        ("image_size", (18, 16)),
        ("image_size", (0, 16)),
        ("image_size", (16, 8192)),
        ("levels", 0),
        ("levels", 4),
        ("downsampling", 1),
        ("downsampling", 6),
        ("channels", 0),
        ("residual_channels", 0),
        ("residual_blocks", -1),
        ("num_embeddings", 1),
        ("data_variance", 0.0),
        ("data_variance", float("nan")),
        ("ssim_weight", -1.0),
        ("upper_weight", -1.0),
    ],
)
def test_vqvae_refuses(name, value):
    """Prevents: a size that comes back larger, or a late shape error."""
    settings = {"image_size": (16, 16), "downsampling": 4, name: value}
    with pytest.raises(ValueError, match=f"{name}.*: expected .*, found"):
        tiny_vqvae(**settings)


def test_size_must_divide_for_every_level():
    """Prevents: 20 pixels accepted for 4 because they are for 1 level."""
    tiny_vqvae((20, 20), downsampling=4)
    with pytest.raises(ValueError, match="multiples of 8 up to 4096"):
        tiny_vqvae((20, 20), downsampling=4, levels=2)


# Causal layers


@pytest.mark.parametrize("mask_type, own", [("A", 0), ("B", 1)])
def test_causal_conv_counts_the_positions_before(mask_type, own):
    """Prevents: a mask off by one, here as a count of visible ones."""
    layer = modules.CausalConv2D(1, 3, mask_type)
    layer.build((None, 3, 3, 1))
    layer.kernel.assign(np.ones(layer.kernel.shape))
    found = layer(np.ones((1, 3, 3, 1), "float32"))[0, ..., 0]
    # Left neighbour, two or three above, and itself for "B".
    before = np.array([[0, 1, 1], [2, 4, 3], [2, 4, 3]])
    np.testing.assert_array_equal(found, before + own)


def test_masked_kernel_weights_get_no_gradient():
    """Prevents: an optimizer that moves, and decays, what is hidden."""
    layer = modules.CausalConv2D(2, 3, "A")
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(noise(1, 4, 4, 3)) ** 2)
    gradient = tape.gradient(loss, layer.kernel.value).numpy()
    seen = np.any(gradient != 0, axis=(2, 3))
    np.testing.assert_array_equal(seen, [[1, 1, 1], [1, 0, 0]])


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 4, "mask_type": "A"},
        {"kernel_size": 65, "mask_type": "A"},
        {"kernel_size": 3, "mask_type": "C"},
    ],
)
def test_causal_conv_refuses(settings):
    with pytest.raises(ValueError, match="kernel_size|mask_type"):
        modules.CausalConv2D(4, **settings)


def context_map(grid=(6, 5), **settings):
    """A context map that tells its conditions apart."""
    layer = modules.ContextMap(grid, 16, num_embeddings=5, **settings)
    layer.build((None,))
    perturb(layer)
    return layer


def null(n):
    """Slice positions and labels of none of `n` images."""
    return np.full(n, -1, "float32"), np.full(n, -1, "int32")


def test_context_map_tells_places_and_slices_apart():
    """Prevents: two places or slices of the same features."""
    slices, none = np.linspace(0, 1, 9, dtype="float32"), null(9)[1]
    everything = context_map(position_features=True, slice_condition=True)
    context = everything(slices, none).numpy()
    assert len(np.unique(context.reshape(-1, 16), axis=0)) == 9 * 30

    place = context_map(position_features=True)(slices, none).numpy()
    np.testing.assert_array_equal(place, np.repeat(place[:1], 9, axis=0))
    assert len(np.unique(place[0].reshape(-1, 16), axis=0)) == 30

    height = context_map(slice_condition=True)(slices, none).numpy()
    assert len(np.unique(height.reshape(-1, 16), axis=0)) == 9

    names = context_map(num_labels=3)(slices, np.arange(9) % 4 - 1).numpy()
    assert len(np.unique(names.reshape(-1, 16), axis=0)) == 4  # one is null


def test_context_map_places_the_levels_above():
    """Prevents: an index above that reaches other positions than below it."""
    layer = context_map((16, 32), upper_grids=((8, 16), (4, 8)))
    grids = ((8, 16), (4, 8))
    upper = [np.zeros((1, *grid), "int32") for grid in grids]
    before = layer(*null(1), upper).numpy()
    for level, scale in ((0, 2), (1, 4)):
        changed = [grid.copy() for grid in upper]
        changed[level][0, 3, 5] = 2
        moved = layer(*null(1), changed).numpy() != before
        rows, columns = np.nonzero(moved.any(axis=(0, 3)))
        # Two 3x3 convolutions at the grid next above: four positions here.
        for found, at, side in ((rows, 3, 16), (columns, 5, 32)):
            assert found.min() == max(scale * at - 4, 0)
            assert found.max() == min(scale * (at + 1) + 4, side) - 1
    # The same index on another level is another code.
    upper[1][:] = 1
    other = [np.ones_like(upper[0]), np.zeros_like(upper[1])]
    assert np.any(layer(*null(1), upper).numpy() != layer(*null(1), other))


def test_conditions_are_dropped_in_training_only():
    """Prevents: null embeddings that are never trained, or used too often.

    Slice position and label drop independently, the levels above never.
    """
    layer = context_map(
        (4, 2),
        slice_condition=True,
        num_labels=2,
        upper_grids=((2, 1),),
        dropout=0.3,
    )
    n = 200
    position, label = np.full(n, 0.7, "float32"), np.ones(n, "int32")
    upper = [np.tile(np.int32([[[1], [3]]]), (n, 1, 1))]
    no_position, no_label = null(n)
    cases = {
        (True, True): layer(position, label, upper),
        (True, False): layer(position, no_label, upper),
        (False, True): layer(no_position, label, upper),
        (False, False): layer(no_position, no_label, upper),
    }
    trained = layer(position, label, upper, training=True).numpy()
    kinds = {
        case: np.isclose(trained, expected, atol=1e-5).all(axis=(1, 2, 3))
        for case, expected in cases.items()
    }
    np.testing.assert_array_equal(sum(kinds.values()), np.ones(n))
    for case, found in kinds.items():
        share = np.prod([0.7 if kept else 0.3 for kept in case])
        deviation = np.sqrt(n * share * (1 - share))
        assert abs(found.sum() - n * share) < 4 * deviation
    # What is null already stays so.
    trained = layer(no_position, no_label, upper, training=True)
    np.testing.assert_allclose(trained, cases[False, False], atol=1e-5)

    same = cases[True, True].numpy()
    np.testing.assert_array_equal(same, np.repeat(same[:1], n, axis=0))


def test_attention_in_parts_and_in_steps(monkeypatch):
    """Prevents: a cache, or a part of the positions, that attends to others."""
    layer = modules.CausalAttention(8, heads=2)
    x, codes = noise(2, 3, 7, 8), noise(2, 3, 7, 8, seed=1)
    layer(x, codes)
    perturb(layer)
    called = layer(x, codes).numpy()
    monkeypatch.setattr(modules.CausalAttention, "QUERIES", 4)
    # 1e-5: sums of some 20 float32 numbers.
    np.testing.assert_allclose(layer(x, codes), called, atol=1e-5)

    cache = layer.init_cache(2, 21)
    for row in range(3):
        _, cache = layer.start_row(None, cache, row)
        for column in range(7):
            at = x[:, row, column]
            found, cache = layer.step(at, cache, column)
            expected = called[:, row, column]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
            cache = layer.write(codes[:, row, column], cache, column)
    # The first position has nothing but the empty code.
    other = layer(x, codes + 1).numpy()
    np.testing.assert_array_equal(other[:, 0, 0], called[:, 0, 0])
    assert np.all(np.any(other != called, axis=-1).reshape(2, 21)[:, 1:])


def test_attention_after_every_fourth_block_and_the_last():
    """Prevents: attention elsewhere than documented."""
    found = {}
    for blocks in (0, 3, 4, 5, 8):
        prior = tiny_prior("pixelsnail", latent_grid=(2, 2), blocks=blocks)
        order = [type(layer).__name__[0] for layer in prior._layers_in_order()]
        found[blocks] = "".join(order)
    assert found == {
        0: "G",
        3: "GGGGC",
        4: "GGGGGC",
        5: "GGGGGCGC",
        8: "GGGGGCGGGGC",
    }
    local = tiny_prior("pixelsnail-local", blocks=5)
    assert not local.attentions and len(local._layers_in_order()) == 6


# Priors


@functools.cache
def trained_prior(network, kind):
    """A prior far from uniform, after a training step; shared by tests."""
    keras.utils.set_random_seed(0)
    prior = tiny_prior(network, **KINDS[kind])
    perturb_prior(prior)
    train(prior, [prior_batch(prior, 8)], run_eagerly=True)
    return prior


@pytest.fixture(params=ALL_PRIORS, ids="-".join)
def prior(request):
    return trained_prior(*request.param)


def small(network, kind, **settings):
    """A prior with 81 grids."""
    above = {"upper_grids": ((1, 1),)} if kind == "lower" else {}
    settings = {"num_embeddings": 3, "latent_grid": (2, 2)} | settings
    return tiny_prior(network, **(KINDS[kind] | above | settings))


@functools.cache
def small_uniforms(kind):
    """`_uniforms` of grids of 2x2, drawn once for all of the priors."""
    prior = small("pixelcnn", kind)
    prior.sample_chunk = 200
    return functools.cache(prior._uniforms)


@pytest.fixture(scope="module", params=PRIORS, ids="-".join)
def small_prior(request):
    """A prior with 81 grids, of unequal probability."""
    network, kind = request.param
    prior = small(network, kind)
    perturb_prior(prior, scale=0.4)
    # In large chunks: a run of the sampler costs more than a grid.
    prior.sample_chunk = 200
    prior._uniforms = small_uniforms(kind)
    return prior


ALL_GRIDS = np.array(list(itertools.product(range(3), repeat=4)), "int32")
ALL_GRIDS = ALL_GRIDS.reshape(81, 2, 2)


def context_of(prior, given):
    if not prior.use_context:
        return None
    return prior.context(
        given["slice_position"], given["label"], given.get("upper", ())
    )


def influence(prior, rounds=2):
    """Size of the gradient of the logits at t by the embedded index at s.

    Returns: `(T, T)` array over raster positions t and s.
    """
    height, width = prior.latent_grid
    count = height * width
    total = np.zeros((count, count))
    for seed in range(rounds):  # a ReLU may be shut for one input
        same = np.zeros(count, int)
        given = rows_of(prior_batch(prior, 1, seed), same)
        # Random, as equal weights could cancel.
        weights = noise(prior.num_embeddings, seed=seed)
        context = context_of(prior, given)
        x = prior.embedding(given["indices"])
        with tf.GradientTape() as tape:
            tape.watch(x)
            logits = prior._predict_codes(prior._hidden(x, context, False))
            flat = tf.reshape(logits, (count, count, -1))
            own = tf.linalg.diag_part(tf.transpose(flat, [2, 0, 1]))
            loss = tf.reduce_sum(own * weights[:, None])
        # The computation above is that of a call.
        np.testing.assert_array_equal(logits, prior(**given))
        gradient = tf.reduce_sum(tf.abs(tape.gradient(loss, x)), axis=-1)
        total += gradient.numpy().reshape(count, count)
    return total


def assert_causal(prior):
    strength = influence(prior)
    later = np.triu(np.ones_like(strength))  # itself and after
    np.testing.assert_array_equal(strength * later, np.zeros_like(strength))
    assert np.all(strength[1:].max(axis=1) > 0)


def test_prior_sees_only_what_is_before(prior, tmp_path):
    """Prevents: a likelihood that looks at what it predicts."""
    assert prior.optimizer.iterations > 0
    assert_causal(prior)
    assert_causal(reload(prior, tmp_path / "prior.keras"))


def open_prior(network="pixelcnn", **settings):
    """A prior whose ReLUs are all open: it shows what it could see."""
    prior = tiny_prior(network, **settings)
    perturb(prior, scale=0.1)
    for weight in prior.weights:
        if weight.name == "bias":
            weight.assign(np.full(weight.shape, 3.0))
    return prior


def test_pixelcnn_receptive_field_and_blind_spot():
    """Prevents: fewer positions seen than the paper's, or more."""
    prior = open_prior(latent_grid=(6, 6), kernel_size=3, blocks=2)
    seen = influence(prior).reshape(6, 6, 6, 6) > 0
    expected = np.zeros_like(seen)
    # Three layers, each one column left or one row up and a column aside.
    for row, column in itertools.product(range(6), repeat=2):
        for up in range(min(row, 3) + 1):
            left, right = max(column - 3, 0), column + up
            field = expected[row, column, row - up]
            field[left : right + 1 if up else column] = True
    np.testing.assert_array_equal(seen, expected)
    # The blind spot: up and to the right, whatever the depth.
    assert not seen[2, 1, 1, 3] and seen[2, 1, 1, 2]


def test_pixelcnn_sees_most_earlier_positions():
    """Prevents: a field as small as that of the first layer."""
    prior = open_prior(latent_grid=(6, 6), kernel_size=7)
    seen = influence(prior) > 0
    earlier = np.tril(np.ones_like(seen), -1)
    assert seen[earlier].mean() > 0.9 and not seen[~earlier].any()


SQUARE = LOWER | {"latent_grid": (4, 4), "upper_grids": ((2, 2), (1, 1))}


@pytest.mark.parametrize("network", NO_BLIND_SPOT)
@pytest.mark.parametrize(
    "settings", [{"latent_grid": (4, 4)}, SQUARE], ids=["alone", "lower"]
)
def test_all_earlier_positions_are_seen(network, settings, tmp_path):
    """Prevents: a blind spot where the paper has none."""
    prior = open_prior(network, **settings)
    train(prior, [prior_batch(prior, 8)], run_eagerly=True)
    for model in (prior, reload(prior, tmp_path / "prior.keras")):
        seen = influence(model, rounds=1) > 0
        np.testing.assert_array_equal(seen, np.tril(np.ones_like(seen), -1))


@pytest.mark.parametrize(
    "conditioned",
    [{}, CONTEXT | {"upper_grids": ((2, 12), (1, 6))}],
    ids=["alone", "lower"],
)
def test_attention_sees_farther_than_convolutions(conditioned, tmp_path):
    """Prevents: attention that leaves out a code, such as that just before."""
    settings = {"latent_grid": (4, 24), "kernel_size": 3, "blocks": 1}
    earlier = np.tril(np.ones((96, 96), bool), -1)
    prior = open_prior("pixelsnail", **settings, **conditioned)
    train(prior, [prior_batch(prior, 8)], run_eagerly=True)
    for model in (prior, reload(prior, tmp_path / "prior.keras")):
        seen = influence(model, rounds=1) > 0
        np.testing.assert_array_equal(seen, earlier)
    local = open_prior("pixelsnail-local", **settings, **conditioned)
    seen = influence(local, rounds=1) > 0
    assert not seen[24, 23] and not seen[~earlier].any()
    assert 0.05 < seen[earlier].mean() < 0.5


def stepped_logits(prior, indices, context):
    """Logits as the sampler computes them, position by position."""
    found = np.zeros((*indices.shape, prior.num_embeddings), "float32")
    batch, height, width = indices.shape
    caches = prior._init_caches(batch, width)
    for row in range(height):
        caches = prior._start_row(caches, row)
        for column in range(width):
            at = None if context is None else context[:, row, column]
            hidden, caches = prior._step(caches, column, at)
            found[:, row, column] = prior._predict_code(hidden)
            code = prior.embedding(indices[:, row, column])
            caches = prior._write(code, caches, column)
    return found


def test_steps_and_call_give_the_same_logits(prior):
    """Prevents: a cache of the sampler that holds another value."""
    given = prior_batch(prior, 3, seed=4)
    found = stepped_logits(prior, given["indices"], context_of(prior, given))
    # 1e-5: float32 sums in another order.
    np.testing.assert_allclose(found, prior(**given), rtol=1e-5, atol=1e-5)
    assert np.ptp(found, axis=0).max() > 0.1


def test_sampler_and_call_are_the_same_distribution(prior):
    """Prevents: log-probabilities of another grid, image or condition."""
    given = conditions(prior, 20)
    cases = [(given, 1.0)]
    if prior.use_context:
        nothing = {k: v for k, v in given.items() if k == "upper"}
        cases += [(nothing, 1.0), (given, 2.0)]
    for asked, guidance in cases:
        grids, sampled = prior.sample(
            20,
            seed=1,
            temperature=1.5,
            guidance=guidance,
            return_log_prob=True,
            **request(prior, asked),
        )
        called = prior.log_prob(grids, **asked).numpy().sum(axis=(1, 2))
        # 1e-5: float32 sums in another order, over 15 to 32 positions.
        np.testing.assert_allclose(sampled, called, rtol=1e-5)
        assert np.ptp(sampled) > 1  # it does depend on the grid


def test_probabilities_sum_to_one(small_prior):
    """Prevents: a score that is not a probability."""
    given = rows_of(conditions(small_prior, 1), np.zeros(81, int))
    without = {k: v for k, v in given.items() if k == "upper"}
    found = []
    for asked in (given, without):
        nats = small_prior.log_prob(ALL_GRIDS, **asked).numpy()
        assert nats.shape == (81, 2, 2) and nats.dtype == np.float32
        probabilities = np.exp(nats.sum(axis=(1, 2), dtype="float64"))
        # 1e-5: rounding by 6e-8 of some 300 terms.
        assert probabilities.sum() == pytest.approx(1, abs=1e-5)
        assert probabilities.max() > 5 * probabilities.min()
        found.append(probabilities)
    change = np.abs(found[0] - found[1]).max()
    assert change > 1e-3 if small_prior.use_context else change == 0


def sharpened(logits, temperature=1.0, top_k=0):
    """Probabilities that the sampler is to draw from, in float64."""
    logits = logits.astype("float64") / temperature
    if top_k:
        least = np.sort(logits, axis=-1)[..., -top_k, None]
        logits = np.where(logits < least, -np.inf, logits)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def expected_shares(prior, given, guidance=1.0, **options):
    """Probability of each of `ALL_GRIDS` under `sample`, by enumeration."""
    given = rows_of(given, np.zeros(81, int))
    logits = prior(ALL_GRIDS, **given).numpy()
    if guidance != 1:
        given = given | {"label": np.full(81, -1, "int32")}
        start = prior(ALL_GRIDS, **given).numpy()
        logits = start + guidance * (logits - start)
    shares = sharpened(logits, **options)
    chosen = np.take_along_axis(shares, ALL_GRIDS[..., None], axis=-1)
    return chosen.prod(axis=(1, 2, 3))


def chi_square_fits(counts, shares):
    """Whether `counts` may be draws with probabilities `shares`."""
    expected = counts.sum() * shares
    # The statistic has its distribution for cells of five and more.
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = np.sum((counts - expected) ** 2 / expected)
    # The seed is fixed: a right sampler failed with probability 1e-3, once.
    return statistic < scipy.stats.chi2.isf(1e-3, len(counts) - 1)


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "options"])
def test_samples_have_their_probability(small_prior, plain):
    """Prevents: biased draws, as from random numbers used twice.

    The options of a prior with conditions: guidance.
    """
    options = {"temperature": 0.7, "top_k": 2}
    if small_prior.use_context:
        options = {"guidance": 2.0}
    options = {} if plain else options
    n = 1600
    given = conditions(small_prior, 1)
    asked = request(small_prior, rows_of(given, np.zeros(n, int)))
    grids = small_prior.sample(n, seed=5, **options, **asked)
    counts = np.bincount(grids.reshape(n, 4) @ [27, 9, 3, 1], minlength=81)

    shares = expected_shares(small_prior, given, **options)
    assert shares.sum() == pytest.approx(1)
    assert counts[shares == 0].sum() == 0
    assert (shares > 0).sum() == (16 if "top_k" in options else 81)
    assert chi_square_fits(counts, shares)
    # Fine enough to tell other conditions and options apart.
    if options:
        others = [expected_shares(small_prior, given)]
    else:
        others = [
            expected_shares(small_prior, given | other)
            for other in changes(given, 1).values()
        ]
    for other in others:
        assert not chi_square_fits(counts, other)


@pytest.mark.parametrize("network", NETWORKS)
def test_uniform_logits_are_log2_k_bits(network):
    """Prevents: nats called bits, or a mean over the wrong axis."""
    uniform = tiny_prior(network, num_embeddings=8)
    uniform.logits.kernel.assign(np.zeros(uniform.logits.kernel.shape))
    batch = prior_batch(uniform, 4)
    # 1e-6: ln 8 in float32, divided by ln 2.
    bits = evaluate(uniform, batch)["bits_per_code"]
    assert bits == pytest.approx(3, rel=1e-6)
    nats = uniform.log_prob(batch["indices"])
    np.testing.assert_allclose(nats, np.full(nats.shape, -np.log(8)), rtol=1e-6)


@pytest.mark.parametrize("network", modules.PRIORS)
def test_bits_and_loss_of_an_epoch(network):
    """Prevents: an epoch loss of 0.0, or that of the last batch alone."""
    prior = trained_prior(network, "lower")
    still = type(prior).from_config(prior.get_config())
    still.set_weights(prior.get_weights())
    batches = [prior_batch(still, 6, seed=1), prior_batch(still, 2, seed=2)]
    first, last = [
        -float(tf.reduce_mean(still.log_prob(**batch))) for batch in batches
    ]
    history = train(still, batches, optimizer=keras.optimizers.SGD(0.0))
    assert_all_equal(weights_of(still), weights_of(prior))
    mean = (6 * first + 2 * last) / 8
    assert abs(mean - last) > 1e-3 * mean
    # 1e-5: float32 means in another order.
    assert history["loss"] == [pytest.approx(mean, rel=1e-5)]
    bits = mean / np.log(2)
    assert history["bits_per_code"] == [pytest.approx(bits, rel=1e-5)]
    assert evaluate(still, batches[1])["loss"] == pytest.approx(last, rel=1e-5)


@pytest.mark.parametrize("network", modules.PRIORS)
def test_training_a_prior_reduces_the_loss(network):
    """Prevents: a loss that does not reach the weights."""
    learner = tiny_prior(network)
    batches = [prior_batch(learner, 4)]
    first, last = train(learner, batches, epochs=2, repeat=20)["loss"]
    assert last < 0.8 * first  # means over steps 1 to 20 and 21 to 40


@pytest.mark.parametrize("dropout", ["dropout", "condition_dropout"])
@pytest.mark.parametrize("network", NETWORKS)
def test_dropout_only_in_training(network, dropout):
    """Prevents: likelihoods that change from call to call."""
    noisy = tiny_prior(network, **(CONTEXT | {dropout: 0.5}))
    perturb_prior(noisy)
    batch = prior_batch(noisy, 8)
    np.testing.assert_array_equal(noisy(**batch), noisy(**batch))
    one, other = [noisy(**batch, training=True).numpy() for _ in range(2)]
    assert np.any(one != other)


def test_image_k_is_the_same_in_any_request(prior):
    """Prevents: samples that depend on how many are asked for."""
    given = conditions(prior, 20)
    guidance = 2.0 if prior.use_context else 1.0

    def part(first, n, seed=7):
        asked = request(prior, rows_of(given, np.arange(first, first + n)))
        return prior.sample(n, seed, guidance=guidance, first=first, **asked)

    grids = part(0, 20)
    assert grids.shape == (20, *prior.latent_grid) and grids.dtype == np.int32
    assert 0 <= grids.min() <= grids.max() < 5
    np.testing.assert_array_equal(part(0, 20), grids)
    np.testing.assert_array_equal(part(0, 3), grids[:3])
    for first in (5, 14, 17):  # 14 to 16 is over the end of a chunk
        np.testing.assert_array_equal(part(first, 3), grids[first : first + 3])
    assert len(np.unique(grids, axis=0)) == 20
    assert np.any(part(0, 20, seed=8) != grids)


def test_levels_draw_different_numbers():
    """Prevents: grids of two levels that are drawn alike."""
    grids = [(4, 8), (2, 4), (1, 2)]
    priors = [
        tiny_prior(latent_grid=grid, blocks=0, upper_grids=grids[level + 1 :])
        for level, grid in enumerate(grids)
    ]
    numbers = [prior._uniforms(3, 1) for prior in priors]
    images = priors[0].sample_chunk
    assert [x.shape for x in numbers] == [(images, *grid) for grid in grids]
    together = np.concatenate([x.numpy().ravel() for x in numbers])
    assert len(np.unique(together)) == together.size
    # Not those of the top of another study either.
    alone = tiny_prior(latent_grid=(4, 8), blocks=0)._uniforms(3, 1)
    assert not np.isin(alone, numbers[0]).any()


def assert_greedy(prior, grids, given, guidance=1.0, guide="label"):
    """Check that each code is the likeliest after those before it, by calls."""
    logits = prior(grids, **given).numpy()
    if guidance != 1:
        asked = given | {guide: -np.ones_like(given[guide])}
        start = prior(grids, **asked).numpy()
        logits = start + guidance * (logits - start)
    np.testing.assert_array_equal(grids, logits.argmax(axis=-1))


@pytest.mark.parametrize(
    "options",
    [{"temperature": 1e-6}, {"top_k": 1}, {"top_p": 1e-6}],
    ids=lambda options: next(iter(options)),
)
def test_sharpest_sampling_is_greedy(options):
    """Prevents: temperature, top k or top p that do not reach the draw."""
    prior = trained_prior("gated", "alone")
    for seed in (0, 1):
        assert_greedy(prior, prior.sample(3, seed=seed, **options), {})


@pytest.mark.parametrize("network", NETWORKS)
def test_guided_sampling_is_greedy_by_guided_logits(network):
    """Prevents: guidance the wrong way, or from another null."""
    prior = trained_prior(network, "lower")
    given = conditions(prior, 3)
    asked = request(prior, given)
    found = []
    for guidance in (1.0, 4.0):
        grids = prior.sample(3, temperature=1e-6, guidance=guidance, **asked)
        assert_greedy(prior, grids, given, guidance)
        found.append(grids)
    assert np.any(found[0] != found[1])


def test_guidance_by_slice_position_without_labels():
    """Prevents: guidance that a prior without labels ignores."""
    prior = tiny_prior(slice_condition=True, blocks=1)
    perturb_prior(prior)
    given = {"slice_position": np.float32([0.1, 0.6])}
    found = []
    for guidance in (0.0, 4.0):
        grids = prior.sample(2, temperature=1e-6, guidance=guidance, **given)
        assert_greedy(prior, grids, given, guidance, "slice_position")
        found.append(grids)
    assert np.any(found[0] != found[1])
    # Guided not at all is the distribution without the condition.
    assert_greedy(prior, found[0], {})


def changes(given, num_embeddings):
    """Each of the conditions, and of the grids above, changed alone."""
    found = {}
    for k, grid in enumerate(given.get("upper", ())):
        upper = list(given["upper"])
        upper[k] = (grid + 1) % num_embeddings
        found[f"upper {k}"] = {"upper": tuple(upper)}
    if "label" in given:
        found["label"] = {"label": 1 - given["label"]}
        found["no label"] = {"label": np.full_like(given["label"], -1)}
    if "slice_position" in given:
        moved = (given["slice_position"] + 0.4) % 1
        found["slice"] = {"slice_position": moved}
        found["no slice"] = {"slice_position": np.full_like(moved, -1)}
    return found


def test_every_condition_matters(prior):
    """Prevents: a condition that is dropped, or one that leaks in."""
    batch = prior_batch(prior, 4)
    given = conditions(prior, 4)
    before = prior(**batch).numpy()
    for name, change in changes(given, 3).items():
        moved = np.abs(prior(**(batch | change)).numpy() - before)
        assert np.all(moved.max(axis=(1, 2, 3)) > 1e-3), name

    if not prior.use_context:
        extra = {"slice_position": POSITIONS[[0, 1, 0, 1]]}
        np.testing.assert_array_equal(prior(**batch, **extra), before)
        return
    # An image depends on its own conditions alone.
    grids = prior.sample(4, seed=3, **request(prior, given))
    for case, change in changes(given, 3).items():
        if case in ("no label", "no slice"):
            continue  # `sample` takes these for all images or none
        mixed = tf.nest.map_structure(np.copy, given)
        for name, values in change.items():
            for old, new in zip(
                tf.nest.flatten(mixed[name]),
                tf.nest.flatten(values),
                strict=True,
            ):
                old[2] = new[2]
        changed = prior.sample(4, seed=3, **request(prior, mixed))
        np.testing.assert_array_equal(changed[[0, 1, 3]], grids[[0, 1, 3]])


def test_null_does_not_leak(prior):
    """Prevents: null that depends on a label or position, or the reverse."""
    if not prior.use_context:
        assert not hasattr(prior, "context")
        return
    given = prior_batch(prior, 2)
    label, position = given.pop("label"), given.pop("slice_position")
    none = prior(**given).numpy()
    nulls = dict(zip(("slice_position", "label"), null(2), strict=True))
    np.testing.assert_array_equal(prior(**given, **nulls), none)

    changed = type(prior).from_config(prior.get_config())
    context = changed.context
    rows = np.eye(3, 64, dtype="float32")
    for weight, change, moves_null in (
        (context.label.embeddings, rows * [[0], [1], [0]], False),
        (context.label.embeddings, rows * [[0], [0], [1]], False),
        (context.label.embeddings, rows * [[1], [0], [0]], True),
        (context.slice.kernel, 1, False),
        (context.slice.bias, 1, False),
        (context.no_slice, 1, True),
    ):
        changed.set_weights(prior.get_weights())
        weight.assign(weight + 3 * change)
        same = np.array_equal(changed(**given), none)
        assert same != moves_null
        # With label and position known, null does not matter.
        known = {**given, "label": label, "slice_position": position}
        same = np.array_equal(changed(**known), prior(**known))
        assert same == moves_null


def test_training_drops_conditions_for_null():
    """Prevents: a null that training does not reach, or inference uses."""
    prior = tiny_prior(**(CONTEXT | {"condition_dropout": 0.99}))
    perturb_prior(prior)
    batch = prior_batch(prior, 8)
    nothing = prior(batch["indices"]).numpy()
    trained = prior(**batch, training=True).numpy()
    same = np.isclose(trained, nothing, atol=1e-5).all(axis=(1, 2, 3))
    assert same.sum() >= 6
    known = prior(**batch).numpy()
    assert not np.isclose(known, nothing, atol=1e-5).all(axis=(1, 2, 3)).any()


def test_position_features_reach_the_logits(prior):
    """Prevents: place features that are computed and not used."""
    if not prior.position_features:
        assert not prior.use_context
        return
    batch = prior_batch(prior, 2)
    blind = type(prior).from_config(prior.get_config())
    blind.set_weights(prior.get_weights())
    kernel = blind.context.place.kernel
    kernel.assign(np.zeros(kernel.shape))
    change = np.abs(blind(**batch).numpy() - prior(**batch).numpy())
    assert np.all(change.max(axis=(0, 3)) > 1e-4)  # at every place


def test_position_features_break_translation():
    """Prevents: places told apart without, or not with, the features."""
    spread = []
    for features in (False, True):
        prior = tiny_prior(
            latent_grid=(6, 6),
            kernel_size=3,
            blocks=1,
            position_features=features,
        )
        perturb(prior)
        # Two layers: these places see no border of a constant grid.
        inner = prior(np.ones((1, 6, 6), "int32"))[0, 2:, 2:4].numpy()
        spread.append(np.ptp(inner, axis=(0, 1)).max())
    assert spread[0] < 1e-5 < 1e-2 < spread[1]  # 1e-5: rounding


@pytest.mark.parametrize("network", modules.PRIORS)
def test_codebook_hash_survives_saving(network, tmp_path):
    """Prevents: a prior that accepts the codebook of another VQ-VAE."""
    marked = tiny_prior(network, codebook_sha256="0f" * 32)
    opened = reload(marked, tmp_path / "prior.keras")
    assert opened.codebook_sha256 == "0f" * 32
    assert opened.latent_grid == (3, 5)


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_embeddings", 1),
        ("latent_grid", (0, 4)),
        ("latent_grid", (4, 1025)),
        ("channels", 0),
        ("blocks", -1),
        ("kernel_size", 4),
        ("kernel_size", 65),
        ("head_layers", -1),
        ("dropout", 1.0),
        ("dropout", float("nan")),
        ("condition_dropout", 1.0),
        ("condition_dropout", -0.1),
        ("upper_grids", ((2, 2),)),
        ("upper_grids", ((3, 5),)),
    ],
)
def test_prior_refuses(name, value):
    """Prevents: a network other than the one asked for."""
    with pytest.raises(ValueError, match=f"{name}.*: expected .*, found"):
        tiny_prior(**{name: value})


def test_upper_grids_halve_from_the_nearest():
    """Prevents: grids above in the wrong order, or with one left out."""
    tiny_prior(latent_grid=(4, 8), upper_grids=[[2, 4], [1, 2]])
    for grids in (((1, 2), (2, 4)), ((1, 2),), ((2, 4), (2, 4)), ((4, 2),)):
        with pytest.raises(ValueError, match="^upper_grids: expected"):
            tiny_prior(latent_grid=(4, 8), upper_grids=grids)


@pytest.mark.parametrize(
    "channels, heads, name",
    [(12, 8, "channels"), (8, 3, "channels"), (8, 0, "heads")],
)
def test_channels_divide_by_heads(channels, heads, name):
    """Prevents: heads of unequal size, or an error far away."""
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        modules.PixelSNAIL(5, (2, 2), channels, blocks=1, heads=heads)


REFUSED = [
    ({"label": "MCI"}, "^label: expected one of NC, AD; found 'MCI'"),
    ({"label": ["AD", "MCI"]}, "^label: .* NC, AD; found 'MCI'"),
    ({"label": ["AD"]}, "^label: expected 2, found 1"),
    ({"label": ["AD"] * 3}, "^label: expected 2, found 3"),
    ({"upper": None}, "^upper: expected grids of shape"),
    ({"upper": ()}, "^upper: expected grids of shape"),
    ({"upper": [np.zeros((2, 2, 4))]}, "^upper: expected grids of shape"),
    ({"upper": [np.zeros((2, 1, 2))]}, "^upper: expected grids of shape"),
    ({"upper": [np.zeros((1, 2, 4)), np.zeros((1, 1, 2))]}, "^upper: "),
    ({"upper": [np.zeros((2, 4, 2)), np.zeros((2, 1, 2))]}, "^upper: "),
    ({"upper": [np.zeros((2, 1, 2)), np.zeros((2, 2, 4))]}, "^upper: "),
]


@pytest.mark.parametrize("asked, message", REFUSED)
def test_sample_refuses_conditions(asked, message):
    """Prevents: images of another condition than the one asked for."""
    prior = trained_prior("pixelcnn", "lower")
    upper = conditions(prior, 2)["upper"]
    with pytest.raises(ValueError, match=message):
        prior.sample(2, **({"upper": upper} | asked))


def test_sample_refuses_what_the_prior_lacks():
    """Prevents: a label or guidance that changes nothing."""
    prior = trained_prior("pixelcnn", "alone")
    with pytest.raises(ValueError, match="^label: .* none, .* found 'AD'"):
        prior.sample(2, label="AD")
    with pytest.raises(ValueError, match="^guidance: "):
        prior.sample(2, guidance=2.0)
    with pytest.raises(ValueError, match="^upper: expected .* \\[\\], found"):
        prior.sample(2, upper=[np.zeros((2, 1, 2))])


# Drawing a code


@pytest.mark.parametrize(
    "top_k, top_p, expected",
    [
        (0, 1.0, [0.125, 0.5, 0.125, 0.25]),
        (1, 1.0, [0, 0.5, 0, 0]),
        (2, 1.0, [0, 0.5, 0, 0.25]),
        (9, 1.0, [0.125, 0.5, 0.125, 0.25]),
        (0, 0.5, [0, 0.5, 0, 0]),  # reached by the first alone
        (0, 0.51, [0, 0.5, 0, 0.25]),
        (0, 1e-9, [0, 0.5, 0, 0]),  # at least one
        (1, 0.9, [0, 0.5, 0, 0]),
        (3, 0.6, [0, 0.5, 0, 0.25]),
    ],
)
def test_keep_likeliest(top_k, top_p, expected):
    probabilities = np.float32([[0.125, 0.5, 0.125, 0.25]])
    kept = modules.keep_likeliest(probabilities, top_k, top_p)
    np.testing.assert_array_equal(kept, [expected])


@pytest.mark.parametrize(
    "uniform, settings, expected",
    [
        (0.0, {}, 0),
        (0.49, {}, 0),
        (0.51, {}, 1),
        (0.74, {}, 1),
        (0.76, {}, 2),
        (FLOAT32_ONE, {}, 2),
        # Squared and normalised: 2/3, 1/6, 1/6.
        (0.66, {"temperature": 0.5}, 0),
        (0.68, {"temperature": 0.5}, 1),
        # Square roots: 0.414, 0.293, 0.293.
        (0.42, {"temperature": 2.0}, 1),
        (FLOAT32_ONE, {"top_k": 1}, 0),
        (FLOAT32_ONE, {"top_p": 0.5}, 0),
        (FLOAT32_ONE, {"top_p": 0.6}, 2),  # equally likely: both are kept
    ],
)
def test_draw_index_by_hand(uniform, settings, expected):
    logits = np.log(np.float32([[0.5, 0.25, 0.25]]))
    settings = {"temperature": 1.0} | settings
    index = modules.draw_index(logits, np.float32([[uniform]]), **settings)
    assert index.dtype == tf.int32
    np.testing.assert_array_equal(index, [expected])


@pytest.mark.parametrize("uniform", [0.0, FLOAT32_ONE])
def test_draw_index_at_the_ends(uniform):
    """Prevents: a code of no probability at either end of the scale."""
    logits = noise(2000, 64, scale=3)
    logits[:, :3] = logits[:, -3:] = -np.inf
    uniforms = np.full((2000, 1), uniform, "float32")
    index = modules.draw_index(logits, uniforms, 1.0).numpy()
    assert index.min() >= 3 and index.max() < 61
    kept = modules.keep_likeliest(tf.nn.softmax(logits), 5, 1.0).numpy()
    index = modules.draw_index(logits, uniforms, 1.0, top_k=5).numpy()
    assert np.all(np.take_along_axis(kept, index[:, None], 1) > 0)


def test_compiled_draw_has_positive_probability():
    """Prevents: a code of no probability where a compiled sum dips.

    XLA sums 512 numbers in blocks: between two blocks the cumulative sum moves
    by a rounding even where the probability is zero. Aimed at here.
    """
    rows, top_k = 2000, 50
    logits = tf.constant(noise(rows, 512, scale=2))

    @tf.function(jit_compile=True)
    def inside(logits):
        kept = modules.keep_likeliest(tf.nn.softmax(logits), top_k, 1.0)
        return kept, tf.cumsum(kept, axis=-1)

    @tf.function(jit_compile=True)
    def draw(logits, uniform):
        return modules.draw_index(logits, uniform, 1.0, 1.0, top_k)

    kept, cumulative = [x.numpy() for x in inside(logits)]
    moves = (np.diff(cumulative, axis=1) != 0) & (kept[:, 1:] == 0)
    at = moves.argmax(axis=1)[:, None]
    goal = np.maximum(
        np.take_along_axis(cumulative, at, 1),
        np.take_along_axis(cumulative, at + 1, 1),
    )
    aim = goal.astype("float64") / (cumulative[:, -1:] * (1 - 1e-6))
    aims = [aim * (1 + ulps * 2.0**-24) for ulps in range(-3, 4)]
    for uniform in [*aims, np.ones_like(aim)]:
        uniform = np.minimum(uniform.astype("float32"), FLOAT32_ONE)
        index = draw(logits, tf.constant(uniform)).numpy()[:, None]
        assert 0 <= index.min() <= index.max() < 512
        assert np.all(np.take_along_axis(kept, index, 1) > 0)


# Saved models in a new process


def observe(model):
    """Everything a user gets from a model, and what a training step does."""
    if isinstance(model, modules.VQVAE):
        batch = blocky_images(4, seed=9)
        indices = model.encode(batch)
        found = {f"indices_{k}": grid for k, grid in enumerate(indices)}
        found["output"] = model(batch)
        found["compiled_images"] = model.decode_indices(indices)
    else:
        batch = prior_batch(model, 4, seed=9)
        found = {"logits": model(**batch)}
        found["compiled_nats"] = model.log_prob(**batch)
        asked = request(model, conditions(model, 4))
        found["samples"] = model.sample(4, seed=3, **asked)
    found["iterations"] = model.optimizer.iterations
    found = {name: np.asarray(value) for name, value in found.items()}

    train(model, [batch])
    found["iterations_after"] = np.asarray(model.optimizer.iterations)
    after = {f"after_{k}": w for k, w in enumerate(weights_of(model))}
    return found | after


def observe_folder(folder):
    """`observe` of each model of a folder; run in a new process."""
    for path in sorted(Path(folder).glob("*.keras")):
        model = keras.models.load_model(path)
        np.savez(path.with_suffix(".npz"), **observe(model))


@pytest.fixture(scope="module")
def reopened(tmp_path_factory):
    """What each model gives here and in a new process."""
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    models = {"vqvae": tiny_vqvae(levels=2)}
    train(models["vqvae"], [blocky_images(4)], repeat=3, run_eagerly=True)
    for network in modules.PRIORS:
        models[network] = trained_prior(network, "lower")
    here = {}
    for name, model in models.items():
        model.save(folder / f"{name}.keras")
        before = model.get_weights()
        here[name] = observe(model)
        model.set_weights(before)  # the priors are shared
    code = (
        "import sys; from tests import test_modules; "
        "test_modules.observe_folder(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, check=True)
    there = {name: np.load(folder / f"{name}.npz") for name in models}
    return here, there


@pytest.mark.parametrize("name", ["vqvae", *modules.PRIORS])
def test_reopened_in_a_new_process(reopened, name):
    """Prevents: a saved model that differs, or forgets its optimizer."""
    here, there = reopened[0][name], reopened[1][name]
    assert set(there.files) == set(here)
    assert here["iterations"] > 0
    assert here["iterations_after"] == here["iterations"] + 1
    for key, value in here.items():
        # Compiled, TensorFlow orders sums by the names of layers, which are
        # numbered over a process: equal but for rounding. `after`: a training
        # step from the same weights and moments.
        rounded = key.startswith(("compiled", "after"))
        np.testing.assert_allclose(
            there[key],
            value,
            rtol=1e-5 if rounded else 0,
            atol=1e-5 if rounded else 0,
            err_msg=key,
        )


# The chain


def test_encode_dataset():
    """Prevents: levels or images in another order."""
    model = tiny_vqvae(levels=2)
    perturb(model)
    images = blocky_images(5)
    dataset = tf.data.Dataset.from_tensor_slices(images).batch(3)
    levels = modules.encode_dataset(model, dataset)
    assert [grid.shape for grid in levels] == [(5, 8, 8), (5, 4, 4)]
    assert all(isinstance(grid, np.ndarray) for grid in levels)
    assert_all_equal(levels, model.encode(images))
    assert len(np.unique(levels[0])) > 1


def test_slice_positions():
    """Prevents: an image whose slice depends on the request."""
    positions = modules.slice_positions(100)
    assert positions.shape == (100,) and positions.dtype == np.float32
    assert 0 <= positions.min() < 0.02 and 0.98 < positions.max() <= 1
    for first, n in ((0, 7), (7, 20), (99, 1)):
        np.testing.assert_array_equal(
            modules.slice_positions(n, first), positions[first : first + n]
        )
    assert np.all(np.diff(positions[:96].reshape(12, 8)) > 0)
    assert len(np.unique(positions)) == 100
    spread = np.histogram(positions, bins=10, range=(0, 1))[0]
    assert spread.min() >= 7  # of 10 in each tenth


def test_generate():
    """Prevents: images of other indices, or in another order."""
    vqvae = tiny_vqvae(downsampling=4, num_embeddings=5)
    prior = tiny_prior(latent_grid=(4, 4), slice_condition=True)
    perturb(vqvae)
    perturb(prior)
    images, indices = modules.generate(vqvae, [prior], 18, seed=2)
    assert images.shape == (18, 16, 16) and images.dtype == np.float32
    assert 0 <= images.min() < images.max() <= 1
    drawn = prior.sample(18, seed=2, slice_position=modules.slice_positions(18))
    np.testing.assert_array_equal(indices[0], drawn)
    # 1e-6: the decoder may round otherwise in batches of another size.
    decoded = vqvae.decode_indices([drawn])[..., 0]
    np.testing.assert_allclose(images, decoded, atol=1e-6)

    again, _ = modules.generate(vqvae, [prior], 18, seed=2)
    np.testing.assert_array_equal(again, images)
    part, chosen = modules.generate(vqvae, [prior], 3, seed=2, first=15)
    np.testing.assert_array_equal(chosen[0], indices[0][15:])
    np.testing.assert_allclose(part, images[15:], atol=1e-6)

    still, grids = modules.generate(
        vqvae, [prior], 2, slice_position=np.zeros(2), top_k=1
    )
    np.testing.assert_array_equal(grids[0][0], grids[0][1])
    np.testing.assert_allclose(still[0], still[1], atol=1e-6)


def test_generate_from_two_levels():
    """Prevents: levels, or their conditions, in the wrong order."""
    vqvae = tiny_vqvae(levels=2, downsampling=4, num_embeddings=5)
    perturb(vqvae)
    grids = vqvae.latent_grids
    priors = [
        tiny_prior(
            blocks=1,
            latent_grid=grid,
            upper_grids=grids[level + 1 :],
            labels=LABELS,
        )
        for level, grid in enumerate(grids)
    ]
    for prior in priors:
        perturb_prior(prior)
    images, indices = modules.generate(vqvae, priors, 10, seed=2, first=3)
    assert [grid.shape for grid in indices] == [(10, 4, 4), (10, 2, 2)]
    options = {"label": ["NC"] * 5 + ["AD"] * 5, "seed": 2, "first": 3}
    above = priors[1].sample(10, **options)
    np.testing.assert_array_equal(indices[1], above)
    below = priors[0].sample(10, upper=[above], **options)
    np.testing.assert_array_equal(indices[0], below)
    # 1e-6: the decoder may round otherwise in batches of another size.
    expected = vqvae.decode_indices(indices)[..., 0]
    np.testing.assert_allclose(images, expected, atol=1e-6)

    _, same = modules.generate(vqvae, priors, 2, 2, 11, label="AD")
    np.testing.assert_array_equal(same[0], indices[0][8:])
    _, other = modules.generate(vqvae, priors, 2, 2, 11, label=["NC"] * 2)
    assert np.any(other[1] != same[1]) and np.any(other[0] != same[0])


def test_alternate_labels():
    """Prevents: a label that depends on the request."""
    labels = modules.alternate_labels(LABELS, 20)
    assert labels == ["NC"] * 8 + ["AD"] * 8 + ["NC"] * 4
    assert modules.alternate_labels(LABELS, 5, 6) == labels[6:11]
    assert modules.alternate_labels((), 5) is None


@pytest.mark.parametrize(
    "size, levels, downsampling, networks",
    [
        ((240, 256), 3, 4, ["pixelcnn", "pixelsnail-local", "pixelsnail"]),
        ((256, 128), 2, 8, ["gated", "pixelsnail"]),
    ],
    ids=["240x256-3", "256x128-2"],
)
def test_chain_at_the_sizes_of_the_data(size, levels, downsampling, networks):
    """Prevents: height and width mixed up where they differ."""
    vqvae = tiny_vqvae(size, levels=levels, downsampling=downsampling)
    images = blocky_images(2, *size)
    loss = train(vqvae, [images], run_eagerly=True)["loss"]
    assert np.isfinite(loss).all()
    height, width = size[0] // downsampling, size[1] // downsampling
    grids = [(height >> level, width >> level) for level in range(levels)]
    indices = vqvae.encode(images)
    assert [tuple(found.shape) for found in indices] == [(2, *g) for g in grids]
    assert vqvae.decode_indices(indices).shape == images.shape

    priors = [
        tiny_prior(
            network,
            num_embeddings=8,
            latent_grid=grid,
            blocks=1,
            kernel_size=3,
            upper_grids=grids[level + 1 :],
        )
        for level, (network, grid) in enumerate(
            zip(networks, grids, strict=True)
        )
    ]
    drawn, indices = modules.generate(vqvae, priors, 2)
    assert drawn.shape == (2, *size) and drawn.dtype == np.float32
    assert 0 <= drawn.min() < drawn.max() <= 1
    assert [found.shape for found in indices] == [(2, *grid) for grid in grids]
    assert np.any(drawn[0] != drawn[1])
