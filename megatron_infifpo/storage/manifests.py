"""JSON manifests of data sets and runs: written last, so with it what it describes is complete."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.aside import Aside


@dataclass(frozen=True)
class Format:
    """A kind of manifest.

    Attributes:
        name: value of its "format".
        version: value of its "version".
        made_by: the command that writes such manifests, for errors.
        schema: of its other fields, as `check_fields` takes it.
        older: what is wrong with earlier versions.
    """

    name: str
    version: int
    made_by: str
    schema: dict[str, Any]
    older: str = ""

    @property
    def fields(self) -> dict[str, Any]:
        """What a manifest says of its kind."""
        return {"format": self.name, "version": self.version}

    def write(self, prefix: str | Path, manifest: Mapping[str, Any], files: Aside) -> None:
        """Write `PREFIX.json` aside: as the last one of `files`, which publish it."""
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        files.path(f"{prefix}.json").write_text(text, encoding="utf-8")

    def read(self, prefix: str | Path) -> dict[str, Any]:
        """Read `PREFIX.json`.

        Raises:
            UserError: no manifest, not readable, of another format or version, or fields of other
                types.
        """
        path = Path(f"{prefix}.json")
        if not path.is_file():
            raise UserError(
                f"the manifest {path} is missing, expected a {self.name} of prefix {prefix}; it is "
                f"written last, so run {self.made_by} to its end"
            )
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"the manifest {path} is broken ({error}); run {self.made_by} again"
            ) from None
        found = manifest.get("format") if isinstance(manifest, dict) else None
        if found != self.name:
            raise UserError(
                f"the manifest {path} says format {found!r}, expected {self.name!r}; give the "
                f"prefix of a dataset written by {self.made_by}"
            )
        if manifest.get("version") != self.version:
            raise UserError(
                f"the manifest {path} says version {manifest.get('version')!r}, expected "
                f"{self.version}; write the dataset again with this version's {self.made_by}"
                f"{self.older and f' ({self.older})'}"
            )
        check_fields(manifest, self.schema, f"the manifest {path}")
        return manifest


def check_fields(found: Any, schema: Any, where: str) -> None:
    """Check the types of a JSON value.

    Args:
        found: the value.
        schema: a type or a tuple of types; `[schema]` for a list; `{name: schema}` for an object
            with at least these fields.
        where: names the value in errors.

    Raises:
        UserError: another type, or a field that is missing.
    """
    if isinstance(schema, dict):
        kind: Any = dict
    elif isinstance(schema, list):
        kind = list
    else:
        kind = schema
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        names = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(_JSON_NAMES.get(name, name.__name__) for name in names)
        raise UserError(f"{where} is {str(found)[:40]!r}, expected {expected}: write it again")
    if isinstance(schema, list):
        for number, value in enumerate(found):
            check_fields(value, schema[0], f"{where}[{number}]")
    elif isinstance(schema, dict):
        for name, inside in schema.items():
            if name not in found:
                raise UserError(f"{where} has no {name!r}: write it again")
            check_fields(found[name], inside, f"{where}: {name}")


_JSON_NAMES = {dict: "an object", list: "a list", str: "a string", int: "an integer"}
_JSON_NAMES |= {type(None): "null", bool: "true or false"}
