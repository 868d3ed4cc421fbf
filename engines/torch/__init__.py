"""The bundle in torch: its components' modules, filled with the stored weights and scales.

``linears`` has the quantised products, ``module`` builds a component from a bundle, ``engine`` runs it behind
the engines' protocol: eager, compiled or as CUDA graphs. ``exported`` hands it to Torch-TensorRT. ``proof``
reads what a call really runs: ``trace`` its operators, ``runs`` the products among them. Nothing here is
imported unless the backend is chosen.
"""
