"""What each process of test_processes.py does; torchrun starts it, and it leaves a file a rank."""

import contextlib
import os
import sys
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import TINY_GLO, TINY_IMLE, TINY_TUNING
from safetensors.torch import load_file, save_file
from torch import nn

from glann import GLANN, GLO, IMLE, FineTuning, formats, processes, training
from glann.data import Images
from glann.evaluation.features import make_features
from glann.networks import Generator
from glann.randomness import seeded


class Stopped(Exception):
    pass


def batch_norms(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Statistics over uneven parts of one batch, of which this process has none or all, or some."""
    results = {}
    for name, cut in (("even", 6), ("uneven", 3), ("none", 0)):
        rows = slice(0, cut) if processes.is_first() else slice(cut, None)
        network = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
        network.load_state_dict(
            {key[3:]: t.clone() for key, t in given.items() if key[:3] == "bn."}
        )
        batch = given["batch"][rows].clone().requires_grad_()
        model = processes.parallel(network)
        model(batch).square().sum().backward()
        whole = torch.zeros_like(given["batch"])
        whole[rows] = batch.grad
        results[f"{name}.input"] = processes.total(whole)
        results[f"{name}.weight"] = network[0].weight.grad
        results[f"{name}.scale"] = network[1].weight.grad
        results[f"{name}.mean"] = network[1].running_mean
        results[f"{name}.variance"] = network[1].running_var
    return results


def exchanges() -> dict[str, torch.Tensor]:
    said = [processes.is_first_to_say(text) for text in ("ä", f"{processes.rank()}", "ä")]
    table = torch.arange(14.0).reshape(7, 2)
    share = processes.Share(7)
    rows = torch.tensor([5, 2, 0, 3])
    mine = share.of(rows)
    own = table[share.items]
    parts = torch.arange(10).split(4)
    return {
        "whole": share.whole(own),
        "first": share.first(own, 3),
        "found": processes.total(torch.zeros(7, 2).index_copy_(0, mine, own[share.places(mine)])),
        "parts": processes.by_parts(parts, lambda part: 10 * part),
        "one part": processes.by_parts(parts[:1], lambda part: part.to(torch.uint8)),
        "said": processes.total(torch.tensor(said).long()),
        "any": torch.tensor(processes.any_of([processes.rank() == 1, False])),
    }


def kept_in_cache(images: torch.Tensor, folder: Path) -> torch.Tensor:
    """Scaled images that go to a file, which one process writes and all map."""
    os.environ["GLANN_CACHE"] = str(folder / "cache")
    formats.IN_MEMORY = 0
    return formats.fit(images[:20], (16, 16), None)


def classified(images: torch.Tensor, folder: Path) -> dict[str, torch.Tensor]:
    """Features by a classifier of which only the first process's cache has one."""
    rank = processes.rank()
    torch.set_num_threads(1 + rank)  # rounds differently, as other machines and GPUs do
    many = images.repeat(4, 1, 1, 1)[:600]
    labels = (many.float().mean((1, 2, 3)) > many.float().mean()).long()
    train = Images(many, labels, "array", "a fingerprint", "here", ("dark", "light"))
    made = {}
    for when in ("first", "again"):
        cache = folder / f"cache-of-{rank}"
        features = make_features("classifier", train=train, test=None, cache=cache)
        made[f"features.{when}"] = features(many)
    with torch.no_grad():
        made["features.own"] = torch.cat([features.network(part) for part in many.split(256)])
    torch.set_num_threads(1)
    return made


def stop_at(step: int) -> None:
    record = training.Training.record

    def record_or_stop(self, *args, **kwargs):
        record(self, *args, **kwargs)
        if self.step == step:
            raise Stopped

    training.Training.record = record_or_stop


def main(folder: Path) -> None:
    processes.start()
    torch.set_num_threads(1)
    given = load_file(folder / "given.safetensors")
    images, codes = given["images"], given["codes"]
    glo = GLO(**TINY_GLO).fit(images, seed=3, folder=folder / "glo")
    imle = IMLE(**TINY_IMLE, perturbation=0.1, refuse=0.8).fit(
        codes, seed=3, folder=folder / "imle"
    )
    few = GLO(**{**TINY_GLO, "batch_size": 3, "epochs": 2, "loss": "contrastive"}).fit(
        given["large"][:9]
    )  # a process may get 0
    with seeded(0, "untrained"):
        untrained = Generator(8, (1, 18, 18), width=8, hidden=32)
    tuned = FineTuning(**TINY_TUNING).fit(
        given["large"],
        codes,
        untrained,
        samples=codes.flip(0),
        like=GLO(**TINY_GLO),
        seed=3,
        folder=folder / "finetune",
    )
    results = {
        "codes": glo.codes_,
        "few": few.codes_,
        "samples": GLANN(glo.generator_, imle).sample(600),
        **{f"glo.{key}": value for key, value in glo.generator_.state_dict().items()},
        **{f"imle.{key}": value for key, value in imle.state()[1].items()},
        **{f"finetune.{key}": value for key, value in tuned.generator_.state_dict().items()},
        **batch_norms(given),
        **exchanges(),
        "scaled": kept_in_cache(images, folder),
        **classified(images, folder),
    }
    # What one process began, and what one process is to go on with.
    results["resumed"] = GLO(**TINY_GLO).fit(images, seed=3, folder=folder / "begun-by-1").codes_
    training.CHECKPOINT_SECONDS = 0
    stop_at(15)
    for model, data in ((GLO(**TINY_GLO), images), (IMLE(**TINY_IMLE), codes)):
        with contextlib.suppress(Stopped):
            model.fit(data, seed=3, folder=folder / f"{type(model).__name__}-begun-by-2")
    results = {key: value.contiguous().clone() for key, value in results.items()}
    save_file(results, folder / f"{processes.rank()}.safetensors")
    group = weakref.ref(dist.group.WORLD)
    processes.stop()
    assert group() is None  # else its threads live on, and may abort the process at its end


main(Path(sys.argv[1]))
