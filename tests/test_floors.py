"""The library's floors: a module imports only from floors below its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "glann"

FLOORS = [
    ("errors", "nearest_triton"),
    ("settings", "storage", "randomness"),
    ("images", "codes", "places", "processes"),
    ("devices",),
    ("formats", "networks", "losses", "optimisers"),
    ("data", "training", "nearest", "moments"),
    ("metric", "matching", "contrastive"),
    ("glo", "imle", "density", "distance", "evaluation"),
    ("finetuning", "pipeline"),
    ("baselines",),
    ("recipes", "inspection"),
    ("runner", "report"),
    ("comparison",),
    ("bench", "studies"),
    ("cli",),
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ENTRANCES = ("__init__", "__main__")
"""These two may import anything, and nothing imports them."""

PATHS = sorted(ROOT.rglob("*.py"))
IDS = [path.relative_to(ROOT).as_posix() for path in PATHS]


def name_of(path: Path) -> tuple[str, ...]:
    """("baselines", "gan") for glann/baselines/gan.py."""
    return path.relative_to(ROOT).with_suffix("").parts


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(tree: ast.Module, name: tuple[str, ...]) -> list[tuple[str, int]]:
    """All that the module `name` imports, as full dotted names with lines, wherever it does so."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ["glann", *name[: len(name) - node.level]] if node.level else []
            source = ".".join([*package, *([node.module] if node.module else [])])
            found += [(f"{source}.{alias.name}", node.lineno) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).split(".")[-1]
            first = node.args[0]
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                found.append((str(first.value), node.lineno))
    return found


def violations(tree: ast.Module, name: tuple[str, ...]) -> list[str]:
    """What the module `name` imports that is not from a floor below it."""
    room = name[0]
    wrong = []
    for full, line in imported(tree, name):
        top, _, rest = full.partition(".")
        other = rest.partition(".")[0]
        if top != "glann" or full == "glann.__version__":
            continue
        if other not in FLOOR:
            wrong.append(f"line {line}: {full}: not a module with a floor")
        elif other != room and FLOOR[other] >= FLOOR[room]:
            wrong.append(f"line {line}: {full}: floor {FLOOR[other]}, itself on {FLOOR[room]}")
    return wrong


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_a_module_imports_only_from_floors_below(path):
    name = name_of(path)
    if len(name) == 1 and name[0] in ENTRANCES:
        return
    assert name[0] in FLOOR, f"{path.name} has no floor: give it one in FLOORS and the README"
    assert violations(parse(path), name) == []


@pytest.mark.parametrize(
    ("name", "source", "good"),
    [
        ("images", "from glann.storage import write_atomically", True),
        ("images", "from glann.data import load", False),
        ("images", "import glann.training", False),
        ("images", "def f():\n    from glann.data import load", False),
        ("images", "if TYPE_CHECKING:\n    from glann.data import Images", False),
        ("images", "import importlib\nimportlib.import_module('glann.data')", False),
        ("images", "from . import data", False),
        ("images", "from .storage import save", True),
        ("images", "from .data import load", False),
        ("training", "from glann import storage", True),
        ("training", "from glann import storage, glo", False),
        ("training", "from glann import GLO", False),
        ("training", "import glann", False),
        ("training", "import glann.storage as s, glann.cli", False),
        ("storage", "from glann.nearest import nearest", False),
        ("glo", "from glann.imle import IMLE", False),
        ("glo", "from glann.baselines.gan import GAN", False),
        ("baselines/gan", "from glann.baselines import vae\nfrom . import vae", True),
        ("baselines/gan", "from .. import cli", False),
        ("baselines/gan", "from ..training import Training", True),
        ("baselines/gan", "from glann.recipes import Recipe", False),
        ("evaluation/frechet", "from glann.baselines import GAN", False),
        ("baselines/__init__", "from glann.baselines.gan import GAN", True),
        ("baselines/__init__", "from glann.comparison import compare", False),
        ("cli", "from glann import __version__\nfrom glann.runner import run", True),
        ("cli", "from glann.__main__ import main", False),
        ("glo", "import glann_other\nfrom torch import glann", True),
    ],
)
def test_the_test_itself_sees_imports_of_every_kind(name, source, good):
    assert (violations(ast.parse(source), tuple(name.split("/"))) == []) is good


PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def unpickling(tree: ast.Module, name: tuple[str, ...]) -> list[str]:
    """What the module `name` does with pickles beyond a reader that allows only named classes."""
    found = [(full.partition(".")[0], line) for full, line in imported(tree, name)]
    allowed = {"pickle"} if name == ("formats",) else set()
    wrong = [f"line {line}: imports {top}" for top, line in found if top in PICKLES - allowed]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            if node.attr not in ("Unpickler", "UnpicklingError"):
                wrong.append(f"line {node.lineno}: pickle.{node.attr}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "pickle.Unpickler":
            wrong.append(f"line {node.lineno}: allows every class")
        elif isinstance(node, ast.ImportFrom) and node.module == "pickle":
            wrong.append(f"line {node.lineno}: takes names out of pickle")
        elif isinstance(node, ast.Import):
            wrong += [
                f"line {node.lineno}: pickle under another name"
                for alias in node.names
                if alias.name == "pickle" and alias.asname
            ]
        elif isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse, node.bases):
            methods = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
            if "find_class" not in methods:
                wrong.append(f"line {node.lineno}: allows every class")
    return wrong


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_nothing_unpickles_but_the_restricted_reader(path):
    assert unpickling(parse(path), name_of(path)) == []


@pytest.mark.parametrize(
    ("name", "source", "good"),
    [
        ("storage", "import pickle", False),
        ("storage", "def f():\n    from pickle import loads", False),
        ("storage", "import importlib\nimportlib.import_module('pickle')", False),
        ("storage", "import json as pickle_like", True),
        ("formats", "import pickle\npickle.load(f)", False),
        ("formats", "import pickle\npickle.Unpickler(f).load()", False),
        ("formats", "import pickle\nclass U(pickle.Unpickler):\n    pass", False),
        ("formats", "from pickle import Unpickler", False),
        ("formats", "import pickle as p\np.load(f)", False),
        ("formats", "import joblib", False),
        (
            "formats",
            "import pickle\nclass U(pickle.Unpickler):\n    def find_class(self, m, n): ...",
            True,
        ),
    ],
)
def test_the_test_itself_sees_pickles_of_every_kind(name, source, good):
    assert (unpickling(ast.parse(source), (name,)) == []) is good


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_torch_and_numpy_load_no_pickles(path):
    name, tree = name_of(path), parse(path)
    assert not {"torch.load", "torch.save", "numpy.load"} & {f for f, _ in imported(tree, name)}
    for node in ast.walk(tree):
        where = f"{path.name}, line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute):
            read = ast.unparse(node)
            assert read != "torch.save", where
            assert read != "torch.load" or name == ("losses",), where
        if isinstance(node, ast.Call):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options.get("allow_pickle", "False") == "False", where
            called = ast.unparse(node.func).rpartition(".")[2]
            if called == "load_state_dict_from_url" or ast.unparse(node.func) == "torch.load":
                assert options.get("weights_only") == "True", where


@pytest.mark.parametrize("module", ["glann", "glann.cli"])
def test_importing_does_not_import_torch(module):
    code = f"import sys, {module}; print(*sorted({{'torch', 'sklearn'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
