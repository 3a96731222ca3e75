"""Stacked digits: composing, reading, and a row."""

import pytest
import torch

from glann.errors import GlannError
from glann.studies import stacked, support
from glann.studies.stacked import composites, mode_of, stacked_row
from glann.studies.study import Place


class Reader:
    """Reads the digit that is an image's mean."""

    def predict(self, images):
        return images.float().mean((1, 2, 3)).round().long()


def flat(digits):
    return torch.tensor(digits, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)


def test_composites_are_channels_of_images_and_repeat():
    images = torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8)
    made = composites(images, 50, 3)
    assert (made.shape, made.dtype) == ((50, 3, 8, 8), torch.uint8)
    singles = {image.numpy().tobytes() for image in images[:, 0]}
    assert {channel.numpy().tobytes() for channel in made.flatten(0, 1)} <= singles
    assert made.equal(composites(images, 50, 3))
    assert not made.equal(composites(images, 50, 4))


def test_all_thousand_modes_are_composed_and_read():
    made = composites(flat(range(10)), 20_000, 0)
    modes = mode_of(made, Reader())
    assert modes.unique().tolist() == list(range(1000))
    red, green, blue = (made[:, channel, 0, 0].long() for channel in range(3))
    assert modes.equal(100 * red + 10 * green + blue)


@pytest.mark.parametrize("model", ["glann", "ns-gan", "floor"])
def test_a_row_of_digits(tmp_path, monkeypatch, model):
    from glann.recipes import make_recipe

    recipe = make_recipe(
        "tiny",
        {
            "data": {"source": "digits", "test_fraction": 0.3},
            "glo": {"code_dim": 8, "epochs": 1, "width": 8, "hidden": 32},
            "imle": {"noise_dim": 8, "width": 32, "depth": 2, "epochs": 1},
            "ns-gan": {"images_seen": 640},
        },
    )
    asked = []
    monkeypatch.setattr(stacked, "load_recipe", lambda *given: asked.append(given) or recipe)
    monkeypatch.setattr(support, "BIRTHDAY_SAMPLES", 100)
    place = Place(tmp_path, tmp_path.parent, key=f"stacked-{model}-0")
    changes = ["glo.epochs=1"]
    row = stacked_row(
        place, recipe="tiny", changes=changes, model=model, seed=0, composed=400, samples=300
    )
    assert asked == [("tiny", changes)]
    assert 1 <= row["found"] <= 300
    assert row["accuracy"] > 0.8
    assert row["kl"] >= 0
    assert row["cpu_seconds"] >= 0
    assert all((tmp_path / row[key]).is_file() for key in ("picture", "closest"))
    if model == "floor":
        assert row["recall"] > 0.7


def test_other_changes_are_another_training(tmp_path, monkeypatch):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        '[data]\nsource = "digits"\ntest_fraction = 0.3\n'
        "[glo]\ncode_dim = 8\nepochs = 1\nwidth = 8\nhidden = 32\n"
        "[imle]\nnoise_dim = 8\nwidth = 32\ndepth = 2\nepochs = 1\n"
    )
    monkeypatch.setattr(support, "BIRTHDAY_SAMPLES", 100)
    place = Place(tmp_path / "study", tmp_path, key="stacked-glann-0")
    arguments = {"recipe": str(recipe), "model": "glann", "seed": 0, "samples": 100}
    for changes, composed in ([], 100), (["glo.epochs=2"], 100), (["glo.epochs=2"], 120):
        stacked_row(place, changes=changes, composed=composed, **arguments)
    assert len([*(tmp_path / "study" / "training" / "stacked-glann-0").iterdir()]) == 3


def test_images_without_digits_are_refused(tmp_path):
    place = Place(tmp_path, tmp_path.parent)
    images = stacked.Images(flat([1, 2]), None, "folder", "", "", ())
    with pytest.raises(GlannError, match="no grey images of digits"):
        stacked._reader(images, images, place)
