"""Tests of dataset.py."""

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from PIL import Image
from scipy import ndimage

import dataset
from tests.conftest import SIZE, SLICES, blobs, write_nifti
from tests.corpus import jpeg_bytes, nifti_bytes, png_bytes
from utils import DataError, FlagError, ResourceError

ROOT = Path(dataset.__file__).parent


def run_cli(*arguments):
    return subprocess.run(
        [sys.executable, "dataset.py", *map(os.fspath, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


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
    (train / "empty").mkdir()
    index = dataset.scan(oasis, "oasis")
    assert len(index) == 6 * SLICES
    # Nothing is left without a word.
    assert index.attrs["ignored"] == [str(train / n) for n in ("loop", "empty")]
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
    rejected = oasis_index.attrs["rejected"]
    assert list(rejected.columns) == ["path", "reason"] and rejected.empty
    assert oasis_index.notna().all(axis=None)


GREY = blobs(1234)
RGBA = np.dstack([GREY, GREY, GREY, GREY])


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
    rejected = kept.attrs["rejected"]
    assert rejected["path"].tolist() == [*map(str, paths[1:])]
    assert rejected["reason"].str.match("found an empty file").all()
    output = capsys.readouterr()
    assert "15 unfit files left out" in output.err
    assert "single training image" in output.err


def test_what_is_left_out_is_told_in_the_order_of_the_files(oasis, tmp_path):
    leak = oasis / "keras_png_slices_test" / "case_006_slice_1.nii.png"
    shutil.copy(train_file(oasis, 2), leak)
    reasons = {
        train_file(oasis, 1, 2): "found an empty file",
        train_file(oasis, 1, 10): "found a truncated PNG",
        train_file(oasis, 2, 0): "found the same bytes in train",
        leak.with_name("case_006_slice_0.nii.png"): "found b'text'",
    }
    train_file(oasis, 1, 2).write_bytes(b"")
    train_file(oasis, 1, 10).write_bytes(png_bytes(GREY)[:300])
    leak.with_name("case_006_slice_0.nii.png").write_text("text")
    index = dataset.load_index(oasis, "oasis", skip_bad=True)
    rejected = index.attrs["rejected"]
    assert rejected["path"].tolist() == [*map(str, reasons)]
    assert rejected.index.tolist() == [0, 1, 2, 3]
    for found, expected in zip(
        rejected["reason"], reasons.values(), strict=True
    ):
        assert found.startswith(expected)
    # What is left is what is there when they are gone.
    for path in reasons:
        path.unlink()
    again = dataset.load_index(oasis, "oasis")
    pd.testing.assert_frame_equal(
        again.drop(columns="position"), index.drop(columns="position")
    )
    assert again.attrs["rejected"].empty
    assert len(index[index["split"] == "test"].attrs["rejected"]) == 4


def test_problems_beyond_twenty_are_counted(oasis):
    for path in oasis.glob("*/case*"):
        path.write_bytes(b"")
    index = dataset.scan(oasis, "oasis")
    with pytest.raises(DataError) as caught:
        dataset.verify(index)
    lines = str(caught.value).split("\n")
    assert len(lines) == 22 and lines[-1] == "... and 4 more"
    with pytest.raises(
        DataError, match="test: no file is left; 4 of 4"
    ) as all_:
        dataset.verify(index, skip_bad=True)
    assert "--skip-bad" not in str(all_.value)


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
    sources |= {"c.nii": NIFTI, "d.nii.gz": gzip.compress(NIFTI)}
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
    (hipmri / "simulated.json").write_text("[")
    with pytest.raises(DataError, match="simulated.json: found a damaged"):
        dataset.load_index(hipmri, "hipmri")


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


@pytest.fixture
def drawings():
    """Three images that are bright up to their border."""
    images = [blobs(9, k, shape=(20, 16)) for k in range(3)]
    return np.stack(images)[..., None] / np.float32(510) + np.float32(0.25)


def test_jitter_moves_and_scales(drawings):
    numbers = np.arange(300)
    images = np.concatenate([drawings] * 100)
    moved = dataset.jitter(images, 5, numbers, shift=2, gain=0).numpy()
    # Where the dim ones begin shows how far an image went.
    ways = [np.any(moved[..., 0], axis=axis) for axis in (2, 1)]
    first = np.stack([np.argmax(way, axis=1) for way in ways], axis=1)
    last = np.stack([np.argmax(way[:, ::-1], axis=1) for way in ways], axis=1)
    by = first - last
    assert set(map(tuple, by)) == {
        (y, x) for y in range(-2, 3) for x in range(-2, 3)
    }
    for image, result, (y, x) in zip(images, moved, by, strict=True):
        expected = np.roll(image[..., 0], (y, x), axis=(0, 1))
        rows, columns = np.indices(expected.shape)
        inside = (0 <= rows - y) & (rows - y < 20)
        inside &= (0 <= columns - x) & (columns - x < 16)
        assert (result[..., 0] == expected * inside).all()

    scaled = dataset.jitter(images, 5, numbers, shift=0, gain=0.2).numpy()
    ratio = scaled / images
    factor = ratio.mean(axis=(1, 2, 3))
    assert np.allclose(ratio, factor[:, None, None, None], rtol=1e-5)
    assert 0.8 <= factor.min() < 0.82 and 1.18 < factor.max() <= 1.2
    clipped = dataset.jitter(images * 1.3, 5, numbers).numpy()
    assert clipped.min() == 0 and clipped.max() == 1
    same = dataset.jitter(images, 5, numbers, shift=0, gain=0).numpy()
    assert (same == images).all() and same.dtype == np.float32


def test_jitter_is_a_function_of_seed_and_number(drawings):
    whole = dataset.jitter(drawings, 1, [7, 8, 9]).numpy()
    for k in range(3):
        alone = dataset.jitter(drawings[k : k + 1], 1, [7 + k]).numpy()
        assert (alone[0] == whole[k]).all()
    backwards = dataset.jitter(drawings[::-1], 1, [9, 8, 7]).numpy()
    assert (backwards[::-1] == whole).all()
    assert (dataset.jitter(drawings, 2, [7, 8, 9]).numpy() != whole).any()
    mapped = dataset.array_batches((drawings, np.arange(7, 10)), 2).map(
        lambda images, numbers: dataset.jitter(images, 1, numbers)
    )
    assert (np.concatenate([x.numpy() for x in mapped]) == whole).all()
    uniforms = dataset._uniforms()(1, [7]).numpy()[0]
    assert uniforms == pytest.approx(UNIFORMS_OF_SEED_1, abs=1e-6)


UNIFORMS_OF_SEED_1 = [0.948234, 0.222978, 0.992017]


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
    output = capsys.readouterr().out
    assert "simulated" in output and "64 images, 32 AD, 32 NC" in output
    odd = index["subject"].astype(int) % 2 == 1
    assert (index["label"] == odd.map({True: "NC", False: "AD"})).all()
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


def test_ventricle_areas_count_where_ventricles_are(simulated):
    index = dataset.load_index(simulated, "oasis")
    images = np.concatenate(batches(index, image_size=(64, 56)))
    areas = dataset.ventricle_areas(images[..., 0], index["position"])
    counts = index["position"].between(0.5, 0.8)
    assert (np.isfinite(areas) == counts).all()
    share = dataset.ventricle_area(images)
    assert np.allclose(areas[counts], (share * 64 * 56)[counts])
    # As a VQ-VAE draws them, and on a larger plane.
    blurred = ndimage.gaussian_filter(images, (0, 0.35, 0.35, 0))
    blurred = np.pad(blurred, ((0, 0), (0, 0), (4, 4), (0, 0)))
    again = dataset.ventricle_areas(blurred, index["position"])
    for values in (areas, again):
        mean = pd.Series(values).groupby(index["label"]).mean()
        assert mean["AD"] > 1.2 * mean["NC"] > 50
    assert np.nanmean(again) == pytest.approx(np.nanmean(areas), rel=0.1)
    assert np.isnan(dataset.ventricle_areas(images[:2], [0.0, 1.0])).all()


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


def test_simulated_folders_are_named_after_what_they_hold(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(
        dataset, "simulate", lambda *options: made.append(options) or options[0]
    )
    assert dataset.simulated_folder(4) == Path("data/simulated-4")
    folder = dataset.simulated_folder(5, image_size=64)
    assert folder == Path("data/simulated-oasis-5-64")
    folder = dataset.simulated_folder(4, "adni", 128)
    assert folder == Path("data/simulated-adni-4-128")
    assert [options[1:] for options in made] == [
        ("oasis", 4, 128),
        ("oasis", 5, 64),
        ("adni", 4, 128),
    ]


@pytest.mark.parametrize("layout", dataset.LAYOUTS)
def test_the_smallest_simulations_fill_every_split(
    tmp_path, monkeypatch, layout
):
    monkeypatch.chdir(tmp_path)
    root = dataset.simulated_folder(3, layout, 32)
    assert root == dataset.simulated_folder(3, layout, 32)
    index = dataset.load_index(root, layout)
    assert set(index["split"]) == set(dataset.SPLITS)
    assert (set(index["label"]) == {""}) == (layout == "hipmri")


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
