"""What train.py leaves behind, how it resumes, and what it refuses."""

import functools
import json
import os
import random
import resource
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import dataset
import modules
import predict
import train
import utils
from tests import conftest, kill_and_resume
from tests.conftest import SIZE, SLICES, copy_run, files, train_tiny

FILES = {
    *("config.json", "split.csv", "vqvae.keras", "indices.npz", "history.csv"),
    *("evaluation.json", "MODEL_CARD.md", "report.html", "figures", "logs"),
}
run_main = functools.partial(conftest.exit_code, train.main)
refused = functools.partial(conftest.refused, train.main)
oasis_flags = conftest.oasis_flags


def start(flags):
    """A `Job` that is about to begin; its lock is free."""
    settings = utils.parse_training([str(flag) for flag in flags])
    strategy = tf.distribute.get_strategy()
    job = train.start(settings, strategy, utils.StopSignals())
    job.run.unlock()
    return job


# === What a run leaves behind ===


def test_a_run_holds_every_file_and_no_other(tiny_run, levels_run):
    assert {*os.listdir(tiny_run.path)} == FILES | {"prior.keras"}
    more = {"prior_bottom.keras", "prior_top.keras", "texture.keras"}
    assert {*os.listdir(levels_run.path)} == FILES | more


def test_config_tells_how_to_repeat_the_run(tiny_run, oasis_dir):
    document = json.loads(tiny_run.config_path.read_text())
    expected = {
        "format": utils.FORMAT,
        "image_size": [SIZE, SIZE],
        "crop": None,
        "latent_grids": [[SIZE // 4, SIZE // 4]],
        "simulated": False,
        "labels": {},
        "slice_range": [0, SLICES - 1],
        "dataset": "oasis",
        "data_dir": str(oasis_dir),
        "sampling": {"temperature": [1.0], "top_p": [1.0]},
        "intensity": {"rule": dataset.INTENSITY_RULE, "low": 0.0, "high": 1.0},
    }
    assert expected.items() <= document.items()
    # Also those that decide the scores.
    packages = {"tensorflow", "scikit-image", "scikit-learn", "scipy", "pillow"}
    assert packages <= set(document["versions"])
    assert set(document["settings"]) == set(utils.flat(utils.Settings()))


def test_indices_are_the_encoded_images_of_each_split(tiny_run):
    indices = utils.read_indices(tiny_run)
    counts = [len(indices[f"{name}_1"]) for name in dataset.SPLITS]
    assert len(indices) == 3 and counts == [4 * SLICES, SLICES, SLICES]
    images = dataset.load_run(tiny_run)["test"].read()
    vqvae = modules.load_model(tiny_run.vqvae_path)
    np.testing.assert_array_equal(vqvae.encode(images)[0], indices["test_1"])


def test_history_has_a_row_an_epoch_of_both_stages(tiny_run):
    history = utils.read_history(tiny_run)
    assert list(history["stage"]) == ["vqvae"] * 2 + ["prior"] * 2
    assert list(history["epoch"]) == [1, 2, 1, 2]
    assert list(history["step"]) == [4, 8, 2, 4]
    assert list(history["images"]) == [16, 32, 16, 32]
    told = ["loss", "reconstruction_loss", "ssim"], ["loss", "bits_per_code"]
    for rows, names in zip((history[:2], history[2:]), told, strict=True):
        names += [f"val_{name}" for name in names]
        assert np.isfinite(rows[names]).all(axis=None)
        assert rows["loss"].is_monotonic_decreasing
        assert rows["seconds"].is_monotonic_increasing


def assert_the_best_is_kept(run):
    history, indices = utils.read_history(run), utils.read_indices(run)
    vqvae, priors = modules.load_models(run)
    table = utils.read_split_table(run).query("split == 'validate'")
    grids = [indices[f"validate_{k}"] for k in range(1, vqvae.levels + 1)]
    for stage, prior in zip(run.prior_names, priors, strict=True):
        inputs = modules.prior_inputs(prior, grids, table)
        nats = -prior.log_prob(**inputs).numpy().mean()
        epochs = history.loc[history["stage"] == stage, "val_bits_per_code"]
        assert nats / np.log(2) == pytest.approx(epochs.min(), rel=1e-5)


def test_a_prior_that_gets_worse(vqvae_run, tmp_path, monkeypatch, plain):
    """It stops after --patience epochs, and its best weights are kept."""
    schedules = tf.keras.optimizers.schedules
    monkeypatch.setattr(schedules, "CosineDecay", lambda *_, **__: -0.01)
    run = copy_run(vqvae_run, tmp_path)
    flags = "--stage prior --prior-epochs 9 --patience 2 "
    flags += "--prior-ema-momentum 0.5 --run-dir"
    train.main([*flags.split(), str(run.path)])
    bits = utils.read_history(run)["val_bits_per_code"].dropna()
    assert len(bits) == 3 and bits.iloc[0] < bits.iloc[-1]
    assert_the_best_is_kept(run)


def test_two_levels_have_a_prior_each(levels_run):
    assert_the_best_is_kept(levels_run)  # the average of its weights
    _, priors = modules.load_models(levels_run)
    for prior, attends in zip(priors, (False, True), strict=True):
        assert isinstance(prior, modules.PixelSNAIL) and prior.slice_condition
        assert prior.labels == ("AD", "NC") and prior.attention == attends


def test_pictures_and_curves_from_the_first_epoch_on(tiny_run, levels_run):
    shown = tags_shown(tiny_run.logs_path)
    for tag in ("reconstructions", "indices", "codes_1", "samples"):
        assert shown.count(tag) == 2  # once an epoch
    assert {"epoch_ssim", "epoch_bits_per_code"} <= set(shown)
    # Samples are shown once all priors are there.
    logs = levels_run.logs_path
    assert "samples" not in tags_shown(logs / "prior_bottom")
    assert "samples" in tags_shown(logs / "prior_top")


def tags_shown(folder):
    """Names of what TensorBoard shows of a folder."""
    events = (
        tf.compat.v1.Event.FromString(record.numpy())
        for path in folder.rglob("*.tfevents.*")
        for record in tf.data.TFRecordDataset(str(path))
    )
    return [value.tag for event in events for value in event.summary.value]


# === Data ===


def test_smoke_connects_everything_on_simulated_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--smoke"])
    (run,) = map(utils.Run.open, (tmp_path / "runs").glob("quickstart-*"))
    assert {*os.listdir(tmp_path)} == {"data", "runs"}
    assert run.info["simulated"] and run.info["image_size"] == [128, 112]
    rows = utils.read_split_table(run)
    assert set(rows["split"].value_counts()) <= set(range(4, 9))
    rows = rows[rows["split"] == "train"]
    assert rows["subject"].nunique() == 2 and np.ptp(rows["position"]) > 0.5


# The others in test_readme.py.
@pytest.mark.parametrize("data", ["adni", "hipmri"])
def test_recipes_train_on_simulated_data(data, tmp_path, monkeypatch, plain):
    monkeypatch.chdir(tmp_path)
    recipe = f"{data}-vqvae-pixelcnn"
    train.main(["--recipe", recipe, "--smoke", "--image-size", "64x32"])
    run = utils.Run.newest(tmp_path / "runs")
    asked = utils.RECIPES[recipe].settings
    assert run.info["simulated"] and run.info["dataset"] == asked.data.dataset
    assert run.info["image_size"] == [64, 32]
    stages = list(utils.read_history(run)["stage"])
    texture = ["texture"] * (asked.training.texture_epochs > 0)
    assert stages == ["vqvae", *run.prior_names, *texture]


def test_data_without_labels_need_no_flag(oasis_dir, tmp_path, capsys):
    """The settings of the quickstart, other data."""
    data = ["--dataset", "oasis", "--data-dir", oasis_dir]
    job = start([*data, "--run-dir", tmp_path / "run"])
    assert "no image has a class label" in capsys.readouterr().out
    assert utils.Run.open(job.run.path).info["labels"] == {}
    assert job.settings.prior.condition == "slice"
    asked = [*data, "--run-dir", tmp_path / "asked", "--condition", "label"]
    error = refused(3, capsys, *asked)
    assert f"{oasis_dir}: no image has a class label" in error
    assert not (tmp_path / "asked").exists()


def test_models_see_the_box_that_holds_content(oasis_dir, tmp_path, capsys):
    data = shutil.copytree(oasis_dir, tmp_path / "margin")
    for path in sorted(data.glob("*/case_*.png")):
        image = np.array(Image.open(path))
        image[:9] = image[-8:] = image[:, :7] = image[:, -4:] = 0
        if path.name == "case_006_slice_2.nii.png":
            image[0, 5] = 255
        Image.fromarray(image).save(path)
    job = start(oasis_flags(data, "--run-dir", tmp_path / "run"))
    assert job.run.info["crop"] == [8, 5, SIZE - 16, SIZE - 8]
    assert job.run.info["image_size"] == [SIZE, SIZE]
    printed = capsys.readouterr().out
    assert "1 images of test reach beyond it: " in printed
    assert "case_006_slice_2.nii.png" in printed
    assert train.new_vqvae(job).latent_grids == [(4, 6)]
    for flag, crop in ("--flips", [8, 4, 16, 24]), ("--no-crop", None):
        job = start(oasis_flags(data, flag, "--run-dir", tmp_path / flag))
        assert job.run.info["crop"] == crop


def test_a_single_subject_has_none_to_validate_on(oasis_dir, tmp_path, plain):
    data = shutil.copytree(oasis_dir, tmp_path / "data")
    shutil.rmtree(data / "keras_png_slices_validate")
    for path in list(data.glob("keras_png_slices_train/case_00[234]*")):
        path.unlink()
    run = train_tiny(tmp_path / "run", data=data)
    assert set(utils.read_indices(run)) == {"train_1", "test_1"}
    assert not any(utils.read_history(run).columns.str.startswith("val_"))


# === Stages ===


def test_stages_give_the_same_bits(tiny_run, vqvae_run, tmp_path, monkeypatch):
    """From another folder, whatever the rounds are; old scores are gone."""
    copy_run(vqvae_run, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "prior_pictures", lambda *_: None)
    flags = ("--stage", "prior", "--no-evaluate", "--round-steps", "1")
    staged = train_tiny("copy", *flags)
    for name in ("vqvae.keras", "prior.keras"):
        pair = (modules.load_model(r.path / name) for r in (tiny_run, staged))
        np.testing.assert_equal(*(model.get_weights() for model in pair))
    assert not {"evaluation.json", "MODEL_CARD.md"} & files(staged.path).keys()
    one, other = files(tiny_run.path), files(vqvae_run.path)
    for name in ("split.csv", "indices.npz", "figures/reconstructions.png"):
        assert one[name] == other[name]


def test_flags_reach_what_is_trained(tiny_run, tmp_path, monkeypatch):
    run, fits = copy_run(tiny_run, tmp_path), []
    flags = {"augment": 0.5, "accumulation_steps": 2, "jit": True}
    flags |= {"recompute": True, "prior_dropout": 0.0}
    flags["prior_ema_momentum"] = 0.99  # in a training of 4 steps
    run.settings = utils.replace(run.settings, **flags)
    monkeypatch.setattr(train.Fit, "run", lambda fit, *_: fits.append(fit))
    monkeypatch.setattr(dataset, "augment", lambda *given: given[3:5])
    job = train.Job(run, tf.distribute.get_strategy(), None)
    job.begin({"vqvae", "prior"})
    train.train_vqvae(job)
    indices = utils.read_indices(run)
    train.train_prior(job, modules.load_model(run.vqvae_path), indices, 1)
    assert fits[0].transform(None, 0, [0]) == (0.5, 0.0)
    for fit in fits:
        assert fit.model.accumulation_steps == 2 and fit.model.jit_compile
    assert fits[1].model.recompute
    assert fits[1].model.optimizer.ema_momentum == pytest.approx(4 / 9)


def test_a_prior_needs_no_image(tiny_run, tmp_path, oasis_dir, capsys, plain):
    """But for the evaluation, which is left out, and augmentation."""
    run = copy_run(tiny_run, tmp_path)
    run.update(data_dir=str(tmp_path / "gone"))
    before = files(run.path)
    flags = "--prior gated --prior-channels 4 --condition none --seed 1".split()
    stage = ["--stage", "prior", "--run-dir", str(run.path)]
    train.main([*stage, *flags])
    assert "predict.py evaluate" in capsys.readouterr().err
    after = files(run.path)
    names = [path.name for path in run.figures_path.iterdir()]
    assert names == ["reconstructions.png"]
    assert len([*run.logs_path.glob("prior/*/*")]) == 2
    for name in ("vqvae.keras", "split.csv", "indices.npz"):
        assert after[name] == before[name]
    (prior,) = modules.load_models(run)[1]
    assert type(prior).__name__ == "GatedPixelCNN" and prior.channels == 4
    assert refused(3, capsys, *stage, "--prior-augment", 1)
    assert refused(3, capsys, *stage, "--data-dir", tmp_path / "gone")
    run.indices_path.unlink()  # made again
    # The images were moved, and that is said.
    train.main([*stage, "--prior-augment", "1", "--data-dir", str(oasis_dir)])
    assert utils.Run.open(run.path).info["data_dir"] == str(oasis_dir)


def test_stage_texture(levels_run, tmp_path, monkeypatch, capsys, plain):
    """Of a run with and without one; all else stays as it is."""
    run = copy_run(levels_run, tmp_path)
    stage, before = ["--stage", "texture", "--run-dir", str(run.path)], {}
    for name in ("vqvae.keras", "prior_top.keras", "texture.keras"):
        before[name] = (run.path / name).read_bytes()
    error = refused(2, capsys, *stage, "--prior-epochs", 9)
    assert "--prior-epochs: the run was trained with 2, found 9" in error
    assert "--top-p: the run" in refused(2, capsys, *stage, "--top-p", 0.5)
    monkeypatch.setattr("sys.argv", ["train.py", *stage])
    train.main([*stage, "--texture-epochs", "2"])
    command = utils.Run.open(run.path).info["command"]
    assert command.endswith(f"; train.py {' '.join(stage)}")
    after = {name: (run.path / name).read_bytes() for name in before}
    assert [n for n in before if after[n] != before[n]] == ["texture.keras"]
    rows = utils.read_history(run).query("stage == 'texture'")
    assert list(rows["epoch"]) == [1, 2]
    assert utils.Run.open(run.path).info["sampling"] == run.info["sampling"]
    vqvae, _ = modules.load_models(run)
    assert modules.load_texture(run, vqvae)
    vqvae.quantizer_1.codebook.assign_add([[1.0] * 4] * 16)
    with pytest.raises(utils.RunError, match="on another codebook"):
        modules.load_texture(run, vqvae)


def test_images_of_a_prior_are_varied_and_encoded_anew(levels_run, monkeypatch):
    """By their row numbers, less from epoch to epoch."""
    seen, rows = [], [0, 5]

    def augment(images, seed, rows, strength, flips, epoch, mirror_axis):
        seen.append((float(strength), float(flips), rows, int(epoch)))
        return images

    monkeypatch.setattr(dataset, "augment", augment)
    job = train.Job(levels_run, tf.distribute.get_strategy(), None)
    grids, images = utils.read_indices(levels_run), job.images["train"]
    inputs = {"indices": 0, "upper": 0, "label": 7}
    batch = {"images": images.read(rows), "inputs": inputs}
    encode = train.encoding(job, 1)
    for epoch in range(2):
        inputs = encode(batch, tf.constant(epoch), rows)
        found = inputs["indices"], inputs["upper"][0]
        for level, indices in enumerate(found, start=1):
            assert np.array_equal(indices, grids[f"train_{level}"][rows])
        assert inputs["label"] == 7
    assert seen == [(0.5, 0.5, rows, 0), (0.25, 0.0, rows, 1)]


def test_sampling_is_chosen_for_each_level(tiny_run, tmp_path, monkeypatch):
    def sample_distance(trained, train, real):
        assert set(real.table["split"]) == {"validate"}
        return lambda *sampling: sum(
            abs(x.temperature - 0.7 - 0.1 * k) + abs(x.top_p - 0.95)
            for k, x in enumerate(sampling)
        )

    monkeypatch.setattr(train, "sample_distance", sample_distance)
    monkeypatch.setattr(train, "LEAST_TO_CHOOSE", SLICES)
    run = copy_run(tiny_run, tmp_path)
    images, two_levels = dataset.load_run(run), SimpleNamespace(levels=2)
    for given, temperatures, top_p in (
        ({}, [0.7, 0.8], 0.95),
        ({"temperature": 0.9}, [0.9, 0.9], 0.95),
        ({"temperature": 0.7, "top_p": 0.5}, [0.7, 0.7], 0.5),
        ({"smoke": True}, [1.0, 1.0], 1.0),
    ):
        free = {"temperature": None, "top_p": None, "smoke": False}
        run.settings = utils.replace(run.settings, **{**free, **given})
        run.info["sampling"] = None
        job = train.Job(run, None, None)
        job.begin({"sampling"})
        train.choose_sampling(job, two_levels, [None] * 2, images)
        found = utils.Run.open(run.path).info["sampling"]
        assert found == {"temperature": temperatures, "top_p": [top_p] * 2}


def test_sampling_is_judged_as_the_evaluation_does(tiny_run):
    trained = predict.Trained.of(tiny_run, *modules.load_models(tiny_run))
    people = dataset.load_run(tiny_run)["train"]
    sets, like = predict.real_sets(trained, people, people, 256)
    sets["generated"] = trained.generate_like(like["test"].table)[0]
    owners = like["train"].subjects, like["test"].subjects
    frechet = utils.compare_sets(sets, "hog", *owners)["frechet"]
    found = train.sample_distance(trained, people, people)(*trained.sampling)
    assert found == pytest.approx(frechet["generated_vs_test"]) and found > 0.1


def test_no_prior_over_a_collapsed_codebook(vqvae_run, tmp_path, capsys, plain):
    run = copy_run(vqvae_run, tmp_path)
    indices = utils.read_indices(run)
    indices["train_1"][:] = 3
    np.savez(run.indices_path, **indices)
    argv = ["--stage", "prior", "--run-dir", str(run.path)]
    assert run_main(*argv) == 4
    for line in capsys.readouterr().err.splitlines():
        assert "level 1 has collapsed: 1 of 16 code vectors in use" in line
    assert "--force" in line and not run.has_priors
    book = SimpleNamespace(num_embeddings=512, levels=1)
    codes = ({"train_1": np.arange(n)} for n in (10, 11))  # 2 % is between
    few, enough = (train.collapsed_levels(book, x) for x in codes)
    assert few and not enough
    train.main([*argv, "--force"])
    assert run.has_priors


# === Resuming ===

# All that has a state: dropout, averages, restarts, augmentation, two levels.
FLAGS = (
    "--levels 2 --prior gated --prior-dropout 0.2 --condition-dropout 0.3 "
    "--prior-ema-momentum 0.9 --flips --augment 1 --prior-augment 1 "
    "--texture-epochs 2"
).split()


def stop_after(batches, monkeypatch):
    """Send this process SIGTERM after so many batches."""
    left = [batches]
    on_train_batch_end = modules.RoundCheckpoint.on_train_batch_end

    def count(self, batch, logs=None):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        on_train_batch_end(self, batch, logs)

    monkeypatch.setattr(modules.RoundCheckpoint, "on_train_batch_end", count)


def test_stopped_again_and_again(oasis_dir, tmp_path, monkeypatch, plain):
    """In the middle of a round, whose work is done again: the same bits."""
    monkeypatch.setattr(modules.RoundCheckpoint, "NEAR", -1.0)
    alone = train_tiny(tmp_path / "alone", *FLAGS, data=oasis_dir)
    stopped, codes = tmp_path / "stopped", []
    arguments = [*oasis_flags(oasis_dir, *FLAGS), "--run-dir", stopped]
    while set(codes) <= {143}:
        with monkeypatch.context() as patch:
            stop_after(11, patch)
            codes.append(run_main(*arguments))
        arguments = ["--resume", stopped]
    assert codes[-1] == 0 and len(codes) > 2
    assert kill_and_resume.differences(alone.path, stopped) == []
    assert not (stopped / "checkpoint").exists()
    assert "training" not in utils.Run.open(stopped).info


def test_killed_in_a_save(tiny_run, oasis_dir, tmp_path, monkeypatch):
    """The short form of what the script does with 20 kills."""
    monkeypatch.setattr(kill_and_resume, "IN_TRAINING", 0)
    path = tmp_path / "run"
    flags = oasis_flags(oasis_dir, "--no-evaluate", "--run-dir", path)
    process = kill_and_resume.start("train.py", *flags)
    assert kill_and_resume.kill(process, path, random, in_save=True)
    assert kill_and_resume.is_writing(process, path)
    monkeypatch.setattr(train, "vqvae_pictures", lambda *_: None)
    monkeypatch.setattr(train, "prior_pictures", lambda *_: None)
    train.main(["--resume", str(path)])
    assert not kill_and_resume.is_writing(process, path)
    assert kill_and_resume.differences(tiny_run.path, path) == []


@pytest.fixture(scope="module")
def half_done(oasis_dir, tmp_path_factory):
    """A run stopped after three rounds of its VQ-VAE. Copy it."""
    path = tmp_path_factory.mktemp("half") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(utils.Stopped):
            train_tiny(path, "--round-steps", "1", data=oasis_dir)
    return utils.Run.open(path)


def test_damaged_checkpoints_are_refused(half_done, tmp_path, capsys):
    run = copy_run(half_done, tmp_path)
    state, _ = utils.read_checkpoint(run.checkpoint_path / "vqvae")
    assert state["round"] == 3 and not run.lock_path.exists()
    (path,) = run.checkpoint_path.iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    assert run_main("--resume", run.path) == 4
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and path.name in error
    assert not list(run.path.glob("*.keras"))


def test_a_complete_run_is_trained_on(tiny_run, tmp_path, capsys, plain):
    """More epochs: of the prior alone, or of the VQ-VAE, then a new prior."""
    run = copy_run(tiny_run, tmp_path)
    resume = ["--resume", str(run.path)]
    before = files(run.path)
    train.main([*resume, "--prior-epochs", "3"])
    after = files(run.path)
    assert after["vqvae.keras"] == before["vqvae.keras"]
    assert after["prior.keras"] != before["prior.keras"]
    history = utils.read_history(run)
    assert list(history["epoch"]) == [1, 2, 1, 2, 3]
    bits = history["val_bits_per_code"]
    assert bits.iloc[-1] < bits.iloc[2]  # it went on from where it was
    train.main([*resume, "--epochs", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("vqvae: epoch 3/3, loss")]
    assert all("left" in line for line in lines if ": epoch " in line)
    history = utils.read_history(run)
    assert list(history["stage"]) == ["vqvae"] * 3 + ["prior"] * 3
    assert list(history["epoch"]) == [1, 2, 3] * 2
    assert history["loss"].iloc[2] < history["loss"].iloc[1]
    modules.load_models(run)  # belong to each other
    assert utils.Run.open(run.path).settings.training.epochs == 3


def test_training_on_resumes(vqvae_run, tmp_path, monkeypatch, capsys, plain):
    paths = [tmp_path / name for name in ("one", "two")]
    for path in paths:
        shutil.copytree(vqvae_run.path, path)
    train.main(["--resume", str(paths[0]), "--epochs", "4"])
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        assert run_main("--resume", paths[1], "--epochs", 4) == 143
    assert capsys.readouterr().err.endswith("stopped by SIGTERM\n")
    assert not (paths[1] / "run.lock").exists()
    train.main(["--resume", str(paths[1])])
    assert kill_and_resume.differences(*paths) == []


def begin_again(run, *parts):
    """Leave a complete run as if it had been stopped before some parts."""
    done = [x for x in train.all_parts(run) if x not in {*parts, "sampling"}]
    run.begin(done, epochs_before={})


def test_more_epochs_keep_what_is_under_way(levels_run, tmp_path):
    run = copy_run(levels_run, tmp_path)
    begin_again(run, "prior_top")
    checkpoint = run.checkpoint_path / "prior_top.npz"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    earlier = run.settings
    run.settings = utils.replace(earlier, texture_epochs=3)
    job = train.Job(run, tf.distribute.get_strategy(), None)
    train.plan_resume(job, earlier)
    found = utils.Run.open(run.path).info["training"]
    assert found["done"] == ["vqvae", "indices", "prior_bottom"]
    assert found["epochs_before"] == {"texture": 1} and checkpoint.exists()
    flags = ["--stage", "prior", "--run-dir", str(run.path)]
    assert utils.parse_training(flags).training.texture_epochs == 3


def test_what_a_resume_makes(tiny_run, tmp_path):
    """Also a first texture; not what has had more epochs, level by level."""
    for k, (before, now, done) in enumerate(
        (
            ({}, {"texture_epochs": 1}, "vqvae indices prior sampling"),
            ({}, {"texture_epochs": 1, "prior_epochs": 3}, "vqvae indices"),
            ({"prior_epochs": 1}, {}, None),
        )
    ):
        folder = shutil.copytree(tiny_run.path, tmp_path / str(k))
        run = utils.Run.open(folder)
        earlier = utils.replace(run.settings, **before)
        run.settings = utils.replace(run.settings, **now)
        job = train.Job(run, tf.distribute.get_strategy(), None)
        if done:
            train.plan_resume(job, earlier)
            assert run.info["training"]["done"] == done.split()
        else:
            with pytest.raises(utils.FlagError, match="is complete"):
                train.plan_resume(job, earlier)
    run.prior_paths[0].unlink()
    run.settings = utils.replace(run.settings, prior_epochs=9)
    with pytest.raises(utils.RunError, match="prior.keras: missing"):
        train.plan_resume(job, earlier)


def test_a_stopped_run_gets_other_epochs(half_done, tmp_path, capsys, plain):
    run = copy_run(half_done, tmp_path)
    resume = ["--resume", str(run.path)]
    train.main([*resume, "--epochs", "3", "--prior-epochs", "1"])
    epochs = utils.read_history(run).groupby("stage")["epoch"].max()
    assert dict(epochs) == {"vqvae": 3, "prior": 1}
    assert utils.Run.open(run.path).settings.training.epochs == 3
    assert "has had 3, found 2" in refused(2, capsys, *resume, "--epochs", 2)


# === Full disks, numbers that are not finite ===


def test_a_full_disk_leaves_what_was_there(half_done, tmp_path, capsys, plain):
    """A limit on the size of files stands in for a full disk."""
    run = copy_run(half_done, tmp_path)
    before = files(run.checkpoint_path)
    largest = max(map(len, before.values()))
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 5000, hard))
    try:
        assert "/vqvae.npz: " in refused(6, capsys, "--resume", run.path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert files(run.checkpoint_path) == before
    assert not list(run.path.rglob("*.tmp-*"))
    assert not list(run.path.glob("*.keras"))


def test_explosions(oasis_dir, tiny_run, tmp_path, monkeypatch, capsys, plain):
    """An exploding training is not saved."""
    schedules = tf.keras.optimizers.schedules
    monkeypatch.setattr(schedules, "CosineDecay", lambda *_, **__: 1e30)
    flags = oasis_flags(oasis_dir, "--run-dir", tmp_path / "run")
    error = refused(5, capsys, *flags)
    for text in ("vqvae: not finite in step 1", "parameter_norm", "--learning"):
        assert text in error
    assert not list(tmp_path.rglob("*.keras"))
    run = copy_run(tiny_run, tmp_path)
    before = files(run.path)
    error = refused(5, capsys, "--stage", "prior", "--run-dir", run.path)
    assert "--prior-learning-rate" in error
    after = files(run.path)
    for name in ("vqvae.keras", "prior.keras"):
        assert after[name] == before[name]
    # Until another is complete, the settings are those of the models.
    assert utils.Run.open(run.path).settings == run.settings


# === Refused starts: one line, and no trace ===


def test_unfit_data_leave_no_folder(oasis_dir, tmp_path, capsys):
    root = shutil.copytree(oasis_dir, tmp_path / "data")
    path = root / "keras_png_slices_train" / "case_002_slice_1.nii.png"
    path.write_bytes(path.read_bytes()[:-20])
    run_dir = tmp_path / "runs" / "new"
    for existing in (False, True):
        assert run_main(*oasis_flags(root, "--run-dir", run_dir)) == 3
        assert path.name in capsys.readouterr().err
        assert list(tmp_path.glob("runs/*")) == [run_dir] * existing
        assert not list(tmp_path.rglob("runs/*/*"))
        run_dir.mkdir(parents=True, exist_ok=True)
    job = start(oasis_flags(root, "--skip-bad", "--run-dir", run_dir))
    assert path.name in job.run.rejected_path.read_text()


def test_a_run_is_untouched(tiny_run, levels_run, oasis_dir, tmp_path, capsys):
    """Which flags contradict a run is tested in test_utils.py."""

    def check(code, text, *flags):
        before = files(tmp_path)
        assert text in refused(code, capsys, *flags)
        assert files(tmp_path) == before

    (tmp_path / "two").mkdir()
    two = copy_run(levels_run, tmp_path / "two").path
    level = ["--prior-level", 1, "--condition", "slice"]
    check(2, "prior_top", "--stage", "prior", "--run-dir", two, *level)
    begin_again(utils.Run.open(two), "prior_top")
    texture = ["--stage", "texture", "--texture-epochs", 1, "--run-dir", two]
    check(4, "stopped before prior_top, sampling; finish it", *texture)
    run = copy_run(tiny_run, tmp_path)
    stage = ["--stage", "prior", "--run-dir", run.path]
    new = oasis_flags(oasis_dir, "--run-dir", run.path)
    check(4, "the folder is not empty", *new)
    check(2, "complete", "--resume", run.path)
    check(2, "found 9", "--resume", run.path, "--channels", 9)
    check(2, "--smoke: the run was trained with false", *stage, "--smoke")
    check(2, "--resume: expected text, found nothing", "--resume=")
    run.update(data_dir=str(tmp_path / "gone"))
    check(3, "are gone", "--resume", run.path, "--epochs", 3)
    run.lock()
    check(4, "in use by another process", "--resume", run.path, "--epochs", 3)
    run.unlock()
    table = run.split_path.read_bytes()
    run.split_path.unlink()  # a shared model: never trained anew from scratch
    check(4, "split.csv: missing", "--resume", run.path, "--epochs", 3)
    run.split_path.write_bytes(table)
    run.vqvae_path.write_bytes(run.vqvae_path.read_bytes()[:1000])
    check(4, str(run.vqvae_path), *stage)
    run.vqvae_path.unlink()
    check(4, "vqvae.keras: no such model", *stage)
