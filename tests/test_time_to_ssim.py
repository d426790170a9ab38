"""Time to SSIM: where a curve passes a mark, and the whole in small."""

import json
import math

import numpy as np
import pytest
import tensorflow as tf

import utils
from tests.benchmarks import time_to_ssim


def curve(system, *points):
    return [
        {"system": system, "step": 10 * k, "seconds": seconds, "ssim": ssim}
        for k, (seconds, ssim) in enumerate(points, 1)
    ]


@pytest.mark.parametrize(
    ("points", "seconds"),
    [
        ([(10, 0.8), (20, 1.0)], 15),  # a straight line between
        ([(10, 0.8), (20, 0.9), (30, 1.0)], 20),  # on the mark is enough
        ([(10, 0.8), (20, 0.7), (30, 0.95)], 28),  # from the one just before
        ([(10, 0.8), (20, 1.0), (30, 0.5), (40, 1.0)], 15),  # the first time
        ([(10, 0.9), (20, 1.0)], 10),  # unknown before the first
        ([(10, 0.8), (20, 0.89)], None),
        ([], None),
    ],
)
def test_passing(points, seconds):
    found = time_to_ssim.passing(curve("recipe", *points), 0.9)
    assert found == (seconds if seconds is None else pytest.approx(seconds))


def test_tabulate():
    rows = curve("tutorial", (60, 0.8), (120, 0.91), (180, 0.85))
    rows += curve("informed", (60, 0.85), (120, 0.95))
    rows += curve("recipe", (30, 0.91), (60, 0.92))
    marks, ends = time_to_ssim.tabulate(rows)
    assert [row["mark"] for row in marks] == [0.8545, 0.90, 0.9163]
    _, middle, high = marks
    assert middle["tutorial"] == pytest.approx(1 + 10 / 11)
    assert middle["informed"] == pytest.approx(1.5)
    assert middle["recipe"] == 0.5
    assert middle["tutorial/recipe"] == pytest.approx(2 * (1 + 10 / 11))
    assert middle["informed/recipe"] == pytest.approx(3)
    assert high["tutorial"] is None and high["tutorial/recipe"] is None
    assert high["recipe"] == pytest.approx(0.815)
    best = [(row["system"], row["best"], row["last"]) for row in ends]
    assert best[0] == ("tutorial", 0.91, 0.85)
    assert best[2] == ("recipe", 0.92, 0.92)
    text = time_to_ssim.table_text(marks, ends)
    assert "0.9163  never" in text and "best 0.9100, last 0.8500" in text


def test_informed_codes_begin_at_latents():
    quantizer = time_to_ssim.InformedQuantizer
    model = time_to_ssim.Tutorial(1.0, (4, 8), quantizer)
    images = tf.random.stateless_uniform((2, 16, 24, 1), (0, 0))
    before = model(images).numpy()
    model(images, training=True)
    assert np.abs(model(images) - before).max() > 0
    # 48 latents, each of them a code vector: nothing is lost.
    latents = model.encoder(images)
    np.testing.assert_allclose(model.quantizer(latents), latents, atol=1e-6)


def test_tutorial_learns_its_codes():
    """Gradients reach encoder, codebook and decoder; images stay images."""
    model = time_to_ssim.Tutorial(1.0, widths=(4, 8))
    images = tf.random.stateless_uniform((2, 16, 24, 1), (0, 0))
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((images - model(images)) ** 2)
        loss += tf.add_n(model.losses)
    gradients = tape.gradient(loss, model.trainable_variables)
    assert len(gradients) == 13  # six layers, and the codes
    assert all(np.any(np.asarray(gradient)) for gradient in gradients)
    result = model.reconstruct(images).numpy()
    assert result.shape == images.shape
    assert 0 <= result.min() <= result.max() <= 1


def test_small(adni_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(utils, "choose_precision", lambda *_: ("float32", ""))
    files = {name: tmp_path / name for name in ("rows.json", "curve.png")}
    rows = time_to_ssim.main(
        [str(adni_dir), "--small", "--minutes", "0.01", "--epochs", "1"]
        + ["--json", str(files["rows.json"])]
        + ["--figure", str(files["curve.png"])]
    )
    written = json.loads(files["rows.json"].read_text())
    assert written["cases"] == rows
    assert len(written["marks"]) == 3 and len(written["systems"]) == 3
    assert files["curve.png"].read_bytes().startswith(b"\x89PNG")

    for row in rows:
        assert set(row) == {"system", "step", "seconds", "ssim"}
        assert math.isfinite(row["ssim"]) and -1 <= row["ssim"] <= 1
    for name in time_to_ssim.SYSTEMS:
        system = [row for row in rows if row["system"] == name]
        for column in ("step", "seconds"):
            values = [row[column] for row in system]
            assert 0 < values[0] and values == sorted(values)
        if name == "recipe":
            assert system[-1]["step"] == 4  # one epoch of 16 slices, by 4
        else:
            assert system[-1]["seconds"] >= 60 * 0.01
    assert "2 unseen people after training on 4" in capsys.readouterr().out
