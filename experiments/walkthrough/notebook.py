"""Writes walkthrough.ipynb from walkthrough.py: `python experiments/walkthrough/notebook.py`."""

import json
from pathlib import Path

HERE = Path(__file__).parent


def cells(script: str) -> list[dict]:
    """The cells of a script in which each starts with `# %%`, as a notebook's."""
    made: list[dict] = []
    for number, part in enumerate(script.split("# %%")[1:]):
        head, _, body = part.partition("\n")
        lines = body.strip("\n").splitlines()
        markdown = head.strip() == "[markdown]"
        if markdown:
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        cell: dict = {
            "cell_type": "markdown" if markdown else "code",
            "id": f"cell-{number}",
            "metadata": {},
            "source": "\n".join(lines).splitlines(keepends=True),
        }
        made.append(
            cell if markdown else cell | {"execution_count": None, "outputs": []}
        )
    return made


def notebook(script: str) -> str:
    """A script as the text of a notebook."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {
        "cells": cells(script),
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    text = (HERE / "walkthrough.py").read_text(encoding="utf-8")
    (HERE / "walkthrough.ipynb").write_text(notebook(text), encoding="utf-8")
