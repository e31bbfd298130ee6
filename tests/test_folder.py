"""Model folders: whatever has been done to one, loading it is right or one clear error."""

import json
import logging
import os
import random
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from subquad import SubquadConfig, SubquadForCausalLM, SubquadModel
from subquad.cli import main
from subquad.files import SUMS, Damaged, check_sums
from subquad.generate import load
from subquad.models import ByteTokenizer
from subquad.models.folder import model_folders
from subquad.train import TrainConfig, train


def build(**keywords) -> SubquadForCausalLM:
    torch.manual_seed(0)
    return SubquadForCausalLM(SubquadConfig(**{"mixer": "gla", "hidden_size": 16} | keywords))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "gla"
    build(num_hidden_layers=2).save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(original, tmp_path / "gla")


@pytest.fixture
def unsummed(folder):
    """As from elsewhere: without sums."""
    (folder / SUMS).unlink()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    text = tmp_path_factory.mktemp("data") / "text.txt"
    text.write_text("".join(f"line {i}: {i * i} is the square of {i}\n" for i in range(500)))
    path = tmp_path_factory.mktemp("runs") / "first"
    model = {"mixer": "gla", "hidden_size": 16, "num_hidden_layers": 1}
    config = TrainConfig(
        model=model, data=str(text), steps=4, seq_len=16, checkpoint_every=2, device="cpu"
    )
    train(config, path)
    return path


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def flip(file, chance) -> None:
    data = bytearray(file.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def edit(file, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---- saving


def test_what_is_saved_loads_with_its_sums_and_leaves_nothing_beside(folder, capfd):
    listed = {line[66:] for line in (folder / SUMS).read_text().splitlines()}
    assert listed == {"config.json", "generation_config.json", "model.safetensors"}
    done = subprocess.run(["sha256sum", "-c", SUMS], cwd=folder, capture_output=True)
    assert done.returncode == 0 or shutil.which("sha256sum") is None
    model = SubquadForCausalLM.from_pretrained(folder)
    assert same(model, build(num_hidden_layers=2))
    assert same(SubquadModel.from_pretrained(folder), model.model)
    assert [p.name for p in folder.parent.iterdir()] == ["gla"]
    assert "note" not in capfd.readouterr().err


def test_a_model_is_saved_where_one_is(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    build().save_pretrained(".")
    assert same(SubquadForCausalLM.from_pretrained(pretrained_model_name_or_path="."), build())
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


def test_saving_again_replaces_ours_and_keeps_what_is_others(folder):
    (folder / "README.md").write_text("mine")
    model = build(num_hidden_layers=2)
    model.save_pretrained(folder, max_shard_size="5KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert not (folder / "model.safetensors").exists()
    assert same(SubquadForCausalLM.from_pretrained(folder), model)
    model.save_pretrained(folder)  # old shards would be read instead
    assert len(list(folder.glob("*.safetensors*"))) == 1
    assert (folder / "README.md").read_text() == "mine"
    assert same(SubquadForCausalLM.from_pretrained(folder), model)


def test_a_save_that_fails_leaves_the_old_model(folder, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("subquad.models.folder.write_sums", full)
    with pytest.raises(OSError, match="No space left"):
        build(num_hidden_layers=1).save_pretrained(folder)
    assert same(SubquadForCausalLM.from_pretrained(folder), build(num_hidden_layers=2))
    assert [p.name for p in folder.parent.iterdir()] == ["gla"]


# ---- sums


def test_no_flipped_bit_in_any_file_is_believed(original, folder):
    chance = random.Random(0)
    for name in ("model.safetensors", "config.json", "generation_config.json", SUMS):
        for _ in range(9):
            shutil.copy(original / name, folder / name)
            flip(folder / name, chance)
            with pytest.raises(ValueError, match=r"damaged") as refusal:
                SubquadForCausalLM.from_pretrained(folder)
            assert str(folder) in str(refusal.value)
        shutil.copy(original / name, folder / name)
    SubquadForCausalLM.from_pretrained(folder)


def test_a_folder_without_sums_loads_with_a_note(unsummed, caplog):
    with caplog.at_level(logging.WARNING):
        model = SubquadForCausalLM.from_pretrained(unsummed)
    assert same(model, build(num_hidden_layers=2))
    assert f"note: {unsummed} has no {SUMS}" in caplog.text


def test_who_changes_a_config_on_purpose_is_told_how(folder):
    edit(folder / "config.json", residual_in_fp32=False)
    with pytest.raises(Damaged, match=r"config\.json is damaged: .*changed on purpose, delete "):
        SubquadForCausalLM.from_pretrained(folder)
    (folder / SUMS).unlink()
    assert not SubquadForCausalLM.from_pretrained(folder).config.residual_in_fp32


def test_the_tokenizer_of_a_run_is_summed_too(run):
    listed = {line[66:] for line in (run / "model" / SUMS).read_text().splitlines()}
    assert {"tokenizer.json", "tokenizer_config.json", "model.safetensors"} <= listed
    check_sums(run / "model", exactly=True)


def test_generate_falls_back_to_the_newest_whole_checkpoint(run, tmp_path, monkeypatch, capfd):
    damaged, chance = shutil.copytree(run, tmp_path / "run"), random.Random(1)
    whole, _ = load(run)
    flip(damaged / "model" / "model.safetensors", chance)
    said = []
    model, _ = load(damaged, say=said.append)  # the checkpoint of the last step
    assert same(model, whole) and len(said) == 1 and "model.safetensors is damaged" in said[0]
    flip(damaged / "checkpoints" / "step-00000004" / "config.json", chance)
    words = ["subquad", "generate", str(damaged), "--max-new-tokens", "3", "--seed", "0"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ending:
        main()
    output = capfd.readouterr()
    assert (
        ending.value.code == 0
        and " ".join(output.err.split()).count("trying the one before it") == 2
    )
    before, _ = load(damaged / "checkpoints" / "step-00000002")
    assert same(load(damaged)[0], before)
    flip(damaged / "checkpoints" / "step-00000002" / "model.safetensors", chance)
    with pytest.raises(Damaged, match=r"step-00000002.*damaged"):
        load(damaged)
    with pytest.raises(Damaged, match=r"model\.safetensors is damaged"):
        load(damaged / "model")  # asked for by name, there is nothing before it


# ---- folders from elsewhere, without sums


def test_a_missing_tensor_is_not_drawn_at_random(unsummed):
    file = unsummed / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "mixer" in n)
    save_file({n: t for n, t in tensors.items() if n != name}, file, metadata={"format": "pt"})
    for cls in (SubquadForCausalLM, SubquadModel):
        with pytest.raises(
            Damaged, match=rf"the tensor .*{name.removeprefix('model.')} is missing"
        ):
            cls.from_pretrained(unsummed)
    with pytest.raises(Damaged, match="is missing from its weights"):
        AutoModelForCausalLM.from_pretrained(unsummed)


def test_an_untied_read_out_is_needed_too(tmp_path):
    model = build(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "m")
    assert same(SubquadForCausalLM.from_pretrained(tmp_path / "m"), model)
    model.model.save_pretrained(tmp_path / "m")
    with pytest.raises(Damaged, match=r"the tensor lm_head\.weight is missing"):
        SubquadForCausalLM.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("shape", [(3,), (16, 17)])
def test_a_mismatched_shape_is_named(unsummed, shape):
    file = unsummed / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "mixer" in n and tensors[n].ndim == 2)
    save_file(tensors | {name: torch.zeros(shape)}, file, metadata={"format": "pt"})
    with pytest.raises(Damaged, match=rf"{name} has shape \[.*where its config asks for"):
        SubquadForCausalLM.from_pretrained(unsummed)


def test_numbers_that_are_no_floats_are_named(unsummed):
    file = unsummed / "model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].view(torch.int32)}, file, metadata={"format": "pt"})
    with pytest.raises(Damaged, match=rf"{name} is I32"):
        SubquadForCausalLM.from_pretrained(unsummed)


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", "..", "", 3, "a\\b"])
def test_an_index_points_to_nothing_outside(unsummed, place):
    os.replace(unsummed / "model.safetensors", unsummed.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": place}}
    (unsummed / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Damaged, match="is no name of a file beside it"):
        SubquadForCausalLM.from_pretrained(unsummed)


def test_a_config_names_no_other_weights(unsummed):
    shutil.copy(unsummed / "model.safetensors", unsummed / "other.safetensors")
    edit(unsummed / "config.json", transformers_weights="other.safetensors")
    with pytest.raises(Damaged, match="transformers_weights"):
        SubquadForCausalLM.from_pretrained(unsummed)


def test_pickles_are_never_loaded(unsummed):
    torch.save(load_file(unsummed / "model.safetensors"), unsummed / "pytorch_model.bin")
    (unsummed / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"holds \['pytorch_model.bin'\].*pickles are never loaded"
    ):
        SubquadForCausalLM.from_pretrained(unsummed)
    with pytest.raises(ValueError, match="holds no model yet"):
        load(unsummed)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b""),
        ("config.json", b"[]"),
        ("config.json", b"\xff"),
        ("config.json", b'{"a":' * 100_000),
        ("generation_config.json", b"{"),
        ("generation_config.json", b"3"),
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 100),
        ("model.safetensors", struct.pack("<Q", 1 << 40) + b"{}"),
    ],
)
def test_broken_files_are_one_clear_error(unsummed, name, content):
    (unsummed / name).write_bytes(content)
    for read in (SubquadForCausalLM.from_pretrained, load):
        with pytest.raises(ValueError, match=rf"{name} is damaged"):
            read(unsummed)


@pytest.mark.parametrize("kept", [7, 1000, -1])
def test_truncated_weights_are_one_clear_error(unsummed, kept):
    file = unsummed / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(Damaged, match=r"model\.safetensors is damaged"):
        SubquadForCausalLM.from_pretrained(unsummed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 10**9},
            "its weights have 2 layers, where its config says 1000000000",
        ),
        ({"num_hidden_layers": "two"}, "where its config says 'two'"),
        ({"hidden_size": 32}, "where its config asks for"),
        ({"vocab_size": 10**12}, "where its config asks for"),
        ({"mixer": "glaa"}, "perhaps 'gla'"),
        ({"model_type": "llama"}, "a model of type 'llama'; expected a model of type 'subquad'"),
        ({"model_type": None}, "a model of type None"),
    ],
)
def test_a_config_that_does_not_fit_is_one_clear_error(unsummed, changes, message):
    edit(unsummed / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        SubquadForCausalLM.from_pretrained(unsummed)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with a name")
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_pipes_are_not_waited_for(unsummed, name):
    (unsummed / name).unlink()
    os.mkfifo(unsummed / name)
    with pytest.raises(Damaged, match="is no regular file"):
        SubquadForCausalLM.from_pretrained(unsummed)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": {}}', b"\xff\xff"])
def test_a_broken_tokenizer_is_one_clear_error(unsummed, content):
    (unsummed / "tokenizer.json").write_bytes(content)
    with pytest.raises(Damaged, match="holds no tokenizer that can be read"):
        load(unsummed)


def test_a_folder_of_another_family_is_named_in_one_sentence(tmp_path):
    """Those that transformers can load are loaded; of the others it is said what they are."""
    torch.manual_seed(0)
    small = GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=1, n_positions=64)
    GPT2LMHeadModel(small).save_pretrained(tmp_path / "gpt2")
    ByteTokenizer().save_pretrained(tmp_path / "gpt2")
    assert load(tmp_path / "gpt2")[0].config.model_type == "gpt2"
    with pytest.raises(ValueError, match=r"^path: got .*, a model of type 'gpt2'; expected"):
        SubquadForCausalLM.from_pretrained(tmp_path / "gpt2")
    edit(tmp_path / "gpt2" / "config.json", model_type="hybrid9", auto_map={"AutoConfig": "evil.C"})
    (tmp_path / "gpt2" / "evil.py").write_text("raise SystemExit('code of a folder was run')")
    with pytest.raises(
        ValueError, match=r"holds a model of type 'hybrid9', which subquad does not"
    ):
        load(tmp_path / "gpt2")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_fuzzed_folder_is_right_or_one_clear_error(original, unsummed, name):
    """Bits, bytes and cuts at random, most of them in the header, where a change could pass."""
    chance = random.Random(2)
    whole, file = (original / name).read_bytes(), unsummed / name
    end = 8 + struct.unpack("<Q", whole[:8])[0] if name.endswith("safetensors") else len(whole)
    refused = 0
    for trial in range(60):
        data = bytearray(whole)
        place = chance.randrange(end)
        if trial % 3 == 0:
            data[place] ^= 1 << chance.randrange(8)
        elif trial % 3 == 1:
            data[place : place + chance.randrange(1, 9)] = chance.randbytes(chance.randrange(9))
        else:
            del data[chance.randrange(len(data)) :]
        file.write_bytes(data)
        try:
            model = SubquadForCausalLM.from_pretrained(unsummed)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) or "glaa" not in str(error)
        else:
            assert model.config.rows == ["gla", "gla"]
    assert refused > 30


# ---- finding


def test_of_a_run_its_model_comes_first_and_then_the_newest_checkpoint(run):
    names = [str(path.relative_to(run)) for path in model_folders(run)]
    assert names == ["model", "checkpoints/step-00000004", "checkpoints/step-00000002"]
