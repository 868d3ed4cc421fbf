"""Columns of images and texts in Arrow and Parquet tables, as data sets on the Hugging Face Hub have them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import CapabilityError

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
TEXT_COLUMNS = ("caption", "captions", "text", "txt", "sentence", "sentences", "description", "alt_text")
"""Columns are found under the first of these names that is there."""


def load_pyarrow(user: str, extra: str) -> Any:
    """The module pyarrow, its Parquet part imported.

    Raises:
        CapabilityError: it is not installed; ``user`` needs it, and ``extra`` installs it.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CapabilityError(
            f"{user} need pyarrow.", str(error), f"pip install 'ivl-export[{extra}]'"
        ) from error
    return pyarrow


def is_image(kind: pa.DataType) -> bool:
    """Whether a column's type holds images: bytes, or a struct of bytes and path."""
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def is_text(kind: pa.DataType) -> bool:
    """Whether a column's type holds texts, or lists of them."""
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind))
