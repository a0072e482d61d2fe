"""One step: which logits come back, how rows are padded, and that a failure gives back what was reserved."""

import random

import pytest
import torch
from torch import Tensor

from kvist.base.errors import ConfigError, InvariantError, NumericsError, OutOfBlocks
from kvist.cache.codecs import codec
from kvist.cache.layout import plan_layout
from kvist.cache.manager import Lease
from kvist.cache.spec import Window, key_value
from kvist.models.load import build
from kvist.ops.backend import select
from kvist.runtime.batch import Work, build_batch, pad_rows
from kvist.runtime.runner import Runner
from kvist.runtime.widths import Widths
from oracle import GPT2, LLAMA, feed, fresh, make_runner, tokens_of


def holdings(runner: Runner) -> list[tuple[int, list[int], int, int]]:
    return [(lease.id, lease.table.copy(), lease.length, lease.reserved) for lease in runner.manager.leases]


@pytest.mark.parametrize("wanted", [0, 1, 7, 70])
def test_as_many_rows_of_logits_come_back_as_were_wanted(wanted: int) -> None:
    """70 rows are more than the widest head step, so they come in parts."""
    runner = make_runner()
    tokens = tokens_of(random.Random(0), 70)
    expected = fresh(runner, tokens)
    lease, other = runner.manager.open(), runner.manager.open()
    assert runner.head_widths.most < 70
    first, second = runner.run([Work(lease, tokens, wanted), Work(other, tokens[:5], 2)])
    assert torch.equal(first, expected[70 - wanted :])
    assert torch.equal(second, expected[3:5])
    assert (first.dtype, tuple(first.shape)) == (torch.float32, (wanted, LLAMA.vocab_size))
    assert (lease.length, other.length) == (70, 5)


def test_a_batch_lays_rows_side_by_side_and_pads_them() -> None:
    """Two sequences, one in the middle of its second block, in a step of 4 + 1 rows padded to 8."""
    one, two = Lease(0, table=[5, 2, 7], length=63, reserved=4), Lease(1, table=[1], length=0, reserved=1)
    batch = build_batch([Work(one, [10, 11, 12, 13], 2), Work(two, [20], 1)], 64, Widths((4, 8, 16)))
    assert batch.tokens.tolist() == [10, 11, 12, 13, 20, 0, 0, 0]
    assert batch.positions.tolist() == [63, 64, 65, 66, 0, 0, 0, 0]
    assert batch.step.slots[0].tolist() == [5 * 64 + 63, 2 * 64, 2 * 64 + 1, 2 * 64 + 2, 64, -1, -1, -1]
    assert batch.step.tables[0].tolist() == [[5, 2, 7], [1, -1, -1]]
    assert batch.step.starts.tolist() == [0, 4, 5]
    assert batch.step.lengths.tolist() == [67, 1]
    assert batch.logit_rows == [2, 3, 4]
    assert pad_rows(batch.logit_rows, Widths((4, 8))).tolist() == [2, 3, 4, 0]


def test_work_wants_no_more_logits_than_it_has_tokens() -> None:
    with pytest.raises(ValueError, match="a step of 2 tokens has no 3 rows of logits"):
        Work(Lease(0), [1, 2], 3)
    with pytest.raises(ValueError, match="no -1 rows"):
        Work(Lease(0), [1, 2], -1)


def test_a_step_that_does_not_fit_changes_nothing() -> None:
    runner = make_runner(blocks=3)
    one, two = runner.manager.open(), runner.manager.open()
    feed(runner, one, [1] * 60)
    before = holdings(runner)
    with pytest.raises(OutOfBlocks, match="1 free blocks and this step needs 2"):
        runner.run([Work(one, [1] * 10), Work(two, [2] * 100)])
    assert holdings(runner) == before
    runner.manager.check()
    # The same works, one after the other, as far as there is room.
    runner.run([Work(one, [1] * 4), Work(two, [2] * 100)])
    runner.manager.check()


def test_a_step_that_is_too_wide_changes_nothing() -> None:
    runner = make_runner()
    lease = runner.manager.open()
    with pytest.raises(ValueError, match="a step of 513 rows is wider than 512"):
        runner.run([Work(lease, [1] * 513)])
    assert (lease.table, lease.length, lease.reserved, runner.manager.pool.used) == ([], 0, 0, 0)


def test_a_lease_twice_in_one_step_is_refused_and_an_ended_one_too() -> None:
    runner = make_runner()
    lease, ended = runner.manager.open(), runner.manager.open()
    feed(runner, lease, [1] * 60)
    runner.manager.release(ended)
    before = holdings(runner)
    for works in ([Work(lease, [1]), Work(lease, [1])], [Work(lease, [1] * 9), Work(ended, [1])]):
        with pytest.raises(InvariantError):
            runner.run(works)
        assert holdings(runner) == before
        runner.manager.check()


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_numbers_that_are_not_finite_are_an_error_and_leave_no_trace(config: object) -> None:
    """Damaged weights are noticed even where they were damaged before the widths were probed."""
    runner = make_runner(config)  # type: ignore[arg-type]
    tokens = tokens_of(random.Random(0), 100)
    expected = fresh(runner, tokens)
    lease = runner.manager.open()
    feed(runner, lease, tokens[:80])
    before = holdings(runner)
    weight = runner.model.linears()[1][0]
    kept = weight.clone()
    weight[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="not finite numbers"):
        runner.run([Work(lease, tokens[80:])])
    assert Runner(runner.model, runner.layout, 2, runner.backend).widths == runner.widths
    assert holdings(runner) == before
    runner.manager.check()
    # The blocks that held NaN are used again, and nothing of it is seen.
    weight.copy_(kept)
    assert torch.equal(runner.run([Work(lease, tokens[80:], 20)])[0], expected[80:])
    runner.manager.rollback(lease, 70)
    assert torch.equal(feed(runner, lease, tokens[70:]), expected[70:])


def test_an_interrupted_step_gives_back_what_was_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner()
    lease = runner.manager.open()
    feed(runner, lease, [1] * 60)
    before = holdings(runner)

    def interrupted(_: object) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "_forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run([Work(lease, [1] * 30)])
    assert holdings(runner) == before
    runner.manager.check()


def test_windows_with_sinks_are_refused() -> None:
    backend = select("cpu", torch.float32, 8, 64, "reference")
    model = build(LLAMA, backend, torch.float32)
    specs = [key_value(2, 8), key_value(2, 8, Window(64, sinks=4))]
    with pytest.raises(ConfigError, match="sinks"):
        Runner(model, plan_layout(specs, codec("fp32")), 4, backend)


def test_capacity_is_used_to_the_last_token() -> None:
    runner = make_runner(blocks=2)
    tokens = tokens_of(random.Random(0), 128)
    lease = runner.manager.open()
    whole = feed(runner, lease, tokens, [100, 28])
    assert runner.manager.pool.free == 0
    with pytest.raises(OutOfBlocks):
        runner.run([Work(lease, [1])])
    runner.manager.rollback(lease, 127)
    assert torch.equal(runner.run([Work(lease, tokens[127:])])[0], whole[127:])
