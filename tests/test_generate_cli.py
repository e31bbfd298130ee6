"""Generating text, and the command line from outside."""

import codecs
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from subquad import SubquadCache, SubquadConfig, SubquadForCausalLM
from subquad.cli import app, main, parse
from subquad.cli.settle import settle
from subquad.generate import TextPieces, draw, generate_batch, generate_tokens, load, stream
from subquad.generate.decode import _reading
from subquad.models import ByteTokenizer
from subquad.models.folder import model_folders
from subquad.train import TrainConfig, train

BYTES = ByteTokenizer()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"line {i}: {i * i} is the square of {i}\n" for i in range(500)))
    return path


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """The directory of a run that has been trained a little."""
    path = tmp_path_factory.mktemp("runs") / "gla"
    model = {"mixer": "gla", "hidden_size": 16, "num_hidden_layers": 1}
    train(TrainConfig(model=model, data=str(text), steps=20, seq_len=32, device="cpu"), path)
    return path


def tiny(row, hidden_size=16):
    torch.manual_seed(0)
    config = SubquadConfig(mixer=row, hidden_size=hidden_size, num_hidden_layers=1)
    return SubquadForCausalLM(config).eval()


def take(model, count, **options):
    return list(generate_tokens(model, list(b"prompt"), max_new_tokens=count, **options))


# ---- decoding


@pytest.mark.parametrize("row", ["gla", "gated_deltanet", "softmax_attention"])
def test_greedy_decoding_is_what_transformers_generate_gives(row):
    model = tiny(row)
    ids = torch.tensor([list(b"prompt")])
    expected = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert take(model, 40, temperature=0) == expected[0, ids.shape[1] :].tolist()


def test_a_long_prompt_is_read_in_pieces(monkeypatch):
    model = tiny("gla")
    expected = take(model, 5, temperature=0)
    monkeypatch.setattr("subquad.generate.decode._PREFILL", 4)
    assert take(model, 5, temperature=0) == expected


def test_a_seed_repeats_itself_and_another_does_not():
    model = tiny("gla")
    state = torch.get_rng_state()
    first = take(model, 50, seed=1)
    assert take(model, 50, seed=1) == first != take(model, 50, seed=2)
    assert take(model, 50) != take(model, 50)
    assert torch.equal(torch.get_rng_state(), state)


def test_stop_ids_end_it_unyielded():
    model = tiny("gla")
    free = take(model, 30, seed=3)
    stop = free[10]
    assert take(model, 30, seed=3, stop_ids=(stop,)) == free[: free.index(stop)]


def test_a_batch_is_its_rows():
    model = tiny("gated_deltanet")
    prompts = torch.tensor([list(b"prompt"), list(b"second"), list(b"third!")])
    free = generate_batch(model, prompts, max_new_tokens=20)
    for ids, row in zip(prompts, free):
        alone = generate_tokens(model, ids.tolist(), max_new_tokens=20, temperature=0)
        assert list(alone) == row.tolist()
    drawn = generate_batch(model, prompts, max_new_tokens=20, temperature=1.0, top_p=0.9, seed=4)
    stop = drawn[1, 5].item()
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 4, "stop_ids": (stop,)}
    stopped = generate_batch(model, prompts, max_new_tokens=20, **options)
    for whole, row in zip(drawn.tolist(), stopped.tolist()):
        end = whole.index(stop) if stop in whole else len(row)
        assert row == whole[:end] + [stop] * (len(row) - end)
    assert generate_batch(model, prompts, max_new_tokens=0).shape == (3, 0)
    with pytest.raises(ValueError, match=r"^ids: got"):
        generate_batch(model, prompts[0], max_new_tokens=1)


@pytest.mark.parametrize("row", ["gated_deltanet", "softmax_attention"])
def test_a_ragged_batch_is_its_prompts(row, monkeypatch):
    model = tiny(row)
    prompts = [list(b"a"), list(b"a longer prompt"), list(b"medium")]
    expected = [take_after(model, prompt, 12) for prompt in prompts]
    for piece in (2048, 4):  # some prompts begin in a later piece than others
        monkeypatch.setattr("subquad.generate.decode._PREFILL", piece)
        assert generate_batch(model, prompts, max_new_tokens=12).tolist() == expected
    tensors = [torch.tensor(prompt) for prompt in prompts[:1]]
    assert generate_batch(model, tensors, max_new_tokens=12).tolist() == expected[:1]


def take_after(model, ids, count, **options):
    return list(generate_tokens(model, ids, max_new_tokens=count, temperature=0, **options))


def test_prompts_of_unequal_length_are_refused_for_other_models():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=1, n_positions=64)
    other = GPT2LMHeadModel(config).eval()
    with pytest.raises(
        ValueError, match=r"^ids: got prompts of \[1, 2\] tokens; .* model.generate"
    ):
        generate_batch(other, [[1], [1, 2]], max_new_tokens=2)
    assert generate_batch(other, [[1, 2], [3, 4]], max_new_tokens=2).shape == (2, 2)


@pytest.mark.parametrize("row", ["gla", "softmax_attention"])
def test_a_conversation_goes_on_with_its_cache(row, tmp_path):
    """After every token the cache holds the prompt and all that was yielded, nothing more."""
    model, cache = tiny(row), SubquadCache(1)
    first, second = list(b"hello"), list(b"and then")
    said = take_after(model, first, 7, past_key_values=cache)
    assert said == take_after(model, first, 7)
    assert cache.get_seq_length() == 5 + 7
    cache.save(tmp_path / "cache.safetensors")
    more = take_after(model, second, 6, past_key_values=cache)
    whole = take_after(model, first + said + second, 6)
    assert more == whole
    loaded = SubquadCache.load(tmp_path / "cache.safetensors")
    text = "".join(
        stream(model, BYTES, "and then", max_new_tokens=6, temperature=0, past_key_values=loaded)
    )
    assert text == "".join(texts(whole))
    stop = whole[2]
    stopped = SubquadCache.load(tmp_path / "cache.safetensors")
    kept = take_after(model, second, 6, past_key_values=stopped, stop_ids=(stop,))
    assert kept == whole[: whole.index(stop)]
    assert stopped.get_seq_length() == 12 + len(second) + len(kept)
    with pytest.raises(ValueError, match=r"^ids: got an empty prompt"):
        stream(model, BYTES, "", past_key_values=loaded)
    with pytest.raises(ValueError, match=r"^past_key_values: got"):
        take_after(model, second, 6, past_key_values=SubquadCache(2))


@pytest.mark.parametrize("temperature", [1e-40, 1e-320, 5e-324, 1e-8])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_tiny_temperature_takes_the_likeliest(temperature, top_p):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 259, generator=generator) * 1e4
    logits[:, 3] = -torch.inf
    tokens = draw(logits, temperature=temperature, top_p=top_p, generator=generator)
    assert torch.equal(tokens, logits.argmax(-1))
    assert take(tiny("gla"), 9, temperature=temperature, top_p=top_p, seed=0) == take(
        tiny("gla"), 9, temperature=0
    )


def test_tokens_are_waited_for_on_their_own_gpu(monkeypatch):
    """Whichever is the current one: its stream knows nothing of the copy."""
    waits = []

    class Event:
        def record(self, stream=None):
            self.stream = stream

        def synchronize(self):
            waits.append(self.stream)

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda shape, *, pin_memory, **rest: empty(shape, **rest))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    tokens = torch.tensor([3, 5])
    assert torch.equal(_reading(tokens)(), tokens)
    assert waits == ["stream of cpu"]


def test_draw_temperature_and_nucleus():
    logits = torch.log(torch.tensor([0.1, 0.5, 0.0, 0.4]))
    generator = torch.Generator().manual_seed(0)

    def draws(temperature, top_p, count=4000):
        rows = logits.expand(count, 4)
        tokens = draw(rows, temperature=temperature, top_p=top_p, generator=generator)
        return torch.bincount(tokens, minlength=4) / count

    assert draws(0, 1.0, 10)[1] == 1
    assert torch.allclose(draws(1.0, 1.0), torch.tensor([0.1, 0.5, 0.0, 0.4]), atol=0.04)
    # 0.5 alone does not reach 0.8; with 0.4 it does, and 0.1 is out.
    assert torch.allclose(draws(1.0, 0.8), torch.tensor([0.0, 5 / 9, 0.0, 4 / 9]), atol=0.04)
    assert draws(1.0, 0.45)[1] == draws(1.0, 0.0, 10)[1] == 1
    # Temperature 2 takes square roots.
    roots = torch.tensor([0.1, 0.5, 0.0, 0.4]).sqrt()
    assert torch.allclose(draws(2.0, 1.0), roots / roots.sum(), atol=0.04)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"ids": []}, "ids"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"ids": [[1, 2], [3]]}, "ids"),
        ({"ids": [1.5]}, "ids"),
        ({"ids": torch.ones(2, 3, dtype=torch.int64)}, "ids"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_bad_arguments_are_named_at_once(options, name):
    arguments = {"ids": [1], "max_new_tokens": 3, **options}
    with pytest.raises(ValueError, match=f"^{name}: got"):
        generate_tokens(tiny("gla"), **arguments)  # not only when the first token is asked for


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_model_whose_logits_are_no_numbers_says_nothing(broken, temperature):
    model = tiny("gla")
    with torch.no_grad():
        model.lm_head.weight[7] = broken
    with pytest.raises(ValueError, match=r"^model: got logits that are no finite numbers; "):
        take(model, 3, temperature=temperature, seed=0)


# ---- text


def texts(ids):
    pieces = TextPieces(BYTES)
    return [*(pieces.push(i) for i in ids), pieces.flush()]


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=60))
def test_pieces_joined_are_the_text_and_characters_come_whole(text):
    said = texts(text.encode())
    assert "".join(said) == text
    assert all(len(piece) <= 1 for piece in said)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60))
@example(b"\x80" * 7 + "\x80".encode())  # one gives up where a character begins,
@example(b"\x80" * 4 + "\x80".encode() + b"\x80\x80")  # and may not cut one before
@example(b"\x80" * 5 + "🐍".encode())
def test_bytes_that_are_no_utf8_do_not_stop_the_stream(data):
    said = "".join(texts(data))
    # One U+FFFD or several for bytes that belong to nothing: that depends on where they are cut.
    expected = codecs.decode(data, "utf-8", "replace")
    assert said.replace("\ufffd", "") == expected.replace("\ufffd", "")


def test_stream_starts_from_nothing_and_survives_any_prompt():
    model = tiny("gla")
    for prompt in ("", "naïve \U0001f40d", "<|eos|>"):
        assert "".join(stream(model, BYTES, prompt, max_new_tokens=20, seed=0))


# ---- memory


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tensor_bytes():
    gc.collect()
    return sum(o.nbytes for o in gc.get_objects() if type(o) is torch.Tensor)


def cache_bytes():
    (cache,) = (o for o in gc.get_objects() if type(o) is SubquadCache)
    return sum(t.nbytes for state in cache.states for t in state.values())


def measure_at(row, counts):
    """(cache bytes, bytes of all tensors, resident bytes) after each of `counts` tokens."""
    gc.collect()
    tokens = generate_tokens(tiny(row), [1], max_new_tokens=counts[-1] + 1, temperature=0)
    measured = []
    for number, _ in enumerate(tokens, start=1):
        if number in counts:
            measured.append((cache_bytes(), tensor_bytes(), resident_bytes()))
    return measured


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_over_20000_tokens():
    early, late = measure_at("gla", (1000, 20_000))
    assert late[:2] == early[:2]
    assert late[2] - early[2] < 4 << 20


def test_memory_of_attention_does_grow():
    """The same measurement sees a cache that grows, so that the test above means something."""
    early, late = measure_at("softmax_attention", (100, 1000))
    assert late[0] > 5 * early[0] and late[1] > early[1]


# ---- loading


def test_load_takes_a_run_its_model_or_a_checkpoint(finished):
    newest = sorted((finished / "checkpoints").iterdir())[-1]
    (a, tokenizer), (b, _), (c, _) = (load(p) for p in (finished, finished / "model", newest))
    assert tokenizer.encode("abc") == list(b"abc")
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name])
        assert torch.equal(value, c.state_dict()[name])


def test_an_unfinished_run_speaks_from_its_newest_checkpoint(finished, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    source = sorted((finished / "checkpoints").iterdir())[-1]
    for step in ("step-00000002", "step-00000010"):
        (tmp_path / "checkpoints" / step).symlink_to(source)
    assert model_folders(tmp_path)[0].name == "step-00000010"


def test_loading_nothing_says_so(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no model yet"):
        load(tmp_path)


# ---- the command line, in this process


def test_settle_puts_options_over_the_base(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model": {"layers": ["gla", "mamba2"], "hidden_size": 64}, "steps": 7})
    )
    kept = settle(tmp_path, {"lr": 0.1}, {}, [])
    assert (kept.steps, kept.lr, kept.model["layers"]) == (7, 0.1, ["gla", "mamba2"])
    changed = settle(
        tmp_path, {}, {"mixer": "gla", "hidden_size": 32}, ["keep=5", "model.norm_eps=1e-6"]
    )
    assert changed.keep == 5
    assert changed.model == {"mixer": "gla", "hidden_size": 32, "norm_eps": 1e-6}
    with pytest.raises(ValueError, match="unknown training settings"):
        settle(None, {}, {}, ["stpes=3"])


def test_layers_are_a_number_or_rows():
    assert parse.layers("6") == {"num_hidden_layers": 6, "layers": None}
    assert parse.layers("gla, mamba2") == {"layers": ["gla", "mamba2"], "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=1", ("a", 1)),
        ("a=b", ("a", "b")),
        ('a={"b": 2}', ("a", {"b": 2})),
        ("a=x=y", ("a", "x=y")),
    ],
)
def test_settings_are_json_or_text(text, expected):
    assert parse.setting(text) == expected


@pytest.mark.parametrize("text", ["a", "=1", ""])
def test_settings_without_a_name_or_value_are_refused(text):
    with pytest.raises(ValueError, match="expected name=value"):
        parse.setting(text)


def test_help_states_the_defaults_that_hold():
    """The help text repeats TrainConfig's defaults, so as not to import it."""
    result = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    shown = dict(re.findall(r"--([a-z-]+) .*?\[default: \((.*?)\)\]", result.output))
    defaults = TrainConfig().to_json()
    shared = {option.replace("-", "_") for option in shown} & set(defaults)
    assert {"steps", "lr", "batch_size", "seq_len", "eval_every", "data", "seed"} <= shared
    for name in shared - {"tokenizer"}:
        assert shown[name.replace("_", "-")] == str(defaults[name])
    model = SubquadConfig()
    assert shown["mixer"] == model.mixer == TrainConfig().model["mixer"]
    assert shown["layers"] == str(model.num_hidden_layers)
    assert shown["hidden-size"] == str(model.hidden_size)


@pytest.fixture
def subquad(monkeypatch, capfdbinary):
    """Run the command line in this process: (exit status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["subquad", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        output = capfdbinary.readouterr()
        return exit.value.code, output.out.decode(), output.err.decode()

    return run


def test_generate_prints_prompt_and_text_alone(finished, subquad):
    options = ("--prompt", "line 7é", "--max-new-tokens", 30, "--seed", 4)
    status, said, errors = subquad("generate", finished, *options)
    model, tokenizer = load(finished)
    expected = "".join(stream(model, tokenizer, "line 7é", max_new_tokens=30, seed=4))
    assert (status, said, errors) == (0, f"line 7é{expected}\n", "")


def test_errors_are_one_line(finished, text, tmp_path, subquad):
    (tmp_path / "empty.txt").touch()
    commands = {
        "is not empty": ("train", finished, "--data", text),
        "Fix: perhaps 'gla'": ("train", tmp_path / "a", "--data", text, "--mixer", "glaa"),
        "holds no text": ("train", tmp_path / "b", "--data", tmp_path / "empty.txt"),
        "name the run directory": ("train", "--resume"),
        "keeps its own settings": ("train", finished, "--resume", "--config", finished),
        "seed was 0, now 1": ("train", finished, "--resume", "--seed", 1),
        "does not exist; expected a run": ("generate", tmp_path / "nowhere"),
        "temperature: got -1.0": ("generate", finished, "--temperature", -1),
        "device: got 'abacus'": ("generate", finished, "--device", "abacus"),
        "Not a directory": ("train", text / "run", "--data", text),
    }
    for message, arguments in commands.items():
        status, said, errors = subquad(*arguments)
        assert status == 1 and said == "", arguments
        assert errors.startswith("error: ") and errors.count("\n") == 1
        assert message in errors
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_debug_shows_the_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["subquad", "--debug", "generate", str(tmp_path)])
    with pytest.raises(ValueError, match="holds no model"):
        main()


def test_train_with_options(text, tmp_path, subquad):
    sizes = ("--layers", "gla,softmax_attention", "--hidden-size", 16, "--seq-len", 16)
    extra = ("--batch-size", 2, "--set", "model.norm_eps=1e-6", "--set", "betas=[0.9, 0.99]")
    status, _, said = subquad(
        "train", tmp_path / "run", "--data", text, "--steps", 3, *sizes, *extra
    )
    assert status == 0 and "hybrid: 0.0" in said and "done: " in said
    config = TrainConfig.load(tmp_path / "run")
    assert config.betas == (0.9, 0.99) and config.batch_size == 2
    model, _ = load(tmp_path / "run")
    assert model.config.rows == ["gla", "softmax_attention"] and model.config.norm_eps == 1e-6


# ---- the command line, from outside


def test_help_needs_no_torch():
    code = (
        "import sys, runpy; sys.argv = ['subquad', '--help']\n"
        "try: runpy.run_module('subquad', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.endswith("[]\n") and "subquad train runs/gla" in result.stdout


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_and_is_the_exit_status(name, text, tmp_path, subquad, monkeypatch):
    import subquad.train.session as session

    if not hasattr(signal, name):
        pytest.skip("this system has no such signal")
    step = session.Session.train_step

    def step_and_signal(self):
        step(self)
        if self.step == 2:
            signal.raise_signal(getattr(signal, name))

    monkeypatch.setattr(session.Session, "train_step", step_and_signal)
    sizes = ("--hidden-size", 16, "--layers", 1, "--seq-len", 16, "--steps", 9, "--data", text)
    status, _, said = subquad("train", tmp_path / "a b", *sizes)
    assert status == 128 + getattr(signal, name)
    assert "stopped and saved after step 2" in said
    assert os.name == "nt" or f"subquad train '{tmp_path}/a b' --resume\n" in said
    assert [p.name for p in (tmp_path / "a b" / "checkpoints").iterdir()] == ["step-00000002"]


def test_ctrl_c_saves_and_resume_goes_on(text, tmp_path, subquad):
    run = tmp_path / "run"
    sizes = ("--hidden-size", 16, "--layers", 1, "--mixer", "gla", "--seq-len", 32)
    arguments = ("train", run, "--data", text, "--steps", 400, *sizes, "--checkpoint-every", 1000)
    process = subprocess.Popen(
        [sys.executable, "-m", "subquad", *map(str, arguments)],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 100
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    (saved,) = (run / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step-"))
    assert 3 <= step < 400 and f"stopped and saved after step {step}" in said
    status, _, said = subquad("train", run, "--resume", "--steps", step + 5)
    assert status == 0
    assert f"resuming after step {step}" in said and "held-out bits/byte" in said
    steps = [json.loads(line)["step"] for line in metrics.open() if '"train"' in line]
    assert steps == list(range(1, step + 6))
