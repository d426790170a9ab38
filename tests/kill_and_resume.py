"""Kill a training again and again, resume it, compare with one left alone.

    python tests/kill_and_resume.py --kills 20 --seed 0

Every second kill (SIGKILL) comes at a random moment, the others while a file
of the run is being written. The weights of every model of both runs must be
equal to the bit, with dropout and weight averaging on, and so must their
indices and their histories but for the times. Prints a line a kill; the exit
code is 0 if all are equal.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = """--dataset oasis --image-size 32 --downsampling 4 --channels 8
    --residual-channels 4 --num-embeddings 16 --embedding-dim 4
    --ssim-weight 0.5 --batch-size 8 --warmup-steps 5
    --prior gated --prior-channels 8 --prior-blocks 2 --prior-kernel-size 3
    --prior-dropout 0.2 --prior-ema-momentum 0.9
    --prior-batch-size 8 --condition slice --no-evaluate
    --precision float32 --checkpoint-steps 1""".split()
EPOCHS_PER_KILL = 4  # of each stage, so that there is something left to kill
LONGEST = 15  # seconds from a start to its kill, at random
IN_TRAINING = 3  # most seconds of training until a kill in a save


def start(script, *arguments):
    """Start a program; its output goes nowhere but for errors."""
    return subprocess.Popen(
        [sys.executable, script, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(*arguments):
    return start("train.py", *arguments)


def finish(process):
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"ended with {process.returncode}: {errors}")


def is_writing(process, run):
    """Whether the process writes a file of the run, or died doing so."""
    return any(run.rglob(f"*.tmp-{process.pid}*"))


def kill_at_random(process, run, choice):
    """Kill a training at any time, its start included; False if it ended."""
    due = time.monotonic() + choice.uniform(0, LONGEST)
    while process.poll() is None:
        if time.monotonic() > due:
            return kill(process)
        time.sleep(0.01)
    return False


def kill_in_save(process, run, choice):
    """Kill a training while it writes a file; False if it ended before.

    A file is written in milliseconds, so the process is first halted: what it
    then has half written is half written when it is killed.
    """
    due = None
    while process.poll() is None:
        if is_writing(process, run):
            # Some time after the first file that it writes.
            now = time.monotonic()
            due = due or now + choice.uniform(0, IN_TRAINING)
            if now >= due:
                process.send_signal(signal.SIGSTOP)
                time.sleep(0.01)  # until it has halted
                if is_writing(process, run):
                    return kill(process)
                process.send_signal(signal.SIGCONT)
        time.sleep(0.0005)
    return False


def kill(process):
    process.kill()
    process.communicate()
    return True


def state_of(run):
    """Where the training of a run folder is, in words."""
    try:
        training = json.loads((run / "config.json").read_text())["training"]
    except FileNotFoundError:
        return "no run folder yet"
    except KeyError:
        return "complete"
    saved = sorted(p.name for p in run.glob("checkpoint/*.npz"))
    return f"done {training['done']}, saved {saved}"


def train_with_kills(run, settings, kills, seed):
    """Train with up to `kills` kills; how many, and how many while writing."""
    choice = random.Random(seed)
    inside = 0
    for number in range(kills):
        begun = (run / "config.json").exists()
        process = train(*(["--resume", run] if begun else settings))
        act = kill_at_random if number % 2 else kill_in_save
        if not act(process, run, choice):
            finish(process)
            return number, inside
        writing = is_writing(process, run)
        inside += writing
        how = "while writing" if writing else "at random"
        print(f"killed {how}: {state_of(run)}", flush=True)
    finish(train("--resume", run))
    return kills, inside


def differences(first, second):
    """Names of what is not equal to the bit in two run folders."""
    import keras

    sys.path.insert(0, str(ROOT))
    import modules  # noqa: F401 registers the layers

    found = []
    names, others = (
        sorted(path.name for path in run.glob("*.keras"))
        for run in (first, second)
    )
    if names != others or not names:
        found.append(f"model files {names}, {others}")
    for name in names:
        models = [
            keras.models.load_model(run / name) for run in (first, second)
        ]
        pairs = zip(*(model.weights for model in models), strict=True)
        for one, other in pairs:
            if np.asarray(one).tobytes() != np.asarray(other).tobytes():
                found.append(f"{name}: {one.path}")
    with (
        np.load(first / "indices.npz") as a,
        np.load(second / "indices.npz") as b,
    ):
        found += [f"indices {k}" for k in a if not np.array_equal(a[k], b[k])]
    histories = [
        pd.read_csv(run / "history.csv").drop(columns="seconds")
        for run in (first, second)
    ]
    if not histories[0].equals(histories[1]):
        found.append("history.csv")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data, alone, killed = (folder / n for n in ("data", "alone", "killed"))
        layout = ["--layout", "oasis", "--subjects", 8, "--image-size", 32]
        finish(start("dataset.py", "simulate", data, *layout))
        epochs = EPOCHS_PER_KILL * options.kills
        settings = [*SETTINGS, "--epochs", epochs, "--prior-epochs", epochs]
        settings += ["--data-dir", data, "--run-dir"]
        started = time.monotonic()
        finish(train(*settings, alone))
        print(f"alone: {time.monotonic() - started:.0f} s", flush=True)
        kills, inside = train_with_kills(
            killed, [*settings, killed], options.kills, options.seed
        )
        found = differences(alone, killed)
    print(f"{kills} kills, {inside} of them while writing a file")
    print("equal to the bit" if not found else f"NOT EQUAL: {found}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
