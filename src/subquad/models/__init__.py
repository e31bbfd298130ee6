"""Language models of any row or mix of rows, as transformers knows models.

Importing this makes `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know model_type "subquad".
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from subquad.models.cache import SubquadCache
from subquad.models.config import SubquadConfig
from subquad.models.language import SubquadForCausalLM
from subquad.models.stack import SubquadModel
from subquad.models.tokenizer import ByteTokenizer

# The Trainer's label smoothing, pipelines and model cards ask this table what a class is for.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[SubquadConfig.model_type] = SubquadForCausalLM.__name__

AutoConfig.register(SubquadConfig.model_type, SubquadConfig, exist_ok=True)
AutoModel.register(SubquadConfig, SubquadModel, exist_ok=True)
AutoModelForCausalLM.register(SubquadConfig, SubquadForCausalLM, exist_ok=True)

__all__ = [
    "ByteTokenizer",
    "SubquadCache",
    "SubquadConfig",
    "SubquadForCausalLM",
    "SubquadModel",
]
