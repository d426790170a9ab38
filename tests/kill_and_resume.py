"""Kill a training again and again, resume it, compare with one left alone.

    python tests/kill_and_resume.py --kills 20 --seed 0

Every second kill (SIGKILL) comes at a random moment, the others while a file
of the run is being written. All weights, indices and histories of both runs
must be bit-equal, with dropout, augmentation and moving averages on.
Prints a line for each kill; the exit code is 0 if all are equal.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

import utils  # noqa: E402

modules = utils.lazy_import("modules")
SETTINGS = """--dataset oasis --image-size 32 --downsampling 4 --channels 8
    --residual-channels 4 --num-embeddings 16 --embedding-dim 4
    --ssim-weight 0.5 --batch-size 8 --warmup-steps 5 --flips --augment 1
    --prior gated --prior-channels 8 --prior-blocks 2 --prior-kernel-size 3
    --prior-dropout 0.2 --prior-ema-momentum 0.9 --prior-weight-decay 0.01
    --prior-augment 1 --prior-batch-size 8 --condition slice --prior-atlas 4
    --texture-epochs 2 --texture-channels 8
    --no-evaluate --precision float32 --round-steps 5""".split()
EPOCHS_PER_KILL = 2  # of each stage, so that there is something left to kill
LONGEST = 25  # seconds from a start to its kill, at random
IN_TRAINING = 6  # most seconds from a first checkpoint to a kill in a save


def start(script, *arguments):
    """Start a program; its output is dropped, except for errors."""
    command = [sys.executable, script, *map(str, arguments)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes)


def finish(process):
    """Wait for a program, which must end well."""
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"ended with {process.returncode}: {errors}")


def is_writing(process, run):
    """Whether the process writes a file of the run, or died doing so."""
    return any(run.rglob(f"*.tmp-*-{process.pid}.*"))


def kill(process, run, choice, in_save):
    """Kill a training; False if it ended before.

    A file is written in milliseconds. To hit it, the process is halted first:
    what is half written then is half written when it is killed.
    """
    due = None if in_save else time.monotonic() + choice.uniform(0, LONGEST)
    while process.poll() is None:
        now, writing = time.monotonic(), in_save and is_writing(process, run)
        if writing and not due and is_writing(process, run / "checkpoint"):
            due = now + choice.uniform(0, IN_TRAINING)
        if due and now >= due and (writing or not in_save):
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.01)  # until it has halted
            if not in_save or is_writing(process, run):
                process.kill()
                process.communicate()
                return True
            process.send_signal(signal.SIGCONT)
        time.sleep(0.0005)
    return False


def train_with_kills(run, settings, kills, choice):
    """Train with kills in between; return how many, and how many in a save."""
    inside = 0
    for number in range(kills + 1):
        begun = (run / "config.json").exists()
        process = start("train.py", *(["--resume", run] if begun else settings))
        in_save = number % 2 == 0
        if number == kills or not kill(process, run, choice, in_save):
            finish(process)
            return number, inside
        inside += is_writing(process, run)
        how = "while writing" if is_writing(process, run) else "at random"
        saved = sorted(path.name for path in run.glob("checkpoint/*.npz"))
        print(f"killed {how}; checkpoints {saved}", flush=True)


def differences(*paths):
    """What is not bit-equal in two run folders."""
    runs = [utils.Run.open(path) for path in paths]
    names = [sorted(p.name for p in run.path.glob("*.keras")) for run in runs]
    found = [] if names[0] == names[1] and names[0] else [f"models {names}"]
    for name in names[0]:
        models = [modules.load_model(run.path / name) for run in runs]
        for pair in zip(*(model.weights for model in models), strict=True):
            if len({np.asarray(weight).tobytes() for weight in pair}) > 1:
                found.append(f"{name}: {pair[0].path}")
    one, other = map(utils.read_indices, runs)
    found += [k for k in one if not np.array_equal(one[k], other[k])]
    one, other = map(utils.read_history, runs)
    same = one.drop(columns="seconds").equals(other.drop(columns="seconds"))
    return found + ["history.csv"] * (not same)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data, alone, killed = (folder / n for n in ("data", "alone", "killed"))
        layout = ["--layout", "oasis", "--subjects", 8, "--image-size", 32]
        finish(start("dataset.py", "simulate", data, *layout))
        epochs = EPOCHS_PER_KILL * asked.kills
        settings = [*SETTINGS, "--data-dir", data, "--epochs", epochs]
        settings += ["--prior-epochs", epochs]
        finish(start("train.py", *settings, "--run-dir", alone))
        settings += ["--run-dir", killed]
        choice = random.Random(asked.seed)
        kills, inside = train_with_kills(killed, settings, asked.kills, choice)
        found = differences(alone, killed)
    print(f"{kills} kills, {inside} of them while writing a file")
    print("bit-equal" if not found else f"NOT EQUAL: {found}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
