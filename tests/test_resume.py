"""A training that is stopped, killed or broken off loses nothing."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import modules
import predict
import train
import utils
from tests import kill_and_resume
from tests.conftest import copy_run, train_tiny

# All that has a state: dropout, averages, restarts, a cache, two levels.
FLAGS = (
    "--levels 2 --restart --cache --prior pixelsnail --prior-dropout 0.2 "
    "--prior-ema-momentum 0.9 --condition-dropout 0.3 --no-evaluate"
).split()


def stop_after(batches, monkeypatch, number=signal.SIGTERM):
    """Send this process a signal after so many batches."""
    left = batches
    on_train_batch_end = modules.Checkpoint.on_train_batch_end

    def count(self, batch, logs=None):
        nonlocal left
        left -= not self.was_done(batch)
        if left == 0:
            os.kill(os.getpid(), number)
        on_train_batch_end(self, batch, logs)

    monkeypatch.setattr(modules.Checkpoint, "on_train_batch_end", count)


def train_with_stops(run_dir, data, every, monkeypatch):
    """Train, stopped after every so many batches; how often that was."""
    stops = 0
    while True:
        with monkeypatch.context() as patch:
            stop_after(every, patch)
            try:
                if stops:
                    train.main(["--resume", str(run_dir)])
                else:
                    train_tiny(run_dir, *FLAGS, data=data)
            except utils.Stopped as stopped:
                assert stopped.exit_code == 143
                stops += 1
                continue
        return stops


def test_stopped_again_and_again_gives_the_same_bits(
    oasis_dir, tmp_path, monkeypatch
):
    """In the middle of the VQ-VAE and of the second prior."""
    alone = train_tiny(tmp_path / "alone", *FLAGS, data=oasis_dir)
    stopped = tmp_path / "stopped"
    assert train_with_stops(stopped, oasis_dir, 7, monkeypatch) == 2
    assert kill_and_resume.differences(alone.path, stopped) == []
    for _, stage in pd.read_csv(stopped / "history.csv").groupby("stage"):
        assert list(stage["epoch"]) == [1, 2]
        assert stage["seconds"].is_monotonic_increasing
    assert not (stopped / "checkpoint").exists()
    assert "training" not in json.loads((stopped / "config.json").read_text())


def test_killed_again_and_again_gives_the_same_bits():
    """The short form of what the script does with 20 kills."""
    script = kill_and_resume.__file__
    result = subprocess.run(
        [sys.executable, script, "--kills", "2"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "equal to the bit" in result.stdout
    assert "killed while writing" in result.stdout


@pytest.fixture(scope="module")
def half_done(oasis_dir, tmp_path_factory):
    """A run stopped in the middle of its VQ-VAE, twice saved. Copy it."""
    path = tmp_path_factory.mktemp("half") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(3, patch, signal.SIGINT)
        with pytest.raises(utils.Stopped) as stopped:
            train_tiny(path, "--checkpoint-steps", "2", data=oasis_dir)
    assert stopped.value.exit_code == 130
    return utils.Run.open(path)


def run_main(*arguments):
    """Exit code of train.py in this process."""
    with pytest.raises(SystemExit) as end:
        utils.run_main(train.main, [str(a) for a in arguments])
    return end.value.code


def test_a_stopped_run_holds_two_checkpoints_and_no_model(half_done):
    saved = sorted(p.name for p in half_done.checkpoint_path.iterdir())
    assert saved == ["vqvae.npz", "vqvae.previous.npz"]
    steps = [
        utils.read_checkpoint_file(half_done.checkpoint_path / name)[0]["step"]
        for name in saved
    ]
    assert steps == [3, 2]
    assert not list(half_done.path.glob("*.keras"))
    assert not half_done.lock_path.exists()


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    half_done, tmp_path, capsys
):
    run = copy_run(half_done, tmp_path)
    newest, previous = utils.checkpoint_generations(
        run.checkpoint_path / "vqvae"
    )
    flip_a_byte(newest)
    state, _ = utils.read_checkpoint(run.checkpoint_path / "vqvae")
    assert state["step"] == 2
    assert f"{newest}: damaged" in capsys.readouterr().err
    previous.write_bytes(previous.read_bytes()[:1000])
    assert run_main("--resume", run.path) == 4
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and str(previous) in error
    assert not list(run.path.glob("*.keras"))


def flip_a_byte(path, part=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * part)] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(
    "flags",
    [
        ["--channels", "9"],
        ["--seed", "1"],
        ["--prior", "gated"],
        ["--epochs", "3"],
        ["--recipe", "adni-vqvae-tuned"],
        ["--no-restart"],
        ["--run-dir", "elsewhere"],
    ],
)
def test_flags_that_contradict_the_training(flags, half_done, capsys):
    before = half_done.config_path.read_bytes()
    code = run_main("--resume", half_done.path, *flags)
    error = capsys.readouterr().err
    assert code == 2
    assert (
        error.count("\n") == 1
        and f"error: {flags[0].replace('no-', '')}" in error
    )
    assert half_done.config_path.read_bytes() == before


def test_nothing_to_resume(tiny_run, tmp_path, capsys):
    assert run_main("--resume", tiny_run.path) == 2
    assert "complete" in capsys.readouterr().err
    assert run_main("--resume", tmp_path / "none") == 4
    assert "no such run folder" in capsys.readouterr().err


def test_a_checkpoint_of_another_model(half_done, tmp_path, capsys):
    run = copy_run(half_done, tmp_path)
    document = json.loads(run.config_path.read_text())
    document["training"]["settings"]["channels"] = 4
    run.config_path.write_text(json.dumps(document))
    assert run_main("--resume", run.path) == 4
    assert "not of this model" in capsys.readouterr().err


# --- One training a folder ---


def test_a_run_in_use_is_refused(half_done, tmp_path, capsys):
    run = copy_run(half_done, tmp_path)
    code = (
        "import sys, time, utils\n"
        "lock = utils.FileLock(sys.argv[1])\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, run.lock_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        for arguments in (
            ["--resume", run.path],
            ["--run-dir", run.path, "--smoke"],
        ):
            assert run_main(*arguments) == 4
            error = capsys.readouterr().err
            assert f"in use by process {other.pid} on " in error
        other.kill()
    # The lock of a process that died is taken over, and says so.
    run.lock()
    assert f"taken over from process {other.pid} on " in capsys.readouterr().out
    run.unlock()
    assert not run.lock_path.exists()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(utils.fcntl, "flock", refuse)
    lock = utils.FileLock(tmp_path / "run.lock")
    assert f"{tmp_path}: a file system without locks" in capsys.readouterr().err
    lock.release()
    assert not lock.path.exists()


def test_files_half_written_by_a_killed_training_go(half_done, tmp_path):
    run = copy_run(half_done, tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = run.checkpoint_path / f"vqvae.npz.tmp-{dead.pid}.npz"
    alive = run.path / f"x.csv.tmp-{os.getpid()}.csv"
    for path in (stale, alive):
        path.write_bytes(b"half")
    run.lock()
    run.unlock()
    assert not stale.exists() and alive.exists()


# --- Signals, full disks, numbers that are not finite ---


def start_training(run_dir, data, *flags):
    """train.py in a process of its own, saving after every step."""
    flags = (*kill_and_resume.SETTINGS, "--data-dir", data, *flags)
    return kill_and_resume.train(*flags, "--run-dir", run_dir)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends(number, oasis_dir, tmp_path):
    run_dir = tmp_path / "run"
    process = start_training(
        run_dir, oasis_dir, "--epochs", "100000", "--checkpoint-steps", "0"
    )
    while not (run_dir / "history.csv").exists():  # it is training by then
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors.splitlines()[-1] == f"stopped by {number.name}"
    state, _ = utils.read_checkpoint(run_dir / "checkpoint" / "vqvae")
    assert state["epoch"] >= 1
    assert not (run_dir / "run.lock").exists()


def test_a_full_disk_leaves_what_was_there(half_done, tmp_path):
    """A limit on the size of files stands in for a full disk."""
    run = copy_run(half_done, tmp_path)
    before = {p: p.read_bytes() for p in run.checkpoint_path.iterdir()}
    largest = max(map(len, before.values()))

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 5000,) * 2)

    command = [sys.executable, "train.py", "--resume", run.path]
    result = subprocess.run(
        command,
        cwd=kill_and_resume.ROOT,
        preexec_fn=limit,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 6, result.stderr
    assert result.stderr.count("\n") == 1
    assert before == {p: p.read_bytes() for p in run.checkpoint_path.iterdir()}
    assert not list(run.path.rglob("*.tmp-*"))
    assert not list(run.path.glob("*.keras"))


def test_a_nan_in_the_data_stops_the_training_with_oneDNN_on(tmp_path):
    """The loss stays finite: a fused ReLU turns NaN into 0."""
    model = modules.VQVAE(
        (16, 16),
        channels=8,
        residual_channels=4,
        num_embeddings=8,
        embedding_dim=4,
    )
    images = np.random.default_rng(0).random((12, 16, 16, 1), "float32")
    images[9, 3, 3] = np.nan
    model.compile("adam", jit_compile=False)
    checkpoint = modules.Checkpoint(tmp_path / "vqvae", steps=1)
    check = modules.FiniteCheck("vqvae")
    with pytest.raises(utils.NumericsError) as found:
        model.fit(
            images,
            batch_size=4,
            shuffle=False,
            verbose=0,
            callbacks=[check, checkpoint],
        )
    assert "in step 3 of epoch 1" in str(found.value)
    assert "gradient_norm" in str(found.value)
    state, arrays = utils.read_checkpoint(tmp_path / "vqvae")
    assert state["step"] == 2
    assert all(np.isfinite(v).all() for v in arrays.values())


def test_a_weight_that_is_not_finite_stops_the_training(tmp_path):
    model = modules.PixelCNN(8, (4, 4), channels=8, blocks=1)
    indices = np.zeros((8, 4, 4), "int32")
    model.compile("adam", jit_compile=False)
    kernel = model.trainable_variables[0]
    kernel.assign(np.full(kernel.shape, np.nan))
    with pytest.raises(utils.NumericsError, match="parameter_norm"):
        model.fit(
            {"indices": indices},
            batch_size=4,
            verbose=0,
            callbacks=[modules.FiniteCheck("prior")],
        )


# --- Runs of other versions ---


def test_a_run_of_format_1(tmp_path, capsys):
    """Made by the version before format 2; its prior lacks a weight.

    On converted models the figures must be those that it wrote itself.
    """
    with tarfile.open(Path(__file__).parent / "format_1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    run = utils.Run.open(tmp_path / "format_1")
    assert "format 1 read as format 2" in capsys.readouterr().out
    assert run.config.codebook_distance == "euclidean"
    vqvae = utils.load_model(run.vqvae_path)
    (prior,) = utils.load_priors(run, vqvae)
    written = utils.read_evaluation(run)["prior"][0]["bits_per_code"]
    stored = utils.read_indices(run)
    for name, frame in utils.read_splits(run, needed=()).items():
        rows = utils.spread(len(frame), len(stored["test_1"]))
        inputs = utils.prior_inputs(
            prior, [stored[f"{name}_1"][rows]], frame.iloc[rows]
        )
        assert predict.mean_bits(prior, inputs) == pytest.approx(
            written[name], rel=1e-5
        )
    images, _ = modules.generate(vqvae, [prior], 2, slice_position=[0.2, 0.8])
    assert images.shape == (2, 32, 32) and np.isfinite(images).all()
    run.update()
    assert json.loads(run.config_path.read_text())["format"] == utils.FORMAT
