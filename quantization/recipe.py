"""Precision recipes: the scheme of each linear layer, as data.

A recipe is a list of rules (name pattern -> scheme) over a base type; the last rule that matches a layer
wins. Those that ship are the files in ``recipes/``. Layers are named as in the published checkpoints, without
``.weight``: ``vision_model.encoder.layers.0.attn.qkv``. Imports nothing heavy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError
from ..files.json import decode
from ..files.text import read_text
from .attention import FP8_ATTENTION, Attentions, operand_names
from .schemes import BASES, SCHEMES, element_types, excluded, rounded_inputs

ATTENTION = ("base", "fp8")
"""Types of attention's products: the base type, or FP8 where that is fused."""

BLOCK = "{block}"
"""Placeholder in a pattern for the module path of a component's stack of blocks."""
FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Rule:
    """``pattern`` (fnmatch; ``*`` also matches dots) gets ``scheme``.

    Args:
        pattern: matched against whole layer names, case-sensitively.
        scheme: one of :data:`.schemes.SCHEMES`, or the recipe's base to take a layer out again.
        optional: the rule may match nothing (a part of the model that not every checkpoint has).
    """

    pattern: str
    scheme: str
    optional: bool = False


@dataclass(frozen=True)
class Recipe:
    """A named set of rules.

    Args:
        name: as given to ``--precision``.
        rules: applied in order, the last match wins; layers that match none compute in ``base``.
        attention: one of :data:`ATTENTION`.
        base: one of :data:`.schemes.BASES`.
        summary: description in one line.

    Raises:
        UsageError: an unusable name; an unknown scheme, base or attention type.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    attention: str = "base"
    base: str = "bf16"
    summary: str = ""

    def __post_init__(self) -> None:
        where = f"Recipe {self.name!r}"
        if not self.name or not all(c.isalnum() or c in "-_." for c in self.name):
            raise UsageError(
                f"{where} has an unusable name.",
                "It becomes a file name.",
                "Use letters, digits, - _ and dots.",
            )
        _one_of(f"{where}: base", self.base, BASES)
        _one_of(f"{where}: attention", self.attention, ATTENTION)
        for rule in self.rules:
            _one_of(f"{where}: scheme of {rule.pattern!r}", rule.scheme, (*SCHEMES, self.base))
        if "fp32" in (self.name, self.base) and (self.quantises or self.base != "fp32"):
            raise UsageError(
                f"{where} has the base {self.base}" + (" and quantises." if self.quantises else "."),
                "fp32 is the name of the unquantised model, with which reports compare.",
                "Give it another name, and the base bf16 or fp16.",
            )

    @property
    def quantises(self) -> bool:
        """Whether any rule quantises, or the attention does."""
        return self.attention != "base" or any(rule.scheme in SCHEMES for rule in self.rules)

    @property
    def element_types(self) -> frozenset[str]:
        """Element types that a target must have for it."""
        types = element_types(self.base, frozenset(rule.scheme for rule in self.rules))
        return types if self.attention == "base" else types | {self.attention}

    def to_json(self) -> dict[str, Any]:
        """Plain data, for JSON, YAML and the manifest."""
        rules = [{k: v for k, v in asdict(rule).items() if k != "optional" or v} for rule in self.rules]
        summary = {"summary": self.summary} if self.summary else {}
        return {"name": self.name, **summary, "base": self.base, "attention": self.attention, "rules": rules}

    @classmethod
    def from_json(cls, data: Any, source: str = "recipe") -> Recipe:
        """Inverse of :meth:`to_json`; UsageError names the faulty entry."""
        if not isinstance(data, dict) or not isinstance(data.get("rules", []), list):
            raise UsageError(
                f"{source} is not a recipe.",
                "It needs a mapping with 'name' and a list 'rules'.",
                "Start from a shipped one: ivl-export build --show-recipe fp8.",
            )
        fix = "Start from a shipped one: ivl-export build --show-recipe fp8."
        return decode(cls, {"name": "", **data}, what=source, fix=fix, error=UsageError)

    def to_yaml(self) -> str:
        """The recipe as an editable file."""
        return yaml.safe_dump(self.to_json(), sort_keys=False, allow_unicode=True, width=100)


@dataclass(frozen=True)
class Exclusion:
    """A layer that a recipe named but that stays in the base type, and why."""

    layer: str
    scheme: str
    reason: str


@dataclass(frozen=True)
class LayerPlan:
    """A recipe applied to one model.

    Args:
        schemes: every linear layer and its scheme.
        exclusions: layers that the recipe named and that cannot run so.
        attention: component -> its attentions that run in FP8.
    """

    schemes: dict[str, str]
    exclusions: tuple[Exclusion, ...] = ()
    attention: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def quantised(self) -> dict[str, str]:
        """The layers that are not left in the base type."""
        return {name: scheme for name, scheme in self.schemes.items() if scheme in SCHEMES}

    @property
    def rounded(self) -> dict[str, str]:
        """Layer, or operand of an attention -> the type it is rounded to: these are measured."""
        attentions = (name for names in self.attention.values() for name in names)
        operands = (operand for name in attentions for operand in operand_names(name))
        return {**rounded_inputs(self.schemes), **dict.fromkeys(operands, "fp8")}


def shipped_recipes() -> tuple[str, ...]:
    """Names that ``--precision`` takes."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def recipe_file(name_or_path: str | Path) -> Path:
    """The file of a shipped recipe, or the recipe file that was named; UsageError if it is neither."""
    if str(name_or_path) in shipped_recipes():
        return FOLDER / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise UsageError(
            f"Unknown precision {str(name_or_path)!r}.",
            f"Shipped recipes: {', '.join(shipped_recipes())}.",
            "Name one of these, or a recipe file ending in .yaml or .json.",
        )
    return path


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A shipped recipe by name, or one from a ``.yaml``, ``.yml`` or ``.json`` file; UsageError otherwise."""
    path = recipe_file(name_or_path)
    try:
        text = read_text(path, UsageError)
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UsageError(
            f"Recipe {path} cannot be read.", error.strerror or str(error), "Check the path."
        ) from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(
            f"Recipe {path} is not {path.suffix[1:].upper()}.",
            " ".join(str(error).split()),
            "Repair it, or start from a shipped one: ivl-export build --show-recipe fp8.",
        ) from error
    return Recipe.from_json(data, str(path))


def for_blocks(recipe: Recipe, places: Iterable[str]) -> Recipe:
    """``recipe`` with a rule for each of ``places`` where its pattern says ``{block}``.

    Args:
        recipe: as it was read.
        places: module paths of the stacks of blocks of the model's components.
    """
    paths = list(dict.fromkeys(places))
    rules: list[Rule] = []
    for rule in recipe.rules:
        patterns = [rule.pattern.replace(BLOCK, path) for path in paths] if BLOCK in rule.pattern else None
        rules += [rule] if patterns is None else [replace(rule, pattern=pattern) for pattern in patterns]
    return replace(recipe, rules=tuple(rules))


def schemes(recipe: Recipe, linear_names: Iterable[str]) -> dict[str, str]:
    """The scheme of every layer, last match wins.

    Raises:
        UsageError: a rule that is not optional matches nothing, two rules give the same pattern different
            schemes, or no quantising rule matches anything.
    """
    names = list(linear_names)
    by_pattern: dict[str, str] = {}
    result = dict.fromkeys(names, recipe.base)
    hits = 0
    for rule in recipe.rules:
        matched = [name for name in names if fnmatchcase(name, rule.pattern)]
        if not matched and not rule.optional:
            raise UsageError(
                f"Recipe {recipe.name!r}: the rule {rule.pattern!r} -> {rule.scheme} matches nothing.",
                f"The model has {len(names)} linear layers, for example {', '.join(names[:3]) or 'none'}.",
                "Correct the pattern, or mark the rule 'optional: true'.",
            )
        first = by_pattern.setdefault(rule.pattern, rule.scheme)
        if matched and first != rule.scheme:
            more = f" and {len(matched) - 3} more" if len(matched) > 3 else ""
            raise UsageError(
                f"Recipe {recipe.name!r} gives the pattern {rule.pattern!r} two schemes, {first} and "
                f"{rule.scheme}.",
                f"It matches {', '.join(matched[:3])}{more}.",
                "Remove one of the two rules.",
            )
        hits += len(matched) if rule.scheme in SCHEMES else 0
        result.update(dict.fromkeys(matched, rule.scheme))
    if any(rule.scheme in SCHEMES for rule in recipe.rules) and not hits:
        raise UsageError(
            f"Recipe {recipe.name!r} quantises no layer of this model.",
            f"The model has {len(names)} linear layers, for example {', '.join(names[:3]) or 'none'}.",
            "Use a recipe whose patterns fit the model, or --precision bf16.",
        )
    return result


def plan_layers(
    recipe: Recipe, shapes: Mapping[str, tuple[int, int]], attentions: Attentions | None = None
) -> LayerPlan:
    """Schemes for layers of the given weight shapes [out, in], less those with no kernel for the scheme.

    Args:
        recipe: the recipe to apply.
        shapes: of all linear layers of the model.
        attentions: of the components that are built (:func:`.attention.attentions`); without them the
            attention stays in the base type.

    Raises:
        UsageError: as :func:`schemes`.
    """
    result = schemes(recipe, shapes)
    exclusions = []
    for name, scheme in result.items():
        if reason := excluded(scheme, *shapes[name]):
            exclusions.append(Exclusion(name, scheme, reason))
    result.update({e.layer: recipe.base for e in exclusions})
    fused: dict[str, tuple[str, ...]] = {}
    if recipe.attention == "fp8":
        for component, shape_of in (attentions or {}).items():
            fused[component] = tuple(name for name, shape in shape_of.items() if not shape.excluded)
            kinds = {(name.rpartition(".")[2], shape.excluded): None for name, shape in shape_of.items()}
            exclusions += [
                Exclusion(f"{component}: {kind}", FP8_ATTENTION, why) for kind, why in kinds if why
            ]
    return LayerPlan(result, tuple(exclusions), fused)


def _one_of(where: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(
            f"{where} is {value!r}.", f"Supported: {', '.join(allowed)}.", "Write one of these there."
        )
