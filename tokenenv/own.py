"""Objects of a user's own, named ``module:Name`` or ``path/to/file.py:Name``."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tokenenv.errors import UserError, did_you_mean

_PREFIX = "tokenenv_own_"
_DIGESTS: dict[str, str] = {}
"""By the name of the module, the SHA-256 of the file that it was made of."""

REGISTER = "register_reducer, register_policy or register_rules"
"""For messages: how a user's own class is made known to files that hold one."""

_FORM = "give module:Name, importable from here or installed, or path/to/file.py:Name"


@dataclass(frozen=True)
class Own:
    """What was found under a word.

    Attributes:
        object: the class, function or value.
        origin: where it came from: ``module``, its name, or ``file``, its absolute path; and
            ``sha256`` of the source, where there is one.
    """

    object: Any
    origin: dict[str, str]


def is_own(word: str) -> bool:
    """Whether ``word`` has the form ``module:Name`` or ``path/to/file.py:Name``."""
    place, colon, name = word.rpartition(":")
    return bool(colon) and name.isidentifier() and (place.endswith(".py") or _is_module(place))


def load_own(word: str) -> Own:
    """The object that ``word`` names.

    Modules are looked for in the current folder too. A file is imported once; changed since, it is
    imported anew.

    Raises:
        UserError: not of that form, no such file, an import that fails, or no such name in it. The
            exception of the import is the error's cause.
    """
    place, _, name = word.rpartition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if place.endswith(".py"):
        path = Path(place).resolve()
        if not os.path.isfile(path):
            raise _mistake(word, f"there is no file '{place}'")
        source = path.read_bytes()
        digest = hashlib.sha256(source).hexdigest()
        module = _import_file(word, path, source, digest)
        return Own(_attribute(word, module, name), {"file": str(path), "sha256": digest})
    if not _is_module(place):
        raise _mistake(word, f"'{place}' is no module's name")
    try:
        module = importlib.import_module(place)
    except (Exception, SystemExit) as error:
        raise _failed(word, error) from error
    found = _attribute(word, module, name)
    file = _source_file(found, module)
    return Own(found, {"module": place} | ({"sha256": _sha256(file)} if file else {}))


def split_own(what: str) -> tuple[str, str] | None:
    """``"file.py:Name:key=value"`` -> ``("file.py:Name", "key=value")``; None of another form."""
    place, _, rest = what.partition(":")
    name, _, arguments = rest.partition(":")
    word = f"{place}:{name}"
    return (word, arguments) if is_own(word) else None


def origin_of(cls: type) -> dict[str, str] | None:
    """Where a class of a user's own comes from, so that :func:`load_origin` finds it again.

    None for a class of this package, and for one that no import finds: typed into an interpreter,
    or made inside a function or another class.
    """
    module, name = sys.modules.get(cls.__module__), cls.__qualname__
    if module is None or is_packaged(cls) or not name.isidentifier():
        return None
    if not (cls.__module__.startswith(_PREFIX) or cls.__module__ == "__main__"):
        return {"module": cls.__module__, "name": name}
    path = Path(getattr(module, "__file__", None) or "").resolve()
    if cls.__module__ not in _DIGESTS and not path.is_file():
        return None
    digest = _DIGESTS.get(cls.__module__) or _sha256(path)
    return {"file": str(path), "name": name, "sha256": digest}


def is_packaged(cls: type) -> bool:
    """Whether a class is one of this package's own."""
    return cls.__module__.partition(".")[0] in ("tokenenv", "agents")


def same_place(one: type, other: type) -> bool:
    """Whether two classes are one piece of code: the same name in the same file, or notebook.

    A notebook's cell that runs again, and a file that is both run and named in a command, define
    their classes anew.
    """
    return _place(one) == _place(other)


def check_free(kind: str, name: str, known: type | None, cls: type) -> None:
    """Check that a name in a registry is free for a class; the same code may take it again.

    Args:
        kind: what the registry holds, such as ``reward``.
        name: the name.
        known: the class that has it; None: no class has.
        cls: the class that is to get it.

    Raises:
        UserError: another class has the name.
    """
    if known is not None and not same_place(known, cls):
        raise UserError(
            f"{kind} '{name}' exists already, it is {known.__module__}.{known.__qualname__}: give "
            f"{cls.__qualname__} another name"
        )


def _place(cls: type) -> tuple[str, str]:
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return (str(Path(file).resolve()) if file else cls.__module__, cls.__qualname__)


def load_origin(origin: Any) -> Any:
    """The class that :func:`origin_of` described. Its module or file is executed.

    Raises:
        UserError: it is no such description, or the class can't be found, which the message says
            how to mend; a file that has changed since is not executed.
    """
    parts = [origin.get(key) for key in ("module", "file")] if isinstance(origin, dict) else []
    place = next((part for part in parts if isinstance(part, str)), None)
    if place is None or not is_own(f"{place}:{origin.get('name')}"):
        raise UserError(f"{origin!r:.120} doesn't say where a class comes from: save it again")
    path = Path(place)
    if "file" in origin and path.is_file() and _sha256(path) != origin.get("sha256"):
        raise UserError(
            f"'{place}' has changed since its class '{origin['name']}' was saved: restore it, or "
            f"name the method anew as {place}:{origin['name']}, or import the class and register it"
        )
    try:
        return load_own(f"{place}:{origin['name']}").object
    except UserError as error:
        reason = str(error.__cause__ or error).removesuffix(f": {_FORM}")
        raise UserError(
            f"its class '{origin['name']}' came from '{place}', which can't be imported "
            f"({reason}): restore that, or import the class from where it is now, register it "
            f"({REGISTER}), and load again"
        ) from error


def _is_module(place: str) -> bool:
    return all(part.isidentifier() for part in place.split("."))


def _import_file(word: str, path: Path, source: bytes, digest: str) -> ModuleType:
    """The file as a module that is known to ``sys.modules``, as dataclasses and pickle need it.

    What runs is the ``source`` that ``digest`` is of. Python's own import would read the file again
    and might take older bytecode: it tells files apart by their size and the second of their time.
    """
    key = hashlib.sha256(f"{path}\n{digest}".encode()).hexdigest()[:16]
    name = f"{_PREFIX}{key}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _DIGESTS[name] = digest
    try:
        exec(compile(source, path, "exec"), vars(module))
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception | SystemExit):
            raise _failed(word, error) from error
        raise
    return module


def _attribute(word: str, module: ModuleType, name: str) -> Any:
    if hasattr(module, name):
        return getattr(module, name)
    hint = did_you_mean(name, [known for known in vars(module) if known[0] != "_"])
    raise _mistake(word, f"there is no '{name}' in it{hint}")


def _source_file(found: Any, module: ModuleType) -> Path | None:
    """Where an object is written; one that inspect knows no place of goes by its module."""
    for thing in (found, module):
        with contextlib.suppress(TypeError):
            source = inspect.getsourcefile(thing)
            return Path(source) if source else None
    return None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _failed(word: str, error: BaseException) -> UserError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    place = word.rpartition(":")[0]
    if isinstance(error, ModuleNotFoundError) and f"{place}.".startswith(f"{error.name}."):
        return _mistake(word, reason)  # of that module itself; others are what its code imports
    return UserError(
        f"'{word}' can't be imported ({reason}): correct its code; "
        "tokenenv --traceback shows the line"
    )


def _mistake(word: str, reason: str) -> UserError:
    return UserError(f"'{word}' can't be imported ({reason}): {_FORM}")
