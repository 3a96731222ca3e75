import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # read when the libraries are loaded: tests run side by side

import pytest
import torch
from sklearn.datasets import load_digits

from glann import GLANN, GLO, IMLE, training

# float32: on a CPU made for bfloat16 rounding would be what two trainings differ in.
TINY_GLO = {
    "code_dim": 8,
    "epochs": 4,
    "batch_size": 32,
    "width": 8,
    "hidden": 32,
    "loss": "scattering",  # "contrastive" learns features first
    "precision": "float32",
}
TINY_IMLE = {
    "noise_dim": 8,
    "width": 32,
    "depth": 2,
    "levels": 2,
    "epochs": 4,
    "batch_size": 32,
    "precision": "float32",
}
TINY_TUNING = {"epochs": 4, "batch_size": 32, "lr": 1e-2}


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    # Tests run beside each other; and sums in one order make bit-for-bit comparisons fair.
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c():
    """As in the foreground: what a shell starts in the background ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """Trained classifiers of the tests go nowhere else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLANN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def digits():
    """150 real digits, uint8 (150, 1, 8, 8): not a multiple of any batch used here."""
    images = torch.from_numpy(load_digits().images[:150])
    return (images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)


@pytest.fixture(scope="session")
def trained(digits):
    """A barely trained pipeline with codes.  Don't change it."""
    glo = GLO(**TINY_GLO).fit(digits, seed=1)
    return GLANN(glo.generator_, IMLE(**TINY_IMLE).fit(glo.codes_, seed=1), glo.codes_)


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it."""


@pytest.fixture
def kill_at(monkeypatch):
    """kill_at(step): training saves at every step and dies just after having counted `step`."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    record = training.Training.record

    def arrange(step):
        def record_or_die(self, *args, **kwargs):
            record(self, *args, **kwargs)
            if self.step == step:
                raise Killed

        monkeypatch.setattr(training.Training, "record", record_or_die)

    return arrange
