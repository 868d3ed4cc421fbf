"""The bundle in torch: its components' modules, filled with the stored weights and scales.

``linears`` has the quantised products, ``module`` builds a component from a bundle, ``engine`` runs it by
the engines' protocol: eager, compiled or as CUDA graphs. ``exported`` passes it to Torch-TensorRT. ``trace``
lists the operators of a call, for :mod:`...verify.torch`. Nothing here is imported unless the backend is
chosen.
"""
