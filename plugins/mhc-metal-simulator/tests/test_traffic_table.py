"""The table of docs/kernels.md: its counts, that it is up to date, and the limits that hold."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import mhc_metal_simulator as simulator

mhc = pytest.importorskip("mhc_core", reason="mhc-core is not installed, whose kernels these are")

from kernel_checks import Fault, seeded  # noqa: E402
from mhc_backends.kernels.ops import OPS  # noqa: E402
from mhc_conformance.cases import PROJECTED_OR_MIXED  # noqa: E402
from mhc_core import math  # noqa: E402

from mhc_metal_simulator import traffic  # noqa: E402
from mhc_metal_simulator.engine import Traffic  # noqa: E402
from mhc_metal_simulator.traffic import DEFAULTS, Launched, Row, Size, measure  # noqa: E402

T, N, C = DEFAULTS.T, DEFAULTS.n, DEFAULTS.C
STREAMS, LAYER = T * N * C * 2, T * C * 2  # bytes in bfloat16
PHI = (N * N + 2 * N) * N * C * 4
DOCUMENT = Path(__file__).parents[3] / "docs" / "kernels.md"


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return {row.name: row for row in measure()}


def test_the_table_of_the_docs_is_what_the_command_writes(rows: dict[str, Row]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    new = traffic.rewritten(text, traffic.table(rows.values(), DEFAULTS))
    assert new == text, "python -m mhc_metal_simulator.traffic --write docs/kernels.md"


# ---- the limits ----------------------------------------------------------------------------------


def test_every_op_has_its_rows(rows: dict[str, Row]) -> None:
    ops = mhc.backends()["mlx-metal-simulator"].spec.ops
    twice = [op for op in ops for _ in range(4 if op in PROJECTED_OR_MIXED else 2)]
    assert [row.op for row in rows.values()] == twice
    assert ops == OPS  # every op that has kernels


@pytest.mark.parametrize(
    "name",
    [
        "aggregate",
        "combine",
        "combine vjp",
        "combine, no H_res",
        "combine vjp, no H_res",
        "residual_add_aggregate",
        "static_layer",
    ],
)
def test_each_input_is_read_once_and_each_output_written_once(
    rows: dict[str, Row], name: str
) -> None:
    together = rows[name].together
    assert together.ideal <= together.total <= 1.05 * together.ideal


@pytest.mark.parametrize("op", PROJECTED_OR_MIXED)
@pytest.mark.parametrize("vjp", ["", " vjp"])
def test_without_h_res_fewer_bytes_move(rows: dict[str, Row], op: str, vjp: str) -> None:
    mixed, unmixed = (rows[f"{op}{vjp}{end}"].together for end in ("", ", no H_res"))
    assert unmixed.total < mixed.total
    assert unmixed.read <= mixed.read
    assert unmixed.written <= mixed.written
    assert len(rows[f"{op}{vjp}, no H_res"].launches) <= len(rows[f"{op}{vjp}"].launches)


class Limit(NamedTuple):
    """The bytes that an op with a projection may move: every access, of streams and layers."""

    read: int
    written: int
    phi: int


LIMITS = {
    "mappings": Limit(STREAMS, 0, PHI),
    "pre": Limit(2 * STREAMS, LAYER, PHI),
    "combine_pre": Limit(2 * STREAMS + LAYER, STREAMS + LAYER, PHI),
    # four columns of phi in a tile of eight: where there is none, the last one is read again
    "head": Limit(2 * STREAMS, LAYER, 2 * N * N * C * 4),
    "pre, no H_res": Limit(2 * STREAMS, LAYER, 2 * N * N * C * 4),
    "combine_pre, no H_res": Limit(2 * STREAMS + LAYER, STREAMS + LAYER, 2 * N * N * C * 4),
}


@pytest.mark.parametrize("name", LIMITS)
def test_streams_are_read_at_most_once_more(rows: dict[str, Row], name: str) -> None:
    """Check also phi: read at most once for every 16 tokens, counting all threads' accesses."""
    together, limit = rows[name].together, LIMITS[name]
    assert 0 < together.read <= limit.read
    assert together.written == limit.written
    assert limit.phi <= together.phi <= T // 16 * limit.phi


DECODE = Size(T=1)


@pytest.mark.parametrize(
    ("op", "launches"), [("pre", 2), ("combine", 1), ("combine_pre", 2), ("aggregate", 1)]
)
def test_launches_of_one_token(op: str, launches: int) -> None:
    forwards = [row for row in measure(DECODE, [op]) if not row.vjp]
    assert all(1 <= len(row.launches) <= launches for row in forwards)


# ---- what is counted -----------------------------------------------------------------------------


def _launched(kernel: str, op: str, **arrays: tuple[Traffic, tuple[int, ...]]) -> Launched:
    counted = {name: traffic for name, (traffic, _) in arrays.items()}
    shapes = {name: shape for name, (_, shape) in arrays.items()}
    launch = simulator.LaunchRecord(kernel, (1, 1, 1), (1, 1, 1), 0, counted, "", shapes)
    return Launched.of(launch, math.load(op).OP, Size(T=7, n=2, C=5))


def test_arrays_are_sorted_by_the_declaration_and_their_shapes() -> None:
    twice = Traffic("input", 10, 20, 0, 10, 0)
    stored = Traffic("output", 40, 0, 40, 0, 40)
    made = _launched(
        "mhc_combine_project_float32_float32",
        "combine_pre",
        x=(twice, (7, 2, 5)),
        x_shape=(Traffic("metadata", 12, 12, 0, 12, 0), ()),
        h_post=(twice, (7, 2)),
        an_unknown_mapping=(twice, (7, 2, 2)),
        scale=(twice, (3,)),
        phi=(twice, (8, 10)),
        partials=(stored, (7, 1, 8)),
        out=(stored, (7, 2, 5)),
    )
    assert made == Launched(read=20, written=40, phi=20, sums=40, small=30, ideal=130)
    assert made.total == 150
    adding = _launched("mhc_sum_rows_float32", "pre", a=(twice, (7, 9)), out=(stored, (1, 9)))
    assert (adding.read, adding.written, adding.sums) == (0, 0, 60)
    normed = _launched("mhc_rms_norm_vjp_float32", "rms_norm", dweight=(stored, (7, 5)))
    assert (normed.written, normed.sums) == (0, 40)
    matrices = _launched("mhc_sinkhorn_float32", "sinkhorn", any_name=(twice, (7, 2, 2)))
    assert (matrices.read, matrices.small) == (20, 0)
    both = Launched.together([made, adding], ideal=7)
    assert both == Launched(read=20, written=40, phi=20, sums=100, small=30, ideal=7)


def test_what_a_vjp_need_not_move_follows_from_the_maths() -> None:
    moved = {op: (traffic.unread(op), traffic.repeated(op)) for op in OPS}
    assert {op: sorted(names) for op, (names, _) in moved.items() if names} == {
        "contract": ["x"],
        "expand": ["h"],
    }
    assert {op: sorted(names) for op, (_, names) in moved.items() if names} == {
        "residual_add_aggregate": ["res"]
    }


def test_the_ideal_follows_from_the_declaration() -> None:
    x, layer = np.zeros((3, 4, 8), np.float32), np.zeros((3, 8), np.float32)
    h_pre, streams = np.zeros((3, 4), np.float32), 3 * 4 * 8 * 4
    one, few = streams // 4, 3 * 4 * 4
    assert traffic.ideal("aggregate", False, (x, h_pre), (layer,)) == streams + few + one
    assert traffic.ideal("aggregate", True, (x, h_pre), (layer,)) == 2 * (streams + few) + one
    assert traffic.ideal("contract", True, (x,), (layer,)) == one + streams
    assert traffic.ideal("expand", True, (layer,), (x,)) == streams + one
    added = (x, x, h_pre), (x, layer)
    assert traffic.ideal("residual_add_aggregate", False, *added) == 3 * streams + few + one
    assert traffic.ideal("residual_add_aggregate", True, *added) == 4 * streams + 2 * few + one


def test_a_kernel_that_reads_again_for_every_stream_is_seen() -> None:
    wasteful = "value(res, i * N + j), load<W>(streams + j * C + c)"
    with seeded(Fault("combine", "again", "value(res, i * N + j), xs[j]", wasteful, "")):
        forward, *_ = measure(Size(T=3, C=64), ["combine"])
    together = forward.together
    assert together.read == N * 3 * N * 64 * 2 + 3 * 64 * 2
    assert together.total > 1.05 * together.ideal


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_prints_a_line_per_launch(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--T", "3", "--n", "2", "--C", "32", "--dtype", "float32"]
    traffic.main([*sizes, "--op", "contract", "--op", "rms_norm"])
    title, _, head, _, *lines = capsys.readouterr().out.splitlines()
    assert title == "T=3, n=2, C=32, float32 streams; in KiB."
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert all(line.count("|") == head.count("|") for line in lines)
    assert cells[0][:3] == ["**contract**", "`aggregate`", "0.8"]
    assert cells[1][:2] == ["**contract vjp**", "none: MLX's own operations"]
    assert cells[2][:2] == ["**rms_norm**", "`rms_norm`"]
    assert cells[3][:2] == ["**rms_norm vjp**", "2 launches"]
    assert [line.split("`")[1] for line in lines[4:]] == ["rms_norm_vjp", "sum_rows"]


def test_the_command_writes_between_the_marks(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text(f"before\n{traffic.BEGIN}\nold\n{traffic.END}\nafter\n")
    command = ["--T", "1", "--C", "8", "--op", "contract", "--write", str(file)]
    traffic.main(command)
    first = file.read_text()
    traffic.main(command)
    assert file.read_text() == first
    assert first.startswith(f"before\n{traffic.BEGIN}\n\nT=1, n=4, C=8, bfloat16")
    assert first.endswith(f"|\n\n{traffic.END}\nafter\n")
    assert "old" not in first
    file.write_text("no marks")
    with pytest.raises(ValueError, match="the table begins"):
        traffic.main(command)
    assert file.read_text() == "no marks"
