"""From the moments of one layer's queries and keys to its label maps.

Channels (Double Sparsity, arXiv 2408.07092 section 3): keep the R channels of a
KV head that carry most of q.k; both maps are rows of the identity.

Projection: keep R linear combinations instead. With centred keys k' = k - mean,
    q.k = q.mean + q.k',
and q.mean is the same for every key, so only q.k' has to be approximated, by
q^T M k' with M = A^T B of rank R, A the query map and B the key map [R, D]. For
q and k' drawn independently, with second moments Cq and Ck, the mean square error is
    E (q^T (I - M) k')^2 = tr((I - M)^T Cq (I - M) Ck) = |Cq^1/2 (I - M) F|^2,  Ck = F F^T.
By Eckart and Young the best Cq^1/2 M F is the truncated SVD of X = Cq^1/2 F = U S V^T
(any factor F of Ck gives the same M), which solves to
    M = F V S^-2 V^T F^T Cq      over the R largest singular values.
S and V come from the eigenvectors of X^T X = F^T Cq F = V S^2 V^T, so F may be the
Cholesky factor and neither a square root nor an inverse of Cq or Ck is formed. With
W = V^T F^T [R, D] the two maps are
    A = S^(a-1) W,   B = S^(-1-a) W Cq,   A^T B = M for every a,
and on the calibration tokens E (A q)(A q)^T = S^(2a), E (B k')(B k')^T = S^(2-2a).

Balance. Rounding a label to a step d adds d^2 tr(E (A q)(A q)^T) / 12 to the error of
a score. One scale a token makes d grow with the widest channel. After a rotation H
that spreads every direction evenly over the R channels (H^T H = I leaves A^T B alone)
all channels have the mean variance tr(S^(2-2a)) / R, and the error grows with
tr(S^(2-2a)) tr(S^(2a)), least at a = 1/2 (Cauchy-Schwarz), where it is tr(S)^2;
without rotation it is s_1 tr(S) at a = 1/2. Hence a = 1/2 and a rotation. It costs
nothing at run time; in attention mass found at 4 bits it moves less than 0.001
(bench/results/labels.json), because rounding is a small part of the whole error.

Greedy channels: keep R channels S of k' and let every query head's map be free. The
best linear guess of k' from k'_S is G k'_S with G = Ck[:, S] Ck[S, S]^-1 whatever Cq
is, so B picks S, A = G^T, and the mean square error is tr(Cq E) with the residual
    E = Ck - Ck[:, S] Ck[S, S]^-1 Ck[S, :].
Channels are taken one after another, each the one that lowers it most given those
already taken: adding c lowers it by E[:, c]^T Cq E[:, c] / E[c, c] (column subset
selection; orthogonal matching pursuit on the bilinear form).
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from .errors import UserError

# learned (calibration_learned.py) begins with the projection.
METHODS = ("projection", "channels", "channels-q", "channels-k", "greedy", "learned")
# Added to both moments, relative to their mean eigenvalue. Held-out mass is the same to 0.0002 for any ridge
# from 0 to 0.1 (bench/results/labels.json); this one keeps moments of fewer tokens than D factorisable.
RIDGE = 1e-3
# Numbers of queries that are made float64 together: 256 MB, all heads of a block of 1,024 tokens.
DOUBLES_AT_ONCE = 32 << 20
MOMENTS = ("query", "key", "key_sum", "products", "query_size", "key_size")  # the sums of LayerMoments


@dataclass
class LayerMoments:
    """Sums over the tokens seen so far of what either method needs, all float64.

    query and key [Hkv, D, D]: q q^T (summed over the group's heads too) and k k^T;
    key_sum [Hkv, D]; products, query_size and key_size [Hkv, D]: |q_c k_c| of a
    token's own query and key, |q_c| and |k_c|.
    """

    query: torch.Tensor
    key: torch.Tensor
    key_sum: torch.Tensor
    products: torch.Tensor
    query_size: torch.Tensor
    key_size: torch.Tensor
    tokens: int
    group: int

    @classmethod
    def of(cls, queries: torch.Tensor, keys: torch.Tensor) -> "LayerMoments":
        """Moments of queries [Hq, T, D] and keys [Hkv, T, D] after RoPE."""
        heads, tokens, dim = queries.shape
        kv_heads = keys.shape[0]
        grouped = queries.view(kv_heads, -1, tokens, dim)  # [Hkv, G, T, D]
        at_once = max(1, DOUBLES_AT_ONCE // grouped[0].numel())
        pairs = zip(grouped.split(at_once), keys.split(at_once), strict=True)
        sums = [cls._sums(some.double(), theirs.double()) for some, theirs in pairs]
        whole = [torch.cat(parts) for parts in zip(*sums, strict=True)]
        return cls(**dict(zip(MOMENTS, whole, strict=True)), tokens=tokens, group=heads // kv_heads)

    @staticmethod
    def _sums(queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Some KV heads: queries [H, G, T, D] and keys [H, T, D]."""
        flat = queries.flatten(1, 2)  # [H, G T, D]
        query_size, key_size = queries.abs().sum(1), keys.abs()  # [H, T, D]
        sizes = ((query_size * key_size).sum(1), query_size.sum(1), key_size.sum(1))
        return flat.mT @ flat, keys.mT @ keys, keys.sum(1), *sizes

    def add(self, other: "LayerMoments") -> None:
        for name in MOMENTS:
            getattr(self, name).add_(getattr(other, name))
        self.tokens += other.tokens

    def cpu(self) -> "LayerMoments":
        return replace(self, **{name: getattr(self, name).cpu() for name in MOMENTS})

    def maps(self, channels: int, method: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """query_map [Hq, R, D], key_map [Hkv, R, D], key_mean [Hkv, D], float32."""
        if method in ("projection", "learned", "greedy"):
            mean = self.key_sum / self.tokens
            query_moment = self.query / (self.tokens * self.group)
            make = greedy_maps if method == "greedy" else label_maps
            query_map, key_map = make(query_moment, self.key / self.tokens, mean, channels, self.group)
            return query_map, key_map, mean.float()
        measure = {"channels": self.products, "channels-q": self.query_size, "channels-k": self.key_size}
        key_map = channel_map(measure[method], channels)
        return key_map.repeat_interleave(self.group, 0), key_map, torch.zeros_like(key_map[:, 0])


def maps_of_layers(
    layers: Sequence[LayerMoments], channels: int, method: str
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """LayerMoments.maps of every layer, on the CPU: a layer a thread, each with one thread of its own.

    PyTorch's CUDA eigh takes matrices wider than 32 one after another (pytorch issues 174674 and
    175585: 500 of 100 x 100 in 914 ms, where LAPACK needs some 2 ms each on one core), and
    float64 is slow on most GPUs.
    """
    threads = torch.get_num_threads()
    workers = min(len(layers), os.cpu_count() or 1)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lambda moments: moments.cpu().maps(channels, method), layers))
    finally:
        torch.set_num_threads(threads)  # PyTorch keeps the last setting for threads to come


def calibrate_layer(
    queries: torch.Tensor, keys: torch.Tensor, channels: int, method: str = "projection"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Label maps of one layer from one stretch of tokens, on the device of the tensors.

    queries [Hq, T, D] and keys [Hkv, T, D] after RoPE, any T >= 1. Returns
    query_map [Hq, R, D], key_map [Hkv, R, D] and key_mean [Hkv, D], float32.
    UserError when R > D or the method is unknown.
    """
    check_request(channels, method, keys.shape[-1])
    return LayerMoments.of(queries, keys).maps(channels, method)


def check_request(channels: int, method: str, head_dim: int) -> None:
    if method not in METHODS:
        raise UserError(f"method is {method!r}; choose one of {', '.join(METHODS)}")
    if not 1 <= channels <= head_dim:
        raise UserError(f"label_channels is {channels} but head_dim is {head_dim}; choose 1 to {head_dim}")


def label_maps(
    query_moment: torch.Tensor,
    key_moment: torch.Tensor,
    key_mean: torch.Tensor,
    channels: int,
    group: int,
    ridge: float = RIDGE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The projection of one layer: query_map [Hkv * group, R, D] and key_map [Hkv, R, D], float32.

    query_moment and key_moment [Hkv, D, D]: E q q^T and E k k^T (about zero);
    key_mean [Hkv, D]. Computed in float64 on their device. Directions without
    any signal get zero weight, so R may exceed the rank.
    """
    mean = key_mean.double()
    centred = key_moment.double() - mean[:, :, None] * mean[:, None, :]
    cq, ck = with_ridge(query_moment.double(), ridge), with_ridge(centred, ridge)
    factor = torch.linalg.cholesky(ck)  # [Hkv, D, D] lower, ck = factor factor^T
    squares, vectors = torch.linalg.eigh(factor.mT @ cq @ factor)  # ascending
    squares = squares[:, -channels:].clamp_min(0)
    s = squares.sqrt()[:, :, None]  # [Hkv, R, 1]
    w = vectors[:, :, -channels:].mT @ factor.mT  # [Hkv, R, D]
    floor = s.amax(1, keepdim=True) * 1e-9  # about the square root of float64's rounding
    inverse = torch.where(s > floor, 1 / s, 0)
    rotation = spread(channels).to(s)
    query_map = rotation @ (inverse.sqrt() * w)
    key_map = rotation @ (inverse**1.5 * (w @ cq))
    return query_map.float().repeat_interleave(group, 0), key_map.float()


def greedy_maps(
    query_moment: torch.Tensor,
    key_moment: torch.Tensor,
    key_mean: torch.Tensor,
    channels: int,
    group: int,
    ridge: float = RIDGE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels chosen greedily, with a least-squares query map; arguments and shapes as in label_maps."""
    mean = key_mean.double()
    centred = key_moment.double() - mean[:, :, None] * mean[:, None, :]
    cq, ck = with_ridge(query_moment.double(), ridge), with_ridge(centred, ridge)
    pairs = [greedy_head(cq[h], ck[h], channels) for h in range(len(ck))]
    query_map, key_map = (torch.stack(parts).float() for parts in zip(*pairs, strict=True))
    return query_map.repeat_interleave(group, 0), key_map


def greedy_head(cq: torch.Tensor, ck: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One KV head's query map and key map [R, D] from its moments [D, D]."""
    residual, chosen = ck.clone(), torch.zeros(len(ck), dtype=torch.bool, device=ck.device)
    for _ in range(channels):
        variance = residual.diagonal().clamp_min(1e-30)  # the ridge keeps those not taken above 0
        gain = (residual * (cq @ residual)).sum(0) / variance  # [D]
        best = int(gain.masked_fill(chosen, -1.0).argmax())
        column = residual[:, best].clone()
        residual -= column[:, None] * column / column[best]
        chosen[best] = True
    taken = chosen.nonzero()[:, 0]  # ascending
    guess = torch.linalg.solve(ck[taken][:, taken], ck[taken])  # G^T: [R, D]
    return guess, torch.nn.functional.one_hot(taken, len(ck)).double()


def with_ridge(moment: torch.Tensor, ridge: float) -> torch.Tensor:
    """moment [Hkv, D, D] plus ridge times its mean eigenvalue; the least double for an all-zero one."""
    mean_eigenvalue = moment.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)  # [Hkv]
    identity = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    return (moment + moment.mT) / 2 + ridge * mean_eigenvalue[:, None, None] * identity


def spread(size: int) -> torch.Tensor:
    """An orthogonal [size, size] float64 matrix that mixes all directions evenly.

    Hadamard (Sylvester) where size is a power of two: every entry is +-1/sqrt(size).
    Otherwise the Hartley matrix, which exists for every size.
    """
    if size & (size - 1):
        index = torch.arange(size, dtype=torch.float64)
        angle = 2 * torch.pi * index[:, None] * index / size
        return (angle.cos() + angle.sin()) / size**0.5
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def channel_map(measure: torch.Tensor, channels: int) -> torch.Tensor:
    """Rows of the identity [Hkv, R, D] for the R largest entries of measure [Hkv, D], ascending."""
    chosen = measure.topk(channels, -1).indices.sort(-1).values  # [Hkv, R]
    return torch.nn.functional.one_hot(chosen, measure.shape[-1]).float()
