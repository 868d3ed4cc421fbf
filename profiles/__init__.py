"""Profiles: what a bundle costs, in time on this machine and in FLOPs and bytes from its graphs.

:func:`~ivl_export.profiles.measure.report.profile` makes the receipt. Importing this package loads nothing
heavy.
"""
