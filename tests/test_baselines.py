"""One set of checks over every image sampler that learns in one stage."""

import copy
import inspect
import json

import pytest
import torch
from conftest import Killed
from torch.distributions import Bernoulli, Normal, kl_divergence

from glann import GLANN, GlannError, storage
from glann.baselines import MODELS, make_baseline
from glann.baselines.adversarial import LOSSES, PENALTIES
from glann.baselines.gan import Autoencoder, average
from glann.baselines.pixel_imle import _candidates
from glann.baselines.sampler import step_noise, tensors_of
from glann.evaluation.frechet import frechet_distance
from glann.images import to_float
from glann.networks import Encoder, Generator
from glann.randomness import seeded
from glann.training import Batches, read_snapshots

TINY = {"images_seen": 400, "batch_size": 32, "noise_dim": 6, "width": 8, "hidden": 32}
NAMES = sorted(MODELS)


def tiny(name, **changes):
    return make_baseline(name, **{**TINY, **changes})


@pytest.mark.parametrize("name", NAMES)
class TestBaseline:
    def test_constructor_only_stores(self, name):
        kind, published = MODELS[name]
        assert not [key for key in vars(kind()) if key.endswith("_")]
        for key in inspect.signature(kind).parameters:
            marker = object()
            assert getattr(kind(**{key: marker}), key) is marker
        for key, value in published.items():
            assert getattr(make_baseline(name), key) == value

    def test_images_seeds_and_parts_of_samples(self, name, digits):
        fitted = tiny(name)
        before = digits.clone()
        assert fitted.fit(digits, seed=1) is fitted
        assert torch.equal(digits, before)
        whole = fitted.sample(40, seed=2)
        assert whole.shape == (40, 1, 8, 8)
        assert whole.dtype == torch.uint8
        assert torch.equal(fitted.sample(5, seed=2, start=30), whole[30:35])
        assert not torch.equal(fitted.sample(40, seed=3), whole)
        assert torch.equal(tiny(name).fit(digits, seed=1).sample(40, seed=2), whole)
        assert not torch.equal(tiny(name).fit(digits, seed=2).sample(40, seed=2), whole)

    def test_interrupted_is_the_same_as_straight(self, name, digits, tmp_path, kill_at):
        straight = tiny(name).fit(digits, seed=4)
        kill_at(7)
        with pytest.raises(Killed):
            tiny(name).fit(digits, seed=4, folder=tmp_path)
        assert storage.read_manifest(tmp_path)["step"] == 6
        kill_at(-1)
        resumed = tiny(name).fit(digits, seed=4, folder=tmp_path)
        for mine, theirs in zip(
            resumed.generator_.state_dict().values(),
            straight.generator_.state_dict().values(),
            strict=True,
        ):
            assert torch.equal(mine, theirs)
        again = tiny(name).fit(digits, seed=4, folder=tmp_path)  # it is done: nothing is trained
        assert torch.equal(again.sample(9), straight.sample(9))

    def test_what_it_leaves_in_its_folder(self, name, digits, tmp_path):
        fitted = tiny(name).fit(digits, folder=tmp_path)
        shots = read_snapshots(tmp_path)
        assert len(shots) == 10
        assert shots[0].samples.shape == (1000, 1, 8, 8)
        assert shots[-1].step == storage.read_manifest(tmp_path)["steps"]
        # the last one is of what is sampled afterwards
        shown = fitted.pipeline_.generate(fitted.pipeline_.sampler.sample(1000)).float()
        assert (shots[-1].samples.float().mean() - shown.mean()).abs() < 3
        assert len(list(tmp_path.glob("samples-*.png"))) == 10
        with pytest.raises(GlannError, match="different seed"):
            tiny(name).fit(digits, seed=9, folder=tmp_path)
        with pytest.raises(GlannError, match="settings"):
            tiny(name, hidden=48).fit(digits, folder=tmp_path)

    def test_saved_and_loaded_is_the_same(self, name, digits, tmp_path):
        fitted = tiny(name, images_seen=64).fit(digits)
        fitted.pipeline_.save(tmp_path)
        assert torch.equal(GLANN.load(tmp_path).sample(20, seed=5), fitted.sample(20, seed=5))

    def test_colour_of_another_shape(self, name):
        images = torch.randint(0, 256, (40, 3, 12, 18), dtype=torch.uint8)
        fitted = tiny(name, images_seen=64).fit(images)
        assert fitted.sample(3).shape == (3, 3, 12, 18)

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (torch.zeros(40, 1, 4, 4, dtype=torch.uint8), "sides from 8 to 256"),
            (torch.zeros(40, 1, 8, 8), "uint8"),
            (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "wanted 2 or more"),
        ],
    )
    def test_unfit_images_are_refused(self, name, images, message):
        with pytest.raises(GlannError, match=message):
            tiny(name).fit(images)

    def test_settings_are_checked(self, name, digits):
        with pytest.raises(GlannError, match=r"images_seen = 0 is out of range"):
            tiny(name, images_seen=0).fit(digits)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name, digits):
    """Samples come nearer to the images than those of the untrained generator."""
    real = to_float(digits).flatten(1)

    def distance(fitted):
        return frechet_distance(real=real, fake=to_float(fitted.sample(300)).flatten(1))

    small = {**TINY, "width": 16, "hidden": 64}
    steps = 5 if MODELS[name][1].get("discriminator_steps") else 1
    longer = {"images_seen": 150 * (40 if steps == 1 else 100), "lr": 1e-3}
    trained = make_baseline(name, **{**small, **longer}).fit(digits)
    untrained = make_baseline(name, **{**small, "images_seen": 1, "lr": 0.0}).fit(digits)
    assert distance(trained) < 0.95 * distance(untrained)


def test_an_unknown_name_is_refused():
    with pytest.raises(GlannError, match="did you mean 'wgan-gp'"):
        make_baseline("wgan-pg")


def test_the_generator_takes_a_step_for_so_many_of_the_discriminator(digits, monkeypatch):
    steps = {"generator": 0, "discriminator": 0}
    step = torch.optim.Adam.step

    def count(self, *args, **kwargs):
        size = sum(p.numel() for p in self.param_groups[0]["params"])
        steps["generator" if size == generator_size else "discriminator"] += 1
        return step(self, *args, **kwargs)

    gan = tiny("wgan", images_seen=32 * 11, discriminator_steps=4)
    generator_size = sum(p.numel() for p in gan.fit(digits).generator_.parameters())
    monkeypatch.setattr(torch.optim.Adam, "step", count)
    gan.fit(digits)
    assert steps["discriminator"] == 12  # 352 images in batches of 30
    assert steps["generator"] == 3


def test_clipping_holds_every_weight(digits, tmp_path, kill_at):
    kill_at(4)
    with pytest.raises(Killed):
        tiny("wgan", clip=0.02).fit(digits, folder=tmp_path)
    _, parts = storage.load(tmp_path, "gan")
    discriminator = Encoder((1, 8, 8), 1, 8, 32, "batch")
    discriminator.load_state_dict(parts["discriminator"])
    largest = max(weights.abs().max().item() for weights in discriminator.parameters())
    assert largest == pytest.approx(0.02)


def test_the_averaged_generator_is_what_is_sampled(digits, tmp_path, kill_at):
    kill_at(8)
    with pytest.raises(Killed):
        tiny("r3gan").fit(digits, folder=tmp_path)
    _, parts = storage.load(tmp_path, "gan")
    now, averaged = parts["generator"], parts["averaged"]
    assert any(not torch.equal(now[key], averaged[key]) for key in now)
    # with a decay of 0 it would be the same, with one of 1 the start
    start = tiny("r3gan", images_seen=1, lr=0.0, ema=0.0).fit(digits).generator_.state_dict()
    key = "layers.0.weight"
    between = (averaged[key] - start[key]).norm() / (now[key] - start[key]).norm()
    assert 0.1 < between < 0.95


def test_an_average_over_constant_weights_is_them(digits):
    gan = tiny("r3gan")
    generator = Generator(4, (1, 8, 8), width=8, hidden=16)
    averaged = copy.deepcopy(generator)
    for step in range(5):
        average(averaged, generator, gan._decay(step))
    for mine, theirs in zip(tensors_of(averaged), tensors_of(generator), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_began_keeps_the_balance_between_0_and_1(digits, tmp_path, kill_at):
    kill_at(10)
    with pytest.raises(Killed):
        tiny("began", balance_rate=5.0).fit(digits, folder=tmp_path)
    _, parts = storage.load(tmp_path, "gan")
    assert 0 <= parts["balance"]["k"] <= 1
    assert parts["balance"]["k"] > 0


def test_an_autoencoders_score_is_its_error():
    autoencoder = Autoencoder(Generator(4, (1, 8, 8), width=8, hidden=16), "none")
    images = torch.rand(3, 1, 8, 8)
    rebuilt = autoencoder.decoder(autoencoder.encoder(images))
    wanted = [(a - b).abs().mean().item() for a, b in zip(images, rebuilt, strict=True)]
    assert autoencoder(images).flatten().tolist() == pytest.approx(wanted)


def test_a_discriminators_weights_are_not_moved_by_the_generators_turn(digits, monkeypatch):
    """Its gradients of that turn must not leak into its next step."""
    seen = []
    step = torch.optim.Adam.step

    def watch(self, *args, **kwargs):
        seen.append(self)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", watch)
    tiny("ns-gan", images_seen=64).fit(digits)
    discriminator = seen[0]
    generator = seen[1]
    assert discriminator is not generator
    assert seen == [discriminator, generator] * (len(seen) // 2)


def test_pixel_imle_goes_through_all_images_before_one_comes_again():
    imle = make_baseline("pixel-imle", subset=7)
    images = torch.zeros(20, 1, 8, 8)
    drawn = torch.cat([imle._draw(3, matching, images)[0] for matching in range(20)])
    for start in range(0, 140, 20):
        assert drawn[start : start + 20].sort().values.tolist() == list(range(20))
    subset, pool = imle._draw(3, 0, images)
    assert len(subset) == 7
    assert pool.shape == (14, 64)
    assert not torch.equal(pool, imle._draw(3, 1, images)[1])


@pytest.mark.parametrize(
    ("shape", "wanted"), [((1, 28, 28), 6000), ((3, 32, 32), 6000), ((3, 256, 256), 170)]
)
def test_pixel_imle_matches_fewer_large_images_at_a_time(shape, wanted):
    """6,000 of 256×256 and their candidates would take 43 GB."""
    images = torch.empty(1, *shape, dtype=torch.uint8).expand(7000, -1, -1, -1)
    imle = make_baseline("pixel-imle")
    assert len(imle._draw(0, 0, images)[0]) == wanted
    assert imle._batches(images).n == wanted


def logged(folder, model, images, **given):
    """The lines of a training's log."""
    model.fit(images, folder=folder, **given)
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_pixel_imle_learns_from_the_nearest_candidate(digits, tmp_path):
    """The oracle: Σ min ‖x − G(e)‖² of a generator that stays as it was."""
    still = {"lr": 0.0, "batch_norm": False, "images_seen": 100, "subset": 100}
    model = tiny("pixel-imle", **still)
    (line,) = logged(tmp_path, model, digits, seed=3)
    subset, pool = model._draw(3, 0, digits)
    with torch.no_grad():
        made = model.generator_(pool)
    nearest = torch.cdist(to_float(digits[subset]).flatten(1), made.flatten(1)).amin(1)
    assert line["loss"] == pytest.approx(float(nearest.square().mean()), rel=1e-4)


def test_pixel_imle_matches_what_sampling_will_make():
    generator = Generator(6, (1, 8, 8), width=8, hidden=16, on_sphere=False)
    pool = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    before = copy.deepcopy(generator.state_dict())
    found = _candidates(generator.train(), pool)
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())
    with torch.no_grad():
        assert torch.equal(found, generator.eval()(pool).flatten(1))


def at_first(name, digits):
    """Scores of a batch of all images and of as many samples, before anything was learned."""
    with seeded(3, "generator"):
        generator = Generator(6, (1, 8, 8), width=8, hidden=32, on_sphere=False)
    with seeded(3, "discriminator"):
        discriminator = tiny(name)._discriminator(generator)
    (rows,) = Batches(150, 150, 1).epoch_of(3, 0)
    with torch.no_grad():
        fake = generator(step_noise(3, 0, 150, 6, torch.device("cpu")))
        return discriminator(to_float(digits[rows])), discriminator(fake)


@pytest.mark.parametrize("name", ["ns-gan", "r3gan"])
def test_both_players_losses_are_of_images_and_samples(digits, tmp_path, name):
    still = {"lr": 0.0, "penalty_weight": 0.0, "images_seen": 150, "batch_size": 150}
    (line,) = logged(tmp_path, tiny(name, **still), digits, seed=3)
    scores = at_first(name, digits)
    loss = LOSSES[tiny(name).loss]
    assert line["loss"] == pytest.approx(float(loss.discriminator(*scores)), rel=1e-4)
    assert line["generator_loss"] == pytest.approx(float(loss.generator(*scores)), rel=1e-4)


def test_began_weighs_samples_by_how_much_worse_images_are(digits, tmp_path, kill_at):
    """Its equation for k, which begins at 0."""
    kill_at(2)
    with pytest.raises(Killed):
        tiny("began", lr=0.0, images_seen=300, batch_size=150, gamma=0.9, balance_rate=4.0).fit(
            digits, seed=3, folder=tmp_path
        )
    _, parts = storage.load(tmp_path, "gan")
    real, fake = at_first("began", digits)
    wanted = 4 * float(0.9 * real.mean() - fake.mean())
    assert 0 < wanted < 1
    assert float(parts["balance"]["k"]) == pytest.approx(wanted, rel=1e-4)


def test_a_penalty_counts_by_its_weight(digits, tmp_path):
    """Of a discriminator that stays as it was."""
    losses = []
    for weight in (0.0, 5.0, 10.0):
        model = tiny("wgan-gp", lr=0.0, images_seen=64, penalty_weight=weight)
        losses.append(logged(tmp_path / str(weight), model, digits)[-1]["loss"])
    assert losses[1] - losses[0] > 0.1
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4)


def test_each_step_has_noise_of_its_own(digits, monkeypatch):
    """For samples, and for the places at which gradients are looked at."""
    noises, places = [], []
    penalty = PENALTIES["interpolated"]

    def drawing(*given):
        noises.append(step_noise(*given))
        return noises[-1]

    def looking(discriminator, real, fake, drawn):
        places.append(drawn)
        return penalty.of(discriminator, real, fake, drawn)

    monkeypatch.setattr("glann.baselines.gan.step_noise", drawing)
    monkeypatch.setitem(PENALTIES, "interpolated", penalty._replace(of=looking))
    tiny("wgan-gp", images_seen=150).fit(digits)
    for drawn in (noises, places):
        assert len(torch.stack(drawn).flatten(1).unique(dim=0)) == 5


def test_a_vaes_loss_falls(digits, tmp_path):
    lines = logged(tmp_path, tiny("vae", images_seen=150 * 60), digits)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["divergence"] > 0 for line in lines)


def test_a_vaes_loss_is_the_bound(digits, tmp_path):
    """The oracle: torch's distributions, before anything was learned."""
    model = tiny("vae", images_seen=150, batch_size=150)
    (line,) = logged(tmp_path, model, digits, seed=3)
    with seeded(3, "generator"):
        decoder = Generator(6, (1, 8, 8), width=8, hidden=32, on_sphere=False)
    with seeded(3, "encoder"):
        encoder = Encoder((1, 8, 8), 12, 8, 32)
    (rows,) = Batches(150, 150, 1).epoch_of(3, 0)
    real = to_float(digits[rows])
    with torch.no_grad():
        mean, spread = encoder(real).chunk(2, dim=1)
    posterior = Normal(mean, torch.nn.functional.softplus(spread))
    e = step_noise(3, 0, 150, 6, torch.device("cpu"))
    with torch.no_grad():
        decoded = decoder(mean + posterior.stddev * e)
    pixels = Bernoulli(decoded, validate_args=False)
    error = -pixels.log_prob(real).flatten(1).sum(1).mean()
    divergence = kl_divergence(posterior, Normal(0.0, 1.0)).sum(1).mean()
    assert line["divergence"] == pytest.approx(float(divergence), rel=1e-3)
    assert line["loss"] == pytest.approx(float(error + divergence), rel=1e-4)
