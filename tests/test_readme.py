"""The README against the program: commands, flags, tables, links, snippets."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

import dataset
import predict
import train
import utils

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"train": train, "predict": predict, "dataset": dataset}
RUN = "runs/NAME"  # what README calls a run folder
SETUP = (
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && "
    ".venv/bin/python "
)
SETTINGS = [utils.Config] + [
    value
    for module in (predict, dataset)
    for value in vars(module).values()
    if dataclasses.is_dataclass(value)
]


def code_blocks(language):
    """Contents of the fenced blocks of a language, "" for unnamed ones."""
    return re.findall(
        rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL
    )


def commands():
    """Every command line of the programs, in blocks and in sentences."""
    spans = [line for block in code_blocks("") for line in block.splitlines()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"(?s)```.*?```", "", README))
    spans += [" ".join(span.split()) for span in inline]
    pattern = r"(?:^|/|\s)python (train|predict|dataset)\.py\b([^|&]*)"
    found = [match for span in spans for match in re.findall(pattern, span)]
    return sorted({(script, line.strip()) for script, line in found})


def table(header):
    """Rows of cells of the table whose first line begins with `header`."""
    lines = README[README.index(header) :].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


class Parsed(Exception):
    """A command line was accepted; nothing is to be run."""


@pytest.fixture
def parse_only(monkeypatch):
    """Let the programs end as soon as their command line is read."""

    def ending(parser):
        def parse_and_end(*args, **kwargs):
            parser(*args, **kwargs)
            raise Parsed

        return parse_and_end

    for name in ("parse", "parse_verbs", "resolve"):
        monkeypatch.setattr(utils, name, ending(getattr(utils, name)))


def test_commands_are_found():
    assert {script for script, _ in commands()} == set(SCRIPTS)
    assert len(commands()) > 20
    assert ("train", "") in commands()


@pytest.mark.parametrize(("script", "line"), commands())
def test_command_parses(script, line, parse_only, tiny_run):
    line = line.replace(RUN, shlex.quote(str(path_of(tiny_run))))
    try:
        SCRIPTS[script].main(shlex.split(line, comments=True))
    except Parsed:
        return
    except SystemExit as end:  # --list-recipes, --help
        assert not end.code
        return
    pytest.fail("the command line was not read with utils")


def path_of(run):
    return Path(getattr(run, "path", run))


def test_two_commands_near_the_top():
    lines = README.splitlines()[:60]
    assert SETUP + "train.py" in lines
    assert SETUP + "-m pytest" in lines


def test_flags_exist():
    names = {f.name for c in SETTINGS for f in dataclasses.fields(c)}
    names |= {
        f"no_{f.name}"
        for c in SETTINGS
        for f in dataclasses.fields(c)
        if isinstance(f.default, bool)
    }
    known = {"--" + name.replace("_", "-") for name in names}
    known |= {"--help", "--list-recipes", "--logdir"}
    for path in (ROOT / "tests" / "benchmarks").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        known |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', text))
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README))
    assert mentioned - known == set()


def test_recipes_as_in_the_program():
    lines = utils.list_recipes().splitlines()[1:]
    expected = [re.split(r" {2,}", line)[:4] for line in lines]
    expected = [[f"`{name}`", *cells] for name, *cells in expected]
    assert table("| recipe | data |") == expected
    figures = [row[0] for row in table("| recipe | figure")]
    assert sorted(figures) == sorted(row[0] for row in expected)


def test_recipe_figures_as_in_the_program():
    text = "\n".join(map(str, table("| recipe | figure")))
    numbers = [
        n
        for recipe in utils.RECIPES.values()
        for n in re.findall(r"\d+\.\d+|\d{3,}", recipe.figure)
    ]
    assert numbers
    assert [n for n in numbers if n not in text] == []


def test_quickstart_as_in_the_program():
    config = utils.resolve([])
    assert f"simulates {config.phantom_subjects} subjects" in README
    assert f"data/simulated-{config.phantom_subjects}`" in README
    assert f"draws {config.num_samples} new grids" in README


def test_dependencies_as_in_requirements():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = {x.split("==")[0] for x in lines if x and x[0] != "#"}
    assert {row[0] for row in table("| package")} == pinned


def test_exit_codes_as_in_the_program():
    classes = utils.UserError.__subclasses__()
    codes = {str(error.exit_code) for error in classes}
    assert codes <= {row[0] for row in table("| code |")}


def test_outputs_are_explained(tiny_run):
    run = path_of(tiny_run)
    files = [p.name for p in run.rglob("*") if p.is_file()]
    # Samples bear their number, evaluations of other data its name; what
    # TensorBoard reads is not for people.
    logs = {p.name for p in run.rglob("logs/**/*")}
    named = re.compile(r"seed\d|evaluation-")
    files = [n for n in files if n not in logs and not named.match(n)]
    assert "evaluation.json" in files
    assert [name for name in files if name not in README] == []


def test_scores_are_explained(tiny_run):
    def keys_of(value):
        if isinstance(value, list):
            return {k for entry in value for k in keys_of(entry)}
        if isinstance(value, dict):
            return set(value).union(*map(keys_of, value.values()))
        return set()

    run = utils.Run.open(path_of(tiny_run))
    explained = re.findall(r"`(\w+)`", str(table("| key |")))
    assert keys_of(utils.read_evaluation(run)) - set(explained) == set()


def test_linked_files_exist():
    text = re.sub(r"(?ms)^```.*?^```$", "", README)
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert len(links) > 3
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_links_to_sections():
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {h.lower().replace(" ", "-") for h in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


def test_no_placeholder_is_left():
    assert re.findall(r"\{\{.*?\}\}", README) == []
    assert "{{" not in README


def test_python_snippets_run(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    predict.main(["export", str(path_of(tiny_run)), "exported"])
    snippets = code_blocks("python")
    assert snippets
    assert any(RUN in text for text in snippets)
    scope = {}  # later snippets go on from earlier ones
    for text in snippets:
        text = text.replace(RUN, path_of(tiny_run).absolute().as_posix())
        exec(compile(text, "README.md", "exec"), scope)
