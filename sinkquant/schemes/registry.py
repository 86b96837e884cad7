"""Every number format that there is, in one list, and how one is found."""

from __future__ import annotations

from collections.abc import Iterable

from sinkquant.errors import RequestError
from sinkquant.extensions import brought, loaded
from sinkquant.schemes import bitsandbytes, blocks, fp8, gguf, gptq, integers, quanto
from sinkquant.schemes.inputs import NO_ROUNDING, input_format
from sinkquant.schemes.scheme import DEFAULT_BACKEND, Scheme
from sinkquant.schemes.weight_format import WeightFormat

GROUP = "sinkquant.schemes"
"""The group of entry points that other packages bring schemes by, under the name of their storage."""
SCHEMES: tuple[Scheme, ...] = (
    integers.INTEGERS, integers.IN_BYTES, fp8.FP8,
    blocks.NVFP4, blocks.MXFP4, blocks.MXFP8,
    *bitsandbytes.FOUR_BIT, bitsandbytes.LLM_INT8,
    quanto.INTEGERS, quanto.FLOAT8,
    gptq.GPTQ, gptq.ZEROS, *gguf.GGUF)


def all_schemes() -> list[Scheme]:
    """Every scheme, built in or from an installed package.

    Raises:
        RequestError: an entry point names no scheme of its name.
    """
    return [*SCHEMES, *(_brought(name) for name in sorted(brought(GROUP)))]


def scheme_of(form: WeightFormat) -> Scheme:
    """The scheme of a format."""
    return find(form.storage, form.kind)


def find(storage: str, kind: str = "int") -> Scheme:
    """The scheme that a plan names.

    Raises:
        RequestError: there is none.
    """
    for scheme in SCHEMES:
        if (scheme.storage, scheme.kind) == (storage, kind):
            return scheme
    if storage in brought(GROUP) and (found := _brought(storage)).kind == kind:
        return found
    kinds = " or ".join(repr(scheme.kind) for scheme in all_schemes() if scheme.storage == storage)
    if not kinds:
        raise RequestError(f"there is no storage {storage!r} of weights; install the package that brings it.")
    raise RequestError(f"the storage {storage!r} holds weights of the kind {kinds}, not {kind!r}.")


def multiplied_with(scheme: Scheme, inputs: str) -> Scheme:
    """The scheme of a storage whose weights are multiplied with inputs in a format: FP8 with FP8, say.

    Raises:
        RequestError: there is none.
    """
    return scheme if inputs == NO_ROUNDING else find(scheme.storage, input_format(inputs).kind)


def backends() -> list[str]:
    """Whose files a checkpoint may be made of, the default first."""
    return list(dict.fromkeys(scheme.backend for scheme in all_schemes()))


def of_backend(backend: str) -> list[Scheme]:
    """The schemes whose weights are held by a backend's files."""
    return [scheme for scheme in all_schemes() if scheme.backend == backend]


def backend_of(forms: Iterable[WeightFormat]) -> str:
    """The backend whose checkpoints hold these formats; compressed-tensors where there are none."""
    found = {scheme_of(form).backend for form in forms}
    return found.pop() if len(found) == 1 else DEFAULT_BACKEND


def packages_of(backend: str) -> dict[str, str]:
    """The distributions that a backend needs beyond those of every checkpoint, with the module of each."""
    return {package: module for scheme in of_backend(backend) for package, module in scheme.packages}


def known_storage(storage: str) -> str:
    """The name, for pydantic. Raises ValueError where no scheme has it; so do those below."""
    return _known(storage, (scheme.storage for scheme in all_schemes()), "a weight is stored as one of")


def known_backend(backend: str) -> str:
    """The name of a backend."""
    return _known(backend, backends(), "a backend is one of")


def known_format(name: str) -> str:
    """The name of a format of weights in a recipe."""
    return _known(name, (scheme.format for scheme in all_schemes() if scheme.format), "weights have one of the formats")


def known_ends(name: str) -> str:
    """What the token embedding and the output head are held in."""
    return _known(name, (scheme.ends for scheme in all_schemes()), "the embedding and the head are held in one of")


def _known(name: str, names: Iterable[str], what: str) -> str:
    known = dict.fromkeys(names)
    if name not in known:
        raise ValueError(f"{what} {', '.join(known)}, not {name!r}")
    return name


def _brought(name: str) -> Scheme:
    scheme = loaded(GROUP, name, Scheme)
    if scheme.storage != name:
        raise RequestError(f"the entry point {name!r} of {GROUP} is a scheme with the storage {scheme.storage!r}; mend "
                           "the package that brings it.")
    return scheme
