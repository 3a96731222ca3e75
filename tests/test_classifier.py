import json

import pytest
import torch
from test_features import images_of

from glann.errors import GlannError
from glann.evaluation import classifier
from glann.evaluation.classifier import cache_entry, shifted
from glann.evaluation.features import make_features
from glann.places import cache_folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(classifier, "MOST_EPOCHS", 2)


@pytest.fixture
def trainings(monkeypatch):
    """Counts how often a classifier is trained."""
    calls, train = [], classifier.train_classifier

    def counted(*args, **kwargs):
        calls.append(1)
        return train(*args, **kwargs)

    monkeypatch.setattr("glann.evaluation.features.train_classifier", counted)
    return calls


@pytest.fixture
def sets():
    return {"train": images_of((1, 8, 8)), "test": images_of((1, 8, 8), n=20, seed=1)}


def make(sets, cache, news=None):
    say = (lambda text: None) if news is None else news.append
    return make_features("classifier", **sets, cache=cache, say=say)


def test_training_depends_on_images_and_labels_alone(sets, tmp_path):
    torch.manual_seed(5)
    one = make(sets, tmp_path / "one")
    state = torch.random.get_rng_state()
    torch.manual_seed(6)
    two = make(sets, tmp_path / "two")
    assert one.describe() == two.describe()
    assert torch.equal(one(sets["test"].images), two(sets["test"].images))
    torch.manual_seed(5)
    assert torch.equal(state, torch.random.get_rng_state())  # and leaves the global one alone
    other = make({**sets, "train": images_of((1, 8, 8), seed=2)}, tmp_path / "three")
    assert other.describe()["weights"] != one.describe()["weights"]


def test_test_images_are_only_measured_on(sets, tmp_path):
    one = make(sets, tmp_path / "one")
    two = make({**sets, "test": images_of((1, 8, 8), n=7, seed=3)}, tmp_path / "two")
    assert one.describe()["weights"] == two.describe()["weights"]
    assert (one.test_images, two.test_images) == (20, 7)
    none = make({**sets, "test": None}, tmp_path / "one")
    assert (none.accuracy, none.test_images) == (None, None)


def test_labels_may_be_any_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "MOST_EPOCHS", 10)
    train = images_of((1, 8, 8), n=256)
    train.labels[:] = train.labels * 1000 - 7
    predicted = make({"train": train, "test": None}, tmp_path).predict(train.images)
    assert (predicted == train.labels).double().mean() > 0.9


def test_what_is_kept_is_not_trained_again(sets, tmp_path, trainings):
    news = []
    first = make(sets, tmp_path, news)
    kept = sorted(path.name for path in tmp_path.rglob("*"))
    second = make(sets, tmp_path, news)
    assert len(trainings) == 1
    assert news == []
    assert first.describe() == second.describe()
    assert torch.equal(first(sets["test"].images), second(sets["test"].images))
    assert sorted(path.name for path in tmp_path.rglob("*")) == kept
    make({**sets, "test": None}, tmp_path, news)  # nor is it written again
    manifest = json.loads((cache_entry(sets["train"], tmp_path) / "manifest.json").read_text())
    assert (manifest["glann"], manifest["accuracy"]) == ("classifier", first.accuracy)


def test_other_images_labels_or_procedures_are_trained_anew(sets, tmp_path, trainings, monkeypatch):
    make(sets, tmp_path)
    relabelled = images_of((1, 8, 8))
    relabelled.labels[0] += 1
    make({**sets, "train": relabelled}, tmp_path)
    make({**sets, "train": images_of((1, 8, 8), seed=9)}, tmp_path)
    monkeypatch.setattr(classifier, "VERSION", classifier.VERSION + 1)
    make(sets, tmp_path)
    assert len(trainings) == len(list(tmp_path.iterdir())) == 4


def shorten(entry):
    (file,) = entry.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])


def no_weights(entry):
    (file,) = entry.glob("*.safetensors")
    file.unlink()


def of_other_shape(entry):
    other = {"train": images_of((3, 20, 20)), "test": None}
    make(other, entry.parent / "other")
    cache_entry(other["train"], entry.parent / "other").rename(entry.parent / "new")
    entry.rename(entry.parent / "old")
    (entry.parent / "new").rename(entry)


def no_json(entry):
    (entry / "manifest.json").write_text("{")


def no_parts(entry):
    manifest = json.loads((entry / "manifest.json").read_text())
    (entry / "manifest.json").write_text(json.dumps({**manifest, "files": {}}))


@pytest.mark.parametrize("damage", [shorten, no_weights, of_other_shape, no_json, no_parts])
def test_a_damaged_one_is_trained_again(damage, sets, tmp_path, trainings):
    news = []
    first = make(sets, tmp_path, news)
    damage(cache_entry(sets["train"], tmp_path))
    trainings.clear()
    second = make(sets, tmp_path, news)
    assert len(trainings) == len(news) == 1
    assert "trained again" in news[0]
    assert first.describe() == second.describe()
    assert make(sets, tmp_path, news).describe() == first.describe()  # it was mended
    assert len(trainings) == len(news) == 1


def test_a_cache_that_cannot_be_written_is_no_error(sets, tmp_path):
    (tmp_path / "file").write_text("in the way")
    news = []
    features = make(sets, tmp_path / "file" / "cache", news)
    assert features.accuracy is not None
    assert len(news) == 1
    assert "not kept" in news[0]


def test_two_processes_at_once(sets, tmp_path, trainings, monkeypatch):
    train = classifier.train_classifier

    def while_another_does_the_same(*args):
        network = train(*args)
        monkeypatch.setattr("glann.evaluation.features.train_classifier", train)
        with monkeypatch.context() as patch:
            patch.setattr(classifier, "BATCH", 16)  # as rounding would, it makes other weights
            found.append(make(sets, tmp_path, news))
        return network

    found, news = [], []
    monkeypatch.setattr("glann.evaluation.features.train_classifier", while_another_does_the_same)
    found.append(make(sets, tmp_path, news))
    assert found[0].describe()["weights"] != found[1].describe()["weights"]
    assert make(sets, tmp_path, news).describe() == found[1].describe()
    assert news == []


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"GLANN_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/glann"),
        ({"GLANN_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/glann"),
        ({"GLANN_CACHE": "~/kept"}, "/home/me/kept"),
    ],
)
def test_where_classifiers_are_kept(variables, folder, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("GLANN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(cache_folder()) == folder


def test_the_default_cache_is_used(sets, tmp_path, monkeypatch):
    monkeypatch.setenv("GLANN_CACHE", str(tmp_path))
    make(sets, None)
    assert cache_entry(sets["train"], tmp_path).is_dir()


def test_shifts_move_each_image_and_repeat_the_edge():
    images = torch.arange(28 * 20, dtype=torch.int32).view(1, 1, 28, 20).repeat(200, 3, 1, 1)
    moved = shifted(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    seen = set()
    for image in moved:
        down, across = divmod(int(image[0, 10, 10]) - (10 * 20 + 10), 20)
        if across > 10:
            down, across = down + 1, across - 20
        seen.add((down, across))
        rows = (torch.arange(28) + down).clamp(0, 27)
        columns = (torch.arange(20) + across).clamp(0, 19)
        assert torch.equal(image, images[0][:, rows][:, :, columns])
    assert seen == {(down, across) for down in (-1, 0, 1) for across in (-1, 0, 1)}


def test_progress_is_shown(sets, tmp_path, capsys):
    make_features("classifier", **sets, cache=tmp_path / "one")
    assert capsys.readouterr().err == ""
    make_features("classifier", **sets, cache=tmp_path / "two", progress=True)
    assert "classifier" in capsys.readouterr().err


def test_one_image_of_each_class_is_enough_to_go_on(tmp_path):
    train = images_of((1, 8, 8), n=2)
    make({"train": train, "test": None}, tmp_path)
    with pytest.raises(GlannError, match="wanted 2 or more"):
        make({"train": images_of((1, 8, 8), n=1), "test": None}, tmp_path)
