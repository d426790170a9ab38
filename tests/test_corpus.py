"""Every fault of the corpus is read or refused by name, nothing else."""

import io
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import dataset
from tests import corpus
from tests.corpus import MIB, MUTANTS

ROOT = Path(dataset.__file__).parent
GOOD = {"oasis": 16, "adni": 16, "hipmri": 16}  # images


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Function: name of a mutant -> its outcome, found once."""
    found = {}

    def judge(name):
        if name not in found:
            folder = tmp_path_factory.mktemp("mutant")
            found[name] = corpus.judge(MUTANTS[name], folder)
        return found[name]

    judge("image files: 16 bits")  # what the first one loads is not its own
    return judge


@pytest.mark.parametrize("layout", GOOD)
def test_the_good_data_sets_are_accepted(tmp_path, layout):
    mutant = corpus.Mutant("none", "none", layout, lambda root: None)
    outcome = corpus.judge(mutant, tmp_path)
    assert (outcome.verdict, outcome.images) == ("accepted", GOOD[layout])
    assert "warning" not in outcome.output
    assert "ignored" not in outcome.output


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant(outcome, name):
    mutant, result = MUTANTS[name], outcome(name)
    if result.verdict == "not made":
        pytest.skip(result.text)
    assert result.verdict == mutant.expected, result.text
    assert "Traceback" not in result.text + result.output
    if mutant.refused:
        assert re.search(mutant.refused, result.text)
    else:
        assert result.images == GOOD[mutant.layout] - mutant.lost
        assert re.search(mutant.says, result.output)
        warned = "warning: " in result.output or "ignored" in result.output
        assert warned == bool(re.search(r"\d files|single", mutant.says))
    if mutant.bomb and result.growth is not None:
        assert result.growth < 64 * MIB


@pytest.mark.parametrize(
    "name",
    [n for n, m in MUTANTS.items() if m.refused and m.skips and not m.later],
)
def test_skip_bad_goes_on_without_the_file(outcome, name):
    result = outcome(name)
    if result.verdict == "not made":
        pytest.skip(result.text)
    rejected = result.kept.attrs["rejected"]
    assert list(rejected.columns) == ["path", "reason"]
    assert rejected["path"].tolist() == [str(result.named)]
    assert re.search(MUTANTS[name].refused, rejected["reason"][0])
    assert len(result.kept) == GOOD[MUTANTS[name].layout] - 1
    assert str(result.named) not in set(result.kept["path"])
    assert result.kept.notna().all(axis=None)


def test_what_is_kept_can_be_read(outcome):
    for name in ("image files: zero bytes", "NIfTI: half a .nii.gz"):
        images = corpus.read(outcome(name).kept)
        assert len(images) == 15 and np.ptp(images) > 0.5


def test_totals(outcome):
    outcomes = {name: outcome(name) for name in MUTANTS}
    table = corpus.table(outcomes)
    print(table)
    total = dict(
        zip(table.split("\n")[0].split(), table.split()[-6:], strict=True)
    )
    total = {column: int(number) for column, number in total.items()}
    assert total["mutants"] == len(MUTANTS) >= 60
    assert total["escaped"] == 0
    expected = pd.Series([m.expected for m in MUTANTS.values()]).value_counts()
    made = total["accepted"] + total["refused"]
    assert made == expected.sum() - total["not-made"]


# ------------------------------------------------------------- the bombs tick


def test_bombs_are_real():
    """Smaller ones, unpacked by others, are what they claim to be."""
    with Image.open(io.BytesIO(corpus.png_bomb(1100, 1200))) as image:
        assert image.size == (1200, 1100) and image.getextrema() == (0, 0)
    unpacked = zlib.decompress(corpus.gzip_bomb(b"head", 3 * MIB + 5), 31)
    assert unpacked == b"head" + bytes(3 * MIB + 5)
    assert len(corpus.real_bomb(b"")) < MIB


def test_memory_that_is_taken_is_seen():
    with corpus.peak_growth() as growth:
        np.ones(200 * MIB, np.uint8).sum()
    if growth[0] is None:
        pytest.skip("the peak of the memory is unknown here")
    assert 190 * MIB < growth[0] < 260 * MIB


# ------------------------------------------------------------------ train.py

STARTS = {
    "image files: half a PNG": 3,
    "NIfTI: flipped bit: gzip checksum": 3,
    "data set: subject in two splits": 3,
    "data set: no test split": 3,
    "image files: sizes that do not divide": 2,
}


@pytest.mark.parametrize("name", STARTS)
def test_train_refuses_in_one_line_and_leaves_nothing(tmp_path, name):
    mutant = MUTANTS[name]
    root = corpus.write_good(tmp_path / "home" / "data", mutant.layout)
    named = mutant.fault(root)
    arguments = ["--dataset", mutant.layout, "--data-dir", root.parent]
    arguments += ["--smoke", "--run-dir", tmp_path / "run"]
    result = subprocess.run(
        [sys.executable, "train.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == STARTS[name], result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert str(named) in result.stderr
    assert re.search(mutant.refused, result.stderr)
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.rglob("*.keras"))
