"""Tests of simulated lesions and of `predict.py anomaly`."""

import json
import types

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

import dataset
import modules
import predict
import utils
from tests.conftest import SLICES, copy_run
from tests.test_modules import tiny_prior
from tests.test_predict import call, refused

# Lesions


def head(size=128, level=0.5):
    """A grey disc on black."""
    y, x = np.indices((size, size)) - size / 2
    return np.where(np.hypot(y, x) < 0.4 * size, level, 0).astype("float32")


def test_lesions_are_what_they_are_said_to_be():
    """Prevents: lesions of another size, contrast or place than documented."""
    image = head()
    signs = set()
    for seed in range(40):
        changed, mask = dataset.add_lesion(image, [3, seed])
        change = changed - image
        assert not np.any(mask & (image == 0)) and not np.any(
            (change != 0) & (image == 0)
        )
        # A disc of radius 4 to 9 % of 128 pixels.
        radius = np.sqrt(mask.sum() / np.pi)
        assert 0.04 * 128 - 0.5 < radius < 0.09 * 128 + 0.5
        contrast = np.abs(change).max()
        assert 0.25 <= contrast <= 0.5
        assert np.all(np.abs(change[mask]) >= contrast / 2 - 1e-6)
        assert np.all(np.abs(change[~mask]) < contrast / 2)
        signs.add(np.sign(change.sum()))
    assert signs == {-1, 1}


def test_lesions_follow_from_the_seed():
    one, mask = dataset.add_lesion(head(), [1, 2])
    np.testing.assert_array_equal(dataset.add_lesion(head(), [1, 2])[0], one)
    assert np.any(dataset.add_lesion(head(), [1, 3])[1] != mask)


@pytest.mark.parametrize("level", [0.1, 0.95])
def test_lesions_have_room_for_their_contrast(level):
    changed, mask = dataset.add_lesion(head(level=level), 0)
    assert np.abs(changed[mask] - level).max() >= 0.25
    assert 0 <= changed.min() and changed.max() <= 1


def test_no_lesion_in_a_blank_image():
    changed, mask = dataset.add_lesion(np.zeros((64, 64)), 0)
    assert not changed.any() and not mask.any()


# Scores


def test_ranking_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth = np.tile([False, True], 60)
    score = truth + rng.normal(size=120)
    subjects = np.repeat(np.arange(12), 10).astype(str)
    for metric in (roc_auc_score, average_precision_score):
        found = utils.bootstrap_ranking(metric, truth, score, subjects)
        assert found["value"] == pytest.approx(metric(truth, score))
        low, high = found["ci95"]
        assert low < found["value"] < high and high - low < 0.4
    perfect = utils.bootstrap_ranking(roc_auc_score, truth, truth, subjects)
    assert perfect == {"value": 1, "ci95": [1, 1]}


def test_interval_resamples_subjects():
    """Prevents: alike slices counted as so many people."""
    truth = np.tile([False, True], 100)
    score = truth + np.random.default_rng(1).normal(0, 1, 8).repeat(25)
    wide, narrow = (
        np.ptp(utils.bootstrap_ranking(roc_auc_score, truth, score, s)["ci95"])
        for s in (np.arange(200) // 50, np.arange(200) // 2)
    )
    assert wide > 1.5 * narrow


def lesion_maps(n=4):
    rng = np.random.default_rng(0)
    masks = np.zeros((2 * n, 16, 16), bool)
    masks[n:, 4:8, 4:8] = True
    return 0.5 * masks + rng.random(masks.shape), masks


def test_lesion_scores_are_of_all_pixels():
    residual, masks = lesion_maps()
    near = [np.zeros((8, 4, 4)), masks[:, ::4, ::4] + 0.0]
    found = utils.score_lesions(residual, near, masks, list("abcdabcd"))
    exact = average_precision_score(masks.ravel(), residual.ravel())
    # 1e-2: the residual in 1024 steps.
    by_pixel = found["pixel_average_precision"]
    assert by_pixel["value"] == pytest.approx(exact, abs=1e-2)
    assert by_pixel["chance"] == masks.mean() < by_pixel["ci95"][0]
    assert (found["subjects"], found["lesions"]["mean_pixels"]) == (4, 16)
    assert found["images"] == {"as_they_are": 4, "with_lesion": 4}
    largest = residual.max(axis=(1, 2))
    auroc = roc_auc_score([0] * 4 + [1] * 4, largest)
    assert found["image_auroc"]["value"] == auroc
    values = [part["value"] for part in found["image_auroc_of_surprisal"]]
    assert values == [0.5, 1]


def test_percentiles_are_of_the_validation_images():
    def result(*scores):
        residual = np.zeros((len(scores), 2, 2))
        residual[:, 1, 0] = scores
        bits = [np.ones((len(scores), 3, 3))]
        return {"residual": residual, "bits": bits, "near": bits}

    frame = pd.DataFrame({"path": list("abc")})
    healthy = result(0.4, 0.1, 0.3, 0.2)
    table = predict.anomaly_table(frame, result(0.05, 0.25, 0.5), healthy)
    assert list(table["percentile"]) == [0, 50, 100]
    assert list(table["score"]) == [0.05, 0.25, 0.5]
    assert list(table["bits_1"]) == [9, 9, 9]


# Finding


class Squares:
    """A VQ-VAE whose index is the grey level of a square of 4x4 pixels."""

    levels, num_embeddings, latent_grids = 1, 8, [(16, 16)]

    def encode(self, images):
        return [np.int32(np.round(np.asarray(images)[:, ::4, ::4, 0] * 7))]

    def decode_indices(self, indices):
        wide = np.repeat(np.repeat(indices[0], 4, axis=1), 4, axis=2)
        return wide[..., None].astype("float32") / 7


@pytest.fixture(scope="module")
def dark_prior():
    """A prior that expects index 0, whatever came before: 0.1 bits."""
    prior = tiny_prior(num_embeddings=8, latent_grid=(16, 16), blocks=0)
    prior.logits.kernel.assign(np.zeros(prior.logits.kernel.shape))
    prior.logits.bias.assign([5.0] + [0.0] * 7)
    return prior


def test_what_is_unlikely_is_found_and_restored(dark_prior):
    """Prevents: surprisal, restoration or residual of another place."""
    images = np.zeros((3, 64, 64), "float32")
    images[1, 16:32, 40:56] = 1
    frame = pd.DataFrame({"label": [""] * 3, "position": [np.nan] * 3})
    options = predict.Anomaly(run="RUN", restorations=3)
    find = predict.find_anomalies
    healthy = find(Squares(), [dark_prior], images[::2], frame[::2], options)
    found = find(Squares(), [dark_prior], images, frame, options, healthy)
    bits = found["bits"][0]
    # -log2 p of softmax([5, 0, ...]).
    usual, odd = -np.log2(np.exp([5, 0]) / (np.exp(5) + 7))
    assert bits[1, 4:8, 10:14] == pytest.approx(odd, rel=1e-4)
    bits[1, 4:8, 10:14] = usual
    assert bits == pytest.approx(usual, rel=1e-3)
    assert found["limits"] == healthy["limits"]
    assert found["near"][0][1].argmax() in (5 * 16 + 11, 5 * 16 + 12)
    residual = found["residual"]
    assert residual.shape == images.shape and residual[1, 24, 48] > 0.8
    assert residual[1, :, :24].max() == 0 and residual[[0, 2]].max() < 0.3
    assert found["restored"][1, 16:32, 40:56].mean() < 0.3


def test_residual_is_smoothed():
    """A thin edge vanishes, a blob stays."""
    line, blob = np.zeros((2, 1, 32, 32))
    line[:, 16], blob[:, 8:24, 8:24] = 1, 1
    assert not utils.smooth_residual(line).any()
    assert utils.smooth_residual(blob)[0, 16, 16] == pytest.approx(1)


def test_bits_are_those_of_the_prior():
    prior = tiny_prior(num_embeddings=8)
    prior.logits.kernel.assign(np.zeros(prior.logits.kernel.shape))
    grids = np.random.default_rng(0).integers(0, 8, (5, 3, 5))
    bits = predict.code_bits(prior, {"indices": grids}, codes=30)
    assert bits.shape == grids.shape
    np.testing.assert_allclose(bits, 3, rtol=1e-5)
    assert predict.mean_bits(prior, {"indices": grids}) == pytest.approx(3)


# The verb


@pytest.fixture
def run(tiny_run, tmp_path):
    return copy_run(tiny_run, tmp_path)


def table_of(run):
    return pd.read_csv(run.path / "anomaly.csv")


def test_anomaly_of_a_split(run, capsys):
    call("anomaly", run.path, "--count", "3", "--restorations", "2")
    table = table_of(run)
    test = utils.read_splits(run)["test"]["path"]
    assert list(table["path"]) == [test[k] for k in utils.spread(SLICES, 3)]
    expected = "path bits_1 surprisal_1 score percentile".split()
    assert list(table) == expected
    assert (
        np.all(table["bits_1"] > 0)
        and table["percentile"].between(0, 100).all()
    )
    assert (run.figures_path / "anomaly.png").exists()
    assert not (run.path / "anomaly.json").exists()
    assert capsys.readouterr().out.count("percentile") == 3
    call("anomaly", run.path, "--count", "3", "--restorations", "2")
    pd.testing.assert_frame_equal(table_of(run), table)


def test_lesions_are_measured(run, capsys):
    call("anomaly", run.path, "--lesions", "50", "--restorations", "1")
    table = table_of(run)
    ill = table["simulated_lesion"]
    assert list(ill) == [False] * SLICES + [True] * SLICES
    assert np.all(table["path"][~ill].to_numpy() == table["path"][ill])
    scores = json.loads((run.path / "anomaly.json").read_text())
    assert scores["images"] == {"as_they_are": SLICES, "with_lesion": SLICES}
    assert scores["lesions"]["simulated"] is True
    auroc = roc_auc_score(ill, table["score"])
    assert scores["image_auroc"]["value"] == pytest.approx(auroc)
    assert scores["subjects"] == 1 and scores["validation_images"] == SLICES
    assert "of simulated lesions" in capsys.readouterr().out


def test_labels_are_not_told(levels_run, adni_dir, tmp_path, monkeypatch):
    """Two levels; slice positions are told only if all are known."""
    run = copy_run(levels_run, tmp_path)
    seen, generate = [], modules.generate

    def spy(*args, **options):
        seen.append(types.SimpleNamespace(**options))
        return generate(*args, **options)

    monkeypatch.setattr(modules, "generate", spy)
    call("anomaly", run.path, "--count", "2", "--restorations", "1")
    assert all(set(one.label) == {None} for one in seen)
    assert not any(np.isnan(one.slice_position).any() for one in seen)
    assert {"surprisal_1", "surprisal_2"} <= set(table_of(run))

    seen.clear()
    strange = tmp_path / "strange.jpeg"
    image = next((adni_dir / "train").rglob("*.jpeg"))
    from PIL import Image

    with Image.open(image) as opened:
        opened.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(strange)
    call("anomaly", run.path, strange, image, "--restorations", "1")
    assert len(seen) == 2
    assert all(np.isnan(one.slice_position).all() for one in seen)


def test_anomaly_refuses(run, vqvae_run, oasis_dir, capsys):
    image = next(oasis_dir.rglob("case*.png"))
    before = set(run.path.rglob("*"))
    found = refused(2, capsys, "anomaly", run.path, image, "--lesions", "3")
    assert "--lesions: does not go with" in found
    assert "no prior" in refused(4, capsys, "anomaly", vqvae_run.path)
    assert "gone" in refused(3, capsys, "anomaly", run.path, "gone.png")
    assert set(run.path.rglob("*")) == before
