"""Tests of predict.py: every verb on tiny runs, evaluation, report, export."""

import base64
import functools
import html
import json
import math
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from PIL import Image

import dataset
import modules
import predict
import utils
from tests import conftest
from tests.conftest import SIZE, SLICES, blobs, copy_run, files

FIGURES = {
    *("reconstructions", "failures", "indices", "codebook", "history"),
    *("samples", "failures_samples", "memorization"),
}
refused = functools.partial(conftest.refused, predict.main)
pytestmark = pytest.mark.usefixtures("load_once")


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of `tiny_run` to be changed at will."""
    return copy_run(tiny_run, tmp_path)


@pytest.fixture
def levels(levels_run, tmp_path):
    """A copy of `levels_run`: two levels, labels and slice positions."""
    return copy_run(levels_run, tmp_path)


@pytest.fixture(params=["tiny_run", "levels_run", "vqvae_run"])
def any_run(request):
    """Runs of one level, of two with labels, and without prior."""
    return request.getfixturevalue(request.param)


def call(*argv):
    predict.main([str(part) for part in argv])


def figures(folder):
    """Names of the figures in a folder, each a PNG of some size."""
    found = list(Path(folder).glob("*.png"))
    for path in found:
        with Image.open(path) as image:
            assert image.format == "PNG" and min(image.size) > 100, path
    return {path.stem for path in found}


def write_image(folder, pixels, name="image.png"):
    Image.fromarray(pixels).save(folder / name)
    return folder / name


def trained(run, **flags):
    return predict.Trained.load(run, predict.Generate(**flags))


def samples_of(run, pattern="*.png"):
    """{name: pixels} of the generated images."""
    folder = predict.sample_folder(trained(run))
    found = sorted(folder.glob(pattern))
    return {path.name: utils.read_png(path) for path in found}


@pytest.fixture
def draws(monkeypatch):
    """What `modules.generate` is called with, in small chunks."""
    seen, generate = [], modules.generate

    def spy(vqvae, priors, n, seed, **options):
        seen.append(types.SimpleNamespace(n=n, seed=seed, **options))
        return generate(vqvae, priors, n, seed, **options)

    monkeypatch.setattr(modules, "generate", spy)
    monkeypatch.setattr(predict, "CHUNK", 16)
    return seen


def test_bare_command(levels_run, tmp_path, monkeypatch, capsys):
    """It takes the newest run, writes figures and report, says what matters."""
    shutil.copytree(levels_run.path, tmp_path / "runs" / "a")
    shutil.rmtree(tmp_path / "runs" / "a" / "figures")
    monkeypatch.chdir(tmp_path)
    call()
    assert figures("runs/a/figures") == {"reconstructions", "samples"}
    assert len(samples_of(utils.Run.open("runs/a"))) == 64
    text = capsys.readouterr().out
    assert "SSIM" in text and "predict.py generate runs/a" in text
    assert text.count("bits per code") == 0  # only `evaluate` shows the table


def test_bare_command_on_a_bare_run(vqvae_run, tmp_path, capsys):
    """A run folder from a colleague."""
    run, known = copy_run(vqvae_run, tmp_path), utils.read_evaluation(vqvae_run)
    run.update(data_dir=str(tmp_path / "gone"))
    run.evaluation_path.unlink()
    call(run.path)
    text = capsys.readouterr().out
    assert "no prior" in text and "no reconstructions without" in text
    assert "Not evaluated yet" in text_of(run)
    assert "Not evaluated yet" in card_of(run)
    call("inspect", run.path, "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["evaluation"] == {} and facts["data"] == known["data"]
    assert facts["codebook"][0]["grid"] == known["codebook"][0]["grid"]


def test_the_shipped_model(tiny_run, tmp_path, monkeypatch, capsys):
    """Used where there is no run, not written to; it holds no images."""
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "resources"
    mine.mkdir()
    for name in ("templates", "metrics.csv"):
        (mine / name).symlink_to(utils.RESOURCES / name)
    monkeypatch.setattr(utils, "RESOURCES", mine)
    assert "no trained run here" in refused(4, capsys)
    home = mine / "pretrained" / "brains"
    home.mkdir(parents=True)
    for name in "vqvae.keras prior.keras config.json evaluation.json".split():
        shutil.copy(tiny_run.path / name, home)
    utils.Run.open(home).update(data_dir="/gone")
    before, output = files(home), tmp_path / "runs" / "results-brains"
    for line in ([], ["generate", "-n", "2", "--seed", "3"], ["inspect"]):
        call(*line)
    assert files(home) == before
    text = capsys.readouterr().out
    assert "no reconstructions without the images of the run" in text
    assert "SSIM" in text and str(output.relative_to(tmp_path)) in text
    assert figures(output / "figures") == {"samples"}
    assert len(list(output.rglob("seed*.png"))) == 64 + 2
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "SSIM, unseen subjects" in page and 'class="samples"' in page
    image = next(output.rglob("seed0*.png"))
    call("reconstruct", "--images", image)  # one may bring images
    assert "reconstructed_images" in figures(output / "figures")
    assert "the shipped model comes" in refused(4, capsys, "reconstruct")


def rows(capsys):
    """{file name: SSIM} that a reconstruction printed."""
    text = capsys.readouterr().out
    found = re.findall(r"^SSIM (\S+) +(.*)$", text, re.MULTILINE)
    return {name: float(value) for value, name in found}


def test_reconstruct_a_split_and_images(run, tmp_path, capsys):
    """Also a blank one."""
    shutil.rmtree(run.figures_path)
    call("reconstruct", run.path, "--split", "train", "--count", "5")
    table = utils.read_split_table(run)
    paths = list(table["path"][table["split"] == "train"])
    expected = [Path(paths[k]).name for k in utils.choose_rows(len(paths), 5)]
    assert list(rows(capsys)) == expected
    assert figures(run.figures_path) == {"reconstructions_train"}
    pixels = np.stack([blobs(7), np.zeros((SIZE, SIZE), "uint8")])
    names = ("image.png", "blank.png")
    paths = map(write_image, [tmp_path] * 2, pixels, names)
    call("reconstruct", run.path, "--images", *paths)
    images = np.float32(pixels[..., None] / 255)
    decoded = modules.load_models(run)[0].reconstruct(images)
    values = tf.image.ssim(images, decoded, max_val=1.0).numpy()
    assert list(rows(capsys).values()) == pytest.approx(values, abs=1e-2)
    assert "reconstructed_images" in figures(run.figures_path)


def test_results_go_where_output_says(run, tmp_path, monkeypatch, capsys):
    """Of a run that one may only read."""
    before, output = files(run.path), tmp_path / "mine"
    image = write_image(tmp_path, blobs(1))
    lines = "show", "generate -n 2", "reconstruct", "evaluate"
    verbs = [*map(str.split, lines), ["complete", image]]
    for verb, *words in [*verbs, ["anomaly", "--count", "2"]]:
        call(verb, run.path, *words, "--output", output)
    assert files(run.path) == before
    expected = {"completions.npz", "anomaly.csv", "evaluation.json"}
    expected |= {"report.html", "MODEL_CARD.md", "figures", "samples"}
    assert {path.name for path in output.iterdir()} == expected
    assert figures(output / "figures") >= FIGURES
    monkeypatch.setattr(predict.os, "access", lambda *_: False)
    assert "--output" in refused(6, capsys, "show", run.path)


def test_options_reach_the_sampler_and_the_names(run, draws):
    call("generate", run.path, "-n", "3", "--top-k", "1")
    flags = "--temperature 0.5 --top-p 0.9 --slice-position 0.25".split()
    call("generate", run.path, "-n", "18", "--seed", "7", *flags)
    greedy, *chunks = draws
    assert greedy.sampling == [modules.Sampling(top_k=1)]
    positions = modules.slice_positions(3)
    np.testing.assert_array_equal(greedy.slice_position, positions)
    assert [(c.n, c.seed, c.first) for c in chunks] == [(16, 7, 0), (2, 7, 16)]
    for chunk in chunks:
        assert chunk.sampling == [modules.Sampling(0.5, top_p=0.9)]
        assert list(chunk.slice_position) == [0.25] * chunk.n
    names = set(samples_of(run))
    assert "seed0_top-k1_000000.png" in names and len(names) == 3 + 18
    long = "seed7_temperature0.5_top-p0.9_slice-position0.25_000017.png"
    assert long in names


def test_the_sampling_chosen_for_the_run_is_the_default(levels, draws):
    """Files are named by how they were sampled."""
    levels.update(sampling={"temperature": [0.7, 0.9], "top_p": [1.0, 0.95]})
    cases = {
        "": "temperature0.7-0.9_top-p1-0.95",
        "--temperature 0.10000001": "temperature0.10000001",
        "--temperature 1 --label AD --guidance 2": "guidance2_labelAD",
    }
    for flags in cases:
        call("generate", levels.path, "-n", "2", *flags.split())
    chosen, cold, guided = draws
    sampling = [modules.Sampling(0.7), modules.Sampling(0.9, top_p=0.95)]
    assert chosen.sampling == sampling
    assert cold.sampling == [modules.Sampling(0.10000001)] * 2
    assert guided.sampling == [modules.Sampling(guidance=2.0)] * 2
    assert set(guided.label) == {"AD"}
    names = {f"seed0_{name}_000001.png" for name in cases.values()}
    assert set(samples_of(levels, "*_000001.png")) == names


def test_parts_together_equal_one_request(levels_run, tmp_path, draws):
    flags = ["--format", "npz", "-n"]
    whole = copy_run(levels_run, tmp_path / "whole")
    call("generate", whole.path, *flags, "48")
    parts = copy_run(levels_run, tmp_path / "parts")
    call("generate", parts.path, *flags, "32", "--first", "16")
    call("generate", parts.path, *flags, "16")
    assert [draw.first for draw in draws] == [0, 16, 32, 16, 32, 0]
    found, expected = (files(run.path / "samples") for run in (parts, whole))
    assert found == expected and len(found) == 3
    assert {"samples", "samples_000016"} <= figures(parts.figures_path)


def test_npz_holds_images_and_what_they_are_of(levels, draws):
    call("generate", levels.path, "-n", "21")
    images = np.stack(list(samples_of(levels).values()))
    call("generate", levels.path, "-n", "21", "--format", "npz")
    paths = sorted(predict.sample_folder(trained(levels)).glob("*.npz"))
    assert [p.stem[-6:] for p in paths] == ["000000", "000016"]
    parts = [dict(np.load(path)) for path in paths]
    chunk = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    assert chunk["images"].dtype == np.uint8
    np.testing.assert_array_equal(chunk["images"], images)
    assert list(chunk["number"]) == list(range(21))
    assert list(chunk["label"]) == ["AD"] * 8 + ["NC"] * 8 + ["AD"] * 5
    positions = modules.slice_positions(21)
    np.testing.assert_array_equal(chunk["slice_position"], positions)
    indices = [chunk["indices_1"], chunk["indices_2"]]
    vqvae, _ = modules.load_models(levels)
    models, decoded = [vqvae, trained(levels).texture], vqvae.decode_indices
    decoded = modules.with_texture(*models, decoded(indices), 0, np.arange(21))
    np.testing.assert_allclose(images / 255, decoded[..., 0], atol=0.51 / 255)


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_a_killed_request_goes_on(kind, run, draws, capsys):
    """What another machine is writing is left alone."""
    flags = ["generate", run.path, "-n", "40", "--format", kind]
    call(*flags)
    folder = predict.sample_folder(trained(run))
    expected = files(folder)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    gone, cut = (folder / f"seed0_{k:06d}.{kind}" for k in (16, 32))
    mark = f"tmp-{utils._HOST}-{process.pid}"
    gone.rename(gone.with_name(f"{gone.name}.{mark}{gone.suffix}"))
    cut.write_bytes(cut.read_bytes()[:-40])
    other = folder / f"seed0_000000.png.tmp-elsewhere-{process.pid}.png"
    other.write_bytes(b"")
    draws.clear()
    call(*flags)
    assert "24 images sampled, 16 there" in capsys.readouterr().out
    assert [draw.first for draw in draws] == [16, 32]
    other.unlink()
    assert files(folder) == expected


def test_what_is_of_another_prior_is_not_taken_for_its_own(run):
    state, path = trained(run), run.prior_paths[0]
    before = predict.sample_folder(state)
    path.write_bytes(path.read_bytes() + b"0")
    assert predict.sample_folder(state) != before
    assert predict.known_scores(state, run) == {}


def test_figures_show_the_box_of_the_model():
    """Whole frames if there is content outside."""
    vqvae = types.SimpleNamespace(box=(1, 2, 3, 4))
    state = predict.Trained(None, None, vqvae, [], 0, [])
    images = np.zeros((2, 8, 8))
    images[:, 1:4, 2:6] = 1
    few, many = state.cut(images, np.stack([images] * 5, axis=1))
    assert few.shape == (2, 3, 4) and few.all() and many.shape == (2, 5, 3, 4)
    images[1, 7] = 0.5
    assert state.cut(images)[0].shape == (2, 8, 8)


def test_conditions_that_a_run_does_not_know():
    run = types.SimpleNamespace(path="runs/one")
    for labels, position, flags, part in (
        ((), True, {"guidance": 2.0}, "$"),
        (("AD",), False, {"guidance": 2.0}, "$"),
        ((), False, {"guidance": 0.0}, "--guidance: "),
        (("AD",), False, {"slice_position": 0.0}, "--slice-position: "),
        (("AD", "NC"), True, {"label": "X"}, r"--label: .*\(AD, NC\), found"),
        ((), True, {"label": "AD"}, r"--label: .*\(none: "),
    ):
        prior = types.SimpleNamespace(labels=labels, slice_condition=position)
        state, text = types.SimpleNamespace(run=run, priors=[prior]), ""
        try:
            predict.check_conditions(state, predict.Generate(**flags))
        except utils.FlagError as error:
            text = str(error)
        assert re.match(part, text)


def completions(run, *argv):
    call("complete", run.path, *argv)
    with np.load(run.path / "completions.npz") as file:
        return dict(file)


def test_nothing_of_the_removed_part_leaks(run, tmp_path):
    whole, other = blobs(98), blobs(99)
    other[:16] = whole[:16]
    found, expected = (
        completions(run, write_image(tmp_path, pixels), "-n", "2")
        for pixels in (whole, other)
    )
    for name, values in found.items():
        np.testing.assert_array_equal(values, expected[name])


def test_indices_that_are_kept(run):
    test = dataset.load_run(run, needed=("test",))["test"].take([0, 1])
    paths = [test.root / path for path in test.table["path"]]
    found = completions(run, *paths, "-n", "6", "--seed", "3")
    known, drawn = found["known_1"], found["indices_1"]
    assert drawn.shape == (2, 6, *known.shape[1:])
    assert np.any(known >= 0) and np.any(known < 0)
    for one, grids in zip(known, drawn, strict=True):
        assert np.all((grids == one) | (one < 0))
        assert not np.all(grids == grids[0])
    assert known.shape[1] * 0.3 < (known >= 0).any(axis=2).sum(axis=1).min()
    assert "completions" in figures(run.figures_path)


def test_what_is_unlikely_is_found_and_restored(monkeypatch):
    """A prior that expects index 0, whatever came before: 0.1 bits."""
    logits = np.array([5.0] + [0.0] * 7)
    nats = logits - np.log(np.exp(logits).sum())
    plain = {"labels": (), "slice_condition": False, "upper_grids": ()}
    prior = types.SimpleNamespace(**plain)
    prior.log_prob = lambda indices: tf.constant(nats[indices], tf.float32)
    vqvae = {"levels": 1, "num_embeddings": 8, "latent_grids": [(16, 16)]}
    vqvae = types.SimpleNamespace(**vqvae)

    def encode(images):  # the grey level of a square of 4x4 pixels
        return [np.int32(np.round(np.asarray(images)[:, ::4, ::4, 0] * 7))]

    def generate(vqvae, priors, n, seed, known, **options):
        grid = np.where(known[0] < 0, 0, known[0])
        return np.kron(grid, np.ones((4, 4))) / 7, [grid], np.zeros(n)

    monkeypatch.setattr(modules, "generate", generate)
    vqvae.encode = encode
    state = predict.Trained(None, None, vqvae, [prior], 0, [])
    images = np.zeros((3, 64, 64, 1), "float32")
    images[1, 16:32, 40:56] = 1
    images[2, 8, 8] = 0.05  # too thin, too faint
    table = pd.DataFrame({"position": [np.nan] * 3})
    limits, unknown = None, {"label": ""}
    for k in np.s_[::2], np.s_[:]:
        some = types.SimpleNamespace(read=lambda k=k: images[k], table=table[k])
        found = predict.find_anomalies(state, some, unknown, 3, limits)
        limits = found["limits"]
    bits = found["bits"][0]
    bit, odd = -nats[:2] / math.log(2)
    assert bits[1, 4:8, 10:14] == pytest.approx(odd, rel=1e-4)
    bits[1, 4:8, 10:14] = bit
    assert bits == pytest.approx(bit, rel=1e-3)
    residual = found["residual"]
    assert residual.shape == (3, 64, 64) and residual[1, 24, 48] > 0.8
    assert residual[1, :, :24].max() == 0 and not residual[[0, 2]].any()
    assert not found["restored"][1].any()
    healthy = {"residual": np.reshape([0.4, 0.1, 1.3, 0.2], (4, 1, 1))}
    table = predict.anomaly_table(table.assign(path="x"), found, healthy)
    assert list(table["percentile"]) == [0, 75, 0]
    assert table["bits_1"][0] == pytest.approx(256 * bit, rel=1e-3)


def test_anomaly_does_not_use_labels(levels, tmp_path, draws, capsys):
    """Slice positions are used only if all are known."""
    call("anomaly", levels.path, "--count", "2", "--restorations", "1")
    assert all(set(one.label) == {None} for one in draws)
    assert not any(np.isnan(one.slice_position).any() for one in draws)
    table = pd.read_csv(levels.path / "anomaly.csv")
    expected = "path bits_1 bits_2 surprisal_1 surprisal_2 score percentile"
    assert list(table) == expected.split() and len(table) == 2
    assert table["percentile"].between(0, 100).all()
    assert "anomaly" in figures(levels.figures_path)
    assert capsys.readouterr().out.count("percentile") == 2
    draws.clear()
    image = write_image(tmp_path, blobs(5))
    call("anomaly", levels.path, image, "--restorations", "1")
    assert all(np.isnan(one.slice_position).all() for one in draws)


def test_evaluate_finds_what_training_found(run):
    before = utils.read_evaluation(run)
    shutil.rmtree(run.figures_path)
    run.evaluation_path.unlink()
    call("evaluate", run.path)
    after = utils.read_evaluation(run)
    assert set(after.pop("speed")) == set(before.pop("speed"))
    assert after == before and figures(run.figures_path) == FIGURES
    [prior] = after["prior"]
    cells, bits = SIZE**2 / 16, prior["bits_per_code"]
    assert set(bits) == {"train", "validate", "test"}
    assert prior["bits_per_image"] == pytest.approx(bits["test"] * cells)
    assert prior["bits_per_foreground_code"] > 0
    assert prior["bits_per_foreground_pixel"] >= bits["test"] / 16
    assert after["generation"]["frechet"] is None  # too few images
    assert re.search("frechet  +-\n", predict.summary_table(after))


def test_evaluate_data_that_were_moved(run, oasis_dir, tmp_path, capsys):
    before = utils.read_evaluation(run)
    moved = tmp_path / "moved"
    shutil.copytree(oasis_dir, moved / oasis_dir.name)
    run.update(data_dir=str(tmp_path / "gone"))
    call("evaluate", run.path, "--data-dir", moved)
    after = utils.read_evaluation(run)
    assert after["reconstruction"] == before["reconstruction"]
    assert not list(run.path.glob("evaluation-*.json"))
    for verb in ("reconstruct", "anomaly"):
        call(verb, run.path, "--data-dir", moved, "--count", "2")
    gone = next((moved / oasis_dir.name).rglob("case_001_slice_0*"))
    gone.unlink()  # what tells the data of the run
    call("evaluate", run.path, "--data-dir", moved)
    assert "warning: 15 of 23 images" in capsys.readouterr().err


def test_evaluate_other_data(run, adni_dir, tmp_path, capsys):
    before = files(run.path)
    data = shutil.copytree(adni_dir, tmp_path / "other")
    bad = next((data / "test").rglob("*.jpeg"))
    bad.write_bytes(bad.read_bytes()[:100])
    flags = ["evaluate", run.path, "--data-dir", data]
    assert bad.name in refused(3, capsys, *flags)
    assert "--seed: nothing is" in refused(2, capsys, *flags, "--seed", "1")
    call(*flags, "--skip-bad")
    after = files(run.path)
    assert before.items() <= after.items()
    written = {"reconstructions", "failures", "indices", "codebook"}
    assert figures(run.figures_path / "other") == written
    evaluation = json.loads(after["evaluation-other.json"])
    about = evaluation["data"]
    assert about["test"] == {"subjects": 6, "images": 6 * SLICES - 1}
    assert about["images_seen_in_training"] == 0 and "train" not in about
    assert about["data_dir"] == str(data) and not about["simulated"]
    assert set(evaluation) == {"data", "reconstruction", "codebook", "speed"}
    rejected = pd.read_csv(run.figures_path / "other" / "rejected.csv")
    assert [Path(path).name for path in rejected["path"]] == [bad.name]
    bad.unlink()  # one of the same name keeps the scores of this one
    call(*flags[:-1], shutil.copytree(data, tmp_path / "b" / "other"))
    assert files(run.path).keys() - after >= {"evaluation-b-other.json"}
    assert files(run.path).items() >= after.items()


def test_weights_that_cannot_be_had_are_one_line(run, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise Exception("URL fetch failure on https://x: None -- refused")

    monkeypatch.setattr(tf.keras.applications, "InceptionV3", refuse)
    before = run.evaluation_path.read_bytes()
    flags = ["evaluate", run.path, "--features", "inception"]
    error = refused(6, capsys, *flags)
    assert "refused" in error and "--features hog" in error
    assert run.evaluation_path.read_bytes() == before


def test_models_replaced_meanwhile_are_not_scored(run, monkeypatch, capsys):
    def replace(trained):
        return run.vqvae_path.write_bytes(b"") or {}

    before = run.evaluation_path.read_bytes()
    monkeypatch.setattr(predict, "measure_speed", replace)
    assert "try again" in refused(4, capsys, "evaluate", run.path)
    assert run.evaluation_path.read_bytes() == before


# Samples against real images


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """`dataset.Slices` of simulated people; fresh ones act as generated."""
    folder = tmp_path_factory.mktemp("people") / "data"
    dataset.simulate(folder, "oasis", 16, 48)
    settings = utils.DataSettings(dataset="oasis", data_dir=str(folder))
    slices = dataset.load(settings)
    order = sorted(set(slices.subjects))
    groups = {"train": order[:6], "test": order[6:11], "fresh": order[11:]}
    return {
        name: slices.take(np.flatnonzero(np.isin(slices.subjects, kept)))
        for name, kept in groups.items()
    }


def evaluate_generator(people, folder, images, count, flips=False):
    """What is found of a generator that returns `images`; how it was called."""
    asked = {}

    def generate(vqvae, priors, n, seed, **options):
        asked.update(options, n=n, seed=seed)
        return images[:n], [], np.zeros(n)

    settings = utils.replace(utils.Settings(), flips=flips)
    run = utils.Run(folder, settings, {})
    vqvae = {"box": (0, 0, 48, 40), "levels": 1, "reconstruct": tf.constant}
    vqvae = types.SimpleNamespace(**vqvae)  # that loses nothing
    prior = types.SimpleNamespace(labels=(), slice_condition=True)
    sampling = [modules.Sampling(0.9)]
    state = predict.Trained(run, run, vqvae, [prior], 7, sampling)
    options = predict.Evaluate(num_samples=count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules, "generate", generate)
        found = predict.evaluate_samples(state, people, options)
    json.dumps(found, allow_nan=False)
    return found, asked


def test_fresh_subjects_score_as_the_floor(people, tmp_path):
    images = people["fresh"].read()[..., 0]
    found, asked = evaluate_generator(people, tmp_path, images, 64)
    part, copies = found["generation"], found["memorization"]
    assert (part["n"], part["seed"]) == (64, 7)
    assert part["sampling"]["temperature"] == [0.9]
    assert "8 principal components" in part["features"]
    frechet = part["frechet"]
    floor = frechet["generated_vs_test"] / frechet["train_vs_test"]
    assert frechet["ratio"] == pytest.approx(floor) and frechet["ratio"] < 2
    low, high = frechet["ratio_ci95"]
    assert low < frechet["ratio"] < high
    stages = part["by_stage"]
    assert set(stages) == {"rebuilt", "all_drawn"}
    assert stages["all_drawn"] == frechet["ratio"]
    assert stages["rebuilt"] == pytest.approx(1)  # a decoder without loss
    assert copies["alarm"] is False and copies["test_images"] == 160
    assert part["c2st"]["train_vs_test"]["mean"] < 0.95
    # The conditions asked for were those of test images.
    assert asked["sampling"] == [modules.Sampling(0.9)]
    positions = np.float32(people["test"].table["position"])
    assert set(asked["slice_position"]) <= set(positions)
    for _, key, text in predict.summary_rows(found):
        assert len(predict.explain(key)) > 10, key
        assert (", floor " in text) == (key in part["floor"])
    assert figures(tmp_path / "figures") == {"failures_samples", "memorization"}


def test_noise_is_told_from_real_and_copies_are_found(people, tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.random((64, *people["train"].size)).astype("float32")
    found, _ = evaluate_generator(people, tmp_path, noise, 64)
    part = found["generation"]
    assert part["c2st"]["generated_vs_test"]["mean"] > 0.9
    about = predict.verdict(found)
    assert about["ratio"] > 1.5 and about["limit"].startswith("the prior")
    cheat = people["train"].read(np.arange(40))[..., 0]
    cheat[:20] = cheat[:20, :, ::-1]
    found, _ = evaluate_generator(people, tmp_path, cheat, 40, flips=True)
    assert found["memorization"]["alarm"] is True
    assert found["memorization"]["copies"] == 40
    assert found["generation"]["ssim_to_nearest_train"]["mean"] > 0.99


def test_the_floor_is_of_other_subjects_in_like_condition(people):
    test, train = people["test"].table, people["train"].table
    odd = [frame["subject"].str[-1].astype(int) % 2 for frame in (test, train)]
    test = test.assign(label=np.where(odd[0], "NC", "AD"))
    train = train.assign(label=np.where(odd[1], "NC", "AD"))
    prior = types.SimpleNamespace(labels=("AD", "NC"), slice_condition=True)
    rows, peers = predict.match_images(test, train, prior, 60, seed=1)
    assert len(set(rows)) == len(set(peers)) == 60
    a, b = test.iloc[rows], train.iloc[peers]
    assert list(a["label"]) == list(b["label"])
    apart = np.abs(a["position"].to_numpy() - b["position"].to_numpy())
    assert apart.max() < 0.1
    prior = types.SimpleNamespace(labels=(), slice_condition=False)
    rows, peers = predict.match_images(test, train, prior, 1000, seed=1)
    assert len(rows) == len(set(peers)) == 160


def test_by_stage_of_two_levels(levels, draws, monkeypatch):
    """Real upper indices with sampled lower ones are a stage of their own."""
    monkeypatch.setattr(utils, "PCA_SHARE", 1)  # enough of few images
    monkeypatch.setattr(utils, "c2st", lambda *args: None)
    flags = ["--num-samples", "6", "--temperature", "0.5"]
    call("evaluate", levels.path, *flags)
    found = utils.read_evaluation(levels)["generation"]
    stages = found["by_stage"]
    assert set(stages) == set(predict.STAGES) and min(stages.values()) > 0
    assert found["n"] == 6 and found["sampling"]["temperature"] == [0.5, 0.5]
    sampled = {level.temperature for draw in draws for level in draw.sampling}
    assert sampled == {0.5}
    [forced] = [draw for draw in draws if getattr(draw, "known", None)]
    lower, upper = forced.known
    assert (lower == -1).all() and (upper >= 0).all()


def test_verdict_names_the_stage_where_the_ratio_rises():
    for ratios, word in {
        (4.0, None, 5.0): "the VQ-VAE",
        (1.2, None, 5.0): "the prior, of an upper",
        (1.2, 3.0, 4.0): "the prior of the lowest",
        (1.2, 1.3, 4.0): "the prior, of an upper",
    }.items():
        stages = dict(zip(predict.STAGES, ratios, strict=True))
        found = predict.verdict({"generation": {"by_stage": stages}})
        assert found["ratio"] is None and found["limit"].startswith(word)
    for ssim, bits, text in ((0.2, 6, "the VQ-VAE"), (0.9, 8, "the prior of")):
        prior = {"level": 2, "bits_per_code": {"train": bits}}
        found = {"reconstruction": {"ssim_foreground": {"mean": ssim}}}
        found["prior"] = [prior | {"unigram_bits": 7}]
        assert predict.untrained(found).startswith(text)


def test_labels_of_simulated_brains_are_told_by_ventricles(monkeypatch):
    positions = [0.6, 0.7, 0.6, 0.1]  # the last plane has no ventricles
    table = {"label": ["AD", "NC", "AD", "AD"], "position": positions}
    test = types.SimpleNamespace(table=pd.DataFrame(table))
    test.read = lambda: np.arange(4)

    def generate(vqvae, priors, n, seed, label, slice_position, **options):
        assert 0.5 <= min(slice_position) and max(slice_position) <= 0.8
        return np.full(n, {"AD": 1.0, "MCI": 0.0}[label]), [], None

    def ventricles(images, positions):
        return np.where(np.asarray(positions) < 0.5, np.nan, images)

    monkeypatch.setattr(modules, "generate", generate)
    monkeypatch.setattr(dataset, "ventricle_areas", ventricles)
    settings = utils.replace(utils.Settings(), num_samples=3)
    run = utils.Run("run", settings, {"simulated": True})
    prior = types.SimpleNamespace(labels=("AD", "MCI"), slice_condition=True)
    state = predict.Trained(run, run, None, [prior], 5, [])
    found = pd.DataFrame(predict.evaluate_labels(state, test)).to_dict("list")
    areas = {"real": 1.0, "generated": 1.0}, {"real": None, "generated": 0.0}
    assert found["test_images"] == [3, 0] and found["images_drawn"] == [3, 3]
    assert found["ventricle_area"] == [*areas]
    run.info["simulated"] = False
    entries = predict.evaluate_labels(state, test)
    assert entries[0] == {"label": "AD", "test_images": 3}


# Report and model card


def text_of(run):
    """The text of the report, without style and tags."""
    source = run.report_path.read_text(encoding="utf-8")
    body = source.split("</style>")[1]
    return " ".join(html.unescape(re.sub("<[^>]+>", " ", body)).split())


def card_of(run):
    return run.card_path.read_text(encoding="utf-8")


IMAGE = r'<img class="(\w+)" src="data:image/png;base64,(.*)" alt="(.{20,})">'


def test_report_holds_every_figure_samples_first(any_run):
    """It needs nothing from elsewhere."""
    source = any_run.report_path.read_text(encoding="utf-8")
    names, shown, alts = zip(*re.findall(IMAGE, source), strict=True)
    expected = {p.stem: p for p in any_run.figures_path.glob("*.png")}
    for name, text in zip(names, shown, strict=True):
        assert base64.b64decode(text) == expected.pop(name).read_bytes()
    assert not expected and len(set(alts)) == len(alts)
    first = ["samples"] if any_run.has_priors else []
    first += ["reconstructions", "failures"]
    assert list(names[: len(first)]) == first
    rest = re.sub(IMAGE, "", source)
    assert not re.search("src=|href=|url\\(|@import|<script|<link", rest)


def test_report_and_card_show_every_score_and_setting(any_run):
    text, card = text_of(any_run), card_of(any_run)
    evaluation = utils.read_evaluation(any_run)
    scores = predict.summary_rows(evaluation)
    assert len(scores) > 15
    for section, key, value in scores:
        name, meaning = key.replace("_", " "), predict.explain(key)
        assert len(meaning) > 10, (section, key)
        assert " ".join(f"{name} {value} {meaning}".split()) in text
        if section not in ("data", "memorization", "speed"):
            assert f"| {section} | {name} | {value} |" in card
    for name, value in utils.flat(any_run.settings).items():
        assert " ".join(f"{name} {utils.typed(value)}".split()) in text
    for name in ("train", "validate", "test"):
        part = evaluation["data"][name]
        assert f"| {name} | {part['subjects']} | {part['images']} |" in card
    heads = "Model, Use, Data, Evaluation, Memorization, How to use".split(", ")
    assert re.findall("^## (.*)$", card, re.MULTILINE) == heads
    assert re.match("---\n(.+\n)+---\n\n# Model card", card)
    assert "**real**" in card and "**Licence.**" in card
    assert ("predict.py generate" in card) == any_run.has_priors
    assert "{{" not in card and "{%" not in card and "\n\n\n" not in card


def test_report_and_card_warn(run):
    """Of simulated data, of copies; and escape what they are told."""
    assert "applies to real scans" not in text_of(run)
    assert "unknown too few unseen slices to tell" in text_of(run)
    assert "Alarm:" not in text_of(run) and "ALARM" not in card_of(run)
    run.info["command"] = "train.py --run-dir '<script>alert(1)</script>'"
    evaluation = utils.read_evaluation(run)
    evaluation["data"]["simulated"] = True
    dark = {"mean": None, "ci95": [None, None]}
    evaluation["reconstruction"]["ssim_foreground"] = dark
    evaluation["memorization"] |= {"copies": 2, "alarm": True}
    evaluation["generation"] |= {
        "frechet": {"ratio": 6.0, "ratio_ci95": [5.0, 7.0]},
        "by_stage": {"rebuilt": 1.5, "all_drawn": 6.0},
    }
    utils.write_json(run.evaluation_path, evaluation)
    predict.write_report(trained(run))
    text = text_of(run)
    assert "applies to real scans" in text and "Alarm:" in text
    assert "ALARM" in card_of(run) and "Licence" not in card_of(run)
    assert run.info["command"] in text and "- in the foreground" in text
    assert "ratio 6.00 : told from real slices at a glance" in text
    assert "What limits them: the prior" in text
    source = run.report_path.read_text(encoding="utf-8")
    assert "<script" not in source
    bars = re.findall(r'<span style="width: (.*)%">', source)
    assert bars == ["25.0", "100.0"]


def test_summary_is_five_lines(levels, capsys):
    """A score that is missing, as of images that are dark, is a dash."""
    nothing = {"mean": None, "ci95": [None, None]}
    evaluation = utils.read_evaluation(levels) | {"prior": []}
    evaluation["reconstruction"]["ssim_foreground"] = nothing
    evaluation["generation"] |= {
        "frechet": {"ratio": 1.25, "ratio_ci95": [1.1, 1.4]},
        "by_stage": {"rebuilt": 1.1, "all_drawn": 1.25},
    }
    predict.print_summary(levels, evaluation)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert str(levels.report_path) in lines[0] and "SSIM" in lines[1]
    assert "(- in the foreground)" in lines[1]
    assert "1.25: about as close" in lines[2] and "the prior, of" in lines[3]
    assert f"python predict.py generate {levels.path}" in lines[4]
    text = predict.summary_table(evaluation | {"memorization": None})
    assert re.search("ssim foreground  +-\n", text)
    assert predict.summary_table({}) == "nothing evaluated yet"


def test_inspect_as_json(any_run, capsys):
    before = files(any_run.path)
    call("inspect", any_run.path, "--json")
    facts = json.loads(capsys.readouterr().out)
    evaluation = utils.read_evaluation(any_run)
    assert facts["evaluation"] == evaluation
    assert facts["data"] == evaluation["data"] and facts["complete"] is True
    assert facts["settings"]["num_embeddings"] == 16
    wanted = [{**level, "embedding_dim": 4} for level in evaluation["codebook"]]
    assert facts["codebook"] == wanted
    vqvae, priors = modules.load_models(any_run)
    models = [vqvae, *priors]
    if texture := modules.load_texture(any_run, vqvae):
        models.append(texture)
    for model, found in zip(models, facts["models"].values(), strict=True):
        assert found["weights"] == model.count_params()
        assert sum(x["weights"] for x in found["layers"]) == found["weights"]
    assert files(any_run.path) == before
    call("inspect", any_run.path)
    page = capsys.readouterr().out
    assert "level 1     grid 8x8, K=16, D=4, " in page and "ssim fore" in page


ELSEWHERE = """
import importlib.util, sys
import tensorflow as tf

for name in ("modules", "utils", "dataset", "predict"):
    assert importlib.util.find_spec(name) is None, name
model = tf.saved_model.load(sys.argv[1])
drawn = model.generate(3, 7, 0.9, "NC")
encoded = model.signatures["encode"](images=drawn["images"][..., None])
decoded = model.signatures["decode"](**encoded)
print(drawn["images"].shape, *sorted(encoded), decoded["images"].shape)
"""


def test_export_opens_without_our_code(levels_run, tmp_path):
    dest = tmp_path / "new" / "folder"
    call("export", levels_run.path, dest)
    about = json.loads((dest / "export.json").read_text(encoding="utf-8"))
    assert about["signatures"] == ["encode", "decode", "generate"]
    assert set(about["labels"]) == {"AD", "NC"}
    assert about["latent_grids"] == [[8, 8], [4, 4]]
    argv = [sys.executable, "-I", "-c", ELSEWHERE, str(dest)]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    shapes = "(3, 32, 32) indices_1 indices_2 (3, 32, 32, 1)\n"
    assert done.stdout == shapes, done.stderr


def test_export_is_all_or_nothing(vqvae_run, tmp_path, monkeypatch, capsys):
    dest = tmp_path / "dest"
    dest.mkdir()
    call("export", vqvae_run.path, dest)  # an empty folder is fine
    assert "signatures encode, decode:" in capsys.readouterr().out
    assert not json.loads((dest / "export.json").read_text())["labels"]
    before = files(dest)
    error = refused(4, capsys, "export", vqvae_run.path, dest)
    assert "an empty folder" in error and files(dest) == before

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils, "write_json", fail)
    with pytest.raises(OSError):
        call("export", vqvae_run.path, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["dest"]


def test_bad_flags(run, levels_run, capsys):
    for argv, part in {
        "generate --temperature 0": "--temperature: expected a number in (0",
        "generate -n 0": "--number: expected a whole number in [1",
        "reconstruct --datadir x": "did you mean --data-dir?",
        "inspect --data-dir x": "--data-dir: unknown argument; see --help",
        "complete": "RUN: missing",
        f"complete {run.path}": "IMAGE: missing",
        "export RUN": "DEST: missing",
        "paint": "VERB: expected one of",
        f"evaluate {run.path} --skip-bad": "another data set in --data-dir",
    }.items():
        assert part in refused(2, capsys, *argv.split())
    with pytest.raises(SystemExit, match="0"):
        call("show", "--help")
    assert "write the report" in capsys.readouterr().out
    error = refused(4, capsys, "complete", levels_run.path, "x.png")
    assert "complete needs a run of one level, found 2" in error


def test_runs_that_are_none_or_have_no_prior(vqvae_run, capsys):
    for argv in (["runs/none"], ["inspect", "runs/none"]):
        assert "runs/none: no such run folder" in refused(4, capsys, *argv)
    assert "it comes before images" in refused(4, capsys, "anomaly", __file__)
    for argv in (["generate"], ["anomaly"], ["complete", "x.png"]):
        error = refused(4, capsys, argv[0], vqvae_run.path, *argv[1:])
        assert "this run has no prior" in error and "--stage prior" in error


def test_damaged_and_unfit_files_of_a_run(levels, capsys):
    """Also a prior of another level."""
    pairs = ("split.csv", "reconstruct"), ("evaluation.json", "inspect")
    for name, verb in pairs:
        path, whole = levels.path / name, (levels.path / name).read_bytes()
        for damaged in (b"", b"path\n1", whole[: whole[:-1].rfind(b"\n")]):
            path.write_bytes(damaged)
            assert f"{path}: damaged" in refused(4, capsys, verb, levels.path)
        path.write_bytes(whole)
    path, upper = levels.prior_paths
    shutil.copy(upper, path)
    for verb in ("generate", "evaluate", "inspect"):
        error = refused(4, capsys, verb, levels.path)
        assert f"{path}: trained on another codebook" in error
    call("reconstruct", levels.path)  # needs no prior


def test_images_gone_or_unfit(run, tmp_path, capsys):
    before = files(run.path)
    names = ("gone.png", "bad.png", "x")
    gone, bad, empty = map(tmp_path.joinpath, names)
    for verb in (["reconstruct", run.path, "--images"], ["anomaly", run.path]):
        assert "gone.png" in refused(3, capsys, *verb, gone)
    bad.write_bytes(b"not an image")
    assert "bad.png" in refused(3, capsys, "complete", run.path, bad)
    empty.mkdir()
    error = refused(3, capsys, "evaluate", run.path, "--data-dir", empty)
    assert str(empty) in error and files(run.path) == before
    text = run.split_path.read_text()
    run.split_path.write_text(text.replace("validate", "train"))
    error = refused(3, capsys, "reconstruct", run.path, "--split", "validate")
    assert "validate: no images in" in error


def test_an_error_in_the_data_pipeline_is_one_line(run, monkeypatch, capsys):
    """TensorFlow passes it on in words."""

    def lose(slices, rows):
        slices.file.unlink(missing_ok=True)

    monkeypatch.setattr(dataset.Slices, "read_bytes", lose)
    error = refused(3, capsys, "evaluate", run.path)
    assert error.endswith("directory; expected decoded images\n")
