"""The tasks: drawn as published, evaluated by independent means, refused where they cannot be."""

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad import tasks
from subquad.tasks import IGNORE, TASKS
from subquad.tasks.base import choose_distinct
from subquad.tasks.listops import longest_expression
from subquad.tasks.stories import KINDS, PEOPLE, PLACES, THINGS, words
from subquad.tasks.tracking import GROUPS, elements, multiplication

EVERY = [(name, preset) for name, cls in TASKS.items() for preset in cls.presets]


def draws(name: str, batch_size: int, **settings) -> tuple[np.ndarray, np.ndarray]:
    batch = tasks.get(name, **settings).sample(batch_size, seed=7)
    return batch.inputs.numpy(), batch.labels.numpy()


# ---- what holds for every task


@pytest.mark.parametrize(("name", "preset"), EVERY)
def test_a_batch_is_a_function_of_seed_step_and_split(name, preset):
    task = tasks.get(name, preset=preset)

    def same(a, b):
        return a.inputs.shape == b.inputs.shape and torch.equal(a.inputs, b.inputs)

    first = task.sample(4, seed=3, step=5)
    task.sample(4, seed=9)
    again = tasks.get(name, preset=preset).sample(4, seed=3, step=5)
    assert same(first, again) and torch.equal(first.labels.nan_to_num(), again.labels.nan_to_num())
    assert not same(first, task.sample(4, seed=3, step=6))
    assert not same(first, task.sample(4, seed=4, step=5))
    assert not same(first, task.sample(4, seed=3, step=5, split="test"))
    stream = task.stream(4, seed=3, step=4)
    next(stream)
    assert same(first, next(stream))


@pytest.mark.parametrize(("name", "preset"), EVERY)
def test_batches_fit_the_model_that_is_built_for_them(name, preset):
    task = tasks.get(name, preset=preset)
    assert preset in task.recipes and 0 < task.chance <= 1
    for test in task.tests().values():
        if test.sample(1).inputs.shape[1] > 5000:
            continue
        batch = test.sample(3)
        assert batch.inputs.shape[:2] == batch.labels.shape[:2] and len(batch) == 3
        assert batch.asked.any(1).all()
        if task.channels:
            assert batch.inputs.dtype == torch.float32 and batch.inputs.shape[2] == task.channels
            assert batch.labels[batch.asked].isfinite().all()
        else:
            due = batch.labels[batch.asked]
            assert batch.inputs.dtype == batch.labels.dtype == torch.int64
            assert batch.inputs.min() >= 0 and batch.inputs.max() < task.vocab_size
            assert due.min() >= 0 and due.max() < task.vocab_size
            assert (batch.labels[~batch.asked] == IGNORE).all()


def test_the_presets_are_the_published_sizes():
    assert tasks.get("selective_copying", preset="published").sample(1).inputs.shape == (1, 4128)
    assert tasks.get("copying", preset="published").sample(1).inputs.shape == (1, 520)  # T + 20
    induction = tasks.get("induction_heads", preset="published")
    assert induction.sample(1).inputs.shape == (1, 256) and induction.vocab_size == 16
    assert [t.length for t in induction.tests().values()][1:] == [
        2**n for n in range(6, 21) if n != 8
    ]
    mqar = tasks.get("mqar", preset="published")
    assert (mqar.vocab_size, mqar.length, mqar.pairs, mqar.power) == (8192, 512, 64, 0.01)
    assert tasks.get("parity", preset="published").sample(1).inputs.shape == (1, 40)
    assert tasks.get("s5", preset="published").vocab_size == 60


REFUSED = [
    ("copying", {"symbols": 1}, "symbols"),
    ("copying", {"pause": 0}, "pause"),
    ("copying", {"test_pauses": (5, 5)}, "test_pauses"),
    ("selective_copying", {"vocabulary": 3}, "vocabulary"),
    ("selective_copying", {"memory": 2.5}, "memory"),
    ("selective_copying", {"noise": True}, "noise"),
    ("induction_heads", {"length": 2}, "length"),
    ("induction_heads", {"test_lengths": 64}, "test_lengths"),
    ("induction_heads", {"test_lengths": (1,)}, "test_lengths"),
    ("associative_recall", {"keys": 1}, "keys"),
    ("mqar", {"length": 63}, "length"),
    ("mqar", {"pairs": 17}, "length"),
    ("mqar", {"vocabulary": 16}, "vocabulary"),
    ("mqar", {"power": 0}, "power"),
    ("mqar", {"power": "much"}, "power"),
    ("mqar", {"random_filler": "yes"}, "random_filler"),
    ("mqar", {"test_sizes": (64, 4)}, "test_sizes"),
    ("mqar", {"test_sizes": ((10, 4),)}, "length"),
    ("parity", {"shortest": 41}, "shortest"),
    ("parity", {"every_position": 1}, "every_position"),
    ("s5", {"group": "S6"}, "group"),
    ("s5", {"group": "A5", "inputs": "swaps"}, "inputs"),
    ("stories", {"kind": "four_facts"}, "kind"),
    ("stories", {"places": 9}, "places"),
    ("stories", {"kind": "three_facts", "sentences": 3}, "sentences"),
    ("listops", {"depth": 1}, "depth"),
    ("listops", {"shortest": 300, "longest": 400}, "shortest"),
    ("listops", {"shortest": 10, "longest": 11}, "longest"),
    ("listops", {"longest": None}, "longest"),
    ("digits", {"permuted": 1}, "permuted"),
    ("hippo", {"band": 33}, "band"),
    ("hippo", {"band": "wide"}, "band"),
    ("hippo", {"queries": 0}, "queries"),
    ("hippo", {"colour": 1}, "colour"),
]


@pytest.mark.parametrize(("name", "given_", "field"), REFUSED)
def test_settings_that_cannot_be_are_refused_by_name(name, given_, field):
    with pytest.raises(ValueError, match=rf"^{field}: got .*; expected .*Fix: "):
        tasks.get(name, **given_)


def test_names_presets_and_arguments_are_refused_too():
    with pytest.raises(ValueError, match=r"name: got 'mqa'; expected one of .*mqar"):
        tasks.get("mqa")
    with pytest.raises(ValueError, match=r"preset: got 'big'; expected one of small, published"):
        tasks.get("copying", preset="big")
    task = tasks.get("copying")
    for bad in ({"batch_size": 0}, {"batch_size": 1, "seed": -1}, {"batch_size": 1, "step": 1.5}):
        with pytest.raises(ValueError, match=r"(batch_size|seed|step): got"):
            task.sample(**bad)
    with pytest.raises(ValueError, match=r"split: got 'dev'"):
        task.sample(1, split="dev")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whole_numbers_either_draw_or_are_refused_by_a_field(data):
    """No setting leads to anything but a batch or a ValueError that names a field."""
    name = data.draw(st.sampled_from(sorted(set(TASKS) - {"digits"})))
    fields = {field.name: field.default for field in dataclasses.fields(TASKS[name])}
    whole = [name for name, default in fields.items() if isinstance(default, int)]
    given_ = data.draw(st.dictionaries(st.sampled_from(whole), st.integers(-2, 40), max_size=3))
    try:
        batch = tasks.get(name, **given_).sample(2)
    except ValueError as error:
        assert str(error).split(":")[0].split(",")[0] in fields
    else:
        assert batch.asked.any(1).all()


def test_drawing_a_batch_needs_no_transformers():
    code = "import sys; from subquad import tasks; tasks.get('mqar').sample(2); "
    code += "assert not {'transformers', 'sklearn', 'numba'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- uniform draws


def chi_square(counts: np.ndarray) -> float:
    """Of equal expectations, in standard deviations of its own distribution."""
    expected, freedom = counts.mean(), counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize(("of", "count"), [(9, 9), (12, 3), (400, 4)])
def test_distinct_choices_are_distinct_and_uniform_in_every_place(of, count):
    picks = choose_distinct(np.random.default_rng(0), 20_000, of, count)
    assert (np.sort(picks, axis=1)[:, 1:] > np.sort(picks, axis=1)[:, :-1]).all()
    for place in range(count):
        assert abs(chi_square(np.bincount(picks[:, place], minlength=of))) < 5


# ---- copying


def test_copying_is_arjovskys():
    inputs, labels = draws("copying", 2000, pause=20)
    assert inputs.shape == (2000, 40)
    assert set(np.unique(inputs[:, :10])) == set(range(8))
    assert (inputs[:, 10:29] == 8).all() and (inputs[:, 29] == 9).all()
    assert (inputs[:, 30:] == 8).all()
    assert (labels[:, 30:] == inputs[:, :10]).all() and (labels[:, :30] == IGNORE).all()
    assert abs(chi_square(np.bincount(inputs[:, :10].ravel()))) < 5


def test_selective_copying_puts_symbols_anywhere_and_asks_for_them_in_order():
    task = tasks.get("selective_copying", noise=56, memory=8, vocabulary=10)
    inputs, labels = draws("selective_copying", 8000, noise=56, memory=8, vocabulary=10)
    assert inputs.shape == (8000, task.noise + 2 * task.memory)
    assert (inputs[:, 64:] == 9).all() and (labels[:, :64] == IGNORE).all()
    for row in range(100):
        body = inputs[row, :64]
        assert body[body > 0].tolist() == labels[row, 64:].tolist()
    assert set(np.unique(labels[:, 64:])) == set(range(1, 9))
    assert abs(chi_square((inputs[:, :64] > 0).sum(0))) < 5  # every place alike


# ---- recall


def test_the_trigger_comes_once_before_the_end_and_its_follower_is_due():
    inputs, labels = draws("induction_heads", 20_000, length=32)
    assert ((inputs == 15).sum(1) == 2).all() and (inputs[:, -1] == 15).all()
    first = (inputs == 15).argmax(1)
    assert (labels[:, -1] == inputs[np.arange(len(inputs)), first + 1]).all()
    assert ((labels != IGNORE).sum(1) == 1).all()
    assert abs(chi_square(np.bincount(first, minlength=30))) < 5 and first.max() == 29
    assert abs(chi_square(np.bincount(labels[:, -1]))) < 5


def test_associative_recall_asks_for_a_pair_that_was_shown():
    inputs, labels = draws("associative_recall", 500, keys=4, pairs=10)
    assert inputs.shape == (500, 22) and (inputs[:, -2] == 8).all()
    for row, due in zip(inputs.tolist(), labels[:, -1].tolist()):
        shown = list(zip(row[0:20:2], row[1:20:2]))
        assert len({key for key, _ in shown}) == len(set(shown))  # one value a key
        assert dict(shown)[row[-1]] == due
        assert all(key < 4 <= value < 8 for key, value in shown)
    assert (labels[:, :-1] == IGNORE).all()


def test_mqar_is_pairs_and_then_queries_whose_value_is_due():
    inputs, labels = draws("mqar", 300, vocabulary=64, length=64, pairs=8)
    for row, due in zip(inputs.tolist(), labels.tolist()):
        keys, values = row[0:16:2], row[1:16:2]
        assert len(set(keys)) == len(set(values)) == 8
        assert all(1 <= key < 32 <= value < 64 for key, value in zip(keys, values))
        pairs = dict(zip(keys, values))
        asked = [t for t, label in enumerate(due) if label != IGNORE]
        assert len(asked) == 8 and all(t >= 16 and t % 2 == 0 for t in asked)
        assert sorted(row[t] for t in asked) == sorted(keys)
        assert all(pairs[row[t]] == due[t] for t in asked)
        assert all(row[t] == 0 for t in range(16, 64) if t not in asked)


def test_mqar_gaps_follow_the_power_law():
    """One key alone is drawn with p(i) ~ i^(a-1) exactly; the first of several, too."""
    for power in (0.01, 1.0):
        expected = np.arange(1, 29) ** (power - 1.0)
        expected /= expected.sum()
        for pairs, length in ((1, 58), (4, 64)):
            inputs, _ = draws("mqar", 30_000, length=length, pairs=pairs, power=power)
            first_key = inputs[:, :1]
            place = (inputs[:, 2 * pairs :] == first_key).argmax(1) // 2
            counts = np.bincount(place, minlength=28)[:28]
            error = np.abs(counts / counts.sum() - expected) / np.sqrt(expected / counts.sum())
            assert error.max() < 5


def test_mqar_can_fill_with_noise():
    quiet, _ = draws("mqar", 200, random_filler=False)
    noisy, labels = draws("mqar", 200, random_filler=True)
    assert (quiet[:, 16:] == 0).mean() > 0.8
    assert (noisy[:, 16:] == 0).mean() < 0.02
    assert (noisy[labels != IGNORE] == quiet[labels != IGNORE]).all()


# ---- state tracking


@pytest.mark.parametrize("every", [True, False])
def test_parity_counts_ones_and_lengths_are_uniform(every):
    inputs, labels = draws("parity", 8000, every_position=every)
    lengths = (inputs != 2).sum(1)
    assert abs(chi_square(np.bincount(lengths)[3:])) < 5 and lengths.max() == 40
    for row, due, length in zip(inputs[:50].tolist(), labels[:50].tolist(), lengths):
        parity = [sum(row[: t + 1]) % 2 for t in range(length)]
        assert due[length - 1] == parity[-1]
        assert due[: length - 1] == (parity[:-1] if every else [IGNORE] * (length - 1))
        assert due[length:] == [IGNORE] * (40 - length)
    assert {t.shortest for t in tasks.get("parity").tests().values()} == {3, 64, 128, 256}


@pytest.mark.parametrize("group", GROUPS)
def test_groups_are_groups(group):
    members = elements(group)
    n = int(group[1])
    size = np.prod(range(1, n + 1)) // (2 if group[0] == "A" else 1)
    assert len(set(members)) == size and members[0] == tuple(range(n))
    table, swaps = multiplication(group)
    for x, y in itertools.islice(itertools.product(range(size), repeat=2), 0, None, 7):
        composed = tuple(members[y][members[x][i]] for i in range(n))  # x first
        assert members[table[x, y]] == composed
    moved = [sum(a != i for i, a in enumerate(members[s])) for s in swaps]
    assert len(swaps) == 1 + (n * (n - 1) // 2 if group[0] == "S" else 0)
    assert sorted(moved)[1:] == [2] * (len(swaps) - 1)


def test_word_problems_multiply_from_the_left():
    inputs, labels = draws("s5", 20, group="S5", length=12)
    members = elements("S5")
    for row, due in zip(inputs, labels):
        where = list(range(5))
        for token, label in zip(row, due):
            where = [members[token][i] for i in where]
            assert members[label] == tuple(where)
    assert abs(chi_square(np.bincount(draws("s5", 4000, group="S5")[0].ravel(), minlength=120))) < 5


# ---- stories, told again by a reader that goes word by word


def read(story: list[str]) -> dict:
    """What a reader knows in the end. Each change of a thing's place is kept."""
    at, holder, places = {}, {}, {}
    for sentence in " ".join(story).split(" . "):
        who, what, *rest = sentence.split()
        if what == "walked":
            at[who] = rest[2]
            for thing in [t for t, h in holder.items() if h == who]:
                places[thing].append(rest[2])
        else:
            thing = rest[1]
            if what == "took":
                assert holder.get(thing) is None, "taken from a hand"
                assert thing not in places or places[thing][-1] == at[who], "taken from afar"
                holder[thing] = who
                places.setdefault(thing, [at[who]])
            else:
                assert holder.pop(thing) == who, "dropped by another"
    return {"at": at, "holder": holder, "places": places}


def answer(world: dict, question: list[str]) -> str:
    match question:
        case ["where", "is", "the", thing]:
            return world["places"][thing][-1]
        case ["where", "is", who]:
            return world["at"][who]
        case ["where", "was", "the", thing, "before", "the", place]:
            assert world["places"][thing][-1] == place
            return world["places"][thing][-2]
        case ["is", who, "in", "the", place]:
            return "yes" if world["at"][who] == place else "no"
        case ["how", "many", "things", "does", who, "hold"]:
            count = sum(h == who for h in world["holder"].values())
            return ["none", "one", "two", "three", "four", "five", "six"][count]
    raise AssertionError(question)


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
@pytest.mark.parametrize("size", [{}, {"people": 8, "places": 8, "things": 6, "sentences": 30}])
def test_a_reader_agrees_with_every_answer(kind, size):
    inputs, labels = draws("stories", 150, kind=kind, **size)
    answers, openings = [], set()
    for row, due in zip(inputs.tolist(), labels.tolist()):
        (end,) = [t for t, label in enumerate(due) if label != IGNORE]
        told = words(row).split()
        assert words([row[end]]) == "?" and row[end + 1 :] == [0] * (len(row) - end - 1)
        last = max(i for i, word in enumerate(told) if word == ".")
        world, question = read(told[:last]), told[last + 1 : -1]
        answers.append(words([due[end]]))
        openings.add(" ".join(question[:3:2]))
        assert answer(world, question) == answers[-1]
    if kind == "yes_no":
        assert 0.35 < answers.count("yes") / len(answers) < 0.65
    if kind == "mixed":
        assert len(openings) >= 5
    assert len(set(answers)) > 1


def test_stories_too_short_to_ask_anything_are_refused():
    with pytest.raises(ValueError, match=r"sentences: got 4; expected enough for questions"):
        tasks.get("stories", kind="three_facts", sentences=4, people=8, places=8, things=6).sample(
            4096
        )


def test_the_words_of_the_world_are_disjoint():
    assert len({*PEOPLE, *PLACES, *THINGS}) == len(PEOPLE) + len(PLACES) + len(THINGS)


# ---- listops, evaluated by recursion


SYMBOLS = [*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]", "_"]


def evaluate(tokens: list[str]) -> tuple[int, int]:
    """The value of the expression that begins here, and its depth; tokens are used up."""
    head = tokens.pop(0)
    if head.isdigit():
        return int(head), 1
    values, depths = [], []
    while tokens[0] != "]":
        value, depth = evaluate(tokens)
        values.append(value)
        depths.append(depth)
    tokens.pop(0)
    assert len(values) >= 2
    result = {
        "[MIN": min(values),
        "[MAX": max(values),
        "[MED": int(np.median(values)),
        "[SM": sum(values) % 10,
    }[head]
    assert len(values) <= 10
    return result, 1 + max(depths)


@pytest.mark.parametrize(("preset", "count"), [("small", 400), ("published", 24)])
def test_listops_are_what_a_recursive_reader_makes_of_them(preset, count):
    task = tasks.get("listops", preset=preset)
    batch = task.sample(count, seed=1)
    depths = []
    for row, due in zip(batch.inputs.tolist(), batch.labels.tolist()):
        length = row.index(15) if 15 in row else len(row)
        assert task.shortest < length < task.longest
        tokens = [SYMBOLS[t] for t in row[:length]]
        value, depth = evaluate(tokens)
        assert not tokens and due[length - 1] == value
        assert sum(label != IGNORE for label in due) == 1
        depths.append(depth)
    assert max(depths) <= task.depth < max(depths) + 2


def test_listops_trees_branch_as_published():
    """A place is a list with chance 1/4; operators, digits and numbers of arguments are uniform."""
    from subquad.tasks.listops import Forest

    forest = Forest.grow(np.random.default_rng(0), 40_000, 3, 5, longest=1000)
    root, second, third = forest.levels
    assert abs((root.operators >= 0).mean() - 0.25) < 0.01
    assert abs((second.operators >= 0).mean() - 0.25) < 0.01
    assert (third.operators < 0).all()
    lists = root.operators[root.operators >= 0]
    assert abs(chi_square(np.bincount(lists))) < 5
    arguments = np.bincount(second.parents, minlength=40_000)[root.operators >= 0]
    assert arguments.min() == 2 and abs(chi_square(np.bincount(arguments)[2:])) < 5
    assert abs(chi_square(np.bincount(second.digits))) < 5
    assert forest.lengths.max() <= longest_expression(3, 5) == 37


def test_deep_and_wide_listops_stay_within_memory():
    """Trees of 40 levels with up to 40 arguments would have 5^40 nodes; the short ones exist."""
    batch = tasks.get("listops", depth=40, arguments=40, shortest=50, longest=200).sample(10)
    lengths = (batch.inputs != 15).sum(1)
    assert lengths.min() > 50 and lengths.max() < 200


# ---- images and signals


def test_digits_are_scikit_learns_and_the_test_images_are_apart():
    from sklearn.datasets import load_digits

    task = tasks.get("digits")
    (whole,) = task.test_batches(1)
    assert len(whole) == 360
    images, digits = load_digits(return_X_y=True)
    assert (whole.inputs.numpy() == images[::5]).all()
    assert (whole.labels[:, -1].numpy() - 17 == digits[::5]).all()
    test = {tuple(image) for image in whole.inputs.tolist()}
    train = {tuple(image) for image in task.sample(2000).inputs.tolist()}
    assert len(train) > 900 and not train & test
    shuffled = tasks.get("digits", permuted=True).sample(5)
    plain = task.sample(5)
    assert torch.equal(shuffled.inputs.sort(1).values, plain.inputs.sort(1).values)
    assert not torch.equal(shuffled.inputs, plain.inputs)


def test_without_scikit_learn_digits_say_what_to_install(monkeypatch):
    from subquad.tasks import digits

    digits.load.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install scikit-learn"):
        tasks.get("digits").sample(1)
    digits.load.cache_clear()


def test_signals_have_unit_variance_a_band_and_are_asked_for_where_they_were():
    task = tasks.get("hippo", length=256, queries=32, band=8.0, waves=5)
    batch = task.sample(400, seed=1)
    signal = batch.inputs[:, :256, 0]
    assert abs(signal.square().mean().item() - 1) < 0.05
    window = torch.hann_window(256, periodic=False)  # or the ends' jump spreads over all bands
    power = torch.fft.rfft(signal * window).abs().square().mean(0)
    assert power[12:].sum() / power.sum() < 1e-3 < power[4:9].sum() / power.sum()
    time = (batch.inputs[:, 256:, 1] * 256).round().long()
    assert torch.equal(signal.gather(1, time), batch.labels[:, 256:, 0])
    assert (batch.inputs[:, :256, 1:] == 0).all() and (batch.inputs[:, 256:, 2] == 1).all()
    assert abs(chi_square(np.bincount(time.flatten().numpy(), minlength=256))) < 5
