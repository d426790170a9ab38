"""What every script shares. Sections, in this order:

1. Errors       one-line user errors with exit codes, `run_main`, `lazy_import`
2. Flags        a dataclass field is a flag: `flag`, `positional`, `parse`
3. Settings     `Config`, the recipes, `resolve`
4. Run folder   `Run`, atomic writes, model files, reading what a run holds
5. Seeds        `set_seed`, `choose_precision`, `choose_strategy`, workers
6. Metrics      SSIM and relatives, codebook statistics, sets of images, copies,
                lesions
7. Figures      every picture of a run
8. Images       rows spread over a split, PNG files; progress bars

Only the standard library and NumPy are imported here, so that `--help` and a
mistyped flag answer at once; heavy packages are loaded on first use.
"""

import argparse
import contextlib
import dataclasses
import datetime
import difflib
import errno
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import numbers
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import types
import typing
import zipfile
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # Windows has other locks: there, folders have none
    fcntl = None

# TensorFlow's own log: what fails is raised as an exception too, and its graph
# optimizer reports every fusion that it gives up as an error.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"
# Its Python log warns of retracing whenever several models are trained.
logging.getLogger("tensorflow").setLevel(logging.ERROR)

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


RESOURCE_ERRNOS = {
    errno.ENOSPC: "free some disk space",
    errno.EDQUOT: "free some disk space",
    errno.EFBIG: "raise the file size limit",
    errno.EACCES: "check its permissions or choose another folder",
    errno.EPERM: "check its permissions or choose another folder",
    errno.EROFS: "choose another folder",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "check the disk",
}
TENSORFLOW_NOTICES = r"WARNING: All log messages before|[IW]\d{4} |.*cuInit"
_FIRST_IMPORT = threading.RLock()
MEMORY_ADVICE = "use a smaller --batch-size or --image-size"


class _LazyModule:
    """Stand-in for a module, imported at its first use."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        # Tools that look a module over (`__wrapped__`) must not import it.
        if attribute.startswith("__") and attribute != "__version__":
            raise AttributeError(attribute)
        return getattr(_import_module(self._name), attribute)


def _import_module(name):
    """Import a module; without notices if it is the first to use TensorFlow."""
    with _FIRST_IMPORT:  # file descriptor 2 is the process's, not a thread's
        if name in sys.modules or "tensorflow" in sys.modules:
            return importlib.import_module(name)
        with _quiet_start():
            module = importlib.import_module(name)
            if "tensorflow" in sys.modules:  # its notices on GPUs come now
                sys.modules["tensorflow"].config.list_physical_devices()
        return module


@contextlib.contextmanager
def _quiet_start():
    """Hold back TensorFlow's start-up notices; let all else through.

    They are written to file descriptor 2 before its log level is read.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            held.seek(0)
            for line in held.read().decode(errors="replace").splitlines():
                if not re.match(TENSORFLOW_NOTICES, line):
                    print(line, file=sys.stderr)


def lazy_import(name):
    """Return a stand-in for module `name`, imported at its first use."""
    return _LazyModule(name)


keras = lazy_import("keras")
ndimage = lazy_import("scipy.ndimage")
pd = lazy_import("pandas")
tf = lazy_import("tensorflow")


def _as_user_error(error):
    """Return the `UserError` that says what `error` means, or None."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in RESOURCE_ERRNOS:
        where = f"{error.filename}: " if error.filename else ""
        advice = RESOURCE_ERRNOS[error.errno]
        return ResourceError(f"{where}{error.strerror}; {advice}")
    # h5py and TensorFlow report a full disk in words only.
    if "No space left on device" in text:
        advice = RESOURCE_ERRNOS[errno.ENOSPC]
        return ResourceError(f"No space left on device; {advice}")
    lost = type(error).__name__ in ("UnavailableError", "AbortedError")
    if lost or "Collective ops is aborted" in text:
        found = re.search(r"/job:worker/(?:replica:\d+/)?task:(\d+)", text)
        worker = f"worker {found[1]}" if found else "a worker"
        return ResourceError(
            f"{worker} died or cannot be reached; once all workers are there, "
            "go on from the last checkpoint with --resume"
        )
    exhausted = type(error).__name__ == "ResourceExhaustedError"
    if exhausted or isinstance(error, MemoryError):
        return ResourceError(f"out of memory; {MEMORY_ADVICE}")
    return None


class Stopped(BaseException):
    """A signal ends the program; exit code 128 and its number.

    Like `KeyboardInterrupt` not an `Exception`: nothing should handle it.
    """

    def __init__(self, number):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StopSignals:
    """Notes SIGINT and SIGTERM, so that a training can save before it ends.

    >>> with StopSignals() as signals:
    ...     with signals.deferred():
    ...         train()  # after each batch: if signals.received, save and stop

    A signal that is not deferred, or the second one, raises `Stopped` at once.

    Attributes:
        received: number of the signal noted, 0 if there was none.
    """

    def __init__(self):
        self.received = 0
        self._deferred = False
        self._handlers = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.received or not self._deferred:
            raise Stopped(number)
        self.received = number
        name = signal.Signals(number).name
        # Not print: what this interrupts may be printing.
        os.write(
            1, f"{name}: saving after this step; again: at once\n".encode()
        )

    @contextlib.contextmanager
    def deferred(self):
        """Note a first signal; `stop` by the end of the block."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self.stop()

    def stop(self):
        """Raise `Stopped` if a signal was noted."""
        if self.received:
            raise Stopped(self.received)


def run_main(main, argv=None):
    """Call `main(argv)`; end with the exit codes of the README.

    A `UserError` becomes one line on stderr. Anything else is a defect of
    ours and keeps its traceback, as everything does under `--debug` or
    `MRI_VQVAE_DEBUG=1`.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in argv or os.environ.get("MRI_VQVAE_DEBUG") == "1"
    try:
        code = main(argv)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # `| head`: the interpreter must not flush again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except Exception as error:
        user_error = _as_user_error(error)
        if debug or user_error is None:
            raise
        lines = [str(user_error)]
        if isinstance(user_error, DataError):  # may list files, a line each
            lines = lines[0].split("\n")
        lines = [" ".join(line.split()) for line in lines]
        print("error:", "\n".join(lines), file=sys.stderr)
        sys.exit(user_error.exit_code)
    if code:
        sys.exit(code)


# ----------------------------------------------------------------- 2. Flags


def flag(
    default,
    help,
    low=None,
    high=None,
    choices=None,
    metavar=None,
    *,
    above=None,
    below=None,
    section=None,
    short=None,
):
    """Declare a setting: a dataclass field that `parse` offers as a flag.

    Args:
        default: value without the flag.
        help: what it is, with its unit.
        low, high: inclusive bounds, of each side for an image size.
        choices: the values allowed.
        metavar: name of the value in `--help`.
        above, below: exclusive bounds.
        section: starts a section of `--help` at this flag.
        short: one-letter form such as "-n".
    """
    metadata = {k: v for k, v in locals().items() if k != "default"}
    return dataclasses.field(default=default, metadata=metadata)


def positional(help, many=False, default=dataclasses.MISSING):
    """Declare an argument without a flag; required unless it has a default.

    With `many` the field is a `tuple[str, ...]`.
    """
    metadata = {"help": help, "positional": True, "many": many}
    return dataclasses.field(default=default, kw_only=True, metadata=metadata)


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line that begins with the flag."""

    def __init__(self, **kwargs):
        kwargs["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        raise FlagError(message.removeprefix("argument "))


def flag_name(field):
    """How a command line names a field of a configuration."""
    if field.metadata.get("positional"):
        return field.name.upper()
    return "--" + field.name.replace("_", "-")


def _field_types(config_class):
    """Return {field name: (type, whether None is allowed)}."""
    result = {}
    for name, hint in typing.get_type_hints(config_class).items():
        optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
        if optional:
            hint = next(a for a in typing.get_args(hint) if a is not type(None))
        result[name] = hint, optional
    return result


def size_text(size):
    """Return an image size (H, W) as it is typed: HxW."""
    return "x".join(str(side) for side in size)


def _bounds(field):
    return [field.metadata.get(k) for k in ("low", "above", "high", "below")]


def _expected(field, kind):
    """Return in words what a flag takes: type, choices, bounds."""
    if field.metadata.get("choices"):
        return "one of " + ", ".join(map(str, field.metadata["choices"]))
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        tuple[int, int]: "H or HxW with sides",
    }
    low, above, high, below = _bounds(field)
    left = f"[{low}, " if low is not None else f"({above}, "
    right = f"{high}]" if high is not None else f"{below})"
    interval = "" if low is above else f" in {left}{right}"
    return words.get(kind, "text") + interval.replace("None", "inf")


def _is_allowed(value, field, kind):
    """Return whether `value` has the type, choices and bounds of a field."""
    if field.metadata.get("choices") and value not in field.metadata["choices"]:
        return False
    if kind is bool or kind is str:
        return isinstance(value, kind)
    if kind == tuple[str, ...]:
        return all(isinstance(item, str) for item in value)
    if kind == tuple[int, int]:
        if not isinstance(value, tuple) or len(value) != 2:
            return False
        return all(_is_allowed(side, field, int) for side in value)

    number = numbers.Integral if kind is int else numbers.Real
    if not isinstance(value, number) or isinstance(value, bool):
        return False
    low, above, high, below = _bounds(field)
    return (
        math.isfinite(value)
        and (low is None or value >= low)
        and (above is None or value > above)
        and (high is None or value <= high)
        and (below is None or value < below)
    )


def check_fields(config):
    """Raise `FlagError` unless every field has an allowed value."""
    kinds = _field_types(type(config))
    for field in dataclasses.fields(config):
        kind, optional = kinds[field.name]
        value = getattr(config, field.name)
        if optional and value is None:
            continue
        if not _is_allowed(value, field, kind):
            _refuse(field, kind, value)


def _refuse(field, kind, value):
    found = value if isinstance(value, (int, float)) else repr(value)
    name, expected = flag_name(field), _expected(field, kind)
    raise FlagError(f"{name}: expected {expected}, found {found}")


def _converter(field, kind, optional):
    """Return the function that reads the text of a flag."""

    def convert(text):
        if optional and kind is not str and text == "none":
            return None
        try:
            if kind == tuple[int, int]:
                sides = re.fullmatch(r"(\d+)(?:x(\d+))?", text).groups()
                return int(sides[0]), int(sides[1] or sides[0])
            return kind(text) if kind in (int, float) else text
        except (AttributeError, ValueError):
            _refuse(field, kind, text)

    return convert


def _help_text(field, kind, optional):
    """Return help, bounds and default of a flag, safe for argparse."""
    notes = []
    expected = _expected(field, kind)
    if " in " in expected or field.metadata.get("choices"):
        notes.append(expected)
    if optional and kind is not str:
        notes.append("or none")
    default = field.default
    if default not in (None, dataclasses.MISSING, ()):
        default = size_text(default) if isinstance(default, tuple) else default
        notes.append(f"default {default}")
    text = field.metadata["help"] + (f" ({'; '.join(notes)})" if notes else "")
    return text.replace("%", "%%")


def _add_flag(group, field, kind, optional):
    """Add the flag of one field; absent flags leave no trace."""
    data = field.metadata
    options = {"default": argparse.SUPPRESS}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = _converter(field, kind, optional)
        options["metavar"] = data.get("metavar") or _metavar(field, kind)
    required = field.default is dataclasses.MISSING
    if data.get("positional"):
        options["nargs"] = ("+" if required else "*") if data["many"] else "?"
        if required and not data["many"]:
            del options["nargs"]
        names = [field.name]
    else:
        if kind == tuple[str, ...]:
            options["nargs"] = "+"
        names = [name for name in (data["short"], flag_name(field)) if name]
    action = group.add_argument(*names, **options)
    action.help = _help_text(field, kind, optional)


def _metavar(field, kind):
    if field.metadata.get("positional"):
        return field.name.upper()
    names = {int: "N", float: "X", tuple[int, int]: "H[xW]"}
    return names.get(kind, "NAME")


def _add_flags(parser, config_class):
    """Add every field of a configuration, section by section."""
    kinds = _field_types(config_class)
    group = parser
    for field in dataclasses.fields(config_class):
        if field.metadata.get("section"):
            group = parser.add_argument_group(field.metadata["section"])
        _add_flag(group, field, *kinds[field.name])
    if "debug" not in kinds:
        parser.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,
            help="show the traceback of an error",
        )


def _read_arguments(parser, argv, classes):
    """Return {name: value} of the arguments given, refusing unknown ones."""
    argv = sys.argv[1:] if argv is None else list(argv)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        fields = [f for c in classes for f in dataclasses.fields(c)]
        name = unknown[0].split("=")[0]
        known = [flag_name(field) for field in fields]
        near = [flag_name for flag_name in known if flag_name.startswith(name)]
        near = near or difflib.get_close_matches(name, known, 1)
        advice = f"did you mean {near[0]}?" if near else "see --help"
        raise FlagError(f"{name}: unknown argument; {advice}")
    values = vars(namespace).items()
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values}


def _build(config_class, values):
    names = {field.name for field in dataclasses.fields(config_class)}
    return config_class(**{k: v for k, v in values.items() if k in names})


def parse(config_class, argv=None, description=None):
    """Return the configuration that a command line asks for.

    Args:
        config_class: dataclass of `flag` and `positional` fields whose
            `__post_init__` calls `check_fields`.
        argv: arguments without the program name, by default those of the
            process.
        description: text of `--help`, by default the class docstring.
    """
    parser = _Parser(description=description or config_class.__doc__)
    _add_flags(parser, config_class)
    return _build(config_class, _read_arguments(parser, argv, [config_class]))


def parse_verbs(verbs, argv=None, description=None, default=None):
    """Return (verb, configuration) of a command line with verbs.

    Args:
        verbs: {verb: configuration class}; docstrings are the help.
        argv, description: as in `parse`.
        default: verb meant by a command line that is empty or begins with a
            folder.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(description=description)
    commands = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, config_class in verbs.items():
        text = config_class.__doc__.strip()
        summary = text.split("\n")[0].replace("%", "%%")
        command = commands.add_parser(verb, help=summary, description=text)
        _add_flags(command, config_class)
    if default and (
        not argv or (argv[0] not in verbs and os.path.isdir(argv[0]))
    ):
        argv = [default, *argv]
    values = _read_arguments(parser, argv, verbs.values())
    verb = values.pop("verb")
    return verb, _build(verbs[verb], values)


# -------------------------------------------------------------- 3. Settings


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A named set of flag values; any flag overrides it."""

    description: str
    source: str
    figure: str
    settings: dict
    search: dict | None = None  # by default SEARCH_SPACE


_PIXELCNN = "VQ-VAE (arXiv:1711.00937), PixelCNN (arXiv:1601.06759)"

# Shared by recipes: an SSIM term needs small batches and a high rate; a prior
# is told where it is; a deep one on a grid of a few thousand training images.
_SSIM_LOSS = {"ssim_weight": 1.0, "learning_rate": 1e-3, "batch_size": 16}
_TOLD_PLACE = {"position_features": True, "condition": "slice"}
_DEEP_PRIOR = {
    **_TOLD_PLACE,
    "prior_blocks": 8,
    "prior_kernel_size": 5,
    "prior_head_layers": 1,
    "prior_dropout": 0.1,
    "prior_learning_rate": 1e-3,
}

# What --tune tries: bounds, of whole numbers where these are whole, or choices.
# Names that begin with prior are tried with --objective ssim+bits only.
SEARCH_SPACE = {
    "channels": {"choices": (32, 64, 128)},
    "residual_blocks": {"low": 1, "high": 4},
    "num_embeddings": {"choices": (64, 128, 256, 512)},
    "embedding_dim": {"choices": (16, 32, 64)},
    "commitment_cost": {"low": 0.1, "high": 2.0, "log": True},
    "ssim_weight": {"low": 0.0, "high": 2.0},
    "learning_rate": {"low": 1e-4, "high": 3e-3, "log": True},
    "prior_channels": {"choices": (32, 64, 96, 128)},
    "prior_blocks": {"low": 2, "high": 8},
    "prior_dropout": {"low": 0.0, "high": 0.3},
    "prior_learning_rate": {"low": 1e-4, "high": 3e-3, "log": True},
}

RECIPES = {
    "quickstart": Recipe(
        description="simulated brains, sized for two CPU cores",
        source=_PIXELCNN,
        figure="-",
        settings={
            **_SSIM_LOSS,
            "cache": True,
            "downsampling": 4,
            "channels": 64,
            "num_embeddings": 256,
            "embedding_dim": 32,
            "epochs": 12,
            "prior_channels": 96,
            "prior_blocks": 8,
            "prior_kernel_size": 5,
            "prior_head_layers": 1,
            "position_features": True,
            "condition": "label,slice",
            "prior_epochs": 10,
            "prior_batch_size": 16,
            "prior_learning_rate": 2e-3,
        },
    ),
    "adni-vqvae-pixelcnn": Recipe(
        description="few wide codes on a coarse grid",
        source=_PIXELCNN,
        figure="test SSIM 0.823 (9000 images), 0.6481 nats/code",
        settings={
            **_TOLD_PLACE,
            "dataset": "adni",
            "image_size": (240, 256),
            "downsampling": 8,
            "num_embeddings": 32,
            "embedding_dim": 128,
            "codebook_update": "gradient",
            "commitment_cost": 0.25,
            "learning_rate": 1e-3,
            "batch_size": 32,
            "epochs": 30,
            "prior_channels": 128,
            "prior_blocks": 2,
            "prior_head_layers": 2,
            "prior_learning_rate": 3e-4,
            "prior_batch_size": 64,
            "prior_epochs": 100,
        },
    ),
    "adni-vqvae-tuned": Recipe(
        description="the result of a search over settings, on a fine grid",
        source=_PIXELCNN,
        figure="test SSIM 0.9163",
        settings={
            **_TOLD_PLACE,
            **_SSIM_LOSS,
            "dataset": "adni",
            "image_size": (240, 256),
            "downsampling": 4,
            "num_embeddings": 256,
            "embedding_dim": 32,
            "channels": 64,
            "epochs": 30,
            "prior_blocks": 2,
            "prior_head_layers": 2,
        },
        search={
            **SEARCH_SPACE,
            "downsampling": {"choices": (4, 8)},
            "num_embeddings": {"choices": (128, 256, 512)},
            "embedding_dim": {"choices": (16, 32, 64, 128)},
            "batch_size": {"choices": (16, 32)},
        },
    ),
    "oasis-vqvae2-pixelsnail": Recipe(
        description="two grids: the fine one conditioned on the coarse one",
        source="VQ-VAE-2 (arXiv:1906.00446), PixelSNAIL (arXiv:1712.09763)",
        figure='"SSIM 97%" (about 10 images)',
        settings={
            **_DEEP_PRIOR,
            **_SSIM_LOSS,
            "dataset": "oasis",
            "image_size": (256, 256),
            "levels": 2,
            "downsampling": 4,
            "channels": 64,
            "num_embeddings": 512,
            "embedding_dim": 64,
            "learning_rate": 5e-4,  # at 1e-3 gradients spiked in some runs
            "batch_size": 8,
            "epochs": 20,
            "prior": "pixelsnail",
            "prior_channels": 64,
            "prior_attention": "top",
            "prior_epochs": 20,
            "prior_batch_size": 8,
            "prior_ema_momentum": 0.99,
        },
    ),
    "hipmri-vqvae-pixelcnn": Recipe(
        description="pelvises from NIfTI, on a grid twice as high as wide",
        source="VQ-VAE (arXiv:1711.00937), Gated PixelCNN (arXiv:1606.05328)",
        figure="SSIM > 0.6 (plot); best seen elsewhere 0.9366",
        settings={
            **_DEEP_PRIOR,
            **_SSIM_LOSS,
            "dataset": "hipmri",
            "image_size": (256, 128),
            "downsampling": 4,
            "num_embeddings": 512,
            "embedding_dim": 64,
            "epochs": 15,
            "prior": "gated",
            "prior_channels": 64,
            "prior_epochs": 30,
            "prior_batch_size": 16,
        },
    ),
    "oasis-vqvae-pixelcnn": Recipe(
        description="narrow network trained for SSIM as well",
        source=_PIXELCNN,
        figure="test SSIM 0.8545 (544 images)",
        settings={
            **_DEEP_PRIOR,
            **_SSIM_LOSS,
            "dataset": "oasis",
            "image_size": (256, 256),
            "downsampling": 8,
            "channels": 64,
            "num_embeddings": 512,
            "epochs": 30,
            "prior_channels": 96,
            "prior_batch_size": 32,
        },
    ),
}

REAL_DATASETS = ("oasis", "adni", "hipmri")
CONDITIONS = ("label", "slice")
ATTENTION_HEADS = 8  # of a PixelSNAIL
LEAST_USAGE = 0.02  # of a codebook over the training images
SMOKE_STEPS = 3
SMOKE_IMAGES = 8
SMOKE_SUBJECTS = 4
_SMOKE_CAPS = {
    "phantom_subjects": 4,
    "channels": 16,
    "residual_channels": 8,
    "num_embeddings": 32,
    "embedding_dim": 8,
    "epochs": 1,
    "batch_size": 4,
    "warmup_steps": 1,
    "prior_channels": 16,
    "prior_blocks": 1,
    "prior_epochs": 1,
    "prior_batch_size": 4,
    "num_samples": 4,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a VQ-VAE and a prior over its indices on 2-D MRI slices."""

    # data
    recipe: str = flag(
        "quickstart",
        "named set of flag values",
        choices=tuple(RECIPES),
        section="data",
    )
    dataset: str = flag(
        "phantom", "layout of the data", choices=("phantom", *REAL_DATASETS)
    )
    data_dir: str | None = flag(
        None, "folder of a real data set", metavar="DIR"
    )
    phantom_subjects: int = flag(80, "simulated subjects", 3, 100_000)
    image_size: tuple[int, int] | None = flag(
        None,
        "height and width trained at, in pixels, a multiple of the total "
        "downsampling; without it the most common size of the data",
        16,
        4096,
    )
    resize: bool = flag(False, "resample images of another size")
    cache: bool = flag(False, "hold all images in memory, one byte a pixel")
    skip_bad: bool = flag(False, "leave out unfit files instead of stopping")

    # VQ-VAE
    levels: int = flag(
        1, "latent grids, each half the one below", 1, 3, section="VQ-VAE"
    )
    downsampling: int = flag(
        4, "pixels per bottom latent, each way", choices=(2, 4, 8, 16, 32)
    )
    channels: int = flag(128, "feature channels", 1, 4096)
    residual_blocks: int = flag(2, "residual blocks per stack", 0, 64)
    residual_channels: int = flag(32, "channels inside a block", 1, 4096)
    num_embeddings: int = flag(512, "code vectors, K", 2, 65_536)
    embedding_dim: int = flag(64, "length of a code vector, D", 1, 4096)
    codebook_update: str = flag(
        "ema", "how code vectors learn", choices=("ema", "gradient")
    )
    codebook_distance: str = flag(
        "euclidean",
        "how latents are compared with code vectors",
        choices=("euclidean", "cosine"),
    )
    commitment_cost: float = flag(0.25, "weight of commitment, beta", 0, 100)
    decay: float = flag(0.99, "moving-average factor per step", 0, below=1)
    restart: bool = flag(True, "restart dead codes from the batch")
    ssim_weight: float = flag(
        0.0, "weight of 1 - SSIM in the reconstruction loss", 0, 1000
    )
    upper_weight: float = flag(
        0.25, "weight of the image as each upper level alone shows it", 0, 1000
    )
    epochs: int = flag(30, "passes over the training images", 1, 100_000)
    batch_size: int = flag(32, "images per step", 1, 65_536)
    learning_rate: float = flag(3e-4, "Adam's step size", above=0, high=1)
    schedule: str = flag(
        "cosine", "learning rate over time", choices=("cosine", "constant")
    )
    warmup_steps: int = flag(
        100, "steps of linear warm-up, both stages", 0, 1_000_000
    )

    # prior
    prior: str = flag(
        "pixelcnn",
        "network, one for each level",
        choices=("pixelcnn", "gated", "pixelsnail"),
        section="prior",
    )
    prior_channels: int = flag(128, "feature channels", 1, 4096)
    prior_blocks: int = flag(5, "residual blocks", 1, 128)
    prior_kernel_size: int = flag(
        7, "first kernel, in latents", choices=(3, 5, 7, 9, 11, 13, 15)
    )
    prior_head_layers: int = flag(2, "1x1 layers after the blocks", 0, 16)
    prior_dropout: float = flag(0.0, "share of features dropped", 0, high=0.9)
    prior_attention: str = flag(
        "top",
        "levels at which a pixelsnail attends to all codes before",
        choices=("top", "all", "none"),
    )
    position_features: bool = flag(
        False, "give every layer sine features of the grid position"
    )
    condition: str = flag(
        "none", "what the prior is told: none, or a comma list of label, slice"
    )
    condition_dropout: float = flag(
        0.1, "share of conditions hidden in training, for guidance", 0, 0.9
    )
    patience: int = flag(
        10, "epochs without better validation bits until the end", 1, 100_000
    )
    prior_epochs: int = flag(100, "passes over the training grids", 1, 100_000)
    prior_batch_size: int = flag(64, "grids per step", 1, 65_536)
    prior_learning_rate: float = flag(3e-4, "Adam's step size", above=0, high=1)
    prior_ema_momentum: float = flag(
        0.0,
        "average the weights over steps with this factor; 0: do not",
        0,
        below=1,
    )
    prior_augment: int = flag(
        0, "jittered copies of the training images encoded besides", 0, 1000
    )

    # run
    stage: str = flag(
        "all",
        "what to train; prior needs the --run-dir of a trained VQ-VAE",
        choices=("all", "vqvae", "prior"),
        section="run",
    )
    run_dir: str | None = flag(
        None, "folder of results (default runs/RECIPE-DATE-TIME)", metavar="DIR"
    )
    resume: str | None = flag(
        None, "go on with the training of this run folder", metavar="RUN"
    )
    prior_level: int | None = flag(
        None, "train the prior of this level only, 1 the bottom", 1, 3
    )
    checkpoint_minutes: float = flag(
        5.0, "save the training whenever so long has passed; 0: never", 0, 1e6
    )
    checkpoint_steps: int = flag(
        0, "save the training after every so many steps; 0: never", 0, 10**9
    )
    picture_epochs: int = flag(
        20,
        "epochs between pictures for TensorBoard, besides the first and the "
        "last; 0: never",
        0,
        100_000,
    )
    precision: str = flag(
        "auto",
        "dtype of the arithmetic",
        choices=("auto", "float32", "mixed_bfloat16", "mixed_float16"),
    )
    strategy: str = flag(
        "auto",
        "devices to train on: mirrored, all GPUs of this machine; "
        "multiworker, the machines in TF_CONFIG",
        choices=("auto", "none", "mirrored", "multiworker"),
    )
    accumulation_steps: int = flag(
        1,
        "parts that a batch is taken in, one after the other, to save memory",
        1,
        65_536,
    )
    recompute: bool = flag(
        False, "compute a prior's blocks again for gradients, to save memory"
    )
    jit: bool = flag(False, "compile training steps with XLA")
    seed: int = flag(0, "seed of every random choice", 0, 2**31 - 1)
    evaluate: bool = flag(
        True, "measure and draw at the end; predict.py evaluate does, too"
    )
    num_samples: int = flag(
        256, "images generated at the end, to be measured", 1, 5_000
    )
    temperature: float = flag(1.0, "of sampling", above=0, high=10)
    force: bool = flag(False, "train a prior even over a collapsed codebook")
    smoke: bool = flag(False, "a few steps on a few images, to see it connect")
    debug: bool = flag(False, "show the traceback of an error")

    # search
    tune: int = flag(
        0,
        "search for settings until so many were tried, each for --epochs and "
        "--prior-epochs; 0: train once",
        0,
        100_000,
        section="search",
    )
    objective: str = flag(
        "ssim",
        "what a search is for. ssim: the SSIM of validation images, VQ-VAE "
        "only, poor trials end early; alone it picks models that sample "
        "badly. ssim+bits: that and few bits per validation image under the "
        "prior, both stages; Optuna ends no trial of two objectives early",
        choices=("ssim", "ssim+bits"),
    )

    def __post_init__(self):
        check_fields(self)
        if self.condition != "none":
            for name in self.conditions:
                if name not in CONDITIONS:
                    known = ", ".join(CONDITIONS)
                    raise FlagError(
                        "--condition: expected none or a comma list of "
                        f"{known}, found {self.condition!r}"
                    )
        if self.image_size:
            check_image_size(self.image_size, self.total_downsampling)
        if self.prior_level is not None and self.prior_level > self.levels:
            raise FlagError(
                f"--prior-level: expected up to --levels {self.levels}, found "
                f"{self.prior_level}"
            )
        if self.prior == "pixelsnail" and self.prior_channels % ATTENTION_HEADS:
            raise FlagError(
                f"--prior-channels: expected a multiple of {ATTENTION_HEADS} "
                f"for pixelsnail, found {self.prior_channels}"
            )
        if self.recompute and self.prior_dropout:
            # The second computation would drop other features.
            raise FlagError(
                "--recompute: expected --prior-dropout 0, found "
                f"{self.prior_dropout:g}"
            )
        self._check_data()

    def _check_data(self):
        if self.dataset == "phantom" and self.data_dir is not None:
            raise FlagError(
                "--data-dir: say which layout it has with --dataset "
                f"{'|'.join(REAL_DATASETS)} or a --recipe"
            )
        # With --stage prior the images are those that the VQ-VAE had.
        has_images = self.data_dir or self.smoke or self.stage == "prior"
        if self.dataset == "phantom" or has_images:
            return
        raise FlagError(
            f"--data-dir is required for --dataset {self.dataset}: the folder "
            "that holds its images (with --smoke they are simulated)"
        )

    @property
    def conditions(self):
        """What the prior is told, as a tuple of names."""
        if self.condition == "none":
            return ()
        return tuple(name.strip() for name in self.condition.split(","))

    @property
    def total_downsampling(self):
        """Pixels per top latent, each way."""
        return self.downsampling * 2 ** (self.levels - 1)

    def smoked(self):
        """Return these settings shrunk to a run of seconds."""
        fixed = _fixed_by_vqvae(type(self)) if self.stage == "prior" else ()
        small = {
            name: min(getattr(self, name), cap)
            for name, cap in _SMOKE_CAPS.items()
            if name not in fixed
        }
        return dataclasses.replace(self, **small)


def check_image_size(size, multiple, name="--image-size"):
    """Raise `FlagError` unless both sides of `size` divide by `multiple`."""
    if all(side % multiple == 0 for side in size):
        return
    smaller = [side // multiple * multiple for side in size]
    larger = [-(-side // multiple) * multiple for side in size]
    fits = [size_text(fit) for fit in (smaller, larger) if min(fit) >= 16]
    raise FlagError(
        f"{name}: {size_text(size)} is not a multiple of {multiple}; "
        f"use {' or '.join(fits)}"
    )


class _ListRecipes(argparse.Action):
    """`--list-recipes`: print the table and end, like `--help`."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(list_recipes())
        parser.exit()


def resolve(argv=None, config_class=Config, description=None):
    """Return the `Config` of a command line.

    Flags given win over the recipe, the recipe over the defaults. With
    `--stage prior` they win over the settings of the run in `--run-dir`, but
    for those that its VQ-VAE was trained with.

    Raises:
        FlagError: if a flag is out of bounds or contradicts another.
        RunError: if `--stage prior` is not given the folder of a run.
    """
    given = read_flags(argv, config_class, description)
    if given.get("tune"):
        _check_search(given)
    if "resume" in given:
        return _build(config_class, _resumed_settings(config_class, given))
    if given.get("stage") == "prior":
        return _build(config_class, _prior_settings(config_class, given))
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    recipe = given.get("recipe", fields["recipe"].default)
    if recipe not in RECIPES:
        _refuse(fields["recipe"], str, recipe)
    return _build(config_class, {**RECIPES[recipe].settings, **given})


def read_flags(argv=None, config_class=Config, description=None):
    """Return {name: value} of the flags that a command line gives."""
    parser = _Parser(description=description or config_class.__doc__)
    parser.add_argument(
        "--list-recipes",
        action=_ListRecipes,
        nargs=0,
        default=argparse.SUPPRESS,
        help="show every recipe and exit",
    )
    _add_flags(parser, config_class)
    return _read_arguments(parser, argv, [config_class])


def _check_search(given):
    """Refuse flags that contradict `--tune`."""
    stage = given.get("stage")
    for name, refused in (
        ("resume", "resume" in given),
        ("stage prior", stage == "prior"),
        (
            "stage vqvae --objective ssim+bits",
            stage == "vqvae" and given.get("objective") == "ssim+bits",
        ),
        ("prior-level", "prior_level" in given),
    ):
        if refused:
            raise FlagError(
                f"--tune does not go with --{name}: a search trains every "
                "trial from the beginning; to go on with one, repeat its "
                "command with its --run-dir"
            )


# What a search is judged by, and which way is better.
OBJECTIVES = {
    "ssim": {"ssim": "maximize"},
    "ssim+bits": {"ssim": "maximize", "bits_per_image": "minimize"},
}


def _prior_settings(config_class, given):
    """Return the settings of `--stage prior`: those of its run, then flags."""
    if "run_dir" not in given:
        raise FlagError(
            "--stage prior needs --run-dir: the folder of a run that holds a "
            "trained VQ-VAE"
        )
    run = Run.open(given["run_dir"], config_class)
    trained = dataclasses.asdict(run.config)
    if "image_size" in run.info:
        trained["image_size"] = tuple(run.info["image_size"])
    for name in _fixed_by_vqvae(config_class):
        if name in given and given[name] != trained[name]:
            flag_name = "--" + name.replace("_", "-")
            raise FlagError(
                f"{flag_name}: the VQ-VAE in {run.path} was trained with "
                f"{typed(trained[name])}, found {typed(given[name])}; leave "
                "the flag out, or train both anew without --stage prior"
            )
    once = ("smoke", "prior_level", *OF_COMMAND)
    trained = {k: v for k, v in trained.items() if k not in once}
    return {**trained, **given}


# May differ between the parts of one training, and between its commands.
OF_COMMAND = (
    "resume",
    "picture_epochs",
    "checkpoint_minutes",
    "checkpoint_steps",
    "strategy",
    "force",
    "debug",
)


def _resumed_settings(config_class, given):
    """Return the settings of `--resume`: those of its run, and no others."""
    run = Run.open(given["resume"], config_class)
    trained = run.info.get("training", {}).get("settings")
    trained = _load_config(
        config_class, trained or dataclasses.asdict(run.config), run.config_path
    )
    trained = dataclasses.asdict(trained)
    for name, value in given.items():
        if name not in OF_COMMAND and value != trained[name]:
            raise FlagError(
                f"--{name.replace('_', '-')}: {run.path} is trained with "
                f"{typed(trained[name])}, found {typed(value)}; leave the flag "
                "out, or start a new run"
            )
    return {**trained, **given}


def _fixed_by_vqvae(config_class):
    """Return the settings of the data and of the VQ-VAE, which fix a prior."""
    names = [field.name for field in dataclasses.fields(config_class)]
    both = {"cache", "schedule", "warmup_steps"}  # serve the prior as well
    return [n for n in names[: names.index("prior")] if n not in both]


def typed(value):
    """Return a setting as it is typed on the command line."""
    if isinstance(value, tuple):
        return size_text(value)
    return str(value).lower() if value in (None, True, False) else str(value)


def list_recipes():
    """Return the table of recipes as text."""
    rows = [("recipe", "data", "VQ-VAE", "prior", "figure of the original")]
    for name, recipe in RECIPES.items():
        values = {"data_dir": "DIR", "dataset": "oasis", **recipe.settings}
        config = Config(**values)
        data = recipe.settings.get("dataset", "phantom")
        size = config.image_size
        ssim_term = f", SSIM x {config.ssim_weight:g}"
        factors = [
            f"/{config.downsampling * 2**level}"
            for level in range(config.levels)
        ]
        vqvae = (
            f"{' and '.join(factors)}, K={config.num_embeddings}, "
            f"D={config.embedding_dim}, {config.codebook_update}, "
            f"{config.epochs} epochs"
        )
        rows.append(
            (
                name,
                f"{data} {size_text(size)}" if size else data,
                vqvae + (ssim_term if config.ssim_weight else ""),
                f"{config.prior} {config.prior_channels} ch, "
                f"{config.prior_blocks}+{config.prior_head_layers} layers, "
                f"{config.prior_epochs} epochs",
                recipe.figure,
            )
        )
    return align(rows)


def align(rows):
    """Return rows of text cells as a table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [c.ljust(w) for c, w in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


# ------------------------------------------------------------ 4. Run folder

FORMAT = 2
PACKAGES = ("tensorflow", "keras", "numpy", "pandas", "matplotlib", "nibabel")


def write_atomic(path, write, previous=None):
    """Let `write(temporary_path)` make a file, then move it to `path`.

    Whatever happens, `path` is either the old or the new complete file; or,
    with `previous`, where the old one is moved first, at least that is. A
    folder is written in the same way, if there is none yet or an empty one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        for written in (*temporary.rglob("*"), temporary):
            _sync(written)
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        _remove(temporary)


def remove_temporary_files(paths):
    """Remove those that `write_atomic` of a killed process left."""
    for path in list(paths):
        number = re.search(r"\.tmp-(\d+)", path.name)
        if number and not _is_alive(int(number[1])):
            _remove(path)


def _remove(path):
    """Remove a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _sync(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(value):
    """Return what `json` cannot write as something that it can."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"cannot write a {type(value).__name__} as JSON")


def write_json(path, value):
    """Write JSON atomically; a NaN or infinity is a `ValueError`."""
    text = json.dumps(
        value,
        allow_nan=False,
        default=_plain,
        ensure_ascii=False,
        indent=2,
        sort_keys=True,
    )
    write_atomic(path, lambda p: p.write_text(text + "\n", encoding="utf-8"))


def write_csv(path, frame):
    """Write a pandas table atomically, without its index."""
    # A file name need not be valid UTF-8.
    options = {"index": False, "errors": "surrogateescape"}
    write_atomic(path, lambda p: frame.to_csv(p, **options))


def file_sha256(path):
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def array_sha256(array):
    """Return the SHA-256 of an array's type, shape and values."""
    array = np.ascontiguousarray(array)
    header = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(header + array.tobytes()).hexdigest()


def package_versions():
    """Return {package: version} without importing any."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


class Run:
    """A run folder: settings, split, models, tables and figures.

    Attributes:
        path: Path of the folder.
        config: `Config` it was started with.
        info: dict of what `config.json` holds besides the settings:
            versions, command, image_size [H, W], latent_grids [[h, w], ...].
    """

    def __init__(self, path, config, info):
        self.path = Path(path)
        self.config = config
        self.info = info
        self.is_new = False
        self._lock = None
        self._settings = dataclasses.asdict(config)

    config_path = property(lambda self: self.path / "config.json")
    split_path = property(lambda self: self.path / "split.csv")
    rejected_path = property(lambda self: self.path / "rejected.csv")
    vqvae_path = property(lambda self: self.path / "vqvae.keras")
    prior_paths = property(
        lambda self: [self.path / f"{name}.keras" for name in self.prior_names]
    )
    indices_path = property(lambda self: self.path / "indices.npz")
    history_path = property(lambda self: self.path / "history.csv")
    evaluation_path = property(lambda self: self.path / "evaluation.json")
    checkpoint_path = property(lambda self: self.path / "checkpoint")
    lock_path = property(lambda self: self.path / "run.lock")
    figures_path = property(lambda self: self.path / "figures")
    card_path = property(lambda self: self.path / "MODEL_CARD.md")
    report_path = property(lambda self: self.path / "report.html")
    logs_path = property(lambda self: self.path / "logs")

    @property
    def prior_names(self):
        """Names of the priors, bottom first: of their files and stages."""
        names = {
            1: ["prior"],
            2: ["prior_bottom", "prior_top"],
            3: ["prior_bottom", "prior_middle", "prior_top"],
        }
        return names[self.config.levels]

    @property
    def has_priors(self):
        """Whether there is any: then loading names those that are missing."""
        return any(path.exists() for path in self.prior_paths)

    def external_paths(self, data_dir):
        """Evaluation file and figure folder of another data set.

        They have the name of its folder; a second folder of that name also
        has a hash of where it is.
        """
        place = os.path.abspath(data_dir)
        name = re.sub(r"[^\w.-]", "_", os.path.basename(place) or "root")
        path = self.path / f"evaluation-{name}.json"
        with _reading(path):
            taken = path.exists() and json.loads(path.read_text("utf-8"))
            if taken and taken["data"]["data_dir"] != place:
                name += f"-{hashlib.sha256(os.fsencode(place)).hexdigest()[:8]}"
        path = self.path / f"evaluation-{name}.json"
        return path, self.figures_path / name

    @classmethod
    def create(cls, config):
        """Make a new folder and prove that it can be written to.

        Raises:
            RunError: if the folder holds something already.
            ResourceError: if it cannot be made or written.
        """
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        path = Path(config.run_dir or f"runs/{config.recipe}-{now}")
        info = {
            "versions": package_versions(),
            "command": shlex.join(sys.argv),
            "started": now,
        }
        run = cls(path, config, info)
        try:
            run.is_new = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            run.lock()
            run._refuse_contents()
            run.begin(config)
        except OSError as error:
            run.unlock()
            raise ResourceError(
                f"{path}: cannot write a run folder here "
                f"({error.strerror}); choose another with --run-dir"
            ) from error
        except BaseException:
            run.unlock()
            raise
        return run

    def _refuse_contents(self):
        """Raise unless the folder is new or from a run that never began."""
        names = {entry.name for entry in self.path.iterdir()}
        names -= {self.lock_path.name}
        if names == {"config.json"}:
            type(self).open(self.path)
        elif names:
            raise RunError(
                f"{self.path}: the folder is not empty; choose another with "
                "--run-dir, or go on with its training with --resume"
            )

    def lock(self):
        """Keep other trainings out of the folder until `unlock`.

        The system lets go of the lock when the process dies, so one that a
        killed training left is told apart and taken over.

        Raises:
            RunError: if another process holds it.
        """
        self._lock = FileLock(self.lock_path)
        samples = self.path / "samples"  # maybe of another machine
        remove_temporary_files(
            path
            for path in self.path.rglob("*.tmp-*")
            if samples not in path.parents
        )

    def unlock(self):
        """Let other trainings into the folder again."""
        if self._lock:
            self._lock.release()
            self._lock = None

    def begin(self, config):
        """Note that a training with these settings is under way.

        Until it is complete, `settings` in `config.json` stay those of the
        models that are there.
        """
        self.config = config
        if self.checkpoint_path.exists():
            shutil.rmtree(self.checkpoint_path)
        training = {
            "command": shlex.join(sys.argv),
            "settings": dataclasses.asdict(config),
            "done": ["vqvae"] if config.stage == "prior" else [],
        }
        self.update(training=training)

    def is_done(self, part):
        """Whether the training under way is past `part`, such as "vqvae"."""
        return part in self.info["training"]["done"]

    def note_done(self, part):
        """Note that `part` is in its file, and forget its checkpoint."""
        training = self.info["training"]
        done = [*training["done"], part]
        self.update(training={**training, "done": done})
        for path in checkpoint_generations(self.checkpoint_path / part):
            path.unlink(missing_ok=True)

    def complete(self):
        """Note that nothing is left to do."""
        self._settings = self.info.pop("training")["settings"]
        self.update()
        shutil.rmtree(self.checkpoint_path, ignore_errors=True)

    @classmethod
    def open(cls, path, config_class=Config):
        """Read the folder of an earlier run; `RunError` if it is not one."""
        path = Path(path)
        file = path / "config.json"
        if not path.is_dir():
            raise RunError(f"{path}: no such run folder")
        if not file.is_file():
            raise RunError(f"{path}: no config.json, so not a run folder")
        try:
            info = json.loads(file.read_text(encoding="utf-8"))
            number = info.pop("format")
            newer = number > FORMAT
            if not newer:
                info = _migrate(info, number, file)
            settings = info.pop("settings")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{file}: not readable ({error})") from error
        if newer:
            raise RunError(
                f"{file}: format {number} is newer than this program's "
                f"{FORMAT}; update the program"
            )
        return cls(path, _load_config(config_class, settings, file), info)

    @classmethod
    def newest(cls, root="runs"):
        """Return the run under `root` whose VQ-VAE was saved last."""
        files = [p for p in Path(root).glob("*/vqvae.keras") if p.is_file()]
        if not files:
            raise RunError(
                f"{root}: no trained run here; name one, or make one with "
                "python train.py"
            )
        return cls.open(max(files, key=lambda p: p.stat().st_mtime).parent)

    def discard(self):
        """Remove the folder again if nothing came of the run."""
        self.unlock()
        if [entry.name for entry in self.path.iterdir()] == ["config.json"]:
            self.config_path.unlink()
            if self.is_new:
                self.path.rmdir()

    def update(self, **keys):
        """Add keys to `info` and rewrite `config.json` in one step."""
        self.info.update(keys)
        document = {**self.info, "format": FORMAT, "settings": self._settings}
        write_json(self.config_path, document)


def _load_config(config_class, settings, file):
    """Return a configuration read from JSON, checked like flags."""
    try:
        values = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in settings.items()
        }
        return config_class(**values)
    except (AttributeError, TypeError, FlagError) as error:
        raise RunError(f"{file}: unfit setting: {error}") from error


def _to_format_2(info):
    """Settings that came with format 2, at what format 1 did."""
    old = {
        "codebook_distance": "euclidean",
        "upper_weight": 0.0,
        "condition_dropout": 0.0,
        "prior_attention": "none",
        "prior_ema_momentum": 0.0,
        "prior_augment": 0,
    }
    return {**info, "settings": {**old, **info["settings"]}}


# What makes the `config.json` of a format that of the next one.
_MIGRATIONS = {1: _to_format_2}


def _migrate(info, number, file):
    """Return what a `config.json` of an older format says, in today's."""
    for older in range(number, FORMAT):
        info = _MIGRATIONS[older](info)
        _say_once(f"{file}: format {older} read as format {older + 1}")
    return info


@functools.cache
def _say_once(text):
    print(text)


class FileLock:
    """Lock of a folder: a file that only one process at a time can hold.

    Args:
        path: the file. It names the process that holds it, and its host.

    Raises:
        RunError: if another process holds it.
    """

    def __init__(self, path):
        self.path = Path(path)
        while True:
            self._file = open(self.path, "a+", encoding="utf-8")
            try:
                if fcntl:
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                owner = self._owner()
                self._file.close()
                raise RunError(
                    f"{self.path.parent}: in use by {owner}; wait for its end, "
                    "or choose another folder"
                ) from error
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
                owner = self._owner() or "none that is known"
                print(
                    f"warning: {self.path.parent}: a file system without locks "
                    f"({error.strerror}); take care that no other training "
                    f"uses this folder (last owner: {owner})",
                    file=sys.stderr,
                )
                self._file.truncate(0)
            # Its last owner may have removed it since we opened it.
            if self.path.exists() and os.path.samestat(
                os.fstat(self._file.fileno()), os.stat(self.path)
            ):
                break
            self._file.close()
        if stale := self._owner():
            print(f"{self.path.parent}: taken over from {stale}, which died")
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {platform.node()}")
        self._file.flush()

    def _owner(self):
        self._file.seek(0)
        return " ".join(self._file.read().split())

    def release(self):
        """Remove the file and let others in."""
        self.path.unlink(missing_ok=True)
        self._file.close()


@contextlib.contextmanager
def turn(folder):
    """Wait until no other process is in such a block over a folder."""
    if not fcntl:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_alive(number):
    """Whether this machine runs a process of that number."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def checkpoint_generations(path):
    """The files of a checkpoint, the newest first."""
    return [
        path.with_name(f"{path.name}.npz"),
        path.with_name(f"{path.name}.previous.npz"),
    ]


def write_checkpoint(path, state, arrays):
    """Write a dict of JSON values and one of arrays; keep the one before."""
    newest, previous = checkpoint_generations(path)
    text = np.array(json.dumps(state, allow_nan=False))

    def write(temporary):
        with open(temporary, "wb") as file:
            np.savez(file, state=text, **arrays)

    write_atomic(newest, write, previous)


def read_checkpoint_file(file):
    """State and arrays of one file of a checkpoint."""
    # np.load would leave a damaged file open.
    with open(file, "rb") as opened, np.load(opened) as archive:
        arrays = dict(archive)
    return json.loads(str(arrays.pop("state"))), arrays


def read_checkpoint(path):
    """The newest undamaged checkpoint: state, arrays; two empty dicts if none.

    Raises:
        RunError: if there are files, but all are damaged.
    """
    files = [file for file in checkpoint_generations(path) if file.exists()]
    for file in files:
        try:
            return read_checkpoint_file(file)
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            damage = f"{file}: damaged ({error})"
            print(f"warning: {damage}", file=sys.stderr)
    if files:
        raise RunError(
            f"{damage}; remove the folder {file.parent} to train that part anew"
        )
    return {}, {}


def drop_events(folder, epoch):
    """Remove from TensorBoard's files in a folder what is after `epoch`."""
    if not epoch:
        shutil.rmtree(folder, ignore_errors=True)
    for path in Path(folder).rglob("*.tfevents.*"):
        kept = [
            record
            for record in _read_records(path)
            if tf.compat.v1.Event.FromString(record).step <= epoch
        ]

        def write(temporary, kept=kept):
            with tf.io.TFRecordWriter(str(temporary)) as file:
                for record in kept:
                    file.write(record)

        write_atomic(path, write)


def _read_records(path):
    """Whole records of a file that a killed process may have cut short."""
    records = []
    with contextlib.suppress(tf.errors.DataLossError):
        for record in tf.data.TFRecordDataset(str(path)):
            records.append(record.numpy())
    return records


def check_keras_file(path):
    """Raise `RunError` unless `path` is an undamaged `.keras` archive."""
    path = Path(path)
    if path.is_dir():
        raise RunError(f"{path}: a folder, expected a .keras file")
    if not path.exists():
        raise RunError(f"{path}: no such model file")
    if path.suffix != ".keras" or not zipfile.is_zipfile(path):
        raise RunError(f"{path}: truncated, or not a .keras file")
    try:
        with zipfile.ZipFile(path) as archive:
            names, damaged = archive.namelist(), archive.testzip()
    except Exception as error:  # zlib.error, EOFError, BadZipFile, ...
        names, damaged = [], str(error)
    if damaged:
        raise RunError(
            f"{path}: corrupt ({damaged}); restore a copy or train again"
        )
    for name in ("config.json", "model.weights.h5"):
        if name not in names:
            raise RunError(f"{path}: incomplete, {name} is missing")


def load_model(path):
    """Load a saved model with safe mode on; any failure is a `RunError`."""
    check_keras_file(path)
    # Registers our layers with Keras; its import cannot be at the top, as
    # modules.py imports this file.
    if importlib.util.find_spec("modules"):
        _import_module("modules")
    try:
        return keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        if isinstance(_as_user_error(error), ResourceError):
            raise
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise RunError(f"{path}: cannot be loaded ({reason})") from error


def save_model(model, path):
    """Save a Keras model atomically."""
    write_atomic(path, model.save)


def codebook_sha256(vqvae, level=1):
    """Hash that ties a prior to the codebooks its indices speak of.

    Those of its level and of the levels above, on which it is conditioned.
    """
    codebooks = [
        np.asarray(vqvae.part("quantizer", k).codebook)
        for k in range(level, vqvae.levels + 1)
    ]
    return array_sha256(np.concatenate(codebooks))


def load_priors(run, vqvae):
    """Load the priors of a run, bottom first.

    Raises:
        RunError: if one is missing, damaged, or was trained on the indices
            of another VQ-VAE.
    """
    priors = []
    for level, path in enumerate(run.prior_paths, start=1):
        if not path.exists():
            raise RunError(
                f"{path}: this run has no prior; train one with "
                f"python train.py --stage prior --run-dir {run.path}"
            )
        prior = load_model(path)
        if prior.codebook_sha256 != codebook_sha256(vqvae, level):
            raise RunError(
                f"{path}: trained on another codebook than that of "
                f"{run.vqvae_path}; train it again"
            )
        priors.append(prior)
        for name in ("labels", "slice_condition"):
            if getattr(prior, name) != getattr(priors[0], name):
                raise RunError(
                    f"{path}: its {name} are not those of {run.prior_paths[0]};"
                    " train both again"
                )
    return priors


def prior_inputs(prior, indices, frame):
    """What `prior` is trained on: dict of arrays, one row an image.

    Args:
        indices: list of `(N, h, w)` arrays, bottom first.
        frame: index of the same N slices.
    """
    level = len(indices) - len(prior.upper_grids)
    inputs = {"indices": indices[level - 1]}
    if prior.upper_grids:
        inputs["upper"] = tuple(indices[level:])  # tf.data stacks a list
    if prior.labels:
        numbers = {name: k for k, name in enumerate(prior.labels)}
        labels = frame["label"].map(numbers).fillna(-1)
        inputs["label"] = labels.to_numpy("int32")
    if prior.slice_condition:
        inputs["slice_position"] = frame["position"].to_numpy("float32")
    return inputs


@contextlib.contextmanager
def _reading(path):
    """Turn what fails over a file of a run into a `RunError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise RunError(f"{path}: missing from the run folder") from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"{path}: damaged ({error})") from error


def read_evaluation(run):
    """`evaluation.json` of a run."""
    with _reading(run.evaluation_path):
        return json.loads(run.evaluation_path.read_text(encoding="utf-8"))


def read_indices(run):
    """`indices.npz` of a run as a dict of arrays."""
    with _reading(run.indices_path), open(run.indices_path, "rb") as opened:
        with np.load(opened) as file:
            return dict(file)


def read_history(run):
    """`history.csv` of a run as a DataFrame."""
    with _reading(run.history_path):
        return pd.read_csv(run.history_path, float_precision="round_trip")


def read_splits(run, needed=("train", "validate", "test")):
    """The splits of `split.csv`: {name: DataFrame}.

    Raises:
        DataError: if files of a split in `needed` are no longer there.
    """
    text = dict.fromkeys(("path", "subject", "scan", "label", "sha256"), str)
    with _reading(run.split_path):
        frame = pd.read_csv(
            run.split_path,
            dtype=text,
            keep_default_na=False,
            float_precision="round_trip",
            encoding_errors="surrogateescape",
        )
        splits = {
            name: frame[frame["split"] == name].reset_index(drop=True)
            for name in ("train", "validate", "test")
        }
    files = [path for name in needed for path in splits[name]["path"]]
    missing = [path for path in files if not os.path.exists(path)]
    if missing:
        raise DataError(
            f"{missing[0]}: no longer there, like {len(missing)} of "
            f"{len(files)} files in {run.split_path}; put them back "
            "(predict.py takes others, with --images or --data-dir)"
        )
    return splits


# ------------------------------------------------- 5. Seeds and precision


def set_seed(seed):
    """Seed Python, NumPy and TensorFlow."""
    keras.utils.set_random_seed(seed)


def choose_precision(precision="auto"):
    """Return (Keras policy, reason); bfloat16 where hardware computes it."""
    if precision != "auto":
        return precision, "asked for"
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        details = tf.config.experimental.get_device_details(gpu)
        if details.get("compute_capability", (0, 0)) < (8, 0):
            return "float32", "a GPU computes bfloat16 slowly"
    if gpus:
        return "mixed_bfloat16", "the GPU computes bfloat16"
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        flags = set()
    if flags & {"avx512_bf16", "amx_bf16"}:
        return "mixed_bfloat16", "the CPU computes bfloat16"
    return "float32", "the CPU does not compute bfloat16"


def choose_strategy(name="auto", alone=False):
    """Return the `tf.distribute` strategy to train with.

    Several workers are those of the variable `TF_CONFIG`. To be called before
    TensorFlow computes anything.

    Args:
        alone: refuse several workers: a search is under way.

    Raises:
        FlagError: if several workers are asked for and none are configured.
    """
    workers = _workers()
    if alone and (name == "multiworker" or (name == "auto" and workers)):
        raise FlagError(
            "--tune: a trial is trained by one process, found several workers; "
            "without TF_CONFIG, start the command on each machine, with one "
            "--run-dir"
        )
    if name == "auto":
        gpus = len(tf.config.list_physical_devices("GPU"))
        name = "mirrored" if gpus > 1 else "none"
        name = "multiworker" if workers else name
    if name == "mirrored":
        return tf.distribute.MirroredStrategy()
    if name == "none":
        return tf.distribute.get_strategy()
    if not workers:
        raise FlagError(
            "--strategy: multiworker needs the workers in the variable "
            "TF_CONFIG; see README"
        )
    return tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=workers)


def _workers():
    """Cluster of several workers in `TF_CONFIG`, or None."""
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    try:
        jobs = resolver.cluster_spec().as_dict()
    except ValueError as error:
        raise FlagError(f"TF_CONFIG: expected JSON ({error})") from error
    workers = sum(len(jobs.get(name, ())) for name in ("chief", "worker"))
    return resolver if workers > 1 else None


def is_chief(strategy):
    """Whether this process is the one that writes the run folder."""
    return strategy.extended.should_checkpoint


def is_multi_worker(strategy):
    """Whether a `tf.distribute` strategy spans several processes."""
    several = tf.distribute.MultiWorkerMirroredStrategy
    return isinstance(strategy, several) and bool(
        strategy.cluster_resolver.cluster_spec()
    )


@functools.cache
def _sum_of_workers(strategy):
    """A compiled call that adds up a tensor over all replicas."""

    def total(numbers):
        own = strategy.run(tf.identity, args=(numbers,))
        return strategy.reduce("SUM", own, axis=None)

    return tf.function(total)


def any_worker(strategy, flags):
    """Which of the `flags` any worker has set; each worker must call this."""
    if not is_multi_worker(strategy):
        return list(flags)
    totals = _sum_of_workers(strategy)(tf.constant(flags, tf.int32))
    return [bool(total) for total in totals]


def wait_for_workers(strategy):
    """Return when every worker has come this far."""
    any_worker(strategy, [False])


def peak_memory_mb():
    """Return the most memory this process has held, in MB."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# -------------------------------------------------------------- 6. Metrics
# Images are (B, H, W, 1) on [0, 1], any float dtype; originals come first.

SSIM_WINDOW = 11  # pixels
SSIM_SIGMA = 1.5  # pixels
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
FOREGROUND = 0.05  # intensity; the background of a slice is 0
PSNR_CAP = 100.0  # dB, so that equal images have a finite value


def _gaussian_band(length):
    """Return the (length, length - 10) matrix that blurs by multiplying."""
    reach = SSIM_WINDOW - 1
    taps = np.exp(-0.5 * ((np.arange(reach + 1) - reach / 2) / SSIM_SIGMA) ** 2)
    offset = tf.range(length)[:, None] - tf.range(length - reach)[None, :]
    weights = tf.gather(
        tf.constant(taps / taps.sum(), tf.float32),
        tf.clip_by_value(offset, 0, reach),
    )
    return tf.where((offset >= 0) & (offset <= reach), weights, 0.0)


def _blur(images):
    """Average (N, H, W) images under the window: (N, H - 10, W - 10).

    Two dense products take 0.4 of the time of the depthwise convolution of
    `tf.image.ssim`, whose gradient is slow on a CPU.
    """
    height, width = tf.shape(images)[1], tf.shape(images)[2]
    rows = tf.tensordot(images, _gaussian_band(width), 1)
    return tf.matmul(_gaussian_band(height), rows, transpose_a=True)


def _ssim_terms(x, y, max_val):
    """Return the maps of SSIM, of its contrast term, and of the mean of x."""
    x = tf.cast(x, tf.float32)[..., 0]  # (B, H, W)
    y = tf.cast(y, tf.float32)[..., 0]
    moments = tf.concat([x, y, x * y, x * x + y * y], axis=0)
    mean_x, mean_y, product, power = tf.split(_blur(moments), 4)

    c1, c2 = (0.01 * max_val) ** 2, (0.03 * max_val) ** 2
    means, powers = mean_x * mean_y, mean_x**2 + mean_y**2
    luminance = (2 * means + c1) / (powers + c1)
    contrast = (2 * (product - means) + c2) / (power - powers + c2)
    return luminance * contrast, contrast, mean_x


def ssim_map(x, y, max_val=1.0):
    """Return the local SSIM (B, H-10, W-10) that `tf.image.ssim` averages."""
    return _ssim_terms(x, y, max_val)[0]


def ssim(x, y, max_val=1.0):
    """Return the SSIM of each image pair, (B,), as `tf.image.ssim` does."""
    return tf.reduce_mean(ssim_map(x, y, max_val), axis=[1, 2])


def ssim_foreground(x, y):
    """Return the SSIM (B,) where the original is not background.

    That is where its mean under the window exceeds `FOREGROUND`; NaN for an
    image that is background throughout.
    """
    values, _, mean = _ssim_terms(x, y, 1.0)
    inside = tf.cast(mean > FOREGROUND, tf.float32)
    total = tf.reduce_sum(values * inside, axis=[1, 2])
    return total / tf.reduce_sum(inside, axis=[1, 2])


def ms_ssim_scales(height, width):
    """Return how many of the 5 scales of MS-SSIM fit an image."""
    scales, side = 0, min(height, width)
    while side >= SSIM_WINDOW and scales < len(MS_SSIM_WEIGHTS):
        scales, side = scales + 1, (side + 1) // 2
    return scales


def ms_ssim(x, y):
    """Return the multi-scale SSIM (B,) over the scales that fit.

    Equals `tf.image.ssim_multiscale` where all 5 do; fewer weights are
    scaled to the sum of all.
    """
    x, y = tf.cast(x, tf.float32), tf.cast(y, tf.float32)
    scales = ms_ssim_scales(x.shape[1], x.shape[2])
    weights = np.array(MS_SSIM_WEIGHTS[:scales])
    weights *= sum(MS_SSIM_WEIGHTS) / weights.sum()
    result = tf.ones(tf.shape(x)[0])
    for scale, weight in enumerate(weights):
        if scale:
            x, y = _halve(x), _halve(y)
        values, contrast, _ = _ssim_terms(x, y, 1.0)
        term = values if scale == scales - 1 else contrast
        term = tf.nn.relu(tf.reduce_mean(term, axis=[1, 2]))
        result *= term ** tf.constant(weight, tf.float32)
    return result


def _halve(images):
    """Average 2x2 pixels, an odd last row or column with itself."""
    odd = [[0, 0], *([0, side % 2] for side in images.shape[1:3]), [0, 0]]
    return tf.nn.avg_pool2d(tf.pad(images, odd, "SYMMETRIC"), 2, 2, "VALID")


def psnr(x, y):
    """Return the peak signal-to-noise ratio (B,) in dB, at most 100."""
    error = tf.cast(x, tf.float32) - tf.cast(y, tf.float32)
    mse = tf.reduce_mean(error**2, axis=[1, 2, 3])
    floor = 10 ** (-PSNR_CAP / 10)
    return -10 * tf.math.log(tf.maximum(mse, floor)) / math.log(10)


def mae(x, y):
    """Return the mean absolute error (B,), in intensity."""
    error = tf.cast(x, tf.float32) - tf.cast(y, tf.float32)
    return tf.reduce_mean(tf.abs(error), axis=[1, 2, 3])


def bootstrap_by_subject(values, subjects, n=2000, seed=0):
    """Return the mean of `values` and its 95 % interval over subjects.

    Slices of one subject are alike, so whole subjects are resampled. NaN
    values are left out; without any other, mean and bounds are None.
    """
    values = np.asarray(values, np.float64)
    kept = ~np.isnan(values)
    if not kept.any():
        return {"mean": None, "ci95": [None, None]}
    values = values[kept]
    _, owner = np.unique(np.asarray(subjects)[kept], return_inverse=True)
    counts = np.bincount(owner)
    sums = np.bincount(owner, values)

    share = np.full(len(counts), 1 / len(counts))
    draws = np.random.default_rng(seed).multinomial(len(counts), share, n)
    means = (draws @ sums) / (draws @ counts)
    low, high = np.percentile(means, [2.5, 97.5])
    mean = sums.sum() / counts.sum()
    return {"mean": float(mean), "ci95": [float(low), float(high)]}


def _count(indices, num_embeddings):
    """Return how often each index in [0, K) occurs, (K,)."""
    flat = np.asarray(indices).ravel()
    if flat.size and not 0 <= flat.min() <= flat.max() < num_embeddings:
        raise ValueError(
            f"indices: expected 0 to {num_embeddings - 1}, found "
            f"{flat.min()} to {flat.max()}"
        )
    return np.bincount(flat, minlength=num_embeddings)


def codebook_stats(indices, num_embeddings):
    """Return usage (0..1), perplexity, entropy and counts of the codes."""
    counts = _count(indices, num_embeddings)
    used = counts[counts > 0]
    share = used / used.sum()
    entropy = float(-(share * np.log2(share)).sum()) + 0.0  # no "-0.0"
    return {
        "usage": len(used) / num_embeddings,
        "perplexity": 2.0**entropy,
        "entropy_bits": entropy,
        "counts": counts,
    }


def unigram_bits(train_indices, test_indices, num_embeddings):
    """Return bits per test code under the frequencies of training codes.

    What a prior that sees no neighbours would reach; every count is raised
    by one, so that a code new to the test set has a finite cost.
    """
    train = _count(train_indices, num_embeddings) + 1
    test = _count(test_indices, num_embeddings)
    return float(test @ -np.log2(train / train.sum()) / test.sum())


# Sets of images are compared in a feature space: an image is a row of (N, F).

NEIGHBOURS = 5  # k of precision, recall, density and coverage
PCA_SHARE = 8  # images of a set for each principal component
MOST_COMPONENTS = 64
HOG_ORIENTATIONS = 9
HOG_CELLS = 12  # along the short side
HOG_CONTRAST = 1e-3  # mean gradient, intensity a pixel, of a block that fades
TINY = 1e-12  # so that no ratio divides by 0


def hog_cell(height, width):
    """Return the side of a HOG cell: a 12th of the short side, 4 or more."""
    return max(4, round(min(height, width) / HOG_CELLS))


def hog_features(images):
    """Return histograms of oriented gradients (N, F) of images (N, H, W).

    Blocks are normalised: whatever is in one counts as much as in another. So
    that the noise of a background, or a pixel at the rim of a head, does not
    count like anatomy, intensities begin at `FOREGROUND`, and a block whose
    gradients are not well above `HOG_CONTRAST` fades to 0.

    Reference: Dalal and Triggs, 2005, doi:10.1109/CVPR.2005.177 (L2 blocks).
    """
    hog = importlib.import_module("skimage.feature").hog
    cell = hog_cell(*images.shape[1:])
    # scikit-image adds (1e-5)^2 to the squared length that it divides by.
    scale = 1e-5 / HOG_CONTRAST
    rows = [
        hog(
            scale * np.maximum(image - FOREGROUND, 0),
            orientations=HOG_ORIENTATIONS,
            pixels_per_cell=(cell, cell),
            cells_per_block=(2, 2),
            block_norm="L2",
        )
        for image in images
    ]
    return np.array(rows, np.float32)


def inception_features(images):
    """Return ImageNet Inception v3 features (N, 2048) of images (N, H, W)."""
    model = inception_network()
    batch = tf.image.resize(images[..., None], model.input_shape[1:3])
    batch = tf.repeat(2 * batch - 1, 3, axis=-1)
    return model(batch, training=False).numpy()


@functools.cache
def inception_network():
    """The ImageNet Inception v3; `ResourceError` if it cannot be had."""
    try:
        return keras.applications.InceptionV3(
            include_top=False,
            pooling="avg",
            input_shape=(299, 299, 3),
            dtype="float32",
        )
    except Exception as error:  # Keras: any kind, or a plain Exception
        raise ResourceError(
            "--features inception: the ImageNet weights cannot be had "
            f"({error}); try again with a network, or --features hog"
        ) from error


FEATURES = {"hog": hog_features, "inception": inception_features}


def describe_features(name, image_size):
    """Return a feature space in words, with its parameters."""
    if name == "inception":
        return "ImageNet Inception v3, average pool"
    cell = hog_cell(*image_size)
    return (
        f"HOG of {HOG_ORIENTATIONS} orientations, {cell}x{cell}-pixel cells, "
        f"2x2-cell blocks above contrast {HOG_CONTRAST}"
    )


def principal_components(fit, n):
    """Return the projection to principal components of the features `fit`.

    A covariance of n images has no more than n - 1 dimensions, and a Fréchet
    distance in more of them measures n. There are n / 8 components, 64 at
    most; they are scaled to a mean variance of 1 over `fit`.
    """
    count = min(n // PCA_SHARE, MOST_COMPONENTS, *fit.shape)
    pca = importlib.import_module("sklearn.decomposition").PCA
    pca = pca(count, random_state=0).fit(fit)
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
    spread = np.trace(cov_x) + np.trace(cov_y) - 2 * overlap
    return float(max(difference @ difference + spread, 0))


def kernel_distance(x, y, subjects_x, subjects_y, n=2000, seed=0):
    """Return the kernel distance (KID) of features (N, F) and (M, F).

    The unbiased squared maximum mean discrepancy of the kernel
    (a b / F + 1)^3: 0 on average, so at times below, for sets of one kind.
    Images of a subject are alike, so within a set only pairs of different
    subjects are compared; the interval resamples the subjects of both sets.
    None if a set has fewer than two.

    Reference: Binkowski et al., 2018, arXiv:1801.01401.
    """
    kernel = importlib.import_module("sklearn.metrics").pairwise
    blocks_x, blocks_y = _one_hot(subjects_x), _one_hot(subjects_y)
    if min(len(blocks_x), len(blocks_y)) < 2:
        return None
    rng = np.random.default_rng(seed)
    draws = [
        np.vstack([np.ones(len(b)), _resample(rng, len(b), n)])
        for b in (blocks_x, blocks_y)
    ]

    def mean(a, b):
        """Mean kernel over pairs of two sets, of each draw of subjects."""
        (rows, left, u), (columns, right, v) = a, b
        sums = left @ kernel.polynomial_kernel(rows, columns) @ right.T
        pairs = np.outer(left.sum(1), right.sum(1))
        if a is b:
            np.fill_diagonal(sums, 0)
            np.fill_diagonal(pairs, 0)
        with np.errstate(invalid="ignore"):  # one subject alone was drawn
            return ((u @ sums) * v).sum(1) / ((u @ pairs) * v).sum(1)

    a, b = (x, blocks_x, draws[0]), (y, blocks_y, draws[1])
    values = mean(a, a) + mean(b, b) - 2 * mean(a, b)
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return {"mean": float(values[0]), "ci95": [float(low), float(high)]}


def _one_hot(subjects):
    """Return which image is of which subject, (subjects, images) of 0 or 1."""
    names, owner = np.unique(np.asarray(subjects), return_inverse=True)
    return (owner == np.arange(len(names))[:, None]).astype(np.float64)


def _resample(rng, count, n):
    """Return how often each of `count` is drawn, `count` at a time, n times."""
    return rng.multinomial(count, np.full(count, 1 / count), n)


def manifold_scores(fake, real, fake_subjects, real_subjects, k=NEIGHBOURS):
    """Return precision, recall, density and coverage, a value an image.

    An image has a ball that reaches to its k-th neighbour in its own set, of
    other subjects: with slices of one's own the balls of real images would be
    too small for anyone else's. Precision: is a fake image in the ball of a
    real one; density: in how many, over k. Recall: is a real image in the ball
    of a fake one; coverage: is a fake image in its own ball.

    Args:
        fake, real: (N, F) and (M, F).

    Returns: dict of float64 (N,) for precision and density, (M,) for recall
        and coverage; None if an image has fewer than k others.

    Reference: Kynkaanniemi et al., 2019, arXiv:1904.06991; Naeem et al., 2020,
        arXiv:2002.09797.
    """
    distances = importlib.import_module("sklearn.metrics").pairwise_distances

    def radii(rows, subjects):
        apart, subjects = distances(rows), np.asarray(subjects)
        apart[subjects[:, None] == subjects] = np.inf
        if len(rows) <= k:
            return np.array([np.inf])
        return np.partition(apart, k - 1, axis=1)[:, k - 1]

    real_radii = radii(real, real_subjects)
    fake_radii = radii(fake, fake_subjects)
    if np.isinf([*real_radii, *fake_radii]).any():
        return None
    apart = distances(real, fake)  # (M, N)
    in_real = apart <= real_radii[:, None]
    in_fake = apart <= fake_radii
    scores = {
        "precision": in_real.any(0),
        "recall": in_fake.any(1),
        "density": in_real.sum(0) / k,
        "coverage": in_real.any(1),
    }
    return {name: value.astype(np.float64) for name, value in scores.items()}


def jackknife_ratio(ratio, subjects):
    """Return the 95 % interval of a positive ratio over subjects.

    One subject at a time is left out, and the logarithms compared: with whole
    subjects repeated, as a bootstrap does, a covariance loses dimensions.

    Args:
        ratio: function of a mask (N,) of the images to take.
        subjects: (N,) of whom they are.
    """
    subjects = np.asarray(subjects)
    names, counts = np.unique(subjects, return_counts=True)
    if len(subjects) - counts.max() < 2:
        return None
    logs = np.log([ratio(subjects != name) for name in names])
    error = math.sqrt((len(names) - 1) * logs.var())
    middle = math.log(ratio(np.full(len(subjects), True)))
    return [math.exp(middle + side * 1.96 * error) for side in (-1, 1)]


def compare_sets(sets, extract, name, train_subjects, test_subjects):
    """Compare generated and training images with test images.

    Args:
        sets: {name: images (N, H, W)}: `generated`, `train`, `rebuilt` (the
            same encoded and decoded) and `test`, equally many; `fit`, other
            training images for the principal components.
        extract: function of images to features (N, F); `name` says which.

    Returns: dict for `evaluation.json`; None where images are too few.
    """
    n = len(sets["generated"])
    names = ("frechet", "kid", "precision", "recall", "density", "coverage")
    if n < 2 * PCA_SHARE:
        return {"features": name, **dict.fromkeys(names), "floor": {}}
    features = {key: extract(images) for key, images in sets.items()}
    fit = features.pop("fit")
    project = principal_components(fit, n)
    features = {key: project(rows) for key, rows in features.items()}
    real, size = features["test"], len(project(fit[:1])[0])
    scores = {
        key: score_set(features[key], real, subjects, test_subjects)
        for key, subjects in (
            # Images of no one: as many as there are.
            ("generated", np.arange(n)),
            ("train", train_subjects),
        )
    }

    def distance(key, kept=slice(None)):
        return frechet_distance(features[key], real[kept])

    def ratio(kept=slice(None)):
        new, floor = distance("generated", kept), distance("train", kept)
        return max(new, TINY) / max(floor, TINY)

    return {
        "features": f"{name}, {size} principal components of {len(fit)} "
        "training images",
        "frechet": {
            "generated_vs_test": distance("generated"),
            "train_vs_test": distance("train"),
            "rebuilt_train_vs_test": distance("rebuilt"),
            "ratio": ratio(),
            "ratio_ci95": jackknife_ratio(ratio, test_subjects),
        },
        **scores["generated"],
        "floor": scores["train"],
    }


def score_set(fake, real, fake_subjects, real_subjects):
    """KID, precision, recall, density and coverage, with intervals."""
    subjects = fake_subjects, real_subjects
    scores = {"kid": kernel_distance(fake, real, *subjects)}
    values = manifold_scores(fake, real, *subjects)
    for key in ("precision", "recall", "density", "coverage"):
        owners = subjects[key in ("recall", "coverage")]
        scores[key] = values and bootstrap_by_subject(values[key], owners)
    return scores


def nearest_images(queries, batches, spaces):
    """Return the nearest of many images to each query, in several spaces.

    Args:
        queries: (N, H, W).
        batches: iterable of (B, H, W, 1), read once.
        spaces: {name: function of images (B, H, W) to features (B, F)}.

    Returns: {name: (row number (N,), distance (N,))}. The distance is the
        Euclidean one over the length of the query's features, so that small
        and large heads compare; NaN for a blank query.
    """
    features = {name: space(queries) for name, space in spaces.items()}
    power = {name: (rows**2).sum(1) for name, rows in features.items()}
    rows = {name: np.zeros(len(queries), int) for name in spaces}
    best = {name: np.full(len(queries), np.inf) for name in spaces}
    first = 0
    for batch in batches:
        batch = np.asarray(batch)[..., 0]
        for name, space in spaces.items():
            others = space(batch)
            # |a - b|^2 but for |a|^2, by one fast product
            apart = (others**2).sum(1) - 2 * features[name] @ others.T
            row, apart = apart.argmin(1), apart.min(1)
            nearer = apart < best[name]
            rows[name][nearer] = first + row[nearer]
            best[name][nearer] = apart[nearer]
        first += len(batch)
    result = {}
    for name in spaces:
        share = best[name] + power[name]
        share /= np.where(power[name] > 0, power[name], np.nan)
        result[name] = rows[name], np.sqrt(np.maximum(share, 0))
    return result


def pixels(images):
    """Return images (N, H, W) as rows (N, H W)."""
    return np.reshape(images, (len(images), -1))


SPACES = {"pixels": pixels, "hog": hog_features}
LEAST_UNSEEN = 100  # images, for their 1st percentile to be one of them
MOST_COPIES = 0.02  # of the generated images, and one at least


def audit(generated, unseen, subjects, n=1000, seed=0):
    """Judge whether generated images are copies of training images.

    A generated image counts as a copy if it is closer to a training image than
    the 1st percentile of the unseen images, in either space, and the nearest
    training image is the same one in both. The first happens to about 2 in 100
    images of anybody, the second to few of these: more than 2 % of copies, and
    more than one, raise the alarm.

    Args:
        generated, unseen: of `nearest_images` with `SPACES`, the same training
            images for both.
        subjects: of the unseen images.

    Returns: dict for `evaluation.json`; mask (N,) of the copies, None with
        fewer than 100 unseen images.
    """
    found, close = {}, {}
    for name in SPACES:
        near, far = generated[name][1], unseen[name][1]
        found[name] = _compare_distances(near, far, subjects, n, seed)
        limit = found[name]["first_percentile"]
        close[name] = near < (np.nan if limit is None else limit)
    copies = None
    if all(part["first_percentile"] is not None for part in found.values()):
        same = generated["pixels"][0] == generated["hog"][0]
        copies = (close["pixels"] | close["hog"]) & same
    count = None if copies is None else int(copies.sum())
    alarm = None if copies is None else count > max(1, MOST_COPIES * len(same))
    return {**found, "copies": count, "alarm": alarm}, copies


def _compare_distances(near, far, subjects, n, seed):
    """Compare distances of generated and of unseen images; blanks left out."""
    kept = ~np.isnan(far)
    _, owner = np.unique(np.asarray(subjects)[kept], return_inverse=True)
    near, far = near[~np.isnan(near)], far[kept]
    names = ("ratio_of_medians", "share_closer", "first_percentile")
    if not len(near) or not len(far):
        return dict.fromkeys(names)

    def values(near, far):
        limit = np.percentile(far, 1)
        ratio = np.median(near) / max(np.median(far), TINY)
        return ratio, np.mean(near < limit), limit

    rng, drawn = np.random.default_rng(seed), []
    for counts in _resample(rng, owner.max() + 1, n):
        again = near[rng.integers(len(near), size=len(near))]
        drawn.append(values(again, np.repeat(far, counts[owner])))
    bounds = np.percentile(drawn, [2.5, 97.5], axis=0).T
    result = {}
    for k, value in enumerate(values(near, far)):
        known = k == 0 or len(far) >= LEAST_UNSEEN
        result[names[k]] = float(value) if known else None
        if known:
            result[names[k] + "_ci95"] = bounds[k].tolist()
    return result


def mean_of_neighbours(bits):
    """Mean of each 3x3 cells of grids (N, h, w); zero beyond the edge."""
    return ndimage.uniform_filter(bits, (1, 3, 3), mode="constant")


def smooth_residual(residual):
    """Take the least of 3x3 pixels, then the mean of 7x7: (N, H, W).

    The first removes thin edges, which any restoration blurs. Marimont &
    Tarroni, 2021, arXiv:2012.06765.
    """
    return ndimage.uniform_filter(
        ndimage.minimum_filter(residual, (1, 3, 3)), (1, 7, 7)
    )


def score_lesions(residual, near, masks, subjects):
    """How well lesions are found, by image and by pixel.

    Args:
        residual: (N, H, W), the map that tells.
        near: list of (N, h, w), mean surprisal of neighbours in bits, whose
            maximum is a simpler score of an image.
        masks: (N, H, W) bool, pixels of lesions.
        subjects: (N,).

    Returns: dict for `anomaly.json`.
    """
    measures = importlib.import_module("sklearn.metrics")
    ill = masks.any(axis=(1, 2))
    by_image = functools.partial(
        bootstrap_ranking, measures.roc_auc_score, ill, subjects=subjects
    )
    pixels = _count_pixels(residual, masks, subjects)
    by_pixel = bootstrap_ranking(
        measures.average_precision_score,
        pixels["ill"],
        pixels["value"],
        pixels["subject"],
        pixels["count"],
    )
    return {
        "subjects": len(np.unique(subjects)),
        "images": {
            "as_they_are": int((~ill).sum()),
            "with_lesion": int(ill.sum()),
        },
        "lesions": {"mean_pixels": float(masks[ill].sum() / ill.sum())},
        "image_auroc": by_image(residual.max(axis=(1, 2))),
        "image_auroc_of_surprisal": [
            by_image(level.max(axis=(1, 2))) for level in near
        ],
        "pixel_average_precision": by_pixel | {"chance": float(masks.mean())},
    }


def _count_pixels(residual, masks, subjects, levels=1024):
    """Count pixels by subject, lesion and residual, in `levels` steps."""
    _, owner = np.unique(np.asarray(subjects), return_inverse=True)
    owner = np.broadcast_to(owner[:, None, None], masks.shape)
    value = np.round(residual / residual.max() * (levels - 1))
    columns = {"subject": owner, "ill": masks, "value": value}
    table = pd.DataFrame({k: v.ravel() for k, v in columns.items()})
    return table.groupby(list(columns)).size().reset_index(name="count")


def bootstrap_ranking(
    metric, truth, score, subjects, weights=1.0, n=1000, seed=0
):
    """Return how well a score ranks, with its 95 % interval over subjects.

    Args:
        metric: such as `sklearn.metrics.roc_auc_score`.
        truth: (N,) bool; there are both kinds of every subject.
        score: (N,), higher where true.
        subjects: (N,), whole ones are resampled.
        weights: (N,), how often each counts.
    """
    names, owner = np.unique(np.asarray(subjects), return_inverse=True)
    share = np.full(len(names), 1 / len(names))
    draws = np.random.default_rng(seed).multinomial(len(names), share, n)

    def value(times):
        return metric(truth, score, sample_weight=weights * times[owner])

    low, high = np.percentile([value(draw) for draw in draws], [2.5, 97.5])
    middle = value(np.ones(len(names)))
    return {"value": float(middle), "ci95": [float(low), float(high)]}


# -------------------------------------------------------------- 7. Figures

DPI = 150
SCREEN_DPI = 90  # of what TensorBoard shows: a quarter of the time
_figures = lazy_import("matplotlib.figure")


def _new_figure(width, height, **options):
    """Return a figure, in inches, that needs no display."""
    options = {"layout": "constrained", **options}
    return _figures.Figure(figsize=(width, height), dpi=DPI, **options)


def _save_figure(figure, path):
    """Write a figure as PNG, to a path or into an open file."""
    if hasattr(path, "write"):
        figure.savefig(path, format="png", dpi=SCREEN_DPI)
    else:
        write_atomic(path, lambda p: figure.savefig(p, format="png"))


def _planes(images):
    """Return images (N, H, W) on [0, 1] from (N, H, W) or (N, H, W, 1)."""
    images = np.asarray(images, np.float32)
    return np.clip(images[..., 0] if images.ndim == 4 else images, 0, 1)


def _image_rows(rows, columns, aspect, title):
    """Return (figure, axes) of a close grid of images without ticks."""
    size = min(1.6, 14 / columns)  # inches across an image
    height = rows * (size * aspect + 0.22) + 0.5
    figure = _new_figure(max(columns * size + 1.6, 5), height)
    figure.suptitle(title)
    figure.get_layout_engine().set(wspace=0.01, hspace=0.02)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    return figure, axes


def figure_reconstructions(
    path,
    originals,
    reconstructions,
    ssim_values,
    title="Reconstructions",
    captions=None,
):
    """Draw originals, reconstructions with their SSIM, and differences.

    Args:
        captions: list of texts, what is below each column; default nothing.
    """
    originals, results = _planes(originals), _planes(reconstructions)
    count, height, width = originals.shape
    error = np.abs(originals - results)
    worst = max(float(np.percentile(error, 99.9)), 0.01)
    figure, axes = _image_rows(3, count, height / width, title)
    for k in range(count):
        axes[0, k].imshow(originals[k], cmap="gray", vmin=0, vmax=1)
        axes[1, k].imshow(results[k], cmap="gray", vmin=0, vmax=1)
        axes[1, k].set_xlabel(f"SSIM {float(ssim_values[k]):.3f}", fontsize=8)
        drawn = axes[2, k].imshow(error[k], cmap="magma", vmin=0, vmax=worst)
        axes[2, k].set_xlabel(captions[k] if captions else "", fontsize=8)
    names = ("original", "reconstruction", "|difference|")
    for ax, name in zip(axes[:, 0], names, strict=True):
        ax.set_ylabel(name)
    bar = figure.colorbar(drawn, ax=axes[2, :], fraction=0.02, pad=0.01)
    bar.set_label("intensity")
    _save_figure(figure, path)


def figure_index_maps(path, images, indices_per_level, num_embeddings):
    """Draw images above their index maps, one row a level, bottom first."""
    images = _planes(images)
    count, height, width = images.shape
    levels = len(indices_per_level)
    title = f"Indices of {num_embeddings} code vectors"
    figure, axes = _image_rows(1 + levels, count, height / width, title)
    # Neighbouring indices are unrelated: neighbouring colours should differ.
    shuffle = np.random.default_rng(0).permutation(num_embeddings)
    for k in range(count):
        axes[0, k].imshow(images[k], cmap="gray", vmin=0, vmax=1)
        for level, indices in enumerate(indices_per_level):
            axes[1 + level, k].imshow(
                shuffle[np.asarray(indices[k])],
                cmap="nipy_spectral",
                vmin=0,
                vmax=num_embeddings - 1,
                interpolation="nearest",
            )
    axes[0, 0].set_ylabel("image")
    for level, indices in enumerate(indices_per_level):
        name = "indices" if levels == 1 else f"level {level + 1}"
        grid = size_text(np.shape(indices)[1:3])
        axes[1 + level, 0].set_ylabel(f"{name}\n{grid}")
    _save_figure(figure, path)


def figure_samples(path, images, title, captions=None, columns=None):
    """Draw every image given, in order, in a close grid on black.

    Without `columns` the grid is nearly square.
    """
    images = _planes(images)
    count, height, width = images.shape
    columns = columns or _columns(count, height / width)
    rows = -(-count // columns)
    gap = max(1, width // 64)
    canvas = np.zeros((rows * (height + gap), columns * (width + gap)))
    corners = []
    for k, image in enumerate(images):
        top, left = divmod(k, columns)
        top, left = top * (height + gap), left * (width + gap)
        canvas[top : top + height, left : left + width] = image
        corners.append((left + 0.04 * width, top + 0.04 * height))

    inches = 10 if columns > 3 else 2.5 * columns + 1
    figure = _new_figure(
        inches, inches * canvas.shape[0] / canvas.shape[1] + 0.4
    )
    figure.set_facecolor("black")
    figure.suptitle(title, color="white")
    ax = figure.subplots()
    ax.imshow(canvas, cmap="gray", vmin=0, vmax=1)
    ax.axis("off")
    for (left, top), text in zip(corners, captions or [], strict=False):
        ax.text(left, top, text, color="white", fontsize=7, va="top")
    _save_figure(figure, path)


def draw_samples(path, images, seed, temperature):
    """Grid of generated images, every one in the order drawn."""
    title = f"Generated, none left out: seed {seed}, temperature {temperature}"
    figure_samples(path, images, title, columns=min(8, len(images)))


def figure_least_likely(path, images, bits, count):
    """Draw the generated images whose indices take the most bits."""
    least = np.argsort(-bits, kind="stable")[:count]
    title = f"Of {len(images)} generated images the least likely\n"
    title += f"bits of their indices; on average {bits.mean():.0f}"
    aspect = np.divide(*images.shape[1:])
    figure, axes = _image_rows(1, len(least), aspect, title)
    for ax, k in zip(axes[0], least, strict=True):
        ax.imshow(images[k], cmap="gray", vmin=0, vmax=1)
        ax.set_xlabel(f"{bits[k]:.0f} bits", fontsize=8)
    _save_figure(figure, path)


def _columns(count, aspect):
    """Return the width of a nearly square grid with the fewest gaps."""
    ideal = math.sqrt(count * aspect)
    choices = range(max(1, int(ideal * 0.8)), min(count, int(ideal * 1.6)) + 1)
    return min(choices, key=lambda c: (-count % c, abs(c - ideal)))


def figure_memorization(path, generated, nearest, captions, title):
    """Draw generated images above their nearest training images, and both
    subtracted.

    Args:
        captions: list of texts, what is below each pair.
    """
    generated, nearest = _planes(generated), _planes(nearest)
    count, height, width = generated.shape
    figure, axes = _image_rows(3, count, height / width, title)
    error = np.abs(generated - nearest)
    for k in range(count):
        axes[0, k].imshow(generated[k], cmap="gray", vmin=0, vmax=1)
        axes[1, k].imshow(nearest[k], cmap="gray", vmin=0, vmax=1)
        drawn = axes[2, k].imshow(error[k], cmap="magma", vmin=0, vmax=0.5)
        axes[2, k].set_xlabel(captions[k], fontsize=8)
    names = ("generated", "nearest\nin training", "|difference|")
    for ax, name in zip(axes[:, 0], names, strict=True):
        ax.set_ylabel(name)
    bar = figure.colorbar(drawn, ax=axes[2, :], fraction=0.02, pad=0.01)
    bar.set_label("intensity")
    _save_figure(figure, path)


def figure_completions(path, originals, kept, completions, title):
    """Draw a row an image: original, kept, completions, how they differ.

    At most 16 images and 8 completions of each; the standard deviation of
    each pixel is over all of them.

    Args:
        completions: (N, n, H, W), intensities in [0, 1].
    """
    rows, shown = min(len(originals), 16), min(completions.shape[1], 8)
    originals, kept = _planes(originals), _planes(kept)
    _, height, width = originals.shape
    figure, axes = _image_rows(rows, shown + 3, height / width, title)
    deviation = completions[:rows].std(axis=1)
    worst = max(float(np.percentile(deviation, 99.9)), 0.01)
    for k in range(rows):
        images = [originals[k], kept[k], *completions[k, :shown]]
        for ax, image in zip(axes[k, :-1], images, strict=True):
            ax.imshow(image, cmap="gray", vmin=0, vmax=1)
        drawn = axes[k, -1].imshow(
            deviation[k], cmap="magma", vmin=0, vmax=worst
        )
    names = ["original", "kept", *(f"drawn {k + 1}" for k in range(shown))]
    for ax, name in zip(axes[0], [*names, "deviation"], strict=True):
        ax.set_title(name, fontsize=9)
    bar = figure.colorbar(drawn, ax=axes[:, -1], fraction=0.05, pad=0.02)
    bar.set_label("standard deviation, intensity")
    _save_figure(figure, path)


def figure_anomaly(
    path, images, bits, restored, residual, captions, title, masks=None
):
    """Draw images, surprisal of each level, restorations, residual maps.

    Args:
        bits: list of (N, h, w), bits of each code, bottom first.
        residual: (N, H, W), intensity.
        captions: list of texts, what is above each image.
        masks: (N, H, W) bool of lesions, to be outlined.
    """
    images, restored = _planes(images), _planes(restored)
    count, height, width = images.shape
    levels = [f"surprisal\nlevel {k + 1}" for k in range(len(bits))]
    levels = levels if len(bits) > 1 else ["surprisal"]
    names = ["image", *levels, "restoration", "residual"]
    figure, axes = _image_rows(len(names), count, height / width, title)
    for row, planes in ((0, images), (-2, restored)):
        for ax, plane in zip(axes[row], planes, strict=True):
            ax.imshow(plane, cmap="gray", vmin=0, vmax=1)
    for ax, text in zip(axes[0], captions, strict=True):
        ax.set_title(text, fontsize=8)
    for k, grids in enumerate(bits, start=1):
        _draw_maps(figure, axes[k], grids, (height, width), "bits per code")
    _draw_maps(figure, axes[-1], residual, (height, width), "intensity")
    for ax, name in zip(axes[:, 0], names, strict=True):
        ax.set_ylabel(name)
    if masks is not None:
        for k in range(count):
            for ax in (axes[0, k], axes[-1, k]):
                ax.contour(masks[k], [0.5], colors="cyan", linewidths=0.8)
    _save_figure(figure, path)


def _draw_maps(figure, axes, maps, size, unit):
    """Draw maps (N, h, w) over images of `size` (H, W), with their scale."""
    height, width = size
    frame = (-0.5, width - 0.5, height - 0.5, -0.5)
    worst = max(float(np.percentile(maps, 99.9)), 0.01)
    for ax, values in zip(axes, maps, strict=True):
        drawn = ax.imshow(
            values, cmap="magma", vmin=0, vmax=worst, extent=frame
        )
    bar = figure.colorbar(drawn, ax=axes, fraction=0.02, pad=0.01)
    bar.set_label(unit)


def figure_history(path, history_frame):
    """Draw the curves of `history.csv`, a row a stage, training and val."""
    stages = list(dict.fromkeys(history_frame["stage"]))
    panels = {stage: _curves(history_frame, stage) for stage in stages}
    columns = max(map(len, panels.values()), default=1)
    figure = _new_figure(4.2 * columns, 3 * max(len(stages), 1))
    figure.suptitle("Training")
    axes = figure.subplots(max(len(stages), 1), columns, squeeze=False)
    for ax in axes.flat:
        ax.set_visible(False)
    for row, stage in zip(axes, stages, strict=False):
        rows = history_frame[history_frame["stage"] == stage]
        for ax, name in zip(row, panels[stage], strict=False):
            ax.set_visible(True)
            _draw_curve(ax, rows, name)
            ax.set_title(f"{stage}: {name.replace('_', ' ')}", fontsize=10)
    _save_figure(figure, path)


# Metrics worth a panel each, in this order, where a stage has them.
CURVES = ("loss", "ssim", "bits_per_code", "perplexity", "codebook_usage")


def _curves(frame, stage):
    """Return the metrics of a stage to be drawn."""
    rows = frame[frame["stage"] == stage].dropna(axis=1, how="all")
    return [name for name in CURVES if name in rows]


def _draw_curve(ax, rows, name):
    """Draw one metric over epochs, with its validation values if any."""
    for column, label, style in (
        (name, "train", "C0.-"),
        ("val_" + name, "validate", "C1.-"),
    ):
        if column in rows and rows[column].notna().any():
            kept = rows[rows[column].notna()]
            ax.plot(kept["epoch"], kept[column], style, label=label)
    ax.set_xlabel("epoch")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


def figure_codebook(path, counts_per_level):
    """Draw how often each code vector is used, most used first."""
    levels = len(counts_per_level)
    figure = _new_figure(5.5 * levels, 3.4)
    axes = figure.subplots(1, levels, squeeze=False)[0]
    for level, (ax, counts) in enumerate(
        zip(axes, counts_per_level, strict=True)
    ):
        counts = np.sort(np.asarray(counts))[::-1]
        used = np.count_nonzero(counts)
        ax.set(yscale="log", ylim=(0.8, 2 * max(counts.max(), 1)))
        ax.set_xlim(-0.5, len(counts) - 0.5)
        ax.fill_between(np.arange(len(counts)), counts, step="mid", lw=0)
        ax.axhline(counts.mean(), color="C1", lw=1, label="all used alike")
        name = "Codebook" if levels == 1 else f"Codebook, level {level + 1}"
        share = 100 * used / len(counts)
        ax.set_title(f"{name}: {used} of {len(counts)} used ({share:.0f} %)")
        ax.set(xlabel="code vector, by use", ylabel="uses")
        ax.legend(fontsize=8)
    _save_figure(figure, path)


def log_figure(tag, draw, *args):
    """Show TensorBoard the picture that `draw(file, *args)` writes."""
    file = io.BytesIO()
    draw(file, *args)
    tf.summary.image(tag, tf.io.decode_png(file.getvalue(), channels=3)[None])


def write_projector(folder, codebooks, counts):
    """Write the files that TensorBoard's projector shows codebooks from.

    Args:
        folder: Path, of a file of events.
        codebooks: (K, D) array of each level, bottom first.
        counts: (K,) uses of each code vector, of each level.
    """
    from tensorboard.plugins import projector

    config = projector.ProjectorConfig()
    for level, (codebook, uses) in enumerate(
        zip(codebooks, counts, strict=True), start=1
    ):
        name = f"codebook_{level}"
        config.embeddings.add(
            tensor_name=name,
            tensor_path=f"{name}.tsv",
            metadata_path=f"{name}_uses.tsv",
        )
        known = pd.DataFrame({"code": range(len(uses)), "uses": uses})
        for end, frame, header in (
            ("", pd.DataFrame(codebook), False),
            ("_uses", known, True),
        ):
            options = {"sep": "\t", "header": header, "index": False}
            write_atomic(
                folder / f"{name}{end}.tsv",
                lambda p, frame=frame, options=options: frame.to_csv(
                    p, **options
                ),
            )
    projector.visualize_embeddings(str(folder), config)


def figure_search(path, table, name):
    """Draw what each trial reached, and the best so far."""
    table = table[table[name].notna()]
    done = table[table["state"] == "complete"]
    early = table[table["state"] == "pruned"]
    figure = _new_figure(7, 4)
    ax = figure.subplots()
    ax.plot(early["number"], early[name], "x", color="0.6", label="ended early")
    ax.plot(done["number"], done[name], "o", ms=5, label="whole trial")
    best = done[name].cummax()
    ax.step(done["number"], best, "C1", where="post", label="best so far")
    best = done.loc[done[name].idxmax()]
    ax.set_title(
        f"Search: trial {best['number']} is best, {_title(name)} "
        f"{best[name]:.4f}"
    )
    ax.set(xlabel="trial", ylabel=_title(name))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    _save_figure(figure, path)


def figure_slices(path, done, names, space):
    """Draw each objective over each setting; colours are trial numbers."""
    columns = min(4, len(space))
    rows = -(-len(space) // columns)
    figure = _new_figure(3 * columns + 1, 2.6 * rows * len(names) + 0.5)
    figure.suptitle(f"{len(done)} whole trials; outlined: the best")
    axes = figure.subplots(rows * len(names), columns, squeeze=False)
    for ax in axes.flat:
        ax.set_visible(False)
    for block, name in enumerate(names):
        panels = axes[block * rows : (block + 1) * rows].flat
        for ax, (setting, how) in zip(panels, space.items(), strict=False):
            ax.set_visible(True)
            drawn = _draw_slice(ax, done, setting, how, name)
    bar = figure.colorbar(drawn, ax=axes, fraction=0.02, pad=0.01)
    bar.set_label("trial")
    bar.ax.yaxis.get_major_locator().set_params(integer=True)
    _save_figure(figure, path)


def _draw_slice(ax, done, setting, how, name):
    """Draw one objective over one setting; what the colour bar is of."""
    x = done[setting]
    if "choices" in how:
        x = [how["choices"].index(value) for value in x]
        ax.set_xticks(range(len(how["choices"])), map(typed, how["choices"]))
        ax.set_xlim(-0.5, len(how["choices"]) - 0.5)
    elif how.get("log"):
        ax.set_xscale("log")
    edges = np.where(done["best"], "red", "none")
    ax.set(xlabel=setting.replace("_", " "), ylabel=_title(name))
    ax.grid(alpha=0.3)
    return ax.scatter(
        x, done[name], c=done["number"], edgecolors=edges, s=30, vmin=0
    )


def figure_pareto(path, done, up, down):
    """Draw two objectives, one better upwards, one to the left."""
    front = done[done["best"]].sort_values(down)
    figure = _new_figure(7, 4.5)
    ax = figure.subplots()
    ax.plot(done[down], done[up], "o", color="0.6", label="whole trial")
    ax.step(front[down], front[up], "C3", where="post", lw=1)
    ax.plot(front[down], front[up], "C3o", label="none is better in both")
    for trial in front.itertuples():
        at = getattr(trial, down), getattr(trial, up)
        ax.annotate(
            trial.number, at, (4, 4), textcoords="offset points", fontsize=8
        )
    ax.set_title(f"{len(front)} of {len(done)} trials are worth a choice")
    ax.set(xlabel=_title(down), ylabel=_title(up))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, loc="lower right")
    _save_figure(figure, path)


def _title(name):
    names = {"ssim": "SSIM", "bits_per_image": "bits per image"}
    return f"validation {names[name]}"


# --------------------------------------------------------------- 8. Images


def spread(total, count):
    """Up to `count` row numbers spread evenly over `total` rows.

    >>> spread(10, 3).tolist()
    [1, 5, 8]
    """
    count = min(count, total)
    return ((np.arange(count) + 0.5) * total / max(count, 1)).astype(int)


def to_pixels(images):
    """Images in [0, 1] as 8-bit grey levels, uint8."""
    return np.round(np.clip(images, 0, 1) * 255).astype("uint8")


def write_png(path, pixels):
    """Write one image, `(H, W)` uint8, as a grey PNG."""
    from PIL import Image

    Image.fromarray(pixels).save(path)


def read_png(path):
    """Read what `write_png` wrote."""
    from PIL import Image

    with Image.open(path, formats=["PNG"]) as image:
        return np.asarray(image)


def progress_bar(name, unit):
    """Wrapper of an iterable that shows how far it is and the time left."""
    tqdm = importlib.import_module("tqdm").tqdm
    return functools.partial(
        tqdm, desc=name, unit=unit, leave=False, disable=None
    )


def fit_verbosity():
    """Keras's bar with the time left on a terminal, a line an epoch else."""
    return 1 if sys.stdout.isatty() else 2
