"""Common GPUs, from their makers' data sheets."""

from dataclasses import dataclass

from fintune.files import read_toml

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


GPUS = tuple(Gpu(**facts) for facts in read_toml(__file__, "gpus.toml")["gpu"])
