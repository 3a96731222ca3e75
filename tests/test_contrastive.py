"""Features learned without labels: views, the loss that tells them apart, and their training."""

import math

import pytest
import torch
from conftest import Killed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.modules.batchnorm import _BatchNorm

from glann import GLO, GlannError, training
from glann.contrastive import (
    NETWORK,
    Features,
    contrast,
    images_in_a_step,
    learn_features,
    load_features,
    view,
)
from glann.devices import pick_precision
from glann.images import to_float

CPU = torch.device("cpu")
MIDDLE = torch.full((1, 5), 0.5)  # not moved, as bright as it was, the square in the middle


def learn(images, folder=None, seed=0, epochs=3.0):
    return learn_features(images, epochs=epochs, seed=seed, device=CPU, folder=folder)[0]


# ---------------------------------------------------------------------- views


def test_in_the_middle_of_chance_only_a_square_is_missing():
    image = torch.rand(1, 1, 28, 28)
    wanted = image.clone()
    wanted[..., 10:18, 10:18] = 0
    torch.testing.assert_close(view(image, MIDDLE), wanted)


@pytest.mark.parametrize(("chance", "by"), [(0.0, -3), (0.999, 3)])
def test_a_view_is_moved_by_a_ninth_of_a_side_at_most(chance, by):
    image = torch.rand(1, 1, 28, 36)
    moved = MIDDLE.clone()
    moved[0, 0] = chance
    rows = (torch.arange(28) + by).clamp(0, 27)
    wanted = image[:, :, rows]
    wanted[..., 10:18, 14:22] = 0
    torch.testing.assert_close(view(image, moved), wanted)
    moved = MIDDLE.clone()
    moved[0, 1] = chance
    columns = (torch.arange(36) + by // 3 * 4).clamp(0, 35)
    wanted = image[..., columns]
    wanted[..., 10:18, 14:22] = 0
    torch.testing.assert_close(view(image, moved), wanted)


@pytest.mark.parametrize(("chance", "at"), [(0.0, slice(0, 8)), (0.999, slice(20, 28))])
def test_the_square_comes_to_every_edge(chance, at):
    image = torch.ones(1, 1, 28, 28)
    chosen = MIDDLE.clone()
    chosen[0, 2:4] = chance
    black = view(image, chosen) == 0
    assert black[..., at, at].all()
    assert black.sum() == 64


def test_every_channel_has_a_brightness_of_its_own():
    chance = torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0, 0.5, 1.0]])
    seen = view(torch.ones(1, 3, 16, 16), chance)[0, :, -1, -1]
    assert seen.tolist() == pytest.approx([0.6, 1.0, 1.4])


@given(st.integers(8, 40), st.integers(8, 40), st.sampled_from([1, 3]), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_views_of_all_sizes_hold_nothing_but_their_image(height, width, channels, seed):
    random = torch.Generator().manual_seed(seed)
    images = 0.5 + torch.rand(3, channels, height, width, generator=random) / 2
    chance = torch.rand(3, 4 + channels, generator=random)
    chance[:, 4:] = 0.5
    seen = view(images, chance)
    assert seen.shape == images.shape
    side = max(1, round(min(height, width) * 2 / 7))
    for one, other in zip(images, seen, strict=True):
        assert int((other == 0).sum()) == channels * side**2
        assert torch.isin(other[other > 0], one).all()


# ---------------------------------------------------------------------- the loss


def test_contrast_is_the_papers_equation():
    numbers = torch.randn(10, 4, dtype=torch.float64)
    cosines = torch.nn.functional.cosine_similarity(numbers[:, None], numbers[None], dim=2)
    losses = []
    for i in range(10):
        positive = math.exp(cosines[i, (i + 5) % 10] / 0.2)
        all_others = sum(math.exp(cosines[i, k] / 0.2) for k in range(10) if k != i)
        losses.append(-math.log(positive / all_others))
    assert float(contrast(numbers)) == pytest.approx(sum(losses) / 10)


def test_contrast_falls_as_views_of_an_image_come_together():
    apart = torch.eye(8)
    assert float(contrast(torch.cat([apart, apart]))) < 0.1
    assert float(contrast(torch.cat([apart, apart.flip(0)]))) > 2


# ---------------------------------------------------------------------- features


@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        ((1, 8, 8), [(4, 4), (2, 2)]),
        ((1, 27, 28), [(14, 14), (7, 7), (4, 4)]),
        ((3, 64, 48), [(32, 24), (16, 12), (8, 6)]),
        ((1, 16, 17), [(8, 9), (4, 5), (2, 3)]),
        ((1, 128, 128), [(64, 64), (32, 32), (16, 16)]),
        ((1, 8, 256), [(4, 128), (2, 64), (1, 32), (1, 16)]),
    ],
)
def test_maps_are_of_every_hidden_layer(shape, sides):
    features = Features(shape).eval()
    images = torch.rand(2, *shape)
    maps = features.maps(images)
    assert [tuple(each.shape[2:]) for each in maps[:-1]] == sides
    assert [each.shape[1] for each in maps[:-1]] == [32, 64, 128, 256][: len(sides)]
    assert maps[-1].shape == (2, 256)
    torch.testing.assert_close(features.layers[-1](maps[-1]), features(images))
    features.spreads[0] = 4.0
    torch.testing.assert_close(features.maps(images)[0], maps[0] / 4)


def test_learning_tells_images_apart_and_leaves_the_statistics_of_images(digits):
    features = learn(digits, epochs=30)

    def told_apart(network):
        random = torch.Generator().manual_seed(5)
        views = view(to_float(digits), torch.rand(150, 5, generator=random))
        others = view(to_float(digits), torch.rand(150, 5, generator=random))
        with torch.no_grad():
            return float(contrast(network(torch.cat([views, others]))))

    assert told_apart(features) < 0.7 * told_apart(Features((1, 8, 8)).eval())
    assert not any(weight.requires_grad for weight in features.parameters())
    # BatchNorm knows images as they are, and all layers count alike.
    below, norm = features.layers[:3](to_float(digits)), features.layers[3]
    torch.testing.assert_close(norm.running_mean, below.mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
    assert [float(each.std()) for each in features.maps(to_float(digits))] == pytest.approx([1] * 3)


def test_each_step_sees_images_twice_and_never_the_same_way(digits, monkeypatch):
    seen = []

    def watched(images, chance):
        seen.append((images, chance))
        return view(images, chance)

    monkeypatch.setattr("glann.contrastive.view", watched)
    learn(digits, epochs=3)
    assert len(seen) == 6
    for (one, _), (other, _) in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(one, other)
    assert len(torch.cat([chance for _, chance in seen]).unique(dim=0)) == 6 * len(digits)


@pytest.mark.parametrize(
    ("n", "height", "width", "wanted"),
    [(9, 8, 8, 9), (999, 8, 8, 256), (999, 64, 64, 256), (999, 64, 256, 64), (999, 256, 256, 32)],
)
def test_steps_of_large_images_have_fewer(n, height, width, wanted):
    assert images_in_a_step(n, height, width) == wanted


@pytest.mark.parametrize("step", [1, 3])
def test_killed_and_resumed_equals_straight_bit_for_bit(digits, tmp_path, kill_at, step):
    straight = learn(digits, epochs=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Training, "record", training.Training.record)
        kill_at(step)
        with pytest.raises(Killed):
            learn(digits, tmp_path, epochs=4)
    assert load_features(tmp_path, (1, 8, 8)) is None  # not learned yet
    kill_at(0)
    resumed = learn(digits, tmp_path, epochs=4)
    loaded = load_features(tmp_path, (1, 8, 8))
    assert not any(module.training for module in loaded.modules())
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_what_was_learned_is_loaded_and_not_learned_again(digits, tmp_path, monkeypatch):
    first = learn(digits, tmp_path)
    monkeypatch.setattr(training.Training, "record", None)  # no step may be made
    again = learn(digits, tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert not any(m.training for m in again.modules() if isinstance(m, _BatchNorm))


def test_features_of_another_network_are_refused(digits, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("glann.contrastive.NETWORK", "of before")
        learn(digits, tmp_path)
    with pytest.raises(GlannError, match=r"'of before', wanted .*--restart"):
        load_features(tmp_path, (1, 8, 8))
    with pytest.raises(GlannError, match="network: then 'of before'"):
        learn(digits, tmp_path)


def test_features_of_large_images_are_refused_where_they_were_learned_by_more_convolutions(
    tmp_path, monkeypatch
):
    images = torch.randint(256, (40, 1, 8, 72), dtype=torch.uint8)
    with monkeypatch.context() as patch:
        patch.setattr("glann.contrastive._network", lambda shape: NETWORK)
        learn(images, tmp_path)
    with pytest.raises(GlannError, match=r"wanted .*larger maps.*--restart"):
        load_features(tmp_path, (1, 8, 72))


@pytest.mark.parametrize(("width", "channels"), [(6, [6, 12]), (300, [300, 512])])
def test_features_as_wide_as_asked_for_are_learned_and_loaded(digits, tmp_path, width, channels):
    given = {"code_dim": 8, "epochs": 1, "batch_size": 32, "width": 8, "hidden": 32}
    settings = {**given, "feature_images": 64, "feature_width": width}
    learned = GLO(**settings).fit(digits, folder=tmp_path).features_
    loaded = load_features(tmp_path / "features", (1, 8, 8))
    for features in (learned, loaded):
        maps = features.maps(to_float(digits[:2]))
        assert [each.shape[1] for each in maps[:-1]] == channels
    with pytest.raises(GlannError, match=f"width: then {width}, now 32"):
        learn(digits, tmp_path / "features", epochs=64 / len(digits))


def test_another_training_in_the_folder_is_refused(digits, tmp_path):
    learn(digits, tmp_path)
    with pytest.raises(GlannError, match="different seed"):
        learn(digits, tmp_path, seed=1)
    with pytest.raises(GlannError, match="different data"):
        learn(digits.flip(0), tmp_path)


# ---------------------------------------------------------------------- in stage one


def test_where_stage_one_is_of_another_training_no_features_are_learned(digits, tmp_path):
    settings = {"code_dim": 8, "epochs": 1, "batch_size": 32, "width": 8, "hidden": 32}
    GLO(**settings, loss="laplacian").fit(digits, folder=tmp_path)
    with pytest.raises(GlannError, match="different settings"):
        GLO(**settings, loss="contrastive").fit(digits, folder=tmp_path)
    assert not (tmp_path / "features").exists()


def test_stage_one_learns_features_first_and_keeps_them(digits, tmp_path):
    settings = {"code_dim": 8, "epochs": 2, "batch_size": 32, "width": 8, "hidden": 32}
    glo = GLO(**settings).fit(digits, seed=2, folder=tmp_path)
    assert glo.loss == "contrastive"
    kept = load_features(tmp_path / "features", (1, 8, 8))
    precision = pick_precision("auto", CPU)
    alone, *_ = learn_features(digits, epochs=4, seed=2, device=CPU, precision=precision)
    for name, value in kept.state_dict().items():
        assert torch.equal(value, glo.features_.state_dict()[name]), name
        assert torch.equal(value, alone.state_dict()[name]), name
    assert GLO(**settings, loss="scattering").fit(digits, seed=2).features_ is None


@pytest.mark.parametrize(("images_seen", "passes"), [(450, 3), (100, 2 / 3), (450_000, 4)])
def test_features_see_as_many_images_as_asked_for_but_twice_as_many_as_stage_one_at_most(
    digits, monkeypatch, images_seen, passes
):
    asked, slow = [], learn_features

    def watched(*args, **given):
        asked.append(given["epochs"])
        return slow(*args, **{**given, "epochs": 1})

    monkeypatch.setattr("glann.glo.learn_features", watched)
    settings = {"code_dim": 8, "epochs": 2, "batch_size": 32, "width": 8, "hidden": 32}
    GLO(**settings, feature_images=images_seen).fit(digits)
    assert asked == [passes]


def test_seconds_of_stage_one_have_those_of_the_features(digits, monkeypatch):
    slow = learn_features

    def a_minute(*args, **kwargs):
        return slow(*args, **kwargs)[0], 60.0, 50.0

    monkeypatch.setattr("glann.glo.learn_features", a_minute)
    settings = {"code_dim": 8, "epochs": 2, "batch_size": 32, "width": 8, "hidden": 32}
    assert 60 < GLO(**settings).fit(digits).seconds_ < 90
