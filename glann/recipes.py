"""Recipes: a TOML file that says what a pipeline is, strict in every key.

A recipe's sections are the settings of the classes that use them (`Data`, `GLO`, `IMLE` or another
code sampler, `FineTuning`, and a section for each baseline), so a default is written down once.
"""

import dataclasses
import json
import math
import tomllib
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glann.baselines import MODELS
from glann.baselines.sampler import NoiseSampler
from glann.data import Data
from glann.errors import GlannError
from glann.evaluation.features import FEATURES
from glann.finetuning import FineTuning
from glann.glo import GLO
from glann.pipeline import CODE_SAMPLERS, sampler_name
from glann.places import RECIPE, find_recipe
from glann.settings import as_dict, check, check_value, nearest_name, setting


@dataclass(kw_only=True)
class Compare:
    """What `glann compare` compares, and how: the [compare] section of a recipe."""

    models: list[str] = setting(
        ["ns-gan", "wgan-gp"], "baselines to compare GLANN with", choices=tuple(MODELS)
    )
    seeds: int = setting(1, "runs of each model: the recipe's seed, and those after it", minimum=1)
    samples: int = setting(10_000, "samples and real images in a score, at the most", minimum=50)
    features: str = setting("auto", "what scores are computed on", choices=FEATURES)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a pipeline is, data, both stages and the seed, and what it is compared with."""

    name: str
    given: str  # how it was asked for: a shipped recipe's name, or a path
    seed: int = setting(0, "of everything random", minimum=0, maximum=2**63 - 1)
    data: Data
    glo: GLO
    imle: Any  # an unfitted code sampler: IMLE, Gaussian or Mixture
    finetune: FineTuning | None = None  # after stage two, where the recipe has such a section
    compare: Compare
    baselines: dict[str, NoiseSampler]  # unfitted, each of MODELS

    def sections(self) -> dict[str, Any]:
        """All settings as nested dicts, as in the TOML; those that are None are left out."""
        imle = {"sampler": sampler_name(self.imle), **as_dict(self.imle)}
        sections = {"data": as_dict(self.data), "glo": as_dict(self.glo), "imle": imle}
        if self.finetune is not None:
            sections["finetune"] = as_dict(self.finetune)
        sections["compare"] = as_dict(self.compare)
        for name, baseline in self.baselines.items():
            if name in self.compare.models or baseline != _baseline(name, {}, self.glo):
                sections[name] = as_dict(baseline)
        return {"seed": self.seed} | {
            name: {key: value for key, value in section.items() if value is not None}
            for name, section in sections.items()
        }

    def to_toml(self) -> str:
        """The whole recipe, every default written out."""
        lines = [f"seed = {self.seed}"]
        for name, section in self.sections().items():
            if isinstance(section, dict):
                lines += ["", f"[{name}]"]
                lines += [f"{key} = {toml_value(value)}" for key, value in section.items()]
        return "\n".join(lines) + "\n"


SECTIONS = ("data", "glo", "imle", "finetune", "compare", *MODELS)


def toml_value(value: object) -> str:
    """A setting as TOML has it."""
    # JSON's own, but for the characters that TOML wants as they are, and the one that it doesn't.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def load_recipe(name_or_path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe (a shipped one's name, or a file) and check every key, type and range.

    None is the recipe of all defaults.

    `overrides` are texts `section.key=value` (or `seed=value`), the value as in TOML; text needs
    no quotes.
    """
    name, content = "defaults", {}
    if name_or_path is not None:
        path = find_recipe(name_or_path)
        name = path.absolute().parent.name if path.name == RECIPE else path.stem
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise GlannError(f"{path} can't be read as a recipe: {error}") from error
    # Another code sampler has other settings: the recipe's are dropped before any are changed.
    for override in sorted(overrides, key=lambda text: not text.startswith("imle.sampler")):
        _apply(content, override)
    return make_recipe(name, content, str(name_or_path or name))


def make_recipe(name: str, content: dict[str, Any], given: str = "") -> Recipe:
    """A checked recipe from nested dicts, as in a recipe's TOML."""
    for key, value in content.items():
        if key not in ("seed", *SECTIONS):
            raise GlannError(
                f"'{key}' is not a section of a recipe; " + nearest_name(key, ("seed", *SECTIONS))
            )
        if key != "seed" and not isinstance(value, dict):
            raise GlannError(f"'{key}' is a section: write [{key}], then its settings below")
    imle = dict(content.get("imle", {}))
    sampler = imle.pop("sampler", "imle")
    if not isinstance(sampler, str) or sampler not in CODE_SAMPLERS:
        raise GlannError(
            f"imle.sampler = {sampler!r} is not a code sampler; "
            + nearest_name(str(sampler), CODE_SAMPLERS)
        )
    glo = section("glo", GLO, content.get("glo", {}))
    recipe = Recipe(
        name=name,
        given=given or name,
        data=section("data", Data, content.get("data", {})),
        glo=glo,
        imle=section("imle", CODE_SAMPLERS[sampler], imle, also=("sampler",)),
        finetune=_finetuning(content.get("finetune"), sampler),
        compare=section("compare", Compare, content.get("compare", {})),
        baselines={model: _baseline(model, content.get(model, {}), glo) for model in MODELS},
    )
    seed = content.get("seed", 0)
    (field,) = (field for field in dataclasses.fields(Recipe) if field.name == "seed")
    check_value("seed", seed, int, field)
    return dataclasses.replace(recipe, seed=seed)


def _finetuning(content: dict[str, Any] | None, sampler: str) -> FineTuning | None:
    """None where there is no such section, or it says 0 epochs."""
    if content is None or content.get("epochs") == 0:
        return None
    if sampler != "imle":
        raise GlannError(
            f"[finetune] needs imle.sampler = 'imle', whose noise belongs to images; a {sampler}'s "
            "doesn't. Leave it out, or set finetune.epochs = 0"
        )
    settings: FineTuning = section("finetune", FineTuning, content)
    return settings


def _baseline(model: str, content: dict[str, Any], glo: GLO) -> NoiseSampler:
    """A baseline with its published settings and GLANN's generator, but for what `content` says."""
    kind, published = MODELS[model]
    generator: dict[str, Any] = {
        "noise_dim": glo.code_dim,
        "width": glo.width,
        "hidden": glo.hidden,
    }
    generator |= {"batch_norm": glo.batch_norm, "blocks": glo.blocks}
    defaults = {**generator, **published}
    baseline: NoiseSampler = section(model, kind, content, defaults=defaults)
    return baseline


def section(
    name: str,
    kind: type[Any],
    content: dict[str, Any],
    also: tuple[str, ...] = (),
    defaults: dict[str, Any] | None = None,
) -> Any:
    """An object of `kind` from a recipe's section, checked; `also` are keys read elsewhere."""
    fields = {field.name: field for field in dataclasses.fields(kind) if field.metadata}
    annotations = typing.get_type_hints(kind)
    for key, value in content.items():
        if key not in fields:
            full = f"{name}.{key}" if name else key
            raise GlannError(
                f"{full} is not a setting of {kind.__name__}; "
                + nearest_name(key, [*fields, *also])
            )
        if value == "none" and type(None) in typing.get_args(annotations[key]):
            content = {**content, key: None}  # as help texts say it; TOML has no word for it
        if annotations[key] is float and isinstance(value, int) and not isinstance(value, bool):
            try:
                content = {**content, key: float(value)}  # 2 and 2.0 are one setting
            except OverflowError:
                content = {**content, key: math.inf}  # out of every range
    settings = kind(**{**(defaults or {}), **content})
    check(settings, name)
    return settings


def parse_override(override: str, wanted: str) -> tuple[str, Any]:
    """A text `key=value` as (key, value), the value as in TOML; text needs no quotes.

    `wanted` says for the error what it should have been.
    """
    key, equals, text = override.partition("=")
    if not equals:
        raise GlannError(f"--set {override}: wanted {wanted}")
    try:
        return key.strip(), tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        return key.strip(), text.strip()  # text without quotes


def _apply(content: dict[str, Any], override: str) -> None:
    wanted = "SECTION.KEY=VALUE, such as glo.epochs=5"
    key, value = parse_override(override, wanted)
    section, dot, name = key.partition(".")
    if bool(dot) == (section == "seed"):
        raise GlannError(f"--set {override}: wanted {wanted}")
    if not dot:
        content[section] = value
    elif isinstance(content.setdefault(section, {}), dict):
        if (section, name) == ("imle", "sampler") and content["imle"].get(name, "imle") != value:
            content["imle"] = {}
            content.pop("finetune", None)
        content[section][name] = value


def describe_settings() -> list[tuple[str, str, str]]:
    """Every setting of a recipe: (name, default as in TOML, help with range or choices)."""
    rows = [("seed", "0", "of everything random")]
    kinds: list[tuple[str, type[Any]]] = [("data", Data), ("glo", GLO)]
    kinds += [("imle", kind) for kind in CODE_SAMPLERS.values()]
    kinds += [("finetune", FineTuning), ("compare", Compare)]
    kinds += [(kind.name.upper(), kind) for kind in dict.fromkeys(k for k, _ in MODELS.values())]
    for section, kind in kinds:
        for model, (model_kind, published) in MODELS.items():
            if model_kind is kind:
                same = ", ".join(f"{key} {value}" for key, value in published.items())
                text = f"section of {section}'s settings, below; here: {same or 'as they are'}"
                rows.append((f"[{model}]", "", text))
        if section == "imle":
            label = next(name for name, other in CODE_SAMPLERS.items() if other is kind)
            rows.append(("imle.sampler", json.dumps(label), f"{kind.__doc__}".splitlines()[0]))
        default = kind()
        for field in dataclasses.fields(kind):
            limits = field.metadata
            help_text = limits["help"]
            if limits["choices"]:
                help_text += f" ({', '.join(limits['choices'])})"
            elif limits["maximum"] is not None:
                help_text += f" ({limits['minimum']} to {limits['maximum']})"
            value = getattr(default, field.name)
            shown = "" if value is None else json.dumps(value)
            rows.append((f"{section}.{field.name}", shown, help_text))
    return rows
