"""The runtime in LitServe, which batches requests and runs the model in a process of its own.

python -m ivl_export.benchmarks.serve.lit BUNDLE PORT THREADS      # needs: pip install litserve
"""

# LitServe reads annotations at run time: they are no texts here.
import base64
import sys
from typing import Any

import litserve
import numpy as np

from ivl_export.runtime import InternVL


class Embeddings(litserve.LitAPI):  # type: ignore[misc]
    """Images to vectors of InternVL-C, in base64, as :mod:`.naive` takes and gives them."""

    def __init__(self, bundle: str, threads: int) -> None:
        super().__init__(max_batch_size=8, batch_timeout=0.002, api_path="/v1/embeddings")
        self.bundle, self.threads = bundle, threads

    def setup(self, device: str) -> None:
        """Open the bundle, in the process of the model."""
        self.model = InternVL.load(self.bundle, threads=self.threads)

    def decode_request(self, request: dict[str, Any]) -> bytes:
        """The file in a data URL."""
        return base64.b64decode(request["input"].partition(",")[2])

    def predict(self, batch: list[bytes]) -> list[Any]:
        """Unit vectors."""
        rows = self.model.encode_image(batch)
        return list(rows / np.linalg.norm(rows, axis=1, keepdims=True))

    def encode_response(self, row: Any) -> dict[str, Any]:
        """As OpenAI's route answers."""
        text = base64.b64encode(np.asarray(row, np.float32).tobytes()).decode()
        return {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": text}]}


if __name__ == "__main__":
    api = Embeddings(sys.argv[1], int(sys.argv[3]))
    litserve.LitServer(api, accelerator="cpu").run(
        host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="warning"
    )
