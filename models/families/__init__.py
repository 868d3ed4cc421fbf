"""The model forms that this release knows, a file each; :mod:`..registry` has the contract."""
