import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glann import storage
from glann.density import Gaussian
from glann.errors import GlannError
from glann.inspection import describe
from glann.pipeline import GLANN, save_sampler
from glann.recipes import make_recipe
from glann.runner import train_glo, train_imle

TINY = {
    "seed": 5,
    "data": {"source": "digits", "limit": 40},
    "glo": {"code_dim": 4, "epochs": 1, "batch_size": 20, "width": 4, "hidden": 8},
    "imle": {"noise_dim": 3, "width": 8, "depth": 1, "epochs": 2, "batch_size": 20},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Runs after stage one, after both, and with a code sampler that isn't trained."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for name, imle in (("half", None), ("whole", TINY["imle"]), ("gauss", {"sampler": "gaussian"})):
        recipe = make_recipe("tiny", {**TINY, "imle": imle or TINY["imle"]})
        found[name] = folder / name
        train_glo(recipe, folder / name, device="cpu", progress=False)
        if imle:
            train_imle(recipe, folder / name, device="cpu", progress=False)
    return found


def rows_of(target: str | Path) -> dict[str, str]:
    rows = describe(target)
    assert all(isinstance(name, str) and isinstance(value, str) for name, value in rows)
    return dict(rows)


def test_a_run_after_stage_one(runs):
    rows = rows_of(runs["half"])
    assert rows["run"] == str(runs["half"])
    assert rows["images"] == "40 of 1×8×8, digits from scikit-learn"
    seconds = storage.read_manifest(runs["half"] / "glo")["seconds"]
    loss = json.loads((runs["half"] / "glo" / "log.jsonl").read_text().splitlines()[-1])["loss"]
    assert rows["stage one"] == f"done, {seconds:.0f} s of training, loss {loss:.4f}"
    assert rows["stage two"] == "not begun"
    assert rows["pipeline"] == "not saved yet"
    assert Path(rows["picture"]).is_file()


def test_a_run_after_both_stages(runs):
    rows = rows_of(runs["whole"])
    assert rows["stage two"].startswith("done, ")
    assert rows["pipeline"] == str(runs["whole"] / "pipeline")
    assert rows["makes"] == "images of 1×8×8 (channels × height × width)"
    assert "code_dim 4" in rows["generator"]
    assert rows["code sampler"] == "imle"
    assert "noise_dim 3" in rows["  settings"]
    assert rows["recipe"] == "tiny, seed 5"
    assert "epochs 1" in rows["  glo"]
    assert rows["trained on"] == "40 images of digits"
    assert rows["  fingerprint"] == storage.read_json(runs["whole"] / "data.json")["fingerprint"]
    assert rows["codes"] == "not saved"
    assert f"torch {torch.__version__}" in rows["versions"]
    pictures = [value for name, value in describe(runs["whole"]) if name == "picture"]
    assert {"samples.png", "side-by-side.png"} <= {Path(path).name for path in pictures}


def test_a_pipeline_is_described_as_in_its_run(runs):
    in_run = describe(runs["whole"])
    alone = describe(runs["whole"] / "pipeline")
    assert alone[0] == ("pipeline", str(runs["whole"] / "pipeline"))
    assert set(alone) <= set(in_run)


def test_a_run_whose_code_sampler_needs_no_training(runs):
    rows = rows_of(runs["gauss"])
    assert rows["stage two"] == "done"
    assert rows["code sampler"] == "gaussian"


def test_a_training_that_was_stopped(tmp_path):
    run = tmp_path / "run"
    storage.write_text(run / "recipe.toml", "seed = 0\n")
    assert rows_of(run)["stage one"] == "not begun"
    (run / "glo").mkdir()
    assert rows_of(run)["stage one"] == "begun, no checkpoint yet"
    content = {"done": False, "step": 30, "steps": 40, "seconds": 12.4}
    storage.save(run / "glo", "glo", content, {"generator": {"w": torch.ones(2)}})
    assert rows_of(run)["stage one"] == "stopped at 75%, 12 s of training"
    storage.write_text(run / "glo" / "log.jsonl", '{"step": 20, "loss": 0.25}\n')
    assert rows_of(run)["stage one"] == "stopped at 75%, 12 s of training, loss 0.2500"
    storage.write_text(run / "glo" / "log.jsonl", '{"step": 20, "loss": 0.25}\n{"st')
    assert rows_of(run)["stage one"] == "stopped at 75%, 12 s of training"


def test_codes_that_were_saved_too_and_the_sizes_of_files(tmp_path, runs):
    pipeline = GLANN.load(runs["whole"])
    codes = torch.randn(250_000, 4)
    GLANN(pipeline.generator, pipeline.sampler, codes).save(tmp_path / "p", with_codes=True)
    rows = rows_of(tmp_path / "p")
    assert rows["codes"] == "saved too"
    assert "(4.00 MB)" in rows["files"]
    assert {"recipe", "trained on", "training"}.isdisjoint(rows)  # it doesn't know


def test_a_code_sampler_by_itself(tmp_path, runs):
    save_sampler(Gaussian().fit(torch.randn(9, 3)), tmp_path / "gaussian")
    assert rows_of(tmp_path / "gaussian")["sampler"] == str(tmp_path / "gaussian")
    rows = rows_of(runs["whole"] / "imle")
    assert rows["imle"] == str(runs["whole"] / "imle")
    assert rows["training"].startswith("done, ")


def test_there_is_no_need_of_torch(runs):
    code = (
        f"import sys; from glann.inspection import describe; describe({str(runs['whole'])!r}); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_study_is_no_run(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "recipe.toml").touch()
    with pytest.raises(GlannError, match=r"is a study's: look at .*report\.html"):
        describe(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(GlannError, match="there is no pipeline"):
        describe(tmp_path / "none")
    with pytest.raises(GlannError, match="holds no saved pipeline"):
        describe(tmp_path)


@pytest.mark.parametrize(
    "content",
    [{}, {"info": 3, "generator": {}}, {"info": {"recipe": {}}, "generator": {}}],
)
def test_a_damaged_pipeline(content, tmp_path):
    storage.save(tmp_path, "pipeline", content, {})
    with pytest.raises(GlannError, match=f"what {tmp_path} says of itself is damaged"):
        describe(tmp_path)


@pytest.mark.parametrize(
    "content",
    [{}, {"done": False, "step": 1, "steps": 0, "seconds": 1}, {"done": True, "seconds": "x"}],
)
def test_a_damaged_stage(content, tmp_path):
    storage.write_text(tmp_path / "recipe.toml", "seed = 0\n")
    storage.save(tmp_path / "glo", "glo", content, {})
    with pytest.raises(GlannError, match=f"what {tmp_path} says of itself is damaged"):
        describe(tmp_path)


def test_damaged_notes_on_the_data(tmp_path):
    storage.write_text(tmp_path / "recipe.toml", "seed = 0\n")
    for data in ("{}", '{"shape": []}', "[]", '{"shape": ["x", 1, 8, 8], "source": 1}'):
        storage.write_text(tmp_path / "data.json", data)
        with pytest.raises(GlannError, match="damaged"):
            describe(tmp_path)
