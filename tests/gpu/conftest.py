"""Tests of the CUDA paths, against the same computation on the CPU. They need PyTorch and no Ray.

python -m pytest tests/gpu                  on a machine with a CUDA device
python -m pytest tests/gpu --device cpu     a rehearsal without one: that the tests themselves run
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", choices=["cuda", "cpu"], help="what tests/gpu compares with the CPU")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """All tests of this folder are marked ``gpu``. Those that cannot run without a CUDA device, which are slow, come last; a
    rehearsal leaves them out."""
    mine = [item for item in items if HERE in item.path.parents]
    for item in mine:
        item.add_marker(pytest.mark.gpu)
    impossible = [item for item in mine if item.get_closest_marker("cuda_only")]
    items.sort(key=lambda item: item in impossible)
    if config.getoption("--device", "cuda") == "cpu":
        config.hook.pytest_deselected(items=impossible)
        items[:] = [item for item in items if item not in impossible]


@pytest.fixture
def device(pytestconfig: pytest.Config) -> Iterator[str]:
    """Where the code under test computes. Float32 is float32: no TF32 in matrix products and convolutions."""
    chosen = str(pytestconfig.getoption("--device", "cuda"))
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.fail("there is no CUDA device here; --device cpu rehearses these tests")
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield chosen
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())
