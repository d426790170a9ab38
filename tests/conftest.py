"""Tiny data sets in the three layouts, shared by all tests.

The folders are made once a session: copy one before changing it.
"""

import gzip
import os

# Before TensorFlow is imported by whichever test comes first.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import nibabel
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

SIZE = 32  # pixels, both ways
SLICES = 4  # a subject


def blobs(*key, shape=(SIZE, SIZE)):
    """Smooth random blobs, uint8, a function of the key."""
    noise = np.random.default_rng(key).normal(size=shape)
    image = ndimage.gaussian_filter(noise, 3)
    image = (image - image.min()) / np.ptp(image)
    return np.rint(255 * image).astype(np.uint8)


def write_nifti(path, array):
    """Write a NIfTI file, gzipped if its name says so, always alike."""
    data = nibabel.Nifti1Image(array, np.eye(4)).to_bytes()
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    path.write_bytes(data)


@pytest.fixture(scope="session")
def oasis_dir(tmp_path_factory):
    """OASIS: subjects 1 to 4 train, 5 validate, 6 test; masks beside."""
    root = tmp_path_factory.mktemp("oasis") / "keras_png_slices_data"
    splits = ["train"] * 4 + ["validate", "test"]
    for subject, split in enumerate(splits, 1):
        for kind in ("", "seg_"):
            folder = root / f"keras_png_slices_{kind}{split}"
            folder.mkdir(parents=True, exist_ok=True)
            for k in range(SLICES):
                name = f"{kind or 'case_'}{subject:03d}_slice_{k}.nii.png"
                image = Image.fromarray(blobs(subject, k, len(kind)))
                image.save(folder / name)
    return root


@pytest.fixture(scope="session")
def adni_dir(tmp_path_factory):
    """ADNI: scans 100 to 103 train, 104 and 105 test; odd ones are AD."""
    root = tmp_path_factory.mktemp("adni") / "AD_NC"
    for number in range(100, 106):
        label = "AD" if number % 2 else "NC"
        folder = root / ("train" if number < 104 else "test") / label
        folder.mkdir(parents=True, exist_ok=True)
        for k in range(SLICES):
            path = folder / f"{number}_{78 + k}.jpeg"
            Image.fromarray(blobs(number, k)).save(path)
    return root


@pytest.fixture(scope="session")
def hipmri_dir(tmp_path_factory):
    """HipMRI: cases 4 to 7 train, 8 validate, 9 test; case 7 is wider."""
    root = tmp_path_factory.mktemp("hipmri") / "keras_slices_data"
    for case in range(4, 10):
        split = {8: "validate", 9: "test"}.get(case, "train")
        folder = root / f"keras_slices_{split}"
        folder.mkdir(parents=True, exist_ok=True)
        shape = (SIZE, SIZE + 4) if case == 7 else (SIZE, SIZE)
        for k in range(SLICES):
            image = blobs(case, k, shape=shape).astype(np.int16) * case
            name = f"case_{case:03d}_week_0_slice_{k}.nii.gz"
            write_nifti(folder / name, image)
    return root
