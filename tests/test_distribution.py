"""Several replicas and workers train as one process with the whole batch.

The workers are real processes of `train.py` that talk over loopback.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import modules
import train
import utils
from tests.conftest import TINY, train_tiny

ROOT = Path(train.__file__).parent
# Dropout would hide other conditions on each replica.
FLAGS = (
    "--epochs 6 --prior-epochs 10 --condition-dropout 0 --prior gated "
    "--prior-ema-momentum 0.9 --no-evaluate --round-steps 2"
).split()
# `train.py` on two logical CPUs: a machine without GPUs has no other replicas.
MIRRORED = """
import sys, tensorflow as tf, train, utils
cpu = tf.config.list_physical_devices("CPU")[0]
halves = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(cpu, halves)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
utils.choose_strategy = lambda *_, **__: strategy
utils.run_main(train.main)
"""


def oasis_flags(data, run, *flags):
    return map(
        str,
        ["--dataset", "oasis", "--data-dir", data, "--run-dir", run, *TINY]
        + [*FLAGS, *flags],
    )


@pytest.fixture(scope="module")
def alone(oasis_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("alone") / "run"
    return train_tiny(path, *FLAGS, data=oasis_dir)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Workers:
    """Two processes of `train.py`, each in a folder of its own."""

    def __init__(self, folder, *flags):
        hosts = [f"127.0.0.1:{free_port()}" for _ in range(2)]
        self.folders = [folder / f"worker{k}" for k in range(2)]
        self.processes = []
        for k, own in enumerate(self.folders):
            own.mkdir(exist_ok=True)
            task = {"type": "worker", "index": k}
            config = {"cluster": {"worker": hosts}, "task": task}
            config = {"TF_CONFIG": json.dumps(config), "TMPDIR": str(own)}
            process = subprocess.Popen(
                [sys.executable, ROOT / "train.py", *map(str, flags)],
                cwd=own,
                env={**os.environ, **config},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            self.processes.append(process)

    def wait_for(self, path):
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


def assert_same_training(alone, run):
    for name in ("vqvae.keras", "prior.keras"):
        models = [modules.load_model(r.path / name) for r in (alone, run)]
        for pair in zip(*(model.weights for model in models), strict=True):
            one, other = map(np.asarray, pair)
            np.testing.assert_allclose(
                one, other, rtol=1e-5, atol=1e-5, err_msg=pair[0].path
            )
    one, other = (
        utils.read_history(r).drop(columns="seconds") for r in (alone, run)
    )
    assert list(one["stage"]) == list(other["stage"])
    numbers = one.select_dtypes("number").columns
    np.testing.assert_allclose(
        one[numbers], other[numbers], rtol=1e-3, atol=1e-5
    )


@pytest.mark.slow
def test_two_workers_train_as_one(alone, oasis_dir, tmp_path):
    """Also after SIGTERM to one of them, and SIGKILL; each time resumed."""
    run = tmp_path / "run"
    saved = run / "checkpoint" / "vqvae.npz"
    flags = oasis_flags(oasis_dir, run, "--strategy", "multiworker")
    workers = Workers(tmp_path, *flags)
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

    for folder in workers.folders:  # the killed one left something
        shutil.rmtree(folder)
    workers = Workers(tmp_path, "--resume", run)
    (code, output, errors), (second_code, silent, _) = workers.finish()
    assert (code, second_code) == (0, 0), errors
    assert "2 replicas share each batch" in output
    # Only the chief has written and spoken, and only in the run folder.
    assert silent == ""
    assert [list(folder.iterdir()) for folder in workers.folders] == [[], []]
    assert_same_training(alone, utils.Run.open(run))


def run_mirrored(*flags):
    return subprocess.run(
        [sys.executable, "-c", MIRRORED, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_two_replicas_train_as_one(alone, oasis_dir, tmp_path):
    run = tmp_path / "run"
    decoder = "--decoder-epochs 1 --discriminator-channels 4".split()
    result = run_mirrored(*oasis_flags(oasis_dir, run))
    assert result.returncode == 0, result.stderr
    assert "2 replicas share each batch" in result.stdout
    assert_same_training(alone, utils.Run.open(run))
    flags = ["--stage", "decoder", "--run-dir", str(run), *decoder]
    result = run_mirrored(*flags, "--no-evaluate")
    assert result.returncode == 0, result.stderr
    history = utils.read_history(utils.Run.open(run))
    assert "decoder" in set(history["stage"])


@pytest.mark.parametrize("flags", [["--jit"], ["--precision", "mixed_float16"]])
def test_one_device_only(flags, oasis_dir, tmp_path):
    """What Keras cannot do with replicas is refused, whatever chose them."""
    run = tmp_path / "run"
    result = run_mirrored(*oasis_flags(oasis_dir, run, *flags))
    assert result.returncode == 2, result.stderr
    assert f"error: {' '.join(flags)}: works on one device" in result.stderr
    assert not run.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--strategy multiworker", "TF_CONFIG"),
        ("--recompute --prior-dropout 0.1", "--prior-dropout"),
        ("--batch-size 2 --accumulation-steps 3", "--batch-size: 2 images"),
        ("--accumulation-steps 17", "--batch-size: "),
    ],
)
def test_refused_by_name(flags, message, oasis_dir, tmp_path, capsys):
    run = tmp_path / "run"
    argv = list(oasis_flags(oasis_dir, run, *flags.split()))
    with pytest.raises(SystemExit) as end:
        utils.run_main(train.main, argv)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not run.exists()


def test_tf_config_is_read_by_name(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", "{worker: 1}")
    with pytest.raises(utils.FlagError, match="TF_CONFIG: expected JSON"):
        utils.choose_strategy("auto")


def test_the_launch_line_for_slurm_names_the_workers(tmp_path):
    """The lines of the guide, with what Slurm would answer."""
    page = ROOT / "resources" / "guide" / "many-machines.md"
    pattern = r"(?ms)^srun .*? bash -c '\n(.*?)^'$"
    (script,) = re.findall(pattern, page.read_text(encoding="utf-8"))
    *lines, last = script.splitlines()
    assert last.strip().startswith("python train.py --strategy multiworker")
    slurm = tmp_path / "scontrol"
    slurm.write_text("#!/bin/sh\nprintf 'node9\\nnode10\\n'\n")
    slurm.chmod(0o755)
    result = subprocess.run(
        ["bash", "-c", "\n".join([*lines, 'echo "$TF_CONFIG"'])],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_PROCID": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout) == {
        "cluster": {"worker": ["node9:12345", "node10:12345"]},
        "task": {"type": "worker", "index": 1},
    }
