"""Several replicas and workers train as one process with the whole batch.

The workers are real processes of `train.py` that talk over loopback.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import dataset
import modules
import train
import utils
from tests import mirrored
from tests.benchmarks import common
from tests.conftest import TINY, train_tiny

ROOT = Path(train.__file__).parent
# 24 steps of each stage; dropout would hide other conditions on each replica.
FLAGS = (
    "--epochs 6 --prior-epochs 12 --condition-dropout 0 --prior gated "
    "--prior-ema-momentum 0.9 --no-evaluate"
).split()


@pytest.fixture(scope="module")
def alone(oasis_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("alone") / "run"
    return train_tiny(path, *FLAGS, data=oasis_dir)


class Workers:
    """Two processes of `train.py`, each in a folder of its own."""

    def __init__(self, folder, *flags):
        hosts = common.free_hosts(2)
        self.folders = [folder / f"worker{k}" for k in range(2)]
        self.processes = []
        for k, own in enumerate(self.folders):
            own.mkdir(exist_ok=True)
            task = {"type": "worker", "index": k}
            cluster = {"cluster": {"worker": hosts}, "task": task}
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, ROOT / "train.py", *map(str, flags)],
                    cwd=own,
                    env={
                        **os.environ,
                        "TF_CONFIG": json.dumps(cluster),
                        "TMPDIR": str(own),
                    },
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def wait_for(self, path):
        """Until the file is there."""
        while not path.exists():
            assert all(process.poll() is None for process in self.processes)
            time.sleep(0.01)

    def finish(self):
        """(exit code, output, errors) of each."""
        ends = []
        for process in self.processes:
            output, errors = process.communicate(timeout=300)
            ends.append((process.returncode, output, errors))
        return ends


def start_workers(run, folder, data, *flags):
    data_flags = ("--dataset", "oasis", "--data-dir", data, "--run-dir", run)
    return Workers(
        folder,
        *("--strategy", "multiworker", *data_flags, *TINY, *FLAGS, *flags),
    )


def assert_same_models(one, other):
    names = sorted(path.name for path in one.glob("*.keras"))
    assert names == ["prior.keras", "vqvae.keras"]
    for name in names:
        pairs = zip(
            keras.models.load_model(one / name).weights,
            keras.models.load_model(other / name).weights,
            strict=True,
        )
        for first, second in pairs:
            np.testing.assert_allclose(
                np.asarray(first),
                np.asarray(second),
                rtol=1e-5,
                atol=1e-5,
                err_msg=f"{name} {first.path}",
            )


def test_two_workers_train_as_one(alone, oasis_dir, tmp_path):
    """Also after SIGTERM to one of them, and SIGKILL; each time resumed."""
    run = tmp_path / "run"
    saved = run / "checkpoint" / "vqvae.npz"
    workers = start_workers(run, tmp_path, oasis_dir, "--checkpoint-steps", 1)
    workers.wait_for(saved)
    workers.processes[1].send_signal(signal.SIGTERM)
    assert [code for code, _, _ in workers.finish()] == [143, 143]
    assert not list(run.glob("*.keras"))

    saved = saved.with_name("prior.npz")
    workers = Workers(tmp_path, "--resume", run)
    workers.wait_for(saved)
    workers.processes[1].kill()
    (code, _, errors), _ = workers.finish()
    assert code == 6
    assert "worker 1 died or cannot be reached" in errors
    assert "--resume" in errors and "Traceback" not in errors
    assert saved.exists()

    for folder in workers.folders:  # of the killed one something is left
        shutil.rmtree(folder)
    workers = Workers(tmp_path, "--resume", run)
    (code, output, errors), (second_code, silent, _) = workers.finish()
    assert (code, second_code) == (0, 0), errors
    assert "2 replicas share each batch" in output
    # Only the chief has written and spoken, and only in the run folder.
    assert silent == ""
    assert [list(folder.iterdir()) for folder in workers.folders] == [[], []]
    assert_same_models(alone.path, run)
    assert_same_history(alone, utils.Run.open(run))


def assert_same_history(alone, run):
    one, two = (
        utils.read_history(run).drop(columns="seconds") for run in (alone, run)
    )
    assert one.groupby("stage")["step"].max().min() >= 20
    assert list(one["stage"]) == list(two["stage"])
    numbers = one.select_dtypes("number").columns
    np.testing.assert_allclose(one[numbers], two[numbers], rtol=1e-3, atol=1e-5)


def test_two_replicas_train_as_one(alone, oasis_dir, tmp_path):
    run = tmp_path / "run"
    flags = ("--dataset", "oasis", "--data-dir", oasis_dir, *TINY, *FLAGS)
    result = subprocess.run(
        [sys.executable, mirrored.__file__, *flags, "--run-dir", run],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "2 replicas share each batch" in result.stdout
    assert_same_models(alone.path, run)


@pytest.mark.parametrize(
    ("count", "batch"), [(33, 16), (7, 7), (5, 2), (12, 5)]
)
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_divisible_batch_size(count, batch, parts):
    def is_divisible(size):
        last = count % size or size
        return min(size, last) >= parts

    sizes = [size for size in range(1, batch + 1) if is_divisible(size)]
    found = dataset.divisible_batch_size(count, batch, parts)
    assert found == max(sizes, default=0)


def test_parts_of_batches_make_the_batches():
    arrays = {"number": np.arange(11)}

    def batches(**options):
        found = dataset.array_batches(arrays, 4, seed=0, epochs=2, **options)
        assert len(list(found)) == found.cardinality()
        return [list(batch["number"].numpy()) for batch in found]

    whole = batches(start_step=1)
    first = batches(start_step=1, parts=(0, 2, 3))
    second = batches(start_step=1, parts=(2, 3, 3))
    assert len(first) == 2 * len(second) == 2 * len(whole)
    for k, batch in enumerate(whole):
        parts = [*first[2 * k : 2 * k + 2], second[k]]
        assert sum(parts, []) == batch
        assert all(parts)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


STEPS = {
    "vqvae": lambda: modules.VQVAE(
        (16, 16),
        channels=8,
        residual_channels=4,
        num_embeddings=8,
        embedding_dim=4,
        codebook_update="gradient",
        restart_threshold=0.0,
        ssim_weight=0.5,
    ),
    "pixelcnn": lambda: modules.PixelCNN(8, (4, 4), channels=8, blocks=2),
    "pixelsnail": lambda: modules.PixelSNAIL(
        8, (4, 4), channels=8, blocks=5, kernel_size=3, position_features=True
    ),
}
RANDOM = np.random.default_rng(0)
BATCHES = {
    "vqvae": RANDOM.random((5, 16, 16, 1), "float32"),
    "pixelcnn": {"indices": RANDOM.integers(0, 8, (5, 4, 4), "int32")},
    "pixelsnail": {"indices": RANDOM.integers(0, 8, (5, 4, 4), "int32")},
}


def weights_after(name, steps=2, jit=False, **settings):
    """Weights after steps of gradient descent without momentum."""
    keras.utils.set_random_seed(0)
    model = STEPS[name]()
    for attribute, value in settings.items():
        assert hasattr(model, attribute)
        setattr(model, attribute, value)
    if name == "vqvae":  # the first batch sets the codebook: not in parts
        model(BATCHES[name], training=True)
    optimizer = keras.optimizers.SGD(0.05, global_clipnorm=0.1)
    model.compile(optimizer, jit_compile=jit)
    data = tf.data.Dataset.from_tensors(BATCHES[name]).repeat()
    model.fit(data, steps_per_epoch=steps, shuffle=False, verbose=0)
    return [np.asarray(weight) for weight in model.trainable_weights]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vqvae", {"accumulation_steps": 2}),
        ("pixelcnn", {"accumulation_steps": 5}),
        ("pixelsnail", {"recompute": True}),
        ("pixelcnn", {"recompute": True, "accumulation_steps": 2}),
        ("vqvae", {"jit": True}),
        ("pixelsnail", {"jit": True}),
    ],
)
def test_what_saves_memory_or_time_trains_alike(name, settings):
    for one, other in zip(
        weights_after(name), weights_after(name, **settings), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_recompute_with_dropout_is_refused():
    prior = modules.PixelCNN(8, (4, 4), channels=8, blocks=1, dropout=0.5)
    prior.recompute = True
    with pytest.raises(ValueError, match="recompute"):
        prior(BATCHES["pixelcnn"]["indices"], training=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--strategy multiworker", "TF_CONFIG"),
        ("--recompute --prior-dropout 0.1", "--prior-dropout 0"),
        # 16 images in steps of 15 leave one for two parts.
        ("--batch-size 15 --accumulation-steps 2", "use 14"),
        ("--prior-batch-size 3 --accumulation-steps 3", "--prior-batch-size"),
    ],
)
def test_refused_by_name(flags, message, oasis_dir, tmp_path, capsys):
    command = ["--dataset", "oasis", "--data-dir", str(oasis_dir), *TINY]
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as end:
        utils.run_main(
            train.main, [*command, "--run-dir", str(run), *flags.split()]
        )
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not run.exists()


def test_the_launch_line_for_slurm_names_the_workers(tmp_path):
    """The lines of README, with what Slurm would answer."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (script,) = re.findall(
        r"^srun .*? bash -c '\n(.*?)^'$", readme, re.M | re.S
    )
    lines = script.splitlines()
    assert (
        lines[-1].strip().startswith("python train.py --strategy multiworker")
    )
    slurm = tmp_path / "scontrol"
    slurm.write_text("#!/bin/sh\nprintf 'node9\\nnode10\\n'\n")
    slurm.chmod(0o755)
    result = subprocess.run(
        ["bash", "-c", "\n".join([*lines[:-1], 'echo "$TF_CONFIG"'])],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_PROCID": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout) == {
        "cluster": {"worker": ["node9:12345", "node10:12345"]},
        "task": {"type": "worker", "index": 1},
    }


def test_one_device_only(oasis_dir, tmp_path):
    """What Keras cannot do with replicas is refused, whatever chose them."""
    flags = ("--dataset", "oasis", "--data-dir", oasis_dir, *TINY)
    for refused in (["--jit"], ["--precision", "mixed_float16"]):
        run = tmp_path / "run"
        result = subprocess.run(
            [sys.executable, mirrored.__file__, *flags, "--run-dir", run]
            + refused,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 2, result.stderr
        assert f"error: {' '.join(refused)}: goes with one device" in (
            result.stderr
        )
        assert not run.exists()


def test_tf_config_is_read_by_name(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", "{worker: 1}")
    with pytest.raises(utils.FlagError, match="TF_CONFIG: expected JSON"):
        utils.choose_strategy("auto")
