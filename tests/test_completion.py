"""Tests of known indices in the sampler, and of `predict.py complete`."""

import types

import keras
import numpy as np
import pytest
from PIL import Image

import modules
import predict
import utils
from tests.conftest import blobs, copy_run
from tests.test_modules import (
    ALL_GRIDS,
    chi_square_fits,
    conditions,
    expected_shares,
    perturb_prior,
    request,
    rows_of,
    small,
)
from tests.test_predict import call, refused

N = 1600


@pytest.fixture(scope="module", params=modules.PRIORS)
def prior(request):
    """A prior of each network with 81 grids of unequal probability."""
    keras.utils.set_random_seed(0)
    # Tests before may have left that of a recipe, which rounds.
    keras.config.set_dtype_policy("float32")
    prior = small(request.param, "lower")
    perturb_prior(prior, scale=0.4)
    prior.sample_chunk = 200  # a run of the sampler costs more than a grid
    return prior


def draw(prior, n, pattern=None, **options):
    """Grids given one pattern of known indices, and what they are of."""
    given = conditions(prior, 1)
    given = rows_of(given, np.zeros(n, int))
    known = None if pattern is None else np.tile(pattern, (n, 1, 1))
    asked = request(prior, given)
    return prior.sample(n, known=known, **asked, **options), given


def share_of(grids):
    """How often each of `ALL_GRIDS` occurs."""
    return np.bincount(grids.reshape(-1, 4) @ [27, 9, 3, 1], minlength=81)


def given_known(prior, pattern):
    """Probability of each of `ALL_GRIDS` given the known indices."""
    shares = expected_shares(prior, conditions(prior, 1))
    fits = np.all((pattern < 0) | (ALL_GRIDS == pattern), axis=(1, 2))
    return shares * fits / shares[fits].sum()


# The sampler


def test_known_indices_come_back_and_are_seen(prior):
    """Prevents: known indices that the codes drawn later know nothing of."""
    n = 40
    given = conditions(prior, n)
    rng = np.random.default_rng(0)
    known = rng.integers(-1, 3, (n, 2, 2))
    (grids, sampled) = prior.sample(
        n, known=known, return_log_prob=True, **request(prior, given)
    )
    np.testing.assert_array_equal(grids[known >= 0], known[known >= 0])
    assert len(np.unique(grids[known < 0])) > 1
    # The caches saw what was forced: both ways give one probability.
    nats = prior.log_prob(grids, **given).numpy()
    np.testing.assert_allclose(sampled, nats.sum(axis=(1, 2)), rtol=1e-5)


def test_nothing_known_changes_nothing(prior):
    empty, _ = draw(prior, 20, np.full((2, 2), -1), return_log_prob=True)
    plain, _ = draw(prior, 20, return_log_prob=True)
    for one, other in zip(empty, plain, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "pattern", [[[2, -1], [-1, -1]], [[1, 0], [-1, -1]], [[0, 2], [1, -1]]]
)
def test_what_follows_a_prefix_has_its_probability(prior, pattern):
    """Prevents: completions that are not from p(rest | kept)."""
    pattern = np.array(pattern)
    grids, _ = draw(prior, N, pattern, seed=5)
    shares = given_known(prior, pattern)
    counts = share_of(grids)
    assert shares.sum() == pytest.approx(1) and counts[shares == 0].sum() == 0
    assert chi_square_fits(counts, shares)
    # Fine enough to tell the prefix apart: that of others fits not.
    even = (shares > 0) / (shares > 0).sum()
    assert not chi_square_fits(counts, even)


def test_weights_correct_what_was_drawn_too_early(prior):
    """Prevents: completions of a kept end that do not look at it."""
    # The last code that tells most about those before it.
    joint = expected_shares(prior, conditions(prior, 1)).reshape(27, 3)
    before = joint.sum(axis=1, keepdims=True)
    last = np.abs(joint / joint.sum(axis=0) - before).sum(axis=0).argmax()
    pattern = np.array([[-1, -1], [-1, last]])
    shares = given_known(prior, pattern)
    grids, given = draw(prior, N, pattern, seed=5)
    frame = types.SimpleNamespace()  # `prior_inputs`, of other levels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            utils, "prior_inputs", lambda *_: {"indices": grids, **given}
        )
        known = [np.tile(pattern, (N, 1, 1))]
        logs = predict.known_log_prob([prior], [grids], known, frame)
    weights = np.exp(logs)
    found = np.zeros(81)
    np.add.at(found, grids.reshape(-1, 4) @ [27, 9, 3, 1], weights)

    def distance(counts):
        return np.abs(counts / counts.sum() - shares).sum() / 2

    assert distance(found) < 0.05
    assert distance(share_of(grids)) > 2 * distance(found)


def test_resample_chooses_by_weight():
    weights = np.log(np.tile([1.0, 3.0, 1e-30], (4000, 1))) - 700
    chosen, sizes = predict.resample(weights, 0)
    rows, columns = np.divmod(chosen, 3)
    np.testing.assert_array_equal(rows, np.arange(4000))
    assert np.mean(columns == 1) == pytest.approx(0.75, abs=0.03)
    assert not np.any(columns == 2)
    np.testing.assert_allclose(sizes, 1.6)
    assert predict.resample(np.zeros((1, 8)), 0)[1] == pytest.approx(8)


@pytest.mark.parametrize(
    "known, message",
    [
        (np.zeros((2, 2, 3)), "^known: expected shape"),
        (np.full((2, 2, 2), 3), "^known: expected -1..2, found 3"),
        (np.full((2, 2, 2), -2), "^known: expected -1..2, found -2"),
    ],
)
def test_known_is_checked(known, message):
    prior = small("pixelcnn", "alone")
    with pytest.raises(ValueError, match=message):
        prior.sample(2, known=known)


def test_nan_and_none_are_unknown(prior):
    n, upper = 4, conditions(prior, 4)["upper"]
    unknown = {"slice_position": np.full(n, np.nan), "label": [None] * n}
    np.testing.assert_array_equal(
        prior.sample(n, upper=upper, **unknown), prior.sample(n, upper=upper)
    )
    with pytest.raises(ValueError, match="^slice_position: expected 0..1"):
        prior.sample(2, upper=rows_of(upper, [0, 1]), slice_position=[0, 1.1])


# What is kept


def options(**given):
    return predict.Complete(run="RUN", images=("IMAGE",), **given)


VQVAE = types.SimpleNamespace(
    image_size=(64, 32), latent_grids=[(16, 8), (8, 4)]
)


@pytest.mark.parametrize("keep", predict.SIDES)
def test_cells_kept_are_a_coarse_cell_from_the_cut(keep):
    pixels, cells = predict.kept_parts(VQVAE, options(keep=keep))
    assert pixels.shape == (64, 32) and pixels.mean() == 0.5
    edges = {"top": (0, 9), "bottom": (-1, 9), "left": (9, 0), "right": (9, -1)}
    assert pixels[edges[keep]]
    for level, side in zip(cells, (4, 8), strict=True):
        wide = np.repeat(np.repeat(level, side, axis=0), side, axis=1)
        assert not np.any(wide & ~pixels)
        # Lines of pixels kept, with no index: 8, a cell of the coarse level.
        axis = 1 if keep in ("top", "bottom") else 0
        lines = [part.any(axis=axis).sum() for part in (pixels, wide)]
        assert lines[0] - lines[1] == 8
        assert set(np.unique(level.mean(axis=axis))) == {0, 1}


def test_a_cut_inside_a_cell():
    """Prevents: a cell that is partly black taken for known."""
    given = options(keep="bottom", keep_fraction=0.36)  # 23 pixels
    pixels, (fine, coarse) = predict.kept_parts(VQVAE, given)
    assert pixels.any(axis=1).sum() == 23
    assert (fine.any(axis=1).sum(), coarse.any(axis=1).sum()) == (3, 1)
    with pytest.raises(utils.FlagError, match="^--keep-fraction: 0.15 keeps"):
        predict.kept_parts(VQVAE, options(keep_fraction=0.15))


# The verb


@pytest.fixture
def run(tiny_run, tmp_path):
    return copy_run(tiny_run, tmp_path)


def completions(run, *argv):
    call("complete", run.path, *argv)
    with np.load(run.path / "completions.npz") as file:
        return dict(file)


@pytest.mark.parametrize("keep", ["top", "right"])
def test_nothing_of_the_removed_part_leaks(run, tmp_path, keep):
    whole, other = blobs(98), blobs(99)
    kept = np.s_[:16] if keep == "top" else np.s_[:, 16:]
    other[kept] = whole[kept]
    found = []
    for pixels in (whole, other):
        path = tmp_path / "image.png"
        Image.fromarray(pixels).save(path)
        found.append(completions(run, path, "--keep", keep, "-n", "2"))
    for name in found[0]:
        np.testing.assert_array_equal(found[0][name], found[1][name])


def test_kept_region_resembles_the_image(run, capsys):
    """On test images, of which the run knows label and position."""
    test = utils.read_splits(run)["test"]
    found = completions(run, *test["path"][:2], "-n", "6", "--seed", "3")
    known, drawn = found["known_1"], found["indices_1"]
    assert drawn.shape == (2, 6, *known.shape[1:])
    assert np.any(known >= 0) and np.any(known < 0)
    for one, grids in zip(known, drawn, strict=True):
        assert np.all((grids == one) | (one < 0))
        assert not np.all(grids == grids[0])
    vqvae = utils.load_model(run.vqvae_path)
    images = predict.read_all(run, test[:2])
    rebuilt = utils.to_pixels(vqvae.reconstruct(images).numpy()[..., 0])
    error = np.abs(found["images"].astype(int) - rebuilt[:, None])
    assert error[:, :, :8].mean() < 0.5 * error[:, :, 16:].mean()
    assert (found["images"].dtype, error.shape) == ("uint8", (2, 6, 32, 32))
    assert list(found["path"]) == list(test["path"][:2])
    assert "effective_sample_size" not in found
    text = capsys.readouterr().out
    assert "exact  label unknown, slice position 0.00  case" in text
    with Image.open(run.figures_path / "completions.png") as figure:
        assert min(figure.size) > 300


def test_what_is_known_of_files(run, adni_dir):
    """Prevents: a made-up slice position, or one that is known unused."""
    own = utils.read_splits(run)["validate"].iloc[2]
    strange = next((adni_dir / "test").rglob("*.jpeg"))
    frame = predict.describe_files(run, [own["path"], strange])
    assert frame["position"][0] == own["position"] > 0
    assert np.isnan(frame["position"][1]) and frame["label"][1] == ""


def test_two_levels_are_weighed(levels_run, tmp_path, capsys):
    run = copy_run(levels_run, tmp_path)
    test = utils.read_splits(run)["test"]
    found = completions(run, test["path"][0], "-n", "2", "--candidates", "4")
    sizes = found["effective_sample_size"]
    assert sizes.shape == (1, 2) and np.all((sizes >= 1) & (sizes <= 4))
    for level in (1, 2):
        known, drawn = found[f"known_{level}"], found[f"indices_{level}"]
        assert np.any(known >= 0)
        assert np.all((drawn == known[:, None]) | (known[:, None] < 0))
    assert "effective  label NC, slice position 0.00" in capsys.readouterr().out


def test_complete_refuses(run, vqvae_run, oasis_dir, tmp_path, capsys):
    image = next(oasis_dir.rglob("case*.png"))
    before = set(run.path.rglob("*"))
    assert "IMAGES" in refused(2, capsys, "complete", run.path)
    flags = ("--keep-fraction", "0.1")
    assert "keeps no" in refused(2, capsys, "complete", run.path, image, *flags)
    gone = tmp_path / "gone.png"
    assert "gone.png" in refused(3, capsys, "complete", run.path, gone)
    assert "no prior" in refused(4, capsys, "complete", vqvae_run.path, image)
    assert set(run.path.rglob("*")) == before
