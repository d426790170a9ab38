"""Models: vector quantizer, VQ-VAE of one to three levels, three priors.

Opening a saved model needs this module imported first::

    import keras
    import modules
    vqvae = keras.models.load_model("runs/NAME/vqvae.keras")

Dimension letters: B batch, H W image, h w latent grid, C channels,
D length of a code vector, K number of code vectors.
"""

import concurrent.futures
import functools
import itertools
import math
import os
import signal
import time
import typing
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import utils

register = keras.saving.register_keras_serializable("mri_vqvae")


def require(condition: bool, message: str) -> None:
    """Raise `ValueError(message)` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def within(low: float, high: float, **arguments) -> None:
    """Raise a `ValueError` that names the argument not in `[low, high]`."""
    for name, value in arguments.items():
        require(
            low <= value <= high,
            f"{name}: expected {low}..{high}, found {value}",
        )


class Configurable:
    """Mixin: `get_config` from the names in `ARGUMENTS`.

    Each constructor argument is kept as an attribute of the same name:
    `self.keep(locals())` in `__init__` does that.
    """

    ARGUMENTS: tuple[str, ...] = ()

    def keep(self, arguments: dict) -> None:
        for name in self.ARGUMENTS:
            if name in arguments:  # a subclass keeps those that it adds
                setattr(self, name, arguments[name])

    def get_config(self) -> dict:
        own = {name: getattr(self, name) for name in self.ARGUMENTS}
        return {**super().get_config(), **own}

    @classmethod
    def from_config(cls, config):
        """Also gives the layers inside the saved precision policy.

        They take the global one, which is that of the training only there.
        """
        current = keras.config.dtype_policy()
        policy = keras.dtype_policies.get(config.get("dtype"))
        keras.config.set_dtype_policy(policy)
        try:
            return super().from_config(config)
        finally:
            keras.config.set_dtype_policy(current)


class TrainableModel(Configurable, keras.Model):
    """Model with a custom `train_step` and `test_step` over one loss.

    A subclass gives `_batch_loss(batch, training)`, which returns the mean
    loss over the images of a batch and updates every tracker in `metrics`:
    what an epoch logs is what these average, not Keras's own loss tracker.

    Under a strategy of `tf.distribute` each replica trains on its part of the
    batch, and the step is that of the whole batch (`batch_parts` in
    dataset.py cuts it).

    Attributes:
        accumulation_steps: int >= 1. Parts that a replica takes its batch in,
            one after the other: a step then needs the memory of one part. An
            EMA codebook moves with each part.
    """

    accumulation_steps = 1

    def train_step(self, batch):
        gradients, images = self._accumulated_gradients(batch)
        variables = self.trainable_variables
        gradients, norm = self._over_replicas(gradients, images)
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        # Of this step, not means. A NaN voxel can leave the loss finite, for
        # a fused ReLU turns it into 0, and then the weights are all that
        # tells: these two are what `FiniteCheck` needs besides the loss.
        return self._logged(
            self.get_metrics_result()
            | {
                "gradient_norm": norm,
                "parameter_norm": tf.linalg.global_norm(self.float_weights),
            }
        )

    def _accumulated_gradients(self, batch):
        """Gradients of the mean loss over a batch, and its images."""
        gradients = None
        for part, share in self._parts(batch):
            # A part begins when the one before has let go of its memory.
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
        return gradients, tf.shape(tf.nest.flatten(batch)[0])[0]

    def _parts(self, batch):
        """Parts of a batch, and the share of its images that each has."""
        count = self.accumulation_steps
        if count == 1:
            return [(batch, 1.0)]
        images = tf.shape(tf.nest.flatten(batch)[0])[0]
        bounds = [images * k // count for k in range(count + 1)]
        return [
            (
                _rows(batch, first, last),
                tf.cast((last - first) / images, tf.float32),
            )
            for first, last in itertools.pairwise(bounds)
        ]

    def _over_replicas(self, gradients, images):
        """Gradients to apply, and the norm of those of the whole batch.

        The optimizer clips the gradients of each replica, then adds them up.
        So that the whole batch is what is clipped, they are added up and
        clipped here, and each replica applies its share.
        """
        replicas = tf.distribute.get_replica_context()
        count = replicas.num_replicas_in_sync
        if count == 1:
            return gradients, tf.linalg.global_norm(gradients)
        weight = tf.cast(images, tf.float32)
        weight /= replicas.all_reduce("SUM", weight)
        gradients = replicas.all_reduce("SUM", [weight * g for g in gradients])
        norm = tf.linalg.global_norm(gradients)
        scale = 1 / count
        if limit := self.optimizer.global_clipnorm:
            scale *= tf.minimum(1.0, limit / norm)
        return [scale * g for g in gradients], norm

    def _logged(self, values):
        """Values of a step in the form that Keras takes the mean of.

        Of several workers it reduces the first axis, of replicas none.
        """
        if not utils.is_multi_worker(self.distribute_strategy):
            return values
        return {name: tf.reshape(v, (1,)) for name, v in values.items()}

    def _get_metrics_result_or_logs(self, logs):
        """Metrics of an epoch, over all replicas, and the norms of its end.

        Keras would take the logs of the last step if they hold more than
        metrics do; these are of one replica.
        """
        return {**logs, **self.get_metrics_result()}

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Build the optimizer only: the model is built when it is made.

        Keras would trace it on a batch, which fails where each replica has a
        batch of its own (github.com/keras-team/keras/issues/20585).
        """
        if self.optimizer and not self.optimizer.built:
            with self.distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables)

    @property
    def float_weights(self):
        """What training changes, the averages of a codebook among it."""
        return [
            weight.value
            for weight in self.weights
            if weight.dtype.startswith("float")
        ]

    def test_step(self, batch):
        self._batch_loss(batch, training=False)
        return self._logged(self.get_metrics_result())


def _rows(batch, first, last):
    """Images `first` to `last` - 1 of a structure of tensors."""
    return tf.nest.map_structure(lambda x: x[first:last], batch)


# === Callbacks ===


class FiniteCheck(keras.callbacks.Callback):
    """Ends a training at the first number that is not finite.

    Looks at what every step and every epoch logs. It comes before
    `Checkpoint` in the list, so that nothing is saved after such a step.

    Args:
        stage: name of the training, for the message.

    Raises:
        utils.NumericsError: names the step and the quantities.
    """

    def __init__(self, stage):
        super().__init__()
        self.stage = stage
        self.epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        self._check(f"in step {batch + 1} of epoch {self.epoch + 1}", logs)

    def on_epoch_end(self, epoch, logs=None):
        self._check(f"after epoch {epoch + 1}", logs)

    def _check(self, when, logs):
        bad = [k for k, v in logs.items() if not math.isfinite(float(v))]
        # Gradients may overflow under a loss scale, which then skips a step.
        if hasattr(self.model.optimizer, "inner_optimizer"):
            bad = [name for name in bad if name != "gradient_norm"]
        if bad:
            flag = "learning-rate"
            if self.stage != "vqvae":
                flag = f"prior-{flag}"
            raise utils.NumericsError(
                f"{self.stage}: not finite {when}: {', '.join(bad)}; no model "
                f"was saved from it, try a smaller --{flag}"
            )


class Checkpoint(keras.callbacks.Callback):
    """Saves a training now and then, to go on from any batch.

    A checkpoint holds all that the rest of the training follows from: weights
    and averages, states of the random generators, metrics, optimizer, best
    weights so far, and the place in the data. Training on from it gives the
    weights of a training that was never interrupted; on a CPU to the bit.

    >>> checkpoint = Checkpoint("checkpoint/vqvae", minutes=5)
    >>> model.fit(
    ...     batches(start_step=checkpoint.steps_done(steps_per_epoch)),
    ...     initial_epoch=checkpoint.epoch,
    ...     callbacks=[checkpoint],
    ... )

    Args:
        path: of the two files, `PATH.npz` and, the one before,
            `PATH.previous.npz`. If there is one, the training goes on from it.
        minutes: save after a batch when so long has passed; 0: never.
        steps: save after every so many batches; 0: never.
        stopping: `EarlyStopping` before this in the list, whose state is
            saved too, or None.
        signals: `utils.StopSignals`, which end the training after a batch.

    Attributes:
        epoch: int, whole epochs done when this began.
        step: int, batches done besides.
        seconds: float, time that the training took so far.
    """

    def __init__(self, path, minutes=5, steps=0, stopping=None, signals=None):
        super().__init__()
        self.path, self.minutes, self.steps = Path(path), minutes, steps
        self.stopping, self.signals = stopping, signals
        self.state, self.arrays = utils.read_checkpoint(self.path)
        self.epoch = self.state.get("epoch", 0)
        self.step = self.state.get("step", 0)
        self.started = time.monotonic() - self.state.get("seconds", 0.0)
        self.saved = time.monotonic()
        self.current_epoch = self.epoch

    @property
    def seconds(self):
        return time.monotonic() - self.started

    def steps_done(self, steps_per_epoch):
        """Batches that the data begin after."""
        return self.epoch * steps_per_epoch + self.step

    def was_done(self, batch):
        """Whether a batch of this epoch was trained on before."""
        return self.current_epoch == self.epoch and batch < self.step

    def on_train_begin(self, logs=None):
        if self.state:
            self._restore(("model", "optimizer"))
            if self.stopping:
                self._restore_best()
            self._skip_steps_done()

    def on_epoch_begin(self, epoch, logs=None):
        self.current_epoch = epoch
        if self.state and epoch == self.epoch:  # Keras has just reset them
            self._restore(("metrics",))

    def on_train_batch_end(self, batch, logs=None):
        if self.was_done(batch):
            return
        wait = time.monotonic() - self.saved
        stop = bool(self.signals and self.signals.received)
        due = (
            stop
            or (self.minutes and wait >= 60 * self.minutes)
            or (self.steps and (batch + 1) % self.steps == 0)
        )
        # Workers save and stop together: reading a metric needs all of them.
        strategy = self.model.distribute_strategy
        due, stop = utils.any_worker(strategy, [due, stop])
        if due:
            self._save(batch + 1, logs)
        if stop:
            raise utils.Stopped(self.signals.received or signal.SIGTERM)

    def _variables(self):
        return {
            "model": self.model.variables,
            "metrics": self.model.metrics_variables,
            "optimizer": self.model.optimizer.variables,
        }

    def _save(self, step, logs):
        arrays = {
            f"{group}/{number}": np.asarray(variable)
            for group, variables in self._variables().items()
            for number, variable in enumerate(variables)
        }
        state = {
            "epoch": self.current_epoch,
            "step": step,
            "seconds": self.seconds,
            "logs": {name: float(value) for name, value in logs.items()},
        }
        if self.stopping and self.stopping.best_weights is not None:
            state["best"] = {
                "best": float(self.stopping.best),
                "best_epoch": self.stopping.best_epoch,
                "wait": self.stopping.wait,
            }
            for number, weight in enumerate(self.stopping.best_weights):
                arrays[f"best/{number}"] = weight
        utils.write_checkpoint(self.path, state, arrays)
        self.saved = time.monotonic()

    def _restore(self, groups):
        for group in groups:
            for number, variable in enumerate(self._variables()[group]):
                value = self.arrays.get(f"{group}/{number}")
                if value is None or value.shape != tuple(variable.shape):
                    raise utils.RunError(
                        f"{self.path}: not of this {group}: number {number} "
                        f"has another shape than {tuple(variable.shape)}"
                    )
                variable.assign(value)

    def _restore_best(self):
        for name, value in self.state.get("best", {}).items():
            setattr(self.stopping, name, value)
        count = sum(name.startswith("best/") for name in self.arrays)
        if count:
            best = [self.arrays[f"best/{number}"] for number in range(count)]
            self.stopping.best_weights = best

    def _skip_steps_done(self):
        """Let the first steps of the epoch pass without any training.

        Keras begins with whole epochs only. The data begin after these steps.
        """
        train_function = self.model.train_function
        left = self.step

        def skip(iterator):
            nonlocal left
            if left == 0:
                self.model.train_function = train_function
                return train_function(iterator)
            left -= 1
            return self.state["logs"]

        self.model.train_function = skip


class TensorBoardLog(keras.callbacks.Callback):
    """Writes what TensorBoard shows of a training.

    Numbers after every epoch, pictures after the first, the last and every
    few between. Keras's own callback counts epochs from 0, logs validation
    twice, and would log again what a resumed training repeats.

    It draws no random number, so that weights are the same without it.

    Args:
        path: of a folder; in it `train`, `validate` and `pictures` hold a
            file of events for each part of the training.
        epoch: int, epochs done before. What is there of later ones, of which
            a killed training saved nothing, is removed.
        every: int. Epochs between pictures; 0: none.
        draw: function without arguments that logs the pictures with
            `tf.summary`, or None.
    """

    def __init__(self, path, epoch=0, every=0, draw=None):
        super().__init__()
        self.path, self.epoch = Path(path), epoch
        self.every, self.draw = every if draw else 0, draw
        self.writers = {}

    def on_train_begin(self, logs=None):
        utils.drop_events(self.path, self.epoch)

    def on_epoch_end(self, epoch, logs=None):
        self.epoch = epoch + 1
        rate = float(self.model.optimizer.learning_rate)
        for name, value in {**logs, "learning_rate": rate}.items():
            part = "validate" if name.startswith("val_") else "train"
            with self._writer(part):
                tf.summary.scalar(name.removeprefix("val_"), value)
        last = self.epoch == self.params["epochs"] or self.model.stop_training
        if self.every and not last:
            if epoch == 0 or self.epoch % self.every == 0:
                self._draw()
        # Before the next checkpoint, which counts this epoch as logged.
        for writer in self.writers.values():
            writer.flush()

    def on_train_end(self, logs=None):
        if self.every:  # by now with the best weights
            self._draw()
        for writer in self.writers.values():
            writer.close()

    def _draw(self):
        with self._writer("pictures"):
            self.draw()

    def _writer(self, part):
        """Context in which `tf.summary` writes to a part of the folder."""
        if part not in self.writers:
            folder = str(self.path / part)
            self.writers[part] = tf.summary.create_file_writer(folder)
        return self.writers[part].as_default(self.epoch)


# === Vector quantizer ===


class Quantized(typing.NamedTuple):
    """What a `VectorQuantizer` makes of latents `(B, ..., D)`.

    Attributes:
        vectors: `(B, ..., D)` float32, the nearest code vectors.
        indices: `(B, ...)` int32 in [0, K).
        loss: float32, see `VectorQuantizer`.
        latents: `(N, D)` float32 as they were compared, without gradient.
        errors: `(N,)` float32, squared distances to the code vectors.
    """

    vectors: tf.Tensor
    indices: tf.Tensor
    loss: tf.Tensor
    latents: tf.Tensor
    errors: tf.Tensor


def count_codes(indices, num_embeddings):
    """How often each code occurs, `(K,)` float32; XLA has no `bincount`."""
    indices = tf.reshape(indices, (-1,))
    ones = tf.ones_like(indices, tf.float32)
    return tf.math.unsorted_segment_sum(ones, indices, num_embeddings)


def gathered(tensor):
    """Rows of `tensor` of all replicas, in their order."""
    replicas = tf.distribute.get_replica_context()
    if replicas.num_replicas_in_sync == 1:
        return tensor
    return replicas.all_gather(tensor, axis=0)


@register
class VectorQuantizer(Configurable, keras.layers.Layer):
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
        num_embeddings: int >= 2. Number of code vectors, K.
        embedding_dim: int >= 1. Length of a code vector, D.
        commitment_cost: float >= 0. Weight beta of the commitment term, eq. 3.
        codebook_update: "ema" or "gradient".
        codebook_distance: "euclidean", or "cosine": latents and code vectors
            are scaled to length 1, so that only directions are compared and
            no latent can outgrow the codebook.
        decay: float in [0, 1). Moving-average factor per training step.
        epsilon: float > 0. Laplace smoothing of the counts, in latents.
        restart_threshold: float >= 0, as a fraction of the mean use; 0 never
            restarts a code.
        seed: int. Which latents are drawn at a start or restart.

    Input shape: `(batch, ..., D)`, any float dtype.
    Output shape: `(batch, ..., D)` float32 quantized;
        `(batch, ...)` int32 indices in `[0, K)`.
    Losses: adds `commitment_cost * mean((stop_gradient(e) - z)**2)` and, with
        a gradient codebook, `mean((e - stop_gradient(z))**2)`; in squared
        latent units, per element.
    Raises:
        ValueError: if an argument is out of range or the last axis is not D.

    Reference: van den Oord et al., 2017, arXiv:1711.00937, sec. 3.2, app. A.1.
    Restarts: Dhariwal et al., 2020, arXiv:2005.00341, sec. 3.1.
    Cosine: Yu et al., 2022, arXiv:2110.04627, sec. 3.2.

    Example:
    >>> tuple(VectorQuantizer(8, 4)(keras.ops.zeros((2, 5, 5, 4)))[1].shape)
    (2, 5, 5)
    """

    ARGUMENTS = (
        "num_embeddings",
        "embedding_dim",
        "commitment_cost",
        "codebook_update",
        "codebook_distance",
        "decay",
        "epsilon",
        "restart_threshold",
        "seed",
    )
    # That latents are compared in: of a piece, the scores of all codes stay
    # in the processor's cache.
    PIECES = 16

    def __init__(
        self,
        num_embeddings,
        embedding_dim,
        commitment_cost=0.25,
        codebook_update="ema",
        codebook_distance="euclidean",
        decay=0.99,
        epsilon=1e-5,
        restart_threshold=0.02,
        seed=0,
        **kwargs,
    ):
        within(2, 2**20, num_embeddings=num_embeddings)
        within(1, 2**14, embedding_dim=embedding_dim)
        within(0, math.inf, commitment_cost=commitment_cost)
        require(
            codebook_update in ("ema", "gradient"),
            f"codebook_update: expected ema or gradient, found "
            f"{codebook_update!r}",
        )
        require(
            codebook_distance in ("euclidean", "cosine"),
            f"codebook_distance: expected euclidean or cosine, found "
            f"{codebook_distance!r}",
        )
        require(0 <= decay < 1, f"decay: expected [0, 1), found {decay}")
        require(epsilon > 0, f"epsilon: expected > 0, found {epsilon}")
        require(
            0 <= restart_threshold < 1,
            f"restart_threshold: expected [0, 1), found {restart_threshold}",
        )
        # Half precision picks wrong neighbours, so float32 is not a choice.
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.keep(locals())

    def build(self, input_shape):
        require(
            input_shape[-1] == self.embedding_dim,
            f"last axis of the latents: expected {self.embedding_dim}, "
            f"found {input_shape[-1]}",
        )
        shape = (self.num_embeddings, self.embedding_dim)
        # All replicas assign the same to these; float32 wherever they are used.
        same = {"aggregation": "only_first_replica", "autocast": False}
        self.codebook = self.add_weight(
            name="codebook",
            shape=shape,
            initializer=keras.initializers.RandomUniform(seed=self.seed),
            trainable=self.codebook_update == "gradient",
            **same,
        )
        # Counts of one and sums equal to the codebook: with zero counts the
        # first update would send unused codes far away or to zero.
        self.ema_count = self.add_weight(
            name="ema_count",
            shape=shape[:1],
            initializer="ones",
            trainable=False,
            **same,
        )
        self.ema_sum = self.add_weight(
            name="ema_sum",
            shape=shape,
            initializer=lambda *_, **__: tf.identity(self.codebook.value),
            trainable=False,
            **same,
        )
        self.step = self.add_weight(
            name="step",
            shape=(),
            dtype="int32",
            initializer="zeros",
            trainable=False,
            **same,
        )

    def call(self, inputs, training=False):
        result = self.nearest(inputs)
        self.add_loss(result.loss)
        if training:
            self.update(result)
        return result.vectors, result.indices

    def nearest(self, inputs):
        """The inputs as `Quantized`; changes nothing."""
        latents = tf.cast(inputs, tf.float32)
        latents = tf.reshape(latents, (-1, self.embedding_dim))  # (B*h*w, D)
        latents = self._scaled(latents)
        indices = self._nearest_codes(tf.stop_gradient(latents))
        quantized = self.lookup(indices)  # (B*h*w, D)
        passed = latents + tf.stop_gradient(quantized - latents)
        return Quantized(
            vectors=tf.reshape(passed, tf.shape(inputs)),
            indices=tf.reshape(indices, tf.shape(inputs)[:-1]),
            loss=self._loss(latents, quantized),
            latents=tf.stop_gradient(latents),
            errors=tf.reduce_sum(tf.stop_gradient(latents - quantized) ** 2, 1),
        )

    def _nearest_codes(self, latents):
        """Index `(N,)` of the code vector nearest to each of `(N, D)` latents.

        By |e|^2 - 2 z.e, which orders the code vectors as |z - e|^2 does; on
        vectors of length 1, as the cosine does.
        """
        codebook = self._scaled(tf.convert_to_tensor(self.codebook))
        # Far from the origin the two terms would cancel badly: move it.
        origin = tf.reduce_mean(codebook, axis=0)
        codebook -= origin
        squares = tf.reduce_sum(codebook**2, axis=1)
        latents -= origin
        count, found = tf.shape(latents)[0], []
        for k in range(self.PIECES):
            rows = slice(
                count * k // self.PIECES, count * (k + 1) // self.PIECES
            )
            products = tf.matmul(latents[rows], -2 * codebook, transpose_b=True)
            scores = tf.nn.bias_add(products, squares)  # (N / PIECES, K)
            found.append(tf.argmin(scores, axis=1, output_type=tf.int32))
        return tf.concat(found, axis=0)

    def lookup(self, indices):
        """Code vectors `(..., D)` of integer `indices` `(...)`."""
        return self._scaled(tf.gather(self.codebook, indices))

    def _scaled(self, vectors):
        """`vectors` `(..., D)` as they are compared."""
        if self.codebook_distance == "euclidean":
            return vectors
        # An epsilon that keeps the gradient at a latent of zeros small.
        return tf.math.l2_normalize(vectors, axis=-1, epsilon=1e-8)

    def _loss(self, latents, quantized):
        commitment = tf.reduce_mean(
            (tf.stop_gradient(quantized) - latents) ** 2
        )
        loss = self.commitment_cost * commitment
        if self.codebook_update == "gradient":
            fixed = tf.stop_gradient(latents)
            loss += tf.reduce_mean((quantized - fixed) ** 2)
        return loss

    def update(self, result):
        """Move averages, then the codebook; restart what is dead.

        Over the latents of all replicas, so that their codebooks stay equal.
        `tf.where` rather than `tf.cond`: a variable may not be assigned in a
        branch under `tf.distribute`.

        Args:
            result: `Quantized` of a training batch.
        """
        indices = tf.reshape(result.indices, (-1,))
        counts = count_codes(indices, self.num_embeddings)  # (K,)
        sums = tf.math.unsorted_segment_sum(
            result.latents, indices, self.num_embeddings
        )  # (K, D)
        replicas = tf.distribute.get_replica_context()
        counts, sums = replicas.all_reduce("SUM", [counts, sums])
        # Latents move fast at first: average over fewer steps then.
        step = tf.cast(self.step, tf.float32)
        rate = 1 - tf.minimum(self.decay, (1 + step) / (10 + step))
        count = self.ema_count + rate * (counts - self.ema_count)
        total = self.ema_sum + rate * (sums - self.ema_sum)
        codes = tf.convert_to_tensor(self.codebook)
        if self.codebook_update == "ema":
            codes = total / self._smoothed(count)[:, None]

        mean_use = tf.reduce_sum(counts) / self.num_embeddings
        level = self.restart_threshold * mean_use
        dead = (count < level) | (self.step == 0)  # (K,)
        # High enough above `level` for a new code to find its latents.
        fresh_count = tf.maximum(5 * level, 0.1 * mean_use)
        # The first draws to the dead: later ones prefer large errors less.
        rank = tf.cumsum(tf.cast(dead, tf.int32), exclusive=True)
        drawn = self._draw(result.latents, result.errors)
        fresh = tf.gather(drawn, rank)  # (K, D)
        codes = tf.where(dead[:, None], fresh, codes)
        self.ema_count.assign(tf.where(dead, fresh_count, count))
        self.ema_sum.assign(tf.where(dead[:, None], fresh * fresh_count, total))
        self.codebook.assign(codes)
        self.step.assign_add(1)

    def _smoothed(self, count):
        total = tf.reduce_sum(count)
        share = (count + self.epsilon) / (
            total + self.num_embeddings * self.epsilon
        )
        return share * total

    def _draw(self, latents, errors):
        """K latents, drawn with probability proportional to `errors`.

        Without replacement (Gumbel top-k) while there are K of them; with
        fewer, they repeat. Of several replicas each proposes its best, and
        all draw the same from these: what one would draw from the whole batch.
        """
        replicas = tf.distribute.get_replica_context()
        own = tf.shape(errors)[0]
        counts = gathered(own[None])  # (R,)
        before = tf.reduce_sum(counts[: replicas.replica_id_in_sync_group])
        seed = [self.seed, tf.convert_to_tensor(self.step)]
        uniform = tf.random.stateless_uniform(
            [tf.reduce_sum(counts)], seed, 1e-9, 1.0
        )[before : before + own]
        scores = tf.math.log(tf.maximum(errors, 1e-12)) - tf.math.log(
            -tf.math.log(uniform)
        )
        best, order = tf.math.top_k(
            scores, tf.minimum(self.num_embeddings, own)
        )
        best, latents = gathered(best), gathered(tf.gather(latents, order))
        available = tf.minimum(self.num_embeddings, tf.shape(best)[0])
        _, order = tf.math.top_k(best, available)
        picks = tf.gather(order, tf.range(self.num_embeddings) % available)
        return tf.gather(latents, picks)


# === VQ-VAE ===


@register
class ResidualStack(Configurable, keras.layers.Layer):
    """Blocks of ReLU, 3x3, ReLU, 1x1 convolution, each added to its input.

    Args:
        channels: int. Channels of input and output.
        blocks: int >= 0.
        residual_channels: int >= 1. Channels between the two convolutions.

    Input and output shape: `(B, h, w, channels)`.
    Reference: arXiv:1711.00937, sec. 4.1.
    """

    ARGUMENTS = ("channels", "blocks", "residual_channels")

    def __init__(self, channels, blocks, residual_channels, **kwargs):
        super().__init__(**kwargs)
        self.keep(locals())
        self.inner = [
            keras.layers.Conv2D(residual_channels, 3, padding="same")
            for _ in range(blocks)
        ]
        self.outer = [keras.layers.Conv2D(channels, 1) for _ in range(blocks)]

    def build(self, input_shape):
        for inner, outer in zip(self.inner, self.outer, strict=True):
            inner.build(input_shape)
            outer.build((*input_shape[:-1], self.residual_channels))

    def call(self, x):
        for inner, outer in zip(self.inner, self.outer, strict=True):
            x = x + outer(tf.nn.relu(inner(tf.nn.relu(x))))
        return tf.nn.relu(x)


def stage_widths(channels: int, downsampling: int) -> list[int]:
    """Channels after each halving; the last has `channels`.

    >>> stage_widths(64, 8)
    [16, 32, 64]
    """
    stages = downsampling.bit_length() - 1
    return [max(channels >> (stages - 1 - s), 1) for s in range(stages)]


@register
class Encoder(Configurable, keras.layers.Layer):
    """Strided 4x4 convolutions, then a residual stack.

    Args:
        channels: int. Channels of the output; each stage before has half.
        downsampling: int, a power of 2. Input height over output height.
        residual_blocks, residual_channels: see `ResidualStack`.

    Input shape: `(B, H, W, any)`. Output shape: `(B, H/f, W/f, channels)`.
    """

    ARGUMENTS = (
        "channels",
        "downsampling",
        "residual_blocks",
        "residual_channels",
    )

    def __init__(
        self,
        channels,
        downsampling,
        residual_blocks,
        residual_channels,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.keep(locals())

        self.halvings = [
            keras.layers.Conv2D(
                width, 4, strides=2, padding="same", activation="relu"
            )
            for width in stage_widths(channels, downsampling)
        ]
        self.mix = keras.layers.Conv2D(channels, 3, padding="same")
        self.residual = ResidualStack(
            channels, residual_blocks, residual_channels
        )

    def call(self, x):
        for halving in self.halvings:
            x = halving(x)
        return self.residual(self.mix(x))


@register
class Decoder(Configurable, keras.layers.Layer):
    """Residual stack, then doublings of the grid; mirrors `Encoder`.

    The last doubling is a 3x3 convolution to 4 values a position, rearranged
    to 2x2 pixels (Shi et al., 2016, arXiv:1609.05158): it reaches as far as a
    strided transposed convolution and costs less at full resolution.

    Args:
        filters: int. Channels of the output.
        channels: int. Channels at the coarsest grid; halved by each stage.
        upsampling: int, a power of 2. Output height over input height.
        residual_blocks, residual_channels: see `ResidualStack`.

    Input shape: `(B, h, w, any)`. Output shape: `(B, h*f, w*f, filters)`.
    """

    ARGUMENTS = (
        "filters",
        "channels",
        "upsampling",
        "residual_blocks",
        "residual_channels",
    )

    def __init__(
        self,
        filters,
        channels,
        upsampling,
        residual_blocks,
        residual_channels,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.keep(locals())

        self.mix = keras.layers.Conv2D(channels, 3, padding="same")
        self.residual = ResidualStack(
            channels, residual_blocks, residual_channels
        )
        self.doublings = [
            keras.layers.Conv2DTranspose(
                width, 4, strides=2, padding="same", activation="relu"
            )
            for width in reversed(stage_widths(channels, upsampling)[:-1])
        ]
        self.head = keras.layers.Conv2D(4 * filters, 3, padding="same")

    def call(self, x):
        x = self.residual(self.mix(x))
        for doubling in self.doublings:
            x = doubling(x)
        return tf.nn.depth_to_space(self.head(x), 2)


@register
class CodebookUsage(keras.metrics.Metric):
    """Share of codes in use and perplexity over all indices of an epoch.

    Over a whole epoch, not a batch: both numbers depend on how many indices
    they are taken over.

    Args:
        num_embeddings: int. K.

    Result: dict with `codebook_usage` in (0, 1] and `perplexity` in codes,
        1..K; the keys end in the name's suffix for levels above the first.
    """

    def __init__(self, num_embeddings, suffix="", name=None, **kwargs):
        super().__init__(name=name or "codebook" + suffix, **kwargs)
        self.num_embeddings = num_embeddings
        self.suffix = suffix
        self.counts = self.add_weight(
            name="counts", shape=(num_embeddings,), initializer="zeros"
        )

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

    def get_config(self):
        return {
            **super().get_config(),
            "num_embeddings": self.num_embeddings,
            "suffix": self.suffix,
        }


@register
class VQVAE(TrainableModel):
    """Autoencoder whose latents are one to three grids of codebook indices.

    One level is the VQ-VAE, two the VQ-VAE-2. Level 1 (`bottom`) has the
    grid `H/f x W/f`; each level above halves it. Encoding runs bottom to top;
    quantizing and decoding run top to bottom: a level quantizes its encoder
    features together with the decoded level above.

    Args:
        image_size: (H, W) in pixels, multiples of
            `downsampling * 2**(levels - 1)`.
        levels: int, 1 to 3.
        downsampling: int f, a power of 2 from 2 to 64. Pixels a side for each
            position of the bottom grid.
        channels: int. Width of encoder and decoder at the latent grids.
        residual_blocks, residual_channels: see `ResidualStack`.
        num_embeddings, embedding_dim, commitment_cost, codebook_update,
            codebook_distance, decay, restart_threshold, seed: see
            `VectorQuantizer`.
        ssim_weight: float >= 0. Weight of `1 - SSIM` in the reconstruction
            loss, beside `MSE / data_variance`.
        upper_weight: float >= 0. Weight of the loss by which each level above
            the first must give the image, averaged to the grid below, from
            what is decoded of it and the levels above alone. Without it a
            level may fall silent once the one below does well enough.
        data_variance: float > 0. Variance of the training pixels.

    Input shape: `(B, H, W, 1)` float in [0, 1].
    Output shape: `(B, H, W, 1)` float32, near [0, 1]; `reconstruct` clips.
    Raises:
        ValueError: if an argument is out of range or the size not divisible.

    References: van den Oord et al., 2017, arXiv:1711.00937 (one level);
        Razavi et al., 2019, arXiv:1906.00446 (two and more).

    Example:
    >>> model = VQVAE((32, 32), channels=8, num_embeddings=16, embedding_dim=4)
    >>> [tuple(i.shape) for i in model.encode(keras.ops.zeros((2, 32, 32, 1)))]
    [(2, 8, 8)]
    """

    ARGUMENTS = (
        "image_size",
        "levels",
        "downsampling",
        "channels",
        "residual_blocks",
        "residual_channels",
        "num_embeddings",
        "embedding_dim",
        "commitment_cost",
        "codebook_update",
        "codebook_distance",
        "decay",
        "restart_threshold",
        "ssim_weight",
        "upper_weight",
        "data_variance",
        "seed",
    )

    def __init__(
        self,
        image_size,
        levels=1,
        downsampling=4,
        channels=128,
        residual_blocks=2,
        residual_channels=32,
        num_embeddings=512,
        embedding_dim=64,
        commitment_cost=0.25,
        codebook_update="ema",
        codebook_distance="euclidean",
        decay=0.99,
        restart_threshold=0.02,
        ssim_weight=0.0,
        upper_weight=0.0,
        data_variance=1.0,
        seed=0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        within(1, 3, levels=levels)
        require(
            downsampling in (2, 4, 8, 16, 32, 64),
            f"downsampling: expected a power of 2 in 2..64, found "
            f"{downsampling}",
        )
        within(1, 4096, channels=channels, residual_channels=residual_channels)
        within(0, 64, residual_blocks=residual_blocks)
        within(0, math.inf, ssim_weight=ssim_weight, upper_weight=upper_weight)
        require(
            data_variance > 0,
            f"data_variance: expected > 0, found {data_variance}",
        )
        total = downsampling * 2 ** (levels - 1)
        require(
            all(0 < side <= 4096 and side % total == 0 for side in image_size),
            f"image_size: expected multiples of {total} up to 4096, found "
            f"{tuple(image_size)}",
        )
        image_size = tuple(image_size)
        self.keep(locals())
        for level in range(1, levels + 1):
            self._add_level(level)
        names = ["loss", "reconstruction_loss", "commitment_loss", "ssim"]
        if levels > 1:
            names.append("upper_loss")
        self._trackers = {name: keras.metrics.Mean(name=name) for name in names}
        self(tf.zeros((1, *self.image_size, 1)))  # makes the weights

    def _add_level(self, level):
        """Attributes `encoder_1`, `quantizer_1`, ... : named, not listed.

        Keras restores the members of a list by class and position, so a list
        of levels could be loaded in the wrong order without an error.
        """
        factor = self.downsampling if level == 1 else 2
        shared = (self.residual_blocks, self.residual_channels)
        parts = {
            "encoder": Encoder(self.channels, factor, *shared),
            "projection": keras.layers.Conv2D(self.embedding_dim, 1),
            "quantizer": VectorQuantizer(
                self.num_embeddings,
                self.embedding_dim,
                commitment_cost=self.commitment_cost,
                codebook_update=self.codebook_update,
                codebook_distance=self.codebook_distance,
                decay=self.decay,
                restart_threshold=self.restart_threshold,
                seed=self.seed + level,
            ),
            "decoder": Decoder(
                1 if level == 1 else self.embedding_dim,
                self.channels,
                factor,
                *shared,
            ),
            "usage": CodebookUsage(
                self.num_embeddings, "" if level == 1 else f"_{level}"
            ),
        }
        if level > 1:
            parts["preview"] = keras.layers.Conv2D(
                1, 1, dtype="float32", name="preview"
            )
        parts["quantizer"].build((None, self.embedding_dim))
        for name, part in parts.items():
            setattr(self, f"{name}_{level}", part)

    def part(self, name: str, level: int):
        """`encoder`, `projection`, `quantizer`, `decoder`, `usage`; `preview`.

        The last of them above the first level only.
        """
        return getattr(self, f"{name}_{level}")

    @property
    def latent_grids(self) -> list[tuple[int, int]]:
        """(h, w) of each level, bottom first."""
        factors = [self.downsampling * 2**i for i in range(self.levels)]
        return [tuple(side // f for side in self.image_size) for f in factors]

    def call(self, images, training=False):
        output, quantized, _ = self._forward(images)
        for result in quantized:
            self.add_loss(result.loss)
        if training:
            self._update_codebooks(quantized)
        return output

    def _forward(self, images):
        """Reconstruction `(B, H, W, 1)`; `Quantized` of each level; previews.

        Both lists are bottom first. A preview `(B, h, w, 1)` is the image as
        an upper level alone shows it, on the grid of the level below.
        """
        features = self._features(images)
        results, previews, decoded = [], [], None
        for level in range(self.levels, 0, -1):
            x = features[level - 1]
            if decoded is not None:
                x = tf.concat([x, decoded], axis=-1)
            latents = self.part("projection", level)(x)
            result = self.part("quantizer", level).nearest(latents)
            results.insert(0, result)
            decoded = self._decode_level(level, result.vectors, decoded)
            if level > 1:
                previews.insert(0, self.part("preview", level)(decoded))
        return tf.cast(decoded, tf.float32), results, previews

    def _update_codebooks(self, quantized):
        for level, result in enumerate(quantized, start=1):
            self.part("quantizer", level).update(result)

    def _features(self, images):
        features = []
        for level in range(1, self.levels + 1):
            images = self.part("encoder", level)(images)
            features.append(images)
        return features

    def _decode_level(self, level, quantized, above):
        x = tf.cast(quantized, self.compute_dtype)
        if above is not None:
            x = tf.concat([x, tf.cast(above, x.dtype)], axis=-1)
        return self.part("decoder", level)(x)

    @tf.function(reduce_retracing=True, autograph=False)
    def encode(self, images):
        """Indices of each level, bottom first: list of `(B, h, w)` int32.

        Args:
            images: `(B, H, W, 1)` in [0, 1].
        """
        _, quantized, _ = self._forward(tf.cast(images, self.compute_dtype))
        return [result.indices for result in quantized]

    @tf.function(reduce_retracing=True, autograph=False)
    def decode_indices(self, indices):
        """Images `(B, H, W, 1)` in [0, 1] from the indices of each level.

        Args:
            indices: list as returned by `encode`, bottom first.
        """
        decoded = None
        for level in range(self.levels, 0, -1):
            quantized = self.part("quantizer", level).lookup(indices[level - 1])
            decoded = self._decode_level(level, quantized, decoded)
        return tf.clip_by_value(tf.cast(decoded, tf.float32), 0.0, 1.0)

    @tf.function(reduce_retracing=True, autograph=False)
    def reconstruct(self, images):
        """Images after encoding and decoding, clipped to [0, 1]."""
        images = tf.cast(images, self.compute_dtype)
        return tf.clip_by_value(self._forward(images)[0], 0.0, 1.0)

    @property
    def metrics(self):
        usages = [self.part("usage", i + 1) for i in range(self.levels)]
        return [*self._trackers.values(), *usages]

    def _batch_loss(self, images, training):
        """Total loss of a batch; updates every metric."""
        output, quantized, previews = self._forward(
            tf.cast(images, self.compute_dtype)
        )
        error = tf.reduce_mean((images - output) ** 2)
        with tf.name_scope("ssim"):  # to be told apart in a profile
            ssim = tf.reduce_mean(utils.ssim(images, output))
        reconstruction = error / self.data_variance
        if self.ssim_weight:
            reconstruction += self.ssim_weight * (1 - ssim)
        commitment = tf.add_n([result.loss for result in quantized])
        loss = reconstruction + commitment
        values = [loss, reconstruction, commitment, ssim]
        if previews:
            upper = self._preview_error(images, previews) / self.data_variance
            loss += self.upper_weight * upper
            values = [loss, *values[1:], upper]
        for tracker, value in zip(self._trackers.values(), values, strict=True):
            tracker.update_state(value, sample_weight=tf.shape(images)[0])
        for level, result in enumerate(quantized, start=1):
            self.part("usage", level).update_state(result.indices)
        if training:
            self._update_codebooks(quantized)
        return loss

    def _preview_error(self, images, previews):
        """Mean squared error of the previews, summed over levels."""
        errors = []
        for preview in previews:
            factor = self.image_size[0] // preview.shape[1]
            small = tf.nn.avg_pool2d(images, factor, factor, "VALID")
            errors.append(tf.reduce_mean((small - preview) ** 2))
        return tf.add_n(errors)


# === Causal layers ===
#
# A causal layer computes the same thing in two ways. `call` takes the whole
# grid (training, likelihood). `step` takes one position in raster order and a
# small cache (sampling): `init_cache` makes it, `start_row` moves it on to the
# next row. Caches are plain tensors, so one compiled loop can carry them.


def dense_step(layer, x):
    """What a Dense `layer` makes of `x` `(B, C)`, in float32.

    Read from its variables, outside `__call__`: the precision policy that
    casts in training does not apply, sampling is float32 always.
    """
    y = tf.matmul(x, layer.kernel)
    return layer.activation(y if layer.bias is None else y + layer.bias)


@register
class CausalConv2D(Configurable, keras.layers.Layer):
    """Convolution over the positions before one in raster order.

    Only rows up to the current one have weights; in the last of them a mask
    hides the positions to the right (`mask_type="B"`) or these and the
    position itself (`"A"`). The product `kernel * mask` is taken in `call`,
    so masked weights get no gradient. With `mask_type="row"` nothing of the
    current row is hidden: that is the vertical stack of a gated network,
    which computes a row at a time (`step_row`).

    Args:
        filters: int. Output channels.
        kernel_size: odd int k, columns of the kernel.
        mask_type: "A" for the first layer of a network, else "B"; or "row".
        rows: int >= 1, rows of the kernel, the current one included; default
            (k + 1) / 2.

    Input shape: `(B, h, w, C)`. Output shape: `(B, h, w, filters)`.
    Reference: van den Oord et al., 2016, arXiv:1601.06759, sec. 3.4.
    """

    ARGUMENTS = ("filters", "kernel_size", "mask_type", "rows")

    def __init__(self, filters, kernel_size, mask_type, rows=None, **kwargs):
        require(
            kernel_size % 2 == 1 and 1 <= kernel_size <= 63,
            f"kernel_size: expected odd, 1..63, found {kernel_size}",
        )
        require(
            mask_type in ("A", "B", "row"),
            f"mask_type: expected A, B or row, found {mask_type!r}",
        )
        rows = rows or (kernel_size + 1) // 2
        within(1, 63, rows=rows)
        super().__init__(**kwargs)
        self.keep(locals())
        self.side = kernel_size // 2
        # Columns of the last row that are not hidden.
        taps = {"A": self.side, "B": self.side + 1, "row": kernel_size}
        self.taps = taps[mask_type]

    def build(self, input_shape):
        self.channels = input_shape[-1]
        self.mask = np.ones((self.rows, self.kernel_size, 1, 1), "float32")
        self.mask[-1, self.taps :] = 0
        self.kernel = self.add_weight(
            name="kernel",
            shape=(self.rows, self.kernel_size, self.channels, self.filters),
            initializer="glorot_uniform",
        )
        self.bias = self.add_weight(
            name="bias", shape=(self.filters,), initializer="zeros"
        )

    def call(self, x):
        kernel = tf.convert_to_tensor(self.kernel)
        kernel = kernel * tf.cast(self.mask, kernel.dtype)
        # `tf.pad` first: explicit padding inside the convolution leaves the
        # fast path on CPU (40 times slower in bfloat16).
        margins = [[0, 0], [self.rows - 1, 0], [self.side, self.side], [0, 0]]
        return tf.nn.conv2d(tf.pad(x, margins), kernel, 1, "VALID") + self.bias

    def init_rows(self, batch, width):
        """Cache of `step_row`: the last rows seen, zeros outside the grid."""
        shape = (batch, self.rows, width + 2 * self.side, self.channels)
        return tf.zeros(shape)

    def step_row(self, x, cache):
        """Output `(B, w, filters)` of a whole row `x` `(B, w, C)`."""
        row = tf.pad(x, [[0, 0], [self.side, self.side], [0, 0]])
        cache = tf.concat([cache[:, 1:], row[:, None]], axis=1)
        kernel = self.kernel * self.mask
        y = tf.nn.conv2d(cache, kernel, 1, "VALID")[:, 0] + self.bias
        return y, cache

    def init_cache(self, batch, width):
        """Cache of `step`: row so far, rows before, what these add to it.

        What the rows before add is computed once a row, for all of its
        columns, so that a position costs its own row only.
        """
        wide = (width + 2 * self.side, self.channels)
        return [
            tf.zeros((batch, *wide)),
            tf.zeros((batch, self.rows - 1, *wide)),
            tf.zeros((batch, width, self.filters)),
        ]

    def start_row(self, cache):
        row, before, added = cache
        if self.rows > 1:
            before = tf.concat([before[:, 1:], row[:, None]], axis=1)
            added = tf.nn.conv2d(before, self.kernel[:-1], 1, "VALID")[:, 0]
        return [tf.zeros_like(row), before, added]

    def write(self, x, cache, column):
        """Put `x` `(B, C)` at `column` of the row."""
        row, before, added = cache
        start = [0, self.side + column, 0]
        return [keras.ops.slice_update(row, start, x[:, None]), before, added]

    def read(self, cache, column):
        """Output `(B, filters)` at `column` of the row."""
        row, _, added = cache
        batch, taps = row.shape[0], self.taps
        window = tf.slice(row, [0, column, 0], (batch, taps, self.channels))
        window = tf.reshape(window, (batch, taps * self.channels))
        kernel = tf.reshape(
            self.kernel[-1, :taps], (taps * self.channels, self.filters)
        )
        y = tf.matmul(window, kernel) + self.bias
        if self.rows > 1:
            size = (batch, 1, self.filters)
            y += tf.slice(added, [0, column, 0], size)[:, 0]
        return y

    def step(self, x, cache, column):
        cache = self.write(x, cache, column)
        return self.read(cache, column), cache


@register
class CausalResidualBlock(Configurable, keras.layers.Layer):
    """ReLU, 1x1, ReLU, masked 3x3 plus context, ReLU, 1x1; added to its input.

    Args:
        channels: int. Channels of input and output; half of it inside.
        kernel_size: odd int. Of the masked convolution.
        dropout: float in [0, 1). After the masked convolution.
        use_context: bool. Whether a context map is added to the convolution.

    Input shape: `(B, h, w, channels)` and, with context, `(B, h, w, any)`.
    Output shape: `(B, h, w, channels)`.
    """

    ARGUMENTS = ("channels", "kernel_size", "dropout", "use_context")

    def __init__(
        self,
        channels,
        kernel_size=3,
        dropout=0.0,
        use_context=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.keep(locals())
        inner = max(channels // 2, 1)
        self.reduce = keras.layers.Dense(inner, activation="relu")
        self.conv = CausalConv2D(inner, kernel_size, "B")
        self.expand = keras.layers.Dense(channels)
        self.drop = keras.layers.Dropout(dropout)
        if use_context:
            self.context = keras.layers.Dense(inner)

    def build(self, input_shape):
        inner = (*input_shape[:-1], self.conv.filters)
        self.reduce.build(input_shape)
        self.conv.build(inner)
        self.expand.build(inner)

    def call(self, x, context=None, training=False):
        y = self.conv(self.reduce(tf.nn.relu(x)))
        if self.use_context:
            y = y + self.context(context)
        y = self.drop(tf.nn.relu(y), training=training)
        return x + self.expand(y)

    def init_cache(self, batch, width):
        return self.conv.init_cache(batch, width)

    def start_row(self, cache):
        return self.conv.start_row(cache)

    def step(self, x, cache, column, context=None):
        y = dense_step(self.reduce, tf.nn.relu(x))
        y, cache = self.conv.step(y, cache, column)
        if self.use_context:
            y = y + dense_step(self.context, context)
        return x + dense_step(self.expand, tf.nn.relu(y)), cache


def sine_features(position, count):
    """Sines and cosines of `position` in [0, 1] at `count` octaves.

    Returns shape `position.shape + (2 * count,)`.
    """
    angles = position[..., None] * (np.pi * 2.0 ** np.arange(count))
    return tf.concat([tf.sin(angles), tf.cos(angles)], axis=-1)


@register
class ContextMap(Configurable, keras.layers.Layer):
    """What every layer of a prior may know besides the indices before it.

    The place on the grid, and conditions: the height of the slice in the
    head, the class label, the indices of the levels above. None is of the
    grid to be predicted, so none can leak it.

    Slice position and label are each replaced by a learned null embedding
    where they are negative, and in training for a share `dropout` of the
    images: so one network also learns what holds without them.

    Args:
        grid: (h, w).
        channels: int. Channels of the map.
        num_embeddings: int. K of the levels above.
        position_features: bool. Include sine features of row and column.
        slice_condition: bool. Include the slice position.
        num_labels: int >= 0. Number of class labels; 0 leaves them out.
        upper_grids: (h, w) of each level above, nearest first; each half of
            the one before.
        dropout: float in [0, 1). Share of conditions dropped in training.

    Input shapes: `slice_position` `(B,)` float in [0, 1], 0 the first slice
        of a subject's stack; `label` `(B,)` int in [0, num_labels); both
        negative for null. `upper`: a `(B, h, w)` int tensor for each upper
        grid.
    Output shape: `(B, h, w, channels)`.
    """

    ARGUMENTS = (
        "grid",
        "channels",
        "num_embeddings",
        "position_features",
        "slice_condition",
        "num_labels",
        "upper_grids",
        "dropout",
    )
    OCTAVES = 5

    def __init__(
        self,
        grid,
        channels,
        num_embeddings=2,
        position_features=False,
        slice_condition=False,
        num_labels=0,
        upper_grids=(),
        dropout=0.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        grid = tuple(grid)
        upper_grids = tuple(tuple(upper) for upper in upper_grids)
        self.keep(locals())
        self.drop = keras.layers.Dropout(dropout)
        self.mix = keras.layers.Dense(channels, activation="relu")
        if position_features:
            self.place = keras.layers.Dense(channels)
        if slice_condition:
            self.slice = keras.layers.Dense(channels)
        if num_labels:
            self.label = keras.layers.Embedding(num_labels + 1, channels)
        if upper_grids:
            self.codes_above = keras.layers.Embedding(
                len(upper_grids) * num_embeddings, channels
            )
            self.above = ResidualStack(channels, 2, channels)
            self.split = keras.layers.Dense(4 * channels)

    def build(self, input_shape):
        self.mix.build((None, self.channels))
        if self.position_features:
            self.place.build((None, 4 * self.OCTAVES))
        if self.slice_condition:
            self.slice.build((None, 2 * self.OCTAVES))
            self.no_slice = self.add_weight(
                name="no_slice", shape=(self.channels,), initializer="zeros"
            )
        if self.num_labels:
            self.label.build((None,))
        if self.upper_grids:
            shape = (None, *self.upper_grids[0], self.channels)
            self.codes_above.build((None,))
            self.above.build(shape)
            self.split.build(shape)

    def load_own_variables(self, store):
        """Also from a run of format 1, whose prior had no null embedding."""
        if self.slice_condition and "0" not in store:
            store = {"0": np.zeros(self.channels, "float32")}
        super().load_own_variables(store)

    def call(self, slice_position, label, upper=(), training=False):
        height, width = self.grid
        shape = (tf.shape(label)[0], height, width, self.channels)
        context = tf.zeros(shape, self.compute_dtype)
        if self.position_features:
            context += self.place(self._grid_features())
        if self.slice_condition:
            known = self._known(slice_position, training)
            features = sine_features(slice_position, self.OCTAVES)
            vector = tf.where(
                known[:, None], self.slice(features), self.no_slice
            )
            context += vector[:, None, None]
        if self.num_labels:
            known = self._known(label, training)
            vector = self.label(tf.where(known, label + 1, 0))
            context += vector[:, None, None]
        if self.upper_grids:
            context += self._from_above(upper)
        return self.mix(tf.nn.relu(context))

    def _known(self, condition, training):
        """Which images of a batch keep a condition, `(B,)` bool."""
        ones = tf.ones(tf.shape(condition), self.compute_dtype)
        kept = self.drop(ones, training=training) > 0
        return kept & (condition >= 0)

    def _grid_features(self):
        height, width = self.grid
        rows = np.broadcast_to(np.arange(height)[:, None] / height, self.grid)
        columns = np.broadcast_to(np.arange(width) / width, self.grid)
        return tf.concat(
            [
                sine_features(rows.astype("float32"), self.OCTAVES),
                sine_features(columns.astype("float32"), self.OCTAVES),
            ],
            axis=-1,
        )

    def _from_above(self, upper):
        """A residual network over the indices of all levels above."""
        x = None
        for k in reversed(range(len(upper))):  # topmost first
            codes = self.codes_above(upper[k] + k * self.num_embeddings)
            if x is not None:
                codes += tf.repeat(tf.repeat(x, 2, axis=1), 2, axis=2)
            x = codes
        return tf.nn.depth_to_space(self.split(self.above(x)), 2)


# === Priors ===


class AutoregressivePrior(TrainableModel):
    """Distribution of a grid of indices as a product over raster order.

    `p(indices) = prod_t p(index_t | indices before t, context)`. A subclass
    gives `_build_layers`, `_hidden` (whole grid) and the caches of its causal
    layers with `_step` (one position); the rest is here: context, likelihood,
    training in bits per code, and the sampler.

    Args:
        num_embeddings: int K >= 2. Number of codes.
        latent_grid: (h, w).
        channels: int. Width of the network.
        blocks: int >= 0. Residual blocks.
        kernel_size: odd int. Columns the first layer sees.
        block_kernel_size: odd int. Columns each residual block sees.
        head_layers: int >= 0. 1x1 layers before the logits.
        dropout: float in [0, 1). In the residual blocks.
        position_features: bool. Let every layer know its place on the grid.
        slice_condition: bool. Condition on the slice position.
        labels: names of the class labels to condition on; none by default.
        upper_grids: (h, w) of each level above, nearest first: condition on
            the indices of these grids.
        condition_dropout: float in [0, 1). Share of training images whose
            slice position, and share whose label, is replaced by a learned
            null embedding; guidance needs it.
        codebook_sha256: str. Which codebook the indices belong to.

    Input shape: `indices` `(B, h, w)` int, and what is conditioned on:
        `upper`, a tuple of `(B, h, w)` int tensors, one for each upper grid;
        `label` `(B,)` int, a number in `labels`; `slice_position` `(B,)`
        float in [0, 1]. A negative label or position, or none, is null.
    Output shape: `(B, h, w, K)` float32 logits.
    Raises:
        ValueError: if an argument is out of range.

    Attributes:
        recompute: bool. Compute each block again for its gradients instead of
            keeping what is inside, which saves memory and costs time.
    """

    recompute = False
    ARGUMENTS = (
        "num_embeddings",
        "latent_grid",
        "channels",
        "blocks",
        "kernel_size",
        "block_kernel_size",
        "head_layers",
        "dropout",
        "position_features",
        "slice_condition",
        "labels",
        "upper_grids",
        "condition_dropout",
        "codebook_sha256",
    )
    CONTEXT_CHANNELS = 64

    def __init__(
        self,
        num_embeddings,
        latent_grid,
        channels=128,
        blocks=5,
        kernel_size=7,
        block_kernel_size=3,
        head_layers=2,
        dropout=0.0,
        position_features=False,
        slice_condition=False,
        labels=(),
        upper_grids=(),
        condition_dropout=0.1,
        codebook_sha256="",
        **kwargs,
    ):
        super().__init__(**kwargs)
        within(2, 2**20, num_embeddings=num_embeddings)
        for side in latent_grid:
            within(1, 1024, latent_grid=side)
        within(1, 4096, channels=channels)
        within(0, 256, blocks=blocks)
        within(0, 64, head_layers=head_layers)
        within(0, 0.99, dropout=dropout, condition_dropout=condition_dropout)
        sizes = {
            "kernel_size": kernel_size,
            "block_kernel_size": block_kernel_size,
        }
        for name, size in sizes.items():
            require(
                size % 2 == 1 and 1 <= size <= 63,
                f"{name}: expected odd, 1..63, found {size}",
            )
        require(
            not isinstance(labels, str) and len(set(labels)) == len(labels),
            f"labels: expected different names, found {labels!r}",
        )
        latent_grid, labels = tuple(latent_grid), tuple(labels)
        upper_grids = tuple(tuple(grid) for grid in upper_grids)
        check_upper_grids(latent_grid, upper_grids)
        self.keep(locals())
        self.use_context = bool(
            position_features or slice_condition or labels or upper_grids
        )
        self.embedding = keras.layers.Embedding(num_embeddings, channels)
        if self.use_context:
            self.context = ContextMap(
                latent_grid,
                self.CONTEXT_CHANNELS,
                num_embeddings,
                position_features,
                slice_condition,
                len(labels),
                upper_grids,
                condition_dropout,
            )
        self._build_layers()
        self.head = [
            keras.layers.Dense(self.channels, activation="relu")
            for _ in range(self.head_layers)
        ]
        self.logits = keras.layers.Dense(num_embeddings, dtype="float32")
        self._trackers = {
            name: keras.metrics.Mean(name=name)
            for name in ("loss", "bits_per_code")
        }
        self._sampler = tf.function(
            self._sample_chunk, jit_compile=True, autograph=False
        )
        self.sample_chunk, self.sample_threads = sampling_chunks()
        self(  # makes the weights
            tf.zeros((1, *self.latent_grid), tf.int32),
            upper=tuple(tf.zeros((1, *g), tf.int32) for g in upper_grids),
        )

    def call(
        self,
        indices,
        upper=None,
        label=None,
        slice_position=None,
        training=False,
    ):
        context, upper = None, tuple(upper or ())
        require(
            len(upper) == len(self.upper_grids),
            f"upper: expected {len(self.upper_grids)} grids, one for each "
            f"level above, found {len(upper)}",
        )
        if self.use_context:
            batch = tf.shape(indices)[:1]
            context = self.context(
                tf.fill(batch, -1.0)
                if slice_position is None
                else slice_position,
                tf.fill(batch, -1) if label is None else label,
                upper=upper,
                training=training,
            )
        codes = self.embedding(indices)
        return self._predict_codes(self._hidden(codes, context, training))

    def _run(self, layer, *inputs, training):
        """Outputs of a layer, in training recomputed if that is asked for."""
        call = functools.partial(layer, training=training)
        if self.recompute and training:
            require(not self.dropout, "recompute: would drop other features")
            call = tf.recompute_grad(call)
        return call(*(x for x in inputs if x is not None))

    def _predict_codes(self, hidden):
        """Head and logits on what `_hidden` returns."""
        x = tf.nn.relu(hidden)
        for layer in self.head:
            x = layer(x)
        return self.logits(x)

    def _predict_code(self, hidden):
        """The same at one position, on what `_step` returns."""
        x = tf.nn.relu(hidden)
        for layer in (*self.head, self.logits):
            x = dense_step(layer, x)
        return x

    def distribution(self, indices, **conditions):
        """`tfd.Categorical` of every position given the indices before it."""
        return tfd().Categorical(logits=self(indices, **conditions))

    @tf.function(reduce_retracing=True, autograph=False)
    def log_prob(self, indices, upper=None, label=None, slice_position=None):
        """Log-probability in nats of each position, `(B, h, w)` float32.

        The sum over positions is the log-probability of the grid.
        """
        return self.distribution(
            indices, upper=upper, label=label, slice_position=slice_position
        ).log_prob(indices)

    @property
    def metrics(self):
        return list(self._trackers.values())

    def _batch_loss(self, batch, training):
        """Mean negative log-likelihood, nats per code; updates the metrics.

        Args:
            batch: dict with `indices` and what the prior is conditioned on.
        """
        logits = self(**batch, training=training)
        nats = tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels=batch["indices"], logits=logits
        )
        loss = tf.reduce_mean(nats)
        for name, value in (
            ("loss", loss),
            ("bits_per_code", loss / np.log(2)),
        ):
            self._trackers[name].update_state(
                value, sample_weight=tf.shape(logits)[0]
            )
        return loss

    def sample(
        self,
        n,
        seed=0,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        guidance=1.0,
        upper=None,
        label=None,
        slice_position=None,
        first=0,
        known=None,
        return_log_prob=False,
        progress=None,
    ):
        """Draw `n` grids of indices.

        Image k is a function of (seed, k) and its own conditions alone, on
        one machine: the same in any request, chunk or order.

        Args:
            n: int >= 1.
            seed: int in [0, 2**31).
            temperature: float > 0. Below 1 favours likely codes.
            top_k: int. Draw from the k likeliest codes only; 0 from all.
            top_p: float in (0, 1]. Draw from the likeliest codes that
                together have this probability.
            guidance: float >= 0. Classifier-free guidance: logits are moved
                from those without the label (or, of a prior without labels,
                without the slice position) towards those with it, this many
                times the way. Ho & Salimans, 2022, arXiv:2207.12598.
            upper: `(n, h, w)` int arrays, one for each upper grid.
            label: name of a label, or a sequence of `n` names, None for null;
                default null.
            slice_position: `(n,)` float in [0, 1], or one for all, NaN for
                null; default null.
            first: int >= 0. Number of the first image.
            known: `(n, h, w)` int array of indices that are not drawn, -1
                where unknown. What comes after them is drawn given them, what
                comes before is not: weigh by `predict.known_log_prob`.
            return_log_prob: bool. Also return the log-probability in nats of
                each grid under the model (temperature 1, all codes, no
                guidance), accumulated while drawing.
            progress: callable that wraps the iterable of chunks, such as
                `tqdm.tqdm`.

        Returns: `(n, h, w)` int32 array, and `(n,)` float32 if asked for.
        Raises:
            ValueError: if a label or an upper grid does not fit this prior,
                or it has nothing to guide by.
        """
        within(0, 1e6, guidance=guidance)
        require(
            guidance == 1 or self.labels or self.slice_condition,
            "guidance: this prior has neither labels nor slice positions",
        )
        conditions = self._conditions(n, upper, label, slice_position)
        known = self._known_indices(n, known)
        numbers = np.arange(first, first + n)
        chunks = np.unique(numbers // self.sample_chunk)
        grids = np.zeros((n, *self.latent_grid), "int32")
        log_probs = np.zeros(n, "float32")

        def draw(chunk):
            rows = np.flatnonzero(numbers // self.sample_chunk == chunk)
            slots = numbers[rows] % self.sample_chunk
            indices, log_prob = self.draw_chunk(
                seed,
                int(chunk),
                tf.nest.map_structure(
                    lambda values: self._in_slots(values, rows, slots),
                    conditions,
                ),
                self._in_slots(known, rows, slots, -1),
                temperature,
                guidance,
                top_p,
                top_k,
            )
            grids[rows] = indices.numpy()[slots]
            log_probs[rows] = log_prob.numpy()[slots]

        with concurrent.futures.ThreadPoolExecutor(self.sample_threads) as pool:
            drawn = pool.map(draw, chunks)
            for _ in progress(chunks) if progress else chunks:
                next(drawn)
        return (grids, log_probs) if return_log_prob else grids

    def draw_chunk(
        self,
        seed,
        chunk,
        conditions,
        known=None,
        temperature=1.0,
        guidance=1.0,
        top_p=1.0,
        top_k=0,
    ):
        """Draw the `sample_chunk` images of one chunk, B; also in a graph.

        All that `sample` draws comes from here.

        Args:
            seed, chunk: int, or int32 scalars: image i of the chunk is number
                `chunk * sample_chunk + i`.
            conditions: dict of `label` `(B,)` int32 and `slice_position`
                `(B,)` float32, negative for null, and of `upper`, a tuple of
                `(B, h, w)` int32 for each upper grid.
            known: `(B, h, w)` int32, -1 where unknown; default all unknown.
            temperature, guidance, top_p, top_k: see `sample`; numbers, of
                which the first may be a float32 scalar.

        Returns: indices `(B, h, w)` int32; log-probability in nats `(B,)`.
        """
        if known is None:
            known = tf.fill((self.sample_chunk, *self.latent_grid), -1)
        return self._sampler(
            self._uniforms(seed, chunk),
            self._chunk_context(conditions, guidance != 1),
            tf.convert_to_tensor(known),
            tf.convert_to_tensor(temperature, tf.float32),
            tf.convert_to_tensor(guidance, tf.float32),
            top_p=float(top_p),
            top_k=int(top_k),
        )

    def _conditions(self, n, upper, label, slice_position):
        """What `n` images are conditioned on, as checked arrays."""
        upper = tuple(np.asarray(grid, "int32") for grid in upper or ())
        expected = [(n, *grid) for grid in self.upper_grids]
        found = [grid.shape for grid in upper]
        require(
            found == expected,
            f"upper: expected grids of shape {expected}, found {found}",
        )
        for grid in upper:
            for index in (grid.min(), grid.max()):
                within(0, self.num_embeddings - 1, upper=index)
        position = np.full(n, -1.0, "float32")
        if slice_position is not None:
            given = np.asarray(slice_position, "float32")
            require(
                given.shape in ((), (n,)),
                f"slice_position: expected shape ({n},), found {given.shape}",
            )
            for number in given[~np.isnan(given)]:
                within(0, 1, slice_position=number)
            position[:] = np.where(np.isnan(given), -1, given)
        return {
            "upper": upper,
            "label": self._label_numbers(n, label),
            "slice_position": position,
        }

    def _label_numbers(self, n, label):
        """Numbers `(n,)` of label names; -1 for None."""
        if label is None:
            return np.full(n, -1, "int32")
        names = [label] * n if isinstance(label, str) else list(label)
        known = ", ".join(self.labels) or "none, as it was trained without"
        for name in names:
            require(
                name is None or name in self.labels,
                f"label: expected one of {known}; found {name!r}",
            )
        require(len(names) == n, f"label: expected {n}, found {len(names)}")
        numbers = {None: -1} | {name: k for k, name in enumerate(self.labels)}
        return np.array([numbers[name] for name in names], "int32")

    def _known_indices(self, n, known):
        """Checked indices `(n, h, w)` that are not drawn; -1 for the rest."""
        if known is None:
            return np.full((n, *self.latent_grid), -1, "int32")
        known = np.asarray(known, "int32")
        expected = (n, *self.latent_grid)
        require(
            known.shape == expected,
            f"known: expected shape {expected}, found {known.shape}",
        )
        for index in (known.min(), known.max()):
            within(-1, self.num_embeddings - 1, known=index)
        return known

    def _in_slots(self, values, rows, slots, empty=0):
        """Values of the images `rows` at their `slots` in a chunk."""
        shape = (self.sample_chunk, *values.shape[1:])
        filled = np.full(shape, empty, values.dtype)
        filled[slots] = values[rows]
        return filled

    def _chunk_context(self, conditions, guided):
        """Context of a chunk; or None.

        Guided, a second half follows: the context without the condition.
        """
        if not self.use_context:
            return None
        filled = tf.nest.map_structure(tf.convert_to_tensor, conditions)
        maps = [self._context_map(**filled)]
        if guided:
            guide = "label" if self.labels else "slice_position"
            null = -tf.ones_like(filled[guide])
            maps.append(self._context_map(**{**filled, guide: null}))
        return tf.concat(maps, axis=0)

    @tf.function(reduce_retracing=True, jit_compile=True, autograph=False)
    def _context_map(self, upper, label, slice_position):
        context = self.context(slice_position, label, upper=upper)
        return tf.cast(context, tf.float32)

    def _uniforms(self, seed, chunk):
        """Uniform numbers in [0, 1) of each image and position of a chunk.

        Each level draws numbers of its own.
        """
        first = chunk * self.sample_chunk
        shape = (len(self.upper_grids) + 1, *self.latent_grid)
        return tf.stack(
            [
                tf.random.stateless_uniform(
                    shape, [seed, first + i], alg="philox"
                )[-1]
                for i in range(self.sample_chunk)
            ]
        )

    def _sample_chunk(
        self, uniforms, context, known, temperature, guidance, top_p, top_k
    ):
        """The compiled loop: rows outside, columns inside."""
        batch = uniforms.shape[0]
        height, width = self.latent_grid
        rows = batch if context is None else context.shape[0]
        halves = rows // batch  # 2 with guidance: with the condition, without

        def draw_row(row, grid, log_prob, caches):
            caches = self._start_row(caches, row)

            def draw(column, grid, log_prob, caches):
                at = None
                if context is not None:
                    at = tf.slice(
                        context,
                        [0, row, column, 0],
                        [rows, 1, 1, context.shape[-1]],
                    )[:, 0, 0]
                hidden, caches = self._step(caches, column, at)
                logits, *null = tf.split(self._predict_code(hidden), halves)
                goal = logits
                if null:
                    goal = null[0] + guidance * (logits - null[0])
                uniform = tf.slice(uniforms, [0, row, column], [batch, 1, 1])
                index = draw_index(
                    goal, uniform[:, 0], temperature, top_p, top_k
                )
                given = tf.slice(known, [0, row, column], [batch, 1, 1])
                given = tf.reshape(given, (batch,))
                index = tf.where(given >= 0, given, index)
                chosen = tf.gather(
                    tf.nn.log_softmax(logits), index, batch_dims=1
                )
                code = tf.gather(self.embedding.embeddings, index)
                caches = self._write(tf.tile(code, [halves, 1]), caches, column)
                grid = keras.ops.slice_update(
                    grid, [0, row, column], index[:, None, None]
                )
                return column + 1, grid, log_prob + chosen, caches

            _, grid, log_prob, caches = tf.while_loop(
                lambda column, *_: column < width,
                draw,
                (0, grid, log_prob, caches),
            )
            return row + 1, grid, log_prob, caches

        start = (
            0,
            tf.zeros((batch, height, width), tf.int32),
            tf.zeros((batch,)),
            self._init_caches(rows, width),
        )
        _, grid, log_prob, _ = tf.while_loop(
            lambda row, *_: row < height, draw_row, start
        )
        return grid, log_prob


SAMPLE_RUNS = 64  # side by side in an exported model, if there are cores


def sampling_chunks() -> tuple[int, int]:
    """Images that one run of the compiled loop draws, and runs at a time.

    Image k is always number k % images of its run, and the runs have one
    size on a machine, so that it does not depend on how many are asked for:
    matrix products round differently at other sizes. A run is a chain of
    small steps that keeps one core busy; a GPU is better off with one large
    run.
    """
    if tf.config.list_physical_devices("GPU"):
        return 32, 1
    return 4, os.cpu_count() or 1


def check_upper_grids(grid, upper_grids):
    """Raise a `ValueError` unless each grid is half the one before."""
    for upper in upper_grids:
        require(
            grid == (2 * upper[0], 2 * upper[1]),
            f"upper_grids: expected each half of the one before, found "
            f"{upper} after {grid}",
        )
        grid = upper


def tfd():
    """`tensorflow_probability.distributions`, imported when first needed."""
    import tensorflow_probability as tfp

    return tfp.distributions


def keep_likeliest(probabilities, top_k, top_p):
    """`probabilities` `(B, K)` with all but the likeliest set to zero.

    Args:
        top_k: Python int. Keep the k likeliest; 0 keeps all.
        top_p: Python float in (0, 1]. Keep the likeliest that together reach
            this probability, at least one.
    """
    ranked = tf.sort(probabilities, axis=-1, direction="DESCENDING")
    before = tf.cumsum(ranked, axis=-1, exclusive=True)
    kept = before < top_p
    if top_k:
        kept &= tf.range(ranked.shape[-1]) < top_k
    least = tf.reduce_min(tf.where(kept, ranked, 1.0), -1, keepdims=True)
    return tf.where(probabilities < least, 0.0, probabilities)


def draw_index(logits, uniform, temperature, top_p=1.0, top_k=0):
    """Index drawn from `softmax(logits / temperature)` by one uniform number.

    By inversion of the cumulative distribution, so that a position needs one
    random number, not K.

    Args:
        logits: `(B, K)` float32.
        uniform: `(B, 1)` float32 in [0, 1).
        temperature: scalar > 0.
        top_p, top_k: see `keep_likeliest`.

    Returns: `(B,)` int32 in [0, K), of positive probability.
    """
    probabilities = tf.nn.softmax(logits / temperature)
    if top_k or top_p < 1:  # sorting is most of the cost of a draw
        probabilities = keep_likeliest(probabilities, top_k, top_p)
    cumulative = tf.cumsum(probabilities, axis=-1)
    # Strictly below the total, whatever the rounding: else an index past the
    # last code of positive probability could be drawn.
    goal = uniform * cumulative[:, -1:] * (1 - 1e-6)
    # Compiled, the sum is rounded in blocks and moves a little between them
    # at codes of no probability: so ask for a positive one, do not count.
    codes = tf.range(logits.shape[-1])
    past = (cumulative > goal) & (probabilities > 0)
    return tf.reduce_min(tf.where(past, codes, codes[-1]), axis=-1)


@register
class PixelCNN(AutoregressivePrior):
    """Masked convolutions: one A layer, residual blocks, 1x1 layers.

    Its receptive field has a blind spot: positions above and to the right
    beyond a diagonal are never seen. Arguments, shapes and methods are those
    of `AutoregressivePrior`.

    Reference: van den Oord et al., 2016, arXiv:1601.06759; blind spot:
    van den Oord et al., 2016, arXiv:1606.05328, sec. 2.2.

    Example:
    >>> prior = PixelCNN(16, (4, 4), channels=8, blocks=1)
    >>> prior.sample(2, seed=0).shape
    (2, 4, 4)
    """

    def _build_layers(self):
        self.stem = CausalConv2D(self.channels, self.kernel_size, "A")
        self.residual = [
            CausalResidualBlock(
                self.channels,
                self.block_kernel_size,
                self.dropout,
                self.use_context,
            )
            for _ in range(self.blocks)
        ]

    def _hidden(self, x, context, training):
        x = self.stem(x)
        for block in self.residual:
            x = self._run(block, x, context, training=training)
        return x

    def _init_caches(self, batch, width):
        return [
            layer.init_cache(batch, width)
            for layer in (self.stem, *self.residual)
        ]

    def _start_row(self, caches, row):
        layers = (self.stem, *self.residual)
        return [
            layer.start_row(cache)
            for layer, cache in zip(layers, caches, strict=True)
        ]

    def _step(self, caches, column, context):
        stem, *rest = caches
        x = self.stem.read(stem, column)
        moved = []
        for block, cache in zip(self.residual, rest, strict=True):
            x, cache = block.step(x, cache, column, context)
            moved.append(cache)
        return x, [stem, *moved]

    def _write(self, code, caches, column):
        stem, *rest = caches
        return [self.stem.write(code, stem, column), *rest]


def gate(x):
    """tanh of the first half of the channels times sigmoid of the second."""
    signal, weight = tf.split(x, 2, axis=-1)
    return tf.tanh(signal) * tf.sigmoid(weight)


@register
class GatedBlock(Configurable, keras.layers.Layer):
    """Vertical and horizontal masked convolutions with gates.

    The vertical stack sees all of the rows up to its own. The horizontal one
    sees its own row to the left, and the vertical one of the row above: so
    together all positions before, without a blind spot.

    Both stacks are added to their inputs, in deep networks a help to the
    vertical one too, but for the first block.

    Args:
        channels: int. Channels of both stacks.
        kernel_size: odd int.
        mask_type: "A" for the first block, which adds no input to its output,
            else "B".
        dropout: float in [0, 1). After the gate of the horizontal stack.
        use_context: bool. Whether a context map enters the horizontal gate.

    Input shape: vertical and horizontal `(B, h, w, channels)`; with context
        `(B, h, w, any)`. Output shape: both stacks again.
    Reference: van den Oord et al., 2016, arXiv:1606.05328, fig. 2.
    """

    ARGUMENTS = (
        "channels",
        "kernel_size",
        "mask_type",
        "dropout",
        "use_context",
    )

    def __init__(
        self,
        channels,
        kernel_size,
        mask_type,
        dropout=0.0,
        use_context=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.keep(locals())
        self.is_first = mask_type == "A"
        self.vertical = CausalConv2D(2 * channels, kernel_size, "row")
        self.horizontal = CausalConv2D(
            2 * channels, kernel_size, mask_type, rows=1
        )
        self.link = keras.layers.Dense(2 * channels)
        self.expand = keras.layers.Dense(channels)
        self.drop = keras.layers.Dropout(dropout)
        if use_context:
            self.context = keras.layers.Dense(2 * channels, use_bias=False)

    def call(self, vertical, horizontal, context=None, training=False):
        rows = self.vertical(vertical)
        above = tf.pad(rows[:, :-1], [[0, 0], [1, 0], [0, 0], [0, 0]])
        x = self.horizontal(horizontal) + self.link(above)
        if self.use_context:
            x = x + self.context(context)
        y = self.expand(self.drop(gate(x), training=training))
        if self.is_first:
            return gate(rows), y
        return vertical + gate(rows), horizontal + y

    def init_cache(self, batch, width):
        """Rows of the vertical stack, the row so far, the link from above."""
        return [
            self.vertical.init_rows(batch, width),
            self.horizontal.init_cache(batch, width),
            tf.zeros((batch, width, 2 * self.channels)),
        ]

    def start_row(self, vertical, cache, row):
        """Take in the row above, finished by now; zeros before the first.

        Args:
            vertical: `(B, w, channels)`, input of the vertical stack there.
            row: number of the row that starts.

        Returns: output of the vertical stack there, the cache.
        """
        rows, seen = self.vertical.step_row(vertical, cache[0])
        rows *= tf.cast(row > 0, rows.dtype)
        moved = [
            seen,
            self.horizontal.start_row(cache[1]),
            dense_step(self.link, rows),
        ]
        return gate(rows) if self.is_first else vertical + gate(rows), moved

    def step(self, x, cache, column, context=None):
        """Output of the horizontal stack; the first block needs no `x`."""
        seen, own, above = cache
        if not self.is_first:
            own = self.horizontal.write(x, own, column)
        batch, _, channels = above.shape
        link = tf.slice(above, [0, column, 0], [batch, 1, channels])[:, 0]
        y = self.horizontal.read(own, column) + link
        if self.use_context:
            y = y + dense_step(self.context, context)
        y = dense_step(self.expand, gate(y))
        return y if self.is_first else x + y, [seen, own, above]

    def write(self, code, cache, column):
        """Take in the embedded code `(B, channels)` drawn at `column`."""
        seen, own, above = cache
        if self.is_first:
            own = self.horizontal.write(code, own, column)
        return [seen, own, above]


@register
class CausalAttention(Configurable, keras.layers.Layer):
    """Attention of every position to all codes before it; added to its input.

    However far away they are. A code enters with its embedding and with the
    features at its position; the code of the position itself and those after
    it are hidden. Before all codes stands an empty one, of zeros, so that the
    first position too has one to attend to.

    Args:
        channels: int, a multiple of `heads`.
        heads: int >= 1.
        dropout: float in [0, 1). On what was attended to.

    Input shape: features and embedded codes, both `(B, h, w, channels)`.
    Output shape: `(B, h, w, channels)`.
    Reference: Chen et al., 2018, arXiv:1712.09763, sec. 3.
    """

    ARGUMENTS = ("channels", "heads", "dropout")
    QUERIES = 256  # at a time: bounds the memory, and skips half the masked

    def __init__(self, channels, heads=8, dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        require(
            heads >= 1 and channels % heads == 0,
            f"channels: expected a multiple of {heads} heads, found {channels}",
        )
        self.keep(locals())
        self.scale = (channels // heads) ** -0.5
        self.query = keras.layers.Dense(channels)
        self.key = keras.layers.Dense(channels)
        self.value = keras.layers.Dense(channels)
        # Nothing is added at first: attention joins once it has learned.
        self.expand = keras.layers.Dense(channels, kernel_initializer="zeros")
        self.drop = keras.layers.Dropout(dropout)

    def build(self, features_shape, codes_shape=None):
        shape = (None, self.channels)
        self.query.build(shape)
        self.key.build((None, 2 * self.channels))
        self.value.build((None, 2 * self.channels))
        self.expand.build(shape)

    def call(self, features, codes, training=False):
        shape = tf.shape(features)
        count = features.shape[1] * features.shape[2]
        source = tf.concat([features, codes], axis=-1)
        query = self._heads(self.query(features), count)
        key = self._heads(self.key(source), count)
        value = self._heads(self.value(source), count)
        empty = [[0, 0], [0, 0], [1, 0], [0, 0]]
        key = tf.pad(key, empty)[:, :, :-1]
        value = tf.pad(value, empty)[:, :, :-1]
        parts = [
            self._attend(
                query, key, value, first, min(first + self.QUERIES, count)
            )
            for first in range(0, count, self.QUERIES)
        ]
        y = tf.transpose(tf.concat(parts, axis=2), [0, 2, 1, 3])
        y = self.expand(tf.reshape(y, shape))
        return features + self.drop(y, training=training)

    def _heads(self, x, count):
        """`(B, h, w, channels)` as `(B, heads, h * w, channels / heads)`."""
        x = tf.reshape(x, (-1, count, self.heads, self.channels // self.heads))
        return tf.transpose(x, [0, 2, 1, 3])

    def _attend(self, query, key, value, first, last):
        """What the positions `first` to `last` attend to."""
        scores = tf.matmul(
            query[:, :, first:last], key[:, :, :last], transpose_b=True
        )
        scores = tf.cast(scores, tf.float32) * self.scale
        hidden = np.arange(last) > np.arange(first, last)[:, None]
        weights = tf.nn.softmax(tf.where(hidden, -1e9, scores))
        return tf.matmul(tf.cast(weights, value.dtype), value[:, :, :last])

    def init_cache(self, batch, count):
        """Keys, values, features of the current position, its number."""
        size = self.channels // self.heads
        return [
            tf.zeros((batch, self.heads, count, size)),
            tf.zeros((batch, self.heads, count, size)),
            tf.zeros((batch, self.channels)),
            0,
        ]

    def start_row(self, vertical, cache, row):
        return vertical, cache

    def step(self, x, cache, column, context=None):
        keys, values, _, position = cache
        batch, heads, count, size = keys.shape
        query = tf.reshape(dense_step(self.query, x), (batch, heads, 1, size))
        scores = tf.matmul(query, keys, transpose_b=True) * self.scale
        hidden = tf.range(count) > position
        weights = tf.nn.softmax(tf.where(hidden, -1e9, scores))
        y = tf.reshape(tf.matmul(weights, values), (batch, self.channels))
        return x + dense_step(self.expand, y), [keys, values, x, position]

    def write(self, code, cache, column):
        """Take in the embedded code `(B, channels)` drawn at the position."""
        keys, values, features, position = cache
        shape = (keys.shape[0], self.heads, 1, -1)
        source = tf.concat([features, code], axis=-1)
        start = [0, 0, position + 1, 0]
        key = tf.reshape(dense_step(self.key, source), shape)
        value = tf.reshape(dense_step(self.value, source), shape)
        return [
            keras.ops.slice_update(keys, start, key),
            keras.ops.slice_update(values, start, value),
            features,
            position + 1,
        ]


@register
class GatedPixelCNN(AutoregressivePrior):
    """Gated blocks of a vertical and a horizontal stack: no blind spot.

    Arguments, shapes and methods are those of `AutoregressivePrior`.

    Reference: van den Oord et al., 2016, arXiv:1606.05328.
    """

    attention = False
    ATTENTION_EVERY = 4  # blocks

    def _build_layers(self):
        options = {"dropout": self.dropout, "use_context": self.use_context}
        self.stem = GatedBlock(
            self.channels, self.kernel_size, "A", use_context=self.use_context
        )
        self.residual = [
            GatedBlock(self.channels, self.block_kernel_size, "B", **options)
            for _ in range(self.blocks)
        ]
        count = -(-self.blocks // self.ATTENTION_EVERY) * self.attention
        self.attentions = [
            CausalAttention(self.channels, self.heads, self.dropout)
            for _ in range(count)
        ]

    def _layers_in_order(self):
        """The first block, the others; with attention after every few."""
        order, every = [self.stem], self.ATTENTION_EVERY
        for k in range(0, self.blocks, every):
            order += self.residual[k : k + every]
            order += self.attentions[k // every : k // every + 1]
        return order

    def _hidden(self, codes, context, training):
        vertical = horizontal = codes
        for layer in self._layers_in_order():
            if isinstance(layer, CausalAttention):
                horizontal = self._run(
                    layer, horizontal, codes, training=training
                )
            else:
                vertical, horizontal = self._run(
                    layer, vertical, horizontal, context, training=training
                )
        return horizontal

    def _init_caches(self, batch, width):
        """The embedded row so far, then the caches of the layers."""
        count = self.latent_grid[0] * width
        caches = [tf.zeros((batch, width, self.channels))]
        for layer in self._layers_in_order():
            attends = isinstance(layer, CausalAttention)
            caches.append(layer.init_cache(batch, count if attends else width))
        return caches

    def _start_row(self, caches, row):
        vertical, *caches = caches
        moved = [tf.zeros_like(vertical)]
        for layer, cache in zip(self._layers_in_order(), caches, strict=True):
            vertical, cache = layer.start_row(vertical, cache, row)
            moved.append(cache)
        return moved

    def _step(self, caches, column, context):
        row, *caches = caches
        x, moved = None, [row]
        for layer, cache in zip(self._layers_in_order(), caches, strict=True):
            x, cache = layer.step(x, cache, column, context)
            moved.append(cache)
        return x, moved

    def _write(self, code, caches, column):
        row, *caches = caches
        row = keras.ops.slice_update(row, [0, column, 0], code[:, None])
        layers = self._layers_in_order()
        return [
            row,
            *(
                layer.write(code, cache, column)
                for layer, cache in zip(layers, caches, strict=True)
            ),
        ]


@register
class PixelSNAIL(GatedPixelCNN):
    """Gated blocks with causal attention after every fourth and the last.

    Convolutions see what is near in detail, attention all there is. The
    blocks are those of `GatedPixelCNN`, so that without attention, too, there
    is no blind spot. Further arguments, shapes and methods are those of
    `AutoregressivePrior`.

    Args:
        attention: bool. Without it a prior for grids too large to attend to.
        heads: int >= 1. `channels` is a multiple of it.

    Reference: Chen et al., 2018, arXiv:1712.09763.
    """

    ARGUMENTS = (*GatedPixelCNN.ARGUMENTS, "attention", "heads")

    def __init__(self, *args, attention=True, heads=8, **kwargs):
        within(1, 4096, heads=heads)
        self.attention = attention
        self.heads = heads
        super().__init__(*args, **kwargs)


PRIORS = {
    "pixelcnn": PixelCNN,
    "gated": GatedPixelCNN,
    "pixelsnail": PixelSNAIL,
}


# === The chain: images -> indices -> images ===


def encode_dataset(vqvae, images) -> list[np.ndarray]:
    """Indices of every image of a dataset.

    Args:
        vqvae: `VQVAE`.
        images: iterable of `(B, H, W, 1)` batches.

    Returns: an `(N, h, w)` int32 array for each level, bottom first.
    """
    batches = [vqvae.encode(batch) for batch in images]
    return [np.concatenate(level) for level in zip(*batches, strict=True)]


def slice_positions(n: int, first: int = 0, columns: int = 8) -> np.ndarray:
    """Slice positions `(n,)` for images `first` to `first + n`.

    Spread evenly over the stack and rising along each row of a grid of
    `columns`, by the golden ratio within a column. Number k has the same
    position in every request.
    """
    numbers = np.arange(first, first + n, dtype="float64")
    return position_of(numbers, columns).astype("float32")


def position_of(number, columns=8):
    """Slice position of image `number`, a float64 array or tensor."""
    shift = (0.5 + number // columns * 0.6180339887498949) % 1
    return (number % columns + shift) / columns


def alternate_labels(labels, n: int, first: int = 0, columns: int = 8):
    """A label name for images `first` to `first + n`; None without labels.

    They alternate between the rows of a grid of `columns`.
    """
    if not labels:
        return None
    numbers = np.arange(first, first + n)
    return [labels[k] for k in label_of(numbers, len(labels), columns)]


def label_of(number, count, columns=8):
    """Which of `count` labels image `number` has, an int array or tensor."""
    return number // columns % count


def generate(
    vqvae,
    priors,
    n,
    seed=0,
    first=0,
    label=None,
    slice_position=None,
    known=None,
    return_log_prob=False,
    **sampling,
):
    """Draw new images: indices from the priors, decoded by the VQ-VAE.

    From the top level down: each prior is told the indices drawn above it.

    Args:
        vqvae: `VQVAE`.
        priors: its priors, bottom first.
        n: int >= 1.
        seed, first: image k of a request is a function of the seed and
            `first + k`.
        label: see `AutoregressivePrior.sample`; default `alternate_labels`.
        slice_position: `(n,)` in [0, 1]; default `slice_positions`.
        known: list of `(n, h, w)` arrays, the indices of each level that are
            not drawn, bottom first; see `AutoregressivePrior.sample`.
        return_log_prob: bool. Also return the log-probability in nats of the
            indices of each image, summed over levels.
        sampling: further arguments of `AutoregressivePrior.sample`.

    Returns: `(n, H, W)` float32 images in [0, 1]; the indices `(n, h, w)` of
        each level, bottom first; and `(n,)` float32 if asked for.
    """
    if slice_position is None:
        slice_position = slice_positions(n, first)
    if label is None:
        label = alternate_labels(priors[0].labels, n, first)
    indices, log_prob = [], np.zeros(n, "float32")
    known = known or [None] * len(priors)
    for prior, given in zip(reversed(priors), reversed(known), strict=True):
        grids, of_level = prior.sample(
            n,
            seed,
            first=first,
            upper=indices,
            label=label,
            slice_position=slice_position,
            known=given,
            return_log_prob=True,
            **sampling,
        )
        indices.insert(0, grids)
        log_prob += of_level
    # Whole chunks, as drawn: a batch of another size rounds differently.
    step = priors[0].sample_chunk
    count = -(-n // step) * step
    filled = [np.resize(grid, (count, *grid.shape[1:])) for grid in indices]
    images = [
        vqvae.decode_indices([grid[k : k + step] for grid in filled])
        for k in range(0, count, step)
    ]
    images = np.concatenate(images)[:n, ..., 0]
    return (images, indices, log_prob) if return_log_prob else (images, indices)


# === Export ===


def export_archive(vqvae, priors=()):
    """The models as functions of plain tensors, to be written as SavedModel.

    >>> export_archive(vqvae, priors).write_out("exported", verbose=False)
    >>> loaded = tf.saved_model.load("exported")  # needs none of our code
    >>> loaded.signatures["generate"](n=4, seed=0, temperature=1.0, label="")

    Signatures, which take and return tensors by name:
        encode: `images` `(N, H, W, 1)` float32 in [0, 1] -> `indices_1`, ...
            of each level, bottom first, `(N, h, w)` int32.
        decode: the same the other way.
        generate: `n` >= 1, `seed` >= 0, int32, `temperature` > 0, float32,
            `label`, string, "" for all by turns -> `images` `(n, H, W)`, and
            their indices; only with priors. Those of the function `generate`.

    Args:
        vqvae: `VQVAE`.
        priors: its priors, bottom first.

    Returns: `keras.export.ExportArchive`.
    """
    names = [f"indices_{level}" for level in range(1, vqvae.levels + 1)]

    def encode(images):
        return dict(zip(names, vqvae.encode(images), strict=True))

    def decode(*indices):
        return {"images": vqvae.decode_indices(list(indices))}

    archive = keras.export.ExportArchive()
    images = tf.TensorSpec((None, *vqvae.image_size, 1), name="images")
    archive.add_endpoint("encode", encode, [images])
    grids = [
        tf.TensorSpec((None, *grid), tf.int32, name=name)
        for name, grid in zip(names, vqvae.latent_grids, strict=True)
    ]
    archive.add_endpoint("decode", decode, grids)
    if priors:
        function = functools.partial(_generate_in_graph, vqvae, priors)
        scalars = [
            tf.TensorSpec((), dtype, name=name)
            for name, dtype in (
                ("n", tf.int32),
                ("seed", tf.int32),
                ("temperature", tf.float32),
                ("label", tf.string),
            )
        ]
        archive.add_endpoint("generate", function, scalars)
    return archive


def _generate_in_graph(vqvae, priors, n, seed, temperature, label):
    """What `generate` does, the loop over chunks in the graph."""
    size, labels = priors[0].sample_chunk, priors[0].labels
    with tf.control_dependencies(
        [
            tf.debugging.assert_positive(n, "n: expected >= 1"),
            tf.debugging.assert_non_negative(seed, "seed: expected >= 0"),
            tf.debugging.assert_positive(
                temperature, "temperature: expected > 0"
            ),
        ]
    ):
        chunks = tf.range((n + size - 1) // size)

    def draw(chunk):
        numbers = chunk * size + tf.range(size)
        conditions = {
            "label": _labels_in_graph(numbers, label, labels),
            "slice_position": tf.cast(
                position_of(tf.cast(numbers, tf.float64)), tf.float32
            ),
        }
        indices = []
        for prior in reversed(priors):
            told = {**conditions, "upper": tuple(indices)}
            grid, _ = prior.draw_chunk(
                seed, chunk, told, temperature=temperature
            )
            indices.insert(0, grid)
        return vqvae.decode_indices(indices)[..., 0], *indices

    grids = [(size, *grid) for grid in vqvae.latent_grids]
    drawn = tf.map_fn(
        draw,
        chunks,
        parallel_iterations=SAMPLE_RUNS,
        fn_output_signature=(
            tf.TensorSpec((size, *vqvae.image_size)),
            *(tf.TensorSpec(grid, tf.int32) for grid in grids),
        ),
    )
    images, *indices = (
        tf.reshape(part, (-1, *part.shape[2:]))[:n] for part in drawn
    )
    named = {f"indices_{k}": grid for k, grid in enumerate(indices, start=1)}
    return {"images": images, **named}


def _labels_in_graph(numbers, label, labels):
    """Number of the label of each image; -1 for null."""
    known = tf.constant(labels, tf.string, shape=(len(labels),))
    message = f"label: expected one of {', '.join(labels) or 'none'}, or empty"
    right = (label == "") | tf.reduce_any(known == label)
    with tf.control_dependencies([tf.debugging.Assert(right, [message])]):
        numbers = tf.identity(numbers)
    if not labels:
        return tf.fill(tf.shape(numbers), -1)
    asked = tf.argmax(known == label, output_type=tf.int32)
    return tf.where(label == "", label_of(numbers, len(labels)), asked)
