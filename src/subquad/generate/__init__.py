"""Text out of a model: a thin decode loop that streams, and whose memory does not grow with it.

from subquad.generate import load, stream

model, tokenizer = load("runs/gla")
for piece in stream(model, tokenizer, "def fibonacci(", max_new_tokens=200, seed=0):
    print(piece, end="", flush=True)
"""

from subquad.generate.decode import generate_batch, generate_tokens, stream
from subquad.generate.load import load
from subquad.generate.sample import draw
from subquad.generate.text import TextPieces

__all__ = ["TextPieces", "draw", "generate_batch", "generate_tokens", "load", "stream"]
