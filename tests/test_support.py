"""Recall, coverage and birthdays of samples whose support is known."""

import dataclasses

import pytest
import torch

from glann.errors import GlannError
from glann.recipes import load_recipe
from glann.studies import support as measuring
from glann.studies.study import Place
from glann.studies.support import images_row, support
from glann.studies.trained import images_of


def pictures(n, seed):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 1, 8, 8), dtype=torch.uint8, generator=random)


def pixels(images):
    return images.float().flatten(1)


def measured(samples, folder):
    place = Place(folder, folder.parent, key="x")
    return support(place, samples, pictures(400, 0), pixels)


def test_a_sampler_of_few_images_has_early_birthdays_and_no_recall(tmp_path):
    few = pictures(20, 1)[torch.randint(20, (400,), generator=torch.Generator().manual_seed(2))]
    row = measured(few, tmp_path)
    assert row["birthday"] <= 12  # P(two alike of s) = 1/2 at s ≈ 1.18 √20 ≈ 5
    assert row["recall"] < 0.2
    assert row["coverage"] < 0.5
    whole = measured(pictures(400, 1), tmp_path)
    assert whole["birthday"] is None or whole["birthday"] > 100
    assert whole["recall"] > 0.5
    assert whole["coverage"] > 0.8


def test_the_nearest_pairs_are_shown_one_above_the_other(tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(
        measuring, "save_grid", lambda images, path, columns: shown.update({path: images})
    )
    samples = pictures(100, 1)
    samples[70] = samples[30]
    row = measured(samples, tmp_path)
    assert shown[tmp_path / row["picture"]].equal(samples[:64])
    pairs = shown[tmp_path / row["closest"]]
    assert pairs[0].equal(samples[30])
    assert pairs[8].equal(samples[30])


def test_training_images_are_the_floor(tmp_path):
    place = Place(tmp_path, tmp_path.parent, key="x")
    row = images_row(place, recipe="digits", model="floor", seed=0)
    assert row["recall"] > 0.7
    assert row["coverage"] > 0.8


def by_label(images):
    order = images.labels.argsort(stable=True)
    return dataclasses.replace(images, images=images.images[order], labels=images.labels[order])


def test_the_floor_of_images_in_order_of_their_classes_is_of_all_classes(tmp_path, monkeypatch):
    place, recipe = Place(tmp_path, tmp_path.parent, key="x"), load_recipe("digits")
    ordered = tuple(map(by_label, images_of(place, recipe)))
    monkeypatch.setattr(measuring, "images_of", lambda *given: ordered)
    row = images_row(place, recipe="digits", model="floor", seed=0)
    assert row["recall"] > 0.7
    assert row["coverage"] > 0.8


def test_a_few_samples_are_beside_held_out_images_of_all_classes(tmp_path):
    dark, light = pictures(200, 0) // 4, pictures(200, 1) // 4 + 190
    place, samples = Place(tmp_path, tmp_path.parent, key="x"), pictures(100, 2) // 4 + 190
    row = support(place, samples, torch.cat([dark, light]), pixels)
    assert row["coverage"] == pytest.approx(0.5, abs=0.1)


def test_a_recipe_without_held_out_images_is_refused(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[data]\nsource = "digits"\ntest_fraction = 0.0\n')
    with pytest.raises(GlannError, match="no test images"):
        images_row(Place(tmp_path, tmp_path), recipe=str(recipe), model="floor", seed=0)
