"""README and the guide against the program: commands, flags, tables, links."""

import importlib
import operator
import re
import shlex
import shutil

import pytest

import dataset
import predict
import train
import utils
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("load_once")
PATHS = [ROOT / "README.md", *sorted(ROOT.glob("resources/guide/*.md"))]
PAGES = {path: path.read_text(encoding="utf-8") for path in PATHS}
README, GUIDE = PAGES[PATHS[0]], "\n".join(PAGES.values())
SCRIPTS = {"train": train, "predict": predict, "dataset": dataset}
RUN = "runs/NAME"  # what the pages call a run folder


def code_blocks(text, language):
    """Contents of the fenced blocks of a language, "" for unnamed ones."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", text)


def commands(text):
    """(script, arguments) of every command line, in blocks and sentences."""
    spans = [x for block in code_blocks(text, "") for x in block.splitlines()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"(?s)```.*?```", "", text))
    spans += [" ".join(span.split()) for span in inline]
    pattern = r"(?:^|/|\s)python (train|predict|dataset)\.py\b([^|&#]*)"
    found = [match for span in spans for match in re.findall(pattern, span)]
    return sorted({(script, line.strip(" '")) for script, line in found})


class Parsed(Exception):
    """A command line was accepted; nothing is to be run."""


@pytest.mark.parametrize(("script", "line"), commands(GUIDE))
def test_commands_parse(script, line, tiny_run, monkeypatch):
    def ending(parse):
        def parse_and_end(*args, **options):
            raise Parsed(parse(*args, **options))

        return parse_and_end

    for name in ("parse_training", "parse_verbs"):
        monkeypatch.setattr(utils, name, ending(getattr(utils, name)))
    line = re.sub(r"DIR|data/\w+", ".", line).replace(RUN, str(tiny_run.path))
    with pytest.raises((Parsed, SystemExit)) as end:  # --list-recipes, --help
        SCRIPTS[script].main(shlex.split(line))
    assert not getattr(end.value, "code", None)


def runnable(script, *words):
    lines = [line for name, line in commands(README) if name == script]
    return [line for line in lines if {*words} <= {*line.split()}]


@pytest.mark.parametrize("line", runnable("train", "DIR"))
def test_training_commands_run(line, request, tmp_path, plain):
    (layout,) = set(re.findall("oasis|adni|hipmri", line)) or ["oasis"]
    data = request.getfixturevalue(f"{layout}_dir")
    words = shlex.split(line.replace("DIR", str(data)))
    if "--subject-pattern" in words:  # of other names
        pattern = r"case_(?P<subject>\d+)_slice_(?P<slice>\d+)"
        words[words.index("--subject-pattern") + 1] = pattern
    run = str(tmp_path / "run")
    small = ["--smoke", "--run-dir", run]
    small += ["--image-size", "32"] * ("None" not in words)
    train.main([*words, *small])
    run = utils.Run.open(run)
    assert run.has_priors and run.info["image_size"] == [32, 32]


@pytest.mark.parametrize("line", runnable("predict"))
def test_commands_of_predict_run(
    line, tiny_run, levels_run, oasis_dir, tmp_path, monkeypatch
):
    run = levels_run if "--label" in line else tiny_run
    shutil.copytree(run.path, tmp_path / RUN)
    images = sorted(oasis_dir.glob("*_test/case_*"))
    for name, image in zip("ab", images, strict=False):
        shutil.copy(image, tmp_path / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    line = re.sub(r"\b(25000|256)\b", "2", line.replace("DIR", str(oasis_dir)))
    predict.main(shlex.split(line))


def test_flags_exist():
    verbs = [value for m in (predict, dataset) for value in vars(m).values()]
    settings = [utils.Settings, *filter(utils.dataclasses.is_dataclass, verbs)]
    keys = {key for cls in settings for key, *_ in utils._walk(cls)}
    names = {key.replace("_", "-") for key in keys}
    known = {f"--{no}{name}" for name in names for no in ("", "no-")}
    known |= {"--help", "--list-recipes"}
    text = re.sub(r"(?s)```.*?```", "", GUIDE)
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    assert mentioned - known == set()


def test_recipes_figures_and_exit_codes_are_those_of_the_program():
    for name, recipe in utils.RECIPES.items():
        (row,) = re.findall(rf"^\| `{name}` .*$", README, re.M)
        for number in re.findall(r"\d+\.\d+|\d{4,}", recipe.figure):
            assert number in row
    for error in utils.UserError.__subclasses__():
        assert f"| {error.exit_code} |" in README


def test_the_shipped_model_opens_and_has_its_row(tmp_path):
    run = utils.Run.newest(tmp_path)  # no run there
    trained = predict.Trained.load(run, predict.Generate())
    grids = [prior.latent_grid for prior in trained.priors]
    assert grids == trained.vqvae.latent_grids and trained.texture
    ssim = utils.read_evaluation(run)["reconstruction"]["ssim"]
    text = "{:.3f} [{:.3f}, {:.3f}]".format(ssim["mean"], *ssim["ci95"])
    assert f"`{run.path.name}`" in README and text in README


def test_names_of_the_code_exist():
    pattern = r"`(train|predict|dataset|modules|utils)\.(?!py)([\w.]+)"
    for module, path in re.findall(pattern, GUIDE):
        operator.attrgetter(path)(importlib.import_module(module))


def test_outputs_and_scores_are_explained(tiny_run, levels_run):
    runs = tiny_run, levels_run
    files = [p for r in runs for p in r.path.rglob("*") if p.is_file()]
    names = {p.name for p in files if "logs" not in p.parts}
    assert [name for name in names if name not in GUIDE] == []

    def keys_of(value):
        own = value if isinstance(value, dict) else {}
        parts = value if isinstance(value, list) else own.values()
        return set(own).union(*map(keys_of, parts))

    keys = keys_of([*map(utils.read_evaluation, runs)])
    assert [key for key in keys if f"`{key}`" not in GUIDE] == []
    # Of other data, of simulated brains, of more images.
    rare = "data_dir images_seen_in_training images_drawn ventricle_area real "
    rare += "generated rebuilt upper_real all_drawn ratio minutes "
    rare += "images_per_second_trained"
    assert {*utils.metrics_table()} - keys == {*rare.split()}


def test_links_lead_somewhere():
    for path, page in PAGES.items():
        text = re.sub(r"(?ms)^```.*?^```$", "", page)
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            file, _, section = link.partition("#")
            target = path.parent / file if file else path
            assert target.is_file(), f"{path.name}: {link}"
            page = target.read_text("utf-8", "replace")
            heads = re.findall(r"^#+ (.+)$", page, re.M) if section else []
            anchors = [re.sub(r"[^\w -]", "", head).lower() for head in heads]
            anchors = ["", *(anchor.replace(" ", "-") for anchor in anchors)]
            assert section in anchors, f"{path.name}: {link}"


def test_python_snippets_run(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    predict.main(["export", str(tiny_run.path), "exported"])
    scope = {}  # later snippets go on from earlier ones
    for text in code_blocks(GUIDE, "python"):
        text = text.replace(RUN, tiny_run.path.absolute().as_posix())
        exec(compile(text, "guide", "exec"), scope)
