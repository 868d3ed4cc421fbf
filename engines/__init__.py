"""Engines: backends behind one protocol, TensorRT builds, and proof of the precision that really runs.

``open_engine`` (:mod:`.base`) runs a component, ``build_engine`` (:mod:`.tensorrt.build`) compiles one,
``proof_from_engine`` (:mod:`..verify.rtx`) reads back what the compiler made of it, and ``check_promise``
(:mod:`..verify.expectations`) holds that to the recipe. Importing this package loads no backend.
"""
