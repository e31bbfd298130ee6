"""A language model in transformers' Trainer, saved and loaded with from_pretrained.

python examples/trainer.py
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import subquad
from subquad.models import ByteTokenizer


def main() -> None:
    torch.manual_seed(0)
    layers = ["gated_deltanet", "gated_deltanet", "softmax_attention"]  # a hybrid
    model = subquad.SubquadForCausalLM(subquad.SubquadConfig(layers=layers, hidden_size=64))
    tokenizer = ByteTokenizer(padding_side="right")

    lines = Path(argparse.__file__).read_text(encoding="utf-8").splitlines()  # any text
    texts = [text for text in ("\n".join(lines[i : i + 4]) for i in range(0, 800, 4)) if text]
    data = [{"input_ids": ids[:128]} for ids in tokenizer(texts)["input_ids"] if ids]

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                folder,
                max_steps=20,
                per_device_train_batch_size=8,
                learning_rate=3e-3,
                logging_steps=5,
                report_to=[],
                dataloader_pin_memory=False,
                disable_tqdm=True,
                save_strategy="no",
            ),
            train_dataset=data,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]

        trainer.save_model(folder)
        tokenizer.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder).eval()  # importing subquad.models
        tokens = AutoTokenizer.from_pretrained(folder)  # has told Auto classes of our models
        prompt = tokens("def add_argument(", return_tensors="pt")
        out = again.generate(**prompt, max_new_tokens=20, do_sample=False)
        print(tokens.decode(out[0]))


if __name__ == "__main__":
    main()
