"""The choice of a backend: backend=, use_backend, MHC_BACKEND, or the arrays' own library."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

import mhc_core as mhc
from mhc_backends import mlx_common
from mhc_backends.jax.ops import dtype_context
from mhc_backends.mlx_metal import SPEC as METAL
from mhc_core import selection
from mhc_core.discovery import backend_module

if TYPE_CHECKING:
    from conftest import FakeArray, Plugins

Fake = type["FakeArray"]
EYE = np.eye(2, dtype=np.float32)
OWN: dict[str, type] = {"numpy": np.ndarray, "jax": jax.Array, "mlx-compiled": mx.array}


# --- who decides ------------------------------------------------------------------------------


@pytest.fixture
def four(plugins: Plugins) -> None:
    """Add four backends for one library, of which "best" is chosen by default."""
    for priority, name in enumerate(["argument", "context", "variable", "best"]):
        plugins.backend(name, priority=priority)


@pytest.mark.usefixtures("four")
def test_the_order_of_choices(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    array = fake(2, 2)
    assert mhc.sinkhorn(array) == "best"
    monkeypatch.setenv("MHC_BACKEND", "variable")
    assert mhc.sinkhorn(array) == "variable"
    with mhc.use_backend("context"):
        assert mhc.sinkhorn(array) == "context"
        assert mhc.sinkhorn(array, backend="argument") == "argument"
        assert mhc.vjp("sinkhorn", (array,), array) == "context"
        assert mhc.vjp("sinkhorn", (array,), array, backend="argument") == "argument"
    assert mhc.vjp("sinkhorn", (array,), array) == "variable"


@pytest.mark.usefixtures("four")
def test_the_environment_is_read_at_every_call(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("variable", "context", "argument"):
        monkeypatch.setenv("MHC_BACKEND", name)
        assert mhc.sinkhorn(fake(2, 2)) == name
    os.environ["MHC_BACKEND"] = ""  # as good as unset
    assert mhc.sinkhorn(fake(2, 2)) == "best"
    monkeypatch.delenv("MHC_BACKEND")
    assert mhc.sinkhorn(fake(2, 2)) == "best"


@pytest.mark.usefixtures("four")
def test_use_backend_nests_and_ends_with_an_exception(fake: Fake) -> None:
    array = fake(2, 2)
    with mhc.use_backend("context"):
        with pytest.raises(KeyError), mhc.use_backend("argument"):
            raise KeyError
        assert mhc.sinkhorn(array) == "context"
        with mhc.use_backend("variable"), mhc.use_backend("argument"):
            assert mhc.sinkhorn(array) == "argument"
        assert mhc.sinkhorn(array) == "context"
        with pytest.raises(mhc.UnknownBackendError), mhc.use_backend("contxt"):
            pass
        assert mhc.sinkhorn(array) == "context"
    assert mhc.sinkhorn(array) == "best"


@pytest.mark.usefixtures("four")
def test_use_backend_holds_in_its_own_thread_only(fake: Fake) -> None:
    answers: dict[str, Any] = {}
    entered, seen = threading.Event(), threading.Event()

    def inside() -> None:
        with mhc.use_backend("context"):
            entered.set()
            assert seen.wait(10)
            answers["inside"] = mhc.sinkhorn(fake(2, 2))

    thread = threading.Thread(target=inside)
    thread.start()
    assert entered.wait(10)
    answers["outside"] = mhc.sinkhorn(fake(2, 2))
    seen.set()
    thread.join(10)
    assert answers == {"inside": "context", "outside": "best"}


def test_of_two_backends_for_one_library_the_better_is_taken(plugins: Plugins, fake: Fake) -> None:
    plugins.backend("good", priority=5)
    plugins.backend("better", priority=6)
    plugins.backend("by-name-only", priority=7, automatic=False)
    assert mhc.sinkhorn(fake(2, 2)) == "better"
    assert mhc.sinkhorn(fake(2, 2), backend="by-name-only") == "by-name-only"


def test_backends_are_listed_best_first(plugins: Plugins) -> None:
    plugins.backend("worst", priority=-3)
    plugins.backend("best", priority=90)
    known = mhc.backends()
    assert next(iter(known)) == "best"
    assert list(known)[-1] == "worst"
    assert all(backend.name == name for name, backend in known.items())


# --- what is refused --------------------------------------------------------------------------

REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "op": ({"ops": ("pre",)}, "has no op 'sinkhorn'"),
    "dtype": ({"dtypes": ("float16", "bfloat16")}, "has no float32 (it takes float16, bfloat16)"),
    "small": ({"sizes": (3, 8)}, "takes n from 3 to 8, not 2"),
    "large": ({"sizes": (1, 1)}, "takes n from 1 to 1, not 2"),
    "missing": ({"missing": lambda: "no driver: buy one"}, "no driver: buy one"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_an_explicit_choice_never_falls_back(
    plugins: Plugins, fake: Fake, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    fields, reason = REFUSALS[case]
    plugins.backend("able")
    plugins.backend("chosen", priority=1, **fields)
    array = fake(2, 2)
    middle = " cannot run here: " if case == "missing" else " "
    prefix = "" if case == "missing" else "sinkhorn: "

    def says(source: str) -> str:
        return f"{prefix}backend 'chosen'{source}{middle}{reason}"

    with pytest.raises(mhc.BackendError) as caught:
        mhc.sinkhorn(array, backend="chosen")
    assert str(caught.value) == says("")
    monkeypatch.setenv("MHC_BACKEND", "chosen")
    with pytest.raises(mhc.BackendError) as caught:
        mhc.sinkhorn(array)
    assert str(caught.value) == says(" (from MHC_BACKEND)")
    with pytest.raises(mhc.BackendError) as caught, mhc.use_backend("chosen"):
        mhc.sinkhorn(array)
    assert str(caught.value) == says("" if case == "missing" else " (from use_backend)")


@pytest.mark.parametrize("case", REFUSALS)
def test_unasked_it_is_passed_over(plugins: Plugins, fake: Fake, case: str) -> None:
    plugins.backend("able")
    plugins.backend("unable", priority=1, **REFUSALS[case][0])
    assert mhc.sinkhorn(fake(2, 2)) == "able"


def test_where_nobody_can_every_candidate_says_why(plugins: Plugins, fake: Fake) -> None:
    for name, (fields, _) in REFUSALS.items():
        plugins.backend(name, **fields)
    plugins.backend("shy", automatic=False)
    plugins.point("broken", "no_such_module")
    with pytest.raises(mhc.UnsupportedError) as caught:
        mhc.sinkhorn(fake(2, 2))
    text = str(caught.value)
    assert text.startswith("sinkhorn: no backend takes this call on fake_library.Array (")
    for name, (_, reason) in REFUSALS.items():
        assert f"{name}: {reason}" in text
    assert "shy: runs only when chosen by name" in text
    assert "plugin 'broken' is broken: ModuleNotFoundError" in text
    assert "jax" not in text.replace("fake_library", "")


def test_a_backend_may_look_at_the_arrays_of_every_call(plugins: Plugins, fake: Fake) -> None:
    """Check the device of arrays, say: the same kind of call goes to one backend or the next."""
    taken, other = fake(2, 2), fake(2, 2)

    def takes(arrays: Any) -> str | None:
        return None if arrays[0] is taken else "takes no such arrays"

    plugins.backend("second", priority=1)
    plugins.backend("choosy", priority=2, takes=takes)
    for _ in range(2):  # the second time, the selection is looked up
        for array, name in ((taken, "choosy"), (other, "second")):
            assert mhc.sinkhorn(array) == name
            assert mhc.vjp("sinkhorn", (array,), other) == name
        assert mhc.sinkhorn(taken, backend="choosy") == "choosy"
        with pytest.raises(mhc.UnsupportedError, match=r"'choosy' takes no such arrays"):
            mhc.sinkhorn(other, backend="choosy")
        with mhc.use_backend("choosy"), pytest.raises(mhc.UnsupportedError, match="use_backend"):
            mhc.vjp("sinkhorn", (other,), taken)


def test_a_backend_may_recognise_calls_of_a_kind(
    plugins: Plugins, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that dispatch then asks nothing else, and what a backend need not look at itself."""
    here, elsewhere = fake(2, 2), fake(2, 2)

    def sinkhorn(*_: Any, **__: Any) -> str:
        return "general"

    def specialise(arrays: Any, static: Any) -> Any:
        return (lambda a: a is here), lambda _: f"special, {static['iterations']}"

    def takes(arrays: Any) -> str | None:
        return "takes no such arrays" if arrays[0] is elsewhere else None

    sinkhorn.specialise = specialise
    plugins.backend("other", priority=1)
    plugins.backend("special", {"sinkhorn": sinkhorn}, priority=2, takes=takes)
    for name in (None, "special"):
        assert mhc.sinkhorn(here, 3, backend=name) == "general"
        with monkeypatch.context() as patch:
            patch.setattr("mhc_core.dispatch.signature", None)
            assert mhc.sinkhorn(here, 3, backend=name) == "special, 3"
    assert mhc.sinkhorn(here, 4) == "general"
    for wrong in (3.0, True):
        with pytest.raises(TypeError, match=f"iterations is {wrong}; needs an integer"):
            mhc.sinkhorn(here, wrong)
    assert mhc.sinkhorn(elsewhere, 3) == mhc.sinkhorn(here, 3, backend="other") == "other"
    assert mhc.sinkhorn(fake(2, 2), 3) == "general"
    with mhc.use_backend("other"):
        assert mhc.sinkhorn(here, 3) == "other"
    monkeypatch.setenv("MHC_BACKEND", "other")
    assert mhc.sinkhorn(here, 3) == "other"
    monkeypatch.delenv("MHC_BACKEND")
    assert mhc.sinkhorn(here, 3) == "special, 3"
    iterations = int("1000")  # equal, but another object every time: checked every time
    assert mhc.sinkhorn(here, iterations) == mhc.sinkhorn(here, int("1000")) == "general"
    with selection.registered(plugins.spec("best", priority=3)):
        assert mhc.sinkhorn(here, 3) == "best"


def test_where_no_backend_takes_the_arrays_each_says_why(plugins: Plugins, fake: Fake) -> None:
    for name, priority in (("first", 2), ("second", 1)):
        plugins.backend(name, priority=priority, takes=lambda _, name=name: f"not on {name}")
    with pytest.raises(mhc.UnsupportedError, match=r"first: not on first; second: not on second"):
        mhc.sinkhorn(fake(2, 2))


def test_sizes_do_not_matter_to_an_op_without_streams(plugins: Plugins, fake: Fake) -> None:
    plugins.backend("mine", sizes=(2, 4))
    assert mhc.rms_norm(fake(3, 5), fake(5)) == "mine"
    with pytest.raises(mhc.UnsupportedError, match="takes n from 2 to 4, not 1"):
        mhc.sinkhorn(fake(1, 1))


def test_every_array_counts_cotangents_too(plugins: Plugins, fake: Fake) -> None:
    plugins.backend("mine", dtypes=("float32",))
    narrow = fake(2, 2, dtype="bfloat16")
    with pytest.raises(mhc.UnsupportedError, match="mine: has no bfloat16"):
        mhc.combine(fake(2, 3), fake(3), fake(2), narrow)
    with pytest.raises(mhc.UnsupportedError, match="mine: has no bfloat16"):
        mhc.vjp("sinkhorn", (fake(2, 2),), narrow)
    with pytest.raises(mhc.UnsupportedError, match="'mine' has no bfloat16"):
        mhc.vjp("sinkhorn", (fake(2, 2),), narrow, backend="mine")


# --- names ------------------------------------------------------------------------------------


def test_an_unknown_name_brings_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    known = ", ".join(sorted(name for name, b in mhc.backends().items() if b.spec))
    hint = f"; the nearest is 'mlx-compiled'; known are {known}"
    with pytest.raises(mhc.UnknownBackendError) as caught:
        mhc.sinkhorn(EYE, backend="mlx_compiled")
    assert str(caught.value) == f"no backend is named 'mlx_compiled'{hint}"
    with pytest.raises(mhc.UnknownBackendError) as caught, mhc.use_backend("mlx_compiled"):
        pass
    assert str(caught.value) == f"no backend is named 'mlx_compiled'{hint}"
    monkeypatch.setenv("MHC_BACKEND", "mlx_compiled")
    with pytest.raises(mhc.UnknownBackendError) as caught:
        mhc.sinkhorn(EYE)
    assert str(caught.value) == f"no backend is named 'mlx_compiled' (from MHC_BACKEND){hint}"
    with pytest.raises(mhc.UnknownBackendError) as caught:
        mhc.sinkhorn(EYE, backend="xyz")
    assert str(caught.value) == f"no backend is named 'xyz'; known are {known}"


@pytest.mark.parametrize("name", [3, ["numpy"], b"numpy", mhc])
def test_a_name_that_is_no_word(name: Any) -> None:
    with pytest.raises(TypeError, match=r"^backend is .*; needs a name such as 'numpy'"):
        mhc.sinkhorn(EYE, backend=name)
    with pytest.raises(TypeError, match=r"^backend is .*; needs a name"), mhc.use_backend(name):
        pass


def test_an_empty_name_is_a_choice_too() -> None:
    with pytest.raises(mhc.UnknownBackendError, match="no backend is named ''"):
        mhc.sinkhorn(EYE, backend="")
    says = "no backend is named ''"
    with pytest.raises(mhc.UnknownBackendError, match=says), mhc.use_backend(""):
        pass


def test_errors_are_of_the_kinds_that_people_catch() -> None:
    for kind in (mhc.UnknownBackendError, mhc.BackendUnavailableError, mhc.UnsupportedError):
        assert issubclass(kind, mhc.BackendError)
    assert issubclass(mhc.UnknownBackendError, ValueError)
    assert issubclass(mhc.UnsupportedError, ValueError)


# --- machines that lack a library -------------------------------------------------------------

HIDE = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def hiding(name, *rest):
    return None if name.split(".")[0] in {hidden!r} else find(name, *rest)
PathFinder.find_spec = hiding
import numpy, mhc_core as mhc
assert mhc.sinkhorn(numpy.zeros((2, 2))).shape == (2, 2)
print(mhc.backends()[{name!r}].reason)
try:
    mhc.sinkhorn(numpy.zeros((2, 2)), backend={name!r})
except mhc.BackendUnavailableError as error:
    print(error)
"""


def _reasons(name: str, hidden: tuple[str, ...] = (), path: Path | None = None) -> list[str]:
    """Return reasons from a new process, where some libraries are hidden or shadowed by others."""
    code = HIDE.format(name=name, hidden=hidden)
    if path:
        code = f"import sys; sys.path.insert(0, {str(path)!r})\n" + code
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return result.stdout.splitlines()


@pytest.mark.parametrize(
    ("name", "hidden", "reason"),
    [
        ("jax", ("jax",), "JAX is not installed: pip install jax"),
        ("jax", ("jaxlib",), "JAX is not installed: pip install jax"),
        ("mlx-compiled", ("mlx",), f"MLX is not installed: pip install {mlx_common.WHEEL}"),
    ],
)
def test_a_machine_without_a_library(name: str, hidden: tuple[str, ...], reason: str) -> None:
    assert _reasons(name, hidden) == [reason, f"backend {name!r} cannot run here: {reason}"]


@pytest.mark.parametrize(
    ("core", "reason"),
    [
        (
            "raise ImportError('libmlx.so: cannot open shared object file')",
            f"MLX has no backend installed: pip install {mlx_common.WHEEL} "
            "(libmlx.so: cannot open shared object file)",
        ),
        ("__version__ = '0.32.2'", "MLX 0.32.2 is too old: pip install 'mlx>=0.32.3'"),
    ],
)
def test_an_mlx_that_cannot_run(tmp_path: Path, core: str, reason: str) -> None:
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    (tmp_path / "mlx" / "core.py").write_text(core)
    says = f"backend 'mlx-compiled' cannot run here: {reason}"
    assert _reasons("mlx-compiled", path=tmp_path) == [reason, says]


@pytest.mark.parametrize("version", ["0.32.3", "0.32.10", "0.33.0.dev20261101+abc", "1.0"])
def test_an_mlx_that_is_new_enough(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("mlx.core.__version__", version)
    assert mlx_common.missing() is None


# --- MHC_MLX_DISABLE_METAL --------------------------------------------------------------------


@pytest.fixture
def metal(plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> Plugins:
    """Add a backend named mlx-metal that runs anywhere, in place of the one that needs a Mac."""
    monkeypatch.setenv("MHC_DISABLE_PLUGINS", "mlx-metal")
    plugins.backend("other")
    declared = {"priority": 9, "disabled_by": METAL.disabled_by}
    plugins.plugin("fake-metal", [plugins.spec("mlx-metal", **declared)])
    return plugins


@pytest.mark.usefixtures("metal")
def test_metal_can_be_disabled(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    array = fake(2, 2)
    assert mhc.sinkhorn(array) == "mlx-metal"
    monkeypatch.setenv("MHC_MLX_DISABLE_METAL", "1")
    assert mhc.sinkhorn(array) == "other"
    assert mhc.backends()["mlx-metal"].reason == "MHC_MLX_DISABLE_METAL=1 is set"
    says = "^backend 'mlx-metal' cannot run here: MHC_MLX_DISABLE_METAL=1 is set$"
    with pytest.raises(mhc.BackendUnavailableError, match=says):
        mhc.sinkhorn(array, backend="mlx-metal")
    with pytest.raises(mhc.BackendUnavailableError, match=says), mhc.use_backend("mlx-metal"):
        pass
    monkeypatch.setenv("MHC_BACKEND", "mlx-metal")
    with pytest.raises(mhc.BackendUnavailableError, match=r"\(from MHC_BACKEND\) cannot run here"):
        mhc.sinkhorn(array)
    monkeypatch.delenv("MHC_MLX_DISABLE_METAL")
    assert mhc.sinkhorn(array) == "mlx-metal"


@pytest.mark.usefixtures("metal")
def test_metal_disabled_inside_a_block_that_chose_it(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mhc.use_backend("mlx-metal"):
        assert mhc.sinkhorn(fake(2, 2)) == "mlx-metal"
        monkeypatch.setenv("MHC_MLX_DISABLE_METAL", "1")
        with pytest.raises(mhc.BackendUnavailableError, match="MHC_MLX_DISABLE_METAL=1 is set"):
            mhc.sinkhorn(fake(2, 2))


@pytest.mark.parametrize("value", ["0", ""])
@pytest.mark.usefixtures("metal")
def test_metal_not_disabled(fake: Fake, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MHC_MLX_DISABLE_METAL", value)
    assert mhc.sinkhorn(fake(2, 2)) == "mlx-metal"


def test_every_backend_may_have_a_variable_that_disables_it(
    plugins: Plugins, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    for priority, name in enumerate(("last", "second", "first")):
        plugins.backend(name, priority=priority, disabled_by=f"NO_{name.upper()}")
    answers: list[Any] = []
    for value in ("0", "1"):
        for name in ("NO_FIRST", "NO_SECOND"):
            answers.append(mhc.sinkhorn(fake(2, 2)))
            monkeypatch.setenv(name, value)
    answers.append(mhc.sinkhorn(fake(2, 2)))
    assert answers == ["first", "first", "first", "second", "last"]
    with selection.registered(plugins.spec("new", priority=9, disabled_by="NO_NEW")):
        assert mhc.sinkhorn(fake(2, 2)) == "new"
        monkeypatch.setenv("NO_NEW", "1")
        assert mhc.sinkhorn(fake(2, 2)) == "last"


# --- arrays -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "kind"),
    [(EYE, np.ndarray), (jnp.eye(2), jax.Array), (mx.eye(2), mx.array)],
    ids=["numpy", "jax", "mlx"],
)
def test_arrays_stay_in_their_library(array: Any, kind: type) -> None:
    assert isinstance(mhc.sinkhorn(array), kind)
    (gradient,) = mhc.vjp("sinkhorn", (array,), array)
    assert isinstance(gradient, kind)
    h, gradient = mhc.vjp(mhc.aggregate, [array, array[0]], array[1])
    assert isinstance(h, kind)
    assert isinstance(gradient, kind)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", OWN)
def test_host_arrays_are_taken_in_by_a_chosen_backend(name: str, dtype: Any) -> None:
    x, h_pre = np.ones((2, 3)).astype(dtype), np.array([1, 2]).astype(dtype)
    h = mhc.aggregate(x, h_pre, backend=name)
    gradients = mhc.vjp("aggregate", (x, h_pre), x[0], backend=name)
    for array in (h, *gradients):
        assert isinstance(array, OWN[name])
        assert str(array.dtype).endswith(np.dtype(dtype).name)
    to_host = backend_module(_spec(name)).to_host
    np.testing.assert_array_equal(to_host(h).astype(float), [3, 3, 3])
    np.testing.assert_array_equal(to_host(gradients[1]).astype(float), [3, 3])


def _spec(name: str) -> Any:
    return mhc.backends()[name].spec


@pytest.mark.parametrize("like", [jnp.asarray, mx.array], ids=["jax", "mlx"])
def test_host_arrays_beside_a_librarys_own(like: Callable[..., Any]) -> None:
    own = like(EYE)
    for arrays in ((own, EYE[0]), (EYE, own[0])):
        assert isinstance(mhc.aggregate(*arrays), type(own))
    for primals, cotangent in (((own, EYE[0]), EYE[1]), ((EYE, EYE[0]), own[1])):
        assert all(isinstance(d, type(own)) for d in mhc.vjp("aggregate", primals, cotangent))


def test_float64_host_arrays_are_refused_not_narrowed() -> None:
    wide = np.eye(2)
    says = r"sinkhorn: backend 'mlx-compiled' has no float64 \(it takes float32, float16, bfloat16"
    with pytest.raises(mhc.UnsupportedError, match=says):
        mhc.sinkhorn(wide, backend="mlx-compiled")
    says = (
        "sinkhorn: logits has dtype float64; backend 'jax' has none here and would make it "
        r"float32: convert it first \(nothing is narrowed silently\)"
    )
    with pytest.raises(TypeError, match=says):
        mhc.sinkhorn(wide, backend="jax")
    with pytest.raises(TypeError, match="aggregate: the cotangent of h has dtype float64"):
        mhc.vjp("aggregate", (jnp.eye(2), jnp.ones(2)), wide[0])


def test_float64_of_mlx_itself_is_refused() -> None:
    with pytest.raises(mhc.UnsupportedError, match="mlx-compiled: has no float64"):
        mhc.sinkhorn(mx.zeros((2, 2), dtype=mx.float64))


def test_float64_in_jax_where_it_has_it() -> None:
    with dtype_context("float64"):
        result = mhc.sinkhorn(np.eye(2), backend="jax")
        assert result.dtype == np.float64
        assert mhc.sinkhorn(result).dtype == np.float64


@pytest.mark.parametrize("name", OWN)
def test_arrays_of_another_library_are_not_taken_in(name: str) -> None:
    others = {"numpy": mx.eye(2), "jax": mx.eye(2), "mlx-compiled": jnp.eye(2)}
    other = others[name]
    takes = " or ".join(dict.fromkeys((*_spec(name).array_types, "numpy.ndarray")))
    says = f"; backend {name!r} needs {takes}: convert it with numpy.asarray(...)"
    for args, argument in (((EYE, other[0]), "h_pre"), ((other, EYE[0]), "x")):
        with pytest.raises(TypeError) as caught:
            mhc.aggregate(*args, backend=name)
        text = str(caught.value)
        assert text.startswith(f"aggregate: {argument} is a ")
        assert text.endswith(says)
    with pytest.raises(TypeError, match=r"aggregate: the cotangent of h is a .*; backend "):
        mhc.vjp("aggregate", (EYE, EYE[0]), other[0], backend=name)


def test_arrays_of_two_libraries() -> None:
    says = (
        "aggregate: h_pre is a mlx.core.array beside x, a jax.Array; needs arrays of one library: "
        "convert with numpy.asarray(...)"
    )
    with pytest.raises(TypeError) as caught:
        mhc.aggregate(jnp.eye(2), mx.ones(2))
    assert str(caught.value) == says
    with pytest.raises(TypeError, match=r"the cotangent of h is a mlx.core.array beside x, a jax"):
        mhc.vjp("aggregate", (jnp.eye(2), EYE[0]), mx.ones(2))


def test_arrays_of_a_library_that_nobody_takes(fake: Fake) -> None:
    with pytest.raises(TypeError) as caught:
        mhc.sinkhorn(fake(2, 2))
    text = str(caught.value)
    assert text.startswith("sinkhorn: logits is a ")
    assert ".FakeArray, which no backend takes; needs one of " in text
    assert "jax.Array, mlx.core.array, numpy.ndarray" in text
    assert "convert it with numpy.asarray(...)" in text


def test_tracers_are_arrays_of_their_library() -> None:
    x = jnp.ones((2, 3))
    assert jax.jit(mhc.contract)(x).shape == (3,)
    assert jax.make_jaxpr(mhc.contract)(x).out_avals[0].shape == (3,)
    assert jax.grad(lambda x: mhc.contract(x).sum())(x).shape == (2, 3)
    assert jax.vmap(lambda x: mhc.expand(x, 2))(x).shape == (2, 2, 3)
    with pytest.raises(TypeError, match=r"backend 'mlx-compiled' needs mlx\.core\.array"):
        jax.jit(lambda x: mhc.contract(x, backend="mlx-compiled"))(x)


def test_subclasses_are_arrays_of_their_library() -> None:
    class Mine(np.ndarray):
        pass

    assert np.asarray(mhc.contract(EYE.view(Mine))).tolist() == [1, 1]
    assert isinstance(mhc.contract(EYE.view(Mine), backend="jax"), jax.Array)


def test_a_library_that_nobody_imported_is_not_imported(plugins: Plugins, fake: Fake) -> None:
    plugins.backend("elsewhere", array_types=("no_such_library.Array",), priority=9)
    plugins.backend("mine")
    assert mhc.sinkhorn(fake(2, 2)) == "mine"
    with pytest.raises(TypeError, match=r"no_such_library.Array or numpy.ndarray"):
        mhc.sinkhorn(fake(2, 2), backend="elsewhere")


# --- decided once -----------------------------------------------------------------------------


def test_a_kind_of_call_is_decided_once(
    plugins: Plugins, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins.backend("mine")
    mhc.sinkhorn(fake(2, 2))
    monkeypatch.setattr(selection, "_find", None)  # a second decision would call it
    assert mhc.sinkhorn(fake(2, 2)) == "mine"
    assert mhc.sinkhorn(fake(5, 2, 2), iterations=3) == "mine"
    with pytest.raises(TypeError, match="NoneType"):
        mhc.sinkhorn(fake(3, 3))


def test_an_error_is_not_remembered(plugins: Plugins, fake: Fake) -> None:
    with pytest.raises(TypeError, match="no backend takes"):
        mhc.sinkhorn(fake(2, 2))
    plugins.backend("mine")
    assert mhc.sinkhorn(fake(2, 2)) == "mine"
