"""The user's mistakes, told apart from ours: shown as their message alone, without a traceback, exit code 2."""


class UserError(ValueError):
    """Something in a recipe, a dataset or a model that its owner can mend; the message says where, what and how."""


class Stopped(UserError):
    """A run that had begun cannot go on. Exit code 1: nothing is wrong with the recipe."""


class NoSplit(UserError):
    """A split that a source does not have."""


class BadRow(UserError):
    """A row that cannot be trained on. `row` counts from 0 in its table; who knows the source adds its name."""

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(row, problem)
        self.row, self.problem = row, problem
