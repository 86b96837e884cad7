"""Links of the documentation as they are on its site. `make docs` builds it, and fails where one leads nowhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "develop" / "site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("page", "link", "there"), [
    ("guides/policy.md", "[a](engines.md#x)", "[a](engines.md#x)"),
    ("guides/policy.md", "[a](../../evals/results/demo.md#x)", "[a](../evals/results/demo.md#x)"),
    ("README.md", "[a](../CONTRIBUTING.md)", "[a](CONTRIBUTING.md)"),
    ("evals/results/demo.md", "[a](../../docs/guides/policy.md)", "[a](../../guides/policy.md)"),
    ("CONTRIBUTING.md", "[a](docs/develop/house.md)", "[a](develop/house.md)"),
    ("guides/policy.md", "[a](../../sinkquant/policy/)", "a"),
    ("guides/policy.md", "[a](nowhere.md) [b](../../nowhere.md)", "[a](nowhere.md) [b](../../nowhere.md)"),
    ("guides/policy.md", "[a](#x) [b](https://x.org/y.md) ![c](../report.png)",
     "[a](#x) [b](https://x.org/y.md) ![c](../report.png)")])
def test_links_lead_to_the_same_page(site, page, link, there):
    assert site.with_links(link, page) == there


def test_all_measured_pages_are_on_the_site(site):
    assert {"CONTRIBUTING.md", "evals/results/smollm2.md"} <= set(site.beside())
