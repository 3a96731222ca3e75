import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TINY_GLO, Killed

from glann import GLO, GlannError, glo
from glann import images as pixels
from glann.images import to_float, to_uint8
from glann.networks import to_sphere
from glann.optimisers import learning_rate


def reconstruction_error(fitted, images):
    with torch.no_grad():
        made = to_uint8(fitted.generator_(fitted.codes_))
    return float((to_float(made) - to_float(images)).abs().mean())


def test_overfits_eight_images(digits):
    eight = digits[:8]
    settings = {"code_dim": 8, "batch_size": 8, "width": 16, "hidden": 64}
    fitted = GLO(**settings, epochs=400, generator_lr=5e-3).fit(eight)
    assert reconstruction_error(fitted, eight) < 0.02


@pytest.mark.parametrize(
    "settings",
    [{"loss": "laplacian"}, {"loss": "l1"}, {"loss": "contrastive"}, {"blocks": "residual"}],
)
def test_learns_with_each_loss_and_of_all_blocks(digits, settings):
    few = GLO(**{**TINY_GLO, **settings}).fit(digits)
    many = GLO(**{**TINY_GLO, **settings, "epochs": 60}).fit(digits)
    assert reconstruction_error(many, digits) < 0.8 * reconstruction_error(few, digits)


@pytest.mark.parametrize("loss", ["contrastive", "scattering"])
def test_by_features_images_and_reconstructions_are_compared_wherever_both_are_moved_to(
    digits, monkeypatch, loss
):
    images, seen, ways = torch.nn.functional.interpolate(digits, 27), [], []
    moved, make_loss = pixels.moved, glo.make_loss

    def noting_ways(batch, by):
        ways.append(by)
        return moved(batch, by)

    def noting_images(*given):
        compared = make_loss(*given)

        def loss_of(made, wanted):
            seen.extend(image.numpy().tobytes() for image in wanted)
            return compared(made, wanted)

        return loss_of

    monkeypatch.setattr(glo, "make_loss", noting_images)
    GLO(**{**TINY_GLO, "loss": "scattering", "epochs": 1}).fit(images)
    still = {*seen}
    assert len(still) == len(images)
    seen.clear()
    monkeypatch.setattr(pixels, "moved", noting_ways)
    GLO(**{**TINY_GLO, "loss": loss, "epochs": 2}).fit(images)
    if loss == "scattering":  # which sees as much of all pixels
        assert not ways
        assert {*seen} == still
    else:
        assert 0 < sum(image in still for image in seen) < len(seen) / 4
        assert all(
            torch.equal(made, wanted) for made, wanted in zip(ways[::2], ways[1::2], strict=True)
        )


def test_half_precision_learns_as_well(digits):
    settings = {**TINY_GLO, "epochs": 40}
    full = GLO(**{**settings, "precision": "float32"}).fit(digits)
    half = GLO(**{**settings, "precision": "bfloat16"}).fit(digits)
    assert not torch.equal(full.codes_, half.codes_)
    assert {t.dtype for t in half.generator_.parameters()} == {torch.float32}
    assert half.codes_.dtype == torch.float32
    error = reconstruction_error(full, digits)
    assert reconstruction_error(half, digits) == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize(
    ("step", "optimiser"), [*((step, "adam") for step in (1, 4, 5, 7, 10, 19, 20)), (7, "muon")]
)
def test_killed_and_resumed_equals_straight_bit_for_bit(digits, tmp_path, kill_at, step, optimiser):
    settings = {**TINY_GLO, "optimiser": optimiser}
    straight = GLO(**settings).fit(digits, seed=3)  # 5 steps an epoch, 20 in all
    with pytest.MonkeyPatch.context():
        kill_at(step)
        with pytest.raises(Killed):
            GLO(**settings).fit(digits, seed=3, folder=tmp_path)
    kill_at(-1)
    resumed = GLO(**settings).fit(digits, seed=3, folder=tmp_path)
    assert torch.equal(straight.codes_, resumed.codes_)
    for name, value in straight.generator_.state_dict().items():
        assert torch.equal(value, resumed.generator_.state_dict()[name]), name


@pytest.mark.parametrize("settings", [{}, {"space": "ball"}, {"start": "random"}])
def test_codes_on_disk_are_those_in_memory_bit_for_bit(digits, tmp_path, settings, monkeypatch):
    memory = GLO(**TINY_GLO, **settings).fit(digits, seed=3)
    monkeypatch.setattr("glann.codes.CHUNK", 7 * 4 * 8)  # seven codes
    disk = GLO(**TINY_GLO, **settings, codes_on="disk").fit(digits, seed=3, folder=tmp_path)
    assert torch.equal(memory.codes_, disk.codes_)
    for name, value in memory.generator_.state_dict().items():
        assert torch.equal(value, disk.generator_.state_dict()[name]), name


@pytest.mark.parametrize("kept", [("disk", "disk"), ("memory", "disk"), ("disk", "memory")])
@pytest.mark.parametrize("step", [1, 7, 20])
def test_killed_and_resumed_with_codes_on_disk(digits, tmp_path, kill_at, kept, step):
    straight = GLO(**TINY_GLO).fit(digits, seed=3)
    kill_at(step)
    with pytest.raises(Killed):
        GLO(**TINY_GLO, codes_on=kept[0]).fit(digits, seed=3, folder=tmp_path)
    kill_at(-1)
    resumed = GLO(**TINY_GLO, codes_on=kept[1]).fit(digits, seed=3, folder=tmp_path)
    assert torch.equal(straight.codes_, resumed.codes_)
    for name, value in straight.generator_.state_dict().items():
        assert torch.equal(value, resumed.generator_.state_dict()[name]), name


@pytest.mark.parametrize(("where", "tables"), [("memory", 0), ("disk", 3)])
def test_codes_and_both_moments_are_where_the_setting_says(
    digits, tmp_path, monkeypatch, where, tables
):
    made, scratch = [], glo.scratch

    def spy(folder, shape):
        made.append((folder, shape))
        return scratch(folder, shape)

    monkeypatch.setattr(glo, "scratch", spy)
    GLO(**{**TINY_GLO, "epochs": 1}, codes_on=where).fit(digits, folder=tmp_path)
    assert made == [(tmp_path, (150, 8))] * tables
    names = {path.name.split("-")[0] for path in tmp_path.iterdir()}
    assert names == {"manifest.json", "log.jsonl", "generator", "codes", "reconstructions"}


MEMORY = """
import sys
from pathlib import Path
import torch
from glann import GLO, training

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024

def fit(n, where):
    images = torch.zeros(n, 1, 8, 8, dtype=torch.uint8).random_()
    sizes = {"code_dim": 128, "batch_size": 1000, "width": 4, "hidden": 8}
    glo = GLO(epochs=1, loss="l1", start="random", codes_on=where, **sizes)
    glo.fit(images, device="cpu", folder=Path(sys.argv[1], str(n)))

record = training.Training.record

def record_and_look(self, *args, **kwargs):
    record(self, *args, **kwargs)
    seen.append(held())

training.Training.record = record_and_look
seen = []
fit(3000, sys.argv[2])  # what the first steps take that is not given back
before, seen = held(), []
fit(50_000, sys.argv[2])
print(max(seen) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory it gave")
def test_codes_on_disk_take_no_memory(tmp_path):
    """Codes and moments have 73 MB, images 3."""
    grown = [
        int(subprocess.check_output([sys.executable, "-c", MEMORY, str(tmp_path / where), where]))
        for where in ("memory", "disk")
    ]
    assert grown[0] > 60
    assert grown[1] < 30


def test_codes_on_disk_need_a_folder(digits):
    with pytest.raises(GlannError, match="codes_on = 'disk' needs a folder"):
        GLO(**TINY_GLO, codes_on="disk").fit(digits)


def test_killed_often_logs_each_step_once(digits, tmp_path, kill_at, monkeypatch):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    kill_at(-1)
    GLO(**TINY_GLO).fit(digits, folder=straight)
    for step in (3, 6, 11, 12):
        kill_at(step)
        with pytest.raises(Killed):
            GLO(**TINY_GLO).fit(digits, folder=resumed)
    kill_at(-1)
    GLO(**TINY_GLO).fit(digits, folder=resumed)
    logs = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (straight, resumed)
    ]
    assert [line["step"] for line in logs[0]] == [5, 10, 15, 20]
    for a, b in zip(*logs, strict=True):
        assert (a["step"], a["loss"], a["lr"]) == (b["step"], b["loss"], b["lr"])


def test_done_is_not_trained_again(digits, tmp_path, monkeypatch):
    first = GLO(**TINY_GLO).fit(digits, folder=tmp_path)
    monkeypatch.setattr(GLO, "_train", None)
    again = GLO(**TINY_GLO).fit(digits, folder=tmp_path)
    assert torch.equal(first.codes_, again.codes_)
    assert abs(first.seconds_ - again.seconds_) < 0.01


def test_resume_refuses_other_or_reordered_images(digits, tmp_path):
    GLO(**TINY_GLO).fit(digits, folder=tmp_path)
    with pytest.raises(GlannError, match="different data"):
        GLO(**TINY_GLO).fit(digits.flip(0), folder=tmp_path)
    with pytest.raises(GlannError, match="epochs: then 4, now 5"):
        GLO(**{**TINY_GLO, "epochs": 5}).fit(digits, folder=tmp_path)
    with pytest.raises(GlannError, match="different seed"):
        GLO(**TINY_GLO).fit(digits, seed=1, folder=tmp_path)


def test_seeds(digits):
    a, b, c = (GLO(**TINY_GLO).fit(digits, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(a.codes_, b.codes_)
    assert not torch.equal(a.codes_, c.codes_)


def test_global_generator_is_left_alone(digits):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    GLO(**{**TINY_GLO, "epochs": 1}).fit(digits)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("start", ["pca", "random"])
def test_codes_stay_on_the_sphere(digits, start):
    codes = GLO(**TINY_GLO, start=start).fit(digits).codes_
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(len(digits)))


def test_codes_stay_in_the_ball(digits):
    codes = GLO(**TINY_GLO, space="ball").fit(digits).codes_
    assert codes.norm(dim=1).max() < 1 + 1e-5
    assert codes.norm(dim=1).min() < 0.9  # not merely a sphere


def test_every_image_counts_in_every_epoch(digits):
    start = GLO(**TINY_GLO)._starting_codes(digits, 0)
    codes = GLO(**{**TINY_GLO, "epochs": 1}).fit(digits).codes_
    moved = (codes - to_sphere(start)).abs().sum(1) > 0
    assert moved.all()


def test_codes_and_generator_have_learning_rates_of_their_own(digits):
    start = to_sphere(GLO(**TINY_GLO)._starting_codes(digits, 0))
    before = GLO(**TINY_GLO, code_lr=0.0, generator_lr=0.0).fit(digits).generator_.state_dict()
    for rate, codes_move, weights_move in (("code_lr", False, True), ("generator_lr", True, False)):
        fitted = GLO(**TINY_GLO, **{rate: 0.0}).fit(digits)
        assert codes_move != torch.allclose(fitted.codes_, start, atol=1e-6)
        weights = fitted.generator_.layers[0].weight
        assert weights_move != torch.equal(weights, before["layers.0.weight"])


def test_codes_follow_their_schedule_and_are_corrected_by_the_epochs_they_saw(digits, monkeypatch):
    given = []
    step = glo.CodeAdam.step

    def watched(adam, codes, rows, gradient, *more):
        given.append(more)
        return step(adam, codes, rows, gradient, *more)

    monkeypatch.setattr(glo.CodeAdam, "step", watched)
    GLO(**{**TINY_GLO, "epochs": 3}, schedule="cosine", code_lr=0.02).fit(digits)
    unbiased = glo.CodeAdam(torch.zeros(1, 1)).unbiased
    assert given == [
        (learning_rate("cosine", 0.02, number, 15), *unbiased(number // 5 + 1))
        for number in range(15)
    ]


def test_pca_start_is_sklearns(digits):
    from sklearn.decomposition import PCA

    start = GLO(code_dim=4)._starting_codes(digits, 0).numpy()
    flat = digits.flatten(1).numpy() / np.float32(255)
    oracle = PCA(4, svd_solver="full").fit_transform(flat)
    # Up to each component's sign and the .01 of noise.
    for mine, theirs in zip(start.T, oracle.T, strict=True):
        assert abs(np.corrcoef(mine, theirs)[0, 1]) > 0.99
    np.testing.assert_allclose(start.std(0), 1, atol=0.05)  # whitened


def test_pca_of_large_images_is_fitted_to_fewer_and_applied_in_parts(digits, monkeypatch):
    start = GLO(**TINY_GLO)._starting_codes
    whole = start(digits, 0)
    monkeypatch.setattr("glann.glo.PCA_NUMBERS", 8 * 64 * 7)  # seven digits at a time
    parts = start(digits, 0)
    assert not torch.equal(whole, parts)  # fitted to 56 of them
    assert parts.isfinite().all()
    axes = [torch.nn.functional.normalize(each - each.mean(0), dim=0) for each in (whole, parts)]
    assert float((axes[0][:, 0] @ axes[1][:, 0]).abs()) > 0.9


def test_pca_start_of_images_in_few_dimensions(digits):
    """What varies by rounding alone must not be blown up to as much as the rest."""
    base = digits[:2].repeat(20, 1, 1, 1)  # two images: one dimension
    start = GLO(code_dim=6)._starting_codes(base, 0)
    assert 0.9 < start[:, 0].std() < 1.1
    assert start[:, 1:].abs().max() < 0.1
    alike = GLO(code_dim=6)._starting_codes(digits[:1].repeat(40, 1, 1, 1), 0)
    assert alike.isfinite().all()
    assert alike.abs().max() < 0.1


def test_pca_start_with_fewer_images_than_dimensions(digits):
    codes = GLO(**{**TINY_GLO, "code_dim": 100, "batch_size": 4}).fit(digits[:6]).codes_
    assert codes.shape == (6, 100)
    assert codes.isfinite().all()


def test_bias_of_code_adam_is_corrected_by_visits():
    # With every row in every step it must be torch's Adam exactly.
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 3, generator=generator)
    mine, theirs = start.clone(), start.clone().requires_grad_()
    adam = glo.CodeAdam(mine)
    oracle = torch.optim.Adam([theirs], lr=0.1, betas=(0.5, 0.999))
    rows = torch.arange(5)
    for step in range(10):
        gradient = torch.randn(5, 3, generator=generator)
        mine[rows] = adam.step(mine, rows, gradient, 0.1, *adam.unbiased(step + 1))
        theirs.grad = gradient.clone()
        oracle.step()
    torch.testing.assert_close(mine, theirs.detach())


def test_code_adam_touches_only_its_rows():
    codes = torch.ones(4, 2)
    adam = glo.CodeAdam(codes)
    rows = torch.tensor([1, 3])
    codes[rows] = adam.step(codes, rows, torch.ones(2, 2), 0.1, *adam.unbiased(1))
    torch.testing.assert_close(codes, torch.tensor([[1, 1], [0.9, 0.9], [1, 1], [0.9, 0.9]]))
    assert (adam.mean[[0, 2]] == 0).all()
    assert (adam.square[[0, 2]] == 0).all()


def test_generator_is_in_evaluation_mode(digits):
    fitted = GLO(**{**TINY_GLO, "epochs": 1}).fit(digits)
    assert not any(module.training for module in fitted.generator_.modules())


@pytest.mark.parametrize("shape", [(3, 12, 20), (1, 9, 13), (3, 64, 64)])
def test_any_size_and_colour(shape):
    images = torch.randint(0, 256, (6, *shape), dtype=torch.uint8)
    fitted = GLO(code_dim=4, epochs=1, batch_size=4, width=4, hidden=8).fit(images)
    assert fitted.generator_(fitted.codes_).shape == images.shape


def test_numpy_arrays_are_taken(digits):
    a = GLO(**{**TINY_GLO, "epochs": 1}).fit(digits.numpy())
    b = GLO(**{**TINY_GLO, "epochs": 1}).fit(digits)
    assert torch.equal(a.codes_, b.codes_)


def test_half_an_epoch_sees_half_of_the_images(digits, tmp_path):
    GLO(**{**TINY_GLO, "epochs": 0.5}).fit(digits, folder=tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["items"] == pytest.approx(len(digits) / 2, abs=TINY_GLO["batch_size"])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(40, 1, 8, 8), "dtype float32; wanted uint8"),
        (torch.zeros(40, 8, 8, dtype=torch.uint8), "shape"),
        (torch.zeros(40, 2, 8, 8, dtype=torch.uint8), "1 or 3 channels"),
        (torch.zeros(40, 1, 4, 8, dtype=torch.uint8), "8 to 256"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "wanted 2 or more"),
        ([1, 2], "NumPy array or a tensor"),
    ],
)
def test_unfit_images_are_refused(images, message):
    with pytest.raises(GlannError, match=message):
        GLO(**TINY_GLO).fit(images)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("epochs", 0), ("hidden", 9.5), ("loss", "l3"), ("code_lr", -1.0), ("batch_norm", 1)],
)
def test_unfit_settings_are_refused_in_fit_not_before(digits, setting, value):
    glo = GLO(**{**TINY_GLO, setting: value})
    with pytest.raises(GlannError, match=f"glo.{setting}"):
        glo.fit(digits)


def test_a_loss_that_explodes_stops_and_keeps_the_last_checkpoint(digits, tmp_path, kill_at):
    kill_at(-1)
    with pytest.raises(GlannError, match="not finite"):
        GLO(**TINY_GLO, generator_lr=1e30, schedule="constant").fit(digits, folder=tmp_path)
