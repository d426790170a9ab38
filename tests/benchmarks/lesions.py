"""How well the method of `predict.py anomaly` finds simulated lesions.

    python tests/benchmarks/lesions.py RUN [--count 128] [--json FILE]

Test images of a run are taken twice: as they are, and with a simulated lesion
each, a soft bright or dark blob in the head. Their residual maps, and the
surprisal of each level, are compared with the truth; 95 % intervals are over
subjects. `--data-dir` is where the data of the run are now, if they moved.
"""

import functools
import types

import common
import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

import dataset
import predict
import utils

LESION_RADIUS = (0.04, 0.09)  # of the long side of the image
LESION_CONTRAST = (0.25, 0.5)  # of the intensity range, up or down
LEVELS = 1024  # that residuals are rounded to, to count pixels


def add_lesion(image, seed):
    """Add a round, soft, bright or dark blob in the head to an image (H, W).

    Place, `LESION_RADIUS` and `LESION_CONTRAST` are random, by the seed.
    Returns the image, and the mask of what takes at least half of the contrast:
    nothing of a blank image.
    """
    rng = np.random.default_rng(seed)
    radius = rng.uniform(*LESION_RADIUS) * max(image.shape)
    contrast = rng.uniform(*LESION_CONTRAST)
    depth = dataset.head_depth(image)
    inside = np.argwhere((depth > 0) & (depth >= min(radius, depth.max())))
    if not len(inside):
        return np.float32(image), np.full(image.shape, False)
    centre = rng.choice(inside)
    away = np.linalg.norm(np.argwhere(depth >= 0) - centre, axis=1)
    blob = np.clip(2.5 - 2 * away.reshape(image.shape) / radius, 0, 1)
    blob *= depth > 0
    mask = blob >= 0.5
    level = image[mask].mean()
    signs = [s for s in (1, -1) if 0 <= level + s * contrast <= 1]
    image = image + rng.choice(signs) * contrast * blob
    return np.clip(image, 0, 1).astype(np.float32), mask


def with_lesions(slices, seed):
    """Return table, images and masks of slices, then of these with lesions."""
    images = slices.read()[..., 0]
    pairs = [add_lesion(x, [seed, k]) for k, x in enumerate(images)]
    changed, masks = (np.stack(part) for part in zip(*pairs, strict=True))
    kept = masks.any(axis=(1, 2))  # a blank image has no place for one
    table = utils.pd.concat([slices.table[kept]] * 2, ignore_index=True)
    images = np.concatenate([images[kept], changed[kept]])
    return table, images, np.concatenate([masks[kept] & False, masks[kept]])


def score(measure, truth, values, subjects, counts=1):
    """Return how well values tell what is true, as part of a row."""

    def statistic(weights):
        return measure(truth, values, sample_weight=weights * counts)

    found = utils.bootstrap(statistic, subjects, n=1000)
    low, high = found["ci95"]
    return {"value": found["mean"], "low": low, "high": high}


def score_all(found, masks, subjects):
    """Return a row for each score of what `find_anomalies` found."""
    ill, rows = masks.any(axis=(1, 2)), []
    for k, values in enumerate((found["residual"], *found["near"])):
        name = f"AUROC of images, {f'surprisal {k}' if k else 'residual'}"
        most = values.max(axis=(1, 2))
        row = score(roc_auc_score, ill, most, subjects)
        rows.append({"score": name, **row, "chance": 0.5})
    owner = np.unique(subjects, return_inverse=True)[1][:, None, None]
    height = found["residual"] / found["residual"].max()
    keys = owner * LEVELS + np.rint(height * (LEVELS - 1)).astype(int)
    keys, counts = np.unique(2 * keys + masks, return_counts=True)
    owner, values = np.divmod(keys // 2, LEVELS)
    row = score(average_precision_score, keys % 2, values, owner, counts)
    name, chance = "average precision of pixels, residual", float(masks.mean())
    return [*rows, {"score": name, **row, "chance": chance}]


def lesion_rows(options):
    """Return the rows of a run."""
    run, moved = utils.Run.open(options.RUN), options.data_dir or None
    trained = predict.Trained.load(run, predict.Anomaly(seed=options.seed))
    few = functools.partial(predict.some_of_split, run, moved)
    find = functools.partial(predict.find_anomalies, trained)
    usual = few("validate", predict.CALIBRATION)
    test = few("test", options.count)
    table, images, masks = with_lesions(test, options.seed)
    ill = types.SimpleNamespace(table=table, read=lambda: images[..., None])
    unknown = {"label": ""}  # a label must not explain a finding away
    found = {"limits": None}  # those of the first part hold for the second
    for slices in (usual, ill):
        found = find(slices, unknown, options.restorations, found["limits"])
    return score_all(found, masks, table["subject"])


CASES = {"lesions": lesion_rows}
FLAGS = {"RUN": "", "data_dir": "", "count": 128, "restorations": 4, "seed": 0}

if __name__ == "__main__":
    common.run(__doc__, CASES, FLAGS)
