"""The ledgers of a machine: of one GPU, and of a node's memory, which all its ranks share."""

from __future__ import annotations

from megatron_tide.hosting.plan.ledger import Ledger
from megatron_tide.hosting.plan.machine import Machine


class Books:
    """``device`` is where a rank computes: its GPU, or the node's memory where there is none.

    Amounts are a rank's; the node's ledger takes them for all its ranks, unless ``ranks`` says for how many.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.gpu = Ledger(keeps_pieces=False)
        self.host = Ledger(keeps_pieces=not machine.has_gpus)
        self.disk: dict[str, int] = {}

    def hold(self, part: str, size: float, since: str = "start", *, host: bool = False) -> None:
        """Held on the device, or (``host``) in the node's memory; see :meth:`Ledger.hold`."""
        if host or not self.machine.has_gpus:
            self.host.hold(part, size * self.machine.ranks, since)
        else:
            self.gpu.hold(part, size, since)

    def use(
        self,
        phase: str,
        part: str,
        size: float,
        each: float | None = None,
        *,
        host: bool = False,
        ranks: int | None = None,
    ) -> None:
        """Used on the device, or (``host``) in the node's memory; see :meth:`Ledger.use`."""
        if host or not self.machine.has_gpus:
            count = self.machine.ranks if ranks is None else ranks
            self.host.use(phase, part, size * count, size if each is None else each)
        else:
            self.gpu.use(phase, part, size, each)
