"""Tests of utils.py. Tables of cases are text, a case a line."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

import utils
from tests.conftest import ROOT, blobs, exit_code, run_python


def raising(error):
    """Return a main function that raises `error`."""

    def main(argv):
        raise error

    return main


def cases(table):
    """Parametrize a test by the lines of a table of texts."""
    lines = [line.strip() for line in table.strip().splitlines()]
    rows = [tuple(cell.strip() for cell in line.split("|")) for line in lines]
    return pytest.mark.parametrize("case", rows, ids=lines)


def test_user_errors_are_one_line_and_an_exit_code(capsys):
    for code, kind in ((2, "Flag"), (3, "Data"), (4, "Run"), (5, "Numerics")):
        error = getattr(utils, f"{kind}Error")("a\n  b")
        assert exit_code(raising(error)) == code
        lines = "a\nb" if kind == "Data" else "a b"  # a list of files
        assert capsys.readouterr().err == f"error: {lines}\n"
    errors = utils.tf.errors
    for error, message in (
        (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "f"), "f: Perm"),
        (OSError("write failed, No space left on device"), "No space left"),
        (OSError("86528 requested and 42944 written"), "No space left"),
        (errors.UnknownError(None, None, "f; Input/output error"), "Input/"),
        (MemoryError(), "--batch-size"),
        (errors.ResourceExhaustedError(None, None, "OOM"), "out of memory"),
        (errors.UnavailableError(None, None, "gone"), "worker died"),
    ):
        assert exit_code(raising(error)) == 6
        captured = capsys.readouterr().err
        assert message in captured and captured.count("\n") == 1


def test_how_a_program_ends(capsys):
    assert exit_code(raising(KeyboardInterrupt())) == 130
    assert exit_code(raising(utils.Stopped(signal.SIGTERM))) == 143
    assert capsys.readouterr().err == "interrupted\nstopped by SIGTERM\n"
    with pytest.raises(ZeroDivisionError):  # a defect keeps its traceback
        utils.run_main(raising(ZeroDivisionError()), [])
    with pytest.raises(utils.DataError):
        utils.run_main(raising(utils.DataError("x")), ["--debug"])


def test_closed_streams_end_quietly():
    code = "import utils\ndef main(argv):\n  while True: print('x' * 1000)\n"
    code += "utils.run_main(main, [])"
    shell = f'{sys.executable} -c "$0" | head -n 1'
    done = subprocess.run(["bash", "-c", shell, code], cwd=ROOT, stderr=-1)
    assert done.stderr == b""
    shell = f'{sys.executable} -c "$0" <&- >&- 2>&-'
    code = "import utils; utils.tf.constant(1)"
    assert not subprocess.call(["bash", "-c", shell, code], cwd=ROOT)


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with utils.StopSignals():
        os.kill(os.getpid(), signal.SIGHUP)
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_second_signal_ends_at_once(name, capfd, monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda _: None)  # under nohup too
    number, done = signal.Signals[name], []
    for deferred, times in ((True, 1), (True, 2), (False, 1)):
        with pytest.raises(utils.Stopped) as stopped, utils.StopSignals() as s:
            with s.deferred() if deferred else contextlib.nullcontext():
                for _ in range(times):
                    os.kill(os.getpid(), number)
                done.append((deferred, times, s.received))
        assert stopped.value.exit_code == 128 + number
    assert done == [(True, 1, number)]
    assert f"{name}: stopping soon" in capfd.readouterr().out


def test_a_signal_in_a_finalizer_is_not_lost():
    class Noted:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(utils.Stopped), utils.StopSignals():
        Noted()
        time.sleep(20)


def test_help_needs_no_heavy_package():
    done = run_python(
        "-c",
        "import sys, train, utils; wave = utils.lazy_import('wave')\n"
        "try: utils.parse_training(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = set('tensorflow keras pandas matplotlib scipy sklearn'\n"
        "  ' skimage PIL filelock nibabel nilearn optuna wave'.split())\n"
        "print('loaded:', heavy & set(sys.modules), callable(wave.open))",
    )
    assert "loaded: set() True" in done.stdout, done.stderr
    profiled = run_python("-m", "cProfile", ROOT / "predict.py", "--help")
    assert profiled.stdout.startswith("usage: predict.py"), profiled.stderr


def test_the_environment_of_the_user_does_not_matter(tmp_path):
    settings = {"image_data_format": "channels_first", "floatx": "float16"}
    (tmp_path / "keras.json").write_text(json.dumps(settings))
    done = run_python(
        "-c",
        "import utils, sys; from matplotlib import pyplot\n"
        "k = utils.keras.config\n"
        "print(k.backend(), k.image_data_format(), k.floatx())\n"
        "print('heard', file=sys.stderr); pyplot.figure()",
        KERAS_HOME=str(tmp_path),
        KERAS_BACKEND="jax",
        MPLBACKEND="module://gone",
    )
    assert done.stdout == "tensorflow channels_last float32\n"
    # Errors show, the notices of TensorFlow's start do not.
    assert done.stderr == "heard\n"
    # So do the last words of a fatal start.
    text = "import os; os.write(2, b'W0000 note\\nno AVX here\\n'); os.abort()"
    (tmp_path / "tensorflow.py").write_text(text)
    place = f"{tmp_path}:{ROOT}"
    done = run_python("-c", "import utils; utils.tf.x", PYTHONPATH=place)
    assert done.returncode == -signal.SIGABRT and done.stderr == "no AVX here\n"


@cases("""
    --learning-rate nan | a number in (0, 1], found nan
    --learning-rate 0 | a number in (0, 1], found 0.0
    --learning-rate x | a number in (0, 1], found 'x'
    --decay 1 | a number in [0, 1), found 1.0
    --epochs -1 | a whole number in [1, 1000000], found -1
    --epochs 1.5 | a whole number in [1, 1000000], found '1.5'
    --epochs | expected a whole number in [1, 1000000], found nothing
    --epoch 3 | unknown argument; did you mean --epochs?
    --zq=3 | unknown argument; see --help
    foo | unknown argument
    --codebook-update x | one of ema, gradient, found x
    --downsampling 3 | one of 2, 4, 8, 16, 32, found 3
    --prior-level 4 | a whole number in [1, 3], found 4
    --prior-level x | a whole number in [1, 3], found 'x'
    --prior-level 2 | at most 1, found 2
    --prior-level 1 | needs --stage prior
    --prior-channels 9 --prior pixelsnail | expected a multiple of 2
    --recompute --prior-dropout 0.1 | does not go with --prior-dropout
    --recipe x | one of quickstart, adni-vqvae-pixelcnn
    --image-size axb | H or HxW, both a whole number in [16, 4096], found 'a'
    --image-size 8 | in [16, 4096], found 8x8
    --image-size 30x32 | not a multiple of 4; use 32x32
    --image-size 20 --downsampling 32 | use 32x32
    --condition slice,age | label,slice, found slice,age
    --data-dir d | also say its layout: --dataset oasis
    --dataset oasis | --data-dir is required for --dataset oasis
    --tune 3 --prior-level 1 | does not go with --resume, --prior-level
    --stage prior | needs --run-dir
    --stage texture --texture-epochs 1 | needs --run-dir
    --texture-epochs 1 --downsampling 2 | needs a total downsampling of 4
    """)
def test_bad_flag_exits_2_in_one_line_naming_it(case, capsys):
    argv, message = case
    assert exit_code(utils.parse_training, *argv.split()) == 2
    captured = capsys.readouterr()
    named = "--data-dir" if argv.startswith("--dataset") else argv.split()[0]
    assert captured.err.startswith(f"error: {named.split('=')[0]}")
    assert message in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_every_flag_shows_help_bounds_and_default(capsys):
    assert exit_code(utils.parse_training, "--help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    keys = utils.flat(utils.Settings())
    for part in (
        *(f"--{key.replace('_', '-')}" for key in keys),
        "--channels [1, 4096] Feature channels. (default: 48)",
        "None: chosen on validation subjects. (default: 1.0)",
        "--condition none|label|slice|label,slice Class label",
        "--image-size {None}|H[xW] Height and width, 16 to",
    ):
        assert part in text


def test_values_are_read_by_type():
    chosen = utils.parse_training(
        "--image-size 64x48 --no-crop --ssim-weight 1 --condition label,slice "
        "--seed 7 --run_dir r --prior=gated".split()
    )
    assert chosen.data.image_size == (64, 48) and not chosen.data.crop
    assert (chosen.run.seed, chosen.run.run_dir) == (7, "r")
    assert chosen.vqvae.ssim_weight == 1.0 and chosen.prior.network == "gated"
    assert chosen.prior.condition == "label,slice"
    for word, size in (("64", (64, 64)), ("None", None)):
        chosen = utils.parse_training(["--image-size", word])
        assert chosen.data.image_size == size


def test_flags_override_the_recipe_and_the_recipe_the_defaults(capsys):
    assert utils.parse_training([]) == utils.RECIPES["quickstart"].settings
    argv = "--recipe adni-vqvae-pixelcnn --data-dir . --num-embeddings 512"
    for words, number in ((4, 32), (6, 512)):  # 512 is the default, too
        chosen = utils.parse_training(argv.split()[:words])
        assert chosen.vqvae.num_embeddings == number
        assert chosen.vqvae.downsampling == 8 and chosen.data.data_dir == "."
    with pytest.raises(utils.DataError, match="^x: not a folder"):
        utils.parse_training(argv.replace("dir .", "dir x").split())
    assert exit_code(utils.parse_training, "--list-recipes") == 0
    text = capsys.readouterr().out
    for name, recipe in utils.RECIPES.items():
        assert recipe.settings.recipe == name and recipe.figure in text


def test_failed_write_keeps_the_old_file_alone(tmp_path):
    path, seen = tmp_path / "new" / "m.keras", []

    def write(temporary):
        seen.append(temporary)
        temporary.write_text("half")
        if len(seen) > 1:
            raise KeyboardInterrupt

    utils.write_atomic(path, write)
    with pytest.raises(KeyboardInterrupt):
        utils.write_atomic(path, write)
    assert os.listdir(path.parent) == ["m.keras"]
    assert seen[0].suffix == ".keras" and f"-{os.getpid()}." in seen[0].name


def refusing(number):
    """Return a function that fails with a number of `errno`."""

    def call(*arguments):
        raise OSError(number, os.strerror(number))

    return call


def test_file_systems_without_fsync_and_locks(tmp_path, monkeypatch, capsys):
    for name, module in (("fsync", os), ("flock", fcntl)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, refusing(errno.EOPNOTSUPP))
            run = create(tmp_path / name)
        assert run.config_path.exists() and not run.lock_path.exists()
    assert capsys.readouterr().err.count("cannot lock out") == 1


def test_json_is_sorted_plain_and_refuses_nan(tmp_path):
    path = tmp_path / "a.json"
    utils.write_json(path, {"b": np.float32(0.5), "a": np.arange(2), "é": path})
    text = path.read_text(encoding="utf-8")
    assert text.index('"a"') < text.index('"b"') and "é" in text
    assert json.loads(text) == {"a": [0, 1], "b": 0.5, "é": str(path)}
    with pytest.raises(ValueError):
        utils.write_json(path, {"loss": float("nan")})
    assert path.read_text(encoding="utf-8") == text


def create(folder, **values):
    """A new run that is not in use."""
    settings = utils.replace(utils.Settings(), run_dir=str(folder), **values)
    run = utils.Run.create(settings)
    run.unlock()
    return run


@pytest.fixture
def run(tmp_path):
    return create(tmp_path / "run", image_size=(32, 48), seed=3)


def test_run_round_trip(run):
    run.update(image_size=[32, 48], latent_grids=[[8, 12]], dir="\udce9")
    again = utils.Run.open(run.path)
    assert again.settings == run.settings
    assert again.info == json.loads(json.dumps(run.info))
    run.path = run.path.parent / "elsewhere"  # as `--output` does
    assert run.vqvae_path == run.path / "vqvae.keras"
    names = {1: "", 2: "_bottom _top", 3: "_bottom _middle _top"}
    for levels, ends in names.items():
        run.settings = utils.replace(utils.Settings(), levels=levels)
        assert run.prior_names == [f"prior{end}" for end in ends.split(" ")]


def test_settings_of_the_models_stay_until_the_training_is_complete(run):
    run.complete()
    run.settings = longer = utils.replace(run.settings, epochs=40)
    run.begin(done=["vqvae"], first={"vqvae": 30})
    again = utils.Run.open(run.path)
    assert again.settings.training.epochs == 30
    assert again.training_settings == longer
    again.note_done("prior")
    assert again.is_done("vqvae") and again.is_done("prior")
    assert again.info["training"]["first"] == {"vqvae": 30}
    again.complete()
    assert utils.Run.open(run.path).settings == longer


def test_create_refuses_what_is_there_or_in_use(run, tmp_path, monkeypatch):
    with pytest.raises(utils.RunError, match="not empty"):
        create(run.path)
    monkeypatch.chdir(tmp_path)
    runs = [utils.Run.create(utils.Settings()) for _ in range(3)]  # at once
    assert len({run.path for run in runs}) == 3
    for run in runs:
        assert run.path.match("runs/quickstart-*-*")
        with pytest.raises(utils.RunError, match="in use by another process"):
            create(run.path)
        run.discard()
        assert not run.path.exists()


def test_create_needs_a_folder_it_can_write(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(utils.ResourceError, match="--run-dir"):
            create(folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to("gone")
    with pytest.raises(utils.ResourceError, match="cannot write a run folder"):
        utils.Run.create(utils.Settings())
    monkeypatch.setattr(os, "replace", refusing(errno.ENOSPC))
    with pytest.raises(utils.ResourceError, match="No space left"):
        create(tmp_path / "run")
    assert os.listdir(tmp_path / "run") == []


ALL = '"format": 7, "settings": ' + json.dumps(utils.flat(utils.Settings()))


@cases(f"""
    {{ | not readable
    [] | not readable
    {{"format": 7}} | not readable
    {{"format": 8, "settings": {{}}}} | format 8.*the version that made
    {{"format": 7, "settings": {{"epochs": -3}}}} | unfit setting.*--epochs
    {{"format": 7, "settings": [1]}} | unfit
    {{{ALL[:-1]}, "epochs": true}}}} | unfit.*--epochs
    {{{ALL[:-1]}, "image_size": [32, 8]}}}} | unfit.*--image-size
    {{{ALL[:-1]}, "image_size": [30, 30]}}}} | unfit.*multiple
    """)
def test_open_refuses_in_one_line(tmp_path, case):
    for path, message in ((tmp_path, "no config"), (tmp_path / "x", "no such")):
        with pytest.raises(utils.RunError, match=message):
            utils.Run.open(path)
    (tmp_path / "config.json").write_text(case[0])
    with pytest.raises(utils.RunError, match=case[1]):
        utils.Run.open(tmp_path)


def test_newest_is_the_last_with_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "RESOURCES", tmp_path / "resources")
    with pytest.raises(utils.RunError, match="python train.py"):
        utils.Run.newest(tmp_path / "runs")
    shipped = create(tmp_path / "resources" / "pretrained" / "oasis")
    shipped.vqvae_path.write_text("x")
    assert utils.Run.newest(tmp_path / "runs").path == shipped.path
    for age, name in enumerate(["b", "a", "c"]):
        run = create(tmp_path / "runs" / name)
        if name != "c":
            run.vqvae_path.write_text("x")
            os.utime(run.vqvae_path, (age, age))
    assert utils.Run.newest(tmp_path / "runs").path.name == "a"


@cases("""
    --resume RUN |
    --resume RUN --seed 3 --strategy none --force |
    --resume RUN --epochs 40 --prior-epochs 200 | epochs=40
    --resume RUN --data-dir d | data_dir=d
    --resume RUN --epochs 4 | epochs=4
    --resume RUN --seed 4 | !--seed
    --resume RUN --run-dir x | !--run-dir
    --resume RUN --recipe adni-vqvae-tuned --data-dir x | !--recipe
    --stage prior --run-dir RUN --prior-channels 8 | prior_channels=8
    --stage prior --run-dir RUN --seed 5 | stage=prior
    --stage prior --run-dir RUN --image-size 64 | !--image-size
    --stage prior --run-dir RUN --texture-epochs 5 | !--texture-epochs
    --stage texture --run-dir RUN --texture-epochs 5 | texture_epochs=5
    """)
def test_a_training_that_starts_from_a_run(case, tmp_path):
    run = create(tmp_path / "run", epochs=12, prior_channels=96, seed=3)
    run.update(image_size=[61, 47])  # odd: the crop is not
    run.complete()
    argv, expected = case[0].replace("RUN", str(run.path)).split(), case[1]
    if expected.startswith("!"):
        with pytest.raises(utils.FlagError, match=f"^{expected[1:]}: the run"):
            utils.parse_training(argv)
        return
    chosen = utils.flat(utils.parse_training(argv))
    key, _, value = (expected or "prior_channels=96").partition("=")
    assert utils.typed(chosen[key]) == value


def test_tables_of_a_run(run):
    for read in (utils.read_history, utils.read_split_table):
        with pytest.raises(utils.RunError, match="missing from the run"):
            read(run)
    columns = {
        "path": ["a\udce9.png", "NA"],
        "subject": ["001", "NA"],
        "label": ["", "AD"],
        "split": ["train", "test"],
        "position": [0.1 + 0.2, np.nan],
        "low": [np.nan, 3.0],
    }
    utils.write_csv(run.split_path, pd.DataFrame(columns))
    found = utils.read_split_table(run)
    pd.testing.assert_frame_equal(found, pd.DataFrame(columns))


def test_devices(monkeypatch):
    name, reason = utils.choose_precision("auto")
    assert name in ("float32", "mixed_bfloat16") and reason
    assert utils.choose_precision("mixed_float16")[0] == "mixed_float16"
    assert 100 < utils.peak_memory_mb() < 1e5
    monkeypatch.setattr(os.path, "exists", lambda path: True)  # a driver
    monkeypatch.setattr(utils.tf.test, "is_built_with_cuda", lambda: True)
    for visible, text in (("-1", "hides every GPU"), ("0", "cannot use it")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert text in utils.describe_devices()


def image_pair(height, width, batch=3):
    """Return smooth images and noisy copies, (B, H, W, 1) tensors."""
    random = np.random.default_rng(0)
    x = np.cumsum(random.normal(size=(batch, height, width, 1)), axis=2)
    x = (x - x.min()) / (x.max() - x.min())
    y = np.clip(x + 0.1 * random.normal(size=x.shape), 0, 1)
    return utils.tf.constant(x, "float32"), utils.tf.constant(y, "float32")


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (11, 16)])
def test_ssim_and_its_gradient_equal_tensorflows(size):
    tf = utils.tf
    x, y = image_pair(*size)

    def theirs(a, b):
        return tf.image.ssim(tf.cast(a, "float32"), tf.cast(b, "float32"), 1.0)

    results = []
    for function in (utils.ssim, theirs):
        with tf.GradientTape() as tape:
            tape.watch(y)
            value = function(x, y)
        gradient = tape.gradient(value, y).numpy()
        results.append((value.numpy(), gradient / np.abs(gradient).max()))
    for ours, expected in zip(*results, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)
    anything = tf.TensorSpec((None, None, None, 1), "bfloat16")
    function = tf.function(utils.ssim, input_signature=[anything, anything])
    x, y = (tf.cast(z, "bfloat16") for z in (x, y))
    np.testing.assert_allclose(function(x, y), theirs(x, y), atol=1e-5)


def test_other_scores_of_pairs():
    x, y = image_pair(180, 176, batch=2)
    expected = utils.tf.image.ssim_multiscale(x, y, 1.0)
    np.testing.assert_allclose(utils.ms_ssim(x, y), expected, atol=1e-5)
    expected = utils.tf.image.psnr(x, y, 1.0)
    np.testing.assert_allclose(utils.psnr(x, y), expected, rtol=1e-5)
    np.testing.assert_allclose(utils.psnr(x, x), 100.0, rtol=1e-6)
    np.testing.assert_allclose(utils.mae(x, x + 0.25), 0.25, rtol=1e-5)
    x, y = (z.numpy() for z in (x, y))
    x[0, :, :88] = y[0, :, :88] = 0  # background
    x[1], y[1] = 0, 0
    value = utils.ssim_foreground(x, y).numpy()
    assert value[0] < utils.ssim(x, y).numpy()[0] and np.isnan(value[1])


def test_kernel_distance_by_hand_and_its_interval():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=6), rng.normal(1, size=5)
    of_x = np.array([*"abbcde"])
    found = utils.kernel_distance(x[:, None], y[:, None], of_x, range(5))
    xx, yy, xy = [(np.outer(*p) + 1) ** 3 for p in ((x, x), (y, y), (x, y))]
    within_x = xx[of_x[:, None] != of_x].mean()  # not b with b
    within_y = yy[~np.eye(5, dtype=bool)].mean()
    wanted = within_x + within_y - 2 * xy.mean()
    assert found["mean"] == pytest.approx(wanted)
    x, y = rng.normal(size=(40, 2)), rng.normal(1, size=(40, 2))
    found = utils.kernel_distance(x, y, np.arange(40), np.arange(40))
    low, high = found["ci95"]
    assert 0 < low < found["mean"] < high
    four = np.arange(40) % 4  # too few to judge by
    assert utils.kernel_distance(x, y, np.arange(40), four) is None


def test_bootstrap_resamples_subjects_and_leaves_nan_out():
    covered, random = 0, np.random.default_rng(0)
    subjects = np.repeat(np.arange(40), 8)
    for trial in range(200):
        values = random.normal(size=40)[subjects] + random.normal(size=320)
        found = utils.bootstrap(utils.mean_of(values), subjects, 500, trial)
        covered += found["ci95"][0] < 0 < found["ci95"][1]
    assert 178 <= covered <= 199  # 93 % +- 3 sd
    for values, subjects, mean, interval in (
        ([0, 0, 1, 1, 0.5] * 50, [*"abcde"] * 50, 0.5, [0.1, 0.9]),
        ([1, np.nan, 1, 1, 1], "abcde", 1.0, [1.0, 1.0]),
        ([0, 0, 1, 1] * 50, [*"abcd"] * 50, 0.5, [None, None]),
        ([np.nan], "a", None, [None, None]),
        ([], [], None, [None, None]),
    ):
        found = utils.bootstrap(utils.mean_of(values), [*subjects])
        assert found == {"mean": mean, "ci95": pytest.approx(interval)}


def test_codebook_stats_and_unigram_bits():
    stats = utils.codebook_stats(np.arange(64).reshape(4, 4, 4), 64)
    assert stats["usage"] == 1 and stats["entropy_bits"] == 6
    assert stats["perplexity"] == pytest.approx(64)
    stats = utils.codebook_stats(np.full((2, 3), 5), 8)
    assert (stats["usage"], stats["perplexity"]) == (1 / 8, 1)
    even = np.arange(8).repeat(1000)
    assert utils.unigram_bits(even, [3, 3, 5], 8) == pytest.approx(3)
    bits = utils.unigram_bits([0, 0], [0, 1], 2)
    assert bits == pytest.approx(-(np.log2(3 / 4) + np.log2(1 / 4)) / 2)


def test_frechet_distance():
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(1)
    x, y = (rng.normal(size=(60, 4)) @ rng.normal(size=(4, 4)) for _ in "xy")
    a, b, gap = np.cov(x.T), np.cov(y.T), x.mean(0) - y.mean(0)
    expected = gap @ gap + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert utils.frechet_distance(x, y) == pytest.approx(expected)
    assert utils.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    x, y = rng.normal(size=(2, 5, 20))  # fewer images than dimensions
    assert 0 < utils.frechet_distance(x, y) < np.inf


def test_precision_recall_density_coverage_by_hand():
    real = np.array([[0.0], [1.0], [2.0], [10.0]])
    fake = np.array([[0.5], [0.6], [5.0]])
    found = utils.manifold_scores(fake, real, range(3), range(4), k=1)
    # balls: real of 1, 1, 1 and 8; fake of 0.1, 0.1 and 4.4
    means = {name: score["mean"] for name, score in found.items()}
    assert means == pytest.approx(
        # [1, 1, 1], [0, 1, 1, 0], [2, 2, 1], [1, 1, 0, 1]
        {"precision": 1, "recall": 1 / 2, "density": 5 / 3, "coverage": 3 / 4}
    )
    for owners, k in (([0] * 4, 1), (range(4), 3)):
        found = utils.manifold_scores(fake, real, range(3), owners, k)
        assert set(found.values()) == {None}


def test_jackknife_of_a_ratio():
    values = np.random.default_rng(0).uniform(1, 3, 200)
    people = np.repeat(np.arange(20), 10)
    low, high = utils.jackknife_ratio(lambda own: values[own].mean(), people)
    error = np.std([values[people == k].mean() for k in range(20)]) / 20**0.5
    assert low < values.mean() < high
    assert (high - low) / 4 == pytest.approx(error, rel=0.02)
    for some in (people[:10], people[:40]):  # one person, four
        assert utils.jackknife_ratio(lambda own: 1.0, some) is None


def test_hog_ignores_the_background():
    from skimage.feature import hog

    image = np.random.default_rng(0).uniform(0.1, 1, (96, 48)).astype("f4")
    image[:20] = 0.049  # invisible
    clean = np.where(image > 0.05, image - 0.05, 0) / 100  # contrast 0.001
    found = utils.hog_features(image[None])
    expected = hog(clean, 9, (4, 4), cells_per_block=(2, 2), block_norm="L2")
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)


def people(first, count, size=(48, 40)):
    """Eight images (N, H, W) each of people, alike in one; subjects (N,)."""
    subjects = np.repeat(np.arange(first, first + count), 8)
    keys = [(person, k % 8) for k, person in enumerate(subjects)]
    own = np.array([blobs(*key, shape=size) for key in keys])
    shared = np.array([blobs(person, shape=size) for person in subjects])
    return ((0.7 * shared + 0.3 * own) / 255).astype("float32"), subjects


def noisy(images):
    noise = np.random.default_rng(0).normal(0, 0.02, images.shape)
    return np.clip(images + noise, 0, 1).astype("float32")


def test_c2st_is_near_chance_for_one_kind_and_1_for_two():
    (a, of_a), (b, of_b) = people(0, 12), people(100, 12)
    same = utils.c2st(a, b, of_a, of_b)
    assert 0.3 < same["mean"] < 0.7
    assert same["ci95"][0] < same["mean"] < same["ci95"][1]
    assert utils.c2st(noisy(a), b, range(len(a)), of_b)["mean"] > 0.95
    assert utils.c2st(a, b, of_a, np.zeros(len(b))) is None


def test_copies_of_training_images_raise_the_alarm():
    train, _ = people(0, 6)
    (unseen, subjects), (fresh, _) = people(100, 13), people(200, 5)

    def audit(generated, unseen=unseen, subjects=subjects):
        known = np.array_split(train[..., None], 5)
        near = utils.nearest_images(generated, known)
        far = utils.nearest_images(unseen, known)
        found, copies = utils.audit(near, far, subjects, n=100)
        json.dumps(found, allow_nan=False)
        return found, copies

    mixed = np.concatenate([noisy(train[10:15]), fresh, 0 * fresh[:2]])
    found, copies = audit(mixed)
    assert found["alarm"] is True
    assert list(np.flatnonzero(copies)) == [0, 1, 2, 3, 4]
    found, copies = audit(fresh)
    assert found["alarm"] is False and not copies.any()
    low, high = found["pixels"]["ratio_of_medians_ci95"]
    assert low < found["pixels"]["ratio_of_medians"] < high
    found, copies = audit(noisy(train), unseen[:99], subjects[:99])
    assert found["alarm"] is None and not copies.any()
    assert found["pixels"]["share_closer"] is None
    assert found["pixels"]["ratio_of_medians"] < 0.5
