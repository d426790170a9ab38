"""Tests of utils.py."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import utils

ROOT = Path(utils.__file__).parent


def run_python(code, *arguments):
    """Run Python code in the project's folder, in a new process."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def exit_of(main, argv=()):
    """Return the exit code that `run_main` ends with."""
    with pytest.raises(SystemExit) as caught:
        utils.run_main(main, argv)
    return caught.value.code


def raising(error):
    """Return a main function that raises `error`."""

    def main(argv):
        raise error

    return main


# Errors


@pytest.mark.parametrize(
    "kind, code",
    [
        (utils.FlagError, 2),
        (utils.DataError, 3),
        (utils.RunError, 4),
        (utils.NumericsError, 5),
        (utils.ResourceError, 6),
    ],
)
def test_user_error_is_one_line_and_exit_code(kind, code, capsys):
    assert exit_of(raising(kind("a\n  b"))) == code
    lines = "a\nb" if kind is utils.DataError else "a b"  # a list of files
    assert capsys.readouterr().err == f"error: {lines}\n"


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "f"), "f: Perm"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only"),
        (OSError("write failed, No space left on device"), "No space left"),
        (MemoryError(), "--batch-size"),
    ],
)
def test_lack_of_resources_exits_6(error, message, capsys):
    assert exit_of(raising(error)) == 6
    captured = capsys.readouterr().err
    assert message in captured and captured.count("\n") == 1


def test_tensorflow_out_of_memory_exits_6(capsys):
    error = utils.tf.errors.ResourceExhaustedError(None, None, "OOM")
    assert exit_of(raising(error)) == 6
    assert "out of memory" in capsys.readouterr().err


def test_interrupt_exits_130():
    assert exit_of(raising(KeyboardInterrupt())) == 130


def test_defects_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        utils.run_main(raising(ZeroDivisionError()), [])


def test_debug_keeps_the_traceback(monkeypatch):
    with pytest.raises(utils.DataError):
        utils.run_main(raising(utils.DataError("x")), ["--debug"])
    monkeypatch.setenv("MRI_VQVAE_DEBUG", "1")
    with pytest.raises(utils.DataError):
        utils.run_main(raising(utils.DataError("x")), [])


def test_success_returns_and_a_code_exits():
    assert utils.run_main(lambda argv: None, []) is None
    assert exit_of(lambda argv: 3) == 3


def test_closed_pipe_ends_quietly():
    code = (
        "import utils\n"
        "def main(argv):\n"
        "    while True: print('x' * 1000)\n"
        "utils.run_main(main, [])"
    )
    shell = f'{sys.executable} -c "$0" | head -n 1'
    done = subprocess.run(
        ["bash", "-c", shell, code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr == ""


def test_help_needs_no_heavy_package():
    done = run_python(
        "import sys, utils\n"
        "try: utils.resolve(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'tensorflow', 'keras', 'pandas', 'matplotlib', 'modules'}\n"
        "print('loaded:', heavy & set(sys.modules))"
    )
    assert "loaded: set()" in done.stdout, done.stderr


def test_lazy_import_loads_on_first_use_and_is_not_registered():
    done = run_python(
        "import sys, utils\n"
        "wave = utils.lazy_import('wave')\n"
        "print('wave' in sys.modules, hasattr(wave, '__wrapped__'))\n"
        "wave.open\n"
        "print(sys.modules['wave'] is not wave)"
    )
    assert done.stdout.split() == ["False", "False", "True"], done.stderr


def test_tensorflow_starts_without_notices_but_errors_show():
    done = run_python(
        "import sys, utils\n"
        "print(utils.tf.constant(1).numpy())\n"
        "print('real', file=sys.stderr)"
    )
    assert done.stdout == "1\n"
    assert done.stderr == "real\n"


def test_failed_lazy_import_shows_what_it_wrote(tmp_path, monkeypatch, capfd):
    text = "import os; os.write(2, b'W1 x\\nI0000 note\\nreal\\n'); 1 / 0"
    (tmp_path / "broken_module.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    loaded = {"tensorflow": None}
    kept = {k: v for k, v in sys.modules.items() if k not in loaded}
    monkeypatch.setattr(sys, "modules", kept)
    with pytest.raises(ZeroDivisionError):
        utils.lazy_import("broken_module").x  # noqa: B018
    assert capfd.readouterr().err == "W1 x\nreal\n"


# Flags


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--learning-rate", "nan"], "a number in (0, 1], found nan"),
        (["--learning-rate", "inf"], "a number in (0, 1], found inf"),
        (["--learning-rate", "0"], "a number in (0, 1], found 0.0"),
        (["--learning-rate", "x"], "a number in (0, 1], found 'x'"),
        (["--decay", "1"], "a number in [0, 1), found 1.0"),
        (["--epochs", "-1"], "a whole number in [1, 100000], found -1"),
        (["--epochs", "1.5"], "a whole number in [1, 100000], found '1.5'"),
        (["--epochs"], "expected one argument"),
        (["--epoch", "3"], "unknown argument; did you mean --epochs?"),
        (["--volume=3"], "unknown argument"),
        (["--codebook-update", "x"], "one of ema, gradient, found 'x'"),
        (["--downsampling", "3"], "one of 2, 4, 8, 16, 32, found 3"),
        (["--prior-kernel-size", "4"], "one of 3, 5, 7"),
        (["--recipe", "x"], "one of quickstart, adni-vqvae-pixelcnn"),
        (["--image-size", "axb"], "H or HxW with sides in [16, 4096]"),
        (["--image-size", "8"], "in [16, 4096], found (8, 8)"),
        (
            ["--image-size", "30x32"],
            "30x32 is not a multiple of 4; use 28x32 or 32x32",
        ),
        (["--condition", "slice,age"], "found 'slice,age'"),
        (["--data-dir", "d"], "with --dataset oasis|adni|hipmri or a --recipe"),
    ],
)
def test_bad_flag_exits_2_in_one_line_naming_it(argv, message, capsys):
    assert exit_of(utils.resolve, argv) == 2
    captured = capsys.readouterr()
    name = argv[0].split("=")[0]
    assert captured.err.startswith(f"error: {name}: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_real_data_needs_a_folder(capsys):
    assert exit_of(utils.resolve, ["--dataset", "oasis"]) == 2
    assert "--data-dir is required" in capsys.readouterr().err
    config = utils.resolve(["--dataset", "oasis", "--smoke"])
    assert config.smoke and config.data_dir is None


def test_stray_argument_is_refused():
    with pytest.raises(utils.FlagError, match="^foo: unknown argument"):
        utils.resolve(["foo"])


def test_every_flag_shows_help_and_default(capsys):
    with pytest.raises(SystemExit) as caught:
        utils.resolve(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(utils.Config):
        assert "--" + field.name.replace("_", "-") in text
    for part in (
        "a number in (0, 1]; default 0.0003",
        "one of all, vqvae, prior; default all",
        "data:",
        "VQ-VAE:",
        "prior:",
        "run:",
    ):
        assert part in text


def test_values_are_read_by_type():
    config = utils.resolve(
        "--image-size 64x48 --no-restart --cache --ssim-weight 1 "
        "--condition slice --seed 7 --run-dir r".split()
    )
    assert config.image_size == (64, 48)
    assert utils.resolve(["--image-size", "64"]).image_size == (64, 64)
    assert (config.restart, config.cache, config.seed) == (False, True, 7)
    assert config.ssim_weight == 1.0 and config.run_dir == "r"
    assert config.conditions == ("slice",)
    assert utils.Config().conditions == ()
    config = utils.resolve(["--condition", "label, slice"])
    assert config.conditions == ("label", "slice")


def test_defaults_are_a_valid_configuration():
    quickstart = utils.RECIPES["quickstart"].settings
    assert utils.resolve([]) == utils.Config(**quickstart)
    assert utils.resolve([]).recipe == utils.Config().recipe == "quickstart"


@pytest.mark.parametrize(
    "values", [{"epochs": True}, {"seed": 1.0}, {"recipe": 3}, {"cache": 1}]
)
def test_a_configuration_checks_types_without_a_command_line(values):
    with pytest.raises(utils.FlagError):
        utils.Config(**values)


def test_image_size_respects_levels():
    with pytest.raises(utils.FlagError, match="not a multiple of 16"):
        utils.Config(levels=3, image_size=(64, 40))
    with pytest.raises(utils.FlagError, match="use 32x32$"):
        utils.Config(downsampling=32, image_size=(20, 20))


def test_recipe_wins_over_defaults_and_flags_over_recipe():
    argv = "--recipe adni-vqvae-pixelcnn --data-dir d".split()
    config = utils.resolve(argv)
    assert (config.num_embeddings, config.downsampling) == (32, 8)
    assert config.codebook_update == "gradient" and config.data_dir == "d"
    config = utils.resolve([*argv, "--num-embeddings", "512"])  # the default
    assert (config.num_embeddings, config.downsampling) == (512, 8)
    config = utils.resolve([*argv, "--image-size", "none"])
    assert config.image_size is None


@pytest.mark.parametrize("name", utils.RECIPES)
def test_every_recipe_is_valid_and_listed(name):
    recipe = utils.RECIPES[name]
    folder = ["--data-dir", "d"] if "dataset" in recipe.settings else []
    config = utils.resolve(["--recipe", name, *folder])
    assert config.recipe == name
    assert name in utils.list_recipes()
    assert recipe.figure in utils.list_recipes()


def test_list_recipes_flag_prints_and_ends(capsys):
    assert exit_of(utils.resolve, ["--list-recipes"]) == 0
    text = capsys.readouterr().out
    assert text == utils.list_recipes() + "\n"
    names = [line.split()[0] for line in text.splitlines()]
    assert names == [
        "recipe",
        "quickstart",
        "adni-vqvae-pixelcnn",
        "adni-vqvae-tuned",
        "oasis-vqvae2-pixelsnail",
        "hipmri-vqvae-pixelcnn",
        "oasis-vqvae-pixelcnn",
    ]
    assert "/4 and /8, K=512" in text and "pixelsnail 64 ch" in text


def test_smoked_shrinks_but_keeps_the_architecture():
    config = utils.Config(levels=2, num_embeddings=16, prior_blocks=3)
    small = config.smoked()
    assert (small.levels, small.downsampling) == (2, 4)
    assert (small.epochs, small.prior_epochs, small.prior_blocks) == (1, 1, 1)
    assert small.num_embeddings == 16 and small.channels == 16


@dataclasses.dataclass(frozen=True)
class Generate:
    """Generate 100% new images.

    More text.
    """

    run: str = utils.positional("run folder")
    images: tuple[str, ...] = utils.flag((), "image files")
    num_samples: int = utils.flag(64, "how many", 1, 10**6, short="-n")
    top_p: float | None = utils.flag(None, "share kept", above=0, high=1)

    def __post_init__(self):
        utils.check_fields(self)


@dataclasses.dataclass(frozen=True)
class Show:
    """Show runs."""

    runs: tuple[str, ...] = utils.positional("folders", many=True, default=())
    last: str = utils.positional("one more", default="")

    def __post_init__(self):
        utils.check_fields(self)


VERBS = {"generate": Generate, "show": Show}


def test_verbs_read_positionals_and_short_flags():
    argv = "generate RUN -n 8 --top-p .5 --images a b --debug".split()
    verb, config = utils.parse_verbs(VERBS, argv)
    assert verb == "generate"
    assert config == Generate(
        run="RUN", num_samples=8, top_p=0.5, images=("a", "b")
    )
    assert utils.parse_verbs(VERBS, ["show", "a", "b"])[1].runs == ("a", "b")
    assert utils.parse(Generate, ["R", "--top-p", "none"]).top_p is None


def test_default_verb_serves_an_empty_command_line():
    verb, config = utils.parse_verbs(VERBS, [], default="show")
    assert (verb, config) == ("show", Show())


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "VERB"),
        (["paint"], "VERB: invalid choice"),
        (["generate"], "RUN"),
        (["generate", "R", "-n", "0"], "--num-samples: expected a whole"),
        (["generate", "R", "--num", "3"], "--num: unknown argument"),
        (["generate", "R", "--top-p", "nan"], r"--top-p: .*\(0, 1\]"),
    ],
)
def test_bad_verbs_and_their_flags_are_refused(argv, message):
    with pytest.raises(utils.FlagError, match=message):
        utils.parse_verbs(VERBS, argv)


def test_help_of_verbs_escapes_percent(capsys):
    for argv in (["--help"], ["generate", "--help"]):
        with pytest.raises(SystemExit):
            utils.parse_verbs(VERBS, argv)
        assert "Generate 100% new images." in capsys.readouterr().out


# Files


def fail_midway(path):
    path.write_text("half")
    raise RuntimeError("stopped")


def interrupt_midway(path):
    path.write_text("half")
    raise KeyboardInterrupt


@pytest.mark.parametrize("writer", [fail_midway, interrupt_midway])
def test_failed_write_keeps_the_old_file_alone(tmp_path, writer):
    path = tmp_path / "file.txt"
    utils.write_atomic(path, lambda p: p.write_text("old"))
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        utils.write_atomic(path, writer)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_temporary_file_is_named_for_the_process_and_keeps_the_suffix(tmp_path):
    seen = []

    def write(path):
        seen.append(path)
        path.write_text("new")

    utils.write_atomic(tmp_path / "new" / "m.keras", write)
    name = f"m.keras.tmp-{os.getpid()}.keras"
    assert seen == [tmp_path / "new" / name]
    assert os.listdir(tmp_path / "new") == ["m.keras"]


def test_json_is_sorted_plain_and_refuses_nan(tmp_path):
    path = tmp_path / "a.json"
    utils.write_json(path, {"b": np.float32(0.5), "a": np.arange(2), "é": path})
    text = path.read_text(encoding="utf-8")
    assert text.index('"a"') < text.index('"b"') and "é" in text
    assert json.loads(text) == {"a": [0, 1], "b": 0.5, "é": str(path)}
    with pytest.raises(ValueError):
        utils.write_json(path, {"loss": float("nan")})
    assert path.read_text(encoding="utf-8") == text


def test_csv_round_trip(tmp_path):
    import pandas as pd

    frame = pd.DataFrame({"file": ["a b", "é"], "loss": [0.1, 1e-9]})
    utils.write_csv(tmp_path / "t.csv", frame)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "t.csv"), frame)


def test_sha256(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert utils.file_sha256(tmp_path / "f").startswith("ba7816bf8f01cfea")
    array = np.arange(6, dtype="float32")
    same = utils.array_sha256(array)
    assert utils.array_sha256(np.stack([array, array], 1)[:, 0]) == same
    assert utils.array_sha256(array.reshape(2, 3)) != same
    assert utils.array_sha256(array.astype("int32")) != same


# Run folder


def create(config):
    """A new run that is not in use."""
    run = utils.Run.create(config)
    run.unlock()
    return run


@pytest.fixture
def run(tmp_path):
    return create(
        utils.Config(run_dir=str(tmp_path / "run"), image_size=(32, 48), seed=3)
    )


def test_run_round_trip(run):
    run.update(image_size=[32, 48], latent_grids=[[8, 12]])
    again = utils.Run.open(run.path)
    assert again.config == run.config
    assert again.info == json.loads(json.dumps(run.info))
    assert again.info["latent_grids"] == [[8, 12]]
    assert again.info["versions"]["tensorflow"]
    document = json.loads(run.config_path.read_text())
    assert document["format"] == utils.FORMAT
    assert document["settings"]["seed"] == 3
    assert [p.name for p in (run.vqvae_path, run.figures_path)] == [
        "vqvae.keras",
        "figures",
    ]


@pytest.mark.parametrize(
    "levels, names",
    [
        (1, ["prior"]),
        (2, ["prior_bottom", "prior_top"]),
        (3, ["prior_bottom", "prior_middle", "prior_top"]),
    ],
)
def test_a_prior_file_for_each_level(run, levels, names):
    run.config = dataclasses.replace(run.config, levels=levels)
    assert run.prior_names == names and not run.has_priors
    assert run.prior_paths == [run.path / f"{name}.keras" for name in names]
    for path in run.prior_paths:
        path.write_text("x")
    assert run.has_priors


def test_default_folder_is_named_for_recipe_and_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = create(utils.Config())
    assert run.path.match("runs/quickstart-*-*")


def test_create_refuses_what_is_there_but_not_a_run_that_never_began(run):
    again = create(dataclasses.replace(run.config, seed=4))
    assert utils.Run.open(again.path).config.seed == 4
    run.vqvae_path.write_text("x")
    with pytest.raises(utils.RunError, match="not empty"):
        utils.Run.create(run.config)


def test_create_does_not_replace_a_foreign_config(tmp_path):
    (tmp_path / "config.json").write_text('{"mine": 1}')
    with pytest.raises(utils.RunError):
        utils.Run.create(utils.Config(run_dir=str(tmp_path)))
    assert "mine" in (tmp_path / "config.json").read_text()


def test_create_needs_a_folder_it_can_write(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    config = utils.Config(run_dir=str(tmp_path / "file" / "run"))
    with pytest.raises(utils.ResourceError, match="--run-dir"):
        utils.Run.create(config)

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    config = utils.Config(run_dir=str(tmp_path / "run"))
    with pytest.raises(utils.ResourceError, match="No space left"):
        utils.Run.create(config)
    assert os.listdir(tmp_path / "run") == []


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "no config.json"),
        ("{", "not readable"),
        ("[]", "not readable"),
        ('{"format": 2}', "not readable"),
        ('{"format": "2", "settings": {}}', "not readable"),
        ('{"format": 3, "settings": {}}', "newer"),
        ('{"format": 2, "settings": {"depth": 3}}', "unfit setting.*depth"),
        ('{"format": 2, "settings": {"epochs": -1}}', "unfit.*--epochs"),
        ('{"format": 2, "settings": [1]}', "unfit"),
    ],
)
def test_open_refuses_in_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(utils.RunError, match=message):
        utils.Run.open(tmp_path)


def test_open_names_a_missing_folder(tmp_path):
    with pytest.raises(utils.RunError, match="no such run folder"):
        utils.Run.open(tmp_path / "none")


def test_newest_is_the_last_with_a_model(tmp_path):
    with pytest.raises(utils.RunError, match="python train.py"):
        utils.Run.newest(tmp_path)
    for age, name in enumerate(["b", "a", "c"]):
        config = utils.Config(run_dir=str(tmp_path / name))
        run = create(config)
        if name != "c":
            run.vqvae_path.write_text("x")
            os.utime(run.vqvae_path, (age, age))
    assert utils.Run.newest(tmp_path).path.name == "a"


# Model files


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    keras = utils.keras
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    path = tmp_path_factory.mktemp("model") / "m.keras"
    utils.save_model(model, path)
    return path


def test_model_round_trip(model_file):
    assert os.listdir(model_file.parent) == ["m.keras"]
    model = utils.load_model(model_file)
    assert model(np.ones((1, 3), "float32")).shape == (1, 2)


def test_model_file_missing_or_folder(tmp_path):
    with pytest.raises(utils.RunError, match="no such model file"):
        utils.check_keras_file(tmp_path / "m.keras")
    with pytest.raises(utils.RunError, match="a folder"):
        utils.check_keras_file(tmp_path)


def test_model_file_of_another_kind(tmp_path, model_file):
    for name, content in (
        ("empty.keras", b""),
        ("half.keras", model_file.read_bytes()[:-200]),
        ("m.h5", model_file.read_bytes()),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(utils.RunError, match="not a .keras file"):
            utils.load_model(tmp_path / name)


def test_model_file_with_a_flipped_bit(tmp_path, model_file):
    content = bytearray(model_file.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "m.keras").write_bytes(content)
    with pytest.raises(utils.RunError, match="corrupt"):
        utils.load_model(tmp_path / "m.keras")


def test_model_file_without_weights(tmp_path, model_file):
    path = tmp_path / "m.keras"
    with zipfile.ZipFile(model_file) as old, zipfile.ZipFile(path, "w") as new:
        new.writestr("config.json", old.read("config.json"))
    with pytest.raises(utils.RunError, match="model.weights.h5 is missing"):
        utils.load_model(path)


def test_model_of_an_unknown_class(tmp_path, model_file):
    path = tmp_path / "m.keras"
    with zipfile.ZipFile(model_file) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            text = old.read(name).replace(b'"Dense"', b'"Tense"')
            new.writestr(name, text)
    with pytest.raises(utils.RunError, match="cannot be loaded"):
        utils.load_model(path)


# Seeds and precision


def test_seed_repeats():
    draws = []
    for _ in range(2):
        utils.set_seed(5)
        draws.append((np.random.rand(), float(utils.tf.random.uniform(()))))
    assert draws[0] == draws[1]


def test_precision_is_a_keras_policy_with_a_reason():
    name, reason = utils.choose_precision("auto")
    assert name in ("float32", "mixed_bfloat16") and reason
    assert utils.choose_precision("mixed_float16")[0] == "mixed_float16"


def test_peak_memory_is_plausible():
    assert 10 < utils.peak_memory_mb() < 1e6


# Metrics


def image_pair(height, width, batch=3, seed=0):
    """Return smooth images and noisy copies, (B, H, W, 1) tensors."""
    random = np.random.default_rng(seed)
    x = np.cumsum(random.normal(size=(batch, height, width, 1)), axis=2)
    x = (x - x.min()) / (x.max() - x.min())
    y = np.clip(x + 0.1 * random.normal(size=x.shape), 0, 1)
    return utils.tf.constant(x, "float32"), utils.tf.constant(y, "float32")


SIZES = [(32, 32), (33, 47), (11, 16), (64, 20)]


@pytest.mark.parametrize("height, width", SIZES)
def test_ssim_and_its_gradient_equal_tensorflows(height, width):
    tf = utils.tf
    x, y = image_pair(height, width)
    results = []
    for function in (utils.ssim, lambda a, b: tf.image.ssim(a, b, 1.0)):
        with tf.GradientTape() as tape:
            tape.watch(y)
            value = function(x, y)
        results.append((value.numpy(), tape.gradient(value, y).numpy()))
    (ours, our_gradient), (theirs, their_gradient) = results
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    scale = np.abs(their_gradient).max()
    np.testing.assert_allclose(
        our_gradient / scale, their_gradient / scale, atol=1e-4
    )


def test_ssim_map_size_and_graph_of_unknown_size():
    tf = utils.tf
    x, y = image_pair(30, 24)
    assert utils.ssim_map(x, y).shape == (3, 20, 14)
    anything = tf.TensorSpec((None, None, None, 1))
    function = tf.function(utils.ssim, input_signature=[anything, anything])
    np.testing.assert_allclose(function(x, y), utils.ssim(x, y), atol=1e-6)


def test_ssim_is_computed_in_float32():
    tf = utils.tf
    x, y = (tf.cast(z, "bfloat16") for z in image_pair(32, 32))
    value = utils.ssim(x, y)
    assert value.dtype == "float32"
    expected = tf.image.ssim(tf.cast(x, "float32"), tf.cast(y, "float32"), 1.0)
    np.testing.assert_allclose(value, expected, atol=1e-5)


def test_ssim_max_val():
    x, y = image_pair(32, 32)
    value = utils.ssim(255 * x, 255 * y, max_val=255.0)
    np.testing.assert_allclose(value, utils.ssim(x, y), atol=1e-4)


def test_ssim_foreground_ignores_background():
    x, y = (z.numpy() for z in image_pair(64, 64, batch=2))
    x[0, :, :32] = y[0, :, :32] = 0
    x[1], y[1] = 0, 0
    value = utils.ssim_foreground(x, y).numpy()
    assert value[0] < utils.ssim(x, y).numpy()[0]
    assert np.isnan(value[1])


def test_ms_ssim_equals_tensorflows_where_all_scales_fit():
    x, y = image_pair(256, 256, batch=2)
    assert utils.ms_ssim_scales(256, 256) == 5
    expected = utils.tf.image.ssim_multiscale(x, y, 1.0)
    np.testing.assert_allclose(utils.ms_ssim(x, y), expected, atol=1e-5)


@pytest.mark.parametrize(
    "height, width, scales", [(16, 300, 1), (45, 61, 3), (128, 104, 4)]
)
def test_ms_ssim_of_small_and_odd_images(height, width, scales):
    x, y = image_pair(height, width)
    assert utils.ms_ssim_scales(height, width) == scales
    weights = np.array(utils.MS_SSIM_WEIGHTS[:scales])
    weights *= sum(utils.MS_SSIM_WEIGHTS) / weights.sum()
    expected = utils.tf.image.ssim_multiscale(
        x, y, 1.0, power_factors=weights.tolist()
    )
    np.testing.assert_allclose(utils.ms_ssim(x, y), expected, atol=1e-5)


def test_psnr_and_mae():
    x, y = image_pair(16, 16)
    expected = utils.tf.image.psnr(x, y, 1.0)
    np.testing.assert_allclose(utils.psnr(x, y), expected, rtol=1e-5)
    np.testing.assert_allclose(utils.psnr(x, x), 100.0, rtol=1e-6)
    np.testing.assert_allclose(utils.mae(x, x + 0.25), 0.25, rtol=1e-5)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        subjects = np.repeat(np.arange(40), 8)
        values = random.normal(size=40)[subjects] + random.normal(size=320)
        low, high = utils.bootstrap_by_subject(values, subjects, 500, trial)[
            "ci95"
        ]
        covered += low < 0 < high
    assert 178 <= covered <= 199  # 93 % +- 3 sd


def test_bootstrap_resamples_subjects_not_slices():
    subjects = np.repeat(["a", "b", "c", "d"], 50)
    values = np.repeat([0.0, 0.0, 1.0, 1.0], 50)
    result = utils.bootstrap_by_subject(values, subjects)
    assert result["mean"] == 0.5 and result["ci95"] == [0.0, 1.0]
    assert result == utils.bootstrap_by_subject(values, subjects)


def test_bootstrap_leaves_nan_out():
    result = utils.bootstrap_by_subject([1, np.nan, 1], ["a", "b", "c"])
    assert result == {"mean": 1.0, "ci95": [1.0, 1.0]}
    result = utils.bootstrap_by_subject([np.nan], ["a"])
    assert result == {"mean": None, "ci95": [None, None]}


def test_codebook_stats():
    stats = utils.codebook_stats(np.arange(64).reshape(4, 4, 4), 64)
    assert stats["usage"] == 1 and stats["entropy_bits"] == 6
    assert stats["perplexity"] == pytest.approx(64)
    stats = utils.codebook_stats(np.full((2, 3), 5), 8)
    assert (stats["usage"], stats["perplexity"]) == (1 / 8, 1)
    assert stats["counts"].tolist() == [0, 0, 0, 0, 0, 6, 0, 0]
    with pytest.raises(ValueError, match="0 to 7, found 8"):
        utils.codebook_stats([8], 8)


def test_unigram_bits():
    even = np.arange(8).repeat(1000)
    assert utils.unigram_bits(even, [3, 3, 5], 8) == pytest.approx(3)
    bits = utils.unigram_bits([0, 0], [0, 1], 2)
    assert bits == pytest.approx(-(np.log2(3 / 4) + np.log2(1 / 4)) / 2)


# Figures


def check_png(path, width=400):
    """Check that a figure is a readable, not blank PNG, alone in its folder."""
    from matplotlib import image

    pixels = image.imread(path)
    assert pixels.shape[1] >= width and pixels.std() > 0
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("count", [1, 5])
def test_figure_reconstructions(tmp_path, count):
    x, y = (z.numpy() for z in image_pair(32, 24, count))
    path = tmp_path / "f" / "r.png"
    utils.figure_reconstructions(path, x, y, np.ones(count), "title")
    check_png(path)


@pytest.mark.parametrize("levels", [1, 3])
def test_figure_index_maps(tmp_path, levels):
    x, _ = image_pair(32, 24, 2)
    grids = [np.ones((2, 8 >> k, 6 >> k), int) for k in range(levels)]
    utils.figure_index_maps(tmp_path / "i.png", x.numpy(), grids, 16)
    check_png(tmp_path / "i.png")


@pytest.mark.parametrize("count", [1, 7, 64])
def test_figure_samples(tmp_path, count):
    x, _ = image_pair(32, 24, count)
    captions = [f"slice {k}" for k in range(count)]
    utils.figure_samples(tmp_path / "s.png", x.numpy(), "title", captions)
    check_png(tmp_path / "s.png")


def test_figure_history(tmp_path):
    import pandas as pd

    rows = [
        {"stage": "vqvae", "epoch": 1, "loss": 2.0, "val_loss": 3.0, "b": 1},
        {"stage": "vqvae", "epoch": 2, "loss": 1.0, "val_loss": 2.0, "b": 2},
        {"stage": "prior", "epoch": 1, "loss": 1.0},
    ]
    for count in (0, 1, 3):
        frame = pd.DataFrame(rows, columns=[*rows[0], "seconds"])[:count]
        utils.figure_history(tmp_path / "h.png", frame)
        check_png(tmp_path / "h.png")


def test_figure_codebook(tmp_path):
    counts = [np.array([5, 0, 90]), np.zeros(4, int)]
    utils.figure_codebook(tmp_path / "c.png", counts)
    check_png(tmp_path / "c.png")
