"""Dividing a cap among models: who goes, and with frames, how many each of those in use may hold.

A model that is about to be used needs its largest step, and could use all of its pages. For what it
could use, idle models give pages up, in the order of the policy. With managed memory, the pager
does the rest page by page. Frames are divided: each model in use gets what its largest step needs,
and of the rest a part as large as its part of what all could use beyond that. A model that is being
called gives back at once what no operation uses just then. For what the largest step needs, and
for that alone, models that are reserved as secondary give way too. What is protected stays.
"""

from __future__ import annotations

from collections.abc import Sequence

from penstock.errors import CapExceededError
from penstock.memory.frames_memory import FramesMemory
from penstock.memory.managed_memory import ManagedMemory
from penstock.memory.pager import Pager
from penstock.policy import Candidate, Policy, Priority, UseHistory, order_of_victims
from penstock.run.runner import Runner
from penstock.sharing.tenant import Tenant
from penstock.sizes import format_bytes

__all__ = ["Overtaken", "Sharing", "divide"]


class Overtaken(Exception):
    """Operations took frames while they were divided: divide them again.

    Parameters
    ----------
    refusal
        What to say where that goes on.
    """

    def __init__(self, refusal: CapExceededError) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


def divide(total: int, least: Sequence[int], most: Sequence[int]) -> list[int]:
    """Divide frames among models.

    Parameters
    ----------
    total
        Frames to be had.
    least, most
        For each model, how many it needs and how many it could use.

    Returns
    -------
    list of int
        For each model, from its least to its most; together no more than `total`, unless the least
        are.
    """
    spare = max(0, total - sum(least))
    more = sum(most) - sum(least)
    if more <= spare:
        return list(most)
    return [few + spare * (many - few) // more for few, many in zip(least, most, strict=True)]


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
        if self._pager.kind == "frames":
            self._pager.frames.reclaim_retired()
        going = self._going(others)
        needed = asker.least + sum(max(0, each.claim - each.held) for each in others)
        self._take_secondaries(asker, others, going, needed, take_secondaries)
        for other in going:
            lacking = asker.page_count - self._room(asker)
            if lacking <= 0:
                break
            if not other.in_use and other.reserved is None:
                other.runner.give_up(min(lacking, other.held))
        active = [asker, *(other for other in others if other.in_use)]
        if self._pager.kind == "frames":
            free = self._pager.budget.available // self._pager.page_size
            self._divide(active, free + sum(each.held for each in active))
        else:
            self._leave_room(asker, others, active)

    def _leave_room(
        self, asker: Tenant, others: Sequence[Tenant], active: Sequence[Tenant]
    ) -> None:
        """Say how many pages of managed memory each model in use may count on."""
        total = self._pager.cap // self._pager.page_size
        claims = {id(each): each.claim for each in (*others, asker)}
        claims[id(asker)] = max(asker.claim, asker.least)
        for each in active:
            memory = each.runner.memory
            assert isinstance(memory, ManagedMemory)
            beside = sum(claims.values()) - claims[id(each)]
            memory.allowed = total - beside if beside else None

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
                self._shrink(each, max(each.least, each.held - short))
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

    def set_turns(self, tenants: Sequence[Tenant]) -> None:
        """Tell the core in which order it may take pages from models, and from which it may not."""
        going = [each for each in self._going(tenants) if each.reserved is None]
        turns = {id(each): turn for turn, each in enumerate(going)}
        for each in tenants:
            each.runner.memory.set_turn(turns.get(id(each)))

    def use_free_room(self, tenant: Tenant) -> bool:
        """Have an idle model use what no other has; return whether it can run in that."""
        if self._pager.kind == "managed":
            return True  # the pager takes no more
        runner = tenant.runner
        _frames(runner).frames = min(self._room(tenant), tenant.page_count)
        try:
            runner.plan()
        except CapExceededError:
            return False
        return True

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
        if self._pager.kind == "managed":
            for each in going:
                if each.in_use:
                    each.runner.evict()
            return
        active = [each for each in tenants if each.in_use]
        held = sum(each.held for each in active)
        others = self._used - held * size
        self._divide(active, max(0, cap - others) // size, firm=False)

    @property
    def _used(self) -> int:
        return self._pager.budget.stats().used

    def _room(self, tenant: Tenant) -> int:
        """Count the pages that a model could hold without taking any from others."""
        held = tenant.runner.memory.region.core.stats().resident_bytes
        return (self._pager.budget.available + held) // self._pager.page_size

    def _divide(self, tenants: Sequence[Tenant], total: int, *, firm: bool = True) -> None:
        least = [
            max(each.least, each.claim) if firm or each.protected else each.least
            for each in tenants
        ]
        most = [each.page_count for each in tenants]
        shares = dict(zip(map(id, tenants), divide(total, least, most), strict=True))
        # Those that give frames away first.
        for each in sorted(tenants, key=lambda each: shares[id(each)] - each.held):
            others = len(tenants) > 1
            try:
                self._give(each, shares[id(each)])
            except CapExceededError as error:
                # All have what they need in what there was, so somebody took some of it meanwhile.
                if others and sum(least) <= total:
                    raise Overtaken(error) from None
                raise

    def _give(self, tenant: Tenant, frames: int) -> None:
        """Plan for a model in as many frames as it gets."""
        runner = tenant.runner
        memory = _frames(runner)
        memory.frames = frames
        runner.plan()
        if memory.frames_held > frames:  # pages that are in use kept it from being arranged
            runner.plan_later()
            runner.give_up(memory.frames_held - frames)

    def _shrink(self, tenant: Tenant, pages: int) -> None:
        """Have a model in use hold no more than that."""
        if self._pager.kind == "frames":
            self._give(tenant, pages)
        else:
            tenant.runner.give_up(tenant.held - pages)


def _frames(runner: Runner) -> FramesMemory:
    assert isinstance(runner.memory, FramesMemory)
    return runner.memory
