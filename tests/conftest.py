"""Tiny data sets and runs, shared by all tests: copy one to change it."""

import functools
import gzip
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

# Before TensorFlow is imported by whichever test comes first.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import nibabel
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

import modules
import predict
import train
import utils

ROOT = Path(__file__).parent.parent
SIZE = 32  # pixels, both ways
SLICES = 4  # a subject
LOADED = {}  # models of `load_once`


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Give all tests that share what takes long to make to one process."""
    runs = ("tiny_run", "vqvae_run", "levels_run", "any_run")
    groups = {x: x for x in ("alone", "half_done", "people", "simulated")}
    groups |= dict.fromkeys(runs, "runs")
    for item in items:
        for name in groups.keys() & {*item.fixturenames}:
            item.add_marker(pytest.mark.xdist_group(groups[name]))


def blobs(*key, shape=(SIZE, SIZE)):
    """Smooth random blobs, uint8, a function of the key."""
    noise = np.random.default_rng(key).normal(size=shape)
    image = ndimage.gaussian_filter(noise, 3)
    image = (image - image.min()) / np.ptp(image)
    return np.rint(255 * image).astype(np.uint8)


def write_nifti(path, array):
    """Write a NIfTI file, gzipped if its name says so, always alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = nibabel.Nifti1Image(array, np.eye(4)).to_bytes()
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    path.write_bytes(data)


@pytest.fixture(scope="session")
def oasis_dir(tmp_path_factory):
    """OASIS: subjects 1 to 4 train, 5 validate, 6 test; masks beside."""
    root = tmp_path_factory.mktemp("oasis") / "keras_png_slices_data"
    for subject, split in enumerate(["train"] * 4 + ["validate", "test"], 1):
        for kind, k in itertools.product(("", "seg_"), range(SLICES)):
            folder = root / f"keras_png_slices_{kind}{split}"
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{kind or 'case_'}{subject:03d}_slice_{k}.nii.png"
            utils.write_png(folder / name, blobs(subject, k, len(kind)))
    return root


@pytest.fixture(scope="session")
def adni_dir(tmp_path_factory):
    """ADNI: scans 100 to 103 train, 104 and 105 test; odd ones are AD."""
    root = tmp_path_factory.mktemp("adni") / "AD_NC"
    for number, k in itertools.product(range(100, 106), range(SLICES)):
        split = "train" if number < 104 else "test"
        folder = root / split / ("AD" if number % 2 else "NC")
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(blobs(number, k))
        image.save(folder / f"{number}_{78 + k}.jpeg")
    return root


@pytest.fixture(scope="session")
def hipmri_dir(tmp_path_factory):
    """HipMRI: cases 4 to 7 train, 8 validate, 9 test; case 7 is wider."""
    root = tmp_path_factory.mktemp("hipmri") / "keras_slices_data"
    for case, k in itertools.product(range(4, 10), range(SLICES)):
        split = {8: "validate", 9: "test"}.get(case, "train")
        name = f"case_{case:03d}_week_0_slice_{k}.nii.gz"
        shape = (SIZE, SIZE + 4) if case == 7 else (SIZE, SIZE)
        image = blobs(case, k, shape=shape).astype(np.int16) * case
        write_nifti(root / f"keras_slices_{split}" / name, image)
    return root


TINY = (
    "--epochs 2 --learning-rate 0.01 --batch-size 4 --channels 8 "
    "--residual-blocks 1 --residual-channels 4 --num-embeddings 16 "
    "--embedding-dim 4 --ssim-weight 0 --prior-epochs 2 "
    "--prior-learning-rate 0.01 --prior-batch-size 8 --prior-channels 8 "
    "--prior-ema-momentum 0 --texture-channels 4 "
    "--prior-blocks 1 --condition slice --num-samples 3 --precision float32 "
    "--temperature 1 --top-p 1 --round-steps 2"
).split()


def oasis_flags(data, *flags):
    """Flags of a tiny training on data in the OASIS layout."""
    return ["--dataset", "oasis", "--data-dir", str(data), *TINY, *flags]


def train_tiny(run_dir, *flags, data=None):
    """Train in this process, return the run."""
    flags = oasis_flags(data, *flags) if data else flags
    train.main([*flags, "--run-dir", str(run_dir)])
    return utils.Run.open(run_dir)


def copy_run(run, folder):
    """Return a copy of a run inside `folder`, to be changed at will."""
    return utils.Run.open(shutil.copytree(run.path, folder / "copy"))


def exit_code(main, *arguments):
    """Run a script in this process; return its exit code."""
    try:
        utils.run_main(main, [str(word) for word in arguments])
    except SystemExit as end:
        return end.code
    return 0


def refused(main, code, capsys, *arguments):
    """Run a script, which must end with a code; return its one line."""
    found, error = exit_code(main, *arguments), capsys.readouterr().err
    assert found == code, error
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def run_python(*arguments, **environment):
    """Run Python in a new process that finds the modules of the project."""
    command = [sys.executable, *map(os.fspath, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    options = {"capture_output": True, "text": True, "timeout": 240}
    return subprocess.run(command, env=env, **options)


def files(folder):
    """{path inside: contents} of all files of a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="session")
def tiny_run(oasis_dir, tmp_path_factory):
    """The whole chain on `oasis_dir`."""
    return train_tiny(tmp_path_factory.mktemp("tiny") / "run", data=oasis_dir)


@pytest.fixture(scope="session")
def vqvae_run(oasis_dir, tmp_path_factory):
    """The run of `tiny_run` up to the VQ-VAE."""
    folder = tmp_path_factory.mktemp("vqvae") / "run"
    return train_tiny(folder, "--stage", "vqvae", data=oasis_dir)


@pytest.fixture(scope="session")
def levels_run(adni_dir, tmp_path_factory):
    """Two levels on `adni_dir`, with priors that have all there is."""
    flags = (
        "--dataset adni --levels 2 --prior pixelsnail --condition label,slice "
        "--prior-ema-momentum 0.9 --prior-augment 0.5 --flips "
        "--texture-epochs 1"
    ).split()
    folder = tmp_path_factory.mktemp("levels") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils.keras.Model, "run_eagerly", EAGER)
        return train_tiny(folder, *flags, data=adni_dir)


EAGER = property(lambda model: True, lambda model, value: None)


@pytest.fixture
def plain(monkeypatch):
    """Trainings without graphs, pictures and evaluation: what takes long."""
    monkeypatch.setattr(utils.keras.Model, "run_eagerly", EAGER)
    for name in ("vqvae_pictures", "prior_pictures"):
        monkeypatch.setattr(train, name, lambda *_: None)
    for name in ("evaluate_run", "print_summary"):
        monkeypatch.setattr(predict, name, lambda *_: None)


@pytest.fixture
def load_once(monkeypatch):
    """Models are loaded, and their samplers compiled, once a session."""

    def cached(load, run, *models):
        paths = run.vqvae_path, *run.prior_paths, run.texture_path
        key = load, *(p.exists() and p.read_bytes() for p in paths)
        if key not in LOADED:
            LOADED[key] = load(run, *models)
        return LOADED[key]

    for name in ("load_models", "load_texture"):
        own = functools.partial(cached, getattr(modules, name))
        monkeypatch.setattr(modules, name, own)
