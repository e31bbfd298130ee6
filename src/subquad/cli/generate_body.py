"""What `subquad generate` does with its arguments."""

import sys
from pathlib import Path

from transformers.utils import logging

from subquad.cli.compiling import note_compiling
from subquad.cli.terminal import printable, say, sidelines
from subquad.errors import fail
from subquad.generate.decode import stream
from subquad.generate.load import load


def generate_command(
    path: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    device: str,
) -> None:
    """Print the prompt and its continuation as it comes, nothing else, so that it can be piped."""
    if seed is not None and not 0 <= seed < 2**63:
        raise fail("--seed", seed, "a number from 0 to 2**63 - 1", "take a smaller one")
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    notes = sidelines()
    model, tokenizer = load(path, device=device, say=lambda text: say(notes, text))
    pieces = stream(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    try:
        _write(prompt)
        with note_compiling():
            for piece in pieces:
                _write(piece)
        _write("\n")
    except KeyboardInterrupt:
        _write("\n")  # enough is enough; what was generated stays


def _write(text: str) -> None:
    if sys.stdout.isatty():
        text = printable(text)
    # Whatever the terminal's encoding, a byte model will sooner or later say something outside it.
    sys.stdout.buffer.write(text.encode(sys.stdout.encoding or "utf-8", "replace"))
    sys.stdout.buffer.flush()
