"""Language models of 350M parameters on this machine's GPU: training, and prefill with decoding.

    PYTHONPATH=src python benchmarks/models.py --out models.json --plot models
    PYTHONPATH=src python benchmarks/models.py --work train --peers fla mamba_ssm

Training: tokens a second of forward, backward and a fused AdamW step, bfloat16, 8 x 4096 tokens
(`--sizes 8x4096 1x1024`: small batches too, where Python is what a step waits for), and the share
of the machine's own matrix product rate that 6 operations a parameter and token make (the
recurrence's own operations are not counted). `--peers` trains models of the same sizes by fla and
mamba_ssm too (models_peers.py). Generation: 2048 tokens of prompt and 128 new ones, greedy, at
several batch sizes, against a Llama of transformers of the same size (SDPA, its generate() and
growing cache, as it comes).
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models_peers
import torch

from subquad import SubquadConfig, SubquadForCausalLM
from subquad.generate import generate_batch

VOCABULARY = 32_000
PROMPT, NEW = 2048, 128


def ours(mixer: str, layers: int, **options: Any) -> Any:
    config = SubquadConfig(
        mixer=mixer, hidden_size=1024, num_hidden_layers=layers, vocab_size=VOCABULARY,
        tie_word_embeddings=True, **options,
    )  # fmt: skip
    return SubquadForCausalLM(config)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16,
        vocab_size=VOCABULARY, max_position_embeddings=8192, tie_word_embeddings=True,
        attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {
    "mamba2": lambda: ours("mamba2", 48),
    "gla": lambda: ours("gla", 24),
    "llama": llama,
}


def build(name: str, peer: str | None = None) -> Any:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = models_peers.MODELS[peer, name](VOCABULARY) if peer else MODELS[name]()
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
    wide = getattr(getattr(model, "model", None), "_keep_in_fp32_modules_strict", None) or ()
    for name, parameter in model.named_parameters():  # as from_pretrained(dtype=bfloat16) does
        if not any(re.search(pattern, name) for pattern in wide):
            parameter.data = parameter.data.bfloat16()
    return model


def seconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def matmul_rate() -> float:
    from triton.testing import do_bench

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / (do_bench(lambda: a @ b, return_mode="median") * 1e-3)


def profile(step: Callable[[], None], path: Path) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    table = found.key_averages().table(
        sort_by="cuda_time_total", row_limit=40, max_name_column_width=70
    )
    path.write_text(table)


def own_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def compile_parts(model: Any) -> None:
    """torch.compile for what is around our kernels: each block, and transformers' loss."""
    for block in model.model.layers:
        block.compile()
    model.loss_function = torch.compile(model.loss_function)


def train(
    name: str, batch: int, length: int, peak: float, folder: Path | None, peer: str | None = None,
    compiled: bool = False,
) -> dict[str, Any]:  # fmt: skip
    model = build(name, peer).train()
    if compiled:
        compile_parts(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, VOCABULARY, (batch, length), device="cuda")

    def step() -> None:
        loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    loss = models_peers.loss if peer else own_loss
    first = seconds(step)
    seconds(step)
    torch.cuda.reset_peak_memory_stats()
    median = statistics.median(seconds(step) for _ in range(5))
    rate = batch * length / median
    if folder is not None:
        profile(step, folder / f"train-{name}{'-' + peer if peer else ''}.txt")
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "work": "train", "model": name, "by": peer or "subquad",
        "compiled": compiled, "batch": batch, "length": length,
        "parameters": parameters, "tokens_per_s": rate, "ms": median * 1e3,
        "share_of_matmul_peak": 6 * parameters * rate / peak,
        "peak_GiB": torch.cuda.max_memory_allocated() / 2**30, "first_step_s": first,
    }  # fmt: skip


def tried(
    name: str, size: tuple[int, int], peak: float, folder: Path | None, **how: Any
) -> dict[str, Any]:
    """A row of training, or of the error with which it ended: that is a result, too."""
    if how.get("peer"):
        models_peers.prepare()
    try:
        return train(name, *size, peak, folder, **how)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"[:200]
        return {"work": "train", "model": name, "by": how.get("peer", "subquad"), "error": found}
    finally:
        torch.cuda.empty_cache()


def generate(name: str, batches: list[int], folder: Path | None) -> list[dict[str, Any]]:
    model = build(name).eval()
    rows = []
    for batch in batches:
        ids = torch.randint(0, VOCABULARY, (batch, PROMPT), device="cuda")
        ways: dict[str, Callable[[int], object]] = {
            "generate()": lambda new, ids=ids: model.generate(
                ids, max_new_tokens=new, do_sample=False, pad_token_id=0
            )
        }
        if name != "llama":
            ways["generate_batch()"] = lambda new, ids=ids: generate_batch(
                model, ids, max_new_tokens=new
            )
        for way, call in ways.items():
            first = seconds(lambda call=call: call(3))  # compiles, and captures a graph
            prefill = statistics.median(seconds(lambda call=call: call(1)) for _ in range(3))
            torch.cuda.reset_peak_memory_stats()
            whole = min(seconds(lambda call=call: call(NEW)) for _ in range(2))
            if folder is not None and way != "generate()":
                profile(lambda call=call: call(9), folder / f"generate-{name}-{batch}.txt")
            rows.append(
                {
                    "work": "generate", "model": name, "way": way, "batch": batch,
                    "first_call_s": first, "prefill_ms": prefill * 1e3,
                    "ms_per_token": (whole - prefill) / (NEW - 1) * 1e3,
                    "tokens_per_s": batch * NEW / whole,
                    "peak_GiB": torch.cuda.max_memory_allocated() / 2**30,
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def plot(rows: list[dict[str, Any]], stem: Path, device: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2))
    kinds = sorted({(r["model"], r["way"]) for r in rows if r["work"] == "generate"})
    for model, way in kinds:
        line = [r for r in rows if (r["model"], r.get("way")) == (model, way)]
        label = f"{model}, {way}" if model != "llama" else "Llama of transformers, generate()"
        style = "k--o" if model == "llama" else "-o" if "batch" in way else ":o"
        axes.plot([r["batch"] for r in line], [r["tokens_per_s"] for r in line], style, label=label)
    axes.set(
        xscale="log", yscale="log", xlabel="batch",
        ylabel=f"new tokens a second ({PROMPT} of prompt, {NEW} new)",
        title=f"Models of 350M parameters, bfloat16, {device}",
    )  # fmt: skip
    batches = sorted({r["batch"] for r in rows if r["work"] == "generate"})
    axes.set_xticks(batches, [str(b) for b in batches])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    for suffix in ("svg", "png"):
        figure.savefig(stem.with_suffix(f".{suffix}"), dpi=150)


def batch_and_length(text: str) -> tuple[int, int]:
    batch, _, length = text.partition("x")
    return int(batch), int(length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument(
        "--sizes", nargs="+", type=batch_and_length, default=[(8, 4096)], metavar="8x4096",
        help="sequences and tokens of each, of a training step",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="train ours compiled, too")
    parser.add_argument("--peers", nargs="*", default=[], choices=["fla", "mamba_ssm"])
    parser.add_argument("--work", nargs="+", default=["train", "generate"])
    parser.add_argument("--profile", type=Path, help="folder for tables of a step's kernels")
    parser.add_argument("--out", type=Path, default=Path("models.json"))
    parser.add_argument("--plot", type=Path, help="where the plot goes, without a suffix")
    args = parser.parse_args()

    import transformers
    import triton

    peak = matmul_rate()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "transformers": transformers.__version__,
        },
        "matmul_TFLOP_per_s": peak / 1e12,
        "rows": [],
    }
    for name in args.models:
        if "generate" in args.work:
            report["rows"] += generate(name, args.batches, args.profile)
            args.out.write_text(json.dumps(report, indent=1))
        torch.cuda.empty_cache()
        if "train" in args.work:
            for size in args.sizes:
                report["rows"].append(train(name, *size, peak, args.profile))
                print(report["rows"][-1], flush=True)
                torch.cuda.empty_cache()
        torch.cuda.empty_cache()
        args.out.write_text(json.dumps(report, indent=1))
    for peer, name in models_peers.MODELS:
        if peer in args.peers and name in args.models:
            for size in args.sizes:
                report["rows"].append(tried(name, size, peak, args.profile, peer=peer))
                print(report["rows"][-1], flush=True)
                args.out.write_text(json.dumps(report, indent=1))
    for name in args.models if args.compile else []:
        report["rows"].append(tried(name, args.sizes[0], peak, None, compiled=True))
        print(report["rows"][-1], flush=True)
        args.out.write_text(json.dumps(report, indent=1))
    if args.plot:
        plot(report["rows"], args.plot, report["device"])


if __name__ == "__main__":
    main()
