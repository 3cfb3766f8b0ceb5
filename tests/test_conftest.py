"""Which warnings are errors."""

import warnings
from types import SimpleNamespace

import pytest
import torch

MESSAGE = "cumsum_cuda_kernel does not have a deterministic implementation"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU lacks deterministic operators")
def test_an_indeterminate_operator_is_an_error_without_a_gpu():
    with pytest.raises(UserWarning, match="deterministic"):
        warnings.warn(MESSAGE, UserWarning, stacklevel=1)


def test_an_indeterminate_operator_is_allowed_on_a_gpu(monkeypatch, request):
    rules = request.config.pluginmanager.get_plugin(str(request.path.with_name("conftest.py")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    marks = []
    rules.pytest_collection_modifyitems([SimpleNamespace(keywords={}, add_marker=marks.append)])
    assert [mark.name for mark in marks] == ["filterwarnings"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        action, message, category = marks[0].args[0].split(":")
        warnings.filterwarnings(action, message, {"UserWarning": UserWarning}[category])
        warnings.warn(MESSAGE, UserWarning, stacklevel=1)
