"""Make `resources/architecture.png`, the figure of README.md.

    python -m resources.architecture

Run it from the top of the project. The slices are simulated. No network is
trained for the figure: its indices are a k-means of 8x8 patches, and its
decoded slices are smoothed copies.
"""

import tempfile
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import figure as figures
from matplotlib import image as files
from matplotlib import patches
from scipy import ndimage
from scipy.cluster import vq

import dataset

PATH = Path(__file__).with_suffix(".png")
WIDTH, HEIGHT = 13.2, 7.55  # inches
DPI = 150
PATCH = 8  # pixels a side for an index
CODES = 16  # colours of the index grids
COLOURS = "viridis"
ROWS = (5.45, 1.9)  # middle of the upper and of the lower row, inches
TALL, BROAD = 1.76, 1.54  # a slice, inches
INK, SOFT, RULE = "#222222", "#6b7280", "#d1d5db"
NETWORK, NETWORK_EDGE = "#dbe7f6", "#3b6ea8"
PRIOR, PRIOR_EDGE = "#fbe6d3", "#c06a1f"
NEXT = "#d62728"  # the position that is predicted
NOTE = (
    "Schematic. The slices are simulated; the indices are a k-means of 8x8 "
    "patches and the decoded slices are smoothed copies, in place of a "
    "trained network."
)


def main():
    slices = simulated_slices()
    codebook = learn_codebook(slices)
    page = Page()
    draw_autoencoder(page, slices[0], codebook)
    draw_prior(page, slices[1], codebook)
    page.axes.plot([0.28, WIDTH - 0.28], [3.82, 3.82], color=RULE, lw=1.2)
    page.text(0.28, 0.2, NOTE, 11, SOFT, ha="left")
    page.save(PATH)
    print(PATH)


def simulated_slices():
    """Two slices (H, W) in [0, 1], of two simulated people."""
    with tempfile.TemporaryDirectory() as folder:
        root = dataset.simulate(Path(folder) / "brains", subjects=3)
        paths = sorted(root.rglob("*_slice_20.nii.png"))[:2]
        return [files.imread(path) for path in paths]


def cut(image):
    """The patches of an image, (h, w, PATCH * PATCH)."""
    h, w = (side // PATCH for side in image.shape)
    parts = image.reshape(h, PATCH, w, PATCH).swapaxes(1, 2)
    return parts.reshape(h, w, -1)


def learn_codebook(slices):
    """Code vectors (CODES, PATCH * PATCH), dark ones first."""
    vectors = np.concatenate([cut(s).reshape(-1, PATCH**2) for s in slices])
    codebook, _ = vq.kmeans2(vectors, CODES, minit="++", seed=3)
    return codebook[np.argsort(codebook.mean(axis=1))]


def index_grid(image, codebook):
    vectors = cut(image)
    found, _ = vq.vq(vectors.reshape(-1, PATCH**2), codebook)
    return found.reshape(vectors.shape[:2])


class Page:
    """A figure that is drawn on in inches, origin at the lower left."""

    def __init__(self):
        self.figure = figures.Figure(figsize=(WIDTH, HEIGHT), dpi=DPI)
        self.figure.set_facecolor("white")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        self.axes.axis("off")

    def text(self, x, y, words, size=14, color=INK, **options):
        options = {"ha": "center", "va": "center", **options}
        self.axes.text(x, y, words, fontsize=size, color=color, **options)

    def arrow(self, start, end, color=INK, bend=None, style="-"):
        self.axes.annotate(
            "",
            end,
            start,
            arrowprops={
                "arrowstyle": "-|>,head_width=0.3,head_length=0.55",
                "color": color,
                "lw": 1.8,
                "linestyle": style,
                "connectionstyle": bend,
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )

    def picture(self, x, y, image, height=TALL, width=BROAD, **options):
        """An image about (x, y)."""
        extent = (x - width / 2, x + width / 2, y - height / 2, y + height / 2)
        options = {"cmap": "gray", "interpolation": "bilinear", **options}
        self.axes.imshow(image, extent=extent, zorder=2, **options)
        self.axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="auto")

    def grid(self, x, y, indices, height=TALL, width=BROAD):
        """Indices as colours; -1 is not drawn yet. Returns cell corners."""
        h, w = indices.shape
        self.picture(
            x,
            y,
            np.ma.masked_less(indices, 0),
            height,
            width,
            cmap=COLOURS,
            interpolation="nearest",
            vmin=0,
            vmax=CODES,
        )
        left, low = x - width / 2, y - height / 2
        style = {"color": "white", "lw": 0.7, "zorder": 3}
        edges_x = left + width * np.arange(w + 1) / w
        edges_y = low + height * np.arange(h + 1) / h
        self.axes.vlines(edges_x, low, low + height, **style)
        self.axes.hlines(edges_y, left, left + width, **style)
        self.box(left, low, width, height, "none", SOFT, lw=1.0)
        return edges_x, edges_y[::-1]

    def box(self, left, low, width, height, face, edge, **options):
        options = {"lw": 1.6, "zorder": 4, **options}
        self.axes.add_patch(
            patches.Rectangle(
                (left, low),
                width,
                height,
                facecolor=face,
                edgecolor=edge,
                **options,
            )
        )

    def funnel(self, x, y, left, right, words, face, edge, width=1.35):
        """A trapezium with sides `left` and `right` tall: a network."""
        half = width / 2
        corners = [
            (x - half, y - left / 2),
            (x - half, y + left / 2),
            (x + half, y + right / 2),
            (x + half, y - right / 2),
        ]
        self.axes.add_patch(
            patches.Polygon(
                corners, facecolor=face, edgecolor=edge, lw=1.6, zorder=4
            )
        )
        self.text(x, y, words, zorder=5)

    def stack(self, x, y, height, width, count=4):
        """Feature planes one behind the other."""
        step = 0.09
        for k in reversed(range(count)):
            shift = (k - (count - 1) / 2) * step
            self.box(
                x - width / 2 + shift,
                y - height / 2 + shift,
                width,
                height,
                NETWORK,
                NETWORK_EDGE,
                lw=1.1,
            )

    def save(self, path):
        self.figure.savefig(path, format="png")


def draw_autoencoder(page, image, codebook):
    """The upper row: what the VQ-VAE does to an image."""
    y = ROWS[0]
    under = y - TALL / 2 - 0.12
    page.text(
        0.28, 7.25, "VQ-VAE", size=17, weight="bold", color=NETWORK_EDGE,
        ha="left",
    )  # fmt: skip
    page.text(1.36, 7.25, "learns to compress a slice", 15, SOFT, ha="left")

    page.picture(1.05, y, image)
    page.text(1.05, under, "image\nH x W", va="top")
    page.arrow((1.9, y), (2.3, y))
    page.funnel(2.97, y, 1.9, 1.1, "encoder", NETWORK, NETWORK_EDGE)
    page.arrow((3.67, y), (4.07, y))
    page.stack(4.65, y, 0.95, 0.83)
    page.text(4.65, under, "latents\nh x w x D", va="top")
    page.arrow((5.25, y), (5.65, y))

    page.box(5.67, y - 0.55, 1.5, 1.1, NETWORK, NETWORK_EDGE)
    page.text(6.42, y, "nearest\ncode vector", zorder=5)
    draw_codebook(page, 6.42, y + 1.15, codebook)
    page.arrow((7.19, y), (7.59, y))

    page.grid(8.4, y, index_grid(image, codebook))
    page.text(8.4, under, "indices\nh x w", va="top")
    page.arrow((9.22, y), (9.62, y))
    page.funnel(10.3, y, 1.1, 1.9, "decoder", NETWORK, NETWORK_EDGE)
    page.arrow((11.0, y), (11.38, y))
    page.picture(12.18, y, ndimage.gaussian_filter(image, 0.8))
    page.text(12.18, under, "reconstruction\nH x W", va="top")


def draw_codebook(page, x, y, codebook):
    """The code vectors in the colours of their indices, and an arrow down."""
    width, height = 2.0, 0.26
    page.picture(
        x,
        y,
        np.arange(CODES)[None],
        height,
        width,
        cmap=COLOURS,
        interpolation="nearest",
        vmin=0,
        vmax=CODES,
    )
    page.box(x - width / 2, y - height / 2, width, height, "none", SOFT, lw=1)
    page.text(x, y + 0.33, "codebook: K code vectors")
    page.arrow((x, y - 0.15), (x, y - 0.58))


def draw_prior(page, image, codebook):
    """The lower row: how a grid is sampled from the prior and decoded."""
    y = ROWS[1]
    under = y - TALL / 2 - 0.12
    page.text(
        0.28, 3.55, "Prior", size=17, weight="bold", color=PRIOR_EDGE,
        ha="left",
    )  # fmt: skip
    page.text(
        1.12, 3.55, "learns which grids occur, and samples new ones", 15, SOFT,
        ha="left",
    )  # fmt: skip

    indices = index_grid(image, codebook)
    row, column = 8, 7
    begun = indices.copy()
    begun[row, column:] = -1
    begun[row + 1 :] = -1
    edges_x, edges_y = page.grid(1.05, y, begun)
    page.box(
        edges_x[column],
        edges_y[row + 1],
        edges_x[1] - edges_x[0],
        edges_y[0] - edges_y[1],
        "white",
        NEXT,
        lw=2.4,
    )
    page.text(1.05, under, "indices so far", va="top")
    page.arrow((1.9, y), (2.3, y))

    page.box(2.32, y - 0.62, 1.75, 1.24, PRIOR, PRIOR_EDGE)
    page.text(3.2, y, "masked\nconvolutions,\nattention", zorder=5)
    page.arrow((3.2, y - 1.02), (3.2, y - 0.66))
    page.text(
        3.2,
        y - 1.08,
        "optional: label, slice and\ngrid position, level above",
        13,
        SOFT,
        va="top",
    )
    page.arrow((4.09, y), (4.49, y))
    draw_probabilities(page, 5.35, y)
    page.text(5.35, under, "probabilities of\nthe next index", va="top")
    page.arrow((6.17, y), (7.55, y))
    page.text(6.86, y + 0.22, "sample", 14)

    page.grid(8.4, y, indices)
    page.text(8.4, under, "sampled grid", va="top")
    page.arrow((9.22, y), (9.62, y))
    page.funnel(10.3, y, 1.1, 1.9, "same\ndecoder", NETWORK, NETWORK_EDGE)
    page.arrow((11.0, y), (11.38, y))
    page.picture(12.18, y, ndimage.gaussian_filter(image, 0.8))
    page.text(12.18, under, "new image", va="top")
    draw_loop(page, y)


def draw_loop(page, y):
    """From the sampled index back to the indices so far."""
    top = y + 1.16
    style = {"color": NEXT, "lw": 1.8, "zorder": 1}
    page.axes.plot([6.86, 6.86, 1.05], [y + 0.4, top, top], **style)
    page.arrow((1.05, top), (1.05, y + TALL / 2 + 0.02), NEXT)
    page.text(4.0, top + 0.18, "once for each position", 13, NEXT)


def draw_probabilities(page, x, y):
    """A bar for each index, in its colour."""
    width, height = 1.5, 1.35
    rng = np.random.default_rng(5)
    shares = rng.dirichlet(np.full(CODES, 0.6))
    left, low = x - width / 2, y - height / 2
    lefts = left + width * np.arange(CODES) / CODES
    colours = matplotlib.colormaps[COLOURS](np.arange(CODES) / CODES)
    page.axes.bar(
        lefts,
        height * shares / shares.max(),
        width=0.85 * width / CODES,
        bottom=low,
        align="edge",
        color=colours,
        zorder=3,
    )
    page.axes.plot([left, left + width], [low, low], color=INK, lw=1.2)


if __name__ == "__main__":
    main()
