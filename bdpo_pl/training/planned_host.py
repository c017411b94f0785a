"""The host memory that a run will need for what is kept there instead of on its devices."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HostMemory:
    """Bytes on the host, of one process.

    Attributes:
        weights: parameters.
        gradients: gradients of trained parameters.
        optimizer: state of the optimiser.
        activations: tensors saved for the backward pass.
        reference: weights of the reference.
        live: true if the reference stays in memory; otherwise it is freed before the policy is loaded.
        processes: number of processes on each machine.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    reference: int = 0
    live: bool = False
    processes: int = 1

    @property
    def each(self) -> int:
        """Bytes of one process."""
        trained = self.weights + self.gradients + self.optimizer + self.activations
        return trained + self.reference if self.live else max(trained, self.reference)

    @property
    def total(self) -> int:
        """Bytes of all processes of a machine."""
        return self.processes * self.each

    @property
    def label(self) -> str:
        """Label of the total in the plan's table."""
        kinds = (
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimiser state", self.optimizer),
            ("activations", self.activations),
            ("reference" if self.live else "reference, freed before", self.reference),
        )
        found = ", ".join(f"{name} {size / 2**30:,.3f}" for name, size in kinds if size)
        times = f" of {self.processes} processes, each" if self.processes > 1 else ""
        return f"host memory{times}: {found}"
