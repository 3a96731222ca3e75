"""Samplers of points: they learn, repeat, and say what is wrong."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from glann.baselines.adversarial import PENALTIES
from glann.errors import GlannError
from glann.randomness import generator
from glann.studies import modes
from glann.studies.mixtures import GaussianMixture
from glann.studies.points import (
    POINT_GANS,
    Maxout,
    PointGLANN,
    PointIMLE,
    point_discriminator,
    point_gan,
)
from glann.studies.study import Place

TWO = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.1)
TINY = {"width": 16, "depth": 2, "steps": 400, "batch_size": 50, "candidates": 8, "lr": 5e-3}


def near(samples, data=TWO):
    return float((torch.cdist(samples, data.centres).amin(1) < 3 * data.sigma).double().mean())


@pytest.mark.parametrize("refuse", [0.0, 8.0])
def test_imle_reaches_both_modes_in_the_data_s_proportions(refuse):
    imle = PointIMLE(**TINY, refuse=refuse).fit(TWO.sample(1000, 0), seed=1)
    samples = imle.sample(500, 2)
    assert near(samples) > 0.5
    assert 0.3 < float((samples[:, 0] > 0).double().mean()) < 0.7


def test_glann_reaches_both_modes():
    sampler = PointGLANN(coded=500, glo_steps=200, imle_steps=100, width=16, depth=2)
    samples = sampler.fit(TWO.sample(1000, 0), seed=1).sample(500, 2)
    assert near(samples) > 0.9
    assert 0.4 < float((samples[:, 0] > 0).double().mean()) < 0.6


@pytest.mark.parametrize("kind", ["imle", "glann", "ns-gan"])
def test_a_seed_repeats_and_another_differs(kind):
    def samples(seed):
        data = TWO.sample(300, 0)
        if kind == "imle":
            return PointIMLE(**{**TINY, "steps": 5}).fit(data, seed=seed).sample(10, 0)
        if kind == "glann":
            tiny = PointGLANN(coded=150, glo_steps=3, imle_steps=3, width=16, depth=2)
            return tiny.fit(data, seed=seed).sample(10, 0)
        return point_gan(kind, 3).fit(data, seed=seed, device="cpu").sample(10, 0)

    assert samples(1).equal(samples(1))
    assert not samples(1).equal(samples(2))


@pytest.mark.parametrize("model", POINT_GANS)
def test_every_gan_trains_on_points(model):
    gan = point_gan(model, 6).fit(TWO.sample(300, 0), seed=0, device="cpu")
    assert gan.sample(7, 0).shape == (7, 2)
    assert gan.sample(3, 5).allclose(gan.sample(7, 5)[:3], atol=1e-5)
    assert gan.batch_size == 100


def test_a_loss_that_is_not_finite_is_an_error():
    with pytest.raises(GlannError, match="not finite"):
        PointIMLE(**{**TINY, "lr": 1e30}).fit(TWO.sample(300, 0))


def test_maxout_is_the_largest_of_its_pieces():
    unit = Maxout(3, 4, 5, spectral=False)
    rows = torch.randn(6, 3)
    pieces = unit.linear(rows).view(6, 4, 5)
    assert unit(rows).equal(pieces.max(2).values)
    weights = sum(p.numel() for p in point_discriminator(2, spectral=False).parameters())
    assert weights == 3 * 1000 + 2 * 201 * 1000 + 201


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("shape", [(5, 2), (5, 1, 3, 3)])
def test_penalties_take_data_of_any_shape(penalty, shape):
    class Sum(nn.Module):
        def forward(self, rows):
            return 2 * rows.flatten(1).sum(1, keepdim=True)

    real, fake = torch.rand(shape), torch.rand(shape)
    drawn = PENALTIES[penalty].draw(real.shape, generator(0, "penalty"))
    found = PENALTIES[penalty].of(Sum(), real, fake, drawn)
    slope = 2 * math.sqrt(real[0].numel())
    wanted = slope**2 if penalty == "zero-centred" else (slope - 1) ** 2
    assert float(found) == pytest.approx(wanted, rel=1e-4)


def test_a_row_of_modes_and_its_picture(tmp_path):
    place = Place(tmp_path, tmp_path.parent, key="ring-imle-0")
    row = modes.points_row(place, mixture="ring", model="imle", seed=0, points=500, steps=[20])
    assert 0 <= row["found"] <= 8
    assert row["cpu_seconds"] > 0
    assert (tmp_path / row["picture"]).is_file()


GIVEN = {"found": 7, "high_quality": 0.5, "kl": 0.1, "spread": None, "cpu_seconds": 3.4}


def points_section(models, failed=()):
    settings = modes.ModesSettings(mixtures=["ring"], models=models, seeds=1)
    rows = [
        {
            "key": run.key,
            **run.arguments,
            **({"failed": "not finite"} if run.arguments["model"] in failed else GIVEN),
            "picture": f"{run.key}.png",
        }
        for run in modes.runs(settings)
    ]
    return modes.section(settings, rows, None)


def test_a_model_whose_runs_failed_has_dashes_and_no_scatter():
    section = points_section(["imle", "wgan"], failed=["wgan"])
    (table,) = section.tables
    assert table.rows[0] == ["IMLE", "7.0", "50.0%", "0.100", "–", "3", "0 of 1"]
    assert table.rows[1][1:] == ["–", "–", "–", "–", "–", "1 of 1"]
    assert all(len(row) == len(table.head) for row in table.rows)
    assert [picture.path for picture in section.pictures] == ["ring-imle-0.png"]


@pytest.mark.parametrize("images", ["stacked", "birthday"])
@pytest.mark.parametrize("glann", [1, 2])
def test_trainings_on_images_that_failed_are_counted_in_the_table_s_note(images, glann):
    settings = modes.ModesSettings(mixtures=[], recipe="digits", seeds=2)
    rows = modes.runs(dataclasses.replace(settings, **{images: ["glann"]}))
    numbers = {"found": 990, "kl": 0.05, "accuracy": 0.99, "recall": 0.5, "coverage": 0.75}
    numbers |= {"cpu_seconds": 61.0, "picture": "a.png", "closest": "b.png", "birthday": 9}
    floor, *others = ({"key": run.key, **run.arguments} for run in rows)
    failed = [row | {"failed": "not finite"} for row in others[:glann]]
    done = [row | numbers for row in others[glann:]]
    section = modes.section(settings, [floor | numbers, *failed, *done], None)
    (table,) = section.tables
    assert table.note.endswith(f"are left out: GLANN {glann} of 2.")
    assert ("GLANN" in [row[0] for row in table.rows]) == (glann == 1)
    assert ("no numbers" in section.finding) == (glann == 2)
    (table,) = modes.section(settings, failed, None).tables
    assert table.note.endswith(f"are left out: GLANN {glann} of {glann}.")
    (table,) = modes.section(settings, [floor | numbers, *done], None).tables
    assert "left out" not in table.note


def test_every_model_has_a_scatter():
    models = [*modes.OURS, *modes.POINT_GANS]
    wanted = [f"ring-{model}-0.png" for model in models]
    assert [picture.path for picture in points_section(models).pictures] == wanted


def test_of_gans_is_only_spoken_where_there_are_any():
    told = " ".join(points_section(["imle", "glann"]).paragraphs)
    assert "BEGAN" not in told
    assert "RS-IMLE" in told
    told = " ".join(points_section(["wgan"]).paragraphs)
    assert "2,000 steps of the discriminator" in told
    assert "RS-IMLE" not in told


def test_width_within_modes():
    data = modes.MIXTURES["ring"]
    # What is left of a Gaussian in the plane within three standard deviations.
    cut = math.sqrt(1 - 4.5 * math.exp(-4.5) / (1 - math.exp(-4.5)))
    assert modes.within_modes(data.sample(20_000, 0), "ring") == pytest.approx(cut, abs=0.01)
    assert modes.within_modes(data.centres, "ring") == pytest.approx(0, abs=1e-5)
    assert modes.within_modes(torch.full((3, 2), 9.0), "ring") is None


def test_a_model_s_length_is_no_part_of_others_rows():
    changes = ["glo.epochs=2", "ns-gan.images_seen=900", "r3gan.images_seen=500"]
    settings = modes.ModesSettings(
        mixtures=[], stacked=["glann", "ns-gan"], changes=changes, seeds=1
    )
    given = {run.arguments["model"]: run.arguments["changes"] for run in modes.runs(settings)}
    assert given == {"floor": changes[:1], "glann": changes[:1], "ns-gan": changes[:2]}


def test_stacked_digits_have_runs_and_a_table_beside_published_ones(tmp_path):
    settings = modes.ModesSettings(mixtures=[], stacked=["glann", "ns-gan"], seeds=2)
    keys = [run.key.removeprefix("stacked-") for run in modes.runs(settings)]
    assert keys == ["floor-0", "glann-0", "ns-gan-0", "glann-1", "ns-gan-1"]
    given = {"found": 990, "kl": 0.05, "accuracy": 0.99, "recall": 0.5, "coverage": 0.75}
    given |= {"cpu_seconds": 61.0, "picture": "a.png", "closest": "b.png"}
    rows = [
        {"key": run.key, **run.arguments, **given, "birthday": None if run.arguments["seed"] else 9}
        for run in modes.runs(settings)
    ]
    section = modes.section(settings, rows, tmp_path)
    (table,) = section.tables
    assert table.rows[0][0] == "training images (the floor)"
    assert table.rows[1] == [
        "GLANN", "990 ± 0", "0.050 ± 0.000", "0.500 ± 0.000", "0.750 ± 0.000", "9, none", "61 ± 0",
    ]  # fmt: skip
    assert all(len(row) == len(table.head) for row in table.rows)
    assert "accuracy 99.00%" in table.note
    assert "0.019 by chance" in table.note  # 999 / 52,000
    assert "990 ± 0 of 1,000 modes" in section.finding
    assert len(section.pictures) == 6


def test_birthdays_of_a_recipe_s_own_images_have_runs_and_a_table(tmp_path):
    settings = modes.ModesSettings(mixtures=[], birthday=["glann"], recipe="digits", seeds=2)
    runs = modes.runs(settings)
    assert [run.key for run in runs] == ["digits-floor-0", "digits-glann-0", "digits-glann-1"]
    given = {"recall": 0.5, "coverage": 0.75, "birthday": 40, "picture": "a", "closest": "b"}
    rows = [{"key": run.key, **run.arguments, **given} for run in runs]
    section = modes.section(settings, rows, tmp_path)
    (table,) = section.tables
    assert table.rows[1] == ["GLANN", "0.500 ± 0.000", "0.750 ± 0.000", "40, 40"]
    assert section.finding.startswith("digits: GLANN has recall 0.500")
    assert len(section.pictures) == 4
