"""Two processes compute what one does, with the collectives that ``mhc plan`` counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sharded import FEW, LAYOUTS, B, C, Found, R, S, n, printed_by_others, run, run_and_leave

from mhc_core import DEEPSEEK_V4
from mhc_core.planning import Model, plan

SIZE = 2
REAL = 8  # bytes of a number of the models, whose streams and mappings are float64
STREAMS = REAL * B * S * n * C // SIZE  # the bytes of a process's streams


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what the first of two processes found: this one."""
    folder = str(tmp_path_factory.mktemp("sharded"))
    threads = torch.get_num_threads()
    other = torch.multiprocessing.get_context("spawn").Process(
        target=run_and_leave, args=(1, SIZE, folder, False)
    )
    other.start()
    try:
        result = run(0, SIZE, folder, every=False)
    except BaseException:
        other.kill()  # it waits for this process
        print(printed_by_others(folder))
        raise
    finally:
        torch.set_num_threads(threads)
    other.join()
    assert other.exitcode == 0, printed_by_others(folder)
    return result


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "pipeline"])
def test_losses_and_gradients_are_those_of_one_process(layout: str, found: dict[str, Any]) -> None:
    float32 = layout == "channels, [s, b, n C]"
    assert found[layout].error < (2e-6 if float32 else 1e-11)


def test_ops_on_sharded_tokens_exchange_nothing(found: dict[str, Any]) -> None:
    for op in FEW:
        for layout in ("batch", "sequence"):
            one: Found = found["ops"][f"{op}, {layout}"]
            assert one.error < 2e-6
            assert one.forward == one.backward == []


def test_ops_on_sharded_channels_sum_once_a_pre(found: dict[str, Any]) -> None:
    T, m = B * S, n * n + 2 * n
    sums = {
        "combine_pre": ([m + 1], [n, n + n * n]),
        "head": ([n + 1], [n]),
        "rms_norm": ([1], [1, 1]),
    }
    gathered = {"combine_pre": m, "head": n}  # phi was whole, and so is its gradient
    for op, (forward, backward) in sums.items():
        one: Found = found["ops"][f"{op}, channels"]
        assert one.error < 2e-6
        assert one.forward == [("allreduce", 4 * T * k) for k in forward]
        rows = [gathered[op]] if op in gathered else []
        phi = [("all_gather_into_tensor", 4 * k * n * C // SIZE) for k in rows]
        assert one.backward == [("allreduce", 4 * T * k) for k in backward] + phi


def test_kernels_exchange_what_the_formulas_do(found: dict[str, Any]) -> None:
    kernels: dict[str, Any] = found["kernels"]
    if "skipped" in kernels:
        pytest.skip(kernels["skipped"])
    T, m = 4 * B * S, n * n + 2 * n
    one: Found = kernels["combine_pre"]
    assert one.error < 2e-6
    # forward, backward, and mhc.vjp, which computes again what the forward would have saved
    assert kernels["combine_pre, launched"] == 2 + 6 + (2 + 6)
    assert one.forward == [("allreduce", T * (m + 1))]
    assert one.backward == [("allreduce", T * n), ("allreduce", T * (n + n * n))]
    plain: Found = kernels["plain"]
    assert plain.error < 2e-6
    assert plain.forward == [("allreduce", T * (m + 1))]
    assert plain.backward == [("allreduce", T * (n + n * n)), ("allreduce", T * n)]


def test_a_tensor_parallel_stack_exchanges_what_is_planned(found: dict[str, Any]) -> None:
    model = Model(layers=2, channels=C, n=n, variant=DEEPSEEK_V4)
    planned = plan(model, tokens=B * S, devices=SIZE, layout="channels").communication
    one: Found = found["channels, tensor"]
    into, back = (REAL // 4 * some.size for some in planned)
    sums = [size for kind, size in one.forward if kind == "allreduce"]
    assert sums == [into] * 4 + [REAL * B * S * (n + 1)]  # the head's is last
    # the recomputation sums once more; a combine and the pre before it sum apart
    sums = [size for kind, size in one.backward if kind == "allreduce" and size != into]
    assert sum(sums) == 4 * back + REAL * B * S * n  # the head's
    assert one.backward.count(("allreduce", into)) == 4
    gathers = [size for kind, size in one.forward + one.backward if "gather" in kind]
    assert max(gathers) < STREAMS  # of attention, which needs whole h


def test_gates_sum_mean_squares_and_the_low_rank_products(found: dict[str, Any]) -> None:
    T = REAL * B * S
    one: Found = found["channels, gated"]
    sums = [T * n, T * (R + n), T * n, T * R]  # of the connection, then of the head
    assert one.forward[:4] == [("allreduce", size) for size in sums]
    # computed again; then d(z), and of the norm; H_post's gradient beside the connection's
    pulled = [*sums, T * R, T * n, T * n, T * R, T * n]
    assert sorted(one.backward) == sorted(("allreduce", size) for size in pulled)


def test_context_parallel_gathers_keys_and_values_alone(found: dict[str, Any]) -> None:
    one: Found = found["sequence, context"]
    of_attention = [("all_gather_into_tensor", REAL * B * S * C // SIZE)] * 4
    assert one.forward == [*of_attention, ("all_reduce", REAL)]  # the loss


def test_a_stage_sends_streams_and_in_the_single_pass_the_mix(found: dict[str, Any]) -> None:
    one: Found = found["pipeline, single pass"]
    half = B * S // 2  # of a microbatch
    sent = [size for kind, size in one.forward if kind == "send"]
    assert sent[-4:] == [REAL * half * n * C, REAL * half * n] * 2


def test_what_does_not_fit_is_refused(found: dict[str, Any]) -> None:
    refused: dict[str, str] = found["refused"]
    assert refused["plain"].startswith("aggregate: h_pre is a plain tensor beside DTensors; needs")
    assert refused["streams"].startswith("aggregate: x is sharded along dimension 1, 'n'; needs")
    assert refused["adapted"].startswith("ChannelParallel: a projection of the gates is quantised ")
    assert refused["odd"] == "contract: C is 17; needs a multiple of the 2 devices that share"
    assert refused["op"].startswith("pre_scale: x is sharded along dimension 1, 'D'; needs")
    assert refused["plain op"].startswith("pre_scale: it takes no sharded channels; of the ops,")
    assert "takes whole tokens, not their parts on devices of torch" in refused["numpy"]
    assert "gradients of gradients (create_graph=True) need whole channels" in refused["twice"]
    for way in ("twice, vjp", "twice, vjp of DTensors"):
        assert refused[way] == refused["twice"]
    assert "A different number of tensors was saved" in refused["recomputed outside"]
    for way in ("vmap", "compile"):
        assert "channels_over: a sum over the processes" in refused[way]
