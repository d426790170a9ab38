"""Tests of dataset.py."""

import gzip
import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from PIL import Image

import dataset
from tests.conftest import SIZE, SLICES, blobs, write_nifti
from utils import DataError, FlagError, ResourceError

ROOT = Path(dataset.__file__).parent


def run_cli(*arguments):
    return subprocess.run(
        [sys.executable, "dataset.py", *map(os.fspath, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def png_bytes(array, **options):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG", **options)
    return stream.getvalue()


def jpeg_bytes(array, mode="L", **options):
    stream = io.BytesIO()
    Image.fromarray(array, mode="L").convert(mode).save(
        stream, "JPEG", **options
    )
    return stream.getvalue()


def nifti_bytes(array):
    return nibabel.Nifti1Image(array, np.eye(4)).to_bytes()


def patched(data, offset, layout, *values):
    """Return bytes with a field of a header overwritten."""
    data = bytearray(data)
    struct.pack_into("<" + layout, data, offset, *values)
    return bytes(data)


@pytest.fixture
def oasis(oasis_dir, tmp_path):
    return Path(shutil.copytree(oasis_dir, tmp_path / "data"))


@pytest.fixture
def hipmri(hipmri_dir, tmp_path):
    return Path(shutil.copytree(hipmri_dir, tmp_path / "data"))


@pytest.fixture
def adni(adni_dir, tmp_path):
    return Path(shutil.copytree(adni_dir, tmp_path / "data"))


@pytest.fixture(scope="session")
def oasis_index(oasis_dir):
    return dataset.verify(dataset.scan(oasis_dir, "oasis"))


def train_file(root, subject=1, k=0):
    return root / f"keras_png_slices_train/case_{subject:03d}_slice_{k}.nii.png"


def train_nifti(root, k=0):
    return root / f"keras_slices_train/case_004_week_0_slice_{k}.nii.gz"


# --------------------------------------------------------------------- scan


def test_scan_of_oasis(oasis_dir):
    index = dataset.scan(oasis_dir, "oasis")
    assert list(index.columns) == [
        "path",
        "subject",
        "scan",
        "slice",
        "position",
        "label",
        "split",
    ]
    assert index["split"].value_counts().to_dict() == {
        "train": 4 * SLICES,
        "validate": SLICES,
        "test": SLICES,
    }
    assert not index["path"].str.contains("seg_").any()
    assert index["slice"][:SLICES].tolist() == [0, 1, 2, 3]
    assert np.allclose(index["position"][:SLICES], [0, 1 / 3, 2 / 3, 1])
    assert index["subject"].unique().tolist() == [f"00{n}" for n in range(1, 7)]
    assert set(index["label"]) == {""}
    assert all(map(os.path.isabs, index["path"]))
    assert index.attrs["ignored"] == []


@pytest.mark.parametrize("nesting", ["", "..", "twice"])
def test_root_may_be_above_or_doubled(oasis_dir, tmp_path, nesting):
    root = oasis_dir / nesting
    if nesting == "twice":
        shutil.copytree(oasis_dir, tmp_path / "x" / "x")
        root = tmp_path
    assert len(dataset.scan(root, "oasis")) == 6 * SLICES
    assert dataset.detect_layout(root) == "oasis"


def test_resource_forks_are_not_a_second_data_set(oasis, tmp_path):
    shutil.copytree(oasis, tmp_path / "__MACOSX" / "data")
    assert len(dataset.scan(tmp_path, "oasis")) == 6 * SLICES
    shutil.copytree(oasis, tmp_path / "copy")
    with pytest.raises(DataError, match="several data sets.*copy"):
        dataset.scan(tmp_path, "oasis")


def test_scan_of_adni(adni_dir):
    index = dataset.scan(adni_dir.parent, "adni")
    assert set(index["split"]) == set(dataset.SPLITS)
    odd = index["subject"].astype(int) % 2 == 1
    assert (index["label"] == odd.map({True: "AD", False: "NC"})).all()
    assert index.groupby("subject")["split"].nunique().max() == 1
    assert dataset.detect_layout(adni_dir) == "adni"


def test_adni_without_class_folders(adni):
    for split in ("train", "test"):
        for label in ("AD", "NC"):
            for path in sorted((adni / split / label).iterdir()):
                path.rename(adni / split / path.name)
            (adni / split / label).rmdir()
    index = dataset.scan(adni, "adni")
    assert len(index) == 6 * SLICES
    assert set(index["label"]) == {""}


def test_stray_files_are_ignored_and_named(adni, capsys):
    stray = adni / "train" / "AD" / "101_78 (1).jpeg"
    shutil.copy(adni / "train" / "AD" / "101_78.jpeg", stray)
    (adni / "train" / "backup").mkdir()
    shutil.copy(stray, adni / "train" / "backup" / "999_1.jpeg")
    (adni / "test" / "Thumbs.db").write_text("")
    index = dataset.load_index(adni, "adni")
    assert len(index) == 6 * SLICES
    names = [os.path.basename(path) for path in index.attrs["ignored"]]
    assert sorted(names) == ["101_78 (1).jpeg", "999_1.jpeg", "Thumbs.db"]
    output = capsys.readouterr().out
    assert "3 files ignored" in output and "Thumbs.db" in output
    assert "no person is in two splits cannot be proved" in output


@pytest.mark.parametrize("form", ["gz", "nii", "folder"])
def test_scan_of_hipmri(hipmri, form):
    for path in sorted(hipmri.glob("*/*.nii.gz")) if form != "gz" else []:
        data = gzip.decompress(path.read_bytes())
        path.unlink()
        plain = path.with_suffix("")
        if form == "folder":
            plain.mkdir()
            plain /= plain.name
        plain.write_bytes(data)
    index = dataset.verify(dataset.scan(hipmri, "hipmri"))
    assert len(index) == 6 * SLICES
    assert index["subject"][0] == "004"
    assert index["scan"][0] == "004_week_0"
    assert dataset.native_size(index) == (SIZE, SIZE)


def test_weeks_are_scans_of_one_subject(hipmri):
    for k in range(2):
        name = f"case_004_week_1_slice_{k}.nii.gz"
        write_nifti(hipmri / "keras_slices_train" / name, blobs(99, k) * 1.5)
    index = dataset.scan(hipmri, "hipmri")
    scans = index[index["subject"] == "004"]["scan"].unique().tolist()
    assert scans == ["004_week_0", "004_week_1"]
    last = index[index["scan"] == "004_week_1"]
    assert last["position"].tolist() == [0, 1]


def test_a_slice_given_twice_is_taken_once(hipmri):
    path = train_nifti(hipmri)
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    index = dataset.scan(hipmri, "hipmri")
    assert len(index) == 6 * SLICES
    assert len(index.attrs["ignored"]) == 1


def test_carving_is_by_hash():
    ids = [f"{n:03d}" for n in range(1, 41)]
    assert sorted(dataset.carve(ids)) == CARVED_OF_40
    assert dataset.carve(reversed(ids)) == set(CARVED_OF_40)
    assert dataset.carve(["001", "002"]) == {"001"}
    assert dataset.carve(["7"]) == set()
    share = len(dataset.carve(map(str, range(2000)))) / 2000
    assert share == pytest.approx(0.1, abs=0.02)


CARVED_OF_40 = ["010", "023"]


@pytest.mark.parametrize("name", ["oasis", "hipmri"])
def test_a_missing_validation_split_is_carved(request, tmp_path, name):
    source = request.getfixturevalue(f"{name}_dir")
    root = Path(shutil.copytree(source, tmp_path / "data"))
    shutil.rmtree(next(root.glob("keras*_slices_validate")))
    index = dataset.scan(root, name)
    chosen = set(index[index["split"] == "validate"]["subject"])
    train = set(index[index["split"] == "train"]["subject"])
    assert chosen and train and chosen == dataset.carve(chosen | train)


def test_wrong_layouts_are_refused_in_one_line(oasis_dir, tmp_path, oasis):
    cases = {
        "nothing there": (tmp_path / "none", "oasis"),
        "found a file": (train_file(oasis), "oasis"),
        "not the hipmri layout.*keras_slices_train.*found keras_png": (
            oasis_dir,
            "hipmri",
        ),
    }
    for message, (root, name) in cases.items():
        with pytest.raises(DataError, match=message) as caught:
            dataset.scan(root, name)
        assert "\n" not in str(caught.value)
    shutil.rmtree(oasis / "keras_png_slices_test")
    with pytest.raises(DataError, match="keras_png_slices_test, found"):
        dataset.scan(oasis, "oasis")


def test_an_empty_split_is_refused(oasis):
    for path in (oasis / "keras_png_slices_test").iterdir():
        path.rename(path.with_suffix(".bmp"))
    with pytest.raises(DataError, match="no slices.*case_001.*found case_"):
        dataset.scan(oasis, "oasis")


def test_no_layout_or_several(tmp_path, oasis_dir, hipmri_dir):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DataError, match="no data set.*found pictures"):
        dataset.detect_layout(tmp_path)
    shutil.copytree(oasis_dir, tmp_path / "a")
    shutil.copytree(hipmri_dir, tmp_path / "b")
    with pytest.raises(DataError, match="oasis, hipmri.*--dataset"):
        dataset.detect_layout(tmp_path)


def test_a_subject_in_two_splits_is_refused(oasis):
    name = "case_001_slice_9.nii.png"
    Image.fromarray(blobs(77)).save(oasis / "keras_png_slices_test" / name)
    with pytest.raises(DataError, match="in two splits.*: 001;"):
        dataset.scan(oasis, "oasis")


def test_symlinks(oasis, tmp_path):
    train = oasis / "keras_png_slices_train"
    (train / "loop").symlink_to(train, target_is_directory=True)
    (train / "case_009_slice_0.nii.png").symlink_to(train_file(oasis))
    assert len(dataset.scan(oasis, "oasis")) == 6 * SLICES
    link = tmp_path / "link"
    link.symlink_to(oasis, target_is_directory=True)
    assert len(dataset.scan(link, "oasis")) == 6 * SLICES


def test_an_unreadable_folder_is_named(adni_dir, monkeypatch):
    scandir = os.scandir

    def refuse(path):  # permissions do not bind root, who may run the tests
        if os.fspath(path).endswith("AD"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="AD: cannot list.*denied"):
        dataset.scan(adni_dir, "adni")


def test_names_that_are_not_utf8(oasis, tmp_path, capsys):
    root = os.path.join(os.fsencode(tmp_path), b"caf\xe9 \xf0")
    try:
        os.rename(oasis, root)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    index = dataset.load_index(os.fsdecode(root), "oasis")
    assert os.fsencode(index["path"][0]).startswith(root)
    capsys.readouterr().out.encode()
    batch = next(iter(dataset.make_dataset(index, (SIZE, SIZE), 2)))
    assert batch.shape == (2, SIZE, SIZE, 1)
    os.remove(os.fsencode(index["path"][0]))
    with pytest.raises(DataError, match=r"caf\\udce9") as caught:
        dataset.verify(index)
    str(caught.value).encode()


# ------------------------------------------------------------------- verify


def test_verified_columns(oasis_dir, oasis_index):
    row = oasis_index.iloc[0]
    data = Path(row["path"]).read_bytes()
    assert row["sha256"] == hashlib.sha256(data).hexdigest()
    assert (row["height"], row["width"]) == (SIZE, SIZE)
    assert (row["low"], row["high"]) == (0, 255)
    assert oasis_index.attrs["rejected"] == []
    assert oasis_index.notna().all(axis=None)


def big_png(width, height):
    """A PNG header that claims a size, on a tiny file."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + crc


GREY = blobs(1234)
RGBA = np.dstack([GREY, GREY, GREY, GREY])
BAD_PICTURES = {
    "empty": (b"", "empty file"),
    "half PNG": (png_bytes(GREY)[:300], "truncated PNG"),
    "PNG without its end": (png_bytes(GREY)[:-12], "PNG"),
    "flipped bit": (
        png_bytes(GREY)[:200] + b"\0" + png_bytes(GREY)[201:],
        "damaged PNG",
    ),
    "PNG of 8 bytes": (png_bytes(GREY)[:8], "expected a PNG or JPEG"),
    "text": (b"not an image at all", "not an i.*expected a PNG or JPEG"),
    "NIfTI": (nifti_bytes(GREY), "expected a PNG or JPEG"),
    "GIF": (b"GIF89a" + bytes(50), "GIF89a.*expected a PNG or JPEG"),
    "alpha": (png_bytes(RGBA), "transparency"),
    "grey and alpha": (png_bytes(RGBA[..., :2]), "transparency"),
    "half JPEG": (jpeg_bytes(GREY)[:400], "truncated JPEG"),
    "JPEG without its end": (jpeg_bytes(GREY)[:-2], "truncated JPEG"),
    "JPEG header only": (jpeg_bytes(GREY)[:20], "truncated JPEG"),
    "CMYK": (jpeg_bytes(GREY, "CMYK"), "CMYK"),
    "bomb": (big_png(20_000, 20_000), "20000x20000 pixels"),
}


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_unfit_pictures_are_named(oasis, kind):
    data, message = BAD_PICTURES[kind]
    path = train_file(oasis)
    path.write_bytes(data)
    index = dataset.scan(oasis, "oasis")
    with pytest.raises(DataError, match=message) as caught:
        dataset.verify(index)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_problems_come_at_once(oasis, capsys):
    paths = sorted((oasis / "keras_png_slices_train").iterdir())
    for path in paths[1:]:
        path.write_bytes(b"")
    index = dataset.scan(oasis, "oasis")
    with pytest.raises(DataError) as caught:
        dataset.verify(index)
    lines = str(caught.value).split("\n")
    assert lines[0].startswith("15 of 24 files are unfit")
    assert [line.split(":")[0] for line in lines[1:]] == [*map(str, paths[1:])]
    kept = dataset.load_index(oasis, "oasis", skip_bad=True)
    assert len(kept) == 24 - 15
    assert [path for path, _ in kept.attrs["rejected"]] == [
        *map(str, paths[1:])
    ]
    output = capsys.readouterr()
    assert "15 unfit files left out" in output.err
    assert "single training image" in output.err


def test_problems_beyond_twenty_are_counted(oasis):
    for path in oasis.glob("*/case*"):
        path.write_bytes(b"")
    index = dataset.scan(oasis, "oasis")
    with pytest.raises(DataError) as caught:
        dataset.verify(index)
    lines = str(caught.value).split("\n")
    assert len(lines) == 22 and lines[-1] == "... and 4 more"
    with pytest.raises(DataError, match="test: every file is unfit"):
        dataset.verify(index, skip_bad=True)


GOOD_PICTURES = {
    "8 bits": png_bytes(GREY),
    "RGB of equal channels": png_bytes(RGBA[..., :3]),
    "opaque RGBA": png_bytes(np.dstack([RGBA[..., :3], 0 * GREY + 255])),
    "palette": png_bytes(GREY),
    "JPEG": jpeg_bytes(GREY, quality=100),
    "RGB JPEG": jpeg_bytes(GREY, "RGB", quality=100),
}


@pytest.mark.parametrize("kind", GOOD_PICTURES)
def test_pictures_are_read_right(oasis, kind):
    data = GOOD_PICTURES[kind]
    if kind == "palette":
        image = Image.fromarray(GREY).convert("P")
        image.putpalette(bytes(v for k in range(256) for v in [255 - k] * 3))
        image.putdata([255 - int(v) for v in GREY.ravel()])
        stream = io.BytesIO()
        image.save(stream, "PNG")
        data = stream.getvalue()
    path = train_file(oasis)
    path.write_bytes(data)
    index = dataset.verify(dataset.scan(oasis, "oasis"))
    image = dataset.read_image(path, *index.loc[0, ["low", "high"]])
    assert image.shape == GREY.shape and image.dtype == np.float32
    tolerance = 4 / 255 if "JPEG" in kind else 0
    assert np.abs(image - np.float32(GREY / 255)).max() <= tolerance


def test_one_bit_and_constant_images(oasis):
    bits = GREY > 100
    train_file(oasis).write_bytes(png_bytes(bits))
    Image.new("L", (SIZE, SIZE), 7).save(train_file(oasis, k=1))
    dataset.verify(dataset.scan(oasis, "oasis"))
    assert (dataset.read_image(train_file(oasis), 0, 255) == bits).all()


def test_sixteen_bits_keep_their_precision(oasis):
    values = np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE) * 63
    train_file(oasis).write_bytes(png_bytes(values))
    index = dataset.verify(dataset.scan(oasis, "oasis"))
    assert index["high"][0] == 65535
    image = dataset.read_image(index["path"][0], 0, 65535)
    assert (image == (values / 65535).astype(np.float32)).all()
    batch = next(iter(dataset.make_dataset(index[:1], (SIZE, SIZE), 1)))
    assert (batch[0, ..., 0].numpy() == image).all()


def test_colour_and_misnamed_files_are_read_with_a_warning(oasis, capsys):
    colour = np.dstack([GREY, GREY[::-1], GREY.T])
    train_file(oasis).write_bytes(png_bytes(colour))
    train_file(oasis, k=1).write_bytes(jpeg_bytes(GREY))
    index = dataset.verify(dataset.scan(oasis, "oasis"))
    errors = capsys.readouterr().err
    assert "1 files are in colour" in errors
    assert "1 files named otherwise" in errors
    image = dataset.read_image(index["path"][0], 0, 255)
    luma = colour @ (0.299, 0.587, 0.114) / 255
    assert np.abs(image - luma).max() < 0.15  # libpng weighs by Rec. 709


def test_identical_bytes_in_two_splits(oasis, capsys):
    leak = oasis / "keras_png_slices_test" / "case_006_slice_0.nii.png"
    shutil.copy(train_file(oasis), leak)
    index = dataset.scan(oasis, "oasis")
    with pytest.raises(DataError, match="same bytes in train and as") as e:
        dataset.verify(index)
    assert str(leak) in str(e.value) and str(train_file(oasis)) in str(e.value)
    kept = dataset.verify(index, skip_bad=True)
    assert str(leak) in set(kept["path"])
    assert str(train_file(oasis)) not in set(kept["path"])


def test_repeats_in_one_split_and_blank_slices(oasis, capsys):
    shutil.copy(train_file(oasis), train_file(oasis, k=1))
    for split, subject in (("train", 1), ("test", 6)):
        folder = oasis / f"keras_png_slices_{split}"
        image = Image.new("L", (SIZE, SIZE))
        image.save(folder / f"case_{subject:03d}_slice_3.nii.png")
    assert len(dataset.verify(dataset.scan(oasis, "oasis"))) == 6 * SLICES
    assert "1 files repeat others" in capsys.readouterr().err


def test_only_constant_images_are_refused(oasis):
    for path in oasis.glob("*/case*"):
        Image.new("L", (SIZE, SIZE), 9).save(path)
    with pytest.raises(DataError, match="all 24 images are constant"):
        dataset.verify(dataset.scan(oasis, "oasis"))


PLANE = GREY.astype(np.int16)
NIFTI = nifti_bytes(PLANE)
HOLES = PLANE.astype(np.float32)
HOLES[3, 4:6] = np.nan, np.inf
BAD_NIFTI = {
    "empty": (b"", "empty file"),
    "text": (b"text", "expected a NIfTI-1"),
    "PNG": (png_bytes(GREY), "expected a NIfTI-1"),
    "half": (NIFTI[:1000], "found 1000 bytes, expected 2400: truncated"),
    "header": (NIFTI[:200], "expected a NIfTI-1"),
    "NaN": (nifti_bytes(HOLES), "2 voxels that are NaN or infinite"),
    "complex": (nifti_bytes(PLANE.astype(np.complex64)), "data type 32"),
    "RGB": (patched(NIFTI, 70, "h", 128), "data type 128"),
    "unknown type": (patched(NIFTI, 70, "h", 999), "data type 999"),
    "offset 0": (patched(NIFTI, 108, "f", 0), "vox_offset 0"),
    "offset NaN": (patched(NIFTI, 108, "f", np.nan), "vox_offset nan"),
    "far offset": (patched(NIFTI, 108, "f", 1e6), "truncated"),
    "negative axis": (patched(NIFTI, 42, "h", -32), "axes"),
    "long axis": (patched(NIFTI, 42, "h", 32767), "axes"),
    "no axes": (patched(NIFTI, 40, "h", 0), "axes"),
    "nine axes": (patched(NIFTI, 40, "h", 9), "axes"),
    "volume": (nifti_bytes(np.zeros((8, 8, 3), np.int16)), r"\(8, 8, 3\)"),
    "4-D": (nifti_bytes(np.zeros((8, 8, 1, 2), np.int16)), "one plane"),
}
PACKED = gzip.compress(NIFTI, mtime=0)
BOMB = gzip.compress(NIFTI + bytes(30_000_000), mtime=0)
BAD_GZIP = {
    "half gzip": (PACKED[: len(PACKED) // 2], "truncated"),
    "checksum": (
        PACKED[:-8] + bytes(4) + PACKED[-4:],
        "incorrect data check",
    ),
    "no trailer": (PACKED[:-4], "no end of the gzip"),
    "junk": (PACKED + b"junk", "data after the end"),
    "bomb": (BOMB, "no end of the gzip"),
}


@pytest.mark.parametrize("kind", [*BAD_NIFTI, *BAD_GZIP])
def test_unfit_niftis_are_named(hipmri, kind):
    path = train_nifti(hipmri)
    if kind in BAD_GZIP:
        data, message = BAD_GZIP[kind]
    else:
        data, message = BAD_NIFTI[kind]
        path.unlink()
        path = path.with_suffix("")
    path.write_bytes(data)
    index = dataset.scan(hipmri, "hipmri")
    with pytest.raises(DataError, match=message) as caught:
        dataset.verify(index)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", dataset._NIFTI_TYPES.values())
@pytest.mark.parametrize("order", "<>")
def test_niftis_are_read_as_nibabel_reads_them(tmp_path, dtype, order):
    array = (blobs(3, shape=(12, 7)) // 2).astype(dtype)
    if dtype in ("uint32", "uint64"):
        array[0, 0] = np.iinfo(dtype).max
    image = nibabel.Nifti1Image(array[..., None], np.eye(4), dtype=dtype)
    image.header.set_slope_inter(0.5, -3)
    image = nibabel.Nifti1Image(
        image.dataobj, None, image.header.as_byteswapped(order)
    )
    path = tmp_path / "case_001_week_0_slice_0.nii"
    nibabel.save(image, path)
    expected = nibabel.load(path).get_fdata()[..., 0]
    read = dataset.decode(path.read_bytes()).numpy()
    assert read.shape == (12, 7)
    assert np.allclose(read, expected, rtol=1e-6)


def test_percentiles_are_of_the_scan(hipmri):
    index = dataset.verify(dataset.scan(hipmri, "hipmri"))
    scan = index[index["scan"] == "006_week_0"]
    voxels = [nibabel.load(path).get_fdata() for path in scan["path"]]
    low, high = np.percentile(voxels, (0.5, 99.5))
    assert np.allclose(scan[["low", "high"]], [low, high])
    image = dataset.read_image(scan["path"].iloc[1], low, high)
    expected = np.clip((voxels[1] - low) / (high - low), 0, 1)
    assert np.abs(image - expected).max() < 1e-6
    # A scanner's gain makes no difference.
    for path in scan["path"]:
        array = np.asarray(nibabel.load(path).dataobj)
        write_nifti(Path(path), (array * 7).astype(np.int32))
    index = dataset.verify(dataset.scan(hipmri, "hipmri"))
    row = index[index["path"] == scan["path"].iloc[1]].iloc[0]
    again = dataset.read_image(row["path"], row["low"], row["high"])
    assert np.abs(image - again).max() < 1e-6


def test_constant_and_sparse_scans(hipmri):
    for k in range(SLICES):
        write_nifti(train_nifti(hipmri, k), np.full((32, 32), -5, np.int16))
    write_nifti(train_nifti(hipmri, 1), np.eye(32, dtype=np.int16)[:, ::-1])
    index = dataset.verify(dataset.scan(hipmri, "hipmri"))
    assert (index["high"] > index["low"]).all()
    for k in range(SLICES):
        row = index.iloc[k]
        image = dataset.read_image(row["path"], row["low"], row["high"])
        assert np.isfinite(image).all()
    assert dataset._window(np.full(9, 1e9))[1] > 1e9


def test_mutants_are_read_or_refused_by_name(tmp_path):
    """Whatever the bytes: a finite image or a `DataError`, nothing else."""
    rng = np.random.default_rng(0)
    sources = {"a.png": png_bytes(GREY), "b.jpeg": jpeg_bytes(GREY)}
    sources |= {"c.nii": NIFTI, "d.nii.gz": PACKED}
    for name, data in sources.items():
        for _ in range(40):
            mutant = bytearray(data)
            for at in rng.integers(0, min(len(data), 400), 3):
                mutant[at] = rng.integers(256)
            path = tmp_path / name
            path.write_bytes(mutant[: rng.integers(1, 2 * len(data))])
            try:
                row = dataset.index_files([path]).iloc[0]
            except DataError as error:
                assert name in str(error) or "constant" in str(error)
                continue
            image = dataset.read_image(path, row["low"], row["high"])
            assert np.isfinite(image).all()


def test_single_files(oasis_dir, tmp_path):
    index = dataset.index_files([train_file(oasis_dir)])
    assert index["split"].tolist() == ["test"]
    with pytest.raises(DataError, match="nothing there"):
        dataset.index_files([tmp_path / "gone.png"])
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match="not a file"):
        dataset.index_files([tmp_path / "pipe.png"])
    with pytest.raises(DataError, match="not a file"):
        dataset.read_image(tmp_path, 0, 255)


def test_load_index_says_what_there_is(hipmri, capsys):
    index = dataset.load_index(hipmri, "hipmri", image_size=(24, 32))
    output = capsys.readouterr().out
    assert "train    4 subjects, 16 images" in output
    assert (
        "plane sizes: 32x32 (20), 32x36 (4); padded or cropped to 24x32"
        in output
    )
    assert index.attrs["simulated"] is False
    (hipmri / "simulated.json").write_text("{}")
    index = dataset.load_index(hipmri.parent, "hipmri")
    assert index.attrs["simulated"] is True


# ------------------------------------------------------------------ batches


def test_fit_to_pads_and_crops_about_the_centre():
    image = tf.reshape(tf.range(1.0, 13.0), (3, 4))
    padded = dataset.fit_to(image, (6, 2)).numpy()
    expected = np.zeros((6, 2))
    expected[1:4] = image.numpy()[:, 1:3]
    assert (padded == expected).all()
    assert (dataset.fit_to(image, (3, 4)).numpy() == image.numpy()).all()
    assert (dataset.fit_to(padded, (3, 2)).numpy() == expected[1:4]).all()


def test_fit_to_resizes_and_keeps_the_aspect_ratio():
    image = dataset.fit_to(tf.ones((20, 10)), (8, 8), resize=True).numpy()
    assert image.shape == (8, 8)
    assert np.allclose(image[:, 2:6], 1) and np.isclose(image.sum(), 32)


def batches(index, **options):
    options = {"image_size": (SIZE, SIZE), "batch_size": 5} | options
    return [x.numpy() for x in dataset.make_dataset(index, **options)]


def test_batches_in_order(oasis_index):
    result = batches(oasis_index, epochs=2)
    assert [len(x) for x in result] == [5, 5, 5, 5, 4] * 2
    assert dataset.steps_per_epoch(len(oasis_index), 5) == 5
    images = np.concatenate(result)
    assert images.shape == (48, SIZE, SIZE, 1) and images.dtype == np.float32
    expected = [dataset.read_image(p, 0, 255) for p in oasis_index["path"]]
    assert (images[:24, ..., 0] == expected).all()
    assert (images[24:] == images[:24]).all()


def test_orders_are_a_function_of_seed_and_epoch(oasis_index):
    def orders(seed):
        order = dataset._batches(10, 10, seed, 3, 0)
        return [batch.numpy().tolist() for batch in order]

    assert orders(0) == ORDERS_OF_SEED_0
    assert orders(1) != orders(0)
    assert all(sorted(order) == [*range(10)] for order in orders(7))
    assert len(set(map(tuple, orders(7)))) == 3
    one, two = batches(oasis_index, seed=5), batches(oasis_index, seed=5)
    assert all((a == b).all() for a, b in zip(one, two, strict=True))


ORDERS_OF_SEED_0 = [
    [3, 0, 1, 9, 4, 2, 8, 7, 6, 5],
    [3, 5, 1, 4, 9, 2, 0, 7, 6, 8],
    [7, 9, 0, 8, 5, 6, 1, 2, 3, 4],
]


@pytest.mark.parametrize("step", [0, 1, 4, 5, 7, 14, 15, 20])
def test_starting_later_gives_the_rest(oasis_index, step):
    options = {"seed": 3, "epochs": 3}
    whole = batches(oasis_index, **options)
    rest = batches(oasis_index, start_step=step, **options)
    assert len(rest) == max(0, 15 - step)
    for a, b in zip(rest, whole[step:], strict=True):
        assert (a == b).all()
    images = dataset.make_dataset(
        oasis_index, (SIZE, SIZE), 5, start_step=step, **options
    )
    assert images.cardinality() == len(rest)


def test_cached_equals_uncached(oasis_index, monkeypatch):
    options = {"seed": 2, "epochs": 2, "image_size": (36, 24)}
    plain = batches(oasis_index, **options)
    cached = batches(oasis_index, cache=True, **options)
    for a, b in zip(plain, cached, strict=True):
        assert (a == b).all()
    monkeypatch.setattr(dataset, "_free_memory", lambda: 40_000)
    with pytest.raises(ResourceError, match="--no-cache"):
        batches(oasis_index, cache=True)


def test_free_memory_is_known():
    assert 1 << 20 < dataset._free_memory() < 1 << 50


def test_mixed_sizes_are_batched(hipmri_dir):
    index = dataset.verify(dataset.scan(hipmri_dir, "hipmri"))
    images = np.concatenate(batches(index, image_size=(16, 36)))
    assert images.shape == (24, 16, 36, 1)
    assert images.min() == 0 and images.max() == 1
    images = np.concatenate(batches(index, image_size=(16, 16), resize=True))
    assert images.shape == (24, 16, 16, 1)


def test_array_batches():
    arrays = (np.arange(7), {"x": np.arange(7) * 2.0})
    plain = list(dataset.array_batches(arrays, 3))
    assert plain[2][0].numpy().tolist() == [6]
    mixed = list(dataset.array_batches(arrays, 3, seed=0, epochs=2))
    rest = list(
        dataset.array_batches(arrays, 3, seed=0, epochs=2, start_step=4)
    )
    for a, b in zip(mixed[4:], rest, strict=True):
        assert (a[0].numpy() == b[0].numpy()).all()
        assert (a[1]["x"].numpy() == 2 * a[0].numpy()).all()


def test_no_images_is_an_error(oasis_index):
    with pytest.raises(DataError, match="no images"):
        dataset.make_dataset(oasis_index[:0], (SIZE, SIZE), 4)


@pytest.mark.parametrize("event", ["gone", "changed", "truncated"])
def test_a_file_lost_while_training_is_named(oasis, event):
    index = dataset.verify(dataset.scan(oasis, "oasis"))
    path = train_file(oasis, 2)
    if event == "gone":
        path.unlink()
    elif event == "changed":
        shutil.copy(train_file(oasis, 3), path)
    else:
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError) as caught, dataset.naming_files():
        batches(index)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(tf.errors.OpError), dataset.naming_files():
        tf.reshape(tf.zeros(3), (2,))


# ---------------------------------------------------------------- simulator


def contents(root):
    return {
        path.relative_to(root): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "simulated.json"
    }


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    dest = tmp_path_factory.mktemp("simulated") / "brains"
    return dataset.simulate(dest, "oasis", 4, 64, seed=1, workers=1)


def test_simulated_brains(simulated, capsys):
    index = dataset.load_index(simulated, "oasis")
    assert index.attrs["simulated"]
    assert "simulated" in capsys.readouterr().out
    assert index.groupby("split")["subject"].nunique().to_dict() == {
        "train": 2,
        "validate": 1,
        "test": 1,
    }
    assert len(index) == 4 * 32
    assert dataset.native_size(index) == (64, 56)
    assert not list(simulated.parent.glob("*.tmp-*"))
    images = np.concatenate(batches(index, image_size=(64, 56)))
    assert (images[:, 0] == 0).all() and (images[..., 0, :] == 0).all()
    assert 0.7 < np.quantile(images, 0.95) < 1


def test_simulated_bytes_depend_on_seed_and_number_only(simulated, tmp_path):
    again = dataset.simulate(tmp_path / "a", "oasis", 3, 64, 1, workers=3)
    ours = {p.name: data for p, data in contents(simulated).items()}
    for path, data in contents(again).items():
        assert ours[path.name] == data
    other = dataset.simulate(tmp_path / "b", "oasis", 3, 64, seed=2)
    assert all(ours[p.name] != d for p, d in contents(other).items())


def test_ill_brains_have_larger_ventricles(tmp_path):
    dest = dataset.simulate(tmp_path / "d", "adni", 8, 64)
    labels = json.loads((dest / "simulated.json").read_text())["labels"]
    index = dataset.verify(dataset.scan(dest, "adni"))
    assert (index["subject"].map(labels) == index["label"]).all()
    assert set(index["split"]) == set(dataset.SPLITS)
    images = np.concatenate(batches(index, image_size=(64, 56)))
    area = pd.Series(dataset.ventricle_area(images))
    mean = area.groupby(index["label"]).mean()
    assert mean["AD"] > 1.3 * mean["NC"] > 0.005


def test_ventricle_area_of_drawings():
    image = np.zeros((64, 64), np.float32)
    image[8:56, 12:52] = 0.9
    assert dataset.ventricle_area(image[None]).tolist() == [0]
    image[28:36, 28:36] = 0.2
    image[10:14, 30:34] = 0.2  # a sulcus: dark, but not deep
    area = dataset.ventricle_area(np.stack([image, 0 * image])[..., None])
    assert area[1] == 0
    assert area[0] == pytest.approx(64 / 4096, rel=0.15)


def test_simulated_pelvises(tmp_path):
    dest = dataset.simulate(tmp_path / "d", "hipmri", 6, 64, seed=3)
    index = dataset.load_index(dest, "hipmri")
    assert len(index) == 6 * dataset.PELVIS_PLANES
    assert set(index["height"]) == {64}
    assert set(index["width"]) <= {32, 36}
    path = index["path"][0]
    assert nibabel.load(path).get_data_dtype() == np.int16
    again = dataset.simulate(tmp_path / "e", "hipmri", 6, 64, 3, workers=1)
    assert contents(again) == contents(dest)


def test_a_folder_in_use_is_not_overwritten(simulated, tmp_path):
    before = contents(simulated)
    stamp = (simulated / "simulated.json").stat().st_mtime_ns
    dataset.simulate(simulated, "oasis", 4, 64, seed=1)
    assert (simulated / "simulated.json").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match="another simulation"):
        dataset.simulate(simulated, "oasis", 4, 64, seed=9)
    assert contents(simulated) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="other files"):
        dataset.simulate(tmp_path, "oasis", 4, 64)
    with pytest.raises(FlagError, match="--image-size"):
        dataset.simulate(tmp_path / "x", image_size=50)
    with pytest.raises(FlagError, match="--subjects"):
        dataset.simulate(tmp_path / "x", subjects=2)


def test_an_interrupted_simulation_leaves_nothing(tmp_path, monkeypatch):
    def fail(folder, settings, number):
        (folder / "keras_png_slices_train").mkdir(exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "_simulate_subject", fail)
    with pytest.raises(KeyboardInterrupt):
        dataset.simulate(tmp_path / "d", "oasis", 4, 64)
    assert list(tmp_path.iterdir()) == []


def test_a_simulation_being_written_is_not_found(oasis, tmp_path):
    oasis.rename(tmp_path / "data.tmp-123")
    with pytest.raises(DataError, match="no data set"):
        dataset.detect_layout(tmp_path)


# ------------------------------------------------------------- command line


def test_check_of_unfit_data(tmp_path, oasis, hipmri_dir):
    train_file(oasis).write_bytes(b"\x89PNG\r\n\x1a\n and then nothing more")
    train_file(oasis, k=1).write_bytes(b"")
    result = run_cli("check", oasis)
    assert result.returncode == 3
    for k in range(2):
        assert train_file(oasis, k=k).name in result.stderr
    assert "Traceback" not in result.stderr
    result = run_cli("check", oasis, "--skip-bad")
    assert result.returncode == 0
    assert f"left out {train_file(oasis)}: " in result.stdout


def test_check_of_a_nan(hipmri):
    write_nifti(train_nifti(hipmri), HOLES)
    result = run_cli("check", hipmri, "--dataset", "hipmri")
    assert result.returncode == 3
    assert result.stderr.count("\n") == 1
    assert train_nifti(hipmri).name in result.stderr


def test_check_of_folders_without_data(tmp_path, oasis_dir):
    for arguments in ([tmp_path], [oasis_dir, "--dataset", "adni"]):
        result = run_cli("check", *arguments)
        assert result.returncode == 3
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


def test_simulate_and_check(tmp_path):
    options = ["--layout", "hipmri", "--subjects", "3", "--image-size", "32"]
    result = run_cli("simulate", tmp_path / "d", *options)
    assert result.returncode == 0, result.stderr
    result = run_cli("check", tmp_path / "d")
    assert result.returncode == 0, result.stderr
    assert "simulated, layout hipmri" in result.stdout


def test_flags_are_checked(tmp_path):
    for arguments in (["simulate", tmp_path, "--subjects", "0"], ["chek"], []):
        assert run_cli(*arguments).returncode == 2
    code = "import sys, dataset; print([m for m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    for heavy in ("tensorflow", "pandas", "scipy", "nibabel", "nilearn"):
        assert f"'{heavy}'" not in result.stdout
