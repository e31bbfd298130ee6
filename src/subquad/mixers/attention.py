"""Softmax attention, over everything or a window: what linear time is measured against.

B batch   T new tokens   S remembered and new tokens   H query heads   Hk key heads   D head size
"""

from collections.abc import Iterator
from itertools import accumulate, islice, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.engines.runtime.eager import is_plain
from subquad.engines.runtime.validation import check_shape
from subquad.errors import fail
from subquad.layers.growing import append, end_together
from subquad.layers.projection import project
from subquad.layers.rotary import angles, positions, rotate_halves
from subquad.mixers.base import Mixer, State, check_positive_integers, divide

_QUERY_BLOCK = 512  # queries that share a mask: bounds its memory to 512 x S for any T


class SoftmaxAttention(Mixer):
    """Grouped-query attention with rotary positions, as in Llama.

        o_t = sum_{s <= t} softmax_s(q_t . k_s / sqrt(D)) v_s

    Vaswani et al. 2017 (arXiv:1706.03762, eq. 1), heads that share keys from Ainslie et al. 2023
    (arXiv:2305.13245), positions from Su et al. 2021 (arXiv:2104.09864, eq. 34).

    The state grows with the sequence: keys (rotated) and values [B,S,Hk,D], length [B] int64.
    Sequences of different lengths end together: the tokens of sequence b are its last length[b]
    slots, so that adding a token is the same concatenation for all.

    Args:
        hidden_size: width of the input and output.
        num_heads: query heads; by default one for each 64 channels.
        num_kv_heads: key and value heads, a divisor of num_heads (its default).
        head_dim: even size of a head; hidden_size / num_heads by default.
        rope_theta: the longest wavelength of the rotations over 2 pi.
        qkv_bias: whether the projections to queries, keys and values have a bias (Qwen2's do).
    """

    row = "softmax_attention"
    state_names = ("keys", "values", "length")
    growing = ("keys", "values")
    writes_state_in_place = True
    window: int | None = None

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float = 10_000.0,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__(
            hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
        )
        self.num_heads = max(1, hidden_size // 64) if num_heads is None else num_heads
        self.num_kv_heads = self.num_heads if num_kv_heads is None else num_kv_heads
        divide(self.num_heads, self.num_kv_heads, "num_heads", "num_kv_heads")
        if head_dim is None:
            head_dim = divide(hidden_size, self.num_heads, "hidden_size", "num_heads")
        if head_dim % 2:
            raise fail("head_dim", head_dim, "an even number to rotate in pairs", "pass head_dim")
        self.head_dim = head_dim
        self.rope_theta = rope_theta
        heads = self.num_heads + 2 * self.num_kv_heads
        self.qkv_proj = nn.Linear(hidden_size, heads * head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(self.num_heads * head_dim, hidden_size, bias=False)
        self.reset_parameters()

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        past = self.check_inputs(x, state, cu_seqlens)
        H, Hk, D = self.num_heads, self.num_kv_heads, self.head_dim
        for name in ("keys", "values"):
            if past:
                shape = (*past["keys"].shape[:2], Hk, D)
                check_shape(f"state[{name!r}]", past[name], shape, "[B,S,Hk,D]")

        position, length = positions(past.get("length"), x, cu_seqlens)
        inverse = self.rope_theta ** -(torch.arange(0, D, 2, device=x.device) / D)
        qkv = project(self.qkv_proj, x).unflatten(-1, (H + 2 * Hk, D))  # [B,T,H+2Hk,D]
        qk, v = qkv.split((H + Hk, Hk), dim=2)
        q, k = rotate_halves(qk, *angles(position, inverse)).split((H, Hk), dim=2)

        if cu_seqlens is None:
            past, first = _slots_in_use(past)
            o, keys, values = self._attend(q, k, v, past, first)
            if x.shape[0] == 1 and first is None and not torch.compiler.is_compiling():
                keys._filled = True  # type: ignore[attr-defined]
        else:
            o, keys, values = self._attend_packed(q, k, v, past, cu_seqlens)
        return project(self.o_proj, o.flatten(-2)), {
            "keys": keys,
            "values": values,
            "length": length,
        }

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, past: State, first: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sequences with T new tokens each: outputs, and the keys and values to remember.

        first: [B], each sequence's first slot in use; None when all are.
        """
        T = q.shape[1]
        fresh = not past
        keys = k.contiguous() if fresh else append(past["keys"], k)
        values = v.contiguous() if fresh else append(past["values"], v)
        if fresh and (self.window is None or self.window >= T):
            o = _sdpa(q, keys, values, is_causal=True)
        elif T == 1 and first is None:  # the only query sees all slots
            o = _sdpa(q, keys, values)
        else:
            o = _sdpa_by_blocks(q, keys, values, self.window, first)
        return o, self._remember(keys), self._remember(values)

    def _attend_packed(
        self, q: Tensor, k: Tensor, v: Tensor, past: State, cu_seqlens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sequences end to end: each is attended on its own, exactly as if alone."""
        results = []
        for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            own: State = {}
            if past:
                empty = max(0, past["keys"].shape[1] - int(past["length"][n]))
                own = {name: past[name][n : n + 1, empty:] for name in ("keys", "values")}
            new = slice(start, end)
            results.append(self._attend(q[:, new], k[:, new], v[:, new], own, None))
        o, keys, values = zip(*results)
        return torch.cat(o, dim=1), end_together(keys), end_together(values)

    def _remember(self, slots: Tensor) -> Tensor:
        """What of the slots [B,S,Hk,D] a later token can still see."""
        if self.window is None or slots.shape[1] < self.window:
            return slots
        # a copy, so that the forgotten slots are freed
        return slots[:, slots.shape[1] - self.window + 1 :].clone()


class SlidingWindowAttention(SoftmaxAttention):
    """Softmax attention to the last `window` tokens, the current one among them.

    Child et al. 2019 (arXiv:1904.10509); Mistral 7B (arXiv:2310.06825, section 2). Time is
    T x window, and the state keeps at most the window - 1 keys that the next token still sees.

    Args:
        window: how many tokens a query sees, itself included.
        hidden_size, options: as SoftmaxAttention's.
    """

    row = "sliding_window_attention"
    writes_state_in_place = True

    def __init__(self, hidden_size: int, *, window: int = 256, **options: object) -> None:
        check_positive_integers(window=window)
        super().__init__(hidden_size, **options)  # type: ignore[arg-type]
        self.window = window


def _slots_in_use(past: State) -> tuple[State, Tensor | None]:
    """The state, and each sequence's first slot in use [B]; None if all are.

    A mask of the empty ones would take a single row the fastest kernels, so its empty slots are cut
    off. It has some if it comes out of a batch of unequal rows. To know, the row's length is looked
    at, which a GPU must wait for: once, since what we return from there on bears a mark.
    """
    if not past:
        return past, None
    keys, length = past["keys"], past["length"]
    if keys.shape[0] > 1 or not _can_look(length):
        return past, keys.shape[1] - length
    empty = 0 if getattr(keys, "_filled", False) else max(0, keys.shape[1] - int(length))
    if empty:
        past = {**past, "keys": keys[:, empty:], "values": past["values"][:, empty:]}
    return past, None


def _can_look(length: Tensor) -> bool:
    """At its value: not where operations are traced, or captured."""
    capturing = length.is_cuda and torch.cuda.is_current_stream_capturing()
    return is_plain((length,)) and not length.is_meta and not capturing


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """torch's attention in this library's layout: q [B,T,H,D], k, v [B,S,Hk,D] -> [B,T,H,D]."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=grouped)
    return o.transpose(1, 2)


def _sdpa_by_blocks(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, first: Tensor | None
) -> Tensor:
    """Causal attention of the last T of S slots, without ever holding a T x S mask.

    A block of queries reads only the slots that some of them see: everything before their end,
    or, with a window, little more than their own block and the one before.

    Args:
        window: how many slots a query sees, its own included; None for all before it.
        first: [B], each sequence's first slot in use; None when all are.
    """
    T, S = q.shape[1], k.shape[1]
    size = _QUERY_BLOCK if window is None else min(max(window, 64), _QUERY_BLOCK)
    queries = q.split(size, dim=1)
    sizes = [S - T, *(block.shape[1] for block in queries)]
    outputs, end = [], S - T
    for query, key, value in zip(queries, _seen(k, sizes, window), _seen(v, sizes, window)):
        start, end = end, end + query.shape[1]
        position = torch.arange(start, end, device=q.device)[:, None]
        slot = torch.arange(end - key.shape[1], end, device=q.device)
        visible = slot <= position
        if window is not None:
            visible &= slot > position - window
        mask = visible[None, None]  # [1,1,block,slots]
        if first is not None:
            mask = mask & (slot >= first[:, None, None, None])  # [B,1,block,slots]
        outputs.append(_sdpa(query, key, value, mask))
    return torch.cat(outputs, dim=1)


def _seen(x: Tensor, sizes: list[int], window: int | None) -> Iterator[Tensor]:
    """For each block of queries the slots [B,_,Hk,D] that some of them see; its own are the last.

    Args:
        sizes: how many slots are before the first block, and then in each block.
    """
    parts, ends = x.split(sizes, dim=1), accumulate(sizes)
    for n, end in islice(enumerate(ends), 1, None):
        if window is None or len(parts) == 2:
            yield x[:, :end]
        else:  # not a slice: the gradients of slices would each be a tensor of T slots, T^2 in sum
            back = -(-(window - 1) // sizes[1])
            yield torch.cat(parts[max(0, n - back) : n + 1], dim=1)
