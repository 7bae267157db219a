"""The facts of each kind of chip, as its maker states them: for MFU, `sr-dpo inspect` and `sr-dpo compile`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator."""

    name: str
    """The maker's name, as in a topology: `v5e`."""
    device_kinds: tuple[str, ...]
    """jax's names for it, `device.device_kind`."""
    memory_gib: int
    bfloat16_flops: float
    """Dense bfloat16 multiply-adds a second, counted as two operations each."""
    clock_hz: float | None = None
    """The clock that `bfloat16_flops` belong to; None where nothing is estimated from cycles."""
    chips_a_host: int = 4
    """Chips of one machine in a slice of one machine, the largest there is."""

    @property
    def is_tpu(self) -> bool:
        return self.clock_hz is not None


CHIPS = (
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 16, 197e12, clock_hz=1.5e9, chips_a_host=8),
    Chip("v4", ("TPU v4",), 32, 275e12, clock_hz=1.05e9),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 32, 918e12, clock_hz=1.75e9, chips_a_host=8),
    Chip("v5p", ("TPU v5", "TPU v5p"), 95, 459e12, clock_hz=1.75e9),
    Chip("A100 40 GB", ("NVIDIA A100-SXM4-40GB",), 40, 312e12),
    Chip("A100 80 GB", ("NVIDIA A100-SXM4-80GB",), 80, 312e12),
    Chip("H100", ("NVIDIA H100 80GB HBM3",), 80, 989e12),
    Chip("H200", ("NVIDIA H200",), 141, 989e12),
)
TPUS = tuple(chip for chip in CHIPS if chip.is_tpu)


def chip_of(device_kind: str) -> Chip | None:
    """Finds a chip by jax's name for it; None where the table does not have it, as for a CPU."""
    return next((chip for chip in CHIPS if device_kind in chip.device_kinds), None)


def peak_flops(devices: Sequence[Any]) -> float | None:
    """Sums the bfloat16 flops a second of these devices, all of one kind; None where the kind is not known."""
    chip = chip_of(devices[0].device_kind)
    return None if chip is None else chip.bfloat16_flops * len(devices)
