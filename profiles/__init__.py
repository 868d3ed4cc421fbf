"""Profiles: the cost of a bundle, in time on this machine and in FLOPs and bytes from its graphs.

:func:`~ivl_export.profiles.measure.bundle_profile.profile` makes the receipt. Importing this package loads
nothing heavy.
"""
