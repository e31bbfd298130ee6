"""The decode loop: prefill in pieces, then one token at a time, text as soon as it is whole."""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from subquad.errors import fail, is_whole
from subquad.generate.sample import draw
from subquad.generate.text import TextPieces, texts
from subquad.models import SubquadForCausalLM

_PREFILL = 2048  # tokens of the prompt per pass: bounds the memory that a long prompt takes


def stream(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int | None = None,
    past_key_values: Any = None,
) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece; the pieces joined are the whole text.

    Stops at `max_new_tokens` or at the tokenizer's end of text. Characters that several tokens
    make up come out whole; bytes that are no UTF-8 as U+FFFD. See `generate_tokens` for the rest.
    """
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    if not ids and past_key_values is None:
        ids = _first_id(tokenizer)
    end = tokenizer.eos_token_id
    tokens = generate_tokens(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_ids=() if end is None else (end,),
        past_key_values=past_key_values,
    )
    return texts(tokens, TextPieces(tokenizer))


def generate_tokens(
    model: Any,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int | None = None,
    stop_ids: Sequence[int] = (),
    past_key_values: Any = None,
) -> Iterator[int]:
    """Yield new token ids after the prompt `ids`; works with any causal model of transformers.

    Nothing is kept but the model's cache, so with linear-time rows memory does not grow. A seed
    makes the draw repeatable; None draws afresh. A token of `stop_ids` ends it, unyielded.

    Args:
        past_key_values: the cache of what was read before, which `ids` continue. It is moved on in
            place: whenever a token has been yielded, it holds the prompt and all tokens up to that
            one, so that a conversation can continue with the same cache.

    Raises ValueError: an empty prompt, max_new_tokens < 0, temperature < 0 or infinite, top_p
    outside [0, 1]; on the CPU also for a model whose logits are no numbers.
    """
    prompt = _check_prompt(ids)
    _check_settings(max_new_tokens, temperature, top_p)
    options = (max_new_tokens, temperature, top_p, seed)
    if past_key_values is not None:
        return _continue(model, prompt, past_key_values, frozenset(stop_ids), *options)
    return _decode(model, prompt, frozenset(stop_ids), *options)


def generate_batch(
    model: Any,
    ids: torch.Tensor | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop_ids: Sequence[int] = (),
) -> torch.Tensor:
    """New tokens [B, n <= max_new_tokens] after prompts ids, sequence by sequence.

    The plain loop that `model.generate` is around a batch: draw, step. On a GPU no token waits for
    the host, and a model of ours whose states have a constant size runs its steps as a CUDA graph.
    A sequence that draws one of `stop_ids` is filled with it from there on; all stopped end it.

    Args:
        ids: [B,T], or a list of B prompts; for our own models of any lengths.

    Raises ValueError as `generate_tokens`.
    """
    prompts, mask = _check_prompts(model, ids)
    _check_settings(max_new_tokens, temperature, top_p)
    steps = _steps(model, prompts, mask, max_new_tokens, temperature, top_p, seed)
    stops, columns, held = frozenset(stop_ids), [], [None] * len(prompts)
    for drawn in steps:
        column = [token if stop is None else stop for token, stop in zip(drawn.tolist(), held)]
        columns.append(column)
        held = [token if token in stops else None for token in column]
        if None not in held:
            break
    return (
        torch.tensor(columns, dtype=torch.int64, device=prompts.device).reshape(-1, len(prompts)).T
    )


def _decode(
    model: Any,
    ids: list[int],
    stop_ids: frozenset[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
) -> Iterator[int]:
    prompt = torch.tensor([ids], device=_device(model))
    for drawn in _steps(model, prompt, None, max_new_tokens, temperature, top_p, seed):
        token = int(drawn[0])
        if token in stop_ids:
            return
        yield token


@torch.inference_mode()
def _continue(
    model: Any,
    ids: list[int],
    cache: Any,
    stop_ids: frozenset[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
) -> Iterator[int]:
    """Each token is read into the cache before it is yielded, and a stop never is: the cache is
    somebody's, who looks at it between two tokens, or when there are enough."""
    generator = _generator(_device(model), seed)
    output = _prefill(model, torch.tensor([ids], device=_device(model)), None, cache)
    for _ in range(max_new_tokens):
        logits = output.logits[:, -1]
        if logits.is_cpu:
            _check_finite(logits)
        token = draw(logits, temperature=temperature, top_p=top_p, generator=generator)
        if int(token) in stop_ids:
            return
        output = model(token[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        yield int(token)


@torch.inference_mode()
def _steps(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
) -> Iterator[torch.Tensor]:
    """The tokens [B] drawn, on the CPU, step by step.

    A GPU gets the next step before anybody looks at this one's tokens: it never waits for them to
    be read, and reading never waits for more than them. The price is a step too many at a stop.
    """
    if not max_new_tokens:
        return
    ids = ids.to(_device(model))
    generator = _generator(ids.device, seed)
    options = {"replay": True} if isinstance(model, SubquadForCausalLM) else {"logits_to_keep": 1}
    output = _prefill(model, ids, mask, None)
    cache = output.past_key_values
    for left in reversed(range(max_new_tokens)):
        logits = output.logits[:, -1]
        if logits.is_cpu:  # elsewhere somebody would have to wait for the answer
            _check_finite(logits)
        tokens = draw(logits, temperature=temperature, top_p=top_p, generator=generator)
        read = _reading(tokens)
        step = partial(model, tokens[:, None], past_key_values=cache, use_cache=True, **options)
        if left and tokens.is_cuda:
            output = step()
        yield read()
        if left and not tokens.is_cuda:
            output = step()


def _prefill(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, cache: Any) -> Any:
    """Read the prompts [B,T] piece by piece; the output after the last, its cache included."""
    output: Any = None
    for start in range(0, ids.shape[1], _PREFILL):
        piece = slice(start, start + _PREFILL)
        masked = {} if mask is None else {"attention_mask": mask[:, piece].to(ids.device)}
        output = model(
            input_ids=ids[:, piece],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **masked,
        )
        cache = output.past_key_values
    return output


def _generator(device: torch.device, seed: int | None) -> torch.Generator:
    generator = torch.Generator(device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    return generator


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


def _reading(tokens: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start bringing tokens to the CPU; what is returned waits for them, and for nothing later."""
    if not tokens.is_cuda:
        return lambda: tokens
    there = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    there.copy_(tokens, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tokens.device))  # not the current device's

    def read() -> torch.Tensor:
        arrived.synchronize()
        return there

    return read


def _first_id(tokenizer: Any) -> list[int]:
    """What to start from when there is no prompt: what stands between documents in training."""
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token is not None:
            return [token]
    return []


def _check_prompt(ids: Any) -> list[int]:
    """The ids of one prompt as integers."""
    prompt = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    try:
        prompt = [operator.index(token) for token in prompt]
    except TypeError:
        got = f"a {type(ids).__name__} that is no flat list of integers"
        fix = "generate_batch takes several prompts"
        raise fail("ids", got, "the tokens of one prompt", fix) from None
    if not prompt:
        raise fail("ids", "an empty prompt", "at least one token", "begin with bos or eos")
    return prompt


def _check_prompts(model: Any, ids: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompts [B,T] that end together, and where they are real, if not everywhere."""
    if isinstance(ids, torch.Tensor):
        if ids.ndim != 2 or ids.numel() == 0 or ids.is_floating_point():
            got = f"{ids.dtype} of shape {tuple(ids.shape)}"
            raise fail("ids", got, "integers [B, T], neither empty", "pass a list of prompts")
        return ids, None
    rows = [torch.tensor(_check_prompt(row)) for row in ids]
    if not rows:
        raise fail("ids", "no prompt", "at least one", "pass a list of prompts")
    longest = max(map(len, rows))
    if all(len(row) == longest for row in rows):
        return torch.stack(rows), None
    if not isinstance(model, SubquadForCausalLM):
        got = f"prompts of {sorted({len(row) for row in rows})} tokens"
        raise fail("ids", got, "prompts of one length for this model", "use model.generate")
    padded = [F.pad(row, (longest - len(row), 0)) for row in rows]
    real = [F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows]
    return torch.stack(padded), torch.stack(real)


def _check_finite(logits: torch.Tensor) -> None:
    """A draw would make tokens of NaN, too. (-inf is fine: it rules a token out.)"""
    if not bool(logits.amax(-1).isfinite().all()):
        got, fix = "logits that are no finite numbers", "train it at a lower rate"
        raise fail("model", got, "numbers", fix)


def _check_settings(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if not is_whole(max_new_tokens, 0):
        raise fail("max_new_tokens", repr(max_new_tokens), "an integer, 0 or more", "count tokens")
    if not 0 <= temperature < math.inf:
        expected = "0 (the likeliest token) or a number above"
        raise fail("temperature", repr(temperature), expected, "1 draws as the model was trained")
    if not 0 <= top_p <= 1:
        raise fail("top_p", repr(top_p), "a probability from 0 to 1", "1 draws among all tokens")
