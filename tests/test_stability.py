import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glann import GlannError
from glann.baselines import MODELS
from glann.data import Images
from glann.evaluation.features import make_features
from glann.evaluation.scores import Protocol
from glann.recipes import load_recipe, make_recipe
from glann.settings import check
from glann.storage import fingerprint
from glann.studies.draws import as_it_is, draw, drawn_recipe
from glann.studies.stability import (
    STUDY,
    Stability,
    one_gaussian,
    ratio,
    runs,
    score,
    section,
    summary,
)
from glann.studies.study import Place, load_settings

DRAWN = ("glann", *(name for name in MODELS if name != "began"))
TINY = {
    "glo": {"code_dim": 8, "epochs": 4, "batch_size": 50, "width": 8, "hidden": 32},
    "imle": {"noise_dim": 8, "epochs": 4, "batch_size": 50},
    **{name: {"images_seen": 300, "batch_size": 50} for name in ("ns-gan", "wgan")},
}


@pytest.fixture(scope="module")
def protocol(digits):
    train, test = (
        Images(part, None, "test", fingerprint(part), "", ()) for part in (digits[:90], digits[90:])
    )
    return Protocol(train, test, make_features("pixels", train=train, test=None, device="cpu"))


def all_draws(model, n=200):
    """Every value that was drawn, by setting."""
    found = {}
    for index in range(n):
        for settings in draw(model, index, 0).values():
            for key, value in settings.items():
                found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("model", DRAWN)
def test_draws_are_settings_of_the_model(model):
    recipe = load_recipe("digits")
    for index in range(20):
        drawn = draw(model, index, 3)
        made = drawn_recipe(recipe, model, drawn, 0.1, seed=index)
        sections = dataclasses.replace(
            made,
            compare=dataclasses.replace(made.compare, models=[] if model == "glann" else [model]),
        ).sections()
        assert sections["seed"] == index
        for name, settings in drawn.items():
            assert settings.items() <= sections[name].items()
        if model == "glann":
            for name, part in (("glo", recipe.glo), ("imle", recipe.imle)):
                assert sections[name]["epochs"] == part.epochs / 10
        else:
            whole = recipe.baselines[model].images_seen
            assert sections[model]["images_seen"] == round(whole / 10)


@pytest.mark.parametrize("model", DRAWN)
def test_the_whole_of_a_recipe_as_it_is_is_the_recipe(model):
    recipe = load_recipe("mnist-short")
    assert drawn_recipe(recipe, model, as_it_is(model), 1, recipe.seed) == recipe


@pytest.mark.parametrize("share", [0.1, 0.15, 0.5])
def test_all_lengths_have_the_same_share(share):
    whole = load_recipe("mnist-short")
    glann, gan = (
        drawn_recipe(whole, model, as_it_is(model), share, 0) for model in ("glann", "ns-gan")
    )
    for made, before in (
        (glann.glo.epochs, whole.glo.epochs),
        (glann.glo.feature_images, whole.glo.feature_images),
        (glann.imle.epochs, whole.imle.epochs),
        (glann.finetune.epochs, whole.finetune.epochs),
        (gan.baselines["ns-gan"].images_seen, whole.baselines["ns-gan"].images_seen),
    ):
        assert made / before == pytest.approx(share)
    assert gan.glo == whole.glo


def test_the_least_share_is_in_every_range():
    least = drawn_recipe(load_recipe("mnist-short"), "glann", as_it_is("glann"), 1e-6, 0)
    for part in (least.glo, least.imle, least.finetune):
        check(part)


def test_a_gaussian_on_the_codes_has_no_length_and_no_rate():
    recipe = load_recipe("digits", ["imle.sampler=gaussian"])
    made = drawn_recipe(recipe, "glann", draw("glann", 0, 0), 0.5, 0)
    assert made.imle == recipe.imle
    assert made.glo.epochs == recipe.glo.epochs / 2


@pytest.mark.parametrize("model", DRAWN)
def test_rates_fill_their_three_decades(model):
    rates = {key: values for key, values in all_draws(model).items() if key.endswith("lr")}
    assert len(rates) == (3 if model == "glann" else 1)
    for values in rates.values():
        exponents = np.log10(values)
        assert -5 <= exponents.min() < -4.9
        assert -2.1 < exponents.max() <= -2
        assert np.histogram(exponents, 3, (-5, -2))[0].min() > 40


def test_the_ranges_are_lucics():
    wgan, penalised, r3gan = (all_draws(name) for name in ("wgan", "wgan-gp", "r3gan"))
    assert set(wgan) == {"lr", "beta1", "discriminator_steps", "norm", "clip"}
    assert set(wgan["discriminator_steps"]) == {1, 5}
    assert set(wgan["norm"]) == {"batch", "none"}
    assert 0 <= min(wgan["beta1"]) < 0.05 < 0.95 < max(wgan["beta1"]) < 1
    assert 1e-3 <= min(wgan["clip"]) < 2e-3 < 0.5 < max(wgan["clip"]) <= 1
    assert set(penalised) == set(r3gan) == {"lr", "beta1", "discriminator_steps", "penalty_weight"}
    assert 0.1 <= min(penalised["penalty_weight"]) < 0.2
    assert 50 < max(penalised["penalty_weight"]) <= 100
    assert 0.1 / 40 <= min(r3gan["penalty_weight"]) < max(r3gan["penalty_weight"]) <= 100 / 40


def test_three_rates_of_glann_are_drawn_independently():
    drawn = [draw("glann", index, 0) for index in range(300)]
    rates = [[d["glo"]["generator_lr"], d["glo"]["code_lr"], d["imle"]["lr"]] for d in drawn]
    correlations = np.corrcoef(np.log10(rates).T)
    assert np.abs(correlations - np.eye(3)).max() < 0.2


def test_a_draw_follows_from_seed_model_and_index():
    assert draw("ns-gan", 7, 0) == draw("ns-gan", 7, 0)
    others = [
        draw("ns-gan", 8, 0),
        draw("ns-gan", 7, 1),
        {"ns-gan": draw("mm-gan", 7, 0)["mm-gan"]},
    ]
    assert all(other != draw("ns-gan", 7, 0) for other in others)


@pytest.mark.parametrize("model", ["glann", "ns-gan"])
def test_a_score_repeats(model, protocol):
    recipe = drawn_recipe(make_recipe("tiny", TINY), model, draw(model, 0, 0), 0.5, 1)
    first, second = (score(recipe, model, protocol, "cpu") for _ in range(2))
    assert first == second
    assert first["fid_over_floor"] == pytest.approx(first["fid"] / protocol.floor)


def refuse(*given, **named):
    raise GlannError("the disk is full")


def test_a_loss_that_is_not_finite_is_a_result_and_another_error_is_not(protocol, monkeypatch):
    recipe = make_recipe("tiny", TINY | {"wgan": {**TINY["wgan"], "lr": 1e30, "clip": 0.0}})
    row = score(recipe, "wgan", protocol, "cpu")
    assert "not finite" in row["failed"]
    assert "fid" not in row
    monkeypatch.setattr("glann.baselines.GAN.fit", refuse)
    with pytest.raises(GlannError, match="the disk is full"):
        score(recipe, "wgan", protocol, "cpu")


def test_one_gaussian_has_the_pixels_moments(digits, protocol):
    samples = one_gaussian(digits, 4000)
    assert samples.shape == (4000, 1, 8, 8)
    assert samples.dtype == torch.uint8
    means = [images.float().mean(0) for images in (samples, digits)]
    assert (means[0] - means[1]).abs().mean() < 10  # of 255; clipping moves it a little
    noise = torch.randint_like(digits, 0, 256)
    assert ratio(samples, protocol)["fid"] < ratio(noise, protocol)["fid"]


def test_a_summary_by_hand():
    rows = [{"fid_over_floor": value} for value in (3.0, 1.0, 10.0, 4.0)] + [{"failed": "NaN"}]
    found = summary(rows, bound=5)
    assert found == {
        "runs": 5,
        "failed": 2,
        "share": 0.4,
        "best": 1.0,
        "lower": 3.0,
        "median": 4.0,
        "upper": 10.0,
        "worst": math.inf,
    }


@pytest.mark.parametrize("finite", range(4))
def test_quantiles_of_runs_that_mostly_failed_are_infinite(finite):
    rows = [{"fid_over_floor": 2.0}] * finite + [{"failed": "NaN"}] * (4 - finite)
    found = summary(rows, bound=5)
    inner = {"lower": 0.75, "median": 1.5, "upper": 2.25}
    expected = {name: 2.0 if place <= finite - 1 else math.inf for name, place in inner.items()}
    assert {name: found[name] for name in inner} == expected


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30))
def test_quantiles_are_numpys(values):
    found = summary([{"fid_over_floor": value} for value in values], 10)
    for name, place in {"best": 0, "lower": 0.25, "median": 0.5, "upper": 0.75, "worst": 1}.items():
        assert found[name] == pytest.approx(np.quantile(values, place), rel=1e-9, abs=1e-9)


RECIPE = """
[data]
source = "digits"
test_fraction = 0.5
[glo]
code_dim = 8
epochs = 20
batch_size = 50
width = 8
hidden = 32
[imle]
noise_dim = 8
epochs = 20
batch_size = 50
[ns-gan]
images_seen = 3000
batch_size = 50
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Settings and rows of a tiny study."""
    folder = tmp_path_factory.mktemp("stability")
    (folder / "tiny.toml").write_text(RECIPE)
    settings = Stability(
        recipe=str(folder / "tiny.toml"), models=["ns-gan", "glann"], draws=2, share=0.1
    )
    place = Place(folder, folder, None, "cpu")
    rows = [
        {"key": run.key, **run.arguments, **run.function(place, **run.arguments)}
        for run in runs(settings)
    ]
    return settings, rows


def test_a_row_for_each_draw(study):
    _, rows = study
    keys = [
        "one-gaussian",
        "ns-gan-recipe",
        "glann-recipe",
        "ns-gan-0",
        "glann-0",
        "ns-gan-1",
        "glann-1",
    ]
    assert [row["key"] for row in rows] == keys
    assert rows[0]["fid_over_floor"] == pytest.approx(rows[0]["fid"] / rows[0]["floor"])
    for row in rows[3:]:
        assert row["drawn"] == draw(row["model"], row["index"], 0)
        assert row["fid"] > 0


def test_the_section_counts_what_is_worse_than_one_gaussian(study, tmp_path):
    settings, rows = study
    made = section(settings, rows, tmp_path)
    bound = rows[0]["fid_over_floor"]
    for name, *cells in made.tables[0].rows:
        model = {"GLANN": "glann", "non-saturating GAN": "ns-gan"}[name]
        drawn = [row for row in rows if row.get("model") == model and "index" in row]
        worse = [row for row in drawn if row["fid_over_floor"] > bound]
        assert cells[0] == f"{len(worse)} of 2"
    assert f"above {bound:.3g}, that of one Gaussian" in made.paragraphs[0]
    assert "With 2 draws" in made.paragraphs[1]
    assert made.paragraphs[1].endswith("up to 35%.")
    set_bound = dataclasses.replace(settings, bound=1e9)
    assert [row[1] for row in section(set_bound, rows, tmp_path).tables[0].rows] == ["0 of 2"] * 2


def test_failures_of_runs_that_were_not_slow_are_counted_apart(tmp_path):
    models = ["glann", "ns-gan"]
    rows = [{"key": "one-gaussian", "fid_over_floor": 20.0}]
    rows += [{"key": f"{m}-recipe", "model": m, "fid_over_floor": 1.0} for m in models]
    for model, rates, ratios in (
        ("glann", [1e-5, 1e-4, 1e-3], [90.0, 3.0, 1.0]),
        ("ns-gan", [1e-5, 2e-4, 1e-2], [90.0, 9.0, 95.0]),
    ):
        section_of, setting = ("glo", "generator_lr") if model == "glann" else (model, "lr")
        for index, (rate, found) in enumerate(zip(rates, ratios, strict=True)):
            drawn = {section_of: {setting: rate}}
            if model == "glann":
                drawn["imle"] = {"lr": 1e-5}
            row = {"key": f"{model}-{index}", "model": model, "index": index, "drawn": drawn}
            rows.append({**row, "fid_over_floor": found, "cpu_seconds": 1.0})
    made = section(Stability(models=models, draws=3), rows, tmp_path)
    table = made.tables[0]
    assert table.head[-1] == "failed, rate ≥ 10⁻⁴"
    assert [(row[0], row[1], row[-1]) for row in table.rows] == [
        ("GLANN", "1 of 3", "0 of 2"),
        ("non-saturating GAN", "2 of 3", "1 of 2"),
    ]
    assert "GLANN (1 of 3 runs, median FID ÷ floor 3) is best" in made.finding


def test_a_run_that_was_not_finite_is_shown_as_failed(study, tmp_path):
    settings, rows = study
    broken = [
        {**{k: v for k, v in row.items() if not k.startswith("fid")}, "failed": "not finite"}
        if row["key"] == "glann-1"
        else row
        for row in rows
    ]
    made = section(dataclasses.replace(settings, bound=1e9), broken, tmp_path)
    (glann,) = (row for row in made.tables[0].rows if row[0] == "GLANN")
    assert glann[6] == f"{rows[2]['fid_over_floor']:.3g}"
    assert glann[1:3] == ["1 of 2", "50%"]
    assert glann[5] == "inf"


@pytest.mark.parametrize("quick", [False, True])
def test_the_settings_that_ship(quick):
    settings = load_settings(STUDY, quick=quick)
    assert len(runs(settings)) == 1 + (1 + settings.draws) * len(settings.models)
