"""Slices on disk -> checked and decoded once -> batches; makers of slices.

    python dataset.py check DIR
        what would be trained on; problem files by name
    python dataset.py slice SRC DEST
        volumes (NIfTI, Analyze, MGZ, MINC) cut into slices that train.py reads
    python dataset.py simulate DEST --layout oasis --subjects 60
        simulated slices in the layout of a real data set

Sections: 1. Layouts, 2. Scan, 3. Read one file, 4. Decode once, 5. Load,
6. Batches, 7. Simulator, 8. Slicing of volumes, 9. Command line.
"""

import collections
import contextlib
import csv
import dataclasses
import errno
import fnmatch
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import statistics
import tempfile
import time
import unicodedata
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from tyro.conf import Positional, arg

import utils
from utils import DataError, FlagError, ndimage, pd, tf, warn

Image = utils.lazy_import("PIL.Image")
ImageOps = utils.lazy_import("PIL.ImageOps")
mni152 = utils.lazy_import("nilearn.datasets")
interpolate = utils.lazy_import("scipy.interpolate")
nibabel = utils.lazy_import("nibabel")
concurrent = utils.lazy_import("tqdm.contrib.concurrent")

SPLITS = ("train", "validate", "test")
SHARES = (0.7, 0.15, 0.15)  # of subjects, where no folder gives the split
CARVED = 0.1  # share of training subjects that becomes a missing split
MARKER = "simulated.json"  # left beside simulated slices
OURS = {MARKER, "manifest.csv", "orientation.png"}  # no files of a data set
CACHE = Path("data") / "cache"  # of decoded images
CACHE_FORMAT = 5  # to be raised when files are decoded in another way
CACHE_DAYS = 30  # that an entry is kept without being used
PERCENTILES = (0.5, 99.5)  # of a scan's voxels: black and white of NIfTI
WHITE = 99.9  # percentile of training pixels: white of dark PNG and JPEG
DARK = 0.25  # of full scale: a data set that is darker is brightened
INTENSITY_RULE = (
    "PNG and JPEG: 0 to full scale of the bit depth; where the training images "
    f"use less than {DARK} of it, to percentile {WHITE} of up to 256 of them; "
    f"NIfTI: percentiles {PERCENTILES[0]} to {PERCENTILES[1]} of each "
    "scan; clipped to [0, 1]"
)
MOST_PIXELS = 64_000_000  # of an image; more is taken for a bomb
MOST_BYTES = 1 << 25  # of a slice, packed or not
MOST_INTENSITY = 1e30  # of a voxel; more is a damaged number or scale
MOST_LISTED = 20  # problems listed in one error
MOST_CUT = 0.1  # share of training images whose content --image-size may cut
MOST_SLICES = 512  # of a subject on average; more are not of one person

# --------------------------------------------------------------- 1. Layouts


class Layout(NamedTuple):
    """How the files of a data set are called."""

    prefix: str  # of a split's folder, before "train" or "test"
    pattern: str | None  # regex of paths below that folder; None: to be guessed
    name: str  # of a file; subject and slice go into it


LAYOUTS = {
    "oasis": Layout(
        "keras_png_slices_",
        r"(?is)^(.*/)?case_(?P<subject>\d+)_slice_(?P<slice>\d+)(\.nii)?"
        r"\.(png|jpe?g)$",
        "case_{}_slice_{}.nii.png",
    ),
    "hipmri": Layout(
        "keras_slices_",
        r"(?is)^(.*/)?case_(?P<subject>\d+)_week_(?P<week>\d+)"
        r"_slice_(?P<slice>\d+)\.nii(\.gz)?$",
        "case_{}_week_0_slice_{}.nii.gz",
    ),
    "adni": Layout(
        "",
        r"(?is)^((?P<label>[^/]+)/)?(.*/)?(?P<subject>\d+)_(?P<slice>\d+)"
        r"\.(png|jpe?g)$",
        "{}_{}.jpeg",
    ),
    "folder": Layout("", None, "any.png, .jpeg, .nii or .nii.gz"),
}
SPLIT_NAMES = {  # of folders, whatever their case -> the split they hold
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validate", "validation", "valid", "val"), "validate"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SUFFIX = re.compile(r"(?i)(\.(png|jpe?g|nii|img|hdr|mgz|mgh|mnc|gz))+$")
IMAGE_FILE = re.compile(r"(?is)(.*/)?[^./][^/]*\.(png|jpe?g|nii|nii\.gz)")
# Folders and files of masks, which may have names like those of slices.
MASKS = re.compile(
    r"(?i)(.*[\W_\d])?([a-z]*seg(m(entation)?(class|object)?)?|[a-z]*mask|msk|"
    r"gt|label(s?tr|s?ts)?|annotation|ground[\W_]?truth|wmparc|ribbon|"
    r".*\+aseg)s?\d*([\W_].*)?"
)
# How a path names a subject, surely enough to look for it anywhere.
SUBJECTS = (
    r"sub-[^\W_]+",  # BIDS
    r"\d{3}_S_\d{4,5}",  # ADNI
    r"OAS[1-9]_?\d{4,5}",  # OASIS
    r"(?:subject|subj|sub|patient|pat|case|person|volunteer)[-_ ]?\d+",
)
# What a slice number follows, to be told from others: sub-03_z001_T1w.
NUMBER = (
    r"(?:.*[^a-z])?(?:(?:z|slice|slc)[-_ ]?|(?:img|image|frame)[-_ ]?"
    r"(?:\d+[-_ ])*)(?P<slice>\d+)"
)
# What tells scans of one person apart: visits, and contrasts.
VISIT = (
    r"(?i:(?:ses|session|visit|week|month|day|year|tp|timepoint|scan|run|echo)"
    r"[-_ ]?\d+|[vm]\d\d?|baseline|follow[-_ ]?up\d*)"
)
APART = rf"(?:{VISIT}|(?i:T[12][a-z]*|PDT2))"
DATE = r"(?:19|20)\d\d[-_.]?[01]\d[-_.]?[0-3]\d(?:\D?\d+)?"  # and time
TAIL = rf"(?:[-_. ]+{APART})*[^/\d]*$"  # after a slice number: 045_T1
# The highest folder with a number: never a part of a person.
TOP = rf"^(?:(?:[^/\d]*|{APART})/)*(?!{APART}/)(?P<subject>[^/]*\d[^/]*)"
# A file name that tells both.
IN_FILE = (
    rf"(?P<subject>[^/]*?\d[^/]*?)(?:[-_. ]+{APART})*[-_. ]+[^\W\d_]*[-_. ]*"
    rf"(?P<slice>\d+){TAIL}"
)
# Names of an export by series, in folders of persons: Kim/IM-0003-0017.
SERIES = r"(?i)(?P<subject>[^/]+)/IM[-_]?\d+[-_](?P<slice>\d+)$"
# Slices before people: slice_10/P001, z010_P001.
PLANE_FIRST = (
    r"(?i)^(?:[^/\d]*/)*(?:z|slice|slc|axial|coronal|sagittal)[-_ ]?"
    r"(?P<slice>\d+)[-_. /]+(?P<subject>(?:[^/\d]*[^\W\d_])[-_]?\d[^/]*)$"
)
# How a path without suffix may tell the subject and the slice, likely first;
# those from `DOUBTFUL` on may mistake other words for subjects.
GUESSES = (
    *(rf"(?i)(?P<subject>{name})(?![^\W_]){NUMBER}(?!\d)" for name in SUBJECTS),
    *(
        rf"(?i)(?P<subject>{name})(?![^\W_])(?:.*?(?P<slice>\d+){TAIL})?"
        for name in SUBJECTS
    ),
    PLANE_FIRST,
    rf"(?i){TOP}/{NUMBER}(?!\d)",
    rf"{TOP}/(?:.*/)?[^/\d]*(?P<slice>\d+){TAIL}",
    rf"(?P<subject>[^/]*\d[^/]*)/[^/\d]*(?P<slice>\d+){TAIL}",
    SERIES,
    IN_FILE,
    rf"{TOP}/.*?(?P<slice>\d+){TAIL}",
)
DOUBTFUL = 2 * len(SUBJECTS)

# ------------------------------------------------------------------ 2. Scan


class Index(NamedTuple):
    """The slices of a data set, unread."""

    root: Path  # of the folder that the paths are relative to
    table: object  # DataFrame, see `scan`
    ignored: list  # of the paths that are not read
    notes: list  # of lines that the reader should know


def _show(path):
    """Return a path on one line that any terminal prints, whatever it holds."""
    text = os.fsdecode(path)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _some(names, most=5):
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(_show, names[:most])) + more or "none"


def detect_layout(root):
    """Return the name of the layout that lies under `root`."""
    found = {name: _list_files(root, name) for name in LAYOUTS}
    counts = {name: len(index.table) for name, index in found.items()}
    masks = [*filter(IMAGE_FILE.fullmatch, found["folder"].ignored)]
    masked = f" ({len(masks)} images are named like masks)" if masks else ""
    # Named for sure by their folders; "adni" and "folder" have no prefix.
    names = [k for k, x in LAYOUTS.items() if x.prefix and counts[k]]
    if len(names) > 1 or not counts["folder"]:
        raise DataError(
            f"{_show(root)}: found the layouts {_some(names)}, expected one; "
            "looked for folders keras_png_slices_train, keras_slices_train, "
            "train, and for any PNG, JPEG or NIfTI files, found "
            f"{_some(sorted(os.listdir(root)))}{masked}; name the folder of one"
            f"{_word_on_dicom(root)}"
        )
    # In the folder of a person the first number is that of a series.
    inner = found["adni"].table["stem"].str.contains(r"^[^/]+/.*\d.*/").sum()
    is_adni = 2 * (counts["adni"] - inner) > counts["folder"]
    return names[0] if names else "adni" if is_adni else "folder"


def _word_on_dicom(root):
    """Return what to do with DICOM files, "" if the first files are none."""
    for file in itertools.islice(files_below(root), 20):
        with contextlib.suppress(OSError), open(file, "rb") as opened:
            if opened.read(132).endswith(b"DICM"):
                return "; make volumes of DICOM files with dcm2niix (README)"
    return ""


def scan(root, dataset, pattern=None, split=None):
    """Return the `Index` of the slices under `root`, unread.

    Its table is sorted by split, subject, scan and slice; columns path,
    subject, scan, slice (int), position (rank in the scan, 0 to 1), label
    ("" unknown) and split.

    Args:
        root: the data set's folder, or one above it.
        dataset: key of `LAYOUTS`; "folder" is any folder of slices.
        pattern: regex of the groups `subject`, `slice` and `label` in the
            path of a file of "folder", without suffix; None to guess.
        split: of all images; by default folders tell.

    Raises:
        DataError: on a wrong layout, an empty split, an unreadable folder
            or a subject in two splits.
    """
    layout, any_folder = LAYOUTS[dataset], dataset == "folder"
    base, files, ignored, notes = _list_files(root, dataset)
    around = 0 if any_folder else None
    if any_folder and not pattern:  # folders that hold everything
        folders = [*map(os.path.dirname, files["stem"])] or [""]
        around = len(os.path.join(os.path.commonpath(folders), ""))
    known = layout.pattern or _choose_pattern(files["stem"], pattern, notes)
    matches = [re.search(known, s) if known else None for s in files["stem"]]
    rows = map(_row, files.itertuples(), matches, itertools.repeat(around))
    columns = ["path", "subject", "scan", "slice", "label", "split"]
    table = pd.DataFrame(rows, columns=columns)
    told = [m is not None or not pattern for m in matches]
    if len(told) and not any(told):
        raise FlagError(
            f"--subject-pattern: {pattern} fits none of {len(told)} files, "
            f"such as {_show(files['stem'][0])} (without suffix)"
        )
    # A slice may be there twice, zipped and not.
    kept = table[np.array(told, bool)].drop_duplicates(
        ["split", "scan", "slice", "label"]
    )
    given = kept["split"] != ""
    if not split and given.any():  # what lies beside the folders is not read
        kept = kept[given]
    ignored += [str(base / path) for path in table["path"].drop(kept.index)]
    table = kept.reset_index(drop=True)
    for name in ("subject", "scan", "label"):
        table[name] = _unify(table[name])
    if any_folder and not pattern:
        _note_what_may_be_several(table, notes)
    people = table.groupby("label")["subject"].nunique()
    if any_folder and (len(people) == 1 or people.max() == 1):
        table["label"] = ""  # one class tells nothing, nor do names of people
    _note_what_is_untold(table, notes)
    if split:
        table["split"] = split
    else:
        _fill_splits(table, any_folder, notes)
    _check_table(table, base, layout, split, ignored)
    return Index(base, _in_order(table), ignored, notes)


def _note_what_may_be_several(table, notes):
    """Add a note if subjects that were guessed stand in several folders."""
    told = table[table["label"] != ""].groupby("subject")["label"].unique()
    several = told[told.map(len) > 1]
    if len(several):
        notes.append(
            f"{len(several)} subjects are in several folders, such as "
            f"{several.index[0]} in {_some(several.iloc[0], 3)}; if these are "
            "different people, tell them with --subject-pattern"
        )


def _note_what_is_untold(table, notes):
    """Add notes on labels and slice numbers that no path tells."""
    if (missing := sum(table["label"] == "")) not in (0, len(table)):
        notes.append(f"{missing} of {len(table)} images have no label")
    images = table.groupby(["split", "scan"]).size()
    if images.max() == 1 and table["subject"].duplicated().any():
        notes.append(
            "every image counts as a scan of its own, as no slice number is "
            "told: slice positions mean nothing"
        )


def _in_order(table):
    """Sort slices, and add the position of each in its scan."""
    table = table.sort_values(
        ["split", "subject", "scan", "slice"],
        key=lambda x: x.map(SPLITS.index) if x.name == "split" else x,
        ignore_index=True,
    )
    scans = table.groupby(["split", "scan"])["slice"]
    rank, last = scans.cumcount(), scans.transform("size") - 1
    table.insert(4, "position", (rank / last).fillna(0.5))
    return table


def _list_files(root, dataset):
    """Return the `Index` of the files named as a layout's, or of all images.

    Columns of its table: path; split, "" for none; stem, the path without the
    folder that gives the split.
    """
    layout, top = LAYOUTS[dataset], os.path.abspath(root)
    ignored, lost = [], []
    files = files_below(top, ignored, lost.append)
    names = [os.path.relpath(path, top) for path in files]
    names = pd.Series(names, dtype=object)
    prefix = layout.prefix if layout.pattern else r"(?:(?P<word>\w+)_)?"
    splits = f"{prefix}(?P<split>{'|'.join(SPLIT_NAMES)})"
    splits = f"(?P<folder>{splits}(?:[-_ ]?(?:set|data|images))?)/"
    splits += "(?:(?P=folder)/)*"  # doubled by unzipping: train/train/AD
    way = rf"(?is)^(?P<above>(?:[^/]+/)*?){splits}(?P<stem>.*)$"
    table = names.str.extract(way).fillna("").assign(path=names)
    table["split"] = table["split"].str.casefold().replace(SPLIT_NAMES)
    if layout.pattern is None:
        stem, word = table["stem"], table["word"]
        several = word[table["split"] != ""].str.casefold().nunique() > 1
        if several:  # AD_train, NC_train
            stem = (word + "/").str.removeprefix("/") + stem
        stem = (table["above"] + stem).mask(table["split"] == "", names)
        table["stem"] = stem.str.replace(SUFFIX, "", regex=True)
        fits, above = names.str.fullmatch(IMAGE_FILE).astype(bool), [""]
    else:
        fits = table["stem"].str.match(layout.pattern).astype(bool)
        depths = table["above"].str.count("/")
        fits &= depths == depths[fits].min()  # not what lies deeper
        above = sorted(set(table["above"][fits])) or [""]
    if len(above) > 1:
        raise DataError(
            f"{_show(root)}: found several data sets, expected one; name "
            f"one of {_some(above)}, or use --dataset folder"
        )
    base = os.path.join(top, above[0])
    for error in lost:
        if os.path.join(error.filename, "").startswith(base):
            _refuse_folder(error)
    ignored += [os.path.join(top, name) for name in names[~fits]]
    ignored = [path for path in ignored if path.startswith(base)]
    table["path"] = names.str.removeprefix(above[0])
    table = table[fits].reset_index(drop=True)
    return Index(Path(base), table, ignored, _notes_on_folders(table, layout))


def _notes_on_folders(table, layout):
    folder, split = table["folder"].str.casefold(), table["split"]
    pairs = set(zip(folder, split, layout.prefix + split, strict=True))
    notes = [
        f"folder {name} is read as {split}"
        for name, split, usual in sorted(pairs)
        if split and name != usual
    ]
    if count := table["path"].str.contains("\\", regex=False).sum():
        notes.append(
            f"{count} file names hold a backslash: unzipping lost folders, so "
            "no split or class is read from them"
        )
    return notes


def _refuse_folder(error):
    raise DataError(
        f"{_show(error.filename)}: cannot list the folder ({error.strerror})"
    )


def files_below(folder, ignored=None, onerror=_refuse_folder):
    """Yield the files below a folder, sorted; links are followed, but once.

    Masks, run folders and folders seen before are added to `ignored` instead.
    """
    seen, top = set(), os.fspath(folder)
    ignored = [] if ignored is None else ignored
    # Of macOS, of BIDS beside its raw data, or a simulation being written.
    hidden = re.compile(r"\.|(__MACOSX|derivatives|sourcedata)$|.*\.tmp-")
    for parent, names, files in os.walk(top, True, onerror, followlinks=True):
        real, inside = os.path.realpath(parent), os.path.relpath(parent, top)
        names[:] = sorted(n for n in names if not hidden.match(n))
        is_run = inside != "." and {"config.json", "split.csv"} <= {*files}
        if real in seen or is_run:
            ignored.append(parent)
            names.clear()
            continue
        seen.add(real)
        are_masks = any(map(MASKS.fullmatch, inside.split(os.sep)))
        for name in sorted(files):
            path = os.path.join(parent, name)
            if are_masks or MASKS.fullmatch(_stem(name)):
                ignored.append(path)
            elif name not in OURS:
                yield path


def _choose_pattern(stems, pattern, notes):
    """Return the regex to tell subjects by, None if there is none."""
    if pattern and "subject" not in _compile(pattern).groupindex:
        raise FlagError(
            f"--subject-pattern: found {pattern}, expected (?P<subject>...) "
            "in it"
        )
    fits = functools.partial(_tells_subjects, stems=stems)
    guessed, pattern = not pattern, pattern or next(filter(fits, GUESSES), None)
    if not pattern:
        notes.append(
            "no subject can be told from the file names, so every file counts "
            "as one: slices of one person may be in several splits, and all "
            "scores may be too good; tell subjects with --subject-pattern"
        )
        return None
    found = stems.str.extract(pattern)
    first = found.dropna(subset="subject").head(1).to_dict("records")
    told = [item for row in first for item in row.items()]
    example = ", ".join(f"{k} {_show(x)}" for k, x in told if type(x) is str)
    notes.append(f"subjects and slices are told by {pattern} ({example})")
    others = stems[found["subject"].isna()]
    if guessed and len(others):
        notes.append(
            f"{len(others)} files do not fit it: {_some(others)}; each counts "
            "as a subject of its own"
        )
    return pattern


def _compile(pattern):
    try:
        return re.compile(pattern)
    except re.error as error:
        raise FlagError(
            f"--subject-pattern: found {pattern} ({error}), expected a regular "
            "expression"
        ) from error


def _tells_subjects(guess, stems):
    found = stems.str.extract(guess)["subject"].dropna()
    # pandas takes all names for one that are not valid UTF-8.
    count = len(set(map(_canonical, found)))
    if guess in GUESSES[DOUBTFUL:]:
        if count < 3 or not 2 * count <= len(found) <= MOST_SLICES * count:
            return False
    if guess == IN_FILE:
        # A folder with a number is a class if it has people of its own, and a
        # person if its names return in other folders, or begin with its name.
        folders = stems.str.extract(TOP + "/")["subject"].dropna()
        names = found.reindex(folders.index).map(str)
        pairs = set(zip(folders, names, strict=True))
        if len(pairs) > 1.5 * names.nunique():
            return False
        if pairs and all(name.startswith(folder) for folder, name in pairs):
            return False
    return count > 0 and len(found) >= 0.9 * len(stems)


def _row(file, match, around):
    """Return what the path of a slice tells, in the order of the table.

    `around`: how much of a path of "folder" is folders that hold everything.
    """
    groups, stem = match.groupdict() if match else {}, file.stem
    number, label = (groups.get(name) or "" for name in ("slice", "label"))
    subject = scan = groups.get("subject") or SUFFIX.sub("", file.path)
    if "week" in groups:
        scan = f"{subject}_week_{groups['week']}"
    if around is not None:
        begin, end = match.span("slice") if number else (len(stem),) * 2
        scan = f"{stem[:begin]}*{stem[end:]}"
        first, slash, _ = stem[around:].partition("/")
        named = rf"(?<![^\W_]){re.escape(subject)}(?![^\W_])"
        if match:
            start = min(match.start("subject"), begin)
            is_class = start > around + len(first)
        else:  # a folder with a number may be a person
            is_class = not re.search(r"\d", first)
        # A number is no name: 1 in grade_1/1_05.
        own = not subject.isdigit() and re.search(named, first)
        if slash and is_class and not own and not re.fullmatch(VISIT, first):
            label = label or first  # a class, as it does not name people
    sign = -1 if number.startswith("-") else 1
    number = sign * int(re.sub(r"\D", "", number) or 0)
    # Printable, for pandas takes all names for one that are not valid UTF-8.
    subject, scan, label = map(_show, (subject, scan, label))
    return file.path, subject, scan, number, label, file.split


def _canonical(name):
    """Return what all spellings of an id share: case_001, CASE-1, Case1."""
    text = unicodedata.normalize("NFKC", name).casefold()
    text = re.sub(r"(?<=[^\W\d_])[-_. ]+(?=\d)", "", text)
    return re.sub(r"0*(\d+)", r"\1", text)


def _unify(names):
    """Replace each spelling of a name by the first one."""
    first = {}
    return [first.setdefault(_canonical(name), name) for name in names]


def _fill_splits(table, any_folder, notes):
    """Give subjects the splits that no folder gives, by hash."""
    absent = [split not in set(table["split"]) for split in SPLITS]
    absent[2] &= any_folder
    own, shares = table["split"] == "train", np.multiply(CARVED, absent)
    if (table["split"] == "").all():
        own, shares = table["split"] == "", SHARES
        notes.append(
            "no folders of splits: {:.0%} of the subjects train, {:.0%} "
            "validate, {:.0%} test, chosen by hash".format(*SHARES)
        )
    if any(shares[1:]):
        splits = split_subjects(table["subject"][own], shares)
        table.loc[own, "split"] = table["subject"][own].map(splits)


def split_subjects(subjects, shares):
    """Return {subject: split}, chosen by hash: the same on any machine.

    The shares are of subjects that train (what is left), validate and test.
    """
    names = {s: s.encode(errors="surrogateescape") for s in set(subjects)}
    place = {
        s: int(hashlib.sha256(name).hexdigest()[:8], 16) / 2**32
        for s, name in names.items()
    }
    ranked, (_, validate, test) = sorted(place, key=place.get), shares
    in_order = ("validate", "test", "train")
    ends = np.array([validate, validate + test])
    splits = {s: in_order[np.sum(place[s] >= ends)] for s in ranked}
    # No split may be empty, however few the subjects.
    if ranked and "train" not in splits.values() and validate + test < 1:
        splits[ranked[-1]] = "train"
    for split, share in (("test", test), ("validate", validate)):
        train = [s for s in ranked if splits[s] == "train"]
        spare = train if len(train) > 1 else []
        if split == "test":  # needed more than a split to validate
            spare += [s for s in ranked if splits[s] == "validate"]
        if share and split not in splits.values() and spare:
            splits[spare[0]] = split
    return splits


def _check_table(table, base, layout, split, ignored):
    """Refuse splits without slices, and what would spoil every score."""
    needed = {split} if split else {"train", "test"}
    if empty := sorted(needed - set(table["split"])):
        raise DataError(
            f"{_show(base)}: found {table['subject'].nunique()} subjects, none "
            f"for {' and '.join(empty)}, expected two or more in all; "
            f"looked for files like {layout.name.format('001', 10)} in folders "
            f"{_some(layout.prefix + split for split in SPLITS)}; ignored "
            f"{_some(os.path.relpath(path, base) for path in ignored)}"
            f"{_word_on_dicom(base)}"
        )
    splits = table.groupby("subject")["split"].nunique()
    if (splits > 1).any():
        raise DataError(
            f"{_show(base)}: {sum(splits > 1)} subjects are in two splits, "
            f"expected none: {_some(splits[splits > 1].index)}; scores would "
            "be of images learnt by heart; where the folders number subjects "
            "anew, rename the files"
        )
    labels = table.groupby("scan")["label"].nunique()
    if (labels > 1).any():
        raise DataError(
            f"{_show(base)}: a scan is in two class folders, expected one: "
            f"{_some(labels[labels > 1].index)}"
        )


# --------------------------------------------------------- 3. Read one file


class _Unfit(Exception):
    """Why a file cannot be used: what was found, what was expected."""


def _require_file(path):
    if not os.path.isfile(path):  # a pipe would be waited on for ever
        found = "not a file" if os.path.exists(path) else "a link to nothing"
        found = found if os.path.lexists(path) else "nothing there"
        raise _Unfit(f"found {found}, expected a file")


def _read_bytes(path):
    _require_file(path)
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise _Unfit(f"cannot read the file ({error.strerror})") from error
    if not 0 < len(data) <= MOST_BYTES:
        found = os.path.getsize(path) if data else "no"
        raise _Unfit(f"found {found} bytes, expected 1 to {MOST_BYTES}")
    return data


@contextlib.contextmanager
def _library(kind):
    """Turn whatever a library says of damaged bytes into `_Unfit`."""
    try:
        yield
    except _Unfit:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        # Pillow's name for bytes in memory says nothing.
        reason = "" if "BytesIO" in reason or not reason else f" ({reason})"
        raise _Unfit(
            f"found a damaged or unsupported file{reason}, expected a sound "
            f"{kind}"
        ) from error


def _read_picture(path, data, notes):
    """Return the grey pixels of a PNG or JPEG and its full scale."""
    with _library("PNG or JPEG"):
        options = {"fp": io.BytesIO(data), "formats": ["PNG", "JPEG"]}
        image = Image.open(**options)
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise _Unfit(
                f"found {height}x{width} pixels, expected at most {MOST_PIXELS}"
            )
        image.verify()  # checksums of a PNG, which reading the pixels skips
        image = Image.open(**options)
        if str(path).lower().endswith("png") != (image.format == "PNG"):
            notes.add("named otherwise than their contents; read by contents")
        if image.getexif().get(ImageOps.ExifTags.Base.Orientation, 1) != 1:
            notes.add("turned upright as their EXIF orientation says")
            image = ImageOps.exif_transpose(image)
        if image.mode == "CMYK":
            raise _Unfit("found a CMYK image, expected grey; convert it")
        if image.mode.startswith("I"):
            return np.asarray(image), 65535
        if "transparency" in image.info:
            image = image.convert("RGBA")
        if "A" in image.getbands() and np.ptp(image.getchannel("A")):
            raise _Unfit("found transparency, expected an opaque image")
        if np.ptp(image.convert("RGB"), axis=-1).any():
            notes.add("are in colour; converted to grey by luma")
        return np.asarray(image.convert("L")), 255


def _open_nifti(path):
    """Return what nibabel makes of a file, its voxels unread."""
    _require_file(path)
    nibabel.imageglobals.logger.setLevel("CRITICAL")  # else lines a file
    if str(path).lower().endswith("gz"):  # also mgz
        with gzip.open(path) as stream:  # to the checksum, which nibabel skips
            while stream.read(MOST_BYTES):
                pass
    image = nibabel.load(path)
    if (dtype := image.get_data_dtype()).kind not in "iuf":
        raise _Unfit(f"found {dtype} voxels, expected real numbers")
    if min(image.shape, default=0) < 1:
        raise _Unfit(f"found shape {image.shape}, expected voxels")
    if isinstance(image, nibabel.Nifti1Image):  # header and voxels in one
        if image.dataobj.offset < image.header.sizeof_hdr:
            raise _Unfit("found vox_offset inside the header")
        with nibabel.openers.ImageOpener(path) as stream:
            header = type(image.header).from_fileobj(stream, check=False)
        if np.isinf(header["scl_slope"]):  # which nibabel leaves out
            raise _Unfit("found an infinite scl_slope, expected a finite one")
    return image


def _turn(image, axes):
    """Return the first volume along axes such as "SPR", and their mm.

    One of no orientation stays as it is; its mm are None.
    """
    voxels = np.asanyarray(image.dataobj[(..., *[0] * (image.ndim - 3))])
    voxels = voxels.reshape(voxels.shape + (1,) * (3 - voxels.ndim))
    own = nibabel.io_orientation(image.affine)
    if np.isnan(own).any():
        return voxels, None
    goal = nibabel.orientations.axcodes2ornt(axes)
    turn = nibabel.orientations.ornt_transform(own, goal)
    spacing = nibabel.affines.voxel_sizes(image.affine)[turn[:, 0].argsort()]
    return nibabel.apply_orientation(voxels, turn), spacing


def _read_nifti(path, notes, upright):
    """Return the only plane in a NIfTI file, with its axes to RAS.

    If `upright`, turned as `cut_volume` turns planes of this kind.
    """
    with _library("NIfTI file"):
        image = _open_nifti(path)
        sides = [n for n in image.shape if n > 1]
        size = np.prod(sides, dtype=float) * image.get_data_dtype().itemsize
        if len(sides) > 2 or size > MOST_BYTES:
            raise _Unfit(
                f"found shape {image.shape}, expected one plane; cut volumes "
                "with python dataset.py slice"
            )
        codes, axes = nibabel.aff2axcodes(image.affine), "RAS"
        if upright:
            across = codes[(*image.shape, 1).index(1)]  # the plane
            across = {"I": "S", "P": "A", "L": "R"}.get(across, across)
            goals = (goal for goal, _ in PLANES.values() if goal[0] == across)
            axes = next(goals, axes)
        voxels, spacing = _turn(image, axes)
        if spacing is not None and upright:
            notes.add("turned upright, like the pictures of the run")
        elif spacing is not None and codes != tuple(axes):
            codes = "".join(codes)
            notes.add(f"stored with axes to {codes}; turned to RAS")
    return np.atleast_2d(voxels.squeeze())


# What is known of a file that cannot be read.
_UNREAD = {"reason": "", "sha256": "", "notes": (), "height": 0, "width": 0}
_UNREAD |= {"full": 0, "low": 0.0, "high": 0.0, "constant": False, "cut": False}


def _read_file(path, upright=False):
    """Return what is known of a file, and its image as it is stored."""
    data, notes, full = _read_bytes(path), set(), 0
    if str(path).lower().endswith((".nii", ".nii.gz")):
        image = _read_nifti(path, notes, upright)  # nibabel opens it again
    else:
        image, full = _read_picture(path, data, notes)
    fit = image.dtype.kind != "f" or np.abs(image) <= MOST_INTENSITY
    if not np.all(fit):  # nor is a NaN
        raise _Unfit(
            f"found {np.count_nonzero(~fit)} voxels that are NaN, infinite or "
            f"beyond {MOST_INTENSITY:g}, expected finite intensities"
        )
    known = {"sha256": hashlib.sha256(data).hexdigest(), "full": full}
    height, width = image.shape
    known |= {"height": height, "width": width, "notes": notes}
    return _UNREAD | known, image


# ----------------------------------------------------------- 4. Decode once
#
# Every file is decoded once: its pixels into one file of uint8 on disk, beside
# it, in JSON, what was found. Both are named by a hash of all that they depend
# on, so later starts open them; batches read some images: memory stays flat.


@dataclasses.dataclass(frozen=True, eq=False)
class Slices:
    """Images on disk, and what is known of each.

    The columns of the table are path (relative to `root`), subject, scan,
    slice, position, label, split, height, width, low, high (the intensities
    in the file that become 0 and 1) and sha256.
    """

    file: Path  # of pixels, uint8 (N, H, W)
    rows: np.ndarray  # (n,) ints, the images in it, one a row of the table
    table: object  # DataFrame
    root: Path  # of the data set's folder
    size: tuple  # (H, W) in pixels
    simulated: bool  # whether a simulator wrote the images
    intensity: dict  # {rule, low, high}, of full scale of PNG and JPEG
    rejected: object = ()  # DataFrame of unfit files, columns path and reason

    def __len__(self):
        return len(self.rows)

    @property
    def subjects(self):
        return self.table["subject"].to_numpy()

    @property
    def mirror_axis(self):
        """Axis of a batch along which left and right of the body lie."""
        names = self.table["path"].str.lower()
        return 1 if names.str.endswith((".nii", ".nii.gz")).all() else 2

    def read(self, numbers=None):
        """Return images of rows of the table, float32 (n, H, W, 1), 0 to 1."""
        return self.read_bytes(numbers) / np.float32(255)

    def read_bytes(self, numbers=None):
        """Return what `read` does as it is stored, uint8."""
        rows = self.rows if numbers is None else self.rows[numbers]
        try:
            # A map each time, for pages that are read stay in it.
            images = np.memmap(self.file, mode="r").reshape(-1, *self.size, 1)
            return np.asarray(images)[rows]
        except (OSError, ValueError, IndexError) as error:
            raise DataError(
                f"{_show(self.file)}: {error}; expected decoded images, "
                "delete it"
            ) from error

    def take(self, numbers):
        """Return the `Slices` of some rows of the table, in that order."""
        table = self.table.iloc[numbers].reset_index(drop=True)
        return dataclasses.replace(self, rows=self.rows[numbers], table=table)

    def split(self, name):
        """Return the `Slices` of a split."""
        return self.take(np.flatnonzero(self.table["split"] == name))

    def chunks(self, count=256):
        """Yield the images as uint8 (n, H, W), `count` at a time."""
        for k in range(0, len(self), count):
            yield self.read_bytes(slice(k, k + count))[..., 0]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How files become images; what is None follows from the files."""

    size: tuple | None = None  # (H, W) of the frame: the most common size
    kept: tuple | None = None  # sizes not scaled but padded, cropped: all
    white: dict | None = None  # {full scale: share of it that becomes 1}
    least: tuple | None = None  # from this size to the frame's none is scaled
    upright: bool = False  # whether NIfTI slices are turned like pictures

    def scales(self, size):
        """Whether images of a size are scaled."""
        if self.kept is None or size in self.kept:
            return False
        sizes = zip(self.least or self.size, size, self.size, strict=True)
        return not all(least <= own <= most for least, own, most in sizes)


def _sizes(table):
    return list(zip(table["height"], table["width"], strict=True))


def _decode(table, root, plan):
    """Return the file of pixels, (H, W), and a table of what is in the files.

    What is not in the cache yet is read, by `_read_file`. Columns needed:
    path, scan, split; low and high of a file may be given, else its own scan
    or the plan gives them.
    """
    table = table.reindex(columns=["path", "scan", "split", "low", "high"])
    read = _cache_path(table, root, plan)
    file = read.with_suffix(".raw")
    if file.is_file() and read.is_file():
        for path in (read, file):
            with contextlib.suppress(OSError):  # of someone else
                os.utime(path)
        known = json.loads(read.read_text("utf-8", "surrogateescape"))
        return file, tuple(known["size"]), pd.DataFrame(known["files"])
    _remove_unused(read.parent)
    names = np.array([os.path.join(root, path) for path in table["path"]], "O")
    scans = [*table.groupby(["split", "scan"], sort=False).indices.values()]
    levels = table[["low", "high"]].to_numpy("float64")
    is_train = (table["split"] == "train").to_numpy()
    plan = _complete(plan, names[is_train | ~is_train.any()])
    found = [None] * len(names)

    def write(path):
        # Through a map, a full disk would end the process at once.
        with open(path, "wb") as stream:
            stream.truncate(len(names) * math.prod(plan.size))

            def work(rows):
                results = _decode_scan(names[rows], levels[rows], plan)
                for row, (values, image) in zip(rows, results, strict=True):
                    found[row] = values
                    if image is not None:
                        data, at = image.tobytes(), int(row) * image.size
                        written = os.pwrite(stream.fileno(), data, at)
                        if written < image.size:  # the disk is full
                            raise OSError(errno.ENOSPC, "No space left", path)

            _in_parallel("reading scans", work, scans)

    utils.write_atomic(file, write)
    # What could not be read now may be readable next time.
    if not any(x["reason"].startswith("cannot read") for x in found):
        utils.write_json(read, {"size": plan.size, "files": found})
    return file, plan.size, pd.DataFrame(found)


def _cache_path(table, root, plan):
    """Return the path of what `_decode` found: a hash of all behind it."""
    about = CACHE_FORMAT, INTENSITY_RULE, plan
    digest = hashlib.sha256(repr(about).encode())
    for row in table.itertuples(index=False, name=None):
        with contextlib.suppress(OSError):
            s = os.stat(os.path.join(root, row[0]))
            # The time of change too: contents may change with an old time.
            row += (s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        digest.update(repr(row).encode())
    with contextlib.suppress(OSError):
        CACHE.mkdir(parents=True, exist_ok=True)
    folder = CACHE.absolute()
    if not os.access(folder, os.W_OK):
        folder = Path(tempfile.gettempdir(), f"mri-vqvae-{os.getuid()}")
    return folder / f"{digest.hexdigest()[:20]}.json"


def _remove_unused(folder):
    """Remove the entries of a cache that were not used for `CACHE_DAYS`.

    And what a process that was killed had begun.
    """
    utils.remove_temporary_files(folder.glob("*.tmp-*"))
    for path in folder.glob("*"):
        with contextlib.suppress(OSError):  # of another process, gone
            used = max(path.stat().st_mtime, path.stat().st_atime)
            if used < time.time() - CACHE_DAYS * 24 * 3600:
                path.unlink()


def _complete(plan, names):
    """Return the plan with what follows from some training files filled in."""
    sizes, shades = [], collections.defaultdict(list)
    for row in utils.spread(len(names), 256):
        with contextlib.suppress(_Unfit):  # it is named when all are read
            values, image = _read_file(names[row], plan.upright)
            sizes.append(image.shape)
            if values["full"]:
                some = image.ravel()[:: max(3, image.size // 2**15)]
                shades[values["full"]].append(some / values["full"])
    white = {}
    for full, some in shades.items():
        level = float(np.percentile(np.concatenate(some), WHITE))
        white[full] = level if 0 < level < DARK else 1.0
    white |= plan.white or {}
    size = plan.size or max(statistics.multimode(sizes), default=(32, 32))
    return dataclasses.replace(plan, size=size, white=white)


def _in_parallel(title, work, *arguments, most=64):
    """Return what `work` returns for each of the arguments, in order."""
    options = {"desc": title, "disable": None, "delay": 2}  # seconds
    options["max_workers"] = min(2 * (os.cpu_count() or 1), most)
    return concurrent.thread_map(work, *arguments, **options)


def _decode_scan(names, levels, plan):
    """Yield (what was found, uint8 (H, W) or None) of each file of a scan."""
    files, voxels = [], []
    for name, (low, _) in zip(names, levels, strict=True):
        try:
            values, image = _read_file(name, plan.upright)
            if np.isnan(low) and not values["full"]:
                voxels.append(image.ravel())
        except _Unfit as error:
            values, image = _UNREAD | {"reason": str(error)}, None
        files.append((values, image))
    window = _window(np.concatenate(voxels)) if voxels else ()
    for (values, image), (low, high) in zip(files, levels, strict=True):
        if image is not None:
            if np.isnan(low):
                full = values["full"]
                white = plan.white.get(full, 1.0) * full
                low, high = (0.0, white) if full else window
            image = _to_frame(image, values, float(low), float(high), plan)
        yield values, image


def _window(voxels):
    """Return the intensities of a scan that become 0 and 1."""
    low, high = map(float, np.percentile(voxels, PERCENTILES))
    if low == high:  # nearly all of it is background
        low, high = float(voxels.min()), float(voxels.max())
    return low, max(high, low + 1e-6 * max(1, abs(low)))


def _to_frame(image, values, low, high, plan):
    """Return an image as uint8 of the plan's size; add to what is known."""
    scaled = np.clip((image.astype(np.float64) - low) / (high - low), 0, 1)
    constant = bool(image.min() == image.max())
    if np.ptp(scaled) * 255 < 1 and not constant:
        values["notes"].add("show nothing: others of their scan are brighter")
    resize = plan.scales(image.shape)
    frame = fit_to(scaled.astype(np.float32), plan.size, resize)
    content, shown = (np.sum(x > utils.FOREGROUND) for x in (scaled, frame))
    cut = bool(content > shown) and not resize
    values |= {"low": low, "high": high, "constant": constant, "cut": cut}
    values["notes"] = sorted(values["notes"])
    return np.rint(frame * 255).astype(np.uint8)


def fit_to(image, size, resize=False):
    """Return an image (H, W) padded with black, cropped about its centre.

    With `resize` it is first scaled, its aspect ratio kept, to just fit.
    """
    if resize:
        scale = min(np.divide(size, image.shape))
        height, width = (max(1, round(m * scale)) for m in image.shape)
        image = Image.fromarray(image)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        image = np.asarray(image)
    more = np.maximum(np.subtract(size, image.shape), 0)
    image = np.pad(image, np.stack([more // 2, more - more // 2], 1))
    top, left = np.subtract(image.shape, size) // 2
    return image[top : top + size[0], left : left + size[1]]


# ------------------------------------------------------------------ 5. Load

KNOWN = ["height", "width", "low", "high", "sha256"]


def load(settings):
    """Return the `Slices` of `utils.DataSettings`; print what they hold.

    Raises:
        DataError: naming unfit files, at most 20.
        FlagError: if the image size cuts off much content.
    """
    root, dataset = settings.data_dir, settings.dataset
    if dataset == "phantom":
        root, dataset = simulated_folder(settings.phantom_subjects), "oasis"
    index = scan(root, dataset, settings.subject_pattern)
    size = settings.image_size
    plan = _Plan(size, () if settings.resize else None)
    slices, found = _load(index, plan, dataset, settings.skip_bad, root)
    train = found["cut"][found["split"] == "train"]
    native = max(statistics.multimode(_sizes(found)))
    if train.mean() > MOST_CUT:
        frame = utils.size_text(size or native)
        text = f"{frame}: cuts off content of {train.sum()} of {len(train)} "
        text += "training images; use --resize"
        if size and np.less(size, native).any():
            raise FlagError(
                f"--image-size {text}, or {utils.size_text(native)}"
            )
        warn(f"image size {text}")
    return slices


def load_external(data_dir, dataset, run, skip_bad=False, pattern=None):
    """Return another data set, all of it as test images of a `utils.Run`.

    They are padded, cropped or scaled to the frame of the run. With `skip_bad`
    unfit files are left out instead of refused. The pattern is that of `scan`.
    """
    index, plan = scan(data_dir, dataset, pattern, "test"), _plan_of_run(run)
    slices, _ = _load(index, plan, dataset, skip_bad, data_dir)
    _warn_of_crop(slices, run)
    return slices


def _load(index, plan, dataset, skip_bad, root):
    """Return the `Slices` of an index and what their files hold; print it."""
    table, base = index.table, index.root
    file, size, found = _decode(table, base, plan)
    about = _read_marker(root, base, Path(root).absolute().parent)
    if about is not None:  # a simulator knows the labels of its subjects
        known = table["subject"].map(about.get("labels", {})).fillna("")
        table["label"] = table["label"].where(table["label"] != "", known)
    checked = table.join(found)
    _refuse_twins(checked, base)
    fit = (checked["reason"] == "").to_numpy()
    kept = checked[fit].reset_index(drop=True)
    rejected = checked.loc[~fit, ["path", "reason"]].reset_index(drop=True)
    if len(rejected):
        if not skip_bad:
            raise DataError(_listed(rejected, base, len(table)))
        first = _show(base / rejected["path"][0])
        warn(f"{len(rejected)} unfit files left out, such as {first}")
    if lost := sorted(set(table["split"]) - set(kept["split"])):
        listed = _listed(rejected, base, len(table), advice="")
        raise DataError(f"{lost[0]}: no file is left; {listed}")
    if kept["constant"].all():
        raise DataError(
            f"all {len(kept)} images are constant, expected contrast: "
            f"{_some(str(base / path) for path in kept['path'])}"
        )
    for note, count in kept["notes"].explode().value_counts().items():
        warn(f"{count} files {note}")
    if copies := kept[~kept["constant"]].duplicated("sha256").sum():
        warn(f"{copies} files repeat others of their split")
    high = (kept["high"] / kept["full"])[kept["full"] > 0].max()
    high = float(np.nan_to_num(high))
    intensity = {"rule": INTENSITY_RULE, "low": 0.0, "high": high}
    files = file, np.flatnonzero(fit), kept[[*table, *KNOWN]], base, size
    slices = Slices(*files, about is not None, intensity, rejected)
    for line in _summary(slices, kept, dataset, index, plan):
        print(line)
    return slices, kept


def _refuse_twins(checked, base):
    """Fill in the reason of files whose bytes are in a later split too."""
    # Blank slices are alike by nature, and nothing can be learnt from them.
    alike = checked[~checked["constant"] & (checked["reason"] == "")]
    # The later split keeps its copy: a test set is not to shrink.
    last = alike.groupby("sha256")[["path", "split"]].transform("last")
    for row in alike.join(last, rsuffix="_kept").itertuples():
        if row.split != row.split_kept:
            checked.loc[row.Index, "reason"] = (
                f"found the same bytes in {row.split} and as "
                f"{_show(base / row.path_kept)} in {row.split_kept}, expected "
                "each image in one split"
            )


def _listed(rejected, base, total, advice=" (--skip-bad leaves them out)"):
    """Return one line for one file, else a count and the first lines."""
    lines = [
        f"{_show(base / row.path)}: {row.reason}"
        for row in rejected.head(MOST_LISTED).itertuples()
    ]
    if len(rejected) == 1:
        return lines[0]
    if (more := len(rejected) - MOST_LISTED) > 0:
        lines.append(f"... and {more} more")
    head = f"{len(rejected)} of {total} files are unfit{advice}"
    return "\n".join([head, *lines])


def _read_marker(*folders):
    """Return what the simulator noted, None for images it did not write."""
    for path in (Path(folder) / MARKER for folder in folders):
        if path.is_file():
            try:
                return dict(json.loads(path.read_text("utf-8")))
            except ValueError as error:
                raise DataError(
                    f"{_show(path)}: {error}; expected what the simulator wrote"
                ) from error
    return None


def _summary(slices, found, dataset, index, plan):
    """Yield lines: splits, labels, sizes, intensities, what was left out."""
    table = slices.table
    kind = "simulated, " if slices.simulated else ""
    yield f"{_show(slices.root)} ({kind}layout {dataset})"
    yield from index.notes
    for split in SPLITS:
        part = table[table["split"] == split]
        labels = part["label"][part["label"] != ""].value_counts()
        counts = "".join(f", {labels[x]} {x}" for x in sorted(labels.index))
        subjects = part["subject"].nunique()
        yield f"{split:9}{subjects} subjects, {len(part)} images{counts}"
    yield _sizes_line(slices, plan, found)
    for full, high in found.groupby("full")["high"].first().items():
        if full:
            yield f"intensities: 0 to {high:g} of {full} become black to white"
        else:
            low, high = PERCENTILES
            yield f"intensities: percentiles {low} to {high} of each NIfTI scan"
    if dataset == "adni" and not slices.simulated:
        yield (
            "ids may name scans, not persons: that no person is in two "
            "splits cannot be proved"
        )
    ignored = collections.defaultdict(list)
    for path in index.ignored:
        folder, name = os.path.split(os.path.relpath(path, slices.root))
        ignored[folder or "."].append(name)
    for folder, names in ignored.items():
        yield f"{_show(folder)}: {len(names)} files ignored: {_some(names)}"


def _sizes_line(slices, plan, found):
    """Return in words which sizes there are and what becomes of them."""
    counts = collections.Counter(_sizes(slices.table))
    texts = [f"{utils.size_text(x)} ({n})" for x, n in counts.most_common()]
    frame = utils.size_text(slices.size)
    fitted = f"padded or cropped to {frame}"
    plan = dataclasses.replace(plan, size=slices.size)
    if scaled := [*map(utils.size_text, filter(plan.scales, counts))]:
        which = "" if len(scaled) == len(counts) else f"{_some(scaled, 8)} "
        fitted = f"{which}scaled to {frame}, their aspect ratio kept"
    if cut := found["cut"].sum():
        fitted += f"; content of {cut} images is cut at the border"
    return f"plane sizes: {_some(texts, 8)}; {fitted}"


def load_run(run, data_dir=None, needed=SPLITS):
    """Return the images of a `utils.Run`: {split: `Slices`}.

    Args:
        run: `utils.Run`.
        data_dir: where the data set is now, by default where it was.
        needed: splits; `DataError` if files of these are gone or changed.
    """
    table = utils.read_split_table(run)
    root = _root_of_run(run, data_dir, table["path"][0])
    there = np.array([os.path.isfile(root / path) for path in table["path"]])
    _refuse_lost(root, table[~there], needed, "are gone")
    table = table[there].reset_index(drop=True)
    data, size = run.settings.data, tuple(run.info["image_size"])
    kept, levels = () if data.resize else None, ["low", "high"]
    plan = _Plan(data.image_size, kept)
    file, frame, found = _decode(table.drop(columns=levels), root, plan)
    alike = np.allclose(found[levels], table[levels], rtol=1e-9)
    if frame != size or not alike:
        # Some files are gone: use what was noted when all were there.
        file, _, found = _decode(table, root, _Plan(size, kept))
    same = (found["sha256"] == table["sha256"]).to_numpy()
    _refuse_lost(root, table[~same], needed, "have changed")
    slices = _slices_of_run(run, file, table, root).take(np.flatnonzero(same))
    return {split: slices.split(split) for split in SPLITS}


def _root_of_run(run, data_dir, first):
    """Return the folder of a run's images; `first` is the path of one in it."""
    data = run.settings.data
    root = Path(data_dir or run.info["data_dir"])
    if data.dataset == "phantom" and not root.is_dir():
        root = simulated_folder(data.phantom_subjects)
    if data_dir and not (root / first).exists():  # a folder above
        fits = (p for p in files_below(root) if p.endswith(f"/{first}"))
        root = Path(next(fits, f"{root}/{first}").removesuffix(first))
    return root.absolute()


def _refuse_lost(root, lost, needed, what):
    names = lost["path"][lost["split"].isin(needed)]
    if len(names):
        raise DataError(
            f"{_show(root)}: {len(names)} images of the run {what}: "
            f"{_some(names)}; name the folder that holds them with --data-dir"
        )


def _slices_of_run(run, file, table, root):
    size, rows = tuple(run.info["image_size"]), np.arange(len(table))
    about = run.info["simulated"], run.info["intensity"]
    return Slices(file, rows, table, root, size, *about)


def _split_table(run):
    """Return the table of a run's images; an empty one of a shared model."""
    if run.split_path.exists():
        return utils.read_split_table(run)
    names = ("subject", "slice", "position", "label", *KNOWN)
    return pd.DataFrame(columns=names)


def _plan_of_run(run, white=None):
    """Return how images that are not of a run's data become its images.

    A size between that of the crop and the frame presumably shows bodies as
    large as training images do. NIfTI slices are turned if those are pictures.
    """
    size = tuple(run.info["image_size"])
    upright = run.info["intensity"]["high"] > 0  # that of pictures
    if run.settings.data.resize:
        return _Plan(size, (), white, upright=upright)
    own = tuple(sorted(set(_sizes(_split_table(run)))))
    least = tuple((run.info["crop"] or size)[-2:])
    return _Plan(size, own, white, least, upright)


def _white_of_run(run):
    """Return {full scale: share of it that is white} of a run's pictures."""
    share, highs = run.info["intensity"]["high"], _split_table(run)["high"]
    # Dark pictures of 16 bits may have no level above 255.
    deep = (highs > 255) | np.isclose(highs.astype(float), 65535 * (share or 0))
    full = np.where(deep, 65535, 255)
    shares = (highs.astype(float) / full).groupby(full).max().to_dict()
    return (shares or {255: share}) if share else {}


def read_files(paths, run):
    """Return image files, or all in folders, as a `utils.Run` sees them.

    A file of the run's data set is read as in training. Of others, PNG and
    JPEG take the run's intensities if it knows their bit depth; NIfTI files in
    one folder whose names differ by their last number are one scan. Their label
    is "" and their position NaN: unknown. The split of all is test.
    """
    here, files = Path.cwd(), []
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        if os.path.exists(os.path.join(path, "vqvae.keras")):
            raise DataError(
                f"{_show(path)}: found a run folder, expected images; a run "
                "comes before them"
            )
        below = filter(IMAGE_FILE.fullmatch, files_below(path))
        more = [*below] if os.path.isdir(path) else [os.fspath(path)]
        if not more:
            raise DataError(f"{_show(path)}: found no PNG, JPEG or NIfTI file")
        files += more
    numbers = ["slice", "position", "low", "high"]
    known = _split_table(run).drop_duplicates("sha256").set_index("sha256")
    known = known[["subject", "label", *numbers]]
    table = known.reindex([*map(file_sha256, files)]).reset_index(drop=True)
    table = table.assign(path=files, split="test")
    table[numbers] = table[numbers].astype(float)
    table["scan"] = [
        _show(re.sub(r"\d+([^/\d]*)$", r"*\1", os.path.abspath(file)))
        for file in files
    ]
    stems = pd.Series([_show(os.path.basename(file)) for file in files])
    table = table.fillna({"subject": stems, "slice": 0, "label": ""})
    plan = _plan_of_run(run, _white_of_run(run))
    file, _, found = _decode(table, here, plan)
    rejected = found.assign(path=table["path"])[found["reason"] != ""]
    if len(rejected):
        raise DataError(_listed(rejected, here, len(table), advice=""))
    table = table.drop(columns=["low", "high"]).join(found[KNOWN])
    table["slice"] = table["slice"].astype(int)
    slices = _slices_of_run(run, file, table, here)
    if found["cut"].any() or not {*_sizes(table)} <= {*plan.kept, plan.size}:
        print(_sizes_line(slices, plan, found))
    _warn_of_crop(slices, run)
    return slices


def _warn_of_crop(slices, run):
    """Say of how many images the crop of a run loses content."""
    crop = run.info["crop"]
    if crop and (count := len(outside(slices, crop))):
        warn(f"{count} images reach beyond the crop of the run, and lose that")


def file_sha256(path):
    """Return the digest of a file; `DataError` if it cannot be read."""
    try:
        return hashlib.sha256(_read_bytes(path)).hexdigest()
    except _Unfit as error:
        raise DataError(f"{_show(path)}: {error}") from error


def content_box(slices, multiple, flips=False):
    """Return the box (top, left, height, width) of the content of all images.

    With `flips` also of the mirrored ones. Height and width in pixels are
    rounded up to a multiple, which makes the margin around the content; where
    a box would not be smaller, it is as long as the frame.
    """
    shown, box = np.zeros(slices.size, bool), []
    for images in slices.chunks():
        shown |= (images > utils.FOREGROUND * 255).any(axis=0)
    if flips:
        shown |= np.flip(shown, slices.mirror_axis - 1)
    for axis, length in enumerate(slices.size):
        places = np.flatnonzero(shown.any(1 - axis))
        first, last = places[[0, -1]] if len(places) else (0, length)
        side = last + 1 - first
        side = min(-(-side // multiple) * multiple, length)
        begin = np.clip((first + last + 1 - side) // 2, 0, length - side)
        box.append((int(begin), int(side)))
    (top, height), (left, width) = box
    return top, left, height, width


def outside(slices, box):
    """Return the rows of the table whose images reach beyond a box.

    The box is as of `content_box`.
    """
    (top, left, height, width), seen = box, []
    for images in slices.chunks():
        images[:, top : top + height, left : left + width] = 0
        seen += list((images > utils.FOREGROUND * 255).any(axis=(1, 2)))
    return np.flatnonzero(seen)


# --------------------------------------------------------------- 6. Batches
#
# TensorFlow maps the file of pixels and takes rows of it, so that no pipeline
# waits for Python.


def divisible_batch_size(count, batch_size, parts):
    """Return the largest batch size up to this one that makes `parts` parts.

    None is empty, also not of the last, smaller batch of an epoch of `count`
    images. 0 if there are fewer images than parts.

    >>> divisible_batch_size(33, 16, 2)
    15
    """
    for size in range(batch_size, parts - 1, -1):
        if count % size == 0 or count % size >= parts:
            return size
    return 0


def training_batches(
    source,
    batch_size,
    steps_per_epoch,
    seed,
    first_step=0,
    parts=(0, 1, 1),
    transform=None,
):
    """Return endless full batches as a `tf.data.Dataset`.

    Step t is of epoch t // `steps_per_epoch`. The order of an epoch is a
    function of (seed, epoch) only, so starting at a later step gives exactly
    the rest of the uninterrupted sequence. An epoch that ends inside a batch
    goes on from its own beginning.

    Args:
        source: `Slices` (batches of float32 images in [0, 1]), an array, or
            a dict or tuple of these, all equally long.
        batch_size, steps_per_epoch: ints >= 1.
        seed, first_step: ints >= 0.
        parts: (first, last, count): parts `first` to `last` - 1 of each batch,
            one after the other, of `count` parts of about equal size.
        transform: function (batch, epoch, rows of the source) -> batch of
            TensorFlow operations.
    """
    count = _count(source)
    first_epoch, skipped = divmod(first_step, steps_per_epoch)

    @tf.autograph.experimental.do_not_convert
    def epoch_rows(epoch):
        # The stream of a named algorithm is the same on every device and with
        # every version of TensorFlow; that of a shuffle is not promised.
        keys = tf.random.stateless_uniform(
            [count], [seed, epoch], None, None, tf.int64, "philox"
        )
        numbers = tf.range(steps_per_epoch * batch_size) % count
        rows = tf.gather(tf.argsort(keys), numbers)
        begin = tf.where(epoch == first_epoch, skipped * batch_size, 0)
        rows = tf.data.Dataset.from_tensor_slices(rows[begin:])
        return rows.batch(batch_size).map(lambda rows: (epoch, rows))

    epochs = tf.data.Dataset.range(first_epoch, 2**62)
    return _batches(source, epochs.flat_map(epoch_rows), parts, transform)


def ordered_batches(source, batch_size=32, parts=(0, 1, 1)):
    """Return every row once, in order; the arguments are as of training."""
    rows = tf.data.Dataset.range(_count(source), output_type=tf.int32)
    epoch = tf.zeros([], "int64")
    order = rows.batch(batch_size).map(lambda rows: (epoch, rows))
    batches = _batches(source, order, parts)
    steps = -(-_count(source) // batch_size) * (parts[1] - parts[0])
    return batches.apply(tf.data.experimental.assert_cardinality(steps))


def _count(source):
    count = len(tf.nest.flatten(source)[0])
    if not count:
        raise DataError("no images, expected at least one")
    return count


def _batches(source, order, parts, transform=None):
    """Return the batches at the (epoch, rows) of a dataset."""
    begin, end, total = parts

    @tf.autograph.experimental.do_not_convert
    def cut(epoch, rows):
        size = tf.size(rows)
        return tf.data.Dataset.range(begin, end, output_type=tf.int32).map(
            lambda k: (epoch, rows[size * k // total : size * (k + 1) // total])
        )

    if total > 1:
        order = order.flat_map(cut)
    fetch = tf.nest.map_structure(_fetch, source)

    @tf.autograph.experimental.do_not_convert
    def load(epoch, rows):
        batch = tf.nest.map_structure(lambda get: get(rows), fetch)
        return transform(batch, epoch, rows) if transform else batch

    batches = order.map(load, tf.data.AUTOTUNE, deterministic=True)
    return batches.prefetch(2)


def _fetch(data):
    """Return a function: row numbers -> batch, inside a dataset's graph."""
    if not isinstance(data, Slices):
        with tf.device("CPU"):
            data = tf.constant(data)
        return lambda rows: tf.gather(data, rows)
    last = int(np.argmax(data.rows))
    data.read_bytes([last])  # refuses a damaged file now
    shape = (data.rows[last] + 1, *data.size, 1)
    name = os.fsencode(data.file)

    def fetch(rows):
        # A map each time, for pages that are read stay in it.
        images = tf.raw_ops.ImmutableConst(
            dtype=tf.uint8, shape=shape, memory_region_name=name
        )
        images = tf.gather(images, tf.gather(data.rows, rows))
        return tf.cast(images, tf.float32) / 255

    return fetch


def distributed(strategy, make):
    """Return the dataset of `make(parts=...)`: each replica gets its part."""
    replicas = strategy.num_replicas_in_sync
    if replicas == 1:
        return make()

    def of_worker(context):
        own = replicas // context.num_input_pipelines
        first = own * context.input_pipeline_id
        return make(parts=(first, first + own, replicas))

    return strategy.distribute_datasets_from_function(of_worker)


def augment(
    images, seed, numbers, strength=1.0, flips=0.0, epoch=0, mirror_axis=2
):
    """Return images (B, H, W, 1) in [0, 1] shifted and brightened a little.

    Shifts are of whole pixels: to interpolate would blur what models learn.
    What happens to an image is a function of (seed, epoch, number) only: it
    is the same in any batch, in a dataset's graph or outside.

    >>> augment(slices.read(), seed=0, numbers=range(len(slices))).shape
    TensorShape([8, 128, 112, 1])

    Args:
        numbers: (B,) ints >= 0, say the rows of a table.
        strength: float or scalar tensor >= 0; at 1 up to 3 pixels of 176 each
            way and 7 % of the intensity.
        flips: float or scalar tensor in [0, 1]; share of images to mirror.
        mirror_axis: of the batch, as of `Slices.mirror_axis`.
    """
    images = tf.convert_to_tensor(images, tf.float32)
    seed, epoch = tf.cast(seed, tf.int64), tf.cast(epoch, tf.int64)
    # The order of the epoch is drawn with (seed, epoch) itself.
    key = tf.random.experimental.stateless_fold_in([seed, epoch], 0)
    # Of this generator the first rows are the same however many there are.
    count = tf.reduce_max(numbers) + 1
    draws = tf.random.stateless_uniform([count, 4], key, -1, 1, alg="philox")
    draws = tf.gather(draws, numbers)
    flip = draws[:, 0, None, None, None] < 2 * tf.cast(flips, tf.float32) - 1
    images = tf.where(flip, tf.reverse(images, [mirror_axis]), images)
    sides = images.shape[1:3]
    draws *= tf.cast(strength, tf.float32)
    shift = tf.cast(tf.round(3 / 176 * max(sides) * draws[:, 1:3]), tf.int32)
    images = tf.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))  # black comes in
    for axis, side in enumerate(sides, 1):
        rows = tf.range(1, side + 1) - shift[:, axis - 1, None]
        rows = tf.clip_by_value(rows, 0, side + 1)
        images = tf.gather(images, rows, axis=axis, batch_dims=1)
    gain = 1 + 0.07 * draws[:, 3, None, None, None]
    return tf.clip_by_value(images * gain, 0, 1)


# ------------------------------------------------------------- 7. Simulator
#
# Lengths are in mm about the anterior commissure, axes (z, y, x) pointing up,
# forward and right, as the planes are stacked.

# Number of the first subject, for each layout that is simulated.
FIRST_IDS = {"oasis": 1, "adni": 100_001, "hipmri": 4}
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


@functools.cache
def _anatomy():
    """Return maps of the MNI152 brain, 1 mm: tissues, and three of pull.

    `tissues` is (4, z, y, x): grey matter, white matter, fluid, brain. The
    pull points to the ventricles, its length is 1 at most, at their wall.
    """
    head, grey, white = (
        getattr(mni152, f"load_mni152_{name}template")(resolution=1)
        .get_fdata(dtype=np.float32)
        .transpose()
        for name in ("", "gm_", "wm_")
    )
    brain = ndimage.binary_fill_holes(head > 0.15).astype(np.float32)
    brain = ndimage.gaussian_filter(brain, 0.7)
    fluid = np.clip(brain - grey - white, 0, 1)
    ends = np.transpose(_VENTRICLES) + _TEMPLATE_ORIGIN
    box = tuple(map(slice, *ends))
    ventricles = np.zeros_like(fluid)
    ventricles[box] = _largest_part(fluid[box] > 0.5)
    pull = np.stack(np.gradient(ndimage.gaussian_filter(ventricles, 4)))
    pull /= np.linalg.norm(pull, axis=0).max()
    # Averaging many people has filled the sulci: grey matter that is darker
    # than its surroundings is where they were.
    dark = ndimage.gaussian_filter(head, 2) - head - 0.005
    fluid = fluid + 6 * np.clip(dark, 0, 0.2) * (grey > 0.3)
    return np.stack([grey, white, fluid, brain]), pull


def _largest_part(mask):
    """Return the largest connected part of a mask; all of an empty one."""
    parts, _ = ndimage.label(mask)
    sizes = np.bincount(parts.ravel())[1:]
    return parts == 1 + np.argmax(sizes) if len(sizes) else mask


def _warp(rng, axes, spacing, spread):
    """Return a smooth random displacement (3, *lattice) in mm.

    Normal knots `spacing` mm apart along each of the axes (in mm), between
    which cubic B-splines run.
    """
    knots = [int(np.ptp(axis) // spacing) + 4 for axis in axes]
    field = rng.normal(0, spread, (3, *knots))
    for axis, count in zip(axes, knots, strict=True):
        at = (axis - axis.min()) / spacing + 1
        spline = interpolate.BSpline.design_matrix
        basis = spline(at, np.arange(-2.0, count + 2), 3).toarray()
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
    noise = rng.normal(size=at.shape[1:])
    texture = ndimage.gaussian_filter(noise, (0.5, 1, 1))
    texture /= texture.std()
    image = np.zeros(at.shape[1:])
    # Later ones lie over earlier ones: name; centre and radii (up, left, back)
    # in mm; intensity, strength of its texture; 2 sides: one on either side.
    for solid in pd.read_csv(utils.RESOURCES / "pelvis.csv").itertuples():
        centre = np.array(solid[2:5]) * rng.uniform(0.95, 1.05, 3)
        centre += rng.normal(0, 1.5, 3)
        radii = np.array(solid[5:8]) * rng.uniform(0.9, 1.1, 3)
        level = solid.intensity * rng.uniform(0.9, 1.1)
        level = level * (1 + solid.texture * texture)
        for side in (1, -1)[: solid.sides]:
            away = at - (centre * (1, side, 1))[:, None, None, None]
            away = np.linalg.norm(away / radii[:, None, None, None], axis=0)
            inside = np.clip((1 - away) * radii.min() / pixel + 0.5, 0, 1)
            image += inside * (level - image)
    image = _rician(rng, np.clip(image, 0, None), 0.015)
    return np.rint(image * rng.uniform(300, 3000)).astype(np.int16)


def head_depth(image):
    """Return how many pixels inside the head each one of (H, W) is."""
    head = ndimage.binary_fill_holes(_largest_part(image > 0.08))
    head = np.pad(head, 1)  # the frame's edge is an outline too
    return ndimage.distance_transform_edt(head)[1:-1, 1:-1]


def ventricle_areas(images, positions):
    """Return the pixels that ventricles cover in slices of simulated brains.

    Counted are dark pixels deep inside the brain: below half of its bright
    level, and further from its outline than half of the deepest point. Only
    the image is measured, so a generated slice will do.

    Args:
        images: (N, H, W) or (N, H, W, 1), intensities in [0, 1].
        positions: (N,) slice positions in [0, 1].

    Returns: float64 (N,); NaN outside of `VENTRICLE_POSITIONS`.
    """
    (low, high), areas = VENTRICLE_POSITIONS, np.full(len(images), np.nan)
    for k, (image, at) in enumerate(zip(images, positions, strict=True)):
        if low <= at <= high:
            image = np.reshape(image, image.shape[:2])
            depth = head_depth(image)
            bright = np.percentile(image[depth > 0], 90) if depth.any() else 0
            dark = (image < bright / 2) & (depth > depth.max() / 2)
            areas[k] = ndimage.binary_opening(dark).sum()
    return areas


def simulate(dest, layout="oasis", subjects=60, image_size=128, seed=0):
    """Write a data set of simulated slices, return its folder; see `Simulate`.

    Subject k of a seed is the same whatever the other arguments but the
    layout and size. About 75 % of the subjects train, 10 % validate (of ADNI
    85 % and none), 15 % test. A folder that holds the same simulation is kept;
    `DataError` if it holds anything else.
    """
    dest, about = Path(dest), {"layout": layout, "subjects": subjects}
    about |= {"image_size": image_size, "seed": seed}
    options = Simulate(dest=str(dest), **about)
    people = list(_people(options))
    about |= {
        "about": "simulated: brains from the MNI152 anatomy, pelvises from "
        "simple solids; no person was scanned",
        "labels": {subject: label for _, subject, label, _ in people},
    }

    def write(folder):
        folder.mkdir()
        _anatomy() if layout != "hipmri" else None  # before the threads
        work = functools.partial(_simulate_subject, folder, options)
        _in_parallel("simulating", work, *zip(*people, strict=True))
        utils.write_json(folder / MARKER, about)

    if not _holds(dest, about):
        try:
            utils.write_atomic(dest, write)
        except OSError:
            if not _holds(dest, about):  # another process may have been faster
                raise
    return dest


def simulated_folder(subjects, layout="oasis", image_size=128):
    """Return a folder in `data`, simulated now unless it is there."""
    name = f"simulated-{subjects}"
    if (layout, image_size) != ("oasis", 128):
        name = f"simulated-{layout}-{subjects}-{image_size}"
    return simulate(Path("data") / name, layout, subjects, image_size)


def _people(options):
    """Yield (number, subject, label, split); ADNI has no split to validate."""
    first, count = FIRST_IDS[options.layout], options.subjects
    test, validate = max(1, round(0.15 * count)), max(1, round(0.1 * count))
    validate *= options.layout != "adni"
    counts = (count - validate - test, validate, test)
    for k, split in enumerate(np.repeat(SPLITS, counts).tolist()):
        label = ("AD" if k % 2 else "NC") if options.layout != "hipmri" else ""
        yield k, f"{first + k:03d}", label, split


def _holds(dest, about=None):
    """Tell whether a folder holds this simulation; refuse any other."""
    if not dest.exists():
        return False
    found = "other files"
    if dest.is_dir() and not any(dest.iterdir()):
        is_fixed = dest.is_symlink() or os.path.ismount(dest)
        if not (is_fixed or dest.samefile(".")):
            return False  # a new folder will take its place
        found = "a link, a mounted or the current folder"
    if about and (dest / MARKER).exists():
        if _read_marker(dest) == about:
            return True
        found = "another simulation"
    raise DataError(
        f"{_show(dest)}: found {found}, expected a new or an empty folder"
    )


def _simulate_subject(folder, options, number, subject, label, split):
    """Write the slices of one subject."""
    layout, size = LAYOUTS[options.layout], options.image_size
    rng = np.random.default_rng([options.seed, number])
    parent, first = folder / f"{layout.prefix}{split}", 0
    if options.layout == "hipmri":
        planes = _simulate_pelvis(rng, size)
    else:
        planes = _simulate_brain(rng, label, size, BRAIN_PLANES[options.layout])
    if options.layout == "adni":
        parent, first = parent / label, int(rng.integers(60, 90))
    parent.mkdir(parents=True, exist_ok=True)
    for k, plane in enumerate(planes, first):
        path = parent / layout.name.format(subject, k)
        if options.layout == "hipmri":
            data = nibabel.Nifti1Image(plane, np.eye(4)).to_bytes()
            path.write_bytes(gzip.compress(data, mtime=0))
        else:
            Image.fromarray(utils.to_pixels(plane)).save(path, quality=95)


# ---------------------------------------------------- 8. Slicing of volumes

VOLUME_FILE = re.compile(
    r"(?is)(.*/)?[^./][^/]*\.(nii|nii\.gz|img|img\.gz|mgz|mgh|mnc)"
)
# How the Brain Imaging Data Structure calls kinds of images.
KINDS = re.compile(
    r"(?i)(?:^|[_-])(T[12][a-z]*|PD(?:w|T2)?|FLAIR|MRA|SWI|DTI|ADC|angio|"
    r"inplaneT[12]|UNIT1|bold|sbref|dwi|asl|epi|magnitude\d?|phase\w*)"
    r"(?:-\d+)?(?:_[a-z]+)*$"  # T1w_acpc_dc, T1_brain
)
# Where the planes of a stack, their rows and their columns go to (Superior,
# Posterior, Right and so on), and how a picture says so.
PLANES = {
    "axial": ("SPR", "top: front, left: left of the body"),
    "coronal": ("AIR", "top: head, left: left of the body"),
    "sagittal": ("RIA", "top: head, left: back"),
}
# Visits behind a subject: AB01_M12, AB01_BL.
VISITS = re.compile(rf"(?<=\d)(?:[-_. ]+(?:{APART}|(?i:bl|sc|pre|post)))+$")
MISSING = {"", ".", "n/a", "na", "nan", "none", "?"}  # for a label, any case
OBLIQUE = math.radians(15)  # between the axes of voxels and of the body
INSIDE = 0.1  # of the intensity range: what is brighter is content


@utils.settings
class Slice:
    """Cut volumes into slices that train.py reads."""

    src: Positional[Annotated[str, arg(metavar="SRC")]]
    """Volume (NIfTI, Analyze, MGZ, MINC) or folder of volumes."""
    dest: Positional[Annotated[str, arg(metavar="DEST")]]
    """Folder to make."""
    layout: Literal["folder", "oasis"] = "folder"
    """Names of the files; only folder has labels and several sessions."""
    match: str = "*"
    """Take only volumes whose path fits, such as '*T1w*'."""
    subject_pattern: str | None = None
    """Regular expression of the subject in a path (default: guessed)."""
    plane: Literal["axial", "coronal", "sagittal"] = "axial"
    """Plane; on the left is the body's left, of sagittal slices its back."""
    slices: utils.integer(1, 1024) = 32
    """Slices of a volume, evenly spread."""
    start: Annotated[utils.Fraction, arg(name="from")] = 0.0
    """Where the slices begin in what holds content; 0: its low end."""
    stop: Annotated[utils.Fraction, arg(name="to")] = 1.0
    """Where they end; 1: its high end."""
    spacing: utils.number(0.05, 20) = 1.0
    """Side of a pixel in mm."""
    image_size: utils.ImageSize | None = None
    """Height and width in pixels (default: what holds all content)."""
    bits: Literal[8, 16] = 8
    """Bits of a pixel."""
    split: str = ",".join(map(str, SHARES))
    """Shares of the subjects that train, validate and test."""
    labels: Annotated[str | None, arg(metavar="FILE")] = None
    """Table (.csv, .tsv) of subjects and their labels."""
    label_column: str = "group"
    """Column of the labels."""
    skip_bad: bool = False
    """Leave out unfit volumes."""

    @property
    def shares(self):
        try:
            shares = tuple(map(float, self.split.split(",")))
        except ValueError:
            shares = ()
        if len(shares) != 3 or min(shares) < 0 or not 0.99 < sum(shares) < 1.01:
            raise FlagError(
                f"--split: found {self.split}, expected three shares of 1, "
                "such as 0.7,0.15,0.15"
            )
        return shares


def slice_volumes(options):
    """Cut volumes into a new folder of slices; see `Slice`."""
    dest, shares = Path(options.dest), options.shares
    if options.start >= options.stop:
        raise FlagError(f"--from: found {options.start}, expected below --to")
    _holds(dest)
    table = _find_volumes(Path(options.src), options)
    table["label"] = _read_labels(table["subject"], options)
    splits = split_subjects(table["subject"], shares)
    table["split"] = table["subject"].map(splits)
    counts = collections.Counter(splits.values())
    print(
        f"{len(splits)} subjects, such as {_some(splits, 3)}: "
        + ", ".join(f"{counts[split]} {split}" for split in SPLITS)
    )
    if len(splits) == 1 < len(table):
        warn(
            f"all {len(table)} volumes are taken for those of one subject; "
            "tell subjects with --subject-pattern"
        )
    # Near the new folder: the usual place of temporary files may be small.
    place = next(filter(Path.is_dir, dest.absolute().parents))
    utils.remove_temporary_files(place.glob("*.tmp-*"))
    mark = utils.temporary_mark()
    with tempfile.TemporaryDirectory(mark, ".", place) as folder:
        table["file"] = [f"{folder}/{k}.npy" for k in table.index]
        work = functools.partial(_cut_to_file, options)
        pairs = table["source"], table["file"]
        done = _in_parallel("slicing", work, *pairs, most=8)  # large volumes
        table = table.join(pd.DataFrame(done, columns=["reason", "notes"]))
        unfit = table[table["reason"] != ""]
        unfit = unfit.rename(columns={"source": "path"})
        if len(unfit) and not options.skip_bad or len(unfit) == len(table):
            raise DataError(_listed(unfit, Path(), len(table)))
        table = table.drop(unfit.index)
        write = functools.partial(_write_slices, table=table, options=options)
        utils.write_atomic(dest, write)
    for row in unfit.itertuples():
        print(f"left out {_show(row.path)}: {row.reason}")
    for note, scans in table.explode("notes").groupby("notes")["scan"]:
        print(f"{len(scans)} volumes: {note} ({_some(scans, 3)})")
    print(
        f"slices of {len(table)} volumes in {_show(dest)}; look at "
        "orientation.png in it before you train"
    )


def _find_volumes(source, options):
    """Return a table of the volumes: source, subject, scan."""
    files, ignored = [str(source)], []
    if not source.is_file():
        below = files_below(source, ignored)
        files = sorted(filter(VOLUME_FILE.fullmatch, below))
    if masks := [*filter(VOLUME_FILE.fullmatch, ignored)]:
        print(f"{len(masks)} masks are not read: {_some(map(_stem, masks))}")
    files = {os.path.relpath(file, source.parent): file for file in files}
    paths = fnmatch.filter(files, options.match)
    if not paths:
        there = sorted(os.listdir(source)) if source.is_dir() else [source]
        raise DataError(
            f"{_show(source)}: found {len(files)} volumes "
            f"({_some(files, 3)}) in {_some(there)}, expected NIfTI, "
            f"Analyze, MGZ or MINC files that fit --match '{options.match}'"
            f"{_word_on_dicom(source)}"
        )
    _refuse_several_kinds(paths)
    pattern, folders = options.subject_pattern, _subject_folders(paths)
    _compile(pattern or "")
    pairs = [*zip(paths, folders, strict=True)]
    subjects = _unify(_subject_of(*pair, pattern) for pair in pairs)
    sources = [files[path] for path in paths]
    table = pd.DataFrame({"source": sources, "subject": subjects})
    if not pattern:
        unsure = [_told_by_name(path) is None for path in paths]
        names = np.array([folder or _stem(path) for path, folder in pairs])
        if any(unsure):
            _warn_of_likeness(names[unsure], table["subject"][unsure])
    named = {*zip(map(_stem, paths), table["subject"], strict=True)}
    people = collections.Counter(x for x, subject in named if x not in subject)
    several = sorted(name for name, count in people.items() if count > 1)
    if len(several) > 1:
        warn(f"kinds of volumes, all taken: {_some(several)}; see --match")
    session = 1 + table.groupby("subject").cumcount()
    if options.layout == "oasis" and session.max() > 1:
        raise FlagError(
            "--layout: found several volumes of a subject, such as "
            f"{table['subject'][session > 1].iloc[0]}, expected folder "
            "or --match"
        )
    table["scan"] = "sub-" + table["subject"] + "_ses-" + session.map(str)
    return table


def _refuse_several_kinds(paths):
    """Refuse volumes whose names or folders say different kinds."""
    parts = [[_stem(path), *reversed(path.split("/")[:-1])] for path in paths]
    kinds = [next(filter(None, map(KINDS.search, p)), None) for p in parts]
    kinds = collections.Counter(match[1] for match in kinds if match)
    if len({kind.lower().removesuffix("w") for kind in kinds}) > 1:
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        raise FlagError(
            f"--match: found several kinds of volumes, {found}; expected one, "
            f"such as --match '*{next(iter(kinds))}.*'"
        )


def _warn_of_likeness(stems, subjects):
    """Say if names alike up to a number that varies are of many subjects.

    Or if only numbers behind a contrast tell them, maybe those of series:
    T1_MPRAGE_2, T1_MPRAGE_9.
    """
    stems = pd.Series([*map(_show, stems)], subjects.index)
    words = stems.str.split(r"[\W_]+", regex=True, expand=True)
    varies = words.apply(lambda word: word.str.contains(r"\d", na=False).all())
    varies &= words.nunique() > 2
    heads = words.loc[:, : varies.idxmax()].agg("_".join, axis=1)
    alike = subjects.groupby(heads if varies.any() else subjects).unique()
    behind = stems.str.match(r"(?i)\D*(?<![^\W_])(T[12]|FLAIR|MPRAGE)")
    behind &= subjects == stems.map(_letters_and_digits)
    alike = subjects.unique() if behind.all() else max(alike, key=len)
    if len(alike) > 1:
        warn(
            f"volumes named alike count as several subjects: {_some(alike, 3)};"
            " if they are of one person, tell subjects with --subject-pattern"
        )


def _stem(path):
    """Return the name of a file without the suffix of its format."""
    return SUFFIX.sub("", os.path.basename(path))


def _subject_folders(paths):
    """Return the part of each path that is the folder of a subject, or "".

    It is where most files have the name of another, begin with the name of
    their folder or are a date: P01/T1.nii, P01/P01_t1.nii, P01/20190310.nii.
    """
    stems = [*map(_stem, paths)]
    parts = [
        [p for p in path.split("/")[:-1] if not re.fullmatch(APART, p)]
        for path in paths
    ]
    times, folders = collections.Counter(stems), {tuple(p) for p in parts}
    numbered = re.compile(r".*\d").match
    alike = [
        times[stem] > 1
        or bool(re.fullmatch(DATE, stem))
        or bool(numbered(p[-1]))
        and stem.startswith(p[-1])
        # ADNI_3102_MR, 100307_T1w
        or any(n.isdigit() and f"_{n}_" in f"_{stem}_" for n in p)
        for p, stem in zip(parts, stems, strict=True)
        if p
    ]
    if 2 * sum(alike) <= len(paths):
        return [""] * len(paths)
    # The first level that is no class: classes are few, and have no numbers.
    levels = [
        level
        for level in itertools.zip_longest(*parts, fillvalue="")
        if len(set(level)) > 1 and 4 * len(set(level)) >= len(folders)
    ] or [[""] * len(paths)]

    def is_class(names):
        return 2 * len([*filter(numbered, names)]) < len(names)

    best = min(levels, key=is_class)
    if is_class(best) and not is_class(stems) and len(times) > len(set(best)):
        # Classes that number people anew: AD/001.nii, NC/001.nii.
        return [f"{c}_{s}" for c, s in zip(best, stems, strict=True)]
    return best


def _subject_of(path, folder="", pattern=None):
    """Return the subject that a path names, in letters and digits."""
    if pattern:
        match = re.search(pattern, path, re.IGNORECASE)
        if not match:
            raise DataError(
                f"{_show(path)}: found no subject by the --subject-pattern "
                f"{pattern}, expected one"
            )
        return _letters_and_digits(match.groupdict().get("subject") or match[0])
    if match := _told_by_name(path):
        return re.sub(r"^sub-|[\W_]", "", match[0])
    return _letters_and_digits(folder or VISITS.sub("", _stem(path)))


def _told_by_name(path):
    """Return the match of one of `SUBJECTS` in a path, or None."""
    words = (rf"(?<![^\W_])(?:{name})(?![^\W_])" for name in SUBJECTS)
    tried = (re.search(word, path, re.IGNORECASE) for word in words)
    return next(filter(None, tried), None)


def _letters_and_digits(name):
    """Return a name without other characters, such that 1_23 is not 12_3."""
    apart = re.sub(r"(?<=\d)[\W_]+(?=\d)", "x", name)
    return re.sub(r"^sub-|[\W_]", "", apart) or "x"


def _read_labels(subjects, options):
    """Return the label of each subject, "" if unknown."""
    if options.labels is None:
        if options.label_column != Slice.label_column:
            raise FlagError("--label-column: needs the table of --labels")
        if options.layout == "folder":
            print("no labels: folders give none; --labels names a table")
        return ""
    if options.layout == "oasis":
        raise FlagError("--labels: the OASIS layout has none; use folder")
    try:
        text = {"dtype": str, "keep_default_na": False, "engine": "python"}
        text |= {"encoding": "utf-8-sig", "index_col": False}  # as of Excel
        text["sep"] = "\t" if options.labels.endswith(".tsv") else None
        known = pd.read_csv(options.labels, **text).fillna("")  # short rows
        if options.label_column not in known:
            raise ValueError(f"found the columns {_some(known)}")
        labels = known.pop(options.label_column)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(
            f"{_show(options.labels)}: {error}; expected a table in UTF-8 "
            f"with the column {options.label_column} of --label-column"
        ) from error
    labels = labels.str.strip()
    labels = labels.mask(labels.str.casefold().isin(MISSING))
    # They name folders; those that begin with a dot are hidden.
    labels = labels.str.replace(r"[\s/\\\0]+", "-", regex=True)
    labels = labels.str.replace(r"^\.", "0.", regex=True)
    _refuse_misread(labels.dropna().unique(), options.labels)
    wanted = subjects.map(_canonical)
    column, keys = _subject_column(known, wanted, options.labels)
    found = labels.groupby(keys).agg(["first", "nunique"])
    result = wanted.map(found["first"]).fillna("")
    names = result[result != ""].unique()
    print(
        f"{len(names)} labels, such as {_some(names, 3)}, in column "
        f"{options.label_column}; subjects in column {column}"
    )
    if several := sum(found["nunique"][found.index.isin(wanted)] > 1):
        print(f"{several} subjects have several labels; the first is taken")
    if unknown := sum(result == ""):
        print(f"{unknown} of {len(result)} volumes have no label")
    return result


def _subject_column(table, wanted, file):
    """Return the column of a table that names the subjects, and its ids.

    The one that names most of them; of two rather names than numbers, which may
    be those of the rows, and rather one that is called like an id.
    """
    whole = table.map(lambda value: re.sub(r"\.0$", "", value.strip()))
    keys = whole.map(lambda value: _canonical(_subject_of(value)))
    numbers = table.map(str.isdigit).mean()
    called = re.compile(r"(?i)subj|partic|patient|person|(^|[^a-z])(pt?|r)?id")
    fits = {
        k: (len({*keys[k]} & {*wanted}), -numbers[k], bool(called.search(k)))
        for k in keys
    }
    column = max(fits, key=fits.get, default=None)
    if not fits or not fits[column][0]:
        raise DataError(
            f"{_show(file)}: no column names a subject of the volumes, "
            f"expected ids such as {_some(wanted, 3)}"
        )
    for other in fits:
        if fits[other] == fits[column] and any(keys[other] != keys[column]):
            raise DataError(
                f"{_show(file)}: the columns {column} and {other} both name "
                "the subjects, expected one; remove the other"
            )
    return column, keys[column]


def _refuse_misread(labels, file):
    """Refuse labels that `scan` would take for something else."""
    others = re.compile(rf"{VISIT}|(?i:{'|'.join(SUBJECTS)})")
    for name in labels:
        is_split = name.casefold() in SPLIT_NAMES
        if is_split or others.fullmatch(name) or MASKS.fullmatch(name):
            raise DataError(
                f"{_show(file)}: found the label {_show(name)}, expected none "
                "that reads like a visit, a person, a mask or a split"
            )


def _cut_to_file(options, source, file):
    """Write the slices of a volume; return why not, or "", and notes."""
    try:
        images, notes = cut_volume(source, options)
    except _Unfit as error:
        return str(error), []
    np.save(file, images)
    return "", notes


def cut_volume(path, options):
    """Return slices of a volume, uint16 (N, h, w), and notes.

    The volume is turned as its affine says, scaled to [0, 1] by percentiles,
    and resampled to square pixels about the middle of its content. Between
    thin planes is interpolated; thick ones are taken as they are.
    """
    volume, spacing, notes = _open_volume(path, PLANES[options.plane][0])
    some = volume[::2, ::2, ::2]
    low, high = _window(some)
    levels, counts = np.unique(some, return_counts=True)
    if len(levels) == 2:
        notes.append("two values only, as in a mask; see --match")
    if max(counts) > some.size / 5:  # a background of one value is black
        volume = np.where(volume == levels[counts.argmax()], low, volume)
    inside = volume > low + INSIDE * (high - low)
    if not inside.any() or inside.all():
        raise _Unfit("found no contrast, expected anatomy")
    high = float(np.percentile(volume[inside][::8], PERCENTILES[1]))
    at = _plane_positions(inside, options)
    if spacing[0] > 2 * options.spacing or len(volume) == 1:
        rows = np.unique(np.rint(at).astype(int))
        volume, inside, at = volume[rows], inside[rows], np.arange(len(rows))
    inside = inside[int(at[0]) : int(np.ceil(at[-1])) + 1]
    if not inside.any():
        raise _Unfit("found no content between --from and --to")
    step = options.spacing / spacing  # of pixels, in voxels
    step[0] = np.ptp(at) / max(len(at) - 1, 1) or 1
    begins, shape = [at[0]], [len(at)]
    for axis in (1, 2):
        mass = inside.sum(axis=(0, 3 - axis))
        places = np.flatnonzero(mass > 0.002 * mass.max())  # but for specks
        middle = np.average(np.arange(len(mass)), weights=mass)
        away = max(middle - places[0], places[-1] - middle) + 0.5
        shape.append(2 * int(np.ceil(away / step[axis])))
        begins.append(middle - (shape[-1] - 1) / 2 * step[axis])
    # A pixel larger than a voxel is about the mean of its voxels.
    spread = np.sqrt(np.maximum(0, step**2 - 1) / 12) * (0, 1, 1)
    volume = ndimage.gaussian_filter(volume, spread)
    images = ndimage.affine_transform(
        volume, np.diag(step), begins, tuple(shape), order=1, cval=low
    )
    scaled = np.clip((images - low) / max(high - low, 1e-6), 0, 1)
    if not scaled.any():
        raise _Unfit("its slices are black; are its voxels given in mm?")
    return np.rint(scaled * 65535).astype(np.uint16), notes


def _open_volume(path, axes):
    """Return float32 voxels along axes such as "SPR", their mm, and notes."""
    notes = []
    with _library("volume"):
        image = _open_nifti(path)
        if image.ndim < 3:
            raise _Unfit(f"found shape {image.shape}, expected a volume")
        if np.prod(image.shape[3:]) > 1:
            notes.append("the first of several volumes in a file is taken")
        voxels, spacing = _turn(image, axes)
        if spacing is None:
            raise _Unfit("found an affine without orientation, expected one")
        if max(nibabel.affines.obliquity(image.affine)) > OBLIQUE:
            notes.append("oblique: slices follow the voxels, not the body")
        if isinstance(image, nibabel.analyze.AnalyzeImage):  # also NIfTI
            codes = map(image.header.get, ("sform_code", "qform_code"))
            base = image.header.get_base_affine()  # of size and spacing alone
            if not any(codes) and np.array_equal(image.affine, base):
                notes.append("no orientation is stated: the sides are a guess")
    voxels = voxels.astype(np.float32)
    fit = np.isfinite(voxels)
    if not fit.all():
        notes.append("voxels that are NaN or infinite are made black")
        voxels = np.where(fit, voxels, voxels[fit].min(initial=0))
    return voxels, spacing, notes


def _plane_positions(inside, options):
    """Return where the planes lie along the first axis, in voxels."""
    mass = np.cumsum([0, *inside.sum(axis=(1, 2))]) / inside.sum()
    low, high = np.interp((0.005, 0.995), mass, np.arange(len(mass)) - 0.5)
    share = (np.arange(options.slices) + 0.5) / options.slices
    share = options.start + share * (options.stop - options.start)
    return np.clip(low + share * (high - low), 0, len(inside) - 1)


def _write_slices(folder, table, options):
    """Write the slices of all volumes, manifest and picture."""
    shapes = [np.load(name, "r").shape[1:] for name in table["file"]]
    size = options.image_size or tuple(-(-np.max(shapes, axis=0) // 16) * 16)
    names = ["subject", "scan", "label", "split", "source"]
    rows, cut, black = [], 0, INSIDE * 65535
    for volume in table.itertuples():
        about = {name: getattr(volume, name) for name in names}
        about["notes"] = " | ".join(volume.notes)
        for number, image in enumerate(np.load(volume.file)):
            name = f"{volume.scan}_slice-{number:03d}.png"
            name = "/".join(filter(None, (volume.split, volume.label, name)))
            if options.layout == "oasis":
                # There each subject has one volume.
                layout, subject = LAYOUTS["oasis"], f"{volume.Index + 1:03d}"
                name = layout.name.format(subject, number)
                name = f"{layout.prefix}{volume.split}/{name}"
            whole, image = image, fit_to(image, size)
            cut += np.sum(whole > black) > np.sum(image > black)
            if options.bits == 8:
                image = np.rint(image / 257).astype(np.uint8)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / name)
            rows.append({"path": name, "slice": number, **about})
    utils.write_csv(folder / "manifest.csv", pd.DataFrame(rows))
    if cut:
        size_text = utils.size_text(size)
        warn(f"--image-size {size_text} cuts content of {cut} slices")
    shown = []
    for volume in table.iloc[utils.spread(len(table), 12)].itertuples():
        images = np.load(volume.file, "r")
        some = images[utils.spread(len(images), 8)]
        cells = [fit_to(image, size) / 65535 for image in some]
        shown.append(utils.Row(volume.scan, cells))
    title = PLANES[options.plane][1]
    utils.image_grid(folder / "orientation.png", shown, title)


# ---------------------------------------------------------- 9. Command line


@utils.settings
class Check(utils.ReadSettings):
    """Show what would be trained on, and which files cannot be."""

    dir: Positional[Annotated[str, arg(metavar="DIR")]]
    """Folder of a data set."""
    dataset: Literal[("auto", *utils.DATASETS)] = "auto"
    """Its layout."""
    preview: Annotated[str | None, arg(metavar="FILE")] = None
    """Picture to write: slices of each split, before the crop."""


@utils.settings
class Simulate:
    """Write simulated slices in the layout of a real data set."""

    dest: Positional[Annotated[str, arg(metavar="DEST")]]
    """Folder to make."""
    layout: Literal[tuple(FIRST_IDS)] = "oasis"
    """Layout of the files."""
    subjects: utils.integer(3, 100_000) = 60
    """Simulated people."""
    image_size: utils.integer(32, 1024) = 128
    """Long side in pixels, a multiple of 16."""
    seed: utils.Seed = 0
    """Seed of every random choice."""

    def __post_init__(self):
        utils.check_image_size([self.image_size], 16)


def check(options):
    """Print what a folder holds; draw a few slices of each split."""
    values = dataclasses.asdict(options)
    folder, preview = values.pop("dir"), values.pop("preview")
    if options.dataset == "auto":
        known = options.subject_pattern is not None
        values["dataset"] = "folder" if known else detect_layout(folder)
    slices = load(utils.DataSettings(data_dir=folder, **values))
    for row in slices.rejected.itertuples():
        print(f"left out {_show(slices.root / row.path)}: {row.reason}")
    if preview:
        rows = []
        for part in map(slices.split, SPLITS):
            some = part.take(utils.spread(len(part), 8))
            names = some.table["subject"] + " " + some.table["slice"].map(str)
            if len(some):
                name = some.table["split"][0]
                rows.append(utils.Row(name, some.read(), [*names]))
        title = f"{slices.root.name}, {utils.size_text(slices.size)} pixels"
        utils.image_grid(preview, rows, title)
        print(f"{_show(preview)}: a few slices of each split")


def main(argv):
    """Run a verb of the command line."""
    verbs = {"check": Check, "slice": Slice, "simulate": Simulate}
    verb, options = utils.parse_verbs(verbs, argv, description=__doc__)
    with utils.StopSignals():
        if verb == "simulate":
            print(simulate(**dataclasses.asdict(options)))
        else:
            {"check": check, "slice": slice_volumes}[verb](options)


if __name__ == "__main__":
    utils.run_main(main)
