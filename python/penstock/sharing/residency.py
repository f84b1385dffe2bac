"""What stays on the device: keeping models resident, reserving room for them, and guests.

Three promises of different strength. A model that is *kept* loses nothing to others for the time
of a block. One that is *reserved* is brought in and stays until that is taken back; what is left of
the cap is what guests may use. A *guest* has to do with that, and goes when it has run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress

from penstock.errors import CapExceededError, ModelError
from penstock.memory.pager import Pager
from penstock.policy import Policy, Priority
from penstock.sharing.division import Overtaken
from penstock.sharing.sharing import Sharing
from penstock.sharing.tenant import Tenant

__all__ = ["NothingToKeepWarning", "Residency"]


class NothingToKeepWarning(UserWarning):
    """A block keeps models resident, and there are none that could be."""


class Residency:
    """Who is resident, of the models under one cap. Its caller has one thread do it at a time.

    Parameters
    ----------
    policy
        Who gives way first.
    """

    def __init__(self, pager: Pager, policy: Policy) -> None:
        self._pager = pager
        self._sharing = Sharing(pager, policy)
        self._tenants: list[Tenant] = []
        self._uses = 0

    def add(self, tenant: Tenant) -> None:
        """Take a model in."""
        self._sharing.rank_evictions([tenant, *self._by_use()])
        self._tenants.append(tenant)

    def remove(self, tenant: Tenant) -> None:
        """Forget a model."""
        self._tenants.remove(tenant)

    def _by_use(self) -> list[Tenant]:
        return sorted(self._tenants, key=lambda tenant: tenant.last_use)

    def _others(self, tenant: Tenant) -> list[Tenant]:
        return [each for each in self._by_use() if each is not tenant]

    # ---- uses ----------------------------------------------------------------------------------

    def begin_use(self, tenant: Tenant, *, guest: bool = False) -> None:
        """Make room for a model, and begin to bring it in.

        Raises
        ------
        CapExceededError
            If it cannot run beside the models in use, and what is protected from it.
        ModelError
            If a guest is reserved; or the policy names a model that it may not.
        """
        if guest and tenant.reserved is not None:
            raise ModelError(
                f"model {tenant.name!r} is reserved, so it is at home here: use it, or release "
                "the reservation"
            )
        self._make_room(tenant, take_secondaries=not guest)
        tenant.runner.memory.set_active(True)
        tenant.runner.prefetch()
        tenant.in_use += 1
        self._sharing.history.note(tenant.name)
        try:
            self._note_use(tenant)
        except BaseException:
            tenant.in_use -= 1
            raise

    def end_use(self, tenant: Tenant, *, evict: bool) -> None:
        """Let go of a model; a kept or reserved one stays though it is to be evicted."""
        tenant.in_use -= 1
        if tenant.in_use:
            self._note_use(tenant)
            return
        tenant.runner.memory.set_active(False)
        self._note_use(tenant)
        if evict and not tenant.protected and tenant.reserved is None:
            tenant.runner.evict()
            self.share_again()

    def _note_use(self, tenant: Tenant) -> None:
        self._uses += 1
        tenant.last_use = self._uses
        self._sharing.rank_evictions(self._by_use())

    def prefetch(self, tenant: Tenant) -> None:
        """Begin to bring a model in, as far as there is room."""
        if tenant.in_use or tenant.reserved is not None or self._sharing.use_free_room(tenant):
            tenant.runner.prefetch()

    # ---- keeping and reserving -----------------------------------------------------------------

    def keep(self, tenants: Iterable[Tenant] | None) -> list[Tenant]:
        """Keep models resident; return them.

        Parameters
        ----------
        tenants
            None for all that are in use.
        """
        found = list(tenants if tenants is not None else self._tenants)
        kept = [each for each in found if tenants is not None or each.in_use]
        if not kept:
            warnings.warn(
                "nothing to keep resident: no model with weights is named or acquired",
                NothingToKeepWarning,
                stacklevel=5,
            )
        for each in kept:
            each.kept += 1
        self._sharing.rank_evictions(self._by_use())
        return kept

    def keep_no_more(self, kept: Sequence[Tenant]) -> None:
        """Take one `keep` back."""
        for each in kept:
            each.kept -= 1
        self._sharing.rank_evictions(self._by_use())
        self.share_again()

    def reserve(self, tenant: Tenant, priority: Priority) -> None:
        """Bring a model in, to stay.

        Raises
        ------
        CapExceededError
            If it does not fit beside what others claim; nothing has changed then.
        ModelError
            If it is reserved otherwise.
        """
        if tenant.reserved is priority:
            return
        if tenant.reserved is not None:
            raise ModelError(
                f"model {tenant.name!r} is reserved as {tenant.reserved.value}: release that first"
            )
        self._sharing.require_room(tenant, self._others(tenant))
        tenant.reserved = priority
        try:
            self._make_room(tenant, take_secondaries=False)
            tenant.runner.memory.load_all(self._pager.stream())
        except BaseException:
            tenant.reserved = None
            self.share_again()
            raise
        self._sharing.rank_evictions(self._by_use())

    def release_reservation(self, tenant: Tenant) -> None:
        """Take `reserve` back, if it was."""
        if tenant.reserved is not None:
            tenant.reserved = None
            self._sharing.rank_evictions(self._by_use())
            self.share_again()

    # ---- the cap -------------------------------------------------------------------------------

    def give_way(self, cap: int) -> None:
        """Have models hold no more than a cap.

        Raises
        ------
        CapExceededError
            If those in use, or what is protected, cannot; models have their shares again then.
        """
        try:
            self._sharing.give_way(cap, self._by_use())
        except CapExceededError:
            self.share_again()
            raise

    def share_again(self) -> None:
        """Give each model in use its share of what there is now, or leave it what it has."""
        for tenant in self._by_use():
            if tenant.in_use:
                with suppress(CapExceededError, Overtaken):
                    self._make_room(tenant, take_secondaries=False)
                return

    def _make_room(self, tenant: Tenant, *, take_secondaries: bool) -> None:
        self._sharing.make_room(tenant, self._others(tenant), take_secondaries=take_secondaries)
