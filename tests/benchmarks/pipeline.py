"""Reading slices against training on them; memory of many files; start-up.

    python tests/benchmarks/pipeline.py
    python tests/benchmarks/pipeline.py --cases reading memory --json FILE

Cases:

- `reading`: images a second of `dataset.make_dataset` from PNG, JPEG and
  .nii.gz of the size that the default recipe trains at, nothing cached,
  against its training, by turns in one run.
- `memory`: memory held after a pass over 1,000 and over 20,000 files, hard
  links to a few simulated slices, each in a process of its own.
- `start`: seconds from the command to the first training steps that are logged
  (`train.py --smoke`, its slices simulated before), and of commands that need
  no TensorFlow; whether they import it.
- `smoke` shows in seconds that this file works.
"""

import functools
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

import dataset  # noqa: E402
import utils  # noqa: E402
from tests.benchmarks import common, training  # noqa: E402

FORMATS = {"oasis": "PNG", "adni": "JPEG", "hipmri": ".nii.gz"}
CONFIG = utils.Config(**utils.RECIPES["quickstart"].settings)
STEPS = 4  # of training, at a time
SUBJECTS = 4  # simulated in each layout; the least is 3
COMMANDS = (  # arguments, whether it is to train
    (("train.py", "--smoke"), True),
    (("predict.py", "--help"), False),
    (("predict.py", "generate", "-n", "none"), False),
    (("train.py", "--list-recipes"), False),
)


def reading_rows(image_size=128, rounds=5, batches=20, **changes):
    """A row for each format: images a second read and trained, the ratio."""
    batch_size, rows = CONFIG.batch_size, []
    with tempfile.TemporaryDirectory() as folder:
        indexes = {
            layout: dataset.load_index(
                dataset.simulate(
                    Path(folder) / layout, layout, SUBJECTS, image_size
                ),
                layout,
            )
            for layout in FORMATS
        }
        # All are read at the size of the first, that of the default recipe.
        size = dataset.native_size(indexes["oasis"])
        policy, _ = utils.choose_precision()
        make = functools.partial(training.vqvae, "quickstart", size, **changes)
        trainer = training.Trainer(make, policy)
        readers = []
        for index in indexes.values():
            # Enough epochs to go on; the files are in the system's memory.
            readers.append(
                iter(
                    dataset.make_dataset(
                        index, size, batch_size, seed=0, epochs=10_000
                    )
                )
            )
            next(readers[-1])  # compiles

        def read(reader):
            for _ in range(batches):
                next(reader)

        functions = [lambda reader=reader: read(reader) for reader in readers]
        functions.append(lambda: [trainer.step() for _ in range(STEPS)])
        times = np.median(common.by_turns(functions, rounds), axis=0)
        trained = STEPS * trainer.images / times[-1]
        for layout, seconds in zip(FORMATS, times, strict=False):
            # An epoch's last batch may be smaller: count what a batch has.
            count = len(indexes[layout])
            mean = count / dataset.steps_per_epoch(count, batch_size)
            read_rate = batches * mean / seconds
            rows.append(
                {
                    "format": FORMATS[layout],
                    "size": size,
                    "images_per_second": read_rate,
                    "trained_images_per_second": trained,
                    "ratio": read_rate / trained,
                }
            )
    return rows


def link_slices(folder, source, count):
    """A data set of `count` training slices, links to those of `source`.

    One file of `source` goes to each other split, for identical bytes may not
    be in two.
    """
    folders = dataset.LAYOUTS["oasis"].folders
    *files, validate, test = sorted(source.rglob("*.png"))
    links = {
        f"{folders['validate']}/case_1_slice_0.png": validate,
        f"{folders['test']}/case_2_slice_0.png": test,
    }
    for k in range(count):
        name = f"case_{3 + k // 32}_slice_{k % 32}.png"
        links[f"{folders['train']}/{name}"] = files[k % len(files)]
    for split in folders.values():
        (folder / split).mkdir(parents=True)
    for name, file in links.items():
        os.link(file, folder / name)


def memory_of(folder, size):
    """Files, and MB held after they were checked and read once, at most."""
    index = dataset.load_index(folder, "oasis")
    train = index[index["split"] == "train"]
    for _ in dataset.make_dataset(train, size, CONFIG.batch_size, seed=0):
        pass
    return len(train), common.memory_mb("VmRSS"), common.memory_mb("VmHWM")


def memory_rows(counts=(1_000, 20_000), image_size=128):
    """A row for each number of files; ratios to the first."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "simulated"
        dataset.simulate(source, "oasis", SUBJECTS, image_size)
        size = (image_size, image_size)
        for count in counts:
            linked = Path(folder) / f"linked-{count}"
            link_slices(linked, source, count)
            files, held, peak = common.in_process(memory_of, linked, size)
            rows.append({"files": files, "held_mb": held, "peak_mb": peak})
            rows[-1]["ratio"] = held / rows[0]["held_mb"]
    return rows


def first_step_seconds(arguments, folder):
    """Seconds until a training has logged its first steps."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / arguments[0]), *arguments[1:]],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    with process:
        # Keras prints a line at the end of the first epoch: of three steps,
        # with the validation after it.
        text = b""
        while chunk := process.stdout.read1():
            text += chunk
            if b"loss:" in text:
                found = time.perf_counter() - started
                process.terminate()
                process.stdout.read()
                return found
    raise RuntimeError(f"{arguments}: no step\n{text.decode()}")


def command_seconds(arguments, folder):
    """Seconds of a command, its exit code, whether TensorFlow is imported."""
    script = str(ROOT / arguments[0])
    started = time.perf_counter()
    code = subprocess.run(
        [sys.executable, script, *arguments[1:]],
        cwd=folder,
        capture_output=True,
    ).returncode
    seconds = time.perf_counter() - started
    listed = subprocess.run(
        [sys.executable, "-X", "importtime", script, *arguments[1:]],
        cwd=folder,
        capture_output=True,
        text=True,
    ).stderr
    imported = re.search(r"\|\s+tensorflow$", listed, re.MULTILINE)
    return seconds, code, bool(imported)


def start_rows(commands=COMMANDS, rounds=3):
    """A row for each command; the best of a few, as a user's second call."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if any(trains for _, trains in commands):
            # A first call would simulate its data.
            dataset.simulate(
                Path(folder) / "data" / f"simulated-{utils.SMOKE_SUBJECTS}",
                subjects=utils.SMOKE_SUBJECTS,
            )
        for arguments, trains in commands:
            row = {"command": " ".join(arguments)}
            if trains:
                row["seconds"] = min(
                    first_step_seconds(arguments, folder) for _ in range(rounds)
                )
            else:
                found = [
                    command_seconds(arguments, folder) for _ in range(rounds)
                ]
                row["seconds"] = min(seconds for seconds, _, _ in found)
                row["exit_code"], row["tensorflow"] = found[0][1:]
            rows.append(row)
    return rows


CASES = {  # key of the rows in the JSON file, function that makes them
    "reading": ("cases", reading_rows),
    "memory": ("memory", memory_rows),
    "start": ("start", start_rows),
    "smoke": ("cases", lambda: reading_rows(32, 1, 2, channels=4)),
}
COLUMNS = {
    "cases": {
        "format": ("format", ""),
        "size": ("size", utils.size_text),
        "read, images/s": ("images_per_second", ",.0f"),
        "trained, images/s": ("trained_images_per_second", ",.0f"),
        "ratio": ("ratio", ".1f"),
    },
    "memory": {
        "files": ("files", ",d"),
        "held, MB": ("held_mb", ".0f"),
        "peak, MB": ("peak_mb", ".0f"),
        "ratio": ("ratio", ".3f"),
    },
    "start": {
        "command": ("command", ""),
        "seconds": ("seconds", ".2f"),
        "exit code": ("exit_code", "d"),
        "TensorFlow": ("tensorflow", str),
    },
}


def main(argv=None):
    return common.run_cases(__doc__, CASES, COLUMNS, argv)


if __name__ == "__main__":
    main()
