"""Hooks of mkdocs.yml: pages lie as they do in the repository, so that links hold in both."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
from _make import REPOSITORY, slug

#: Pages, and what they show or link to.
SHOWN = (
    "*.md",
    "docs/**/*.md",
    "docs/*.png",
    "docs/*.svg",
    "docs/*.json",
    "docs/*.css",
    "benchmarks/README.md",
    "benchmarks/results/*.md",
    "benchmarks/results/*.png",
    "benchmarks/results/*.svg",
    "examples/**/*.md",
    "examples/**/*.py",
)
#: Parts of the menu that follow from what is there.
LISTED = {"Reference": "docs/reference", "Results": "benchmarks"}
FIRST = {"README", "presets", "run"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the pages that scripts write; name headings as Git hosts do."""
    menu: list[Any] = config.nav or []
    for title, folder in LISTED.items():
        found = REPOSITORY.glob(f"{folder}/**/*.md")
        pages = sorted(found, key=lambda path: (path.stem not in FIRST, path))
        menu.append({title: [path.relative_to(REPOSITORY).as_posix() for path in pages]})
    config.nav = menu
    config.mdx_configs["toc"] = {"slugify": lambda heading, _: slug(heading)}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take the pages from where they lie, in place of the folder that mkdocs looked into."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for pattern in SHOWN:
        for path in sorted(REPOSITORY.glob(pattern)):
            name = path.relative_to(REPOSITORY).as_posix()
            files.append(File(name, str(REPOSITORY), config.site_dir, config.use_directory_urls))
    return files
