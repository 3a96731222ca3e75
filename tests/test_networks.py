import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from glann.networks import BLOCKS, Generator, Mapper, evaluation_mode, to_ball, to_sphere


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shapes(network: torch.nn.Module) -> list[tuple[int, ...]]:
    """Of all learned tensors, in order."""
    return [tuple(parameter.shape) for parameter in network.parameters()]


def used(network: torch.nn.Module) -> torch.nn.Module:
    """With statistics and weights of BatchNorm as they might be after training."""
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
                layer.weight.copy_(torch.rand(layer.num_features, generator=random) + 0.5)
                layer.bias.copy_(torch.randn(layer.num_features, generator=random) * 0.1)
                layer.running_mean.copy_(torch.randn(layer.num_features, generator=random) * 0.1)
                layer.running_var.copy_(torch.rand(layer.num_features, generator=random) + 0.5)
    return network.eval()


# ---------------------------------------------------------------------- the generator

sides = st.integers(2, 64).map(lambda quarter: 4 * quarter) | st.integers(8, 256)


@given(
    height=sides,
    width=sides,
    channels=st.sampled_from([1, 3]),
    batch_norm=st.booleans(),
    blocks=st.sampled_from(BLOCKS),
)
@settings(deadline=None, max_examples=25)
def test_images_have_the_size_that_was_asked_for(height, width, channels, batch_norm, blocks):
    shape = (channels, height, width)
    generator = Generator(3, shape, width=4, hidden=8, batch_norm=batch_norm, blocks=blocks)
    images = generator(drawn(2, 3))
    assert images.shape == (2, *shape)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert not torch.equal(images[0], images[1])


@given(height=sides, width=sides)
@settings(deadline=None, max_examples=15)
def test_the_first_map_of_features_is_at_most_8_by_8(height, width):
    generator = Generator(3, (1, height, width), width=4, hidden=8)
    (unflatten,) = (layer for layer in generator.layers if isinstance(layer, torch.nn.Unflatten))
    _, first_height, first_width = unflatten.unflattened_size
    assert max(first_height, first_width) <= 8
    doublings = sum(isinstance(layer, torch.nn.ConvTranspose2d) for layer in generator.layers)
    for side, first in ((height, first_height), (width, first_width)):
        assert 0 <= first * 2**doublings - side < 2**doublings


def test_the_published_network():
    generator = Generator(64, (1, 28, 28))
    assert shapes(generator) == [
        (1024, 64),
        (128 * 7 * 7, 1024),
        (128 * 7 * 7,),  # BatchNorm's weight and bias
        (128 * 7 * 7,),
        (128, 64, 4, 4),
        (64,),
        (64,),
        (64, 1, 4, 4),
        (1,),
    ]
    assert sum(p.numel() for p in generator.parameters()) == 6_632_833
    slopes = [x.negative_slope for x in generator.layers if isinstance(x, torch.nn.LeakyReLU)]
    assert slopes == [0.2, 0.2, 0.2]


def test_the_published_network_for_colour_without_batch_norm():
    generator = Generator(64, (3, 32, 32), batch_norm=False)
    assert shapes(generator) == [
        (1024, 64),
        (128 * 8 * 8, 1024),
        (128 * 8 * 8,),
        (128, 64, 4, 4),
        (64,),
        (64, 3, 4, 4),
        (3,),
    ]
    assert not list(generator.buffers())


def test_channels_halve_from_512_at_the_most():
    generator = Generator(8, (3, 256, 256), hidden=8)
    deconvolutions = [p.shape[:2] for p in generator.parameters() if p.ndim == 4]
    assert deconvolutions == [(512, 512), (512, 256), (256, 128), (128, 64), (64, 3)]


def test_residual_blocks_are_what_their_docstring_says():
    """BatchNorm – LeakyReLU – deconv – BatchNorm – LeakyReLU – conv, beside a doubled 1×1."""
    generator = used(Generator(5, (3, 12, 16), width=4, blocks="residual"))  # twice from 3×4
    first, unflatten, one, two, norm, _, last, _ = generator.layers
    assert [p.shape[:2] for p in generator.parameters() if p.ndim == 4] == [
        (16, 8), (8, 8), (8, 16), (8, 4), (4, 4), (4, 8), (3, 4),
    ]  # fmt: skip

    def normed(layer: torch.nn.BatchNorm2d, maps: torch.Tensor) -> torch.Tensor:
        mean, variance = layer.running_mean, layer.running_var
        maps = F.batch_norm(maps, mean, variance, layer.weight, layer.bias)
        return F.leaky_relu(maps, 0.2)

    codes = drawn(4, 5)
    maps = F.linear(to_sphere(codes), first.weight, first.bias).view(4, 16, 3, 4)
    assert unflatten.unflattened_size == (16, 3, 4)
    for block in (one, two):
        before, _, doubling, between, _, smoothing = block.layers
        inside = F.conv_transpose2d(normed(before, maps), doubling.weight, stride=2, padding=1)
        inside = F.conv2d(normed(between, inside), smoothing.weight, smoothing.bias, padding=1)
        beside = F.conv2d(maps, block.beside.weight, block.beside.bias)
        maps = inside + beside.repeat_interleave(2, 2).repeat_interleave(2, 3)
    wanted = F.conv2d(normed(norm, maps), last.weight, last.bias, padding=1).sigmoid()
    with torch.no_grad():
        torch.testing.assert_close(generator(codes), wanted)


def test_residual_blocks_take_a_fraction_of_the_numbers():
    count = {
        blocks: sum(
            p.numel() for p in Generator(64, (1, 28, 28), width, blocks=blocks).parameters()
        )
        for blocks, width in (("transposed", 64), ("residual", 32))
    }
    assert count["residual"] < count["transposed"] / 8


def test_the_generator_is_what_its_docstring_says():
    """FC – LeakyReLU – FC – BatchNorm – LeakyReLU – deconvolutions 4×4, stride 2 – sigmoid."""
    generator = used(Generator(5, (3, 36, 48), width=4, hidden=16))  # three doublings from 5×6
    codes = drawn(4, 5)
    (first, second, *norm1, kernel1, a1, b1, kernel2, a2, b2, kernel3, bias3) = [
        p.detach() for p in generator.parameters()
    ]
    means = [v for k, v in generator.state_dict().items() if k.endswith("running_mean")]
    variances = [v for k, v in generator.state_dict().items() if k.endswith("running_var")]

    x = F.leaky_relu(F.normalize(codes) @ first.T, 0.2)
    x = F.batch_norm(x @ second.T, means[0], variances[0], *norm1)
    x = F.leaky_relu(x, 0.2).view(4, 16, 5, 6)
    x = F.conv_transpose2d(x, kernel1, stride=2, padding=1)
    x = F.leaky_relu(F.batch_norm(x, means[1], variances[1], a1, b1), 0.2)
    x = F.conv_transpose2d(x, kernel2, stride=2, padding=1)
    x = F.leaky_relu(F.batch_norm(x, means[2], variances[2], a2, b2), 0.2)
    x = torch.sigmoid(F.conv_transpose2d(x, kernel3, bias3, stride=2, padding=1))
    assert x.shape == (4, 3, 40, 48)
    torch.testing.assert_close(generator(codes), x[:, :, 2:38])


def test_weights_start_as_xavier_normal_with_gain_root_2():
    torch.manual_seed(0)
    generator = Generator(64, (1, 28, 28))
    first, second, deconvolution = (generator.layers[i].weight for i in (0, 2, 6))
    for weight, fans in ((first, 64 + 1024), (second, 1024 + 6272), (deconvolution, 16 * 192)):
        assert weight.std().item() == pytest.approx(math.sqrt(2) * math.sqrt(2 / fans), rel=0.02)
        assert abs(weight.mean().item()) < 1e-3


def test_on_the_sphere_a_codes_length_does_not_count():
    generator = used(Generator(6, (1, 8, 8), width=4, hidden=8))
    codes = drawn(5, 6)
    lengths = torch.tensor([[0.01], [0.5], [1.0], [3.0], [1000.0]])
    torch.testing.assert_close(generator(codes * lengths), generator(codes))
    assert not torch.allclose(generator(-codes), generator(codes), atol=1e-3)


def test_in_the_ball_a_codes_length_counts():
    generator = used(Generator(6, (1, 8, 8), width=4, hidden=8, on_sphere=False))
    codes = drawn(5, 6)
    assert not torch.allclose(generator(0.5 * codes), generator(codes), atol=1e-3)


@pytest.mark.parametrize(
    "network",
    [
        Generator(4, (3, 12, 20), width=4, hidden=8, batch_norm=False, on_sphere=False),
        Generator(4, (1, 28, 28), width=5, hidden=9),
        Mapper(4, 3, width=8, depth=2, on_sphere=True),
        Mapper(4, 3, width=9, depth=1, on_sphere=False, cells=1),
    ],
)
def test_a_network_is_built_again_from_its_config(network):
    network = used(network)
    again = type(network)(**json.loads(json.dumps(network.config)))
    again.load_state_dict(network.state_dict())
    assert again.config == network.config
    assert torch.equal(again.eval()(drawn(3, 4)), network(drawn(3, 4)))


# ---------------------------------------------------------------------- the mapper


def test_glanns_mapper():
    mapper = Mapper(32, 64, width=128, depth=2, on_sphere=True)
    layer = [(128,), (128,)]  # BatchNorm's weight and bias
    assert shapes(mapper) == [(128, 32), *layer, (128, 128), *layer, (64, 128), (64,)]


@pytest.mark.parametrize("on_sphere", [False, True])
def test_the_mapper_is_what_its_docstring_says(on_sphere):
    mapper = used(Mapper(4, 3, width=8, depth=2, on_sphere=on_sphere))
    mapper.centres.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    mapper.scale.fill_(0.5)
    w1, a1, b1, w2, a2, b2, w3, bias = (p.detach() for p in mapper.parameters())
    state = mapper.state_dict()
    x = drawn(6, 4)
    wanted = x
    for i, (w, a, b) in enumerate([(w1, a1, b1), (w2, a2, b2)]):
        statistics = [state[f"layers.{3 * i + 1}.running_{name}"] for name in ("mean", "var")]
        wanted = F.relu(F.batch_norm(wanted @ w.T, *statistics, a, b))
    wanted = torch.tensor([1.0, 2.0, 3.0]) + 0.5 * (wanted @ w3.T + bias)
    wanted = F.normalize(wanted) if on_sphere else wanted
    torch.testing.assert_close(mapper(x), wanted)


def test_on_the_sphere_the_mapper_gives_codes_of_norm_1():
    for mode in (True, False):
        mapper = Mapper(4, 16, width=32, depth=3, on_sphere=True).train(mode)
        torch.testing.assert_close(mapper(drawn(50, 4)).norm(dim=1), torch.ones(50))


def test_what_the_mapper_learns_of_the_codes_unit_is_saved_with_it():
    learned = {"centres", "shares", "scale"}
    assert learned <= Mapper(4, 3, 8, 1, on_sphere=False).state_dict().keys()
    assert not learned & dict(Mapper(4, 3, 8, 1, False).named_parameters()).keys()


def test_a_cells_codes_are_around_its_centre():
    mapper = used(Mapper(4, 3, width=8, depth=1, on_sphere=False, cells=2))
    mapper.centres.copy_(torch.tensor([[-5.0, 0.0, 0.0], [5.0, 0.0, 0.0]]))
    mapper.scale.fill_(0.01)
    x, cells = drawn(6, 4), torch.tensor([0, 1, 0, 1, 1, 0])
    codes = mapper(x, cells)
    assert (codes - mapper.centres[cells]).norm(dim=1).max() < 0.2
    # and each cell has a map of its own
    there = mapper(x, torch.zeros(6, dtype=torch.int64)) - mapper.centres[0]
    here = mapper(x, torch.ones(6, dtype=torch.int64)) - mapper.centres[1]
    assert not torch.allclose(there, here, atol=1e-4)


def test_levels_add_to_each_other():
    mapper = used(Mapper(5, 3, width=8, depth=1, on_sphere=False, cells=2, levels=2))
    mapper.centres.copy_(torch.tensor([[-5.0, 0.0, 0.0], [5.0, 1.0, 0.0]]))
    mapper.scale.fill_(0.5)
    x, cells = drawn(6, 5), torch.tensor([0, 1, 0, 1, 1, 0])
    one, two = mapper(x, cells, every=True)
    assert torch.equal(two, one)  # a further level begins by adding nothing
    torch.nn.init.normal_(mapper.further[0][-1].weight)
    one, two = mapper(x, cells, every=True)
    around = mapper.centres[cells]
    known = (around - mapper.centres.mean(0)) / mapper.centres.std()
    added = mapper.further[0](torch.cat([x[:, 3:], known, (one - around) / 0.5], 1))
    torch.testing.assert_close(two, one + 0.5 * added)
    assert not torch.allclose(two, one, atol=0.01)
    assert torch.equal(mapper(x, cells), two)
    # each level has its own noise, and learns by itself
    other = torch.cat([x[:, :3], drawn(6, 2, seed=1)], 1)
    assert torch.equal(mapper(other, cells, every=True)[0], one)
    (gradient,) = torch.autograd.grad(two.sum(), mapper.layers[0].weight)
    assert not gradient.any()


def test_noise_picks_each_cell_as_often_as_it_has_codes():
    mapper = Mapper(4, 3, width=8, depth=1, on_sphere=False, cells=3)
    mapper.shares.copy_(torch.tensor([0.7, 0.1, 0.2]))
    cells = mapper.cells_of(drawn(20_000, 1)[:, 0])
    torch.testing.assert_close(cells.bincount() / 20_000, mapper.shares, atol=0.02, rtol=0)
    far = torch.tensor([-torch.inf, -20.0, 20.0, torch.inf])
    assert mapper.cells_of(far).tolist() == [0, 0, 2, 2]


# ---------------------------------------------------------------------- evaluation mode


def batch_norm_network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


@pytest.mark.parametrize("mode", [True, False])
def test_evaluation_mode_gives_back_the_mode_that_was(mode):
    network = batch_norm_network().train(mode)
    with evaluation_mode(network):
        assert not any(layer.training for layer in network.modules())
        assert not torch.is_grad_enabled()
    assert all(layer.training is mode for layer in network.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("mode", [True, False])
def test_evaluation_mode_gives_it_back_after_an_error(mode):
    network = batch_norm_network().train(mode)
    with pytest.raises(KeyboardInterrupt), evaluation_mode(network):
        raise KeyboardInterrupt
    assert all(layer.training is mode for layer in network.modules())
    assert torch.is_grad_enabled()


def test_evaluation_mode_uses_batch_norms_statistics_and_leaves_them():
    network = batch_norm_network().train()
    network(drawn(50, 3))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with evaluation_mode(network):
        together = network(drawn(10, 3, seed=1))
        alone = network(drawn(10, 3, seed=1)[:1])
    torch.testing.assert_close(together[:1], alone)
    assert not together.requires_grad
    after = network.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


# ---------------------------------------------------------------------- sphere and ball

rows = st.lists(
    st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3), min_size=1, max_size=5
).map(torch.tensor)


@given(codes=rows)
def test_to_sphere_keeps_directions_and_makes_norms_1(codes):
    on_sphere = to_sphere(codes)
    norms = codes.norm(dim=1)
    long_enough = norms > 1e-6
    made = on_sphere[long_enough]
    torch.testing.assert_close(made.norm(dim=1), torch.ones(len(made)))
    torch.testing.assert_close(made * norms[long_enough, None], codes[long_enough])
    assert on_sphere.isfinite().all()


def test_to_sphere_has_the_gradient_of_a_division_by_the_norm():
    random = torch.Generator().manual_seed(0)
    codes = torch.randn(4, 3, generator=random, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 3, generator=random, dtype=torch.float64)
    (found,) = torch.autograd.grad((to_sphere(codes) * weights).sum(), codes)
    (wanted,) = torch.autograd.grad(
        (codes / codes.norm(dim=1, keepdim=True) * weights).sum(), codes
    )
    torch.testing.assert_close(found, wanted)
    assert torch.autograd.gradcheck(to_sphere, codes)
    zeros = torch.zeros(1, 3, requires_grad=True)
    to_sphere(zeros).sum().backward()
    assert zeros.grad.isfinite().all()


@given(codes=rows)
def test_to_ball_moves_only_what_is_outside(codes):
    in_ball = to_ball(codes)
    norms = codes.norm(dim=1)
    inside = norms <= 1
    assert torch.equal(in_ball[inside], codes[inside])
    torch.testing.assert_close(in_ball[~inside], to_sphere(codes[~inside]))
