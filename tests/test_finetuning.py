"""The generator's last lessons, and what a run makes of them."""

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import TINY_GLO, TINY_IMLE, Killed

from glann import GLANN, GLO, IMLE, FineTuning, GlannError, runner, storage
from glann.contrastive import learn_features
from glann.distance import Distance
from glann.errors import NotFinite
from glann.images import read_image, save_grid, to_float
from glann.networks import Generator, evaluation_mode
from glann.recipes import load_recipe, make_recipe

TINY = {"epochs": 40, "batch_size": 32, "lr": 5e-3}


@pytest.fixture(scope="module")
def stages(digits):
    glo = GLO(**{**TINY_GLO, "epochs": 40}).fit(digits, seed=1)
    imle = IMLE(**TINY_IMLE, detail=0.3).fit(glo.codes_, generator=glo.generator_, seed=1)
    return glo, imle


def error(generator, codes, images):
    with evaluation_mode(generator):
        return float((generator(codes) - to_float(images)).abs().mean())


# ---------------------------------------------------------------------- what is learned


@pytest.mark.parametrize("metric", ["codes", "images"])
@pytest.mark.parametrize("detail", [0.0, 0.4, 1.0])
def test_reached_codes_lie_between_mapped_noise_and_the_codes(stages, detail, metric):
    codes, generator = stages[0].codes_, stages[0].generator_
    imle = IMLE(**TINY_IMLE, detail=detail, metric=metric).fit(codes, generator=generator, seed=1)
    assert imle.chosen_.shape == (len(codes), TINY_IMLE["noise_dim"])
    reached = imle.reached(codes)
    if detail == 1:
        torch.testing.assert_close(reached, codes)
    if detail:  # what samples get beside an anchor
        anchors, details = imle.details_
        torch.testing.assert_close(reached, imle.metric_.codes(anchors + details))
    assert reached.norm(dim=1).sub(1).abs().max() < 1e-5


def test_reached_codes_of_codes_that_were_not_learned_from_are_refused(stages):
    with pytest.raises(GlannError, match="7 codes were given, and others, 150, chose the noise"):
        stages[1].reached(stages[0].codes_[:7])
    with pytest.raises(GlannError, match="in their order"):
        stages[1].reached(stages[0].codes_.flip(0))


def test_images_of_reached_codes_come_nearer_and_the_given_generator_stays(digits, stages):
    glo, imle = stages
    codes = imle.reached(glo.codes_)
    before = {name: tensor.clone() for name, tensor in glo.generator_.state_dict().items()}
    tuned = FineTuning(**TINY).fit(digits, codes, glo.generator_, like=glo)
    assert error(tuned.generator_, codes, digits) < 0.8 * error(glo.generator_, codes, digits)
    for name, tensor in glo.generator_.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not tuned.generator_.training


@pytest.mark.parametrize(
    ("setting", "choices"), [("loss", ("l1", "scattering")), ("optimiser", ("adam", "muon"))]
)
def test_it_learns_by_the_loss_and_optimiser_of_stage_one(digits, stages, setting, choices):
    glo, imle = stages
    codes = imle.reached(glo.codes_)
    made = [
        FineTuning(**TINY).fit(digits, codes, glo.generator_, like=GLO(**{setting: choice}))
        for choice in choices
    ]
    assert not torch.equal(*(next(tuned.generator_.parameters()) for tuned in made))


def test_a_loss_of_its_own_goes_before_that_of_stage_one(digits, stages):
    glo, imle = stages
    codes = imle.reached(glo.codes_)
    own, other, same = (
        FineTuning(**TINY, loss=loss)
        .fit(digits, codes, glo.generator_, like=GLO(loss=of_glo))
        .generator_.state_dict()
        for loss, of_glo in (("l2", "l1"), (None, "l1"), (None, "l2"))
    )
    name = next(iter(own))
    assert torch.equal(own[name], same[name])
    assert not torch.equal(own[name], other[name])


def test_it_compares_the_features_of_stage_one_or_learns_the_same(digits, stages, tmp_path):
    glo, imle = stages
    codes = imle.reached(glo.codes_)
    like = GLO(**{**TINY_GLO, "loss": "contrastive"}).fit(digits, seed=4)

    def tuned(**given):
        tuning = FineTuning(**{**TINY, "epochs": 2})
        return tuning.fit(digits, codes, glo.generator_, like=like, seed=4, **given).generator_

    name = next(iter(glo.generator_.state_dict()))
    handed, learned = (
        tuned(features=features, folder=tmp_path / str(features is None)).state_dict()[name]
        for features in (like.features_, None)
    )
    assert torch.equal(handed, learned)
    assert not (tmp_path / "False" / "features").exists()
    assert (tmp_path / "True" / "features").exists()
    other = learn_features(digits, epochs=2, seed=5, device=torch.device("cpu"))[0]
    assert not torch.equal(handed, tuned(features=other).state_dict()[name])


@pytest.mark.parametrize("loss", ["contrastive", "l2"])
def test_an_image_and_what_is_made_of_its_code_are_moved_alike(digits, monkeypatch, loss):
    images = torch.nn.functional.interpolate(digits, 27)
    pairs = []

    def recorded(*_):
        def loss_of(made, wanted):
            pairs.append((made.detach(), wanted))
            return (made - wanted).square().flatten(1).mean(1)

        return loss_of

    monkeypatch.setattr("glann.finetuning.make_loss", recorded)

    class Known(Generator):
        """Makes of image i's code what image i is, from the first step to the last."""

        def forward(self, z):
            place = (z[:, 0] * len(images)).round().long()
            return to_float(images)[place] + 0 * super().forward(z)

    codes = torch.arange(len(images))[:, None] / len(images) + torch.zeros(8)
    known = Known(8, (1, 27, 27), width=8, hidden=32)
    features = learn_features(images, epochs=1, device=torch.device("cpu"))[0]
    FineTuning(epochs=2, batch_size=32, loss=loss).fit(images, codes, known, features=features)
    assert all(torch.equal(made, wanted) for made, wanted in pairs)
    still = {image.numpy().tobytes() for image in to_float(images)}
    shown = [image.numpy().tobytes() in still for _, wanted in pairs for image in wanted]
    assert 0 < sum(shown) < len(shown) / 4 if loss == "contrastive" else all(shown)


def test_with_samples_their_features_are_spread_more_like_those_of_images(digits, stages):
    glo, imle = stages
    codes, samples = imle.reached(glo.codes_), imle.fresh(len(digits), 1)
    features = learn_features(digits, epochs=20, seed=0, device=torch.device("cpu"))[0]
    distance = Distance(features, digits, torch.device("cpu"), torch.float32)
    distances, errors = [], []
    for weight in (0.0, 10.0):
        tuning = FineTuning(**TINY, distance=weight)
        given = {"samples": samples, "features": features, "like": glo}
        tuned = tuning.fit(digits, codes, glo.generator_, **given).generator_
        with evaluation_mode(tuned):
            made = tuned(imle.sample(500, 2))
        still = torch.full((len(made), 2), 0.5)
        distances.append(float(distance(made, still, torch.arange(len(digits)), 1.0)))
        errors.append(error(tuned, codes, digits))
    assert distances[1] < 0.7 * distances[0]
    assert errors[1] < 2 * errors[0]


class Watched(Generator):
    """Keeps the codes that it was given to learn from."""

    seen: ClassVar[list[torch.Tensor]] = []

    def forward(self, z):
        if self.training:
            self.seen.append(z.detach().clone())
        return super().forward(z)


def test_each_step_sees_other_samples_beside_other_images(digits, stages, monkeypatch):
    glo, imle = stages
    codes, samples = imle.reached(glo.codes_), imle.fresh(len(digits), 1)
    features = learn_features(digits, epochs=2, seed=0, device=torch.device("cpu"))[0]
    watched = Watched(**glo.generator_.config)
    watched.load_state_dict(glo.generator_.state_dict())
    Watched.seen.clear()
    compared, renewed = [], []
    own, renew = Distance.__call__, Distance.renew

    def comparing(distance, made, ways, rows, share, *more):
        compared.append((ways, rows, share))
        return own(distance, made, ways, rows, share, *more)

    def renewing(distance, step, made):
        renewed.append((step, made))
        renew(distance, step, made)

    monkeypatch.setattr(Distance, "__call__", comparing)
    monkeypatch.setattr(Distance, "renew", renewing)
    tuning = FineTuning(**{**TINY, "epochs": 2}, sample_batch_size=40)
    tuning.fit(digits, codes, watched, samples=samples, features=features, like=glo)
    drawn = torch.stack([z[30:] for z in Watched.seen])  # after the images' codes
    assert drawn.shape == (10, 40, TINY_GLO["code_dim"])
    assert (drawn[:, :, None] == samples).all(3).any(2).all()
    for each in (drawn, *map(torch.stack, list(zip(*compared, strict=True))[:2])):
        assert len(each.flatten(1).unique(dim=0)) == 10
    assert renewed == [(step, 40) for step in range(10)]
    shares = [share for *_, share in compared]
    assert shares == [Distance.share(None, step, 40) for step in range(10)]


def test_the_distance_counts_by_its_weight(digits, stages, tmp_path):
    """Of a generator that stays as it was, but for BatchNorm's statistics of what it now sees."""
    glo, imle = stages
    codes, samples = imle.reached(glo.codes_), imle.fresh(len(digits), 1)
    features = learn_features(digits, epochs=2, seed=0, device=torch.device("cpu"))[0]
    given = {"samples": samples, "features": features, "like": glo}
    losses = []
    for weight in (1.0, 3.0, 5.0):
        tuning = FineTuning(epochs=1, batch_size=32, lr=0.0, distance=weight)
        folder = tmp_path / str(weight)
        tuned = tuning.fit(digits, codes, glo.generator_, **given, folder=folder).generator_
        losses.append(json.loads((folder / "log.jsonl").read_text())["loss"])
    assert losses[1] - losses[0] > 0.1
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-3)
    then = glo.generator_.state_dict()
    for name, value in tuned.state_dict().items():
        of_batches = "running" in name or "num_batches" in name
        assert torch.equal(value, then[name]) != of_batches, name


@pytest.mark.parametrize(("wanted", "pixels", "made"), [(7, 2**20, 7), (40, 1, 32)])
def test_samples_of_a_step_are_as_many_as_wanted_but_of_large_images_fewer(
    digits, stages, monkeypatch, wanted, pixels, made
):
    glo, imle = stages
    codes, samples = imle.reached(glo.codes_), imle.fresh(len(digits), 1)
    features = learn_features(digits, epochs=2, seed=0, device=torch.device("cpu"))[0]
    monkeypatch.setattr("glann.contrastive.PIXELS", pixels)
    compared, given = [], {"samples": samples, "features": features, "like": glo}
    own = Distance.__call__

    def counted(distance, made, *more):
        compared.append(len(made))
        return own(distance, made, *more)

    monkeypatch.setattr(Distance, "__call__", counted)
    short = {**TINY, "epochs": 1}
    FineTuning(**short, sample_batch_size=wanted).fit(digits, codes, glo.generator_, **given)
    assert compared == [made] * -(-len(digits) // TINY["batch_size"])


def test_without_samples_or_weight_samples_are_not_looked_at(digits, stages, tmp_path):
    glo, imle = stages
    codes, samples = imle.reached(glo.codes_), imle.fresh(len(digits), 1)
    short = {**TINY, "epochs": 2}
    made = [
        FineTuning(**short, distance=weight)
        .fit(digits, codes, glo.generator_, like=glo, samples=given, folder=tmp_path / "same")
        .generator_.state_dict()
        for weight, given in ((3.0, None), (0.0, samples), (0.0, None))
    ]  # the second and third find the first's folder, and are no other training
    name = next(iter(made[0]))
    assert torch.equal(made[0][name], made[1][name])
    assert torch.equal(made[0][name], made[2][name])
    assert not (tmp_path / "same" / "features").exists()
    with pytest.raises(GlannError, match="another"):
        FineTuning(**short, distance=3.0).fit(
            digits, codes, glo.generator_, like=glo, samples=samples, folder=tmp_path / "same"
        )
    assert not (tmp_path / "same" / "features").exists()  # refused before minutes of learning them


def test_fresh_samples_are_no_samples(stages):
    _, imle = stages
    fresh, others = imle.fresh(50, 1), imle.sample(2000, 1)
    assert fresh.shape == (50, TINY_GLO["code_dim"])
    assert torch.equal(fresh, imle.fresh(50, 1))
    assert not torch.equal(fresh, imle.fresh(50, 2))
    assert torch.cdist(fresh, others).min() > 1e-4


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("step", [1, 5, 7, 10])
def test_killed_and_resumed_equals_straight_bit_for_bit(
    digits, stages, tmp_path, kill_at, monkeypatch, step, sampled
):
    monkeypatch.setattr("glann.distance.KNOWN", 0)  # there are moments from the first step on
    monkeypatch.setattr("glann.distance.RENEWED", 3)
    glo, imle = stages
    codes, settings = imle.reached(glo.codes_), {**TINY, "epochs": 2}
    given = {"like": glo, "seed": 3}
    if sampled:
        cpu = torch.device("cpu")
        given["samples"] = imle.fresh(len(digits), 1)
        given["features"] = learn_features(digits, epochs=2, seed=5, device=cpu)[0]

    def fit(folder=None):
        tuning = FineTuning(**settings)
        return tuning.fit(digits, codes, glo.generator_, folder=folder, **given)

    straight = fit()
    kill_at(step)
    with pytest.raises(Killed):
        fit(tmp_path)
    kill_at(-1)
    for _ in range(2):  # the second time there is nothing left to do
        resumed = fit(tmp_path)
        for name, value in straight.generator_.state_dict().items():
            assert torch.equal(value, resumed.generator_.state_dict()[name]), name


def test_a_folder_of_another_generator_is_refused(digits, stages, tmp_path):
    glo, imle = stages
    codes = imle.reached(glo.codes_)
    FineTuning(**TINY).fit(digits, codes, glo.generator_, folder=tmp_path)
    other = GLO(**TINY_GLO).fit(digits, seed=2).generator_
    with pytest.raises(GlannError, match=r"different data \(then (\w+), now (?!\1)"):
        FineTuning(**TINY).fit(digits, codes, other, folder=tmp_path)


@pytest.mark.parametrize(
    ("images", "codes", "message"),
    [
        ((9, 1, 8, 8), (10, 8), "9 images and 10 codes were given"),
        ((10, 3, 8, 8), (10, 8), r"images have shape \(3, 8, 8\); this generator's have \(1, 8, 8"),
        ((10, 1, 8, 8), (10, 7), "codes have 7 numbers; this generator's have 8"),
    ],
)
def test_what_does_not_fit_is_refused(stages, images, codes, message):
    with pytest.raises(GlannError, match=message):
        FineTuning().fit(
            torch.zeros(images, dtype=torch.uint8), torch.zeros(codes), stages[0].generator_
        )


def test_samples_that_don_t_fit_are_refused_by_their_name(stages):
    images, generator = torch.zeros(10, 1, 8, 8, dtype=torch.uint8), stages[0].generator_
    for samples, message in (
        (torch.zeros(5, 8), "10 images and 5 samples' codes"),
        (torch.zeros(10, 3), "samples' codes have 3"),
    ):
        with pytest.raises(GlannError, match=message):
            FineTuning().fit(images, torch.zeros(10, 8), generator, samples=samples)


# ---------------------------------------------------------------------- in a run


def quick(tmp_path, *changes):
    small = ("glo.epochs=1", "glo.width=8", "glo.hidden=16", "imle.width=16", "imle.epochs=6")
    plain = ("data.limit=300", "glo.loss=scattering", "finetune.epochs=0")
    return load_recipe("digits", [*plain, *small, *changes]), tmp_path / "run"


def test_a_run_s_pipeline_has_the_generator_that_learned_on_and_its_codes(tmp_path):
    recipe, run = quick(tmp_path, "finetune.epochs=3")
    pipeline = runner.trained(recipe, run, progress=False)
    generator, codes, _ = runner.load_stage_one(run)
    assert not torch.equal(next(pipeline.generator.parameters()), next(generator.parameters()))
    assert not torch.equal(pipeline.codes, codes)
    assert pipeline.info["recipe"]["finetune"]["epochs"] == 3
    assert pipeline.info["seconds"].keys() == {"glo", "imle", "finetune"}
    by_itself = runner.stage_one_of(run)
    assert torch.equal(by_itself.codes, codes)
    assert torch.equal(next(by_itself.generator.parameters()), next(generator.parameters()))
    # A pipeline away from its run has no stage one to be seen beside.
    pipeline.save(tmp_path / "copy", with_codes=True)
    assert runner.stage_one_of(tmp_path / "copy") is None
    again = GLANN.load(tmp_path / "copy")
    assert torch.equal(again.reconstruct([3]), pipeline.reconstruct([3]))


def test_a_run_learns_features_once(tmp_path):
    recipe, run = quick(tmp_path, "finetune.epochs=3", "glo.loss=contrastive")
    runner.trained(recipe, run, progress=False)
    assert storage.is_saved(run / "glo" / "features")
    assert not (run / "finetune" / "features").exists()


def test_it_learns_from_samples_as_the_pipeline_will_make_them(tmp_path, monkeypatch):
    seen, fit = [], FineTuning.fit

    def watched(self, *args, **given):
        seen.append(given["samples"])
        return fit(self, *args, **given)

    monkeypatch.setattr(FineTuning, "fit", watched)
    recipe, run = quick(tmp_path, "finetune.epochs=1")
    runner.train_glo(recipe, run, progress=False)
    runner.train_imle(recipe, run, progress=False, details=5)
    sampler = GLANN.load(run).sampler
    assert len(sampler.details_.anchors) == 5
    torch.testing.assert_close(seen[0], sampler.fresh(len(seen[0]), recipe.seed))
    # Another number of them for a saved pipeline is no other training.
    runner.train_imle(recipe, run, progress=False, details=7)
    assert len(GLANN.load(run).sampler.details_.anchors) == 7
    assert not torch.equal(seen[1], seen[0])
    without, other = quick(tmp_path / "other", "finetune.epochs=1", "finetune.distance=0")
    runner.trained(without, other, progress=False)
    assert seen[2] is None


def test_pictures_and_what_is_given_back_are_of_the_pipeline_that_is_saved(tmp_path):
    recipe, run = quick(tmp_path, "finetune.epochs=1")
    runner.train_glo(recipe, run, progress=False)
    given = runner.train_imle(recipe, run, progress=False, details=5)
    assert len(given.sampler.details_.anchors) == 5
    shown = read_image(run / "samples.png")
    save_grid(GLANN.load(run).sample(64, recipe.seed), tmp_path / "loaded.png", columns=8)
    assert torch.equal(shown, read_image(tmp_path / "loaded.png"))


def test_what_is_done_needs_no_loss(digits, stages, tmp_path, monkeypatch):
    """VGG's weights are not looked for, and downloaded, to load what was learned by them."""
    glo, imle = stages
    given = digits, imle.reached(glo.codes_), glo.generator_
    done = FineTuning(**TINY).fit(*given, like=glo, folder=tmp_path)

    def refuse(*_):
        raise AssertionError("a loss was made")

    monkeypatch.setattr("glann.finetuning.make_loss", refuse)
    again = FineTuning(**TINY).fit(*given, like=glo, folder=tmp_path)
    for name, value in done.generator_.state_dict().items():
        assert torch.equal(value, again.generator_.state_dict()[name]), name


@pytest.mark.parametrize("distance", [0.0, 6.67])
def test_numbers_that_are_not_finite_stop_it(digits, stages, monkeypatch, distance):
    monkeypatch.setattr("glann.distance.KNOWN", 0)  # there are moments from the first step on
    glo, imle = stages
    tuning = FineTuning(**{**TINY, "lr": 1e30}, distance=distance)
    features = learn_features(digits, epochs=1, seed=5, device=torch.device("cpu"))[0]
    samples = imle.fresh(len(digits))
    with pytest.raises(NotFinite, match=r"not finite|no longer finite"):
        tuning.fit(digits, glo.codes_, glo.generator_, like=glo, samples=samples, features=features)


def test_it_can_follow_a_run_that_was_done_without(tmp_path):
    recipe, run = quick(tmp_path)
    plain = runner.trained(recipe, run, progress=False)
    stage_two = {path: path.read_bytes() for path in (run / "imle").glob("*.safetensors")}
    tuned = runner.trained(quick(tmp_path, "finetune.epochs=3")[0], run, progress=False)
    assert {path: path.read_bytes() for path in (run / "imle").glob("*.safetensors")} == stage_two
    weights = [next(pipeline.generator.parameters()) for pipeline in (plain, tuned)]
    assert not torch.equal(*weights)
    with pytest.raises(GlannError, match=r"it has finetune\.epochs = 3\.0, now None"):
        runner.trained(recipe, run, progress=False)
    runner.train_imle(recipe, run, progress=False, restart=True)
    assert not (run / "finetune").exists()
    assert torch.equal(next(GLANN.load(run).generator.parameters()), weights[0])


def test_stage_one_of_a_version_with_other_settings_of_what_comes_after_goes_on(tmp_path):
    recipe, run = quick(tmp_path, "finetune.epochs=3")
    runner.train_glo(recipe, run, progress=False)

    def of_another_version():
        there = (run / "recipe.toml").read_text()
        (run / "recipe.toml").write_text(there.replace("\ndistance = ", "\nenergy = "))

    of_another_version()
    runner.train_imle(recipe, run, progress=False)
    of_another_version()
    with pytest.raises(GlannError, match=r"recipe\.toml can't be .* finetune\.energy is not"):
        runner.train_imle(recipe, run, progress=False)
    runner.train_imle(recipe, run, progress=False, restart=True)


def test_other_images_are_refused_before_anything_is_learned(tmp_path):
    recipe, run = quick(tmp_path, "finetune.epochs=3")
    runner.train_glo(recipe, run, progress=False)
    about = json.loads((run / "data.json").read_text())
    Path(run / "data.json").write_text(json.dumps({**about, "fingerprint": "other"}))
    with pytest.raises(GlannError, match="was trained on other images"):
        runner.train_imle(recipe, run, progress=False)
    assert not storage.is_saved(run / "imle")


def test_neither_they_nor_missing_ones_cost_what_was_learned(tmp_path):
    recipe, run = quick(tmp_path, "finetune.epochs=3")
    runner.trained(recipe, run, progress=False)
    missing = load_recipe("mnist", ["finetune.epochs=3"])
    with pytest.raises(GlannError, match="nowhere"):
        runner.train_imle(missing, run, data="nowhere", progress=False, restart=True)
    about = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**about, "fingerprint": "other"}))
    with pytest.raises(GlannError, match="was trained on other images"):
        runner.train_imle(recipe, run, progress=False, restart=True)
    for part in ("imle", "finetune", "pipeline"):
        assert storage.is_saved(run / part)


def test_a_run_that_was_killed_while_it_learned_on_has_no_pipeline_of_before(tmp_path, kill_at):
    recipe, run = quick(tmp_path)
    runner.trained(recipe, run, progress=False)
    tuned = quick(tmp_path, "finetune.epochs=3")[0]
    kill_at(4)
    with pytest.raises(Killed):
        runner.trained(tuned, run, progress=False)
    kill_at(-1)
    assert not storage.is_saved(run / "pipeline")
    assert runner.trained(tuned, run, progress=False).info["seconds"]["finetune"] > 0


# ---------------------------------------------------------------------- in a recipe


def test_a_recipe_has_it_where_it_says_so():
    assert make_recipe("x", {}).finetune is None
    assert make_recipe("x", {"finetune": {}}).finetune == FineTuning()
    assert make_recipe("x", {"finetune": {"epochs": 0}}).finetune is None
    asked = load_recipe("mnist-paper", ["finetune.lr=0.01"])
    assert asked.finetune == FineTuning(lr=0.01)
    assert "[finetune]\nepochs = 2.0" in asked.to_toml()
    assert "finetune" not in load_recipe("mnist-paper").to_toml()


def test_only_imle_s_noise_belongs_to_images():
    content = {"finetune": {}, "imle": {"sampler": "mixture"}}
    with pytest.raises(GlannError, match=r"\[finetune\] needs imle\.sampler = 'imle'"):
        make_recipe("x", content)
    with_mixture = load_recipe("fashion-mnist", ["imle.sampler=mixture"])
    assert with_mixture.finetune is None
