"""A recipe's models for studies: trained once, where `glann compare` keeps them."""

import math

import pytest
import torch

from glann import runner
from glann.density import Mixture
from glann.studies import likelihood, support
from glann.studies.study import Place
from glann.studies.trained import trained

RECIPE = """
seed = 3
[data]
source = "digits"
test_fraction = 0.3
[glo]
code_dim = 8
epochs = 1
width = 8
hidden = 32
[imle]
noise_dim = 8
width = 32
depth = 2
epochs = 1
[ns-gan]
images_seen = 640
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of all runs, with a recipe."""
    made = tmp_path_factory.mktemp("runs")
    (made / "tiny.toml").write_text(RECIPE)
    return made


@pytest.fixture
def place(folder):
    return Place(folder / "study-x", folder, key="x")


@pytest.mark.parametrize("model", ["glann", "ns-gan"])
def test_a_model_is_trained_once_in_the_recipe_s_run(place, model, monkeypatch):
    recipe = str(place.runs / "tiny.toml")
    first = trained(place, recipe, model, 0).sample(4, 0)
    part = "pipeline" if model == "glann" else f"baselines/{model}/pipeline"
    assert (place.runs / "tiny" / part).is_dir()
    other = trained(place, recipe, model, 1).sample(4, 0)
    assert (place.runs / "tiny" / "seeds" / "4" / part).is_dir()
    assert not first.equal(other)
    monkeypatch.setattr(runner, "train_glo", None)
    assert trained(place, recipe, model, 0).sample(4, 0).equal(first)


def test_the_mixture_is_on_the_codes_of_glann_s_stage_one(place, monkeypatch):
    recipe = str(place.runs / "tiny.toml")
    trained(place, recipe, "glann", 0)
    generator, codes, _ = runner.load_stage_one(place.runs / "tiny")
    monkeypatch.setattr(runner, "train_glo", None)
    made = trained(place, recipe, "mixture", 0)
    assert made.sampler.sample(9, 1).equal(Mixture().fit(codes, seed=3).sample(9, 1))
    assert all(map(torch.equal, made.generator.parameters(), generator.parameters()))


def test_likelihood_under_training_images_leaves_out_those_that_choose_the_width(place):
    recipe = str(place.runs / "tiny.toml")
    row = likelihood.images_row(
        place, recipe=recipe, model="floor", seed=0, samples=2000, validation=1
    )
    assert row["sigma"] > min(likelihood.WIDTHS)  # the best for an image that is among the kernels
    assert math.isfinite(row["likelihood"])


def test_runs_side_by_side_never_train_the_same_stage_one(place):
    recipe = str(place.runs / "tiny.toml")
    models = ["glann", "floor", "mixture", "vae"]
    settings = likelihood.LikelihoodSettings(densities=[], recipe=recipe, models=models, seeds=2)
    settings.samples = settings.validation = 100
    runs = likelihood.STUDY.runs(settings)
    trains_it = [run for run in runs if run.arguments.get("model") not in ("floor", "vae")]
    assert [run.arguments["seed"] for run in trains_it] == [0, 1]
    rows = trains_it[0].function(place, **trains_it[0].arguments)
    assert [row["model"] for row in rows] == ["mixture", "glann"]
    alone = likelihood.images_row(place, model="glann", **trains_it[0].arguments)
    assert rows[1] == {"model": "glann", **alone}


def test_rows_of_its_samples(place):
    recipe = str(place.runs / "tiny.toml")
    row = support.images_row(place, recipe=recipe, model="glann", seed=0)
    assert 0 <= row["recall"] <= 1
    assert (place.folder / row["closest"]).is_file()
    row = likelihood.images_row(
        place, recipe=recipe, model="glann", seed=0, samples=300, validation=100
    )
    assert math.isfinite(row["likelihood"])
    assert row["error"] > 0
    assert row["sigma"] in likelihood.WIDTHS
    assert row["test_images"] == 539
