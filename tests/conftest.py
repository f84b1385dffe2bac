"""What all tests share: GPU tests skip with a reason, or fail with --require-gpu."""

import pytest

from penstock import _core


def pytest_addoption(parser):
    parser.addoption("--require-gpu", action="store_true", help="fail, not skip, without a GPU")
    parser.addoption(
        "--all-modules", action="store_true", help="try all cases of torch's lists, not a sample"
    )


def pytest_collection_modifyitems(config, items):
    if _core.cuda_device_count() > 0:
        return
    reason = f"no CUDA device: {_core.no_cuda_reason()}"
    for item in items:
        if "gpu" in item.keywords:
            if config.getoption("--require-gpu"):
                raise pytest.UsageError(f"--require-gpu, but {reason}")
            item.add_marker(pytest.mark.skip(reason=reason))
