"""What the site makes of the package itself: pages of environments and of the API, and formulas.

A line ``% generated: environment ID`` (in reStructuredText ``.. generated: ...``) of a page is
replaced while the page is read, so nothing that is made lies in the repository.
"""

from __future__ import annotations

import inspect
import pkgutil
import pydoc
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import gymnasium
import latex2mathml.converter
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import tokenenv
from tokenenv.envs import ids
from tokenenv.game.rewards import REWARDS
from tokenenv.suite import TASKS
from tokenenv.vit.load import EMBEDDED

logger = logging.getLogger(__name__)

MARK = re.compile(r"^(?:%|\.\.) generated: (\w+) (\S+)$", re.MULTILINE)


def fill(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace the marks of a page, and links to folders that are pages here."""
    text = source[0].replace("(../examples/extend)", "(extending.md#examples)")
    makers = {
        "environment": environment,
        "tasks": tasks,
        "names": names,
        "modules": modules,
        "rest": rest,
    }
    source[0] = MARK.sub(lambda mark: makers[mark[1]](mark[2]), text)


# Environments -------------------------------------------------------------------------------------
def environment(id: str) -> str:
    """The page of a registered environment, Markdown."""
    (entry,) = (entry for entry in ids.IDS if entry.id == id)
    env = gymnasium.make(id).unwrapped
    faces = [gymnasium_face(entry, env), vector_face(entry), *library_faces(entry)]
    if entry.parallel and entry.aec:
        faces[1:1] = [pettingzoo_face(entry)]
    name = id.split("/")[1]
    picture = f"![Two scenes under random actions](../pictures/{name}.gif)"
    shown = f"{picture}\n\n*Random actions; made by* `python docs/pictures.py environments`."
    head = f"# {name}\n\n`{id}`: {entry.summary}.\n\n{shown}\n\n{facts(env)}"
    return "\n\n".join([head, *faces])


def facts(env: Any) -> str:
    """A table of what the environment has by default, read from one that was made."""
    game = env.game
    fitting = [name for name, reward in REWARDS.items() if reward.fits(game.rules.token_agents)]
    blocks = ", ".join(map(str, game.rules.blocks))
    rows = {
        "agents that decide about an image": f"{game.agents} tokens"
        if game.rules.token_agents
        else f"{game.steps}, one per block",
        "decisions in an episode": f"{game.steps}, in blocks {blocks}",
        "action space (Gymnasium)": f"`{shortened(env.action_space)}`",
        "observation space (Gymnasium)": f"`{env.observation_space}`",
        "global state": f"`({game.state_dim},)` float32",
        "rewards": ", ".join(f"`{name}`" for name in fitting),
        "model and images": f"`{EMBEDDED}`, {game.source.name}",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| by default | |", "|---|---|", *lines])


def shortened(space: Any) -> str:
    """A space in one line, however many agents it has."""
    if isinstance(space, gymnasium.spaces.MultiDiscrete):
        return f"MultiDiscrete([{space.nvec[0]}] * {len(space.nvec)})"
    return str(space)


def gymnasium_face(entry: ids.EnvId, env: Any) -> str:
    """The docstring of the environment's class, which is its page, its headings a level lower."""
    page = re.sub(r"^(#+) ", r"#\1 ", inspect.cleandoc(type(env).__doc__ or ""), flags=re.M)
    return f"## Gymnasium\n\n{link(entry.env)}\n\n{page}"


def pettingzoo_face(entry: ids.EnvId) -> str:
    """The docstring of the module that holds the PettingZoo environments."""
    made = import_module(entry.parallel.split(":")[0]).parallel_env()
    page = inspect.cleandoc(import_module(type(made).__module__).__doc__ or "")
    agents = f"`{made.possible_agents[0]}` to `{made.possible_agents[-1]}`"
    space = made.action_space(made.possible_agents[0])
    return (
        f"## PettingZoo\n\n{len(made.possible_agents)} agents, {agents}, each with the actions "
        f"`{space}`, in {made.max_cycles} cycles.\n\n{re.sub(r'^#+ .*', '', page, count=1)}"
    )


def vector_face(entry: ids.EnvId) -> str:
    """How a batch is made, and its spaces."""
    envs = gymnasium.make_vec(entry.id, num_envs=64)
    return (
        f"## Gymnasium `VectorEnv`\n\n{link(entry.vector_env)}\n\n```python\nenvs = gymnasium."
        f'make_vec("{entry.id}", num_envs=64)\n```\n\nOne batched game of 64 images. Observations '
        f"are `{envs.observation_space}`. All images end in the same step, and the next ones start "
        "in it (autoreset mode `SAME_STEP`)."
    )


def library_faces(entry: ids.EnvId) -> Iterator[str]:
    """How the learners of other libraries take the game."""
    task = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", entry.id.split("/")[1].split("-")[0]).upper()
    for title, path, code in (
        ("stable-baselines3", "sb3:SB3VecEnv", f'SB3VecEnv("{entry.id}", num_envs=64)'),
        ("TorchRL", "torchrl:TorchRLEnv", f'TorchRLEnv("{entry.id}", num_envs=64)'),
        ("BenchMARL", "benchmarl:GameTask", f"GameTask.{task}.get_task(config={{}})"),
    ):
        module, name = path.split(":")
        yield (
            f"## {title}\n\n{link(f'tokenenv.envs.{path}')}\n\n```python\nfrom tokenenv.envs."
            f"{module} import {name}\n\nmade = {code}\n```"
        )


def link(path: str) -> str:
    """A link to the API's entry of ``module:name``."""
    return "{py:obj}`" + path.replace(":", ".") + "`"


def tasks(_: str) -> str:
    """A table of the suite's tasks, Markdown."""
    rows = [
        f"| `{task.name}` | {task.level} | {task.description} | {task.agents} | {task.decisions} "
        f"| {task.budget:,} | {task.seeds} |"
        for task in TASKS
    ]
    head = "| task | level | | agents | decisions | episodes | seeds |"
    return "\n".join([head, "|---" * 7 + "|", *rows])


# API ----------------------------------------------------------------------------------------------
def names(package: str) -> str:
    """Everything in a package's ``__all__``: functions, then classes, then a list of modules."""
    module = import_module(package)
    found = {name: getattr(module, name) for name in module.__all__ if name != "__version__"}
    functions = [f"{package}.{n}" for n, value in found.items() if inspect.isfunction(value)]
    classes = [f"{package}.{n}" for n, value in found.items() if inspect.isclass(value)]
    others = [f"{package}.{n}" for n, value in found.items() if inspect.ismodule(value)]
    assert len(functions) + len(classes) + len(others) == len(found)
    parts = [f".. autofunction:: {name}" for name in functions]
    parts += [f".. autoclass:: {name}\n   :members:" for name in classes]
    sections = [heading("Functions", "-"), *parts[: len(functions)]]
    sections += [heading("Classes", "-"), *parts[len(functions) :]]
    if others:
        sections += [heading("Modules", "-"), *(f"- :py:mod:`{name}`" for name in others)]
    return "\n\n".join(sections)


def modules(package: str) -> str:
    """A section for each module of a package: what is defined there and stands nowhere else."""
    top = {id(getattr(tokenenv, name)): name for name in tokenenv.__all__}
    root = import_module(package)
    found = [package]
    if hasattr(root, "__path__"):
        found += [m.name for m in pkgutil.walk_packages(root.__path__, f"{package}.")]
    return "\n\n".join(section(name, top) for name in found if "._" not in name)


def rest(package: str) -> str:
    """Sections for what lies in a package and has no page of its own; not the command line."""
    texts = [page.read_text("utf-8") for page in Path(__file__).parent.glob("api/*.rst")]
    paged = {mark[2] for text in texts for mark in MARK.finditer(text) if mark[1] == "modules"}
    found = [m.name for m in pkgutil.iter_modules(import_module(package).__path__)]
    left = [name for name in found if not name.startswith("_") and name != "cli"]
    return "\n\n".join(
        modules(f"{package}.{name}") for name in left if f"{package}.{name}" not in paged
    )


def section(name: str, top: dict[int, str]) -> str:
    """A module's section, with links to those of its names that ``import tokenenv`` has."""
    lines = [heading(name, "-"), f".. automodule:: {name}\n   :members:\n   :ignore-module-all:"]
    if name in OPTIONAL_MODULES:
        return "\n\n".join(lines)
    held = vars(import_module(name))
    also = {n: top[id(value)] for n, value in held.items() if id(value) in top}
    own = {n: at for n, at in also.items() if getattr(held[n], "__module__", "") == name}
    if own:
        lines[-1] += f"\n   :exclude-members: {', '.join(own)}"
        roles = (f":py:obj:`tokenenv.{at}`" for at in own.values())
        lines.append(f"Defined here and described there: {', '.join(roles)}.")
    return "\n\n".join(lines)


def heading(text: str, line: str) -> str:
    """A heading in reStructuredText."""
    return f"{text}\n{line * len(text)}"


OPTIONAL_MODULES = (
    *(f"tokenenv.envs.{name}" for name in ("sb3", "torchrl", "benchmarl")),
    "tokenenv.suite.benchmarl",
)


def leave_pages(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Docstrings that are pages in Markdown stand among the environments; the API links to them."""
    if lines and lines[0].lstrip().startswith("#"):
        lines[:] = ["Its page is among the :doc:`environments </environments/index>`.", ""]


def find_home(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, shown: nodes.Element
) -> nodes.Element | None:
    """Link a name that docstrings take from another module than the one it is described at."""
    target = str(node.get("reftarget", ""))
    if not target.startswith(("tokenenv.", "agents.")):
        return None
    try:
        named = pydoc.locate(target)
    except Exception:  # a module that needs an optional library
        named = None
    if isinstance(named, TypeVar):
        return None
    home = f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', '')}"
    top = [
        home.replace(f"{value.__module__}.{value.__qualname__}", f"tokenenv.{name}")
        for name in tokenenv.__all__
        if inspect.isclass(value := getattr(tokenenv, name)) or inspect.isfunction(value)
    ]
    domain = env.domains["py"]
    for name in (home, *(name for name in top if name != home)):
        link = domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, shown)
        if link is not None:
            return link
    logger.warning("'%s' is described nowhere", target, location=node)
    return None


# Formulas -----------------------------------------------------------------------------------------
def as_mathml(writer: Any, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML, which browsers show without a script or a network."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    writer.body.append(latex2mathml.converter.convert(node.astext(), display=display))
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the above."""
    known = {f"environments/{entry.id.split('/')[1]}" for entry in ids.IDS}
    pages = {f"environments/{path.stem}" for path in app.srcdir.glob("environments/*-v*.md")}
    if known != pages:
        raise ValueError(f"pages of environments {sorted(pages)} for the ids {sorted(known)}")
    app.connect("source-read", fill)
    app.connect("autodoc-process-docstring", leave_pages)
    app.connect("missing-reference", find_home)
    app.add_html_math_renderer("mathml", (as_mathml, None), (as_mathml, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
