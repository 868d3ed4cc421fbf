"""Published peaks of GPUs: the vendor's numbers, none of them measured here.

Matrix throughput is dense (without structured sparsity) and accumulates 16-bit floats and FP8 in FP32, as
engines do; a vendor's figure "with sparsity" is halved. None: the hardware lacks the type, or no vendor
document was found that says. ``source`` names the documents a row comes from; the figures were read in public
copies and quotations of these documents.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...errors import UsageError


@dataclass(frozen=True)
class GpuPeaks:
    """One GPU.

    ``fp16`` to ``int8`` are dense TFLOP/s (int8: TOP/s); ``memory_gbps`` 10^9 bytes/s; ``memory_gb`` 10^9
    bytes; ``watts`` the board's or module's limit; ``driver`` matches the name that the NVIDIA driver gives.
    """

    name: str
    title: str
    sm: str
    fp16: float | None
    bf16: float | None
    fp8: float | None
    int8: float | None
    memory_gbps: float
    memory_gb: float
    watts: int
    driver: str
    source: str

    def tflops(self, kind: str) -> float | None:
        """The published peak for ``kind`` (``fp16``, ``bf16``, ``fp8``, ``int8``)."""
        return {"fp16": self.fp16, "bf16": self.bf16, "fp8": self.fp8, "int8": self.int8}.get(kind)

    def fits(self, nbytes: int) -> bool:
        """Whether the memory holds ``nbytes``."""
        return nbytes <= self.memory_gb * 1e9


_DAM = "https://www.nvidia.com/content/dam/en-zz/Solutions"
_A100 = f"{_DAM}/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
_H100 = "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_BLACKWELL = (
    "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
)
_LITERATURE = f"{_DAM}/design-visualization/quadro-product-literature"
_BLACKWELL_PRO = f"{_LITERATURE}/NVIDIA-RTX-Blackwell-PRO-GPU-Architecture-v1.0.pdf"
_RTX6000 = f"{_DAM}/design-visualization/rtx-6000/proviz-print-rtx6000-datasheet-web-2504660.pdf"
_THOR = (
    "https://developer.nvidia.com/blog/introducing-nvidia-jetson-thor-the-ultimate-platform-for-physical-ai/"
)

GPUS: dict[str, GpuPeaks] = {
    gpu.name: gpu
    for gpu in (
        GpuPeaks("t4", "T4", "sm75", 65, None, None, 130, 300, 16, 70, r"T4",
                 f"{_DAM}/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf"),
        GpuPeaks("a10", "A10", "sm86", 125, 125, None, 250, 600, 24, 150, r"A10",
                 f"{_DAM}/Data-Center/a10/pdf/datasheet-new/nvidia-a10-datasheet.pdf"),
        GpuPeaks("a30", "A30", "sm80", 165, 165, None, 330, 933, 24, 165, r"A30",
                 f"{_DAM}/data-center/products/a30-gpu/pdf/a30-datasheet.pdf"),
        GpuPeaks("a40", "A40", "sm86", 149.7, 149.7, None, 299.3, 696, 48, 300, r"A40",
                 "https://images.nvidia.cn/content/Solutions/data-center/a40/nvidia-a40-datasheet.pdf"),
        GpuPeaks("a100-40gb", "A100 SXM 40 GB", "sm80", 312, 312, None, 624, 1555, 40, 400,
                 r"A100-SXM4-40GB", _A100),
        GpuPeaks("a100-pcie", "A100 PCIe 80 GB", "sm80", 312, 312, None, 624, 1935, 80, 300,
                 r"A100 80GB PCIe", _A100),
        GpuPeaks("a100", "A100 SXM 80 GB", "sm80", 312, 312, None, 624, 2039, 80, 400,
                 r"A100-SXM4-80GB", _A100),
        GpuPeaks("l4", "L4", "sm89", 121, 121, 242.5, 242.5, 300, 24, 72, r"L4",
                 "https://nvdam.widen.net/s/rvq98gbwsw/l4-datasheet-2595652"),
        GpuPeaks("l40", "L40", "sm89", 181.05, 181.05, 362, 362, 864, 48, 300, r"L40",
                 "https://images.nvidia.cn/content/Solutions/data-center/vgpu-L40-datasheet.pdf"),
        GpuPeaks("l40s", "L40S", "sm89", 362.05, 362.05, 733, 733, 864, 48, 350, r"L40S",
                 "https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413"),
        GpuPeaks("h100-pcie", "H100 PCIe", "sm90", 756, 756, 1513, 1513, 2000, 80, 350, r"H100 PCIe", _H100),
        GpuPeaks("h100", "H100 SXM", "sm90", 989, 989, 1979, 1979, 3350, 80, 700, r"H100 80GB HBM3", _H100),
        GpuPeaks("h200", "H200 SXM", "sm90", 989, 989, 1979, 1979, 4800, 141, 700, r"H200",
                 "https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446"),
        GpuPeaks("b200", "B200 (HGX)", "sm100", 2250, 2250, 4500, 4500, 7700, 180, 1000, r"B200",
                 "https://resources.nvidia.com/en-us-blackwell-architecture"),
        GpuPeaks("rtx3090", "RTX 3090", "sm86", 71, 71, None, 284, 936, 24, 350, r"RTX 3090",
                 "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.1.pdf"),
        GpuPeaks("rtx4090", "RTX 4090", "sm89", 165.2, 165.2, 330.3, 660.6, 1008, 24, 450, r"RTX 4090", _ADA),
        GpuPeaks("rtx5090", "RTX 5090", "sm120", 209.5, 209.5, 419, 838, 1792, 32, 575, r"RTX 5090",
                 _BLACKWELL),
        GpuPeaks("rtx6000-ada", "RTX 6000 Ada", "sm89", 364, 364, 728.5, None, 960, 48, 300,
                 r"RTX 6000 Ada Generation", f"{_BLACKWELL_PRO} {_RTX6000}"),
        GpuPeaks("rtx-pro-6000", "RTX PRO 6000 Blackwell Workstation", "sm120", 503.8, 503.8, None, None,
                 1792, 96, 600, r"RTX PRO 6000 Blackwell Workstation Edition", _BLACKWELL_PRO),
        GpuPeaks("jetson-orin", "Jetson AGX Orin 64 GB", "sm87", None, None, None, 85, 204.8, 64, 60, r"Orin",
                 f"{_DAM}/gtcf21/jetson-orin/nvidia-jetson-agx-orin-technical-brief.pdf"),
        GpuPeaks("jetson-thor", "Jetson T5000 (Thor)", "sm110", 258.5, None, 517, 517, 273, 128, 130,
                 r"(NVIDIA )?(Jetson )?(AGX )?Thor", _THOR),
    )
}  # fmt: skip


def find_gpu(name: str) -> GpuPeaks:
    """The GPU called ``name`` (``l40s``, ``RTX 4090``, ``NVIDIA L4``).

    Raises:
        UsageError: none of :data:`GPUS`; they are listed.
    """
    plain_name = _plain(name)
    for gpu in GPUS.values():
        if plain_name in (_plain(gpu.name), _plain(gpu.title)):
            return gpu
    raise UsageError(
        f"The peaks of GPU {name!r} are not known.", f"Known: {', '.join(GPUS)}.", "Name one of these."
    )


def of_driver(name: str) -> GpuPeaks | None:
    """The GPU that the NVIDIA driver calls ``name``; None if the table lacks it."""
    plain = re.sub(r"^(NVIDIA |Tesla |GeForce )+", "", name)
    return next((gpu for gpu in GPUS.values() if re.fullmatch(gpu.driver, plain)), None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]|nvidia|geforce", "", name.lower())
