"""Whether two ways to compute something are the same but for roundings."""

import torch

# To a few roundings of the type: the order of a sum may differ, the formula may not.
TRIAL_ROUNDINGS = 4


def agree(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether they differ by roundings only: of each number, or of the numbers' size (root mean square)."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    ours, theirs, tolerance = ours.float(), theirs.float(), TRIAL_ROUNDINGS * torch.finfo(ours.dtype).eps
    size = float(theirs.square().mean().sqrt())
    return torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * size)
