import pytest
import torch

from glann import GlannError, runner
from glann.data import load
from glann.evaluation.sharpness import laplacian_energy, relative_sharpness
from glann.images import read_image
from glann.recipes import make_recipe
from glann.studies.blur import Blur, findings, floor_row, model_rows

SMALL = {"width": 8, "hidden": 32, "batch_size": 64}
RECIPE = {
    "data": {"source": "digits", "test_fraction": 0.3},
    "glo": {"code_dim": 8, "epochs": 3, **SMALL},
    "imle": {"noise_dim": 8, "width": 32, "depth": 2, "epochs": 3, "batch_size": 64},
    "pixel-imle": {"images_seen": 2000, "batch_size": 64, "subset": 300},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Rows of a tiny study, and its folder."""
    folder = tmp_path_factory.mktemp("blur")
    recipe, settings = make_recipe("tiny", RECIPE), Blur()
    rows = [floor_row(settings, recipe, None, folder)]
    for model in ("glann", "pixel-imle"):
        rows += model_rows(settings, recipe, model, folder / "run", None, "cpu", folder)
    return rows, folder, recipe


def test_a_row_for_each_model_and_stage(study):
    rows, folder, _ = study
    assert [row["model"] for row in rows] == ["floor", "reconstructions", "glann", "pixel-imle"]
    for row in rows:
        assert row["sharpness"] > 0
        assert read_image(folder / row["picture"]).ndim == 3


def test_training_images_are_as_sharp_as_test_images(study):
    assert study[0][0]["sharpness"] == pytest.approx(1, abs=0.1)


def test_rows_are_of_samples_beside_test_images(study):
    rows, folder, recipe = study
    pipeline = runner.trained(recipe, folder / "run", device="cpu", progress=False)
    test = load(recipe.data, split="test").images
    expected = relative_sharpness(real=test, fake=pipeline.sample(len(test), 0))
    assert rows[2]["sharpness"] == expected
    codes = torch.arange(len(pipeline.codes))
    sharp = laplacian_energy(pipeline.reconstruct(codes)) / laplacian_energy(test)
    assert rows[1]["sharpness"] == pytest.approx(sharp)


def test_what_is_trained_is_only_scored(study, monkeypatch):
    rows, folder, recipe = study

    def fail(*args, **kwargs):
        raise AssertionError("trained again")

    for kind in (type(recipe.glo), type(recipe.baselines["pixel-imle"])):
        monkeypatch.setattr(kind, "_train", fail)
    again = [
        row
        for model in ("glann", "pixel-imle")
        for row in model_rows(Blur(), recipe, model, folder / "run", None, "cpu", folder)
    ]
    assert again == rows[1:]


def test_findings_by_hand():
    rows = [{"model": "a", "sharpness": 1.0}, {"model": "b", "sharpness": 0.5}]
    rows.append({"model": "a", "sharpness": 3.0})
    assert findings(rows) == {"a": (2.0, pytest.approx(2**0.5)), "b": (0.5, 0.0)}


def test_without_test_images_it_says_so(tmp_path):
    recipe = make_recipe("tiny", {**RECIPE, "data": {"source": "digits"}})
    with pytest.raises(GlannError, match=r"hold some out \(data.test_fraction\)"):
        floor_row(Blur(), recipe, None, tmp_path)
