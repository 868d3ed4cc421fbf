"""Engines: backends behind one protocol, TensorRT builds, and proof of the precision that really runs.

``open_engine`` (:mod:`.protocol`) runs a component, ``build_engine`` (:mod:`.build`) compiles one,
``proof_from_engine`` (:mod:`.proof_rtx`) reads back what the compiler made of it, and ``check_promise``
(:mod:`.promise`) holds that to the recipe. Importing this package loads no backend.
"""
