"""Tests of dataset.py."""

import gzip
import os
import shutil
import time
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from PIL import Image
from scipy import ndimage

import dataset
import utils
from tests.conftest import SIZE, SLICES, blobs, files, run_python, write_nifti
from tests.corpus import TURNED, jpeg, nifti, png
from utils import DataError, FlagError

GREY = blobs(1234)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def oasis(oasis_dir, tmp_path):
    return Path(shutil.copytree(oasis_dir, tmp_path / "data"))


@pytest.fixture
def hipmri(hipmri_dir, tmp_path):
    return Path(shutil.copytree(hipmri_dir, tmp_path / "pelvises"))


def train_file(root, subject=1, k=0):
    return root / f"keras_png_slices_train/case_{subject:03d}_slice_{k}.nii.png"


def train_nifti(root, k=0):
    return root / f"keras_slices_train/case_004_week_0_slice_{k}.nii.gz"


def load(root, layout="oasis", **options):
    settings = utils.DataSettings(dataset=layout, data_dir=str(root), **options)
    return dataset.load(settings)


def run_of(slices, folder, layout="oasis"):
    root = str(slices.root)
    settings = utils.replace(utils.Settings(), dataset=layout, data_dir=root)
    info = {"image_size": [*slices.size], "data_dir": root, "crop": None}
    info |= {"simulated": slices.simulated, "intensity": slices.intensity}
    run = utils.Run(folder, settings, info)
    utils.write_csv(run.split_path, slices.table)
    return run


# --------------------------------------------------------------------- scan


def test_scan_of_oasis(oasis_dir):
    index = dataset.scan(oasis_dir, "oasis")
    table = index.table
    columns = "path subject scan slice position label split"
    assert list(table.columns) == columns.split()
    counts = {"train": 4 * SLICES, "validate": SLICES, "test": SLICES}
    assert table["split"].value_counts().to_dict() == counts
    assert index.root == oasis_dir
    assert table["path"][0] == str(train_file(Path()))
    assert table["slice"][:SLICES].tolist() == [0, 1, 2, 3]
    assert np.allclose(table["position"][:SLICES], [0, 1 / 3, 2 / 3, 1])
    assert table["subject"].unique().tolist() == [f"00{n}" for n in range(1, 7)]
    assert set(table["label"]) == {""}
    assert all("seg_" in path for path in index.ignored)


def test_root_may_be_above_or_doubled(oasis_dir, adni_dir, tmp_path):
    shutil.copytree(oasis_dir, tmp_path / "x" / "x")
    shutil.copytree(oasis_dir, tmp_path / "__MACOSX" / "data")
    for root in (oasis_dir, oasis_dir.parent, tmp_path):
        assert len(dataset.scan(root, "oasis").table) == 6 * SLICES
        assert dataset.detect_layout(root) == "oasis"
    table = dataset.scan(adni_dir.parent, "adni").table
    assert set(table["split"]) == set(dataset.SPLITS)
    odd = table["subject"].astype(int) % 2 == 1
    assert (table["label"] == odd.map({True: "AD", False: "NC"})).all()
    assert table.groupby("subject")["split"].nunique().max() == 1
    assert {*dataset.LAYOUTS} == {*utils.DATASETS}
    assert dataset.detect_layout(adni_dir) == "adni"


def test_adni_classes_are_what_folders_are_called(adni_dir, tmp_path, capsys):
    adni = shutil.copytree(adni_dir, tmp_path / "data")
    for split in ("train", "test"):
        (adni / split / "NC").rename(adni / split / "CN")
    (adni / "test" / "CN").rename(adni / "test" / "cn")
    assert set(load(adni, "adni").table["label"].str.upper()) == {"AD", "CN"}
    for path in adni.glob("*/*/*"):
        path.rename(path.parents[1] / path.name)
    assert set(load(adni, "adni").table["label"]) == {""}
    assert "cannot be proved" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["gz", "nii", "folder"])
def test_scan_of_hipmri(hipmri, form):
    for path in sorted(hipmri.glob("*/*.nii.gz")) if form != "gz" else []:
        plain = path.with_suffix("")
        if form == "folder":
            plain.mkdir()
            plain /= plain.name
        plain.write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    slices = load(hipmri, "hipmri")
    assert len(slices) == 6 * SLICES and slices.subjects[0] == "004"
    assert slices.table["scan"][0] == "004_week_0"
    assert slices.size == (SIZE, SIZE) and slices.mirror_axis == 1


def test_weeks_are_scans_of_one_subject(hipmri):
    for k in range(2):
        name = f"case_004_week_1_slice_{k}.nii.gz"
        write_nifti(hipmri / "keras_slices_train" / name, blobs(99, k) * 1.5)
    path = train_nifti(hipmri)  # a slice given twice is taken once
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    index = dataset.scan(hipmri, "hipmri")
    own = index.table[index.table["subject"] == "004"]
    assert own["scan"].unique().tolist() == ["004_week_0", "004_week_1"]
    assert own["position"].iloc[-2:].tolist() == [0, 1]
    assert len(index.table) == 6 * SLICES + 2 and len(index.ignored) == 1


def test_splits_are_by_hash():
    ids = [f"{n:03d}" for n in range(1, 41)]
    carve = [0, 0.1, 0]
    splits = dataset.split_subjects(ids, carve)
    assert [s for s in ids if splits[s] == "validate"] == ["010", "023"]
    assert splits == dataset.split_subjects(reversed(ids), carve)
    splits = dataset.split_subjects(map(str, range(2000)), (0.7, 0.1, 0.2))
    counts = pd.Series(splits).value_counts() / 2000
    assert counts["validate"] == pytest.approx(0.1, abs=0.02)
    assert counts["test"] == pytest.approx(0.2, abs=0.02)
    for count in range(3, 9):  # no split is empty, however few they are
        few = dataset.split_subjects(map(str, range(count)), dataset.SHARES)
        assert set(few.values()) == set(dataset.SPLITS)
    for n in range(20):
        two = dataset.split_subjects([f"a{n}", f"b{n}"], dataset.SHARES)
        assert set(two.values()) == {"train", "test"}
    assert dataset.split_subjects(["7"], carve) == {"7": "train"}
    assert dataset.split_subjects("7", (0, 0, 1)) == {"7": "test"}


def test_wrong_layouts_are_refused_in_one_line(oasis, tmp_path, hipmri_dir):
    with pytest.raises(DataError, match="none for test and.*keras_slices_tra"):
        dataset.scan(oasis, "hipmri")
    with pytest.raises(DataError, match="cannot list"):
        dataset.scan(train_file(oasis), "oasis")
    (tmp_path / "none" / "pictures").mkdir(parents=True)
    (tmp_path / "none" / "IM1").write_bytes(bytes(128) + b"DICM")
    with pytest.raises(DataError, match="none.*found IM1, pictures.*dcm2niix"):
        dataset.detect_layout(tmp_path / "none")
    shutil.copytree(hipmri_dir, tmp_path / "b")
    with pytest.raises(DataError, match="oasis, hipmri.*name the folder"):
        dataset.detect_layout(tmp_path)
    oasis.rename(tmp_path / "data.tmp-123")  # a simulation being written
    assert dataset.detect_layout(tmp_path) == "hipmri"


def test_an_unreadable_folder_is_named(adni_dir, monkeypatch):
    scandir = os.scandir

    def refuse(path):  # permissions do not bind root, who may run the tests
        if os.fspath(path).endswith("AD"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="AD: cannot list.*denied"):
        dataset.scan(adni_dir, "adni")


# ---------------------------------------------------------- folders of any kind

NAMES = {  # format of a path -> subject and scan of the first of them
    "sub-{p:02d}/ses-1/sub-{p:02d}_ses-1_z{k}.png": "sub-01",
    "x/ADNI_002_S_{p:04d}_MR_{k:03d}.png": "002_S_0001",
    "OAS1_{p:04d}_MR1_mpr-1_{k}.jpg": "OAS1_0001",
    "Patient {p} slice {k}.png": "Patient 1",
    "sub-{p:02d}_z{k:03d}_T1w.png": "sub-01",
    "P{p:03d}_{k:03d}_T1.png": "P001",
    "case_{p:03d}_week_0_slice_{k}.png": "case_001",
    "P{p:03d}/image_{k:02d}.png": "P001",
    "AB{p:03d}/series_{k}/img_{k:03d}.png": "AB001",
    "P{p:03d}/T1_{k:03d}_x2.png": "P001",
    "P{p:03d}/P{p:03d}_ses{k}_{k:03d}.png": "P001",
    "study_2020/P{p:03d}/z{k}.png": "P001",
    "IXI{p:03d}-Guys-{k:03d}.png": "IXI001",
    "BraTS_{p:03d}_ses{k}_{k:03d}.png": "BraTS_001",
    "ses-{k}/P{p:03d}/z{k}.png": "P001",
    "z{k:03d}_IXI{p:03d}.png": "IXI001",
    "axial_{k}/P{p:03d}.png": "P001",
    "osi/P{p:02d}/IMG-0001-{k:05d}.png": "P01",
    "OAS3{p:04d}_d1/anat/sub-OAS3{p:04d}_{k:03d}.png": "sub-OAS30001",
    "患者{p:02d}_切片{k}.png": "患者01",
    os.fsdecode(b"{p}\xe9_{k}.jpeg"): "1\\udce9",  # not UTF-8
}


def write_folder(root, form, people=range(1, 9)):
    for p in people:
        for k in range(3):
            path = root / form.format(p=p, k=k)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(blobs(p, k)).save(path)
    return root


@pytest.mark.parametrize("form", NAMES)
def test_subjects_are_guessed(tmp_path, form):
    index = dataset.scan(write_folder(tmp_path / "d", form), "folder")
    table = index.table
    assert table["subject"].nunique() == 8
    assert NAMES[form] in set(table["subject"])
    if form.count("{k") == 1 and "x2" not in form:
        assert table["scan"].nunique() == 8 and set(table["slice"]) == {0, 1, 2}
    assert set(table["split"]) == set(dataset.SPLITS)
    assert table.groupby("subject")["split"].nunique().max() == 1
    assert set(table["label"]) == {""} and "(?P<subject>" in index.notes[0]


def test_where_no_subject_can_be_told_every_file_is_one(tmp_path):
    root = tmp_path / "d"
    for c in ("train/Non AD", "train/AD", "test/Non AD", "test/AD"):
        write_folder(root, f"{c}/no{{p}}{{k}}.png", range(1, 3))
    index = dataset.scan(root, "folder")
    assert index.table["subject"].nunique() == 24 == len(index.table)
    assert set(index.table["label"]) == {"AD", "Non AD"}
    assert "scores may be too good" in index.notes[0]
    for pattern in ("(", "brain", "(?P<subject>nobody)"):
        with pytest.raises(FlagError, match="-pattern: (found|.* fits)"):
            dataset.scan(root, "folder", pattern)
    for form in ("{p}_z-{k}_label.png", "{p}_z{k}_label.png"):
        write_folder(tmp_path / "e", form)
    with pytest.raises(DataError, match="48 images are named like masks"):
        dataset.detect_layout(tmp_path / "e")
    for path in (tmp_path / "e").glob("*"):
        path.rename(str(path).replace("_label", ""))
    pattern = r"(?P<subject>\d)_z(?P<slice>-?\d)"
    table = dataset.scan(tmp_path / "e", "folder", pattern).table
    assert table["subject"].nunique() == 8
    assert set(table["slice"]) == {-2, -1, 0, 1, 2} and len(table) == 40


def test_folders_that_number_people_or_series_anew(tmp_path):
    for number, name in enumerate(("Doe", "Kim", "Roe")):
        form = name + "/IM-{p:04d}-{k:04d}.png"
        write_folder(tmp_path / "series", form, [number // 2])
        write_folder(tmp_path / "people", name + "/{p}/{k}.png")
    table = dataset.scan(tmp_path / "series", "folder").table
    assert {*table["subject"] + table["label"]} == {"Doe", "Kim", "Roe"}
    for name in ("config.json", "split.csv"):  # so a run: none of the data
        (tmp_path / "people" / "Kim" / "8" / name).touch()
    index = dataset.scan(tmp_path / "people", "folder")
    assert len(index.table) == (3 * 8 - 1) * 3
    assert "8 subjects are in several folders" in str(index.notes)


@pytest.mark.parametrize(
    ("classes", "form"),
    [
        (("0", "1"), "sub-{p:02d}_z{k}.png"),
        (("glioma", "normal"), "{c}_{p:03d}_{k}.png"),
        (("grade1", "grade2", "grade3", "grade4"), "{p}_{k}.png"),
        (("0", "1", "2"), "{p}_{k}.png"),
        (("CDR_0", "CDR_0.5"), "{p:03d}_{k}.png"),
        (("3T/AD", "3T/N C"), "sub-{p:02d}_z{k}.png"),
        (("age<65", "age>65"), "P{p:03d}/z{k}.png"),
    ],
)
def test_folders_are_classes_unless_they_name_people(tmp_path, classes, form):
    for n, c in enumerate(classes):
        people = range(1 + 8 * n, 9 + 8 * n)
        write_folder(tmp_path / "d", f"{c}/{form.replace('{c}', c)}", people)
        end = ("_mask.png", " mask1.png", ".seg.png")[n % 3]
        masks = form.replace("{c}", c).replace(".png", end)
        write_folder(tmp_path / "d", f"{c}/{masks}", people)
    index = dataset.scan(tmp_path / "d", "folder")
    subjects = index.table.groupby("label")["subject"].nunique().to_dict()
    names = [name.removeprefix("3T/") for name in classes]
    assert subjects == dict.fromkeys(names, 8)
    assert len(index.table) == 24 * len(names) == len(index.ignored)


def test_what_is_odd_about_names_is_said(tmp_path):
    write_folder(tmp_path / "a", "train/patient_{p:02d}_z{k}.png")
    write_folder(tmp_path / "a", "test/Patient-{p}_z{k}.png", [8])
    with pytest.raises(DataError, match="1 subjects are in two splits"):
        dataset.scan(tmp_path / "a", "folder")
    write_folder(tmp_path / "b", "sub-{p:02d}_z{k}.png", range(1, 20))
    write_folder(tmp_path / "b", "extra/x{p}{k}.png", [1])
    notes = dataset.scan(tmp_path / "b", "folder").notes
    assert "(subject sub-01, slice 0)" in notes[0]
    assert "3 files do not fit it: extra/x10" in notes[1]


def test_folders_give_splits_and_classes(tmp_path, capsys):
    root = tmp_path / "d"
    write_folder(root, "x_train/CDR 0/p{p}_{k}.png", range(1, 6))
    write_folder(root, "x_train/AD/p{p}_{k}.png", range(6, 11))
    write_folder(root, "X_Test_set/X_Test_set/AD/p{p}_{k}.png", range(11, 13))
    write_folder(root, "other/p{p}_{k}.png", range(20, 22))
    write_folder(root, "x_train/masks/p{p}_{k}.png", range(1, 3))
    assert dataset.detect_layout(root) == "folder"
    slices = load(root, "folder")
    assert set(slices.table["label"]) == {"AD", "CDR 0"}
    splits = slices.table.groupby("split")["subject"].nunique()
    assert splits.to_dict() == {"train": 9, "validate": 1, "test": 2}
    output = capsys.readouterr().out
    assert "folder x_test_set is read as test" in output
    assert "other: 6 files ignored: p20_0.png" in output
    assert "x_train/masks: 6 files ignored" in output
    for folder, p in ("AD_train", 1), ("NC_train", 4), ("NC_test", 7):
        write_folder(
            tmp_path / "e", f"{folder}/p{{p}}_{{k}}.png", range(p, p + 3)
        )
    found = dataset.scan(tmp_path / "e", "folder").table[["label", "split"]]
    assert found.value_counts()["NC", "test"] == 9 and len(found) == 27


# ------------------------------------------------------------------- reading


RGBA = np.dstack([GREY] * 4)
PICTURES = {
    "RGB of equal channels": png(RGBA[..., :3]),
    "opaque RGBA": png(np.dstack([RGBA[..., :3], 0 * GREY + 255])),
    "1 bit": png(GREY > 100),
    "JPEG": jpeg(GREY, quality=100),
    "RGB JPEG": jpeg(GREY, "RGB", quality=100),
    "turned JPEG": jpeg(np.rot90(GREY).copy(), quality=100, exif=TURNED),
    "turned PNG": png(np.rot90(GREY).copy(), exif=TURNED),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_are_read_right(tmp_path, kind):
    path = tmp_path / "x.png"
    path.write_bytes(PICTURES[kind])
    _, image = dataset._read_file(path)
    expected = 255 * (GREY > 100) if kind == "1 bit" else GREY.astype(int)
    assert np.abs(image - expected).max() <= (4 if "JPEG" in kind else 0)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_the_range_comes_from_the_training_images(oasis, bits, capsys):
    gain = 2 ** (bits - 8)
    for path in oasis.glob("*/case*"):
        image = np.asarray(Image.open(path)).astype(np.uint16)
        path.write_bytes(png(image * gain))
    slices = load(oasis)
    high = slices.intensity["high"] * 65535
    assert high == 65535 if bits == 16 else 218 < high / gain <= 255
    assert f"0 to {high:g} of 65535" in capsys.readouterr().out
    assert 0.9 < slices.read().max() <= 1
    # A single file is read as the training images were, and back again.
    run = run_of(slices, oasis.parent)
    Image.fromarray(GREY.astype(np.uint16) * gain).save("new.png")
    image = dataset.read_files(["new.png"], run).read()[0, ..., 0]
    expected = np.clip(GREY.astype(float) * gain / high, 0, 1)
    assert np.abs(image - expected).max() < 0.003


def test_percentiles_are_of_the_scan(hipmri):
    slices = load(hipmri, "hipmri")
    rows = np.flatnonzero(slices.table["scan"] == "006_week_0")
    scan = slices.take(rows)
    paths = [hipmri / path for path in scan.table["path"]]
    voxels = np.array([nibabel.load(path).get_fdata() for path in paths])
    low, high = np.percentile(voxels, (0.5, 99.5))
    assert np.allclose(scan.table[["low", "high"]], [low, high])
    expected = np.clip((voxels - low) / (high - low), 0, 1)
    images = scan.read()[..., 0]
    assert np.abs(images - expected).max() <= 0.51 / 255
    for path, array in zip(paths, voxels, strict=True):
        write_nifti(path, (array * 7).astype(np.int32))  # of another gain
    again = load(hipmri, "hipmri").take(rows)
    assert (again.read()[..., 0] == images).all()
    assert dataset._window(np.full(9, 1e9))[1] > 1e9  # of a constant scan


@pytest.mark.parametrize("axes", ["LAS", "RPS", "ARS", "PLI"])
def test_planes_stored_otherwise_are_turned(hipmri, axes, capsys):
    before = load(hipmri, "hipmri").read()
    path = train_nifti(hipmri)
    image = nibabel.load(path)
    image = nibabel.Nifti1Image(image.get_fdata()[..., None], image.affine)
    turn = nibabel.orientations.axcodes2ornt(axes)
    nibabel.save(image.as_reoriented(turn), path)
    slices = load(hipmri, "hipmri")
    assert f"1 files stored with axes to {axes}" in capsys.readouterr().err
    assert (slices.read() == before).all()


# -------------------------------------------------------------------- loading


def test_all_problems_come_at_once(oasis, capsys):
    paths = sorted((oasis / "keras_png_slices_train").iterdir())
    for path in paths[1:]:
        path.write_bytes(b"")
    with pytest.raises(DataError) as caught:
        load(oasis)
    lines = str(caught.value).split("\n")
    assert lines[0].startswith("15 of 24 files are unfit")
    assert [line.split(":")[0] for line in lines[1:]] == [*map(str, paths[1:])]
    slices = load(oasis, skip_bad=True)
    assert len(slices) == 24 - 15
    assert [oasis / path for path in slices.rejected["path"]] == paths[1:]
    assert "15 unfit files left out" in capsys.readouterr().err
    for path in oasis.glob("*/case*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"\.\.\. and 4 more$"):
        load(oasis)
    with pytest.raises(DataError, match="test: no file is left; 24 of 24 f"):
        load(oasis, skip_bad=True)


def test_what_is_left_is_what_is_there_without_it(oasis):
    leak = oasis / "keras_png_slices_test" / "case_006_slice_1.nii.png"
    shutil.copy(train_file(oasis, 2), leak)
    train_file(oasis, 1, 2).write_bytes(b"")
    slices = load(oasis, skip_bad=True)
    assert slices.rejected["reason"].tolist() == [
        "found no bytes, expected 1 to 33554432",
        f"found the same bytes in train and as {leak} in test, expected each "
        "image in one split",
    ]
    for path in slices.rejected["path"]:
        (oasis / path).unlink()
    again = load(oasis)
    assert (again.table["sha256"] == slices.table["sha256"]).all()
    assert (again.read() == slices.read()).all() and again.rejected.empty


def test_later_starts_decode_nothing(oasis, monkeypatch, capsys):
    read, opened = dataset._read_bytes, []
    monkeypatch.setattr(
        dataset, "_read_bytes", lambda path: opened.append(path) or read(path)
    )
    first, said = load(oasis), capsys.readouterr().out
    assert len(opened) == 24 + 16  # and the training images, for the plan
    again = load(oasis)
    assert len(opened) == 40 and again.file == first.file
    assert capsys.readouterr().out == said
    pd.testing.assert_frame_equal(again.table, first.table)
    moved = oasis.rename(oasis.with_name("moved"))
    assert load(moved).file == first.file and len(opened) == 40
    load(moved, image_size=(16, 16), resize=True)
    assert len(opened) == 80
    # Other contents with the old time.
    path = train_file(moved)
    stamp, image = path.stat(), Image.open(path)
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert load(moved).file != first.file


def test_old_entries_of_the_cache_are_removed(oasis, monkeypatch):
    first, month = load(oasis).file, 30.5 * 24 * 3600
    past = time.time() - month
    for path in first.parent.iterdir():
        os.utime(path, (past, past))
    assert load(oasis).file == first  # that is a use
    monkeypatch.setattr(dataset, "CACHE_FORMAT", -1)
    second = load(oasis).file
    assert second != first and first.exists()
    os.utime(first, (past, past))
    load(oasis, image_size=(48, 48))
    assert second.exists() and not first.exists()


def test_a_file_that_could_not_be_read_is_tried_again(oasis, monkeypatch):
    path, read = train_file(oasis), dataset._read_bytes

    def fail(name):
        if os.fspath(name) == str(path):
            raise dataset._Unfit("cannot read the file (I/O error)")
        return read(name)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_read_bytes", fail)
        assert len(load(oasis, skip_bad=True).read()) == 23
    assert len(load(oasis).read()) == 24


def test_an_image_size_below_the_content_is_refused(oasis, hipmri, capsys):
    with pytest.raises(FlagError, match="--image-size 16x32.*16 of 16 train"):
        load(oasis, image_size=(16, 32))
    slices = load(oasis, image_size=(16, 32), resize=True)
    assert "scaled to 16x32, their aspect ratio kept" in capsys.readouterr().out
    images = slices.read()[..., 0]
    assert images[..., 8:24].any() and not images[..., :8].any()
    for path in oasis.glob("*/case*"):  # all content in the middle
        image = np.asarray(Image.open(path)).copy()
        image[:9], image[-9:] = 0, 0
        Image.fromarray(image).save(path)
    assert load(oasis, image_size=(16, 32)).size == (16, 32)
    assert load(hipmri, "hipmri").read().shape == (24, 32, 32, 1)
    output = capsys.readouterr().out
    assert "32x32 (20), 32x36 (4); padded or cropped to 32x32" in output
    assert "content of 4 images is cut" in output


@pytest.mark.parametrize("layout", ["oasis", "hipmri"])
def test_images_of_a_run(request, tmp_path, layout, monkeypatch):
    root = request.getfixturevalue(layout)
    slices = load(root, layout)
    run = run_of(slices, tmp_path, layout)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_read_file", None)  # nothing is decoded
        splits = dataset.load_run(run)
    assert list(splits) == list(dataset.SPLITS)
    images = np.concatenate([splits[name].read() for name in splits])
    assert (images == slices.read()).all()
    # A part of the rows, elsewhere: as they were in the whole.
    part = slices.take(np.arange(1, 24, 3))
    run = run_of(part, tmp_path, layout)
    root.rename(tmp_path / "moved")
    with pytest.raises(DataError, match="8 images of the run are gone.*--data"):
        dataset.load_run(run)
    splits = dataset.load_run(run, tmp_path)
    images = np.concatenate([splits[name].read() for name in splits])
    assert (images == part.read()).all()


def test_images_of_a_run_that_are_gone_or_changed(oasis):
    slices = load(oasis)
    run = run_of(slices, oasis.parent)
    train_file(oasis).unlink()
    splits = dataset.load_run(run, needed=("test",))
    assert len(splits["train"]) == 15
    assert (splits["test"].read() == slices.split("test").read()).all()
    shutil.copy(train_file(oasis, 2), train_file(oasis))
    with pytest.raises(DataError, match="1 images .* have changed.*001"):
        dataset.load_run(run)
    assert len(dataset.load_run(run, needed=("test",))["train"]) == 15


def test_single_files(hipmri):
    slices = load(hipmri, "hipmri")
    run = run_of(slices, hipmri.parent, "hipmri")
    own = dataset.read_files([hipmri / slices.table["path"][5]], run)
    assert (own.read() == slices.read([5])).all()
    kept = ["subject", "slice", "position", "low", "high"]
    expected = slices.table.loc[[5], kept].reset_index(drop=True)
    pd.testing.assert_frame_equal(own.table[kept], expected)
    assert own.table["split"].tolist() == ["test"]
    # Two sites, equal names, other scales: each for itself.
    paths = [Path(site, "slice.nii.gz") for site in ("P1", "P2")]
    for path, gain in zip(paths, (1, 100), strict=True):
        path.parent.mkdir()
        write_nifti(path, (GREY.astype(np.int32) + 1) * gain)
    both = dataset.read_files(paths, run)
    images = both.read()
    assert (images[0] == images[1]).all() and np.ptp(images) > 0.9
    assert np.isnan(both.table["position"]).all()
    assert both.table["subject"].tolist() == ["slice.nii.gz"] * 2
    # The files of one folder are one scan.
    os.rename("P2/slice.nii.gz", "P2/s10.nii.gz")
    write_nifti(Path("P2/s11.nii.gz"), GREY.astype(np.int32) * 3)
    scan = dataset.read_files(["P2"], run)
    assert scan.table["high"].nunique() == 1 and len(scan) == 2


def test_single_files_of_another_size_or_kind(oasis_dir, tmp_path, capsys):
    run = run_of(load(oasis_dir), tmp_path)
    run.info["crop"] = [4, 8, 24, 16]
    Image.fromarray(np.kron(GREY, np.ones((4, 2), np.uint8))).save("large.png")
    Image.new("L", (SIZE, SIZE)).save("blank.png")
    Image.fromarray(GREY[4:28, 4:28]).save("near.png")
    Image.fromarray(GREY.astype(np.uint16) * 9).save("deep.png")
    # Its first axis goes to the right, its second to the front.
    write_nifti(Path("lying.nii"), GREY[::-1].T[..., None].astype(np.int16))
    names = ["large.png", "blank.png", "near.png", "deep.png", "lying.nii"]
    slices = dataset.read_files(names, run)
    assert "; 128x64 scaled to 32x32, their" in capsys.readouterr().out
    large, blank, near, deep, lying = slices.read_bytes()[..., 0]
    assert np.corrcoef(lying.ravel(), GREY.ravel())[0, 1] > 0.99
    assert not large[:, :8].any() and min(large.max(), deep.max()) > 229
    assert not blank.any() and (near == GREY)[4:28, 4:28].all()
    Path("not.png").write_text("text")
    utils.write_json(Path("run/vqvae.keras"), {})
    faults = {"gone.png": "nothing", ".": "not.png", "run": "a run comes"}
    for name, match in faults.items():
        with pytest.raises(DataError, match=match):
            dataset.read_files([name], run)


def test_another_data_set_is_all_test(oasis_dir, adni_dir, tmp_path, capsys):
    run = run_of(load(oasis_dir, image_size=(40, 48)), tmp_path)
    slices = dataset.load_external(adni_dir, "adni", run)
    assert set(slices.table["split"]) == {"test"} and len(slices) == 24
    assert slices.size == (40, 48)
    image = np.asarray(Image.open(adni_dir / slices.table["path"][3]))
    padded = dataset.fit_to(image, (40, 48)) / np.float32(255)
    assert (slices.read([3])[0, ..., 0] == padded).all()
    run.split_path.unlink()  # of a model that is passed on without the table
    files = dataset.read_files([train_file(oasis_dir)], run)
    assert len(files.read()) == 1 and files.table["label"][0] == ""
    assert np.isnan(files.table["position"][0])
    run.info |= {"image_size": [SIZE, SIZE], "crop": [8, 8, 8, 8]}
    assert dataset.load_external(adni_dir, "adni", run).read().any()
    assert "24 images reach beyond the crop" in capsys.readouterr().err


# ------------------------------------------------------------------ batches


@pytest.fixture
def slices(oasis_dir):
    return load(oasis_dir)


def take(batches, count):
    return [tf.nest.map_structure(np.asarray, x) for x in batches.take(count)]


def test_ordered_batches(slices):
    batches = dataset.ordered_batches(slices, 5)
    images = take(batches, -1)
    assert batches.cardinality() == len(images) == 5 and len(images[4]) == 4
    assert (np.concatenate(images) == slices.read()).all()
    both = take(dataset.ordered_batches((slices, {"n": np.arange(24)}), 9), -1)
    assert np.concatenate([x[1]["n"] for x in both]).tolist() == [*range(24)]
    with pytest.raises(DataError, match="no images"):
        dataset.ordered_batches(slices.take([]))
    whole = slices.file.read_bytes()
    for damaged in (b"", whole[:-1], whole[: len(whole) // 2]):
        slices.file.write_bytes(damaged)
        with pytest.raises(DataError, match="expected decoded images"):
            dataset.ordered_batches(slices)


def test_orders_are_a_function_of_seed_and_epoch(slices):
    def orders(seed, count=6):
        batches = dataset.training_batches(np.arange(10), 5, 2, seed)
        return np.reshape(take(batches, count), (-1, 10)).tolist()

    assert orders(0) == [
        [3, 0, 1, 9, 4, 2, 8, 7, 6, 5],
        [3, 5, 1, 4, 9, 2, 0, 7, 6, 8],
        [7, 9, 0, 8, 5, 6, 1, 2, 3, 4],
    ]
    assert orders(1) != orders(0)
    assert all(sorted(order) == [*range(10)] for order in orders(7))
    assert len(set(map(tuple, orders(7)))) == 3


@pytest.mark.parametrize("step", [0, 1, 4, 5, 7, 14])
def test_starting_later_gives_the_rest(slices, step):
    source = {"image": slices, "row": np.arange(24)}
    options = {"transform": lambda *known: known}

    def batches(first, count):
        made = dataset.training_batches(source, 7, 4, 3, first, **options)
        return take(made, count)

    whole = batches(0, step + 9)
    for a, b in zip(batches(step, 9), whole[step:], strict=True):
        assert (a[0]["image"] == b[0]["image"]).all()
    for k, (batch, epoch, rows) in enumerate(whole):
        assert epoch == k // 4 and (batch["row"] == rows).all()
        assert (batch["image"] == slices.read(rows)).all()
    rows = np.concatenate([rows for _, _, rows in whole])[:28]
    assert sorted(rows[:24]) == [*range(24)]  # every batch is full: an epoch
    assert (rows[24:] == rows[:4]).all()  # goes on from its own beginning
    small = take(dataset.training_batches(np.arange(3), 8, 1, seed=1), 1)
    assert np.bincount(small[0]).tolist() == [3, 3, 2]


def test_parts_of_batches(slices):
    parts = dataset.ordered_batches(slices, 7, (1, 3, 3))
    assert parts.cardinality() == 8
    assert [len(part) for part in take(parts, -1)] == [2, 3, 2, 3, 2, 3, 1, 1]
    halves = [
        take(dataset.training_batches(slices, 8, 3, 1, parts=(k, k + 1, 2)), 3)
        for k in range(2)
    ]
    both = take(dataset.training_batches(slices, 8, 3, 1), 3)
    for a, b, c in zip(*halves, both, strict=True):
        assert (np.concatenate([a, b]) == c).all()
    assert dataset.divisible_batch_size(33, 16, 2) == 15
    assert dataset.divisible_batch_size(3, 16, 4) == 0


# ------------------------------------------------------------------- augment


@pytest.fixture
def drawings():
    images = [blobs(9, k, shape=(44, 36)) for k in range(3)]
    return np.stack(images)[..., None] / np.float32(510) + np.float32(0.25)


def test_augment_is_a_function_of_seed_epoch_and_number(drawings):
    whole = dataset.augment(drawings, 1, [7, 8, 9], flips=0.5).numpy()
    for k in range(3):
        alone = drawings[k : k + 1]
        alone = dataset.augment(alone, 1, [7 + k], flips=0.5).numpy()
        assert np.allclose(alone[0], whole[k], atol=1e-6)
    for seed, epoch in ((2, 0), (1, 1)):
        other = dataset.augment(drawings, seed, [7, 8, 9], 1.0, 0.5, epoch)
        assert (other.numpy() != whole).any(axis=(1, 2, 3)).all()
    again = tf.function(dataset.augment, autograph=False)
    again = again(drawings[1:], 1, tf.constant([8, 9]), tf.constant(1.0), 0.5)
    assert np.allclose(again, whole[1:], atol=1e-6)


def test_strength_zero_changes_nothing(drawings):
    same = dataset.augment(drawings, 5, range(3), tf.constant(0.0)).numpy()
    assert (same == drawings).all() and same.dtype == np.float32
    many, numbers = np.repeat(drawings[:1], 64, 0), range(64)
    flipped = dataset.augment(many, 5, numbers, 0.0, 0.5).numpy()
    ways = [(flipped == x).all((1, 2, 3)) for x in (many, many[:, :, ::-1])]
    assert (ways[0] ^ ways[1]).all() and 20 < ways[1].sum() < 44
    flipped = dataset.augment(many, 5, numbers, 0.0, 0.5, 0, 1).numpy()
    assert (flipped[ways[1]] == many[ways[1]][:, ::-1]).all()


def test_augment_shifts_by_whole_pixels():
    image = np.pad(blobs(9, shape=(160, 150)), ((8, 8), (13, 13))) / 255
    many = np.repeat(0.8 * image[None, ..., None], 99, 0).astype(np.float32)
    moved, shifts, gains = dataset.augment(many, 0, range(99)), [], []
    for result in moved.numpy()[..., 0]:
        content = [np.flatnonzero(result.any(axis)) for axis in (1, 0)]
        shift = [places[0] for places in content] - np.array([8, 13])
        back = np.roll(result, -shift, (0, 1))
        gains.append(back.sum() / many[0].sum())
        assert np.allclose(back, many[0, ..., 0] * gains[-1], atol=1e-6)
        shifts.append(shift)
    assert set(np.ravel(shifts)) == {*range(-3, 4)}
    assert 0.92 < min(gains) < 0.95 and 1.05 < max(gains) < 1.08
    ones = dataset.augment(np.ones((99, 176, 9, 1)) / 2, 0, range(99)).numpy()
    assert (ones == 0).any() and not (ones[:, 3:-3, 3:-3] == 0).any()


# ---------------------------------------------------------------- simulator


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    dest = tmp_path_factory.mktemp("simulated") / "brains"
    return dataset.simulate(dest, "oasis", 4, 64, seed=1)


def test_simulated_brains(simulated, tmp_path, capsys):
    slices = load(simulated)
    assert slices.simulated and slices.size == (64, 56)
    output = capsys.readouterr().out
    assert "simulated" in output and "64 images, 32 AD, 32 NC" in output
    odd = slices.table["subject"].astype(int) % 2 == 1
    assert (slices.table["label"] == odd.map({True: "NC", False: "AD"})).all()
    counts = slices.table.groupby("split")["subject"].nunique().to_dict()
    assert counts == {"train": 2, "validate": 1, "test": 1}
    assert not list(simulated.parent.glob("*.tmp-*"))
    images = slices.read()
    assert (images[:, 0] == 0).all() and (images[..., 0, :] == 0).all()
    assert 0.7 < np.quantile(images, 0.95) < 1
    # Bytes depend on the seed and the subject only.
    ours = {p.name: p.read_bytes() for p in simulated.rglob("case*")}
    for seed in (1, 2):
        other = dataset.simulate(tmp_path / str(seed), "oasis", 3, 64, seed)
        same = {ours[p.name] == p.read_bytes() for p in other.rglob("case*")}
        assert same == {seed == 1}


def test_ill_brains_have_larger_ventricles(tmp_path, capsys):
    slices = load(dataset.simulate(tmp_path / "d", "adni", 8, 64), "adni")
    assert "cannot be proved" not in capsys.readouterr().out
    images, position = slices.read(), slices.table["position"]
    areas = pd.Series(dataset.ventricle_areas(images, position))
    mean = areas.groupby(slices.table["label"]).mean()
    assert mean["AD"] > 1.2 * mean["NC"] > 10
    assert (areas.notna() == position.between(0.5, 0.8)).all()
    # As a VQ-VAE draws them, and on a larger plane.
    blurred = ndimage.gaussian_filter(images, (0, 0.35, 0.35, 0))
    blurred = np.pad(blurred, ((0, 0), (0, 0), (4, 4), (0, 0)))
    again = dataset.ventricle_areas(blurred[..., 0], position)
    assert np.nanmean(again) == pytest.approx(areas.mean(), rel=0.1)


@pytest.mark.parametrize("layout", ["oasis", "adni", "hipmri"])
def test_the_smallest_simulations_fill_every_split(layout, tmp_path):
    root = dataset.simulated_folder(3, layout, 32)
    assert root == Path("data") / f"simulated-{layout}-3-32"
    assert root == dataset.simulated_folder(3, layout, 32)
    slices = load(root, layout)
    assert set(slices.table["split"]) == set(dataset.SPLITS)
    assert (set(slices.table["label"]) == {""}) == (layout == "hipmri")
    again = dataset.simulate(tmp_path / "again", layout, 3, 32)
    assert files(again) == files(root)


def test_a_folder_in_use_is_not_overwritten(simulated, tmp_path):
    before = files(simulated)
    stamp = (simulated / "simulated.json").stat().st_mtime_ns
    dataset.simulate(simulated, "oasis", 4, 64, seed=1)
    assert (simulated / "simulated.json").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match="another simulation"):
        dataset.simulate(simulated, "oasis", 4, 64, seed=9)
    assert files(simulated) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="other files"):
        dataset.simulate(tmp_path, "oasis", 4, 64)
    with pytest.raises(FlagError, match="--image-size"):
        dataset.simulate(tmp_path / "x", image_size=50)
    (tmp_path / "e").mkdir()
    (tmp_path / "l").symlink_to(tmp_path / "e", target_is_directory=True)
    with pytest.raises(DataError, match="found a link"):
        dataset.simulate(tmp_path / "l", "oasis", 4, 64)


# ------------------------------------------------------------------- volumes


@pytest.fixture(scope="module")
def brain():
    """The MNI152 brain, with a marker on its right, in front and above."""
    from nilearn.datasets import load_mni152_template

    image = load_mni152_template(resolution=1)
    voxels = np.rint(image.get_fdata() * 900).astype(np.int16)
    voxels[118:142, 136:162, 104:134] += 300
    return nibabel.Nifti1Image(voxels, image.affine)


def turned(image, axes):
    own = nibabel.io_orientation(image.affine)
    goal = nibabel.orientations.axcodes2ornt(axes)
    return image.as_reoriented(nibabel.orientations.ornt_transform(own, goal))


def resampled(image):
    from nibabel.processing import resample_to_output

    image = nibabel.Nifti1Image(image.get_fdata(), image.affine)
    return resample_to_output(image, (0.8, 1.0, 1.2), order=1)


def wrapped(kind, change=lambda voxels: voxels, **options):
    def make(image):
        voxels = change(np.asarray(image.dataobj))
        return kind(voxels, image.affine, **options)

    return make


NIFTI = nibabel.Nifti1Image
VOLUMES = {  # file -> how it is made of the brain
    "lps.nii": lambda image: turned(image, "LPS"),
    "las.nii": lambda image: turned(image, "LAS"),
    "pir.nii": lambda image: turned(image, "PIR"),
    "anisotropic.nii.gz": resampled,
    "four.nii": wrapped(NIFTI, lambda v: np.stack([v, v * 0], -1)),
    "two.nii": wrapped(nibabel.Nifti2Image),
    "pair.img": wrapped(nibabel.Spm99AnalyzeImage),
    "free.mgz": wrapped(nibabel.MGHImage, lambda v: v.astype(np.int32)),
    "scaled.nii": wrapped(NIFTI, lambda v: v * 0.37 + 5, dtype=np.int16),
    "negative.nii": wrapped(NIFTI, lambda v: v - np.int16(1000)),
    "nan.nii": wrapped(NIFTI, lambda v: np.where(v > 0, v, np.nan)),
    "big.nii": lambda i: NIFTI(i.dataobj, None, i.header.as_byteswapped(">")),
}


@pytest.mark.parametrize("plane", dataset.PLANES)
def test_one_anatomy_gives_the_same_slices_in_any_file(brain, tmp_path, plane):
    options = dataset.Slice(src=".", dest=".", plane=plane, slices=8)
    nibabel.save(brain, tmp_path / "ras.nii")
    expected, notes = dataset.cut_volume(str(tmp_path / "ras.nii"), options)
    assert notes == [] and len(expected) == 8
    few = dict(list(VOLUMES.items())[2:4])
    for name, make in (VOLUMES if plane == "axial" else few).items():
        nibabel.save(make(brain), tmp_path / name)
        images, notes = dataset.cut_volume(str(tmp_path / name), options)
        images = [dataset.fit_to(x, expected.shape[1:]) for x in images]
        both = np.stack([images, expected])[..., None] / np.float32(65535)
        assert utils.ssim(*both).numpy().min() >= 0.98, name
        assert len(notes) == (name in ("four.nii", "nan.nii")), name
    # The marker is where a reader looks for it.
    y, x = np.argwhere(expected > 63000)[:, 1:].mean(axis=0)
    height, width = expected.shape[1:]
    assert x > 0.55 * width and y < 0.45 * height


def write_bids(root, brain, sessions=(1, 2)):
    rng, rows = np.random.default_rng(0), ["participant_id\tgroup"]
    voxels = np.asarray(brain.dataobj)[::6, ::6, ::6]
    affine = brain.affine @ np.diag([6, 6, 6, 1])
    for p in range(1, 13):
        rows.append(f"sub-{p:02d}\t{'AD' if p % 2 else 'CN 0.5'}")
        for s in sessions:
            folder = root / f"sub-{p:02d}/ses-{s}/anat"
            folder.mkdir(parents=True)
            path = folder / f"sub-{p:02d}_ses-{s}_T1w.nii"
            noisy = voxels * rng.uniform(0.5, 2) + rng.normal(size=voxels.shape)
            nibabel.save(NIFTI(noisy.astype(np.float32), affine), path)
            mask = NIFTI((voxels > 0).astype(np.uint8), affine)
            nibabel.save(mask, path.with_name(f"sub-{p:02d}_ses-{s}_dseg.nii"))
    (root / "participants.tsv").write_text("\n".join(rows))
    return root


def test_slices_of_a_bids_tree(brain, tmp_path, capsys):
    root = write_bids(tmp_path / "bids", brain)
    arguments = [root, tmp_path / "out", "--slices", "4", "--spacing", "6"]
    arguments += ["--labels", root / "participants.tsv", "--bits", "16"]
    dataset.main(["slice", *map(str, arguments)])
    assert "24 masks are not read" in capsys.readouterr().out
    dataset.main(["check", str(tmp_path / "out")])
    output = capsys.readouterr().out
    assert "layout folder" in output and "ignored" not in output
    slices = load(tmp_path / "out", "folder")
    table = slices.table
    assert len(table) == 12 * 2 * 4 and table["scan"].nunique() == 24
    assert table.groupby("subject")["split"].nunique().max() == 1
    assert set(table["split"]) == set(dataset.SPLITS)
    people = table.groupby("label")["subject"].nunique()
    assert people.to_dict() == {"AD": 6, "CN-0.5": 6}
    assert table.groupby("scan")["position"].max().eq(1).all()
    assert slices.intensity["high"] == 1
    manifest = pd.read_csv(tmp_path / "out" / "manifest.csv")
    assert set(manifest["path"]) == set(table["path"])
    assert manifest["source"].nunique() == 24
    assert utils.read_png(tmp_path / "out" / "orientation.png").any()
    with pytest.raises(DataError, match="found other files"):
        dataset.main(["slice", *map(str, arguments)])


def test_flags_of_slicing(brain, tmp_path, capsys):
    root = write_bids(tmp_path / "bids", brain)
    arguments = ["slice", str(root), str(tmp_path / "out"), "--spacing", "6"]
    (tmp_path / "other.csv").write_text("id,group\nx1,AD\n")
    for flags, message in {
        "--layout oasis": "--layout: found several volumes of a .* 01",
        "--split 1,2": "--split: found 1,2",
        "--from 0.8 --to 0.2": "--from",
        "--match nothing*": "24 volumes .* in .*sub-01.*--match 'nothing",
        "--subject-pattern (": "--subject-pattern: found",
        f"--labels {root}/participants.tsv --label-column x": "the columns",
        f"--labels {tmp_path}/other.csv": "no column names a subject",
        f"--labels {root}/none.csv": "none.csv",
        "--label-column x": "--label-column: needs",
        "--match *": r"24 T1w, 1 bold; .* --match '\*T1w\.\*'",
    }.items():
        if flags == "--match *":
            (root / "sub-01_bold.nii").touch()
        with pytest.raises(utils.UserError, match=message):
            dataset.main([*arguments, *flags.split()])
        assert not (tmp_path / "out").exists()
    flags = "--layout oasis --slices 2 --image-size 32x16 --match *ses-2*"
    flags += " --subject-pattern (?i)SUB-\\d+"
    dataset.main([*arguments, *flags.split(), "--split", "0.5,0.25,0.25"])
    slices = load(tmp_path / "out")
    assert len(slices) == 24 and slices.size == (32, 16)
    assert len(set(slices.subjects)) == 12
    assert "32x16 cuts content of 24 slices" in capsys.readouterr().err
    arguments[2] = str(tmp_path / "one")
    flags = "--slices 1 --match *sub-0[12]_ses-1* --subject-pattern sub"
    dataset.main([*arguments, *flags.split()])
    assert "all 2 volumes are taken for" in capsys.readouterr().err


def test_unfit_volumes_are_named(brain, tmp_path, capsys):
    root = write_bids(tmp_path / "bids", brain, [1])
    sound = next(root.glob("sub-01/*/*/*T1w.nii")).read_bytes()
    cube = np.ones((9, 9, 9))
    broken = {
        "sub-20_T1w.nii": b"no volume",
        "sub-21_T1w.nii": nifti(np.ones((9, 9), np.float32)),
        "sub-22_T1w.nii": nifti(cube.astype(np.float32)),
        "sub-23_T1w.nii": nifti(cube.astype(np.complex64)),
        "sub-24_T1w.nii": sound[:-999],
    }
    for name, data in broken.items():
        (root / name).write_bytes(data)
    arguments = ["slice", str(root), str(tmp_path / "out"), "--spacing", "6"]
    with pytest.raises(DataError, match="5 of 17 files are unfit") as caught:
        dataset.main(arguments)
    assert all(name in str(caught.value) for name in broken)
    assert not (tmp_path / "out").exists()
    dataset.main([*arguments, "--skip-bad", "--slices", "2"])
    assert "slices of 12 volumes in" in capsys.readouterr().out


def test_thick_planes_are_taken_as_they_are(tmp_path):
    volume = np.zeros((18, 24, 6), np.float32)
    volume[6:12, 6:18] = np.arange(1, 7)
    for thickness, count in ((5.0, 6), (1.0, 32)):
        affine = np.diag([1, 1, thickness, 1])
        nibabel.save(NIFTI(volume, affine), tmp_path / "v.nii")
        options = dataset.Slice(src=".", dest=".", slices=32)
        images, _ = dataset.cut_volume(str(tmp_path / "v.nii"), options)
        middle = images[:, images.shape[1] // 2, images.shape[2] // 2] / 65535
        assert len(images) == count and (np.diff(middle) >= 0).all()
        if count == 6:
            assert np.allclose(middle, np.arange(1, 7) / 6, atol=0.01)
    nibabel.save(NIFTI(volume - 3.5 * (volume > 0), affine), tmp_path / "v.nii")
    scored, _ = dataset.cut_volume(str(tmp_path / "v.nii"), options)
    assert scored.shape == images.shape and (scored[images == 0] == 0).all()
    nibabel.save(NIFTI(volume[..., :1], affine), tmp_path / "v.nii")
    images, [note] = dataset.cut_volume(str(tmp_path / "v.nii"), options)
    assert len(images) == 1 and images.any() and "as in a mask" in note
    tilted = affine + 0.4 * np.eye(4, k=1)
    for sides, note in (None, "no orientation is stated"), (tilted, "oblique"):
        nibabel.save(NIFTI(volume, sides), tmp_path / "v.nii")
        _, [found] = dataset.cut_volume(str(tmp_path / "v.nii"), options)
        assert found.startswith(note)


def test_names_of_volumes(capsys):
    names = {
        "a/sub-07/ses-2/anat/sub-07_ses-2_T1w.nii.gz": "07",
        "ADNI_002_S_0295_MR_MPR_I118671.nii": "002S0295",
        "disc1/OAS1_0001_MR1/RAW/OAS1_0001_MR1_mpr-1_anon.img": "OAS10001",
        "heads/Anna B.nii": "AnnaB",
        "v/1_23.nii": "1x23",
        "v/AB01_M12_T1w.nii": "AB01",
    }
    for path, subject in names.items():
        assert dataset._subject_of(path) == subject
    pattern = r"p(?P<subject>\d+)"
    assert dataset._subject_of("x/p7_b.nii", pattern=pattern) == "7"
    with pytest.raises(DataError, match="x/b.nii: found no subject by"):
        dataset._subject_of("x/b.nii", pattern=pattern)
    for form, folder in {
        "v/AD/P{p}/{k}.nii": "P1",
        "v/P{p}/ses{k}/T1.nii": "P1",
        "v/B_{p}/B_{p}_{k}.nii": "B_1",
        "v/AD/{p}_{k}.nii": "",
        "v/{p}.{k}.nii": "",
        "{p}/T1w/T1w.nii": "1",
        "PPMI/310{p}/T1/{k}/PPMI_310{p}_MR_{k}.nii": "3101",
        "{p}/T1w_MPR{k}/{p}_T1w_MPR{k}.nii": "1",
    }.items():
        paths = [form.format(p=p, k=k) for p in range(1, 9) for k in "ab"]
        assert dataset._subject_folders(paths)[0] == folder
        paths += ["mean.nii", paths[0] + ".gz"]  # change nothing
        assert dataset._subject_folders(paths)[0] == folder
    paths = [f"v/{c}/P{p}/T1.nii" for c in ("AD", "NC", "MCI") for p in "123"]
    assert dataset._subject_folders(paths)[:2] == ("P1", "P2")
    for form in "v/{v}/P{p}.nii", "v/P{p}/201{n}031{p}.nii":
        pairs = [(v, p) for v in ("baseline", "ses2") for p in "123"]
        paths = [form.format(v=v, p=p, n=len(v)) for v, p in pairs]
        folders = dataset._subject_folders(paths)
        people = [*map(dataset._subject_of, paths, folders)]
        assert people == ["P1", "P2", "P3"] * 2
    paths = [f"v/{c}/{p}.nii" for c in ("AD", "NC") for p in "123"]
    assert dataset._subject_folders(paths)[::3] == ["AD_1", "NC_1"]
    stems = [f"prostate_{p:03d}_000{k}" for p in range(3) for k in range(2)]
    dataset._warn_of_likeness(stems[::2], pd.Series(stems[::2]))
    assert not capsys.readouterr().err
    for names in stems, ["A_T1_2", "A_T1_9"]:
        subjects = pd.Series(map(dataset._subject_of, names))
        dataset._warn_of_likeness(names, subjects)
        assert "alike count as several subjects: " in capsys.readouterr().err
    kinds = "X_t1 X_t1ce flair I-T2 sub-1_T1w_PD I-MRA T1w_acpc_dc T2_brain "
    found = [dataset.KINDS.search(x) for x in f"{kinds}X_t1_2008 PD01".split()]
    assert [*map(bool, found)] == [True] * 8 + [False] * 2


def test_labels_of_volumes(tmp_path, capsys):
    subjects, table = pd.Series(["01", "02", "03"]), tmp_path / "people.csv"
    table.write_text(
        ",sex,id,group\n0,1,sub-01,A\n1,2,sub-02,B\n2,1,sub-03,A\n"
        "3,2,sub-03, \n4,1,sub-04,B\nTotal: 5"
    )
    options = dataset.Slice(src=".", dest=".", labels=str(table))
    assert list(dataset._read_labels(subjects, options)) == ["A", "B", "A"]
    assert capsys.readouterr().out.startswith("2 labels, such as A, B, in")
    table.write_text(table.read_text().replace("03, ", "03,B"))
    assert list(dataset._read_labels(subjects, options)) == ["A", "B", "A"]
    assert "1 subjects have several labels" in capsys.readouterr().out
    # Of columns of numbers the one that is called like an id; as Excel writes.
    text = "\ufeffage,subject,group\n2,1.0, .5,\n1,2.0,Abeta+,\n3,3.0,Abeta-"
    table.write_text(text, "utf-8")
    found = dataset._read_labels(subjects, options)
    assert list(found) == ["0.5", "Abeta+", "Abeta-"]
    for text, match in (
        ("", "people.csv: .* expected a table"),
        ("subject,group", "no column names a subject"),
        ("subject,group\n1,M0", "found the label M0, expected none"),
        ("subject,group\n1,Test", "found the label Test, expected none"),
        ("a,b,group\n1,2,A\n2,1,B\n3,3,A", "columns a and b both name"),
    ):
        table.write_text(text)
        with pytest.raises(DataError, match=match):
            dataset._read_labels(subjects, options)


# ------------------------------------------------------------- command line


def test_check(oasis, tmp_path, capsys):
    train_file(oasis).write_bytes(b"\x89PNG\r\n\x1a\n and then nothing more")
    result = run_python(dataset.__file__, "check", oasis)
    assert result.returncode == 3 and result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert train_file(oasis).name in result.stderr
    options = ["--skip-bad", "--preview", "p/a.png"]
    dataset.main(["check", str(oasis), *options])
    output = capsys.readouterr().out
    assert f"left out {train_file(oasis)}: " in output
    assert utils.read_png(Path("p/a.png")).any()
