"""Fine-tuning: the generator learns to make training images of such codes as samples have.

Stage one taught it the codes of training images, and no others.  Near such a code z, stage two's
samples have the code T(e) + a (z − T(e)), with what the mapper makes of noise and a share of what
it leaves out (`IMLE.reached`): they are shrunk towards each other, and their images are dull.  The
less a mapper explains of the codes, the more so.  Pairs of noise and image are known from the last
matching, so the generator is taught what each of these codes should have been.

That says nothing of what noise makes that no code chose, as most noise is.  So samples are made
beside these images, and their features are to be spread as training images' are
(`glann.distance`).
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch

from glann import images as pixels
from glann import processes
from glann.codes import as_codes
from glann.contrastive import Features, images_at_once
from glann.devices import Replayed, Rows, autocast, pick_device, pick_precision
from glann.distance import Distance
from glann.errors import GlannError
from glann.glo import GLO, SHOWN, reconstruction_rows
from glann.losses import LOSSES, make_loss
from glann.networks import Generator
from glann.optimisers import (
    SCHEDULES,
    learning_rate,
    load_optimiser_state,
    make_optimiser,
    optimiser_state,
    set_learning_rate,
)
from glann.randomness import generator as random_generator
from glann.settings import as_dict, check, setting
from glann.storage import fingerprint
from glann.training import Batches, Parts, Training, learning


@dataclass(kw_only=True)
class FineTuning:
    """A generator's last lessons: min over G of mean ℓ(G(z̃_i), x_i) + λ D(G(s), x).

    The codes z̃_i are held fixed, and so are samples' codes s; D is the energy distance and the
    Fréchet distance of features.

    After `fit`: `generator_`, in evaluation mode, and `seconds_`, the time that training took.
    """

    epochs: float = setting(
        2.0, "passes over the images; in recipes 0: no fine-tuning", minimum=0.01
    )
    batch_size: int = setting(128, "images in a step, at the most", minimum=2)
    lr: float = setting(5e-3, "learning rate", minimum=0)
    schedule: str = setting("one-cycle", "how the learning rate changes", choices=SCHEDULES)
    loss: str | None = setting(None, "reconstruction loss; none: stage one's", choices=LOSSES)
    distance: float = setting(
        6.67,
        "weight of the loss that compares samples with training images as distributions, by what "
        "images teach without labels; 0: samples are not looked at",
        minimum=0,
    )
    sample_batch_size: int = setting(
        192,
        "samples in a step beside the images, at the most: of large images there are fewer",
        minimum=2,
    )

    @learning
    def fit(
        self,
        images: object,
        codes: object,
        generator: Generator,
        *,
        samples: object = None,
        like: GLO | None = None,
        features: Features | None = None,
        seed: int = 0,
        device: str = "auto",
        folder: str | Path | None = None,
        progress: bool = False,
    ) -> "FineTuning":
        """Teach a copy of a generator to make images of codes.

        Args:
            images: uint8 `(n, channels, height, width)`, a NumPy array or a tensor.
            codes: float `(n, code_dim)`, row i for image i, as `IMLE.reached`.
            generator: what is to learn on, as `GLO.generator_`; it is left as it is.
            samples: samples' codes, as many as images, float `(n, code_dim)`, as `IMLE.fresh` gives
                them; None: they are not looked at.
            like: stage one, whose optimiser and precision are used, and whose loss where there is
                no other; None: its defaults.
            features: which the loss "contrastive" and that distance compare, as
                `GLO.features_`; None: learned as stage one does, first.
            seed: of the order of the images.
            device: "auto", "cpu", "cuda", …
            folder: where checkpoint, log and pictures go; the same call resumes there.
            progress: show progress on standard error.

        Returns:
            self.

        Raises:
            GlannError: a setting out of range, images or codes that don't fit the generator or each
                other, a folder of another training, a loss that is not finite; Interrupted after
                Ctrl-C, when there is a folder.
        """
        check(self, "finetune")
        images, codes, like = pixels.as_images(images), as_codes(codes), like or GLO()
        _check_fit(images, codes, generator)
        looked_at = samples is not None and self.distance > 0
        drawn = codes[:0]
        if looked_at:
            drawn = as_codes(samples)
            _check_fit(images, drawn, generator, "samples' codes")
        on_device = pick_device(device)
        loss = self.loss or like.loss
        settings = {**as_dict(self), "loss": loss}
        settings |= {key: getattr(like, key) for key in ("optimiser", "precision")}
        if not looked_at:
            del settings["distance"], settings["sample_batch_size"]
        # Not the samples: a pipeline may be saved anew with the details of fewer or more codes.
        data = fingerprint(images), fingerprint(codes), fingerprint(_numbers(generator))
        identity = {"settings": settings, "seed": seed, "data": " ".join(data)}
        batches = Batches(len(images), self.batch_size, self.epochs)
        training = Training("finetune", batches, folder, identity, progress)
        training.refuse_another()  # not after minutes of learning features
        if (loss == "contrastive" or looked_at) and features is None:
            features, *_ = like.learn_features(images, seed, on_device, folder, progress)
        generator = copy.deepcopy(generator)

        with training:
            saved = training.resume()
            if saved:
                generator.load_state_dict(saved["generator"])
            if not training.done:
                given = images, codes, drawn
                self._train(training, generator, *given, features, like, saved, seed, on_device)
                parts = {"generator": generator.state_dict(), "codes": {"codes": codes}}
                training.save(parts, done=True, generator=generator.config)
            self.seconds_ = training.elapsed
        self.generator_ = generator.cpu().eval()
        return self

    def _train(
        self,
        training: Training,
        generator: Generator,
        images: torch.Tensor,
        codes: torch.Tensor,
        drawn: torch.Tensor,
        features: Features | None,
        like: GLO,
        saved: Parts | None,
        seed: int,
        device: torch.device,
    ) -> None:
        """Teach `generator` itself; of `drawn`, samples' codes, there may be none."""
        precision = pick_precision(like.precision, device)
        name = self.loss or like.loss
        size, moves = generator.image_shape[1:], name == "contrastive"
        loss_of = make_loss(name, size, device, like.vgg_weights, features, precision)
        generator.to(device).train()
        model = processes.parallel(generator)
        optimiser = make_optimiser(like.optimiser, generator, self.lr)
        if saved:
            load_optimiser_state(optimiser, saved["optimiser"])
        share = processes.Share(len(images))
        own_images = Rows(images[share.items], device)
        own_codes = Rows(codes[share.items], device)
        own_drawn = Rows(drawn[share.items], device)
        distance, made_a_step = None, min(self.sample_batch_size, images_at_once(*size))
        if len(drawn):
            assert features is not None
            distance = Distance(features, images, device, precision, seed)
            if saved:
                distance.load_state(saved["distance"])

        def learn(
            sent: torch.Tensor,
            z: torch.Tensor,
            s: torch.Tensor,
            own: torch.Tensor,
            ways: torch.Tensor,
            references: torch.Tensor,
            share_of_step: float,
            size: float,
            lr: float,
        ) -> torch.Tensor:
            set_learning_rate(optimiser, lr)
            batch = pixels.to_float(own_images.found(sent))
            with autocast(precision, device):
                made = model(torch.cat([own_codes.found(z), own_drawn.found(s)])).float()
            n = len(batch)
            pair = made[:n], batch
            if moves:  # as in stage one
                pair = pixels.moved(made[:n], ways[:n]), pixels.moved(batch, ways[:n])
            error = loss_of(*pair).sum() / size
            if distance is not None:
                apart = distance(made[n:], ways[n:], references, share_of_step, own)
                error = error + self.distance * apart
            optimiser.zero_grad()
            error.backward()
            optimiser.step()
            return error.detach()

        learned = Replayed(learn, device, exact=like.precision == "float32")
        for step, rows in training.steps(seed):
            lr = learning_rate(self.schedule, self.lr, step, training.batches.steps)
            places = share.places(share.of(rows))
            of_samples = references = rows[:0]
            share_of_step = 0.0
            if distance is not None:
                references = distance.rows(seed, step)
                share_of_step = distance.share(step, made_a_step)
                random = random_generator(seed, "samples", step)
                of_samples = torch.randint(len(drawn), (made_a_step,), generator=random)
            ways = torch.rand(
                len(rows) + len(of_samples), 2, generator=random_generator(seed, "ways", step)
            )[share.among(torch.cat([rows, of_samples]))]
            sent = own_images.sent(places), own_codes.sent(places)
            sent_samples = own_drawn.sent(share.places(share.of(of_samples)))
            own = share.among(of_samples)
            known = own, ways, references, share_of_step
            loss = learned(*sent, sent_samples, *known, len(rows), lr)
            if distance is not None:
                distance.renew(step, made_a_step)

            training.record(loss, lr=lr)
            if training.picture_due:
                made = reconstruction_rows(generator, codes[:SHOWN].to(device), images)
                training.picture("reconstructions", made)
            if training.checkpoint_due:
                state = {"optimiser": optimiser_state(optimiser)}
                if distance is not None:
                    state["distance"] = distance.state()
                training.save({"generator": generator.state_dict(), **state})
        optimiser.zero_grad()  # the gradients' memory is not needed any more


def _check_fit(
    images: torch.Tensor, codes: torch.Tensor, generator: Generator, what: str = "codes"
) -> None:
    if len(images) != len(codes):
        raise GlannError(f"{len(images)} images and {len(codes)} {what} were given; wanted as many")
    if tuple(images.shape[1:]) != generator.image_shape:
        raise GlannError(
            f"images have shape {tuple(images.shape[1:])}; this generator's have "
            f"{generator.image_shape} (channels, height, width)"
        )
    code_dim = generator.config["code_dim"]
    if codes.shape[1] != code_dim:
        raise GlannError(f"{what} have {codes.shape[1]} numbers; this generator's have {code_dim}")


def _numbers(generator: Generator) -> torch.Tensor:
    """All weights and statistics in one row, by which to know the generator again."""
    return torch.cat([tensor.flatten().float() for tensor in generator.state_dict().values()])
