"""`train.py --tune`: a search for settings with Optuna."""

import dataclasses
import shlex
import signal

import numpy as np
import optuna
import pandas as pd
import pytest
from matplotlib.figure import Figure

import train
import utils
from tests.conftest import TINY, exit_code, refused

SPACE = {
    "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "residual_blocks": {"low": 1, "high": 3},
    "embedding_dim": {"choices": (4, 8, 32)},
    "prior_blocks": {"low": 1, "high": 8},
}
NAMES = ["learning_rate", "residual_blocks", "embedding_dim"]
BOTH = ["--objective", "ssim+bits"]


@pytest.fixture(autouse=True)
def small_space(monkeypatch):
    recipe = dataclasses.replace(utils.RECIPES["quickstart"], search=SPACE)
    monkeypatch.setitem(utils.RECIPES, "quickstart", recipe)


def search(run_dir, tune, *flags):
    """Search in this process; the table of trials."""
    train.main(["--tune", str(tune), *flags, "--run-dir", str(run_dir)])
    return pd.read_csv(run_dir / "trials.csv", float_precision="round_trip")


def tiny_flags(data):
    """Those of a tiny run, without the ones that are searched."""
    pairs = zip(TINY[::2], TINY[1::2], strict=True)
    searched = {f"--{key.replace('_', '-')}" for key in SPACE}
    fixed = [word for pair in pairs if pair[0] not in searched for word in pair]
    return ["--dataset", "oasis", "--data-dir", str(data), *fixed]


def fake(monkeypatch, measure):
    """Replace the training of a trial; return the settings that it gets."""
    seen = []

    def train_trial(settings, begin, trial):
        seen.append(settings)
        return measure(settings, len(seen))

    monkeypatch.setattr(train, "train_trial", train_trial)
    monkeypatch.setattr(Figure, "savefig", lambda _, path: path.touch())
    return seen


def near_a_rate(settings, number):
    return 1 - abs(np.log10(settings.training.learning_rate) + 3) / 10


def test_a_search_and_its_continuation(oasis_dir, tmp_path, capsys, plain):
    """In a folder whose name a database address must not hold."""
    flags, run_dir = tiny_flags(oasis_dir), tmp_path / "is it?ok%20"
    table = search(run_dir, 1, *flags)
    again = search(run_dir, 2, *flags)
    columns = [*NAMES, "ssim", "run"]
    pd.testing.assert_frame_equal(again[:1][columns], table[columns])
    assert list(again["state"]) == ["COMPLETE"] * 2
    for trial in again.itertuples():
        run = utils.Run.open(run_dir / trial.run)
        assert run.vqvae_path.exists() and not run.evaluation_path.exists()
        assert set(utils.read_indices(run)) == {"train_1", "validate_1"}
        assert "training" not in run.info and not run.lock_path.exists()
        settings = utils.flat(run.settings)
        assert all(settings[k] == getattr(trial, k) for k in NAMES)
        last = utils.read_history(run).iloc[-1]
        assert trial.ssim == last["val_ssim"] and last["epoch"] == 2
    assert (run_dir / "figures" / "tuning_slices.png").exists()
    # The command of the best trial is one that gives its settings.
    command = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])
    best = again[again["best"]].iloc[0]
    assert best["ssim"] == again["ssim"].max()
    given = utils.flat(utils.parse_training(command[2:]))
    tried = utils.flat(utils.Run.open(run_dir / best["run"]).settings)
    changed = {key for key in given if given[key] != tried[key]}
    assert changed == {"run_dir", "stage", "epochs", "prior_epochs"}


def test_two_objectives(oasis_dir, tmp_path, plain):
    flags = [*tiny_flags(oasis_dir), *BOTH]
    run_dir = tmp_path / "search"
    (trial,) = search(run_dir, 1, *flags).itertuples()
    run = utils.Run.open(run_dir / trial.run)
    assert run.settings.prior.blocks == trial.prior_blocks
    bits = utils.read_history(run)["val_bits_per_code"].min() * 8 * 8
    assert trial.bits_per_image == pytest.approx(bits) and trial.best
    assert (run_dir / "figures" / "tuning_pareto.png").exists()


def test_trials_follow_from_the_seed_and_the_recipe(tmp_path, monkeypatch):
    seen = fake(monkeypatch, near_a_rate)
    rates = []
    for seed in (1, 1, 2):
        flags = ("--embedding-dim", "8", "--seed", str(seed))
        table = search(tmp_path / str(len(rates)), 4, *flags)
        rates.append(list(table["learning_rate"]))
    assert rates[0] == rates[1] != rates[2]
    assert rates[0][0] == utils.parse_training([]).training.learning_rate
    # A flag that is given is not searched.
    assert "embedding_dim" not in table
    assert {settings.vqvae.embedding_dim for settings in seen} == {8}
    assert {settings.run.stage for settings in seen} == {"vqvae"}


@pytest.mark.parametrize("name", utils.RECIPES)
def test_the_first_trial_is_the_recipe(name, tmp_path, monkeypatch):
    recipe = utils._read_recipes()[name]
    monkeypatch.setitem(utils.RECIPES, name, recipe)
    seen = fake(monkeypatch, lambda *_: (0.5, 10))
    search(tmp_path / "search", 1, "--recipe", name, "--smoke", *BOTH)
    tried, own = map(utils.flat, (seen[0], recipe.settings))
    assert all(tried[key] == own[key] for key in recipe.search)


def test_a_trial_that_fails_does_not_end_the_search(tmp_path, monkeypatch):
    errors = {
        1: utils.NumericsError("vqvae: not finite in step 3"),
        3: optuna.TrialPruned("validation SSIM 0.1"),
        4: utils.FlagError("--image-size: not a multiple"),
    }

    def measure(settings, number):
        if number in errors:
            raise errors[number]
        return near_a_rate(settings, number)

    fake(monkeypatch, measure)
    table = search(tmp_path / "search", 5)
    for number, trial in enumerate(table.itertuples(), start=1):
        assert trial.state == ("PRUNED" if number in errors else "COMPLETE")
        assert number not in errors or trial.note == str(errors[number])
        assert number not in errors or not trial.best


def test_pareto_front(tmp_path, monkeypatch, capsys):
    values = [(0.5, 10), (0.6, 20), (0.55, 30), (0.4, 5)]
    fake(monkeypatch, lambda settings, number: values[number - 1])
    table = search(tmp_path / "search", 4, *BOTH)
    assert list(table["best"]) == [True, True, False, True]
    lines = capsys.readouterr().out.split("with:\n")[1].splitlines()
    assert lines[0] == "trial 1: ssim 0.6, bits per image 20"
    assert [line[:7] for line in lines[2::2]] == ["trial 0", "trial 3"]


def test_two_processes_share_a_search(tmp_path, monkeypatch):
    run_dir = tmp_path / "search"

    def measure(settings, number):
        if number == 1:  # another process comes and goes meanwhile
            assert len(search(run_dir, 3)) == 1 + 3
        return near_a_rate(settings, number)

    seen = fake(monkeypatch, measure)
    table = search(run_dir, 3)
    assert len(table) == len(seen) == 4 and set(table["state"]) == {"COMPLETE"}
    assert table["learning_rate"].nunique() == 4


def test_a_search_goes_on_after_a_kill_or_a_stop(tmp_path, monkeypatch, capsys):
    class Killed(BaseException):
        """Leaves a search as SIGKILL does."""

    def end(settings, number):
        raise Killed if number == 1 else utils.Stopped(signal.SIGINT)

    run_dir = tmp_path / "search"
    fake(monkeypatch, end)
    with pytest.raises(Killed):
        search(run_dir, 2)
    assert exit_code(train.main, "--tune", 2, "--run-dir", run_dir) == 130
    assert f"--run-dir {run_dir}" in capsys.readouterr().out
    fake(monkeypatch, near_a_rate)
    table = search(run_dir, 2)
    assert list(table["state"]) == ["RUNNING"] * 2 + ["COMPLETE"] * 2


def test_poor_trials_are_pruned():
    study = optuna.create_study(
        direction="maximize", pruner=optuna.pruners.MedianPruner(2, 2)
    )

    def fit(trial):
        callback, rounds = train.pruning(trial), 2 + trial.number // 3
        value = (1, 1, 1, 1.1, 0.5)[trial.number]
        for epoch in range(4):
            callback.on_epoch_end(epoch * rounds, {})  # no validation
            logs = {"val_ssim": epoch * value}
            callback.on_epoch_end(epoch * rounds + rounds - 1, logs)
        return value

    study.optimize(fit, n_trials=5)
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE"] * 4 + ["PRUNED"]


def test_what_is_refused(tmp_path, monkeypatch, capsys):
    fake(monkeypatch, near_a_rate)
    run_dir, mine = tmp_path / "search", tmp_path / "mine"
    search(run_dir, 1)
    mine.mkdir()
    (mine / "mine.txt").write_text("mine")
    search_of = f"the search in {run_dir}"
    all_given = "--learning-rate 0.1 --residual-blocks 1 --embedding-dim 4"
    for code, folder, flags, part in (
        (2, run_dir, "--epochs 3", f"--epochs: {search_of} has 7, found 3"),
        (2, run_dir, "--embedding-dim 8", f"{search_of} has a range, found 8"),
        (2, run_dir, all_given, "nothing to search"),
        (2, run_dir, "--stage vqvae --objective ssim+bits", "--stage vqvae"),
        (2, run_dir, "--objective ssim+bits", f"--objective: {search_of}"),
        (2, run_dir, "--strategy multiworker", "--tune: a trial is trained"),
        (4, mine, "", "neither empty nor"),
    ):
        argv = ["--tune", 2, "--run-dir", folder, *flags.split()]
        assert part in refused(train.main, code, capsys, *argv)
    assert [path.name for path in mine.iterdir()] == ["mine.txt"]
    (mine / "study.log").write_text('{"op_code": 0, "wor')
    assert "study.log: damaged" in refused(train.main, 4, capsys, *argv[:4])
