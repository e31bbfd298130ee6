"""Keys and values that grow in place: as `torch.cat`, and no tensor that anybody holds changes."""

import copy

import pytest
import torch
from torch.overrides import TorchFunctionMode

from subquad.layers.growing import append


def slots(S, rows=2):
    return torch.randn(rows, S, 3, 4)


def test_equals_cat_whatever_the_sizes():
    grown = together = slots(5)
    for T in (1, 1, 7, 1, 40, 1, 1):
        new = slots(T)
        grown, together = append(grown, new), torch.cat((together, new), 1)
        torch.testing.assert_close(grown, together, rtol=0, atol=0)
        assert grown.nbytes == together.nbytes


def test_most_tokens_are_not_copied():
    grown = slots(100)
    places = set()
    for _ in range(1000):
        grown = append(grown, slots(1))
        places.add(grown.untyped_storage().data_ptr())
        assert grown.untyped_storage().nbytes() <= 1.5 * grown.nbytes + 16 * slots(1).nbytes
    assert len(places) <= 8  # about log(11) / log(1.5) buffers


def test_two_continuations_of_one_state_do_not_meet():
    state = append(slots(3), slots(1))
    held, a, b = state.clone(), slots(1), slots(1)
    one, two = append(state, a), append(state, b)
    torch.testing.assert_close(one, torch.cat((held, a), 1), rtol=0, atol=0)
    torch.testing.assert_close(two, torch.cat((held, b), 1), rtol=0, atol=0)
    torch.testing.assert_close(state, held, rtol=0, atol=0)
    # Each goes on by itself, and so does the state once more.
    torch.testing.assert_close(append(one, b), torch.cat((held, a, b), 1), rtol=0, atol=0)
    torch.testing.assert_close(append(two, a), torch.cat((held, b, a), 1), rtol=0, atol=0)
    torch.testing.assert_close(append(state, b), torch.cat((held, b), 1), rtol=0, atol=0)


def test_a_copied_state_goes_on_by_itself():
    state = append(slots(3), slots(1))
    held, twin, a, b = state.clone(), copy.deepcopy(state), slots(1), slots(1)
    one, two = append(state, a), append(twin, b)
    torch.testing.assert_close(one, torch.cat((held, a), 1), rtol=0, atol=0)
    torch.testing.assert_close(two, torch.cat((held, b), 1), rtol=0, atol=0)


def test_gradients_flow_and_nothing_is_written_behind_autograd():
    state = append(slots(3), slots(1))
    new = slots(1).requires_grad_()
    grown = append(state, new)
    grown.square().sum().backward()
    torch.testing.assert_close(new.grad, 2 * new)
    assert append(state, slots(1)).shape[1] == 5


def test_states_cross_inference_mode_both_ways():
    with torch.inference_mode():
        inside = append(slots(3), slots(1))
    outside = append(inside, slots(1))  # an inference tensor may not be written here
    torch.testing.assert_close(outside[:, :4], inside)
    with torch.inference_mode():
        torch.testing.assert_close(append(outside, slots(1))[:, :5], outside)


def test_runs_under_vmap_and_compile():
    x, y = torch.randn(4, 2, 3, 3, 4), torch.randn(4, 2, 1, 3, 4)
    torch.testing.assert_close(torch.vmap(append)(x, y), torch.cat((x, y), 2))
    compiled = torch.compile(append, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x[0], y[0]), torch.cat((x[0], y[0]), 1))


def test_what_does_not_fit_is_refused_as_cat_refuses_it():
    state = append(slots(3), slots(1))
    for new in (slots(1)[..., :1], slots(1)[:1], slots(1, rows=1), slots(1).to("meta")):
        with pytest.raises(RuntimeError):
            torch.cat((state, new), 1)
        with pytest.raises(RuntimeError):
            append(state, new)
    wide = append(state, slots(1).double())
    assert wide.dtype == torch.float64 and append(wide, slots(1)).dtype == torch.float64
    torch.testing.assert_close(append(state, slots(1))[:, :4], state)  # its right is not spent


def test_a_mode_sees_it_called():
    seen = []

    class Watcher(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    state, new = append(slots(3), slots(1)), slots(1)
    with Watcher():
        grown = append(state, new=new)
    assert seen == [append]
    torch.testing.assert_close(grown, torch.cat((state, new), 1))
