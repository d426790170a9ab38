"""Another version of this program against this one, by turns in one run.

    python tests/benchmarks/compare.py --other DIR [--json FILE]

DIR is a checkout of the other version (default: this one, which shows the noise
of the machine). Both are used by their command lines, each in a folder of its
own. A ratio above 1 says how many times as fast this one is:

- seconds from `train.py --smoke` to the end of its first epoch;
- images a second of a quickstart of `--subjects` and `--epochs`, in float32 and
  bfloat16: the fastest epoch but the first, validation included;
- seconds of `predict.py generate -n 64`, of sampling 64 images alone, from the
  difference to five times as many, and of `predict.py evaluate`.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import numpy as np

PRECISIONS = ("float32", "mixed_bfloat16")
FLAGS_OF_TRAINING = (
    "--precision {0} --run-dir {0} --no-evaluate --phantom-subjects {1} "
    "--epochs {2} --prior-epochs {2}"
)


class Version:
    """A checkout, and the new folder that its commands are run in."""

    def __init__(self, checkout, folder):
        self.checkout, self.folder = Path(checkout).resolve(), folder
        folder.mkdir()
        self.seeds = itertools.count(1)
        chooses = "--top-p" in self.run("train.py", "--help")
        # It need not take the time to choose them.
        self.flags = ["--temperature=1", "--top-p=1"] if chooses else []
        self.first_epoch()  # simulates its data

    def run(self, script, *arguments, until=None):
        """Run a command, to its end or until it prints a pattern."""
        words = [sys.executable, "-u", self.checkout / script, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        pipes |= {"encoding": "utf-8", "errors": "replace", "cwd": self.folder}
        text = ""
        with subprocess.Popen(map(str, words), **pipes) as process:
            for line in process.stdout:
                text += line
                if until and re.search(until, line):
                    process.terminate()
                    return text
        if process.returncode:
            raise RuntimeError(f"{words}:\n{text}")
        return text

    def first_epoch(self):
        """Train to the end of the first epoch of a smoke run."""
        self.run("train.py", "--smoke", until=r"loss:? +\d")

    def train(self, precision, options):
        """Train a quickstart; return images a second of both stages."""
        sizes = options.subjects, options.epochs
        flags = FLAGS_OF_TRAINING.format(precision, *sizes).split()
        self.run("train.py", *flags, *self.flags)
        return common.rates_of(self.folder / precision)

    def predict(self, verb, *flags):
        """Use the last run that was trained."""
        if verb == "generate":  # images that are there are not sampled again
            flags = *flags, "--seed", next(self.seeds)
        self.run("predict.py", verb, PRECISIONS[-1], *flags)


def compare_rows(options):
    """Return a row for each thing measured."""
    rows = []

    def add(name, pair, is_rate=False):
        this, other = map(float, pair)
        row = {"what": name, "this": this, "other": other}
        row["ratio"] = this / other if is_rate else other / this
        rows.append(row)

    def medians(act, *arguments):
        calls = [lambda v=v: act(v, *arguments) for v in both]
        return np.median(common.by_turns(calls, options.rounds), axis=0)

    with tempfile.TemporaryDirectory() as folder:
        places = {"this": common.ROOT, "other": options.other}
        both = [Version(place, Path(folder, k)) for k, place in places.items()]
        add("first epoch, s", medians(Version.first_epoch))
        for precision in PRECISIONS:
            rates = [version.train(precision, options) for version in both]
            for stage in ("vqvae", "prior"):
                pair = [rate[stage] for rate in rates]
                add(f"{stage}, {precision}, images/s", pair, is_rate=True)
        few = medians(Version.predict, "generate", "-n", 64)
        many = medians(Version.predict, "generate", "-n", 320)
        add("generate -n 64, s", few)
        add("sampling alone, s", (many - few) / 4)
        add("evaluate, s", medians(Version.predict, "evaluate"))
    return rows


CASES = {"compare": compare_rows}
FLAGS = {"other": str(common.ROOT), "rounds": 3, "subjects": 40, "epochs": 4}

if __name__ == "__main__":
    common.run(__doc__, CASES, FLAGS)
