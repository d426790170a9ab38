"""Exported models, `.keras` files and run folders, opened by somebody else."""

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

import modules
import predict
import utils
from tests.test_readme import RUN, code_blocks

ROOT = Path(predict.__file__).parent
N, SEED, TEMPERATURE = 11, 7, 0.9


def export(run, dest):
    predict.main(["export", str(run.path), str(dest)])


def load_models(run):
    vqvae = utils.load_model(run.vqvae_path)
    return vqvae, utils.load_priors(run, vqvae)


def run_script(code, *arguments, cwd, isolated=False):
    """Run code in a fresh process; isolated: nothing of ours can be found."""
    flags = ["-I"] if isolated else []
    done = subprocess.run(
        [sys.executable, *flags, "-c", code, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def exported(levels_run, tmp_path_factory):
    """Two levels, labels and slice positions."""
    dest = tmp_path_factory.mktemp("export") / "new" / "folder"
    export(levels_run, dest)
    return dest


ELSEWHERE = """
import importlib.util, sys
import numpy as np
import tensorflow as tf

for name in ("modules", "utils", "dataset", "predict"):
    assert importlib.util.find_spec(name) is None, name
source, dest, n, seed, temperature = sys.argv[1:]
model = tf.saved_model.load(source)
given = np.load(dest + "/given.npz")
found = {}
for count in (1, len(given["images"])):
    encoded = model.signatures["encode"](images=given["images"][:count])
    found |= {f"{name}_{count}": grid for name, grid in encoded.items()}
found |= model.signatures["decode"](**encoded)
for label in ("", "NC"):
    drawn = model.signatures["generate"](
        n=tf.constant(int(n)),
        seed=tf.constant(int(seed)),
        temperature=tf.constant(float(temperature)),
        label=tf.constant(label),
    )
    found |= {f"drawn_{label}_{name}": part for name, part in drawn.items()}
for bad in ({"label": "MCI"}, {"n": 0}, {"temperature": 0.0}):
    request = {"n": 1, "seed": 0, "temperature": 1.0, "label": "", **bad}
    try:
        model.generate(*request.values())
    except tf.errors.InvalidArgumentError as error:
        print(*bad, "expected" in str(error))
assert "modules" not in sys.modules
np.savez(dest + "/found.npz", **found)
"""


def test_export_equals_the_models(levels_run, exported, tmp_path):
    vqvae, priors = load_models(levels_run)
    shape = (5, *vqvae.image_size, 1)
    images = np.random.default_rng(0).random(shape, "float32")
    np.savez(tmp_path / "given.npz", images=images)
    arguments = exported, tmp_path, N, SEED, TEMPERATURE
    said = run_script(ELSEWHERE, *arguments, cwd=tmp_path, isolated=True)
    assert said.split("\n")[:3] == ["label True", "n True", "temperature True"]

    found = np.load(tmp_path / "found.npz")
    indices = vqvae.encode(images)
    for level, grid in enumerate(indices, start=1):
        np.testing.assert_array_equal(found[f"indices_{level}_5"], grid)
        assert found[f"indices_{level}_1"].shape == (1, *grid.shape[1:])
    decoded = vqvae.decode_indices(indices)
    np.testing.assert_array_equal(found["images"], decoded)
    for label in ("", "NC"):
        images, grids = modules.generate(
            vqvae,
            priors,
            N,
            SEED,
            temperature=TEMPERATURE,
            label=label or None,
        )
        for level, grid in enumerate(grids, start=1):
            drawn = found[f"drawn_{label}_indices_{level}"]
            np.testing.assert_array_equal(drawn, grid)
        np.testing.assert_array_equal(found[f"drawn_{label}_images"], images)


def test_exported_sampler_is_the_compiled_one(exported):
    """Not a loop of full forward passes: nothing of `call` is in it."""
    model = saved_model_pb2.SavedModel()
    model.ParseFromString((exported / "saved_model.pb").read_bytes())
    functions = model.meta_graphs[0].graph_def.library.function
    compiled = [f for f in functions if f.attr["_XlaMustCompile"].b]
    names = [function.signature.name for function in compiled]
    assert sum("_sample_chunk" in name for name in names) == 2  # a level each
    assert sum("_context_map" in name for name in names) == 2
    assert len(names) == 4


def test_export_says_what_it_is(levels_run, exported):
    about = json.loads((exported / "export.json").read_text(encoding="utf-8"))
    assert about["signatures"] == ["encode", "decode", "generate"]
    assert about["labels"] == {"AD": 0, "NC": 1}
    assert about["latent_grids"] == [[8, 8], [4, 4]]
    assert about["data"]["image_size"] == [32, 32]
    assert about["data"]["simulated"] is False
    assert about["versions"] == levels_run.info["versions"]


def test_export_without_priors(vqvae_run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    export(vqvae_run, tmp_path / "empty")
    assert "signatures encode, decode in" in capsys.readouterr().out
    signatures = tf.saved_model.load(str(tmp_path / "empty")).signatures
    assert set(signatures) == {"encode", "decode", "serving_default"}
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_export_rounds_bfloat16_as_the_models_do(tmp_path):
    """What the levels above add is the part that rounding may change."""
    rng = np.random.default_rng(0)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        vqvae = modules.VQVAE(
            (16, 16),
            levels=2,
            downsampling=2,
            channels=8,
            num_embeddings=16,
            embedding_dim=4,
        )
        grids = vqvae.latent_grids
        priors = [
            modules.PixelCNN(
                16, grid, channels=8, blocks=1, upper_grids=grids[k:]
            )
            for k, grid in enumerate(grids, start=1)
        ]
    finally:
        keras.config.set_dtype_policy("float32")
    for weight in (w for prior in priors for w in prior.weights):
        weight.assign(0.3 * rng.normal(size=weight.shape))
    for level in (1, 2):
        codebook = vqvae.part("quantizer", level).codebook
        codebook.assign(rng.normal(size=codebook.shape))
    images, indices = modules.generate(vqvae, priors, 18, seed=1)

    archive = modules.export_archive(vqvae, priors)
    archive.write_out(str(tmp_path / "export"), verbose=False)
    model = tf.saved_model.load(str(tmp_path / "export"))
    drawn = model.generate(18, 1, 1.0, "")
    for level, grid in enumerate(indices, start=1):
        np.testing.assert_array_equal(drawn[f"indices_{level}"], grid)
    np.testing.assert_array_equal(drawn["images"], images)


def test_positions_in_a_graph_are_those_of_numpy():
    @tf.function
    def positions(numbers):
        numbers = tf.cast(numbers, tf.float64)
        return tf.cast(modules.position_of(numbers), tf.float32)

    found = positions(tf.range(100_000)).numpy()
    np.testing.assert_array_equal(found, modules.slice_positions(100_000))
    assert found[0] == 0.0625 and 0 <= found.min() < found.max() < 1


def test_generate_returns_the_log_probability_of_all_levels(levels_run):
    vqvae, priors = load_models(levels_run)
    positions = np.linspace(0, 1, 5, dtype="float32")
    _, indices, found = modules.generate(
        vqvae,
        priors,
        5,
        label="AD",
        slice_position=positions,
        return_log_prob=True,
    )
    expected = 0
    for level, prior in enumerate(priors):
        expected += prior.log_prob(
            indices[level],
            upper=tuple(indices[level + 1 :]),
            label=np.zeros(5, "int32"),
            slice_position=positions,
        ).numpy().sum(axis=(1, 2))  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# Refused


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_export_replaces_nothing(kind, vqvae_run, tmp_path):
    dest = tmp_path / "dest"
    path = dest if kind == "file" else dest / "notes.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(utils.RunError, match="not an empty folder"):
        export(vqvae_run, dest)
    assert path.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["dest"]


def test_a_failed_export_leaves_nothing(vqvae_run, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils, "write_json", fail)
    with pytest.raises(OSError):
        export(vqvae_run, tmp_path / "dest")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_inside_a_run_is_cleared_away(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left = tmp_path / f"export.tmp-{process.pid}" / "variables"
    left.mkdir(parents=True)
    (left / "variables.index").write_bytes(b"")
    utils.remove_temporary_files(tmp_path.rglob("*.tmp-*"))
    assert list(tmp_path.iterdir()) == []


# The snippets of README, each in a fresh process


def snippet(word, run):
    """The block of Python in README that a word is in."""
    (code,) = (block for block in code_blocks("python") if word in block)
    return code.replace(RUN, run.path.as_posix())


def test_keras_file_opens_as_readme_tells(tiny_run):
    code = snippet('load_model("', tiny_run)
    code += "print(*indices[0].shape, *decoded.shape)"
    said = run_script(code, cwd=ROOT)
    assert said.endswith("\n4 8 8 4 32 32 1\n")


def test_saved_model_opens_as_readme_tells(tiny_run, tmp_path):
    export(tiny_run, tmp_path / "exported")
    code = snippet("saved_model", tiny_run)
    code += "print(*slices.shape, *decoded.shape)"
    found = run_script(code, cwd=tmp_path, isolated=True)
    assert found == "4 32 32 4 32 32 1\n"


def test_run_folder_opens_as_readme_tells(tiny_run):
    code = snippet("read_csv", tiny_run)
    code += "print(len(indices), (split['split'] == 'train').sum())"
    said = run_script(code, cwd=ROOT)
    ssim = utils.read_evaluation(tiny_run)["reconstruction"]["ssim"]["mean"]
    assert said.startswith(f"16 [[8, 8]]\n{ssim}\n")
    assert "val_bits_per_code" in said and said.endswith("\n16 16\n")
