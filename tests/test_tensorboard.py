"""What TensorBoard shows of a run: curves, pictures, codebooks."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pandas as pd
import pytest
from tensorboard.backend.event_processing import event_accumulator

import modules
import train
import utils
from tests.conftest import PICTURES, SIZE, SLICES, copy_run, train_tiny
from tests.test_resume import stop_after

EPOCHS = [1, 2]  # of the tiny runs


def read_logs(folder):
    """The events of a part of a stage."""
    guidance = dict.fromkeys(event_accumulator.DEFAULT_SIZE_GUIDANCE, 0)
    reader = event_accumulator.EventAccumulator(str(folder), guidance)
    return reader.Reload()


def steps(reader, tag):
    return [event.step for event in reader.Tensors(tag)]


def numbers(reader, tag):
    return [
        float(np.frombuffer(event.tensor_proto.tensor_content, "float32")[0])
        if event.tensor_proto.tensor_content
        else event.tensor_proto.float_val[0]
        for event in reader.Tensors(tag)
    ]


def check_curves(run):
    """The curves are those of `history.csv`, each epoch once."""
    history = utils.read_history(run)
    for stage, rows in history.groupby("stage"):
        rows = rows.dropna(axis=1, how="all")
        names = set(rows) - {"stage", "epoch", "step", "images", "seconds"}
        for part, prefix in (("train", ""), ("validate", "val_")):
            reader = read_logs(run.logs_path / stage / part)
            own = {n for n in names if n.startswith("val_") == bool(prefix)}
            rate = {"learning_rate"} if part == "train" else set()
            tags = {name.removeprefix("val_") for name in own} | rate
            assert set(reader.Tags()["tensors"]) == tags
            for name in own:
                tag = name.removeprefix("val_")
                assert steps(reader, tag) == list(rows["epoch"])
                values = rows[name].astype("float32")
                np.testing.assert_allclose(numbers(reader, tag), values)


def picture_size(event):
    """(width, height) of a picture, from the PNG itself."""
    width, height, png = event.tensor_proto.string_val
    found = utils.tf.io.decode_png(png).shape
    assert found[:2] == (int(height), int(width))
    return int(width), int(height)


# Curves


@pytest.mark.parametrize("name", ["tiny_run", "levels_run"])
def test_curves_are_those_of_the_history(name, request):
    check_curves(request.getfixturevalue(name))


def test_learning_rate_is_that_of_the_end_of_each_epoch(tiny_run):
    reader = read_logs(tiny_run.logs_path / "vqvae" / "train")
    # 16 images in batches of 4; half of the 8 steps are warm-up.
    first, last = numbers(reader, "learning_rate")
    assert first == pytest.approx(tiny_run.config.learning_rate)
    assert last == pytest.approx(0, abs=1e-6)


# Pictures


def test_pictures_of_the_first_and_last_epoch(tiny_run):
    reader = read_logs(tiny_run.logs_path / "vqvae" / "pictures")
    tags = {"reconstructions", "indices", "codes_1"}
    assert set(reader.Tags()["tensors"]) == tags
    for tag in tags:
        assert steps(reader, tag) == EPOCHS
    for tag in ("reconstructions", "indices"):
        for event in reader.Tensors(tag):
            width, height = picture_size(event)
            assert 500 < width < 1500 and 300 < height < 1500
    first, last = reader.Tensors("reconstructions")
    assert first.tensor_proto != last.tensor_proto


def test_histogram_counts_every_code_of_the_validation_images(tiny_run):
    reader = read_logs(tiny_run.logs_path / "vqvae" / "pictures")
    stored = utils.read_indices(tiny_run)["validate_1"]
    last = utils.tf.make_ndarray(reader.Tensors("codes_1")[-1].tensor_proto)
    counts, edges = np.histogram(
        stored, bins=len(last), range=(stored.min(), stored.max())
    )
    np.testing.assert_array_equal(last[:, 2], counts)
    assert last[:, 2].sum() == SLICES * (SIZE // 4) ** 2
    np.testing.assert_allclose(last[:, 0], edges[:-1], rtol=1e-6)


@pytest.mark.parametrize("name", ["tiny_run", "levels_run"])
def test_projector_shows_the_codebook_of_each_level(name, request):
    from google.protobuf import text_format
    from tensorboard.plugins import projector

    run = request.getfixturevalue(name)
    folder = run.logs_path / "vqvae" / "pictures"
    text = (folder / "projector_config.pbtxt").read_text()
    config = text_format.Parse(text, projector.ProjectorConfig())
    vqvae = utils.load_model(run.vqvae_path)
    stored = utils.read_indices(run)
    assert len(config.embeddings) == vqvae.levels
    for level, shown in enumerate(config.embeddings, start=1):
        codebook = vqvae.part("quantizer", level).codebook.numpy()
        written = np.loadtxt(folder / shown.tensor_path, delimiter="\t")
        np.testing.assert_allclose(written, codebook, rtol=1e-5, atol=1e-7)
        uses = pd.read_csv(folder / shown.metadata_path, sep="\t")
        assert list(uses["code"]) == list(range(len(codebook)))
        grids = stored[f"validate_{level}"]
        assert len(grids) <= train.COUNTED
        found = np.bincount(grids.ravel(), minlength=len(codebook))
        np.testing.assert_array_equal(uses["uses"], found)


def test_samples_of_the_prior(tiny_run):
    reader = read_logs(tiny_run.logs_path / "prior" / "pictures")
    assert reader.Tags()["tensors"] == ["samples"]
    assert steps(reader, "samples") == EPOCHS
    assert min(picture_size(reader.Tensors("samples")[0])) > 200


def test_samples_need_the_priors_of_all_levels(levels_run):
    """The bottom one is trained first, when there is no top one yet."""
    logs = levels_run.logs_path
    assert not (logs / "prior_bottom" / "pictures").exists()
    reader = read_logs(logs / "prior_top" / "pictures")
    assert steps(reader, "samples") == EPOCHS


class FakeModel:
    stop_training = False

    class optimizer:
        learning_rate = 0.5


@pytest.mark.parametrize(
    ("every", "epochs", "stopped", "expected"),
    [
        (0, 5, None, []),
        (10, 1, None, [1]),
        (10, 5, None, [1, 5]),
        (2, 5, None, [1, 2, 4, 5]),
        (2, 9, 4, [1, 2, 4]),  # by early stopping
    ],
)
def test_epochs_that_are_drawn(every, epochs, stopped, expected, tmp_path):
    drawn = []
    log = modules.TensorBoardLog(
        tmp_path, every=every, draw=lambda: drawn.append(log.epoch)
    )
    model = FakeModel()
    log.set_model(model)
    log.set_params({"epochs": epochs})
    log.on_train_begin()
    for epoch in range(stopped or epochs):
        model.stop_training = epoch + 1 == stopped
        log.on_epoch_end(epoch, {"loss": 1.0})
    log.on_train_end()
    assert drawn == expected


# Resume


def test_a_resumed_run_has_every_epoch_once(oasis_dir, tmp_path, monkeypatch):
    """Stopped in its second epoch, as if killed in a third after that save."""
    path = tmp_path / "run"
    monkeypatch.setattr(train, "finish", lambda *_: None)
    with monkeypatch.context() as patch:
        stop_after(6, patch)
        with pytest.raises(utils.Stopped):
            flags = ("--stage", "vqvae", "--epochs", "3", *PICTURES)
            train_tiny(path, *flags, data=oasis_dir)
    run = utils.Run.open(path)
    logs = run.logs_path / "vqvae"
    assert steps(read_logs(logs / "train"), "loss") == [1]
    with utils.tf.summary.create_file_writer(str(logs / "train")).as_default():
        for step in (2, 3):
            utils.tf.summary.scalar("loss", 0.0, step)
    assert steps(read_logs(logs / "train"), "loss") == [1, 2, 3]
    cut_short(logs / "train")
    train.main(["--resume", str(path)])
    check_curves(run)
    pictures = read_logs(logs / "pictures")
    assert steps(pictures, "reconstructions") == [1, 3]
    assert not list(run.logs_path.rglob("*.tmp-*"))


def cut_short(folder):
    """Leave half an event at the end, as a killed process may."""
    path = max(folder.iterdir())
    data = path.read_bytes()
    path.write_bytes(data + data[-40:-5])


def test_only_events_after_the_epoch_are_dropped(tmp_path):
    with utils.tf.summary.create_file_writer(str(tmp_path)).as_default():
        for step in (1, 2, 3):
            utils.tf.summary.scalar("loss", 1 / step, step)
    utils.drop_events(tmp_path, 2)
    reader = read_logs(tmp_path)
    assert steps(reader, "loss") == [1, 2]
    assert numbers(reader, "loss") == [1, 0.5]
    utils.drop_events(tmp_path, 0)
    assert not tmp_path.exists()


def test_another_prior_replaces_the_logs_of_the_one_before(
    tiny_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "finish", lambda *_: None)
    run = copy_run(tiny_run, tmp_path)
    flags = "--stage prior --prior-epochs 1 --picture-epochs 0".split()
    before = (run.logs_path / "vqvae" / "train").iterdir()
    before = {path: path.read_bytes() for path in before}
    train_tiny(run.path, *flags)
    stage = run.logs_path / "prior"
    assert steps(read_logs(stage / "train"), "loss") == [1]
    assert not (stage / "pictures").exists()
    for path, data in before.items():
        assert path.read_bytes() == data


# The program itself


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def tensorboard(folder):
    """TensorBoard over a folder; its address."""
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder]
    command += ["--port", str(port), "--host", "127.0.0.1"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def fetch(address, wanted, seconds=60):
    """Text at an address, once it contains `wanted`."""
    due = time.monotonic() + seconds
    text = ""
    while time.monotonic() < due:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            with urllib.request.urlopen(address, timeout=5) as answer:
                text = answer.read().decode()
            if wanted in text:
                return text
        time.sleep(0.2)
    raise AssertionError(f"{address}: {wanted} not in {text!r}")


BROWSER = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
    --disable-background-networking --disable-component-update --disable-sync
    --window-size=1600,1200 --virtual-time-budget=20000 --dump-dom""".split()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
def test_tensorboard_shows_the_run_in_a_browser(tiny_run, tmp_path):
    with tensorboard(tiny_run.path / "logs") as address:
        plugins = f"{address}/data/plugin"
        runs = fetch(f"{plugins}/projector/runs", "vqvae/pictures")
        assert json.loads(runs) == ["vqvae/pictures"]
        fetch(f"{plugins}/scalars/tags", "prior/validate")
        page = subprocess.run(
            [
                shutil.which("chromium"),
                *BROWSER,
                f"--user-data-dir={tmp_path}",
                f"{address}/#timeseries",
            ],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "HOME": str(tmp_path)},
        ).stdout
    text = re.sub(r"<[^>]*>", " ", page)
    for tag in ("ssim", "bits_per_code", "learning_rate", "codebook_usage"):
        assert tag in text, text[-2000:]
    for part in ("vqvae/train", "vqvae/validate", "prior/pictures"):
        assert part in page
