"""Language models of fla and mamba_ssm of the sizes of ours, for benchmarks/models.py.

Each runs as it comes: its own fused losses and norms, its own autotuning (timings cut to 5 + 15 ms
a configuration, and the configurations of a kernel compiled side by side first, which changes how
long the tuning takes and not what it finds).
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from gpu import shorten_autotuning

THREADS = 16


def fla_gla(vocabulary: int) -> Any:
    from fla.models import GLAConfig, GLAForCausalLM

    config = GLAConfig(
        hidden_size=1024, num_hidden_layers=24, num_heads=4, intermediate_size=2752,
        vocab_size=vocabulary, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return GLAForCausalLM(config)


def fla_mamba2(vocabulary: int) -> Any:
    """Its scan and convolution are mamba_ssm's and causal_conv1d's."""
    from fla.models import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        hidden_size=1024, num_hidden_layers=48, vocab_size=vocabulary, tie_word_embeddings=True,
        use_cache=False,
    )  # fmt: skip
    return Mamba2ForCausalLM(config)


def mamba_ssm_mamba2(vocabulary: int) -> Any:
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    config = MambaConfig(
        d_model=1024, n_layer=48, vocab_size=vocabulary, ssm_cfg={"layer": "Mamba2"}
    )
    return MambaLMHeadModel(config, dtype=torch.bfloat16)


MODELS: dict[tuple[str, str], Callable[[int], Any]] = {
    ("fla", "gla"): fla_gla,
    ("fla", "mamba2"): fla_mamba2,
    ("mamba_ssm", "mamba2"): mamba_ssm_mamba2,
}


def loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of the next token. mamba_ssm's models return logits and leave the loss to their user."""
    if type(model).__module__.startswith("mamba_ssm"):
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits.float(), ids[:, 1:].flatten())
    return model(input_ids=ids, labels=ids).loss


def find_mamba_ssm() -> None:
    """Let mamba_ssm, if there, be imported where its CUDA extension for Mamba-1 was not built.

    Mamba-2 runs without it: on Triton kernels, and the convolution of causal_conv1d if that is
    installed. But the package's `__init__` imports all models, and so that extension.
    """
    if importlib.util.find_spec("selective_scan_cuda") is None:
        sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")
    spec = importlib.machinery.PathFinder.find_spec("mamba_ssm")
    if spec is None:
        return
    package = types.ModuleType("mamba_ssm")
    package.__path__ = spec.submodule_search_locations
    sys.modules["mamba_ssm"] = package


@lru_cache(maxsize=1)
def prepare() -> None:
    """Before a peer is imported: fla looks for mamba_ssm when it is. Tune more quickly."""
    find_mamba_ssm()
    import triton
    from triton.runtime.autotuner import Autotuner

    shorten_autotuning()
    prune = Autotuner.prune_configs

    def prune_and_compile(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        configs = prune(self, kwargs)
        options = {**kwargs, "warmup": True}
        with (
            ThreadPoolExecutor(THREADS) as threads,
            triton.AsyncCompileMode(threads, ignore_errors=True),
        ):
            for config in configs:
                self.fn.run(*self.nargs.values(), **options, **config.all_kwargs())
        return configs

    Autotuner.prune_configs = prune_and_compile
