"""Dividing a cap among models: who goes, and with frames, how many each of those in use may hold.

A model that is about to be used needs its largest step, and could use all of its pages. For what it
could use, idle models give pages up, in the order of the policy. With managed memory, the pager
does the rest page by page. Frames are divided: each model in use gets what its largest step needs,
and of the rest a part as large as its part of what all could use beyond that. A model that is being
called gives up at once what no operation uses just then. For what the largest step needs, and
for that alone, models that are reserved as secondary give way too. What is protected stays.
"""

from __future__ import annotations

from collections.abc import Sequence

from penstock.errors import CapExceededError
from penstock.memory.pager import Pager
from penstock.policy import Candidate, Policy, Priority, UseHistory, order_of_victims
from penstock.sharing.division import division_of
from penstock.sharing.tenant import Tenant
from penstock.sizes import format_bytes

__all__ = ["Sharing"]


class Sharing:
    """Divides what a pager's cap allows. Its caller sees to it that one thread does at a time.

    Parameters
    ----------
    policy
        Who gives way first.
    """

    def __init__(self, pager: Pager, policy: Policy) -> None:
        self._pager = pager
        self._policy = policy
        self.history = UseHistory()
        self._division = division_of(pager)

    def make_room(
        self, asker: Tenant, others: Sequence[Tenant], *, take_secondaries: bool = True
    ) -> None:
        """Make room for a model that is about to be used; give each model in use its share.

        Parameters
        ----------
        others
            The other models, the least recently used first.
        take_secondaries
            Whether models that are reserved as secondary may go where nothing else is left.

        Raises
        ------
        CapExceededError
            If the models in use cannot run beside each other and what is protected.
        ModelError
            If the policy names a model that it may not.
        Overtaken
            If operations took frames meanwhile.
        """
        hard_cap = self._pager.hard_cap
        if hard_cap is not None:  # of frames that it caches
            hard_cap.free_cached(asker.runner.memory.region.nbytes)
        self._pager.reclaim()
        going = self._going(others)
        needed = asker.least + sum(max(0, each.claim - each.held) for each in others)
        self._take_secondaries(asker, others, going, needed, take_secondaries)
        for other in going:
            lacking = asker.page_count - self._room(asker)
            if lacking <= 0:
                break
            if not other.in_use and other.reserved is None:
                other.runner.give_up(min(lacking, other.held))
        self._division.share(asker, others)

    def _going(self, tenants: Sequence[Tenant]) -> list[Tenant]:
        """List those that may give way, in the order in which they do."""
        by_name = {each.name: each for each in tenants}
        order = order_of_victims(self._policy, [self._candidate(each) for each in tenants])
        return [by_name[name] for name in order]

    def _candidate(self, tenant: Tenant) -> Candidate:
        return Candidate(
            name=tenant.name,
            nbytes=tenant.held * self._pager.page_size,
            in_use=tenant.in_use > 0,
            priority=tenant.reserved,
            protected=tenant.protected,
            last_use=tenant.last_use,
            next_use=self.history.next_use(tenant.name),
            seconds_per_byte=tenant.runner.memory.seconds_per_byte,
        )

    def _take_secondaries(
        self,
        asker: Tenant,
        others: Sequence[Tenant],
        going: Sequence[Tenant],
        needed: int,
        allowed: bool,
    ) -> None:
        """Have secondaries give up what the asker cannot run without."""
        firm = [each for each in others if each.protected or each.reserved is not None]
        if not firm:
            return  # then there is no more to say than the plan, or the pager, says
        movable = [each for each in others if each.in_use or each in going]
        loose = sum(each.held - min(each.held, each.claim) for each in movable)
        short = needed - self._room(asker) - loose
        secondaries = [each for each in going if each.reserved is Priority.SECONDARY]
        most = sum(each.held - (each.least if each.in_use else 0) for each in secondaries)
        if short > 0 and (not allowed or short > most):
            raise self._refusal(asker, needed, firm, sum(each.claim for each in others))
        for each in secondaries:
            if short <= 0:
                return
            before = each.held
            if each.in_use:
                self._division.shrink(each, max(each.least, each.held - short))
            else:
                each.runner.give_up(min(short, each.held))
            short -= before - each.held
            each.pushed_out += (before - each.held) * self._pager.page_size

    def _refusal(
        self, asker: Tenant, needed: int, firm: Sequence[Tenant], claimed: int
    ) -> CapExceededError:
        size = self._pager.page_size
        ledger = self._pager.budget.stats()
        held = ", ".join(
            f"{each.name!r} ({format_bytes(each.claim * size)}"
            + (f", reserved as {each.reserved.value})" if each.reserved else ", kept resident)")
            for each in firm
        )
        return CapExceededError(
            f"model {asker.name!r} needs {format_bytes(asker.least * size)} to run, and the cap of "
            f"{format_bytes(ledger.cap)} leaves too little beside {held} and models in use. "
            "Release a reservation, leave the block that keeps a model resident, or raise the cap "
            f"to {format_bytes((claimed + asker.least) * size)}",
            requested=needed * size,
            cap=ledger.cap,
            used=ledger.used,
        )

    def require_room(self, asker: Tenant, others: Sequence[Tenant]) -> None:
        """See that a model can be in place as a whole beside what others claim.

        Raises
        ------
        CapExceededError
            If it cannot; nothing has changed then.
        """
        size = self._pager.page_size
        ledger = self._pager.budget.stats()
        outside = ledger.used - ledger.used_by_tag["weights"]
        claimed = sum(each.claim for each in others)
        needed = asker.page_count
        room = max(0, ledger.cap - outside) // size - claimed
        if needed <= room:
            return
        raise CapExceededError(
            f"model {asker.name!r} cannot be reserved: it takes {format_bytes(needed * size)} in "
            f"whole pages, and of the cap of {format_bytes(ledger.cap)}, others claim "
            f"{format_bytes(claimed * size + outside)}, which leaves "
            f"{format_bytes(max(0, room) * size)}",
            requested=needed * size,
            cap=ledger.cap,
            used=ledger.used,
        )

    def rank_evictions(self, tenants: Sequence[Tenant]) -> None:
        """Tell the core in which order it may take pages from models, and from which it may not."""
        going = [each for each in self._going(tenants) if each.reserved is None]
        ranks = {id(each): rank for rank, each in enumerate(going)}
        for each in tenants:
            each.runner.memory.set_eviction_rank(ranks.get(id(each)))

    def use_free_room(self, tenant: Tenant) -> bool:
        """Have an idle model use what no other has; return whether it can run in that."""
        return self._division.use_free_room(tenant, min(self._room(tenant), tenant.page_count))

    def give_way(self, cap: int, tenants: Sequence[Tenant]) -> None:
        """Have models hold no more than a cap, if they can.

        Parameters
        ----------
        tenants
            All models, the least recently used first.

        Raises
        ------
        CapExceededError
            If the models in use, and what is protected, cannot be in that; some may hold less than
            before.
        """
        size = self._pager.page_size
        ledger = self._pager.budget.stats()
        outside = ledger.used - ledger.used_by_tag["weights"]
        room = max(0, cap - outside) // size
        protected = sum(each.claim for each in tenants if each.protected)
        if protected > room:
            raise CapExceededError(
                f"the cap cannot be {format_bytes(cap)}: {format_bytes(protected * size)} are "
                "reserved as primary or kept resident",
                requested=cap,
                cap=ledger.cap,
                used=ledger.used,
            )
        going = self._going(tenants)
        idle = [each for each in going if not each.in_use]
        for each in sorted(idle, key=lambda tenant: tenant.reserved is not None):
            lacking = -(-(self._used - cap) // size)
            if lacking > 0:
                before = each.held
                each.runner.give_up(lacking)
                if each.reserved is not None:
                    each.pushed_out += (before - each.held) * size
        if self._used <= cap:
            return
        self._division.squeeze(tenants, going, cap)

    @property
    def _used(self) -> int:
        return self._pager.budget.stats().used

    def _room(self, tenant: Tenant) -> int:
        """Count the pages that a model could hold without taking any from others."""
        held = tenant.runner.memory.region.core.stats().resident_bytes
        return (self._pager.budget.available + held) // self._pager.page_size
