"""The rows of one layer that are on the GPU: sinks, recent ring and resident slots."""

import torch

from .layout import KVLayout


class ResidentSet:
    """One buffer of slots and the maps that say which token each holds.

    slots [B, Hkv, sinks + recent + n_slots, row]: places [0, sinks) hold the
    first tokens, the next `recent` are a ring, the rest are given out by
    kernels/residency.py. slot_of_token and token_in_slot number the resident
    slots from 0; -1 means none.
    """

    def __init__(self, layout: KVLayout, device: torch.device) -> None:
        heads = (layout.batch, layout.kv_heads)
        self.sinks, self.recent = layout.sinks, layout.recent
        self.slots = torch.empty(
            (*heads, layout.fixed_slots + layout.slots, layout.row_elements),
            dtype=layout.dtype,
            device=device,
        )

        def integers(size: int, value: int) -> torch.Tensor:
            return torch.full((*heads, size), value, dtype=torch.int32, device=device)

        self.slot_of_token = integers(layout.capacity, -1)
        self.token_in_slot = integers(layout.slots, -1)
        self.stamps = integers(layout.slots, -1)
        self.hand = torch.zeros(heads, dtype=torch.int32, device=device)

    def clear(self) -> None:
        """Forget which rows are resident; their slots become free."""
        self.slot_of_token.fill_(-1)
        self.token_in_slot.fill_(-1)
        self.stamps.fill_(-1)
        self.hand.zero_()

    def clear_place(self, place: int) -> None:
        """Forget one sequence's rows."""
        for mapping in (self.slot_of_token, self.token_in_slot, self.stamps):
            mapping[place].fill_(-1)
        self.hand[place].zero_()

    def load_fixed(self, sequence: int, rows: torch.Tensor) -> None:
        """Fill one sequence's sinks and ring from its rows [Hkv, S, row] after prefill."""
        length = rows.shape[1]
        slots = self.slots[sequence]  # [Hkv, sinks + recent + n_slots, row]
        slots[:, : min(self.sinks, length)] = rows[:, : self.sinks]
        first = min(max(self.sinks, length - self.recent), length)
        positions = torch.arange(first, length, device=rows.device)
        slots[:, self.sinks + positions % self.recent] = rows[:, positions]
