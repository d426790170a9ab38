"""Each benchmark runs, in its smallest form; no time is asserted."""

import json

import pytest

import utils
from tests.benchmarks import guards, priors, sampling


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """The precision policy is global: leave it as other tests expect it."""
    monkeypatch.setattr(utils, "choose_precision", lambda *_: ("float32", ""))


def cases(main, tmp_path, *arguments):
    """Rows that a benchmark returns, which are those that it writes."""
    file = tmp_path / "cases.json"
    rows = main([*map(str, arguments), "--json", str(file)])
    assert json.loads(file.read_text())["cases"] == json.loads(json.dumps(rows))
    return rows


def test_sampling(tmp_path, capsys):
    (row,) = cases(sampling.main, tmp_path, "--cases", "smoke")
    assert row["images"] == 1 and row["seconds"] > 0
    assert "smoke: 4x4" in capsys.readouterr().out


def test_guards(tmp_path):
    rows = cases(guards.main, tmp_path, "--small", "--steps", 4)
    assert [row["case"] for row in rows] == ["vqvae", "prior"]
    for row in rows:
        low, high = row["ratio_ci95"]
        assert 0 < low <= row["ratio"] <= high
        assert row["save_share"] < 1


def test_priors(levels_run, tmp_path):
    before = levels_run.config_path.read_bytes()
    flags = ("--level", 2, "--epochs", 1, "--priors", "pixelcnn", "--images", 2)
    (row,) = cases(priors.main, tmp_path, levels_run.path, *flags)
    assert row["level"] == 2 and row["test_images"] > 0
    assert 0 < row["bits_per_code"] < 10
    assert levels_run.config_path.read_bytes() == before
