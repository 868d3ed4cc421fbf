"""Names in the layer information of TensorRT's inspector: of layers, and of the ONNX nodes they compute."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

ONNX = re.compile(r"\[ONNX Layer: ([^\]\x1e\x1f]*)\]")
PROFILE = re.compile(r" \[profile +(\d+)\]?")
MYELIN = re.compile(r"_myl\d+_\d+$")


def layer_names(text: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Each layer of an inspector's JSON ``text``: its name to its type and the ONNX nodes it computes.

    Layers with names only, and text that is not such JSON, are left out: the names serve readers.
    """
    try:
        data = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return {}
    layers = data.get("Layers") if isinstance(data, dict) else None
    dictionaries = [x for x in layers if isinstance(x, dict)] if isinstance(layers, list) else []
    return {
        x["Name"]: (str(x.get("LayerType", "")), node_names(x))
        for x in dictionaries
        if isinstance(x.get("Name"), str)
    }


def node_names(layer: dict[str, Any]) -> tuple[str, ...]:
    """ONNX nodes of a layer: its metadata names them; older names only join them."""
    names = ONNX.findall(str(layer.get("Metadata", "")))
    joined: Iterable[str] = names or MYELIN.sub("", layer["Name"]).split("+")
    return tuple(dict.fromkeys(PROFILE.sub("", name).strip() for name in joined))
