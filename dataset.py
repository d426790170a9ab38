"""Slices on disk -> a checked index -> batches; and simulated slices.

    python dataset.py check DIR
        what would be trained on; every problem file by name
    python dataset.py simulate DEST --layout oasis --subjects 60
        a data set of simulated slices in the layout of a real one

Sections: 1. Layouts, 2. Scan, 3. Read, 4. Verify, 5. Index, 6. Batches,
7. Simulator, 8. Command line.
"""

import codecs
import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import gzip
import hashlib
import json
import os
import re
import shutil
import struct
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np

import utils
from utils import DataError

Image = utils.lazy_import("PIL.Image")
mni152 = utils.lazy_import("nilearn.datasets")
ndimage = utils.lazy_import("scipy.ndimage")
nibabel = utils.lazy_import("nibabel")
pd = utils.lazy_import("pandas")
tf = utils.lazy_import("tensorflow")
tqdm = utils.lazy_import("tqdm")

SPLITS = ("train", "validate", "test")
MARKER = "simulated.json"
PERCENTILES = (0.5, 99.5)  # of a scan's voxels: black and white of NIfTI
INTENSITY_RULE = (
    "PNG and JPEG: 0 to full scale of the bit depth; NIfTI: percentiles "
    f"{PERCENTILES[0]} to {PERCENTILES[1]} of each scan; clipped to [0, 1]"
)
CARVED = 0.1  # share of training subjects that become the validation split
MOST_PIXELS = 64_000_000  # of an image; more is taken for a bomb
MOST_SIDE = 4096  # voxels along an axis of a NIfTI file
MOST_BYTES = 1 << 30  # of a file
MOST_INTENSITY = 1e30  # of a voxel; more is a damaged number or scale
MOST_LISTED = 20  # problems listed in one error
QUIET_BELOW = 500  # files that need no progress bar

# --------------------------------------------------------------- 1. Layouts


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a data set lies on disk.

    Args:
        split_folder: name of a split's folder, with `{}` for the split.
        file_name: regex with groups `subject`, `slice` and maybe `week`.
        example: a file name, for messages.
        class_folders: folders inside a split that give the label.
        nifti: whether files are NIfTI; PNG or JPEG otherwise.
    """

    split_folder: str
    file_name: str
    example: str
    class_folders: tuple = ()
    nifti: bool = False

    @property
    def folders(self):
        return {split: self.split_folder.format(split) for split in SPLITS}


LAYOUTS = {
    "oasis": Layout(
        "keras_png_slices_{}",
        r"case_(?P<subject>\d+)_slice_(?P<slice>\d+)(\.nii)?\.(png|jpe?g)",
        "case_001_slice_0.nii.png",
    ),
    "adni": Layout(
        "{}",
        r"(?P<subject>\d+)_(?P<slice>\d+)\.(png|jpe?g)",
        "218391_78.jpeg",
        class_folders=("AD", "NC"),
    ),
    "hipmri": Layout(
        "keras_slices_{}",
        r"case_(?P<subject>\d+)_week_(?P<week>\d+)_slice_(?P<slice>\d+)"
        r"\.nii(\.gz)?",
        "case_004_week_0_slice_10.nii.gz",
        nifti=True,
    ),
}

# ------------------------------------------------------------------ 2. Scan


def _show(path):
    """Return a path on one line that any terminal prints, whatever it holds."""
    text = os.fsdecode(path)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _warn(text):
    print(f"warning: {text}", file=sys.stderr)


def _some(names, most=5):
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(_show, names[:most])) + more or "none"


def _subfolders(folder):
    try:
        with os.scandir(folder) as entries:
            paths = sorted(Path(e.path) for e in entries if e.is_dir())
    except OSError:
        return []
    # Not the resource forks of macOS nor a simulation being written.
    return [p for p in paths if p.name[0] not in "._" and ".tmp-" not in p.name]


def _find_base(root, layout):
    """Return the folder of the split folders: `root` or up to 3 below."""
    level = [Path(os.path.abspath(root))]
    for _ in range(4):
        found = {}
        for folder in level:
            if any(os.path.isdir(folder / f) for f in layout.folders.values()):
                found.setdefault(os.path.realpath(folder), folder)
        if len(found) > 1:
            raise DataError(
                f"{_show(root)}: found several data sets, expected one; name "
                f"one of {_some(found.values())}"
            )
        if found:
            return next(iter(found.values()))
        level = [child for folder in level for child in _subfolders(folder)]
    return None


def _check_root(root):
    if not os.path.isdir(root):
        found = "a file" if os.path.exists(root) else "nothing there"
        raise DataError(f"{_show(root)}: found {found}, expected a folder")
    if not os.access(root, os.R_OK | os.X_OK):
        raise DataError(f"{_show(root)}: the folder is not readable")


def detect_layout(root):
    """Return the name of the layout that lies under `root`."""
    _check_root(root)
    names = [n for n, layout in LAYOUTS.items() if _find_base(root, layout)]
    if len(names) == 1:
        return names[0]
    if names:
        raise DataError(
            f"{_show(root)}: found the layouts {', '.join(names)}; choose "
            "one with --dataset"
        )
    looked = [x.split_folder.format("train") for x in LAYOUTS.values()]
    raise DataError(
        f"{_show(root)}: found no data set; looked for folders "
        f"{', '.join(looked)}, found {_some(_listing(root))}"
    )


def _listing(folder):
    return [p.name for p in _subfolders(folder)]


def scan(root, dataset):
    """Return the index of the slices under `root`, unread.

    Args:
        root: the data set's folder, its parent, or doubled as unzips do.
        dataset: str, a key of `LAYOUTS`.

    Returns: DataFrame sorted by split, subject, scan and slice; columns
        path (absolute), subject, scan, slice (int), position (rank in the
        scan, 0..1), label ("" unknown) and split. `attrs["ignored"]` lists
        the files that are not slices, `attrs["base"]` is the folder found.
    Raises:
        DataError: on a wrong layout, an empty split, an unreadable folder
            or a subject in two splits.
    """
    _check_root(root)
    layout = LAYOUTS[dataset]
    base = _find_base(root, layout)
    folders = layout.folders
    present = [s for s in SPLITS if base and os.path.isdir(base / folders[s])]
    if not {"train", "test"} <= set(present):
        raise DataError(
            f"{_show(base or root)}: not the {dataset} layout; looked for "
            f"folders {_some(folders.values())}, found "
            f"{_some(_listing(base or root))}"
        )
    rows, ignored = [], []
    for split in present:
        rows += _scan_split(base / folders[split], split, layout, ignored)
    index = pd.DataFrame(rows)
    if "validate" not in present:
        is_train = index["split"] == "train"
        carved = index["subject"].isin(carve(index["subject"][is_train]))
        index.loc[is_train & carved, "split"] = "validate"
    index = _sort(index)
    _check_subjects(index, base)
    index.attrs.update(ignored=ignored, base=str(base))
    return index


def _scan_split(folder, split, layout, ignored):
    """Return the rows of one split; add other files to `ignored`."""
    rows, seen, others = [], {}, []
    for path in _walk(folder):
        row = _row(path, folder, split, layout)
        key = row and (row["scan"], row["slice"])
        real = os.path.realpath(path)
        if row is None or key in seen.values():
            others.append(path)
        elif real not in seen:
            seen[real] = key
            rows.append(row)
    if not rows:
        raise DataError(
            f"{_show(folder)}: no slices; looked for files like "
            f"{layout.example}, found {_some(map(os.path.basename, others))}"
        )
    ignored += others
    return rows


def _walk(folder):
    """Yield the files below a folder, sorted.

    So are folders that hold none, being empty or links that are not followed:
    one may stand where a file should, and none is left without a word.
    """

    def refuse(error):
        raise DataError(
            f"{_show(error.filename)}: cannot list the folder "
            f"({error.strerror}); check its permissions"
        )

    for parent, names, files in os.walk(folder, onerror=refuse):
        # A folder of masks may hold names like those of slices.
        names[:] = sorted(
            n for n in names if not re.search(r"(^|_)seg(_|$)", n.lower())
        )
        if not names and not files and parent != folder:
            yield parent
        links = [n for n in names if os.path.islink(os.path.join(parent, n))]
        for name in sorted(links + files):
            yield os.path.join(parent, name)


def _row(path, folder, split, layout):
    """Return the index row of a file, None if it is not a slice."""
    name = os.path.basename(path)
    match = re.fullmatch(layout.file_name, name, re.IGNORECASE)
    parents = os.path.relpath(os.path.dirname(path), folder).split(os.sep)
    label = "" if parents == ["."] else parents[0].upper()
    if not layout.class_folders:
        label = ""
    elif label and label not in layout.class_folders:
        return None
    if match is None:
        return None
    groups = match.groupdict()
    week = f"_week_{groups['week']}" if "week" in groups else ""
    return {
        "path": path,
        "subject": groups["subject"],
        "scan": groups["subject"] + week,
        "slice": int(groups["slice"]),
        "label": label,
        "split": split,
    }


def carve(subjects):
    """Return the subjects to validate on: chosen by hash, on any machine."""
    hashes = {
        s: int(hashlib.sha256(s.encode()).hexdigest()[:8], 16) / 2**32
        for s in set(subjects)
    }
    ranked = sorted(hashes, key=hashes.get)
    carved = {s for s in ranked if hashes[s] < CARVED}
    # Neither split may be empty, however few the subjects.
    return (carved or set(ranked[:1])) - set(ranked[-1:])


def _sort(index):
    """Sort an index and add the position of each slice in its scan."""
    order = index["split"].map(SPLITS.index).rename("order")
    by = ["order", "subject", "scan", "slice"]
    index = index.assign(order=order).sort_values(by, ignore_index=True)
    groups = index.groupby(["split", "scan"])["slice"]
    last = groups.transform("size") - 1
    position = groups.cumcount() / last.clip(lower=1)
    index.insert(4, "position", position.where(last > 0, 0.5))
    return index.drop(columns="order")


def _check_subjects(index, base):
    splits = index.groupby("subject")["split"].nunique()
    shared = list(splits[splits > 1].index)
    if shared:
        raise DataError(
            f"{_show(base)}: {len(shared)} subjects are in two splits, "
            f"expected none: {_some(shared)}; scores would be of images "
            "learnt by heart"
        )
    labels = index.groupby("scan")["label"].nunique()
    if (labels > 1).any():
        raise DataError(
            f"{_show(base)}: a scan is in two class folders, expected one: "
            f"{_some(labels[labels > 1].index)}"
        )


# ------------------------------------------------------------------ 3. Read
#
# One reader, in TensorFlow's graph, checks the files and feeds the training,
# so what passes the check cannot fail later. On 2 cores it decodes 4000 PNG
# (256x256) or 14000 JPEG (208x176) a second, Pillow under
# `tf.numpy_function` 2200 or 3500; besides, Python inside a pipeline can hang
# the interpreter when it ends on an error.

_NIFTI_TYPES = {
    2: "uint8",
    4: "int16",
    8: "int32",
    16: "float32",
    64: "float64",
    256: "int8",
    512: "uint16",
    768: "uint32",
    1024: "int64",
    1280: "uint64",
}


def decode(data):
    """Return the intensities (H, W), float64, in a file's contents."""
    start = tf.strings.substr(data, 0, 2)

    def png(dtype):
        image = tf.io.decode_png(data, channels=1, dtype=dtype)
        return tf.cast(image[..., 0], tf.float64)

    def jpeg():
        image = tf.io.decode_jpeg(
            data, channels=1, dct_method="INTEGER_ACCURATE"
        )
        return tf.cast(image[..., 0], tf.float64)

    def deep():
        return tf.strings.substr(data, 24, 1) == b"\x10"

    return tf.case(
        [
            (start == b"\xff\xd8", jpeg),
            (start == b"\x89P", lambda: tf.cond(
                deep(), lambda: png(tf.uint16), lambda: png(tf.uint8)
            )),
        ],
        default=lambda: _decode_nifti(data),
    )  # fmt: skip


def _decode_nifti(data):
    """Return the plane of a NIfTI-1 file whose header has been checked."""
    data = tf.cond(
        tf.strings.substr(data, 0, 2) == b"\x1f\x8b",
        lambda: tf.io.decode_compressed(data, "GZIP"),
        lambda: data,
    )
    big_endian = tf.strings.substr(data, 0, 1) == b"\x00"

    def numbers(offset, count, dtype):
        size = tf.dtypes.as_dtype(dtype).size
        part = tf.strings.substr(data, offset, count * size)
        values = tf.reshape(tf.io.decode_raw(part, tf.uint8), (count, size))
        values = tf.cond(
            big_endian, lambda: tf.reverse(values, [1]), lambda: values
        )
        return tf.reshape(tf.bitcast(values, dtype), [-1])

    shape = tf.cast(numbers(40, 8, "int16"), tf.int32)[1:3]
    code = numbers(70, 1, "int16")[0]
    scale = tf.cast(numbers(108, 3, "float32"), tf.float64)
    offset = tf.cast(scale[0], tf.int32)
    is_scaled = tf.reduce_all(tf.math.is_finite(scale)) & (scale[1] != 0)

    def voxels(dtype):
        count = tf.reduce_prod(shape)
        return tf.cast(numbers(offset, count, dtype), tf.float64)

    which = tf.argmax(tf.constant([*_NIFTI_TYPES], tf.int16) == code)
    values = tf.switch_case(
        tf.cast(which, tf.int32),
        [functools.partial(voxels, t) for t in _NIFTI_TYPES.values()],
    )
    values = tf.where(is_scaled, values * scale[1] + scale[2], values)
    return tf.transpose(tf.reshape(values, tf.reverse(shape, [0])))


def _rescale(values, low, high):
    """Return float32 intensities in [0, 1], black at `low`, white at `high`."""
    values = (tf.cast(values, tf.float64) - low) / (high - low)
    return tf.cast(tf.clip_by_value(values, 0, 1), tf.float32)


def _fingerprint(data):
    return tf.strings.to_hash_bucket_fast(data, 2**63 - 1)


@functools.cache
def _decoder():
    """Return `decode` as one compiled call, with the file's fingerprint."""
    signature = [tf.TensorSpec([], tf.string)]
    return tf.function(
        lambda data: (decode(data), _fingerprint(data)),
        input_signature=signature,
        autograph=False,
    )


def read_image(path, low, high):
    """Return one file as float32 (H, W) in [0, 1].

    Args:
        path: str, bytes or Path.
        low, high: intensities that become 0 and 1, as `verify` gives them.
    """
    data = _read_bytes(path)
    try:
        return _rescale(_decoder()(data)[0], low, high).numpy()
    except tf.errors.OpError as error:
        raise DataError(f"{_show(path)}: {_undecodable(data)}") from error


def _read_bytes(path):
    try:
        if not os.path.isfile(path):  # a pipe would be waited on for ever
            found = "not a file" if os.path.lexists(path) else "nothing there"
            raise DataError(f"{_show(path)}: found {found}, expected a file")
        if os.path.getsize(path) > MOST_BYTES:
            raise DataError(
                f"{_show(path)}: found {os.path.getsize(path)} bytes, "
                f"expected at most {MOST_BYTES}"
            )
        return Path(os.fsdecode(path)).read_bytes()
    except OSError as error:
        raise DataError(
            f"{_show(path)}: cannot read the file ({error.strerror})"
        ) from error


# ---------------------------------------------------------------- 4. Verify


class _Unfit(Exception):
    """Why a file cannot be used: what was found, what was expected."""


def verify(index, skip_bad=False):
    """Read every file once; return the index with what was found.

    Args:
        index: DataFrame of `scan`.
        skip_bad: leave out unfit files instead of refusing them all at once.

    Returns: DataFrame with the columns sha256, height, width, low and high
        (intensities that become 0 and 1) and fingerprint, by which training
        notices that a file has changed. `attrs["rejected"]` is a DataFrame
        of the files left out, in their order, with the columns path and
        reason.
    Raises:
        DataError: naming the unfit files, or the files that are in two
            splits with identical bytes; or if all images are constant.
    """
    found, notes = _inspect_all(index)
    columns = ["sha256", "height", "width", "low", "high", "fingerprint"]
    table = pd.DataFrame(found, columns=[*columns, "constant", "reason"])
    index = index.reset_index(drop=True)
    checked = index.drop(columns=columns, errors="ignore").join(table)
    checked.attrs = dict(index.attrs)
    _note_twins(checked)
    rejected = checked.loc[checked["reason"] != "", ["path", "reason"]]
    if len(rejected) and not skip_bad:
        raise DataError(_listed(rejected, len(index)))
    checked = _without(checked, rejected)
    for note, count in notes.items():
        _warn(f"{count} files {note}")
    if checked["constant"].all():
        raise DataError(
            f"all {len(checked)} images are constant, expected contrast: "
            f"{_some(checked['path'])}"
        )
    return checked.drop(columns=["constant", "reason"])


def _inspect_all(index):
    """Return per row what was found, and {note: count}."""
    found, notes = [{}] * len(index), collections.Counter()
    paths = index["path"].tolist()
    groups = index.groupby(["split", "scan"], sort=False).indices.values()
    workers = 2 * (os.cpu_count() or 1)
    with (
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        tqdm.tqdm(
            total=len(paths),
            desc="checking",
            unit="file",
            disable=True if len(paths) < QUIET_BELOW else None,
        ) as bar,
    ):
        tasks = ([paths[i] for i in rows] for rows in groups)
        for rows, results in zip(
            groups, pool.map(_inspect_scan, tasks), strict=True
        ):
            for i, (values, note) in zip(rows, results, strict=True):
                found[i] = values
                notes.update(note)
            bar.update(len(rows))
    return found, notes


def _inspect_scan(paths):
    """Return (values, notes) of each file of one scan.

    Values are a row of the table of `verify`; the reason why a file is unfit
    is "" if it is not.
    """
    results, volume = [], []
    for path in paths:
        # A column of integers with gaps would be rounded to floats.
        values, notes = {"reason": "", "fingerprint": 0}, set()
        try:
            found, image = _inspect(path, notes)
            values.update(found)
            if "low" not in found:
                volume.append((image, values, notes))
        except DataError as error:
            reason = str(error).removeprefix(f"{_show(path)}: ")
            values["reason"] = reason
        except _Unfit as error:
            values["reason"] = str(error)
        results.append((values, notes))
    if volume:
        images = [image for image, _, _ in volume]
        low, high = _window(np.concatenate([x.ravel() for x in images]))
        for image, values, notes in volume:
            values.update({"low": low, "high": high})
            seen = np.ptp(np.clip(image, low, high)) * 255 >= high - low
            if not seen and not values["constant"]:
                notes.add("show nothing: others of their scan are far brighter")
    return results


def _window(voxels):
    """Return the intensities of a scan that become 0 and 1."""
    low, high = np.percentile(voxels, PERCENTILES)
    if low == high:  # nearly all of it is background
        low, high = voxels.min(), voxels.max()
    return float(low), float(max(high, low + 1e-6 * max(1, abs(low))))


def _inspect(path, notes):
    """Return what a file holds and its image; raise `_Unfit` if unfit."""
    data = _read_bytes(path)
    if not data:
        raise _Unfit("found an empty file, expected an image")
    name, values = os.path.basename(path).lower(), {}
    if name.endswith((".nii", ".nii.gz")):
        _check_nifti(data, name.endswith(".gz"), notes)
    else:
        values = {"low": 0.0, "high": _check_picture(data, name, notes)}
    try:
        image, fingerprint = (x.numpy() for x in _decoder()(data))
    except tf.errors.OpError as error:
        raise _Unfit(_undecodable(data)) from error
    fit = np.abs(image) <= MOST_INTENSITY  # nor is a NaN
    if not fit.all():
        raise _Unfit(
            f"found {np.count_nonzero(~fit)} voxels that are NaN, infinite or "
            f"beyond {MOST_INTENSITY:g}, expected finite intensities"
        )
    values.update(
        sha256=hashlib.sha256(data).hexdigest(),
        height=image.shape[0],
        width=image.shape[1],
        fingerprint=int(fingerprint),
        constant=bool(image.min() == image.max()),
    )
    return values, image


def _undecodable(data):
    if data.startswith(b"\x89PNG"):
        kind, end = "PNG", b"IEND"
    elif data.startswith(b"\xff\xd8"):
        kind, end = "JPEG", b"\xff\xd9"
    else:
        return "found a damaged file, expected a complete image"
    state = "damaged" if end in data[-16:] else "truncated"
    return f"found a {state} {kind}, expected a complete one"


def _check_picture(data, name, notes):
    """Check a PNG or JPEG from its header; return its full scale."""
    if data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) >= 33:
        kind, depth = "png", data[24]
        width, height = struct.unpack(">II", data[16:24])
        coloured = data[25] != 0 or b"tRNS" in data
    elif data.startswith(b"\xff\xd8"):
        kind, depth = "jpeg", 8
        height, width, channels = _jpeg_header(data)
        coloured = channels != 1
        if channels == 4:
            raise _Unfit("found a CMYK image, expected grey; convert it")
    else:
        raise _Unfit(f"found {data[:8]!r}, expected a PNG or JPEG")
    if width * height > MOST_PIXELS:
        raise _Unfit(
            f"found {height}x{width} pixels, expected at most {MOST_PIXELS}"
        )
    if name.endswith(".png") != (kind == "png"):
        notes.add("named otherwise than their contents; read by contents")
    if coloured:
        _check_colour(data, kind, notes)
    return 65535.0 if depth == 16 else 255.0


def _jpeg_header(data):
    """Return height, width and channels from the frame header."""
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return struct.unpack(">HHB", data[at + 5 : at + 10])
        length = struct.unpack(">H", data[at + 2 : at + 4])[0]
        at += 1 if marker == 0xFF else 2 + length
    raise _Unfit(_undecodable(data))


def _check_colour(data, kind, notes):
    try:
        if kind == "png":
            pixels = tf.io.decode_png(data, 0, tf.uint16).numpy()
        else:
            pixels = tf.io.decode_jpeg(data, 3).numpy()
    except tf.errors.OpError as error:
        raise _Unfit(_undecodable(data)) from error
    if pixels.shape[-1] in (2, 4) and np.ptp(pixels[..., -1]):
        raise _Unfit("found transparency, expected an opaque image")
    colours = pixels[..., :3] if pixels.shape[-1] > 2 else pixels[..., :1]
    if np.ptp(colours, axis=-1).any():
        notes.add("are in colour; converted to grey by luma")


def _check_nifti(data, named_gz, notes):
    """Check a NIfTI-1 file: its header, its length, its checksum."""
    is_gz = data.startswith(b"\x1f\x8b")
    if is_gz != named_gz:
        notes.add("named otherwise than their contents; read by contents")
    stream = zlib.decompressobj(31) if is_gz else None
    try:
        header = stream.decompress(data, 352) if is_gz else data[:352]
        need = _check_nifti_header(header)
        length = len(data)
        if is_gz:
            # One byte more than needed, and some padding, is let through:
            # the rest of a bomb is never unpacked.
            rest = stream.decompress(stream.unconsumed_tail, need + (1 << 20))
            length = len(header) + len(rest)
            if length >= need and not stream.eof:
                stream.decompress(stream.unconsumed_tail, 1)
    except zlib.error as error:
        raise _Unfit(
            f"found a damaged gzip stream ({error}), expected a whole one"
        ) from error
    if length < need:
        raise _Unfit(f"found {length} bytes, expected {need}: truncated")
    if is_gz and (not stream.eof or stream.unused_data):
        found = "data after the end" if stream.eof else "no end"
        raise _Unfit(f"found {found} of the gzip stream, expected a whole one")


def _check_nifti_header(header):
    """Check the header; return the bytes that the file must hold."""
    order = "<" if header[:4] == b"\x5c\x01\0\0" else ">"
    magic = len(header) == 352 and header[344:348] == b"n+1\0"
    if not magic or struct.unpack(order + "i", header[:4])[0] != 348:
        raise _Unfit(f"found {header[:8]!r}, expected a NIfTI-1 file")
    axes, *shape = struct.unpack(order + "8h", header[40:56])
    used = shape[:axes] if 1 <= axes <= 7 else ()
    # A plane may be stored with more axes of length 1 behind its own two.
    if any(not 1 <= n <= MOST_SIDE for n in used) or len(used) < 2:
        raise _Unfit(
            f"found {axes} axes, {tuple(used)}, expected 2 of 1 to {MOST_SIDE}"
        )
    if any(n != 1 for n in used[2:]):
        raise _Unfit(f"found shape {tuple(used)}, expected one plane (H, W)")
    code = struct.unpack(order + "h", header[70:72])[0]
    if code not in _NIFTI_TYPES:
        raise _Unfit(f"found data type {code}, expected real numbers")
    offset = struct.unpack(order + "f", header[108:112])[0]
    if not 352 <= offset <= MOST_BYTES:
        raise _Unfit(f"found vox_offset {offset:g}, expected at least 352")
    slope, intercept = struct.unpack(order + "2f", header[112:120])
    # By the standard a slope of 0 says that there is none; nibabel takes NaN
    # for the same.
    unscaled = slope == 0 or np.isnan(slope)
    if not unscaled and not np.isfinite([slope, intercept]).all():
        raise _Unfit(
            f"found scl_slope {slope:g}, scl_inter {intercept:g}, expected "
            "finite numbers"
        )
    size = np.dtype(_NIFTI_TYPES[code]).itemsize
    return int(offset) + used[0] * used[1] * size


def _note_twins(checked):
    """Fill in the reason of files whose bytes are in a later split too."""
    quiet = (checked["reason"] != "").any()
    # Blank slices are alike by nature, and nothing can be learnt from them.
    alike = checked[checked["constant"].eq(False)]
    alike = alike[alike.duplicated("sha256", keep=False)]
    copies = 0
    for _, group in alike.groupby("sha256", sort=False):
        # The later split keeps its copy: a test set is not to shrink.
        kept = group.iloc[-1]
        leaked = group[group["split"] != kept["split"]]
        copies += len(group) - len(leaked) - 1
        for row in leaked.itertuples():
            checked.loc[row.Index, "reason"] = (
                f"found the same bytes in {row.split} and as "
                f"{_show(kept['path'])} in {kept['split']}, expected each "
                "image in one split"
            )
    if copies and not quiet:
        _warn(f"{copies} files repeat others of their split")


def _listed(rejected, total, advice=" (--skip-bad leaves them out)"):
    """Return one line for one file, else a count and the first lines."""
    rows = rejected.itertuples()
    lines = [f"{_show(row.path)}: {row.reason}" for row in rows]
    if len(lines) == 1:
        return lines[0]
    more = len(lines) - MOST_LISTED
    return "\n".join(
        [f"{len(lines)} of {total} files are unfit{advice}"]
        + lines[:MOST_LISTED]
        + ([f"... and {more} more"] if more > 0 else [])
    )


def _without(checked, rejected):
    """Drop the unfit files, saying so; no split may become empty."""
    kept = checked.drop(rejected.index).reset_index(drop=True)
    if len(rejected):
        names = _some(rejected["path"], most=1)
        _warn(f"{len(rejected)} unfit files left out: {names}")
    for split, part in checked.groupby("split"):
        if part.index.isin(rejected.index).all():
            lost = rejected.loc[part.index]
            listed = _listed(lost, len(part), advice="")
            raise DataError(f"{split}: no file is left; {listed}")
    kinds = {"height": int, "width": int, "low": float, "high": float}
    kept = kept.astype(kinds)
    # Last: pandas cannot `astype` or `concat` with a table among the attrs.
    kept.attrs["rejected"] = rejected.reset_index(drop=True)
    return kept


# ----------------------------------------------------------------- 5. Index


def load_index(root, dataset, skip_bad=False, image_size=None):
    """Scan and verify a data set, print what it holds, return its index.

    Args:
        root, dataset: as for `scan`.
        skip_bad: as for `verify`.
        image_size: (H, W) in pixels that will be trained at, by default
            `native_size`.

    Returns: DataFrame of `verify`; `attrs["simulated"]` tells whether a
        simulator wrote the images. It knows the labels of its subjects, so
        they are there whether or not the layout has folders for them.
    """
    index = verify(scan(root, dataset), skip_bad)
    about = _read_marker(root, index.attrs["base"])
    index.attrs["simulated"] = about is not None
    known = index["subject"].map((about or {}).get("labels", {})).fillna("")
    index["label"] = index["label"].where(index["label"] != "", known)
    for line in _summary(index, dataset, image_size):
        print(line)
    if (index["split"] == "train").sum() == 1:
        _warn("a single training image: nothing general can be learnt from it")
    if not (index["split"] == "validate").any():
        _warn("a single training subject: none is left to validate on")
    return index


def index_files(paths):
    """Return a verified index of single files, all in the test split.

    Their label is "" and their position NaN: unknown.
    """
    rows = [
        {
            "path": os.path.abspath(path),
            "subject": Path(path).name,
            "scan": Path(path).name,
            "slice": 0,
            "position": np.nan,
            "label": "",
            "split": "test",
        }
        for path in paths
    ]
    return verify(pd.DataFrame(rows))


def native_size(index):
    """Return the most common (height, width) in pixels; the larger of two."""
    sizes = collections.Counter(zip(index["height"], index["width"]))  # noqa: B905
    height, width = max(sizes, key=lambda size: (sizes[size], size))
    return int(height), int(width)


def _read_marker(root, base):
    """Return what the simulator noted, None for images it did not write."""
    for path in (Path(folder) / MARKER for folder in (root, base)):
        if not os.path.exists(path):
            continue
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            about = None
        if not isinstance(about, dict):
            raise DataError(
                f"{_show(path)}: found a damaged file, expected what the "
                "simulator wrote"
            )
        return about
    return None


def _summary(index, dataset, image_size):
    """Yield lines: splits, labels, plane sizes, what was left out."""
    kind = "simulated, " if index.attrs["simulated"] else ""
    yield f"{_show(index.attrs['base'])} ({kind}layout {dataset})"
    for split in SPLITS:
        part = index[index["split"] == split]
        labels = part["label"][part["label"] != ""].value_counts()
        counts = "".join(f", {labels[x]} {x}" for x in sorted(labels.index))
        subjects = part["subject"].nunique()
        yield f"{split:9}{subjects} subjects, {len(part)} images{counts}"
    sizes = index.groupby(["height", "width"]).size()
    sizes = sizes.sort_values(ascending=False, kind="stable").items()
    height, width = image_size or native_size(index)
    yield (
        "plane sizes: "
        + ", ".join(f"{h}x{w} ({count})" for (h, w), count in sizes)
        + f"; padded or cropped to {height}x{width}"
    )
    if dataset == "adni" and not index.attrs["simulated"]:
        yield (
            "ids may name scans, not persons: that no person is in two "
            "splits cannot be proved"
        )
    if ignored := index.attrs["ignored"]:
        names = _some(map(os.path.basename, ignored))
        yield f"{len(ignored)} files ignored: {names}"


# --------------------------------------------------------------- 6. Batches


def fit_to(image, size, resize=False):
    """Return an image (H, W) at `size`, in a dataset's graph or outside.

    Each axis is padded with black or cropped about its centre. With `resize`
    the image is first scaled, its aspect ratio kept, so that it just fits.
    """
    image = image[..., None]
    if resize:
        image = tf.image.resize(
            image, size, preserve_aspect_ratio=True, antialias=True
        )
        image = tf.clip_by_value(image, 0, 1)
    return tf.image.resize_with_crop_or_pad(image, *size)[..., 0]


def steps_per_epoch(count, batch_size):
    """Return the batches that `count` images make, the last maybe smaller."""
    return -(-count // batch_size)


def divisible_batch_size(count, batch_size, parts):
    """Return the largest batch size up to this one that makes `parts` parts.

    None of them empty, also of the last batch of an epoch of `count` images,
    which may be smaller. 0 if there are fewer images than parts.

    >>> divisible_batch_size(33, 16, 2)
    15
    """
    for size in range(batch_size, parts - 1, -1):
        if count % size == 0 or count % size >= parts:
            return size
    return 0


def make_dataset(
    index,
    image_size,
    batch_size,
    *,
    seed=None,
    epochs=1,
    start_step=0,
    parts=(0, 1, 1),
    resize=False,
    cache=False,
):
    """Return batches of images as a `tf.data.Dataset`.

    The order of an epoch is a function of (seed, epoch) only, so starting at
    a later step gives exactly the rest of the uninterrupted sequence.

    Args:
        index: DataFrame with the columns path, low, high and fingerprint.
        image_size: (H, W) in pixels; see `fit_to` for `resize`.
        batch_size: int >= 1. No batch straddles two epochs.
        seed: int >= 0, None for the order of the index.
        epochs: int >= 0, passes over the index.
        start_step: int >= 0, batches left out, counted over all epochs.
        parts: (first, last, count): parts `first` to `last` - 1 of each batch,
            one after the other, of `count` parts that are as large as each
            other, or one image larger.
        resize: bool, scale images instead of only padding and cropping.
        cache: bool, hold all images in memory, rounded to 1/255.

    Returns: Dataset of float32 (B, H, W, 1) in [0, 1].
    Raises:
        ResourceError: if a cache would take half of the free memory.
    """
    size = tuple(int(n) for n in image_size)
    order = _batches(len(index), batch_size, seed, epochs, start_step, parts)
    if cache:
        images = _decode_all(index, size, resize)

        def load(rows):
            return _rescale(tf.gather(images, rows), 0.0, 255.0)[..., None]

    else:
        load_one = _loader(index, size, resize)
        spec = tf.TensorSpec(size, tf.float32)

        def load(rows):
            return tf.map_fn(load_one, rows, fn_output_signature=spec)[
                ..., None
            ]

    return _loaded(order, load)


def array_batches(
    arrays, batch_size, *, seed=None, epochs=1, start_step=0, parts=(0, 1, 1)
):
    """Return batches of a structure of arrays, ordered as `make_dataset`."""
    with tf.device("CPU"):
        arrays = tf.nest.map_structure(tf.constant, arrays)
    count = len(tf.nest.flatten(arrays)[0])
    order = _batches(count, batch_size, seed, epochs, start_step, parts)

    def load(rows):
        return tf.nest.map_structure(lambda a: tf.gather(a, rows), arrays)

    return _loaded(order, load)


def _loaded(order, load):
    """Return the batches that `load` makes of those of row numbers."""
    # It has no Python loop to convert, which would take most of the time.
    load = tf.autograph.experimental.do_not_convert(load)
    return order.map(load, tf.data.AUTOTUNE, deterministic=True).prefetch(2)


def distributed(strategy, batches):
    """Return batches of which each replica gets its part.

    Args:
        strategy: of `tf.distribute`.
        batches: function that returns a `tf.data.Dataset`; it takes `parts`,
            see `make_dataset`.
    """
    replicas = strategy.num_replicas_in_sync
    if replicas == 1:
        return batches()

    def of_worker(context):
        own = replicas // context.num_input_pipelines
        first = own * context.input_pipeline_id
        return batches(parts=(first, first + own, replicas))

    return strategy.distribute_datasets_from_function(of_worker)


def jitter(images, seed, numbers, shift=4, gain=0.1):
    """Return images moved a little and made a little brighter or darker.

    What happens to an image is a function of (seed, number) only: it is the
    same in any batch, in a dataset's graph or outside.

    >>> images = next(iter(make_dataset(index, (128, 112), 8)))
    >>> jitter(images, seed=0, numbers=range(8)).shape
    TensorShape([8, 128, 112, 1])

    Args:
        images: (B, H, W, 1), intensities in [0, 1].
        seed: int >= 0; another one, say of another epoch, moves otherwise.
        numbers: (B,) ints >= 0, say the rows of the index.
        shift: int >= 0, pixels that an image moves at most, each way; black
            enters at the border.
        gain: in [0, 1]; intensities are multiplied by a factor of 1 - gain
            to 1 + gain and clipped.

    Returns: float32 (B, H, W, 1) in [0, 1].
    """
    images = tf.convert_to_tensor(images, tf.float32)
    seed, numbers = tf.cast(seed, tf.int64), tf.cast(numbers, tf.int64)
    uniforms = _uniforms()(seed, numbers)
    # 0 to 2 * shift: where the image begins inside its black margin.
    begin = tf.cast(uniforms[:, :2] * (2 * shift + 1), tf.int32)
    margin = (shift, shift)
    images = tf.pad(images, ((0, 0), margin, margin, (0, 0)))
    for axis in (1, 2):
        kept = tf.range(tf.shape(images)[axis] - 2 * shift)
        images = tf.gather(
            images, begin[:, axis - 1, None] + kept, axis=axis, batch_dims=1
        )
    factor = 1 + gain * (2 * uniforms[:, 2] - 1)
    return tf.clip_by_value(images * factor[:, None, None, None], 0, 1)


@functools.cache
def _uniforms():
    """Return a compiled call: seed, numbers (B,) -> uniform (B, 3)."""

    def draw(seed, numbers):
        # A stateless draw takes one seed, so the images take turns; the loop
        # runs inside the graph, 20 microseconds an image.
        return tf.map_fn(
            lambda number: tf.random.stateless_uniform(
                [3], [seed, number], alg="philox"
            ),
            numbers,
            fn_output_signature=tf.TensorSpec([3], tf.float32),
        )

    signature = [tf.TensorSpec([], tf.int64), tf.TensorSpec([None], tf.int64)]
    return tf.function(draw, input_signature=signature, autograph=False)


def _batches(count, batch_size, seed, epochs, start_step, parts=(0, 1, 1)):
    """Return a Dataset of batches of row numbers, or of parts of each."""
    if count == 0:
        raise DataError("no images, expected at least one")
    steps = steps_per_epoch(count, batch_size)
    first, skipped = divmod(start_step, steps)

    @tf.autograph.experimental.do_not_convert
    def epoch_batches(epoch):
        rows = _order(count, seed, epoch)
        begin = tf.where(epoch == first, skipped * batch_size, 0)
        rows = tf.data.Dataset.from_tensor_slices(rows[begin:])
        return rows.batch(batch_size)

    order = tf.data.Dataset.range(first, max(first, epochs))
    order = order.flat_map(epoch_batches)
    left = max(0, steps * epochs - start_step)
    begin, end, total = parts
    if total > 1:
        numbers = tf.range(begin, end)

        @tf.autograph.experimental.do_not_convert
        def cut(rows):
            size = tf.size(rows)
            return tf.data.Dataset.from_tensor_slices(numbers).map(
                lambda k: rows[size * k // total : size * (k + 1) // total]
            )

        order = order.flat_map(cut)
        left *= end - begin
    return order.apply(tf.data.experimental.assert_cardinality(left))


def _order(count, seed, epoch):
    """Return the rows of an epoch in its order."""
    if seed is None:
        return tf.range(count)
    # The stream of a named algorithm is the same on every device and with
    # every version of TensorFlow; that of a shuffle is not promised.
    keys = tf.random.stateless_uniform(
        [count],
        [tf.cast(seed, tf.int64), tf.cast(epoch, tf.int64)],
        minval=None,
        maxval=None,
        dtype=tf.int64,
        alg="philox",
    )
    return tf.argsort(keys)


def _loader(index, size, resize):
    """Return a function: row number -> image, inside a dataset's graph."""
    with tf.device("CPU"):  # bytes: a name need not be valid UTF-8
        paths = tf.constant([os.fsencode(path) for path in index["path"]])
        low = tf.constant(index["low"].to_numpy("float64"))
        high = tf.constant(index["high"].to_numpy("float64"))
        prints = tf.constant(index["fingerprint"].to_numpy("int64"))
    read = _reader(size, resize)

    def load(row):
        data = tf.io.read_file(paths[row])
        same = tf.debugging.Assert(
            _fingerprint(data) == prints[row],
            ["file changed since it was checked", paths[row]],
        )
        with tf.control_dependencies([same]):
            data = tf.identity(data)
        return read(data, low[row], high[row])

    return load


@functools.cache
def _reader(size, resize):
    """Return a compiled call: contents, low, high -> image (H, W).

    Compiled once, not for every dataset: a run makes a score of them.
    """

    def read(data, low, high):
        image = _rescale(decode(data), low, high)
        return tf.ensure_shape(fit_to(image, size, resize), size)

    number = tf.TensorSpec([], tf.float64)
    signature = [tf.TensorSpec([], tf.string), number, number]
    return tf.function(read, input_signature=signature, autograph=False)


@contextlib.contextmanager
def naming_files():
    """Turn TensorFlow's error over a file gone or changed into a `DataError`.

    Wrap what iterates over a dataset in it: training, evaluation.
    """
    try:
        yield
    except (tf.errors.OpError, UnicodeDecodeError) as error:
        text = str(error)
        if isinstance(error, UnicodeDecodeError):
            # TensorFlow cannot make its error from a path that is not UTF-8.
            text = os.fsdecode(error.object)
        changed = re.search(r"\[(file changed [^]]*)\] \[(.*)\]", text)
        lost = re.search(rf"(?s).*: ((?:/|\w:).*?); ({_losses()})", text)
        if changed:
            path, _ = codecs.escape_decode(os.fsencode(changed[2]))
            raise DataError(f"{_show(path)}: {changed[1]}") from error
        if lost:
            raise DataError(
                f"{_show(lost[1])}: {lost[2]}, expected the file that was "
                "checked"
            ) from error
        raise


def _losses():
    """Return a pattern of what the system says of a file it cannot read."""
    names = "ENOENT ENOTDIR EISDIR EACCES EPERM EIO ELOOP ESTALE".split()
    numbers = [getattr(errno, n) for n in names if hasattr(errno, n)]
    return "|".join(re.escape(os.strerror(n)) for n in numbers)


def _decode_all(index, size, resize):
    """Return all images of an index as one uint8 tensor (N, H, W)."""
    need, free = len(index) * size[0] * size[1], _free_memory()
    if need > free / 2:
        raise utils.ResourceError(
            f"{len(index)} images of {size[0]}x{size[1]} take {need >> 20} MB, "
            f"over half of the free {free >> 20} MB; use --no-cache"
        )
    images, at = np.empty((len(index), *size), np.uint8), 0
    with naming_files():
        for batch in make_dataset(index, size, 64, resize=resize):
            block = np.rint(batch[..., 0].numpy() * 255)
            images[at : at + len(block)] = block
            at += len(block)
    with tf.device("CPU"):
        return tf.constant(images)


def _free_memory():
    """Return the bytes of memory that can still be had."""
    try:
        lines = Path("/proc/meminfo").read_text()
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", lines)[1])
    except (OSError, TypeError):
        return 4 << 30  # not Linux: a size that any machine of use has


# ------------------------------------------------------------- 7. Simulator
#
# Lengths are in mm about the anterior commissure, axes (z, y, x) pointing up,
# forward and right, as the planes are stacked.

LESION_RADIUS = (0.04, 0.09)  # of the long side of the image
LESION_CONTRAST = (0.25, 0.5)  # of the intensity range, up or down
BRAIN_PLANES = {"oasis": 32, "adni": 20}
PELVIS_PLANES = 20
# Slice positions, 11 to 21 mm, where the bodies of the lateral ventricles lie
# and ill brains stand out best.
VENTRICLE_POSITIONS = (0.5, 0.8)
_BRAIN_BOTTOM, _BRAIN_TOP = -6, 28  # from below the ventricles to above
_BRAIN_HEIGHT, _BRAIN_MIDDLE = 196, -18  # of the plane, along y
_TEMPLATE_ORIGIN = (72, 134, 98)
_VENTRICLES = ((-14, 32), (-58, 34), (-34, 34))  # box around them
_PELVIS_HEIGHT = 380  # of the plane, from left to right
# Solid, centre (up, left, back), radii, intensity, strength of its texture;
# True: there is one on either side. Later ones lie over earlier ones.
_PELVIS = (
    ("skin and fat", (0, 0, 0), (400, 185, 118), 0.78, 0.05, False),
    ("muscle", (0, 0, -2), (400, 165, 95), 0.30, 0.08, False),
    ("gluteus", (-10, 75, 62), (90, 62, 34), 0.24, 0.10, True),
    ("pelvic fat", (0, 0, 10), (400, 62, 72), 0.72, 0.07, False),
    ("femoral head", (12, 98, -12), (30, 27, 26), 0.60, 0.05, True),
    ("acetabulum", (10, 66, -6), (45, 9, 36), 0.15, 0.04, True),
    ("obturator", (0, 50, 6), (60, 10, 38), 0.27, 0.06, True),
    ("bladder wall", (38, 0, -24), (32, 40, 31), 0.30, 0.03, False),
    ("bladder", (38, 0, -24), (28, 36, 27), 0.95, 0.02, False),
    ("prostate", (-6, 0, 0), (24, 27, 21), 0.50, 0.10, False),
    ("central gland", (-5, 0, -4), (18, 17, 13), 0.36, 0.25, False),
    ("rectal wall", (0, 0, 40), (400, 20, 18), 0.35, 0.05, False),
    ("rectum", (0, 0, 40), (400, 16, 14), 0.12, 0.30, False),
)


@functools.cache
def _anatomy():
    """Return maps of the MNI152 brain, 1 mm: tissues, and three of pull.

    `tissues` is (4, z, y, x): grey matter, white matter, fluid, brain. The
    pull points to the ventricles, its length is 1 at most, at their wall.
    """
    load = ("template", "gm_template", "wm_template")
    head, grey, white = (
        getattr(mni152, f"load_mni152_{name}")(resolution=1)
        .get_fdata(dtype=np.float32)
        .transpose()
        for name in load
    )
    brain = ndimage.binary_fill_holes(head > 0.15).astype(np.float32)
    brain = ndimage.gaussian_filter(brain, 0.7)
    fluid = np.clip(brain - grey - white, 0, 1)
    box = tuple(
        slice(low + origin, high + origin)
        for (low, high), origin in zip(
            _VENTRICLES, _TEMPLATE_ORIGIN, strict=True
        )
    )
    ventricles = np.zeros_like(fluid)
    parts, count = ndimage.label(fluid[box] > 0.5)
    sizes = ndimage.sum_labels(parts > 0, parts, range(1, count + 1))
    ventricles[box] = parts == 1 + np.argmax(sizes)
    pull = np.stack(np.gradient(ndimage.gaussian_filter(ventricles, 4)))
    pull /= np.linalg.norm(pull, axis=0).max()
    # Averaging many people has filled the sulci: grey matter that is darker
    # than its surroundings is where they were.
    dark = ndimage.gaussian_filter(head, 2) - head - 0.005
    fluid = fluid + 6 * np.clip(dark, 0, 0.2) * (grey > 0.3)
    return np.stack([grey, white, fluid, brain]), pull


def _warp(rng, axes, spacing, spread):
    """Return a smooth random displacement (3, *lattice) in mm.

    Normal knots `spacing` mm apart along each of the axes (in mm), between
    which cubic B-splines run.
    """
    knots = [int(np.ptp(axis) // spacing) + 4 for axis in axes]
    field = rng.normal(0, spread, (3, *knots))
    for axis, count in zip(axes, knots, strict=True):
        at = (axis - axis.min()) / spacing + 1
        d = np.abs(at[:, None] - np.arange(count))
        basis = np.where(
            d < 1, 2 / 3 - d**2 + d**3 / 2, np.clip(2 - d, 0, 2) ** 3 / 6
        )
        # The axis done goes last, so that the next one comes second.
        field = np.einsum("ck...,nk->c...n", field, basis)
    return field


def _rician(rng, image, sigma):
    noise = rng.normal(0, sigma, (2, *image.shape))
    return np.hypot(image + noise[0], noise[1])


def _simulate_brain(rng, label, size, planes):
    """Return axial slices (planes, H, W) of a brain, [0, 1], front on top."""
    height, width = size, 4 * round(7 * size / 32)
    pixel = _BRAIN_HEIGHT / size
    axes = (
        np.linspace(_BRAIN_BOTTOM, _BRAIN_TOP, planes),
        _BRAIN_MIDDLE - (np.arange(height) - (height - 1) / 2) * pixel,
        (np.arange(width) - (width - 1) / 2) * pixel,
    )
    ill = label == "AD"
    tissues, pull = _anatomy()
    lattice = np.stack(np.meshgrid(*axes, indexing="ij"))
    affine = np.diag(rng.uniform(0.94, 1.06, 3)) + rng.normal(0, 0.02, (3, 3))
    shift = rng.normal(0, 1.5, 3) + _TEMPLATE_ORIGIN
    at = np.einsum("ij,j...->i...", affine, lattice)
    at += shift[:, None, None, None]
    at += _warp(rng, axes, 40, 4.5) + _warp(rng, axes, 12, 3.5)
    at = at.astype(np.float32)
    widening = np.float32(rng.normal(3.2 if ill else 0.3, 0.6))  # of a wall
    at = at + widening * _sample(pull, at)

    *odds, brain = _sample(tissues, at)
    # To the third power: the averaged anatomy must not look like fog. More
    # fluid and less grey matter in ill brains thin the cortex.
    weights = (0.92, 1.05, 1.3) if ill else (1, 1.05, 1)
    odds = [(w * p) ** 3 + 1e-6 for w, p in zip(weights, odds, strict=True)]
    levels = rng.uniform((0.57, 0.86, 0.14), (0.65, 0.92, 0.22))
    image = np.einsum("t,t...->...", levels, odds) / sum(odds)
    blur = 0.6 * size / 128
    image = ndimage.gaussian_filter(image, (0, blur, blur))
    bias = rng.uniform(-0.08, 0.08, 3) / 100
    image = image * (1 + np.einsum("i,i...->...", bias, lattice))
    image = _rician(rng, image, 0.008 * levels[1])
    return np.clip(image * np.clip(2 * brain - 0.5, 0, 1), 0, 1)


def _sample(maps, at):
    return np.stack(
        [ndimage.map_coordinates(m, at, np.float32, order=1) for m in maps]
    )


def _simulate_pelvis(rng, size):
    """Return slices (planes, H, W) of a pelvis, int16, left to right down."""
    width = size * 9 // 16 if rng.random() < 1 / 6 else size // 2
    pixel = _PELVIS_HEIGHT / size
    axes = (
        np.linspace(-30, 45, PELVIS_PLANES),
        (np.arange(size) - (size - 1) / 2) * pixel,
        (np.arange(width) - (width - 1) / 2) * pixel * 1.25,
    )
    at = np.stack(np.meshgrid(*axes, indexing="ij"))
    at += _warp(rng, axes, 60, 4) + _warp(rng, axes, 20, 1.5)
    texture = ndimage.gaussian_filter(
        rng.normal(size=at.shape[1:]), (0.5, 1, 1)
    )
    texture /= texture.std()
    image = np.zeros(at.shape[1:])
    for _, centre, radii, level, strength, paired in _PELVIS:
        centre = np.array(centre) * rng.uniform(0.95, 1.05, 3)
        centre += rng.normal(0, 1.5, 3)
        radii = np.array(radii) * rng.uniform(0.9, 1.1, 3)
        level = level * rng.uniform(0.9, 1.1) * (1 + strength * texture)
        for side in (1, -1) if paired else (1,):
            away = at - (centre * (1, side, 1))[:, None, None, None]
            away = np.linalg.norm(away / radii[:, None, None, None], axis=0)
            inside = np.clip((1 - away) * radii.min() / pixel + 0.5, 0, 1)
            image += inside * (level - image)
    image = _rician(rng, np.clip(image, 0, None), 0.015)
    return np.rint(image * rng.uniform(300, 3000)).astype(np.int16)


def ventricle_area(images):
    """Return the share of each image's pixels that ventricles cover.

    Counted are dark pixels deep inside the brain: below half of its bright
    level, and further from its outline than half of the deepest point.

    Args:
        images: (B, H, W) or (B, H, W, 1), intensities in [0, 1].

    Returns: float64 (B,); 0 for a blank image.
    """
    return np.array([_ventricle_area(i) for i in np.asarray(images)])


def _ventricle_area(image):
    image = image.reshape(image.shape[:2])
    depth = _depth(image)
    if not depth.any():
        return 0.0
    bright = np.percentile(image[depth > 0], 90)
    dark = (image < bright / 2) & (depth > depth.max() / 2)
    return float(ndimage.binary_opening(dark).mean())


def _depth(image):
    """Return how many pixels each one is inside the head, (H, W)."""
    parts, count = ndimage.label(image > 0.08)
    if not count:
        return np.zeros(image.shape)
    largest = 1 + np.argmax(np.bincount(parts.ravel())[1:])
    head = ndimage.binary_fill_holes(parts == largest)
    head = np.pad(head, 1)  # the frame's edge is an outline too
    return ndimage.distance_transform_edt(head)[1:-1, 1:-1]


def ventricle_areas(images, positions):
    """Return the pixels that ventricles cover in slices of simulated brains.

    `ventricle_area` where it tells ill brains from others. Only the image is
    measured, so a generated slice will do: its condition gives its position.

    Args:
        images: (N, H, W) or (N, H, W, 1), intensities in [0, 1].
        positions: (N,) slice positions in [0, 1].

    Returns: float64 (N,); NaN outside of `VENTRICLE_POSITIONS`, so
        `np.nanmean` gives the mean over the slices that count.
    """
    images, positions = np.asarray(images), np.asarray(positions)
    low, high = VENTRICLE_POSITIONS
    counts = (low <= positions) & (positions <= high)
    areas = np.full(len(images), np.nan)
    height, width = images.shape[1:3]
    areas[counts] = ventricle_area(images[counts]) * height * width
    return areas


def add_lesion(image, seed):
    """Add a simulated lesion: a round, soft, bright or dark blob in the head.

    Its place, radius (`LESION_RADIUS`) and contrast (`LESION_CONTRAST`) are
    random; brighter or darker wherever there is room for its contrast.

    Args:
        image: (H, W), intensities in [0, 1].
        seed: int or sequence of int >= 0, of every random choice.

    Returns: image (H, W) float32; mask (H, W) bool of the pixels that take at
        least half of the contrast, none in a blank image.
    """
    rng = np.random.default_rng(seed)
    radius = rng.uniform(*LESION_RADIUS) * max(image.shape)
    contrast = rng.uniform(*LESION_CONTRAST)
    depth = _depth(image)
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


def simulate(
    dest, layout="oasis", subjects=60, image_size=128, seed=0, workers=None
):
    """Write a data set of simulated slices, return its folder.

    Subject k of a seed is the same whatever the other arguments but the
    layout and size. A folder that holds the same simulation is kept.

    Args:
        dest: folder to make.
        layout: key of `LAYOUTS`; "hipmri" gives pelvises, others brains.
        subjects: int >= 3; about 75 % train, 10 % validate, 15 % test.
        image_size: long side in pixels, a multiple of 16.
        seed: int >= 0.
        workers: threads, by default one a core. SciPy releases the
            interpreter lock: two threads are 1.95 times as fast as one.

    Raises:
        DataError: if `dest` holds anything else.
    """
    dest = Path(dest)
    settings = Simulate(
        dest=str(dest),
        layout=layout,
        subjects=subjects,
        image_size=image_size,
        seed=seed,
    )
    about = _about(settings)
    if _holds(dest, about):
        return dest
    dest.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(
        tempfile.mkdtemp(prefix=f"{dest.name}.tmp-", dir=dest.parent)
    )
    temporary.chmod(0o755)  # as of any folder, not as of a secret one
    try:
        _simulate_all(temporary, settings, workers or os.cpu_count() or 1)
        utils.write_json(temporary / MARKER, about)
        try:
            if dest.exists():
                dest.rmdir()
            os.rename(temporary, dest)
        except OSError:  # unless another process was faster
            if not _holds(dest, about):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return dest


def simulated_folder(subjects, layout="oasis", image_size=128):
    """Return a folder in `data`, simulated now unless it is there.

    Its name is `simulated-N` for the default layout and size, otherwise
    `simulated-LAYOUT-N-SIZE`; for the arguments see `simulate`.
    """
    name = f"simulated-{subjects}"
    if (layout, image_size) != ("oasis", 128):
        name = f"simulated-{layout}-{subjects}-{image_size}"
    return simulate(Path("data") / name, layout, subjects, image_size)


def _about(settings):
    """Return what the marker file of a simulation says."""
    people = range(settings.subjects)
    return {
        "about": "simulated: brains from the MNI152 anatomy, pelvises from "
        "simple solids; no person was scanned",
        "layout": settings.layout,
        "subjects": settings.subjects,
        "image_size": settings.image_size,
        "seed": settings.seed,
        "labels": {_subject(settings, k): _label(settings, k) for k in people},
    }


def _subject(settings, number):
    first = {"oasis": 1, "adni": 100_001, "hipmri": 4}[settings.layout]
    return f"{first + number:03d}"


def _label(settings, number):
    if settings.layout == "hipmri":
        return ""
    return "AD" if number % 2 else "NC"


def _holds(dest, about):
    """Tell whether a folder holds this simulation; refuse any other."""
    if not dest.exists() or (dest.is_dir() and not any(dest.iterdir())):
        return False
    try:
        if json.loads((dest / MARKER).read_text(encoding="utf-8")) == about:
            return True
        found = "another simulation"
    except (OSError, ValueError):
        found = "other files"
    raise DataError(
        f"{_show(dest)}: found {found}, expected a new or an empty folder"
    )


def _simulate_all(folder, settings, workers):
    _anatomy() if settings.layout != "hipmri" else None
    numbers = range(settings.subjects)
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    bar = tqdm.tqdm(
        total=len(numbers), desc="simulating", unit="subject", disable=None
    )
    with pool, bar:
        work = functools.partial(_simulate_subject, folder, settings)
        try:
            for _ in pool.map(work, numbers):
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _simulate_subject(folder, settings, number):
    """Write the slices of one subject."""
    layout = settings.layout
    label, subject = _label(settings, number), _subject(settings, number)
    rng = np.random.default_rng([settings.seed, number])
    parent = folder / _split_folder(settings, number)
    if layout == "hipmri":
        for k, plane in enumerate(_simulate_pelvis(rng, settings.image_size)):
            data = nibabel.Nifti1Image(plane, np.eye(4)).to_bytes()
            path = parent / f"case_{subject}_week_0_slice_{k}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress(data, mtime=0))
        return
    images = _simulate_brain(
        rng, label, settings.image_size, BRAIN_PLANES[layout]
    )
    first = int(rng.integers(60, 90))
    for k, image in enumerate(images):
        image = Image.fromarray(np.rint(image * 255).astype(np.uint8))
        if layout == "adni":
            path = parent / label / f"{subject}_{first + k}.jpeg"
        else:
            path = parent / f"case_{subject}_slice_{k}.nii.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **({"quality": 95} if layout == "adni" else {}))


def _split_folder(settings, number):
    """Return the folder of a subject's split; ADNI has none to validate."""
    count = settings.subjects
    test = max(1, round(0.15 * count))
    validate = 0 if settings.layout == "adni" else max(1, round(0.1 * count))
    train = count - validate - test
    split = SPLITS[(number >= train) + (number >= train + validate)]
    return LAYOUTS[settings.layout].folders[split]


# ---------------------------------------------------------- 8. Command line


@dataclasses.dataclass(frozen=True)
class Check:
    """Show what would be trained on, and every file that cannot be."""

    dir: str = utils.positional("folder of a data set")
    dataset: str = utils.flag("auto", "its layout", choices=("auto", *LAYOUTS))
    skip_bad: bool = utils.flag(False, "leave out unfit files")

    def __post_init__(self):
        utils.check_fields(self)


@dataclasses.dataclass(frozen=True)
class Simulate:
    """Write simulated slices in the layout of a real data set."""

    dest: str = utils.positional("folder to make")
    layout: str = utils.flag(
        "oasis", "layout of the files", choices=tuple(LAYOUTS)
    )
    subjects: int = utils.flag(60, "simulated people", 3, 100_000)
    image_size: int = utils.flag(
        128, "long side in pixels, a multiple of 16", 32, 1024
    )
    seed: int = utils.flag(0, "seed of every random choice", 0, 2**31 - 1)

    def __post_init__(self):
        utils.check_fields(self)
        if self.image_size % 16:
            raise utils.FlagError(
                f"--image-size: {self.image_size} is not a multiple of 16"
            )


def main(argv):
    """Run a verb of the command line."""
    verbs = {"check": Check, "simulate": Simulate}
    verb, options = utils.parse_verbs(verbs, argv, description=__doc__)
    if verb == "simulate":
        print(simulate(**dataclasses.asdict(options)))
        return
    layout = options.dataset
    if layout == "auto":
        layout = detect_layout(options.dir)
    index = load_index(options.dir, layout, options.skip_bad)
    for row in index.attrs["rejected"].itertuples():
        print(f"left out {_show(row.path)}: {row.reason}")


if __name__ == "__main__":
    utils.run_main(main)
