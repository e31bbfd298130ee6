"""The Trainer, PEFT and lm-eval work on our models as on any, with no network."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from awake import awake
from subquad.mixers import MIXERS
from subquad.models import ByteTokenizer, SubquadConfig, SubquadForCausalLM

HYBRID = ["gated_deltanet", "softmax_attention", "mamba2"]
TEXTS = [
    "the state forgets a little of it,",
    "writes the new token,",
    "and reads;",
    "what differs between models is small",
] * 4


def build(layers: list[str] = HYBRID) -> SubquadForCausalLM:
    torch.manual_seed(0)
    return SubquadForCausalLM(SubquadConfig(hidden_size=64, layers=layers))


# ---- Trainer


def trainer(folder: Path, collator, **arguments) -> Trainer:
    """Texts of unequal lengths, in batches of four."""
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_steps": 3,
        "seed": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **arguments,
    }
    tokens = [{"input_ids": ids} for ids in ByteTokenizer()(TEXTS)["input_ids"]]
    return Trainer(
        model=build(),
        args=TrainingArguments(**options),
        train_dataset=tokens,
        eval_dataset=tokens[:4],
        data_collator=collator,
    )


def padding() -> DataCollatorForLanguageModeling:
    # Padding before a text would have its first token guessed from the padding.
    return DataCollatorForLanguageModeling(ByteTokenizer(padding_side="right"), mlm=False)


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_trainer_trains_saves_and_resumes(tmp_path) -> None:
    whole = trainer(tmp_path / "whole", padding())
    whole.train()
    assert losses(whole) == sorted(losses(whole), reverse=True)
    assert whole.evaluate()["eval_loss"] < losses(whole)[0]

    resumed = trainer(tmp_path / "resumed", padding())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, parameter in resumed.model.state_dict().items():
        assert torch.equal(parameter, whole.model.state_dict()[name]), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-6")
    ids = torch.arange(97, 107)[None]
    assert torch.equal(loaded(ids).logits, whole.model.eval()(ids).logits)


def test_trainer_sees_the_same_loss_however_it_batches(tmp_path) -> None:
    """Padded, packed by restarting positions, or in two accumulated halves: one loss a step."""
    runs = {
        "padded": trainer(tmp_path / "padded", padding(), max_steps=3),
        "packed": trainer(tmp_path / "packed", DataCollatorWithFlattening(), max_steps=3),
        "halves": trainer(
            tmp_path / "halves",
            padding(),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        ),
    }
    for run in runs.values():
        run.train()
    # A packed text's first token is nobody's label, and neither is a padded one's.
    torch.testing.assert_close(losses(runs["packed"]), losses(runs["padded"]), rtol=1e-3, atol=0)
    torch.testing.assert_close(losses(runs["halves"]), losses(runs["padded"]), rtol=1e-3, atol=0)


def test_collators_that_flatten_for_flash_attention(tmp_path) -> None:
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    plain = trainer(tmp_path / "plain", DataCollatorWithFlattening(), max_steps=2)
    flash = trainer(tmp_path / "flash", collator, max_steps=2)
    plain.train()
    flash.train()
    torch.testing.assert_close(losses(flash), losses(plain))


# ---- PEFT


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("layers", [[row] for row in MIXERS] + [HYBRID], ids="+".join)
def test_lora_trains_saves_loads_and_merges(layers, tmp_path) -> None:
    base = awake(build(layers))
    ids = torch.tensor(ByteTokenizer()(TEXTS[:1])["input_ids"])
    before = base.eval()(ids).logits.detach()
    options = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, options).train()
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert any(".mixer." in name for name in adapters)
    optimizer = torch.optim.AdamW(adapters.values(), lr=1e-2)
    history = []
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        loss.backward()
        history.append(loss.item())
        if len(history) > 1:  # the first gradient of each A is zero, for B starts at zero
            for name, parameter in adapters.items():
                used = parameter.grad is not None and parameter.grad.abs().max() > 0
                assert used, f"{name}: its layer's weight is read past the layer's forward"
        optimizer.step()
        optimizer.zero_grad()
    assert history[-1] < history[0]

    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():  # alike on both sides: where a graph is recorded other code runs
        trained = model(ids).logits
        assert (trained - before).abs().max() > 1e-2
        loaded = PeftModel.from_pretrained(awake(build(layers)), tmp_path).eval()
        assert torch.equal(loaded(ids).logits, trained)
    merged = loaded.merge_and_unload()
    assert type(merged) is SubquadForCausalLM
    torch.testing.assert_close(merged(ids).logits, trained, rtol=1e-4, atol=1e-4)
    out = merged.generate(ids, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == ids.shape[1] + 3


# ---- lm-eval


@pytest.fixture(scope="module")
def harness():
    from lm_eval.models.huggingface import HFLM

    model = build().eval()
    model.generation_config.eos_token_id = None
    return HFLM(pretrained=model, tokenizer=ByteTokenizer(), batch_size=3, device="cpu")


def requests(kind: str, arguments: list[tuple]):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, n) for n, each in enumerate(arguments)]


@torch.no_grad()
def logprob(model: SubquadForCausalLM, context: str, continuation: str) -> tuple[Tensor, bool]:
    """What lm-eval should find, one text at a time."""
    start, ids = len(context.encode()), torch.tensor([[*(context + continuation).encode()]])
    log = model(ids).logits.log_softmax(-1)[0, start - 1 : -1]
    wanted = ids[0, start:]
    return log.gather(1, wanted[:, None]).sum(), bool((log.argmax(-1) == wanted).all())


def test_lm_eval_loglikelihood(harness) -> None:
    pairs = [
        ("the state", " forgets"),
        ("a", " b"),
        ("long context with more words:", " é"),
        *[("x", "y" * n) for n in range(1, 5)],
    ]
    got = harness.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    for (value, greedy), (context, continuation) in zip(got, pairs):
        want, is_greedy = logprob(harness.model, context, continuation)
        assert value == pytest.approx(want.item(), abs=1e-3)
        assert greedy == is_greedy


def test_lm_eval_rolling(harness) -> None:
    text = "a text that is scored as a whole"
    got = harness.loglikelihood_rolling(
        requests("loglikelihood_rolling", [(text,)]), disable_tqdm=True
    )
    ids = torch.tensor([[harness.prefix_token_id, *text.encode()]])
    with torch.no_grad():
        log = harness.model(ids).logits.log_softmax(-1)[0, :-1]
    assert got[0] == pytest.approx(log.gather(1, ids[0, 1:, None]).sum().item(), abs=1e-3)


def test_lm_eval_generates_in_padded_batches(harness) -> None:
    prompts = ["a prompt", "another and longer prompt", "c"]
    options = {"until": ["\n\n\n"], "max_gen_toks": 5, "do_sample": False}
    arguments = [(prompt, dict(options)) for prompt in prompts]
    got = harness.generate_until(requests("generate_until", arguments), disable_tqdm=True)
    for text, prompt in zip(got, prompts):
        ids = torch.tensor([[*prompt.encode()]])
        out = harness.model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert text == harness.tokenizer.decode(out, skip_special_tokens=True)


def test_lm_eval_runs_a_local_task(harness, tmp_path) -> None:
    """A whole evaluation of a task in a folder: its files, its documents, its metric."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    documents = [{"question": "one and one", "choices": ["two", "three"], "answer": 0}] * 3
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(json.dumps(each) for each in documents))
    (tmp_path / "task.yaml").write_text(
        f"""task: local_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}, cache_dir: "{tmp_path}"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} is "
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
    )
    results = lm_eval.simple_evaluate(
        model=harness,
        tasks=["local_questions"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    two, three = (logprob(harness.model, "one and one is ", word)[0] for word in ("two", "three"))
    assert results["results"]["local_questions"]["acc,none"] == float(two > three)
