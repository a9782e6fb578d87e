"""What is noted while a round is aggregated and handed out, and the report that it makes."""

from __future__ import annotations

from collections.abc import Sequence

from fastagg.distributed.share import Share
from fastagg.handouts.target import Target
from fastagg.planning.budget import PeakMemory
from fastagg.planning.roster import Roster
from fastagg.report import ClientReport, ModuleReport, Report, SkippedClient, Stopwatch

__all__ = ["RoundLog", "module_reports"]


class RoundLog:
    """The figures of one round.

    Attributes:
        clients: by id.
        modules: by name; the hand-out writer fills in what it finds out.
        skipped: clients that were left out before.
    """

    def __init__(self, roster: Roster, watch: Stopwatch, peak: PeakMemory) -> None:
        self.watch = watch
        self.peak = peak
        self.clients = {
            member.client: ClientReport(
                member.client, member.weight, member.rank, member.layout.nbytes
            )
            for member in roster.sorted()
        }
        self.modules = module_reports(roster)
        self.skipped: list[SkippedClient] = []
        self._whole = sorted(roster.whole)
        self._bytes_written = 0

    @property
    def largest_rank(self) -> int:
        """The largest rank of a client."""
        return max(client.rank for client in self.clients.values())

    def wrote(self, targets: Sequence[Target], bytes_written: int) -> None:
        """Notes that these targets were written."""
        self._bytes_written += bytes_written
        for target in targets:
            for client in target.clients:
                self.clients[client].handout = target.name
                self.clients[client].handout_bytes = target.layout.nbytes
        self.peak.sample()

    def join(self, share: Share) -> None:
        """Exchanges the figures of the modules; of times and memory, the most of any process."""
        mine = {module: each for module, each in self.modules.items() if share.has(module)}
        found = share.gather((mine, dict(self.watch.seconds)))
        if len(found) == 1:
            return
        for modules, seconds in found:
            self.modules.update(modules)
            for stage, spent in seconds.items():
                self.watch.seconds[stage] = max(self.watch.seconds[stage], spent)
        self.peak.bytes, self._bytes_written = share.most([self.peak.bytes, self._bytes_written])

    def report(self, method: str, accumulator: str, missing: str, base_effect: str) -> Report:
        """The report of what was done so far."""
        return Report(
            method=method,
            accumulator=accumulator,
            missing=missing,
            base_effect=base_effect,
            clients=list(self.clients.values()),
            modules=[self.modules[module] for module in sorted(self.modules)],
            whole_tensors=self._whole,
            skipped=list(self.skipped),
            seconds=dict(self.watch.seconds),
            bytes_read=sum(client.bytes for client in self.clients.values()),
            bytes_written=self._bytes_written,
            peak_memory=self.peak.bytes,
            peak_memory_of=self.peak.measure,
        )


def module_reports(roster: Roster) -> dict[str, ModuleReport]:
    """Reports of the modules of a round, without what hand-outs find out."""
    reports = {
        module: ModuleReport(module, slot.weight_shape, 0, 0)
        for module, (slot, _) in roster.slots.items()
    }
    for member in roster.members.values():
        for slot in member.layout.slots:
            reports[slot.module].clients += 1
            reports[slot.module].rank_sum += slot.rank
    return reports
