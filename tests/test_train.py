"""Tests of train.py: what a run leaves behind, and what it refuses."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from PIL import Image

import dataset
import predict
import train
import utils
from tests.conftest import (
    SIZE,
    SLICES,
    TINY,
    blobs,
    copy_run,
    train_tiny,
)

ROOT = Path(train.__file__).parent
IMAGES = {"train": 4 * SLICES, "validate": SLICES, "test": SLICES}
FIGURES = {"reconstructions", "failures", "indices", "codebook", "history"}
# Where there is a prior.
SAMPLES = {"samples", "failures_samples", "memorization"}
FILES = {
    "config.json",
    "split.csv",
    "vqvae.keras",
    "indices.npz",
    "history.csv",
    "evaluation.json",
    "MODEL_CARD.md",
    "report.html",
    "figures",
    "logs",
}


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
    assert names == FILES | {"prior.keras"}
    check_figures(tiny_run.figures_path, FIGURES | SAMPLES)


def test_config_tells_how_to_repeat_the_run(tiny_run, oasis_dir):
    document = json.loads(tiny_run.config_path.read_text())
    assert document["format"] == utils.FORMAT
    assert document["image_size"] == [SIZE, SIZE]
    assert document["latent_grids"] == [[SIZE // 4, SIZE // 4]]
    assert document["simulated"] is False
    assert document["labels"] == {}
    assert document["slice_range"] == [0, SLICES - 1]
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
        "generation",
        "memorization",
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
    prior = utils.load_model(tiny_run.path / "prior.keras")
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
    log_prob = prior.log_prob(grids, slice_position=positions).numpy().mean()
    assert -log_prob / np.log(2) == pytest.approx(bits, rel=1e-5)


def check_best_is_kept(run):
    """Check that each prior saved is that of its best epoch."""
    history = pd.read_csv(run.history_path)
    entries = evaluation_of(run)["prior"]
    for stage, entry in zip(run.prior_names, entries, strict=True):
        epochs = history.loc[history["stage"] == stage, "val_bits_per_code"]
        bits = entry["bits_per_code"]["validate"]
        assert bits == pytest.approx(epochs.min(), rel=1e-5)


def test_the_best_prior_is_kept(tiny_run):
    check_best_is_kept(tiny_run)


# Two and three levels


def test_two_levels_have_a_prior_each(levels_run):
    names = {path.name for path in levels_run.path.iterdir()}
    assert names == FILES | {"prior_bottom.keras", "prior_top.keras"}
    assert levels_run.prior_names == ["prior_bottom", "prior_top"]
    assert levels_run.has_priors
    check_figures(levels_run.figures_path, FIGURES | SAMPLES)
    assert levels_run.info["latent_grids"] == [[8, 8], [4, 4]]
    shapes = {k: v.shape for k, v in indices_of(levels_run).items()}
    assert shapes == {
        "train_1": (12, 8, 8),
        "train_2": (12, 4, 4),
        "validate_1": (4, 8, 8),
        "validate_2": (4, 4, 4),
        "test_1": (8, 8, 8),
        "test_2": (8, 4, 4),
    }
    history = pd.read_csv(levels_run.history_path)
    stages = ["vqvae", "prior_bottom", "prior_top"]
    assert list(history["stage"]) == [s for s in stages for _ in range(2)]
    # The VQ-VAE has 12 images in batches of 4, the priors twice as many, with
    # a jittered copy of each, in batches of 8.
    assert list(history["step"]) == [3, 6] * 3
    assert list(history["images"]) == [12, 24] + [24, 48] * 2
    assert {"codebook_usage", "codebook_usage_2"} <= set(history.columns)


def test_evaluation_of_two_levels_has_an_entry_each(levels_run):
    evaluation = evaluation_of(levels_run)
    grids = [entry["grid"] for entry in evaluation["codebook"]]
    assert grids == [[8, 8], [4, 4]]
    bottom, top = evaluation["prior"]
    assert (bottom["level"], top["level"]) == (1, 2)
    for entry in (bottom, top):
        assert set(entry["bits_per_code"]) == {"train", "validate", "test"}
        assert 0 < entry["bits_per_code"]["test"] < 8
        assert entry["uniform_bits"] == 4.0
    bits = [entry["bits_per_code"]["test"] for entry in (bottom, top)]
    assert bottom["bits_per_image"] == pytest.approx(
        64 * bits[0] + 16 * bits[1]
    )
    assert "bits_per_image" not in top
    for name in ("vqvae", "prior_bottom", "prior_top"):
        assert evaluation["speed"][f"{name}_minutes"] > 0
    # These images are not of brains, so nothing of theirs is measured.
    assert evaluation["labels"] == [
        {"label": "AD", "test_images": 4},
        {"label": "NC", "test_images": 4},
    ]


def test_priors_of_two_levels_know_labels_and_levels_above(levels_run):
    assert levels_run.info["labels"] == {"AD": 0, "NC": 1}
    assert levels_run.info["slice_range"] == [78, 77 + SLICES]
    vqvae = utils.load_model(levels_run.vqvae_path)
    bottom, top = utils.load_priors(levels_run, vqvae)
    for level, prior in enumerate((bottom, top), start=1):
        assert type(prior).__name__ == "PixelSNAIL"
        assert prior.labels == ("AD", "NC") and prior.slice_condition
        assert prior.latent_grid == (SIZE // 2 ** (level + 1),) * 2
        assert prior.codebook_sha256 == utils.codebook_sha256(vqvae, level)
    assert bottom.codebook_sha256 != top.codebook_sha256
    assert (bottom.upper_grids, top.upper_grids) == (((4, 4),), ())
    # Attention only at the top, unless asked for.
    assert (bottom.attention, top.attention) == (False, True)
    assert (len(bottom.attentions), len(top.attentions)) == (0, 1)
    assert not any("attention" in w.path for w in bottom.weights)


def test_priors_are_bound_to_their_codebook_and_those_above(levels_run):
    for changed, accused in ((1, "prior_bottom"), (2, "prior_bottom")):
        vqvae = utils.load_model(levels_run.vqvae_path)
        before = [utils.codebook_sha256(vqvae, level) for level in (1, 2)]
        codebook = vqvae.part("quantizer", changed).codebook
        codebook.assign(codebook + 1)
        after = [utils.codebook_sha256(vqvae, level) for level in (1, 2)]
        differ = [a != b for a, b in zip(before, after, strict=True)]
        assert differ == [True, changed == 2]
        with pytest.raises(utils.RunError, match=f"{accused}.*another codeb"):
            utils.load_priors(levels_run, vqvae)


def test_the_best_averaged_priors_of_two_levels_are_kept(levels_run):
    check_best_is_kept(levels_run)


@pytest.mark.parametrize(
    "attention, expected",
    [
        ("top", (False, False, True)),
        ("all", (True, True, True)),
        ("none", (False, False, False)),
    ],
)
def test_levels_with_attention(attention, expected):
    import modules

    run = utils.Run("run", utils.Config(prior="pixelsnail"), {})
    run.config = dataclasses.replace(
        run.config, levels=3, prior_attention=attention, prior_channels=8
    )
    vqvae = modules.VQVAE((32, 32), levels=3, channels=4, num_embeddings=4)
    priors = [train.new_prior(run, vqvae, level) for level in (1, 2, 3)]
    assert tuple(prior.attention for prior in priors) == expected
    grids = [prior.upper_grids for prior in priors]
    assert grids == [((4, 4), (2, 2)), ((2, 2),), ()]


@pytest.mark.slow
def test_three_levels(adni_dir, tmp_path):
    flags = "--levels 3 --epochs 1 --prior-epochs 1 --prior-channels 4"
    flags = ["--dataset", "adni", *flags.split()]
    run = train_tiny(tmp_path / "run", *flags, data=adni_dir)
    names = ["prior_bottom", "prior_middle", "prior_top"]
    assert run.prior_names == names and run.has_priors
    assert {path.name for path in run.path.iterdir()} == FILES | {
        f"{name}.keras" for name in names
    }
    assert run.info["latent_grids"] == [[8, 8], [4, 4], [2, 2]]
    history = pd.read_csv(run.history_path)
    assert list(history["stage"]) == ["vqvae", *names]
    entries = evaluation_of(run)["prior"]
    assert [entry["level"] for entry in entries] == [1, 2, 3]
    bits = [entry["bits_per_code"]["test"] for entry in entries]
    assert entries[0]["bits_per_image"] == pytest.approx(
        np.dot(bits, [64, 16, 4])
    )
    check_figures(run.figures_path, FIGURES | SAMPLES)


# What a prior is trained on and how


def test_averaged_weights_are_validated_and_kept(tiny_run, tmp_path):
    run = copy_run(tiny_run, tmp_path)
    train_tiny(run.path, "--stage", "prior", "--prior-ema-momentum", "0.9")
    check_best_is_kept(run)
    one, other = (weights_of(r.path / "prior.keras") for r in (tiny_run, run))
    pairs = list(zip(one, other, strict=True))
    assert max(np.abs(a - b).max() for a, b in pairs) > 1e-4
    plain, averaged = (
        pd.read_csv(r.history_path).query("stage == 'prior'")
        for r in (tiny_run, run)
    )
    # The average follows the weights, which train as they do without it.
    name = "bits_per_code"
    np.testing.assert_allclose(averaged[name], plain[name], rtol=1e-4)
    name = "val_bits_per_code"
    assert (np.abs(averaged[name] / plain[name] - 1) > 1e-3).any()


def test_jittered_copies_double_the_training_grids_only(
    tiny_run, tmp_path, monkeypatch
):
    run = copy_run(tiny_run, tmp_path)
    options = {"stage": "prior", "prior_augment": 1}
    config = dataclasses.replace(run.config, **options)
    seen = []
    monkeypatch.setattr(train, "train_prior", lambda *args: seen.append(args))
    monkeypatch.setattr(utils, "save_model", lambda *args: None)
    vqvae = utils.load_model(run.vqvae_path)
    stored = indices_of(run)
    indices = {name: [stored[f"{name}_1"]] for name in dataset.SPLITS}
    splits = utils.read_splits(run)
    for _ in range(2):
        run.begin(config)
        train.train_priors(
            run,
            vqvae,
            indices,
            splits,
            tf.distribute.get_strategy(),
            utils.StopSignals(),
        )
    (_, name, _, data, *_), (_, _, _, again, *_) = seen
    assert name == "prior" and set(data) == set(dataset.SPLITS)
    tf.nest.map_structure(np.testing.assert_array_equal, data, again)
    for name in ("validate", "test"):
        np.testing.assert_array_equal(data[name]["indices"], *indices[name])
    own, copies = np.split(data["train"]["indices"], 2)
    np.testing.assert_array_equal(own, *indices["train"])
    assert copies.shape == own.shape
    assert all(np.any(a != b) for a, b in zip(own, copies, strict=True))
    own, copies = np.split(data["train"]["slice_position"], 2)
    np.testing.assert_array_equal(own, copies)
    assert len(np.unique(own)) == SLICES


# A collapsed codebook


def warned_and_refused(argv, capsys):
    """Run the script; return its error after one warning, exit code 4."""
    with pytest.raises(SystemExit) as caught:
        utils.run_main(train.main, [str(part) for part in argv])
    assert caught.value.code == 4
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: level 1 has collapsed: ")
    assert error.startswith("error: ") and "--force" in error
    assert warning.removeprefix("warning: ") in error
    return error


def test_no_prior_over_a_codebook_in_little_use(
    oasis_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(utils, "LEAST_USAGE", 1.1)
    argv = ["--dataset", "oasis", "--data-dir", oasis_dir, *TINY]
    path = tmp_path / "run"
    flags = ["--epochs", "1", "--run-dir", path]
    error = warned_and_refused([*argv, *flags], capsys)
    assert f"{path / 'vqvae.keras'}: level 1" in error
    names = {path.name for path in path.iterdir()}
    of_evaluation = {"evaluation.json", "MODEL_CARD.md", "report.html"}
    assert names == FILES - {"figures", *of_evaluation}
    assert not utils.Run.open(path).has_priors


def test_no_prior_over_equal_codes_unless_forced(vqvae_run, tmp_path, capsys):
    run = copy_run(vqvae_run, tmp_path)
    vqvae = utils.load_model(run.vqvae_path)
    codebook = vqvae.part("quantizer", 1).codebook
    codebook.assign(np.zeros(codebook.shape))
    utils.save_model(vqvae, run.vqvae_path)
    before = run.vqvae_path.read_bytes()
    argv = ["--stage", "prior", "--prior-epochs", "1"]
    error = warned_and_refused([*argv, "--run-dir", run.path], capsys)
    assert "1 of 16 code vectors in use" in error
    assert not run.has_priors
    train_tiny(run.path, *argv, "--force")
    assert run.has_priors and run.vqvae_path.read_bytes() == before
    assert "level 1 has collapsed" in capsys.readouterr().err
    # It is not remembered: the next prior is to be insisted on again.
    assert not utils.resolve([*argv, "--run-dir", str(run.path)]).force
    bits = evaluation_of(run)["prior"][0]["bits_per_code"]
    assert all(np.isfinite(value) for value in bits.values())


@pytest.mark.parametrize(
    "used, collapsed", [(1, True), (19, True), (20, False), (1000, False)]
)
def test_how_many_codes_are_too_few(used, collapsed, capsys):
    vqvae = types.SimpleNamespace(num_embeddings=1000)
    some = np.arange(2000).reshape(20, 10, 10)
    text = train.collapsed_levels(vqvae, [some % 1000, some % used])
    assert text == collapsed * (
        f"level 2 has collapsed: {used} of 1000 code vectors in use"
    )
    assert capsys.readouterr().err == collapsed * f"warning: {text}\n"


# Stages


def test_stage_vqvae_has_no_prior_but_figures(vqvae_run):
    assert not vqvae_run.has_priors
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
    for name in ("vqvae.keras", "prior.keras"):
        one, other = (weights_of(r.path / name) for r in (tiny_run, staged))
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
    prior = utils.load_model(run.path / "prior.keras")
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


def numbers_of(document):
    """Return every number in a JSON document."""
    if isinstance(document, dict):
        document = list(document.values())
    if isinstance(document, list):
        return [n for part in document for n in numbers_of(part)]
    return [document] if isinstance(document, (int, float)) else []


@pytest.mark.slow
@pytest.mark.parametrize("recipe", utils.RECIPES)
def test_smoke_connects_everything_on_simulated_data(recipe, smoke_run):
    run = smoke_run(recipe)
    folder = run.path.parents[1]
    assert {path.name for path in folder.iterdir()} == {"data", "runs"}
    assert run.path.name.startswith(f"{recipe}-")
    assert {path.name for path in run.path.iterdir()} == FILES | {
        path.name for path in run.prior_paths
    }
    assert run.config.smoke and run.info["simulated"]
    settings = utils.RECIPES[recipe].settings
    evaluation = evaluation_of(run)
    data = evaluation["data"]
    assert data["simulated"]
    assert data["dataset"] == settings.get("dataset", "phantom")
    size = settings.get("image_size", (128, 112))
    assert data["image_size"] == list(size)
    numbers = numbers_of(evaluation)
    assert len(numbers) > 40 and np.isfinite(numbers).all()
    entries = evaluation["prior"]
    assert len(entries) == settings.get("levels", 1)
    check_figures(run.figures_path, FIGURES | SAMPLES)
    stages = list(pd.read_csv(run.history_path)["stage"])
    assert stages == ["vqvae", *run.prior_names]
    # A few images of each split, spread over its subjects and their slices.
    split = pd.read_csv(run.split_path)
    counts = split["split"].value_counts().to_dict()
    assert counts == {name: data[name]["images"] for name in dataset.SPLITS}
    assert set(counts.values()) <= set(range(4, utils.SMOKE_IMAGES + 1))
    rows = split[split["split"] == "train"]
    assert rows["subject"].nunique() == 2
    assert np.ptp(rows["position"]) > 0.5


@pytest.mark.slow
def test_another_prior_over_a_smoke_run_needs_no_data(smoke_run, tmp_path):
    run = copy_run(smoke_run("oasis-vqvae-pixelcnn"), tmp_path)
    argv = ["--stage", "prior", "--run-dir", str(run.path)]
    again, splits = train.start(
        utils.resolve(argv), tf.distribute.get_strategy()
    )
    again.unlock()
    assert not again.config.smoke and again.config.data_dir is None
    for name, frame in utils.read_splits(run).items():
        pd.testing.assert_frame_equal(splits[name], frame)


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
    assert "vqvae: not finite in step 1 of epoch 1: parameter_norm" in error
    assert "--learning-rate" in error
    assert not list(tmp_path.rglob("*.keras"))


def test_exploding_prior_leaves_the_earlier_one(
    tiny_run, tmp_path, monkeypatch, capsys
):
    run = copy_run(tiny_run, tmp_path)
    before = files(run.path)
    explode(monkeypatch)
    argv = ["--stage", "prior", "--run-dir", run.path]
    assert "--prior-learning-rate" in refused(argv, 5, capsys)
    after = files(run.path)
    for name in ("vqvae.keras", "prior.keras"):
        assert after[name] == before[name]
    assert utils.Run.open(run.path).config == run.config


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
        (
            "--prior pixelsnail --prior-channels 12",
            "--prior-channels: expected a multiple of 8 for pixelsnail, "
            "found 12",
        ),
        ("--levels 4", "--levels: expected a whole number in [1, 3], found 4"),
        ("--condition label,age", "--condition: expected none or a comma"),
        ("--condition-dropout 1", "--condition-dropout: expected a number"),
        ("--prior-ema-momentum 1", "--prior-ema-momentum: expected a number"),
        ("--codebook-distance l1", "--codebook-distance: expected one of"),
        ("--phantom-subjects 2", "--phantom-subjects: expected"),
    ],
)
def test_bad_flags(flags, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_refused(flags.split(), 2, [part], tmp_path, capsys)
    assert not list(tmp_path.iterdir())


def test_labels_asked_for_that_no_image_has(
    oasis_dir, vqvae_run, tmp_path, capsys
):
    argv = ["--dataset", "oasis", "--data-dir", oasis_dir, *TINY]
    parts = [oasis_dir, "no image has a class label", "--condition"]
    flags = ["--condition", "label,slice"]
    check_refused([*argv, *flags], 3, parts, tmp_path, capsys)
    before = files(vqvae_run.path)
    argv = ["--stage", "prior", "--run-dir", vqvae_run.path]
    error = refused([*argv, *flags], 3, capsys)
    assert f"{vqvae_run.split_path}: no image has a class label" in error
    assert files(vqvae_run.path) == before


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
    run, splits = train.start(config, tf.distribute.get_strategy())
    run.unlock()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "32x36" in line] == [
        "plane sizes: 32x32 (20), 32x36 (4); padded or cropped to 32x32"
    ]
    assert run.info["image_size"] == (SIZE, SIZE)
    batches = predict.image_batches(run, splits["train"], 16)
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
