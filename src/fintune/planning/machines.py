"""Common GPUs, from their makers' data sheets."""

from dataclasses import dataclass

USABLE = 0.94
"""Share of the nominal memory that a process gets: the rest is ECC, driver and other contexts."""
CONTEXT_BYTES = 600 * 2**20
"""CUDA context, cuBLAS workspaces and loaded kernels, about; never measured here."""
PEAK_SHARE = (0.25, 0.40, 0.55)
"""Share of the dense peak that training is assumed to reach: least, expected, most. Not measured
here; the range covers what trainers publish for 7B-8B models on A100 and H100."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU.

    Attributes:
        tflops: dense bf16 with fp32 accumulation (no sparsity), 10^12 operations a second.
        gib: nominal memory.
        gb_per_s: memory bandwidth, 10^9 bytes a second.
        missing: why it cannot run what this package does, if so.
    """

    name: str
    tflops: float
    gib: int
    gb_per_s: float
    missing: str = ""

    @property
    def usable(self) -> int:
        """Bytes that a run may take."""
        return int(self.gib * 2**30 * USABLE)


GPUS = (
    # NVIDIA T4 data sheet (DS-09009): fp16, it has no bf16.
    Gpu("T4", 65, 16, 300, "no flash attention below compute capability 8.0: not estimated"),
    Gpu("L4", 121, 24, 300),  # NVIDIA L4 data sheet: 242 with sparsity
    Gpu("A10G", 70, 24, 600),  # NVIDIA A10G data sheet: 140 with sparsity
    Gpu("RTX 4090", 165, 24, 1008),  # NVIDIA Ada architecture white paper, fp32 accumulation
    Gpu("L40S", 362, 48, 864),  # NVIDIA L40S data sheet: 733 with sparsity
    Gpu("A100 40GB", 312, 40, 1555),  # NVIDIA A100 data sheet
    Gpu("A100 80GB", 312, 80, 2039),  # the same, SXM
    Gpu("H100", 989, 80, 3350),  # NVIDIA H100 data sheet, SXM: 1,979 with sparsity
    Gpu("H200", 989, 141, 4800),  # NVIDIA H200 data sheet, SXM
    Gpu("MI300X", 1307, 192, 5300),  # AMD Instinct MI300X data sheet
)
