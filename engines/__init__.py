"""Engines: backends behind one protocol, TensorRT builds, and proof of the precision that really runs.

``open_engine`` (:mod:`.protocol`) runs a component, ``build_engine`` (:mod:`.build`) compiles one,
``report_engine`` and ``check_promise`` (:mod:`.proof`) read back what the compiler made of it. Importing this
package loads no backend.
"""
