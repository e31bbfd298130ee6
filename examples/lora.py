"""LoRA with PEFT: adapters on every projection of a frozen model, saved, loaded and merged.

python examples/lora.py
"""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model

import subquad
from subquad.models import ByteTokenizer


def base() -> subquad.SubquadForCausalLM:
    """Stands in for from_pretrained("FOLDER"): the same weights each time."""
    torch.manual_seed(0)
    return subquad.SubquadForCausalLM(
        subquad.SubquadConfig(mixer="mamba2", hidden_size=64, num_hidden_layers=2)
    )


def main() -> None:
    # PEFT has no default targets for a new architecture; all-linear finds every projection.
    options = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base(), options)
    model.print_trainable_parameters()

    text = "the state forgets a little of it, writes the new token, and reads. " * 2
    ids = ByteTokenizer()(text, return_tensors="pt")["input_ids"]
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.eval().save_pretrained(folder)  # the adapters only
        loaded = PeftModel.from_pretrained(base(), folder).eval()
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
        merged = loaded.merge_and_unload()  # a SubquadForCausalLM again
        out = merged.generate(ids[:, :20], max_new_tokens=10, do_sample=False)
    print(out.shape)


if __name__ == "__main__":
    main()
