"""Profiles of tests measure small ceilings: how fast this machine is does not matter to them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def small_ceilings() -> Iterator[None]:
    """Without 16-bit instructions a product of the usual size takes a quarter of a second, many times."""
    from ivl_export.profiles.measure import ceilings

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceilings, "SIDE", 128)
        patch.setattr(ceilings, "COPY_BYTES", (1 << 20, 4 << 20))
        yield
