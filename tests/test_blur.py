import dataclasses

import pytest
import torch

from glann import GLANN, GLO, GlannError, runner
from glann.baselines import PixelIMLE
from glann.data import load
from glann.evaluation.sharpness import laplacian_energy, relative_sharpness
from glann.images import read_image
from glann.recipes import load_recipe
from glann.studies import blur
from glann.studies.blur import STUDY, Blur, findings, floor, runs, section, sharpness
from glann.studies.study import Place, load_settings

RECIPE = """
[data]
source = "digits"
test_fraction = 0.3
[glo]
code_dim = 8
epochs = 3
batch_size = 64
width = 8
hidden = 32
[imle]
noise_dim = 8
width = 32
depth = 2
epochs = 3
batch_size = 64
[pixel-imle]
images_seen = 2000
batch_size = 64
subset = 300
"""


def rows_of(settings, folder):
    rows = []
    for run in runs(settings):
        place = Place(folder / "study-blur", folder, key=run.key)
        made = run.function(place, **run.arguments)
        rows += [{"key": run.key, **row} for row in (made if isinstance(made, list) else [made])]
    return rows


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Settings, rows and the folder of all runs of a tiny study."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.toml").write_text(RECIPE)
    settings = Blur(recipe=str(folder / "tiny.toml"), models=["pixel-imle"], seeds=1)
    return settings, rows_of(settings, folder), folder


def test_a_row_for_each_model_and_stage(study):
    _, rows, folder = study
    assert [row["model"] for row in rows] == ["floor", "reconstructions", "glann", "pixel-imle"]
    for row in rows:
        assert row["sharpness"] > 0
        assert read_image(folder / "study-blur" / row["picture"]).ndim == 3


def test_training_images_are_as_sharp_as_test_images(study):
    assert study[1][0]["sharpness"] == pytest.approx(1, abs=0.1)


def test_some_training_images_and_codes_are_of_all_classes(study, monkeypatch):
    settings, _, folder = study
    recipe = load_recipe(settings.recipe)
    images = load(recipe.data).images
    ordered = images[(images.float().diff(dim=-1).square().mean((1, 2, 3))).argsort()]
    test = load(recipe.data, split="test").images
    monkeypatch.setattr(blur, "_images", lambda *given: (ordered, test))
    place = Place(folder / "study-blur", folder, key="some")
    row = floor(place, recipe=settings.recipe, samples=300)
    assert row["sharpness"] == pytest.approx(1, abs=0.1)
    shown = []
    monkeypatch.setattr(GLANN, "reconstruct", lambda self, which: shown.append(which) or test)
    sharpness(place, recipe=settings.recipe, samples=300, share=1, model="glann", seed=0)
    assert len(set(shown[0].tolist())) == 300
    assert shown[0].max() > 1000


def test_rows_are_of_samples_beside_test_images(study):
    settings, rows, folder = study
    recipe = load_recipe(settings.recipe)
    pipeline = runner.trained(recipe, folder / "tiny", device="cpu", progress=False)
    test = load(recipe.data, split="test").images
    expected = relative_sharpness(real=test, fake=pipeline.sample(len(test), 0))
    assert rows[2]["sharpness"] == expected
    codes = torch.arange(len(pipeline.codes))
    sharp = laplacian_energy(pipeline.reconstruct(codes)) / laplacian_energy(test)
    assert rows[1]["sharpness"] == pytest.approx(sharp)


def test_what_is_trained_is_only_scored(study, monkeypatch):
    settings, rows, folder = study

    def fail(*args, **kwargs):
        raise AssertionError("trained again")

    for kind in (GLO, PixelIMLE):
        monkeypatch.setattr(kind, "_train", fail)
    assert rows_of(settings, folder) == rows


def test_the_recipe_of_the_run_stays_as_it_was(study):
    settings, _, folder = study
    there = folder / "tiny" / "recipe.toml"
    assert there.read_text() == load_recipe(settings.recipe).to_toml()


def test_shorter_trainings_do_not_touch_those_of_the_recipe(study, monkeypatch):
    settings, _, folder = study
    before = {path: path.stat().st_mtime_ns for path in (folder / "tiny").rglob("*")}
    rows_of(Blur(recipe=settings.recipe, models=["pixel-imle"], seeds=1, share=0.5), folder)
    assert {path: path.stat().st_mtime_ns for path in (folder / "tiny").rglob("*")} == before
    trained = {path.name for path in (folder / "study-blur" / "training").iterdir()}
    assert trained == {"glann-0", "pixel-imle-0"}


def test_another_share_is_another_training_and_a_known_one_is_not_trained_again(study, monkeypatch):
    settings, _, folder = study
    half, less = (dataclasses.replace(settings, share=share) for share in (0.5, 0.4))
    rows = rows_of(half, folder)
    assert all(a != b for a, b in zip(rows[1:], rows_of(less, folder)[1:], strict=True))
    for kind in (GLO, PixelIMLE):
        monkeypatch.setattr(kind, "_train", None)
    assert rows_of(half, folder) == rows


def test_the_section_shows_each_model_with_its_samples(study):
    settings, rows, folder = study
    made = section(settings, rows, folder)
    assert f"GLANN {rows[2]['sharpness']:.2f}, IMLE" in made.finding
    assert [picture.path for picture in made.pictures] == [row["picture"] for row in rows]
    assert [picture.ours for picture in made.pictures] == [False, False, True, False]
    assert len(made.tables[0].rows) == 4
    twice = section(settings, [*rows, rows[2] | {"sharpness": rows[2]["sharpness"] + 2}], folder)
    assert f"GLANN {rows[2]['sharpness'] + 1:.2f} ± 1.41" in twice.finding


def test_trainings_that_failed_are_counted_in_the_table_s_note(study):
    settings, rows, folder = study
    assert "left out" not in section(settings, rows, folder).tables[0].note
    failed = {"key": "glann-1", "model": "glann", "seed": 1, "failed": "the loss is not finite"}
    vae = failed | {"key": "vae-0", "model": "vae"}
    made = section(settings, [*rows, failed, vae], folder)
    assert made.tables[0].note.endswith("are left out: GLANN 1 of 2, VAE 1 of 1.")
    assert made.tables[0].rows == section(settings, rows, folder).tables[0].rows


@pytest.mark.parametrize("quick", [False, True])
def test_the_settings_that_ship(quick):
    settings = load_settings(STUDY, quick=quick)
    assert len(runs(settings)) == 1 + settings.seeds * (1 + len(settings.models))


def test_findings_by_hand():
    rows = [{"model": "a", "sharpness": 1.0}, {"model": "b", "sharpness": 0.5}]
    rows.append({"model": "a", "sharpness": 3.0})
    assert findings(rows) == {"a": (2.0, pytest.approx(2**0.5)), "b": (0.5, None)}


def test_without_test_images_it_says_so(tmp_path):
    (tmp_path / "tiny.toml").write_text(RECIPE.replace("test_fraction = 0.3", ""))
    with pytest.raises(GlannError, match=r"hold some out \(data.test_fraction\)"):
        floor(Place(tmp_path, tmp_path), recipe=str(tmp_path / "tiny.toml"), samples=10)
