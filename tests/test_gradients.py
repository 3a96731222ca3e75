import copy
import math

import pytest
import torch
from conftest import TINY_GLO, TINY_IMLE

from glann import GLO, IMLE
from glann.baselines import make_baseline
from glann.images import to_float
from glann.losses import make_loss
from glann.networks import Generator
from glann.randomness import noise, seeded
from glann.studies.gradients import (
    GANS,
    POOLS,
    STUDY,
    Gradients,
    discriminators,
    findings,
    own_training,
    runs,
    section,
    steps_to_measure,
)
from glann.studies.norms import (
    MATCHING,
    against_discriminator,
    falls,
    measured_rows,
    norm_and_loss,
    of_glo,
    of_imle,
)
from glann.studies.study import Place, load_settings

CPU = torch.device("cpu")
SMALL = {"width": 8, "hidden": 32, "noise_dim": 4, "batch_size": 50}


@pytest.fixture(scope="module")
def frozen():
    with seeded(0, "test"):
        return Generator(code_dim=4, image_shape=(1, 8, 8), width=8, hidden=32, on_sphere=False)


def curve(model, frozen, digits, at=(1, 2, 5), seed=0, **settings):
    gan = make_baseline(model, **SMALL, **settings)
    return against_discriminator(gan, frozen, digits, at, seed, CPU)


def test_the_norm_is_that_of_the_mean_loss():
    network = torch.nn.Linear(3, 2).double()
    batches = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    norm, loss = norm_and_loss((network(x).square().mean() for x in batches), network)
    whole = network(batches).square().mean()
    gradients = torch.autograd.grad(whole, list(network.parameters()))
    assert loss == pytest.approx(float(whole.detach()), rel=1e-12)
    assert norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in gradients)))


def test_gradients_of_batches_that_disagree_cancel():
    network = torch.nn.Linear(1, 1)
    one = torch.ones(1, 1)
    norm, loss = norm_and_loss((sign * network(one).sum() for sign in (1, -1)), network)
    assert (norm, loss) == (0, 0)


@pytest.mark.parametrize("model", ["mm-gan", "wgan", "wgan-gp", "sn-gan", "r3gan"])
def test_measuring_changes_nothing(model, frozen, digits):
    before = copy.deepcopy(frozen.state_dict())
    often = curve(model, frozen, digits, (1, 2, 3, 4, 5))
    assert [point for point in often if point["step"] in (1, 5)] == curve(
        model, frozen, digits, (1, 5)
    )
    for name, value in frozen.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(math.isfinite(x) for point in often for x in point.values())
    assert all(point["norm"] > 0 for point in often)


def test_the_seed_says_all(frozen, digits):
    assert curve("ns-gan", frozen, digits) == curve("ns-gan", frozen, digits)
    assert curve("ns-gan", frozen, digits) != curve("ns-gan", frozen, digits, seed=1)


def test_minimax_vanishes_where_non_saturating_does_not(frozen, digits):
    at = (1, 5, 20, 100, 300)
    settings = {"norm": "none", "lr": 1e-3}
    minimax, other = (curve(m, frozen, digits, at, **settings) for m in ("mm-gan", "ns-gan"))
    for mine, theirs in zip(minimax, other, strict=True):  # one discriminator taught them both
        assert mine["discriminator_loss"] == theirs["discriminator_loss"]
    assert minimax[-1]["discriminator_loss"] < 0.05  # it has won
    assert minimax[-1]["norm"] < max(point["norm"] for point in minimax) / 20
    assert other[-1]["norm"] > other[0]["norm"]


def test_with_undecided_scores_minimax_and_non_saturating_agree(frozen, digits):
    """Where D = 1/2, log(1 − D) and −log D have the same slope."""
    settings = {"norm": "none", "lr": 0.0}
    first, second = (
        curve(m, frozen, digits, (1,), **settings)[0]["norm"] for m in ("mm-gan", "ns-gan")
    )
    assert first == pytest.approx(second, rel=0.2)


def test_clipping_keeps_a_critic_flat(frozen, digits):
    flat, steep = (
        curve("wgan", frozen, digits, (10,), norm="none", clip=clip)[0]["norm"]
        for clip in (0.001, 1.0)
    )
    assert flat < steep / 100


def test_imle_and_its_error_by_hand(digits):
    codes = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    imle = IMLE(**TINY_IMLE | {"batch_size": 40, "levels": 1}, cells=1, refine=0).fit(codes, seed=1)
    pool = noise(3, f"candidates {MATCHING}", 0, 80, imle.noise_dim)
    with torch.no_grad():
        nearest = torch.cdist(codes, imle.mapper_(pool)).argmin(1)
    mapper = copy.deepcopy(imle.mapper_).train()
    (rows,) = measured_rows(40, 40, 3)
    difference = (mapper(pool[nearest[rows]]) - codes[rows]) / float(mapper.scale)
    loss = difference.square().mean()
    gradients = torch.autograd.grad(loss, list(mapper.parameters()))
    found = of_imle(imle, codes, 2.0, 3, CPU)
    assert found["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    assert found["norm"] == pytest.approx(norm, rel=1e-3)


def test_imle_goes_on_learning_while_it_errs(trained):
    points = [of_imle(trained.sampler, trained.codes, pool, 0, CPU) for pool in (0.1, 1, 10)]
    losses = [point["loss"] for point in points]
    assert losses == sorted(losses, reverse=True)
    fell = points[0]["norm"] / points[-1]["norm"]
    assert fell < 2 * losses[0] / losses[-1]


def test_glo_and_its_error_by_hand(digits):
    images = digits[:30]
    glo = GLO(**TINY_GLO | {"batch_size": 30}).fit(images, seed=1)
    before = copy.deepcopy(glo.generator_.state_dict())
    found = of_glo(glo, images, 0, CPU)
    generator = copy.deepcopy(glo.generator_).train()
    loss = make_loss(glo.loss, (8, 8), CPU)(generator(glo.codes_), to_float(images)).mean()
    gradients = torch.autograd.grad(loss, list(generator.parameters()))
    assert found["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    assert found["norm"] == pytest.approx(norm, rel=1e-4)
    for name, value in glo.generator_.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_measured_batches_are_the_same_and_no_more_than_needed():
    rows = measured_rows(5000, 50, 0)
    assert len(rows) == 16
    assert len(torch.cat(rows).unique()) == 16 * 50
    assert torch.equal(torch.cat(rows), torch.cat(measured_rows(5000, 50, 0)))
    assert len(torch.cat(measured_rows(150, 50, 0))) == 150


TINY_RECIPE = """
[data]
source = "digits"
test_fraction = 0.8
[glo]
code_dim = 4
epochs = 4
batch_size = 60
width = 8
hidden = 32
[imle]
noise_dim = 4
width = 16
depth = 2
epochs = 4
batch_size = 60
""" + "".join(f"[{name}]\nimages_seen = 600\nbatch_size = 60\n" for name in GANS)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Settings and rows of a tiny study."""
    folder = tmp_path_factory.mktemp("gradients")
    (folder / "tiny.toml").write_text(TINY_RECIPE)
    settings = Gradients(
        recipe=str(folder / "tiny.toml"),
        models=["mm-gan", "r3gan"],
        shares=[0.5],
        steps=3,
        seeds=1,
    )
    place = Place(folder, folder, None, "cpu")
    rows = [
        {"key": run.key, **run.arguments, **run.function(place, **run.arguments)}
        for run in runs(settings)
    ]
    return settings, rows


def test_rows_hold_what_was_measured(study):
    glann, gan = study[1]
    assert (glann["key"], gan["key"]) == ("glann-0", "frozen-0.5-0")
    assert {name: [p["step"] for p in curve] for name, curve in gan["curves"].items()} == {
        "mm-gan": [1, 2, 3],
        "r3gan": [1, 2, 3],
    }
    assert [point["epochs"] for point in glann["glo"]] == [2, 4]
    assert glann["glo"][0]["loss"] > glann["glo"][1]["loss"]
    assert [[point["pool"] for point in curve] for curve in glann["matched"]] == [list(POOLS)] * 2
    for curve in glann["matched"]:
        assert curve[0]["loss"] > curve[-1]["loss"]


def test_rows_repeat(study, tmp_path):
    place = Place(tmp_path, tmp_path, None, "cpu")
    for run, row in zip(runs(study[0]), study[1], strict=True):
        assert row.items() >= run.function(place, **run.arguments).items()
    assert {run.function for run in runs(study[0])} == {discriminators, own_training}


def test_the_section_says_and_shows_what_was_found(study, tmp_path):
    settings, rows = study
    made = section(settings, rows, tmp_path)
    found = findings(rows)
    assert f"and its error ÷ {found['imle-matched']['loss_fell']:.3g}" in made.finding
    assert [row[0] for row in made.tables[0].rows] == ["minimax GAN", "R3GAN's loss"]
    fell = found["mm-gan"]["fell"]
    expected = f"÷ {fell:.3g} " if fell > 1 else f"× {1 / fell:.3g} "
    assert made.tables[0].rows[0][1].startswith(expected)
    assert len(made.charts) == 3
    assert all("currentColor" in chart.svg for chart in made.charts)


def test_the_finding_names_the_loss_that_vanishes(study, tmp_path):
    def curve(*norms):
        return [{"step": i + 1, "norm": norm} for i, norm in enumerate(norms)]

    curves = {"ns-gan": curve(1, 2, 2), "mm-gan": curve(1, 2, 1e-3)}
    finding = section(study[0], [{"curves": curves}], tmp_path).finding
    assert "most with the minimax GAN: ÷ 1,000 (×/÷ 1) from the first" in finding
    assert "÷ 2,000 (×/÷ 1) from its highest" in finding
    assert finding.endswith("half of its highest with: non-saturating GAN.")


def test_runs_that_failed_are_told_of(study, tmp_path):
    settings, rows = study
    failed = [
        {"key": run.key, **run.arguments, "failed": "the loss is not finite"}
        for run in runs(settings)
    ]
    left_out = "Runs that were not finite and are left out"
    gans, own = section(settings, [*rows, *failed], tmp_path).tables
    assert (len(gans.rows), len(own.rows)) == (2, 3)
    assert gans.note.endswith(f" {left_out}: frozen at 50% 1 of 2.")
    assert own.note.endswith(f" {left_out}: GLO and IMLE 1 of 2.")
    nothing = section(settings, failed, tmp_path)
    assert [table.rows for table in nothing.tables] == [[], []]
    assert nothing.tables[0].note.endswith("frozen at 50% 1 of 1.")
    assert left_out not in section(settings, rows, tmp_path).tables[0].note


@pytest.mark.parametrize("quick", [False, True])
def test_the_settings_that_ship(quick):
    settings = load_settings(STUDY, quick=quick)
    keys = [run.key for run in runs(settings)]
    assert len(keys) == len(set(keys)) == settings.seeds * (1 + len(settings.shares))


def test_a_stage_is_a_beginning_of_the_whole_training(digits):
    """What the study's stages build on: a shorter training starts as a longer one does."""
    short, long = (
        make_baseline("ns-gan", **SMALL, images_seen=images_seen) for images_seen in (300, 600)
    )
    weights = {}

    class Stop(Exception):
        pass

    def stop(gan, training, generator, *rest):
        record = training.record

        def watched(*args, **more):
            record(*args, **more)
            if training.step == 6:
                weights.update(copy.deepcopy(generator.state_dict()))
                raise Stop

        training.record = watched
        return type(gan)._train(gan, training, generator, *rest)

    short.fit(digits)
    long._train = lambda *args: stop(long, *args)
    with pytest.raises(Stop):
        long.fit(digits)
    for name, value in short.generator_.state_dict().items():
        assert torch.equal(value, weights[name])


def test_falls_by_hand():
    curves = [
        [{"norm": 1.0}, {"norm": 8.0}, {"norm": 0.5}],
        [{"norm": 4.0}, {"norm": 1.0}, {"norm": 0.5}],
    ]
    found = falls(curves)
    assert found["fell"] == pytest.approx(4)  # of 2 and 8
    assert found["fell_spread"] == pytest.approx(math.exp(math.log(4) / math.sqrt(2)))
    assert found["fell_from_peak"] == pytest.approx(math.sqrt(16 * 8))
    assert falls(curves[:1])["fell_spread"] == 1


def test_a_gradient_that_is_gone_fell_far_but_not_infinitely():
    assert 1e40 < falls([[{"norm": 1.0}, {"norm": 0.0}]])["fell"] < math.inf


def test_findings_are_relative_to_the_error():
    def points(*pairs):
        return [{"norm": norm, "loss": loss} for norm, loss in pairs]

    row = {"seed": 0, "glo": points((8, 4), (2, 2)), "imle": points((1, 1), (1, 0.5))}
    found = findings([row | {"matched": [points((6, 3), (2, 1))]}])
    assert found["glo"]["fell"] == pytest.approx(4)
    assert found["glo"]["loss_fell"] == pytest.approx(2)
    assert found["glo"]["relative_fell"] == pytest.approx(2)
    assert found["imle"]["relative_fell"] == pytest.approx(0.5)
    assert found["imle-matched"]["relative_fell"] == pytest.approx(1)


def test_findings_of_rows(study):
    rows = study[1]
    assert set(findings(rows)) == {"mm-gan", "r3gan", "glo", "imle", "imle-matched"}
    assert set(findings(rows[1:])) == {"mm-gan", "r3gan"}


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(1, [1]), (2, [1, 2]), (20, [1, 2, 5, 10, 20]), (70, [1, 2, 5, 10, 20, 50, 70])],
)
def test_steps_to_measure(steps, expected):
    assert steps_to_measure(steps) == expected
