"""Samples against real images: the measures, the audit, how they are shown."""

import json
import types

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import dataset
import modules
import predict
import utils
from tests.conftest import SLICES, copy_run


def gaussian(rng, n, mean, root):
    """Draw (n, F) of exactly this mean and covariance root @ root.T."""
    rows = rng.normal(size=(n, len(mean)))
    rows -= rows.mean(0)
    rows = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows.T))).T
    return rows @ np.transpose(root) + mean


# Features


def test_hog_is_that_of_scikit_image_without_background():
    from skimage.feature import hog

    image = np.random.default_rng(0).uniform(0.1, 1, (96, 48)).astype("f4")
    image[:20] = 0.049  # invisible
    clean = np.where(image > 0.05, image - 0.05, 0) / 100  # contrast 0.001
    found = utils.hog_features(image[None])
    expected = hog(clean, 9, (4, 4), cells_per_block=(2, 2), block_norm="L2")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
    noisy = image.copy()
    noisy[:20] += np.random.default_rng(1).uniform(-0.04, 0, (20, 48))
    np.testing.assert_array_equal(utils.hog_features(noisy[None]), found)


def test_the_rim_of_a_head_does_not_count_like_anatomy():
    image = np.zeros((120, 120), "float32")
    image[:40, :40] = np.random.default_rng(0).uniform(0.2, 0.8, (40, 40))
    image[105, 105] = 0.06  # one grey pixel, as JPEG leaves them
    blocks = utils.hog_features(image[None]).reshape(11, 11, -1)
    length = np.sqrt((blocks**2).sum(-1))
    assert length[1, 1] > 0.99
    assert 0 < length[9, 9] < 0.5


@pytest.mark.parametrize(
    ("size", "cell"), [((16, 16), 4), ((128, 112), 9), ((256, 256), 21)]
)
def test_cells_follow_the_image_size(size, cell):
    assert f"{cell}x{cell}-pixel" in utils.describe_features("hog", size)
    features = utils.hog_features(np.zeros((2, *size), "float32"))
    assert features.shape[0] == 2 and not features.any()


def test_principal_components_are_few_and_of_unit_variance():
    rng = np.random.default_rng(0)
    fit = rng.normal(size=(300, 40)) * np.arange(40, 0, -1)
    rows = utils.principal_components(fit, 80)(fit)
    assert rows.shape == (300, 10)
    np.testing.assert_allclose(rows.mean(0), 0, atol=1e-9)
    assert rows.var(0, ddof=1).mean() == pytest.approx(1)
    for n, count in ((16, 2), (100_000, 40)):
        assert utils.principal_components(fit, n)(fit).shape == (300, count)


def test_weights_that_cannot_be_had_are_one_line(
    tiny_run, tmp_path, monkeypatch, capsys
):
    import keras

    def refuse(*args, **kwargs):
        raise Exception("URL fetch failure on https://x: None -- refused")

    monkeypatch.setattr(keras.applications, "InceptionV3", refuse)
    run = copy_run(tiny_run, tmp_path)
    before = run.evaluation_path.read_bytes()
    with pytest.raises(SystemExit) as end:
        utils.run_main(
            predict.main, ["evaluate", str(run.path), "--features", "inception"]
        )
    error = capsys.readouterr().err
    assert end.value.code == 6
    assert error.count("\n") == 1 and error.startswith("error: --features")
    assert "refused" in error and "--features hog" in error
    assert run.evaluation_path.read_bytes() == before


def test_inception_sees_three_channels_in_its_range(monkeypatch):
    class Model:
        input_shape = (None, 6, 6, 3)

        def __call__(self, batch, training):
            assert not training
            return utils.tf.reduce_mean(batch, axis=[1, 2])

    monkeypatch.setattr(utils, "inception_network", Model)
    images = np.stack([np.zeros((4, 4)), np.ones((4, 4))]).astype("float32")
    found = utils.inception_features(images)
    np.testing.assert_allclose(found, [[-1] * 3, [1] * 3], atol=1e-6)


# Distances of sets


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    x = gaussian(rng, 50, [0, 0, 0], np.diag([1.0, 2, 3]))
    y = gaussian(rng, 70, [3, 0, 4], np.diag([2.0, 2, 1]))
    # 5^2 and, as the covariances commute, the squared standard deviations
    assert utils.frechet_distance(x, y) == pytest.approx(25 + 1 + 0 + 4)
    assert utils.frechet_distance(y, x) == pytest.approx(30)
    assert utils.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_is_that_of_the_matrix_square_root():
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 4, 4))
    x, y = gaussian(rng, 60, np.zeros(4), a), gaussian(rng, 60, np.ones(4), b)
    a, b = a @ a.T, b @ b.T
    expected = 4 + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert utils.frechet_distance(x, y) == pytest.approx(expected)


def test_frechet_distance_of_fewer_images_than_dimensions():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 5, 20))
    assert 0 < utils.frechet_distance(x, y) < np.inf
    one = utils.frechet_distance(x[:, :1], y[:, :1])
    gap = x[:, 0].mean() - y[:, 0].mean()
    spread = x[:, 0].std(ddof=1) - y[:, 0].std(ddof=1)
    assert one == pytest.approx(gap**2 + spread**2)


def test_kernel_distance_is_unbiased_over_subjects():
    """Slices of a subject are alike; a biased estimate would be above 0."""
    values = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        people = np.repeat(np.arange(8), 4)
        x, y = (rng.normal(size=(8, 3))[people] for _ in range(2))
        found = utils.kernel_distance(x, y, people, people, n=10)
        values.append(found["mean"])
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * error
    assert min(values) < 0


def test_kernel_distance_by_hand_and_its_interval():
    x, y = np.array([[0.0], [1.0], [5.0]]), np.array([[2.0], [3.0]])
    found = utils.kernel_distance(x, y, ["a", "b", "b"], ["c", "d"])
    within_x = ((0 * 1 + 1) ** 3 + (0 * 5 + 1) ** 3) / 2  # not 1 with 5
    within_y = (2 * 3 + 1) ** 3
    between = np.mean([(a * b + 1) ** 3 for a in (0, 1, 5) for b in (2, 3)])
    assert found["mean"] == pytest.approx(within_x + within_y - 2 * between)
    assert np.isfinite(found["ci95"]).all()
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 2)), rng.normal(1, size=(40, 2))
    found = utils.kernel_distance(x, y, np.arange(40), np.arange(40))
    low, high = found["ci95"]
    assert 0 < low < found["mean"] < high
    assert utils.kernel_distance(x, y, np.arange(40), ["one"] * 40) is None


def test_precision_recall_density_coverage_by_hand():
    real = np.array([[0.0], [1.0], [2.0], [10.0]])
    fake = np.array([[0.5], [0.6], [5.0]])
    found = utils.manifold_scores(fake, real, range(3), range(4), k=1)
    # balls: real of 1, 1, 1 and 8; fake of 0.1, 0.1 and 4.4
    np.testing.assert_array_equal(found["precision"], [1, 1, 1])
    np.testing.assert_array_equal(found["density"], [2, 2, 1])
    np.testing.assert_array_equal(found["recall"], [0, 1, 1, 0])
    np.testing.assert_array_equal(found["coverage"], [1, 1, 0, 1])


def test_own_slices_are_no_neighbours():
    real = np.array([[0.0], [0.1], [9.0], [9.1]])
    fake = np.array([[4.0], [4.0], [4.0]])
    found = utils.manifold_scores(fake, real, range(3), [0, 0, 1, 1], k=2)
    assert found["coverage"].all() and found["precision"].all()
    found = utils.manifold_scores(fake, real, range(3), range(4), k=1)
    assert not found["coverage"].any()
    assert utils.manifold_scores(fake, real, range(3), [0] * 4, k=1) is None
    assert utils.manifold_scores(fake, real, range(3), range(4), k=3) is None


def test_jackknife_of_a_ratio():
    values = np.random.default_rng(0).uniform(1, 3, 200)
    people = np.repeat(np.arange(20), 10)
    low, high = utils.jackknife_ratio(lambda own: values[own].mean(), people)
    assert low < values.mean() < high
    error = np.std([values[people == k].mean() for k in range(20)]) / 20**0.5
    assert (high - low) / 4 == pytest.approx(error, rel=0.2)
    assert utils.jackknife_ratio(lambda own: 1.0, ["a"] * 9) is None


# Copies


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Slices of 14 simulated subjects; of the last three nothing was seen.

    Returns: dict by group of images (N, H, W) and of subjects (N,).
    """
    folder = tmp_path_factory.mktemp("people") / "data"
    index = dataset.scan(dataset.simulate(folder, "oasis", 14, 48), "oasis")
    index = dataset.verify(index)
    size = dataset.native_size(index)
    batches = dataset.make_dataset(index, size, 64)
    images = np.concatenate([batch.numpy()[..., 0] for batch in batches])
    number = index["subject"].astype(int).to_numpy()
    groups = {"train": (1, 7), "unseen": (8, 11), "fresh": (12, 14)}
    kept = {k: (a <= number) & (number <= b) for k, (a, b) in groups.items()}
    return types.SimpleNamespace(
        images={k: images[own] for k, own in kept.items()},
        subjects={k: number[own] for k, own in kept.items()},
        index={k: index[own].reset_index() for k, own in kept.items()},
    )


def copies_of(images, seed=0):
    """Return what a cheat draws: training images with 1 % noise."""
    noise = np.random.default_rng(seed).normal(0, 0.01, images.shape)
    return np.clip(images + noise, 0, 1).astype("float32")


def audit(people, generated):
    queries = np.concatenate([generated, people.images["unseen"]])
    batches = np.array_split(people.images["train"][..., None], 5)
    found = utils.nearest_images(queries, batches, utils.SPACES)
    n = len(generated)
    new, old = (
        {key: (row[part], apart[part]) for key, (row, apart) in found.items()}
        for part in (slice(n), slice(n, None))
    )
    return utils.audit(new, old, people.subjects["unseen"])


def test_nearest_images_over_batches():
    rng = np.random.default_rng(0)
    train = rng.random((23, 8, 8)).astype("float32")
    queries = np.concatenate([train[[5, 22]], rng.random((4, 8, 8))])
    queries = np.concatenate([queries, np.zeros((1, 8, 8))]).astype("float32")
    batches = np.array_split(train[..., None], 4)
    spaces = {"pixels": utils.pixels}
    row, apart = utils.nearest_images(queries, batches, spaces)["pixels"]
    every = np.linalg.norm(
        queries[:, None].reshape(7, 1, -1) - train.reshape(1, 23, -1), axis=-1
    )
    np.testing.assert_array_equal(row[:6], every.argmin(1)[:6])
    assert list(row[:2]) == [5, 22]
    length = np.linalg.norm(queries.reshape(7, -1), axis=1)[:6]
    expected = every.min(1)[:6] / length
    np.testing.assert_allclose(apart[:6], expected, atol=1e-3)
    assert np.isnan(apart[6])  # a blank image is like no other


def test_planted_cheat_raises_the_alarm(people):
    cheat = copies_of(people.images["train"][::2])
    found, copies = audit(people, cheat)
    assert found["alarm"] is True and found["copies"] == len(cheat)
    assert copies.all()
    for name in utils.SPACES:
        assert found[name]["ratio_of_medians"] < 0.5
        assert found[name]["share_closer"] == 1
    json.dumps(found, allow_nan=False)


def test_fresh_subjects_raise_no_alarm(people):
    found, copies = audit(people, people.images["fresh"])
    assert found["alarm"] is False and not copies.any()
    for name in utils.SPACES:
        part = found[name]
        assert 0.8 < part["ratio_of_medians"] < 1.25
        low, high = part["ratio_of_medians_ci95"]
        assert low < part["ratio_of_medians"] < high
        assert part["share_closer"] < 0.1


def test_a_few_copies_among_fresh_subjects_raise_the_alarm(people):
    fresh = people.images["fresh"]
    mixed = np.concatenate([copies_of(people.images["train"][10:15]), fresh])
    found, copies = audit(people, mixed)
    assert found["alarm"] is True
    assert list(np.flatnonzero(copies)) == [0, 1, 2, 3, 4]


def test_too_few_unseen_images_say_nothing_of_copies(people):
    few = types.SimpleNamespace(
        images={**people.images, "unseen": people.images["unseen"][:99]},
        subjects={"unseen": people.subjects["unseen"][:99]},
    )
    found, copies = audit(few, copies_of(people.images["train"][:3]))
    assert found["alarm"] is None and found["copies"] is None
    assert copies is None
    assert found["pixels"]["share_closer"] is None
    assert found["pixels"]["ratio_of_medians"] < 0.5


def test_blank_images_are_left_out(people):
    blank = np.zeros_like(people.images["fresh"][:4])
    found, copies = audit(people, blank)
    assert (
        found["copies"] == 0
        and found["alarm"] is False
        or (found["copies"] is None)
    )
    mixed = np.concatenate([blank, copies_of(people.images["train"][:20])])
    found, copies = audit(people, mixed)
    assert found["copies"] == 20 and not copies[:4].any()


# The whole


class Decoder:
    """A VQ-VAE that loses nothing."""

    image_size = (48, 40)

    def reconstruct(self, images):
        return images


def evaluate_generator(people, folder, images, count, **prior):
    """Return what is found of a generator that returns `images`, and how it
    was called.
    """
    asked = {}

    def generate(vqvae, priors, n, seed, **options):
        asked.update(options, n=n, seed=seed)
        return images[:n], [], np.zeros(n)

    def read(run, frame):
        group = "train" if frame["subject"].iloc[0] < "008" else "unseen"
        images = people.images[group][frame.index, ..., None]
        return np.array_split(images, 3)

    run = utils.Run(folder, utils.Config(), {})
    run.figures_path.mkdir(exist_ok=True)
    options = {"labels": ("AD", "NC"), "slice_condition": True, **prior}
    splits = {"train": people.index["train"], "test": people.index["unseen"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules, "generate", generate)
        patch.setattr(predict, "image_batches", read)
        found = predict.evaluate_samples(
            run,
            Decoder(),
            [types.SimpleNamespace(**options)],
            splits,
            features="hog",
            num_samples=count,
            sampling={"seed": 7, "temperature": 0.9},
        )
    json.dumps(found, allow_nan=False)
    return found, asked


def with_labels(people):
    """Return the people, AD and NC by turns of the subject."""
    for name, frame in people.index.items():
        odd = frame["subject"].astype(int) % 2
        frame = frame.assign(label=np.where(odd, "NC", "AD"))
        people.index[name] = frame
    return people


def test_fresh_subjects_score_as_the_floor(people, tmp_path):
    people = with_labels(people)
    found, asked = evaluate_generator(
        people, tmp_path, people.images["fresh"], 96
    )
    part = found["generation"]
    assert (part["n"], part["seed"], part["temperature"]) == (96, 7, 0.9)
    assert "12 principal components" in part["features"]
    assert "HOG" in part["features"]
    assert part["frechet"]["ratio"] < 2
    assert part["frechet"]["ratio"] == pytest.approx(
        part["frechet"]["generated_vs_test"] / part["frechet"]["train_vs_test"]
    )
    low, high = part["frechet"]["ratio_ci95"]
    assert low < part["frechet"]["ratio"] < high
    floor = part["floor"]
    scores = ("precision", "recall", "density", "coverage")
    for name in (*scores, "kid", "ssim_to_nearest_train"):
        for value in (part[name], floor[name]):
            low, high = value["ci95"]
            assert low <= value["mean"] <= high
    assert part["coverage"]["mean"] >= 0.5 * floor["coverage"]["mean"]
    assert found["memorization"]["alarm"] is False
    assert found["memorization"]["test_images"] == 128
    assert found["memorization"]["train_images"] == 224

    # Asked for were the conditions of test images.
    assert (asked["n"], asked["seed"], asked["temperature"]) == (96, 7, 0.9)
    test = people.index["unseen"]
    pairs = set(zip(test["label"], np.float32(test["position"]), strict=True))
    wanted = zip(asked["label"], asked["slice_position"], strict=True)
    assert set(wanted) <= pairs
    text = predict.summary_table(found)
    assert ", floor " in text and "alarm" in text and "too small" not in text
    with Image.open(tmp_path / "figures" / "memorization.png") as image:
        assert min(image.size) > 300


def test_noise_scores_worse(people):
    rng = np.random.default_rng(0)
    sets = {k: people.images["train"][k::5] for k in range(5)}
    test = people.images["unseen"][::3]
    count = len(test)
    found = utils.compare_sets(
        {
            "generated": rng.random(test.shape).astype("float32"),
            "test": test,
            "train": sets[0][:count],
            "rebuilt": sets[0][:count],
            "fit": np.concatenate([sets[1], sets[2]]),
        },
        utils.hog_features,
        "HOG",
        people.subjects["train"][::5][:count],
        people.subjects["unseen"][::3],
    )
    floor = found["floor"]
    assert found["frechet"]["ratio"] > 1.5
    assert found["kid"]["mean"] > floor["kid"]["mean"] + 0.1
    assert found["recall"]["mean"] < 0.2 < 0.6 < floor["recall"]["mean"]
    assert found["coverage"]["mean"] < floor["coverage"]["mean"] - 0.1


def test_a_cheat_is_found_and_drawn(people, tmp_path):
    cheat = copies_of(people.images["train"][:64])
    found, _ = evaluate_generator(people, tmp_path, cheat, 64)
    assert found["memorization"]["alarm"] is True
    assert found["memorization"]["copies"] == 64
    assert found["generation"]["ssim_to_nearest_train"]["mean"] > 0.9
    with Image.open(tmp_path / "figures" / "memorization.png") as image:
        assert min(image.size) > 300


def test_few_images_are_stated(people, tmp_path):
    found, _ = evaluate_generator(
        people, tmp_path, people.images["fresh"], 3, labels=()
    )
    part = found["generation"]
    assert part["n"] == 3
    for name in ("frechet", "kid", "precision", "coverage"):
        assert part[name] is None
    assert part["ssim_to_nearest_train"]["mean"] > 0
    assert predict.summary_table(found).count("n too small") == 6
    names = {"n", *utils.SPACES, "copies", "alarm", "test_images"}
    assert names < set(found["memorization"])


def test_the_floor_is_of_other_subjects_in_like_condition(people):
    people = with_labels(people)
    train, test = people.index["train"], people.index["unseen"]
    prior = types.SimpleNamespace(labels=("AD", "NC"), slice_condition=True)
    rows, peers = predict.match_images(test, train, prior, 60, seed=1)
    assert len(set(rows)) == len(set(peers)) == 60
    a, b = test.iloc[rows], train.iloc[peers]
    assert not set(a["subject"]) & set(b["subject"])
    assert list(a["label"]) == list(b["label"])
    apart = np.abs(a["position"].to_numpy() - b["position"].to_numpy())
    assert apart.max() < 0.05
    assert b["subject"].nunique() == 7
    prior = types.SimpleNamespace(labels=(), slice_condition=False)
    rows, peers = predict.match_images(test, train, prior, 1000, seed=1)
    assert len(rows) == len(peers) == len(set(peers)) == 128


def test_components_are_fitted_to_other_training_images():
    fit = predict._rows_to_fit(1000, np.arange(0, 400))
    assert len(fit) == 512 and fit.min() >= 400
    assert len(predict._rows_to_fit(100, np.arange(70))) == 100


def test_figure_of_pairs(tmp_path):
    images = np.random.default_rng(0).random((2, 16, 16))
    path = tmp_path / "memorization.png"
    utils.figure_memorization(path, images, images, ["a", "b\ncopy"], "t")
    with Image.open(path) as image:
        assert image.format == "PNG" and image.size[0] > 500


def test_keys_are_explained(people, tmp_path):
    from tests.test_readme import table

    found, _ = evaluate_generator(people, tmp_path, people.images["fresh"], 32)

    def keys_of(value):
        if not isinstance(value, dict):
            return set()
        return set(value).union(*map(keys_of, value.values()))

    explained = str(table("| key |"))
    assert [k for k in keys_of(found) if f"`{k}`" not in explained] == []


# predict.py evaluate


def test_evaluate_as_many_samples_as_asked(tiny_run, tmp_path):
    run = copy_run(tiny_run, tmp_path)
    before = utils.read_evaluation(run)["generation"]
    predict.main(["evaluate", str(run.path), "--num-samples", "50"])
    found = utils.read_evaluation(run)
    assert before["n"] == 3
    assert found["generation"]["n"] == found["memorization"]["n"] == SLICES


@pytest.mark.parametrize(
    "flags", [["--num-samples", "2"], ["--features", "inception"]]
)
def test_nothing_is_generated_for_other_data(flags):
    with pytest.raises(utils.FlagError, match=f"{flags[0]}: does not go with"):
        predict.main(["evaluate", "RUN", "--data-dir", "DIR", *flags])


def test_unlabelled_test_images_are_drawn_with_all_labels(monkeypatch):
    frame = pd.DataFrame({"label": ["AD", ""], "position": [0.0, 1.0]})
    asked = {}

    def generate(vqvae, priors, n, seed, **options):
        asked.update(options)
        return np.zeros((n, 4, 4)), [], np.zeros(n)

    prior = types.SimpleNamespace(labels=("AD", "NC"))
    monkeypatch.setattr(modules, "generate", generate)
    predict.draw_like(frame, None, [prior], {"seed": 1})
    assert asked["label"] is None
    predict.draw_like(frame[:1], None, [prior], {"seed": 1})
    assert asked["label"] == ["AD"]


# As text


def test_summary_table_tolerates_missing_parts():
    interval = {"mean": 0.93412, "ci95": [0.92, 0.94]}
    text = predict.summary_table(
        {
            "data": {"dataset": "phantom", "simulated": True, "size": [8, 4]},
            "reconstruction": {"ssim": interval, "psnr": None},
            "codebook": [{"level": 1, "counts": [1]}, {"level": 2}],
            "prior": [{"bits_per_code": {"train": 3.0, "test": None}}],
        }
    )
    for part in (
        "phantom",
        "yes",
        "8x4",
        "0.9341 [0.92, 0.94]",
        "train 3, test - bits",
    ):
        assert part in text
    assert "counts" not in text and "psnr" not in text
    assert predict.summary_table({}) == "nothing evaluated yet"


# Labels


def evaluate_two_labels(simulated=True, slice_condition=True):
    """Return what is found of AD and NC, and how `generate` was called."""
    positions = [0.6, 0.7, 0.6, 0.1]
    frame = pd.DataFrame(
        {"label": ["AD", "NC", "AD", "AD"], "position": positions}
    )
    config = utils.Config(num_samples=3)
    run = utils.Run("run", config, {"simulated": simulated})
    prior = types.SimpleNamespace(
        labels=("AD", "NC", "MCI"), slice_condition=slice_condition
    )
    asked = []

    def generate(vqvae, priors, n, seed, **options):
        asked.append((vqvae, priors, n, seed, options))
        level = {"AD": 0.9, "NC": 0.3, "MCI": 0.5}[options["label"]]
        return np.full((n, 4, 4), level, "float32"), []

    def ventricles(images, positions):
        areas = np.asarray(images).reshape(len(images), -1).mean(1)
        return np.where(np.asarray(positions) < 0.5, np.nan, 10 * areas)

    images = np.arange(1, 5, dtype="float32")[:, None, None, None] / 10
    images = np.tile(images, (1, 4, 4, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules, "generate", generate)
        patch.setattr(dataset, "ventricle_areas", ventricles)
        patch.setattr(
            predict, "image_batches", lambda *_: [images[:3], images[3:]]
        )
        entries = predict.evaluate_labels(
            run, "vqvae", [prior], frame, {"seed": 5}
        )
    return entries, asked


def test_labels_of_simulated_brains_are_told_by_ventricles():
    entries, asked = evaluate_two_labels()
    assert [entry["label"] for entry in entries] == ["AD", "NC", "MCI"]
    assert [entry["test_images"] for entry in entries] == [3, 1, 0]
    assert [entry["images_drawn"] for entry in entries] == [3, 3, 3]
    areas = [entry["ventricle_area"] for entry in entries]
    # The fourth image, AD too, is of a plane without ventricles.
    assert areas[0] == pytest.approx({"real": 2.0, "generated": 9.0})
    assert areas[1] == pytest.approx({"real": 2.0, "generated": 3.0})
    assert areas[2]["real"] is None
    assert areas[2]["generated"] == pytest.approx(5.0)
    json.dumps(entries, allow_nan=False)
    for vqvae, priors, n, seed, options in asked:
        assert (vqvae, len(priors), n, seed) == ("vqvae", 1, 3, 5)
        assert set(options) == {"label", "slice_position"}
        positions = options["slice_position"]
        assert len(positions) == 3 and 0.5 <= min(positions)
        assert max(positions) <= 0.8
    text = predict.summary_table({"labels": entries})
    assert "real 2, generated 9 pixels" in text and "MCI" in text


@pytest.mark.parametrize(
    "options", [{"simulated": False}, {"slice_condition": False}]
)
def test_labels_of_other_images_are_only_counted(options):
    entries, asked = evaluate_two_labels(**options)
    assert not asked
    assert entries[0] == {"label": "AD", "test_images": 3}
