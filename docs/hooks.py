"""What the documentation site takes from outside of `docs/`: files that pages link to, the API, the notebooks.

`mkdocs build` calls the functions named `on_…`. Anything wrong is a warning, with which a strict build fails.
"""

from __future__ import annotations

import ast
import logging
import os
import posixpath
import re
from pathlib import Path

import nbformat
from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
LOG = logging.getLogger("mkdocs.hooks.filterfold")

ROOMS = {
    "pruning": "Prune, repair",
    "online": "While training, teachers, families",
    "graph": "Trace",
    "plan": "Groups and plans",
    "surgery": "Cut, verify, save",
    "profiling": "Cost and time",
    "export": "Export",
    "errors": "Errors",
    "training": "Training",
    "zoo": "Networks",
    "data": "Images",
}
"""What the rooms' pages of the API are called, in the order of the navigation; others follow under their own names."""

BESIDES = {
    "online": ["online.lightning.LightningCallback", "online.huggingface.HuggingFaceCallback"],
    "training": ["training.Recipe", "training.train", "training.evaluate"],
    "zoo": ["zoo.build"],
    "data": ["data.load", "data.batches"],
}
"""Names beside those of `filterfold.__all__` that the tutorials use."""

FROM_DOCS = re.compile(r"\]\((?:\.\./)+([^)#]+)")
FROM_ROOT = re.compile(r"\]\(([^):#]+)")
TO_ROOT = re.compile(r"\]\(((?:\.\./)+)([^)]+)\)")


# --- what the site takes in ----------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The API's pages, and what else the checkout has, into the navigation."""
    config.markdown_extensions.append(Sessions())
    sections = {name: section for entry in config.nav or [] for name, section in entry.items()}
    (api,) = [entry for entry in config.nav or [] if "API reference" in entry]
    api["API reference"] = [{ROOMS.get(room, room): f"api/{room}.md"} for room in public()]
    known = str(config.nav)
    for path in sorted(Path(config.docs_dir).glob("*.md")):  # a new page is in the site before it has its place
        if f"'{path.name}'" not in known:
            sections["Use it"].append(path.name)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pages for the API and the notebooks, and every file of the checkout that a page links to."""
    for room, names in public().items():
        blocks = [f"# {ROOMS.get(room, room)}\n", *(f"::: filterfold.{name}\n" for name in names)]
        files.append(File.generated(config, f"api/{room}.md", content="\n".join(blocks)))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        add_notebook(files, config, path)
    linked = set()
    for page in [file for file in files.documentation_pages() if not file.src_uri.startswith("api/")]:
        linked |= set(FROM_DOCS.findall(page.content_string))
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text().replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
        linked |= set(FROM_ROOT.findall(text))
    for name in sorted(linked):
        if files.get_file_from_path(name) is None and (ROOT / name).is_file():
            file = File.generated(config, name, abs_src_path=str(ROOT / name))
            file.inclusion = InclusionLevel.INCLUDED  # also where the name begins with a dot
            files.append(file)
    return files


def public() -> dict[str, list[str]]:
    """Room → where the names of `filterfold.__all__` are defined in it, read without importing anything."""
    names = next(ast.literal_eval(node.value) for node in parsed("").body if assigned(node) == "__all__")
    rooms: dict[str, list[str]] = {room: [] for room in ROOMS}
    for name in sorted(names, key=str.swapcase):  # functions before classes
        module = home("", name)
        rooms.setdefault(module.split(".")[0], []).append(f"{module}.{name}")
    for room, others in BESIDES.items():
        rooms.setdefault(room, []).extend(home(*name.rsplit(".", 1)) + "." + name.rsplit(".", 1)[1] for name in others)
    return {room: found for room, found in rooms.items() if found}


def place(module: str) -> Path:
    """The file or folder of `filterfold.MODULE`."""
    path = ROOT.joinpath("src", "filterfold", *module.split("."))
    return path if path.is_dir() else path.with_suffix(".py")


def parsed(module: str) -> ast.Module:
    """Its code."""
    path = place(module)
    return ast.parse((path / "__init__.py" if path.is_dir() else path).read_text())


def assigned(node: ast.stmt) -> str:
    """The name that a statement assigns to, if it is one that assigns."""
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return getattr(target, "id", "")


def home(module: str, name: str) -> str:
    """The module that defines a name, found by following imports: a function may have the name of its file."""
    parts = module.split(".") if module else []
    package = parts if place(module).is_dir() else parts[:-1]
    for node in ast.walk(parsed(module)):
        if (
            isinstance(node, ast.ImportFrom)
            and node.level
            and name in [alias.asname or alias.name for alias in node.names]
        ):
            above = package[: len(package) + 1 - node.level]
            return home(".".join([*above, *filter(None, [node.module])]), name)
    return module


def add_notebook(files: Files, config: MkDocsConfig, path: Path) -> None:
    """A notebook, executed, as a page beside the file itself."""
    notebook = nbformat.read(path, as_version=4)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    local = Config(KernelManager={"transport": "ipc"})
    NotebookClient(notebook, config=local, coalesce_streams=True).execute(env=environment)
    notebook.cells = [cell for cell in notebook.cells if "remove" not in cell.metadata.get("tags", [])]
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    link = f"[{path.name}]({path.name}){{ download }}"
    note = f"!!! note\n    This page is a notebook, run when the site was built: {link}\n"
    title, _, rest = text.lstrip().partition("\n")
    files.append(File.generated(config, f"notebooks/{path.stem}.md", content=f"{title}\n\n{note}\n{rest}"))
    for name, content in resources.get("outputs", {}).items():
        files.append(File.generated(config, f"notebooks/{name}", content=content))


# --- what becomes of it --------------------------------------------------------------------------


class Sessions(Extension):
    """Blocks with `>>>` are shown as sessions: prompts and results are not copied with the code."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Before fences are looked for."""

        class Prompts(Preprocessor):
            def run(self, lines: list[str]) -> list[str]:
                text = re.sub(r"^( *)```python\n(?= *>>> )", r"\1```pycon\n", "\n".join(lines), flags=re.M)
                text = re.sub(r"\n\s*\n( *```)$", r"\n\1", text, flags=re.M) if "```pycon" in text else text
                return text.split("\n")

        md.preprocessors.register(Prompts(md), "sessions", 33)


def on_page_markdown(markdown: str, page: Page, files: Files, **_: object) -> str:
    """Links to the checkout's files lead to their copies in the site."""

    def moved(match: re.Match[str]) -> str:
        up, target = match.groups()
        place = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), up))
        if place != ".." or files.get_file_from_path(target.split("#")[0]) is None:
            return match[0]
        return f"]({posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or '.')})"

    return TO_ROOT.sub(moved, markdown)


def on_post_page(output: str, page: Page, **_: object) -> str:
    """Nothing is fetched from elsewhere when a page is opened."""
    for tag in re.findall(r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=.?https?:[^>]*>", output):
        LOG.warning("%s would fetch something from elsewhere: %s", page.file.src_uri, tag)
    return output
