"""What is measured on a model: its loss on held-out text, and the speed and memory of decoding."""

import math
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.arena.records import DecodeTiming
from subquad.models import SubquadCache, SubquadForCausalLM
from subquad.train import TrainConfig, autocast_dtype, token_losses
from subquad.train.data import Tokens, heldout_starts

PREFILL_CHUNK = 512
DECODE_WARM_UP = 5
DECODE_STEPS = 40


@torch.inference_mode()
def heldout_windows(
    model: SubquadForCausalLM, heldout: Tokens, config: TrainConfig, tokens: int
) -> tuple[list[float], list[int]]:
    """Bits that the model needs for each held-out window, and the bytes of text in it.

    The windows are spread evenly over the held-out text, `tokens` tokens in all; every model given
    the same arguments sees the same ones. Precision is that of training.
    """
    model.eval()
    dtype = autocast_dtype(config, model.device)
    bits: list[float] = []
    sizes: list[int] = []
    starts = heldout_starts(heldout, config.seq_len, tokens)
    for first in range(0, len(starts), config.batch_size):
        windows = starts[first : first + config.batch_size]
        inputs, targets, _ = heldout.windows(windows, config.seq_len)
        with torch.autocast(model.device.type, dtype, enabled=dtype is not None):
            losses = token_losses(model, inputs.to(model.device), targets.to(model.device))
        nats = losses.double().view(len(windows), -1).sum(-1)
        bits += (nats / math.log(2)).tolist()
        sizes += [int(heldout.byte_counts[w + 1 : w + 1 + config.seq_len].sum()) for w in windows]
    return bits, sizes


@torch.inference_mode()
def decode_timings(
    model: SubquadForCausalLM,
    tokens: Tensor,
    contexts: Sequence[int],
) -> list[DecodeTiming]:
    """Time single-token steps of one sequence at each context length.

    The cache is filled once, in chunks, and continues from context to context: the tokens decoded
    while timing one context are part of the next. The cache is weighed when it holds `context`
    tokens exactly; the steps timed then read between `context` and `context` + 45 tokens.

    Args:
        model: the model; it is put in eval mode.
        tokens: [n] int64, repeated as often as the longest context needs.
        contexts: increasing.

    Returns:
        One DecodeTiming a context, in order.
    """
    model.eval()
    needed = max(contexts)
    stream = tokens.repeat(-(-needed // len(tokens)))[:needed].to(model.device)[None]
    cache: SubquadCache | None = None
    length, prefill_seconds, timings = 0, 0.0, []
    for context in contexts:
        if context <= length:
            raise ValueError(
                f"contexts must lie more than {DECODE_WARM_UP + DECODE_STEPS} tokens apart, so "
                f"that timing one does not run into the next; got {list(contexts)}"
            )
        begin = _now(model.device)
        for start in range(length, context, PREFILL_CHUNK):
            chunk = stream[:, start : min(start + PREFILL_CHUNK, context)]
            output = model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
        prefill_seconds += _now(model.device) - begin
        assert cache is not None  # context > length, so at least one chunk was read
        cache_bytes = cache.nbytes
        seconds = _step_seconds(model, cache, output.logits[:, -1].argmax(-1, keepdim=True))
        length = context + len(seconds)
        low, median, high = statistics.quantiles(seconds[DECODE_WARM_UP:], n=4)
        timings.append(DecodeTiming(context, median, low, high, prefill_seconds, cache_bytes))
    return timings


def _step_seconds(model: SubquadForCausalLM, cache: SubquadCache, token: Tensor) -> list[float]:
    """Seconds of each greedy step, the warm-up included. Moves the cache on."""
    seconds = []
    for _ in range(DECODE_WARM_UP + DECODE_STEPS):
        begin = _now(model.device)
        output = model(token, past_key_values=cache, use_cache=True)
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        seconds.append(_now(model.device) - begin)
    return seconds


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
