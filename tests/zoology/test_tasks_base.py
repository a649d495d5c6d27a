"""The task contract: configs, streams, hashes, the registry."""

import json
import pickle

import numpy as np
import pytest
import torch
from pydantic import BaseModel

from zoology import tasks
from zoology.tasks import IGNORE_INDEX, MQAR, AnyTask, Task, base, dataset_hash
from zoology.tasks import registry as registry_module


@pytest.fixture
def scratch_registry(monkeypatch):
    """Lets a test register tasks of its own."""
    monkeypatch.setattr(registry_module, "_TASKS", dict(registry_module._TASKS))


def toy(name="toy"):
    """A user's task: the smallest that is one."""

    @tasks.register(name, source="nowhere")
    class Toy(Task):
        """Repeat the token two places back."""

        vocab_size: int = 7
        seq_len: int = 6

        def draw(self, stream, n):
            inputs = stream.integers(0, self.vocab_size, n, self.seq_len).astype(np.int64)
            labels = np.full_like(inputs, IGNORE_INDEX)
            labels[:, 2:] = inputs[:, :-2]
            return inputs, labels

        def required_bits(self):
            """Two tokens."""
            return 2 * float(np.log2(self.vocab_size))

    return Toy


def test_a_task_of_ones_own_is_one_class(scratch_registry):
    cls = toy()
    assert tasks.get("toy") is cls
    assert "toy" in tasks.names()
    batch = tasks.create("toy", seq_len=9).split("train", 50, seed=3)
    assert batch.inputs.shape == batch.labels.shape == (50, 9)
    assert batch.inputs.dtype == batch.labels.dtype == torch.int64
    assert torch.equal(batch.labels[:, 2:], batch.inputs[:, :-2])
    assert (batch.labels[:, :2] == IGNORE_INDEX).all()
    page = tasks.describe("toy")
    assert page["definition"] == "Repeat the token two places back."
    assert page["required_bits"] == "Two tokens."
    assert page["default_bits"] == pytest.approx(5.6147, abs=1e-4)
    assert page["source"] == "nowhere"
    assert page["options"] == {"vocab_size": 7, "seq_len": 6}


def test_duplicate_names_are_refused_with_both_places(scratch_registry):
    class Other(Task):
        pass

    with pytest.raises(ValueError, match=r"'mqar'.*mqar\.py:MQAR.*test_tasks_base\.py:.*Other"):
        tasks.register("mqar")(Other)


def test_tasks_of_installed_packages(scratch_registry, monkeypatch, tmp_path):
    from importlib.metadata import EntryPoint

    (tmp_path / "some_tasks.py").write_text(
        "from zoology.tasks import Task, register\n@register('packaged')\nclass Packaged(Task):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    offered = [
        EntryPoint("packaged", "some_tasks", "zoology.tasks"),
        EntryPoint("misnamed", "some_tasks", "zoology.tasks"),
        EntryPoint("broken", "no_such_module_anywhere", "zoology.tasks"),
    ]
    monkeypatch.setattr(registry_module, "entry_points", lambda group: offered)
    assert {"packaged", "broken", "mqar"} <= set(tasks.names())
    assert tasks.create("mqar") == MQAR()  # a broken package breaks only what it offers
    assert tasks.get("packaged").__module__ == "some_tasks"
    with pytest.raises(ValueError, match=r"'misnamed': some_tasks does not register it"):
        tasks.get("misnamed")
    with pytest.raises(ValueError, match=r"'broken' \(no_such_module_anywhere\): ModuleNotFoundError"):
        tasks.get("broken")


def test_a_file_of_tasks(scratch_registry, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import numpy as np\n"
        "from zoology.tasks import Task, register\n"
        "@register('echo', source='mine')\n"
        "class Echo(Task):\n"
        "    vocab_size: int = 5\n"
        "    seq_len: int = 4\n"
        "    def draw(self, stream, n):\n"
        "        tokens = stream.integers(0, self.vocab_size, n, self.seq_len)\n"
        "        return tokens, tokens\n"
    )
    assert tasks.load_file(path) == ["echo"]
    assert tasks.load_file(str(path)) == ["echo"]  # again: the same file, not a duplicate
    task = tasks.create("echo")
    inputs, labels = task.sample(50, 0)
    assert torch.equal(inputs, labels)
    assert inputs.unique().tolist() == [0, 1, 2, 3, 4]
    assert pickle.loads(pickle.dumps(task)) == task
    with pytest.raises(NotImplementedError, match="Echo does not define required_bits"):
        task.required_bits()


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "does not exist"), ("1 / 0", "failed at line 1: ZeroDivisionError"), ("x = 1", "registers nothing")],
)
def test_a_bad_file_of_tasks(tmp_path, text, message):
    path = tmp_path / "bad.py"
    for content in [text] * (text is not None):
        path.write_text(content)
    with pytest.raises(ValueError, match=rf"tasks file .*bad\.py {message}"):
        tasks.load_file(path)


def test_only_tasks_can_be_registered():
    with pytest.raises(ValueError, match="subclass"):
        tasks.register("x")(dict)


@pytest.mark.filterwarnings("ignore:Field name")
def test_a_task_cannot_have_an_option_called_name(scratch_registry):
    with pytest.raises((ValueError, NameError), match="name"):

        @tasks.register("named")
        class Named(Task):
            name: str = "x"


def test_unknown_name_suggests_the_closest():
    with pytest.raises(ValueError, match=r"unknown task 'mqra' \(closest: mqar"):
        tasks.create("mqra")


@pytest.mark.parametrize("config", [None, 3, "mqar", {"vocab_size": 3}])
def test_config_without_a_name_is_refused(config):
    with pytest.raises(ValueError, match="with a 'name'"):
        tasks.from_config(config)


def test_config_round_trips_through_json():
    task = MQAR(seq_len=32, num_kv_pairs=3, power_a=0.5)
    assert tasks.from_config(json.loads(json.dumps(task.config()))) == task
    assert task.config()["name"] == "mqar"
    assert pickle.loads(pickle.dumps(task)) == task
    assert hash(task) == hash(MQAR(seq_len=32, num_kv_pairs=3, power_a=0.5))


def test_any_task_is_a_field_of_a_config():
    class Run(BaseModel):
        tasks: list[AnyTask]

    run = Run(tasks=[{"name": "mqar", "seq_len": 32}, MQAR()])
    assert run.tasks == [MQAR(seq_len=32), MQAR()]
    again = Run.model_validate_json(run.model_dump_json())
    assert again == run
    with pytest.raises(ValueError, match=r"unknown option seq_length=3 \(closest: seq_len\)"):
        Run(tasks=[{"name": "mqar", "seq_length": 3}])


def test_options_have_names():
    with pytest.raises(ValueError, match="mqar: 64 without a name: options are named, vocab_size, seq_len"):
        MQAR(64, 4)


def test_configs_are_frozen_and_replace_checks():
    task = MQAR()
    with pytest.raises(ValueError, match="frozen"):
        task.seq_len = 128
    assert task.replace(seq_len=128) == MQAR(seq_len=128)
    with pytest.raises(ValueError, match="seq_len=3"):
        task.replace(seq_len=3)


@pytest.mark.parametrize("count", [0, -1, 2.0, "3", None, True])
def test_num_examples_must_be_a_positive_whole_number(count):
    for generate in (MQAR().sample, lambda n, s: MQAR().split("train", n, s)):
        with pytest.raises(ValueError, match=rf"num_examples={count!r}: must be a whole number >= 1"):
            generate(count, 0)


@pytest.mark.parametrize("seed", [-1, 0.5, None, "0"])
def test_seed_must_be_a_whole_number(seed):
    with pytest.raises(ValueError, match=rf"seed={seed!r}: must be a whole number >= 0"):
        MQAR().sample(1, seed)


def test_unknown_split():
    with pytest.raises(ValueError, match="split='dev': must be one of train, validation, test"):
        MQAR().split("dev", 1, 0)


def test_numpy_integers_are_whole_numbers():
    assert torch.equal(MQAR().sample(np.int64(3), np.int32(5)).inputs, MQAR().sample(3, 5).inputs)


def test_generating_leaves_global_generators_alone():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = MQAR().sample(10, 0)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert torch.equal(MQAR().sample(10, 0).inputs, first.inputs)


def test_number_of_threads_does_not_change_the_bytes():
    task = MQAR(seq_len=256, num_kv_pairs=8)
    one = task.sample(2500, 0)  # three chunks
    torch.set_num_threads(2)
    two = task.sample(2500, 0)
    assert torch.equal(one.inputs, two.inputs)
    assert torch.equal(one.labels, two.labels)


def test_a_longer_sample_begins_with_the_shorter(monkeypatch):
    """Chunks are of the same size in both."""
    monkeypatch.setattr(base, "_CHUNK_TOKENS", 64 * 512)
    task = MQAR(seq_len=512, num_kv_pairs=100, vocab_size=1024)  # many redraws
    long = task.sample(1100, 7)
    for n in (1, 2, 63, 64, 65, 1024):
        short = task.sample(n, 7)
        assert torch.equal(short.inputs, long.inputs[:n])
        assert torch.equal(short.labels, long.labels[:n])


def test_streams_seeds_and_configs_give_other_examples():
    task = MQAR(seq_len=32)
    batches = [task.split(split, 200, seed) for split in ("train", "validation", "test") for seed in range(3)]
    batches += [task.sample(200, 0), task.replace(power_a=0.02).sample(200, 0)]
    rows = [tuple(row) for batch in batches for row in batch.inputs.tolist()]
    assert len(set(rows)) == len(rows) == 200 * 11


class Broken(Task):
    vocab_size: int = 4
    seq_len: int = 3
    what: str = "tokens"

    def draw(self, stream, n):
        inputs = np.zeros((n, self.seq_len), dtype=np.int64)
        labels = inputs.copy()
        if self.what == "tokens":
            inputs[0, 0] = 4
        elif self.what == "negative":
            inputs[0, 0] = -1
        elif self.what == "labels":
            labels[0, 0] = -101
        elif self.what == "length":
            labels = labels[:, 1:]
        else:
            inputs = inputs.astype(float)
        return inputs, labels


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("tokens", r"inputs lie in \[0, 4\]: must be tokens of \[0, 4\)$"),
        ("negative", r"inputs lie in \[-1, 0\]"),
        ("labels", r"labels lie in \[-101, 0\]: must be tokens of \[0, 4\) or IGNORE_INDEX"),
        ("length", r"labels are int64 \[2, 2\]: must be integers \[n, 3\]"),
        ("floats", r"inputs are float64 \[2, 3\]"),
    ],
)
def test_a_task_that_breaks_its_contract_is_caught(what, message):
    with pytest.raises(ValueError, match=message):
        Broken(what=what).sample(2, 0)


def test_dataset_hash_covers_everything(scratch_registry):
    hashes = [
        dataset_hash(MQAR(), "train", 10, 0),
        dataset_hash(MQAR(), "test", 10, 0),
        dataset_hash(MQAR(), "train", 11, 0),
        dataset_hash(MQAR(), "train", 10, 1),
        dataset_hash(MQAR(seq_len=128), "train", 10, 0),
        dataset_hash(MQAR(filler="distinct"), "train", 10, 0),
        dataset_hash(toy()(), "train", 10, 0),
    ]
    newer = toy()
    newer.version = 2
    hashes.append(dataset_hash(newer(), "train", 10, 0))
    assert len(set(hashes)) == len(hashes)
    assert dataset_hash(MQAR(), "train", 10, 0) == hashes[0]


def test_a_new_version_gives_new_data(scratch_registry):
    cls = toy()
    first = cls().sample(10, 0)
    cls.version = 2
    assert not torch.equal(cls().sample(10, 0).inputs, first.inputs)
