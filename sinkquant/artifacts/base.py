"""What every artifact can do: be written as JSON that a person can diff, and be read back or refused."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from sinkquant.errors import RequestError, SinkquantError


class Strict(BaseModel):
    """A part of an artifact: unknown fields are errors, numbers are finite or null."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, protected_namespaces=(), allow_inf_nan=False)


class Artifact(Strict):
    """A versioned JSON file. Subclasses carry the name of their schema as the default of the field `schema_`."""

    def to_json(self, ascii_only: bool = False) -> str:
        """The artifact as indented JSON, `schema` first, floats at full precision."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=1, ensure_ascii=ascii_only) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the artifact to `path`, through a temporary file so that no half-written one is ever seen."""
        return write_atomically(Path(os.path.expanduser(path)), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read an artifact.

        Raises:
            RequestError: the file is missing, is not JSON, or is of another schema.
        """
        path = Path(os.path.expanduser(path))  # pathlib's fails for a name that begins with ~ and is no user
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RequestError(f"cannot read {path}: {error.strerror or error}.") from error
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{path} is not JSON ({error}); make it again.") from error
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls, data: object, where: str) -> Self:
        """Validate already decoded JSON; `where` names its origin in the error message."""
        found, schema = data.get("schema") if isinstance(data, dict) else None, cls.model_fields["schema_"].default
        if found != schema:
            raise RequestError(f"{where} has the schema {found!r} where {schema!r} is needed.")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise RequestError(f"{where} is not a valid {schema}: {place}: {first['msg']}.") from error


def real_place(folder: str | os.PathLike[str]) -> Path:
    """The absolute path behind `.`, `..`, `~` and symbolic links."""
    return Path(os.path.expanduser(folder)).resolve()


def require_writable(folder: Path) -> None:
    """Raises RequestError if nothing can be written into a folder, which need not be there yet."""
    place = real_place(folder)
    nearest = next(one for one in (place, *place.parents) if os.path.exists(one))  # pathlib's fails for want of rights
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        why = "is not yours to write into" if nearest.is_dir() else "is no folder"
        raise RequestError(f"nothing can be written into {folder}: {nearest} {why}; name another place.")


def write_atomically(path: Path, text: str) -> Path:
    """Write `text` to a temporary file beside `path`, or beside what a link there leads to, and rename it. A device or
    a pipe is written to as it is.

    Raises:
        SinkquantError: the disk is full or not writable.
    """
    real = Path(os.path.realpath(path))
    # Not tempfile's names, which only the owner may read: an artifact follows the umask.
    temporary = real.with_name(f".{real.name}.{uuid.uuid4().hex}")
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            path.write_text(text, encoding="utf-8")
            return path
        real.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
        temporary.replace(real)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise SinkquantError(f"cannot write {path}: {error.strerror or error}.") from error
        raise
    return path
