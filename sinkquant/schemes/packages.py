"""The packages that a backend's library is in, which are never required by all."""

from __future__ import annotations

import importlib.util

from sinkquant.errors import RequestError
from sinkquant.schemes.registry import packages_of


def require_packages(backend: str) -> None:
    """Refuse a backend whose library is not installed."""
    for package, module in packages_of(backend).items():
        if not installed(module):
            raise RequestError(f"the backend {backend} needs the package {package}, which is not installed; run "
                               "pip install 'sinkquant[backends]'.")


def installed(module: str) -> bool:
    """Whether a module can be imported, without importing more of it than the packages around it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False
