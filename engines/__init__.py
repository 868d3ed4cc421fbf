"""Engines: backends that share one protocol, and TensorRT builds.

``open_engine`` (:mod:`.base`) runs a component, ``build_engine`` (:mod:`.tensorrt.build`) compiles one,
``read_rtx`` (:mod:`..verify.rtx`) reads the compiled result back, and ``check_expectations``
(:mod:`..verify.expectations`) compares that with the recipe. Importing this package loads no backend.
"""
