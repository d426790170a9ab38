"""Each benchmark runs, in its smallest form; no time is asserted."""

import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

sys.path.append(str(Path(__file__).parent / "benchmarks"))

import common
import compare
import lesions
import speed
import time_to_ssim

FAKE = """import os, sys
print("--top-p, loss: 0.5")
if "--no-evaluate" in sys.argv:
    os.mkdir(folder := sys.argv[sys.argv.index("--run-dir") + 1])
    rows = "stage,images,seconds vqvae,10,1 vqvae,20,2 prior,10,1 prior,20,2"
    print(*rows.split(), sep="\\n", file=open(folder + "/history.csv", "w"))
"""


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """Measure in this process and an empty folder."""
    monkeypatch.setattr(common, "in_process", lambda f, *a: f(*a))
    monkeypatch.chdir(tmp_path)


def measure(script, *arguments):
    argv = [*map(str, arguments), "--small", "--json", "rows.json"]
    return common.run(script.__doc__, script.CASES, script.FLAGS, argv)


def test_speed():
    cases = "--cases training memory sampling input files"
    flags = f"{cases} --models quickstart_prior --steps 2".split()
    for row in sum(measure(speed, *flags).values(), []):
        assert min(v for v in row.values() if isinstance(v, float)) >= 0
    speed.utils.parse_training(
        speed.WORKER_FLAGS
    )  # which is too slow for a test


def test_flops_are_those_counted_by_hand():
    def step(images, kernel, transposed, weights):
        with tf.GradientTape() as tape:
            tape.watch((kernel, transposed, weights))
            x = tf.nn.conv2d(images, kernel, 2, "SAME")  # (2, 4, 3, 5)
            y = tf.nn.conv2d_transpose(x, transposed, (2, 8, 6, 7), 2)
            z = tf.reshape(y, (-1, 7)) @ weights  # (96, 11)
        return tape.gradient(z, (kernel, transposed, weights))

    shapes = (2, 8, 6, 1), (4, 4, 1, 5), (3, 3, 7, 5), (7, 11)
    made = tf.function(step).get_concrete_function(*map(tf.TensorSpec, shapes))
    # Nothing reads the last product and the gradient for the images.
    by_hand = 2 * (2 * 24 * 80 + 2 * 96 * 77) + 3 * (2 * 24 * 315)
    assert speed.count_flops(made.graph) == by_hand


def test_lesions(tiny_run):
    for row in measure(lesions, tiny_run.path, "--restorations", 1)["lesions"]:
        assert 0 <= row["low"] <= row["value"] <= row["high"] <= 1
    image = np.pad(np.full((48, 40), 0.5, np.float32), ((8, 8), (12, 12)))
    changed, mask = lesions.add_lesion(image, 3)
    assert (changed == lesions.add_lesion(image, 3)[0]).all()
    assert mask.any() and (image[mask] > 0).all()
    assert np.abs(changed - image)[mask].min() > 0.1
    assert lesions.add_lesion(0 * image, 3)[1].sum() == 0


def test_time_to_ssim(adni_dir):
    flags = "--minutes", 0.001, "--epochs", 1, "--figure", "curve.png"
    assert len(measure(time_to_ssim, adni_dir, *flags)["curves"]) >= 3
    assert Path("curve.png").exists() and Path("rows.json").exists()


def test_compare(monkeypatch):
    Path("train.py").write_text(FAKE)
    Path("predict.py").write_text(FAKE)
    monkeypatch.setattr(common, "ROOT", Path.cwd())
    rows = measure(compare, "--other", Path.cwd(), "--rounds", 1)["compare"]
    assert len(rows) == 8 and rows[1]["this"] == 10 and rows[1]["ratio"] == 1
