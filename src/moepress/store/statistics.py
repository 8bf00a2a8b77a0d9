"""What the store of a model did."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

from torch import nn

from moepress.byte_units import size_text
from moepress.kernels.cpu.expert_store import ExpertStore, StoreCounts
from moepress.kernels.modules import PackedExperts


@dataclass(frozen=True)
class Statistics:
    """Counts of a store, since it was opened or between two moments."""

    counts: StoreCounts

    @property
    def hit_rate(self) -> float | None:
        """Share of the experts needed that were in memory when they were needed."""
        return self.counts.hits / self.counts.uses if self.counts.uses else None

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes read per token that passed the model."""
        return self.counts.bytes_read / self.counts.tokens if self.counts.tokens else None

    def since(self, earlier: Self) -> Statistics:
        """What happened after `earlier`."""
        before, now = asdict(earlier.counts), asdict(self.counts)
        changed = {name: now[name] - before[name] for name in now}
        return Statistics(StoreCounts(**changed | {"bytes_held": now["bytes_held"]}))

    def to_dict(self) -> dict[str, Any]:
        return {
            "hit_rate": self.hit_rate,
            "bytes_per_token": self.bytes_per_token,
            **asdict(self.counts),
        }

    def __str__(self) -> str:
        if self.hit_rate is None or self.bytes_per_token is None:
            return "no expert was needed"
        return (
            f"{self.hit_rate:.0%} of the experts in memory, "
            f"{size_text(self.bytes_per_token)} read per token"
        )


def store_of(model: nn.Module) -> ExpertStore | None:
    """The store that a model's experts come from; None: they are in memory."""
    for module in model.modules():
        if isinstance(module, PackedExperts) and module.stored is not None:
            store = module.stored.store
            assert isinstance(store, ExpertStore)
            return store
    return None


def statistics(model: nn.Module) -> Statistics | None:
    """What a model's store did since it was opened; None: its experts are in memory."""
    store = store_of(model)
    return None if store is None else Statistics(store.counts())
