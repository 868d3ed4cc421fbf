"""Types of numpy arrays that the package's signatures share."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = np.ndarray[Any, Any]
"""An array of any type and shape."""
Floats: TypeAlias = NDArray[np.float32]
"""An array of float32."""
Ids: TypeAlias = NDArray[np.int64]
"""Token ids, positions and masks."""
