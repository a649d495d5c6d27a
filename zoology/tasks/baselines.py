"""What a predictor scores that cannot recall: the floor under a task's accuracies.

Each is estimated on training examples and scored on test examples of the same task, as the share of scored positions
it gets right.
"""

import torch

from .base import IGNORE_INDEX, Batch, Task


def baselines(task: Task, num_train: int = 2000, num_test: int = 1000, seed: int = 0) -> dict[str, float]:
    """Accuracy of `majority`, `position_only` and `position_copy` on the test split of `task`.

    Raises ValueError for counts or a seed that `Task.split` refuses.
    """
    train, test = task.split("train", num_train, seed), task.split("test", num_test, seed)
    predictors = {"majority": majority, "position_only": position_only, "position_copy": position_copy}
    return {name: predictor(train, test) for name, predictor in predictors.items()}


def majority(train: Batch, test: Batch) -> float:
    """Always the commonest label of `train`."""
    return _accuracy(torch.full_like(test.labels, _commonest(train.labels)), test)


def position_only(train: Batch, test: Batch) -> float:
    """At each position the label that is commonest there in `train`, without a look at the inputs."""
    guess = torch.full((test.labels.shape[1],), _commonest(train.labels))
    for t, column in _scored_columns(train):
        guess[t] = _commonest(column)
    return _accuracy(guess.expand_as(test.labels), test)


def position_copy(train: Batch, test: Batch) -> float:
    """At each position t the input at the position s(t) <= t that most often held t's label in `train`.

    The best a model can do that reads the context but not the question: in a dense layout the first question
    is most often about the first pair, which is enough to beat chance.
    """
    guess = torch.full_like(test.labels, _commonest(train.labels))
    inputs = train.inputs.int().T.contiguous().numpy()  # NumPy counts matches several times faster
    for t, column in _scored_columns(train):
        hits = (inputs[: t + 1] == column.int().numpy()).view("u1").sum(1, dtype="u4")  # IGNORE_INDEX is no token
        guess[:, t] = test.inputs[:, int(hits.argmax())]
    return _accuracy(guess, test)


def _scored_columns(batch: Batch):
    """Position and labels of every position that is scored in some example."""
    for t in (batch.labels != IGNORE_INDEX).any(0).nonzero().flatten().tolist():
        yield t, batch.labels[:, t]


def _commonest(labels: torch.Tensor) -> int:
    """The most frequent label; the smallest of several."""
    return int(torch.bincount(labels[labels != IGNORE_INDEX]).argmax())


def _accuracy(guess: torch.Tensor, test: Batch) -> float:
    scored = test.labels != IGNORE_INDEX
    return (guess == test.labels)[scored].double().mean().item()
