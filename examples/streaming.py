"""A long conversation, kept in one small file: saved, continued in another process, and forked.

python examples/streaming.py
"""

import copy
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import subquad
from subquad.generate import stream
from subquad.models import ByteTokenizer

TOKENIZER = ByteTokenizer()


def model() -> subquad.SubquadForCausalLM:
    """Stands in for from_pretrained("FOLDER"). Untrained: what it says is noise, and repeatable."""
    torch.manual_seed(0)
    config = subquad.SubquadConfig(
        mixer="gated_deltanet", hidden_size=64, num_hidden_layers=2, tie_word_embeddings=False
    )
    return subquad.SubquadForCausalLM(config).eval()


@torch.no_grad()
def answer(
    speaker: subquad.SubquadForCausalLM, cache: subquad.SubquadCache, text: str
) -> list[int]:
    """What follows `text`, said after all that `cache` has read, which moves on with it."""
    ids = TOKENIZER(text, return_tensors="pt")["input_ids"]
    seen = torch.ones(1, cache.get_seq_length() + ids.shape[1], dtype=torch.long)
    out = speaker.generate(
        ids,
        past_key_values=cache,
        attention_mask=seen,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
    )
    return out[0, ids.shape[1] :].tolist()


def go_on(file: str) -> None:
    """The other process: it has the weights and the file, and none of the text."""
    print(answer(model(), subquad.SubquadCache.load(file), "And then?"))


@torch.no_grad()
def main() -> None:
    speaker = model()
    for piece in stream(speaker, TOKENIZER, "Once", max_new_tokens=20, seed=0):
        print(piece, end="", flush=True)  # text as it comes; memory does not grow
    print()

    document = "It forgets a little of it, writes the new token, and reads. " * 100
    ids = TOKENIZER(document, return_tensors="pt")["input_ids"]
    cache = speaker(ids, use_cache=True, logits_to_keep=1).past_key_values
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "conversation.safetensors"
        cache.save(file)
        print(f"{ids.shape[1]:,} tokens read, {file.stat().st_size:,} bytes saved")

        fork = copy.copy(cache)  # costs nothing: states are replaced, never changed
        here = answer(speaker, cache, "And then?")
        other = answer(speaker, fork, "Why so?")
        assert cache.get_seq_length() > ids.shape[1] and here != other

        command = [sys.executable, __file__, str(file)]
        there = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert there.strip() == str(here), "the other process goes on as this one did"
    print("continued in another process: the same answer")


if __name__ == "__main__":
    go_on(sys.argv[1]) if len(sys.argv) > 1 else main()
