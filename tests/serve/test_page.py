"""The examples of docs/server.md run, and its routes and options are the real ones."""

from __future__ import annotations

import re
from pathlib import Path

import typer
from starlette.routing import Route

from mlx_diffgemma.cli.options import app_of
from mlx_diffgemma.cli.serve import serve as command
from mlx_diffgemma.serve.app import DIALECTS
from mlx_diffgemma.serve.state import FILL_PROMPT, State
from tests.serve.cases import SORTED

PAGE = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")


def test_the_python_examples_run(server, capsys):
    program = "\n".join(re.findall(r"^```py\n(.*?)^```$", PAGE, re.M | re.S))
    assert program.count("print(") >= 4
    exec(program.replace("http://127.0.0.1:8080", server.url.removesuffix("/v1")), {})
    printed = capsys.readouterr().out
    whole, streamed, *_ = printed.split("\n")
    assert (whole, streamed.split("\r")[0]) == (SORTED, SORTED)
    assert printed.rstrip().split("\r")[-1].startswith(SORTED)
    assert re.search(r'\{\s*"n"\s*:\s*[123]\s*\}', printed)


def test_every_route_is_on_the_page():
    routes: list[Route] = [route for dialect in DIALECTS for route in dialect(State())]
    for route in routes:
        path = route.path.replace("{name:path}", "{id}")
        own = path.startswith(("/v1", "/x/", "/page/", "/infill", "/health", "/metrics"))
        shown = path if own or path == "/" else f"/v1{path}"
        assert f"{shown}`" in PAGE, shown


def test_the_page_names_no_option_that_does_not_exist():
    known = {flag for p in typer.main.get_command(app_of(command)).params for flag in p.opts}
    assert set(re.findall(r"(--[a-z][a-z-]+)", PAGE)) <= known


def test_the_prompt_around_a_gap_is_the_one_that_is_used():
    assert FILL_PROMPT.replace("\n", "\\n") in PAGE
