"""The decode loop: prefill in pieces, then one token at a time, text as soon as it is whole."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from subquad.errors import fail
from subquad.generate.sample import draw
from subquad.models import SubquadForCausalLM

_PREFILL = 2048  # tokens of the prompt per pass: bounds the memory that a long prompt takes
_PATIENCE = 8  # tokens to wait for the rest of a character
_UNFINISHED = 3  # bytes, so at most as many tokens, of a character that is not whole yet


def stream(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int | None = None,
) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece; the pieces joined are the whole text.

    Stops at `max_new_tokens` or at the tokenizer's end of text. Characters that several tokens
    make up come out whole; bytes that are no UTF-8 as U+FFFD. See `generate_tokens` for the rest.
    """
    ids = tokenizer.encode(prompt, add_special_tokens=False) or _first_id(tokenizer)
    end = tokenizer.eos_token_id
    tokens = generate_tokens(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_ids=() if end is None else (end,),
    )
    yield from _texts(tokens, TextPieces(tokenizer))


def generate_tokens(
    model: Any,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int | None = None,
    stop_ids: Sequence[int] = (),
) -> Iterator[int]:
    """Yield new token ids after the prompt `ids`; works with any causal model of transformers.

    Nothing is kept but the model's cache, so with linear-time rows memory does not grow. A seed
    makes the draw repeatable; None draws afresh. A token of `stop_ids` ends it, unyielded.

    Raises ValueError: an empty prompt, max_new_tokens < 0, temperature < 0, top_p outside [0, 1];
    on the CPU also for a model whose logits are no numbers.
    """
    _check(len(ids) > 0, "ids", "an empty prompt", "at least one token, such as bos")
    _check_settings(max_new_tokens, temperature, top_p)
    return _decode(model, ids, max_new_tokens, temperature, top_p, seed, frozenset(stop_ids))


def generate_batch(
    model: Any,
    ids: torch.Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop_ids: Sequence[int] = (),
) -> torch.Tensor:
    """New tokens [B, n <= max_new_tokens] after prompts ids [B,T] of one length, row by row.

    The plain loop that `model.generate` is around a batch: draw, step. On a GPU no token waits for
    the host, and a model of ours whose states have a constant size runs its steps as a CUDA graph.
    A row that draws one of `stop_ids` is filled with it from there on; all rows stopped end it.

    Raises ValueError as `generate_tokens`.
    """
    _check(ids.ndim == 2 and ids.numel() > 0, "ids", tuple(ids.shape), "[B, T], neither empty")
    _check_settings(max_new_tokens, temperature, top_p)
    steps = _steps(model, ids, max_new_tokens, temperature, top_p, seed)
    stops, columns, held = frozenset(stop_ids), [], [None] * len(ids)
    for drawn in steps:
        column = [token if stop is None else stop for token, stop in zip(drawn.tolist(), held)]
        columns.append(column)
        held = [token if token in stops else None for token in column]
        if None not in held:
            break
    return torch.tensor(columns, dtype=torch.int64, device=ids.device).reshape(-1, len(ids)).T


def _decode(
    model: Any,
    ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    stop_ids: frozenset[int],
) -> Iterator[int]:
    device = next(model.parameters()).device
    prompt = torch.tensor([list(ids)], device=device)
    for drawn in _steps(model, prompt, max_new_tokens, temperature, top_p, seed):
        token = int(drawn[0])
        if token in stop_ids:
            return
        yield token


@torch.inference_mode()
def _steps(
    model: Any,
    ids: torch.Tensor,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
) -> Iterator[torch.Tensor]:
    """The tokens [B] drawn, on the CPU, step by step.

    A GPU gets the next step before anybody looks at this one's tokens: it never waits for them to
    be read, and reading never waits for more than them. The price is a step too many at a stop.
    """
    ids = ids.to(next(model.parameters()).device)
    generator = torch.Generator(ids.device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    options = {"replay": True} if isinstance(model, SubquadForCausalLM) else {"logits_to_keep": 1}
    output: Any = None
    cache = None
    for piece in torch.split(ids, _PREFILL, dim=1) if max_new_tokens else ():
        output = model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
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


class TextPieces:
    """Turns token ids into text as they come, holding back what is not yet a whole character."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.spoken: list[int] = []  # the ids last turned into text: they decide on spaces
        self.held: list[int] = []

    def push(self, token: int) -> str:
        """The text that became certain with this token, perhaps none."""
        self.held.append(token)
        text = self._held_text()
        if not text.endswith("\ufffd"):
            return self._speak(text, len(self.held))
        if len(self.held) < _PATIENCE:
            return ""
        # These bytes are no UTF-8. But the last may begin a character: what lies further back than
        # one can reach is certain, if the cut is not through a character itself.
        for count in range(len(self.held) - _UNFINISHED, 0, -1):
            certain = self._held_text(count)
            if text.startswith(certain):
                return self._speak(certain, count)
        return self._speak(text, len(self.held))

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        return self._speak(self._held_text(), len(self.held)) if self.held else ""

    def _held_text(self, count: int | None = None) -> str:
        """Of all that is held, or of the first `count`."""
        before = self._decode(self.spoken)
        return self._decode(self.spoken + self.held[:count])[len(before) :]

    def _speak(self, text: str, count: int) -> str:
        self.spoken, self.held = self.held[:count], self.held[count:]
        return text

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


def _texts(tokens: Iterable[int], pieces: TextPieces) -> Iterator[str]:
    for token in tokens:
        if text := pieces.push(token):
            yield text
    if text := pieces.flush():
        yield text


def _first_id(tokenizer: Any) -> list[int]:
    """What to start from when there is no prompt: what stands between documents in training."""
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token is not None:
            return [token]
    return []


def _check(ok: bool, name: str, came: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name}: got {came!r}; expected {expected}")


def _check_finite(logits: torch.Tensor) -> None:
    """A draw would make tokens of NaN, too. (-inf is fine: it rules a token out.)"""
    if not bool(logits.amax(-1).isfinite().all()):
        got, fix = "logits that are no finite numbers", "train it at a lower rate"
        raise fail("model", got, "numbers", fix)


def _check_settings(max_new_tokens: int, temperature: float, top_p: float) -> None:
    counts = isinstance(max_new_tokens, int) and max_new_tokens >= 0
    _check(counts, "max_new_tokens", max_new_tokens, "an integer, 0 or more")
    _check(temperature >= 0, "temperature", temperature, "0 (the likeliest token) or more")
    _check(0 <= top_p <= 1, "top_p", top_p, "a probability from 0 to 1")
