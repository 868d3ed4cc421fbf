"""The surface of the TensorRT bindings: names and signatures, written to ``tests/engines/surfaces``.

The bindings of ``tensorrt`` are on PyPI, its libraries are not. The bindings need nine functions of those
libraries to be there when they are imported, and call none of them until an object is made: with empty
libraries in their place their classes can be read, none can be used. Run it for a new release::

    pip download --no-deps --only-binary=:all: -d wheels tensorrt-cu13-bindings==11.4.*
    python tests/tools/tensorrt_surface.py wheels/*.whl        # for this Python's version; needs a C compiler
    python tests/tools/tensorrt_surface.py tensorrt_rtx        # an installed module
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

SURFACES = Path(__file__).parent.parent / "engines" / "surfaces"
NEEDED = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip
CLASSES = (
    "Builder", "IBuilderConfig", "INetworkDefinition", "ILayer", "IAttentionInputLayer", "IAttention",
    "ITensor", "OnnxParser", "ParserError", "IOptimizationProfile", "ITimingCache", "IHostMemory", "Runtime",
    "ICudaEngine", "IExecutionContext", "IRuntimeConfig", "EngineInspector", "Refitter", "OnnxParserRefitter",
    "ILogger", "Logger", "IProfiler", "IStreamWriter", "IStreamReaderV2",
)  # fmt: skip
ENUMS = (
    "BuilderFlag", "ComputeCapability", "CudaGraphStrategy", "DataType",
    "ExecutionContextAllocationStrategy", "HardwareCompatibilityLevel",
    "LayerInformationFormat", "LayerType", "MemoryPoolType", "NetworkDefinitionCreationFlag",
    "ProfilingVerbosity", "SeekPosition", "TacticSource", "TensorIOMode", "TilingOptimizationLevel",
)  # fmt: skip
_PACKAGE = re.compile(r"\b(tensorrt|tensorrt_rtx)(_bindings)?\.((tensorrt|tensorrt_rtx)\.)?")


def surface(module: Any, release: str) -> dict[str, Any]:
    """Classes with their attributes and signatures, enums with their members; missing ones are left out."""
    results = [name for name in CLASSES if hasattr(module, name)]
    return {
        "module": "tensorrt_rtx" if "rtx" in module.__name__ else "tensorrt",
        "release": release,
        "classes": {name: _attributes(getattr(module, name)) for name in results},
        "enums": {name: list(getattr(module, name).__members__) for name in ENUMS if hasattr(module, name)},
    }


def _attributes(cls: type) -> dict[str, str]:
    names = ["__init__", *(name for name in dir(cls) if not name.startswith("_"))]
    return {name: _told(cls, name) for name in names}


def _told(cls: type, name: str) -> str:
    """A method's signatures, one a line; a property's type, then ``writable``; empty for a constant."""
    value = getattr(cls, name)
    if isinstance(value, property):
        kind = re.search(r"-> (.+)", value.fget.__doc__ or "") if value.fget else None
        return (_short(kind[1]) if kind else "?") + (" writable" if value.fset else "")
    text = getattr(value, "__doc__", None) or ""
    lines = re.findall(rf"^(?:\d+\. )?{name}(\(.*)$", text, re.MULTILINE) if callable(value) else []
    expected = [line for line in lines if "*args" not in line]
    return "\n".join(_short(line) for line in expected)


def _short(text: str) -> str:
    return _PACKAGE.sub("", text).strip()


def from_wheel(wheel: Path) -> dict[str, Any]:
    """The surface of the bindings in ``wheel``, read in a separate process."""
    release = wheel.name.split("-")[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        zipfile.ZipFile(wheel).extractall(folder)
        (bindings,) = folder.glob("*_bindings/tensorrt.so")
        needed = subprocess.run(["readelf", "-d", bindings], capture_output=True, text=True, check=True)
        source = folder / "empty.c"
        source.write_text("".join(f"void *{function}(void) {{ return 0; }}\n" for function in NEEDED))
        for library in re.findall(r"\[(libnv[^\]]*)\]", needed.stdout):
            out = folder / library
            subprocess.run(
                ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", out, source], check=True
            )
        env = {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(bindings.parent)}
        process = subprocess.run(
            [sys.executable, __file__, "--print", "tensorrt", release],
            env=env, capture_output=True, text=True, check=True,
        )  # fmt: skip
    return dict(json.loads(process.stdout))


def main(args: list[str]) -> None:
    """Print or write the surface of a module, or write those of wheels."""
    if args[:1] == ["--print"]:
        print(json.dumps(surface(importlib.import_module(args[1]), args[2])))
        return
    for arg in args:
        if arg.endswith(".whl"):
            result = from_wheel(Path(arg))
        else:
            module = importlib.import_module(arg)
            result = surface(module, str(module.__version__))
        path = SURFACES / f"{result['module']}-{result['release']}.json"
        path.write_text(json.dumps(result, indent=0, sort_keys=True) + "\n")
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
