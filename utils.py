"""What every script shares. Sections, in this order:

1. Errors       one-line user errors with exit codes, `run_main`
2. Settings     dataclasses, recipes, the command line made from them
3. Run folder   `Run`, atomic writes, reading what a run holds
4. Devices      seeds, precision, `tf.distribute` strategies
5. Metrics      SSIM and relatives, codebooks, sets of images, copies
6. Figures      one grid of images under every picture, curves, PNG files

Only the standard library, NumPy and tyro are imported here, so that `--help`
and a mistyped flag answer at once; heavy packages are loaded on first use.
"""

import ast
import configparser
import contextlib
import dataclasses
import datetime
import difflib
import errno
import functools
import importlib
import importlib.metadata
import inspect
import io
import itertools
import json
import logging
import math
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import types
import typing
import zipfile
import zlib
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from tyro.conf import Positional, arg
from tyro.constructors import PrimitiveConstructorSpec

# What is opened later may not take the number of a stream that is closed.
for _name, _mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
    if getattr(sys, _name) is None:
        setattr(sys, _name, open(os.devnull, _mode))
# What the program depends on, whatever the user's environment says.
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["MPLBACKEND"] = "Agg"
# TensorFlow's own log: what fails is raised as an exception too, and its graph
# optimizer reports every fusion that it gives up as an error.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Its faster kernels, which it uses by itself on CPUs with AVX-512 only.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
# Other processes may use the same GPU, as those that share a search.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
# Its Python log warns of retracing whenever several models are trained.
logging.getLogger("tensorflow").setLevel(logging.ERROR)

RESOURCES = Path(__file__).resolve().parent / "resources"

# ---------------------------------------------------------------- 1. Errors


class UserError(Exception):
    """A problem the user can solve: one line, no traceback."""

    exit_code = 1


class FlagError(UserError):
    """A flag is unknown, out of bounds or contradicts another."""

    exit_code = 2


class DataError(UserError):
    """Images are missing, unreadable or unfit."""

    exit_code = 3


class RunError(UserError):
    """A run folder or a model file is missing, damaged or mismatched."""

    exit_code = 4


class NumericsError(UserError):
    """A loss, gradient or weight stopped being finite."""

    exit_code = 5


class ResourceError(UserError):
    """Disk, memory or permission is lacking."""

    exit_code = 6


# What is wrong with a disk or its permissions, not with the program.
RESOURCE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE}
RESOURCE_ERRNOS |= {errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS}
RESOURCE_ERRNOS |= {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY}
RESOURCE_ERRNOS |= {errno.EBUSY, errno.ENAMETOOLONG, errno.ESTALE, errno.ENOMEM}
# Lines that TensorFlow writes at every start, before its log level is read.
NOTICES = r"^WARNING: All log messages before|^[IW][0-9]{4} |cuInit"


class lazy_import:
    """Stand-in for a module, imported at its first use.

    `importlib.util.LazyLoader` imports as soon as anything looks through
    `sys.modules`, as `inspect` does for `--help`.
    """

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        # Tools that look a module over (`__wrapped__`) must not import it.
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return getattr(_import(self._name), attribute)


@functools.cache
def _import(name):
    if name in ("tensorflow", "keras", "modules"):
        _start_tensorflow()
    module = importlib.import_module(name)
    configure_keras()
    return module


def configure_keras():
    """Undo what `~/.keras/keras.json` may say, if Keras is imported."""
    if config := getattr(sys.modules.get("keras"), "config", None):
        config.set_image_data_format("channels_last")
        config.set_floatx("float32")
        config.set_epsilon(1e-7)


@functools.cache
def _start_tensorflow():
    """Import TensorFlow; hold back its notices and let all else through.

    Another process filters: what TensorFlow says before it ends this one (a
    CPU without AVX, a CUDA that does not fit) arrives all the same.
    """
    command = ["grep", "--line-buffered", "-vE", NOTICES]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2) as grep:
        saved = os.dup(2)
        os.dup2(grep.stdin.fileno(), 2)
        try:
            tensorflow = importlib.import_module("tensorflow")
            tensorflow.config.list_physical_devices()  # looks for GPUs now
        finally:
            os.dup2(saved, 2)
            os.close(saved)


filelock = lazy_import("filelock")
keras = lazy_import("keras")
ndimage = lazy_import("scipy.ndimage")
pd = lazy_import("pandas")
tf = lazy_import("tensorflow")
_figures = lazy_import("matplotlib.figure")
_image = lazy_import("PIL.Image")
_measures = lazy_import("sklearn.metrics")


def _as_user_error(error):
    """Return the `UserError` that says what `error` means, or None."""
    text, kind = " ".join(str(error).split()), type(error).__name__
    if isinstance(error, UserError):
        return error
    # TensorFlow names a file that it cannot map in its message only.
    if found := re.search(r"MapV2: (.*?) \[\[{{node ImmutableConst", text):
        return DataError(f"{found[1]}; expected decoded images")
    # h5py and TensorFlow say it in words, `numpy.save` in words of its own.
    texts = [x for x in map(os.strerror, RESOURCE_ERRNOS) if x in text]
    if re.search(r"\d requested and \d+ written", text):
        texts = [os.strerror(errno.ENOSPC)]
    if isinstance(error, OSError) and error.errno in RESOURCE_ERRNOS:
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror}"
    elif texts:
        text = texts[0]
    elif (
        kind in ("UnavailableError", "AbortedError")
        or "Collective ops is aborted" in text
    ):
        text = "a worker died or cannot be reached; once all workers are "
        text += "there, continue from the last checkpoint with --resume"
    elif kind == "ResourceExhaustedError" or isinstance(error, MemoryError):
        text = "out of memory; use a smaller --batch-size or --image-size"
    else:
        return None
    return ResourceError(text)


class Stopped(BaseException):
    """A signal ends the program; exit code 128 and its number.

    Like `KeyboardInterrupt` not an `Exception`: nothing should handle it.
    """

    def __init__(self, number):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StopSignals:
    """Notes SIGINT, SIGTERM and SIGHUP, so that a training can end in order.

    >>> with StopSignals() as signals:
    ...     with signals.deferred():
    ...         train()  # at times: if signals.received, save and stop

    A signal that is not deferred, or the second one, raises `Stopped` at once.

    Attributes:
        received: number of the signal noted, 0 if there was none.
    """

    received, _deferred = 0, False

    def __enter__(self):
        numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
        self._handlers = {
            number: signal.signal(number, self._note)
            for number in numbers  # ignored by nohup: stays so
            if signal.getsignal(number) != signal.SIG_IGN
        }
        self._hook, sys.unraisablehook = sys.unraisablehook, self._send_again
        return self

    def __exit__(self, *exception):
        sys.unraisablehook = self._hook
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.received or not self._deferred:
            raise Stopped(number)
        self.received = number
        name = signal.Signals(number).name
        # Not print, which this may interrupt; a closed terminal takes nothing.
        with contextlib.suppress(OSError):
            os.write(1, f"{name}: stopping soon; again: at once\n".encode())

    def _send_again(self, lost):
        """Send a signal again if Python dropped its `Stopped`, as in `__del__`.

        A little later, when that is over.
        """
        if isinstance(lost.exc_value, Stopped):
            again = os.getpid(), lost.exc_value.exit_code - 128
            threading.Timer(0.1, os.kill, again).start()
        else:
            self._hook(lost)

    @contextlib.contextmanager
    def deferred(self):
        """Note a first signal; raise `Stopped` at the end of the block."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.received:
            raise Stopped(self.received)


def warn(text):
    """Print a warning on stderr."""
    print(f"warning: {text}", file=sys.stderr)


def run_main(main, argv=None):
    """Call `main(argv)`; end with the exit codes of the README.

    A `UserError` becomes one line on stderr. Anything else is a defect and
    keeps its traceback, as everything does with `--debug`.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        main(argv)
    except (Stopped, KeyboardInterrupt) as stopped:
        with contextlib.suppress(OSError):  # of a terminal that is closed
            print(str(stopped) or "interrupted", file=sys.stderr)
        sys.exit(getattr(stopped, "exit_code", 128 + signal.SIGINT))
    except BrokenPipeError:  # `| head`: the interpreter must not flush again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        user_error = _as_user_error(error)
        if "--debug" in argv or user_error is None:
            raise
        # A data error may list files, a line each.
        end = "\n" if isinstance(user_error, DataError) else " "
        lines = str(user_error).split("\n")
        text = end.join(" ".join(line.split()) for line in lines)
        print(f"error: {text}", file=sys.stderr)
        sys.exit(user_error.exit_code)


# -------------------------------------------------------------- 2. Settings


@dataclasses.dataclass(frozen=True)
class Between:
    """Bounds of a number, as a note of its type; `ends` as in "(0, 1]"."""

    low: float
    high: float
    ends: str = "[]"

    def __contains__(self, value):
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        below = value <= self.high if self.ends[1] == "]" else value < self.high
        return above and below

    def __str__(self):
        return f"{self.ends[0]}{self.low}, {self.high}{self.ends[1]}"


def integer(low, high):
    """Return the type of a whole number with bounds."""
    return Annotated[int, Between(low, high)]


def number(low, high, ends="[]"):
    """Return the type of a number with bounds."""
    return Annotated[float, Between(low, high, ends)]


def _read_size(words):
    height, x, width = words[0].partition("x")
    return int(height), int(width if x else height)


def size_text(size):
    """Return an image size (H, W) as it is typed: HxW."""
    return "x".join(str(side) for side in size)


Count = integer(1, 1_000_000)
Whole = integer(0, 1_000_000_000)
Seed = integer(0, 2**31 - 1)
Channels = integer(1, 4096)
Weight = number(0, 1000)
Fraction = number(0, 1)
Momentum = number(0, 1, "[)")
Share = Rate = number(0, 1, "(]")
Temperature = number(0, 10, "(]")
Folder = Annotated[str | None, arg(metavar="DIR")]
ImageSize = Annotated[
    tuple[integer(16, 4096), integer(16, 4096)],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="H[xW]",
        instance_from_str=_read_size,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [size_text(value)],
    ),
]
_POSITIONAL = Positional[int].__metadata__[0]
_UNIONS = (typing.Union, types.UnionType)


def settings(cls):
    """Make a class a frozen dataclass that checks its values.

    A field is a flag: its type has the bounds, the string below it is the
    help. A value that does not fit is a `FlagError`.
    """
    further = getattr(cls, "__post_init__", lambda self: None)

    def check(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _fits(value, field.type):
                raise _refusal(flag_name(field), field.type, typed(value))
        further(self)

    for name, text in _field_help(cls).items():  # groups of settings have none
        hint = cls.__annotations__[name]
        look = {"help": text, "help_behavior_hint": _default_but_none}
        kind, _, bounds = _expected(hint).partition(" in ")
        if bounds and kind in ("a whole number", "a number"):
            look["metavar"] = bounds
        cls.__annotations__[name] = Annotated[hint, arg(**look)]
    cls.__post_init__ = check
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def _default_but_none(label):
    # What None means, the help says.
    return "" if label in ("None", "") else f"(default: {label})"


def _field_help(cls):
    """Return {field: the string below it} of a class.

    tyro would parse the whole file for each class: half of the time of --help.
    """
    # By the frame that declares the class: a profiler takes the name __main__.
    source = inspect.getsource(sys._getframe(2))
    block = re.search(rf"(?ms)^class {cls.__name__}\b.*?(?=^\S|\Z)", source)[0]
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in itertools.pairwise(ast.parse(block).body[0].body)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


def _fits(value, hint):
    """Return whether a value has the type and the bounds of an annotation."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind is Annotated:
        bounds = [note for note in inner if isinstance(note, Between)]
        return _fits(value, inner[0]) and all(value in b for b in bounds)
    if kind in _UNIONS:
        return any(_fits(value, option) for option in inner)
    if kind is Literal:
        return any(value == x and type(value) is type(x) for x in inner)
    if kind is tuple:
        inner = inner[:1] * len(value or ()) if inner[-1] is ... else inner
        right = isinstance(value, tuple) and len(value) == len(inner)
        return right and all(map(_fits, value, inner))
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint and value != ""  # as of "$RUN", if unset


def _expected(hint):
    """Return in words what a flag takes: type, choices, bounds."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind is Annotated:
        bounds = [f" in {note}" for note in inner if isinstance(note, Between)]
        return "".join([_expected(inner[0]), *bounds])
    if kind is Literal:
        return "one of " + ", ".join(map(str, inner))
    if kind in _UNIONS or kind is tuple and inner[-1] is ...:
        return _expected(inner[0])
    if kind is tuple:
        return f"H or HxW, both {_expected(inner[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(hint, "text")


def _refusal(name, hint, found):
    found = found or "nothing"
    return FlagError(f"{name}: expected {_expected(hint)}, found {found}")


def typed(value):
    """Return a setting as it is typed on the command line."""
    if isinstance(value, tuple):
        return size_text(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def flag_name(field):
    """Return how the command line names a field of settings."""
    notes = getattr(field.type, "__metadata__", ())
    if _POSITIONAL in notes:
        return field.name.upper()
    names = [note.name for note in notes if getattr(note, "name", None)]
    return "--" + (names or [field.name.replace("_", "-")])[0]


def _walk(cls, path=()):
    """Yield (key, path, field) of each flag of settings, also nested ones.

    The key is the name of the flag with underscores: `prior_channels`.
    """
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from _walk(field.type, (*path, field.name))
        else:
            key = flag_name(field).removeprefix("--").replace("-", "_")
            yield key, (*path, field.name), field


def flat(settings):
    """Return settings as {key: value}; a key is a flag: `prior_channels`."""
    value = functools.partial(functools.reduce, getattr)
    return {k: value(path, settings) for k, path, _ in _walk(type(settings))}


def replace(settings, **values):
    """Return a copy of settings with other values, by key as in `flat`."""
    paths = {key: path for key, path, _ in _walk(type(settings))}
    groups = {}
    for key, value in values.items():
        *group, name = paths[key]
        groups.setdefault("".join(group), {})[name] = value
    changes = groups.pop("", {})
    for group, parts in groups.items():
        changes[group] = dataclasses.replace(getattr(settings, group), **parts)
    return dataclasses.replace(settings, **changes)


@settings
class ReadSettings:
    """How a folder of images is read."""

    subject_pattern: str | None = None
    """For --dataset folder: regular expression of paths with groups named
    subject, slice, label (default: guessed)."""
    image_size: ImageSize | None = None
    """Height and width, 16 to 4096 pixels, multiples of the total downsampling;
    None: the most common size of the data."""
    resize: bool = False
    """Resample images of another size."""
    skip_bad: bool = False
    """Leave out unfit files instead of stopping."""


# Layouts of `dataset.LAYOUTS`.
DATASETS = ("oasis", "adni", "hipmri", "folder")


@settings
class DataSettings(ReadSettings):
    """The images."""

    dataset: Literal[("phantom", *DATASETS)] = "phantom"
    """Layout of the data; phantom: simulated brains, no data needed."""
    data_dir: Folder = None
    """Folder of a real data set."""
    phantom_subjects: integer(3, 100_000) = 80
    """Simulated subjects."""
    crop: bool = True
    """Train on the box that holds content; outputs have the whole frame."""


@settings
class VQVAESettings:
    """The VQ-VAE."""

    levels: integer(1, 3) = 1
    """Latent grids, each half the size of the one below."""
    downsampling: Literal[2, 4, 8, 16, 32] = 4
    """Pixels per latent of the bottom grid, each way."""
    channels: Channels = 128
    """Feature channels."""
    residual_blocks: integer(0, 64) = 2
    """Residual blocks in a stack."""
    residual_channels: Channels = 32
    """Channels inside a residual block."""
    num_embeddings: integer(2, 65_536) = 512
    """Code vectors, K."""
    embedding_dim: Channels = 64
    """Length of a code vector, D."""
    commitment_cost: number(0, 100) = 0.25
    """Weight of the commitment loss, beta."""
    codebook_update: Literal["ema", "gradient"] = "ema"
    """How code vectors learn: moving averages (ema), or gradients."""
    decay: Momentum = 0.99
    """Factor of the moving averages, per step."""
    restart_threshold: Fraction = 0.02
    """Share of the mean use below which a code restarts; 0: never."""
    ssim_weight: Weight = 0.0
    """Weight of 1 - SSIM in the reconstruction loss."""
    mask_weight: Weight = 0.0
    """Weight of a predicted mask; images are black outside; 0: no mask."""
    upper_weight: Weight = 0.25
    """Weight of the loss of images decoded from upper levels alone."""


@settings
class PriorSettings:
    """The prior, one network for each level."""

    network: Annotated[
        Literal["pixelcnn", "gated", "pixelsnail"], arg(name="prior")
    ] = "pixelcnn"
    """Network."""
    channels: Annotated[Channels, arg(name="prior-channels")] = 128
    """Feature channels."""
    blocks: Annotated[integer(1, 128), arg(name="prior-blocks")] = 5
    """Residual blocks."""
    kernel_size: Annotated[
        Literal[3, 5, 7, 9, 11, 13, 15], arg(name="prior-kernel-size")
    ] = 7
    """Side of the first kernel, in latents."""
    head_layers: Annotated[integer(0, 16), arg(name="prior-head-layers")] = 2
    """1x1 layers after the blocks."""
    dropout: Annotated[number(0, 0.9), arg(name="prior-dropout")] = 0.0
    """Share of features dropped in training."""
    attention: Annotated[
        Literal["top", "all", "none"], arg(name="prior-attention")
    ] = "top"
    """Levels at which a pixelsnail attends to all codes before."""
    position_features: bool = False
    """Give every layer sine features of the grid position."""
    atlas: Annotated[integer(0, 64), arg(name="prior-atlas")] = 0
    """Slice positions at which features of every place are learned; 0: none."""
    condition: Annotated[
        Literal["none", "label", "slice", "label,slice"],
        arg(metavar="none|label|slice|label,slice"),
    ] = "none"
    """Class label, slice position or both, which samples can be asked for."""
    condition_dropout: number(0, 0.9) = 0.1
    """Share of conditions hidden in training, for guidance."""


@settings
class TrainingSettings:
    """The training of each stage."""

    epochs: Count = 30
    """Passes of the VQ-VAE over the training images."""
    batch_size: Count = 32
    """Images per step of the VQ-VAE."""
    learning_rate: Rate = 3e-4
    """Adam's step size for the VQ-VAE; cosine decay, as in every stage."""
    warmup_steps: Whole = 100
    """Steps of linear warm-up, in every stage."""
    flips: bool = False
    """Mirror half of the images left to right, for a prior only in the first
    half of its training; not for sagittal slices."""
    augment: Weight = 0.0
    """Strength of random changes of images for the VQ-VAE; 1: shifts up to 3
    pixels of 176, 7 % in intensity."""
    texture_epochs: Whole = 0
    """Passes over the training images of the texture that generated images
    get; 0: none."""
    texture_channels: Channels = 48
    """Feature channels of the texture."""
    texture_batch_size: Count = 4
    """Images per step of the texture."""
    texture_learning_rate: Rate = 1e-3
    """Adam's step size for the texture."""
    prior_epochs: Count = 100
    """Passes of the prior over the training grids."""
    prior_batch_size: Count = 64
    """Grids per step of the prior."""
    prior_learning_rate: Rate = 3e-4
    """Adam's step size for the prior."""
    prior_weight_decay: Fraction = 0.0
    """Decoupled weight decay of the prior."""
    prior_ema_momentum: Momentum = 0.0
    """Average the prior's weights over steps with this factor; 0: do not."""
    prior_augment: Weight = 0.0
    """Strength of --augment for the prior; falls to 0 through the training."""
    patience: Count = 10
    """Epochs without better validation bits before a prior's training ends."""
    accumulation_steps: Count = 1
    """Parts that a batch is computed in, one by one, to save memory."""
    recompute: bool = False
    """Compute a prior's blocks again for the gradients, to save memory."""
    round_steps: Count = 500
    """Most steps between two checkpoints."""


@settings
class RunSettings:
    """The run."""

    stage: Literal["all", "vqvae", "prior", "texture"] = "all"
    """What to train; prior, texture: in the --run-dir of a VQ-VAE."""
    run_dir: Folder = None
    """Folder of results (default: runs/RECIPE-DATE-TIME)."""
    resume: Annotated[str | None, arg(metavar="RUN")] = None
    """Continue the training of this run folder, with more epochs if given."""
    prior_level: integer(1, 3) | None = None
    """Train the prior of this level only; 1: the bottom."""
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] = (
        "auto"
    )
    """Dtype of the arithmetic."""
    strategy: Literal["auto", "none", "mirrored", "multiworker"] = "auto"
    """none: one device; mirrored: all GPUs here; multiworker: the machines in
    TF_CONFIG; auto: these if there are any, else one device."""
    jit: bool = False
    """Compile training steps with XLA."""
    seed: Seed = 0
    """Seed of every random choice."""
    evaluate: bool = True
    """Evaluate at the end; predict.py evaluate does it, too."""
    num_samples: integer(1, 5_000) = 256
    """Images sampled for the evaluation."""
    temperature: Temperature | None = None
    """Sampling temperature; None: chosen on validation subjects."""
    top_p: Share | None = None
    """Sample from the likeliest codes that together have this probability;
    None: chosen on validation subjects."""
    force: bool = False
    """Train a prior even over a collapsed codebook."""
    smoke: bool = False
    """A few steps on a few images, to see that everything connects."""
    debug: bool = False
    """Show the traceback of an error."""


@settings
class SearchSettings:
    """Search for settings."""

    tune: integer(0, 100_000) = 0
    """Trials, each for --epochs and --prior-epochs; 0: train once."""
    objective: Literal["ssim", "ssim+bits"] = "ssim"
    """SSIM of validation images; or that and bits per image of the prior."""


ATTENTION_HEADS = 2  # of a PixelSNAIL
SMOKE_STEPS = 3
SMOKE_IMAGES = 8
SMOKE_SUBJECTS = 4
# The most that `smoked` leaves of a setting whose key ends so.
_SMOKE_LIMITS = {
    "epochs": 1,
    "batch_size": 4,
    "accumulation_steps": 2,
    "warmup_steps": 1,
    "channels": 16,
    "num_embeddings": 32,
    "embedding_dim": 8,
    "prior_blocks": 1,
    "num_samples": 4,
    "phantom_subjects": 4,
}


@settings
class Settings:
    """Train a VQ-VAE and a prior over its indices on 2-D MRI slices."""

    recipe: str = "quickstart"
    """Named settings, which flags override; --list-recipes shows them all."""
    data: DataSettings = DataSettings()
    vqvae: VQVAESettings = VQVAESettings()
    prior: PriorSettings = PriorSettings()
    training: TrainingSettings = TrainingSettings()
    run: RunSettings = RunSettings()
    search: SearchSettings = SearchSettings()

    def __post_init__(self):
        if self.data.image_size:
            check_image_size(self.data.image_size, self.total_downsampling)
        level, levels = self.run.prior_level or 1, self.vqvae.levels
        if level > levels:
            raise FlagError(f"--prior-level: at most {levels}, found {level}")
        channels = self.prior.channels
        if self.prior.network == "pixelsnail" and channels % ATTENTION_HEADS:
            raise FlagError(
                f"--prior-channels: expected a multiple of {ATTENTION_HEADS} "
                f"for pixelsnail, found {channels}"
            )
        if self.training.texture_epochs and self.total_downsampling % 4:
            raise FlagError(
                "--texture-epochs: needs a total downsampling of 4 or more, "
                f"found {self.total_downsampling}"
            )
        if self.run.stage == "texture" and not self.training.texture_epochs:
            raise FlagError("--stage texture needs --texture-epochs, found 0")
        # The second computation would drop other features.
        if self.training.recompute and self.prior.dropout:
            raise FlagError("--recompute: does not go with --prior-dropout")

    @property
    def total_downsampling(self):
        """Pixels per latent of the top grid, each way."""
        return self.vqvae.downsampling * 2 ** (self.vqvae.levels - 1)

    def smoked(self):
        """Return these settings shrunk to a run of seconds."""
        small = {
            key: min(value, most)
            for key, value in flat(self).items()
            for end, most in _SMOKE_LIMITS.items()
            if key.endswith(end)
        }
        return replace(self, **small)


def stage_prefix(stage):
    """Return how the keys of settings of a stage of training begin."""
    return {"vqvae": "", "texture": "texture_"}.get(stage, "prior_")


def _keys(*groups, prefix=()):
    """Return the keys of settings of some groups, and those that begin so."""
    found = {key: path[0] for key, path, _ in _walk(Settings)}
    return {k for k, x in found.items() if x in groups or k.startswith(prefix)}


# Settings that the VQ-VAE of a run was trained with.
OF_VQVAE = _keys("data", "vqvae") - {"data_dir", "skip_bad"}
OF_VQVAE |= {"recipe", "epochs", "batch_size", "learning_rate", "augment"}
OF_VQVAE |= {"smoke"}  # its settings would stay those of the run
# Stages over the VQ-VAE of an earlier run: the settings they do not change.
FIXED = {
    "prior": OF_VQVAE | _keys(prefix="texture_"),
    "texture": OF_VQVAE
    | {"temperature", "top_p", "patience", "recompute"}
    | _keys("prior", prefix="prior_"),
}
# Those that `--resume` may change.
FREE_ON_RESUME = {"resume", "strategy", "force", "debug", "data_dir"}
FREE_ON_RESUME |= {"evaluate"}


def check_image_size(size, multiple, name="--image-size"):
    """Raise `FlagError` unless both sides of `size` divide by `multiple`."""
    fit = tuple(math.ceil(side / multiple) * multiple for side in size)
    if fit != tuple(size):
        raise FlagError(
            f"{name}: {size_text(size)} is not a multiple of {multiple}; "
            f"use {size_text(fit)}"
        )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Named settings, as flags of the command line; others override them."""

    name: str
    description: str
    source: str
    figure: str  # of the original
    flags: str
    search: dict  # what --tune tries: {key: {choices} or {low, high, log}}

    @functools.cached_property
    def settings(self):
        """`Settings` of the recipe."""
        return parse(Settings, ["--recipe", self.name, *self.flags.split()])


def _read_recipes():
    """Return {name: `Recipe`} of `recipes.ini`, which says what is in it."""
    rules = configparser.ExtendedInterpolation()
    file = configparser.ConfigParser(interpolation=rules)
    file.read(RESOURCES / "recipes.ini", encoding="utf-8")
    recipes = {}
    for name in file.sections():
        part = file[name]
        texts = [part[key] for key in ("description", "source", "figure")]
        space = json.loads(part["space"]) | json.loads(part["search"])
        recipes[name] = Recipe(name, *texts, part["flags"], space)
    return recipes


RECIPES = _read_recipes()


def list_recipes():
    """Return the recipes as text: what each is, and its flags."""
    rows = []
    for name, recipe in RECIPES.items():
        rows += [f"{name}: {recipe.description}", f"  {recipe.source}"]
        rows += [f"  figure of the original: {recipe.figure}"]
        # Without those that a later one overrides.
        given = flags_given(recipe.flags.split()).items()
        flags = " ".join(
            f"--{key.replace('_', '-')} {text}".strip() for key, text in given
        )
        flags = textwrap.wrap(flags, 76, break_on_hyphens=False)
        rows += [f"  {line}" for line in flags]
    return "\n".join(rows)


# The command line is made from the settings by tyro.


def parse(cls, argv, description=None, default=None, prog=None):
    """Return the settings of class `cls` that a command line asks for."""
    flags = {flag_name(field) for _, _, field in _walk(cls)}
    if "--debug" not in flags:  # `run_main` reads it
        argv = [word for word in argv if word != "--debug"]
    with tyro._errors.on_parse_error(functools.partial(_refuse, flags)):
        return tyro.cli(
            cls,
            args=argv,
            prog=prog or Path(sys.argv[0]).name,
            description=inspect.cleandoc(description or cls.__doc__),
            default=tyro.MISSING_NONPROP if default is None else default,
            config=(
                tyro.conf.OmitArgPrefixes,
                tyro.conf.PositionalMetavarFromFieldName,
            ),
        )


def _refuse(flags, event):
    """Raise what tyro found wrong as a `FlagError` of one line."""
    tokens = getattr(event, "tokens", getattr(event, "unrecognized_tokens", []))
    if tokens:
        name = tokens[0].split("=")[0]
        near = difflib.get_close_matches(name, flags, 1, cutoff=0.7)
        advice = f"did you mean {near[0]}?" if near else "see --help"
        raise FlagError(f"{name}: unknown argument; {advice}")
    if isinstance(event, tyro._errors.MissingArgs):
        missing = [a.arg.field.intern_name for a in event.missing_arguments]
        raise FlagError(f"{' '.join(missing).upper()}: missing; see --help")
    argument = getattr(event, "argument", None)
    message = getattr(event, "message", "nothing")
    if argument is None:
        raise FlagError(message)
    name = argument.lowered.name_or_flags[-1]
    name = name if name[0] == "-" else argument.field.intern_name.upper()
    # tyro's messages end with the word that was found: "... base 10: 'x'"
    found = getattr(event, "value", None) or message.rpartition(": ")[2]
    raise _refusal(name, argument.field.type, found)


def parse_verbs(verbs, argv, description, default=None):
    """Return (verb, settings) of a command line with verbs.

    Args:
        verbs: {verb: class of settings}; docstrings are the help.
        default: verb of a command line that begins with none.
    """
    program, first = Path(sys.argv[0]).name, [*argv, ""][0]
    if first in ("-h", "--help") or not (first or default):
        print(f"usage: {program} VERB ... ({program} VERB --help)\n")
        print(f"{description.strip()}\n")
        for verb, settings in verbs.items():
            print(f"  {verb:11}  {settings.__doc__.splitlines()[0]}")
        sys.exit(0)
    if first in verbs:
        return first, parse(verbs[first], argv[1:], prog=f"{program} {first}")
    is_path = os.path.sep in first or os.path.exists(first)
    if default and (first[:1] in ("", "-") or is_path):
        return default, parse(verbs[default], argv, prog=program)
    raise FlagError(
        f"VERB: expected one of {', '.join(verbs)}, found {first!r}"
    )


def flags_given(argv):
    """Return {key: text} of the flags in a command line; `no_crop` is `crop`.

    >>> flags_given(["--seed=3", "--run-dir", "r", "--no-crop"])
    {'seed': '3', 'run_dir': 'r', 'crop': ''}
    """
    given = {}
    for word, after in itertools.pairwise([*argv, ""]):
        if word.startswith("--"):
            name, equals, text = word.removeprefix("--").partition("=")
            key = name.replace("-", "_").removeprefix("no_")
            is_value = not after.startswith("--")
            given[key] = text if equals else after * is_value
    return given


def parse_training(argv, description=None):
    """Return the `Settings` that a command line of train.py asks for.

    Flags override the recipe. With `--resume RUN`, and with a `--stage` over
    the VQ-VAE of `--run-dir RUN`, they override the settings of the run;
    `FlagError` for those that contradict what is trained already.
    """
    if "--list-recipes" in argv:
        print(list_recipes())
        sys.exit(0)
    given = flags_given(argv)
    name, stage = given.get("recipe") or "quickstart", given.get("stage")
    if name not in RECIPES:
        raise _refusal("--recipe", Literal[tuple(RECIPES)], repr(name))
    default, fixed = RECIPES[name].settings, set()
    if given.get("resume"):
        default = Run.open(given["resume"]).training_settings
        fixed = set(flat(default)) - FREE_ON_RESUME
    elif stage in FIXED:
        default = _settings_for(stage, given.get("run_dir"))
        fixed = FIXED[stage]
    chosen = parse(Settings, argv, description, default)
    _check_together(chosen, is_new=not fixed)
    before = flat(default)
    for key, value in flat(chosen).items():
        more_or_fewer = key.endswith("epochs") and chosen.run.resume
        may_change = key not in fixed or more_or_fewer
        if value != before[key] and not may_change:
            raise FlagError(
                f"--{key.replace('_', '-')}: the run was trained with "
                f"{typed(before[key])}, found {typed(value)}; leave the flag "
                "out, or start a new run"
            )
    return chosen


def _settings_for(stage, folder):
    """Return the settings of the run whose VQ-VAE gets a prior or texture."""
    if not folder:
        raise FlagError(
            f"--stage {stage} needs --run-dir: the folder of a run that holds "
            "a trained VQ-VAE"
        )
    # Of a training that was stopped, which may have more parts to make.
    now = Run.open(folder).training_settings
    once = {"prior_level": None, "force": False, "evaluate": True}
    return replace(now, **once, resume=None, strategy="auto")


def _check_together(chosen, is_new):
    """Refuse flags that need or contradict others."""
    data, run, search = chosen.data, chosen.run, chosen.search
    simulated, others = data.dataset == "phantom", "|".join(DATASETS)
    if is_new and simulated and data.data_dir is not None:
        raise FlagError(
            f"--data-dir: also say its layout: --dataset {others} or a --recipe"
        )
    can_simulate = simulated or run.smoke and data.dataset != "folder"
    if is_new and not (data.data_dir or can_simulate):
        raise FlagError(
            f"--data-dir is required for --dataset {data.dataset}: the folder "
            "that holds its images (but for folder, --smoke simulates them)"
        )
    # Before TensorFlow, which takes its time, is imported.
    if is_new and data.data_dir and not os.path.isdir(data.data_dir):
        raise DataError(
            f"{data.data_dir}: not a folder, expected that of --data-dir"
        )
    bits = search.objective == "ssim+bits"
    whole = run.stage == "all" or run.stage == "vqvae" and not bits
    if search.tune and (run.resume or run.prior_level or not whole):
        raise FlagError(
            "--tune does not go with --resume, --prior-level, a later --stage, "
            "or --stage vqvae with --objective ssim+bits: a search trains "
            "every trial from the beginning; to continue one, repeat its "
            "command with its --run-dir"
        )
    if is_new and run.prior_level:
        raise FlagError("--prior-level needs --stage prior and --run-dir")


# ------------------------------------------------------------ 3. Run folder

FORMAT = 7
# Whose versions a run notes; the last four decide scores.
PACKAGES = "tensorflow keras numpy pandas matplotlib nibabel "
PACKAGES += "scikit-image scikit-learn scipy pillow"
_HOST = re.sub(r"\W", "_", platform.node())


def temporary_mark():
    """Return what the names of temporary files of this process hold."""
    return f".tmp-{_HOST}-{os.getpid()}"


def write_atomic(path, write):
    """Let `write(temporary_path)` make a file, then move it to `path`.

    Whatever happens, `path` is either the old or the new complete file. A
    folder is written in the same way, if there is none yet or an empty one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + temporary_mark() + path.suffix)
    _remove(temporary)  # in a container numbers of processes repeat
    try:
        write(temporary)
        for written in (*temporary.rglob("*"), temporary):
            _sync(written)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:  # that of a full disk names no file
        name = str(error.filename or path)
        error.filename = name.replace(str(temporary), str(path))
        raise
    finally:
        _remove(temporary)


def remove_temporary_files(paths):
    """Remove those that `write_atomic` of a killed process left.

    Only this machine's: whether a process of another one lives is not known.
    """
    for path in list(paths):
        if found := re.search(rf"\.tmp-{_HOST}-(\d+)", path.name):
            try:
                os.kill(int(found[1]), 0)
            except ProcessLookupError:
                _remove(path)
            except PermissionError:  # a process of someone else
                pass


def _remove(path):
    """Remove a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _sync(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # not all file systems can
        if error.errno in RESOURCE_ERRNOS:
            raise
    finally:
        os.close(descriptor)


def write_json(path, value):
    """Write JSON atomically; a NaN or infinity is a `ValueError`."""
    text = json.dumps(
        value,
        allow_nan=False,
        ensure_ascii=False,
        sort_keys=True,
        indent=2,
        default=lambda v: v.tolist() if hasattr(v, "tolist") else os.fspath(v),
    )
    # A file name need not be valid UTF-8.
    data = f"{text}\n".encode("utf-8", "surrogateescape")
    write_atomic(path, lambda p: p.write_bytes(data))


def write_csv(path, frame):
    """Write a pandas table atomically, without its index."""
    options = {"index": False, "errors": "surrogateescape"}
    write_atomic(path, lambda p: frame.to_csv(p, **options))


def _new_folder(path):
    """Make a folder; with a number, as trainings may start in one second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(2):
        try:
            path.mkdir()
            return path
        except FileExistsError:
            path = path.with_name(f"{path.stem}.{number}")


class Run:
    """A run folder: settings, split, models, tables and figures.

    Attributes:
        path: Path of the folder.
        settings: `Settings` of its models.
        info: dict of what `config.json` holds: format, settings of the models,
            versions, command, started, image_size [H, W] of the frame, images
            (their number), crop [top, left, height, width] or None,
            latent_grids [[h, w], ...], labels {name: number}, slice_range,
            intensity {rule, low, high}, simulated, dataset, data_dir, sampling
            {temperature: [...], top_p: [...]}, a value a level, and, while
            under way, training.
    """

    def __init__(self, path, settings, info):
        self.path = Path(path)
        self.settings = settings
        self.info = {"format": FORMAT, "settings": flat(settings)} | info
        self._lock, self._is_new = None, False

    config_path = property(lambda self: self.path / "config.json")
    split_path = property(lambda self: self.path / "split.csv")
    rejected_path = property(lambda self: self.path / "rejected.csv")
    vqvae_path = property(lambda self: self.model_path("vqvae"))
    texture_path = property(lambda self: self.model_path("texture"))
    indices_path = property(lambda self: self.path / "indices.npz")
    history_path = property(lambda self: self.path / "history.csv")
    evaluation_path = property(lambda self: self.path / "evaluation.json")
    checkpoint_path = property(lambda self: self.path / "checkpoint")
    lock_path = property(lambda self: self.path / "run.lock")
    figures_path = property(lambda self: self.path / "figures")
    logs_path = property(lambda self: self.path / "logs")
    card_path = property(lambda self: self.path / "MODEL_CARD.md")
    report_path = property(lambda self: self.path / "report.html")

    @property
    def prior_names(self):
        """Names of the priors, bottom first: of their files and stages."""
        levels = self.settings.vqvae.levels
        ends = ["_bottom", "_middle", "_top"] if levels > 1 else [""]
        return [f"prior{end}" for end in ends[: levels - 1] + ends[-1:]]

    def model_path(self, stage):
        """Return the file of the model that a stage of training makes."""
        return self.path / f"{stage}.keras"

    @property
    def prior_paths(self):
        """Files of the priors, bottom first, whether they exist or not."""
        return [*map(self.model_path, self.prior_names)]

    @property
    def has_priors(self):
        """Whether there is any: then loading names those that are missing."""
        return any(path.exists() for path in self.prior_paths)

    @property
    def training_settings(self):
        """`Settings` of the training under way, else of the models."""
        latest = self.info.get("training", self.info)
        return self._read_settings(latest["settings"])

    @classmethod
    def create(cls, settings):
        """Make a new folder and prove that it can be written to.

        `RunError` if it holds something, `ResourceError` if that fails.
        """
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        info = {"command": shlex.join(sys.argv), "started": now}
        info["versions"] = {"python": platform.python_version()}
        for name in PACKAGES.split():  # some have another name, as for GPUs
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                info["versions"][name] = importlib.metadata.version(name)
        folder = settings.run.run_dir or f"runs/{settings.recipe}-{now}"
        run = cls(folder, settings, info)
        try:
            run._is_new = not (settings.run.run_dir and run.path.exists())
            if settings.run.run_dir:
                run.path.mkdir(parents=True, exist_ok=True)
            else:
                run.path = _new_folder(run.path)
            run.lock()
            if {entry.name for entry in run.path.iterdir()} - {"run.lock"}:
                raise RunError(
                    f"{run.path}: the folder is not empty; choose another with "
                    "--run-dir, or continue its training with --resume"
                )
            run.begin()
        except BaseException as error:
            run.unlock()
            if not isinstance(error, OSError):
                raise
            raise ResourceError(
                f"{run.path}: cannot write a run folder here "
                f"({error.strerror}); choose another with --run-dir"
            ) from error
        return run

    def lock(self):
        """Keep other trainings out until `unlock`; `RunError` if one is in."""
        lock = filelock.FileLock(self.lock_path, timeout=0)
        try:
            lock.acquire()
        except TimeoutError as error:
            raise RunError(
                f"{self.path}: in use by another process; wait for its end, "
                "or choose another folder"
            ) from error
        except (OSError, NotImplementedError) as error:
            if getattr(error, "errno", None) in RESOURCE_ERRNOS:
                raise
            warning = "this file system cannot lock out other trainings"
            warn(f"{self.path}: {warning}")
        self._lock = lock
        remove_temporary_files(self.path.rglob("*.tmp-*"))

    def unlock(self):
        """Let other trainings into the folder again."""
        if self._lock:
            self.lock_path.unlink(missing_ok=True)
            self._lock.release()
            self._lock = None

    def begin(self, done=(), **notes):
        """Note that a training is under way; remove all checkpoints.

        Until it is complete, `settings` in `config.json` stay those of the
        models that are there. Parts in `done` are not to be trained; `notes`
        go into `info["training"]`, too.
        """
        shutil.rmtree(self.checkpoint_path, ignore_errors=True)
        command = shlex.join(sys.argv)
        if self.info["command"].split("; ")[-1] != command:
            self.info["command"] += f"; {command}"
        notes |= {"settings": flat(self.settings), "done": list(done)}
        self.update(training=notes)

    def is_done(self, part):
        """Return whether the training under way is past `part`: "vqvae"."""
        return part in self.info["training"]["done"]

    def note_done(self, part):
        """Note that `part` is in its file, and remove its checkpoint."""
        training = self.info["training"]
        self.update(training={**training, "done": [*training["done"], part]})
        (self.checkpoint_path / f"{part}.npz").unlink(missing_ok=True)

    def complete(self):
        """Note that nothing is left to do."""
        self.update(settings=self.info.pop("training")["settings"])
        shutil.rmtree(self.checkpoint_path, ignore_errors=True)

    @classmethod
    def open(cls, path):
        """Read the folder of an earlier run; `RunError` if it is not one."""
        file = Path(path) / "config.json"
        if not file.is_file():
            what = "no config.json, so not a run folder"
            what = what if file.parent.is_dir() else "no such run folder"
            if Path(path).is_file():
                what = "a file, expected a run folder; it comes before images"
            raise RunError(f"{path}: {what}")
        try:
            info = json.loads(file.read_text("utf-8", "surrogateescape"))
            number, stored = int(info["format"]), info["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{file}: not readable ({error!r})") from error
        if number != FORMAT:
            raise RunError(
                f"{file}: format {number}, this program reads {FORMAT}; use "
                "the version that made it"
            )
        run = cls(path, Settings(), info)
        run.settings = run._read_settings(stored)
        return run

    def _read_settings(self, stored):
        """Return settings that `config.json` holds, checked like flags.

        One that is newer than the run has its default.
        """
        try:
            default = flat(Settings()).items()
            values = {key: stored.get(key, value) for key, value in default}
            for key, value in values.items():
                values[key] = tuple(value) if isinstance(value, list) else value
            return replace(Settings(), **values)
        except (AttributeError, KeyError, TypeError, FlagError) as error:
            text = f"{self.config_path}: unfit setting: {error}"
            raise RunError(text) from error

    @classmethod
    def newest(cls, root="runs"):
        """Return the run under `root` whose VQ-VAE was saved last.

        Without any, the newest of the models that come with the program.
        """
        for folder in (Path(root), RESOURCES / "pretrained"):
            files = [p for p in folder.glob("*/vqvae.keras") if p.is_file()]
            if files:
                newest = max(files, key=lambda path: path.stat().st_mtime)
                return cls.open(newest.parent)
        raise RunError(
            f"{root}: no trained run here; name one, or make one with "
            "python train.py"
        )

    def discard(self):
        """Remove the folder again if nothing came of the run."""
        self.unlock()
        if list(self.path.iterdir()) == [self.config_path]:
            self.config_path.unlink()
            if self._is_new:
                self.path.rmdir()

    def update(self, **keys):
        """Add keys to `info` and rewrite `config.json` in one step."""
        self.info.update(keys)
        write_json(self.config_path, self.info)


# What NumPy, pandas and json raise over a damaged file.
_DAMAGE = (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


def read_arrays(path):
    """Return the arrays of an npz file, and leave no damaged one open."""
    with open(path, "rb") as opened, np.load(opened) as archive:
        return dict(archive)


def write_arrays(path, arrays, save=np.savez_compressed):
    """Write an npz file atomically."""
    write_atomic(path, lambda p: save(p, **arrays))


def write_checkpoint(path, state, arrays):
    """Write a dict of JSON values and one of arrays to `path`.npz."""
    text = json.dumps(state, allow_nan=False)
    write_arrays(f"{path}.npz", {**arrays, "state": text}, np.savez)


def read_checkpoint(path):
    """Return state and arrays of a checkpoint; {}, {} if there is none."""
    path = Path(f"{path}.npz")
    if not path.exists():
        return {}, {}
    try:
        arrays = read_arrays(path)
        return json.loads(str(arrays.pop("state"))), arrays
    except _DAMAGE as error:
        raise RunError(
            f"{path}: damaged ({error}); remove it to train that part anew"
        ) from error


def _read(path, read, **options):
    """Return `read(path)`; what fails over a file of a run is a `RunError`."""
    try:
        return read(path, **options)
    except FileNotFoundError as error:
        message = f"{path}: missing from the run folder"
        if RESOURCES in path.resolve().parents:
            message += "; the shipped model comes without its images"
        raise RunError(message) from error
    except _DAMAGE as error:
        raise RunError(f"{path}: damaged ({error})") from error


def read_evaluation(run):
    """Return `evaluation.json` of a run."""
    path = run.evaluation_path
    return _read(path, lambda file: json.loads(file.read_text("utf-8")))


def read_indices(run):
    """Return `indices.npz` of a run as a dict of arrays."""
    return _read(run.indices_path, read_arrays)


def read_history(run):
    """Return `history.csv` of a run as a DataFrame."""
    exact = "round_trip"
    return _read(run.history_path, pd.read_csv, float_precision=exact)


def read_split_table(run):
    """Return `split.csv` of a run; its paths are relative to `data_dir`."""
    words = ("path", "subject", "scan", "label", "split", "sha256")
    numbers = ("slice", "position", "height", "width", "low", "high")
    table = _read(
        run.split_path,
        pd.read_csv,
        dtype=dict.fromkeys(words, str),
        keep_default_na=False,  # a subject may be called NA
        na_values=dict.fromkeys(numbers, [""]),
        float_precision="round_trip",
        encoding_errors="surrogateescape",
    )
    images = run.info.get("images", len(table))
    if {"path", "subject", "split"} - {*table} or len(table) != images:
        raise RunError(
            f"{run.split_path}: damaged, found {len(table)} images, expected "
            f"{images}; restore the file"
        )
    return table


# --------------------------------------------------------------- 4. Devices


def choose_precision(precision="auto"):
    """Return (Keras policy, reason); bfloat16 where hardware computes it."""
    if precision != "auto":
        return precision, "asked for"
    if has_bfloat16():
        return "mixed_bfloat16", "the hardware computes bfloat16"
    return "float32", "the hardware does not compute bfloat16"


def has_bfloat16():
    """Return whether all GPUs, or the CPU if there is none, compute it."""
    gpus = tf.config.list_physical_devices("GPU")
    details = map(tf.config.experimental.get_device_details, gpus)
    fast = [d.get("compute_capability", (0, 0)) >= (8, 0) for d in details]
    return all(fast) if gpus else has_cpu_bfloat16()


def has_cpu_bfloat16():
    """Return whether the CPU computes bfloat16."""
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text().split()
        return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)
    return False


def describe_devices():
    """Return in a line what is computed on, and why not on a GPU."""
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        details = map(tf.config.experimental.get_device_details, gpus)
        names = {detail.get("device_name", "GPU") for detail in details}
        more = "; --strategy mirrored takes all" if len(gpus) > 1 else ""
        return f"devices: {len(gpus)} x {', '.join(sorted(names))}{more}"
    why, drivers = "", ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg")
    if tf.test.is_built_with_cuda() and any(map(os.path.exists, drivers)):
        why = "; this machine has a GPU, but TensorFlow cannot use it: install "
        why += '"tensorflow[and-cuda]"'
        if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            why = "; CUDA_VISIBLE_DEVICES hides every GPU"
    return f"devices: CPU, {os.cpu_count()} cores{why}"


def choose_strategy(name="auto", alone=False):
    """Return the `tf.distribute` strategy to train with.

    Several workers are those of the variable `TF_CONFIG`; with `alone` they
    are refused. To be called before TensorFlow computes anything.
    """
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    try:
        jobs = resolver.cluster_spec().as_dict()
    except ValueError as error:
        raise FlagError(f"TF_CONFIG: expected JSON ({error})") from error
    workers = sum(len(jobs.get(job, ())) for job in ("chief", "worker"))
    if name == "auto":  # batches of recipes are small for several GPUs
        name = "multiworker" if workers > 1 else "none"
    if name == "mirrored":
        return tf.distribute.MirroredStrategy()
    if name == "none":
        return tf.distribute.get_strategy()
    if alone:
        raise FlagError(
            "--tune: a trial is trained by one process, found several workers; "
            "without TF_CONFIG, start the command on each machine, with one "
            "--run-dir"
        )
    if workers < 2:
        raise FlagError(
            "--strategy: multiworker needs the workers in the variable "
            "TF_CONFIG; see resources/guide/many-machines.md"
        )
    return tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)


def is_chief(strategy):
    """Return whether this process is the one that writes the run folder."""
    return strategy.extended.should_checkpoint


def is_multi_worker(strategy):
    """Return whether a `tf.distribute` strategy spans several processes."""
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


@functools.cache
def _sum_of_workers(strategy):
    """Return a compiled call that adds up a tensor over all replicas."""

    def total(numbers):
        own = strategy.run(tf.identity, args=(numbers,))
        return strategy.reduce("SUM", own, axis=None)

    return tf.function(total)


def any_worker(strategy, flag):
    """Return whether any worker has set `flag`; each worker must call this."""
    if not is_multi_worker(strategy):
        return flag
    return bool(_sum_of_workers(strategy)(tf.constant(flag, tf.int32)))


def wait_for_workers(strategy):
    """Return when every worker has come this far."""
    any_worker(strategy, False)


def peak_memory_mb():
    """Return the most memory this process has held, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# --------------------------------------------------------------- 5. Metrics
# Images are (B, H, W, 1) on [0, 1], any float dtype; originals come first.

SSIM_WINDOW = 11  # pixels
SSIM_SIGMA = 1.5  # pixels
FOREGROUND = 0.05  # intensity; the background of a slice is 0
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
PSNR_CAP = 100.0  # dB, so that equal images have a finite value


def _gaussian_band(length):
    """Return the (length, length - 10) matrix that blurs by multiplying."""
    places = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    taps = np.exp(-0.5 * (places / SSIM_SIGMA) ** 2)
    kernel = tf.constant((taps / taps.sum())[:, None, None], tf.float32)
    return tf.nn.conv1d(tf.eye(length)[..., None], kernel, 1, "VALID")[..., 0]


def _blur(images):
    """Average (N, H, W) images under the window: (N, H - 10, W - 10).

    Two dense products take 0.4 of the time of the depthwise convolution of
    `tf.image.ssim`, whose gradient is slow on a CPU.
    """
    height, width = tf.shape(images)[1], tf.shape(images)[2]
    rows = tf.tensordot(images, _gaussian_band(width), 1)
    return tf.matmul(_gaussian_band(height), rows, transpose_a=True)


def _ssim_and_mean(x, y):
    """Return the maps of SSIM and of the mean of x, (B, H - 10, W - 10)."""
    x = tf.cast(x, tf.float32)[..., 0]  # (B, H, W)
    y = tf.cast(y, tf.float32)[..., 0]
    moments = tf.concat([x, y, x * y, x * x + y * y], axis=0)
    mean_x, mean_y, product, power = tf.split(_blur(moments), 4)

    c1, c2 = 0.01**2, 0.03**2
    means, powers = mean_x * mean_y, mean_x**2 + mean_y**2
    luminance = (2 * means + c1) / (powers + c1)
    contrast = (2 * (product - means) + c2) / (power - powers + c2)
    return luminance * contrast, mean_x


def ssim(x, y):
    """Return the SSIM of each image pair, (B,), as `tf.image.ssim` does."""
    return tf.reduce_mean(_ssim_and_mean(x, y)[0], axis=[1, 2])


def ssim_foreground(x, y):
    """Return the SSIM (B,) where the original is not background.

    That is where its mean under the window exceeds `FOREGROUND`; NaN for an
    image that is background throughout.
    """
    values, mean = _ssim_and_mean(x, y)
    inside = tf.cast(mean > FOREGROUND, tf.float32)
    total = tf.reduce_sum(values * inside, axis=[1, 2])
    return total / tf.reduce_sum(inside, axis=[1, 2])


def ms_ssim(x, y):
    """Return the multi-scale SSIM (B,) over the scales that fit an image.

    `tf.image.ssim_multiscale`; fewer weights are scaled to the sum of all.
    """
    scales, side = 0, min(x.shape[1:3])
    while side >= SSIM_WINDOW and scales < len(MS_SSIM_WEIGHTS):
        scales, side = scales + 1, (side + 1) // 2
    weights = np.array(MS_SSIM_WEIGHTS[:scales])
    weights *= sum(MS_SSIM_WEIGHTS) / weights.sum()
    x, y = tf.cast(x, tf.float32), tf.cast(y, tf.float32)
    return tf.image.ssim_multiscale(x, y, 1.0, weights.tolist())


def psnr(x, y):
    """Return the peak signal-to-noise ratio (B,) in dB, at most 100."""
    return tf.minimum(tf.image.psnr(x, y, 1.0), PSNR_CAP)


def mae(x, y):
    """Return the mean absolute error (B,), in intensity."""
    x, y = tf.cast(x, tf.float32), tf.cast(y, tf.float32)
    return tf.reduce_mean(tf.abs(x - y), axis=[1, 2, 3])


def bootstrap(statistic, subjects, n=2000, seed=0):
    """Return a statistic and its 95 % interval over subjects.

    Slices of one subject are alike, so whole subjects are resampled. The
    statistic is a function of weights (N,), how often each image counts; NaN
    where nothing counts.

    Returns: `{"mean": value, "ci95": [low, high]}`, None for what is unknown,
        such as the interval with fewer than `LEAST_SUBJECTS` subjects.
    """
    names, owner = np.unique(np.asarray(subjects), return_inverse=True)
    value = statistic(np.ones(len(owner), int)) if len(names) else math.nan
    mean = None if math.isnan(value) else float(value)
    if mean is None or len(names) < LEAST_SUBJECTS:
        return {"mean": mean, "ci95": [None, None]}
    share = np.full(len(names), 1 / len(names))
    draws = np.random.default_rng(seed).multinomial(len(names), share, n)
    values = [statistic(draw[owner]) for draw in draws]
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return {"mean": mean, "ci95": [float(low), float(high)]}


def mean_of(values):
    """Return the statistic of `bootstrap` that is a mean; NaN left out."""
    values = np.asarray(values, np.float64)
    known = ~np.isnan(values)
    values = np.where(known, values, 0)

    def mean(weights):
        total = weights @ known
        return weights @ values / total if total else math.nan

    return mean


def code_counts(indices, num_embeddings):
    """Return how often each code occurs, (K,)."""
    return np.bincount(np.ravel(indices), minlength=num_embeddings)


def codebook_stats(indices, num_embeddings):
    """Return usage (0..1), perplexity and entropy of the codes."""
    counts = code_counts(indices, num_embeddings)
    used = counts[counts > 0]
    share = used / used.sum()
    entropy = float(-(share * np.log2(share)).sum()) + 0.0  # no "-0.0"
    return {
        "usage": len(used) / num_embeddings,
        "perplexity": 2.0**entropy,
        "entropy_bits": entropy,
    }


def unigram_bits(train_indices, test_indices, num_embeddings):
    """Return bits per test code under the frequencies of training codes.

    What a prior that sees no neighbours would reach; every count is raised
    by one, so that a code new to the test set has a finite cost.
    """
    train = code_counts(train_indices, num_embeddings) + 1
    test = code_counts(test_indices, num_embeddings)
    share = train / train.sum()
    return float(test @ -np.log2(share) / test.sum())


# Sets of images are compared in a feature space: an image is a row of (N, F).

MANIFOLD = ("precision", "recall", "density", "coverage")
NEIGHBOURS = 5  # k of precision, recall, density and coverage
PCA_SHARE = 8  # images of a set for each principal component
MOST_COMPONENTS = 64
HOG_ORIENTATIONS = 9
HOG_CELLS = 12  # along the short side; of 4 pixels or more
HOG_CONTRAST = 1e-3  # mean gradient, intensity a pixel, of a block that fades
TINY = 1e-12  # so that no ratio divides by 0
LEAST_SUBJECTS = 5  # of a set; also the folds of `c2st`


def hog_features(images):
    """Return histograms of oriented gradients (N, F) of images (N, H, W).

    Blocks are normalised: whatever is in one counts as much as in another. So
    that the noise of a background, or a pixel at the rim of a head, does not
    count like anatomy, intensities begin at `FOREGROUND`, and a block whose
    gradients are not well above `HOG_CONTRAST` fades to 0.

    Reference: Dalal and Triggs, 2005, doi:10.1109/CVPR.2005.177 (L2 blocks).
    """
    from skimage.feature import hog

    side = max(4, round(min(images.shape[1:]) / HOG_CELLS))
    options = {"pixels_per_cell": (side, side), "cells_per_block": (2, 2)}
    options |= {"orientations": HOG_ORIENTATIONS, "block_norm": "L2"}
    # scikit-image adds (1e-5)^2 to the squared length that it divides by.
    scaled = 1e-5 / HOG_CONTRAST * np.maximum(images - FOREGROUND, 0)
    return np.array([hog(image, **options) for image in scaled], np.float32)


def inception_features(images):
    """Return ImageNet Inception v3 features (N, 2048) of images (N, H, W)."""
    network, parts = inception_network(), []
    for k in range(0, len(images), 32):  # Keras keeps the output of each layer
        batch = tf.image.resize(images[k : k + 32, ..., None], (299, 299))
        batch = tf.repeat(2 * batch - 1, 3, axis=-1)
        parts.append(network(batch, training=False).numpy())
    return np.concatenate(parts)


@functools.cache
def inception_network():
    """Return the ImageNet Inception v3; `ResourceError` if that fails."""
    options = {"include_top": False, "pooling": "avg", "dtype": "float32"}
    network = keras.applications.InceptionV3
    try:
        return network(input_shape=(299, 299, 3), **options)
    except Exception as error:  # Keras: any kind, or a plain Exception
        raise ResourceError(
            "--features inception: the ImageNet weights cannot be loaded "
            f"({error}); try again with a network, or --features hog"
        ) from error


FEATURES = {"hog": hog_features, "inception": inception_features}


def principal_components(fit, n):
    """Return the projection to principal components of the features `fit`.

    A covariance of n images has no more than n - 1 dimensions, and a Fréchet
    distance in more of them measures n. There are n / 8 components, 64 at
    most; they are scaled to a mean variance of 1 over `fit`.
    """
    from sklearn.decomposition import PCA

    count = max(min(n // PCA_SHARE, MOST_COMPONENTS, *fit.shape), 1)
    pca = PCA(count, random_state=0).fit(fit)
    scale = math.sqrt(pca.explained_variance_.mean()) or 1.0
    return lambda features: pca.transform(features) / scale


def frechet_distance(x, y):
    """Return the Fréchet distance of Gaussians fitted to (N, F) and (M, F).

    |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), in squared units of the
    features. Reference: Heusel et al., 2017, arXiv:1706.08500.
    """
    difference = x.mean(0) - y.mean(0)
    cov_x, cov_y = np.atleast_2d(np.cov(x.T)), np.atleast_2d(np.cov(y.T))
    values, vectors = np.linalg.eigh(cov_x)
    root = vectors * np.sqrt(np.maximum(values, 0))  # root @ root.T is cov_x
    shared = np.linalg.eigvalsh(root.T @ cov_y @ root)
    overlap = np.sqrt(np.maximum(shared, 0)).sum()
    traces = np.trace(cov_x) + np.trace(cov_y) - 2 * overlap
    return float(max(difference @ difference + traces, 0))


def kernel_distance(x, y, subjects_x, subjects_y):
    """Return the kernel distance (KID) of features (N, F) and (M, F).

    The unbiased squared maximum mean discrepancy of the kernel
    (a b / F + 1)^3: 0 on average, so at times below, for sets of one kind.
    Images of a subject are alike, so within a set only pairs of different
    subjects are compared; the interval resamples the subjects of both sets.
    None if a set has fewer than `LEAST_SUBJECTS`.

    Reference: Binkowski et al., 2018, arXiv:1801.01401.
    """
    names_x, owner_x = np.unique(subjects_x, return_inverse=True)
    names_y, owner_y = np.unique(subjects_y, return_inverse=True)
    if min(len(names_x), len(names_y)) < LEAST_SUBJECTS:
        return None
    owner = np.concatenate([owner_x, owner_y + len(names_x)])
    first = np.unique(owner, return_index=True)[1]
    in_x = np.arange(len(first)) < len(names_x)
    # Sums of the kernel, and numbers of pairs, for each pair of subjects.
    one_hot = (owner == np.arange(len(first))[:, None]).astype(np.float64)
    kernel = _measures.pairwise.polynomial_kernel(np.vstack([x, y]))
    sums = one_hot @ kernel @ one_hot.T
    pairs = np.outer(one_hot.sum(1), one_hot.sum(1))
    np.fill_diagonal(sums, 0)
    np.fill_diagonal(pairs, 0)

    def mean(a, b):
        number = a @ pairs @ b
        return a @ sums @ b / number if number else math.nan

    def distance(weights):
        u, v = weights[first] * in_x, weights[first] * ~in_x
        return mean(u, u) + mean(v, v) - 2 * mean(u, v)

    return bootstrap(distance, owner)


def manifold_scores(fake, real, fake_subjects, real_subjects, k=NEIGHBOURS):
    """Return precision, recall, density and coverage, with intervals.

    An image has a ball that reaches to its k-th neighbour in its own set, of
    other subjects: with slices of one's own the balls of real images would be
    too small for anyone else's. Precision: is a fake image in the ball of a
    real one; density: in how many, over k. Recall: is a real image in the ball
    of a fake one; coverage: is a fake image in its own ball.

    Returns: {name: as of `bootstrap`}; None with fewer than k others.

    Reference: Kynkaanniemi et al., 2019, arXiv:1904.06991; Naeem et al., 2020,
        arXiv:2002.09797.
    """

    def radii(rows, subjects):
        apart, subjects = _measures.pairwise_distances(rows), np.array(subjects)
        apart[subjects[:, None] == subjects] = np.inf
        return np.sort(apart)[:, k - 1] if len(rows) > k else [np.inf]

    real_radii = radii(real, real_subjects)
    fake_radii = radii(fake, fake_subjects)
    if np.isinf([*real_radii, *fake_radii]).any():
        return dict.fromkeys(MANIFOLD)
    apart = _measures.pairwise_distances(real, fake)  # (M, N)
    in_real, in_fake = apart <= real_radii[:, None], apart <= fake_radii
    return {
        "precision": bootstrap(mean_of(in_real.any(0)), fake_subjects),
        "recall": bootstrap(mean_of(in_fake.any(1)), real_subjects),
        "density": bootstrap(mean_of(in_real.sum(0) / k), fake_subjects),
        "coverage": bootstrap(mean_of(in_real.any(1)), real_subjects),
    }


def set_scores(fake, real, *subjects):
    """Return the kernel distance and the `manifold_scores` of two sets."""
    kid = kernel_distance(fake, real, *subjects)
    return {"kid": kid, **manifold_scores(fake, real, *subjects)}


def jackknife_ratio(ratio, subjects):
    """Return the 95 % interval of a positive ratio over subjects.

    None of fewer than five, who are too few to judge by. One subject at a time
    is left out, and the logarithms compared: with whole subjects repeated, as
    a bootstrap does, a covariance loses dimensions. `ratio` is a function of a
    mask (N,) of the images to take.
    """
    subjects = np.asarray(subjects)
    names = np.unique(subjects)
    if len(names) < LEAST_SUBJECTS:
        return None
    logs = np.log([ratio(subjects != name) for name in names])
    error = math.sqrt((len(names) - 1) * logs.var())
    middle = math.log(ratio(np.full(len(subjects), True)))
    return [math.exp(middle + side * 1.96 * error) for side in (-1, 1)]


def compare_sets(sets, space, train_subjects, test_subjects):
    """Compare generated and training images with test images.

    Args:
        sets: {name: images (N, H, W)}: `generated`, `train` and `test`,
            equally many; `fit`, other training images for the principal
            components; maybe `rebuilt`, `upper_real`: which stage limits?
        space: name of the feature space, of `FEATURES`.

    Returns: dict for `evaluation.json`; None where images are too few.
    """
    name = f"{space} of {size_text(sets['test'].shape[1:])} images"
    n, extract = len(sets["generated"]), FEATURES[space]
    if n < 2 * PCA_SHARE:
        names = ("frechet", "by_stage", "kid", *MANIFOLD)
        return {"features": name, **dict.fromkeys(names), "floor": {}}
    features = {key: extract(images) for key, images in sets.items()}
    fit = features.pop("fit")
    project = principal_components(fit, n)
    features = {key: project(rows) for key, rows in features.items()}
    real, subjects = features["test"], test_subjects

    def distance(key, kept=slice(None)):
        return max(frechet_distance(features[key], real[kept]), TINY)

    def ratio(kept=slice(None), key="generated"):
        return distance(key, kept) / distance("train", kept)

    known = [key for key in ("rebuilt", "upper_real") if key in features]
    stages = {key: ratio(key=key) for key in known}
    components = f"{real.shape[1]} principal components"
    return {
        "features": f"{name}, {components} of {len(fit)} training images",
        "frechet": {
            "generated_vs_test": distance("generated"),
            "train_vs_test": distance("train"),
            "ratio": ratio(),
            "ratio_ci95": jackknife_ratio(ratio, subjects),
        },
        "by_stage": {**stages, "all_drawn": ratio()},
        # Generated images are of no one: as many subjects as images.
        **set_scores(features["generated"], real, range(n), subjects),
        "floor": set_scores(features["train"], real, train_subjects, subjects),
    }


TEXTURE_BINS = 24


def texture_features(images):
    """Return the local texture (N, 48) of images (N, H, W).

    The logarithm of the radial power spectrum, and the histogram of the
    Laplacian inside the head: too smooth or too grainy shows in both.
    """
    height, width = images.shape[1:]
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    ring = np.minimum(2 * TEXTURE_BINS * radius, TEXTURE_BINS).astype(int)
    edges = [-np.inf, *np.linspace(-0.3, 0.3, TEXTURE_BINS - 1), np.inf]
    inner = (slice(1, -1),) * 2
    rows = []
    for image in images:
        power = np.abs(np.fft.fft2(image)) ** 2
        # Of a small image no frequency is in some rings.
        rings = np.nan_to_num(ndimage.mean(power, ring, range(TEXTURE_BINS)))
        laplacian = ndimage.laplace(image)[inner]
        inside = laplacian[image[inner] > FOREGROUND]
        counts = np.histogram(inside, edges)[0] / max(len(inside), 1)
        rows.append([*np.log(rings + 1e-6), *np.sqrt(counts)])
    return np.array(rows, np.float32)


def c2st(a, b, subjects_a, subjects_b):
    """Return how well a small classifier tells two sets of images apart.

    Logistic regression on principal components of HOG at half the resolution
    and on local texture at the full one, cross-validated in five folds of
    whole subjects. The components are of all images, whichever set they are
    of. The accuracy is the mean of both sets': 0.5 is chance, 1 tells every
    image. The interval resamples the subjects. None if a set has fewer than
    five.

    Reference: Lopez-Paz and Oquab, 2017, arXiv:1610.06545.
    """
    from sklearn.decomposition import KernelPCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if min(len(set(subjects_a)), len(set(subjects_b))) < LEAST_SUBJECTS:
        return None
    _, subjects = np.unique([*subjects_a, *subjects_b], return_inverse=True)
    images = np.concatenate([a, b])
    halves = tf.nn.avg_pool2d(images[..., None], 2, 2, "SAME").numpy()[..., 0]
    count = min(len(images) // PCA_SHARE, MOST_COMPONENTS)
    # Linear: components by products of images, fewer than features are.
    shapes = KernelPCA(count).fit_transform(hog_features(halves))
    rows = np.hstack([shapes, texture_features(images)])
    truth = np.repeat([0, 1], [len(a), len(b)])
    model = make_pipeline(
        StandardScaler(),
        LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000),
    )
    folds = StratifiedGroupKFold(LEAST_SUBJECTS, shuffle=True, random_state=0)
    told = cross_val_predict(model, rows, truth, groups=subjects, cv=folds)
    of_a, of_b = (
        mean_of(np.where(truth == k, told == truth, np.nan)) for k in (0, 1)
    )
    return bootstrap(lambda w: (of_a(w) + of_b(w)) / 2, subjects)


SPACES = {
    "pixels": lambda images: np.reshape(images, (len(images), -1)),
    "hog": hog_features,
}
LEAST_UNSEEN = 100  # images, for their 1st percentile to be one of them
MOST_COPIES = 0.02  # of the generated images, and one at least


def nearest_images(queries, batches):
    """Return the nearest of many images to each query, in each of `SPACES`.

    Args:
        queries: (N, H, W).
        batches: iterable of (B, H, W, 1), read once.

    Returns: table of N rows with the columns `pixels`, a distance,
        `nearest_pixels`, the number of the image, `hog` and `nearest_hog`. The
        distance is the Euclidean one over the length of the query's features,
        so that small and large heads compare; NaN for a blank query.
    """
    features = {name: space(queries) for name, space in SPACES.items()}
    rows = {name: np.zeros(len(queries), int) for name in SPACES}
    best = {name: np.full(len(queries), np.inf) for name in SPACES}
    first = 0
    for batch in batches:
        batch = np.asarray(batch)[..., 0]
        for name, space in SPACES.items():
            row, apart = _measures.pairwise_distances_argmin_min(
                features[name], space(batch)
            )
            nearer = apart < best[name]
            rows[name][nearer] = first + row[nearer]
            best[name][nearer] = apart[nearer]
        first += len(batch)
    for name in SPACES:
        length = np.linalg.norm(features[name], axis=1)
        best[name] /= np.where(length > 0, length, np.nan)
        best[f"nearest_{name}"] = rows[name]
    return pd.DataFrame(best)


def audit(generated, unseen, subjects, n=1000):
    """Judge whether generated images are copies of training images.

    A generated image counts as a copy if it is closer to a training image than
    the 1st percentile of the unseen images, in either space, and the nearest
    training image is the same one in both. The first happens to about 2 in 100
    images of anybody, the second to few of these: more than 2 % of copies, and
    more than one, raise the alarm.

    Args:
        generated, unseen: of `nearest_images` with the same training images.
        subjects: of the unseen images.

    Returns: dict for `evaluation.json`, with None for what is unknown of fewer
        than 100 unseen images; mask (N,) of the copies that are known.
    """
    found = {
        name: _compare_distances(generated[name], unseen[name], subjects, n)
        for name in SPACES
    }
    limits = {name: found[name]["first_percentile"] for name in SPACES}
    limits = pd.Series(limits, dtype=float)
    known = limits.notna().all()
    copies = (generated[[*SPACES]] < limits).any(axis=1) & known
    copies &= generated["nearest_pixels"] == generated["nearest_hog"]
    alarm = bool(copies.sum() > max(1, MOST_COPIES * len(copies)))
    found["copies"] = int(copies.sum()) if known else None
    found["alarm"] = alarm if known else None
    return found, copies.to_numpy()


def _compare_distances(near, far, subjects, n):
    """Compare distances of generated and of unseen images; blanks left out."""
    kept, near = far.notna().to_numpy(), near.dropna().to_numpy()
    far, owners = far[kept], [f"generated {k}" for k in range(len(near))]
    owners += [f"unseen {subject}" for subject in np.asarray(subjects)[kept]]

    def ratio_of_medians(weights):
        a, b = map(np.repeat, (near, far), np.split(weights, [len(near)]))
        if not len(a) * len(b):
            return math.nan
        return np.median(a) / max(np.median(b), TINY)

    ratio = bootstrap(ratio_of_medians, owners, n)
    known = len(near) > 0 and len(far) >= LEAST_UNSEEN
    limit = float(np.percentile(far, 1)) if known else None
    return {
        "ratio_of_medians": ratio["mean"],
        "ratio_of_medians_ci95": ratio["ci95"],
        "share_closer": float(np.mean(near < limit)) if known else None,
        "first_percentile": limit,
    }


@functools.cache
def metrics_table():
    """Return {key: {unit, meaning, good, bad}} in the order of display."""
    path = RESOURCES / "metrics.csv"
    table = pd.read_csv(path, index_col="key", keep_default_na=False)
    return table.to_dict("index")


# --------------------------------------------------------------- 6. Figures

DPI = 150
SCREEN_DPI = 90  # of what TensorBoard shows: a quarter of the time
LINE = 0.14  # inches, of a caption


class Row(typing.NamedTuple):
    """A row of `image_grid`: in grey on [0, 1], unless it has another look."""

    title: str  # left of the cells
    cells: typing.Any  # list or array of images, (h, w) or (h, w, 1)
    captions: typing.Any = ()  # below the cells
    high: float = 1.0  # value of the brightest colour
    cmap: str = "gray"
    unit: str = ""  # of the scale, right of the cells; "": none


def heat_row(title, planes, unit, captions=(), high=None):
    """Return a `Row` in colours up to the 99.9th percentile of (N, h, w)."""
    high = high or max(float(np.percentile(planes, 99.9)), 0.01)
    return Row(title, planes, captions, high, "magma", unit)


def _save_figure(figure, path):
    """Write a figure as PNG, to a path or into an open file."""
    if hasattr(path, "write"):
        figure.savefig(path, format="png", dpi=SCREEN_DPI)
    else:
        write_atomic(path, lambda p: figure.savefig(p, format="png", dpi=DPI))


def image_grid(path, rows, title=""):
    """Draw `Row`s of images close together on black: every picture of a run.

    All cells are stretched over the size of the first one.
    """
    columns = max(len(row.cells) for row in rows)
    wide = min(1.6, 14 / columns)  # inches across an image
    high = wide * np.divide(*np.shape(rows[0].cells[0])[:2])
    lines = [
        max((1 + text.count("\n") for text in row.captions), default=0)
        for row in rows
    ]
    downs = np.cumsum([0, *(high + 0.03 + LINE * n for n in lines)])
    left = 1.1 if any(row.title for row in rows) else 0.1
    right = 0.9 if any(row.unit for row in rows) else 0.1
    top = 0.1 + 0.2 * len(title.splitlines())
    width = left + columns * (wide + 0.03) + right
    width = max(width, 4, *(0.075 * len(x) for x in title.splitlines()))
    height = top + downs[-1] + 0.1

    figure = _figures.Figure((width, height), facecolor="black")
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    ax.axis("off")
    write = functools.partial(ax.text, color="white", fontsize=8, va="top")
    write(width / 2, 0.08, title, ha="center", fontsize=10)
    for row, y in zip(rows, top + downs[:-1], strict=True):
        write(left - 0.1, y + high / 2, row.title, ha="right", va="center")
        cells = itertools.zip_longest(row.cells, row.captions, fillvalue="")
        for column, (cell, text) in enumerate(cells):
            x = left + column * (wide + 0.03)
            look = {"vmin": 0, "vmax": row.high, "interpolation": "nearest"}
            look |= {"extent": (x, x + wide, y + high, y), "aspect": "auto"}
            drawn = ax.imshow(cell, row.cmap, **look)
            write(x + wide / 2, y + high + 0.03, text, ha="center", fontsize=7)
        if row.unit:
            corner = (x + wide + 0.08) / width, 1 - (y + high) / height
            scale = figure.add_axes((*corner, 0.08 / width, high / height))
            scale.tick_params(colors="white", labelsize=7)
            bar = figure.colorbar(drawn, cax=scale)
            bar.set_label(row.unit, color="white", fontsize=8)
    _save_figure(figure, path)


def plot_samples(path, images, title, captions=(), columns=8):
    """Draw every image given, in order."""
    parts = [slice(k, k + columns) for k in range(0, len(images), columns)]
    rows = [Row("", images[part], captions[part]) for part in parts]
    image_grid(path, rows, title)


def plot_pairs(path, above, below, title, captions, high=None):
    """Draw two `Row`s of images, and how they differ."""
    apart = np.abs(np.subtract(above.cells, below.cells))
    third = heat_row("|difference|", apart, "intensity", captions, high)
    image_grid(path, [above, below, third], title)


def plot_reconstructions(
    path, originals, results, scores, title="reconstruction", captions=()
):
    """Draw originals, reconstructions with their SSIM, and differences."""
    texts = [f"SSIM {value:.3f}" for value in scores]
    rows = Row("original", originals), Row("reconstruction", results, texts)
    plot_pairs(path, *rows, title, captions)


def plot_index_maps(path, images, indices_per_level, num_embeddings):
    """Draw images above their index maps, one row a level, bottom first."""
    # Neighbouring indices are unrelated: neighbouring colours should differ.
    shuffle = np.random.default_rng(0).permutation(num_embeddings)
    look = {"high": num_embeddings - 1, "cmap": "nipy_spectral"}
    rows = [Row("image", images)]
    for level, indices in enumerate(indices_per_level, start=1):
        name = f"level {level}\n{size_text(indices.shape[1:])}"
        rows.append(Row(name, shuffle[indices], **look))
    image_grid(path, rows, f"Indices of {num_embeddings} code vectors")


def plot_completions(path, originals, kept, completions, title):
    """Draw a row an image: original, kept, completions, how they differ.

    At most 16 images and 8 completions of each, of (N, n, H, W); the standard
    deviation of each pixel is over all of them.
    """
    completions = completions[:16]
    deviation = completions.std(axis=1)
    white = max(float(np.percentile(deviation, 99.9)), 0.01)
    columns = originals, kept, completions[:, :8], deviation / white
    names = [f"sampled {k + 1}" for k in range(columns[2].shape[1])]
    names = ["original", "kept", *names, f"deviation / {white:.2f}"]
    cells = [[a, b, *c, d] for a, b, c, d in zip(*columns, strict=False)]
    image_grid(path, [Row("", row, names) for row in cells], title)


# Metrics worth a panel each, in this order, where a stage has them.
CURVES = ("loss", "ssim", "bits_per_code", "perplexity", "codebook_usage")


def plot_history(path, history):
    """Draw the curves of `history.csv`, a row a stage, training and val."""
    stages = history.groupby("stage", sort=False)
    size = 4.2 * len(CURVES), 3 * len(stages)
    figure = _figures.Figure(size, layout="constrained")
    figure.suptitle("Training")
    axes = figure.subplots(len(stages), len(CURVES), squeeze=False)
    for panels, (stage, rows) in zip(axes, stages, strict=True):
        curves = rows.set_index("epoch").dropna(axis=1, how="all")
        for ax, name in zip(panels, CURVES, strict=True):
            shown = curves.filter(regex=rf"^(val_)?{name}$")
            ax.set_visible(not shown.empty)
            if not shown.empty:
                title = f"{stage}: {name.replace('_', ' ')}"
                shown = shown.interpolate(limit_area="inside")
                shown.plot(ax=ax, style=".-", title=title)
                ax.xaxis.get_major_locator().set_params(integer=True)
    _save_figure(figure, path)


def plot_codebook(path, counts_per_level):
    """Draw how often each code vector is used, most used first."""
    levels = len(counts_per_level)
    figure = _figures.Figure((5.5 * levels, 3.4), layout="constrained")
    axes = figure.subplots(1, levels, squeeze=False)[0]
    for k, counts in enumerate(counts_per_level):
        ax, size, used = axes[k], len(counts), np.count_nonzero(counts)
        ax.stairs(np.sort(counts)[::-1], fill=True)
        ax.axhline(np.mean(counts), color="C1", lw=1, label="even use")
        title = f"Codebook, level {k + 1}: {used} of {size} used"
        title += f" ({used / size:.0%})"
        ax.set(title=title, xlabel="code vector, by use", ylabel="uses")
        ax.set(ylim=(0.8, 2 * max(*counts, 1)), yscale="log", xlim=(0, size))
        ax.legend(fontsize=8)
    _save_figure(figure, path)


def log_figure(tag, plot, *args):
    """Show TensorBoard the picture that `plot(file, *args)` writes."""
    file = io.BytesIO()
    plot(file, *args)
    tf.summary.image(tag, tf.io.decode_png(file.getvalue(), channels=3)[None])


def spread(total, count):
    """Return up to `count` row numbers spread evenly over `total` rows.

    >>> spread(10, 3).tolist()
    [1, 5, 8]
    """
    count = min(count, total)
    return ((np.arange(count) + 0.5) * total / max(count, 1)).astype(int)


def choose_rows(total, count):
    """Return up to `count` of `total` row numbers, sorted; always the same.

    Rows spread evenly might all be of one slice position.
    """
    return np.sort(np.random.default_rng(0).permutation(total)[:count])


def to_pixels(images):
    """Return images in [0, 1] as 8-bit grey levels, uint8."""
    return np.round(np.clip(images, 0, 1) * 255).astype("uint8")


def write_png(path, pixels):
    """Write one image, `(H, W)` uint8, as a grey PNG, atomically."""
    write_atomic(path, _image.fromarray(pixels).save)


def read_png(path):
    """Read what `write_png` wrote."""
    with _image.open(path, formats=["PNG"]) as image:
        return np.asarray(image)


def progress_bar(name, unit):
    """Return a wrapper of an iterable that shows progress and time left."""
    from tqdm import tqdm

    options = {"desc": name, "unit": unit, "leave": False, "disable": None}
    return functools.partial(tqdm, **options)
