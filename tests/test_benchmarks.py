"""Each benchmark runs, in its smallest form; no time is asserted."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent / "benchmarks"))

import common
import lesions
import speed
import time_to_ssim


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "in_process", lambda f, *a: f(*a))
    monkeypatch.chdir(tmp_path)


def measure(script, *arguments):
    argv = [*map(str, arguments), "--small", "--json", "rows.json"]
    return common.run(script.__doc__, script.CASES, script.FLAGS, argv)


def test_speed(plain):
    found = measure(speed, "--models", "quickstart_prior", "--steps", 2)
    assert all(found[name] for name in speed.CASES)


def test_lesions(tiny_run):
    for row in measure(lesions, tiny_run.path, "--restorations", 1)["lesions"]:
        assert 0 <= row["value"] <= 1
        assert row["low"] is row["high"] is None  # of one subject
    image = np.pad(np.full((48, 40), 0.5, np.float32), ((8, 8), (12, 12)))
    changed, mask = lesions.add_lesion(image, 3)
    assert (changed == lesions.add_lesion(image, 3)[0]).all()
    assert mask.any() and (image[mask] > 0).all()
    assert np.abs(changed - image)[mask].min() > 0.1
    assert lesions.add_lesion(0 * image, 3)[1].sum() == 0


def test_time_to_ssim(adni_dir, plain):
    flags = "--minutes", 0.001, "--epochs", 1, "--figure", "curve.png"
    assert len(measure(time_to_ssim, adni_dir, *flags)["curves"]) >= 3
    assert Path("curve.png").exists() and Path("rows.json").exists()
