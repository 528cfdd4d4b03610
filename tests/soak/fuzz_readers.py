"""Damaged and hostile files through every reader: nothing is lost, changed, or slow.

``python tests/soak/fuzz_readers.py --files 100000 --seed 1``

Each file is a good one, damaged: bytes (bits, cuts, pieces moved, noise), or what they mean (JSON's
values, the names, dtypes, shapes and offsets of a safetensors header, with a length that fits).
Lost is a file after which a reader

- raised anything but the errors that it documents, or not in its own words,
- took what it can know to be damaged,
- changed a file, or the model that it was to load into,
- or took more than a second.

CI runs 2,000 files. The figures of whole runs are in docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SLOW = 1.0  # seconds of this process
LONGEST = 4000  # characters of an error: the file's own content must not fill a screen

Files = dict[str, bytes]


@dataclass
class Outcome:
    """The result of one file in a reader."""

    kind: str  # "taken", the name of a documented error, or what is wrong
    lost: bool
    detail: str = ""


@dataclass
class Reader:
    """One reader: its good files, and how it reads them."""

    name: str
    good: list[Files]
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...]
    words: str  # with which its errors begin, or that they have; {folder} is where the file lies
    checked: bool = False  # whether it can know of any damage, as by a hash
    unchanged: Callable[[], bool] = field(default=lambda: True)

    def outcome(self, folder: Path, files: Files) -> Outcome:
        """Read the files in the folder, and judge the outcome."""
        start = time.process_time()
        try:
            self.read(folder)
        except self.errors as error:
            words = self.words.format(folder=folder)
            good = words in str(error) and len(str(error)) <= LONGEST
            found = Outcome(type(error).__name__, not good, "" if good else str(error)[:LONGEST])
            if not self.unchanged():
                return Outcome("an error that changed the model", True)
        except BaseException as error:
            found = Outcome(f"raised {type(error).__name__}", True, str(error)[:LONGEST])
        else:
            damaged = all(meaning(files) != meaning(good) for good in self.good)
            found = Outcome("taken", self.checked and damaged)
        if time.process_time() - start > SLOW:
            return Outcome(f"slow, {found.kind}", True)
        if files != contents(folder):
            return Outcome(f"changed a file, {found.kind}", True)
        return found


# ---- the readers ---------------------------------------------------------------------------------


def contents(folder: Path) -> Files:
    """Return every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def meaning(files: Files) -> dict[str, Any]:
    """Return the content of files: a safetensors header may have its spaces elsewhere."""
    said: dict[str, Any] = dict(files)
    for name, content in files.items():
        if name.endswith(".safetensors"):
            end = 8 + struct.unpack("<Q", content[:8])[0]
            said[name] = json.loads(content[8:end]), content[end:]
    return said


def checkpoints(scratch: Path) -> Reader:
    """Return the reader ``load_hyper_connections``, of files and folders, into a model or not."""
    import mlx.core as mx
    from mlx import nn, utils

    from mhc_core import DEEPSEEK_V4
    from mhc_core.mlx import HyperConnection, HyperHead, load_hyper_connections

    n, dims = 2, 3
    shapes = {"fn": (8, n * dims), "base": (8,), "scale": (3,)}
    heads = {"fn": (n, n * dims), "base": (n,), "scale": (1,)}
    layers = {
        f"model.layers.{k}.{part}_hc.{name}": mx.zeros(shape, mx.bfloat16)
        for k in range(2)
        for part in ("attn", "ffn")
        for name, shape in shapes.items()
    }
    head = {f"model.hc_head.hc_{name}": mx.zeros(shape) for name, shape in heads.items()}
    other = {"model.embed.weight": mx.zeros((2, 2)), "mtp.0.hc_attn_fn": mx.zeros((1,))}
    config = {
        "model_type": "deepseek_v4",
        "num_hidden_layers": 2,
        "hc_mult": n,
        "hc_eps": 1e-6,
        "hc_sinkhorn_iters": 20,
        "rms_norm_eps": 1e-6,
    }
    shards = {"a.safetensors": layers | other, "b.safetensors": head}
    index = {name: file for file, tensors in shards.items() for name in tensors}
    alone = {"model.safetensors": stored(scratch, layers | head | other)}
    as_json = json.dumps(config).encode()
    nested = json.dumps({"text_config": config}).encode()
    sharded = {name: stored(scratch, tensors) for name, tensors in shards.items()}
    named = json.dumps({"metadata": {}, "weight_map": index}).encode()
    good: list[Files] = [
        alone,
        alone | {"config.json": as_json},
        sharded | {"config.json": nested, "model.safetensors.index.json": named},
    ]

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn_hc = HyperConnection(dims, n, DEEPSEEK_V4)
            self.ffn_hc = HyperConnection(dims, n, DEEPSEEK_V4)

    model = nn.Module()
    model.layers = [Layer() for _ in range(2)]
    model.hc_head = HyperHead(dims, n, DEEPSEEK_V4)
    before = dict(utils.tree_flatten(model.parameters()))

    def unchanged() -> bool:
        after = dict(utils.tree_flatten(model.parameters()))
        return all(after[name] is array for name, array in before.items())

    def read(folder: Path) -> None:
        single = folder / "model.safetensors"
        load_hyper_connections(single if single.exists() else folder)
        load_hyper_connections(folder, model)
        model.update(utils.tree_unflatten(list(before.items())))

    return Reader(
        "load_hyper_connections",
        good,
        read,
        (TypeError, ValueError, FileNotFoundError),
        "load_hyper_connections: ",
        unchanged=unchanged,
    )


def families(scratch: Path) -> Reader:
    """Return the reader of the families' names, with modules for MLX."""
    from mhc_core.mlx import load_hyper_connections

    return _of_families(scratch, "load_hyper_connections of families", load_hyper_connections)


def torch_families(scratch: Path) -> Reader:
    """Return the reader of the families' names, with modules for PyTorch, into a model or not."""
    import torch
    from mhc_torch import load_hyper_connections
    from mhc_torch.nn import HyperConnection, HyperHead

    from mhc_core import HY_V4

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Module()])
    for part in ("attn_hc", "ffn_hc"):
        model.layers[0].add_module(part, HyperConnection(3, 2, HY_V4))
    model.hc_head = HyperHead(3, 2, HY_V4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def unchanged() -> bool:
        return all(torch.equal(before[name], one) for name, one in model.state_dict().items())

    def load(folder: Path) -> None:
        load_hyper_connections(folder)
        config = folder / "config.json"
        if config.exists() and b'"hy_v4"' in config.read_bytes():
            load_hyper_connections(folder, model)
            model.load_state_dict(before)

    return _of_families(scratch, "mhc_torch.load_hyper_connections", load, unchanged)


def _of_families(
    scratch: Path,
    name: str,
    load: Callable[[Path], Any],
    unchanged: Callable[[], bool] = lambda: True,
) -> Reader:
    """Return a reader of small checkpoints under the names of HY-V4, Xing4.0 and Qwen4-Exp."""
    n, dims, rank = 2, 3, 2
    wide = n * dims
    identity = {"fn": (2 * n, wide), "base": (2 * n,), "scale": (2,)}
    sinkhorn = {"fn": (8, wide), "base": (8,), "scale": (3,)}
    head = {"fn": (n, wide), "base": (n,), "scale": (1,)}
    gates = {
        "hc_norm": (wide,),
        "input_mix_weight_down": (rank, wide),
        "input_mix_weight_up": (wide, rank),
    }
    parts = ("attn", "mlp")
    named = {
        "hy_v4": {
            f"model.layers.0.hc_{part}_layer.hc_pre.hc_{one}": shape
            for part in parts
            for one, shape in identity.items()
        }
        | {f"model.hc_head.hc_head_{one}": shape for one, shape in head.items()},
        "xing4_0": {
            f"model.layers.0.{part}_hc.hc_{one}": shape
            for part in ("attn", "ffn")
            for one, shape in sinkhorn.items()
        },
        "qwen4_exp": {
            f"model.layers.0.{part}_hyper_connection.{one}.weight": shape
            for part in parts
            for one, shape in {**gates, "block_inject_weight": (n, wide)}.items()
        }
        | {f"model.hyper_connection_mixer.{one}.weight": shape for one, shape in gates.items()},
    }
    fields = {
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-6,
        "hc_eps": 1e-6,
        "hc_magnitude": 2.0,
        "hc_sinkhorn_iters": 3,
        "mhc_h_res_clamp_min": -30.0,
        "mhc_h_res_clamp_max": 30.0,
    }
    good: list[Files] = []
    for kind, shapes in named.items():
        count = "hc_count" if kind == "qwen4_exp" else "hc_mult"
        config = {"model_type": kind, count: n, **fields}
        weights = {"model.safetensors": stored(scratch, shapes)}
        good += [weights, weights | {"config.json": json.dumps(config).encode()}]
    good.append({"model.safetensors": stored(scratch, _quantised_gates())})
    errors = (TypeError, ValueError, FileNotFoundError)
    return Reader(name, good, load, errors, "load_hyper_connections: ", unchanged=unchanged)


def _quantised_gates() -> dict[str, Any]:
    """Return a layer of Qwen4-Exp whose matrices MLX quantised, in two of its modes."""
    import numpy as np

    n, wide, rank = 2, 32, 32
    rows = {"input_mix_weight_down": rank, "input_mix_weight_up": wide, "block_inject_weight": n}
    found: dict[str, Any] = {}
    for part in ("attn", "mlp"):
        start = f"model.layers.0.{part}_hyper_connection"
        found[f"{start}.hc_norm.weight"] = np.zeros(wide, np.float32)
        for name, count in rows.items():
            found[f"{start}.{name}.weight"] = np.zeros((count, 4), np.uint32)
            dtype = np.float32 if part == "attn" else np.uint8
            for beside in ("scales", "biases")[: 2 if part == "attn" else 1]:
                found[f"{start}.{name}.{beside}"] = np.ones((count, 1), dtype)
    return found


def stored(scratch: Path, tensors: dict[str, Any]) -> bytes:
    """Return a safetensors file of arrays of MLX or NumPy, or of zeros in these shapes."""
    import numpy

    file = scratch / "made.safetensors"
    if all(isinstance(one, (tuple, numpy.ndarray)) for one in tensors.values()):
        from safetensors.numpy import save_file

        made = {
            name: numpy.zeros(one, "f4") if isinstance(one, tuple) else one
            for name, one in tensors.items()
        }
        save_file(made, file)
    else:
        import mlx.core as mx

        mx.save_safetensors(str(file), tensors)
    content = file.read_bytes()
    file.unlink()
    return content


def demo(scratch: Path) -> Reader:
    """Return the reader of the checkpoints that ``mhc demo --resume`` continues from."""
    import numpy

    from mhc_core.cli.demo import _checkpoint
    from mhc_core.cli.demo._settings import Settings

    groups = {
        group: {"a": numpy.arange(6, dtype="f4").reshape(2, 3), "b": numpy.zeros(0)}
        for group in ("parameters", "first", "second", "history")
    }
    made = Settings(
        depth=4, width=8, heads=2, context=8, batch=2, steps=40, rate=0.01, seed=0, text="",
        backend="jax",
    )  # fmt: skip
    file = scratch / "mHC.safetensors"
    _checkpoint.save(file, _checkpoint.Checkpoint(step=29, **groups), made, "mHC")
    good = {"mHC.safetensors": file.read_bytes()}
    file.unlink()

    def read(folder: Path) -> None:
        back = _checkpoint.load(folder / "mHC.safetensors", made, "mHC")
        assert back.step == 29

    return Reader(
        "mhc demo --resume",
        [good],
        read,
        (_checkpoint.CheckpointError,),
        "{folder}/mHC.safetensors",
        checked=True,
    )


def tuning(scratch: Path) -> Reader:
    """Return the reader of ``MHC_KERNEL_TUNING``."""
    from mhc_backends.kernels import launch, table

    def read(folder: Path) -> None:
        os.environ[table.VARIABLE] = str(folder / "tuning.json")
        table._tuned.cache_clear()  # pyright: ignore[reportPrivateUsage]
        try:
            launch.launch("combine", 64, 4, 512, "float32")
        finally:
            del os.environ[table.VARIABLE]

    text = {
        "combine": {"threads": 128, "elements": 4},
        "aggregate": {"iterations": 1, "resident": 2},
    }
    good = {"tuning.json": json.dumps(text).encode()}
    return Reader(
        table.VARIABLE, [good], read, (ValueError,), f"{table.VARIABLE}={{folder}}/tuning.json"
    )


def simulator(scratch: Path) -> Reader:
    """Return the reader of the simulator's cache, which compiles a damaged entry again."""
    from mhc_metal_simulator import compiler

    entry = scratch / "entry.so"
    (scratch / "built").write_bytes(b"\x7fELF" + random.Random(0).randbytes(400))
    compiler._keep(scratch / "built", entry)  # pyright: ignore[reportPrivateUsage]
    good = {"entry.so": entry.read_bytes()}
    entry.unlink()

    def read(folder: Path) -> None:
        if not compiler._is_whole(folder / "entry.so"):  # pyright: ignore[reportPrivateUsage]
            raise FileNotFoundError("compiled again")

    return Reader(
        "simulator's cache", [good], read, (FileNotFoundError,), "compiled again", checked=True
    )


# ---- the damage ----------------------------------------------------------------------------------


class Damage:
    """The damage that turns a good set of files into a bad one."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def __call__(self, files: Files) -> Files:
        """Damage one of the files, one to three times over."""
        name = self.rng.choice(sorted(files))
        content = files[name]
        for _ in range(self.rng.choice((1, 1, 1, 2, 3))):
            content = self._damaged(name, content)
        return files | {name: content}

    def _damaged(self, name: str, content: bytes) -> bytes:
        kind = self.rng.random()
        try:
            if kind < 0.35:
                return self._meaning(name, content)
        except (ValueError, RecursionError, struct.error, AttributeError):
            pass  # so damaged that it means nothing any more
        return self.rng.choice(self._of_bytes)(content)

    @cached_property
    def _of_bytes(self) -> Sequence[Callable[[bytes], bytes]]:
        return (
            self._flip, self._flip, self._flip, self._byte, self._cut, self._longer, self._moved,
            self._doubled, self._without, self._noise, self._other,
        )  # fmt: skip

    def _at(self, content: bytes) -> int:
        """Return a position, more often among the first bytes, where headers are."""
        end = self.rng.choice((16, 200, len(content) + 1))
        return self.rng.randrange(min(end, len(content) + 1))

    def _flip(self, content: bytes) -> bytes:
        if not content:
            return content
        at = min(self._at(content), len(content) - 1)
        flipped = content[at] ^ (1 << self.rng.randrange(8))
        return content[:at] + bytes([flipped]) + content[at + 1 :]

    def _byte(self, content: bytes) -> bytes:
        at = self._at(content)
        return content[:at] + self.rng.randbytes(1) + content[at + 1 :]

    def _cut(self, content: bytes) -> bytes:
        return content[: self._at(content)]

    def _longer(self, content: bytes) -> bytes:
        return content + self.rng.randbytes(self.rng.randrange(1, 64))

    def _moved(self, content: bytes) -> bytes:
        a, b = sorted((self._at(content), self._at(content)))
        return content[b:] + content[a:b] + content[:a]

    def _doubled(self, content: bytes) -> bytes:
        a, b = sorted((self._at(content), self._at(content)))
        return content[:b] + content[a:b] + content[b:]

    def _without(self, content: bytes) -> bytes:
        a, b = sorted((self._at(content), self._at(content)))
        return content[:a] + content[b:]

    def _noise(self, content: bytes) -> bytes:
        return self.rng.randbytes(self.rng.randrange(200))

    def _other(self, content: bytes) -> bytes:
        return self.rng.choice(
            (
                b"",
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
                b"<!DOCTYPE html><html><body>404</body></html>",
                b"\xef\xbb\xbf" + content,
                b"\xff\xfe" + content,
                b"[" * 50_000,
                b'{"a":' * 20_000,
                b"PK\x03\x04" + content,
                struct.pack("<Q", 2**63) + content[8:],
                b"null",
                b"[]",
                b"{}",
            )
        )

    def _meaning(self, name: str, content: bytes) -> bytes:
        if name.endswith(".json"):
            return json.dumps(self._value(json.loads(content))).encode()
        if not name.endswith(".safetensors"):
            raise ValueError(name)
        (length,) = struct.unpack("<Q", content[:8])
        header = json.dumps(self._value(json.loads(content[8 : 8 + length]))).encode()
        return struct.pack("<Q", len(header)) + header + content[8 + length :]

    def _value(self, value: Any) -> Any:
        """Change something inside a JSON value."""
        if isinstance(value, dict) and value and self.rng.random() < 0.9:
            changed = dict(value)
            key = self.rng.choice(sorted(changed))
            kind = self.rng.random()
            if kind < 0.15:
                del changed[key]
            elif kind < 0.4:
                changed[self._name(key)] = changed.pop(key)
            else:
                changed[key] = self._value(changed[key])
            return changed
        if isinstance(value, list) and value and self.rng.random() < 0.7:
            at = self.rng.randrange(len(value))
            return [*value[:at], self._value(value[at]), *value[at + 1 :]]
        if isinstance(value, str) and self.rng.random() < 0.5:
            return self._name(value)
        return self.rng.choice(self._values)

    def _name(self, name: str) -> str:
        kind = self.rng.randrange(5)
        if kind == 0:
            return name[: self.rng.randrange(len(name) + 1)]
        if kind == 1:
            return self.rng.choice(self._names)
        if kind == 2:
            return self.rng.choice(("model.", "decoder.", "../", "/", "_orig_mod.")) + name
        if kind == 3:
            return name + self.rng.choice((".weight", ".scales", "\0", "\ud800", "x" * 5000))
        return name.replace(
            ".1.", self.rng.choice((".2.", ".01.", ".30000000.", f".{'9' * 5000}."))
        )

    _names = (
        "", "model.layers.0.attn_hc.fn", "layers.0.hc_attn_fn", "model.hc_head.hc_fn", "hc_head_fn",
        "mtp.0.hc_head_fn", "layers.30000000.hc_attn_fn", "../b.safetensors", "/dev/zero",
        "b.safetensors", "num_hidden_layers", "text_config", "weight_map", "__metadata__",
        "model.layers.0.attn_hc.hc_fn", "model_type", "hy_v4", "xing4_0", "qwen4_exp", "glm5_next",
        "kimi_k3", "combine", "threads", "F64", "F8_E4M3", "BF16", "U8", "U32", "content", "step",
    )  # fmt: skip

    _values: Sequence[Any] = (
        None, True, False, 0, 1, -1, 2, 3, 29, 10**9, 2**63, 10**400, -(10**400), 0.5, 1e308,
        1e-320, float("nan"), float("inf"), "", "1", "F32", "F16", "I64", "Q4", [], [0],
        [2**62, 2], [0, 2**63], {}, {"a": {}}, [[[[]]]], "x" * 3000,
    )  # fmt: skip


# ---- a run ---------------------------------------------------------------------------------------

READERS: dict[str, Callable[[Path], Reader]] = {
    "checkpoints": checkpoints,
    "families": families,
    "torch": torch_families,
    "demo": demo,
    "tuning": tuning,
    "simulator": simulator,
}


def available() -> list[str]:
    """Return the readers that are installed: MLX may be missing, and the simulator is a plugin."""
    needs = {
        "checkpoints": "mlx",
        "families": "mlx",
        "torch": "mhc_torch",
        "simulator": "mhc_metal_simulator",
    }
    return [name for name in READERS if name not in needs or find_spec(needs[name])]


def run(name: str, files: int, seed: int, folder: Path, keep: Path | None = None) -> Counter[str]:
    """Put damaged files through a reader and count the outcomes; losses are named "lost: ..."."""
    scratch, place = folder / "made", folder / "read"
    scratch.mkdir()
    reader = READERS[name](scratch)
    damage = Damage(random.Random(f"{name} {seed}"))
    counts: Counter[str] = Counter()
    for good in reader.good:  # what is not damaged is taken
        write(place, good)
        found = reader.outcome(place, good)
        if found.kind != "taken":
            raise SystemExit(f"{name}: a good file is refused: {found}")
    for k in range(files):
        damaged = damage(damage.rng.choice(reader.good))
        write(place, damaged)
        found = reader.outcome(place, damaged)
        counts[f"lost: {found.kind}" if found.lost else found.kind] += 1
        if found.lost and keep is not None:
            write(keep / f"{name}-{k}", damaged)
            (keep / f"{name}-{k}.txt").write_text(f"{found}\n", errors="replace")
    return counts


def write(place: Path, files: Files) -> None:
    """Replace a folder's content."""
    place.mkdir(parents=True, exist_ok=True)
    for path in place.iterdir():
        if path.name not in files:
            path.unlink()
    for name, content in files.items():
        (place / name).write_bytes(content)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a script; the status is 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=available(), action="append", help="all by default")
    parser.add_argument("--keep", type=Path, help="a folder for the files that are lost")
    given = parser.parse_args(arguments)
    readers = given.reader or available()
    start, lost = time.monotonic(), 0
    for name in readers:
        with tempfile.TemporaryDirectory() as folder:
            counts = run(name, given.files // len(readers), given.seed, Path(folder), given.keep)
        lost += sum(count for kind, count in counts.items() if kind.startswith("lost"))
        kinds = ", ".join(f"{kind} {count}" for kind, count in counts.most_common())
        print(f"{name}: {counts.total()} files: {kinds}", flush=True)
    print(f"lost = {lost}, {time.monotonic() - start:.0f} s")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
