"""The rows of one layer that are on the GPU: sinks, recent ring and resident slots."""

import torch

from .layout import KVLayout


class ResidentSet:
    """One buffer of slots and the maps that say which token each holds.

    slots [B, Hkv, sinks + recent + n_slots, row]: places [0, sinks) hold the
    first tokens, the next `recent` are a ring, the rest are given out by
    kernels/residency.py. slot_of_token and token_in_slot number the resident
    slots from 0; -1 means none.

    The slots exist from their first use until release(): a long prefill takes
    their memory for its own work (at a budget of 1/16 of 262,144 tokens they are
    4.3 GB in the Llama-3.1-8B shape).
    """

    def __init__(self, layout: KVLayout, device: torch.device) -> None:
        heads = (layout.batch, layout.kv_heads)
        self.sinks, self.recent = layout.sinks, layout.recent
        self.shape = (*heads, layout.fixed_slots + layout.slots, layout.row_elements)
        self.dtype, self.device = layout.dtype, device
        self._slots: torch.Tensor | None = None
        self._waiting: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of each sequence: places, rows

        def integers(size: int, value: int) -> torch.Tensor:
            return torch.full((*heads, size), value, dtype=torch.int32, device=device)

        self.slot_of_token = integers(layout.capacity, -1)
        self.token_in_slot = integers(layout.slots, -1)
        self.stamps = integers(2 * layout.slots, -1).view(*heads, layout.slots, 2)  # attended, predicted
        self.hand = torch.zeros(heads, dtype=torch.int32, device=device)

    @property
    def maps(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """As the kernels take them."""
        return self.slot_of_token, self.token_in_slot, self.stamps, self.hand

    @property
    def slots(self) -> torch.Tensor:
        """[B, Hkv, places, row]; the same tensor until release()."""
        if self._slots is None:
            self._slots = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            for sequence, (places, rows) in self._waiting.items():
                self._slots[sequence][:, places] = rows
            self._waiting.clear()
        return self._slots

    def release(self) -> None:
        """Free the slots and forget what is in them; a captured graph that uses them is void."""
        self._slots = None
        self.clear()

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
        self._waiting.pop(place, None)

    def load_fixed(self, sequence: int, rows: torch.Tensor) -> None:
        """Fill one sequence's sinks and ring from its rows [Hkv, S, row] after prefill.

        They are kept aside while there are no slots.
        """
        length = rows.shape[1]
        first = min(max(self.sinks, length - self.recent), length)
        sinks = torch.arange(min(self.sinks, length), device=rows.device)
        latest = torch.arange(first, length, device=rows.device)
        positions = torch.cat([sinks, latest])
        places = torch.cat([sinks, self.sinks + latest % self.recent])
        if self._slots is None:
            self._waiting[sequence] = places, rows[:, positions]  # [Hkv, sinks + recent, row]
        else:
            self._slots[sequence][:, places] = rows[:, positions]
