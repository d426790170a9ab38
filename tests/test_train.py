"""Tests of train.py: what a run leaves behind, and what it refuses."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from PIL import Image

import dataset
import train
import utils
from tests.conftest import SIZE, SLICES, TINY, blobs, copy_run, train_tiny

ROOT = Path(train.__file__).parent
IMAGES = {"train": 4 * SLICES, "validate": SLICES, "test": SLICES}
FIGURES = {"reconstructions", "indices", "codebook", "history"}


def files(folder):
    """Return {path inside: contents} of all files of a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def check_figures(folder, names):
    """Check that a folder holds these figures only, none of one colour."""
    assert {path.name for path in folder.glob("*.png")} == {
        f"{name}.png" for name in names
    }
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert image.format == "PNG" and min(image.size) >= 100
            low, high = image.convert("L").getextrema()
        assert high - low > 50


def evaluation_of(run):
    return json.loads(run.evaluation_path.read_text())


def indices_of(run):
    with np.load(run.indices_path) as file:
        return dict(file)


def weights_of(path):
    return utils.load_model(path).get_weights()


def read_test_images(oasis_dir):
    """Return the test images in the order of the split, (N, H, W, 1)."""
    folder = oasis_dir / "keras_png_slices_test"
    paths = [folder / f"case_006_slice_{k}.nii.png" for k in range(SLICES)]
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    return (images / 255).astype("float32")[..., None]


# What a run leaves behind


def test_run_holds_every_file_of_the_design_and_no_other(tiny_run):
    names = {path.name for path in tiny_run.path.iterdir()}
    assert names == {
        "config.json",
        "split.csv",
        "vqvae.keras",
        "indices.npz",
        "prior.keras",
        "history.csv",
        "evaluation.json",
        "figures",
    }
    check_figures(tiny_run.figures_path, FIGURES | {"samples"})


def test_config_tells_how_to_repeat_the_run(tiny_run, oasis_dir):
    document = json.loads(tiny_run.config_path.read_text())
    assert document["format"] == utils.FORMAT
    assert document["image_size"] == [SIZE, SIZE]
    assert document["latent_grids"] == [[SIZE // 4, SIZE // 4]]
    assert document["simulated"] is False
    assert "percentiles" in document["intensity"]
    assert document["versions"]["tensorflow"] == tf.__version__
    settings = document["settings"]
    assert set(settings) == {f.name for f in dataclasses.fields(utils.Config)}
    assert settings["num_embeddings"] == 16 and settings["prior_blocks"] == 1
    assert settings["data_dir"] == str(oasis_dir)


def test_split_lists_every_image_with_its_hash(tiny_run, oasis_dir):
    split = pd.read_csv(tiny_run.split_path, dtype={"subject": str})
    expected = sorted(map(str, oasis_dir.glob("*/case_*.png")))
    assert sorted(split["path"]) == expected
    assert split["split"].value_counts().to_dict() == IMAGES
    assert not split.groupby("subject")["split"].nunique().gt(1).any()
    for row in split.itertuples():
        assert row.sha256 == utils.file_sha256(row.path)
    assert set(split["slice"]) == set(range(SLICES))
    assert split["position"].between(0, 1).all()


def test_indices_are_the_encoded_images_of_each_split(tiny_run, oasis_dir):
    indices = indices_of(tiny_run)
    assert {name: len(grids) for name, grids in indices.items()} == {
        f"{split}_1": count for split, count in IMAGES.items()
    }
    for grids in indices.values():
        assert grids.shape[1:] == (SIZE // 4, SIZE // 4)
        assert grids.dtype == np.int32
        assert grids.min() >= 0 and grids.max() < 16
    vqvae = utils.load_model(tiny_run.vqvae_path)
    found = vqvae.encode(read_test_images(oasis_dir))[0]
    np.testing.assert_array_equal(found, indices["test_1"])


def test_history_has_a_row_an_epoch_of_both_stages(tiny_run):
    history = pd.read_csv(tiny_run.history_path)
    assert list(history["stage"]) == ["vqvae"] * 2 + ["prior"] * 2
    assert list(history["epoch"]) == [1, 2, 1, 2]
    assert list(history["step"]) == [4, 8, 2, 4]
    assert list(history["images"]) == [16, 32, 16, 32]
    vqvae, prior = history[:2], history[2:]
    for rows, names in (
        (vqvae, ["reconstruction_loss", "commitment_loss", "ssim"]),
        (prior, ["bits_per_code"]),
    ):
        for name in ["loss", *names]:
            assert np.isfinite(rows[[name, f"val_{name}"]]).all(axis=None)
        assert rows["loss"].iloc[1] < rows["loss"].iloc[0]
        assert rows["seconds"].is_monotonic_increasing
    assert vqvae["codebook_usage"].between(0, 1).all()
    assert vqvae["perplexity"].between(1, 16).all()


def test_history_figure_shows_metrics_only(tiny_run):
    history = pd.read_csv(tiny_run.history_path)
    assert utils._curves(history, "prior") == ["loss", "bits_per_code"]


def test_evaluation_has_every_number_in_its_range(tiny_run):
    evaluation = evaluation_of(tiny_run)
    assert set(evaluation) == {
        "data",
        "reconstruction",
        "codebook",
        "prior",
        "speed",
    }
    assert evaluation["data"] == {
        "dataset": "oasis",
        "simulated": False,
        "image_size": [SIZE, SIZE],
        "train": {"subjects": 4, "images": 16},
        "validate": {"subjects": 1, "images": 4},
        "test": {"subjects": 1, "images": 4},
    }
    ranges = {
        "ssim": (-1, 1),
        "ssim_foreground": (-1, 1),
        "ms_ssim": (0, 1),
        "psnr": (0, 100),
        "mae": (0, 1),
    }
    assert set(evaluation["reconstruction"]) == set(ranges)
    for name, (low, high) in ranges.items():
        value = evaluation["reconstruction"][name]
        assert low <= value["ci95"][0] <= value["mean"]
        assert value["mean"] <= value["ci95"][1] <= high
    [codebook] = evaluation["codebook"]
    assert (codebook["level"], codebook["grid"]) == (1, [8, 8])
    assert codebook["num_embeddings"] == 16
    assert 0 < codebook["usage"] <= 1
    assert 1 <= codebook["perplexity"] <= 16 * codebook["usage"] + 1e-9
    assert 0 <= codebook["entropy_bits"] <= 4
    [prior] = evaluation["prior"]
    assert set(prior["bits_per_code"]) == {"train", "validate", "test"}
    assert prior["uniform_bits"] == 4.0
    assert 0 < prior["unigram_bits"] < 8
    speed = evaluation["speed"]
    assert speed["samples"] == 3
    for name in (
        "vqvae_images_per_second_trained",
        "prior_images_per_second_trained",
        "images_per_second_encoded",
        "seconds_for_samples",
        "peak_memory_mb",
    ):
        assert speed[name] > 0


def test_interval_of_one_subject_contains_its_mean():
    values = np.random.default_rng(0).random(100) / 3
    for n in range(1, 100):
        found = utils.bootstrap_by_subject(values[:n], ["a"] * n, n=2)
        assert found["ci95"] == [found["mean"]] * 2


def test_ssim_is_that_of_tensorflow_over_all_test_images(tiny_run, oasis_dir):
    images = read_test_images(oasis_dir)
    vqvae = utils.load_model(tiny_run.vqvae_path)
    decoded = vqvae.decode_indices(vqvae.encode(images))
    expected = tf.reduce_mean(tf.image.ssim(images, decoded, max_val=1.0))
    found = evaluation_of(tiny_run)["reconstruction"]["ssim"]["mean"]
    assert found == pytest.approx(float(expected), abs=1e-5)


def test_bits_are_those_of_the_saved_prior(tiny_run):
    indices = indices_of(tiny_run)
    prior = utils.load_model(tiny_run.prior_path)
    found = evaluation_of(tiny_run)["prior"][0]
    positions = np.arange(SLICES, dtype="float32") / (SLICES - 1)
    for split in ("validate", "test"):
        grids = indices[f"{split}_1"]
        logits = np.float64(prior(grids, slice_position=positions))
        top = logits.max(axis=-1, keepdims=True)
        norm = np.log(np.exp(logits - top).sum(-1, keepdims=True)) + top
        nats = norm - np.take_along_axis(logits, grids[..., None], -1)
        bits = nats.mean() / np.log(2)
        assert found["bits_per_code"][split] == pytest.approx(bits, rel=1e-5)
    assert found["bits_per_image"] == pytest.approx(bits * 64, rel=1e-5)
    log_prob = prior.log_prob(grids, positions).numpy().mean()
    assert -log_prob / np.log(2) == pytest.approx(bits, rel=1e-5)


def test_the_best_prior_is_kept(tiny_run):
    history = pd.read_csv(tiny_run.history_path)
    bits = evaluation_of(tiny_run)["prior"][0]["bits_per_code"]["validate"]
    best = history["val_bits_per_code"].min()
    assert bits == pytest.approx(best, rel=1e-5)


# Stages


def test_stage_vqvae_has_no_prior_but_figures(vqvae_run):
    assert not vqvae_run.prior_path.exists()
    check_figures(vqvae_run.figures_path, FIGURES)
    evaluation = evaluation_of(vqvae_run)
    assert "prior" not in evaluation
    assert "ssim" in evaluation["reconstruction"]
    assert set(pd.read_csv(vqvae_run.history_path)["stage"]) == {"vqvae"}


def test_same_seed_same_bits_in_one_go_or_in_stages(
    tiny_run, vqvae_run, tmp_path, monkeypatch
):
    staged = copy_run(vqvae_run, tmp_path)
    monkeypatch.chdir(tmp_path)  # the data are found from anywhere
    staged = train_tiny("copy", "--stage", "prior")
    for name in ("vqvae_path", "prior_path"):
        one, other = (weights_of(getattr(r, name)) for r in (tiny_run, staged))
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
    one, other = indices_of(tiny_run), indices_of(staged)
    assert {k: v.tobytes() for k, v in one.items()} == {
        k: v.tobytes() for k, v in other.items()
    }
    one, other = evaluation_of(tiny_run), evaluation_of(staged)
    assert one.pop("speed") and other.pop("speed")
    assert one == other
    assert staged.config == dataclasses.replace(
        tiny_run.config, stage="prior", run_dir="copy", image_size=(SIZE, SIZE)
    )


def test_stage_prior_trains_another_prior_on_the_same_vqvae(tiny_run, tmp_path):
    run = copy_run(tiny_run, tmp_path)
    before = files(run.path)
    flags = "--prior gated --prior-channels 4 --condition none --seed 1"
    again = train_tiny(run.path, "--stage", "prior", *flags.split())
    after = files(run.path)
    for name in ("vqvae.keras", "split.csv"):
        assert after[name] == before[name]
    one, other = indices_of(tiny_run), indices_of(run)
    assert all(np.array_equal(one[name], other[name]) for name in one)
    prior = utils.load_model(run.prior_path)
    assert type(prior).__name__ == "GatedPixelCNN"
    assert prior.channels == 4 and not prior.slice_condition
    vqvae = utils.load_model(run.vqvae_path)
    assert prior.codebook_sha256 == utils.codebook_sha256(vqvae)
    # The settings are those of the run, not of the default recipe.
    assert again.config.num_embeddings == 16 and again.config.prior == "gated"
    assert again.config.dataset == "oasis" and again.config.seed == 1
    assert "command" in again.info and "prior_command" in again.info
    history = [pd.read_csv(r.history_path) for r in (tiny_run, run)]
    vqvae_rows = [h[h["stage"] == "vqvae"].dropna(axis=1) for h in history]
    pd.testing.assert_frame_equal(*vqvae_rows, check_exact=True)
    assert (history[1]["stage"] == "prior").sum() == 2
    assert after["evaluation.json"] != before["evaluation.json"]
    assert (
        evaluation_of(run)["reconstruction"]
        == (evaluation_of(tiny_run)["reconstruction"])
    )


def test_settings_of_stage_prior_are_those_of_the_run(tiny_run):
    given = ["--stage", "prior", "--run-dir", str(tiny_run.path)]
    same = ["--num-embeddings", "16", "--image-size", str(SIZE)]
    config = utils.resolve([*given, *same, "--prior-epochs", "9"])
    assert config.prior_epochs == 9 and config.channels == 8
    assert config.prior_channels == 8
    smoke = utils.resolve([*given, "--smoke", "--prior-channels", "99"])
    smoke = smoke.smoked()
    assert (smoke.epochs, smoke.prior_epochs) == (2, 1)
    assert smoke.prior_channels == 16


def test_smoke_connects_everything_on_simulated_brains(smoke_folder):
    assert {path.name for path in smoke_folder.iterdir()} == {"data", "runs"}
    run = utils.Run.newest(smoke_folder / "runs")
    assert run.path.name.startswith("quickstart-")
    assert run.config.smoke and run.info["simulated"]
    check_figures(run.figures_path, FIGURES | {"samples"})
    data = evaluation_of(run)["data"]
    assert data["simulated"] and data["dataset"] == "phantom"
    split = pd.read_csv(run.split_path)
    counts = split["split"].value_counts().to_dict()
    assert counts == {name: data[name]["images"] for name in counts}
    assert counts == {name: utils.SMOKE_IMAGES for name in dataset.SPLITS}
    assert set(pd.read_csv(run.history_path)["stage"]) == {"vqvae", "prior"}


def test_a_single_training_subject_has_none_to_validate_on(
    oasis_dir, tmp_path, capsys
):
    data = shutil.copytree(oasis_dir, tmp_path / "data")
    shutil.rmtree(data / "keras_png_slices_validate")
    for subject in (2, 3, 4):
        for path in data.glob(f"keras_png_slices_train/case_{subject:03}*"):
            path.unlink()
    run = train_tiny(
        tmp_path / "run", "--epochs", "1", "--prior-epochs", "1", data=data
    )
    assert "none is left to validate on" in capsys.readouterr().err
    evaluation = evaluation_of(run)
    assert evaluation["data"]["validate"] == {"subjects": 0, "images": 0}
    assert set(evaluation["prior"][0]["bits_per_code"]) == {"train", "test"}
    assert set(indices_of(run)) == {"train_1", "test_1"}


# Numbers that are not finite


def explode(monkeypatch):
    monkeypatch.setattr(train, "schedule", lambda *args: 1e30)


def refused(argv, code, capsys):
    """Run the script; return its one line on stderr."""
    with pytest.raises(SystemExit) as caught:
        utils.run_main(train.main, [str(part) for part in argv])
    assert caught.value.code == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_exploding_vqvae_is_not_saved(oasis_dir, tmp_path, monkeypatch, capsys):
    explode(monkeypatch)
    argv = ["--dataset", "oasis", "--data-dir", oasis_dir, *TINY]
    error = refused([*argv, "--run-dir", tmp_path / "run"], 5, capsys)
    assert "vqvae" in error and "--learning-rate" in error
    assert not list(tmp_path.rglob("*.keras"))
    assert (tmp_path / "run" / "history.csv").exists()


def test_exploding_prior_leaves_the_earlier_one(
    tiny_run, tmp_path, monkeypatch, capsys
):
    run = copy_run(tiny_run, tmp_path)
    before = files(run.path)
    explode(monkeypatch)
    argv = ["--stage", "prior", "--run-dir", run.path]
    assert "--prior-learning-rate" in refused(argv, 5, capsys)
    after = files(run.path)
    for name in ("vqvae.keras", "prior.keras", "config.json"):
        assert after[name] == before[name]


# Refused starts: one line, and no trace


def check_refused(argv, code, parts, tmp_path, capsys):
    run_dir = tmp_path / "runs" / "new"
    error = refused([*argv, "--run-dir", run_dir], code, capsys)
    for part in parts:
        assert str(part) in error
    assert not run_dir.exists()


@pytest.mark.parametrize(
    "flags, part",
    [
        ("--recipe nonsense", "--recipe: expected one of quickstart"),
        ("--epochs -3", "--epochs: expected a whole number in [1, "),
        ("--learning-rate nan", "--learning-rate: expected a number in (0"),
        ("--epoch 3", "--epoch: unknown argument; did you mean --epochs?"),
        ("--dataset oasis", "--data-dir is required"),
        ("--data-dir x", "--data-dir: say which layout"),
        ("--image-size 30", "--image-size: 30x30 is not a multiple of 4"),
        ("--levels 2", "--stage vqvae"),
        ("--phantom-subjects 2", "--phantom-subjects: expected"),
    ],
)
def test_bad_flags(flags, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_refused(flags.split(), 2, [part], tmp_path, capsys)
    assert not list(tmp_path.iterdir())


def test_size_of_the_data_not_divisible(oasis_dir, tmp_path, capsys):
    flags = "--stage vqvae --downsampling 32 --levels 2".split()
    argv = ["--dataset", "oasis", "--data-dir", oasis_dir, *flags]
    parts = ["--image-size", "32x32 is not a multiple of 64; use 64x64"]
    check_refused(argv, 2, parts, tmp_path, capsys)


def empty(root):
    shutil.rmtree(root)
    root.mkdir()
    return [root, "oasis layout", "found none"]


def absent(root):
    shutil.rmtree(root)
    return [root, "nothing there, expected a folder"]


def other_layout(root):
    for split in dataset.SPLITS:
        (root / f"keras_png_slices_{split}").rename(root / split)
    return [root, "not the oasis layout", "keras_png_slices_train", "validate"]


def corrupt(root):
    path = root / "keras_png_slices_train" / "case_002_slice_1.nii.png"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    return [path, "found a damaged PNG, expected a complete one"]


def subject_in_two_splits(root):
    name = "case_001_slice_9.nii.png"
    image = Image.fromarray(blobs(77))
    image.save(root / "keras_png_slices_test" / name)
    return ["1 subjects are in two splits, expected none: 001"]


def twin_in_two_splits(root):
    one = root / "keras_png_slices_train" / "case_002_slice_1.nii.png"
    other = root / "keras_png_slices_test" / "case_099_slice_0.nii.png"
    shutil.copy(one, other)
    return [one, other, "expected each image in one split"]


@pytest.mark.parametrize(
    "damage",
    [
        empty,
        absent,
        other_layout,
        corrupt,
        subject_in_two_splits,
        twin_in_two_splits,
    ],
)
def test_unfit_data(damage, oasis_dir, tmp_path, capsys):
    root = shutil.copytree(oasis_dir, tmp_path / "data")
    parts = damage(root)
    argv = ["--dataset", "oasis", "--data-dir", root, *TINY]
    check_refused(argv, 3, parts, tmp_path, capsys)


def test_nan_voxels(hipmri_dir, tmp_path, capsys):
    from tests.conftest import write_nifti

    root = shutil.copytree(hipmri_dir, tmp_path / "data")
    path = root / "keras_slices_train" / "case_005_week_0_slice_2.nii.gz"
    image = blobs(5).astype(np.float32)
    image[3, 4] = np.nan
    write_nifti(path, image)
    argv = ["--dataset", "hipmri", "--data-dir", root, *TINY]
    parts = [path, "1 voxels that are NaN", "expected finite"]
    check_refused(argv, 3, parts, tmp_path, capsys)


def test_a_refused_start_keeps_a_folder_that_was_there(
    oasis_dir, tmp_path, capsys
):
    (tmp_path / "run").mkdir()
    argv = ["--dataset", "adni", "--data-dir", oasis_dir]
    refused([*argv, "--run-dir", tmp_path / "run"], 3, capsys)
    assert not list((tmp_path / "run").iterdir())


def test_a_folder_in_use_is_left_alone(tiny_run, oasis_dir, tmp_path, capsys):
    run = copy_run(tiny_run, tmp_path)
    before = files(run.path)
    argv = ["--dataset", "oasis", "--data-dir", oasis_dir]
    error = refused([*argv, "--run-dir", run.path], 4, capsys)
    assert f"{run.path}: the folder is not empty" in error
    assert files(run.path) == before


def test_mixed_sizes_are_counted_in_one_line(hipmri_dir, tmp_path, capsys):
    config = utils.Config(
        dataset="hipmri",
        data_dir=str(hipmri_dir),
        run_dir=str(tmp_path / "run"),
    )
    run, splits = train.start(config)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "32x36" in line] == [
        "plane sizes: 32x32 (20), 32x36 (4); padded or cropped to 32x32"
    ]
    assert run.info["image_size"] == (SIZE, SIZE)
    batches = train.image_batches(run, splits["train"], 16)
    assert [batch.shape for batch in batches] == [(16, SIZE, SIZE, 1)]


# Refusals of `--stage prior`


def test_stage_prior_needs_a_run(tmp_path, capsys):
    error = refused(["--stage", "prior"], 2, capsys)
    assert error.startswith("error: --stage prior needs --run-dir: ")
    check_refused(
        ["--stage", "prior"],
        4,
        [tmp_path / "runs" / "new", "no such run folder"],
        tmp_path,
        capsys,
    )


@pytest.mark.parametrize(
    "flags, trained, found",
    [
        ("--levels 2", "1", "2"),
        ("--downsampling 8", "4", "8"),
        ("--num-embeddings 512", "16", "512"),
        ("--image-size 64x32", "32x32", "64x32"),
        ("--dataset adni", "oasis", "adni"),
        ("--recipe oasis-vqvae-pixelcnn", "quickstart", "oasis-vqvae-pixel"),
        ("--epochs 3", "2", "3"),
        ("--no-restart", "true", "false"),
        ("--data-dir x", "keras_png_slices_data", "x"),
    ],
)
def test_flags_that_contradict_the_trained_vqvae(
    flags, trained, found, tiny_run, capsys
):
    before = files(tiny_run.path)
    argv = ["--stage", "prior", "--run-dir", tiny_run.path, *flags.split()]
    error = refused(argv, 2, capsys)
    name = flags.split()[0].replace("--no-", "--")
    assert error.startswith(f"error: {name}: the VQ-VAE in {tiny_run.path} ")
    assert f"{trained}, found {found}" in error
    assert files(tiny_run.path) == before


def test_stage_prior_needs_a_whole_vqvae_and_its_data(
    vqvae_run, tmp_path, capsys
):
    run = copy_run(vqvae_run, tmp_path)
    argv = ["--stage", "prior", "--run-dir", run.path]
    text = run.split_path.read_text()
    run.split_path.write_text(text.replace("_slice_0.nii", "_slice_99.nii"))
    error = refused(argv, 3, capsys)
    assert "case_001_slice_99.nii.png: no longer there" in error
    assert "6 of 24 files" in error
    run.vqvae_path.write_bytes(run.vqvae_path.read_bytes()[:1000])
    before = files(run.path)
    assert str(run.vqvae_path) in refused(argv, 4, capsys)
    run.vqvae_path.unlink()
    assert "vqvae.keras: no such model" in refused(argv, 4, capsys)
    before.pop("vqvae.keras")
    assert files(run.path) == before


def test_help_and_recipes_answer_without_tensorflow():
    code = """
import sys, train, predict
for main, argv in (
    (train.main, ["--help"]),
    (train.main, ["--list-recipes"]),
    (predict.main, ["--help"]),
    (predict.main, ["evaluate", "--help"]),
):
    try:
        main(argv)
    except SystemExit as end:
        assert not end.code
    else:
        raise AssertionError(argv)
heavy = {"tensorflow", "keras", "pandas", "matplotlib", "scipy", "modules"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for part in ("--recipe NAME", "oasis-vqvae-pixelcnn", "evaluation-NAME"):
        assert part in done.stdout
