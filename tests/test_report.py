"""What a run says of itself: `inspect`, `MODEL_CARD.md`, `report.html`."""

import base64
import dataclasses
import html.parser
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

import predict
import utils
from tests.conftest import copy_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text outside of style sheets."""

    def __init__(self, run):
        super().__init__()
        self.tags, self.inside, self.text = [], [], ""
        self.source = run.report_path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside.append(tag)

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.inside:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(params=["tiny_run", "levels_run", "vqvae_run"])
def run(request):
    """Runs of one level, of two with labels, and without prior."""
    return request.getfixturevalue(request.param)


def card_of(run):
    return run.card_path.read_text(encoding="utf-8")


def with_evaluation(run, folder, **parts):
    """A copy of a run with other parts of its evaluation."""
    run = copy_run(run, folder)
    evaluation = utils.read_evaluation(run)
    for name, changes in parts.items():
        evaluation[name] |= changes
    utils.write_json(run.evaluation_path, evaluation)
    return run


def write_report(run):
    predict.write_report(run, *predict.load_models(run))


# Report


def test_report_holds_every_figure(run):
    page = Page(run)
    shown = page.all("img")
    embedded = [
        base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        for image in shown
    ]
    figures = [path.read_bytes() for path in run.figures_path.glob("*.png")]
    assert sorted(embedded) == sorted(figures)
    names = {path.stem for path in run.figures_path.glob("*.png")}
    assert {"reconstructions", "failures", "history", "codebook"} < names
    assert ("failures_samples" in names) == run.has_priors
    alts = [image["alt"] for image in shown]
    assert len(set(alts)) == len(alts) and min(map(len, alts)) > 20


def test_report_needs_nothing_from_elsewhere(run):
    page = Page(run)
    links = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action", "poster")
    ]
    assert len(links) > 8
    ids = {attributes.get("id") for _, attributes in page.tags}
    for link in links:
        assert link.startswith("data:image/png;base64,") or link[1:] in ids
    assert not {"script", "link", "iframe", "object"} & {
        t for t, _ in page.tags
    }
    style = re.search("(?s)<style>.*</style>", page.source)[0]
    assert "url(" not in style and "@import" not in style
    assert "prefers-color-scheme: dark" in style


def test_report_shows_and_explains_every_score(run):
    page = Page(run)
    rows = predict.summary_rows(utils.read_evaluation(run))
    assert len(rows) > 20
    for section, key, text in rows:
        meaning = predict.meaning(key)
        assert len(meaning) > 10, (section, key)
        row = f"{key.replace('_', ' ')} {text} {meaning}".split()
        assert "".join(row) in page.text.replace(" ", ""), key
    for version in run.info["versions"].values():
        assert version in page.text
    for name, value in dataclasses.asdict(run.config).items():
        assert f"{name}{utils.typed(value)}" in page.text.replace(" ", "")


def test_report_escapes_what_it_is_told(vqvae_run, tmp_path):
    run = copy_run(vqvae_run, tmp_path)
    run.info["command"] = "train.py --run-dir '<script>alert(1)</script>'"
    write_report(run)
    page = Page(run)
    assert page.all("script") == []
    assert run.info["command"] in page.text


def test_report_warns_of_simulated_data(tiny_run, tmp_path):
    notes = [tag for tag in Page(tiny_run).all("p") if tag.get("class")]
    assert "note" not in {tag["class"] for tag in notes}
    run = copy_run(tiny_run, tmp_path)
    run.info["simulated"] = True
    write_report(run)
    assert "images are simulated" in Page(run).text


def test_report_and_card_sound_the_alarm(tiny_run, tmp_path):
    found = {"copies": 2, "alarm": True}
    run = with_evaluation(tiny_run, tmp_path, memorization=found)
    write_report(run)
    assert "Alarm:" in Page(run).text and "ALARM" in card_of(run)
    assert "Alarm:" not in Page(tiny_run).text
    assert "ALARM" not in card_of(tiny_run)
    found = {"copies": 0, "alarm": False}
    utils.write_json(
        run.evaluation_path,
        {
            **utils.read_evaluation(run),
            "memorization": {"n": 3, **found},
        },
    )
    write_report(run)
    assert "not a proof of privacy" in card_of(run)


def test_plain_command_makes_the_report_anew(tiny_run, tmp_path, capsys):
    run = copy_run(tiny_run, tmp_path)
    run.report_path.unlink()
    run.card_path.write_text("old")
    predict.show(run, predict.Show())
    assert str(run.report_path) in capsys.readouterr().out
    assert len(Page(run).all("img")) > 6
    assert card_of(run) == card_of(tiny_run).replace(
        str(tiny_run.path), str(run.path)
    )
    run.evaluation_path.unlink()  # as after --stage vqvae was killed
    write_report(run)
    assert "Not evaluated yet" in Page(run).text
    assert "Not evaluated yet" in card_of(run)


# In a browser

PROBE = """<script>addEventListener("load", () => {
document.title = JSON.stringify({
  widths: [...document.images].map(image => image.naturalWidth),
  inner: innerWidth, page: document.documentElement.scrollWidth,
})})</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
@pytest.mark.parametrize("width", [500, 1200])
def test_report_in_a_browser(width, levels_run, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(Page(levels_run).source.replace("</body>", PROBE))
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update "
        f"--disable-sync --virtual-time-budget=5000 --window-size={width},900 "
        f"--user-data-dir={tmp_path / 'profile'} --dump-dom"
    ).split()
    done = subprocess.run(
        [CHROMIUM, *flags, path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    title = re.search("<title>(.*)</title>", done.stdout)[1]
    found = json.loads(title)
    assert len(found["widths"]) == len(Page(levels_run).all("img"))
    assert min(found["widths"]) > 300
    assert found["page"] <= found["inner"] == width


# Model card


def test_card_says_what_cards_say(run):
    card = card_of(run)
    headings = re.findall("^## (.*)$", card, re.MULTILINE)
    assert headings == [
        "Model details",
        "Intended use",
        "Out-of-scope use",
        "Data",
        "Evaluation",
        "Memorization",
        "Limits",
        "How to use",
    ]
    assert re.match("---\n(.+\n)+---\n\n# Model card", card)
    evaluation = utils.read_evaluation(run)
    for name in ("train", "validate", "test"):
        part = evaluation["data"][name]
        row = f"| {name} | {part['subjects']} | {part['images']} |"
        assert row in card
    shown = ("reconstruction", "codebook", "prior", "generation", "labels")
    for section, key, text in predict.summary_rows(evaluation):
        if section in shown:
            assert f"| {section} | {key.replace('_', ' ')} | {text} |" in card
    assert "**real**" in card and "read them and keep to them" in card
    assert ("predict.py generate" in card) == run.has_priors
    assert "{{" not in card and "{%" not in card and "\n\n\n" not in card


def test_card_of_simulated_data(tiny_run, tmp_path):
    run = copy_run(tiny_run, tmp_path)
    run.info["simulated"] = True
    write_report(run)
    card = card_of(run)
    assert "**The data are simulated.**" in card and "Licence" not in card
    assert "OASIS, simulated files in its layout: **simulated**" in card


# Failures


@pytest.fixture
def drawn(monkeypatch):
    """{file name: figure} of what is drawn."""
    figures = {}
    monkeypatch.setattr(
        utils,
        "_save_figure",
        lambda figure, path: figures.update({path.name: figure}),
    )
    return figures


class Doubler:
    """A VQ-VAE that brightens."""

    num_embeddings = 4

    def reconstruct(self, images):
        return tf.clip_by_value(2 * images, 0, 1)


def below(figure, row):
    """What is written below the images of a row."""
    axes = [ax for ax in figure.axes if ax.get_ylabel() != "intensity"]
    columns = len(axes) // (3 if len(axes) % 3 == 0 else 1)
    return [ax.get_xlabel() for ax in axes][row * columns :][:columns]


def test_failures_are_the_worst_test_images(drawn, tmp_path, monkeypatch):
    count = 20
    images = np.linspace(0, 1, count)[:, None, None, None]
    images = np.broadcast_to(images, (count, 16, 16, 1)).astype("float32")
    values = np.random.default_rng(0).permutation(count) / count
    frame = pd.DataFrame(
        {"subject": [f"{k // 4:03d}" for k in range(count)], "slice": range(20)}
    )
    monkeypatch.setattr(
        predict, "image_batches", lambda run, frame: [images[frame.index]]
    )
    indices = [np.zeros((count, 4, 4), "int32")]
    predict.draw_test_figures(None, tmp_path, Doubler(), frame, indices, values)
    worst = [int(np.flatnonzero(values == k / count)[0]) for k in range(5)]
    assert below(drawn["failures.png"], 2) == [
        f"subject {k // 4:03d}, slice {k}" for k in worst
    ]
    shown = [ax.images[0].get_array() for ax in drawn["failures.png"].axes[:5]]
    for k, image in zip(worst, shown, strict=True):
        np.testing.assert_allclose(image, images[k, ..., 0])
    spread = [
        ax.images[0].get_array()[0, 0]
        for ax in drawn["reconstructions.png"].axes[:8]
    ]
    np.testing.assert_allclose(spread, images[utils.spread(20, 8), 0, 0, 0])


def test_failures_are_the_least_likely_samples(drawn, tmp_path):
    bits = np.array([5.0, 9.0, 1.0, 7.0, 3.0, 8.0, 6.0])
    images = np.ones((7, 8, 8)) * bits[:, None, None] / 10
    utils.figure_least_likely(tmp_path / "least.png", images, bits, 5)
    axes = drawn["least.png"].axes
    assert [ax.get_xlabel() for ax in axes] == [
        f"{k} bits" for k in (9, 8, 7, 6, 5)
    ]
    shown = [ax.images[0].get_array()[0, 0] for ax in axes]
    np.testing.assert_allclose(shown, [0.9, 0.8, 0.7, 0.6, 0.5])


# Inspect


def test_inspect_as_json(run, capsys):
    predict.main(["inspect", str(run.path), "--json"])
    facts = json.loads(capsys.readouterr().out)
    config = json.loads(run.config_path.read_text(encoding="utf-8"))
    del config["format"]
    assert facts.items() >= config.items()
    evaluation = utils.read_evaluation(run)
    assert facts["evaluation"] == evaluation
    assert facts["data"] == evaluation["data"]
    for level, entry in zip(
        facts["codebook"], evaluation["codebook"], strict=True
    ):
        assert level == {**entry, "embedding_dim": run.config.embedding_dim}
    assert facts["complete"] is True
    models = [utils.load_model(run.vqvae_path)]
    if run.has_priors:
        models = [models[0], *utils.load_priors(run, models[0])]
    for model, found in zip(models, facts["models"].values(), strict=True):
        assert found["weights"] == model.count_params()
        assert sum(x["weights"] for x in found["layers"]) == found["weights"]
    first = facts["models"]["vqvae.keras"]["layers"][0]
    assert first["layer"] == "encoder_1" and first["input"] == [32, 32, 1]


def test_inspect_says_the_same_on_a_page(levels_run, capsys):
    facts = predict.run_facts(levels_run, *predict.load_models(levels_run))
    predict.main(["inspect", str(levels_run.path)])
    page = capsys.readouterr().out
    for model in facts["models"].values():
        for entry in model["layers"]:
            cells = entry["layer"], entry["type"], f"{entry['weights']:,}"
            pattern = r"\s+.*".join(map(re.escape, cells))
            assert re.search(rf"^  {pattern}$", page, re.MULTILINE)
    assert f"perplexity {facts['codebook'][1]['perplexity']:.1f}" in page


def test_inspect_without_evaluation_still_counts_the_codebook(
    vqvae_run, tmp_path, capsys
):
    run = copy_run(vqvae_run, tmp_path)
    expected = utils.read_evaluation(run)["codebook"][0]
    run.evaluation_path.unlink()
    predict.main(["inspect", str(run.path), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["evaluation"] == {}
    assert facts["codebook"][0].items() >= expected.items()
    run.indices_path.unlink()
    predict.main(["inspect", str(run.path), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["codebook"] == [
        {"level": 1, "grid": [8, 8], "num_embeddings": 16, "embedding_dim": 4}
    ]
