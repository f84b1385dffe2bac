"""How what there is of a cap is divided among the models in use.

Frames are divided: each model in use gets what its largest step needs, and of the rest a part as
large as its part of what all could use beyond that. With managed memory, the pager takes pages from
whichever model holds them; models are only told what they may count on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from typing_extensions import override

from penstock.errors import CapExceededError
from penstock.memory.pager import Pager
from penstock.sharing.tenant import Tenant

__all__ = ["Division", "Overtaken", "divide", "division_of"]


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


class Division(ABC):
    """Divides what a pager's cap allows among the models in use."""

    def __init__(self, pager: Pager) -> None:
        self._pager = pager

    @abstractmethod
    def share(self, asker: Tenant, others: Sequence[Tenant]) -> None:
        """Give a model that is about to be used, and those in use, their shares.

        Raises
        ------
        CapExceededError
            If they cannot run beside each other.
        Overtaken
            If operations took frames meanwhile.
        """

    @abstractmethod
    def squeeze(self, tenants: Sequence[Tenant], going: Sequence[Tenant], cap: int) -> None:
        """Have the models in use hold no more than a cap, as nothing else is left to go.

        Parameters
        ----------
        going
            Those that may give way, in the order in which they do.
        cap
            In bytes, for all that is charged.

        Raises
        ------
        CapExceededError
            If they cannot run in that.
        """

    @abstractmethod
    def shrink(self, tenant: Tenant, pages: int) -> None:
        """Have a model in use hold no more than that."""

    @abstractmethod
    def use_free_room(self, tenant: Tenant, pages: int) -> bool:
        """Have an idle model use so many pages that no other has; return whether it can run so."""


def division_of(pager: Pager) -> Division:
    """Return what divides the cap of a pager."""
    return _Shares(pager) if pager.divides else _PageByPage(pager)


class _Shares(Division):
    """Each model is planned for in the frames that it gets."""

    @override
    def share(self, asker: Tenant, others: Sequence[Tenant]) -> None:
        active = [asker, *(other for other in others if other.in_use)]
        free = self._pager.budget.available // self._pager.page_size
        self._divide(active, free + sum(each.held for each in active))

    @override
    def squeeze(self, tenants: Sequence[Tenant], going: Sequence[Tenant], cap: int) -> None:
        size = self._pager.page_size
        active = [each for each in tenants if each.in_use]
        others = self._pager.budget.stats().used - sum(each.held for each in active) * size
        self._divide(active, max(0, cap - others) // size, firm=False)

    @override
    def shrink(self, tenant: Tenant, pages: int) -> None:
        """Plan for a model in as many frames as it gets."""
        runner = tenant.runner
        runner.memory.allow(pages)
        runner.plan()
        if tenant.held > pages:  # pages that are in use kept it from being arranged
            runner.plan_later()
            runner.give_up(tenant.held - pages)

    @override
    def use_free_room(self, tenant: Tenant, pages: int) -> bool:
        tenant.runner.memory.allow(pages)
        try:
            tenant.runner.plan()
        except CapExceededError:
            return False
        return True

    def _divide(self, tenants: Sequence[Tenant], total: int, *, firm: bool = True) -> None:
        least = [
            max(each.least, each.claim) if firm or each.protected else each.least
            for each in tenants
        ]
        most = [each.page_count for each in tenants]
        shares = dict(zip(map(id, tenants), divide(total, least, most), strict=True))
        # Those that give frames away first.
        for each in sorted(tenants, key=lambda each: shares[id(each)] - each.held):
            try:
                self.shrink(each, shares[id(each)])
            except CapExceededError as error:
                # All have what they need in what there was, so somebody took some of it meanwhile.
                if len(tenants) > 1 and sum(least) <= total:
                    raise Overtaken(error) from None
                raise


class _PageByPage(Division):
    """The pager takes pages from whichever model holds them."""

    @override
    def share(self, asker: Tenant, others: Sequence[Tenant]) -> None:
        total = self._pager.cap // self._pager.page_size
        claims = {id(each): each.claim for each in (*others, asker)}
        claims[id(asker)] = max(asker.claim, asker.least)
        for each in (asker, *(other for other in others if other.in_use)):
            beside = sum(claims.values()) - claims[id(each)]
            each.runner.memory.allow(total - beside if beside else None)

    @override
    def squeeze(self, tenants: Sequence[Tenant], going: Sequence[Tenant], cap: int) -> None:
        for each in going:
            if each.in_use:
                each.runner.evict()

    @override
    def shrink(self, tenant: Tenant, pages: int) -> None:
        tenant.runner.give_up(tenant.held - pages)

    @override
    def use_free_room(self, tenant: Tenant, pages: int) -> bool:
        return True  # the pager takes no more
