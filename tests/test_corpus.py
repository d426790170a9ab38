"""Every fault of the corpus is read or refused by name, nothing else."""

import contextlib
import gzip
import re
from pathlib import Path

import numpy as np
import pytest

import dataset
from tests import corpus
from tests.corpus import FAULTS, MIB
from utils import DataError


@contextlib.contextmanager
def peak_growth():
    """Yield a list that holds in the end by how much memory grew at most."""

    def memory(key):
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(rf"{key}:\s+(\d+)", status)[1])

    growth, before = [], None
    with contextlib.suppress(OSError, TypeError):  # elsewhere than on Linux
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        before = memory("VmRSS")
    yield growth
    growth.append(max(0, memory("VmHWM") - before) if before else 0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "CACHE", tmp_path / "cache")


@pytest.mark.parametrize("name", FAULTS)
def test_fault(tmp_path, name):
    fault = FAULTS[name]
    root = tmp_path / fault.home / "data"
    try:
        corpus.write_good(root, fault.layout)
        named = fault.make(root)
    except OSError as reason:
        pytest.skip(f"the fault cannot be made here: {reason}")
    if fault.refused:
        with peak_growth() as growth, pytest.raises(DataError) as caught:
            corpus.load(fault, root)
        text = str(caught.value)
        assert re.search(fault.refused, text)
        assert text.isprintable() and dataset._show(named) in text
    else:
        with peak_growth() as growth:
            slices, output = corpus.load(fault, root)
        assert len(slices) == 16 - fault.lost
        images = slices.read()
        assert np.isfinite(images).all() and np.ptp(images) > 0.5
        assert 0 <= images.min() and images.max() <= 1
        assert re.search(fault.says, output)
        warned = re.search("warning|ignored", output)
        expected = re.search(r"\d files|ignored", fault.says)
        assert bool(warned) == bool(expected)
    assert growth[0] < 64 * MIB or not fault.bomb
    if fault.skips:
        slices, _ = corpus.load(fault, root, skip_bad=True)
        assert list(slices.rejected.columns) == ["path", "reason"]
        assert [slices.root / slices.rejected["path"][0]] == [named]
        assert re.search(fault.refused, slices.rejected["reason"][0])
        assert len(slices) == 15 and np.ptp(slices.read()) > 0.5
        assert slices.table.notna().all(axis=None)


def test_growth_of_memory_is_seen():
    with peak_growth() as growth:
        np.ones(200 * MIB, np.uint8).sum()
    if not growth[0]:
        pytest.skip("the peak of memory cannot be read here")
    assert 190 * MIB < growth[0] < 260 * MIB


def test_mutants_are_read_or_refused(tmp_path):
    rng = np.random.default_rng(0)
    sources = {
        "a.png": corpus.png(corpus.GREY),
        "b.jpeg": corpus.jpeg(corpus.GREY),
        "c.nii": corpus.nifti(corpus.PLANE),
        "d.nii.gz": gzip.compress(corpus.nifti(corpus.PLANE)),
    }
    for name, data in sources.items():
        for _ in range(60):
            mutant = bytearray(data)
            for at in rng.integers(0, min(len(data), 400), 3):
                mutant[at] = rng.integers(256)
            path = tmp_path / name
            path.write_bytes(mutant[: rng.integers(1, 2 * len(data))])
            with contextlib.suppress(dataset._Unfit):
                _, image = dataset._read_file(path)
                assert np.isfinite(image).all() and image.ndim == 2
