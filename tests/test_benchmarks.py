"""Each benchmark runs, in its smallest form; no time is asserted."""

import json

import numpy as np
import pytest
import tensorflow as tf

import modules
import utils
from tests.benchmarks import (
    common,
    guards,
    memory,
    pipeline,
    priors,
    sampling,
    scaling,
    training,
)


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """The precision policy is global: leave it as other tests expect it."""
    monkeypatch.setattr(utils, "choose_precision", lambda *_: ("float32", ""))


def cases(main, tmp_path, *arguments):
    """Rows that a benchmark returns, which are those that it writes."""
    file = tmp_path / "cases.json"
    found = main([*map(str, arguments), "--json", str(file)])
    rows = found["cases"] if isinstance(found, dict) else found
    assert json.loads(file.read_text())["cases"] == json.loads(json.dumps(rows))
    return rows


def test_sampling(tmp_path, capsys):
    (row,) = cases(sampling.main, tmp_path, "--cases", "smoke")
    assert (row["model"], row["batch"]) == ("pixelcnn-tutorial", 2)
    assert row["ratio"] == row["baseline_seconds"] / row["seconds"] > 0
    assert "pixelcnn-tutorial  4x4" in capsys.readouterr().out


def test_sampling_from_two_levels():
    small = sampling.SHARED | {"channels": 8, "blocks": 1}
    top = {**small, "latent_grid": (2, 2)}
    bottom = {**small, "latent_grid": (4, 4), "upper_grids": ((2, 2),)}
    row = sampling.recipe_row(2, 1, [top, bottom])
    assert row["grid"] == [(2, 2), (4, 4)]
    assert row["ratio"] == row["baseline_seconds"] / row["seconds"]


def test_scaling_and_memory_of_sampling(monkeypatch):
    monkeypatch.setattr(modules, "sampling_chunks", lambda: (4, 2))
    kinds = {"tiny": ((2, 4, 8), modules.PixelCNN, sampling.TINY)}
    (row,) = sampling.scaling_rows(kinds, batches=(1, 8, 16))
    assert row["grids"] == [[2, 2], [4, 4], [8, 8]] and row["grid"] == [4, 4]
    assert min(*row["seconds_of_grids"], *row["seconds_of_batches"]) > 0
    assert row["at_once"] == 8
    eights = common.exponent((8, 16), row["seconds_of_batches"][1:])
    assert row["exponent_of_images"] == pytest.approx(eights)
    assert common.exponent((1, 4, 16), (2, 16, 128)) == pytest.approx(1.5)
    (row,) = sampling.memory_rows((2,), (4, 4), sampling.TINY)
    assert row["ratio"] == 1 and row["peak_mb"] > 50


def test_tutorial_network_is_causal_and_as_large_as_ours():
    grid, settings = (6, 6), sampling.TINY
    network = sampling.tutorial_network(grid, **settings)
    before = np.asarray(network(np.zeros((1, *grid), "int32")))
    changed = np.zeros((1, *grid), "int32")
    changed[0, 2, 3] = 5
    same = (np.asarray(network(changed)) == before).all(axis=-1)[0].ravel()
    position = 2 * 6 + 3
    assert same[: position + 1].all() and not same[position + 1]


def test_training(tmp_path, capsys):
    flags = ("--cases", "smoke", "--steps", 2, "--gemm-size", 64, "--profile")
    rows = cases(training.main, tmp_path, *flags)
    assert [row["precision"] for row in rows] == [*training.PRECISIONS]
    assert rows[0]["times_float32"] == 1
    for row in rows:
        rate = row["gflop_per_step"] / row["seconds_per_step"]
        assert row["gflop_per_second"] == pytest.approx(rate)
    assert "smoke, float32: operations" in capsys.readouterr().out


def test_flops_are_those_counted_by_hand():
    @tf.function
    def step(images, kernel, transposed, weights):
        with tf.GradientTape() as tape:
            tape.watch((kernel, transposed, weights))
            x = tf.nn.conv2d(images, kernel, 2, "SAME")  # (2, 4, 3, 5)
            y = tf.nn.conv2d_transpose(x, transposed, (2, 8, 6, 7), 2)
            z = tf.reshape(y, (-1, 7)) @ weights  # (96, 11)
        return tape.gradient(z, (kernel, transposed, weights))

    shapes = ((2, 8, 6, 1), (4, 4, 1, 5), (3, 3, 7, 5), (7, 11))
    graph = step.get_concrete_function(*map(tf.TensorSpec, shapes)).graph
    first = 2 * (2 * 4 * 3) * (4 * 4 * 1 * 5)  # no gradient for the images
    second = 2 * (2 * 4 * 3) * (3 * 3 * 7 * 5)
    third = 2 * 96 * 7 * 11
    # Forward and two products backward, but for what nothing asks for: the
    # result of the last product, and the gradient for the images.
    counted = sum(training.count_flops(graph).values())
    assert counted == 2 * first + 3 * second + 2 * third


def test_pipeline(tmp_path):
    rows = cases(pipeline.main, tmp_path, "--cases", "smoke")
    assert [row["format"] for row in rows] == ["PNG", "JPEG", ".nii.gz"]
    for row in rows:
        rates = row["images_per_second"], row["trained_images_per_second"]
        assert row["ratio"] == rates[0] / rates[1] > 0


def test_memory_of_pipeline():
    rows = pipeline.memory_rows((3, 40), 32)
    assert [row["files"] for row in rows] == [3, 40]
    assert all(row["peak_mb"] >= row["held_mb"] > 50 for row in rows)


def test_start_of_pipeline():
    # What they import does not depend on how busy the machine is.
    for row in pipeline.start_rows(pipeline.COMMANDS[1:], rounds=1):
        code = 2 if "none" in row["command"] else 0
        assert (row["exit_code"], row["tensorflow"]) == (code, False)


def test_memory(tmp_path):
    ways = ("--ways", "as it is", "recompute")
    flags = ("--models", "smoke", *ways, "--steps", 1)
    plain, again = cases(memory.main, tmp_path, *flags)
    assert plain["peak_mb_ratio"] == 1
    assert again["peak_mb_ratio"] == again["peak_mb"] / plain["peak_mb"] > 0


def test_scaling(tmp_path):
    flags = ("--cases", "prior", "--small", "--steps", 2)
    (row,) = cases(scaling.main, tmp_path, *flags)
    ratio = row["alone_ms_per_step"] / row["two_ms_per_step"]
    assert row["efficiency"] == ratio > 0


def test_guards(tmp_path):
    rows = cases(guards.main, tmp_path, "--small", "--steps", 4)
    assert [row["case"] for row in rows] == ["vqvae", "prior"]
    for row in rows:
        low, high = row["ratio_ci95"]
        assert 0 < low <= row["ratio"] <= high
        assert row["save_share"] < 1


def test_priors(levels_run, tmp_path):
    before = levels_run.config_path.read_bytes()
    flags = ("--level", 2, "--epochs", 1, "--priors", "pixelcnn", "--images", 2)
    (row,) = cases(priors.main, tmp_path, levels_run.path, *flags)
    assert row["level"] == 2 and row["test_images"] > 0
    assert 0 < row["bits_per_code"] < 10
    assert levels_run.config_path.read_bytes() == before
