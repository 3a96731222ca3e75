"""The table's rows: what is measured, which ways of doing it, and what bounds it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from glann.bench import machine, ways
from glann.bench.ways import DIM, SHAPE, Sizes, Way
from glann.devices import pick_precision
from glann.nearest import search_at_once

Costs = dict[str, float]


@dataclass(frozen=True)
class Row:
    """One thing that is measured.

    Attributes:
        name: what --only calls it.
        what: for people, with the sizes.
        unit: of what a round counts.
        ways: how it is done: "ours", "plain", "faiss", "scikit-learn".
        costs: gives what an item takes of the machine's limits (a key of MACHINE → floating-point
            operations, or starts), under "", and for each part of a round under its name.
        note: what a reader has to know.
        n, points: codes and candidates, for the picture.
        once: takes so long that one round has to do.
        inside: the process that measures does the work, so that its peak memory is the work's.
    """

    name: str
    what: str
    unit: str
    ways: dict[str, Way]
    costs: Callable[[], dict[str, Costs]] = dict
    note: str = ""
    n: int | None = None
    points: int | None = None
    once: bool = False
    inside: bool = True


def rows(sizes: Sizes) -> list[Row]:
    """All rows, in the order in which they are measured."""
    m = 2 * sizes.codes
    at_once = search_at_once(sizes.device) is not None
    here = sizes.device.type == "cpu"
    trained = str(pick_precision("auto", sizes.device)).removeprefix("torch.")

    def products(points: int) -> Costs:
        # A kernel that makes them of six products in bfloat16 has no other limit; on a CPU that is
        # made for bfloat16 nearly all are in it, once.
        flops = 2.0 * points * DIM
        return {"bfloat16": 6 * flops} if at_once else {trained if here else "float32": flops}

    # A training step takes 3 times the forward pass: the gradients of each product's two factors.
    def image() -> float:
        return machine.forward_flops(ways.generator_of(sizes), DIM)

    def code() -> float:
        return machine.forward_flops(ways.mapper_of(sizes), DIM)

    def stage_two() -> dict[str, Costs]:
        parts: dict[str, Costs] = {
            "drawing": {trained: 2 * code()},
            "matching": products(m),
            "steps": {trained: 3 * code()},
        }
        whole: Costs = {}
        for costs in parts.values():
            for limit, cost in costs.items():
                whole[limit] = whole.get(limit, 0.0) + cost
        return {"": whole, **parts}

    others: dict[str, Way] = (
        {"faiss": ways.match_by_faiss} if ways.faiss is not None and here else {}
    )
    others |= {"scikit-learn": ways.match_by_sklearn} if here else {}
    return [
        Row(
            "stage-one",
            f"stage one, {sizes.images:,} images of {SHAPE[1]}×{SHAPE[2]}",
            "images",
            {"ours": ways.stage_one, "plain": ways.plain_stage_one},
            lambda: {"": {trained: 3 * image()}},
            note=f"batches of {sizes.batch}; {sizes.steps} steps a round, after {ways.SKIP} that "
            "don't count; plain goes on from round to round and is measured from its step "
            f"{sizes.warm_steps} on, when denormals have come into Adam's moments",
        ),
        Row(
            "training",
            f"stage one to the loss of {sizes.epochs} plain epochs",
            "trainings",
            {"ours": ways.training, "plain": ways.plain_training},
            note="of scikit-learn's digits, as large as MNIST's, from start to end, the start of "
            "the codes by PCA included; ours: with its defaults but the plain one's loss, and as "
            "few epochs as bring it as far on all images; plain: with the authors' learning "
            "rates, ten times halved; one round",
            once=True,
        ),
        Row(
            "stage-two",
            f"stage two, {sizes.codes:,} codes, {m:,} candidates",
            "codes",
            {"ours": ways.stage_two, "plain": ways.plain_stage_two},
            stage_two,
            note="one epoch a round: candidates drawn and mapped, one matching, all steps",
        ),
        Row(
            "matching",
            f"matching {sizes.queries:,} codes × {sizes.points:,} candidates, d {DIM}",
            "codes",
            {"ours": ways.match, "plain": ways.match_plainly, **others},
            lambda: {"": products(sizes.points)},
            note=f"ours: all {sizes.queries:,} codes; the others: the first "
            f"{sizes.fewer_queries:,} of them against all candidates",
        ),
        *(_growing_row(n, sizes, products) for n in sizes.grown),
        Row(
            "samples",
            f"samples, {sizes.samples:,} of {SHAPE[1]}×{SHAPE[2]}",
            "images",
            {"ours": ways.sample, "plain": ways.plain_sample},
            lambda: {"": {"float32": image() + code()}},
        ),
        Row(
            "features",
            f"features of {sizes.scored:,} images (random convolutions)",
            "images",
            {"ours": ways.features},
        ),
        Row(
            "scores",
            f"all scores, {sizes.scored:,} × {ways.FEATURES} features against as many",
            "evaluations",
            {"ours": ways.scores},
        ),
        Row(
            "start",
            "glann --help, from start to end",
            "starts",
            {"ours": ways.start, "plain": ways.start_with_torch},
            lambda: {"": {"start": 1.0}},
            note="plain: the same with torch imported first; the limit: Python that does nothing",
            inside=False,
        ),
    ]


def _growing_row(n: int, sizes: Sizes, products: Callable[[int], Costs]) -> Row:
    grown = replace(sizes, queries=n, fewer_queries=n, points=sizes.grown_points)
    # The plain reading of the largest would take minutes, to show what the others show.
    largest = n == max(sizes.grown)
    compared: dict[str, Way] = {"ours": lambda _: ways.match(grown)}
    if not largest:
        compared["plain"] = lambda _: ways.match_plainly(grown)
    return Row(
        "growth",
        f"matching {n:,} codes × {sizes.grown_points:,} candidates",
        "codes",
        compared,
        lambda: {"": products(sizes.grown_points)},
        note="all codes against all candidates; of the largest number one round",
        n=n,
        points=sizes.grown_points,
        once=largest,
    )


MACHINE: dict[str, tuple[str, Way]] = {
    "float32": (
        "operations",
        lambda s: machine.products(torch.float32, s.quick, s.device),
    ),
    "bfloat16": (
        "operations",
        lambda s: machine.products(torch.bfloat16, s.quick, s.device),
    ),
    "copy": ("bytes", lambda s: machine.copying(s.quick, s.device)),
    "start": ("starts", lambda s: ways.start_python(["-c", "pass"], s)),
}
"""The machine's limits: (unit, how it is measured)."""
