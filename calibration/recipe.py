"""Precision recipes: which linear layer computes in what, as data.

A recipe is a list of rules (name pattern -> scheme) over a base type; the last rule that matches a layer
wins. Layers are named as in the published checkpoints, without ``.weight``:
``vision_model.encoder.layers.0.attn.qkv``. Imports nothing heavy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError

BASES = ("bf16", "fp16")
"""Types that everything a recipe does not name computes in."""

QUANTISED = ("fp8", "int8")
"""Schemes that quantise: weights per output channel, activations per tensor, both stored in 8 bits."""

ATTENTION = ("base",)
"""What the two attention products compute in: the base type."""

DIMENSION_MULTIPLE = {"fp8": 16}
"""In and out features of a layer must be multiples of this, or TensorRT has no kernel for the scheme."""


@dataclass(frozen=True)
class Rule:
    """``pattern`` (fnmatch; ``*`` also matches dots) gets ``scheme``.

    Args:
        pattern: matched against whole layer names, case-sensitively.
        scheme: ``fp8``, ``int8``, or the recipe's base to take a layer out again.
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
        base: one of :data:`BASES`.

    Raises:
        UsageError: an unknown scheme, base or attention type, or one pattern with two schemes.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    attention: str = "base"
    base: str = "bf16"

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
        seen: dict[str, str] = {}
        for rule in self.rules:
            _one_of(f"{where}: scheme of {rule.pattern!r}", rule.scheme, (*QUANTISED, self.base))
            if seen.setdefault(rule.pattern, rule.scheme) != rule.scheme:
                raise UsageError(
                    f"{where} gives the pattern {rule.pattern!r} two schemes.",
                    f"{seen[rule.pattern]} and {rule.scheme}.",
                    "Remove one of the rules.",
                )

    @property
    def quantises(self) -> bool:
        """Whether any rule asks for 8 bits."""
        return any(rule.scheme in QUANTISED for rule in self.rules)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for JSON, YAML and the manifest."""
        data = asdict(self)
        rules = [{k: v for k, v in rule.items() if k != "optional" or v} for rule in data.pop("rules")]
        return {**data, "rules": rules}

    @classmethod
    def from_json(cls, data: Any, source: str = "recipe") -> Recipe:
        """Inverse of :meth:`to_json`; UsageError names what does not fit."""
        if not isinstance(data, dict) or not isinstance(data.get("rules", []), list):
            raise UsageError(f"{source} is no recipe.", "It needs a mapping with 'name' and a list 'rules'.")
        _known_keys(data, {"name", "rules", "attention", "base"}, source)
        rules = []
        for i, rule in enumerate(data.get("rules", [])):
            where = f"{source}, rule {i + 1}"
            if not isinstance(rule, dict):
                raise UsageError(f"{where} is no mapping.", f"It is {rule!r}.", "Write pattern and scheme.")
            _known_keys(rule, {"pattern", "scheme", "optional"}, where)
            pattern, scheme, optional = rule.get("pattern"), rule.get("scheme"), rule.get("optional", False)
            if not (isinstance(pattern, str) and isinstance(scheme, str) and isinstance(optional, bool)):
                raise UsageError(f"{where} is incomplete.", f"{rule!r}.", "It needs a pattern and a scheme.")
            rules.append(Rule(pattern, scheme, optional))
        texts = {k: v for k, v in data.items() if k != "rules"}
        for key, value in texts.items():
            if not isinstance(value, str):
                raise UsageError(f"{source}: {key} is no text.", f"It is {value!r}.")
        return cls(rules=tuple(rules), **{"name": "", **texts})

    def to_yaml(self) -> str:
        """The recipe as an editable file."""
        return yaml.safe_dump(self.to_json(), sort_keys=False)


@dataclass(frozen=True)
class Exclusion:
    """A layer that a recipe named but that stays in the base type, and why."""

    layer: str
    scheme: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What a recipe means for one model.

    Args:
        schemes: every linear layer and its scheme.
        exclusions: layers that the recipe named and that cannot run so.
    """

    schemes: dict[str, str]
    exclusions: tuple[Exclusion, ...] = ()

    @property
    def quantised(self) -> dict[str, str]:
        """The layers that get 8 bits."""
        return {name: scheme for name, scheme in self.schemes.items() if scheme in QUANTISED}


def shipped_recipes() -> tuple[str, ...]:
    """Names that ``--precision`` takes."""
    return ("bf16", "fp16", "fp8", "int8")


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A shipped recipe by name, or one from a ``.yaml``, ``.yml`` or ``.json`` file; UsageError otherwise."""
    if str(name_or_path) in shipped_recipes():
        return _shipped(str(name_or_path))
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise UsageError(
            f"Unknown precision {str(name_or_path)!r}.",
            f"Shipped recipes: {', '.join(shipped_recipes())}.",
            "Name one of these, or a recipe file ending in .yaml or .json.",
        )
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"Recipe {path} cannot be read.", error.strerror or str(error)) from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"Recipe {path} is not {path.suffix[1:].upper()}.", str(error)) from error
    return Recipe.from_json(data, str(path))


def schemes(recipe: Recipe, linear_names: Iterable[str]) -> dict[str, str]:
    """The scheme of every layer, last match wins.

    Raises:
        UsageError: a rule that is not optional matches nothing, or no quantising rule matches anything.
    """
    names = list(linear_names)
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
        hits += len(matched) if rule.scheme in QUANTISED else 0
        result.update(dict.fromkeys(matched, rule.scheme))
    if recipe.quantises and not hits:
        raise UsageError(
            f"Recipe {recipe.name!r} quantises no layer of this model.",
            f"The model has {len(names)} linear layers, for example {', '.join(names[:3]) or 'none'}.",
            "Use a recipe whose patterns fit the model, or --precision bf16.",
        )
    return result


def plan(recipe: Recipe, shapes: Mapping[str, tuple[int, int]]) -> Plan:
    """Schemes for layers of the given weight shapes [out, in], less those with no kernel for the scheme.

    Raises:
        UsageError: as :func:`schemes`.
    """
    result = schemes(recipe, shapes)
    exclusions = []
    for name, scheme in result.items():
        multiple = DIMENSION_MULTIPLE.get(scheme, 1)
        out_features, in_features = shapes[name]
        if out_features % multiple or in_features % multiple:
            reason = (
                f"in features {in_features} and out features {out_features} must both be multiples of "
                f"{multiple} for {scheme} matrix products in TensorRT"
            )
            exclusions.append(Exclusion(name, scheme, reason))
    result.update({e.layer: recipe.base for e in exclusions})
    return Plan(result, tuple(exclusions))


# Pooling heads, text_projection, lm_head and the ITM head stay in 16 bits: they are small, they stand last,
# and 49,954 tokens are no multiple of 8.
_LAYERS = (
    ("vision_model.encoder.layers.*.attn.qkv", False),
    ("vision_model.encoder.layers.*.attn.proj", False),
    ("vision_model.encoder.layers.*.mlp.fc[12]", False),
    ("qllama.model.layers.*.self_attn.[qkvo]_proj", True),
    ("qllama.model.layers.*.mlp.*_proj", True),
    ("qllama.model.layers.*.cross_attn.[qkvo]_proj", True),
)


def _shipped(name: str) -> Recipe:
    if name in BASES:
        return Recipe(name, base=name)
    return Recipe(name, tuple(Rule(pattern, name, optional) for pattern, optional in _LAYERS))


def _one_of(where: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{where} is {value!r}.", f"Supported: {', '.join(allowed)}.")


def _known_keys(data: dict[Any, Any], known: set[str], where: str) -> None:
    unknown = sorted(str(key) for key in data if key not in known)
    if unknown:
        raise UsageError(
            f"{where} has unknown keys: {', '.join(unknown)}.", f"Known: {', '.join(sorted(known))}."
        )
