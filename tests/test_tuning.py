"""`train.py --tune`: a search for settings with Optuna."""

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest

import train
import utils
from tests.conftest import TINY

ROOT = Path(train.__file__).parent
SPACE = {
    "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "residual_blocks": {"low": 1, "high": 3},
    "embedding_dim": {"choices": (4, 8)},
    "prior_blocks": {"low": 1, "high": 2},
}
AT_LAST = ["seconds", "best", "run", "note"]
SEARCHED = ("--learning-rate", "--residual-blocks", "--embedding-dim")


@pytest.fixture(autouse=True)
def small_space(monkeypatch):
    monkeypatch.setattr(utils, "SEARCH_SPACE", SPACE)


def tiny_flags(data):
    """Those of a tiny run, without the ones that are searched."""
    words = iter(TINY)
    fixed = [
        [name, next(words)] if not name.startswith("--no-") else [name]
        for name in words
        if name not in (*SEARCHED, "--prior-blocks") or not next(words)
    ]
    flags = ["--dataset", "oasis", "--data-dir", str(data)]
    flags += [word for pair in fixed for word in pair]
    return [*flags, "--strategy", "none"]


def search(run_dir, tune, *flags):
    """Search in this process; the table of trials."""
    train.main(["--tune", str(tune), *flags, "--run-dir", str(run_dir)])
    return read_trials(run_dir)


def read_trials(run_dir):
    return pd.read_csv(run_dir / "trials.csv", float_precision="round_trip")


def tried(table):
    return table["state"].isin(["complete", "pruned"]).sum()


def exit_code(*arguments):
    with pytest.raises(SystemExit) as end:
        utils.run_main(train.main, [str(a) for a in arguments])
    return end.value.code


@pytest.fixture
def fake(monkeypatch):
    """Replace the training of a trial by a function of its `Config`.

    Without figures, which take longer than all else.
    """
    monkeypatch.setattr(train, "draw_search", lambda *_: None)
    idle = types.SimpleNamespace(clear_session=lambda: None)
    monkeypatch.setattr(train, "keras", types.SimpleNamespace(utils=idle))

    def replace(measure):
        seen = []

        def train_trial(config, strategy, signals, trial):
            seen.append(config)
            return measure(config, len(seen))

        monkeypatch.setattr(train, "train_trial", train_trial)
        return seen

    return replace


def near_a_rate(config, number):
    return [1 - abs(np.log10(config.learning_rate) + 3) / 10]


# A real search


def test_a_search_and_its_continuation(oasis_dir, tmp_path, capsys):
    flags = tiny_flags(oasis_dir)
    run_dir = tmp_path / "search"
    table = search(run_dir, 1, *flags)
    names = [name for name in SPACE if not name.startswith("prior")]
    assert list(table) == ["number", "state", *names, "ssim", *AT_LAST]
    assert list(table["state"]) == ["complete"]
    again = search(run_dir, 2, *flags)
    assert len(again) == 2 and tried(again) == 2
    pd.testing.assert_frame_equal(
        again.iloc[:1].drop(columns="best"), table.drop(columns="best")
    )
    for trial in again.itertuples():
        run = utils.Run.open(run_dir / trial.run)
        assert trial.run == f"trials/{trial.number:04d}"
        assert run.vqvae_path.exists() and not run.evaluation_path.exists()
        assert {key.split("_")[0] for key in utils.read_indices(run)} == {
            "train",
            "validate",
        }
        assert "training" not in run.info and not run.lock_path.exists()
        for name in names:
            assert getattr(run.config, name) == getattr(trial, name)
        last = utils.read_history(run).iloc[-1]
        assert trial.ssim == last["val_ssim"] and last["epoch"] == 2
    # The command of the best trial is one that gives its settings.
    printed = capsys.readouterr().out
    assert "in full" in printed
    command = shlex.split(printed.strip().splitlines()[-1])
    assert command[:2] == ["python", "train.py"]
    best = again[again["best"]].iloc[0]
    assert best["ssim"] == again["ssim"].max()
    config = utils.resolve(command[2:])
    for name in names:
        assert getattr(config, name) == best[name]
    searched = utils.Run.open(run_dir / best["run"]).config
    changed = {
        f.name
        for f in dataclasses.fields(config)
        if getattr(config, f.name) != getattr(searched, f.name)
    }
    assert changed == {"run_dir", "stage", "epochs", "prior_epochs"}
    figures = {path.name for path in (run_dir / "figures").iterdir()}
    assert figures == {"tuning_history.png", "tuning_slices.png"}


def test_two_objectives(oasis_dir, tmp_path, capsys):
    flags = [*tiny_flags(oasis_dir), "--objective", "ssim+bits"]
    run_dir = tmp_path / "search"
    (trial,) = search(run_dir, 1, *flags).itertuples()
    run = utils.Run.open(run_dir / trial.run)
    assert run.config.prior_blocks == trial.prior_blocks
    history = utils.read_history(run)
    rows = history[history["stage"] == "prior"]
    bits = rows["val_bits_per_code"].min() * 8 * 8
    assert trial.bits_per_image == pytest.approx(bits)
    assert trial.best and "bits per image" in capsys.readouterr().out
    assert not run.evaluation_path.exists()
    figures = {path.name for path in (run_dir / "figures").iterdir()}
    assert figures == {"tuning_pareto.png", "tuning_slices.png"}


# What is tried


def test_trials_are_of_the_seed_and_begin_with_the_recipe(fake, tmp_path):
    seen = fake(near_a_rate)
    flags = ("--embedding-dim", "8")
    first = search(tmp_path / "a", 5, *flags, "--seed", "1")
    for tune in (2, 5):  # in two goes
        second = search(tmp_path / "b", tune, *flags, "--seed", "1")
    other = search(tmp_path / "c", 5, *flags, "--seed", "2")
    names = ["learning_rate", "residual_blocks", "ssim"]
    pd.testing.assert_frame_equal(first[names], second[names])
    assert not first[names].equals(other[names])
    recipe = utils.resolve([])
    assert first["learning_rate"][0] == recipe.learning_rate
    assert first["residual_blocks"][0] == recipe.residual_blocks
    # A flag that is given is not searched.
    assert "embedding_dim" not in first
    assert {config.embedding_dim for config in seen} == {8}
    assert {config.stage for config in seen} == {"vqvae"}
    assert first["learning_rate"].between(1e-4, 1e-2).all()
    assert set(first["residual_blocks"]) <= {1, 2, 3}


def test_a_recipe_may_have_a_space_of_its_own():
    for recipe in utils.RECIPES:
        values = {"data_dir": "DIR", "dataset": "oasis"}
        settings = {**values, **utils.RECIPES[recipe].settings}
        config = utils.Config(recipe=recipe, **settings)
        both = dataclasses.replace(config, objective="ssim+bits")
        own = utils.RECIPES[recipe].search
        assert train.search_space(both, ()) == (own or SPACE)
        assert (own is not None) == (recipe == "adni-vqvae-tuned")
        for name, how in (own or SPACE).items():  # every value is allowed
            for value in how.get("choices") or (how["low"], how["high"]):
                dataclasses.replace(config, **{name: value})


def test_a_whole_space_given_as_flags(tmp_path, capsys):
    flags = "--learning-rate 0.1 --residual-blocks 1 --embedding-dim 4"
    code = exit_code("--tune", 2, *flags.split(), "--run-dir", tmp_path / "x")
    assert code == 2 and "nothing to search" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# What does not go as planned


def test_a_failed_trial_does_not_end_the_search(fake, tmp_path, capsys):
    errors = {
        1: utils.NumericsError("vqvae: not finite in step 3"),
        3: utils.RunError("level 1 has collapsed"),
        4: utils.FlagError("--image-size: not a multiple"),
    }

    def measure(config, number):
        if number in errors:
            raise errors[number]
        return near_a_rate(config, number)

    fake(measure)
    table = search(tmp_path / "search", 6)
    assert len(table) == 6
    for number, trial in enumerate(table.itertuples(), start=1):
        assert trial.state == ("pruned" if number in errors else "complete")
        if number in errors:
            assert trial.note == str(errors[number])
    assert not table.loc[[0, 2, 3], "best"].any()


def test_nothing_but_failed_trials(fake, tmp_path, capsys):
    def measure(config, number):
        raise utils.NumericsError("not finite")

    fake(measure)
    assert exit_code("--tune", 2, "--run-dir", tmp_path / "search") == 4
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "trials.csv" in error
    assert len(read_trials(tmp_path / "search")) == 2


def test_bad_data_end_the_search(tmp_path, capsys):
    flags = ["--dataset", "oasis", "--data-dir", tmp_path / "none"]
    code = exit_code("--tune", 2, *flags, "--run-dir", tmp_path / "search")
    assert code == 3
    assert capsys.readouterr().err.count("\n") == 1


def test_a_signal_stops_the_search_which_goes_on(fake, tmp_path, capsys):
    def measure(config, number):
        if number == 2:
            raise utils.Stopped(signal.SIGINT)
        return near_a_rate(config, number)

    fake(measure)
    run_dir = tmp_path / "search"
    assert exit_code("--tune", 3, "--run-dir", run_dir) == 130
    out = capsys.readouterr().out
    assert f"go on with: python train.py --tune 3 --run-dir {run_dir}" in out
    table = read_trials(run_dir)
    assert list(table["state"]) == ["complete", "fail", "waiting"]
    assert table["note"][1] == "stopped by SIGINT"
    table = search(run_dir, 3)
    assert list(table["state"]) == ["complete", "fail", *["complete"] * 2]
    # What was stopped is tried again.
    for name in ("learning_rate", "residual_blocks"):
        assert table[name][2] == table[name][1]


# A process that searches, as far as possible without TensorFlow.
PROCESS = f"""
import os, sys, time, types
import train, utils
utils.SEARCH_SPACE = {SPACE}
train.draw_search = lambda *_: None
idle = types.SimpleNamespace(clear_session=lambda: None)
train.keras = types.SimpleNamespace(utils=idle)
def train_trial(config, strategy, signals, trial):
    if trial.number == int(os.environ.get("KILLED", -1)):
        os.kill(os.getpid(), 9)
    time.sleep(0.2)
    return [config.learning_rate]
train.train_trial = train_trial
train.tune(utils.resolve(sys.argv[1:]), sys.argv[1:], None, None)
assert "tensorflow" not in sys.modules
"""


def start_search(run_dir, tune, **environment):
    command = [sys.executable, "-c", PROCESS, "--tune", str(tune)]
    return subprocess.Popen(
        [*command, "--run-dir", str(run_dir)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_share_a_search(tmp_path):
    started = [start_search(tmp_path / "search", 12) for _ in range(2)]
    numbers = []
    for process in started:
        out, errors = process.communicate()
        assert process.returncode == 0, errors
        lines = [line for line in out.splitlines() if ": learning" in line]
        numbers.append({int(line.split()[1][:-1]) for line in lines})
    assert all(numbers) and not numbers[0] & numbers[1]
    table = read_trials(tmp_path / "search")
    # Each process ends the trial that it has begun.
    assert 12 <= len(table) <= 13 and (table["state"] == "complete").all()
    assert numbers[0] | numbers[1] == set(table["number"])
    assert table["learning_rate"].nunique() == len(table)


def test_a_killed_process_blocks_nothing(fake, tmp_path, monkeypatch):
    run_dir = tmp_path / "search"
    monkeypatch.setattr(train, "HEARTBEAT", 1)
    process = start_search(run_dir, 3, KILLED="1")
    process.communicate()
    assert process.returncode == -9
    seen = fake(near_a_rate)
    argv = ["--tune", "2", "--run-dir", str(run_dir)]
    train.tune(utils.resolve(argv), argv, None, None)
    table = read_trials(run_dir)
    assert list(table["state"]) == ["complete", "running", "complete"]
    time.sleep(3)  # without a sign of life
    argv[1] = "4"
    train.tune(utils.resolve(argv), argv, None, None)
    table = read_trials(run_dir)
    assert table["state"][1] == "fail" and tried(table) == 4
    assert table["learning_rate"][1] in [c.learning_rate for c in seen]


# Pruning


def test_poor_trials_are_pruned():
    """The callback, with a fit that is none."""
    study = optuna.create_study(
        direction="maximize", pruner=optuna.pruners.MedianPruner(2, 2)
    )
    epochs = {}

    def fit(trial):
        good = trial.number < 3
        callback = train.pruning(trial)
        for epoch in range(4):
            epochs[trial.number] = epoch + 1
            value = 0.9 if good else 0.1
            callback.on_epoch_end(epoch, {"val_ssim": value})
        return value

    study.optimize(fit, n_trials=5)
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE"] * 3 + ["PRUNED"] * 2
    assert epochs == {0: 4, 1: 4, 2: 4, 3: 2, 4: 2}
    assert study.trials[0].intermediate_values == dict.fromkeys(
        (1, 2, 3, 4), 0.9
    )


def test_a_pruned_trial_is_noted(fake, tmp_path):
    def measure(config, number):
        if number == 2:
            raise optuna.TrialPruned("validation SSIM 0.1 after epoch 2")
        return near_a_rate(config, number)

    fake(measure)
    table = search(tmp_path / "search", 3)
    assert list(table["state"]) == ["complete", "pruned", "complete"]
    assert table["note"][1] == "validation SSIM 0.1 after epoch 2"


# Two objectives


def test_pareto_front(fake, tmp_path, capsys):
    values = [(0.5, 10), (0.6, 20), (0.55, 30), (0.4, 5), (0.6, 25), (0.3, 5)]
    fake(lambda config, number: values[number - 1])
    table = search(tmp_path / "search", 6, "--objective", "ssim+bits")
    assert list(table["best"]) == [True, True, False, True, False, False]
    for number, trial in enumerate(table.itertuples()):
        assert (trial.ssim, trial.bits_per_image) == values[number]
    lines = capsys.readouterr().out.split("with:\n")[1].splitlines()
    assert [line for line in lines if line.startswith("trial")] == [
        "trial 1: ssim 0.6, bits per image 20",
        "trial 0: ssim 0.5, bits per image 10",
        "trial 3: ssim 0.4, bits per image 5",
    ]
    for line, number in zip(lines[1::2], (1, 0, 3), strict=True):
        config = utils.resolve(shlex.split(line)[2:])
        for name in SPACE:
            assert getattr(config, name) == table[name][number]


# Refused


@pytest.mark.parametrize(
    "flags, part",
    [
        ("--resume runs/x", "--tune does not go with --resume"),
        ("--stage prior", "--tune does not go with --stage prior"),
        ("--stage vqvae --objective ssim+bits", "--stage vqvae"),
        ("--prior-level 1", "--tune does not go with --prior-level"),
        ("--strategy multiworker", "--tune: a trial is trained by one"),
        ("--objective fid", "--objective: expected one of ssim, ssim+bits"),
        ("--tune -1", "--tune: expected a whole number"),
    ],
)
def test_bad_flags(flags, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_code("--tune", 3, *flags.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and part in error
    assert not list(tmp_path.iterdir())


def test_another_search_in_the_folder(fake, tmp_path, capsys):
    fake(near_a_rate)
    run_dir = tmp_path / "search"
    search(run_dir, 1)
    for flags, part in (
        (["--epochs", 3], "--epochs: the search in"),
        (["--embedding-dim", 8], "--embedding-dim: the search in"),
        (["--objective", "ssim+bits"], "--objective: the search in"),
    ):
        assert exit_code("--tune", 2, *flags, "--run-dir", run_dir) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and part in error
    assert len(read_trials(run_dir)) == 1


def test_a_folder_of_something_else(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert exit_code("--tune", 2, "--run-dir", tmp_path) == 4
    assert "neither empty nor" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_help_warns_of_ssim_alone(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "alone it picks models that sample badly" in text
    assert "Optuna ends no trial of two objectives early" in text
