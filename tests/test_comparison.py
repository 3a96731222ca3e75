"""The comparison: what is trained, what is scored, what is kept."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from glann import cli, comparison, runner, storage
from glann.baselines import MODELS
from glann.comparison.budgets import with_budget
from glann.comparison.results import identity_of, keys_of
from glann.data import Data, Images, load
from glann.density import Mixture
from glann.errors import GlannError
from glann.evaluation.features import make_features
from glann.evaluation.scores import FLOORS, Protocol, scores
from glann.images import read_image
from glann.randomness import permutation
from glann.recipes import make_recipe

CONTENT = {
    "data": {"source": "digits", "limit": 240, "test_fraction": 0.3},
    "glo": {"code_dim": 6, "epochs": 3, "batch_size": 32, "width": 8, "hidden": 32},
    "imle": {"noise_dim": 6, "width": 16, "depth": 1, "epochs": 2, "batch_size": 32},
    "compare": {"models": ["ns-gan", "vae"], "features": "pixels"},
    "ns-gan": {"images_seen": 600},
    "vae": {"images_seen": 600},
}


def recipe_with(**compare):
    return make_recipe("tiny", CONTENT | {"compare": CONTENT["compare"] | compare})


def run(folder, recipe=None, **options):
    said = []
    report = comparison.compare(
        recipe or recipe_with(),
        folder,
        command="glann compare tiny",
        progress=False,
        say=said.append,
        **options,
    )
    return json.loads((folder / "compare/results.json").read_text()), report, said


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished comparison.  Don't change it."""
    folder = tmp_path_factory.mktemp("compared")
    results, report, said = run(folder)
    return folder, results, report, said


def never(*arguments, **options):
    raise AssertionError("this was done already")


def rows_of(results):
    return {(row["model"], row["seed"]): row for row in results["rows"]}


def test_a_row_for_the_floor_each_stage_and_each_model(done):
    _, results, report, said = done
    models = [row["model"] for row in results["rows"]]
    stages = ["reconstructions", "gaussian", "mixture", "glann"]
    assert models == ["floor", *stages, "ns-gan", "vae"]
    assert report.is_file()
    for row in results["rows"]:
        assert row["n"] == 240
        assert row["split"] == "test"
        assert row["features"] == "pixels"
        assert np.isfinite([row["fid"], row["kid"], row["density"]]).all()
        for share in ("precision", "recall", "coverage", "f8", "f1_8"):
            assert 0 <= row[share] <= 1
        floor = results["rows"][0]["fid"]
        assert row["fid_over_floor"] == pytest.approx(row["fid"] / floor)
    text = "\n".join(said)
    assert "GLANN" in text
    assert "× floor" in text


def test_what_each_took_is_told(done):
    folder, results, _, _ = done
    rows = rows_of(results)
    assert rows["glann", 0]["images_seen"] == 3 * 240
    assert rows["glann", 0]["codes_seen"] == 2 * 240
    assert rows["glann", 0]["steps"] == 5 * 8
    gan = storage.read_manifest(folder / "baselines/ns-gan")
    assert rows["ns-gan", 0]["steps"] == gan["steps"]
    assert rows["ns-gan", 0]["seconds"] == gan["seconds"]
    assert abs(rows["ns-gan", 0]["images_seen"] - 600) <= 64
    # equal generators: GLANN has its mapper besides, and each training code's detail
    more = rows["glann", 0]["parameters"] - rows["ns-gan", 0]["parameters"]
    assert more == (6 + 6) * 16 + 2 * 16 + 16 * 6 + 6 + 2 * 240 * 6
    assert rows["ns-gan", 0]["parameters"] == rows["vae", 0]["parameters"]


def test_curves_go_over_the_training(done):
    _, results, _, _ = done
    rows = rows_of(results)
    for model in ("glann", "ns-gan", "vae"):
        curve = rows[model, 0]["curve"]
        seconds = [point["seconds"] for point in curve]
        assert len(curve) == 10
        assert seconds == sorted(seconds)
        assert seconds[-1] <= rows[model, 0]["seconds"] + 1e-3
        assert all(point["fid"] > 0 for point in curve)
        assert rows[model, 0]["curve_samples"] == 1000
    before = storage.read_manifest(done[0] / "glo")["seconds"]
    assert rows["glann", 0]["curve"][0]["seconds"] > before  # stage one has no samples


def test_a_generator_that_learned_on_is_compared_with_stage_one_s_as_it_was(done, tmp_path):
    folder, results, _, _ = done
    shutil.copytree(folder, tmp_path / "tuned")
    recipe = make_recipe("tiny", CONTENT | {"finetune": {"epochs": 5, "batch_size": 32}})
    before, after = rows_of(results), rows_of(run(tmp_path / "tuned", recipe)[0])
    for model in ("floor", "reconstructions", "gaussian", "mixture"):
        assert after[model, 0]["fid"] == pytest.approx(before[model, 0]["fid"]), model
    glann, plain = after["glann", 0], before["glann", 0]
    assert glann["fid"] != pytest.approx(plain["fid"])
    assert glann["images_seen"] == (3 + 5) * 240
    assert glann["codes_seen"] == 2 * 240
    *curve, last = glann["curve"]
    assert [point["fid"] for point in curve] == pytest.approx([p["fid"] for p in plain["curve"]])
    assert last["seconds"] == pytest.approx(glann["seconds"])
    assert last["fid"] != pytest.approx(curve[-1]["fid"])


def test_a_mixture_is_fitted_once_for_a_stage_one(done, tmp_path, monkeypatch):
    shutil.copytree(done[0], tmp_path / "run")
    kept, fitted = tmp_path / "run/mixture", []
    fit = Mixture.fit

    def counted(self, codes, **options):
        fitted.append(codes)
        return fit(self, codes, **options)

    monkeypatch.setattr(Mixture, "fit", counted)
    codes = runner.stage_one_of(tmp_path / "run").codes
    first = runner.mixture_of(tmp_path / "run", codes, 0)
    assert not fitted  # the comparison left it there
    assert torch.equal(first.sample(50), Mixture().fit(codes, seed=0).sample(50))

    for others, seed in ((codes, 1), (codes.flip(0), 1), (codes, 0)):
        fitted.clear()
        again = runner.mixture_of(tmp_path / "run", others, seed)
        assert len(fitted) == 1
        assert torch.equal(
            again.sample(9), runner.mixture_of(tmp_path / "run", others, seed).sample(9)
        )
        assert len(fitted) == 1
    next(kept.glob("*.safetensors")).write_bytes(b"")
    assert torch.equal(first.sample(9), runner.mixture_of(tmp_path / "run", codes, 0).sample(9))
    # A pipeline without its run gets one, too, and keeps nothing.
    shutil.copytree(done[0] / "pipeline", tmp_path / "alone/pipeline")
    assert torch.equal(first.sample(9), runner.mixture_of(tmp_path / "alone", codes, 0).sample(9))
    assert not (tmp_path / "alone/mixture").exists()


@pytest.mark.parametrize("loss", ["contrastive", "laplacian"])
def test_a_budget_keeps_the_proportions_of_the_recipe(loss, tmp_path):
    glo = CONTENT["glo"] | {"loss": loss, "feature_images": 480}
    finetune = {"epochs": 1, "batch_size": 32}
    recipe = make_recipe("tiny", CONTENT | {"glo": glo, "finetune": finetune})
    train = load(recipe.data, None)
    short = with_budget(recipe, 0.5, tmp_path, train, "cpu")
    long = with_budget(recipe, 50, tmp_path, train, "cpu")
    for change in (short, long):
        grown = change.glo.epochs / recipe.glo.epochs
        assert change.imle.epochs / recipe.imle.epochs == pytest.approx(grown, rel=0.05)
        assert change.finetune.epochs == pytest.approx(grown, rel=0.05)
        if loss == "contrastive":
            assert change.glo.feature_images == pytest.approx(480 * grown, rel=0.05)
    assert long.glo.epochs > 10 * short.glo.epochs  # the metric is found in any


def test_pictures_and_tables(done):
    folder, results, _, _ = done
    for row in results["rows"]:
        assert read_image(folder / "compare" / row["samples"]).shape[0] == 1
        if row["model"] != "floor":
            assert (folder / "compare" / row["closest"]).is_file()
            assert 0 <= row["memorisation"]["share_closer_to_train"] <= 1
    with (folder / "compare/results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [line["model"] for line in table] == [row["model"] for row in results["rows"]]
    assert "GLANN" in (folder / "compare/results.md").read_text()


def test_again_trains_and_scores_nothing(done, tmp_path, monkeypatch):
    folder = tmp_path / "again"
    shutil.copytree(done[0], folder)

    monkeypatch.setattr(comparison, "pipeline_rows", never)
    monkeypatch.setattr(runner, "train_baseline", never)
    monkeypatch.setattr(runner, "trained", never)
    results, _, _ = run(folder)
    assert results["rows"] == done[1]["rows"]


def test_models_and_seeds_are_added(done, tmp_path):
    folder = tmp_path / "more"
    shutil.copytree(done[0], folder)
    results, _, _ = run(folder, recipe_with(models=["vae"], seeds=2))
    rows = rows_of(results)
    assert {model for model, seed in rows if seed == 1} == {
        "reconstructions",
        "gaussian",
        "mixture",
        "glann",
        "vae",
    }
    assert rows["ns-gan", 0] == rows_of(done[1])["ns-gan", 0]  # what was there is kept
    assert rows["vae", 0] == rows_of(done[1])["vae", 0]
    assert rows["vae", 1]["fid"] != rows["vae", 0]["fid"]
    assert (folder / "seeds/1/pipeline/manifest.json").is_file()


def test_rows_without_their_runs_are_kept(done, tmp_path):
    """Results that were copied from another machine are gone on with."""
    shutil.copytree(done[0] / "compare", tmp_path / "compare")
    results, _, _ = run(tmp_path)
    assert results["rows"] == done[1]["rows"]
    assert not (tmp_path / "baselines").exists()


def test_other_settings_are_trained_anew(done, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(done[0] / "compare", folder / "compare")
    content = CONTENT | {"vae": {"images_seen": 900}}
    results, _, _ = run(folder, make_recipe("tiny", content))
    rows, before = rows_of(results), rows_of(done[1])
    assert rows["ns-gan", 0] == before["ns-gan", 0]
    assert rows["vae", 0]["images_seen"] > before["vae", 0]["images_seen"]
    assert len(rows) == len(before)


def test_a_mean_is_over_seeds_of_the_same_settings(done, tmp_path):
    shutil.copytree(done[0], tmp_path / "x")
    two, _, _ = run(tmp_path / "x", recipe_with(models=["vae"], seeds=2))
    for part in ("baselines/vae", "seeds"):
        shutil.rmtree(tmp_path / "x" / part)
    content = CONTENT | {"vae": {"images_seen": 900}}
    results, _, _ = run(tmp_path / "x", make_recipe("tiny", content))
    rows, before = rows_of(results), rows_of(two)
    assert before.keys() - rows.keys() == {("vae", 1)}
    assert rows["vae", 0]["identity"] != before["vae", 0]["identity"]
    assert rows["glann", 1] == before["glann", 1]


def test_a_training_that_fails_takes_its_references_along(done, tmp_path):
    shutil.copytree(done[0] / "compare", tmp_path / "compare")
    content = CONTENT | {"imle": {**CONTENT["imle"], "lr": 1e30}}
    results, _, _ = run(tmp_path, make_recipe("tiny", content))
    rows, before = rows_of(results), rows_of(done[1])
    assert "failed" in rows["glann", 0]
    stages = {(model, 0) for model in ("reconstructions", "gaussian", "mixture")}
    assert before.keys() - rows.keys() == stages


def test_a_pipeline_that_was_saved_anew_is_scored_anew(done, tmp_path):
    shutil.copytree(done[0], tmp_path / "x")
    recipe = recipe_with()
    runner.train_imle(recipe, tmp_path / "x", details=20, progress=False)
    after, before = rows_of(run(tmp_path / "x", recipe)[0]), rows_of(done[1])
    assert after["glann", 0]["parameters"] < before["glann", 0]["parameters"]
    assert after["glann", 0]["fid"] != before["glann", 0]["fid"]
    assert after["vae", 0] == before["vae", 0]


@pytest.mark.parametrize("restart", [False, True])
def test_two_comparisons_in_a_folder_would_lose_each_others_rows(done, tmp_path, restart):
    shutil.copytree(done[0] / "compare", tmp_path / "compare")
    with storage.alone(tmp_path, "compare"), pytest.raises(GlannError, match="another process"):
        run(tmp_path, restart=restart)
    assert json.loads((tmp_path / "compare/results.json").read_text()) == done[1]


def test_restart_scores_anew(done, tmp_path):
    shutil.copytree(done[0], tmp_path / "x")
    (tmp_path / "x/compare/old.txt").touch()
    results, _, _ = run(tmp_path / "x", recipe_with(models=[]), restart=True)
    assert {row["model"] for row in results["rows"]}.isdisjoint({"ns-gan", "vae"})
    assert not (tmp_path / "x/compare/old.txt").exists()
    assert rows_of(results)["glann", 0] == rows_of(done[1])["glann", 0]


def test_where_things_lie_makes_no_other_rows():
    recipes = [
        make_recipe("x", {"glo": glo})
        for glo in ({}, {"codes_on": "disk"}, {"vgg_weights": "a"}, {"epochs": 5})
    ]
    here, disk, weights, longer = (identity_of(recipe, "glann") for recipe in recipes)
    assert here == disk == weights
    assert here != longer


def test_rows_on_other_features_are_put_aside_until_these_come_again(done, tmp_path, monkeypatch):
    folder = tmp_path / "x"
    shutil.copytree(done[0], folder)
    others, _, _ = run(folder, recipe_with(features="random"))
    assert {row["features"] for row in others["rows"]} == {"random"}
    (aside,) = (folder / "compare").glob("results-*.json")
    assert json.loads(aside.read_text())["rows"] == done[1]["rows"]
    near = rows_of(others)["vae", 0]["closest"]
    assert near != rows_of(done[1])["vae", 0]["closest"]
    assert (folder / "compare" / near).is_file()

    monkeypatch.setattr(comparison, "pipeline_rows", never)
    for kind, wanted in (("pixels", done[1]), ("random", others), ("pixels", done[1])):
        assert run(folder, recipe_with(features=kind))[0]["rows"] == wanted["rows"]


def test_rows_scored_against_other_images_are_other_rows():
    train, test = digits("train", 300), digits("test", 120)
    others, more = digits("test", 130).images[10:], digits("train", 400)
    others = dataclasses.replace(test, images=others, fingerprint=storage.fingerprint(others))
    of_pixels, of_labels = (
        make_features(kind, train=train, test=test) for kind in ("pixels", "classifier")
    )
    keys = [
        keys_of(Protocol(train, held_out, of_pixels, 100, whole))
        for held_out, whole in ((test, None), (others, None), (test, more), (None, None))
    ]
    assert len({tuple(each) for each in keys}) == 4
    # Earlier versions' keys say it only where a classifier's accuracy is part of them.
    assert [len(each) for each in keys] == [1] * 4
    assert len(keys_of(Protocol(train, test, of_labels, 100))) == 2


def test_results_that_ship_can_be_gone_on_with():
    """A test of the key that earlier versions gave: the baselines' rows took days."""
    shipped = Path(__file__).parents[1] / "pipelines/results/mnist-short/results.json"
    said = json.loads(shipped.read_text())["protocol"]
    key = said.pop("key")
    del said["budget"]
    also = {"test_fingerprint": "t", "whole_fingerprint": "w"}
    features = SimpleNamespace(accuracy=said["features"]["accuracy"])
    protocol = SimpleNamespace(describe=lambda: said | also, features=features)
    assert keys_of(protocol)[1] == key


def test_a_training_that_diverges_is_a_row_and_the_others_go_on(tmp_path):
    content = CONTENT | {"ns-gan": {"images_seen": 600, "loss": "least-squares", "lr": 1e30}}
    results, _, said = run(tmp_path, make_recipe("tiny", content))
    rows = rows_of(results)
    assert "not finite" in rows["ns-gan", 0]["failed"]
    assert "fid" in rows["vae", 0]
    assert any("failed" in line for line in said)


def test_other_errors_are_not_taken_for_failures(done, tmp_path):
    shutil.copytree(done[0] / "baselines", tmp_path / "baselines")
    content = CONTENT | {"vae": {"images_seen": 900}}  # another recipe's run is in the way
    with pytest.raises(GlannError, match="different settings"):
        run(tmp_path, make_recipe("tiny", content))


def test_a_budget_in_seconds_sets_the_lengths_once(tmp_path):
    results, _, _ = run(tmp_path, recipe_with(models=["vae"]), budget_seconds=2)
    kept = json.loads((tmp_path / "compare/lengths-2.json").read_text())
    lengths = {entry.split()[0]: length for entry, length in kept.items()}
    rows = rows_of(results)
    assert abs(rows["vae", 0]["images_seen"] - lengths["vae"]) <= 64
    assert abs(rows["glann", 0]["images_seen"] - 240 * lengths["glann"]["glo"]) <= 16
    assert lengths["vae"] > 600
    assert "about 2 s" in results["protocol"]["budget"]
    again, _, _ = run(tmp_path, recipe_with(models=["vae"]), budget_seconds=2)
    assert again["rows"] == results["rows"]


# ---------------------------------------------------------------------- protocol


def digits(split, n=240):
    return load(Data(source="digits", test_fraction=0.3, limit=n), split=split)


def make(train, test, samples=10_000):
    return Protocol(train, test, make_features("pixels", train=train, test=test), samples)


def test_real_images_are_the_test_images_and_the_floor_as_many_training_images():
    train, test = digits("train", 300), digits("test", 120)
    protocol = make(train, test)
    assert protocol.n == 120
    assert protocol.describe()["real"] == "120 test images of digits"
    everything = protocol.features(test.images)
    assert torch.equal(protocol.real.sort(0).values, everything.sort(0).values)
    assert torch.equal(protocol.rows, protocol.draws[0])
    rows = torch.cat(protocol.draws)
    assert (len(protocol.draws), len(rows.unique())) == (2, 240)
    wanted = [
        scores(real=protocol.real, fake=protocol.features(train.images[draw]))
        for draw in protocol.draws
    ]
    assert protocol.floor == pytest.approx(sum(score["fid"] for score in wanted) / 2)
    for row, score in zip(protocol.floors(), wanted, strict=True):
        assert row == {**score, "fid_over_floor": score["fid"] / protocol.floor}
    assert sum(row["fid_over_floor"] for row in protocol.floors()) == pytest.approx(2)


def test_the_floor_has_no_more_draws_than_wanted_and_none_of_what_is_real():
    train = digits("train", 480)
    assert len(make(train, digits("test"), samples=60).draws) == FLOORS
    protocol = make(train, None, samples=60)  # whose real images are training images, too
    real = permutation(0, "protocol", 0, 480)[60:120]
    rows = torch.cat(protocol.draws)
    assert (len(protocol.draws), len(rows.unique())) == (FLOORS, 60 * FLOORS)
    assert not torch.isin(rows, real).any()


def test_scores_of_a_collapsed_sampler_have_the_right_names():
    """It makes one mode of five: what it makes is right, and most is missing."""
    near = torch.randn(2, 300, 4, generator=torch.Generator().manual_seed(0))
    modes = 20.0 * torch.eye(5)[torch.arange(300) % 5, :4]
    found = scores(real=near[0] + modes, fake=near[1] + modes[0])
    assert min(found[name] for name in ("precision", "density", "f1_8")) > 0.8
    assert max(found[name] for name in ("recall", "coverage", "f8")) < 0.35
    assert found["kid"] > 0 == found["kid_std"]  # of so few there is one subset


def test_features_of_training_images_are_the_floors_and_the_others():
    protocol = make(digits("train", 300), digits("test", 120))
    protocol.memorisation(digits("test", 120).images)
    assert torch.equal(protocol._train_features, protocol.features(protocol.train.images))


def test_without_test_images_one_half_is_scored_against_the_other():
    train = digits("train", 200)
    protocol = make(train, None)
    assert (protocol.n, protocol.split) == (100, "train")
    mine = protocol.features(train.images[protocol.rows])
    both = torch.cat([mine, protocol.real])
    assert torch.equal(both.sort(0).values, protocol.features(train.images).sort(0).values)
    with pytest.raises(GlannError, match="test images"):
        protocol.memorisation(train.images)


def test_samples_beyond_n_are_not_scored_and_fewer_are_refused():
    train, test = digits("train"), digits("test", 100)
    protocol = make(train, test, samples=80)
    assert protocol.n == 80
    images = train.images[100:]
    assert protocol.score(images) == protocol.score(images[:80])
    with pytest.raises(GlannError, match="79 samples were given; wanted 80"):
        protocol.score(images[:79])
    with pytest.raises(GlannError, match="wanted at least 50"):
        make(train, digits("test", 30))


def test_copies_are_told_from_fresh_images():
    train, test = digits("train", 500), digits("test", 300)
    fresh = digits("train", 800).images[500:]
    protocol = make(train, test)
    copies, picture = protocol.memorisation(train.images)
    honest, _ = protocol.memorisation(fresh)
    assert copies["ratio"] < 0.2 < 0.7 < honest["ratio"]
    assert copies["share_closer_to_train"] > 0.9
    assert torch.equal(picture[:8], picture[8:16])  # each sample above the image it copies


FEW = Data(source="digits", test_fraction=0.3, limit=300, train_limit=40)


def test_of_a_few_training_images_the_others_are_the_floor():
    train, test, whole = load(FEW), load(FEW, split="test"), comparison.load_whole(FEW)
    features = make_features("pixels", train=whole, test=test)
    protocol = Protocol(train, test, features, 200, whole)
    assert (len(train), len(test), protocol.n, protocol.few) == (40, 300, 200, True)
    real = whole.images[permutation(0, "protocol", 0, 300)]
    others = [image for image in real if not (image == train.images).all((1, 2, 3)).any()]
    (draw,) = protocol.draws
    assert torch.equal(whole.images[draw], torch.stack(others[:200]))
    assert protocol.rows.bincount().tolist() == [5] * 40
    (note,) = protocol.describe()["notes"]
    assert "first 40 of 300 training images" in note


def test_with_all_training_images_nothing_is_said_of_few():
    train, test = digits("train"), digits("test")
    features = make_features("pixels", train=train, test=test)
    plain, same = (Protocol(train, test, features, 200, whole) for whole in (None, train))
    assert plain.describe() == same.describe()
    assert plain.floor == same.floor
    assert "notes" not in plain.describe()


def test_few_training_images_have_a_row_of_copies(tmp_path):
    data = {key: x for key, x in dataclasses.asdict(FEW).items() if x is not None}
    content = CONTENT | {"data": data}
    compared = {"models": [], "features": "random", "samples": 200}
    results, _, _ = run(tmp_path, make_recipe("tiny", content | {"compare": compared}))
    rows = rows_of(results)
    assert [model for model, _ in rows][:3] == ["floor", "copies", "reconstructions"]
    assert rows["copies", 0]["recall"] == 0  # what is there several times reaches nothing else
    assert rows["copies", 0]["memorisation"]["ratio"] == 0
    assert rows["floor", 0]["label"] == "other real images (the floor)"
    assert {row["n"] for row in results["rows"]} == {200}
    again = comparison.evaluate(str(tmp_path), features="random", progress=False, samples=200)
    assert [row["fid"] for row in again] == [row["fid"] for row in results["rows"]]


def test_every_model_has_a_label():
    assert set(MODELS) <= set(comparison.LABELS)


# ---------------------------------------------------------------------- evaluate


def glann(*arguments):
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_evaluate_a_run_gives_the_comparisons_rows(done, tmp_path):
    rows = comparison.evaluate(str(done[0]), features="pixels", progress=False, folder=tmp_path)
    wanted = rows_of(done[1])
    stages = ["reconstructions", "gaussian", "mixture", "glann"]
    assert [row["model"] for row in rows] == ["floor", *stages]
    for row in rows:
        assert row["fid"] == wanted[row["model"], 0]["fid"]
    assert (tmp_path / "report.html").is_file()


def test_evaluate_shows_nothing_of_what_was_scored_before(done, tmp_path):
    shutil.copytree(done[0] / "pipeline", tmp_path / "alone")
    for target in (done[0], tmp_path / "alone"):
        how = {"features": "pixels", "progress": False, "folder": tmp_path / "scores"}
        rows = comparison.evaluate(str(target), **how)
        written = json.loads((tmp_path / "scores/results.json").read_text())["rows"]
        assert [row["model"] for row in written] == [row["model"] for row in rows]


def test_evaluate_leaves_a_comparison_alone(done, tmp_path):
    shutil.copytree(done[0] / "compare", tmp_path / "compare")
    before = (tmp_path / "compare/results.json").read_bytes()
    with pytest.raises(GlannError, match="choose another folder"):
        comparison.evaluate(str(done[0]), progress=False, folder=tmp_path / "compare")
    assert (tmp_path / "compare/results.json").read_bytes() == before


def test_evaluate_a_baseline(done):
    target = str(done[0] / "baselines/vae")
    rows = comparison.evaluate(target, features="pixels", progress=False)
    assert [row["model"] for row in rows] == ["floor", "vae"]
    assert rows[1]["fid"] == rows_of(done[1])["vae", 0]["fid"]


def test_evaluate_a_pipeline_without_codes(done, tmp_path):
    shutil.copytree(done[0] / "pipeline", tmp_path / "alone")
    rows = comparison.evaluate(str(tmp_path / "alone"), features="pixels", progress=False)
    assert [row["model"] for row in rows] == ["floor", "glann"]


def test_evaluate_anybodys_images(tmp_path):
    np.save(tmp_path / "real.npy", digits("train", 240).images.numpy())
    np.save(tmp_path / "fake.npy", digits("test", 130).images.numpy())
    np.save(tmp_path / "grey.npy", np.full((130, 1, 8, 8), 128, np.uint8))
    real = ["--real", tmp_path / "real.npy", "--features", "pixels", "-q"]
    code, output = glann("evaluate", *real, "--fake", tmp_path / "fake.npy", "-o", tmp_path / "o")
    assert code == 0, output
    assert "the images given" in output
    good = json.loads((tmp_path / "o/results.json").read_text())["rows"][1]
    code, output = glann("evaluate", *real, "--fake", tmp_path / "grey.npy", "-o", tmp_path / "o")
    assert code == 0, output
    bad = json.loads((tmp_path / "o/results.json").read_text())["rows"][1]
    assert bad["fid"] > 10 * good["fid"]
    assert good["n"] == 120  # half of the real images: the other half is the floor


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate"], "either a PIPELINE or --fake"),
        (["evaluate", "digits", "--fake", "x"], "either a PIPELINE or --fake"),
        (["evaluate", "--fake", "x.npy"], "needs --real"),
        (["evaluate", "--fake", "x.npy", "--real", "y.npy"], "x.npy is missing"),
        (["evaluate", "nosuch"], "there is no pipeline 'nosuch'"),
        (["evaluate", "digits", "--features", "inception", "-q"], "torch-fidelity"),
        (["evaluate", "digits", "-n", "3"], "-n"),
        (["compare", "digits", "--models", "gan"], "not one of the choices"),
        (["compare", "digits", "--seeds", "0"], "--seeds"),
        (["compare", "digits", "--set", "compare.samples=2"], "out of range"),
        (["train-baseline", "digits", "--model", "wgan-pg"], "did you mean 'wgan-gp'"),
        (["train-baseline", "digits"], "--model"),
    ],
)
def test_mistakes_are_explained(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, output = glann(*arguments)
    assert code == 2
    assert message in output
    assert "Traceback" not in output


def test_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(make_recipe("tiny", CONTENT).to_toml())
    code, output = glann("train-baseline", "tiny.toml", "--model", "vae", "-q")
    assert code == 0, output
    assert "glann sample runs/tiny/baselines/vae" in output
    code, output = glann("sample", "runs/tiny/baselines/vae", "-o", "vae.png")
    assert code == 0, output
    trained = Path("runs/tiny/baselines/vae/manifest.json").read_bytes()
    code, output = glann("compare", "tiny.toml", "--models", "vae", "-q")
    assert code == 0, output
    assert "look at   runs/tiny/compare/report.html" in output
    assert Path("runs/tiny/baselines/vae/manifest.json").read_bytes() == trained
    code, output = glann("inspect", "runs/tiny")
    assert code == 0, output
    assert "vae " in output
    code, output = glann("inspect", "runs/tiny/baselines/vae")
    assert "model          vae" in output
    code, output = glann("compare", "tiny.toml", "--dry-run", "--models", "vae,wgan")
    assert '["vae", "wgan"]' in output
    assert "[wgan]" in output


def test_images_without_labels_or_test_images_are_compared_too(tmp_path):
    images = digits("train", 200).images
    train = Images(images, None, "array", "f", "x", ())
    features = make_features("auto", train=train, test=None)
    assert features.name == "random"
    protocol = Protocol(train, None, features)
    assert protocol.score(images)["fid"] < protocol.score(255 - images)["fid"]
