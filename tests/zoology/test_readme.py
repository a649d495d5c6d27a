"""The README is true: its tables are today's, its examples run and do what it says."""

import re
import sys
from pathlib import Path

import pytest
import torch

import architectures
from architectures import registry
from zoology import __main__, tables, tasks
from zoology.runner import plan
from zoology.tasks import registry as task_registry

README = Path(__file__).parents[2] / "README.md"
PAGES = [README, *sorted(README.parent.glob("experiments/results/*/*.md")), *README.parent.glob("kernels/*/*.md")]


def example(marker):
    """The Python block that follows `<!-- example: marker -->`."""
    found = re.search(rf"<!-- example: {marker} -->\n```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    return found.group(1)


def num_lines(code):
    return sum(bool(line.strip()) for line in code.splitlines())


def test_tables_are_todays():
    pages = [page.read_text() for page in PAGES if "<!-- table:" in page.read_text()]
    assert sorted(re.findall("<!-- table: (.*) -->", "".join(pages))) == sorted(tables.TABLES)
    for text in pages:
        assert tables.replace_tables(text) == text


def test_an_unknown_table_is_refused():
    with pytest.raises(ValueError, match="unknown table 'animals': there are architectures, tasks"):
        tables.replace_tables("<!-- table: animals -->\n<!-- end -->")
    with pytest.raises(ValueError, match="nothing between <!-- table: NAME -->"):
        tables.replace_tables("no table")


def test_a_file_that_cannot_be_made_anew_is_named(tmp_path, capsys):
    assert tables.main([str(tmp_path / "NOTES.md")]) == 2
    assert "NOTES.md: No such file or directory" in capsys.readouterr().err
    page = tmp_path / "page.md"
    page.write_text("<!-- table: animals -->\n<!-- end -->")
    assert tables.main([str(page)]) == 2
    assert "page.md: unknown table 'animals'" in capsys.readouterr().err


SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", README.read_text(), flags=re.DOTALL))
COMMANDS = [(module, words.strip()) for module, words in re.findall(r"python -m zoology\.(\w+)([^#&\n]*)", SHELL)]


@pytest.mark.parametrize(("module", "arguments"), COMMANDS, ids=[" ".join(command) for command in COMMANDS])
def test_the_commands_have_the_options_that_are_shown(module, arguments, monkeypatch, capsys):
    """Every line of a shell block: the module answers to --help, and tells of each option that is used."""
    monkeypatch.setattr(sys, "argv", ["zoology", module, "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert not ended.value.code
    said = capsys.readouterr().out
    assert set(re.findall(r"--[a-z-]+", arguments)) <= set(re.findall(r"--[a-z-]+", said))
    for path in re.findall(r"experiments/\S+", arguments):
        assert (README.parent / path).exists()


def slugs(page):
    """What the headings of a page are linked by."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(README.parent)))
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    assert page != README or len(links) > 10
    for path, _, part in (link.partition("#") for link in links if "://" not in link):
        target = page.parent / path if path else page
        assert target.exists(), path
        shown = target / "README.md" if target.is_dir() else target
        assert not part or part in slugs(shown), f"{path}#{part}"


def test_every_table_row_names_its_state():
    rows = [row for row in tables.architecture_table().splitlines() if row.startswith("| `")]
    assert len(rows) == len(architectures.names())
    based = next(row for row in rows if row.startswith("| `based`"))
    features = 1 + 16 + 16 * 17 // 2
    assert f"{features * 65:,} = kv {features * 64:,} + key_sum {features:,}" in based


@torch.no_grad()
def test_the_architecture_example_is_an_architecture(tmp_path):
    code = example("architecture")
    assert num_lines(code) <= 20
    path = tmp_path / "decay_average.py"
    path.write_text(code)
    try:
        assert architectures.load_file(path) == ["decay_average"]
        mixer = architectures.create("decay_average", d_model=8).double()
        x = torch.randn(2, 5, 8, dtype=torch.float64)
        state, outputs = mixer.init_state(2, 5), []
        for t in range(5):
            y, state = mixer.step(x[:, t], state)
            outputs.append(y)
        assert torch.allclose(torch.stack(outputs, 1), mixer(x), rtol=1e-9)
        assert mixer.state_size(1000) == 8
    finally:
        registry._entries.pop("decay_average", None)


def test_the_use_example_runs(capsys):
    namespace = {"__name__": "readme_use"}
    exec(compile(example("use"), "README.md", "exec"), namespace)
    assert namespace["elements"] == sum(part[0].numel() for part in namespace["state"]) == 9945
    assert namespace["y"].shape == (2, 64)
    assert "9,945 = kv 9,792 + key_sum 153" in capsys.readouterr().out


def test_the_experiment_example_is_a_plan(tmp_path):
    path = tmp_path / "my_sweep.py"
    path.write_text(example("experiment"))
    runs = plan.make_plan(plan.load_sweep(path, "laptop"), "cpu")
    assert sorted((run.config.model.d_model, run.config.train.lr) for run in runs) == [
        (32, 5e-3), (32, 1e-2), (64, 5e-3), (64, 1e-2),
    ]  # fmt: skip
    assert {run.size.state_bytes[64] for run in runs} == {4 * (32 * 2 + 2 * 8 * 16), 4 * (64 * 2 + 2 * 16 * 32)}


def test_the_task_example_is_a_task():
    code = example("task")
    assert num_lines(code) <= 20
    try:
        exec(compile(code, "README.md", "exec"), {"__name__": "readme_task"})
        task = tasks.create("copy_first", vocab_size=16, seq_len=6)
        batch = task.sample(100, seed=0)
        assert torch.equal(batch.labels[:, -1], batch.inputs[:, 0])
        assert (batch.labels[:, :-1] == tasks.IGNORE_INDEX).all()
        assert task.required_bits() == 4.0
    finally:
        task_registry._TASKS.pop("copy_first", None)


def test_the_evaluate_example_runs():
    namespace = {"__name__": "readme_evaluate"}
    exec(compile(example("evaluate"), "README.md", "exec"), namespace)
    assert namespace["score"].accuracy == 1.0
