"""What decoding by CUDA graphs promises where there is none: no change; snapshots are copies."""

import copy
import pickle

import torch

from subquad import SubquadConfig, SubquadForCausalLM
from subquad.models import SubquadCache
from subquad.recurrence.gpu import may_overwrite, overwriting_states


def build() -> SubquadForCausalLM:
    torch.manual_seed(0)
    config = SubquadConfig(layers=["mamba2", "gated_deltanet"], hidden_size=32, vocab_size=50)
    return SubquadForCausalLM(config).eval()


@torch.no_grad()
def test_asking_for_a_replay_on_a_cpu_is_an_ordinary_call():
    model, ids = build(), torch.arange(6)[None]
    plain = SubquadCache(2)
    model(ids, past_key_values=plain)
    asked = copy.copy(plain)
    want = model(ids[:, :1], past_key_values=plain).logits
    got = model(ids[:, :1], past_key_values=asked, replay=True)
    assert torch.equal(got.logits, want) and got.past_key_values is asked
    assert asked.lease is None and asked.get_seq_length() == 7
    for one, other in zip(plain.states, asked.states):
        assert all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def test_a_snapshot_of_a_leased_cache_is_a_copy():
    cache = SubquadCache(2)
    build()(torch.arange(6)[None], past_key_values=cache)
    free = copy.copy(cache)
    assert free.states[0]["recurrent"] is cache.states[0]["recurrent"]  # costs nothing
    cache.lease = lambda: None  # whatever it is, it cannot be pickled
    snapshots = [copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    before = cache.states[0]["recurrent"].clone()
    cache.states[0]["recurrent"].zero_()  # as a replayed step writes over it
    for snapshot in snapshots:
        assert snapshot.lease is None and snapshot.get_seq_length() == 6
        assert torch.equal(snapshot.states[0]["recurrent"], before)


def test_states_may_be_overwritten_only_within_and_only_whole():
    state = torch.zeros(2, 3, 4)
    assert not may_overwrite(state)
    with overwriting_states():
        assert may_overwrite(state)
        assert not may_overwrite(None) and not may_overwrite(state.transpose(1, 2))
    assert not may_overwrite(state)
