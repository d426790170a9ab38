"""Replicas, and workers that talk over loopback, train as one process."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types

import numpy as np
import pytest

import modules
import train
import utils
from tests.conftest import ROOT, oasis_flags, refused, run_python, train_tiny

# Dropout would hide other conditions on each replica.
FLAGS = (
    "--epochs 4 --prior-epochs 2 --condition-dropout 0 --prior gated "
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


@pytest.fixture(scope="module")
def alone(oasis_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("alone") / "run"
    return train_tiny(path, *FLAGS, data=oasis_dir)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_workers(folders, flags):
    hosts = [f"127.0.0.1:{free_port()}" for _ in folders]
    for k, own in enumerate(folders):
        own.mkdir(exist_ok=True)
        task = {"type": "worker", "index": k}
        config = {"cluster": {"worker": hosts}, "task": task}
        config = {"TF_CONFIG": json.dumps(config), "TMPDIR": str(own)}
        command = [sys.executable, ROOT / "train.py", *flags]
        options = {"cwd": own, "env": os.environ | config, "text": True}
        yield subprocess.Popen(command, stdout=-1, stderr=-1, **options)


def assert_same_training(alone, run):
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    for name in ("vqvae.keras", "prior.keras"):
        models = [modules.load_model(r.path / name) for r in (alone, run)]
        for pair in zip(*(model.weights for model in models), strict=True):
            close(*map(np.asarray, pair), rtol=1e-5, err_msg=pair[0].path)
    one, other = [utils.read_history(r) for r in (alone, run)]
    assert list(one["stage"]) == list(other["stage"])
    numbers = one.select_dtypes("number").columns.drop("seconds")
    close(one[numbers], other[numbers], rtol=1e-3)


def test_two_workers_train_as_one(alone, oasis_dir, tmp_path):
    """Also when SIGTERM to one of them stopped both, and both were resumed."""
    run, folders = tmp_path / "run", [tmp_path / name for name in "ab"]
    flags = oasis_flags(oasis_dir, *FLAGS, "--run-dir", str(run))
    flags += ["--strategy", "multiworker"]
    workers = [*start_workers(folders, flags)]
    while not (run / "checkpoint" / "vqvae.npz").exists():
        assert all(worker.poll() is None for worker in workers)
        time.sleep(0.01)
    workers[1].send_signal(signal.SIGTERM)
    for worker in workers:
        worker.communicate(timeout=300)
        assert worker.returncode == 143
    assert not list(run.glob("*.keras"))

    workers = start_workers(folders, ["--resume", str(run)])
    ends = [w.communicate(timeout=300) for w in [*workers]]
    (output, errors), (silent, _) = ends
    assert "2 replicas share each batch" in output, errors
    # Only the chief has written and spoken, and only in the run folder.
    assert silent == ""
    left = [[path.name for path in folder.iterdir()] for folder in folders]
    assert left == [["data"], ["data"]]  # the cache of decoded images
    assert_same_training(alone, utils.Run.open(run))


def test_two_replicas_train_as_one(alone, oasis_dir, tmp_path):
    run = tmp_path / "run"
    flags = oasis_flags(oasis_dir, *FLAGS, "--run-dir", run)
    done = run_python("-c", MIRRORED, *flags)
    assert "2 replicas share each batch" in done.stdout, done.stderr
    assert_same_training(alone, utils.Run.open(run))


REFUSED = {
    "--strategy multiworker": "TF_CONFIG",
    "--batch-size 2 --accumulation-steps 3": "--batch-size: 2 images",
    "--prior-batch-size 2 --accumulation-steps 3": "--prior-batch-size: 2",
    "--jit": "--jit: works on one device",
    "--precision mixed_float16": "mixed_float16: works on one device",
    "--strategy auto": "TF_CONFIG: expected JSON",
}


@pytest.mark.parametrize(("flags", "message"), REFUSED.items())
def test_refused(flags, message, oasis_dir, tmp_path, capsys, monkeypatch):
    if "JSON" in message:
        monkeypatch.setenv("TF_CONFIG", "{worker: 1}")
    if "one device" in message:
        strategy = types.SimpleNamespace(num_replicas_in_sync=2)
        strategy.extended = types.SimpleNamespace(should_checkpoint=True)
        monkeypatch.setattr(utils, "choose_strategy", lambda *_, **__: strategy)
    run = tmp_path / "run"
    argv = oasis_flags(oasis_dir, *FLAGS, "--run-dir", run, *flags.split())
    assert message in refused(train.main, 2, capsys, *argv)
    assert not run.exists()
