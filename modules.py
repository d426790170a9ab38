"""Models: VQ-VAE of one to three levels, priors over its indices, texture.

Import this module before opening a saved model::

    import keras
    import modules
    vqvae = keras.models.load_model("runs/NAME/vqvae.keras")

Dimension letters: B batch, H W frame of an image, h w latent grid,
C channels, D length of a code vector, K number of code vectors.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import signal
import threading
import time
import typing
import zipfile
from pathlib import Path

import utils  # first: it sets the environment that Keras reads

# isort: split
import keras
import numpy as np
import tensorflow as tf

utils.configure_keras()
# Float32 on a GPU is to be float32: TF32 would pick wrong codes.
tf.config.experimental.enable_tensor_float_32_execution(False)
register = keras.saving.register_keras_serializable("mri_vqvae")
policy_lock = threading.Lock()  # chunks of samples are traced in threads


def require(condition: bool, message: str) -> None:
    """Raise `ValueError(message)` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def take(cls, options: dict):
    """Settings of a dataclass among `options`, which loses them."""
    names = [field.name for field in dataclasses.fields(cls)]
    return cls(**{name: options.pop(name) for name in names if name in options})


# === Training step ===


class Composite(keras.layers.Layer):
    """A layer made of others, which are built when it first calls them.

    To build a layer that has no `build`, Keras traces its `call` beforehand:
    the innermost layers once more for every layer around them.
    """

    def build(self, input_shape):
        pass


class TrainableModel(Composite, keras.Model):
    """Model with a custom `train_step` and `test_step` over one loss.

    A subclass gives `_batch_loss(batch, training)`: the mean loss over the
    images of a batch. It also updates the trackers that an epoch logs. Targets
    and sample weights that `fit` is given are not used, nor `loss` and
    `metrics` of `compile`.

    Under a strategy of `tf.distribute` each replica trains on its part of the
    batch; the step equals that of one device with the whole batch, but for
    random draws (dropout, times and noise of a texture), which replicas share.
    To clip gradients, give the optimizer a `global_clipnorm`: other limits are
    kept by each replica for itself.

    Attributes:
        accumulation_steps: int >= 1. Parts that a replica splits its batch
            into, for less memory; no batch may have fewer images. An EMA
            codebook moves with each part.
    """

    accumulation_steps = 1

    def __new__(cls, *args, **kwargs):
        # A layer records its arguments for `get_config`, a model would not. It
        # cannot write what is of NumPy, such as `images.var()`.
        args, kwargs = tf.nest.map_structure(
            lambda x: x.tolist() if hasattr(x, "tolist") else x,
            (args, kwargs),
        )
        return keras.layers.Layer.__new__(cls, *args, **kwargs)

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        # Inner layers have that; see `from_config`.
        name = keras.config.dtype_policy().name
        message = f"dtype: expected that of the global policy, {name}"
        require(self.dtype_policy.name == name, message)

    def get_config(self):
        # Keras leaves its record out where a subclass adds to this method.
        record, base = self._auto_config, super().get_config()
        require(record, "arguments: expected plain ones, by name, to be saved")
        return {**base, **record.config, **base}

    @classmethod
    def from_config(cls, config):
        # Inner layers take the global policy at the time they are made: let
        # it be the one that the model was saved with.
        current = keras.config.dtype_policy()
        policy = keras.dtype_policies.get(config.get("dtype"))
        keras.config.set_dtype_policy(policy)
        try:
            return super().from_config(config)
        finally:
            keras.config.set_dtype_policy(current)

    def train_step(self, batch):
        batch, *_ = keras.utils.unpack_x_y_sample_weight(batch)
        norm = self._apply(self._accumulated_gradients(batch), batch)
        # For `FiniteCheck`: a NaN voxel can leave the loss finite, since a
        # fused ReLU turns it into 0. Then only gradients and weights tell.
        floats = [w.value for w in self.weights if w.dtype.startswith("float")]
        norms = {
            "gradient_norm": norm,
            "parameter_norm": tf.linalg.global_norm(floats),
        }
        return self._logged(self.get_metrics_result() | norms)

    def _accumulated_gradients(self, batch):
        """Gradients of the mean loss over a batch."""
        gradients = None
        for part, share in self._parts(batch):
            # A part begins when the one before has freed its memory.
            with tf.control_dependencies(gradients or []):
                with tf.GradientTape() as tape:
                    loss = share * self._batch_loss(part, training=True)
                    loss = self.optimizer.scale_loss(loss)
                added = tape.gradient(loss, self.trainable_variables)
                # Dense: a norm over slices would not add up those of a row.
                added = [tf.convert_to_tensor(gradient) for gradient in added]
            if gradients:
                added = [a + b for a, b in zip(gradients, added, strict=True)]
            gradients = added
        return gradients

    def _parts(self, batch):
        """Yield parts of a batch, each with its share of the images."""
        count = self.accumulation_steps
        if count == 1:
            yield batch, 1.0
            return
        images = batch_size(batch)
        message = "batch: fewer images than accumulation_steps"
        tf.debugging.assert_greater_equal(images, count, message)
        bounds = [images * k // count for k in range(count + 1)]
        for a, b in itertools.pairwise(bounds):
            part = tf.nest.map_structure(lambda x, a=a, b=b: x[a:b], batch)
            yield part, tf.cast((b - a) / images, tf.float32)

    def _apply(self, gradients, batch):
        """Update the weights; return the norm of the unscaled gradients."""
        # The optimizer would clip the gradients of each replica, then add
        # them. To clip those of the whole batch they are added and clipped
        # here, and each replica applies its share.
        replicas = tf.distribute.get_replica_context()
        count = replicas.num_replicas_in_sync
        if count > 1:
            weight = tf.cast(batch_size(batch), tf.float32)
            weight /= replicas.all_reduce("SUM", weight)
            weighted = [weight * gradient for gradient in gradients]
            gradients = replicas.all_reduce("SUM", weighted)
        norm = tf.linalg.global_norm(gradients)
        if count > 1:
            scale = 1 / count
            if limit := self.optimizer.global_clipnorm:
                scale *= tf.minimum(1.0, limit / norm)
            gradients = [scale * gradient for gradient in gradients]
        loss_scale = self.optimizer.scale_loss(tf.constant(1.0))
        self.optimizer.apply(gradients, self.trainable_variables)
        return norm / loss_scale

    def test_step(self, batch):
        batch, *_ = keras.utils.unpack_x_y_sample_weight(batch)
        self._batch_loss(batch, training=False)
        return self._logged(self.get_metrics_result())

    def _logged(self, values):
        # For several workers Keras averages over the first axis of what a
        # step returns, for replicas over none.
        if not utils.is_multi_worker(self.distribute_strategy):
            return values
        return {name: tf.reshape(v, (1,)) for name, v in values.items()}

    def _get_metrics_result_or_logs(self, logs):
        # Keras would take the logs of the last step, which are those of one
        # replica, if they hold more than the metrics do.
        return {**logs, **self.get_metrics_result()}

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        # The model is built when it is made. Keras would trace it on a batch,
        # which fails where each replica has a batch of its own
        # (github.com/keras-team/keras/issues/20585).
        if self.optimizer and not self.optimizer.built:
            with self.distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables)

    def _make_trackers(self, *names):
        self._trackers = {name: keras.metrics.Mean(name=name) for name in names}

    def _track(self, batch, **values):
        """Update all trackers with those of some means over a batch."""
        weight = batch_size(batch)
        for name, tracker in self._trackers.items():
            tracker.update_state(values[name], sample_weight=weight)

    @property
    def metrics(self):
        return list(self._trackers.values())


def batch_size(batch):
    """Number of images of a batch, a scalar tensor."""
    return tf.shape(tf.nest.flatten(batch)[0])[0]


# === Callbacks ===


class FiniteCheck(keras.callbacks.Callback):
    """Raise `utils.NumericsError` at the first logged number not finite."""

    def __init__(self, stage):
        super().__init__()
        self.stage = stage

    def on_epoch_begin(self, epoch, logs=None):
        self.round = epoch + 1

    def on_train_batch_end(self, batch, logs=None):
        self._check(f"in step {batch + 1} of round {self.round}", logs)

    def on_epoch_end(self, epoch, logs=None):
        self._check(f"after round {self.round}", logs)

    def _check(self, when, logs):
        bad = [k for k, v in logs.items() if not math.isfinite(float(v))]
        # Gradients may overflow under a loss scale, which then skips a step.
        if hasattr(self.model.optimizer, "inner_optimizer"):
            bad = [name for name in bad if name != "gradient_norm"]
        if bad:
            prefix = utils.stage_prefix(self.stage).replace("_", "-")
            raise utils.NumericsError(
                f"{self.stage}: not finite {when}: {', '.join(bad)}; no model "
                f"was saved from it, try a smaller --{prefix}learning-rate"
            )


class RoundCheckpoint(keras.callbacks.Callback):
    """Save a training after every round and resume it at a round.

    A round is what Keras calls an epoch. A checkpoint holds all that the rest
    of the training depends on: variables of model and optimizer, states of
    random generators, best weights so far. The state after a round is saved
    when the next one begins: by then `SwapEMAWeights`, earlier in the list, has
    put back the weights that training continues from.

    Args:
        path: of a checkpoint; see `utils.write_checkpoint`.
        stopping: `EarlyStopping` earlier in the list, saved too, or None.
        best: score to be beaten of the weights that a training begins with.
        signals: `utils.StopSignals`. A signal stops the training at the end of
            the round if that is `NEAR`, else at once.

    Attributes:
        round: int, rounds done and saved; the `initial_epoch` of `fit`.
        seconds: float, time that the training took so far.
    """

    NEAR = 3.0  # seconds

    def __init__(self, path, stopping=None, signals=None, best=None):
        super().__init__()
        self.path, self.stopping, self.signals = Path(path), stopping, signals
        self.best = best
        self.state, self.arrays = utils.read_checkpoint(self.path)
        self.round = self.state.get("round", 0)
        self.started = time.monotonic() - self.state.get("seconds", 0.0)

    @property
    def seconds(self):
        return time.monotonic() - self.started

    def on_train_begin(self, logs=None):
        if self.state:
            self._restore()
        elif self.best is not None:
            self.stopping.best = self.best
            self.stopping.best_weights = self.model.get_weights()

    def on_epoch_begin(self, epoch, logs=None):
        self.round_started = time.monotonic()
        if epoch > self.round:
            self.round = epoch
            self._save()
        self._stop_if(True)

    def on_train_batch_end(self, batch, logs=None):
        done = batch + 1
        pace = (time.monotonic() - self.round_started) / done
        self._stop_if(pace * (self.params["steps"] - done) > self.NEAR)

    def _stop_if(self, due):
        """Raise `utils.Stopped` if `due` and a worker received a signal."""
        received = self.signals.received if self.signals else 0
        strategy = self.model.distribute_strategy
        if utils.any_worker(strategy, bool(received and due)):
            raise utils.Stopped(received or signal.SIGTERM)

    def _variables(self):
        """Variables of the model and of its optimizer by name."""
        parts = {"model": self.model, "optimizer_0": self.model.optimizer}
        return {
            f"{name}/{number}": variable
            for name, part in parts.items()
            for number, variable in enumerate(part.variables)
        }

    def _save(self):
        variables = self._variables().items()
        arrays = {name: np.asarray(value) for name, value in variables}
        state = {"round": self.round, "seconds": self.seconds}
        if self.stopping and self.stopping.best_weights is not None:
            names = ("best", "best_epoch", "wait")
            state["best"] = {x: getattr(self.stopping, x) for x in names}
            best = enumerate(self.stopping.best_weights)
            arrays |= {f"best/{number}": weight for number, weight in best}
        utils.write_checkpoint(self.path, state, arrays)

    def _restore(self):
        for name, variable in self._variables().items():
            value = self.arrays.get(name)
            if value is None or value.shape != tuple(variable.shape):
                raise utils.RunError(
                    f"{self.path}: {name} is not of shape {variable.shape}, so "
                    "the checkpoint is of another model"
                )
            variable.assign(value)
        if self.stopping and "best" in self.state:
            vars(self.stopping).update(self.state["best"])
            self.stopping.best_weights = [
                x for name, x in self.arrays.items() if name.startswith("best/")
            ]


# === Vector quantizer ===


class Quantized(typing.NamedTuple):
    """Result of a `VectorQuantizer` for latents `(B, ..., D)`, in float32."""

    vectors: tf.Tensor  # (B, ..., D), the nearest code vectors
    indices: tf.Tensor  # (B, ...) int32 in [0, K)
    commitment_loss: tf.Tensor
    codebook_loss: tf.Tensor
    latents: tf.Tensor  # (N, D), without gradient
    errors: tf.Tensor  # (N,), squared distances to the code vectors


def count_codes(indices, num_embeddings):
    """How often each code occurs, `(K,)` float32; XLA has no `bincount`."""
    indices = tf.reshape(indices, (-1,))
    ones = tf.ones_like(indices, tf.float32)
    return tf.math.unsorted_segment_sum(ones, indices, num_embeddings)


@register
class VectorQuantizer(keras.layers.Layer):
    """Replace each latent vector by its nearest code vector.

    Nearest in squared Euclidean distance, computed in float32 whatever the
    precision policy. Gradients pass straight through:
    `quantized = z + stop_gradient(e - z)`.

    The first training batch sets the codebook to latents of that batch. From
    then on it follows exponential moving averages of the latents assigned to
    it (`codebook_update="ema"`) or the gradient of a codebook loss
    (`"gradient"`). It never moves outside training. A code vector whose
    average use falls under `restart_threshold` times the mean use is dead: it
    restarts at a latent of the batch, drawn in proportion to squared
    quantization error, and its moving statistics restart with it.

    Args:
        seed: int. Selects the latents at a start or restart.
        kwargs: those of `utils.VQVAESettings` that concern a codebook.

    Input shape: `(batch, ..., D)`, any float dtype.
    Output shape: `(batch, ..., D)` float32 quantized;
        `(batch, ...)` int32 indices in `[0, K)`.
    Losses: adds `commitment_cost * mean((stop_gradient(e) - z)**2)` and, with
        a gradient codebook, `mean((e - stop_gradient(z))**2)`; in squared
        latent units, per element.
    Raises:
        utils.FlagError: if a setting is out of range.
        ValueError: if the last axis is not D.

    Reference: van den Oord et al., 2017, arXiv:1711.00937, sec. 3.2, app. A.1.
    Restarts: Dhariwal et al., 2020, arXiv:2005.00341, sec. 3.1.
    """

    # Laplace smoothing of the counts, in latents.
    EPSILON = 1e-5
    # The scores of all codes for one piece of the latents stay in the cache
    # of the processor.
    PIECES = 16

    def __init__(self, seed=0, **kwargs):
        settings = take(utils.VQVAESettings, kwargs)
        # Half precision picks wrong neighbours, so float32 is not a choice.
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.seed, self.settings = seed, settings
        self.num_embeddings = settings.num_embeddings
        self.embedding_dim = settings.embedding_dim
        self.by_gradient = settings.codebook_update == "gradient"

    def build(self, input_shape):
        require(
            input_shape[-1] == self.embedding_dim,
            f"last axis of the latents: expected {self.embedding_dim}, "
            f"found {input_shape[-1]}",
        )
        # All replicas assign the same values; always read as float32.
        variable = functools.partial(
            self.add_weight, aggregation="only_first_replica", autocast=False
        )
        state = functools.partial(variable, trainable=False)
        shape = (self.num_embeddings, self.embedding_dim)
        uniform = keras.initializers.RandomUniform(seed=self.seed)
        self.codebook = variable(
            shape, uniform, name="codebook", trainable=self.by_gradient
        )
        self.ema_count = state(shape[:1], "zeros", name="ema_count")
        self.ema_sum = state(shape, "zeros", name="ema_sum")
        self.step = state((), "zeros", "int32", name="step")

    def call(self, inputs, training=False):
        result = self.nearest(inputs)
        self.add_loss(result.commitment_loss + result.codebook_loss)
        if training:
            self.update(result)
        return result.vectors, result.indices

    def nearest(self, inputs):
        """Quantize the inputs, as `Quantized`; changes no variable."""
        latents = tf.cast(inputs, tf.float32)
        latents = tf.reshape(latents, (-1, self.embedding_dim))  # (B*h*w, D)
        fixed = tf.stop_gradient(latents)
        indices = self._nearest_codes(fixed)
        quantized = self.lookup(indices)  # (B*h*w, D)
        codes = tf.stop_gradient(quantized)
        commitment = tf.reduce_mean((codes - latents) ** 2)
        codebook_loss = tf.constant(0.0)
        if self.by_gradient:
            codebook_loss = tf.reduce_mean((quantized - fixed) ** 2)
        passed = codes + (latents - fixed)  # with the gradient of latents
        return Quantized(
            vectors=tf.reshape(passed, tf.shape(inputs)),
            indices=tf.reshape(indices, tf.shape(inputs)[:-1]),
            commitment_loss=self.settings.commitment_cost * commitment,
            codebook_loss=codebook_loss,
            latents=fixed,
            errors=tf.reduce_sum((fixed - codes) ** 2, axis=1),
        )

    def _nearest_codes(self, latents):
        """Index `(N,)` of the code vector nearest to each of `(N, D)` latents.

        By |e|^2 - 2 z.e, which orders the code vectors as |z - e|^2 does.
        """
        codebook = tf.convert_to_tensor(self.codebook)
        # Far from the origin the two terms would cancel badly: move it.
        origin = tf.reduce_mean(codebook, axis=0)
        codebook -= origin
        squares = tf.reduce_sum(codebook**2, axis=1)
        latents -= origin
        count, found = tf.shape(latents)[0], []
        bounds = [count * k // self.PIECES for k in range(self.PIECES + 1)]
        for a, b in itertools.pairwise(bounds):
            with tf.control_dependencies(found[-1:]):  # one after the other
                piece = latents[a:b]
                products = tf.matmul(piece, -2 * codebook, transpose_b=True)
                scores = tf.nn.bias_add(products, squares)  # (N / PIECES, K)
                found.append(tf.argmin(scores, axis=1, output_type=tf.int32))
        return tf.concat(found, axis=0)

    def lookup(self, indices):
        """Code vectors `(..., D)` of integer `indices` `(...)`."""
        return tf.gather(self.codebook, indices)

    def update(self, result):
        """Update the codebook after a training batch `result`, `Quantized`.

        Over the latents of all replicas, so that their codebooks stay equal.
        `tf.where` rather than `tf.cond`: a variable may not be assigned in a
        branch under `tf.distribute`.
        """
        if not self.trainable:  # frozen, to train a decoder alone
            return
        size = self.num_embeddings
        indices = tf.reshape(result.indices, (-1,))
        counts = count_codes(indices, size)  # (K,)
        sums = tf.math.unsorted_segment_sum(result.latents, indices, size)
        replicas = tf.distribute.get_replica_context()
        counts, sums = replicas.all_reduce("SUM", [counts, sums])
        # Latents move fast at first: average over fewer steps then.
        step = tf.cast(self.step, tf.float32)
        rate = 1 - tf.minimum(self.settings.decay, (1 + step) / (10 + step))
        count = self.ema_count + rate * (counts - self.ema_count)
        total = self.ema_sum + rate * (sums - self.ema_sum)
        codes = tf.convert_to_tensor(self.codebook)
        if not self.by_gradient:
            latents, added = tf.reduce_sum(count), size * self.EPSILON
            smooth = (count + self.EPSILON) / (latents + added) * latents
            codes = total / smooth[:, None]

        mean_use = tf.reduce_sum(counts) / size
        level = self.settings.restart_threshold * mean_use
        dead = (count < level) | (self.step == 0)  # (K,)
        # High enough above `level` for a new code to find its latents.
        fresh_count = tf.maximum(5 * level, 0.1 * mean_use)
        # Dead codes take the first draws: later ones prefer large errors less.
        rank = tf.cumsum(tf.cast(dead, tf.int32), exclusive=True)
        drawn = self._draw_latents(result.latents, result.errors)
        fresh = tf.gather(drawn, rank)  # (K, D)
        codes = tf.where(dead[:, None], fresh, codes)
        self.ema_count.assign(tf.where(dead, fresh_count, count))
        self.ema_sum.assign(tf.where(dead[:, None], fresh * fresh_count, total))
        self.codebook.assign(codes)
        self.step.assign_add(1)

    def _draw_latents(self, latents, errors):
        """K latents, drawn with probability proportional to `errors`.

        Without replacement (Gumbel top-k) while there are K of them; with
        fewer, they repeat. Each replica proposes its best, and all draw the
        same from these, as one device would draw from the whole batch.
        """
        replicas = tf.distribute.get_replica_context()
        gathered = functools.partial(replicas.all_gather, axis=0)
        if replicas.num_replicas_in_sync == 1:
            gathered = tf.identity
        own = tf.shape(errors)[0]
        counts = gathered(own[None])  # (R,)
        before = tf.reduce_sum(counts[: replicas.replica_id_in_sync_group])
        seed = [self.seed, tf.convert_to_tensor(self.step)]
        uniform = tf.random.stateless_uniform(
            [tf.reduce_sum(counts)], seed, 1e-9, 1.0
        )[before : before + own]
        scores = tf.math.log(tf.maximum(errors, 1e-12))
        scores -= tf.math.log(-tf.math.log(uniform))
        size = self.num_embeddings
        best, order = tf.math.top_k(scores, tf.minimum(size, own))
        best, latents = gathered(best), gathered(tf.gather(latents, order))
        available = tf.minimum(size, tf.shape(best)[0])
        _, order = tf.math.top_k(best, available)
        picks = tf.gather(order, tf.range(size) % available)
        return tf.gather(latents, picks)


class CodebookUsage(keras.metrics.Metric):
    """Share of codes in use (0..1) and perplexity (1..K) over a round.

    Not means over batches: both depend on the number of indices.
    """

    def __init__(self, num_embeddings, suffix=""):
        super().__init__(name="codebook" + suffix)
        self.num_embeddings, self.suffix = num_embeddings, suffix
        self.counts = self.add_weight((num_embeddings,), "zeros", name="counts")

    def update_state(self, indices):
        self.counts.assign_add(count_codes(indices, self.num_embeddings))

    def result(self):
        counts = tf.convert_to_tensor(self.counts)
        share = counts / tf.maximum(tf.reduce_sum(counts), 1.0)
        entropy = -tf.reduce_sum(tf.math.xlogy(share, share))
        used = tf.reduce_mean(tf.cast(counts > 0, tf.float32))
        return {
            f"codebook_usage{self.suffix}": used,
            f"perplexity{self.suffix}": tf.exp(entropy),
        }


# === VQ-VAE ===


class ResidualStack(Composite):
    """Blocks of ReLU, 3x3, ReLU, 1x1 convolution, each added to its input.

    Input and output shape: `(B, h, w, channels)`; between the convolutions
    are `residual_channels`. Reference: arXiv:1711.00937, sec. 4.1.
    """

    def __init__(self, channels, blocks, residual_channels):
        super().__init__()
        self.inner = [conv(residual_channels, 3) for _ in range(blocks)]
        self.outer = [conv(channels, 1) for _ in range(blocks)]

    def call(self, x):
        for inner, outer in zip(self.inner, self.outer, strict=True):
            x = x + outer(tf.nn.relu(inner(tf.nn.relu(x))))
        return tf.nn.relu(x)


def residual_stack(settings):
    """A stack as `utils.VQVAESettings` say."""
    blocks, inner = settings.residual_blocks, settings.residual_channels
    return ResidualStack(settings.channels, blocks, inner)


def conv(filters, kernel_size, **options):
    """A convolution that keeps the size of the grid, or strides over it."""
    return keras.layers.Conv2D(filters, kernel_size, padding="same", **options)


def stage_widths(channels: int, downsampling: int) -> list[int]:
    """Channels after each halving: (64, 8) gives [16, 32, 64]."""
    stages = downsampling.bit_length() - 1
    return [max(channels >> (stages - 1 - s), 1) for s in range(stages)]


class Encoder(Composite):
    """Strided 4x4 convolutions, each with more channels, and a residual stack.

    Input shape: `(B, H, W, any)`. Output shape: `(B, H/f, W/f, channels)`.
    """

    def __init__(self, settings, downsampling):
        super().__init__()
        self.halvings = [
            conv(width, 4, strides=2, activation="relu")
            for width in stage_widths(settings.channels, downsampling)
        ]
        self.mix = conv(settings.channels, 3)
        self.residual = residual_stack(settings)

    def call(self, x):
        for halving in self.halvings:
            x = halving(x)
        return self.residual(self.mix(x))


class Decoder(Composite):
    """Residual stack, then doublings of the grid; mirrors `Encoder`.

    The last doubling is a 3x3 convolution to 4 values a position, rearranged
    to 2x2 pixels (Shi et al., 2016, arXiv:1609.05158): it reaches as far as a
    strided transposed convolution and costs less at full resolution.

    Input shape: `(B, h, w, any)`. Output shape: `(B, h*f, w*f, filters)`.
    """

    def __init__(self, settings, upsampling, filters):
        super().__init__()
        self.mix = conv(settings.channels, 3)
        self.residual = residual_stack(settings)
        options = {"strides": 2, "padding": "same", "activation": "relu"}
        self.doublings = [  # from wide to narrow
            keras.layers.Conv2DTranspose(width, 4, **options)
            for width in stage_widths(settings.channels, upsampling)[-2::-1]
        ]
        self.head = conv(4 * filters, 3)

    def call(self, x):
        x = self.residual(self.mix(x))
        for doubling in self.doublings:
            x = doubling(x)
        return tf.nn.depth_to_space(self.head(x), 2)


# Of the mask (resources/experiments.md has what was measured).
EDGE_WEIGHT = 4.0  # squared errors along the edge count so much more
EDGE_SIDE = 5  # at the edge, a square of so many pixels has inside and outside
# Where the mask is less certain than this, the image is black. Such pixels
# would be a dim seam around the head, which real slices do not have.
MASK_THRESHOLD = 0.8


@register
class VQVAE(TrainableModel):
    """Autoencoder whose latents are one to three grids of codebook indices.

    One level is the VQ-VAE, two the VQ-VAE-2. Level 1 (`bottom`) has the
    grid `H/f x W/f`; each level above halves it. Encoding runs bottom to top;
    quantizing and decoding run top to bottom: a level quantizes its encoder
    features together with the decoded level above. Each level above the first
    must also give the image by itself, averaged to the grid below: else it
    may carry no information once the one below does well enough.

    The reconstruction loss is `MSE / data_variance + ssim_weight * (1 - SSIM)`.
    With a `mask_weight` the decoder also predicts a mask, outside which pixels
    are exactly black: slices that were stripped of skull and background end in
    a rim one pixel sharp, which squared error alone blurs. The squared error is
    then of the inside, and counts `1 + EDGE_WEIGHT` times along the rim.

    Images are frames of one size. With a `crop` only that box of a frame is
    encoded; decoded images are black outside it. Losses are of the box.

    Args:
        image_size: (H, W) of a frame in pixels.
        crop: (top, left, height, width) of the box, or None for the whole
            frame. Height and width are multiples of
            `downsampling * 2**(levels - 1)`.
        data_variance: float > 0. Variance of the training pixels.
        seed: int. Of the codebooks.
        kwargs: `utils.VQVAESettings`.

    Input shape: `(B, H, W, 1)` float in [0, 1].
    Output shape: `(B, H, W, 1)` float32, near [0, 1]; `reconstruct` clips.
    Raises:
        utils.FlagError: if a setting is out of range.
        ValueError: if the size is not divisible.

    References: van den Oord et al., 2017, arXiv:1711.00937 (one level);
        Razavi et al., 2019, arXiv:1906.00446 (two and more).

    Example:
    >>> model = VQVAE((32, 32), channels=8, num_embeddings=16, embedding_dim=4)
    >>> [tuple(i.shape) for i in model.encode(keras.ops.zeros((2, 32, 32, 1)))]
    [(2, 8, 8)]
    """

    def __init__(
        self, image_size, crop=None, data_variance=1.0, seed=0, **kwargs
    ):
        settings = take(utils.VQVAESettings, kwargs)
        super().__init__(**kwargs)
        self.settings, self.data_variance = settings, data_variance
        self.levels = settings.levels
        self.num_embeddings = settings.num_embeddings
        self.image_size = tuple(image_size)
        self.crop = tuple(crop) if crop else None
        self.box = box = self.crop or (0, 0, *self.image_size)
        # Pixels for a latent, of each level.
        self.factors = [settings.downsampling << k for k in range(self.levels)]
        total = self.factors[-1]
        places = zip(box[:2], box[2:], image_size, strict=True)
        for start, side, whole in places:
            require(
                0 <= start < start + side <= whole and side % total == 0,
                f"{'crop' if crop else 'image_size'}: expected multiples of "
                f"{total} inside a frame, found {box[2:]} in {image_size}",
            )
        for level in range(1, self.levels + 1):
            self._add_level(level, seed + level)
        names = ["loss", "reconstruction_loss", "commitment_loss", "ssim"]
        names += ["codebook_loss"] * (settings.codebook_update == "gradient")
        names += ["upper_loss"] * (self.levels > 1)
        self._make_trackers(*names)
        self(tf.zeros((1, *self.image_size, 1)))  # makes the weights

    def _add_level(self, level, seed):
        """Add attributes `encoder_1`, `quantizer_1`, ... of a level.

        Their order is part of the file format: Keras restores projections and
        quantizers by class and order of creation.
        """
        options = self.settings
        quantizer = VectorQuantizer(seed, **dataclasses.asdict(options))
        quantizer.build((None, options.embedding_dim))
        factor, filters, suffix = 2, options.embedding_dim, f"_{level}"
        if level == 1:
            factor, suffix = options.downsampling, ""
            filters = 1 + (options.mask_weight > 0)
        parts = {
            "encoder": Encoder(options, factor),
            "projection": conv(options.embedding_dim, 1),
            "quantizer": quantizer,
            "decoder": Decoder(options, factor, filters),
            "usage": CodebookUsage(self.num_embeddings, suffix),
        }
        if level > 1:
            parts["preview"] = conv(1, 1, dtype="float32", name="preview")
        for name, part in parts.items():
            setattr(self, f"{name}_{level}", part)

    def part(self, name: str, level: int):
        """`encoder`, `projection`, `quantizer`, ... of a level."""
        return getattr(self, f"{name}_{level}")

    @property
    def latent_grids(self) -> list[tuple[int, int]]:
        """(h, w) of each level, bottom first."""
        height, width = self.box[2:]
        return [(height // f, width // f) for f in self.factors]

    def cropped(self, images):
        """The box of frames that is encoded, `(B, height, width, 1)`."""
        fits = tf.as_dtype(images.dtype).is_floating
        require(fits, f"images: expected floats in 0..1, found {images.dtype}")
        images = tf.ensure_shape(images, (None, *self.image_size, 1))
        message = "images: expected floats in 0..1, found some above 2"
        tf.debugging.Assert(~tf.reduce_any(images > 2), [message])
        return tf.image.crop_to_bounding_box(images, *self.box)

    def framed(self, images):
        """Put images of the box back into black frames `(B, H, W, 1)`."""
        place = (*self.box[:2], *self.image_size)
        return tf.image.pad_to_bounding_box(images, *place)

    def foreground_cells(self, images) -> list[np.ndarray]:
        """Whether a pixel of a cell exceeds `utils.FOREGROUND`.

        Returns: an `(N, h, w)` bool array for each level, bottom first.
        """
        images = self.cropped(tf.cast(images, tf.float32))
        most = [tf.nn.max_pool2d(images, f, f, "VALID") for f in self.factors]
        return [(x[..., 0] > utils.FOREGROUND).numpy() for x in most]

    def call(self, images):
        _, _, decoded = self._forward(self.cropped(images))
        return self.framed(self._render(decoded))

    def _forward(self, images):
        """Quantize and decode cropped images.

        Returns: list of `Quantized`; list of previews `(B, h, w, 1)`, the
            image as an upper level alone shows it on the grid below; both
            bottom first; the output of `decoder_1`.
        """
        features, x = [], tf.cast(images, self.compute_dtype)
        for level in range(1, self.levels + 1):
            x = self.part("encoder", level)(x)
            features.append(x)
        results, previews, decoded = [], [], None
        for level in range(self.levels, 0, -1):
            x = self._joined(features[level - 1], decoded)
            latents = self.part("projection", level)(x)
            result = self.part("quantizer", level).nearest(latents)
            results.insert(0, result)
            inputs = self._joined(result.vectors, decoded)
            decoded = self.part("decoder", level)(inputs)
            if level > 1:
                previews.insert(0, self.part("preview", level)(decoded))
        return results, previews, tf.cast(decoded, tf.float32)

    def _joined(self, x, above):
        """Features of a level and what is decoded of the levels above."""
        x = tf.cast(x, self.compute_dtype)
        return x if above is None else tf.concat([x, above], axis=-1)

    @tf.function(reduce_retracing=True, autograph=False)
    def encode(self, images):
        """Indices `(B, h, w)` int32 of each level, bottom first."""
        results, _, _ = self._forward(self.cropped(images))
        return [result.indices for result in results]

    @tf.function(reduce_retracing=True, autograph=False)
    def decode_indices(self, indices):
        """Images `(B, H, W, 1)` in [0, 1] from the result of `encode`."""
        decoded, found = None, len(indices)
        message = f"indices: expected {self.levels} grids, found {found}"
        require(found == self.levels, message)
        for level in range(self.levels, 0, -1):
            shape = (None, *self.latent_grids[level - 1])
            grid = tf.ensure_shape(indices[level - 1], shape)
            vectors = self.part("quantizer", level).lookup(grid)
            inputs = self._joined(vectors, decoded)
            decoded = self.part("decoder", level)(inputs)
        images = self._render(tf.cast(decoded, tf.float32))
        return self.framed(tf.clip_by_value(images, 0.0, 1.0))

    @tf.function(reduce_retracing=True, autograph=False)
    def reconstruct(self, images):
        """Images after encoding and decoding, clipped to [0, 1]."""
        return tf.clip_by_value(self(images), 0.0, 1.0)

    @property
    def metrics(self):
        usages = [self.part("usage", i + 1) for i in range(self.levels)]
        return [*self._trackers.values(), *usages]

    def _render(self, decoded, threshold=MASK_THRESHOLD):
        """Images `(B, h, w, 1)` from the output of `decoder_1`."""
        if not self.settings.mask_weight:
            return decoded
        intensity, mask = tf.split(decoded, 2, axis=-1)
        soft = tf.sigmoid(mask)
        hard = tf.cast(soft > threshold, tf.float32)
        # All or nothing in the image, smooth for the gradient.
        return intensity * (soft + tf.stop_gradient(hard - soft))

    def _reconstruction_loss(self, images, decoded):
        """Loss and mean SSIM of cropped images, of which `decoded` is made."""
        output, extra = self._render(decoded, threshold=0.5), 0.0
        error = images - output
        if self.settings.mask_weight:
            intensity, mask = tf.split(decoded, 2, axis=-1)
            inside = tf.cast(images > utils.FOREGROUND, tf.float32)
            grown = tf.nn.max_pool2d(inside, EDGE_SIDE, 1, "SAME")
            shrunk = -tf.nn.max_pool2d(-inside, EDGE_SIDE, 1, "SAME")
            weight = 1 + EDGE_WEIGHT * (grown - shrunk)
            error = inside * (images - intensity) * tf.sqrt(weight)
            entropy = tf.nn.sigmoid_cross_entropy_with_logits(inside, mask)
            extra = self.settings.mask_weight * tf.reduce_mean(entropy)
        loss = tf.reduce_mean(error**2) / self.data_variance + extra
        with tf.name_scope("ssim"):  # to be found in a profile
            ssim = tf.reduce_mean(utils.ssim(images, output))
        if self.settings.ssim_weight:
            loss += self.settings.ssim_weight * (1 - ssim)
        return loss, ssim

    def _batch_loss(self, images, training):
        """Total loss of a batch; updates every metric."""
        images = self.cropped(tf.cast(images, tf.float32))
        results, previews, decoded = self._forward(images)
        reconstruction, ssim = self._reconstruction_loss(images, decoded)
        commitment = tf.add_n([result.commitment_loss for result in results])
        codebook = tf.add_n([result.codebook_loss for result in results])
        loss, upper = reconstruction + commitment + codebook, 0.0
        for preview in previews:
            factor = images.shape[1] // preview.shape[1]
            small = tf.nn.avg_pool2d(images, factor, factor, "VALID")
            error = tf.reduce_mean((small - preview) ** 2)
            upper += error / self.data_variance
        loss += self.settings.upper_weight * upper
        self._track(
            images,
            loss=loss,
            reconstruction_loss=reconstruction,
            commitment_loss=commitment,
            codebook_loss=codebook,
            upper_loss=upper,
            ssim=ssim,
        )
        for level, result in enumerate(results, start=1):
            self.part("usage", level).update_state(result.indices)
            if training:
                self.part("quantizer", level).update(result)
        return loss


# === Texture ===


class TextureBlock(Composite):
    """Two 3x3 convolutions, added to their input, scaled and moved by a time.

    Input shapes: `(B, h, w, channels)` and features of the time `(B, F)`.
    """

    def __init__(self, channels):
        super().__init__()
        self.modulation = keras.layers.Dense(2 * channels)
        self.inner = conv(channels, 3)
        self.outer = conv(channels, 3, kernel_initializer="zeros")

    def call(self, x, time):
        scale, move = tf.split(self.modulation(time)[:, None, None], 2, -1)
        hidden = tf.nn.silu(x * (1 + scale) + move)
        return x + self.outer(tf.nn.silu(self.inner(hidden)))


@register
class Texture(TrainableModel):
    """Fine detail that generated images get after decoding.

    A decoder gives the mean of all slices that share their codes, which is
    smoother than any of them. This network models what is missing: the
    difference of real images and their reconstructions. It is a flow: along
    `x_t = (1 - t) noise + t x` it learns the velocity `x - noise`, so `STEPS`
    small steps lead from noise to a difference, which is added. Where a
    decoded image is black, nothing is.

    Args:
        channels: int. Features of a position; twice as many on half the grid.
        residual_std: float > 0. Standard deviation of the differences.
        codebook_sha256: str. Of the VQ-VAE whose images it is for.
        seed: int. Of the noise in training.

    Input: differences over `residual_std` on the way, `(B, H, W, 1)`; times
        `(B,)` in [0, 1]; decoded images `(B, H, W, 1)` in [0, 1]. H and W are
        multiples of 4.
    Output shape: `(B, H, W, 1)` float32, velocities.

    Reference: Lipman et al., 2023, arXiv:2210.02747.
    """

    OCTAVES = 5
    STEPS = 8
    # Strength of the first noise. Few steps lose some variance, and more
    # noise makes up for it (resources/experiments.md).
    NOISE = 1.1

    def __init__(
        self,
        channels=48,
        residual_std=1.0,
        codebook_sha256="",
        seed=0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.autocast = False  # the state of a flow stays float32
        self.residual_std, self.codebook_sha256 = residual_std, codebook_sha256
        wide, deep = channels, 2 * channels
        self.times = [keras.layers.Dense(64, "silu") for _ in range(2)]
        self.stem = conv(wide, 3)
        self.before = [TextureBlock(wide) for _ in range(2)]
        self.halving = conv(deep, 2, strides=2)
        self.middle = [TextureBlock(deep) for _ in range(3)]
        self.doubling = keras.layers.Conv2DTranspose(wide, 2, strides=2)
        self.after = [TextureBlock(wide) for _ in range(3)]
        self.head = conv(4, 3, kernel_initializer="zeros", dtype="float32")
        self.noise = keras.random.SeedGenerator(seed)
        self._make_trackers("loss")
        image = tf.zeros((1, 16, 16, 1))
        self(image, tf.zeros(1), image)  # makes the weights

    def call(self, x, time, decoded):
        features = sine_features(time, self.OCTAVES)
        for layer in self.times:
            features = layer(features)
        # Dark and bright tissue are about as far apart as noise is wide.
        parts = [x, 4 * decoded - 1, shown(decoded)]
        x = self.stem(tf.nn.space_to_depth(tf.concat(parts, axis=-1), 2))
        for block in self.before:
            x = block(x, features)
        small = self.halving(x)
        for block in self.middle:
            small = block(small, features)
        x += self.doubling(small)
        for block in self.after:
            x = block(x, features)
        return tf.nn.depth_to_space(self.head(x), 2)

    def _batch_loss(self, batch, training):
        """Mean squared error of the velocities; 0 where images are black."""
        decoded, inside = batch["decoded"], shown(batch["decoded"])
        x = inside * (batch["images"] - decoded) / self.residual_std
        time = keras.random.uniform(tf.shape(x)[:1], seed=self.noise)
        noise = inside * keras.random.normal(tf.shape(x), seed=self.noise)
        at = time[:, None, None, None]
        found = self((1 - at) * noise + at * x, time, decoded)
        loss = tf.reduce_mean((inside * (found - (x - noise))) ** 2)
        self._track(decoded, loss=loss)
        return loss

    @tf.function(reduce_retracing=True, autograph=False)
    def add(self, images, seed, numbers):
        """Images `(B, H, W, 1)` with texture, in [0, 1].

        That of an image is a function of the seed, an int64 tensor, its
        number, of which `numbers` `(B,)` has one for each image, and the image.
        """
        shape, inside = tf.shape(images)[1:], shown(images)

        def noise_of(number):
            # Codes were drawn with (seed, number) itself.
            key = tf.stack([seed, tf.cast(number, tf.int64)])
            key = tf.random.experimental.stateless_fold_in(key, 1)
            return tf.random.stateless_normal(shape, key, alg="philox")

        def step(k, x):
            time = tf.fill(tf.shape(images)[:1], k / self.STEPS)
            return k + 1, x + inside * self(x, time, images) / self.STEPS

        noise = tf.map_fn(noise_of, numbers, fn_output_signature=tf.float32)
        state = (0.0, self.NOISE * inside * noise)
        _, x = tf.while_loop(lambda k, _: k < self.STEPS, step, state)
        return tf.clip_by_value(images + self.residual_std * x, 0.0, 1.0)


def shown(images):
    """1 where images are not black, else 0."""
    return tf.cast(images > 0, tf.float32)


# === Causal layers ===


class CausalLayer(Composite):
    """Layer of a prior, which computes the same thing in two ways.

    `call` takes the whole grid (training, likelihood). Sampling takes one
    position after the other in raster order, with a cache: a dict of tensors,
    which one compiled loop can carry and the methods change.

    - `init_cache(batch, grid)` makes the cache for a grid `(h, w)`;
    - `start_row(vertical, cache, row)` begins a row. `vertical` `(B, w, C)` is
      the input of the vertical stack in the row above, finished by now; its
      output there is returned;
    - `step(x, cache, column, context)` computes the output `(B, C)` at a
      position; the first layer of a network needs no `x`;
    - `write(code, cache, column)` takes in the embedded code `(B, C)` that
      was drawn there.

    All of sampling is in float32, see `AutoregressivePrior._in_float32`.
    """

    def start_row(self, vertical, cache, row):
        return vertical

    def write(self, code, cache, column):
        pass


class CausalConv2D(CausalLayer):
    """Convolution over the positions before one in raster order.

    The kernel has `kernel_size` columns, an odd number, and `rows` rows, by
    default half as many; the last is that of the position. There a mask hides
    the positions to the right (`mask_type="B"`) or these and the position
    itself (`"A"`). The product `kernel * mask` is taken in `call`, so masked
    weights get no gradient. With `"row"` nothing is hidden: the vertical stack
    of a gated network, which computes a row at a time (`step_row`).

    Input shape: `(B, h, w, C)`. Output shape: `(B, h, w, filters)`.
    Reference: van den Oord et al., 2016, arXiv:1601.06759, sec. 3.4.
    """

    def __init__(self, filters, kernel_size, mask_type, rows=None):
        super().__init__()
        self.filters, self.kernel_size = filters, kernel_size
        self.mask_type = mask_type
        self.rows = rows or (kernel_size + 1) // 2
        self.side = kernel_size // 2
        # Columns of the last row that are not hidden.
        taps = {"A": self.side, "B": self.side + 1, "row": kernel_size}
        self.taps = taps[mask_type]

    def build(self, input_shape):
        self.channels = input_shape[-1]
        self.mask = np.ones((self.rows, self.kernel_size, 1, 1), "float32")
        self.mask[-1, self.taps :] = 0
        shape = (self.rows, self.kernel_size, self.channels, self.filters)
        self.kernel = self.add_weight(shape, "glorot_uniform", name="kernel")
        self.bias = self.add_weight((self.filters,), "zeros", name="bias")

    def call(self, x):
        kernel = tf.convert_to_tensor(self.kernel)
        kernel = kernel * tf.cast(self.mask, kernel.dtype)
        # `tf.pad` first: explicit padding inside the convolution leaves the
        # fast path on CPU (40 times slower in bfloat16).
        margins = [[0, 0], [self.rows - 1, 0], [self.side, self.side], [0, 0]]
        return tf.nn.conv2d(tf.pad(x, margins), kernel, 1, "VALID") + self.bias

    def step_row(self, x, cache):
        """Output `(B, w, filters)` of a whole row `x` `(B, w, C)`."""
        row = tf.pad(x, [[0, 0], [self.side, self.side], [0, 0]])
        rows = tf.concat([cache["rows"][:, 1:], row[:, None]], axis=1)
        cache["rows"], kernel = rows, self.kernel * self.mask
        return tf.nn.conv2d(rows, kernel, 1, "VALID")[:, 0] + self.bias

    def init_cache(self, batch, grid):
        # The last rows, zero outside the grid, and what those before the
        # current one add to it, computed once for all of its columns.
        wide = grid[1] + 2 * self.side
        rows = tf.zeros((batch, self.rows, wide, self.channels))
        return {"rows": rows, "added": tf.zeros((batch, grid[1], self.filters))}

    def start_row(self, vertical, cache, row):
        before, kernel = cache["rows"][:, 1:], self.kernel[:-1]
        cache["rows"] = tf.pad(before, [[0, 0], [0, 1], [0, 0], [0, 0]])
        if self.rows > 1:
            cache["added"] = tf.nn.conv2d(before, kernel, 1, "VALID")[:, 0]
        return vertical

    def step(self, x, cache, column, context=None):
        if self.mask_type != "A":
            self._put(x, cache, column)
        rows = cache["rows"]
        size = (rows.shape[0], 1, self.taps, self.channels)
        seen = tf.slice(rows, [0, self.rows - 1, column, 0], size)
        seen = tf.reshape(seen, (rows.shape[0], -1))
        kernel = self.kernel[-1, : self.taps]
        y = tf.matmul(seen, tf.reshape(kernel, (-1, self.filters))) + self.bias
        if self.rows > 1:
            y += take_column(cache["added"], column)
        return y

    def write(self, code, cache, column):
        if self.mask_type == "A":
            self._put(code, cache, column)

    def _put(self, x, cache, column):
        start, x = [0, self.rows - 1, self.side + column, 0], x[:, None, None]
        cache["rows"] = keras.ops.slice_update(cache["rows"], start, x)


def take_column(x, column):
    """Values `(B, C)` of a row `(B, w, C)` in one column."""
    return tf.slice(x, [0, column, 0], [x.shape[0], 1, x.shape[-1]])[:, 0]


class CausalResidualBlock(CausalLayer):
    """ReLU, 1x1, ReLU, masked 3x3 plus context, ReLU, 1x1; added to its input.

    Input shape: `(B, h, w, channels)` and, with context, `(B, h, w, any)`.
    Output shape: `(B, h, w, channels)`; half the channels inside.
    """

    def __init__(self, channels, dropout=0.0, use_context=False):
        super().__init__()
        inner = max(channels // 2, 1)
        self.reduce = keras.layers.Dense(inner, activation="relu")
        self.conv = CausalConv2D(inner, 3, "B")
        self.expand = keras.layers.Dense(channels)
        self.drop = keras.layers.Dropout(dropout)
        self.context = keras.layers.Dense(inner) if use_context else no_context

    def call(self, x, context=None, training=False):
        y = self.conv(self.reduce(tf.nn.relu(x))) + self.context(context)
        y = self.drop(tf.nn.relu(y), training=training)
        return x + self.expand(y)

    def init_cache(self, batch, grid):
        return self.conv.init_cache(batch, grid)

    def start_row(self, vertical, cache, row):
        return self.conv.start_row(vertical, cache, row)

    def step(self, x, cache, column, context=None):
        y = self.conv.step(self.reduce(tf.nn.relu(x)), cache, column)
        return x + self.expand(tf.nn.relu(y + self.context(context)))


def no_context(context):
    """What a context adds to a layer that has none."""
    return 0.0


def gate(x):
    """tanh of the first half of the channels times sigmoid of the second."""
    signal, weight = tf.split(x, 2, axis=-1)
    return tf.tanh(signal) * tf.sigmoid(weight)


class GatedBlock(CausalLayer):
    """Vertical and horizontal masked convolutions with gates.

    The vertical stack sees all of the rows up to its own. The horizontal one
    sees its own row to the left, and the vertical one of the row above: so
    together all positions before, without a blind spot. Both stacks are added
    to their inputs, except in the first block (`mask_type="A"`). A context
    map enters the horizontal gate.

    Input shape: vertical and horizontal `(B, h, w, channels)`; with context
        `(B, h, w, any)`. Output shape: both stacks again.
    Reference: van den Oord et al., 2016, arXiv:1606.05328, fig. 2.
    """

    def __init__(
        self, channels, kernel_size, mask_type, dropout=0.0, use_context=False
    ):
        super().__init__()
        self.is_first = mask_type == "A"
        wide = 2 * channels
        self.vertical = CausalConv2D(wide, kernel_size, "row")
        self.horizontal = CausalConv2D(wide, kernel_size, mask_type, rows=1)
        self.link = keras.layers.Dense(wide)
        self.expand = keras.layers.Dense(channels)
        self.drop = keras.layers.Dropout(dropout)
        self.context = no_context
        if use_context:
            self.context = keras.layers.Dense(wide, use_bias=False)

    def call(self, vertical, horizontal, context=None, training=False):
        rows = self.vertical(vertical)
        # The gradient of `rows[:, :-1]` would take a tenth of a step.
        above = tf.slice(rows, [0] * 4, [-1, rows.shape[1] - 1, -1, -1])
        above = tf.pad(above, [[0, 0], [1, 0], [0, 0], [0, 0]])
        x = self.horizontal(horizontal) + self.link(above)
        x += self.context(context)
        y = self.expand(self.drop(gate(x), training=training))
        if self.is_first:
            return gate(rows), y
        return vertical + gate(rows), horizontal + y

    def init_cache(self, batch, grid):
        return {
            "vertical": self.vertical.init_cache(batch, grid),
            "horizontal": self.horizontal.init_cache(batch, grid),
            "link": tf.zeros((batch, grid[1], self.link.units)),
        }

    def start_row(self, vertical, cache, row):
        rows = self.vertical.step_row(vertical, cache["vertical"])
        rows *= tf.cast(row > 0, rows.dtype)  # above the first are zeros
        cache["link"] = self.link(rows)
        self.horizontal.start_row(None, cache["horizontal"], row)
        return gate(rows) if self.is_first else vertical + gate(rows)

    def step(self, x, cache, column, context=None):
        y = self.horizontal.step(x, cache["horizontal"], column)
        y += take_column(cache["link"], column)
        y += self.context(context)
        y = self.expand(gate(y))
        return y if self.is_first else x + y

    def write(self, code, cache, column):
        self.horizontal.write(code, cache["horizontal"], column)


class CausalAttention(CausalLayer):
    """Attention of every position to all codes before it; added to its input.

    A code enters with its embedding and with the features at its position.
    Before all codes stands an empty one, of zeros, so that the first position
    has one to attend to as well.

    Input shape: features and embedded codes, both `(B, h, w, channels)`.
    Output shape: `(B, h, w, channels)`.
    Reference: Chen et al., 2018, arXiv:1712.09763, sec. 3.
    """

    # One masked product up to so many positions; pieces of larger grids bound
    # the memory and skip half of what is masked.
    WHOLE, PIECE = 1024, 256

    def __init__(self, channels, dropout=0.0):
        super().__init__()
        self.channels, self.heads = channels, utils.ATTENTION_HEADS
        self.scale = (channels // self.heads) ** -0.5
        self.query = keras.layers.Dense(channels)
        self.key = keras.layers.Dense(channels)
        self.value = keras.layers.Dense(channels)
        # Nothing is added at first: attention joins once it has learned.
        self.expand = keras.layers.Dense(channels, kernel_initializer="zeros")
        self.drop = keras.layers.Dropout(dropout)

    def call(self, features, codes, training=False):
        source = tf.concat([features, codes], axis=-1)
        query = self._heads(self.query(features))
        # Shifted by one: the empty code comes first, the last is not needed.
        empty = [[0, 0], [0, 0], [1, 0], [0, 0]]
        key = tf.pad(self._heads(self.key(source)), empty)[:, :, :-1]
        value = tf.pad(self._heads(self.value(source)), empty)[:, :, :-1]
        count = query.shape[2]
        size = count if count <= self.WHOLE else self.PIECE
        parts = [
            self._attend(query, key, value, first, min(first + size, count))
            for first in range(0, count, size)
        ]
        y = tf.transpose(tf.concat(parts, axis=2), [0, 2, 1, 3])
        y = self.expand(tf.reshape(y, tf.shape(features)))
        return features + self.drop(y, training=training)

    def _heads(self, x):
        """`(B, h, w, channels)` as `(B, heads, h * w, channels / heads)`."""
        count, size = x.shape[1] * x.shape[2], self.channels // self.heads
        x = tf.reshape(x, (-1, count, self.heads, size))
        return tf.transpose(x, [0, 2, 1, 3])

    def _attend(self, query, key, value, first, last):
        """Result of the attention of positions `first` to `last`."""
        query, key = query[:, :, first:last], key[:, :, :last]
        scores = tf.matmul(query, key, transpose_b=True)
        scores = tf.cast(scores, tf.float32) * self.scale
        hidden = np.arange(last) > np.arange(first, last)[:, None]
        weights = tf.nn.softmax(tf.where(hidden, -1e9, scores))
        return tf.matmul(tf.cast(weights, value.dtype), value[:, :, :last])

    def init_cache(self, batch, grid):
        size = self.channels // self.heads
        past = tf.zeros((batch, self.heads, grid[0] * grid[1], size))
        features = tf.zeros((batch, self.channels))  # of the current position
        cache = {"keys": past, "values": past, "features": features}
        return cache | {"position": 0}

    def step(self, x, cache, column, context=None):
        keys, cache["features"] = cache["keys"], x
        batch, heads, count, size = keys.shape
        query = tf.reshape(self.query(x), (batch, heads, 1, size))
        scores = tf.matmul(query, keys, transpose_b=True) * self.scale
        hidden = tf.range(count) > cache["position"]
        weights = tf.nn.softmax(tf.where(hidden, -1e9, scores))
        y = tf.matmul(weights, cache["values"])
        return x + self.expand(tf.reshape(y, (batch, self.channels)))

    def write(self, code, cache, column):
        source = tf.concat([cache["features"], code], axis=-1)
        cache["position"] += 1
        for name, layer in (("keys", self.key), ("values", self.value)):
            new = tf.reshape(layer(source), (code.shape[0], self.heads, 1, -1))
            start = [0, 0, cache["position"], 0]
            cache[name] = keras.ops.slice_update(cache[name], start, new)


def sine_features(position, count):
    """Sines and cosines at `count` octaves, of `position` `(...)` in [0, 1]."""
    angles = position[..., None] * (np.pi * 2.0 ** np.arange(count))
    return tf.concat([tf.sin(angles), tf.cos(angles)], axis=-1)


class ContextMap(Composite):
    """What every layer of a prior knows apart from the indices before it.

    The place on the grid, and conditions: the slice position, the class
    label, the indices of the levels above. None of these depends on the grid
    to be predicted, so none can leak it.

    An atlas tells what is usual at a place. It holds learned features for each
    label, every place and a few slice positions, and is interpolated between
    these positions. For an unknown label or position it gives the mean.

    Slice position and label are each replaced by a learned null embedding
    where they are negative, and in training for a share `dropout` of the
    images: so one network also learns the distribution without them.

    Input shapes: those of the conditions of `AutoregressivePrior`.
    Output shape: `(B, h, w, channels)`.
    """

    CHANNELS = 64
    OCTAVES = 5
    ATLAS_CHANNELS = 32

    def __init__(self, prior):
        super().__init__()
        self.autocast = False  # bfloat16 would move slice positions
        self.grid, self.num_embeddings = prior.latent_grid, prior.num_embeddings
        self.levels_above, channels = len(prior.upper_grids), self.CHANNELS
        self.place = self.slice = self.atlas = self.label = None
        self.drop = keras.layers.Dropout(prior.settings.condition_dropout)
        self.mix = keras.layers.Dense(channels, activation="relu")
        if prior.settings.position_features:
            self.place = keras.layers.Dense(channels)
        if prior.slice_condition:
            self.slice = keras.layers.Dense(channels)
            shape = (channels,)
            self.no_slice = self.add_weight(shape, "zeros", name="no_slice")
        if prior.settings.atlas:
            planes = prior.settings.atlas if prior.slice_condition else 1
            shape = (planes, max(1, len(prior.labels)), *self.grid)
            shape += (self.ATLAS_CHANNELS,)
            self.atlas = self.add_weight(shape, "zeros", name="atlas")
            self.from_atlas = keras.layers.Dense(channels)
        if prior.labels:
            self.label = keras.layers.Embedding(len(prior.labels) + 1, channels)
        if self.levels_above:
            codes = self.levels_above * self.num_embeddings
            self.codes_above = keras.layers.Embedding(codes, channels)
            self.above = ResidualStack(channels, 2, channels)
            self.split = keras.layers.Dense(4 * channels)

    def call(self, slice_position, label, upper=(), training=False):
        slice_position = tf.cast(slice_position, tf.float32)
        message = "slice_position: expected 0..1, found some above"
        tf.debugging.Assert(~tf.reduce_any(slice_position > 1), [message])
        shape = (tf.shape(label)[0], *self.grid, self.CHANNELS)
        context = tf.zeros(shape, self.compute_dtype)
        if self.place:
            places = np.moveaxis(np.indices(self.grid), 0, -1) / self.grid
            features = sine_features(places.astype("float32"), self.OCTAVES)
            context += self.place(tf.reshape(features, (*self.grid, -1)))
        # Null where unknown or dropped.
        known = self._known(slice_position, training)
        slice_position = tf.where(known, slice_position, -1)
        label = tf.where(self._known(label, training), label, -1)
        if self.slice:
            features = sine_features(slice_position, self.OCTAVES)
            vector = self.slice(features)
            null = tf.cast(tf.convert_to_tensor(self.no_slice), vector.dtype)
            context += tf.where(known[:, None], vector, null)[:, None, None]
        if self.label:
            context += self.label(label + 1)[:, None, None]
        if self.atlas is not None:
            context += self.from_atlas(self._atlas_at(slice_position, label))
        if self.levels_above:
            context += self._from_above(upper)
        return self.mix(tf.nn.relu(context))

    def _known(self, condition, training):
        """Which images of a batch keep a condition, `(B,)` bool."""
        ones = tf.ones(tf.shape(condition), self.compute_dtype)
        kept = self.drop(ones, training=training) > 0
        return kept & (condition >= 0)

    def _atlas_at(self, slice_position, label):
        """Features of every place for each image of a batch, `(B, h, w, F)`."""
        planes, labels = self.atlas.shape[:2]
        numbers = np.arange(planes, dtype="float32")
        away = slice_position[:, None] * (planes - 1) - numbers
        near = tf.nn.relu(1 - abs(away))
        near = tf.where(slice_position[:, None] >= 0, near, 1 / planes)
        own = tf.one_hot(label, labels, dtype=near.dtype)
        own = tf.where(label[:, None] >= 0, own, 1 / labels)
        shares = near[:, :, None] * own[:, None]
        return tf.tensordot(shares, tf.convert_to_tensor(self.atlas), 2)

    def _from_above(self, upper):
        """A residual network over the indices of all levels above."""
        x = None
        for k in reversed(range(self.levels_above)):  # topmost first
            codes = self.codes_above(upper[k] + k * self.num_embeddings)
            if x is not None:
                codes += tf.repeat(tf.repeat(x, 2, axis=1), 2, axis=2)
            x = codes
        return tf.nn.depth_to_space(self.split(self.above(x)), 2)


# === Sampler ===


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How codes are drawn from the distribution of a prior.

    Args:
        temperature: float > 0. Below 1 favours likely codes.
        top_k: int. Draw from the k likeliest codes only; 0 from all.
        top_p: float in (0, 1]. Draw from the likeliest codes that together
            have this probability.
        guidance: float >= 0. Classifier-free guidance: move the logits from
            those without the label (for a prior without labels: without the
            slice position) towards those with it, this many times the way.
            Ho & Salimans, 2022, arXiv:2207.12598.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0

    def __post_init__(self):
        fits = tf.is_tensor(self.temperature) or self.temperature > 0
        fits &= self.top_k >= 0 and 0 < self.top_p <= 1 and self.guidance >= 0
        wanted = "temperature > 0, top_k >= 0, 0 < top_p <= 1, guidance >= 0"
        require(fits, f"expected {wanted}; found {self}")


def keep_likeliest(probabilities, top_k, top_p):
    """`probabilities` `(B, K)`, zero but for those that `Sampling` keeps.

    Codes as likely as the last of these are kept, too.
    """
    ranked = tf.sort(probabilities, axis=-1, direction="DESCENDING")
    before = tf.cumsum(ranked, axis=-1, exclusive=True)
    kept = before < top_p
    if top_k:
        kept &= tf.range(ranked.shape[-1]) < top_k
    least = tf.reduce_min(tf.where(kept, ranked, 1.0), -1, keepdims=True)
    return tf.where(probabilities < least, 0.0, probabilities)


def sample_index(logits, uniform, temperature, top_p=1.0, top_k=0):
    """Draw indices `(B,)` int32 of positive probability from `logits` `(B, K)`.

    By inversion of the cumulative distribution, so that a position needs one
    random number `uniform` `(B, 1)` in [0, 1), not K. See `Sampling`.
    """
    probabilities = tf.nn.softmax(logits / temperature)
    # Sorting is most of the cost of a draw.
    if top_k or tf.is_tensor(top_p) or top_p < 1:
        probabilities = keep_likeliest(probabilities, top_k, top_p)
    cumulative = tf.cumsum(probabilities, axis=-1)
    # Strictly below the total, whatever the rounding: else an index past the
    # last code of positive probability could be drawn.
    target = uniform * cumulative[:, -1:] * (1 - 1e-6)
    # Compiled, the sum is rounded in blocks and moves a little between them
    # at codes of no probability: so ask for a positive one, do not count.
    codes = tf.range(logits.shape[-1])
    past = (cumulative > target) & (probabilities > 0)
    return tf.reduce_min(tf.where(past, codes, codes[-1]), axis=-1)


class RasterSampler:
    """Part of a prior: draws grids of indices, one position after the other.

    `threads` runs of a compiled loop draw `chunk_size` images each. The runs
    have one size on a machine, and image k is number k % chunk_size of its
    run, so that it does not depend on how many are asked for: matrix products
    round differently at other sizes. A run is a chain of small steps that
    keeps one core busy; a GPU is better off with one large run.

    The network is that of `AutoregressivePrior`: `causal_layers`, `embedding`,
    `context`, `_predict`, `_in_float32`.
    """

    def sample(
        self, n, seed=0, first=0, sampling=None, upper=(), known=None, **given
    ):
        """Draw `n` grids of indices; arguments as of `generate`.

        Image k is a function of (seed, k) and its own conditions alone, on
        one machine: the same in any request, chunk or order.

        Args:
            upper: `(n, h, w)` int arrays, one for each upper grid.
            known: `(n, h, w)` int array, -1 where an index is to be drawn; a
                known index guides the positions after it only.
            given: `label` and `slice_position`; default null.

        Returns: `(n, h, w)` int32 array; `(n,)` float32, the log-probability
            in nats of each grid under the model (temperature 1, all codes, no
            guidance), accumulated while drawing.
        Raises:
            ValueError: if a label, `upper` or `known` does not fit this prior,
                or guidance has no condition to guide by.
        """
        upper, most = tuple(map(np.asarray, upper)), self.num_embeddings - 1
        wanted = [(n, *grid) for grid in self.upper_grids]
        found = [grid.shape for grid in upper]
        fits = all(0 <= grid.min() <= grid.max() <= most for grid in upper)
        message = f"upper: expected {wanted} of 0..{most}, found {found}"
        require(found == wanted and fits, message)
        conditions = self.conditions(n, **given) | {"upper": upper}
        known = self.known_indices(n, known)
        inputs = {"conditions": conditions, "known": known}
        draw = functools.partial(
            self.sample_chunk, sampling or Sampling(), seed
        )
        return self.in_chunks(draw, n, first, inputs)

    def conditions(self, n, label=None, slice_position=None):
        """Checked arrays of the label numbers and positions of `n` images."""
        if label is None or isinstance(label, str):
            label = [label] * n
        require(len(label) == n, f"label: expected {n}, found {len(label)}")
        known = ", ".join(self.labels) or "none, as it was trained without"
        for name in set(label) - {None, *self.labels}:
            raise ValueError(f"label: expected one of {known}; found {name!r}")
        numbers = [-1 if x is None else self.labels.index(x) for x in label]
        position = math.nan if slice_position is None else slice_position
        position = np.asarray(position, "float32")
        fits = np.all(np.isnan(position) | ((0 <= position) & (position <= 1)))
        message = f"slice_position: expected {n} in 0..1, found {position}"
        require(fits and position.shape in ((), (n,)), message)
        position = np.broadcast_to(np.nan_to_num(position, nan=-1), n)
        return {"label": np.int32(numbers), "slice_position": position}

    def known_indices(self, n, indices=None):
        """Checked indices `(n, h, w)` that are not drawn; -1 for the rest."""
        shape, most = (n, *self.latent_grid), self.num_embeddings - 1
        if indices is None:
            return np.full(shape, -1, "int32")
        known = np.asarray(indices, "int32")
        message = f"known: expected {shape} of -1..{most}, found {known.shape}"
        fits = known.shape == shape and -1 <= known.min() <= known.max() <= most
        require(fits, f"{message} of {known.min()}..{known.max()}")
        return known

    def in_chunks(self, draw, n, first, inputs, progress=iter):
        """Arrays of `n` rows from `draw(chunk, **inputs)`, called in threads.

        `draw` returns tensors with a row for each image of a chunk. It gets
        those rows of `inputs`, nested arrays of a row for each image.
        """
        size, start = self.chunk_size, first % self.chunk_size
        chunks = range(first // size, -(-(first + n) // size))

        def run(chunk):
            # What was not asked for is drawn like its neighbour, then cut.
            rows = np.arange(chunk * size, (chunk + 1) * size) - first
            rows = np.clip(rows, 0, n - 1)
            own = tf.nest.map_structure(lambda values: values[rows], inputs)
            return draw(chunk, **own)

        with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
            parts = pool.map(run, chunks)
            done = [next(parts) for _ in progress(chunks)]
        outputs = [np.concatenate(arrays) for arrays in zip(*done, strict=True)]
        return [array[start : start + n] for array in outputs]

    def sample_chunk(self, sampling, seed, chunk, conditions, known):
        """Draw the `chunk_size` images of one chunk; also in a graph.

        Image i of the chunk is number `chunk * chunk_size + i`. Conditions are
        those of `call`; `seed`, `chunk` and the temperature may be tensors.
        """
        guidance = None
        if sampling.guidance != 1:
            message = "guidance: this prior has no labels or slice positions"
            require(self.labels or self.slice_condition, message)
            guidance = tf.constant(sampling.guidance, tf.float32)
        return self._sample_grids(
            self._uniforms(seed, chunk),
            tf.nest.map_structure(tf.convert_to_tensor, conditions),
            tf.convert_to_tensor(known),
            tf.convert_to_tensor(sampling.temperature, tf.float32),
            guidance,
            # A tensor, so that no other value is compiled for.
            top_p=tf.constant(sampling.top_p) if sampling.top_p < 1 else 1.0,
            top_k=int(sampling.top_k),
        )

    def _uniforms(self, seed, chunk):
        """Uniform numbers in [0, 1) of each image and position of a chunk."""
        # Each level has numbers of its own.
        shape = (len(self.upper_grids) + 1, *self.latent_grid)
        first, uniform = chunk * self.chunk_size, tf.random.stateless_uniform
        seeds = [[seed, first + k] for k in range(self.chunk_size)]
        return tf.stack([uniform(shape, x, alg="philox")[-1] for x in seeds])

    def _contexts(self, conditions, copies):
        """Context of a chunk, or None; the second without what guides."""
        if not self.use_context:
            return None
        guide = "label" if self.labels else "slice_position"
        null = {guide: -tf.ones_like(conditions[guide])}
        given = [conditions, conditions | null][:copies]
        return tf.concat([self.context(**each) for each in given], axis=0)

    @tf.function(jit_compile=True, autograph=False)
    def _sample_grids(
        self, uniforms, conditions, known, temperature, guidance, top_p, top_k
    ):
        """The compiled loop in float32: rows outside, columns inside."""
        batch, layers = uniforms.shape[0], self.causal_layers
        height, width = self.latent_grid
        copies = 1 if guidance is None else 2  # with the condition, without
        wide = copies * batch

        def draw_row(row, grid, log_prob, codes, caches):
            def draw(column, grid, log_prob, codes, caches):
                here, place, one = None, [0, row, column], [batch, 1, 1]
                if context is not None:
                    size = [wide, 1, 1, context.shape[-1]]
                    here = tf.slice(context, [*place, 0], size)[:, 0, 0]
                x = None
                for layer, cache in zip(layers, caches, strict=True):
                    x = layer.step(x, cache, column, here)
                logits, *null = tf.split(self._predict(x), copies)
                guided = logits
                if null:
                    guided = null[0] + guidance * (logits - null[0])
                uniform = tf.slice(uniforms, place, one)[:, 0]
                index = sample_index(guided, uniform, temperature, top_p, top_k)
                given = tf.slice(known, place, one)[:, 0, 0]
                index = tf.where(given >= 0, given, index)
                nats = tf.nn.log_softmax(logits)
                log_prob += tf.gather(nats, index, batch_dims=1)
                code = tf.gather(self.embedding.embeddings, index)
                code = tf.tile(code, [copies, 1])
                for layer, cache in zip(layers, caches, strict=True):
                    layer.write(code, cache, column)
                update = keras.ops.slice_update
                codes = update(codes, [0, column, 0], code[:, None])
                grid = update(grid, place, index[:, None, None])
                return column + 1, grid, log_prob, codes, caches

            above = codes
            for layer, cache in zip(layers, caches, strict=True):
                above = layer.start_row(above, cache, row)
            state = (0, grid, log_prob, tf.zeros_like(codes), caches)
            _, *state = tf.while_loop(lambda k, *_: k < width, draw, state)
            return row + 1, *state

        grid = tf.zeros((batch, height, width), tf.int32)
        codes = tf.zeros((wide, width, self.channels))  # embedded, of a row
        caches = [layer.init_cache(wide, self.latent_grid) for layer in layers]
        state = (0, grid, tf.zeros((batch,)), codes, caches)
        with self._in_float32():
            context = self._contexts(conditions, copies)
            _, *found, _, _ = tf.while_loop(
                lambda row, *_: row < height, draw_row, state
            )
        return found


# === Priors ===


class AutoregressivePrior(RasterSampler, TrainableModel):
    """Distribution of a grid of indices as a product over raster order.

    `p(indices) = prod_t p(index_t | indices before t, context)`. A subclass
    gives `_build_layers`, `causal_layers` and `_hidden` (their output for a
    whole grid); context, likelihood and training in bits per code are here.

    Args:
        num_embeddings: int K >= 2. Number of codes.
        latent_grid: (h, w).
        slice_condition: bool. Condition on the slice position.
        labels: names of the class labels to condition on; none by default.
        upper_grids: (h, w) of each level above, nearest first, each half of
            the one before: condition on the indices of these grids.
        codebook_sha256: str. Which codebook the indices belong to.
        kwargs: those of `utils.PriorSettings` that concern a network, but for
            `attention` and `condition`.

    Input shape: `indices` `(B, h, w)` int, and the conditions: `upper`, a
        tuple of `(B, h, w)` int tensors, one for each upper grid; `label`
        `(B,)` int, a number in `labels`; `slice_position` `(B,)` float in
        [0, 1]. A negative label or position, or none, is null.
    Output shape: `(B, h, w, K)` float32 logits.
    Raises:
        utils.FlagError: if a setting is out of range.

    Attributes:
        recompute: bool. Compute each block again for its gradients instead of
            keeping its inner values, which saves memory and costs time. Not
            with dropout, which would differ.
    """

    recompute = False

    def __init__(
        self,
        num_embeddings,
        latent_grid,
        slice_condition=False,
        labels=(),
        upper_grids=(),
        codebook_sha256="",
        **kwargs,
    ):
        stray = {"network", "attention", "condition"} & kwargs.keys()
        message = "the class, labels and slice_condition say what these would"
        require(not stray, f"{', '.join(stray)}: {message}")
        settings = take(utils.PriorSettings, kwargs)
        super().__init__(**kwargs)
        self.autocast = False  # see `ContextMap`
        self.num_embeddings, self.settings = num_embeddings, settings
        self.latent_grid, self.channels = tuple(latent_grid), settings.channels
        self.slice_condition, self.labels = slice_condition, tuple(labels)
        self.upper_grids = tuple(map(tuple, upper_grids))
        self.codebook_sha256 = codebook_sha256
        self.embedding = keras.layers.Embedding(num_embeddings, self.channels)
        place = settings.position_features, settings.atlas
        given = slice_condition, self.labels, self.upper_grids
        self.use_context = any(place + given)
        if self.use_context:
            self.context = ContextMap(self)
        self._build_layers()
        self.head = [
            keras.layers.Dense(self.channels, activation="relu")
            for _ in range(settings.head_layers)
        ]
        self.logits = keras.layers.Dense(num_embeddings, dtype="float32")
        self._make_trackers("loss", "bits_per_code")
        on_gpu = tf.config.list_physical_devices("GPU")
        self.chunk_size = 32 if on_gpu else 4
        self.threads = 1 if on_gpu else os.cpu_count() or 1
        grids = [tf.zeros((1, *grid), tf.int32) for grid in self.upper_grids]
        self(tf.zeros((1, *self.latent_grid), tf.int32), upper=grids)

    def call(
        self, indices, upper=(), label=None, slice_position=None, training=False
    ):
        indices = tf.ensure_shape(indices, (None, *self.latent_grid))
        context = None
        if self.use_context:
            null = tf.fill(tf.shape(indices)[:1], -1)
            given = [null if x is None else x for x in (slice_position, label)]
            given = map(tf.convert_to_tensor, given)
            context = self.context(*given, tuple(upper), training=training)
        codes = self.embedding(indices)
        return self._predict(self._hidden(codes, context, training))

    def _run(self, layer, *inputs, training):
        """Outputs of a layer, in training recomputed if asked for."""
        call = functools.partial(layer, training=training)
        if self.recompute and training:  # with dropout it would differ
            call = tf.recompute_grad(call)
        return call(*(x for x in inputs if x is not None))

    def _predict(self, hidden):
        """Logits from the output of the last causal layer."""
        x = tf.nn.relu(hidden)
        for layer in (*self.head, self.logits):
            x = layer(x)
        return x

    @contextlib.contextmanager
    def _in_float32(self):
        """Within it every layer computes in float32, whatever its policy."""
        # In bfloat16 a likelihood would be off by a percent, and not that of
        # the sampler.
        layers = list(self._flatten_layers())
        with policy_lock:
            policies = [layer.dtype_policy for layer in layers]
            try:
                compute_in_float32(self)
                yield
            finally:
                for layer, policy in zip(layers, policies, strict=True):
                    layer.dtype_policy = policy

    @tf.function(reduce_retracing=True, autograph=False)
    def log_prob(self, indices, upper=(), label=None, slice_position=None):
        """Log-probability in nats of each position, `(B, h, w)` float32.

        The sum over positions is the log-probability of the grid. Conditions
        are those of `call`: a label is its number in `labels`.
        """
        from tensorflow_probability import distributions  # takes seconds

        with self._in_float32():
            logits = self(indices, upper, label, slice_position)
        return distributions.Categorical(logits=logits).log_prob(indices)

    def _batch_loss(self, batch, training):
        """Mean negative log-likelihood, nats per code; updates the metrics."""
        logits = self(**batch, training=training)
        nats = tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels=batch["indices"], logits=logits
        )
        loss = tf.reduce_mean(nats)
        self._track(logits, loss=loss, bits_per_code=loss / np.log(2))
        return loss


@register
class PixelCNN(AutoregressivePrior):
    """Masked convolutions: one A layer, residual blocks, 1x1 layers.

    It has a blind spot: positions above and to the right beyond a diagonal.

    Reference: van den Oord et al., 2016, arXiv:1601.06759; blind spot:
    van den Oord et al., 2016, arXiv:1606.05328, sec. 2.2.
    """

    def _build_layers(self):
        kernel_size, dropout = self.settings.kernel_size, self.settings.dropout
        self.stem = CausalConv2D(self.channels, kernel_size, "A")
        self.residual = [
            CausalResidualBlock(self.channels, dropout, self.use_context)
            for _ in range(self.settings.blocks)
        ]

    @property
    def causal_layers(self):
        return [self.stem, *self.residual]

    def _hidden(self, codes, context, training):
        x = self.stem(codes)
        for block in self.residual:
            x = self._run(block, x, context, training=training)
        return x


@register
class GatedPixelCNN(AutoregressivePrior):
    """Gated blocks of a vertical and a horizontal stack: no blind spot.

    Reference: van den Oord et al., 2016, arXiv:1606.05328.
    """

    attention = False
    ATTENTION_EVERY = 2  # blocks

    def _build_layers(self):
        kernel_size, dropout = self.settings.kernel_size, self.settings.dropout
        options = {"use_context": self.use_context}
        self.stem = GatedBlock(self.channels, kernel_size, "A", **options)
        options["dropout"] = dropout
        self.residual = [
            GatedBlock(self.channels, 3, "B", **options)
            for _ in range(self.settings.blocks)
        ]
        count = -(-self.settings.blocks // self.ATTENTION_EVERY)
        self.attentions = [
            CausalAttention(self.channels, dropout)
            for _ in range(count if self.attention else 0)
        ]

    @property
    def causal_layers(self):
        """The first block, the others; with attention after every few."""
        order, every = [self.stem], self.ATTENTION_EVERY
        for k in range(0, len(self.residual), every):
            order += self.residual[k : k + every]
            order += self.attentions[k // every : k // every + 1]
        return order

    def _hidden(self, codes, context, training):
        run = functools.partial(self._run, training=training)
        vertical = horizontal = codes
        for layer in self.causal_layers:
            if isinstance(layer, CausalAttention):
                horizontal = run(layer, horizontal, codes)
            else:
                vertical, horizontal = run(layer, vertical, horizontal, context)
        return horizontal


@register
class PixelSNAIL(GatedPixelCNN):
    """Gated blocks with causal attention after every second and the last.

    Convolutions see what is near in detail, attention sees everything; without
    `attention` the prior is for grids too large to attend to. `channels` is a
    multiple of `utils.ATTENTION_HEADS`.

    Reference: Chen et al., 2018, arXiv:1712.09763.
    """

    def __init__(self, num_embeddings, latent_grid, attention=True, **kwargs):
        message = f"attention: expected True or False, found {attention!r}"
        require(attention in (True, False), message)
        self.attention = attention
        super().__init__(num_embeddings, latent_grid, **kwargs)


PRIORS = {
    "pixelcnn": PixelCNN,
    "gated": GatedPixelCNN,
    "pixelsnail": PixelSNAIL,
}


# === The chain: images -> indices -> images ===


def load_model(path):
    """Load a saved model with safe mode on; any failure is a `RunError`."""
    if not Path(path).exists():
        raise utils.RunError(f"{path}: no such model file")
    try:
        with zipfile.ZipFile(path) as archive:
            if part := archive.testzip():
                raise ValueError(f"corrupt: {part}")
        return keras.models.load_model(path, compile=False, safe_mode=True)
    except (MemoryError, tf.errors.ResourceExhaustedError):
        raise
    except Exception as error:  # BadZipFile, zlib.error, EOFError, ...
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise utils.RunError(
            f"{path}: truncated, corrupt, or not a .keras file of this program "
            f"({reason}); restore a copy or train again"
        ) from error


def load_vqvae(run, on_cpu=False):
    """Load the VQ-VAE of a run, to be used `on_cpu` or wherever it is fastest.

    Where bfloat16 is slow, images are decoded in float32. They are encoded as
    in training: other arithmetic would give other codes.
    """
    vqvae = load_model(run.vqvae_path)
    if not (utils.has_cpu_bfloat16() if on_cpu else utils.has_bfloat16()):
        compute_in_float32(vqvae.decoder_1)
    return vqvae


def compute_in_float32(part):
    """Let a layer, with those inside, compute in float32 from now on."""
    for layer in part._flatten_layers():
        layer.dtype_policy = "float32"


def load_models(run):
    """Load the VQ-VAE of a run and its priors, bottom first; [] if none.

    Raises:
        utils.RunError: if one is missing, damaged, or was trained on the
            indices of another VQ-VAE.
    """
    vqvae = load_vqvae(run)
    paths = enumerate(run.prior_paths if run.has_priors else (), start=1)
    return vqvae, [load_for(vqvae, path, level) for level, path in paths]


def load_for(vqvae, path, level=1):
    """Load a model of the codebooks of a VQ-VAE from a level up."""
    model = load_model(path)
    if model.codebook_sha256 != codebook_sha256(vqvae, level):
        raise utils.RunError(
            f"{path}: trained on another codebook than that of the VQ-VAE "
            "beside it; train it again"
        )
    return model


def codebook_sha256(vqvae, level=1):
    """Hash of the codebooks that a prior depends on: of its level and above."""
    levels = range(level, vqvae.levels + 1)
    codebooks = [vqvae.part("quantizer", k).codebook for k in levels]
    codes = np.concatenate([*map(np.asarray, codebooks)])
    header = f"{codes.dtype.str}{codes.shape}".encode()
    return hashlib.sha256(header + codes.tobytes()).hexdigest()


def load_texture(run, vqvae):
    """The texture of a run, None if it has none.

    Raises:
        utils.RunError: if it is damaged, or was trained for another VQ-VAE.
    """
    if not run.texture_path.exists():
        return None
    texture = load_for(vqvae, run.texture_path)
    if not utils.has_bfloat16():  # it is slow then
        compute_in_float32(texture)
    return texture


def encode_dataset(vqvae, batches) -> list[np.ndarray]:
    """Indices `(N, h, w)` of each level of batches `(B, H, W, 1)` of images."""
    encoded = [vqvae.encode(batch) for batch in batches]
    return [np.concatenate(level) for level in zip(*encoded, strict=True)]


def rebuild(vqvae, batches, texture=None, seed=0) -> np.ndarray:
    """Images `(N, H, W)` of batches `(B, H, W, 1)`, encoded and decoded."""
    images, first = [], 0
    for batch in batches:
        decoded = vqvae.reconstruct(batch)
        if texture:
            numbers = tf.range(first, first + len(batch))
            decoded = with_texture(vqvae, texture, decoded, seed, numbers)
        images.append(np.asarray(decoded)[..., 0])
        first += len(batch)
    return np.concatenate(images)


def with_texture(vqvae, texture, images, seed, numbers):
    """Decoded frames `(B, H, W, 1)` with texture; see `Texture.add`."""
    seed = tf.cast(seed, tf.int64)  # a tensor: no trace for each
    return vqvae.framed(texture.add(vqvae.cropped(images), seed, numbers))


def prior_inputs(prior, indices, table):
    """Training data of `prior`: dict of arrays, one row an image.

    Args:
        indices: list of `(N, h, w)` arrays, bottom first.
        table: DataFrame of the same N slices.
    """
    level = len(indices) - len(prior.upper_grids)
    inputs = {"indices": indices[level - 1]}
    if prior.upper_grids:
        inputs["upper"] = tuple(indices[level:])  # tf.data stacks a list
    if prior.labels:
        numbers = {name: k for k, name in enumerate(prior.labels)}
        labels = table["label"].map(numbers).fillna(-1)
        inputs["label"] = labels.to_numpy("int32")
    if prior.slice_condition:
        inputs["slice_position"] = table["position"].to_numpy("float32")
    return inputs


COLUMNS = 8  # of the grid of samples that positions and labels are spread over


def slice_positions(n: int, first: int = 0) -> np.ndarray:
    """Slice positions `(n,)` for images `first` to `first + n`.

    Spread evenly over the stack and rising along each row of a grid of
    `COLUMNS`, by the golden ratio within a column. Number k has the same
    position in every request.
    """
    numbers = np.arange(first, first + n, dtype="float64")
    return position_of(numbers).astype("float32")


def position_of(number):
    """Slice position of image `number`, a float64 array or tensor."""
    shift = (0.5 + number // COLUMNS * 0.6180339887498949) % 1
    return (number % COLUMNS + shift) / COLUMNS


def alternate_labels(labels, n: int, first: int = 0):
    """Label names for images `first` to `first + n`, by rows of `COLUMNS`."""
    if not labels:
        return None
    return [labels[k // COLUMNS % len(labels)] for k in range(first, first + n)]


def generate(
    vqvae,
    priors,
    n,
    seed=0,
    first=0,
    sampling=None,
    label=None,
    slice_position=None,
    known=None,
    texture=None,
    progress=iter,
):
    """Draw new images: indices from the priors, decoded by the VQ-VAE.

    From the top level down: each prior is given the indices drawn above it.

    Args:
        priors: those of the VQ-VAE, bottom first.
        seed, first: image k of a request is a function of the seed and
            `first + k`.
        sampling: `Sampling` for all levels, or a list of one for each, bottom
            first; default the plain distribution.
        label: name of a label, or `n` names, None for null; default
            `alternate_labels`.
        slice_position: `(n,)` float in [0, 1], or one for all, NaN for null;
            default `slice_positions`.
        known: for each level indices that are not drawn, or None; see
            `AutoregressivePrior.sample`.
        texture: `Texture` that decoded images get, or None.
        progress: wraps the iterable of chunks, such as `tqdm.tqdm`.

    Returns: `(n, H, W)` float32 images in [0, 1]; list of the indices
        `(n, h, w)` of each level, bottom first; `(n,)` float32
        log-probability in nats of the indices, summed over levels.
    """
    require(n >= 1, f"n: expected 1 or more, found {n}")
    _require_priors_of(vqvae, priors)
    if slice_position is None:
        slice_position = slice_positions(n, first)
    if label is None:
        label = alternate_labels(priors[0].labels, n, first)
    pairs = zip(priors, known or [None] * len(priors), strict=True)
    inputs = {
        "conditions": priors[0].conditions(n, label, slice_position),
        "known": [prior.known_indices(n, grids) for prior, grids in pairs],
    }
    if not isinstance(sampling, (list, tuple)):
        sampling = [sampling or Sampling()] * len(priors)
    models = vqvae, priors, texture
    draw = functools.partial(_generate_chunk, models, sampling, seed)
    images, log_prob, *indices = priors[0].in_chunks(
        draw, n, first, inputs, progress
    )
    return images, indices, log_prob


def _require_priors_of(vqvae, priors):
    """Raise `ValueError` unless these are the priors of a VQ-VAE, in order."""
    message = f"expected {vqvae.levels} priors, found {len(priors)}"
    require(len(priors) == vqvae.levels, message)
    for level, prior in enumerate(priors, start=1):
        fits = prior.codebook_sha256 in ("", codebook_sha256(vqvae, level))
        fits &= prior.latent_grid == vqvae.latent_grids[level - 1]
        fits &= prior.labels == priors[0].labels
        message = "made for another VQ-VAE or level, or with other labels"
        require(fits, f"prior of level {level}: {message}")


def _generate_chunk(models, sampling, seed, chunk, conditions, known):
    """Images of one chunk, log-probabilities, indices; also in a graph."""
    (vqvae, priors, texture), indices, total = models, [], 0.0
    for level in reversed(range(len(priors))):
        given = {**conditions, "upper": tuple(indices)}
        grid, log_prob = priors[level].sample_chunk(
            sampling[level], seed, chunk, given, known[level]
        )
        indices.insert(0, grid)
        total += log_prob
    images, size = vqvae.decode_indices(indices), priors[0].chunk_size
    if texture:
        numbers = chunk * size + tf.range(size)
        images = with_texture(vqvae, texture, images, seed, numbers)
    return images[..., 0], total, *indices


# === Export ===


def export_archive(vqvae, priors=(), texture=None):
    """The models as functions of plain tensors, to be written as SavedModel.

    >>> export_archive(vqvae, priors).write_out("exported", verbose=False)
    >>> loaded = tf.saved_model.load("exported")  # needs none of our code
    >>> loaded.signatures["generate"](n=4, seed=0, temperature=1.0, label="")

    Signatures, which take and return tensors by name:
        encode: `images` `(N, H, W, 1)` float32 in [0, 1] -> `indices_1`, ...
            of each level, bottom first, `(N, h, w)` int32.
        decode: the same the other way.
        generate: `n` >= 1, `seed` >= 0, int32, `temperature` > 0, float32,
            `label`, string, "" to alternate -> `images` `(n, H, W)`, and
            their indices; only with priors. What the function `generate` gives,
            but for the rounding of a texture in bfloat16.

    Returns: `keras.export.ExportArchive`.
    """
    grids = {f"indices_{k}": g for k, g in enumerate(vqvae.latent_grids, 1)}
    archive = keras.export.ExportArchive()
    archive.add_endpoint(
        "encode",
        lambda images: dict(zip(grids, vqvae.encode(images), strict=True)),
        [tf.TensorSpec((None, *vqvae.image_size, 1), name="images")],
    )
    archive.add_endpoint(
        "decode",
        lambda indices: {"images": vqvae.decode_indices([*indices.values()])},
        [{k: tf.TensorSpec((None, *g), tf.int32, k) for k, g in grids.items()}],
    )
    if priors:
        types = {"n": tf.int32, "seed": tf.int32, "temperature": tf.float32}
        types["label"] = tf.string
        archive.add_endpoint(
            "generate",
            functools.partial(_generate_in_graph, (vqvae, priors, texture)),
            [tf.TensorSpec((), x, name) for name, x in types.items()],
        )
    return archive


def _generate_in_graph(models, n, seed, temperature, label):
    """Images and indices of `generate`, the loop over chunks in the graph."""
    vqvae, priors, _ = models
    size, labels = priors[0].chunk_size, priors[0].labels
    found = tf.constant(["", *labels]) == label
    asked = tf.argmax(found, output_type=tf.int32) - 1
    known = f"label: expected one of {', '.join(['empty', *labels])}"
    for right, text in (
        (n >= 1, "n: expected >= 1"),
        (seed >= 0, "seed: expected >= 0"),
        (temperature > 0, "temperature: expected > 0"),
        (tf.reduce_any(found), known),
    ):
        tf.debugging.Assert(right, [text])
    sampling = [Sampling(temperature) for _ in priors]
    none_known = [prior.known_indices(size) for prior in priors]

    def draw(chunk):
        numbers = chunk * size + tf.range(size)
        turns = numbers // COLUMNS % max(len(labels), 1)
        label = tf.where((asked < 0) & bool(labels), turns, asked)
        position = position_of(tf.cast(numbers, tf.float64))
        position = tf.cast(position, tf.float32)
        conditions = {"label": label, "slice_position": position}
        images, _, *indices = _generate_chunk(
            models, sampling, seed, chunk, conditions, none_known
        )
        return images, *indices

    drawn = tf.map_fn(
        draw,
        tf.range((n + size - 1) // size),
        parallel_iterations=64,  # if there are cores
        fn_output_signature=(
            tf.TensorSpec((size, *vqvae.image_size)),
            *(tf.TensorSpec((size, *g), tf.int32) for g in vqvae.latent_grids),
        ),
    )
    images, *grids = [tf.reshape(x, (-1, *x.shape[2:]))[:n] for x in drawn]
    named = {f"indices_{k}": grid for k, grid in enumerate(grids, 1)}
    return {"images": images, **named}
