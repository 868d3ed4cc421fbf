"""Verification of a TensorRT 10 or 11 engine, from the JSON of its inspector.

``IEngineInspector.get_engine_information`` and ``trtexec --exportLayerInfo`` write it, of engines built with
``ProfilingVerbosity.DETAILED`` (otherwise it holds names only). Differences between releases:

* 10 lists inputs and outputs as names under ``Bindings``, 11 as objects under ``I/O Tensors``.
* a tensor's type is ``Format/Datatype`` in 10, alone (``Half``) or in a sentence (``Row major linear FP16
  format``); 11 has ``DataType`` apart. With dynamic shapes some layers say ``N/A due to dynamic shapes``.
* layers of a further optimization profile have `` [profile 1]`` after their names.
* matrix kernels (``gemm``) list computed inputs only. Their weight's type is in the kernel's name:
  ``sm89_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n...`` reads e4m3 and writes bf16, with weights in e4m3 and sums
  in fp32. Where a name has another form, the weight's type is unknown, and no promise is kept by it.

Written from the vendor's documentation and published output; no engine of TensorRT 10 or 11 was read here.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..engines.onnx_graph import stored_bytes
from ..engines.products import AttentionBlock
from ..engines.tensorrt.layer_names import MYELIN, PROFILE, node_names
from ..errors import CapabilityError, IntegrityError
from .program import UNTOLD, Kernel, Program
from .report import VerificationReport
from .rtx import report_of

MAX_JSON_BYTES = 256 << 20
"""Largest layer information read; one block of a transformer takes about 20 kB."""
_TYPES = {
    "fp8": "fp8", "e4m3": "fp8", "half": "fp16", "fp16": "fp16", "f16": "fp16", "bfloat16": "bf16",
    "bf16": "bf16", "float": "fp32", "fp32": "fp32", "f32": "fp32", "tf32": "fp32", "double": "fp64",
    "int8": "int8", "i8": "int8", "uint8": "uint8", "int4": "int4", "int32": "int32", "int64": "int64",
    "bool": "bool",
}  # fmt: skip
_WORD = re.compile(r"[A-Za-z]+[0-9]*")
_ELEMENT = r"(e4m3|e5m2|bf16|tf32|f16|f32|i8|i32)"
_TACTIC = re.compile(rf"_{_ELEMENT}{_ELEMENT}_{_ELEMENT}{_ELEMENT}_{_ELEMENT}(?:_|$)")
"""Type read and written, of the weights and the sums, of the scales."""
_HASH = re.compile(r"_0x[0-9a-f]+$")
_SKIPPED = frozenset({"signal", "wait", "shape_call", "constant", "noop"})


def read_inspector(info: Path, graph: Path) -> VerificationReport:
    """Read the inspector's JSON in ``info``: precision of each product of the ONNX file ``graph``.

    Raises:
        IntegrityError: it is not such JSON, or ``graph`` is not a valid ONNX model.
        CapabilityError: it holds the layers' names only.
    """
    return report_of(inspector_programs(info), graph, "tensorrt", why_unfused=_why_unfused)


def inspector_programs(path: Path) -> tuple[Program, ...]:
    """The layers in the JSON file at ``path``, a program for each optimization profile.

    Raises: as :func:`read_inspector`.
    """
    layers = _layers(path)
    if any(isinstance(layer, str) for layer in layers):
        raise CapabilityError(
            f"{path} holds the layers' names only.",
            "The engine was built without details.",
            "Build it with ProfilingVerbosity.DETAILED (trtexec --profilingVerbosity=detailed).",
        )
    programs: dict[int, list[Kernel]] = defaultdict(list)
    for layer in layers:
        if not isinstance(layer, dict) or not isinstance(layer.get("Name"), str):
            raise _refused(path, "A layer has no name.")
        if str(layer.get("LayerType", "")).lower() not in _SKIPPED:
            match = PROFILE.search(layer["Name"])
            programs[int(match[1]) if match else 0].append(_kernel(layer))
    if not programs:
        raise _refused(path, "It has no layers.")
    return tuple(
        Program(tuple(kernels), (), sum(map(sum, (k.constants for k in kernels))))
        for _, kernels in sorted(programs.items())
    )


def _layers(path: Path) -> list[Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
        # Names are merge_reports by control characters, which not every release escapes.
        data = json.loads(raw.decode("utf-8"), strict=False) if len(raw) <= MAX_JSON_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise _refused(path, f"{error}.") from error
    if not isinstance(data, dict) or not isinstance(data.get("Layers"), list):
        raise _refused(path, f"It has no list of Layers, or more than {MAX_JSON_BYTES >> 20} MiB.")
    if "Bindings" not in data and "I/O Tensors" not in data:
        raise _refused(path, "It has neither the Bindings of TensorRT 10 nor the I/O Tensors of 11.")
    layers: list[Any] = data["Layers"]
    return layers


def _refused(path: Path, why: str) -> IntegrityError:
    return IntegrityError(
        f"{path} is not layer information of TensorRT.", why, "Write it again with trtexec --exportLayerInfo."
    )


def _kernel(layer: dict[str, Any]) -> Kernel:
    kind, tactic = str(layer.get("LayerType", "")), str(layer.get("TacticName", ""))
    inputs, outputs = ([_tensor_type(t) for t in _records(layer.get(key))] for key in ("Inputs", "Outputs"))
    op, args, constants = _op(kind, inputs, outputs), inputs, (0,) * len(inputs)
    if op in ("fully_connected", "corrltn"):
        weight, size = _weight(layer.get("Weights"))
        match = _TACTIC.search(tactic)
        first, second = (_TYPES.get(match[1], UNTOLD), _TYPES.get(match[3], UNTOLD)) if match else ("", "")
        computed = inputs[1] if len(inputs) > 1 and not weight else ""
        args = [first or next(iter(inputs), UNTOLD), second or weight or computed or UNTOLD]
        constants = (0, size)
    return Kernel(
        op,
        _HASH.sub("", tactic) if "mha" in tactic else MYELIN.sub("", layer["Name"]),
        tuple(args),
        tuple(outputs),
        node_names(layer),
        constants,
    )


def _op(kind: str, inputs: list[str], outputs: list[str]) -> str:
    """The names of TensorRT-RTX programs for the same kernels."""
    word = kind.lower()
    if word in ("gemm", "matrixmultiply", "fullyconnected") or word.endswith("gemmmatrixmultiply"):
        return "fully_connected"
    if "conv" in word and "deconv" not in word:
        return "corrltn"
    return "cast" if word == "reformat" and set(inputs) != set(outputs) else kind


def _records(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _tensor_type(tensor: dict[str, Any]) -> str:
    keys = ("DataType", "Datatype", "Format/DataType", "Format/Datatype")
    return _type(next((tensor[key] for key in keys if key in tensor), ""))


def _type(text: Any) -> str:
    """The element type in ``Half`` or ``Row major linear FP16 format``."""
    words = (word.lower() for word in _WORD.findall(str(text)))
    return next((_TYPES[word] for word in words if word in _TYPES), UNTOLD)


def _weight(weights: Any) -> tuple[str, int]:
    """Type and bytes of a layer's ``Weights``; empty and 0 where it lists none."""
    if not isinstance(weights, dict) or not isinstance(weights.get("Count"), int) or weights["Count"] <= 0:
        return "", 0
    kind = _type(weights.get("Type"))
    return kind, 0 if kind == UNTOLD else stored_bytes(kind, (weights["Count"],))


def _why_unfused(block: AttentionBlock, types: tuple[str, ...]) -> str:
    if not types:
        return "the engine has no kernel of these names: they were folded away or renamed"
    size = f" (head size {block.head_size})" if block.head_size else ""
    return f"this release chose single kernels{size}"
