"""PyTorch in the place of both twins: for what is asked of a rung that does not need the other framework's compiler."""

from twinformer.parity.evidence import Evidence
from twinformer.parity.remembered import Remembered
from twinformer.parity.twins import TorchTwin

#: serves every test that plants no fault in PyTorch's twin: it would answer as it did without
UNHARMED = Remembered(TorchTwin())


class Other:
    """The first twin under another name. What that answered is not computed again: it is wrong where that is wrong, and
    a difference from one run to the next does not show."""

    name = "other"

    def __init__(self, first):
        self.first = first

    def once(self, what, case, ask):
        return self.first.once(what, case, ask)

    def __getattr__(self, name):
        return getattr(self.first, name)


def torch_twice(case):
    """Both as they are now, planted faults included."""
    first = Remembered(TorchTwin())
    return Evidence(case, (first, Other(first)))


class Second(TorchTwin):
    """One that computes everything itself."""

    name = "other"
