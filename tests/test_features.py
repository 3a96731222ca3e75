import dataclasses
import sys
import types

import numpy as np
import pytest
import torch

from glann.data import Data, Images, load
from glann.errors import GlannError
from glann.evaluation import classifier
from glann.evaluation.features import FEATURES, make_features
from glann.storage import fingerprint


def images_of(shape, n=64, classes=2, seed=0):
    """Noise with labels that a network can learn: brighter means a larger label."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    images = torch.randint(0, 256, (n, *shape), generator=random, dtype=torch.uint8) // 4
    images += (labels * (192 // classes)).to(torch.uint8)[:, None, None, None]
    return Images(images, labels, "array", fingerprint(images), "here", ())


@pytest.fixture(scope="module")
def split():
    data = Data(source="digits", test_fraction=0.3)
    return {"train": load(data), "test": load(data, split="test")}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def of_digits(split, cache):
    """The classifier's features of the digits, trained as for everybody.  Don't change it."""
    return make_features("classifier", **split, cache=cache)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(classifier, "MOST_EPOCHS", 1)


def frechet(real, fake):
    """FID of two sets of features, the plain way."""
    a, b = (np.cov(part.double().T.numpy()) for part in (real, fake))
    roots = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0))
    means = (real.double().mean(0) - fake.double().mean(0)).square().sum()
    return float(means + np.trace(a) + np.trace(b) - 2 * roots.sum())


def test_the_classifier_reads_digits_that_it_never_saw(of_digits, split):
    test = split["test"]
    right = (of_digits.predict(test.images) == test.labels).double().mean()
    assert right >= 0.97
    assert of_digits.accuracy == pytest.approx(float(right))
    assert of_digits.test_images == 539
    assert of_digits.describe() == {
        "name": "classifier",
        "dim": 128,
        "accuracy": of_digits.accuracy,
        "test_images": 539,
        "weights": of_digits.describe()["weights"],
    }


@pytest.mark.parametrize("kind", ["classifier", "random"])
def test_features_have_mean_0_and_variance_1(kind, split, cache, of_digits):
    features = make_features(kind, **split, cache=cache)(split["train"].images)
    assert features.dtype == torch.float32
    assert features.shape == (1258, 128)
    torch.testing.assert_close(features.mean(0), torch.zeros(128), atol=0.02, rtol=0)
    torch.testing.assert_close(features.var(0), torch.ones(128), atol=0.1, rtol=0)


def test_labels_are_read_from_features_as_from_images(of_digits, split):
    images = split["test"].images[:50]
    labels = of_digits.classify(of_digits(images))
    assert labels.dtype == torch.int64
    assert torch.equal(labels, of_digits.predict(images))


@pytest.mark.parametrize("kind", ["classifier", "random", "pixels"])
def test_a_row_does_not_depend_on_the_others(kind, split, cache, of_digits):
    features = make_features(kind, **split, cache=cache)
    images = split["test"].images
    whole = features(images)
    assert torch.equal(features(images[:3]), whole[:3])
    assert torch.equal(features(images[256:300]), whole[256:300])
    torch.testing.assert_close(features(images.flip(0)).flip(0), whole, atol=1e-5, rtol=1e-5)
    assert torch.equal(features(images.numpy()), whole)
    assert features(images[:0]).shape == (0, features.dim)


@pytest.mark.parametrize("kind", ["classifier", "random"])
def test_extracting_changes_nothing_in_the_network(kind, split, cache, of_digits):
    features = make_features(kind, **split, cache=cache)
    before = features.describe()
    features.network.train()
    in_training = features(split["test"].images)
    assert features.network.training
    assert features.describe() == before
    features.network.eval()
    assert torch.equal(features(split["test"].images), in_training)
    assert not features.network.training


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 64, 64), (3, 8, 100), (3, 256, 9)])
@pytest.mark.parametrize("kind", ["classifier", "random", "pixels"])
def test_every_shape(kind, shape, tmp_path, quick):
    train = images_of(shape, n=8)
    features = make_features(kind, train=train, test=images_of(shape, n=5), cache=tmp_path)
    found = features(train.images)
    assert found.shape == (8, features.dim)
    assert found.isfinite().all()
    assert found.std(0).min() > 0
    assert features.dim == (128 if kind != "pixels" else features.dim) <= 768


def test_random_features_tell_digits_from_noise(split):
    features = make_features("random", train=split["train"], test=None)
    assert (features.accuracy, features.test_images) == (None, None)
    train, test = features(split["train"].images), features(split["test"].images)
    noise = torch.randint(
        0, 256, split["test"].images.shape, generator=torch.Generator().manual_seed(0)
    ).to(torch.uint8)
    blurred = torch.nn.functional.avg_pool2d(split["test"].images.float(), 3, 1, 1).to(torch.uint8)
    within = frechet(train, test)
    assert frechet(train, features(noise)) > 10 * within
    assert frechet(train, features(blurred)) > 3 * within
    again = make_features("random", train=split["train"], test=None)
    assert torch.equal(again(split["test"].images), test)


def test_pixels_are_averaged():
    train = images_of((3, 40, 16), n=4)
    features = make_features("pixels", train=train, test=None)
    found = features(train.images)
    assert found.shape == (4, features.dim) == (4, 3 * 14 * 16)
    found = found.view(4, 3, 14, 16)
    pixels = train.images.double() / 255
    torch.testing.assert_close(found[0, 1, 2, 5].double(), pixels[0, 1, 6:9, 5].mean())
    torch.testing.assert_close(found[0, 1, 13, 5].double(), pixels[0, 1, 39, 5])  # the rest


def test_auto_takes_the_classifier_where_labels_allow_it(split, cache, of_digits):
    assert make_features("auto", **split, cache=cache).name == "classifier"
    full, test = split["train"], split["test"]
    for train, tested in [
        (full, None),
        (full, dataclasses.replace(test, labels=None)),
        (dataclasses.replace(full, labels=None), test),
        (dataclasses.replace(full, labels=full.labels * 0), test),
        (dataclasses.replace(full, images=full.images[:499], labels=full.labels[:499]), test),
        (dataclasses.replace(full, labels=torch.arange(1258).clamp_max(10)), test),
    ]:
        assert make_features("auto", train=train, test=tested, cache=cache).name == "random"


def test_errors(split, tmp_path):
    train, test = split["train"], split["test"]
    alike = dataclasses.replace(train, labels=train.labels * 0)
    one = dataclasses.replace(train, images=train.images[:1], labels=train.labels[:1])
    with pytest.raises(GlannError, match=r"features = 'clasifier'.*'classifier'"):
        make_features("clasifier", train=train, test=test)
    with pytest.raises(GlannError, match="have none; use features 'random'"):
        make_features("classifier", train=dataclasses.replace(train, labels=None), test=test)
    with pytest.raises(GlannError, match="of 1 class"):
        make_features("classifier", train=alike, test=test, cache=tmp_path)
    with pytest.raises(GlannError, match="only for features 'inception'"):
        make_features("random", train=train, test=test, weights="file.pth")
    with pytest.raises(GlannError, match="wanted the same"):
        make_features("random", train=train, test=images_of((3, 8, 8)))
    with pytest.raises(GlannError, match="wanted 2 or more"):
        make_features("random", train=one, test=None)
    random = make_features("random", train=train, test=test)
    with pytest.raises(GlannError, match=r"shape \(3, 8, 8\).*of \(1, 8, 8\)"):
        random(images_of((3, 8, 8)).images)
    with pytest.raises(GlannError, match="features 'random' know no labels"):
        random.predict(test.images)


# ---------------------------------------------------------------------- Inception


class FakeInception(torch.nn.Module):
    def __init__(self, name, features_list, feature_extractor_weights_path):
        super().__init__()
        assert features_list == ["2048"]
        state = torch.load(feature_extractor_weights_path, weights_only=False)
        self.register_buffer("scale", state["scale"])

    def forward(self, images):
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 8, 8)
        return (images.double().flatten(1).mean(1, keepdim=True).expand(-1, 2048) * self.scale,)


@pytest.fixture
def torch_fidelity(monkeypatch):
    package, module = types.ModuleType("torch_fidelity"), types.ModuleType("extractor")
    module.FeatureExtractorInceptionV3 = FakeInception
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)


def test_inception_takes_grey_images_as_rgb(torch_fidelity, split, tmp_path):
    torch.save({"scale": torch.tensor(2.0)}, tmp_path / "weights.pth")
    features = make_features("inception", **split, weights=tmp_path / "weights.pth")
    found = features(split["test"].images)
    assert (features.dim, features.accuracy) == (2048, None)
    assert (found.shape, found.dtype) == ((539, 2048), torch.float32)
    torch.testing.assert_close(found[:, 7], 2 * split["test"].images.float().mean((1, 2, 3)))


def test_inception_without_its_package_or_weights(monkeypatch, split, tmp_path):
    with pytest.raises(GlannError, match=r"\(weights-inception.*--weights FILE"):
        make_features("inception", **split)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(GlannError, match=r"install glann\[inception\]"):
        make_features("inception", **split, weights=tmp_path / "weights.pth")


class Malicious:
    def __reduce__(self):
        return print, ("unpickled!",)


@pytest.mark.parametrize("content", [None, {"scale": Malicious()}, {"other": torch.ones(1)}])
def test_inceptions_weights_are_weights(content, torch_fidelity, split, tmp_path, capsys):
    path = tmp_path / "weights.pth"
    if content:
        torch.save(content, path)
    with pytest.raises(GlannError, match=r"weights = '.*can't be read as Inception's weights"):
        make_features("inception", **split, weights=path)
    assert "unpickled!" not in capsys.readouterr().out


def test_all_kinds_are_tested():
    assert FEATURES == ("auto", "classifier", "inception", "random", "pixels")
