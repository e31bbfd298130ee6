"""Training on real text: a thin loop, deterministic data, checkpoints that survive anything.

from subquad.train import TrainConfig, train

result = train(TrainConfig(model="gla", steps=200), "runs/gla")
result.bits_per_byte, result.tokens_per_second, result.losses
"""

from subquad.train.build import autocast_dtype, build_model
from subquad.train.checkpoint import CheckpointError
from subquad.train.config import TrainConfig
from subquad.train.data import Corpus, load_corpus
from subquad.train.loop import TrainResult, train
from subquad.train.score import evaluate, token_losses
from subquad.train.session import TrainingError

__all__ = [
    "CheckpointError",
    "Corpus",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "autocast_dtype",
    "build_model",
    "evaluate",
    "load_corpus",
    "token_losses",
    "train",
]
