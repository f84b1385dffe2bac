"""One model that a manager has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.loading.binding import Binding
from penstock.loading.layout import Reserved
from penstock.loading.moving import Origin
from penstock.run.runner import Runner
from penstock.sharing.tenant import Tenant

__all__ = ["RegisteredModel"]


@dataclass
class RegisteredModel:
    """One registered model."""

    binding: Binding
    tenant: Tenant | None  # what runs it, and its memory; None where it has no weights
    acquired: int = 0
    origin: Origin | None = None  # where the tensors of an adopted model were
    beside: Sequence[Reserved] = ()  # on its memory, behind its weights

    @property
    def runner(self) -> Runner | None:
        """What runs it, if it has weights."""
        return self.tenant.runner if self.tenant else None
