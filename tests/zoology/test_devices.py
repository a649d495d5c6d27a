"""One rule for what --device means, in every command."""

import pytest
import torch
from typer.testing import CliRunner

from zoology import benchmark, devices, doctor, run, throughput
from zoology.devices import choose_device, resolve_devices

COMMANDS = {
    "run": [run.app, "experiments/mqar_sweep.py"],
    "doctor": [doctor.app],
    "benchmark": [benchmark.app],
    "throughput": [throughput.app],
}


@pytest.fixture
def gpus(monkeypatch):
    """Says how many GPUs torch sees."""
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_all_gpus_are_taken_by_a_sweep_and_the_first_by_what_needs_one(gpus):
    gpus(2)
    assert resolve_devices("auto") == resolve_devices("cuda") == ["cuda:0", "cuda:1"]
    assert resolve_devices("cuda:1") == ["cuda:1"]
    assert resolve_devices("cuda:1,cuda:0") == ["cuda:1", "cuda:0"]
    assert resolve_devices("cpu") == ["cpu"]
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("visible", ["", "-1"])
def test_without_a_gpu_auto_is_the_cpu(gpus, monkeypatch, visible):
    gpus(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert resolve_devices("auto") == ["cpu"]
    assert choose_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuda:7", "--device cuda:7: torch sees 2 CUDA devices here"),
        ("cuda:0,cuda:2", "--device cuda:0,cuda:2: torch sees 2 CUDA devices here"),
        ("cuda,cuda:0", "--device cuda,cuda:0: names a device twice"),
        ("cpu,cpu", "--device cpu,cpu: names a device twice"),
        ("gpu", "--device gpu: no device of torch; allowed are auto, cpu, cuda, cuda:1, ..."),
        ("", "--device : no device of torch"),
        ("meta", "--device meta: this torch "),
    ],
)
def test_what_is_not_there_is_refused(gpus, text, message):
    gpus(2)
    for choose in (resolve_devices, choose_device):
        with pytest.raises(ValueError, match="^" + message.replace(".", r"\.")):
            choose(text)


def test_one_device_is_not_two(gpus):
    gpus(2)
    with pytest.raises(ValueError, match=r"^--device cuda:0,cuda:1: must be one device here"):
        choose_device("cuda:0,cuda:1")


@pytest.mark.parametrize("name", COMMANDS)
def test_gpus_that_are_named_and_not_seen_are_no_silent_cpu(gpus, monkeypatch, name):
    """Falling back to the CPU would be found out hours later; who wants that says so."""
    gpus(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    app, *arguments = COMMANDS[name]
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 2
    assert f"CUDA_VISIBLE_DEVICES=1: torch {torch.__version__} sees none of these GPUs" in said.stderr
    assert resolve_devices("cpu") == ["cpu"]


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: {1, 3, 4}, raising=False)
    assert devices.num_cores() == 3
    monkeypatch.delattr(devices.os, "sched_getaffinity")  # not every system has it
    monkeypatch.setattr(devices.os, "cpu_count", lambda: None)
    assert devices.num_cores() == 1
