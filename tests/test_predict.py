"""Tests of predict.py: every verb on a tiny run, and what it refuses."""

import json
import os
import re
import shutil
import subprocess
import sys
import types
import weakref
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from PIL import Image

import modules
import predict
import utils
from tests.conftest import SIZE, SLICES, copy_run
from tests.test_train import FIGURES, SAMPLES, check_figures, files


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of `tiny_run` to be changed at will."""
    return copy_run(tiny_run, tmp_path)


def call(*argv):
    predict.main([str(part) for part in argv])


def refused(code, capsys, *argv):
    """Run the script; return its one line on stderr."""
    with pytest.raises(SystemExit) as caught:
        utils.run_main(predict.main, [str(part) for part in argv])
    assert caught.value.code == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def samples_of(run, pattern="*"):
    """Return {name: pixels} of the generated images."""
    found = {}
    for path in sorted(predict.sample_folder(run).glob(pattern)):
        with Image.open(path) as image:
            assert (image.format, image.mode) == ("PNG", "L")
            found[path.name] = np.asarray(image)
    return found


def rows(text):
    """Return {file name: SSIM} that a reconstruction printed."""
    found = re.findall(r"^SSIM (\S+) +(.*)$", text, re.MULTILINE)
    return {name: float(value) for value, name in found}


# Without a verb


def test_bare_command_takes_the_newest_run_and_draws_both_figures(
    tiny_run, vqvae_run, tmp_path, monkeypatch, capsys
):
    for name, source in (("a-new", tiny_run), ("b-old", vqvae_run)):
        shutil.copytree(source.path, tmp_path / "runs" / name)
        shutil.rmtree(tmp_path / "runs" / name / "figures")
    os.utime(tmp_path / "runs" / "b-old" / "vqvae.keras", (1, 1))
    monkeypatch.chdir(tmp_path)
    predict.main([])
    check_figures(Path("runs/a-new/figures"), ["reconstructions", "samples"])
    assert not Path("runs/b-old/figures").exists()
    assert len(samples_of(utils.Run.open("runs/a-new"), "*.png")) == 64
    text = capsys.readouterr().out
    assert len(rows(text)) == SLICES
    assert "bits per code" in text and "ssim foreground" in text

    shutil.rmtree("runs/a-new")
    predict.main([])
    check_figures(Path("runs/b-old/figures"), ["reconstructions"])
    assert "no prior in this run" in capsys.readouterr().out


def test_bare_command_without_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    error = refused(4, capsys)
    assert "runs: no trained run here" in error and "train.py" in error
    assert not list(tmp_path.iterdir())


# Reconstruct


def test_reconstruct_a_split(run, capsys):
    shutil.rmtree(run.figures_path)
    call("reconstruct", run.path, "--split", "train", "--count", "5")
    found = rows(capsys.readouterr().out)
    names = [Path(p).name for p in utils.read_splits(run)["train"]["path"]]
    assert list(found) == [names[k] for k in utils.spread(16, 5)]
    check_figures(run.figures_path, ["reconstructions"])


def test_reconstruct_images(run, adni_dir, tmp_path, capsys):
    paths = sorted((adni_dir / "test").rglob("*.jpeg"))[:2]
    call("reconstruct", run.path, "--images", *paths)
    found = rows(capsys.readouterr().out)
    vqvae = utils.load_model(run.vqvae_path)
    for path in paths:
        data = path.read_bytes()
        image = tf.io.decode_jpeg(
            data, channels=1, dct_method="INTEGER_ACCURATE"
        )
        image = tf.cast(image, tf.float32)[None] / 255
        value = tf.image.ssim(image, vqvae.reconstruct(image), max_val=1.0)
        assert found[path.name] == pytest.approx(value.numpy()[0], abs=1e-4)
    check_figures(
        run.figures_path, FIGURES | SAMPLES | {"reconstructed_images"}
    )


# Generate


def test_generate_writes_the_same_image_k_in_any_request(run, capsys):
    call("generate", run.path, "-n", "3")
    first = samples_of(run)
    assert list(first) == [f"seed0_{k:06d}.png" for k in range(3)]
    assert all(image.shape == (SIZE, SIZE) for image in first.values())
    written = files(run.path / "samples")

    call("generate", run.path, "-n", "18")  # more than are sampled at once
    more = files(run.path / "samples")
    assert len(more) == 18 and written.items() <= more.items()
    assert len(set(more.values())) > 1

    call("generate", run.path, "-n", "2", "--seed", "1")
    other = samples_of(run, "seed1_*")
    assert len(other) == 2
    assert any(
        np.any(other[f"seed1_{k:06d}.png"] != first[f"seed0_{k:06d}.png"])
        for k in range(2)
    )
    check_figures(run.figures_path, FIGURES | SAMPLES)
    text = capsys.readouterr().out
    assert "18 images drawn, 0 there already, in" in text
    assert "grid of the first 18 in" in text


@pytest.fixture(scope="module")
def compiled():
    """Priors by the hash of their run: each is compiled once."""
    return {}


@pytest.fixture
def draws(compiled, monkeypatch):
    """What `modules.generate` is called with, in small chunks."""
    seen, generate, load = [], modules.generate, utils.load_priors

    def spy(vqvae, priors, n, seed, **options):
        seen.append(types.SimpleNamespace(n=n, seed=seed, **options))
        return generate(vqvae, priors, n, seed, **options)

    def load_once(run, vqvae):
        key = predict.sample_folder(run).name
        if key not in compiled:
            compiled[key] = load(run, vqvae)
        return compiled[key]

    monkeypatch.setattr(modules, "generate", spy)
    monkeypatch.setattr(utils, "load_priors", load_once)
    monkeypatch.setattr(predict, "CHUNK", 16)
    return seen


def test_generate_options_reach_the_sampler(run, draws):
    call("generate", run.path, "-n", "3", "--top-k", "1")
    flags = "--temperature 0.5 --top-p 0.9 --slice-position 0.25".split()
    call("generate", run.path, "-n", "18", "--seed", "7", *flags)
    greedy, *chunks = draws
    assert (greedy.top_k, greedy.label) == (1, None)
    positions = modules.slice_positions(3)
    np.testing.assert_array_equal(greedy.slice_position, positions)
    assert [(c.n, c.seed, c.first) for c in chunks] == [(16, 7, 0), (2, 7, 16)]
    for chunk in chunks:
        assert (chunk.temperature, chunk.top_p) == (0.5, 0.9)
        assert list(chunk.slice_position) == [0.25] * chunk.n
    # Other options, other files: no folder mixes them unseen.
    names = set(samples_of(run))
    assert "seed0_top-k1_000000.png" in names
    assert (
        "seed7_temperature0.5_top-p0.9_slice-position0.25_000017.png" in names
    )
    assert len(names) == 3 + 18


@pytest.mark.parametrize("name", ["temperature", "top_p", "slice_position"])
def test_other_settings_have_other_names(name):
    values = (0.1, 0.10000001, 0.2, 1.0)
    names = {predict.sample_name(predict.Generate(**{name: v})) for v in values}
    assert len(names) == len(values)
    assert predict.sample_name(
        predict.Generate(guidance=2.0, label="v1.0")
    ) == ("seed0_guidance2_labelv1.0")


def test_generate_greedily_is_the_same_for_every_seed(run):
    flags = ["--top-k", "1", "--slice-position", "0.5"]
    call("generate", run.path, "-n", "2", "--seed", "5", *flags)
    images = list(samples_of(run).values())
    np.testing.assert_array_equal(*images)


def test_generate_needs_a_prior(vqvae_run, capsys):
    before = files(vqvae_run.path)
    error = refused(4, capsys, "generate", vqvae_run.path)
    assert "this run has no prior" in error and "--stage prior" in error
    assert files(vqvae_run.path) == before


# Many images: chunks, shards, going on


def load(path):
    """Arrays of an npz chunk."""
    with np.load(path) as chunk:
        return dict(chunk)


def generated(run, *flags):
    """Generate into the run; return {name: bytes} of all its samples."""
    call("generate", run.path, *flags)
    return files(predict.sample_folder(run))


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_shards_together_equal_one_request(kind, levels_run, tmp_path, draws):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ["-n", "53", "--format", kind]
    expected = generated(copy_run(levels_run, whole), *flags)
    assert [draw.first for draw in draws] == [0, 16, 32, 48]
    assert len(expected) == {"png": 53, "npz": 4}[kind]

    run, count = copy_run(levels_run, parts), 0
    for shard, firsts in (("1/3", [16]), ("2/3", [32]), ("0/3", [0, 48])):
        draws.clear()
        found = generated(run, *flags, "--shard", shard)
        assert [draw.first for draw in draws] == firsts
        assert len(found) > count
        count = len(found)
    assert found == expected


def test_npz_holds_the_images_and_what_they_are_of(levels_run, tmp_path, draws):
    run = copy_run(levels_run, tmp_path)
    generated(run, "-n", "21")
    images = np.stack(list(samples_of(run).values()))
    generated(run, "-n", "21", "--format", "npz")
    folder = predict.sample_folder(run)
    names = ["seed0_000000.npz", "seed0_000016.npz"]
    assert sorted(p.name for p in folder.glob("*.npz")) == names
    parts = [load(folder / name) for name in names]
    chunk = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    assert set(chunk) == {
        *("images", "number", "indices_1", "indices_2"),
        *("label", "slice_position"),
    }
    assert chunk["images"].dtype == np.uint8
    np.testing.assert_array_equal(chunk["images"], images)
    assert list(chunk["number"]) == list(range(21))
    assert list(chunk["label"]) == ["AD"] * 8 + ["NC"] * 8 + ["AD"] * 5
    positions = modules.slice_positions(21)
    np.testing.assert_array_equal(chunk["slice_position"], positions)
    indices = [chunk["indices_1"], chunk["indices_2"]]
    assert [grid.shape for grid in indices] == [(21, 8, 8), (21, 4, 4)]
    vqvae = utils.load_model(run.vqvae_path)
    decoded = vqvae.decode_indices(indices).numpy()[..., 0]
    np.testing.assert_allclose(images / 255, decoded, atol=0.51 / 255)


def test_npz_without_what_a_prior_is_not_told(run):
    generated(run, "-n", "3", "--format", "npz")
    chunk = load(predict.sample_folder(run) / "seed0_000000.npz")
    assert set(chunk) == {"images", "number", "indices_1", "slice_position"}
    assert {len(values) for values in chunk.values()} == {3}


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_a_killed_request_goes_on(kind, run, draws, capsys):
    flags = ["-n", "70", "--format", kind]
    expected = generated(run, *flags)
    folder = predict.sample_folder(run)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    gone, cut = (folder / f"seed0_{k:06d}.{kind}" for k in (16, 48))
    left = gone.with_name(f"{gone.name}.tmp-{process.pid}{gone.suffix}")
    gone.rename(left)
    cut.write_bytes(cut.read_bytes()[:-40])  # as no process leaves it

    draws.clear()
    capsys.readouterr()
    assert generated(run, *flags) == expected
    assert [draw.first for draw in draws] == [16, 48]
    assert "32 images drawn, 38 there already, in" in capsys.readouterr().out
    draws.clear()
    assert generated(run, *flags) == expected
    assert not draws


def test_files_under_way_elsewhere_are_left_alone(run, draws):
    """Other shards and requests may be alive on other machines."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    folder = predict.sample_folder(run)
    folder.mkdir(parents=True)
    names = [
        f"seed0_000016.png.tmp-{process.pid}.png",  # of shard 1
        f"seed0_000000.png.tmp-{os.getppid()}.png",  # alive
        f"seed1_000000.png.tmp-{process.pid}.png",
        f"seed0_top-k1_000000.png.tmp-{process.pid}.png",
    ]
    for name in names:
        (folder / name).write_bytes(b"")
    assert set(names) < set(generated(run, "-n", "20", "--shard", "0/2"))


def test_an_npz_of_fewer_images_is_drawn_again(run, draws):
    flags = ["--format", "npz", "-n"]
    short = generated(run, *flags, "18")
    more = generated(run, *flags, "27")
    assert [draw.first for draw in draws] == [0, 16, 16]
    assert set(short) == set(more)
    assert short["seed0_000000.npz"] == more["seed0_000000.npz"]
    chunk = load(predict.sample_folder(run) / "seed0_000016.npz")
    assert list(chunk["number"]) == list(range(16, 27))
    draws.clear()
    assert generated(run, *flags, "20") == more  # those and others
    assert not draws


def test_samples_of_another_prior_are_not_taken_for_its_own(run, draws):
    path = run.path / "prior.keras"
    earlier, before = path.read_bytes(), generated(run, "-n", "20")
    folder = predict.sample_folder(run)
    prior = utils.load_model(path)
    prior.logits.bias.assign_add(np.linspace(-2, 2, 16))
    prior.save(path)
    draws.clear()
    after = generated(run, "-n", "18")
    assert len(draws) == 2
    assert len(after) == 18  # none of the others among them
    assert any(after[name] != before[name] for name in after)
    assert files(folder) == before

    path.write_bytes(earlier)
    draws.clear()
    assert generated(run, "-n", "20") == before
    assert not draws


def test_a_shard_without_the_first_images_draws_no_grid(run, draws, capsys):
    shutil.rmtree(run.figures_path)
    for shard, count in (("1/2", 2), ("2/3", 0)):
        capsys.readouterr()
        call("generate", run.path, "-n", "18", "--shard", shard)
        text = capsys.readouterr().out
        assert f"{count} images drawn, 0 there" in text and "grid" not in text
        assert not run.figures_path.exists()
        shutil.rmtree(run.path / "samples", ignore_errors=True)
    call("generate", run.path, "-n", "18", "--shard", "0/2")
    assert "grid of the first 16 in" in capsys.readouterr().out
    check_figures(run.figures_path, ["samples"])


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_generate_holds_one_chunk_at_a_time(kind, run, draws, monkeypatch):
    held, alive = [], []
    original = predict.draw

    def draw(*args):
        alive.append(sum(reference() is not None for reference in held))
        chunk = original(*args)
        held.append(weakref.ref(chunk["images"]))
        return chunk

    monkeypatch.setattr(predict, "draw", draw)
    call("generate", run.path, "-n", "100", "--format", kind)
    assert alive == [0] * 7


# Labels, guidance and two levels


def test_generate_a_label_with_guidance(levels_run, tmp_path, draws):
    run = copy_run(levels_run, tmp_path)
    flags = "--label AD --guidance 2 -n 3".split()
    call("generate", run.path, *flags)
    [options] = draws
    assert (set(options.label), options.guidance) == ({"AD"}, 2.0)
    images = samples_of(run)
    names = [f"seed0_guidance2_labelAD_{k:06d}.png" for k in range(3)]
    assert list(images) == names
    assert all(image.shape == (SIZE, SIZE) for image in images.values())
    check_figures(run.figures_path, FIGURES | SAMPLES)


def test_labels_that_a_run_does_not_know(levels_run, tiny_run, capsys):
    for run, label, known in (
        (levels_run, "MCI", "(AD, NC)"),
        (levels_run, "", "(AD, NC)"),
        (tiny_run, "AD", "(none: no --condition label in training)"),
    ):
        before = files(run.path)
        argv = ["generate", run.path, "--label", label]
        error = refused(2, capsys, *argv)
        assert error.startswith("error: --label: expected one of those of ")
        assert f"{run.path} {known}, found {label!r}" in error
        assert files(run.path) == before


@pytest.mark.parametrize(
    "labels, positions, guidance, fine",
    [
        (("AD",), False, 2.0, True),
        ((), True, 2.0, True),
        ((), False, 1.0, True),
        ((), False, 2.0, False),
        ((), False, 0.0, False),
    ],
)
def test_guidance_needs_a_condition(labels, positions, guidance, fine):
    prior = types.SimpleNamespace(labels=labels, slice_condition=positions)
    run = types.SimpleNamespace(path="runs/one")
    options = predict.Generate(guidance=guidance)
    if fine:
        predict.check_conditions(run, [prior], options)
    else:
        message = "--guidance: runs/one was trained without --condition"
        with pytest.raises(utils.FlagError, match=message):
            predict.check_conditions(run, [prior], options)


def test_slice_position_needs_a_condition():
    prior = types.SimpleNamespace(labels=("AD",), slice_condition=False)
    run = types.SimpleNamespace(path="runs/one")
    message = "--slice-position: runs/one was trained without --condition slice"
    with pytest.raises(utils.FlagError, match=message):
        predict.check_conditions(
            run, [prior], predict.Generate(slice_position=0.5)
        )


@pytest.mark.parametrize("line", [[], ["runs/one"]])
def test_bare_command_on_two_levels(
    line, levels_run, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "runs" / "one"
    shutil.copytree(levels_run.path, path)
    shutil.rmtree(path / "figures")
    monkeypatch.chdir(tmp_path)
    predict.main(line)
    check_figures(path / "figures", ["reconstructions", "samples"])
    names = set(samples_of(utils.Run.open(path)))
    assert names == {f"seed0_{k:06d}.png" for k in range(64)}
    text = capsys.readouterr().out
    assert text.count("bits per code") == 2 and "label" in text


def test_inspect_shows_the_priors_of_two_levels(levels_run, capsys):
    call("inspect", levels_run.path)
    text = capsys.readouterr().out
    for part in (
        "data        adni, real",
        "train: 12 images, 3 subjects",
        "level 1     grid 8x8, K=16, D=4, ",
        "level 2     grid 4x4, K=16, D=4, ",
        "quantizer_2 ",
        "\nprior_bottom.keras: PixelSNAIL, ",
        "\nprior_top.keras: PixelSNAIL, ",
        "attentions[0] ",
        "context ",
    ):
        assert part in text, part


@pytest.mark.parametrize("name", ["prior_bottom.keras", "prior_top.keras"])
@pytest.mark.parametrize("verb", ["generate", "evaluate", "inspect"])
def test_one_prior_of_two_is_missing(name, verb, levels_run, tmp_path, capsys):
    run = copy_run(levels_run, tmp_path)
    (run.path / name).unlink()
    error = refused(4, capsys, verb, run.path)
    assert f"{run.path / name}: " in error and "--stage prior" in error


# Evaluate


def test_evaluate_finds_what_training_found(run):
    before = json.loads(run.evaluation_path.read_text())
    shutil.rmtree(run.figures_path)
    run.evaluation_path.unlink()
    call("evaluate", run.path)
    after = json.loads(run.evaluation_path.read_text())
    assert set(after.pop("speed")) == set(before.pop("speed"))
    assert after == before
    check_figures(run.figures_path, FIGURES | SAMPLES)


def test_evaluate_with_fewer_and_likelier_samples(levels_run, tmp_path, draws):
    run = copy_run(levels_run, tmp_path)
    call("evaluate", run.path, "--num-samples", "3", "--temperature", "0.5")
    generation = utils.read_evaluation(run)["generation"]
    assert (generation["n"], generation["temperature"]) == (3, 0.5)
    assert {options.temperature for options in draws} == {0.5}


def test_evaluate_other_data_takes_all_as_test_images(run, adni_dir, capsys):
    before = files(run.path)
    call("evaluate", run.path, "--data-dir", adni_dir)
    text = capsys.readouterr()
    assert "warning" not in text.err
    after = files(run.path)
    assert before.items() <= after.items()
    figures = FIGURES - {"history"}
    assert set(after) - set(before) == {
        "evaluation-AD_NC.json",
        *(f"figures/AD_NC/{name}.png" for name in figures),
    }
    check_figures(run.figures_path / "AD_NC", figures)
    evaluation = json.loads(after["evaluation-AD_NC.json"])
    assert evaluation["data"] == {
        "dataset": "adni",
        "data_dir": str(adni_dir),
        "simulated": False,
        "image_size": [SIZE, SIZE],
        "images_seen_in_training": 0,
        "test": {"subjects": 6, "images": 6 * SLICES},
    }
    [prior] = evaluation["prior"]
    assert set(prior["bits_per_code"]) == {"test"}
    low, high = evaluation["reconstruction"]["ssim"]["ci95"]
    assert low < evaluation["reconstruction"]["ssim"]["mean"] < high
    assert set(evaluation["speed"]) == {"images_per_second_encoded"}


def test_evaluate_says_that_images_were_trained_on(run, oasis_dir, capsys):
    call("evaluate", run.path, "--data-dir", oasis_dir, "--dataset", "oasis")
    assert "warning: 20 of 24 images" in capsys.readouterr().err
    evaluation = run.path / "evaluation-keras_png_slices_data.json"
    data = json.loads(evaluation.read_text())["data"]
    assert data["images_seen_in_training"] == 20
    assert data["test"] == {"subjects": 6, "images": 24}


def test_evaluate_leaves_unfit_files_of_other_data_out(
    vqvae_run, adni_dir, tmp_path, capsys
):
    """Of a folder with the name of one evaluated before."""
    run = copy_run(vqvae_run, tmp_path)
    call("evaluate", run.path, "--data-dir", adni_dir)
    first = (run.path / "evaluation-AD_NC.json").read_bytes()
    other = shutil.copytree(adni_dir, tmp_path / "other" / "AD_NC")
    bad = next((other / "test").rglob("*.jpeg"))
    bad.write_bytes(bad.read_bytes()[:100])
    flags = ("evaluate", run.path, "--data-dir", other)
    assert bad.name in refused(3, capsys, *flags)
    call(*flags, "--skip-bad")
    assert (run.path / "evaluation-AD_NC.json").read_bytes() == first
    [second] = run.path.glob("evaluation-AD_NC-*.json")
    data = json.loads(second.read_text())["data"]
    assert data["data_dir"] == str(other)
    assert data["test"]["images"] == 6 * SLICES - 1
    name = second.stem.removeprefix("evaluation-")
    rejected = pd.read_csv(run.figures_path / name / "rejected.csv")
    assert [bad.name] == [Path(path).name for path in rejected["path"]]
    written = second.read_bytes()
    call(*flags, "--skip-bad")  # in the same place again
    assert len(list(run.path.glob("evaluation-*.json"))) == 2
    assert json.loads(written)["data"] == data


def test_evaluate_a_run_without_prior(vqvae_run, tmp_path):
    run = copy_run(vqvae_run, tmp_path)
    before = json.loads(run.evaluation_path.read_text())
    call("evaluate", run.path)
    after = json.loads(run.evaluation_path.read_text())
    assert after.pop("speed") and before.pop("speed")
    assert after == before


# Inspect


def test_inspect_shows_what_a_run_is_made_of(tiny_run, capsys):
    before = files(tiny_run.path)
    call("inspect", tiny_run.path)
    text = capsys.readouterr().out
    for part in (
        "recipe      quickstart",
        "data        oasis, real",
        "train: 16 images, 4 subjects",
        "test: 4 images, 1 subjects",
        "image size  32x32",
        "level 1     grid 8x8, K=16, D=4, ",
        "vqvae.keras: VQVAE, 2,977 weights",
        "encoder_1 ",
        "quantizer_1 ",
        "prior.keras: PixelCNN",
        "residual[0] ",
        "prior_blocks         1",
        "usage",
        "perplexity",
        "ssim foreground",
        "bits per code",
    ):
        assert part in text, part
    assert files(tiny_run.path) == before


def test_a_script_has_nothing_to_say_on_stderr(tiny_run):
    done = subprocess.run(
        [sys.executable, "predict.py", "inspect", str(tiny_run.path)],
        cwd=Path(predict.__file__).parent,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "prior.keras" in done.stdout


def test_inspect_a_run_without_prior_or_scores(vqvae_run, tmp_path, capsys):
    run = copy_run(vqvae_run, tmp_path)
    run.evaluation_path.unlink()
    call("inspect", run.path)
    text = capsys.readouterr().out
    assert "vqvae.keras" in text and "prior.keras" not in text
    assert "scores" not in text


# Refused


def test_missing_run(tmp_path, capsys):
    for verb in ("reconstruct", "generate", "evaluate", "inspect"):
        error = refused(4, capsys, verb, tmp_path / "none")
        assert f"{tmp_path / 'none'}: no such run folder" in error
    error = refused(4, capsys, "inspect", tmp_path)
    assert "no config.json, so not a run folder" in error


@pytest.mark.parametrize(
    "argv, part",
    [
        ("generate --temperature 0", "--temperature: expected a number in (0"),
        ("generate --top-p 1.5", "--top-p: expected"),
        ("generate -n 0", "--number: expected a whole number in [1"),
        ("generate --temp 1", "--temp: unknown argument"),
        ("generate --guidance -1", "--guidance: expected a number in [0, 100]"),
        ("generate --format jpg", "--format: expected one of png, npz"),
        *(
            (f"generate --shard={shard}", f"expected I/N with 0 <= I < N, {x}")
            for shard in ("4/4", "0/0", "-1/4", "1", "1/", "a/b", "1/2/3")
            for x in [f"such as 0/4, found '{shard}'"]
        ),
        ("reconstruct --split all", "--split: expected one of train"),
        ("evaluate --dataset oasis", "--dataset: goes with --data-dir only"),
        ("evaluate --skip-bad", "--skip-bad: goes with --data-dir only"),
        (
            "evaluate --data-dir x --temperature 0.9",
            "--temperature: does not go with --data-dir",
        ),
        ("paint", "VERB: invalid choice: 'paint'"),
    ],
)
def test_bad_flags(argv, part, capsys):
    assert part in refused(2, capsys, *argv.split())


@pytest.mark.parametrize("verb", ["reconstruct", "generate", "inspect"])
def test_truncated_model(run, verb, capsys):
    run.vqvae_path.write_bytes(run.vqvae_path.read_bytes()[:5000])
    error = refused(4, capsys, verb, run.path)
    assert f"{run.vqvae_path}: truncated" in error


@pytest.mark.parametrize("name", ["vqvae.keras", "prior.keras"])
def test_model_whose_settings_do_not_fit_its_weights(name, run, capsys):
    """Never the weights of 16 code vectors in a codebook of 8."""
    path = run.path / name
    with zipfile.ZipFile(path) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    text = members["config.json"]
    members["config.json"] = text.replace(
        b'"num_embeddings": 16', b'"num_embeddings": 8'
    )
    assert members["config.json"] != text
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    error = refused(4, capsys, "generate", run.path)
    assert f"{path}: cannot be loaded" in error


def test_prior_of_another_codebook(run, levels_run, capsys):
    path = run.path / "prior.keras"
    shutil.copy(levels_run.path / "prior_top.keras", path)
    for verb in ("generate", "evaluate", "inspect"):
        error = refused(4, capsys, verb, run.path)
        assert f"{path}: trained on another codebook" in error


@pytest.mark.parametrize(
    "name, verb",
    [
        ("split.csv", "reconstruct"),
        ("evaluation.json", "inspect"),
        ("indices.npz", "evaluate"),
        ("history.csv", "evaluate"),
    ],
)
def test_damaged_files_of_a_run(name, verb, run, capsys):
    path = run.path / name
    path.write_bytes(b"")
    assert f"{path}: damaged" in refused(4, capsys, verb, run.path)
    if name != "evaluation.json":
        path.unlink()
        assert f"{path}: missing" in refused(4, capsys, verb, run.path)


def test_data_gone_or_changed_since_training(run, oasis_dir, capsys):
    text = run.split_path.read_text()
    gone = text.replace("case_006_slice_0", "case_006_slice_99")
    run.split_path.write_text(gone)
    for verb in ("reconstruct", "evaluate"):
        error = refused(3, capsys, verb, run.path)
        assert "case_006_slice_99.nii.png: no longer there" in error
    changed = text.replace("case_006_slice_0", "case_006_slice_1")
    run.split_path.write_text(changed)
    for verb in ("reconstruct", "evaluate"):
        error = refused(3, capsys, verb, run.path)
        assert "case_006_slice_1.nii.png: file changed since" in error
    run.split_path.write_text(text.replace("validate", "train"))
    error = refused(3, capsys, "reconstruct", run.path, "--split", "validate")
    assert "validate: no images in" in error


def test_unfit_images_and_data(run, tmp_path, capsys):
    before = files(run.path)
    error = refused(
        3, capsys, "reconstruct", run.path, "--images", tmp_path / "x.png"
    )
    assert f"{tmp_path / 'x.png'}: found nothing there" in error
    (tmp_path / "x.png").write_bytes(b"not an image")
    error = refused(
        3, capsys, "reconstruct", run.path, "--images", tmp_path / "x.png"
    )
    assert "expected a PNG or JPEG" in error
    empty = tmp_path / "empty"
    empty.mkdir()
    error = refused(3, capsys, "evaluate", run.path, "--data-dir", empty)
    assert f"{empty}: found no data set" in error
    assert files(run.path) == before
