import contextlib
import dataclasses
import re
import tomllib
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glann.baselines import GAN, MODELS, VAE, PixelIMLE, make_baseline
from glann.baselines.sampler import NoiseSampler
from glann.data import Data
from glann.density import Gaussian, Mixture
from glann.errors import GlannError
from glann.finetuning import FineTuning
from glann.glo import GLO
from glann.imle import IMLE
from glann.pipeline import CODE_SAMPLERS
from glann.places import shipped_recipes
from glann.recipes import Compare, Recipe, describe_settings, load_recipe, make_recipe
from glann.settings import check

TINY = """
# A comment.
seed = 7
[data]
source = "mnist"
size = [16, 12]
[glo]
epochs = 3
code_lr = 1
batch_norm = false
[imle]
width = 32
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY, encoding="utf-8")
    return path


def same(recipe: Recipe, other: Recipe) -> bool:
    """But for where they were found."""
    return dataclasses.replace(recipe, given="") == dataclasses.replace(other, given="")


def baselines(glo: GLO) -> dict[str, NoiseSampler]:
    """All with their published settings and the generator of stage one."""
    same_generator = {"noise_dim": glo.code_dim, "width": glo.width, "hidden": glo.hidden}
    same_generator |= {"batch_norm": glo.batch_norm, "blocks": glo.blocks}
    return {name: make_baseline(name, **same_generator) for name in MODELS}


def loaded(path: Path, text: str | bytes) -> Recipe:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(path)


# ---------------------------------------------------------------------- reading


def test_a_recipe_says_only_what_differs_from_the_defaults(tiny):
    recipe = load_recipe(tiny)
    glo = GLO(epochs=3, code_lr=1.0, batch_norm=False)
    assert recipe == Recipe(
        name="tiny",
        given=str(tiny),
        seed=7,
        data=Data(source="mnist", size=[16, 12]),
        glo=glo,
        imle=IMLE(width=32),
        compare=Compare(),
        baselines=baselines(glo),
    )
    assert type(recipe.glo.code_lr) is float  # 1 and 1.0 are one setting


def test_without_a_file_all_is_default():
    wanted = Recipe(
        name="defaults",
        given="",
        data=Data(),
        glo=GLO(),
        imle=IMLE(),
        compare=Compare(),
        baselines=baselines(GLO()),
    )
    assert same(load_recipe(None), wanted)


def test_the_kind_of_code_sampler_decides_which_settings_there_are():
    kinds = {"imle": IMLE(), "gaussian": Gaussian(), "mixture": Mixture()}
    assert kinds.keys() == CODE_SAMPLERS.keys()
    for name, sampler in kinds.items():
        assert make_recipe("x", {"imle": {"sampler": name}}).imle == sampler
    assert make_recipe("x", {"imle": {"sampler": "mixture", "components": 3}}).imle == Mixture(
        components=3
    )


def test_what_was_read_is_not_changed():
    content = {"imle": {"sampler": "mixture"}, "glo": {"code_lr": 1}}
    make_recipe("x", content)
    assert content == {"imle": {"sampler": "mixture"}, "glo": {"code_lr": 1}}
    assert type(content["glo"]["code_lr"]) is int


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gol]", "'gol' is not a section of a recipe; did you mean 'glo'?"),
        ("sed = 3", "'sed' is not a section of a recipe; did you mean 'seed'?"),
        ("epochs = 3", "'epochs' is not a section of a recipe; valid: began, compare, data"),
        ("[wgan-pg]", "'wgan-pg' is not a section of a recipe; did you mean 'wgan-gp'?"),
        ("[wgan-gp]\nlrr = 1", "wgan-gp.lrr is not a setting of GAN; did you mean 'lr'?"),
        ("[compare]\nmodels = ['gan']", "compare.models = 'gan' is not one of the choices"),
        ("[vae]\nlr = -1", "vae.lr = -1.0 is out of range"),
        ("glo = 3", "'glo' is a section: write [glo], then its settings below"),
        ("[[glo]]", "'glo' is a section: write [glo]"),
        ("[seed]", "seed = {} is of type dict; wanted int (of everything random)"),
        ("seed = 1.5", "seed = 1.5 is of type float; wanted int"),
        ("seed = true", "seed = True is of type bool; wanted int"),
        ("seed = -1", "seed = -1 is out of range; wanted 0 to 9223372036854775807"),
        ("seed = 9223372036854775808", "is out of range"),
        ("[glo]\nepoch = 3", "glo.epoch is not a setting of GLO; did you mean 'epochs'?"),
        ("[glo]\nnoise_dim = 3", "glo.noise_dim is not a setting of GLO; did you mean 'code_dim'?"),
        ("[glo.more]\nepochs = 3", "glo.more is not a setting of GLO"),
        ("[data]\nsourc = 'x'", "data.sourc is not a setting of Data; did you mean 'source'?"),
        ("[imle]\nsamplr = 'x'", "imle.samplr is not a setting of IMLE; did you mean 'sampler'?"),
        ("[imle]\ncomponents = 3", "imle.components is not a setting of IMLE; valid: "),
        ("[imle]\nmapper_ = 3", "imle.mapper_ is not a setting of IMLE"),
        (
            "[imle]\nsampler = 'gaussian'\nwidth = 3",
            "imle.width is not a setting of Gaussian; valid: sampler",
        ),
        (
            "[imle]\nsampler = 'mixture'\nnoise_dim = 3",
            "imle.noise_dim is not a setting of Mixture; valid: codes, comp",
        ),
        (
            "[imle]\nsampler = 'mixtur'",
            "imle.sampler = 'mixtur' is not a code sampler; did you mean 'mixture'?",
        ),
        ("[imle]\nsampler = ['imle']", "imle.sampler = ['imle'] is not a code sampler"),
        ("[imle]\nsampler = true", "imle.sampler = True is not a code sampler"),
        ("[glo]\nhidden = '9'", "glo.hidden = '9' is of type text; wanted int"),
        ("[glo]\nhidden = 9.0", "glo.hidden = 9.0 is of type float; wanted int"),
        ("[glo]\nepochs = 0", "glo.epochs = 0.0 is out of range; wanted at least 0.01"),
        ("[glo]\ncode_lr = true", "glo.code_lr = True is of type bool; wanted float"),
        ("[glo]\ncode_lr = nan", "glo.code_lr = nan is out of range"),
        (f"[glo]\ncode_lr = 1{'0' * 400}", "glo.code_lr = inf is out of range"),
        ("[glo]\ncode_lr = 1979-05-27", "glo.code_lr = datetime.date(1979, 5, 27) is of type date"),
        ("[glo]\nwidth = 513", "glo.width = 513 is out of range; wanted 4 to 512"),
        ("[glo]\nloss = 'l3'", "glo.loss = 'l3' is not one of the choices; valid: contrastive, l1"),
        ("[imle]\nsearch = 'tourch'", "imle.search = 'tourch' is not one of the choices; did you"),
        ("[data]\nsize = [28, 7]", "data.size = 7 is out of range; wanted 8 to 256"),
        ("[data]\nsize = '28'", "data.size = '28' is of type text; wanted int or list of int"),
        ("seed = ", "wrong.toml can't be read as a recipe: "),
        ("seed = 1\nseed = 2", "wrong.toml can't be read as a recipe: "),
        (b"# \xff\xfe", "wrong.toml can't be read as a recipe: "),
    ],
)
def test_what_is_wrong_is_named(text, message, tmp_path):
    with pytest.raises(GlannError) as caught:
        loaded(tmp_path / "wrong.toml", text)
    assert message in str(caught.value)


toml = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text() | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)
names = st.sampled_from(
    [f.name for kind in (Data, GLO, IMLE, Mixture) for f in dataclasses.fields(kind)]
    + ["sampler", "?"]
)
sections = st.dictionaries(names, toml, max_size=3) | toml


@given(
    content=st.dictionaries(st.sampled_from(["seed", "data", "glo", "imle", "x"]), sections)
    | st.dictionaries(st.text(), toml, max_size=2)
)
@settings(deadline=None, max_examples=150)
def test_whatever_a_file_holds_there_is_no_other_error(content):
    with contextlib.suppress(GlannError):
        make_recipe("x", content)


# ---------------------------------------------------------------------- --set


@pytest.mark.parametrize(
    ("overrides", "section", "key", "value"),
    [
        (["glo.epochs=5"], "glo", "epochs", 5.0),
        (["glo.epochs = 5"], "glo", "epochs", 5.0),
        (["glo.epochs=5", "glo.epochs=6"], "glo", "epochs", 6.0),
        (["glo.epochs=1_000"], "glo", "epochs", 1000.0),
        (["glo.hidden=1_000"], "glo", "hidden", 1000),
        (["glo.code_lr=2"], "glo", "code_lr", 2.0),
        (["glo.code_lr=1e-4"], "glo", "code_lr", 1e-4),
        (["glo.batch_norm=true"], "glo", "batch_norm", True),
        (["glo.loss=l1"], "glo", "loss", "l1"),
        (['glo.loss="l1"'], "glo", "loss", "l1"),
        (["glo.loss='l1'"], "glo", "loss", "l1"),
        (["data.source=folder"], "data", "source", "folder"),
        (["data.path=/a b/c=d#e"], "data", "path", "/a b/c=d#e"),
        (["data.path='12'"], "data", "path", "12"),
        (["data.size=28"], "data", "size", 28),
        (["data.size=[28, 20]"], "data", "size", [28, 20]),
        (["imle.width=64"], "imle", "width", 64),
        (["glo.epochs=5", "glo.hidden=9"], "glo", "hidden", 9),
    ],
)
def test_overrides(overrides, section, key, value, tiny):
    changed = load_recipe(tiny, overrides)
    assert getattr(getattr(changed, section), key) == value
    assert type(getattr(getattr(changed, section), key)) is type(value)
    plain = load_recipe(tiny).sections()
    for name, content in changed.sections().items():
        if section == "glo" and name in MODELS:
            continue  # they follow stage one's generator
        others = {k for k in plain["glo"] if f"glo.{k}" not in "".join(overrides).replace(" ", "")}
        if name == "glo":
            assert {k: content[k] for k in others} == {k: plain["glo"][k] for k in others}
        elif name != section:
            assert content == plain[name]


def test_the_seed_and_the_sampler_are_overridden_too(tiny):
    assert load_recipe(tiny, ["seed=3"]).seed == 3
    assert load_recipe(None, ["seed = 4"]).seed == 4
    overrides = ["imle.sampler=mixture", "imle.components=5"]
    assert load_recipe(None, overrides).imle == Mixture(components=5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("glo.epochs", "--set glo.epochs: wanted SECTION.KEY=VALUE, such as glo.epochs=5"),
        ("epochs=5", "--set epochs=5: wanted SECTION.KEY=VALUE"),
        ("glo=5", "--set glo=5: wanted SECTION.KEY=VALUE"),
        ("=5", "--set =5: wanted SECTION.KEY=VALUE"),
        ("", "--set : wanted SECTION.KEY=VALUE"),
        ("seed.x=5", "--set seed.x=5: wanted SECTION.KEY=VALUE"),
        ("seed=x", "seed = 'x' is of type text; wanted int"),
        ("glo.=5", "glo. is not a setting of GLO"),
        ("gol.epochs=5", "'gol' is not a section of a recipe; did you mean 'glo'?"),
        ("glo.epoch=5", "glo.epoch is not a setting of GLO; did you mean 'epochs'?"),
        ("glo.epochs=five", "glo.epochs = 'five' is of type text; wanted float"),
        ("glo.epochs=", "glo.epochs = '' is of type text; wanted float"),
        (f"glo.hidden={'1' * 5000}", "is of type text; wanted int"),
        ("imle.components=5", "imle.components is not a setting of IMLE"),
        # What training would refuse of any images.
        ("data.channels=2", "data.channels = 2; wanted 1 (grey), 3 (RGB)"),
        ("data.size=[32]", "data.size = [32]; wanted one number or [height, width]"),
    ],
)
def test_overrides_that_are_wrong(override, message, tiny):
    with pytest.raises(GlannError) as caught:
        load_recipe(tiny, [override])
    assert message in str(caught.value)


def test_settings_that_do_not_fit_together_are_named(tiny):
    with pytest.raises(GlannError, match=r"imle\.levels = 3, and imle\.noise_dim = 2"):
        load_recipe(tiny, ["imle.levels=3", "imle.noise_dim=2"])
    with pytest.raises(GlannError, match=r"imle\.components = 5, and imle\.codes = 4"):
        load_recipe(None, ["imle.sampler=mixture", "imle.components=5", "imle.codes=4"])
    held_out = "data.test_fraction=0.2"
    with pytest.raises(GlannError, match="'mnist' has its own test images"):
        load_recipe(tiny, [held_out])
    load_recipe(tiny, [held_out, "data.source=folder"])  # which may have none


def test_an_override_does_not_hide_a_section_that_is_wrong(tmp_path):
    (tmp_path / "wrong.toml").write_text("glo = 3")
    with pytest.raises(GlannError, match="'glo' is a section"):
        load_recipe(tmp_path / "wrong.toml", ["glo.epochs=5"])


# ---------------------------------------------------------------------- writing

text = st.text(st.characters(codec="utf-8"), max_size=8)


def values_of(field: dataclasses.Field, annotation: object) -> st.SearchStrategy:
    low, high = field.metadata["minimum"], field.metadata["maximum"]
    if typing.get_args(annotation) and typing.get_origin(annotation) is not list:
        return st.one_of([values_of(field, part) for part in typing.get_args(annotation)])
    if typing.get_origin(annotation) is list:
        return st.lists(values_of(field, typing.get_args(annotation)[0]), max_size=3)
    if field.metadata["choices"]:
        return st.none() if annotation is type(None) else st.sampled_from(field.metadata["choices"])
    return {
        int: st.integers(low, high),
        float: st.floats(low, high, allow_nan=False, allow_infinity=False),
        str: text | st.sampled_from(['/a\\b/"c"', "photos/😀", "\x7f\x00\n\u2028", "# 'x'"]),
        bool: st.booleans(),
        type(None): st.none(),
    }[annotation]


def sections_of(kind: type) -> st.SearchStrategy:
    annotations = typing.get_type_hints(kind)
    fields = [field for field in dataclasses.fields(kind) if field.metadata]
    drawn = st.builds(kind, **{f.name: values_of(f, annotations[f.name]) for f in fields})
    return drawn.filter(fit_together)


def fit_together(drawn: object) -> bool:
    try:
        check(drawn)
    except GlannError:
        return False
    return True


recipes = st.builds(
    Recipe,
    name=st.just("again"),
    given=st.just(""),
    seed=st.integers(0, 2**63 - 1),
    data=sections_of(Data),
    glo=sections_of(GLO),
    imle=st.one_of([sections_of(kind) for kind in CODE_SAMPLERS.values()]),
    compare=sections_of(Compare),
    baselines=st.fixed_dictionaries(
        {name: sections_of(kind) for name, (kind, _) in MODELS.items()}
    ),
)


@given(recipe=recipes)
@settings(deadline=None, max_examples=60)
def test_a_recipe_that_was_written_is_read_again(recipe, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "again.toml"
    assert same(loaded(path, recipe.to_toml()), recipe)


def test_a_written_recipe_has_every_default():
    content = tomllib.loads(load_recipe(None).to_toml())
    assert content == load_recipe(None).sections()
    assert content["imle"]["sampler"] == "imle"
    for name, kind in (("data", Data), ("glo", GLO), ("imle", IMLE)):
        given_values = {
            f.name for f in dataclasses.fields(kind) if getattr(kind(), f.name) is not None
        }
        assert content[name].keys() - {"sampler"} == given_values


# ---------------------------------------------------------------------- those that ship

SHIPPED = shipped_recipes()


def test_there_are_recipes():
    assert "digits" in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_can_be_used(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.given == name
    assert same(loaded(tmp_path / f"{name}.toml", recipe.to_toml()), recipe)


@pytest.mark.parametrize("path", SHIPPED.values(), ids=SHIPPED.keys())
def test_a_shipped_recipe_says_what_it_is_and_how_to_run_it(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert len(header) >= 2
    assert len(header[0]) > 20
    told = "\n".join(header)
    assert "make " in told or re.search(rf"glann (train|compare) {path.stem}", told)
    assert set(re.findall(r"PIPELINE=([\w-]+)", told)) <= {path.stem}
    load_recipe(path, re.findall(r"--set (\S+)", told))


# ---------------------------------------------------------------------- described


def test_every_setting_is_described():
    rows = describe_settings()
    found = [name for name, _, _ in rows]
    wanted = ["seed"]
    for section, kinds in (("data", [Data]), ("glo", [GLO]), ("imle", CODE_SAMPLERS.values())):
        for kind in kinds:
            wanted += ["imle.sampler"] * (section == "imle")
            wanted += [f"{section}.{field.name}" for field in dataclasses.fields(kind)]
    wanted += [f"finetune.{field.name}" for field in dataclasses.fields(FineTuning)]
    wanted += [f"compare.{field.name}" for field in dataclasses.fields(Compare)]
    for kind in (GAN, VAE, PixelIMLE):
        wanted += [f"[{name}]" for name, (own, _) in MODELS.items() if own is kind]
        wanted += [f"{kind.name.upper()}.{field.name}" for field in dataclasses.fields(kind)]
    assert found == wanted
    assert all(help_text for _, _, help_text in rows)


def test_defaults_are_shown_as_they_are_written():
    parts = {"data": [Data()], "glo": [GLO()], "imle": [IMLE(), Gaussian(), Mixture()]}
    parts |= {"finetune": [FineTuning()], "compare": [Compare()]}
    parts |= {"GAN": [GAN()], "VAE": [VAE()], "PIXEL-IMLE": [PixelIMLE()]}
    samplers = []
    for name, shown, help_text in describe_settings():
        section, _, key = name.partition(".")
        value = tomllib.loads(f"value = {shown}")["value"] if shown else None
        if name.startswith("["):
            assert name[1:-1] in MODELS
        elif name == "seed":
            assert value == 0
        elif key == "sampler":
            samplers.append(value)
        else:
            defaults = [getattr(part, key) for part in parts[section] if hasattr(part, key)]
            assert value in defaults
        assert "None" not in shown + help_text
    assert samplers == list(CODE_SAMPLERS)


def test_choices_and_ranges_are_told():
    help_of = {name: help_text for name, _, help_text in describe_settings()}
    assert help_of["glo.space"].endswith("(sphere, ball)")
    assert help_of["glo.width"].endswith("(4 to 512)")


def test_another_sampler_by_override_drops_the_settings_of_the_first():
    recipe = load_recipe("digits", ["imle.components=7", "imle.sampler=mixture"])
    assert recipe.sections()["imle"]["sampler"] == "mixture"
    assert recipe.imle.components == 7
    assert load_recipe("digits", ["imle.sampler=imle"]) == load_recipe("digits")


def test_a_baselines_generator_is_stage_ones_unless_its_section_says_otherwise():
    glo = {"code_dim": 10, "hidden": 99, "width": 8, "blocks": "residual"}
    made = make_recipe("x", {"glo": glo, "ns-gan": {"hidden": 33}}).baselines
    assert {baseline.blocks for baseline in made.values()} == {"residual"}
    assert (made["vae"].noise_dim, made["vae"].hidden, made["vae"].width) == (10, 99, 8)
    assert (made["ns-gan"].noise_dim, made["ns-gan"].hidden) == (10, 33)
    assert made["wgan-gp"].discriminator_steps == 5  # its published settings stay
