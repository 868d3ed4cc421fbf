from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ivl_export.errors import UsageError
from ivl_export.models.config import InternVLConfig
from ivl_export.models.internvl import InternVLModel
from ivl_export.models.registry import ModelConfig
from ivl_export.profiles.cost.chat_estimate import FULL_SIZE
from ivl_export.profiles.cost.sizes import plan_of
from ivl_export.quantization.recipe import Recipe, Rule, load_recipe, plan_layers, schemes, shipped_recipes

VIT = "vision_model.encoder.layers.{}."
LLAMA = "qllama.model.layers.{}."


@pytest.fixture(scope="module")
def linears() -> dict[str, tuple[int, int]]:
    """Every linear of InternVL-14B, from the model itself."""
    import torch

    with torch.device("meta"):
        model = InternVLModel(InternVLConfig())
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    for suffix, text in ((".yaml", recipe.to_yaml()), (".json", json.dumps(recipe.to_json()))):
        path = tmp_path / f"own{suffix}"
        path.write_text(text)
        assert load_recipe(path) == recipe


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_full_model_gets_just_the_gemms_of_the_design(name: str, linears: dict[str, tuple[int, int]]) -> None:
    plan = plan_layers(load_recipe(name), linears)
    vision = [
        VIT.format(i) + part for i in range(48) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    text = [
        LLAMA.format(i) + part
        for i in range(32)
        for part in (
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
            *((f"cross_attn.{p}_proj" for p in "qkvo") if i % 2 == 0 else ()),
        )
    ]
    assert plan.quantised == dict.fromkeys(vision + text, name)
    assert plan.exclusions == ()
    assert {n for n, s in plan.schemes.items() if s == "bf16"} == {
        "qllama.lm_head",
        "itm_head",
        *(f"clip_projector{n}.cross_attn.{p}" for n in ("", "2") for p in ("q", "k", "v", "proj")),
    }


@pytest.mark.parametrize("name", sorted(set(shipped_recipes()) - {"bf16", "fp16", "fp32"}))
def test_every_form_of_the_model_gets_them(name: str) -> None:
    """All layers of the blocks: of InternVL, and of a chat model without and with queries."""
    configs: list[ModelConfig] = [InternVLConfig(), *FULL_SIZE.values()]
    for config in configs:
        plan = plan_of(load_recipe(name), config)
        blocks = {layer for layer in plan.schemes if ".layers." in layer}
        assert set(plan.quantised) == blocks


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_plain_recipes_quantise_nothing(name: str, linears: dict[str, tuple[int, int]]) -> None:
    assert set(plan_layers(load_recipe(name), linears).schemes.values()) == {name}


def test_last_match_wins() -> None:
    rules = (Rule("a.*", "fp8"), Rule("a.b*", "int8"), Rule("a.bc", "bf16"))
    names = ["a.a", "a.b", "a.bc", "z"]
    assert schemes(Recipe("x", rules), names) == {"a.a": "fp8", "a.b": "int8", "a.bc": "bf16", "z": "bf16"}
    assert schemes(Recipe("x", rules[::-1]), names) == {
        "a.a": "fp8",
        "a.b": "fp8",
        "a.bc": "fp8",
        "z": "bf16",
    }


def test_a_rule_that_matches_nothing_is_named() -> None:
    with pytest.raises(UsageError, match=r"'a\.qqv' -> fp8 matches nothing"):
        schemes(Recipe("x", (Rule("a.*", "fp8"), Rule("a.qqv", "fp8"))), ["a.qkv"])
    optional = Recipe("x", (Rule("a.*", "fp8"), Rule("a.qqv", "int8", optional=True)))
    assert schemes(optional, ["a.qkv"]) == {"a.qkv": "fp8"}


def test_one_pattern_with_two_schemes_names_the_layers() -> None:
    twice = Recipe("x", (Rule("a.*", "fp8"), Rule("b", "int8"), Rule("a.*", "int8")))
    with pytest.raises(UsageError, match=r"the pattern 'a\.\*' two schemes, fp8 and int8") as error:
        schemes(twice, ["a.q", "a.k", "a.v", "a.o", "b"])
    assert error.value.why == "It matches a.q, a.k, a.v and 1 more."
    same = Recipe("x", (Rule("a.*", "fp8"), Rule("b", "int8"), Rule("a.*", "fp8")))
    assert schemes(same, ["a.q", "b"]) == {"a.q": "fp8", "b": "int8"}


def test_a_quantising_recipe_must_quantise_something() -> None:
    with pytest.raises(UsageError, match="quantises no layer"):
        schemes(Recipe("x", (Rule("b", "fp8", optional=True),)), ["a"])


def test_widths_that_fp8_cannot_run_are_stated() -> None:
    shapes = {"a.even": (32, 16), "a.odd": (40, 16), "a.deep": (16, 24)}
    plan = plan_layers(Recipe("x", (Rule("a.*", "fp8"),)), shapes)
    assert plan.quantised == {"a.even": "fp8"}
    assert [(e.layer, e.scheme) for e in plan.exclusions] == [("a.odd", "fp8"), ("a.deep", "fp8")]
    assert "in features 16 and out features 40" in plan.exclusions[0].reason
    assert plan_layers(Recipe("x", (Rule("a.*", "int8"),)), shapes).exclusions == ()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["rules"], "is not a recipe"),
        ({"name": "x", "rules": {}}, "is not a recipe"),
        ({"name": "x", "ruls": []}, "unknown entry 'ruls'"),
        ({"name": "x", "rules": [3]}, r"rules\[0\]. It is not an object"),
        ({"name": "x", "rules": [{"pattern": "a"}]}, r"rules\[0\]. It has no 'scheme'"),
        ({"name": "x", "rules": [{"pattern": "a", "scheme": "fp8", "kind": 1}]}, "unknown entry 'kind'"),
        ({"name": "x", "rules": [{"pattern": "a", "scheme": "int4"}]}, "scheme of 'a' is 'int4'"),
        ({"name": "x", "base": "fp8"}, "base is 'fp8'"),
        ({"name": "x", "attention": "int8"}, "attention is 'int8'"),
        ({"name": "x", "base": 16}, "at base. It is not a text"),
        ({"name": "../x"}, "unusable name"),
        ({"rules": []}, "unusable name"),
        ({"name": "x", "summary": ["no"]}, "at summary. It is not a text"),
    ],
)
def test_bad_recipes_say_what_is_wrong(data: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(UsageError, match=message):
        load_recipe(path)


def test_unknown_precision_lists_the_shipped_ones() -> None:
    with pytest.raises(UsageError, match=", ".join(shipped_recipes())):
        load_recipe("fp4")


@pytest.mark.parametrize("text", ["a: [", "!!python/object/apply:os.system ['true']", "a: *b"])
def test_yaml_is_only_data(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yml"
    path.write_text(text)
    with pytest.raises(UsageError, match="is not YML"):
        load_recipe(path)


def test_missing_recipe_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(tmp_path / "none.json")
