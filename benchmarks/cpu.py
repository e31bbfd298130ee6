"""subquad against transformers' own classes on the CPU: whole models of about 50M parameters.

    python benchmarks/cpu.py [--out docs/results/cpu.json] [--only mamba2] [--work prefill train]

Each pair has the same weights, and its logits must agree to 1e-3 of their size before anything is
timed. Ours and theirs are timed in turn, A B A B, and the ratio is the median of the pairs' ratios,
so that a machine whose speed drifts does not decide. Theirs is what a user without a GPU gets:
transformers' PyTorch paths. What the packages compile at first use is compiled before timing, and
reported by itself as first_call.
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_next import modeling_qwen3_next

import subquad
from subquad import SubquadConfig, SubquadForCausalLM

VOCAB, HIDDEN, LAYERS = 16384, 512, 24
DECODE_STEPS = 32


def use_torch_paths(module: object) -> None:
    """Undo the dispatch to installed packages whose kernels need a GPU."""
    for name, value in list(vars(module).items()):
        if inspect.isfunction(value) and hasattr(value, "__wrapped__"):
            setattr(module, name, inspect.unwrap(value))


def mamba() -> tuple[nn.Module, SubquadForCausalLM]:
    use_torch_paths(modeling_mamba)
    config = MambaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS)
    theirs = MambaForCausalLM(config)
    ours = SubquadForCausalLM(
        SubquadConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, mixer="mamba")
    )
    return theirs, copy_mamba_weights(theirs, ours)


def mamba2() -> tuple[nn.Module, SubquadForCausalLM]:
    use_torch_paths(modeling_mamba2)
    config = Mamba2Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_heads=2 * HIDDEN // 64,
        head_dim=64,
        n_groups=1,
        tie_word_embeddings=True,
    )
    theirs = Mamba2ForCausalLM(config)
    ours = SubquadForCausalLM(
        SubquadConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, mixer="mamba2"
        )
    )
    return theirs, copy_mamba_weights(theirs, ours)


def copy_mamba_weights(theirs: nn.Module, ours: SubquadForCausalLM) -> SubquadForCausalLM:
    new = {}
    for name, weight in theirs.state_dict().items():
        name = name.replace("backbone.", "model.").replace("norm_f.", "norm.")
        name = name.replace("embeddings.", "embed_tokens.")
        if "mixer." not in name:
            name = name.replace(".norm.", ".mixer_norm.") if ".layers." in name else name
        name = name.replace("dt_proj.bias", "dt_bias")
        if "conv1d" in name:
            name = name.replace("conv1d", "conv")
            weight = weight.squeeze(1) if weight.ndim == 3 else weight
        new[name] = weight
    return load(ours, new)


def gated_deltanet() -> tuple[nn.Module, SubquadForCausalLM]:
    use_torch_paths(modeling_qwen3_next)
    Hk, H, K, V, layers, inner = 4, 8, 128, 128, 10, 1408  # its proportions at width 512
    config = Qwen3NextConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=inner,
        num_hidden_layers=layers,
        layer_types=["linear_attention"] * layers,
        mlp_only_layers=list(range(layers)),
        linear_num_key_heads=Hk,
        linear_num_value_heads=H,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    theirs = Qwen3NextForCausalLM(config)
    options = {"num_heads": Hk, "num_v_heads": H, "head_dim": K, "expand_v": V / K}
    ours = SubquadForCausalLM(
        SubquadConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=layers,
            mixer="gated_deltanet",
            intermediate_size=inner,
            norm_eps=config.rms_norm_eps,
            mixer_options={"gated_deltanet": options | {"norm_eps": config.rms_norm_eps}},
        )
    )
    new, r = {}, H // Hk
    old = theirs.state_dict()
    for name in list(old):
        if name.endswith("in_proj_qkvz.weight"):  # theirs interleaves by key head
            stem = name.removesuffix("linear_attn.in_proj_qkvz.weight")
            qkvz = old.pop(name).view(Hk, -1, HIDDEN).split((K, K, r * V, r * V), 1)
            ba = old.pop(stem + "linear_attn.in_proj_ba.weight").view(Hk, -1, HIDDEN).split(r, 1)
            packed = torch.cat([w.flatten(0, 1) for w in (*qkvz, *ba)])
            new[stem + "mixer.in_proj.weight"] = packed
    for name, weight in old.items():
        if "conv1d" in name:
            weight = weight.squeeze(1)
        # Their block norms are (1 + w) x, ours w x.
        if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")) or (
            name == "model.norm.weight"
        ):
            weight = 1 + weight
        for a, b in (
            ("linear_attn.conv1d", "mixer.conv"),
            ("linear_attn.out_proj", "mixer.o_proj"),
            ("linear_attn.", "mixer."),
            ("input_layernorm", "mixer_norm"),
            ("post_attention_layernorm", "mlp_norm"),
            ("gate_proj", "gate"),
            ("up_proj", "up"),
            ("down_proj", "down"),
        ):
            name = name.replace(a, b)
        new[name] = weight
    return theirs, load(ours, new)


def load(ours: SubquadForCausalLM, weights: dict[str, Tensor]) -> SubquadForCausalLM:
    ours.load_state_dict({n: w.clone() for n, w in weights.items()})
    ours.tie_weights()
    return ours


@dataclass(frozen=True)
class Work:
    name: str
    tokens: int  # of one call
    bar: float | None  # what the ratio should reach
    pairs: int  # how often each side is timed


WORKS = {
    "mamba": [
        Work("prefill", 2048, 5.0, 3),
        Work("train", 256, 20.0, 1),
        Work("decode", DECODE_STEPS, 1.5, 7),
    ],
    "mamba2": [
        Work("prefill", 2048, 2.5, 5),
        Work("train", 512, 2.5, 5),
        Work("decode", DECODE_STEPS, 2.0, 7),
    ],
    "gated_deltanet": [
        Work("prefill", 2048, 1.8, 5),
        Work("train", 512, None, 5),
        Work("decode", DECODE_STEPS, 2.0, 7),
    ],
}


def fresh_cache(model: nn.Module) -> dict[str, object]:
    """Nothing, where the model makes its own cache."""
    if not isinstance(model, Qwen3NextForCausalLM):
        return {}
    # Its cache cannot count tokens without a layer of full attention, and gives up.
    cache = DynamicCache(config=model.config)
    cache.get_seq_length = lambda *_, **__: 0
    cache.get_mask_sizes = lambda query_length, *_: (query_length, 0)
    return {"past_key_values": cache}


def prefill(model: nn.Module, ids: Tensor) -> None:
    with torch.inference_mode():
        model(ids, use_cache=True, logits_to_keep=1, **fresh_cache(model))


def train(model: nn.Module, ids: Tensor) -> None:
    model(ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def make_decode(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    """A closure that decodes `DECODE_STEPS` tokens one by one, going on and on from its cache."""
    with torch.inference_mode():
        output = model(ids[:, :64], use_cache=True, **fresh_cache(model))
    key = "cache_params" if "cache_params" in output else "past_key_values"
    cache = output[key]

    def decode() -> None:
        with torch.inference_mode():
            for _ in range(DECODE_STEPS):
                model(ids[:, :1], use_cache=True, **{key: cache})

    return decode


def seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(
    name: str, build: Callable[[], tuple[nn.Module, SubquadForCausalLM]], works: list[str] | None
) -> list[dict]:
    torch.manual_seed(0)
    theirs, ours = build()
    theirs.eval(), ours.eval()
    sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (ours, theirs)]
    ids = torch.randint(0, VOCAB, (1, 2048), generator=torch.Generator().manual_seed(1))

    with torch.inference_mode():
        start = time.perf_counter()
        a = ours(ids[:, :100]).logits
        first_call = time.perf_counter() - start
        b = theirs(ids[:, :100], use_cache=False).logits
    error = ((a - b).norm() / b.norm()).item()
    assert error < 1e-3, f"{name}: logits differ by {error:.1e}; the comparison would mean nothing"

    rows = []
    for work in WORKS[name]:
        if works is not None and work.name not in works:
            continue
        window = ids[:, : work.tokens]
        if work.name == "decode":
            call_ours, call_theirs = make_decode(ours, ids), make_decode(theirs, ids)
        else:
            run = prefill if work.name == "prefill" else train
            call_ours = lambda run=run, x=window: run(ours, x)  # noqa: E731
            call_theirs = lambda run=run, x=window: run(theirs, x)  # noqa: E731
        call_ours()  # warm up; theirs only where it does not take minutes
        if work.pairs > 1:
            call_theirs()
        pairs = [(seconds(call_ours), seconds(call_theirs)) for _ in range(work.pairs)]
        mine, other = (statistics.median(side) for side in zip(*pairs))
        rows.append(
            {
                "model": name,
                "work": work.name,
                "tokens": work.tokens,
                "parameters_M": [round(s, 1) for s in sizes],
                "logits_error": error,
                "first_call_s": round(first_call, 2),
                "ours_s": mine,
                "theirs_s": other,
                "ours_tokens_per_s": work.tokens / mine,
                "theirs_tokens_per_s": work.tokens / other,
                "ratio": statistics.median(t / o for o, t in pairs),
                "ratios": [t / o for o, t in pairs],
                "bar": work.bar,
            }
        )
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict) -> str:
    bar = "" if row["bar"] is None else f"{row['bar']:.1f}x"
    return (
        f"| {row['model']} | {row['work']} {row['tokens']} | {row['ours_tokens_per_s']:.0f} | "
        f"{row['theirs_tokens_per_s']:.1f} | {row['ratio']:.2f}x | {bar} |"
    )


HEADER = """\
| model | work | ours, tokens/s | transformers, tokens/s | ratio | bar |
| --- | --- | --- | --- | --- | --- |"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=list(WORKS))
    parser.add_argument("--work", nargs="+", choices=["prefill", "train", "decode"])
    arguments = parser.parse_args()
    builders = {"mamba2": mamba2, "gated_deltanet": gated_deltanet, "mamba": mamba}
    print(HEADER, flush=True)
    rows = []
    for name, build in builders.items():
        if arguments.only in (None, name):
            rows += compare(name, build, arguments.work)
    result = {
        "what": "whole models, float32, the same weights; ratio = their time / our time",
        "date": datetime.date.today().isoformat(),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {
            "subquad": subquad.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "rows": rows,
    }
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        table = "\n".join([HEADER, *map(line, rows)])
        arguments.out.with_suffix(".md").write_text(table + "\n")


if __name__ == "__main__":
    main()
