"""The registry: names, options and errors; outside packages and files that register architectures of their own."""

import importlib
import sys
import textwrap
from typing import Any, Literal

import pytest
import torch

import architectures
from architectures import SequenceMixer, register, registry
from architectures.registry import Option, _matches

MIXER = """
    from typing import NamedTuple

    import torch
    from torch import nn

    from architectures import SequenceMixer, register


    class ShiftState(NamedTuple):
        last: torch.Tensor


    @register({name!r}, paper="a paper")
    class {cls}(SequenceMixer):
        '''The input one token earlier.

        More.
        '''

        def __init__(self, d_model: int, *, scale: float = 1.0, mode: str = "plain", backend: str = "auto"):
            super().__init__(d_model, backend=backend)
            self.scale, self.weight = scale, nn.Parameter(torch.ones(d_model))

        def init_state(self, batch_size, max_seq_len, *, device=None, dtype=None):
            return ShiftState(torch.zeros(batch_size, self.d_model, **self.like_parameters(device, dtype)))

        def step(self, x, state):
            return self.scale * self.weight * state.last, ShiftState(x)
"""


@pytest.fixture(autouse=True)
def _forget():
    """Whatever a test registers is gone after it."""
    yield
    for name, entry in list(registry._entries.items()):
        if not entry.cls.__module__.startswith("architectures."):
            registry._entries.pop(name)


def write(path, name, cls="Shift", more=""):
    path.write_text(textwrap.dedent(MIXER.format(name=name, cls=cls)) + textwrap.dedent(more))
    return path


# -- names -------------------------------------------------------------------------------------------------------


def test_every_file_is_an_architecture_or_listed_as_shared():
    known = {"attention", "base_conv", "based", "mamba", "gla", "rwkv7"}
    assert known <= set(architectures.names())
    assert architectures.names() == sorted(set(architectures.names()))
    assert not registry.SHARED_MODULES & set(architectures.names())
    for module in registry.SHARED_MODULES:
        assert importlib.util.find_spec(f"architectures.{module}") is not None


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("atention", "did you mean 'attention'"), ("mamba3", "'mamba2'"), ("gated_delta_net", "'gated_deltanet'")],
)
def test_an_unknown_name_gets_the_closest_ones(name, suggestion):
    with pytest.raises(ValueError, match=f"unknown architecture '{name}'") as error:
        architectures.create(name, d_model=8)
    assert suggestion in str(error.value)
    assert "sliding_window" in str(error.value)


def test_a_name_like_no_other_gets_the_list():
    with pytest.raises(ValueError, match=r"unknown architecture 'qqqq': there are attention, base_conv"):
        architectures.describe("qqqq")


def test_a_duplicate_names_both_places(tmp_path):
    first, second = write(tmp_path / "first.py", "shift"), write(tmp_path / "second.py", "shift")
    architectures.load_file(first)
    with pytest.raises(ValueError, match="architecture 'shift' is registered twice") as error:
        architectures.load_file(second)
    assert f"{first}:14" in str(error.value)
    assert f"{second}:14" in str(error.value)
    assert registry.get("shift").where == f"{first}:14"


@pytest.mark.parametrize("imported", [True, False])
def test_a_built_in_is_not_replaced(tmp_path, monkeypatch, imported):
    """Also where the built-in of that name has not been imported yet."""
    architectures.create("based", d_model=8)
    if not imported:
        monkeypatch.delitem(registry._entries, "based")
    file = write(tmp_path / "mine.py", "based")
    with pytest.raises(ValueError, match="architecture 'based' is registered twice") as error:
        architectures.load_file(file)
    assert "based.py" in str(error.value)
    assert f"{file}:14" in str(error.value)


def test_the_same_class_again_is_no_duplicate(tmp_path):
    file = write(tmp_path / "again.py", "shift")
    assert architectures.load_file(file) == ["shift"]
    assert architectures.load_file(file) == ["shift"]


def test_only_mixers_are_registered():
    with pytest.raises(TypeError, match="not a subclass of SequenceMixer"):
        register("linear", paper="none")(torch.nn.Linear)
    with pytest.raises(TypeError, match="not a subclass of SequenceMixer"):
        register("function", paper="none")(lambda x: x)
    assert not {"linear", "function"} & set(architectures.names())


# -- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": "64"}, r"option window='64' is of type str, expected int"),
        ({"window": 64.0}, r"option window=64.0 is of type float, expected int"),
        ({"window": True}, r"option window=True is of type bool, expected int"),
        ({"window": None}, r"option window=None is of type NoneType, expected int"),
        ({"rotary_fraction": "all"}, r"option rotary_fraction='all' is of type str, expected float"),
        ({"bias": 1}, r"option bias=1 is of type int, expected bool"),
        ({"widow": 64}, r"no option 'widow'; its options are d_model: int, window: int, num_heads: int"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=f"architecture 'sliding_window'.*{message}"):
        architectures.create("sliding_window", d_model=8, **options)
    with pytest.raises(ValueError, match=message):
        registry.check_options("sliding_window", options)


def test_right_options_arrive():
    mixer = architectures.create("sliding_window", d_model=8, window=3, num_heads=2, rotary_fraction=1, bias=False)
    assert (mixer.window, mixer.num_heads, mixer.rotary_fraction, mixer.qkv.bias) == (3, 2, 1, None)


@pytest.mark.parametrize(
    ("value", "annotation", "fits"),
    [
        (1, int, True),
        (True, int, False),
        (1, float, True),
        (True, float, False),
        ("a", float, False),
        (None, int | None, True),
        (1, int | None, True),
        (1.5, int | None, False),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        ({"a": 1}, dict[str, int], True),
        ([1], dict[str, int], False),
        (None, None, True),
        (object(), Any, True),
    ],
)
def test_types_of_options(value, annotation, fits):
    assert _matches(value, annotation) == fits


def test_description():
    told = architectures.describe("sliding_window", d_model=16, seq_len=100)
    assert told.paper == "arXiv:2004.05150"
    assert told.options["window"] == Option(int, "int", 64)
    assert told.options["d_model"] == Option(int, "int", ...)
    assert told.state == {"window_k": 64 * 16, "window_v": 64 * 16, "position": 0}
    assert told.backends == ("flash-attn", "sdpa", "reference")
    assert told.summary == "Causal softmax attention over the last `window` tokens, the current one included."
    assert str(told) == (
        "sliding_window (arXiv:2004.05150): Causal softmax attention over the last `window` tokens, the current one "
        "included.\n"
        "options: d_model: int, window: int = 64, num_heads: int = 1, rotary_fraction: float = 0.0, bias: bool = True, "
        "backend: str = 'auto'\n"
        "state at d_model 16, length 100: 2,048 = window_k 1,024 + window_v 1,024\n"
        "backends, fastest first: flash-attn, sdpa, reference"
    )


# -- a user's own file -------------------------------------------------------------------------------------------


def test_a_file_adds_architectures(tmp_path):
    more = MIXER.replace("{name!r}", '"other"').replace("{cls}", "Other")
    file = write(tmp_path / "mine.py", "shift", more=more)
    assert architectures.load_file(str(file)) == ["other", "shift"]
    mixer = architectures.create("shift", d_model=4, scale=2)
    x = torch.arange(12.0).view(1, 3, 4)
    assert torch.equal(mixer(x)[0, 1:], 2 * x[0, :2])
    assert architectures.describe("shift").summary == "The input one token earlier."
    assert isinstance(architectures.create("other", d_model=4), SequenceMixer)
    assert {"other", "shift"} <= set(architectures.names())


def test_a_file_that_imports_a_built_in_does_not_register_it(tmp_path, monkeypatch):
    monkeypatch.delitem(registry._entries, "gla", raising=False)
    monkeypatch.delitem(sys.modules, "architectures.gla", raising=False)
    file = write(tmp_path / "mine.py", "shift", more="import architectures.gla\n")
    assert architectures.load_file(file) == ["shift"]
    assert "gla" in registry._entries


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "registers nothing: decorate a class with @register"),
        ("import no_such_module", "failed at line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = 1\nraise RuntimeError('oh no')", "failed at line 2: RuntimeError: oh no"),
        ("\ndef broken(:", "failed at line 2: SyntaxError"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, text, message):
    file = tmp_path / "broken.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        architectures.load_file(file)
    assert str(file) in str(error.value)


def test_files_of_one_name_in_two_folders_are_two_files(tmp_path):
    for folder, name in (("a", "shift"), ("b", "other")):
        (tmp_path / folder).mkdir()
        assert architectures.load_file(write(tmp_path / folder / "mine.py", name)) == [name]
    (tmp_path / "b" / "empty").mkdir()
    (tmp_path / "b" / "empty" / "mine.py").write_text("x = 1")
    with pytest.raises(ValueError, match="registers nothing"):
        architectures.load_file(tmp_path / "b" / "empty" / "mine.py")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"architectures file .*none\.py does not exist"):
        architectures.load_file(tmp_path / "none.py")
    with pytest.raises(ValueError, match="is not a file"):
        architectures.load_file(tmp_path)
    (tmp_path / "notes.md").write_text("# Notes")
    with pytest.raises(ValueError, match=r"notes\.md: must be a Python file"):
        architectures.load_file(tmp_path / "notes.md")


def test_a_form_that_is_missing_is_named(tmp_path):
    file = tmp_path / "nothing.py"
    file.write_text(
        "from architectures import SequenceMixer, register\n\n\n"
        "@register('nothing', paper='none')\nclass Nothing(SequenceMixer):\n    pass\n"
    )
    architectures.load_file(file)
    mixer = architectures.create("nothing", d_model=4)
    with pytest.raises(NotImplementedError, match="Nothing defines no init_state"):
        mixer.state_size(8)
    mixer.init_state = lambda *args, **options: torch.zeros(1, 4, device=options["device"])
    with pytest.raises(TypeError, match="init_state must return a NamedTuple of tensors, got Tensor"):
        mixer.state_size(8)
    with pytest.raises(NotImplementedError, match="Nothing defines no step"):
        mixer(torch.zeros(1, 3, 4))


@pytest.mark.parametrize("seq_len", [-1, 8.0, "8", True])
def test_a_state_is_counted_at_a_length_only(seq_len):
    with pytest.raises(ValueError, match=f"seq_len={seq_len!r}: must be a whole number >= 0"):
        architectures.create("attention", d_model=4).state_size(seq_len)


# -- outside packages --------------------------------------------------------------------------------------------


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """Install a distribution whose entry points are `points` (name -> module)."""

    def install(points):
        info = tmp_path / "shifty-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shifty\nVersion: 1.0\n")
        lines = "\n".join(f"{name} = {module}" for name, module in points.items())
        (info / "entry_points.txt").write_text(f"[zoology.architectures]\n{lines}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()

    yield install
    for name in ("shifty_mixer", "shifty_empty"):
        sys.modules.pop(name, None)


def test_an_outside_package_is_found_and_imported_when_asked_for(tmp_path, distribution):
    write(tmp_path / "shifty_mixer.py", "shifty")
    distribution({"shifty": "shifty_mixer"})
    assert "shifty" in architectures.names()
    assert "shifty_mixer" not in sys.modules
    mixer = architectures.create("shifty", d_model=4)
    assert type(mixer).__module__ == "shifty_mixer"
    assert mixer.state_size(10) == 4


def test_an_outside_package_that_cannot_be_imported_breaks_nothing_else(distribution):
    distribution({"shifty": "no_such_shifty_module"})
    assert "shifty" in architectures.names()
    assert architectures.create("attention", d_model=8).d_model == 8
    with pytest.raises(ModuleNotFoundError, match="no_such_shifty_module"):
        architectures.create("shifty", d_model=8)


def test_an_outside_package_that_does_not_register_its_name_is_named(tmp_path, distribution):
    (tmp_path / "shifty_empty.py").write_text("x = 1\n")
    distribution({"shifty": "shifty_empty"})
    with pytest.raises(ValueError, match=r"architecture 'shifty' was imported but does not @register\('shifty'\)"):
        architectures.create("shifty", d_model=8)
