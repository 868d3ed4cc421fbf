"""``triton_python_backend_utils`` as far as model.py uses it: Triton's own is compiled into its server.

Names and behaviour are those of the documentation of Triton's Python backend. It is stricter in one place: a
tensor takes only arrays of the types that models may give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class Tensor:
    """A named array."""

    def __init__(self, name: str, array: Any) -> None:
        assert isinstance(array, np.ndarray)
        assert array.dtype in (np.float32, np.int32, np.object_)
        if array.dtype == np.object_:
            assert all(isinstance(value, bytes) for value in array.reshape(-1)), "texts are bytes in Triton"
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array


class TritonError(Exception):
    """The error of one request."""

    def message(self) -> str:
        return str(self.args[0])


class InferenceRequest:
    """Input tensors, and the outputs that the client asked for."""

    def __init__(self, inputs: Sequence[Tensor], requested_output_names: Sequence[str]) -> None:
        self._inputs, self._outputs = inputs, list(requested_output_names)

    def inputs(self) -> Sequence[Tensor]:
        return self._inputs

    def requested_output_names(self) -> list[str]:
        return self._outputs


class InferenceResponse:
    """Output tensors, or an error."""

    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        assert not (output_tensors and error)
        self._outputs, self._error = list(output_tensors), error

    def output_tensors(self) -> list[Tensor]:
        return self._outputs

    def error(self) -> TritonError | None:
        return self._error


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)
