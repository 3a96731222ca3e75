import dataclasses
import json

import pytest
import torch
from conftest import TINY_IMLE, Killed

from glann import IMLE, GlannError, matching
from glann.errors import NotFinite
from glann.metric import image_metric
from glann.nearest import nearest
from glann.networks import Mapper, evaluation_mode
from glann.randomness import noise
from glann.training import Batches


@pytest.fixture(scope="module")
def codes():
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(150, 6, generator=generator), dim=1)


def ring(n=400, modes=8):
    """Points around `modes` places of a circle: (points, centres)."""
    angles = torch.arange(modes) * (2 * torch.pi / modes)
    centres = torch.stack([angles.cos(), angles.sin()], 1)
    generator = torch.Generator().manual_seed(0)
    points = centres.repeat(n // modes, 1) + 0.01 * torch.randn(n, 2, generator=generator)
    return points, centres


def test_drops_no_mode():
    points, centres = ring()
    model = IMLE(noise_dim=4, width=64, depth=2, epochs=300, batch_size=100, pool=5).fit(points)
    samples = model.sample(1000, seed=1)
    near, _ = nearest(samples, centres)
    shares = near.bincount(minlength=8) / 1000
    assert shares.min() > 0.04  # of .125
    # and every datum has a sample close by: what IMLE minimises
    _, distances = nearest(points, samples)
    assert distances.sqrt().max() < 0.2


def test_more_training_brings_samples_nearer():
    points, _ = ring()
    errors = []
    small = {"noise_dim": 4, "width": 64, "depth": 2, "batch_size": 100}
    for epochs in (2, 60):
        model = IMLE(**small, epochs=epochs, cells=1, keep=1, detail=0.0).fit(points)
        errors.append(float(nearest(points, model.sample(800))[1].mean()))
    assert errors[1] < errors[0] / 4


def test_half_precision_learns_as_well():
    points, _ = ring()
    errors = []
    for precision in ("float32", "bfloat16"):
        model = IMLE(
            noise_dim=4, width=64, depth=2, epochs=60, batch_size=100, precision=precision
        ).fit(points)
        errors.append(float(nearest(points, model.sample(800))[1].mean()))
    assert errors[1] < 2 * errors[0] + 1e-3
    assert errors[1] != errors[0]


def test_lists_log_how_often_the_nearest_was_found(codes, tmp_path):
    IMLE(**TINY_IMLE, search="ivf").fit(codes, folder=tmp_path / "ivf")
    IMLE(**TINY_IMLE).fit(codes, folder=tmp_path / "torch")
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("ivf", "torch")
    ]
    assert [line["recall"] for line in logs[0]] == [1.0] * 4  # so few are searched exactly
    assert not any("recall" in line for line in logs[1])


@pytest.mark.parametrize("step", [1, 5, 6, 12, 15, 20])
@pytest.mark.parametrize("more", [{}, {"keep": 3, "perturbation": 0.1, "refuse": 0.5}])
def test_killed_and_resumed_equals_straight_bit_for_bit(codes, tmp_path, kill_at, step, more):
    straight = IMLE(**TINY_IMLE, **more).fit(codes, seed=2)  # 5 steps an epoch, 20 in all
    kill_at(step)
    with pytest.raises(Killed):
        IMLE(**TINY_IMLE, **more).fit(codes, seed=2, folder=tmp_path)
    kill_at(-1)
    resumed = IMLE(**TINY_IMLE, **more).fit(codes, seed=2, folder=tmp_path)
    for name, value in straight.mapper_.state_dict().items():
        assert torch.equal(value, resumed.mapper_.state_dict()[name]), name


def test_a_resumed_run_keeps_its_metric(trained, tmp_path, kill_at):
    codes, generator = trained.codes, trained.generator
    straight = IMLE(**TINY_IMLE).fit(codes, generator=generator)
    kill_at(6)
    with pytest.raises(Killed):
        IMLE(**TINY_IMLE).fit(codes, generator=generator, folder=tmp_path)
    kill_at(-1)
    with pytest.raises(GlannError, match="different generator"):
        IMLE(**TINY_IMLE).fit(codes, folder=tmp_path)
    for _ in range(2):  # where it was, and once it is done
        resumed = IMLE(**TINY_IMLE).fit(codes, generator=generator, folder=tmp_path)
        assert torch.equal(straight.sample(20), resumed.sample(20))


def test_what_was_saved_keeps_its_metric(trained):
    model = IMLE(**TINY_IMLE).fit(trained.codes, generator=trained.generator)
    assert not torch.equal(model.metric_.stretch, model.metric_.back)
    loaded = IMLE.from_state(*model.state())
    assert torch.equal(loaded.sample(20), model.sample(20))


def test_a_resumed_run_goes_on_logging_the_recall(codes, tmp_path, kill_at):
    pytest.importorskip("faiss")
    kill_at(6)
    with pytest.raises(Killed):
        IMLE(**TINY_IMLE, search="ivf", keep=10).fit(codes, folder=tmp_path)
    kill_at(-1)
    IMLE(**TINY_IMLE, search="ivf", keep=10).fit(codes, folder=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len({line["recall"] for line in lines}) == 1  # of the one matching


def test_resume_refuses_other_codes(codes, tmp_path):
    IMLE(**TINY_IMLE).fit(codes, folder=tmp_path)
    with pytest.raises(GlannError, match="different data"):
        IMLE(**TINY_IMLE).fit(codes.flip(0), folder=tmp_path)


def test_both_searches_learn_the_same(codes):
    pytest.importorskip("faiss")
    a = IMLE(**TINY_IMLE, search="torch").fit(codes)
    b = IMLE(**TINY_IMLE, search="faiss").fit(codes)
    assert torch.equal(a.sample(10), b.sample(10))


@pytest.mark.parametrize("cells", [1, 4])
def test_each_code_is_matched_to_the_nearest_candidate_of_its_cell(codes, monkeypatch, cells):
    """The noise that a step learns from is the one whose candidate was nearest to its code."""
    matchings = []
    search = matching.nearest_in_groups

    def spy(*given):
        found = search(*given)
        matchings.append((*given, *found))
        return found

    monkeypatch.setattr(matching, "nearest_in_groups", spy)
    IMLE(**{**TINY_IMLE, "epochs": 1}, pool=3.0, cells=cells).fit(codes)
    ((queries, candidates, theirs, own, _, _, distances),) = matchings
    assert len(queries) == 150
    assert len(theirs) == cells
    assert torch.equal(own, 3 * theirs)
    queries, candidates = queries.split(theirs.tolist()), candidates.split(own.tolist())
    for mine, some, found in zip(
        queries, candidates, distances.split(theirs.tolist()), strict=True
    ):
        oracle = torch.cdist(mine, some).square()
        torch.testing.assert_close(oracle.min(1).values, found, atol=1e-5, rtol=1e-4)
    if cells > 1:  # a cell's codes are nearer to each other than to those of others
        means = torch.stack([mine.mean(0) for mine in queries])
        for number, mine in enumerate(queries):
            assert (nearest(mine, means)[0] == number).float().mean() > 0.9


def matched(model, codes, monkeypatch):
    """The noise of each matching of a training, in order."""
    noises = []
    match = IMLE.match

    def spy(*arguments):
        found = match(*arguments)
        noises.append(found[0].clone())
        return found

    monkeypatch.setattr(IMLE, "match", spy)
    model.fit(codes)
    return noises


def test_each_step_adds_other_numbers_to_the_chosen_noise(codes, monkeypatch):
    seen = []
    forward = Mapper.forward

    def watched(mapper, e, cells=None, every=False):
        if every:  # a step
            seen.append(e)
        return forward(mapper, e, cells, every)

    monkeypatch.setattr(Mapper, "forward", watched)
    model = IMLE(**TINY_IMLE, keep=9, perturbation=0.3).fit(codes, seed=2)  # a single matching
    batches = [rows for epoch in range(4) for rows in Batches(150, 32, 4).epoch_of(2, epoch)]
    added = [e - model.chosen_[rows] for e, rows in zip(seen, batches, strict=True)]
    assert float(torch.cat(added).std()) == pytest.approx(0.3, rel=0.05)
    torch.testing.assert_close(torch.cat(added).mean(0), torch.zeros(8), atol=0.03, rtol=0)
    firsts = torch.stack([each[0] for each in added])
    assert float((firsts[1:] - firsts[:1]).norm(dim=1).min()) > 1e-3


def test_the_loss_is_in_units_of_what_the_cells_centres_alone_would_give(codes, tmp_path):
    """The oracle, of a mapper that stays as it was and a batch of all codes."""
    still = {"lr": 0.0, "epochs": 1, "batch_size": 150}
    model = IMLE(**{**TINY_IMLE, **still}, cells=3).fit(3 * codes, folder=tmp_path)
    mapper = model.mapper_
    cells, squares = nearest(3 * codes, mapper.centres)
    assert float(mapper.scale) == pytest.approx(float(squares.mean() / 6) ** 0.5)
    with torch.no_grad():
        made = mapper.train()(model.chosen_, cells)
    wanted = (made - 3 * codes).square().mean() / (squares.mean() / 6)
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize(("keep", "matchings"), [(1, 4), (2, 2), (3, 2), (9, 1)])
def test_a_matching_is_kept_for_as_long_as_said(codes, monkeypatch, keep, matchings):
    assert len(matched(IMLE(**TINY_IMLE, keep=keep), codes, monkeypatch)) == matchings


@pytest.mark.parametrize("cells", [1, 4])
def test_candidates_are_drawn_anew_for_each_matching(codes, monkeypatch, cells):
    # Not refined, and of one level: or all noise would be other noise whatever was drawn at first.
    model = IMLE(**{**TINY_IMLE, "levels": 1}, keep=1, cells=cells, refine=0)
    first, second, *_ = matched(model, codes, monkeypatch)
    assert not (first[:, None] == second).all(2).any()


@pytest.mark.parametrize("cells", [1, 4])
def test_refused_candidates_are_not_chosen_unless_all_are(codes, monkeypatch, cells):
    """The oracle: of the candidates that are far enough from the cell's codes, the nearest."""
    searched, matched = [], []
    search, match = matching.nearest, matching.nearest_in_groups

    def spy_search(queries, points):
        searched.append((queries, points))
        return search(queries, points)

    def spy_match(*given):
        matched.append((given, searched[-cells:]))
        return match(*given)

    monkeypatch.setattr(matching, "nearest", spy_search)
    monkeypatch.setattr(matching, "nearest_in_groups", spy_match)
    IMLE(**{**TINY_IMLE, "epochs": 1}, pool=3.0, cells=cells, refuse=0.8).fit(codes)
    distances = torch.cdist(codes, codes).fill_diagonal_(torch.inf).amin(1)
    radius = 0.8 * float(distances.median())
    # In each cell a search for the codes near candidates, then a matching among those left.
    (((queries, left, theirs, own, _), searches),) = matched
    queries, left = queries.split(theirs.tolist()), left.split(own.tolist())
    refused = 0
    for (candidates, around), mine, kept in zip(searches, queries, left, strict=True):
        assert torch.equal(around, mine)
        far = torch.cdist(candidates, mine).amin(1) >= radius
        assert torch.equal(kept, candidates[far] if far.any() else candidates)
        refused += len(candidates) - len(kept)
    assert 0 < refused < 450


def test_what_is_left_after_refusing_is_not_refined(codes):
    """Or it would come as near to the codes again as what was refused."""
    mapper, cells = fitted_mapper(codes)
    counts = cells.bincount(minlength=len(mapper.centres))
    model = IMLE(**{**TINY_IMLE, "levels": 1}, pool=3.0, refine=4)
    chosen, _ = model.match(mapper, codes, cells, counts, 5, 2, radius=0.1)
    drawn = noise(5, "candidates 2", 0, 450, 8)
    assert (chosen[:, None] == drawn).all(2).any(1).all()


@pytest.mark.parametrize("pool", [0.01, 0.1])
def test_a_cell_of_few_codes_has_a_candidate_however_small_the_pool(codes, pool):
    assert IMLE(**TINY_IMLE, pool=pool).fit(codes).sample(5).isfinite().all()


def test_all_candidates_are_kept_where_all_are_refused(codes):
    plain, all_refused = (IMLE(**TINY_IMLE, refine=0, refuse=r).fit(codes) for r in (0.0, 1e6))
    assert torch.equal(plain.sample(50), all_refused.sample(50))


def test_codes_that_are_all_there_twice_refuse_nothing(codes):
    twice = codes[:75].repeat(2, 1)  # the nearest other code is at distance 0
    plain, refusing = (IMLE(**TINY_IMLE, refuse=r).fit(twice) for r in (0.0, 1.0))
    assert torch.equal(plain.sample(50), refusing.sample(50))


def test_groups_of_cells_make_no_difference(codes, monkeypatch):
    whole = matched(IMLE(**TINY_IMLE, cells=5), codes, monkeypatch)
    monkeypatch.setattr(matching, "GROUP", 100)
    parts = matched(IMLE(**TINY_IMLE, cells=5), codes, monkeypatch)
    assert torch.equal(whole[0], parts[0])


def test_matching_sees_what_sampling_will_make(codes):
    """Whatever mode the mapper is in, whose statistics stay as they are."""
    mapper, cells = fitted_mapper(codes, levels=2)
    counts = cells.bincount(minlength=len(mapper.centres))
    before = {name: value.clone() for name, value in mapper.state_dict().items()}
    sampling, training = (
        IMLE(**TINY_IMLE).match(mapper.train(mode), codes, cells, counts, 0, 0)[0]
        for mode in (False, True)
    )
    assert torch.equal(sampling, training)
    assert mapper.training
    assert all(torch.equal(value, before[name]) for name, value in mapper.state_dict().items())


@pytest.mark.parametrize("refine", [1, 4])
def test_refined_noise_is_nearer(codes, refine):
    """And farther for no code."""
    mapper, cells = fitted_mapper(codes)
    counts = cells.bincount(minlength=len(mapper.centres))
    errors = []
    for turns in (0, refine):
        model = IMLE(**{**TINY_IMLE, "levels": 1}, refine=turns)
        e, _ = model.match(mapper, codes, cells, counts, 0, 0)
        errors.append((mapper(e, cells).detach() - codes).square().sum(1))
    assert (errors[1] <= errors[0]).all()
    assert float(errors[1].mean()) < (0.99 if refine == 1 else 0.95) * float(errors[0].mean())


def fitted_mapper(codes, levels=1):
    model = IMLE(**{**TINY_IMLE, "levels": levels}, cells=4).fit(codes)
    return model.mapper_, nearest(codes, model.mapper_.centres)[0]


def test_each_level_adds_what_those_before_left_out(codes):
    model = IMLE(**{**TINY_IMLE, "epochs": 40, "levels": 3}).fit(codes)
    cells, _ = nearest(codes, model.mapper_.centres)
    with torch.no_grad():
        made = model.mapper_(model.chosen_, cells, every=True)
    left = (made - codes).square().sum(2).mean(1)
    assert left[1] < 0.9 * left[0]
    assert left[2] < 0.9 * left[1]


def test_a_further_level_chooses_among_candidates_of_its_own(codes):
    """The oracle: of its draws the one that brings what the first level made the nearest."""
    mapper, cells = fitted_mapper(codes, levels=2)
    counts = cells.bincount(minlength=len(mapper.centres))
    chosen, _ = IMLE(**TINY_IMLE, refine=0).match(mapper, codes, cells, counts, 5, 3)
    first, second = chosen.split(mapper.noise_dims, 1)
    each = matching.CHANGES * mapper.noise_dims[1]
    rounds = [
        noise(5, f"change 3 of level 1 {turn}", 0, len(codes), each).view(len(codes), -1, 4)
        for turn in range(matching.FRESH)
    ]
    drawn = torch.cat(rounds, 1)
    with torch.no_grad():
        before = mapper.level(0, first, cells)
        made = [mapper.level(1, drawn[:, j], cells, before) for j in range(drawn.shape[1])]
    best = (torch.stack(made, 1) - codes[:, None]).square().sum(2).argmin(1)
    assert torch.equal(second, drawn[torch.arange(len(codes)), best])


def test_a_further_level_goes_on_from_what_refined_noise_makes(codes, monkeypatch):
    mapper, cells = fitted_mapper(codes, levels=2)
    counts = cells.bincount(minlength=len(mapper.centres))
    went_on_from = []
    level = Mapper.level

    def watched(mapper, number, e, of_cells=None, before=None):
        if number and len(e) == len(codes):
            went_on_from.append(before)
        return level(mapper, number, e, of_cells, before)

    monkeypatch.setattr(Mapper, "level", watched)
    chosen, _ = IMLE(**TINY_IMLE, refine=4).match(mapper, codes, cells, counts, 5, 3)
    with evaluation_mode(mapper):
        made = level(mapper, 0, chosen[:, : mapper.noise_dims[0]], cells)
    torch.testing.assert_close(went_on_from[0], made)


def test_a_level_without_noise_is_refused(codes):
    with pytest.raises(GlannError, match=r"imle\.levels = 9, and imle\.noise_dim = 8"):
        IMLE(**{**TINY_IMLE, "levels": 9}).fit(codes)


def test_parts_that_are_refined_together_make_no_difference(codes, monkeypatch):
    mapper, cells = fitted_mapper(codes, levels=2)
    counts = cells.bincount(minlength=len(mapper.centres))
    found = []
    for together in (1024, 7):
        monkeypatch.setitem(matching.REFINED, "cpu", together)
        found.append(IMLE(**TINY_IMLE).match(mapper, codes, cells, counts, 0, 0)[0])
    torch.testing.assert_close(*found)


def test_codes_are_matched_by_their_images(trained, monkeypatch):
    """In coordinates in which distances are those of images, to first order."""
    codes, generator = trained.codes, trained.generator
    queries = []
    search = matching.nearest_in_groups

    def spy(query, *more):
        queries.append(query)
        return search(query, *more)

    monkeypatch.setattr(matching, "nearest_in_groups", spy)
    small = {**TINY_IMLE, "epochs": 1, "cells": 1}
    by_images = IMLE(**small).fit(codes, generator=generator)
    by_codes = IMLE(**small, metric="codes").fit(codes, generator=generator)
    unknown = IMLE(**small).fit(codes)
    matrix = image_metric(generator, codes)
    apart = codes - codes.mean(0)
    oracle = float((apart @ matrix * apart).sum() / matrix.trace() * len(matrix))
    spreads = [float((query - query.mean(0)).square().sum()) for query in queries]
    assert spreads[0] == pytest.approx(oracle, rel=1e-3)
    assert spreads[1] == pytest.approx(float(apart.square().sum()), rel=1e-3)
    assert torch.equal(by_codes.sample(50), unknown.sample(50))
    torch.testing.assert_close(by_images.sample(50).norm(dim=1), torch.ones(50))


def test_cells_are_as_often_sampled_as_they_have_codes():
    generator = torch.Generator().manual_seed(0)
    codes = 0.05 * torch.randn(400, 2, generator=generator)
    codes[:40] += 3  # one in ten
    model = IMLE(noise_dim=2, width=32, depth=2, epochs=30, cells=2, keep=5).fit(codes)
    samples = model.sample(5000)
    away = (samples - 3).norm(dim=1) < 1
    assert float(away.float().mean()) == pytest.approx(0.1, abs=0.015)
    # and there is nothing between the two, where the map of a single cell would have to pass
    assert (samples[~away].norm(dim=1) < 1).all()


def test_details_are_what_the_mapper_left_out_of_the_nearest_code(codes):
    model = IMLE(**TINY_IMLE, detail=1.0).fit(codes)
    anchors, details = model.details_
    torch.testing.assert_close(anchors + details, codes)
    bare = dataclasses.replace(model, detail=0.0).fit(codes)
    assert not len(bare.details_.anchors)
    made = bare.sample(40, seed=3)  # the same mapper's
    oracle = made + details[torch.cdist(made, anchors).argmin(1)]
    oracle = torch.nn.functional.normalize(oracle, dim=1)
    torch.testing.assert_close(model.sample(40, seed=3), oracle, atol=1e-5, rtol=0)


def test_details_of_another_code_are_added_to_those_of_the_nearest(codes):
    plain = IMLE(**TINY_IMLE, detail=0.5).fit(codes)
    mixed = dataclasses.replace(plain, mix=1.5).fit(codes)
    bare = dataclasses.replace(plain, detail=0.0).fit(codes).sample(40, seed=3)
    anchors, details = plain.details_
    first = torch.cdist(bare, anchors).argmin(1)
    wanted = torch.empty_like(bare)
    for k, code in enumerate(bare):
        others = torch.arange(len(anchors))[(int(first[k]) + 1) % 2 :: 2]
        other = others[(anchors[others] - code).norm(dim=1).argmin()]
        wanted[k] = code + details[first[k]] + 1.5 * details[other]
    wanted = torch.nn.functional.normalize(wanted, dim=1)
    torch.testing.assert_close(mixed.sample(40, seed=3), wanted, atol=1e-5, rtol=0)
    only = plain.with_fewer_details(1)  # there is no other
    before = only.sample(40, seed=3)
    only.mix = 1.5
    assert torch.equal(only.sample(40, seed=3), before)


@pytest.mark.parametrize("tries", [2, 5])
def test_of_several_candidates_a_sample_is_the_first_but_the_farthest(codes, tries):
    once = IMLE(**TINY_IMLE, detail=1e-9).fit(codes)
    often = dataclasses.replace(once, tries=tries).fit(codes)
    made = [model.sample(3000, seed=1) for model in (once, often)]
    near = [nearest(each, once.details_.anchors)[1] for each in made]
    others = (made[0] != made[1]).any(1)
    assert float(others.float().mean()) == pytest.approx(1 / tries, abs=0.03)
    assert (near[1][others] <= near[0][others] + 1e-6).all()
    assert near[1][others].mean() < 0.7 * near[0][others].mean()
    # All are of one cell: each keeps its share.
    cells = [nearest(each, once.mapper_.centres)[0] for each in made]
    assert (cells[0] == cells[1]).float().mean() > 0.8
    assert torch.equal(often.sample(20, seed=1, start=7), often.sample(30, seed=1)[7:27])
    assert torch.equal(IMLE.from_state(*often.state()).sample(20, seed=1), often.sample(20, seed=1))


def test_each_candidate_of_a_sample_has_noise_of_its_own(codes, monkeypatch):
    model = IMLE(**TINY_IMLE, tries=3).fit(codes)
    seen = []
    forward = Mapper.forward

    def watched(mapper, e, *more):
        seen.append(e)
        return forward(mapper, e, *more)

    monkeypatch.setattr(Mapper, "forward", watched)
    model.sample(1024)
    numbers = torch.cat(seen)
    assert numbers.shape == (3 * 1024, 8)
    assert len(numbers.unique()) > 0.99 * numbers.numel()  # of so many a few are equal by chance


def test_details_bring_back_what_was_averaged_away():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(600, 8, generator=generator)  # no mapper can follow noise
    spreads = [
        float(IMLE(noise_dim=2, width=16, depth=1, epochs=5, detail=d).fit(codes).sample(500).var())
        for d in (0.0, 0.5, 1.0)
    ]
    assert spreads[0] < spreads[1] < spreads[2]
    assert spreads[0] < 0.6
    assert 0.8 < spreads[2] < 1.2


def test_no_more_cells_than_distinct_codes(codes):
    few = codes[:3].repeat(20, 1)
    model = IMLE(**TINY_IMLE, cells=10).fit(few)
    assert len(model.mapper_.centres) == 3
    torch.testing.assert_close(
        nearest(model.sample(50), few)[1], torch.zeros(50), atol=1e-3, rtol=0
    )
    assert len(IMLE(**TINY_IMLE).fit(codes).mapper_.centres) == 12  # of 150 codes
    many = torch.rand(6400, 2, generator=torch.Generator().manual_seed(0))
    assert len(IMLE()._centres(many, 0, torch.device("cpu"))) == 100  # one for 64, more than a root


@pytest.mark.parametrize("seed", range(6))
def test_codes_that_are_alike_but_for_rounding(codes, seed):
    """One of their centres may be no code's nearest: ties are broken by how sums are rounded."""
    free = codes[:20] * torch.linspace(0.5, 2, 20)[:, None]
    random = torch.Generator().manual_seed(seed)
    alike = free.repeat(50, 1) * (1 + 1e-7 * torch.randn(1000, 6, generator=random))
    model = IMLE(**{**TINY_IMLE, "epochs": 1}).fit(alike, seed=seed)
    assert len(model.mapper_.shares) == len(model.mapper_.centres)
    assert float(model.mapper_.shares.sum()) == pytest.approx(1)
    assert nearest(model.sample(50), free)[1].max() < 0.1


def test_numbers_that_are_not_finite_stop_it_at_a_picture_too(codes, tmp_path):
    for folder in (None, tmp_path):
        with pytest.raises(NotFinite):
            IMLE(**{**TINY_IMLE, "lr": 1e30}).fit(codes, folder=folder)


def test_what_was_loaded_knows_no_longer_which_noise_was_chosen(codes):
    model = IMLE.from_state(*IMLE(**TINY_IMLE).fit(codes).state())
    with pytest.raises(GlannError, match="doesn't keep the noise"):
        model.reached(codes)


def test_units_of_the_codes_do_not_matter(codes):
    free = codes * torch.linspace(0.5, 1, 150)[:, None]  # off the sphere
    a = IMLE(**TINY_IMLE).fit(free).sample(50)
    b = IMLE(**TINY_IMLE).fit(free * 64 + 256).sample(50)
    torch.testing.assert_close(a * 64 + 256, b, rtol=0, atol=0.1)


def test_samples_are_on_the_sphere_when_codes_are(codes):
    model = IMLE(**TINY_IMLE).fit(codes)
    torch.testing.assert_close(model.sample(20).norm(dim=1), torch.ones(20))


def test_mapper_is_in_evaluation_mode(codes):
    model = IMLE(**TINY_IMLE).fit(codes)
    assert not any(module.training for module in model.mapper_.modules())
